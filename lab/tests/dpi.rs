//! The `dpi` topology drops what is not TLS on port 443 or HTTP on port 80, whoever speaks first.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use ringtun_lab::topology::{SERVER_V4, SERVER_V6};
use ringtun_lab::{Lab, Topology};
use rstest::{fixture, rstest};

/// What passes has this long.
const PASSES: Duration = Duration::from_secs(20);
/// What is dropped is waited for this long.
const DROPPED: Duration = Duration::from_millis(500);

const CLIENT_HELLO: &[u8] = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00";
const SERVER_HELLO: &[u8] = b"\x16\x03\x03\x00\x05\x02\x00\x00\x01\x00";
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
const SSH: &[u8] = b"SSH-2.0-OpenSSH_9.2\r\n";

/// Who says what, in turns.
enum Turn {
    Client(&'static [u8]),
    Server(&'static [u8]),
}
use Turn::{Client, Server};

#[fixture]
fn lab() -> Lab {
    Lab::build(Topology::Dpi).expect("a lab")
}

#[rstest]
#[case::tls(443, &[Client(CLIENT_HELLO), Server(SERVER_HELLO)])]
#[case::any_bytes_after_hellos(443, &[Client(CLIENT_HELLO), Server(SERVER_HELLO), Client(SSH), Server(SSH)])]
#[case::tls_alert(443, &[Client(CLIENT_HELLO), Server(b"\x15\x03\x03\x00\x02\x02\x28")])]
#[case::http(80, &[Client(REQUEST), Server(RESPONSE)])]
fn passes(lab: Lab, #[case] port: u16, #[case] turns: &[Turn]) {
    for server in [
        SocketAddr::from((SERVER_V4, port)),
        (SERVER_V6, port).into(),
    ] {
        let listener = listen(&lab, server);
        let outcome = converse(&lab, "client", &listener, turns, PASSES);
        assert!(outcome.is_ok(), "{server}: {outcome:?}");
    }
}

#[rstest]
#[case::ssh_on_443(443, &[Client(SSH)])]
#[case::ssh_server_first_on_443(443, &[Server(SSH)])]
#[case::http_on_443(443, &[Client(REQUEST)])]
#[case::tls_client_hello_answered_otherwise(443, &[Client(CLIENT_HELLO), Server(SSH)])]
#[case::other_tls_record_first(443, &[Client(b"\x17\x03\x03\x00\x05hello")])]
#[case::a_zero_byte(443, &[Client(b"\0")])]
#[case::tls_on_80(80, &[Client(CLIENT_HELLO)])]
#[case::ssh_on_80(80, &[Client(SSH)])]
#[case::http_answered_otherwise(80, &[Client(REQUEST), Server(SSH)])]
fn is_dropped(lab: Lab, #[case] port: u16, #[case] turns: &[Turn]) {
    for server in [
        SocketAddr::from((SERVER_V4, port)),
        (SERVER_V6, port).into(),
    ] {
        let listener = listen(&lab, server);
        let outcome = converse(&lab, "client", &listener, turns, DROPPED);
        let error = outcome.expect_err("somebody heard nothing");
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ),
            "{server}: {error}"
        );
        // It is the firewall, and not the conversation itself.
        converse(&lab, "web", &listener, turns, PASSES)
            .expect("the same conversation on the internet side");
    }
}

#[rstest]
fn other_ports_are_closed_as_ever(lab: Lab) {
    let listener = listen(&lab, (SERVER_V4, 22).into());
    let outcome = converse(&lab, "client", &listener, &[Client(SSH)], DROPPED);
    let error = outcome.expect_err("port 22 is closed");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

fn listen(lab: &Lab, at: SocketAddr) -> TcpListener {
    let listener = lab
        .host("server")
        .enter(|| TcpListener::bind(at))
        .expect("the server's host");
    listener.expect("a free port")
}

/// Opens a connection from `client` to the listener and says every turn in order; an error is the first
/// turn that did not arrive within the limit.
fn converse(
    lab: &Lab,
    client: &str,
    listener: &TcpListener,
    turns: &[Turn],
    limit: Duration,
) -> io::Result<()> {
    let to = listener.local_addr()?;
    let connect = || TcpStream::connect_timeout(&to, limit);
    let mut near = lab
        .host(client)
        .enter(connect)
        .expect("the client's host")?;
    // A connection is only there for the client when it is for the listener, too.
    let (mut far, _) = listener.accept()?;
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(limit))?;
    }
    for turn in turns {
        let (from, to, bytes) = match turn {
            Client(bytes) => (&mut near, &mut far, bytes),
            Server(bytes) => (&mut far, &mut near, bytes),
        };
        from.write_all(bytes)?;
        let mut heard = vec![0; bytes.len()];
        to.read_exact(&mut heard)?;
        assert_eq!(heard, *bytes);
    }
    Ok(())
}
