//! Requests and responses over one TCP connection: what somebody feels who types while others transfer files. And how
//! evenly those others are served.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use super::BenchError;
use super::echo::percentile;
use crate::host::Host;
use crate::netns::NamespaceError;

/// `web`'s port for this.
const PORT: u16 = 5203;
/// A request and a response, each a packet of its own.
const MESSAGE_BYTES: usize = 64;
/// From a response to the next request.
const PAUSE: Duration = Duration::from_millis(10);
/// How long the connection may take to come about, and a response to come.
const RESPONSE_LIMIT: Duration = Duration::from_secs(20);
/// How long the responder waits before it looks whether it is over.
const LOOK_MS: u8 = 20;

/// The 99th percentile of the time from a request to its response, in microseconds, measured for `measuring`.
///
/// # Errors
/// When a response takes longer than [`RESPONSE_LIMIT`].
pub fn p99_us(
    client: &Host,
    (web, address): (&Host, Ipv4Addr),
    measuring: Duration,
) -> Result<f64, BenchError> {
    let listener = web.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))??;
    listener.set_nonblocking(true)?;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let responder = scope.spawn(|| respond(&listener, &is_over));
        let asked = ask(client, address, measuring);
        is_over.store(true, Ordering::Relaxed);
        let responded = responder.join();
        let mut times = asked?;
        // It ends only with the asker, whose errors say more.
        if let Ok(responded) = responded {
            responded?;
        }
        times.sort_unstable();
        Ok(percentile(&times, 99))
    })
}

/// Asks for as long as it should and then returns the times that all answers took, in microseconds.
fn ask(client: &Host, to: Ipv4Addr, measuring: Duration) -> Result<Vec<u64>, BenchError> {
    let times = client.enter(|| -> std::io::Result<Vec<u64>> {
        let mut connection = TcpStream::connect_timeout(&(to, PORT).into(), RESPONSE_LIMIT)?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(RESPONSE_LIMIT))?;
        let mut message = [1; MESSAGE_BYTES];
        let mut times = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < measuring || times.is_empty() {
            let sent = Instant::now();
            connection.write_all(&message)?;
            connection.read_exact(&mut message)?;
            times.push(u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX));
            thread::sleep(PAUSE);
        }
        Ok(times)
    });
    match times.map_err(|error: NamespaceError| BenchError::from(error))? {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(BenchError::Silent(to)),
        times => Ok(times?),
    }
}

/// Sends back what comes on the first connection, until it is over.
fn respond(listener: &TcpListener, is_over: &AtomicBool) -> std::io::Result<()> {
    let mut connection: Option<TcpStream> = None;
    let mut message = [0; MESSAGE_BYTES];
    while !is_over.load(Ordering::Relaxed) {
        match &mut connection {
            None => {
                poll(
                    &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
                    LOOK_MS,
                )?;
                match listener.accept() {
                    Ok((accepted, _)) => {
                        accepted.set_nonblocking(false)?;
                        accepted.set_nodelay(true)?;
                        accepted.set_read_timeout(Some(Duration::from_millis(LOOK_MS.into())))?;
                        connection = Some(accepted);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            // Whatever the pieces, the bytes are the same.
            Some(connection) => match connection.read(&mut message) {
                Ok(0) => return Ok(()),
                Ok(bytes) => connection.write_all(&message[..bytes])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            },
        }
    }
    Ok(())
}

/// Jain's index of fairness: 1 when all shares are equal, 1/n when one has all.
#[must_use]
pub fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_is_between_one_for_all_and_one_for_one() {
        assert_eq!(jain(&[3.0; 8]), 1.0);
        assert_eq!(jain(&[0.0, 0.0, 5.0, 0.0]), 0.25);
        assert!((jain(&[1.0, 2.0]) - 0.9).abs() < 1e-9);
    }
}
