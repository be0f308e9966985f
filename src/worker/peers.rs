//! Who has connections on this worker, and what each peer holds of it.

use super::connection::{Connection, Receive};
use super::event_loop::Worker;
use crate::proto::budget::{PeerId, Supply, WorkBucket};
use crate::proto::timer::Instant;
use crate::uring::buffer::Class;
use crate::uring::token::{Operation, Token};
use slab::Slab;
use std::collections::HashMap;
use std::time::Duration;

/// How long the number of peers that hold memory is taken to be the same. It is counted only while memory is short.
const HOLDERS_FOR: Duration = Duration::from_millis(1);
/// Memory is taken back from a peer no more often than this.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(1);
/// A write that the socket has taken nothing of for this long is recalled from the peer that holds most.
const STUCK_AFTER: Duration = Duration::from_millis(50);
/// Connections of the peer that holds most whose memory is taken back at once.
const RECLAIM_MAX: usize = 4;

/// One peer's part of this worker.
pub(super) struct PeerShare {
    peer: PeerId,
    /// Slots of its connections, closing ones included.
    connections: Vec<u32>,
    pub(super) work: WorkBucket,
}

/// The peers that have connections on this worker.
pub(super) struct Peers {
    shares: Slab<PeerShare>,
    by_id: HashMap<PeerId, usize>,
    /// How many of them hold chunks and packet slots, and when they were counted.
    holders: (Instant, [usize; 2]),
    /// The peer that was active since records that were put off were looked at, and whether another one was besides.
    active: Option<usize>,
    is_contended: bool,
    /// Memory was refused to a peer that is within its share: some has to be taken back.
    pub(super) wants_reclaim: bool,
    reclaimed: Instant,
}

impl Peers {
    pub(super) fn new() -> Self {
        Self {
            shares: Slab::new(),
            by_id: HashMap::new(),
            holders: (Instant::ZERO, [1; 2]),
            active: None,
            is_contended: false,
            wants_reclaim: false,
            reclaimed: Instant::ZERO,
        }
    }

    /// Notes a connection of a peer; returns the key of the peer's share.
    pub(super) fn join(&mut self, peer: PeerId, slot: u32, now: Instant) -> usize {
        let shares = &mut self.shares;
        let key = *self.by_id.entry(peer).or_insert_with(|| {
            shares.insert(PeerShare {
                peer,
                connections: Vec::new(),
                work: WorkBucket::new(now),
            })
        });
        self.shares[key].connections.push(slot);
        key
    }

    /// The connection is gone, and with the peer's last one its share.
    pub(super) fn leave(&mut self, key: usize, slot: u32) {
        let Some(share) = self.shares.get_mut(key) else {
            return;
        };
        share.connections.retain(|other| *other != slot);
        if share.connections.is_empty() {
            self.by_id.remove(&share.peer);
            self.shares.remove(key);
        }
    }

    /// A connection of the peer has received or sent something.
    #[inline]
    pub(super) fn note_active(&mut self, key: usize) {
        self.is_contended |= self.active.replace(key).is_some_and(|other| other != key);
    }

    /// Whether more than one peer was active since the last call.
    pub(super) fn take_contended(&mut self) -> bool {
        self.active = None;
        std::mem::take(&mut self.is_contended)
    }

    pub(super) fn get_mut(&mut self, key: usize) -> &mut PeerShare {
        &mut self.shares[key]
    }
}

/// Slots of a class that a connection holds beside what is on its way through within this turn.
fn held_by(connection: &Connection, class: Class) -> usize {
    match class {
        Class::Chunk => connection.chunks_held(),
        _ => connection.packets_held(),
    }
}

/// Where the number of holders of a class is kept.
fn index_of(class: Class) -> usize {
    usize::from(class != Class::Chunk)
}

/// The peer's connections that are in their slots.
fn connections_of<'c>(
    share: &PeerShare,
    connections: &'c [Option<Box<Connection>>],
) -> impl Iterator<Item = &'c Connection> {
    let slots = share.connections.iter();
    slots.filter_map(|slot| connections.get(*slot as usize)?.as_deref())
}

impl Worker {
    /// Slots of a class that the connection's peer holds. The connection may be taken out of its slot.
    fn held_by_peer(&self, connection: &Connection, class: Class) -> usize {
        let share = &self.peers.shares[connection.peer];
        let others = connections_of(share, &self.connections).map(|other| held_by(other, class));
        let is_out = self
            .connections
            .get(connection.reference.slot as usize)
            .is_none_or(Option::is_none);
        let own = if is_out {
            held_by(connection, class)
        } else {
            0
        };
        own + others.sum::<usize>()
    }

    /// Connections of the connection's peer whose queues are backlogged, itself included.
    pub(super) fn backlogged_of_peer(&self, connection: &Connection) -> usize {
        let share = &self.peers.shares[connection.peer];
        let others = connections_of(share, &self.connections)
            .filter(|other| other.reference != connection.reference && other.queue.is_backlogged());
        others.count() + 1
    }

