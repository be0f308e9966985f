//! Links, addresses and routes of lab hosts, set by rtnetlink.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth};
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    new_connection,
};

use crate::netns::{Namespace, NamespaceError};

/// `IFA_F_NODAD`: an address that is usable at once.
const NO_DUPLICATE_DETECTION: AddressHeaderFlags = AddressHeaderFlags::from_bits_retain(0x02);

/// Why a link, an address or a route could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The host could not be entered.
    #[error("a lab host could not be entered to set up its links")]
    Namespace(#[from] NamespaceError),
    /// No netlink socket.
    #[error("no netlink socket")]
    Socket(#[source] std::io::Error),
    /// No such interface.
    #[error("no interface {interface}")]
    Interface {
        /// The name that was looked up.
        interface: String,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The kernel refused a change.
    #[error("{change} was refused")]
    Refused {
        /// What was to be changed.
        change: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
}

/// One end of a veth link: the interface `interface` of a host.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The host.
    pub host: &'a Namespace,
    /// The name that the interface gets there.
    pub interface: &'a str,
}

/// Makes a veth pair with each end straight in its host. Both ends are still down.
///
/// # Errors
/// When the kernel refuses, for instance because a name is taken.
pub fn join(near: End<'_>, far: End<'_>) -> Result<(), LinkError> {
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(far.interface)
        .setns_by_fd(far.host.net().file().as_raw_fd())
        .build();
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(near.interface)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    in_host(near.host, async |netlink| {
        let change = || format!("link {} - {}", near.interface, far.interface);
        refused(netlink.link().add(pair).execute().await, change)
    })
}

/// Makes a bridge over interfaces of a host and sets it and them up.
///
/// # Errors
/// When the kernel refuses.
pub fn bridge(host: &Namespace, name: &str, ports: &[&str]) -> Result<(), LinkError> {
    in_host(host, async |netlink| {
        let change = || format!("bridge {name}");
        refused(
            netlink
                .link()
                .add(LinkBridge::new(name).build())
                .execute()
                .await,
            change,
        )?;
        let bridge = index(name)?;
        for port in ports {
            let port = LinkMessageBuilder::<LinkUnspec>::new()
                .index(index(port)?)
                .controller(bridge)
                .up()
                .build();
            refused(netlink.link().change(port).execute().await, change)?;
        }
        Ok(())
    })?;
    set_up(host, name, &[])
}

/// Sets an interface up and gives it addresses, usable at once.
///
/// # Errors
/// When the kernel refuses.
pub fn set_up(host: &Namespace, interface: &str, addresses: &[IpNet]) -> Result<(), LinkError> {
    in_host(host, async |netlink| {
        let index = index(interface)?;
        let up = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .up()
            .build();
        refused(netlink.link().change(up).execute().await, || {
            format!("{interface} up")
        })?;
        for address in addresses {
            let mut request = netlink
                .address()
                .add(index, address.addr(), address.prefix_len());
            if address.addr().is_ipv6() {
                request.message_mut().header.flags |= NO_DUPLICATE_DETECTION;
            }
            refused(request.execute().await, || {
                format!("address {address} on {interface}")
            })?;
        }
        Ok(())
    })
}

/// Takes an interface down; its routes go with it.
///
/// # Errors
/// When the kernel refuses.
pub fn set_down(host: &Namespace, interface: &str) -> Result<(), LinkError> {
    in_host(host, async |netlink| {
        let down = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index(interface)?)
            .down()
            .build();
        refused(netlink.link().change(down).execute().await, || {
            format!("{interface} down")
        })
    })
}

/// Adds a route; a prefix of length 0 is the default route.
///
/// # Errors
/// When the kernel refuses.
pub fn route(host: &Namespace, to: IpNet, gateway: IpAddr) -> Result<(), LinkError> {
    in_host(host, async |netlink| {
        let message = match (to, gateway) {
            (IpNet::V4(to), IpAddr::V4(gateway)) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.network(), to.prefix_len())
                .gateway(gateway)
                .build(),
            (IpNet::V6(to), IpAddr::V6(gateway)) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.network(), to.prefix_len())
                .gateway(gateway)
                .build(),
            _ => unreachable!("the lab's tables give a route a gateway of its own family"),
        };
        refused(netlink.route().add(message).execute().await, || {
            format!("route {to} via {gateway}")
        })
    })
}

/// Gives an Ethernet interface an address of its own and a queue of so many frames.
///
/// # Errors
/// When the kernel refuses.
pub fn set_ethernet(
    host: &Namespace,
    interface: &str,
    address: [u8; 6],
    queue_frames: u32,
) -> Result<(), LinkError> {
    in_host(host, async |netlink| {
        let settings = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index(interface)?)
            .address(address.to_vec())
            .txqueuelen(queue_frames)
            .build();
        refused(netlink.link().change(settings).execute().await, || {
            format!("the address and the queue of {interface}")
        })
    })
}

/// Tells a host for good which Ethernet address a neighbour has, so that it never asks.
///
/// # Errors
/// When the kernel refuses.
pub fn set_neighbour(
    host: &Namespace,
    interface: &str,
    neighbour: IpAddr,
    address: [u8; 6],
) -> Result<(), LinkError> {
    in_host(host, async |netlink| {
        let entry = netlink
            .neighbours()
            .add(index(interface)?, neighbour)
            .link_layer_address(&address)
            .replace();
        refused(entry.execute().await, || {
            format!("neighbour {neighbour} on {interface}")
        })
    })
}

/// Runs netlink requests in a host's network.
fn in_host<T: Send, F>(
    host: &Namespace,
    requests: impl FnOnce(Handle) -> F + Send,
) -> Result<T, LinkError>
where
    F: Future<Output = Result<T, LinkError>>,
{
    host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(LinkError::Socket)?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().map_err(LinkError::Socket)?;
            tokio::spawn(connection);
            requests(handle).await
        })
    })?
}

fn index(interface: &str) -> Result<u32, LinkError> {
    if_nametoindex(interface).map_err(|source| LinkError::Interface {
        interface: interface.to_owned(),
        source,
    })
}

fn refused(
    outcome: Result<(), rtnetlink::Error>,
    change: impl Fn() -> String,
) -> Result<(), LinkError> {
    outcome.map_err(|source| LinkError::Refused {
        change: change(),
        source,
    })
}
