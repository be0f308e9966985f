//! The bound on unauthenticated connections, and which of them goes when there is one too many.
//!
//! A connection is unauthenticated from accept(2) until it is a tunnel, and holds a [`Permit`] for
//! that time. There are limits for all of them together, for a network and for a source (see
//! [`Tier`]). Where a limit is reached, the newcomer is admitted all the same and another
//! connection is evicted, so that nobody can keep others out by staying.
//!
//! The victim is found from the shortest prefix to the longest: of all networks the one with most
//! connections, in it the IPv6 /56 with most, in that the source with most. So a /24 or a /48 is
//! one crowd, also if each of its connections comes from another address, and a newcomer from a
//! quiet prefix is never evicted because of a crowd elsewhere. At the source, the oldest
//! connection that has not finished TLS goes; if all have, the oldest altogether. Between prefixes
//! with equally many connections the same order decides. A connection whose token was accepted is
//! never evicted.
//!
//! Memory is proportional to the connections that are there: a prefix is forgotten with its last
//! connection.

use std::cell::{Ref, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::Notify;

use super::source_prefix::{SourcePrefixes, Tier};
use crate::config::Limits;
use crate::status::Unauthenticated;

/// The part of the connections that a shortage of descriptors evicts at a time.
pub const SHORTAGE_SHARE: usize = 4;

/// Order of eviction, least first: connections that have not finished TLS before those that have,
/// then by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    finished_tls: bool,
    /// Counts connections since the start.
    sequence: u64,
}

/// A prefix among its siblings: the greatest is the fullest, or of equally full ones that with the
/// first rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crowd {
    connections: usize,
    first: Reverse<Rank>,
    prefix: IpNet,
}

/// A prefix, or all addresses.
#[derive(Debug, Default)]
struct Node {
    /// Permits that are held, those of connections that cannot be evicted included.
    permits: usize,
    /// Connections that can be evicted.
    evictable: BTreeSet<Rank>,
    /// The next longer prefixes that have such connections.
    crowds: BTreeSet<Crowd>,
}

impl Node {
    fn crowd(&self, prefix: IpNet) -> Option<Crowd> {
        self.evictable.first().map(|first| Crowd {
            connections: self.evictable.len(),
            first: Reverse(*first),
            prefix,
        })
    }
}

/// A connection that holds a permit.
#[derive(Debug)]
struct Connection {
    source: SourcePrefixes,
    /// Its place in the order of eviction; none once its token was accepted.
    rank: Option<Rank>,
    evicted: Rc<Notify>,
}

/// Which limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    Total,
    Network(IpNet),
    Source(IpNet),
}

#[derive(Debug)]
struct Table {
    limits: Limits,
    all: Node,
    prefixes: HashMap<IpNet, Node>,
    connections: HashMap<u64, Connection>,
    next_sequence: u64,
    counts: Unauthenticated,
}

/// Admits unauthenticated connections; clones share one table.
#[derive(Clone, Debug)]
pub struct ConnectionLimiter {
    table: Rc<RefCell<Table>>,
    /// Something was counted that the operator should hear of.
    pressure: Rc<Notify>,
}

/// An unauthenticated connection's right to be there. Dropping it gives it back.
#[derive(Debug)]
pub struct Permit {
    table: Rc<RefCell<Table>>,
    sequence: u64,
    evicted: Rc<Notify>,
}

/// The network with most unauthenticated connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FullestNetwork {
    /// An IPv4 /24 or an IPv6 /48.
    pub prefix: IpNet,
    /// Its connections that can be evicted.
    pub connections: usize,
}

impl ConnectionLimiter {
    /// No connection is there yet. `limits` have been validated.
    pub fn new(limits: Limits) -> Self {
        ConnectionLimiter {
            table: Rc::new(RefCell::new(Table {
                limits,
                all: Node::default(),
                prefixes: HashMap::new(),
                connections: HashMap::new(),
                next_sequence: 0,
                counts: Unauthenticated::default(),
            })),
            pressure: Rc::default(),
        }
    }

