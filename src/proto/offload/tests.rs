//! Honest packets are built with etherparse, which also has the last word on what segments look like.

mod gather;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    IpHeaders, IpNumber, IpSlice, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6Header,
    Ipv6RawExtHeader, PacketBuilder, TcpHeader, TcpSlice, UdpSlice,
};
use proptest::prelude::*;

use super::*;
use crate::proto::packet::{Checksum, PACKET_BYTES_MAX};

const TCP_FLAG_ACK: u8 = 0x10;
const TCP_FLAG_ECE: u8 = 0x40;

/// Linux's, since 6.9.
const UDP_MAX_SEGMENTS: usize = 128;

const CSUM_ONLY: Offloads = Offloads {
    csum: true,
    ..Offloads::NONE
};

/// One flow's next bytes, as a local kernel hands them to TUN.
#[derive(Clone, Debug)]
struct Honest {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    /// IPv4 options, or the bytes of an IPv6 destination options header.
    ip_options: bool,
    tcp_options: bool,
    tcp_flags: u8,
    sequence: u32,
    identification: u16,
    gso_bytes: usize,
    payload: Vec<u8>,
}

impl Default for Honest {
    fn default() -> Self {
        Self {
            src: Ipv4Addr::new(10, 87, 0, 2).into(),
            dst: Ipv4Addr::new(203, 0, 113, 80).into(),
            protocol: PROTOCOL_TCP,
            ip_options: false,
            tcp_options: true,
            tcp_flags: TCP_FLAG_ACK,
            sequence: 0xffff_ff00,
            identification: 0xfffe,
            gso_bytes: 1448,
            payload: payload(5000, 1),
        }
    }
}

fn payload(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes)
        .map(|index| (index as u32).wrapping_mul(0x9e37_79b9).to_be_bytes()[0] ^ seed)
        .collect()
}

impl Honest {
    fn v6() -> Self {
        Self {
            src: Ipv6Addr::new(0xfd00, 1, 2, 3, 0, 0, 0, 2).into(),
            dst: Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x80).into(),
            gso_bytes: 1428,
            ..Self::default()
        }
    }

    fn udp() -> Self {
        Self {
            protocol: PROTOCOL_UDP,
            gso_bytes: 1200,
            ..Self::default()
        }
    }

    fn transport_offset(&self) -> usize {
        match (self.src.is_ipv4(), self.ip_options) {
            (true, false) => 20,
            (true, true) => 28,
            (false, false) => 40,
            (false, true) => 56,
        }
    }

    fn header_bytes(&self) -> usize {
        let transport = match (self.protocol, self.tcp_options) {
            (PROTOCOL_UDP, _) => 8,
            (_, false) => 20,
            (_, true) => 32,
        };
        self.transport_offset() + transport
    }

    fn is_super_packet(&self) -> bool {
        self.payload.len() > self.gso_bytes
    }

    /// The packet with its checksum complete.
    fn complete(&self) -> Vec<u8> {
        let protocol = IpNumber(self.protocol);
        let ip = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header =
                    Ipv4Header::new(0, 64, protocol, src.octets(), dst.octets()).expect("short");
                header.identification = self.identification;
                if self.ip_options {
                    header.options = Ipv4Options::from([1, 1, 1, 1, 1, 1, 1, 0]);
                }
                IpHeaders::Ipv4(header, Default::default())
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = Ipv6Header {
                    hop_limit: 64,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Default::default()
                };
                // Two options headers: hop-by-hop and destination, each of PadN.
                let raw =
                    |next| Ipv6RawExtHeader::new_raw(next, &[1, 4, 0, 0, 0, 0]).expect("short");
                let extensions = if self.ip_options {
                    Ipv6Extensions {
                        hop_by_hop_options: Some(raw(protocol)),
                        destination_options: Some(raw(protocol)),
                        ..Default::default()
                    }
                } else {
                    Default::default()
                };
                IpHeaders::Ipv6(header, extensions)
            }
            _ => unreachable!("both addresses are of one family"),
        };
        let mut packet = Vec::new();
        let builder = PacketBuilder::ip(ip);
        if self.protocol == PROTOCOL_UDP {
            builder
                .udp(4433, 53)
                .write(&mut packet, &self.payload)
                .expect("fits");
        } else {
            let mut header = TcpHeader::new(43210, 443, self.sequence, 501);
            header.acknowledgment_number = 77;
            let on = |flag: u8| self.tcp_flags & flag != 0;
            (header.fin, header.syn, header.rst, header.psh) = (
                on(TCP_FLAG_FIN),
                on(TCP_FLAG_SYN),
                on(TCP_FLAG_RST),
                on(TCP_FLAG_PSH),
            );
            (header.ack, header.ece, header.cwr) =
                (on(TCP_FLAG_ACK), on(TCP_FLAG_ECE), on(TCP_FLAG_CWR));
            if self.tcp_options {
                header
                    .set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2])
                    .expect("12 bytes");
            }
            builder
                .tcp_header(header)
                .write(&mut packet, &self.payload)
                .expect("fits");
        }
        assert_eq!(packet.len(), self.header_bytes() + self.payload.len());
        packet
    }

    /// The packet with the pseudo-header's sum as checksum, and the header that TUN gives with it. `hdr_len` is what a
    /// forwarding kernel may say.
    fn partial(&self) -> (VirtioNetHdr, Vec<u8>) {
        let mut packet = self.complete();
        let (addresses, csum_offset) = match self.protocol {
            PROTOCOL_UDP => (self.pseudo_header_addresses(), UDP_CSUM_OFFSET),
            _ => (self.pseudo_header_addresses(), TCP_CSUM_OFFSET),
        };
        let transport_bytes = (packet.len() - self.transport_offset()) as u32;
        let pseudo_header = addresses
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .chain([u32::from(self.protocol), transport_bytes])
            .sum::<u32>();
        let folded = (pseudo_header >> 16) + (pseudo_header & 0xffff);
        let folded = (folded >> 16) + (folded & 0xffff);
        let field = self.transport_offset() + usize::from(csum_offset);
        packet[field..field + 2].copy_from_slice(&(folded as u16).to_be_bytes());
        let gso_type = match (self.protocol, self.src) {
            _ if !self.is_super_packet() => GSO_NONE,
            (PROTOCOL_UDP, _) => GSO_UDP_L4,
            (_, IpAddr::V4(_)) => GSO_TCPV4,
            (_, IpAddr::V6(_)) => GSO_TCPV6,
        };
        let ecn = if gso_type != GSO_NONE
            && self.protocol == PROTOCOL_TCP
            && self.tcp_flags & TCP_FLAG_CWR != 0
        {
            GSO_ECN
        } else {
            0
        };
        let hdr = VirtioNetHdr {
            flags: FLAG_NEEDS_CSUM,
            gso_type: gso_type | ecn,
            hdr_len: if gso_type == GSO_NONE {
                0
            } else {
                packet.len() as u16
            },
            gso_size: if gso_type == GSO_NONE {
                0
            } else {
                self.gso_bytes as u16
            },
            csum_start: self.transport_offset() as u16,
            csum_offset,
        };
        (hdr, packet)
    }

    fn pseudo_header_addresses(&self) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
            (IpAddr::V6(src), IpAddr::V6(dst)) => [src.octets(), dst.octets()].concat(),
            _ => unreachable!("both addresses are of one family"),
        }
    }
}

