//! Sticky leases: which holder has which pair of inner addresses.
//!
//! A lease is one IPv4 and one IPv6 address. A holder (the name of an invite) keeps its lease until it is released,
//! whether or not it is connected, so that inner TCP connections survive reconnects and server restarts.

use std::collections::{BTreeMap, HashSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The longest IPv4 prefix with room for the network, the broadcast and the gateway address and one holder.
pub const POOL_PREFIX_V4_BITS_MAX: u8 = 30;
/// The longest IPv6 prefix that pairs with the smallest IPv4 pool.
pub const POOL_PREFIX_V6_BITS_MAX: u8 = 126;

/// The gateway's place in both pools, counted from the network address.
const GATEWAY_INDEX: u32 = 1;
/// The first place that a holder may get.
const HOLDER_INDEX_MIN: u32 = GATEWAY_INDEX + 1;

/// The inner addresses of one holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lease {
    /// The IPv4 address, used as a /32.
    pub v4: Ipv4Addr,
    /// The IPv6 address, used as a /128.
    pub v6: Ipv6Addr,
}

/// Why a pool cannot be made or a lease cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The IPv4 prefix leaves no address for a holder.
    #[error(
        "the IPv4 pool {0} is too small: its prefix must be /{POOL_PREFIX_V4_BITS_MAX} or shorter"
    )]
    TooSmallV4(Ipv4Net),
    /// The IPv6 prefix leaves no address for a holder.
    #[error(
        "the IPv6 pool {0} is too small: its prefix must be /{POOL_PREFIX_V6_BITS_MAX} or shorter"
    )]
    TooSmallV6(Ipv6Net),
    /// The lease is from another pool, or is an address that no holder may have.
    #[error("the lease {v4}, {v6} is not one that this pool gives out", v4 = .0.v4, v6 = .0.v6)]
    NotOfThisPool(Lease),
    /// One of the lease's addresses belongs to another holder.
    #[error("the lease {v4}, {v6} overlaps another holder's", v4 = .0.v4, v6 = .0.v6)]
    Taken(Lease),
    /// The holder has another lease already.
    #[error("{holder} holds {v4}, {v6} already", v4 = .lease.v4, v6 = .lease.v6)]
    HasAnother {
        /// Who holds it.
        holder: String,
        /// What it holds.
        lease: Lease,
    },
}

/// Every address pair of the pool has a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every address of the pool has a holder: revoke unused peers or configure a larger pool")]
pub struct PoolExhausted;

/// Two prefixes and who holds which of their addresses.
///
/// Never leases an address to two holders, and never the network, broadcast or gateway address.
#[derive(Clone, Debug)]
pub struct AddressPool {
    v4: Ipv4Net,
    v6: Ipv6Net,
    leases: BTreeMap<String, Lease>,
    // Exactly the addresses in `leases`.
    taken_v4: HashSet<Ipv4Addr>,
    taken_v6: HashSet<Ipv6Addr>,
    // Where the search for a free place starts. It moves on, so that a released address rests before its next use.
    next_index: u32,
}

impl AddressPool {
    /// An empty pool over the two prefixes (host bits are ignored).
    ///
    /// # Errors
    /// [`PoolError::TooSmallV4`] and [`PoolError::TooSmallV6`] where no holder would find room.
    pub fn new(v4: Ipv4Net, v6: Ipv6Net) -> Result<Self, PoolError> {
        if v4.prefix_len() > POOL_PREFIX_V4_BITS_MAX {
            return Err(PoolError::TooSmallV4(v4));
        }
        if v6.prefix_len() > POOL_PREFIX_V6_BITS_MAX {
            return Err(PoolError::TooSmallV6(v6));
        }
        Ok(AddressPool {
            v4: v4.trunc(),
            v6: v6.trunc(),
            leases: BTreeMap::new(),
            taken_v4: HashSet::new(),
            taken_v6: HashSet::new(),
            next_index: HOLDER_INDEX_MIN,
        })
    }