    fn holders(&mut self, class: Class) -> usize {
        if self.now.since(self.peers.holders.0) >= HOLDERS_FOR {
            let count = |class| {
                let holds = |share: &PeerShare| {
                    connections_of(share, &self.connections)
                        .any(|connection| held_by(connection, class) > 0)
                };
                let holders = self.peers.shares.iter();
                holders.filter(|(_, share)| holds(share)).count()
            };
            self.peers.holders = (self.now, [count(Class::Chunk), count(Class::Packet)]);
        }
        // Whoever asks holds some, or is about to.
        self.peers.holders.1[index_of(class)].max(1)
    }

    /// What there is of a class of memory, and what of it the connection's peer holds.
    fn supply(&mut self, connection: &Connection, class: Class) -> Supply {
        let slots = self.pool.slots(class);
        let supply = Supply {
            slots,
            free: self.pool.free(class),
            short_below: self.short_below(class),
            held: 0,
            holders: 1,
        };
        if supply.free >= supply.short_below {
            return supply; // Nobody counts then.
        }
        Supply {
            held: self.held_by_peer(connection, class),
            holders: self.holders(class),
            ..supply
        }
    }

    /// Whether the connection's peer may hold one slot more of a class. Where one within its share finds none, those that
    /// hold most give back some.
    pub(super) fn may_take(&mut self, connection: &Connection, class: Class) -> bool {
        let supply = self.supply(connection, class);
        if supply.may_take() {
            return true;
        }
        if supply.free > 0 {
            self.counters.refused_memory.add(1);
            connection.stats.counters.refused_memory.add(1);
        } else {
            self.peers.wants_reclaim = true;
        }
        false
    }

    /// Whether the connection's peer holds more than its share of chunks or packet slots while others need them.
    pub(super) fn must_give_back(&mut self, connection: &Connection) -> bool {
        [Class::Chunk, Class::Packet]
            .into_iter()
            .any(|class| self.supply(connection, class).must_give_back())
    }

    /// Has the peer that holds most chunks give back what does no work: where somebody within a share found none.
    pub(super) fn reclaim(&mut self) {
        let is_due = self.now.since(self.peers.reclaimed) >= RECLAIM_INTERVAL;
        if !std::mem::take(&mut self.peers.wants_reclaim) || !is_due {
            return;
        }
        self.peers.reclaimed = self.now;
        let held = |share: &PeerShare| {
            let connections = connections_of(share, &self.connections);
            connections.map(Connection::chunks_held).sum::<usize>()
        };
        let shares = self.peers.shares.iter();
        let greediest = shares.max_by_key(|(_, share)| (held(share), share.peer));
        let Some((_, share)) = greediest else {
            return;
        };
        let mut holders: Vec<&Connection> = connections_of(share, &self.connections)
            .filter(|connection| connection.chunks_held() > 0)
            .collect();
        // Those first that have been of least use.
        holders.sort_by_key(|connection| connection.productive);
        holders.truncate(RECLAIM_MAX);
        let slots: Vec<u32> = holders
            .iter()
            .map(|connection| connection.reference.slot)
            .collect();
        for slot in slots {
            self.take_back(slot as usize);
        }
    }

    /// Frees what memory of a connection can be freed without losing anything.
    fn take_back(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        connection.stats.counters.reclaimed.add(1);
        let mut rest = None;
        match std::mem::replace(&mut connection.receive, Receive::Parked) {
            Receive::Stalled { mut chunk, start } => {
                chunk.discard_front(start);
                connection
                    .spilled_ciphertext
                    .extend_from_slice(chunk.bytes());
                rest = Some(chunk);
            }
            receive => connection.receive = receive,
        }
        self.counters.reclaimed.add(1);
        if let Some(chunk) = rest {
            self.release_receive_chunk(chunk);
        }
        self.cancel_read(slot);
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if let Some(sending) = &mut connection.sending
            && !sending.recalled
            && now.since(sending.since) >= STUCK_AFTER
        {
            sending.recalled = true;
            self.cancel(slot, Operation::ConnectionWrite);
        }
    }

    /// Has a parked read come back, if there is one; what it had read is kept outside the pool then.
    pub(super) fn cancel_read(&mut self, slot: usize) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if !connection.parking && matches!(connection.receive, Receive::Reading(_)) {
            connection.parking = true;
            self.cancel(slot, Operation::ConnectionRead);
        }
    }

    /// Cancels an operation of a connection.
    pub(super) fn cancel(&mut self, slot: usize, operation: Operation) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        connection.in_flight += 1;
        let generation = connection.reference.generation;
        let token = |operation| Token::new(operation, slot as u32, generation);
        self.ring.cancel(token(operation), token(Operation::Cancel));
    }
}
