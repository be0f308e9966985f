//! An ordinary user has a lab, too, where the machine lets ordinary users have user namespaces.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::unistd::geteuid;

/// An account without any rights.
const NOBODY: u32 = 65534;

#[test]
fn an_ordinary_user_has_a_lab() {
    let directory = tempfile::tempdir_in("/tmp").expect("a directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))
        .expect("a directory of ours");
    if geteuid().is_root() && chown(directory.path(), Some(NOBODY), Some(NOBODY)).is_err() {
        eprintln!("SKIPPED: in a user namespace without other users, where all tests are rootless");
        return;
    }
    // Where the build is, nobody else may look.
    let lab = directory.path().join("lab");
    fs::copy(env!("CARGO_BIN_EXE_lab"), &lab).expect("a copy of the program");
    if !as_nobody(directory.path(), "unshare", &["--user", "true"])
        .status
        .success()
    {
        eprintln!("SKIPPED: this machine has no user namespaces for ordinary users");
        return;
    }

    let lab = lab.to_str().expect("a plain path");
    let up = as_nobody(directory.path(), lab, &["up"]);
    assert!(up.status.success(), "{up:?}");
    let script = "id -u; ping -c 1 192.168.77.1";
    let inside = as_nobody(
        directory.path(),
        lab,
        &["exec", "client", "--", "sh", "-c", script],
    );
    let text = String::from_utf8_lossy(&inside.stdout).into_owned();
    let down = as_nobody(directory.path(), lab, &["down"]);
    assert!(
        text.starts_with("0\n") && text.contains("1 received"),
        "{inside:?}"
    );
    assert!(down.status.success(), "{down:?}");
}

/// Runs a program without root's rights.
fn as_nobody(runtime_directory: &Path, program: &str, arguments: &[&str]) -> Output {
    let mut command = if geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
            program,
        ]);
        command
    } else {
        Command::new(program)
    };
    command
        .args(arguments)
        .env("XDG_RUNTIME_DIR", runtime_directory)
        .stdin(Stdio::null());
    command.output().expect("setpriv")
}
