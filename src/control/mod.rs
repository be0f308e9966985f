//! The daemon: unprivileged, and all of it that is not the packet path. One thread on tokio-uring.
//!
//! | what | where |
//! | --- | --- |
//! | accept, read and write by io_uring | [`runtime`] |
//! | TLS on top of that, until a worker takes over | [`handshake`] |
//! | server: listeners, keeper, workers | [`server`] |
//! | server: one stranger's connection, web page or tunnel | [`visitor`], bounded by [`gate`] |
//! | server: who is connected | [`tunnels`], [`crate::proto::session`] |
//! | client: a session that is kept up | [`client`] |
//! | client: one connection, from the first SYN to the addresses | [`dial`], [`opening`] |
//! | client: when to try again | [`reconnect`], [`network`] |

pub mod client;
pub mod dial;
pub mod gate;
pub mod handshake;
pub mod network;
pub mod opening;
pub mod reconnect;
pub mod runtime;
pub mod server;
pub mod tunnels;
pub mod visitor;

use std::error::Error;
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::keeper::request::Setup;
use crate::keeper::{DaemonStart, LinkError};
use crate::proto::offload::Offloads;
use crate::uring::buffer::BUDGET_BYTES_DEFAULT;
use crate::uring::probe;
use crate::worker::{CloseCause, WorkerSetup};

/// Daemons that should be able to run side by side as one user with a bounded RLIMIT_MEMLOCK.
const DAEMONS_PER_USER: usize = 4;
/// Most bytes of packets that wait for one connection.
pub const EGRESS_QUEUE_BYTES_MAX: usize = 1024 * 1024;
/// Entries of a ring that is made to see whether one can be made.
const PROBE_ENTRIES: u32 = 2;
/// What process lists call the daemon.
const PROCESS_NAME: &CStr = c"ringtun-daemon";
/// How long the last words to the keeper may take.
const LAST_WORDS_TIME: Duration = Duration::from_millis(300);

/// How the daemon's work came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The keeper asked for it.
    Asked,
    /// The keeper has ended, and so must we.
    KeeperGone,
    /// It cannot go on.
    Failed {
        /// The program's exit code.
        exit: u8,
        /// One line for the user.
        line: String,
    },
}

impl Ending {
    /// A failure at run time.
    pub fn failed(line: impl Into<String>) -> Self {
        Ending::Failed {
            exit: 1,
            line: line.into(),
        }
    }
}

/// The daemon's whole life. Returns its exit code; the process must end then.
pub fn run_daemon() -> u8 {
    // It was started as /proc/self/exe, and would be called `exe` in process lists. A name is a nicety.
    let _ = nix::sys::prctl::set_name(PROCESS_NAME);
    let start = match DaemonStart::enter() {
        Ok(start) => start,
        Err(error) => {
            eprintln!("ringtun: {}", chain(&error));
            return 2;
        }
    };
    let runtime = match runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return report_without_ring(start, &error),
    };
    runtime.run(live(start))
}

async fn live(start: DaemonStart) -> u8 {
    let (setup, fds, link, notices) = match start.connect() {
        Ok(parts) => parts,
        Err(error) => {
            eprintln!("ringtun: {}", chain(&error));
            return 1;
        }
    };
    let ending = match setup {
        Setup::Server(setup) => server::run(*setup, fds, link.clone(), notices).await,
        Setup::Client(setup) => client::run(*setup, fds, link.clone(), notices).await,
    };
    match ending {
        Ending::Asked => 0,
        Ending::KeeperGone => 1,
        Ending::Failed { exit, line } => {
            last_words(link.failed(exit, line)).await;
            exit
        }
    }
}

/// The keeper may be gone, or busy: it finds out by our exit then.
async fn last_words(words: impl Future<Output = Result<(), LinkError>>) {
    if let Ok(Err(error)) = tokio::time::timeout(LAST_WORDS_TIME, words).await {
        tracing::debug!("the keeper did not hear why: {error}");
    }
}

/// The user has to know what denies io_uring, and without it there is only plain tokio to tell the keeper.
fn report_without_ring(start: DaemonStart, error: &io::Error) -> u8 {
    // The same refusal again, in words that say what to do.
    let line = match probe::build(PROBE_ENTRIES, 2 * PROBE_ENTRIES) {
        Err(refusal) => chain(&refusal),
        Ok(_) => format!("cannot set up the control thread: {error}"),
    };
    let told = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map(|runtime| {
            runtime.block_on(async {
                if let Ok((_, _, link, _)) = start.connect() {
                    last_words(link.failed(1, line.clone())).await;
                }
            });
        });
    if told.is_err() {
        eprintln!("ringtun: {line}");
    }
    1
}

/// Packet memory of one of `workers` workers. Where RLIMIT_MEMLOCK bounds it, it bounds all daemons of the user
/// together, so this one takes its share and no more.
fn buffer_bytes(workers: usize) -> usize {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((limit, _)) if limit != RLIM_INFINITY => {
            let share =
                usize::try_from(limit).unwrap_or(usize::MAX) / DAEMONS_PER_USER / workers.max(1);
            share.min(BUDGET_BYTES_DEFAULT)
        }
        _ => BUDGET_BYTES_DEFAULT,
    }
}

/// One worker for each queue.
fn worker_setups(tun_queues: Vec<OwnedFd>, tun_offloads: Offloads) -> Vec<WorkerSetup> {
    let buffer_bytes = buffer_bytes(tun_queues.len());
    tun_queues
        .into_iter()
        .map(|tun| WorkerSetup {
            tun,
            tun_offloads,
            buffer_bytes,
            queue_bytes_max: EGRESS_QUEUE_BYTES_MAX,
        })
        .collect()
}

/// How a connection ended, for the log.
fn ended(cause: &CloseCause) -> String {
    match cause {
        CloseCause::Asked => "closed by this side".into(),
        CloseCause::PeerClosed => "closed by the other side".into(),
        CloseCause::Failed(error) => error.to_string(),
        CloseCause::Misbehaved(how) => format!("the other side broke the protocol: {how}"),
        CloseCause::TimedOut => "no answer any more".into(),
    }
}

/// An error and its causes on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // A transparent error repeats its cause.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start")]
    struct Outer(#[source] io::Error);

    #[test]
    fn an_error_and_its_causes_are_one_line() {
        let error = Outer(io::Error::other("disk\non fire"));
        assert_eq!(chain(&error), "cannot start: disk on fire");
    }
}
