//! What one peer may take of a worker: packet memory, and work that its bytes do not pay for.
//!
//! A worker serves all its peers from one packet memory and with one thread. As long as there is enough of both, nobody is
//! limited. When memory is short, a peer that holds more than its share gets no more and gives back what it can do without
//! ([`Supply`]). Work is paid for by bytes received: bulk transfers never owe anything, and streams of tiny records or packets
//! are put off when the peer owes too much ([`WorkBucket`]).
//!
//! All of it counts per peer and worker: a peer whose connections are on several workers has a share of each.

use std::time::Duration;

use super::timer::Instant;

/// Names a peer (the holder of a token) among all peers of the process. Control chooses the number.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PeerId(pub u32);

/// Control capsules of one connection that may wait for the control thread; further ones are refused.
pub const EVENTS_PER_CONNECTION_MAX: usize = 4;
/// Bytes of control capsules that may wait to be sent on one connection; further ones are refused.
pub const CONTROL_BYTES_MAX: usize = 64 * 1024;
/// Connections of one peer that may exist at a time, closing ones included: twice as many as a session has.
pub const CONNECTIONS_PER_PEER_MAX: usize = 34;

/// The share of a class of memory that one of `holders` peers may hold when memory is short, in slots. One share more than
/// there are holders, so that a peer that comes finds something. At least two: one for each direction.
pub const fn share_slots(slots: usize, holders: usize) -> usize {
    let share = slots / (holders + 1);
    if share < SHARE_SLOTS_MIN {
        SHARE_SLOTS_MIN
    } else {
        share
    }
}

/// The least share.
pub const SHARE_SLOTS_MIN: usize = 2;

/// One class of packet memory and what a peer holds of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Supply {
    /// Slots of the class.
    pub slots: usize,
    /// Slots that nobody holds.
    pub free: usize,
    /// Free slots below which memory counts as short.
    pub short_below: usize,
    /// Slots that the peer holds.
    pub held: usize,
    /// Peers that hold any slot of the class, this one included.
    pub holders: usize,
}

impl Supply {
    /// Whether the peer may take one more slot.
    pub const fn may_take(&self) -> bool {
        self.free > 0
            && (self.free >= self.short_below || self.held < share_slots(self.slots, self.holders))
    }

    /// Whether the peer is to give back what it can do without.
    pub const fn must_give_back(&self) -> bool {
        self.free < self.short_below && self.held > share_slots(self.slots, self.holders)
    }
}

/// Received bytes that pay for one unit of work. An ordinary packet of 1,500 bytes in a record of its own pays for all but a
/// fiftieth of a unit.
pub const BYTES_PER_UNIT: u32 = 512;
/// What a packet costs beside its capsule: the kernel forwards it.
pub const UNITS_PER_PACKET: u32 = 1;
/// Segments of a super-packet that cost one unit: the kernel may have to cut them, which is cheaper than a packet each.
pub const SEGMENTS_PER_UNIT: u32 = 16;
/// Units that a peer may spend at once beyond what its bytes pay for.
pub const UNITS_MAX: i32 = 512;
/// Units that a peer gets every second for nothing.
pub const UNITS_PER_SECOND: u32 = 64_000;
/// The most that a peer can come to owe: one record of the shortest packets, twice.
const DEBT_MAX: i32 = -4096;

/// Work that a peer may still cause. One unit is about a microsecond: a record, a capsule, a packet,
/// [`SEGMENTS_PER_UNIT`] segments.
#[derive(Clone, Copy, Debug)]
pub struct WorkBucket {
    units: i32,
    /// Received bytes that have not paid for a whole unit yet.
    bytes: u32,
    refilled: Instant,
}

impl WorkBucket {
    /// A full one.
    pub const fn new(now: Instant) -> Self {
        Self {
            units: UNITS_MAX,
            bytes: 0,
            refilled: now,
        }
    }

    /// Adds what has accrued since the last call.
    pub fn refill(&mut self, now: Instant) {
        let nanos = now.since(self.refilled).as_nanos();
        let units = nanos * u128::from(UNITS_PER_SECOND) / Duration::from_secs(1).as_nanos();
        if units > 0 {
            self.refilled = now;
            self.add(i32::try_from(units).unwrap_or(i32::MAX));
        }
    }

    /// Adds what a received record of so many bytes pays for.
    #[inline]
    pub fn pay(&mut self, bytes: u32) {
        let bytes = self.bytes.saturating_add(bytes);
        self.bytes = bytes % BYTES_PER_UNIT;
        self.add(i32::try_from(bytes / BYTES_PER_UNIT).unwrap_or(i32::MAX));
    }

    /// Takes what work costs.
    #[inline]
    pub fn spend(&mut self, units: u32) {
        let units = i32::try_from(units).unwrap_or(i32::MAX);
        self.units = self.units.saturating_sub(units).max(DEBT_MAX);
    }

    /// Lets the peer go on, as nobody else has anything to do.
    pub fn fill(&mut self, now: Instant) {
        self.units = UNITS_MAX;
        self.refilled = now;
    }

    /// Whether the peer's work is to be put off.
    #[inline]
    pub const fn is_spent(&self) -> bool {
        self.units <= 0
    }

