//! `virtio_net_hdr`: what it may say, and what to do for a peer that does not take it.
//!
//! A TUN queue opened with `IFF_VNET_HDR` puts this header before every packet. It describes super-packets (several
//! segments of one flow under one header, up to 64 KiB) and partial checksums (the checksum field holds the
//! pseudo-header's sum, the kernel that sends it on a wire does the rest). On the way through the tunnel:
//!
//! 1. the sender asks [`fit`] whether the peer takes the packet as it is; nearly always it does;
//! 2. otherwise [`segment()`] turns it into packets that the peer takes;
//! 3. small packets of UDP that follow one another become one super-packet, a [`Run`], where the peer takes those;
//! 4. the receiver has [`validate`] check the header against the packet and writes both to its own TUN.
//!
//! The rules are the intersection of what an honest kernel produces and what every kernel accepts
//! (`virtio_net_hdr_to_skb` in Linux's `include/linux/virtio_net.h`), so that a header which passes is never refused
//! by the local kernel for what it says. One exception: kernels before 6.9 take 64 segments of UDP, newer ones 128.

mod congestion;
mod gather;
mod segment;

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use super::packet::{self, Headers, PROTOCOL_TCP, PROTOCOL_UDP, PacketError};

pub use congestion::{Signal, signal, trim_first};
pub use gather::{Datagram, GATHERED_SEGMENTS_MAX, Run};
pub use segment::segment;

/// Length of the header, and of the headroom that a packet needs for it.
pub const VIRTIO_NET_HDR_BYTES: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is partial.
pub const FLAG_NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: the kernel has checked the checksum. It says so of what it gives, to nobody else.
pub const FLAG_DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_NONE`: one ordinary packet.
pub const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`: segments of TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`: segments of TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`: datagrams of UDP, over either.
pub const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`: a flag in the type of a TCP super-packet: its first segment has CWR set.
pub const GSO_ECN: u8 = 0x80;

/// The smallest `gso_size` of a peer's super-packet with two segments or more.
///
/// An ordinary packet costs its sender at least its headers, so a byte must not make more packets
/// in a super-packet than outside of one. Linux's smallest MSS is 48, options included, so honest
/// segments are hardly ever smaller.
pub const GSO_BYTES_MIN: usize = 48;
/// The most segments of a peer's super-packet. It is the kernel's `UDP_MAX_SEGMENTS`, and enough
/// for 64 KiB in segments of the smallest MSS that IPv4 guarantees (536).
pub const SEGMENTS_MAX: usize = 128;
/// The longest headers of a peer's super-packet with two segments or more, unless `gso_size` is
/// greater.
///
/// Each segment repeats them. IPv6 extension headers may have 16 KiB, and a few KiB would become
/// megabytes. These are enough for IPv6, three extension headers of the usual length and the
/// longest TCP header.
pub const REPEATED_HEADER_BYTES_MAX: usize = 128;

/// The kernel's `GSO_BY_FRAGS`, a `gso_size` that is none.
const GSO_BY_FRAGS: u16 = 0xffff;

const TCP_HEADER_BYTES_MIN: usize = 20;
const TCP_CSUM_OFFSET: u16 = 16;
const TCP_FLAGS_OFFSET: usize = 13;
const TCP_FLAG_FIN: u8 = 0x01;
const TCP_FLAG_SYN: u8 = 0x02;
const TCP_FLAG_RST: u8 = 0x04;
const TCP_FLAG_PSH: u8 = 0x08;
const TCP_FLAG_CWR: u8 = 0x80;
const UDP_HEADER_BYTES: usize = 8;
const UDP_CSUM_OFFSET: u16 = 6;

/// The header as it is on TUN and in the offload context: ten bytes, little-endian.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct VirtioNetHdr {
    /// [`FLAG_NEEDS_CSUM`], from the local kernel also [`FLAG_DATA_VALID`]; others mean nothing here.
    pub flags: u8,
    /// One of the `GSO_` types, maybe with [`GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers of a super-packet; a hint that is never trusted.
    pub hdr_len: u16,
    /// Payload bytes of every segment but the last.
    pub gso_size: u16,
    /// Where the checksummed part of the packet begins.
    pub csum_start: u16,
    /// Where the checksum is, counted from `csum_start`.
    pub csum_offset: u16,
}

impl VirtioNetHdr {
    /// The header of an ordinary packet with a complete checksum.
    pub const PLAIN: Self = Self {
        flags: 0,
        gso_type: GSO_NONE,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };

