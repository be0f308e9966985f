//! A peer with a token that does its worst to a running server, which goes on serving others.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use common::connect_ip::{
    self, ADDRESS_ASSIGN, Assignment, CLOSE, Receiver, Sender, assignments, token_of,
};
use common::processes::{daemon_of, status_field};
use common::status::{list, number, status, status_text};
use common::{assert_no_panic, invite, lab, start_client, start_server, until, until_true};
use ringtun_lab::topology::{SERVER_V4, WEB_V4};
use ringtun_lab::{Host, Lab, Process};
use rstest::{fixture, rstest};
use serde_json::Value;

/// The most connections of a peer that exist at a time: docs/limits.md.
const CONNECTIONS_MAX: u64 = 34;
/// What the server's memory may grow by for one connection: docs/limits.md.
const GROWTH_KIB_MAX: u64 = 1536;
/// RFC 9484 does not limit the number of entries, and 16 KiB of them are lawful.
const REQUEST_BYTES_MAX: usize = 16 * 1024;
/// A reason of CLOSE: docs/protocol.md.
const MISBEHAVED: u8 = 4;
/// PING: docs/protocol.md.
const PING: u64 = 0x2b73_c5a4;

/// A server with an honest client that is up, and an invite for an attacker.
struct Scene {
    lab: Lab,
    server: Process,
    client: Process,
    token: String,
}

#[fixture]
fn scene(lab: Lab) -> Scene {
    let server = start_server(&lab, &[]);
    let honest = invite(&lab, "honest");
    let token = token_of(&invite(&lab, "mallory")).to_owned();
    let client = start_client(lab.host("client"), &honest);
    Scene {
        lab,
        server,
        client,
        token,
    }
}

impl Scene {
    fn attacker(&self) -> &Host {
        self.lab.host("client2")
    }

    fn open(&self, fields: &str) -> (Sender, Receiver) {
        let to = SocketAddr::from((SERVER_V4, 443));
        connect_ip::open_with(self.attacker(), to, &self.token, fields)
    }

    fn status(&self) -> Value {
        status(self.lab.host("server"))
    }

    /// The attacker's session, as the server's status has it.
    fn mallory(&self) -> Value {
        let status = self.status();
        let mut sessions = list(&status, "sessions").iter();
        let found = sessions.find(|session| session["peer"] == "mallory");
        found.cloned().unwrap_or(Value::Null)
    }

    /// Both processes are well, and packets pass.
    fn assert_honest_client_is_served(&self) {
        let client = self.lab.host("client");
        until_true("ping without a loss", || {
            client.ping(WEB_V4.into(), 5).expect("ping").is_complete()
        });
        for process in [&self.server, &self.client] {
            assert_eq!(process.status(), None, "it still runs");
            assert_no_panic(process);
        }
    }
}

/// `Ringtun-Instance` of the attacker's only client process.
fn instance(connection: u32) -> String {
    format!(
        "Ringtun-Instance: {};connection={connection}\r\n",
        "00".repeat(16)
    )
}

fn request(address: IpAddr, bytes: usize) -> Vec<Assignment> {
    let entry_bytes = if address.is_ipv4() { 7 } else { 19 };
    let entry = Assignment {
        request_id: 1,
        address,
        prefix_bits: if address.is_ipv4() { 32 } else { 128 },
    };
    vec![entry; bytes / entry_bytes]
}

#[rstest]
fn the_largest_address_request_ends_nothing(
    scene: Scene,
    #[values(Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into())] family: IpAddr,
) {
    let (sender, mut receiver) = scene.open("");
    let unasked = receiver.receive_kind(ADDRESS_ASSIGN).expect("addresses");
    let entries = request(family, REQUEST_BYTES_MAX);
    sender.request_addresses(&entries).expect("sent");
    let answer = receiver.receive_kind(ADDRESS_ASSIGN).expect("an answer");
    assert!(answer.len() <= REQUEST_BYTES_MAX);
    let own = |assigned: &[u8]| {
        let assigned = assignments(assigned);
        let mut own = assigned
            .into_iter()
            .filter(|one| !one.address.is_unspecified());
        own.find(|one| one.address.is_ipv4() == family.is_ipv4())
            .map(|one| one.address)
    };
    assert_eq!(own(&answer), own(&unasked));
    scene.assert_honest_client_is_served();
}

