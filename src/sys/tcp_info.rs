//! What the kernel knows of a TCP connection.
#![expect(unsafe_code, reason = "TCP_INFO has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::proto::send_limit::Sample;

/// `struct tcp_info` of `include/uapi/linux/tcp.h` up to `tcpi_delivered`, which 5.10 has; later fields follow it.
const TCP_INFO_BYTES: usize = 196;
const RETRANSMITS: usize = 2;
const SND_MSS: usize = 16;
const UNACKED: usize = 24;
const SACKED: usize = 28;
const LOST: usize = 32;
const RETRANS: usize = 36;
const RTT: usize = 68;
const SND_CWND: usize = 80;
const TOTAL_RETRANS: usize = 100;
const BYTES_RECEIVED: usize = 128;
const NOTSENT_BYTES: usize = 144;
const MIN_RTT: usize = 148;
const DELIVERY_RATE: usize = 160;
const DELIVERED: usize = 192;
/// What `tcpi_min_rtt` is before the first measurement.
const NOT_MEASURED: u32 = u32::MAX;

/// How a TCP connection fares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpInfo {
    /// The congestion control's name.
    pub congestion_control: String,
    /// Smoothed round trip time.
    pub rtt_microseconds: u32,
    /// The shortest round trip of late; 0 before there was one.
    pub rtt_min_microseconds: u32,
    /// Congestion window.
    pub cwnd_segments: u32,
    /// Bytes of a segment that is sent.
    pub mss_bytes: u32,
    /// Segments sent and not acknowledged.
    pub unacked_segments: u32,
    /// Segments sent again, since the connection began.
    pub retransmitted_segments: u32,
    /// How fast the path has delivered lately.
    pub delivery_rate_bytes_per_second: u64,
    /// Bytes that the kernel has taken and not sent yet.
    pub notsent_bytes: u32,
}

/// Asks the kernel.
///
/// # Errors
/// It is no TCP socket.
pub fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    let bytes = ask(socket)?;
    let name = SockRef::from(&socket).tcp_congestion()?;
    let name = String::from_utf8_lossy(&name);
    let min = u32_at(&bytes, MIN_RTT);
    Ok(TcpInfo {
        congestion_control: name.trim_end_matches('\0').to_owned(),
        rtt_microseconds: u32_at(&bytes, RTT),
        rtt_min_microseconds: if min == NOT_MEASURED { 0 } else { min },
        cwnd_segments: u32_at(&bytes, SND_CWND),
        mss_bytes: u32_at(&bytes, SND_MSS),
        unacked_segments: u32_at(&bytes, UNACKED),
        retransmitted_segments: u32_at(&bytes, TOTAL_RETRANS),
        delivery_rate_bytes_per_second: u64_at(&bytes, DELIVERY_RATE),
        notsent_bytes: u32_at(&bytes, NOTSENT_BYTES),
    })
}

/// Asks the kernel for what a sender goes by; cheaper than [`tcp_info`]. `is_busy`: there is more to send than is taken.
///
/// # Errors
/// It is no TCP socket.
pub fn sample(socket: BorrowedFd<'_>, is_busy: bool) -> io::Result<Sample> {
    let bytes = ask(socket)?;
    let shortest = match u32_at(&bytes, MIN_RTT) {
        NOT_MEASURED => 0,
        microseconds => microseconds,
    };
    let micros = |value: u32| Duration::from_micros(value.into());
    let segment_bytes = u32_at(&bytes, SND_MSS);
    // `tcp_packets_in_flight` of the kernel.
    let in_flight = (u32_at(&bytes, UNACKED) + u32_at(&bytes, RETRANS))
        .saturating_sub(u32_at(&bytes, SACKED) + u32_at(&bytes, LOST));
    let in_flight_bytes = u64::from(in_flight) * u64::from(segment_bytes);
    Ok(Sample {
        delivered_segments: u32_at(&bytes, DELIVERED),
        retransmitted_segments: u32_at(&bytes, TOTAL_RETRANS),
        segment_bytes,
        held_bytes: in_flight_bytes + u64::from(u32_at(&bytes, NOTSENT_BYTES)),
        received_bytes: u64_at(&bytes, BYTES_RECEIVED),
        rtt_min: micros(shortest),
        rtt: micros(u32_at(&bytes, RTT)),
        is_busy,
        timed_out: bytes[RETRANSMITS] > 0,
    })
}

fn ask(socket: BorrowedFd<'_>) -> io::Result<[u8; TCP_INFO_BYTES]> {
    let mut bytes = [0_u8; TCP_INFO_BYTES];
    let mut length = TCP_INFO_BYTES as libc::socklen_t;
    // SAFETY: both pointers are to live values, and the kernel writes no more than `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

fn u32_at(bytes: &[u8; TCP_INFO_BYTES], at: usize) -> u32 {
    bytes[at..]
        .first_chunk()
        .copied()
        .map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8; TCP_INFO_BYTES], at: usize) -> u64 {
    bytes[at..]
        .first_chunk()
        .copied()
        .map_or(0, u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_connection_that_has_carried_something_has_been_measured() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let mut near = TcpStream::connect(listener.local_addr().expect("address")).expect("peer");
        let (mut far, _) = listener.accept().expect("accepted");
        for _ in 0..10 {
            near.write_all(&[1; 1000]).expect("written");
            far.read_exact(&mut [0; 1000]).expect("read");
            far.write_all(&[2]).expect("written");
            near.read_exact(&mut [0]).expect("read");
        }
        let info = tcp_info(near.as_fd()).expect("information");
        let system = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        assert_eq!(info.congestion_control, system.expect("/proc").trim_end());
        assert!((1..10_000_000).contains(&info.rtt_microseconds), "{info:?}");
        assert!(
            info.rtt_min_microseconds <= info.rtt_microseconds,
            "{info:?}"
        );
        assert!((536..=65_535).contains(&info.mss_bytes), "{info:?}");
        assert!((1..10_000).contains(&info.cwnd_segments), "{info:?}");
        assert_ne!(info.delivery_rate_bytes_per_second, 0, "{info:?}");
        assert!(info.delivery_rate_bytes_per_second < 1 << 40, "{info:?}");
        let sample = sample(near.as_fd(), true).expect("information");
        let micros = |value: u32| Duration::from_micros(value.into());
        assert_eq!(sample.rtt_min, micros(info.rtt_min_microseconds));
        assert_eq!(sample.rtt, micros(info.rtt_microseconds));
        assert_eq!(
            (sample.segment_bytes, sample.held_bytes),
            (info.mss_bytes, 0)
        );
        // One for each write, and the handshake.
        assert_eq!(sample.delivered_segments, 11);
        assert_eq!(sample.received_bytes, 10);
        assert_eq!(
            (info.unacked_segments, info.notsent_bytes),
            (0, 0),
            "{info:?}"
        );
    }

    #[test]
    fn something_else_is_an_error() {
        let (pair, _) = crate::sys::fdpass::pair().expect("pair");
        assert!(tcp_info(pair.as_fd()).is_err());
        assert!(sample(pair.as_fd(), true).is_err());
    }
}
