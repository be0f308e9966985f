//! One end: what the worker does between TUN and sockets, without rings, without TLS, with vectors in place of slots.
//!
//! Kept like `src/worker/{outbound,waiting,sealing,staging,path,inbound}.rs`, from which it differs where time and sockets come in.

use crate::ledger::Id;
use ringtun::proto::capsule::datagram_header;
use ringtun::proto::deframer::{Deframer, Frame};
use ringtun::proto::egress_queue::{Bounds, CLASSES, EgressQueue, Queued, Verdict};
use ringtun::proto::offload::{
    self, Datagram, Offloads, Run, Signal, VIRTIO_NET_HDR_BYTES, VirtioNetHdr,
};
use ringtun::proto::packet;
use ringtun::proto::route_table::{ConnectionRef, Member, RouteTable, SessionId, SessionRoute};
use ringtun::proto::send_limit::SendLimit;
use ringtun::proto::timer::Instant;
use ringtun::sys::socket::NOTSENT_LOWAT_BYTES;
use ringtun::tls::record::{
    RECORD_HEADER_BYTES, RECORD_OVERHEAD_BYTES, RECORD_PLAINTEXT_BYTES_MAX,
};
use ringtun::uring::buffer::{MEDIUM_SLOT_BYTES, PACKET_SLOT_BYTES, SMALL_SLOT_BYTES};
use std::collections::VecDeque;

/// How much may be unsent in a socket at most, and at first.
pub const UNSENT_BYTES_MAX: u64 = NOTSENT_LOWAT_BYTES as u64;
/// Slots that reading the TUN queue leaves to others, and a connection's queue.
const INBOUND_RESERVE_SLOTS: usize = 4;
const PACKETS_LEFT_MIN: usize = 5;
const RESERVE_SHARE: usize = 8;
/// Larger capsules have a record of their own.
const COALESCE_BYTES_MAX: usize = 2048;
const SEGMENT_HEADERS_BYTES: usize = 128;
/// The context of packets with an offload header.
const OFFLOAD_CONTEXT: u64 = 2;
/// Classes of slots, and what fits in one.
pub const LARGE: usize = 0;
const MEDIUM: usize = 1;
const SMALL: usize = 2;
const SLOT_BYTES: [usize; CLASSES] = [PACKET_SLOT_BYTES, MEDIUM_SLOT_BYTES, SMALL_SLOT_BYTES];

/// A packet that waits.
#[derive(Debug)]
pub struct Outgoing {
    pub id: Id,
    framed: Vec<u8>,
    start: usize,
    class: usize,
}

impl Outgoing {
    pub fn new(id: Id, framed: Vec<u8>) -> Self {
        Self {
            id,
            framed,
            start: 0,
            class: LARGE,
        }
    }

    /// `virtio_net_hdr` and packet.
    pub fn framed(&self) -> &[u8] {
        &self.framed[self.start..]
    }

    pub fn header(&self) -> VirtioNetHdr {
        let bytes = self.framed().first_chunk();
        VirtioNetHdr::read(bytes.expect("every packet has one"))
    }

    pub fn packet(&self) -> &[u8] {
        &self.framed()[VIRTIO_NET_HDR_BYTES..]
    }
}

impl Queued for Outgoing {
    fn bytes(&self) -> usize {
        self.framed.len() - self.start
    }

    fn class(&self) -> usize {
        self.class
    }

    fn signal(&mut self) -> Verdict {
        match offload::signal(&mut self.framed[self.start..]) {
            Signal::Marked => Verdict::Marked,
            Signal::Trimmed { bytes } => {
                self.start += bytes;
                Verdict::Trimmed
            }
            Signal::Drop => Verdict::Drop,
            Signal::Spare => Verdict::Pass,
        }
    }
}

/// The memory for packets, of which only the number of slots matters here.
#[derive(Debug)]
pub struct Pool {
    slots: [usize; CLASSES],
    free: [usize; CLASSES],
}

impl Pool {
    pub fn new(slots: [usize; CLASSES]) -> Self {
        Self { slots, free: slots }
    }

    /// A slot for a packet that is read from TUN, unless the rest is for others.
    pub fn take(&mut self) -> bool {
        let is_there = self.free[LARGE] > INBOUND_RESERVE_SLOTS;
        self.free[LARGE] -= usize::from(is_there);
        is_there
    }

