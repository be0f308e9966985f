//! A TCP transfer between a client and `web` that goes on until it is told to finish; every byte is compared on arrival.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::bench::Direction;
use crate::host::Host;
use crate::netns::NamespaceError;

/// Bytes that are written at once. No two blocks are the same, so that one in the place of another is noticed.
const BLOCK_BYTES: usize = 64 * 1024;
/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How long either end waits for the other before it gives up.
const STALL_LIMIT: Duration = Duration::from_secs(90);
/// From one look at a transfer to the next.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The same where the time is to be told.
const TIMING_INTERVAL: Duration = Duration::from_millis(1);

/// Why a transfer is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A host could not be entered.
    #[error("a lab host could not be entered")]
    Namespace(#[from] NamespaceError),
    /// There is no connection.
    #[error("no connection to {to}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// One end failed.
    #[error("the {end} broke off after {bytes} bytes")]
    Broken {
        /// `sender` or `receiver`.
        end: &'static str,
        /// How far it had come.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What arrived is not what was sent.
    #[error("the bytes that arrived are not those that were sent, from somewhere after {after} on")]
    Altered {
        /// How many were right.
        after: u64,
    },
    /// Some of it did not arrive.
    #[error("{received} of {sent} bytes arrived")]
    Short {
        /// What was sent.
        sent: u64,
        /// What arrived.
        received: u64,
    },
    /// It is too slow.
    #[error("only {bytes} further bytes within {limit:?}")]
    Stalled {
        /// How much arrived.
        bytes: u64,
        /// How long was waited.
        limit: Duration,
    },
}

/// A transfer that goes on.
#[derive(Debug)]
pub struct Transfer {
    finish: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64, TransferError>>,
    receiver: JoinHandle<Result<u64, TransferError>>,
}

impl Transfer {
    /// Connects `client` to `address` of `server` and lets bytes flow without an end.
    ///
    /// # Errors
    /// When the connection does not come about.
    pub fn start(
        client: &Host,
        server: &Host,
        address: IpAddr,
        direction: Direction,
    ) -> Result<Transfer, TransferError> {
        let (at_client, at_server) = connect(client, server, address)?;
        let (from, to) = match direction {
            Direction::Down => (at_server, at_client),
            Direction::Up => (at_client, at_server),
        };
        let finish = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        Ok(Transfer {
            sender: thread::spawn({
                let finish = Arc::clone(&finish);
                move || send(from, &finish)
            }),
            receiver: thread::spawn({
                let received = Arc::clone(&received);
                move || receive(to, &received)
            }),
            finish,
            received,
        })
    }

    /// Waits until that many more bytes have arrived, and calls `meanwhile` now and then.
    ///
    /// # Errors
    /// [`TransferError::Stalled`] when that takes longer than `limit`, or when the transfer has ended.
    pub fn wait_for_more(
        &self,
        bytes: u64,
        limit: Duration,
        meanwhile: impl FnMut(),
    ) -> Result<(), TransferError> {
        self.wait(bytes, limit, POLL_INTERVAL, meanwhile)
    }

    /// The same, to the millisecond.
    ///
    /// # Errors
    /// As for [`Transfer::wait_for_more`].
    pub fn time_more(&self, bytes: u64, limit: Duration) -> Result<(), TransferError> {
        self.wait(bytes, limit, TIMING_INTERVAL, || ())
    }

    fn wait(
        &self,
        bytes: u64,
        limit: Duration,
        interval: Duration,
        mut meanwhile: impl FnMut(),
    ) -> Result<(), TransferError> {
        let start = self.received.load(Ordering::Relaxed);
        let deadline = Instant::now() + limit;
        loop {
            let arrived = self.received.load(Ordering::Relaxed) - start;
            if arrived >= bytes {
                return Ok(());
            }
            if Instant::now() > deadline || self.has_ended() {
                return Err(TransferError::Stalled {
                    bytes: arrived,
                    limit,
                });
            }
            meanwhile();
            thread::sleep(interval);
        }
    }

    /// Whether either end has given up.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.receiver.is_finished() || self.sender.is_finished()
    }

    /// Ends it when everything sent has arrived. Returns how many bytes that were.
    ///
    /// # Errors
    /// When either end has failed, or bytes are missing or changed.
    pub fn finish(self) -> Result<u64, TransferError> {
        self.finish.store(true, Ordering::Relaxed);
        // The receiver first: it knows best what is wrong.
        let received = self.receiver.join().expect("a receiver does not panic")?;
        let sent = self.sender.join().expect("a sender does not panic")?;
        if received != sent {
            return Err(TransferError::Short { sent, received });
        }
        Ok(sent)
    }
}

