//! TUN to TCP, in the order that a packet takes.

use super::connection::{Connection, Life, PARK_AFTER, Sending};
use super::event_loop::{TUN, Worker, is_hang_up};
use super::handover::{Handover, Posted};
use super::staging::Staging;
use super::waiting::Outgoing;
use super::{CloseCause, WorkerError};
use crate::proto::capsule::{DATAGRAM_HEADER_BYTES_MAX, datagram_header};
use crate::proto::flow_hash::flow_hash;
use crate::proto::offload::{self, Datagram, Fit, Offloads, VIRTIO_NET_HDR_BYTES, VirtioNetHdr};
use crate::proto::packet::{self, PROTOCOL_TCP};
use crate::proto::route_table::ConnectionRef;
use crate::proto::sparse_flows::Kind;
use crate::stats::ConnectionCounters;
use crate::tls::record::{
    CONTROL_RECORD_BYTES_MAX, ContentType, RECORD_OVERHEAD_BYTES, RECORD_PLAINTEXT_BYTES_MAX,
    RecordError, RecordLayer,
};
use crate::uring::buffer::{Buffer, Class, HEADROOM_BYTES, MEDIUM_SLOT_BYTES, SMALL_SLOT_BYTES};
use crate::uring::ring::Completion;
use crate::uring::token::{Operation, Token};
use nix::errno::Errno;
use std::io;
use std::os::fd::AsFd;

/// Reads of the TUN queue that are submitted at once.
const TUN_BATCH_MAX: usize = 8;
/// What one read may bring: the header and the largest IP packet.
const TUN_READ_BYTES: usize = VIRTIO_NET_HDR_BYTES + 65535;
/// Packet slots that reading the TUN queue leaves to the inbound side.
const INBOUND_RESERVE_SLOTS: usize = 4;
/// Capsules up to this size share records by copy; larger ones are sealed from where they lie.
const COALESCE_BYTES_MAX: usize = 2048;
/// Headers of one segment at most, for the estimate of what a super-packet grows to.
const SEGMENT_HEADERS_BYTES: usize = 128;

const _: () = assert!(HEADROOM_BYTES >= DATAGRAM_HEADER_BYTES_MAX);
const _: () = assert!(COALESCE_BYTES_MAX <= RECORD_PLAINTEXT_BYTES_MAX);

/// Bytes that `plaintext` bytes become when they are sealed, staging included.
const fn sealed_bytes_max(plaintext: usize) -> usize {
    plaintext + (plaintext / RECORD_PLAINTEXT_BYTES_MAX + 2) * RECORD_OVERHEAD_BYTES
}

impl Worker {
    /// Step 1: asks the TUN queue for packets, unless a batch is still under way.
    pub(super) fn read_tun(&mut self) {
        if !self.tun.reads.is_empty() {
            return;
        }
        if self.tun.dry {
            if !self.tun.polling {
                self.tun.polling = true;
                self.ring.poll_input(TUN, Token::single(Operation::TunPoll));
            }
            return;
        }
        let free = self.pool.free(Class::Packet);
        let batch = if self.tun.nowait {
            let free = free.saturating_sub(INBOUND_RESERVE_SLOTS).max(1);
            self.tun.batch.min(free)
        } else {
            1
        };
        self.tun.yielded = 0;
        let when_dry = self.tun.when_dry();
        for _ in 0..batch {
            let Some(buffer) = self.pool.take(Class::Packet) else {
                break;
            };
            let entry = self.tun.reads.vacant_entry();
            let token = Token::new(Operation::TunRead, entry.key() as u32, 0);
            let range = HEADROOM_BYTES..HEADROOM_BYTES + TUN_READ_BYTES;
            entry.insert(self.ring.read(TUN, buffer, range, when_dry, token));
        }
    }

