//! The topologies with a wire between firewall and internet are as far apart as they should be, and let through what
//! `nat` lets through.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use ringtun_lab::probe::{self, Answer};
use ringtun_lab::topology::{FIREWALL_V4, FIREWALL_V6, WEB_V4, WEB_V6};
use ringtun_lab::wire::Heading;
use ringtun_lab::{Lab, Topology};
use rstest::rstest;

/// What passes has this long, so that a busy machine does not fail the test.
const PASSES: Duration = Duration::from_secs(20);
/// What is dropped is waited for this long.
const DROPPED: Duration = Duration::from_millis(500);
/// How much later than asked the best of some answers may be on a busy machine.
const LATE_US: u64 = 30_000;

#[rstest]
#[case::lossy(Topology::Lossy, 40_000..=40_000)]
#[case::long_fat(Topology::LongFat, 100_000..=100_000)]
#[case::bufferbloat(Topology::Bufferbloat, 40_000..=40_000)]
#[case::mobile(Topology::Mobile, 40_000..=180_000)]
#[case::outage(Topology::Outage, 20_000..=20_000)]
fn the_internet_is_as_far_away_as_asked(
    #[case] topology: Topology,
    #[case] expected_us: std::ops::RangeInclusive<u64>,
) {
    let lab = Lab::build(topology).expect("a lab");
    // Of twenty, all are lost with a probability of nobody's concern.
    for web in [IpAddr::from(WEB_V4), WEB_V6.into()] {
        let ping = lab.host("firewall").ping(web, 20).expect("ping");
        let best = ping.round_trips_us.iter().min().copied();
        let best = best.unwrap_or_else(|| panic!("no answer from {web}"));
        let (least, most) = (*expected_us.start(), *expected_us.end() + LATE_US);
        assert!((least..=most).contains(&best), "{best} us to {web}");
    }
    for (web, firewall) in [
        (IpAddr::from(WEB_V4), IpAddr::from(FIREWALL_V4)),
        (WEB_V6.into(), FIREWALL_V6.into()),
    ] {
        let client = lab.host("client");
        let answer = probe::tcp(client, SocketAddr::new(web, 443), PASSES).expect("the client");
        assert_eq!(answer, Answer::SawSource(firewall));
        let blocked = SocketAddr::new(web, 8080);
        assert!(!probe::connects(client, blocked, DROPPED).expect("the client"));
    }
    let wire = lab.wire().expect("a wire");
    for heading in [Heading::There, Heading::Back] {
        let traffic = wire.traffic(heading);
        assert!(traffic.counts.delivered > 0, "{heading:?}: {traffic:?}");
    }
}

#[test]
fn a_plain_topology_has_no_wire() {
    assert!(Lab::build(Topology::Nat).expect("a lab").wire().is_none());
}

#[test]
fn a_standing_lab_can_be_far_away() {
    let name = format!("far-{}", std::process::id());
    let lab = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        let output = command.args(arguments).output().expect("the lab starts");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    lab(&["up", "--name", &name, "--topology", "long-fat"]);
    let web = WEB_V4.to_string();
    let report = lab(&[
        "exec", "--name", &name, "firewall", "--", "ping", "-c1", "-W5", &web,
    ]);
    lab(&["down", "--name", &name]);
    let time = report
        .split("time=")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let time: f64 = time.expect("an answer").parse().expect("a number");
    assert!(time >= 100.0, "{report}");
}

#[test]
fn a_wire_can_be_tried() {
    let lab = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        let output = command.arg("wire").args(arguments).output();
        output.expect("the lab starts")
    };
    let output = lab(&[
        "--rate",
        "10",
        "--delay",
        "15",
        "--loss",
        "0.5",
        "--seconds",
        "1",
    ]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for word in [
        "round trip",
        "one TCP stream up",
        "one TCP stream down",
        "lost",
    ] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    for arguments in [["--loss", "101"], ["--rate", "-1"], ["--delay", "1000000"]] {
        let output = lab(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {errors}");
    }
}
