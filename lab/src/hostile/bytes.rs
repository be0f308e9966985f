//! The bytes that attacks consist of. Everything here is pure.
//!
//! A *capsule maker* returns capsules in plaintext. A [`Generate`] seals them and appends one piece
//! of a connection's ciphertext with every call; pieces are what an attack paces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ringtun::proto::capsule::{AssignedAddress, Capsule, PING_BYTES};
use ringtun::proto::http::OFFLOAD_CONTEXT;
use ringtun::proto::offload::{FLAG_NEEDS_CSUM, GSO_TCPV4, GSO_UDP_L4, VirtioNetHdr};
use ringtun::proto::packet::{
    Checksum, PROTOCOL_TCP, PROTOCOL_UDP, parse as parse_packet, pseudo_header_sum,
};
use ringtun::tls::record::{
    CONTROL_RECORD_BYTES_MAX, ContentType, RECORD_PLAINTEXT_BYTES_MAX, RecordLayer, sealed_bytes,
};

use crate::crowd::datagram;
use crate::topology::WEB_V4;

/// IPv4 entries of the largest ADDRESS_REQUEST: 16,380 bytes of value, with request ids of one
/// byte.
pub(super) const REQUESTED_V4: usize = 2340;
/// IPv6 entries of the largest ADDRESS_REQUEST: 16,378 bytes of value.
pub(super) const REQUESTED_V6: usize = 862;
/// Entries of an ADDRESS_REQUEST that is asked for again and again.
const REQUESTED_REPEATEDLY: usize = 64;
/// Request ids up to this one take one byte.
const REQUEST_ID_MAX: u64 = 63;
/// Payload of a UDP super-packet with a `gso_size` of 1: as many segments as Linux allows.
const UDP_PAYLOAD_BYTES: usize = 128;
/// `gso_size` of a TCP super-packet: the smallest without a bound on the number of segments.
const TCP_GSO_BYTES: u16 = 32;
/// Payload of such a super-packet, the longest multiple of that.
const TCP_PAYLOAD_BYTES: usize = 65_472;
/// Value of a DATAGRAM that is never finished.
const UNFINISHED_BYTES: usize = 60_000;
/// Bytes of it that are left for later, one by one.
const UNFINISHED_REST_BYTES: usize = 2_000;
/// Small records of one piece.
const RECORDS_PER_PIECE: usize = 400;
/// Where attackers send packets. `web` drops them, so that no answer is part of the load.
pub(super) const DISCARD_PORT: u16 = 9;
/// `web` sends bulk to whoever sends a packet to this port.
pub(super) const BULK_PORT: u16 = 7;
/// Flows that an attacker asks for.
const BULK_FLOWS: u16 = 64;
/// The first of their ports.
const BULK_SOURCE_PORT: u16 = 41_000;
const IPV4_HEADER_BYTES: usize = 20;
const UDP_HEADER_BYTES: usize = 8;
const TCP_HEADER_BYTES: usize = 20;
const TTL: u8 = 64;
/// `user_canceled`, as a warning (RFC 8446 section 6.1): it is ignored.
const USER_CANCELED: [u8; 2] = [1, 90];

/// Appends the next piece of a connection's ciphertext.
pub(super) type Generate = Box<dyn FnMut(&mut RecordLayer, &mut Vec<u8>)>;

/// An ADDRESS_REQUEST of this many addresses without preference.
pub(super) fn address_request(unspecified: IpAddr, entries: usize) -> Vec<u8> {
    let entry = |number: u64| {
        let id = 1 + number % REQUEST_ID_MAX;
        AssignedAddress::host(id, unspecified)
    };
    let entries = (0..entries as u64).map(entry).collect();
    let request = Capsule::AddressRequest(entries).to_bytes();
    request.expect("no more entries than a capsule holds")
}

/// PINGs that together fill a record.
pub(super) fn pings() -> Vec<u8> {
    fill_record(&ping())
}

fn ping() -> Vec<u8> {
    let mut ping = Vec::new();
    Capsule::put_ping([b'!'; PING_BYTES], &mut ping);
    ping
}

/// A UDP packet without payload as a plain DATAGRAM: the shortest that a kernel forwards.
pub(super) fn shortest_datagram(from: Ipv4Addr) -> Vec<u8> {
    let mut packet = ipv4(PROTOCOL_UDP, from, UDP_HEADER_BYTES);
    put_udp(&mut packet);
    // Without a checksum, as IPv4 allows.
    packet[IPV4_HEADER_BYTES + 6..][..2].fill(0);
    datagram(0, &[&packet])
}

