//! The server's tunnels: who may have one, who has one, and where the workers find it.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use aws_lc_rs::constant_time::verify_slices_are_equal;

use super::ended;
use super::peer_accounts::{Account, Accounts, Connecting};
use super::status::{Subject, connection};
use crate::keeper::request::{Peer, SavedLease};
use crate::proto::address_pool::{AddressPool, Lease, PoolExhausted};
use crate::proto::capsule::{Capsule, CloseReason, DnsAssign, EncodeError, IpAddressRange};
use crate::proto::http::{InstanceId, OffloadHeader, Token};
use crate::proto::offload::Offloads;
use crate::proto::route_table::{ConnectionRef, SPARSE_ORDINAL};
use crate::proto::session::{self, Arrival, Arrived, Sessions};
use crate::status::{self, Report};
use crate::tls::handshake::Established;
use crate::worker::connection::InnerSources;
use crate::worker::{CloseCause, Handoff, Workers};

/// What every client is told about the server's network.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The ranges that the server routes.
    pub routes: Vec<IpAddressRange>,
    /// Nameservers to use.
    pub dns: Vec<IpAddr>,
    /// What this host's TUN takes unsegmented.
    pub accepts: Offloads,
}

impl Offer {
    /// The capsules that a new tunnel begins with. Nameservers follow the routes that lead to them, as the draft wants.
    ///
    /// # Errors
    /// What the server offers is not what the protocol allows.
    pub fn capsules(&self, lease: Lease) -> Result<Vec<u8>, EncodeError> {
        let mut capsules = Vec::new();
        Capsule::AddressAssign(session::assignment(lease)).encode(&mut capsules)?;
        Capsule::RouteAdvertisement(self.routes.clone()).encode(&mut capsules)?;
        if !self.dns.is_empty() {
            Capsule::DnsAssign(DnsAssign::plain(self.dns.iter().copied(), Vec::new()))
                .encode(&mut capsules)?;
        }
        Ok(capsules)
    }
}

/// Somebody whose token is right.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// Whose token it is.
    pub peer: Peer,
    /// The peer's addresses.
    pub lease: Lease,
    /// What the keeper must be told before they are used, if they are new.
    pub unsaved: Option<SavedLease>,
}

/// A connection that has been answered and goes to a worker.
pub struct NewTunnel {
    /// Who it is.
    pub admitted: Admitted,
    /// The client process.
    pub instance: InstanceId,
    /// Its place in the session.
    pub ordinal: Option<u8>,
    /// Where it comes from.
    pub source: SocketAddr,
    /// The connection's socket.
    pub socket: OwnedFd,
    /// The connection's TLS.
    pub established: Established,
    /// What the peer accepts in which context.
    pub offload: Option<OffloadHeader>,
}

/// All tunnels of the server.
pub struct Tunnels {
    /// None once they have been stopped; then there are no peers either.
    workers: Option<Workers>,
    accepts: Offloads,
    /// Whether connections' congestion control is chosen by the length of the path.
    follows_path: bool,
    pool: AddressPool,
    peers: Vec<Peer>,
    sessions: Sessions,
    accounts: Accounts,
}

/// Logs a line about a peer, of whom each can cause a few only.
macro_rules! log_of {
    ($tunnels:expr, $peer:expr, $($line:tt)*) => {
        match $tunnels.accounts.may_log($peer, Instant::now()) {
            Some(0) => tracing::info!($($line)*),
            Some(left_out) => {
                tracing::info!("{} ({left_out} lines were left out before this one)", format_args!($($line)*));
            }
            None => tracing::debug!($($line)*),
        }
    };
}

impl Tunnels {
    /// None yet.
    pub fn new(
        workers: Workers,
        accepts: Offloads,
        follows_path: bool,
        pool: AddressPool,
        peers: Vec<Peer>,
    ) -> Self {
        Tunnels {
            workers: Some(workers),
            accepts,
            follows_path,
            pool,
            peers,
            sessions: Sessions::new(),
            accounts: Accounts::default(),
        }
    }

    /// The peer that has this token. Takes the same time whoever it is, and whether it is anybody.
    pub fn authorise(&self, token: &Token) -> Option<&Peer> {
        let hash = token.sha256();
        let mut found = None;
        for peer in &self.peers {
            if verify_slices_are_equal(&hash, &peer.token_sha256).is_ok() {
                found = Some(peer);
            }
        }
        found
    }

