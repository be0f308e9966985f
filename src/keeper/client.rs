//! What the keeper does for a client.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::apply::Changes;
use super::daemon::{Daemon, Role};
use super::plan::{self, Host, Tunnel};
use super::request::{ClientSetup, Notice, Reply, Request, Setup, TunnelSettings};
use super::signals::Signals;
use super::undo::line;
use super::{KeeperError, begin, cores, finish, guarded, make_interface};
use crate::config::{ClientConfig, CongestionControl};
use crate::invite::Invite;
use crate::sys::route::{self, OwnRoute};
use crate::sys::{congestion, socket};

/// Outer server addresses that may have an exception route at the same time.
const EXCEPTIONS_MAX: usize = 16;

/// Runs a client until it is asked to stop; then the exit code is 0. `config` has been validated.
///
/// # Errors
/// [`KeeperError`]. The host is as before then, too.
pub fn run_client(config: ClientConfig, invite: Invite) -> Result<u8, KeeperError> {
    guarded(|| run(config, invite))
}

fn run(config: ClientConfig, invite: Invite) -> Result<u8, KeeperError> {
    let signals = Signals::block()?;
    let mut changes = begin(&config.interface, None)?;
    let control = changes.record().control_socket()?;
    let origin = changes.record().origin();
    congestion::check(&config.congestion_control)?;
    // Its program is loaded while the interface is made.
    let daemon = Daemon::start()?;
    let queues = config.worker_count(cores());
    let (tun, tunnel) = make_interface(
        &mut changes,
        &config.interface,
        config.mtu,
        queues,
        config.offload,
    )?;
    let mut role = ClientRole {
        congestion: config.congestion_control.clone(),
        dns: config.dns.clone(),
        changes,
        tunnel,
        exceptions: BTreeMap::new(),
    };
    let setup = Setup::Client(Box::new(ClientSetup {
        origin,
        invite: invite.to_string(),
        tun_offload_flags: tun.offload_flags,
        tun_queues: tun.queues.len(),
        config,
    }));
    let mut fds = tun.queues;
    fds.push(control);
    let served = daemon
        .set_up(&setup, fds)
        .and_then(|daemon| daemon.serve(&signals, &mut role));
    finish(served, role.changes)
}

struct ClientRole {
    changes: Changes,
    tunnel: Tunnel,
    // Of the outer sockets.
    congestion: CongestionControl,
    // Nameservers by configuration, in place of the server's.
    dns: Option<Vec<IpAddr>>,
    // Exception routes as last set, by server.
    exceptions: BTreeMap<IpAddr, OwnRoute>,
}

impl ClientRole {
    fn configure(&mut self, mut settings: TunnelSettings) -> Result<(), String> {
        if let Some(dns) = &self.dns {
            settings.dns.clone_from(dns);
        }
        let host = self.changes.observe().map_err(line)?;
        let wanted = plan::client(&host, &self.tunnel, &settings)?;
        self.changes.reach(&self.tunnel, &wanted).map_err(line)
    }

    fn outer_socket(&mut self, server: IpAddr) -> Result<OwnedFd, String> {
        self.refresh_exception(server)?;
        socket::outer(server, &self.congestion)
            .map_err(|error| format!("cannot make a socket to {server}: {error}"))
    }

    /// The network may be another one by now, so the way is looked up anew each time.
    fn refresh_exception(&mut self, server: IpAddr) -> Result<(), String> {
        let host = Host {
            routes: self.changes.routes().map_err(line)?,
            ..Host::default()
        };
        let wanted = plan::exception(&host, &self.tunnel, server)?;
        let present = self.exceptions.get(&server).cloned();
        let in_force = |wanted: &OwnRoute| {
            host.routes.iter().any(|route| {
                route.protocol == route::PROTOCOL && route.destination == wanted.destination
            })
        };
        match (wanted, present) {
            (None, None) => Ok(()),
            (None, Some(present)) => {
                self.exceptions.remove(&server);
                self.changes.delete_route(&present)
            }
            (Some(wanted), Some(present)) if wanted == present && in_force(&wanted) => Ok(()),
            (Some(wanted), Some(_)) => {
                self.changes.change_route(&wanted).map_err(line)?;
                self.exceptions.insert(server, wanted);
                Ok(())
            }
            (Some(_), None) if self.exceptions.len() >= EXCEPTIONS_MAX => {
                Err(format!("more than {EXCEPTIONS_MAX} server addresses"))
            }
            (Some(wanted), None) => {
                self.changes.add_route(&wanted).map_err(line)?;
                self.exceptions.insert(server, wanted);
                Ok(())
            }
        }
    }
}

impl Role for ClientRole {
    fn answer(&mut self, request: Request) -> (Reply, Option<OwnedFd>) {
        let result = match request {
            Request::OuterSocket { server } => self.outer_socket(server).map(Some),
            Request::Configure(settings) => self.configure(settings).map(|()| None),
            _ => Err("a client's daemon does not ask for this".into()),
        };
        match result {
            Ok(None) => (Reply::Done, None),
            Ok(Some(socket)) => (Reply::Socket, Some(socket)),
            Err(error) => (Reply::Error(error), None),
        }
    }

    fn watched(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn notice(&mut self) -> Option<Notice> {
        None
    }

    fn reload(&mut self) -> Option<Notice> {
        tracing::info!("SIGHUP: a client has nothing to reload");
        None
    }
}
