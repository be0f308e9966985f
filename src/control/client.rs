//! The client's control thread: one session of one or more connections, kept up for as long as it runs.
//!
//! Each connection has a place (its ordinal) in the session. A place whose connection is gone, or is silent, gets a
//! task that tries until it has a new one; the old one, if it is still there, is closed when the new one carries
//! packets. Meanwhile its flows use the other connections.
//!
//! How many places there are is configured, or found out: one, or where the path asks for more
//! [`CONNECTIONS_STRIPED`] or [`CONNECTIONS_SLOWED`]. Where it is fast there is [`SPARSE_ORDINAL`]'s besides.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use rustls::pki_types::ServerName;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::dial::{Candidates, DialError, dial};
use super::opening::{Opened, OpeningError, Server, Terms, goodbye, open};
use super::reconnect::Reconnect;
use super::runtime::spawn_essential;
use super::status::{self, Questions, Subject, connection};
use super::{Ending, Rings, chain, ended, network};
use crate::config::{
    CONNECTIONS_SLOWED, CONNECTIONS_STRIPED, Cipher, ClientConfig, CongestionControl, Connections,
};
use crate::invite::{Host, Invite};
use crate::keeper::request::{ClientSetup, Notice};
use crate::keeper::{Link, Notices, SetupFds};
use crate::logging;
use crate::proto::budget::PeerId;
use crate::proto::capsule::{Capsule, CloseReason};
use crate::proto::http::InstanceId;
use crate::proto::offload::Offloads;
use crate::proto::route_table::{
    ConnectionRef, Member, RouteTable, SPARSE_ORDINAL, SessionId, SessionRoute,
};
use crate::status::{Report, Role, State};
use crate::sys::route;
use crate::tls::certificate::{Trust, client_config};
use crate::worker::connection::InnerSources;
use crate::worker::{CloseCause, Event, Handoff, PathKind, Workers};

/// How long the first connection may take before the program gives up.
pub const START_TIME: Duration = Duration::from_secs(15);
/// How much of that the server's name may take.
const RESOLVE_TIME: Duration = Duration::from_secs(14);
/// From one attempt to resolve the server's name to the next.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long changes of the network are collected before the way to the server is renewed.
const NETWORK_SETTLE_TIME: Duration = Duration::from_millis(300);
/// A server that ends the connection for sparse flows sooner does not want it.
const KEPT_MIN: Duration = Duration::from_secs(10);
const _: () = assert!(RESOLVE_TIME.as_millis() < START_TIME.as_millis());

/// Runs until the keeper says stop, or something final happens.
///
/// Workers take a while to start, most of all where they wait for packet memory, so they do so while the first connection is made.
pub async fn run(
    setup: ClientSetup,
    fds: SetupFds,
    rings: Rings,
    link: Link,
    notices: Notices,
) -> Ending {
    let started = Instant::now();
    let questions = match status::serve(fds.control) {
        Ok(questions) => questions,
        Err(error) => return Ending::failed(format!("cannot serve the control socket: {error}")),
    };
    let invite: Invite = match setup.invite.parse() {
        Ok(invite) => invite,
        Err(error) => {
            return Ending::Failed {
                exit: 2,
                line: chain(&error),
            };
        }
    };
    let accepts = Offloads::from_tun_flags(setup.tun_offload_flags);
    let server = match describe(&invite, setup.config.cipher, accepts) {
        Ok(server) => server,
        Err(line) => return Ending::failed(line),
    };
    let (events, happened) = mpsc::unbounded_channel();
    let starting = rings.start_workers_beside(fds.tun_queues, accepts, events);
    let (progress, news) = mpsc::unbounded_channel();
    let dialling = Rc::new(Dialling {
        server,
        candidates: RefCell::new(Candidates::new(Vec::new(), invite.port)),
        link: link.clone(),
        progress,
    });
    let network = watch_network(&setup.config.interface);
    let at_first = 0..setup.config.connections.at_first() as u8;
    let mut places: BTreeMap<u8, Place> = at_first
        .map(|ordinal| (ordinal, Place::default()))
        .collect();
    places.entry(0).or_default().dialling = true;
    // Essential: nobody else looks for this connection while the task is there.
    spawn_essential(
        "dial",
        fill_first_place(
            Rc::clone(&dialling),
            invite.clone(),
            started + RESOLVE_TIME,
            network.clone(),
        ),
    );
    let workers = match starting.await {
        Ok(workers) => workers,
        Err(error) => return Ending::failed(chain(&error)),
    };
    let subject = Subject::new(
        Role::Client,
        &setup.config.interface,
        setup.config.mtu,
        &setup.origin,
        setup.config.io,
        accepts,
    );
    let client = Client {
        subject,
        target: format!("{}:{}", invite.host, invite.port),
        port: invite.port,
        places,
        network,
        dialling,
        config: setup.config,
        link,
        workers,
        accepts,
        applied: None,
        terms: Terms::default(),
        failures: BTreeMap::new(),
        state: (State::Connecting, Instant::now()),
    };
    let doings = Doings {
        notices,
        happened,
        news,
        questions,
    };
    client.keep_up(started + START_TIME, doings).await
}

