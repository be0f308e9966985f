//! The symmetric flow hash: which connection, and later which queue, a flow's packets use.
//!
//! Both directions of a flow, and every segment and super-packet of it, have the same hash on both hosts, so that
//! replies come back over the connection that the requests used. That is why the key is fixed and public: whoever
//! picks addresses and ports to make flows collide only slows his own session.
//!
//! Flow: protocol, addresses and, for transport protocols that have them, ports. Fragments count without ports, the
//! first one too, so that all fragments of a packet stay together.

use std::net::IpAddr;

use super::packet::{self, PROTOCOL_TCP, PROTOCOL_UDP};

/// The first 256 bits of the fraction of pi: nothing up the sleeve.
pub(super) const KEY: [u64; 4] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7344,
    0xa409_3822_299f_31d0,
    0x082e_fa98_ec4e_6c89,
];

const PROTOCOL_DCCP: u8 = 33;
const PROTOCOL_SCTP: u8 = 132;
const PROTOCOL_UDP_LITE: u8 = 136;

/// The hash of the flow that an IP packet belongs to; 0 for what is not an IP packet.
///
/// All 32 bits are equally good. [`super::route_table::RouteTable::lookup`] uses the eight highest to choose a
/// connection; flow queues and [`super::sparse_flows`] use low ones.
#[inline]
pub fn flow_hash(packet: &[u8]) -> u32 {
    let Ok(headers) = packet::parse(packet) else {
        return flow_hash_by_address(packet);
    };
    let [src_port, dst_port] = match packet
        .get(headers.transport_offset..)
        .and_then(|rest| rest.first_chunk::<4>())
    {
        Some(&[a, b, c, d]) if has_ports(headers.protocol) && !headers.fragment => {
            [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
        }
        _ => [0, 0],
    };
    combine(
        endpoint(headers.src, src_port),
        endpoint(headers.dst, dst_port),
        headers.protocol,
    )
}

#[inline]
fn has_ports(protocol: u8) -> bool {
    matches!(
        protocol,
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP | PROTOCOL_DCCP | PROTOCOL_UDP_LITE
    )
}

/// For a packet whose lengths or extension headers do not hold together: it may still be forwarded.
#[cold]
fn flow_hash_by_address(packet: &[u8]) -> u32 {
    match (packet::source(packet), packet::destination(packet)) {
        (Some(src), Some(dst)) => combine(endpoint(src, 0), endpoint(dst, 0), 0),
        _ => 0,
    }
}

#[inline]
fn endpoint(address: IpAddr, port: u16) -> u64 {
    let port = u64::from(port);
    match address {
        IpAddr::V4(address) => {
            multiply_fold((u64::from(address.to_bits()) << 16 | port) ^ KEY[0], KEY[1])
        }
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            let halves = multiply_fold((bits >> 64) as u64 ^ KEY[0], bits as u64 ^ KEY[1]);
            multiply_fold(halves ^ port, KEY[2])
        }
    }
}

/// Symmetric, since addition is.
#[inline]
fn combine(a: u64, b: u64, protocol: u8) -> u32 {
    let hash = multiply_fold(a.wrapping_add(b) ^ u64::from(protocol), KEY[3] ^ KEY[1]);
    (hash >> 32) as u32 ^ hash as u32
}

