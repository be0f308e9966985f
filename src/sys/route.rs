//! Interfaces, addresses and routes over rtnetlink, one blocking call each.
//!
//! Every route made here carries [`PROTOCOL`], so that it can be told from everybody else's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
    RouteVia,
};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

/// The protocol number of our routes (`ip route show proto 114`). Nobody in iproute2's
/// `rt_protos` has it, so no routing daemon takes our routes for its own.
pub const PROTOCOL: u8 = 114;
/// The protocol number of what the kernel learned from router advertisements (RTPROT_RA).
pub const PROTOCOL_RA: u8 = 9;
/// An index that the kernel does not give out by itself.
const INDEX_OF_NONE: u32 = i32::MAX.cast_unsigned();
/// The routing table that is meant when none is named.
pub const TABLE_MAIN: u32 = 254;

/// How long the kernel may take to make an IPv6 address local.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(1);
const LOCAL_POLL_INTERVAL: Duration = Duration::from_micros(200);

/// A netlink request that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct RouteError {
    /// What was tried.
    pub what: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

/// An interface of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether it is the loopback interface.
    pub loopback: bool,
}

/// A route that somebody made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub destination: IpNet,
    /// Its table.
    pub table: u32,
    /// Who made it.
    pub protocol: u8,
    /// Whether it forwards, rather than refuse or drop.
    pub unicast: bool,
    /// Its metric; the lowest wins.
    pub metric: u32,
    /// The interface out of which it leads.
    pub interface: Option<u32>,
    /// The router, unless the destination is on the link.
    pub gateway: Option<IpAddr>,
}

/// A route of ours, in the main table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// How.
    pub way: Way,
}

/// How a route of ours leads there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// Out of an interface, through a router if there is one.
    Interface {
        /// The interface's index.
        index: u32,
        /// The router.
        gateway: Option<IpAddr>,
    },
    /// Nowhere: senders are told so at once.
    Unreachable,
}

/// A netlink socket and the small runtime that serves it during calls.
#[derive(Debug)]
pub struct Netlink {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Netlink {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn open() -> Result<Self, RouteError> {
        let failed = |source| RouteError {
            what: "open a netlink socket".into(),
            source,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(failed)?;
        let (connection, handle, _) = {
            let _context = runtime.enter();
            rtnetlink::new_connection().map_err(failed)?
        };
        runtime.spawn(connection);
        Ok(Netlink { runtime, handle })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn interfaces(&self) -> Result<Vec<Interface>, RouteError> {
        let links = self.handle.link().get().execute();
        let links: Vec<_> = self.run("list the interfaces", links.try_collect())?;
        let interfaces = links.into_iter().map(|link| {
            let mut interface = Interface {
                index: link.header.index,
                name: String::new(),
                mtu: 0,
                up: link.header.flags.contains(LinkFlags::Up),
                loopback: link.header.flags.contains(LinkFlags::Loopback),
            };
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => interface.name = name,
                    LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
                    _ => {}
                }
            }
            interface
        });
        Ok(interfaces.collect())
    }

