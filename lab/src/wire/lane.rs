//! One direction of a wire as a value: packets go in and come out, and time is an argument.
//!
//! A packet's way: its fate is drawn ([`super::fate`]); it finds room in the queue or is dropped; it leaves the
//! queue at the rate; then it is lost, or travels for the delay and arrives.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use super::conditions::{Change, Conditions};
use super::fate::{Chance, Fate};

const BITS_PER_BYTE: u128 = 8;
const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

/// One direction of a wire: a queue, a rate, a distance and a fate for each packet.
///
/// All times are since the wire was made, and never go back; one that does counts as the latest.
#[derive(Debug)]
pub struct Lane<P> {
    conditions: Conditions,
    chance: Chance,
    /// Entries of the timetable that have happened.
    changes: usize,
    /// Everything up to here has happened.
    now: Duration,
    is_cut: bool,
    waiting: VecDeque<Waiting<P>>,
    waiting_bytes: u64,
    /// How much of the first packet that waits has left, in bits times a second's nanoseconds, so that it is exact.
    left: u128,
    travelling: BinaryHeap<Reverse<Travelling<P>>>,
    /// When the latest packet arrives that is not overtaken.
    latest: Duration,
    counts: Counts,
}

/// What has become of packets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Counts {
    /// Packets that came.
    pub offered: u64,
    /// Packets that found no room in the queue.
    pub dropped: u64,
    /// Packets that were lost by chance.
    pub lost: u64,
    /// Packets that were lost in an outage.
    pub cut: u64,
    /// Packets that became two.
    pub doubled: u64,
    /// Packets that arrived, both of those that became two.
    pub delivered: u64,
}

#[derive(Debug)]
struct Waiting<P> {
    packet: P,
    bytes: u64,
    fate: Fate,
}

#[derive(Debug)]
struct Travelling<P> {
    arrives: Duration,
    number: u64,
    packet: P,
}

impl<P: Clone> Lane<P> {
    /// An empty lane at time zero.
    ///
    /// # Panics
    /// When the conditions are not valid: see [`Conditions::validate`].
    #[must_use]
    pub fn new(conditions: Conditions, seed: u64) -> Lane<P> {
        conditions.validate().expect("validated conditions");
        Lane {
            conditions,
            chance: Chance::new(seed),
            changes: 0,
            now: Duration::ZERO,
            is_cut: false,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            left: 0,
            travelling: BinaryHeap::new(),
            latest: Duration::ZERO,
            counts: Counts::default(),
        }
    }

    /// A packet of `bytes` comes at time `now`.
    pub fn push(&mut self, now: Duration, bytes: usize, packet: P) {
        self.advance(now);
        let bytes = bytes as u64;
        let fate = self.chance.next(&self.conditions);
        self.counts.offered += 1;
        let waiting = Waiting {
            packet,
            bytes,
            fate,
        };
        if self.conditions.rate_bits_per_second.is_none() {
            return self.leave(waiting);
        }
        let room = self
            .conditions
            .queue_bytes
            .saturating_sub(self.waiting_bytes);
        if bytes > room && !self.waiting.is_empty() {
            self.counts.dropped += 1;
            return;
        }
        self.waiting_bytes += bytes;
        self.waiting.push_back(waiting);
    }

    /// The next packet that has arrived by `now`, and when it did.
    pub fn pop(&mut self, now: Duration) -> Option<(Duration, P)> {
        self.advance(now);
        let Reverse(first) = self.travelling.peek()?;
        if first.arrives > self.now {
            return None;
        }
        self.counts.delivered += 1;
        let Reverse(first) = self.travelling.pop()?;
        Some((first.arrives, first.packet))
    }

    /// When [`Lane::pop`] may have something next, as things are; `None` while nothing is on its way or no packet leaves.
    #[must_use]
    pub fn next_at(&self) -> Option<Duration> {
        let arrival = self.travelling.peek().map(|Reverse(first)| first.arrives);
        let change = self.conditions.timetable.entry(self.changes);
        let change = change
            .map(|(at, _)| at)
            .filter(|_| !self.waiting.is_empty());
        [arrival, change, self.next_leaves()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether nothing is on its way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.travelling.is_empty()
    }

    /// How many packets are on their way: in the queue or behind it.
    #[must_use]
    pub fn held(&self) -> usize {
        self.waiting.len() + self.travelling.len()
    }

    /// Bytes of packets in the queue, the one that is leaving included.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes
    }

