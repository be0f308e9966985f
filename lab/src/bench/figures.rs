//! The outcome of a run: medians, spreads and ratios, as JSON and for a terminal.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Plan;
use super::machine::Machine;
use super::metric::{Metric, times};
use super::system::{Setup, System};
use crate::report::table;

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Where and when.
    pub machine: Machine,
    /// How long and how often.
    pub plan: Plan,
    /// What was compared, and how it was set up.
    pub systems: Vec<Entry>,
    /// One entry for each system and metric.
    pub runs: Vec<Run>,
    /// ringtun's median divided by the direct path's.
    pub ratios: BTreeMap<Metric, f64>,
    /// ringtun's median divided by each system's.
    pub ratios_to: BTreeMap<System, BTreeMap<Metric, f64>>,
}

/// A system and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Which.
    pub system: System,
    /// Its name for people.
    pub title: &'static str,
    /// Whether there are figures.
    pub outcome: Outcome,
    /// Why not, or what went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The congestion control of the tunnel's own connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outer_congestion_control: Option<String>,
    /// Every command, with the host in front.
    pub commands: Vec<String>,
    /// Versions, remarks, configurations.
    #[serde(flatten)]
    pub setup: Setup,
}

/// What became of a system.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// There are figures.
    Measured,
    /// A program is not installed.
    Skipped,
    /// It did not come up, or did not stay up.
    Failed,
}

/// One figure: the spread of all rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    /// Whose.
    pub system: System,
    /// What.
    pub metric: Metric,
    /// In which unit.
    pub unit: &'static str,
    /// The median of the rounds.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
    /// Round by round.
    pub samples: Vec<f64>,
}

/// What was measured, in order.
pub(super) type AllSamples = BTreeMap<(Metric, System), Vec<f64>>;

impl Figures {
    pub(super) fn new(
        machine: Machine,
        plan: Plan,
        systems: Vec<Entry>,
        samples: AllSamples,
    ) -> Figures {
        let runs: Vec<Run> = samples
            .into_iter()
            .map(|((metric, system), samples)| Run {
                system,
                metric,
                unit: metric.unit(),
                min: rounded(
                    metric,
                    samples.iter().copied().fold(f64::INFINITY, f64::min),
                ),
                max: rounded(
                    metric,
                    samples.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                ),
                median: rounded(metric, super::median(samples.clone())),
                samples: samples
                    .into_iter()
                    .map(|sample| rounded(metric, sample))
                    .collect(),
            })
            .collect();
        let mut figures = Figures {
            machine,
            plan,
            systems,
            runs,
            ratios: BTreeMap::new(),
            ratios_to: BTreeMap::new(),
        };
        for system in System::ALL
            .into_iter()
            .filter(|system| *system != System::Ringtun)
        {
            let ratios: BTreeMap<Metric, f64> = Metric::ALL
                .into_iter()
                .filter_map(|metric| Some((metric, figures.ratio(metric, system)?)))
                .collect();
            if !ratios.is_empty() {
                figures.ratios_to.insert(system, ratios);
            }
        }
        figures.ratios = figures
            .ratios_to
            .get(&System::Direct)
            .cloned()
            .unwrap_or_default();
        figures
    }

    /// The figure of a system, if there is one.
    #[must_use]
    pub fn run(&self, metric: Metric, system: System) -> Option<&Run> {
        self.runs
            .iter()
            .find(|run| run.metric == metric && run.system == system)
    }

    /// The systems that have figures.
    pub fn measured(&self) -> impl Iterator<Item = System> {
        System::ALL
            .into_iter()
            .filter(|system| self.runs.iter().any(|run| run.system == *system))
    }

