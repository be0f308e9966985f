//! What cannot work says so in one line, with the right exit code, and leaves the host as it was.

mod common;

use std::net::TcpListener;

use common::denial::deny_io_uring;
use common::host_state::HostState;
use common::processes::in_host;
use common::{
    RINGTUN, SOON, assert_web_reached, inner_addresses, invite, invite_to, lab, start_client,
    start_server,
};
use ringtun_lab::topology::SERVER_V6;
use ringtun_lab::{Host, Lab, Process};
use rstest::rstest;

/// An invite as good as any for what fails before the server is asked.
const SOME_INVITE: &str =
    "ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@198.51.100.10?sni=www.example.org";

/// The exit code for failures at run time.
const FAILED: i32 = 1;
/// The exit code for bad usage and configuration.
const USAGE: i32 = 2;

/// Runs ringtun to its end on a host, which has to be the same afterwards. All that it may say is one line, which
/// names what is wrong.
fn assert_refused(host: &Host, arguments: &[&str], code: i32, named: &[&str]) {
    let before = HostState::of(host);
    let process = host.spawn(RINGTUN, arguments).expect("ringtun");
    assert_one_line(process, code, named);
    before.assert_same(&HostState::of(host), "after a failed start");
    assert_eq!(in_host(host), [""; 0], "no process is left");
}

fn assert_one_line(process: Process, code: i32, named: &[&str]) {
    let output = process.output(SOON).expect("an end");
    let complaint = output.errors();
    assert_eq!(output.status.code(), Some(code), "{complaint}");
    assert_eq!(output.text(), "", "nothing on standard output");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    for name in named {
        assert!(complaint.contains(name), "{name:?} is not in: {complaint}");
    }
}

/// Waits for the end of a client that was up. Its last line, and no other, is its complaint.
fn assert_gave_up(client: &Process, named: &[&str]) {
    common::assert_ended(client, FAILED);
    // What it wrote last may be read after its end is noticed.
    common::until_true("complaint", || {
        client
            .lines()
            .iter()
            .any(|line| line.starts_with("ringtun: "))
    });
    let lines = client.lines();
    let complaints: Vec<&String> = lines
        .iter()
        .filter(|line| line.starts_with("ringtun: "))
        .collect();
    assert_eq!(complaints.len(), 1, "{lines:?}");
    assert_eq!(lines.last(), Some(complaints[0]), "{lines:?}");
    for name in named {
        assert!(
            complaints[0].contains(name),
            "{name:?} is not in: {complaints:?}"
        );
    }
}

/// Both sides need the same of the kernel.
const BOTH_SIDES: [(&str, &[&str]); 2] = [
    ("server", &["server"]),
    ("client", &["client", SOME_INVITE]),
];

#[rstest]
#[case::by_docker(libc::EPERM)]
#[case::by_an_old_sandbox(libc::ENOSYS)]
fn io_uring_is_denied(lab: Lab, #[case] errno: i32) {
    for (host, arguments) in BOTH_SIDES {
        let host = lab.host(host);
        let before = HostState::of(host);
        // The filter stays with the thread that it is put on, and with what that thread starts.
        let process = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                deny_io_uring(errno);
                host.spawn(RINGTUN, arguments).expect("ringtun")
            });
            thread.join().expect("no panic")
        });
        assert_one_line(process, FAILED, &["io_uring"]);
        before.assert_same(&HostState::of(host), "after a failed start");
        assert_eq!(in_host(host), [""; 0], "no process is left");
    }
}

#[rstest]
#[case::missing("mount -t tmpfs none /dev/net")]
#[case::forbidden("mount -t tmpfs -o nodev none /dev/net && mknod /dev/net/tun c 10 200")]
fn the_tun_device_is_unusable(lab: Lab, #[case] script: &str) {
    for (host, arguments) in BOTH_SIDES {
        let host = lab.host(host);
        host.exec("sh", ["-c", script]).expect("another /dev/net");
        assert_refused(host, arguments, FAILED, &["/dev/net/tun"]);
    }
}

