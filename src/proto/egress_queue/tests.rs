use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const FLOWS: usize = 40;

/// What a packet can tell its sender.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Capable,
    Segments(usize),
    Spared,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Toy {
    serial: usize,
    flow: u32,
    bytes: usize,
    class: usize,
    kind: Kind,
}

impl Queued for Toy {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn class(&self) -> usize {
        self.class
    }

    fn signal(&mut self) -> Verdict {
        match &mut self.kind {
            Kind::Capable => Verdict::Marked,
            Kind::Spared => Verdict::Pass,
            Kind::Segments(1) => Verdict::Drop,
            Kind::Segments(segments) => {
                self.bytes -= self.bytes / *segments;
                *segments -= 1;
                Verdict::Trimmed
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Push {
        flow: u32,
        bytes: usize,
        class: usize,
        kind: Kind,
    },
    Pop,
    PopNew,
    PutBack,
    Wait(u64),
    Bound(Bounds),
    Repack,
    Drain,
    Release,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Capable),
        (1..45_usize).prop_map(Kind::Segments),
        Just(Kind::Spared)
    ]
}

/// A packet's length and what it can tell: a segment has at least one byte.
fn length_and_kind(bytes: impl Strategy<Value = usize>) -> impl Strategy<Value = (usize, Kind)> {
    (bytes, kind()).prop_map(|(bytes, kind)| match kind {
        Kind::Segments(segments) => (bytes.max(segments), kind),
        Kind::Capable | Kind::Spared => (bytes, kind),
    })
}

fn bounds() -> impl Strategy<Value = Bounds> {
    (
        0..200_000_usize,
        prop::array::uniform::<_, CLASSES>(0..60_usize),
    )
        .prop_map(|(bytes_max, slots_max)| Bounds {
            bytes_max,
            slots_max,
        })
}

fn step() -> impl Strategy<Value = Step> {
    let push = (
        0..FLOWS as u32,
        length_and_kind(prop_oneof![1..1500_usize, 1..66_000_usize]),
        0..CLASSES,
    );
    prop_oneof![
        30 => push.prop_map(|(flow, (bytes, kind), class)| Step::Push { flow, bytes, class, kind }),
        15 => Just(Step::Pop),
        5 => Just(Step::PopNew),
        5 => Just(Step::PutBack),
        10 => (1..60_000_000_u64).prop_map(Step::Wait),
        2 => bounds().prop_map(Step::Bound),
        1 => Just(Step::Repack),
        1 => Just(Step::Drain),
        2 => Just(Step::Release),
    ]
}

/// The queue and what should be in it.
struct Checked {
    queue: EgressQueue<Toy>,
    waiting: HashMap<usize, Toy>,
    last_of_flow: [Option<usize>; FLOWS],
    counts: [usize; 3],
}

impl Checked {
    fn new() -> Self {
        Self {
            queue: EgressQueue::new(),
            waiting: HashMap::new(),
            last_of_flow: [None; FLOWS],
            counts: [0; 3],
        }
    }

    /// Packets in = out + dropped + held; each once, and in the order of its flow.
    fn leaves(&mut self, packet: &Toy, verdict: Verdict) -> Result<(), TestCaseError> {
        let came = self.waiting.remove(&packet.serial);
        prop_assert!(came.is_some(), "neither twice nor from nowhere");
        let came = came.expect("just checked");
        match verdict {
            Verdict::Trimmed => {
                prop_assert!(packet.bytes < came.bytes);
                prop_assert!(matches!(came.kind, Kind::Segments(2..)));
            }
            Verdict::Marked => prop_assert_eq!(came.kind, Kind::Capable),
            Verdict::Drop => prop_assert_eq!(came.kind, Kind::Segments(1)),
            Verdict::Pass => prop_assert_eq!(*packet, came),
        }
        let last = self.last_of_flow[packet.flow as usize].replace(packet.serial);
        prop_assert!(last < Some(packet.serial), "a flow keeps its order");
        Ok(())
    }

