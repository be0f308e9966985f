//! What the findings mean for each role. Pure.

use super::Role;
use super::findings::{
    ClientFound, Clock, FilterTrouble, Findings, NameFound, PortFound, Resolver, RingTrouble,
    ServerFound, Trouble, TunFound, TunTrouble,
};
use super::report::{Check, Level, Report};
use crate::keeper::KeeperError;
use crate::keeper::firewall::{Blocker, Family};
use crate::uring::buffer::BUDGET_BYTES_DEFAULT;
use crate::uring::probe::SetUp;
use crate::uring::survey::{Answers, Survey};
use crate::worker::Rehearsal;

/// When this release was in the making (2026-11-01): a clock that shows less is wrong.
const EARLIEST_UNIX_SECONDS: u64 = 1_793_491_200;
/// Open files that a daemon should be able to have: two for each of a few hundred connections.
const OPEN_FILES_WANTED: u64 = 1024;

const BOTH: &[Role] = &Role::ALL;
const SERVER: &[Role] = &[Role::Server];
const CLIENT: &[Role] = &[Role::Client];

const OF_SERVER: [&str; 6] = [
    "nft",
    "forwarding",
    "other-firewalls",
    "port",
    "state",
    "nameservers",
];
const OF_CLIENT: [&str; 1] = ["resolver"];

/// Judges what was found, for one role or for both.
pub fn judge(findings: &Findings, role: Option<Role>) -> Report {
    let mut checks = vec![
        capabilities(findings),
        check(
            "kernel",
            BOTH,
            Level::Ok,
            format!("Linux {}", findings.kernel),
        ),
    ];
    checks.extend(rings(&findings.rings, findings.survey.as_ref()));
    checks.push(open_files(findings.open_files_max));
    checks.extend(tun(&findings.tun));
    checks.push(run_directory(findings.run_directory.as_ref()));
    checks.push(congestion(findings));
    checks.push(clock(findings.clock));
    checks.push(uplink(findings));
    checks.push(reverse_path(findings));
    if let Some(found) = &findings.server {
        checks.extend(server(findings, found));
    }
    if let Some(found) = &findings.client {
        checks.extend(client(findings, found));
    }
    if let Some(role) = role {
        let (other, names) = match role {
            Role::Server => (CLIENT, &OF_CLIENT[..]),
            Role::Client => (SERVER, &OF_SERVER[..]),
        };
        checks.retain(|check| check.roles.contains(&role));
        for name in names {
            if !checks.iter().any(|check| check.name == *name) {
                let why = format!("for a {} only", other[0].name());
                checks.push(not_applicable(name, other, why));
            }
        }
    }
    Report::new(role, checks)
}

fn check(name: &'static str, roles: &[Role], level: Level, found: impl Into<String>) -> Check {
    Check {
        name,
        roles: roles.into(),
        level,
        found: found.into(),
        fix: None,
    }
}

fn not_applicable(name: &'static str, roles: &[Role], why: impl Into<String>) -> Check {
    check(name, roles, Level::NotApplicable, why)
}

