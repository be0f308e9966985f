//! The lab itself: hosts, links, addresses and services.
//!
//! ```text
//!   client  192.168.77.2 ─┐                                             ┌─ server 198.51.100.10
//!             fd77::2     ├─ firewall ──────── 192.0.2.0/24 ── internet ┤         2001:db8:51::10
//!   client2 192.168.77.3 ─┘  192.168.77.1      2001:db8:2::/64          └─ web    203.0.113.80
//!             fd77::3        192.0.2.2                                            2001:db8:113::80
//! ```
//!
//! Between firewall and internet there is a plain link, or a [`wire`] that is slow, far away or unreliable:
//! [`Topology::wire`].
//!
//! The firewall masquerades both families. `server` has the machine's usual Linux defaults: it forwards
//! nothing until somebody tells it to. Its nameserver is `web`, where every name leads to `web`; the LAN has a
//! nameserver that does not answer. `web` answers with the source address that it sees on
//! [`WEB_TCP_PORTS`] and [`WEB_UDP_PORTS`], and runs iperf3 on [`WEB_IPERF_PORT`], which the firewall blocks,
//! and on port 443 of [`WEB_SPEED_V4`], which it lets through.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::firewall::{self, Policy};
use crate::host::Host;
use crate::link::{self, End, LinkError};
use crate::netns::{Ender, Namespace, NamespaceError, ProcessTree};
use crate::probe::{Responder, ResponderError};
use crate::process::{Process, ProcessError};
use crate::wire::{self, FAR_ADDRESS, NEAR_ADDRESS, Wire, WireError};

/// `client`, on the LAN.
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
/// `client`, on the LAN.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);
/// `client2`, on the LAN.
pub const CLIENT2_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 3);
/// `client2`, on the LAN.
pub const CLIENT2_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 3);
/// `firewall` as the LAN sees it: its default gateway.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
/// `firewall` as the LAN sees it: its default gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// `firewall` as the internet sees it, and with it the clients.
pub const FIREWALL_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// `firewall` as the internet sees it, and with it the clients.
pub const FIREWALL_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
/// `server`.
pub const SERVER_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// `server`.
pub const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 0x10);
/// `web`.
pub const WEB_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// `web`.
pub const WEB_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x80);
/// `web`'s second address, on whose port 443 iperf3 can be reached through the firewall.
pub const WEB_SPEED_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 81);
/// `web`'s TCP ports that answer with the source address.
pub const WEB_TCP_PORTS: [u16; 5] = [22, 80, 443, 1194, 8080];
/// `web`'s UDP ports that answer with the source address.
pub const WEB_UDP_PORTS: [u16; 4] = [53, 443, 1194, 51820];
/// `web`'s iperf3, on every address.
pub const WEB_IPERF_PORT: u16 = 5201;

const INTERNET_TO_FIREWALL: [IpNet; 2] = [
    v4([192, 0, 2, 1], 24),
    v6([0x2001, 0xdb8, 2, 0, 0, 0, 0, 1]),
];
const INTERNET_TO_SERVER: [IpNet; 2] = [
    v4([198, 51, 100, 1], 24),
    v6([0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 1]),
];
const INTERNET_TO_WEB: [IpNet; 2] = [
    v4([203, 0, 113, 1], 24),
    v6([0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 1]),
];
const PREFIX_V6: u8 = 64;
/// How long a program of the lab's own may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// What an iperf3 server says before each test.
const IPERF3_LISTENS: &str = "Server listening";
/// How long it may take to learn that a test is over.
const IPERF3_LIMIT: Duration = Duration::from_secs(30);

/// What stands between the clients and the internet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Topology {
    /// A firewall that lets out TCP 80 and 443 and nothing else.
    #[default]
    Nat,
    /// The same, and what is not TLS on 443 or HTTP on 80 is dropped.
    Dpi,
    /// 100 Mbit/s, 40 ms round trip, 1 % random loss
    Lossy,
    /// 500 Mbit/s, 100 ms round trip
    LongFat,
    /// 20 Mbit/s, 40 ms round trip, a queue of 1 MB at the bottleneck
    Bufferbloat,
    /// Rate and delay that change over time, short stalls, losses in bursts
    Mobile,
    /// 20 ms round trip, and a link that can be cut and mended
    Outage,
}

impl Topology {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// The wire between firewall and internet, where that is no plain link. Its near end is the firewall's.
    #[must_use]
    pub fn wire(self) -> Option<wire::Plan> {
        match self {
            Topology::Nat | Topology::Dpi => None,
            Topology::Lossy => Some(wire::paths::lossy()),
            Topology::LongFat => Some(wire::paths::long_fat()),
            Topology::Bufferbloat => Some(wire::paths::bufferbloat()),
            Topology::Mobile => Some(wire::paths::mobile()),
            Topology::Outage => Some(wire::paths::outage()),
        }
    }
}

