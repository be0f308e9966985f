//! Gathers packets of UDP that follow one another into one super-packet, as a kernel does that receives them
//! (`udp_gro_receive` in Linux's `net/ipv4/udp_offload.c`).
//!
//! Whoever segments it, the receiving kernel (`__udp_gso_segment`) or [`segment()`](super::segment()), gets the packets
//! that went in: same headers, same payload, same checksums, same order. Only the identification of IPv4 packets that
//! must not be fragmented may come out as another one, for nobody may look at it (RFC 6864 section 4.1).

use super::segment::{finish_ipv4, put_word};
use super::{
    FLAG_DATA_VALID, FLAG_NEEDS_CSUM, GSO_BYTES_MIN, GSO_NONE, GSO_UDP_L4, Offloads,
    REPEATED_HEADER_BYTES_MAX, SEGMENTS_MAX, UDP_CSUM_OFFSET, UDP_HEADER_BYTES, VirtioNetHdr,
    parse_whole, udp_header_bytes,
};
use crate::proto::packet::{
    Checksum, IPV4_HEADER_BYTES_MIN, IPV6_HEADER_BYTES, PACKET_BYTES_MAX, PROTOCOL_UDP,
    pseudo_header_sum,
};

/// How many packets are gathered into one at most.
///
/// All kernels take as many, and a socket with the default buffer has room for so many small ones at once.
pub const GATHERED_SEGMENTS_MAX: usize = 64;

/// IP and UDP headers without options.
const HEADERS_BYTES_MAX: usize = IPV6_HEADER_BYTES + UDP_HEADER_BYTES;
const IPV4_PROTOCOL_OFFSET: usize = 9;
const IPV6_NEXT_HEADER_OFFSET: usize = 6;
const IPV4_FLAGS_OFFSET: usize = 6;
const IPV4_DONT_FRAGMENT: u8 = 0x40;

// What is gathered is what the receiver takes.
const _: () = assert!(GATHERED_SEGMENTS_MAX <= SEGMENTS_MAX);
const _: () = assert!(HEADERS_BYTES_MAX <= REPEATED_HEADER_BYTES_MAX);

/// A packet that may be a segment of a super-packet: UDP with a payload and with a checksum that is known to be right,
/// no fragment, no IPv4 options or IPv6 extension headers.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'p> {
    /// The headers, but for what differs between segments, which is zero here.
    common: [u8; HEADERS_BYTES_MAX],
    /// Of IPv4; 0 in IPv6.
    identification: u16,
    transport_offset: usize,
    /// The pseudo-header's sum but for the length.
    pseudo_header: Checksum,
    payload: &'p [u8],
}

impl<'p> Datagram<'p> {
    /// The packet as a segment for a peer that takes `accepts`; `None` if it cannot be one.
    ///
    /// A checksum counts as right if the kernel has yet to complete it, or has checked it, or if it is. One that is wrong,
    /// or missing (RFC 768), must stay so, and segmenting would put a right one in its place.
    #[inline]
    pub fn read(hdr: VirtioNetHdr, packet: &'p [u8], accepts: Offloads) -> Option<Self> {
        let (accepted, protocol_offset, transport_offset) = match packet.first()? >> 4 {
            4 => (accepts.uso4, IPV4_PROTOCOL_OFFSET, IPV4_HEADER_BYTES_MIN),
            6 => (accepts.uso6, IPV6_NEXT_HEADER_OFFSET, IPV6_HEADER_BYTES),
            _ => return None,
        };
        if !accepted
            || !accepts.csum
            || hdr.gso_type != GSO_NONE
            || packet.get(protocol_offset) != Some(&PROTOCOL_UDP)
        {
            return None;
        }
        let headers = parse_whole(packet).ok()?;
        let transport = &packet[headers.transport_offset..];
        udp_header_bytes(transport)?;
        let payload = &transport[UDP_HEADER_BYTES..];
        if headers.transport_offset != transport_offset || payload.is_empty() {
            return None;
        }
        let pseudo_header = pseudo_header_sum(packet, &headers);
        if !is_right(hdr, transport, transport_offset, pseudo_header) {
            return None;
        }
        let mut common = [0; HEADERS_BYTES_MAX];
        let header_bytes = transport_offset + UDP_HEADER_BYTES;
        common[..header_bytes].copy_from_slice(&packet[..header_bytes]);
        common[transport_offset + 4..header_bytes].fill(0);
        let mut identification = 0;
        if headers.version == 4 {
            let ip_header = &packet[..IPV4_HEADER_BYTES_MIN];
            if Checksum::new().bytes(ip_header).finish() != 0 {
                return None;
            }
            identification = u16::from_be_bytes([packet[4], packet[5]]);
            common[2..6].fill(0);
            common[10..12].fill(0);
        } else {
            common[4..6].fill(0);
        }
        Some(Self {
            common,
            identification,
            transport_offset,
            pseudo_header,
            payload,
        })
    }

