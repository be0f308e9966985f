//! What a direction of a wire is asked to do to packets, and when that changes.

use std::time::Duration;

/// Rates beyond this are as good as none.
pub const RATE_BITS_PER_SECOND_MAX: u64 = 100_000_000_000;
/// Delays beyond this are a mistake in the unit.
pub const DELAY_MAX: Duration = Duration::from_secs(60);
/// Queues beyond this are a mistake in the unit.
pub const QUEUE_BYTES_MAX: u64 = 1 << 30;
/// Between the moments at which a new jitter is drawn. In between it wanders from one to the next.
pub const JITTER_INTERVAL: Duration = Duration::from_millis(10);

/// What happens to packets in one direction of a wire. The default is nothing: at once, all of them, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Conditions {
    /// How fast packets leave the queue, in bits of whole frames; `None`: at once. With 0 they wait.
    pub rate_bits_per_second: Option<u64>,
    /// How long a packet travels after it has left the queue.
    pub delay: Duration,
    /// The most that is added to the delay: it wanders between nothing and this, and packets stay in order.
    pub jitter: Duration,
    /// Which packets do not arrive. They take their share of the rate all the same.
    pub loss: Loss,
    /// Which packets are overtaken by those behind them.
    pub reordering: Option<Reordering>,
    /// The share of packets that arrive twice.
    pub duplication: f64,
    /// How many bytes of frames may wait or leave. What finds no room is dropped; one packet always has room.
    pub queue_bytes: u64,
    /// How all this changes while time passes.
    pub timetable: Timetable,
}

/// Which packets are lost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Loss {
    /// None.
    #[default]
    None,
    /// Each with this probability.
    Random(f64),
    /// In bursts, by the model of Gilbert and Elliott: there are good times and bad ones.
    Burst {
        /// The probability, before each packet of a good time, that a bad one begins.
        begins: f64,
        /// The probability, before each packet of a bad time, that it ends.
        ends: f64,
        /// The share of packets that is lost in good times.
        good: f64,
        /// The share of packets that is lost in bad times.
        bad: f64,
    },
}

/// Packets that take longer than others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reordering {
    /// The share of such packets.
    pub share: f64,
    /// How much longer they take.
    pub by: Duration,
}

/// One thing that becomes different.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// The rate, also of the packet that is just leaving; see [`Conditions::rate_bits_per_second`].
    Rate(Option<u64>),
    /// The delay of packets that leave the queue from now on.
    Delay(Duration),
    /// The loss of packets that come from now on.
    Loss(Loss),
    /// An outage begins: whatever leaves the queue is lost. What has left it before still arrives.
    Cut,
    /// An outage ends.
    Mend,
}

/// Changes by the time since the wire was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timetable {
    /// What changes when, in order.
    pub changes: Vec<(Duration, Change)>,
    /// When all of it begins again; it does not where there is none.
    pub period: Option<Duration>,
}

/// Conditions that make no sense.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{what} {reason}")]
pub struct Unsound {
    what: &'static str,
    reason: String,
}

impl Default for Conditions {
    fn default() -> Self {
        Conditions {
            rate_bits_per_second: None,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: Loss::None,
            reordering: None,
            duplication: 0.0,
            queue_bytes: QUEUE_BYTES_MAX,
            timetable: Timetable::default(),
        }
    }
}

impl Conditions {
    /// Checks every value.
    ///
    /// # Errors
    /// Names the value that is out of range.
    pub fn validate(&self) -> Result<(), Unsound> {
        rate(self.rate_bits_per_second)?;
        duration("the delay", self.delay)?;
        duration("the jitter", self.jitter)?;
        self.loss.validate()?;
        if let Some(Reordering { share, by }) = self.reordering {
            probability("the share of reordered packets", share)?;
            duration("the delay of reordered packets", by)?;
        }
        probability("the share of duplicated packets", self.duplication)?;
        if !(1..=QUEUE_BYTES_MAX).contains(&self.queue_bytes) {
            return unsound(
                "the queue",
                format!("must have 1 to {QUEUE_BYTES_MAX} bytes"),
            );
        }
        self.timetable.validate()
    }
}

impl Loss {
    fn validate(self) -> Result<(), Unsound> {
        match self {
            Loss::None => Ok(()),
            Loss::Random(share) => probability("the share of lost packets", share),
            Loss::Burst {
                begins,
                ends,
                good,
                bad,
            } => {
                probability("the probability that a burst of losses begins", begins)?;
                probability("the probability that a burst of losses ends", ends)?;
                probability("the loss between bursts", good)?;
                probability("the loss in bursts", bad)
            }
        }
    }
}

