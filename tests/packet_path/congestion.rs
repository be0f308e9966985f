//! A connection that takes less than arrives for it: senders are told so, and the packets that tell them are sound.

use super::end::{End, Terms, eventually};
use super::packets::*;
use super::peer::{Peer, Received};
use ringtun::proto::offload::{self, GSO_NONE, Offloads, VirtioNetHdr};
use rstest::rstest;

const PAYLOAD_BYTES: usize = 40_000;
/// RFC 3168: congestion experienced.
const CE: u8 = 3;

/// A super-packet of the download direction's shape, with ECN bits.
fn super_packet_with(ecn: u8, sequence: u32) -> (VirtioNetHdr, Vec<u8>) {
    let (header, packet) = super_packet(sequence, &pattern(1, PAYLOAD_BYTES));
    (header, with_ecn(packet, ecn))
}

#[rstest]
fn senders_are_told_by_marks_or_by_one_segment(
    #[values(0, ECT_0)] ecn: u8,
    #[values(None, Some(Offloads::ALL))] offload: Option<Offloads>,
) {
    let mut server = End::new();
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    let (mut peer, connection) = Peer::join(&mut server, &terms);
    server.route_everything(&[connection]);
    let counter = match ecn {
        0 => "signalled_trimmed",
        _ => "signalled_marked",
    };
    let mut sent = 0;
    let mut received = 0;
    let mut told = 0;
    let mut next = 0_u32;
    let mut taken = 0;
    let expected = pattern(1, PAYLOAD_BYTES);
    let mut take = |peer: &mut Peer| {
        let (header, mut packet) = loop {
            match peer.receive() {
                Received::Plain(packet) => break (VirtioNetHdr::PLAIN, packet),
                Received::Offloaded(header, packet) => break (header, packet),
                Received::Capsule(_) => {} // The keepalive's.
                other => panic!("no packet: {other:?}"),
            }
        };
        assert_eq!(
            offload::validate(header, &packet, Offloads::ALL).map(|header| header.gso_type),
            Ok(header.gso_type)
        );
        let ecn_now = packet[1] & 3;
        assert!(ecn_now == ecn || ecn == ECT_0 && ecn_now == CE);
        if header.gso_type == GSO_NONE {
            complete(header, &mut packet);
            whole_segment(&packet);
        }
        let sequence = u32::from_be_bytes(*packet[24..28].first_chunk().unwrap());
        let payload = &packet[TCP_HEADERS_BYTES..];
        let offset = sequence as usize % PAYLOAD_BYTES;
        assert!(payload == &expected[offset..offset + payload.len()]);
        told += usize::from(match ecn {
            0 => sequence != next && offset == usize::from(GSO_BYTES),
            _ => ecn_now == CE,
        });
        next = sequence + payload.len() as u32;
        received += payload.len();
        (received, told)
    };
    // Twice as much arrives as the peer takes, until he has seen it. Some of those that tell may be lost to the bound.
    eventually("senders are told", || {
        for _ in 0..2 {
            let (header, packet) = super_packet_with(ecn, sent * PAYLOAD_BYTES as u32);
            server.send(0, header, &packet);
            sent += 1;
        }
        let enough = taken + PAYLOAD_BYTES;
        let mut told = 0;
        while taken < enough {
            (taken, told) = take(&mut peer);
        }
        told > 2
    });
    assert_ne!(server.count(counter), 0);
}
