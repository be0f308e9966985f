//! The queue between TUN and a connection.
//!
//! Packets wait here, and not in the kernel, while the connection takes no more, so that what to delay and what to drop
//! is decided here. For now that is one first-in first-out queue with a bound in bytes. The interface is the one that
//! flow queueing with CoDel (RFC 8290) needs: each packet comes with its flow and its length, and both ends are told
//! the time.

use std::collections::VecDeque;

use super::timer::Instant;

/// What became of a packet.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a dropped packet's buffer has to be given back"]
pub enum Admit<P> {
    /// It waits.
    Queued,
    /// There was no room, and this packet had to go: not necessarily the one that came.
    Dropped(P),
}

/// A queue of packets, bounded in bytes. `P` is whatever owns a packet's bytes.
///
/// `bytes` is the sum of the lengths of what waits, and never above `bytes_max`.
#[derive(Debug)]
pub struct EgressQueue<P> {
    packets: VecDeque<Waiting<P>>,
    bytes: usize,
    bytes_max: usize,
}

#[derive(Debug)]
struct Waiting<P> {
    bytes: usize,
    packet: P,
}

impl<P> EgressQueue<P> {
    /// An empty queue that holds at most `bytes_max` bytes. It allocates nothing before the first packet.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            packets: VecDeque::new(),
            bytes: 0,
            bytes_max,
        }
    }

    /// Takes a packet of `bytes` bytes in. A longer one than the bound is always dropped.
    #[inline]
    pub fn push(&mut self, _now: Instant, _flow: u32, bytes: usize, packet: P) -> Admit<P> {
        if bytes > self.bytes_max - self.bytes {
            return Admit::Dropped(packet);
        }
        self.bytes += bytes;
        self.packets.push_back(Waiting { bytes, packet });
        Admit::Queued
    }

    /// Takes out the packet whose turn it is.
    #[inline]
    pub fn pop(&mut self, _now: Instant) -> Option<P> {
        let Waiting { bytes, packet } = self.packets.pop_front()?;
        self.bytes -= bytes;
        Some(packet)
    }

    /// Takes out everything, in the order in which it would have been sent.
    pub fn drain(&mut self) -> impl Iterator<Item = P> + '_ {
        self.bytes = 0;
        self.packets.drain(..).map(|waiting| waiting.packet)
    }

    /// How many bytes wait.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many packets wait.
    #[inline]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const NOW: Instant = Instant::from_nanos(0);

    /// The bytes of each packet pushed, or a pop, or a drain.
    #[derive(Clone, Debug)]
    enum Step {
        Push { flow: u32, bytes: usize },
        Pop,
        Drain,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..8_u32, 1..3000_usize).prop_map(|(flow, bytes)| Step::Push { flow, bytes }),
            3 => Just(Step::Pop),
            1 => Just(Step::Drain),
        ]
    }

    proptest! {
        #[test]
        fn packets_are_conserved_in_order_and_the_bound_holds(
            steps in prop::collection::vec(step(), 0..200),
            bytes_max in 0..20_000_usize,
        ) {
            let mut queue = EgressQueue::new(bytes_max);
            // Packets are (serial number, flow, bytes).
            let (mut waiting, mut gone) = (HashSet::new(), Vec::new());
            let mut last_of_flow = [None; 8];
            for (serial, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Push { flow, bytes } => {
                        let packet = (serial, flow, bytes);
                        waiting.insert(packet);
                        if let Admit::Dropped(victim) = queue.push(NOW, flow, bytes, packet) {
                            prop_assert!(waiting.remove(&victim), "neither twice nor from nowhere");
                            prop_assert!(queue.bytes() + bytes > bytes_max, "there was room");
                        }
                    }
                    Step::Pop => {
                        let popped = queue.pop(NOW);
                        prop_assert_eq!(popped.is_none(), waiting.is_empty());
                        gone.extend(popped);
                    }
                    Step::Drain => {
                        gone.extend(queue.drain());
                        prop_assert!(queue.is_empty());
                    }
                }
                for packet in gone.drain(..) {
                    prop_assert!(waiting.remove(&packet), "neither twice nor from nowhere");
                    let last = last_of_flow[packet.1 as usize].replace(packet.0);
                    prop_assert!(last < Some(packet.0), "a flow keeps its order");
                }
                prop_assert!(queue.bytes() <= bytes_max);
                prop_assert_eq!(queue.bytes(), waiting.iter().map(|packet| packet.2).sum::<usize>());
                prop_assert_eq!(queue.len(), waiting.len());
                prop_assert_eq!(queue.is_empty(), waiting.is_empty());
            }
        }
    }

    #[test]
    fn the_bound_can_be_reached_exactly() {
        let mut queue = EgressQueue::new(100);
        assert_eq!(queue.push(NOW, 1, 60, "a"), Admit::Queued);
        assert_eq!(queue.push(NOW, 1, 40, "b"), Admit::Queued);
        assert_eq!(queue.push(NOW, 2, 1, "c"), Admit::Dropped("c"));
        assert_eq!(queue.pop(NOW), Some("a"));
        assert_eq!(queue.push(NOW, 2, 61, "d"), Admit::Dropped("d"));
        assert_eq!(queue.push(NOW, 2, 60, "e"), Admit::Queued);
        assert_eq!(queue.drain().collect::<Vec<_>>(), ["b", "e"]);
        assert_eq!(queue.bytes(), 0);
    }

    #[test]
    fn a_drain_that_nobody_finishes_still_empties_the_queue() {
        let mut queue = EgressQueue::new(100);
        for packet in 0..5 {
            assert_eq!(queue.push(NOW, 0, 10, packet), Admit::Queued);
        }
        assert_eq!(queue.drain().next(), Some(0));
        assert_eq!((queue.len(), queue.bytes()), (0, 0));
    }
}
