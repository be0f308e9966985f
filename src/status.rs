//! What `ringtun status` shows: one document for each running server or client.
//!
//! The daemon fills it in (`control/status.rs`) and sends it as JSON by its control socket; the command reads it
//! ([`query`]) and prints it as it is or for people ([`text`]). `docs/status.md` describes it for those who read the
//! JSON. Fields may be added; [`FORMAT`] changes when one is removed or comes to mean something else. No secret is ever
//! in it.

pub mod query;
pub mod text;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::IoMode;
use crate::stats::{ConnectionCounts, WorkerCounts};
use crate::sys::netns::NetnsId;
use crate::sys::tcp_info::TcpInfo;

/// The version of the document.
pub const FORMAT: u32 = 1;

/// Which side it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `ringtun server`.
    Server,
    /// `ringtun client`.
    Client,
}

/// Everything about one running server or client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// ringtun's version.
    pub version: String,
    /// Which side it is.
    pub role: Role,
    /// The tunnel's interface.
    pub interface: String,
    /// Its MTU.
    pub mtu_bytes: u16,
    /// The network namespace, as the record of changes has it.
    pub network_namespace: NetnsId,
    /// The privileged process, the one to signal.
    pub keeper_pid: i32,
    /// The unprivileged process.
    pub daemon_pid: u32,
    /// How long it has been running.
    pub up_seconds: f64,
    /// What was asked for: the best that the kernel has, or only what Linux 5.10 has. What came of it is with the workers.
    pub io_mode: IoMode,
    /// What the tunnel's interface takes unsegmented, by name.
    pub tun_offloads: Vec<String>,
    /// A server's own part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    /// A client's own part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Client>,
    /// The threads that move packets, by index.
    pub workers: Vec<Worker>,
    /// Who is connected, by peer name; a client has the one that it keeps up. The last field, so that the daemon can send
    /// it piece by piece.
    pub sessions: Vec<Session>,
}

/// A server's own part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// Where its peers are kept: an absolute path without links.
    #[serde(default)]
    pub state_dir: PathBuf,
    /// Where it listens.
    pub listeners: Vec<SocketAddr>,
    /// Inner IPv4 addresses for clients.
    pub pool_v4: IpNet,
    /// Inner IPv6 addresses for clients.
    pub pool_v6: IpNet,
    /// How many are invited.
    pub peers: usize,
    /// Whether clients get IPv6.
    pub ipv6_uplink: bool,
    /// Nameservers that clients are told.
    pub dns: Vec<IpAddr>,
    /// Connections before they are tunnels, and those that never become one.
    #[serde(default)]
    pub unauthenticated: Unauthenticated,
}

/// Connections that are no tunnels (yet): how many there are, and what has become of others since
/// the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unauthenticated {
    /// Connections at this moment, with those that are about to become tunnels.
    pub connected: u64,
    /// IPv4 /24s and IPv6 /48s that `connected` come from.
    pub networks: u64,
    /// IPv4 addresses and IPv6 /64s that `connected` come from.
    pub sources: u64,
    /// Connections that listeners have accepted.
    pub accepted: u64,
    /// Closed at once: the limit was reached by connections that are about to become tunnels.
    pub refused: u64,
    /// Evicted because of the limit for all: `visitors`.
    pub evicted_total_limit: u64,
    /// Evicted because of the limit for an IPv4 /24 or IPv6 /48: `visitors_per_network`.
    pub evicted_network_limit: u64,
    /// Evicted because of the limit for an IPv4 address or IPv6 /64: `visitors_per_source`.
    pub evicted_source_limit: u64,
    /// Evicted because the process or the host had no descriptors or memory left.
    pub evicted_shortage: u64,
    /// TLS handshakes that had to wait because of their source's rate.
    pub handshakes_delayed: u64,
    /// Connections that were closed because the turn of their TLS handshake did not come in time.
    pub handshakes_dropped: u64,
    /// TLS handshakes that failed.
    pub handshake_failures: u64,
    /// Closed because a handshake, request or answer took too long.
    pub timeouts: u64,
    /// Requests that were answered like a web server does.
    pub web_requests: u64,
    /// Requests for a tunnel with a token of no peer.
    pub wrong_tokens: u64,
}

impl Unauthenticated {
    /// Connections evicted for any reason.
    pub fn evicted(&self) -> u64 {
        self.evicted_total_limit
            + self.evicted_network_limit
            + self.evicted_source_limit
            + self.evicted_shortage
    }
}

/// How a client's tunnel stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// There was no connection yet.
    Connecting,
    /// At least one connection is there.
    Up,
    /// All connections are gone, and it tries to get one.
    Reconnecting,
}

