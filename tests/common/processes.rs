//! The processes behind a server or client, found in `/proc`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringtun_lab::{Host, Process};

use super::{RINGTUN, until, until_true};

/// The unprivileged half of a running server or client: the child of the process that was started.
pub fn daemon_of(keeper: &Process) -> i32 {
    until("daemon", || {
        let mut children = processes().filter(|pid| parent(*pid) == Some(keeper.pid()));
        children.find(|pid| is_ringtun(*pid))
    })
}

/// Kills a process, and only it, with `kill -9`, and waits until it is gone.
pub fn kill_9(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a running process");
    until_true("end of a killed process", || is_gone(pid));
}

/// Kills both halves so that neither can clean up after the other.
pub fn kill_9_both(keeper: &Process) {
    let daemon = daemon_of(keeper);
    keeper.signal(Signal::SIGSTOP);
    kill(Pid::from_raw(daemon), Signal::SIGKILL).expect("a running daemon");
    keeper.signal(Signal::SIGKILL);
    keeper.wait(super::SOON).expect("the end of the keeper");
    until_true("end of the daemon", || is_gone(daemon));
}

/// Whether a process has ended, whether or not somebody has taken notice.
pub fn is_gone(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)
        || stat(pid).is_none_or(|stat| stat.starts_with('Z'))
}

/// Command lines of all processes in a host's network.
pub fn in_host(host: &Host) -> Vec<String> {
    let network = host.namespace().net_id();
    let there = processes().filter(|pid| {
        fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|metadata| metadata.ino() == network && !is_gone(*pid))
    });
    there.map(command_line).collect()
}

/// The number that a process has within its host.
pub fn number_in_host(pid: i32) -> i32 {
    let numbers = status_field(pid, "NSpid");
    let own = numbers.split_whitespace().last();
    own.and_then(|number| number.parse().ok())
        .expect("a number")
}

/// The numbers and names of a process's threads.
pub fn threads(pid: i32) -> Vec<(i32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a running process");
    let names = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let number = task.file_name().to_str()?.parse().ok()?;
        Some((number, name.trim_end().to_owned()))
    });
    names.collect()
}

/// A field of `/proc/PID/status`.
pub fn status_field(pid: i32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let value = status.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name == field).then(|| value.trim().to_owned())
    });
    value.unwrap_or_else(|| panic!("no field {field}:\n{status}"))
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// `/proc/PID/stat` from the state on: what precedes it may contain anything.
fn stat(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.to_owned())
}

fn parent(pid: i32) -> Option<i32> {
    stat(pid)?.split(' ').nth(1)?.parse().ok()
}

fn is_ringtun(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program.as_os_str() == RINGTUN)
}

fn command_line(pid: i32) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!(
        "{pid}: {}",
        String::from_utf8_lossy(&words).replace('\0', " ")
    )
}
