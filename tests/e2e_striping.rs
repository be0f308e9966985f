//! A session with several connections uses all of them, and goes on with the others when one of them dies.

mod common;

use common::processes::kill_9_both;
use common::status::{connections, list, number, status};
use common::transfer::{Direction, Transfer};
use common::{
    Tunnel, assert_no_panic, build, inner_addresses, lab, port_of, reset, start_server, until_true,
};
use ringtun_lab::topology::{FIREWALL_V4, SERVER_V4, WEB_V4};
use ringtun_lab::{Host, Lab, Topology};
use rstest::rstest;
use serde_json::Value;
use std::thread;

/// Connections of a session that has several, configured or found out.
const CONNECTIONS: usize = 4;
/// Those of a session that can have no more.
const CONNECTIONS_MAX: usize = 16;
/// The one that something happens to.
const VICTIM: usize = 2;
/// Enough to be in the middle of things.
const SOME_BYTES: u64 = 1 << 20;
/// Enough to tell it from everything else on a connection.
const SHARE_BYTES: u64 = 1 << 20;
/// With so many flows, one of the connections has none once in 100,000 times.
const TRANSFERS_MAX: usize = 45;

/// A tunnel of several connections, each of which carries some of the transfers.
struct Striped<'l> {
    lab: &'l Lab,
    transfers: Vec<Transfer>,
    tunnel: Tunnel,
}

impl Striped<'_> {
    fn start(lab: &Lab) -> Striped<'_> {
        configure(
            lab.host("client"),
            &format!("connections = {CONNECTIONS}\n"),
        );
        let tunnel = Tunnel::start(lab);
        let mut striped = Striped {
            lab,
            transfers: Vec::new(),
            tunnel,
        };
        striped.wait_until_whole();
        let idle = striped.carried();
        while !striped.all_carry_more_than(&idle) {
            let number = striped.transfers.len();
            assert!(number < TRANSFERS_MAX, "{:?}", striped.carried());
            let direction = [Direction::Down, Direction::Up][number % 2];
            let (client, web) = (lab.host("client"), lab.host("web"));
            let transfer = Transfer::start(client, web, WEB_V4.into(), direction);
            transfer.wait_for_more(2 * SHARE_BYTES);
            striped.transfers.push(transfer);
        }
        striped
    }

    /// All transfers go on, whatever happened.
    fn assert_all_go_on(&self) {
        for transfer in &self.transfers {
            transfer.wait_for_more(SOME_BYTES);
        }
    }

    /// Waits until both ends have all connections, and none is silent.
    fn wait_until_whole(&self) {
        for host in ["client", "server"] {
            until_true(&format!("{CONNECTIONS} connections on {host}"), || {
                let status = status(self.lab.host(host));
                let connections = connections(&status);
                connections.len() == CONNECTIONS
                    && connections.iter().all(|one| one["silent"] == false)
            });
        }
    }

    /// Bytes of packets that each connection has carried, as the client sees it. 0 for one that is not there.
    fn carried(&self) -> [u64; CONNECTIONS] {
        let status = status(self.lab.host("client"));
        let mut carried = [0; CONNECTIONS];
        for connection in connections(&status) {
            let ordinal = number(connection, "/ordinal") as usize;
            let counters = ["/counters/sent_bytes", "/counters/received_bytes"];
            carried[ordinal] = counters.map(|one| number(connection, one)).iter().sum();
        }
        carried
    }

    fn all_carry_more_than(&self, before: &[u64; CONNECTIONS]) -> bool {
        let now = self.carried();
        before
            .iter()
            .zip(now)
            .all(|(before, now)| now >= before + SHARE_BYTES)
    }

    /// The client's end of each connection, as the server sees it.
    fn outer_addresses(&self) -> Vec<String> {
        let status = status(self.lab.host("server"));
        let addresses = connections(&status).into_iter().enumerate();
        let addresses = addresses.map(|(index, connection)| {
            assert_eq!(number(connection, "/ordinal") as usize, index);
            let address = connection["peer_address"].as_str();
            address.expect("an address").to_owned()
        });
        addresses.collect()
    }

    fn instance(&self, host: &str) -> Value {
        let status = status(self.lab.host(host));
        assert_eq!(list(&status, "sessions").len(), 1);
        status["sessions"][0]["instance"].clone()
    }

    fn finish(self) {
        for transfer in self.transfers {
            transfer.finish();
        }
        for process in [&self.tunnel.client, &self.tunnel.server] {
            assert_eq!(process.status(), None);
            assert_no_panic(process);
        }
    }
}

