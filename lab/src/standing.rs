//! A lab that stays: `lab up` leaves a process behind that holds it, and later commands find their way into
//! its hosts by that process's descriptors.
//!
//! The holder's record is a file that it keeps locked. The lock, and not the file, says that the lab is
//! there; a holder that was killed leaves a file that nobody has locked, and the next command removes it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{AccessFlags, Pid, access, getuid};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::netns::{Descriptors, Namespace, NamespaceError};
use crate::topology::Lab;

/// Why a standing lab could not be put up, found or ended.
#[derive(Debug, thiserror::Error)]
pub enum StandingError {
    /// The record's file.
    #[error("{path} cannot be used")]
    File {
        /// Which file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// There is one of that name.
    #[error("lab \"{0}\" is up already; `lab down` ends it")]
    Up(String),
    /// There is none of that name.
    #[error("lab \"{0}\" is not up; `lab up` makes it")]
    NotUp(String),
    /// It has no such host.
    #[error("there is no host \"{host}\", but {known}")]
    NoHost {
        /// What was asked for.
        host: String,
        /// What there is.
        known: String,
    },
    /// A name that would not make a file name.
    #[error("a lab's name has to consist of letters, digits, - and _")]
    Name,
    /// The holder would not be signalled.
    #[error("the process that holds the lab could not be signalled")]
    Signal(#[source] Errno),
    /// The hosts could not be entered.
    #[error("the lab's hosts could not be entered")]
    Namespace(#[from] NamespaceError),
}

/// What the holder leaves for others to find.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    holder: i32,
    hosts: Vec<(String, Descriptors)>,
}

/// The holder's side: a lab under a name, for as long as this value lives.
#[derive(Debug)]
pub struct Standing {
    path: PathBuf,
    file: File,
}

impl Standing {
    /// Takes the name. To be called before [`become_root`](crate::netns::become_root), after which it can no
    /// longer be told whose lab it is.
    ///
    /// # Errors
    /// When it is taken, or the record cannot be written.
    pub fn claim(name: &str) -> Result<Standing, StandingError> {
        let path = record_path(name)?;
        let at = |source| StandingError::File {
            path: path.clone(),
            source,
        };
        loop {
            make_directory(&path).map_err(at)?;
            let open = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path);
            let file = match open {
                // The last lab but this one has just ended and taken the directory with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(at)?,
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(StandingError::Up(name.to_owned())),
                Err(TryLockError::Error(source)) => return Err(at(source)),
            }
            // Between opening and locking it, somebody may have removed it as a killed holder's.
            let number = file.metadata().map_err(at)?.ino();
            if fs::metadata(&path).is_ok_and(|metadata| metadata.ino() == number) {
                return Ok(Standing { path, file });
            }
        }
    }

    /// Says where the lab's hosts are.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn publish(&mut self, lab: &Lab) -> Result<(), StandingError> {
        let hosts = lab
            .hosts()
            .iter()
            .map(|host| (host.name().to_owned(), host.namespace().descriptors()));
        let record = Record {
            holder: std::process::id().cast_signed(),
            hosts: hosts.collect(),
        };
        let text = serde_json::to_string(&record).expect("a record of names and numbers");
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.write_all(text.as_bytes()));
        written.map_err(|source| StandingError::File {
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        // While it is still locked: nobody else's record can be in its place.
        forget(&self.path);
    }
}

/// Finds a host of a standing lab. Must be called before the process has a second thread: the lab may be in
/// a user namespace, which then becomes the caller's.
///
/// # Errors
/// When the lab is not up or has no such host.
pub fn find(name: &str, host: &str) -> Result<Host, StandingError> {
    let (_, record) = read(name)?;
    let Some((_, descriptors)) = record.hosts.iter().find(|(known, _)| known == host) else {
        let known: Vec<&str> = record
            .hosts
            .iter()
            .map(|(known, _)| known.as_str())
            .collect();
        return Err(StandingError::NoHost {
            host: host.to_owned(),
            known: known.join(", "),
        });
    };
    enter_user_namespace(record.holder)?;
    Ok(Host::new(
        host,
        Namespace::open(record.holder, *descriptors)?,
    ))
}

/// Ends a standing lab and returns when it is gone.
///
/// # Errors
/// When it is not up or its holder cannot be signalled.
pub fn end(name: &str) -> Result<(), StandingError> {
    let (file, record) = read(name)?;
    match kill(Pid::from_raw(record.holder), Signal::SIGTERM) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => return Err(StandingError::Signal(errno)),
    }
    // The holder's lock goes when the holder does, and that is when the lab has gone.
    file.lock().map_err(|source| StandingError::File {
        path: PathBuf::from(name),
        source,
    })
}

