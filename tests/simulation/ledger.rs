//! What went in, and what became of it: every packet is looked up here when it arrives, compared with what it should be by
//! now, and accounted for segment by segment.

use crate::packets::{Label, Part, Protocol, Shape};
use ringtun::proto::egress_queue::Verdict;
use ringtun::proto::offload::{
    FLAG_NEEDS_CSUM, GSO_NONE, GSO_UDP_L4, Offloads, VIRTIO_NET_HDR_BYTES, VirtioNetHdr, segment,
};
use ringtun::proto::timer::Instant;
use std::collections::HashMap;

/// Where a packet is, as far as it has not arrived.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Waiting,
    Sealed,
    /// By the queue or before it.
    Dropped,
    /// With its connection.
    Lost,
}

#[derive(Debug)]
struct Entry {
    flow: usize,
    part: Part,
    /// The stream that it was given to.
    stream: usize,
    entered_at: Instant,
    state: State,
    is_marked: bool,
    /// Segments at its front that are gone, and those after them that have arrived.
    trimmed: usize,
    arrived: usize,
}

impl Entry {
    fn left(&self) -> usize {
        self.part.segments - self.trimmed - self.arrived
    }
}

/// A packet's number.
pub type Id = usize;

/// Segments, by what became of them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Totals {
    pub entered: usize,
    pub arrived: usize,
    pub trimmed: usize,
    pub dropped: usize,
    pub lost: usize,
    /// Of those that arrived: packets that were marked, super-packets that were gathered, flows that came by another
    /// connection than before.
    pub marked: usize,
    pub gathered: usize,
    pub moved: usize,
}

impl Totals {
    pub fn add(&mut self, other: &Self) {
        let Self {
            entered,
            arrived,
            trimmed,
            dropped,
            lost,
            marked,
            gathered,
            moved,
        } = other;
        self.entered += entered;
        self.arrived += arrived;
        self.trimmed += trimmed;
        self.dropped += dropped;
        self.lost += lost;
        self.marked += marked;
        self.gathered += gathered;
        self.moved += moved;
    }
}

/// Segments of a flow that have arrived.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub id: Id,
    pub flow: usize,
    pub segments: usize,
    pub packet_bytes: usize,
    pub is_marked: bool,
    pub entered_at: Instant,
}

/// What waits for a stream.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Held {
    pub packets: usize,
    pub bytes: usize,
}

#[derive(Debug)]
pub struct Ledger {
    shapes: Vec<Shape>,
    entries: Vec<Entry>,
    /// Of each flow its packets, in order.
    by_flow: Vec<Vec<Id>>,
    /// Of each flow the last place that has arrived by each stream.
    last: Vec<Vec<(usize, u32)>>,
    /// Of each stream the packets that were given to it, and are not known to have ended.
    by_stream: HashMap<usize, Vec<Id>>,
    waiting: HashMap<usize, Held>,
    pub totals: Totals,
    scratch: Vec<u8>,
}

impl Ledger {
    pub fn new(shapes: Vec<Shape>) -> Self {
        Self {
            by_flow: vec![Vec::new(); shapes.len()],
            last: vec![Vec::new(); shapes.len()],
            shapes,
            entries: Vec::new(),
            by_stream: HashMap::new(),
            waiting: HashMap::new(),
            totals: Totals::default(),
            scratch: vec![0; 1 << 16],
        }
    }

    pub fn shape(&self, flow: usize) -> &Shape {
        &self.shapes[flow]
    }

    pub fn flow(&self, id: Id) -> usize {
        self.entries[id].flow
    }

    pub fn waiting(&self, stream: usize) -> Held {
        self.waiting.get(&stream).copied().unwrap_or_default()
    }

    /// A packet enters, the next one of its flow.
    pub fn enter(&mut self, now: Instant, flow: usize, part: Part) -> Id {
        let id = self.entries.len();
        self.totals.entered += part.segments;
        self.by_flow[flow].push(id);
        self.entries.push(Entry {
            flow,
            part,
            stream: usize::MAX,
            entered_at: now,
            state: State::Waiting,
            is_marked: false,
            trimmed: 0,
            arrived: 0,
        });
        id
    }

