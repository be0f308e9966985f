//! What attacks cost an honest peer: samples, medians, goals.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::attack::Attack;
use super::attacker::Sent;
use crate::bench::{Direction, median};

/// An honest peer keeps this share of its throughput, compared with the same load to the sink.
pub const THROUGHPUT_RATIO_MIN: f64 = 0.9;
/// Its round-trip times grow by this factor at most, at the 99th percentile.
pub const PING_P99_RATIO_MAX: f64 = 3.0;
/// An attack costs the daemon this much memory at most, beyond what it had without one.
pub const RSS_GROWTH_MIB_MAX: f64 = 64.0;
/// A newcomer's tunnel is up within this time.
pub const NEWCOMER_SECONDS_MAX: f64 = 2.0;

/// What happens beside the honest peer's transfers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// Nothing.
    Idle,
    /// The attacker's load goes to the sink.
    Sink,
    /// It goes to the server.
    Attack,
}

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// How often each condition was measured.
    pub rounds: u32,
    /// For how long each time and direction.
    pub seconds: u32,
    /// By attack, in the order in which they were made.
    pub attacks: Vec<AttackFigures>,
}

/// What one attack has come to.
#[derive(Clone, Debug, Serialize)]
pub struct AttackFigures {
    /// Which one.
    pub attack: Attack,
    /// Everything that was measured, in order.
    pub samples: Vec<Sample>,
    /// How long a newcomer's client took to be up during the attack, in seconds; `null` where it
    /// was not in time. Only attacks by strangers have these.
    pub newcomers_seconds: Vec<Option<f64>>,
    /// How the server ended, if it did.
    pub server_died: Option<String>,
    /// What `ringtun status --json` had counted at the end of the last attack.
    pub counted: BTreeMap<String, u64>,
    /// All goals, once the attack is over.
    pub goals: Vec<Verdict>,
}

/// The honest peer, and the server, in one condition once.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// What happened beside.
    pub condition: Condition,
    /// From 1.
    pub round: u32,
    /// The honest peer's download.
    pub down: Flow,
    /// Its upload.
    pub up: Flow,
    /// What the attacker did, to either target.
    pub sent: Sent,
    /// The daemon's RSS at most, in MiB.
    pub rss_peak_mib: f64,
    /// The daemon's processor time for each second.
    pub daemon_cpu: f64,
}

/// One transfer with a ping beside it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Flow {
    /// Throughput; 0 where there was none.
    pub megabits_per_second: f64,
    /// Median round trip; a lost echo counts as a second.
    pub ping_p50_ms: f64,
    /// Its 99th percentile.
    pub ping_p99_ms: f64,
    /// Why there is no throughput.
    pub failure: Option<String>,
}

/// One goal and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The goal.
    pub goal: &'static str,
    /// What was measured; `None`: nothing could be.
    pub measured: Option<f64>,
    /// What it may be, at least or at most.
    pub bound: f64,
    /// Whether it is met.
    pub is_met: bool,
}

impl Verdict {
    fn at_least(goal: &'static str, measured: Option<f64>, bound: f64) -> Verdict {
        Verdict {
            goal,
            measured,
            bound,
            is_met: measured.is_some_and(|measured| measured >= bound),
        }
    }

    fn at_most(goal: &'static str, measured: Option<f64>, bound: f64) -> Verdict {
        Verdict {
            goal,
            measured,
            bound,
            is_met: measured.is_some_and(|measured| measured <= bound),
        }
    }
}

impl Sample {
    /// The flow in one direction.
    #[must_use]
    pub fn flow(&self, direction: Direction) -> &Flow {
        match direction {
            Direction::Down => &self.down,
            Direction::Up => &self.up,
        }
    }
}

impl AttackFigures {
    /// The median of a figure over all samples of a condition.
    #[must_use]
    pub fn median(&self, condition: Condition, figure: impl Fn(&Sample) -> f64) -> Option<f64> {
        let samples = self.samples.iter();
        let figures: Vec<f64> = samples
            .filter(|sample| sample.condition == condition)
            .map(figure)
            .collect();
        (!figures.is_empty()).then(|| median(figures))
    }

    /// A figure during the attack over that with the sink, which was measured right before or
    /// after it: the median over the rounds. A machine that gets slower or faster meanwhile
    /// changes both.
    fn ratio(&self, figure: impl Fn(&Sample) -> f64) -> Option<f64> {
        let of = |round: u32, condition: Condition| {
            let mut samples = self.samples.iter();
            let found = samples.find(|it| it.round == round && it.condition == condition);
            found.map(&figure)
        };
        let rounds: BTreeSet<u32> = self.samples.iter().map(|sample| sample.round).collect();
        let ratios: Vec<f64> = rounds
            .into_iter()
            .filter_map(|round| {
                let sink = of(round, Condition::Sink).filter(|sink| *sink > 0.0)?;
                Some(of(round, Condition::Attack)? / sink)
            })
            .collect();
        (!ratios.is_empty()).then(|| median(ratios))
    }

