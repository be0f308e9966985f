//! The only place that knows tokio-uring: start the runtime, accept, read, write.
//!
//! tokio-uring owns a buffer for as long as an operation on it is in flight, and dropping the future does not end the
//! operation: it would go on holding the socket. So whoever gives up on a [`Stream`] shuts the socket down, which
//! completes whatever is in flight; dropping a [`Stream`] does just that.

use std::future::Future;
use std::io;
use std::mem::ManuallyDrop;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::TcpSocket;
use tokio::time::{Instant, timeout_at};
use tokio_uring::net::{TcpListener as RingListener, TcpStream as RingStream};

use crate::panics;
use crate::sys::descriptor::duplicate;
use crate::uring::probe::ring_bytes;

/// Bytes asked for by one read: a whole TLS record and its header.
pub const READ_BYTES: usize = 17 * 1024;

/// Submission queue entries of the control ring, best first. There are twice as many completions.
const RING_ENTRIES: [u32; 2] = [256, 32];

/// A tokio-uring runtime for this thread.
///
/// It is never torn down: a ring waits for its operations when it is dropped, and an accept may stay in flight
/// forever. The process is expected to end after [`Runtime::run`].
pub struct Runtime {
    ring: ManuallyDrop<tokio_uring::Runtime>,
}

impl Runtime {
    /// Sets the ring up, of no more than `lockable_bytes` unless that is less than the smallest one.
    ///
    /// # Errors
    /// What io_uring_setup(2) said, when the kernel or a container refuses it.
    pub fn new(lockable_bytes: usize) -> io::Result<Self> {
        let [best, smallest] = RING_ENTRIES;
        let ring = if ring_bytes(best, 2 * best) > lockable_bytes {
            Self::with(smallest)
        } else {
            Self::with(best).or_else(|error| match error.raw_os_error() {
                Some(libc::ENOMEM) => Self::with(smallest),
                _ => Err(error),
            })
        };
        Ok(Runtime {
            ring: ManuallyDrop::new(ring?),
        })
    }

    fn with(entries: u32) -> io::Result<tokio_uring::Runtime> {
        let mut builder = tokio_uring::builder();
        builder.entries(entries);
        tokio_uring::Runtime::new(&builder)
    }

    /// Runs `main` to its end.
    pub fn run<F: Future>(&self, main: F) -> F::Output {
        self.ring.block_on(main)
    }
}

/// Runs a task of one connection on this thread's runtime, for as long as it takes. Its panic is logged and ends it alone.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    tokio_uring::spawn(async {
        // It has been logged.
        let _ = panics::contain("connection", task).await;
    });
}

/// Runs a task that the daemon cannot do without on this thread's runtime. Its panic ends the daemon, which says so in
/// the task's `name`. A task that must never return says so by its type.
pub fn spawn_essential<T: 'static>(name: &'static str, task: impl Future<Output = T> + 'static) {
    tokio_uring::spawn(panics::essential(name, task));
}

/// A listening socket.
pub struct Listener {
    ring: RingListener,
    /// Another descriptor of the ring's socket, to be polled.
    socket: TcpListener,
}

impl Listener {
    /// Takes over a socket that is bound and listening.
    ///
    /// # Errors
    /// What fcntl said, for instance EMFILE.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = TcpListener::from(socket);
        // A ring waits for a blocking socket by itself; a non-blocking one gives EAGAIN on old kernels.
        socket.set_nonblocking(false)?;
        Ok(Listener {
            ring: RingListener::from_std(socket.try_clone()?),
            socket,
        })
    }

    /// Whether a connection waits to be accepted. accept(2) itself does not tell where descriptors
    /// are short: it asks for one first, and fails also when nobody connects.
    pub fn is_waited_for(&self) -> bool {
        let mut wanted = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut wanted, PollTimeout::ZERO), Ok(1..))
    }

    /// The next connection and where it comes from; an IPv4 source is one, also on an IPv6 socket.
    ///
    /// # Errors
    /// What accept(2) said; the listener remains usable.
    pub async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        let (ring, source) = self.ring.accept().await?;
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        Ok((Stream::over(ring), source))
    }
}

/// Connects a socket, without the ring: giving up must leave nothing in flight. Returns it in blocking mode.
///
/// # Errors
/// What connect(2) said, or [`io::ErrorKind::TimedOut`] at the `deadline`.
pub async fn connect(
    socket: OwnedFd,
    address: SocketAddr,
    deadline: Instant,
) -> io::Result<OwnedFd> {
    let socket = std::net::TcpStream::from(socket);
    socket.set_nonblocking(true)?;
    let connecting = TcpSocket::from_std_stream(socket).connect(address);
    let connected = timeout_at(deadline, connecting)
        .await
        .map_err(|_| io::ErrorKind::TimedOut)??
        .into_std()?;
    connected.set_nonblocking(false)?;
    Ok(connected.into())
}

/// A connected TCP socket in blocking mode, driven by the control ring.
pub struct Stream {
    ring: RingStream,
    /// Given away: the socket must not be shut down.
    given_away: bool,
}

