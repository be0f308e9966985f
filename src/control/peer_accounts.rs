//! What a server keeps of each peer beside its session: the number by which workers know the peer, connections that are
//! closing, and what was counted on connections that have ended.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use super::log_limit::LogLimit;
use crate::proto::budget::{CONNECTIONS_PER_PEER_MAX, PeerId};
use crate::proto::route_table::ConnectionRef;
use crate::stats::ConnectionCounts;
use crate::worker::CloseCause;

/// How connections of a peer have ended, by what ended them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// The peer, by close_notify or a TLS alert.
    pub closed: u64,
    /// The path or the peer's host: reset, end without close_notify, silence, an error of the socket.
    pub lost: u64,
    /// The peer broke the protocol.
    pub misbehaved: u64,
    /// This side: replaced, superseded, revoked, too many.
    pub replaced: u64,
}

impl Ended {
    fn count(&mut self, cause: &CloseCause) {
        let counter = match cause {
            CloseCause::PeerClosed | CloseCause::Alerted(_) => &mut self.closed,
            CloseCause::Truncated
            | CloseCause::Reset
            | CloseCause::TimedOut
            | CloseCause::Failed(_) => &mut self.lost,
            CloseCause::Misbehaved(_) => &mut self.misbehaved,
            CloseCause::Asked => &mut self.replaced,
        };
        *counter += 1;
    }
}

/// A connection of a peer between its token and its hand-over to a worker; dropping it ends that time.
#[derive(Debug)]
pub struct Connecting {
    _of_peer: Rc<()>,
}

/// One peer's account.
#[derive(Debug)]
pub struct Account {
    id: PeerId,
    /// Cloned for each connection that is connecting.
    connecting: Rc<()>,
    /// Connections of it that are closing, oldest first.
    closing: VecDeque<ConnectionRef>,
    past: ConnectionCounts,
    ended: Ended,
    log: LogLimit,
}

impl Account {
    /// The number by which workers know the peer.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// How many connections are closing.
    pub fn closing(&self) -> usize {
        self.closing.len()
    }

    /// What was counted on connections that have ended.
    pub fn past(&self) -> &ConnectionCounts {
        &self.past
    }

    /// How they have ended.
    pub fn ended(&self) -> Ended {
        self.ended
    }
}

/// All accounts: one for each peer that was ever connected and is still invited.
#[derive(Debug, Default)]
pub struct Accounts {
    by_peer: HashMap<String, Account>,
    /// Whose the closing connections are.
    closing: HashMap<ConnectionRef, String>,
    last_id: u32,
}

impl Accounts {
    /// The peer's account, opened now if there is none.
    pub fn of(&mut self, peer: &str) -> &mut Account {
        if !self.by_peer.contains_key(peer) {
            self.last_id = self.last_id.wrapping_add(1);
        }
        let id = PeerId(self.last_id);
        self.by_peer
            .entry(peer.to_owned())
            .or_insert_with(|| Account {
                id,
                connecting: Rc::default(),
                closing: VecDeque::new(),
                past: ConnectionCounts::default(),
                ended: Ended::default(),
                log: LogLimit::of_peer(),
            })
    }

    /// A connection of the peer has shown its token. None if [`CONNECTIONS_PER_PEER_MAX`] have that are no tunnels yet: they
    /// are not evicted, and must not keep others out.
    pub fn begin(&mut self, peer: &str) -> Option<Connecting> {
        let of_peer = &self.of(peer).connecting;
        let is_free = Rc::strong_count(of_peer) <= CONNECTIONS_PER_PEER_MAX;
        is_free.then(|| Connecting {
            _of_peer: Rc::clone(of_peer),
        })
    }

    /// The peer's account, if there is one.
    pub fn get(&self, peer: &str) -> Option<&Account> {
        self.by_peer.get(peer)
    }

    /// A connection of the peer begins to close, beside `open` ones. Returns those that have to end at once, as the peer has
    /// more than [`CONNECTIONS_PER_PEER_MAX`]: the oldest of the closing ones.
    #[must_use = "they would stay"]
    pub fn closes(
        &mut self,
        peer: &str,
        connection: ConnectionRef,
        open: usize,
    ) -> Vec<ConnectionRef> {
        self.closing.insert(connection, peer.to_owned());
        let closing = &mut self.of(peer).closing;
        closing.push_back(connection);
        let too_many = (open + closing.len()).saturating_sub(CONNECTIONS_PER_PEER_MAX);
        closing.drain(..too_many.min(closing.len())).collect()
    }

