//! `ringtun doctor` is right about what a host lacks, and leaves the host as it was.

mod common;

use std::net::TcpListener;

use common::denial::deny_io_uring;
use common::host_state::HostState;
use common::processes::{in_host, kill_9_both};
use common::{
    RINGTUN, SOON, assert_web_blocked, assert_web_reached, invite, lab, start_client, start_server,
    stop, until, until_true,
};
use ringtun_lab::{Host, Lab};
use rstest::rstest;
use serde_json::Value;

/// The exit code when a role cannot run.
const CANNOT: i32 = 1;
/// The exit code for bad usage.
const USAGE: i32 = 2;

/// What `ringtun doctor --json` said.
struct Said {
    code: i32,
    report: Value,
}

impl Said {
    fn of(output: &ringtun_lab::Output) -> Said {
        assert_eq!(output.errors(), "", "nothing on standard error");
        Said {
            code: output.status.code().expect("an end of its own"),
            report: serde_json::from_str(&output.text()).expect("one JSON document"),
        }
    }

    fn checks(&self) -> &Vec<Value> {
        self.report["checks"].as_array().expect("checks")
    }

    /// The only check of a name, or the first that is not ok.
    fn check(&self, name: &str) -> &Value {
        let named = || self.checks().iter().filter(|check| check["name"] == name);
        let bad = named().find(|check| check["level"] != "ok");
        bad.or_else(|| named().next())
            .unwrap_or_else(|| panic!("no check {name}: {:#}", self.report))
    }

    /// Names of the checks that say `broken`.
    fn broken(&self) -> Vec<&str> {
        let broken = self
            .checks()
            .iter()
            .filter(|check| check["level"] == "broken");
        broken
            .map(|check| check["name"].as_str().expect("a name"))
            .collect()
    }

    /// This alone is broken, and the fix is told.
    #[track_caller]
    fn assert_broken(&self, name: &str, found: &str, fix: &str) {
        assert_eq!(self.code, CANNOT, "{:#}", self.report);
        assert_eq!(self.broken(), [name], "{:#}", self.report);
        let check = self.check(name);
        for (key, wanted) in [("found", found), ("fix", fix)] {
            let text = check[key].as_str().unwrap_or_default();
            assert!(text.contains(wanted), "{wanted:?} is not in {check:#}");
        }
    }

    #[track_caller]
    fn assert_can_run(&self) {
        assert_eq!(self.code, 0, "{:#}", self.report);
        assert_eq!(self.broken(), [""; 0], "{:#}", self.report);
        assert_eq!(self.report["cannot_run"], serde_json::json!([]));
    }
}

/// Asks for a role, and checks that the host is as before.
#[track_caller]
fn doctor(host: &Host, role: &str) -> Said {
    let before = HostState::of(host);
    let output = host.run(RINGTUN, ["doctor", "--json", "--role", role]);
    let said = Said::of(&output.expect("ringtun"));
    before.assert_same(&HostState::of(host), "after a look");
    assert_eq!(said.report["role"], role);
    said
}

fn shell(host: &Host, script: &str) -> String {
    host.exec("sh", ["-ec", script]).expect("sh")
}

#[rstest]
fn a_clean_host_can_run_both(lab: Lab) {
    for name in ["server", "client"] {
        let host = lab.host(name);
        for role in ["server", "client"] {
            let said = doctor(host, role);
            said.assert_can_run();
            assert_eq!(said.check("io_uring")["level"], "ok");
            assert_eq!(said.check("tun")["level"], "ok");
        }
        let before = HostState::of(host);
        let output = host.run(RINGTUN, ["doctor"]).expect("ringtun");
        before.assert_same(&HostState::of(host), "after a look");
        assert_eq!(output.status.code(), Some(0), "{}", output.text());
        let text = output.text();
        let verdict = text.lines().last();
        assert_eq!(
            verdict,
            Some("this host can run ringtun as server and client")
        );
        assert!(!text.contains('\x1b'), "no colour into a pipe");
        assert_eq!(in_host(host), [""; 0], "no process is left");
        shell(host, "! test -e /var/lib/ringtun && ! test -e /run/ringtun");
    }
}

#[rstest]
fn io_uring_is_disabled(lab: Lab) {
    let host = lab.host("server");
    let asked_where_it_is_denied = || {
        let process = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                deny_io_uring(libc::EPERM);
                host.spawn(RINGTUN, ["doctor", "--json"]).expect("ringtun")
            });
            thread.join().expect("no panic")
        });
        Said::of(&process.output(SOON).expect("an end"))
    };
    let said = asked_where_it_is_denied();
    said.assert_broken("io_uring", "denied", "seccomp");
    assert_eq!(
        said.report["cannot_run"],
        serde_json::json!(["server", "client"])
    );

    // The setting belongs to the whole machine, so only what is read of it changes here.
    shell(
        host,
        "echo 2 > /run/disabled && mount --bind /run/disabled /proc/sys/kernel/io_uring_disabled",
    );
    let said = asked_where_it_is_denied();
    said.assert_broken(
        "io_uring",
        "kernel.io_uring_disabled is 2",
        "sysctl -w kernel.io_uring_disabled=0",
    );
    // What works is not broken, whatever a file says.
    doctor(host, "server").assert_can_run();
}

