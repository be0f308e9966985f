//! Log lines and announcements whose failure has no consequences.
//!
//! A log that cannot be written must not end a tunnel, and one that is not read must not hold it up. So a line is
//! written at once or dropped, and dropped lines are counted; the next line that can be written is preceded by their
//! number. Nothing here panics or returns an error.
//!
//! | standard error or output is | how a line is written |
//! | --- | --- |
//! | a pipe or a terminal | through a descriptor of our own, opened anew in non-blocking mode |
//! | a socket | send(2) with `MSG_DONTWAIT` |
//! | anything else, or a pipe or terminal that may not be opened anew | write(2), if poll(2) says that there is room |
//!
//! `O_NONBLOCK` is a property of the open file description, which is shared with the shell and with other processes: it
//! is never set on a descriptor that was inherited.
//!
//! What remains: a pipe that cannot be opened anew (it belongs to a user that is not mapped in this user namespace) is
//! written after poll(2). If another process fills the pipe in between, the write waits until somebody reads. A regular
//! file on a network file system that hangs makes the write wait, too.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};
use tracing_subscriber::EnvFilter;

/// The longest line; what is longer is cut. It is PIPE_BUF (`linux/limits.h`): a pipe takes that much as a whole, so that
/// the lines of two processes do not mix.
pub const LINE_BYTES_MAX: usize = 4096;
/// The end of a line that was cut. The escape sequence ends colours.
const CUT: &[u8] = b"\x1b[0m [...]\n";
/// How often a write is repeated that a signal has interrupted.
const INTERRUPTED_MAX: usize = 3;

/// Where lines go. Can be shared by threads.
#[derive(Debug)]
pub struct Output {
    target: Target,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Target {
    /// The descriptor is ours alone and in non-blocking mode.
    NonBlocking(OwnedFd),
    Socket(OwnedFd),
    /// The open file description may be shared, and in blocking mode.
    Shared(OwnedFd),
    /// There is nothing to write to.
    Nothing,
}

#[derive(Debug, Default)]
struct State {
    dropped_lines: u64,
    /// The last write ended in the middle of a line.
    is_mid_line: bool,
}

impl Output {
    /// Lines go to the file that `descriptor` refers to.
    pub fn new(descriptor: OwnedFd) -> Self {
        Output {
            target: Target::of(descriptor),
            state: Mutex::default(),
        }
    }

    fn of_standard(stream: &impl AsFd) -> Self {
        match stream.as_fd().try_clone_to_owned() {
            Ok(descriptor) => Output::new(descriptor),
            Err(_) => Output {
                target: Target::Nothing,
                state: Mutex::default(),
            },
        }
    }

    /// Writes one line, which ends with a newline, or drops it. Returns at once.
    pub fn write_line(&self, line: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.dropped_lines > 0 || state.is_mid_line {
            let newline = if state.is_mid_line { "\n" } else { "" };
            let notice = match state.dropped_lines {
                0 => newline.to_owned(),
                dropped => format!("{newline}{dropped} log lines were dropped\n"),
            };
            if !self.write_whole(&mut state, notice.as_bytes()) {
                state.dropped_lines += 1;
                return;
            }
            state.dropped_lines = 0;
        }
        if !self.write_whole(&mut state, &cut(line)) {
            state.dropped_lines += 1;
        }
    }

    /// How many lines have been dropped since the last one that was written.
    pub fn dropped_lines(&self) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.dropped_lines
    }

    /// Whether all of `bytes` has been written.
    fn write_whole(&self, state: &mut State, bytes: &[u8]) -> bool {
        match self.target.write(bytes) {
            Ok(0) | Err(_) => false,
            Ok(written) => {
                state.is_mid_line = written < bytes.len() && bytes[written - 1] != b'\n';
                written == bytes.len()
            }
        }
    }
}

