//! A host of the lab: run programs on it, look at it, write its files.

use std::ffi::OsStr;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use crate::netns::{Namespace, NamespaceError};
use crate::process::{Output, Process, ProcessError, describe};

/// How long [`Host::run`], [`Host::exec`] and [`Host::ping`] may take unless told otherwise.
pub const RUN_LIMIT: Duration = Duration::from_secs(30);
/// Interval between the echo requests of [`Host::ping`].
const PING_INTERVAL_SECONDS: &str = "0.02";

/// A machine of the lab.
#[derive(Debug)]
pub struct Host {
    name: String,
    namespace: Namespace,
}

/// A command to be run on a host, in the manner of [`std::process::Command`].
#[derive(Debug)]
pub struct Command<'host> {
    host: &'host Host,
    command: std::process::Command,
    input: Vec<u8>,
    limit: Duration,
}

/// The outcome of [`Host::ping`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Ping {
    /// How many echo requests were sent.
    pub sent: usize,
    /// The round-trip time of each answer, in microseconds, in order of arrival.
    pub round_trips_us: Vec<u64>,
}

impl Host {
    pub(crate) fn new(name: &str, namespace: Namespace) -> Host {
        Host {
            name: name.to_owned(),
            namespace,
        }
    }

    /// Its name in the topology.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespaces.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A command to be refined and then run or spawned.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command<'_> {
        let mut command = std::process::Command::new(program);
        // `ip`, `nft` and `sysctl` are not on every ordinary user's path.
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        command.env("PATH", path);
        Command {
            host: self,
            command,
            input: Vec::new(),
            limit: RUN_LIMIT,
        }
    }

    /// Runs a program to its end, whatever the end is.
    ///
    /// # Errors
    /// When it does not start, or does not end within [`RUN_LIMIT`].
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Output, ProcessError> {
        self.command(program).args(arguments).run()
    }

    /// Runs a program that has to succeed, and returns its standard output.
    ///
    /// # Errors
    /// When it does not start, does not end within [`RUN_LIMIT`], or fails.
    pub fn exec<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<String, ProcessError> {
        self.command(program).args(arguments).exec()
    }

    /// Starts a program that goes on until it ends, is stopped or its [`Process`] is dropped.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Process, ProcessError> {
        self.command(program).args(arguments).spawn()
    }

    /// Sends `count` ICMP echo requests of 56 bytes, 20 ms apart, and waits a second for the last answer.
    ///
    /// # Errors
    /// When `ping` could not be run. Lost packets are no error.
    pub fn ping(&self, to: IpAddr, count: usize) -> Result<Ping, ProcessError> {
        let family = if to.is_ipv4() { "-4" } else { "-6" };
        let (count_text, to) = (count.to_string(), to.to_string());
        let output = self
            .command("ping")
            .args([
                family,
                "-n",
                "-i",
                PING_INTERVAL_SECONDS,
                "-W",
                "1",
                "-c",
                &count_text,
                &to,
            ])
            .run()?;
        // 1: some or all answers are missing. 2 and up: it did not get as far as sending.
        match output.status.code() {
            Some(0 | 1) => Ok(Ping {
                sent: count,
                round_trips_us: round_trips_us(&output.text()),
            }),
            _ => output.checked("ping").map(|_| Ping::default()),
        }
    }

    /// Runs `work` on a thread inside the host: sockets and files there are the host's.
    ///
    /// # Errors
    /// When the host cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        self.namespace.run(work)
    }

    /// Writes a file as the host sees it. `/run`, `/etc` and `/var/lib` are its own, the rest is the machine's.
    ///
    /// # Errors
    /// When the file cannot be written; missing directories are made.
    pub fn write_file(
        &self,
        path: impl AsRef<Path>,
        contents: impl AsRef<[u8]>,
    ) -> Result<(), NamespaceError> {
        let (path, contents) = (path.as_ref(), contents.as_ref());
        self.namespace
            .run(|| {
                path.parent()
                    .map_or(Ok(()), fs::create_dir_all)
                    .and_then(|()| fs::write(path, contents))
            })?
            .map_err(|source| NamespaceError::File {
                path: path.to_owned(),
                source,
            })
    }

    /// Reads a file as the host sees it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_file(&self, path: impl AsRef<Path>) -> Result<String, NamespaceError> {
        let path = path.as_ref();
        self.namespace
            .run(|| fs::read_to_string(path))?
            .map_err(|source| NamespaceError::File {
                path: path.to_owned(),
                source,
            })
    }

    /// Everything that a tunnel might change on the host, as text for a comparison of before and after:
    /// links, routes, rules, nftables, resolv.conf and the network's sysctls.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn network_state(&self) -> Result<String, ProcessError> {
        let commands = [
            "ip -d link",
            "ip address show",
            "ip route show table all",
            "ip -6 route show table all | sed 's/ expires [0-9]*sec//'",
            "ip rule",
            "ip -6 rule",
            "nft list ruleset",
            "stat -c '%A %U %G %N' /etc/resolv.conf",
            "cat /etc/resolv.conf",
            "ls -A /run/ringtun",
            // Counters are no state, and modules stay loaded.
            "grep -rs . /proc/sys/net --exclude=nf_conntrack_count --exclude=tcp_allowed_congestion_control \
             --exclude=tcp_available_congestion_control",
        ];
        let mut state = String::new();
        for command in commands {
            let output = self.run("sh", ["-c", command])?;
            state += &format!("# {command}\n{}", output.text());
        }
        Ok(state)
    }

    /// Whether the kernel is done with what it does on its own after a link was set up: finding that it has a
    /// carrier, and giving it a link-local address.
    ///
    /// # Errors
    /// When `ip` could not be run.
    pub fn is_settled(&self) -> Result<bool, ProcessError> {
        let links = self.exec("ip", ["-o", "link", "show", "up", "type", "veth"])?;
        let addressed = self.exec(
            "ip",
            ["-o", "-6", "address", "show", "scope", "link", "-tentative"],
        )?;
        Ok(links.lines().all(|link| {
            let name = link.split([' ', '@']).nth(1).unwrap_or_default();
            let is_bridged = link.contains(" master ");
            link.contains(" state UP ") && (is_bridged || addressed.contains(&format!(": {name} ")))
        }))
    }

    /// Sets a sysctl of the host's network, given as a path below `/proc/sys`.
    pub(crate) fn sysctl(&self, key: &str, value: &str) -> Result<(), NamespaceError> {
        self.write_file(Path::new("/proc/sys").join(key), value)
    }
}

