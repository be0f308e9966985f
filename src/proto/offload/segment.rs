//! Software segmentation and checksum completion: what the kernel or a network card would do, for a peer that has
//! neither.

use super::{
    FLAG_NEEDS_CSUM, GSO_NONE, OffloadError, Offloads, SuperPacket, TCP_CSUM_OFFSET, TCP_FLAG_CWR,
    TCP_FLAG_FIN, TCP_FLAG_PSH, TCP_FLAGS_OFFSET, UDP_CSUM_OFFSET, VirtioNetHdr, parse_whole,
};
use crate::proto::packet::{Checksum, IPV6_HEADER_BYTES, PROTOCOL_TCP, pseudo_header_sum};

/// Makes packets that a peer which takes `accepts` can take, and gives each with its header to `emit`, in order.
/// Returns how many.
///
/// A super-packet becomes its segments, a partial checksum is completed unless the peer takes partial ones. Each packet
/// is put together at the front of `scratch`, which must hold the longest: 65,535 bytes always do, and the MTU does for
/// an honest TUN.
///
/// # Errors
/// The header contradicts the packet, or `scratch` is too short; nothing has been emitted then.
pub fn segment(
    hdr: VirtioNetHdr,
    packet: &[u8],
    accepts: Offloads,
    scratch: &mut [u8],
    mut emit: impl FnMut(VirtioNetHdr, &[u8]),
) -> Result<usize, OffloadError> {
    if hdr.is_plain() {
        emit(VirtioNetHdr::PLAIN, packet);
        return Ok(1);
    }
    if hdr.gso_type == GSO_NONE {
        emit(
            VirtioNetHdr::PLAIN,
            complete_checksum(hdr, packet, scratch)?,
        );
        return Ok(1);
    }
    let super_packet = SuperPacket::parse(hdr, packet, parse_whole(packet)?)?;
    let segment_bytes_max = (super_packet.header_bytes + super_packet.gso_bytes).min(packet.len());
    let scratch = scratch
        .get_mut(..segment_bytes_max)
        .ok_or(OffloadError::Scratch)?;
    let template = Template::new(hdr, packet, &super_packet, accepts.csum);

    let (headers, payload) = packet.split_at(super_packet.header_bytes);
    let count = payload.len().div_ceil(super_packet.gso_bytes).max(1);
    for index in 0..count {
        let offset = index * super_packet.gso_bytes;
        let chunk = &payload[offset..payload.len().min(offset + super_packet.gso_bytes)];
        let segment = &mut scratch[..headers.len() + chunk.len()];
        let (segment_headers, segment_payload) = segment.split_at_mut(headers.len());
        segment_headers.copy_from_slice(headers);
        segment_payload.copy_from_slice(chunk);
        let position = Position {
            index,
            offset,
            last: index + 1 == count,
        };
        emit(template.finish(segment, position), segment);
    }
    Ok(count)
}

/// Copies the packet and computes the checksum that its header asks for, whatever the protocol.
fn complete_checksum<'a>(
    hdr: VirtioNetHdr,
    packet: &[u8],
    scratch: &'a mut [u8],
) -> Result<&'a [u8], OffloadError> {
    let start = usize::from(hdr.csum_start);
    let field = start + usize::from(hdr.csum_offset);
    if packet.len() < field + 2 {
        return Err(OffloadError::ChecksumPosition);
    }
    let copy = scratch
        .get_mut(..packet.len())
        .ok_or(OffloadError::Scratch)?;
    copy.copy_from_slice(packet);
    // The field takes part with the pseudo-header's sum that it holds.
    let checksum = Checksum::new().bytes(&copy[start..]).finish();
    put_checksum(copy, field, checksum, hdr.csum_offset == UDP_CSUM_OFFSET);
    Ok(copy)
}

