//! The daemon's end of the socket to its keeper.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::request::{
    FROM_KEEPER_BYTES_MAX, FromKeeper, LEASES_PER_REQUEST_MAX, Notice, Reply, Request, SavedLease,
    Setup, TunnelSettings,
};
use crate::panics;
use crate::sys::fdpass::{Frame, FrameReader, FrameWriter};
use crate::sys::sandbox::{self, SandboxError};

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The keeper has ended; the daemon must end as well.
    #[error("the keeper process has ended")]
    KeeperGone,
    /// The keeper could not do it and says why.
    #[error("{0}")]
    Refused(String),
    /// The first frame was not a setup: the hidden subcommand was run by hand.
    #[error("`ringtun daemon` is started by `ringtun server` and `ringtun client` only")]
    NotADaemon,
    /// The privileges could not be given up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The socket or the process could not be prepared.
    #[error("cannot talk to the keeper process")]
    Socket(#[source] io::Error),
}

/// What a new daemon has in hands, before any runtime or thread exists.
#[derive(Debug)]
pub struct DaemonStart {
    /// What it is to do.
    pub setup: Setup,
    /// TUN queues, non-blocking.
    pub tun_queues: Vec<OwnedFd>,
    /// Listening sockets, in the order of the setup's `listeners`; none for a client.
    pub listeners: Vec<OwnedFd>,
    control: OwnedFd,
    socket: OwnedFd,
}

impl DaemonStart {
    /// Makes this process the daemon: takes the setup from standard input, which is the daemon's end of the pair, has
    /// `prepare` make what is better made with privileges, and gives them all up. To be done before any thread is made.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn enter<P>(prepare: impl FnOnce(&Setup) -> P) -> Result<(Self, P), LinkError> {
        let socket = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(LinkError::Socket)?;
        let null = File::open("/dev/null").map_err(LinkError::Socket)?;
        nix::unistd::dup2_stdin(null).map_err(|error| LinkError::Socket(error.into()))?;
        let start = Self::receive(socket)?;
        sandbox::raise_limits();
        let prepared = prepare(&start.setup);
        sandbox::enter()?;
        Ok((start, prepared))
    }

    /// Waits for the setup on `socket`, the daemon's end of the pair.
    ///
    /// # Errors
    /// [`LinkError::NotADaemon`] when something else arrives, or nothing.
    pub fn receive(socket: OwnedFd) -> Result<Self, LinkError> {
        let frame = FrameReader::new(FROM_KEEPER_BYTES_MAX)
            .receive(socket.as_fd())
            .ok()
            .flatten()
            .ok_or(LinkError::NotADaemon)?;
        let setup: Setup =
            serde_json::from_slice(&frame.body).map_err(|_| LinkError::NotADaemon)?;
        let (queues, listeners) = match &setup {
            Setup::Server(server) => (server.tun_queues, server.listeners.len()),
            Setup::Client(client) => (client.tun_queues, 0),
        };
        let mut tun_queues = frame.fds;
        let control = tun_queues.pop().ok_or(LinkError::NotADaemon)?;
        if tun_queues.len() != queues + listeners {
            return Err(LinkError::NotADaemon);
        }
        let listeners = tun_queues.split_off(queues);
        Ok(DaemonStart {
            setup,
            tun_queues,
            listeners,
            control,
            socket,
        })
    }

    /// Splits into the setup with its descriptors and the link. Call it within a tokio runtime: it spawns the task that
    /// reads and writes the socket.
    ///
    /// # Errors
    /// [`LinkError::Socket`] when the runtime cannot watch the socket.
    pub fn connect(self) -> Result<(Setup, SetupFds, Link, Notices), LinkError> {
        let (link, notices) = Link::new(self.socket)?;
        let fds = SetupFds {
            tun_queues: self.tun_queues,
            listeners: self.listeners,
            control: self.control,
        };
        Ok((self.setup, fds, link, notices))
    }
}

/// The descriptors that came with the setup.
#[derive(Debug)]
pub struct SetupFds {
    /// TUN queues, non-blocking.
    pub tun_queues: Vec<OwnedFd>,
    /// Listening sockets, in the order of the setup's `listeners`; none for a client.
    pub listeners: Vec<OwnedFd>,
    /// The listening control socket.
    pub control: OwnedFd,
}

/// Notices of the keeper. `recv` gives `None` when the keeper has ended: the daemon must then end at once.
pub type Notices = mpsc::UnboundedReceiver<Notice>;

/// Asks the keeper. Cheap to clone; requests are answered in order. A request whose future is dropped is still done.
#[derive(Clone, Debug)]
pub struct Link {
    requests: mpsc::UnboundedSender<Asked>,
    leases: mpsc::UnboundedSender<Unsaved>,
}

/// A lease, and who waits for it to be saved.
#[derive(Debug)]
struct Unsaved {
    lease: SavedLease,
    saved: oneshot::Sender<Result<(), LinkError>>,
}

#[derive(Debug)]
struct Asked {
    request: Request,
    answer: Answer,
}

type Answer = oneshot::Sender<(Reply, Vec<OwnedFd>)>;

