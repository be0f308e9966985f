//! ICMP echo: round-trip times, and when a path begins to carry packets.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendmsg, socket,
};

use super::BenchError;
use crate::host::{Host, round_trips_us};

/// Between the echo requests of a measurement.
const INTERVAL_SECONDS: f64 = 0.01;
/// How long the last answers may take. What does not come counts as this long.
const LOST: Duration = Duration::from_secs(1);
/// How long `ping` may take beyond its echoes.
const OVERHEAD: Duration = Duration::from_secs(20);
/// Between the echo requests that wait for a path to open. This is how exact [`Watch`] is.
const WATCH_INTERVAL_MS: u8 = 1;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ICMP_HEADER_BYTES: usize = 8;

/// Percentiles of round-trip times, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundTrips {
    /// The median.
    pub p50_us: f64,
    /// The 99th percentile.
    pub p99_us: f64,
}

/// Sends `count` echo requests of 56 bytes, 10 ms apart. A lost one counts as one second.
///
/// # Errors
/// When not a single answer comes.
pub fn round_trips(client: &Host, to: Ipv4Addr, count: usize) -> Result<RoundTrips, BenchError> {
    let (count_text, interval) = (count.to_string(), INTERVAL_SECONDS.to_string());
    let arguments = ["-4", "-n", "-W", "1", "-i", &interval, "-c", &count_text];
    let report = client
        .command("ping")
        .args(arguments)
        .arg(to.to_string())
        .limit(Duration::from_secs_f64(INTERVAL_SECONDS * count as f64) + OVERHEAD)
        .run()?;
    let mut times = round_trips_us(&report.text());
    if times.is_empty() {
        return Err(BenchError::Silent(to));
    }
    let lost = u64::try_from(LOST.as_micros()).unwrap_or(u64::MAX);
    times.resize(count.max(times.len()), lost);
    times.sort_unstable();
    Ok(RoundTrips {
        p50_us: percentile(&times, 50),
        p99_us: percentile(&times, 99),
    })
}

/// The nearest-rank percentile of sorted times.
pub(super) fn percentile(sorted: &[u64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default() as f64
}

/// Asks for an echo every millisecond, on a thread of its own, until one comes back.
#[derive(Debug)]
pub struct Watch {
    first: Receiver<io::Result<Instant>>,
    stopped: std::sync::Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to ask from `host`.
    ///
    /// # Errors
    /// When the host cannot be entered or lets nobody open a raw socket.
    pub fn start(host: &Host, to: Ipv4Addr) -> Result<Watch, BenchError> {
        let socket = host.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(
                AddressFamily::Inet,
                SockType::Raw,
                flags,
                SockProtocol::Icmp,
            )
        })?;
        let socket = socket.map_err(io::Error::from)?;
        let (found, first) = mpsc::channel();
        let stopped = std::sync::Arc::new(AtomicBool::new(false));
        let stop = std::sync::Arc::clone(&stopped);
        let thread = thread::spawn(move || {
            if let Some(outcome) = ask(&socket, to, &stop).transpose() {
                let _ = found.send(outcome);
            }
        });
        Ok(Watch {
            first,
            stopped,
            thread: Some(thread),
        })
    }

    /// When the first reply came.
    ///
    /// # Errors
    /// When none comes within the limit.
    pub fn first_reply(&self, to: Ipv4Addr, limit: Duration) -> Result<Instant, BenchError> {
        match self.first.recv_timeout(limit) {
            Ok(reply) => Ok(reply?),
            Err(_) => Err(BenchError::Silent(to)),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks until there is a reply, or until it is told to stop.
fn ask(socket: &OwnedFd, to: Ipv4Addr, stop: &AtomicBool) -> io::Result<Option<Instant>> {
    let identifier = u16::try_from(std::process::id() & 0xffff).unwrap_or_default();
    let address = SockaddrIn::from(SocketAddrV4::new(to, 0));
    let mut sequence = 0_u16;
    while !stop.load(Ordering::Relaxed) {
        sequence = sequence.wrapping_add(1);
        let request = echo_request(identifier, sequence);
        let sent = sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(&request)],
            &[],
            MsgFlags::empty(),
            Some(&address),
        );
        match sent {
            // While routes change there may be none, or the firewall says so.
            Ok(_)
            | Err(
                Errno::ENETUNREACH
                | Errno::EHOSTUNREACH
                | Errno::ENETDOWN
                | Errno::EPERM
                | Errno::EACCES
                | Errno::EAGAIN
                | Errno::ENOBUFS
                | Errno::EINVAL
                | Errno::EADDRNOTAVAIL,
            ) => {}
            Err(errno) => return Err(errno.into()),
        }
        let next = Instant::now() + Duration::from_millis(WATCH_INTERVAL_MS.into());
        while Instant::now() < next {
            let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut waiting, PollTimeout::from(WATCH_INTERVAL_MS))?;
            let mut packet = [0; 128];
            match recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                Ok(bytes) if is_reply(&packet[..bytes], identifier) => {
                    return Ok(Some(Instant::now()));
                }
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(None)
}

/// An echo request without payload (RFC 792).
fn echo_request(identifier: u16, sequence: u16) -> [u8; ICMP_HEADER_BYTES] {
    let [id_high, id_low] = identifier.to_be_bytes();
    let [sequence_high, sequence_low] = sequence.to_be_bytes();
    let sum = u32::from(u16::from_be_bytes([ECHO_REQUEST, 0]))
        + u32::from(identifier)
        + u32::from(sequence);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let [check_high, check_low] = (!u16::try_from(folded).unwrap_or_default()).to_be_bytes();
    [
        ECHO_REQUEST,
        0,
        check_high,
        check_low,
        id_high,
        id_low,
        sequence_high,
        sequence_low,
    ]
}

/// Whether a packet from a raw socket, IPv4 header first, answers one of our requests.
fn is_reply(packet: &[u8], identifier: u16) -> bool {
    let header_bytes = packet
        .first()
        .map_or(0, |byte| usize::from(byte & 0x0f) * 4);
    let icmp = packet.get(header_bytes..).unwrap_or_default();
    icmp.len() >= ICMP_HEADER_BYTES
        && icmp[0] == ECHO_REPLY
        && icmp[4..6] == identifier.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times: Vec<u64> = (1..=200).collect();
        assert_eq!(percentile(&times, 50), 100.0);
        assert_eq!(percentile(&times, 99), 198.0);
        assert_eq!(percentile(&[7], 99), 7.0);
    }

    #[test]
    fn a_request_sums_up_to_all_ones() {
        for (identifier, sequence) in [(0, 0), (0xffff, 0xffff), (0x1234, 0xfedc)] {
            let request = echo_request(identifier, sequence);
            let sum: u32 = request
                .chunks(2)
                .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
                .sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{request:?}");
        }
    }

    #[test]
    fn only_our_replies_count() {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet.extend([ECHO_REPLY, 0, 0, 0, 0x12, 0x34, 0, 1]);
        assert!(is_reply(&packet, 0x1234));
        assert!(!is_reply(&packet, 0x1235));
        assert!(!is_reply(&packet[..24], 0x1234));
        packet[20] = ECHO_REQUEST;
        assert!(!is_reply(&packet, 0x1234));
        assert!(!is_reply(&[], 0x1234));
    }
}
