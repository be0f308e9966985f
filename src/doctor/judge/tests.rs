//! One table: a healthy host, one thing wrong with it, and what follows.

use std::net::SocketAddr;
use std::path::PathBuf;

use rstest::rstest;

use super::*;
use crate::doctor::findings::{Rights, SettingFound, StateFound, Uplinks};
use crate::keeper::undo::Claim;
use crate::proto::offload::Offloads;
use crate::uring::probe::RingError;

const MIB: usize = 1 << 20;

fn trouble() -> Trouble {
    Trouble {
        found: "something is wrong".into(),
        fix: "mend it".into(),
    }
}

fn name_found() -> NameFound {
    NameFound {
        interface: "ringtun0".into(),
        exists: false,
        claim: None,
    }
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], port))
}

fn healthy() -> Findings {
    Findings {
        kernel: "6.12.0".into(),
        rights: Rights {
            net_admin: true,
            network_is_ours: true,
            can_change_user: true,
            can_lock_memory: true,
        },
        rings: Ok(info(SetUp::Deferred, BUDGET_BYTES_DEFAULT, true)),
        survey: Some(Survey::default()),
        open_files_max: 65_536,
        tun: Ok(TunFound {
            offloads: Offloads::ALL,
            queues: 2,
        }),
        has_bbr: true,
        clock: Clock {
            unix_seconds: EARLIEST_UNIX_SECONDS,
            is_synchronised: Some(true),
        },
        run_directory: None,
        uplinks: Uplinks {
            v4: vec!["eth0".into()],
            v6: vec!["eth0".into()],
        },
        strict_reverse_path: Vec::new(),
        legacy_iptables: false,
        server: Some(ServerFound {
            name: name_found(),
            ports: vec![
                (address(443), PortFound::Free),
                (address(80), PortFound::Free),
            ],
            filter: Ok(()),
            settings: vec![setting(Some("1"), false)],
            firewalls: Some(Vec::new()),
            state: Ok(StateFound {
                path: PathBuf::from("/var/lib/ringtun"),
                peers: None,
            }),
            nameservers: vec![[192, 0, 2, 53].into()],
            nameservers_configured: false,
        }),
        client: Some(ClientFound {
            name: name_found(),
            firewalls: Some(Vec::new()),
            resolver: Resolver::File { is_writable: true },
        }),
    }
}

fn info(set_up: SetUp, buffer_bytes: usize, buffers_registered: bool) -> Rehearsal {
    Rehearsal {
        set_up,
        buffer_bytes,
        buffers_registered,
    }
}

fn setting(present: Option<&str>, is_writable: bool) -> SettingFound {
    SettingFound {
        key: "net/ipv4/conf/eth0/forwarding".into(),
        wanted: "1",
        present: present.map(str::to_owned),
        is_writable,
    }
}

fn server(findings: &mut Findings) -> &mut ServerFound {
    findings.server.as_mut().expect("a server")
}

fn client(findings: &mut Findings) -> &mut ClientFound {
    findings.client.as_mut().expect("a client")
}

fn blocker(family: Family, certain: bool, port: Option<u16>) -> Blocker {
    Blocker {
        chain: "ip filter FORWARD".into(),
        drops: "packets".into(),
        family,
        certain,
        port,
        fix: "open it".into(),
    }
}

fn claim(is_server: bool, is_running: bool) -> Option<Claim> {
    Some(Claim {
        keeper: 4711,
        is_server,
        is_running,
    })
}

#[test]
fn a_healthy_host_is_all_ok() {
    let report = judge(&healthy(), None);
    assert!(report.can_run());
    for check in &report.checks {
        assert_eq!((check.level, &check.fix), (Level::Ok, &None), "{check:?}");
    }
}

type Change = fn(&mut Findings);
const S: Role = Role::Server;
const C: Role = Role::Client;