/// A client's own part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Client {
    /// How the tunnel stands.
    pub state: State,
    /// For how long it has stood so.
    pub state_seconds: f64,
    /// The server as the invite names it, `HOST:PORT`.
    pub server: String,
    /// The connections that it keeps up.
    pub connections_wanted: usize,
    /// Addresses that the server assigned.
    pub addresses: Vec<IpNet>,
    /// What goes through the tunnel.
    pub routes: Vec<IpNet>,
    /// Whether IPv6 is blocked, because the server carries none.
    pub ipv6_blocked: bool,
    /// Nameservers in use while the tunnel is up; none leaves the host's own.
    pub dns: Vec<IpAddr>,
    /// What went wrong last at each of the server's addresses, since a connection last succeeded.
    pub failures: Vec<String>,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// How it uses io_uring.
    pub io: WorkerIo,
    /// Packet memory that is handed out, to connections or the interface; half a second old at most.
    #[serde(default)]
    pub buffers_in_use: BuffersInUse,
    /// What it has counted; what was dropped is in the `dropped_` fields, by reason.
    pub counters: WorkerCounts,
}

/// How a worker uses io_uring: what was found out when it started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerIo {
    /// How its ring is set up: `deferred`, `cooperative` or `plain`.
    pub ring: String,
    /// Whether it reads the TUN queue in batches that never wait (Linux 6.4), and not packet by packet.
    pub tun_nowait: bool,
    /// Packet memory that it was to have.
    pub buffer_bytes_wanted: u64,
    /// Packet memory that it has; less than wanted where RLIMIT_MEMLOCK allowed no more to be registered.
    pub buffer_bytes: u64,
    /// Whether that is registered with the ring, which it is a moment after the start.
    pub buffers_registered: bool,
}

/// Pooled buffers that are not in the pool, by kind. An idle connection has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuffersInUse {
    /// For ciphertext, 128 to 384 KiB each.
    pub chunks: u64,
    /// For packets and plaintext, 92 KiB each.
    pub packets: u64,
    /// For packets of a few segments that wait, 12 KiB each.
    pub medium_packets: u64,
    /// For small packets that wait, 2 KiB each.
    pub small_packets: u64,
}

/// Connections with one token and one client process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// The peer's name; a client does not know the name that the server has for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The client process, by the random identifier that it chose.
    pub instance: String,
    /// The client's inner addresses.
    pub addresses: Vec<IpAddr>,
    /// A server's: what the peer had before, and has beside its connections. Left out where all is zero.
    #[serde(default, skip_serializing_if = "is_default")]
    pub past: Past,
    /// Its connections, by ordinal; none while the client is away.
    pub connections: Vec<Connection>,
}

/// What a peer has had since the server's start, or since its invite was made, beside its present connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Past {
    /// Connections that are closing.
    pub closing: usize,
    /// Connections that the peer has ended.
    pub ended_closed: u64,
    /// Connections that were lost: reset, ended without close_notify, silent for too long.
    pub ended_lost: u64,
    /// Connections that were ended because the peer broke the protocol.
    pub ended_misbehaved: u64,
    /// Connections that the server has ended: replaced, superseded, turned away.
    pub ended_replaced: u64,
    /// What was counted on connections that have ended.
    pub counters: ConnectionCounts,
}

/// Memory of a worker that a connection holds; half a second old at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    /// Buffers for ciphertext, 128 to 384 KiB each.
    pub chunks: u64,
    /// Buffers for packets that wait and for an unfinished capsule, 92 KiB each.
    pub packets: u64,
    /// Buffers for packets of a few segments that wait, 12 KiB each.
    pub medium_packets: u64,
    /// Buffers for small packets that wait, 2 KiB each.
    pub small_packets: u64,
    /// Bytes of control capsules that wait to be sent.
    pub control_bytes: u64,
    /// Bytes outside the packet memory: parts of records and capsules, and sealed records that could not be sent.
    pub outside_bytes: u64,
}

