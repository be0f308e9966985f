//! Namespaces without names: a lab host's view of network, mounts and processes.
//!
//! Nothing here leaves a trace in the file system. Namespaces live as long as a descriptor on them, or a
//! process in them, lives. The processes of a lab share one PID namespace whose init reads a pipe held by
//! the lab; when the lab ends, whatever the reason, `kill -9` included, the pipe closes, init ends, and the
//! kernel kills every process of the lab. That is the whole clean-up.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use netns_rs::NetNs;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getegid, geteuid};

/// Where a host keeps the machine's own version of the directories that it shadows.
const LOWER_DIRECTORY: &str = "/run/lab";

/// Why namespaces could not be made, entered or furnished.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Neither root nor in a user namespace of one's own.
    #[error(
        "the lab needs root, or user namespaces for ordinary users (sysctl user.max_user_namespaces, \
         kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)"
    )]
    Unprivileged(#[source] Errno),
    /// A system call on namespaces was refused.
    #[error("{call} failed")]
    Call {
        /// What was tried.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// netns-rs refused.
    #[error("a network namespace could not be opened or entered")]
    NetNs(#[from] netns_rs::Error),
    /// A file or directory in the way of a host's private view.
    #[error("{path} could not be set up in a lab host")]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("`{program}` could not be started")]
    Start {
        /// The program.
        program: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// `mount` in the host said no.
    #[error("/proc could not be mounted in a lab host: {0}")]
    Proc(String),
}

/// The processes of a lab: a PID namespace that ends with the lab.
#[derive(Debug)]
pub struct ProcessTree {
    namespace: Arc<File>,
    init: Ender,
}

/// Ends all processes of a lab, from any thread.
#[derive(Clone, Debug)]
pub struct Ender(Arc<Mutex<Child>>);

impl Ender {
    /// Kills what runs in the lab and returns when the last process is gone. The second time there is
    /// nothing to do.
    pub fn end(&self) {
        let mut init = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // `wait` closes the pipe that init reads.
        let _ = init.wait();
    }
}

impl ProcessTree {
    /// Makes a PID namespace and its init.
    ///
    /// # Errors
    /// When the caller may not make namespaces.
    pub fn new() -> Result<ProcessTree, NamespaceError> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| match errno {
                Errno::EPERM => NamespaceError::Unprivileged(errno),
                source => NamespaceError::Call {
                    call: "unshare(CLONE_NEWPID)",
                    source,
                },
            })?;
            // Orphans become init's children, and a shell that waits reaps all of its children.
            let mut init = Command::new("sh");
            init.args(["-c", "exec 3<&0; cat <&3 & wait $!"]);
            init.stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            init.process_group(0);
            let init = start(&mut init)?;
            let path = PathBuf::from(format!("/proc/{}/ns/pid", init.id()));
            let opened = File::open(&path).map_err(|source| NamespaceError::File { path, source });
            let init = Ender(Arc::new(Mutex::new(init)));
            match opened {
                Ok(namespace) => Ok(ProcessTree {
                    namespace: Arc::new(namespace),
                    init,
                }),
                Err(error) => {
                    init.end();
                    Err(error)
                }
            }
        })
    }

    /// Ends the processes before this value is dropped.
    #[must_use]
    pub fn ender(&self) -> Ender {
        self.init.clone()
    }
}

impl Drop for ProcessTree {
    /// Ends every process of the lab. Returns when the last one is gone.
    fn drop(&mut self) {
        self.init.end();
    }
}

/// One host's network and mount namespace. They vanish with this value and the last process in them.
#[derive(Debug)]
pub struct Namespace {
    net: NetNs,
    mounts: File,
    processes: Arc<File>,
}

/// Where the descriptors of a [`Namespace`] are in the process that holds them.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Descriptors {
    net: i32,
    mounts: i32,
    processes: i32,
}

