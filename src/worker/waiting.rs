//! What waits for a connection, and how much memory it may hold meanwhile.
//!
//! Nobody is promised memory. A queue may hold as many slots of a class as are free besides a reserve, so that one stalled
//! connection gets half of them, two of different peers get a third each, and whoever comes next finds some. The queues of
//! one peer hold twice as much together, however many they are: a peer never has more than two thirds. Packets that are
//! on their way through within this turn of the loop do not count.

use super::connection::Connection;
use super::event_loop::{PACKETS_LEFT_MIN, Worker};
use crate::proto::egress_queue::{Admit, Bounds, CLASSES, Place, Queued, Verdict};
use crate::proto::offload::{Signal, VIRTIO_NET_HDR_BYTES, VirtioNetHdr, signal};
use crate::uring::buffer::{
    Buffer, Class, HEADROOM_BYTES, MEDIUM_SLOT_BYTES, Pool, SMALL_SLOT_BYTES,
};

/// Of the medium and of the small slots, this part is left to others.
const RESERVE_SHARE: usize = 8;
/// Classes of memory as the queue counts them.
pub(super) const LARGE: usize = 0;
pub(super) const MEDIUM: usize = 1;
pub(super) const SMALL: usize = 2;

const _: () = assert!(SMALL < CLASSES);

/// A packet that waits: `virtio_net_hdr` and packet fill the buffer from `start` on. There is headroom before.
pub(super) struct Outgoing {
    pub(super) buffer: Buffer,
    pub(super) start: usize,
}

impl Outgoing {
    /// `virtio_net_hdr` and packet.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[self.start..]
    }

    /// The `virtio_net_hdr`.
    pub(super) fn header(&self) -> VirtioNetHdr {
        self.bytes()
            .first_chunk()
            .map_or(VirtioNetHdr::PLAIN, VirtioNetHdr::read)
    }

    pub(super) fn packet(&self) -> &[u8] {
        &self.bytes()[VIRTIO_NET_HDR_BYTES..]
    }

    /// Moves to the smallest slot in which it fits and of which there is one.
    fn shrink(&mut self, pool: &mut Pool) {
        let with_headroom = self.start - HEADROOM_BYTES;
        let bytes = self.buffer.filled() - with_headroom;
        let smaller = [Class::Small, Class::Medium].into_iter().find_map(|class| {
            let slot_bytes = pool.slot_bytes(class);
            let suits = bytes <= slot_bytes && slot_bytes < self.buffer.capacity();
            suits.then(|| pool.take(class)).flatten()
        });
        let Some(mut smaller) = smaller else {
            return;
        };
        smaller.append(&self.buffer.bytes()[with_headroom..]);
        pool.release(std::mem::replace(&mut self.buffer, smaller));
        self.start = HEADROOM_BYTES;
    }
}

impl Queued for Outgoing {
    #[inline]
    fn bytes(&self) -> usize {
        self.buffer.filled() - self.start
    }

    #[inline]
    fn class(&self) -> usize {
        match self.buffer.capacity() {
            SMALL_SLOT_BYTES => SMALL,
            MEDIUM_SLOT_BYTES => MEDIUM,
            _ => LARGE,
        }
    }

    fn signal(&mut self) -> Verdict {
        match signal(&mut self.buffer.bytes_mut()[self.start..]) {
            Signal::Marked => Verdict::Marked,
            Signal::Trimmed { bytes } => {
                self.start += bytes;
                Verdict::Trimmed
            }
            Signal::Drop => Verdict::Drop,
            Signal::Spare => Verdict::Pass,
        }
    }
}

impl Worker {
    /// Puts a packet into the connection's queue.
    pub(super) fn admit(&mut self, connection: &mut Connection, flow: u32, mut outgoing: Outgoing) {
        let bounds = if connection.queue.is_backlogged() {
            outgoing.shrink(&mut self.pool);
            self.bounds(connection, 1)
        } else {
            Bounds::of_bytes(self.queue_bytes_max(connection))
        };
        let admit = connection.queue.push(self.now, flow, outgoing, &bounds);
        self.release_dropped(connection, admit);
    }

