//! The record of what has been changed, and how it is taken back.
//!
//! One directory under [`RUN_DIR`] for each network namespace and interface holds a lock, which the keeper has
//! for as long as it lives, and the record. A change is recorded before it is made, so a record may name what never came
//! about; undoing is therefore harmless where there is nothing to undo.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Pid, getpid};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use super::request::Origin;
use super::ruleset;
use crate::sys::dns::{self, Saved};
use crate::sys::netns::{self, NetnsId};
use crate::sys::route::Netlink;
use crate::sys::{nft, sysctl};

/// Where run state lives. It is empty again after a reboot, like the state that it describes.
pub const RUN_DIR: &str = "/run/ringtun";

const LOCK_FILE: &str = "lock";
const RECORD_FILE: &str = "undo.json";
const CONTROL_SOCKET: &str = "control.sock";
/// Connections that may wait for the daemon to take them.
const CONTROL_BACKLOG: i32 = 16;
/// How long a keeper that was asked to end may take before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a killed keeper may take to be gone, as seen by its successor.
const CLAIM_TIMEOUT: Duration = Duration::from_millis(500);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Why run state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// The directory cannot be written.
    #[error("cannot write {}: run as root", path.display())]
    NotWritable {
        /// What could not be written.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody is using the interface name.
    #[error(
        "ringtun runs already with the interface {interface} (process {keeper}): stop it with `ringtun down`, or set another `interface` in the configuration"
    )]
    Running {
        /// The interface.
        interface: String,
        /// The process to stop.
        keeper: i32,
    },
    /// This is no network namespace, or `/proc` is missing.
    #[error("cannot tell the network namespace: is /proc mounted?")]
    Namespace(#[source] io::Error),
    /// The running instance does not end.
    #[error("process {keeper} does not end: stop it by hand and run `ringtun down` again")]
    WillNotStop {
        /// The process.
        keeper: i32,
        /// Why it could not be signalled, if that is why.
        #[source]
        source: io::Error,
    },
    /// Some of it could not be undone.
    #[error("not everything could be put back: {}", .0.join("; "))]
    Incomplete(Vec<String>),
}

/// The opposite of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// Remove the tunnel's interface.
    DeleteInterface(String),
    /// Remove an address from the tunnel's interface.
    DeleteAddress {
        /// The interface.
        interface: String,
        /// The address.
        address: IpNet,
    },
    /// Remove a route of ours.
    DeleteRoute(IpNet),
    /// Remove a table of the family `inet`.
    DeleteTable(String),
    /// Set a kernel setting back.
    RestoreSetting {
        /// Its path under `/proc/sys`.
        key: String,
        /// What it was.
        before: String,
        /// What we set it to; if it is something else by now, it is somebody else's. `None`: a side effect changed it.
        ours: Option<String>,
    },
    /// Put the resolver's configuration back.
    RestoreResolvConf {
        /// What was there.
        before: Saved,
        /// What we wrote.
        ours: String,
    },
}

impl Undo {
    /// Takes the change back. Doing so twice, or when the change never came about, is harmless.
    ///
    /// # Errors
    /// One line.
    pub fn carry_out(&self, netlink: &Netlink) -> Result<(), String> {
        #[cfg(test)]
        tests::panic_if_told_to();
        match self {
            Undo::DeleteInterface(name) => netlink.delete_interface(name).map_err(line),
            Undo::DeleteAddress { interface, address } => {
                match nix::net::if_::if_nametoindex(interface.as_str()) {
                    Ok(index) => netlink.delete_address(index, *address).map_err(line),
                    Err(_) => Ok(()),
                }
            }
            Undo::DeleteRoute(destination) => netlink.delete_route(*destination).map_err(line),
            Undo::DeleteTable(name) => nft::delete_table(name).map_err(line),
            Undo::RestoreSetting { key, before, ours } => {
                match sysctl::read(key).map_err(line)? {
                    // The interface is gone, and its settings with it.
                    None => Ok(()),
                    Some(now) if ours.as_ref().is_some_and(|ours| *ours != now) => Ok(()),
                    // One that a killed daemon has left may go in the meantime.
                    Some(_) => match sysctl::write(key, before) {
                        Err(error) if error.is_missing() => Ok(()),
                        written => written.map_err(line),
                    },
                }
            }
            Undo::RestoreResolvConf { before, ours } => {
                dns::restore(Path::new(dns::RESOLV_CONF), before, ours.as_bytes())
                    .map(drop)
                    .map_err(line)
            }
        }
    }

