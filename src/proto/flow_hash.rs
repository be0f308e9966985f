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
const KEY: [u64; 4] = [
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
/// All 32 bits are equally good. [`super::route_table::RouteTable::lookup`] uses the high ones to choose a
/// connection; flow queues should use the low ones.
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
fn multiply_fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}
