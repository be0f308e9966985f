//! The demonstration: what the firewall blocks, and that ringtun carries it.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::process::Command;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::bench::{BenchError, Direction, Stream};
use crate::host::Host;
use crate::netns::NamespaceError;
use crate::probe::{self, Answer};
use crate::process::{Process, ProcessError};
use crate::report::Report;
use crate::topology::{
    FIREWALL_V4, FIREWALL_V6, Lab, LabError, SERVER_V4, SERVER_V6, Topology, WEB_IPERF_PORT,
    WEB_SPEED_V4, WEB_TCP_PORTS, WEB_UDP_PORTS, WEB_V4, WEB_V6,
};

/// What `ringtun server` says when clients may come.
pub const SERVER_IS_READY: &str = "up: listening";
/// What `ringtun client` says when the tunnel carries packets.
pub const CLIENT_IS_UP: &str = "up: ";
/// How long a tunnel may take to come up.
pub(crate) const UP_LIMIT: Duration = Duration::from_secs(15);
/// How long ringtun may take to end and clean up.
const DOWN_LIMIT: Duration = Duration::from_secs(5);
/// How long a packet that should pass may take.
const PASSES: Duration = Duration::from_secs(5);
/// How long to wait before another try.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// How long to wait for what should not arrive.
const DROPPED: Duration = Duration::from_secs(1);
/// The demonstration's iperf3 runs are short.
const GLIMPSE_SECONDS: u32 = 2;
/// How many echoes the demonstration's round trip is the median of.
const GLIMPSE_PINGS: usize = 20;