fn extreme_word() -> impl Strategy<Value = u16> {
    let edges = [
        0, 1, 7, 19, 20, 39, 40, 47, 48, 49, 127, 128, 129, 500, 0x7fff, 0xfffe, 0xffff,
    ];
    prop_oneof![prop::sample::select(edges.to_vec()), any::<u16>()]
}

prop_compose! {
    fn honest()(
        v6: bool,
        udp: bool,
        ip_options: bool,
        tcp_options: bool,
        tcp_flags in prop::sample::subsequence(vec![TCP_FLAG_FIN, TCP_FLAG_PSH, TCP_FLAG_ECE, TCP_FLAG_CWR], 0..=4),
        sequence: u32,
        identification: u16,
        gso_bytes in prop_oneof![3 => 500_usize..1460, 1 => 48_usize..9000],
        segments in 0.0..50.0_f64,
        seed: u8,
    ) -> Honest {
        let basis = if v6 { Honest::v6() } else { Honest::default() };
        let mut honest = Honest {
            protocol: if udp { PROTOCOL_UDP } else { PROTOCOL_TCP },
            ip_options,
            tcp_options,
            tcp_flags: tcp_flags.into_iter().fold(TCP_FLAG_ACK, |flags, flag| flags | flag),
            sequence,
            identification,
            gso_bytes,
            ..basis
        };
        let bytes = (gso_bytes as f64 * segments) as usize;
        honest.payload = payload(bytes.min(65_535 - honest.header_bytes()), seed);
        honest
    }
}

/// What `tun_get_user` and `virtio_net_hdr_to_skb` of the strictest kernel ask for, written down independently.
fn kernel_takes(hdr: VirtioNetHdr, packet: &[u8]) -> bool {
    let needs_csum = hdr.flags & FLAG_NEEDS_CSUM != 0;
    let csum_end = usize::from(hdr.csum_start) + usize::from(hdr.csum_offset) + 2;
    let transport_bytes = match hdr.gso_type & !GSO_ECN {
        GSO_NONE => 0,
        GSO_TCPV4 | GSO_TCPV6 => 20,
        GSO_UDP_L4 => 8,
        _ => return false,
    };
    let headers_bytes = usize::from(hdr.csum_start) + transport_bytes;
    let csum_ok = !needs_csum
        || (csum_end <= packet.len() && headers_bytes <= packet.len() && hdr.csum_start >= 20);
    let payload_bytes = packet.len().saturating_sub(headers_bytes);
    let gso_ok = match hdr.gso_type {
        GSO_NONE => true,
        GSO_UDP_L4 => {
            needs_csum
                && hdr.csum_offset == 6
                && payload_bytes <= usize::from(hdr.gso_size) * UDP_MAX_SEGMENTS
        }
        _ => needs_csum && hdr.csum_offset == 16,
    };
    let gso_size_ok = hdr.gso_type == GSO_NONE || (hdr.gso_size != 0 && hdr.gso_size != 0xffff);
    usize::from(hdr.hdr_len) <= packet.len() && csum_ok && gso_ok && gso_size_ok
}

fn segments(hdr: VirtioNetHdr, packet: &[u8], accepts: Offloads) -> Vec<(VirtioNetHdr, Vec<u8>)> {
    let mut scratch = vec![0xa5; PACKET_BYTES_MAX];
    let mut emitted = Vec::new();
    let count = segment(hdr, packet, accepts, &mut scratch, |hdr, packet| {
        emitted.push((hdr, packet.to_vec()))
    })
    .expect("an honest packet");
    assert_eq!(count, emitted.len());
    emitted
}

/// Checks every length and checksum of a packet with etherparse; returns the transport header and the payload.
fn verify(packet: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let ip = IpSlice::from_slice(packet).expect("a packet");
    if let IpSlice::Ipv4(v4) = &ip {
        assert_eq!(
            v4.header().header_checksum(),
            v4.header().to_header().calc_header_checksum()
        );
    }
    let transport = ip.payload().payload;
    match ip.payload_ip_number() {
        IpNumber::TCP => {
            let tcp = TcpSlice::from_slice(transport).expect("a TCP segment");
            let computed = match &ip {
                IpSlice::Ipv4(v4) => {
                    tcp.calc_checksum_ipv4(v4.header().source(), v4.header().destination())
                }
                IpSlice::Ipv6(v6) => {
                    tcp.calc_checksum_ipv6(v6.header().source(), v6.header().destination())
                }
            };
            assert_eq!(tcp.checksum(), computed.expect("not too long"));
            (tcp.header_slice().to_vec(), tcp.payload().to_vec())
        }
        IpNumber::UDP => {
            let udp = UdpSlice::from_slice(transport).expect("a datagram");
            assert_eq!(usize::from(udp.length()), transport.len());
            let (header, payload) = (udp.to_header(), udp.payload());
            let computed = match &ip {
                IpSlice::Ipv4(v4) => header.calc_checksum_ipv4_raw(
                    v4.header().source(),
                    v4.header().destination(),
                    payload,
                ),
                IpSlice::Ipv6(v6) => header.calc_checksum_ipv6_raw(
                    v6.header().source(),
                    v6.header().destination(),
                    payload,
                ),
            };
            assert_eq!(udp.checksum(), computed.expect("not too long"));
            (udp.header_slice().to_vec(), payload.to_vec())
        }
        other => panic!("neither TCP nor UDP: {other:?}"),
    }
}

