//! `ringtun status` tells what is going on, of whatever runs, and says so where it cannot.

mod common;

use std::time::Instant;

use common::processes::{daemon_of, kill_9, kill_9_both, number_in_host};
use common::status::{connections, list, number, status, status_text, turned_away};
use common::transfer::{Direction, Transfer};
use common::{
    RINGTUN, SOON, Tunnel, assert_ended, inner_addresses, invite, lab, start_client, start_server,
    stop, until, until_true,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringtun_lab::topology::{SERVER_V4, WEB_V4};
use ringtun_lab::{Host, Lab};
use rstest::rstest;
use serde_json::{Value, json};

/// Enough to tell it from everything else on the tunnel.
const MUCH_BYTES: u64 = 8 << 20;

/// What both sides must be telling, whatever they do.
fn assert_sound(status: &Value, role: &str, keeper: i32, daemon: i32) {
    assert_eq!(status["format"], 1);
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["role"], role);
    assert_eq!(status["interface"], "ringtun0");
    assert_eq!(status["mtu_bytes"], 1500);
    assert_eq!(status["io_mode"], common::io_mode());
    assert!(status["up_seconds"].as_f64().expect("a time") > 0.0);
    assert!(list(status, "tun_offloads").contains(&json!("csum")));
    assert_ne!(number(status, "/network_namespace/inode"), 0);
    assert_eq!(status["keeper_pid"], number_in_host(keeper));
    assert_eq!(status["daemon_pid"], number_in_host(daemon));
    assert!(!list(status, "workers").is_empty());
    for worker in list(status, "workers") {
        assert_ne!(number(worker, "/io/buffer_bytes"), 0);
        assert!(worker["io"]["buffers_registered"].is_boolean());
        assert!(worker["io"]["tun_nowait"].is_boolean());
        assert!(number(worker, "/io/buffer_bytes") <= number(worker, "/io/buffer_bytes_wanted"));
        let ring = worker["io"]["ring"].as_str().expect("a word");
        assert!(["deferred", "cooperative", "plain"].contains(&ring));
        assert_ne!(number(worker, "/counters/turns"), 0);
    }
    for connection in connections(status) {
        assert_eq!(connection["alpn"], "http/1.1");
        assert_eq!(connection["key_exchange"], "X25519MLKEM768");
        let suite = connection["cipher_suite"].as_str().expect("a name");
        assert!(suite.starts_with("TLS13_"), "{suite}");
        assert!(list(connection, "peer_offloads").contains(&json!("tso4")));
        let worker = number(connection, "/worker") as usize;
        assert!(worker < list(status, "workers").len());
        let (age, silence) = (
            &connection["age_seconds"],
            &connection["received_age_seconds"],
        );
        assert!(silence.as_f64() <= age.as_f64(), "{silence} {age}");
        let control = connection["tcp"]["congestion_control"].as_str();
        // A short path; but a busy machine may make a long one of it.
        assert!(matches!(control, Some("cubic" | "bbr")), "{control:?}");
    }
}

