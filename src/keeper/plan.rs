//! What is to be set on the host, as values: pure functions of the configuration and of what the host looks like.
//!
//! [`super::apply`] carries the steps out, in order, and [`super::undo`] takes them back in the opposite order.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::request::{ADDRESSES_MAX, ROUTES_MAX, TunnelSettings};
use super::ruleset::{ServerRules, ruleset, ruleset_without_timeouts, table_name};
use crate::config::NAMESERVERS_MAX;
use crate::sys::dns;
use crate::sys::route::{self, Interface, OwnRoute, PROTOCOL_RA, Route, TABLE_MAIN, Way};
use crate::sys::sysctl::interface_key;

/// The kernel's table of the host's own addresses.
const TABLE_LOCAL: u32 = 255;

/// One change to the host. Each knows its own opposite, see [`super::undo::Undo`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Set a kernel setting.
    Setting {
        /// Its path under `/proc/sys`.
        key: String,
        /// Its new value.
        value: &'static str,
    },
    /// Set a kernel setting where the kernel has it and lets us; it is good to have.
    PreferredSetting {
        /// Its path under `/proc/sys`.
        key: &'static str,
        /// Its new value.
        value: &'static str,
    },
    /// Change nothing now, but remember a setting that a later step will change as a side effect.
    KeepSetting {
        /// Its path under `/proc/sys`.
        key: String,
    },
    /// Give the tunnel's interface an address.
    Address(IpNet),
    /// Add a route.
    Route(OwnRoute),
    /// Put a table of the family `inet` into force.
    Table {
        /// Its name.
        name: String,
        /// The text that makes it.
        ruleset: String,
        /// The same for a kernel or `nft` that refuses the former.
        fallback: String,
    },
    /// Replace the resolver's configuration.
    ResolvConf(String),
}

/// The tunnel's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its MTU, bytes.
    pub mtu: u16,
}

/// What the host looks like, as far as plans depend on it.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// All interfaces, the tunnel's among them.
    pub interfaces: Vec<Interface>,
    /// All routes, ours among them.
    pub routes: Vec<Route>,
    /// Indexes of interfaces with IPv6 addresses from router advertisements.
    pub learned_ipv6: Vec<u32>,
    /// Kernel settings by path, see [`settings_observed`].
    pub settings: BTreeMap<String, String>,
}

/// What a server's plan needs of its configuration.
#[derive(Clone, Debug)]
pub struct ServerNetwork<'a> {
    /// Inner IPv4 addresses.
    pub pool_v4: Ipv4Net,
    /// Inner IPv6 addresses.
    pub pool_v6: Ipv6Net,
    /// Where the server listens.
    pub listen: &'a [SocketAddr],
    /// Whether peers may reach each other.
    pub client_to_client: bool,
}

/// The settings that a plan looks at.
pub fn settings_observed(interfaces: &[Interface]) -> Vec<String> {
    let names = interfaces.iter().map(|interface| interface.name.as_str());
    names
        .chain(["all", "default"])
        .flat_map(|name| {
            [
                interface_key("ipv4", name, "forwarding"),
                interface_key("ipv6", name, "forwarding"),
                interface_key("ipv6", name, "accept_ra"),
                interface_key("ipv6", name, "disable_ipv6"),
            ]
        })
        .collect()
}

impl Host {
    fn setting(&self, family: &str, interface: &str, setting: &str) -> Option<&str> {
        self.settings
            .get(&interface_key(family, interface, setting))
            .map(String::as_str)
    }

    fn has_ipv6(&self) -> bool {
        self.setting("ipv6", "all", "forwarding").is_some()
    }

    /// Not where the administrator has switched IPv6 off for new interfaces.
    fn tunnel_takes_ipv6(&self, tunnel: &Tunnel) -> bool {
        self.setting("ipv6", &tunnel.name, "disable_ipv6") == Some("0")
    }

    /// Interfaces other than the tunnel's and the loopback.
    fn outside(&self, tunnel: &Tunnel) -> impl Iterator<Item = &Interface> {
        self.interfaces
            .iter()
            .filter(|interface| !interface.loopback && interface.index != tunnel.index)
    }

    /// The ways to everywhere, but the tunnel.
    pub fn default_routes(&self, tunnel: &Tunnel) -> impl Iterator<Item = &Route> {
        let index = tunnel.index;
        self.routes.iter().filter(move |route| {
            route.unicast
                && route.destination.prefix_len() == 0
                && route.interface.is_some_and(|interface| interface != index)
        })
    }

