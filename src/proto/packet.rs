//! Parsing of inner IP packets, and the Internet checksum.
//!
//! Nothing here is trusted: packets come from the peer or from whatever program writes raw sockets. Every function
//! takes any bytes and answers with a value; none allocates.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;

/// The largest packet that IPv4's total length can express; no inner packet is longer.
pub const PACKET_BYTES_MAX: usize = 65_535;
/// How many IPv6 extension headers are followed before a packet is given up.
pub const EXTENSION_HEADERS_MAX: usize = 8;

pub(crate) const IPV4_HEADER_BYTES_MIN: usize = 20;
pub(crate) const IPV6_HEADER_BYTES: usize = 40;

const PROTOCOL_HOP_BY_HOP: u8 = 0;
const PROTOCOL_ROUTING: u8 = 43;
const PROTOCOL_FRAGMENT: u8 = 44;
const PROTOCOL_AUTHENTICATION: u8 = 51;
const PROTOCOL_DESTINATION_OPTIONS: u8 = 60;

/// Where things are in an IP packet.
///
/// `transport_offset <= total_bytes <= ` the length of the slice that was parsed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Headers {
    /// 4 or 6.
    pub version: u8,
    /// The source address.
    pub src: IpAddr,
    /// The destination address of the IP header (a routing header's final destination is not looked at).
    pub dst: IpAddr,
    /// The transport protocol: what follows the IPv4 header or the last IPv6 extension header.
    pub protocol: u8,
    /// Where the transport header begins.
    pub transport_offset: usize,
    /// Whether this is a fragment, the first one included; then only the first has a transport header.
    pub fragment: bool,
    /// The packet's length by its own header.
    pub total_bytes: usize,
}

/// Why bytes are not an IP packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PacketError {
    /// Neither 4 nor 6 in the first four bits.
    #[error("not an IP packet")]
    Version,
    /// A length field contradicts the headers or goes beyond the bytes that are there.
    #[error("IP packet is shorter than its headers say")]
    Truncated,
    /// More than [`EXTENSION_HEADERS_MAX`] extension headers.
    #[error("too many IPv6 extension headers")]
    ExtensionHeaders,
}

/// Parses the IP header, and IPv6 extension headers up to the transport header or a fragment header.
#[inline]
pub fn parse(packet: &[u8]) -> Result<Headers, PacketError> {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => parse_v4(packet),
        Some(6) => parse_v6(packet),
        _ => Err(PacketError::Version),
    }
}

#[inline]
fn parse_v4(packet: &[u8]) -> Result<Headers, PacketError> {
    let Some(header) = packet.first_chunk::<IPV4_HEADER_BYTES_MIN>() else {
        return Err(PacketError::Truncated);
    };
    let transport_offset = usize::from(header[0] & 0x0f) * 4;
    let total_bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if transport_offset < IPV4_HEADER_BYTES_MIN
        || total_bytes < transport_offset
        || packet.len() < total_bytes
    {
        return Err(PacketError::Truncated);
    }
    // More-fragments or an offset other than zero; "do not fragment" and the reserved bit are neither.
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    Ok(Headers {
        version: 4,
        src: IpAddr::V4(Ipv4Addr::new(
            header[12], header[13], header[14], header[15],
        )),
        dst: IpAddr::V4(Ipv4Addr::new(
            header[16], header[17], header[18], header[19],
        )),
        protocol: header[9],
        transport_offset,
        fragment,
        total_bytes,
    })
}

#[inline]
fn parse_v6(packet: &[u8]) -> Result<Headers, PacketError> {
    let (Some(src), Some(dst)) = (address_v6(packet, 8), address_v6(packet, 24)) else {
        return Err(PacketError::Truncated);
    };
    let total_bytes = IPV6_HEADER_BYTES + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    if packet.len() < total_bytes {
        return Err(PacketError::Truncated);
    }
    let mut headers = Headers {
        version: 6,
        src: IpAddr::V6(src),
        dst: IpAddr::V6(dst),
        protocol: packet[6],
        transport_offset: IPV6_HEADER_BYTES,
        fragment: false,
        total_bytes,
    };
    if headers.protocol != PROTOCOL_TCP && headers.protocol != PROTOCOL_UDP {
        skip_extension_headers(&packet[..total_bytes], &mut headers)?;
    }
    Ok(headers)
}