    /// Admits a connection from `address`, and evicts another if a limit is reached. None only
    /// where the limit is reached by connections whose tokens were accepted and which are about to
    /// become tunnels.
    pub fn admit(&self, address: IpAddr) -> Option<Permit> {
        let source = SourcePrefixes::of(address);
        let mut table = self.table.borrow_mut();
        table.counts.accepted += 1;
        if let Some(reached) = table.limit_reached(source) {
            self.pressure.notify_one();
            if !table.evict_within(reached) {
                table.counts.refused += 1;
                return None;
            }
            let counts = &mut table.counts;
            match reached {
                Reached::Total => counts.evicted_total_limit += 1,
                Reached::Network(_) => counts.evicted_network_limit += 1,
                Reached::Source(_) => counts.evicted_source_limit += 1,
            }
        }
        let (sequence, evicted) = table.insert(source);
        Some(Permit {
            table: Rc::clone(&self.table),
            sequence,
            evicted,
        })
    }

    /// Evicts connections because the process or the host has no descriptors or memory left. Returns
    /// their number: one in [`SHORTAGE_SHARE`] of those that can be evicted, and at least one if
    /// there is any. A crowd is to leave faster than it comes.
    pub fn evict_for_shortage(&self) -> usize {
        let mut table = self.table.borrow_mut();
        let most = (table.all.evictable.len() / SHORTAGE_SHARE).max(1);
        let evicted = (0..most)
            .take_while(|_| table.evict_within(Reached::Total))
            .count();
        if evicted > 0 {
            table.counts.evicted_shortage += evicted as u64;
            self.pressure.notify_one();
        }
        evicted
    }

    /// How far `time` is shortened because connections become scarce. It is whole until half of
    /// them are there, and then falls to `shortest` in proportion.
    pub fn under_pressure(&self, time: Duration, shortest: Duration) -> Duration {
        let table = self.table.borrow();
        shortened(time, shortest, table.all.permits, table.limits.visitors)
    }

    /// Counts an event: `count` changes the counter that stands for it.
    pub fn count(&self, count: impl FnOnce(&mut Unauthenticated)) {
        count(&mut self.table.borrow_mut().counts);
    }

    /// Counts an event like [`Self::count`], of a kind that the operator should hear of.
    pub fn count_pressure(&self, count: impl FnOnce(&mut Unauthenticated)) {
        self.count(count);
        self.pressure.notify_one();
    }

    /// Waits for an eviction or another event that the operator should hear of.
    pub async fn pressure(&self) {
        self.pressure.notified().await;
    }

    /// What has been counted, and who is there now.
    pub fn counts(&self) -> Unauthenticated {
        let table = self.table.borrow();
        let mut counts = table.counts.clone();
        counts.connected = table.connections.len() as u64;
        for prefix in table.prefixes.keys() {
            // Each tier has lengths of its own.
            match SourcePrefixes::of(prefix.addr())
                .iter()
                .find(|(_, other)| other == prefix)
            {
                Some((Tier::Network, _)) => counts.networks += 1,
                Some((Tier::Source, _)) => counts.sources += 1,
                Some((Tier::Site, _)) | None => {}
            }
        }
        counts
    }

    /// The network with most connections that can be evicted, if there are any.
    pub fn fullest_network(&self) -> Option<FullestNetwork> {
        let crowd = Ref::map(self.table.borrow(), |table| &table.all.crowds);
        crowd.last().map(|crowd| FullestNetwork {
            prefix: crowd.prefix,
            connections: crowd.connections,
        })
    }
}

impl Permit {
    /// The connection has finished its TLS handshake. It is evicted after those at its source that
    /// have not.
    pub fn finish_tls(&self) {
        self.set_rank(Some(Rank {
            finished_tls: true,
            sequence: self.sequence,
        }));
    }

    /// The connection's token was accepted. It is no longer evicted.
    ///
    /// This comes too late for a permit that was evicted before: poll [`Self::evicted`] before what
    /// may call this.
    pub fn accept_token(&self) {
        self.set_rank(None);
    }