/// Waits until the keeper wants an end.
async fn stopped(notices: &mut Notices) -> Ending {
    loop {
        match notices.recv().await {
            Some(Notice::Stop) => return Ending::Asked,
            Some(Notice::Peers(_)) => {}
            None => return Ending::KeeperGone,
        }
    }
}

/// The server as the invite describes it.
fn describe(invite: &Invite, cipher: Cipher, accepts: Offloads) -> Result<Server, String> {
    let trust = invite.pin.map_or(Trust::WebPki, |pin| Trust::Pin(pin.0));
    let name = match invite.server_name() {
        Host::Name(name) => ServerName::try_from(name)
            .map_err(|error| format!("the invite's server name: {error}"))?,
        Host::Ip(address) => ServerName::from(address),
    };
    Ok(Server {
        tls: client_config(trust, cipher).map_err(|error| chain(&error))?,
        name,
        authority: invite.authority(),
        token: invite.token.clone(),
        instance: InstanceId::generate().map_err(|error| error.to_string())?,
        accepts,
    })
}

/// Resolves the server's name, once, before the tunnel is there: later it would go through a tunnel that may be dead.
async fn resolve(invite: &Invite, give_up: Instant) -> Result<Vec<IpAddr>, String> {
    let name = match &invite.host {
        Host::Ip(address) => return Ok(vec![*address]),
        Host::Name(name) => name,
    };
    loop {
        let error = match tokio::time::timeout_at(
            give_up,
            tokio::net::lookup_host((name.as_str(), invite.port)),
        )
        .await
        {
            Ok(Ok(addresses)) => return Ok(addresses.map(|address| address.ip()).collect()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if Instant::now() + RESOLVE_INTERVAL >= give_up {
            return Err(format!("cannot resolve the server's name {name}: {error}"));
        }
        sleep(RESOLVE_INTERVAL).await;
    }
}

/// Without notifications the client still works: it only hears of changes later.
fn watch_network(interface: &str) -> watch::Receiver<()> {
    let watched = nix::net::if_::if_nametoindex(interface)
        .map_err(std::io::Error::from)
        .and_then(|index| network::watch(index, route::PROTOCOL));
    watched.unwrap_or_else(|error| {
        tracing::warn!("cannot watch for network changes: {error}");
        watch::channel(()).1
    })
}

/// What all dialling tasks share.
struct Dialling {
    server: Server,
    candidates: RefCell<Candidates>,
    link: Link,
    progress: mpsc::UnboundedSender<Progress>,
}

/// What a dialling task reports.
enum Progress {
    /// The end of its work: there is no server of that name.
    NotResolved(String),
    /// The end of its work.
    Opened { ordinal: u8, opened: Box<Opened> },
    /// It goes on.
    NotConnected {
        address: SocketAddr,
        error: DialError,
    },
    /// It goes on, unless the error is final.
    NotOpened {
        address: SocketAddr,
        error: OpeningError,
    },
}

/// Finds out where the server is, and then tries as for any other place.
async fn fill_first_place(
    dialling: Rc<Dialling>,
    invite: Invite,
    give_up: Instant,
    network: watch::Receiver<()>,
) {
    match resolve(&invite, give_up).await {
        Ok(addresses) => {
            *dialling.candidates.borrow_mut() = Candidates::new(addresses, invite.port);
            fill_place(dialling, 0, network).await;
        }
        Err(line) => {
            // Nobody listens any longer when the client is about to end.
            let _ = dialling.progress.send(Progress::NotResolved(line));
        }
    }
}

/// Tries until the connection for this place is there.
async fn fill_place(dialling: Rc<Dialling>, ordinal: u8, mut network: watch::Receiver<()>) {
    let report = |progress| {
        // Nobody listens any longer when the client is about to end.
        let _ = dialling.progress.send(progress);
    };
    let mut policy = Reconnect::new(Instant::now().into());
    loop {
        let candidates = dialling.candidates.borrow().clone();
        let (socket, address) = dial(
            &dialling.link,
            &candidates,
            &mut policy,
            &mut network,
            |address, error| {
                report(Progress::NotConnected { address, error });
            },
        )
        .await;
        match open(&dialling.server, ordinal, socket, address).await {
            Ok(opened) => {
                dialling.candidates.borrow_mut().succeeded();
                let opened = Box::new(opened);
                return report(Progress::Opened { ordinal, opened });
            }
            Err(error) => {
                dialling.candidates.borrow_mut().failed(address);
                report(Progress::NotOpened { address, error });
            }
        }
    }
}

/// One connection's place in the session.
#[derive(Default)]
struct Place {
    current: Option<Current>,
    /// A task is looking for the next one.
    dialling: bool,
}

/// The connection that a place has.
struct Current {
    connection: ConnectionRef,
    /// The server's end.
    address: SocketAddr,
    /// A keepalive stays unanswered.
    silent: bool,
    since: Instant,
}

/// The session.
struct Client {
    subject: Subject,
    config: ClientConfig,
    /// HOST:PORT for the user.
    target: String,
    /// The invite's port: what answers there is the server, or in its place.
    port: u16,
    dialling: Rc<Dialling>,
    link: Link,
    network: watch::Receiver<()>,
    workers: Workers,
    accepts: Offloads,
    /// By ordinal.
    places: BTreeMap<u8, Place>,
    terms: Terms,
    /// The terms that the keeper has set the host up for; none before the first connection.
    applied: Option<Terms>,
    /// What went wrong last, by address.
    failures: BTreeMap<SocketAddr, String>,
    /// How the tunnel stands, and since when.
    state: (State, Instant),
}

/// Everything that the session's loop waits for.
struct Doings {
    notices: Notices,
    happened: mpsc::UnboundedReceiver<Event>,
    news: mpsc::UnboundedReceiver<Progress>,
    questions: Questions,
}

impl Client {
    async fn keep_up(
        mut self,
        start_by: Instant,
        Doings {
            mut notices,
            mut happened,
            mut news,
            mut questions,
        }: Doings,
    ) -> Ending {
        let mut network = self.network.clone();
        let mut renew_at: Option<Instant> = None;
        let ending = loop {
            let turn = tokio::select! {
                ending = stopped(&mut notices) => Err(ending),
                Some(progress) = news.recv() => self.progress(progress).await,
                Some(event) = happened.recv() => self.event(event).await,
                Some(question) = questions.recv() => {
                    question.answer(self.report());
                    Ok(())
                }
                () = sleep_until(start_by), if self.applied.is_none() => Err(self.never_started()),
                Ok(()) = network.changed() => {
                    renew_at = Some(Instant::now() + NETWORK_SETTLE_TIME);
                    Ok(())
                }
                () = sleep_until(renew_at.unwrap_or(start_by)), if renew_at.is_some() => {
                    renew_at = None;
                    self.renew_ways().await;
                    Ok(())
                }
            };
            if let Err(ending) = turn {
                break ending;
            }
        };
        self.workers.stop(Some(CloseReason::Shutdown));
        ending
    }

    /// Starts looking for a connection for the place, unless that is going on.
    fn dial(&mut self, ordinal: u8) {
        let place = self.places.entry(ordinal).or_default();
        if !place.dialling {
            place.dialling = true;
            let dialling = Rc::clone(&self.dialling);
            spawn_essential("dial", fill_place(dialling, ordinal, self.network.clone()));
        }
    }

    /// The session has one connection, and wants as many as there are places.
    fn fill_further_places(&mut self) {
        let empty = self
            .places
            .iter()
            .filter(|(_, place)| place.current.is_none());
        let empty: Vec<u8> = empty.map(|(ordinal, _)| *ordinal).collect();
        for ordinal in empty {
            self.dial(ordinal);
        }
    }

    async fn progress(&mut self, progress: Progress) -> Result<(), Ending> {
        match progress {
            Progress::NotResolved(line) => Err(Ending::failed(line)),
            Progress::Opened { ordinal, opened } => self.opened(ordinal, *opened).await,
            Progress::NotConnected { address, error } => {
                self.failed(address, chain(&error));
                Ok(())
            }
            Progress::NotOpened { address, error } => {
                if let Some(reason) = error.final_reason() {
                    return Err(Ending::failed(goodbye(reason)));
                }
                let line = chain(&error);
                if self.applied.is_none() && error.is_hopeless() && address.port() == self.port {
                    return Err(Ending::failed(format!(
                        "cannot connect to {}: {line}",
                        self.target
                    )));
                }
                self.failed(address, line);
                Ok(())
            }
        }
    }

    /// Says why there is no connection, but not the same thing every second.
    fn failed(&mut self, address: SocketAddr, line: String) {
        if self.failures.get(&address) == Some(&line) {
            return;
        }
        match self.applied {
            // Told as one line when the time is over.
            None => tracing::debug!("no connection yet: {address}: {line}"),
            Some(_) => tracing::info!("no connection yet: {address}: {line}"),
        }
        self.failures.insert(address, line);
    }

    fn never_started(&self) -> Ending {
        // What happened on the invite's own port says more than the alternative.
        let own = self
            .failures
            .iter()
            .find(|(address, _)| address.port() == self.port);
        let reason = match own.or_else(|| self.failures.iter().next()) {
            Some((address, line)) if address.to_string() == self.target => line.clone(),
            Some((address, line)) => format!("{address}: {line}"),
            None => "no answer".into(),
        };
        Ending::failed(format!("cannot reach the server {}: {reason}", self.target))
    }

    /// Puts a new connection into its place.
    async fn opened(&mut self, ordinal: u8, opened: Opened) -> Result<(), Ending> {
        self.places.entry(ordinal).or_default().dialling = false;
        let first = self.applied.is_none();
        self.terms = opened.terms;
        let others = self.members().filter(|member| member.ordinal != ordinal);
        let others: Vec<ConnectionRef> = others.map(|member| member.connection).collect();
        let connection = self.workers.allocate(&others, ordinal == SPARSE_ORDINAL);
        self.workers.add(Handoff {
            connection,
            // All connections are to the one server.
            peer: PeerId::default(),
            socket: Arc::new(opened.socket),
            established: opened.established,
            inner_sources: InnerSources::Any,
            offload: opened.offload,
            accepts: self.accepts,
            follows_path: self.config.congestion_control == CongestionControl::Auto,
        });
        let current = Current {
            connection,
            address: opened.address,
            silent: false,
            since: Instant::now(),
        };
        let former = self
            .places
            .entry(ordinal)
            .or_default()
            .current
            .replace(current);
        self.publish_routes();
        // Now, and not before, the host may send packets into the tunnel: the workers know where to put them.
        self.apply_terms().await?;
        if let Some(former) = former {
            self.workers
                .close(former.connection, Some(CloseReason::Replaced));
        }

        if first {
            self.announce(opened.address);
            self.fill_further_places();
        } else if let (State::Reconnecting, since) = self.state {
            tracing::info!(
                "connected again by {} after {} ms",
                opened.address,
                since.elapsed().as_millis()
            );
        }
        if self.state.0 != State::Up {
            self.state = (State::Up, Instant::now());
        }
        self.failures.clear();
        Ok(())
    }

    fn announce(&self, server: SocketAddr) {
        super::log_workers(&self.workers);
        let addresses: Vec<String> = self
            .terms
            .addresses()
            .map(|prefix| prefix.addr().to_string())
            .collect();
        logging::announce(&format!(
            "up: {} on {} by {server}",
            addresses.join(" "),
            self.config.interface
        ));
    }

    /// Has the keeper set the host up for the terms, if they are new.
    async fn apply_terms(&mut self) -> Result<(), Ending> {
        if self.applied.as_ref() == Some(&self.terms) {
            return Ok(());
        }
        let settings = self.terms.settings(self.config.dns.as_deref());
        if settings.block_ipv6 {
            tracing::info!("the server carries no IPv6: it is blocked while the tunnel is up");
        }
        match self.link.configure(settings).await {
            Ok(()) => self.applied = Some(self.terms.clone()),
            Err(error) if self.applied.is_none() => return Err(Ending::failed(chain(&error))),
            Err(error) => tracing::warn!(
                "the server's new settings cannot be applied: {}",
                chain(&error)
            ),
        }
        Ok(())
    }

    async fn event(&mut self, event: Event) -> Result<(), Ending> {
        match event {
            Event::Capsule {
                capsule: Capsule::Close(reason),
                connection,
                ..
            } => {
                if reason.is_final() && self.place_of(connection).is_some() {
                    return Err(Ending::failed(goodbye(reason)));
                }
                tracing::debug!("{}", goodbye(reason));
            }
            Event::Capsule { capsule, .. } => {
                if self.terms.learn(capsule) {
                    self.apply_terms().await?;
                }
            }
            Event::Unresponsive { connection } => {
                if let Some(ordinal) = self.set_silent(connection, true) {
                    tracing::info!("the server is silent: trying a new connection");
                    self.dial(ordinal);
                }
            }
            Event::Responsive { connection } => {
                self.set_silent(connection, false);
            }
            Event::Path { connection, kind } => self.path_is(connection, kind),
            Event::Closed { connection, cause } => self.closed(connection, &cause),
            Event::Fatal { worker, error } => {
                return Err(Ending::failed(format!(
                    "worker {worker} stopped: {}",
                    chain(&error)
                )));
            }
        }
        Ok(())
    }

    /// A keepalive stays unanswered, or the connection is heard from again. Returns the place that has it.
    fn set_silent(&mut self, connection: ConnectionRef, silent: bool) -> Option<u8> {
        let ordinal = self.place_of(connection)?;
        let place = self.places.get_mut(&ordinal)?;
        if let Some(current) = &mut place.current {
            current.silent = silent;
        }
        self.publish_routes();
        Some(ordinal)
    }

    /// Where the number of connections goes by the path.
    fn path_is(&mut self, connection: ConnectionRef, kind: PathKind) {
        if self.config.connections != Connections::Auto || self.place_of(connection).is_none() {
            return;
        }
        let (wanted, found) = match kind {
            PathKind::Ordinary => return,
            PathKind::Fast => {
                // What is gained is the other worker.
                if self.workers.count() > 1 && !self.places.contains_key(&SPARSE_ORDINAL) {
                    tracing::info!(
                        "the path is fast: one more connection, for flows that send little"
                    );
                    self.dial(SPARSE_ORDINAL);
                }
                return;
            }
            PathKind::LongFat => (CONNECTIONS_STRIPED, "holds more than one connection"),
            PathKind::Lossy => (CONNECTIONS_STRIPED, "loses packets"),
            PathKind::Slowed => (CONNECTIONS_SLOWED, "loses packets"),
        };
        let had = self.places.range(..SPARSE_ORDINAL).count();
        if had < wanted {
            tracing::info!("the path {found}: {wanted} connections in place of {had}");
            for ordinal in 0..wanted as u8 {
                self.places.entry(ordinal).or_default();
            }
            self.fill_further_places();
        }
    }

    fn closed(&mut self, connection: ConnectionRef, cause: &CloseCause) {
        self.workers.release(connection);
        let Some(ordinal) = self.place_of(connection) else {
            return;
        };
        let place = self.places.get_mut(&ordinal);
        let current = place.and_then(|place| place.current.take());
        let was_short = current.is_some_and(|current| current.since.elapsed() < KEPT_MIN);
        self.publish_routes();
        if self.places.values().all(|place| place.current.is_none()) {
            self.state = (State::Reconnecting, Instant::now());
        }
        if ordinal == SPARSE_ORDINAL && was_short {
            // The server may be one that has no such connections. The session's next first connection tries again.
            tracing::info!("no connection for flows that send little: {}", ended(cause));
            self.places.remove(&SPARSE_ORDINAL);
            return;
        }
        tracing::info!("connection lost: {}; trying again", ended(cause));
        self.dial(ordinal);
    }

    fn place_of(&self, connection: ConnectionRef) -> Option<u8> {
        let holds = |place: &Place| {
            let current = place.current.as_ref();
            current.is_some_and(|current| current.connection == connection)
        };
        let mut places = self.places.iter();
        places.find_map(|(ordinal, place)| holds(place).then_some(*ordinal))
    }

    /// What `ringtun status` shows of this.
    fn report(&self) -> Report {
        let settings = self.terms.settings(self.config.dns.as_deref());
        let session = crate::status::Session {
            peer: None,
            instance: self.dialling.server.instance.to_string(),
            addresses: settings.addresses.iter().map(IpNet::addr).collect(),
            past: crate::status::Past::default(),
            connections: self
                .members()
                .filter_map(|member| connection(&self.workers, member))
                .collect(),
        };
        let (state, since) = self.state;
        let failures = self.failures.iter();
        let mut report = self.subject.report(&self.workers);
        report.client = Some(crate::status::Client {
            state,
            state_seconds: since.elapsed().as_secs_f64(),
            server: self.target.clone(),
            connections_wanted: self.places.len(),
            addresses: settings.addresses,
            routes: settings.routes,
            // Nothing is blocked before the host has been set up.
            ipv6_blocked: self.applied.is_some() && settings.block_ipv6,
            dns: settings.dns,
            failures: failures
                .map(|(address, line)| format!("{address}: {line}"))
                .collect(),
        });
        report.sessions.push(session);
        report
    }

    /// The connections that there are.
    fn members(&self) -> impl Iterator<Item = Member> {
        self.places.iter().filter_map(|(ordinal, place)| {
            let current = place.current.as_ref()?;
            Some(Member {
                ordinal: *ordinal,
                connection: current.connection,
                silent: current.silent,
            })
        })
    }

    fn publish_routes(&self) {
        let route = SessionRoute::new(SessionId(0), self.members());
        self.workers.set_routes(Arc::new(RouteTable::client(route)));
    }

    /// Has the keeper renew the exception routes of all connections: asking for a socket does.
    async fn renew_ways(&mut self) {
        let mut servers: Vec<IpAddr> = self
            .places
            .values()
            .filter_map(|place| place.current.as_ref())
            .map(|current| current.address.ip())
            .collect();
        servers.dedup();
        for server in servers {
            match self.link.outer_socket(server).await {
                Ok(socket) => drop::<OwnedFd>(socket),
                Err(error) => tracing::debug!("no way to {server} now: {error}"),
            }
        }
    }
}