    /// The server's own addresses: the first host of each prefix.
    pub fn gateway(&self) -> Lease {
        self.at(GATEWAY_INDEX)
    }

    /// The pool's IPv4 prefix.
    pub fn v4(&self) -> Ipv4Net {
        self.v4
    }

    /// The pool's IPv6 prefix.
    pub fn v6(&self) -> Ipv6Net {
        self.v6
    }

    /// Gives `holder` the lease that it had in an earlier life of the server. Restoring the same twice is no error.
    ///
    /// # Errors
    /// The lease is not of this pool (whose prefixes may have changed since), is taken, or the holder has another.
    /// The pool is then unchanged, and [`AddressPool::lease`] gives the holder a new one.
    pub fn restore(&mut self, holder: &str, lease: Lease) -> Result<(), PoolError> {
        if let Some(&held) = self.leases.get(holder) {
            return if held == lease {
                Ok(())
            } else {
                Err(PoolError::HasAnother {
                    holder: holder.to_owned(),
                    lease: held,
                })
            };
        }
        if !self.may_lease(lease) {
            return Err(PoolError::NotOfThisPool(lease));
        }
        if !self.is_free(lease) {
            return Err(PoolError::Taken(lease));
        }
        self.insert(holder, lease);
        Ok(())
    }

    /// The holder's lease: the one it has, or a free one that it has from now on.
    ///
    /// # Errors
    /// [`PoolExhausted`] when it has none and none is free.
    pub fn lease(&mut self, holder: &str) -> Result<Lease, PoolExhausted> {
        if let Some(&lease) = self.leases.get(holder) {
            return Ok(lease);
        }
        let last = self.index_max();
        let index = (self.next_index..=last)
            .chain(HOLDER_INDEX_MIN..self.next_index)
            .find(|&index| self.is_free(self.at(index)))
            .ok_or(PoolExhausted)?;
        let lease = self.at(index);
        self.next_index = if index == last {
            HOLDER_INDEX_MIN
        } else {
            index + 1
        };
        self.insert(holder, lease);
        Ok(lease)
    }

    /// Takes the holder's lease away, if it has one.
    pub fn release(&mut self, holder: &str) -> Option<Lease> {
        let lease = self.leases.remove(holder)?;
        self.taken_v4.remove(&lease.v4);
        self.taken_v6.remove(&lease.v6);
        Some(lease)
    }

    /// The lease that the holder has now.
    pub fn get(&self, holder: &str) -> Option<Lease> {
        self.leases.get(holder).copied()
    }

    /// All leases, in the order of their holders' names.
    pub fn leases(&self) -> impl Iterator<Item = (&str, Lease)> {
        self.leases
            .iter()
            .map(|(holder, &lease)| (holder.as_str(), lease))
    }

    fn insert(&mut self, holder: &str, lease: Lease) {
        let fresh = self.taken_v4.insert(lease.v4) & self.taken_v6.insert(lease.v6);
        assert!(fresh, "a lease is given out only when it is free");
        self.leases.insert(holder.to_owned(), lease);
    }

    fn is_free(&self, lease: Lease) -> bool {
        !self.taken_v4.contains(&lease.v4) && !self.taken_v6.contains(&lease.v6)
    }

    /// Whether both addresses are ones that holders may have. The two may stand at different places: only the pairs
    /// that the pool itself makes stand at the same.
    fn may_lease(&self, lease: Lease) -> bool {
        self.v4.contains(&lease.v4)
            && self.v6.contains(&lease.v6)
            && lease.v4 != self.v4.network()
            && lease.v4 != self.v4.broadcast()
            && lease.v4 != self.gateway().v4
            && lease.v6 != self.v6.network()
            && lease.v6 != self.gateway().v6
    }

    /// The last place that a holder may get: the smaller prefix decides, and IPv4 keeps its broadcast address.
    fn index_max(&self) -> u32 {
        let last_v4 = u32::from(self.v4.hostmask()) - 1;
        let last_v6 = u128::from(self.v6.hostmask());
        u32::try_from(last_v6).map_or(last_v4, |last_v6| last_v4.min(last_v6))
    }

