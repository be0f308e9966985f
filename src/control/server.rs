//! The server's control thread: accepts, and keeps tunnels, workers and keeper in step.

use std::cell::RefCell;
use std::collections::HashSet;
use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::connection_limiter::ConnectionLimiter;
use super::handshake_rate::HandshakeRate;
use super::log_limit::{LOG_INTERVAL, LogLimit};
use super::runtime::{Listener, spawn, spawn_essential};
use super::status::{self, Subject};
use super::tunnels::{Offer, Tunnels};
use super::visitor::{self, House};
use super::{Ending, Rings};
use crate::config::CongestionControl;
use crate::keeper::request::{Notice, ServerSetup};
use crate::keeper::{Link, Notices, SetupFds};
use crate::logging;
use crate::proto::address_pool::{AddressPool, Lease};
use crate::proto::capsule::IpAddressRange;
use crate::proto::offload::Offloads;
use crate::status::{Report, Role};
use crate::tls::certificate::{Identity, server_config};
use crate::worker::Event;

/// How long to wait after accept(2) failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long to wait after connections were evicted for that: their descriptors are closed in a
/// moment, and some are left for connections that become tunnels.
const EVICTION_PAUSE: Duration = Duration::from_millis(10);
/// What happens in this time after a first eviction goes into the same log line.
const PRESSURE_TIME: Duration = Duration::from_secs(1);
const _: () = assert!(PRESSURE_TIME.as_millis() < LOG_INTERVAL.as_millis());

/// Serves until the keeper says stop or something fails.
pub async fn run(
    setup: ServerSetup,
    fds: SetupFds,
    rings: Rings,
    link: Link,
    mut notices: Notices,
) -> Ending {
    let mut questions = match status::serve(fds.control) {
        Ok(questions) => questions,
        Err(error) => return Ending::failed(format!("cannot serve the control socket: {error}")),
    };
    let (events, mut happened) = mpsc::unbounded_channel();
    let house = match open(&setup, fds.tun_queues, rings, link.clone(), &events) {
        Ok(house) => Rc::new(house),
        Err(ending) => return ending,
    };
    spawn(log_pressure(house.limiter.clone()));
    for (listener, address) in fds.listeners.into_iter().zip(&setup.listeners) {
        match Listener::new(listener) {
            Ok(listener) => {
                spawn_essential("accept", accept(Rc::clone(&house), listener));
            }
            Err(error) => return Ending::failed(format!("cannot accept on {address}: {error}")),
        }
    }
    if link.ready().await.is_err() {
        return Ending::KeeperGone;
    }
    house.tunnels.borrow_mut().log_workers();
    announce(&setup);
    let subject = Subject::new(
        Role::Server,
        &setup.config.interface,
        setup.config.mtu,
        &setup.origin,
        setup.config.io,
        house.offer.accepts,
    );

    let ending = loop {
        tokio::select! {
            notice = notices.recv() => match notice {
                Some(Notice::Peers(peers)) => house.tunnels.borrow_mut().set_peers(peers),
                Some(Notice::Stop) => break Ending::Asked,
                None => break Ending::KeeperGone,
            },
            Some(question) = questions.recv() => {
                if let Some(report) = report(&setup, &house, &subject) {
                    question.answer(report);
                }
            }
            Some(event) = happened.recv() => match event {
                Event::Capsule { connection, capsule, permit } => {
                    house.tunnels.borrow_mut().received(connection, &capsule);
                    drop(permit);
                }
                Event::Closed { connection, cause } => house.tunnels.borrow_mut().closed(connection, &cause),
                // The client has the same clock and makes a new one; meanwhile the others have the silent one's flows.
                Event::Unresponsive { connection } => house.tunnels.borrow_mut().set_silent(connection, true),
                Event::Responsive { connection } => house.tunnels.borrow_mut().set_silent(connection, false),
                // How many connections it wants is up to the client.
                Event::Path { .. } => {}
                Event::Fatal { worker, error } => {
                    break Ending::failed(format!("worker {worker} stopped: {}", super::chain(&error)));
                }
            },
        }
    };
    house.tunnels.borrow_mut().stop();
    ending
}

