//! Giving up privileges, in the daemon's first and only thread.
//!
//! Capabilities, limits and the death signal are per thread or are inherited by threads, so this comes before any other
//! thread, and so before any runtime.

use std::io;

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, User, geteuid, setgroups, setresgid, setresuid};

/// Who the daemon becomes.
pub const UNPRIVILEGED_USER: &str = "nobody";
/// The same, where the user database does not know the name (the kernel's overflow uid).
const UNPRIVILEGED_ID: u32 = 65_534;
/// Open files that the daemon may have, where the hard limit allows: one per connection and a few more.
const OPEN_FILES_MAX: u64 = 65_536;

/// A privilege that could not be given up. The daemon must not go on.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up privileges ({what})")]
pub struct SandboxError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// Whether memory that this process locks counts against no limit: CAP_IPC_LOCK, which works in the initial user namespace
/// only.
pub fn may_lock_memory() -> bool {
    const WHOLE_MAP: [&str; 3] = ["0", "0", "4294967295"];
    let initial = std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(WHOLE_MAP));
    initial
        && matches!(
            caps::has_cap(None, CapSet::Effective, Capability::CAP_IPC_LOCK),
            Ok(true)
        )
}

/// Gives up the user, all capabilities and the way back to them.
///
/// In a user namespace where nobody but root is mapped the user stays, without any capability.
///
/// # Errors
/// [`SandboxError`].
pub fn enter() -> Result<(), SandboxError> {
    // Ctrl-C and service managers signal the whole group; the keeper then asks the daemon to end, in order. Until now
    // the signals that the keeper has blocked for itself were blocked here, too.
    super::signal::ignore_all().map_err(failed("signals"))?;
    drop_bounding_set()?;
    if geteuid().is_root() {
        become_nobody()?;
    }
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set).map_err(failed("capabilities"))?;
    }
    prctl::set_no_new_privs().map_err(failed("no_new_privs"))?;
    // No core file, and no other process of the same user, gets at the keys.
    prctl::set_dumpable(false).map_err(failed("dumpable"))?;
    // Last, because a change of user clears it.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed("death signal"))?;
    Ok(())
}

/// Raises the limits that the packet path needs: registered buffers count against RLIMIT_MEMLOCK, connections against
/// RLIMIT_NOFILE. What cannot be raised is lived with. To be done while there are privileges.
pub fn raise_limits() {
    if setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_err()
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
    {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
    }
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(
            Resource::RLIMIT_NOFILE,
            soft.max(hard.min(OPEN_FILES_MAX)),
            hard,
        );
    }
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
}

/// Without a bounding set, not even executing a file as root brings a capability back.
fn drop_bounding_set() -> Result<(), SandboxError> {
    let may_drop = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)
        .map_err(failed("capabilities"))?;
    if may_drop {
        caps::clear(None, CapSet::Bounding).map_err(failed("bounding set"))?;
    }
    Ok(())
}

fn become_nobody() -> Result<(), SandboxError> {
    let (uid, gid) = match User::from_name(UNPRIVILEGED_USER) {
        Ok(Some(user)) => (user.uid, user.gid),
        _ => (
            Uid::from_raw(UNPRIVILEGED_ID),
            Gid::from_raw(UNPRIVILEGED_ID),
        ),
    };
    // EINVAL: not mapped in this user namespace. EPERM: setgroups is denied in it, or this root has no CAP_SETUID.
    let unmapped = |result: nix::Result<()>| match result {
        Err(Errno::EINVAL | Errno::EPERM) => Ok(true),
        other => other.map(|()| false),
    };
    if unmapped(setresgid(gid, gid, gid)).map_err(failed("group"))? {
        tracing::debug!("{UNPRIVILEGED_USER} is not mapped here: the user stays");
        return Ok(());
    }
    if unmapped(setgroups(&[])).map_err(failed("groups"))? {
        tracing::debug!("supplementary groups stay");
    }
    if unmapped(setresuid(uid, uid, uid)).map_err(failed("user"))? {
        tracing::debug!("{UNPRIVILEGED_USER} is not mapped here: the user stays");
    }
    Ok(())
}

fn failed<E>(what: &'static str) -> impl FnOnce(E) -> SandboxError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |error| SandboxError {
        what,
        source: io::Error::other(error),
    }
}
