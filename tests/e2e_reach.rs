//! A client behind the firewall reaches the internet through the server.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::status::{list, number, status};
use common::transfer::{Direction, Transfer};
use common::{
    SHORT, SOON, Tunnel, assert_web_blocked, assert_web_reached, build, connected_to,
    inner_addresses, invite, invite_to, lab, start_client, start_server, until,
};
use ringtun_lab::topology::{SERVER_V4, SERVER_V6, WEB_V4, WEB_V6};
use ringtun_lab::{Lab, Topology, probe};
use rstest::rstest;

/// Large enough for many super-packets, records and full socket buffers.
const LARGE_BYTES: u64 = 48 << 20;
/// Nobody listens there.
const UNHEARD_PORT: u16 = 9;
/// From one packet to the next.
const PAUSE: Duration = Duration::from_micros(20);

#[rstest]
#[case::nat(Topology::Nat)]
#[case::dpi(Topology::Dpi)]
fn everything_of_the_web_host_is_reached(#[case] topology: Topology) {
    let lab = build(topology);
    assert_web_blocked(lab.host("client"));
    let _tunnel = Tunnel::start(&lab);
    assert_web_reached(lab.host("client"));
}

/// A SYN that is lost while routes are set costs its sender a second.
#[rstest]
fn what_is_sent_while_the_tunnel_comes_up_is_carried(lab: Lab) {
    let client = lab.host("client");
    let _server = start_server(&lab, &[]);
    let invite = invite(&lab, "client");
    let socket = client.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
    let socket = socket.expect("the client").expect("a socket");
    let is_up = AtomicBool::new(false);
    let status = thread::scope(|scope| {
        scope.spawn(|| {
            let begin = Instant::now();
            while !is_up.load(Ordering::Relaxed) && begin.elapsed() < 2 * SOON {
                // Until the tunnel is up the firewall refuses, and the next call says so.
                let _ = socket.send_to(b"?", (WEB_V4, UNHEARD_PORT));
                // Leaves the processor to whoever takes it from the interface.
                thread::sleep(PAUSE);
            }
        });
        let _client = start_client(client, &invite);
        let status = until("packets read from the TUN device", || {
            let status = status(client);
            let read = |worker| number(worker, "/counters/tun_read_packets");
            let read_packets: u64 = list(&status, "workers").iter().map(read).sum();
            (read_packets > 0).then_some(status)
        });
        is_up.store(true, Ordering::Relaxed);
        status
    });
    for worker in list(&status, "workers") {
        assert_eq!(
            number(worker, "/counters/dropped_no_route"),
            0,
            "{status:#}"
        );
    }
}

#[rstest]
#[case::nat(Topology::Nat)]
#[case::dpi(Topology::Dpi)]
fn the_server_is_reached_over_ipv6(#[case] topology: Topology) {
    let lab = build(topology);
    let _server = start_server(&lab, &[]);
    let invite = invite_to(&lab, "client", &SERVER_V6.to_string());
    let _client = start_client(lab.host("client"), &invite);
    let outer = connected_to(lab.host("client"));
    assert_eq!(outer, [SocketAddr::from((SERVER_V6, 443))]);
    assert_web_reached(lab.host("client"));
}

#[rstest]
fn port_80_serves_when_the_server_does_not_listen_on_443(lab: Lab) {
    let _server = start_server(&lab, &["--listen", "[::]:80"]);
    let _client = start_client(lab.host("client"), &invite(&lab, "client"));
    let outer = connected_to(lab.host("client"));
    assert_eq!(outer, [SocketAddr::from((SERVER_V4, 80))]);
    assert_web_reached(lab.host("client"));
}

#[rstest]
fn port_80_serves_when_the_firewall_drops_443(lab: Lab) {
    let rule = "insert rule inet lab forward tcp dport 443 drop";
    lab.host("firewall")
        .exec("nft", [rule])
        .expect("a stricter firewall");
    let _server = start_server(&lab, &[]);
    let _client = start_client(lab.host("client"), &invite(&lab, "client"));
    let outer = connected_to(lab.host("client"));
    assert_eq!(outer, [SocketAddr::from((SERVER_V4, 80))]);
    assert_web_reached(lab.host("client"));
}

#[rstest]
fn two_clients_work_at_once_and_do_not_see_each_other(lab: Lab) {
    let (one, two) = (lab.host("client"), lab.host("client2"));
    let _server = start_server(&lab, &[]);
    let _first = start_client(one, &invite(&lab, "alice"));
    let _second = start_client(two, &invite(&lab, "bob"));
    assert_web_reached(one);
    assert_web_reached(two);

    let (of_one, of_two) = (inner_addresses(one), inner_addresses(two));
    for (own, other) in of_one.into_iter().zip(of_two) {
        assert_ne!(own, other);
        let _listener = two
            .enter(|| std::net::TcpListener::bind((other, 22)))
            .expect("the host")
            .expect("a port of its own");
        let to = SocketAddr::new(other, 22);
        assert!(
            probe::connects(two, to, SOON).expect("the host"),
            "{to} does listen"
        );
        assert!(
            !probe::connects(one, to, SHORT).expect("the host"),
            "{to} is closed to others"
        );
        assert!(
            one.ping(other, 3).expect("ping").is_silent(),
            "ping {other}"
        );
    }
}

#[rstest]
#[case::v4(WEB_V4)]
#[case::v6(WEB_V6)]
fn large_transfers_arrive_unchanged(lab: Lab, #[case] web: impl Into<IpAddr>) {
    let web = web.into();
    let _tunnel = Tunnel::start(&lab);
    let transfers = [
        Direction::Down,
        Direction::Down,
        Direction::Up,
        Direction::Up,
    ]
    .map(|direction| Transfer::start(lab.host("client"), lab.host("web"), web, direction));
    for transfer in &transfers {
        transfer.wait_for_more(LARGE_BYTES);
    }
    for transfer in transfers {
        assert!(transfer.finish() >= LARGE_BYTES);
    }
}

#[rstest]
#[case::v4(WEB_V4, 1500 - 20 - 8)]
#[case::v6(WEB_V6, 1500 - 40 - 8)]
fn packets_of_1500_bytes_pass_whole(
    lab: Lab,
    #[case] web: impl Into<IpAddr>,
    #[case] payload_bytes: usize,
) {
    let web = web.into().to_string();
    let _tunnel = Tunnel::start(&lab);
    let unfragmented = |payload_bytes: usize| {
        let payload_bytes = payload_bytes.to_string();
        let arguments = [
            "-n",
            "-M",
            "do",
            "-c",
            "3",
            "-i",
            "0.1",
            "-W",
            "20",
            "-s",
            &payload_bytes,
            &web,
        ];
        lab.host("client").run("ping", arguments).expect("ping")
    };
    let fits = unfragmented(payload_bytes);
    assert!(fits.status.success(), "{}{}", fits.text(), fits.errors());
    let too_large = unfragmented(payload_bytes + 1);
    assert!(!too_large.status.success(), "{}", too_large.text());
}
