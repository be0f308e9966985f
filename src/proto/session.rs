//! Who is connected: one session a peer, several connections a session.
//!
//! A session is a peer's token together with the instance id that the client process chose. Another instance with
//! the same token *supersedes* it: the newcomer gets the addresses, the old one's connections are closed with a
//! reason, and should its client not have heard of that, it is told when it comes back. That way two devices with
//! one invite do not throw each other out in turns.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;

use super::address_pool::Lease;
use super::capsule::{AssignedAddress, CONTROL_BYTES_MAX, CloseReason};
use super::http::InstanceId;
use super::route_table::{
    ConnectionRef, Member, RouteTable, SPARSE_ORDINAL, SessionId, SessionRoute,
};

/// Connections that a session's flows are shared out among, at most. Its connection for sparse flows is one more, and has the
/// ordinal after theirs.
pub const SESSION_CONNECTIONS_MAX: usize = SPARSE_ORDINAL as usize;
/// Superseded instances remembered for each peer, newest last.
pub const SUPERSEDED_MAX: usize = 16;

/// A connection whose owner is known and that is about to carry packets.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// The peer's name.
    pub peer: &'a str,
    /// The client process.
    pub instance: InstanceId,
    /// Its place in the session: a connection with an ordinal that is taken replaces the one that has it. `None`:
    /// the lowest free one.
    pub ordinal: Option<u8>,
    /// The peer's addresses.
    pub lease: Lease,
    /// The worker's name for it.
    pub connection: ConnectionRef,
}

/// What became of an [`Arrival`].
#[derive(Debug, PartialEq, Eq)]
pub enum Arrived {
    /// It is part of the session; these connections must be closed.
    Joined {
        /// The session.
        session: SessionId,
        /// Connections that it supersedes or replaces, and what to tell them.
        closed: Vec<(ConnectionRef, CloseReason)>,
    },
    /// Its instance was superseded before: close it, and say so.
    Superseded,
    /// The session has [`SESSION_CONNECTIONS_MAX`] connections, or the ordinal is beyond [`SPARSE_ORDINAL`].
    TooMany,
}

/// One peer's session.
#[derive(Debug)]
pub struct Session {
    /// Its name while the process lives.
    pub id: SessionId,
    /// The client process it belongs to.
    pub instance: InstanceId,
    /// Its addresses.
    pub lease: Lease,
    /// By ordinal.
    connections: BTreeMap<u8, Member>,
}

/// All sessions of a server.
#[derive(Debug, Default)]
pub struct Sessions {
    by_peer: BTreeMap<String, Session>,
    peers: HashMap<ConnectionRef, String>,
    superseded: HashMap<String, VecDeque<InstanceId>>,
    /// Exactly the sessions in `by_peer`.
    routes: RouteTable,
    last_id: u64,
}

impl Sessions {
    /// No sessions.
    pub fn new() -> Self {
        Sessions::default()
    }

    /// Whether this instance has had to make room for a newer one.
    pub fn is_superseded(&self, peer: &str, instance: InstanceId) -> bool {
        self.superseded
            .get(peer)
            .is_some_and(|instances| instances.contains(&instance))
    }

    /// Takes a connection in, or says why not. The caller closes what it names.
    pub fn arrive(&mut self, arrival: Arrival<'_>) -> Arrived {
        if self.is_superseded(arrival.peer, arrival.instance) {
            return Arrived::Superseded;
        }
        let same = self
            .by_peer
            .get(arrival.peer)
            .filter(|session| session.instance == arrival.instance);
        let Some(ordinal) = ordinal(same, arrival.ordinal) else {
            return Arrived::TooMany;
        };

        let mut closed = Vec::new();
        if same.is_none() {
            closed.extend(self.supersede(arrival.peer));
            self.last_id += 1;
            let session = Session {
                id: SessionId(self.last_id),
                instance: arrival.instance,
                lease: arrival.lease,
                connections: BTreeMap::new(),
            };
            self.by_peer.insert(arrival.peer.to_owned(), session);
        }
        let session = self
            .by_peer
            .get_mut(arrival.peer)
            .expect("it was there or has been inserted");
        let member = Member {
            ordinal,
            connection: arrival.connection,
            silent: false,
        };
        if let Some(replaced) = session.connections.insert(ordinal, member) {
            self.peers.remove(&replaced.connection);
            closed.push((replaced.connection, CloseReason::Replaced));
        }
        self.routes.insert(&session.addresses(), session.route());
        self.peers
            .insert(arrival.connection, arrival.peer.to_owned());
        Arrived::Joined {
            session: session.id,
            closed,
        }
    }