    fn rss_peak(&self, condition: Condition) -> Option<f64> {
        let samples = self.samples.iter();
        samples
            .filter(|sample| sample.condition == condition)
            .map(|sample| sample.rss_peak_mib)
            // One that died at once was never looked at.
            .filter(|peak_mib| *peak_mib > 0.0)
            .reduce(f64::max)
    }

    /// What the daemon had at most before the first attack. What it has afterwards may be the
    /// attack's.
    fn rss_before(&self) -> f64 {
        let samples = self.samples.iter();
        samples
            .take_while(|sample| sample.condition != Condition::Attack)
            .map(|sample| sample.rss_peak_mib)
            .fold(0.0, f64::max)
    }

    /// All goals.
    #[must_use]
    pub fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for direction in Direction::BOTH {
            let (rate, ping) = match direction {
                Direction::Down => ("throughput down", "ping beside down p99"),
                Direction::Up => ("throughput up", "ping beside up p99"),
            };
            verdicts.push(Verdict::at_least(
                rate,
                self.ratio(|sample| sample.flow(direction).megabits_per_second),
                THROUGHPUT_RATIO_MIN,
            ));
            verdicts.push(Verdict::at_most(
                ping,
                self.ratio(|sample| sample.flow(direction).ping_p99_ms),
                PING_P99_RATIO_MAX,
            ));
        }
        verdicts.push(Verdict::at_most(
            "daemon RSS, MiB",
            self.rss_peak(Condition::Attack),
            self.rss_before() + RSS_GROWTH_MIB_MAX,
        ));
        let lives = if self.server_died.is_none() { 1.0 } else { 0.0 };
        verdicts.push(Verdict::at_least("server alive", Some(lives), 1.0));
        if !self.newcomers_seconds.is_empty() {
            let slowest = self.newcomers_seconds.iter().copied();
            let slowest = slowest
                .reduce(|one, other| Some(one?.max(other?)))
                .flatten();
            verdicts.push(Verdict::at_most(
                "newcomer up, s",
                slowest,
                NEWCOMER_SECONDS_MAX,
            ));
        }
        verdicts
    }

    /// For people.
    #[must_use]
    pub fn to_table(&self) -> String {
        let mut text = format!("{}: {}\n", self.attack.name(), self.attack.about());
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<12}{value}");
        };
        if let Some(end) = &self.server_died {
            row("SERVER DIED", end.clone());
        }
        for condition in [Condition::Idle, Condition::Sink, Condition::Attack] {
            let of = |figure: fn(&Sample) -> f64| self.median(condition, figure);
            let Some(down) = of(|sample| sample.down.megabits_per_second) else {
                continue;
            };
            let figure = |figure: fn(&Sample) -> f64| of(figure).unwrap_or(f64::NAN);
            let mut line = format!(
                "down {down:.0} Mbit/s, ping {:.2} / {:.2} ms; up {:.0} Mbit/s, ping {:.2} / {:.2} ms; \
                 RSS {:.0} MiB, {:.2} cores",
                figure(|sample| sample.down.ping_p50_ms),
                figure(|sample| sample.down.ping_p99_ms),
                figure(|sample| sample.up.megabits_per_second),
                figure(|sample| sample.up.ping_p50_ms),
                figure(|sample| sample.up.ping_p99_ms),
                self.rss_peak(condition).unwrap_or(f64::NAN),
                figure(|sample| sample.daemon_cpu),
            );
            if condition != Condition::Idle {
                let _ = write!(
                    line,
                    "; load {:.2} Mbit/s, {:.1} tried/s",
                    figure(|sample| sample.sent.megabits_per_second()),
                    figure(|sample| sample.sent.tried as f64 / sample.sent.seconds.max(1e-9)),
                );
            }
            row(condition.word(), line);
        }
        for sample in &self.samples {
            for (direction, flow) in [("down", &sample.down), ("up", &sample.up)] {
                if let Some(failure) = &flow.failure {
                    let first = failure.lines().next().unwrap_or_default();
                    let condition = sample.condition.word();
                    row("no figure", format!("{condition}, {direction}: {first}"));
                }
            }
        }
        for (reason, count) in self.failures() {
            row("attacker", format!("{count} times: {reason}"));
        }
        if !self.newcomers_seconds.is_empty() {
            let times = self.newcomers_seconds.iter().map(|time| match time {
                Some(seconds) => format!("{seconds:.2} s"),
                None => "not in time".to_owned(),
            });
            row("newcomers", times.collect::<Vec<_>>().join(", "));
        }
        let counted: Vec<String> = self
            .counted
            .iter()
            .filter(|(name, _)| !is_traffic(name))
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        if !counted.is_empty() {
            row("counted", counted.join(", "));
        }
        for verdict in self.verdicts() {
            let measured = verdict
                .measured
                .map_or_else(|| "nothing".to_owned(), |measured| format!("{measured:.2}"));
            let is_met = if verdict.is_met { "ok  " } else { "FAIL" };
            row(
                is_met,
                format!("{}: {measured} (bound {:.2})", verdict.goal, verdict.bound),
            );
        }
        text
    }

    /// Connections of the attacker that failed while it attacked the server, by reason.
    fn failures(&self) -> BTreeMap<&str, u64> {
        let mut failures = BTreeMap::new();
        let attacks = self.samples.iter();
        for sample in attacks.filter(|sample| sample.condition == Condition::Attack) {
            for (reason, count) in &sample.sent.failures {
                *failures.entry(reason.as_str()).or_default() += count;
            }
        }
        failures
    }
}