#[inline]
pub(super) fn multiply_fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::proto::offload::{
        FLAG_NEEDS_CSUM, GSO_TCPV4, GSO_TCPV6, Offloads, VirtioNetHdr, segment,
    };

    fn packet(src: (IpAddr, u16), dst: (IpAddr, u16), udp: bool, payload: &[u8]) -> Vec<u8> {
        let builder = match (src.0, dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                PacketBuilder::ipv4(src.octets(), dst.octets(), 64)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                PacketBuilder::ipv6(src.octets(), dst.octets(), 64)
            }
            _ => unreachable!("both addresses are of one family"),
        };
        let mut packet = Vec::new();
        if udp {
            builder
                .udp(src.1, dst.1)
                .write(&mut packet, payload)
                .expect("fits");
        } else {
            builder
                .tcp(src.1, dst.1, 1, 2)
                .write(&mut packet, payload)
                .expect("fits");
        }
        packet
    }

    fn endpoints() -> impl Strategy<Value = [(IpAddr, u16); 2]> {
        let v4 = any::<([Ipv4Addr; 2], [u16; 2])>()
            .prop_map(|([a, b], [p, q])| [(IpAddr::V4(a), p), (IpAddr::V4(b), q)]);
        let v6 = any::<([Ipv6Addr; 2], [u16; 2])>()
            .prop_map(|([a, b], [p, q])| [(IpAddr::V6(a), p), (IpAddr::V6(b), q)]);
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn both_directions_hash_alike([a, b] in endpoints(), udp: bool, payloads: [Vec<u8>; 2]) {
            let forth = flow_hash(&packet(a, b, udp, &payloads[0]));
            let back = flow_hash(&packet(b, a, udp, &payloads[1]));
            prop_assert_eq!(forth, back);
        }

        #[test]
        fn another_port_address_or_protocol_is_another_flow([a, b] in endpoints(), udp: bool) {
            prop_assume!(a != b);
            let hash = flow_hash(&packet(a, b, udp, b""));
            prop_assert_ne!(flow_hash(&packet((a.0, a.1 ^ 1), b, udp, b"")), hash);
            prop_assert_ne!(flow_hash(&packet(a, (b.0, b.1 ^ 0x100), udp, b"")), hash);
            prop_assert_ne!(flow_hash(&packet(a, b, !udp, b"")), hash);
            if a.1 != b.1 && a.0 != b.0 {
                // The same two addresses and the same two ports, paired otherwise.
                prop_assert_ne!(flow_hash(&packet((a.0, b.1), (b.0, a.1), udp, b"")), hash);
            }
        }

        #[test]
        fn a_super_packet_hashes_like_its_segments([a, b] in endpoints()) {
            let packet = packet(a, b, false, &[7; 3000]);
            let (gso_type, csum_start) = if a.0.is_ipv4() { (GSO_TCPV4, 20) } else { (GSO_TCPV6, 40) };
            let hdr = VirtioNetHdr {
                flags: FLAG_NEEDS_CSUM,
                gso_type,
                gso_size: 1000,
                csum_start,
                csum_offset: 16,
                hdr_len: 0,
            };
            let mut hashes = HashSet::from([flow_hash(&packet)]);
            let count = segment(hdr, &packet, Offloads::NONE, &mut [0; 2000], |_, segment| {
                hashes.insert(flow_hash(segment));
            });
            prop_assert_eq!(count, Ok(3));
            prop_assert_eq!(hashes.len(), 1);
        }

        #[test]
        fn fragments_of_one_packet_stay_together([a, b] in endpoints(), next in any::<[u8; 8]>()) {
            let whole = packet(a, b, true, &[7; 100]);
            if a.0.is_ipv4() {
                let mut first = whole.clone();
                first[6] |= 0x20;
                let mut second = first.clone();
                second[7] = 3;
                second[20..28].copy_from_slice(&next);
                prop_assert_eq!(flow_hash(&first), flow_hash(&second));
                first[6] &= !0x20;
                prop_assert_eq!(flow_hash(&first), flow_hash(&whole));
            }
        }

        #[test]
        fn any_bytes_have_a_hash(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = flow_hash(&bytes);
        }
    }

    /// The value is part of what two hosts of different versions agree on.
    #[test]
    fn the_hash_does_not_change_between_versions() {
        let v4 = |last| IpAddr::from(Ipv4Addr::new(10, 87, 0, last));
        let v6 = |last| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last));
        let hashes = [
            flow_hash(&packet((v4(2), 40000), (v4(9), 443), false, b"")),
            flow_hash(&packet((v6(2), 40000), (v6(9), 443), true, b"")),
        ];
        assert_eq!(hashes, [1_125_422_685, 829_561_930]);
    }

    #[test]
    fn ports_of_one_client_spread_evenly() {
        let client = IpAddr::from(Ipv4Addr::new(10, 87, 0, 2));
        let server = (IpAddr::from(Ipv4Addr::new(203, 0, 113, 80)), 443);
        let mut buckets = [[0_u32; 8]; 2];
        for port in 32_768..40_768 {
            let hash = flow_hash(&packet((client, port), server, false, b""));
            buckets[0][(hash >> 29) as usize] += 1;
            buckets[1][(hash & 7) as usize] += 1;
        }
        for count in buckets.as_flattened() {
            // 1000 expected, standard deviation 30.
            assert!((850..1150).contains(count), "{buckets:?}");
        }
    }

    #[test]
    fn a_packet_that_does_not_hold_together_hashes_by_its_addresses() {
        let a = (IpAddr::from(Ipv4Addr::new(10, 87, 0, 2)), 1);
        let b = (IpAddr::from(Ipv4Addr::new(10, 87, 0, 3)), 2);
        let (mut forth, mut back) = (packet(a, b, true, b"abc"), packet(b, a, true, b"abc"));
        forth.truncate(25);
        back.truncate(29);
        assert_eq!(flow_hash(&forth), flow_hash(&back));
        assert_ne!(flow_hash(&forth), 0);
        assert_eq!(flow_hash(&forth[..19]), 0);
    }
}
