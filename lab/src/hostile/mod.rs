//! What a hostile peer or stranger does to a real server, and what that costs an honest peer.
//!
//! An ordinary `ringtun client` on `client` downloads from `web` and uploads to it, with a ping
//! beside, in three conditions in turns: *idle*; *attack*, while an attacker does its worst to the
//! server; *sink*, while the same load goes to a port of the server's host that throws it away.
//! What the machine spends on making and carrying the load is in both, so that the difference
//! between attack and sink is what the server does with it. docs/hostile.md describes how to read
//! the figures.
//!
//! | file | what |
//! | --- | --- |
//! | `attack.rs` | the attacks, as values |
//! | `bytes.rs` | what they consist of |
//! | `target.rs` | connections to the server or to the sink |
//! | `attacker.rs` | carries a load to either |
//! | `sink.rs` | the sink |
//! | `testbed.rs` | the lab, and one condition measured |
//! | `figures.rs` | medians and goals |

mod attack;
mod attacker;
mod bytes;
pub mod figures;
mod sink;
mod target;
mod testbed;

use std::io;
use std::path::{Path, PathBuf};

pub use attack::Attack;
pub use attacker::Sent;
pub use figures::Figures;

use crate::crowd::raise_files;
use crate::dial::AccountsError;
use crate::link::LinkError;
use crate::netns::NamespaceError;
use crate::process::ProcessError;
use crate::scenario::ScenarioError;
use crate::topology::{Lab, LabError};
use attacker::Rates;
use figures::{AttackFigures, Condition, Sample};
use testbed::Testbed;

/// The options of `lab hostile`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// What to do to the server; may be repeated [default: all]
    #[arg(long, value_name = "NAME", value_enum, hide_possible_values = true)]
    attack: Vec<Attack>,
    /// List the attacks
    #[arg(long)]
    list: bool,
    /// How often each condition is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each transfer is, either way
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Exit with 0 also when goals are missed
    #[arg(long)]
    report_only: bool,
    /// Write all figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The attacks, in this order.
    pub attacks: Vec<Attack>,
    /// How often each condition is measured.
    pub rounds: u32,
    /// How long each transfer is.
    pub seconds: u32,
}

impl Options {
    /// Where to write JSON.
    #[must_use]
    pub fn json(&self) -> Option<&Path> {
        self.json.as_deref()
    }

    /// Whether the attacks are to be listed, and nothing more.
    #[must_use]
    pub fn wants_list(&self) -> bool {
        self.list
    }

    /// Whether a missed goal is no failure.
    #[must_use]
    pub fn is_report_only(&self) -> bool {
        self.report_only
    }

    /// What they come to.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan {
            attacks: match self.attack.as_slice() {
                [] => Attack::all().to_vec(),
                chosen => chosen.to_vec(),
            },
            rounds: self.rounds,
            seconds: self.seconds,
        }
    }
}

/// The list of attacks, for people.
#[must_use]
pub fn list() -> String {
    let lines = Attack::all()
        .iter()
        .map(|attack| format!("{:<28}{}\n", attack.name(), attack.about()));
    lines.collect()
}

