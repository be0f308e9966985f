//! ringtun against the path without a tunnel and against other tunnels, in one run.
//!
//! Every system has a lab of its own, all alike, and all of them are up at the same time; but only one is
//! measured at any moment. They take turns at every single figure, A B C A B C, so that a machine that gets
//! slower or faster does so for all, and every round begins with new labs and with another system.
//!
//! | file | what |
//! | --- | --- |
//! | `metric.rs` | what is measured |
//! | `system.rs`, `openvpn.rs`, `openconnect.rs`, `certificate.rs` | what is compared, as values |
//! | `bed.rs` | a system in its lab, and the measurements on it |
//! | `tcp.rs`, `udp.rs`, `echo.rs`, `requests.rs`, `usage.rs` | how they are made |
//! | `options.rs`, `machine.rs` | what is asked for, where and when |
//! | `figures.rs` | medians and ratios, JSON, the terminal's table |
//! | `svg.rs`, `html.rs` | plots and the report |

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::netns::NamespaceError;
use crate::process::ProcessError;
use crate::topology::{Lab, LabError, Topology};

mod bed;
mod certificate;
pub(crate) mod echo;
pub mod figures;
pub mod html;
pub mod machine;
pub mod metric;
mod openconnect;
mod openvpn;
pub mod options;
mod requests;
pub mod svg;
pub mod system;
pub mod tcp;
mod udp;
pub(crate) mod usage;

pub use figures::Figures;
pub use metric::{Direction, Group, Metric};
pub use system::System;
pub use tcp::{CongestionControl, Stream};

