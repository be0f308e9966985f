//! Which network namespace this is.
#![expect(unsafe_code, reason = "SO_NETNS_COOKIE has no safe wrapper")]

use std::fs;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

/// `include/uapi/asm-generic/socket.h`, from 5.14 on.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A network namespace of this boot. Inode numbers are given out again after a namespace has ended; cookies are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    /// The inode of `/proc/thread-self/ns/net`.
    pub inode: u64,
    /// The kernel's cookie, where it has them.
    pub cookie: Option<u64>,
    /// The random identifier of this boot.
    pub boot: String,
}

/// The namespace that the calling thread is in.
///
/// # Errors
/// `/proc` is not mounted.
pub fn current() -> io::Result<NetnsId> {
    Ok(NetnsId {
        inode: fs::metadata("/proc/thread-self/ns/net")?.ino(),
        cookie: cookie(),
        boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?
            .trim_end()
            .to_owned(),
    })
}

fn cookie() -> Option<u64> {
    // Any socket will do; a UDP socket with no address needs no interface to be up.
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    let mut cookie: u64 = 0;
    let mut bytes = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to live values, and the length is that of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut bytes,
        )
    };
    (result == 0).then_some(cookie)
}