    /// Ends the peer's session, if there is one, in favour of another instance.
    fn supersede(&mut self, peer: &str) -> Vec<(ConnectionRef, CloseReason)> {
        let Some(session) = self.by_peer.remove(peer) else {
            return Vec::new();
        };
        let instances = self.superseded.entry(peer.to_owned()).or_default();
        if instances.len() == SUPERSEDED_MAX {
            instances.pop_front();
        }
        instances.push_back(session.instance);
        self.forget(session)
            .map(|connection| (connection, CloseReason::Superseded))
            .collect()
    }

    fn forget(&mut self, session: Session) -> impl Iterator<Item = ConnectionRef> + use<> {
        self.routes.remove(&session.addresses(), session.id);
        for member in session.connections.values() {
            self.peers.remove(&member.connection);
        }
        let members = session.connections.into_values();
        members.map(|member| member.connection)
    }

    /// A connection is gone. Its session stays, so that a client that comes back is not a newcomer.
    /// Returns whether any session had it.
    pub fn depart(&mut self, connection: ConnectionRef) -> bool {
        let Some(peer) = self.peers.remove(&connection) else {
            return false;
        };
        let session = self
            .by_peer
            .get_mut(&peer)
            .expect("a connection's session is there");
        let others = |_: &u8, member: &mut Member| member.connection != connection;
        session.connections.retain(others);
        self.routes.insert(&session.addresses(), session.route());
        true
    }

    /// A keepalive of the connection stays unanswered, or it is heard from again. Returns whether the routes change.
    pub fn set_silent(&mut self, connection: ConnectionRef, silent: bool) -> bool {
        let Some(session) = self
            .peers
            .get(&connection)
            .and_then(|peer| self.by_peer.get_mut(peer))
        else {
            return false;
        };
        let before = session.route();
        for member in session.connections.values_mut() {
            if member.connection == connection {
                member.silent = silent;
            }
        }
        let route = session.route();
        if route == before {
            return false;
        }
        self.routes.insert(&session.addresses(), route);
        true
    }

    /// Ends the sessions of all peers that are not `kept`; returns their connections, to be closed.
    pub fn retain_peers(&mut self, kept: impl Fn(&str) -> bool) -> Vec<ConnectionRef> {
        self.superseded.retain(|peer, _| kept(peer));
        let gone: Vec<String> = self
            .by_peer
            .keys()
            .filter(|peer| !kept(peer))
            .cloned()
            .collect();
        let mut connections = Vec::new();
        for peer in gone {
            let session = self.by_peer.remove(&peer).expect("just listed");
            connections.extend(self.forget(session));
        }
        connections
    }

    /// The session that a connection belongs to.
    pub fn of(&self, connection: ConnectionRef) -> Option<&Session> {
        self.by_peer.get(self.peers.get(&connection)?)
    }

    /// The connections beside which a newcomer will be in its session.
    pub fn others(
        &self,
        peer: &str,
        instance: InstanceId,
        ordinal: Option<u8>,
    ) -> Vec<ConnectionRef> {
        let session = self.by_peer.get(peer);
        let session = session.filter(|session| session.instance == instance);
        let members = session.into_iter().flat_map(Session::connections);
        members
            .filter(|member| ordinal != Some(member.ordinal))
            .map(|member| member.connection)
            .collect()
    }

    /// How many connections the peer's session has.
    pub fn connections_of(&self, peer: &str) -> usize {
        let session = self.by_peer.get(peer);
        session.map_or(0, |session| session.connections.len())
    }

    /// The peer that a connection belongs to.
    pub fn peer_of(&self, connection: ConnectionRef) -> Option<&str> {
        self.peers.get(&connection).map(String::as_str)
    }