    /// Whether a system did not come up or did not stay up.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.systems
            .iter()
            .any(|entry| entry.outcome == Outcome::Failed)
    }

    /// Medians, and what ringtun's are as multiples of the others', for a terminal.
    #[must_use]
    pub fn to_table(&self) -> String {
        let systems: Vec<System> = self.measured().collect();
        let head = |first: &str, second: &str, systems: &[System]| {
            let systems = systems.iter().map(|system| system.key());
            [first, second]
                .into_iter()
                .chain(systems)
                .map(str::to_owned)
                .collect()
        };
        let mut rows: Vec<Vec<String>> = vec![head("medians", "", &systems)];
        for metric in Metric::ALL {
            let figure = |system| {
                self.run(metric, system)
                    .map_or("-".to_owned(), |run| metric.text(run.median))
            };
            let figures: Vec<String> = systems.iter().map(|system| figure(*system)).collect();
            if figures.iter().any(|figure| figure != "-") {
                rows.push(
                    [
                        vec![metric.title().to_owned(), metric.unit().to_owned()],
                        figures,
                    ]
                    .concat(),
                );
            }
        }
        let mut text = table(&rows);
        let others: Vec<System> = self.ratios_to.keys().copied().collect();
        if !others.is_empty() {
            let mut rows: Vec<Vec<String>> = vec![head("ringtun as a multiple of", "", &others)];
            for metric in Metric::ALL {
                let ratios: Vec<String> = others
                    .iter()
                    .map(|other| {
                        let ratio = self.ratios_to[other].get(&metric);
                        ratio.map_or("-".to_owned(), |ratio| times(*ratio))
                    })
                    .collect();
                if ratios.iter().any(|ratio| ratio != "-") {
                    let wanted = if metric.more_is_better() {
                        "more"
                    } else {
                        "less"
                    };
                    rows.push(
                        [vec![metric.title().to_owned(), wanted.to_owned()], ratios].concat(),
                    );
                }
            }
            text = text + "\n" + &table(&rows);
        }
        for entry in &self.systems {
            let reason = entry.reason.as_deref().unwrap_or_default();
            match entry.outcome {
                Outcome::Measured => {}
                Outcome::Skipped => text += &format!("\nskipped: {}: {reason}\n", entry.title),
                Outcome::Failed => text += &format!("\nFAILED: {}: {reason}\n", entry.title),
            }
        }
        text
    }

    /// The figures that say the most, with where they come from, in Markdown.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        const ROWS: [Metric; 12] = [
            Metric::TcpDown1,
            Metric::TcpUp1,
            Metric::TcpDown4,
            Metric::TcpUp4,
            Metric::CpuTunnelDown,
            Metric::CpuTunnelUp,
            Metric::UdpDown64,
            Metric::UdpUp64,
            Metric::RttIdleP50,
            Metric::RttDownP50,
            Metric::RttDownP99,
            Metric::ConnectMs,
        ];
        let systems: Vec<System> = self.measured().collect();
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let titles = systems.iter().map(|system| system.title().to_owned());
        let mut text = format!(
            "Medians of {} rounds, {}: {} cores of {}, Linux {}, all hosts and iperf3 on the same cores, {} inside the tunnels.\n\n",
            self.plan.rounds,
            self.machine.date.get(..10).unwrap_or_default(),
            self.machine.cores,
            self.machine.cpu,
            self.machine.kernel_version(),
            self.inner_congestion_control().to_uppercase(),
        );
        text += &line([String::new()].into_iter().chain(titles).collect());
        text += &line(
            [&["---"], vec!["---:"; systems.len()].as_slice()]
                .concat()
                .into_iter()
                .map(str::to_owned)
                .collect(),
        );
        for metric in ROWS {
            if self.run(metric, System::Ringtun).is_none() {
                continue;
            }
            let cells = systems.iter().map(|system| {
                self.run(metric, *system)
                    .map_or(String::new(), |run| metric.text(run.median))
            });
            let name = format!("{}, {}", metric.title(), metric.unit());
            text += &line([name].into_iter().chain(cells).collect());
        }
        text
    }

    /// What the measured TCP streams use.
    #[must_use]
    pub fn inner_congestion_control(&self) -> String {
        self.plan.inner.map_or_else(
            || self.machine.inner_congestion_control.clone(),
            |inner| inner.name().to_owned(),
        )
    }

    fn ratio(&self, metric: Metric, to: System) -> Option<f64> {
        let ratio = self.run(metric, System::Ringtun)?.median / self.run(metric, to)?.median;
        ratio.is_finite().then(|| (ratio * 1000.0).round() / 1000.0)
    }
}

