//! Outer TCP sockets: how they are made and tuned, on both sides.
#![expect(
    unsafe_code,
    reason = "TCP_RTO_MAX_MS and SO_MAX_PACING_RATE have no safe wrappers"
)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::congestion;
use crate::config::CongestionControl;

/// How long sent bytes may stay unacknowledged before the kernel gives the connection up.
pub const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection on which nothing has come for this long is asked by TCP whether its peer is there.
pub const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
/// From one such question to the next. The kernel gives up at the first one after [`USER_TIMEOUT`] of silence.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// The longest pause between retransmissions, where the kernel lets us say (6.15 and newer).
pub const RTO_MAX_MS: libc::c_int = 1000;
/// Unsent bytes that the kernel holds before the socket stops being writable, unless the path wants less: two full
/// super-packets.
pub const NOTSENT_LOWAT_BYTES: u32 = 128 * 1024;
/// Connections that may wait for `accept`; the kernel cuts it to `net.core.somaxconn`.
pub const LISTEN_BACKLOG: i32 = 1024;

/// `include/uapi/linux/tcp.h`.
const TCP_RTO_MAX_MS: libc::c_int = 44;

/// `include/uapi/asm-generic/socket.h`. A value of 64 bits since Linux 5.0.
const SO_MAX_PACING_RATE: libc::c_int = 47;

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another program has the port.
    #[error(
        "port {port} is in use: stop the program that has it (see `ss -ltnp sport = :{port}`) or choose another with `--listen`"
    )]
    Busy {
        /// The port.
        port: u16,
    },
    /// The port is below `net.ipv4.ip_unprivileged_port_start`.
    #[error("not allowed to listen on port {port}: run as root or with CAP_NET_BIND_SERVICE")]
    NotPermitted {
        /// The port.
        port: u16,
    },
    /// This host does not have the address.
    #[error("cannot listen on {address}: this host does not have that address")]
    NoSuchAddress {
        /// The address as configured.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("cannot listen on {address}")]
    Failed {
        /// The address as configured.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A TCP socket for a connection to `server`, tuned, blocking, not connected.
///
/// # Errors
/// The kernel's error, such as an address family that is switched off.
pub fn outer(server: IpAddr, congestion: &CongestionControl) -> io::Result<OwnedFd> {
    let domain = if server.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = Socket::new(domain, Type::STREAM.cloexec(), Some(Protocol::TCP))?;
    tune(socket.as_fd())?;
    congestion::begin(socket.as_fd(), congestion)?;
    Ok(socket.into())
}

/// Sets what every outer connection wants, before or after it is connected. Needs no privilege.
///
/// Buffer sizes are left to the kernel: setting them ends its own tuning.
///
/// # Errors
/// The kernel's error; an option that is too new for the kernel is no error.
pub fn tune(socket: BorrowedFd<'_>) -> io::Result<()> {
    let tcp = SockRef::from(&socket);
    tcp.set_tcp_nodelay(true)?;
    tcp.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    // For peers that know no PING: their half-open connections would stay for good.
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_INTERVAL);
    tcp.set_tcp_keepalive(&keepalive)?;
    tcp.set_tcp_notsent_lowat(NOTSENT_LOWAT_BYTES)?;
    limit_rto(socket);
    Ok(())
}

/// Has the socket hold no more than so many unsent bytes before it stops being writable.
///
/// # Errors
/// The kernel's error.
pub fn limit_unsent(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    SockRef::from(&socket).set_tcp_notsent_lowat(bytes)
}

/// Has the socket send no more than so many bytes a second, evenly; `None`: as its congestion control sees fit. The kernel
/// goes on pacing a socket that was limited once (`sk_pacing_status`).
///
/// # Errors
/// The kernel's error.
pub fn limit_pacing(socket: BorrowedFd<'_>, bytes_per_second: Option<u64>) -> io::Result<()> {
    let value = bytes_per_second.unwrap_or(u64::MAX);
    set_option(socket, libc::SOL_SOCKET, SO_MAX_PACING_RATE, value)
}

/// A listening socket. An IPv6 wildcard takes IPv4 as well, and becomes the IPv4 wildcard where there is no IPv6.
///
/// # Errors
/// [`ListenError`].
pub fn listen(address: SocketAddr, congestion: &CongestionControl) -> Result<OwnedFd, ListenError> {
    let result = match try_listen(address, congestion) {
        Err(error) if address.ip().is_unspecified() && lacks_ipv6(&error) => try_listen(
            SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()),
            congestion,
        ),
        result => result,
    };
    result.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::Busy {
            port: address.port(),
        },
        io::ErrorKind::PermissionDenied => ListenError::NotPermitted {
            port: address.port(),
        },
        io::ErrorKind::AddrNotAvailable => ListenError::NoSuchAddress { address },
        _ => ListenError::Failed { address, source },
    })
}