    /// A connection is gone. `peer` is its peer, unless it was closing: then its account is found here.
    pub fn ended(
        &mut self,
        connection: ConnectionRef,
        peer: Option<&str>,
        counts: &ConnectionCounts,
        cause: &CloseCause,
    ) {
        let closing = self.closing.remove(&connection);
        let Some(peer) = peer.or(closing.as_deref()) else {
            return;
        };
        // Who is no longer invited has none.
        let Some(account) = self.by_peer.get_mut(peer) else {
            return;
        };
        account.closing.retain(|other| *other != connection);
        account.past.add(counts);
        account.ended.count(cause);
    }

    /// The peer is no longer invited.
    pub fn forget(&mut self, peer: &str) {
        self.by_peer.remove(peer);
    }

    /// Whether one more line about the peer may be logged, and how many were left out before it.
    pub fn may_log(&mut self, peer: &str, now: Instant) -> Option<u64> {
        match self.by_peer.get_mut(peer) {
            Some(account) => account.log.event(now).map(|events| events - 1),
            None => Some(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(slot: u32) -> ConnectionRef {
        ConnectionRef {
            worker: 0,
            slot,
            generation: 1,
        }
    }

    #[test]
    fn closing_connections_count_and_the_oldest_go() {
        let mut accounts = Accounts::default();
        let open = 17;
        let mut gone = Vec::new();
        for slot in 0..100 {
            gone.extend(accounts.closes("alice", connection(slot), open));
            let account = accounts.get("alice").expect("an account");
            assert!(open + account.closing() <= CONNECTIONS_PER_PEER_MAX);
        }
        let oldest: Vec<_> = (0..gone.len() as u32).map(connection).collect();
        assert_eq!(gone, oldest);
        assert_eq!(gone.len(), 100 - (CONNECTIONS_PER_PEER_MAX - open));
        // Those that were told to end at once still have an owner.
        let counts = ConnectionCounts {
            refused_requests: 2,
            ..ConnectionCounts::default()
        };
        for slot in 0..100 {
            accounts.ended(connection(slot), None, &counts, &CloseCause::Asked);
        }
        let account = accounts.get("alice").expect("an account");
        assert_eq!(account.closing(), 0);
        assert_eq!(account.past().refused_requests, 200);
        assert_eq!(account.ended().replaced, 100);
        assert!(accounts.closing.is_empty());
    }

    #[test]
    fn connections_on_their_way_to_a_tunnel_are_bounded() {
        let mut accounts = Accounts::default();
        let mut connecting: Vec<_> = (0..CONNECTIONS_PER_PEER_MAX)
            .map(|_| accounts.begin("alice").expect("one more"))
            .collect();
        assert!(accounts.begin("alice").is_none());
        assert!(accounts.begin("bob").is_some());
        connecting.pop();
        assert!(accounts.begin("alice").is_some());
    }

    #[test]
    fn peers_have_numbers_of_their_own() {
        let mut accounts = Accounts::default();
        let alice = accounts.of("alice").id();
        let bob = accounts.of("bob").id();
        assert_ne!(alice, bob);
        assert_eq!(accounts.of("alice").id(), alice);
        accounts.forget("alice");
        assert_ne!(accounts.of("alice").id(), bob);
    }

    #[test]
    fn what_ends_a_connection_is_counted() {
        let mut accounts = Accounts::default();
        let counts = ConnectionCounts::default();
        accounts.of("alice");
        for cause in [
            CloseCause::PeerClosed,
            CloseCause::Reset,
            CloseCause::Truncated,
            CloseCause::Misbehaved("no capsule".into()),
        ] {
            accounts.ended(connection(1), Some("alice"), &counts, &cause);
        }
        let expected = Ended {
            closed: 1,
            lost: 2,
            misbehaved: 1,
            replaced: 0,
        };
        assert_eq!(accounts.get("alice").map(Account::ended), Some(expected));
        // Connections of a peer that is no longer invited are nobody's.
        accounts.forget("alice");
        accounts.ended(connection(1), Some("alice"), &counts, &CloseCause::Reset);
        assert!(accounts.get("alice").is_none());
    }
}
