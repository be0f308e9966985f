//! The queue between TUN and a connection.

use super::{Case, Volume, Work};
use ringtun::proto::egress_queue::{Admit, Bounds, EgressQueue, Queued, Verdict};
use ringtun::proto::timer::Instant;
use std::hint::black_box;
use std::time::Duration;

/// Packets that are pushed and popped in a run.
const BATCH: usize = 64;
/// Packets that wait all the time, where some do.
const BACKLOG: usize = 512;
/// Flows that share the queue.
const FLOWS: u32 = 32;
const PACKET_BYTES: usize = 1500;
/// More than ever waits here.
const BOUNDS: Bounds = Bounds::of_bytes(4 << 20);
/// From one turn of the loop to the next: nothing waits for so long that its sender would be told.
const TURN: Duration = Duration::from_micros(50);

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("queue/idle", Volume::Packets(BATCH), || Queueing::new(0)),
        Case::new("queue/backlog", Volume::Packets(BATCH), || {
            Queueing::new(BACKLOG)
        }),
    ]
}

/// As a worker's packets, but without bytes.
struct Packet;

impl Queued for Packet {
    fn bytes(&self) -> usize {
        PACKET_BYTES
    }

    fn class(&self) -> usize {
        0
    }

    fn signal(&mut self) -> Verdict {
        Verdict::Pass
    }
}

struct Queueing {
    queue: EgressQueue<Packet>,
    now: Instant,
    next_flow: u32,
}

impl Queueing {
    fn new(backlog: usize) -> Self {
        let mut queueing = Self {
            queue: EgressQueue::new(),
            now: Instant::ZERO,
            next_flow: 0,
        };
        queueing.push(backlog);
        queueing
    }

    fn push(&mut self, packets: usize) {
        for _ in 0..packets {
            let flow = self.next_flow % FLOWS;
            self.next_flow = self.next_flow.wrapping_add(1);
            let hash = flow.wrapping_mul(0x9e37_79b9);
            let admitted = self.queue.push(self.now, hash, black_box(Packet), &BOUNDS);
            assert_eq!(admitted, Admit::Queued);
        }
    }
}

impl Work for Queueing {
    /// A turn: a batch comes, and as many go.
    fn run(&mut self) {
        self.now += TURN;
        self.push(BATCH);
        for _ in 0..BATCH {
            assert!(black_box(self.queue.pop(self.now)).is_some());
        }
    }
}