impl Check {
    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

fn broken(name: &'static str, roles: &[Role], trouble: &Trouble) -> Check {
    let check = check(name, roles, Level::Broken, &trouble.found);
    if trouble.fix.is_empty() {
        check
    } else {
        check.fix(&trouble.fix)
    }
}

const WITHOUT_RIGHTS: &str = "not tried, for want of CAP_NET_ADMIN";

fn has_rights(findings: &Findings) -> bool {
    findings.rights.net_admin && findings.rights.network_is_ours
}

fn capabilities(findings: &Findings) -> Check {
    let rights = findings.rights;
    if !rights.net_admin {
        let trouble = Trouble::told_by(&KeeperError::NotPrivileged);
        let found = format!("CAP_NET_ADMIN is missing: {}", trouble.found);
        return check("capabilities", BOTH, Level::Broken, found).fix(format!(
            "{} (in a container: `--cap-add NET_ADMIN`)",
            trouble.fix
        ));
    }
    if !rights.network_is_ours {
        let found = "CAP_NET_ADMIN is there, but not for this network namespace";
        return check("capabilities", BOTH, Level::Broken, found)
            .fix("run as the machine's root, or in a network namespace of this user namespace (`unshare --net`)");
    }
    if !rights.can_change_user {
        let found = "CAP_NET_ADMIN; without CAP_SETUID and CAP_SETGID the daemon keeps the user root, with no capability";
        return check("capabilities", BOTH, Level::Degraded, found)
            .fix("add both capabilities (in a container: `--cap-add SETUID --cap-add SETGID`)");
    }
    check(
        "capabilities",
        BOTH,
        Level::Ok,
        "CAP_NET_ADMIN, and the daemon can give up its user",
    )
}

fn rings(found: &Result<Rehearsal, RingTrouble>, survey: Option<&Survey>) -> Vec<Check> {
    const NAME: &str = "io_uring";
    let info = match found {
        Ok(info) => info,
        Err(RingTrouble::Denied {
            setting: Some(value),
        }) if value != "0" => {
            let found = format!("denied to this process: kernel.io_uring_disabled is {value}");
            return vec![
                check(NAME, BOTH, Level::Broken, found).fix("sysctl -w kernel.io_uring_disabled=0"),
            ];
        }
        Err(RingTrouble::Denied { .. }) => {
            let found = "denied to this process by a seccomp filter or a security module";
            return vec![check(NAME, BOTH, Level::Broken, found).fix(
                "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile (docker: `--security-opt seccomp=PROFILE`)",
            )];
        }
        Err(RingTrouble::Other(trouble)) => return vec![broken(NAME, BOTH, trouble)],
    };
    let (level, how) = match info.set_up {
        SetUp::Deferred => (Level::Ok, "SINGLE_ISSUER and DEFER_TASKRUN"),
        SetUp::Cooperative => (Level::Degraded, "COOP_TASKRUN only"),
        SetUp::Plain => (Level::Degraded, "no flag for cheaper completions"),
    };
    let ring = check(
        NAME,
        BOTH,
        level,
        format!("all operations needed are there; rings are set up with {how}"),
    );
    let mut checks = vec![match level {
        Level::Ok => ring,
        _ => ring.fix("it works as it is; Linux 6.1 and newer take less CPU time"),
    }];
    if let Some(survey) = survey {
        checks.push(check("io_uring-survey", BOTH, Level::Ok, describe(survey)));
    }
    checks.push(memory(*info));
    checks
}

fn describe(survey: &Survey) -> String {
    let has = |answers: &Answers| names(answers, true);
    let missing: Vec<String> = [&survey.operations, &survey.set_up_flags, &survey.features]
        .into_iter()
        .flat_map(|answers| names(answers, false))
        .collect();
    let mut text = format!(
        "operations {}; flags {}; features {}",
        has(&survey.operations).join(" "),
        has(&survey.set_up_flags).join(" "),
        has(&survey.features).join(" ")
    );
    if !missing.is_empty() {
        text.push_str(&format!(
            "; not here, and not needed: {}",
            missing.join(" ")
        ));
    }
    text
}

fn names(answers: &Answers, present: bool) -> Vec<String> {
    let matching = answers.iter().filter(|(_, is_there)| *is_there == present);
    matching.map(|(name, _)| (*name).to_owned()).collect()
}

fn memory(info: Rehearsal) -> Check {
    let mib = info.buffer_bytes >> 20;
    let (level, found) = if !info.buffers_registered {
        (
            Level::Degraded,
            format!("{mib} MiB a worker, not registered"),
        )
    } else if info.buffer_bytes < BUDGET_BYTES_DEFAULT {
        (
            Level::Degraded,
            format!(
                "{mib} MiB a worker, registered, of {} MiB wanted",
                BUDGET_BYTES_DEFAULT >> 20
            ),
        )
    } else {
        (Level::Ok, format!("{mib} MiB a worker, registered"))
    };
    let check = check("packet-memory", BOTH, level, found);
    match level {
        Level::Ok => check,
        _ => check.fix("raise RLIMIT_MEMLOCK (`ulimit -l unlimited`, LimitMEMLOCK=infinity of the service), or give CAP_IPC_LOCK"),
    }
}

fn open_files(max: u64) -> Check {
    let found = format!("{max} at most");
    if max >= OPEN_FILES_WANTED {
        return check("open-files", BOTH, Level::Ok, found);
    }
    check("open-files", BOTH, Level::Degraded, found)
        .fix("raise RLIMIT_NOFILE (`ulimit -n 65536`, LimitNOFILE=65536 of the service)")
}

fn tun(found: &Result<TunFound, TunTrouble>) -> Vec<Check> {
    const NAME: &str = "tun";
    let tun = match found {
        Ok(tun) => tun,
        Err(TunTrouble::NotPermitted) => return vec![not_applicable(NAME, BOTH, WITHOUT_RIGHTS)],
        Err(TunTrouble::Other(trouble)) => return vec![broken(NAME, BOTH, trouble)],
    };
    let offloads = tun.offloads;
    let offload = if !(offloads.tso4 && offloads.tso6) {
        let found =
            format!("{offloads}; every packet goes alone, which costs several times the CPU time");
        check("tun-offloads", BOTH, Level::Degraded, found)
            .fix("use a kernel whose TUN driver takes TSO")
    } else if !(offloads.uso4 && offloads.uso6) {
        check(
            "tun-offloads",
            BOTH,
            Level::Degraded,
            format!("TSO, but not USO: UDP goes packet by packet ({offloads})"),
        )
        .fix("it works as it is; Linux 6.2 and newer have USO")
    } else {
        check(
            "tun-offloads",
            BOTH,
            Level::Ok,
            format!("TSO and USO ({offloads})"),
        )
    };
    let queues = match tun.queues {
        1 => "1 queue".to_owned(),
        queues => format!("multi-queue, {queues} queues"),
    };
    vec![
        check(
            NAME,
            BOTH,
            Level::Ok,
            format!("an interface can be made, {queues}"),
        ),
        offload,
    ]
}

fn run_directory(trouble: Option<&Trouble>) -> Check {
    match trouble {
        Some(trouble) => broken("run-directory", BOTH, trouble),
        None => check("run-directory", BOTH, Level::Ok, "can be written"),
    }
}

fn congestion(findings: &Findings) -> Check {
    const NAME: &str = "congestion-control";
    if findings.has_bbr {
        return check(NAME, BOTH, Level::Ok, "BBR can be had");
    }
    let found = "no BBR, which holds up better where packets are lost";
    check(NAME, BOTH, Level::Degraded, found)
        .fix("install the package with the module tcp_bbr, then `modprobe tcp_bbr`")
}

fn clock(clock: Clock) -> Check {
    const NAME: &str = "clock";
    let time = utc(clock.unix_seconds);
    let fix = "timedatectl set-ntp true, or run another NTP client";
    if clock.unix_seconds < EARLIEST_UNIX_SECONDS {
        // A pinned key is recognised at any time.
        let found = format!(
            "{time} is before this release: certificates are refused, unless the invite pins the key"
        );
        return check(NAME, BOTH, Level::Degraded, found)
            .fix(format!("set it (`date -s`), then {fix}"));
    }
    match clock.is_synchronised {
        Some(false) => {
            let found = format!(
                "{time}, not kept by NTP: with a wrong clock certificates are refused, unless the invite pins the key"
            );
            check(NAME, BOTH, Level::Degraded, found).fix(fix)
        }
        Some(true) => check(NAME, BOTH, Level::Ok, format!("{time}, kept by NTP")),
        None => check(NAME, BOTH, Level::Ok, time),
    }
}

/// As ISO 8601 has it, to the minute.
fn utc(unix_seconds: u64) -> String {
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Years begin in March here, so that the leap day is the last: 719_468 days before 1970 was March 1 of year 0.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = year_of_era + era * 400 + next_year;
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        seconds / 3600,
        seconds / 60 % 60
    )
}

