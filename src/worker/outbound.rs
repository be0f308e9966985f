//! The beginning of the way out, in the order that a packet takes: from the TUN queue into its connection's queue.

use super::WorkerError;
use super::event_loop::{TUN, Worker};
use super::handover::{Handover, Posted};
use super::waiting::Outgoing;
use crate::proto::flow_hash::flow_hash;
use crate::proto::offload::VIRTIO_NET_HDR_BYTES;
use crate::proto::packet::{self, PROTOCOL_TCP};
use crate::proto::route_table::ConnectionRef;
use crate::proto::sparse_flows::Kind;
use crate::uring::buffer::{Class, HEADROOM_BYTES, MEDIUM_SLOT_BYTES, SMALL_SLOT_BYTES};
use crate::uring::ring::{Completion, WhenDry};
use crate::uring::token::{Operation, Token};
use nix::errno::Errno;

/// Reads of the TUN queue that are submitted at once.
const TUN_BATCH_MAX: usize = 8;
/// What one read may bring: the header and the largest IP packet.
const TUN_READ_BYTES: usize = VIRTIO_NET_HDR_BYTES + 65535;
/// Packet slots that reading the TUN queue leaves to the inbound side.
const INBOUND_RESERVE_SLOTS: usize = 4;

impl Worker {
    /// Step 1: asks the TUN queue for packets, unless a batch is still under way.
    pub(super) fn read_tun(&mut self) {
        if !self.tun.reads.is_empty() {
            return;
        }
        if self.tun.dry {
            if !self.tun.polling {
                self.tun.polling = true;
                self.ring.poll_input(TUN, Token::single(Operation::TunPoll));
            }
            return;
        }
        let free = self.pool.free(Class::Packet);
        let free = free.saturating_sub(INBOUND_RESERVE_SLOTS).max(1);
        let batch = self.tun.batch.min(free);
        self.tun.yielded = 0;
        for left in (0..batch).rev() {
            let Some(buffer) = self.pool.take(Class::Packet) else {
                break;
            };
            let when_dry = match (self.tun.nowait, left) {
                (true, _) => WhenDry::Fail,
                (false, 0) => WhenDry::Wait,
                (false, _) => WhenDry::WaitInTurn,
            };
            let entry = self.tun.reads.vacant_entry();
            let token = Token::new(Operation::TunRead, entry.key() as u32, 0);
            let range = HEADROOM_BYTES..HEADROOM_BYTES + TUN_READ_BYTES;
            entry.insert(self.ring.read(TUN, buffer, range, when_dry, token));
        }
    }

    pub(super) fn on_tun_read(&mut self, completion: Completion) -> Result<(), WorkerError> {
        let in_flight = self.tun.reads.remove(completion.token.slot as usize);
        let mut buffer = in_flight.land(&completion);
        match completion.result() {
            Ok(bytes) if bytes > VIRTIO_NET_HDR_BYTES => {
                self.tun.yielded += 1;
                buffer.set_filled(HEADROOM_BYTES + bytes);
                self.counters.tun_read_packets.add(1);
                self.counters
                    .tun_read_bytes
                    .add((bytes - VIRTIO_NET_HDR_BYTES) as u64);
                self.route(Outgoing {
                    buffer,
                    start: HEADROOM_BYTES,
                });
            }
            Ok(_) => self.pool.release(buffer),
            Err(error) => {
                self.pool.release(buffer);
                match error {
                    Errno::EAGAIN => self.tun.dry = true,
                    Errno::EINTR | Errno::ECANCELED => {}
                    Errno::EBADFD | Errno::ENODEV | Errno::EIO | Errno::EBADF => {
                        return Err(WorkerError::TunGone);
                    }
                    error => {
                        tracing::warn!("reading the tunnel interface: {error}");
                        self.tun.dry = true;
                    }
                }
            }
        }
        if self.tun.reads.is_empty() {
            self.tun.batch = if self.tun.dry {
                (self.tun.yielded + 1).min(TUN_BATCH_MAX)
            } else {
                (self.tun.batch * 2).min(TUN_BATCH_MAX)
            };
        }
        Ok(())
    }