    /// All routes of both families and all tables that are in use.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn routes(&self) -> Result<Vec<Route>, RouteError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut all = RouteMessage::default();
            all.header.address_family = family;
            let dump = self.handle.route().get(all).execute();
            let dump: Vec<RouteMessage> = self.run("list the routes", dump.try_collect())?;
            routes.extend(dump.iter().filter_map(route));
        }
        Ok(routes)
    }

    /// Indexes of the interfaces with a global IPv6 address that expires: one that was learned, not configured.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn interfaces_with_learned_ipv6(&self) -> Result<Vec<u32>, RouteError> {
        let addresses = self.handle.address().get().execute();
        let addresses: Vec<_> = self.run("list the addresses", addresses.try_collect())?;
        let learned = addresses.into_iter().filter(|address| {
            address.header.family == AddressFamily::Inet6
                && address.header.scope == AddressScope::Universe
                && !address.header.flags.contains(AddressHeaderFlags::Permanent)
        });
        Ok(learned.map(|address| address.header.index).collect())
    }

    /// Gives an interface that is up an address, which can be used at once; one that it has already is no error.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn add_address(&self, interface: u32, address: IpNet) -> Result<(), RouteError> {
        let mut request =
            self.handle
                .address()
                .add(interface, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            // Without it an IPv6 address is tentative for a moment even where there is nobody to have the same, and a
            // connection made in that moment keeps another interface's address as its source.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        let what = format!("set the address {address} on the tunnel interface");
        self.run_unless(&[Errno::EEXIST], &what, request.execute())?;
        if let IpAddr::V6(address) = address.addr() {
            self.wait_until_local(address);
        }
        Ok(())
    }

    /// Waits until what is sent to `address` is for this host. The kernel answers the request first and makes an IPv6
    /// address local later, on a kernel thread (`addrconf_dad_start`): at once, or when a busy machine gets round to it.
    fn wait_until_local(&self, address: Ipv6Addr) {
        let deadline = Instant::now() + LOCAL_TIMEOUT;
        while !self.is_local(address) {
            if Instant::now() >= deadline {
                return tracing::warn!("{address} does not become an address of this host");
            }
            thread::sleep(LOCAL_POLL_INTERVAL);
        }
    }

    fn is_local(&self, address: Ipv6Addr) -> bool {
        let mut question = RouteMessage::default();
        question.header.address_family = AddressFamily::Inet6;
        question.header.destination_prefix_length = Ipv6Addr::BITS as u8;
        let destination = RouteAttribute::Destination(RouteAddress::Inet6(address));
        question.attributes.push(destination);
        let answer = self.handle.route().get(question).execute();
        let answer: Result<Vec<_>, _> = self.run("look up a route", answer.try_collect());
        // No route at all is an error.
        answer.is_ok_and(|routes| {
            let local = RouteType::Local;
            routes.iter().any(|route| route.header.kind == local)
        })
    }

    /// Takes an address from an interface; one that it does not have, or an interface that goes meanwhile as a TUN does when
    /// its last descriptor is closed, is no error.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn delete_address(&self, interface: u32, address: IpNet) -> Result<(), RouteError> {
        let all = self
            .handle
            .address()
            .get()
            .set_link_index_filter(interface)
            .execute();
        let all: Vec<_> = self.run("list the addresses", all.try_collect())?;
        let found = all.into_iter().find(|message| {
            message.header.prefix_len == address.prefix_len()
                && message
                    .attributes
                    .contains(&AddressAttribute::Address(address.addr()))
        });
        match found {
            None => Ok(()),
            Some(message) => self.run_unless(
                &[Errno::EADDRNOTAVAIL, Errno::ENODEV],
                &format!("remove the address {address} from the tunnel interface"),
                self.handle.address().del(message).execute(),
            ),
        }
    }

    /// Adds a route of ours. Somebody else's to the same destination is an error and stays.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn add_route(&self, route: &OwnRoute) -> Result<(), RouteError> {
        let request = self.handle.route().add(own_route_message(route));
        self.run(
            &format!(
                "set the route to {} (is another VPN running?)",
                route.destination
            ),
            request.execute(),
        )
    }

    /// Changes the way of a route of ours, or adds it where it is gone.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn change_route(&self, route: &OwnRoute) -> Result<(), RouteError> {
        let request = self.handle.route().add(own_route_message(route));
        self.run(
            &format!("change the route to {}", route.destination),
            request.replace().execute(),
        )
    }

    /// Removes a route of ours; one that is gone is no error, and nobody else's is touched.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn delete_route(&self, destination: IpNet) -> Result<(), RouteError> {
        let mut message = builder(destination).build();
        message.header.kind = RouteType::Unspec;
        message.header.scope = RouteScope::NoWhere;
        self.run_unless(
            &[Errno::ESRCH],
            &format!("remove the route to {destination}"),
            self.handle.route().del(message).execute(),
        )
    }

    /// Removes an interface; one that is gone is no error.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn delete_interface(&self, name: &str) -> Result<(), RouteError> {
        let Ok(index) = nix::net::if_::if_nametoindex(name) else {
            return Ok(());
        };
        self.run_unless(
            &[Errno::ENODEV],
            &format!("remove the interface {name}"),
            self.handle.link().del(index).execute(),
        )
    }

    /// Whether this process may change interfaces and routes here, which is a matter of the network namespace too. Nothing
    /// is changed to find out: the kernel looks at the privilege first, and an empty change of no interface fails then.
    pub fn may_change(&self) -> bool {
        let nothing = LinkMessageBuilder::<LinkUnspec>::new()
            .index(INDEX_OF_NONE)
            .build();
        let answer = self.run(
            "ask for the privilege",
            self.handle.link().set(nothing).execute(),
        );
        !matches!(answer, Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied)
    }

    fn run<T>(
        &self,
        what: &str,
        request: impl Future<Output = Result<T, rtnetlink::Error>>,
    ) -> Result<T, RouteError> {
        self.runtime.block_on(request).map_err(|error| RouteError {
            what: what.into(),
            source: match error {
                rtnetlink::Error::NetlinkError(message) => message.to_io(),
                other => io::Error::other(other),
            },
        })
    }

    fn run_unless(
        &self,
        tolerated: &[Errno],
        what: &str,
        request: impl Future<Output = Result<(), rtnetlink::Error>>,
    ) -> Result<(), RouteError> {
        match self.run(what, request) {
            Err(error) if is_any_of(&error.source, tolerated) => Ok(()),
            result => result,
        }
    }
}

