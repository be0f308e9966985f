//! The privileged process: plan, apply, undo, and typed requests from the daemon.
//!
//! [`run_server`] and [`run_client`] are `ringtun server` and `ringtun client`: they claim the interface name, make
//! what is needed, start the daemon without privileges and serve it until the end, and then undo all they did.
//! Nothing that came from the network is parsed here.
//!
//! | file | what |
//! | --- | --- |
//! | `plan.rs`, `ruleset.rs` | what is to be set: values, pure |
//! | `firewall.rs` | what other firewalls do to the tunnel's traffic, pure |
//! | `apply.rs` | sets it, after recording the opposite |
//! | `undo.rs` | the record, undoing, `ringtun down` |
//! | `request.rs` | what keeper and daemon say to each other |
//! | `daemon.rs`, `link.rs` | the keeper's and the daemon's end of that |
//! | `server.rs`, `client.rs` | what the keeper does for each |
//! | `signals.rs` | what each signal means |
//! | `state.rs` | the server's state directory |

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use caps::{CapSet, Capability};

pub mod apply;
pub mod client;
pub mod daemon;
pub mod firewall;
pub mod link;
pub mod plan;
pub mod request;
pub mod ruleset;
pub mod server;
pub mod signals;
pub mod state;
pub mod undo;

pub use client::run_client;
pub use link::{DaemonStart, Link, LinkError, Notices, SetupFds};
pub use server::run_server;
pub use state::StateDir;

use crate::sys::congestion::Unavailable;
use crate::sys::netns;
use crate::sys::nft::NftError;
use crate::sys::socket::ListenError;
use crate::sys::tun::{self, Tun, TunError};
use crate::tls::certificate::CertificateError;
use apply::{ApplyError, Changes};
use plan::Tunnel;
use undo::{Down, Record, UndoError};

