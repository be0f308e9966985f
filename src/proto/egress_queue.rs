//! The queue between TUN and a connection.
//!
//! Packets wait here, and not in the kernel, while the connection takes no more, so that what to delay and what to drop
//! is decided here: flow queueing (deficit round robin, new flows first) with controlled delay for each flow, RFC 8290
//! and 8289. The way of a packet:
//! 1. it arrives; as long as nothing has to wait longer than a turn of the loop, that is all: a plain FIFO, unless a turn
//!    brings super-packets and small ones, for which a turn is long;
//! 2. as soon as something has to wait, all that is there is sorted into flows, and so is what comes after;
//! 3. where that exceeds a bound, the fattest flow is cut back, from its front;
//! 4. the flow whose turn it is gives its first packet; one that has waited too long tells its sender so;
//! 5. where a connection has enough of that, new flows may still send a segment or so: [`EgressQueue::pop_new`];
//! 6. a packet that did not fit the connection after all is put back.
//!
//! A packet tells its sender by a mark, the loss of one segment, or its own loss, whichever costs least:
//! [`Queued::signal`]. One signal concerns one segment, not a whole super-packet.

mod chain;
mod codel;
mod flows;

use std::mem;

use super::timer::Instant;
use chain::{Chain, Links, Waiting};
use flows::Flows;

pub use codel::{INTERVAL, TARGET};
pub use flows::BUCKETS;

/// A segment with its headers and a little: what a new flow may send at once, and the least that a turn is worth.
pub const SEGMENT_BYTES: usize = 1514;
/// A turn is worth this part of the longest packet that waits, or flows of super-packets would need 40 rounds for one.
const QUANTUM_SHARE: usize = 8;
/// A packet that is longer than this keeps others waiting.
const LONG_BYTES: usize = 8 * SEGMENT_BYTES;
/// Where a bound is exceeded, this part of it is made free at once, so that the search for the fattest flow pays.
const CUT_BACK_SHARE: usize = 16;
/// But no more packets than this at once (RFC 8290 section 4.1.3).
const CUT_BACK_PACKETS_MAX: usize = 64;
/// Kinds of memory that packets are held in; what they are, the owner of the memory knows.
pub const CLASSES: usize = 3;

/// What a packet tells of itself.
pub trait Queued {
    /// Bytes to be sent.
    fn bytes(&self) -> usize;

    /// In which class of memory it holds a slot, below [`CLASSES`].
    fn class(&self) -> usize;

    /// Has it tell its sender of congestion. What it answers is what the queue does: [`Verdict::Pass`] if it cannot
    /// tell. It never gets longer.
    fn signal(&mut self) -> Verdict;
}

/// What was decided about a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It goes on as it came.
    Pass,
    /// It goes on, marked.
    Marked,
    /// It goes on, but for one segment.
    Trimmed,
    /// It has to be dropped.
    Drop,
}

/// What one queue may hold. It may change from packet to packet, as others need memory.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of packets.
    pub bytes_max: usize,
    /// Slots of each class.
    pub slots_max: [usize; CLASSES],
}

impl Bounds {
    /// A bound in bytes alone.
    pub const fn of_bytes(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            slots_max: [usize::MAX; CLASSES],
        }
    }
}

/// What became of a packet that was pushed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "dropped packets' buffers have to be given back"]
pub enum Admit {
    /// All wait.
    Queued,
    /// Packets had to go, not necessarily the one that came: [`EgressQueue::take_dropped`] gives them.
    Overflow,
}

/// A packet whose turn it is.
#[derive(Debug)]
pub struct Popped<P> {
    /// The packet.
    pub packet: P,
    /// What to do with it.
    pub verdict: Verdict,
    /// What [`EgressQueue::put_back`] asks for.
    pub place: Place,
}

/// Where a packet was.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    at: Instant,
    flow: u32,
    signalled: bool,
    charged_bytes: usize,
}

/// A queue of packets. `P` is whatever owns a packet's bytes.
///
/// `bytes`, `slots` and `len` are sums over what waits, without what was dropped and not yet taken. `sorted` of `len`
/// packets are in flows; the others are in `arrived`, all came at the same time, and then `sorted` is zero.
#[derive(Debug)]
pub struct EgressQueue<P> {
    links: Links<P>,
    arrived: Chain,
    /// Whether small and long packets have been among `arrived`.
    arrived_small: bool,
    arrived_long: bool,
    dropped: Chain,
    flows: Flows,
    len: usize,
    sorted: usize,
    bytes: usize,
    slots: [usize; CLASSES],
    quantum: usize,
    is_lenient: bool,
    /// When a packet was last sorted.
    sorted_at: Instant,
}

impl<P: Queued> Default for EgressQueue<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Queued> EgressQueue<P> {
    /// An empty queue. It allocates nothing before the first packet, and nothing for flows before one has to wait.
    pub fn new() -> Self {
        Self {
            links: Links::new(),
            arrived: Chain::EMPTY,
            arrived_small: false,
            arrived_long: false,
            dropped: Chain::EMPTY,
            flows: Flows::new(),
            len: 0,
            sorted: 0,
            bytes: 0,
            slots: [0; CLASSES],
            quantum: SEGMENT_BYTES,
            is_lenient: false,
            sorted_at: Instant::ZERO,
        }
    }