    /// Whether the host reaches the IPv6 internet.
    pub fn has_ipv6_uplink(&self, tunnel: &Tunnel) -> bool {
        self.default_routes(tunnel)
            .any(|route| route.destination.addr().is_ipv6())
    }

    /// Makes the host look as if the tunnel's interface were there already, with the settings that new ones get.
    pub fn expect_tunnel(&mut self, tunnel: &Tunnel) {
        for (family, setting) in [
            ("ipv4", "forwarding"),
            ("ipv6", "forwarding"),
            ("ipv6", "disable_ipv6"),
        ] {
            if let Some(value) = self.setting(family, "default", setting) {
                let value = value.to_owned();
                let key = interface_key(family, &tunnel.name, setting);
                self.settings.insert(key, value);
            }
        }
    }

    /// The names of the interfaces by which the pool leaves the host.
    pub fn egress_names(&self, tunnel: &Tunnel) -> Vec<String> {
        let egress = self.egress(tunnel).into_iter();
        egress.map(|interface| interface.name.clone()).collect()
    }

    /// Where the pool leaves the host: the interfaces with a default route, or all where there is none yet.
    fn egress(&self, tunnel: &Tunnel) -> Vec<&Interface> {
        let with_default: Vec<u32> = self
            .default_routes(tunnel)
            .filter_map(|route| route.interface)
            .collect();
        let all = self.outside(tunnel).filter(|interface| interface.up);
        if with_default.is_empty() {
            return all.collect();
        }
        all.filter(|interface| with_default.contains(&interface.index))
            .collect()
    }
}

/// The server's first addresses in its pools, which are its own.
pub fn own_addresses(pool_v4: Ipv4Net, pool_v6: Ipv6Net) -> (Ipv4Addr, Ipv6Addr) {
    (
        Ipv4Addr::from_bits(pool_v4.network().to_bits() + 1),
        Ipv6Addr::from_bits(pool_v6.network().to_bits() + 1),
    )
}

/// All that a server sets.
pub fn server(host: &Host, tunnel: &Tunnel, network: &ServerNetwork<'_>) -> Vec<Step> {
    let (own_v4, own_v6) = own_addresses(network.pool_v4, network.pool_v6);
    let mut steps = vec![Step::Address(within(
        own_v4.into(),
        network.pool_v4.prefix_len(),
    ))];
    if host.tunnel_takes_ipv6(tunnel) {
        steps.push(Step::Address(within(
            own_v6.into(),
            network.pool_v6.prefix_len(),
        )));
    }

    // The rules are in force before the first packet can be forwarded.
    let egress = host.egress(tunnel);
    let rules = ServerRules {
        tunnel,
        pool_v4: network.pool_v4,
        pool_v6: network.pool_v6,
        own: [own_v4.into(), own_v6.into()],
        client_to_client: network.client_to_client,
        egress_mtu: egress.iter().map(|interface| interface.mtu).min(),
        listen_ports: network.listen.iter().map(SocketAddr::port).collect(),
    };
    steps.push(Step::Table {
        name: table_name(&tunnel.name),
        ruleset: ruleset(&rules),
        fallback: ruleset_without_timeouts(&rules),
    });

    // Connection tracking sees nothing while there is no table, as between two runs. What it then takes for out of
    // window it would not translate, and connections of peers that were under way would hang.
    steps.push(Step::PreferredSetting {
        key: "net/netfilter/nf_conntrack_tcp_be_liberal",
        value: "1",
    });

    // Not `net.ipv4.ip_forward`: it rewrites accept_redirects and the forwarding of every interface.
    for name in egress
        .iter()
        .map(|interface| interface.name.as_str())
        .chain([tunnel.name.as_str()])
    {
        steps.push(Step::Setting {
            key: interface_key("ipv4", name, "forwarding"),
            value: "1",
        });
    }
    if host.has_ipv6_uplink(tunnel) || network.client_to_client {
        steps.extend(forward_ipv6(host, tunnel));
    }
    steps
}

