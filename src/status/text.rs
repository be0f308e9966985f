//! The report for people: compact, aligned, in human units.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::config::IoMode;

use super::{Connection, Report, Role, Session, State, Unauthenticated, Worker};

/// Between columns.
const GAP: &str = "  ";
/// Before everything but the headline.
const INDENT: &str = "  ";

/// One instance, several lines, each ended.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    let role = match report.role {
        Role::Server => "server",
        Role::Client => "client",
    };
    let _ = writeln!(
        out,
        "{}: {role}, up {} (version {}, keeper {}, daemon {})",
        report.interface,
        duration(report.up_seconds),
        report.version,
        report.keeper_pid,
        report.daemon_pid,
    );
    out.push_str(&facts(report).aligned());
    out.push('\n');
    out.push_str(&workers(&report.workers).aligned());
    if !report.sessions.is_empty() {
        out.push('\n');
        out.push_str(&sessions(report).aligned());
    }
    let limits: Vec<_> = report.sessions.iter().filter_map(limits_of).collect();
    if !limits.is_empty() {
        let mut table = Table::new(&["peer", "holds", "closing", "refused", "ended"]);
        limits.into_iter().for_each(|row| table.row(row));
        out.push('\n');
        out.push_str(&table.aligned());
    }
    out
}

/// What a peer holds of packet memory, what was refused to it, and how its connections have ended; none where there is
/// nothing to tell.
fn limits_of(session: &Session) -> Option<[String; 5]> {
    let past = &session.past;
    let mut counters = past.counters.clone();
    let mut held = [0; 3];
    for connection in &session.connections {
        counters.add(&connection.counters);
        let of = &connection.held;
        let bytes = of.control_bytes + of.outside_bytes;
        for (sum, part) in held.iter_mut().zip([of.chunks, of.packets, bytes]) {
            *sum += part;
        }
    }
    let refused = named([
        ("requests", counters.refused_requests),
        ("pings", counters.refused_pings),
        ("answers", counters.refused_answers),
        ("memory", counters.refused_memory),
        ("taken back", counters.reclaimed),
        ("put off", counters.deferred),
    ]);
    let ended = named([
        ("closed", past.ended_closed),
        ("lost", past.ended_lost),
        ("misbehaved", past.ended_misbehaved),
        ("by the server", past.ended_replaced),
    ]);
    if refused.is_empty() && ended.is_empty() && past.closing == 0 {
        return None;
    }
    let [chunks, packets, outside] = held;
    let holds = format!("{chunks} chunks, {packets} packets, {}", bytes(outside));
    let or_none = |text: String| if text.is_empty() { "0".into() } else { text };
    Some([
        session.peer.clone().unwrap_or_else(|| "server".into()),
        holds,
        past.closing.to_string(),
        or_none(refused),
        or_none(ended),
    ])
}

/// Names and counts of what is not zero.
fn named<const N: usize>(counts: [(&str, u64); N]) -> String {
    let counts = counts.into_iter().filter(|(_, value)| *value > 0);
    let counts: Vec<String> = counts
        .map(|(name, value)| format!("{name} {}", count(value)))
        .collect();
    counts.join(", ")
}

/// Names and values.
fn facts(report: &Report) -> Table {
    let mut table = Table::new(&[]);
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            table.row([name.to_owned(), value]);
        }
    };
    if let Some(server) = &report.server {
        let connected = report.sessions.iter();
        let connected = connected.filter(|session| !session.connections.is_empty());
        fact("listening on", joined(&server.listeners));
        fact(
            "peers",
            format!("{} invited, {} connected", server.peers, connected.count()),
        );
        fact("pools", format!("{} {}", server.pool_v4, server.pool_v6));
        if !server.ipv6_uplink {
            fact("IPv6", "none here, so clients get none".into());
        }
        fact("nameservers", joined(&server.dns));
        fact("unauthenticated", presence(&server.unauthenticated));
        fact("", outcomes(&server.unauthenticated));
    }
    if let Some(client) = &report.client {
        let state = match client.state {
            State::Connecting => "connecting",
            State::Up => "up",
            State::Reconnecting => "reconnecting",
        };
        let connections = report.sessions.iter();
        let connections: usize = connections.map(|session| session.connections.len()).sum();
        fact(
            "state",
            format!(
                "{state} for {}, {connections} of {} connections",
                duration(client.state_seconds),
                client.connections_wanted
            ),
        );
        fact("server", client.server.clone());
        fact("addresses", joined(&client.addresses));
        fact("routes", joined(&client.routes));
        if client.ipv6_blocked {
            fact("IPv6", "blocked, for the server carries none".into());
        }
        fact("nameservers", joined(&client.dns));
        for failure in &client.failures {
            fact("failed", failure.clone());
        }
    }
    if report.io_mode != IoMode::Auto {
        fact("io_uring", "baseline, by configuration".into());
    }
    fact("offloads", report.tun_offloads.join(" "));
    let controls: BTreeSet<&str> = report
        .sessions
        .iter()
        .flat_map(|session| &session.connections)
        .map(|connection| connection.tcp.congestion_control.as_str())
        .collect();
    let controls = controls.into_iter().filter(|name| !name.is_empty());
    fact("congestion", joined(controls));
    table
}

