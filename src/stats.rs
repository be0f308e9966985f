//! Counters that one worker writes and anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A counter with a single writer: no locked instruction on the packet path.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the owning worker may call this.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
    }

    /// The value, possibly a moment old.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A value that goes up and down, with a single writer.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Replaces the value; only the owning worker may call this.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value, possibly a moment old.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters, and their values as they were at one look, from one list of names.
macro_rules! counters {
    (
        $(#[$about:meta])* $live:ident;
        $(#[$about_values:meta])* $values:ident;
        $($(#[$doc:meta])* $name:ident),* $(,)?
    ) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        pub struct $live { $($(#[$doc])* pub $name: Counter,)* }

        impl $live {
            /// All values now. They are read one after the other, while the worker goes on.
            pub fn read(&self) -> $values {
                $values { $($name: self.$name.get(),)* }
            }
        }

        $(#[$about_values])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $values { $($(#[$doc])* pub $name: u64,)* }

        impl $values {
            /// Names and values, in the order of declaration.
            pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }

            /// What was dropped, by reason; reasons without a drop are left out.
            pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                self.entries().filter_map(|(name, value)| {
                    let reason = name.strip_prefix(DROPPED)?;
                    (value > 0).then_some((reason, value))
                })
            }

            /// Adds what another one has counted.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }
        }
    };
}

/// What the names of counters of lost packets begin with; the rest is the reason.
const DROPPED: &str = "dropped_";

counters! {
    /// What a worker counts.
    WorkerCounters;
    /// What a worker has counted.
    WorkerCounts;
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
    /// Packets dropped to tell their senders that they wait too long.
    dropped_codel,
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
    /// Packets that were marked (RFC 3168) to tell their senders that they wait too long.
    signalled_marked,
    /// Super-packets that lost a segment to tell the same.
    signalled_trimmed,
    /// Packets handed over to another worker.
    handed_over,
    /// Control capsules of peers that were not looked at, as too many of the same connection wait for the control thread, or
    /// the peer does not read its answers.
    refused_requests,
    /// PINGs that were not answered, as too many answers wait.
    refused_pings,
    /// Answers to peers that were dropped, as too many wait.
    refused_answers,
    /// Times that a peer above its share of packet memory got no more.
    refused_memory,
    /// Times that packet memory was taken back from the peer that held most.
    reclaimed,
    /// Times that records of a peer were put off, as it had caused more work than its bytes pay for.
    deferred,
    /// Connections that ended because the peer broke the protocol.
    ended_misbehaved,
    /// Turns of the event loop.
    turns,
}

counters! {
    /// What the owning worker counts of one connection.
    ConnectionCounters;
    /// What was counted of one connection.
    ConnectionCounts;
    /// Packets sealed for the peer; a super-packet counts once, also where it had to be segmented.
    sent_packets,
    /// Their bytes, as IP packets.
    sent_bytes,
    /// Those of them that became a further segment of the packet before, in a super-packet of UDP. The peer receives so many
    /// packets less.
    gathered_packets,
    /// Bytes that the socket took: TLS records.
    sent_stream_bytes,
    /// Packets of the peer that went to the TUN queue; a super-packet counts once.
    received_packets,
    /// Their bytes, as IP packets.
    received_bytes,
    /// Bytes that the socket gave: TLS records.
    received_stream_bytes,
    /// Packets that its egress queue, or packet memory while it was backed up, had no room for.
    dropped_queue_full,
    /// Packets dropped to tell their senders that they wait too long.
    dropped_codel,
    /// Packets that were marked (RFC 3168) to tell the same.
    signalled_marked,
    /// Super-packets that lost a segment to tell the same.
    signalled_trimmed,
    /// Packets that could not be made to fit the peer.
    dropped_unfit,
    /// Packets of the peer with an invalid header.
    dropped_invalid,
    /// Packets of the peer with a source address that is not its own.
    dropped_spoofed,
    /// Datagrams of a context that nobody negotiated, or too long.
    dropped_unknown_context,
    /// Control capsules that were not looked at: too many wait for the control thread, or the peer does not read its answers.
    refused_requests,
    /// PINGs that were not answered, as too many answers wait.
    refused_pings,
    /// Answers that were dropped, as too many wait.
    refused_answers,
    /// Times that it got no packet memory, as its peer held more than a share.
    refused_memory,
    /// Times that packet memory was taken back, as its peer held most.
    reclaimed,
    /// Times that its records were put off, as its peer had caused more work than its bytes pay for.
    deferred,
}

/// One worker's packet memory: whether it is registered, and what of it is handed out. The latter is told at every tick of the
/// worker's housekeeping, not at every turn.
#[derive(Debug, Default)]
pub struct PacketMemory {
    /// 1 when it is registered with the ring; until then, and where RLIMIT_MEMLOCK does not allow it, reads and writes are plain.
    pub registered: Gauge,
    /// Buffers for ciphertext.
    pub chunks: Gauge,
    /// Buffers for packets and plaintext.
    pub packets: Gauge,
    /// Buffers for packets of a few segments that wait.
    pub medium_packets: Gauge,
    /// Buffers for small packets that wait.
    pub small_packets: Gauge,
}

/// Memory that one connection holds; told at every tick of the worker's housekeeping.
#[derive(Debug, Default)]
pub struct HeldMemory {
    /// Buffers for ciphertext.
    pub chunks: Gauge,
    /// Buffers for packets that wait and for an unfinished capsule.
    pub packets: Gauge,
    /// Buffers for packets of a few segments that wait.
    pub medium_packets: Gauge,
    /// Buffers for small packets that wait.
    pub small_packets: Gauge,
    /// Bytes of control capsules that wait to be sent.
    pub control_bytes: Gauge,
    /// Bytes outside the packet memory: parts of records and capsules, and sealed records that the socket does not take.
    pub outside_bytes: Gauge,
}

/// What is known of one connection while it lasts. Aligned, so that no two workers write to one cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ConnectionStats {
    /// What adds up.
    pub counters: ConnectionCounters,
    /// Packets that wait in the egress queue.
    pub queue_packets: Gauge,
    /// Their bytes, `virtio_net_hdr` included.
    pub queue_bytes: Gauge,
    /// Bytes that are sealed and that the socket has not taken.
    pub ahead_bytes: Gauge,
    /// How many of them there may be, and as many again unsent in the socket, if the path is slow.
    pub ahead_bytes_max: Gauge,
    /// When the socket last gave something, in nanoseconds since the worker's start.
    pub received_at_nanos: Gauge,
    /// Memory that it holds.
    pub held: HeldMemory,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_told_by_reason_and_only_where_there_are_any() {
        let counters = WorkerCounters::default();
        counters.tun_read_packets.add(7);
        counters.dropped_spoofed.add(2);
        counters.dropped_spoofed.add(1);
        let counts = counters.read();
        assert_eq!(counts.tun_read_packets, 7);
        assert_eq!(counts.drops().collect::<Vec<_>>(), [("spoofed", 3)]);
        assert_eq!(counts.entries().map(|(_, value)| value).sum::<u64>(), 10);
    }

    #[test]
    fn counts_of_another_version_can_be_read() {
        let counts: WorkerCounts =
            serde_json::from_str(r#"{"turns":3,"of_a_later_version":1}"#).expect("readable");
        let expected = WorkerCounts {
            turns: 3,
            ..WorkerCounts::default()
        };
        assert_eq!(counts, expected);
    }
}
