//! Signal masks and dispositions, of this process and of programs that it starts.
#![expect(
    unsafe_code,
    reason = "ignoring a signal and preparing a child before exec have no safe wrappers"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

/// Signal numbers that Linux has: 1 to 64, on all architectures that we support.
pub const SIGNAL_MAX: i32 = 64;
/// Numbers that glibc and musl keep for themselves and leave out of every `sigset_t` that they are given.
const LIBRARY_SIGNALS: [i32; 3] = [32, 33, 34];

/// Never blocked and never ignored.
///
/// SIGKILL and SIGSTOP cannot be. SIGTSTP and SIGCONT are the shell's job control. SIGCHLD, SIGURG and SIGWINCH do nothing
/// by default.
const LEFT_ALONE: [Signal; 7] = [
    Signal::SIGKILL,
    Signal::SIGSTOP,
    Signal::SIGTSTP,
    Signal::SIGCONT,
    Signal::SIGCHLD,
    Signal::SIGURG,
    Signal::SIGWINCH,
];

/// Ignored by the keeper and not blocked, because its own writes raise them: to a closed pipe, and to a file that has
/// reached RLIMIT_FSIZE. If they were received, a log line about one would raise the next.
const RAISED_BY_WRITES: [Signal; 2] = [Signal::SIGPIPE, Signal::SIGXFSZ];

/// Blocks every signal that could end or stop this thread and those it will start, and returns those that can be
/// received by signalfd(2). SIGPIPE and SIGXFSZ are ignored instead.
///
/// A fault of the thread itself (SIGSEGV and the like, raised by the kernel) still ends the process: the kernel does not
/// let it be blocked.
///
/// # Errors
/// What pthread_sigmask or sigaction said.
pub fn block_all() -> io::Result<SigSet> {
    for raised in RAISED_BY_WRITES {
        ignore(raised)?;
    }
    let mut blocked = SigSet::all();
    for signal in LEFT_ALONE.into_iter().chain(RAISED_BY_WRITES) {
        blocked.remove(signal);
    }
    blocked.thread_block()?;
    block_library_signals()?;
    Ok(blocked)
}

/// Ignores every signal that could end or stop this process, and unblocks all. To be done while there is one thread.
///
/// SIGTSTP stays as it is, so that Ctrl-Z stops this process with the rest of its group. The C library's own signals
/// cannot be ignored and stay blocked.
///
/// # Errors
/// What pthread_sigmask or sigaction said.
pub fn ignore_all() -> io::Result<()> {
    for ignored in Signal::iterator().filter(|signal| !LEFT_ALONE.contains(signal)) {
        ignore(ignored)?;
    }
    for number in libc::SIGRTMIN()..=libc::SIGRTMAX() {
        // SAFETY: SIG_IGN installs no handler, so no code runs in signal context.
        if unsafe { libc::signal(number, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    SigSet::empty().thread_set_mask()?;
    block_library_signals()
}

/// Starts the program with no signal blocked or ignored, and in a process group of its own: Ctrl-C is for the keeper,
/// and must not end what it runs to put the host in order.
pub fn isolate(command: &mut Command) -> &mut Command {
    let prepare = || {
        for raised in RAISED_BY_WRITES {
            // SAFETY: SIG_DFL installs no handler, so no code runs in signal context.
            unsafe { signal(raised, SigHandler::SigDfl) }?;
        }
        SigSet::empty().thread_set_mask()?;
        Ok(())
    };
    command.process_group(0);
    // SAFETY: sigaction and pthread_sigmask are async-signal-safe, and nothing is allocated.
    unsafe { command.pre_exec(prepare) }
}

/// Whether SIGHUP was ignored when this process was started, as nohup(1) does.
pub fn hangup_is_ignored() -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no action is set, and the old one is written when the call succeeds.
    let action = unsafe {
        if libc::sigaction(libc::SIGHUP, std::ptr::null(), action.as_mut_ptr()) != 0 {
            return false;
        }
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Whether this process has a controlling terminal: the field `tty_nr` of proc_pid_stat(5).
pub fn has_controlling_terminal() -> bool {
    std::fs::read_to_string("/proc/self/stat").is_ok_and(|stat| terminal_of(&stat) != Some(0))
}

/// `tty_nr`, which is the fifth field after the program's name in parentheses.
fn terminal_of(stat: &str) -> Option<i32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(4)?.parse().ok()
}

fn ignore(ignored: Signal) -> Result<(), Errno> {
    // SAFETY: SIG_IGN installs no handler, so no code runs in signal context.
    unsafe { signal(ignored, SigHandler::SigIgn) }.map(drop)
}

/// By the system call: the library's functions leave its own signals out.
fn block_library_signals() -> io::Result<()> {
    let mut mask: u64 = 0;
    for number in LIBRARY_SIGNALS {
        if number < libc::SIGRTMIN() {
            mask |= 1 << (number - 1);
        }
    }
    // SAFETY: the kernel reads eight bytes, which `mask` has, and is given no place for the old mask.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            &raw const mask,
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn field(status: &str, name: &str) -> u64 {
        let line = status.lines().find(|line| line.starts_with(name));
        let mask = line.and_then(|line| line.split_whitespace().last());
        u64::from_str_radix(mask.expect("a mask"), 16).expect("a mask")
    }

    fn status_of_a_child(prepare: fn(&mut Command) -> &mut Command) -> String {
        let mut command = Command::new("cat");
        prepare(command.arg("/proc/self/status"));
        String::from_utf8(command.output().expect("cat").stdout).expect("text")
    }

    #[test]
    fn blocked_signals_do_not_reach_started_programs() {
        // Masks are per thread, so no other test notices.
        let thread = thread::spawn(|| {
            block_all().expect("blocked");
            let inherited = status_of_a_child(|command| command);
            assert_ne!(field(&inherited, "SigBlk:"), 0, "it would inherit them");
            status_of_a_child(isolate)
        });
        let status = thread.join().expect("a thread");
        assert_eq!(field(&status, "SigBlk:"), 0, "{status}");
        let raised = [libc::SIGPIPE, libc::SIGXFSZ].map(|number| 1 << (number - 1));
        let ignored = field(&status, "SigIgn:");
        assert_eq!(ignored & (raised[0] | raised[1]), 0, "{status}");
    }

    #[test]
    fn all_but_job_control_is_blocked() {
        let status = thread::spawn(|| {
            block_all().expect("blocked");
            std::fs::read_to_string("/proc/thread-self/status").expect("status")
        });
        let blocked = field(&status.join().expect("a thread"), "SigBlk:");
        let open: Vec<i32> = (1..=SIGNAL_MAX)
            .filter(|number| blocked & (1 << (number - 1)) == 0)
            .collect();
        let expected = [
            libc::SIGKILL,
            libc::SIGPIPE,
            libc::SIGCHLD,
            libc::SIGCONT,
            libc::SIGSTOP,
            libc::SIGTSTP,
            libc::SIGURG,
            libc::SIGXFSZ,
            libc::SIGWINCH,
        ];
        assert_eq!(open, expected);
    }

    #[test]
    fn the_terminal_is_found_after_any_program_name() {
        assert_eq!(terminal_of("1 (a) b) S 0 1 1 34816 1"), Some(34816));
        assert_eq!(terminal_of("1 (ringtun) S 0 1 1 0 -1"), Some(0));
        assert_eq!(terminal_of(""), None);
    }
}