    /// Step 1 where a read of a dry queue cannot be told to fail: takes up to a batch of packets, read by read.
    ///
    /// On a TUN queue without RWF_NOWAIT io_uring turns a dry read into a poll, O_NONBLOCK or not (`io_prep_rw` since
    /// 5.15, and 5.10's later releases). One read may wait like that; of several, each packet wakes all and one gets it,
    /// and the others go to kernel threads (`io_arm_poll_handler`).
    pub(super) fn drain_tun(
        &mut self,
        completions: &mut Vec<Completion>,
    ) -> Result<(), WorkerError> {
        if self.tun.nowait {
            return Ok(());
        }
        for _ in 0..TUN_BATCH_MAX {
            let free = self.pool.free(Class::Packet);
            if self.tun.dry || !self.tun.reads.is_empty() || free <= INBOUND_RESERVE_SLOTS {
                break;
            }
            self.read_tun();
            self.ring
                .submit_and_look(completions)
                .map_err(WorkerError::Enter)?;
            self.on_completions(completions)?;
        }
        Ok(())
    }

    pub(super) fn on_tun_read(&mut self, completion: Completion) -> Result<(), WorkerError> {
        let in_flight = self.tun.reads.remove(completion.token.slot as usize);
        let mut buffer = in_flight.land(&completion);
        match completion.result() {
            Ok(bytes) if bytes > VIRTIO_NET_HDR_BYTES => {
                self.tun.yielded += 1;
                buffer.set_filled(HEADROOM_BYTES + bytes);
                self.counters.tun_read_packets.add(1);
                self.counters
                    .tun_read_bytes
                    .add((bytes - VIRTIO_NET_HDR_BYTES) as u64);
                self.route(Outgoing {
                    buffer,
                    start: HEADROOM_BYTES,
                });
            }
            Ok(_) => self.pool.release(buffer),
            Err(error) => {
                self.pool.release(buffer);
                match error {
                    Errno::EAGAIN => self.tun.dry = true,
                    Errno::EINTR | Errno::ECANCELED => {}
                    Errno::EBADFD | Errno::ENODEV | Errno::EIO | Errno::EBADF => {
                        return Err(WorkerError::TunGone);
                    }
                    error => {
                        tracing::warn!("reading the tunnel interface: {error}");
                        self.tun.dry = true;
                    }
                }
            }
        }
        if self.tun.reads.is_empty() {
            self.tun.batch = if self.tun.dry {
                (self.tun.yielded + 1).min(TUN_BATCH_MAX)
            } else {
                (self.tun.batch * 2).min(TUN_BATCH_MAX)
            };
        }
        Ok(())
    }

    /// Step 2: finds the connection.
    fn route(&mut self, outgoing: Outgoing) {
        let packet = packet_of(&outgoing);
        let flow = flow_hash(packet);
        let route =
            packet::destination(packet).and_then(|destination| self.routes.route(destination));
        // Counted before there is a connection for sparse flows, too, or what flows when it comes would begin anew.
        let kind = self.sparse_flows.sends(self.now, flow, packet.len());
        let is_own = |connection: ConnectionRef| usize::from(connection.worker) == self.index;
        let connection = route.and_then(|route| {
            let (sparse, other) = (route.sparse(), route.connection(flow)?);
            // What is received leads a flow to the worker of its connection. What is never answered would be handed over for
            // good. TCP is always answered.
            let stays = |sparse| {
                kind == Kind::Unanswered && is_own(sparse) && !is_own(other) && !is_tcp(packet)
            };
            let sparse = sparse.filter(|sparse| kind == Kind::Sparse || stays(*sparse));
            Some(sparse.unwrap_or(other))
        });
        self.forward(connection, flow, outgoing);
    }

    fn forward(&mut self, connection: Option<ConnectionRef>, flow: u32, outgoing: Outgoing) {
        let Some(connection) = connection else {
            self.counters.dropped_no_route.add(1);
            self.pool.release(outgoing.buffer);
            return;
        };
        if usize::from(connection.worker) == self.index {
            self.enqueue(connection, flow, outgoing);
        } else {
            self.hand_over(connection, flow, outgoing);
        }
    }

    /// Step 2 once more for what waits for a connection that is not to have it any longer.
    pub(super) fn send_elsewhere(&mut self, slot: usize) {
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        while let Some(popped) = connection.queue.pop(self.now) {
            if let Some(outgoing) = self.heed(&connection, popped.verdict, popped.packet) {
                self.route_again(outgoing);
            }
        }
        self.put_back(slot, connection);
    }

