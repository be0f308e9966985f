//! A CONNECT-IP client that knows nothing of ringtun gets addresses and plain packets, however large those are that the
//! server's TUN hands out.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::thread;

use common::connect_ip::{
    self, ADDRESS_ASSIGN, Assignment, MEANINGLESS, ROUTE_ADVERTISEMENT, Receiver, Sender,
    assignments, routes, token_of,
};
use common::tls_client;
use common::transfer::{Direction, Transfer};
use common::{invite, lab, start_server};
use etherparse::{
    Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TcpSlice, TransportSlice,
};
use ringtun_lab::topology::{SERVER_V4, WEB_V4, WEB_V6};
use ringtun_lab::{Host, Lab, Process};
use rstest::{fixture, rstest};

/// The inner MTU.
const MTU_BYTES: usize = 1500;
/// Enough for the web host to send as fast as it can.
const BULK_BYTES: u64 = 16 << 20;
const TUN: &str = "foreign0";

/// A running server and an invite.
struct Server {
    lab: Lab,
    process: Process,
    invite: String,
}

#[fixture]
fn server(lab: Lab) -> Server {
    let process = start_server(&lab, &[]);
    Server {
        invite: invite(&lab, "stranger"),
        lab,
        process,
    }
}

impl Server {
    fn host(&self) -> &Host {
        self.lab.host("client")
    }

    /// A tunnel, and the addresses that it was given unasked.
    fn connect(&self) -> (Sender, Receiver, Ipv4Addr, Ipv6Addr) {
        let to = SocketAddr::from((SERVER_V4, 443));
        let (sender, mut receiver) = connect_ip::open(self.host(), to, token_of(&self.invite));
        let assigned = receiver.receive_kind(ADDRESS_ASSIGN).expect("addresses");
        let (v4, v6) = one_of_each(&assignments(&assigned), 0, 0);
        (sender, receiver, v4, v6)
    }
}

/// Exactly one address of each family, all of them under the right request ids.
fn one_of_each(assigned: &[Assignment], v4_id: u64, v6_id: u64) -> (Ipv4Addr, Ipv6Addr) {
    let mut v4 = None;
    let mut v6 = None;
    for assignment in assigned {
        let replaced = match assignment.address {
            IpAddr::V4(address) => {
                assert_eq!((assignment.request_id, assignment.prefix_bits), (v4_id, 32));
                v4.replace(address).is_some()
            }
            IpAddr::V6(address) => {
                assert_eq!(
                    (assignment.request_id, assignment.prefix_bits),
                    (v6_id, 128)
                );
                v6.replace(address).is_some()
            }
        };
        assert!(!replaced, "{assigned:?}");
    }
    (v4.expect("IPv4"), v6.expect("IPv6"))
}

#[rstest]
fn the_invites_pin_is_the_servers_public_key(server: Server) {
    use base64::Engine;
    let pin = server
        .invite
        .split(['?', '&'])
        .find_map(|part| part.strip_prefix("pin="));
    let pin = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(pin.expect("a pin"))
        .expect("base64url");
    for port in [443, 80] {
        let to = SocketAddr::from((SERVER_V4, port));
        let stream = tls_client::connect(server.host(), to).expect("TLS");
        assert_eq!(tls_client::public_key_sha256(&stream)[..], pin);
    }
}

#[rstest]
fn addresses_and_routes_are_given_unasked_and_on_request(server: Server) {
    let (sender, mut receiver, v4, v6) = server.connect();
    let offered = receiver.receive_kind(ROUTE_ADVERTISEMENT).expect("routes");
    let everything: [(IpAddr, IpAddr, u8); 2] = [
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into(), 0),
        (
            Ipv6Addr::UNSPECIFIED.into(),
            Ipv6Addr::from_bits(u128::MAX).into(),
            0,
        ),
    ];
    assert_eq!(routes(&offered), everything);

    let request = |request_id: u64, address: IpAddr| Assignment {
        request_id,
        address,
        prefix_bits: if address.is_ipv4() { 32 } else { 128 },
    };
    let requests = [
        request(7, Ipv4Addr::UNSPECIFIED.into()),
        request(300, Ipv6Addr::UNSPECIFIED.into()),
    ];
    sender.send(MEANINGLESS, b"to be skipped").expect("sent");
    sender.request_addresses(&requests).expect("sent");
    let assigned = receiver.receive_kind(ADDRESS_ASSIGN).expect("an answer");
    assert_eq!(one_of_each(&assignments(&assigned), 7, 300), (v4, v6));
}