    /// Whether it belongs to one network namespace, and means something else in any other.
    fn is_of_the_namespace(&self) -> bool {
        !matches!(self, Undo::RestoreResolvConf { .. })
    }
}

/// The claim on an interface name in this network namespace, and the record of what was changed for it.
#[derive(Debug)]
pub struct Record {
    directory: PathBuf,
    content: Content,
    _lock: Flock<File>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    keeper: i32,
    namespace: NetnsId,
    interface: String,
    undo: Vec<Undo>,
}

impl Record {
    /// Claims `interface` for this process. What a killed predecessor has left in the record is still in it.
    ///
    /// # Errors
    /// [`UndoError`].
    pub fn claim(interface: &str) -> Result<Self, UndoError> {
        Self::claim_under(Path::new(RUN_DIR), interface)
    }

    fn claim_under(run_dir: &Path, interface: &str) -> Result<Self, UndoError> {
        let namespace = netns::current().map_err(UndoError::Namespace)?;
        let directory = run_dir.join(format!("{}-{interface}", namespace.inode));
        let deadline = Instant::now() + CLAIM_TIMEOUT;
        let lock = loop {
            match try_lock(&directory)? {
                Some(lock) => break lock,
                None if Instant::now() < deadline => thread::sleep(LOCK_POLL_INTERVAL),
                None => {
                    return Err(UndoError::Running {
                        interface: interface.into(),
                        keeper: read(&directory).map_or(0, |content| content.keeper),
                    });
                }
            }
        };
        let mut undo = match read(&directory) {
            Some(left) => {
                let same = left.namespace == namespace;
                let undo = left.undo.into_iter();
                undo.filter(|undo| same || !undo.is_of_the_namespace())
                    .collect()
            }
            None if directory.join(RECORD_FILE).exists() => undo_of_damaged(interface),
            None => Vec::new(),
        };
        undo.shrink_to_fit();
        let record = Record {
            directory,
            content: Content {
                keeper: getpid().as_raw(),
                namespace,
                interface: interface.into(),
                undo,
            },
            _lock: lock,
        };
        record.write()?;
        Ok(record)
    }

    /// Whether there is something to undo.
    pub fn is_empty(&self) -> bool {
        self.content.undo.is_empty()
    }

    /// Records the opposite of a change that is about to be made.
    ///
    /// # Errors
    /// [`UndoError::NotWritable`]; the change must not be made then.
    pub fn push(&mut self, undo: Undo) -> Result<(), UndoError> {
        self.content.undo.push(undo);
        self.write()
    }

    /// Takes one change back and strikes it off the record, when it is there.
    ///
    /// # Errors
    /// One line; it stays on the record then.
    pub fn undo_one(&mut self, netlink: &Netlink, undo: &Undo) -> Result<(), String> {
        undo.carry_out(netlink)?;
        if let Some(at) = self.content.undo.iter().rposition(|other| other == undo) {
            self.content.undo.remove(at);
        }
        self.write().map_err(line)
    }

    /// Takes everything back, the last change first. Goes on after an error; what failed stays on the record.
    ///
    /// # Errors
    /// [`UndoError::Incomplete`] with a line for each.
    pub fn undo_all(&mut self, netlink: &Netlink) -> Result<(), UndoError> {
        self.undo_all_but(None, netlink)
    }

    /// The same, but the table `kept` stays, and on the record.
    ///
    /// # Errors
    /// [`UndoError::Incomplete`] with a line for each.
    pub fn undo_all_but(&mut self, kept: Option<&str>, netlink: &Netlink) -> Result<(), UndoError> {
        let mut left = Vec::new();
        let mut errors = Vec::new();
        while let Some(undo) = self.content.undo.pop() {
            if matches!(&undo, Undo::DeleteTable(name) if Some(name.as_str()) == kept) {
                left.push(undo);
                continue;
            }
            // This may run while a panic unwinds: a second one that left a destructor would abort the process.
            let carried_out = catch_unwind(AssertUnwindSafe(|| undo.carry_out(netlink)));
            if let Err(error) = carried_out.unwrap_or_else(|_| Err("a bug".into())) {
                errors.push(error);
                left.push(undo);
            }
        }
        left.reverse();
        self.content.undo = left;
        if self.content.undo.is_empty() {
            return Ok(());
        }
        self.write()?;
        if errors.is_empty() {
            return Ok(());
        }
        Err(UndoError::Incomplete(errors))
    }

