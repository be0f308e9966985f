//! Inner address to session to connections: the immutable snapshot that every worker looks packets up in.
//!
//! Control makes a new table whenever a session or a connection comes or goes and gives it to the workers as a whole
//! (an `Arc`); nobody changes one that is in use.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use super::flow_hash::{KEY, multiply_fold};

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

/// The ordinal of a session's connection for flows that send little; see [`super::sparse_flows`].
pub const SPARSE_ORDINAL: u8 = 16;

/// One of a session's connections, as it is when a route is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Member {
    /// Its number in the session, which is the same on both hosts.
    pub ordinal: u8,
    /// The connection.
    pub connection: ConnectionRef,
    /// A keepalive of it stays unanswered.
    pub silent: bool,
}

/// Parts that a session's flows are shared out in, by the [`SHARE_BITS`] highest bits of their hashes.
const SHARES: u32 = 1 << SHARE_BITS;
const SHARE_BITS: u32 = 8;

/// Which of a session's connections each flow takes.
///
/// Each share of the flows ranks all ordinals that there can be, and takes the first one in its ranking whose connection
/// works (rendezvous hashing). So a connection that goes takes no flow along but its own, which spread over all others,
/// and one that comes back gets just those again. The ranking knows nothing of what was before: two hosts that have
/// the same connections choose alike.
///
/// Besides, there may be one for sparse flows. Which those are each worker knows for itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRoute {
    /// Whose connections they are.
    pub session: SessionId,
    /// Those that work. May be empty: then nothing can be sent to the session.
    connections: Vec<ConnectionRef>,
    /// For each share the index of its connection. Empty where there is no choice.
    shares: Vec<u8>,
    /// The one for sparse flows, if there is one besides.
    sparse: Option<ConnectionRef>,
}

impl SessionRoute {
    /// Shares flows out among `members`. Silent ones get none, unless all are silent. The one with [`SPARSE_ORDINAL`] gets
    /// none of these shares, unless there is no other.
    pub fn new(session: SessionId, members: impl IntoIterator<Item = Member>) -> Self {
        let mut members: Vec<Member> = members.into_iter().collect();
        if !members.iter().all(|member| member.silent) {
            members.retain(|member| !member.silent);
        }
        let is_sparse = |member: &Member| member.ordinal == SPARSE_ORDINAL;
        let sparse = match members.iter().position(is_sparse) {
            Some(index) if members.len() > 1 => Some(members.remove(index).connection),
            _ => None,
        };
        let first_of = |share| {
            let ranked = members.iter().enumerate();
            let first = ranked.max_by_key(|(_, member)| weight(share, member.ordinal));
            first.map_or(0, |(index, _)| index as u8)
        };
        SessionRoute {
            session,
            shares: if members.len() > 1 {
                (0..SHARES).map(first_of).collect()
            } else {
                Vec::new()
            },
            connections: members.iter().map(|member| member.connection).collect(),
            sparse,
        }
    }

    /// The connections among which flows are shared out.
    pub fn connections(&self) -> &[ConnectionRef] {
        &self.connections
    }

    /// The connection for sparse flows, if there is one besides those.
    #[inline]
    pub fn sparse(&self) -> Option<ConnectionRef> {
        self.sparse
    }

    /// The connection for a flow that is not a sparse one: always the same as long as that one works.
    #[inline]
    pub fn connection(&self, flow: u32) -> Option<ConnectionRef> {
        let share = (flow >> (u32::BITS - SHARE_BITS)) as usize;
        let index = self.shares.get(share).copied().unwrap_or(0);
        self.connections.get(usize::from(index)).copied()
    }
}

/// Where an ordinal stands in a share's ranking: the highest weight comes first.
fn weight(share: u32, ordinal: u8) -> u64 {
    // Of the numbers below a thousand the one by which any two, three or four of the first ordinals have the most even
    // shares, within 6 %.
    const EVEN: u64 = 710;
    let pair = u64::from(share) << 8 | u64::from(ordinal);
    let mixed = multiply_fold((EVEN << 16 | pair) ^ KEY[0], KEY[1]);
    multiply_fold(mixed ^ KEY[2], KEY[3])
}