    /// Puts back what there was no room for. If it is the first that has to wait, all that came with it waits from now on.
    pub(super) fn wait(&mut self, connection: &mut Connection, place: Place, outgoing: Outgoing) {
        let was_backlogged = connection.queue.is_backlogged();
        connection.queue.put_back(place, outgoing);
        if was_backlogged {
            return;
        }
        let pool = &mut self.pool;
        connection.queue.repack(|outgoing| outgoing.shrink(pool));
        let held = connection.queue.slots()[LARGE];
        let bounds = self.bounds(connection, held);
        let admit = connection.queue.keep_to(&bounds);
        self.release_dropped(connection, admit);
    }

    /// What a queue may hold that has just got `taken` more large slots than it was granted.
    fn bounds(&self, connection: &Connection, taken: usize) -> Bounds {
        // Two shares for a peer's queues together: one queue has at most one.
        let queues = self.backlogged_of_peer(connection) + 1;
        let of_peer = |slots: usize| (slots * 2 / queues).min(slots);
        let large = self.pool.free(Class::Packet) + taken;
        let besides_reserve = |class| {
            let reserve = self.pool.slots(class) / RESERVE_SHARE;
            of_peer(self.pool.free(class).saturating_sub(reserve)).max(1)
        };
        let mut slots_max = [0; CLASSES];
        slots_max[LARGE] = of_peer(large.saturating_sub(PACKETS_LEFT_MIN));
        slots_max[MEDIUM] = besides_reserve(Class::Medium);
        slots_max[SMALL] = besides_reserve(Class::Small);
        Bounds {
            bytes_max: self.queue_bytes_max(connection),
            slots_max,
        }
    }

    fn queue_bytes_max(&self, connection: &Connection) -> usize {
        self.queue_bytes_max.min(connection.path.queue_bytes_max())
    }

    /// Drops what a backlogged queue holds above its bounds, which shrink as others need memory. A queue to which nothing is
    /// added any more would keep it for as long as its peer takes nothing.
    pub(super) fn keep_to_bounds(&mut self, slot: usize) {
        let classes = [Class::Packet, Class::Medium, Class::Small];
        if !classes.into_iter().any(|class| self.is_short_of(class)) {
            return;
        }
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        if connection.queue.is_backlogged() {
            let bounds = self.bounds(&connection, 0);
            let admit = connection.queue.keep_to(&bounds);
            self.release_dropped(&mut connection, admit);
        }
        self.put_back(slot, connection);
    }

    fn release_dropped(&mut self, connection: &mut Connection, admit: Admit) {
        if admit == Admit::Queued {
            return;
        }
        while let Some(outgoing) = connection.queue.take_dropped() {
            self.counters.dropped_queue_full.add(1);
            connection.stats.counters.dropped_queue_full.add(1);
            self.pool.release(outgoing.buffer);
        }
    }

    /// Counts what the queue decided. The packet, unless it has to be dropped.
    pub(super) fn heed(
        &mut self,
        connection: &Connection,
        verdict: Verdict,
        outgoing: Outgoing,
    ) -> Option<Outgoing> {
        let counters = &connection.stats.counters;
        match verdict {
            Verdict::Pass => return Some(outgoing),
            Verdict::Marked => {
                self.counters.signalled_marked.add(1);
                counters.signalled_marked.add(1);
            }
            Verdict::Trimmed => {
                self.counters.signalled_trimmed.add(1);
                counters.signalled_trimmed.add(1);
            }
            Verdict::Drop => {
                self.counters.dropped_codel.add(1);
                counters.dropped_codel.add(1);
                self.pool.release(outgoing.buffer);
                return None;
            }
        }
        Some(outgoing)
    }
}
