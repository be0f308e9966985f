//! What a panic ends: one connection, or the whole process, but never a part of it unnoticed.
//!
//! | where | what happens |
//! | --- | --- |
//! | a task of one connection, in [`contain`] | that connection ends, and a log line says so |
//! | a task that the process cannot do without, in [`essential`] | [`essential_failure`] tells the main loop |
//! | the daemon's control thread outside of any task | the process ends at once, see [`end_process_here`] |
//! | anywhere else | the thread unwinds |

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use tokio::sync::Notify;

use crate::logging;

/// The exit code of a process that a panic has ended, as the standard library has it.
pub const EXIT_PANICKED: i32 = 101;

thread_local! {
    /// A panic now is caught by [`contain`].
    static IS_CONTAINED: Cell<bool> = const { Cell::new(false) };
    /// A panic that is not contained ends the process.
    static ENDS_PROCESS: Cell<bool> = const { Cell::new(false) };
    /// What has become of this thread's essential tasks.
    static FAILURE: Rc<Failure> = Rc::default();
}

#[derive(Default)]
struct Failure {
    task: RefCell<Option<&'static str>>,
    reported: Notify,
}

/// A task has panicked. What it had is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the task `{0}` panicked, which is a bug in ringtun")]
pub struct TaskPanicked(pub &'static str);

/// Has panics reported by lines that cannot fail, in place of the standard library's, whose write may wait.
pub fn install_hook() {
    std::panic::set_hook(Box::new(|info| {
        report(info);
        let contained = IS_CONTAINED.try_with(Cell::get).unwrap_or(false);
        let ends_process = ENDS_PROCESS.try_with(Cell::get).unwrap_or(false);
        if ends_process && !contained {
            std::process::exit(EXIT_PANICKED);
        }
    }));
}

/// From now on a panic of this thread that is not contained ends the process at once, without unwinding: nobody would
/// notice a thread that is gone, and destructors may wait for other threads.
pub fn end_process_here() {
    ENDS_PROCESS.set(true);
}

fn report(info: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let message = info.payload_as_str().unwrap_or("no message");
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    logging::complain_of_panic(&format!(
        "a bug: thread {} panicked at {place}: {message}",
        thread.name().unwrap_or("without a name"),
    ));
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        for line in backtrace.to_string().lines() {
            logging::complain_of_panic(line);
        }
    }
}

/// Runs a future to its end, or to its panic, which ends nothing else.
///
/// # Errors
/// [`TaskPanicked`]; it has been logged.
pub async fn contain<T>(
    task: &'static str,
    future: impl Future<Output = T>,
) -> Result<T, TaskPanicked> {
    let mut future = pin!(future);
    poll_fn(|context| {
        let outer = IS_CONTAINED.replace(true);
        // The future is not used again after a panic.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        IS_CONTAINED.set(outer);
        match polled {
            Ok(polled) => polled.map(Ok),
            Err(_) => {
                let panicked = TaskPanicked(task);
                tracing::error!("{panicked}");
                Poll::Ready(Err(panicked))
            }
        }
    })
    .await
}

/// Runs a future that the process cannot do without. Its panic is told to [`essential_failure`] of the same thread.
pub async fn essential<T>(task: &'static str, future: impl Future<Output = T>) {
    if contain(task, future).await.is_err() {
        FAILURE.with(|failure| {
            failure.task.borrow_mut().get_or_insert(task);
            failure.reported.notify_one();
        });
    }
}

/// Waits until one of this thread's [`essential`] tasks has panicked. The process must end then.
pub async fn essential_failure() -> TaskPanicked {
    let failure = FAILURE.with(Rc::clone);
    loop {
        if let Some(task) = *failure.task.borrow() {
            return TaskPanicked(task);
        }
        failure.reported.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::yield_now;

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("runtime").block_on(future)
    }

    /// Run by the next test, in a process of its own.
    #[test]
    #[ignore = "it ends the process"]
    fn ends_the_process() {
        /// What a destructor must not get the time for.
        struct Waits;
        impl Drop for Waits {
            fn drop(&mut self) {
                std::thread::sleep(std::time::Duration::from_secs(3600));
            }
        }
        install_hook();
        end_process_here();
        let caught = run(contain("connection", async {
            panic!("a bug, for the test")
        }));
        assert_eq!(caught, Err::<(), _>(TaskPanicked("connection")));
        let _waits = Waits;
        panic!("the end, for the test");
    }

    #[test]
    fn a_panic_of_the_control_thread_ends_the_process() {
        let program = std::env::current_exe().expect("the test program");
        let output = std::process::Command::new(program)
            .args(["--exact", "panics::tests::ends_the_process", "--ignored"])
            .arg("--nocapture")
            .output()
            .expect("the test program");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(EXIT_PANICKED), "{stderr}");
        assert!(stderr.contains("the end, for the test"), "{stderr}");
        // The test harness would have ended with a summary.
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(!stdout.contains("test result"), "{stdout}");
    }

    #[test]
    fn a_contained_panic_ends_its_future_alone() {
        let result = run(contain("connection", async {
            yield_now().await;
            panic!("a bug, for the test");
        }));
        assert_eq!(result, Err::<(), _>(TaskPanicked("connection")));
        assert_eq!(run(contain("connection", async { 7 })), Ok(7));
        assert!(!IS_CONTAINED.get(), "the next panic is not contained");
    }

    #[test]
    fn what_a_panicking_task_held_is_dropped() {
        let held = Rc::new(());
        let theirs = Rc::clone(&held);
        let result = run(contain("connection", async move {
            let _held = theirs;
            yield_now().await;
            panic!("a bug, for the test");
        }));
        assert!(result.is_err());
        assert_eq!(Rc::strong_count(&held), 1);
    }

    #[test]
    fn the_panic_of_an_essential_task_is_told() {
        let failure = run(async {
            let task = essential("accept", async {
                yield_now().await;
                panic!("a bug, for the test");
            });
            // The one that is not done is told about, and not the one that is.
            essential("done", async {}).await;
            tokio::join!(task, essential_failure()).1
        });
        assert_eq!(failure, TaskPanicked("accept"));
    }
}
