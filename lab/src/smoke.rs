//! The smoke set: each thing that ringtun does, once, on whatever kernel there is.
//!
//! It is made for slow machines with strange kernels (`ci/kernels` runs it under emulation), so that limits are
//! generous, transfers are small, and a failed check does not keep the next one from being made.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::utsname::uname;
use nix::unistd::Pid;

use crate::bench::Direction;
use crate::host::Host;
use crate::process::{Process, ProcessError};
use crate::report::Report;
use crate::scenario::{
    CLIENT_IS_UP, SERVER_IS_READY, ScenarioError, difference, machine_state, networks_in_use,
    reached,
};
use crate::topology::{Lab, SERVER_V4, SERVER_V6, Topology, WEB_V4, WEB_V6};
use crate::transfer::{Transfer, TransferError, connect, converse};

/// How many threads for I/O the kernel may make for each ring. New kernels make none; Debian's 5.10 may make one that
/// has nothing to do, and the first 5.10 does so with every ring. One for each read in flight would be a storm.
const HELPER_THREADS_PER_RING_MAX: usize = 1;
/// What a worker's thread is called, with a number behind.
const WORKER: &str = "ringtun-w";
/// How much a transfer carries.
const TRANSFER_BYTES: u64 = 8 << 20;
/// How much has to arrive before the server is killed, and after it is back.
const SOME_BYTES: u64 = 1 << 20;
/// How long anything may take that has to happen.
const LIMIT: Duration = Duration::from_secs(60);
/// From one look at a condition to the next.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long packet memory may take to be registered, where it may be.
const REGISTERING_TIME: Duration = Duration::from_secs(2);
/// The interface of both sides, and its MTU.
const INTERFACE: &str = "ringtun0";
const MTU_BYTES: u64 = 1500;
/// From this mean size on, a good part of the bytes travelled in super-packets: TCP makes them small where it is slow.
const SUPER_PACKET_MEAN_BYTES: u64 = MTU_BYTES * 4 / 3;

/// A tunnel in one of its forms.
#[derive(Clone, Copy, Debug)]
struct Form {
    title: &'static str,
    /// Whom the invite is for: each form is another peer.
    peer: &'static str,
    /// What the client connects to.
    outer: IpAddr,
    /// Lines for the configuration of both sides.
    configuration: &'static str,
    /// How the rings have to be set up, if that is known.
    ring: Option<&'static str>,
    offload: bool,
}

const PLAIN: Form = Form {
    title: "Over IPv4, as it is by default",
    peer: "plain",
    outer: IpAddr::V4(SERVER_V4),
    configuration: "",
    ring: None,
    offload: true,
};
const OTHERS: [Form; 2] = [
    Form {
        title: "Over IPv6, with what Linux 5.10 has of io_uring",
        peer: "ipv6",
        outer: IpAddr::V6(SERVER_V6),
        configuration: "io = \"baseline\"\n",
        ring: Some("plain"),
        offload: true,
    },
    Form {
        title: "Without offload",
        peer: "slow",
        outer: IpAddr::V4(SERVER_V4),
        configuration: "offload = false\n",
        ring: None,
        offload: false,
    },
];
const CRASHED: Form = Form {
    title: "After a crash",
    peer: "crashed",
    ..PLAIN
};