    /// Reads the ten bytes.
    #[inline]
    pub fn read(bytes: &[u8; VIRTIO_NET_HDR_BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// The ten bytes.
    #[inline]
    pub fn to_bytes(self) -> [u8; VIRTIO_NET_HDR_BYTES] {
        let [hdr_len, gso_size, csum_start, csum_offset] = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        ]
        .map(u16::to_le_bytes);
        [
            self.flags,
            self.gso_type,
            hdr_len[0],
            hdr_len[1],
            gso_size[0],
            gso_size[1],
            csum_start[0],
            csum_start[1],
            csum_offset[0],
            csum_offset[1],
        ]
    }

    /// Writes the ten bytes.
    #[inline]
    pub fn write(self, out: &mut [u8; VIRTIO_NET_HDR_BYTES]) {
        *out = self.to_bytes();
    }

    /// Whether the packet is ordinary: one segment with a complete checksum. It then needs no header at all.
    #[inline]
    pub fn is_plain(self) -> bool {
        self.flags & FLAG_NEEDS_CSUM == 0 && self.gso_type == GSO_NONE
    }

    fn needs_csum(self) -> bool {
        self.flags & FLAG_NEEDS_CSUM != 0
    }
}

/// Which packets a host takes besides ordinary ones.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Offloads {
    /// Partial checksums. Without it none of the others is of use.
    pub csum: bool,
    /// Super-packets of TCP over IPv4.
    pub tso4: bool,
    /// Super-packets of TCP over IPv6.
    pub tso6: bool,
    /// Super-packets of UDP over IPv4.
    pub uso4: bool,
    /// Super-packets of UDP over IPv6.
    pub uso6: bool,
}

// Linux's `include/uapi/linux/if_tun.h`.
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

impl Offloads {
    /// Ordinary packets only.
    pub const NONE: Self = Self {
        csum: false,
        tso4: false,
        tso6: false,
        uso4: false,
        uso6: false,
    };
    /// Everything that there is.
    pub const ALL: Self = Self {
        csum: true,
        tso4: true,
        tso6: true,
        uso4: true,
        uso6: true,
    };

    /// What both take.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self {
            csum: self.csum && other.csum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            uso4: self.uso4 && other.uso4,
            uso6: self.uso6 && other.uso6,
        }
    }

    /// The argument of `TUNSETOFFLOAD`. The kernel takes the two USO flags only together and everything only with CSUM.
    pub fn to_tun_flags(self) -> u32 {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        flag(self.csum, TUN_F_CSUM)
            | flag(self.tso4, TUN_F_TSO4)
            | flag(self.tso6, TUN_F_TSO6)
            | flag(self.tso4 || self.tso6, TUN_F_TSO_ECN)
            | flag(self.uso4, TUN_F_USO4)
            | flag(self.uso6, TUN_F_USO6)
    }

    /// What an argument of `TUNSETOFFLOAD` turns on.
    pub fn from_tun_flags(flags: u32) -> Self {
        let on = |flag: u32| flags & flag != 0;
        Self {
            csum: on(TUN_F_CSUM),
            tso4: on(TUN_F_TSO4),
            tso6: on(TUN_F_TSO6),
            uso4: on(TUN_F_USO4),
            uso6: on(TUN_F_USO6),
        }
    }

    fn by_name(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "csum" => Some(&mut self.csum),
            "tso4" => Some(&mut self.tso4),
            "tso6" => Some(&mut self.tso6),
            "uso4" => Some(&mut self.uso4),
            "uso6" => Some(&mut self.uso6),
            _ => None,
        }
    }
}

/// Parameters of a structured field (RFC 9651 section 3.1.2): `csum;tso4`, empty for none.
impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [
            (self.csum, "csum"),
            (self.tso4, "tso4"),
            (self.tso6, "tso6"),
            (self.uso4, "uso4"),
            (self.uso6, "uso6"),
        ];
        let mut separator = "";
        for (_, name) in named.iter().filter(|(on, _)| *on) {
            write!(f, "{separator}{name}")?;
            separator = ";";
        }
        Ok(())
    }
}

/// Reads what [`Display`](fmt::Display) writes: `csum;tso4`, a leading semicolon and spaces allowed. An unknown name is
/// ignored, so that more can be added later, and a value other than `?1` means off.
impl FromStr for Offloads {
    type Err = Infallible;

    fn from_str(parameters: &str) -> Result<Self, Infallible> {
        let mut offloads = Self::NONE;
        for parameter in parameters.split(';') {
            let (name, value) = parameter
                .trim()
                .split_once('=')
                .unwrap_or((parameter.trim(), "?1"));
            if let Some(on) = offloads.by_name(name) {
                *on = value == "?1";
            }
        }
        Ok(offloads)
    }
}

