//! Tells when the host's network has changed: links, addresses, routes. Needs no privilege.

use std::io;

use futures_util::StreamExt;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{RouteProtocol, RouteType};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::sync::watch;

use super::runtime::spawn_essential;

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// Starts watching. The receiver sees a change for each burst of notifications that is not of our own making.
///
/// `interface` is the tunnel's own; what happens to it is not news. `own_protocol` tags our own routes.
///
/// # Errors
/// There is no netlink socket.
pub fn watch(interface: u32, own_protocol: u8) -> io::Result<watch::Receiver<()>> {
    let (connection, _, mut messages) = new_multicast_connection(&GROUPS)?;
    let (changed, receiver) = watch::channel(());
    spawn_essential("netlink", connection);
    spawn_essential("network watch", async move {
        while let Some((message, _)) = messages.next().await {
            if is_news(&message, interface, own_protocol) && changed.send(()).is_err() {
                return;
            }
        }
        tracing::warn!("changes of the network go unnoticed: netlink has ended");
    });
    Ok(receiver)
}

fn is_news(
    message: &NetlinkMessage<RouteNetlinkMessage>,
    interface: u32,
    own_protocol: u8,
) -> bool {
    let NetlinkPayload::InnerMessage(message) = &message.payload else {
        return false;
    };
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            link.header.index != interface
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            address.header.index != interface
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            route.header.kind == RouteType::Unicast
                && route.header.protocol != RouteProtocol::from(own_protocol)
        }
        _ => false,
    }
}