#[rstest]
fn both_sides_count_the_same_traffic(
    lab: Lab,
    #[values(Direction::Up, Direction::Down)] direction: Direction,
) {
    let (client, server) = (lab.host("client"), lab.host("server"));
    // A busy machine may make a long path of a short one, and that has more.
    let one = client.write_file("/etc/ringtun/client.toml", "connections = 1\n");
    one.expect("a configuration");
    let tunnel = Tunnel::start(&lab);
    let transfer = Transfer::start(client, lab.host("web"), WEB_V4.into(), direction);
    transfer.wait_for_more(MUCH_BYTES);
    let during = [status(client), status(server)];
    transfer.wait_for_more(MUCH_BYTES);
    let bytes = transfer.finish();

    // What the sender has counted arrives a moment later, or is turned away: a client's kernel also speaks from link-local
    // addresses, which are not its own in the tunnel.
    let (ours, theirs) = until("agreement of both sides", || {
        let (ours, theirs) = (status(client), status(server));
        let agree = {
            let (here, there) = (connections(&ours)[0], connections(&theirs)[0]);
            // What was gathered is received as one.
            let sent = |one: &Value| {
                number(one, "/counters/sent_packets") - number(one, "/counters/gathered_packets")
            };
            let taken = |one: &Value| number(one, "/counters/received_packets") + turned_away(one);
            sent(here) == taken(there) && sent(there) == taken(here)
        };
        agree.then_some((ours, theirs))
    });
    for (status, role, process) in [
        (&ours, "client", &tunnel.client),
        (&theirs, "server", &tunnel.server),
    ] {
        assert_sound(status, role, process.pid(), daemon_of(process));
        assert_eq!(list(status, "sessions").len(), 1);
        assert_eq!(connections(status).len(), 1);
    }

    let (sender, receiver) = match direction {
        Direction::Up => (&ours, &theirs),
        Direction::Down => (&theirs, &ours),
    };
    let (sent, received) = (connections(sender)[0], connections(receiver)[0]);
    let sent_bytes = number(sent, "/counters/sent_bytes");
    let received_bytes = number(received, "/counters/received_bytes");
    assert!(sent_bytes >= bytes, "{sent_bytes} of {bytes}");
    assert!(sent_bytes < bytes + bytes / 4, "{sent_bytes} of {bytes}");
    assert!(received_bytes <= sent_bytes && received_bytes >= bytes);
    assert!(number(sent, "/counters/sent_packets") <= bytes / 500);
    assert!(number(sent, "/counters/sent_stream_bytes") > sent_bytes);
    let read = list(sender, "workers").iter();
    let read: u64 = read
        .map(|worker| number(worker, "/counters/tun_read_bytes"))
        .sum();
    assert!(read >= bytes);
    for (before, after) in during.iter().zip([&ours, &theirs]) {
        for counter in ["sent_packets", "received_packets", "received_stream_bytes"] {
            let pointer = format!("/counters/{counter}");
            let [before, after] = [before, after].map(|one| number(connections(one)[0], &pointer));
            assert!(before < after, "{counter} grows: {before} {after}");
        }
    }

    // Who is who.
    let addresses = json!(inner_addresses(client));
    for status in [&ours, &theirs] {
        assert_eq!(status["sessions"][0]["addresses"], addresses);
    }
    assert_eq!(theirs["sessions"][0]["peer"], "client");
    assert_eq!(
        ours["sessions"][0]["instance"],
        theirs["sessions"][0]["instance"]
    );
    assert_eq!(
        connections(&ours)[0]["peer_address"],
        format!("{SERVER_V4}:443")
    );
    assert_eq!(ours["client"]["state"], "up");
    assert_eq!(ours["client"]["server"], format!("{SERVER_V4}:443"));
    assert_eq!(list(&ours["client"], "routes").len(), 2);
    assert_eq!(theirs["server"]["peers"], 1);

    // For people the same; for nobody a secret.
    for (host, role, process) in [
        (client, "client", &tunnel.client),
        (server, "server", &tunnel.server),
    ] {
        let shown = status_text(host);
        assert!(
            shown.starts_with(&format!("ringtun0: {role}, up ")),
            "{shown}"
        );
        let keeper = format!("keeper {}, ", number_in_host(process.pid()));
        assert!(shown.contains(&keeper), "{shown}");
        assert!(shown.contains(" MiB in "), "{shown}");
        let everything = format!("{shown}{}", status(host));
        let (token, rest) = tunnel.invite["ringtun://".len()..]
            .split_once('@')
            .expect("an invite");
        let pin = rest
            .split("pin=")
            .nth(1)
            .and_then(|pin| pin.split('&').next());
        for secret in [token, pin.expect("a pin")] {
            assert!(!everything.contains(secret), "{everything}");
        }
    }
}

#[rstest]
fn drops_have_a_reason_and_an_owner(lab: Lab) {
    let _tunnel = Tunnel::start(&lab);
    let second = start_client(lab.host("client2"), &invite(&lab, "second"));
    let forger = lab.host("client");
    forger
        .exec("ip", ["address", "add", "10.99.0.1/32", "dev", "lo"])
        .expect("an address");
    let before = spoofed(lab.host("server"), "client");
    let web = WEB_V4.to_string();
    let ping = ["-c", "5", "-i", "0.2", "-W", "1", "-I", "10.99.0.1", &web];
    let output = forger.run("ping", ping).expect("ping");
    assert!(!output.status.success(), "nobody answers a forger");
    until_true("drops", || {
        spoofed(lab.host("server"), "client") >= before + 5
    });
    let shown = status_text(lab.host("server"));
    let line = |peer: &str| {
        let found = shown
            .lines()
            .find(|line| line.trim_start().starts_with(peer));
        found.unwrap_or_else(|| panic!("no {peer}:\n{shown}"))
    };
    assert!(line("client ").contains("spoofed"), "{shown}");
    drop(second);
}

