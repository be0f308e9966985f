//! What a crowd comes to.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::bench::{median, usage};

const KIB_PER_MIB: f64 = 1024.0;

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Sessions that were to be opened.
    pub sessions: usize,
    /// Sessions that were.
    pub opened: usize,
    /// Sessions that did not open, or did not last, by reason.
    pub failures: BTreeMap<String, usize>,
    /// Sessions of the crowd that the server had at the end.
    pub connected_at_the_server: usize,
    /// How long all took to open.
    pub opening_seconds: f64,
    /// How many opened in a second.
    pub handshakes_per_second: f64,
    /// Processor time of the server meanwhile.
    pub opening_cpu_seconds: f64,
    /// Of the server with one client, and all the crowd invited.
    pub memory_before: Memory,
    /// Of the server with an idle crowd.
    pub memory: Memory,
    /// Of its processes one by one: keeper, daemon.
    pub memory_of_processes: Vec<Memory>,
    /// Of the server after echoes and transfers.
    pub memory_after: Memory,
    /// Processor time of the server with an idle crowd, in percent of one core.
    pub idle_cpu_percent: f64,
    /// Buffers for ciphertext that the idle crowd had at one moment.
    pub idle_chunks_in_use: u64,
    /// Sessions that sent packets.
    pub active: usize,
    /// What they sent.
    pub echo_requests: usize,
    /// What came back, each checked.
    pub echo_replies: usize,
    /// Median round trip.
    pub echo_time_us: f64,
    /// Bulk transfers, by direction.
    pub bulk: Vec<Bulk>,
}

/// Memory of processes, summed up.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// RSS.
    pub resident_mib: f64,
    /// PSS; 0 where it cannot be read.
    pub proportional_mib: f64,
}

/// An ordinary client's transfers, by round.
#[derive(Clone, Debug, Serialize)]
pub struct Bulk {
    /// `down` or `up`.
    pub direction: &'static str,
    /// Through the server that has the crowd.
    pub beside: Vec<Transfer>,
    /// Through another one.
    pub alone: Vec<Transfer>,
    /// Throughput beside the crowd over that without, of the medians.
    pub ratio: f64,
    /// The same of what the servers' processors did for each byte, which says more where others use the machine, too.
    pub cpu_ratio: f64,
}

/// One transfer.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Transfer {
    /// Throughput.
    pub megabits_per_second: f64,
    /// Processor time of the server.
    pub server_cpu_seconds_per_gb: f64,
}

impl Memory {
    pub(super) fn of(memory: usage::Memory) -> Memory {
        Memory {
            resident_mib: memory.resident_mib,
            proportional_mib: memory.proportional_mib,
        }
    }
}

impl Bulk {
    pub(super) fn new(
        direction: &'static str,
        beside: Vec<Transfer>,
        alone: Vec<Transfer>,
    ) -> Bulk {
        Bulk {
            direction,
            ratio: rate(&beside) / rate(&alone),
            cpu_ratio: cost(&beside) / cost(&alone),
            beside,
            alone,
        }
    }
}

fn rate(transfers: &[Transfer]) -> f64 {
    let rates = transfers.iter().map(|one| one.megabits_per_second);
    median(rates.collect())
}

fn cost(transfers: &[Transfer]) -> f64 {
    let costs = transfers.iter().map(|one| one.server_cpu_seconds_per_gb);
    median(costs.collect())
}

