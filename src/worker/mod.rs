//! The packet path. One worker is one thread with one ring, one TUN queue and the connections given to it; it
//! shares nothing mutable with anyone.
//!
//! The way of a packet out (1 to 3: `outbound.rs` and `waiting.rs`, 4: `sealing.rs`, 5: `sending.rs`):
//! 1. the TUN queue becomes readable; a batch of non-blocking reads brings packets, each behind its `virtio_net_hdr`;
//! 2. the route table says which connection carries the flow; one that another worker owns is handed over;
//! 3. the packet waits in the connection's egress queue until the connection can take more;
//! 4. it becomes a DATAGRAM capsule and is sealed from where it lies into the connection's chunk of records; small packets
//!    share a record, and those of UDP that follow one another a capsule (`staging.rs`);
//! 5. the chunk is written to the socket.
//!
//! The way of a packet in (`inbound.rs`):
//! 1. ciphertext is read into a chunk;
//! 2. each whole record is opened from there into a packet buffer;
//! 3. capsules are cut out where they lie; the peer's `virtio_net_hdr` is validated, the inner source checked;
//! 4. the packet is written to the TUN queue from where it lies.

pub mod connection;
mod event_loop;
mod handover;
mod inbound;
mod latch;
mod memory;
mod outbound;
mod path;
mod peers;
mod sealing;
mod sending;
mod staging;
mod waiting;

use crate::proto::budget::PeerId;
use crate::proto::capsule::{Capsule, CloseReason};
use crate::proto::http::OffloadHeader;
use crate::proto::offload::Offloads;
use crate::proto::route_table::{ConnectionRef, RouteTable};
use crate::stats::{ConnectionStats, PacketMemory, WorkerCounters};
use crate::tls::AlertDescription;
use crate::tls::handshake::{Agreed, Established};
use crate::uring::buffer::Extent;
use crate::uring::probe::{RingError, SetUp};
use crate::uring::ring::{Bell, PreparedRing, Ring};
#[cfg(doc)]
use crate::{proto::send_limit::SendLimit, sys::congestion};
use connection::InnerSources;
use crossbeam_queue::{ArrayQueue, SegQueue};
use handover::Mailbox;
use slab::Slab;
use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long [`Workers::stop`] lets connections say goodbye.
pub const STOP_GRACE: Duration = Duration::from_millis(200);

