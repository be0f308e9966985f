//! The turn of a worker: reap everything, act on it, submit once.

use super::connection::{
    Clock, Connection, Due, EventPermits, FLUSH_WITHIN, Farewell, Life, PARK_AFTER,
    REPLACED_WITHIN, Receive,
};
use super::latch::Share;
use super::path::Path;
use super::peers::Peers;
use super::staging::Staging;
use super::{
    CloseCause, Command, Event, Handoff, Inlet, STOP_GRACE, Started, WorkerError, WorkerInfo,
    WorkerSetup, memory,
};
use crate::proto::budget::CONTROL_BYTES_MAX;
use crate::proto::capsule::{Capsule, CloseReason};
use crate::proto::deframer::Deframer;
use crate::proto::egress_queue::EgressQueue;
use crate::proto::offload::Offloads;
use crate::proto::route_table::{ConnectionRef, RouteTable};
use crate::proto::sparse_flows::SparseFlows;
use crate::proto::timer::Instant;
use crate::stats::{ConnectionStats, PacketMemory, WorkerCounters};
use crate::uring::buffer::{Buffer, Class, Extent, InFlight, Piece, Pool};
use crate::uring::ring::{Completion, FileSlot, Ring, WhenDry};
use crate::uring::token::{Operation, Token};
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use slab::Slab;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Registered files at most; the table is smaller when RLIMIT_NOFILE is.
const FILES_MAX: u64 = 16 * 1024;
/// The housekeeping period.
const TICK: Duration = Duration::from_millis(500);
/// The period while stopping.
const TICK_STOPPING: Duration = Duration::from_millis(20);

/// Packet slots that are left to those who need one for this turn only.
pub(super) const PACKETS_LEFT_MIN: usize = 5;

/// Slot of the worker's own bell.
pub(super) const BELL: FileSlot = FileSlot(0);
/// Slot of the TUN queue.
pub(super) const TUN: FileSlot = FileSlot(1);
/// Slot of the first worker's bell.
const FIRST_PEER: u32 = 2;

/// How the reading of the TUN queue stands.
pub(super) struct TunQueue {
    /// Keeps the queue attached; the ring uses its registered slot.
    _fd: OwnedFd,
    pub(super) offloads: Offloads,
    /// Reads in the kernel, by slot.
    pub(super) reads: Slab<InFlight>,
    /// Packets in the kernel, by slot.
    pub(super) writes: Slab<Piece>,
    pub(super) polling: bool,
    /// The last batch found the queue dry.
    pub(super) dry: bool,
    /// Reads in the next batch.
    pub(super) batch: usize,
    /// Packets that the present batch brought.
    pub(super) yielded: usize,
    /// Reads and writes are to fail rather than wait in the kernel.
    pub(super) nowait: bool,
}

impl TunQueue {
    pub(super) fn when_dry(&self) -> WhenDry {
        if self.nowait {
            WhenDry::Fail
        } else {
            WhenDry::Wait
        }
    }
}

/// One worker. The methods on the packet path are in the files that [`super`] names.
pub(super) struct Worker {
    pub(super) index: usize,
    pub(super) ring: Ring,
    pub(super) pool: Pool,
    pub(super) tun: TunQueue,
    /// By control's slot numbers.
    pub(super) connections: Vec<Option<Box<Connection>>>,
    pub(super) routes: Arc<RouteTable>,
    pub(super) sparse_flows: SparseFlows,
    pub(super) inlets: Arc<[Arc<Inlet>]>,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) queue_bytes_max: usize,
    /// Connections with something to seal or send.
    pub(super) dirty: Vec<usize>,
    /// Connections that wait for packet or chunk memory, each once ([`Connection::starved`]).
    pub(super) starved: VecDeque<usize>,
    /// Connections whose records are put off, since their peers have caused enough work for now.
    pub(super) deferred: VecDeque<usize>,
    /// The timer for going on with those has fired in this turn, and whether it runs.
    resumes: bool,
    resume_armed: bool,
    pub(super) peers: Peers,
    /// Chunks that are held for receiving; all others in use are for sending.
    receiving_chunks: usize,
    /// Small packets of one connection on their way into one record.
    pub(super) staging: Staging,
    /// Where this turn's packets of context 0 get their headers.
    pub(super) framing: Option<Buffer>,
    /// Segments made in software.
    pub(super) scratch: Vec<u8>,
    pub(super) now: Instant,
    epoch: std::time::Instant,
    events: tokio::sync::mpsc::UnboundedSender<Event>,
    buffer_bytes_wanted: usize,
    /// Packet memory that is to be registered when its pages are there.
    unregistered: Option<Extent>,
    shown_memory: Arc<PacketMemory>,
    stopping: Option<Instant>,
}