fn uplink(findings: &Findings) -> Check {
    const NAME: &str = "uplink";
    let uplinks = &findings.uplinks;
    let by = |names: &[String]| match names {
        [] => None,
        names => Some(format!("via {}", names.join(" and "))),
    };
    match (by(&uplinks.v4), by(&uplinks.v6)) {
        (None, None) => check(
            NAME,
            BOTH,
            Level::Degraded,
            "no default route: this host does not reach the internet",
        )
        .fix("bring the network up (`ip route` shows what there is)"),
        (Some(v4), None) => check(
            NAME,
            BOTH,
            Level::Ok,
            format!("IPv4 {v4}; no IPv6, so a server blocks its clients' (it does not leak)"),
        ),
        (None, Some(v6)) => check(NAME, BOTH, Level::Ok, format!("IPv6 {v6}; no IPv4")),
        (Some(v4), Some(v6)) => check(NAME, BOTH, Level::Ok, format!("IPv4 {v4}, IPv6 {v6}")),
    }
}

fn reverse_path(findings: &Findings) -> Check {
    const NAME: &str = "rp_filter";
    let strict = &findings.strict_reverse_path;
    if strict.is_empty() {
        return check(NAME, BOTH, Level::Ok, "off or loose");
    }
    let names = strict.join(", ");
    let critical: Vec<&String> = findings
        .uplinks
        .v4
        .iter()
        .filter(|name| strict.contains(name))
        .collect();
    if findings.uplinks.v4.len() < 2 || critical.is_empty() {
        return check(
            NAME,
            BOTH,
            Level::Ok,
            format!("strict on {names}, which fits: there is one way out"),
        );
    }
    let commands: Vec<String> = critical
        .iter()
        .map(|name| {
            format!(
                "sysctl -w {}=2",
                dotted(&format!("net/ipv4/conf/{name}/rp_filter"))
            )
        })
        .collect();
    check(NAME, BOTH, Level::Degraded, format!("strict on {names}, and there are several ways out: answers that come by another are dropped"))
        .fix(commands.join("; "))
}

