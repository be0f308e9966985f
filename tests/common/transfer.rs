//! A TCP transfer between a client and the web host that goes on until told to finish, and is then compared.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aws_lc_rs::digest::{self, Context, Digest};
use aws_lc_rs::rand;
use ringtun_lab::Host;

use super::{SOON, until_true};

/// Bytes that are written at once.
const BLOCK_BYTES: usize = 64 * 1024;
/// How long either end waits for the other before it gives the transfer up.
const STALL_LIMIT: Duration = Duration::from_secs(90);

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The web host.
    Down,
    /// The client.
    Up,
}

/// A transfer that goes on.
pub struct Transfer {
    finish: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    /// How the first of the two came to its end.
    end: Arc<OnceLock<String>>,
    sender: JoinHandle<io::Result<(u64, Digest)>>,
    receiver: JoinHandle<io::Result<(u64, Digest)>>,
}

impl Transfer {
    /// Connects `client` to `web`'s address and lets bytes flow without an end.
    pub fn start(client: &Host, web: &Host, address: IpAddr, direction: Direction) -> Transfer {
        let (at_client, at_web) = connect(client, web, address);
        let (from, to) = match direction {
            Direction::Down => (at_web, at_client),
            Direction::Up => (at_client, at_web),
        };
        let finish = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let end = Arc::new(OnceLock::new());
        Transfer {
            sender: thread::spawn({
                let (finish, end) = (Arc::clone(&finish), Arc::clone(&end));
                move || {
                    let outcome = send(from, &finish);
                    let _ = end.set(format!("the sender ended with {outcome:?}"));
                    outcome
                }
            }),
            receiver: thread::spawn({
                let (received, end) = (Arc::clone(&received), Arc::clone(&end));
                move || {
                    let outcome = receive(to, &received);
                    let _ = end.set(format!("the receiver ended with {outcome:?}"));
                    outcome
                }
            }),
            finish,
            received,
            end,
        }
    }

    /// How many bytes have arrived.
    pub fn received_bytes(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until that many more bytes have arrived.
    pub fn wait_for_more(&self, bytes: u64) {
        let goal = self.received_bytes() + bytes;
        until_true(&format!("further {bytes} bytes of the transfer"), || {
            if let Some(end) = self.end.get() {
                panic!("the transfer has broken off: {end}");
            }
            self.received_bytes() >= goal
        });
    }

    /// Ends it and checks that everything sent has arrived unchanged. Returns how much it was.
    pub fn finish(self) -> u64 {
        self.finish.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("no panic");
        let received = self.receiver.join().expect("no panic");
        let (sent_bytes, sent) = sent.expect("the sender gets rid of everything");
        let (received_bytes, received) = received.expect("the receiver gets to the end");
        assert_eq!(received_bytes, sent_bytes, "all bytes arrive");
        assert_eq!(received.as_ref(), sent.as_ref(), "they arrive unchanged");
        sent_bytes
    }
}

/// A connection from `client` to `web`, both ends of it.
pub fn connect(client: &Host, web: &Host, address: IpAddr) -> (TcpStream, TcpStream) {
    let listener = web
        .enter(|| TcpListener::bind((address, 0)))
        .expect("the web host")
        .expect("a port of the web host");
    let to = SocketAddr::new(
        address,
        listener.local_addr().expect("a bound socket").port(),
    );
    let at_client = client
        .enter(|| TcpStream::connect_timeout(&to, SOON))
        .expect("the client's host")
        .expect("a connection to the web host");
    let (at_web, _) = listener.accept().expect("the connection's other end");
    for end in [&at_client, &at_web] {
        end.set_read_timeout(Some(STALL_LIMIT)).expect("a socket");
        end.set_write_timeout(Some(STALL_LIMIT)).expect("a socket");
    }
    (at_client, at_web)
}

fn send(mut stream: TcpStream, finish: &AtomicBool) -> io::Result<(u64, Digest)> {
    let mut block = vec![0; BLOCK_BYTES];
    rand::fill(&mut block).expect("random bytes");
    let mut context = Context::new(&digest::SHA256);
    let mut bytes = 0;
    while !finish.load(Ordering::Relaxed) {
        // No two blocks are the same, so that one in the place of another is noticed.
        block[..8].copy_from_slice(&u64::to_be_bytes(bytes));
        stream.write_all(&block)?;
        context.update(&block);
        bytes += block.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    // Until the other end has read everything and closed.
    let answered = stream.read(&mut [0])?;
    assert_eq!(answered, 0, "the receiver says nothing");
    Ok((bytes, context.finish()))
}

fn receive(mut stream: TcpStream, received: &AtomicU64) -> io::Result<(u64, Digest)> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut context = Context::new(&digest::SHA256);
    let mut bytes = 0;
    loop {
        match stream.read(&mut block)? {
            0 => return Ok((bytes, context.finish())),
            read => {
                context.update(&block[..read]);
                bytes += read as u64;
                received.store(bytes, Ordering::Relaxed);
            }
        }
    }
}