/// Why a check failed, or could not be made.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("a program failed")]
    Process(#[from] ProcessError),
    #[error("the scenario broke off")]
    Scenario(#[from] ScenarioError),
    #[error("the transfer failed")]
    Transfer(#[from] TransferError),
    #[error("the connection failed")]
    Connection(#[source] io::Error),
    #[error("{0}")]
    Wrong(String),
}

impl Failure {
    fn unless(is_right: bool, why: impl FnOnce() -> String) -> Result<(), Failure> {
        if is_right {
            Ok(())
        } else {
            Err(Failure::Wrong(why()))
        }
    }
}

/// Plays the smoke set. The report knows whether all of it was right.
///
/// # Errors
/// When there is no lab, or the report takes no more.
pub fn smoke<W: Write>(
    ringtun: &Path,
    report: &mut Report<W>,
    on_start: impl FnOnce(&Lab),
) -> Result<(), ScenarioError> {
    let machine = machine_state();
    let lab = Lab::build(Topology::Nat)?;
    on_start(&lab);
    report.heading(format_args!("Smoke test on Linux {}", kernel()))?;
    report.outcome("the lab is there", wait_until_settled(&lab))?;
    let smoke = Smoke { lab: &lab, ringtun };
    let before = smoke.network_states();

    report.heading(PLAIN.title)?;
    if let Some(mut tunnel) = smoke.up(&PLAIN, report)? {
        smoke.traffic(&PLAIN, &tunnel, report)?;
        for (host, role) in [(smoke.server(), "server"), (smoke.client(), "client")] {
            let what = format!("{}: ringtun doctor", host.name());
            report.outcome(what, smoke.doctor(host, role))?;
        }
        report.outcome(
            "inner connections survive the server's kill -9",
            smoke.restart(&mut tunnel),
        )?;
        smoke.down(tunnel, &before, report)?;
    }
    for form in &OTHERS {
        report.heading(form.title)?;
        if let Some(tunnel) = smoke.up(form, report)? {
            smoke.traffic(form, &tunnel, report)?;
            smoke.down(tunnel, &before, report)?;
        }
    }
    report.heading(CRASHED.title)?;
    if let Some(tunnel) = smoke.up(&CRASHED, report)? {
        smoke.crash(tunnel, &before, report)?;
    }

    report.heading("Afterwards")?;
    let networks: Vec<_> = lab
        .hosts()
        .iter()
        .map(|host| host.namespace().net_id())
        .collect();
    drop(lab);
    let in_use = networks_in_use();
    let is_gone = networks.iter().all(|network| !in_use.contains(network));
    report.check(is_gone, "no process of the lab is left")?;
    report.check(
        machine == machine_state(),
        "the machine's interfaces, routes, rules and nftables are as before",
    )?;
    Ok(())
}

struct Smoke<'lab> {
    lab: &'lab Lab,
    ringtun: &'lab Path,
}

/// Both sides, up.
struct Tunnel {
    client: Process,
    server: Process,
}

/// What both sides' network looked like.
struct NetworkStates(Vec<(&'static str, Result<String, ProcessError>)>);

/// What went through an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Traffic {
    bytes: u64,
    packets: u64,
}

impl Smoke<'_> {
    fn client(&self) -> &Host {
        self.lab.host("client")
    }

    fn server(&self) -> &Host {
        self.lab.host("server")
    }

    /// Starts both sides. Without a tunnel there is nothing more to try, and the report knows.
    fn up<W: Write>(&self, form: &Form, report: &mut Report<W>) -> io::Result<Option<Tunnel>> {
        let started = Instant::now();
        let tunnel = self.start(form);
        let tunnel = match tunnel {
            Ok(tunnel) => {
                let text = format!("tunnel up in {} ms", started.elapsed().as_millis());
                report.check(true, text)?;
                Some(tunnel)
            }
            Err(error) => {
                report.outcome("tunnel up", Err::<&str, _>(error))?;
                None
            }
        };
        Ok(tunnel)
    }

    fn start(&self, form: &Form) -> Result<Tunnel, Failure> {
        for (host, file) in [
            (self.server(), "/etc/ringtun/server.toml"),
            (self.client(), "/etc/ringtun/client.toml"),
        ] {
            host.write_file(file, form.configuration)
                .map_err(ScenarioError::from)?;
        }
        let server = self.start_server()?;
        let outer = form.outer.to_string();
        let invite = self
            .server()
            .exec(self.ringtun, ["invite", form.peer, "--host", &outer])?;
        let client = self
            .client()
            .command(self.ringtun)
            .arg("client")
            .env("RINGTUN_INVITE", invite.trim())
            .spawn()?;
        client.wait_for_line(CLIENT_IS_UP, LIMIT)?;
        Ok(Tunnel { client, server })
    }

    fn start_server(&self) -> Result<Process, ProcessError> {
        let server = self.server().spawn(self.ringtun, ["server"])?;
        server.wait_for_line(SERVER_IS_READY, LIMIT)?;
        Ok(server)
    }

    /// TCP, UDP, ICMP and names; transfers both ways in both families.
    fn traffic<W: Write>(
        &self,
        form: &Form,
        tunnel: &Tunnel,
        report: &mut Report<W>,
    ) -> Result<(), ScenarioError> {
        for (host, process) in [
            (self.server(), &tunnel.server),
            (self.client(), &tunnel.client),
        ] {
            report.outcome(
                format_args!("{}: ringtun status", host.name()),
                self.status(form, host, process),
            )?;
        }
        if let Err(error) = reached(self.lab, report) {
            report.outcome("what the client reaches", Err::<&str, _>(error))?;
        }
        let mut helpers = 0;
        for (family, web) in [("IPv4", WEB_V4.into()), ("IPv6", WEB_V6.into())] {
            for (way, direction) in [("down", Direction::Down), ("up", Direction::Up)] {
                report.outcome(
                    format_args!("a transfer {way}, {family} inside"),
                    self.transfer(form, tunnel, web, direction, &mut helpers),
                )?;
            }
        }
        // Each worker has a ring, and so has each daemon's first thread.
        let rings = [&tunnel.client, &tunnel.server].map(|process| workers(process) + 1);
        let helpers_max = HELPER_THREADS_PER_RING_MAX * rings.iter().sum::<usize>();
        report.check(
            helpers <= helpers_max,
            format_args!(
                "helper threads of io_uring during the transfers: {helpers}, at most {helpers_max}"
            ),
        )?;
        Ok(())
    }

    /// What `ringtun doctor` finds on a host that runs ringtun already.
    fn doctor(&self, host: &Host, role: &str) -> Result<String, Failure> {
        let doctor = host
            .command(self.ringtun)
            .args(["doctor", "--role", role])
            .limit(LIMIT);
        let found = doctor.exec()?;
        let is_degraded = |line: &&str| line.trim_start().starts_with("degraded");
        let degraded = found.lines().filter(is_degraded).count();
        Ok(format!("the {role} can run, {degraded} checks degraded"))
    }

    /// What a side says of itself: whether its packet path is the one that was asked for.
    fn status(&self, form: &Form, host: &Host, process: &Process) -> Result<String, Failure> {
        let ask = || {
            let status = host.exec(self.ringtun, ["status", "--json"])?;
            serde_json::from_str(&status)
                .map_err(|error| Failure::Wrong(format!("{error}: {status}")))
        };
        let is_registered = |status: &serde_json::Value| {
            let is_registered =
                |worker: &serde_json::Value| worker["io"]["buffers_registered"] == true;
            let workers = status["workers"].as_array();
            workers.is_some_and(|workers| workers.iter().all(is_registered))
        };
        let mut status: serde_json::Value = ask()?;
        let deadline = Instant::now() + REGISTERING_TIME;
        while !is_registered(&status) && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
            status = ask()?;
        }
        Failure::unless(status["keeper_pid"].as_i64().is_some(), || {
            format!("no keeper_pid: {status}")
        })?;
        let offloads = texts(&status["tun_offloads"], "");
        let rings = texts(&status["workers"], "/io/ring");
        Failure::unless(rings.len() == workers(process) && !rings.is_empty(), || {
            format!(
                "it has {} workers, and tells of {rings:?}",
                workers(process)
            )
        })?;
        Failure::unless(
            form.ring
                .is_none_or(|wanted| rings.iter().all(|ring| ring == wanted)),
            || format!("its rings are {rings:?}"),
        )?;
        let has = |offload: &str| offloads.iter().any(|found| found == offload);
        Failure::unless(
            match form.offload {
                true => has("csum") && has("tso4") && has("tso6"),
                false => offloads.is_empty(),
            },
            || format!("the interface's offloads are {offloads:?}"),
        )?;
        Ok(format!(
            "rings {}, buffers {}registered, offloads: {}",
            rings.join(" "),
            if is_registered(&status) { "" } else { "not " },
            if offloads.is_empty() {
                "none".to_owned()
            } else {
                offloads.join(" ")
            }
        ))
    }

    /// Moves bytes, compares them, and tells from the interface's counters whether they came as super-packets.
    fn transfer(
        &self,
        form: &Form,
        tunnel: &Tunnel,
        web: IpAddr,
        direction: Direction,
        helpers: &mut usize,
    ) -> Result<String, Failure> {
        let daemons = [daemon_of(&tunnel.client)?, daemon_of(&tunnel.server)?];
        let before = self.tunnel_traffic(direction)?;
        let started = Instant::now();
        let transfer = Transfer::start(self.client(), self.lab.host("web"), web, direction)?;
        transfer.wait_for_more(TRANSFER_BYTES, LIMIT, || {
            *helpers = (*helpers).max(helper_threads(&daemons));
        })?;
        let bytes = transfer.finish()?;
        let seconds = started.elapsed().as_secs_f64();
        let after = self.tunnel_traffic(direction)?;
        let packets = after.packets - before.packets;
        Failure::unless(after.bytes - before.bytes >= bytes, || {
            format!("{bytes} bytes arrived, but not through {INTERFACE}")
        })?;
        let mean = (after.bytes - before.bytes) / packets.max(1);
        match form.offload {
            true => Failure::unless(mean >= SUPER_PACKET_MEAN_BYTES, || {
                format!("packets of {mean} bytes in the mean: there are hardly any super-packets")
            })?,
            false => Failure::unless(mean <= MTU_BYTES, || {
                format!("packets of {mean} bytes in the mean: there are super-packets")
            })?,
        }
        let megabits = bytes as f64 * 8.0 / 1e6;
        Ok(format!(
            "{bytes} bytes arrived unchanged, {:.0} Mbit/s, in packets of {mean} bytes in the mean",
            megabits / seconds
        ))
    }

    /// What came out of the tunnel at the receiving side of a transfer.
    fn tunnel_traffic(&self, direction: Direction) -> Result<Traffic, Failure> {
        let receiver = match direction {
            Direction::Down => self.client(),
            Direction::Up => self.server(),
        };
        let report = receiver.exec("ip", ["-j", "-s", "link", "show", "dev", INTERFACE])?;
        let report: serde_json::Value = serde_json::from_str(&report).unwrap_or_default();
        let counter = |name: &str| {
            let counter = report.pointer(&format!("/0/stats64/rx/{name}"));
            counter
                .and_then(serde_json::Value::as_u64)
                .ok_or_else(|| Failure::Wrong(format!("ip knows no {name} of {INTERFACE}")))
        };
        Ok(Traffic {
            bytes: counter("bytes")?,
            packets: counter("packets")?,
        })
    }

    /// Kills the server in the middle of a transfer and starts it again.
    fn restart(&self, tunnel: &mut Tunnel) -> Result<String, Failure> {
        let web = self.lab.host("web");
        let idle = connect(self.client(), web, WEB_V6.into())?;
        let transfer = Transfer::start(self.client(), web, WEB_V4.into(), Direction::Up)?;
        transfer.wait_for_more(SOME_BYTES, LIMIT, || ())?;
        kill_9_both(&tunnel.server)?;
        let killed = Instant::now();
        tunnel.server = self.start_server()?;
        transfer.wait_for_more(SOME_BYTES, LIMIT, || ())?;
        let pause = killed.elapsed();
        transfer.finish()?;
        converse(idle).map_err(Failure::Connection)?;
        Ok(format!(
            "a transfer went on {} ms after it, and an idle connection, too",
            pause.as_millis()
        ))
    }

    /// Ends both sides as a user does, and looks whether they have put everything back.
    fn down<W: Write>(
        &self,
        tunnel: Tunnel,
        before: &NetworkStates,
        report: &mut Report<W>,
    ) -> io::Result<()> {
        for (name, process) in [("client", &tunnel.client), ("server", &tunnel.server)] {
            let started = Instant::now();
            let ended = process
                .stop(LIMIT)
                .map_err(Failure::from)
                .and_then(|status| {
                    Failure::unless(status.code() == Some(0), || {
                        format!("{status}:\n{}", process.lines().join("\n"))
                    })?;
                    Ok(format!(
                        "{status} after {} ms",
                        started.elapsed().as_millis()
                    ))
                });
            report.outcome(format_args!("ringtun {name} ends on SIGTERM"), ended)?;
        }
        self.compare(before, report)
    }

    /// Kills both halves of both sides, and has `ringtun down` put everything back.
    fn crash<W: Write>(
        &self,
        tunnel: Tunnel,
        before: &NetworkStates,
        report: &mut Report<W>,
    ) -> io::Result<()> {
        for (host, process) in [
            (self.client(), tunnel.client),
            (self.server(), tunnel.server),
        ] {
            let cleaned = kill_9_both(&process).and_then(|()| {
                host.exec(self.ringtun, ["down"])?;
                Ok("it found what to do")
            });
            report.outcome(
                format_args!("ringtun down after kill -9 on {}", host.name()),
                cleaned,
            )?;
        }
        self.compare(before, report)
    }

    fn network_states(&self) -> NetworkStates {
        NetworkStates(vec![
            ("client", self.client().network_state()),
            ("server", self.server().network_state()),
        ])
    }

    fn compare<W: Write>(&self, before: &NetworkStates, report: &mut Report<W>) -> io::Result<()> {
        let after = self.network_states();
        for ((name, before), (_, after)) in before.0.iter().zip(&after.0) {
            let what = format!("{name}: links, routes, rules, nftables and sysctls are as before");
            match (before, after) {
                (Ok(before), Ok(after)) => {
                    report.check(before == after, what)?;
                    for line in difference(before, after) {
                        report.line(line)?;
                    }
                }
                (Err(error), _) | (_, Err(error)) => {
                    report.outcome(what, Err::<&str, _>(error))?;
                }
            }
        }
        Ok(())
    }
}

fn wait_until_settled(lab: &Lab) -> Result<String, Failure> {
    let started = Instant::now();
    for host in lab.hosts() {
        wait_until("settled links", || host.is_settled().unwrap_or(false))?;
    }
    let milliseconds = started.elapsed().as_millis();
    Ok(format!("its links settled in {milliseconds} ms"))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), Failure> {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        Failure::unless(Instant::now() < deadline, || {
            format!("no {what} within {LIMIT:?}")
        })?;
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn kernel() -> String {
    uname().map_or_else(
        |error| error.to_string(),
        |uname| uname.release().to_string_lossy().into_owned(),
    )
}

/// The unprivileged half of a running server or client: its child that is the same program.
fn daemon_of(keeper: &Process) -> Result<i32, Failure> {
    let program = program(keeper.pid());
    let daemon = processes().find(|pid| {
        stat(*pid).is_some_and(|stat| stat.parent == keeper.pid()) && self::program(*pid) == program
    });
    daemon.ok_or_else(|| Failure::Wrong(format!("process {} has no daemon", keeper.pid())))
}

/// Kills both halves so that neither can clean up after the other.
fn kill_9_both(keeper: &Process) -> Result<(), Failure> {
    let daemon = daemon_of(keeper)?;
    keeper.signal(Signal::SIGSTOP);
    // It cannot end in between: its parent has stopped, and so does not reap it.
    let _ = kill(Pid::from_raw(daemon), Signal::SIGKILL);
    keeper.signal(Signal::SIGKILL);
    keeper.wait(LIMIT)?;
    wait_until("end of the killed daemon", || {
        stat(daemon).is_none_or(|stat| stat.state == 'Z')
    })
}

/// How many threads the kernel has made to do I/O for these processes. Before Linux 5.12 they are processes of the
/// kernel's own, which do not tell for whom they work.
fn helper_threads(daemons: &[i32]) -> usize {
    let of_daemons = daemons.iter().flat_map(|daemon| threads(*daemon));
    let own = of_daemons
        .filter(|name| name.starts_with("iou-wrk"))
        .count();
    let of_kernel = processes()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .filter(|name| name.starts_with("io_wqe_worker"));
    own + of_kernel.count()
}

/// How many workers a server or client has.
fn workers(keeper: &Process) -> usize {
    let names = daemon_of(keeper).map(threads).unwrap_or_default();
    names.iter().filter(|name| name.starts_with(WORKER)).count()
}

/// The names of a process's threads.
fn threads(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .collect()
}

/// The text at `pointer` of each element of a JSON list.
fn texts(list: &serde_json::Value, pointer: &str) -> Vec<String> {
    let elements = list.as_array().into_iter().flatten();
    elements
        .filter_map(|element| Some(element.pointer(pointer)?.as_str()?.to_owned()))
        .collect()
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn program(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// What `/proc/PID/stat` says about a process.
struct Stat {
    state: char,
    parent: i32,
}

fn stat(pid: i32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}