/// `sysctl` takes slashes too, which interface names with dots need.
fn dotted(key: &str) -> String {
    if key.contains('.') {
        key.to_owned()
    } else {
        key.replace('/', ".")
    }
}

fn interface(found: &NameFound, role: Role) -> Check {
    const NAME: &str = "interface";
    let roles = &[role][..];
    let interface = &found.interface;
    let other_name = "set another `interface` in the configuration";
    match &found.claim {
        Some(claim) if claim.is_running && claim.is_server == (role == Role::Server) => check(
            NAME,
            roles,
            Level::Ok,
            format!(
                "{interface}: ringtun {} runs already (process {})",
                role.name(),
                claim.keeper
            ),
        ),
        Some(claim) if claim.is_running => {
            let user = if claim.is_server {
                Role::Server
            } else {
                Role::Client
            };
            let found = format!(
                "{interface} is used by ringtun {} (process {})",
                user.name(),
                claim.keeper
            );
            check(NAME, roles, Level::Broken, found).fix(format!("ringtun down, or {other_name}"))
        }
        Some(_) => check(
            NAME,
            roles,
            Level::Degraded,
            format!("{interface}: what a killed ringtun has set is still in place"),
        )
        .fix("ringtun down (the next start does it too)"),
        None if found.exists => check(
            NAME,
            roles,
            Level::Broken,
            format!("{interface} exists already, and is not ringtun's"),
        )
        .fix(other_name),
        None => check(NAME, roles, Level::Ok, format!("{interface} is free")),
    }
}

