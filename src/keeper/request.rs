//! What keeper and daemon say to each other, as values.
//!
//! The keeper speaks first, with a [`Setup`] and the descriptors that go with it. Then the daemon sends
//! [`Request`]s, each of which gets one [`Reply`], in order; [`Notice`]s come unasked in between. Each is one JSON
//! frame of [`crate::sys::fdpass`]. The daemon is not trusted with privileges: the keeper checks every request.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::config::{ClientConfig, IoMode, ServerConfig};
use crate::sys::netns::NetnsId;

/// The largest request of a daemon.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// The largest frame of the keeper: thousands of peers and a certificate chain fit.
pub const FROM_KEEPER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Leases that one request may have saved.
pub const LEASES_PER_REQUEST_MAX: usize = 256;
/// More than a lease has as JSON: its longest name, two addresses, three keys.
const LEASE_BYTES_MAX: usize = 200;
const _: () = assert!(LEASES_PER_REQUEST_MAX * LEASE_BYTES_MAX < REQUEST_BYTES_MAX);
/// Addresses that one client may be assigned.
pub const ADDRESSES_MAX: usize = 16;
/// Routes that a server may have its clients set.
pub const ROUTES_MAX: usize = 256;

/// Everything that a daemon starts with.
#[derive(Debug, Serialize, Deserialize)]
pub enum Setup {
    /// For `ringtun server`. Boxed: it is much the larger one.
    Server(Box<ServerSetup>),
    /// For `ringtun client`.
    Client(Box<ClientSetup>),
}

impl Setup {
    /// How many workers there will be: one for each TUN queue.
    pub fn workers(&self) -> usize {
        match self {
            Setup::Server(setup) => setup.tun_queues,
            Setup::Client(setup) => setup.tun_queues,
        }
    }

    /// What of io_uring the workers use.
    pub fn io(&self) -> IoMode {
        match self {
            Setup::Server(setup) => setup.config.io,
            Setup::Client(setup) => setup.config.io,
        }
    }
}

/// Whose daemon it is, for those who ask for its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The keeper's process.
    pub keeper: i32,
    /// The network namespace as the record of changes has it.
    pub namespace: NetnsId,
}

/// What the server's daemon starts with.
#[derive(Serialize, Deserialize)]
pub struct ServerSetup {
    /// Whose daemon it is.
    pub origin: Origin,
    /// The validated configuration.
    pub config: ServerConfig,
    /// The TUN_F_* flags that the kernel accepted for the interface.
    pub tun_offload_flags: u32,
    /// How many of the descriptors that came along are TUN queues; they are the first. The last is the control socket.
    pub tun_queues: usize,
    /// The addresses of the listening sockets that follow them.
    pub listeners: Vec<SocketAddr>,
    /// The certificate chain, DER, end entity first.
    pub certificate_chain: Vec<Vec<u8>>,
    /// The private key, PKCS#8, PKCS#1 or SEC1 DER.
    pub private_key: Vec<u8>,
    /// Inner IPv4 addresses, network address.
    pub pool_v4: Ipv4Net,
    /// Inner IPv6 addresses, network address.
    pub pool_v6: Ipv6Net,
    /// Who may connect.
    pub peers: Vec<Peer>,
    /// Addresses that peers had before.
    pub leases: Vec<SavedLease>,
    /// The nameservers to tell clients.
    pub dns: Vec<IpAddr>,
    /// Whether this host has an IPv6 default route, so that clients may be given one.
    pub ipv6_uplink: bool,
}

/// The private key stays out of logs.
impl std::fmt::Debug for ServerSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerSetup")
            .field("config", &self.config)
            .field("listeners", &self.listeners)
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

/// What the client's daemon starts with.
#[derive(Serialize, Deserialize)]
pub struct ClientSetup {
    /// Whose daemon it is.
    pub origin: Origin,
    /// The validated configuration.
    pub config: ClientConfig,
    /// The invite as text, already found valid. A secret.
    pub invite: String,
    /// The TUN_F_* flags that the kernel accepted for the interface.
    pub tun_offload_flags: u32,
    /// How many TUN queues came along. The control socket follows them.
    pub tun_queues: usize,
}

/// The invite stays out of logs.
impl std::fmt::Debug for ClientSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientSetup")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Somebody who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The name given with `ringtun invite NAME`.
    pub name: String,
    /// SHA-256 of the peer's token.
    pub token_sha256: [u8; 32],
}

/// The inner addresses of one peer, as kept over restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLease {
    /// The peer's name.
    pub peer: String,
    /// Its inner IPv4 address.
    pub v4: Ipv4Addr,
    /// Its inner IPv6 address.
    pub v6: Ipv6Addr,
}

/// What a client's host is to look like while the tunnel is up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelSettings {
    /// Addresses assigned by the server.
    pub addresses: Vec<IpNet>,
    /// What the server offers to carry, as prefixes. A default route becomes two halves.
    pub routes: Vec<IpNet>,
    /// Whether IPv6 is made unreachable, because the tunnel does not carry it.
    pub block_ipv6: bool,
    /// Nameservers to use; none leaves the resolver alone.
    pub dns: Vec<IpAddr>,
}

/// What a daemon asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Server: the workers run, and visitors are let in.
    Ready,
    /// Client: a tuned TCP socket to reach `server` outside of the tunnel, not connected yet, in blocking mode.
    /// The exception route to it is made or refreshed first.
    OuterSocket {
        /// The server's outer address.
        server: IpAddr,
    },
    /// Client: make the host look so. Repeatable; what no longer applies is undone.
    Configure(TunnelSettings),
    /// Server: remember these peers' addresses, all of them or none.
    SaveLeases(Vec<SavedLease>),
    /// The daemon gives up; the keeper cleans up and the program ends with this line and exit code.
    Failed {
        /// The exit code: 1, or 2 for bad configuration.
        exit: u8,
        /// One line that says what to do.
        line: String,
    },
}

/// What a request gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// The socket asked for is the frame's descriptor.
    Socket,
    /// It could not be done; one line that says why.
    Error(String),
}

/// What the keeper says unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// The peers have changed; this is the whole new list.
    Peers(Vec<Peer>),
    /// Take leave of the peers and end, within half a second.
    Stop,
}

/// Any frame of the keeper after the [`Setup`].
#[derive(Debug, Serialize, Deserialize)]
pub enum FromKeeper {
    /// Answers the oldest unanswered request.
    Reply(Reply),
    /// Comes unasked.
    Notice(Notice),
}