/// What one thing that is not as it should be means: its check, its level, and who can run.
#[rstest]
#[case::no_rights(|f: &mut Findings| f.rights.net_admin = false, "capabilities", Level::Broken, &[])]
#[case::rights_elsewhere(|f: &mut Findings| f.rights.network_is_ours = false, "capabilities", Level::Broken, &[])]
#[case::root_stays(|f: &mut Findings| f.rights.can_change_user = false, "capabilities", Level::Degraded, &[S, C])]
#[case::ring_denied(|f: &mut Findings| f.rings = Err(RingTrouble::Denied { setting: None }), "io_uring", Level::Broken, &[])]
#[case::ring_disabled(|f: &mut Findings| f.rings = Err(RingTrouble::Denied { setting: Some("1".into()) }), "io_uring", Level::Broken, &[])]
#[case::operation_missing(|f: &mut Findings| f.rings = Err(RingTrouble::Other(trouble())), "io_uring", Level::Broken, &[])]
#[case::old_kernel(|f: &mut Findings| f.rings = Ok(info(SetUp::Plain, BUDGET_BYTES_DEFAULT, true)), "io_uring", Level::Degraded, &[S, C])]
#[case::little_memory(|f: &mut Findings| f.rings = Ok(info(SetUp::Deferred, 4 * MIB, true)), "packet-memory", Level::Degraded, &[S, C])]
#[case::no_locked_memory(|f: &mut Findings| f.rings = Ok(info(SetUp::Deferred, 2 * MIB, false)), "packet-memory", Level::Degraded, &[S, C])]
#[case::few_files(|f: &mut Findings| f.open_files_max = 256, "open-files", Level::Degraded, &[S, C])]
#[case::no_tun(|f: &mut Findings| f.tun = Err(TunTrouble::Other(trouble())), "tun", Level::Broken, &[])]
#[case::no_uso(|f: &mut Findings| f.tun = Ok(TunFound { offloads: Offloads { uso4: false, uso6: false, ..Offloads::ALL }, queues: 1 }), "tun-offloads", Level::Degraded, &[S, C])]
#[case::no_offload(|f: &mut Findings| f.tun = Ok(TunFound { offloads: Offloads::NONE, queues: 1 }), "tun-offloads", Level::Degraded, &[S, C])]
#[case::no_run_directory(|f: &mut Findings| f.run_directory = Some(trouble()), "run-directory", Level::Broken, &[])]
#[case::no_bbr(|f: &mut Findings| f.has_bbr = false, "congestion-control", Level::Degraded, &[S, C])]
#[case::clock_behind(|f: &mut Findings| f.clock.unix_seconds -= 1, "clock", Level::Degraded, &[S, C])]
#[case::clock_alone(|f: &mut Findings| f.clock.is_synchronised = Some(false), "clock", Level::Degraded, &[S, C])]
#[case::no_network(|f: &mut Findings| f.uplinks = Uplinks::default(), "uplink", Level::Degraded, &[S, C])]
#[case::strict_and_one_way(|f: &mut Findings| f.strict_reverse_path = vec!["eth0".into()], "rp_filter", Level::Ok, &[S, C])]
#[case::strict_and_two_ways(|f: &mut Findings| { f.strict_reverse_path = vec!["eth0".into()]; f.uplinks.v4.push("eth1".into()); }, "rp_filter", Level::Degraded, &[S, C])]
#[case::no_nft(|f: &mut Findings| server(f).filter = Err(FilterTrouble::Missing(trouble())), "nft", Level::Broken, &[C])]
#[case::no_nat_in_the_kernel(|f: &mut Findings| server(f).filter = Err(FilterTrouble::Refused("No such file".into())), "nft", Level::Broken, &[C])]
#[case::forwarding_off(|f: &mut Findings| server(f).settings = vec![setting(Some("0"), true)], "forwarding", Level::Ok, &[S, C])]
#[case::forwarding_stuck(|f: &mut Findings| server(f).settings = vec![setting(Some("0"), false)], "forwarding", Level::Broken, &[C])]
#[case::port_busy(|f: &mut Findings| server(f).ports[1].1 = PortFound::Busy { owner: Some(("nginx".into(), 7)), trouble: trouble() }, "port", Level::Broken, &[C])]
#[case::port_forbidden(|f: &mut Findings| server(f).ports[0].1 = PortFound::Failed(trouble()), "port", Level::Broken, &[C])]
#[case::port_ours(|f: &mut Findings| server(f).ports[0].1 = PortFound::Ours { keeper: 7 }, "port", Level::Ok, &[S, C])]
#[case::state_damaged(|f: &mut Findings| server(f).state = Err(trouble()), "state", Level::Broken, &[C])]
#[case::no_nameserver(|f: &mut Findings| server(f).nameservers.clear(), "nameservers", Level::Degraded, &[S, C])]
#[case::forward_dropped(|f: &mut Findings| server(f).firewalls = Some(vec![blocker(Family::V4, true, None)]), "other-firewalls", Level::Broken, &[C])]
#[case::forward_of_ipv6_dropped(|f: &mut Findings| server(f).firewalls = Some(vec![blocker(Family::V6, true, None)]), "other-firewalls", Level::Degraded, &[S, C])]
#[case::forward_may_be_dropped(|f: &mut Findings| server(f).firewalls = Some(vec![blocker(Family::V4, false, None)]), "other-firewalls", Level::Degraded, &[S, C])]
#[case::one_port_shut(|f: &mut Findings| server(f).firewalls = Some(vec![blocker(Family::V4, true, Some(80))]), "other-firewalls", Level::Degraded, &[S, C])]
#[case::all_ports_shut(|f: &mut Findings| server(f).firewalls = Some(vec![blocker(Family::V4, true, Some(80)), blocker(Family::V4, true, Some(443))]), "other-firewalls", Level::Broken, &[C])]
#[case::out_shut(|f: &mut Findings| client(f).firewalls = Some(vec![blocker(Family::V4, true, None)]), "other-firewalls", Level::Broken, &[S])]
#[case::legacy(|f: &mut Findings| f.legacy_iptables = true, "other-firewalls", Level::Degraded, &[S, C])]
#[case::not_looked_at(|f: &mut Findings| client(f).firewalls = None, "other-firewalls", Level::NotApplicable, &[S, C])]
#[case::resolver_fixed(|f: &mut Findings| client(f).resolver = Resolver::File { is_writable: false }, "resolver", Level::Broken, &[S])]
#[case::resolver_linked(|f: &mut Findings| client(f).resolver = Resolver::Link { target: "/run/x".into(), is_writable: true }, "resolver", Level::Ok, &[S, C])]
#[case::name_taken(|f: &mut Findings| server(f).name.exists = true, "interface", Level::Broken, &[C])]
#[case::running(|f: &mut Findings| { server(f).name.claim = claim(true, true); server(f).name.exists = true; }, "interface", Level::Ok, &[S, C])]
#[case::running_as_the_other(|f: &mut Findings| client(f).name.claim = claim(true, true), "interface", Level::Broken, &[S])]
#[case::killed(|f: &mut Findings| client(f).name.claim = claim(true, false), "interface", Level::Degraded, &[S, C])]
fn one_thing_is_wrong(
    #[case] change: Change,
    #[case] name: &str,
    #[case] level: Level,
    #[case] can_run: &[Role],
) {
    let mut findings = healthy();
    change(&mut findings);
    let report = judge(&findings, None);
    let worst = report
        .checks
        .iter()
        .filter(|check| check.name == name)
        .max_by_key(|check| check.level)
        .expect("the check");
    assert_eq!(worst.level, level, "{worst:?}");
    let has_fix = matches!(level, Level::Broken | Level::Degraded);
    assert_eq!(worst.fix.is_some(), has_fix, "{worst:?}");
    for role in Role::ALL {
        let alone = judge(&findings, Some(role));
        assert_eq!(alone.can_run(), can_run.contains(&role), "{role:?}");
        assert_eq!(report.cannot_run.contains(&role), !can_run.contains(&role));
    }
}

