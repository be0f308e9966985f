//! Nothing of a lab is left: not when it is dropped, not when its holder is killed, and not while it runs.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::process::{self, Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ringtun_lab::topology::SERVER_V4;
use ringtun_lab::{Lab, Topology};

/// How long the kernel may take to end a lab's processes.
const GONE: Duration = Duration::from_secs(20);
/// Leaves a child behind that has its own session, ignores what can be ignored, and outlives its parent.
const LEAVE_A_STRAY: &str = "(trap '' HUP INT TERM; exec setsid sleep 1000) & echo started";

#[test]
fn a_dropped_lab_leaves_no_process() {
    let lab = Lab::build(Topology::Nat).expect("a lab");
    let networks: Vec<u64> = lab
        .hosts()
        .iter()
        .map(|host| host.namespace().net_id())
        .collect();
    let stray = lab
        .host("server")
        .spawn("sh", ["-c", LEAVE_A_STRAY])
        .expect("sh");
    stray
        .wait_for_line("started", GONE)
        .expect("the stray started");
    assert!(networks_in_use().contains(&lab.host("server").namespace().net_id()));
    drop(lab);
    let in_use = networks_in_use();
    assert!(
        networks.iter().all(|network| !in_use.contains(network)),
        "a process is left"
    );
    // The stray's end of the pipe is closed, too; and a process may outlive its lab's value.
    stray.wait(GONE).expect("sh has ended");
}

#[test]
fn a_killed_holder_leaves_no_process_and_its_name_is_free() {
    let name = format!("killed-{}", process::id());
    let mut holder = hold(&name);
    let mut command = lab(&["exec", "--name", &name, "client", "--", "sh", "-c"]);
    let mut inside = command
        .arg("readlink /proc/self/ns/net; exec sleep 1000")
        .stdout(Stdio::piped())
        .spawn()
        .expect("lab exec");
    let mut output = BufReader::new(inside.stdout.take().expect("a pipe"));
    let network = first_line(&mut output);
    let network = network
        .trim_start_matches("net:[")
        .trim_end_matches(']')
        .parse()
        .expect("a number");
    assert!(networks_in_use().contains(&network));

    holder.kill().expect("a running holder");
    holder.wait().expect("a child");
    output
        .read_to_string(&mut String::new())
        .expect("the end of the output");
    assert_eq!(
        inside.wait().expect("a child").code(),
        Some(128 + 9),
        "killed with the lab"
    );
    let deadline = Instant::now() + GONE;
    while networks_in_use().contains(&network) {
        assert!(Instant::now() < deadline, "a process is left");
        thread::yield_now();
    }

    let status = lab(&["exec", "--name", &name, "client", "--", "true"])
        .status()
        .expect("lab exec");
    assert_eq!(status.code(), Some(1), "the lab is known to be gone");
    let up = lab(&["up", "--name", &name]).status().expect("lab up");
    assert!(up.success(), "the name is free");
    let down = lab(&["down", "--name", &name]).status().expect("lab down");
    assert!(down.success());
}

#[test]
fn a_lab_stays_up_until_down() {
    let name = format!("standing-{}", process::id());
    let lines = |command: &mut Command| {
        String::from_utf8(command.output().expect("lab").stdout).expect("text")
    };
    assert!(
        lab(&["up", "--name", &name])
            .status()
            .expect("lab up")
            .success()
    );
    assert_eq!(
        lab(&["up", "--name", &name])
            .status()
            .expect("lab up")
            .code(),
        Some(1),
        "it is up already"
    );
    let address = lines(&mut lab(&[
        "exec", "--name", &name, "server", "--", "hostname", "-I",
    ]));
    assert!(
        address.contains("198.51.100.10") && address.contains("2001:db8:51::10"),
        "{address}"
    );
    let code = lab(&["exec", "--name", &name, "web", "--", "sh", "-c", "exit 7"])
        .status()
        .expect("lab exec");
    assert_eq!(code.code(), Some(7), "the command's own exit code");
    assert!(
        lab(&["down", "--name", &name])
            .status()
            .expect("lab down")
            .success()
    );
    assert_eq!(
        lab(&["down", "--name", &name])
            .status()
            .expect("lab down")
            .code(),
        Some(1),
        "it is gone"
    );
}

#[test]
fn labs_run_side_by_side() {
    thread::scope(|scope| {
        for number in 0..4_u8 {
            scope.spawn(move || {
                let lab = Lab::build(Topology::Nat).expect("a lab");
                let at = (SERVER_V4, 443);
                let listener = lab
                    .host("server")
                    .enter(|| TcpListener::bind(at))
                    .expect("the host")
                    .expect("the port");
                let near = lab
                    .host("client")
                    .enter(|| TcpStream::connect(at))
                    .expect("the host");
                near.expect("a connection")
                    .write_all(&[number])
                    .expect("a connection");
                let (mut far, _) = listener.accept().expect("a connection");
                let mut heard = [u8::MAX];
                far.read_exact(&mut heard).expect("a byte");
                assert_eq!(heard, [number], "every lab hears its own client");
            });
        }
    });
}

#[test]
fn files_of_a_host_are_its_own() {
    let machine = fs::read("/etc/resolv.conf").ok();
    let lab = Lab::build(Topology::Nat).expect("a lab");
    let (client, server) = (lab.host("client"), lab.host("server"));
    for path in [
        "/etc/ringtun/client.toml",
        "/var/lib/ringtun/lab-test",
        "/run/lab-test",
    ] {
        client
            .write_file(path, "client's")
            .expect("a file of the client");
        assert_eq!(client.read_file(path).expect("the file"), "client's");
        assert!(
            server.read_file(path).is_err(),
            "{path} shows on another host"
        );
        assert!(
            !fs::read(path).is_ok_and(|contents| contents == b"client's"),
            "{path} shows on the machine"
        );
    }
    // It can be replaced as on a real machine, where it may be a mount as well as a file.
    client
        .exec(
            "sh",
            [
                "-c",
                "echo other > /etc/resolv.new && mv /etc/resolv.new /etc/resolv.conf",
            ],
        )
        .expect("mv");
    assert_eq!(
        client.read_file("/etc/resolv.conf").expect("the file"),
        "other\n"
    );
    assert_ne!(
        server.read_file("/etc/resolv.conf").expect("the file"),
        "other\n"
    );
    assert_eq!(fs::read("/etc/resolv.conf").ok(), machine);
    let links = fs::read_dir("/etc").expect("a directory").count();
    assert!(
        links > 1
            && client
                .exec("cat", ["/etc/passwd"])
                .expect("cat")
                .contains("root:"),
        "the rest is there"
    );
}

/// Runs `lab hold` and returns when the lab is there.
fn hold(name: &str) -> Child {
    let mut holder = lab(&["hold", "--name", name, "--topology", "nat"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("lab");
    let mut output = BufReader::new(holder.stdout.take().expect("a pipe"));
    assert_eq!(first_line(&mut output), "up");
    holder
}

/// `lab` with nobody at the terminal.
fn lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn first_line(output: &mut impl BufRead) -> String {
    let mut line = String::new();
    output.read_line(&mut line).expect("a line");
    line.trim_end().to_owned()
}

/// The network namespaces that the machine's processes are in.
fn networks_in_use() -> HashSet<u64> {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|process| Some(fs::metadata(process.path().join("ns/net")).ok()?.ino()))
        .collect()
}
