//! Looking at the host, by the steps of a start. Nothing of it stays, and nothing running is disturbed.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::SystemTime;

use caps::{CapSet, Capability};
use ipnet::{IpNet, Ipv6Net};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{AccessFlags, access, geteuid};

use super::findings::{
    ClientFound, Clock, FilterTrouble, Findings, NameFound, PortFound, Resolver, Rights,
    RingTrouble, ServerFound, SettingFound, StateFound, Trouble, TunFound, TunTrouble, Uplinks,
};
use super::ports;
use crate::config::{ClientConfig, CongestionControl, ServerConfig};
use crate::control::{self, RehearsalError};
use crate::keeper::firewall::{self, Traffic};
use crate::keeper::plan::{self, Host, ServerNetwork, Step, Tunnel};
use crate::keeper::state::StateDir;
use crate::keeper::{apply, cores, server, undo};
use crate::proto::offload::Offloads;
use crate::sys::congestion;
use crate::sys::dns::{self, Saved};
use crate::sys::nft::{self, NftError};
use crate::sys::route::Netlink;
use crate::sys::socket::{self, ListenError};
use crate::sys::tun::{self, TunError};
use crate::sys::{clock, sandbox, sysctl};
use crate::uring::probe::RingError;
use crate::uring::survey::survey;
use crate::worker::{Rehearsal, WorkerError};

/// The interface for the rehearsal where no other network namespace can be made.
const REHEARSAL_INTERFACE: &str = "rtdoctor";
/// An IPv6 pool for the rehearsal of a server that has none yet.
const REHEARSAL_POOL: Ipv6Net =
    Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0), 64);
/// Who may use io_uring.
const IO_URING_DISABLED: &str = "kernel/io_uring_disabled";
/// The system's own file of the kernel's release.
const RELEASE: &str = "kernel/osrelease";
/// Where the kernel lists the tables of legacy iptables.
const LEGACY_TABLES: [&str; 2] = ["ip_tables_names", "ip6_tables_names"];

/// Looks at everything that the given roles need. Raises this process's own limits, as a daemon does.
pub fn gather(server: Option<&ServerConfig>, client: Option<&ClientConfig>) -> Findings {
    let netlink = Netlink::open().ok();
    let rights = rights(netlink.as_ref());
    sandbox::raise_limits();

    let queues = [
        server.map(|config| config.worker_count(cores())),
        client.map(|config| config.worker_count(cores())),
    ];
    let queues = queues.into_iter().flatten().max().unwrap_or(1);
    let mtu = server.map_or_else(
        || client.map(|config| config.mtu),
        |config| Some(config.mtu),
    );
    let mtu = mtu.unwrap_or(crate::config::MTU_BYTES);

    let observed = netlink.as_ref().map(apply::observe);
    let mut host = observed.and_then(Result::ok).unwrap_or_default();
    let name = server.map_or_else(
        || client.map(|config| config.interface.as_str()),
        |config| Some(config.interface.as_str()),
    );
    let tunnel = tunnel(&host, name.unwrap_or(crate::config::INTERFACE), mtu);
    if !host.interfaces.iter().any(|it| it.name == tunnel.name) {
        host.expect_tunnel(&tunnel);
    }
    let ruleset_json = nft::list_ruleset_json().ok();

    let steps = server.map(|config| steps(config, &host, &tunnel));
    let (tun, filter) = rehearse(&tunnel, queues, steps.as_deref());
    Findings {
        kernel: read_setting(RELEASE).unwrap_or_else(|| "unknown".into()),
        rights,
        rings: rings(queues),
        survey: survey().ok(),
        open_files_max: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
        tun,
        has_bbr: congestion::has_bbr(),
        clock: Clock {
            unix_seconds: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |time| time.as_secs()),
            is_synchronised: clock::is_synchronised(),
        },
        run_directory: not_writable(Path::new(undo::RUN_DIR)),
        uplinks: uplinks(&host, &tunnel),
        strict_reverse_path: strict_reverse_path(&host),
        legacy_iptables: LEGACY_TABLES.iter().any(|table| {
            fs::read_to_string(format!("/proc/thread-self/net/{table}"))
                .is_ok_and(|names| !names.trim().is_empty())
        }),
        server: server.map(|config| ServerFound {
            name: name_found(&config.interface),
            ports: ports(&config.listen, &config.interface),
            filter,
            settings: settings(steps.as_deref().unwrap_or_default(), &host, &tunnel),
            firewalls: ruleset_json.as_deref().map(|json| {
                firewall::on_server(
                    json,
                    &config.interface,
                    &host.egress_names(&tunnel),
                    &config.listen,
                )
            }),
            state: state(config),
            nameservers: config
                .dns
                .clone()
                .unwrap_or_else(dns::shareable_nameservers),
            nameservers_configured: config.dns.is_some(),
        }),
        client: client.map(|config| ClientFound {
            name: name_found(&config.interface),
            firewalls: ruleset_json.as_deref().map(|json| {
                let traffic = Traffic::Outgoing {
                    tunnel: &config.interface,
                    egress: &host.egress_names(&tunnel),
                };
                firewall::blockers(json, &traffic)
            }),
            resolver: resolver(config),
        }),
    }
}