/// Its answer would be longer than a capsule may be: that ended the daemon once.
#[rstest]
fn the_largest_address_request_is_answered(server: Server) {
    const REQUESTS: usize = 2340;
    let (sender, mut receiver, v4, v6) = server.connect();
    let request = Assignment {
        request_id: 9,
        address: Ipv4Addr::UNSPECIFIED.into(),
        prefix_bits: 32,
    };
    let requests: Vec<_> = (0..REQUESTS).map(|_| request).collect();
    sender.request_addresses(&requests).expect("sent");
    let answer = receiver.receive_kind(ADDRESS_ASSIGN).expect("an answer");
    let (own, refused): (Vec<_>, Vec<_>) = assignments(&answer)
        .into_iter()
        .partition(|assignment| !assignment.address.is_unspecified());
    assert_eq!(one_of_each(&own, 9, 0), (v4, v6));
    assert!((REQUESTS - 4..REQUESTS).contains(&refused.len()));

    sender.request_addresses(&[request]).expect("sent");
    let answer = receiver.receive_kind(ADDRESS_ASSIGN).expect("an answer");
    assert_eq!(one_of_each(&assignments(&answer), 9, 0), (v4, v6));
}

#[rstest]
fn the_web_host_answers_its_ping(server: Server) {
    let (sender, mut receiver, v4, v6) = server.connect();
    for sequence in 1..=5_u16 {
        let payload = [sequence as u8; 56];
        let mut echo = Vec::new();
        PacketBuilder::ipv4(v4.octets(), WEB_V4.octets(), 64)
            .icmpv4_echo_request(4711, sequence)
            .write(&mut echo, &payload)
            .expect("a packet");
        sender.send_packet(&echo).expect("sent");
        let reply = receiver.receive_packet().expect("a reply");
        assert_sound(&reply);
        let packet = SlicedPacket::from_ip(&reply).expect("a packet");
        let Some(TransportSlice::Icmpv4(icmp)) = &packet.transport else {
            panic!("{packet:?}")
        };
        assert!(
            matches!(icmp.icmp_type(), Icmpv4Type::EchoReply(echo) if (echo.id, echo.seq) == (4711, sequence)),
            "{packet:?}"
        );
        assert_eq!(icmp.payload(), payload);

        let mut echo = Vec::new();
        PacketBuilder::ipv6(v6.octets(), WEB_V6.octets(), 64)
            .icmpv6_echo_request(4711, sequence)
            .write(&mut echo, &payload)
            .expect("a packet");
        sender.send_packet(&echo).expect("sent");
        let reply = receiver.receive_packet().expect("a reply");
        assert_sound(&reply);
        let packet = SlicedPacket::from_ip(&reply).expect("a packet");
        let Some(TransportSlice::Icmpv6(icmp)) = &packet.transport else {
            panic!("{packet:?}")
        };
        assert!(
            matches!(icmp.icmp_type(), Icmpv6Type::EchoReply(echo) if (echo.id, echo.seq) == (4711, sequence)),
            "{packet:?}"
        );
        assert_eq!(icmp.payload(), payload);
    }
}

#[rstest]
fn an_invite_works_as_soon_as_it_is_printed(server: Server) {
    let to = SocketAddr::from((SERVER_V4, 443));
    for number in 0..10 {
        let printed = invite(&server.lab, &format!("guest{number}"));
        // Fails unless the server knows the token.
        connect_ip::open(server.host(), to, token_of(&printed));
    }
}

#[rstest]
fn packets_from_another_source_do_not_pass(server: Server) {
    let (sender, mut receiver, v4, _) = server.connect();
    let echo = |source: Ipv4Addr, sequence: u16| {
        let mut echo = Vec::new();
        PacketBuilder::ipv4(source.octets(), WEB_V4.octets(), 64)
            .icmpv4_echo_request(1, sequence)
            .write(&mut echo, &[])
            .expect("a packet");
        echo
    };
    let neighbour = Ipv4Addr::from_bits(v4.to_bits() + 1);
    for source in [neighbour, SERVER_V4, Ipv4Addr::LOCALHOST] {
        sender.send_packet(&echo(source, 1)).expect("sent");
    }
    sender.send_packet(&[]).expect("sent");
    sender.send_packet(&[0x45, 0]).expect("sent");
    sender.send_packet(&echo(v4, 2)).expect("sent");
    let reply = receiver
        .receive_packet()
        .expect("a reply to the honest packet");
    let packet = SlicedPacket::from_ip(&reply).expect("a packet");
    let Some(TransportSlice::Icmpv4(icmp)) = &packet.transport else {
        panic!("{packet:?}")
    };
    assert!(
        matches!(icmp.icmp_type(), Icmpv4Type::EchoReply(echo) if echo.seq == 2),
        "{packet:?}"
    );
}