    /// A listening socket in the same directory, for root alone, in place of one that a killed predecessor left.
    ///
    /// # Errors
    /// [`UndoError::NotWritable`].
    pub fn control_socket(&self) -> Result<OwnedFd, UndoError> {
        let path = self.directory.join(CONTROL_SOCKET);
        let listen = || -> io::Result<OwnedFd> {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let socket = Socket::new(Domain::UNIX, Type::STREAM.cloexec(), None)?;
            // The file is made with the mode of the socket, so nobody else can ever connect.
            fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
            socket.bind(&SockAddr::unix(&path)?)?;
            socket.listen(CONTROL_BACKLOG)?;
            Ok(socket.into())
        };
        listen().map_err(|source| UndoError::NotWritable { path, source })
    }

    /// What the daemon is told of this.
    pub fn origin(&self) -> Origin {
        Origin {
            keeper: self.content.keeper,
            namespace: self.content.namespace.clone(),
        }
    }

    /// Removes the files; the record only if nothing is left to undo. The claim lasts until the record is dropped.
    pub fn remove_if_empty(&self) {
        let _ = fs::remove_file(self.directory.join(CONTROL_SOCKET));
        if self.is_empty() {
            // Whoever locks next checks that the locked file is still there, so it may go while it is locked.
            let _ = fs::remove_dir_all(&self.directory);
            // Only if nobody else is in there.
            let _ = self.directory.parent().map(fs::remove_dir);
        }
    }

    fn write(&self) -> Result<(), UndoError> {
        let path = self.directory.join(RECORD_FILE);
        let temporary = path.with_extension("new");
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&serde_json::to_vec(&self.content)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| UndoError::NotWritable { path, source })
    }
}

/// What [`down`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Down {
    /// A running instance was stopped, and has cleaned up.
    Stopped {
        /// Its interface.
        interface: String,
    },
    /// What a killed instance had left was undone.
    CleanedUp {
        /// Its interface.
        interface: String,
    },
}

/// Run files of a server or client in this network namespace, be it running or not.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its interface.
    pub interface: String,
    directory: PathBuf,
}

/// What has become of an [`Instance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Its keeper has the lock.
    Running,
    /// Nobody has the lock, but there is a record.
    Killed,
    /// It has cleaned up behind it.
    Gone,
}

impl Instance {
    /// Where its daemon listens.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.join(CONTROL_SOCKET)
    }

    /// Whether its keeper runs, as far as one may know.
    pub fn life(&self) -> Life {
        let Ok(file) = File::open(self.directory.join(LOCK_FILE)) else {
            return Life::Gone;
        };
        // Held for a moment only: whoever wants to claim the name tries more than once.
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Err((_, Errno::EWOULDBLOCK)) => Life::Running,
            _ if self.directory.join(RECORD_FILE).exists() => Life::Killed,
            _ => Life::Gone,
        }
    }
}

/// All run files of this network namespace, or those of one interface.
///
/// # Errors
/// [`UndoError::Namespace`].
pub fn instances(interface: Option<&str>) -> Result<Vec<Instance>, UndoError> {
    let namespace = netns::current().map_err(UndoError::Namespace)?;
    let prefix = format!("{}-", namespace.inode);
    let Ok(entries) = fs::read_dir(RUN_DIR) else {
        return Ok(Vec::new());
    };
    let instances = entries.flatten().filter_map(|entry| {
        let name = entry.file_name();
        let found = name.to_str()?.strip_prefix(&prefix)?;
        interface
            .is_none_or(|wanted| wanted == found)
            .then(|| Instance {
                interface: found.to_owned(),
                directory: entry.path(),
            })
    });
    Ok(instances.collect())
}

/// Stops what runs in this network namespace, and undoes what was left there, for one interface or for all.
///
/// # Errors
/// [`UndoError`], the first, after all have been tried.
pub fn down(interface: Option<&str>) -> Result<Vec<Down>, UndoError> {
    let mut done = Vec::new();
    let mut error = None;
    for instance in instances(interface)? {
        match down_one(&instance.directory, &instance.interface) {
            Ok(one) => done.extend(one),
            Err(one) => error = error.or(Some(one)),
        }
    }
    error.map_or(Ok(done), Err)
}

/// A claim on an interface's name in this network namespace, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The keeper that has it, or had it.
    pub keeper: i32,
    /// Whether it is a server's: a client sets no table.
    pub is_server: bool,
    /// Whether it runs; otherwise it was killed, and what it set is still there.
    pub is_running: bool,
}

