//! Inner address to session to connections: the immutable snapshot that every worker looks packets up in.
//!
//! Control makes a new table whenever a session or a connection comes or goes and gives it to the workers as a whole
//! (an `Arc`); nobody changes one that is in use.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

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

/// Which connection a packet goes to. Change it, then share a clone, which nobody changes.
///
/// Clones share what is alike in them: a change copies no more than the shards of the addresses it is about, so that
/// with thousands of sessions one more costs little.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    /// A client's only session takes every packet.
    everything: Option<SessionRoute>,
    v4: Shards<u32>,
    v6: Shards<u128>,
}

/// Parts of a map from addresses to sessions.
const SHARDS: usize = 64;

/// A map in [`SHARDS`] parts, by the addresses' last bits, in which leases that follow each other differ. Empty before
/// the first entry.
#[derive(Clone, Debug)]
struct Shards<A>(Vec<Arc<Shard<A>>>);

type Shard<A> = HashMap<A, Arc<SessionRoute>, BuildHasherDefault<AddressHasher>>;

/// An address as a number.
trait Address: Copy + Eq + Hash {
    fn shard(self) -> usize;
}

impl Address for u32 {
    #[inline]
    fn shard(self) -> usize {
        self as usize % SHARDS
    }
}

impl Address for u128 {
    #[inline]
    fn shard(self) -> usize {
        self as usize % SHARDS
    }
}

impl<A> Default for Shards<A> {
    fn default() -> Self {
        Shards(Vec::new())
    }
}

impl<A: Address> Shards<A> {
    #[inline]
    fn get(&self, address: A) -> Option<&SessionRoute> {
        let shard = self.0.get(address.shard())?;
        shard.get(&address).map(|route| &**route)
    }

    fn insert(&mut self, address: A, route: &Arc<SessionRoute>) {
        if self.0.is_empty() {
            self.0 = vec![Arc::default(); SHARDS];
        }
        let shard = Arc::make_mut(&mut self.0[address.shard()]);
        shard.insert(address, Arc::clone(route));
    }

    fn remove(&mut self, address: A, session: SessionId) {
        if self
            .get(address)
            .is_some_and(|route| route.session == session)
        {
            Arc::make_mut(&mut self.0[address.shard()]).remove(&address);
        }
    }
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

    /// A server's session comes, or has other connections now: `addresses` are its lease. An address that another
    /// session had goes to this one.
    pub fn insert(&mut self, addresses: &[IpAddr], route: SessionRoute) {
        let route = Arc::new(route);
        for address in addresses {
            match address {
                IpAddr::V4(address) => self.v4.insert(address.to_bits(), &route),
                IpAddr::V6(address) => self.v6.insert(address.to_bits(), &route),
            }
        }
    }

    /// A session goes, and with it those of `addresses` that are still its own.
    pub fn remove(&mut self, addresses: &[IpAddr], session: SessionId) {
        for address in addresses {
            match address {
                IpAddr::V4(address) => self.v4.remove(address.to_bits(), session),
                IpAddr::V6(address) => self.v6.remove(address.to_bits(), session),
            }
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
        match dst {
            IpAddr::V4(address) => self.v4.get(address.to_bits()),
            IpAddr::V6(address) => self.v6.get(address.to_bits()),
        }
    }
}

/// Cheap, because the keys in the table are ours: a peer chooses what is looked up, never what is inserted.
#[derive(Clone, Copy, Debug, Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    #[inline]
    fn write_u32(&mut self, address: u32) {
        self.write_u64(u64::from(address));
    }

    #[inline]
    fn write_u64(&mut self, bits: u64) {
        // The table takes its bucket from the low bits and its tag from the highest: spread to both.
        let product = bits.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }

    #[inline]
    fn write_u128(&mut self, address: u128) {
        self.write_u64((address >> 64) as u64 ^ address as u64);
    }

    /// Only here because the trait asks for it: addresses come by the methods above.
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn route(session: u64, connections: u32) -> SessionRoute {
        let connections = (0..connections)
            .map(|slot| ConnectionRef {
                worker: slot as u16 % 2,
                slot,
                generation: session as u32,
            })
            .collect();
        SessionRoute {
            session: SessionId(session),
            connections,
        }
    }

    #[test]
    fn an_empty_table_finds_nothing() {
        let dst = IpAddr::from(Ipv4Addr::new(10, 87, 0, 2));
        assert_eq!(RouteTable::empty().lookup(dst, 0), None);
        assert_eq!(RouteTable::client(route(1, 0)).lookup(dst, u32::MAX), None);
    }