use bed::{Bed, Probe, Samples};
use figures::{AllSamples, Entry, Outcome};
use machine::Machine;
use system::{Setup, Skipped};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No lab.
    #[error("no lab to measure in")]
    Lab(#[from] LabError),
    /// A host is out of reach.
    #[error("a lab host is out of reach")]
    Namespace(#[from] NamespaceError),
    /// A program failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Certificates for other tunnels could not be made.
    #[error("no certificates for the comparison")]
    Certificate(#[from] rcgen::Error),
    /// A probe's socket failed.
    #[error("a measuring socket failed")]
    Socket(#[from] io::Error),
    /// iperf3 could not measure.
    #[error("iperf3: {0}")]
    NoRate(String),
    /// Nothing came back.
    #[error("no answer from {0}")]
    Silent(Ipv4Addr),
    /// A flow of datagrams did not arrive.
    #[error("no datagram arrived")]
    NothingReceived,
}

/// What to measure, how long and how often.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// What lies between firewall and internet.
    pub topology: Topology,
    /// The congestion control of the measured TCP streams; `None`: the system's.
    pub inner: Option<CongestionControl>,
    /// What is compared.
    pub systems: Vec<System>,
    /// What is measured.
    pub metrics: Vec<Group>,
    /// How many times each figure is measured.
    pub rounds: usize,
    /// How long each throughput or packet rate is measured.
    pub seconds: u32,
    /// How many seconds of a TCP stream are not counted before that. What is measured beside a stream waits as long.
    pub omitted_seconds: u32,
    /// How many echo requests make a median and a 99th percentile.
    pub pings: usize,
    /// How many starts of a client make a median.
    pub connects: usize,
}

impl Plan {
    /// Under a minute for a system.
    pub const QUICK: Plan = Plan {
        topology: Topology::Nat,
        inner: None,
        systems: Vec::new(),
        metrics: Vec::new(),
        rounds: 3,
        seconds: 1,
        omitted_seconds: 0,
        pings: 200,
        connects: 3,
    };
    /// About six minutes for a system.
    pub const FULL: Plan = Plan {
        topology: Topology::Nat,
        inner: None,
        systems: Vec::new(),
        metrics: Vec::new(),
        rounds: 5,
        seconds: 5,
        omitted_seconds: 1,
        pings: 1000,
        connects: 5,
    };

    /// What it takes on a wire: TCP needs some round trips until it has found the path's rate, and most machines use
    /// CUBIC. The settling time is for a path of 40 ms.
    #[must_use]
    pub fn on_wire(self, topology: Topology) -> Plan {
        let is_quick = self.rounds == Plan::QUICK.rounds;
        Plan {
            topology,
            inner: Some(CongestionControl::Cubic),
            rounds: if is_quick { 1 } else { 3 },
            seconds: if is_quick { 8 } else { 15 },
            omitted_seconds: match topology {
                Topology::LongFat => 10,
                _ => 5,
            },
            pings: if is_quick { 500 } else { 1000 },
            ..self
        }
    }

    fn probes(&self, system: System) -> impl Iterator<Item = Probe> {
        Probe::ALL.into_iter().filter(move |probe| {
            let groups = probe.metrics().iter().map(|metric| metric.group());
            probe.suits(system)
                && groups
                    .into_iter()
                    .any(|group| self.metrics.contains(&group))
        })
    }
}

/// Measures. `on_lab` is called with every lab as soon as it is there, `progress` with a line for every figure.
///
/// # Errors
/// When there can be no lab. A system that fails is in the figures, with its reason.
pub fn run(
    ringtun: &Path,
    plan: Plan,
    mut on_lab: impl FnMut(&Lab),
    progress: impl FnMut(&str),
) -> Result<Figures, BenchError> {
    let mut course = Course {
        samples: AllSamples::new(),
        entries: plan
            .systems
            .iter()
            .map(|system| entry(*system, ringtun))
            .collect(),
        done: 0,
        begun: Instant::now(),
        progress,
    };
    let mut machine = Machine::look(ringtun);
    course.announce(&plan);
    for round in 0..plan.rounds {
        machine.watch();
        let mut systems: Vec<System> = course.measurable().collect();
        if !systems.is_empty() {
            let first = round % systems.len();
            systems.rotate_left(first);
        }
        let mut beds: BTreeMap<System, Bed> = BTreeMap::new();
        for system in &systems {
            match Bed::start(plan.topology, course.setup(*system), &mut on_lab) {
                Ok(bed) => {
                    course.note_congestion_control(*system, &bed);
                    beds.insert(*system, bed);
                }
                Err(error @ BenchError::Lab(_)) => return Err(error),
                Err(error) => course.fail(*system, &error),
            }
        }
        for probe in Probe::ALL {
            for system in &systems {
                let wanted = plan.probes(*system).any(|wanted| wanted == probe);
                let Some(bed) = beds.get_mut(system).filter(|_| wanted) else {
                    continue;
                };
                match bed.measure(probe, &plan) {
                    Ok(samples) => course.note(*system, samples, round, &plan),
                    Err(error) => {
                        course.fail(*system, &error);
                        beds.remove(system);
                    }
                }
            }
        }
    }
    Ok(Figures::new(machine, plan, course.entries, course.samples))
}

/// What there is so far.
struct Course<P> {
    samples: AllSamples,
    entries: Vec<Entry>,
    done: usize,
    begun: Instant,
    progress: P,
}

impl<P: FnMut(&str)> Course<P> {
    fn measurable(&self) -> impl Iterator<Item = System> {
        let measurable = |entry: &&Entry| entry.outcome == Outcome::Measured;
        self.entries
            .iter()
            .filter(measurable)
            .map(|entry| entry.system)
    }

    fn entry(&mut self, system: System) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.system == system)
    }

    fn setup(&mut self, system: System) -> Setup {
        self.entry(system)
            .map_or_else(Setup::default, |entry| entry.setup.clone())
    }

    fn announce(&mut self, plan: &Plan) {
        let names: Vec<&str> = self.measurable().map(System::key).collect();
        let line = format!("comparing {} in {} rounds", names.join(", "), plan.rounds);
        (self.progress)(&line);
        for entry in &self.entries {
            if let Some(reason) = &entry.reason {
                (self.progress)(&format!("skipping {}: {reason}", entry.system.key()));
            }
        }
    }

    fn note(&mut self, system: System, samples: Samples, round: usize, plan: &Plan) {
        self.done += 1;
        let steps: usize = self
            .measurable()
            .map(|system| plan.probes(system).count())
            .sum::<usize>()
            * plan.rounds;
        let left = self.begun.elapsed().as_secs_f64() / self.done as f64
            * steps.saturating_sub(self.done) as f64;
        let figures: Vec<String> = samples
            .iter()
            .map(|(metric, figure)| {
                format!(
                    "{} {} {}",
                    metric.title(),
                    metric.text(*figure),
                    metric.unit()
                )
            })
            .collect();
        (self.progress)(&format!(
            "[{}/{steps}, {} left] round {}: {}: {}",
            self.done,
            minutes(left),
            round + 1,
            system.key(),
            figures.join("; ")
        ));
        for (metric, figure) in samples {
            self.samples
                .entry((metric, system))
                .or_default()
                .push(figure);
        }
    }

    fn note_congestion_control(&mut self, system: System, bed: &Bed) {
        let outer = bed.outer_congestion_control();
        if let Some(entry) = self.entry(system) {
            entry.outer_congestion_control = outer.or(entry.outer_congestion_control.take());
        }
    }

    fn fail(&mut self, system: System, error: &BenchError) {
        let reason = with_causes(error);
        (self.progress)(&format!("FAILED: {}: {reason}", system.key()));
        if let Some(entry) = self.entry(system) {
            entry.outcome = Outcome::Failed;
            entry.reason = Some(reason);
        }
    }
}

fn entry(system: System, ringtun: &Path) -> Entry {
    let (outcome, reason, setup) = match system.setup(ringtun) {
        Ok(setup) => (Outcome::Measured, None, setup),
        Err(Skipped(reason)) => (Outcome::Skipped, Some(reason), Setup::default()),
    };
    Entry {
        system,
        title: system.title(),
        outcome,
        reason,
        outer_congestion_control: None,
        commands: setup.commands(),
        setup,
    }
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = text + ": " + &error.to_string();
        cause = error.source();
    }
    text
}

fn minutes(seconds: f64) -> String {
    let seconds = Duration::from_secs_f64(seconds.max(0.0)).as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

pub(crate) fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    match samples.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => samples[middle],
        _ => (samples[middle - 1] + samples[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn what_is_not_asked_for_is_not_measured() {
        let plan = Plan {
            metrics: vec![Group::Udp, Group::Memory],
            ..Plan::QUICK
        };
        assert_eq!(plan.probes(System::Direct).count(), 4);
        assert_eq!(plan.probes(System::Ringtun).count(), 6);
    }

    #[test]
    fn time_left_is_in_minutes() {
        assert_eq!(minutes(125.9), "2:05");
    }
}