impl Worker {
    pub(super) fn new(
        index: usize,
        setup: WorkerSetup,
        mapped: Share,
        inlets: Arc<[Arc<Inlet>]>,
        events: tokio::sync::mpsc::UnboundedSender<Event>,
        counters: Arc<WorkerCounters>,
    ) -> Result<Self, WorkerError> {
        let files = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_or(1024, |(soft, _)| soft)
            .min(FILES_MAX);
        let mut ring = Ring::start(setup.ring, files as u32)?;
        let memory =
            memory::packet_memory(&mut ring, setup.buffer_bytes, setup.lockable_bytes, mapped)?;
        ring.register_file(BELL, inlets[index].bell.heard.as_fd())
            .map_err(WorkerError::File)?;
        ring.register_file(TUN, setup.tun.as_fd())
            .map_err(WorkerError::File)?;
        for (peer, inlet) in inlets.iter().enumerate() {
            ring.register_file(FileSlot(FIRST_PEER + peer as u32), inlet.bell.rope.as_fd())
                .map_err(WorkerError::File)?;
        }
        let nowait = ring.takes_nowait(TUN).map_err(WorkerError::Enter)?;
        Ok(Self {
            index,
            ring,
            pool: memory.pool,
            tun: TunQueue {
                _fd: setup.tun,
                offloads: setup.tun_offloads,
                reads: Slab::new(),
                writes: Slab::new(),
                polling: false,
                dry: true,
                batch: 1,
                yielded: 0,
                nowait,
            },
            connections: Vec::new(),
            routes: Arc::new(RouteTable::empty()),
            sparse_flows: SparseFlows::new(),
            inlets,
            counters,
            queue_bytes_max: setup.queue_bytes_max,
            dirty: Vec::new(),
            starved: VecDeque::new(),
            deferred: VecDeque::new(),
            resumes: false,
            resume_armed: false,
            peers: Peers::new(),
            receiving_chunks: 0,
            staging: Staging::new(),
            framing: None,
            scratch: vec![0; usize::from(u16::MAX)],
            now: Instant::from_nanos(0),
            epoch: std::time::Instant::now(),
            events,
            buffer_bytes_wanted: setup.buffer_bytes,
            unregistered: memory.unregistered,
            shown_memory: memory.shown,
            stopping: None,
        })
    }

    /// What control is to know. Packet memory that is not registered is only told of once.
    pub(super) fn started(&mut self) -> Started {
        let info = WorkerInfo {
            epoch: self.epoch,
            set_up: self.ring.set_up(),
            tun_nowait: self.tun.nowait,
            buffer_bytes_wanted: self.buffer_bytes_wanted,
            buffer_bytes: self.pool.bytes(),
        };
        Started {
            info,
            memory: Arc::clone(&self.shown_memory),
            unregistered: self.unregistered.take(),
        }
    }

    /// Works until told to stop.
    pub(super) fn run(&mut self) -> Result<(), WorkerError> {
        let mut completions = Vec::with_capacity(1024);
        self.ring.poll_input(BELL, Token::single(Operation::Wake));
        self.ring.tick(TICK, Token::single(Operation::Tick));
        self.read_tun();
        while !self.is_done() {
            self.ring
                .submit_and_reap(&mut completions)
                .map_err(WorkerError::Enter)?;
            self.now = Instant::from_nanos(self.epoch.elapsed().as_nanos() as u64);
            self.counters.turns.add(1);
            self.on_completions(&mut completions)?;
            if std::mem::take(&mut self.resumes) {
                self.resume_deferred();
            }
            self.feed_starved();
            self.release_framing();
            self.pump_dirty();
            self.reclaim();
            self.read_tun();
        }
        Ok(())
    }

    /// What control had said before a packet came is done before the packet is looked at.
    pub(super) fn on_completions(
        &mut self,
        completions: &mut Vec<Completion>,
    ) -> Result<(), WorkerError> {
        self.obey();
        for completion in completions.drain(..) {
            self.on_completion(completion)?;
        }
        Ok(())
    }