#[test]
fn the_other_role_is_not_applicable() {
    let report = judge(&healthy(), Some(Role::Client));
    let level = |name: &str| {
        let mut named = report.checks.iter().filter(|check| check.name == name);
        named.next().map(|check| check.level)
    };
    assert_eq!(level("nft"), Some(Level::NotApplicable));
    assert_eq!(level("resolver"), Some(Level::Ok));
}

#[test]
fn what_follows_from_missing_rights_is_not_told_as_more_troubles() {
    let mut findings = healthy();
    findings.rights.net_admin = false;
    findings.tun = Err(TunTrouble::NotPermitted);
    server(&mut findings).filter = Err(FilterTrouble::NotPermitted);
    server(&mut findings).settings = vec![setting(Some("0"), false)];
    let report = judge(&findings, Some(Role::Server));
    let broken = report
        .checks
        .iter()
        .filter(|check| check.level == Level::Broken);
    let broken: Vec<_> = broken.map(|check| check.name).collect();
    assert_eq!(broken, ["capabilities"]);
}

#[test]
fn errors_are_cut_where_the_advice_begins() {
    let told = Trouble::told_by(&RingError::Missing);
    assert_eq!(told.found, "this kernel has no io_uring");
    assert!(told.fix.starts_with("ringtun needs Linux 5.10"));
}

#[rstest]
#[case(0, "1970-01-01 00:00 UTC")]
#[case(951_827_696, "2000-02-29 12:34 UTC")]
#[case(EARLIEST_UNIX_SECONDS, "2026-11-01 00:00 UTC")]
#[case(4_107_542_399, "2100-02-28 23:59 UTC")]
#[case(4_107_542_400, "2100-03-01 00:00 UTC")]
fn time_is_written_as_a_date(#[case] seconds: u64, #[case] date: &str) {
    assert_eq!(utc(seconds), date);
}

#[test]
fn settings_are_written_as_sysctl_takes_them() {
    assert_eq!(
        dotted("net/ipv4/conf/eth0/rp_filter"),
        "net.ipv4.conf.eth0.rp_filter"
    );
    assert_eq!(
        dotted("net/ipv4/conf/eth0.5/rp_filter"),
        "net/ipv4/conf/eth0.5/rp_filter"
    );
}