fn server(findings: &Findings, found: &ServerFound) -> Vec<Check> {
    let mut checks = vec![
        interface(&found.name, Role::Server),
        filter(&found.filter),
        forwarding(findings, found),
    ];
    checks.push(firewalls(
        findings,
        found.firewalls.as_deref(),
        SERVER,
        ports_of(found),
    ));
    checks.extend(found.ports.iter().map(|(address, port)| {
        const NAME: &str = "port";
        match port {
            PortFound::Free => check(NAME, SERVER, Level::Ok, format!("{address} is free")),
            PortFound::Ours { keeper } => check(
                NAME,
                SERVER,
                Level::Ok,
                format!("{address} is held by the running ringtun (process {keeper})"),
            ),
            PortFound::Busy { owner, trouble } => {
                let by = owner
                    .as_ref()
                    .map(|(name, process)| format!(" by {name} (process {process})"));
                let found = format!("{}{}", trouble.found, by.unwrap_or_default());
                check(NAME, SERVER, Level::Broken, found).fix(&trouble.fix)
            }
            PortFound::Failed(trouble) => broken(NAME, SERVER, trouble),
        }
    }));
    checks.push(match &found.state {
        Err(trouble) => broken("state", SERVER, trouble),
        Ok(state) => {
            let what = match state.peers {
                Some(1) => "1 peer".to_owned(),
                Some(count) => format!("{count} peers"),
                None => "is made at the first start".to_owned(),
            };
            check(
                "state",
                SERVER,
                Level::Ok,
                format!("{}: {what}", state.path.display()),
            )
        }
    });
    checks.push(nameservers(found));
    checks
}