/// Why a scenario could not be played to its end.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// No lab.
    #[error("the lab could not be built")]
    Lab(#[from] LabError),
    /// A host is out of reach.
    #[error("a lab host could not be entered")]
    Namespace(#[from] NamespaceError),
    /// A program failed.
    #[error("a program failed")]
    Process(#[from] ProcessError),
    /// A line could not be printed.
    #[error("the terminal takes no more")]
    Terminal(#[from] io::Error),
}

/// A server on `server` and a client on `client`, up.
#[derive(Debug)]
pub struct Tunnel {
    // In this order, so that the client can still say goodbye.
    client: Process,
    server: Process,
}

impl Tunnel {
    /// Starts `ringtun server`, takes an invite, and starts `ringtun client` with it.
    ///
    /// # Errors
    /// When one of them fails; the error shows what it wrote.
    pub fn start(lab: &Lab, ringtun: &Path) -> Result<Tunnel, ScenarioError> {
        let server = start_server(lab.host("server"), ringtun)?;
        let invite = invite(lab.host("server"), ringtun, "client")?;
        let client = start_client(lab.host("client"), ringtun, &invite)?;
        Ok(Tunnel { client, server })
    }
}

/// Starts `ringtun server` with its defaults and waits until it listens.
///
/// # Errors
/// When it ends instead.
pub fn start_server(host: &Host, ringtun: &Path) -> Result<Process, ProcessError> {
    let server = host.spawn(ringtun, ["server"])?;
    server.wait_for_line(SERVER_IS_READY, UP_LIMIT)?;
    Ok(server)
}

/// Takes an invite to [`SERVER_V4`].
///
/// # Errors
/// When `ringtun invite` fails.
pub fn invite(host: &Host, ringtun: &Path, name: &str) -> Result<String, ProcessError> {
    let invite = host.exec(ringtun, ["invite", name, "--host", &SERVER_V4.to_string()])?;
    Ok(invite.trim().to_owned())
}

/// Starts `ringtun client` and waits until the tunnel is up.
///
/// # Errors
/// When it ends instead.
pub fn start_client(host: &Host, ringtun: &Path, invite: &str) -> Result<Process, ProcessError> {
    let client = host
        .command(ringtun)
        .arg("client")
        .env("RINGTUN_INVITE", invite)
        .spawn()?;
    client.wait_for_line(CLIENT_IS_UP, UP_LIMIT)?;
    Ok(client)
}

/// Shows, check by check, what stands between client and web and what ringtun makes of it. The report
/// knows whether all of it was right.
///
/// # Errors
/// When it could not be played to its end.
pub fn demo<W: Write>(
    ringtun: &Path,
    report: &mut Report<W>,
    on_start: impl FnOnce(&Lab),
) -> Result<(), ScenarioError> {
    let machine = machine_state();
    let started = Instant::now();
    let lab = Lab::build(Topology::Nat)?;
    on_start(&lab);
    report.heading("client -- firewall -- internet -- server")?;
    report.line(r"                        \-- web")?;
    report.check(
        true,
        format_args!(
            "six hosts in namespaces of their own, built in {}",
            milliseconds(started)
        ),
    )?;

    report
        .heading("What the firewall blocks: web answers the server's host, and not the client")?;
    blocked(&lab, report)?;

    report.heading("The tunnel")?;
    let before = [
        lab.host("client").network_state()?,
        lab.host("server").network_state()?,
    ];
    let tunnel = tunnel_up(&lab, ringtun, report)?;

    report.heading("What the client reaches now")?;
    reached(&lab, report)?;
    speed(&lab, report)?;

    report.heading("Afterwards")?;
    for (name, process) in [("client", &tunnel.client), ("server", &tunnel.server)] {
        let started = Instant::now();
        let status = process.stop(DOWN_LIMIT)?;
        let text = format!(
            "ringtun {name} ended on SIGTERM in {}: {status}",
            milliseconds(started)
        );
        report.check(status.code() == Some(0), text)?;
    }
    let after = [
        lab.host("client").network_state()?,
        lab.host("server").network_state()?,
    ];
    for (host, (before, after)) in ["client", "server"]
        .into_iter()
        .zip(before.iter().zip(&after))
    {
        let text = format!(
            "{host}: links, routes, rules, nftables, sysctls and resolv.conf are as before"
        );
        report.check(before == after, text)?;
        for line in difference(before, after) {
            report.line(line)?;
        }
    }
    drop(tunnel);
    let networks: Vec<_> = lab
        .hosts()
        .iter()
        .map(|host| host.namespace().net_id())
        .collect();
    drop(lab);
    let in_use = networks_in_use();
    let gone = networks.iter().all(|network| !in_use.contains(network));
    report.check(gone, "no process of the lab is left")?;
    report.check(
        machine == machine_state(),
        "the machine's interfaces, routes, rules and nftables are as before",
    )?;
    Ok(())
}

/// Everything that does not get out, each with the proof that the target listens.
fn blocked<W: Write>(lab: &Lab, report: &mut Report<W>) -> Result<(), ScenarioError> {
    let (client, server) = (lab.host("client"), lab.host("server"));
    let mut checks: Vec<Check<'_>> = Vec::new();
    for port in WEB_UDP_PORTS {
        checks.push(Check::new(format!("UDP {port} is blocked"), move |to| {
            let to = SocketAddr::new(to, port);
            Ok(probe::udp(server, to, PASSES)?.is_some()
                && !probe::udp(client, to, DROPPED)?.is_some())
        }));
    }
    for port in WEB_TCP_PORTS
        .into_iter()
        .filter(|port| ![80, 443].contains(port))
    {
        checks.push(Check::new(format!("TCP {port} is blocked"), move |to| {
            let to = SocketAddr::new(to, port);
            Ok(probe::tcp(server, to, PASSES)?.is_some()
                && !probe::tcp(client, to, DROPPED)?.is_some())
        }));
    }
    checks.push(Check::new(
        format!("TCP {WEB_IPERF_PORT} (iperf3) is blocked"),
        move |to| {
            let to = SocketAddr::new(to, WEB_IPERF_PORT);
            Ok(probe::connects(server, to, PASSES)? && !probe::connects(client, to, DROPPED)?)
        },
    ));
    checks.push(Check::new("ICMP echo is blocked".to_owned(), move |to| {
        Ok(server.ping(to, 3)?.is_complete() && client.ping(to, 3)?.is_silent())
    }));
    for port in [80, 443] {
        checks.push(Check::new(
            format!("TCP {port} passes, and web sees the firewall's address"),
            move |to| {
                let firewall: IpAddr = if to.is_ipv4() {
                    FIREWALL_V4.into()
                } else {
                    FIREWALL_V6.into()
                };
                Ok(probe::tcp(client, SocketAddr::new(to, port), PASSES)?
                    == Answer::SawSource(firewall))
            },
        ));
    }
    run(checks, report)
}

/// The same, through the tunnel: whom `client` reaches, and that web sees the server.
pub(crate) fn reached<W: Write>(lab: &Lab, report: &mut Report<W>) -> Result<(), ScenarioError> {
    let client = lab.host("client");
    let saw_server = |answer: Answer, to: IpAddr| {
        let server: IpAddr = if to.is_ipv4() {
            SERVER_V4.into()
        } else {
            SERVER_V6.into()
        };
        answer == Answer::SawSource(server)
    };
    let mut checks: Vec<Check<'_>> = Vec::new();
    for port in WEB_UDP_PORTS {
        checks.push(Check::new(
            format!("UDP {port} passes, and web sees the server's address"),
            move |to| {
                Ok(saw_server(
                    probe::udp(client, SocketAddr::new(to, port), PASSES)?,
                    to,
                ))
            },
        ));
    }
    for port in WEB_TCP_PORTS {
        checks.push(Check::new(
            format!("TCP {port} passes, and web sees the server's address"),
            move |to| {
                Ok(saw_server(
                    probe::tcp(client, SocketAddr::new(to, port), PASSES)?,
                    to,
                ))
            },
        ));
    }
    checks.push(Check::new(
        format!("TCP {WEB_IPERF_PORT} (iperf3) connects"),
        // It takes one connection at a time and listens anew after each.
        move |to| {
            within(PASSES, || {
                let to = SocketAddr::new(to, WEB_IPERF_PORT);
                Ok(probe::connects(client, to, PASSES)?)
            })
        },
    ));
    // On a busy machine the last answer may come later than ping waits for it.
    checks.push(Check::new("ping is answered".to_owned(), move |to| {
        within(PASSES, || Ok(client.ping(to, 20)?.is_complete()))
    }));
    run(checks, report)?;
    let addresses = client.run("getent", ["ahosts", "web.example"])?.text();
    let knows = [WEB_V4.to_string(), WEB_V6.to_string()]
        .iter()
        .all(|address| addresses.contains(address));
    report.check(
        knows,
        "names are resolved by the server's nameserver, through the tunnel",
    )?;
    Ok(())
}

/// Tries again until it holds or the limit has passed.
fn within(
    limit: Duration,
    holds: impl Fn() -> Result<bool, ScenarioError>,
) -> Result<bool, ScenarioError> {
    let deadline = Instant::now() + limit;
    loop {
        if holds()? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

/// Something that has to hold for `web`'s address of either family.
struct Check<'lab> {
    text: String,
    holds: Box<dyn Fn(IpAddr) -> Result<bool, ScenarioError> + Send + Sync + 'lab>,
}

impl<'lab> Check<'lab> {
    fn new(
        text: String,
        holds: impl Fn(IpAddr) -> Result<bool, ScenarioError> + Send + Sync + 'lab,
    ) -> Check<'lab> {
        Check {
            text,
            holds: Box::new(holds),
        }
    }
}

/// Makes all checks at once, since most of them consist of waiting, and reports them in order.
fn run<W: Write>(checks: Vec<Check<'_>>, report: &mut Report<W>) -> Result<(), ScenarioError> {
    thread::scope(|scope| {
        let runs: Vec<_> = checks
            .iter()
            .map(|check| {
                let run = |to: IpAddr| scope.spawn(move || (check.holds)(to));
                (&check.text, run(WEB_V4.into()), run(WEB_V6.into()))
            })
            .collect();
        for (text, v4, v6) in runs {
            let joined = |run: ScopedJoinHandle<'_, Result<bool, ScenarioError>>| {
                run.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            let (v4, v6) = (joined(v4)?, joined(v6)?);
            let which = match (v4, v6) {
                (true, true) => "IPv4 and IPv6",
                (false, true) => "wrong over IPv4",
                (true, false) => "wrong over IPv6",
                (false, false) => "wrong over IPv4 and IPv6",
            };
            report.check(v4 && v6, format_args!("{text} ({which})"))?;
        }
        Ok(())
    })
}

/// Starts the tunnel with a line for each step.
fn tunnel_up<W: Write>(
    lab: &Lab,
    ringtun: &Path,
    report: &mut Report<W>,
) -> Result<Tunnel, ScenarioError> {
    let started = Instant::now();
    let server = start_server(lab.host("server"), ringtun)?;
    report.check(
        true,
        format_args!(
            "server:  ringtun server ... ready in {}",
            milliseconds(started)
        ),
    )?;
    let invite = invite(lab.host("server"), ringtun, "client")?;
    report.check(
        invite.starts_with("ringtun://") && invite.lines().count() == 1,
        format_args!("server:  ringtun invite client --host {SERVER_V4}"),
    )?;
    let started = Instant::now();
    let client = start_client(lab.host("client"), ringtun, &invite)?;
    report.check(
        true,
        format_args!(
            "client:  ringtun client 'ringtun://...' ... up in {}",
            milliseconds(started)
        ),
    )?;
    Ok(Tunnel { client, server })
}

/// A glimpse of the throughput; `lab bench` measures properly.
fn speed<W: Write>(lab: &Lab, report: &mut Report<W>) -> Result<(), ScenarioError> {
    let rate = |client: &str, to, direction| {
        let stream = Stream {
            to,
            direction,
            streams: 1,
            seconds: GLIMPSE_SECONDS,
            omitted_seconds: 0,
            congestion_control: None,
        };
        let transfer = stream.run(lab.host(client))?;
        Ok::<f64, BenchError>(transfer.megabits_per_second)
    };
    for direction in Direction::BOTH {
        let name = direction.word();
        // Without a tunnel iperf3 has to listen on a port that the firewall lets through.
        let rates = rate("client2", (WEB_SPEED_V4, 443), direction).and_then(|direct| {
            let ringtun = rate("client", (WEB_V4, WEB_IPERF_PORT), direction)?;
            Ok((direct, ringtun))
        });
        match rates {
            Ok((direct, ringtun)) => report.check(
                ringtun > 0.0,
                format_args!(
                    "one TCP stream {name}: {direct:.0} Mbit/s direct (iperf3 on port 443), {ringtun:.0} Mbit/s through the tunnel"
                ),
            )?,
            Err(BenchError::Process(error)) => return Err(error.into()),
            Err(error) => report.check(false, format_args!("one TCP stream {name}: {error}"))?,
        }
    }
    let ping = lab.host("client").ping(WEB_V4.into(), GLIMPSE_PINGS)?;
    let mut times = ping.round_trips_us.clone();
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    report.check(
        ping.is_complete(),
        format_args!("round trip through the tunnel: {median} us (median)"),
    )?;
    Ok(())
}

/// What a lab must not change on the machine itself, as far as the caller may look.
pub(crate) fn machine_state() -> String {
    let commands = [
        "ip -o link | cut -d: -f2",
        "ip rule; ip -6 rule",
        "nft list ruleset 2>&1",
        "ls /run/netns 2>&1",
    ];
    let outputs = commands.map(
        |command| match Command::new("sh").args(["-c", command]).output() {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => error.to_string(),
        },
    );
    outputs.join("\n")
}

/// The network namespaces that the machine's processes are in, as far as the caller may look.
pub(crate) fn networks_in_use() -> HashSet<u64> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| Some(fs::metadata(process.path().join("ns/net")).ok()?.ino()))
        .collect()
}

/// The lines of either text that the other has not, marked as `diff` does.
pub(crate) fn difference(before: &str, after: &str) -> Vec<String> {
    let lost = before
        .lines()
        .filter(|line| !after.lines().any(|other| other == *line));
    let new = after
        .lines()
        .filter(|line| !before.lines().any(|other| other == *line));
    lost.map(|line| format!("- {line}"))
        .chain(new.map(|line| format!("+ {line}")))
        .collect()
}

fn milliseconds(started: Instant) -> String {
    format!("{} ms", started.elapsed().as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_what_only_one_side_has() {
        assert_eq!(difference("a\nb\n", "b\nc\n"), ["- a", "+ c"]);
        assert!(difference("a\n", "a\n").is_empty());
    }

    #[test]
    fn this_process_is_in_a_network() {
        let own = fs::metadata("/proc/self/ns/net")
            .expect("a network namespace")
            .ino();
        assert!(networks_in_use().contains(&own));
    }
}