    /// What has become of packets so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Makes a change at time `now` that is not in the timetable.
    ///
    /// # Panics
    /// When the change asks for something out of range.
    pub fn change(&mut self, now: Duration, change: Change) {
        change.validate().expect("a validated change");
        self.advance(now);
        self.apply(change);
    }

    /// Lets happen what happens up to `now`, in order.
    fn advance(&mut self, now: Duration) {
        loop {
            let leaves = self.next_leaves().filter(|at| *at <= now);
            let change = self.conditions.timetable.entry(self.changes);
            let change = change.filter(|(at, _)| *at <= now);
            match (leaves, change) {
                (Some(leaves), change) if change.is_none_or(|(at, _)| leaves <= at) => {
                    self.pass(leaves);
                    self.leave_first();
                }
                (_, Some((at, change))) => {
                    self.pass(at);
                    self.changes += 1;
                    self.apply(change);
                }
                _ => return self.pass(now),
            }
        }
    }

    /// Lets time pass in which nothing but the first packet moves.
    fn pass(&mut self, to: Duration) {
        let passed = to.saturating_sub(self.now);
        self.now = self.now.max(to);
        if !self.waiting.is_empty() {
            let rate = self.conditions.rate_bits_per_second.unwrap_or_default();
            self.left += u128::from(rate) * passed.as_nanos();
        }
    }

    /// When the first packet has left the queue, if nothing changes.
    fn next_leaves(&self) -> Option<Duration> {
        let first = self.waiting.front()?;
        let rate = u128::from(self.conditions.rate_bits_per_second?);
        let rest = needed(first.bytes).saturating_sub(self.left);
        let nanoseconds = rest.checked_add(rate.checked_sub(1)?)? / rate;
        Some(self.now + Duration::from_nanos(u64::try_from(nanoseconds).ok()?))
    }

    fn leave_first(&mut self) {
        if let Some(first) = self.waiting.pop_front() {
            self.waiting_bytes -= first.bytes;
            self.left = match self.waiting.is_empty() {
                true => 0,
                // A nanosecond is the least that can pass, and the next packet gets what is left of it.
                false => self.left.saturating_sub(needed(first.bytes)),
            };
            self.leave(first);
        }
    }

    /// A packet is out of the queue now.
    fn leave(&mut self, packet: Waiting<P>) {
        let Waiting { packet, fate, .. } = packet;
        if self.is_cut {
            self.counts.cut += 1;
            return;
        }
        if fate.is_lost {
            self.counts.lost += 1;
            return;
        }
        let jitter = self.chance.jitter(self.now, self.conditions.jitter);
        let in_order = (self.now + self.conditions.delay + jitter).max(self.latest);
        let arrives = match self.conditions.reordering {
            Some(reordering) if fate.is_late => in_order + reordering.by,
            _ => {
                self.latest = in_order;
                in_order
            }
        };
        if fate.is_doubled {
            self.counts.doubled += 1;
            self.travel(arrives, packet.clone());
        }
        self.travel(arrives, packet);
    }

    fn travel(&mut self, arrives: Duration, packet: P) {
        let counts = &self.counts;
        // Grows with every packet that sets out, so that packets of one moment stay in order.
        let number = counts.delivered + self.travelling.len() as u64;
        self.travelling.push(Reverse(Travelling {
            arrives,
            number,
            packet,
        }));
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Rate(rate) => {
                self.conditions.rate_bits_per_second = rate;
                if rate.is_none() {
                    while !self.waiting.is_empty() {
                        self.leave_first();
                    }
                }
            }
            Change::Delay(delay) => self.conditions.delay = delay,
            Change::Loss(loss) => self.conditions.loss = loss,
            Change::Cut => self.is_cut = true,
            Change::Mend => self.is_cut = false,
        }
    }
}

/// What it takes for this many bytes to leave, in the unit of [`Lane::left`].
fn needed(bytes: u64) -> u128 {
    u128::from(bytes) * BITS_PER_BYTE * NANOSECONDS_PER_SECOND
}

impl<P> Ord for Travelling<P> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.arrives, self.number).cmp(&(other.arrives, other.number))
    }
}

impl<P> PartialOrd for Travelling<P> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<P> PartialEq for Travelling<P> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<P> Eq for Travelling<P> {}

#[cfg(test)]
mod tests;
