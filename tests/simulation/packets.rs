//! Inner packets with their `virtio_net_hdr`, as a kernel makes them, each a function of its flow and of a number.
//!
//! They are put together here, header by header, and not by what is tested: who has cut up, trimmed or marked a packet has
//! to come to the same bytes.

use ringtun::proto::offload::{
    FLAG_NEEDS_CSUM, GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VIRTIO_NET_HDR_BYTES, VirtioNetHdr,
};
use ringtun::proto::packet::{PROTOCOL_TCP, PROTOCOL_UDP};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;

/// The client's addresses.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 2);
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 0, 2);
/// A host on the internet.
const WEB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
const WEB_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x80);
const WEB_PORT: u16 = 443;
/// The client's port of flow 0.
const CLIENT_PORT_FIRST: u16 = 20_000;
/// Every payload is a piece of a pattern that repeats itself after so many bytes.
const PERIOD: usize = 65_537;
/// The number in front of the payload of a datagram.
pub const NUMBER_BYTES: usize = 4;
const ECN_MASK: u8 = 3;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// A stream: the sequence number says where a packet is in it.
    Tcp,
    /// Acknowledgements without payload: their numbers count.
    Acks,
    /// Datagrams with a number.
    Udp,
}

/// What all packets of a flow have in common.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub flow: usize,
    pub protocol: Protocol,
    pub is_v6: bool,
    /// From the client to the server.
    pub is_up: bool,
    /// Payload of a segment; 0 for acknowledgements.
    pub segment_bytes: usize,
    /// The ECN field of the IP header.
    pub ecn: u8,
    /// TCP has the timestamp option.
    pub has_option: bool,
    /// IPv4 packets must not be fragmented, and their identification means nothing.
    pub dont_fragment: bool,
    /// The kernel has left the checksum to whoever needs it.
    pub is_partial: bool,
}

/// A packet or some segments of one.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Where it is in its flow: in bytes of a stream, or in datagrams.
    pub place: u32,
    pub segments: usize,
    /// Payload of the last segment.
    pub last_bytes: usize,
    /// IPv4's.
    pub identification: u16,
    /// TCP's flag of the same name.
    pub cwr: bool,
    pub is_end: bool,
}

/// A packet that has arrived, by its headers.
#[derive(Clone, Copy, Debug)]
pub struct Label {
    pub flow: usize,
    pub is_up: bool,
    pub place: u32,
    pub payload_bytes: usize,
    pub identification: u16,
    pub ecn: u8,
}

fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        (0..2 * PERIOD)
            .map(|index| ((index % PERIOD).wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect()
    })
}

impl Shape {
    /// By how much the place of a segment differs from that of the one before.
    pub fn step(&self) -> u32 {
        match self.protocol {
            Protocol::Tcp => self.segment_bytes as u32,
            Protocol::Acks | Protocol::Udp => 1,
        }
    }

    /// Both ends, the client's first.
    fn addresses(&self) -> [IpAddr; 2] {
        if self.is_v6 {
            [CLIENT_V6.into(), WEB_V6.into()]
        } else {
            [CLIENT.into(), WEB.into()]
        }
    }

    fn ip_header_bytes(&self) -> usize {
        if self.is_v6 { 40 } else { 20 }
    }

    fn transport_header_bytes(&self) -> usize {
        match self.protocol {
            Protocol::Udp => 8,
            Protocol::Tcp | Protocol::Acks if self.has_option => 32,
            Protocol::Tcp | Protocol::Acks => 20,
        }
    }

    pub fn header_bytes(&self) -> usize {
        self.ip_header_bytes() + self.transport_header_bytes()
    }

    fn checksum_offset(&self) -> usize {
        if self.protocol == Protocol::Udp {
            6
        } else {
            16
        }
    }

