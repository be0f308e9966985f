//! What the keeper does for a server.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::{Ipv4Net, Ipv6Net};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use socket2::SockRef;

use super::daemon::{Daemon, Role};
use super::plan::{self, ServerNetwork};
use super::request::{Notice, Peer, Reply, Request, SavedLease, ServerSetup, Setup};
use super::signals::Signals;
use super::state::{PEERS_FILE, StateDir, StateError};
use super::undo::line;
use super::{KeeperError, begin, cores, finish, firewall, guarded, make_interface, ruleset};
use crate::config::{NAMESERVERS_MAX, ServerConfig};
use crate::sys::socket::{self, ListenError};
use crate::sys::{congestion, dns, nft};
use crate::tls::certificate::Identity;

/// How long the listening ports of a daemon that was killed may take to become free.
const LEFTOVER_PORTS_TIMEOUT: Duration = Duration::from_secs(2);
const LEFTOVER_PORTS_INTERVAL: Duration = Duration::from_millis(20);
/// How long the rules outlive the daemon.
///
/// Without them the host itself answers what still arrives for the clients' connections, by a reset, and no download
/// survives a restart of the server. After this much time everything on its way has arrived, and the remote hosts'
/// retransmissions too that come 200 and 600 ms after the last answer; the next is due after 1400 ms, when a new server
/// should be there.
const NAT_LINGER: Duration = Duration::from_millis(650);

/// Runs a server until it is asked to stop; then the exit code is 0. `config` has been validated.
///
/// # Errors
/// [`KeeperError`]. The host is as before then, too.
pub fn run_server(config: ServerConfig) -> Result<u8, KeeperError> {
    guarded(|| run(config))
}

fn run(mut config: ServerConfig) -> Result<u8, KeeperError> {
    let signals = Signals::block()?;
    // A killed predecessor's rules stay until ours replace them, all at once: see NAT_LINGER.
    let table = ruleset::table_name(&config.interface);
    let mut changes = begin(&config.interface, Some(&table))?;
    let control = changes.record().control_socket()?;
    nft::check_installed()?;
    let state = StateDir::open(&config.state_dir)?;
    // As commands that change it will call it, wherever they run.
    config.state_dir = fs::canonicalize(state.path())
        .map_err(|error| KeeperError::Process("find the state directory", error))?;
    let identity = identity(&config, &state)?;
    let listeners = Listeners::open(&config, changes.found_leftovers())?;

    let queues = config.worker_count(cores());
    let (tun, tunnel) = make_interface(
        &mut changes,
        &config.interface,
        config.mtu,
        queues,
        config.offload,
    )?;
    let pool_v4 = config.pool_v4.trunc();
    let pool_v6 = config.pool_v6.unwrap_or(state.pool_v6()).trunc();
    let host = changes.observe()?;
    let network = ServerNetwork {
        pool_v4,
        pool_v6,
        listen: &config.listen,
        client_to_client: config.client_to_client,
    };
    changes.reach(&tunnel, &plan::server(&host, &tunnel, &network))?;
    warn_of_other_firewalls(&tunnel.name, &config.listen, &host.egress_names(&tunnel));

    // Watched before it is read, so that no change is missed.
    let mut role = ServerRole {
        watch: PeersWatch::new(state.path())?,
        had_peers_file: state.has_peers_file(),
        failure: None,
        state,
        pool_v4,
        pool_v6,
    };
    let setup = Setup::Server(Box::new(ServerSetup {
        origin: changes.record().origin(),
        tun_offload_flags: tun.offload_flags,
        tun_queues: tun.queues.len(),
        listeners: config.listen.clone(),
        certificate_chain: identity.chain.iter().map(|der| der.to_vec()).collect(),
        private_key: identity.key.secret_der().to_vec(),
        pool_v4,
        pool_v6,
        peers: role.start_peers()?,
        leases: role.state.leases()?,
        dns: config.dns.clone().unwrap_or_else(|| {
            let mut nameservers = dns::shareable_nameservers();
            nameservers.truncate(NAMESERVERS_MAX);
            nameservers
        }),
        ipv6_uplink: host.has_ipv6_uplink(&tunnel),
        config,
    }));
    let mut fds = tun.queues;
    fds.extend(listeners.duplicates()?);
    fds.push(control);
    let served = Daemon::start()?
        .set_up(&setup, fds)?
        .serve(&signals, &mut role);
    drop(listeners);
    if matches!(served, Ok(()) | Err(KeeperError::DaemonDied(_))) {
        signals.pause(NAT_LINGER);
    }
    finish(served, changes)
}

/// The operator's certificate, or the generated one.
pub(crate) fn identity(config: &ServerConfig, state: &StateDir) -> Result<Identity, KeeperError> {
    let (Some(certificate), Some(key)) = (&config.certificate, &config.private_key) else {
        return Ok(state.identity()?);
    };
    let read = |path: &Path| {
        fs::read(path).map_err(|source| KeeperError::Certificate {
            path: path.display().to_string(),
            source: source.into(),
        })
    };
    Identity::from_pem(&read(certificate)?, &read(key)?)
        .map_err(|source| KeeperError::certificate(certificate, source))
}

/// A warning only: the operator may be about to fix it, and rules change while we run. `ringtun doctor` says the same.
fn warn_of_other_firewalls(tunnel: &str, listen: &[SocketAddr], egress: &[String]) {
    match nft::list_ruleset_json() {
        Ok(json) => {
            let certain = firewall::on_server(&json, tunnel, egress, listen);
            for blocker in certain.iter().filter(|blocker| blocker.certain) {
                tracing::warn!("{blocker}");
            }
        }
        Err(error) => tracing::debug!("cannot look at other firewalls: {}", line(error)),
    }
}