    /// It waits for a stream now, with so many bytes.
    pub fn wait(&mut self, id: Id, stream: usize, bytes: usize) {
        self.entries[id].stream = stream;
        self.by_stream.entry(stream).or_default().push(id);
        let held = self.waiting.entry(stream).or_default();
        held.packets += 1;
        held.bytes += bytes;
    }

    fn wait_no_more(&mut self, id: Id, bytes: usize) {
        let entry = &self.entries[id];
        assert_eq!(entry.state, State::Waiting, "packet {id} left twice");
        if let Some(held) = self.waiting.get_mut(&entry.stream) {
            held.packets -= 1;
            held.bytes -= bytes;
        }
    }

    /// The queue has decided about a packet that was `before` bytes long and is `after` now.
    pub fn heed(&mut self, id: Id, verdict: Verdict, before: usize, after: usize) {
        let entry = &mut self.entries[id];
        let shape = &self.shapes[entry.flow];
        assert!(
            verdict == Verdict::Pass || entry.trimmed == 0 && !entry.is_marked,
            "packet {id} was asked twice"
        );
        let is_capable = shape.ecn != 0;
        match verdict {
            Verdict::Pass | Verdict::Drop => assert_eq!(before, after),
            Verdict::Marked => {
                assert!(is_capable, "packet {id} knows no marks");
                entry.is_marked = true;
                assert_eq!(before, after);
            }
            Verdict::Trimmed => {
                assert!(!is_capable, "packet {id} could have been marked");
                assert!(entry.left() > 1, "packet {id} had one segment");
                entry.trimmed = 1;
                self.totals.trimmed += 1;
                assert_eq!(before, after + shape.segment_bytes);
                if let Some(held) = self.waiting.get_mut(&entry.stream) {
                    held.bytes -= before - after;
                }
            }
        }
        if verdict == Verdict::Drop {
            assert!(!is_capable, "packet {id} could have been marked");
            assert!(shape.protocol != Protocol::Acks, "packet {id} is spared");
            assert_eq!(entry.left(), 1, "packet {id} could have been trimmed");
            self.drop(id, after);
        }
    }

    /// It was dropped while it waited, with so many bytes.
    pub fn drop(&mut self, id: Id, bytes: usize) {
        self.wait_no_more(id, bytes);
        self.refuse(id);
    }

    /// It was dropped before it could wait.
    pub fn refuse(&mut self, id: Id) {
        let entry = &mut self.entries[id];
        entry.state = State::Dropped;
        self.totals.dropped += entry.left();
    }

    /// It is on its way.
    pub fn seal(&mut self, id: Id, bytes: usize) {
        self.wait_no_more(id, bytes);
        self.entries[id].state = State::Sealed;
    }

    /// A stream has ended: what was to go by it and has not arrived is lost. Flows with segments.
    pub fn lose(&mut self, stream: usize) -> Vec<(usize, usize)> {
        self.waiting.remove(&stream);
        let mut lost = Vec::new();
        for id in self.by_stream.remove(&stream).unwrap_or_default() {
            let entry = &mut self.entries[id];
            if entry.stream == stream && matches!(entry.state, State::Waiting | State::Sealed) {
                let left = entry.left();
                entry.state = State::Lost;
                self.totals.lost += left;
                if left > 0 {
                    lost.push((entry.flow, left));
                }
            }
        }
        lost
    }

    /// A packet arrives by a stream.
    pub fn arrive(&mut self, stream: usize, header: VirtioNetHdr, packet: &[u8]) -> Vec<Arrival> {
        if header.gso_type != GSO_UDP_L4 {
            return vec![self.arrive_part(stream, header, packet)];
        }
        // It may have been gathered of several.
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut arrivals = Vec::new();
        let segmented = segment(
            header,
            packet,
            Offloads::NONE,
            &mut scratch,
            |header, one| {
                arrivals.push(self.arrive_part(stream, header, one));
            },
        );
        segmented.expect("a super-packet that is valid can be segmented");
        self.scratch = scratch;
        let is_gathered = arrivals
            .windows(2)
            .any(|pair: &[Arrival]| pair[0].id != pair[1].id);
        self.totals.gathered += usize::from(is_gathered);
        arrivals
    }

