//! What was found on a host: values only, so that judging them needs no host.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::keeper::firewall::Blocker;
use crate::keeper::undo::Claim;
use crate::proto::offload::Offloads;
use crate::uring::survey::Survey;
use crate::worker::Rehearsal;

/// Something that would fail, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What is wrong.
    pub found: String,
    /// What to do.
    pub fix: String,
}

impl Trouble {
    /// From an error in the manner of this program: what is wrong, a colon, what to do.
    pub fn told_by(error: &dyn Error) -> Self {
        let line = error.to_string();
        let (found, fix) = line.split_once(": ").unwrap_or((&line, ""));
        let cause = error.source().map(|cause| format!(" ({cause})"));
        Trouble {
            found: format!("{found}{}", cause.unwrap_or_default()),
            fix: fix.to_owned(),
        }
    }
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Findings {
    /// The kernel's own name for its release.
    pub kernel: String,
    /// What the keeper may do.
    pub rights: Rights,
    /// What a daemon's rings and packet memory came to.
    pub rings: Result<Rehearsal, RingTrouble>,
    /// What else io_uring has.
    pub survey: Option<Survey>,
    /// Open files that a daemon may have.
    pub open_files_max: u64,
    /// The tunnel's interface.
    pub tun: Result<TunFound, TunTrouble>,
    /// Whether outer connections can have BBR.
    pub has_bbr: bool,
    /// The clock.
    pub clock: Clock,
    /// Whether run state cannot be kept.
    pub run_directory: Option<Trouble>,
    /// Interfaces with a default route.
    pub uplinks: Uplinks,
    /// Interfaces that drop what comes in by another way than answers would go out (`rp_filter` 1).
    pub strict_reverse_path: Vec<String>,
    /// Whether tables of legacy iptables are there, which nft does not show.
    pub legacy_iptables: bool,
    /// What only a server needs.
    pub server: Option<ServerFound>,
    /// What only a client needs.
    pub client: Option<ClientFound>,
}

/// What the keeper may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// CAP_NET_ADMIN is effective.
    pub net_admin: bool,
    /// And it holds for this network namespace.
    pub network_is_ours: bool,
    /// The daemon can become another user: it need not, or CAP_SETUID and CAP_SETGID are effective.
    pub can_change_user: bool,
    /// Locked memory counts against no limit.
    pub can_lock_memory: bool,
}

/// Why there is no ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingTrouble {
    /// EPERM; with the value of `kernel.io_uring_disabled` where the kernel has it.
    Denied {
        /// The setting's value.
        setting: Option<String>,
    },
    /// Anything else.
    Other(Trouble),
}

/// The tunnel's interface as it was made for a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunFound {
    /// What the kernel takes unsegmented.
    pub offloads: Offloads,
    /// Queues that were opened.
    pub queues: usize,
}

/// Why there would be no interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunTrouble {
    /// The privilege is missing, which is told elsewhere.
    NotPermitted,
    /// Anything else.
    Other(Trouble),
}

/// The clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Since 1970.
    pub unix_seconds: u64,
    /// Whether something keeps it right, where the kernel tells.
    pub is_synchronised: Option<bool>,
}

/// Interfaces with a default route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uplinks {
    /// Of IPv4.
    pub v4: Vec<String>,
    /// Of IPv6.
    pub v6: Vec<String>,
}

/// An interface name and who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameFound {
    /// The interface.
    pub interface: String,
    /// Whether there is one of that name.
    pub exists: bool,
    /// Who of ringtun has claimed it.
    pub claim: Option<Claim>,
}

/// What only a server needs.
#[derive(Clone, Debug)]
pub struct ServerFound {
    /// Its interface's name.
    pub name: NameFound,
    /// Where it would listen.
    pub ports: Vec<(SocketAddr, PortFound)>,
    /// Its packet filter.
    pub filter: Result<(), FilterTrouble>,
    /// The kernel settings that a start makes.
    pub settings: Vec<SettingFound>,
    /// What is in the way of its traffic; `None`: it could not be looked at.
    pub firewalls: Option<Vec<Blocker>>,
    /// Its state directory.
    pub state: Result<StateFound, Trouble>,
    /// Nameservers for clients.
    pub nameservers: Vec<IpAddr>,
    /// Whether those are as configured.
    pub nameservers_configured: bool,
}

/// A port to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortFound {
    /// It can be had.
    Free,
    /// The running ringtun has it.
    Ours {
        /// Its keeper.
        keeper: i32,
    },
    /// Another program has it.
    Busy {
        /// Its name and process number, where they can be seen.
        owner: Option<(String, i32)>,
        /// In the words of a start.
        trouble: Trouble,
    },
    /// It cannot be had for another reason.
    Failed(Trouble),
}

/// Why the server's rules cannot be in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilterTrouble {
    /// There is no `nft`.
    Missing(Trouble),
    /// The privilege is missing, which is told elsewhere.
    NotPermitted,
    /// `nft` or the kernel does not take them.
    Refused(String),
}

/// A kernel setting that a start makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingFound {
    /// Its path under `/proc/sys`.
    pub key: String,
    /// What it has to be.
    pub wanted: &'static str,
    /// What it is.
    pub present: Option<String>,
    /// Whether it can be written.
    pub is_writable: bool,
}

/// The server's state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFound {
    /// Where.
    pub path: PathBuf,
    /// How many peers it has; `None`: it is yet to be made.
    pub peers: Option<usize>,
}

/// What only a client needs.
#[derive(Clone, Debug)]
pub struct ClientFound {
    /// Its interface's name.
    pub name: NameFound,
    /// What is in the way of its traffic; `None`: it could not be looked at.
    pub firewalls: Option<Vec<Blocker>>,
    /// Its resolver.
    pub resolver: Resolver,
}

/// How a client would set its nameservers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolver {
    /// Not at all, by configuration.
    LeftAlone,
    /// By writing resolv.conf in place.
    File {
        /// Whether it may.
        is_writable: bool,
    },
    /// By replacing the link that resolv.conf is.
    Link {
        /// Where it leads.
        target: PathBuf,
        /// Whether it may.
        is_writable: bool,
    },
    /// By making resolv.conf.
    Missing {
        /// Whether it may.
        is_writable: bool,
    },
    /// It cannot be read.
    Unreadable(Trouble),
}