/// Who has claimed `interface`; `None`: nobody, or it cannot be seen. Nothing is changed to find out.
pub fn claim_of(interface: &str) -> Option<Claim> {
    let namespace = netns::current().ok()?;
    let directory = Path::new(RUN_DIR).join(format!("{}-{interface}", namespace.inode));
    let content = read(&directory)?;
    let lock = File::open(directory.join(LOCK_FILE)).ok()?;
    let is_running = Flock::lock(lock, FlockArg::LockSharedNonblock).is_err();
    if content.namespace != namespace || (!is_running && content.undo.is_empty()) {
        return None;
    }
    Some(Claim {
        keeper: content.keeper,
        is_server: content
            .undo
            .iter()
            .any(|undo| matches!(undo, Undo::DeleteTable(_))),
        is_running,
    })
}

fn down_one(directory: &Path, interface: &str) -> Result<Option<Down>, UndoError> {
    let mut stopped = false;
    let mut record = match Record::claim(interface) {
        Err(UndoError::Running { keeper, .. }) => {
            stopped = true;
            stop(directory, keeper)?;
            Record::claim(interface)?
        }
        claimed => claimed?,
    };
    let was_empty = record.is_empty();
    let netlink = Netlink::open().map_err(|error| UndoError::Incomplete(vec![line(error)]))?;
    let undone = record.undo_all(&netlink);
    record.remove_if_empty();
    undone?;
    let interface = interface.to_owned();
    Ok(match (stopped, was_empty) {
        (true, _) => Some(Down::Stopped { interface }),
        (false, true) => None,
        (false, false) => Some(Down::CleanedUp { interface }),
    })
}

/// Asks the keeper that holds the lock to end, and kills it when it does not.
fn stop(directory: &Path, keeper: i32) -> Result<(), UndoError> {
    let will_not = |source: io::Error| UndoError::WillNotStop { keeper, source };
    if keeper <= 0 {
        return Err(will_not(io::ErrorKind::NotFound.into()));
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        match kill(Pid::from_raw(keeper), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(will_not(error.into())),
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if try_lock(directory)?.is_some() {
                return Ok(());
            }
            thread::sleep(LOCK_POLL_INTERVAL);
        }
    }
    Err(will_not(io::ErrorKind::TimedOut.into()))
}

/// Makes the directory and locks it; `None` when somebody else has the lock. A lock file that was removed between opening
/// and locking it, by whoever gave it up, is no lock.
fn try_lock(directory: &Path) -> Result<Option<Flock<File>>, UndoError> {
    let path = directory.join(LOCK_FILE);
    let not_writable = |source| UndoError::NotWritable {
        path: path.clone(),
        source,
    };
    loop {
        // Whoever gives up a claim removes the directory, and RUN_DIR with it; then we try again.
        let vanished = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        match DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
        {
            Err(error) if vanished(&error) => continue,
            created => created.map_err(not_writable)?,
        }
        let opened = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        let file = match opened {
            Err(error) if vanished(&error) => continue,
            opened => opened.map_err(not_writable)?,
        };
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, error)) => return Err(not_writable(error.into())),
        };
        let locked = lock.metadata().map_err(not_writable)?.ino();
        if fs::metadata(&path).is_ok_and(|there| there.ino() == locked) {
            return Ok(Some(lock));
        }
    }
}

/// What must have been done, where the record of it cannot be read. Addresses and routes go with the interface.
fn undo_of_damaged(interface: &str) -> Vec<Undo> {
    tracing::error!(
        "the record of an earlier run with {interface} is damaged: the interface and the nftables table are removed; \
         check /etc/resolv.conf and the sysctl settings by hand"
    );
    let table = Undo::DeleteTable(ruleset::table_name(interface));
    let has_nft = nft::check_installed().is_ok();
    has_nft
        .then_some(table)
        .into_iter()
        .chain([Undo::DeleteInterface(interface.into())])
        .collect()
}