impl Figures {
    /// Whether a session failed, was dropped, or was not answered.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        !self.failures.is_empty()
            || self.opened != self.sessions
            || self.connected_at_the_server != self.sessions
            || self.echo_replies != self.echo_requests
    }

    /// Memory of the server for each session, in KiB.
    #[must_use]
    pub fn session_kib(&self) -> f64 {
        let grown = self.memory.resident_mib - self.memory_before.resident_mib;
        grown * KIB_PER_MIB / self.opened.max(1) as f64
    }

    /// For people.
    #[must_use]
    pub fn to_table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<28}{value}");
        };
        row(
            "sessions",
            format!(
                "{} of {} opened, {} at the server in the end",
                self.opened, self.sessions, self.connected_at_the_server
            ),
        );
        for (reason, count) in &self.failures {
            row("failed", format!("{count}: {reason}"));
        }
        row(
            "opening",
            format!(
                "{:.1} s, {:.0} handshakes/s, {:.1} CPU s of the server",
                self.opening_seconds, self.handshakes_per_second, self.opening_cpu_seconds
            ),
        );
        let memory = |memory: &Memory| {
            format!(
                "RSS {:.1} MiB, PSS {:.1} MiB",
                memory.resident_mib, memory.proportional_mib
            )
        };
        row("server before", memory(&self.memory_before));
        row("server with an idle crowd", memory(&self.memory));
        for (process, name) in self
            .memory_of_processes
            .iter()
            .zip(["  keeper", "  daemon"])
        {
            row(name, memory(process));
        }
        row(
            "  for each session",
            format!("{:.1} KiB", self.session_kib()),
        );
        row("server in the end", memory(&self.memory_after));
        row(
            "idle server",
            format!(
                "{:.2} % of a core, {} chunks in use",
                self.idle_cpu_percent, self.idle_chunks_in_use
            ),
        );
        row(
            "echoes",
            format!(
                "{} of {} answered, of {} sessions, median {:.0} us",
                self.echo_replies, self.echo_requests, self.active, self.echo_time_us
            ),
        );
        for bulk in &self.bulk {
            row(
                &format!("bulk {}", bulk.direction),
                format!(
                    "{:.0} Mbit/s beside the crowd, {:.0} without: ratio {:.2}; {:.2} and {:.2} CPU s of the server per GB: ratio {:.2}",
                    rate(&bulk.beside),
                    rate(&bulk.alone),
                    bulk.ratio,
                    cost(&bulk.beside),
                    cost(&bulk.alone),
                    bulk.cpu_ratio,
                ),
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(megabits_per_second: f64) -> Transfer {
        Transfer {
            megabits_per_second,
            server_cpu_seconds_per_gb: 1.0,
        }
    }

    fn figures() -> Figures {
        let memory = |mib| Memory {
            resident_mib: mib,
            proportional_mib: mib / 2.0,
        };
        Figures {
            sessions: 1024,
            opened: 1024,
            failures: BTreeMap::new(),
            connected_at_the_server: 1024,
            opening_seconds: 8.0,
            handshakes_per_second: 128.0,
            opening_cpu_seconds: 1.0,
            memory_before: memory(50.0),
            memory: memory(60.0),
            memory_of_processes: vec![memory(10.0), memory(50.0)],
            memory_after: memory(61.0),
            idle_cpu_percent: 0.5,
            idle_chunks_in_use: 0,
            active: 2,
            echo_requests: 40,
            echo_replies: 40,
            echo_time_us: 300.0,
            bulk: vec![Bulk::new(
                "down",
                [90.0, 80.0, 100.0].map(transfer).to_vec(),
                vec![transfer(100.0)],
            )],
        }
    }

    #[test]
    fn what_grew_is_shared_out_among_the_sessions() {
        assert!((figures().session_kib() - 10.0).abs() < 1e-9);
        assert!((figures().bulk[0].ratio - 0.9).abs() < 1e-9);
        assert!(
            figures()
                .to_table()
                .contains("for each session          10.0 KiB")
        );
    }

    #[test]
    fn every_session_counts() {
        assert!(!figures().has_failed());
        let dropped = Figures {
            failures: BTreeMap::from([("gone".to_owned(), 1)]),
            ..figures()
        };
        assert!(dropped.has_failed() && dropped.to_table().contains("1: gone"));
        let unknown = Figures {
            connected_at_the_server: 1023,
            ..figures()
        };
        assert!(unknown.has_failed());
        let unanswered = Figures {
            echo_replies: 39,
            ..figures()
        };
        assert!(unanswered.has_failed());
    }
}