    /// What a further segment adds to a super-packet.
    #[inline]
    pub fn payload(&self) -> &'p [u8] {
        self.payload
    }
}

/// Whether the UDP checksum is, or will be, that of the packet.
#[inline]
fn is_right(
    hdr: VirtioNetHdr,
    transport: &[u8],
    transport_offset: usize,
    pseudo_header: Checksum,
) -> bool {
    let field = usize::from(UDP_CSUM_OFFSET);
    let checksum = u16::from_be_bytes([transport[field], transport[field + 1]]);
    let pseudo_header = pseudo_header.word(transport.len() as u16);
    if hdr.needs_csum() {
        return usize::from(hdr.csum_start) == transport_offset
            && hdr.csum_offset == UDP_CSUM_OFFSET
            && checksum == pseudo_header.folded();
    }
    checksum != 0
        && (hdr.flags & FLAG_DATA_VALID != 0 || pseudo_header.bytes(transport).finish() == 0)
}

/// A super-packet in the making, without its bytes, which lie where the caller wants them.
///
/// `segments` is at least 1; all of them but the last have `gso_bytes` of payload, the last one may have fewer.
#[derive(Clone, Debug)]
pub struct Run {
    /// See [`Datagram`].
    common: [u8; HEADERS_BYTES_MAX],
    /// The first segment's.
    identification: u16,
    transport_offset: usize,
    pseudo_header: Checksum,
    gso_bytes: usize,
    segments: usize,
    packet_bytes: usize,
}

impl Run {
    /// A run that has one packet so far.
    #[inline]
    pub fn begin(first: &Datagram) -> Self {
        let gso_bytes = first.payload.len();
        Self {
            common: first.common,
            identification: first.identification,
            transport_offset: first.transport_offset,
            pseudo_header: first.pseudo_header,
            gso_bytes,
            segments: 1,
            packet_bytes: first.transport_offset + UDP_HEADER_BYTES + gso_bytes,
        }
    }

    /// Takes a packet as the next segment, if it can be that one; its payload is to follow the
    /// others' then. Packets with less payload than [`GSO_BYTES_MIN`] stay alone: the peer refuses
    /// super-packets of such segments.
    #[inline]
    pub fn take(&mut self, next: &Datagram) -> bool {
        let header_bytes = self.transport_offset + UDP_HEADER_BYTES;
        let is_full = self.packet_bytes == header_bytes + self.segments * self.gso_bytes;
        let packet_bytes = self.packet_bytes + next.payload.len();
        let continues = is_full
            && self.segments < GATHERED_SEGMENTS_MAX
            && self.gso_bytes >= GSO_BYTES_MIN
            && next.payload.len() <= self.gso_bytes
            && packet_bytes <= PACKET_BYTES_MAX
            && self.common == next.common
            && self.counts_on_to(next.identification);
        if continues {
            self.segments += 1;
            self.packet_bytes = packet_bytes;
        }
        continues
    }

    /// Segmentation gives each IPv4 segment the identification after the one before.
    fn counts_on_to(&self, identification: u16) -> bool {
        self.common[0] >> 4 == 6
            || self.common[IPV4_FLAGS_OFFSET] & IPV4_DONT_FRAGMENT != 0
            || identification == self.identification.wrapping_add(self.segments as u16)
    }

    /// Bytes of the super-packet: headers and all payload.
    #[inline]
    pub fn packet_bytes(&self) -> usize {
        self.packet_bytes
    }

    /// Has the headers of a run of two or more say what it holds. `packet` is the first packet and behind it the payload of
    /// all others; what is returned is to go in front of it.
    ///
    /// # Panics
    /// When `packet` is not [`Run::packet_bytes`] long.
    #[inline]
    pub fn describe(&self, packet: &mut [u8]) -> VirtioNetHdr {
        assert_eq!(packet.len(), self.packet_bytes, "all payload is there");
        if self.common[0] >> 4 == 4 {
            finish_ipv4(packet, self.transport_offset, 0);
        } else {
            put_word(packet, 4, (packet.len() - IPV6_HEADER_BYTES) as u16);
        }
        let transport = &mut packet[self.transport_offset..];
        let transport_bytes = transport.len() as u16;
        put_word(transport, 4, transport_bytes);
        let partial = self.pseudo_header.word(transport_bytes).folded();
        put_word(transport, usize::from(UDP_CSUM_OFFSET), partial);
        VirtioNetHdr {
            flags: FLAG_NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            hdr_len: (self.transport_offset + UDP_HEADER_BYTES) as u16,
            gso_size: self.gso_bytes as u16,
            csum_start: self.transport_offset as u16,
            csum_offset: UDP_CSUM_OFFSET,
        }
    }
}