    /// All sessions, by peer name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Session)> {
        self.by_peer
            .iter()
            .map(|(peer, session)| (peer.as_str(), session))
    }

    /// The snapshot for the workers.
    pub fn routes(&self) -> RouteTable {
        self.routes.clone()
    }
}

impl Session {
    /// Its inner addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.lease.v4.into(), self.lease.v6.into()]
    }

    /// Its connections, by ordinal.
    pub fn connections(&self) -> impl Iterator<Item = Member> {
        self.connections.values().copied()
    }

    /// Its flows, shared out among its connections.
    pub fn route(&self) -> SessionRoute {
        SessionRoute::new(self.id, self.connections())
    }
}

/// The place for a new connection in a session that may not exist yet.
fn ordinal(session: Option<&Session>, wanted: Option<u8>) -> Option<u8> {
    let taken =
        |ordinal: &u8| session.is_some_and(|session| session.connections.contains_key(ordinal));
    match wanted {
        Some(ordinal) => (ordinal <= SPARSE_ORDINAL).then_some(ordinal),
        None => (0..SPARSE_ORDINAL).find(|ordinal| !taken(ordinal)),
    }
}

/// A lease as the ADDRESS_ASSIGN that nobody asked for.
pub fn assignment(lease: Lease) -> Vec<AssignedAddress> {
    vec![
        AssignedAddress::host(0, lease.v4.into()),
        AssignedAddress::host(0, lease.v6.into()),
    ]
}

