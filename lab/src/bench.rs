//! The direct path against ringtun, in one run on one topology.
//!
//! `client` has the tunnel and `client2`, beside it on the same LAN, has not; both measure against iperf3 on
//! `web`. Without a tunnel iperf3 has to listen on a port that the firewall lets through, and ICMP has to be
//! let out for `client2`; nothing else differs. Systems take turns within every round, so that a machine that
//! gets slower or faster does so for both.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::firewall;
use crate::host::Host;
use crate::process::ProcessError;
use crate::report::table;
use crate::scenario::{ScenarioError, Tunnel};
use crate::topology::{CLIENT2_V4, Lab, LabError, Topology, WEB_IPERF_PORT, WEB_SPEED_V4, WEB_V4};

/// How long an iperf3 run may take beyond its measuring time.
const IPERF3_OVERHEAD: Duration = Duration::from_secs(20);

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No lab.
    #[error("no lab to measure in")]
    Lab(#[from] LabError),
    /// No tunnel.
    #[error("no tunnel to measure")]
    Scenario(#[from] ScenarioError),
    /// A measuring program failed.
    #[error("a measurement failed")]
    Process(#[from] ProcessError),
    /// iperf3 could not measure.
    #[error("iperf3: {0}")]
    NoRate(String),
    /// No echo came back.
    #[error("no echo from {0}")]
    Silent(IpAddr),
    /// Progress could not be printed.
    #[error("the terminal takes no more")]
    Terminal(#[from] io::Error),
}

/// How long and how often to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How many times each figure is measured.
    pub rounds: usize,
    /// How long each iperf3 run measures.
    pub seconds: u32,
    /// How many seconds of each iperf3 run are not counted.
    pub omitted_seconds: u32,
    /// How many echo requests make a median.
    pub pings: usize,
}

impl Effort {
    /// About one minute.
    pub const QUICK: Effort = Effort {
        rounds: 3,
        seconds: 2,
        omitted_seconds: 0,
        pings: 100,
    };
    /// About five minutes.
    pub const FULL: Effort = Effort {
        rounds: 5,
        seconds: 5,
        omitted_seconds: 1,
        pings: 500,
    };
}

/// A path between a client and `web`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum System {
    /// No tunnel.
    Direct,
    /// Through ringtun.
    Ringtun,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
pub enum Metric {
    /// One TCP stream from `web`.
    #[serde(rename = "tcp_down_1")]
    TcpDown1,
    /// One TCP stream to `web`.
    #[serde(rename = "tcp_up_1")]
    TcpUp1,
    /// Four TCP streams from `web`.
    #[serde(rename = "tcp_down_4")]
    TcpDown4,
    /// Four TCP streams to `web`.
    #[serde(rename = "tcp_up_4")]
    TcpUp4,
    /// The median round-trip time of ICMP echo on an idle path.
    #[serde(rename = "rtt_idle_us_p50")]
    RttIdle,
}

impl Metric {
    const ALL: [Metric; 5] = [
        Metric::TcpDown1,
        Metric::TcpUp1,
        Metric::TcpDown4,
        Metric::TcpUp4,
        Metric::RttIdle,
    ];

    fn unit(self) -> &'static str {
        match self {
            Metric::RttIdle => "us",
            _ => "Mbit/s",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Metric::TcpDown1 => "TCP down, 1 stream",
            Metric::TcpUp1 => "TCP up, 1 stream",
            Metric::TcpDown4 => "TCP down, 4 streams",
            Metric::TcpUp4 => "TCP up, 4 streams",
            Metric::RttIdle => "idle round trip, median",
        }
    }
}

/// Which way the payload goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From `web` to the client.
    Down,
    /// From the client to `web`.
    Up,
}

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    runs: Vec<Run>,
    /// ringtun's median divided by the direct path's.
    ratios: BTreeMap<Metric, f64>,
}

/// One figure: the spread of all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Run {
    system: System,
    metric: Metric,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
}