impl Namespace {
    /// Makes a host: an empty network, and the machine's files with a private `/run`, `/etc`, `/var/lib`,
    /// `/proc` and `/sys`. The loopback interface is still down.
    ///
    /// # Errors
    /// When the caller may not make namespaces or mount in them.
    pub fn new(tree: &ProcessTree) -> Result<Namespace, NamespaceError> {
        let processes = Arc::clone(&tree.namespace);
        let namespace = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).map_err(
                |errno| match errno {
                    Errno::EPERM => NamespaceError::Unprivileged(errno),
                    source => NamespaceError::Call {
                        call: "unshare(CLONE_NEWNET|CLONE_NEWNS)",
                        source,
                    },
                },
            )?;
            let net = netns_rs::get_from_current_thread()?;
            let mounts = PathBuf::from(format!("/proc/self/task/{}/ns/mnt", nix::unistd::gettid()));
            let mounts = File::open(&mounts).map_err(|source| NamespaceError::File {
                path: mounts,
                source,
            })?;
            furnish()?;
            Ok(Namespace {
                net,
                mounts,
                processes,
            })
        })?;
        namespace.mount_proc()?;
        Ok(namespace)
    }

    /// Opens the namespaces that another process holds.
    ///
    /// # Errors
    /// When that process is gone or the caller may not look at it.
    pub fn open(holder: i32, descriptors: Descriptors) -> Result<Namespace, NamespaceError> {
        let path = |descriptor: i32| PathBuf::from(format!("/proc/{holder}/fd/{descriptor}"));
        let open = |descriptor: i32| {
            let path = path(descriptor);
            File::open(&path).map_err(|source| NamespaceError::File { path, source })
        };
        Ok(Namespace {
            net: netns_rs::get_from_path(path(descriptors.net))?,
            mounts: open(descriptors.mounts)?,
            processes: Arc::new(open(descriptors.processes)?),
        })
    }

    /// The numbers by which [`Namespace::open`] finds these namespaces from another process.
    #[must_use]
    pub fn descriptors(&self) -> Descriptors {
        Descriptors {
            net: self.net.file().as_raw_fd(),
            mounts: self.mounts.as_raw_fd(),
            processes: self.processes.as_raw_fd(),
        }
    }

    /// The network namespace, for moving links into it.
    #[must_use]
    pub fn net(&self) -> &NetNs {
        &self.net
    }

    /// The network namespace's number, as in `/proc/PID/ns/net`.
    #[must_use]
    pub fn net_id(&self) -> u64 {
        self.net
            .file()
            .metadata()
            .map_or(0, |metadata| metadata.ino())
    }

    /// Runs `work` on a thread of its own inside the network and mount namespace. Sockets opened there stay
    /// in the host's network when they are carried out. A panic in `work` goes on in the caller.
    ///
    /// # Errors
    /// When the namespaces cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        on_a_thread(|| {
            self.enter()?;
            Ok(work())
        })
    }

    /// Starts a command as a process of the host: in its network, its mounts and the lab's process tree.
    /// The working directory is the caller's where the host has it.
    ///
    /// # Errors
    /// When the namespaces cannot be entered or the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, NamespaceError> {
        on_a_thread(|| {
            let here = std::env::current_dir();
            self.enter()?;
            if let Ok(here) = here {
                // This thread's own directory, since enter() unshared it. "/" serves where there is none.
                let _ = std::env::set_current_dir(here);
            }
            setns(&*self.processes, CloneFlags::CLONE_NEWPID).map_err(|source| {
                NamespaceError::Call {
                    call: "setns(CLONE_NEWPID)",
                    source,
                }
            })?;
            start(command)
        })
    }

    fn enter(&self) -> Result<(), NamespaceError> {
        // A mount namespace can be entered only by who shares root and working directory with nobody.
        unshare(CloneFlags::CLONE_FS).map_err(|source| NamespaceError::Call {
            call: "unshare(CLONE_FS)",
            source,
        })?;
        self.net.enter()?;
        setns(&self.mounts, CloneFlags::CLONE_NEWNS).map_err(|source| NamespaceError::Call {
            call: "setns(CLONE_NEWNS)",
            source,
        })
    }

    /// A /proc shows the PID namespace of whoever mounts it: that has to be a process of the lab.
    fn mount_proc(&self) -> Result<(), NamespaceError> {
        let mut mount = Command::new("mount");
        mount.args(["-n", "-t", "proc", "proc", "/proc"]);
        mount
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let output = self
            .spawn(&mut mount)?
            .wait_with_output()
            .map_err(|source| NamespaceError::Start {
                program: "mount".into(),
                source,
            })?;
        if output.status.success() {
            return Ok(());
        }
        Err(NamespaceError::Proc(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ))
    }
}

