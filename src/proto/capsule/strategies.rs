//! Capsules of every type, as property tests want them: often the extremes, since faults are there.
//! An extreme is the longest list that fits, all entries alike, all bits zero or one, and the value
//! one beyond the greatest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Any valid capsule.
pub(crate) fn capsule() -> impl Strategy<Value = Capsule> {
    prop_oneof![
        addresses(0).prop_map(Capsule::AddressAssign),
        request().prop_map(Capsule::AddressRequest),
        ranges().prop_map(Capsule::RouteAdvertisement),
        dns().prop_map(Capsule::DnsAssign),
        ping().prop_map(Capsule::Ping),
        ping().prop_map(Capsule::Pong),
        prop_oneof![integer(0..=VARINT_MAX), 0..8_u64]
            .prop_map(|code| Capsule::Close(CloseReason::from_code(code))),
    ]
}

/// Any capsule that the types allow: valid ones, and those that no receiver takes.
pub(crate) fn any_capsule() -> impl Strategy<Value = Capsule> {
    let address = (integer(0..=u64::MAX), ip(), bits()).prop_map(|(request_id, ip, bits)| {
        let prefix = prefix(ip, bits);
        AssignedAddress { request_id, prefix }
    });
    let entries = (vec(address, 0..6), prop_oneof![Just(1), 1..3000_usize])
        .prop_map(|(entries, times)| entries.repeat(times));
    let range = (ip(), ip(), any::<u8>()).prop_map(|(start, end, protocol)| IpAddressRange {
        start,
        end,
        protocol,
    });
    let ranges = (vec(range, 0..4), prop_oneof![Just(1), 1..1000_usize])
        .prop_map(|(ranges, times)| ranges.repeat(times));
    let domain = prop_oneof![domain(), ".{0,300}", "[a-z]{250,260}"];
    let domains = vec(domain, 0..3);
    let dns = (
        dns(),
        domains,
        any::<u16>(),
        prop_oneof![Just(1), 1..80_usize],
    )
        .prop_map(|(mut dns, domains, priority, times)| {
            for configuration in &mut dns.configurations {
                configuration.search_domains.extend(domains.clone());
                if let Some(nameserver) = configuration.nameservers.first_mut() {
                    nameserver.priority = priority;
                }
            }
            dns.configurations = vec![dns.configurations; times].concat();
            dns
        });
    prop_oneof![
        2 => capsule(),
        1 => (entries, any::<bool>()).prop_map(|(entries, is_request)| match is_request {
            true => Capsule::AddressRequest(entries),
            false => Capsule::AddressAssign(entries),
        }),
        1 => ranges.prop_map(Capsule::RouteAdvertisement),
        1 => dns.prop_map(Capsule::DnsAssign),
        1 => integer(0..=u64::MAX).prop_map(|code| Capsule::Close(CloseReason::Other(code))),
    ]
}

/// A valid list of requested addresses.
pub(crate) fn request() -> impl Strategy<Value = Vec<AssignedAddress>> {
    addresses(1).prop_filter("it asks for something", |requested| !requested.is_empty())
}

/// The value of a capsule of any type, as a peer may send it: nearly right, or as long as may be.
pub(crate) fn value() -> impl Strategy<Value = Vec<u8>> {
    let byte = || prop_oneof![any::<u8>(), 0..8_u8, Just(0xff)];
    let valid = capsule().prop_map(|capsule| capsule.value().expect("valid"));
    prop_oneof![
        vec(byte(), 0..120),
        (vec(byte(), 1..40), any::<bool>()).prop_map(|(pattern, whole)| {
            let times = CONTROL_BYTES_MAX / pattern.len();
            let mut value = pattern.repeat(times + 1);
            value.truncate(if whole {
                CONTROL_BYTES_MAX
            } else {
                pattern.len() * times
            });
            value
        }),
        (valid, vec((any::<prop::sample::Index>(), byte()), 0..4)).prop_map(
            |(mut value, changes)| {
                for (at, byte) in changes {
                    if !value.is_empty() {
                        let at = at.index(value.len());
                        value[at] = byte;
                    }
                }
                value
            }
        ),
    ]
}

/// An integer of the range, often one where the length of its encoding changes.
pub(crate) fn integer(range: RangeInclusive<u64>) -> impl Strategy<Value = u64> {
    let edges = [0x3f, 0x3fff, 0x3fff_ffff, VARINT_MAX];
    let edges = edges.into_iter().flat_map(|edge| [edge, edge + 1]);
    let mut edges: Vec<u64> = edges.filter(|edge| range.contains(edge)).collect();
    edges.extend([*range.start(), *range.end()]);
    let lengths = (range.clone(), 0..64_u32)
        .prop_map(move |(value, shift)| (value >> shift).max(*range.start()));
    prop_oneof![prop::sample::select(edges), lengths]
}

fn ping() -> impl Strategy<Value = [u8; PING_BYTES]> {
    prop_oneof![any::<[u8; PING_BYTES]>(), Just([0; 8]), Just([0xff; 8])]
}

pub(crate) fn ip() -> impl Strategy<Value = IpAddr> {
    let v4 = prop_oneof![
        any::<u32>(),
        Just(0),
        Just(1),
        Just(u32::MAX - 1),
        Just(u32::MAX),
        any::<u32>().prop_map(|address| address & 0xff),
    ];
    let v6 = prop_oneof![
        any::<u128>(),
        Just(0),
        Just(1),
        Just(u128::MAX - 1),
        Just(u128::MAX),
        any::<u128>().prop_map(|address| address & 0xffff),
    ];
    prop_oneof![
        v4.prop_map(|address| IpAddr::V4(Ipv4Addr::from(address))),
        v6.prop_map(|address| IpAddr::V6(Ipv6Addr::from(address))),
    ]
}

