//! Where and when the figures come from.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::system::output;
use super::usage;

/// How long the machine is watched before a round.
const WATCHED: Duration = Duration::from_millis(500);

/// The machine, the date and the versions of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// UTC, ISO 8601.
    pub date: String,
    /// The git commit of the source tree that ringtun lies in, if it does.
    pub commit: Option<String>,
    /// As `uname -r` has it.
    pub kernel: String,
    /// The processor's model.
    pub cpu: String,
    /// How many processors there are.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The congestion control of the ends of the measured connections.
    pub inner_congestion_control: String,
    /// The version of iperf3.
    pub iperf3: String,
    /// How busy the machine was with other things before each round, in percent of all its processors.
    pub busy_before_rounds_percent: Vec<f64>,
}

impl Machine {
    /// Looks at the machine.
    #[must_use]
    pub fn look(ringtun: &Path) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.trim().strip_prefix(':'))
                .map(|value| value.trim().to_owned())
        };
        let memory = value(
            &read("/proc/meminfo").replace("MemTotal:", "MemTotal :"),
            "MemTotal",
        );
        let kib = memory.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Machine {
            date: output(Path::new("date"), &["-u", "+%Y-%m-%dT%H:%M:%SZ"]).unwrap_or_default(),
            commit: commit(ringtun),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: value(&read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| "unknown".to_owned()),
            cores: thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib.unwrap_or_default() / 1024,
            inner_congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control")
                .trim()
                .to_owned(),
            iperf3: output(Path::new("iperf3"), &["--version"])
                .and_then(|text| text.lines().next().map(str::to_owned))
                .unwrap_or_default(),
            busy_before_rounds_percent: Vec::new(),
        }
    }

    /// The kernel's version without what whoever built it has appended.
    #[must_use]
    pub fn kernel_version(&self) -> &str {
        self.kernel.split('-').next().unwrap_or_default()
    }

    /// Watches for half a second what others do on the machine.
    pub fn watch(&mut self) {
        let (begun, before) = (Instant::now(), usage::machine_time());
        thread::sleep(WATCHED);
        let busy = usage::machine_time().saturating_sub(before).as_secs_f64();
        let share = busy / begun.elapsed().as_secs_f64() / self.cores as f64;
        self.busy_before_rounds_percent
            .push((share * 100.0).round());
    }
}

fn commit(ringtun: &Path) -> Option<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(ringtun.parent()?);
    git.args(["describe", "--always", "--dirty", "--exclude=*"]);
    let output = git.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_known() {
        let mut machine = Machine::look(Path::new("/nowhere/ringtun"));
        machine.watch();
        assert!(machine.kernel.contains('.'), "{machine:?}");
        machine.kernel = "6.1.0-18-amd64".to_owned();
        assert_eq!(machine.kernel_version(), "6.1.0");
        assert!(machine.date.ends_with('Z'), "{machine:?}");
        assert!(machine.memory_mib > 0 && machine.cores > 0, "{machine:?}");
        assert_eq!(machine.commit, None);
        assert_eq!(machine.busy_before_rounds_percent.len(), 1);
    }
}