fn read(directory: &Path) -> Option<Content> {
    let text = fs::read(directory.join(RECORD_FILE)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// An error and its causes on one line.
pub(super) fn line(error: impl std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    line
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// Whether the next change that this thread takes back panics.
        pub(crate) static PANIC_ONCE: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn panic_if_told_to() {
        assert!(!PANIC_ONCE.take(), "a bug, for the test");
    }

    #[test]
    fn a_claim_excludes_others_and_ends_with_its_holder() {
        let run = tempfile::tempdir().expect("directory");
        let record = Record::claim_under(run.path(), "rt0").expect("claimed");
        assert!(matches!(
            Record::claim_under(run.path(), "rt0"),
            Err(UndoError::Running { keeper, .. }) if keeper == getpid().as_raw()
        ));
        Record::claim_under(run.path(), "rt1")
            .expect("another name")
            .remove_if_empty();
        record.remove_if_empty();
        drop(record);
        assert!(!run.path().exists());
        Record::claim_under(run.path(), "rt0").expect("claimed again");
    }

    #[test]
    fn the_control_socket_is_its_owners_alone_replaces_a_left_one_and_goes_with_the_record() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        let run = tempfile::tempdir().expect("directory");
        let record = Record::claim_under(run.path(), "rt0").expect("claimed");
        let path = record.directory.join(CONTROL_SOCKET);
        // As a kill would: the file stays.
        drop(record.control_socket().expect("a socket"));
        assert!(path.exists());
        let _listener = record.control_socket().expect("another socket");
        let metadata = fs::metadata(&path).expect("a file");
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        std::os::unix::net::UnixStream::connect(&path).expect("somebody listens");
        let instance = Instance {
            interface: "rt0".into(),
            directory: record.directory.clone(),
        };
        assert_eq!(instance.life(), Life::Running);

        // What could not be undone keeps the record, but not the socket.
        let mut record = record;
        record
            .push(Undo::DeleteTable("ringtun".into()))
            .expect("recorded");
        record.remove_if_empty();
        assert!(!path.exists() && record.directory.exists());
        drop(record);
        assert_eq!(instance.life(), Life::Killed);
        let mut record = Record::claim_under(run.path(), "rt0").expect("claimed again");
        record.content.undo.clear();
        record.remove_if_empty();
        drop(record);
        assert_eq!(instance.life(), Life::Gone);
    }

    #[test]
    fn a_damaged_record_is_not_an_empty_one() {
        for content in ["", "{\"keeper\":"] {
            let run = tempfile::tempdir().expect("directory");
            let record = Record::claim_under(run.path(), "rt0").expect("claimed");
            fs::write(record.directory.join(RECORD_FILE), content).expect("written");
            drop(record);
            let record = Record::claim_under(run.path(), "rt0").expect("claimed");
            let undo = Undo::DeleteInterface("rt0".into());
            assert!(record.content.undo.contains(&undo), "{content:?}");
        }
    }

    #[test]
    fn a_record_outlives_its_writer() {
        let run = tempfile::tempdir().expect("directory");
        let undo = Undo::DeleteTable("ringtun".into());
        let mut record = Record::claim_under(run.path(), "rt0").expect("claimed");
        record.push(undo.clone()).expect("recorded");
        // As a kill would: nothing is undone.
        drop(record);
        let record = Record::claim_under(run.path(), "rt0").expect("claimed");
        assert_eq!(record.content.undo, [undo]);
    }

    #[test]
    fn a_record_of_a_namespace_that_is_gone_is_not_applied_to_its_successor() {
        let run = tempfile::tempdir().expect("directory");
        let resolver = Undo::RestoreResolvConf {
            before: Saved::Missing,
            ours: "ours".into(),
        };
        let mut record = Record::claim_under(run.path(), "rt0").expect("claimed");
        record.content.namespace.cookie = Some(0);
        record
            .push(Undo::DeleteTable("ringtun".into()))
            .expect("recorded");
        record.push(resolver.clone()).expect("recorded");
        drop(record);
        let record = Record::claim_under(run.path(), "rt0").expect("claimed");
        assert_eq!(record.content.undo, [resolver]);
    }

    #[test]
    fn everything_is_tried_although_something_fails() {
        let run = tempfile::tempdir().expect("directory");
        let mut record = Record::claim_under(run.path(), "rt0").expect("claimed");
        let missing = |key: &str| Undo::RestoreSetting {
            key: key.into(),
            before: "0".into(),
            ours: None,
        };
        // Readable, but nobody may write it.
        let read_only = "kernel/ostype";
        record
            .push(missing("net/ipv4/conf/gone0/forwarding"))
            .expect("recorded");
        record.push(missing(read_only)).expect("recorded");
        record
            .push(missing("net/ipv4/conf/gone1/forwarding"))
            .expect("recorded");
        let netlink = Netlink::open().expect("netlink");
        let error = record
            .undo_all(&netlink)
            .expect_err("incomplete")
            .to_string();
        assert!(
            error.contains(read_only) && !error.contains("gone"),
            "{error}"
        );
        assert_eq!(record.content.undo, [missing(read_only)]);
    }
}