/// Why a worker could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// No packet memory.
    #[error("cannot get {bytes} bytes of packet memory")]
    Memory {
        /// What was asked for.
        bytes: usize,
        /// What mmap or io_uring said.
        #[source]
        source: io::Error,
    },
    /// The TUN queue or a bell was refused.
    #[error("cannot give a file to io_uring")]
    File(#[source] io::Error),
    /// No thread.
    #[error("cannot start a worker thread")]
    Thread(#[source] io::Error),
    /// io_uring_enter failed.
    #[error("io_uring failed")]
    Enter(#[source] io::Error),
    /// The TUN queue is gone.
    #[error("the tunnel interface was taken away")]
    TunGone,
    /// The thread panicked: a bug.
    #[error("it panicked ({0}), which is a bug: please report it")]
    Panicked(String),
}

/// What one worker is given.
pub struct WorkerSetup {
    /// Its ring.
    pub ring: PreparedRing,
    /// Its queue of the TUN device, non-blocking, with a 10-byte `virtio_net_hdr`.
    pub tun: OwnedFd,
    /// What the device accepts on writes.
    pub tun_offloads: Offloads,
    /// Packet memory; see [`crate::uring::buffer::Pool`].
    pub buffer_bytes: usize,
    /// How much of it may be registered. If it is not even the smallest useful part, none is, and all is used.
    pub lockable_bytes: usize,
    /// Most bytes of packets that wait in one connection's egress queue, however much its path carries.
    pub queue_bytes_max: usize,
}

/// A connection on its way from control to a worker.
#[derive(Debug)]
pub struct Handoff {
    /// From [`Workers::allocate`].
    pub connection: ConnectionRef,
    /// Whose share of the worker it uses.
    pub peer: PeerId,
    /// The outer TCP socket, in blocking mode. Nobody else may hold it for long: it is closed when the worker is done.
    pub socket: Arc<OwnedFd>,
    /// The record layer, and what had been received beyond the handshake.
    pub established: Established,
    /// Which inner source addresses the peer may use.
    pub inner_sources: InnerSources,
    /// The negotiated offload context and what the *peer* accepts; `None` leaves context 0 only, and TCP's keepalive.
    pub offload: Option<OffloadHeader>,
    /// What the peer was told that we accept.
    pub accepts: Offloads,
    /// Whether its congestion control is chosen by what its path is like ([`congestion::bear_losses`]).
    pub follows_path: bool,
}

/// What a path turns out to be, by how many connections it wants.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum PathKind {
    /// One does, or nothing is known yet.
    Ordinary,
    /// One does, but it keeps a worker busy ([`SendLimit::is_fast`]): another is for flows that send little.
    Fast,
    /// More is under way than one connection holds ([`SendLimit::is_long_fat`]).
    LongFat,
    /// It loses packets ([`SendLimit::is_lossy`]).
    Lossy,
    /// And the congestion control slows down for each.
    Slowed,
}

/// Why a connection ended.
#[derive(Debug)]
pub enum CloseCause {
    /// Control asked for it.
    Asked,
    /// The peer ended it in order, by close_notify.
    PeerClosed,
    /// The stream ended without close_notify: the peer's process or host is gone, or somebody on the path ended it.
    Truncated,
    /// TCP was reset.
    Reset,
    /// The peer ended it by a fatal alert.
    Alerted(AlertDescription),
    /// The socket failed, or the record layer.
    Failed(io::Error),
    /// The peer broke the protocol.
    Misbehaved(String),
    /// The peer stayed silent for too long.
    TimedOut,
}

/// One capsule's place among those of its connection that wait for control; dropping it frees the place.
#[derive(Clone, Debug, Default)]
pub struct EventPermit(Arc<()>);

impl EventPermit {
    /// How many others there are.
    fn count(&self) -> usize {
        Arc::strong_count(&self.0) - 1
    }
}

/// What a worker tells control.
#[derive(Debug)]
pub enum Event {
    /// A capsule that is not the worker's business.
    Capsule {
        /// Where it came from.
        connection: ConnectionRef,
        /// The capsule.
        capsule: Capsule,
        /// To be kept until it has been dealt with: of each connection a few capsules wait at most.
        permit: EventPermit,
    },
    /// A keepalive stays unanswered: time to race a new connection.
    Unresponsive {
        /// The silent one.
        connection: ConnectionRef,
    },
    /// The end of that silence.
    Responsive {
        /// The one that is heard from again.
        connection: ConnectionRef,
    },
    /// The path has turned out to be worse than was known before.
    Path {
        /// Whose path.
        connection: ConnectionRef,
        /// What it has turned out to be.
        kind: PathKind,
    },
    /// The connection is gone; its reference may be released.
    Closed {
        /// Which.
        connection: ConnectionRef,
        /// Why.
        cause: CloseCause,
    },
    /// The worker stopped by an error.
    Fatal {
        /// Which.
        worker: usize,
        /// Why.
        error: WorkerError,
    },
}

/// What control tells a worker.
pub(crate) enum Command {
    Add(Box<Handoff>, Arc<ConnectionStats>),
    /// There are new routes: [`Inlet::routes`].
    Routes,
    Send(ConnectionRef, Vec<u8>),
    Close(ConnectionRef, Option<CloseReason>),
    Abort(ConnectionRef),
    /// All pages of the packet memory are there.
    Register,
    Stop(Option<CloseReason>),
}

/// The way into a worker from other threads.
pub(crate) struct Inlet {
    pub(crate) bell: Bell,
    pub(crate) commands: SegQueue<Command>,
    /// The newest routes, unless the worker has them: a table may be large, and older ones are of no use.
    pub(crate) routes: ArrayQueue<Arc<RouteTable>>,
    pub(crate) mailbox: Mailbox,
}

impl Inlet {
    fn tell(&self, command: Command) {
        self.commands.push(command);
        if let Err(error) = self.bell.ring() {
            tracing::error!("cannot wake a worker: {error}");
        }
    }
}

/// One worker, seen from control.
struct Handle {
    inlet: Arc<Inlet>,
    thread: JoinHandle<()>,
    slots: Slab<Place>,
    counters: Arc<WorkerCounters>,
    memory: Arc<PacketMemory>,
    info: WorkerInfo,
}

/// One connection's place on a worker.
struct Place {
    generation: u32,
    is_sparse: bool,
    /// None until the connection is added.
    info: Option<ConnectionInfo>,
}

/// What control knows of a connection that a worker has.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// When it was given to the worker.
    pub since: Instant,
    /// What the worker counts.
    pub stats: Arc<ConnectionStats>,
    /// What the TLS handshake agreed on.
    pub agreed: Agreed,
    /// What the peer accepts in which context.
    pub offload: Option<OffloadHeader>,
    /// The socket, unless the worker has closed it.
    pub socket: Weak<OwnedFd>,
}