proptest! {
    #[test]
    fn what_an_honest_kernel_produces_is_accepted(honest in honest(), hdr_len: u16, data_valid: bool) {
        let (hdr, packet) = honest.partial();
        let flags = hdr.flags | if data_valid { FLAG_DATA_VALID } else { 0 };
        let sent = VirtioNetHdr { hdr_len, flags, ..hdr };
        let hdr_len = if honest.is_super_packet() { honest.header_bytes() as u16 } else { 0 };
        let normal = VirtioNetHdr { hdr_len, ..hdr };
        prop_assert_eq!(validate(sent, &packet, Offloads::ALL), Ok(normal));
        prop_assert_eq!(validate(normal, &packet, Offloads::ALL), Ok(normal));
        prop_assert!(kernel_takes(normal, &packet));
        prop_assert_eq!(fit(sent, &packet, Offloads::ALL), Fit::AsIs);
    }

    #[test]
    fn ordinary_packets_are_judged_as_in_context_0(
        honest in honest(),
        changes in prop::collection::vec((0..80_usize, any::<u8>()), 0..3),
        cut in prop::option::of(0..120_usize),
    ) {
        let mut packet = honest.complete();
        for (at, byte) in changes {
            if let Some(changed) = packet.get_mut(at) {
                *changed = byte;
            }
        }
        packet.truncate(cut.unwrap_or(packet.len()));
        prop_assert_eq!(
            validate(VirtioNetHdr::PLAIN, &packet, Offloads::ALL).map(|_| ()),
            packet::parse(&packet).map(|_| ()).map_err(OffloadError::Packet)
        );
    }

    #[test]
    fn headers_at_their_limits_are_judged_without_panic(
        honest in honest(),
        options in prop::option::of((1..9_usize, prop_oneof![Just(8_usize), Just(16), Just(2048)])),
        gso in (prop::sample::select(vec![GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN, 0xff]), any::<bool>()),
        gso_size in extreme_word(),
        csum_start in prop::option::weighted(0.1, extreme_word()),
        csum_offset in prop::option::weighted(0.1, extreme_word()),
        flags in prop::sample::select(vec![0, FLAG_NEEDS_CSUM, FLAG_NEEDS_CSUM, FLAG_NEEDS_CSUM, 0xff]),
        cut in prop::option::weighted(0.2, 0..120_usize),
    ) {
        let (hdr, mut packet) = honest.partial();
        let mut csum_start = csum_start.unwrap_or(hdr.csum_start);
        if let (Some((count, bytes)), true, false) = (options, honest.src.is_ipv6(), honest.ip_options) {
            let mut chain = Vec::new();
            for _ in 0..count {
                chain.extend([60, (bytes / 8 - 1) as u8]);
                chain.resize(chain.len() + bytes - 2, 0);
            }
            chain[(count - 1) * bytes] = honest.protocol;
            packet[6] = 60;
            packet.truncate(PACKET_BYTES_MAX - chain.len());
            packet.splice(40..40, chain.iter().copied());
            let payload_bytes = (packet.len() - 40) as u16;
            packet[4..6].copy_from_slice(&payload_bytes.to_be_bytes());
            csum_start = csum_start.wrapping_add(chain.len() as u16);
        }
        let (gso_type, keep_type) = gso;
        let hdr = VirtioNetHdr {
            flags,
            gso_type: if keep_type { hdr.gso_type } else { gso_type },
            hdr_len: 0xffff,
            gso_size: if keep_type && gso_size % 3 == 0 { hdr.gso_size } else { gso_size },
            csum_start,
            csum_offset: csum_offset.unwrap_or(hdr.csum_offset),
        };
        packet.truncate(cut.unwrap_or(packet.len()));
        judge(hdr, &packet)?;
        let framed = [&hdr.to_bytes(), &packet[..]].concat();
        signalled(&framed)?;
        let _ = Datagram::read(hdr, &packet, Offloads::ALL);
    }

    #[test]
    fn any_bytes_are_judged_without_panic(hdr: [u8; 10], packet in prop::collection::vec(any::<u8>(), 0..200)) {
        judge(VirtioNetHdr::read(&hdr), &packet)?;
    }

    #[test]
    fn a_distorted_honest_packet_is_judged_without_panic(
        honest in honest(),
        hdr_changes in prop::collection::vec((0..10_usize, any::<u8>()), 0..3),
        packet_changes in prop::collection::vec((0..80_usize, any::<u8>()), 0..3),
        cut in prop::option::weighted(0.2, 0..120_usize),
    ) {
        let (hdr, mut packet) = honest.partial();
        let mut hdr = hdr.to_bytes();
        for (at, byte) in hdr_changes {
            hdr[at] = byte;
        }
        for (at, byte) in packet_changes {
            if let Some(changed) = packet.get_mut(at) {
                *changed = byte;
            }
        }
        packet.truncate(cut.unwrap_or(packet.len()));
        judge(VirtioNetHdr::read(&hdr), &packet)?;
    }

    #[test]
    fn segments_are_the_super_packet_cut_up(honest in honest()) {
        let (hdr, packet) = honest.partial();
        let emitted = segments(hdr, &packet, Offloads::NONE);
        prop_assert_eq!(emitted.len(), honest.payload.len().div_ceil(honest.gso_bytes).max(1));
        let mut reassembled = Vec::new();
        for (index, (hdr, segment)) in emitted.iter().enumerate() {
            prop_assert_eq!(*hdr, VirtioNetHdr::PLAIN);
            let (transport, payload) = verify(segment);
            let last = index + 1 == emitted.len();
            let full = payload.len() == honest.gso_bytes;
            prop_assert!(full || last && payload.len() < honest.gso_bytes);
            verify_headers(&honest, &packet, segment, index, last);
            if honest.protocol == PROTOCOL_TCP {
                verify_tcp(&honest, &transport, index, last);
            }
            reassembled.extend_from_slice(&payload);
        }
        prop_assert_eq!(&reassembled, &honest.payload);
    }

    #[test]
    fn without_a_partial_checksum_the_segments_are_the_same(honest in honest()) {
        let (hdr, packet) = honest.partial();
        prop_assume!(honest.is_super_packet());
        let unhelpful = VirtioNetHdr { flags: 0, csum_start: 0, csum_offset: 0, ..hdr };
        prop_assert_eq!(validate(unhelpful, &packet, Offloads::ALL), Err(OffloadError::ChecksumMissing));
        prop_assert_eq!(fit(unhelpful, &packet, Offloads::ALL), Fit::NeedsSegmenting);
        prop_assert_eq!(
            segments(unhelpful, &packet, Offloads::NONE),
            segments(hdr, &packet, Offloads::NONE)
        );
    }

    #[test]
    fn a_peer_that_takes_partial_checksums_completes_them_to_the_same(honest in honest()) {
        let (hdr, packet) = honest.partial();
        prop_assume!(honest.is_super_packet());
        let complete = segments(hdr, &packet, Offloads::NONE);
        let partial = segments(hdr, &packet, CSUM_ONLY);
        prop_assert_eq!(partial.len(), complete.len());
        for ((hdr, packet), complete) in partial.into_iter().zip(complete) {
            prop_assert_eq!(validate(hdr, &packet, CSUM_ONLY), Ok(hdr));
            prop_assert_eq!(segments(hdr, &packet, Offloads::NONE), vec![complete]);
        }
    }

    #[test]
    fn a_partial_checksum_is_completed(honest in honest()) {
        let honest = Honest { gso_bytes: PACKET_BYTES_MAX, ..honest };
        let (hdr, packet) = honest.partial();
        prop_assert_eq!(fit(hdr, &packet, CSUM_ONLY), Fit::AsIs);
        prop_assert_eq!(fit(hdr, &packet, Offloads::NONE), Fit::NeedsSegmenting);
        prop_assert_eq!(
            segments(hdr, &packet, Offloads::NONE),
            vec![(VirtioNetHdr::PLAIN, honest.complete())]
        );
    }

    #[test]
    fn only_what_is_accepted_fits(honest in honest(), accepts: [bool; 5]) {
        let accepts = offloads(accepts);
        let (hdr, packet) = honest.partial();
        let taken = match (honest.is_super_packet(), honest.protocol, honest.src) {
            (false, _, _) => true,
            (true, PROTOCOL_TCP, IpAddr::V4(_)) => accepts.tso4,
            (true, PROTOCOL_TCP, IpAddr::V6(_)) => accepts.tso6,
            (true, _, IpAddr::V4(_)) => accepts.uso4,
            (true, _, IpAddr::V6(_)) => accepts.uso6,
        };
        if taken && accepts.csum {
            prop_assert_eq!(fit(hdr, &packet, accepts), Fit::AsIs);
        } else {
            prop_assert_eq!(fit(hdr, &packet, accepts), Fit::NeedsSegmenting);
            prop_assert_eq!(validate(hdr, &packet, accepts), Err(OffloadError::NotAccepted));
            for (hdr, packet) in segments(hdr, &packet, accepts) {
                prop_assert_eq!(validate(hdr, &packet, accepts), Ok(hdr));
            }
        }
    }

    #[test]
    fn the_ten_bytes_are_a_header(bytes: [u8; VIRTIO_NET_HDR_BYTES]) {
        let hdr = VirtioNetHdr::read(&bytes);
        let mut written = [0; VIRTIO_NET_HDR_BYTES];
        hdr.write(&mut written);
        prop_assert_eq!(written, bytes);
    }

    #[test]
    fn offloads_survive_text_and_tun_flags(on: [bool; 5]) {
        let offloads = offloads(on);
        prop_assert_eq!(offloads.to_string().parse(), Ok(offloads));
        prop_assert_eq!(Offloads::from_tun_flags(offloads.to_tun_flags()), offloads);
        prop_assert_eq!(offloads.intersection(Offloads::ALL), offloads);
        prop_assert_eq!(offloads.intersection(Offloads::NONE), Offloads::NONE);
    }
}

