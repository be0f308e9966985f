//! On a fast path, flows that send little have a connection and a worker of their own.

mod common;

use common::status::{connections, number, status};
use common::transfer::{Direction, Transfer};
use common::{Tunnel, assert_no_panic, lab, reset, until_true};
use ringtun_lab::topology::WEB_V4;
use ringtun_lab::{Host, Lab};
use rstest::rstest;
use serde_json::Value;
use std::thread;
use std::time::Duration;

/// The ordinals of the connection that a session begins with, and of the one for flows that send little.
const ORDINARY: u64 = 0;
const SPARSE: u64 = 16;
/// What a connection for sparse flows has to live for to be replaced.
const KEPT_MIN: Duration = Duration::from_secs(11);
/// A flow that sends little.
const PINGS: usize = 10;
/// Those that are known to be of one: all but the first.
const KNOWN: u64 = PINGS as u64 - 1;
/// Enough to tell a transfer from everything else on a connection.
const MUCH_BYTES: u64 = 1 << 20;

/// A tunnel that is busy with a transfer, and so has both connections.
struct Busy<'l> {
    client: &'l Host,
    server: &'l Host,
    tunnel: Tunnel,
    transfer: Transfer,
}

impl Busy<'_> {
    fn start(lab: &Lab, direction: Direction) -> Busy<'_> {
        let cores = thread::available_parallelism().expect("a number of cores");
        assert!(cores.get() > 1, "this test wants a machine with two cores");
        let (client, server, web) = (lab.host("client"), lab.host("server"), lab.host("web"));
        let tunnel = Tunnel::start(lab);
        for host in [client, server] {
            assert_eq!(connections(&status(host)).len(), 1);
        }
        let transfer = Transfer::start(client, web, WEB_V4.into(), direction);
        Busy {
            client,
            server,
            tunnel,
            transfer,
        }
    }

    /// Waits until there are both connections at both ends, on different workers.
    fn wait_until_whole(&self) {
        for host in [self.client, self.server] {
            until_true("both connections", || {
                [ORDINARY, SPARSE].map(|ordinal| connection(host, ordinal).is_some()) == [true; 2]
            });
            let [ordinary, sparse] =
                [ORDINARY, SPARSE].map(|ordinal| connection(host, ordinal).expect("still there"));
            assert_ne!(ordinary["worker"], sparse["worker"]);
        }
        // The transfer may have been taken for a flow that sends little, or have had no other connection, for so long.
        self.transfer.wait_for_more(MUCH_BYTES);
    }

    /// Pings take the connection for them, and the transfer the other.
    fn assert_apart(&self) {
        let hosts = [self.client, self.server];
        let both = || {
            hosts.map(|host| {
                [ORDINARY, SPARSE].map(|ordinal| connection(host, ordinal).expect("still there"))
            })
        };
        let before = both();
        let pong = self.client.ping(WEB_V4.into(), PINGS).expect("ping");
        assert!(!pong.is_silent(), "{pong:?}");
        self.transfer.wait_for_more(2 * MUCH_BYTES);
        for (before, after) in before.iter().zip(both()) {
            let more = |index: usize, counter| {
                number(&after[index], counter) - number(&before[index], counter)
            };
            assert!(more(1, "/counters/sent_packets") >= KNOWN);
            assert!(more(1, "/counters/received_packets") >= KNOWN);
            let bytes = |index| {
                more(index, "/counters/sent_bytes") + more(index, "/counters/received_bytes")
            };
            assert!(bytes(1) < MUCH_BYTES / 4, "{}", bytes(1));
            assert!(bytes(0) >= MUCH_BYTES, "{}", bytes(0));
        }
    }

    /// Resets a connection, and returns what its client's address was.
    fn reset(&self, ordinal: u64) -> Value {
        let address =
            connection(self.server, ordinal).expect("one to reset")["peer_address"].take();
        reset(self.server, address.as_str().expect("an address"));
        address
    }

    fn wait_for_another(&self, ordinal: u64, former: &Value) {
        until_true("another in its place", || {
            let now = connection(self.server, ordinal);
            now.is_some_and(|now| now["peer_address"] != *former)
        });
        self.wait_until_whole();
    }

    fn finish(self) {
        self.transfer.finish();
        for process in [&self.tunnel.client, &self.tunnel.server] {
            assert_no_panic(process);
        }
    }
}

/// One connection of the only session, as a host sees it.
fn connection(host: &Host, ordinal: u64) -> Option<Value> {
    let status = status(host);
    let mut connections = connections(&status).into_iter();
    let found = connections.find(|one| number(one, "/ordinal") == ordinal);
    found.cloned()
}

#[rstest]
fn what_sends_little_takes_a_connection_of_its_own(
    lab: Lab,
    #[values(Direction::Up, Direction::Down)] direction: Direction,
) {
    let busy = Busy::start(&lab, direction);
    busy.wait_until_whole();
    busy.assert_apart();

    // Sooner it would count as not wanted.
    thread::sleep(KEPT_MIN);
    let former = busy.reset(SPARSE);
    busy.wait_for_another(SPARSE, &former);
    busy.assert_apart();
    busy.finish();
}

#[rstest]
fn everything_takes_the_connection_for_sparse_flows_while_there_is_no_other(lab: Lab) {
    let busy = Busy::start(&lab, Direction::Down);
    busy.wait_until_whole();
    let former = busy.reset(ORDINARY);
    busy.transfer.wait_for_more(MUCH_BYTES);
    busy.wait_for_another(ORDINARY, &former);
    busy.assert_apart();
    busy.finish();
}

/// As a server does that knows no such connections.
#[rstest]
fn a_server_that_ends_it_at_once_is_asked_no_more_by_that_session(lab: Lab) {
    let busy = Busy::start(&lab, Direction::Up);
    busy.wait_until_whole();
    busy.reset(SPARSE);
    let client = busy.client;
    until_true("one connection wanted", || {
        number(&status(client), "/client/connections_wanted") == 1
    });
    busy.transfer.wait_for_more(64 * MUCH_BYTES);
    let pong = client.ping(WEB_V4.into(), PINGS).expect("ping");
    assert!(!pong.is_silent(), "{pong:?}");
    for host in [client, busy.server] {
        assert_eq!(connections(&status(host)).len(), 1);
    }

    // Another server may be there by now.
    let former = busy.reset(ORDINARY);
    busy.wait_for_another(ORDINARY, &former);
    busy.assert_apart();
    busy.finish();
}
