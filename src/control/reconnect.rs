//! When to try again: a policy without a clock.
//!
//! An outage begins with eager rounds, one a second for ten minutes, because a firewall or a server that is back
//! should be noticed at once and TCP's own retransmissions back off too far. After that, one round every 15 seconds,
//! forever. A change of the host's network starts over with a round at once.

use std::time::{Duration, Instant};

/// How long an outage is met with eager rounds.
pub const EAGER_SPAN: Duration = Duration::from_secs(10 * 60);
/// From one eager round to the next.
pub const EAGER_INTERVAL: Duration = Duration::from_secs(1);
/// From one round to the next in a long outage.
pub const PATIENT_INTERVAL: Duration = Duration::from_secs(15);
/// The least time between two rounds, however often the network changes.
pub const ROUND_INTERVAL_MIN: Duration = Duration::from_millis(250);

/// One outage, or the time before the first connection.
#[derive(Clone, Debug)]
pub struct Reconnect {
    /// When the outage, or the newest hope of its end, began.
    eager_since: Instant,
    last_round: Option<Instant>,
    due: Instant,
}

impl Reconnect {
    /// An outage that begins `now`; its first round is due at once.
    pub fn new(now: Instant) -> Self {
        Reconnect {
            eager_since: now,
            last_round: None,
            due: now,
        }
    }

    /// When the next round is to start. Never in the far future, never none.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// A round of attempts was started.
    pub fn round_started(&mut self, now: Instant) {
        let eager = now.saturating_duration_since(self.eager_since) < EAGER_SPAN;
        self.last_round = Some(now);
        self.due = now
            + if eager {
                EAGER_INTERVAL
            } else {
                PATIENT_INTERVAL
            };
    }

    /// An address, a link or a route of the host changed: what was out of reach may be reachable now.
    pub fn network_changed(&mut self, now: Instant) {
        self.eager_since = now;
        let earliest = self
            .last_round
            .map_or(now, |last| (last + ROUND_INTERVAL_MIN).max(now));
        self.due = self.due.min(earliest);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Starts every round exactly when it is due, for `span`.
    fn rounds(policy: &mut Reconnect, from: Instant, span: Duration) -> Vec<Duration> {
        let mut rounds = Vec::new();
        while policy.due() < from + span {
            let now = policy.due();
            rounds.push(now - from);
            policy.round_started(now);
        }
        rounds
    }

    #[test]
    fn the_first_round_is_at_once() {
        let start = Instant::now();
        assert_eq!(Reconnect::new(start).due(), start);
    }

    #[test]
    fn ten_minutes_of_eager_rounds_then_patient_ones_for_as_long_as_it_takes() {
        let start = Instant::now();
        let mut policy = Reconnect::new(start);
        let rounds = rounds(&mut policy, start, Duration::from_secs(24 * 3600));
        let eager = rounds.iter().filter(|at| **at < EAGER_SPAN).count();
        assert_eq!(eager, 600);
        for pair in rounds.windows(2) {
            let expected = if pair[0] < EAGER_SPAN {
                EAGER_INTERVAL
            } else {
                PATIENT_INTERVAL
            };
            assert_eq!(pair[1] - pair[0], expected);
        }
    }

    #[test]
    fn a_network_change_in_a_long_outage_is_used_at_once_and_makes_it_eager_again() {
        let start = Instant::now();
        let mut policy = Reconnect::new(start);
        rounds(&mut policy, start, Duration::from_secs(3600));
        let change = start + Duration::from_secs(3590);
        policy.network_changed(change);
        assert_eq!(policy.due(), change);
        policy.round_started(change);
        assert_eq!(policy.due(), change + EAGER_INTERVAL);
    }

    proptest! {
        #[test]
        fn no_storm_of_changes_makes_a_storm_of_rounds(changes in prop::collection::vec(0u64..5_000, 0..200)) {
            let start = Instant::now();
            let mut policy = Reconnect::new(start);
            let mut changes: Vec<_> = changes.iter().map(|ms| start + Duration::from_millis(*ms)).collect();
            changes.sort();
            let mut starts: Vec<Instant> = Vec::new();
            for change in changes {
                while policy.due() <= change {
                    starts.push(policy.due());
                    policy.round_started(policy.due());
                }
                policy.network_changed(change);
                prop_assert!(policy.due() >= change || starts.is_empty());
                prop_assert!(policy.due() <= change + EAGER_INTERVAL);
            }
            for pair in starts.windows(2) {
                prop_assert!(pair[1] - pair[0] >= ROUND_INTERVAL_MIN);
            }
        }
    }
}