impl Link {
    fn new(socket: OwnedFd) -> Result<(Self, Notices), LinkError> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true).map_err(LinkError::Socket)?;
        let socket = UnixStream::from_std(socket).map_err(LinkError::Socket)?;
        let (requests, asked) = mpsc::unbounded_channel();
        let (notify, notices) = mpsc::unbounded_channel();
        let carrying = async move {
            if let Err(error) = carry(&socket, asked, &notify).await {
                tracing::debug!("the link to the keeper: {error}");
            }
        };
        tokio::spawn(panics::essential("keeper link", carrying));
        let (leases, unsaved) = mpsc::unbounded_channel();
        let saving = save_leases(requests.clone(), unsaved);
        tokio::spawn(panics::essential("leases", saving));
        Ok((Link { requests, leases }, notices))
    }

    /// Says that the server's workers run and visitors are let in.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn ready(&self) -> Result<(), LinkError> {
        self.ask(Request::Ready).await.map(drop)
    }

    /// A tuned TCP socket for `server`, with the exception route made or refreshed. Blocking mode, not connected.
    ///
    /// # Errors
    /// See [`LinkError`]; [`LinkError::Refused`] when there is no way to the server now.
    pub async fn outer_socket(&self, server: IpAddr) -> Result<OwnedFd, LinkError> {
        let mut fds = self.ask(Request::OuterSocket { server }).await?;
        fds.pop()
            .ok_or_else(|| LinkError::Refused("the keeper sent no socket".into()))
    }

    /// Makes the client's host look as `settings` say.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn configure(&self, settings: TunnelSettings) -> Result<(), LinkError> {
        self.ask(Request::Configure(settings)).await.map(drop)
    }

    /// Has a peer's addresses remembered over restarts, together with those of others who come at the same time.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn save_lease(&self, lease: SavedLease) -> Result<(), LinkError> {
        let (saved, answer) = oneshot::channel();
        self.leases
            .send(Unsaved { lease, saved })
            .map_err(|_| LinkError::KeeperGone)?;
        answer.await.unwrap_or(Err(LinkError::KeeperGone))
    }

    /// Reports a final failure; the daemon should end right after.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn failed(&self, exit: u8, line: String) -> Result<(), LinkError> {
        self.ask(Request::Failed { exit, line }).await.map(drop)
    }

    async fn ask(&self, request: Request) -> Result<Vec<OwnedFd>, LinkError> {
        ask(&self.requests, request).await
    }
}

async fn ask(
    requests: &mpsc::UnboundedSender<Asked>,
    request: Request,
) -> Result<Vec<OwnedFd>, LinkError> {
    let (answer, answered) = oneshot::channel();
    requests
        .send(Asked { request, answer })
        .map_err(|_| LinkError::KeeperGone)?;
    match answered.await {
        Ok((Reply::Error(line), _)) => Err(LinkError::Refused(line)),
        Ok((Reply::Done | Reply::Socket, fds)) => Ok(fds),
        Err(_) => Err(LinkError::KeeperGone),
    }
}

/// Has leases saved. The keeper writes the whole list for every request, so whatever comes in while it does goes into
/// the next request together. Runs until the last [`Link`] is gone.
async fn save_leases(
    requests: mpsc::UnboundedSender<Asked>,
    mut unsaved: mpsc::UnboundedReceiver<Unsaved>,
) {
    let mut batch = Vec::new();
    while unsaved.recv_many(&mut batch, LEASES_PER_REQUEST_MAX).await > 0 {
        let leases = batch.iter().map(|unsaved| unsaved.lease.clone()).collect();
        let saved = ask(&requests, Request::SaveLeases(leases)).await;
        let alone = batch.len() == 1;
        for Unsaved { lease, saved: told } in batch.drain(..) {
            let saved = match &saved {
                Ok(_) => Ok(()),
                Err(LinkError::Refused(line)) if alone => Err(LinkError::Refused(line.clone())),
                // Somebody's lease cannot be saved, perhaps for having been revoked, and that is not the others' fault.
                Err(_) => ask(&requests, Request::SaveLeases(vec![lease]))
                    .await
                    .map(drop),
            };
            // Nobody waits any longer when the visitor has left.
            let _ = told.send(saved);
        }
    }
}

/// Runs until the keeper or the last [`Link`] is gone.
async fn carry(
    socket: &UnixStream,
    mut asked: mpsc::UnboundedReceiver<Asked>,
    notices: &mpsc::UnboundedSender<Notice>,
) -> io::Result<()> {
    let mut reader = FrameReader::new(FROM_KEEPER_BYTES_MAX);
    let mut unanswered: VecDeque<Answer> = VecDeque::new();
    loop {
        tokio::select! {
            frame = socket.async_io(Interest::READABLE, || reader.receive(socket.as_fd())) => {
                let Some(Frame { body, fds }) = frame? else {
                    return Ok(());
                };
                match serde_json::from_slice(&body)? {
                    FromKeeper::Reply(reply) => {
                        let answer = unanswered.pop_front().ok_or(io::ErrorKind::InvalidData)?;
                        // Nobody waits any longer when a request's future was dropped.
                        let _ = answer.send((reply, fds));
                    }
                    FromKeeper::Notice(notice) => {
                        // Nobody listens any longer when the daemon is about to end.
                        let _ = notices.send(notice);
                    }
                }
            }
            Some(Asked { request, answer }) = asked.recv() => {
                let mut frame = FrameWriter::new(&serde_json::to_vec(&request)?, Vec::new())?;
                socket.async_io(Interest::WRITABLE, || frame.send(socket.as_fd())).await?;
                unanswered.push_back(answer);
            }
        }
    }
}