impl Condition {
    /// For tables.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Condition::Idle => "idle",
            Condition::Sink => "sink",
            Condition::Attack => "attack",
        }
    }
}

impl Figures {
    /// Whether a goal is missed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        let attacks = self.attacks.iter();
        attacks
            .flat_map(AttackFigures::verdicts)
            .any(|verdict| !verdict.is_met)
    }

    /// For people: a line for each attack.
    #[must_use]
    pub fn to_table(&self) -> String {
        let heads = [
            "attack",
            "down",
            "up",
            "ping down",
            "ping up",
            "RSS",
            "bound",
            "newcomer",
            "server",
            "goals",
        ];
        let mut rows = vec![heads.map(str::to_owned).to_vec()];
        for figures in &self.attacks {
            let verdicts = figures.verdicts();
            let verdict = |goal: &str| verdicts.iter().find(|verdict| verdict.goal == goal);
            let text = |goal: &str, decimals: usize| {
                let measured = verdict(goal).and_then(|verdict| verdict.measured);
                measured.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
            };
            let missed = verdicts.iter().filter(|verdict| !verdict.is_met).count();
            rows.push(vec![
                figures.attack.name(),
                text("throughput down", 2),
                text("throughput up", 2),
                text("ping beside down p99", 1),
                text("ping beside up p99", 1),
                text("daemon RSS, MiB", 0),
                verdict("daemon RSS, MiB")
                    .map_or_else(String::new, |verdict| format!("{:.0}", verdict.bound)),
                match verdict("newcomer up, s") {
                    Some(Verdict { measured: None, .. }) => "late".to_owned(),
                    _ => text("newcomer up, s", 2),
                },
                if figures.server_died.is_some() {
                    "died".to_owned()
                } else {
                    "alive".to_owned()
                },
                if missed == 0 {
                    "met".to_owned()
                } else {
                    format!("{missed} missed")
                },
            ]);
        }
        crate::report::table(&rows)
    }
}