/// One TCP connection of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// Its place in the session.
    pub ordinal: u8,
    /// The other side's outer address.
    pub peer_address: SocketAddr,
    /// The index of the worker that has it.
    pub worker: u16,
    /// How long it has carried packets.
    pub age_seconds: f64,
    /// How long ago something was received.
    pub received_age_seconds: f64,
    /// Whether a keepalive stays unanswered; then the session's other connections have its flows.
    #[serde(default)]
    pub silent: bool,
    /// The application protocol, by ALPN; empty if none was asked for.
    pub alpn: String,
    /// TLS: the cipher suite.
    pub cipher_suite: String,
    /// TLS: the group of the key exchange.
    pub key_exchange: String,
    /// What the peer takes unsegmented, by name; null for a peer that knows plain packets only.
    pub peer_offloads: Option<Vec<String>>,
    /// Packets that wait to be sent.
    pub queue_packets: u64,
    /// Their bytes.
    pub queue_bytes: u64,
    /// Bytes that are sealed and that the socket has not taken.
    #[serde(default)]
    pub ahead_bytes: u64,
    /// How many of them there may be, by what the path delivers in some milliseconds.
    #[serde(default)]
    pub ahead_bytes_max: u64,
    /// Memory that it holds. Left out where all is zero, as for an idle connection.
    #[serde(default, skip_serializing_if = "is_default")]
    pub held: Held,
    /// What was counted; what was dropped is in the `dropped_` fields, by reason, and what was refused to the peer in the
    /// `refused_` ones.
    pub counters: ConnectionCounts,
    /// What the kernel says of the TCP connection.
    pub tcp: TcpInfo,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Report {
    /// The document in pieces that together are what serde_json would make of it, so that a long list of sessions needs
    /// neither much memory nor much time at once.
    ///
    /// # Errors
    /// Nothing here can fail to be JSON.
    pub fn into_pieces(mut self) -> serde_json::Result<Pieces> {
        const END: &str = "]}";
        let sessions = std::mem::take(&mut self.sessions);
        let mut head = serde_json::to_string(&self)?;
        assert!(head.ends_with("\"sessions\":[]}"), "the last field");
        head.truncate(head.len() - END.len());
        Ok(Pieces {
            head: Some(head),
            sessions: sessions.into_iter(),
            is_first: true,
            is_finished: false,
        })
    }
}

/// See [`Report::into_pieces`].
#[derive(Debug)]
pub struct Pieces {
    head: Option<String>,
    sessions: std::vec::IntoIter<Session>,
    is_first: bool,
    is_finished: bool,
}

impl Pieces {
    /// Sessions of one piece.
    const SESSIONS: usize = 32;

    /// The next piece; none after the last.
    ///
    /// # Errors
    /// Nothing here can fail to be JSON.
    pub fn next_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.is_finished {
            return Ok(None);
        }
        let mut piece = self.head.take().unwrap_or_default().into_bytes();
        for session in self.sessions.by_ref().take(Self::SESSIONS) {
            if !std::mem::take(&mut self.is_first) {
                piece.push(b',');
            }
            serde_json::to_writer(&mut piece, &session)?;
        }
        if self.sessions.len() == 0 {
            self.is_finished = true;
            piece.extend_from_slice(b"]}\n");
        }
        Ok(Some(piece))
    }
}

#[cfg(test)]
pub(crate) mod examples {
    use super::*;

    /// A connection like any other.
    pub(crate) fn connection(ordinal: u8) -> Connection {
        Connection {
            ordinal,
            peer_address: "203.0.113.5:41234".parse().expect("address"),
            worker: 1,
            age_seconds: 75.0,
            received_age_seconds: 0.25,
            silent: false,
            alpn: "http/1.1".into(),
            cipher_suite: "TLS13_AES_128_GCM_SHA256".into(),
            key_exchange: "X25519MLKEM768".into(),
            peer_offloads: Some(vec!["csum".into(), "tso4".into()]),
            queue_packets: 3,
            queue_bytes: 4096,
            ahead_bytes: 512,
            ahead_bytes_max: 8192,
            held: Held::default(),
            counters: ConnectionCounts {
                sent_packets: 1000,
                sent_bytes: 1 << 30,
                received_packets: 10,
                received_bytes: 1500,
                dropped_spoofed: 2,
                ..ConnectionCounts::default()
            },
            tcp: TcpInfo::default(),
        }
    }

    /// A session with one connection.
    pub(crate) fn session(peer: &str) -> Session {
        Session {
            peer: Some(peer.into()),
            instance: "00".repeat(16),
            addresses: vec![IpAddr::from([10, 87, 0, 2])],
            past: Past::default(),
            connections: vec![connection(0)],
        }
    }

    /// A client's part, in the middle of an outage.
    pub(crate) fn client() -> Client {
        Client {
            state: State::Reconnecting,
            state_seconds: 12.5,
            server: "server.example:443".into(),
            connections_wanted: 2,
            addresses: vec!["10.87.0.2/32".parse().expect("prefix")],
            routes: vec!["0.0.0.0/0".parse().expect("prefix")],
            ipv6_blocked: true,
            dns: Vec::new(),
            failures: vec!["198.51.100.10:443: connection refused".into()],
        }
    }