#[rstest]
fn super_packets_are_segmented_for_it(server: Server) {
    let (sender, receiver, v4, v6) = server.connect();
    let seen = Arc::new(Mutex::new(Seen::default()));
    plug_in(server.host(), v4, v6, sender, receiver, &seen);

    for web in [IpAddr::from(WEB_V4), WEB_V6.into()] {
        let transfer = Transfer::start(server.host(), server.lab.host("web"), web, Direction::Down);
        transfer.wait_for_more(BULK_BYTES);
        transfer.finish();
        let transfer = Transfer::start(server.host(), server.lab.host("web"), web, Direction::Up);
        transfer.wait_for_more(BULK_BYTES / 4);
        transfer.finish();
    }
    let seen = *seen.lock().expect("no panic");
    assert!(seen.full_sized > 1000, "{seen:?}");
    let average = average_sent_bytes(server.lab.host("server"));
    assert!(
        average > 2 * MTU_BYTES as u64,
        "the server's TUN hands out super-packets, or nothing was tested: {average} bytes a packet"
    );
    // Ends the threads that read from it.
    server
        .host()
        .exec("ip", ["link", "del", TUN])
        .expect("the interface");
    common::assert_no_panic(&server.process);
}

/// What the foreign client was sent.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    packets: usize,
    full_sized: usize,
}

/// Joins the tunnel to a TUN interface without any offload, which leads to the web host.
fn plug_in(
    host: &Host,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    sender: Sender,
    mut receiver: Receiver,
    seen: &Arc<Mutex<Seen>>,
) {
    let device = host.enter(|| {
        let mut config = tun::Configuration::default();
        config.tun_name(TUN).mtu(MTU_BYTES as u16).up();
        tun::create(&config)
    });
    let (mut from_host, mut to_host) = device.expect("the host").expect("a TUN interface").split();
    for arguments in [
        format!("address add {v4}/32 dev {TUN}"),
        format!("address add {v6}/128 dev {TUN} nodad"),
        format!("route add {WEB_V4}/32 dev {TUN} src {v4}"),
        format!("route add {WEB_V6}/128 dev {TUN} src {v6}"),
    ] {
        host.exec("ip", arguments.split(' ')).expect("ip");
    }
    thread::spawn(move || {
        let mut packet = [0; MTU_BYTES];
        while let Ok(bytes) = from_host.read(&mut packet) {
            // What the host says to its neighbours is not for the server, which drops it.
            if sender.send_packet(&packet[..bytes]).is_err() {
                break;
            }
        }
    });
    let seen = Arc::clone(seen);
    thread::spawn(move || {
        while let Ok(packet) = receiver.receive_packet() {
            {
                // A panic poisons the lock, which the test notices.
                let mut seen = seen.lock().expect("no panic");
                assert_sound(&packet);
                seen.packets += 1;
                seen.full_sized += usize::from(packet.len() == MTU_BYTES);
            }
            if to_host.write_all(&packet).is_err() {
                break;
            }
        }
    });
}

/// The bytes of the packets that the server's host has put into the tunnel, on average.
fn average_sent_bytes(server: &Host) -> u64 {
    let counter = |name: &str| -> u64 {
        let path = format!("/sys/class/net/ringtun0/statistics/{name}");
        server
            .read_file(path)
            .expect("a counter")
            .trim()
            .parse()
            .expect("a number")
    };
    counter("tx_bytes") / counter("tx_packets")
}

/// The packet is not above the MTU, as long as it says, and all its checksums are right.
fn assert_sound(packet: &[u8]) {
    assert!(packet.len() <= MTU_BYTES, "{} bytes", packet.len());
    let sliced = SlicedPacket::from_ip(packet).expect("an IP packet");
    match (&sliced.net, &sliced.transport) {
        (Some(NetSlice::Ipv4(ip)), transport) => {
            let header = ip.header().to_header();
            assert_eq!(usize::from(header.total_len), packet.len(), "{header:?}");
            assert_eq!(
                header.header_checksum,
                header.calc_header_checksum(),
                "{header:?}"
            );
            match transport {
                Some(TransportSlice::Tcp(tcp)) => {
                    let sum = tcp.calc_checksum_ipv4(header.source, header.destination);
                    assert_eq!(sum.expect("a length"), tcp.checksum(), "{}", shown(tcp));
                }
                Some(TransportSlice::Icmpv4(icmp)) => {
                    let sum = icmp.icmp_type().calc_checksum(icmp.payload());
                    assert_eq!(sum, icmp.checksum(), "{icmp:?}");
                }
                other => panic!("{other:?} was not asked for"),
            }
        }
        (Some(NetSlice::Ipv6(ip)), transport) => {
            let header = ip.header().to_header();
            assert_eq!(
                usize::from(header.payload_length) + 40,
                packet.len(),
                "{header:?}"
            );
            match transport {
                Some(TransportSlice::Tcp(tcp)) => {
                    let sum = tcp.calc_checksum_ipv6(header.source, header.destination);
                    assert_eq!(sum.expect("a length"), tcp.checksum(), "{}", shown(tcp));
                }
                Some(TransportSlice::Icmpv6(icmp)) => {
                    assert!(icmp.is_checksum_valid(header.source, header.destination));
                }
                other => panic!("{other:?} was not asked for"),
            }
        }
        other => panic!("{other:?} is no IP"),
    }
}

fn shown(tcp: &TcpSlice<'_>) -> String {
    format!("{:?} with {} bytes", tcp.to_header(), tcp.payload().len())
}