/// Everything that a visitor needs, and the workers.
fn open(
    setup: &ServerSetup,
    tun_queues: Vec<OwnedFd>,
    rings: Rings,
    link: Link,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<House, Ending> {
    let identity = Identity {
        chain: setup
            .certificate_chain
            .iter()
            .cloned()
            .map(CertificateDer::from)
            .collect(),
        key: PrivateKeyDer::try_from(setup.private_key.clone())
            .map_err(|error| Ending::failed(format!("the private key cannot be used: {error}")))?,
    };
    let tls = server_config(identity, setup.config.cipher)
        .map_err(|error| Ending::failed(super::chain(&error)))?;
    let pool = pool(setup)?;
    let accepts = Offloads::from_tun_flags(setup.tun_offload_flags);
    let workers = rings
        .start_workers(tun_queues, accepts, events)
        .map_err(|error| Ending::failed(super::chain(&error)))?;
    let mut routes = vec![IpAddressRange::everything_v4()];
    if setup.ipv6_uplink {
        routes.push(IpAddressRange::everything_v6());
    }
    Ok(House {
        tls,
        offer: Offer {
            routes,
            dns: setup.dns.clone(),
            accepts,
        },
        link,
        tunnels: RefCell::new(Tunnels::new(
            workers,
            accepts,
            setup.config.congestion_control == CongestionControl::Auto,
            pool,
            setup.peers.clone(),
        )),
        limiter: ConnectionLimiter::new(setup.config.limits),
        handshake_rate: RefCell::new(HandshakeRate::new(
            setup.config.limits.handshakes_per_second,
        )),
    })
}

/// The pool with the leases of all peers that there still are.
fn pool(setup: &ServerSetup) -> Result<AddressPool, Ending> {
    let mut pool = AddressPool::new(setup.pool_v4, setup.pool_v6)
        .map_err(|error| Ending::failed(error.to_string()))?;
    let invited: HashSet<&str> = setup.peers.iter().map(|peer| &peer.name[..]).collect();
    for saved in &setup.leases {
        if !invited.contains(&saved.peer[..]) {
            continue;
        }
        let lease = Lease {
            v4: saved.v4,
            v6: saved.v6,
        };
        if let Err(error) = pool.restore(&saved.peer, lease) {
            tracing::warn!(
                "{} will get other addresses than before: {error}",
                saved.peer
            );
        }
    }
    Ok(pool)
}

fn report(setup: &ServerSetup, house: &House, subject: &Subject) -> Option<Report> {
    let tunnels = house.tunnels.borrow();
    let mut report = tunnels.report(subject)?;
    report.server = Some(crate::status::Server {
        state_dir: setup.config.state_dir.clone(),
        listeners: setup.listeners.clone(),
        pool_v4: setup.pool_v4.into(),
        pool_v6: setup.pool_v6.into(),
        peers: tunnels.peer_count(),
        ipv6_uplink: setup.ipv6_uplink,
        dns: setup.dns.clone(),
        unauthenticated: house.limiter.counts(),
    });
    Some(report)
}

async fn accept(house: Rc<House>, listener: Listener) -> Infallible {
    let mut failures = LogLimit::default();
    loop {
        let error = match listener.accept().await {
            Ok((stream, source)) => {
                match house.limiter.admit(source.ip()) {
                    Some(permit) => {
                        spawn(visitor::serve(Rc::clone(&house), stream, source, permit));
                    }
                    None => tracing::debug!("{source}: refused, too many are about to connect"),
                }
                continue;
            }
            Err(error) if is_passing(&error) => {
                tracing::debug!("accept: {error}");
                continue;
            }
            Err(error) => error,
        };
        if let Some(times) = failures.event(Instant::now()) {
            tracing::warn!("cannot accept connections now ({times} times): {error}");
        }
        let is_evicted = is_shortage(&error)
            && listener.is_waited_for()
            && house.limiter.evict_for_shortage() > 0;
        let pause = if is_evicted {
            EVICTION_PAUSE
        } else {
            ACCEPT_PAUSE
        };
        sleep(pause).await;
    }
}

/// Says in the log, once in [`LOG_INTERVAL`] at most, that connections were evicted or their
/// handshakes had to wait.
async fn log_pressure(limiter: ConnectionLimiter) {
    let mut told = limiter.counts();
    loop {
        limiter.pressure().await;
        sleep(PRESSURE_TIME).await;
        let counts = limiter.counts();
        let fullest = limiter
            .fullest_network()
            .map(|network| format!(", {} of them from {}", network.connections, network.prefix));
        tracing::warn!(
            "many unauthenticated connections: {} evicted, {} refused, \
             {} handshakes delayed, {} dropped; {} connected{}",
            counts.evicted() - told.evicted(),
            counts.refused - told.refused,
            counts.handshakes_delayed - told.handshakes_delayed,
            counts.handshakes_dropped - told.handshakes_dropped,
            counts.connected,
            fullest.unwrap_or_default(),
        );
        told = counts;
        sleep(LOG_INTERVAL - PRESSURE_TIME).await;
    }
}

/// The process or the host has no descriptors or memory left.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
    )
}

/// The connection was gone before it was accepted; the next one is none the worse.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

fn announce(setup: &ServerSetup) {
    let listeners: Vec<String> = setup.listeners.iter().map(ToString::to_string).collect();
    logging::announce(&format!("up: listening on {}", listeners.join(" ")));
    if setup.peers.is_empty() {
        tracing::info!("nobody is invited yet: `ringtun invite NAME --host HOST` makes an invite");
    }
    if !setup.ipv6_uplink {
        tracing::info!("this host has no IPv6 default route: clients get IPv4 only");
    }
}
