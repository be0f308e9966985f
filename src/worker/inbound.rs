//! TCP to TUN, in the order that a packet takes.

use super::connection::{Connection, Farewell, Life, Receive};
use super::event_loop::{TUN, Worker};
use super::{CloseCause, Event};
use crate::proto::budget::{CONTROL_BYTES_MAX, SEGMENTS_PER_UNIT, UNITS_PER_PACKET};
use crate::proto::capsule::{Capsule, CloseReason, kind};
use crate::proto::deframer::{CAPSULE_BYTES_MAX, Frame};
use crate::proto::flow_hash::flow_hash;
use crate::proto::offload::{self, Offloads, VIRTIO_NET_HDR_BYTES, VirtioNetHdr};
use crate::proto::packet;
use crate::tls::AlertDescription;
use crate::tls::record::{
    ContentType, RECORD_HEADER_BYTES, RECORD_PLAINTEXT_BYTES_MAX, RecordError, Signal, record_bytes,
};
use crate::uring::buffer::{Buffer, Class, PACKET_SLOT_BYTES, Piece};
use crate::uring::ring::{Completion, WhenDry};
use crate::uring::token::{Operation, Token};
use nix::errno::Errno;
use std::io;
use std::ops::Range;

/// Connections that wait for memory, or whose records are put off, that are looked at in one turn.
const RESUMED_MAX: usize = 64;
/// One opened record, with its content type and padding.
const OPENED_BYTES_MAX: usize = RECORD_PLAINTEXT_BYTES_MAX + 1;
/// Bytes of an ADDRESS_REQUEST that cost one unit of work.
const BYTES_PER_REQUEST_UNIT: usize = 32;
/// A packet buffer takes further records while no more than this of it is used by finished capsules.
const REUSE_BYTES_MAX: usize = 8000;

/// Pings stay unanswered while more than this waits to be sent.
const PONGS_BYTES_MAX: usize = 4096;

// An unfinished capsule that starts below the limit, and one more record, always fit.
const _: () = assert!(REUSE_BYTES_MAX + CAPSULE_BYTES_MAX + OPENED_BYTES_MAX <= PACKET_SLOT_BYTES);

/// Why a connection cannot go on.
enum Stop {
    /// The peer's close_notify.
    PeerClosed,
    /// The record layer: the peer's fatal alert, or a record that is not what TLS says.
    Record(RecordError),
    /// A capsule that is not what the protocol says.
    Capsule(String),
}

impl Stop {
    /// Why the connection ends, and how the peer is told.
    fn into_end(self) -> (CloseCause, Farewell) {
        let error = match self {
            Stop::PeerClosed => return (CloseCause::PeerClosed, Farewell::NONE),
            Stop::Capsule(what) => {
                let told = Farewell::because(Some(CloseReason::Misbehaved));
                return (CloseCause::Misbehaved(what), told);
            }
            Stop::Record(error) => error,
        };
        match (&error, error.alert()) {
            (RecordError::PeerAlert(alert), _) => (CloseCause::Alerted(*alert), Farewell::NONE),
            (_, Some(alert)) if alert != AlertDescription::InternalError => (
                CloseCause::Misbehaved(error.to_string()),
                Farewell::alert(alert),
            ),
            (_, alert) => (
                CloseCause::Failed(io::Error::other(error)),
                alert.map_or(Farewell::NONE, Farewell::alert),
            ),
        }
    }
}

/// What follows the processing of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// There is something to read.
    Read,
    /// There may be.
    ReadOrPark,
    /// The connection is idle.
    Park,
}

/// How far the processing of a chunk came.
enum Progress {
    /// Everything whole was processed; the rest starts here.
    Through(usize),
    /// Packet memory is short; the rest starts here.
    Stalled(usize),
    /// The peer has caused enough work for now; the rest starts here.
    Deferred(usize),
    Stop(Stop),
}

fn malformed(error: impl std::fmt::Display) -> Stop {
    Stop::Capsule(error.to_string())
}