    /// `virtio_net_hdr` and packet. `is_marked`: the mark of RFC 3168 is set.
    pub fn build(&self, part: &Part, is_partial: bool, is_marked: bool) -> Vec<u8> {
        let payload_bytes = (part.segments - 1) * self.segment_bytes + part.last_bytes;
        let mut framed =
            Vec::with_capacity(VIRTIO_NET_HDR_BYTES + self.header_bytes() + payload_bytes);
        framed.extend_from_slice(&self.offload(part, is_partial).to_bytes());
        self.put_ip(&mut framed, part, payload_bytes, is_marked);
        self.put_transport(&mut framed, part, payload_bytes);
        self.put_payload(&mut framed, part);
        self.put_checksum(&mut framed[VIRTIO_NET_HDR_BYTES..], is_partial);
        framed
    }

    fn offload(&self, part: &Part, is_partial: bool) -> VirtioNetHdr {
        if !is_partial {
            assert_eq!(part.segments, 1);
            return VirtioNetHdr::PLAIN;
        }
        let ordinary = VirtioNetHdr {
            flags: FLAG_NEEDS_CSUM,
            csum_start: self.ip_header_bytes() as u16,
            csum_offset: self.checksum_offset() as u16,
            ..VirtioNetHdr::PLAIN
        };
        if part.segments == 1 {
            return ordinary;
        }
        let gso_type = match (self.protocol, self.is_v6) {
            (Protocol::Udp, _) => GSO_UDP_L4,
            (_, false) => GSO_TCPV4,
            (_, true) => GSO_TCPV6,
        };
        VirtioNetHdr {
            gso_type: gso_type | if part.cwr { GSO_ECN } else { 0 },
            hdr_len: self.header_bytes() as u16,
            gso_size: self.segment_bytes as u16,
            ..ordinary
        }
    }