    fn route_again(&mut self, outgoing: Outgoing) {
        let packet = packet_of(&outgoing);
        let flow = flow_hash(packet);
        let connection = packet::destination(packet)
            .and_then(|destination| self.routes.lookup(destination, flow));
        self.forward(connection, flow, outgoing);
    }

    fn hand_over(&mut self, connection: ConnectionRef, flow: u32, outgoing: Outgoing) {
        let mailbox = &self.inlets[usize::from(connection.worker)].mailbox;
        match mailbox.post(connection, flow, outgoing.bytes()) {
            Posted::Full => self.counters.dropped_handover_full.add(1),
            Posted::Quiet => self.counters.handed_over.add(1),
            Posted::Ring => {
                self.counters.handed_over.add(1);
                self.ring.wake(
                    Self::peer_bell(connection.worker),
                    Token::single(Operation::WakePeer),
                );
            }
        }
        self.pool.release(outgoing.buffer);
    }

    /// A packet from another worker.
    pub(super) fn take_over(&mut self, handover: &Handover) {
        let bytes = HEADROOM_BYTES + handover.bytes.len();
        let class = if bytes <= SMALL_SLOT_BYTES {
            Class::Small
        } else if bytes <= MEDIUM_SLOT_BYTES {
            Class::Medium
        } else {
            Class::Packet
        };
        let buffer = if self.is_short_of(class) {
            None
        } else {
            self.pool.take(class)
        };
        let Some(mut buffer) = buffer else {
            self.counters.dropped_queue_full.add(1);
            return;
        };
        buffer.set_filled(HEADROOM_BYTES);
        buffer.append(&handover.bytes);
        let outgoing = Outgoing {
            buffer,
            start: HEADROOM_BYTES,
        };
        self.enqueue(handover.connection, handover.flow, outgoing);
    }

    /// Step 3: waits in the connection's queue.
    fn enqueue(&mut self, reference: ConnectionRef, flow: u32, outgoing: Outgoing) {
        let Some(slot) = self.slot_of(reference) else {
            self.counters.dropped_no_route.add(1);
            self.pool.release(outgoing.buffer);
            return;
        };
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        self.admit(&mut connection, flow, outgoing);
        self.put_back(slot, connection);
        self.mark_dirty(slot);
    }

    /// Steps 4 and 5 for every connection that has something to say.
    pub(super) fn pump_dirty(&mut self) {
        while let Some(slot) = self.dirty.pop() {
            self.pump(slot);
        }
    }

    fn pump(&mut self, slot: usize) {
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        connection.dirty = false;
        let sealed = if connection.has_said_goodbye() {
            Ok(())
        } else {
            self.seal_waiting(&mut connection)
        };
        self.send(&mut connection);
        connection.show_queue();
        let said_all = matches!(
            connection.life,
            Life::Closing {
                said_goodbye: true,
                listens: false,
                ..
            }
        ) && connection.sending.is_none()
            && connection.recalled.is_empty();
        self.put_back(slot, connection);
        if let Err(error) = sealed {
            self.close(slot, CloseCause::Failed(io::Error::other(error)), None);
        } else if said_all {
            self.shut(slot);
        }
    }

    /// Step 4: seals as much as chunks allow.
    fn seal_waiting(&mut self, connection: &mut Connection) -> Result<(), RecordError> {
        if connection.records.wants_key_update() {
            if !self.make_room(connection, CONTROL_RECORD_BYTES_MAX) {
                return Ok(());
            }
            if let Some(chunk) = &mut connection.fill {
                let bytes = connection.records.key_update(false, chunk.tail_mut())?;
                chunk.fill(bytes);
            }
        }
        while !connection.capsules.is_empty() {
            // Record by record: all together they may be longer than a chunk.
            let bytes = connection.capsules.len().min(RECORD_PLAINTEXT_BYTES_MAX);
            if !self.make_room(connection, sealed_bytes_max(bytes)) {
                return Ok(());
            }
            if let Some(chunk) = &mut connection.fill {
                seal_all(
                    &mut connection.records,
                    &connection.capsules[..bytes],
                    chunk,
                )?;
            }
            connection.capsules.drain(..bytes);
        }
        match connection.life {
            // They may still go by another connection.
            Life::Open if connection.clock.withholds(self.now) => Ok(()),
            Life::Open => self.seal_packets(connection),
            Life::Closing { .. } => self.seal_goodbye(connection),
            Life::Draining { .. } => Ok(()),
        }
    }

