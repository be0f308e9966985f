//! Processes of lab hosts: started, listened to, waited for with a limit, and always ended.

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::netns::{Namespace, NamespaceError};

/// How much of each output stream is kept; the rest is read and dropped.
pub const OUTPUT_BYTES_MAX: usize = 64 << 20;
/// How long a dropped process may take to end by SIGTERM before it is killed.
pub const GRACE: Duration = Duration::from_secs(2);
/// How long output may still come after a process has ended, from children that it left.
const DRAIN: Duration = Duration::from_secs(1);
/// How many lines of log an error shows.
const LOG_LINES_SHOWN: usize = 30;

/// What a process did other than what was wanted.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("`{program}` was not started")]
    Start {
        /// The command line.
        program: String,
        /// Why.
        #[source]
        source: NamespaceError,
    },
    /// Time ran out.
    #[error("`{program}`: no {awaited} within {limit:?}{log}")]
    TimedOut {
        /// The command line.
        program: String,
        /// What was waited for.
        awaited: String,
        /// How long.
        limit: Duration,
        /// The last lines that it wrote.
        log: Log,
    },
    /// It ended while something else was waited for.
    #[error("`{program}` ended ({status}) before {awaited}{log}")]
    Ended {
        /// The command line.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What was waited for.
        awaited: String,
        /// The last lines that it wrote.
        log: Log,
    },
    /// It ended with a failure.
    #[error("`{program}` failed ({status}){log}")]
    Failed {
        /// The command line.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it wrote.
        log: Log,
    },
}

/// The last lines of a process's output, for error messages.
#[derive(Clone, Debug, Default)]
pub struct Log(Vec<String>);

impl fmt::Display for Log {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|line| write!(formatter, "\n    | {line}"))
    }
}