/// IPv6 forwards for the whole host or not at all, and a host that forwards forgets what routers told it.
///
/// So interfaces that live by router advertisements are first told to go on accepting them (`accept_ra=2`). Writing
/// `all` rewrites the key of every interface and of `default`; they are remembered between the two, so that undoing in the
/// opposite order sets `all` back, then each interface, and takes `accept_ra` back last, when nothing purges
/// routes any more (`addrconf_fixup_forwarding` and `rt6_purge_dflt_routers` of the kernel).
fn forward_ipv6(host: &Host, tunnel: &Tunnel) -> Vec<Step> {
    if host.setting("ipv6", "all", "forwarding") != Some("0") {
        return Vec::new();
    }
    let learns = |interface: &Interface| {
        let by_route = host
            .routes
            .iter()
            .any(|route| route.protocol == PROTOCOL_RA && route.interface == Some(interface.index));
        (by_route || host.learned_ipv6.contains(&interface.index))
            && host.setting("ipv6", &interface.name, "accept_ra") == Some("1")
            && host.setting("ipv6", &interface.name, "forwarding") == Some("0")
    };
    let uplinks = host.outside(tunnel).filter(|interface| learns(interface));
    let accept = uplinks.map(|interface| Step::Setting {
        key: interface_key("ipv6", &interface.name, "accept_ra"),
        value: "2",
    });
    let others = host
        .interfaces
        .iter()
        .filter(|interface| interface.index != tunnel.index);
    let keep = others
        .map(|interface| interface.name.as_str())
        .chain(["default"])
        .map(|name| Step::KeepSetting {
            key: interface_key("ipv6", name, "forwarding"),
        });
    let all = Step::Setting {
        key: interface_key("ipv6", "all", "forwarding"),
        value: "1",
    };
    accept.chain(keep).chain([all]).collect()
}

/// What a client sets while its tunnel is up. Exception routes are not among it, see [`exception`].
///
/// # Errors
/// One line that says what is wrong with the settings.
pub fn client(
    host: &Host,
    tunnel: &Tunnel,
    settings: &TunnelSettings,
) -> Result<Vec<Step>, String> {
    for (what, count, max) in [
        ("addresses", settings.addresses.len(), ADDRESSES_MAX),
        ("routes", settings.routes.len(), ROUTES_MAX),
    ] {
        if count > max {
            return Err(format!(
                "the server gives {count} {what}, at most {max} are taken"
            ));
        }
    }
    let ipv6_addresses = host.tunnel_takes_ipv6(tunnel);
    let ipv6_routes = ipv6_addresses && !settings.block_ipv6;
    let usable = |prefix: &&IpNet, ipv6: bool| prefix.addr().is_ipv4() || ipv6;
    let mut steps: Vec<Step> = settings
        .addresses
        .iter()
        .filter(|address| usable(address, ipv6_addresses))
        .map(|address| Step::Address(*address))
        .collect();
    // Carried or blocked, never past the tunnel.
    let wants_ipv6 = settings.routes.iter().any(|route| route.addr().is_ipv6());
    if host.has_ipv6() && !ipv6_routes && (settings.block_ipv6 || wants_ipv6) {
        let all_ipv6 = IpNet::from(Ipv6Net::default());
        steps.extend(halves(all_ipv6).into_iter().map(|destination| {
            Step::Route(OwnRoute {
                destination,
                way: Way::Unreachable,
            })
        }));
    }
    let carried = settings.routes.iter();
    for route in carried.filter(|route| usable(route, ipv6_routes)) {
        let destinations = if route.prefix_len() == 0 {
            halves(*route)
        } else {
            vec![route.trunc()]
        };
        for destination in destinations {
            let step = Step::Route(OwnRoute {
                destination,
                way: Way::Interface {
                    index: tunnel.index,
                    gateway: None,
                },
            });
            if !steps.contains(&step) {
                steps.push(step);
            }
        }
    }
    if !settings.dns.is_empty() {
        let count = settings.dns.len().min(NAMESERVERS_MAX);
        steps.push(Step::ResolvConf(dns::resolv_conf(&settings.dns[..count])));
    }
    Ok(steps)
}