    fn seal_goodbye(&mut self, connection: &mut Connection) -> Result<(), RecordError> {
        if !self.make_room(connection, CONTROL_RECORD_BYTES_MAX) {
            return Ok(());
        }
        if let Some(chunk) = &mut connection.fill {
            let bytes = connection.records.close_notify(chunk.tail_mut())?;
            chunk.fill(bytes);
        }
        if let Life::Closing { said_goodbye, .. } = &mut connection.life {
            *said_goodbye = true;
        }
        Ok(())
    }

    fn seal_packets(&mut self, connection: &mut Connection) -> Result<(), RecordError> {
        let (context, accepts) = match &connection.offload {
            Some(offload) => (offload.context, offload.accepts),
            None => (0, Offloads::NONE),
        };
        let now = self.now;
        let mut result = Ok(());
        let is_busy = connection.sending.is_some() || connection.path.is_held_back(now);
        if is_busy || !connection.queue.is_empty() {
            let socket = connection.socket.as_fd();
            connection.path.look(socket, now, is_busy);
        }
        if connection.path.is_held_back(now) {
            self.pause(connection);
            return Ok(());
        }
        // Who is told of congestion while the path is still found out gives up what it will have in a moment.
        connection.queue.be_lenient(connection.path.is_growing());
        let ahead_bytes_max = connection.path.ahead_bytes_max() as usize;
        while let Some(popped) = connection.queue.pop(now) {
            let place = popped.place;
            let Some(mut outgoing) = self.heed(connection, popped.verdict, popped.packet) else {
                continue;
            };
            let header = header_of(&outgoing);
            let fit = offload::fit(header, packet_of(&outgoing), accepts);
            let segments = match fit {
                Fit::AsIs => 1,
                Fit::NeedsSegmenting => segments_max(&header, outgoing.bytes().len()),
            };
            let plaintext =
                self.staging.len() + outgoing.bytes().len() + segments * SEGMENT_HEADERS_BYTES;
            let need = sealed_bytes_max(plaintext);
            if need > self.pool.slot_bytes(Class::Chunk) {
                self.counters.dropped_unfit.add(1);
                connection.stats.counters.dropped_unfit.add(1);
                self.pool.release(outgoing.buffer);
                continue;
            }
            // One packet may always be ahead, however large it is.
            let ahead_bytes = connection.ahead_bytes();
            if ahead_bytes + self.staging.len() > 0 && ahead_bytes + need > ahead_bytes_max {
                self.wait(connection, place, outgoing);
                break;
            }
            if !self.has_room(connection, need) {
                result = result.and(self.flush_staging(connection));
                if !self.make_room(connection, need) {
                    self.wait(connection, place, outgoing);
                    break;
                }
            }
            let Some(chunk) = &mut connection.fill else {
                break;
            };
            let mut sealing = Sealing {
                records: &mut connection.records,
                staging: &mut self.staging,
                chunk,
                counters: &connection.stats.counters,
                context,
                accepts,
            };
            let done = match fit {
                Fit::AsIs => sealing.packet(&mut outgoing).map(|()| true),
                Fit::NeedsSegmenting => sealing.segments(header, &outgoing, &mut self.scratch),
            };
            let bytes = packet_of(&outgoing).len() as u64;
            self.pool.release(outgoing.buffer);
            let counters = &connection.stats.counters;
            match done {
                Ok(true) => {
                    counters.sent_packets.add(1);
                    counters.sent_bytes.add(bytes);
                }
                Ok(false) => {
                    self.counters.dropped_unfit.add(1);
                    counters.dropped_unfit.add(1);
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        result.and(self.flush_staging(connection))
    }

    /// Looks again when some of what is under way may have been acknowledged.
    fn pause(&mut self, connection: &mut Connection) {
        if connection.pausing || connection.queue.is_empty() {
            return;
        }
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionPause,
            reference.slot,
            reference.generation,
        );
        self.ring.pause(token);
        connection.in_flight += 1;
        connection.pausing = true;
    }

    pub(super) fn on_paused(&mut self, slot: usize) {
        if let Some(connection) = self.connection(slot) {
            connection.pausing = false;
            self.mark_dirty(slot);
        }
    }

    fn flush_staging(&mut self, connection: &mut Connection) -> Result<(), RecordError> {
        let sealed = match &mut connection.fill {
            Some(chunk) if !self.staging.is_empty() => {
                seal_all(&mut connection.records, &self.staging, chunk)
            }
            _ => Ok(()),
        };
        self.staging.clear();
        sealed
    }

    fn has_room(&self, connection: &Connection, bytes: usize) -> bool {
        connection
            .fill
            .as_ref()
            .is_some_and(|chunk| chunk.room() >= bytes)
    }

    /// Sees to a chunk with room for `bytes`. `false`: the socket or the pool has to come first.
    fn make_room(&mut self, connection: &mut Connection, bytes: usize) -> bool {
        if self.has_room(connection, bytes) {
            return true;
        }
        self.send(connection);
        let busy = connection.fill.is_some()
            || !connection.recalled.is_empty()
            || connection.sending.is_some() && self.is_short_of(Class::Chunk);
        if busy {
            return false; // The socket's completion pumps again.
        }
        connection.fill = self.chunk_to_send(connection);
        self.has_room(connection, bytes)
    }

    /// A chunk, but never the last one, which is for those who receive.
    fn chunk_to_send(&mut self, connection: &Connection) -> Option<Buffer> {
        let chunk = if self.pool.free(Class::Chunk) > 1 {
            self.pool.take(Class::Chunk)
        } else {
            None
        };
        if chunk.is_none() {
            self.starved.push(connection.reference.slot as usize);
        }
        chunk
    }

    /// Step 5: writes the chunk, unless one is still being written.
    fn send(&mut self, connection: &mut Connection) {
        if connection.sending.is_some()
            || connection.awaits_room
            || matches!(connection.life, Life::Draining { .. })
        {
            return;
        }
        if !connection.recalled.is_empty() {
            self.send_recalled(connection);
            return;
        }
        if let Some(chunk) = connection.fill.take_if(|chunk| chunk.filled() > 0) {
            let total = chunk.filled();
            self.write_chunk(connection, chunk, 0, total);
        }
    }

    fn write_chunk(
        &mut self,
        connection: &mut Connection,
        chunk: Buffer,
        sent: usize,
        total: usize,
    ) {
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionWrite,
            reference.slot,
            reference.generation,
        );
        connection.in_flight += 1;
        let chunk = self.ring.write(connection.file, chunk, sent..total, token);
        connection.sending = Some(Sending {
            chunk,
            sent,
            total,
            since: self.now,
            recalled: false,
        });
    }

    /// While chunks are short, one that the socket takes nothing of is recalled, so that it keeps nobody waiting.
    pub(super) fn recall_if_stuck(&mut self, slot: usize) {
        if !self.is_short_of(Class::Chunk) {
            return;
        }
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        let Some(sending) = &mut connection.sending else {
            return;
        };
        if sending.recalled || now.since(sending.since) < PARK_AFTER {
            return;
        }
        sending.recalled = true;
        connection.in_flight += 1;
        let generation = connection.reference.generation;
        let token = |operation| Token::new(operation, slot as u32, generation);
        self.ring
            .cancel(token(Operation::ConnectionWrite), token(Operation::Cancel));
    }

    /// The peer is heard again: has a write that waits tried once more. The kernel wakes writers only when a third of the
    /// send buffer is free, and TCP may be waiting for something new to send, to find out what the outage has eaten.
    pub(super) fn retry_write(&mut self, slot: usize) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if connection.sending.is_none() {
            return;
        }
        connection.in_flight += 1;
        let generation = connection.reference.generation;
        let token = |operation| Token::new(operation, slot as u32, generation);
        self.ring
            .cancel(token(Operation::ConnectionWrite), token(Operation::Cancel));
    }