fn read_setting(key: &str) -> Option<String> {
    sysctl::read(key).ok().flatten()
}

fn rights(netlink: Option<&Netlink>) -> Rights {
    let has = |capability| matches!(caps::has_cap(None, CapSet::Effective, capability), Ok(true));
    Rights {
        net_admin: has(Capability::CAP_NET_ADMIN),
        network_is_ours: netlink.is_some_and(Netlink::may_change),
        can_change_user: !geteuid().is_root()
            || (has(Capability::CAP_SETUID) && has(Capability::CAP_SETGID)),
        can_lock_memory: sandbox::may_lock_memory(),
    }
}

fn rings(workers: usize) -> Result<Rehearsal, RingTrouble> {
    control::rehearse(workers).map_err(|error| match error {
        RehearsalError::Worker(WorkerError::Ring(RingError::Denied)) => RingTrouble::Denied {
            setting: read_setting(IO_URING_DISABLED),
        },
        other => RingTrouble::Other(Trouble::told_by(&other)),
    })
}

/// The tunnel's interface as it is, or as it would be.
fn tunnel(host: &Host, name: &str, mtu: u16) -> Tunnel {
    let present = host.interfaces.iter().find(|it| it.name == name);
    Tunnel {
        name: name.to_owned(),
        index: present.map_or(0, |interface| interface.index),
        mtu,
    }
}

/// What a start of the server would do to this host.
fn steps(config: &ServerConfig, host: &Host, tunnel: &Tunnel) -> Vec<Step> {
    let network = ServerNetwork {
        pool_v4: config.pool_v4.trunc(),
        pool_v6: config.pool_v6.unwrap_or(REHEARSAL_POOL).trunc(),
        listen: &config.listen,
        client_to_client: config.client_to_client,
    };
    plan::server(host, tunnel, &network)
}

type Rehearsed = (Result<TunFound, TunTrouble>, Result<(), FilterTrouble>);

/// Makes the interface and puts the rules into force, in a network namespace of a thread that ends with them. Where that is
/// not allowed, an interface of another name is made here for a moment, and the rules are only checked.
fn rehearse(tunnel: &Tunnel, queues: usize, steps: Option<&[Step]>) -> Rehearsed {
    let rulesets = steps.and_then(|steps| {
        steps.iter().find_map(|step| match step {
            Step::Table {
                ruleset, fallback, ..
            } => Some([ruleset, fallback]),
            _ => None,
        })
    });
    thread::scope(|scope| {
        let rehearsal = scope.spawn(|| {
            let is_alone = unshare(CloneFlags::CLONE_NEWNET).is_ok();
            let name = if is_alone {
                &tunnel.name
            } else {
                REHEARSAL_INTERFACE
            };
            let tun = tun::create(name, tunnel.mtu, queues, true);
            let apply = |ruleset: &String| match is_alone {
                true => nft::apply(ruleset),
                false => nft::check(ruleset),
            };
            let filter = rulesets.map_or(Ok(()), |[ruleset, fallback]| {
                apply(ruleset).or_else(|_| apply(fallback))
            });
            (
                tun.map_err(tun_trouble).map(|tun| tun_found(&tun)),
                filter.map_err(filter_trouble),
            )
        });
        rehearsal.join().expect("a rehearsal does not panic")
    })
}

fn tun_found(tun: &tun::Tun) -> TunFound {
    TunFound {
        offloads: Offloads::from_tun_flags(tun.offload_flags),
        queues: tun.queues.len(),
    }
}

fn tun_trouble(error: TunError) -> TunTrouble {
    match error {
        TunError::NotPermitted { .. } => TunTrouble::NotPermitted,
        other => TunTrouble::Other(Trouble::told_by(&other)),
    }
}

fn filter_trouble(error: NftError) -> FilterTrouble {
    match error {
        NftError::Missing => FilterTrouble::Missing(Trouble::told_by(&error)),
        NftError::Refused(reason) if reason.contains("Operation not permitted") => {
            FilterTrouble::NotPermitted
        }
        NftError::Refused(reason) => FilterTrouble::Refused(reason),
        NftError::Run(source) => FilterTrouble::Refused(source.to_string()),
    }
}