/// A route that keeps the outer connection to `server` out of the tunnel, if one is needed, by the way that the host's
/// other routes give now.
///
/// # Errors
/// One line, when no other route leads there.
pub fn exception(host: &Host, tunnel: &Tunnel, server: IpAddr) -> Result<Option<OwnRoute>, String> {
    let is_own_address = host.routes.iter().any(|route| {
        route.table == TABLE_LOCAL && !route.unicast && route.destination.contains(&server)
    });
    if is_own_address {
        return Ok(None);
    }
    let best = host
        .routes
        .iter()
        .filter(|route| {
            route.table == TABLE_MAIN
                && route.protocol != route::PROTOCOL
                && route.interface != Some(tunnel.index)
                && route.destination.contains(&server)
        })
        .min_by_key(|route| (u8::MAX - route.destination.prefix_len(), route.metric));
    match best {
        Some(Route {
            unicast: true,
            interface: Some(index),
            gateway,
            destination,
            ..
        }) => {
            let destination_alone = IpNet::from(server);
            // Somebody has made a host route to it; nothing of ours is more specific.
            if *destination == destination_alone {
                return Ok(None);
            }
            Ok(Some(OwnRoute {
                destination: destination_alone,
                way: Way::Interface {
                    index: *index,
                    gateway: *gateway,
                },
            }))
        }
        _ => Err(format!("no route to {server}: is the network up?")),
    }
}

/// Two routes that together cover all and each win over a default route.
fn halves(all: IpNet) -> Vec<IpNet> {
    all.subnets(1)
        .expect("a half is longer than the whole")
        .collect()
}