/// Which connection a packet goes to. Change it, then share a clone, which nobody changes.
///
/// Clones share what is alike in them: a change copies no more than the shards of the addresses it is about, so that
/// with thousands of sessions one more costs little.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    /// A client's only session takes every packet.
    everything: Option<SessionRoute>,
    /// Some session has, or had, a connection for sparse flows.
    has_sparse: bool,
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
            has_sparse: route.sparse.is_some(),
            everything: Some(route),
            ..Self::default()
        }
    }

    /// A server's session comes, or has other connections now: `addresses` are its lease. An address that another
    /// session had goes to this one.
    pub fn insert(&mut self, addresses: &[IpAddr], route: SessionRoute) {
        self.has_sparse |= route.sparse.is_some();
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

    /// Whether any session may have a connection for sparse flows.
    #[inline]
    pub fn has_sparse(&self) -> bool {
        self.has_sparse
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

    /// Its slot is its ordinal.
    fn member(ordinal: u8, session: u64) -> Member {
        Member {
            ordinal,
            connection: ConnectionRef {
                worker: u16::from(ordinal) % 2,
                slot: ordinal.into(),
                generation: session as u32,
            },
            silent: false,
        }
    }

    fn route(session: u64, connections: u8) -> SessionRoute {
        let members = (0..connections).map(|ordinal| member(ordinal, session));
        SessionRoute::new(SessionId(session), members)
    }

    fn route_among(ordinals: impl IntoIterator<Item = u8>) -> SessionRoute {
        let members = ordinals.into_iter().map(|ordinal| member(ordinal, 1));
        SessionRoute::new(SessionId(1), members)
    }

    #[test]
    fn the_connection_for_sparse_flows_gets_no_share_unless_it_is_the_only_one() {
        let sparse = member(SPARSE_ORDINAL, 1);
        let with = route_among([0, 1, SPARSE_ORDINAL]);
        let without = route_among([0, 1]);
        assert_eq!(with.sparse(), Some(sparse.connection));
        assert_eq!(without.sparse(), None);
        assert_eq!(with.connections, without.connections);
        assert_eq!(with.shares, without.shares);

        let alone = route_among([SPARSE_ORDINAL]);
        assert_eq!(alone.sparse(), None);
        assert_eq!(alone.connection(7), Some(sparse.connection));

        let silent = |mut member: Member| {
            member.silent = true;
            member
        };
        let (first, session) = (member(0, 1), SessionId(1));
        let without = SessionRoute::new(session, [first, silent(sparse)]);
        assert_eq!(without.sparse(), None);
        assert_eq!(without.connection(7), Some(first.connection));
        let alone = SessionRoute::new(session, [silent(first), sparse]);
        assert_eq!(alone.sparse(), None);
        assert_eq!(alone.connection(7), Some(sparse.connection));
        let all_silent = SessionRoute::new(session, [silent(first), silent(sparse)]);
        assert_eq!(all_silent.sparse(), Some(sparse.connection));
    }

    /// The ordinal of the connection that each share of the flows takes.
    fn ordinals(route: &SessionRoute) -> Vec<u8> {
        let flows = (0..SHARES).map(|share| share << (u32::BITS - SHARE_BITS) | 0xab_cdef);
        let connections = flows.map(|flow| route.connection(flow).expect("a connection"));
        connections.map(|one| one.slot as u8).collect()
    }

    /// How many shares each of the ordinals has.
    fn counts(route: &SessionRoute) -> HashMap<u8, u32> {
        let mut counts = HashMap::new();
        for ordinal in ordinals(route) {
            *counts.entry(ordinal).or_default() += 1;
        }
        counts
    }

    /// Two or more of the ordinals that there can be, in any order.
    fn some_ordinals() -> impl Strategy<Value = Vec<u8>> {
        prop::sample::subsequence((0..16).collect::<Vec<u8>>(), 2..=16).prop_shuffle()
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
                let route = route(session as u64, 1 + session as u8 % 4);
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
        fn a_connection_that_goes_takes_only_its_own_flows_along_and_gets_them_back(
            all in some_ordinals(),
            nth: prop::sample::Index,
        ) {
            let gone = all[nth.index(all.len())];
            let before = route_among(all.iter().copied());
            let without = route_among(all.iter().copied().filter(|ordinal| *ordinal != gone));
            for (before, without) in ordinals(&before).into_iter().zip(ordinals(&without)) {
                if before == gone {
                    prop_assert!(without != gone && all.contains(&without));
                } else {
                    prop_assert_eq!(without, before);
                }
            }
        }

        #[test]
        fn hosts_with_the_same_connections_choose_alike(
            (one, other) in some_ordinals().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
        ) {
            prop_assert_eq!(ordinals(&route_among(one)), ordinals(&route_among(other)));
        }

        #[test]
        fn silent_connections_count_only_where_there_is_no_other(
            all in some_ordinals(),
            silent in any::<u16>(),
        ) {
            let is_silent = |ordinal: &u8| silent >> ordinal & 1 == 1;
            let members = all.iter().map(|ordinal| Member {
                silent: is_silent(ordinal),
                ..member(*ordinal, 1)
            });
            let route = SessionRoute::new(SessionId(1), members);
            let mut working: Vec<u8> =
                all.iter().copied().filter(|ordinal| !is_silent(ordinal)).collect();
            if working.is_empty() {
                working = all;
            }
            prop_assert_eq!(route, route_among(working));
        }
    }

    #[test]
    fn flows_are_shared_out_evenly() {
        for connections in 1..=16_u8 {
            let even = f64::from(SHARES) / f64::from(connections);
            let tolerance = match connections {
                ..=4 => 0.06,
                5..=8 => 0.16,
                _ => 0.36,
            };
            let counts = counts(&route(1, connections));
            assert_eq!(counts.len(), usize::from(connections));
            for (ordinal, count) in counts {
                let off = (f64::from(count) / even - 1.0).abs();
                assert!(off <= tolerance, "{ordinal} of {connections} has {count}");
            }
        }
    }

    #[test]
    fn flows_of_a_connection_that_goes_spread_over_all_others() {
        for gone in 0..4 {
            let counts = counts(&route_among((0..4).filter(|ordinal| *ordinal != gone)));
            assert_eq!(counts.len(), 3);
            for (ordinal, count) in counts {
                assert!((80..=91).contains(&count), "{ordinal}: {count} of {SHARES}");
            }
        }
    }

    /// The choice is part of what two hosts of different versions agree on.
    #[test]
    fn the_choice_does_not_change_between_versions() {
        let first = |route: &SessionRoute| ordinals(route)[..24].to_vec();
        assert_eq!(
            first(&route(1, 4)),
            [
                1, 1, 1, 0, 2, 2, 1, 3, 0, 0, 0, 3, 0, 3, 1, 1, 0, 0, 3, 2, 3, 3, 3, 3
            ]
        );
        assert_eq!(
            first(&route_among(5..16)),
            [
                15, 6, 14, 10, 9, 5, 8, 10, 15, 7, 10, 7, 8, 10, 15, 9, 14, 7, 14, 14, 12, 13, 11,
                11
            ]
        );
    }
}