#[rstest]
fn nft_is_missing(lab: Lab) {
    let host = lab.host("server");
    let before = HostState::of(host);
    let script = "mount --bind /usr/sbin /run/sbin && mount -t tmpfs none /usr/sbin";
    host.exec("sh", ["-c", &format!("mkdir /run/sbin && {script}")])
        .expect("a host without nft");
    let process = host.spawn(RINGTUN, ["server"]).expect("ringtun");
    assert_one_line(process, FAILED, &["nft", "install"]);
    host.exec("umount", ["/usr/sbin"]).expect("nft again");
    before.assert_same(&HostState::of(host), "after a failed start");
}

#[rstest]
#[case::https("443")]
#[case::http("80")]
fn the_port_is_busy(lab: Lab, #[case] port: &str) {
    let address = format!("[::]:{port}");
    let _busy = lab
        .host("server")
        .enter(|| TcpListener::bind(&address))
        .expect("the host")
        .expect("a free port");
    assert_refused(lab.host("server"), &["server"], FAILED, &[port, "use"]);
}

#[rstest]
#[case::nobody_listens(
    "ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@203.0.113.81:80",
    "203.0.113.81"
)]
#[case::nobody_is_there(
    "ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@203.0.113.99",
    "203.0.113.99"
)]
#[case::it_has_no_address(
    "ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@no.such.host.invalid",
    "no.such.host.invalid"
)]
fn the_server_is_unreachable(lab: Lab, #[case] invite: &str, #[case] named: &str) {
    assert_refused(lab.host("client"), &["client", invite], FAILED, &[named]);
}

#[rstest]
fn there_is_no_network(lab: Lab) {
    let client = lab.host("client");
    client
        .exec("ip", ["link", "set", "eth0", "down"])
        .expect("ip");
    assert_refused(client, &["client", SOME_INVITE], FAILED, &["198.51.100.10"]);
}

#[rstest]
#[case::nothing("")]
#[case::no_scheme("BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@198.51.100.10")]
#[case::other_scheme("https://198.51.100.10/")]
#[case::no_token("ringtun://198.51.100.10")]
#[case::short_token("ringtun://BwcHBw@198.51.100.10")]
#[case::no_host("ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@")]
#[case::bad_port("ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@198.51.100.10:65536")]
#[case::bad_pin("ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@198.51.100.10?pin=abc")]
#[case::unknown_parameter(
    "ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@198.51.100.10?pim=abc"
)]
fn the_invite_is_malformed(lab: Lab, #[case] invite: &str) {
    assert_refused(lab.host("client"), &["client", invite], USAGE, &["invite"]);
}

#[rstest]
fn there_is_no_invite(lab: Lab) {
    assert_refused(lab.host("client"), &["client"], USAGE, &["invite"]);
}

#[rstest]
#[case::server("server", "server")]
#[case::client("client", "client")]
fn the_congestion_control_is_none_of_the_kernels(lab: Lab, #[case] host: &str, #[case] role: &str) {
    let host = lab.host(host);
    let file = "/run/wrong.toml";
    host.write_file(file, "congestion_control = \"nosuch\"\n")
        .expect("written");
    let invite = "ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@198.51.100.10";
    let mut arguments = vec![role, "-c", file];
    arguments.extend((role == "client").then_some(invite));
    assert_refused(host, &arguments, USAGE, &["nosuch", "congestion_control"]);
}

#[rstest]
fn the_pin_is_wrong(lab: Lab) {
    let server = start_server(&lab, &[]);
    let invite = invite(&lab, "alice");
    let (head, tail) = invite.split_once("pin=").expect("a pin");
    let changed = if tail.starts_with('A') { "B" } else { "A" };
    let invite = format!("{head}pin={changed}{}", &tail[1..]);
    assert_refused(lab.host("client"), &["client", &invite], FAILED, &["pin"]);
    common::assert_no_panic(&server);
}

#[rstest]
fn the_token_is_unknown_or_revoked(lab: Lab) {
    let _server = start_server(&lab, &[]);
    let invite = invite(&lab, "alice");
    let (_, server) = invite.split_once('@').expect("a host");
    let unknown = format!("ringtun://BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc@{server}");
    assert_refused(
        lab.host("client"),
        &["client", &unknown],
        FAILED,
        &["invite"],
    );

    let client = start_client(lab.host("client"), &invite);
    lab.host("server")
        .exec(RINGTUN, ["peers", "revoke", "alice"])
        .expect("revoke");
    assert_gave_up(&client, &["revoked", "invite"]);
    assert_refused(
        lab.host("client"),
        &["client", &invite],
        FAILED,
        &["invite"],
    );
}

