//! What is measured: names, units, and which way is better.

use serde::{Deserialize, Serialize};

/// Which way the payload goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From `web` to the client.
    Down,
    /// From the client to `web`.
    Up,
}

impl Direction {
    /// Both.
    pub const BOTH: [Direction; 2] = [Direction::Down, Direction::Up];

    /// As in "TCP down".
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Direction::Down => "down",
            Direction::Up => "up",
        }
    }
}

/// What can be left out of a run. Sections of the report are the same.
#[derive(
    Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// TCP throughput, and the processor time that it takes
    Tcp,
    /// UDP packets per second
    Udp,
    /// Round-trip times, idle and beside a TCP stream, or one each way
    Rtt,
    /// Eight TCP streams and a flow of requests and responses beside them
    Fairness,
    /// Time from the start of the client to the first echo reply
    Connect,
    /// Resident memory of both sides
    Memory,
}

impl Group {
    /// All groups, in the order of the report.
    pub const ALL: [Group; 6] = [
        Group::Tcp,
        Group::Udp,
        Group::Rtt,
        Group::Fairness,
        Group::Connect,
        Group::Memory,
    ];

    /// What is measured on a wire unless something else is asked for, in this order.
    pub const FAR: [Group; 3] = [Group::Tcp, Group::Rtt, Group::Fairness];

    /// The heading of its section.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Group::Tcp => "Throughput and processor time",
            Group::Udp => "Packets per second",
            Group::Rtt => "Latency",
            Group::Fairness => "Fairness",
            Group::Connect => "Connecting",
            Group::Memory => "Memory",
        }
    }
}

/// One figure of a system.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// Processor time of the tunnel's processes on both sides for what one TCP stream brings from `web`.
    CpuTunnelDown,
    /// Processor time of the tunnel's processes on both sides for what one TCP stream takes to `web`.
    CpuTunnelUp,
    /// Busy time of the whole machine, the ends of the connection and the network included.
    CpuMachineDown,
    /// Busy time of the whole machine, the ends of the connection and the network included.
    CpuMachineUp,
    /// UDP datagrams of 64 bytes received from `web`.
    #[serde(rename = "udp_down_64")]
    UdpDown64,
    /// UDP datagrams of 64 bytes received by `web`.
    #[serde(rename = "udp_up_64")]
    UdpUp64,
    /// UDP datagrams of 1200 bytes received from `web`.
    #[serde(rename = "udp_down_1200")]
    UdpDown1200,
    /// UDP datagrams of 1200 bytes received by `web`.
    #[serde(rename = "udp_up_1200")]
    UdpUp1200,
    /// The median round-trip time of ICMP echo on an idle path.
    #[serde(rename = "rtt_idle_us_p50")]
    RttIdleP50,
    /// Its 99th percentile.
    #[serde(rename = "rtt_idle_us_p99")]
    RttIdleP99,
    /// The median beside one TCP stream from `web`.
    #[serde(rename = "rtt_down_us_p50")]
    RttDownP50,
    /// Its 99th percentile.
    #[serde(rename = "rtt_down_us_p99")]
    RttDownP99,
    /// The median beside one TCP stream to `web`.
    #[serde(rename = "rtt_up_us_p50")]
    RttUpP50,
    /// Its 99th percentile.
    #[serde(rename = "rtt_up_us_p99")]
    RttUpP99,
    /// What a TCP stream from `web` gets beside one to it.
    TcpDownBoth,
    /// What a TCP stream to `web` gets beside one from it.
    TcpUpBoth,
    /// The median beside both.
    #[serde(rename = "rtt_both_us_p50")]
    RttBothP50,
    /// Its 99th percentile.
    #[serde(rename = "rtt_both_us_p99")]
    RttBothP99,
    /// Jain's index of what each of eight TCP streams from `web` gets: 1 when all get the same, 1/8 when one gets all.
    FairDown,
    /// Jain's index of what each of eight TCP streams to `web` gets.
    FairUp,
    /// The 99th percentile from a request of 64 bytes to its response on an idle path, over one TCP connection.
    #[serde(rename = "request_idle_us_p99")]
    RequestIdleP99,
    /// The same beside eight TCP streams from `web`.
    #[serde(rename = "request_down_us_p99")]
    RequestDownP99,
    /// The same beside eight TCP streams to `web`.
    #[serde(rename = "request_up_us_p99")]
    RequestUpP99,
    /// From the start of the client to the first echo reply through the tunnel.
    ConnectMs,
    /// Resident memory of the client's processes before any load.
    RssClientIdle,
    /// Resident memory of the server's processes, one client connected, before any load.
    RssServerIdle,
    /// The most that the client's processes ever had.
    RssClientPeak,
    /// The most that the server's processes ever had.
    RssServerPeak,
}

