//! Threads that go on when all of them have come this far, or have failed.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// One thread's share. Whoever drops it has arrived and does not wait.
#[derive(Debug)]
pub(super) struct Share(Arc<Latch>);

#[derive(Debug)]
struct Latch {
    missing: Mutex<usize>,
    all_there: Condvar,
}

impl Share {
    /// Shares for so many threads.
    pub(super) fn of(threads: usize) -> Vec<Share> {
        let latch = Arc::new(Latch {
            missing: Mutex::new(threads),
            all_there: Condvar::new(),
        });
        (0..threads).map(|_| Share(Arc::clone(&latch))).collect()
    }

    /// Arrives, and waits for the others.
    pub(super) fn wait(self) {
        let latch = Arc::clone(&self.0);
        drop(self);
        let missing = latch.missing.lock().unwrap_or_else(PoisonError::into_inner);
        drop(
            latch
                .all_there
                .wait_while(missing, |missing| *missing > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut missing = self
            .0
            .missing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *missing -= 1;
        if *missing == 0 {
            self.0.all_there.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn nobody_goes_on_before_all_have_come_or_failed() {
        let mut shares = Share::of(3);
        let (failed, late) = (shares.pop(), shares.pop().expect("three shares"));
        let (sender, receiver) = mpsc::channel();
        let waiting = thread::spawn({
            let share = shares.pop().expect("three shares");
            let sender = sender.clone();
            move || {
                share.wait();
                sender.send("waited").expect("somebody listens");
            }
        });
        drop(failed);
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        sender.send("late").expect("somebody listens");
        late.wait();
        waiting.join().expect("no panic");
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), ["late", "waited"]);
    }
}
