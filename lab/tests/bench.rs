//! `lab bench` as typed. What it measures is tested in the tests of the workspace, where ringtun is.

use std::process::Command;

#[test]
fn what_cannot_be_written_is_known_at_once() {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_lab"));
    let output = lab
        .args(["bench", "--json", "/nowhere/figures.json"])
        .output()
        .expect("the lab starts");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("/nowhere/figures.json cannot be written") && errors.lines().count() == 1,
        "{errors}"
    );
}