    /// Waits until the connection is evicted: it is to be closed at once. Its permit has been given
    /// to another then.
    pub async fn evicted(&self) {
        self.evicted.notified().await;
    }

    fn set_rank(&self, rank: Option<Rank>) {
        self.table.borrow_mut().set_rank(self.sequence, rank);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.table.borrow_mut().remove(self.sequence);
    }
}

impl Table {
    /// The limit that one more connection from `source` would exceed; of several that of the
    /// longest prefix, because an eviction there makes room in the shorter ones as well.
    fn limit_reached(&self, source: SourcePrefixes) -> Option<Reached> {
        for (tier, prefix) in source.iter().rev() {
            let permits = self.prefixes.get(&prefix).map_or(0, |node| node.permits);
            match tier {
                Tier::Source if permits >= self.limits.visitors_per_source => {
                    return Some(Reached::Source(prefix));
                }
                Tier::Network if permits >= self.limits.network_visitors() => {
                    return Some(Reached::Network(prefix));
                }
                Tier::Source | Tier::Site | Tier::Network => {}
            }
        }
        (self.all.permits >= self.limits.visitors).then_some(Reached::Total)
    }

    fn insert(&mut self, source: SourcePrefixes) -> (u64, Rc<Notify>) {
        let rank = Rank {
            finished_tls: false,
            sequence: self.next_sequence,
        };
        self.next_sequence += 1;
        self.update(source, |node| {
            node.permits += 1;
            node.evictable.insert(rank);
        });
        let evicted = Rc::new(Notify::new());
        let connection = Connection {
            source,
            rank: Some(rank),
            evicted: Rc::clone(&evicted),
        };
        self.connections.insert(rank.sequence, connection);
        (rank.sequence, evicted)
    }

    /// Evicts the connection that is first to go within the prefix. False if none there can be
    /// evicted.
    fn evict_within(&mut self, reached: Reached) -> bool {
        let within = match reached {
            Reached::Total => Some(&self.all),
            Reached::Network(prefix) | Reached::Source(prefix) => self.prefixes.get(&prefix),
        };
        let Some(victim) = within.and_then(|within| self.victim(within)) else {
            return false;
        };
        let removed = self.remove(victim.sequence);
        removed
            .expect("what can be evicted is there")
            .evicted
            .notify_one();
        true
    }

    fn victim<'table>(&'table self, mut within: &'table Node) -> Option<Rank> {
        while let Some(crowd) = within.crowds.last() {
            within = &self.prefixes[&crowd.prefix];
        }
        within.evictable.first().copied()
    }

    fn set_rank(&mut self, sequence: u64, rank: Option<Rank>) {
        let Some(connection) = self.connections.get_mut(&sequence) else {
            return;
        };
        if connection.rank.is_none() {
            // Its token was accepted.
            return;
        }
        let former = std::mem::replace(&mut connection.rank, rank);
        let source = connection.source;
        self.update(source, |node| {
            if let Some(former) = former {
                node.evictable.remove(&former);
            }
            if let Some(rank) = rank {
                node.evictable.insert(rank);
            }
        });
    }

    fn remove(&mut self, sequence: u64) -> Option<Connection> {
        let connection = self.connections.remove(&sequence)?;
        self.update(connection.source, |node| {
            node.permits -= 1;
            if let Some(rank) = connection.rank {
                node.evictable.remove(&rank);
            }
        });
        Some(connection)
    }

    /// Makes the same change to the prefixes of `source` and to all addresses, and keeps the order
    /// of crowds.
    fn update(&mut self, source: SourcePrefixes, change: impl Fn(&mut Node)) {
        change(&mut self.all);
        let mut parent = None;
        for (_, prefix) in source.iter() {
            let node = self.prefixes.entry(prefix).or_default();
            let before = node.crowd(prefix);
            change(node);
            let after = node.crowd(prefix);
            if node.permits == 0 {
                self.prefixes.remove(&prefix);
            }
            let siblings = match parent {
                None => Some(&mut self.all.crowds),
                // It is gone if this was its last connection.
                Some(parent) => self
                    .prefixes
                    .get_mut(&parent)
                    .map(|parent: &mut Node| &mut parent.crowds),
            };
            if let Some(siblings) = siblings {
                if let Some(before) = before {
                    siblings.remove(&before);
                }
                siblings.extend(after);
            }
            parent = Some(prefix);
        }
    }
}

