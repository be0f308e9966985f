//! What the daemons do, and may do, while packets pass.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};

use common::processes::{daemon_of, status_field, threads};
use common::status::{connections, status};
use common::transfer::{Direction, Transfer};
use common::{Tunnel, lab, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringtun_lab::topology::WEB_V4;
use ringtun_lab::{Lab, Process};
use rstest::rstest;

/// How much passes while the workers are watched.
const WATCHED_BYTES: u64 = 64 << 20;
/// What a worker's threads are called, with a number behind.
const WORKER: &str = "ringtun-w";
/// System calls of a worker that move no bytes: memory, locks, clocks, and a look at the path twice a second. Everything
/// else is I/O and is not among them.
const NO_IO: [&str; 16] = [
    "brk",
    "clock_gettime",
    "futex",
    "getrandom",
    "getsockopt",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "restart_syscall",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "setsockopt",
    "gettid",
];

/// As often as a worker has something to tell: of each connection once what its path is like.
const NEWS_MAX: u64 = 4;

#[rstest]
fn workers_do_all_io_by_io_uring(lab: Lab) {
    let tunnel = Tunnel::start(&lab);
    let directory = tempfile::tempdir().expect("a directory");
    let transfers = [Direction::Down, Direction::Up].map(|direction| {
        let (client, web) = (lab.host("client"), lab.host("web"));
        Transfer::start(client, web, WEB_V4.into(), direction)
    });
    // It is the carrying that is watched, and no connection that is added.
    for host in ["client", "server"] {
        until_true("both connections of a fast path", || {
            connections(&status(lab.host(host))).len() == 2
        });
    }
    let mut traces = Vec::new();
    for process in [&tunnel.client, &tunnel.server] {
        let workers = workers_of(process);
        assert!(!workers.is_empty(), "no thread is named {WORKER}");
        for worker in workers {
            traces.push(Trace::start(worker, directory.path()));
        }
    }
    for transfer in &transfers {
        transfer.wait_for_more(WATCHED_BYTES);
    }
    for process in [&tunnel.client, &tunnel.server] {
        let helpers: Vec<_> = threads(daemon_of(process))
            .into_iter()
            .filter(|(_, name)| name.starts_with("iou-wrk"))
            .collect();
        assert!(
            helpers.is_empty(),
            "the kernel does I/O in threads: {helpers:?}"
        );
    }
    let mut entered = 0;
    for trace in traces {
        let (report, calls) = trace.finish();
        entered += calls.get("io_uring_enter").copied().unwrap_or(0);
        let others: Vec<_> = calls
            .iter()
            .filter(|(call, count)| match call.as_str() {
                "io_uring_enter" => false,
                // Control is woken when there is news of a path.
                "write" => **count > NEWS_MAX,
                call => !NO_IO.contains(&call),
            })
            .collect();
        assert!(others.is_empty(), "{others:?} in\n{report}");
    }
    assert!(
        entered > 100,
        "the workers that carried the traffic were watched"
    );
    for transfer in transfers {
        transfer.finish();
    }
}

#[rstest]
fn daemons_have_no_privileges(lab: Lab) {
    let tunnel = Tunnel::start(&lab);
    for process in [&tunnel.client, &tunnel.server] {
        let daemon = daemon_of(process);
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
            assert_eq!(status_field(daemon, set), "0000000000000000", "{set}");
        }
        assert_eq!(status_field(daemon, "NoNewPrivs"), "1");
        for ids in ["Uid", "Gid"] {
            let ids = status_field(daemon, ids);
            assert!(ids.split_whitespace().all(|id| id != "0"), "root's: {ids}");
        }
        assert_eq!(status_field(daemon, "Groups"), "", "no groups are left");
    }
}

/// The thread numbers of a daemon's workers.
fn workers_of(keeper: &Process) -> Vec<i32> {
    let threads = threads(daemon_of(keeper));
    let workers = threads
        .iter()
        .filter(|(_, name)| name.starts_with(WORKER))
        .map(|(number, _)| *number);
    workers.collect()
}

/// `strace -c` on one thread.
struct Trace {
    strace: Child,
    report: std::path::PathBuf,
}

impl Trace {
    fn start(thread: i32, directory: &std::path::Path) -> Trace {
        let report = directory.join(thread.to_string());
        let strace = Command::new("strace")
            .args(["-c", "-qq", "-o"])
            .arg(&report)
            .args(["-p", &thread.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .expect("strace (apt install strace)");
        // It watches from now on.
        common::until_true("strace on a worker", || {
            status_field(thread, "TracerPid") == strace.id().to_string()
        });
        Trace { strace, report }
    }

    /// The report, and how often each system call was made.
    fn finish(mut self) -> (String, BTreeMap<String, u64>) {
        kill(
            Pid::from_raw(self.strace.id().cast_signed()),
            Signal::SIGINT,
        )
        .expect("a running strace");
        self.strace.wait().expect("the end of strace");
        let report = fs::read_to_string(&self.report).expect("a report");
        // % time, seconds, usecs/call, calls, perhaps errors, name.
        let rows = report.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let is_row = words.len() >= 5 && words[0].parse::<f64>().is_ok();
            let name = *words.last()?;
            (is_row && name != "total").then(|| Some((name.to_owned(), words[3].parse().ok()?)))?
        });
        let calls = rows.collect();
        (report, calls)
    }
}