/// More digits than these are noise.
fn rounded(metric: Metric, figure: f64) -> f64 {
    let factor = match metric.unit() {
        "s/GB" | "Jain's index" => 1000.0,
        _ => 10.0,
    };
    (figure * factor).round() / factor
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::bench::system::Skipped;

    /// Figures of three systems, and one that is not there.
    pub(in crate::bench) fn figures() -> Figures {
        let ringtun = Path::new("/opt/ringtun");
        let entry = |system: System, outcome, reason: Option<&str>| {
            let setup = system
                .setup(ringtun)
                .or_else(|Skipped(_)| Ok::<_, ()>(Setup::default()));
            let setup = setup.expect("one or the other");
            Entry {
                system,
                title: system.title(),
                outcome,
                reason: reason.map(str::to_owned),
                outer_congestion_control: None,
                commands: setup.commands(),
                setup,
            }
        };
        let systems = vec![
            entry(System::Direct, Outcome::Measured, None),
            entry(System::Ringtun, Outcome::Measured, None),
            entry(
                System::Openvpn,
                Outcome::Failed,
                Some("`openvpn` ended\n    | <no> & why"),
            ),
            entry(
                System::Openconnect,
                Outcome::Skipped,
                Some("ocserv is not installed"),
            ),
        ];
        let samples = BTreeMap::from([
            (
                (Metric::TcpDown1, System::Direct),
                vec![1000.0, 3000.0, 2000.0],
            ),
            ((Metric::TcpDown1, System::Ringtun), vec![900.0, 1000.0]),
            ((Metric::TcpDown1, System::Openvpn), vec![100.0]),
            ((Metric::CpuTunnelDown, System::Ringtun), vec![1.2312]),
            ((Metric::RttIdleP50, System::Direct), vec![50.0]),
            ((Metric::RttIdleP50, System::Ringtun), vec![150.04]),
        ]);
        let machine = Machine::look(ringtun);
        Figures::new(machine, Plan::QUICK, systems, samples)
    }

    #[test]
    fn figures_have_the_documented_form() {
        let json = serde_json::to_value(figures()).expect("plain values");
        let expected = json!([
            {"system": "direct", "metric": "tcp_down_1", "unit": "Mbit/s", "median": 2000.0, "min": 1000.0,
             "max": 3000.0, "samples": [1000.0, 3000.0, 2000.0]},
            {"system": "ringtun", "metric": "tcp_down_1", "unit": "Mbit/s", "median": 950.0, "min": 900.0,
             "max": 1000.0, "samples": [900.0, 1000.0]},
        ]);
        assert_eq!(
            json["runs"].as_array().expect("runs")[..2],
            expected.as_array().expect("two")[..]
        );
        assert_eq!(
            json["ratios"],
            json!({"tcp_down_1": 0.475, "rtt_idle_us_p50": 3.0})
        );
        assert_eq!(
            json["ratios_to"],
            json!({"direct": {"tcp_down_1": 0.475, "rtt_idle_us_p50": 3.0}, "openvpn": {"tcp_down_1": 9.5}})
        );
        let skipped = &json["systems"][3];
        assert_eq!(skipped["system"], "openconnect");
        assert_eq!(skipped["outcome"], "skipped");
        assert_eq!(skipped["reason"], "ocserv is not installed");
    }

    #[test]
    fn markdown_is_a_table() {
        let markdown = figures().to_markdown();
        let (head, table) = markdown.split_once("\n\n").expect("two parts");
        assert!(head.starts_with("Medians of 3 rounds"), "{head}");
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "|  | no tunnel | ringtun | OpenVPN, default |");
        assert_eq!(lines[1], "| --- | ---: | ---: | ---: |");
        assert_eq!(
            lines[2],
            "| TCP down, 1 stream, Mbit/s | 2,000 | 950 | 100 |"
        );
        assert_eq!(lines.len(), 5, "{table}");
    }

    #[test]
    fn no_key_gets_into_the_json() {
        let json = serde_json::to_string(&figures()).expect("plain values");
        assert!(
            !json.contains("PRIVATE KEY") && !json.contains("BEGIN CERTIFICATE"),
            "{json}"
        );
    }

    #[test]
    fn the_table_shows_medians_ratios_and_what_is_missing() {
        let table = figures().to_table();
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        for expected in [
            vec!["medians", "direct", "ringtun", "openvpn"],
            vec!["TCP down, 1 stream", "Mbit/s", "2,000", "950", "100"],
            vec!["CPU of the tunnel, TCP down", "s/GB", "-", "1.23", "-"],
            vec!["ringtun as a multiple of", "direct", "openvpn"],
            vec!["TCP down, 1 stream", "more", "0.47", "9.50"],
            vec!["skipped: OpenConnect/ocserv: ocserv is not installed"],
        ] {
            assert!(lines.contains(&expected), "{expected:?} is not in\n{table}");
        }
        assert!(table.contains("FAILED: OpenVPN, default"), "{table}");
    }
}