/// A UDP super-packet of 128 segments with one byte each: 170 bytes as a capsule.
pub(super) fn udp_super_packet(from: Ipv4Addr) -> Vec<u8> {
    let mut packet = ipv4(PROTOCOL_UDP, from, UDP_HEADER_BYTES + UDP_PAYLOAD_BYTES);
    put_udp(&mut packet);
    let header = super_packet_header(GSO_UDP_L4, 1, UDP_HEADER_BYTES, 6);
    datagram(OFFLOAD_CONTEXT, &[&header.to_bytes(), &packet])
}

/// A TCP super-packet of 2,046 segments with 32 bytes each.
pub(super) fn tcp_super_packet(from: Ipv4Addr) -> Vec<u8> {
    const SOURCE_PORT: u16 = 40_000;
    const DATA_OFFSET: u8 = 5 << 4;
    const ACK_AND_PSH: u8 = 0x18;
    let mut packet = ipv4(PROTOCOL_TCP, from, TCP_HEADER_BYTES + TCP_PAYLOAD_BYTES);
    let tcp = &mut packet[IPV4_HEADER_BYTES..];
    tcp[..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
    tcp[2..4].copy_from_slice(&DISCARD_PORT.to_be_bytes());
    tcp[7] = 1;
    tcp[11] = 1;
    tcp[12] = DATA_OFFSET;
    tcp[13] = ACK_AND_PSH;
    tcp[14..16].fill(0xff);
    put_partial_checksum(&mut packet, 16);
    let header = super_packet_header(GSO_TCPV4, TCP_GSO_BYTES, TCP_HEADER_BYTES, 16);
    datagram(OFFLOAD_CONTEXT, &[&header.to_bytes(), &packet])
}

/// The front of a DATAGRAM that lacks its last bytes.
pub(super) fn unfinished_capsule() -> Vec<u8> {
    let mut capsule = datagram(0, &[&[0x45; UNFINISHED_BYTES]]);
    capsule.truncate(capsule.len() - UNFINISHED_REST_BYTES);
    capsule
}

/// Seals the same capsules again and again, in records of up to 16 KiB.
pub(super) fn repeat(capsules: Vec<u8>) -> Generate {
    Box::new(move |records, out| seal(records, ContentType::ApplicationData, &capsules, out))
}

/// The same ADDRESS_REQUEST again and again, of a size whose answer fits a capsule.
pub(super) fn address_requests() -> Generate {
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    repeat(fill_record(&address_request(any, REQUESTED_REPEATEDLY)))
}

/// ADDRESS_REQUESTs of the largest size, IPv4 or IPv6.
pub(super) fn largest_address_requests(is_ipv6: bool) -> Generate {
    repeat(match is_ipv6 {
        false => address_request(Ipv4Addr::UNSPECIFIED.into(), REQUESTED_V4),
        true => address_request(Ipv6Addr::UNSPECIFIED.into(), REQUESTED_V6),
    })
}

/// One record of 16 KiB, byte by byte. It never comes to its end.
pub(super) fn partial_record() -> Generate {
    let mut record = Vec::new();
    let mut sent = 0;
    Box::new(move |records, out| {
        if record.is_empty() {
            let plaintext = fill_record(&ping());
            seal(
                records,
                ContentType::ApplicationData,
                &plaintext,
                &mut record,
            );
        }
        // The last byte would complete the record.
        if sent < record.len() - 1 {
            out.push(record[sent]);
            sent += 1;
        }
    })
}

/// An unfinished capsule at once, and then the rest of it in records of one byte, but for the last
/// of them.
pub(super) fn partial_capsule() -> Generate {
    let mut front = unfinished_capsule();
    let mut left = UNFINISHED_REST_BYTES - 1;
    Box::new(move |records, out| {
        if !front.is_empty() {
            seal(records, ContentType::ApplicationData, &front, out);
            front = Vec::new();
        } else if left > 0 {
            left -= 1;
            seal(records, ContentType::ApplicationData, &[0x45], out);
        }
    })
}

/// Key updates that each ask for one in return.
pub(super) fn key_updates() -> Generate {
    Box::new(|records, out| {
        for _ in 0..RECORDS_PER_PIECE {
            append(out, CONTROL_RECORD_BYTES_MAX, |room| {
                records.key_update(true, room)
            });
        }
    })
}

/// UDP packets that ask `web` for bulk, one for each of many flows, as often as there is a piece to
/// be sent. The flows are of different ports, so that the server shares them out among all
/// connections of the session.
pub(super) fn invitations(from: Ipv4Addr) -> Generate {
    let mut capsules = Vec::new();
    for port in 0..BULK_FLOWS {
        let mut packet = ipv4(PROTOCOL_UDP, from, UDP_HEADER_BYTES);
        put_udp(&mut packet);
        let udp = &mut packet[IPV4_HEADER_BYTES..];
        udp[..2].copy_from_slice(&(BULK_SOURCE_PORT + port).to_be_bytes());
        udp[2..4].copy_from_slice(&BULK_PORT.to_be_bytes());
        // Without a checksum, as IPv4 allows.
        udp[6..8].fill(0);
        capsules.extend(datagram(0, &[&packet]));
    }
    repeat(capsules)
}

/// `user_canceled` alerts, a record each.
pub(super) fn user_canceled() -> Generate {
    small_records(ContentType::Alert, USER_CANCELED.to_vec(), 2)
}

/// Records of application data without any.
pub(super) fn empty_records() -> Generate {
    Box::new(|records, out| {
        for _ in 0..RECORDS_PER_PIECE {
            seal_one(records, ContentType::ApplicationData, &[], out);
        }
    })
}

/// The shortest packets, in records of `record_bytes` each.
pub(super) fn packets_in_small_records(from: Ipv4Addr, record_bytes: Option<usize>) -> Generate {
    let datagram = shortest_datagram(from);
    let record_bytes = record_bytes.unwrap_or(datagram.len());
    small_records(ContentType::ApplicationData, datagram, record_bytes)
}

/// `content` again and again, in records of a few bytes each.
fn small_records(content_type: ContentType, content: Vec<u8>, record_bytes: usize) -> Generate {
    Box::new(move |records, out| {
        let mut made = 0;
        while made < RECORDS_PER_PIECE {
            for part in content.chunks(record_bytes) {
                seal_one(records, content_type, part, out);
                made += 1;
            }
        }
    })
}

/// As many copies of a capsule as one record takes.
pub(super) fn fill_record(capsule: &[u8]) -> Vec<u8> {
    capsule.repeat((RECORD_PLAINTEXT_BYTES_MAX / capsule.len()).max(1))
}

fn seal(records: &mut RecordLayer, content_type: ContentType, content: &[u8], out: &mut Vec<u8>) {
    for part in content.chunks(RECORD_PLAINTEXT_BYTES_MAX) {
        seal_one(records, content_type, part, out);
    }
}

/// Seals one record. An attack with small records comes to a key's limit within a minute, and then
/// takes a new key.
fn seal_one(records: &mut RecordLayer, content_type: ContentType, part: &[u8], out: &mut Vec<u8>) {
    if records.wants_key_update() {
        append(out, CONTROL_RECORD_BYTES_MAX, |room| {
            records.key_update(false, room)
        });
    }
    append(out, sealed_bytes(part.len()), |room| {
        records.seal(content_type, part, room)
    });
}

fn append<E: std::fmt::Debug>(
    out: &mut Vec<u8>,
    bytes_max: usize,
    write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
) {
    let start = out.len();
    out.resize(start + bytes_max, 0);
    let written = write(&mut out[start..]).expect("there is room, and the key is young");
    out.truncate(start + written);
}

/// An IPv4 header, and zeros for what follows it.
fn ipv4(protocol: u8, from: Ipv4Addr, payload_bytes: usize) -> Vec<u8> {
    let total_bytes = u16::try_from(IPV4_HEADER_BYTES + payload_bytes).expect("an IPv4 packet");
    let mut packet = vec![0; total_bytes.into()];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&total_bytes.to_be_bytes());
    packet[8] = TTL;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&WEB_V4.octets());
    let sum = Checksum::new().bytes(&packet[..IPV4_HEADER_BYTES]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn put_udp(packet: &mut [u8]) {
    const SOURCE_PORT: u16 = 40_000;
    let udp_bytes = u16::try_from(packet.len() - IPV4_HEADER_BYTES).expect("an IPv4 packet");
    let udp = &mut packet[IPV4_HEADER_BYTES..];
    udp[..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
    udp[2..4].copy_from_slice(&DISCARD_PORT.to_be_bytes());
    udp[4..6].copy_from_slice(&udp_bytes.to_be_bytes());
    put_partial_checksum(packet, 6);
}

/// The pseudo-header's sum where the checksum is to be: the kernel does the rest.
fn put_partial_checksum(packet: &mut [u8], checksum_offset: usize) {
    let headers = parse_packet(packet).expect("a packet of our own");
    let sum = pseudo_header_sum(packet, &headers).folded();
    let at = IPV4_HEADER_BYTES + checksum_offset;
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn super_packet_header(
    gso_type: u8,
    gso_size: u16,
    transport_header_bytes: usize,
    csum_offset: u16,
) -> VirtioNetHdr {
    let header_bytes = IPV4_HEADER_BYTES + transport_header_bytes;
    VirtioNetHdr {
        flags: FLAG_NEEDS_CSUM,
        gso_type,
        hdr_len: u16::try_from(header_bytes).expect("two short headers"),
        gso_size,
        csum_start: u16::try_from(IPV4_HEADER_BYTES).expect("a short header"),
        csum_offset,
    }
}

#[cfg(test)]
mod tests {
    use ringtun::proto::capsule::kind;
    use ringtun::proto::deframer::{Deframer, Frame};
    use ringtun::proto::offload::VIRTIO_NET_HDR_BYTES;
    use ringtun::tls::record::{
        RECORD_OVERHEAD_BYTES, RECORDS_WITHOUT_DATA_MAX, RecordError, record_bytes,
    };

    use super::super::target::pair_in_memory;
    use super::*;

    const FROM: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 2);

    /// The value of the control capsule that is all of `bytes`.
    fn control_value(bytes: &[u8], expected_kind: u64) -> &[u8] {
        match Deframer::new().next(bytes).expect("a capsule") {
            Frame::Control { kind, value, end } => {
                assert_eq!((kind, end), (expected_kind, bytes.len()));
                &bytes[value]
            }
            other => panic!("{other:?}"),
        }
    }

    /// Context and payload of the DATAGRAM that is all of `bytes`.
    fn datagram_payload(bytes: &[u8]) -> (u64, &[u8]) {
        match Deframer::new().next(bytes).expect("a capsule") {
            Frame::Datagram {
                context,
                payload,
                end,
            } => {
                assert_eq!(end, bytes.len());
                (context, &bytes[payload])
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_largest_address_request_is_lawful_and_one_record() {
        for (any, entries, value_bytes) in [
            (IpAddr::V4(Ipv4Addr::UNSPECIFIED), REQUESTED_V4, 16_380),
            (IpAddr::V6(Ipv6Addr::UNSPECIFIED), REQUESTED_V6, 16_378),
        ] {
            let bytes = address_request(any, entries);
            let value = control_value(&bytes, kind::ADDRESS_REQUEST);
            assert_eq!(value.len(), value_bytes);
            assert!(bytes.len() <= RECORD_PLAINTEXT_BYTES_MAX);
            let capsule = Capsule::decode(kind::ADDRESS_REQUEST, value).expect("a lawful capsule");
            let Some(Capsule::AddressRequest(requested)) = capsule else {
                panic!("{capsule:?}");
            };
            assert_eq!(requested.len(), entries);
        }
    }

    #[test]
    fn a_udp_super_packet_has_170_bytes_and_128_segments() {
        let bytes = udp_super_packet(FROM);
        assert_eq!(bytes.len(), 170);
        let (context, payload) = datagram_payload(&bytes);
        assert_eq!(context, OFFLOAD_CONTEXT);
        let (header, packet) = payload
            .split_first_chunk::<VIRTIO_NET_HDR_BYTES>()
            .expect("a header");
        let header = VirtioNetHdr::read(header);
        assert_eq!((header.gso_type, header.gso_size), (GSO_UDP_L4, 1));
        let headers = parse_packet(packet).expect("a packet");
        assert_eq!(headers.protocol, PROTOCOL_UDP);
        assert_eq!(packet.len() - headers.transport_offset, 8 + 128);
    }

    #[test]
    fn a_tcp_super_packet_has_2046_segments() {
        let bytes = tcp_super_packet(FROM);
        let (_, payload) = datagram_payload(&bytes);
        let (header, packet) = payload
            .split_first_chunk::<VIRTIO_NET_HDR_BYTES>()
            .expect("a header");
        let gso_size = usize::from(VirtioNetHdr::read(header).gso_size);
        let headers = parse_packet(packet).expect("a packet");
        assert_eq!(headers.protocol, PROTOCOL_TCP);
        let payload_bytes = packet.len() - headers.transport_offset - TCP_HEADER_BYTES;
        assert_eq!(payload_bytes.div_ceil(gso_size), 2046);
    }

    #[test]
    fn the_shortest_packet_is_a_whole_udp_packet() {
        let bytes = shortest_datagram(FROM);
        let (context, packet) = datagram_payload(&bytes);
        assert_eq!((context, packet.len()), (0, 28));
        let sum = Checksum::new().bytes(&packet[..IPV4_HEADER_BYTES]);
        assert_eq!(sum.folded(), 0xffff);
    }

    #[test]
    fn an_unfinished_capsule_is_incomplete() {
        let bytes = unfinished_capsule();
        assert!(bytes.len() > 50_000);
        let frame = Deframer::new().next(&bytes).expect("the front of one");
        assert_eq!(frame, Frame::Incomplete);
    }

    /// Opens one record and takes what it brings.
    fn take(peer: &mut RecordLayer, record: &[u8]) -> Result<ContentType, RecordError> {
        let mut opened_bytes = vec![0; record.len()];
        let opened = peer.open(record, &mut opened_bytes)?;
        let _ = peer.handle(opened.content_type, &opened_bytes[..opened.bytes])?;
        Ok(opened.content_type)
    }

    #[test]
    fn the_peer_opens_every_record_that_is_made() {
        let makers: [(&str, Generate, ContentType); 7] = [
            ("pings", repeat(pings()), ContentType::ApplicationData),
            (
                "addresses",
                address_requests(),
                ContentType::ApplicationData,
            ),
            ("key updates", key_updates(), ContentType::Handshake),
            ("alerts", user_canceled(), ContentType::Alert),
            ("empty", empty_records(), ContentType::ApplicationData),
            (
                "tiny",
                packets_in_small_records(FROM, Some(1)),
                ContentType::ApplicationData,
            ),
            (
                "short",
                packets_in_small_records(FROM, None),
                ContentType::ApplicationData,
            ),
        ];
        for (name, mut generate, content_type) in makers {
            let (mut attacker, mut peer) = pair_in_memory();
            let mut stream = Vec::new();
            generate(&mut attacker, &mut stream);
            let mut rest = stream.as_slice();
            let mut taken = 0;
            while let Some(bytes) = record_bytes(rest).expect("a record") {
                match take(&mut peer, &rest[..bytes]) {
                    // What a server does with floods of those.
                    Err(RecordError::TooManyWithoutData) => {
                        assert_eq!(taken, RECORDS_WITHOUT_DATA_MAX, "{name}");
                        assert!(["key updates", "alerts", "empty"].contains(&name));
                        rest = &[];
                        break;
                    }
                    other => assert_eq!(other.expect(name), content_type, "{name}"),
                }
                taken += 1;
                rest = &rest[bytes..];
            }
            assert!(rest.is_empty(), "{name}");
        }
    }

    #[test]
    fn a_partial_record_grows_by_a_byte_and_is_never_whole() {
        let (mut attacker, _) = pair_in_memory();
        let mut generate = partial_record();
        let mut stream = Vec::new();
        for pieces in 1..=100 {
            generate(&mut attacker, &mut stream);
            assert_eq!(stream.len(), pieces);
        }
        for _ in 0..RECORD_PLAINTEXT_BYTES_MAX + RECORD_OVERHEAD_BYTES {
            generate(&mut attacker, &mut stream);
        }
        let whole = record_bytes(&stream).expect("a record").expect("a header");
        assert_eq!(stream.len(), whole - 1);
    }

    #[test]
    fn a_partial_capsule_grows_by_a_record_of_one_byte() {
        let (mut attacker, _) = pair_in_memory();
        let mut generate = partial_capsule();
        let mut front = Vec::new();
        generate(&mut attacker, &mut front);
        assert!(front.len() > 50_000);
        for _ in 0..3 {
            let mut piece = Vec::new();
            generate(&mut attacker, &mut piece);
            assert_eq!(piece.len(), sealed_bytes(1));
        }
    }
}
