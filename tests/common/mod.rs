//! What the end-to-end tests share: a lab with ringtun in it, and ways to look at it.
//!
//! Every test builds a lab of its own, so that tests run in parallel. Limits are generous, because the machine may be
//! busy; nothing is measured here.
#![allow(dead_code, reason = "every test file uses another part of it")]

pub mod connect_ip;
pub mod denial;
pub mod host_state;
pub mod processes;
pub mod status;
pub mod tls_client;
pub mod transfer;

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use host_state::wait_until_settled;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use ringtun_lab::probe::{self, Answer};
use ringtun_lab::topology::{
    FIREWALL_V4, SERVER_V4, SERVER_V6, WEB_IPERF_PORT, WEB_TCP_PORTS, WEB_UDP_PORTS, WEB_V4, WEB_V6,
};
use ringtun_lab::{Host, Lab, Process, Topology};
use rstest::fixture;

/// The environment variable that says which `--io` server and client are started with; unset: none.
const IO_VARIABLE: &str = "RINGTUN_TEST_IO";
/// The program under test.
pub const RINGTUN: &str = env!("CARGO_BIN_EXE_ringtun");
/// What server and client say on standard output when they are ready.
pub const UP: &str = "up: ";
/// For what has to happen.
pub const SOON: Duration = Duration::from_secs(60);
/// For what must not happen.
pub const SHORT: Duration = Duration::from_millis(500);
/// From one look at a condition to the next.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A lab whose firewall lets out TCP 80 and 443.
#[fixture]
pub fn lab() -> Lab {
    build(Topology::Nat)
}

/// Any lab.
pub fn build(topology: Topology) -> Lab {
    let lab = Lab::build(topology).unwrap_or_else(|error| {
        let mut reasons = error.to_string();
        let mut source = error.source();
        while let Some(reason) = source {
            reasons += &format!(": {reason}");
            source = reason.source();
        }
        panic!("these tests need namespaces, and there is no lab: {reasons}")
    });
    lab.hosts().iter().for_each(wait_until_settled);
    lab
}

/// A server on `server` and a client on `client`, up.
pub struct Tunnel {
    // In this order, so that the client can still say goodbye when both are dropped.
    pub client: Process,
    pub server: Process,
    pub invite: String,
}

impl Tunnel {
    pub fn start(lab: &Lab) -> Tunnel {
        let server = start_server(lab, &[]);
        let invite = invite(lab, "client");
        let client = start_client(lab.host("client"), &invite);
        Tunnel {
            client,
            server,
            invite,
        }
    }
}

/// The options of every server and client that is to run.
pub fn io_options() -> Vec<String> {
    std::env::var(IO_VARIABLE)
        .map(|mode| format!("--io={mode}"))
        .into_iter()
        .collect()
}

/// How io_uring is used, as `ringtun status` has it.
pub fn io_mode() -> String {
    std::env::var(IO_VARIABLE).unwrap_or_else(|_| "auto".to_owned())
}

/// Starts `ringtun server` on `server` and waits until it listens.
pub fn start_server(lab: &Lab, arguments: &[&str]) -> Process {
    let server = lab
        .host("server")
        .command(RINGTUN)
        .arg("server")
        .args(io_options())
        .args(arguments)
        .spawn()
        .expect("ringtun server");
    server.wait_for_line(UP, SOON).expect("a server that is up");
    server
}

/// Starts `ringtun client` and waits until the tunnel is up.
pub fn start_client(host: &Host, invite: &str) -> Process {
    let client = host
        .command(RINGTUN)
        .arg("client")
        .args(io_options())
        .arg(invite)
        .spawn()
        .expect("ringtun client");
    client.wait_for_line(UP, SOON).expect("a client that is up");
    client
}

/// An invite to the server's IPv4 address.
pub fn invite(lab: &Lab, name: &str) -> String {
    invite_to(lab, name, &SERVER_V4.to_string())
}

/// An invite to another address of the server.
pub fn invite_to(lab: &Lab, name: &str, host: &str) -> String {
    let output = lab
        .host("server")
        .exec(RINGTUN, ["invite", name, "--host", host])
        .expect("ringtun invite");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 1, "an invite is one line: {output:?}");
    assert!(lines[0].starts_with("ringtun://"), "{output:?}");
    lines[0].to_owned()
}

/// What a terminal does on Ctrl-C: SIGINT to the whole process group.
pub fn press_ctrl_c(process: &Process) {
    assert_eq!(process.status(), None, "it still runs");
    killpg(Pid::from_raw(process.pid()), Signal::SIGINT).expect("a process group of its own");
}