/// What a worker found when it started.
#[derive(Clone, Copy, Debug)]
pub struct WorkerInfo {
    /// When its clock started; see [`ConnectionStats::received_at_nanos`].
    pub epoch: Instant,
    /// How the ring was set up.
    pub set_up: SetUp,
    /// Whether the TUN queue is read in batches that never wait (RWF_NOWAIT, Linux 6.4), and not packet by packet.
    pub tun_nowait: bool,
    /// Bytes of packet memory that it was to have.
    pub buffer_bytes_wanted: usize,
    /// Bytes of packet memory that it has; less than wanted where RLIMIT_MEMLOCK allowed no more to be registered.
    pub buffer_bytes: usize,
}

impl WorkerInfo {
    /// Whether nothing is in use that Linux 5.10 has not, by configuration or for want of anything better.
    pub fn is_baseline(&self) -> bool {
        self.set_up == SetUp::Plain && !self.tun_nowait
    }
}

impl fmt::Display for WorkerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let io = match self.set_up {
            SetUp::Deferred => "deferred",
            SetUp::Cooperative => "cooperative",
            SetUp::Plain if self.is_baseline() => "baseline",
            SetUp::Plain => "plain",
        };
        let reads = if self.tun_nowait {
            "in batches"
        } else {
            "in a chain"
        };
        write!(
            f,
            "io_uring {io}, TUN read {reads}, {} KiB of packet memory",
            self.buffer_bytes / 1024
        )
    }
}

/// What a worker would find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// How the ring was set up.
    pub set_up: SetUp,
    /// Bytes of packet memory.
    pub buffer_bytes: usize,
    /// Whether they are registered with the ring.
    pub buffers_registered: bool,
}

/// Starts a ring as a worker does, gets it packet memory (see [`WorkerSetup`]), and gives everything back.
///
/// # Errors
/// What would end a worker.
pub fn rehearse(
    ring: PreparedRing,
    buffer_bytes: usize,
    lockable_bytes: usize,
) -> Result<Rehearsal, WorkerError> {
    let mut ring = Ring::start(ring, 1)?;
    let (pool, buffers_registered) =
        memory::registered_memory(&mut ring, buffer_bytes, lockable_bytes, || ())?;
    let rehearsal = Rehearsal {
        set_up: ring.set_up(),
        buffer_bytes: pool.bytes(),
        buffers_registered,
    };
    drop(ring);
    pool.unmap();
    Ok(rehearsal)
}

/// All workers of the daemon.
pub struct Workers {
    workers: Vec<Handle>,
    next_generation: u32,
}

