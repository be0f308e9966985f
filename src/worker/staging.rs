//! Small packets of one connection on their way into one record.

use crate::proto::capsule::datagram_header;
use crate::proto::offload::{Datagram, Run, VIRTIO_NET_HDR_BYTES};
use crate::tls::record::RECORD_PLAINTEXT_BYTES_MAX;
use std::ops::Deref;

/// Whole capsules, a record's worth at most.
///
/// A packet of UDP may have been gathered into the last capsule, which is whole after each of them.
pub(super) struct Staging {
    capsules: Vec<u8>,
    /// Only of the last capsule, which ends where all end.
    gathering: Option<Gathering>,
}

/// A capsule that further packets may be gathered into.
struct Gathering {
    run: Run,
    /// Where the capsule starts.
    start: usize,
    /// Bytes in front of its `virtio_net_hdr`.
    front_bytes: usize,
}

impl Staging {
    pub(super) fn new() -> Self {
        Self {
            capsules: Vec::with_capacity(RECORD_PLAINTEXT_BYTES_MAX),
            gathering: None,
        }
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.capsules.len() + bytes <= RECORD_PLAINTEXT_BYTES_MAX
    }

    /// Appends a capsule: what is in front of the packet, and the packet.
    pub(super) fn push(&mut self, front: &[u8], packet: &[u8]) {
        self.gathering = None;
        self.capsules.extend_from_slice(front);
        self.capsules.extend_from_slice(packet);
    }

    /// Appends the capsule of a packet that others may be gathered with.
    pub(super) fn push_first(&mut self, front: &[u8], framed: &[u8], datagram: &Datagram) {
        let start = self.capsules.len();
        self.push(front, framed);
        self.gathering = Some(Gathering {
            run: Run::begin(datagram),
            start,
            front_bytes: front.len(),
        });
    }

    /// Gathers a packet into the last capsule. `false`: it needs a capsule of its own.
    pub(super) fn gather(&mut self, context: u64, datagram: &Datagram) -> bool {
        let Some(gathering) = &mut self.gathering else {
            return false;
        };
        let payload = datagram.payload();
        let framed_bytes = VIRTIO_NET_HDR_BYTES + gathering.run.packet_bytes() + payload.len();
        let front = datagram_header(context, framed_bytes);
        let front = front.as_bytes();
        let end = gathering.start + front.len() + framed_bytes;
        if end > RECORD_PLAINTEXT_BYTES_MAX || !gathering.run.take(datagram) {
            return false;
        }
        let shift = front.len() - gathering.front_bytes;
        if shift > 0 {
            // The capsule's length has got longer by a byte, which happens once, to one that is short.
            let old = gathering.start + gathering.front_bytes..self.capsules.len();
            self.capsules.resize(self.capsules.len() + shift, 0);
            self.capsules
                .copy_within(old, gathering.start + front.len());
            gathering.front_bytes = front.len();
        }
        self.capsules.extend_from_slice(payload);
        let (capsule_front, framed) = self.capsules[gathering.start..].split_at_mut(front.len());
        capsule_front.copy_from_slice(front);
        let (header, packet) = framed.split_at_mut(VIRTIO_NET_HDR_BYTES);
        header.copy_from_slice(&gathering.run.describe(packet).to_bytes());
        true
    }

    pub(super) fn clear(&mut self) {
        self.capsules.clear();
        self.gathering = None;
    }
}

impl Deref for Staging {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.capsules
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::deframer::{Deframer, Frame};
    use crate::proto::offload::{Offloads, VirtioNetHdr, segment};
    use etherparse::PacketBuilder;

    const CONTEXT: u64 = 2;

    fn packet(port: u16, bytes: usize, seed: usize) -> Vec<u8> {
        let mut packet = Vec::new();
        let payload: Vec<u8> = (0..bytes).map(|index| (index + seed) as u8).collect();
        PacketBuilder::ipv6([0xfd; 16], [0x20; 16], 64)
            .udp(port, 53)
            .write(&mut packet, &payload)
            .expect("fits");
        packet
    }

