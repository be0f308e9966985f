//! One TCP+TLS connection as its worker keeps it.

use super::path::Path;
use super::waiting::{LARGE, MEDIUM, Outgoing, SMALL};
use super::{CloseCause, EventPermit};
use crate::proto::budget::EVENTS_PER_CONNECTION_MAX;
use crate::proto::capsule::{Capsule, CloseReason};
use crate::proto::deframer::Deframer;
use crate::proto::egress_queue::EgressQueue;
use crate::proto::http::OffloadHeader;
use crate::proto::offload::Offloads;
use crate::proto::packet;
use crate::proto::route_table::ConnectionRef;
use crate::proto::timer::Instant;
use crate::stats::ConnectionStats;
use crate::tls::AlertDescription;
use crate::tls::record::RecordLayer;
use crate::uring::buffer::{Buffer, InFlight};
use crate::uring::ring::FileSlot;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// A peer that owes an answer, or whose packets have ceased to come, is asked for one after this.
pub const UNANSWERED_AFTER: Duration = Duration::from_secs(1);
/// A silent connection is asked after this.
pub const IDLE_AFTER: Duration = Duration::from_secs(25);
/// After a ping without a pong for this long packets wait, and are not sealed.
pub const WITHHELD_AFTER: Duration = Duration::from_secs(1);
/// A ping without a pong for this long means that the path is dead.
pub const UNRESPONSIVE_AFTER: Duration = Duration::from_secs(3);
/// After this much silence despite pings the connection is given up.
pub const DEAD_AFTER: Duration = Duration::from_secs(60);
/// A connection that was asked to close has this long to flush.
pub const FLUSH_WITHIN: Duration = Duration::from_millis(500);
/// A connection that another one has replaced has this long to deliver what is on its way, in both directions. After an
/// outage TCP may have to wait a second before it tries again.
pub const REPLACED_WITHIN: Duration = Duration::from_secs(5);
/// A connection without traffic for this long gives its buffers back; one that is stuck does while memory is short.
pub const PARK_AFTER: Duration = Duration::from_secs(1);

/// Inner source addresses that a peer may use.
#[derive(Clone, Debug)]
pub enum InnerSources {
    /// Any: the peer is the server.
    Any,
    /// The session's lease.
    Only(Vec<IpAddr>),
}

impl InnerSources {
    /// Whether `packet` may come from the peer.
    #[inline]
    pub fn allow(&self, packet: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Only(addresses) => {
                packet::source(packet).is_some_and(|source| addresses.contains(&source))
            }
        }
    }
}

/// Where the receiving side stands.
pub(super) enum Receive {
    /// Nothing is armed; `spilled` may hold bytes.
    Parked,
    /// Armed without memory: the connection is idle.
    Polling,
    /// A read is parked in the kernel.
    Reading(InFlight),
    /// Ciphertext from `start` on waits, because packet memory is short.
    Stalled { chunk: Buffer, start: usize },
}

/// A write of sealed records.
pub(super) struct Sending {
    pub(super) chunk: InFlight,
    /// Bytes already taken by the socket.
    pub(super) sent: usize,
    /// Bytes in the chunk.
    pub(super) total: usize,
    /// When the socket last took something.
    pub(super) since: Instant,
    /// A cancellation is under way.
    pub(super) recalled: bool,
}

/// What the peer is told when a connection ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Farewell {
    /// By a CLOSE capsule, before the end of the TLS stream.
    pub(super) reason: Option<CloseReason>,
    /// By a fatal alert in place of close_notify (RFC 8446 section 6.2).
    pub(super) alert: Option<AlertDescription>,
}

impl Farewell {
    /// The stream ends in order, without a reason.
    pub(super) const NONE: Self = Self {
        reason: None,
        alert: None,
    };

    pub(super) fn because(reason: Option<CloseReason>) -> Self {
        Self {
            reason,
            ..Self::NONE
        }
    }

    pub(super) fn alert(alert: AlertDescription) -> Self {
        Self {
            alert: Some(alert),
            ..Self::NONE
        }
    }
}

/// Counts the connection's capsules that wait for control.
#[derive(Default)]
pub(super) struct EventPermits(EventPermit);

impl EventPermits {
    /// One more, unless [`EVENTS_PER_CONNECTION_MAX`] wait.
    pub(super) fn take(&self) -> Option<EventPermit> {
        (self.0.count() < EVENTS_PER_CONNECTION_MAX).then(|| self.0.clone())
    }
}

/// How far the end has come.
pub(super) enum Life {
    /// Working.
    Open,
    /// Flushing what is sealed; after the deadline no more.
    Closing {
        cause: CloseCause,
        deadline: Instant,
        /// The stream ends by this fatal alert, and not by close_notify.
        alert: Option<AlertDescription>,
        /// The reason and close_notify, or the alert, are sealed.
        said_goodbye: bool,
        /// What the peer had sent before it knew is still delivered, up to its own close_notify.
        listens: bool,
    },
    /// Shut down; waiting until the kernel has let go of everything.
    Draining { cause: CloseCause },
}