    /// Takes a packet in, and holds no more than `bounds` allow after that. But a packet that they have no room for at all is
    /// dropped alone, whatever else is held.
    #[inline]
    pub fn push(&mut self, now: Instant, flow: u32, packet: P, bounds: &Bounds) -> Admit {
        let (bytes, class) = (packet.bytes(), packet.class());
        let waiting = Waiting {
            packet,
            at: now,
            flow,
            signalled: false,
        };
        if bytes > bounds.bytes_max || bounds.slots_max[class] == 0 {
            self.links.push_last(&mut self.dropped, waiting);
            return Admit::Overflow;
        }
        self.len += 1;
        self.bytes += bytes;
        self.slots[class] += 1;
        if self.sorted == 0 && self.has_just_arrived(now) {
            self.links.push_last(&mut self.arrived, waiting);
            self.arrived_small |= bytes <= SEGMENT_BYTES;
            self.arrived_long |= bytes > LONG_BYTES;
        } else {
            self.sort_arrived();
            self.sort(waiting);
        }
        self.keep_to(bounds)
    }

    /// Drops what exceeds `bounds`.
    #[inline]
    pub fn keep_to(&mut self, bounds: &Bounds) -> Admit {
        if self.bytes > bounds.bytes_max
            || (0..CLASSES).any(|class| self.slots[class] > bounds.slots_max[class])
        {
            self.cut_back(bounds);
            return Admit::Overflow;
        }
        Admit::Queued
    }

    /// A packet that was dropped by [`EgressQueue::push`] or [`EgressQueue::keep_to`].
    pub fn take_dropped(&mut self) -> Option<P> {
        let waiting = self.links.pop_first(&mut self.dropped)?;
        Some(waiting.packet)
    }

    /// Takes out the packet whose turn it is.
    #[inline]
    pub fn pop(&mut self, now: Instant) -> Option<Popped<P>> {
        if self.sorted == 0 {
            if self.arrived.is_empty() {
                self.flows.rest();
                self.quantum = SEGMENT_BYTES;
                (self.arrived_small, self.arrived_long) = (false, false);
                return None;
            }
            let is_mixed = self.arrived_small && self.arrived_long;
            if self.has_just_arrived(now) && !is_mixed {
                return self.pop_arrived();
            }
            self.sort_arrived();
        }
        self.pop_sorted(now)
    }

    /// Whether nothing has waited since before `now`.
    #[inline]
    fn has_just_arrived(&self, now: Instant) -> bool {
        self.links
            .first(&self.arrived)
            .is_none_or(|first| first.at == now)
    }

    #[inline]
    fn pop_arrived(&mut self) -> Option<Popped<P>> {
        let Waiting {
            packet,
            at,
            flow,
            signalled,
        } = self.links.pop_first(&mut self.arrived)?;
        self.len -= 1;
        self.bytes -= packet.bytes();
        self.slots[packet.class()] -= 1;
        let charged_bytes = 0;
        Some(Popped {
            packet,
            verdict: Verdict::Pass,
            place: Place {
                at,
                flow,
                signalled,
                charged_bytes,
            },
        })
    }

    /// Takes out the next packet of a new flow that is no longer than a segment: what goes even where others have to wait. No
    /// flow is given more for that than a new one may send at once.
    pub fn pop_new(&mut self, now: Instant) -> Option<Popped<P>> {
        self.sort_arrived();
        let is_short = |waiting: &Waiting<P>| waiting.packet.bytes() <= SEGMENT_BYTES;
        let index = self
            .flows
            .first_new(|packets| self.links.first(packets).is_some_and(is_short))?;
        self.pop_of(index, now)
    }

    fn pop_sorted(&mut self, now: Instant) -> Option<Popped<P>> {
        let index = self.flows.turn(self.quantum as i64);
        self.pop_of(index, now)
    }

    #[inline]
    fn pop_of(&mut self, index: usize, now: Instant) -> Option<Popped<P>> {
        let Waiting {
            mut packet,
            at,
            flow: hash,
            mut signalled,
        } = self.take_first_of(index)?;
        let flow = self.flows.get_mut(index);
        let behind = flow.bytes + packet.bytes().saturating_sub(SEGMENT_BYTES);
        let mut verdict = Verdict::Pass;
        let is_due = !self.is_lenient && flow.codel.is_due(now, now.since(at), behind);
        if is_due && !signalled {
            verdict = packet.signal();
            signalled = verdict != Verdict::Pass;
            if signalled {
                flow.codel.signalled(now);
            }
        }
        let charged_bytes = match verdict {
            Verdict::Drop => 0,
            _ => packet.bytes(),
        };
        flow.deficit -= charged_bytes as i64;
        let place = Place {
            at,
            flow: hash,
            signalled,
            charged_bytes,
        };
        Some(Popped {
            packet,
            verdict,
            place,
        })
    }