    pub fn release(&mut self, outgoing: &Outgoing) {
        self.free[outgoing.class] += 1;
        assert!(self.free[outgoing.class] <= self.slots[outgoing.class]);
    }

    /// Moves it to the smallest slot in which it fits and of which there is one.
    pub fn shrink(&mut self, outgoing: &mut Outgoing) {
        let bytes = outgoing.bytes();
        let smaller = [SMALL, MEDIUM].into_iter().find(|class| {
            bytes <= SLOT_BYTES[*class] && *class > outgoing.class && self.free[*class] > 0
        });
        if let Some(class) = smaller {
            self.free[class] -= 1;
            self.free[outgoing.class] += 1;
            outgoing.class = class;
        }
    }

    pub fn bounds(&self, bytes_max: usize, taken: usize) -> Bounds {
        let besides_reserve = |class: usize| {
            let reserve = self.slots[class] / RESERVE_SHARE;
            self.free[class].saturating_sub(reserve).max(1)
        };
        let mut slots_max = [0; CLASSES];
        slots_max[LARGE] = (self.free[LARGE] + taken).saturating_sub(PACKETS_LEFT_MIN);
        slots_max[MEDIUM] = besides_reserve(MEDIUM);
        slots_max[SMALL] = besides_reserve(SMALL);
        Bounds {
            bytes_max,
            slots_max,
        }
    }

    pub fn is_all_free(&self) -> bool {
        self.free == self.slots
    }
}

/// A chunk that is being written.
#[derive(Debug)]
pub struct Sending {
    pub chunk: Vec<u8>,
    pub sent: usize,
    /// What the socket has taken of it, which is not known yet.
    pub taken: usize,
}

#[derive(Debug)]
pub struct Connection {
    pub ordinal: usize,
    /// The stream that it sends, and the one that it receives.
    pub outbound: usize,
    pub inbound: usize,
    pub queue: EgressQueue<Outgoing>,
    pub limit: SendLimit,
    pub looked_at: Instant,
    pub unsent_bytes_max: u64,
    pub fill: Vec<u8>,
    pub sending: Option<Sending>,
    pub pausing: bool,
    inbox: Inbox,
}

impl Connection {
    pub fn new(ordinal: usize, outbound: usize, inbound: usize) -> Self {
        Self {
            ordinal,
            outbound,
            inbound,
            queue: EgressQueue::new(),
            limit: SendLimit::new(),
            looked_at: Instant::ZERO,
            unsent_bytes_max: UNSENT_BYTES_MAX,
            fill: Vec::new(),
            sending: None,
            pausing: false,
            inbox: Inbox::default(),
        }
    }

    /// Bytes that are sealed and that the socket has not taken.
    pub fn ahead_bytes(&self) -> usize {
        let sending = self.sending.as_ref();
        let sending = sending.map_or(0, |sending| sending.chunk.len() - sending.sent);
        sending + self.fill.len()
    }

    /// Bytes of the stream arrive: the packets that are whole now, each with the header to write to TUN.
    pub fn receive(&mut self, bytes: &[u8], offloads: Option<Offloads>) -> VecDeque<Received> {
        self.inbox.receive(bytes, offloads)
    }
}

/// A packet for TUN.
pub type Received = (VirtioNetHdr, Vec<u8>);

/// What has arrived and is not whole.
#[derive(Debug, Default)]
struct Inbox {
    records: Vec<u8>,
    plaintext: Vec<u8>,
    deframer: Deframer,
}

impl Inbox {
    fn receive(&mut self, bytes: &[u8], offloads: Option<Offloads>) -> VecDeque<Received> {
        self.records.extend_from_slice(bytes);
        let mut start = 0;
        while let Some(record) = whole_record(&self.records[start..]) {
            let end = start + record;
            let plaintext =
                start + RECORD_HEADER_BYTES..end - (RECORD_OVERHEAD_BYTES - RECORD_HEADER_BYTES);
            self.plaintext.extend_from_slice(&self.records[plaintext]);
            start = end;
        }
        self.records.drain(..start);
        let (mut received, mut start) = (VecDeque::new(), 0);
        loop {
            let frame = self.deframer.next(&self.plaintext[start..]);
            match frame.expect("what was sent is well-formed") {
                Frame::Incomplete => break,
                Frame::Datagram {
                    context,
                    payload,
                    end,
                } => {
                    received.push_back(open(&self.plaintext[start..][payload], context, offloads));
                    start += end;
                }
                frame => panic!("only packets were sent: {frame:?}"),
            }
        }
        self.plaintext.drain(..start);
        received
    }
}

