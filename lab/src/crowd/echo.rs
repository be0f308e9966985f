//! ICMP echo packets, made and checked by hand.

use std::net::Ipv4Addr;

use ringtun::proto::capsule::datagram_header;
use ringtun::proto::packet::Checksum;

const IPV4_HEADER_BYTES: usize = 20;
const ICMP_HEADER_BYTES: usize = 8;
const PAYLOAD_BYTES: usize = 56;
const TTL: u8 = 64;
const ICMP: u8 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// What the checksum of something with a right checksum in it folds to.
const SUM_OF_ALL: u16 = 0xffff;

/// One echo request and what its reply has to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Echo {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) identifier: u16,
    pub(super) sequence: u16,
}

impl Echo {
    /// The request as an IP packet.
    pub(super) fn request(&self) -> Vec<u8> {
        self.packet(ECHO_REQUEST, self.from, self.to, TTL)
    }

    /// Whether a packet is the reply, to the last byte but for what routers change.
    pub(super) fn is_answered_by(&self, packet: &[u8]) -> bool {
        let Some((header, body)) = packet.split_first_chunk::<IPV4_HEADER_BYTES>() else {
            return false;
        };
        let expected = self.packet(ECHO_REPLY, self.to, self.from, TTL);
        let is_whole = usize::from(u16::from_be_bytes([header[2], header[3]])) == packet.len();
        header[0] == expected[0]
            && is_whole
            && header[9] == ICMP
            && Checksum::new().bytes(header).folded() == SUM_OF_ALL
            && header[12..] == expected[12..IPV4_HEADER_BYTES]
            && body == &expected[IPV4_HEADER_BYTES..]
    }

    fn packet(&self, kind: u8, from: Ipv4Addr, to: Ipv4Addr, ttl: u8) -> Vec<u8> {
        let total_bytes = IPV4_HEADER_BYTES + ICMP_HEADER_BYTES + PAYLOAD_BYTES;
        let mut packet = vec![0; total_bytes];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&(total_bytes as u16).to_be_bytes());
        packet[8] = ttl;
        packet[9] = ICMP;
        packet[12..16].copy_from_slice(&from.octets());
        packet[16..20].copy_from_slice(&to.octets());
        let sum = Checksum::new().bytes(&packet[..IPV4_HEADER_BYTES]).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());

        let icmp = &mut packet[IPV4_HEADER_BYTES..];
        icmp[0] = kind;
        icmp[4..6].copy_from_slice(&self.identifier.to_be_bytes());
        icmp[6..8].copy_from_slice(&self.sequence.to_be_bytes());
        // No two sessions and requests have the same bytes.
        let seed = u32::from(self.identifier) << 16 | u32::from(self.sequence);
        for (index, byte) in icmp[ICMP_HEADER_BYTES..].iter_mut().enumerate() {
            *byte = seed.wrapping_mul(0x9e37_79b9).rotate_left(index as u32) as u8;
        }
        let sum = Checksum::new().bytes(icmp).finish();
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

/// A DATAGRAM capsule of these parts.
pub(crate) fn datagram(context: u64, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let header = datagram_header(context, payload.len());
    [header.as_bytes(), &payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECHO: Echo = Echo {
        from: Ipv4Addr::new(10, 87, 0, 2),
        to: Ipv4Addr::new(203, 0, 113, 80),
        identifier: 7,
        sequence: 3,
    };

    fn reply() -> Vec<u8> {
        // A router on the way has taken one off.
        ECHO.packet(ECHO_REPLY, ECHO.to, ECHO.from, TTL - 1)
    }

    #[test]
    fn a_reply_is_known_and_nothing_else_is() {
        assert!(ECHO.is_answered_by(&reply()));
        assert!(!ECHO.is_answered_by(&ECHO.request()));
        let other = Echo {
            sequence: 4,
            ..ECHO
        };
        assert!(!other.is_answered_by(&reply()));
        for at in 0..reply().len() {
            let mut changed = reply();
            changed[at] ^= 1;
            assert!(!ECHO.is_answered_by(&changed), "byte {at}");
        }
        assert!(!ECHO.is_answered_by(&reply()[..40]));
    }
}
