//! The congestion control of the outer connections.
//!
//! BBR does not mind random loss, and pays for it with a timer for each burst that it paces, and every ten seconds with 200 ms
//! in which it sends next to nothing. So `auto` begins with CUBIC, whose queues are kept short by what a worker has under way
//! ([`send_limit`]), and goes over to BBR as soon as a path turns out to lose what does not fill its queues. There is no
//! way back: a connection that has had BBR goes on pacing with any other (`sk_pacing_status` in the kernel).
//! `docs/decisions/010-congestion-control.md` has the measurements.

use std::io;
use std::os::fd::BorrowedFd;

use socket2::{Domain, SockRef, Socket, Type};

use crate::config::CongestionControl;
#[cfg(doc)]
use crate::proto::send_limit;

/// For paths that lose packets.
pub const BBR: &str = "bbr";
/// For all others.
pub const CUBIC: &str = "cubic";
/// This kernel does not have what the configuration names.
#[derive(Debug, thiserror::Error)]
#[error(
    "this kernel has no congestion control \"{name}\": set `congestion_control` to \"auto\" or one of `sysctl net.ipv4.tcp_available_congestion_control`"
)]
pub struct Unavailable {
    name: String,
    #[source]
    source: io::Error,
}

/// Finds out whether what was configured can be had, and has the kernel load it, or BBR for `auto`. Wants CAP_NET_ADMIN.
///
/// # Errors
/// [`Unavailable`]; never for `auto`.
pub fn check(wanted: &CongestionControl) -> Result<(), Unavailable> {
    match wanted.name() {
        Some(name) => load(name).map_err(|source| Unavailable {
            name: name.to_owned(),
            source,
        }),
        None => {
            if !has_bbr() {
                tracing::debug!("this kernel has no {BBR}");
            }
            Ok(())
        }
    }
}

/// Whether there is BBR; its module is loaded then.
pub fn has_bbr() -> bool {
    load(BBR).is_ok()
}

fn load(name: &str) -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None)?.set_tcp_congestion(name.as_bytes())
}

/// What a socket begins with; accepted ones inherit it from the one that listens. Wants CAP_NET_ADMIN.
///
/// # Errors
/// What was configured cannot be had. `auto` takes the system's where it gets nothing else.
pub fn begin(socket: BorrowedFd<'_>, wanted: &CongestionControl) -> io::Result<()> {
    let set = |name: &str| SockRef::from(&socket).set_tcp_congestion(name.as_bytes());
    match wanted {
        CongestionControl::Named(name) => set(name),
        CongestionControl::Auto => {
            if let Err(error) = set(CUBIC) {
                tracing::debug!("no {CUBIC}: {error}");
            }
            Ok(())
        }
    }
}

/// Gives a connection under `auto` the congestion control that does not mind losses, where there is one.
pub fn bear_losses(socket: BorrowedFd<'_>) {
    if let Err(error) = SockRef::from(&socket).set_tcp_congestion(BBR.as_bytes()) {
        tracing::debug!("no {BBR}: {error}");
    }
}

/// Whether a connection's congestion control is the one that does not mind losses.
pub fn bears_losses(socket: BorrowedFd<'_>) -> bool {
    let name = SockRef::from(&socket).tcp_congestion();
    name.is_ok_and(|name| name.split(|byte| *byte == 0).next() == Some(BBR.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::tcp_info;

    #[test]
    fn what_the_kernel_does_not_have_is_named() {
        let error = check(&CongestionControl::Named("nosuch".into())).expect_err("none");
        assert!(error.to_string().contains("\"nosuch\""), "{error}");
        assert!(check(&CongestionControl::Named("reno".into())).is_ok());
        assert!(check(&CongestionControl::Auto).is_ok());
    }

    #[test]
    fn an_accepted_connection_begins_as_its_listener_and_goes_over_to_bbr() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let reno = CongestionControl::Named("reno".into());
        begin(listener.as_fd(), &reno).expect("every kernel has it");
        let mut near = TcpStream::connect(listener.local_addr().expect("address")).expect("peer");
        let (mut far, _) = listener.accept().expect("accepted");
        far.write_all(b"x").expect("written");
        near.read_exact(&mut [0]).expect("read");
        let name = || {
            tcp_info::tcp_info(far.as_fd())
                .expect("TCP")
                .congestion_control
        };
        assert_eq!(name(), "reno");
        if has_bbr() {
            assert!(!bears_losses(far.as_fd()));
            bear_losses(far.as_fd());
            assert_eq!(name(), BBR);
            assert!(bears_losses(far.as_fd()));
        }
    }
}
