//! `lab hostile` as typed. What it measures is tested in the tests of the workspace, where ringtun is.

use std::process::{Command, Output};

fn lab_hostile(arguments: &[&str]) -> Output {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_lab"));
    let lab = lab.arg("hostile").args(arguments).output();
    lab.expect("the lab starts")
}

#[test]
fn all_attacks_are_listed_without_a_lab() {
    let output = lab_hostile(&["--list"]);
    assert!(output.status.success(), "{output:?}");
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    for name in ["address-requests-v4", "tiny-records", "status-hammer"] {
        assert!(list.lines().any(|line| line.starts_with(name)), "{list}");
    }
}

#[test]
fn an_unknown_attack_is_a_usage_error() {
    let output = lab_hostile(&["--attack", "charm"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_file_that_cannot_be_written_is_known_at_once() {
    let output = lab_hostile(&["--json", "/nowhere/figures.json"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("/nowhere/figures.json cannot be written") && errors.lines().count() == 1,
        "{errors}"
    );
}