/// The ADDRESS_ASSIGN that answers an ADDRESS_REQUEST: RFC 9484, section 4.7.2.
///
/// Whatever was asked for, a session has its lease and nothing else: the first request of each
/// family is answered with it, further ones are refused. The answer never has more than
/// [`CONTROL_BYTES_MAX`] bytes: an address of the family that was not asked for may leave no room
/// for the last refusals, and those are left out.
pub fn answer(lease: Lease, requested: &[AssignedAddress]) -> Vec<AssignedAddress> {
    let of_family = |is_v6: bool| {
        move |request: &&AssignedAddress| matches!(request.prefix, IpNet::V6(_)) == is_v6
    };
    let first_id = |is_v6: bool| {
        let first = requested.iter().find(of_family(is_v6));
        first.map_or(0, |request| request.request_id)
    };
    let mut assigned = vec![
        AssignedAddress::host(first_id(false), lease.v4.into()),
        AssignedAddress::host(first_id(true), lease.v6.into()),
    ];
    let (mut seen_v4, mut seen_v6) = (false, false);
    let refusals = requested.iter().filter_map(|request| {
        let (seen, refusal) = match request.prefix {
            IpNet::V4(_) => (
                &mut seen_v4,
                AssignedAddress::unspecified_v4(request.request_id),
            ),
            IpNet::V6(_) => (
                &mut seen_v6,
                AssignedAddress::unspecified_v6(request.request_id),
            ),
        };
        std::mem::replace(seen, true).then_some(refusal)
    });
    let mut bytes_left = CONTROL_BYTES_MAX;
    for address in &assigned {
        bytes_left = bytes_left.saturating_sub(address.encoded_bytes());
    }
    assigned.extend(refusals.take_while(|refusal| {
        let left = bytes_left.checked_sub(refusal.encoded_bytes());
        bytes_left = left.unwrap_or(0);
        left.is_some()
    }));
    assigned
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::super::capsule::strategies::request as any_request;
    use super::super::capsule::{Capsule, kind};
    use super::*;

    fn lease(host: u8) -> Lease {
        Lease {
            v4: Ipv4Addr::new(10, 87, 0, host),
            v6: Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(host)),
        }
    }

    fn connection(number: u32) -> ConnectionRef {
        ConnectionRef {
            worker: (number % 2) as u16,
            slot: number,
            generation: number,
        }
    }

    fn instance(number: u8) -> InstanceId {
        InstanceId([number; 16])
    }

    fn arrival(peer: &str, number: u8, ordinal: Option<u8>, name: u32) -> Arrival<'_> {
        Arrival {
            peer,
            instance: instance(number),
            ordinal,
            lease: lease(peer.as_bytes()[0]),
            connection: connection(name),
        }
    }

    fn joined(arrived: Arrived) -> Vec<(ConnectionRef, CloseReason)> {
        match arrived {
            Arrived::Joined { closed, .. } => closed,
            other => panic!("{other:?}"),
        }
    }

    fn route(sessions: &Sessions, peer: &str) -> Vec<ConnectionRef> {
        let address = lease(peer.as_bytes()[0]).v4.into();
        sessions
            .routes()
            .route(address)
            .map(|route| route.connections().to_vec())
            .unwrap_or_default()
    }

    #[test]
    fn connections_of_one_instance_are_one_session_in_the_order_of_ordinals() {
        let mut sessions = Sessions::new();
        assert_eq!(joined(sessions.arrive(arrival("a", 1, Some(1), 10))), []);
        assert_eq!(joined(sessions.arrive(arrival("a", 1, Some(0), 11))), []);
        assert_eq!(joined(sessions.arrive(arrival("b", 2, None, 12))), []);
        assert_eq!(route(&sessions, "a"), [connection(11), connection(10)]);
        assert_eq!(route(&sessions, "b"), [connection(12)]);
    }

    #[test]
    fn a_taken_ordinal_is_replaced() {
        let mut sessions = Sessions::new();
        joined(sessions.arrive(arrival("a", 1, Some(0), 10)));
        assert_eq!(
            joined(sessions.arrive(arrival("a", 1, Some(0), 11))),
            [(connection(10), CloseReason::Replaced)]
        );
        assert!(!sessions.depart(connection(10)));
        assert_eq!(route(&sessions, "a"), [connection(11)]);
    }

    #[test]
    fn a_new_instance_supersedes_the_old_one_which_is_told_when_it_comes_back() {
        let mut sessions = Sessions::new();
        joined(sessions.arrive(arrival("a", 1, Some(0), 10)));
        joined(sessions.arrive(arrival("a", 1, Some(1), 11)));
        let closed = joined(sessions.arrive(arrival("a", 2, Some(0), 12)));
        assert_eq!(
            closed,
            [
                (connection(10), CloseReason::Superseded),
                (connection(11), CloseReason::Superseded)
            ]
        );
        assert_eq!(route(&sessions, "a"), [connection(12)]);
        assert_eq!(
            sessions.arrive(arrival("a", 1, Some(0), 13)),
            Arrived::Superseded
        );
        assert_eq!(route(&sessions, "a"), [connection(12)]);
    }

    #[test]
    fn a_client_that_comes_back_after_all_its_connections_died_is_the_same_session() {
        let mut sessions = Sessions::new();
        let first = sessions.arrive(arrival("a", 1, Some(0), 10));
        assert!(sessions.depart(connection(10)));
        assert_eq!(route(&sessions, "a"), []);
        let second = sessions.arrive(arrival("a", 1, Some(0), 11));
        assert_eq!(first, second);
    }

    #[test]
    fn a_silent_connection_has_no_flows_while_there_is_another() {
        let mut sessions = Sessions::new();
        joined(sessions.arrive(arrival("a", 1, Some(0), 10)));
        assert!(!sessions.set_silent(connection(10), true), "the only one");
        joined(sessions.arrive(arrival("a", 1, Some(1), 11)));
        assert_eq!(route(&sessions, "a"), [connection(11)]);
        assert!(sessions.set_silent(connection(11), true));
        assert_eq!(route(&sessions, "a"), [connection(10), connection(11)]);
        assert!(sessions.set_silent(connection(10), false));
        assert_eq!(route(&sessions, "a"), [connection(10)]);
        // Whatever replaces it starts anew.
        joined(sessions.arrive(arrival("a", 1, Some(1), 12)));
        assert_eq!(route(&sessions, "a"), [connection(10), connection(12)]);
        assert!(!sessions.set_silent(connection(11), false));
    }

    #[test]
    fn a_newcomer_is_told_from_what_it_replaces() {
        let mut sessions = Sessions::new();
        assert!(sessions.others("a", instance(1), Some(0)).is_empty());
        joined(sessions.arrive(arrival("a", 1, Some(0), 10)));
        joined(sessions.arrive(arrival("a", 1, Some(SPARSE_ORDINAL), 11)));
        assert_eq!(
            sessions.others("a", instance(1), Some(SPARSE_ORDINAL)),
            [connection(10)]
        );
        assert_eq!(
            sessions.others("a", instance(1), None),
            [connection(10), connection(11)]
        );
        assert!(sessions.others("a", instance(2), Some(1)).is_empty());
    }

    #[test]
    fn a_session_takes_so_many_connections() {
        let mut sessions = Sessions::new();
        for number in 0..SESSION_CONNECTIONS_MAX as u32 {
            joined(sessions.arrive(arrival("a", 1, None, number)));
        }
        assert_eq!(sessions.arrive(arrival("a", 1, None, 99)), Arrived::TooMany);
        assert_eq!(
            sessions.arrive(arrival("a", 1, Some(SPARSE_ORDINAL + 1), 99)),
            Arrived::TooMany
        );
        joined(sessions.arrive(arrival("a", 1, Some(15), 99)));
    }

    #[test]
    fn revoked_peers_lose_their_connections() {
        let mut sessions = Sessions::new();
        joined(sessions.arrive(arrival("a", 1, None, 10)));
        joined(sessions.arrive(arrival("b", 2, None, 11)));
        assert_eq!(sessions.retain_peers(|peer| peer == "b"), [connection(10)]);
        assert!(sessions.of(connection(10)).is_none());
        assert_eq!(sessions.peer_of(connection(11)), Some("b"));
    }

    fn request(request_id: u64, prefix: &str) -> AssignedAddress {
        AssignedAddress {
            request_id,
            prefix: prefix.parse().expect("prefix"),
        }
    }

    fn lease_prefixes(lease: Lease) -> [IpNet; 2] {
        [lease.v4.into(), lease.v6.into()].map(|address: IpAddr| IpNet::from(address))
    }

    #[test]
    fn address_requests_are_answered_with_the_lease() {
        let own = lease(7);
        let answered = answer(
            own,
            &[
                request(5, "::/128"),
                request(6, "0.0.0.0/32"),
                request(8, "10.0.0.0/8"),
            ],
        );
        assert_eq!(
            answered,
            [
                request(6, "10.87.0.7/32"),
                AssignedAddress::host(5, own.v6.into()),
                request(8, "0.0.0.0/32"),
            ]
        );
    }

    /// The entries of a request of `bytes` bytes, as they are once it has been decoded.
    fn full_request(entry: &[u8], bytes: usize) -> Vec<AssignedAddress> {
        let value = entry.repeat(bytes / entry.len());
        match Capsule::decode(kind::ADDRESS_REQUEST, &value) {
            Ok(Some(Capsule::AddressRequest(requested))) => requested,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_largest_requests_have_answers_that_fit() {
        let v4 = [&[1, 4][..], &[0; 4], &[32]].concat();
        let v6 = [&[1, 6][..], &[0; 16], &[128]].concat();
        let mixed = [&v4[..], &v6].concat();
        for (entry, count) in [(&v4, 2_340), (&v6, 862), (&mixed, 1_260)] {
            let requested = full_request(entry, CONTROL_BYTES_MAX);
            assert_eq!(requested.len(), count);
            let answered = answer(lease(7), &requested);
            let unasked = usize::from(
                requested
                    .iter()
                    .all(|one| one.prefix == requested[0].prefix),
            );
            assert!(answered.len() + 3 >= count + unasked, "{}", answered.len());
            assert!(answered[..2].iter().all(|lease| !lease.is_unspecified()));
            assert!(answered[2..].iter().all(AssignedAddress::is_unspecified));
            assert!(answered[2..].iter().all(|refusal| refusal.request_id == 1));
            Capsule::AddressAssign(answered)
                .to_bytes()
                .expect("it fits");
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arrive {
            peer: u8,
            instance: u8,
            ordinal: Option<u8>,
        },
        Depart {
            nth: prop::sample::Index,
        },
        Revoke {
            peer: u8,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..3u8, 0..4u8, prop::option::of(0..5u8))
                .prop_map(|(peer, instance, ordinal)| Step::Arrive { peer, instance, ordinal }),
            3 => any::<prop::sample::Index>().prop_map(|nth| Step::Depart { nth }),
            1 => (0..3u8).prop_map(|peer| Step::Revoke { peer }),
        ]
    }

    proptest! {
        /// Each request has its answer, in order but for the lease, and all that is left out did
        /// not fit.
        #[test]
        fn the_answer_to_any_request_can_be_sent(requested in any_request()) {
            let asked = Capsule::AddressRequest(requested.clone()).to_bytes().expect("valid");
            let answered = answer(lease(7), &requested);
            let sent = Capsule::AddressAssign(answered.clone()).to_bytes().expect("it fits");
            prop_assert!(sent.len() <= asked.len() + 20, "{} for {}", sent.len(), asked.len());
            let (own, refusals) = answered.split_at(2);
            prop_assert_eq!([own[0].prefix, own[1].prefix], lease_prefixes(lease(7)));
            let mut left = requested.clone();
            for (family, own) in own.iter().enumerate() {
                let first = left.iter().position(|one| usize::from(one.prefix.addr().is_ipv6()) == family);
                let id = first.map_or(0, |first| left.remove(first).request_id);
                prop_assert_eq!(own.request_id, id);
            }
            prop_assert!(refusals.len() <= left.len() && refusals.len() + 3 >= left.len());
            prop_assert!(refusals.len() == left.len() || sent.len() > CONTROL_BYTES_MAX - 30);
            for (refusal, request) in refusals.iter().zip(&left) {
                prop_assert_eq!(refusal.request_id, request.request_id);
                prop_assert!(refusal.is_unspecified());
                prop_assert_eq!(refusal.prefix.prefix_len(), refusal.prefix.max_prefix_len());
                prop_assert_eq!(refusal.prefix.addr().is_ipv4(), request.prefix.addr().is_ipv4());
            }
        }

        /// Against a list of (connection, peer, instance): every open connection is routed for its own peer only,
        /// one instance a peer, and everything else has been handed out to be closed exactly once.
        #[test]
        fn connections_are_routed_or_closed_never_both(steps in prop::collection::vec(step(), 1..60)) {
            let mut sessions = Sessions::new();
            let mut open: Vec<(ConnectionRef, u8, u8)> = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Arrive { peer, instance, ordinal } => {
                        let name = char::from(b'a' + peer).to_string();
                        let name_of = number as u32;
                        match sessions.arrive(arrival(&name, instance, ordinal, name_of)) {
                            Arrived::Joined { closed, .. } => {
                                for (gone, reason) in closed {
                                    let at = open.iter().position(|(other, ..)| *other == gone);
                                    let (_, owner, former) = open.remove(at.expect("closed once"));
                                    prop_assert_eq!(owner, peer);
                                    prop_assert_eq!(reason == CloseReason::Replaced, former == instance);
                                }
                                open.push((connection(name_of), peer, instance));
                            }
                            Arrived::Superseded => {
                                prop_assert!(!open.iter().any(|(_, p, i)| *p == peer && *i == instance));
                            }
                            Arrived::TooMany => prop_assert!(false, "five ordinals never fill a session"),
                        }
                    }
                    Step::Depart { nth } => {
                        if !open.is_empty() {
                            let (gone, ..) = open.remove(nth.index(open.len()));
                            prop_assert!(sessions.depart(gone));
                            prop_assert!(!sessions.depart(gone));
                        }
                    }
                    Step::Revoke { peer } => {
                        let name = char::from(b'a' + peer).to_string();
                        let mut gone = sessions.retain_peers(|other| other != name);
                        let mut expected: Vec<_> =
                            open.iter().filter(|(_, p, _)| *p == peer).map(|(c, ..)| *c).collect();
                        gone.sort();
                        expected.sort();
                        prop_assert_eq!(gone, expected);
                        open.retain(|(_, p, _)| *p != peer);
                    }
                }
                for peer in 0..3u8 {
                    let name = char::from(b'a' + peer).to_string();
                    let mut routed = route(&sessions, &name);
                    let mut expected: Vec<_> =
                        open.iter().filter(|(_, p, _)| *p == peer).map(|(c, ..)| *c).collect();
                    routed.sort();
                    expected.sort();
                    prop_assert_eq!(routed, expected);
                }
            }
        }
    }

    /// What happens to a session of up to [`ORDINALS`] connections.
    #[derive(Clone, Copy, Debug)]
    enum Happening {
        Sent { flow: usize },
        Delivered { ordinal: u8 },
        Came { ordinal: u8 },
        Went { ordinal: u8 },
        Silent { ordinal: u8, silent: bool },
    }

    const ORDINALS: u8 = 4;
    /// Their hashes are spread evenly.
    const FLOWS: usize = 24;

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            30 => (0..FLOWS).prop_map(|flow| Happening::Sent { flow }),
            20 => (0..ORDINALS).prop_map(|ordinal| Happening::Delivered { ordinal }),
            2 => (0..ORDINALS).prop_map(|ordinal| Happening::Came { ordinal }),
            1 => (0..ORDINALS).prop_map(|ordinal| Happening::Went { ordinal }),
            2 => (0..ORDINALS, any::<bool>())
                .prop_map(|(ordinal, silent)| Happening::Silent { ordinal, silent }),
        ]
    }

    /// The connection that each flow takes.
    fn choices(sessions: &Sessions) -> [Option<ConnectionRef>; FLOWS] {
        let routes = sessions.routes();
        std::array::from_fn(|flow| {
            let hash = (flow as u32) * (u32::MAX / FLOWS as u32);
            routes.lookup(lease(b'a').v4.into(), hash)
        })
    }

    proptest! {
        /// Each connection keeps its order, and none knows of the others. A flow is sent by one of them until it
        /// moves; what is sent between two moves arrives in order. It moves only if its own connection goes, falls
        /// silent or is taken over, or one that comes or is heard from again is its first choice.
        #[test]
        fn a_flow_keeps_its_order_while_it_keeps_its_connection(
            happenings in prop::collection::vec(happening(), 1..400),
        ) {
            let mut sessions = Sessions::new();
            let mut open: BTreeMap<u8, Member> = BTreeMap::new();
            let mut under_way: HashMap<ConnectionRef, VecDeque<(usize, usize, usize)>> = HashMap::new();
            let mut moves = [0; FLOWS];
            let mut last_delivered: HashMap<(usize, usize), usize> = HashMap::new();
            for (number, happening) in happenings.into_iter().enumerate() {
                let before = choices(&sessions);
                let all_silent = |open: &BTreeMap<u8, Member>| open.values().all(|one| one.silent);
                let mut in_doubt = all_silent(&open);
                let mut concerned = Vec::new();
                match happening {
                    Happening::Sent { flow } => {
                        if let Some(by) = before[flow] {
                            let packet = (flow, moves[flow], number + 1);
                            under_way.entry(by).or_default().push_back(packet);
                        }
                    }
                    Happening::Delivered { ordinal } => {
                        let from = open.get(&ordinal).map(|one| one.connection);
                        let queue = from.and_then(|from| under_way.get_mut(&from));
                        if let Some((flow, stay, sent)) = queue.and_then(VecDeque::pop_front) {
                            let last = last_delivered.insert((flow, stay), sent);
                            prop_assert!(last < Some(sent), "flow {}: {:?} {}", flow, last, sent);
                        }
                    }
                    Happening::Came { ordinal } => {
                        let came = connection(number as u32);
                        joined(sessions.arrive(arrival("a", 1, Some(ordinal), number as u32)));
                        concerned.push(came);
                        let member = Member { ordinal, connection: came, silent: false };
                        concerned.extend(open.insert(ordinal, member).map(|one| one.connection));
                    }
                    Happening::Went { ordinal } => {
                        if let Some(gone) = open.remove(&ordinal) {
                            sessions.depart(gone.connection);
                            concerned.push(gone.connection);
                        }
                    }
                    Happening::Silent { ordinal, silent } => {
                        if let Some(member) = open.get_mut(&ordinal) {
                            member.silent = silent;
                            sessions.set_silent(member.connection, silent);
                            concerned.push(member.connection);
                        }
                    }
                }
                // Where all are silent, all are as good as any.
                in_doubt |= all_silent(&open);
                let after = choices(&sessions);
                for (flow, (before, after)) in before.into_iter().zip(after).enumerate() {
                    if after != before {
                        moves[flow] += 1;
                        let own = [before, after].into_iter().flatten();
                        let is_concerned = own.into_iter().any(|one| concerned.contains(&one));
                        prop_assert!(in_doubt || is_concerned, "flow {} moved", flow);
                    }
                }
            }
        }
    }
}