impl Target {
    fn of(descriptor: OwnedFd) -> Self {
        let kind = fstat(&descriptor).map_or(SFlag::empty(), |stat| {
            SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
        });
        if kind == SFlag::S_IFSOCK {
            return Target::Socket(descriptor);
        }
        if kind == SFlag::S_IFIFO || descriptor.is_terminal() {
            // A pipe that nobody reads gives ENXIO, and EPIPE when it is written.
            let anew = OpenOptions::new()
                .write(true)
                .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
                .open(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
            if let Ok(anew) = anew {
                return Target::NonBlocking(anew.into());
            }
        }
        Target::Shared(descriptor)
    }

    /// Writes as much as there is room for.
    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let mut result = Err(Errno::EINTR);
        for _ in 0..=INTERRUPTED_MAX {
            if result != Err(Errno::EINTR) {
                break;
            }
            result = match self {
                Target::NonBlocking(descriptor) => nix::unistd::write(descriptor, bytes),
                Target::Socket(descriptor) => {
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    send(descriptor.as_raw_fd(), bytes, flags)
                }
                Target::Shared(descriptor) => write_if_there_is_room(descriptor, bytes),
                Target::Nothing => Err(Errno::EBADF),
            };
        }
        result
    }
}

/// A pipe is writable when it has room for [`LINE_BYTES_MAX`] bytes.
fn write_if_there_is_room(descriptor: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    let mut fds = [PollFd::new(descriptor.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::ZERO)? {
        0 => Err(Errno::EAGAIN),
        _ => nix::unistd::write(descriptor, bytes),
    }
}

/// The line, or as much of it as a line may have.
fn cut(line: &[u8]) -> Cow<'_, [u8]> {
    if line.len() <= LINE_BYTES_MAX {
        return Cow::Borrowed(line);
    }
    let mut kept = LINE_BYTES_MAX - CUT.len();
    // Not within a UTF-8 sequence: continuation bytes are 0b10xxxxxx.
    while kept > 0 && line[kept] & 0b1100_0000 == 0b1000_0000 {
        kept -= 1;
    }
    Cow::Owned([&line[..kept], CUT].concat())
}

/// One log line: the subscriber writes each with a single call.
struct LogLine;

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        stderr().write_line(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error, for log lines and complaints.
fn stderr() -> &'static Output {
    static OUTPUT: OnceLock<Output> = OnceLock::new();
    OUTPUT.get_or_init(|| Output::of_standard(&io::stderr()))
}

/// Standard output, for announcements.
fn stdout() -> &'static Output {
    static OUTPUT: OnceLock<Output> = OnceLock::new();
    OUTPUT.get_or_init(|| Output::of_standard(&io::stdout()))
}

/// Starts logging to standard error. `RUST_LOG` says what is logged; without it, `level` and above.
///
/// The descriptors are opened here, while there are privileges: the daemon is another user later.
pub fn start(level: &str) {
    stdout();
    stderr();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    // An error means that there is a subscriber already, which is as good.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false)
        .with_writer(|| LogLine)
        .try_init();
}

/// Says on standard output what the program is for others to know, such as that the tunnel is up.
pub fn announce(line: &str) {
    stdout().write_line(format!("{line}\n").as_bytes());
}

/// Says on standard error what is wrong, in the program's name.
pub fn complain(line: &str) {
    stderr().write_line(format!("ringtun: {line}\n").as_bytes());
}