    /// A server with these sessions.
    pub(crate) fn server(sessions: Vec<Session>) -> Report {
        Report {
            format: FORMAT,
            version: "0.1.0".into(),
            role: Role::Server,
            interface: "ringtun0".into(),
            mtu_bytes: 1500,
            network_namespace: NetnsId {
                inode: 4_026_531_840,
                cookie: Some(1),
                boot: "boot".into(),
            },
            keeper_pid: 10,
            daemon_pid: 11,
            up_seconds: 7384.0,
            io_mode: IoMode::Auto,
            tun_offloads: vec!["csum".into(), "tso4".into(), "tso6".into()],
            server: Some(Server {
                state_dir: "/var/lib/ringtun".into(),
                listeners: vec!["[::]:443".parse().expect("address")],
                pool_v4: "10.87.0.0/16".parse().expect("prefix"),
                pool_v6: "fd00::/64".parse().expect("prefix"),
                peers: 3,
                ipv6_uplink: true,
                dns: Vec::new(),
                unauthenticated: Unauthenticated {
                    connected: 250,
                    networks: 2,
                    sources: 6,
                    accepted: 12_000,
                    evicted_total_limit: 700,
                    evicted_source_limit: 50,
                    handshakes_delayed: 20,
                    handshakes_dropped: 4,
                    handshake_failures: 3,
                    timeouts: 30,
                    web_requests: 60,
                    wrong_tokens: 1,
                    ..Unauthenticated::default()
                },
            }),
            client: None,
            workers: vec![Worker {
                buffers_in_use: BuffersInUse::default(),
                io: WorkerIo {
                    ring: "deferred".into(),
                    tun_nowait: true,
                    buffer_bytes_wanted: 32 << 20,
                    buffer_bytes: 16 << 20,
                    buffers_registered: true,
                },
                counters: WorkerCounts {
                    tun_read_packets: 12,
                    dropped_no_route: 4,
                    ..WorkerCounts::default()
                },
            }],
            sessions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(report: Report) -> (usize, Vec<u8>) {
        let mut pieces = report.into_pieces().expect("pieces");
        let (mut count, mut longest, mut all) = (0, 0, Vec::new());
        while let Some(piece) = pieces.next_piece().expect("a piece") {
            count += 1;
            longest = longest.max(piece.len());
            all.extend(piece);
        }
        assert!(longest < 64 * 1024, "a piece of {longest} bytes");
        (count, all)
    }

    #[test]
    fn the_pieces_are_the_document() {
        for sessions in [0, 1, 2, 31, 32, 33, 64, 100] {
            let sessions: Vec<_> = (0..sessions)
                .map(|number| examples::session(&format!("peer{number}")))
                .collect();
            let report = examples::server(sessions);
            let mut whole = serde_json::to_vec(&report).expect("JSON");
            whole.push(b'\n');
            assert_eq!(joined(report).1, whole);
        }
    }

    /// The names of all fields.
    fn names(value: &serde_json::Value, found: &mut std::collections::BTreeSet<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    found.insert(name.clone());
                    names(value, found);
                }
            }
            serde_json::Value::Array(values) => {
                values.iter().for_each(|value| names(value, found));
            }
            _ => {}
        }
    }

    #[test]
    fn every_field_is_described() {
        let mut session = examples::session("alice");
        session.past.closing = 1;
        session.connections[0].held.chunks = 1;
        let mut report = examples::server(vec![session]);
        report.client = Some(examples::client());
        let mut found = std::collections::BTreeSet::new();
        names(&serde_json::to_value(&report).expect("JSON"), &mut found);
        let page = include_str!("../docs/status.md");
        // In code, with or without a path in front, and `dropped_` is left out.
        let is_described = |name: &str| {
            let name = name.strip_prefix("dropped_").unwrap_or(name);
            ["`", "."].iter().any(|before| {
                ["`", "[]`"]
                    .iter()
                    .any(|after| page.contains(&format!("{before}{name}{after}")))
            })
        };
        let missing: Vec<_> = found
            .iter()
            .filter(|name| {
                let groups = ["io", "counters", "held", "past"];
                !groups.contains(&name.as_str()) && !is_described(name)
            })
            .collect();
        assert!(missing.is_empty(), "not in docs/status.md: {missing:?}");
    }

    #[test]
    fn thousands_of_sessions_come_in_small_pieces_and_can_be_read_again() {
        let sessions: Vec<_> = (0..5000)
            .map(|number| examples::session(&format!("peer{number}")))
            .collect();
        let report = examples::server(sessions);
        let (pieces, bytes) = joined(report.clone());
        assert_eq!(pieces, 5000_usize.div_ceil(Pieces::SESSIONS));
        assert!(bytes.len() < query::ANSWER_BYTES_MAX as usize / 4);
        let read: Report = serde_json::from_slice(&bytes).expect("a report");
        assert_eq!(read, report);
    }
}