fn try_listen(address: SocketAddr, congestion: &CongestionControl) -> io::Result<OwnedFd> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.cloexec(),
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    // Accepted connections inherit all of it.
    tune(socket.as_fd())?;
    congestion::begin(socket.as_fd(), congestion)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok(socket.into())
}

fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn limit_rto(socket: BorrowedFd<'_>) {
    if set_option(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, RTO_MAX_MS).is_err() {
        tracing::trace!("this kernel does not take TCP_RTO_MAX_MS");
    }
}

/// Sets an option whose value is a number of the type that the kernel expects.
fn set_option<N: Copy>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: N,
) -> io::Result<()> {
    // SAFETY: the pointer is to a live number of the length given; the kernel copies it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<N>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn option<N: Copy + Default>(
        socket: BorrowedFd<'_>,
        level: libc::c_int,
        option: libc::c_int,
    ) -> io::Result<N> {
        let mut value = N::default();
        let mut length = size_of::<N>() as libc::socklen_t;
        // SAFETY: both pointers are to live values, and the kernel writes no more than `length` bytes.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        match result {
            0 => Ok(value),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn rto_max_ms(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
        option(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS)
    }

    #[test]
    fn what_may_be_sent_in_a_second_is_limited_until_it_is_not() {
        let socket = outer(Ipv4Addr::LOCALHOST.into(), &CongestionControl::Auto).expect("a socket");
        let limit = || option::<u64>(socket.as_fd(), libc::SOL_SOCKET, SO_MAX_PACING_RATE);
        assert_eq!(limit().expect("a number"), u64::MAX);
        for wanted in [Some(2_500_000), Some(10_000_000_000), None] {
            limit_pacing(socket.as_fd(), wanted).expect("a limit");
            assert_eq!(limit().expect("a number"), wanted.unwrap_or(u64::MAX));
        }
    }

    #[test]
    fn half_open_connections_are_found_by_tcp_on_both_sides() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = TcpListener::from(listen(any, &CongestionControl::Auto).expect("a port"));
        let address = listener.local_addr().expect("an address");
        let near = outer(address.ip(), &CongestionControl::Auto).expect("a socket");
        let near = TcpStream::from(near);
        SockRef::from(&near)
            .connect(&address.into())
            .expect("a connection");
        let (far, _) = listener.accept().expect("its other end");
        for socket in [SockRef::from(&near), SockRef::from(&far)] {
            assert!(socket.keepalive().expect("an option"));
            let times = [socket.tcp_keepalive_time(), socket.tcp_keepalive_interval()];
            let times = times.map(|time| time.expect("an option"));
            assert_eq!(times, [KEEPALIVE_AFTER, KEEPALIVE_INTERVAL]);
            let timeout = socket.tcp_user_timeout().expect("an option");
            assert_eq!(timeout, Some(USER_TIMEOUT));
        }
    }

    #[test]
    fn pauses_between_retransmissions_are_bounded_on_both_sides() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = TcpListener::from(listen(any, &CongestionControl::Auto).expect("a port"));
        let address = listener.local_addr().expect("an address");
        if rto_max_ms(listener.as_fd()).is_err() {
            eprintln!("SKIPPED: this kernel has no TCP_RTO_MAX_MS");
            return;
        }
        let near = outer(address.ip(), &CongestionControl::Auto).expect("a socket");
        let near = TcpStream::from(near);
        SockRef::from(&near)
            .connect(&address.into())
            .expect("a connection");
        let (far, _) = listener.accept().expect("its other end");
        for socket in [near.as_fd(), far.as_fd()] {
            let bound = rto_max_ms(socket).expect("what the listener has, too");
            assert_eq!(bound, RTO_MAX_MS);
        }
    }
}