/// What a finished process left.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// A running process of a lab host. Dropping it ends it: SIGTERM, and after [`GRACE`] SIGKILL to its group.
#[derive(Debug)]
pub struct Process {
    program: String,
    pid: Pid,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Complete lines of both streams in the order of arrival.
    lines: Vec<String>,
    open_streams: u8,
    /// Set under the lock in which the process is reaped: while it is `None`, the pid is still ours.
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` in a host with its output captured and `input` on its standard input.
    pub(crate) fn start(
        host: &Namespace,
        mut command: Command,
        input: Vec<u8>,
    ) -> Result<Process, ProcessError> {
        let program = describe(&command);
        command.stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C ends the lab, and the lab ends its processes.
        command.process_group(0);
        let mut child = host
            .spawn(&mut command)
            .map_err(|source| ProcessError::Start {
                program: program.clone(),
                source,
            })?;

        let pid = Pid::from_raw(child.id().cast_signed());
        let shared = Arc::new(Shared::default());
        shared.lock().open_streams = 2;
        if let Some(mut stdin) = child.stdin.take() {
            // A process that does not read its input to the end is none of our business.
            thread::spawn(move || stdin.write_all(&input));
        }
        if let Some(stdout) = child.stdout.take() {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.follow(stdout, |state| &mut state.stdout));
        }
        if let Some(stderr) = child.stderr.take() {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.follow(stderr, |state| &mut state.stderr));
        }
        let reaper = Arc::clone(&shared);
        thread::spawn(move || reaper.reap(child, pid));
        Ok(Process {
            program,
            pid,
            shared,
        })
    }

    /// Its process id as seen from outside of the lab, for `/proc`, `strace` and the like.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// How many lines it has written so far, for [`Process::wait_for_line_after`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.shared.lock().lines.len()
    }

    /// All complete lines that it has written so far, standard output and error as they came.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.shared.lock().lines.clone()
    }

    /// Waits for a line, already written or to come, that contains `pattern`, and returns it.
    ///
    /// # Errors
    /// When the limit passes or the process ends first; the error shows the end of its log.
    pub fn wait_for_line(&self, pattern: &str, limit: Duration) -> Result<String, ProcessError> {
        self.wait_for_line_after(0, pattern, limit)
    }

    /// Like [`Process::wait_for_line`], but overlooks the first `mark` lines.
    ///
    /// # Errors
    /// When the limit passes or the process ends first; the error shows the end of its log.
    pub fn wait_for_line_after(
        &self,
        mark: usize,
        pattern: &str,
        limit: Duration,
    ) -> Result<String, ProcessError> {
        let found = |lines: &[String]| {
            let line = lines.iter().skip(mark).find(|line| line.contains(pattern));
            line.cloned()
        };
        self.find_in_lines(&format!("line with \"{pattern}\""), limit, found)
    }

    /// Waits until `enough` likes the lines that it has written so far; `awaited` says what that would be.
    ///
    /// # Errors
    /// When the limit passes or the process ends first; the error shows the end of its log.
    pub fn wait_for_lines(
        &self,
        awaited: &str,
        limit: Duration,
        enough: impl Fn(&[String]) -> bool,
    ) -> Result<(), ProcessError> {
        self.find_in_lines(awaited, limit, |lines| enough(lines).then_some(()))
    }

    fn find_in_lines<T>(
        &self,
        awaited: &str,
        limit: Duration,
        find: impl Fn(&[String]) -> Option<T>,
    ) -> Result<T, ProcessError> {
        let done = |state: &State| find(&state.lines).is_some() || state.is_over();
        let state = self.wait_until(limit, done);
        match (find(&state.lines), state.status) {
            (Some(found), _) => Ok(found),
            (None, Some(status)) if state.is_over() => Err(ProcessError::Ended {
                program: self.program.clone(),
                status,
                awaited: awaited.to_owned(),
                log: state.log(),
            }),
            (None, _) => Err(self.timed_out(&state, awaited.to_owned(), limit)),
        }
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// When the limit passes first; the process goes on.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus, ProcessError> {
        let state = self.wait_until(limit, |state| state.status.is_some());
        state
            .status
            .ok_or_else(|| self.timed_out(&state, "end".to_owned(), limit))
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn status(&self) -> Option<ExitStatus> {
        self.shared.lock().status
    }

    /// Sends a signal; a process that has ended is left alone.
    pub fn signal(&self, signal: Signal) {
        let state = self.shared.lock();
        if state.status.is_none() {
            // It is not reaped yet, so the pid is still its own; a zombie takes the signal silently.
            let _ = kill(self.pid, signal);
        }
    }

    /// Asks it to end by SIGTERM and waits.
    ///
    /// # Errors
    /// When the limit passes first.
    pub fn stop(&self, limit: Duration) -> Result<ExitStatus, ProcessError> {
        self.signal(Signal::SIGTERM);
        self.wait(limit)
    }

    /// Waits for the end and returns all output. When the limit passes the process is ended.
    ///
    /// # Errors
    /// When the limit passes first.
    pub fn output(self, limit: Duration) -> Result<Output, ProcessError> {
        let status = self.wait(limit)?;
        let mut state = self.wait_until(DRAIN, State::is_over);
        let (stdout, stderr) = (
            std::mem::take(&mut state.stdout),
            std::mem::take(&mut state.stderr),
        );
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    fn wait_until(&self, limit: Duration, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        while !done(&state) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                break;
            };
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state
    }

    fn timed_out(&self, state: &State, awaited: String, limit: Duration) -> ProcessError {
        ProcessError::TimedOut {
            program: self.program.clone(),
            awaited,
            limit,
            log: state.log(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status().is_some() || self.stop(GRACE).is_ok() {
            return;
        }
        {
            let state = self.shared.lock();
            if state.status.is_none() {
                let _ = killpg(self.pid, Signal::SIGKILL);
            }
        }
        // Until the whole group has let go of the output.
        drop(self.wait_until(GRACE, State::is_over));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(&self, mut stream: impl Read, kept: fn(&mut State) -> &mut Vec<u8>) {
        let mut chunk = [0; 4096];
        let mut line = Vec::new();
        loop {
            let bytes = match stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let mut state = self.lock();
            let kept = kept(&mut state);
            let room = OUTPUT_BYTES_MAX - kept.len();
            kept.extend_from_slice(&chunk[..bytes.min(room)]);
            if room > 0 {
                for byte in &chunk[..bytes] {
                    match byte {
                        b'\n' => state.lines.push(text(&std::mem::take(&mut line))),
                        byte => line.push(*byte),
                    }
                }
            }
            self.changed.notify_all();
        }
        let mut state = self.lock();
        if !line.is_empty() {
            state.lines.push(text(&line));
        }
        state.open_streams -= 1;
        self.changed.notify_all();
    }

    fn reap(&self, mut child: Child, pid: Pid) {
        // First only look: reaping frees the pid, and that must not happen while somebody sends it a signal.
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR)
        {
        }
        let mut state = self.lock();
        state.status = child.wait().ok();
        self.changed.notify_all();
    }
}

impl State {
    /// It has ended and its last line is here.
    fn is_over(&self) -> bool {
        self.status.is_some() && self.open_streams == 0
    }

    fn log(&self) -> Log {
        let skipped = self.lines.len().saturating_sub(LOG_LINES_SHOWN);
        Log(self.lines[skipped..].to_vec())
    }
}

impl Output {
    pub(crate) fn checked(self, program: &str) -> Result<Output, ProcessError> {
        if self.status.success() {
            return Ok(self);
        }
        let lines: Vec<String> = [self.text(), self.errors()]
            .concat()
            .lines()
            .map(str::to_owned)
            .collect();
        let skipped = lines.len().saturating_sub(LOG_LINES_SHOWN);
        let log = Log(lines[skipped..].to_vec());
        Err(ProcessError::Failed {
            program: program.to_owned(),
            status: self.status,
            log,
        })
    }
}

/// The command line for error messages; the directory of the program is left out.
pub(crate) fn describe(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program())
        .file_name()
        .unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\r')
        .to_owned()
}
