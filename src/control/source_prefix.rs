//! The address prefixes by which limits on unauthenticated connections are kept.
//!
//! One operator can have a whole prefix for little or nothing: an IPv6 host gets a /64, a site a
//! /56 or a /48. So a limit per address is none. Limits hold for the prefixes of these tiers that
//! contain the address:
//!
//! | tier | IPv4 | IPv6 |
//! | --- | --- | --- |
//! | network | /24 | /48 |
//! | site | | /56 |
//! | source | /32 | /64 |

use std::net::IpAddr;

use ipnet::IpNet;

/// How long a prefix is, compared with the others that contain the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// An IPv4 /24 or an IPv6 /48.
    Network,
    /// An IPv6 /56.
    Site,
    /// An IPv4 /32 or an IPv6 /64.
    Source,
}

const IPV4_TIERS: &[(Tier, u8)] = &[(Tier::Network, 24), (Tier::Source, 32)];
const IPV6_TIERS: &[(Tier, u8)] = &[(Tier::Network, 48), (Tier::Site, 56), (Tier::Source, 64)];

/// A source address, as the prefixes that contain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourcePrefixes {
    /// In canonical form: an IPv4-mapped IPv6 address is the IPv4 address.
    address: IpAddr,
}

impl SourcePrefixes {
    /// Of `address`; an IPv4-mapped IPv6 address counts as IPv4.
    pub fn of(address: IpAddr) -> Self {
        SourcePrefixes {
            address: address.to_canonical(),
        }
    }

    /// The prefixes, shortest first, each with its tier. The first is a network and the last a
    /// source.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = (Tier, IpNet)> {
        let tiers = match self.address {
            IpAddr::V4(_) => IPV4_TIERS,
            IpAddr::V6(_) => IPV6_TIERS,
        };
        tiers
            .iter()
            .map(move |(tier, length)| (*tier, IpNet::new_assert(self.address, *length).trunc()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes(address: &str) -> Vec<String> {
        let address = address.parse().expect("address");
        SourcePrefixes::of(address)
            .iter()
            .map(|(tier, prefix)| format!("{tier:?} {prefix}"))
            .collect()
    }

    #[test]
    fn an_address_has_prefixes_shortest_first() {
        assert_eq!(
            prefixes("192.0.2.17"),
            ["Network 192.0.2.0/24", "Source 192.0.2.17/32"]
        );
        assert_eq!(
            prefixes("2001:db8:1:2345:6789::1"),
            [
                "Network 2001:db8:1::/48",
                "Site 2001:db8:1:2300::/56",
                "Source 2001:db8:1:2345::/64"
            ]
        );
    }

    #[test]
    fn an_ipv4_mapped_address_counts_as_ipv4() {
        assert_eq!(prefixes("::ffff:192.0.2.17"), prefixes("192.0.2.17"));
    }
}