    /// Stages a packet as the packet path does. `false`: the record is full.
    fn stage(staging: &mut Staging, packet: &[u8]) -> bool {
        let datagram =
            Datagram::read(VirtioNetHdr::PLAIN, packet, Offloads::ALL).expect("eligible");
        if staging.gather(CONTEXT, &datagram) {
            return true;
        }
        let framed = [&VirtioNetHdr::PLAIN.to_bytes(), packet].concat();
        let front = datagram_header(CONTEXT, framed.len());
        let fits = staging.has_room(front.as_bytes().len() + framed.len());
        if fits {
            staging.push_first(front.as_bytes(), &framed, &datagram);
        }
        fits
    }

    /// Each capsule's packets, after segmentation.
    fn packets(staging: &Staging) -> Vec<Vec<Vec<u8>>> {
        let (mut deframer, mut start) = (Deframer::new(), 0);
        let mut capsules = Vec::new();
        let mut scratch = vec![0; 1 << 16];
        while let Frame::Datagram {
            context,
            payload,
            end,
        } = deframer.next(&staging[start..]).expect("capsules")
        {
            assert_eq!(context, CONTEXT);
            let framed = &staging[start..][payload];
            let (header, packet) = framed.split_first_chunk().expect("a header");
            let header = VirtioNetHdr::read(header);
            let mut cut = Vec::new();
            segment(
                header,
                packet,
                Offloads::NONE,
                &mut scratch,
                |_, segment| {
                    cut.push(segment.to_vec());
                },
            )
            .expect("a packet");
            capsules.push(cut);
            start += end;
        }
        assert_eq!(start, staging.len(), "whole capsules only");
        capsules
    }

    #[test]
    fn capsules_are_whole_after_each_packet() {
        for bytes in [48, 49, 100, 500] {
            let mut staging = Staging::new();
            let flow: Vec<_> = (0..20).map(|number| packet(7, bytes, number)).collect();
            for number in 1..=flow.len() {
                assert!(stage(&mut staging, &flow[number - 1]));
                assert_eq!(packets(&staging), [&flow[..number]], "{bytes} bytes");
            }
        }
    }

    #[test]
    fn a_capsule_in_between_ends_a_run() {
        let mut staging = Staging::new();
        let flow: Vec<_> = (0..5).map(|number| packet(7, 100, number)).collect();
        let other = packet(8, 100, 0);
        for packet in [&flow[0], &flow[1], &other, &flow[2]] {
            assert!(stage(&mut staging, packet));
        }
        let foreign = [&VirtioNetHdr::PLAIN.to_bytes(), &other[..]].concat();
        staging.push(datagram_header(CONTEXT, foreign.len()).as_bytes(), &foreign);
        assert!(stage(&mut staging, &flow[3]));
        assert!(stage(&mut staging, &flow[4]));
        let expected = [
            vec![flow[0].clone(), flow[1].clone()],
            vec![other.clone()],
            vec![flow[2].clone()],
            vec![other],
            vec![flow[3].clone(), flow[4].clone()],
        ];
        assert_eq!(packets(&staging), expected);

        staging.clear();
        assert!(staging.is_empty());
        assert!(stage(&mut staging, &flow[0]));
        assert_eq!(packets(&staging), [[flow[0].clone()]]);
    }

    #[test]
    fn a_record_is_never_exceeded_and_never_grows_in_memory() {
        for bytes in [1, 64, 800, 1452] {
            let mut staging = Staging::new();
            let capacity = staging.capsules.capacity();
            let mut staged = Vec::new();
            loop {
                let next = packet(7, bytes, staged.len());
                if !stage(&mut staging, &next) {
                    break;
                }
                staged.push(next);
                assert!(staging.len() <= RECORD_PLAINTEXT_BYTES_MAX);
            }
            assert!(staging.len() + 2 * bytes + 128 > RECORD_PLAINTEXT_BYTES_MAX);
            assert_eq!(staging.capsules.capacity(), capacity);
            assert_eq!(packets(&staging).concat(), staged);
        }
    }
}
