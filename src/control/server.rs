//! The server's control thread: accepts, and keeps tunnels, workers and keeper in step.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::gate::Gate;
use super::runtime::{Listener, spawn};
use super::status::{self, Subject};
use super::tunnels::{Offer, Tunnels};
use super::visitor::{self, House};
use super::{Ending, Rings};
use crate::config::CongestionControl;
use crate::keeper::request::{Notice, ServerSetup};
use crate::keeper::{Link, Notices, SetupFds};
use crate::proto::address_pool::{AddressPool, Lease};
use crate::proto::capsule::IpAddressRange;
use crate::proto::offload::Offloads;
use crate::status::{Report, Role};
use crate::tls::certificate::{Identity, server_config};
use crate::worker::Event;

/// How long to wait after accept(2) failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    let gate = Gate::new(setup.config.limits);
    for (listener, address) in fds.listeners.into_iter().zip(&setup.listeners) {
        match Listener::new(listener) {
            Ok(listener) => spawn(accept(Rc::clone(&house), gate.clone(), listener)),
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
        listeners: setup.listeners.clone(),
        pool_v4: setup.pool_v4.into(),
        pool_v6: setup.pool_v6.into(),
        peers: tunnels.peer_count(),
        ipv6_uplink: setup.ipv6_uplink,
        dns: setup.dns.clone(),
    });
    Some(report)
}

async fn accept(house: Rc<House>, gate: Gate, listener: Listener) {
    loop {
        match listener.accept().await {
            Ok((stream, source)) => match gate.enter(source.ip()) {
                Some(place) => spawn(visitor::serve(Rc::clone(&house), stream, source, place)),
                None => {
                    tracing::debug!("{source}: turned away, too many connections without a tunnel")
                }
            },
            Err(error) if is_passing(&error) => tracing::debug!("accept: {error}"),
            Err(error) => {
                tracing::warn!("cannot accept connections now: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
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
    println!("up: listening on {}", listeners.join(" "));
    if setup.peers.is_empty() {
        tracing::info!("nobody is invited yet: `ringtun invite NAME --host HOST` makes an invite");
    }
    if !setup.ipv6_uplink {
        tracing::info!("this host has no IPv6 default route: clients get IPv4 only");
    }
}
