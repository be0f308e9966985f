//! Connections inside the tunnel outlive outages of the path: none of them is reset, and transfers go on.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use common::status::{connections, number, status};
use common::transfer::{Direction, Transfer, connect};
use common::{RINGTUN, SOON, Tunnel, assert_no_panic, build, inner_addresses, until_true};
use ringtun::sys::tcp_info;
use ringtun_lab::outages::{Options, outages};
use ringtun_lab::report::Report;
use ringtun_lab::topology::{WEB_V4, WEB_V6};
use ringtun_lab::wire::Wire;
use ringtun_lab::{Host, Lab, Topology};
use rstest::rstest;

/// Enough to be in the middle of things.
const SOME_BYTES: u64 = 4 << 20;
/// What the client says when it looks for a connection beside the one that is silent.
const RACES: &str = "the server is silent";

/// A tunnel over a link that can be cut, transfers in both directions, and a connection that idles.
struct Bed {
    lab: Lab,
    tunnel: Tunnel,
}

impl Bed {
    fn new() -> Bed {
        let lab = build(Topology::Outage);
        let tunnel = Tunnel::start(&lab);
        Bed { lab, tunnel }
    }

    fn wire(&self) -> &Wire {
        self.lab.wire().expect("a link that can be cut")
    }

    fn ends(&self) -> [&Host; 2] {
        ["client", "server"].map(|host| self.lab.host(host))
    }

    fn transfers(&self, directions: &[Direction]) -> Vec<Transfer> {
        let (client, web) = (self.lab.host("client"), self.lab.host("web"));
        let start = |direction| Transfer::start(client, web, WEB_V4.into(), direction);
        directions.iter().copied().map(start).collect()
    }
}

/// Segments that the tunnel's present connection has sent again.
fn retransmitted(host: &Host) -> u64 {
    let status = status(host);
    let connections = connections(&status);
    number(connections[0], "/tcp/retransmitted_segments")
}

#[rstest]
fn transfers_go_on_after_short_outages() {
    let bed = Bed::new();
    let (client, web) = (bed.lab.host("client"), bed.lab.host("web"));
    let (mut at_client, mut at_web) = connect(client, web, WEB_V6.into());
    let transfers = bed.transfers(&[Direction::Up, Direction::Down]);
    // As long as each side needs to try again so many times, in vain.
    for attempts in [1, 3] {
        transfers
            .iter()
            .for_each(|transfer| transfer.wait_for_more(SOME_BYTES));
        bed.wire().cut();
        let before = bed.ends().map(retransmitted);
        until_true("retransmissions of both sides", || {
            let now = bed.ends().map(retransmitted);
            now.iter()
                .zip(before)
                .all(|(now, before)| *now >= before + attempts)
        });
        bed.wire().mend();
    }
    for transfer in transfers {
        transfer.wait_for_more(SOME_BYTES);
        transfer.finish();
    }
    let mut word = [0; 5];
    at_client.write_all(b"still").expect("a connection");
    at_web.read_exact(&mut word).expect("a connection");
    at_web.write_all(b"there").expect("a connection");
    at_client.read_exact(&mut word).expect("a connection");
    assert_eq!(&word, b"there");
    for process in [&bed.tunnel.client, &bed.tunnel.server] {
        assert_no_panic(process);
    }
    let lines = bed.tunnel.client.lines();
    assert!(
        !lines.iter().any(|line| line.contains("connection lost")),
        "{lines:?}"
    );
}

/// What tells an outage from a queue: the kernel has timed out, and hears nothing.
#[rstest]
fn a_time_out_shows_until_the_path_is_back() {
    let lab = build(Topology::Outage);
    let wire = lab.wire().expect("a link that can be cut");
    let (mut near, mut far) = connect(lab.host("firewall"), lab.host("web"), WEB_V4.into());
    let timed_out = |socket: &TcpStream| {
        let sample = tcp_info::sample(socket.as_fd(), true);
        sample.expect("a TCP socket").timed_out
    };
    assert!(!timed_out(&near));
    wire.cut();
    near.write_all(b"x").expect("room in the send buffer");
    until_true("a time-out", || timed_out(&near));
    wire.mend();
    far.read_exact(&mut [0]).expect("it is sent again");
    until_true("the acknowledgement", || !timed_out(&near));
}

/// The scenario of the lab that measures all this works, and the tunnel does without what only new kernels have.
#[rstest]
fn the_scenario_passes(#[values(false, true)] without_rto_max: bool) {
    let options = Options {
        seconds: vec![Duration::from_millis(200)],
        rounds: 1,
        seed: 0,
        without_rto_max,
    };
    let mut lines = Vec::new();
    let mut report = Report::new(&mut lines);
    outages(Path::new(RINGTUN), &options, &mut report, |_| ()).expect("a lab");
    let failed = report.failed();
    let lines = String::from_utf8_lossy(&lines);
    assert_eq!(failed, 0, "{lines}");
    for word in [" up ", " down ", "all connections"] {
        assert!(lines.contains(word), "{word} is not in\n{lines}");
    }
}

/// A new connection races the old one then, and whichever of them wins, the transfer has to go on.
#[rstest]
fn a_transfer_goes_on_after_an_outage_in_which_the_client_looks_for_another_connection(
    #[values(Direction::Up, Direction::Down)] direction: Direction,
) {
    let bed = Bed::new();
    let addresses = inner_addresses(bed.lab.host("client"));
    let transfers = bed.transfers(&[direction]);
    for _ in 0..2 {
        transfers[0].wait_for_more(SOME_BYTES);
        let mark = bed.tunnel.client.mark();
        bed.wire().cut();
        bed.tunnel
            .client
            .wait_for_line_after(mark, RACES, SOON)
            .expect("an attempt to connect again");
        bed.wire().mend();
        transfers[0].wait_for_more(SOME_BYTES);
    }
    for transfer in transfers {
        transfer.finish();
    }
    assert_eq!(inner_addresses(bed.lab.host("client")), addresses);
    for process in [&bed.tunnel.client, &bed.tunnel.server] {
        assert_eq!(process.status(), None);
        assert_no_panic(process);
    }
}