    /// Step 2: finds the connection.
    fn route(&mut self, outgoing: Outgoing) {
        let packet = outgoing.packet();
        let flow = flow_hash(packet);
        let route =
            packet::destination(packet).and_then(|destination| self.routes.route(destination));
        // Counted before there is a connection for sparse flows, too, or what flows when it comes would begin anew.
        let kind = self.sparse_flows.sends(self.now, flow, packet.len());
        let is_own = |connection: ConnectionRef| usize::from(connection.worker) == self.index;
        let connection = route.and_then(|route| {
            let (sparse, other) = (route.sparse(), route.connection(flow)?);
            // What is received leads a flow to the worker of its connection. What is never answered would be handed over for
            // good. TCP is always answered.
            let stays = |sparse| {
                kind == Kind::Unanswered && is_own(sparse) && !is_own(other) && !is_tcp(packet)
            };
            let sparse = sparse.filter(|sparse| kind == Kind::Sparse || stays(*sparse));
            Some(sparse.unwrap_or(other))
        });
        self.forward(connection, flow, outgoing);
    }

    fn forward(&mut self, connection: Option<ConnectionRef>, flow: u32, outgoing: Outgoing) {
        let Some(connection) = connection else {
            self.counters.dropped_no_route.add(1);
            self.pool.release(outgoing.buffer);
            return;
        };
        if usize::from(connection.worker) == self.index {
            self.enqueue(connection, flow, outgoing);
        } else {
            self.hand_over(connection, flow, outgoing);
        }
    }

    /// Step 2 once more for what waits for a connection that is not to have it any longer.
    pub(super) fn send_elsewhere(&mut self, slot: usize) {
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        while let Some(popped) = connection.queue.pop(self.now) {
            if let Some(outgoing) = self.heed(&connection, popped.verdict, popped.packet) {
                self.route_again(outgoing);
            }
        }
        self.put_back(slot, connection);
    }

    fn route_again(&mut self, outgoing: Outgoing) {
        let packet = outgoing.packet();
        let flow = flow_hash(packet);
        let connection = packet::destination(packet)
            .and_then(|destination| self.routes.lookup(destination, flow));
        self.forward(connection, flow, outgoing);
    }

    fn hand_over(&mut self, connection: ConnectionRef, flow: u32, outgoing: Outgoing) {
        let mailbox = &self.inlets[usize::from(connection.worker)].mailbox;
        match mailbox.post(connection, flow, outgoing.bytes()) {
            Posted::Full => self.counters.dropped_handover_full.add(1),
            Posted::Quiet => self.counters.handed_over.add(1),
            Posted::Ring => {
                self.counters.handed_over.add(1);
                self.ring.wake(
                    Self::peer_bell(connection.worker),
                    Token::single(Operation::WakePeer),
                );
            }
        }
        self.pool.release(outgoing.buffer);
    }

    /// A packet from another worker.
    pub(super) fn take_over(&mut self, handover: &Handover) {
        let bytes = HEADROOM_BYTES + handover.bytes.len();
        let class = if bytes <= SMALL_SLOT_BYTES {
            Class::Small
        } else if bytes <= MEDIUM_SLOT_BYTES {
            Class::Medium
        } else {
            Class::Packet
        };
        let buffer = if self.is_short_of(class) {
            None
        } else {
            self.pool.take(class)
        };
        let Some(mut buffer) = buffer else {
            self.counters.dropped_queue_full.add(1);
            return;
        };
        buffer.set_filled(HEADROOM_BYTES);
        buffer.append(&handover.bytes);
        let outgoing = Outgoing {
            buffer,
            start: HEADROOM_BYTES,
        };
        self.enqueue(handover.connection, handover.flow, outgoing);
    }

    /// Step 3: waits in the connection's queue.
    fn enqueue(&mut self, reference: ConnectionRef, flow: u32, outgoing: Outgoing) {
        let Some(slot) = self.slot_of(reference) else {
            self.counters.dropped_no_route.add(1);
            self.pool.release(outgoing.buffer);
            return;
        };
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        self.admit(&mut connection, flow, outgoing);
        self.put_back(slot, connection);
        self.mark_dirty(slot);
    }
}

fn is_tcp(packet: &[u8]) -> bool {
    packet::parse(packet).is_ok_and(|headers| headers.protocol == PROTOCOL_TCP)
}