fn shortened(
    time: Duration,
    shortest: Duration,
    connections: usize,
    connections_max: usize,
) -> Duration {
    let free = connections_max.saturating_sub(connections);
    let half = connections_max.div_ceil(2);
    if free >= half {
        return time;
    }
    let longer = time.saturating_sub(shortest);
    shortest + longer.mul_f64(free as f64 / half as f64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::config::{VISITORS, VISITORS_PER_SOURCE};

    fn address(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    fn limits(visitors: usize, network: usize, source: usize) -> Limits {
        Limits {
            visitors,
            visitors_per_network: Some(network),
            visitors_per_source: source,
            ..Limits::default()
        }
    }

    fn admit(limiter: &ConnectionLimiter, address: IpAddr) -> Permit {
        limiter.admit(address).expect("admitted")
    }

    /// Whether the connection's task was told to end.
    fn is_evicted(permit: &Permit) -> bool {
        !permit
            .table
            .borrow()
            .connections
            .contains_key(&permit.sequence)
    }

    fn evicted(permits: &[Permit]) -> usize {
        permits.iter().filter(|permit| is_evicted(permit)).count()
    }

    #[test]
    fn the_oldest_of_a_full_source_goes() {
        let limiter = ConnectionLimiter::new(Limits::default());
        let crowd: Vec<_> = (0..VISITORS_PER_SOURCE)
            .map(|_| admit(&limiter, address("192.0.2.1")))
            .collect();
        let neighbour = admit(&limiter, address("192.0.2.2"));
        assert_eq!(evicted(&crowd), 0);
        let newcomer = admit(&limiter, address("::ffff:192.0.2.1"));
        assert!(is_evicted(&crowd[0]));
        assert_eq!(evicted(&crowd), 1);
        assert!(!is_evicted(&neighbour) && !is_evicted(&newcomer));
        assert_eq!(limiter.counts().evicted_source_limit, 1);
    }

    #[test]
    fn an_evicted_connection_is_told() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("runtime");
        let limiter = ConnectionLimiter::new(limits(1, 1, 1));
        let first = admit(&limiter, address("192.0.2.1"));
        let second = admit(&limiter, address("192.0.2.2"));
        runtime.block_on(first.evicted());
        // What comes late from its task changes nothing.
        first.finish_tls();
        first.accept_token();
        drop(first);
        assert!(!is_evicted(&second));
        assert_eq!(limiter.counts().connected, 1);
    }

    #[test]
    fn all_of_an_ipv6_64_is_one_source() {
        let limiter = ConnectionLimiter::new(Limits::default());
        let crowd: Vec<_> = (0..VISITORS_PER_SOURCE + 1)
            .map(|host| admit(&limiter, address(&format!("2001:db8:0:1::{host:x}"))))
            .collect();
        assert!(is_evicted(&crowd[0]));
        assert_eq!(evicted(&crowd), 1);
    }

    #[test]
    fn one_network_cannot_fill_the_limiter() {
        for crowd in [
            // Each from a /64 of its own.
            |number: usize| address(&format!("2001:db8:1:{number:x}::1")),
            |number: usize| address(&format!("192.0.2.{}", number % 256)),
        ] {
            let limiter = ConnectionLimiter::new(Limits::default());
            let permits: Vec<_> = (0..2 * VISITORS)
                .map(|number| admit(&limiter, crowd(number)))
                .collect();
            let remaining = permits.len() - evicted(&permits);
            assert_eq!(remaining, Limits::default().network_visitors());
            assert!(remaining <= VISITORS / 4);
            let counts = limiter.counts();
            assert_eq!(counts.evicted_network_limit, evicted(&permits) as u64);
            assert_eq!(counts.networks, 1);
        }
    }

    #[test]
    fn a_newcomer_outlives_crowds_of_other_networks() {
        let limiter = ConnectionLimiter::new(Limits::default());
        // 24 addresses in as many networks.
        let crowd = |number: usize| IpAddr::from([198, 18, (number % 24) as u8, 1]);
        let mut crowds: Vec<_> = (0..24 * 48)
            .map(|number| admit(&limiter, crowd(number)))
            .collect();
        assert_eq!(limiter.counts().connected, VISITORS as u64);
        let newcomer = admit(&limiter, address("192.0.2.1"));
        crowds.extend((0..5000).map(|number| admit(&limiter, crowd(number))));
        assert!(!is_evicted(&newcomer));
        assert!(limiter.counts().evicted_total_limit > 0);
    }

    #[test]
    fn web_visitors_go_when_all_have_finished_tls() {
        let limiter = ConnectionLimiter::new(limits(3, 3, 3));
        let [first, second, third] = [1, 2, 3].map(|_| admit(&limiter, address("192.0.2.1")));
        first.finish_tls();
        third.finish_tls();
        let fourth = admit(&limiter, address("192.0.2.1"));
        assert!(is_evicted(&second), "the only one without TLS");
        fourth.finish_tls();
        let _fifth = admit(&limiter, address("192.0.2.1"));
        assert!(is_evicted(&first), "the oldest");
        assert!(!is_evicted(&third) && !is_evicted(&fourth));
    }

    #[test]
    fn an_accepted_token_is_never_evicted() {
        let limiter = ConnectionLimiter::new(limits(2, 2, 2));
        let first = admit(&limiter, address("192.0.2.1"));
        first.finish_tls();
        first.accept_token();
        let second = admit(&limiter, address("192.0.2.1"));
        let third = admit(&limiter, address("192.0.2.1"));
        assert!(is_evicted(&second) && !is_evicted(&first));
        third.accept_token();
        assert!(limiter.admit(address("192.0.2.1")).is_none());
        assert_eq!(limiter.evict_for_shortage(), 0);
        assert_eq!(limiter.counts().refused, 1);
        drop(first);
        assert!(limiter.admit(address("192.0.2.1")).is_some());
    }

    #[test]
    fn a_shortage_evicts_from_the_fullest_prefix() {
        let limiter = ConnectionLimiter::new(Limits::default());
        let quiet = admit(&limiter, address("192.0.2.1"));
        let crowd = [1, 2].map(|_| admit(&limiter, address("2001:db8::1")));
        assert_eq!(limiter.evict_for_shortage(), 1);
        assert!(is_evicted(&crowd[0]) && !is_evicted(&quiet));
        assert_eq!(limiter.counts().evicted_shortage, 1);
    }

    #[test]
    fn the_fullest_network_is_named() {
        let limiter = ConnectionLimiter::new(Limits::default());
        assert_eq!(limiter.fullest_network(), None);
        let _crowd = [1, 2].map(|host| admit(&limiter, address(&format!("192.0.2.{host}"))));
        let _quiet = admit(&limiter, address("2001:db8::1"));
        let fullest = limiter.fullest_network().expect("a network");
        assert_eq!(fullest.prefix.to_string(), "192.0.2.0/24");
        assert_eq!(fullest.connections, 2);
        let counts = limiter.counts();
        assert_eq!(
            (counts.connected, counts.networks, counts.sources),
            (3, 2, 3)
        );
    }

    proptest! {
        #[test]
        fn time_shrinks_as_connections_grow(connections_max in 1_usize..2000) {
            let (time, shortest) = (Duration::from_secs(10), Duration::from_secs(3));
            let times = (0..=connections_max + 1)
                .map(|connections| shortened(time, shortest, connections, connections_max));
            let times: Vec<_> = times.collect();
            prop_assert!(times.is_sorted_by(|former, later| former >= later));
            prop_assert_eq!(times[0], time);
            prop_assert_eq!(times[connections_max / 2], time);
            prop_assert_eq!(times[connections_max], shortest);
            prop_assert_eq!(times[connections_max + 1], shortest);
        }
    }

    /// How a connection of the reference model stands.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Phase {
        Handshaking,
        FinishedTls,
        Accepted,
    }

    /// The limiter without any index: what it does, by looking at all connections each time.
    #[derive(Debug, Default)]
    struct Model {
        connections: BTreeMap<u64, (SourcePrefixes, Phase)>,
    }

    impl Model {
        fn permits(&self, within: Option<IpNet>) -> usize {
            let inside = self.connections.values();
            inside
                .filter(|(source, _)| contains(within, *source))
                .count()
        }

        fn evictable(&self, within: Option<IpNet>) -> Vec<(Phase, u64)> {
            let mut evictable: Vec<_> = self
                .connections
                .iter()
                .filter(|(_, (source, phase))| {
                    contains(within, *source) && *phase != Phase::Accepted
                })
                .map(|(sequence, (_, phase))| (*phase, *sequence))
                .collect();
            evictable.sort();
            evictable
        }

        fn victim(&self, mut within: Option<IpNet>) -> Option<u64> {
            loop {
                let mut children = BTreeSet::new();
                for (source, _) in self.connections.values() {
                    if contains(within, *source) {
                        let mut longer = source.iter().map(|(_, prefix)| prefix);
                        children.extend(longer.find(|prefix| is_longer(*prefix, within)));
                    }
                }
                let fullest = children
                    .into_iter()
                    .filter(|child| !self.evictable(Some(*child)).is_empty())
                    .max_by_key(|child| {
                        let evictable = self.evictable(Some(*child));
                        (evictable.len(), Reverse(evictable[0]))
                    });
                match fullest {
                    Some(child) => within = Some(child),
                    None => {
                        return self
                            .evictable(within)
                            .first()
                            .map(|(_, sequence)| *sequence);
                    }
                }
            }
        }
    }

    fn contains(within: Option<IpNet>, source: SourcePrefixes) -> bool {
        within.is_none_or(|within| source.iter().any(|(_, prefix)| prefix == within))
    }

    fn is_longer(prefix: IpNet, than: Option<IpNet>) -> bool {
        than.is_none_or(|than| prefix.prefix_len() > than.prefix_len())
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Admit(IpAddr),
        /// Of the connection with this index modulo their number.
        FinishTls(usize),
        AcceptToken(usize),
        Drop(usize),
        Shortage,
    }

    fn addresses() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0_u8..3, 0_u8..4).prop_map(|(net, host)| IpAddr::from([192, 0, net, host])),
            (0_u16..2, 0_u16..3, 0_u16..3).prop_map(|(net, site, host)| {
                let subnet = (site << 8) | host;
                IpAddr::from([0x2001, 0xdb8, net, subnet, 0, 0, 0, 1])
            }),
        ]
    }

    fn operations() -> impl Strategy<Value = Vec<Operation>> {
        let operation = prop_oneof![
            8 => addresses().prop_map(Operation::Admit),
            2 => any::<usize>().prop_map(Operation::FinishTls),
            1 => any::<usize>().prop_map(Operation::AcceptToken),
            2 => any::<usize>().prop_map(Operation::Drop),
            1 => Just(Operation::Shortage),
        ];
        proptest::collection::vec(operation, 1..120)
    }

    /// Every count of the table is what its connections add up to, and nothing is left of those
    /// that are gone.
    fn check(table: &Table, model: &Model) -> Result<(), TestCaseError> {
        let sequences: BTreeSet<u64> = table.connections.keys().copied().collect();
        prop_assert_eq!(sequences, model.connections.keys().copied().collect());
        prop_assert_eq!(table.all.permits, model.connections.len());
        prop_assert!(table.all.permits <= table.limits.visitors);
        prop_assert!(table.prefixes.len() <= 3 * table.connections.len());
        for (prefix, node) in &table.prefixes {
            prop_assert!(node.permits > 0);
            prop_assert_eq!(node.permits, model.permits(Some(*prefix)));
            prop_assert_eq!(node.evictable.len(), model.evictable(Some(*prefix)).len());
            for crowd in &node.crowds {
                prop_assert_eq!(
                    Some(*crowd),
                    table.prefixes[&crowd.prefix].crowd(crowd.prefix)
                );
            }
        }
        for (source, _) in model.connections.values() {
            let node = |tier| {
                let prefix = source.iter().find(|(other, _)| *other == tier);
                prefix.map(|(_, prefix)| table.prefixes[&prefix].permits)
            };
            prop_assert!(node(Tier::Source) <= Some(table.limits.visitors_per_source));
            prop_assert!(node(Tier::Network) <= Some(table.limits.network_visitors()));
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn the_limiter_is_like_its_model(operations in operations()) {
            let limits = limits(12, 7, 4);
            let limiter = ConnectionLimiter::new(limits);
            let mut model = Model::default();
            let mut permits: Vec<Permit> = Vec::new();
            for operation in operations {
                match operation {
                    Operation::Admit(address) => {
                        let source = SourcePrefixes::of(address);
                        let prefix = |tier| {
                            let mut prefixes = source.iter();
                            prefixes.find(|(other, _)| *other == tier).map(|(_, prefix)| prefix)
                        };
                        let (leaf, network) = (prefix(Tier::Source), prefix(Tier::Network));
                        let reached = [(leaf, 4), (network, 7), (None, 12)]
                            .into_iter()
                            .find(|(within, limit)| model.permits(*within) >= *limit);
                        let was_idle = model.permits(network) == 0;
                        let has_room = match reached {
                            None => true,
                            Some((within, _)) => match model.victim(within) {
                                None => false,
                                Some(victim) => {
                                    if was_idle {
                                        let (of, _) = model.connections[&victim];
                                        prop_assert!(!contains(network, of));
                                    }
                                    model.connections.remove(&victim).is_some()
                                }
                            },
                        };
                        let admitted = limiter.admit(address);
                        prop_assert_eq!(admitted.is_some(), has_room);
                        if let Some(permit) = admitted {
                            model.connections.insert(permit.sequence, (source, Phase::Handshaking));
                            permits.push(permit);
                        }
                    }
                    Operation::FinishTls(index) | Operation::AcceptToken(index)
                        if !permits.is_empty() =>
                    {
                        let permit = &permits[index % permits.len()];
                        let connection = model.connections.get_mut(&permit.sequence);
                        let to = match operation {
                            Operation::FinishTls(_) => Phase::FinishedTls,
                            _ => Phase::Accepted,
                        };
                        // TLS is finished before a token comes.
                        if let Some((_, phase)) = connection && *phase > to {
                            continue;
                        }
                        match to {
                            Phase::FinishedTls => permit.finish_tls(),
                            _ => permit.accept_token(),
                        }
                        if let Some((_, phase)) = model.connections.get_mut(&permit.sequence) {
                            *phase = to;
                        }
                    }
                    Operation::Drop(index) if !permits.is_empty() => {
                        let permit = permits.swap_remove(index % permits.len());
                        model.connections.remove(&permit.sequence);
                    }
                    Operation::Shortage => {
                        let most = (model.evictable(None).len() / SHORTAGE_SHARE).max(1);
                        let mut evicted = 0;
                        while evicted < most && let Some(victim) = model.victim(None) {
                            model.connections.remove(&victim);
                            evicted += 1;
                        }
                        prop_assert_eq!(limiter.evict_for_shortage(), evicted);
                    }
                    _ => {}
                }
                check(&limiter.table.borrow(), &model)?;
            }
            drop(permits);
            let table = limiter.table.borrow();
            prop_assert!(table.connections.is_empty() && table.prefixes.is_empty());
            prop_assert!(table.all.evictable.is_empty() && table.all.crowds.is_empty());
            prop_assert_eq!(table.all.permits, 0);
        }
    }
}
