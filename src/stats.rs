//! Counters that one worker writes and anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with a single writer: no locked instruction on the packet path.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the owning worker may call this.
    pub fn add(&self, amount: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
    }

    /// The value, possibly a moment old.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a worker counts.
        #[derive(Debug, Default)]
        pub struct WorkerCounters { $($(#[$doc])* pub $name: Counter,)* }

        impl WorkerCounters {
            /// Names and values, in the order of declaration.
            pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.get())),*].into_iter()
            }
        }
    };
}

counters! {
    /// Packets read from the TUN queue; a super-packet counts once.
    tun_read_packets,
    /// Their bytes, without `virtio_net_hdr`.
    tun_read_bytes,
    /// Packets written to the TUN queue.
    tun_written_packets,
    /// Their bytes, without `virtio_net_hdr`.
    tun_written_bytes,
    /// Packets from the TUN queue that no session takes.
    dropped_no_route,
    /// Packets that an egress queue had no room for.
    dropped_queue_full,
    /// Packets that the other worker's inbox had no room for.
    dropped_handover_full,
    /// Packets from the TUN queue that could not be made to fit the peer.
    dropped_unfit,
    /// Packets of a peer with an invalid header.
    dropped_invalid,
    /// Packets of a peer with a source address that is not its own.
    dropped_spoofed,
    /// Packets that the TUN queue refused.
    dropped_tun_refused,
    /// Datagrams of a context that nobody negotiated, or too long.
    dropped_unknown_context,
    /// Super-packets that the TUN queue refused and that were segmented here instead.
    segmented_after_refusal,
    /// Packets handed over to another worker.
    handed_over,
    /// Turns of the event loop.
    turns,
}