fn spoofed(server: &Host, peer: &str) -> u64 {
    let status = status(server);
    let mut sessions = list(&status, "sessions").iter();
    let session = sessions.find(|session| session["peer"] == peer);
    number(
        session.expect("a session"),
        "/connections/0/counters/dropped_spoofed",
    )
}

#[rstest]
fn sessions_come_and_go(lab: Lab) {
    let mut tunnel = Tunnel::start(&lab);
    let server = lab.host("server");
    let second = start_client(lab.host("client2"), &invite(&lab, "second"));
    let shape = || {
        let status = status(server);
        let sessions = list(&status, "sessions").iter();
        let shape = sessions.map(|session| {
            let peer = session["peer"].as_str().expect("a name").to_owned();
            (peer, list(session, "connections").len())
        });
        shape.collect::<Vec<_>>()
    };
    assert_eq!(shape(), [("client".into(), 1), ("second".into(), 1)]);
    stop(&second);
    until_true("end of the second client's connection", || {
        shape() == [("client".into(), 1), ("second".into(), 0)]
    });
    assert!(status_text(server).contains("2 invited, 1 connected"));

    // While the server is away, and after.
    kill_9_both(&tunnel.server);
    let client = lab.host("client");
    let away = until("notice that the server is away", || {
        let status = status(client);
        (status["client"]["state"] == "reconnecting").then_some(status)
    });
    assert!(connections(&away).is_empty());
    assert!(status_text(client).contains("reconnecting for "));
    tunnel.server = start_server(&lab, &[]);
    let back = until("return", || {
        let status = status(client);
        (status["client"]["state"] == "up").then_some(status)
    });
    assert_eq!(connections(&back).len(), 1);
    let state = back["client"]["state_seconds"].as_f64();
    assert!(state < back["up_seconds"].as_f64(), "{back:#}");
    until_true("the server's view of it", || {
        shape() == [("client".into(), 1)]
    });
}

