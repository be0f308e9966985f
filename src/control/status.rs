//! The control socket: whoever may connect to it is told what runs here.
//!
//! A client writes one line and reads one document; see [`crate::status::query`]. The document is a value that the role's
//! own loop makes when it has a moment, so that it is all of one time; it is then written out piece by piece.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::log_limit::LogLimit;
use super::runtime::{spawn, spawn_essential};
use crate::config::IoMode;
use crate::keeper::request::Origin;
use crate::proto::offload::Offloads;
use crate::proto::route_table::Member;
use crate::stats::{HeldMemory, PacketMemory};
use crate::status::query::{ANSWER_TIME, REQUEST};
use crate::status::{self, Connection, FORMAT, Report, Role, Worker, WorkerIo};
use crate::sys::tcp_info::tcp_info;
use crate::uring::probe::SetUp;
use crate::worker::{WorkerInfo, Workers};

/// Clients that are served at a time; others wait.
pub const CLIENTS_MAX: usize = 4;
/// How long one client may take.
pub const CLIENT_TIME: Duration = Duration::from_secs(4);
// Whoever waits for a place still gets an answer.
const _: () = assert!(CLIENT_TIME.as_millis() < ANSWER_TIME.as_millis());
/// How long to wait after accept(2) failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Somebody wants to know.
#[derive(Debug)]
pub struct Question(oneshot::Sender<Report>);

impl Question {
    /// Tells.
    pub fn answer(self, report: Report) {
        // Whoever asked may have run out of time.
        let _ = self.0.send(report);
    }
}

/// What is asked by the control socket.
pub type Questions = mpsc::Receiver<Question>;

/// Serves the control socket, which is bound and listening, from now on.
///
/// # Errors
/// What fcntl or epoll said.
pub fn serve(socket: OwnedFd) -> io::Result<Questions> {
    serve_within(socket, CLIENT_TIME)
}

fn serve_within(socket: OwnedFd, client_time: Duration) -> io::Result<Questions> {
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    let listener = UnixListener::from_std(socket)?;
    let (ask, questions) = mpsc::channel(CLIENTS_MAX);
    spawn_essential("status", accept(listener, ask, client_time));
    Ok(questions)
}

