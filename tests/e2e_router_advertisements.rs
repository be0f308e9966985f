//! A server that has its IPv6 default route from router advertisements keeps it, although it forwards.

mod common;

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::{Duration, Instant};

use common::host_state::HostState;
use common::{
    assert_web_reached, invite, lab, start_client, start_server, stop, until, until_true,
};
use nix::net::if_::if_nametoindex;
use ringtun_lab::{Host, Lab};
use rstest::rstest;
use socket2::{Domain, Protocol, Socket, Type};

/// Longer than any test.
const LIFETIME_SECONDS: u16 = 1800;
/// How often a router says it again.
const ADVERTISEMENT_INTERVAL: Duration = Duration::from_millis(500);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

#[rstest]
fn the_advertised_default_route_stays(lab: Lab) {
    let server = lab.host("server");
    let router = Router::new(lab.host("internet"), "server");
    server
        .exec("ip", ["-6", "route", "del", "default"])
        .expect("the static default route");
    router.advertise_until(LIFETIME_SECONDS, || has_advertised_default(server));

    let before = HostState::of(server);
    let process = start_server(&lab, &[]);
    assert!(has_advertised_default(server), "right after the start");
    let client = start_client(lab.host("client"), &invite(&lab, "client"));
    assert_web_reached(lab.host("client"));

    // Not only what was learned stays: the server goes on listening to its router.
    router.advertise_until(0, || !has_advertised_default(server));
    router.advertise_until(LIFETIME_SECONDS, || has_advertised_default(server));
    assert_web_reached(lab.host("client"));

    stop(&client);
    stop(&process);
    assert!(has_advertised_default(server), "after the end");
    before.assert_same(&HostState::of(server), "after the end");
    router.advertise_until(0, || !has_advertised_default(server));
    router.advertise_until(LIFETIME_SECONDS, || has_advertised_default(server));
}

#[rstest]
fn a_server_without_an_ipv6_route_blocks_ipv6_at_the_client(lab: Lab) {
    let server = lab.host("server");
    server
        .exec("ip", ["-6", "route", "del", "default"])
        .expect("the static default route");
    let before = HostState::of(lab.host("client"));
    let process = start_server(&lab, &[]);
    let client = start_client(lab.host("client"), &invite(&lab, "client"));
    // It would pass the firewall, were it not blocked.
    let leaks = || {
        let web = (ringtun_lab::topology::WEB_V6, 443).into();
        ringtun_lab::probe::connects(lab.host("client"), web, common::SHORT).expect("the host")
    };
    assert!(!leaks(), "IPv6 goes around the tunnel");
    stop(&client);
    before.assert_same(&HostState::of(lab.host("client")), "after the end");
    until_true("IPv6 without a tunnel", leaks);
    stop(&process);
}

fn has_advertised_default(host: &Host) -> bool {
    let arguments = ["-6", "route", "show", "default", "proto", "ra"];
    !host.exec("ip", arguments).expect("ip").is_empty()
}

/// What sends router advertisements into a link.
struct Router {
    socket: Socket,
    to: SocketAddrV6,
}

impl Router {
    fn new(host: &Host, interface: &str) -> Router {
        let opened = host.enter(|| -> io::Result<Router> {
            let index = if_nametoindex(interface)?;
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
            socket.set_multicast_if_v6(index)?;
            // RFC 4861, section 6.1.2: no router in between may have touched it.
            socket.set_multicast_hops_v6(255)?;
            Ok(Router {
                socket,
                to: SocketAddrV6::new(ALL_NODES, 0, 0, index),
            })
        });
        opened.expect("the host").expect("a raw socket")
    }

    /// Sends advertisements until they have done what they should.
    fn advertise_until(&self, lifetime_seconds: u16, done: impl Fn() -> bool) {
        let mut next = Instant::now();
        until("effect of a router advertisement", || {
            if Instant::now() >= next {
                self.advertise(lifetime_seconds);
                next = Instant::now() + ADVERTISEMENT_INTERVAL;
            }
            done().then_some(())
        });
    }

    /// RFC 4861, section 4.2. The kernel fills in the checksum.
    fn advertise(&self, lifetime_seconds: u16) {
        let mut advertisement = vec![134, 0, 0, 0, 64, 0];
        advertisement.extend(lifetime_seconds.to_be_bytes());
        advertisement.extend([0; 8]);
        self.socket
            .send_to(&advertisement, &self.to.into())
            .expect("an advertisement sent");
    }
}