    /// Puts the packet that was just popped back where it was, as there is no room for it yet. It now waits, and so does
    /// everything else.
    pub fn put_back(&mut self, place: Place, packet: P) {
        self.sort_arrived();
        let (bytes, class) = (packet.bytes(), packet.class());
        let index = self.flows.awake(place.flow);
        let flow = self.flows.get_mut(index);
        let waiting = Waiting {
            packet,
            at: place.at,
            flow: place.flow,
            signalled: place.signalled,
        };
        self.links.push_first(&mut flow.packets, waiting);
        flow.deficit += place.charged_bytes as i64;
        flow.bytes += bytes;
        flow.slots[class] += 1;
        self.len += 1;
        self.sorted += 1;
        self.bytes += bytes;
        self.slots[class] += 1;
    }

    fn sort_arrived(&mut self) {
        while let Some(waiting) = self.links.pop_first(&mut self.arrived) {
            self.sort(waiting);
        }
    }

    fn sort(&mut self, waiting: Waiting<P>) {
        let (bytes, class) = (waiting.packet.bytes(), waiting.packet.class());
        self.sorted_at = waiting.at;
        self.quantum = self.quantum.max(bytes / QUANTUM_SHARE);
        let index = self.flows.awake(waiting.flow);
        let flow = self.flows.get_mut(index);
        flow.bytes += bytes;
        flow.slots[class] += 1;
        self.links.push_last(&mut flow.packets, waiting);
        self.sorted += 1;
    }

    fn take_first_of(&mut self, index: usize) -> Option<Waiting<P>> {
        let flow = self.flows.get_mut(index);
        let waiting = self.links.pop_first(&mut flow.packets)?;
        let (bytes, class) = (waiting.packet.bytes(), waiting.packet.class());
        flow.bytes -= bytes;
        flow.slots[class] -= 1;
        self.len -= 1;
        self.sorted -= 1;
        self.bytes -= bytes;
        self.slots[class] -= 1;
        Some(waiting)
    }

    #[cold]
    fn cut_back(&mut self, bounds: &Bounds) {
        self.sort_arrived();
        while self.bytes > bounds.bytes_max {
            let enough = bounds.bytes_max - bounds.bytes_max / CUT_BACK_SHARE;
            let fattest = self.flows.fattest(|flow| flow.bytes);
            self.drop_of(fattest, |queue| queue.bytes <= enough);
        }
        for class in 0..CLASSES {
            let slots_max = bounds.slots_max[class];
            while self.slots[class] > slots_max {
                let enough = slots_max - slots_max / CUT_BACK_SHARE;
                let fattest = self.flows.fattest(|flow| flow.slots[class]);
                self.drop_of(fattest, |queue| queue.slots[class] <= enough);
            }
        }
    }

    /// From the front: that is what has waited longest, and whose loss its sender hears of first.
    fn drop_of(&mut self, flow: Option<usize>, enough: impl Fn(&Self) -> bool) {
        let flow = flow.expect("something waits, or no bound would be exceeded");
        for _ in 0..CUT_BACK_PACKETS_MAX {
            match self.take_first_of(flow) {
                Some(waiting) => self.links.push_last(&mut self.dropped, waiting),
                None => return,
            }
            if enough(self) {
                return;
            }
        }
    }

    /// Gives the owner of the memory a chance to move packets that wait into slots that suit them better.
    pub fn repack(&mut self, mut repack: impl FnMut(&mut P)) {
        assert!(self.dropped.is_empty(), "what was dropped is taken first");
        self.sort_arrived();
        for waiting in self.links.iter_mut() {
            let before = waiting.packet.class();
            repack(&mut waiting.packet);
            let after = waiting.packet.class();
            if before != after
                && let Some(flow) = self.flows.find(waiting.flow)
            {
                for slots in [&mut self.slots, &mut flow.slots] {
                    slots[before] -= 1;
                    slots[after] += 1;
                }
            }
        }
    }

    /// Takes out everything, in no order.
    pub fn drain(&mut self) -> impl Iterator<Item = P> + use<P> {
        mem::take(self).links.into_packets()
    }

    /// Whether nobody is told that packets wait for too long, as that is about to change by itself.
    #[inline]
    pub fn be_lenient(&mut self, is_lenient: bool) {
        self.is_lenient = is_lenient;
    }

    /// Gives memory back if nothing waits and nothing had to lately.
    pub fn release_memory(&mut self, now: Instant) {
        if self.links.has_memory()
            && self.len == 0
            && self.dropped.is_empty()
            && now.since(self.sorted_at) > codel::MEMORY
        {
            *self = Self::new();
        }
    }

    /// How many bytes wait.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many slots of each class are held by what waits.
    #[inline]
    pub fn slots(&self) -> [usize; CLASSES] {
        self.slots
    }

    /// How many packets wait.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether packets wait because there was no room for them, and so would one that came now.
    #[inline]
    pub fn is_backlogged(&self) -> bool {
        self.sorted != 0
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
