//! Time as an argument: a monotonic instant that the caller reads from its own clock.

use std::ops::{Add, AddAssign};
use std::time::Duration;

/// A point on the caller's monotonic clock, in nanoseconds since an origin of the caller's choice.
///
/// `proto` never reads a clock: whoever owns the loop reads it once a turn and passes it down, and tests make time
/// up. All arithmetic saturates, so no input can make it panic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The clock's origin.
    pub const ZERO: Instant = Instant(0);

    /// The instant `nanos` nanoseconds after the origin.
    #[inline]
    pub const fn from_nanos(nanos: u64) -> Self {
        Instant(nanos)
    }

    /// The instant `since_origin` after the origin.
    #[inline]
    pub fn from_duration(since_origin: Duration) -> Self {
        Instant(nanos_of(since_origin))
    }

    /// Nanoseconds since the origin.
    #[inline]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero if it is not after it.
    #[inline]
    pub const fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    #[inline]
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(nanos_of(duration)))
    }
}

impl AddAssign<Duration> for Instant {
    #[inline]
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

/// A duration of more than 584 years counts as 584 years.
#[inline]
fn nanos_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_later_instant_is_after_an_earlier_one() {
        let start = Instant::from_nanos(5);
        let end = start + Duration::from_millis(1);
        assert_eq!(end.as_nanos(), 1_000_005);
        assert_eq!(end.since(start), Duration::from_millis(1));
        assert_eq!(start.since(end), Duration::ZERO);
        assert!(end > start);
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(
            Instant::from_nanos(1) + Duration::MAX,
            Instant::from_nanos(u64::MAX)
        );
        assert_eq!(Instant::from_duration(Duration::MAX).as_nanos(), u64::MAX);
    }

    proptest! {
        #[test]
        fn since_undoes_add(start in 0..u64::MAX / 2, nanos in 0..u64::MAX / 2) {
            let start = Instant::from_nanos(start);
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!((start + duration).since(start), duration);
        }
    }
}