impl Worker {
    /// A connection has just arrived: whatever came with the handshake is looked at first.
    pub(super) fn on_arrival(&mut self, slot: usize) {
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        let came_alone =
            connection.spilled_ciphertext.is_empty() && connection.spilled_plaintext.is_empty();
        if came_alone {
            self.poll_connection(&mut connection);
        }
        self.put_back(slot, connection);
        if !came_alone {
            self.on_readable(slot);
        }
    }

    /// An idle connection has something to read.
    pub(super) fn on_readable(&mut self, slot: usize) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if matches!(connection.life, Life::Draining { .. }) {
            return;
        }
        connection.receive = Receive::Parked;
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        let Some(mut chunk) = self.take_receive_chunk(&connection) else {
            self.starve(&mut connection);
            self.put_back(slot, connection);
            return;
        };
        if connection.spilled_ciphertext.len() > chunk.capacity() {
            self.release_receive_chunk(chunk);
            self.put_back(slot, connection);
            let cause = CloseCause::Misbehaved("too much came with the handshake".into());
            self.close(
                slot,
                cause,
                Farewell::because(Some(CloseReason::Misbehaved)),
            );
            return;
        }
        chunk.append(&std::mem::take(&mut connection.spilled_ciphertext));
        self.put_back(slot, connection);
        self.process(slot, chunk, 0, Next::Read);
    }

    /// Step 1: a parked read is over.
    pub(super) fn on_received(&mut self, slot: usize, completion: Completion) {
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        let receive = std::mem::replace(&mut connection.receive, Receive::Parked);
        let Receive::Reading(in_flight) = receive else {
            connection.receive = receive;
            return;
        };
        let mut chunk = in_flight.land(&completion);
        if matches!(connection.life, Life::Draining { .. }) {
            self.release_receive_chunk(chunk);
            return;
        }
        match completion.result() {
            Ok(0) => {
                self.release_receive_chunk(chunk);
                self.peer_ended(slot, CloseCause::Truncated, Farewell::NONE);
            }
            Ok(bytes) => {
                chunk.fill(bytes);
                let was_asked = connection.clock.pinged.is_some();
                let was_silent = connection.clock.on_received(now);
                let reference = connection.reference;
                connection.stats.received_at_nanos.set(now.as_nanos());
                let counters = &connection.stats.counters;
                counters.received_stream_bytes.add(bytes as u64);
                let peer = connection.peer;
                self.peers.note_active(peer);
                if was_silent {
                    self.tell_control(Event::Responsive {
                        connection: reference,
                    });
                }
                if was_asked {
                    self.mark_dirty(slot);
                    self.send_something(slot);
                }
                self.process(slot, chunk, 0, Next::ReadOrPark);
            }
            Err(Errno::ECANCELED) => self.process(slot, chunk, 0, Next::Park),
            Err(Errno::EINTR | Errno::EAGAIN) => self.process(slot, chunk, 0, Next::Read),
            Err(error) => {
                self.release_receive_chunk(chunk);
                self.fail(slot, error);
            }
        }
    }

    /// Gives a connection's memory back, keeps what is unfinished outside the pool, and waits for readiness only.
    fn park(&mut self, connection: &mut Connection, chunk: Buffer) {
        connection
            .spilled_ciphertext
            .extend_from_slice(chunk.bytes());
        self.release_receive_chunk(chunk);
        if let Some(plaintext) = connection.plaintext.take() {
            connection
                .spilled_plaintext
                .extend_from_slice(plaintext.bytes());
            self.pool.release(plaintext);
        }
        self.poll_connection(connection);
    }

    fn poll_connection(&mut self, connection: &mut Connection) {
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionPoll,
            reference.slot,
            reference.generation,
        );
        self.ring.poll_input(connection.file, token);
        connection.in_flight += 1;
        connection.receive = Receive::Polling;
    }

    /// Goes on where memory was short.
    pub(super) fn feed_starved(&mut self) {
        for _ in 0..self.starved.len().min(RESUMED_MAX) {
            let Some(slot) = self.starved.pop_front() else {
                return;
            };
            let Some(connection) = self.connection(slot) else {
                continue;
            };
            connection.starved = false;
            if !connection.deferred {
                self.resume(slot);
            }
            self.mark_dirty(slot);
        }
    }

    /// Goes on with records that were put off: of peers that may cause work again, and of one peer more if no other was
    /// active meanwhile. Not even then has such a peer all of the worker, as the processor may be busy with others.
    pub(super) fn resume_deferred(&mut self) {
        let now = self.now;
        let mut is_alone = !self.peers.take_contended();
        for _ in 0..self.deferred.len().min(RESUMED_MAX) {
            let Some(slot) = self.deferred.pop_front() else {
                return;
            };
            let connection = self.connections.get_mut(slot);
            let Some(connection) = connection.and_then(Option::as_deref_mut) else {
                continue;
            };
            let work = &mut self.peers.get_mut(connection.peer).work;
            work.refill(now);
            if work.is_spent() && std::mem::take(&mut is_alone) {
                work.fill(now);
            }
            if work.is_spent() {
                self.deferred.push_back(slot);
            } else {
                connection.deferred = false;
                self.resume(slot);
            }
        }
        if !self.deferred.is_empty() {
            self.resume_later();
        }
    }

    /// Goes on with a connection whose receiving side waits for the worker, and not for its peer.
    fn resume(&mut self, slot: usize) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        match std::mem::replace(&mut connection.receive, Receive::Parked) {
            Receive::Stalled { chunk, start } => {
                self.process(slot, chunk, start, Next::ReadOrPark);
            }
            Receive::Parked => self.on_readable(slot),
            receive => connection.receive = receive,
        }
    }

    /// Steps 2 to 4 for all whole records in the chunk, then what comes next.
    fn process(&mut self, slot: usize, mut chunk: Buffer, start: usize, next: Next) {
        let Some(mut connection) = self.take_out(slot) else {
            self.release_receive_chunk(chunk);
            return;
        };
        let packets = connection.stats.counters.received_packets.get();
        let progress = if connection.listens() {
            self.open_records(&mut connection, &chunk, start)
        } else {
            Progress::Through(chunk.filled()) // Nobody is interested any more.
        };
        let mut stop = None;
        match progress {
            Progress::Through(start) => {
                // Less than a record is left, so a full read always fits behind it.
                chunk.discard_front(start);
                let brought = connection.stats.counters.received_packets.get() - packets;
                if brought > 0 {
                    connection.clock.flowing = true;
                    connection.productive = self.now;
                }
                self.receive_more(&mut connection, chunk, next, brought);
            }
            Progress::Stalled(start) => {
                connection.receive = Receive::Stalled { chunk, start };
                self.starve(&mut connection);
            }
            Progress::Deferred(start) => {
                connection.receive = Receive::Stalled { chunk, start };
                self.defer(&mut connection);
            }
            Progress::Stop(reason) => {
                self.release_receive_chunk(chunk);
                stop = Some(reason);
            }
        }
        self.put_back(slot, connection);
        if let Some(stop) = stop {
            let (cause, farewell) = stop.into_end();
            self.peer_ended(slot, cause, farewell);
        }
    }

    /// Puts the rest of a connection's records off.
    fn defer(&mut self, connection: &mut Connection) {
        if !connection.deferred {
            connection.deferred = true;
            self.deferred.push_back(connection.reference.slot as usize);
            self.resume_later();
            self.counters.deferred.add(1);
            connection.stats.counters.deferred.add(1);
        }
    }

    /// Leaves a read in the kernel, or only polls while memory is short, or while nothing but keepalives comes: a crowd
    /// that idles holds no chunks that others could read with.
    ///
    /// Part of a record has to be copied to and fro when a connection is parked. So it stays in its chunk as long as others
    /// find one and the peer is within its share.
    fn receive_more(
        &mut self,
        connection: &mut Connection,
        chunk: Buffer,
        next: Next,
        brought_packets: u64,
    ) {
        let finished = |plaintext: &mut Buffer| plaintext.bytes().is_empty();
        if let Some(plaintext) = connection.plaintext.take_if(finished) {
            self.pool.release(plaintext);
        }
        let free = self.pool.free(Class::Chunk);
        let is_scarce = match chunk.filled() {
            0 => self.is_short_of(Class::Chunk),
            _ => free == 0,
        };
        let idle = brought_packets == 0 && chunk.filled() == 0 && connection.plaintext.is_none();
        let parks =
            next == Next::ReadOrPark && (is_scarce || idle || self.must_give_back(connection));
        if next == Next::Park || parks {
            self.park(connection, chunk);
            return;
        }
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionRead,
            reference.slot,
            reference.generation,
        );
        let range = chunk.filled()..chunk.capacity();
        connection.in_flight += 1;
        connection.receive =
            Receive::Reading(
                self.ring
                    .read(connection.file, chunk, range, WhenDry::Wait, token),
            );
    }

    /// Step 2: opens record after record into the packet buffer.
    fn open_records(
        &mut self,
        connection: &mut Connection,
        chunk: &Buffer,
        mut start: usize,
    ) -> Progress {
        if !connection.spilled_plaintext.is_empty() {
            let spilled = connection.spilled_plaintext.len();
            match self.plaintext_with_room(connection, spilled) {
                None => return Progress::Stalled(start),
                Some(mut plaintext) => {
                    plaintext.append(&std::mem::take(&mut connection.spilled_plaintext));
                    let delivered = self.deliver(connection, &mut plaintext);
                    connection.plaintext = Some(plaintext);
                    if let Err(stop) = delivered {
                        return Progress::Stop(stop);
                    }
                }
            }
        }
        self.peers.get_mut(connection.peer).work.refill(self.now);
        loop {
            let stream = &chunk.bytes()[start..];
            let record = match record_bytes(stream) {
                Ok(Some(bytes)) if bytes <= stream.len() => &stream[..bytes],
                Ok(_) => return Progress::Through(start),
                Err(error) => return Progress::Stop(Stop::Record(error)),
            };
            let work = &mut self.peers.get_mut(connection.peer).work;
            // A client has one peer, its server: there is nobody who would have to wait for it.
            if work.is_spent() && !connection.is_to_server() {
                return Progress::Deferred(start);
            }
            work.pay(record.len() as u32);
            work.spend(1);
            let opened_bytes_max = record.len() - RECORD_HEADER_BYTES;
            let Some(mut plaintext) = self.plaintext_with_room(connection, opened_bytes_max) else {
                return Progress::Stalled(start);
            };
            start += record.len();
            let outcome = self.open_record(connection, record, &mut plaintext);
            connection.plaintext = Some(plaintext);
            if let Err(stop) = outcome {
                return Progress::Stop(stop);
            }
        }
    }

    /// The connection's packet buffer with room for `bytes` more; an unfinished capsule moves into a fresh one if the
    /// present one is used up.
    fn plaintext_with_room(&mut self, connection: &mut Connection, bytes: usize) -> Option<Buffer> {
        match connection.plaintext.take() {
            None => self.take_plaintext(connection),
            Some(plaintext) if plaintext.bytes().is_empty() => {
                if plaintext.filled() <= REUSE_BYTES_MAX {
                    return Some(plaintext);
                }
                self.pool.release(plaintext);
                self.take_plaintext(connection)
            }
            Some(plaintext) if plaintext.room() >= bytes => Some(plaintext),
            Some(plaintext) => {
                let Some(mut fresh) = self.take_plaintext(connection) else {
                    connection.plaintext = Some(plaintext);
                    return None;
                };
                fresh.append(plaintext.bytes());
                self.pool.release(plaintext);
                Some(fresh)
            }
        }
    }

    fn take_plaintext(&mut self, connection: &Connection) -> Option<Buffer> {
        if self.may_take(connection, Class::Packet) {
            self.pool.take(Class::Packet)
        } else {
            None
        }
    }

    fn open_record(
        &mut self,
        connection: &mut Connection,
        record: &[u8],
        plaintext: &mut Buffer,
    ) -> Result<(), Stop> {
        let opened = connection
            .records
            .open(record, plaintext.tail_mut())
            .map_err(Stop::Record)?;
        if opened.content_type == ContentType::ApplicationData {
            plaintext.fill(opened.bytes);
            return self.deliver(connection, plaintext);
        }
        let body = &plaintext.tail_mut()[..opened.bytes];
        match connection
            .records
            .handle(opened.content_type, body)
            .map_err(Stop::Record)?
        {
            Signal::None => Ok(()),
            Signal::ReplyKeyUpdate => {
                self.wants_pump(connection);
                Ok(())
            }
            Signal::CloseNotify => Err(Stop::PeerClosed),
        }
    }

    /// The connection is taken out: its place in the list is found again by the pump.
    fn wants_pump(&mut self, connection: &mut Connection) {
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(connection.reference.slot as usize);
        }
    }

    /// Step 3: cuts capsules out of the packet buffer.
    fn deliver(&mut self, connection: &mut Connection, plaintext: &mut Buffer) -> Result<(), Stop> {
        loop {
            let oversized = connection.deframer.oversized_datagrams();
            let frame = connection.deframer.next(plaintext.bytes());
            let frame = frame.map_err(malformed)?;
            if frame == Frame::Incomplete {
                return Ok(());
            }
            self.peers.get_mut(connection.peer).work.spend(1);
            match frame {
                Frame::Incomplete => {}
                Frame::Datagram {
                    context,
                    payload,
                    end,
                } => self.deliver_datagram(connection, plaintext, context, payload, end),
                Frame::Control { kind, value, end } => {
                    if self.may_request(connection, kind, value.len()) {
                        let capsule =
                            Capsule::decode(kind, &plaintext.bytes()[value]).map_err(malformed)?;
                        self.on_capsule(connection, capsule);
                    }
                    self.pool.skip(plaintext, end);
                }
                Frame::Skipped { end } => {
                    self.pool.skip(plaintext, end);
                    let oversized = connection.deframer.oversized_datagrams() - oversized;
                    self.counters.dropped_unknown_context.add(oversized);
                    let counters = &connection.stats.counters;
                    counters.dropped_unknown_context.add(oversized);
                }
            }
        }
    }

    /// Whether a capsule is looked at. What the other role alone sends means nothing here. A request to control is not looked
    /// at where its answer would find no room anyway, so that nothing is spent on a peer that asks and does not listen.
    fn may_request(&mut self, connection: &Connection, kind: u64, bytes: usize) -> bool {
        let is_of_server = matches!(
            kind,
            kind::ADDRESS_ASSIGN | kind::ROUTE_ADVERTISEMENT | kind::DNS_ASSIGN
        );
        let from_server = connection.is_to_server();
        if kind != kind::ADDRESS_REQUEST {
            return from_server || !is_of_server;
        }
        if from_server {
            return false;
        }
        let work = &mut self.peers.get_mut(connection.peer).work;
        // A request is made into a value, handed to control, answered and sealed, entry by entry.
        work.spend((bytes / BYTES_PER_REQUEST_UNIT) as u32);
        if connection.capsules.len() + bytes <= CONTROL_BYTES_MAX {
            return true;
        }
        self.counters.refused_requests.add(1);
        connection.stats.counters.refused_requests.add(1);
        false
    }

    fn on_capsule(&mut self, connection: &mut Connection, capsule: Option<Capsule>) {
        match capsule {
            None => {}
            // Its successor is the one to talk to.
            Some(_) if !connection.is_open() => {}
            Some(Capsule::Pong(_)) => connection.clock.flowing = false,
            // A peer that asks faster than it reads gets no more answers for now.
            Some(Capsule::Ping(_)) if connection.capsules.len() > PONGS_BYTES_MAX => {
                self.counters.refused_pings.add(1);
                connection.stats.counters.refused_pings.add(1);
            }
            Some(Capsule::Ping(payload)) => {
                Capsule::put_pong(payload, &mut connection.capsules);
                self.wants_pump(connection);
            }
            Some(capsule) => match connection.events.take() {
                Some(permit) => self.tell_control(Event::Capsule {
                    connection: connection.reference,
                    capsule,
                    permit,
                }),
                None => {
                    self.counters.refused_requests.add(1);
                    connection.stats.counters.refused_requests.add(1);
                }
            },
        }
    }

    fn deliver_datagram(
        &mut self,
        connection: &Connection,
        plaintext: &mut Buffer,
        context: u64,
        payload: Range<usize>,
        end: usize,
    ) {
        let piece = if context == 0 {
            let piece = self.plain_packet(connection, &plaintext.bytes()[payload]);
            self.pool.skip(plaintext, end);
            piece
        } else if connection
            .offload
            .as_ref()
            .is_some_and(|offload| offload.context == context)
        {
            if self.check_offloaded(connection, &mut plaintext.bytes_mut()[payload.clone()]) {
                Some(self.pool.freeze(plaintext, end, payload))
            } else {
                self.pool.skip(plaintext, end);
                None
            }
        } else {
            self.counters.dropped_unknown_context.add(1);
            let counters = &connection.stats.counters;
            counters.dropped_unknown_context.add(1);
            self.pool.skip(plaintext, end);
            None
        };
        if let Some(piece) = piece {
            let bytes = piece.bytes().len() - VIRTIO_NET_HDR_BYTES;
            let counters = &connection.stats.counters;
            counters.received_packets.add(1);
            counters.received_bytes.add(bytes as u64);
            let units = UNITS_PER_PACKET + segments_in(piece.bytes()) / SEGMENTS_PER_UNIT;
            self.peers.get_mut(connection.peer).work.spend(units);
            self.count_received(&piece.bytes()[VIRTIO_NET_HDR_BYTES..]);
            self.write_tun(piece);
        }
    }

    /// What is received says, too, what a flow is like.
    fn count_received(&mut self, packet: &[u8]) {
        if !self.routes.has_sparse() {
            return;
        }
        let route = packet::source(packet).and_then(|source| self.routes.route(source));
        if route.is_some_and(|route| route.sparse().is_some()) {
            self.sparse_flows
                .receives(self.now, flow_hash(packet), packet.len());
        }
    }

    /// A packet of the offload context: validates and normalises the header where it lies.
    fn check_offloaded(&self, connection: &Connection, payload: &mut [u8]) -> bool {
        let counters = &connection.stats.counters;
        let Some((header, packet)) = payload.split_first_chunk_mut::<VIRTIO_NET_HDR_BYTES>() else {
            self.counters.dropped_invalid.add(1);
            counters.dropped_invalid.add(1);
            return false;
        };
        match offload::validate(VirtioNetHdr::read(header), packet, connection.accepts) {
            Err(_) => {
                self.counters.dropped_invalid.add(1);
                counters.dropped_invalid.add(1);
                false
            }
            Ok(_) if !connection.inner_sources.allow(packet) => {
                self.counters.dropped_spoofed.add(1);
                counters.dropped_spoofed.add(1);
                false
            }
            Ok(normalised) => {
                *header = normalised.to_bytes();
                true
            }
        }
    }

    /// A packet of context 0 gets an empty header in front.
    fn plain_packet(&mut self, connection: &Connection, packet: &[u8]) -> Option<Piece> {
        let counters = &connection.stats.counters;
        if packet::parse(packet).is_err() {
            self.counters.dropped_invalid.add(1);
            counters.dropped_invalid.add(1);
            return None;
        }
        if !connection.inner_sources.allow(packet) {
            self.counters.dropped_spoofed.add(1);
            counters.dropped_spoofed.add(1);
            return None;
        }
        self.framed(VirtioNetHdr::PLAIN, packet)
    }

    /// Header and packet behind one another, in memory that all such packets of a turn share.
    fn framed(&mut self, header: VirtioNetHdr, packet: &[u8]) -> Option<Piece> {
        let bytes = VIRTIO_NET_HDR_BYTES + packet.len();
        if matches!(&self.framing, Some(buffer) if buffer.room() < bytes) {
            self.release_framing();
        }
        let Some(mut buffer) = self
            .framing
            .take()
            .or_else(|| self.pool.take(Class::Packet))
        else {
            self.counters.dropped_tun_refused.add(1);
            return None;
        };
        buffer.append(&header.to_bytes());
        buffer.append(packet);
        let piece = self.pool.freeze(&mut buffer, bytes, 0..bytes);
        self.framing = Some(buffer);
        Some(piece)
    }

    pub(super) fn release_framing(&mut self) {
        if let Some(buffer) = self.framing.take() {
            self.pool.release(buffer);
        }
    }

    /// Step 4: writes the packet to the TUN queue. A full queue drops it: a write that waited would be overtaken.
    fn write_tun(&mut self, piece: Piece) {
        let when_full = self.tun.when_dry();
        let entry = self.tun.writes.vacant_entry();
        let token = Token::new(Operation::TunWrite, entry.key() as u32, 0);
        self.ring.write_piece(TUN, &piece, when_full, token);
        entry.insert(piece);
    }

    pub(super) fn on_tun_written(&mut self, completion: Completion) {
        let piece = self.tun.writes.remove(completion.token.slot as usize);
        match completion.result() {
            Ok(bytes) => {
                self.counters.tun_written_packets.add(1);
                self.counters
                    .tun_written_bytes
                    .add(bytes.saturating_sub(VIRTIO_NET_HDR_BYTES) as u64);
            }
            Err(Errno::EINVAL) => self.segment_refused(&piece),
            Err(_) => self.counters.dropped_tun_refused.add(1),
        }
        self.pool.release_piece(piece);
    }

    /// Some kernels refuse valid super-packets: they are segmented here and written once more.
    fn segment_refused(&mut self, piece: &Piece) {
        let bytes = piece.bytes();
        let header = bytes
            .first_chunk::<VIRTIO_NET_HDR_BYTES>()
            .map(VirtioNetHdr::read);
        let Some(header) = header.filter(|header| header.gso_size != 0) else {
            self.counters.dropped_tun_refused.add(1);
            return;
        };
        let packet = &bytes[VIRTIO_NET_HDR_BYTES..];
        let mut scratch = std::mem::take(&mut self.scratch);
        let accepts = Offloads {
            csum: self.tun.offloads.csum,
            ..Offloads::NONE
        };
        let segmented =
            offload::segment(header, packet, accepts, &mut scratch, |header, segment| {
                if let Some(piece) = self.framed(header, segment) {
                    self.write_tun(piece);
                }
            });
        self.scratch = scratch;
        match segmented {
            Ok(_) => self.counters.segmented_after_refusal.add(1),
            Err(_) => self.counters.dropped_tun_refused.add(1),
        }
    }
}

/// Segments that the kernel may have to cut a packet into. `framed` is a validated `virtio_net_hdr` and the packet.
fn segments_in(framed: &[u8]) -> u32 {
    let header = framed.first_chunk::<VIRTIO_NET_HDR_BYTES>();
    match header.map(|header| VirtioNetHdr::read(header).gso_size) {
        None | Some(0) => 0,
        Some(size) => (framed.len() as u32).div_ceil(u32::from(size)),
    }
}
