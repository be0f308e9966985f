//! System calls that are denied.

use seccompiler::{SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// Denies io_uring to the calling thread, and to what it starts, as the seccomp profiles of container runtimes do.
pub fn deny_io_uring(errno: i32) {
    let calls = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ];
    let filter = SeccompFilter::new(
        calls.into_iter().map(|call| (call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        TargetArch::try_from(std::env::consts::ARCH).expect("a known architecture"),
    );
    let program: seccompiler::BpfProgram = filter.expect("a filter").try_into().expect("a program");
    apply_filter(&program).expect("seccomp");
}