impl Metric {
    /// All metrics, in the order of the report.
    pub const ALL: [Metric; 32] = [
        Metric::TcpDown1,
        Metric::TcpUp1,
        Metric::TcpDown4,
        Metric::TcpUp4,
        Metric::CpuTunnelDown,
        Metric::CpuTunnelUp,
        Metric::CpuMachineDown,
        Metric::CpuMachineUp,
        Metric::UdpDown64,
        Metric::UdpUp64,
        Metric::UdpDown1200,
        Metric::UdpUp1200,
        Metric::RttIdleP50,
        Metric::RttIdleP99,
        Metric::RttDownP50,
        Metric::RttDownP99,
        Metric::RttUpP50,
        Metric::RttUpP99,
        Metric::TcpDownBoth,
        Metric::TcpUpBoth,
        Metric::RttBothP50,
        Metric::RttBothP99,
        Metric::FairDown,
        Metric::FairUp,
        Metric::RequestIdleP99,
        Metric::RequestDownP99,
        Metric::RequestUpP99,
        Metric::ConnectMs,
        Metric::RssClientIdle,
        Metric::RssServerIdle,
        Metric::RssClientPeak,
        Metric::RssServerPeak,
    ];

    /// What has to be measured for it.
    #[must_use]
    pub fn group(self) -> Group {
        match self {
            Metric::TcpDown1
            | Metric::TcpUp1
            | Metric::TcpDown4
            | Metric::TcpUp4
            | Metric::CpuTunnelDown
            | Metric::CpuTunnelUp
            | Metric::CpuMachineDown
            | Metric::CpuMachineUp => Group::Tcp,
            Metric::UdpDown64 | Metric::UdpUp64 | Metric::UdpDown1200 | Metric::UdpUp1200 => {
                Group::Udp
            }
            Metric::RttIdleP50
            | Metric::RttIdleP99
            | Metric::RttDownP50
            | Metric::RttDownP99
            | Metric::RttUpP50
            | Metric::RttUpP99
            | Metric::TcpDownBoth
            | Metric::TcpUpBoth
            | Metric::RttBothP50
            | Metric::RttBothP99 => Group::Rtt,
            Metric::FairDown
            | Metric::FairUp
            | Metric::RequestIdleP99
            | Metric::RequestDownP99
            | Metric::RequestUpP99 => Group::Fairness,
            Metric::ConnectMs => Group::Connect,
            Metric::RssClientIdle
            | Metric::RssServerIdle
            | Metric::RssClientPeak
            | Metric::RssServerPeak => Group::Memory,
        }
    }

