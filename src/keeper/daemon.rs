//! The keeper's end: starting the daemon, listening to it, ending it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use socket2::SockRef;

use super::KeeperError;
use super::request::{FromKeeper, Notice, REQUEST_BYTES_MAX, Reply, Request, Setup};
use super::signals::{Action, Signals};
use crate::sys::fdpass::{self, FrameReader, FrameWriter};

/// How long a daemon that was asked to end may take leave.
pub const STOP_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a daemon that has closed its end may take to be gone.
const EXIT_TIMEOUT: Duration = Duration::from_millis(250);
/// How long a frame may be stuck half way before the daemon counts as broken.
const FRAME_TIMEOUT: Duration = Duration::from_secs(2);
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// The exit code of a process that a panic has ended.
const PANICKED: i32 = crate::panics::EXIT_PANICKED;
/// What `ps` shows.
const PROGRAM: &str = "ringtun";
/// The hidden subcommand.
const DAEMON_COMMAND: &str = "daemon";
/// What the daemon has no business to know.
const SECRET_ENVIRONMENT: &str = "RINGTUN_INVITE";

/// What the keeper does for its daemon: the part that differs between server and client.
pub trait Role {
    /// Does what is asked.
    fn answer(&mut self, request: Request) -> (Reply, Option<OwnedFd>);

    /// Something to wait for besides requests.
    fn watched(&self) -> Option<BorrowedFd<'_>>;

    /// It is readable.
    fn notice(&mut self) -> Option<Notice>;

    /// Reads again what can change while it runs, and says in one log line what was read.
    fn reload(&mut self) -> Option<Notice>;
}

/// A running daemon. Killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: OwnedFd,
    reader: FrameReader,
}

impl Daemon {
    /// Starts this program anew as the daemon, which then waits to be [set up](Daemon::set_up).
    ///
    /// # Errors
    /// [`KeeperError::Process`].
    pub fn start() -> Result<Self, KeeperError> {
        let start = || -> io::Result<Daemon> {
            let (socket, theirs) = fdpass::pair()?;
            let options = SockRef::from(&socket);
            options.set_read_timeout(Some(FRAME_TIMEOUT))?;
            options.set_write_timeout(Some(FRAME_TIMEOUT))?;
            // It inherits the blocked signals, and ignores them before it unblocks them.
            let child = Command::new("/proc/self/exe")
                .arg0(PROGRAM)
                .arg(DAEMON_COMMAND)
                .env_remove(SECRET_ENVIRONMENT)
                .current_dir("/")
                .stdin(Stdio::from(theirs))
                .spawn()?;
            // From here on dropping kills it.
            Ok(Daemon {
                child,
                socket,
                reader: FrameReader::new(REQUEST_BYTES_MAX),
            })
        };
        start().map_err(|source| KeeperError::Process("start the daemon process", source))
    }

    /// Gives it `setup` and its descriptors.
    ///
    /// # Errors
    /// [`KeeperError::Process`]; it is killed then.
    pub fn set_up(self, setup: &Setup, fds: Vec<OwnedFd>) -> Result<Self, KeeperError> {
        let give = || -> io::Result<()> {
            FrameWriter::new(&serde_json::to_vec(setup)?, fds)?.send(self.socket.as_fd())
        };
        give().map_err(|source| KeeperError::Process("set the daemon process up", source))?;
        Ok(self)
    }

    /// Serves the daemon until it ends or a signal asks for the end; then ends it.
    ///
    /// # Errors
    /// [`KeeperError::Daemon`] and [`KeeperError::DaemonDied`] unless a signal asked.
    pub fn serve(mut self, signals: &Signals, role: &mut impl Role) -> Result<(), KeeperError> {
        let mut stop_by: Option<Instant> = None;
        let mut asked_twice = false;
        let mut failure = None;
        loop {
            let ready = self.wait(signals, role, stop_by);
            let ready = ready.map_err(|source| KeeperError::Process("wait", source))?;
            let asked = ready.signal.then(|| signals.take()).flatten();
            if asked == Some(Action::Stop) {
                asked_twice = stop_by.is_some();
                if asked_twice || self.say(FromKeeper::Notice(Notice::Stop)).is_err() {
                    break;
                }
                stop_by = Some(Instant::now() + STOP_TIMEOUT);
            }
            if asked == Some(Action::Reload)
                && stop_by.is_none()
                && let Some(notice) = role.reload()
                && self.say(FromKeeper::Notice(notice)).is_err()
            {
                break;
            }
            if ready.watched
                && let Some(notice) = role.notice()
                && self.say(FromKeeper::Notice(notice)).is_err()
            {
                break;
            }
            if ready.link {
                let Ok(Some(frame)) = self.reader.receive(self.socket.as_fd()) else {
                    break;
                };
                let Ok(request) = serde_json::from_slice(&frame.body) else {
                    break;
                };
                let (reply, fd) = match request {
                    Request::Failed { exit, line } => {
                        failure = Some(KeeperError::Daemon { exit, line });
                        (Reply::Done, None)
                    }
                    _ if stop_by.is_some() => (Reply::Error("ringtun is stopping".into()), None),
                    request => role.answer(request),
                };
                if self.reply(reply, fd).is_err() {
                    break;
                }
            }
            if stop_by.is_some_and(|by| by <= Instant::now()) {
                break;
            }
        }
        // One that was asked in vain, or twice, has had its time.
        let status = match stop_by {
            Some(by) if by <= Instant::now() || asked_twice => None,
            _ => self.end(),
        };
        match (stop_by, failure) {
            (Some(_), _) => Ok(()),
            (None, Some(failure)) => Err(failure),
            (None, None) => Err(KeeperError::DaemonDied(describe(status))),
        }
    }

    fn wait(
        &self,
        signals: &Signals,
        role: &impl Role,
        stop_by: Option<Instant>,
    ) -> io::Result<Ready> {
        let mut fds = vec![
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(role.watched().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = match stop_by {
            None => PollTimeout::NONE,
            Some(by) => {
                let left_ms = by.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |at: usize| {
            fds.get(at)
                .and_then(PollFd::revents)
                .is_some_and(|events| !events.is_empty())
        };
        Ok(Ready {
            link: is_ready(0),
            signal: is_ready(1),
            watched: is_ready(2),
        })
    }

    fn say(&self, what: FromKeeper) -> io::Result<()> {
        FrameWriter::new(&serde_json::to_vec(&what)?, Vec::new())?.send(self.socket.as_fd())
    }

    fn reply(&self, reply: Reply, fd: Option<OwnedFd>) -> io::Result<()> {
        let body = serde_json::to_vec(&FromKeeper::Reply(reply))?;
        FrameWriter::new(&body, fd.into_iter().collect())?.send(self.socket.as_fd())
    }

    /// Gives it a moment to end by itself, then kills it. `None`: it was killed.
    fn end(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + EXIT_TIMEOUT;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            thread::sleep(EXIT_POLL_INTERVAL);
        }
        None
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both do nothing when it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Ready {
    link: bool,
    signal: bool,
    watched: bool,
}

fn describe(status: Option<ExitStatus>) -> String {
    match status.map(|status| (status.code(), status.signal())) {
        Some((Some(PANICKED), _)) => "it panicked, which is a bug".into(),
        Some((Some(code), _)) => format!("exit code {code}"),
        Some((None, Some(signal))) => match Signal::try_from(signal) {
            Ok(signal) => format!("signal {signal}"),
            Err(_) => format!("signal {signal}"),
        },
        _ => "no answer".into(),
    }
}
