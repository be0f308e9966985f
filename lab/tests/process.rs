//! Programs on hosts: output, input, lines awaited, limits kept.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use ringtun_lab::process::ProcessError;
use ringtun_lab::{Lab, Topology};
use rstest::{fixture, rstest};

/// For what has to happen.
const SOON: Duration = Duration::from_secs(20);
/// For what must not happen.
const SHORT: Duration = Duration::from_millis(200);

#[fixture]
fn lab() -> Lab {
    Lab::build(Topology::Nat).expect("a lab")
}

#[rstest]
fn output_is_kept_byte_for_byte(lab: Lab) {
    let output = lab
        .host("web")
        .run("sh", ["-c", "printf 'a\\0b'; printf 'c\\nd' >&2; exit 3"])
        .expect("sh");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"a\0b");
    assert_eq!(output.stderr, b"c\nd");
}

#[rstest]
fn input_arrives_and_the_environment_too(lab: Lab) {
    let command = lab
        .host("web")
        .command("sh")
        .args(["-c", "cat; echo $WHO"])
        .env("WHO", "me")
        .input("hello ");
    assert_eq!(command.exec().expect("sh"), "hello me\n");
}

#[rstest]
fn exec_fails_with_the_program_and_shows_its_complaint(lab: Lab) {
    let error = lab
        .host("web")
        .exec("sh", ["-c", "echo broken >&2; exit 1"])
        .expect_err("a failure");
    assert!(
        matches!(error, ProcessError::Failed { .. }) && error.to_string().contains("broken"),
        "{error}"
    );
}

#[rstest]
fn a_line_is_awaited(lab: Lab) {
    let process = lab
        .host("web")
        .command("sh")
        .args(["-c", "echo one; read _; echo two; cat"])
        .input("\n");
    let process = process.spawn().expect("sh");
    assert_eq!(process.wait_for_line("wo", SOON).expect("the line"), "two");
    assert_eq!(process.lines(), ["one", "two"]);
    let error = process
        .wait_for_line_after(process.mark(), "one", SHORT)
        .expect_err("no further line");
    assert!(
        error.to_string().contains("| two"),
        "the log is shown: {error}"
    );
}

#[rstest]
fn an_end_cuts_the_waiting_short(lab: Lab) {
    let process = lab
        .host("web")
        .spawn("sh", ["-c", "echo last words; exit 4"])
        .expect("sh");
    let error = process.wait_for_line("never", SOON).expect_err("it ended");
    assert!(
        matches!(error, ProcessError::Ended { status, .. } if status.code() == Some(4)),
        "{error}"
    );
    assert!(error.to_string().contains("last words"), "{error}");
}

#[rstest]
fn a_limit_ends_the_program(lab: Lab) {
    let error = lab
        .host("web")
        .command("sleep")
        .arg("1000")
        .limit(SHORT)
        .run()
        .expect_err("too slow");
    assert!(matches!(error, ProcessError::TimedOut { .. }), "{error}");
    assert_ends(&lab, "sleep");
}

#[rstest]
fn a_dropped_process_ends_with_its_group(lab: Lab) {
    let stubborn = lab
        .host("web")
        .spawn(
            "sh",
            ["-c", "trap '' TERM; echo on; sleep 1000; sleep 1000"],
        )
        .expect("sh");
    stubborn.wait_for_line("on", SOON).expect("the trap is set");
    drop(stubborn);
    assert_ends(&lab, "sleep");
}

#[rstest]
fn signals_arrive(lab: Lab) {
    let process = lab.host("web").spawn(
        "sh",
        [
            "-c",
            "trap 'exit 5' INT; echo on; while :; do sleep 0.1; done",
        ],
    );
    let process = process.expect("sh");
    process.wait_for_line("on", SOON).expect("the trap is set");
    process.signal(Signal::SIGINT);
    assert_eq!(process.wait(SOON).expect("the end").code(), Some(5));
    process.signal(Signal::SIGKILL);
    assert_eq!(
        process.status().and_then(|status| status.code()),
        Some(5),
        "the dead get no signals"
    );
}

#[rstest]
fn what_does_not_exist_does_not_start(lab: Lab) {
    let error = lab
        .host("web")
        .run("no-such-program", ["x"])
        .expect_err("no program");
    assert!(matches!(error, ProcessError::Start { .. }), "{error}");
}

/// Waits until no process of that name is left in the lab.
fn assert_ends(lab: &Lab, name: &str) {
    let deadline = Instant::now() + SOON;
    while lab
        .host("web")
        .run("pgrep", ["-x", name])
        .expect("pgrep")
        .status
        .success()
    {
        assert!(Instant::now() < deadline, "{name} goes on");
    }
}