/// Measures, and calls `progress` with a line for every round.
///
/// # Errors
/// When the lab, the tunnel or a measurement fails.
pub fn run(
    ringtun: &Path,
    effort: Effort,
    on_start: impl FnOnce(&Lab),
    mut progress: impl FnMut(&str) -> io::Result<()>,
) -> Result<Figures, BenchError> {
    let lab = Lab::build(Topology::Nat)?;
    on_start(&lab);
    firewall::allow_echo(lab.host("firewall"), CLIENT2_V4.into())?;
    let _tunnel = Tunnel::start(&lab, ringtun)?;
    let mut samples: BTreeMap<(Metric, System), Vec<f64>> = BTreeMap::new();
    for round in 1..=effort.rounds {
        progress(&format!("round {round} of {}", effort.rounds))?;
        for metric in Metric::ALL {
            for system in [System::Direct, System::Ringtun] {
                let sample = measure(&lab, system, metric, effort)?;
                samples.entry((metric, system)).or_default().push(sample);
            }
        }
    }
    Ok(Figures::new(samples))
}

fn measure(lab: &Lab, system: System, metric: Metric, effort: Effort) -> Result<f64, BenchError> {
    let client = match system {
        System::Direct => lab.host("client2"),
        System::Ringtun => lab.host("client"),
    };
    let rate = |direction, streams| throughput(client, system, direction, streams, effort);
    match metric {
        Metric::TcpDown1 => rate(Direction::Down, 1),
        Metric::TcpUp1 => rate(Direction::Up, 1),
        Metric::TcpDown4 => rate(Direction::Down, 4),
        Metric::TcpUp4 => rate(Direction::Up, 4),
        Metric::RttIdle => round_trip(client, WEB_V4.into(), effort.pings),
    }
}

/// What iperf3 on `client` receives from or delivers to `web`, in Mbit/s.
///
/// # Errors
/// When iperf3 fails.
pub fn throughput(
    client: &Host,
    system: System,
    direction: Direction,
    streams: usize,
    effort: Effort,
) -> Result<f64, BenchError> {
    let (address, port): (Ipv4Addr, u16) = match system {
        System::Direct => (WEB_SPEED_V4, 443),
        System::Ringtun => (WEB_V4, WEB_IPERF_PORT),
    };
    let mut iperf3 = client
        .command("iperf3")
        .args([
            "--json",
            "--client",
            &address.to_string(),
            "--port",
            &port.to_string(),
        ])
        .args([
            "--connect-timeout",
            "5000",
            "--parallel",
            &streams.to_string(),
        ])
        .args([
            "--time",
            &effort.seconds.to_string(),
            "--omit",
            &effort.omitted_seconds.to_string(),
        ]);
    if direction == Direction::Down {
        iperf3 = iperf3.arg("--reverse");
    }
    let measuring = Duration::from_secs(u64::from(effort.seconds + effort.omitted_seconds));
    let report = iperf3.limit(measuring + IPERF3_OVERHEAD).run()?.text();
    megabits_per_second(&report).map_err(BenchError::NoRate)
}

/// The receiver's rate in an iperf3 report, or what iperf3 says instead.
fn megabits_per_second(report: &str) -> Result<f64, String> {
    let complaint = || report.trim().to_owned();
    let report: serde_json::Value = serde_json::from_str(report).map_err(|_| complaint())?;
    let rate = report
        .pointer("/end/sum_received/bits_per_second")
        .and_then(serde_json::Value::as_f64);
    rate.map(|rate| rate / 1e6).ok_or_else(|| {
        report["error"]
            .as_str()
            .map_or_else(complaint, str::to_owned)
    })
}

/// The median round-trip time of echo requests, in microseconds.
fn round_trip(client: &Host, to: IpAddr, pings: usize) -> Result<f64, BenchError> {
    let times = client.ping(to, pings)?.round_trips_us;
    if times.is_empty() {
        return Err(BenchError::Silent(to));
    }
    Ok(median(times.into_iter().map(|time| time as f64).collect()))
}