    /// The unit of its figures.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Metric::TcpDown1
            | Metric::TcpUp1
            | Metric::TcpDown4
            | Metric::TcpUp4
            | Metric::TcpDownBoth
            | Metric::TcpUpBoth => "Mbit/s",
            Metric::CpuTunnelDown
            | Metric::CpuTunnelUp
            | Metric::CpuMachineDown
            | Metric::CpuMachineUp => "s/GB",
            Metric::UdpDown64 | Metric::UdpUp64 | Metric::UdpDown1200 | Metric::UdpUp1200 => {
                "packets/s"
            }
            Metric::RttIdleP50
            | Metric::RttIdleP99
            | Metric::RttDownP50
            | Metric::RttDownP99
            | Metric::RttUpP50
            | Metric::RttUpP99
            | Metric::RttBothP50
            | Metric::RttBothP99
            | Metric::RequestIdleP99
            | Metric::RequestDownP99
            | Metric::RequestUpP99 => "us",
            Metric::FairDown | Metric::FairUp => "Jain's index",
            Metric::ConnectMs => "ms",
            Metric::RssClientIdle
            | Metric::RssServerIdle
            | Metric::RssClientPeak
            | Metric::RssServerPeak => "MiB",
        }
    }

    /// What it is, for people.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Metric::TcpDown1 => "TCP down, 1 stream",
            Metric::TcpUp1 => "TCP up, 1 stream",
            Metric::TcpDown4 => "TCP down, 4 streams",
            Metric::TcpUp4 => "TCP up, 4 streams",
            Metric::CpuTunnelDown => "CPU of the tunnel, TCP down",
            Metric::CpuTunnelUp => "CPU of the tunnel, TCP up",
            Metric::CpuMachineDown => "CPU of the machine, TCP down",
            Metric::CpuMachineUp => "CPU of the machine, TCP up",
            Metric::UdpDown64 => "UDP down, 64 B",
            Metric::UdpUp64 => "UDP up, 64 B",
            Metric::UdpDown1200 => "UDP down, 1200 B",
            Metric::UdpUp1200 => "UDP up, 1200 B",
            Metric::RttIdleP50 => "round trip, idle, median",
            Metric::RttIdleP99 => "round trip, idle, p99",
            Metric::RttDownP50 => "round trip beside TCP down, median",
            Metric::RttDownP99 => "round trip beside TCP down, p99",
            Metric::RttUpP50 => "round trip beside TCP up, median",
            Metric::RttUpP99 => "round trip beside TCP up, p99",
            Metric::TcpDownBoth => "TCP down beside TCP up",
            Metric::TcpUpBoth => "TCP up beside TCP down",
            Metric::RttBothP50 => "round trip beside both, median",
            Metric::RttBothP99 => "round trip beside both, p99",
            Metric::FairDown => "fairness, 8 TCP streams down",
            Metric::FairUp => "fairness, 8 TCP streams up",
            Metric::RequestIdleP99 => "request and response, idle, p99",
            Metric::RequestDownP99 => "request beside 8 streams down, p99",
            Metric::RequestUpP99 => "request beside 8 streams up, p99",
            Metric::ConnectMs => "start to first reply",
            Metric::RssClientIdle => "memory of the client, idle",
            Metric::RssServerIdle => "memory of the server, idle",
            Metric::RssClientPeak => "memory of the client, peak",
            Metric::RssServerPeak => "memory of the server, peak",
        }
    }

    /// Its name in the JSON.
    #[must_use]
    pub fn key(self) -> String {
        let name = serde_json::to_value(self).ok();
        name.and_then(|name| name.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// Whether more is better.
    #[must_use]
    pub fn more_is_better(self) -> bool {
        matches!(self.group(), Group::Udp) || matches!(self.unit(), "Mbit/s" | "Jain's index")
    }

    /// A figure for people, without its unit.
    #[must_use]
    pub fn text(self, figure: f64) -> String {
        match self.unit() {
            // On a slow path, half a megabit is something.
            "Mbit/s" if figure < 100.0 => format!("{figure:.1}"),
            "Mbit/s" | "packets/s" | "us" => thousands(figure),
            "s/GB" => format!("{figure:.2}"),
            "Jain's index" => format!("{figure:.3}"),
            _ if figure < 100.0 => format!("{figure:.1}"),
            _ => thousands(figure),
        }
    }
}

/// A whole number with a comma between groups of three digits.
#[must_use]
pub fn thousands(figure: f64) -> String {
    let digits = format!("{:.0}", figure.abs());
    let mut text = String::new();
    if figure <= -0.5 {
        text.push('-');
    }
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// How many times as much: two significant digits or more.
#[must_use]
pub fn times(ratio: f64) -> String {
    match ratio {
        ratio if ratio < 0.095 => format!("{ratio:.3}"),
        ratio if ratio < 10.0 => format!("{ratio:.2}"),
        ratio if ratio < 100.0 => format!("{ratio:.1}"),
        ratio => thousands(ratio),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_has_a_name_of_its_own() {
        let keys: BTreeSet<_> = Metric::ALL.into_iter().map(Metric::key).collect();
        let titles: BTreeSet<_> = Metric::ALL.into_iter().map(Metric::title).collect();
        assert_eq!((keys.len(), titles.len()), (32, 32));
        assert!(keys.contains("tcp_down_1") && keys.contains("rtt_idle_us_p50"));
        assert!(keys.contains("cpu_tunnel_down") && keys.contains("udp_up_64"));
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(thousands(0.4), "0");
        assert_eq!(thousands(999.6), "1,000");
        assert_eq!(thousands(1_234_567.0), "1,234,567");
        assert_eq!(Metric::CpuTunnelUp.text(1.257), "1.26");
        assert_eq!(Metric::ConnectMs.text(14.26), "14.3");
        assert_eq!(times(0.0213), "0.021");
        assert_eq!(times(0.541), "0.54");
        assert_eq!(times(29.06), "29.1");
    }
}