fn configure(client: &Host, text: &str) {
    let written = client.write_file("/etc/ringtun/client.toml", text);
    written.expect("a configuration");
}

#[rstest]
fn transfers_go_on_when_a_connection_is_reset_and_it_is_replaced(lab: Lab) {
    let striped = Striped::start(&lab);
    let (addresses, instance) = (
        inner_addresses(lab.host("client")),
        striped.instance("server"),
    );
    let before = striped.outer_addresses();
    reset(lab.host("server"), &before[VICTIM]);

    striped.assert_all_go_on();
    until_true("another connection in its place", || {
        let now = striped.outer_addresses();
        now.len() == CONNECTIONS && now[VICTIM] != before[VICTIM]
    });
    striped.wait_until_whole();
    let after = striped.outer_addresses();
    for ordinal in (0..CONNECTIONS).filter(|ordinal| *ordinal != VICTIM) {
        assert_eq!(
            after[ordinal], before[ordinal],
            "the others are as they were"
        );
    }
    // Its flows have come back.
    let replaced = striped.carried();
    until_true("bytes on all connections", || {
        striped.all_carry_more_than(&replaced)
    });
    striped.assert_all_go_on();

    assert_eq!(inner_addresses(lab.host("client")), addresses);
    for host in ["client", "server"] {
        assert_eq!(striped.instance(host), instance, "{host}");
    }
    let lost = striped.tunnel.client.lines();
    let lost = lost.iter().filter(|line| line.contains("connection lost"));
    assert_eq!(lost.count(), 1);
    striped.finish();
}

/// As when a middlebox has forgotten one of them, and lets in no new one for a while.
#[rstest]
fn transfers_go_on_when_a_connection_falls_silent(lab: Lab) {
    let striped = Striped::start(&lab);
    let instance = striped.instance("server");
    let before = striped.outer_addresses();
    let port = port_of(&before[VICTIM]);
    let internet = lab.host("internet");
    let cut = format!(
        "table ip cut {{
            chain forward {{
                type filter hook forward priority filter; policy accept;
                ip saddr {FIREWALL_V4} ip daddr {SERVER_V4} tcp sport {port} drop
                ip saddr {SERVER_V4} ip daddr {FIREWALL_V4} tcp dport {port} drop
                ip daddr {SERVER_V4} tcp flags & (syn | ack) == syn drop
            }}
        }}"
    );
    let nft = internet.command("nft").args(["-f", "-"]).input(cut);
    nft.exec().expect("nft");

    for host in ["client", "server"] {
        until_true(&format!("silence that {host} has noticed"), || {
            let status = status(lab.host(host));
            connections(&status)
                .iter()
                .any(|one| number(one, "/ordinal") as usize == VICTIM && one["silent"] == true)
        });
    }
    striped.assert_all_go_on();
    let (client, server) = (&striped.tunnel.client, &striped.tunnel.server);
    for process in [client, server] {
        assert_eq!(process.status(), None);
    }

    internet
        .exec("nft", ["delete", "table", "ip", "cut"])
        .expect("nft");
    striped.wait_until_whole();
    let whole = striped.carried();
    until_true("bytes on all connections", || {
        striped.all_carry_more_than(&whole)
    });
    assert_eq!(striped.instance("server"), instance);
    striped.finish();
}

#[rstest]
fn all_connections_come_back_to_a_server_that_was_killed(lab: Lab) {
    let mut striped = Striped::start(&lab);
    let (addresses, instance) = (
        inner_addresses(lab.host("client")),
        striped.instance("client"),
    );
    kill_9_both(&striped.tunnel.server);
    striped.tunnel.server = start_server(&lab, &[]);
    striped.wait_until_whole();
    let whole = striped.carried();
    until_true("bytes on all connections", || {
        striped.all_carry_more_than(&whole)
    });
    striped.assert_all_go_on();
    assert_eq!(inner_addresses(lab.host("client")), addresses);
    for host in ["client", "server"] {
        assert_eq!(striped.instance(host), instance, "{host}");
    }
    striped.finish();
}