    /// Whatever was dropped to keep to the bound was the first of its flow.
    fn drop_excess(&mut self, admit: Admit, bounds: &Bounds) -> Result<(), TestCaseError> {
        let mut dropped = 0;
        while let Some(packet) = self.queue.take_dropped() {
            let came = self.waiting.remove(&packet.serial);
            prop_assert_eq!(came, Some(packet));
            dropped += 1;
        }
        prop_assert_eq!(admit == Admit::Overflow, dropped > 0);
        self.counts[2] += dropped;
        prop_assert!(self.queue.bytes() <= bounds.bytes_max);
        let slots = self.queue.slots();
        prop_assert!((0..CLASSES).all(|class| slots[class] <= bounds.slots_max[class]));
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let bytes = self
            .waiting
            .values()
            .map(|packet| packet.bytes)
            .sum::<usize>();
        prop_assert_eq!(self.queue.bytes(), bytes);
        prop_assert_eq!(self.queue.len(), self.waiting.len());
        prop_assert_eq!(self.queue.is_empty(), self.waiting.is_empty());
        for class in 0..CLASSES {
            let held = self.waiting.values().filter(|packet| packet.class == class);
            prop_assert_eq!(self.queue.slots()[class], held.count());
        }
        prop_assert!(self.queue.flows.len() <= FLOWS, "flow state is used again");
        Ok(())
    }
}

proptest! {
    #[test]
    fn packets_are_conserved_in_order_and_the_bounds_hold(
        steps in prop::collection::vec(step(), 0..300),
        mut bounds in bounds(),
    ) {
        let mut checked = Checked::new();
        let mut now = Instant::from_nanos(1);
        for (serial, step) in steps.into_iter().enumerate() {
            match step {
                Step::Push { flow, bytes, class, kind } => {
                    let packet = Toy { serial, flow, bytes, class, kind };
                    checked.waiting.insert(serial, packet);
                    let admit = checked.queue.push(now, flow, packet, &bounds);
                    checked.drop_excess(admit, &bounds)?;
                }
                Step::Pop => {
                    let popped = checked.queue.pop(now);
                    prop_assert_eq!(popped.is_none(), checked.waiting.is_empty());
                    if let Some(Popped { packet, verdict, .. }) = popped {
                        checked.leaves(&packet, verdict)?;
                    }
                }
                Step::PopNew => {
                    if let Some(Popped { packet, verdict, .. }) = checked.queue.pop_new(now) {
                        prop_assert!(packet.bytes <= SEGMENT_BYTES);
                        checked.leaves(&packet, verdict)?;
                    }
                }
                Step::PutBack => {
                    let next = checked.queue.pop(now);
                    if let Some(Popped { packet, verdict, place }) = next {
                        if verdict == Verdict::Drop {
                            checked.leaves(&packet, verdict)?;
                        } else {
                            // It may have been trimmed or marked, which stays.
                            checked.waiting.insert(packet.serial, packet);
                            checked.queue.put_back(place, packet);
                            prop_assert!(checked.queue.is_backlogged());
                        }
                    }
                }
                Step::Wait(nanos) => now = Instant::from_nanos(now.as_nanos() + nanos),
                Step::Bound(new) => {
                    bounds = new;
                    let admit = checked.queue.keep_to(&bounds);
                    checked.drop_excess(admit, &bounds)?;
                }
                Step::Repack => {
                    let class = serial % CLASSES;
                    let mut repacked = 0;
                    checked.queue.repack(|packet| {
                        packet.class = class;
                        repacked += 1;
                    });
                    prop_assert_eq!(repacked, checked.waiting.len());
                    checked.waiting.values_mut().for_each(|packet| packet.class = class);
                    let admit = checked.queue.keep_to(&bounds);
                    checked.drop_excess(admit, &bounds)?;
                }
                Step::Drain => {
                    for packet in checked.queue.drain() {
                        prop_assert_eq!(checked.waiting.remove(&packet.serial), Some(packet));
                    }
                    prop_assert!(checked.waiting.is_empty());
                }
                Step::Release => checked.queue.release_memory(now),
            }
            checked.check()?;
        }
    }

    /// Whatever the signals, what comes first of a flow goes first, and a queue that is emptied gives all.
    #[test]
    fn without_a_bound_nothing_is_lost_but_by_signals(
        packets in prop::collection::vec((0..8_u32, length_and_kind(1..66_000_usize), 0..20_000_000_u64), 1..200),
    ) {
        let mut checked = Checked::new();
        let mut now = Instant::ZERO;
        let bounds = Bounds::of_bytes(usize::MAX);
        for (serial, (flow, (bytes, kind), nanos)) in packets.into_iter().enumerate() {
            let packet = Toy { serial, flow, bytes, class: 0, kind };
            checked.waiting.insert(serial, packet);
            prop_assert_eq!(checked.queue.push(now, flow, packet, &bounds), Admit::Queued);
            now = Instant::from_nanos(now.as_nanos() + nanos);
        }
        while let Some(Popped { packet, verdict, .. }) = checked.queue.pop(now) {
            checked.leaves(&packet, verdict)?;
            now = Instant::from_nanos(now.as_nanos() + 1_000_000);
        }
        prop_assert!(checked.waiting.is_empty());
    }
}

fn toy(flow: u32, bytes: usize) -> Toy {
    Toy {
        serial: 0,
        flow,
        bytes,
        class: 0,
        kind: Kind::Segments(1),
    }
}

const WIDE: Bounds = Bounds::of_bytes(usize::MAX);

#[test]
fn what_does_not_wait_makes_no_flows() {
    let mut queue = EgressQueue::new();
    for turn in 0..100 {
        let now = Instant::from_nanos(turn);
        for flow in 0..16 {
            assert_eq!(queue.push(now, flow, toy(flow, 1500), &WIDE), Admit::Queued);
        }
        let flows: Vec<_> = std::iter::from_fn(|| queue.pop(now))
            .map(|popped| popped.packet.flow)
            .collect();
        assert_eq!(flows, (0..16).collect::<Vec<_>>(), "first in, first out");
    }
    assert_eq!(queue.flows.len(), 0);
}

#[test]
fn flow_state_is_used_again_and_given_back() {
    let mut queue = EgressQueue::new();
    let mut now = Instant::ZERO;
    for flow in 0..10_000 {
        assert_eq!(queue.push(now, flow, toy(flow, 100), &WIDE), Admit::Queued);
        now = Instant::from_nanos(now.as_nanos() + 1000);
        assert_eq!(queue.pop(now).map(|popped| popped.packet.flow), Some(flow));
        assert!(queue.pop(now).is_none());
    }
    assert!((1..=64).contains(&queue.flows.len()));
    queue.release_memory(now);
    assert_ne!(queue.flows.len(), 0, "CoDel remembers for a while");
    queue.release_memory(now + codel::MEMORY);
    assert!(!queue.links.has_memory());
    assert_eq!(queue.flows.len(), 0);
}

#[test]
fn the_fattest_flow_makes_room() {
    let mut queue = EgressQueue::new();
    let bounds = Bounds::of_bytes(100_000);
    for serial in 0..60 {
        let packet = Toy {
            serial,
            ..toy(1, 1500)
        };
        assert_eq!(queue.push(Instant::ZERO, 1, packet, &bounds), Admit::Queued);
    }
    assert_eq!(
        queue.push(Instant::ZERO, 2, toy(2, 10_000), &bounds),
        Admit::Queued
    );
    assert_eq!(
        queue.push(Instant::ZERO, 3, toy(3, 1500), &bounds),
        Admit::Overflow
    );
    let dropped: Vec<_> = std::iter::from_fn(|| queue.take_dropped()).collect();
    assert!(dropped.iter().all(|packet| packet.flow == 1));
    // 101,500 bytes waited; a sixteenth of the bound is free now.
    assert_eq!(dropped.len(), 6);
    assert_eq!(dropped[0].serial, 0, "from the front");
    assert_eq!(queue.bytes(), 92_500);
}

#[test]
fn what_exceeds_the_bound_alone_drops_nobody_else() {
    let mut queue = EgressQueue::new();
    let bounds = Bounds::of_bytes(100);
    assert_eq!(
        queue.push(Instant::ZERO, 1, toy(1, 100), &bounds),
        Admit::Queued
    );
    assert_eq!(
        queue.push(Instant::ZERO, 2, toy(2, 101), &bounds),
        Admit::Overflow
    );
    assert_eq!(queue.take_dropped(), Some(toy(2, 101)));
    assert_eq!((queue.take_dropped(), queue.len()), (None, 1));
}

#[test]
fn a_class_that_is_short_is_freed_by_who_holds_most_of_it() {
    let mut queue = EgressQueue::new();
    let bounds = Bounds {
        bytes_max: usize::MAX,
        slots_max: [10, 3, 0],
    };
    for flow in [1, 2, 2, 3] {
        let packet = Toy {
            class: 1,
            ..toy(flow, 60_000)
        };
        let admit = queue.push(Instant::ZERO, flow, packet, &bounds);
        assert_eq!(admit == Admit::Overflow, flow == 3);
    }
    let small = toy(9, 9000);
    for _ in 0..10 {
        let admit = queue.push(Instant::ZERO, 9, small, &bounds);
        assert_eq!(admit, Admit::Queued, "of the other class");
        if let Some(dropped) = queue.take_dropped() {
            assert_eq!((dropped.flow, dropped.class), (2, 1));
        }
    }
    assert_eq!(queue.slots(), [10, 3, 0]);
}

#[test]
fn a_packet_that_was_put_back_is_overtaken_by_a_new_flow_only() {
    let mut queue = EgressQueue::new();
    let mut now = Instant::ZERO;
    for serial in 0..3 {
        let packet = Toy {
            serial,
            ..toy(1, 60_000)
        };
        assert_eq!(queue.push(now, 1, packet, &WIDE), Admit::Queued);
    }
    let popped = queue.pop(now).expect("a packet");
    assert!(!queue.is_backlogged());
    queue.put_back(popped.place, popped.packet);
    assert!(queue.is_backlogged());
    // Once it has had its turn, it is an old flow.
    let first = queue.pop(now).expect("a packet");
    assert_eq!(first.packet.serial, 0);
    let second = queue.pop(now).expect("a packet");
    queue.put_back(second.place, second.packet);
    now = Instant::from_nanos(1000);
    assert_eq!(queue.push(now, 2, toy(2, 100), &WIDE), Admit::Queued);
    let flows: Vec<_> = std::iter::from_fn(|| queue.pop(now))
        .map(|popped| (popped.packet.flow, popped.packet.serial))
        .collect();
    assert_eq!(flows, [(2, 0), (1, 1), (1, 2)]);
}

#[test]
fn where_others_have_to_wait_a_new_flow_sends_what_it_may_and_no_more() {
    let mut queue = EgressQueue::new();
    for _ in 0..2 {
        assert_eq!(
            queue.push(Instant::ZERO, 1, toy(1, 60_000), &WIDE),
            Admit::Queued
        );
    }
    assert!(queue.pop_new(Instant::ZERO).is_none(), "too long");
    let popped = queue.pop(Instant::ZERO).expect("a packet");
    queue.put_back(popped.place, popped.packet);
    let now = Instant::from_nanos(1000);
    for _ in 0..40 {
        assert_eq!(queue.push(now, 2, toy(2, 100), &WIDE), Admit::Queued);
    }
    let sent = std::iter::from_fn(|| queue.pop_new(now)).inspect(|popped| {
        assert_eq!(popped.packet.flow, 2);
    });
    assert_eq!(sent.count(), SEGMENT_BYTES.div_ceil(100));
    assert_eq!(queue.len(), 2 + 40 - SEGMENT_BYTES.div_ceil(100));
    assert_eq!(queue.pop(now).expect("a packet").packet.flow, 1);
}

#[test]
fn a_packet_that_is_put_back_again_and_again_tells_its_sender_once() {
    let mut queue = EgressQueue::new();
    for serial in 0..3 {
        let packet = Toy {
            serial,
            kind: Kind::Segments(40),
            ..toy(1, 60_000)
        };
        assert_eq!(queue.push(Instant::ZERO, 1, packet, &WIDE), Admit::Queued);
    }
    let mut verdicts = Vec::new();
    for millisecond in 0..500 {
        let now = Instant::from_nanos(millisecond * 1_000_000);
        let popped = queue.pop(now).expect("a packet");
        assert_eq!(popped.packet.serial, 0);
        verdicts.push(popped.verdict);
        queue.put_back(popped.place, popped.packet);
    }
    let told = verdicts.iter().filter(|verdict| **verdict != Verdict::Pass);
    assert_eq!(told.collect::<Vec<_>>(), [&Verdict::Trimmed]);
}

#[test]
fn a_flow_that_comes_back_as_soon_as_it_is_served_starves_nobody() {
    let mut queue = EgressQueue::new();
    let mut now = Instant::ZERO;
    for _ in 0..50 {
        assert_eq!(queue.push(now, 1, toy(1, 1400), &WIDE), Admit::Queued);
    }
    let mut served = [0; 3];
    for _ in 0..60 {
        now = Instant::from_nanos(now.as_nanos() + 1000);
        assert_eq!(queue.push(now, 2, toy(2, 1400), &WIDE), Admit::Queued);
        let popped = queue.pop(now).expect("a packet");
        served[popped.packet.flow as usize] += 1;
    }
    assert!(served[1] >= 25, "{served:?}");
}

#[test]
fn a_drain_that_nobody_finishes_still_empties_the_queue() {
    let mut queue = EgressQueue::new();
    for flow in 0..5 {
        assert_eq!(
            queue.push(Instant::ZERO, flow, toy(flow, 10), &WIDE),
            Admit::Queued
        );
    }
    assert!(queue.drain().next().is_some());
    assert_eq!((queue.len(), queue.bytes()), (0, 0));
}