fn bits() -> impl Strategy<Value = u8> {
    prop_oneof![0..=128_u8, Just(0), Just(32), Just(128)]
}

fn prefix(ip: IpAddr, bits: u8) -> IpNet {
    IpNet::new(ip, bits.min(if ip.is_ipv4() { 32 } else { 128 })).unwrap()
}

/// Of a few entries, or of one as often as it fits.
fn addresses(request_id_min: u64) -> impl Strategy<Value = Vec<AssignedAddress>> {
    let address = || {
        let ids = integer(request_id_min..=VARINT_MAX);
        (ids, ip(), bits()).prop_map(|(request_id, ip, bits)| AssignedAddress {
            request_id,
            prefix: prefix(ip, bits).trunc(),
        })
    };
    let full = |entries: Vec<AssignedAddress>| {
        let bytes: usize = entries.iter().map(AssignedAddress::encoded_bytes).sum();
        let mut full = entries.repeat(CONTROL_BYTES_MAX / bytes);
        let mut left = CONTROL_BYTES_MAX % bytes;
        for entry in entries {
            left = left.saturating_sub(entry.encoded_bytes());
            if left > 0 {
                full.push(entry);
            }
        }
        full
    };
    let numbered = |(count, is_v4): (u64, bool)| {
        let numbered = (1..=count).map(move |id| match is_v4 {
            true => AssignedAddress::unspecified_v4(id),
            false => AssignedAddress::unspecified_v6(id),
        });
        numbered.collect::<Vec<_>>()
    };
    prop_oneof![
        4 => vec(address(), 0..6),
        1 => vec(address(), 1..3).prop_map(full),
        1 => (1..700_u64, any::<bool>()).prop_map(numbered),
    ]
}

/// Ranges in RFC 9484's order: pairs of sorted, distinct addresses for each IP version and protocol.
fn ranges() -> impl Strategy<Value = Vec<IpAddressRange>> {
    let group = (
        vec(ip(), 0..8),
        prop_oneof![Just(0), Just(255), any::<u8>()],
    );
    let any = vec(group, 0..4).prop_map(|groups| {
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
    });
    // Each of the most prefixes for its size, and as many as fit.
    let full_v4 = (0..1638_u32).map(|number| IpAddressRange {
        start: Ipv4Addr::from(number << 16 | 1).into(),
        end: Ipv4Addr::from(number << 16 | 0xfffe).into(),
        protocol: 0,
    });
    let full_v6 = (0..481_u128).map(|number| IpAddressRange {
        start: Ipv6Addr::from(number << 100 | 1).into(),
        end: Ipv6Addr::from((number + 1) << 100).into(),
        protocol: 0,
    });
    let full_v6 = full_v6.map(|range| match range.end {
        IpAddr::V6(end) => IpAddressRange {
            end: Ipv6Addr::from(u128::from(end) - 2).into(),
            ..range
        },
        IpAddr::V4(_) => range,
    });
    prop_oneof![
        8 => any,
        1 => Just(full_v4.collect::<Vec<_>>()),
        1 => Just(full_v6.collect::<Vec<_>>()),
        1 => Just(vec![IpAddressRange::everything_v4(), IpAddressRange::everything_v6()]),
    ]
}

fn domain() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[a-z0-9_-]{1,63}(\\.[A-Za-z0-9]{1,20}){0,4}\\.?",
        Just(["a"; 128].join(".")),
        Just([&"b".repeat(63)[..]; 4].join(".")[..DOMAIN_BYTES_MAX].to_owned()),
    ]
}

fn nameserver() -> impl Strategy<Value = Nameserver> {
    (
        prop_oneof![1..=u16::MAX, Just(1), Just(u16::MAX)],
        prop_oneof![vec(any::<Ipv4Addr>(), 1..4), vec(any::<Ipv4Addr>(), 64..70)],
        vec(any::<Ipv6Addr>(), 0..4),
        domain(),
        prop_oneof![
            Just(vec![]),
            Just(vec![0, 3, 0, 2, 0, 53]),
            Just(vec![0, 7, 0, 1, b'/', 0xff, 0, 0, 0]),
            Just([&[0xff, 0xff, 0x02, 0x00][..], &[0; 512]].concat()),
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
    let any = vec(configuration, 0..3).prop_map(|configurations| DnsAssign { configurations });
    let empty = DnsConfiguration::default();
    let names = DnsConfiguration {
        search_domains: vec![String::new(); CONTROL_BYTES_MAX - 4],
        ..DnsConfiguration::default()
    };
    let nameserver = Nameserver {
        addresses_v4: vec![Ipv4Addr::BROADCAST; 4092],
        ..Nameserver::plain(Ipv4Addr::BROADCAST.into())
    };
    let addresses = DnsConfiguration {
        nameservers: vec![nameserver],
        ..DnsConfiguration::default()
    };
    let full = [
        vec![empty; CONTROL_BYTES_MAX / 3],
        vec![names],
        vec![addresses],
    ];
    let full = prop::sample::select(full.to_vec());
    prop_oneof![
        6 => any,
        1 => full.prop_map(|configurations| DnsAssign { configurations }),
    ]
}