impl Stream {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// What fcntl said.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = std::net::TcpStream::from(socket);
        socket.set_nonblocking(false)?;
        Ok(Stream::over(RingStream::from_std(socket)))
    }

    fn over(ring: RingStream) -> Self {
        Stream {
            ring,
            given_away: false,
        }
    }

    /// Appends what has arrived to `buffer`; 0 means that the peer has finished.
    ///
    /// # Errors
    /// The socket's error, or [`io::ErrorKind::TimedOut`] when nothing came before `deadline`: give the stream up then.
    pub async fn read(&self, buffer: &mut Vec<u8>, deadline: Instant) -> io::Result<usize> {
        let read = self.ring.read(Vec::with_capacity(READ_BYTES));
        let (bytes, chunk) = timeout_at(deadline, read)
            .await
            .map_err(|_| io::ErrorKind::TimedOut)?;
        let bytes = bytes?;
        buffer.extend_from_slice(&chunk[..bytes]);
        Ok(bytes)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The socket's error, or [`io::ErrorKind::TimedOut`] when the peer did not take it before `deadline`: give the
    /// stream up then.
    pub async fn write(&self, bytes: Vec<u8>, deadline: Instant) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let write = self.ring.write_all(bytes);
        let (written, _) = timeout_at(deadline, write)
            .await
            .map_err(|_| io::ErrorKind::TimedOut)?;
        written
    }

    /// Says that nothing more will be written, and waits a little for the peer to finish too, so that what is still
    /// on its way to the peer is not cut off by a reset.
    pub async fn finish(self, linger: Duration) {
        if self.ring.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let deadline = Instant::now() + linger;
        let mut ignored = Vec::new();
        while matches!(self.read(&mut ignored, deadline).await, Ok(1..)) {
            ignored.clear();
        }
    }

    /// Another descriptor of the socket, for what needs one. The socket is the same.
    ///
    /// # Errors
    /// EMFILE.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        duplicate(&self.ring)
    }

    /// Gives the socket away, still connected, in blocking mode.
    ///
    /// No read or write may have been given up before.
    ///
    /// # Errors
    /// EMFILE; then the connection is lost.
    pub fn into_socket(mut self) -> io::Result<OwnedFd> {
        let socket = duplicate(&self.ring)?;
        self.given_away = true;
        Ok(socket)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.given_away {
            // Ends an operation that may be in flight. One that the peer has ended already has nothing to shut down.
            let _ = self.ring.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpStream};

    use super::*;

    /// A stream of the runtime and the other end of it.
    async fn pair() -> (Stream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let address = listener.local_addr().expect("address");
        let listener = Listener::new(listener.into()).expect("listener");
        let peer = TcpStream::connect(address).expect("connected");
        let (stream, source) = listener.accept().await.expect("accepted");
        assert_eq!(source, peer.local_addr().expect("address"));
        (stream, peer)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn a_panic_of_a_connection_ends_no_other() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            spawn(async { panic!("a bug, for the test") });
            let (stream, mut peer) = pair().await;
            let (done, other) = tokio::sync::oneshot::channel();
            spawn(async move {
                let written = stream.write(b"pong".to_vec(), soon()).await;
                // The test is over when the receiver is gone.
                let _ = done.send(written.is_ok());
            });
            assert_eq!(other.await, Ok(true));
            let mut text = String::new();
            peer.read_to_string(&mut text).expect("read");
            assert_eq!(text, "pong");
        });
    }

    #[test]
    fn a_panic_of_an_essential_task_reaches_the_main_loop() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            spawn_essential("accept", async {
                tokio::task::yield_now().await;
                panic!("a bug, for the test");
            });
            let told = tokio::time::timeout(Duration::from_secs(20), panics::essential_failure());
            assert_eq!(told.await, Ok(panics::TaskPanicked("accept")));
        });
    }

    #[test]
    fn bytes_go_both_ways_and_the_socket_can_be_given_away() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (stream, mut peer) = pair().await;
            peer.write_all(b"ping").expect("written");
            let mut read = Vec::new();
            while read.len() < 4 {
                assert_ne!(stream.read(&mut read, soon()).await.expect("read"), 0);
            }
            assert_eq!(read, b"ping");
            stream
                .write(b"pong".to_vec(), soon())
                .await
                .expect("written");
            let mut socket = TcpStream::from(stream.into_socket().expect("given away"));
            socket.write_all(b"!").expect("still open");
            drop(socket);
            let mut text = String::new();
            peer.read_to_string(&mut text).expect("read");
            assert_eq!(text, "pong!");
        });
    }

    #[test]
    fn a_listener_tells_whether_somebody_connects() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
            let address = listener.local_addr().expect("address");
            let listener = Listener::new(listener.into()).expect("listener");
            assert!(!listener.is_waited_for());
            let _peer = TcpStream::connect(address).expect("connected");
            assert!(listener.is_waited_for());
            listener.accept().await.expect("accepted");
            assert!(!listener.is_waited_for());
        });
    }

    #[test]
    fn connecting_ends_in_a_connection_or_an_error() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
            let address = listener.local_addr().expect("address");
            let socket = || {
                let socket =
                    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
                OwnedFd::from(socket.expect("socket"))
            };
            let connected = connect(socket(), address, soon()).await.expect("connected");
            assert_eq!(
                TcpStream::from(connected).peer_addr().expect("address"),
                address
            );
            drop(listener);
            let error = connect(socket(), address, soon())
                .await
                .expect_err("nobody listens");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn a_read_that_was_given_up_lets_go_of_the_socket() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (stream, mut peer) = pair().await;
            let error = stream
                .read(&mut Vec::new(), Instant::now())
                .await
                .expect_err("nothing was sent");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            drop(stream);
            assert_eq!(peer.read(&mut [0]).expect("end"), 0);
        });
    }
}