fn within(address: IpAddr, prefix_len: u8) -> IpNet {
    IpNet::new(address, prefix_len).expect("the pool's prefix fits its family")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LO: u32 = 1;
    const ETH0: u32 = 2;
    const ETH1: u32 = 3;
    const TUN: u32 = 9;

    fn tunnel() -> Tunnel {
        Tunnel {
            name: "ringtun0".into(),
            index: TUN,
            mtu: 1500,
        }
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn route(destination: &str, interface: u32, gateway: Option<&str>) -> Route {
        Route {
            destination: net(destination),
            table: TABLE_MAIN,
            protocol: 3,
            unicast: true,
            metric: 0,
            interface: Some(interface),
            gateway: gateway.map(ip),
        }
    }

    /// lo, two Ethernet interfaces and the tunnel, IPv4 and IPv6 default routes out of the first.
    fn host() -> Host {
        let interface = |index, name: &str| Interface {
            index,
            name: name.into(),
            mtu: 1500,
            up: true,
            loopback: index == LO,
        };
        let interfaces = vec![
            interface(LO, "lo"),
            interface(ETH0, "eth0"),
            interface(ETH1, "eth1.5"),
            interface(TUN, "ringtun0"),
        ];
        let mut settings: BTreeMap<String, String> = settings_observed(&interfaces)
            .into_iter()
            .map(|key| (key, "0".into()))
            .collect();
        for name in ["eth0", "eth1.5", "lo", "all", "default"] {
            settings.insert(interface_key("ipv6", name, "accept_ra"), "1".into());
        }
        let mut ra = route("::/0", ETH0, Some("fe80::1"));
        ra.protocol = PROTOCOL_RA;
        Host {
            interfaces,
            routes: vec![
                route("0.0.0.0/0", ETH0, Some("192.0.2.1")),
                route("192.0.2.0/24", ETH0, None),
                route("10.1.0.0/16", ETH1, Some("192.0.2.9")),
                ra,
            ],
            learned_ipv6: vec![],
            settings,
        }
    }

    fn server_steps(host: &Host, client_to_client: bool) -> Vec<Step> {
        let network = ServerNetwork {
            pool_v4: "10.87.0.0/16".parse().expect("pool"),
            pool_v6: "fd01::/64".parse().expect("pool"),
            listen: &[],
            client_to_client,
        };
        server(host, &tunnel(), &network)
    }

    fn position(steps: &[Step], wanted: &Step) -> usize {
        let found = steps.iter().position(|step| step == wanted);
        found.unwrap_or_else(|| panic!("{wanted:?} is not in {steps:?}"))
    }

    fn set(key: &str, value: &'static str) -> Step {
        Step::Setting {
            key: key.into(),
            value,
        }
    }

    #[test]
    fn the_server_is_the_first_of_its_pools() {
        let steps = server_steps(&host(), false);
        position(&steps, &Step::Address(net("10.87.0.1/16")));
        position(&steps, &Step::Address(net("fd01::1/64")));
    }

    #[test]
    fn ipv4_forwards_on_two_interfaces_and_not_on_the_host() {
        let steps = server_steps(&host(), false);
        position(&steps, &set("net/ipv4/conf/eth0/forwarding", "1"));
        position(&steps, &set("net/ipv4/conf/ringtun0/forwarding", "1"));
        for step in &steps {
            if let Step::Setting { key, .. } = step {
                assert!(!key.starts_with("net/ipv4/ip_forward"), "{key}");
                assert!(!key.starts_with("net/ipv4/conf/all"), "{key}");
                assert!(!key.starts_with("net/ipv4/conf/eth1"), "{key}");
            }
        }
    }

    #[test]
    fn a_host_without_default_route_forwards_on_all_its_interfaces() {
        let mut host = host();
        host.routes.clear();
        let steps = server_steps(&host, false);
        position(&steps, &set("net/ipv4/conf/eth0/forwarding", "1"));
        position(&steps, &set("net/ipv4/conf/eth1.5/forwarding", "1"));
    }

    #[test]
    fn router_advertisements_are_secured_before_ipv6_forwards() {
        let steps = server_steps(&host(), false);
        let accept = position(&steps, &set("net/ipv6/conf/eth0/accept_ra", "2"));
        let all = position(&steps, &set("net/ipv6/conf/all/forwarding", "1"));
        for name in ["lo", "eth0", "eth1.5", "default"] {
            let keep = position(
                &steps,
                &Step::KeepSetting {
                    key: format!("net/ipv6/conf/{name}/forwarding"),
                },
            );
            assert!(accept < keep && keep < all, "{name}");
        }
        let others = steps
            .iter()
            .filter(|step| matches!(step, Step::Setting { key, .. } if key.ends_with("accept_ra")));
        assert_eq!(others.count(), 1, "eth1.5 has learned nothing");
    }

    #[test]
    fn an_interface_that_another_program_configures_is_left_alone() {
        let mut host = host();
        // As systemd-networkd does: it reads router advertisements itself.
        host.settings
            .insert(interface_key("ipv6", "eth0", "accept_ra"), "0".into());
        // And one that has learned an address, but no route.
        host.learned_ipv6.push(ETH1);
        let steps = server_steps(&host, false);
        assert!(!steps.contains(&set("net/ipv6/conf/eth0/accept_ra", "2")));
        position(&steps, &set("net/ipv6/conf/eth1.5/accept_ra", "2"));
    }

    #[test]
    fn ipv6_is_not_forwarded_without_need_nor_set_twice() {
        let all = set("net/ipv6/conf/all/forwarding", "1");
        let mut no_uplink = host();
        no_uplink
            .routes
            .retain(|route| route.destination.addr().is_ipv4());
        assert!(!no_uplink.has_ipv6_uplink(&tunnel()));
        assert!(!server_steps(&no_uplink, false).contains(&all));
        assert!(server_steps(&no_uplink, true).contains(&all));

        let mut router = host();
        router
            .settings
            .insert(interface_key("ipv6", "all", "forwarding"), "1".into());
        assert!(!server_steps(&router, false).contains(&all));
    }

    fn settings() -> TunnelSettings {
        TunnelSettings {
            addresses: vec![net("10.87.0.2/32"), net("fd01::2/128")],
            routes: vec![net("0.0.0.0/0"), net("::/0")],
            block_ipv6: false,
            dns: vec![ip("192.0.2.53")],
        }
    }

    fn ways(steps: &[Step]) -> Vec<(String, bool)> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Route(OwnRoute { destination, way }) => {
                    Some((destination.to_string(), *way != Way::Unreachable))
                }
                _ => None,
            })
            .collect()
    }

    fn owned(ways: &[(&str, bool)]) -> Vec<(String, bool)> {
        ways.iter()
            .map(|(to, carried)| ((*to).to_owned(), *carried))
            .collect()
    }

    #[test]
    fn a_default_route_becomes_two_halves() {
        let steps = client(&host(), &tunnel(), &settings()).expect("steps");
        let all = [
            ("0.0.0.0/1", true),
            ("128.0.0.0/1", true),
            ("::/1", true),
            ("8000::/1", true),
        ];
        assert_eq!(ways(&steps), owned(&all));
        assert!(
            matches!(steps.last(), Some(Step::ResolvConf(text)) if text.contains("192.0.2.53"))
        );
    }

    #[test]
    fn ipv6_is_blocked_when_it_is_not_carried() {
        let blocked = [
            ("::/1", false),
            ("8000::/1", false),
            ("0.0.0.0/1", true),
            ("128.0.0.0/1", true),
        ];
        let asked = TunnelSettings {
            block_ipv6: true,
            ..settings()
        };
        let steps = client(&host(), &tunnel(), &asked).expect("steps");
        assert_eq!(ways(&steps), owned(&blocked));

        // Switched off for new interfaces, and so for the tunnel's, but not for the others.
        let mut host = host();
        host.settings.insert(
            interface_key("ipv6", "ringtun0", "disable_ipv6"),
            "1".into(),
        );
        let steps = client(&host, &tunnel(), &settings()).expect("steps");
        assert_eq!(ways(&steps), owned(&blocked));
        assert!(!steps.contains(&Step::Address(net("fd01::2/128"))));
    }

    #[test]
    fn a_host_without_ipv6_is_not_asked_for_any() {
        let mut host = host();
        host.settings.retain(|key, _| !key.starts_with("net/ipv6/"));
        let asked = TunnelSettings {
            block_ipv6: true,
            ..settings()
        };
        for asked in [asked, settings()] {
            let steps = client(&host, &tunnel(), &asked).expect("steps");
            assert_eq!(
                ways(&steps),
                owned(&[("0.0.0.0/1", true), ("128.0.0.0/1", true)])
            );
        }
    }

    #[test]
    fn some_routes_and_no_nameservers_leave_the_rest_alone() {
        let asked = TunnelSettings {
            routes: vec![net("203.0.113.7/24"), net("203.0.113.0/24")],
            dns: vec![],
            ..settings()
        };
        let steps = client(&host(), &tunnel(), &asked).expect("steps");
        assert_eq!(ways(&steps), owned(&[("203.0.113.0/24", true)]));
        assert!(!steps.iter().any(|step| matches!(step, Step::ResolvConf(_))));
    }

    #[test]
    fn a_server_that_asks_for_too_much_is_refused() {
        let asked = TunnelSettings {
            routes: vec![net("203.0.113.0/24"); ROUTES_MAX + 1],
            ..settings()
        };
        let error = client(&host(), &tunnel(), &asked).expect_err("too many");
        assert!(error.contains("257 routes"), "{error}");
    }

    fn way(host: &Host, server: &str) -> Option<(u32, Option<IpAddr>)> {
        let route = exception(host, &tunnel(), ip(server)).expect("a way")?;
        assert_eq!(route.destination, IpNet::from(ip(server)));
        match route.way {
            Way::Interface { index, gateway } => Some((index, gateway)),
            Way::Unreachable => panic!("unreachable"),
        }
    }

    #[test]
    fn the_exception_follows_the_best_route_that_is_not_ours() {
        let mut host = host();
        // What is in force while the tunnel is up.
        for own in ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"] {
            let mut own = route(own, TUN, None);
            own.protocol = route::PROTOCOL;
            host.routes.push(own);
        }
        let mut stale = route("198.51.100.10/32", ETH1, None);
        stale.protocol = route::PROTOCOL;
        host.routes.push(stale);
        let mut worse = route("0.0.0.0/0", ETH1, Some("10.1.0.1"));
        worse.metric = 600;
        host.routes.insert(0, worse);

        assert_eq!(
            way(&host, "198.51.100.10"),
            Some((ETH0, Some(ip("192.0.2.1"))))
        );
        assert_eq!(way(&host, "192.0.2.77"), Some((ETH0, None)));
        assert_eq!(way(&host, "10.1.2.3"), Some((ETH1, Some(ip("192.0.2.9")))));
        assert_eq!(way(&host, "2001:db8::1"), Some((ETH0, Some(ip("fe80::1")))));
    }

    #[test]
    fn no_exception_where_none_is_needed() {
        let mut host = host();
        host.routes.push(route("198.51.100.10/32", ETH1, None));
        assert_eq!(
            way(&host, "198.51.100.10"),
            None,
            "the user's own host route"
        );
        let mut local = route("192.0.2.5/32", ETH0, None);
        (local.table, local.unicast) = (TABLE_LOCAL, false);
        host.routes.push(local);
        assert_eq!(way(&host, "192.0.2.5"), None, "an address of this host");
    }

    #[test]
    fn no_way_is_told() {
        let error = exception(&Host::default(), &tunnel(), ip("192.0.2.1")).expect_err("no way");
        assert!(error.contains("192.0.2.1"), "{error}");
        let mut host = host();
        let mut blackhole = route("198.51.100.0/24", LO, None);
        blackhole.unicast = false;
        host.routes.push(blackhole);
        assert!(exception(&host, &tunnel(), ip("198.51.100.10")).is_err());
    }
}
