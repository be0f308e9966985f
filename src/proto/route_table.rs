//! Inner address to session to connections: the immutable snapshot that every worker looks packets up in.
//!
//! Control builds a new table whenever a session or a connection comes or goes and gives it to the workers as a whole
//! (an `Arc`); nobody changes one that is in use.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;

/// Names one connection on one worker. A slot is used again; the generation tells its users apart.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ConnectionRef {
    /// Which worker owns it.
    pub worker: u16,
    /// The worker's slot for it.
    pub slot: u32,
    /// Incremented each time the slot is given away.
    pub generation: u32,
}

/// Names one authenticated client for as long as the process lives.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SessionId(pub u64);

/// A session's connections, in the order of their ordinals, which is the same on both hosts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRoute {
    /// Whose connections they are.
    pub session: SessionId,
    /// May be empty: then nothing can be sent to the session.
    pub connections: Vec<ConnectionRef>,
}

impl SessionRoute {
    /// The connection for a flow: always the same one as long as the connections stay the same.
    #[inline]
    fn connection(&self, flow: u32) -> Option<ConnectionRef> {
        // Scales the hash to an index without a division.
        let index = (u64::from(flow) * self.connections.len() as u64) >> 32;
        self.connections.get(index as usize).copied()
    }
}

/// Which connection a packet goes to. Build it, then share it unchanged.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    /// A client's only session takes every packet.
    everything: Option<SessionRoute>,
    sessions: Vec<SessionRoute>,
    /// Inner address (IPv4 mapped into IPv6) to the index in `sessions`.
    addresses: HashMap<u128, u32, BuildHasherDefault<AddressHasher>>,
}

impl RouteTable {
    /// A table in which nothing is found.
    pub fn empty() -> Self {
        Self::default()
    }

    /// A client's table: every destination belongs to the one session.
    pub fn client(route: SessionRoute) -> Self {
        Self {
            everything: Some(route),
            ..Self::default()
        }
    }

    /// A server's table in the making: `addresses` are the session's lease. An address that another session had
    /// goes to this one.
    pub fn insert(&mut self, addresses: &[IpAddr], route: SessionRoute) {
        let index = u32::try_from(self.sessions.len()).expect("fewer sessions than addresses");
        self.sessions.push(route);
        for address in addresses {
            self.addresses.insert(key(*address), index);
        }
    }

    /// The connection for a packet to `dst` whose flow hash is `flow`; none if nobody has the address.
    #[inline]
    pub fn lookup(&self, dst: IpAddr, flow: u32) -> Option<ConnectionRef> {
        self.route(dst)?.connection(flow)
    }

    /// The session that has an address.
    #[inline]
    pub fn route(&self, dst: IpAddr) -> Option<&SessionRoute> {
        if let Some(route) = &self.everything {
            return Some(route);
        }
        let index = *self.addresses.get(&key(dst))?;
        self.sessions.get(index as usize)
    }
}

#[inline]
fn key(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// Cheap, because the keys in the table are ours: a peer chooses what is looked up, never what is inserted.
#[derive(Clone, Copy, Debug, Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    #[inline]
    fn write_u128(&mut self, address: u128) {
        let folded = (address >> 64) as u64 ^ address as u64;
        // The table takes its bucket from the low bits and its tag from the highest: spread to both.
        let product = folded.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}