    /// The peer's addresses, leased now if it has none.
    ///
    /// # Errors
    /// The pool is exhausted.
    pub fn admit(&mut self, peer: Peer) -> Result<Admitted, PoolExhausted> {
        let known = self.pool.get(&peer.name).is_some();
        let lease = self.pool.lease(&peer.name)?;
        let unsaved = (!known).then(|| SavedLease {
            peer: peer.name.clone(),
            v4: lease.v4,
            v6: lease.v6,
        });
        Ok(Admitted {
            peer,
            lease,
            unsaved,
        })
    }

    /// A connection of the peer has shown its token; none if too many of the peer's are no tunnels yet.
    pub fn begin(&mut self, peer: &Peer) -> Option<Connecting> {
        self.accounts.begin(&peer.name)
    }

    /// Says in the log that a connection of the peer gets no tunnel.
    pub fn log_refusal(&mut self, peer: &str, source: SocketAddr, reason: CloseReason) {
        log_of!(self, peer, "{peer} from {source}: not taken: {reason}");
    }

    /// Whether a newer client process has taken this one's place.
    pub fn is_superseded(&self, peer: &Peer, instance: InstanceId) -> bool {
        self.sessions.is_superseded(&peer.name, instance)
    }

    /// Gives the connection to a worker. Where its place has been lost since it was admitted, the worker tells the peer why.
    pub fn establish(&mut self, tunnel: NewTunnel) {
        let NewTunnel {
            admitted,
            source,
            instance,
            ordinal,
            ..
        } = tunnel;
        let peer = admitted.peer.name.as_str();
        let others = self.sessions.others(peer, instance, ordinal);
        let is_sparse = ordinal == Some(SPARSE_ORDINAL);
        let connection = self.workers().allocate(&others, is_sparse);
        let handoff = Handoff {
            connection,
            peer: self.accounts.of(peer).id(),
            socket: Arc::new(tunnel.socket),
            established: tunnel.established,
            inner_sources: InnerSources::Only(vec![
                admitted.lease.v4.into(),
                admitted.lease.v6.into(),
            ]),
            offload: tunnel.offload,
            accepts: self.accepts,
            follows_path: self.follows_path,
        };
        let arrived = if self.peers.contains(&admitted.peer) {
            self.sessions.arrive(Arrival {
                peer,
                instance,
                ordinal,
                lease: admitted.lease,
                connection,
            })
        } else {
            self.turn_away(peer, source, handoff, CloseReason::Revoked);
            if !self.peers.iter().any(|other| other.name == peer) {
                self.accounts.forget(peer);
            }
            return;
        };
        let reason = match (arrived, ordinal) {
            (Arrived::Joined { closed, .. }, _) => {
                // All workers know the way back before one of them takes the first packet, or its answer would be lost.
                self.publish_routes();
                self.workers().add(handoff);
                for (connection, reason) in closed {
                    self.close(peer, connection, reason);
                }
                let Lease { v4, v6 } = admitted.lease;
                log_of!(self, peer, "{peer} connected from {source}: {v4}, {v6}");
                return;
            }
            (Arrived::Superseded, _) => CloseReason::Superseded,
            (Arrived::TooMany, None) => CloseReason::Exhausted,
            (Arrived::TooMany, Some(_)) => CloseReason::Misbehaved,
        };
        self.turn_away(peer, source, handoff, reason);
    }

    /// Tells the peer why its connection is not taken, after the 101 that it has got.
    fn turn_away(&mut self, peer: &str, source: SocketAddr, handoff: Handoff, reason: CloseReason) {
        self.log_refusal(peer, source, reason);
        let connection = handoff.connection;
        self.workers().add(handoff);
        self.close(peer, connection, reason);
    }

    /// Begins the end of a peer's connection. Until it is gone it counts as the peer's.
    fn close(&mut self, peer: &str, connection: ConnectionRef, reason: CloseReason) {
        self.workers().close(connection, Some(reason));
        let open = self.sessions.connections_of(peer);
        for oldest in self.accounts.closes(peer, connection, open) {
            self.workers().abort(oldest);
        }
    }