fn whole_record(stream: &[u8]) -> Option<usize> {
    let [_, _, _, high, low] = stream.first_chunk::<RECORD_HEADER_BYTES>()?;
    let bytes = RECORD_HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low]));
    (stream.len() >= bytes).then_some(bytes)
}

fn open(payload: &[u8], context: u64, offloads: Option<Offloads>) -> Received {
    let Some(offloads) = offloads else {
        assert_eq!(context, 0);
        packet::parse(payload).expect("a packet");
        return (VirtioNetHdr::PLAIN, payload.to_vec());
    };
    assert_eq!(context, OFFLOAD_CONTEXT);
    let (header, packet) = payload.split_first_chunk().expect("a header");
    let header = offload::validate(VirtioNetHdr::read(header), packet, offloads);
    (header.expect("what is sent is valid"), packet.to_vec())
}

/// Small packets on their way into one record, and the last of them, which others may be gathered with.
#[derive(Debug, Default)]
pub struct Staging {
    capsules: Vec<u8>,
    run: Option<(Run, Vec<u8>)>,
}

impl Staging {
    pub fn bytes(&self) -> usize {
        let run = self.run.as_ref();
        self.capsules.len() + run.map_or(0, |(_, framed)| framed.len() + 16)
    }

    fn end_run(&mut self) {
        let Some((run, mut framed)) = self.run.take() else {
            return;
        };
        let (header, packet) = framed.split_at_mut(VIRTIO_NET_HDR_BYTES);
        let payload = packet.len();
        let one = VIRTIO_NET_HDR_BYTES + payload;
        assert_eq!(run.packet_bytes(), payload);
        if run_is_gathered(&run, packet) {
            header.copy_from_slice(&run.describe(packet).to_bytes());
        }
        let front = datagram_header(OFFLOAD_CONTEXT, one);
        self.capsules.extend_from_slice(front.as_bytes());
        self.capsules.extend_from_slice(&framed);
    }

    fn push(&mut self, front: &[u8], payload: &[u8]) {
        self.end_run();
        self.capsules.extend_from_slice(front);
        self.capsules.extend_from_slice(payload);
    }
}

/// Whether there is more in it than the packet that it began with, whose own length is still in its header.
fn run_is_gathered(run: &Run, packet: &[u8]) -> bool {
    let first = packet::parse(packet).expect("a packet").total_bytes;
    run.packet_bytes() > first
}

/// How packets of a connection become records.
pub struct Sealing<'a> {
    pub staging: &'a mut Staging,
    pub chunk: &'a mut Vec<u8>,
    /// What the peer takes; `None`: it knows no offload context.
    pub offloads: Option<Offloads>,
}

/// Bytes that a packet becomes at most, if it follows `staged` bytes.
pub fn sealed_bytes_max(outgoing: &Outgoing, staged: usize, offloads: Offloads) -> usize {
    let header = outgoing.header();
    let segments = match offload::fit(header, outgoing.packet(), offloads) {
        offload::Fit::NeedsSegmenting if header.gso_size > 0 => {
            outgoing.bytes().div_ceil(usize::from(header.gso_size))
        }
        _ => 1,
    };
    let plaintext = staged + outgoing.bytes() + segments * SEGMENT_HEADERS_BYTES;
    plaintext + (plaintext / RECORD_PLAINTEXT_BYTES_MAX + 2) * RECORD_OVERHEAD_BYTES
}

