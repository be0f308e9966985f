//! How many strangers may be inside at once: the bound on everything before a tunnel is established.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;

use crate::config::Limits;

/// An IPv4 address, or the /64 of an IPv6 address: what one attacker has for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(IpAddr);

impl Source {
    fn new(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => Source(IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into())),
            v4 => Source(v4),
        }
    }
}

#[derive(Debug, Default)]
struct Visitors {
    count: usize,
    by_source: HashMap<Source, usize>,
}

/// Counts visitors.
#[derive(Clone, Debug)]
pub struct Gate {
    limits: Limits,
    visitors: Rc<RefCell<Visitors>>,
}

/// A visitor's place; dropping it frees the place.
#[derive(Debug)]
pub struct Place {
    visitors: Rc<RefCell<Visitors>>,
    source: Source,
}

impl Gate {
    /// Nobody is inside yet.
    pub fn new(limits: Limits) -> Self {
        Gate {
            limits,
            visitors: Rc::default(),
        }
    }

    /// A place for a visitor from `address`, unless there are too many.
    pub fn enter(&self, address: IpAddr) -> Option<Place> {
        let source = Source::new(address);
        let mut visitors = self.visitors.borrow_mut();
        let from_source = visitors.by_source.get(&source).copied().unwrap_or(0);
        if visitors.count >= self.limits.visitors || from_source >= self.limits.visitors_per_source
        {
            return None;
        }
        visitors.count += 1;
        visitors.by_source.insert(source, from_source + 1);
        drop(visitors);
        Some(Place {
            visitors: Rc::clone(&self.visitors),
            source,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut visitors = self.visitors.borrow_mut();
        visitors.count -= 1;
        if let Some(count) = visitors.by_source.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                visitors.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{VISITORS, VISITORS_PER_SOURCE};

    fn address(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn one_source_has_its_own_bound() {
        let gate = Gate::new(Limits::default());
        let places: Vec<_> = (0..VISITORS_PER_SOURCE)
            .map(|_| gate.enter(address("192.0.2.1")).expect("a place"))
            .collect();
        assert!(gate.enter(address("192.0.2.1")).is_none());
        assert!(gate.enter(address("::ffff:192.0.2.1")).is_none());
        assert!(gate.enter(address("192.0.2.2")).is_some());
        drop(places);
        assert!(gate.enter(address("192.0.2.1")).is_some());
        assert!(gate.visitors.borrow().by_source.is_empty());
    }

    #[test]
    fn all_of_an_ipv6_network_is_one_source() {
        let gate = Gate::new(Limits::default());
        let _places: Vec<_> = (0..VISITORS_PER_SOURCE)
            .map(|host| {
                gate.enter(address(&format!("2001:db8:0:1::{host:x}")))
                    .expect("a place")
            })
            .collect();
        assert!(gate.enter(address("2001:db8:0:1:ffff::1")).is_none());
        assert!(gate.enter(address("2001:db8:0:2::1")).is_some());
    }

    #[test]
    fn all_sources_together_are_bounded() {
        let gate = Gate::new(Limits::default());
        let _places: Vec<_> = (0..VISITORS as u32)
            .map(|host| {
                gate.enter(IpAddr::from(host.to_be_bytes()))
                    .expect("a place")
            })
            .collect();
        assert!(gate.enter(address("192.0.2.1")).is_none());
    }
}