    #[test]
    fn a_client_sends_everything_to_its_session() {
        let table = RouteTable::client(route(1, 1));
        for dst in ["0.0.0.0", "203.0.113.80", "::", "2001:db8::1"] {
            let dst: IpAddr = dst.parse().expect("valid");
            assert_eq!(
                table.lookup(dst, 77),
                Some(ConnectionRef {
                    worker: 0,
                    slot: 0,
                    generation: 1
                })
            );
        }
    }

    #[test]
    fn an_address_goes_to_the_session_that_had_it_last() {
        let dst = IpAddr::from(Ipv4Addr::new(10, 87, 0, 2));
        let mut table = RouteTable::empty();
        table.insert(&[dst], route(1, 1));
        table.insert(&[dst], route(2, 1));
        assert_eq!(
            table.route(dst).map(|route| route.session),
            Some(SessionId(2))
        );
    }

    #[test]
    fn a_session_that_goes_takes_along_what_is_its_own() {
        let [kept, taken]: [IpAddr; 2] =
            ["10.87.0.2", "10.87.0.3"].map(|a| a.parse().expect("valid"));
        let mut table = RouteTable::empty();
        table.insert(&[kept, taken], route(1, 1));
        table.insert(&[taken], route(2, 1));
        let before = table.clone();
        table.remove(&[kept, taken], SessionId(1));
        assert!(table.route(kept).is_none());
        assert_eq!(
            table.route(taken).map(|route| route.session),
            Some(SessionId(2))
        );
        assert!(before.route(kept).is_some(), "a clone is as it was");
    }

    #[test]
    fn one_more_session_copies_its_own_shards_only() {
        let lease = |number: u32| IpAddr::from(Ipv4Addr::from_bits(0x0a57_0000 + number));
        let mut table = RouteTable::empty();
        for number in 0..1000 {
            table.insert(&[lease(number)], route(u64::from(number), 1));
        }
        let before = table.clone();
        table.insert(&[lease(1000)], route(1000, 1));
        let copied = before
            .v4
            .0
            .iter()
            .zip(&table.v4.0)
            .filter(|(one, other)| !Arc::ptr_eq(one, other));
        assert_eq!(copied.count(), 1);
        assert!(before.route(lease(1000)).is_none());
    }

    #[test]
    fn a_mapped_address_is_not_a_lease_of_another_family() {
        let v4 = Ipv4Addr::new(10, 87, 0, 2);
        let mut table = RouteTable::empty();
        table.insert(&[v4.into()], route(1, 1));
        assert!(table.lookup(v4.to_ipv6_mapped().into(), 0).is_none());
    }

    proptest! {
        #[test]
        fn every_lease_is_found_and_nothing_else(
            leases in prop::collection::vec(any::<(Ipv4Addr, Ipv6Addr)>(), 0..50),
            strangers in prop::collection::vec(any::<IpAddr>(), 0..20),
            flow: u32,
        ) {
            let mut table = RouteTable::empty();
            let mut model = HashMap::new();
            for (session, (v4, v6)) in leases.into_iter().enumerate() {
                let addresses = [IpAddr::V4(v4), IpAddr::V6(v6)];
                let route = route(session as u64, 1 + session as u32 % 4);
                table.insert(&addresses, route);
                model.extend(addresses.map(|address| (address, session as u64)));
            }
            for (address, session) in &model {
                let found = table.lookup(*address, flow).expect("a lease");
                prop_assert_eq!(u64::from(found.generation), *session);
            }
            for stranger in strangers {
                prop_assert_eq!(table.lookup(stranger, flow).is_some(), model.contains_key(&stranger));
            }
        }

        #[test]
        fn flows_are_shared_out_among_the_connections(connections in 1..9_u32) {
            let table = RouteTable::client(route(1, connections));
            let dst = IpAddr::from(Ipv4Addr::UNSPECIFIED);
            let mut counts = vec![0; connections as usize];
            let flows = 4096;
            for flow in 0..flows {
                let found = table.lookup(dst, flow * (u32::MAX / (flows - 1))).expect("a connection");
                counts[found.slot as usize] += 1;
            }
            let share = flows / connections;
            prop_assert!(counts.iter().all(|count| (share - 1..=share + 2).contains(count)), "{:?}", counts);
        }
    }
}