    #[inline]
    fn add(&mut self, units: i32) {
        self.units = self.units.saturating_add(units).min(UNITS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(microseconds: u64) -> Instant {
        Instant::from_nanos(microseconds * 1000)
    }

    fn supply(free: usize, held: usize, holders: usize) -> Supply {
        Supply {
            slots: 16,
            free,
            short_below: 5,
            held,
            holders,
        }
    }

    #[test]
    fn nobody_is_limited_while_there_is_enough() {
        assert!(supply(5, 11, 1).may_take());
        assert!(!supply(5, 11, 1).must_give_back());
    }

    #[test]
    fn when_memory_is_short_a_peer_has_its_share_and_no_more() {
        assert!(!supply(4, 8, 1).may_take(), "half, for one alone");
        assert!(supply(4, 7, 1).may_take());
        assert!(supply(4, 12, 1).must_give_back());
        assert!(!supply(4, 8, 1).must_give_back());
        // A second peer finds room beside it.
        assert!(supply(4, 0, 2).may_take() && supply(4, 4, 2).may_take());
        assert!(!supply(4, 5, 2).may_take());
        assert!(!supply(0, 0, 2).may_take(), "there is none");
        assert!(supply(1, 1, 100).may_take(), "one for each direction");
    }

    #[test]
    fn bulk_transfers_pay_for_themselves() {
        let mut bucket = WorkBucket::new(at(0));
        for _ in 0..100_000 {
            // A record of 16 KiB, a quarter of a super-packet of 45 segments.
            bucket.pay(16_406);
            bucket.spend(1 + 1 + UNITS_PER_PACKET + 45 / SEGMENTS_PER_UNIT / 4);
        }
        assert!(!bucket.is_spent());
        // UDP of 64 bytes, 240,000 packets a second, eight at a time in a super-packet.
        for number in 0..30_000 {
            bucket.refill(at(33 * number));
            bucket.pay(8 * 64 + 28 + 10 + 4);
            bucket.spend(1 + UNITS_PER_PACKET + 8 / SEGMENTS_PER_UNIT);
        }
        assert!(!bucket.is_spent());
        let mut bucket = WorkBucket::new(at(0));
        // A record, a capsule and a packet of 1,500 bytes, 100,000 times a second.
        for number in 0..100_000 {
            bucket.refill(at(10 * number));
            bucket.pay(1_500 + 3 + 22);
            bucket.spend(1 + 1 + UNITS_PER_PACKET);
        }
        assert!(!bucket.is_spent());
    }

    #[test]
    fn tiny_records_are_put_off_and_may_go_on_later() {
        let mut bucket = WorkBucket::new(at(0));
        let mut records = 0;
        while !bucket.is_spent() {
            bucket.pay(23);
            bucket.spend(2);
            records += 1;
        }
        assert!((256..300).contains(&records), "{records}");
        bucket.refill(at(10));
        assert!(bucket.is_spent(), "nothing has accrued yet");
        bucket.refill(at(1000));
        assert!(!bucket.is_spent());
        bucket.spend(1_000_000);
        bucket.refill(at(1_000_000));
        assert!(!bucket.is_spent(), "debts are bounded");
        bucket.spend(1_000_000);
        bucket.fill(at(1_000_000));
        assert!(!bucket.is_spent());
    }

    #[test]
    fn short_intervals_add_up() {
        let mut bucket = WorkBucket::new(at(0));
        bucket.spend(UNITS_MAX as u32 + 100);
        for microsecond in 0..10_000 {
            bucket.refill(at(microsecond));
        }
        assert!(!bucket.is_spent(), "640 units have accrued in 10 ms");
    }

    proptest! {
        /// Whatever each of the holders takes and gives: when memory is short a peer below its share finds a slot as long
        /// as there is one, and one above it never takes any.
        #[test]
        fn shares_leave_room(slots in 6_usize..200, free in 0_usize..200, held in 0_usize..200, holders in 1_usize..50) {
            let free = free.min(slots);
            let supply = Supply { slots, free, short_below: slots / 3, held, holders };
            let share = share_slots(slots, holders);
            prop_assert!(share >= SHARE_SLOTS_MIN);
            prop_assert!(share == SHARE_SLOTS_MIN || share * (holders + 1) <= slots);
            if free < supply.short_below {
                prop_assert_eq!(supply.may_take(), free > 0 && held < share);
                prop_assert_eq!(supply.must_give_back(), held > share);
            } else {
                prop_assert_eq!(supply.may_take(), free > 0);
                prop_assert!(!supply.must_give_back());
            }
        }

        #[test]
        fn a_bucket_stays_within_its_bounds(steps in prop::collection::vec((0_u8..4, any::<u32>()), 1..200)) {
            let mut bucket = WorkBucket::new(Instant::ZERO);
            let mut now = Instant::ZERO;
            for (kind, amount) in steps {
                match kind {
                    0 => bucket.pay(amount),
                    1 => bucket.spend(amount),
                    2 => bucket.fill(now),
                    _ => {
                        now += Duration::from_nanos(u64::from(amount) << 20);
                        bucket.refill(now);
                    }
                }
                prop_assert!((DEBT_MAX..=UNITS_MAX).contains(&bucket.units));
            }
        }
    }
}
