//! Controlled delay (RFC 8289): when a flow's packets have waited for too long, for too long.

use std::time::Duration;

use super::SEGMENT_BYTES;
use crate::proto::timer::Instant;

/// The wait that is put up with for good (RFC 8289 section 4.4).
pub const TARGET: Duration = Duration::from_millis(5);
/// For how long a longer wait is put up with: about the longest usual round trip (RFC 8289 section 4.3).
pub const INTERVAL: Duration = Duration::from_millis(100);
/// A flow that misbehaves again within so many intervals is taken up where it was left.
const MEMORY_INTERVALS: u32 = 16;
/// After this a flow's history says nothing any more.
pub(super) const MEMORY: Duration = INTERVAL.saturating_mul(MEMORY_INTERVALS);

/// What is remembered of one flow.
#[derive(Clone, Debug, Default)]
pub(super) struct Codel {
    /// When the wait will have been above the target for an interval; `None` while it is below.
    patience_ends: Option<Instant>,
    /// Signals are being given, the next one at `signal_next`.
    signalling: bool,
    signal_next: Instant,
    /// Signals of this episode.
    count: u32,
    /// What `count` was at its beginning.
    count_first: u32,
}

impl Codel {
    /// Whether a packet that has waited for `sojourn` has to tell its sender, with `behind` bytes of the flow behind its
    /// first segment. If it can, [`Codel::signalled`] follows.
    ///
    /// RFC 8289 leaves alone a queue that holds less than an MTU besides; a super-packet's own segments count, since
    /// they would be packets of their own on any other link.
    #[inline]
    pub(super) fn is_due(&mut self, now: Instant, sojourn: Duration, behind: usize) -> bool {
        if sojourn < TARGET || behind < SEGMENT_BYTES {
            self.patience_ends = None;
            self.signalling = false;
            return false;
        }
        let ends = *self.patience_ends.get_or_insert(now + INTERVAL);
        if self.signalling {
            now >= self.signal_next
        } else {
            now >= ends
        }
    }

    /// The packet told its sender.
    pub(super) fn signalled(&mut self, now: Instant) {
        if self.signalling {
            self.count = self.count.saturating_add(1);
            // Those that were due while nothing could leave are not made up for.
            let is_late = now.since(self.signal_next) > INTERVAL;
            let last = if is_late { now } else { self.signal_next };
            self.signal_next = after(last, self.count);
            return;
        }
        let given = self.count - self.count_first;
        let recently = now.since(self.signal_next) < MEMORY;
        self.count = if given > 1 && recently { given } else { 1 };
        self.count_first = self.count;
        self.signalling = true;
        self.signal_next = after(now, self.count);
    }
}

/// The control law: signals come ever faster, by the square root of their number.
fn after(last: Instant, count: u32) -> Instant {
    last + INTERVAL.div_f64(f64::from(count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_nanos(milliseconds * 1_000_000)
    }

    const LONG: Duration = TARGET;

    /// One packet a millisecond, all of which wait for too long; when signals are due.
    fn signals(codel: &mut Codel, from: u64, to: u64) -> Vec<u64> {
        (from..to)
            .filter(|time| {
                let due = codel.is_due(at(*time), LONG, SEGMENT_BYTES);
                if due {
                    codel.signalled(at(*time));
                }
                due
            })
            .collect()
    }

    #[test]
    fn signals_begin_after_an_interval_and_come_ever_faster() {
        let mut codel = Codel::default();
        // 100, then 100/sqrt(1), 100/sqrt(2), 100/sqrt(3)... later.
        assert_eq!(signals(&mut codel, 0, 430), [100, 200, 271, 329, 379, 424]);
    }

    #[test]
    fn signals_missed_in_a_pause_are_not_made_up_for() {
        let mut codel = Codel::default();
        assert_eq!(signals(&mut codel, 0, 201), [100, 200]);
        assert_eq!(signals(&mut codel, 1000, 1110), [1000, 1058, 1108]);
    }

    #[test]
    fn one_short_wait_or_little_behind_ends_an_episode() {
        for (sojourn, behind) in [
            (LONG - Duration::from_nanos(1), usize::MAX),
            (LONG, SEGMENT_BYTES - 1),
        ] {
            let mut codel = Codel::default();
            assert_eq!(signals(&mut codel, 0, 101), [100]);
            assert!(!codel.is_due(at(101), sojourn, behind));
            assert_eq!(signals(&mut codel, 102, 203), [202]);
        }
    }

    #[test]
    fn an_episode_soon_after_another_begins_with_its_pace() {
        let short = |codel: &mut Codel, time| {
            assert!(!codel.is_due(at(time), Duration::ZERO, SEGMENT_BYTES));
        };
        let mut codel = Codel::default();
        assert_eq!(signals(&mut codel, 0, 430).len(), 6);
        short(&mut codel, 430);
        // Five more than at its beginning: 100/sqrt(5) from the first to the second, then 100/sqrt(6).
        assert_eq!(signals(&mut codel, 500, 690), [600, 645, 686]);
        short(&mut codel, 690);
        let later = 690 + MEMORY.as_millis() as u64;
        let again = signals(&mut codel, later, later + 201);
        assert_eq!(again, [later + 100, later + 200]);
    }

    #[test]
    fn who_cannot_tell_leaves_it_to_the_next() {
        let mut codel = Codel::default();
        assert_eq!(signals(&mut codel, 0, 100), [0; 0]);
        for time in [100, 101, 102] {
            assert!(codel.is_due(at(time), LONG, SEGMENT_BYTES), "{time}");
        }
        codel.signalled(at(102));
        assert!(!codel.is_due(at(103), LONG, SEGMENT_BYTES));
    }
}