/// Why a run ended, in one line that says what to do; causes are in `source`.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The privilege that everything here needs is missing.
    #[error(
        "not allowed to set up a tunnel: run as root (`sudo ringtun ...`) or with CAP_NET_ADMIN"
    )]
    NotPrivileged,
    /// The state directory.
    #[error(transparent)]
    State(#[from] state::StateError),
    /// The operator's certificate or key.
    #[error("the configured certificate {path}")]
    Certificate {
        /// The file at fault.
        path: String,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The packet filter.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The interface.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// A listening socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The congestion control that is configured.
    #[error(transparent)]
    Congestion(#[from] Unavailable),
    /// A change to the host.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The record of changes, or undoing them.
    #[error(transparent)]
    Undo(#[from] UndoError),
    /// Something that the operating system always grants.
    #[error("cannot {0}")]
    Process(&'static str, #[source] io::Error),
    /// The daemon reported a failure.
    #[error("{line}")]
    Daemon {
        /// The exit code.
        exit: u8,
        /// What to tell the user.
        line: String,
    },
    /// The daemon is gone without a word.
    #[error("the daemon process ended unexpectedly ({0}); what was set up has been undone")]
    DaemonDied(String),
    /// The keeper itself has panicked. The panic's own line has been written.
    #[error("ringtun has a bug and cannot go on; what was set up has been undone")]
    Panicked,
}

impl KeeperError {
    /// The program's exit code: 2 for configuration, 1 for all else.
    pub fn exit_code(&self) -> u8 {
        match self {
            KeeperError::Daemon { exit, .. } => *exit,
            KeeperError::Certificate { .. } | KeeperError::Congestion(_) => 2,
            _ => 1,
        }
    }

    fn certificate(path: &std::path::Path, source: CertificateError) -> Self {
        KeeperError::Certificate {
            path: path.display().to_string(),
            source: source.into(),
        }
    }
}

/// Stops what runs in this network namespace and undoes what a kill has left, for one interface or for all. The exit
/// code is 0, also when there is nothing to do.
///
/// # Errors
/// [`KeeperError`].
pub fn down(interface: Option<&str>) -> Result<u8, KeeperError> {
    let found = undo::down(interface)?;
    if found.is_empty() {
        tracing::info!("nothing to take down in this network namespace");
    }
    for one in found {
        match one {
            Down::Stopped { interface } => tracing::info!("{interface} has been stopped"),
            Down::CleanedUp { interface } => {
                tracing::info!("what was left of {interface} has been undone");
            }
        }
    }
    Ok(0)
}

/// Runs a server or client. A panic is an error like any other: what `run` holds is dropped, and so undone.
fn guarded(run: impl FnOnce() -> Result<u8, KeeperError>) -> Result<u8, KeeperError> {
    // What `run` has borrowed is not used again.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or(Err(KeeperError::Panicked))
}

/// Claims the interface name and undoes what a killed predecessor left, except for the table `adopted`.
fn begin(interface: &str, adopted: Option<&str>) -> Result<Changes, KeeperError> {
    match caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN) {
        Ok(true) => {}
        _ => return Err(KeeperError::NotPrivileged),
    }
    let record = Record::claim(interface)?;
    tracing::debug!(namespace = ?netns::current().ok(), interface, "claimed");
    Ok(Changes::start(record, adopted)?)
}

fn make_interface(
    changes: &mut Changes,
    name: &str,
    mtu: u16,
    queues: usize,
    offload: bool,
) -> Result<(Tun, Tunnel), KeeperError> {
    if nix::net::if_::if_nametoindex(name).is_ok() {
        // Before it is recorded as ours, to be removed.
        return Err(TunError::NameInUse(name.into()).into());
    }
    changes.interface_is_coming(name)?;
    let tun = tun::create(name, mtu, queues, offload)?;
    let index = nix::net::if_::if_nametoindex(name)
        .map_err(|error| KeeperError::Process("find the new interface", error.into()))?;
    let tunnel = Tunnel {
        name: name.into(),
        index,
        mtu,
    };
    Ok((tun, tunnel))
}

/// Undoes everything, and says how the run ended: a failure of the run comes before one of undoing.
fn finish(served: Result<(), KeeperError>, changes: Changes) -> Result<u8, KeeperError> {
    let undone = changes.undo_all();
    if let (Err(_), Err(error)) = (&served, &undone) {
        tracing::error!("{error}");
    }
    served?;
    undone?;
    Ok(0)
}

/// Cores that this process may use: as many workers as there can be use for.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::thread;

    use nix::mount::{MsFlags, mount};
    use nix::net::if_::if_nametoindex;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    const INTERFACE: &str = "ringtun0";

    /// A thread with a network of its own, and a `/run` of its own.
    fn on_another_host<T: Send>(run: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
                    .expect("this test needs root");
                let none: Option<&str> = None;
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(none, "/", none, private, none).expect("private mounts");
                let tmpfs = Some("tmpfs");
                mount(tmpfs, "/run", tmpfs, MsFlags::empty(), none).expect("a tmpfs");
                run()
            });
            thread.join().expect("the test")
        })
    }

    fn panic_with_an_interface() -> Result<u8, KeeperError> {
        guarded(|| {
            let mut changes = begin(INTERFACE, None)?;
            let _made = make_interface(&mut changes, INTERFACE, 1500, 1, true)?;
            assert!(if_nametoindex(INTERFACE).is_ok());
            panic!("a bug, for the test");
        })
    }

    #[test]
    fn a_panic_of_the_keeper_undoes_all() {
        on_another_host(|| {
            let result = panic_with_an_interface();
            assert!(matches!(result, Err(KeeperError::Panicked)), "{result:?}");
            assert!(if_nametoindex(INTERFACE).is_err(), "it is gone");
            assert!(!Path::new(undo::RUN_DIR).exists(), "nothing is left");
        });
    }

    #[test]
    fn a_panic_while_undoing_leaves_the_record() {
        on_another_host(|| {
            undo::tests::PANIC_ONCE.set(true);
            let result = panic_with_an_interface();
            assert!(matches!(result, Err(KeeperError::Panicked)), "{result:?}");
            let mut changes = begin(INTERFACE, None).expect("undone now");
            assert!(changes.found_leftovers(), "it was on the record");
            changes.interface_is_coming(INTERFACE).expect("recorded");
        });
    }
}
