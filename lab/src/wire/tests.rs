//! A real wire between two hosts. Exact figures are those of virtual time (`lane/tests.rs`, `fate.rs`); the bounds here
//! are such that a busy machine stays within them.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::pair::{FAR, INTERFACE, Pair};
use super::*;
use crate::bench::Direction;
use crate::host::Host;
use crate::netns::ProcessTree;

/// How much later than asked a busy machine may be, at best.
const LATE: Duration = Duration::from_millis(30);
const LIMIT: Duration = Duration::from_secs(20);

fn pair(plan: &Plan) -> Pair {
    Pair::join(plan).expect("two hosts and a wire")
}

impl Pair {
    fn wire(&self) -> &Wire {
        self.wire.as_ref().expect("not dropped yet")
    }

    fn ping(&self, count: usize) -> Vec<Duration> {
        let ping = self.near.ping(IpAddr::V4(FAR), count).expect("ping");
        let times = ping.round_trips_us.into_iter();
        times.map(Duration::from_micros).collect()
    }

    fn rate(&self, seconds: u32) -> f64 {
        let transfer = self.stream(Direction::Up, seconds).expect("a transfer");
        transfer.megabits_per_second
    }

    /// A counter of an interface.
    fn counter(&self, host: &Host, name: &str) -> u64 {
        let path = format!("/sys/class/net/{INTERFACE}/statistics/{name}");
        let text = host.exec("cat", [path]).expect("a counter");
        text.trim().parse().expect("a number")
    }
}

#[test]
fn the_way_is_as_long_as_asked() {
    let pair = pair(&Plan {
        seed: 1,
        there: Conditions {
            delay: Duration::from_millis(30),
            ..Conditions::default()
        },
        back: Conditions {
            delay: Duration::from_millis(10),
            ..Conditions::default()
        },
    });
    let times = pair.ping(20);
    assert_eq!(times.len(), 20, "nothing is lost");
    let (asked, best) = (Duration::from_millis(40), times.iter().min().copied());
    let best = best.expect("twenty");
    assert!((asked..asked + LATE).contains(&best), "{times:?}");
}

#[test]
fn the_rate_is_as_asked_in_frames_of_the_mtu() {
    let pair = pair(&Plan::symmetric(
        1,
        Conditions {
            rate_bits_per_second: Some(20_000_000),
            queue_bytes: 100_000,
            delay: Duration::from_millis(5),
            ..Conditions::default()
        },
    ));
    let rate = pair.rate(3);
    // 1448 of 1514 bytes are payload: 19.1 Mbit/s. What waited when the count began is on top.
    assert!((10.0..=20.5).contains(&rate), "{rate} Mbit/s");
    let (bytes, packets) = (
        pair.counter(&pair.far, "rx_bytes"),
        pair.counter(&pair.far, "rx_packets"),
    );
    assert!(
        (1200..=1514).contains(&(bytes / packets)),
        "{bytes} in {packets}"
    );
    assert_eq!(
        pair.counter(&pair.near, "tx_dropped"),
        0,
        "none is lost before the wire"
    );
    let there = pair.wire().traffic(Heading::There);
    assert!(there.counts.delivered >= packets, "{there:?}");
    assert_eq!((there.counts.lost, there.counts.cut), (0, 0));
}

#[test]
fn losses_are_as_frequent_as_asked() {
    let pair = pair(&Plan {
        there: Conditions {
            loss: Loss::Random(0.2),
            ..Conditions::default()
        },
        ..Plan::default()
    });
    let answers = pair.ping(200).len();
    // Forty are to be expected, and this is five standard deviations.
    assert!((132..=188).contains(&answers), "{answers} of 200");
    let (there, back) = (
        pair.wire().traffic(Heading::There).counts,
        pair.wire().traffic(Heading::Back).counts,
    );
    assert!(there.lost >= 200 - answers as u64, "{there:?}");
    assert_eq!(there.lost + there.delivered, there.offered);
    assert_eq!(back.lost, 0);
}

#[test]
fn an_outage_begins_and_ends_when_told() {
    let pair = pair(&Plan::default());
    assert_eq!(pair.ping(2).len(), 2);
    pair.wire().cut();
    assert!(pair.ping(3).is_empty());
    pair.wire().mend();
    assert_eq!(pair.ping(2).len(), 2);
    let cut = pair.wire().traffic(Heading::There).counts.cut;
    assert!(cut >= 3, "{cut}");
    let slow = Change::Delay(Duration::from_millis(50));
    pair.wire().change(Heading::Back, slow).expect("sound");
    assert!(
        pair.ping(3)
            .iter()
            .all(|time| *time >= Duration::from_millis(50))
    );
    let nonsense = Change::Loss(Loss::Random(2.0));
    assert!(pair.wire().change(Heading::There, nonsense).is_err());
}

#[test]
fn the_ends_are_ordinary_interfaces_and_go_with_the_wire() {
    let mut pair = pair(&Plan::default());
    let links = || pair.near.exec("ip", ["-o", "link"]).expect("ip");
    let shown = links();
    let line = shown.lines().find(|line| line.contains(INTERFACE));
    let line = line.expect("an interface");
    for word in [
        "mtu 1500",
        "UP,LOWER_UP",
        "qlen 10000",
        "link/ether 02:00:00:77:00:01",
    ] {
        assert!(line.contains(word), "{word} is not in {line}");
    }
    pair.wire = None;
    let deadline = Instant::now() + LIMIT;
    while pair
        .near
        .exec("ip", ["-o", "link"])
        .expect("ip")
        .contains(INTERFACE)
    {
        assert!(Instant::now() < deadline, "the interface is left");
    }
}

#[test]
fn nonsense_is_refused() {
    let plan = Plan {
        there: Conditions {
            duplication: 2.0,
            ..Conditions::default()
        },
        ..Plan::default()
    };
    let processes = ProcessTree::new().expect("namespaces");
    let host = Namespace::new(&processes).expect("a namespace");
    let end = End {
        host: &host,
        interface: INTERFACE,
    };
    assert!(matches!(
        Wire::join(end, end, &plan),
        Err(WireError::Unsound(_))
    ));
}