/// What is wrong with a header, or with a packet under such a header.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OffloadError {
    /// It is not even an IP packet.
    #[error("unreadable packet under an offload header")]
    Packet(#[source] PacketError),
    /// The IP header's length is not the packet's.
    #[error("IP length differs from the packet's length")]
    Length,
    /// A fragment has neither a partial checksum nor segments.
    #[error("fragment with an offload header")]
    Fragment,
    /// The sender was not told that we take this.
    #[error("offload that was not negotiated")]
    NotAccepted,
    /// `csum_start` and `csum_offset` are not those of the packet's TCP or UDP checksum.
    #[error("partial checksum elsewhere than in the TCP or UDP header")]
    ChecksumPosition,
    /// A super-packet has to have a partial checksum.
    #[error("super-packet without a partial checksum")]
    ChecksumMissing,
    /// A `gso_type` that does not exist, or not in this combination.
    #[error("unknown gso_type")]
    GsoType,
    /// `gso_type` names another protocol than the packet's.
    #[error("gso_type contradicts the packet's protocol")]
    Protocol,
    /// The TCP or UDP header is cut off or contradicts itself, or its flags forbid segments (SYN, RST).
    #[error("transport header unfit for segmentation")]
    Transport,
    /// `gso_size` is out of range, below [`GSO_BYTES_MIN`], or makes more than [`SEGMENTS_MAX`]
    /// segments.
    #[error("gso_size out of range")]
    GsoSize,
    /// The headers that all segments repeat are longer than `gso_size` and
    /// [`REPEATED_HEADER_BYTES_MAX`].
    #[error("headers too long to be repeated in every segment")]
    RepeatedHeaders,
    /// The scratch space given to [`segment()`] is shorter than a segment.
    #[error("scratch space shorter than a segment")]
    Scratch,
}

/// Checks a peer's header against the packet that it came with, as hostile input.
///
/// `accepted` is what the peer was told that we take. The answer is the header to write to TUN:
/// flags masked to [`FLAG_NEEDS_CSUM`], `hdr_len` computed anew, fields without meaning zero, a
/// super-packet of one segment made an ordinary packet. A packet under an empty header passes if
/// [`packet::parse`] takes it, as in context 0. Whether the source address belongs to the peer is
/// for the caller to check.
///
/// # Errors
/// The first contradiction found; the packet is to be dropped.
#[inline]
pub fn validate(
    hdr: VirtioNetHdr,
    packet: &[u8],
    accepted: Offloads,
) -> Result<VirtioNetHdr, OffloadError> {
    if hdr.is_plain() {
        // The rules of context 0: an empty header must not be a way around them.
        packet::parse(packet).map_err(OffloadError::Packet)?;
        return Ok(VirtioNetHdr::PLAIN);
    }
    if !hdr.needs_csum() {
        return Err(OffloadError::ChecksumMissing);
    }
    if !accepted.csum {
        return Err(OffloadError::NotAccepted);
    }
    let headers = parse_whole(packet)?;
    let (transport_bytes_min, csum_offset) = match headers.protocol {
        PROTOCOL_TCP => (TCP_HEADER_BYTES_MIN, TCP_CSUM_OFFSET),
        PROTOCOL_UDP => (UDP_HEADER_BYTES, UDP_CSUM_OFFSET),
        _ => return Err(OffloadError::ChecksumPosition),
    };
    if usize::from(hdr.csum_start) != headers.transport_offset || hdr.csum_offset != csum_offset {
        return Err(OffloadError::ChecksumPosition);
    }
    if packet.len() < headers.transport_offset + transport_bytes_min {
        return Err(OffloadError::Transport);
    }
    let checksum_only = VirtioNetHdr {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_NONE,
        hdr_len: 0,
        gso_size: 0,
        ..hdr
    };
    if hdr.gso_type == GSO_NONE {
        return Ok(checksum_only);
    }
    let super_packet = SuperPacket::parse(hdr, packet, headers)?;
    if !super_packet.is_accepted(accepted) {
        return Err(OffloadError::NotAccepted);
    }
    if super_packet.payload_bytes() <= super_packet.gso_bytes {
        return Ok(checksum_only);
    }
    super_packet.check_amplification()?;
    let hdr_len = u16::try_from(super_packet.header_bytes).map_err(|_| OffloadError::Length)?;
    Ok(VirtioNetHdr {
        flags: FLAG_NEEDS_CSUM,
        hdr_len,
        ..hdr
    })
}

/// Whether a peer takes a packet as the local TUN gave it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fit {
    /// Send header and packet as they are.
    AsIs,
    /// Let [`segment()`] make packets of it that the peer takes.
    NeedsSegmenting,
}