/// Like [`complain`], for the panic hook: waits for no lock, because the panicking thread may hold it.
pub fn complain_of_panic(line: &str) {
    let line = format!("ringtun: {line}\n");
    let _ = stderr().target.write(&cut(line.as_bytes()));
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use nix::unistd::pipe;

    use super::*;

    const LINE: &[u8] = b"a line\n";
    /// More lines than any pipe or socket buffer holds by default.
    const MANY: usize = 200_000;

    fn read_available(reader: OwnedFd) -> String {
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).expect("text");
        text
    }

    /// Both ways to write to a pipe.
    fn outputs(writer: OwnedFd) -> [Output; 2] {
        let shared = Output {
            target: Target::Shared(writer.try_clone().expect("a descriptor")),
            state: Mutex::default(),
        };
        let own = Output::new(writer);
        assert!(matches!(own.target, Target::NonBlocking(_)));
        [own, shared]
    }

    #[test]
    fn a_closed_pipe_drops_and_counts() {
        let (reader, writer) = pipe().expect("pipe");
        let outputs = outputs(writer);
        drop(reader);
        for output in outputs {
            output.write_line(LINE);
            output.write_line(LINE);
            assert_eq!(output.dropped_lines(), 2);
        }
        // Closed before it is looked at for the first time.
        let (reader, writer) = pipe().expect("pipe");
        drop(reader);
        let output = Output::new(writer);
        output.write_line(LINE);
        assert_eq!(output.dropped_lines(), 1);
    }

    #[test]
    fn a_full_pipe_drops_counts_and_tells() {
        for which in [0, 1] {
            let (reader, writer) = pipe().expect("pipe");
            // The other one is dropped, so that the reader sees the end.
            let output = outputs(writer).into_iter().nth(which).expect("an output");
            for _ in 0..MANY {
                output.write_line(LINE);
            }
            let dropped = output.dropped_lines();
            assert!(dropped > 0 && dropped < MANY as u64, "{dropped}");
            let mut reader = File::from(reader);
            let mut taken = vec![0; LINE_BYTES_MAX * 2];
            reader.read_exact(&mut taken).expect("a full pipe");
            output.write_line(b"the last\n");
            assert_eq!(output.dropped_lines(), 0);
            drop(output);
            let rest = read_available(reader.into());
            let expected = format!("\n{dropped} log lines were dropped\nthe last\n");
            assert!(rest.ends_with(&expected), "{expected}");
            let written = String::from_utf8(taken).expect("text") + &rest;
            let lines = written.matches("a line\n").count() as u64;
            assert_eq!(lines + dropped, MANY as u64);
        }
    }

    #[test]
    fn a_full_pipe_stays_in_blocking_mode_for_others() {
        let (_reader, writer) = pipe().expect("pipe");
        let others = writer.try_clone().expect("a descriptor");
        let output = Output::new(writer);
        output.write_line(LINE);
        let flags = nix::fcntl::fcntl(&others, nix::fcntl::F_GETFL).expect("flags");
        assert!(!OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn a_full_disk_drops_and_counts() {
        let full = OpenOptions::new().write(true).open("/dev/full");
        let output = Output::new(full.expect("/dev/full").into());
        output.write_line(LINE);
        assert_eq!(output.dropped_lines(), 1);
    }

    #[test]
    fn a_socket_that_is_not_read_drops_and_counts() {
        let (reader, writer) = UnixStream::pair().expect("sockets");
        let output = Output::new(writer.into());
        for _ in 0..MANY {
            output.write_line(LINE);
        }
        assert!(output.dropped_lines() > 0);
        drop(reader);
        output.write_line(LINE);
        assert!(output.dropped_lines() > 1);
    }

    #[test]
    fn a_terminal_that_is_held_drops_and_counts() {
        let terminal = nix::pty::openpty(None, None).expect("a terminal");
        let output = Output::new(terminal.slave);
        assert!(matches!(output.target, Target::NonBlocking(_)));
        // Nobody reads, as after Ctrl-S.
        for _ in 0..MANY {
            output.write_line(LINE);
        }
        let dropped = output.dropped_lines();
        assert!(dropped > 0 && dropped < MANY as u64, "{dropped}");
    }

    #[test]
    fn a_file_is_shared_with_other_writers() {
        let file = tempfile::tempfile().expect("file");
        let mut others = file.try_clone().expect("a descriptor");
        let output = Output::new(file.try_clone().expect("a descriptor").into());
        output.write_line(b"one\n");
        others.write_all(b"two\n").expect("written");
        output.write_line(b"three\n");
        io::Seek::rewind(&mut others).expect("rewound");
        assert_eq!(read_available(others.into()), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let long = "ä".repeat(LINE_BYTES_MAX) + "\n";
        let line = cut(long.as_bytes());
        assert!(line.len() <= LINE_BYTES_MAX && line.ends_with(CUT));
        std::str::from_utf8(&line).expect("whole characters");
        assert_eq!(*cut(LINE), *LINE);
    }

    #[test]
    fn a_line_that_broke_off_is_ended_before_the_next() {
        let (reader, writer) = pipe().expect("pipe");
        let output = Output::new(writer);
        output.state.lock().expect("lock").is_mid_line = true;
        output.write_line(LINE);
        drop(output);
        assert_eq!(read_available(reader), "\na line\n");
    }
}