    fn on_completion(&mut self, completion: Completion) -> Result<(), WorkerError> {
        match completion.token.operation {
            Operation::TunPoll => {
                self.tun.polling = false;
                self.tun.dry = false;
            }
            Operation::TunRead => self.on_tun_read(completion)?,
            Operation::TunWrite => self.on_tun_written(completion),
            Operation::Wake => self.ring.silence(BELL, Token::single(Operation::Silence)),
            Operation::Silence => {
                self.on_wake();
                self.ring.poll_input(BELL, Token::single(Operation::Wake));
            }
            Operation::Tick => self.on_tick(),
            Operation::Resume => {
                self.resumes = true;
                self.resume_armed = false;
            }
            Operation::WakePeer => {}
            Operation::ConnectionPoll
            | Operation::ConnectionRead
            | Operation::ConnectionWrite
            | Operation::ConnectionWritable
            | Operation::ConnectionPause
            | Operation::Cancel => self.on_connection_completion(completion),
        }
        Ok(())
    }

    /// A connection outlives its operations (`Life::Draining`), so its slot is always its own here.
    fn on_connection_completion(&mut self, completion: Completion) {
        let slot = completion.token.slot as usize;
        let connection = self
            .connections
            .get_mut(slot)
            .and_then(Option::as_deref_mut)
            .filter(|connection| completion.token.is_of(connection.reference.generation));
        let Some(connection) = connection else {
            tracing::error!("a completion for a connection that is gone: {completion:?}");
            return;
        };
        connection.in_flight -= 1;
        match completion.token.operation {
            Operation::ConnectionPoll => self.on_readable(slot),
            Operation::ConnectionRead => self.on_received(slot, completion),
            Operation::ConnectionWrite => self.on_sent(slot, completion),
            Operation::ConnectionWritable => self.on_writable(slot),
            Operation::ConnectionPause => self.on_paused(slot),
            _ => {
                if let Some(connection) = self.connection(slot) {
                    connection.parking = false;
                }
            }
        }
        self.finish_if_drained(slot);
    }