fn trimmed(hdr: VirtioNetHdr, packet: &[u8]) -> Option<(VirtioNetHdr, Vec<u8>)> {
    let mut bytes = packet.to_vec();
    match trim_first(hdr, &mut bytes) {
        Some((hdr, start)) => Some((hdr, bytes[start..].to_vec())),
        None => {
            assert_eq!(bytes, packet, "what is not trimmed is not changed");
            None
        }
    }
}

proptest! {
    #[test]
    fn a_trimmed_super_packet_is_its_segments_but_for_the_first(honest in honest()) {
        let (mut hdr, mut packet) = honest.partial();
        let all = [Offloads::NONE, CSUM_ONLY].map(|accepts| segments(hdr, &packet, accepts));
        for gone in 1.. {
            let Some((rest_hdr, rest)) = trimmed(hdr, &packet) else {
                prop_assert_eq!(gone, all[0].len(), "the last segment stays");
                prop_assert_eq!(hdr.gso_type, GSO_NONE);
                prop_assert_eq!(hdr.gso_size, 0);
                break;
            };
            // In its normal form, so that the peer passes it to his kernel as it is.
            prop_assert_eq!(validate(rest_hdr, &rest, Offloads::ALL), Ok(rest_hdr));
            prop_assert!(kernel_takes(rest_hdr, &rest));
            prop_assert_eq!(packet.len() - rest.len(), honest.gso_bytes);
            for (accepts, all) in [Offloads::NONE, CSUM_ONLY].into_iter().zip(&all) {
                let left = match fit(rest_hdr, &rest, accepts) {
                    Fit::AsIs => vec![(rest_hdr, rest.clone())],
                    Fit::NeedsSegmenting => segments(rest_hdr, &rest, accepts),
                };
                prop_assert_eq!(&left[..], &all[gone..]);
            }
            (hdr, packet) = (rest_hdr, rest);
        }
    }

    #[test]
    fn any_bytes_are_signalled_without_panic(
        mut framed in prop::collection::vec(any::<u8>(), 0..200),
        hdr in prop::option::of((0..2_u8, 0..6_u8, 1..60_u16)),
        v6: bool,
    ) {
        if let (Some((flags, gso_type, gso_size)), true) = (hdr, framed.len() > 70) {
            let hdr = VirtioNetHdr { flags, gso_type, hdr_len: 0, gso_size, csum_start: 20, csum_offset: 16 };
            framed[..VIRTIO_NET_HDR_BYTES].copy_from_slice(&hdr.to_bytes());
            framed[10] = if v6 { 0x60 } else { 0x45 };
        }
        signalled(&framed)?;
    }

    #[test]
    fn an_honest_packet_is_marked_trimmed_dropped_or_spared(honest in honest(), ecn in 0..4_u8) {
        let (hdr, mut packet) = honest.partial();
        set_ecn(&mut packet, ecn);
        let expected = match honest.protocol {
            _ if ecn != 0 => Signal::Marked,
            PROTOCOL_TCP if honest.payload.is_empty() => Signal::Spare,
            _ if honest.is_super_packet() => Signal::Trimmed { bytes: honest.gso_bytes },
            _ => Signal::Drop,
        };
        let framed = [&hdr.to_bytes(), &packet[..]].concat();
        let (signal, after) = signalled(&framed)?;
        prop_assert_eq!(signal, expected);
        match signal {
            Signal::Trimmed { .. } => {
                let (hdr, packet) = trimmed(hdr, &packet).expect("a super-packet");
                prop_assert_eq!(after, [&hdr.to_bytes(), &packet[..]].concat());
            }
            Signal::Marked => {
                set_ecn(&mut packet, 3);
                prop_assert_eq!(after, [&hdr.to_bytes(), &packet[..]].concat());
            }
            Signal::Drop | Signal::Spare => prop_assert_eq!(after, framed),
        }
    }

    #[test]
    fn handshakes_and_resets_are_spared(mut honest in honest(), rst: bool, bytes in 0..1400_usize) {
        honest.protocol = PROTOCOL_TCP;
        honest.gso_bytes = PACKET_BYTES_MAX;
        honest.payload.resize(bytes, 7);
        honest.tcp_flags |= if rst { TCP_FLAG_RST } else { TCP_FLAG_SYN };
        let (hdr, packet) = honest.partial();
        let framed = [&hdr.to_bytes(), &packet[..]].concat();
        prop_assert_eq!(signalled(&framed)?, (Signal::Spare, framed));
    }
}

