//! From the interface to the socket.

use super::World;
use crate::agenda::Event;
use crate::end::{
    Connection, LARGE, Outgoing, Sealing, Sending, Staging, UNSENT_BYTES_MAX, sealed_bytes_max,
};
use crate::ledger::Held;
use ringtun::proto::egress_queue::{Admit, Bounds, Place, Queued, Verdict};
use ringtun::proto::offload::Offloads;
use ringtun::proto::route_table::ConnectionRef;
use ringtun::proto::send_limit::Allowance;
use ringtun::uring::buffer::CHUNK_BYTES_MAX;
use ringtun::uring::ring::PAUSE;
use std::time::Duration;

/// How long a write takes until the worker knows of it.
const WRITE_TIME: Duration = Duration::from_micros(20);

impl World<'_> {
    pub(super) fn admit(
        &mut self,
        side: usize,
        route: ConnectionRef,
        flow: u32,
        mut outgoing: Outgoing,
    ) {
        let bytes_max = self.scenario.queue_bytes_max;
        let Some(mut connection) = self.ends[side].connections[route.slot as usize].take() else {
            panic!("a route leads to a connection that is there");
        };
        let pool = &mut self.ends[side].pool;
        let bounds = if connection.queue.is_backlogged() {
            pool.shrink(&mut outgoing);
            pool.bounds(bytes_max, 1)
        } else {
            Bounds::of_bytes(bytes_max)
        };
        let has_room = bounds.slots_max[outgoing.class()] > 0;
        let admit = connection.queue.push(self.now, flow, outgoing, &bounds);
        self.drop_excess(side, &mut connection, admit, &bounds);
        if has_room {
            check_slots(&connection, &bounds);
        }
        self.check_queue(&connection);
        self.ends[side].connections[route.slot as usize] = Some(connection);
    }

    fn drop_excess(
        &mut self,
        side: usize,
        connection: &mut Connection,
        admit: Admit,
        bounds: &Bounds,
    ) {
        let mut dropped = 0;
        while let Some(outgoing) = connection.queue.take_dropped() {
            let (id, bytes) = (outgoing.id, outgoing.bytes());
            self.trace
                .note(self.now, || format!("packet {id} is too much"));
            self.forget_dropped(side, &outgoing, bytes);
            dropped += 1;
        }
        assert_eq!(admit == Admit::Overflow, dropped > 0);
        assert!(connection.queue.bytes() <= bounds.bytes_max);
    }

    fn forget_dropped(&mut self, side: usize, outgoing: &Outgoing, bytes: usize) {
        self.ledger.drop(outgoing.id, bytes);
        self.tell_of_drop(outgoing);
        self.ends[side].pool.release(outgoing);
    }

    fn tell_of_drop(&mut self, outgoing: &Outgoing) {
        let flow = self.ledger.flow(outgoing.id);
        let shape = self.ledger.shape(flow);
        let payload = outgoing.packet().len() - shape.header_bytes();
        let segments = payload.div_ceil(shape.segment_bytes.max(1)).max(1);
        self.tell(flow, segments, true, self.scenario.round_trip());
    }

    /// What waits is what has come and not gone.
    fn check_queue(&self, connection: &Connection) {
        let held = Held {
            packets: connection.queue.len(),
            bytes: connection.queue.bytes(),
        };
        assert_eq!(held, self.ledger.waiting(connection.outbound));
        assert!(held.bytes <= self.scenario.queue_bytes_max);
        assert_eq!(connection.queue.is_empty(), held.packets == 0);
    }

    pub(super) fn sender_of(&self, stream: usize) -> Option<(usize, usize)> {
        (0..2).find_map(|side| {
            let mut connections = self.ends[side].connections.iter().flatten();
            let connection = connections.find(|connection| connection.outbound == stream)?;
            Some((side, connection.ordinal))
        })
    }

    pub(super) fn pump(&mut self, side: usize, ordinal: usize) {
        let Some(mut connection) = self.ends[side].connections[ordinal].take() else {
            return;
        };
        self.seal_packets(side, &mut connection);
        self.send(&mut connection);
        self.check_queue(&connection);
        self.ends[side].connections[ordinal] = Some(connection);
    }

    fn seal_packets(&mut self, side: usize, connection: &mut Connection) {
        let now = self.now;
        let offloads = self.scenario.offloads.map(|offloads| offloads[1 - side]);
        let is_busy = connection.sending.is_some() || connection.limit.is_held_back(now);
        if is_busy || !connection.queue.is_empty() {
            self.look(connection, is_busy);
        }
        connection
            .queue
            .be_lenient(connection.limit.is_changing(now));
        let allowance = connection.limit.allowance(now);
        let ahead_bytes_max = allowance.bytes_max() as usize;
        let mut staging = Staging::default();
        let mut scratch = std::mem::take(&mut self.ends[side].staging_scratch);
        while let Some(popped) = allowance.pop(&mut connection.queue, now) {
            let Some(outgoing) = self.heed(side, popped.verdict, popped.packet) else {
                continue;
            };
            let accepts = offloads.unwrap_or(Offloads::NONE);
            let need = sealed_bytes_max(&outgoing, staging.bytes(), accepts);
            let ahead_bytes = connection.ahead_bytes();
            if ahead_bytes + staging.bytes() > 0 && ahead_bytes + need > ahead_bytes_max {
                self.wait(side, connection, popped.place, outgoing);
                break;
            }
            if connection.fill.len() + need > CHUNK_BYTES_MAX {
                seal_staged(connection, &mut staging, offloads);
                self.send(connection);
                if !connection.fill.is_empty() {
                    self.wait(side, connection, popped.place, outgoing);
                    break;
                }
            }
            let mut sealing = Sealing {
                staging: &mut staging,
                chunk: &mut connection.fill,
                offloads,
            };
            sealing.packet(&outgoing, &mut scratch);
            let id = outgoing.id;
            self.trace.note(now, || format!("packet {id} is sealed"));
            self.ledger.seal(id, outgoing.bytes());
            self.ends[side].pool.release(&outgoing);
        }
        let is_held_back = matches!(allowance, Allowance::New(_));
        if is_held_back && !connection.pausing && !connection.queue.is_empty() {
            connection.pausing = true;
            let stream = connection.outbound;
            self.agenda.at(now + PAUSE, Event::Paused { stream });
        }
        seal_staged(connection, &mut staging, offloads);
        self.ends[side].staging_scratch = scratch;
    }

    fn look(&mut self, connection: &mut Connection, is_busy: bool) {
        let now = self.now;
        if now.since(connection.looked_at) < connection.limit.look_interval(now) {
            return;
        }
        connection.looked_at = now;
        let received_bytes = self.streams[connection.inbound].delivered_bytes;
        let stream = &mut self.streams[connection.outbound];
        let sample = stream.sample(is_busy, received_bytes);
        connection.limit.observe(now, sample);
        let wanted = connection.limit.ahead_bytes_max().min(UNSENT_BYTES_MAX);
        if wanted.abs_diff(connection.unsent_bytes_max) > connection.unsent_bytes_max / 4 {
            connection.unsent_bytes_max = wanted;
            stream.unsent_bytes_max = wanted;
        }
        stream.pacing_rate = connection.limit.pacing_rate(now);
        let limit = &connection.limit;
        self.trace.note(now, || {
            format!(
                "stream {}: {sample:?} gives rate {:?}, ahead {}, under way {:?}, paced {:?}",
                connection.outbound,
                limit.rate(),
                limit.ahead_bytes_max(),
                limit.under_way_bytes_max(now),
                limit.pacing_rate(now)
            )
        });
    }

    /// Counts what the queue decided. The packet, unless it was dropped.
    fn heed(&mut self, side: usize, verdict: Verdict, outgoing: Outgoing) -> Option<Outgoing> {
        if verdict == Verdict::Pass {
            return Some(outgoing);
        }
        let (id, after) = (outgoing.id, outgoing.bytes());
        self.trace
            .note(self.now, || format!("packet {id}: {verdict:?}"));
        let flow = self.ledger.flow(id);
        let trimmed = match verdict {
            Verdict::Trimmed => self.ledger.shape(flow).segment_bytes,
            _ => 0,
        };
        self.ledger.heed(id, verdict, after + trimmed, after);
        match verdict {
            Verdict::Drop => {
                self.tell_of_drop(&outgoing);
                self.ends[side].pool.release(&outgoing);
                return None;
            }
            Verdict::Trimmed => self.tell(flow, 1, true, self.scenario.round_trip()),
            Verdict::Pass | Verdict::Marked => {}
        }
        Some(outgoing)
    }

    fn wait(&mut self, side: usize, connection: &mut Connection, place: Place, outgoing: Outgoing) {
        let was_backlogged = connection.queue.is_backlogged();
        connection.queue.put_back(place, outgoing);
        if was_backlogged {
            return;
        }
        let pool = &mut self.ends[side].pool;
        connection.queue.repack(|outgoing| pool.shrink(outgoing));
        let held = connection.queue.slots()[LARGE];
        let bounds = pool.bounds(self.scenario.queue_bytes_max, held);
        let admit = connection.queue.keep_to(&bounds);
        self.drop_excess(side, connection, admit, &bounds);
        check_slots(connection, &bounds);
    }

    fn send(&mut self, connection: &mut Connection) {
        if connection.sending.is_none() && !connection.fill.is_empty() {
            let sending = Sending {
                chunk: std::mem::take(&mut connection.fill),
                sent: 0,
                taken: 0,
            };
            self.write(connection, sending);
        }
    }

    fn write(&mut self, connection: &mut Connection, mut sending: Sending) {
        let stream = connection.outbound;
        sending.taken = self.streams[stream].write(&sending.chunk[sending.sent..]);
        if sending.taken > 0 {
            self.agenda
                .at(self.now + WRITE_TIME, Event::Written { stream });
        }
        connection.sending = Some(sending);
        self.transmit(stream);
    }

    pub(super) fn on_written(&mut self, stream: usize) {
        let Some((side, ordinal)) = self.sender_of(stream) else {
            return;
        };
        let Some(mut connection) = self.ends[side].connections[ordinal].take() else {
            return;
        };
        if let Some(mut sending) = connection.sending.take() {
            sending.sent += sending.taken;
            connection.limit.sent(sending.taken);
            if sending.sent < sending.chunk.len() {
                self.write(&mut connection, sending);
            }
        }
        self.ends[side].connections[ordinal] = Some(connection);
        self.pump(side, ordinal);
    }

    pub(super) fn transmit(&mut self, stream: usize) {
        let stream = &mut self.streams[stream];
        let path = &mut self.scenario.paths[stream.direction];
        stream.transmit(self.now, path, &mut self.dice, &mut self.agenda);
    }
}

fn check_slots(connection: &Connection, bounds: &Bounds) {
    let held = connection.queue.slots();
    assert!(
        (0..held.len()).all(|class| held[class] <= bounds.slots_max[class]),
        "{held:?} slots held, {bounds:?} allowed"
    );
}

fn seal_staged(connection: &mut Connection, staging: &mut Staging, offloads: Option<Offloads>) {
    let mut sealing = Sealing {
        staging,
        chunk: &mut connection.fill,
        offloads,
    };
    sealing.flush();
}