fn ports_of(found: &ServerFound) -> Vec<u16> {
    let mut ports: Vec<u16> = found
        .ports
        .iter()
        .map(|(address, _)| address.port())
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn filter(found: &Result<(), FilterTrouble>) -> Check {
    const NAME: &str = "nft";
    match found {
        Ok(()) => check(NAME, SERVER, Level::Ok, "nft and the kernel take the server's rules (NAT, connection tracking)"),
        Err(FilterTrouble::Missing(trouble)) => broken(NAME, SERVER, trouble),
        Err(FilterTrouble::NotPermitted) => not_applicable(NAME, SERVER, WITHOUT_RIGHTS),
        Err(FilterTrouble::Refused(reason)) => {
            check(NAME, SERVER, Level::Broken, format!("the server's rules are refused: {reason}"))
                .fix("modprobe -a nf_tables nf_conntrack nft_chain_nat nft_ct nft_masq nft_fib_inet; a kernel without these modules cannot be a server")
        }
    }
}

fn forwarding(findings: &Findings, found: &ServerFound) -> Check {
    const NAME: &str = "forwarding";
    let off: Vec<_> = found
        .settings
        .iter()
        .filter(|setting| setting.present.as_deref() != Some(setting.wanted))
        .collect();
    let keys = |settings: &[&super::findings::SettingFound]| {
        let keys: Vec<String> = settings
            .iter()
            .map(|setting| dotted(&setting.key))
            .collect();
        keys.join(", ")
    };
    if off.is_empty() {
        return check(NAME, SERVER, Level::Ok, "on");
    }
    let stuck: Vec<_> = off
        .iter()
        .copied()
        .filter(|setting| !setting.is_writable)
        .collect();
    if stuck.is_empty() {
        return check(
            NAME,
            SERVER,
            Level::Ok,
            format!("off; the server sets it while it runs ({})", keys(&off)),
        );
    }
    if !has_rights(findings) {
        return not_applicable(NAME, SERVER, WITHOUT_RIGHTS);
    }
    let commands: Vec<String> = stuck
        .iter()
        .map(|setting| format!("{}={}", dotted(&setting.key), setting.wanted))
        .collect();
    check(NAME, SERVER, Level::Broken, format!("off, and not to be set from here: {}", keys(&stuck))).fix(format!(
        "sysctl -w {} where /proc/sys can be written; for a container: `--sysctl net.ipv4.ip_forward=1 --sysctl net.ipv6.conf.all.forwarding=1`",
        commands.join(" ")
    ))
}

fn firewalls(
    findings: &Findings,
    found: Option<&[Blocker]>,
    roles: &[Role],
    ports: Vec<u16>,
) -> Check {
    const NAME: &str = "other-firewalls";
    let Some(blockers) = found else {
        return not_applicable(
            NAME,
            roles,
            "not looked at: that takes nft and CAP_NET_ADMIN",
        );
    };
    let is_fatal = |blocker: &&Blocker| blocker.certain && blocker.family == Family::V4;
    let shut = |port: &u16| {
        blockers
            .iter()
            .filter(is_fatal)
            .any(|blocker| blocker.port == Some(*port))
    };
    let level = if blockers
        .iter()
        .filter(is_fatal)
        .any(|blocker| blocker.port.is_none())
        || (!ports.is_empty() && ports.iter().all(shut))
    {
        Level::Broken
    } else if !blockers.is_empty() || findings.legacy_iptables {
        Level::Degraded
    } else {
        Level::Ok
    };
    let mut complaints: Vec<String> = blockers.iter().map(Blocker::complaint).collect();
    let mut fixes: Vec<&str> = blockers
        .iter()
        .map(|blocker| blocker.fix.as_str())
        .collect();
    if findings.legacy_iptables {
        complaints.push("tables of legacy iptables are there, which nft does not show".to_owned());
        fixes.push("look at what they drop (`iptables-legacy-save`), and move to iptables-nft");
    }
    if complaints.is_empty() {
        return check(NAME, roles, Level::Ok, "none is in the way");
    }
    check(NAME, roles, level, complaints.join("; ")).fix(fixes.join("; "))
}

fn nameservers(found: &ServerFound) -> Check {
    const NAME: &str = "nameservers";
    let list: Vec<String> = found.nameservers.iter().map(ToString::to_string).collect();
    if !list.is_empty() {
        return check(
            NAME,
            SERVER,
            Level::Ok,
            format!("clients are told {}", list.join(", ")),
        );
    }
    if found.nameservers_configured {
        return check(NAME, SERVER, Level::Ok, "none for clients, as configured");
    }
    check(
        NAME,
        SERVER,
        Level::Degraded,
        "this host knows none that clients could reach, so they keep their own",
    )
    .fix("set `dns = [\"9.9.9.9\"]` in the configuration")
}

fn client(findings: &Findings, found: &ClientFound) -> Vec<Check> {
    vec![
        interface(&found.name, Role::Client),
        firewalls(findings, found.firewalls.as_deref(), CLIENT, Vec::new()),
        resolver(&found.resolver),
    ]
}

fn resolver(found: &Resolver) -> Check {
    const NAME: &str = "resolver";
    let (how, is_writable) = match found {
        Resolver::LeftAlone => return check(NAME, CLIENT, Level::Ok, "left alone, as configured"),
        Resolver::Unreadable(trouble) => return broken(NAME, CLIENT, trouble),
        Resolver::File { is_writable } => (
            "/etc/resolv.conf is rewritten in place".to_owned(),
            is_writable,
        ),
        Resolver::Link {
            target,
            is_writable,
        } => (
            format!(
                "/etc/resolv.conf, a link to {}, is replaced",
                target.display()
            ),
            is_writable,
        ),
        Resolver::Missing { is_writable } => ("/etc/resolv.conf is made".to_owned(), is_writable),
    };
    let how = format!("{how} while the tunnel is up");
    if *is_writable {
        return check(NAME, CLIENT, Level::Ok, how);
    }
    check(NAME, CLIENT, Level::Broken, format!("{how}, but it cannot be written"))
        .fix("run as root with a writable /etc, or set `dns = []` in the configuration to leave it alone")
}

#[cfg(test)]
mod tests;