/// A running lab. Dropping it ends its processes and removes everything; so does the end of the process that
/// holds it, however it comes.
#[derive(Debug)]
pub struct Lab {
    // Fields are dropped in this order: services, the process tree with all processes, then what joins the hosts, then
    // their namespaces.
    services: Services,
    processes: ProcessTree,
    wire: Option<Wire>,
    hosts: Vec<Host>,
}

#[derive(Debug)]
struct Services {
    _responder: Responder,
    iperf3: Vec<Process>,
}

/// Why there is no lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// No namespaces, or none that work.
    #[error("a lab host could not be made")]
    Namespace(#[from] NamespaceError),
    /// A link is missing.
    #[error("the lab's network could not be made")]
    Link(#[from] LinkError),
    /// A wire is missing.
    #[error("the lab's wire could not be made")]
    Wire(#[from] WireError),
    /// A program failed.
    #[error("a program that the lab needs failed (ci/setup installs them)")]
    Process(#[from] ProcessError),
    /// The web host does not answer.
    #[error("the web host could not be started")]
    Responder(#[from] ResponderError),
}

impl Lab {
    /// Builds a lab: a fraction of a second.
    ///
    /// # Errors
    /// When the caller is neither root nor root of a user namespace, or a program that the lab needs
    /// (`mount`, `nft`, `iperf3`) is missing.
    pub fn build(topology: Topology) -> Result<Lab, LabError> {
        let processes = ProcessTree::new()?;
        let host =
            |name: &str| Namespace::new(&processes).map(|namespace| Host::new(name, namespace));
        let client = host("client")?;
        let client2 = host("client2")?;
        let firewall = host("firewall")?;
        let internet = host("internet")?;
        let server = host("server")?;
        let web = host("web")?;

        for host in [&client, &client2, &firewall, &internet, &server, &web] {
            link::set_up(host.namespace(), "lo", &[])?;
            // For the link-local addresses: until they are known to be unique, a router asks no neighbours.
            host.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        }
        join((&client, "eth0"), (&firewall, "lan-client"))?;
        join((&client2, "eth0"), (&firewall, "lan-client2"))?;
        let outside = (&firewall, firewall::WAN);
        let inside = (&internet, "firewall");
        let wire = match topology.wire() {
            None => join(outside, inside).map(|()| None)?,
            Some(plan) => Some(Wire::join(end(outside), end(inside), &plan)?),
        };
        join((&server, "eth0"), (&internet, "server"))?;
        join((&web, "eth0"), (&internet, "web"))?;

        link::bridge(
            firewall.namespace(),
            firewall::LAN,
            &["lan-client", "lan-client2"],
        )?;
        link::set_up(
            firewall.namespace(),
            firewall::LAN,
            &subnet(GATEWAY_V4, GATEWAY_V6),
        )?;
        link::set_up(internet.namespace(), "firewall", &INTERNET_TO_FIREWALL)?;
        link::set_up(internet.namespace(), "server", &INTERNET_TO_SERVER)?;
        link::set_up(internet.namespace(), "web", &INTERNET_TO_WEB)?;
        let gateway = [GATEWAY_V4.into(), GATEWAY_V6.into()];
        attach(&client, "eth0", &subnet(CLIENT_V4, CLIENT_V6), gateway)?;
        attach(&client2, "eth0", &subnet(CLIENT2_V4, CLIENT2_V6), gateway)?;
        let outside_addresses = subnet(FIREWALL_V4, FIREWALL_V6);
        attach(
            &firewall,
            firewall::WAN,
            &outside_addresses,
            INTERNET_TO_FIREWALL.map(|net| net.addr()),
        )?;
        let server_addresses = subnet(SERVER_V4, SERVER_V6);
        attach(
            &server,
            "eth0",
            &server_addresses,
            INTERNET_TO_SERVER.map(|net| net.addr()),
        )?;
        let mut web_addresses = subnet(WEB_V4, WEB_V6).to_vec();
        web_addresses.push(v4(WEB_SPEED_V4.octets(), 24));
        attach(
            &web,
            "eth0",
            &web_addresses,
            INTERNET_TO_WEB.map(|net| net.addr()),
        )?;

        if wire.is_some() {
            introduce(&firewall, firewall::WAN, INTERNET_TO_FIREWALL, FAR_ADDRESS)?;
            introduce(&internet, "firewall", outside_addresses, NEAR_ADDRESS)?;
        }

        // Where br_netfilter is there, frames between the clients would pass the firewall's rules, too.
        for key in [
            "net/bridge/bridge-nf-call-iptables",
            "net/bridge/bridge-nf-call-ip6tables",
        ] {
            if firewall
                .namespace()
                .run(|| Path::new("/proc/sys").join(key).exists())?
            {
                firewall.sysctl(key, "0")?;
            }
        }
        for router in [&firewall, &internet] {
            router.sysctl("net/ipv4/ip_forward", "1")?;
            router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        firewall::apply(
            &firewall,
            match topology {
                Topology::Dpi => Policy::Inspection,
                _ => Policy::Ports,
            },
        )?;
        for (host, nameserver) in [
            (&client, GATEWAY_V4),
            (&client2, GATEWAY_V4),
            (&server, WEB_V4),
            (&web, WEB_V4),
        ] {
            host.write_file("/etc/resolv.conf", format!("nameserver {nameserver}\n"))?;
        }

        let services = Services {
            _responder: Responder::start(
                &web,
                &[WEB_V4.into(), WEB_V6.into()],
                &WEB_TCP_PORTS,
                &WEB_UDP_PORTS,
            )?,
            iperf3: vec![
                iperf3(&web, &["-p", &WEB_IPERF_PORT.to_string()])?,
                iperf3(&web, &["-p", "443", "-B", &WEB_SPEED_V4.to_string()])?,
            ],
        };
        let hosts = vec![client, client2, firewall, internet, server, web];
        Ok(Lab {
            services,
            processes,
            wire,
            hosts,
        })
    }

    /// Waits until `web`'s iperf3 has seen the end of whoever it talked to. It serves one at a time, and where the network is bad
    /// it learns later than the other side that a test is over.
    ///
    /// # Errors
    /// When it goes on for too long.
    pub fn wait_for_iperf3(&self) -> Result<(), ProcessError> {
        let is_free = |lines: &[String]| {
            let last = |of: &str| lines.iter().rposition(|line| line.contains(of));
            last(IPERF3_LISTENS) > last("Accepted connection")
        };
        for server in &self.services.iperf3 {
            server.wait_for_lines("end of a test", IPERF3_LIMIT, is_free)?;
        }
        Ok(())
    }

    /// Ends the lab's processes from another thread, for instance when a signal came.
    #[must_use]
    pub fn ender(&self) -> Ender {
        self.processes.ender()
    }

    /// The wire between firewall and internet, if the topology has one.
    #[must_use]
    pub fn wire(&self) -> Option<&Wire> {
        self.wire.as_ref()
    }

    /// All hosts.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// A host by its name.
    ///
    /// # Panics
    /// When the topology has no such host.
    #[must_use]
    pub fn host(&self, name: &str) -> &Host {
        let host = self.hosts.iter().find(|host| host.name() == name);
        host.unwrap_or_else(|| panic!("the lab has no host {name}"))
    }
}

fn join(near: (&Host, &str), far: (&Host, &str)) -> Result<(), LinkError> {
    link::join(end(near), end(far))
}

fn end<'a>((host, interface): (&'a Host, &'a str)) -> End<'a> {
    End {
        host: host.namespace(),
        interface,
    }
}

/// Tells a host who is at the other end of a wire: one that loses packets loses questions, too, and after an outage a
/// host that asks in vain sends errors in place of packets.
fn introduce(
    host: &Host,
    interface: &str,
    addresses: [IpNet; 2],
    ethernet: [u8; 6],
) -> Result<(), LinkError> {
    for address in addresses {
        link::set_neighbour(host.namespace(), interface, address.addr(), ethernet)?;
    }
    Ok(())
}

/// Sets up a host's only way out.
fn attach(
    host: &Host,
    interface: &str,
    addresses: &[IpNet],
    gateways: [IpAddr; 2],
) -> Result<(), LinkError> {
    link::set_up(host.namespace(), interface, addresses)?;
    for gateway in gateways {
        let everything: IpAddr = if gateway.is_ipv4() {
            [0; 4].into()
        } else {
            [0; 16].into()
        };
        link::route(host.namespace(), IpNet::new_assert(everything, 0), gateway)?;
    }
    Ok(())
}

/// Starts an iperf3 server and waits until it listens.
fn iperf3(host: &Host, arguments: &[&str]) -> Result<Process, ProcessError> {
    let server = host
        .command("iperf3")
        .args(["-s", "--forceflush"])
        .args(arguments)
        .spawn()?;
    server.wait_for_line(IPERF3_LISTENS, READY)?;
    Ok(server)
}

fn subnet(v4_address: Ipv4Addr, v6_address: Ipv6Addr) -> [IpNet; 2] {
    [v4(v4_address.octets(), 24), v6(v6_address.segments())]
}

const fn v4(address: [u8; 4], prefix: u8) -> IpNet {
    let [a, b, c, d] = address;
    IpNet::V4(ipnet::Ipv4Net::new_assert(
        Ipv4Addr::new(a, b, c, d),
        prefix,
    ))
}

const fn v6(address: [u16; 8]) -> IpNet {
    let [a, b, c, d, e, f, g, h] = address;
    IpNet::V6(ipnet::Ipv6Net::new_assert(
        Ipv6Addr::new(a, b, c, d, e, f, g, h),
        PREFIX_V6,
    ))
}
