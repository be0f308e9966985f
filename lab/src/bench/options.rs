//! What `lab bench` may be asked for.

use std::path::{Path, PathBuf};

use super::Plan;
use super::metric::Group;
use super::system::System;

/// The options of `lab bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Three short rounds instead of five long ones
    #[arg(long)]
    quick: bool,
    /// What to compare [default: all that is installed]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SYSTEM,...")]
    systems: Vec<System>,
    /// What to measure [default: everything]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "GROUP,...")]
    metrics: Vec<Group>,
    /// How many times to measure each figure
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: Option<u16>,
    /// How long to measure each rate
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: Option<u32>,
    /// Write all figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report with plots, one page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the plots that say the most
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the figures that say the most, as a table in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

impl Options {
    /// Where to write JSON, HTML, SVG and Markdown, in this order.
    #[must_use]
    pub fn files(&self) -> [Option<&Path>; 4] {
        [&self.json, &self.html, &self.svg, &self.markdown].map(|path| path.as_deref())
    }

    /// What they come to.
    #[must_use]
    pub fn plan(&self) -> Plan {
        let effort = if self.quick { Plan::QUICK } else { Plan::FULL };
        Plan {
            systems: chosen(&self.systems, &System::ALL),
            metrics: chosen(&self.metrics, &Group::ALL),
            rounds: self.rounds.map_or(effort.rounds, usize::from),
            seconds: self.seconds.unwrap_or(effort.seconds),
            ..effort
        }
    }
}

/// Everything if nothing is chosen, and nothing twice.
fn chosen<T: Copy + PartialEq>(chosen: &[T], all: &[T]) -> Vec<T> {
    let is_chosen = |item: &&T| chosen.is_empty() || chosen.contains(item);
    all.iter().filter(is_chosen).copied().collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn plan(arguments: &[&str]) -> Plan {
        let words = ["bench"].iter().chain(arguments);
        Cli::try_parse_from(words)
            .expect("good usage")
            .options
            .plan()
    }

    #[test]
    fn everything_is_the_default() {
        let plan = plan(&[]);
        assert_eq!((plan.systems.len(), plan.metrics.len()), (6, 5));
        assert_eq!((plan.rounds, plan.seconds), (5, 5));
    }

    #[test]
    fn less_can_be_asked_for() {
        let plan = plan(&[
            "--quick",
            "--systems",
            "openvpn-tuned,direct,direct",
            "--metrics",
            "rtt",
            "--rounds",
            "1",
        ]);
        assert_eq!(plan.systems, [System::Direct, System::OpenvpnTuned]);
        assert_eq!(plan.metrics, [Group::Rtt]);
        assert_eq!((plan.rounds, plan.seconds), (1, 1));
    }

    #[test]
    fn nonsense_is_refused() {
        for arguments in [
            ["--rounds", "0"],
            ["--seconds", "0"],
            ["--systems", "x"],
            ["--metrics", ""],
        ] {
            let words = ["bench"].iter().chain(&arguments);
            assert!(Cli::try_parse_from(words).is_err(), "{arguments:?}");
        }
    }
}