/// Signals with a copy. What is left never begins before the packet did, nor carries a mark that it did not ask for.
fn signalled(framed: &[u8]) -> Result<(Signal, Vec<u8>), TestCaseError> {
    let capable = framed
        .get(VIRTIO_NET_HDR_BYTES..)
        .is_some_and(|packet| ecn_of(packet) != 0);
    let mut after = framed.to_vec();
    let signal = signal(&mut after);
    prop_assert_eq!(signal == Signal::Marked, capable);
    if let Signal::Trimmed { bytes } = signal {
        after.drain(..bytes);
    }
    if !capable && after.len() >= VIRTIO_NET_HDR_BYTES {
        prop_assert_eq!(ecn_of(&after[VIRTIO_NET_HDR_BYTES..]), 0);
    }
    Ok((signal, after))
}

/// The ECN bits, 0 for what is no IP packet.
fn ecn_of(packet: &[u8]) -> u8 {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= 20 => packet[1] & 3,
        Some(6) if packet.len() >= 40 => (packet[1] >> 4) & 3,
        _ => 0,
    }
}

fn set_ecn(packet: &mut [u8], ecn: u8) {
    if packet[0] >> 4 == 6 {
        packet[1] = packet[1] & 0xcf | ecn << 4;
        return;
    }
    packet[1] = packet[1] & 0xfc | ecn;
    let header_bytes = usize::from(packet[0] & 0x0f) * 4;
    packet[10..12].fill(0);
    let checksum = Checksum::new().bytes(&packet[..header_bytes]).finish();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Whatever is accepted is acceptable to the kernel and can be segmented; nothing panics.
fn judge(hdr: VirtioNetHdr, packet: &[u8]) -> Result<(), TestCaseError> {
    let mut scratch = vec![0; PACKET_BYTES_MAX];
    if let Ok(normal) = validate(hdr, packet, Offloads::ALL) {
        prop_assert!(kernel_takes(normal, packet), "{:?}", normal);
        prop_assert_eq!(normal.flags & !FLAG_NEEDS_CSUM, 0);
        prop_assert_eq!(validate(normal, packet, Offloads::ALL), Ok(normal));
        let (mut bytes_max, mut bytes) = (0, 0);
        let count = segment(
            normal,
            packet,
            Offloads::NONE,
            &mut scratch,
            |_, segment| {
                bytes_max = segment.len();
                bytes += segment.len();
            },
        );
        let count = count.map_err(|error| TestCaseError::fail(error.to_string()))?;
        // As many bytes as these for each packet, and as many bytes of packets for each byte.
        prop_assert!(
            (1..=(1 + packet.len() / 48).min(128)).contains(&count),
            "{} packets",
            count
        );
        prop_assert!(
            bytes <= 4 * packet.len(),
            "{} bytes of {}",
            bytes,
            packet.len()
        );
        prop_assert!(bytes_max <= packet.len());
    }
    // The local kernel's word is taken for more than a peer's, but is no reason to panic either.
    let _ = segment(hdr, packet, Offloads::NONE, &mut scratch, |_, _| ());
    Ok(())
}

fn offloads([csum, tso4, tso6, uso4, uso6]: [bool; 5]) -> Offloads {
    Offloads {
        csum,
        tso4,
        tso6,
        uso4,
        uso6,
    }
}

/// Everything before the transport header is the super-packet's but for lengths, IPv4 identification and checksum.
fn verify_headers(honest: &Honest, packet: &[u8], segment: &[u8], index: usize, last: bool) {
    let mut expected = packet[..honest.transport_offset()].to_vec();
    if honest.src.is_ipv4() {
        let identification = honest.identification.wrapping_add(index as u16);
        expected[2..4].copy_from_slice(&(segment.len() as u16).to_be_bytes());
        expected[4..6].copy_from_slice(&identification.to_be_bytes());
        expected[10..12].copy_from_slice(&segment[10..12]);
    } else {
        expected[4..6].copy_from_slice(&(segment.len() as u16 - 40).to_be_bytes());
    }
    assert_eq!(
        segment[..honest.transport_offset()],
        expected,
        "segment {index}, last: {last}"
    );
}

fn verify_tcp(honest: &Honest, header: &[u8], index: usize, last: bool) {
    let tcp = TcpSlice::from_slice(header).expect("a TCP header");
    let sequence = honest
        .sequence
        .wrapping_add((index * honest.gso_bytes) as u32);
    assert_eq!(tcp.sequence_number(), sequence);
    let on = |flag: u8| honest.tcp_flags & flag != 0;
    assert_eq!(tcp.fin(), last && on(TCP_FLAG_FIN));
    assert_eq!(tcp.psh(), last && on(TCP_FLAG_PSH));
    assert_eq!(tcp.cwr(), index == 0 && on(TCP_FLAG_CWR));
    assert_eq!(tcp.ece(), on(TCP_FLAG_ECE));
    assert!(tcp.ack());
    assert_eq!(tcp.acknowledgment_number(), 77);
    assert_eq!(tcp.window_size(), 501);
    assert_eq!(tcp.options().len(), if honest.tcp_options { 12 } else { 0 });
}

/// A header and packet that would be accepted, changed, and what is then wrong with it.
#[track_caller]
fn refused(
    honest: &Honest,
    change: impl FnOnce(&mut VirtioNetHdr, &mut Vec<u8>),
    expected: OffloadError,
) {
    let (mut hdr, mut packet) = honest.partial();
    assert!(validate(hdr, &packet, Offloads::ALL).is_ok());
    change(&mut hdr, &mut packet);
    assert_eq!(validate(hdr, &packet, Offloads::ALL), Err(expected));
}

#[test]
fn a_type_that_contradicts_the_packet_is_refused() {
    let (tcp4, tcp6, udp) = (Honest::default(), Honest::v6(), Honest::udp());
    for (honest, gso_type) in [
        (&tcp4, GSO_TCPV6),
        (&tcp4, GSO_UDP_L4),
        (&tcp6, GSO_TCPV4),
        (&tcp6, GSO_UDP_L4),
        (&udp, GSO_TCPV4),
        (&udp, GSO_TCPV6),
    ] {
        refused(
            honest,
            |hdr, _| hdr.gso_type = gso_type,
            OffloadError::Protocol,
        );
    }
}

#[test]
fn a_type_that_does_not_exist_is_refused() {
    // 3 is UFO, which no kernel since 4.14 gives.
    for gso_type in [2, 3, 6, 0x20, 0x41, 0x7f, GSO_ECN, GSO_ECN | 3] {
        refused(
            &Honest::default(),
            |hdr, _| hdr.gso_type = gso_type,
            OffloadError::GsoType,
        );
    }
}

#[test]
fn the_ecn_bit_is_a_flag_of_tcp_types() {
    for honest in [Honest::default(), Honest::v6()] {
        let (hdr, packet) = honest.partial();
        let ecn = VirtioNetHdr {
            gso_type: hdr.gso_type | GSO_ECN,
            ..hdr
        };
        let normal = validate(ecn, &packet, Offloads::ALL).expect("a flag, not another type");
        assert_eq!(normal.gso_type, ecn.gso_type);
        assert_eq!(
            segments(ecn, &packet, Offloads::NONE),
            segments(hdr, &packet, Offloads::NONE)
        );
    }
    refused(
        &Honest::udp(),
        |hdr, _| hdr.gso_type |= GSO_ECN,
        OffloadError::GsoType,
    );
}

#[test]
fn a_super_packet_needs_a_partial_checksum() {
    for honest in [Honest::default(), Honest::v6(), Honest::udp()] {
        refused(
            &honest,
            |hdr, _| hdr.flags = 0,
            OffloadError::ChecksumMissing,
        );
        refused(
            &honest,
            |hdr, _| hdr.flags = FLAG_DATA_VALID,
            OffloadError::ChecksumMissing,
        );
    }
}

#[test]
fn a_checksum_elsewhere_is_refused() {
    for honest in [Honest::default(), Honest::v6(), Honest::udp()] {
        for honest in [
            Honest {
                gso_bytes: 9000,
                ..honest.clone()
            },
            honest,
        ] {
            let csum_start = honest.partial().0.csum_start;
            for wrong in [
                0,
                1,
                csum_start - 1,
                csum_start + 1,
                csum_start + 2,
                4999,
                65_534,
                65_535,
            ] {
                refused(
                    &honest,
                    |hdr, _| hdr.csum_start = wrong,
                    OffloadError::ChecksumPosition,
                );
            }
            for wrong in [0, 4, 7, 14, 18, 4999, 65_534, 65_535] {
                refused(
                    &honest,
                    |hdr, _| hdr.csum_offset = wrong,
                    OffloadError::ChecksumPosition,
                );
            }
        }
    }
    // Neither TCP nor UDP: ICMP's checksum is always complete.
    refused(
        &Honest::udp(),
        |_, packet| packet[9] = 1,
        OffloadError::ChecksumPosition,
    );
}

#[test]
fn a_cut_off_transport_header_is_refused() {
    let short = Honest {
        payload: Vec::new(),
        tcp_options: false,
        ..Honest::default()
    };
    let (hdr, mut packet) = short.partial();
    packet.truncate(38);
    packet[2..4].copy_from_slice(&38_u16.to_be_bytes());
    assert_eq!(
        validate(hdr, &packet, Offloads::ALL),
        Err(OffloadError::Transport)
    );
}

#[test]
fn transport_headers_that_cannot_be_repeated_are_refused() {
    let tcp = Honest::default();
    for data_offset in [0x00, 0x40] {
        refused(
            &tcp,
            |_, packet| packet[20 + 12] = data_offset,
            OffloadError::Transport,
        );
    }
    for flag in [TCP_FLAG_SYN, TCP_FLAG_RST] {
        refused(
            &tcp,
            |_, packet| packet[20 + 13] |= flag,
            OffloadError::Transport,
        );
    }
    for udp_bytes in [0_u16, 7, 8, 5007, 5009] {
        let change = |_: &mut VirtioNetHdr, packet: &mut Vec<u8>| {
            packet[24..26].copy_from_slice(&udp_bytes.to_be_bytes());
        };
        refused(&Honest::udp(), change, OffloadError::Transport);
    }
    // A data offset beyond the packet's end.
    let tiny = Honest {
        tcp_options: false,
        payload: payload(10, 0),
        ..tcp
    };
    refused(
        &tiny,
        |hdr, packet| {
            (hdr.gso_type, hdr.gso_size) = (GSO_TCPV4, 48);
            packet[20 + 12] = 0xf0;
        },
        OffloadError::Transport,
    );
}

#[test]
fn a_segment_size_out_of_range_is_refused() {
    for honest in [Honest::default(), Honest::v6(), Honest::udp()] {
        for gso_size in [0, 1, 8, 31, 47, 0xffff] {
            refused(
                &honest,
                |hdr, _| hdr.gso_size = gso_size,
                OffloadError::GsoSize,
            );
        }
    }
}

/// 170 bytes were 128 packets once.
#[test]
fn a_super_packet_makes_no_more_packets_than_others() {
    for basis in [Honest::default(), Honest::v6(), Honest::udp()] {
        let of_bytes = |gso_bytes: usize, bytes: usize| {
            let honest = Honest {
                gso_bytes,
                payload: payload(bytes, 0),
                ..basis.clone()
            };
            let (hdr, packet) = honest.partial();
            validate(hdr, &packet, Offloads::ALL).map(|hdr| hdr.gso_size)
        };
        assert_eq!(of_bytes(1, 128), Err(OffloadError::GsoSize));
        assert_eq!(of_bytes(47, 48), Err(OffloadError::GsoSize));
        assert_eq!(of_bytes(48, 49), Ok(48));
        assert_eq!(of_bytes(48, 128 * 48), Ok(48));
        assert_eq!(of_bytes(48, 128 * 48 + 1), Err(OffloadError::GsoSize));
        assert_eq!(of_bytes(500, 128 * 500 + 1), Err(OffloadError::GsoSize));
        assert_eq!(of_bytes(1, 1), Ok(0), "one segment is an ordinary packet");
    }
}

/// An IPv6 super-packet with this many bytes of destination options, in headers of `gso_bytes` or
/// of what they need.
fn with_options(option_bytes: usize, gso_bytes: usize) -> (VirtioNetHdr, Vec<u8>) {
    let honest = Honest {
        gso_bytes,
        payload: payload(5000, 0),
        ..Honest::v6()
    };
    let (hdr, packet) = honest.partial();
    let (ip, transport) = packet.split_at(40);
    let mut options = vec![0; option_bytes];
    options[..2].copy_from_slice(&[PROTOCOL_TCP, (option_bytes / 8 - 1) as u8]);
    let mut packet = [ip, &options, transport].concat();
    packet[6] = 60;
    let payload_bytes = (packet.len() - 40) as u16;
    packet[4..6].copy_from_slice(&payload_bytes.to_be_bytes());
    let hdr = VirtioNetHdr {
        csum_start: hdr.csum_start + option_bytes as u16,
        ..hdr
    };
    (hdr, packet)
}

/// 16 KiB of extension headers were repeated in every segment once.
#[test]
fn headers_longer_than_segments_are_not_repeated() {
    let validated = |option_bytes, gso_bytes| {
        let (hdr, packet) = with_options(option_bytes, gso_bytes);
        validate(hdr, &packet, Offloads::ALL).map(|hdr| hdr.hdr_len)
    };
    assert_eq!(validated(56, 48), Ok(128));
    assert_eq!(validated(64, 48), Err(OffloadError::RepeatedHeaders));
    assert_eq!(validated(2048, 2120), Ok(2120));
    assert_eq!(validated(2048, 2119), Err(OffloadError::RepeatedHeaders));
    let (hdr, packet) = with_options(64, 48);
    assert_eq!(fit(hdr, &packet, Offloads::ALL), Fit::NeedsSegmenting);
    assert_eq!(segments(hdr, &packet, Offloads::ALL).len(), 105);
}

#[test]
fn a_super_packet_of_one_segment_becomes_an_ordinary_packet() {
    let (hdr, packet) = Honest::default().partial();
    let one = validate(
        VirtioNetHdr {
            gso_size: 5000,
            ..hdr
        },
        &packet,
        Offloads::ALL,
    )
    .expect("valid");
    assert_eq!(
        one,
        VirtioNetHdr {
            gso_type: GSO_NONE,
            gso_size: 0,
            hdr_len: 0,
            ..hdr
        }
    );
    let two = validate(
        VirtioNetHdr {
            gso_size: 4999,
            ..hdr
        },
        &packet,
        Offloads::ALL,
    )
    .expect("valid");
    assert_eq!(
        two,
        VirtioNetHdr {
            gso_size: 4999,
            hdr_len: 52,
            ..hdr
        }
    );
}

#[test]
fn a_length_that_is_not_the_packets_is_refused() {
    for honest in [Honest::default(), Honest::v6(), Honest::udp()] {
        refused(&honest, |_, packet| packet.push(0), OffloadError::Length);
        let truncated = OffloadError::Packet(PacketError::Truncated);
        refused(
            &honest,
            |_, packet| packet.truncate(packet.len() - 1),
            truncated,
        );
    }
}

#[test]
fn fragments_are_refused() {
    refused(
        &Honest::default(),
        |_, packet| packet[6] |= 0x20,
        OffloadError::Fragment,
    );
    refused(
        &Honest::default(),
        |_, packet| packet[7] = 1,
        OffloadError::Fragment,
    );
}

#[test]
fn an_ordinary_packet_is_accepted_whatever_the_rest_says() {
    let packet = Honest::default().complete();
    let strange = VirtioNetHdr {
        hdr_len: 9,
        gso_size: 7,
        csum_start: 65_535,
        csum_offset: 3,
        ..VirtioNetHdr::PLAIN
    };
    assert_eq!(
        validate(strange, &packet, Offloads::NONE),
        Ok(VirtioNetHdr::PLAIN)
    );
    let data_valid = VirtioNetHdr {
        flags: FLAG_DATA_VALID,
        ..strange
    };
    assert_eq!(
        validate(data_valid, &packet, Offloads::NONE),
        Ok(VirtioNetHdr::PLAIN)
    );
    for not_a_packet in [&[][..], &[0x45; 19], &[0x60; 39], &[0x35; 60]] {
        assert!(validate(VirtioNetHdr::PLAIN, not_a_packet, Offloads::ALL).is_err());
    }
}

/// Twenty bytes with a version and a source were enough once.
#[test]
fn an_empty_header_is_no_way_around_the_rules_of_context_0() {
    let packet = Honest::default().complete();
    for (at, byte) in [(0, 0x4f), (0, 0x44), (2, 0xff), (2, 0)] {
        let mut packet = packet[..60].to_vec();
        packet[2..4].copy_from_slice(&60_u16.to_be_bytes());
        packet[at] = byte;
        if byte == 0 {
            packet[3] = 19;
        }
        let expected = packet::parse(&packet).map_err(OffloadError::Packet);
        let validated = validate(VirtioNetHdr::PLAIN, &packet, Offloads::ALL);
        assert_eq!(validated.map(|_| ()), expected.map(|_| ()), "{at} {byte}");
        assert_eq!(validated.is_ok(), byte == 0x4f);
    }
    let mut v6 = Honest::v6().complete();
    v6.truncate(100);
    let truncated = OffloadError::Packet(PacketError::Truncated);
    let validated = validate(VirtioNetHdr::PLAIN, &v6, Offloads::ALL);
    assert_eq!(validated, Err(truncated));
}

/// Regression that others had: a computed checksum of zero means "no checksum" in UDP (RFC 768).
#[test]
fn a_udp_checksum_of_zero_is_written_as_ffff() {
    for (gso_bytes, basis) in [
        (2, Honest::default()),
        (2, Honest::v6()),
        (9000, Honest::default()),
    ] {
        let mut honest = Honest {
            protocol: PROTOCOL_UDP,
            gso_bytes,
            payload: vec![0, 0],
            ..basis
        };
        // A checksum of c for a payload of zero means zero for a payload of c.
        let complete = honest.complete();
        honest.payload = complete[honest.header_bytes() - 2..honest.header_bytes()].to_vec();
        if gso_bytes == 2 {
            honest.payload = honest.payload.repeat(3);
        }
        let (hdr, packet) = honest.partial();
        let emitted = segments(hdr, &packet, Offloads::NONE);
        assert_eq!(emitted.len(), honest.payload.len() / 2);
        for (_, packet) in emitted {
            let (transport, _) = verify(&packet);
            assert_eq!(transport[6..8], [0xff, 0xff]);
        }
    }
}

/// A kernel with a tunnel device on top of ours may leave the inner protocol's checksum to us.
#[test]
fn a_partial_checksum_deep_inside_is_completed_here() {
    let (inner_hdr, inner) = Honest {
        gso_bytes: 9000,
        ..Honest::default()
    }
    .partial();
    let outer = Honest {
        payload: inner,
        gso_bytes: 9000,
        ..Honest::udp()
    };
    let hdr = VirtioNetHdr {
        csum_start: inner_hdr.csum_start + outer.header_bytes() as u16,
        ..inner_hdr
    };
    let packet = outer.complete();
    assert_eq!(
        validate(hdr, &packet, Offloads::ALL),
        Err(OffloadError::ChecksumPosition)
    );
    assert_eq!(fit(hdr, &packet, Offloads::ALL), Fit::NeedsSegmenting);
    let emitted = segments(hdr, &packet, Offloads::ALL);
    assert_eq!(emitted[0].0, VirtioNetHdr::PLAIN);
    verify(&emitted[0].1[outer.header_bytes()..]);
}

#[test]
fn a_super_packet_that_the_peer_would_refuse_is_segmented_and_not_lost() {
    let tiny = Honest {
        gso_bytes: 20,
        ..Honest::default()
    };
    let (hdr, packet) = tiny.partial();
    assert_eq!(fit(hdr, &packet, Offloads::ALL), Fit::NeedsSegmenting);
    let emitted = segments(hdr, &packet, Offloads::ALL);
    assert_eq!(emitted.len(), 250);
    for (hdr, packet) in emitted {
        assert_eq!(validate(hdr, &packet, Offloads::ALL), Ok(hdr));
    }
}

#[test]
fn short_scratch_space_is_an_error_before_anything_is_emitted() {
    for accepts in [Offloads::NONE, CSUM_ONLY] {
        let (hdr, packet) = Honest::default().partial();
        let mut scratch = vec![0; 52 + 1448 - 1];
        let result = segment(hdr, &packet, accepts, &mut scratch, |_, _| {
            panic!("emitted")
        });
        assert_eq!(result, Err(OffloadError::Scratch));
        scratch.push(0);
        assert_eq!(
            segment(hdr, &packet, accepts, &mut scratch, |_, _| ()),
            Ok(4)
        );
    }
}

#[test]
fn an_ordinary_packet_passes_through_segmentation_unchanged() {
    let packet = Honest::default().complete();
    let emitted = segments(VirtioNetHdr::PLAIN, &packet, Offloads::NONE);
    assert_eq!(emitted, vec![(VirtioNetHdr::PLAIN, packet)]);
}

#[test]
fn offloads_read_as_parameters_of_a_structured_field() {
    assert_eq!(Offloads::ALL.to_string(), "csum;tso4;tso6;uso4;uso6");
    assert_eq!(Offloads::NONE.to_string(), "");
    let csum_tso4 = Offloads {
        csum: true,
        tso4: true,
        ..Offloads::NONE
    };
    for text in [
        "csum;tso4",
        ";csum;tso4",
        "tso4; csum",
        "csum;tso4=?1;tso6=?0",
        "csum;csum;tso4;lro;uso4=7",
    ] {
        assert_eq!(text.parse(), Ok(csum_tso4), "{text}");
    }
}

#[test]
fn tun_flags_are_linuxs() {
    assert_eq!(Offloads::ALL.to_tun_flags(), 0x6f);
    assert_eq!(CSUM_ONLY.to_tun_flags(), 1);
    assert_eq!(Offloads::NONE.to_tun_flags(), 0);
}

#[test]
fn the_sum_does_not_depend_on_how_it_is_cut() {
    let bytes = payload(101, 9);
    let whole = Checksum::new().bytes(&bytes).finish();
    for cut in (0..100).step_by(2) {
        let (front, back) = bytes.split_at(cut);
        assert_eq!(Checksum::new().bytes(front).bytes(back).finish(), whole);
    }
}