#[rstest]
#[case::missing("mount -t tmpfs none /dev/net", "missing", "modprobe tun")]
#[case::forbidden(
    "mount -t tmpfs -o nodev none /dev/net && mknod /dev/net/tun c 10 200",
    "not allowed",
    "--device /dev/net/tun"
)]
fn there_is_no_tun_device(lab: Lab, #[case] script: &str, #[case] found: &str, #[case] fix: &str) {
    let host = lab.host("server");
    shell(host, script);
    for role in ["server", "client"] {
        doctor(host, role).assert_broken("tun", found, fix);
    }
}

#[rstest]
fn there_is_no_nft(lab: Lab) {
    let host = lab.host("server");
    shell(
        host,
        "mkdir /run/sbin && mount --bind /usr/sbin /run/sbin && mount -t tmpfs none /usr/sbin",
    );
    let ask = |role| {
        let output = host.run(RINGTUN, ["doctor", "--json", "--role", role]);
        Said::of(&output.expect("ringtun"))
    };
    ask("server").assert_broken("nft", "not installed", "apt install nftables");
    // A client has no rules.
    ask("client").assert_can_run();
}

#[rstest]
#[case::https(443)]
#[case::http(80)]
fn the_port_is_busy(lab: Lab, #[case] port: u16) {
    let host = lab.host("server");
    let busy = host
        .enter(|| TcpListener::bind(("::", port)))
        .expect("the host")
        .expect("a free port");
    let said = doctor(host, "server");
    said.assert_broken("port", &format!("port {port} is in use"), "--listen");
    doctor(host, "client").assert_can_run();

    let elsewhere = [
        "doctor",
        "--json",
        "--role",
        "server",
        "--listen",
        "[::]:8443",
    ];
    let output = host.run(RINGTUN, elsewhere).expect("ringtun");
    Said::of(&output).assert_can_run();
    drop(busy);
    doctor(host, "server").assert_can_run();
}

#[rstest]
fn a_running_server_is_told_and_left_alone(lab: Lab) {
    let host = lab.host("server");
    let server = start_server(&lab, &[]);
    let said = doctor(host, "server");
    said.assert_can_run();
    for (name, words) in [
        ("interface", "ringtun server runs already"),
        ("port", "is held by the running ringtun"),
    ] {
        let found = said.check(name)["found"].as_str().expect("text");
        assert!(found.contains(words), "{found}");
    }
    // Its interface is taken for anything else.
    doctor(host, "client").assert_broken("interface", "used by ringtun server", "ringtun down");
    stop(&server);
    doctor(host, "client").assert_can_run();
}

#[rstest]
fn what_a_killed_server_has_left_is_told(lab: Lab) {
    let host = lab.host("server");
    let server = start_server(&lab, &[]);
    kill_9_both(&server);
    // The kernel takes a moment to give back what a ring held.
    until_true("end of the interface and the listeners", || {
        let link = host.run("ip", ["link", "show", "ringtun0"]).expect("ip");
        !link.status.success() && host.exec("ss", ["-Hltn"]).expect("ss").is_empty()
    });
    let said = doctor(host, "server");
    said.assert_can_run();
    let check = said.check("interface");
    assert_eq!(check["level"], "degraded", "{check:#}");
    let fix = check["fix"].as_str().expect("a fix");
    assert!(fix.starts_with("ringtun down"), "{fix}");
    host.exec(RINGTUN, ["down"]).expect("ringtun down");
    assert_eq!(doctor(host, "server").check("interface")["level"], "ok");
}

#[rstest]
fn another_table_drops_what_is_forwarded(lab: Lab) {
    let host = lab.host("server");
    shell(
        host,
        "nft 'table inet mine { chain forward { type filter hook forward priority 0; policy drop; }; }'",
    );
    let said = doctor(host, "server");
    said.assert_broken(
        "other-firewalls",
        "inet mine forward",
        "nft insert rule inet mine forward iifname ringtun0 accept",
    );
    doctor(host, "client").assert_can_run();

    // The server says the same when it starts.
    let check = said.check("other-firewalls");
    let fix = check["fix"].as_str().expect("a fix").to_owned();
    let server = start_server(&lab, &[]);
    let warned = until("warning", || {
        server
            .lines()
            .into_iter()
            .find(|line| line.contains("WARN"))
    });
    let found = check["found"].as_str().expect("text");
    assert!(warned.contains(found) && warned.contains(&fix), "{warned}");

    // And both are right: no client gets through before the fix, and every one after it.
    let client = lab.host("client");
    let _client = start_client(client, &invite(&lab, "alice"));
    assert_web_blocked(client);
    shell(host, &fix);
    assert_web_reached(client);
    let said = doctor(host, "server");
    said.assert_can_run();
    assert_eq!(said.check("other-firewalls")["level"], "ok");
    stop(&server);
}

