//! The congestion control of the outer connections.
//!
//! BBR keeps queues short and does not mind random loss, and pays for it with a timer for each burst that it paces. Where
//! the path is so short that there is no queue to fill and nothing to lose, that is a third of the throughput, so `auto`
//! begins with CUBIC and goes over to BBR as soon as the path turns out to be longer. There is no
//! way back: a connection that has had BBR goes on pacing with any other (`sk_pacing_status` in the kernel).
//! `docs/decisions/010-congestion-control.md` has the measurements.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use super::tcp_info;
use crate::config::CongestionControl;

/// For paths across a network.
pub const BBR: &str = "bbr";
/// For paths within a host or a rack.
pub const LOCAL: &str = "cubic";
/// A path whose shortest round trip takes longer is not local.
const LOCAL_RTT_MAX: Duration = Duration::from_millis(2);
/// A queue that makes the average round trip longer than this is worth keeping short, however short the path is.
const QUEUED_RTT_MAX: Duration = Duration::from_millis(50);

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
            if let Err(error) = set(LOCAL) {
                tracing::debug!("no {LOCAL}: {error}");
            }
            Ok(())
        }
    }
}

/// Looks at the path of a connection under `auto`. Whether that was the last time: it has BBR now, or cannot have it.
///
/// # Errors
/// It is no TCP socket.
pub fn follow_path(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let (shortest, average) = tcp_info::round_trips(socket)?;
    if !suits_bbr(shortest, average) {
        return Ok(false);
    }
    if let Err(error) = SockRef::from(&socket).set_tcp_congestion(BBR.as_bytes()) {
        tracing::debug!("no {BBR}: {error}");
    }
    Ok(true)
}

/// Whether a path with these round trips, shortest and average, is one for BBR.
fn suits_bbr(shortest: Duration, average: Duration) -> bool {
    shortest > LOCAL_RTT_MAX || average > QUEUED_RTT_MAX
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::rack(100, 300, false)]
    #[case::busy_rack(100, 40_000, false)]
    #[case::deep_queue_nearby(500, 400_000, true)]
    #[case::across_town(4000, 4500, true)]
    #[case::around_the_world(250_000, 260_000, true)]
    fn long_paths_and_deep_queues_are_for_bbr(
        #[case] shortest: u64,
        #[case] average: u64,
        #[case] bbr: bool,
    ) {
        let (shortest, average) = (
            Duration::from_micros(shortest),
            Duration::from_micros(average),
        );
        assert_eq!(suits_bbr(shortest, average), bbr);
    }

    #[test]
    fn what_the_kernel_does_not_have_is_named() {
        let error = check(&CongestionControl::Named("nosuch".into())).expect_err("none");
        assert!(error.to_string().contains("\"nosuch\""), "{error}");
        assert!(check(&CongestionControl::Named("reno".into())).is_ok());
        assert!(check(&CongestionControl::Auto).is_ok());
    }

    #[test]
    fn an_accepted_connection_begins_as_its_listener_and_stays_so_on_a_short_path() {
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
        if !follow_path(far.as_fd()).expect("TCP") {
            assert_eq!(name(), "reno");
        }
    }
}
