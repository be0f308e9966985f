//! What is done about the `virtio_net_hdr` in front of a packet.

use super::packets::{Family, super_packet, tcp};
use super::{Case, Volume, Work};
use ringtun::proto::offload::{
    Offloads, Signal, VIRTIO_NET_HDR_BYTES, VirtioNetHdr, segment, signal, validate,
};
use std::hint::black_box;

/// Headers that are validated in a run.
const BATCH: usize = 64;
/// The longest packet.
const PACKET_BYTES_MAX: usize = 65_535;

pub fn cases() -> Vec<Case> {
    let validating = |name, make: fn() -> (VirtioNetHdr, Vec<u8>)| {
        Case::new(name, Volume::Packets(BATCH), move || {
            let (header, packet) = make();
            Validating { header, packet }
        })
    };
    let super_packet_bytes = super_packet(Family::V4).1.len();
    vec![
        validating("offload/validate/plain", || {
            (VirtioNetHdr::PLAIN, tcp(Family::V4, 0, 1000))
        }),
        validating("offload/validate/tcpv4", || super_packet(Family::V4)),
        validating("offload/validate/tcpv6", || super_packet(Family::V6)),
        // The checksum, and so nearly all of it, is in the C library's way of copying and in the compiler's of adding.
        Case::new(
            "offload/segment/tcpv4",
            Volume::Bytes(super_packet_bytes),
            || {
                let (header, packet) = super_packet(Family::V4);
                Segmenting {
                    header,
                    packet,
                    scratch: vec![0; PACKET_BYTES_MAX],
                }
            },
        )
        .dispatched(),
        Case::new("offload/trim/tcpv4", Volume::Packets(1), || {
            let (header, packet) = super_packet(Family::V4);
            let framed = [&header.to_bytes()[..], &packet].concat();
            Trimming {
                fresh: framed[..VIRTIO_NET_HDR_BYTES + 40].to_vec(),
                framed,
            }
        })
        .dispatched(),
    ]
}

struct Validating {
    header: VirtioNetHdr,
    packet: Vec<u8>,
}

impl Work for Validating {
    fn run(&mut self) {
        for _ in 0..BATCH {
            let validated = validate(
                black_box(self.header),
                black_box(&self.packet),
                Offloads::ALL,
            );
            black_box(validated).expect("an honest header");
        }
    }
}

struct Segmenting {
    header: VirtioNetHdr,
    packet: Vec<u8>,
    scratch: Vec<u8>,
}

impl Work for Segmenting {
    fn run(&mut self) {
        let count = segment(
            black_box(self.header),
            black_box(&self.packet),
            Offloads::NONE,
            &mut self.scratch,
            |header, segment| {
                black_box((header, segment));
            },
        );
        assert_eq!(count, Ok(46));
    }
}

/// The headers move over the payload, which does not matter, and are put back before each run.
struct Trimming {
    fresh: Vec<u8>,
    framed: Vec<u8>,
}

impl Work for Trimming {
    fn prepare(&mut self) {
        self.framed[..self.fresh.len()].copy_from_slice(&self.fresh);
    }

    fn run(&mut self) {
        let done = signal(black_box(&mut self.framed));
        assert!(matches!(done, Signal::Trimmed { .. }));
    }
}