/// Listening sockets. When dropped they stop listening at once, even where a dead daemon's ring still holds them.
struct Listeners(Vec<OwnedFd>);

impl Listeners {
    fn open(config: &ServerConfig, may_be_leftovers: bool) -> Result<Self, KeeperError> {
        congestion::check(&config.congestion_control)?;
        let deadline = Instant::now() + LEFTOVER_PORTS_TIMEOUT;
        let mut listeners = Vec::new();
        for address in &config.listen {
            let listener = loop {
                match socket::listen(*address, &config.congestion_control) {
                    Err(ListenError::Busy { .. })
                        if may_be_leftovers && Instant::now() < deadline =>
                    {
                        thread::sleep(LEFTOVER_PORTS_INTERVAL);
                    }
                    result => break result?,
                }
            };
            listeners.push(listener);
        }
        Ok(Listeners(listeners))
    }

    fn duplicates(&self) -> Result<Vec<OwnedFd>, KeeperError> {
        self.0
            .iter()
            .map(|listener| listener.try_clone())
            .collect::<Result<_, _>>()
            .map_err(|source| KeeperError::Process("duplicate a listening socket", source))
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for listener in &self.0 {
            let _ = SockRef::from(listener).shutdown(std::net::Shutdown::Both);
        }
    }
}

struct ServerRole {
    watch: PeersWatch,
    /// Then its absence is an error, and not the time before the first invite.
    had_peers_file: bool,
    /// Why the list of peers could not be read the last time; it is logged once.
    failure: Option<String>,
    state: StateDir,
    pool_v4: Ipv4Net,
    pool_v6: Ipv6Net,
}

/// Why the peers stay as they are.
#[derive(Debug, thiserror::Error)]
enum PeersError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{} is missing: restore it from a backup", .0.display())]
    Missing(PathBuf),
}

impl ServerRole {
    /// For the start, where the list may be missing.
    fn start_peers(&self) -> Result<Vec<Peer>, StateError> {
        Ok(self.state.peers()?.into_iter().map(Peer::from).collect())
    }

    fn all_peers(&mut self) -> Result<Vec<Peer>, PeersError> {
        let peers = self.state.peers()?;
        let has_file = self.state.has_peers_file();
        if self.had_peers_file && !has_file {
            return Err(PeersError::Missing(self.state.path().join(PEERS_FILE)));
        }
        self.had_peers_file = has_file;
        Ok(peers.into_iter().map(Peer::from).collect())
    }

    /// The list as it is now. One that is damaged or gone changes nothing: nobody loses the connection by a full disk,
    /// a slip of the keyboard, or an editor that is half way.
    fn read_peers(&mut self) -> Option<Vec<Peer>> {
        match self.all_peers() {
            Ok(peers) => {
                if self.failure.take().is_some() {
                    tracing::info!("the list of peers can be read again");
                }
                Some(peers)
            }
            Err(error) => {
                let line = line(error);
                if self.failure.as_ref() != Some(&line) {
                    tracing::error!("the peers stay as they were: {line}");
                }
                self.failure = Some(line);
                None
            }
        }
    }

    fn save_leases(&self, leases: &[SavedLease]) -> Result<(), String> {
        let is_ours = |lease: &SavedLease| {
            self.pool_v4.contains(&lease.v4) && self.pool_v6.contains(&lease.v6)
        };
        if !leases.iter().all(is_ours) {
            return Err("these addresses are not in the pool".into());
        }
        self.state.save_leases(leases).map_err(line)
    }
}

impl Role for ServerRole {
    fn answer(&mut self, request: Request) -> (Reply, Option<OwnedFd>) {
        let result = match request {
            Request::Ready => Ok(()),
            Request::SaveLeases(leases) => self.save_leases(&leases),
            _ => Err("a server's daemon does not ask for this".into()),
        };
        (result.map_or_else(Reply::Error, |()| Reply::Done), None)
    }

    fn watched(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.inotify.as_fd())
    }

    fn notice(&mut self) -> Option<Notice> {
        if !self.watch.take() {
            return None;
        }
        self.read_peers().map(Notice::Peers)
    }

    fn reload(&mut self) -> Option<Notice> {
        if let Err(error) = self.watch.renew(self.state.path()) {
            tracing::error!("changes of the peers go unnoticed: {}", line(error));
        }
        // One that is still damaged is told again.
        self.failure = None;
        let peers = self.read_peers()?;
        tracing::info!("SIGHUP: the peers are read again, {} of them", peers.len());
        Some(Notice::Peers(peers))
    }
}

/// Watches the state directory for changes of the list of peers.
struct PeersWatch {
    inotify: Inotify,
}

impl PeersWatch {
    fn new(directory: &Path) -> Result<Self, KeeperError> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(|error| KeeperError::Process("watch the state directory", error.into()))?;
        let watch = PeersWatch { inotify };
        watch.renew(directory)?;
        Ok(watch)
    }

    /// Watches the directory that is there now. Watching the same one twice is harmless.
    fn renew(&self, directory: &Path) -> Result<(), KeeperError> {
        let changes = AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_DELETE;
        self.inotify
            .add_watch(directory, changes)
            .map(drop)
            .map_err(|error| KeeperError::Process("watch the state directory", error.into()))
    }

    /// Whether the list may have changed since the last call.
    fn take(&self) -> bool {
        // IN_IGNORED: the directory itself is gone. IN_Q_OVERFLOW: events were lost.
        let unknown = AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_Q_OVERFLOW;
        let mut changed = false;
        while let Ok(events) = self.inotify.read_events() {
            changed |= events.iter().any(|event| {
                event.mask.intersects(unknown)
                    || event.name.as_deref().is_some_and(|name| name == PEERS_FILE)
            });
        }
        changed
    }
}
