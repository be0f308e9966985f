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

#[rstest]
fn an_idle_connection_holds_no_buffers(lab: Lab) {
    let _tunnel = Tunnel::start(&lab);
    let hosts = [lab.host("client"), lab.host("server")];
    let in_use = |host| {
        let status = status(host);
        let classes = ["chunks", "packets", "medium_packets", "small_packets"].map(|class| {
            let workers = list(&status, "workers").iter();
            let of_worker = |worker| number(worker, &format!("/buffers_in_use/{class}"));
            workers.map(of_worker).sum::<u64>()
        });
        classes.iter().sum::<u64>()
    };
    // A queue without RWF_NOWAIT has one read waiting, whatever the connections do (docs/decisions/005-baseline.md).
    let of_queues = |host| {
        let status = status(host);
        let workers = list(&status, "workers").iter();
        workers
            .filter(|worker| worker["io"]["tun_nowait"] == false)
            .count() as u64
    };
    let transfer = Transfer::start(hosts[0], lab.host("web"), WEB_V4.into(), Direction::Up);
    for host in hosts {
        until_true("buffers in use", || in_use(host) > of_queues(host));
    }
    transfer.finish();
    for host in hosts {
        until_true("buffers back in the pool", || {
            in_use(host) == of_queues(host)
        });
    }
}