    fn arrive_part(&mut self, stream: usize, header: VirtioNetHdr, packet: &[u8]) -> Arrival {
        let label = Label::read(packet, &self.shapes).expect("a packet of ours");
        let shape = self.shapes[label.flow];
        assert_eq!(label.is_up, shape.is_up, "a packet goes back");
        let id = self.find(&label);
        let entry = &mut self.entries[id];
        let distance = label.place.wrapping_sub(entry.part.place);
        let index = (distance / shape.step()) as usize;
        assert_eq!(entry.stream, stream, "packet {id} came another way");
        assert_eq!(entry.state, State::Sealed, "packet {id} was never sent");
        assert_eq!(
            index,
            entry.trimmed + entry.arrived,
            "segment of packet {id} came twice, too early, or is to be gone"
        );
        assert!(
            label.ecn != 3 || shape.ecn != 0,
            "packet {id} was marked and knows no marks"
        );
        let segments = match shape.protocol {
            Protocol::Tcp if header.gso_type != GSO_NONE => {
                label.payload_bytes.div_ceil(shape.segment_bytes)
            }
            _ => 1,
        };
        let is_last = index + segments == entry.part.segments;
        let is_free = shape.protocol == Protocol::Udp && shape.dont_fragment;
        let expected = Part {
            place: label.place,
            segments,
            last_bytes: if is_last {
                entry.part.last_bytes
            } else {
                shape.segment_bytes
            },
            // What nobody may look at may change when packets are gathered.
            identification: if is_free {
                label.identification
            } else {
                entry.part.identification.wrapping_add(index as u16)
            },
            cwr: entry.part.cwr && index == 0,
            is_end: entry.part.is_end && is_last,
        };
        let is_partial = header.flags & FLAG_NEEDS_CSUM != 0;
        let expected = shape.build(&expected, is_partial, entry.is_marked);
        let (expected_header, expected_packet) = expected.split_at(VIRTIO_NET_HDR_BYTES);
        assert!(
            header.to_bytes() == *expected_header && packet == expected_packet,
            "packet {id} was altered: {entry:?} of {shape:?} came under {header:?} as\n{:02x?}, expected\n{:02x?} under {:02x?}",
            &packet[..packet.len().min(72)],
            &expected_packet[..expected_packet.len().min(72)],
            expected_header,
        );
        entry.arrived += segments;
        self.totals.arrived += segments;
        self.totals.marked += usize::from(entry.is_marked);
        let arrival = Arrival {
            id,
            flow: label.flow,
            segments,
            packet_bytes: packet.len(),
            is_marked: entry.is_marked,
            entered_at: entry.entered_at,
        };
        self.check_order(stream, &label);
        arrival
    }

    fn find(&self, label: &Label) -> Id {
        let ids = &self.by_flow[label.flow];
        let after = ids.partition_point(|id| self.entries[*id].part.place <= label.place);
        assert!(after > 0, "a place of a flow from before it began");
        ids[after - 1]
    }

    /// What goes by one stream keeps its order.
    fn check_order(&mut self, stream: usize, label: &Label) {
        let last = &mut self.last[label.flow];
        match last.iter_mut().find(|(by, _)| *by == stream) {
            Some((_, place)) => {
                assert!(
                    *place < label.place,
                    "flow {} was reordered: {} after {place}",
                    label.flow,
                    label.place
                );
                *place = label.place;
            }
            None => {
                self.totals.moved += usize::from(!last.is_empty());
                last.push((stream, label.place));
            }
        }
    }

    /// Everything has come to an end: nothing is held, and each segment was accounted for once.
    pub fn check_settled(&self) {
        for (id, entry) in self.entries.iter().enumerate() {
            let is_over = match entry.state {
                State::Waiting => false,
                State::Sealed => entry.left() == 0,
                State::Dropped | State::Lost => true,
            };
            assert!(is_over, "packet {id} is held for ever: {entry:?}");
        }
        let Totals {
            entered,
            arrived,
            trimmed,
            dropped,
            lost,
            ..
        } = self.totals;
        assert_eq!(
            entered,
            arrived + trimmed + dropped + lost,
            "{:?}",
            self.totals
        );
    }
}
