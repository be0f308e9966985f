//! `lab wire`: two hosts, a wire as asked, and what becomes of packets on it.

use std::fmt::Write;
use std::time::Duration;

use super::pair::{FAR, Pair};
use super::{Conditions, Heading, Loss, Plan, Unsound};
use crate::bench::{BenchError, Direction};
use crate::netns::Ender;

const MEGA: f64 = 1e6;
/// Echo requests, 20 ms apart.
const ECHOES: usize = 100;

/// The options of `lab wire`. Both directions are alike.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Mbit/s [default: as fast as it goes]
    #[arg(long)]
    rate: Option<f64>,
    /// Milliseconds one way
    #[arg(long, default_value_t = 0.0)]
    delay: f64,
    /// Milliseconds that are added to the delay at most, wandering
    #[arg(long, default_value_t = 0.0)]
    jitter: f64,
    /// Percent of packets that are lost
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Bytes of packets that may wait
    #[arg(long, default_value_t = 1_000_000)]
    queue: u64,
    /// Decides which packets are lost
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How long to measure each direction
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
}

impl Options {
    /// What they come to.
    ///
    /// # Errors
    /// When they make no sense.
    pub fn plan(&self) -> Result<Plan, Unsound> {
        let milliseconds = |figure: f64| {
            // What is out of range is said so by `validate`.
            Duration::try_from_secs_f64(figure / 1000.0).unwrap_or(Duration::MAX)
        };
        let rate = self.rate.map(|rate| match rate >= 0.0 {
            true => (rate * MEGA) as u64,
            false => u64::MAX,
        });
        let conditions = Conditions {
            rate_bits_per_second: rate,
            delay: milliseconds(self.delay),
            jitter: milliseconds(self.jitter),
            loss: Loss::Random(self.loss / 100.0),
            queue_bytes: self.queue,
            ..Conditions::default()
        };
        conditions.validate()?;
        Ok(Plan::symmetric(self.seed, conditions))
    }
}

/// Tries a wire and tells what it does. `on_pair` is called with what ends it all early.
///
/// # Errors
/// When there can be no hosts, or iperf3 fails.
pub fn run(
    options: &Options,
    plan: &Plan,
    on_pair: impl FnOnce(Ender),
) -> Result<String, BenchError> {
    let pair = Pair::join(plan)?;
    on_pair(pair.ender());
    let mut text = String::new();
    let ping = pair.near.ping(FAR.into(), ECHOES)?;
    let mut times = ping.round_trips_us;
    times.sort_unstable();
    let rank = |percent: usize| times.get((times.len() * percent / 100).min(times.len() - 1));
    let _ = match times.is_empty() {
        true => writeln!(text, "round trip: none of {ECHOES} echoes came back"),
        false => writeln!(
            text,
            "round trip: {} us median, {} us p99, {} of {ECHOES} came back",
            rank(50).copied().unwrap_or_default(),
            rank(99).copied().unwrap_or_default(),
            times.len()
        ),
    };
    for (direction, heading) in [
        (Direction::Up, Heading::There),
        (Direction::Down, Heading::Back),
    ] {
        let transfer = pair.stream(direction, options.seconds)?;
        let _ = writeln!(
            text,
            "one TCP stream {} ({}): {:.1} Mbit/s",
            direction.word(),
            transfer.congestion_control,
            transfer.megabits_per_second
        );
        let Some(wire) = &pair.wire else { continue };
        let traffic = wire.traffic(heading);
        let counts = traffic.counts;
        let _ = writeln!(
            text,
            "    {} packets: {} delivered, {} lost, {} found no room; at most {:.1} ms late",
            counts.offered,
            counts.delivered,
            counts.lost,
            counts.dropped,
            traffic.lateness_max.as_secs_f64() * 1000.0
        );
    }
    Ok(text)
}
