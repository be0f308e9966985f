//! Little memory that may be locked, and a TUN device without offload: everything works, and the log says how.

mod common;

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::transfer::{Direction, Transfer};
use common::{
    RINGTUN, SOON, Tunnel, UP, assert_no_panic, assert_web_reached, invite, io_options, lab, stop,
};
use ringtun::uring::buffer::BUDGET_BYTES_DEFAULT;
use ringtun_lab::topology::{WEB_V4, WEB_V6};
use ringtun_lab::{Host, Lab, Process};
use rstest::rstest;

/// What has to pass in each direction.
const PASSED_BYTES: u64 = 16 << 20;
/// RLIMIT_MEMLOCK counts what all processes of a user have locked together.
static LOCKED_MEMORY: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    LOCKED_MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts ringtun as somebody who may lock `bytes` of memory and has no privilege that lifts the limit.
fn start_limited(host: &Host, bytes: u64, arguments: &[&str]) -> Process {
    let lifting = "-ipc_lock,-sys_resource";
    host.command("prlimit")
        .arg(format!("--memlock={bytes}:{bytes}"))
        .args(["setpriv", "--bounding-set", lifting, "--inh-caps", lifting])
        .args([RINGTUN, arguments[0]])
        .args(io_options())
        .args(&arguments[1..])
        .spawn()
        .expect("prlimit and setpriv (apt install util-linux)")
}

fn configure(host: &Host, role: &str, text: &str) {
    let script = format!("mkdir -p /etc/ringtun && echo '{text}' > /etc/ringtun/{role}.toml");
    host.exec("sh", ["-c", &script]).expect("a configuration");
}

fn status(host: &Host) -> serde_json::Value {
    let status = host.exec(RINGTUN, ["status", "--json"]).expect("status");
    serde_json::from_str(&status).expect("JSON")
}

fn assert_carries(lab: &Lab) {
    let (client, web) = (lab.host("client"), lab.host("web"));
    assert_web_reached(client);
    for (address, direction) in [
        (IpAddr::from(WEB_V4), Direction::Down),
        (WEB_V6.into(), Direction::Up),
    ] {
        let transfer = Transfer::start(client, web, address, direction);
        transfer.wait_for_more(PASSED_BYTES);
        transfer.finish();
    }
}

#[rstest]
#[case::registered(8 << 20, 2 << 20, true)]
#[case::not_registered(64 << 10, BUDGET_BYTES_DEFAULT as u64, false)]
fn little_memory_may_be_locked(
    lab: Lab,
    #[case] bytes: u64,
    #[case] buffer_bytes: u64,
    #[case] is_registered: bool,
) {
    let _alone = alone();
    configure(lab.host("server"), "server", "workers = 2");
    let server = start_limited(lab.host("server"), bytes, &["server"]);
    server.wait_for_line(UP, SOON).expect("a server that is up");
    let invite = invite(&lab, "client");
    let client = start_limited(lab.host("client"), bytes, &["client", &invite]);
    client.wait_for_line(UP, SOON).expect("a client that is up");
    for (process, host) in [(&server, "server"), (&client, "client")] {
        let size = format!("{} KiB of packet memory", buffer_bytes / 1024);
        process.wait_for_line(&size, SOON).expect("what was chosen");
        if !is_registered {
            let refused = "packet memory is not registered";
            process
                .wait_for_line(refused, SOON)
                .expect("what was refused");
        }
        // Both ends are one user's: the last of their workers may have come too late.
        let status = status(lab.host(host));
        let mut workers = status["workers"].as_array().expect("a list").iter();
        let is_as_wanted = |worker: &serde_json::Value| {
            worker["io"]["buffer_bytes"] == buffer_bytes
                && worker["io"]["buffers_registered"] == is_registered
        };
        assert!(workers.any(is_as_wanted), "{status}");
    }
    assert_carries(&lab);
    for process in [&client, &server] {
        stop(process);
        assert_no_panic(process);
    }
}

#[rstest]
fn no_memory_may_be_locked(lab: Lab) {
    let _alone = alone();
    let server = start_limited(lab.host("server"), 4096, &["server"]);
    if server.wait_for_line(UP, SOON).is_ok() {
        eprintln!("SKIPPED: rings do not count against RLIMIT_MEMLOCK on this kernel");
        return;
    }
    let output = server.output(SOON).expect("an end");
    let complaint = output.errors();
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(complaint.contains("RLIMIT_MEMLOCK"), "{complaint}");
}

#[rstest]
fn without_offload(lab: Lab, #[values("server", "client")] side: &str) {
    configure(lab.host(side), side, "offload = false");
    let _tunnel = Tunnel::start(&lab);
    assert_carries(&lab);
    let offloads = status(lab.host(side)).to_string();
    assert!(offloads.contains("\"tun_offloads\":[]"), "{offloads}");
}
