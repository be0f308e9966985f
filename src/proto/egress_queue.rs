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