#[rstest]
fn each_instance_of_a_namespace_has_its_own_document(lab: Lab) {
    let _first = start_server(&lab, &[]);
    let server = lab.host("server");
    let config = "\
interface = \"ringtun1\"
listen = [\"0.0.0.0:8443\"]
state_dir = \"/var/lib/second\"
pool_v4 = \"10.88.0.0/16\"
";
    server
        .write_file("/etc/second.toml", config)
        .expect("a file");
    let _second = start_server(&lab, &["-c", "/etc/second.toml"]);

    let output = server.exec(RINGTUN, ["status", "--json"]).expect("status");
    let documents: Vec<Value> = output
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let interfaces: Vec<_> = documents.iter().map(|one| &one["interface"]).collect();
    assert_eq!(interfaces, ["ringtun0", "ringtun1"]);
    let only = ["status", "--json", "--interface", "ringtun1"];
    let output = server.exec(RINGTUN, only).expect("status");
    let document: Value = serde_json::from_str(&output).expect("one document");
    assert_eq!(document["server"]["pool_v4"], "10.88.0.0/16");
    let shown = status_text(server);
    assert!(shown.contains("\n\nringtun1: server, up "), "{shown}");
    assert_fails(
        server,
        &["status", "--interface", "ringtun2"],
        "with the interface ringtun2",
    );
}

#[rstest]
fn a_client_without_a_server_says_what_is_wrong(lab: Lab) {
    let server = start_server(&lab, &[]);
    let invite = invite(&lab, "client");
    stop(&server);
    let host = lab.host("client");
    let _client = host.spawn(RINGTUN, ["client", &invite]).expect("ringtun");
    let connecting = until("client that has tried", || {
        // There is nothing to ask before it listens.
        let output = host.run(RINGTUN, ["status", "--json"]).expect("status");
        let status: Value = serde_json::from_str(&output.text()).ok()?;
        (!list(&status["client"], "failures").is_empty()).then_some(status)
    });
    assert_eq!(connecting["client"]["state"], "connecting");
    assert!(connections(&connecting).is_empty());
    let failure = connecting["client"]["failures"][0].as_str();
    let failure = failure.expect("a line");
    assert!(failure.contains(&format!("{SERVER_V4}:")), "{failure}");
}

/// One line on standard error, nothing on standard output, exit code 1.
fn assert_fails(host: &Host, arguments: &[&str], expected: &str) {
    let output = host.run(RINGTUN, arguments).expect("ringtun");
    let errors = output.errors();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(output.text(), "");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(
        errors.starts_with("ringtun: ") && errors.contains(expected),
        "{errors}"
    );
}

#[rstest]
fn where_nothing_runs_that_is_said(lab: Lab) {
    let (client, server) = (lab.host("client"), lab.host("server"));
    for host in [client, server] {
        assert_fails(host, &["status"], "nothing runs");
        assert_fails(host, &["status", "--json"], "nothing runs");
    }
    let tunnel = Tunnel::start(&lab);
    let run_files = |host: &Host| {
        let output = host.run("find", ["/run/ringtun"]).expect("find");
        output.text()
    };
    for (host, process) in [(client, &tunnel.client), (server, &tunnel.server)] {
        assert!(run_files(host).contains("control.sock"));
        stop(process);
        assert_eq!(run_files(host), "");
        assert_fails(host, &["status"], "nothing runs");
    }
}

#[rstest]
fn after_a_kill_the_way_on_is_told(lab: Lab) {
    let tunnel = Tunnel::start(&lab);
    // The keeper outlives its daemon, and cleans up.
    kill_9(daemon_of(&tunnel.server));
    assert_ended(&tunnel.server, 1);
    assert_fails(lab.host("server"), &["status"], "nothing runs");
    // Nobody does.
    kill_9_both(&tunnel.client);
    let client = lab.host("client");
    assert_fails(client, &["status"], "ringtun down");
    client.exec(RINGTUN, ["down"]).expect("down");
    assert_fails(client, &["status"], "nothing runs");
    // A socket that was left is in nobody's way.
    let server = start_server(&lab, &[]);
    kill_9_both(&server);
    let _server = start_server(&lab, &[]);
    assert_eq!(status(lab.host("server"))["role"], "server");
}

#[rstest]
fn a_daemon_that_hangs_is_not_waited_for_for_long(lab: Lab) {
    let server = start_server(&lab, &[]);
    let daemon = Pid::from_raw(daemon_of(&server));
    kill(daemon, Signal::SIGSTOP).expect("a running daemon");
    let started = Instant::now();
    assert_fails(lab.host("server"), &["status"], "does not answer");
    assert!(started.elapsed() < SOON / 2, "{:?}", started.elapsed());
    kill(daemon, Signal::SIGCONT).expect("a stopped daemon");
    assert_eq!(status(lab.host("server"))["role"], "server");
}

#[rstest]
fn only_root_may_ask(lab: Lab) {
    let _server = start_server(&lab, &[]);
    let host = lab.host("server");
    // Where the build is, nobody else may look.
    let copy = "install -m 755 \"$0\" /run/ringtun-program";
    host.exec("sh", ["-c", copy, RINGTUN]).expect("a copy");
    let nobody = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/run/ringtun-program",
        "status",
    ];
    let output = host.run("setpriv", nobody).expect("setpriv");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.text(), "");
    let errors = output.errors();
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains("run as root"), "{errors}");
}

/// Either side's configuration decides on the cipher, the other one follows, and both say so.
#[rstest]
fn the_configured_cipher_is_agreed_on(
    lab: Lab,
    #[values("client", "server")] role: &str,
    #[values(
        ("aes-128-gcm", "TLS13_AES_128_GCM_SHA256"),
        ("chacha20-poly1305", "TLS13_CHACHA20_POLY1305_SHA256")
    )]
    (cipher, suite): (&str, &str),
) {
    let script =
        format!("mkdir -p /etc/ringtun && echo 'cipher = \"{cipher}\"' > /etc/ringtun/{role}.toml");
    lab.host(role)
        .exec("sh", ["-c", &script])
        .expect("a configuration");
    let _tunnel = Tunnel::start(&lab);
    let (client, web) = (lab.host("client"), lab.host("web"));
    let transfer = Transfer::start(client, web, WEB_V4.into(), Direction::Up);
    transfer.wait_for_more(MUCH_BYTES);
    transfer.finish();
    for host in ["client", "server"] {
        let status = status(lab.host(host));
        let connections = connections(&status);
        assert!(!connections.is_empty(), "{host}");
        for connection in connections {
            assert_eq!(connection["cipher_suite"], suite, "{host}");
        }
    }
}