impl Change {
    pub(super) fn validate(self) -> Result<(), Unsound> {
        match self {
            Change::Rate(bits_per_second) => rate(bits_per_second),
            Change::Delay(delay) => duration("the delay", delay),
            Change::Loss(loss) => loss.validate(),
            Change::Cut | Change::Mend => Ok(()),
        }
    }
}

impl Timetable {
    /// The time and the change with this number, counted on over repetitions.
    pub(super) fn entry(&self, number: usize) -> Option<(Duration, Change)> {
        if self.changes.is_empty() {
            return None;
        }
        let (lap, index) = (number / self.changes.len(), number % self.changes.len());
        let (at, change) = self.changes[index];
        match (lap, self.period) {
            (0, _) => Some((at, change)),
            (_, None) => None,
            (_, Some(period)) => Some((period * u32::try_from(lap).ok()? + at, change)),
        }
    }

    fn validate(&self) -> Result<(), Unsound> {
        const WHAT: &str = "the timetable";
        if !self.changes.is_sorted_by_key(|(at, _)| *at) {
            return unsound(WHAT, "must be in order".to_owned());
        }
        let last = self.changes.last().map_or(Duration::ZERO, |(at, _)| *at);
        if self
            .period
            .is_some_and(|period| period.is_zero() || period < last)
        {
            return unsound(
                WHAT,
                "must not begin again before its last entry".to_owned(),
            );
        }
        self.changes
            .iter()
            .try_for_each(|(_, change)| change.validate())
    }
}

fn rate(bits_per_second: Option<u64>) -> Result<(), Unsound> {
    match bits_per_second {
        Some(rate) if rate > RATE_BITS_PER_SECOND_MAX => unsound(
            "the rate",
            format!("must not be over {RATE_BITS_PER_SECOND_MAX} bit/s"),
        ),
        _ => Ok(()),
    }
}

fn duration(what: &'static str, duration: Duration) -> Result<(), Unsound> {
    if duration > DELAY_MAX {
        return unsound(what, format!("must not be over {} s", DELAY_MAX.as_secs()));
    }
    Ok(())
}

fn probability(what: &'static str, probability: f64) -> Result<(), Unsound> {
    if !(0.0..=1.0).contains(&probability) {
        return unsound(what, format!("must be between 0 and 1, not {probability}"));
    }
    Ok(())
}

fn unsound(what: &'static str, reason: String) -> Result<(), Unsound> {
    Err(Unsound { what, reason })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(Conditions { rate_bits_per_second: Some(RATE_BITS_PER_SECOND_MAX + 1), ..Conditions::default() }, "the rate")]
    #[case(Conditions { delay: Duration::from_secs(61), ..Conditions::default() }, "the delay must not be over 60 s")]
    #[case(Conditions { loss: Loss::Random(1.5), ..Conditions::default() }, "the share of lost packets must be between 0 and 1, not 1.5")]
    #[case(Conditions { loss: Loss::Random(f64::NAN), ..Conditions::default() }, "not NaN")]
    #[case(Conditions { duplication: -0.1, ..Conditions::default() }, "duplicated")]
    #[case(Conditions { queue_bytes: 0, ..Conditions::default() }, "the queue must have 1 to")]
    #[case(timetable(&[2, 1], None), "the timetable must be in order")]
    #[case(timetable(&[1, 2], Some(1)), "must not begin again")]
    #[case(timetable(&[0], Some(0)), "must not begin again")]
    fn nonsense_is_named(#[case] conditions: Conditions, #[case] expected: &str) {
        let complaint = conditions.validate().expect_err("nonsense").to_string();
        assert!(complaint.contains(expected), "{complaint}");
    }

    #[test]
    fn a_timetable_begins_again() {
        let timetable = timetable(&[1, 3], Some(5)).timetable;
        let at = |number| timetable.entry(number).map(|(at, _)| at.as_secs());
        assert_eq!(
            [at(0), at(1), at(2), at(3), at(4)],
            [1, 3, 6, 8, 11].map(Some)
        );
        let once = Timetable {
            period: None,
            ..timetable.clone()
        };
        assert_eq!((once.entry(1).is_some(), once.entry(2)), (true, None));
    }

    fn timetable(seconds: &[u64], period_seconds: Option<u64>) -> Conditions {
        let changes = seconds
            .iter()
            .map(|at| (Duration::from_secs(*at), Change::Cut));
        Conditions {
            timetable: Timetable {
                changes: changes.collect(),
                period: period_seconds.map(Duration::from_secs),
            },
            ..Conditions::default()
        }
    }
}