/// Counters of ordinary traffic, which every server has.
fn is_traffic(name: &str) -> bool {
    [
        "tun_",
        "sent_",
        "received_",
        "gathered_",
        "turns",
        "handed_over",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
}

/// All counters of a status document, summed up over workers and connections; those at zero are
/// left out.
#[must_use]
pub fn counted(status: &Value) -> BTreeMap<String, u64> {
    let mut counted = BTreeMap::new();
    add_counters(status, &mut counted);
    counted
}

fn add_counters(value: &Value, counted: &mut BTreeMap<String, u64>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| add_counters(value, counted)),
        Value::Object(members) => {
            for (name, value) in members {
                match value.as_object().filter(|_| name == "counters") {
                    None => add_counters(value, counted),
                    Some(counters) => {
                        for (name, value) in counters {
                            let value = value.as_u64().filter(|value| *value > 0);
                            if let Some(value) = value {
                                *counted.entry(name.clone()).or_default() += value;
                            }
                        }
                    }
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(condition: Condition, megabits_per_second: f64, ping_p99_ms: f64) -> Sample {
        let flow = Flow {
            megabits_per_second,
            ping_p50_ms: ping_p99_ms / 2.0,
            ping_p99_ms,
            failure: None,
        };
        Sample {
            condition,
            round: 1,
            down: flow.clone(),
            up: flow,
            sent: Sent::default(),
            rss_peak_mib: 100.0,
            daemon_cpu: 0.5,
        }
    }

    fn figures(attack: Sample) -> AttackFigures {
        AttackFigures {
            attack: Attack::TinySegmentsUdp,
            samples: vec![
                sample(Condition::Idle, 5_000.0, 0.5),
                sample(Condition::Sink, 4_000.0, 1.0),
                attack,
            ],
            newcomers_seconds: Vec::new(),
            server_died: None,
            counted: BTreeMap::new(),
            goals: Vec::new(),
        }
    }

    fn missed(figures: &AttackFigures) -> Vec<&'static str> {
        let verdicts = figures.verdicts().into_iter();
        verdicts
            .filter(|verdict| !verdict.is_met)
            .map(|verdict| verdict.goal)
            .collect()
    }

    fn whole(attack: AttackFigures) -> Figures {
        Figures {
            rounds: 1,
            seconds: 2,
            attacks: vec![attack],
        }
    }

    #[test]
    fn an_attack_that_costs_little_meets_all_goals() {
        let figures = figures(sample(Condition::Attack, 3_700.0, 2.9));
        assert_eq!(missed(&figures), [""; 0]);
        assert!(!whole(figures).has_failed());
    }

    #[test]
    fn attack_is_compared_with_the_sink_and_not_with_idle() {
        let figures = figures(sample(Condition::Attack, 3_500.0, 3.1));
        assert_eq!(
            missed(&figures),
            [
                "throughput down",
                "ping beside down p99",
                "throughput up",
                "ping beside up p99"
            ]
        );
        assert!(whole(figures).has_failed());
    }

    #[test]
    fn a_machine_that_gets_slower_is_not_the_attacks_fault() {
        let mut figures = figures(sample(Condition::Attack, 3_900.0, 1.0));
        for (round, speed) in [(2, 0.7), (3, 0.5)] {
            for (condition, megabits_per_second) in
                [(Condition::Sink, 4_000.0), (Condition::Attack, 3_800.0)]
            {
                figures.samples.push(Sample {
                    round,
                    ..sample(condition, speed * megabits_per_second, 1.0)
                });
            }
        }
        // Of this round there is the attack alone.
        figures.samples.push(Sample {
            round: 4,
            ..sample(Condition::Attack, 100.0, 9.0)
        });
        assert_eq!(missed(&figures), [""; 0]);
        let ratio = figures.ratio(|sample| sample.down.megabits_per_second);
        assert!(
            ratio.is_some_and(|ratio| (ratio - 0.95).abs() < 1e-9),
            "{ratio:?}"
        );
    }

    #[test]
    fn memory_is_bounded_by_what_there_was_without_an_attack() {
        let attack = Sample {
            rss_peak_mib: 100.0 + RSS_GROWTH_MIB_MAX + 1.0,
            ..sample(Condition::Attack, 4_000.0, 1.0)
        };
        assert_eq!(missed(&figures(attack)), ["daemon RSS, MiB"]);
    }

    #[test]
    fn a_server_that_died_and_a_missing_figure_fail() {
        let mut figures = figures(Sample {
            rss_peak_mib: 0.0,
            ..sample(Condition::Attack, 0.0, 1_000.0)
        });
        figures.server_died = Some("SIGABRT".to_owned());
        let missed = missed(&figures);
        for goal in ["server alive", "throughput down", "daemon RSS, MiB"] {
            assert!(missed.contains(&goal), "{missed:?}");
        }
        assert!(figures.to_table().contains("SERVER DIED SIGABRT"));
        assert!(whole(figures).to_table().contains("died"));
    }

    #[test]
    fn every_newcomer_has_to_be_in_time() {
        let mut figures = figures(sample(Condition::Attack, 4_000.0, 1.0));
        figures.newcomers_seconds = vec![Some(0.1), Some(1.9), Some(0.2)];
        assert_eq!(missed(&figures), [""; 0]);
        figures.newcomers_seconds = vec![Some(0.1), Some(2.1)];
        assert_eq!(missed(&figures), ["newcomer up, s"]);
        figures.newcomers_seconds = vec![Some(0.1), None];
        assert_eq!(missed(&figures), ["newcomer up, s"]);
        assert!(whole(figures).to_table().contains("late"));
    }

    #[test]
    fn counters_are_summed_up_wherever_they_are() {
        let status = json!({
            "workers": [
                {"counters": {"turns": 3, "dropped_invalid": 1}},
                {"counters": {"turns": 4, "dropped_invalid": 0}},
            ],
            "sessions": [{"connections": [{"age_seconds": 3.0, "counters": {"dropped_invalid": 2}}]}],
        });
        let counted = counted(&status);
        assert_eq!(counted.get("dropped_invalid"), Some(&3));
        assert_eq!(counted.get("turns"), Some(&7));
        assert_eq!(counted.len(), 2);
    }
}
