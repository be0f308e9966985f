//! The daemon: unprivileged, and all of it that is not the packet path. One thread on tokio-uring.
//!
//! | what | where |
//! | --- | --- |
//! | accept, read and write by io_uring | [`runtime`] |
//! | TLS on top of that, until a worker takes over | [`handshake`] |
//! | server: listeners, keeper, workers | [`server`] |
//! | server: one unauthenticated connection, web page or tunnel | [`visitor`] |
//! | server: how many there may be, and how many handshakes | [`connection_limiter`], [`handshake_rate`], [`source_prefix`] |
//! | server: who is connected | [`tunnels`], [`crate::proto::session`] |
//! | server: what each peer has and had | [`peer_accounts`] |
//! | both: what runs here, for whoever asks by the control socket | [`status`] |
//! | client: a session that is kept up | [`client`] |
//! | client: one connection, from the first SYN to the addresses | [`dial`], [`opening`] |
//! | client: when to try again | [`reconnect`], [`network`] |
//! | both: log lines that peers can cause | [`log_limit`] |

pub mod client;
pub mod connection_limiter;
pub mod dial;
pub mod handshake;
pub mod handshake_rate;
pub mod log_limit;
pub mod network;
pub mod opening;
pub mod peer_accounts;
pub mod reconnect;
pub mod runtime;
pub mod server;
pub mod source_prefix;
pub mod status;
pub mod tunnels;
pub mod visitor;

use std::error::Error;
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use tokio::sync::{mpsc, oneshot};

use crate::config::IoMode;
use crate::keeper::request::Setup;
use crate::keeper::{DaemonStart, LinkError};
use crate::logging;
use crate::panics;
use crate::proto::offload::Offloads;
use crate::sys::sandbox;
use crate::uring::buffer::BUDGET_BYTES_DEFAULT;
use crate::uring::probe::RingError;
use crate::uring::ring::PreparedRing;
use crate::worker::{self, CloseCause, Event, Rehearsal, WorkerError, WorkerSetup, Workers};

/// Daemons that should be able to run side by side as one user with a bounded RLIMIT_MEMLOCK.
const DAEMONS_PER_USER: usize = 4;
/// Most bytes of packets that wait for one connection, however much its path carries.
pub const EGRESS_QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What process lists call the daemon.
const PROCESS_NAME: &CStr = c"ringtun-daemon";
/// The thread that starts workers, and ends then.
const STARTER_NAME: &str = "ringtun-start";
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
    panics::end_process_here();
    // Rings are made before the privileges go.
    let start = DaemonStart::enter(|setup| {
        let share = LockableMemory::find();
        let (workers, io) = (setup.workers(), setup.io());
        let runtime = runtime::Runtime::new(share.of_ring(workers));
        (runtime, Rings::prepare(io, workers, share))
    });
    let (start, (runtime, rings)) = match start {
        Ok(start) => start,
        Err(error) => {
            logging::complain(&chain(&error));
            return 2;
        }
    };
    match runtime {
        Ok(runtime) => runtime.run(live(start, rings)),
        Err(error) => report_without_ring(start, &error),
    }
}

