//! Packets that surfaced on one worker's TUN queue but belong to a connection of another.

use crate::proto::route_table::ConnectionRef;
use crossbeam_queue::ArrayQueue;
use std::sync::atomic::{AtomicBool, Ordering};

/// Packets that may wait for one worker.
const PACKETS_MAX: usize = 256;

/// A packet in its own memory, since registered memory belongs to one ring.
pub(super) struct Handover {
    pub(super) connection: ConnectionRef,
    pub(super) flow: u32,
    /// `virtio_net_hdr` and packet.
    pub(super) bytes: Vec<u8>,
}

/// A bounded inbox of packets, with the emptied memory on its way back to whoever hands over next.
pub(crate) struct Mailbox {
    packets: ArrayQueue<Handover>,
    emptied: ArrayQueue<Vec<u8>>,
    /// Whether the owner was woken and has not looked yet.
    rung: AtomicBool,
}

/// What became of a packet that was posted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Posted {
    /// In; the owner must be woken.
    Ring,
    /// In; the owner is about to look anyway.
    Quiet,
    /// The inbox is full: the packet is dropped.
    Full,
}

impl Mailbox {
    pub(super) fn new() -> Self {
        Self {
            packets: ArrayQueue::new(PACKETS_MAX),
            emptied: ArrayQueue::new(PACKETS_MAX),
            rung: AtomicBool::new(false),
        }
    }

    /// Copies a packet in.
    pub(super) fn post(&self, connection: ConnectionRef, flow: u32, packet: &[u8]) -> Posted {
        if self.packets.is_full() {
            return Posted::Full;
        }
        let mut bytes = self.emptied.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(packet);
        let handover = Handover {
            connection,
            flow,
            bytes,
        };
        if self.packets.push(handover).is_err() {
            return Posted::Full;
        }
        // AcqRel: the push above happens before the owner's look that this flag promises.
        if self.rung.swap(true, Ordering::AcqRel) {
            Posted::Quiet
        } else {
            Posted::Ring
        }
    }

    /// Called by the owner before it takes: whatever is posted after this rings again.
    pub(super) fn look(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }

    /// The next packet.
    pub(super) fn take(&self) -> Option<Handover> {
        self.packets.pop()
    }

    /// Gives the memory back.
    pub(super) fn give_back(&self, handover: Handover) {
        // Full: the memory is simply freed.
        let _ = self.emptied.push(handover.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFERENCE: ConnectionRef = ConnectionRef {
        worker: 0,
        slot: 1,
        generation: 1,
    };

    #[test]
    fn rings_once_until_looked_at_and_is_bounded() {
        let mailbox = Mailbox::new();
        assert_eq!(mailbox.post(REFERENCE, 1, b"one"), Posted::Ring);
        assert_eq!(mailbox.post(REFERENCE, 1, b"two"), Posted::Quiet);
        mailbox.look();
        let first = mailbox.take().unwrap();
        assert_eq!(first.bytes, b"one");
        mailbox.give_back(first);
        assert_eq!(mailbox.post(REFERENCE, 1, b"3"), Posted::Ring);
        assert_eq!(mailbox.take().unwrap().bytes, b"two");
        assert_eq!(mailbox.take().unwrap().bytes, b"3");
        for _ in 0..PACKETS_MAX {
            assert_ne!(mailbox.post(REFERENCE, 1, b"x"), Posted::Full);
        }
        assert_eq!(mailbox.post(REFERENCE, 1, b"x"), Posted::Full);
    }
}