    /// The list of peers has changed. Whoever is no longer on it, or has another token now, is disconnected.
    pub fn set_peers(&mut self, peers: Vec<Peer>) {
        let former = std::mem::replace(&mut self.peers, peers);
        let present: HashMap<&str, &[u8; 32]> = self
            .peers
            .iter()
            .map(|peer| (&peer.name[..], &peer.token_sha256))
            .collect();
        let revoked: HashSet<&str> = former
            .iter()
            .filter(|peer| present.get(&peer.name[..]) != Some(&&peer.token_sha256))
            .map(|peer| &peer.name[..])
            .collect();
        let closed = self.sessions.retain_peers(|name| !revoked.contains(name));
        for name in &revoked {
            tracing::info!("{name} is revoked");
            if !present.contains_key(name) {
                self.pool.release(name);
                self.accounts.forget(name);
            }
        }
        self.publish_routes();
        for connection in closed {
            self.workers().close(connection, Some(CloseReason::Revoked));
        }
    }

    /// A connection's worker is done with it.
    pub fn closed(&mut self, connection: ConnectionRef, cause: &CloseCause) {
        let peer = self.sessions.peer_of(connection).map(str::to_owned);
        if self.sessions.depart(connection) {
            self.publish_routes();
        }
        let counts = self.workers().connection(connection);
        let counts = counts
            .map(|info| info.stats.counters.read())
            .unwrap_or_default();
        self.accounts
            .ended(connection, peer.as_deref(), &counts, cause);
        self.workers().release(connection);
        match peer {
            Some(peer) => log_of!(self, &peer, "{peer} disconnected: {}", ended(cause)),
            None => tracing::debug!("a former connection is closed: {}", ended(cause)),
        }
    }

    /// A keepalive of a connection stays unanswered, or it is heard from again.
    pub fn set_silent(&mut self, connection: ConnectionRef, silent: bool) {
        if self.sessions.set_silent(connection, silent) {
            self.publish_routes();
        }
    }

    /// A peer said something that is not about packets.
    pub fn received(&mut self, connection: ConnectionRef, capsule: &Capsule) {
        let Some(session) = self.sessions.of(connection) else {
            return;
        };
        match capsule {
            Capsule::AddressRequest(requested) => {
                let answer =
                    Capsule::AddressAssign(session::answer(session.lease, requested)).to_bytes();
                match answer {
                    Ok(answer) => self.workers().send(connection, answer),
                    Err(error) => tracing::error!("an ADDRESS_REQUEST is not answered: {error}"),
                }
            }
            // A client has no addresses, routes or nameservers for us; its goodbye is followed by the end itself.
            other => tracing::debug!("ignored: {other:?}"),
        }
    }

    /// What `ringtun status` shows of this.
    pub fn report(&self, subject: &Subject) -> Option<Report> {
        let workers = self.workers.as_ref()?;
        let mut report = subject.report(workers);
        report.sessions = self
            .sessions
            .iter()
            .map(|(peer, session)| status::Session {
                peer: Some(peer.to_owned()),
                instance: session.instance.to_string(),
                addresses: session.addresses().into(),
                past: self.accounts.get(peer).map(past).unwrap_or_default(),
                connections: session
                    .connections()
                    .filter_map(|member| connection(workers, member))
                    .collect(),
            })
            .collect();
        Some(report)
    }

    /// How many may connect.
    pub fn peer_count(&self) -> usize {
        self.peers.len()
    }

    /// Says what the workers found when they started.
    pub fn log_workers(&mut self) {
        super::log_workers(self.workers());
    }

    /// Takes leave of everybody.
    pub fn stop(&mut self) {
        self.peers.clear();
        if let Some(workers) = self.workers.take() {
            workers.stop(Some(CloseReason::Shutdown));
        }
    }

    fn publish_routes(&mut self) {
        let routes = Arc::new(self.sessions.routes());
        self.workers().set_routes(routes);
    }

    fn workers(&mut self) -> &mut Workers {
        self.workers
            .as_mut()
            .expect("nobody is let in after the stop")
    }
}

fn past(account: &Account) -> status::Past {
    let ended = account.ended();
    status::Past {
        closing: account.closing(),
        ended_closed: ended.closed,
        ended_lost: ended.lost,
        ended_misbehaved: ended.misbehaved,
        ended_replaced: ended.replaced,
        counters: account.past().clone(),
    }
}