    /// The connection in `slot`, whatever its life.
    pub(super) fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.connections
            .get_mut(slot)
            .and_then(Option::as_deref_mut)
    }

    /// Takes the connection out of its slot, so that it and the worker can be used side by side. Every caller puts
    /// it back by [`Worker::put_back`].
    pub(super) fn take_out(&mut self, slot: usize) -> Option<Box<Connection>> {
        self.connections.get_mut(slot).and_then(Option::take)
    }

    pub(super) fn put_back(&mut self, slot: usize, connection: Box<Connection>) {
        self.connections[slot] = Some(connection);
    }

    /// The slot of a connection that is there and open.
    pub(super) fn slot_of(&mut self, reference: ConnectionRef) -> Option<usize> {
        let slot = reference.slot as usize;
        self.connection(slot)
            .is_some_and(|connection| {
                connection.reference.generation == reference.generation && connection.is_open()
            })
            .then_some(slot)
    }

    /// The slot of a connection that is there, closing or not.
    fn slot_of_any(&mut self, reference: ConnectionRef) -> Option<usize> {
        let slot = reference.slot as usize;
        self.connection(slot)
            .is_some_and(|connection| connection.reference.generation == reference.generation)
            .then_some(slot)
    }

    /// The slot that wakes worker `index`.
    pub(super) fn peer_bell(index: u16) -> FileSlot {
        FileSlot(FIRST_PEER + u32::from(index))
    }

    /// Whether memory of a class is so short that whoever may have to wait gives it back.
    pub(super) fn is_short_of(&self, class: Class) -> bool {
        self.pool.free(class) < self.short_below(class)
    }

    pub(super) fn short_below(&self, class: Class) -> usize {
        let slots = self.pool.slots(class);
        match class {
            Class::Chunk => slots / 3,
            Class::Packet => (slots / 4).max(PACKETS_LEFT_MIN),
            Class::Medium | Class::Small => slots / 4,
        }
    }

    /// Has the worker go on with records that are put off after [`PAUSE`](crate::uring::ring::PAUSE).
    pub(super) fn resume_later(&mut self) {
        if !self.resume_armed {
            self.resume_armed = true;
            self.ring.pause(Token::single(Operation::Resume));
        }
    }

    /// A chunk to receive into, if the connection's peer may have one. One chunk stays for sending.
    pub(super) fn take_receive_chunk(&mut self, connection: &Connection) -> Option<Buffer> {
        if self.receiving_chunks + 1 >= self.pool.slots(Class::Chunk) {
            self.peers.wants_reclaim = true;
            return None;
        }
        if !self.may_take(connection, Class::Chunk) {
            return None;
        }
        let chunk = self.pool.take(Class::Chunk)?;
        self.receiving_chunks += 1;
        Some(chunk)
    }

    pub(super) fn release_receive_chunk(&mut self, chunk: Buffer) {
        self.receiving_chunks -= 1;
        self.pool.release(chunk);
    }

    /// A chunk to send from, if the connection's peer may have one. One chunk stays for receiving.
    pub(super) fn take_send_chunk(&mut self, connection: &mut Connection) -> Option<Buffer> {
        let slots = self.pool.slots(Class::Chunk);
        let sending = slots - self.pool.free(Class::Chunk) - self.receiving_chunks;
        let chunk = if sending + 1 >= slots {
            self.peers.wants_reclaim = true;
            None
        } else if self.may_take(connection, Class::Chunk) {
            self.pool.take(Class::Chunk)
        } else {
            None
        };
        if chunk.is_none() {
            self.starve(connection);
        }
        chunk
    }

    /// Has the connection looked at again when there may be memory.
    pub(super) fn starve(&mut self, connection: &mut Connection) {
        if !connection.starved {
            connection.starved = true;
            self.starved.push_back(connection.reference.slot as usize);
        }
    }

    pub(super) fn tell_control(&self, event: Event) {
        // Control drops the receiver only when the process ends.
        let _ = self.events.send(event);
    }

    pub(super) fn mark_dirty(&mut self, slot: usize) {
        if let Some(connection) = self.connection(slot)
            && !connection.dirty
        {
            connection.dirty = true;
            self.dirty.push(slot);
        }
    }

    fn on_wake(&mut self) {
        let inlet = Arc::clone(&self.inlets[self.index]);
        inlet.mailbox.look();
        self.obey();
        while let Some(handover) = inlet.mailbox.take() {
            self.take_over(&handover);
            inlet.mailbox.give_back(handover);
        }
    }

    fn obey(&mut self) {
        let inlet = Arc::clone(&self.inlets[self.index]);
        while let Some(command) = inlet.commands.pop() {
            // Routes that control had made before it gave the command are in force before the command is.
            self.take_routes(&inlet);
            match command {
                Command::Add(handoff, stats) => self.add(*handoff, stats),
                Command::Routes => {}
                Command::Send(reference, capsules) => {
                    self.send_capsules(reference, &capsules);
                }
                Command::Close(reference, reason) => {
                    if let Some(slot) = self.slot_of(reference) {
                        self.close(slot, CloseCause::Asked, Farewell::because(reason));
                    }
                }
                Command::Abort(reference) => {
                    if let Some(slot) = self.slot_of_any(reference) {
                        self.close(slot, CloseCause::Asked, Farewell::NONE);
                        self.shut(slot);
                    }
                }
                Command::Register => self.register_memory(),
                Command::Stop(reason) => self.stop(reason),
            }
        }
    }

    fn take_routes(&mut self, inlet: &Inlet) {
        if let Some(routes) = inlet.routes.pop() {
            self.routes = routes;
        }
    }

    /// Control answers a peer. A peer that does not read its answers gets no more of them.
    fn send_capsules(&mut self, reference: ConnectionRef, capsules: &[u8]) {
        let Some(slot) = self.slot_of(reference) else {
            return;
        };
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if connection.capsules.len() + capsules.len() > CONTROL_BYTES_MAX {
            connection.stats.counters.refused_answers.add(1);
            self.counters.refused_answers.add(1);
            return;
        }
        connection.capsules.extend_from_slice(capsules);
        self.mark_dirty(slot);
    }

    /// Without this the worker goes on with plain reads and writes.
    fn register_memory(&mut self) {
        match self.ring.register_pool(&self.pool) {
            Ok(is_registered) => memory::show_registered(&self.shown_memory, is_registered),
            Err(error) => tracing::warn!("packet memory cannot be registered: {error}"),
        }
    }

    fn add(&mut self, handoff: Handoff, stats: Arc<ConnectionStats>) {
        let reference = handoff.connection;
        let slot = reference.slot as usize;
        let file = FileSlot(FIRST_PEER + self.inlets.len() as u32 + reference.slot);
        if let Err(error) = self.ring.register_file(file, handoff.socket.as_fd()) {
            self.tell_control(Event::Closed {
                connection: reference,
                cause: CloseCause::Failed(error),
            });
            return;
        }
        stats.received_at_nanos.set(self.now.as_nanos());
        let peer = self.peers.join(handoff.peer, reference.slot, self.now);
        let mut connection = Connection {
            reference,
            peer,
            socket: handoff.socket,
            stats,
            file,
            records: handoff.established.records,
            inner_sources: handoff.inner_sources,
            offload: handoff.offload,
            accepts: handoff.accepts,
            life: Life::Open,
            clock: Clock::new(self.now),
            path: Path::new(handoff.follows_path),
            in_flight: 0,
            receive: Receive::Parked,
            parking: false,
            starved: false,
            deferred: false,
            productive: self.now,
            events: EventPermits::default(),
            deframer: Deframer::new(),
            plaintext: None,
            spilled_ciphertext: handoff.established.ciphertext,
            spilled_plaintext: handoff.established.plaintext,
            queue: EgressQueue::new(),
            capsules: Vec::new(),
            fill: None,
            sending: None,
            recalled: Vec::new(),
            awaits_room: false,
            pausing: false,
            dirty: false,
        };
        connection
            .path
            .look(connection.socket.as_fd(), self.now, false);
        if self.connections.len() <= slot {
            self.connections.resize_with(slot + 1, || None);
        }
        self.connections[slot] = Some(Box::new(connection));
        self.on_arrival(slot);
    }

    /// Begins the end of a connection: what is sealed, the reason and close_notify are flushed first.
    ///
    /// Where another connection has replaced it, nothing is to be lost: what waits goes there, and what is on its way may
    /// still arrive. After an outage it is what ends the waiting of senders inside, whose own clocks are far behind.
    pub(super) fn close(&mut self, slot: usize, cause: CloseCause, farewell: Farewell) {
        let Farewell { reason, alert } = farewell;
        let is_replaced = reason == Some(CloseReason::Replaced);
        let deadline = self.now
            + match is_replaced {
                true => REPLACED_WITHIN,
                false => FLUSH_WITHIN,
            };
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if !connection.is_open() {
            return;
        }
        if let Some(reason) = reason {
            Capsule::put_close(reason, &mut connection.capsules);
        }
        let flushable = match &cause {
            CloseCause::Asked
            | CloseCause::PeerClosed
            | CloseCause::Truncated
            | CloseCause::Misbehaved(_) => true,
            CloseCause::Failed(_) => alert.is_some(),
            CloseCause::Reset | CloseCause::Alerted(_) | CloseCause::TimedOut => false,
        };
        if matches!(cause, CloseCause::Misbehaved(_)) {
            self.counters.ended_misbehaved.add(1);
        }
        let Some(connection) = self.connection(slot) else {
            return;
        };
        connection.life = Life::Closing {
            cause,
            deadline,
            alert,
            said_goodbye: false,
            listens: is_replaced,
        };
        if is_replaced {
            self.send_elsewhere(slot);
        } else {
            let waiting = connection.queue.drain();
            for outgoing in waiting {
                self.pool.release(outgoing.buffer);
            }
        }
        if flushable {
            self.mark_dirty(slot);
        } else {
            self.shut(slot);
        }
    }

    /// The peer will send nothing more, or nothing that can be used.
    pub(super) fn peer_ended(&mut self, slot: usize, cause: CloseCause, farewell: Farewell) {
        match self.connection(slot).map(|connection| &mut connection.life) {
            Some(Life::Open) => self.close(slot, cause, farewell),
            Some(Life::Closing { listens, alert, .. }) => {
                *listens = false;
                *alert = alert.or(farewell.alert);
                self.mark_dirty(slot);
            }
            Some(Life::Draining { .. }) | None => {}
        }
    }

    /// Shuts the socket down, which makes the kernel complete whatever it holds of it.
    pub(super) fn shut(&mut self, slot: usize) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        match std::mem::replace(&mut connection.life, Life::Open) {
            Life::Closing { cause, .. } => {
                connection.life = Life::Draining { cause };
                // ENOTCONN: the peer was faster.
                let _ = shutdown(connection.socket.as_raw_fd(), Shutdown::Both);
            }
            life => connection.life = life,
        }
        self.finish_if_drained(slot);
    }

    fn finish_if_drained(&mut self, slot: usize) {
        let drained = self.connection(slot).is_some_and(|connection| {
            connection.in_flight == 0 && matches!(connection.life, Life::Draining { .. })
        });
        if !drained {
            return;
        }
        let Some(connection) = self.take_out(slot) else {
            return;
        };
        let connection = *connection;
        if let Err(error) = self.ring.unregister_file(connection.file) {
            tracing::warn!("cannot take a socket from io_uring: {error}");
        }
        self.peers.leave(connection.peer, connection.reference.slot);
        if let Receive::Stalled { chunk, .. } = connection.receive {
            self.release_receive_chunk(chunk);
        }
        for buffer in [connection.plaintext, connection.fill]
            .into_iter()
            .flatten()
        {
            self.pool.release(buffer);
        }
        // Control is told of the end when it is one.
        drop(connection.socket);
        if let Life::Draining { cause } = connection.life {
            self.tell_control(Event::Closed {
                connection: connection.reference,
                cause,
            });
        }
    }

    fn on_tick(&mut self) {
        let period = if self.stopping.is_some() {
            TICK_STOPPING
        } else {
            TICK
        };
        self.ring.tick(period, Token::single(Operation::Tick));
        for slot in 0..self.connections.len() {
            self.tick_connection(slot);
            self.keep_to_bounds(slot);
            if let Some(connection) = self.connection(slot) {
                connection.show_held();
            }
        }
        self.show_buffers();
    }

    fn show_buffers(&self) {
        let in_use = |class| (self.pool.slots(class) - self.pool.free(class)) as u64;
        let shown = &*self.shown_memory;
        shown.chunks.set(in_use(Class::Chunk));
        shown.packets.set(in_use(Class::Packet));
        shown.medium_packets.set(in_use(Class::Medium));
        shown.small_packets.set(in_use(Class::Small));
    }

    fn tick_connection(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        match &connection.life {
            Life::Open => {}
            Life::Closing { deadline, .. } => {
                if now >= *deadline {
                    self.shut(slot);
                } else {
                    self.free_memory_of(slot);
                }
                return;
            }
            Life::Draining { .. } => return,
        }
        connection.queue.release_memory(now);
        let reference = connection.reference;
        let received = &connection.stats.counters.received_stream_bytes;
        connection.path.on_received(now, received.get());
        // Nothing else may look while the path is away.
        connection.look_at_path(now);
        let turned = connection.path.has_turned();
        self.free_memory_of(slot);
        if let Some(kind) = turned {
            self.tell_control(Event::Path {
                connection: reference,
                kind,
            });
        }
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if connection.offload.is_none() {
            // A foreign client knows nothing of PING: TCP asks in its place (`socket::KEEPALIVE_AFTER`).
            return;
        }
        match connection.clock.due(now) {
            Due::Nothing => {}
            Due::Ping => {
                connection.add_ping(now);
                self.mark_dirty(slot);
            }
            Due::Report => self.tell_control(Event::Unresponsive {
                connection: reference,
            }),
            Due::GiveUp => self.close(slot, CloseCause::TimedOut, Farewell::NONE),
        }
        // Sealed by the pump of this very turn.
    }

    /// Takes back the memory of a connection that has not used it for a while.
    fn free_memory_of(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if now.since(connection.clock.received) >= PARK_AFTER {
            self.cancel_read(slot);
        }
        self.recall_if_stuck(slot);
    }

    fn stop(&mut self, reason: Option<CloseReason>) {
        self.stopping = Some(self.now + STOP_GRACE);
        for slot in 0..self.connections.len() {
            self.close(slot, CloseCause::Asked, Farewell::because(reason));
        }
        self.ring
            .tick(TICK_STOPPING, Token::single(Operation::Tick));
    }

    fn is_done(&self) -> bool {
        self.stopping.is_some_and(|deadline| {
            self.now >= deadline || self.connections.iter().all(Option::is_none)
        })
    }
}

/// Errors after which a socket is as good as closed by the peer.
pub(super) fn is_hang_up(error: Errno) -> bool {
    matches!(error, Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN)
}
