//! UDP packets per second: one flow of datagrams, each of them a packet of its own (no segmentation offload),
//! counted where a program receives them.
//!
//! Sender and receiver are threads of this process with sockets in two hosts. Packets are numbered, and the
//! sender knows the latest number that has arrived: it is never more than [`WINDOW_PACKETS`] ahead of it. So the
//! path is always full, whatever is lost on it, and the sender does not take the processor from the very
//! tunnel that is measured, as one would that sends as fast as it can.

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt,
};

use super::BenchError;
use super::metric::Direction;
use crate::host::Host;
use crate::netns::NamespaceError;

/// `web`'s port for this.
const PORT: u16 = 5202;
/// How far the sender may be ahead of the latest packet that has arrived.
pub const WINDOW_PACKETS: u64 = 1024;
/// How long nothing may arrive before the sender takes all that is on its way for lost.
const LOST_AFTER: Duration = Duration::from_millis(20);
/// The number at the front of a packet.
const NUMBER_BYTES: usize = 8;
/// Datagrams per system call.
const BATCH_PACKETS: usize = 64;
/// So that it is the path that is measured, and not how often a program gets to its socket.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;
/// How long the path is filled before packets are counted.
const WARM_UP: Duration = Duration::from_millis(300);
/// How long the two ends may take to find each other.
const MEET_LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts of it.
const MEET_INTERVAL: Duration = Duration::from_millis(20);
/// How long the receiver waits for a packet before it looks at the time.
const RECEIVE_LIMIT: Duration = Duration::from_millis(50);
/// How long the sender sleeps when it is too far ahead.
const HELD: Duration = Duration::from_micros(20);

/// What both ends know of a run.
#[derive(Debug, Default)]
struct Progress {
    /// How many packets have arrived.
    received: AtomicU64,
    /// The number of the latest of them; the first packet has number 1.
    latest: AtomicU64,
    is_over: AtomicBool,
}

/// Packets per second of `payload_bytes` that arrive, counted for `measuring`.
///
/// # Errors
/// When the two ends do not find each other, or nothing arrives.
pub fn packets_per_second(
    client: &Host,
    web: (&Host, Ipv4Addr),
    direction: Direction,
    payload_bytes: usize,
    measuring: Duration,
) -> Result<f64, BenchError> {
    let (client, web) = meet(client, web)?;
    let (sender, receiver) = match direction {
        Direction::Down => (web, client),
        Direction::Up => (client, web),
    };
    let progress = Progress::default();
    let rate = thread::scope(|scope| {
        let sending = scope.spawn(|| send(&sender, payload_bytes, &progress));
        let receiving = scope.spawn(|| receive(&receiver, &progress));
        thread::sleep(WARM_UP);
        let (begun, before) = (Instant::now(), progress.received.load(Ordering::Relaxed));
        thread::sleep(measuring);
        let packets = progress.received.load(Ordering::Relaxed) - before;
        let rate = packets as f64 / begun.elapsed().as_secs_f64();
        progress.is_over.store(true, Ordering::Relaxed);
        for end in [sending.join(), receiving.join()] {
            end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok::<f64, Errno>(rate)
    });
    match rate.map_err(std::io::Error::from)? {
        rate if rate > 0.0 => Ok(rate),
        _ => Err(BenchError::NothingReceived),
    }
}

/// Two sockets that have heard from each other, so that every NAT on the way knows them.
fn meet(
    client: &Host,
    (web, address): (&Host, Ipv4Addr),
) -> Result<(UdpSocket, UdpSocket), BenchError> {
    let open = |host: &Host, local: SocketAddr| -> Result<UdpSocket, BenchError> {
        let socket: Result<_, NamespaceError> = host.enter(|| {
            let socket = UdpSocket::bind(local)?;
            // Beyond net.core.rmem_max, where root may.
            if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).is_err() {
                setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
            }
            Ok(socket)
        });
        socket?.map_err(BenchError::Socket)
    };
    let client = open(client, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))?;
    let web = open(web, SocketAddr::from((address, PORT)))?;
    client.connect((address, PORT))?;
    client.set_read_timeout(Some(MEET_INTERVAL))?;
    web.set_read_timeout(Some(MEET_INTERVAL))?;
    let deadline = Instant::now() + MEET_LIMIT;
    let greeting = [0; 1];
    // Longer, so that a packet that comes late from a run before, and from a socket that is gone, is told from a greeting.
    let mut heard = [0; NUMBER_BYTES];
    while Instant::now() < deadline {
        client.send(&greeting)?;
        if let Ok((1, from)) = web.recv_from(&mut heard) {
            web.connect(from)?;
            web.send(&greeting)?;
            if client.recv(&mut heard).is_ok() {
                client.set_read_timeout(Some(RECEIVE_LIMIT))?;
                web.set_read_timeout(Some(RECEIVE_LIMIT))?;
                return Ok((client, web));
            }
        }
    }
    Err(BenchError::Silent(address))
}

/// Keeps the path full until the run is over.
fn send(socket: &UdpSocket, payload_bytes: usize, progress: &Progress) -> Result<(), Errno> {
    let mut payloads = vec![vec![0; payload_bytes.max(NUMBER_BYTES)]; BATCH_PACKETS];
    let addresses: Vec<Option<SockaddrIn>> = vec![None; BATCH_PACKETS];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH_PACKETS, None);
    let mut sent = 0_u64;
    // What counts as arrived: the latest number, or more when everything was lost.
    let mut arrived = 0;
    let mut arrived_at = Instant::now();
    while !progress.is_over.load(Ordering::Relaxed) {
        let latest = progress.latest.load(Ordering::Relaxed);
        if latest > arrived {
            (arrived, arrived_at) = (latest, Instant::now());
        }
        if sent - arrived >= WINDOW_PACKETS {
            if arrived_at.elapsed() > LOST_AFTER {
                (arrived, arrived_at) = (sent, Instant::now());
            } else {
                thread::sleep(HELD);
            }
            continue;
        }
        for (number, payload) in (sent + 1..).zip(&mut payloads) {
            payload[..NUMBER_BYTES].copy_from_slice(&number.to_le_bytes());
        }
        let batch: Vec<[IoSlice<'_>; 1]> = payloads
            .iter()
            .map(|payload| [IoSlice::new(payload)])
            .collect();
        let outcome = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &batch,
            &addresses,
            [],
            MsgFlags::empty(),
        );
        match outcome {
            Ok(results) => sent += results.count() as u64,
            // A queue on the way is full, or the other end's socket was not there yet.
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::ECONNREFUSED | Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Counts what comes until the run is over.
fn receive(socket: &UdpSocket, progress: &Progress) -> Result<(), Errno> {
    let mut numbers = [[0_u8; NUMBER_BYTES]; BATCH_PACKETS];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH_PACKETS, None);
    while !progress.is_over.load(Ordering::Relaxed) {
        let mut batch: Vec<[IoSliceMut<'_>; 1]> = numbers
            .iter_mut()
            .map(|number| [IoSliceMut::new(number)])
            .collect();
        let outcome = recvmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &mut batch,
            MsgFlags::MSG_WAITFORONE,
            None,
        );
        let packets = match outcome {
            Ok(results) => results.count(),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => continue,
            Err(errno) => return Err(errno),
        };
        progress
            .received
            .fetch_add(packets as u64, Ordering::Relaxed);
        let latest = numbers[..packets]
            .iter()
            .map(|number| u64::from_le_bytes(*number))
            .max();
        progress
            .latest
            .fetch_max(latest.unwrap_or_default(), Ordering::Relaxed);
    }
    Ok(())
}
