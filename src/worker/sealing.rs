//! The second half of the way out: packets that waited become records.

use super::CloseCause;
use super::connection::{Connection, Farewell, Life};
use super::event_loop::Worker;
use super::staging::Staging;
use super::waiting::Outgoing;
use crate::proto::capsule::{DATAGRAM_HEADER_BYTES_MAX, datagram_header};
use crate::proto::offload::{self, Datagram, Fit, Offloads, VIRTIO_NET_HDR_BYTES, VirtioNetHdr};
use crate::proto::send_limit::Allowance;
use crate::stats::ConnectionCounters;
use crate::tls::record::{
    CONTROL_RECORD_BYTES_MAX, ContentType, RECORD_OVERHEAD_BYTES, RECORD_PLAINTEXT_BYTES_MAX,
    RecordError, RecordLayer,
};
use crate::uring::buffer::{Buffer, Class, HEADROOM_BYTES};
use crate::uring::token::{Operation, Token};
use std::io;

/// Capsules up to this size share records by copy; larger ones are sealed from where they lie.
const COALESCE_BYTES_MAX: usize = 2048;
/// Free chunks below which a connection sends from one alone.
const SECOND_CHUNKS_LEFT_MIN: usize = 3;
/// Headers of one segment at most, for the estimate of what a super-packet grows to.
const SEGMENT_HEADERS_BYTES: usize = 128;

const _: () = assert!(HEADROOM_BYTES >= DATAGRAM_HEADER_BYTES_MAX);
const _: () = assert!(COALESCE_BYTES_MAX <= RECORD_PLAINTEXT_BYTES_MAX);

/// Bytes that `plaintext` bytes become when they are sealed, staging included.
const fn sealed_bytes_max(plaintext: usize) -> usize {
    plaintext + (plaintext / RECORD_PLAINTEXT_BYTES_MAX + 2) * RECORD_OVERHEAD_BYTES
}

impl Worker {
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
            let cause = CloseCause::Failed(io::Error::other(error));
            self.close(slot, cause, Farewell::NONE);
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
        let Life::Closing {
            said_goodbye,
            alert,
            ..
        } = &mut connection.life
        else {
            return Ok(());
        };
        if let Some(chunk) = &mut connection.fill {
            let bytes = match alert {
                Some(alert) => connection.records.fatal_alert(*alert, chunk.tail_mut())?,
                None => connection.records.close_notify(chunk.tail_mut())?,
            };
            chunk.fill(bytes);
        }
        *said_goodbye = true;
        Ok(())
    }

    fn seal_packets(&mut self, connection: &mut Connection) -> Result<(), RecordError> {
        let (context, accepts) = match &connection.offload {
            Some(offload) => (offload.context, offload.accepts),
            None => (0, Offloads::NONE),
        };
        let now = self.now;
        let mut result = Ok(());
        connection.look_at_path(now);
        // Who is told of congestion then gives up what it will have in a moment.
        connection
            .queue
            .be_lenient(connection.path.is_changing(now));
        let allowance = connection.path.allowance(now);
        let ahead_bytes_max = allowance.bytes_max() as usize;
        while let Some(popped) = allowance.pop(&mut connection.queue, now) {
            let place = popped.place;
            let Some(mut outgoing) = self.heed(connection, popped.verdict, popped.packet) else {
                continue;
            };
            let header = outgoing.header();
            let fit = offload::fit(header, outgoing.packet(), accepts);
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
            let bytes = outgoing.packet().len() as u64;
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
        if let Allowance::New(_) = allowance {
            self.pause(connection);
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
            || connection.sending.is_some() && self.is_second_chunk_too_many(connection);
        if busy {
            return false; // The socket's completion pumps again.
        }
        connection.fill = self.take_send_chunk(connection);
        self.has_room(connection, bytes)
    }
}

impl Worker {
    /// Whether a connection that has a chunk at the socket does without another: few are free, or its peer has its share.
    fn is_second_chunk_too_many(&mut self, connection: &Connection) -> bool {
        self.pool.free(Class::Chunk) < SECOND_CHUNKS_LEFT_MIN
            || !self.may_take(connection, Class::Chunk)
    }
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
        let (packet, accepts) = (outgoing.packet(), self.accepts);
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