/// How many connections the client has, wants and has workers for.
fn counts(client: &Host) -> (usize, usize, usize) {
    let status = status(client);
    (
        connections(&status).len(),
        number(&status, "/client/connections_wanted") as usize,
        list(&status, "workers").len(),
    )
}

/// The workers of a client whose connections are not configured.
fn workers() -> usize {
    let cores = thread::available_parallelism().expect("a number of cores");
    cores.get().min(2)
}

/// Whether the kernel has been told how much a second it may send at most on the tunnel's connection: `ss` shows that behind the
/// rate at which it would.
fn is_paced(host: &Host) -> bool {
    let filter = [
        "-tinH",
        "state",
        "established",
        "sport = :443 or dport = :443",
    ];
    let sockets = host.exec("ss", filter).expect("ss runs");
    let mut words = sockets.split_whitespace();
    words.any(|word| word == "pacing_rate") && words.next().is_some_and(|rate| rate.contains('/'))
}

#[rstest]
fn a_slow_path_has_one_connection() {
    let lab = build(Topology::Bufferbloat);
    let tunnel = Tunnel::start(&lab);
    let (client, web) = (lab.host("client"), lab.host("web"));
    for direction in [Direction::Up, Direction::Down] {
        let sender = match direction {
            Direction::Up => client,
            Direction::Down => lab.host("server"),
        };
        let transfer = Transfer::start(client, web, WEB_V4.into(), direction);
        until_true("a bound for what is sent", || is_paced(sender));
        transfer.wait_for_more(4 * SOME_BYTES);
        transfer.finish();
    }
    assert_eq!(counts(client), (1, 1, workers()));
    assert_no_panic(&tunnel.client);
}

#[rstest]
fn a_long_fat_path_has_several(#[values(Direction::Up, Direction::Down)] direction: Direction) {
    let lab = build(Topology::LongFat);
    let (client, web) = (lab.host("client"), lab.host("web"));
    let tunnel = Tunnel::start(&lab);
    assert_eq!(counts(client), (1, 1, workers()));
    let transfer = Transfer::start(client, web, WEB_V4.into(), direction);
    until_true("all connections", || {
        counts(client) == (CONNECTIONS, CONNECTIONS, workers())
    });
    until_true("all connections on the server", || {
        connections(&status(lab.host("server"))).len() == CONNECTIONS
    });
    // Nothing has been lost yet.
    for connection in connections(&status(client)) {
        assert_eq!(connection["tcp"]["congestion_control"], "cubic");
    }
    transfer.wait_for_more(SOME_BYTES);
    transfer.finish();
    assert_no_panic(&tunnel.client);
    let lines = tunnel.client.lines();
    let grown = lines.iter().filter(|line| line.contains("in place of 1"));
    assert_eq!(grown.count(), 1, "{lines:?}");
}

/// One that does not mind losses needs no more connections than on any long path.
#[rstest]
#[case("auto", "bbr", CONNECTIONS)]
#[case("cubic", "cubic", CONNECTIONS_MAX)]
fn losses_are_borne_or_spread_over_more_connections(
    #[case] configured: &str,
    #[case] used: &str,
    #[case] wanted: usize,
) {
    let lab = build(Topology::Lossy);
    let (client, web) = (lab.host("client"), lab.host("web"));
    configure(client, &format!("congestion_control = \"{configured}\"\n"));
    let tunnel = Tunnel::start(&lab);
    let transfer = Transfer::start(client, web, WEB_V4.into(), Direction::Up);
    until_true("a connection that has noticed", || {
        let status = status(client);
        let connections = connections(&status);
        connections.len() == wanted
            && connections
                .iter()
                .any(|one| one["tcp"]["congestion_control"] == used)
    });
    transfer.wait_for_more(SOME_BYTES);
    transfer.finish();
    assert_eq!(counts(client), (wanted, wanted, workers()));
    assert_no_panic(&tunnel.client);
}