/// RFC 8200 section 4; the set of extension headers is the one that Linux skips (`ipv6_ext_hdr`).
fn skip_extension_headers(packet: &[u8], headers: &mut Headers) -> Result<(), PacketError> {
    for _ in 0..=EXTENSION_HEADERS_MAX {
        let extension = &packet[headers.transport_offset..];
        let bytes = match headers.protocol {
            PROTOCOL_HOP_BY_HOP | PROTOCOL_ROUTING | PROTOCOL_DESTINATION_OPTIONS => {
                (usize::from(*extension.get(1).ok_or(PacketError::Truncated)?) + 1) * 8
            }
            PROTOCOL_AUTHENTICATION => {
                (usize::from(*extension.get(1).ok_or(PacketError::Truncated)?) + 2) * 4
            }
            PROTOCOL_FRAGMENT => 8,
            _ => return Ok(()),
        };
        if extension.len() < bytes {
            return Err(PacketError::Truncated);
        }
        headers.fragment = headers.protocol == PROTOCOL_FRAGMENT;
        headers.protocol = extension[0];
        headers.transport_offset += bytes;
        if headers.fragment {
            // What follows the fragment header is only in the first fragment what its next-header field says.
            return Ok(());
        }
    }
    Err(PacketError::ExtensionHeaders)
}

/// The source address, if there is an IP header's worth of bytes.
#[inline]
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= IPV4_HEADER_BYTES_MIN => address_v4(packet, 12).map(IpAddr::V4),
        6 if packet.len() >= IPV6_HEADER_BYTES => address_v6(packet, 8).map(IpAddr::V6),
        _ => None,
    }
}

/// The destination address, if there is an IP header's worth of bytes.
#[inline]
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => address_v4(packet, 16).map(IpAddr::V4),
        6 => address_v6(packet, 24).map(IpAddr::V6),
        _ => None,
    }
}

#[inline]
fn address_v4(packet: &[u8], offset: usize) -> Option<Ipv4Addr> {
    packet
        .get(offset..)?
        .first_chunk::<4>()
        .map(|octets| Ipv4Addr::from(*octets))
}

#[inline]
fn address_v6(packet: &[u8], offset: usize) -> Option<Ipv6Addr> {
    packet
        .get(offset..)?
        .first_chunk::<16>()
        .map(|octets| Ipv6Addr::from(*octets))
}

/// A running Internet checksum (RFC 1071): the one's complement sum of 16-bit words.
///
/// Words are added in the machine's byte order and swapped once at the end (RFC 1071 section 2 (B)). The
/// accumulator has room for gigabytes before it could overflow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum(u64);

impl Checksum {
    /// The sum of nothing.
    #[inline]
    pub fn new() -> Self {
        Self(0)
    }

    /// Adds `bytes`, the last one padded with a zero if they are odd in number (so that only the last call may be odd).
    #[inline]
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // Each 32-bit word is two 16-bit words whose carries are folded at the end. This form
        // vectorizes, also where overflow is checked: it cannot wrap, and is not to be checked.
        let mut sum = words.iter().fold(self.0, |sum, word| {
            sum.wrapping_add(u32::from_ne_bytes(*word).into())
        });
        let (pairs, last) = rest.as_chunks::<2>();
        for pair in pairs {
            sum = sum.wrapping_add(u16::from_ne_bytes(*pair).into());
        }
        if let [byte] = last {
            sum = sum.wrapping_add(u16::from_ne_bytes([*byte, 0]).into());
        }
        Self(sum)
    }

    /// Adds one word.
    #[inline]
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        Self(self.0.wrapping_add(word.to_be().into()))
    }

    /// Takes one word out again.
    #[inline]
    #[must_use]
    pub fn without_word(self, word: u16) -> Self {
        self.word(!word)
    }

    /// The folded sum, not complemented: what a partial checksum field holds.
    #[inline]
    pub fn folded(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        u16::from_be(sum as u16)
    }

    /// The checksum: the complement of the folded sum.
    #[inline]
    pub fn finish(self) -> u16 {
        !self.folded()
    }
}

