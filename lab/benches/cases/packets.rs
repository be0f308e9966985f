//! Packets as a kernel hands them over.

use etherparse::PacketBuilder;
use ringtun::proto::offload::{FLAG_NEEDS_CSUM, GSO_TCPV4, GSO_TCPV6, VirtioNetHdr};

/// Payload bytes of a segment on a path with an MTU of 1500.
const SEGMENT_BYTES: usize = 1400;
/// Payload bytes of a full super-packet.
const SUPER_PACKET_BYTES: usize = 46 * SEGMENT_BYTES;
const TCP_CSUM_OFFSET: u16 = 16;
const IPV4_HEADER_BYTES: u16 = 20;
const IPV6_HEADER_BYTES: u16 = 40;

/// The version of the inner IP.
#[derive(Clone, Copy, Debug)]
pub enum Family {
    V4,
    V6,
}

/// A TCP packet of flow number `flow`, away from the client.
pub fn tcp(family: Family, flow: usize, payload_bytes: usize) -> Vec<u8> {
    let port = 40_000 + flow as u16;
    let payload: Vec<u8> = (0..payload_bytes)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut packet = Vec::new();
    match family {
        Family::V4 => PacketBuilder::ipv4([10, 87, 0, 2], [203, 0, 113, 80], 64)
            .tcp(port, 443, 1, 1024)
            .ack(7)
            .write(&mut packet, &payload),
        Family::V6 => {
            let (mut client, mut web) = ([0; 16], [0; 16]);
            client[..2].copy_from_slice(&[0xfd, 0x87]);
            client[15] = 2;
            web[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
            web[15] = 80;
            PacketBuilder::ipv6(client, web, 64)
                .tcp(port, 443, 1, 1024)
                .ack(7)
                .write(&mut packet, &payload)
        }
    }
    .expect("a packet");
    packet
}

/// Nearly 64 KiB of TCP under one header, with a partial checksum (whose sum does not matter here).
pub fn super_packet(family: Family) -> (VirtioNetHdr, Vec<u8>) {
    let (gso_type, csum_start) = match family {
        Family::V4 => (GSO_TCPV4, IPV4_HEADER_BYTES),
        Family::V6 => (GSO_TCPV6, IPV6_HEADER_BYTES),
    };
    let header = VirtioNetHdr {
        flags: FLAG_NEEDS_CSUM,
        gso_type,
        hdr_len: csum_start + IPV4_HEADER_BYTES,
        gso_size: SEGMENT_BYTES as u16,
        csum_start,
        csum_offset: TCP_CSUM_OFFSET,
    };
    (header, tcp(family, 0, SUPER_PACKET_BYTES))
}