/// Why there are no figures. A server that dies and a transfer that stalls are none: those are
/// figures.
#[derive(Debug, thiserror::Error)]
pub enum HostileError {
    /// No lab.
    #[error("no lab to attack in")]
    Lab(#[from] LabError),
    /// An address is missing.
    #[error("the lab's addresses")]
    Link(#[from] LinkError),
    /// A host is out of reach.
    #[error("a lab host could not be entered")]
    Namespace(#[from] NamespaceError),
    /// ringtun, or a program that measures, failed before anything was attacked.
    #[error("a program failed")]
    Process(#[from] ProcessError),
    /// The tunnel did not come up.
    #[error("no tunnel")]
    Scenario(#[from] ScenarioError),
    /// The peers could not be made.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// A socket of the test's own failed.
    #[error("a socket of the test")]
    Socket(#[source] io::Error),
    /// There are too few descriptors.
    #[error("{0}")]
    Machine(String),
    /// The server has no second process.
    #[error("the server has no daemon")]
    NoDaemon,
}

/// Attacks and measures. `on_lab` is called with every lab, so that it can be ended on a signal,
/// `progress` with lines for people.
///
/// # Errors
/// [`HostileError`].
pub fn run(
    ringtun: &Path,
    plan: &Plan,
    mut on_lab: impl FnMut(&Lab),
    mut progress: impl FnMut(&str),
) -> Result<Figures, HostileError> {
    // Those of an attacker, and as many at the sink, which is in this process, too.
    let connections = plan.attacks.iter().map(|attack| attack.connections_max());
    raise_files(2 * connections.max().unwrap_or(0)).map_err(HostileError::Machine)?;
    let mut attacks = Vec::new();
    for attack in &plan.attacks {
        let mut figures = measure(ringtun, *attack, plan, &mut on_lab, &mut progress)?;
        figures.goals = figures.verdicts();
        progress(&figures.to_table());
        attacks.push(figures);
    }
    Ok(Figures {
        rounds: plan.rounds,
        seconds: plan.seconds,
        attacks,
    })
}

fn measure(
    ringtun: &Path,
    attack: Attack,
    plan: &Plan,
    on_lab: &mut dyn FnMut(&Lab),
    progress: &mut dyn FnMut(&str),
) -> Result<AttackFigures, HostileError> {
    let mut figures = AttackFigures {
        attack,
        samples: Vec::new(),
        newcomers_seconds: Vec::new(),
        server_died: None,
        counted: Default::default(),
        goals: Vec::new(),
    };
    let mut rates = Rates::default();
    let mut kept: Option<Testbed<'_>> = None;
    for round in 1..=plan.rounds {
        for condition in conditions(round) {
            let testbed = match kept.take() {
                Some(testbed) => testbed,
                None => Testbed::start(ringtun, attack, on_lab)?,
            };
            let of_condition = match condition {
                Condition::Sink => rates,
                Condition::Idle | Condition::Attack => Rates::default(),
            };
            let (sample, status) = testbed.sample(condition, round, of_condition, plan)?;
            progress(&line(attack, &sample, plan));
            if condition == Condition::Attack {
                rates = Rates::of(&sample.sent);
                if let Some(status) = status {
                    figures.counted = figures::counted(&status);
                }
            }
            let is_whole = sample.down.failure.is_none() && sample.up.failure.is_none();
            figures.samples.push(sample);
            figures.server_died = testbed.death();
            if figures.server_died.is_some() {
                return Ok(figures);
            }
            // A tunnel that has failed says nothing about the next condition.
            if is_whole && testbed.has_client() {
                kept = Some(testbed);
            }
        }
    }
    if attack.is_by_strangers() {
        let testbed = match kept.take() {
            Some(testbed) => testbed,
            None => Testbed::start(ringtun, attack, on_lab)?,
        };
        figures.newcomers_seconds = testbed.newcomers()?;
        figures.server_died = testbed.death();
    }
    Ok(figures)
}

/// The order of conditions in a round. The sink gets what the server got, so the first attack comes
/// before it; idle is the first of all, since an attack may leave the daemon with more memory.
fn conditions(round: u32) -> [Condition; 3] {
    match round % 2 {
        1 => [Condition::Idle, Condition::Attack, Condition::Sink],
        _ => [Condition::Sink, Condition::Attack, Condition::Idle],
    }
}

fn line(attack: Attack, sample: &Sample, plan: &Plan) -> String {
    format!(
        "{}, round {} of {}, {}: down {:.0} Mbit/s, ping p99 {:.1} ms; up {:.0} Mbit/s, ping p99 {:.1} ms",
        attack.name(),
        sample.round,
        plan.rounds,
        sample.condition.word(),
        sample.down.megabits_per_second,
        sample.down.ping_p99_ms,
        sample.up.megabits_per_second,
        sample.up.ping_p99_ms,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_attacks_after_idle_and_before_the_sink() {
        assert_eq!(
            conditions(1),
            [Condition::Idle, Condition::Attack, Condition::Sink]
        );
        for round in 1..=4 {
            let mut all = conditions(round).map(Condition::word);
            all.sort_unstable();
            assert_eq!(all, ["attack", "idle", "sink"]);
        }
    }

    #[test]
    fn the_list_has_a_line_for_each_attack() {
        let list = list();
        assert_eq!(list.lines().count(), Attack::all().len());
        assert!(list.starts_with("address-requests-v4 "), "{list}");
    }
}