    /// The socket gave the chunk back from `sent` on: what is sealed is kept outside the pool until there is room.
    fn keep_recalled(&mut self, connection: &mut Connection, chunk: Buffer, sent: usize) {
        connection
            .recalled
            .extend_from_slice(&chunk.bytes()[sent..]);
        self.pool.release(chunk);
        if let Some(chunk) = connection.fill.take() {
            connection.recalled.extend_from_slice(chunk.bytes());
            self.pool.release(chunk);
        }
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionWritable,
            reference.slot,
            reference.generation,
        );
        self.ring.poll_output(connection.file, token);
        connection.in_flight += 1;
        connection.awaits_room = true;
    }

    pub(super) fn on_writable(&mut self, slot: usize) {
        if let Some(connection) = self.connection(slot) {
            connection.awaits_room = false;
            self.mark_dirty(slot);
        }
    }

    fn send_recalled(&mut self, connection: &mut Connection) {
        let Some(mut chunk) = self.chunk_to_send(connection) else {
            return;
        };
        let bytes = connection.recalled.len().min(chunk.capacity());
        chunk.append(&connection.recalled[..bytes]);
        connection.recalled = connection.recalled.split_off(bytes);
        self.write_chunk(connection, chunk, 0, bytes);
    }

    pub(super) fn on_sent(&mut self, slot: usize, completion: Completion) {
        let now = self.now;
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        let Some(sending) = connection.sending.take() else {
            self.put_back(slot, connection);
            return;
        };
        let Sending {
            chunk,
            sent,
            total,
            recalled,
            ..
        } = sending;
        let chunk = chunk.land(&completion);
        let draining = matches!(connection.life, Life::Draining { .. });
        if let Ok(bytes) = completion.result() {
            let counters = &connection.stats.counters;
            counters.sent_stream_bytes.add(bytes as u64);
            connection.path.on_sent(bytes);
        }
        let mut failed = None;
        match completion.result() {
            Ok(bytes) if sent + bytes < total && !draining => {
                connection.clock.on_sent(now);
                self.write_chunk(&mut connection, chunk, sent + bytes, total);
            }
            Err(Errno::ECANCELED) if !draining && recalled => {
                self.keep_recalled(&mut connection, chunk, sent);
            }
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ECANCELED) if !draining => {
                self.write_chunk(&mut connection, chunk, sent, total);
            }
            Ok(_) => {
                connection.clock.on_sent(now);
                self.pool.release(chunk);
            }
            Err(error) => {
                self.pool.release(chunk);
                failed = Some(error);
            }
        }
        self.put_back(slot, connection);
        match failed {
            Some(error) => self.fail(slot, error),
            None => self.mark_dirty(slot),
        }
    }

    /// The socket said no: the connection ends, whatever its state.
    pub(super) fn fail(&mut self, slot: usize, error: Errno) {
        let cause = if is_hang_up(error) {
            CloseCause::PeerClosed
        } else {
            CloseCause::Failed(error.into())
        };
        self.close(slot, cause, None);
        self.shut(slot);
    }
}