#[rstest]
fn a_connection_that_finds_no_place_is_told_after_its_101(scene: Scene) {
    let (_sender, mut receiver) = scene.open(&instance(17));
    let reason = receiver.receive_kind(CLOSE).expect("a reason");
    assert_eq!(reason, [MISBEHAVED]);
    // One that has its place is not disturbed by that.
    let (_sender, mut receiver) = scene.open(&instance(16));
    receiver.receive_kind(ADDRESS_ASSIGN).expect("addresses");
    until_true("one connection", || {
        scene.mallory()["connections"].as_array().map(Vec::len) == Some(1)
    });
}

#[rstest]
fn replaced_connections_do_not_pile_up(scene: Scene) {
    let mut opened = Vec::new();
    for _ in 0..2 * CONNECTIONS_MAX {
        opened.push(scene.open(&instance(0)));
    }
    let mallory = scene.mallory();
    assert_eq!(list(&mallory, "connections").len(), 1);
    let closing = number(&mallory, "/past/closing");
    assert!(closing < CONNECTIONS_MAX, "{mallory:#}");
    until_true("the oldest have ended", || {
        let ended = number(&scene.mallory(), "/past/ended_replaced");
        ended + CONNECTIONS_MAX >= 2 * CONNECTIONS_MAX
    });
    let lines = scene.server.lines();
    let of_mallory = lines.iter().filter(|line| line.contains("mallory"));
    assert!(of_mallory.count() <= 40, "{}", lines.join("\n"));
    scene.assert_honest_client_is_served();
}

#[rstest]
fn a_peer_that_breaks_the_protocol_is_told_and_counted(scene: Scene) {
    let (sender, mut receiver) = scene.open("");
    sender.send(PING, b"abc").expect("sent");
    let reason = receiver.receive_kind(CLOSE).expect("a reason");
    assert_eq!(reason, [MISBEHAVED]);
    // Another one vanishes without a goodbye.
    drop(scene.open(""));
    let mallory = until("both ends", || {
        let mallory = scene.mallory();
        let ended = |how: &str| mallory["past"][how].as_u64().unwrap_or(0);
        (ended("ended_misbehaved") == 1 && ended("ended_lost") == 1).then_some(mallory)
    });
    assert_eq!(number(&mallory, "/past/ended_closed"), 0);
    let shown = status_text(scene.lab.host("server"));
    assert!(shown.contains("misbehaved 1"), "{shown}");
    let lines = scene.server.lines();
    let told = lines
        .iter()
        .find(|line| line.contains("broke the protocol"));
    assert!(told.is_some(), "{}", lines.join("\n"));
    scene.assert_honest_client_is_served();
}

#[rstest]
fn requests_without_reading_do_not_grow_the_server(scene: Scene) {
    let daemon = daemon_of(&scene.server);
    let resident_kib = || -> u64 {
        let field = status_field(daemon, "VmRSS");
        let number = field.split_whitespace().next().expect("a number");
        number.parse().expect("a number")
    };
    // Packet memory fills up by itself after the start.
    until_true("all packet memory is there", || {
        let status = scene.status();
        let mut workers = list(&status, "workers").iter();
        workers.all(|worker| worker["io"]["buffers_registered"] == true)
    });
    let (sender, _receiver) = scene.open("");
    let entries = request(Ipv4Addr::UNSPECIFIED.into(), REQUEST_BYTES_MAX);
    // What the first ones need stays.
    for _ in 0..10 {
        sender.request_addresses(&entries).expect("sent");
    }
    let before = resident_kib();
    for _ in 0..2000 {
        sender.request_addresses(&entries).expect("sent");
    }
    let mallory = until("requests are refused", || {
        let mallory = scene.mallory();
        let refused = mallory["connections"][0]["counters"]["refused_requests"].as_u64();
        (refused > Some(0)).then_some(mallory)
    });
    let after = resident_kib();
    assert!(
        after < before + GROWTH_KIB_MAX,
        "{before} KiB became {after}: {mallory:#}"
    );
    scene.assert_honest_client_is_served();
}