/// Unauthenticated connections that are there.
fn presence(unauthenticated: &Unauthenticated) -> String {
    let Unauthenticated {
        connected,
        networks,
        accepted,
        ..
    } = unauthenticated;
    let from = match networks {
        0 => String::new(),
        1 => " from 1 network".into(),
        more => format!(" from {} networks", count(*more)),
    };
    format!(
        "{} connected{from}, {} accepted",
        count(*connected),
        count(*accepted)
    )
}

/// What has become of others, unless that is nothing.
fn outcomes(unauthenticated: &Unauthenticated) -> String {
    let outcomes = [
        ("evicted", unauthenticated.evicted()),
        ("refused", unauthenticated.refused),
        ("handshakes delayed", unauthenticated.handshakes_delayed),
        ("dropped", unauthenticated.handshakes_dropped),
        ("failed", unauthenticated.handshake_failures),
        ("timed out", unauthenticated.timeouts),
        ("web requests", unauthenticated.web_requests),
        ("wrong tokens", unauthenticated.wrong_tokens),
    ];
    let outcomes: Vec<String> = outcomes
        .into_iter()
        .filter(|(_, number)| *number > 0)
        .map(|(name, number)| format!("{name} {}", count(number)))
        .collect();
    outcomes.join(", ")
}

fn workers(workers: &[Worker]) -> Table {
    let mut table = Table::new(&[
        "worker", "io_uring", "buffers", "from TUN", "to TUN", "dropped",
    ]);
    for (index, worker) in workers.iter().enumerate() {
        let (io, counters) = (&worker.io, &worker.counters);
        let wanted = if io.buffer_bytes < io.buffer_bytes_wanted {
            format!(" of {}", bytes(io.buffer_bytes_wanted))
        } else {
            String::new()
        };
        let buffers = format!(
            "{}{wanted}, {}",
            bytes(io.buffer_bytes),
            if io.buffers_registered {
                "registered"
            } else {
                "not registered"
            }
        );
        let reads = if io.tun_nowait { "batches" } else { "a chain" };
        table.row([
            index.to_string(),
            format!("{}, {}", io.ring, reads),
            buffers,
            traffic(counters.tun_read_bytes, counters.tun_read_packets),
            traffic(counters.tun_written_bytes, counters.tun_written_packets),
            drops(counters.drops()),
        ]);
    }
    table
}

fn sessions(report: &Report) -> Table {
    let mut table = Table::new(&[
        "peer",
        "addresses",
        "connection",
        "worker",
        "age",
        "sent",
        "received",
        "waiting",
        "round trip",
        "dropped",
    ]);
    for session in &report.sessions {
        let peer = match (&session.peer, report.role) {
            (Some(peer), _) => peer.as_str(),
            (None, Role::Client) => "server",
            (None, Role::Server) => "",
        };
        session_rows(&mut table, peer, session);
    }
    table
}

/// A line for each connection; the session is named on the first.
fn session_rows(table: &mut Table, peer: &str, session: &Session) {
    let mut front = [peer.to_owned(), joined(&session.addresses)];
    if session.connections.is_empty() {
        table.row(front.into_iter().chain(["none".to_owned()]));
        return;
    }
    for connection in &session.connections {
        table.row(
            std::mem::take(&mut front)
                .into_iter()
                .chain(cells(connection)),
        );
    }
}

fn cells(connection: &Connection) -> [String; 8] {
    let counters = &connection.counters;
    [
        connection.peer_address.to_string(),
        connection.worker.to_string(),
        duration(connection.age_seconds),
        traffic(counters.sent_bytes, counters.sent_packets),
        traffic(counters.received_bytes, counters.received_packets),
        traffic(connection.queue_bytes, connection.queue_packets),
        if connection.silent {
            "silent".into()
        } else {
            duration(f64::from(connection.tcp.rtt_microseconds) / 1e6)
        },
        drops(counters.drops()),
    ]
}

fn joined<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    values.join(" ")
}

