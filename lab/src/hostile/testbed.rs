//! A lab with a server, an honest peer, a sink, and one condition measured at a time.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net};
use ringtun::config::STATE_DIR;
use serde_json::Value;
use tokio::sync::watch;

use super::attack::{Attack, Load};
use super::attacker::{self, Order, Rates, Sent, Tally};
use super::bytes::{BULK_PORT, DISCARD_PORT};
use super::figures::{Condition, Flow, Sample};
use super::sink::Sink;
use super::target::Target;
use super::{HostileError, Plan};
use crate::bench::{Direction, Stream, echo, usage};
use crate::dial::Accounts;
use crate::link;
use crate::process::Process;
use crate::scenario;
use crate::topology::{Lab, SERVER_V4, Topology, WEB_IPERF_PORT, WEB_V4};

/// Where the server listens, beside port 80.
const SERVER_PORT: u16 = 443;
/// The sink's address on `server`. Its port is the server's, which the firewall lets out.
const SINK_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 11);
/// The first address of strangers, on `web`'s network.
const STRANGER_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 100);
const PREFIX: u8 = 24;
/// Segments of a super-packet that links carry as one: 64 KiB have 45 of 1,448 bytes.
const SEGMENTS_MAX: u32 = 64;
/// The longest that an attack may take to begin.
const BEGIN_LIMIT: Duration = Duration::from_secs(3);
/// What has just begun takes effect in this time.
const SETTLING: Duration = Duration::from_millis(500);
/// From one look to the next.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// An echo request is sent every 10 ms.
const ECHOES_PER_SECOND: usize = 100;
/// A transfer has begun, and will not have ended, this long before and after the echoes beside it.
const ECHO_MARGIN: Duration = Duration::from_millis(200);
/// What a lost echo counts as.
const LOST_MS: f64 = 1_000.0;
/// How long `ringtun status` may take.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// How long a newcomer may take before it is given up.
const NEWCOMER_LIMIT: Duration = Duration::from_secs(15);
/// How often a newcomer is started.
const NEWCOMERS: usize = 3;
/// How long a newcomer may take to end.
const DOWN_LIMIT: Duration = Duration::from_secs(5);

/// Everything that one attack is measured with.
#[derive(Debug)]
pub(super) struct Testbed<'a> {
    // In this order, so that the client can still say goodbye.
    client: Process,
    server: Process,
    daemon_pid: i32,
    _sink: Sink,
    accounts: Accounts,
    newcomer_invite: String,
    strangers: Vec<Ipv4Addr>,
    attack: Attack,
    ringtun: &'a Path,
    lab: Lab,
}

impl<'a> Testbed<'a> {
    /// Builds a lab, starts server and honest client, and waits until the tunnel is up.
    pub(super) fn start(
        ringtun: &'a Path,
        attack: Attack,
        on_lab: &mut dyn FnMut(&Lab),
    ) -> Result<Testbed<'a>, HostileError> {
        let lab = Lab::build(Topology::Nat)?;
        on_lab(&lab);
        let (server_host, web) = (lab.host("server"), lab.host("web"));
        link::set_up(server_host.namespace(), "eth0", &[network(SINK_V4)])?;
        let strangers = match attack.load() {
            Load::Strangers(strangers) => (0..u32::from(strangers.addresses))
                .map(|number| Ipv4Addr::from_bits(STRANGER_V4.to_bits() + number))
                .collect(),
            _ => Vec::new(),
        };
        let networks: Vec<IpNet> = strangers.iter().copied().map(network).collect();
        link::set_up(web.namespace(), "eth0", &networks)?;
        // A link's card does not segment everything that it is given. These do so in software, as
        // those of real hosts and routers, where a super-packet has more segments than any honest
        // one.
        for (host, interface) in [(server_host, "eth0"), (lab.host("internet"), "web")] {
            let segments_max = SEGMENTS_MAX.to_string();
            let arguments = ["link", "set", interface, "gso_max_segs", &segments_max];
            host.exec("ip", arguments)?;
        }
        // No answer to what attackers send is part of the load.
        let rules = format!(
            "table inet hostile {{\n\
             chain discard {{\n\
             type filter hook prerouting priority raw\n\
             meta l4proto {{ tcp, udp }} th dport {DISCARD_PORT} drop\n\
             }}\n\
             }}\n"
        );
        web.command("nft").args(["-f", "-"]).input(rules).exec()?;

