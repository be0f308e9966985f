//! TCP throughput by iperf3.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::BenchError;
use super::metric::Direction;
use crate::host::Host;
use crate::process::Process;

/// How long an iperf3 run may take beyond its measuring time.
const OVERHEAD: Duration = Duration::from_secs(20);
/// How long connections may take to come about, in iperf3's milliseconds.
const CONNECT_LIMIT_MS: &str = "5000";
/// How long a stream may take until it flows.
const FLOWS_LIMIT: Duration = Duration::from_secs(15);

/// An iperf3 client's run.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// The iperf3 server.
    pub to: (Ipv4Addr, u16),
    /// Which way.
    pub direction: Direction,
    /// How many connections at once.
    pub streams: usize,
    /// How long it measures.
    pub seconds: u32,
    /// How many seconds before that are not counted.
    pub omitted_seconds: u32,
    /// The sender's congestion control; `None`: the system's.
    pub congestion_control: Option<CongestionControl>,
}

/// A congestion control that every kernel may have. It takes privileges to choose one that is not allowed to all.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CongestionControl {
    /// By the bottleneck's bandwidth and the round-trip time
    Bbr,
    /// By losses; the default of most machines
    Cubic,
    /// By losses, as of old
    Reno,
}

impl CongestionControl {
    /// The kernel's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CongestionControl::Bbr => "bbr",
            CongestionControl::Cubic => "cubic",
            CongestionControl::Reno => "reno",
        }
    }
}

/// What iperf3 saw.
#[derive(Clone, Debug, PartialEq)]
pub struct Transfer {
    /// What the receiver got, while it was counted.
    pub megabits_per_second: f64,
    /// All payload of the run, the omitted seconds included.
    pub bytes: f64,
    /// What the receiver got from each connection, in bit/s.
    pub bits_per_second: Vec<f64>,
    /// The congestion control of the sending end.
    pub congestion_control: String,
}

impl Stream {
    /// Runs it on `client`.
    ///
    /// # Errors
    /// When iperf3 fails.
    pub fn run(self, client: &Host) -> Result<Transfer, BenchError> {
        self.report(self.start(client)?)
    }

    /// Starts it on `client`, for [`Stream::report`].
    ///
    /// # Errors
    /// When iperf3 does not start.
    pub fn start(self, client: &Host) -> Result<Process, BenchError> {
        let iperf3 = client.command("iperf3").arg("--json");
        Ok(iperf3.args(self.arguments()).spawn()?)
    }

    /// Waits for the end of what was started.
    ///
    /// # Errors
    /// When iperf3 fails, or did not use the congestion control that it should.
    pub fn report(self, iperf3: Process) -> Result<Transfer, BenchError> {
        let report = iperf3.output(self.lasts() + OVERHEAD)?;
        let transfer = transfer(&report.text()).map_err(BenchError::NoRate)?;
        match self.congestion_control {
            Some(wanted) if wanted.name() != transfer.congestion_control => {
                Err(BenchError::NoRate(format!(
                    "the sender used {}, not {}",
                    transfer.congestion_control,
                    wanted.name()
                )))
            }
            _ => Ok(transfer),
        }
    }

    /// Starts it on `client` in both directions at once, for [`Stream::report_both`].
    ///
    /// # Errors
    /// When iperf3 does not start.
    pub fn start_both(self, client: &Host) -> Result<Process, BenchError> {
        let up = Stream {
            direction: Direction::Up,
            ..self
        };
        let iperf3 = client.command("iperf3").args(["--json", "--bidir"]);
        Ok(iperf3.args(up.arguments()).spawn()?)
    }

    /// Waits for the end of what was started in both directions, and returns what was received down and up, in Mbit/s.
    ///
    /// # Errors
    /// When iperf3 fails.
    pub fn report_both(self, iperf3: Process) -> Result<(f64, f64), BenchError> {
        let report = iperf3.output(self.lasts() + OVERHEAD)?;
        both(&report.text()).map_err(BenchError::NoRate)
    }

    fn lasts(self) -> Duration {
        Duration::from_secs(u64::from(self.seconds + self.omitted_seconds))
    }

    /// The same for so many seconds, all of which count.
    #[must_use]
    pub fn lasting(self, seconds: u32) -> Stream {
        Stream {
            seconds,
            omitted_seconds: 0,
            ..self
        }
    }

