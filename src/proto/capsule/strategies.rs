//! Capsules of every type, as property tests want them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Any valid capsule.
pub(crate) fn capsule() -> impl Strategy<Value = Capsule> {
    prop_oneof![
        vec(address(0), 0..6).prop_map(Capsule::AddressAssign),
        vec(address(1), 1..6).prop_map(Capsule::AddressRequest),
        ranges().prop_map(Capsule::RouteAdvertisement),
        dns().prop_map(Capsule::DnsAssign),
        any::<[u8; PING_BYTES]>().prop_map(Capsule::Ping),
        any::<[u8; PING_BYTES]>().prop_map(Capsule::Pong),
        (0..=VARINT_MAX).prop_map(|code| Capsule::Close(CloseReason::from_code(code))),
        (0..8_u64).prop_map(|code| Capsule::Close(CloseReason::from_code(code))),
    ]
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<Ipv4Addr>().prop_map(IpAddr::V4),
        any::<Ipv6Addr>().prop_map(IpAddr::V6)
    ]
}

fn address(request_id_min: u64) -> impl Strategy<Value = AssignedAddress> {
    (request_id_min..=VARINT_MAX, ip(), 0..=128_u8).prop_map(|(request_id, ip, bits)| {
        AssignedAddress {
            request_id,
            prefix: IpNet::new(ip, bits.min(if ip.is_ipv4() { 32 } else { 128 }))
                .unwrap()
                .trunc(),
        }
    })
}

/// Ranges in RFC 9484's order: pairs of sorted, distinct addresses for each IP version and protocol.
fn ranges() -> impl Strategy<Value = Vec<IpAddressRange>> {
    let group = (vec(ip(), 0..8), prop_oneof![Just(0), any::<u8>()]);
    vec(group, 0..4).prop_map(|groups| {
        let mut ranges: Vec<IpAddressRange> = Vec::new();
        for (mut addresses, protocol) in groups {
            addresses.sort();
            addresses.dedup();
            let pairs = addresses
                .chunks_exact(2)
                .filter(|pair| pair[0].is_ipv4() == pair[1].is_ipv4());
            let fresh: Vec<_> = pairs
                .map(|pair| IpAddressRange {
                    start: pair[0],
                    end: pair[1],
                    protocol,
                })
                .collect();
            if ranges.iter().all(|range| range.protocol != protocol) {
                ranges.extend(fresh);
            }
        }
        ranges.sort_by(IpAddressRange::order);
        ranges
    })
}

fn domain() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[a-z0-9_-]{1,63}(\\.[A-Za-z0-9]{1,20}){0,4}\\.?"
    ]
}

fn nameserver() -> impl Strategy<Value = Nameserver> {
    (
        1..=u16::MAX,
        vec(any::<Ipv4Addr>(), 1..4),
        vec(any::<Ipv6Addr>(), 0..4),
        domain(),
        prop_oneof![
            Just(vec![]),
            Just(vec![0, 3, 0, 2, 0, 53]),
            Just(vec![0, 7, 0, 1, b'/', 0xff, 0, 0, 0])
        ],
    )
        .prop_map(
            |(priority, addresses_v4, addresses_v6, authentication_domain, service_parameters)| {
                Nameserver {
                    priority,
                    addresses_v4,
                    addresses_v6,
                    authentication_domain,
                    service_parameters,
                }
            },
        )
}

fn dns() -> impl Strategy<Value = DnsAssign> {
    let configuration = (
        vec(nameserver(), 0..3),
        vec(domain(), 0..3),
        vec(domain(), 0..3),
    )
        .prop_map(
            |(nameservers, internal_domains, search_domains)| DnsConfiguration {
                nameservers,
                internal_domains,
                search_domains,
            },
        );
    vec(configuration, 0..3).prop_map(|configurations| DnsAssign { configurations })
}