/// Times that the keepalive goes by.
pub(super) struct Clock {
    pub(super) received: Instant,
    pub(super) sent: Instant,
    /// First send after the last receipt.
    pub(super) unanswered_since: Option<Instant>,
    pub(super) pinged: Option<Instant>,
    /// Packets came, and nothing has shown yet that the peer just has no more of them. Who only receives owes no answer
    /// and waits for none, and would not notice otherwise that the path is gone.
    pub(super) flowing: bool,
    /// Whether control was told of the present silence.
    pub(super) reported: bool,
}

/// What the keepalive asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    Ping,
    Report,
    GiveUp,
}

impl Clock {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            received: now,
            sent: now,
            unanswered_since: None,
            pinged: None,
            flowing: false,
            reported: false,
        }
    }

    /// Returns whether control was told of the silence that ends now.
    pub(super) fn on_received(&mut self, now: Instant) -> bool {
        self.received = now;
        self.unanswered_since = None;
        self.pinged = None;
        std::mem::take(&mut self.reported)
    }

    pub(super) fn on_sent(&mut self, now: Instant) {
        self.sent = now;
        self.unanswered_since.get_or_insert(now);
    }

    /// Whether packets had better wait: the peer owes a pong. What is sealed can go by this connection alone.
    pub(super) fn withholds(&self, now: Instant) -> bool {
        self.pinged
            .is_some_and(|pinged| now.since(pinged) >= WITHHELD_AFTER)
    }

    /// What is due, and marks it as done.
    pub(super) fn due(&mut self, now: Instant) -> Due {
        let since = |then: Instant| now.since(then);
        if let Some(pinged) = self.pinged {
            return if since(self.received) >= DEAD_AFTER && since(pinged) >= UNRESPONSIVE_AFTER {
                Due::GiveUp
            } else if !self.reported && since(pinged) >= UNRESPONSIVE_AFTER {
                self.reported = true;
                Due::Report
            } else {
                Due::Nothing
            };
        }
        let unanswered = self
            .unanswered_since
            .is_some_and(|first| since(first) >= UNANSWERED_AFTER);
        let ceased = self.flowing && since(self.received) >= UNANSWERED_AFTER;
        let idle = since(self.received.max(self.sent)) >= IDLE_AFTER;
        if unanswered || ceased || idle {
            self.pinged = Some(now);
            Due::Ping
        } else {
            Due::Nothing
        }
    }
}

/// The state of one connection.
pub(super) struct Connection {
    pub(super) reference: ConnectionRef,
    /// Key of its peer's share of the worker.
    pub(super) peer: usize,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) stats: Arc<ConnectionStats>,
    pub(super) file: FileSlot,
    pub(super) records: RecordLayer,
    pub(super) inner_sources: InnerSources,
    pub(super) offload: Option<OffloadHeader>,
    pub(super) accepts: Offloads,
    pub(super) life: Life,
    pub(super) clock: Clock,
    pub(super) path: Path,
    /// Operations that the kernel still holds.
    pub(super) in_flight: u32,

    // inbound
    pub(super) receive: Receive,
    /// A cancellation of the parked read is under way.
    pub(super) parking: bool,
    /// In the worker's list of connections that wait for memory.
    pub(super) starved: bool,
    /// In the worker's list of connections whose records are put off.
    pub(super) deferred: bool,
    /// When it last brought a packet.
    pub(super) productive: Instant,
    pub(super) events: EventPermits,
    pub(super) deframer: Deframer,
    /// Plaintext of an unfinished capsule.
    pub(super) plaintext: Option<Buffer>,
    /// Ciphertext and plaintext kept outside the pool while parked (short by nature: part of a record, of a capsule).
    pub(super) spilled_ciphertext: Vec<u8>,
    pub(super) spilled_plaintext: Vec<u8>,

    // outbound
    pub(super) queue: EgressQueue<Outgoing>,
    /// Encoded capsules that go ahead of packets.
    pub(super) capsules: Vec<u8>,
    /// Sealed records that wait for the socket.
    pub(super) fill: Option<Buffer>,
    pub(super) sending: Option<Sending>,
    /// Sealed records kept outside the pool, for the socket took nothing. They go before all else.
    pub(super) recalled: Vec<u8>,
    /// Armed for the socket to take something again.
    pub(super) awaits_room: bool,
    /// Enough is under way: a timer runs until the next look.
    pub(super) pausing: bool,
    /// In the worker's list of connections to be pumped.
    pub(super) dirty: bool,
}

impl Connection {
    pub(super) fn is_open(&self) -> bool {
        matches!(self.life, Life::Open)
    }

    /// Bytes that are sealed and that the socket has not taken.
    pub(super) fn ahead_bytes(&self) -> usize {
        let sending = self
            .sending
            .as_ref()
            .map_or(0, |sending| sending.total - sending.sent);
        let fill = self.fill.as_ref().map_or(0, Buffer::filled);
        self.recalled.len() + sending + fill
    }

    /// Whether the peer is a server: the only one, which may use any inner source.
    pub(super) fn is_to_server(&self) -> bool {
        matches!(self.inner_sources, InnerSources::Any)
    }

