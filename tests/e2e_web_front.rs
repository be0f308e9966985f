//! To everyone without a token the server is an ordinary web server.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use common::connect_ip::token_of;
use common::tls_client;
use common::{RINGTUN, SOON, invite, lab, start_server};
use ringtun_lab::topology::{SERVER_V4, SERVER_V6};
use ringtun_lab::{Host, Lab, Process};
use rstest::{fixture, rstest};

/// 32 bytes in base64url, which no invite has.
const WRONG_TOKEN: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const UPGRADE: &str = "GET /.well-known/masque/ip/*/*/ HTTP/1.1\r\n\
    Host: www.example.org\r\n\
    Connection: Upgrade\r\n\
    Upgrade: connect-ip\r\n\
    Capsule-Protocol: ?1\r\n\
    Authorization: Bearer TOKEN\r\n\r\n";
const UNKNOWN_PATH: &str = "GET /no/such/page HTTP/1.1\r\nHost: www.example.org\r\n\r\n";

/// A running server with one peer.
struct Front {
    lab: Lab,
    server: Process,
    token: String,
}

#[fixture]
fn front(lab: Lab) -> Front {
    let server = start_server(&lab, &[]);
    let invite = invite(&lab, "alice");
    Front {
        token: token_of(&invite).to_owned(),
        lab,
        server,
    }
}

impl Front {
    fn visitor(&self) -> &Host {
        self.lab.host("client")
    }

    /// Sends the request over TLS, then asks for an unknown path on the same connection. Returns both answers, the
    /// second one empty if the server closed the connection after the first.
    fn ask(&self, request: &str) -> (String, String) {
        let to = SocketAddr::from((SERVER_V4, 443));
        let mut stream = tls_client::connect(self.visitor(), to).expect("TLS");
        stream.write_all(request.as_bytes()).expect("a request");
        let first = answer(&mut stream);
        // The server may have closed already.
        let second = match stream.write_all(UNKNOWN_PATH.as_bytes()) {
            Ok(()) => answer(&mut stream),
            Err(_) => String::new(),
        };
        (first, second)
    }
}

#[rstest]
fn the_front_page_is_an_ordinary_page(front: Front) {
    for server in [SERVER_V4.to_string(), format!("[{SERVER_V6}]")] {
        for port in [443, 80] {
            let url = format!("https://{server}:{port}/");
            let arguments = ["-sSki", "--max-time", "30", &url];
            let answer = front.visitor().exec("curl", arguments).expect("curl");
            let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{url}: {head}");
            let lowercase = head.to_ascii_lowercase();
            assert!(
                lowercase.contains("\ncontent-type: text/html"),
                "{url}: {head}"
            );
            assert!(
                body.contains("<html") && body.ends_with("</html>\n"),
                "{url}: {body}"
            );
            for giveaway in ["ringtun", "masque", "tunnel", "vpn", "capsule"] {
                assert!(
                    !answer.to_ascii_lowercase().contains(giveaway),
                    "{url}: {answer}"
                );
            }
        }
    }
}

#[rstest]
#[case::wrong_token("TOKEN", WRONG_TOKEN)]
#[case::token_too_short("TOKEN", "AAAA")]
#[case::token_that_is_none("TOKEN", "?")]
#[case::no_token("Authorization: Bearer TOKEN\r\n", "")]
#[case::other_scheme("Bearer TOKEN", "Basic QUFBQTpBQUFB")]
#[case::no_upgrade("Upgrade: connect-ip\r\n", "")]
#[case::other_upgrade("connect-ip", "websocket")]
#[case::ethernet("connect-ip", "connect-ethernet")]
#[case::no_connection("Connection: Upgrade\r\n", "")]
#[case::no_capsules("Capsule-Protocol: ?1\r\n", "")]
#[case::other_target("/ip/*/*/", "/ip/203.0.113.80/6/")]
#[case::other_layer("/ip/*/*/", "/udp/203.0.113.80/53/")]
#[case::with_a_body("\r\n\r\n", "\r\nContent-Length: 0\r\n\r\n")]
fn without_the_right_token_the_tunnel_is_an_unknown_path(
    front: Front,
    #[case] part: &str,
    #[case] replacement: &str,
) {
    assert!(UPGRADE.contains(part));
    let request = UPGRADE
        .replace(part, replacement)
        .replace("TOKEN", WRONG_TOKEN);
    let (unknown, unknown_after) = front.ask(UNKNOWN_PATH);
    assert!(
        unknown.starts_with("HTTP/1.1 404 Not Found\r\n"),
        "{unknown}"
    );
    assert_eq!(unknown, unknown_after, "an answer is the same every time");
    let (tunnel, after) = front.ask(&request);
    assert_eq!(tunnel, unknown, "{request}");
    assert_eq!(after, unknown_after, "what follows {request}");
}

