//! Explicit congestion notification in IP headers (RFC 3168): the mark instead of the loss.

use super::packet::{Checksum, IPV4_HEADER_BYTES_MIN, IPV6_HEADER_BYTES};

/// The two bits in IPv4's type of service and in IPv6's traffic class (RFC 3168 section 5). Not-ECT is zero.
const ECN_MASK: u8 = 0b11;
const CONGESTION_EXPERIENCED: u8 = 0b11;

/// Sets "congestion experienced" if the packet says that its ends understand it (ECT(0), ECT(1) or CE itself). `true`:
/// it carries the mark now.
///
/// Nothing else changes but IPv4's header checksum, which is adjusted and not made anew (RFC 1624), so that a wrong one
/// stays wrong. Every segment of a super-packet gets the mark with its headers; `virtio_net_hdr` has no say in it, since
/// `VIRTIO_NET_HDR_GSO_ECN` is about CWR.
#[inline]
pub fn mark_congestion(packet: &mut [u8]) -> bool {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= IPV4_HEADER_BYTES_MIN => mark_v4(packet),
        Some(6) if packet.len() >= IPV6_HEADER_BYTES => mark_v6(packet),
        _ => false,
    }
}

fn mark_v4(packet: &mut [u8]) -> bool {
    let before = u16::from_be_bytes([packet[0], packet[1]]);
    if packet[1] & ECN_MASK == 0 {
        return false;
    }
    packet[1] |= CONGESTION_EXPERIENCED;
    let after = u16::from_be_bytes([packet[0], packet[1]]);
    let checksum = u16::from_be_bytes([packet[10], packet[11]]);
    // RFC 1624, equation 3.
    let checksum = Checksum::new()
        .without_word(checksum)
        .without_word(before)
        .word(after)
        .finish();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    true
}

fn mark_v6(packet: &mut [u8]) -> bool {
    // The traffic class lies across the first two bytes, its ECN bits in the upper half of the second.
    if (packet[1] >> 4) & ECN_MASK == 0 {
        return false;
    }
    packet[1] |= CONGESTION_EXPERIENCED << 4;
    true
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv4Header, Ipv4HeaderSlice, Ipv6Header, Ipv6HeaderSlice};
    use proptest::prelude::*;

    use super::*;

    fn v4(dscp: u8, ecn: u8, words: [u16; 3], payload: &[u8]) -> Vec<u8> {
        let mut header = Ipv4Header {
            identification: words[0],
            source: words[1].to_be_bytes().repeat(2).try_into().expect("four"),
            destination: words[2].to_be_bytes().repeat(2).try_into().expect("four"),
            total_len: (20 + payload.len()) as u16,
            time_to_live: 64,
            dscp: dscp.try_into().expect("six bits"),
            ecn: ecn.try_into().expect("two bits"),
            ..Default::default()
        };
        header.header_checksum = header.calc_header_checksum();
        [&header.to_bytes()[..], payload].concat()
    }

    fn v6(traffic_class: u8, flow_label: u32, payload: &[u8]) -> Vec<u8> {
        let header = Ipv6Header {
            traffic_class,
            flow_label: flow_label.try_into().expect("20 bits"),
            payload_length: payload.len() as u16,
            hop_limit: 64,
            source: [0xfd; 16],
            destination: [0x20; 16],
            ..Default::default()
        };
        [&header.to_bytes()[..], payload].concat()
    }

    proptest! {
        #[test]
        fn only_what_is_capable_is_marked_and_nothing_else_changes_in_ipv4(
            dscp in 0..64_u8, ecn in 0..4_u8, words: [u16; 3], payload in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let before = v4(dscp, ecn, words, &payload);
            let mut after = before.clone();
            prop_assert_eq!(mark_congestion(&mut after), ecn != 0);
            let expected = v4(dscp, if ecn == 0 { 0 } else { 3 }, words, &payload);
            prop_assert_eq!(&after, &expected);
            let header = Ipv4HeaderSlice::from_slice(&after).expect("a header").to_header();
            prop_assert_eq!(header.header_checksum, header.calc_header_checksum());
        }

        #[test]
        fn only_what_is_capable_is_marked_and_nothing_else_changes_in_ipv6(
            traffic_class: u8, flow_label in 0..1_u32 << 20, payload in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let mut packet = v6(traffic_class, flow_label, &payload);
            let capable = traffic_class & 3 != 0;
            prop_assert_eq!(mark_congestion(&mut packet), capable);
            let expected = if capable { traffic_class | 3 } else { traffic_class };
            prop_assert_eq!(&packet, &v6(expected, flow_label, &payload));
            let header = Ipv6HeaderSlice::from_slice(&packet).expect("a header");
            prop_assert_eq!(header.traffic_class(), expected);
        }

        #[test]
        fn any_bytes_are_looked_at_without_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let before = bytes.clone();
            if !mark_congestion(&mut bytes) {
                prop_assert_eq!(bytes, before);
            }
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let mut packet = v4(0, 2, [1, 2, 3], b"");
        packet[11] ^= 1;
        assert!(mark_congestion(&mut packet));
        let header = Ipv4HeaderSlice::from_slice(&packet)
            .expect("a header")
            .to_header();
        assert_ne!(header.header_checksum, header.calc_header_checksum());
    }
}
