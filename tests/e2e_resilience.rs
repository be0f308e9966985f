//! Inner connections outlive a server that is restarted or attacked.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};

use aws_lc_rs::rand;
use common::processes::kill_9_both;
use common::tls_client;
use common::transfer::{Direction, Transfer, connect};
use common::{
    SOON, Tunnel, assert_no_panic, assert_web_reached, inner_addresses, invite, lab, start_client,
    start_server,
};
use ringtun_lab::topology::{SERVER_V4, WEB_V4, WEB_V6};
use ringtun_lab::{Host, Lab, Process};
use rstest::rstest;

/// Enough to be in the middle of things.
const SOME_BYTES: u64 = 4 << 20;
/// How many connections each kind of attack makes.
const ATTACKS: usize = 60;

/// How the server comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Both of its processes are killed with -9.
    Killed,
    /// It is asked to stop.
    Sigterm,
}

// A download and a server that was asked to stop are not among them: while it is away, its host refuses what the web
// host sends again, so that this depends on how soon it is back.
#[rstest]
#[case::upload_killed(End::Killed, Direction::Up)]
#[case::download_killed(End::Killed, Direction::Down)]
#[case::upload_sigterm(End::Sigterm, Direction::Up)]
fn a_transfer_survives_a_restart_of_the_server(
    lab: Lab,
    #[case] end: End,
    #[case] direction: Direction,
    #[values(WEB_V4.into(), WEB_V6.into())] web: IpAddr,
) {
    let mut tunnel = Tunnel::start(&lab);
    let addresses = inner_addresses(lab.host("client"));
    let transfer = Transfer::start(lab.host("client"), lab.host("web"), web, direction);
    transfer.wait_for_more(SOME_BYTES);
    restart(&lab, &mut tunnel.server, end);
    transfer.wait_for_more(SOME_BYTES);
    transfer.finish();
    assert_eq!(inner_addresses(lab.host("client")), addresses);
    assert_eq!(tunnel.client.status(), None);
    assert_no_panic(&tunnel.client);
}

#[rstest]
fn an_idle_connection_survives_a_restart_of_the_server(
    lab: Lab,
    #[values(End::Killed, End::Sigterm)] end: End,
) {
    let mut tunnel = Tunnel::start(&lab);
    let ends = [IpAddr::from(WEB_V4), WEB_V6.into()]
        .map(|web| connect(lab.host("client"), lab.host("web"), web));
    restart(&lab, &mut tunnel.server, end);
    for (mut at_client, mut at_web) in ends {
        let mut word = [0; 5];
        at_client.write_all(b"still").expect("a connection");
        at_web.read_exact(&mut word).expect("a connection");
        assert_eq!(&word, b"still");
        at_web.write_all(b"there").expect("a connection");
        at_client.read_exact(&mut word).expect("a connection");
        assert_eq!(&word, b"there");
    }
}

fn restart(lab: &Lab, server: &mut Process, end: End) {
    match end {
        End::Killed => kill_9_both(server),
        End::Sigterm => assert_eq!(server.stop(SOON).expect("the end").code(), Some(0)),
    }
    assert_no_panic(server);
    *server = start_server(lab, &[]);
}

#[rstest]
#[case::random_bytes(random_bytes)]
#[case::random_bytes_in_a_record(random_bytes_in_a_record)]
#[case::half_open_handshakes(half_open_handshake)]
#[case::truncated_tls(truncated_tls)]
#[case::oversized_http_heads(oversized_http_head)]
#[case::http_without_an_end(http_without_an_end)]
#[case::random_bytes_after_the_handshake(random_bytes_after_the_handshake)]
fn a_flood_does_not_end_a_transfer(lab: Lab, #[case] attack: fn(&Host, SocketAddr) -> Remains) {
    let tunnel = Tunnel::start(&lab);
    let transfers = [Direction::Down, Direction::Up].map(|direction| {
        Transfer::start(
            lab.host("client"),
            lab.host("web"),
            WEB_V4.into(),
            direction,
        )
    });
    for transfer in &transfers {
        transfer.wait_for_more(SOME_BYTES);
    }
    // From behind the same firewall, which gives them the client's own address, and from the internet.
    let mut remains = Vec::new();
    for attacker in ["client2", "web"] {
        for number in 0..ATTACKS {
            let port = if number % 4 == 0 { 80 } else { 443 };
            let to = SocketAddr::from((SERVER_V4, port));
            remains.push(attack(lab.host(attacker), to));
        }
    }
    for transfer in &transfers {
        transfer.wait_for_more(SOME_BYTES);
    }
    drop(remains);
    // The newcomer's connections are taken as before.
    let newcomer = start_client(lab.host("client2"), &invite(&lab, "newcomer"));
    assert_web_reached(lab.host("client2"));
    for transfer in transfers {
        transfer.wait_for_more(SOME_BYTES);
        transfer.finish();
    }
    for process in [&tunnel.server, &tunnel.client, &newcomer] {
        assert_eq!(process.status(), None);
        assert_no_panic(process);
    }
    let lost = tunnel.client.lines();
    assert!(
        !lost.iter().any(|line| line.contains("connection lost")),
        "{lost:?}"
    );
}

/// What an attacker keeps open.
type Remains = Option<TcpStream>;

/// A connection, if the server's host takes another one at all.
fn visit(host: &Host, to: SocketAddr) -> Option<TcpStream> {
    let connected = host
        .enter(|| TcpStream::connect_timeout(&to, SOON))
        .expect("the host");
    let stream = connected.ok()?;
    stream.set_write_timeout(Some(SOON)).expect("a socket");
    Some(stream)
}

fn random<const BYTES: usize>() -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    rand::fill(&mut bytes).expect("random bytes");
    bytes
}

// An attacker does not care whether the server takes what is sent: errors are ignored.

fn random_bytes(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = visit(host, to)?;
    let _ = stream.write_all(&random::<4096>());
    None
}

fn random_bytes_in_a_record(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = visit(host, to)?;
    // A handshake record of TLS 1.2's version number and of a kilobyte.
    let _ = stream.write_all(&[&[0x16, 3, 3, 4, 0][..], &random::<1024>()].concat());
    Some(stream)
}

fn half_open_handshake(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = visit(host, to)?;
    // The beginning of a record that is not going to be finished.
    let _ = stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
    Some(stream)
}

fn truncated_tls(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = visit(host, to)?;
    let _ = stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
    let _ = stream.shutdown(Shutdown::Write);
    None
}

fn oversized_http_head(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = tls_client::connect(host, to).ok()?;
    let head = format!(
        "GET / HTTP/1.1\r\nHost: www.example.org\r\nCookie: {}\r\n\r\n",
        "x".repeat(256 * 1024)
    );
    let _ = stream.write_all(head.as_bytes());
    None
}

fn http_without_an_end(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = tls_client::connect(host, to).ok()?;
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: www.example.org\r\nX: ");
    Some(stream.sock)
}

fn random_bytes_after_the_handshake(host: &Host, to: SocketAddr) -> Remains {
    let mut stream = tls_client::connect(host, to).ok()?;
    let _ = stream
        .sock
        .write_all(&[&[0x17, 3, 3, 4, 0][..], &random::<1024>()].concat());
    None
}