async fn live(start: DaemonStart, rings: Rings) -> u8 {
    let (setup, fds, link, notices) = match start.connect() {
        Ok(parts) => parts,
        Err(error) => {
            logging::complain(&chain(&error));
            return 1;
        }
    };
    let role = async {
        match setup {
            Setup::Server(setup) => server::run(*setup, fds, rings, link.clone(), notices).await,
            Setup::Client(setup) => client::run(*setup, fds, rings, link.clone(), notices).await,
        }
    };
    let ending = tokio::select! {
        ending = role => ending,
        panicked = panics::essential_failure() => Ending::failed(panicked.to_string()),
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
    let line = match PreparedRing::new(start.setup.io(), 0) {
        _ if error.raw_os_error() == Some(libc::ENOMEM) => chain(&RingError::MemoryLocked),
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
        logging::complain(&line);
    }
    1
}

/// The workers' rings, made before the privileges go: with them their memory counts against no limit.
pub struct Rings {
    prepared: Vec<PreparedRing>,
    io: IoMode,
    share: LockableMemory,
}

/// Bytes of this daemon's share of the memory that its user may lock, for rings and buffers. RLIMIT_MEMLOCK bounds all
/// daemons of a user together.
#[derive(Clone, Copy)]
struct LockableMemory(usize);

impl LockableMemory {
    /// To be asked for with the privileges that the rings are made with.
    fn find() -> Self {
        match getrlimit(Resource::RLIMIT_MEMLOCK) {
            Ok((limit, _)) if limit != RLIM_INFINITY && !sandbox::may_lock_memory() => {
                LockableMemory(usize::try_from(limit).unwrap_or(usize::MAX) / DAEMONS_PER_USER)
            }
            _ => LockableMemory(usize::MAX),
        }
    }

    /// What the ring of one of `workers` workers, or of the control thread, may take.
    fn of_ring(self, workers: usize) -> usize {
        self.0 / (workers + 1)
    }

    /// What one of `workers` workers may register.
    fn of_buffers(self, workers: usize) -> usize {
        self.0 / workers.max(1)
    }
}

impl Rings {
    /// One for each worker. What cannot be made now is tried again when it is needed, and reported then.
    fn prepare(io: IoMode, workers: usize, share: LockableMemory) -> Self {
        Rings {
            prepared: (0..workers)
                .map_while(|_| PreparedRing::new(io, share.of_ring(workers)).ok())
                .collect(),
            io,
            share,
        }
    }

    /// Starts one worker for each queue.
    fn start_workers(
        mut self,
        tun_queues: Vec<OwnedFd>,
        tun_offloads: Offloads,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Result<Workers, WorkerError> {
        let workers = tun_queues.len();
        let setups = tun_queues.into_iter().map(|tun| {
            let prepared = self.prepared.pop();
            Ok(WorkerSetup {
                ring: prepared.map_or_else(
                    || PreparedRing::new(self.io, self.share.of_ring(workers)),
                    Ok,
                )?,
                tun,
                tun_offloads,
                buffer_bytes: BUDGET_BYTES_DEFAULT,
                lockable_bytes: self.share.of_buffers(workers),
                queue_bytes_max: EGRESS_QUEUE_BYTES_MAX,
            })
        });
        let setups = setups.collect::<Result<Vec<_>, WorkerError>>()?;
        Workers::start(setups, events)
    }

    /// The same, while the caller goes on with other things and waits for the result later.
    fn start_workers_beside(
        self,
        tun_queues: Vec<OwnedFd>,
        tun_offloads: Offloads,
        events: mpsc::UnboundedSender<Event>,
    ) -> impl Future<Output = Result<Workers, WorkerError>> {
        let (report, started) = oneshot::channel();
        let thread = thread::Builder::new()
            .name(STARTER_NAME.into())
            .spawn(move || {
                // Nobody waits any longer when the daemon is about to end.
                let _ = report.send(self.start_workers(tun_queues, tun_offloads, &events));
            });
        async move {
            thread.map_err(WorkerError::Thread)?;
            let lost = |_| WorkerError::Thread(io::Error::other("it ended without a word"));
            started.await.map_err(lost)?
        }
    }
}

/// Says what the workers found, in one line unless they differ.
fn log_workers(workers: &Workers) {
    let found: Vec<String> = workers.infos().map(|info| info.to_string()).collect();
    for same in found.chunk_by(PartialEq::eq) {
        tracing::info!("{} worker(s): {}", same.len(), same[0]);
    }
}

/// Sets up what a daemon with `workers` workers sets up of io_uring: the control thread's ring, and one worker's with
/// its packet memory. The control thread's ring stays until the process ends.
///
/// # Errors
/// What would end the daemon.
pub fn rehearse(workers: usize) -> Result<Rehearsal, RehearsalError> {
    let share = LockableMemory::find();
    // The worker's ring first: its error says what denies io_uring.
    let ring =
        PreparedRing::new(IoMode::Auto, share.of_ring(workers)).map_err(WorkerError::from)?;
    runtime::Runtime::new(share.of_ring(workers)).map_err(RehearsalError::Control)?;
    let lockable_bytes = share.of_buffers(workers);
    Ok(worker::rehearse(
        ring,
        BUDGET_BYTES_DEFAULT,
        lockable_bytes,
    )?)
}

/// Why a daemon could not run.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// The workers.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The control thread.
    #[error("cannot set up the control thread's io_uring")]
    Control(#[source] io::Error),
}

/// How a connection ended, for the log.
fn ended(cause: &CloseCause) -> String {
    match cause {
        CloseCause::Asked => "closed by this side".into(),
        CloseCause::PeerClosed => "closed by the other side".into(),
        CloseCause::Truncated => {
            "the other side is gone (its stream ended without a goodbye)".into()
        }
        CloseCause::Reset => "the connection was reset".into(),
        CloseCause::Alerted(alert) => {
            format!("the other side ended it by the TLS alert {alert:?}")
        }
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