#[rstest]
fn the_invite_is_in_use_elsewhere(lab: Lab) {
    let (one, two) = (lab.host("client"), lab.host("client2"));
    let before = HostState::of(one);
    let _server = start_server(&lab, &[]);
    let invite = invite(&lab, "alice");
    let first = start_client(one, &invite);
    let addresses = inner_addresses(one);
    let second = start_client(two, &invite);
    assert_gave_up(&first, &["invite", "another"]);
    before.assert_same(
        &HostState::of(one),
        "after the end of the superseded client",
    );
    assert_eq!(inner_addresses(two), addresses, "they go with the invite");
    assert_web_reached(two);
    assert_eq!(second.status(), None, "the newer one stays");
}

#[rstest]
#[case::unknown_key("server", "moon = 1", "moon")]
#[case::unknown_key_of_client("client", "moon = 1", "moon")]
#[case::no_toml("server", "mtu", "server.toml")]
#[case::wrong_type("server", "mtu = \"large\"", "server.toml:1")]
#[case::mtu_too_small("client", "mtu = 576", "mtu")]
#[case::pool_too_small("server", "pool_v4 = \"10.0.0.0/31\"", "pool_v4")]
#[case::interface_name_too_long("server", "interface = \"a-name-that-is-too-long\"", "interface")]
#[case::invite_of_another_kind("client", "invite = \"https://198.51.100.10\"", "invite")]
fn the_configuration_is_bad(lab: Lab, #[case] side: &str, #[case] toml: &str, #[case] named: &str) {
    let host = lab.host(side);
    let path = format!("/etc/ringtun/{side}.toml");
    host.write_file(&path, toml).expect("a configuration");
    let mut arguments = vec![side];
    if side == "client" && !toml.starts_with("invite") {
        arguments.push(SOME_INVITE);
    }
    assert_refused(host, &arguments, USAGE, &[named]);
}

#[rstest]
fn the_configuration_is_missing(lab: Lab) {
    let arguments = ["server", "-c", "/etc/ringtun/nowhere.toml"];
    assert_refused(
        lab.host("server"),
        &arguments,
        USAGE,
        &["/etc/ringtun/nowhere.toml"],
    );
}

#[rstest]
#[case::flag(&["server", "--fast"], "--fast")]
#[case::command(&["sing"], "sing")]
#[case::address(&["server", "--listen", "443"], "443")]
#[case::missing_option(&["invite", "alice"], "--host")]
#[case::nothing(&[], "command")]
fn the_usage_is_bad(lab: Lab, #[case] arguments: &[&str], #[case] named: &str) {
    assert_refused(lab.host("server"), arguments, USAGE, &[named]);
}

#[rstest]
fn root_is_needed(lab: Lab) {
    // Where the build is, nobody else may look.
    let copy = "install -m 755 \"$0\" /run/ringtun-program";
    for (host, arguments) in BOTH_SIDES {
        let host = lab.host(host);
        host.exec("sh", ["-c", copy, RINGTUN]).expect("a copy");
        let before = HostState::of(host);
        let setpriv = [
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "/run/ringtun-program",
        ];
        let command = host.command("setpriv").args(setpriv).args(arguments);
        assert_one_line(command.spawn().expect("setpriv"), FAILED, &["root"]);
        before.assert_same(&HostState::of(host), "after a failed start");
    }
}

#[rstest]
fn a_name_has_one_invite(lab: Lab) {
    let first = invite(&lab, "alice");
    assert_refused(
        lab.host("server"),
        &["invite", "alice", "--host", "198.51.100.10"],
        FAILED,
        &["alice"],
    );
    let _server = start_server(&lab, &[]);
    let client = start_client(lab.host("client"), &first);
    drop(client);
    lab.host("server")
        .exec(RINGTUN, ["peers", "revoke", "alice"])
        .expect("revoke");
    let second = invite_to(&lab, "alice", &SERVER_V6.to_string());
    let _client = start_client(lab.host("client"), &second);
}