fn uplinks(host: &Host, tunnel: &Tunnel) -> Uplinks {
    let names = |is_v4: bool| {
        let mut names: Vec<String> = host
            .default_routes(tunnel)
            .filter(|route| matches!(route.destination, IpNet::V4(_)) == is_v4)
            .filter_map(|route| {
                let of = |it: &&crate::sys::route::Interface| Some(it.index) == route.interface;
                host.interfaces.iter().find(of).map(|it| it.name.clone())
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    Uplinks {
        v4: names(true),
        v6: names(false),
    }
}

/// The kernel takes the larger of an interface's value and that of `all`; 2 is loose.
fn strict_reverse_path(host: &Host) -> Vec<String> {
    let value = |name: &str| {
        read_setting(&sysctl::interface_key("ipv4", name, "rp_filter"))
            .and_then(|value| value.parse::<u8>().ok())
            .unwrap_or(0)
    };
    let all = value("all");
    let outside = host
        .interfaces
        .iter()
        .filter(|interface| !interface.loopback);
    outside
        .filter(|interface| value(&interface.name).max(all) == 1)
        .map(|interface| interface.name.clone())
        .collect()
}

fn name_found(interface: &str) -> NameFound {
    NameFound {
        interface: interface.to_owned(),
        exists: nix::net::if_::if_nametoindex(interface).is_ok(),
        claim: undo::claim_of(interface),
    }
}

/// Opens all at once, as a start does, so that two that exclude each other are found out.
fn ports(addresses: &[SocketAddr], interface: &str) -> Vec<(SocketAddr, PortFound)> {
    let keeper = undo::claim_of(interface)
        .filter(|claim| claim.is_running && claim.is_server)
        .map(|claim| claim.keeper);
    let mut opened = Vec::new();
    let found = addresses.iter().map(|address| {
        let found = match socket::listen(*address, &CongestionControl::Auto) {
            Ok(listener) => {
                opened.push(listener);
                PortFound::Free
            }
            Err(error @ ListenError::Busy { .. }) => {
                let owner = ports::listener(address.port());
                match (keeper, &owner) {
                    (Some(keeper), Some((_, process))) if keeper == *process => {
                        PortFound::Ours { keeper }
                    }
                    _ => PortFound::Busy {
                        owner,
                        trouble: Trouble::told_by(&error),
                    },
                }
            }
            Err(error) => PortFound::Failed(Trouble::told_by(&error)),
        };
        (*address, found)
    });
    found.collect()
}

/// The settings that a start makes, which it fails without.
fn settings(steps: &[Step], host: &Host, tunnel: &Tunnel) -> Vec<SettingFound> {
    let settings = steps.iter().filter_map(|step| match step {
        Step::Setting { key, value } => Some((key, *value)),
        _ => None,
    });
    settings
        .map(|(key, wanted)| {
            // The interface's own are where those of all interfaces are.
            let of_tunnel = format!("/{}/", tunnel.name);
            let stand_in = key.replace(&of_tunnel, "/default/");
            let is_there = read_setting(key).is_some();
            SettingFound {
                key: key.clone(),
                wanted,
                present: host.settings.get(key).cloned(),
                is_writable: sysctl::is_writable(if is_there { key } else { &stand_in }),
            }
        })
        .collect()
}

/// Nothing is made where there is nothing yet.
fn state(config: &ServerConfig) -> Result<StateFound, Trouble> {
    let told = |error: &dyn std::error::Error| Trouble::told_by(error);
    let path = config.state_dir.clone();
    if !StateDir::is_made(&path) {
        return match not_writable(&path) {
            Some(trouble) => Err(trouble),
            None => Ok(StateFound { path, peers: None }),
        };
    }
    let state = StateDir::open(&path).map_err(|error| told(&error))?;
    server::identity(config, &state).map_err(|error| told(&error))?;
    let peers = state.peers().map_err(|error| told(&error))?.len();
    Ok(StateFound {
        path,
        peers: Some(peers),
    })
}

fn resolver(config: &ClientConfig) -> Resolver {
    if config.dns.as_ref().is_some_and(Vec::is_empty) {
        return Resolver::LeftAlone;
    }
    let path = Path::new(dns::RESOLV_CONF);
    let directory = path.parent().unwrap_or(Path::new("/"));
    let may_write = |path: &Path| access(path, AccessFlags::W_OK).is_ok();
    match dns::save(path) {
        Ok(Saved::File(_)) => Resolver::File {
            is_writable: may_write(path),
        },
        Ok(Saved::Link(target)) => Resolver::Link {
            target,
            is_writable: may_write(directory),
        },
        Ok(Saved::Missing) => Resolver::Missing {
            is_writable: may_write(directory),
        },
        Err(error) => Resolver::Unreadable(Trouble::told_by(&error)),
    }
}

/// Whether a directory could not be written, or made with all that leads to it.
fn not_writable(directory: &Path) -> Option<Trouble> {
    let nearest: PathBuf = directory
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
        .into();
    let refusal = if nearest.is_dir() {
        access(&nearest, AccessFlags::W_OK)
            .err()
            .map(io::Error::from)
    } else {
        Some(io::ErrorKind::NotADirectory.into())
    };
    refusal.map(|refusal| Trouble {
        found: format!("{} cannot be written ({refusal})", nearest.display()),
        fix: format!(
            "run as root, with {} on a writable file system",
            directory.display()
        ),
    })
}