fn drops(drops: impl Iterator<Item = (&'static str, u64)>) -> String {
    let drops: Vec<String> = drops
        .map(|(reason, packets)| format!("{} {}", reason.replace('_', " "), count(packets)))
        .collect();
    if drops.is_empty() {
        "0".into()
    } else {
        drops.join(", ")
    }
}

fn traffic(byte_count: u64, packets: u64) -> String {
    if packets == 0 {
        "0".into()
    } else {
        format!("{} in {}", bytes(byte_count), count(packets))
    }
}

/// `1234567` as `1,234,567`.
fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Two or three digits and a unit of 1024s.
fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if value < 1024 {
        return format!("{value} B");
    }
    let mut scaled = value as f64 / 1024.0;
    let mut unit = 0;
    // What would be shown as 1024 is 1 of the next.
    while scaled >= 1023.5 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(scaled < 9.95);
    format!("{scaled:.decimals$} {}", UNITS[unit])
}

/// The two largest units that matter.
fn duration(seconds: f64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    if seconds < 0.01 {
        return format!("{:.1} ms", seconds * 1e3);
    }
    if seconds < 1.0 {
        return format!("{:.0} ms", seconds * 1e3);
    }
    let whole = seconds as u64;
    if whole < MINUTE {
        format!("{whole} s")
    } else if whole < HOUR {
        format!("{} min {} s", whole / MINUTE, whole % MINUTE)
    } else if whole < DAY {
        format!("{} h {} min", whole / HOUR, whole % HOUR / MINUTE)
    } else {
        format!("{} d {} h", whole / DAY, whole % DAY / HOUR)
    }
}

/// Lines of cells, each column as wide as its widest.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(header: &[&str]) -> Self {
        let header: Vec<String> = header.iter().map(|name| (*name).to_owned()).collect();
        let rows = if header.is_empty() {
            Vec::new()
        } else {
            vec![header]
        };
        Table { rows }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn aligned(&self) -> String {
        let mut widths: Vec<usize> = Vec::new();
        for row in &self.rows {
            for (column, cell) in row.iter().enumerate() {
                if widths.len() == column {
                    widths.push(0);
                }
                widths[column] = widths[column].max(cell.chars().count());
            }
        }
        let mut out = String::new();
        for row in &self.rows {
            let mut line = INDENT.to_owned();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:<width$}{GAP}");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::examples;
    use super::*;

    #[test]
    fn units_are_chosen_by_size() {
        for (value, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (10 * 1024, "10 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (1536 * 1024 * 1024, "1.5 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
        for (value, expected) in [
            (0.000_34, "0.3 ms"),
            (0.25, "250 ms"),
            (1.9, "1 s"),
            (75.0, "1 min 15 s"),
            (7384.0, "2 h 3 min"),
            (90_000.0, "1 d 1 h"),
        ] {
            assert_eq!(duration(value), expected);
        }
        for (value, expected) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(count(value), expected);
        }
    }

    #[test]
    fn a_server_is_shown_with_all_its_connections_in_columns() {
        let mut twice = examples::session("laptop");
        twice.connections.push(Connection {
            silent: true,
            ..examples::connection(1)
        });
        let mut away = examples::session("phone");
        away.connections.clear();
        let shown = text(&examples::server(vec![twice, away]));
        let expected = "\
ringtun0: server, up 2 h 3 min (version 0.1.0, keeper 10, daemon 11)
  listening on     [::]:443
  peers            3 invited, 1 connected
  pools            10.87.0.0/16 fd00::/64
  unauthenticated  250 connected from 2 networks, 12,000 accepted
                   evicted 750, handshakes delayed 20, dropped 4, failed 3, timed out 30, web requests 60, wrong tokens 1
  offloads         csum tso4 tso6

  worker  io_uring           buffers                       from TUN   to TUN  dropped
  0       deferred, batches  16 MiB of 32 MiB, registered  0 B in 12  0       no route 4

  peer    addresses  connection         worker  age         sent              received       waiting       round trip  dropped
  laptop  10.87.0.2  203.0.113.5:41234  1       1 min 15 s  1.0 GiB in 1,000  1.5 KiB in 10  4.0 KiB in 3  0.0 ms      spoofed 2
                     203.0.113.5:41234  1       1 min 15 s  1.0 GiB in 1,000  1.5 KiB in 10  4.0 KiB in 3  silent      spoofed 2
  phone   10.87.0.2  none
";
        assert_eq!(shown, expected, "{shown}");
    }

    #[test]
    fn a_client_that_reconnects_says_since_when_and_why() {
        let mut report = examples::server(Vec::new());
        report.role = Role::Client;
        report.server = None;
        report.client = Some(examples::client());
        let shown = text(&report);
        for line in [
            "ringtun0: client, up ",
            "  state      reconnecting for 12 s, 0 of 2 connections",
            "  IPv6       blocked, for the server carries none",
            "  failed     198.51.100.10:443: connection refused",
        ] {
            assert!(
                shown.lines().any(|shown| shown.starts_with(line)),
                "{shown}"
            );
        }
        assert!(!shown.contains("nameservers"), "{shown}");
    }
}
