//! Chance, by a seed: what becomes of the n-th packet, whenever it comes, and how long the way is at a time.

use std::time::Duration;

use super::conditions::{Conditions, JITTER_INTERVAL, Loss};

/// What chance has decided for a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Fate {
    pub(super) is_lost: bool,
    pub(super) is_late: bool,
    pub(super) is_doubled: bool,
}

/// Decides by a seed and the packet's number alone, so that the same packets meet the same fate at any speed.
#[derive(Clone, Debug)]
pub(super) struct Chance {
    seed: u64,
    packets: u64,
    /// Whether it is a bad time in the sense of [`Loss::Burst`].
    is_bad: bool,
}

impl Chance {
    pub(super) fn new(seed: u64) -> Chance {
        Chance {
            seed,
            packets: 0,
            is_bad: false,
        }
    }

    /// The fate of the next packet.
    pub(super) fn next(&mut self, conditions: &Conditions) -> Fate {
        // Every packet has all its draws, whether they are needed or not: what changes for one condition
        // changes nothing for another.
        let mut dice = Dice::new(self.seed, self.packets);
        self.packets += 1;
        let [time, loss, late, double] = [(); 4].map(|()| dice.unit());
        let lost_share = match conditions.loss {
            Loss::None => 0.0,
            Loss::Random(share) => share,
            Loss::Burst {
                begins,
                ends,
                good,
                bad,
            } => {
                let turns = if self.is_bad { ends } else { begins };
                self.is_bad ^= time < turns;
                if self.is_bad { bad } else { good }
            }
        };
        let late_share = conditions
            .reordering
            .map_or(0.0, |reordering| reordering.share);
        Fate {
            is_lost: loss < lost_share,
            is_late: late < late_share,
            is_doubled: double < conditions.duplication,
        }
    }

    /// What is added to the delay at a time: up to `most`, wandering.
    pub(super) fn jitter(&self, at: Duration, most: Duration) -> Duration {
        if most.is_zero() {
            return Duration::ZERO;
        }
        let interval = JITTER_INTERVAL.as_nanos();
        let number = at.as_nanos() / interval;
        let part = (at.as_nanos() % interval) as f64 / interval as f64;
        // Other numbers than those of packets.
        let at = |number: u128| Dice::new(!self.seed, number as u64).unit();
        let (from, to) = (at(number), at(number + 1));
        most.mul_f64(from + (to - from) * part)
    }
}

/// SplitMix64: good enough for losses, and the same everywhere.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// Dice of their own for each number of each seed.
    pub(crate) fn new(seed: u64, number: u64) -> Dice {
        let mut of_seed = Dice(seed);
        Dice(of_seed.next() ^ Dice(number).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Dice::STEP);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in 0..1.
    pub(crate) fn unit(&mut self) -> f64 {
        const MANTISSA_BITS: u32 = 53;
        (self.next() >> (64 - MANTISSA_BITS)) as f64 / (1_u64 << MANTISSA_BITS) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKETS: usize = 200_000;

    fn fates(seed: u64, conditions: &Conditions) -> Vec<Fate> {
        let mut chance = Chance::new(seed);
        (0..PACKETS).map(|_| chance.next(conditions)).collect()
    }

    fn share(fates: &[Fate], is: impl Fn(&Fate) -> bool) -> f64 {
        fates.iter().filter(|fate| is(fate)).count() as f64 / fates.len() as f64
    }

    #[test]
    fn shares_are_what_was_asked_and_independent() {
        let conditions = Conditions {
            loss: Loss::Random(0.01),
            duplication: 0.02,
            reordering: Some(super::super::Reordering {
                share: 0.05,
                by: Duration::from_millis(1),
            }),
            ..Conditions::default()
        };
        for seed in [0, 1, 2, u64::MAX] {
            let fates = fates(seed, &conditions);
            // Five standard deviations; the seeds are fixed, so what passes once passes always.
            assert!((share(&fates, |fate| fate.is_lost) - 0.01).abs() < 0.0012);
            assert!((share(&fates, |fate| fate.is_doubled) - 0.02).abs() < 0.0016);
            assert!((share(&fates, |fate| fate.is_late) - 0.05).abs() < 0.0025);
            let both = share(&fates, |fate| fate.is_late && fate.is_doubled);
            assert!((both - 0.001).abs() < 0.0004, "{both}");
            let in_a_row = fates
                .windows(2)
                .filter(|pair| pair[0].is_lost && pair[1].is_lost);
            assert!((5..50).contains(&in_a_row.count()), "20 are to be expected");
        }
    }

    #[test]
    fn bursts_are_as_long_and_as_frequent_as_asked() {
        let conditions = Conditions {
            loss: Loss::Burst {
                begins: 0.002,
                ends: 0.1,
                good: 0.0,
                bad: 1.0,
            },
            ..Conditions::default()
        };
        let fates = fates(7, &conditions);
        let lost = fates.iter().filter(|fate| fate.is_lost).count() as f64;
        let begins = |pair: &&[Fate]| !pair[0].is_lost && pair[1].is_lost;
        let bursts = fates.windows(2).filter(begins).count() as f64;
        // 1 / ends packets each; begins / (begins + ends) of all packets are in one.
        assert!((lost / bursts - 10.0).abs() < 2.0, "{}", lost / bursts);
        assert!((lost / PACKETS as f64 - 0.0196).abs() < 0.005, "{lost}");
    }

    #[test]
    fn a_change_of_one_condition_leaves_the_others_alone() {
        let doubling = Conditions {
            duplication: 0.1,
            ..Conditions::default()
        };
        let losing = Conditions {
            loss: Loss::Random(0.5),
            ..doubling.clone()
        };
        let doubled = |conditions| -> Vec<bool> {
            let fates = fates(3, conditions);
            fates.iter().map(|fate| fate.is_doubled).collect()
        };
        assert_eq!(doubled(&doubling), doubled(&losing));
    }

    #[test]
    fn seeds_differ() {
        let conditions = Conditions {
            loss: Loss::Random(0.5),
            ..Conditions::default()
        };
        assert_eq!(fates(1, &conditions), fates(1, &conditions));
        assert_ne!(fates(1, &conditions), fates(2, &conditions));
    }

    #[test]
    fn jitter_wanders_within_its_bound() {
        let (chance, most) = (Chance::new(5), Duration::from_millis(8));
        let jitters: Vec<Duration> = (0..10_000)
            .map(|ms| chance.jitter(Duration::from_millis(ms), most))
            .collect();
        assert!(jitters.iter().all(|jitter| *jitter <= most));
        let mean = jitters.iter().sum::<Duration>() / 10_000;
        assert!((3..=5).contains(&mean.as_millis()), "{mean:?}");
        let steps = jitters.windows(2).map(|pair| pair[0].abs_diff(pair[1]));
        // No more than all of it within an interval.
        assert!(steps.max() <= Some(most / 10 + Duration::from_nanos(2)));
        assert_eq!(
            chance.jitter(Duration::from_secs(1), Duration::ZERO),
            Duration::ZERO
        );
    }
}