impl Workers {
    /// Starts one thread for each set-up.
    ///
    /// # Errors
    /// The first worker's error; the others are stopped.
    pub fn start(
        setups: Vec<WorkerSetup>,
        events: &tokio::sync::mpsc::UnboundedSender<Event>,
    ) -> Result<Self, WorkerError> {
        let inlets = setups
            .iter()
            .map(|_| {
                let bell = Bell::new().map_err(WorkerError::File)?;
                Ok(Arc::new(Inlet {
                    bell,
                    commands: SegQueue::new(),
                    routes: ArrayQueue::new(1),
                    mailbox: Mailbox::new(),
                }))
            })
            .collect::<Result<Arc<[_]>, WorkerError>>()?;
        let mut started = Self {
            workers: Vec::new(),
            next_generation: 1,
        };
        // All at once: if they wait for packet memory, that takes most of the time.
        let starting: Vec<_> = latch::Share::of(setups.len())
            .into_iter()
            .zip(setups)
            .enumerate()
            .map(|(index, (mapped, setup))| {
                Starting::new(index, setup, mapped, Arc::clone(&inlets), events.clone())
            })
            .collect();
        let mut failed = None;
        let mut unregistered = Vec::new();
        for worker in starting {
            match worker.and_then(Starting::finish) {
                Ok((handle, extent)) => {
                    unregistered.extend(extent.map(|extent| (extent, Arc::clone(&handle.inlet))));
                    started.workers.push(handle);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed.or_else(|| memory::populate(unregistered).err()) {
            None => Ok(started),
            Some(error) => {
                started.stop(None);
                Err(error)
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// What each found when it started.
    pub fn infos(&self) -> impl Iterator<Item = WorkerInfo> {
        self.workers.iter().map(|worker| worker.info)
    }

    /// The counters of each.
    pub fn counters(&self) -> impl Iterator<Item = &WorkerCounters> {
        self.workers.iter().map(|worker| &*worker.counters)
    }

    /// The packet memory of each.
    pub fn memory(&self) -> impl Iterator<Item = &PacketMemory> {
        self.workers.iter().map(|worker| &*worker.memory)
    }

    /// Reserves a place on the worker that has the fewest of the session's `others`, and of such workers on the one that has the
    /// fewest connections of the kind: those for sparse flows are little work.
    pub fn allocate(&mut self, others: &[ConnectionRef], is_sparse: bool) -> ConnectionRef {
        let others_on = |worker| {
            let is_there = |other: &&ConnectionRef| usize::from(other.worker) == worker;
            others.iter().filter(is_there).count()
        };
        let generation = self.next_generation;
        self.next_generation = self.next_generation.wrapping_add(1).max(1);
        let (worker, handle) = self
            .workers
            .iter_mut()
            .enumerate()
            .min_by_key(|(worker, handle)| {
                let alike = |(_, place): &(usize, &Place)| place.is_sparse == is_sparse;
                (
                    others_on(*worker),
                    handle.slots.iter().filter(alike).count(),
                )
            })
            .expect("there is at least one worker");
        ConnectionRef {
            worker: worker as u16,
            slot: handle.slots.insert(Place {
                generation,
                is_sparse,
                info: None,
            }) as u32,
            generation,
        }
    }

    /// Gives a connection to its worker.
    pub fn add(&mut self, handoff: Handoff) {
        let connection = handoff.connection;
        let stats = Arc::new(ConnectionStats::default());
        if let Some(place) = self.place(connection) {
            place.info = Some(ConnectionInfo {
                since: Instant::now(),
                stats: Arc::clone(&stats),
                agreed: handoff.established.agreed,
                offload: handoff.offload,
                socket: Arc::downgrade(&handoff.socket),
            });
        }
        self.tell(connection.worker, Command::Add(Box::new(handoff), stats));
    }

    /// What is known of a connection that was added and not yet released.
    pub fn connection(&self, connection: ConnectionRef) -> Option<&ConnectionInfo> {
        self.workers[connection.worker as usize]
            .slots
            .get(connection.slot as usize)
            .filter(|place| place.generation == connection.generation)?
            .info
            .as_ref()
    }

    fn place(&mut self, connection: ConnectionRef) -> Option<&mut Place> {
        self.workers[connection.worker as usize]
            .slots
            .get_mut(connection.slot as usize)
            .filter(|place| place.generation == connection.generation)
    }

    /// Replaces the routes of every worker.
    pub fn set_routes(&self, routes: Arc<RouteTable>) {
        for handle in &self.workers {
            // The worker had not taken the former ones; one command to take some is under way then.
            let is_new = handle
                .inlet
                .routes
                .force_push(Arc::clone(&routes))
                .is_none();
            if is_new {
                handle.inlet.tell(Command::Routes);
            }
        }
    }

    /// Sends encoded capsules, ahead of waiting packets.
    pub fn send(&self, connection: ConnectionRef, capsules: Vec<u8>) {
        self.tell(connection.worker, Command::Send(connection, capsules));
    }

    /// Ends a connection, with a CLOSE capsule if a reason is given. [`Event::Closed`] follows.
    pub fn close(&self, connection: ConnectionRef, reason: Option<CloseReason>) {
        self.tell(connection.worker, Command::Close(connection, reason));
    }

    /// Ends a connection without a word, at once. [`Event::Closed`] follows.
    pub fn abort(&self, connection: ConnectionRef) {
        self.tell(connection.worker, Command::Abort(connection));
    }

    /// Frees the place of a connection that was never added or that [`Event::Closed`] named.
    pub fn release(&mut self, connection: ConnectionRef) {
        if self.place(connection).is_some() {
            self.workers[connection.worker as usize]
                .slots
                .remove(connection.slot as usize);
        }
    }

    /// Ends all connections and threads; returns after [`STOP_GRACE`] and a little at the latest.
    pub fn stop(self, reason: Option<CloseReason>) {
        for worker in 0..self.workers.len() {
            self.tell(worker as u16, Command::Stop(reason));
        }
        for handle in self.workers {
            // A worker that panicked has already printed why.
            let _ = handle.thread.join();
        }
    }

    fn tell(&self, worker: u16, command: Command) {
        self.workers[worker as usize].inlet.tell(command);
    }
}

/// A worker that has not said yet what it found.
struct Starting {
    inlet: Arc<Inlet>,
    thread: JoinHandle<()>,
    counters: Arc<WorkerCounters>,
    report: mpsc::Receiver<Result<Started, WorkerError>>,
}

/// What it found, and has.
struct Started {
    info: WorkerInfo,
    memory: Arc<PacketMemory>,
    /// What of that is to be registered later.
    unregistered: Option<Extent>,
}

/// Runs a worker to its end. An error or a panic is told to control, which ends the daemon: connections of a worker that is
/// gone would be accepted and carry nothing.
fn supervise(
    index: usize,
    events: &tokio::sync::mpsc::UnboundedSender<Event>,
    run: impl FnOnce() -> Result<(), WorkerError>,
) {
    // Nothing of the worker is used after a panic: what it shares with others are counters and queues without locks.
    let ended = catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(WorkerError::Panicked(panic_message(&*panic))));
    if let Err(error) = ended {
        // Control drops the receiver only when the process ends.
        let _ = events.send(Event::Fatal {
            worker: index,
            error,
        });
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

impl Starting {
    fn new(
        index: usize,
        setup: WorkerSetup,
        mapped: latch::Share,
        inlets: Arc<[Arc<Inlet>]>,
        events: tokio::sync::mpsc::UnboundedSender<Event>,
    ) -> Result<Self, WorkerError> {
        let counters = Arc::new(WorkerCounters::default());
        let inlet = Arc::clone(&inlets[index]);
        let (sender, report) = mpsc::sync_channel(1);
        let thread_counters = Arc::clone(&counters);
        let thread = std::thread::Builder::new()
            .name(format!("ringtun-w{index}"))
            .spawn(move || {
                // The ring belongs to the thread that makes it (SINGLE_ISSUER).
                let worker = event_loop::Worker::new(
                    index,
                    setup,
                    mapped,
                    inlets,
                    events.clone(),
                    thread_counters,
                );
                match worker {
                    Ok(mut worker) => {
                        let _ = sender.send(Ok(worker.started()));
                        supervise(index, &events, || worker.run());
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error));
                    }
                }
            })
            .map_err(WorkerError::Thread)?;
        Ok(Self {
            inlet,
            thread,
            counters,
            report,
        })
    }

    fn finish(self) -> Result<(Handle, Option<Extent>), WorkerError> {
        let started = self.report.recv().unwrap_or_else(|_| {
            Err(WorkerError::Thread(io::Error::other(
                "the thread ended at once",
            )))
        })?;
        let handle = Handle {
            inlet: self.inlet,
            thread: self.thread,
            slots: Slab::new(),
            counters: self.counters,
            memory: started.memory,
            info: started.info,
        };
        Ok((handle, started.unregistered))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_panics_is_reported_to_control() {
        let (events, mut reported) = tokio::sync::mpsc::unbounded_channel();
        let thread = std::thread::spawn(move || {
            supervise(1, &events, || panic!("slot {} was released twice", 7));
            supervise(2, &events, || Err(WorkerError::TunGone));
            supervise(3, &events, || Ok(()));
        });
        thread.join().expect("the panic goes no further");
        let fatal = |event: Option<Event>| match event {
            Some(Event::Fatal { worker, error }) => (worker, error.to_string()),
            other => panic!("{other:?}"),
        };
        let (worker, error) = fatal(reported.blocking_recv());
        assert_eq!(worker, 1);
        assert!(error.contains("slot 7 was released twice"), "{error}");
        assert_eq!(fatal(reported.blocking_recv()).0, 2);
        assert!(
            reported.blocking_recv().is_none(),
            "a proper end is no news"
        );
    }
}
