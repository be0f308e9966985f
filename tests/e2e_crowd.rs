//! Many sessions at once: all of them work, and while they idle they hold no buffers.

mod common;

use std::path::Path;
use std::time::Duration;

use common::status::{list, number, status};
use common::transfer::{Direction, Transfer};
use common::{RINGTUN, Tunnel, lab, until_true};
use ringtun_lab::Lab;
use ringtun_lab::crowd::{self, Plan};
use ringtun_lab::topology::WEB_V4;
use rstest::rstest;
use serde_json::Value;

/// More than one worker has chunks for.
const SESSIONS: usize = 50;

#[test]
fn a_crowd_is_served() {
    let plan = Plan {
        sessions: SESSIONS,
        active: SESSIONS,
        idle: Duration::from_secs(1),
        bulk_rounds: 0,
        bulk_seconds: 0,
    };
    let mut progress = Vec::new();
    let figures = crowd::run(
        Path::new(RINGTUN),
        plan,
        |_| {},
        |line| progress.push(line.to_owned()),
    );
    let figures = figures.expect("a crowd");
    let table = figures.to_table();
    assert!(!figures.has_failed(), "{table}\n{progress:?}");
    assert_eq!(figures.opened, SESSIONS);
    assert_eq!(figures.connected_at_the_server, SESSIONS);
    // Every reply was checked against its request.
    assert_eq!(figures.echo_replies, SESSIONS * 20, "{table}");
    // The ordinary client beside the crowd has a kernel of its own, that may just have said something.
    assert!(figures.idle_chunks_in_use <= 1, "{table}");
}

/// Reads that wait, or wait for their turn, at an interface queue without RWF_NOWAIT (docs/decisions/005-baseline.md).
const CHAINED_MAX: u64 = 8;

#[rstest]
fn an_idle_connection_holds_no_buffers(lab: Lab) {
    let _tunnel = Tunnel::start(&lab);
    let hosts = [lab.host("client"), lab.host("server")];
    let in_use = |host| {
        let status = status(host);
        let workers = list(&status, "workers");
        let of_worker = |worker: &Value| {
            let in_use = |class| number(worker, &format!("/buffers_in_use/{class}"));
            // Whatever the connections do.
            let chained = match worker["io"]["tun_nowait"] == true {
                true => 0,
                false => CHAINED_MAX,
            };
            let others = ["chunks", "medium_packets", "small_packets"].map(in_use);
            in_use("packets").saturating_sub(chained) + others.iter().sum::<u64>()
        };
        workers.iter().map(of_worker).sum::<u64>()
    };
    let transfer = Transfer::start(hosts[0], lab.host("web"), WEB_V4.into(), Direction::Up);
    for host in hosts {
        until_true("buffers in use", || in_use(host) > 0);
    }
    transfer.finish();
    for host in hosts {
        until_true("buffers back in the pool", || in_use(host) == 0);
    }
}
