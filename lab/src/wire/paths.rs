//! What lies between the firewall and the internet in the topologies that have a wire there. The near end is the
//! firewall's: "there" is up, "back" is down.

use std::time::Duration;

use super::{Change, Conditions, Loss, Plan, Timetable};

/// Any number will do; it is fixed so that a topology is the same thing every time.
const SEED: u64 = 77;
const MEGA: u64 = 1_000_000;

/// 100 Mbit/s, a round trip of 40 ms, and one packet in a hundred is lost in either direction. The queue holds what
/// the path holds.
#[must_use]
pub fn lossy() -> Plan {
    let conditions = Conditions {
        rate_bits_per_second: Some(100 * MEGA),
        delay: Duration::from_millis(20),
        loss: Loss::Random(0.01),
        queue_bytes: 500_000,
        ..Conditions::default()
    };
    Plan::symmetric(SEED, conditions)
}

/// 500 Mbit/s and a round trip of 100 ms. The queue holds what the path holds.
#[must_use]
pub fn long_fat() -> Plan {
    let conditions = Conditions {
        rate_bits_per_second: Some(500 * MEGA),
        delay: Duration::from_millis(50),
        queue_bytes: 6_250_000,
        ..Conditions::default()
    };
    Plan::symmetric(SEED, conditions)
}

/// 20 Mbit/s and a round trip of 40 ms that becomes ten times as long when somebody fills the queue of a megabyte.
#[must_use]
pub fn bufferbloat() -> Plan {
    let conditions = Conditions {
        rate_bits_per_second: Some(20 * MEGA),
        delay: Duration::from_millis(20),
        queue_bytes: 1_000_000,
        ..Conditions::default()
    };
    Plan::symmetric(SEED, conditions)
}

/// Somebody on a train: rate and delay change every few seconds, nothing moves for a moment when the cell changes,
/// and a few packets are lost, some at a time. Down is faster than up. All of it repeats after [`MOBILE_PERIOD`].
#[must_use]
pub fn mobile() -> Plan {
    /// Seconds, Mbit/s down, Mbit/s up, milliseconds of one way.
    const PLACES: [(u64, u64, u64, u64); 5] = [
        (0, 30, 10, 25),
        (3, 8, 3, 40),
        (6, 50, 15, 20),
        (10, 4, 2, 60),
        (13, 20, 8, 30),
    ];
    let conditions = |rate: fn(&(u64, u64, u64, u64)) -> u64| Conditions {
        jitter: Duration::from_millis(8),
        loss: Loss::Burst {
            begins: 0.0005,
            ends: 0.3,
            good: 0.0,
            bad: 0.5,
        },
        queue_bytes: 500_000,
        timetable: Timetable {
            changes: PLACES
                .iter()
                .flat_map(|place| {
                    let arrives = Duration::from_secs(place.0);
                    [
                        (arrives, Change::Rate(Some(0))),
                        (arrives, Change::Delay(Duration::from_millis(place.3))),
                        (arrives + HANDOVER, Change::Rate(Some(rate(place) * MEGA))),
                    ]
                })
                .collect(),
            period: Some(MOBILE_PERIOD),
        },
        ..Conditions::default()
    };
    Plan {
        seed: SEED,
        there: conditions(|place| place.2),
        back: conditions(|place| place.1),
    }
}

/// A round trip of 20 ms, and nothing else but what [`super::Wire::cut`] does to it.
#[must_use]
pub fn outage() -> Plan {
    let conditions = Conditions {
        delay: Duration::from_millis(10),
        ..Conditions::default()
    };
    Plan::symmetric(SEED, conditions)
}

/// After this [`mobile`] begins again.
pub const MOBILE_PERIOD: Duration = Duration::from_secs(16);
/// How long nothing moves when the cell changes.
const HANDOVER: Duration = Duration::from_millis(150);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Lane;

    #[test]
    fn paths_make_sense() {
        for plan in [lossy(), long_fat(), bufferbloat(), mobile(), outage()] {
            plan.there.validate().expect("sound");
            plan.back.validate().expect("sound");
        }
    }

    /// What arrives in each second from a sender of 100 Mbit/s, in Mbit/s.
    fn rates(conditions: Conditions, seconds: u64) -> Vec<f64> {
        const FRAME_BYTES: usize = 1250;
        let mut lane = Lane::new(conditions, SEED);
        let mut bits = vec![0.0; usize::try_from(seconds).expect("few")];
        for packet in 0..seconds * 10_000 {
            let now = Duration::from_micros(100 * packet);
            lane.push(now, FRAME_BYTES, ());
            while let Some((arrived, ())) = lane.pop(now) {
                bits[arrived.as_secs() as usize] += FRAME_BYTES as f64 * 8.0;
            }
        }
        bits.iter().map(|bits| bits / MEGA as f64).collect()
    }

    #[test]
    fn a_train_passes_good_and_bad_places_again_and_again() {
        let rates = rates(mobile().back, 32);
        for (second, expected) in [(2, 30.0), (5, 8.0), (8, 50.0), (12, 4.0), (15, 20.0)] {
            for lap in [0, 16] {
                let rate: f64 = rates[second + lap];
                // What the jitter holds up in one second may come in the next.
                assert!(
                    (expected * 0.9..=expected * 1.01).contains(&rate),
                    "{rate} in second {second}"
                );
            }
        }
    }

    #[test]
    fn a_lossy_path_loses_a_hundredth() {
        let rates = rates(lossy().there, 10);
        let mean = rates[1..].iter().sum::<f64>() / 9.0;
        assert!((98.7..99.3).contains(&mean), "{mean}");
    }
}