    /// The address pair at a place, counted from the network addresses.
    fn at(&self, index: u32) -> Lease {
        // The host bits of both networks are zero and `index` fits in them, so nothing carries.
        Lease {
            v4: Ipv4Addr::from(u32::from(self.v4.network()) | index),
            v6: Ipv6Addr::from(u128::from(self.v6.network()) | u128::from(index)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool(v4: &str, v6: &str) -> AddressPool {
        AddressPool::new(v4.parse().unwrap(), v6.parse().unwrap()).unwrap()
    }

    fn lease(v4: &str, v6: &str) -> Lease {
        Lease {
            v4: v4.parse().unwrap(),
            v6: v6.parse().unwrap(),
        }
    }

    #[test]
    fn the_gateway_is_the_first_host_and_holders_follow() {
        let mut pool = pool("10.87.0.0/16", "fd12:3456:789a::/64");
        assert_eq!(pool.gateway(), lease("10.87.0.1", "fd12:3456:789a::1"));
        assert_eq!(
            pool.lease("alice").unwrap(),
            lease("10.87.0.2", "fd12:3456:789a::2")
        );
        assert_eq!(
            pool.lease("bob").unwrap(),
            lease("10.87.0.3", "fd12:3456:789a::3")
        );
        assert_eq!(
            pool.lease("alice").unwrap(),
            lease("10.87.0.2", "fd12:3456:789a::2")
        );
    }

    #[test]
    fn host_bits_of_the_configured_prefixes_are_ignored() {
        assert_eq!(
            pool("10.87.3.4/16", "fd12::7/64").gateway(),
            lease("10.87.0.1", "fd12::1")
        );
    }

    #[test]
    fn the_smallest_pool_has_one_holder() {
        let mut pool = pool("192.0.2.0/30", "fd12::/126");
        assert_eq!(pool.lease("alice").unwrap(), lease("192.0.2.2", "fd12::2"));
        assert_eq!(pool.lease("bob"), Err(PoolExhausted));
        pool.release("alice");
        assert_eq!(pool.lease("bob").unwrap(), lease("192.0.2.2", "fd12::2"));
    }

    #[test]
    fn a_prefix_without_room_is_refused() {
        let v6 = "fd12::/64".parse().unwrap();
        let v4 = "192.0.2.0/31".parse().unwrap();
        assert_eq!(
            AddressPool::new(v4, v6).unwrap_err(),
            PoolError::TooSmallV4(v4)
        );
        let v4 = "192.0.2.0/24".parse().unwrap();
        let v6 = "fd12::/127".parse().unwrap();
        assert_eq!(
            AddressPool::new(v4, v6).unwrap_err(),
            PoolError::TooSmallV6(v6)
        );
    }

    #[test]
    fn the_largest_prefixes_do_not_overflow() {
        let mut pool = pool("0.0.0.0/0", "::/0");
        assert_eq!(pool.index_max(), u32::MAX - 1);
        pool.next_index = pool.index_max();
        assert_eq!(
            pool.lease("alice").unwrap(),
            lease("255.255.255.254", "::ffff:fffe")
        );
        assert_eq!(pool.lease("bob").unwrap(), lease("0.0.0.2", "::2"));
    }

    #[test]
    fn a_released_address_rests_before_its_next_use() {
        let mut pool = pool("10.87.0.0/16", "fd12::/64");
        let first = pool.lease("alice").unwrap();
        assert_eq!(pool.release("alice"), Some(first));
        assert_eq!(pool.release("alice"), None);
        assert_ne!(pool.lease("bob").unwrap(), first);
    }

    #[test]
    fn what_cannot_be_restored_is_refused() {
        let mut pool = pool("10.87.0.0/24", "fd12::/64");
        for foreign in [
            lease("10.88.0.2", "fd12::2"),
            lease("10.87.0.2", "fd13::2"),
            lease("10.87.0.0", "fd12::2"),
            lease("10.87.0.1", "fd12::2"),
            lease("10.87.0.255", "fd12::2"),
            lease("10.87.0.2", "fd12::"),
            lease("10.87.0.2", "fd12::1"),
        ] {
            assert_eq!(
                pool.restore("alice", foreign),
                Err(PoolError::NotOfThisPool(foreign)),
                "{foreign:?}"
            );
        }
        let alices = lease("10.87.0.9", "fd12::9");
        pool.restore("alice", alices).unwrap();
        pool.restore("alice", alices).unwrap();
        let bobs = lease("10.87.0.8", "fd12::9");
        assert_eq!(pool.restore("bob", bobs), Err(PoolError::Taken(bobs)));
        let other = lease("10.87.0.8", "fd12::8");
        assert!(matches!(
            pool.restore("alice", other),
            Err(PoolError::HasAnother { .. })
        ));
        assert_eq!(pool.leases().collect::<Vec<_>>(), [("alice", alices)]);
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Lease(usize),
        Release(usize),
        Restore(usize, u32, u32),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            4 => (0..12_usize).prop_map(Operation::Lease),
            2 => (0..12_usize).prop_map(Operation::Release),
            1 => (0..12_usize, 0..20_u32, 0..20_u32).prop_map(|(holder, v4, v6)| Operation::Restore(holder, v4, v6)),
        ]
    }

    proptest! {
        /// Against a plain list of who holds what.
        #[test]
        fn no_address_has_two_holders_and_leases_are_sticky(
            operations in prop::collection::vec(operation(), 0..200),
            v4_bits in 27..=30_u8,
        ) {
            let v4 = Ipv4Net::new(Ipv4Addr::new(10, 87, 0, 0), v4_bits).unwrap();
            let mut pool = AddressPool::new(v4, "fd12::/124".parse().unwrap()).unwrap();
            let mut model: Vec<(String, Lease)> = Vec::new();
            for operation in operations {
                match operation {
                    Operation::Lease(holder) => {
                        let holder = format!("peer{holder}");
                        let held = model.iter().find(|(name, _)| *name == holder).map(|(_, lease)| *lease);
                        match (pool.lease(&holder), held) {
                            (Ok(given), Some(held)) => prop_assert_eq!(given, held, "leases are sticky"),
                            (Ok(given), None) => {
                                prop_assert!(v4.hosts().any(|host| host == given.v4));
                                prop_assert!(pool.v6().contains(&given.v6));
                                model.push((holder, given));
                            }
                            (Err(PoolExhausted), held) => {
                                prop_assert!(held.is_none());
                                let last = v4.hosts().count().min(15) as u32;
                                let free = (2..=last).any(|index| {
                                    let candidate = pool.at(index);
                                    model.iter().all(|(_, lease)| lease.v4 != candidate.v4 && lease.v6 != candidate.v6)
                                });
                                prop_assert!(!free, "exhausted only when nothing is free");
                            }
                        }
                    }
                    Operation::Release(holder) => {
                        let holder = format!("peer{holder}");
                        let place = model.iter().position(|(name, _)| *name == holder);
                        prop_assert_eq!(pool.release(&holder), place.map(|place| model.remove(place).1));
                    }
                    Operation::Restore(holder, v4, v6) => {
                        let holder = format!("peer{holder}");
                        let wanted = Lease { v4: pool.at(v4).v4, v6: pool.at(v6).v6 };
                        if pool.restore(&holder, wanted).is_ok() && !model.contains(&(holder.clone(), wanted)) {
                            model.push((holder, wanted));
                        }
                    }
                }
                prop_assert_eq!(pool.leases().count(), model.len());
                for (place, (holder, lease)) in model.iter().enumerate() {
                    prop_assert_eq!(pool.get(holder), Some(*lease));
                    prop_assert!(lease.v4 != pool.gateway().v4 && lease.v6 != pool.gateway().v6);
                    for (other, others) in &model[..place] {
                        prop_assert!(other != holder);
                        prop_assert!(others.v4 != lease.v4 && others.v6 != lease.v6, "two holders of one address");
                    }
                }
            }
        }
    }
}
