//! What `lab bench` may be asked for.

use std::path::{Path, PathBuf};

use super::metric::Group;
use super::system::System;
use super::{CongestionControl, Plan};
use crate::topology::Topology;

/// The options of `lab bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Three short rounds instead of five long ones
    #[arg(long)]
    quick: bool,
    /// What lies between the clients and the internet. On all but nat and dpi, streams use CUBIC and have some seconds to
    /// find their rate, and fewer things are compared and measured unless asked for
    #[arg(long, value_enum, default_value_t)]
    topology: Topology,
    /// The congestion control of the measured TCP streams [default: the system's; on a wire cubic]
    #[arg(long, value_enum)]
    inner: Option<CongestionControl>,
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
    /// How long a TCP stream runs before it is measured, or anything beside it
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=60))]
    settle: Option<u32>,
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
        let is_far = self.topology.wire().is_some();
        let effort = match is_far {
            true => effort.on_wire(self.topology),
            false => Plan {
                topology: self.topology,
                ..effort
            },
        };
        let systems: &[System] = if is_far { &System::FAR } else { &System::USUAL };
        let metrics: &[Group] = if is_far { &Group::FAR } else { &Group::ALL };
        Plan {
            systems: chosen(&self.systems, &System::ALL, systems),
            metrics: chosen(&self.metrics, &Group::ALL, metrics),
            inner: self.inner.or(effort.inner),
            rounds: self.rounds.map_or(effort.rounds, usize::from),
            seconds: self.seconds.unwrap_or(effort.seconds),
            omitted_seconds: self.settle.unwrap_or(effort.omitted_seconds),
            ..effort
        }
    }
}

/// What is usual if nothing is chosen; in the order of all, and nothing twice.
fn chosen<T: Copy + PartialEq>(chosen: &[T], all: &[T], usual: &[T]) -> Vec<T> {
    let wanted = if chosen.is_empty() { usual } else { chosen };
    let is_wanted = |item: &&T| wanted.contains(item);
    all.iter().filter(is_wanted).copied().collect()
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
        assert_eq!((plan.systems.len(), plan.metrics.len()), (6, 6));
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
    fn a_wire_has_its_own_defaults() {
        let plan = plan(&["--topology", "long-fat", "--quick", "--inner", "bbr"]);
        assert_eq!(plan.topology, Topology::LongFat);
        assert_eq!(plan.systems, System::FAR);
        assert_eq!(plan.metrics, Group::FAR);
        assert_eq!((plan.rounds, plan.omitted_seconds), (1, 10));
        assert_eq!(plan.inner, Some(CongestionControl::Bbr));
        let plan = self::plan(&[
            "--topology",
            "lossy",
            "--settle",
            "1",
            "--metrics",
            "memory",
        ]);
        assert_eq!(plan.metrics, [Group::Memory]);
        assert_eq!((plan.rounds, plan.omitted_seconds), (3, 1));
        assert_eq!(plan.inner, Some(CongestionControl::Cubic));
    }

    #[test]
    fn nonsense_is_refused() {
        for arguments in [
            ["--rounds", "0"],
            ["--seconds", "0"],
            ["--systems", "x"],
            ["--metrics", ""],
            ["--topology", "x"],
            ["--inner", "x"],
            ["--settle", "61"],
        ] {
            let words = ["bench"].iter().chain(&arguments);
            assert!(Cli::try_parse_from(words).is_err(), "{arguments:?}");
        }
    }
}
