//! A second descriptor for what somebody else owns.
#![expect(
    unsafe_code,
    reason = "fcntl on a descriptor whose owner only shows its number"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Duplicates the descriptor of `owner`, close-on-exec. The owner keeps its own.
///
/// # Errors
/// EMFILE when the process has too many open files.
pub fn duplicate(owner: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes a number and touches no memory; a stale number gives EBADF.
    let duplicate = unsafe { libc::fcntl(owner.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if duplicate == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write, pipe};

    use super::*;

    #[test]
    fn a_duplicate_outlives_its_owner() {
        let (mut reader, writer) = pipe().expect("pipe");
        let duplicate = duplicate(&writer).expect("duplicate");
        drop(writer);
        std::fs::File::from(duplicate)
            .write_all(b"still here")
            .expect("written");
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "still here");
    }
}