fn is_any_of(error: &io::Error, errnos: &[Errno]) -> bool {
    let number = error.raw_os_error().map(Errno::from_raw);
    number.is_some_and(|number| errnos.contains(&number))
}

fn own_route_message(route: &OwnRoute) -> RouteMessage {
    let builder = builder(route.destination);
    match &route.way {
        Way::Unreachable => builder.kind(RouteType::Unreachable).build(),
        Way::Interface { index, gateway } => {
            let mut message = builder.output_interface(*index).build();
            match gateway {
                None if route.destination.addr().is_ipv4() => {
                    message.header.scope = RouteScope::Link;
                }
                None => {}
                Some(gateway) => message
                    .attributes
                    .push(gateway_attribute(route.destination.addr(), *gateway)),
            }
            message
        }
    }
}

fn builder(destination: IpNet) -> RouteMessageBuilder<IpAddr> {
    RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.addr(), destination.prefix_len())
        .expect("an IpNet's prefix fits its address")
        .table_id(TABLE_MAIN)
        .protocol(RouteProtocol::Other(PROTOCOL))
        .scope(RouteScope::Universe)
        .kind(RouteType::Unicast)
}

/// An IPv4 route may have an IPv6 router (RFC 5549), which the kernel takes as `via`.
fn gateway_attribute(destination: IpAddr, gateway: IpAddr) -> RouteAttribute {
    match (destination, gateway) {
        (IpAddr::V4(_), IpAddr::V6(gateway)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
        _ => RouteAttribute::Gateway(gateway.into()),
    }
}

/// `None` for what carries nothing now: dead next hops, cached clones, multicast.
fn route(message: &RouteMessage) -> Option<Route> {
    let unusable = RouteFlags::Dead | RouteFlags::Linkdown | RouteFlags::Cloned;
    if message.header.flags.intersects(unusable) {
        return None;
    }
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut destination = any;
    let mut route = Route {
        destination: any.into(),
        table: message.header.table.into(),
        protocol: message.header.protocol.into(),
        unicast: message.header.kind == RouteType::Unicast,
        metric: 0,
        interface: None,
        gateway: None,
    };
    let mut next_hop = |route: &mut Route, attributes: &[RouteAttribute]| {
        for attribute in attributes {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => {
                    route.gateway = Some((*gateway).into());
                }
                RouteAttribute::Gateway(RouteAddress::Inet6(gateway))
                | RouteAttribute::Via(RouteVia::Inet6(gateway)) => {
                    route.gateway = Some((*gateway).into());
                }
                RouteAttribute::Oif(index) => route.interface = Some(*index),
                RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                    destination = (*address).into();
                }
                RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                    destination = (*address).into();
                }
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::Table(table) => route.table = *table,
                _ => {}
            }
        }
    };
    next_hop(&mut route, &message.attributes);
    // Of several equal next hops the first is as good as any.
    if route.interface.is_none()
        && let Some(hop) = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::MultiPath(hops) => hops.first(),
                _ => None,
            })
    {
        route.interface = Some(hop.interface_index);
        next_hop(&mut route, &hop.attributes);
    }
    route.destination = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some(route)
}
