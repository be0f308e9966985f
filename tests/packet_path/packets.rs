//! Inner packets, as a kernel would hand them over.

use etherparse::{PacketBuilder, PacketHeaders, TransportHeader};
use ringtun::proto::offload::{FLAG_NEEDS_CSUM, GSO_TCPV4, VirtioNetHdr};
use ringtun::proto::packet::{Checksum, parse, pseudo_header_sum};
use std::net::{IpAddr, Ipv4Addr};

/// The client's inner address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 2);
/// The client's inner address of the other family.
pub const CLIENT_V6: [u8; 16] = [0xfd, 0x87, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
/// A host on the internet.
pub const WEB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// Its address of the other family.
pub const WEB_V6: [u8; 16] = [
    0x20, 0x01, 0x0d, 0xb8, 1, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80,
];
/// RFC 3168: capable of transport ECN.
pub const ECT_0: u8 = 2;
/// Payload bytes of a segment on a path with an MTU of 1500.
pub const GSO_BYTES: u16 = 1448;
/// The MTU that goes with it.
pub const MTU: usize = 1500;
/// Headers of a TCP packet without options.
pub const TCP_HEADERS_BYTES: usize = 40;

/// Both leases of the client.
pub fn lease() -> Vec<IpAddr> {
    vec![CLIENT.into(), IpAddr::from(CLIENT_V6)]
}

/// UDP over IPv4.
pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(from.0.octets(), to.0.octets(), 64)
        .udp(from.1, to.1)
        .write(&mut packet, payload)
        .unwrap();
    packet
}

/// UDP over IPv6.
pub fn udp_v6(from: ([u8; 16], u16), to: ([u8; 16], u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv6(from.0, to.0, 64)
        .udp(from.1, to.1)
        .write(&mut packet, payload)
        .unwrap();
    packet
}

/// A packet from the client that carries a number, for tests of order.
pub fn numbered(port: u16, number: u32) -> Vec<u8> {
    udp((CLIENT, port), (WEB, 53), &number.to_be_bytes())
}

/// The same from the host on the internet.
pub fn numbered_reply(port: u16, number: u32) -> Vec<u8> {
    udp((WEB, 53), (CLIENT, port), &number.to_be_bytes())
}

/// An IPv4 packet with other ECN bits.
pub fn with_ecn(mut packet: Vec<u8>, ecn: u8) -> Vec<u8> {
    packet[1] |= ecn;
    packet[10..12].fill(0);
    let checksum = Checksum::new().bytes(&packet[..20]).finish();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The number that a packet carries.
pub fn number_of(packet: &[u8]) -> u32 {
    u32::from_be_bytes(*packet[packet.len() - 4..].first_chunk().unwrap())
}

/// The port of the client's end of a numbered packet.
pub fn client_port_of(packet: &[u8]) -> u16 {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    match headers.transport {
        Some(TransportHeader::Udp(udp)) if udp.destination_port == 53 => udp.source_port,
        Some(TransportHeader::Udp(udp)) => udp.destination_port,
        other => panic!("not UDP: {other:?}"),
    }
}

/// The packet with the identification that [`udp`] gives it. It may not be fragmented, so nobody looks at it (RFC 6864),
/// and when packets are gathered it changes.
pub fn with_first_identification(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        assert_eq!(packet[6], 0x40, "must not be fragmented");
        packet[4..6].fill(0);
        packet[10..12].fill(0);
        let checksum = Checksum::new().bytes(&packet[..20]).finish();
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

/// `bytes` bytes, every one of which depends on its place and on `seed`.
pub fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|index| ((index + seed).wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// TCP from the client with several segments' payload and a partial checksum, the way the kernel makes it.
pub fn super_packet(sequence: u32, payload: &[u8]) -> (VirtioNetHdr, Vec<u8>) {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(CLIENT.octets(), WEB.octets(), 64)
        .tcp(40_000, 443, sequence, 1024)
        .ack(7)
        .psh()
        .write(&mut packet, payload)
        .unwrap();
    let headers = parse(&packet).unwrap();
    let partial = pseudo_header_sum(&packet, &headers)
        .word((packet.len() - headers.transport_offset) as u16)
        .folded();
    packet[36..38].copy_from_slice(&partial.to_be_bytes());
    let header = VirtioNetHdr {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        // The kernel may put its whole linear part here.
        hdr_len: packet.len().min(1800) as u16,
        gso_size: GSO_BYTES,
        csum_start: 20,
        csum_offset: 16,
    };
    (header, packet)
}

/// Does what the receiving kernel would do with a partial checksum.
pub fn complete(header: VirtioNetHdr, packet: &mut [u8]) {
    if header.flags & FLAG_NEEDS_CSUM != 0 {
        let start = usize::from(header.csum_start);
        let field = start + usize::from(header.csum_offset);
        let checksum = Checksum::new().bytes(&packet[start..]).finish();
        packet[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// Checks a whole TCP packet's checksums; gives its sequence number, its PSH flag and its payload.
pub fn whole_segment(packet: &[u8]) -> (u32, bool, &[u8]) {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    let (Some(etherparse::NetHeaders::Ipv4(ip, _)), Some(TransportHeader::Tcp(tcp))) =
        (&headers.net, &headers.transport)
    else {
        panic!("not TCP over IPv4: {headers:?}");
    };
    let payload = headers.payload.slice();
    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
    assert_eq!(
        tcp.checksum,
        tcp.calc_checksum_ipv4_raw(ip.source, ip.destination, payload)
            .unwrap()
    );
    (tcp.sequence_number, tcp.psh, payload)
}
