//! How a sender is told of congestion by way of his own packet: by a mark, by the loss of one segment, or not at all.

use super::segment::{Position, finish_ipv4, finish_tcp, put_word};
use super::{
    FLAG_NEEDS_CSUM, GSO_ECN, GSO_NONE, SuperPacket, TCP_CSUM_OFFSET, TCP_FLAG_RST, TCP_FLAG_SYN,
    TCP_FLAGS_OFFSET, TCP_HEADER_BYTES_MIN, UDP_CSUM_OFFSET, VIRTIO_NET_HDR_BYTES, VirtioNetHdr,
    parse_whole,
};
use crate::proto::ecn;
use crate::proto::packet::{self, Checksum, IPV6_HEADER_BYTES, PROTOCOL_TCP};

/// What a packet can say of congestion, and in the first two cases says now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Signal {
    /// It carries the mark of RFC 3168.
    Marked,
    /// Its first segment is gone: `virtio_net_hdr` and packet begin this many bytes later.
    Trimmed {
        /// How much later.
        bytes: usize,
    },
    /// It says so only by being dropped. It is unchanged.
    Drop,
    /// Its loss would cost a handshake or say nothing (SYN, RST, and TCP without payload): it goes on, unchanged.
    Spare,
}

/// Has a packet tell its receiver, and so its sender, of congestion. `framed` is `virtio_net_hdr` and packet.
///
/// Marks are for whoever asks for them (RFC 3168); of all others one segment is lost, as on any link, and not the 45 that
/// a super-packet may hold.
pub fn signal(framed: &mut [u8]) -> Signal {
    let Some((header, packet)) = framed.split_first_chunk_mut::<VIRTIO_NET_HDR_BYTES>() else {
        return Signal::Drop;
    };
    if ecn::mark_congestion(packet) {
        return Signal::Marked;
    }
    if is_spared(packet) {
        return Signal::Spare;
    }
    let Some((header, bytes)) = trim_first(VirtioNetHdr::read(header), packet) else {
        return Signal::Drop;
    };
    framed[bytes..bytes + VIRTIO_NET_HDR_BYTES].copy_from_slice(&header.to_bytes());
    Signal::Trimmed { bytes }
}

fn is_spared(packet: &[u8]) -> bool {
    let Ok(headers) = packet::parse(packet) else {
        return false;
    };
    if headers.protocol != PROTOCOL_TCP || headers.fragment {
        return false;
    }
    let transport = packet
        .get(headers.transport_offset..headers.total_bytes)
        .unwrap_or_default();
    let Some(header) = transport.first_chunk::<TCP_HEADER_BYTES_MIN>() else {
        return false;
    };
    let header_bytes = usize::from(header[12] >> 4) * 4;
    header[TCP_FLAGS_OFFSET] & (TCP_FLAG_SYN | TCP_FLAG_RST) != 0 || transport.len() <= header_bytes
}

/// Takes the first segment out of a super-packet, in place: the headers move forward by its payload and say what
/// they would have said had the sender begun with the second segment. Gives the header for what is left, and where
/// that begins.
///
/// TCP: the sequence number advances, FIN and PSH stay, for they are the last segment's; CWR was the first one's and goes with
/// it. IPv4's identification advances. What is left is one segment at least; one alone is an ordinary packet with a
/// partial checksum.
///
/// `None`, and nothing has changed: not a super-packet of two segments or more with a partial checksum.
pub fn trim_first(hdr: VirtioNetHdr, packet: &mut [u8]) -> Option<(VirtioNetHdr, usize)> {
    if hdr.gso_type == GSO_NONE || !hdr.needs_csum() {
        return None;
    }
    let super_packet = SuperPacket::parse(hdr, packet, parse_whole(packet).ok()?).ok()?;
    let SuperPacket {
        headers,
        header_bytes,
        gso_bytes,
        ..
    } = super_packet;
    let (tcp, transport_offset) = (headers.protocol == PROTOCOL_TCP, headers.transport_offset);
    let csum_offset = if tcp {
        TCP_CSUM_OFFSET
    } else {
        UDP_CSUM_OFFSET
    };
    if usize::from(hdr.csum_start) != transport_offset
        || hdr.csum_offset != csum_offset
        || super_packet.payload_bytes() <= gso_bytes
    {
        return None;
    }
    let transport_bytes = (packet.len() - transport_offset) as u16;
    packet.copy_within(..header_bytes, gso_bytes);
    let rest = &mut packet[gso_bytes..];
    if headers.version == 4 {
        finish_ipv4(rest, transport_offset, 1);
    } else {
        put_word(rest, 4, (rest.len() - IPV6_HEADER_BYTES) as u16);
    }
    let one_left = rest.len() - header_bytes <= gso_bytes;
    let rest = &mut rest[transport_offset..];
    if tcp {
        let second = Position {
            index: 1,
            offset: gso_bytes,
            last: true,
        };
        finish_tcp(rest, &second);
    } else {
        put_word(rest, 4, rest.len() as u16);
    }
    let field = usize::from(csum_offset);
    // The kernel's own sum, which counts the final destination if there is a routing header.
    let pseudo_header = Checksum::new()
        .word(u16::from_be_bytes([rest[field], rest[field + 1]]))
        .without_word(transport_bytes)
        .word(rest.len() as u16);
    put_word(rest, field, pseudo_header.folded());

    let ordinary = VirtioNetHdr {
        flags: FLAG_NEEDS_CSUM,
        csum_start: hdr.csum_start,
        csum_offset,
        ..VirtioNetHdr::PLAIN
    };
    let left = if one_left {
        ordinary
    } else {
        VirtioNetHdr {
            gso_type: hdr.gso_type & !GSO_ECN,
            gso_size: hdr.gso_size,
            hdr_len: header_bytes as u16,
            ..ordinary
        }
    };
    Some((left, gso_bytes))
}