async fn accept(
    listener: UnixListener,
    ask: mpsc::Sender<Question>,
    client_time: Duration,
) -> Infallible {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    let mut failures = LogLimit::default();
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let ask = ask.clone();
                spawn(async move {
                    let told = timeout(client_time, tell(&stream, &ask)).await;
                    tracing::debug!("status was asked for: {told:?}");
                    drop(place);
                });
            }
            Err(error) => {
                if let Some(times) = failures.event(Instant::now()) {
                    tracing::warn!("cannot accept on the control socket ({times} times): {error}");
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one client.
async fn tell(stream: &UnixStream, ask: &mpsc::Sender<Question>) -> io::Result<()> {
    read_request(stream).await?;
    let (question, answer) = oneshot::channel();
    // Neither is there any longer when the daemon is about to end.
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    ask.send(Question(question)).await.map_err(|_| gone())?;
    let mut pieces = answer.await.map_err(|_| gone())?.into_pieces()?;
    while let Some(piece) = pieces.next_piece()? {
        write_all(stream, &piece).await?;
        // However fast it is read: others have their turn in between.
        tokio::task::yield_now().await;
    }
    Ok(())
}

async fn read_request(stream: &UnixStream) -> io::Result<()> {
    let mut request = [0; REQUEST.len()];
    let mut filled = 0;
    while filled < request.len() {
        stream.readable().await?;
        match stream.try_read(&mut request[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    if request != REQUEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(())
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What does not change while the daemon runs.
pub struct Subject {
    role: Role,
    interface: String,
    mtu: u16,
    origin: Origin,
    io_mode: IoMode,
    tun_offloads: Offloads,
    since: Instant,
}

impl Subject {
    /// Its clock starts now.
    pub fn new(
        role: Role,
        interface: &str,
        mtu: u16,
        origin: &Origin,
        io_mode: IoMode,
        tun_offloads: Offloads,
    ) -> Self {
        Subject {
            role,
            interface: interface.to_owned(),
            mtu,
            origin: origin.clone(),
            io_mode,
            tun_offloads,
            since: Instant::now(),
        }
    }

    /// A report without the role's own part and without sessions.
    pub fn report(&self, workers: &Workers) -> Report {
        let infos = workers.infos().zip(workers.counters());
        let infos = infos.zip(workers.memory());
        Report {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: self.role,
            interface: self.interface.clone(),
            mtu_bytes: self.mtu,
            network_namespace: self.origin.namespace.clone(),
            keeper_pid: self.origin.keeper,
            daemon_pid: std::process::id(),
            up_seconds: self.since.elapsed().as_secs_f64(),
            io_mode: self.io_mode,
            tun_offloads: names(self.tun_offloads),
            server: None,
            client: None,
            workers: infos
                .map(|((info, counters), memory)| Worker {
                    io: worker_io(info, memory),
                    buffers_in_use: status::BuffersInUse {
                        chunks: memory.chunks.get(),
                        packets: memory.packets.get(),
                        medium_packets: memory.medium_packets.get(),
                        small_packets: memory.small_packets.get(),
                    },
                    counters: counters.read(),
                })
                .collect(),
            sessions: Vec::new(),
        }
    }
}

fn worker_io(info: WorkerInfo, memory: &PacketMemory) -> WorkerIo {
    WorkerIo {
        ring: match info.set_up {
            SetUp::Deferred => "deferred",
            SetUp::Cooperative => "cooperative",
            SetUp::Plain => "plain",
        }
        .to_owned(),
        tun_nowait: info.tun_nowait,
        buffer_bytes_wanted: info.buffer_bytes_wanted as u64,
        buffer_bytes: info.buffer_bytes as u64,
        buffers_registered: memory.registered.get() == 1,
    }
}

/// One connection, unless its worker has just closed it.
pub fn connection(workers: &Workers, member: Member) -> Option<Connection> {
    let reference = member.connection;
    let info = workers.connection(reference)?;
    let epoch = workers.infos().nth(usize::from(reference.worker))?.epoch;
    let socket = info.socket.upgrade()?;
    let peer = socket2::SockRef::from(&*socket).peer_addr().ok()?;
    let peer = peer.as_socket()?;
    let received = epoch + Duration::from_nanos(info.stats.received_at_nanos.get());
    Some(Connection {
        ordinal: member.ordinal,
        peer_address: SocketAddr::new(peer.ip().to_canonical(), peer.port()),
        worker: reference.worker,
        age_seconds: info.since.elapsed().as_secs_f64(),
        // Until the worker has taken it over, nothing was received.
        received_age_seconds: received.max(info.since).elapsed().as_secs_f64(),
        silent: member.silent,
        alpn: info.agreed.alpn.to_owned(),
        cipher_suite: info.agreed.cipher_suite.to_owned(),
        key_exchange: info.agreed.key_exchange.to_owned(),
        peer_offloads: info.offload.map(|offload| names(offload.accepts)),
        queue_packets: info.stats.queue_packets.get(),
        queue_bytes: info.stats.queue_bytes.get(),
        ahead_bytes: info.stats.ahead_bytes.get(),
        ahead_bytes_max: info.stats.ahead_bytes_max.get(),
        held: held(&info.stats.held),
        counters: info.stats.counters.read(),
        tcp: tcp_info(socket.as_fd()).ok()?,
    })
}

fn held(memory: &HeldMemory) -> status::Held {
    status::Held {
        chunks: memory.chunks.get(),
        packets: memory.packets.get(),
        medium_packets: memory.medium_packets.get(),
        small_packets: memory.small_packets.get(),
        control_bytes: memory.control_bytes.get(),
        outside_bytes: memory.outside_bytes.get(),
    }
}

fn names(offloads: Offloads) -> Vec<String> {
    let names = offloads.to_string();
    let names = names.split(';').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as Client;

    use super::super::runtime::Runtime;
    use super::*;
    use crate::status::examples;

    /// Enough for a client that does its part, and no test has to wait for long.
    const TEST_CLIENT_TIME: Duration = Duration::from_secs(1);

    /// A socket that is served, and the questions that arrive.
    fn socket() -> (tempfile::TempDir, std::path::PathBuf, Questions) {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("control.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        let questions = serve_within(listener.into(), TEST_CLIENT_TIME).expect("served");
        (directory, path, questions)
    }

    fn ask(path: &std::path::Path) -> String {
        let mut client = Client::connect(path).expect("connected");
        client.write_all(REQUEST).expect("written");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("read");
        answer
    }

    #[test]
    fn a_client_gets_one_document() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (_directory, path, mut questions) = socket();
            let client = std::thread::spawn(move || ask(&path));
            let report = examples::server(vec![examples::session("alice")]);
            questions
                .recv()
                .await
                .expect("a question")
                .answer(report.clone());
            while !client.is_finished() {
                tokio::task::yield_now().await;
            }
            let answer = client.join().expect("an answer");
            let read: Report = serde_json::from_str(&answer).expect("a report");
            assert_eq!(read, report);
        });
    }

    #[test]
    fn other_requests_get_nothing() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (_directory, path, _questions) = socket();
            for request in [&b"reload\n"[..], b"", b"status", b"\0\0\0\0\0\0\0\0\0\0\0"] {
                let path = path.clone();
                let client = std::thread::spawn(move || {
                    let mut client = Client::connect(path).expect("connected");
                    client.write_all(request).expect("written");
                    client.shutdown(std::net::Shutdown::Write).expect("shut");
                    let mut answer = Vec::new();
                    // A reset is as good: what was written was not read to its end.
                    let _ = client.read_to_end(&mut answer);
                    answer
                });
                while !client.is_finished() {
                    tokio::task::yield_now().await;
                }
                assert_eq!(client.join().expect("an end"), b"", "{request:?}");
            }
        });
    }

    #[test]
    fn clients_that_say_nothing_or_do_not_read_keep_others_waiting_for_a_while_only() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (_directory, path, mut questions) = socket();
            spawn(async move {
                while let Some(question) = questions.recv().await {
                    // More than a socket holds.
                    let sessions = (0..5000).map(|number| examples::session(&number.to_string()));
                    question.answer(examples::server(sessions.collect()));
                }
            });
            // Half of them are silent, the others want to know and do not listen.
            let idle: Vec<Client> = (0..CLIENTS_MAX)
                .map(|number| {
                    let mut client = Client::connect(&path).expect("connected");
                    if number % 2 == 0 {
                        client.write_all(REQUEST).expect("written");
                    }
                    client
                })
                .collect();
            let started = Instant::now();
            let client = std::thread::spawn(move || ask(&path));
            while !client.is_finished() {
                sleep(Duration::from_millis(10)).await;
            }
            let answer = client.join().expect("an answer");
            assert!(answer.ends_with("]}\n"));
            assert!(started.elapsed() >= TEST_CLIENT_TIME / 2, "it had to wait");
            assert!(started.elapsed() < 10 * TEST_CLIENT_TIME);
            drop(idle);
        });
    }
}
