//! Output that cannot be written, or that nobody reads, ends no tunnel and holds none up.

mod common;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use common::{
    RINGTUN, assert_web_reached, build, inner_addresses, io_options, lab, start_server, stop,
    until, until_true,
};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use ringtun_lab::{Host, Lab, Process, Topology};
use rstest::rstest;

/// Where output goes that cannot be written. The shell becomes the keeper, so that it has the process's id.
const CLOSED_PIPE: &str = "> >(exec head -n 1 >/dev/null) 2>&1";
const FULL_DISK: &str = ">/dev/full 2>&1";
const UNREAD_PIPE: &str = "> >(exec sleep 1000 >/dev/null 2>&1) 2>&1";
/// More than a pipe holds: 64 KiB at most.
const PIPE_BYTES: usize = 65536;

#[rstest]
#[case::closed_pipe(CLOSED_PIPE)]
#[case::full_disk(FULL_DISK)]
#[case::unread_pipe(UNREAD_PIPE)]
fn a_tunnel_works_without_its_output(lab: Lab, #[case] redirected: &str) {
    let server = start(lab.host("server"), &["server"], redirected);
    until_true("a server that listens", || {
        let status = lab.host("server").run(RINGTUN, ["status"]).expect("status");
        status.status.success()
    });
    let invite = common::invite(&lab, "client");
    let client = start(lab.host("client"), &["client", &invite], redirected);
    until_true("a client that is up", || {
        let link = lab.host("client").run("ip", ["link", "show", "ringtun0"]);
        link.expect("ip").status.success()
            && common::addresses(lab.host("client"), "ringtun0").len() == 2
    });
    inner_addresses(lab.host("client"));
    for keeper in [&client, &server] {
        log_much(keeper);
    }
    assert_web_reached(lab.host("client"));
    if redirected == UNREAD_PIPE {
        for keeper in [&client, &server] {
            assert_drops_are_told(keeper);
        }
    }
    for keeper in [&client, &server] {
        stop(keeper);
    }
}

#[rstest]
fn commands_end_in_order_without_their_output(lab: Lab) {
    let _server = start_server(&lab, &[]);
    let host = lab.host("server");
    // A closed pipe is the reader's wish; a full disk is an error of the command.
    let commands = [
        ("peers", 1),
        ("status", 1),
        ("status --json", 1),
        ("doctor --role client", 1),
        ("invite alice --host server", 1),
        ("--help", 0),
        ("--version", 0),
    ];
    host.exec(RINGTUN, ["invite", "somebody", "--host", "server"])
        .expect("so that there is something to list");
    for (command, code_if_full) in commands {
        let run = |redirected: &str| {
            let script = format!("{RINGTUN} {command} {redirected}; exit ${{PIPESTATUS[0]}}");
            let output = host.run("bash", ["-c", &script]).expect("bash");
            assert!(
                !output.errors().contains("panicked"),
                "{command}: {}",
                output.errors()
            );
            output.status.code()
        };
        assert_eq!(
            run(">/dev/full"),
            Some(code_if_full),
            "{command} on a full disk"
        );
        assert_ne!(run("2>&1 | true"), Some(101), "{command} on a closed pipe");
    }
    let peers = host.exec(RINGTUN, ["peers"]).expect("peers");
    assert!(peers.contains("somebody"), "{peers}");
}

#[rstest]
fn an_invite_that_nobody_saw_is_taken_back() {
    let lab = build(Topology::Nat);
    let host = lab.host("server");
    let script = format!("{RINGTUN} invite alice --host server >/dev/full");
    let output = host.run("bash", ["-c", &script]).expect("bash");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(host.exec(RINGTUN, ["peers"]).expect("peers"), "");
    // The name is free again.
    common::invite(&lab, "alice");
}

fn start(host: &Host, arguments: &[&str], redirected: &str) -> Process {
    let script = format!("exec \"$0\" \"$@\" {redirected}");
    host.command("bash")
        .args(["-c", &script, RINGTUN, arguments[0]])
        .args(io_options())
        .args(&arguments[1..])
        .env("RUST_LOG", "trace")
        .spawn()
        .expect("bash")
}

/// Has the keeper log more than a pipe holds: a line for each signal that it ignores.
fn log_much(keeper: &Process) {
    for _ in 0..20_000 {
        keeper.signal(Signal::SIGUSR1);
        keeper.signal(Signal::SIGUSR2);
    }
}

/// Reads what the keeper and its daemon have written so far, and then that lines were dropped.
fn assert_drops_are_told(keeper: &Process) {
    let mut pipe = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(format!("/proc/{}/fd/2", keeper.pid()))
        .expect("the keeper's standard error");
    let before = read_available(&mut pipe);
    assert!(
        before.len() > PIPE_BYTES / 2,
        "the pipe was full: {}",
        before.len()
    );
    let mut after = String::new();
    until("number of dropped lines", || {
        keeper.signal(Signal::SIGUSR1);
        after += &read_available(&mut pipe);
        after.contains(" log lines were dropped\n").then_some(())
    });
}

fn read_available(pipe: &mut File) -> String {
    let mut bytes = Vec::new();
    match pipe.read_to_end(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        other => panic!("the pipe has writers: {other:?}"),
    }
    String::from_utf8(bytes).expect("text")
}