    fn put_ip(&self, framed: &mut Vec<u8>, part: &Part, payload_bytes: usize, is_marked: bool) {
        let transport_bytes = self.transport_header_bytes() + payload_bytes;
        let ecn = if is_marked { ECN_MASK } else { self.ecn };
        let protocol = match self.protocol {
            Protocol::Udp => PROTOCOL_UDP,
            Protocol::Tcp | Protocol::Acks => PROTOCOL_TCP,
        };
        let [mut from, mut to] = self.addresses();
        if !self.is_up {
            (from, to) = (to, from);
        }
        if self.is_v6 {
            framed.extend_from_slice(&[0x60, ecn << 4, 0, 0]);
            framed.extend_from_slice(&(transport_bytes as u16).to_be_bytes());
            framed.extend_from_slice(&[protocol, 64]);
        } else {
            framed.extend_from_slice(&[0x45, ecn]);
            framed.extend_from_slice(&(20 + transport_bytes as u16).to_be_bytes());
            framed.extend_from_slice(&part.identification.to_be_bytes());
            let flags = if self.dont_fragment { 0x40 } else { 0 };
            framed.extend_from_slice(&[flags, 0, 64, protocol, 0, 0]);
        }
        for address in [from, to] {
            match address {
                IpAddr::V4(address) => framed.extend_from_slice(&address.octets()),
                IpAddr::V6(address) => framed.extend_from_slice(&address.octets()),
            }
        }
        if !self.is_v6 {
            let header = &mut framed[VIRTIO_NET_HDR_BYTES..];
            let checksum = !fold(sum(header));
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
    }

    fn put_transport(&self, framed: &mut Vec<u8>, part: &Part, payload_bytes: usize) {
        let client_port = CLIENT_PORT_FIRST + self.flow as u16;
        let ports = if self.is_up {
            [client_port, WEB_PORT]
        } else {
            [WEB_PORT, client_port]
        };
        for port in ports {
            framed.extend_from_slice(&port.to_be_bytes());
        }
        if self.protocol == Protocol::Udp {
            framed.extend_from_slice(&(8 + payload_bytes as u16).to_be_bytes());
            framed.extend_from_slice(&[0, 0]);
            return;
        }
        let (sequence, acknowledgement) = match self.protocol {
            Protocol::Acks => (7, part.place),
            Protocol::Tcp | Protocol::Udp => (part.place, 7),
        };
        framed.extend_from_slice(&sequence.to_be_bytes());
        framed.extend_from_slice(&acknowledgement.to_be_bytes());
        let (push, cwr) = (u8::from(part.is_end) << 3, u8::from(part.cwr) << 7);
        let words = (self.transport_header_bytes() / 4) as u8;
        framed.extend_from_slice(&[words << 4, 0x10 | push | cwr, 4, 0, 0, 0, 0, 0]);
        if self.has_option {
            framed.extend_from_slice(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
    }

    fn put_payload(&self, framed: &mut Vec<u8>, part: &Part) {
        let mut piece = |place: usize, bytes: usize| {
            let start = (self.flow * 7919 + place) % PERIOD;
            framed.extend_from_slice(&pattern()[start..start + bytes]);
        };
        match self.protocol {
            Protocol::Acks => {}
            Protocol::Tcp => {
                let bytes = (part.segments - 1) * self.segment_bytes + part.last_bytes;
                piece(part.place as usize, bytes);
            }
            Protocol::Udp => {
                for index in 0..part.segments {
                    let bytes = if index + 1 == part.segments {
                        part.last_bytes
                    } else {
                        self.segment_bytes
                    };
                    let number = part.place + index as u32;
                    let start = (self.flow * 7919 + number as usize * 31) % PERIOD;
                    framed.extend_from_slice(&number.to_be_bytes());
                    framed.extend_from_slice(&pattern()[start..start + bytes - NUMBER_BYTES]);
                }
            }
        }
    }

    fn put_checksum(&self, packet: &mut [u8], is_partial: bool) {
        let (addresses, start) = if self.is_v6 {
            (&packet[8..40], 40)
        } else {
            (&packet[12..20], 20)
        };
        let protocol = match self.protocol {
            Protocol::Udp => PROTOCOL_UDP,
            Protocol::Tcp | Protocol::Acks => PROTOCOL_TCP,
        };
        let transport_bytes = (packet.len() - start) as u64;
        let pseudo_header = sum(addresses) + u64::from(protocol) + transport_bytes;
        let checksum = if is_partial {
            fold(pseudo_header)
        } else {
            match !fold(pseudo_header + sum(&packet[start..])) {
                0 if self.protocol == Protocol::Udp => 0xffff,
                checksum => checksum,
            }
        };
        let field = start + self.checksum_offset();
        packet[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The sum of 16-bit words; two at a time are as good.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut sum = 0;
    for word in words {
        sum += u64::from(u32::from_be_bytes(*word));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_be_bytes(last))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// What the other side answers: addresses and ports have changed places.
pub fn turned_round(packet: &[u8]) -> Vec<u8> {
    let mut reply = packet.to_vec();
    let (from, to, ports) = match packet[0] >> 4 {
        6 => (8..24, 24..40, 40),
        _ => (12..16, 16..20, 20),
    };
    reply[from.clone()].copy_from_slice(&packet[to.clone()]);
    reply[to].copy_from_slice(&packet[from]);
    reply[ports..ports + 4].rotate_left(2);
    reply
}

impl Label {
    /// Reads the headers of a packet of one of our flows.
    pub fn read(packet: &[u8], shapes: &[Shape]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u32::from_be_bytes(*packet.get(at..)?.first_chunk()?));
        let is_v6 = packet.first()? >> 4 == 6;
        let (start, ecn) = if is_v6 {
            (40, packet.get(1)? >> 4 & ECN_MASK)
        } else {
            (20, packet.get(1)? & ECN_MASK)
        };
        let ports = [word(start)?, word(start + 2)?];
        let is_up = ports[1] == WEB_PORT;
        let client_port = ports[usize::from(!is_up)];
        let flow = usize::from(client_port.checked_sub(CLIENT_PORT_FIRST)?);
        let shape = shapes.get(flow)?;
        let place = match shape.protocol {
            Protocol::Udp => long(start + 8)?,
            Protocol::Tcp => long(start + 4)?,
            Protocol::Acks => long(start + 8)?,
        };
        Some(Self {
            flow,
            is_up,
            place,
            payload_bytes: packet.len().checked_sub(shape.header_bytes())?,
            identification: if is_v6 { 0 } else { word(4)? },
            ecn,
        })
    }
}