/// Opens and reads the record of a lab that is up.
fn read(name: &str) -> Result<(File, Record), StandingError> {
    let path = record_path(name)?;
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StandingError::NotUp(name.to_owned()));
        }
        Err(source) => return Err(StandingError::File { path, source }),
    };
    let owner = file.metadata().map(|metadata| metadata.uid());
    if !owner.is_ok_and(|owner| owner == getuid().as_raw()) {
        let source = io::ErrorKind::PermissionDenied.into();
        return Err(StandingError::File { path, source });
    }
    if file.try_lock().is_ok() {
        // Its holder was killed.
        forget(&path);
        return Err(StandingError::NotUp(name.to_owned()));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)
        .map_err(|source| StandingError::File { path, source })?;
    // A record that is not complete belongs to a lab that is still being built.
    let record = serde_json::from_str(&text).map_err(|_| StandingError::NotUp(name.to_owned()))?;
    Ok((file, record))
}

/// Removes a record, and the directory with the last one.
fn forget(record: &Path) {
    let _ = fs::remove_file(record);
    let _ = record.parent().map(fs::remove_dir);
}

fn record_path(name: &str) -> Result<PathBuf, StandingError> {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '_';
    if name.is_empty() || !name.chars().all(is_plain) {
        return Err(StandingError::Name);
    }
    Ok(directory().join(format!("{name}.json")))
}

/// Where the records of the caller's labs are.
fn directory() -> PathBuf {
    let private = Path::new("/run");
    match std::env::var_os("XDG_RUNTIME_DIR") {
        // Not so for who is root of a user namespace only.
        _ if access(private, AccessFlags::W_OK).is_ok() => private.join("ringtun-lab"),
        Some(runtime) if !runtime.is_empty() => Path::new(&runtime).join("ringtun-lab"),
        _ => PathBuf::from(format!("/tmp/ringtun-lab-{}", getuid())),
    }
}

/// Makes the directory of a record, unless it is there and the caller's: in /tmp anybody could have made it.
fn make_directory(record: &Path) -> io::Result<()> {
    let Some(directory) = record.parent() else {
        return Ok(());
    };
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            match fs::symlink_metadata(directory)?.uid() == getuid().as_raw() {
                true => Ok(()),
                false => Err(io::ErrorKind::PermissionDenied.into()),
            }
        }
        made => made,
    }
}

/// Joins the user namespace that the holder is in, unless it is the caller's own.
fn enter_user_namespace(holder: i32) -> Result<(), StandingError> {
    let path = PathBuf::from(format!("/proc/{holder}/ns/user"));
    let theirs = File::open(&path).map_err(|source| StandingError::File {
        path: path.clone(),
        source,
    })?;
    let number = |metadata: io::Result<fs::Metadata>| metadata.map(|metadata| metadata.ino()).ok();
    if number(theirs.metadata()) == number(fs::metadata("/proc/self/ns/user")) {
        return Ok(());
    }
    setns(theirs, CloneFlags::CLONE_NEWUSER).map_err(|source| {
        NamespaceError::Call {
            call: "setns(CLONE_NEWUSER)",
            source,
        }
        .into()
    })
}