    /// Starts it on `client` as a load for other measurements, and returns once it flows.
    ///
    /// # Errors
    /// When iperf3 fails.
    pub fn load(self, client: &Host) -> Result<Process, BenchError> {
        let iperf3 = client
            .command("iperf3")
            .args(["--forceflush", "--interval", "0.2", "--format", "m"])
            .args(self.arguments())
            .spawn()?;
        iperf3.wait_for_line("Mbits/sec", FLOWS_LIMIT)?;
        Ok(iperf3)
    }

    fn arguments(self) -> Vec<String> {
        let (address, port) = self.to;
        let mut arguments: Vec<String> = [
            "--client",
            &address.to_string(),
            "--port",
            &port.to_string(),
            "--connect-timeout",
            CONNECT_LIMIT_MS,
            "--parallel",
            &self.streams.to_string(),
            "--time",
            &self.seconds.to_string(),
            "--omit",
            &self.omitted_seconds.to_string(),
        ]
        .map(str::to_owned)
        .to_vec();
        if let Some(wanted) = self.congestion_control {
            arguments.extend(["--congestion", wanted.name()].map(str::to_owned));
        }
        if self.direction == Direction::Down {
            arguments.push("--reverse".to_owned());
        }
        arguments
    }
}

/// The figures in an iperf3 report, or what iperf3 says instead.
fn transfer(report: &str) -> Result<Transfer, String> {
    let (report, [bits_per_second]) = rates(report, ["sum_received"])?;
    let streams = report["end"]["streams"].as_array().into_iter().flatten();
    let intervals = report["intervals"].as_array().into_iter().flatten();
    Ok(Transfer {
        megabits_per_second: bits_per_second / 1e6,
        bytes: intervals
            .filter_map(|interval| number(interval, "/sum/bytes"))
            .sum(),
        bits_per_second: streams
            .filter_map(|stream| number(stream, "/receiver/bits_per_second"))
            .collect(),
        congestion_control: report["end"]["sender_tcp_congestion"]
            .as_str()
            .unwrap_or("unknown")
            .to_owned(),
    })
}

/// Mbit/s down and up in the report of a run in both directions.
fn both(report: &str) -> Result<(f64, f64), String> {
    let (_, [up, down]) = rates(report, ["sum_received", "sum_received_bidir_reverse"])?;
    Ok((down / 1e6, up / 1e6))
}

/// A report and its sums in bit/s, or what iperf3 says instead.
fn rates<const N: usize>(report: &str, sums: [&str; N]) -> Result<(Value, [f64; N]), String> {
    let complaint = || report.trim().to_owned();
    let report: Value = serde_json::from_str(report).map_err(|_| complaint())?;
    let mut rates = [0.0; N];
    for (rate, sum) in rates.iter_mut().zip(sums) {
        *rate = number(&report, &format!("/end/{sum}/bits_per_second")).ok_or_else(|| {
            report["error"]
                .as_str()
                .map_or_else(complaint, str::to_owned)
        })?;
    }
    Ok((report, rates))
}

fn number(value: &Value, path: &str) -> Option<f64> {
    value.pointer(path).and_then(Value::as_f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receiver_counts_and_all_intervals_cost() {
        let report = r#"{
            "intervals": [{"sum": {"bytes": 5e8, "omitted": true}}, {"sum": {"bytes": 1e9}}],
            "end": {
                "sum_sent": {"bits_per_second": 9e9},
                "sum_received": {"bits_per_second": 8e9},
                "streams": [{"sender": {"bits_per_second": 9e9}, "receiver": {"bits_per_second": 8e9}}],
                "sender_tcp_congestion": "bbr"
            }
        }"#;
        let expected = Transfer {
            megabits_per_second: 8000.0,
            bytes: 1.5e9,
            bits_per_second: vec![8e9],
            congestion_control: "bbr".to_owned(),
        };
        assert_eq!(transfer(report), Ok(expected));
    }

    #[test]
    fn both_directions_are_told_apart() {
        let report = r#"{
            "end": {
                "sum_sent": {"bits_per_second": 9e6},
                "sum_received": {"bits_per_second": 8e6},
                "sum_received_bidir_reverse": {"bits_per_second": 7e6}
            }
        }"#;
        assert_eq!(both(report), Ok((7.0, 8.0)));
        assert!(both(r#"{"end": {"sum_received": {"bits_per_second": 8e6}}}"#).is_err());
    }

    #[test]
    fn a_complaint_is_passed_on() {
        assert_eq!(
            transfer(r#"{"error":"unable to connect"}"#),
            Err("unable to connect".to_owned())
        );
        assert_eq!(transfer("no JSON\n"), Err("no JSON".to_owned()));
    }
}
