//! Capsules out of the stream, and into it.

use super::packets::{Family, super_packet, tcp};
use super::{Case, Volume, Work};
use ringtun::proto::capsule::datagram_header;
use ringtun::proto::deframer::{Deframer, Frame};
use ringtun::proto::offload::VIRTIO_NET_HDR_BYTES;
use std::hint::black_box;

/// Small packets in a run: about a record of them.
const SMALL_PACKETS: usize = 256;
/// Super-packets in a run.
const SUPER_PACKETS: usize = 16;
/// The context that the two ends have agreed on.
const OFFLOAD_CONTEXT: u64 = 2;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "capsule/deframe/small",
            Volume::Packets(SMALL_PACKETS),
            || Deframing::new(SMALL_PACKETS, OFFLOAD_CONTEXT, &small()),
        ),
        Case::new(
            "capsule/deframe/super",
            Volume::Packets(SUPER_PACKETS),
            || Deframing::new(SUPER_PACKETS, OFFLOAD_CONTEXT, &super_packet(Family::V4).1),
        ),
        Case::new("capsule/header", Volume::Packets(SMALL_PACKETS), || {
            Framing {
                payload_bytes: (0..SMALL_PACKETS).map(|index| 40 + index * 250).collect(),
            }
        }),
    ]
}

/// `virtio_net_hdr` and a TCP packet without payload.
fn small() -> Vec<u8> {
    [vec![0; VIRTIO_NET_HDR_BYTES], tcp(Family::V4, 0, 0)].concat()
}

struct Deframing {
    stream: Vec<u8>,
    packets: usize,
}

impl Deframing {
    fn new(packets: usize, context: u64, payload: &[u8]) -> Self {
        let header = datagram_header(context, payload.len());
        Self {
            stream: [header.as_bytes(), payload].concat().repeat(packets),
            packets,
        }
    }
}

impl Work for Deframing {
    fn run(&mut self) {
        let mut deframer = Deframer::new();
        let mut stream = black_box(&self.stream[..]);
        let mut packets = 0;
        loop {
            match deframer.next(stream).expect("a lawful stream") {
                Frame::Datagram {
                    context,
                    payload,
                    end,
                } => {
                    black_box((context, payload));
                    packets += 1;
                    stream = &stream[end..];
                }
                Frame::Incomplete => break,
                other => panic!("not a packet: {other:?}"),
            }
        }
        assert_eq!(packets, self.packets);
    }
}

struct Framing {
    payload_bytes: Vec<usize>,
}

impl Work for Framing {
    fn run(&mut self) {
        for &bytes in &self.payload_bytes {
            black_box(datagram_header(OFFLOAD_CONTEXT, black_box(bytes)).as_bytes());
        }
    }
}