        let names = [0, 1].map(|number| format!("attacker-{number}"));
        let accounts = server_host.enter(|| Accounts::make(Path::new(STATE_DIR), &names))??;
        let invite = scenario::invite(server_host, ringtun, "client")?;
        let newcomer_invite = scenario::invite(server_host, ringtun, "newcomer")?;
        let sink = Sink::start(server_host, SINK_V4, SERVER_PORT)?;
        let server = server_host.spawn(
            ringtun,
            [
                "server",
                "--listen",
                &format!("{SERVER_V4}:{SERVER_PORT}"),
                "--listen",
                &format!("{SERVER_V4}:80"),
            ],
        )?;
        server.wait_for_line(scenario::SERVER_IS_READY, scenario::UP_LIMIT)?;
        let client = scenario::start_client(lab.host("client"), ringtun, &invite)?;
        let daemon_pid = daemon_of(&server).ok_or(HostileError::NoDaemon)?;
        Ok(Testbed {
            client,
            server,
            daemon_pid,
            _sink: sink,
            accounts,
            newcomer_invite,
            strangers,
            attack,
            ringtun,
            lab,
        })
    }

    /// How the server has ended, if it has.
    pub(super) fn death(&self) -> Option<String> {
        let end = match self.server.status() {
            Some(status) => format!("ringtun server ended, {status}"),
            None if daemon_of(&self.server) != Some(self.daemon_pid) => {
                "its daemon ended".to_owned()
            }
            None => return None,
        };
        let lines = self.server.lines();
        let panic = lines.iter().position(|line| line.contains("panicked"));
        // Where it panicked, and what it said there; otherwise its last line.
        let telling = match panic {
            Some(at) => lines[at..].iter().take(2),
            None => lines[lines.len().saturating_sub(1)..].iter().take(1),
        };
        let telling: Vec<&str> = telling.map(String::as_str).collect();
        Some(format!("{end}: {}", telling.join(" ")))
    }

    /// Whether the honest client still runs.
    pub(super) fn has_client(&self) -> bool {
        self.client.status().is_none()
    }

    /// Measures the honest peer in one condition. The counters are those of the server at the end
    /// of it.
    pub(super) fn sample(
        &self,
        condition: Condition,
        round: u32,
        rates: Rates,
        plan: &Plan,
    ) -> Result<(Sample, Option<Value>), HostileError> {
        self.beside(condition, rates, |tally, begun| {
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                let watcher = scope.spawn(|| watch_rss(self.daemon_pid, &stop));
                let busy_from = usage::processor_time(&[self.daemon_pid]);
                let measured_from = Instant::now();
                let down = self.flow(Direction::Down, plan);
                let up = self.flow(Direction::Up, plan);
                let busy = usage::processor_time(&[self.daemon_pid]).saturating_sub(busy_from);
                let measured = measured_from.elapsed();
                let sent = Sent {
                    seconds: begun.elapsed().as_secs_f64(),
                    ..tally.sent()
                };
                let status = match condition {
                    Condition::Attack => self.status(),
                    _ => None,
                };
                stop.store(true, Ordering::Relaxed);
                let sample = Sample {
                    condition,
                    round,
                    down,
                    up,
                    sent,
                    rss_peak_mib: joined(watcher),
                    daemon_cpu: busy.as_secs_f64() / measured.as_secs_f64(),
                };
                (sample, status)
            })
        })
    }

    /// Starts newcomers one after the other while the server is attacked. Returns how long each
    /// took, in seconds.
    pub(super) fn newcomers(&self) -> Result<Vec<Option<f64>>, HostileError> {
        self.beside(Condition::Attack, Rates::default(), |_, _| {
            (0..NEWCOMERS).map(|_| self.newcomer()).collect()
        })
    }

    fn newcomer(&self) -> Option<f64> {
        let begun = Instant::now();
        let host = self.lab.host("client2");
        let command = host.command(self.ringtun).arg("client");
        let client = command
            .env("RINGTUN_INVITE", &self.newcomer_invite)
            .spawn()
            .ok()?;
        let up = client.wait_for_line(scenario::CLIENT_IS_UP, NEWCOMER_LIMIT);
        let seconds = begun.elapsed().as_secs_f64();
        let _ = client.stop(DOWN_LIMIT);
        up.ok().map(|_| seconds)
    }

    /// Calls `measure` while a condition holds.
    fn beside<T>(
        &self,
        condition: Condition,
        rates: Rates,
        measure: impl FnOnce(&Tally, Instant) -> T,
    ) -> Result<T, HostileError> {
        let tally = Arc::new(Tally::default());
        let (keep, stop) = watch::channel(());
        thread::scope(|scope| {
            let begun = Instant::now();
            let attackers = match condition {
                Condition::Idle => Vec::new(),
                Condition::Sink | Condition::Attack => {
                    self.launch(scope, condition, rates, &tally, &stop)?
                }
            };
            if !attackers.is_empty() {
                let wanted = self.openings_at_first();
                while tally.sent().opened < wanted && begun.elapsed() < BEGIN_LIMIT {
                    thread::sleep(LOOK_INTERVAL);
                }
                thread::sleep(SETTLING);
            }
            let measured = measure(&tally, begun);
            // The order to stop.
            drop(keep);
            for attacker in attackers {
                joined(attacker)?;
            }
            Ok(measured)
        })
    }

    fn launch<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        condition: Condition,
        rates: Rates,
        tally: &Arc<Tally>,
        stop: &watch::Receiver<()>,
    ) -> Result<Vec<ScopedJoinHandle<'scope, Result<(), HostileError>>>, HostileError> {
        let load = self.attack.load();
        let is_sink = condition == Condition::Sink;
        let (tally, stopped) = (Arc::clone(tally), stop.clone());
        if let Load::Status = load {
            let server = (self.lab.host("server"), self.ringtun);
            let arguments: &[&str] = match is_sink {
                true => &["--version"],
                false => &["status", "--json"],
            };
            return Ok(vec![scope.spawn(move || {
                attacker::hammer(server, arguments, rates, &tally, &stopped);
                Ok(())
            })]);
        }
        let address = |host: Ipv4Addr| SocketAddr::new(host.into(), SERVER_PORT);
        let target = match is_sink {
            true => Target::sink(&self.accounts, address(SINK_V4))?,
            false => Target::server(&self.accounts, address(SERVER_V4))?,
        };
        let order = Order {
            load,
            target,
            tokens: self.accounts.tokens.clone(),
            addresses: self.strangers.clone(),
            rates,
            tally,
        };
        let host = match load {
            Load::Strangers(_) => self.lab.host("web"),
            _ => self.lab.host("client2"),
        };
        let mut attackers = vec![scope.spawn(move || {
            host.enter(|| attacker::attack(order, stopped))?
                .map_err(HostileError::Socket)
        })];
        if let Load::Tunnels(tunnels) = load
            && tunnels.is_sent_bulk
        {
            let to = is_sink.then(|| SocketAddr::new(SINK_V4.into(), BULK_PORT));
            let (web, stopped) = (self.lab.host("web"), stop.clone());
            attackers.push(scope.spawn(move || {
                web.enter(|| attacker::send_bulk(to, &stopped))?
                    .map_err(HostileError::Socket)
            }));
        }
        Ok(attackers)
    }

    /// Connections that an attack begins with.
    fn openings_at_first(&self) -> u64 {
        match self.attack.load() {
            Load::Tunnels(tunnels) => tunnels.tokens as u64 * u64::from(tunnels.connections),
            Load::Strangers(strangers) => {
                u64::from(strangers.addresses) * strangers.connections_per_address as u64
            }
            Load::Openings { .. } | Load::Status => 1,
        }
    }

    /// One transfer with a ping beside it. What cannot be measured is a figure, too.
    fn flow(&self, direction: Direction, plan: &Plan) -> Flow {
        let lost = |failure: String| Flow {
            megabits_per_second: 0.0,
            ping_p50_ms: LOST_MS,
            ping_p99_ms: LOST_MS,
            failure: Some(failure),
        };
        if let Some(end) = self.death() {
            return lost(end);
        }
        if let Err(error) = self.lab.wait_for_iperf3() {
            return lost(error.to_string());
        }
        let client = self.lab.host("client");
        let stream = Stream {
            to: (WEB_V4, WEB_IPERF_PORT),
            direction,
            streams: 1,
            seconds: plan.seconds,
            omitted_seconds: 0,
            congestion_control: None,
        };
        let running = match stream.start(client) {
            Ok(running) => running,
            Err(error) => return lost(error.to_string()),
        };
        thread::sleep(ECHO_MARGIN);
        let pinging = Duration::from_secs(plan.seconds.into()).saturating_sub(2 * ECHO_MARGIN);
        let echoes = (pinging.as_secs_f64() * ECHOES_PER_SECOND as f64) as usize;
        let (p50_ms, p99_ms) = match echo::round_trips(client, WEB_V4, echoes.max(1)) {
            Ok(times) => (times.p50_us / 1_000.0, times.p99_us / 1_000.0),
            Err(_) => (LOST_MS, LOST_MS),
        };
        let (megabits_per_second, failure) = match stream.report(running) {
            Ok(transfer) => (transfer.megabits_per_second, None),
            Err(error) => (0.0, Some(error.to_string())),
        };
        Flow {
            megabits_per_second,
            ping_p50_ms: p50_ms,
            ping_p99_ms: p99_ms,
            failure,
        }
    }

    fn status(&self) -> Option<Value> {
        let command = self.lab.host("server").command(self.ringtun);
        let status = command.args(["status", "--json"]).limit(STATUS_LIMIT);
        serde_json::from_str(&status.exec().ok()?).ok()
    }
}

/// The daemon is the keeper's child.
fn daemon_of(server: &Process) -> Option<i32> {
    let daemon = usage::family(server.pid()).get(1).copied()?;
    // One that has ended and that nobody has waited for yet is none.
    let stat = fs::read_to_string(format!("/proc/{daemon}/stat")).ok()?;
    (!stat.rsplit_once(')')?.1.trim_start().starts_with('Z')).then_some(daemon)
}

/// Looks at a process's RSS again and again, and returns the most, in MiB.
fn watch_rss(pid: i32, stop: &AtomicBool) -> f64 {
    let mut peak_mib = 0.0_f64;
    while !stop.load(Ordering::Relaxed) {
        peak_mib = peak_mib.max(usage::resident_mib(pid));
        thread::sleep(LOOK_INTERVAL);
    }
    peak_mib
}

fn network(address: Ipv4Addr) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(address, PREFIX))
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}