impl Sealing<'_> {
    pub fn packet(&mut self, outgoing: &Outgoing, scratch: &mut [u8]) {
        let accepts = self.offloads.unwrap_or(Offloads::NONE);
        let (header, packet) = (outgoing.header(), outgoing.packet());
        if offload::fit(header, packet, accepts) == offload::Fit::NeedsSegmenting {
            let mut segments = Vec::new();
            offload::segment(header, packet, accepts, scratch, |header, segment| {
                segments.push([&header.to_bytes(), segment].concat());
            })
            .expect("a packet that TUN gives can be segmented");
            for framed in segments {
                self.stage(&framed);
            }
        } else if packet.len() + VIRTIO_NET_HDR_BYTES > COALESCE_BYTES_MAX {
            self.flush();
            let (front, payload) = self.capsule(outgoing.framed());
            seal(&[&front, payload].concat(), self.chunk);
        } else if !self.gather(outgoing.framed()) {
            self.stage(outgoing.framed());
        }
    }

    fn capsule<'p>(&self, framed: &'p [u8]) -> (Vec<u8>, &'p [u8]) {
        let (context, payload) = match self.offloads {
            Some(_) => (OFFLOAD_CONTEXT, framed),
            None => (0, &framed[VIRTIO_NET_HDR_BYTES..]),
        };
        let front = datagram_header(context, payload.len());
        (front.as_bytes().to_vec(), payload)
    }

    fn stage(&mut self, framed: &[u8]) {
        let (front, payload) = self.capsule(framed);
        self.flush_unless_room(front.len() + payload.len());
        self.staging.push(&front, payload);
    }

    fn flush_unless_room(&mut self, bytes: usize) {
        if self.staging.bytes() + bytes > RECORD_PLAINTEXT_BYTES_MAX {
            self.flush();
        }
    }

    /// Adds a packet to a run, or begins one with it. `false`: it cannot be part of any.
    fn gather(&mut self, framed: &[u8]) -> bool {
        let Some(offloads) = self.offloads else {
            return false;
        };
        let (header, packet) = framed.split_first_chunk().expect("a header");
        let Some(datagram) = Datagram::read(VirtioNetHdr::read(header), packet, offloads) else {
            return false;
        };
        let has_room =
            self.staging.bytes() + datagram.payload().len() + 16 <= RECORD_PLAINTEXT_BYTES_MAX;
        if let Some((run, gathered)) = &mut self.staging.run
            && has_room
            && run.take(&datagram)
        {
            gathered.extend_from_slice(datagram.payload());
            return true;
        }
        self.staging.end_run();
        self.flush_unless_room(framed.len() + 16);
        self.staging.run = Some((Run::begin(&datagram), framed.to_vec()));
        true
    }

    pub fn flush(&mut self) {
        self.staging.end_run();
        seal(&self.staging.capsules, self.chunk);
        self.staging.capsules.clear();
    }
}

/// As records without encryption: of the right length and otherwise empty.
fn seal(plaintext: &[u8], chunk: &mut Vec<u8>) {
    for part in plaintext.chunks(RECORD_PLAINTEXT_BYTES_MAX) {
        let rest = RECORD_OVERHEAD_BYTES - RECORD_HEADER_BYTES;
        let length = (part.len() + rest) as u16;
        chunk.extend_from_slice(&[23, 3, 3]);
        chunk.extend_from_slice(&length.to_be_bytes());
        chunk.extend_from_slice(part);
        chunk.resize(chunk.len() + rest, 0);
    }
}

/// The connections and the memory of one end.
#[derive(Debug)]
pub struct End {
    pub connections: Vec<Option<Connection>>,
    pub silent: Vec<bool>,
    pub routes: RouteTable,
    pub pool: Pool,
    pub staging_scratch: Vec<u8>,
}

impl End {
    pub fn new(connections: usize, slots: [usize; CLASSES]) -> Self {
        Self {
            connections: (0..connections).map(|_| None).collect(),
            silent: vec![false; connections],
            routes: RouteTable::empty(),
            pool: Pool::new(slots),
            staging_scratch: vec![0; 1 << 16],
        }
    }

    /// Control has changed something: flows are shared out anew. `lease`: this is the server.
    pub fn route(&mut self, lease: Option<&[std::net::IpAddr]>) {
        let members = self.connections.iter().flatten().map(|connection| Member {
            ordinal: connection.ordinal as u8,
            connection: ConnectionRef {
                worker: 0,
                slot: connection.ordinal as u32,
                generation: connection.outbound as u32,
            },
            silent: self.silent[connection.ordinal],
        });
        let route = SessionRoute::new(SessionId(1), members);
        match lease {
            Some(lease) => self.routes.insert(lease, route),
            None => self.routes = RouteTable::client(route),
        }
    }
}
