//! The command's side: finds the running instances of this network namespace and asks each.
//!
//! The protocol: connect, write [`REQUEST`], read one JSON document until the end of the stream.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{FORMAT, Report};
use crate::keeper::StateDir;
use crate::keeper::undo::{self, Instance, Life, UndoError};

/// What is asked.
pub const REQUEST: &[u8] = b"status\n";
/// How long an instance may take to answer.
pub const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long a server may take to notice a change of its peers.
const PEERS_TIMEOUT: Duration = Duration::from_secs(2);
const PEERS_INTERVAL: Duration = Duration::from_millis(10);
/// The longest answer: thousands of sessions with all their connections.
pub const ANSWER_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Why there is no status. One line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// There are no run files.
    #[error(
        "nothing runs in this network namespace: start `ringtun server` or `ringtun client` first"
    )]
    NothingRuns,
    /// There are none for the interface asked for.
    #[error("nothing runs with the interface {0} in this network namespace")]
    NoSuchInterface(String),
    /// The run files cannot be looked for.
    #[error(transparent)]
    Run(#[from] UndoError),
    /// The socket is root's.
    #[error("not allowed to ask {0}: run as root (`sudo ringtun status`)")]
    NotPrivileged(String),
    /// Nobody listens, and nobody holds the lock.
    #[error("{0} was killed: `ringtun down` cleans up after it")]
    Killed(String),
    /// Nobody listens, and there are no run files any more.
    #[error("{0} has just ended")]
    Ended(String),
    /// Nobody listens, but the keeper is there.
    #[error("{0} is starting or stopping: try again in a moment")]
    NotReady(String),
    /// It took too long.
    #[error(
        "{interface} does not answer within {} s: `ringtun down` stops it, also by force",
        ANSWER_TIME.as_secs()
    )]
    NoAnswer {
        /// Its interface.
        interface: String,
    },
    /// It answered something else.
    #[error(
        "the answer of {interface} cannot be understood: is it of another version than this command?"
    )]
    NotUnderstood {
        /// Its interface.
        interface: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It answers in another format.
    #[error(
        "{interface} is of another version than this command (format {format}, not {FORMAT}): restart it, or use `--json`"
    )]
    OtherFormat {
        /// Its interface.
        interface: String,
        /// Its format.
        format: u32,
    },
    /// Anything else.
    #[error("cannot ask {interface}")]
    Failed {
        /// Its interface.
        interface: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// The instances of this network namespace, by interface: all, or the one asked for.
///
/// # Errors
/// [`QueryError::NothingRuns`] or [`QueryError::NoSuchInterface`] where there is none.
pub fn instances(interface: Option<&str>) -> Result<Vec<Instance>, QueryError> {
    let mut found = undo::instances(interface)?;
    if found.is_empty() {
        return Err(match interface {
            None => QueryError::NothingRuns,
            Some(interface) => QueryError::NoSuchInterface(interface.into()),
        });
    }
    found.sort_by(|one, other| one.interface.cmp(&other.interface));
    Ok(found)
}

/// An instance's document, as it sent it: JSON on one line.
///
/// # Errors
/// [`QueryError`].
pub fn document(instance: &Instance) -> Result<String, QueryError> {
    let interface = || instance.interface.clone();
    let answer = ask(instance, ANSWER_TIME).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => QueryError::NotPrivileged(interface()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QueryError::NoAnswer {
            interface: interface(),
        },
        // No socket, nobody listening, or gone in the middle of it.
        io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => match instance.life() {
            Life::Running => QueryError::NotReady(interface()),
            Life::Killed => QueryError::Killed(interface()),
            Life::Gone => QueryError::Ended(interface()),
        },
        _ => QueryError::Failed {
            interface: interface(),
            source: error,
        },
    })?;
    let not_understood = |source| QueryError::NotUnderstood {
        interface: interface(),
        source,
    };
    let _: serde::de::IgnoredAny = serde_json::from_slice(&answer).map_err(not_understood)?;
    String::from_utf8(answer)
        .map(|text| text.trim_end().to_owned())
        .map_err(|error| not_understood(serde::de::Error::custom(error)))
}

/// Waits until the servers of this network namespace that use `state` know all its peers and no others, if that takes no
/// longer than two seconds. One that does not answer is not waited for.
pub fn wait_for_peers(state: &StateDir) {
    let deadline = Instant::now() + PEERS_TIMEOUT;
    let Ok(path) = fs::canonicalize(state.path()) else {
        return;
    };
    let mut waiting = undo::instances(None).unwrap_or_default();
    loop {
        waiting.retain(|instance| is_server_behind(instance, &path, state));
        if waiting.is_empty() || Instant::now() >= deadline {
            return;
        }
        thread::sleep(PEERS_INTERVAL);
    }
}

fn is_server_behind(instance: &Instance, path: &Path, state: &StateDir) -> bool {
    let answer = document(instance).and_then(|text| report(&instance.interface, &text));
    let server = answer.ok().and_then(|report| report.server);
    let server = server.filter(|server| server.state_dir == path);
    match (server, state.peers()) {
        (Some(server), Ok(peers)) => server.peers != peers.len(),
        _ => false,
    }
}

/// Reads a document.
///
/// # Errors
/// [`QueryError::NotUnderstood`] and [`QueryError::OtherFormat`].
pub fn report(interface: &str, document: &str) -> Result<Report, QueryError> {
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    let not_understood = |source| QueryError::NotUnderstood {
        interface: interface.into(),
        source,
    };
    let Format { format } = serde_json::from_str(document).map_err(not_understood)?;
    if format != FORMAT {
        return Err(QueryError::OtherFormat {
            interface: interface.into(),
            format,
        });
    }
    serde_json::from_str(document).map_err(not_understood)
}

/// The whole answer, or an error within `time` and a little.
fn ask(instance: &Instance, time: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + time;
    let left = || match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::from(io::ErrorKind::TimedOut)),
        left => Ok(Some(left)),
    };
    let socket = Socket::new(Domain::UNIX, Type::STREAM.cloexec(), None)?;
    // Bounds connect(2) as well, which waits where too many others do.
    socket.set_write_timeout(left()?)?;
    socket.connect(&SockAddr::unix(instance.control_socket())?)?;
    let mut stream = UnixStream::from(std::os::fd::OwnedFd::from(socket));
    stream.write_all(REQUEST)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    let mut piece = vec![0; 64 * 1024];
    loop {
        stream.set_read_timeout(left()?)?;
        match stream.read(&mut piece) {
            Ok(0) if answer.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            // Each document ends with its line: otherwise the daemon went away in the middle.
            Ok(0) if !answer.ends_with(b"\n") => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => return Ok(answer),
            Ok(bytes) => answer.extend_from_slice(&piece[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if answer.len() as u64 > ANSWER_BYTES_MAX {
            return Err(io::Error::other("the answer is too long"));
        }
    }
}
