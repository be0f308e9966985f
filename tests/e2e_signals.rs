//! No signal that can be caught leaves anything behind, and no stray one ends a tunnel.

mod common;

use common::host_state::HostState;
use common::processes::{daemon_of, in_host, is_gone, number_in_host};
use common::{
    RINGTUN, SOON, Tunnel, UP, assert_ended, assert_web_reached, invite, lab, start_server, stop,
    until_true,
};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use ringtun_lab::{Host, Lab, Process};
use rstest::rstest;

/// Signals that ask for nothing. SIGTTIN and SIGTTOU would stop a process, all others would end it. From 32 on they have no
/// names; the C library keeps 32 and 33 for itself.
const STRAY: &str = "USR1 USR2 ALRM VTALRM PROF PIPE IO PWR STKFLT XCPU XFSZ ABRT SEGV BUS FPE ILL TRAP SYS TTIN TTOU \
                     CHLD URG WINCH CONT 32 33 34 35 50 63 64";

#[rstest]
fn stray_signals_end_no_tunnel(lab: Lab) {
    let tunnel = Tunnel::start(&lab);
    let sides = [
        (lab.host("client"), &tunnel.client),
        (lab.host("server"), &tunnel.server),
    ];
    let daemons = sides.map(|(_, keeper)| daemon_of(keeper));
    for (host, keeper) in sides {
        // To the keeper alone, and to both.
        let pid = number_in_host(keeper.pid());
        let script = format!(
            "for signal in {STRAY}; do kill -$signal {pid} && kill -$signal -- -{pid} || exit 1; done"
        );
        host.exec("bash", ["-c", &script]).expect("signals sent");
    }
    assert_web_reached(lab.host("client"));
    let after = sides.map(|(_, keeper)| daemon_of(keeper));
    assert_eq!(after, daemons, "the same daemons as before");
    stop(&tunnel.client);
    stop(&tunnel.server);
}

#[rstest]
fn signals_that_stop_leave_nothing(
    lab: Lab,
    #[values(Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT)] signal: Signal,
    #[values(true, false)] whole_group: bool,
) {
    let before = ["client", "server"].map(|name| HostState::of(lab.host(name)));
    let tunnel = Tunnel::start(&lab);
    for keeper in [&tunnel.client, &tunnel.server] {
        let pid = Pid::from_raw(keeper.pid());
        let sent = if whole_group {
            killpg(pid, signal)
        } else {
            kill(pid, signal)
        };
        sent.expect("a running process");
        assert_ended(keeper, 0);
    }
    for (name, before) in ["client", "server"].into_iter().zip(before) {
        assert_restored(lab.host(name), &before);
    }
}

#[rstest]
fn hangup_of_a_terminal_leaves_nothing(lab: Lab) {
    let host = lab.host("server");
    let before = HostState::of(host);
    let command = format!("exec {RINGTUN} server");
    let terminal = host
        .spawn("script", ["-qec", &command, "/dev/null"])
        .expect("script");
    terminal.wait_for_line(UP, SOON).expect("a server");
    let keeper = daemon_of(&terminal);
    kill(Pid::from_raw(keeper), Signal::SIGHUP).expect("a running keeper");
    until_true("end of the keeper", || is_gone(keeper));
    assert_ended(&terminal, 0);
    assert_restored(host, &before);
}

#[rstest]
fn hangup_without_a_terminal_reloads(lab: Lab) {
    let server = without_terminal(lab.host("server"), &["server"]);
    let invite = invite(&lab, "client");
    let client = without_terminal(lab.host("client"), &["client", &invite]);
    for (process, line) in [
        (&server, "SIGHUP: the peers are read again, 1 of them"),
        (&client, "SIGHUP: a client has nothing to reload"),
    ] {
        let keeper = Pid::from_raw(daemon_of(process));
        kill(keeper, Signal::SIGHUP).expect("a running keeper");
        process.wait_for_line(line, SOON).expect("a log line");
    }
    assert_web_reached(lab.host("client"));
    for process in [&client, &server] {
        let keeper = Pid::from_raw(daemon_of(process));
        kill(keeper, Signal::SIGTERM).expect("a running keeper");
        assert_ended(process, 0);
    }
}

#[rstest]
fn job_control_stops_and_continues(lab: Lab) {
    let server = start_server(&lab, &[]);
    let pids = [server.pid(), daemon_of(&server)];
    let group = Pid::from_raw(server.pid());
    killpg(group, Signal::SIGTSTP).expect("a running group");
    for pid in pids {
        until_true("a stopped process", || is_stopped(pid));
    }
    killpg(group, Signal::SIGCONT).expect("a running group");
    for pid in pids {
        until_true("a process that goes on", || !is_stopped(pid));
    }
    lab.host("server")
        .exec(RINGTUN, ["status"])
        .expect("it answers again");
    stop(&server);
}

/// Starts ringtun in a session of its own, where there is no controlling terminal. The keeper is the process's child.
fn without_terminal(host: &Host, arguments: &[&str]) -> Process {
    let process = host
        .command("setsid")
        .args(["--wait", RINGTUN])
        .args(arguments)
        .spawn()
        .expect("setsid");
    process.wait_for_line(UP, SOON).expect("it is up");
    process
}

fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let (_, fields) = stat.rsplit_once(") ").expect("fields");
    fields.starts_with('T')
}

fn assert_restored(host: &Host, before: &HostState) {
    assert_eq!(in_host(host), [""; 0], "a process is left");
    before.assert_same(&HostState::of(host), "after the end");
}