fn header_of(outgoing: &Outgoing) -> VirtioNetHdr {
    outgoing
        .bytes()
        .first_chunk::<VIRTIO_NET_HDR_BYTES>()
        .map_or(VirtioNetHdr::PLAIN, VirtioNetHdr::read)
}

fn packet_of(outgoing: &Outgoing) -> &[u8] {
    &outgoing.bytes()[VIRTIO_NET_HDR_BYTES..]
}

fn is_tcp(packet: &[u8]) -> bool {
    packet::parse(packet).is_ok_and(|headers| headers.protocol == PROTOCOL_TCP)
}

fn segments_max(header: &VirtioNetHdr, bytes: usize) -> usize {
    match header.gso_size {
        0 => 1,
        size => bytes.div_ceil(usize::from(size)),
    }
}

/// Seals `plaintext` as one or more records behind what the chunk holds; the caller has made room.
fn seal_all(
    records: &mut RecordLayer,
    plaintext: &[u8],
    chunk: &mut Buffer,
) -> Result<(), RecordError> {
    for part in plaintext.chunks(RECORD_PLAINTEXT_BYTES_MAX) {
        let bytes = records.seal(ContentType::ApplicationData, part, chunk.tail_mut())?;
        chunk.fill(bytes);
    }
    Ok(())
}