/// Stops a server or client with Ctrl-C; it has to take that as a proper end.
pub fn stop(process: &Process) {
    press_ctrl_c(process);
    assert_ended(process, 0);
}

/// Waits for the end and checks the exit code.
pub fn assert_ended(process: &Process, code: i32) {
    let status = process.wait(SOON).expect("the end");
    assert_eq!(
        status.code(),
        Some(code),
        "{status}:\n{}",
        process.lines().join("\n")
    );
}

/// Everything of the web host is reached through the tunnel, in both families, and web sees the server.
pub fn assert_web_reached(client: &Host) {
    thread::scope(|scope| {
        for (web, server) in [
            (IpAddr::from(WEB_V4), IpAddr::from(SERVER_V4)),
            (WEB_V6.into(), SERVER_V6.into()),
        ] {
            scope.spawn(move || {
                for port in WEB_TCP_PORTS {
                    let answer =
                        probe::tcp(client, SocketAddr::new(web, port), SOON).expect("the host");
                    assert_eq!(answer, Answer::SawSource(server), "{web} TCP {port}");
                }
                for port in WEB_UDP_PORTS {
                    let answer =
                        probe::udp(client, SocketAddr::new(web, port), SOON).expect("the host");
                    assert_eq!(answer, Answer::SawSource(server), "{web} UDP {port}");
                }
                // iperf3 listens anew after every connection.
                let iperf = SocketAddr::new(web, WEB_IPERF_PORT);
                until_true(&format!("connection to {iperf}"), || {
                    probe::connects(client, iperf, SOON).expect("the host")
                });
                // ping waits no longer than two round trips for the last answer, which is little.
                until_true(&format!("ping of {web} without a loss"), || {
                    client.ping(web, 5).expect("ping").is_complete()
                });
            });
        }
    });
}

/// Neither family gets past the firewall, so that what is reached is reached through a tunnel.
pub fn assert_web_blocked(client: &Host) {
    for web in [IpAddr::from(WEB_V4), WEB_V6.into()] {
        let to = SocketAddr::new(web, WEB_TCP_PORTS[0]);
        let answer = probe::tcp(client, to, SHORT).expect("the host");
        assert!(!answer.is_some(), "{to} is blocked: {answer:?}");
    }
}

/// The global addresses of an interface.
pub fn addresses(host: &Host, interface: &str) -> Vec<IpAddr> {
    let command = ["-o", "address", "show", "dev", interface, "scope", "global"];
    let output = host.exec("ip", command).expect("the interface");
    let addresses = output.lines().filter_map(|line| {
        let mut words = line
            .split_whitespace()
            .skip_while(|word| !word.starts_with("inet"));
        words.nth(1)?.split('/').next()?.parse().ok()
    });
    addresses.collect()
}

/// The addresses that a client was given, IPv4 first.
pub fn inner_addresses(client: &Host) -> [IpAddr; 2] {
    let mut addresses = addresses(client, "ringtun0");
    addresses.sort_by_key(IpAddr::is_ipv6);
    <[IpAddr; 2]>::try_from(addresses)
        .unwrap_or_else(|other| panic!("an address of each family: {other:?}"))
}

/// The destinations of the host's established TCP connections.
pub fn connected_to(host: &Host) -> Vec<SocketAddr> {
    let output = host
        .exec("ss", ["-Htn", "state", "established"])
        .expect("ss");
    let peers = output
        .lines()
        .filter_map(|line| line.split_whitespace().last()?.parse().ok());
    peers.collect()
}

/// Looks again and again until there is something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what} within {SOON:?}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Looks again and again until it is so.
pub fn until_true(what: &str, mut look: impl FnMut() -> bool) {
    until(what, || look().then_some(()));
}

/// Nothing in a log speaks of a bug.
pub fn assert_no_panic(process: &Process) {
    let lines = process.lines();
    let panic = lines.iter().find(|line| line.contains("panicked"));
    assert_eq!(panic, None, "a panic:\n{}", lines.join("\n"));
}

/// The client's port, of an outer address.
pub fn port_of(address: &str) -> &str {
    let port = address.strip_prefix(&format!("{FIREWALL_V4}:"));
    port.unwrap_or_else(|| panic!("from the firewall: {address}"))
}

/// Resets the outer connection that comes from this address, as the server sees it.
pub fn reset(server: &Host, address: &str) {
    let port = port_of(address);
    let kill = ["-K", "dst", &FIREWALL_V4.to_string(), "dport", "=", port];
    let killed = server.exec("ss", kill).expect("ss -K");
    assert!(killed.contains(&format!(":{port}")), "{killed}");
}