    /// Chunks that it holds.
    pub(super) fn chunks_held(&self) -> usize {
        let receives = matches!(self.receive, Receive::Reading(_) | Receive::Stalled { .. });
        usize::from(receives)
            + usize::from(self.fill.is_some())
            + usize::from(self.sending.is_some())
    }

    /// Packet slots that it holds: packets that wait, and an unfinished capsule.
    pub(super) fn packets_held(&self) -> usize {
        self.queue.slots()[LARGE] + usize::from(self.plaintext.is_some())
    }

    /// Bytes kept outside the packet memory: parts of records and capsules, and sealed records that could not be sent.
    fn outside_bytes(&self) -> usize {
        self.spilled_ciphertext.capacity()
            + self.spilled_plaintext.capacity()
            + self.recalled.capacity()
    }

    /// Whether packets of the peer are taken.
    pub(super) fn listens(&self) -> bool {
        match self.life {
            Life::Open => true,
            Life::Closing { listens, .. } => listens,
            Life::Draining { .. } => false,
        }
    }

    /// Nothing is to be sealed any more.
    pub(super) fn has_said_goodbye(&self) -> bool {
        matches!(
            self.life,
            Life::Closing {
                said_goodbye: true,
                ..
            } | Life::Draining { .. }
        )
    }

    /// Has a look at the path, if there is anything to send and it is time for one.
    pub(super) fn look_at_path(&mut self, now: Instant) {
        let is_busy = self.sending.is_some() || self.path.is_held_back(now);
        if is_busy || !self.queue.is_empty() {
            self.path.look(self.socket.as_fd(), now, is_busy);
        }
    }

    /// Has the peer asked for an answer.
    pub(super) fn add_ping(&mut self, now: Instant) {
        Capsule::put_ping(now.as_nanos().to_be_bytes(), &mut self.capsules);
    }

    /// Makes known what memory the connection holds.
    pub(super) fn show_held(&self) {
        let held = &self.stats.held;
        let slots = self.queue.slots();
        held.chunks.set(self.chunks_held() as u64);
        held.packets.set(self.packets_held() as u64);
        held.medium_packets.set(slots[MEDIUM] as u64);
        held.small_packets.set(slots[SMALL] as u64);
        held.control_bytes.set(self.capsules.len() as u64);
        held.outside_bytes.set(self.outside_bytes() as u64);
    }

    /// Makes known what waits for the connection, and what is sealed.
    pub(super) fn show_queue(&self) {
        self.stats.queue_packets.set(self.queue.len() as u64);
        self.stats.queue_bytes.set(self.queue.bytes() as u64);
        self.stats.ahead_bytes.set(self.ahead_bytes() as u64);
        self.stats.ahead_bytes_max.set(self.path.ahead_bytes_max());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_nanos(milliseconds * 1_000_000)
    }

    #[test]
    fn unanswered_traffic_is_asked_about_within_a_second_and_reported() {
        let mut clock = Clock::new(at(0));
        clock.on_sent(at(100));
        assert_eq!(clock.due(at(600)), Due::Nothing);
        assert_eq!(clock.due(at(1100)), Due::Ping);
        assert_eq!(clock.due(at(1600)), Due::Nothing);
        assert!(!clock.withholds(at(2000)));
        assert!(clock.withholds(at(2100)));
        assert_eq!(clock.due(at(4100)), Due::Report);
        assert_eq!(clock.due(at(4600)), Due::Nothing);
        assert_eq!(clock.due(at(60_100)), Due::GiveUp);
        assert!(clock.on_received(at(60_200)), "control was told");
        assert!(!clock.on_received(at(60_250)));
        assert_eq!(clock.due(at(60_300)), Due::Nothing);
        assert!(!clock.withholds(at(60_300)));
    }

    #[test]
    fn an_idle_connection_is_asked_every_25_seconds() {
        let mut clock = Clock::new(at(0));
        assert_eq!(clock.due(at(24_999)), Due::Nothing);
        assert_eq!(clock.due(at(25_000)), Due::Ping);
        clock.on_sent(at(25_000));
        clock.on_received(at(25_040));
        assert_eq!(clock.due(at(50_000)), Due::Nothing);
        assert_eq!(clock.due(at(50_040)), Due::Ping);
    }

    #[test]
    fn a_flow_of_packets_that_ceases_is_asked_about_once() {
        let mut clock = Clock::new(at(0));
        clock.on_received(at(100));
        clock.flowing = true;
        assert_eq!(clock.due(at(1000)), Due::Nothing);
        assert_eq!(clock.due(at(1100)), Due::Ping);
        clock.on_received(at(1140));
        clock.flowing = false;
        assert_eq!(clock.due(at(20_000)), Due::Nothing);
        clock.flowing = true;
        assert_eq!(clock.due(at(20_500)), Due::Ping);
        assert_eq!(clock.due(at(23_500)), Due::Report);
    }

    #[test]
    fn answered_traffic_is_not_asked_about() {
        let mut clock = Clock::new(at(0));
        for second in 1..20 {
            clock.on_sent(at(second * 1000));
            clock.on_received(at(second * 1000 + 40));
            assert_eq!(clock.due(at(second * 1000 + 500)), Due::Nothing);
        }
    }
}