/// A connection from `client` to `address` of `server`, both ends of it.
///
/// # Errors
/// When it does not come about.
pub fn connect(
    client: &Host,
    server: &Host,
    address: IpAddr,
) -> Result<(TcpStream, TcpStream), TransferError> {
    let failed = |to| move |source| TransferError::Connect { to, source };
    let any_port = SocketAddr::new(address, 0);
    let listener = server
        .enter(|| TcpListener::bind(any_port))?
        .map_err(failed(any_port))?;
    let to = listener.local_addr().map_err(failed(any_port))?;
    let at_client = client
        .enter(|| TcpStream::connect_timeout(&to, CONNECT_LIMIT))?
        .map_err(failed(to))?;
    let (at_server, _) = listener.accept().map_err(failed(to))?;
    for end in [&at_client, &at_server] {
        end.set_read_timeout(Some(STALL_LIMIT))
            .and_then(|()| end.set_write_timeout(Some(STALL_LIMIT)))
            .map_err(failed(to))?;
    }
    Ok((at_client, at_server))
}

/// A word each way through a connection.
///
/// # Errors
/// When it does not arrive, or as something else.
pub fn converse((mut near, mut far): (TcpStream, TcpStream)) -> io::Result<()> {
    let mut word = [0; 5];
    near.write_all(b"still")?;
    far.read_exact(&mut word)?;
    let forth = word == *b"still";
    far.write_all(b"there")?;
    near.read_exact(&mut word)?;
    if forth && word == *b"there" {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn send(mut stream: TcpStream, finish: &AtomicBool) -> Result<u64, TransferError> {
    let mut bytes = 0;
    let mut run = || {
        let mut pattern = Pattern::new();
        while !finish.load(Ordering::Relaxed) {
            stream.write_all(pattern.next_block())?;
            bytes += BLOCK_BYTES as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        // Until the other end has read everything and closed.
        stream.read(&mut [0]).map(drop)
    };
    run().map_err(|source| TransferError::Broken {
        end: "sender",
        bytes,
        source,
    })?;
    Ok(bytes)
}

fn receive(mut stream: TcpStream, received: &AtomicU64) -> Result<u64, TransferError> {
    let mut pattern = Pattern::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut bytes = 0;
    loop {
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match stream.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(TransferError::Broken {
                        end: "receiver",
                        bytes: bytes + filled as u64,
                        source,
                    });
                }
            }
            received.store(bytes + filled as u64, Ordering::Relaxed);
        }
        if block[..filled] != pattern.next_block()[..filled] {
            return Err(TransferError::Altered { after: bytes });
        }
        bytes += filled as u64;
        if filled < BLOCK_BYTES {
            return Ok(bytes);
        }
    }
}

/// What is sent: blocks that look random, each with its number in front.
struct Pattern {
    block: Vec<u8>,
    number: u64,
}

impl Pattern {
    fn new() -> Pattern {
        // A linear congruential generator will do: nobody wants to guess these.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let words = (0..BLOCK_BYTES / 8).flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state ^ (state >> 29)).to_be_bytes()
        });
        Pattern {
            block: words.collect(),
            number: 0,
        }
    }

    fn next_block(&mut self) -> &[u8] {
        self.number += 1;
        self.block[..8].copy_from_slice(&self.number.to_be_bytes());
        &self.block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("a bound socket");
        let near = TcpStream::connect(address).expect("a connection");
        (near, listener.accept().expect("its other end").0)
    }

    #[test]
    fn what_was_sent_is_recognised() {
        let (near, far) = pair();
        let finish = Arc::new(AtomicBool::new(false));
        let sender = thread::spawn({
            let finish = Arc::clone(&finish);
            move || send(near, &finish)
        });
        let received = Arc::new(AtomicU64::new(0));
        let receiver = thread::spawn({
            let received = Arc::clone(&received);
            move || receive(far, &received)
        });
        while received.load(Ordering::Relaxed) < 3 * BLOCK_BYTES as u64 {
            thread::sleep(Duration::from_millis(1));
        }
        finish.store(true, Ordering::Relaxed);
        let sent = sender.join().expect("no panic").expect("all is sent");
        let received = receiver.join().expect("no panic").expect("all is right");
        assert_eq!(sent, received);
    }

    #[test]
    fn a_changed_byte_and_a_missing_block_are_noticed() {
        let right = {
            let mut pattern = Pattern::new();
            let mut bytes = pattern.next_block().to_vec();
            bytes.extend_from_slice(pattern.next_block());
            bytes
        };
        let mut changed = right.clone();
        changed[BLOCK_BYTES + 100] ^= 1;
        for (wrong, after) in [
            (changed, BLOCK_BYTES as u64),
            (right[BLOCK_BYTES..].to_vec(), 0),
        ] {
            let (mut near, far) = pair();
            let receiver = thread::spawn(move || receive(far, &AtomicU64::new(0)));
            near.write_all(&wrong).expect("room in the socket's buffer");
            drop(near);
            let outcome = receiver.join().expect("no panic");
            assert!(
                matches!(outcome, Err(TransferError::Altered { after: found }) if found == after),
                "{outcome:?}"
            );
        }
    }
}
