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
        // Each 32-bit word is two 16-bit words whose carries are folded at the end; this form vectorizes.
        let mut sum = self.0
            + words
                .iter()
                .map(|word| u64::from(u32::from_ne_bytes(*word)))
                .sum::<u64>();
        let (pairs, last) = rest.as_chunks::<2>();
        for pair in pairs {
            sum += u64::from(u16::from_ne_bytes(*pair));
        }
        if let [byte] = last {
            sum += u64::from(u16::from_ne_bytes([*byte, 0]));
        }
        Self(sum)
    }

    /// Adds one word.
    #[inline]
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.to_be()))
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