/// Whether a peer that takes `accepts` takes this packet, by the same rules by which it will [`validate`] it.
///
/// An unusual packet that the peer would have to refuse (a partial checksum of a protocol inside
/// another, tiny or very many segments, long headers) is segmented rather than lost.
#[inline]
pub fn fit(hdr: VirtioNetHdr, packet: &[u8], accepts: Offloads) -> Fit {
    if hdr.is_plain() || validate(hdr, packet, accepts).is_ok() {
        Fit::AsIs
    } else {
        Fit::NeedsSegmenting
    }
}

#[inline]
fn parse_whole(packet: &[u8]) -> Result<Headers, OffloadError> {
    let headers = packet::parse(packet).map_err(OffloadError::Packet)?;
    if headers.total_bytes != packet.len() {
        return Err(OffloadError::Length);
    }
    if headers.fragment {
        return Err(OffloadError::Fragment);
    }
    Ok(headers)
}

/// A packet with several segments' payload, whose type, protocol and transport header agree.
///
/// `transport_offset < header_bytes <= packet_bytes`, and `gso_bytes` is not zero.
#[derive(Clone, Copy, Debug)]
struct SuperPacket {
    headers: Headers,
    header_bytes: usize,
    packet_bytes: usize,
    gso_bytes: usize,
}

impl SuperPacket {
    /// `headers` are those of `packet`, whose length is the one that they give.
    #[inline]
    fn parse(hdr: VirtioNetHdr, packet: &[u8], headers: Headers) -> Result<Self, OffloadError> {
        let ecn = hdr.gso_type & GSO_ECN != 0;
        let (version, protocol) = match hdr.gso_type & !GSO_ECN {
            GSO_TCPV4 => (4, PROTOCOL_TCP),
            GSO_TCPV6 => (6, PROTOCOL_TCP),
            GSO_UDP_L4 if !ecn => (headers.version, PROTOCOL_UDP),
            _ => return Err(OffloadError::GsoType),
        };
        if headers.version != version || headers.protocol != protocol {
            return Err(OffloadError::Protocol);
        }
        if hdr.gso_size == 0 || hdr.gso_size == GSO_BY_FRAGS {
            return Err(OffloadError::GsoSize);
        }
        let transport = &packet[headers.transport_offset..];
        let transport_header_bytes = if protocol == PROTOCOL_TCP {
            tcp_header_bytes(transport)
        } else {
            udp_header_bytes(transport)
        };
        Ok(Self {
            headers,
            header_bytes: headers.transport_offset
                + transport_header_bytes.ok_or(OffloadError::Transport)?,
            packet_bytes: packet.len(),
            gso_bytes: usize::from(hdr.gso_size),
        })
    }

    #[inline]
    fn payload_bytes(&self) -> usize {
        self.packet_bytes - self.header_bytes
    }

    #[inline]
    fn is_accepted(&self, accepted: Offloads) -> bool {
        match (self.headers.protocol, self.headers.version) {
            (PROTOCOL_TCP, 4) => accepted.tso4,
            (PROTOCOL_TCP, _) => accepted.tso6,
            (_, 4) => accepted.uso4,
            (_, _) => accepted.uso6,
        }
    }

    /// Whether segmenting it makes no more packets, and not many more bytes, of what a peer sends
    /// than ordinary packets would have been.
    #[inline]
    fn check_amplification(&self) -> Result<(), OffloadError> {
        if self.gso_bytes < GSO_BYTES_MIN || self.payload_bytes() > self.gso_bytes * SEGMENTS_MAX {
            return Err(OffloadError::GsoSize);
        }
        if self.header_bytes > self.gso_bytes.max(REPEATED_HEADER_BYTES_MAX) {
            return Err(OffloadError::RepeatedHeaders);
        }
        Ok(())
    }
}

/// The length of a TCP header that may be repeated in front of every segment.
#[inline]
fn tcp_header_bytes(transport: &[u8]) -> Option<usize> {
    let header = transport.first_chunk::<TCP_HEADER_BYTES_MIN>()?;
    let bytes = usize::from(header[12] >> 4) * 4;
    let repeatable = header[TCP_FLAGS_OFFSET] & (TCP_FLAG_SYN | TCP_FLAG_RST) == 0;
    (bytes >= TCP_HEADER_BYTES_MIN && bytes <= transport.len() && repeatable).then_some(bytes)
}

#[inline]
fn udp_header_bytes(transport: &[u8]) -> Option<usize> {
    let header = transport.first_chunk::<UDP_HEADER_BYTES>()?;
    let udp_bytes = usize::from(u16::from_be_bytes([header[4], header[5]]));
    (udp_bytes == transport.len()).then_some(UDP_HEADER_BYTES)
}

#[cfg(test)]
mod tests;
