//! The thread that carries frames in one direction as a [`Lane`] says.
//!
//! While anything is on its way the thread looks every [`TICK`] and not at every frame: on a machine that also has
//! to run what is measured, a wake-up for each frame would cost more than the frame. So a frame comes and goes up to a
//! tick late, which the rate does not see, since the lane computes it from its own time.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use serde::Serialize;
use tun::Device;

use super::conditions::Change;
use super::lane::{Counts, Lane};

/// Between two looks while anything is on its way.
const TICK: Duration = Duration::from_micros(100);
/// How much later than asked the kernel may wake the thread, in nanoseconds. Its default is half a tick.
const TIMER_SLACK_NS: u64 = 1_000;
/// Frames that are read before others are written.
const BATCH_FRAMES: usize = 512;
/// How long the thread waits for a frame before it looks whether the wire is over.
const IDLE: Duration = Duration::from_millis(20);
/// The largest Ethernet frame that a TAP can have.
const FRAME_BYTES_MAX: usize = 65_536;

/// What one direction of a wire has carried.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Traffic {
    /// What has become of packets.
    #[serde(flatten)]
    pub counts: Counts,
    /// Delivered packets that the far end would not take, for instance because it was down.
    pub refused: u64,
    /// The most that a packet was delivered later than it should have been, since the machine was busy.
    pub lateness_max: Duration,
}

/// A thread that carries frames until it is dropped.
#[derive(Debug)]
pub(super) struct Carrier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    is_over: AtomicBool,
    changes: Mutex<Vec<Change>>,
    traffic: Mutex<Traffic>,
}

impl Carrier {
    pub(super) fn start(
        lane: Lane<Box<[u8]>>,
        from: &Arc<Device>,
        to: &Arc<Device>,
        begun: Instant,
    ) -> io::Result<Carrier> {
        let shared = Arc::new(Shared::default());
        let course = Course {
            lane,
            from: Arc::clone(from),
            to: Arc::clone(to),
            begun,
            shared: Arc::clone(&shared),
            frame: vec![0; FRAME_BYTES_MAX],
        };
        let thread = thread::Builder::new()
            .name("wire".to_owned())
            .spawn(move || course.run())?;
        Ok(Carrier {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn change(&self, change: Change) {
        lock(&self.shared.changes).push(change);
    }

    pub(super) fn traffic(&self) -> Traffic {
        *lock(&self.shared.traffic)
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Course {
    lane: Lane<Box<[u8]>>,
    from: Arc<Device>,
    to: Arc<Device>,
    begun: Instant,
    shared: Arc<Shared>,
    frame: Vec<u8>,
}

impl Course {
    fn run(mut self) {
        // Without it ticks are longer, and nothing is wrong.
        let _ = prctl::set_timerslack(TIMER_SLACK_NS);
        let mut is_idle = false;
        while !self.shared.is_over.load(Ordering::Relaxed) {
            let first = if is_idle {
                self.from.recv_timeout(&mut self.frame, IDLE)
            } else {
                thread::sleep(TICK);
                self.from.recv(&mut self.frame)
            };
            let now = self.begun.elapsed();
            let changes = std::mem::take(&mut *lock(&self.shared.changes));
            for change in changes {
                self.lane.change(now, change);
            }
            // An interface that is gone: the wire's end.
            let Ok(has_frames) = self.take(first, now) else {
                return;
            };
            self.give(now);
            is_idle = !has_frames && self.lane.is_empty();
        }
    }

    /// Takes in the frames that the near end has sent, the first of which is there already.
    fn take(&mut self, first: io::Result<usize>, now: Duration) -> io::Result<bool> {
        let mut first = Some(first);
        for frames in 0..BATCH_FRAMES {
            let received = first.take();
            match received.unwrap_or_else(|| self.from.recv(&mut self.frame)) {
                Ok(bytes) => self.lane.push(now, bytes, self.frame[..bytes].into()),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {
                        return Ok(frames > 0);
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(true)
    }

    /// Gives out the frames that have arrived.
    fn give(&mut self, now: Duration) {
        let (mut refused, mut lateness) = (0, Duration::ZERO);
        while let Some((arrived, frame)) = self.lane.pop(now) {
            lateness = lateness.max(now.saturating_sub(arrived));
            refused += u64::from(self.to.send(&frame).is_err());
        }
        let mut traffic = lock(&self.shared.traffic);
        traffic.counts = self.lane.counts();
        traffic.refused += refused;
        traffic.lateness_max = traffic.lateness_max.max(lateness);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