fn put_checksum(packet: &mut [u8], field: usize, checksum: u16, udp: bool) {
    // Zero in UDP means that there is no checksum (RFC 768).
    let checksum = if udp && checksum == 0 {
        0xffff
    } else {
        checksum
    };
    packet[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// What the segments of a super-packet have in common.
struct Template {
    version: u8,
    tcp: bool,
    transport_offset: usize,
    csum_offset: u16,
    /// The pseudo-header's sum but for the length.
    pseudo_header: Checksum,
    partial_checksums: bool,
}

/// Which segment it is: how many are before it, and how much of the payload.
pub(super) struct Position {
    pub(super) index: usize,
    pub(super) offset: usize,
    pub(super) last: bool,
}

impl Template {
    fn new(
        hdr: VirtioNetHdr,
        packet: &[u8],
        super_packet: &SuperPacket,
        partial_checksums: bool,
    ) -> Self {
        let headers = &super_packet.headers;
        let tcp = headers.protocol == PROTOCOL_TCP;
        let csum_offset = if tcp {
            TCP_CSUM_OFFSET
        } else {
            UDP_CSUM_OFFSET
        };
        let pseudo_header = if hdr.needs_csum() {
            // The kernel's own sum, which counts the final destination if there is a routing header.
            let field = headers.transport_offset + usize::from(csum_offset);
            let transport_bytes = (packet.len() - headers.transport_offset) as u16;
            Checksum::new()
                .word(u16::from_be_bytes([packet[field], packet[field + 1]]))
                .without_word(transport_bytes)
        } else {
            pseudo_header_sum(packet, headers)
        };
        Self {
            version: headers.version,
            tcp,
            transport_offset: headers.transport_offset,
            csum_offset,
            pseudo_header,
            partial_checksums,
        }
    }

    /// Adjusts a segment that has the super-packet's headers and its own payload, and says which header goes with it.
    fn finish(&self, segment: &mut [u8], position: Position) -> VirtioNetHdr {
        if self.version == 4 {
            finish_ipv4(segment, self.transport_offset, position.index);
        } else {
            put_word(segment, 4, (segment.len() - IPV6_HEADER_BYTES) as u16);
        }
        let transport = &mut segment[self.transport_offset..];
        if self.tcp {
            finish_tcp(transport, &position);
        } else {
            put_word(transport, 4, transport.len() as u16);
        }
        self.checksum(transport)
    }

    fn checksum(&self, transport: &mut [u8]) -> VirtioNetHdr {
        let field = usize::from(self.csum_offset);
        let pseudo_header = self.pseudo_header.word(transport.len() as u16);
        if self.partial_checksums {
            put_word(transport, field, pseudo_header.folded());
            return VirtioNetHdr {
                flags: FLAG_NEEDS_CSUM,
                csum_start: self.transport_offset as u16,
                csum_offset: self.csum_offset,
                ..VirtioNetHdr::PLAIN
            };
        }
        put_word(transport, field, 0);
        let checksum = pseudo_header.bytes(transport).finish();
        put_checksum(transport, field, checksum, !self.tcp);
        VirtioNetHdr::PLAIN
    }
}

pub(super) fn finish_ipv4(segment: &mut [u8], header_bytes: usize, index: usize) {
    put_word(segment, 2, segment.len() as u16);
    let identification = u16::from_be_bytes([segment[4], segment[5]]);
    put_word(segment, 4, identification.wrapping_add(index as u16));
    put_word(segment, 10, 0);
    let checksum = Checksum::new().bytes(&segment[..header_bytes]).finish();
    put_word(segment, 10, checksum);
}

/// RFC 9293: the sequence number counts on; FIN and PSH belong to the last segment. RFC 3168 section 6.1.2: CWR to the
/// first.
pub(super) fn finish_tcp(transport: &mut [u8], position: &Position) {
    let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
    transport[4..8].copy_from_slice(&sequence.wrapping_add(position.offset as u32).to_be_bytes());
    if !position.last {
        transport[TCP_FLAGS_OFFSET] &= !(TCP_FLAG_FIN | TCP_FLAG_PSH);
    }
    if position.index > 0 {
        transport[TCP_FLAGS_OFFSET] &= !TCP_FLAG_CWR;
    }
}

pub(super) fn put_word(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}
