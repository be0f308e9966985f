//! What this kernel's io_uring can do: tried, never deduced from a version.

use crate::config::IoMode;
use io_uring::{IoUring, Probe, opcode};
use std::io;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// io_uring_setup is not there.
    #[error(
        "this kernel has no io_uring: ringtun needs Linux 5.10 or newer, built with CONFIG_IO_URING"
    )]
    Missing,
    /// io_uring_setup is forbidden.
    #[error(
        "io_uring is denied to ringtun: set `sysctl kernel.io_uring_disabled=0`, and in a container allow \
         io_uring_setup, io_uring_enter and io_uring_register in its seccomp profile"
    )]
    Denied,
    /// Not even the smallest ring's memory may be locked.
    #[error(
        "RLIMIT_MEMLOCK is too small for io_uring: raise it (`ulimit -l`, LimitMEMLOCK= of the service), or end other \
         programs of this user that use io_uring"
    )]
    MemoryLocked,
    /// io_uring_setup failed in another way.
    #[error("cannot set up io_uring")]
    SetUp(#[source] io::Error),
    /// The operations cannot be asked for.
    #[error("cannot probe io_uring's operations")]
    Probe(#[source] io::Error),
    /// An operation of 5.10's is missing.
    #[error("this kernel's io_uring has no {0}: ringtun needs Linux 5.10 or newer")]
    Operation(&'static str),
    /// The file table was refused.
    #[error("cannot register io_uring files (see `ulimit -n`)")]
    RegisterFiles(#[source] io::Error),
}

/// How a ring could be set up, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetUp {
    /// SINGLE_ISSUER and DEFER_TASKRUN (6.1): completions run only when the worker asks for them.
    Deferred,
    /// COOP_TASKRUN (5.19): no interrupt for completions.
    Cooperative,
    /// Nothing but what 5.10 has.
    Plain,
}

/// Submission and completion entries, best first. Rings count against RLIMIT_MEMLOCK before Linux 5.12 and since 6.14.
const SIZES: [(u32, u32); 3] = [(1024, 8192), (256, 1024), (32, 128)];

/// About the memory of a ring with that many entries: 64 and 4 bytes for each submission, 16 for each completion.
pub const fn ring_bytes(submissions: u32, completions: u32) -> usize {
    submissions as usize * 68 + completions as usize * 16
}

/// Builds a ring in the best way that the kernel takes and `io` allows, of no more than `lockable_bytes` unless that is less
/// than the smallest one. One of [`SetUp::Deferred`] belongs to the thread that uses it: it is disabled until that
/// thread calls `register_enable_rings`. Others are enabled, for the first 5.10 never enables a ring that was made
/// disabled (its `io_register_enable_rings` leaves IORING_SETUP_R_DISABLED set).
///
/// # Errors
/// No way worked.
pub fn build(io: IoMode, lockable_bytes: usize) -> Result<(IoUring, SetUp), RingError> {
    let better: &[SetUp] = match io {
        IoMode::Auto => &[SetUp::Deferred, SetUp::Cooperative],
        IoMode::Baseline => &[],
    };
    let mut result = Err(RingError::MemoryLocked);
    for (index, (submissions, completions)) in SIZES.into_iter().enumerate() {
        let is_smallest = index == SIZES.len() - 1;
        if ring_bytes(submissions, completions) > lockable_bytes && !is_smallest {
            continue;
        }
        result = build_sized(better, submissions, completions);
        if !matches!(result, Err(RingError::MemoryLocked)) {
            break;
        }
    }
    result
}

fn build_sized(
    better: &[SetUp],
    submissions: u32,
    completions: u32,
) -> Result<(IoUring, SetUp), RingError> {
    let attempt = |set_up: SetUp| {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(completions);
        match set_up {
            SetUp::Deferred => {
                builder
                    .setup_r_disabled()
                    .setup_single_issuer()
                    .setup_defer_taskrun();
            }
            SetUp::Cooperative => {
                builder.setup_coop_taskrun();
            }
            SetUp::Plain => {}
        }
        builder.build(submissions)
    };
    for set_up in better {
        match attempt(*set_up) {
            Ok(ring) => return Ok((ring, *set_up)),
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                return Err(RingError::MemoryLocked);
            }
            Err(_) => {}
        }
    }
    match attempt(SetUp::Plain) {
        Ok(ring) => Ok((ring, SetUp::Plain)),
        Err(error) => Err(match error.raw_os_error() {
            Some(libc::ENOSYS) => RingError::Missing,
            Some(libc::EPERM | libc::EACCES) => RingError::Denied,
            Some(libc::ENOMEM) => RingError::MemoryLocked,
            _ => RingError::SetUp(error),
        }),
    }
}

/// Checks that every operation that the workers need is there.
///
/// # Errors
/// Names the one that is not.
pub fn check_operations(ring: &IoUring) -> Result<(), RingError> {
    let needed = [
        (opcode::ReadFixed::CODE, "READ_FIXED"),
        (opcode::WriteFixed::CODE, "WRITE_FIXED"),
        (opcode::Read::CODE, "READ"),
        (opcode::Write::CODE, "WRITE"),
        (opcode::PollAdd::CODE, "POLL_ADD"),
        (opcode::Timeout::CODE, "TIMEOUT"),
        (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
    ];
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(RingError::Probe)?;
    match needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => Err(RingError::Operation(name)),
        None => Ok(()),
    }
}