#[rstest]
#[case::output("output", "client")]
#[case::input("input", "server")]
fn another_table_drops_the_connection(lab: Lab, #[case] hook: &str, #[case] role: &str) {
    let host = lab.host("server");
    let chain =
        format!("type filter hook {hook} priority 0; policy drop; ct state established accept;");
    shell(
        host,
        &format!("nft 'table inet mine {{ chain guard {{ {chain} }}; }}'"),
    );
    let said = doctor(host, role);
    said.assert_broken("other-firewalls", "inet mine guard", "dport 443 accept");
    shell(
        host,
        said.check("other-firewalls")["fix"]
            .as_str()
            .expect("a fix"),
    );
    let said = doctor(host, role);
    assert_eq!(
        said.check("other-firewalls")["level"],
        "ok",
        "{:#}",
        said.report
    );
}

#[rstest]
fn forwarding_is_off(lab: Lab) {
    let host = lab.host("server");
    let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys";

    let said = doctor(host, "server");
    said.assert_can_run();
    let found = said.check("forwarding")["found"].as_str().expect("text");
    assert!(found.starts_with("off; the server sets it"), "{found}");

    // As in a container without privileges.
    shell(host, read_only);
    doctor(host, "server").assert_broken(
        "forwarding",
        "net.ipv4.conf.eth0.forwarding",
        "net.ipv4.conf.eth0.forwarding=1",
    );
    doctor(host, "client").assert_can_run();

    // Somebody has seen to it: the fix that was told for a container.
    shell(
        host,
        "umount /proc/sys && sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
    );
    shell(host, read_only);
    let said = doctor(host, "server");
    said.assert_can_run();
    assert_eq!(said.check("forwarding")["found"], "on");
}

#[rstest]
#[case::root_of_a_container(&["--bounding-set=-net_admin", "--inh-caps=-net_admin"])]
#[case::an_ordinary_user(&["--reuid=65534", "--regid=65534", "--clear-groups"])]
fn there_is_no_cap_net_admin(lab: Lab, #[case] without: &[&str]) {
    let host = lab.host("server");
    // Where the build is, nobody else may look.
    let copy = "install -m 755 \"$0\" /run/ringtun-program";
    host.exec("sh", ["-c", copy, RINGTUN]).expect("a copy");
    // As udev makes it. Some machines keep theirs for root, which would be a finding of its own.
    shell(
        host,
        "[ \"$(stat -c %a /dev/net/tun)\" = 666 ] || \
         { mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200; }",
    );
    let before = HostState::of(host);
    for role in ["server", "client"] {
        let command = host.command("setpriv").args(without).args([
            "/run/ringtun-program",
            "doctor",
            "--json",
            "--role",
            role,
        ]);
        let said = Said::of(&command.run().expect("setpriv"));
        assert_eq!(said.code, CANNOT);
        let check = said.check("capabilities");
        assert_eq!(check["level"], "broken", "{:#}", said.report);
        let fix = check["fix"].as_str().expect("a fix");
        assert!(fix.contains("run as root") && fix.contains("--cap-add NET_ADMIN"));
        // What follows from it is not told as something else.
        for name in ["tun", "forwarding", "other-firewalls", "nft"] {
            assert_ne!(said.check(name)["level"], "broken", "{:#}", said.report);
        }
    }
    before.assert_same(&HostState::of(host), "after a look");
}

#[rstest]
fn a_rootless_user_namespace_without_a_network_of_its_own_is_not_enough(lab: Lab) {
    let host = lab.host("server");
    let command =
        host.command("unshare")
            .args(["--user", "--map-root-user", RINGTUN, "doctor", "--json"]);
    let said = Said::of(&command.run().expect("unshare"));
    assert_eq!(said.code, CANNOT, "{:#}", said.report);
    let found = said.check("capabilities")["found"].as_str().expect("text");
    assert!(found.contains("not for this network namespace"), "{found}");
}

#[rstest]
#[case::whose_configuration(&["doctor", "-c", "/etc/ringtun/server.toml"], "--role")]
#[case::no_file(&["doctor", "--role", "server", "-c", "/nowhere.toml"], "/nowhere.toml")]
#[case::no_server(&["doctor", "--role", "client", "--listen", "[::]:443"], "--listen")]
fn the_usage_is_bad(lab: Lab, #[case] arguments: &[&str], #[case] named: &str) {
    let output = lab.host("server").run(RINGTUN, arguments).expect("ringtun");
    assert_eq!(output.status.code(), Some(USAGE));
    let complaint = output.errors();
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(complaint.contains(named), "{complaint}");
}