/// The sum of the pseudo-header without the length: both addresses and the protocol (RFC 9293 section 3.1, RFC 8200
/// section 8.1). `headers` must have been parsed from `packet`.
pub fn pseudo_header_sum(packet: &[u8], headers: &Headers) -> Checksum {
    let addresses = if headers.version == 4 {
        &packet[12..20]
    } else {
        &packet[8..40]
    };
    Checksum::new()
        .bytes(addresses)
        .word(u16::from(headers.protocol))
}

#[cfg(test)]
mod tests {
    use etherparse::{
        IpFragOffset, IpHeaders, IpNumber, IpSlice, Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header,
        Ipv6RawExtHeader, PacketBuilder,
    };
    use proptest::prelude::*;

    use super::*;

    fn udp_v4() -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([10, 87, 0, 2], [203, 0, 113, 80], 64)
            .udp(5, 6)
            .write(&mut packet, b"payload")
            .expect("fits");
        packet
    }

    fn tcp_v6(extensions: Ipv6Extensions) -> Vec<u8> {
        let header = Ipv6Header {
            source: [0xfd; 16],
            destination: [0x20; 16],
            ..Default::default()
        };
        let mut packet = Vec::new();
        PacketBuilder::ip(IpHeaders::Ipv6(header, extensions))
            .tcp(5, 6, 7, 8)
            .write(&mut packet, b"payload")
            .expect("fits");
        packet
    }

    fn options(bytes: usize) -> Ipv6RawExtHeader {
        Ipv6RawExtHeader::new_raw(IpNumber::TCP, &vec![0; bytes - 2]).expect("a multiple of 8")
    }

    #[test]
    fn an_ipv4_packet_is_parsed() {
        let packet = udp_v4();
        let expected = Headers {
            version: 4,
            src: "10.87.0.2".parse().expect("valid"),
            dst: "203.0.113.80".parse().expect("valid"),
            protocol: PROTOCOL_UDP,
            transport_offset: 20,
            fragment: false,
            total_bytes: 35,
        };
        assert_eq!(parse(&packet), Ok(expected));
    }

    #[test]
    fn bytes_after_the_packet_are_not_part_of_it() {
        for packet in [udp_v4(), tcp_v6(Default::default())] {
            let longer = [&packet[..], &[0; 9]].concat();
            assert_eq!(parse(&longer), parse(&packet));
        }
    }

    #[test]
    fn ipv6_extension_headers_are_skipped() {
        let extensions = Ipv6Extensions {
            hop_by_hop_options: Some(options(8)),
            destination_options: Some(options(24)),
            ..Default::default()
        };
        let headers = parse(&tcp_v6(extensions)).expect("a packet");
        assert_eq!(
            (headers.protocol, headers.transport_offset),
            (PROTOCOL_TCP, 72)
        );
        assert!(!headers.fragment);
    }

    #[test]
    fn a_fragment_is_seen_before_its_transport_header() {
        let offset = IpFragOffset::try_new(0).expect("valid");
        let fragment = Ipv6FragmentHeader::new(IpNumber::TCP, offset, true, 99);
        let extensions = Ipv6Extensions {
            fragment: Some(fragment),
            ..Default::default()
        };
        let headers = parse(&tcp_v6(extensions)).expect("a packet");
        assert!(headers.fragment);
        assert_eq!(
            (headers.protocol, headers.transport_offset),
            (PROTOCOL_TCP, 48)
        );

        for (byte, bits, fragment) in [
            (6, 0x20, true),
            (6, 0x1f, true),
            (7, 1, true),
            (6, 0x40, false),
        ] {
            let mut packet = udp_v4();
            packet[6] = 0;
            packet[byte] |= bits;
            assert_eq!(
                parse(&packet).map(|headers| headers.fragment),
                Ok(fragment),
                "{byte} {bits}"
            );
        }
    }

    #[test]
    fn a_chain_of_extension_headers_has_a_bound() {
        let chain = |count: usize| {
            let mut packet = tcp_v6(Default::default());
            packet[6] = PROTOCOL_DESTINATION_OPTIONS;
            let mut extensions = [PROTOCOL_DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0].repeat(count);
            extensions[(count - 1) * 8] = PROTOCOL_TCP;
            let payload_bytes = (packet.len() - 40 + extensions.len()) as u16;
            packet[4..6].copy_from_slice(&payload_bytes.to_be_bytes());
            packet.splice(40..40, extensions);
            parse(&packet)
        };
        let headers = chain(EXTENSION_HEADERS_MAX).expect("as many as allowed");
        assert_eq!(
            (headers.protocol, headers.transport_offset),
            (PROTOCOL_TCP, 40 + 8 * EXTENSION_HEADERS_MAX)
        );
        assert_eq!(
            chain(EXTENSION_HEADERS_MAX + 1),
            Err(PacketError::ExtensionHeaders)
        );
    }

    #[test]
    fn every_cut_is_noticed() {
        let extensions = Ipv6Extensions {
            hop_by_hop_options: Some(options(16)),
            ..Default::default()
        };
        for packet in [udp_v4(), tcp_v6(extensions)] {
            for bytes in 1..packet.len() {
                assert_eq!(parse(&packet[..bytes]), Err(PacketError::Truncated));
            }
            assert_eq!(parse(&[]), Err(PacketError::Version));
        }
    }

    #[test]
    fn an_extension_header_beyond_the_ip_length_is_truncated() {
        let extensions = Ipv6Extensions {
            hop_by_hop_options: Some(options(16)),
            ..Default::default()
        };
        let mut packet = tcp_v6(extensions);
        for payload_bytes in 0..16 {
            packet[5] = payload_bytes;
            assert_eq!(
                parse(&packet),
                Err(PacketError::Truncated),
                "{payload_bytes}"
            );
        }
    }

    #[test]
    fn the_pseudo_headers_sum_makes_a_checksum() {
        for packet in [udp_v4(), tcp_v6(Default::default())] {
            let headers = parse(&packet).expect("a packet");
            let transport = &packet[headers.transport_offset..];
            let sum = pseudo_header_sum(&packet, &headers)
                .word(transport.len() as u16)
                .bytes(transport);
            assert_eq!(
                sum.finish(),
                0,
                "a packet with its checksum in place sums up to zero"
            );
        }
    }

    /// Headers at their limits: header lengths, total lengths and chains of extension headers that
    /// are right, one off, zero or as great as can be.
    fn extreme() -> impl Strategy<Value = Vec<u8>> {
        let next = prop::sample::select(vec![0_u8, 6, 17, 43, 44, 51, 59, 60, 255]);
        let length = prop::sample::select(vec![0_u8, 1, 2, 254, 255]);
        let extensions =
            prop::collection::vec((next.clone(), length), 0..EXTENSION_HEADERS_MAX + 3);
        let off = prop_oneof![4 => Just(0_i32), 1 => -1..=1_i32, 1 => Just(i32::MAX), 1 => Just(i32::MIN)];
        let v6 = (next, extensions, off.clone(), 0..40_usize).prop_map(
            |(first, extensions, off, payload_bytes)| {
                let mut packet = vec![0x60; IPV6_HEADER_BYTES];
                packet[6] = first;
                let mut kind = first;
                for (next, length) in extensions {
                    let bytes = match kind {
                        PROTOCOL_FRAGMENT => 8,
                        PROTOCOL_AUTHENTICATION => (usize::from(length) + 2) * 4,
                        _ => (usize::from(length) + 1) * 8,
                    };
                    let start = packet.len();
                    packet.resize(start + bytes, 0xff);
                    packet[start..start + 2].copy_from_slice(&[next, length]);
                    kind = next;
                }
                packet.resize(packet.len() + payload_bytes, 0);
                let length = (packet.len() as i32 - 40)
                    .saturating_add(off)
                    .clamp(0, 0xffff);
                packet[4..6].copy_from_slice(&(length as u16).to_be_bytes());
                packet
            },
        );
        let v4 =
            (0..16_u8, off, 0..70_usize, any::<u16>()).prop_map(|(words, off, bytes, flags)| {
                let mut packet = vec![0xff; bytes.max(8)];
                packet[0] = 0x40 | words;
                packet[6..8].copy_from_slice(&flags.to_be_bytes());
                let length = (packet.len() as i32).saturating_add(off).clamp(0, 0xffff);
                packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
                packet
            });
        let ends = [
            vec![],
            vec![0; 70],
            vec![0xff; 70],
            vec![0x45; PACKET_BYTES_MAX],
            vec![0x60; PACKET_BYTES_MAX],
        ];
        prop_oneof![4 => v6, 4 => v4, 1 => prop::sample::select(ends.to_vec())]
    }

    proptest! {
        #[test]
        fn headers_at_their_limits_are_parsed_without_panic(packet in extreme()) {
            if let Ok(headers) = parse(&packet) {
                prop_assert!(headers.transport_offset <= headers.total_bytes);
                prop_assert!(headers.total_bytes <= packet.len());
                prop_assert_eq!(source(&packet), Some(headers.src));
                prop_assert_eq!(destination(&packet), Some(headers.dst));
                pseudo_header_sum(&packet, &headers);
            }
            source(&packet);
            destination(&packet);
            crate::proto::flow_hash::flow_hash(&packet);
            crate::proto::ecn::mark_congestion(&mut packet.clone());
        }

        #[test]
        fn any_bytes_are_parsed_without_panic(mut packet in prop::collection::vec(any::<u8>(), 1..120), v6: bool) {
            packet[0] = if v6 { 0x60 } else { 0x45 };
            if packet.len() >= 8 {
                // Lengths that are nearly right get further.
                packet[2] = 0;
                packet[4] = 0;
            }
            if let Ok(headers) = parse(&packet) {
                prop_assert!(headers.transport_offset <= headers.total_bytes);
                prop_assert!(headers.total_bytes <= packet.len());
                prop_assert_eq!(source(&packet), Some(headers.src));
                prop_assert_eq!(destination(&packet), Some(headers.dst));
                if let Ok(slice) = IpSlice::from_slice(&packet) {
                    prop_assert_eq!(slice.source_addr(), headers.src);
                    prop_assert_eq!(slice.destination_addr(), headers.dst);
                }
            }
        }

        #[test]
        fn the_checksum_is_rfc_1071s(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut sum = bytes
                .chunks(2)
                .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
                .sum::<u32>();
            while sum > 0xffff {
                sum = (sum >> 16) + (sum & 0xffff);
            }
            prop_assert_eq!(Checksum::new().bytes(&bytes).folded(), sum as u16);
            prop_assert_eq!(Checksum::new().bytes(&bytes).finish(), !(sum as u16));
        }

        #[test]
        fn a_word_can_be_taken_out_again(bytes in prop::collection::vec(any::<u8>(), 1..100), word: u16) {
            prop_assume!(bytes.iter().any(|byte| *byte != 0));
            let sum = Checksum::new().bytes(&bytes);
            // Zero and 0xffff are the same number in one's complement.
            let same = |a: u16, b: u16| a % 0xffff == b % 0xffff;
            prop_assert!(same(sum.word(word).without_word(word).folded(), sum.folded()));
        }
    }

    #[test]
    fn the_largest_packet_of_ones_does_not_overflow_the_sum() {
        let ones = vec![0xff; PACKET_BYTES_MAX + 1];
        assert_eq!(Checksum::new().bytes(&ones).bytes(&ones).folded(), 0xffff);
    }
}