/// What it takes to turn packets of one connection into records.
struct Sealing<'a> {
    records: &'a mut RecordLayer,
    /// Flushed as one record.
    staging: &'a mut Staging,
    chunk: &'a mut Buffer,
    counters: &'a ConnectionCounters,
    /// The context that packets are sent in; 0 has no `virtio_net_hdr`.
    context: u64,
    /// What the peer takes in that context.
    accepts: Offloads,
}

impl Sealing<'_> {
    /// One packet that the peer takes as it is.
    fn packet(&mut self, outgoing: &mut Outgoing) -> Result<(), RecordError> {
        let skipped = if self.context == 0 {
            VIRTIO_NET_HDR_BYTES
        } else {
            0
        };
        let payload_start = outgoing.start + skipped;
        let buffer = outgoing.buffer.bytes_mut();
        let header = datagram_header(self.context, buffer.len() - payload_start);
        let header = header.as_bytes();
        let start = payload_start - header.len();
        if buffer.len() - start <= COALESCE_BYTES_MAX {
            return self.small(header, &buffer[payload_start..]);
        }
        // The capsule header goes into the headroom, so that all of it is sealed in one pass.
        buffer[start..payload_start].copy_from_slice(header);
        self.flush()?;
        seal_all(self.records, &buffer[start..], self.chunk)
    }

    /// A small packet. It shares its record with others, and its capsule with those before it that it can be gathered with.
    fn small(&mut self, front: &[u8], payload: &[u8]) -> Result<(), RecordError> {
        let Some(datagram) = self.datagram(payload) else {
            return self.stage(front, payload);
        };
        if self.staging.gather(self.context, &datagram) {
            self.counters.gathered_packets.add(1);
            return Ok(());
        }
        self.flush_unless_room(front.len() + payload.len())?;
        self.staging.push_first(front, payload, &datagram);
        Ok(())
    }

    /// The packet as a segment of a super-packet, if the peer takes those and it can be one.
    fn datagram<'p>(&self, payload: &'p [u8]) -> Option<Datagram<'p>> {
        if self.context == 0 {
            return None;
        }
        let (header, packet) = payload.split_first_chunk::<VIRTIO_NET_HDR_BYTES>()?;
        Datagram::read(VirtioNetHdr::read(header), packet, self.accepts)
    }

    /// A packet that has to be segmented, or whose checksum has to be completed. `false`: it could not be.
    fn segments(
        &mut self,
        header: VirtioNetHdr,
        outgoing: &Outgoing,
        scratch: &mut [u8],
    ) -> Result<bool, RecordError> {
        let (packet, accepts) = (packet_of(outgoing), self.accepts);
        let mut sealed = Ok(());
        let segmented = offload::segment(header, packet, accepts, scratch, |header, segment| {
            if sealed.is_err() {
                return;
            }
            sealed = if self.context == 0 {
                let capsule = datagram_header(0, segment.len());
                self.stage(capsule.as_bytes(), segment)
            } else {
                let capsule = datagram_header(self.context, VIRTIO_NET_HDR_BYTES + segment.len());
                let mut front = [0; DATAGRAM_HEADER_BYTES_MAX + VIRTIO_NET_HDR_BYTES];
                let capsule = capsule.as_bytes();
                let end = capsule.len() + VIRTIO_NET_HDR_BYTES;
                front[..capsule.len()].copy_from_slice(capsule);
                front[capsule.len()..end].copy_from_slice(&header.to_bytes());
                self.stage(&front[..end], segment)
            };
        });
        sealed.map(|()| segmented.is_ok())
    }

    fn stage(&mut self, front: &[u8], payload: &[u8]) -> Result<(), RecordError> {
        self.flush_unless_room(front.len() + payload.len())?;
        self.staging.push(front, payload);
        Ok(())
    }

    fn flush_unless_room(&mut self, bytes: usize) -> Result<(), RecordError> {
        if self.staging.has_room(bytes) {
            Ok(())
        } else {
            self.flush()
        }
    }

    fn flush(&mut self) -> Result<(), RecordError> {
        if self.staging.is_empty() {
            return Ok(());
        }
        let sealed = seal_all(self.records, self.staging, self.chunk);
        self.staging.clear();
        sealed
    }
}
