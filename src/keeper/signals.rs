//! What each signal means to the keeper. The daemon ignores them all: the keeper decides.
//!
//! | signal | what the keeper does |
//! | --- | --- |
//! | SIGINT, SIGTERM, SIGQUIT | stops in order; the second time at once |
//! | SIGHUP | stops if there was a controlling terminal at the start and nohup(1) is not in use, else reloads |
//! | SIGTSTP, SIGCONT | job control, left to the kernel |
//! | SIGKILL, SIGSTOP | left to the kernel, which allows nothing else |
//! | SIGPIPE, SIGXFSZ, SIGCHLD, SIGURG, SIGWINCH | nothing |
//! | all others, real-time signals too | nothing, but a debug line |
//!
//! A fault of the process itself, such as a real SIGSEGV, still ends it: `ringtun down` or the next start cleans up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::KeeperError;
use crate::sys::signal;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Stop in order, or at once if that is going on.
    Stop,
    /// Read again what can change while it runs.
    Reload,
    /// Go on.
    Ignore,
}

/// What SIGHUP means to this process, which is found out once, at the start: later the terminal may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// The terminal is gone, and with it the user.
    Stops,
    /// There is no terminal, or nohup(1) says not to care about it.
    Reloads,
}

impl Hangup {
    fn find() -> Self {
        if signal::has_controlling_terminal() && !signal::hangup_is_ignored() {
            Hangup::Stops
        } else {
            Hangup::Reloads
        }
    }
}

/// The table: what the signal of this number asks for.
pub fn action(number: i32, hangup: Hangup) -> Action {
    match Signal::try_from(number) {
        Ok(Signal::SIGINT | Signal::SIGTERM | Signal::SIGQUIT) => Action::Stop,
        Ok(Signal::SIGHUP) if hangup == Hangup::Stops => Action::Stop,
        Ok(Signal::SIGHUP) => Action::Reload,
        _ => Action::Ignore,
    }
}

/// All signals that can be received, as something to poll.
#[derive(Debug)]
pub struct Signals {
    received: SignalFd,
    hangup: Hangup,
}

impl Signals {
    /// Blocks the signals, from now on and for all threads made later, so that none ends the process halfway.
    ///
    /// # Errors
    /// [`KeeperError::Process`].
    pub fn block() -> Result<Self, KeeperError> {
        let block = || -> io::Result<Signals> {
            let hangup = Hangup::find();
            let blocked = signal::block_all()?;
            let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
            Ok(Signals {
                received: SignalFd::with_flags(&blocked, flags)?,
                hangup,
            })
        };
        block().map_err(|error| KeeperError::Process("watch for signals", error))
    }

    /// What the next signal that has arrived asks for; `None` when no other has.
    pub fn take(&self) -> Option<Action> {
        let Ok(Some(received)) = self.received.read_signal() else {
            return None;
        };
        let number = i32::try_from(received.ssi_signo).unwrap_or(0);
        let action = action(number, self.hangup);
        let sender = received.ssi_pid;
        tracing::debug!("signal {number} of process {sender}: {action:?}");
        Some(action)
    }

    /// Waits, but no longer once a signal asks to stop.
    pub fn pause(&self, time: Duration) {
        let deadline = Instant::now() + time;
        loop {
            while let Some(action) = self.take() {
                if action == Action::Stop {
                    return;
                }
            }
            let left_ms = deadline
                .saturating_duration_since(Instant::now())
                .as_millis();
            if left_ms == 0 {
                return;
            }
            let timeout = PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.received.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_signals_stop_and_hangup_may() {
        for hangup in [Hangup::Stops, Hangup::Reloads] {
            let stops: Vec<i32> = (1..=signal::SIGNAL_MAX)
                .filter(|number| action(*number, hangup) == Action::Stop)
                .collect();
            let mut expected = vec![libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];
            if hangup == Hangup::Stops {
                expected.insert(0, libc::SIGHUP);
            }
            assert_eq!(stops, expected, "{hangup:?}");
        }
    }

    #[test]
    fn hangup_alone_reloads() {
        let reloads = |hangup| {
            (1..=signal::SIGNAL_MAX)
                .filter(|number| action(*number, hangup) == Action::Reload)
                .collect::<Vec<_>>()
        };
        assert_eq!(reloads(Hangup::Reloads), [libc::SIGHUP]);
        assert_eq!(reloads(Hangup::Stops), [0; 0]);
    }

    #[test]
    fn signals_without_a_name_are_ignored() {
        for number in [0, 32, 34, 64, 65, -1] {
            assert_eq!(action(number, Hangup::Stops), Action::Ignore);
        }
    }
}