#[rstest]
fn http_1_0_has_no_tunnel(front: Front) {
    let unknown = UNKNOWN_PATH.replace("HTTP/1.1", "HTTP/1.0");
    let unknown = front.ask(&unknown);
    assert!(unknown.0.contains(" 404 Not Found\r\n"), "{}", unknown.0);
    let request = UPGRADE.replace("HTTP/1.1", "HTTP/1.0");
    assert_eq!(front.ask(&request.replace("TOKEN", WRONG_TOKEN)), unknown);
    let (with_token, _) = front.ask(&request.replace("TOKEN", &front.token));
    assert!(!with_token.contains(" 101 "), "{with_token}");
}

#[rstest]
fn a_revoked_token_is_a_wrong_one(front: Front) {
    let right = UPGRADE.replace("TOKEN", &front.token);
    let malformed = right.replace("Capsule-Protocol: ?1\r\n", "");
    let told = front.ask(&malformed).0;
    assert!(told.starts_with("HTTP/1.1 400 "), "a peer is told: {told}");
    front
        .lab
        .host("server")
        .exec(RINGTUN, ["peers", "revoke", "alice"])
        .expect("revoke");
    let unknown = front.ask(UNKNOWN_PATH);
    common::until_true("end of the token", || front.ask(&malformed) == unknown);
    assert_eq!(front.ask(&right), unknown);
}

#[rstest]
fn what_is_not_http_gets_a_web_servers_answer(front: Front) {
    for garbage in [
        "\x01\x02\x03\r\n\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "GET\r\n\r\n",
    ] {
        let (answer, after) = front.ask(garbage);
        assert!(
            answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{answer}"
        );
        assert_eq!(after, "", "the connection is closed");
    }
}

#[rstest]
fn tls_1_2_is_refused(front: Front) {
    let to = format!("{SERVER_V4}:443");
    let openssl = |version: &str| {
        let arguments = ["s_client", "-connect", &to, version];
        let command = front.visitor().command("openssl").args(arguments);
        command.input("Q\n").run().expect("openssl")
    };
    let refused = openssl("-tls1_2");
    assert!(!refused.status.success());
    assert!(
        refused.errors().contains("alert protocol version"),
        "{}",
        refused.errors()
    );
    let taken = openssl("-tls1_3");
    assert!(taken.text().contains("TLSv1.3"), "{}", taken.errors());
    let arguments = ["-sSk", "--tls-max", "1.2", &format!("https://{to}/")];
    let curl = front.visitor().run("curl", arguments).expect("curl");
    assert_eq!(
        curl.status.code(),
        Some(35),
        "no handshake: {}",
        curl.errors()
    );
}

#[rstest]
fn plain_http_is_answered(front: Front) {
    for server in [IpAddr::from(SERVER_V4), SERVER_V6.into()] {
        let to = SocketAddr::new(server, 80);
        let connected = front
            .visitor()
            .enter(|| TcpStream::connect_timeout(&to, SOON));
        let mut stream = connected.expect("the host").expect("port 80");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        let request = "GET / HTTP/1.1\r\nHost: www.example.org\r\n\r\n";
        stream.write_all(request.as_bytes()).expect("a request");
        let answer = answer(&mut stream);
        let ordinary = ["HTTP/1.1 200 OK\r\n", "HTTP/1.1 301 Moved Permanently\r\n"];
        assert!(
            ordinary.iter().any(|status| answer.starts_with(status)),
            "{answer}"
        );
    }
}

#[rstest]
fn visitors_are_no_news(front: Front) {
    front.ask(&UPGRADE.replace("TOKEN", WRONG_TOKEN));
    front.ask("\0\0\0\0");
    common::assert_no_panic(&front.server);
    let lines = front.server.lines();
    let errors: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .collect();
    assert!(errors.is_empty(), "{errors:?}");
}

/// One answer, head and body, without its date. Empty if the connection was closed instead.
fn answer(stream: &mut impl Read) -> String {
    let mut received = Vec::new();
    let head_bytes = loop {
        if let Some(end) = received.windows(4).position(|end| end == b"\r\n\r\n") {
            break end + 4;
        }
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) if received.is_empty() => return String::new(),
            Ok(0) => panic!("cut short: {}", String::from_utf8_lossy(&received)),
            Ok(_) => received.push(byte[0]),
            Err(_) if received.is_empty() => return String::new(),
            Err(error) => panic!("{error} after {}", String::from_utf8_lossy(&received)),
        }
    };
    let head = String::from_utf8(received[..head_bytes].to_vec()).expect("text");
    let body_bytes = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().expect("a number"))
    });
    let mut body = vec![0; body_bytes.expect("a length")];
    stream.read_exact(&mut body).expect("the whole body");
    let dated = head
        .split_inclusive("\r\n")
        .filter(|line| !line.to_ascii_lowercase().starts_with("date:"));
    dated.collect::<String>() + &String::from_utf8(body).expect("text")
}