impl Figures {
    fn new(samples: BTreeMap<(Metric, System), Vec<f64>>) -> Figures {
        let runs: Vec<Run> = samples
            .into_iter()
            .map(|((metric, system), samples)| Run {
                system,
                metric,
                unit: metric.unit(),
                min: rounded(samples.iter().copied().fold(f64::INFINITY, f64::min)),
                max: rounded(samples.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
                median: rounded(median(samples)),
            })
            .collect();
        let median = |metric, system| {
            runs.iter()
                .find(|run| run.metric == metric && run.system == system)
                .map(|run| run.median)
        };
        let ratios = Metric::ALL
            .into_iter()
            .filter_map(|metric| {
                let ratio = median(metric, System::Ringtun)? / median(metric, System::Direct)?;
                Some((metric, (ratio * 1000.0).round() / 1000.0))
            })
            .collect();
        Figures { runs, ratios }
    }

    /// Medians and ratios for a terminal.
    #[must_use]
    pub fn to_table(&self) -> String {
        let cells = |cells: [&str; 5]| cells.map(str::to_owned).to_vec();
        let mut rows = vec![cells(["medians", "", "direct", "ringtun", "ratio"])];
        for (metric, ratio) in &self.ratios {
            let of = |system| {
                let run = self
                    .runs
                    .iter()
                    .find(|run| run.metric == *metric && run.system == system);
                run.map_or(String::new(), |run| format!("{:.0}", run.median))
            };
            let (direct, ringtun) = (of(System::Direct), of(System::Ringtun));
            rows.push(cells([
                metric.title(),
                metric.unit(),
                &direct,
                &ringtun,
                &format!("{ratio:.2}"),
            ]));
        }
        table(&rows)
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    if samples.len() % 2 == 1 {
        samples[middle]
    } else {
        (samples[middle - 1] + samples[middle]) / 2.0
    }
}

/// One decimal is more than these figures are good for.
fn rounded(figure: f64) -> f64 {
    (figure * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        Figures::new(BTreeMap::from([
            (
                (Metric::TcpDown1, System::Direct),
                vec![1000.0, 3000.0, 2000.0],
            ),
            ((Metric::TcpDown1, System::Ringtun), vec![900.0, 1000.0]),
            ((Metric::RttIdle, System::Direct), vec![50.0]),
            ((Metric::RttIdle, System::Ringtun), vec![150.04]),
        ]))
    }

    #[test]
    fn figures_have_the_documented_form() {
        let json = serde_json::to_value(figures()).expect("plain values");
        let expected = serde_json::json!({
            "runs": [
                {"system": "direct", "metric": "tcp_down_1", "unit": "Mbit/s", "median": 2000.0, "min": 1000.0, "max": 3000.0},
                {"system": "ringtun", "metric": "tcp_down_1", "unit": "Mbit/s", "median": 950.0, "min": 900.0, "max": 1000.0},
                {"system": "direct", "metric": "rtt_idle_us_p50", "unit": "us", "median": 50.0, "min": 50.0, "max": 50.0},
                {"system": "ringtun", "metric": "rtt_idle_us_p50", "unit": "us", "median": 150.0, "min": 150.0, "max": 150.0},
            ],
            "ratios": {"tcp_down_1": 0.475, "rtt_idle_us_p50": 3.0},
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn the_table_shows_medians_and_ratios() {
        let table = figures().to_table();
        assert!(
            table.contains("TCP down, 1 stream       Mbit/s    2000      950   0.47"),
            "{table}"
        );
    }

    #[test]
    fn the_receiver_counts() {
        let report = r#"{"end":{"sum_sent":{"bits_per_second":9e9},"sum_received":{"bits_per_second":8e9}}}"#;
        assert_eq!(megabits_per_second(report), Ok(8000.0));
        assert_eq!(
            megabits_per_second(r#"{"error":"unable to connect"}"#),
            Err("unable to connect".to_owned())
        );
    }
}