/// Makes the caller root of a user namespace of its own, unless it is root already. To be called before a
/// process has a second thread.
///
/// # Errors
/// [`NamespaceError::Unprivileged`] when the machine does not let ordinary users have namespaces.
pub fn become_root() -> Result<(), NamespaceError> {
    let (user, group) = (geteuid(), getegid());
    if user.is_root() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWUSER).map_err(NamespaceError::Unprivileged)?;
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {user} 1"))?;
    write("/proc/self/gid_map", &format!("0 {group} 1"))
}

/// The host's private view of the file system, made in the calling thread's new mount namespace.
fn furnish() -> Result<(), NamespaceError> {
    mount_at("none", "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    mount_at(
        "tmpfs",
        "/run",
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
    )?;
    shadow("/etc", &["resolv.conf", "hosts", "ringtun"])?;
    write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
    write("/etc/resolv.conf", "")?;
    shadow("/var/lib", &["ringtun"])?;
    // Shows this network's interfaces. Some containers forbid it, and nothing in the lab depends on it.
    let _ = mount_at(
        "sysfs",
        "/sys",
        Some("sysfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
    );
    Ok(())
}

/// Lays a writable directory over `directory` in which everything but `hidden` is still there, as links to
/// the machine's own. What a host creates, renames or removes there stays in the host.
fn shadow(directory: &str, hidden: &[&str]) -> Result<(), NamespaceError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| NamespaceError::File { path, source }
    };
    let upper = Path::new(directory);
    let lower =
        Path::new(LOWER_DIRECTORY).join(directory.trim_start_matches('/').replace('/', "-"));
    fs::create_dir_all(&lower).map_err(at(&lower))?;
    mount_at(directory, &lower, None, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    mount_at(
        "tmpfs",
        upper,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
    )?;
    for entry in fs::read_dir(&lower).map_err(at(&lower))? {
        let name = entry.map_err(at(&lower))?.file_name();
        if hidden.iter().any(|hidden| name == *hidden) {
            continue;
        }
        let below = lower.join(&name);
        // A relative link has to stay where it is to point where it did.
        let target = fs::read_link(&below).unwrap_or(below);
        let link = upper.join(&name);
        symlink(&target, &link).map_err(at(&link))?;
    }
    Ok(())
}

fn mount_at(
    source: &str,
    target: impl AsRef<Path>,
    kind: Option<&str>,
    flags: MsFlags,
) -> Result<(), NamespaceError> {
    let target = target.as_ref();
    let mode = (kind == Some("tmpfs")).then_some("mode=755");
    mount(Some(source), target, kind, flags, mode).map_err(|errno| match errno {
        Errno::EPERM => NamespaceError::Unprivileged(errno),
        errno => NamespaceError::File {
            path: target.to_owned(),
            source: errno.into(),
        },
    })
}

fn write(path: &str, contents: &str) -> Result<(), NamespaceError> {
    fs::write(path, contents).map_err(|source| NamespaceError::File {
        path: path.into(),
        source,
    })
}

fn start(command: &mut Command) -> Result<Child, NamespaceError> {
    command.spawn().map_err(|source| NamespaceError::Start {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    })
}

/// Namespaces belong to threads, and one that has changed them is of no further use.
fn on_a_thread<T: Send>(
    work: impl FnOnce() -> Result<T, NamespaceError> + Send,
) -> Result<T, NamespaceError> {
    thread::scope(|scope| {
        scope
            .spawn(work)
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
    })
}
