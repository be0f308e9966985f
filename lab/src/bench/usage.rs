//! What processes cost, read from `/proc`: processor time and memory of a process with all its descendants,
//! and the busy time of the machine.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::Duration;

/// `USER_HZ`: the unit of times in `/proc`, whatever the kernel's own tick is.
const TICKS_PER_SECOND: u64 = 100;
const KIB_PER_MIB: f64 = 1024.0;

/// A process and everything that it started, as long as its parents live.
#[must_use]
pub fn family(root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some((pid, stat)) = pid.and_then(|pid: i32| Some((pid, Stat::read(pid)?))) {
            children.entry(stat.parent).or_default().push(pid);
        }
    }
    let mut members = Vec::new();
    let mut seen = HashSet::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        if seen.insert(pid) {
            members.push(pid);
            next.extend(children.get(&pid).into_iter().flatten());
        }
    }
    members
}

/// Processor time, user and system, of processes with all their threads, and of children that they have
/// waited for. The kernel counts softirqs that ran in their system calls as theirs, unless it was built with
/// `IRQ_TIME_ACCOUNTING`.
#[must_use]
pub fn processor_time(processes: &[i32]) -> Duration {
    let ticks = processes.iter().filter_map(|pid| Stat::read(*pid));
    from_ticks(ticks.map(|stat| stat.ticks).sum())
}

/// Time that the machine's processors have not been idle (stolen time is not ours).
#[must_use]
pub fn machine_time() -> Duration {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    from_ticks(busy_ticks(&stat))
}

/// Memory of processes, in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Resident now. A page that several of the processes share counts once for each.
    pub resident_mib: f64,
    /// The most that each was ever resident with.
    pub peak_mib: f64,
    /// Resident now, each page shared out among the processes that have it.
    pub proportional_mib: f64,
}

/// The memory of processes.
#[must_use]
pub fn memory(processes: &[i32]) -> Memory {
    let mut memory = Memory::default();
    for pid in processes {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let resident = kib(&status, "VmRSS:");
        memory.resident_mib += resident / KIB_PER_MIB;
        // The kernel keeps the mark loosely, and what is there now was there at some time.
        memory.peak_mib += kib(&status, "VmHWM:").max(resident) / KIB_PER_MIB;
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        memory.proportional_mib += kib(&rollup, "Pss:") / KIB_PER_MIB;
    }
    memory
}

/// A process's RSS now, in MiB; 0 after its end. Unlike [`memory`] this walks no page tables.
#[must_use]
pub fn resident_mib(process: i32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    kib(&status, "VmRSS:") / KIB_PER_MIB
}

/// What is of interest in `/proc/PID/stat`.
#[derive(Debug, Eq, PartialEq)]
struct Stat {
    parent: i32,
    ticks: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Stat> {
        Stat::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The command's name may hold anything, so fields are counted from the last parenthesis on: state is
    /// the third of proc_pid_stat(5).
    fn parse(line: &str) -> Option<Stat> {
        let (_, rest) = line.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied();
        let mut ticks = 0;
        // utime, stime, cutime, cstime.
        for number in 14..=17 {
            ticks += field(number)?.parse::<u64>().ok()?;
        }
        Some(Stat {
            parent: field(4)?.parse().ok()?,
            ticks,
        })
    }
}

/// User, nice, system, irq and softirq of all processors together.
fn busy_ticks(stat: &str) -> u64 {
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or(0);
    [0, 1, 2, 5, 6].into_iter().map(field).sum()
}

fn kib(status: &str, key: &str) -> f64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0.0)
}

fn from_ticks(ticks: u64) -> Duration {
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_any_name() {
        let line = "17 (a) b (c) S 4 17 17 0 -1 4194560 10 0 0 0 100 20 3 1 20 0 1 0 5 0 0";
        assert_eq!(
            Stat::parse(line),
            Some(Stat {
                parent: 4,
                ticks: 124
            })
        );
        assert_eq!(Stat::parse("17 (cut off"), None);
    }

    #[test]
    fn idle_and_stolen_time_is_not_busy() {
        assert_eq!(
            busy_ticks("cpu  1 2 4 1000 1000 8 16 1000 0 0\ncpu0 1"),
            1 + 2 + 4 + 8 + 16
        );
    }

    #[test]
    fn we_are_of_our_own_family_and_have_memory() {
        let own = std::process::id().cast_signed();
        let family = family(own);
        assert!(family.contains(&own), "{family:?}");
        let memory = memory(&[own]);
        assert!(
            memory.resident_mib > 0.1 && memory.peak_mib >= memory.resident_mib,
            "{memory:?}"
        );
    }
}