impl Command<'_> {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Gives it something to read on standard input, which is empty otherwise.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Sets another limit than [`RUN_LIMIT`].
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end, whatever the end is.
    ///
    /// # Errors
    /// When it does not start or the limit passes.
    pub fn run(self) -> Result<Output, ProcessError> {
        let limit = self.limit;
        self.spawn()?.output(limit)
    }

    /// Runs it and returns its standard output.
    ///
    /// # Errors
    /// When it does not start, the limit passes, or it fails.
    pub fn exec(self) -> Result<String, ProcessError> {
        let program = describe(&self.command);
        self.run()?.checked(&program).map(|output| output.text())
    }

    /// Starts it; the limit does not count.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn(self) -> Result<Process, ProcessError> {
        Process::start(&self.host.namespace, self.command, self.input)
    }

    /// Runs it with the caller's terminal and without a limit.
    ///
    /// # Errors
    /// When it does not start.
    pub fn foreground(mut self) -> Result<ExitStatus, ProcessError> {
        let program = describe(&self.command);
        self.command
            .stdin(Stdio::inherit())
            .stdout(Stdio::inherit())
            .stderr(Stdio::inherit());
        let child = self.host.namespace.spawn(&mut self.command);
        let waited = child.and_then(|mut child| {
            child.wait().map_err(|source| NamespaceError::Start {
                program: program.clone(),
                source,
            })
        });
        waited.map_err(|source| ProcessError::Start { program, source })
    }
}

impl Ping {
    /// Whether every request was answered.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.round_trips_us.len() >= self.sent
    }

    /// Whether no request was answered.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.round_trips_us.is_empty()
    }
}

/// The `time=0.123 ms` of every answer that `ping` printed.
pub(crate) fn round_trips_us(report: &str) -> Vec<u64> {
    let times = report.lines().filter_map(|line| {
        let (_, time) = line.split_once("time=")?;
        time.split_once(' ')?.0.parse::<f64>().ok()
    });
    times
        .map(|milliseconds| (milliseconds * 1000.0).round() as u64)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_read_from_what_ping_prints() {
        let report = "PING 203.0.113.80 (203.0.113.80) 56(84) bytes of data.\n\
            64 bytes from 203.0.113.80: icmp_seq=1 ttl=61 time=0.077 ms\n\
            64 bytes from 203.0.113.80: icmp_seq=2 ttl=61 time=12.5 ms\n\
            From 192.168.77.1 icmp_seq=3 Packet filtered\n\n\
            3 packets transmitted, 2 received, 33% packet loss, time 2031ms\n";
        assert_eq!(round_trips_us(report), [77, 12_500]);
    }
}
