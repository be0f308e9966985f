//! One accepted connection, until it is a tunnel or has been answered like any web browser.
//!
//! The first byte decides, on every listener: 0x16 begins a TLS handshake; anything else is plain HTTP and is sent to
//! `https`. Inside TLS, a valid upgrade with a known token becomes a tunnel. Everything else gets what an ordinary
//! small web server would say, so that a prober learns nothing.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use std::cell::RefCell;
use std::sync::Arc;
use tokio::time::Instant;

use super::gate::Place;
use super::handshake::{GOODBYE_TIME, SecureStream, StreamError};
use super::runtime::Stream;
use super::tunnels::{Admitted, NewTunnel, Offer, Tunnels};
use crate::keeper::Link;
use crate::keeper::request::Peer;
use crate::proto::capsule::{Capsule, CloseReason};
use crate::proto::http::{
    self, InstanceId, Layer, OffloadHeader, Parsed, Request, Upgrade, UpgradeRequest,
};

/// From accept to a whole request head.
pub const GREETING_TIME: Duration = Duration::from_secs(10);
/// From one answer to the next request's whole head.
pub const IDLE_TIME: Duration = Duration::from_secs(15);
/// How long an answer may take to be sent.
pub const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Requests answered on one connection.
pub const REQUESTS_MAX: usize = 100;
/// The longest request body that is read and thrown away; a longer one ends the connection.
pub const BODY_BYTES_MAX: u64 = 1024 * 1024;

/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// What every visitor's task needs.
pub struct House {
    /// The server's certificate and key.
    pub tls: Arc<ServerConfig>,
    /// What a client is told.
    pub offer: Offer,
    /// The way to the keeper.
    pub link: Link,
    /// Who is connected; nothing of it is held over an await.
    pub tunnels: RefCell<Tunnels>,
}

/// Serves one connection to its end, or to its hand-over to a worker.
pub async fn serve(house: Rc<House>, stream: Stream, source: SocketAddr, place: Place) {
    let served = greet(&house, stream, source).await;
    drop(place);
    if let Err(error) = served {
        tracing::debug!("{source}: {error}");
    }
}

async fn greet(house: &House, stream: Stream, source: SocketAddr) -> Result<(), StreamError> {
    let deadline = Instant::now() + GREETING_TIME;
    let mut received = Vec::new();
    if stream.read(&mut received, deadline).await? == 0 {
        return Ok(());
    }
    if received[0] != TLS_HANDSHAKE {
        return redirect(stream, received, deadline).await;
    }
    let stream = SecureStream::accept(stream, Arc::clone(&house.tls), &received, deadline).await?;
    converse(house, stream, source, deadline).await
}

/// Answers one plain HTTP request with the way to `https`.
async fn redirect(
    stream: Stream,
    mut received: Vec<u8>,
    deadline: Instant,
) -> Result<(), StreamError> {
    let answer = loop {
        match http::parse_request(&received) {
            Parsed::Incomplete => {
                if stream.read(&mut received, deadline).await? == 0 {
                    return Ok(());
                }
            }
            Parsed::Request { request, .. } => {
                break http::redirect_response(&request, SystemTime::now());
            }
            Parsed::Unreadable => break http::unreadable_response(SystemTime::now()),
        }
    };
    stream.write(answer, Instant::now() + ANSWER_TIME).await?;
    stream.finish(GOODBYE_TIME).await;
    Ok(())
}

/// Answers requests inside TLS until one is an upgrade or the visitor leaves.
async fn converse(
    house: &House,
    mut stream: SecureStream,
    source: SocketAddr,
    mut deadline: Instant,
) -> Result<(), StreamError> {
    for served in 1..=REQUESTS_MAX {
        let Some(parsed) = next_request(&mut stream, deadline).await? else {
            break;
        };
        let answer_by = Instant::now() + ANSWER_TIME;
        let Some(request) = parsed else {
            stream
                .write(&http::unreadable_response(SystemTime::now()), answer_by)
                .await?;
            break;
        };
        match judge(house, &request) {
            Verdict::Tunnel(peer, upgrade) => {
                return tunnel(house, stream, source, peer, upgrade).await;
            }
            Verdict::BadUpgrade => {
                stream
                    .write(
                        &http::bad_request_response(&request, SystemTime::now()),
                        answer_by,
                    )
                    .await?;
            }
            Verdict::Page => {
                let answer = http::site_response(&request, SystemTime::now());
                stream.write(&answer, answer_by).await?;
            }
        }
        if !request.keep_alive || served == REQUESTS_MAX {
            break;
        }
        deadline = Instant::now() + IDLE_TIME;
        if !skip_body(&mut stream, request.body_bytes, deadline).await? {
            break;
        }
    }
    stream.close().await;
    Ok(())
}

/// The next request: `Some(None)` if it is unreadable, `None` when the visitor has left.
async fn next_request(
    stream: &mut SecureStream,
    deadline: Instant,
) -> Result<Option<Option<Request>>, StreamError> {
    loop {
        match http::parse_request(stream.plaintext()) {
            Parsed::Incomplete => {
                if !stream.read(deadline).await? {
                    return Ok(None);
                }
            }
            Parsed::Request {
                request,
                head_bytes,
            } => {
                stream.plaintext().drain(..head_bytes);
                return Ok(Some(Some(request)));
            }
            Parsed::Unreadable => return Ok(Some(None)),
        }
    }
}

/// Reads a request's body and throws it away; `false` if it is too long or does not come.
async fn skip_body(
    stream: &mut SecureStream,
    bytes: u64,
    deadline: Instant,
) -> Result<bool, StreamError> {
    if bytes > BODY_BYTES_MAX {
        return Ok(false);
    }
    let mut left = bytes as usize;
    loop {
        let plaintext = stream.plaintext();
        let here = left.min(plaintext.len());
        plaintext.drain(..here);
        left -= here;
        if left == 0 {
            return Ok(true);
        }
        if !stream.read(deadline).await? {
            return Ok(false);
        }
    }
}

/// What a request deserves.
enum Verdict {
    Tunnel(Peer, UpgradeRequest),
    /// The token is right, so there is nothing to hide: RFC 9484, section 4.1, wants a 400.
    BadUpgrade,
    Page,
}

fn judge(house: &House, request: &Request) -> Verdict {
    let tunnels = house.tunnels.borrow();
    match &request.upgrade {
        Upgrade::None => Verdict::Page,
        Upgrade::Malformed { token } => {
            match token.as_ref().and_then(|token| tunnels.authorise(token)) {
                Some(_) => Verdict::BadUpgrade,
                None => Verdict::Page,
            }
        }
        Upgrade::Tunnel(upgrade) => match tunnels.authorise(&upgrade.token) {
            Some(peer) if upgrade.layer == Layer::Ip => {
                Verdict::Tunnel(peer.clone(), upgrade.clone())
            }
            Some(_) => Verdict::BadUpgrade,
            None => Verdict::Page,
        },
    }
}

/// Answers an authorised upgrade and hands the connection over.
async fn tunnel(
    house: &House,
    mut stream: SecureStream,
    source: SocketAddr,
    peer: Peer,
    upgrade: UpgradeRequest,
) -> Result<(), StreamError> {
    let deadline = Instant::now() + ANSWER_TIME;
    // A CONNECT-IP client that is not ours is one instance a connection.
    let instance = upgrade
        .instance
        .or_else(|| InstanceId::generate().ok())
        .ok_or(StreamError::Closed)?;
    let accepts = upgrade.offload.as_ref().map(|theirs| OffloadHeader {
        context: theirs.context,
        accepts: house.offer.accepts,
    });
    let mut answer = http::upgrade_response(upgrade.layer, accepts.as_ref());

    let admitted = match admit(house, peer, instance) {
        Ok(admitted) => admitted,
        Err(reason) => {
            tracing::info!("{source}: not taken: {reason}");
            Capsule::put_close(reason, &mut answer);
            stream.write(&answer, deadline).await?;
            stream.close().await;
            return Ok(());
        }
    };
    if let Some(lease) = admitted.unsaved.clone() {
        // Without it the peer has its addresses until the server restarts, which is better than nothing.
        if let Err(error) = house.link.save_lease(lease).await {
            tracing::warn!(
                "the addresses of {} will not survive a restart: {error}",
                admitted.peer.name
            );
        }
    }
    match house.offer.capsules(admitted.lease) {
        Ok(capsules) => answer.extend(capsules),
        Err(error) => {
            tracing::error!("{source}: not taken: {error}");
            Capsule::put_close(CloseReason::Shutdown, &mut answer);
            stream.write(&answer, deadline).await?;
            stream.close().await;
            return Ok(());
        }
    }
    stream.write(&answer, deadline).await?;
    let (socket, established) = stream.into_parts()?;
    house.tunnels.borrow_mut().establish(NewTunnel {
        admitted,
        instance,
        ordinal: upgrade.ordinal,
        source,
        socket,
        established,
        offload: upgrade.offload,
    });
    Ok(())
}

fn admit(house: &House, peer: Peer, instance: InstanceId) -> Result<Admitted, CloseReason> {
    let mut tunnels = house.tunnels.borrow_mut();
    if tunnels.is_superseded(&peer, instance) {
        return Err(CloseReason::Superseded);
    }
    tunnels.admit(peer).map_err(|_| CloseReason::Exhausted)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use rustls::ClientConfig;
    use rustls::pki_types::ServerName;
    use tokio::sync::mpsc;

    use super::super::gate::Gate;
    use super::super::runtime::{Runtime, connect, spawn};
    use super::*;
    use crate::config::{Cipher, ClientConfig as Config, Limits};
    use crate::keeper::DaemonStart;
    use crate::keeper::request::{ClientSetup, Origin, Setup};
    use crate::proto::address_pool::AddressPool;
    use crate::proto::http::Token;
    use crate::proto::offload::Offloads;
    use crate::sys::fdpass::{self, FrameWriter};
    use crate::sys::netns;
    use crate::tls::certificate::{Identity, Trust, client_config, generate, server_config};
    use crate::worker::Workers;

    const TOKEN: [u8; 32] = [7; 32];

    /// A house whose keeper has gone, with no worker: enough for everything but a tunnel.
    fn house() -> (Rc<House>, Arc<ClientConfig>) {
        let (daemon, keeper) = fdpass::pair().expect("socket pair");
        let setup = Setup::Client(Box::new(ClientSetup {
            origin: Origin {
                keeper: 0,
                namespace: netns::current().expect("a network namespace"),
            },
            config: Config::default(),
            invite: String::new(),
            tun_offload_flags: 0,
            tun_queues: 0,
        }));
        let frame = serde_json::to_vec(&setup).expect("serialised");
        let (control, _) = fdpass::pair().expect("socket pair");
        FrameWriter::new(&frame, vec![control])
            .expect("frame")
            .send(keeper.as_fd())
            .expect("sent");
        let (_, _, link, _) = DaemonStart::receive(daemon)
            .expect("received")
            .connect()
            .expect("a link");

        let generated = generate("site.example").expect("certificate");
        let identity = Identity::from_pem(
            generated.certificate_pem.as_bytes(),
            generated.key_pem.as_bytes(),
        );
        let identity = identity.expect("identity");
        let trust = Trust::Pin(identity.pin().expect("pin"));
        let pool = AddressPool::new(
            "10.87.0.0/24".parse().expect("prefix"),
            "fd00::/64".parse().expect("prefix"),
        );
        let workers = Workers::start(Vec::new(), &mpsc::unbounded_channel().0).expect("no workers");
        let peer = Peer {
            name: "alice".into(),
            token_sha256: Token::from_bytes(TOKEN).sha256(),
        };
        let house = House {
            tls: server_config(identity, Cipher::Auto).expect("server configuration"),
            offer: Offer {
                routes: Vec::new(),
                dns: Vec::new(),
                accepts: Offloads::NONE,
            },
            link,
            tunnels: RefCell::new(Tunnels::new(
                workers,
                Offloads::NONE,
                false,
                pool.expect("pool"),
                vec![peer],
            )),
        };
        (
            Rc::new(house),
            client_config(trust, Cipher::Auto).expect("client configuration"),
        )
    }

    /// A visitor's own end of a connection that is being served.
    async fn visit(house: &Rc<House>) -> Stream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let address = listener.local_addr().expect("address");
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
            .expect("socket");
        let socket = connect(socket.into(), address, soon())
            .await
            .expect("connected");
        let (served, source) = listener.accept().expect("accepted");
        let place = Gate::new(Limits::default())
            .enter(source.ip())
            .expect("a place");
        let stream = Stream::new(TcpStream::into(served)).expect("stream");
        spawn(serve(Rc::clone(house), stream, source, place));
        Stream::new(socket).expect("stream")
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// Everything that is answered to `request` inside TLS, up to the end of the stream, without the date.
    async fn ask(house: &Rc<House>, tls: &Arc<ClientConfig>, request: &str) -> String {
        let name = ServerName::try_from("site.example").expect("name");
        let mut stream = SecureStream::connect(visit(house).await, Arc::clone(tls), name, soon())
            .await
            .expect("TLS");
        stream
            .write(request.replace('\n', "\r\n").as_bytes(), soon())
            .await
            .expect("written");
        while stream.read(soon()).await.expect("read") {}
        without_date(stream.plaintext())
    }

    fn without_date(answer: &[u8]) -> String {
        let text = String::from_utf8(answer.to_vec()).expect("text");
        text.split_inclusive("\r\n")
            .filter(|line| !line.starts_with("Date: "))
            .collect()
    }

    fn upgrade(token: &str, version: &str, capsules: &str) -> String {
        format!(
            "GET /.well-known/masque/ip/*/*/ HTTP/{version}\nHost: site.example\nConnection: Upgrade, close\n\
             Upgrade: connect-ip\n{capsules}{token}\n"
        )
    }

    #[test]
    fn whoever_has_no_token_sees_a_small_site_and_nothing_else() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (house, tls) = house();
            let page = ask(
                &house,
                &tls,
                "GET / HTTP/1.1\nHost: site.example\nConnection: close\n\n",
            )
            .await;
            assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");

            let nothing = ask(
                &house,
                &tls,
                "GET /nothing HTTP/1.1\nHost: site.example\nConnection: close\n\n",
            )
            .await;
            assert!(
                nothing.starts_with("HTTP/1.1 404 Not Found\r\n"),
                "{nothing}"
            );
            let wrong = format!(
                "Authorization: Bearer {}\n",
                Token::from_bytes([8; 32]).reveal()
            );
            let capsules = "Capsule-Protocol: ?1\n";
            for request in [
                upgrade(&wrong, "1.1", capsules),
                upgrade("", "1.1", capsules),
                upgrade("Authorization: Basic YWxpY2U6\n", "1.1", capsules),
                upgrade(&wrong, "1.1", ""),
                upgrade(&wrong, "1.0", capsules),
            ] {
                assert_eq!(ask(&house, &tls, &request).await, nothing, "{request}");
            }
        });
    }

    #[test]
    fn a_malformed_upgrade_with_the_right_token_is_told_so() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (house, tls) = house();
            let right = format!(
                "Authorization: Bearer {}\n",
                Token::from_bytes(TOKEN).reveal()
            );
            let answer = ask(&house, &tls, &upgrade(&right, "1.1", "")).await;
            assert!(
                answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
                "{answer}"
            );
        });
    }

    #[test]
    fn a_connection_is_kept_for_more_requests_and_bodies_are_passed_over() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (house, tls) = house();
            let requests = "POST /a HTTP/1.1\nHost: site.example\nContent-Length: 5\n\n12345\
                            GET / HTTP/1.1\nHost: site.example\nConnection: close\n\n";
            let answers = ask(&house, &tls, requests).await;
            assert!(answers.starts_with("HTTP/1.1 404 "), "{answers}");
            assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 1, "{answers}");
        });
    }

    #[test]
    fn garbage_inside_tls_gets_an_ordinary_400() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (house, tls) = house();
            let answer = ask(&house, &tls, "\u{1}\u{2}\u{3}\n\n").await;
            assert!(
                answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
                "{answer}"
            );
            let long = format!(
                "GET / HTTP/1.1\nHost: site.example\nX: {}\n\n",
                "x".repeat(20_000)
            );
            let answer = ask(&house, &tls, &long).await;
            assert!(
                answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
                "{answer}"
            );
        });
    }

    #[test]
    fn plain_http_is_sent_to_https() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (house, _) = house();
            let stream = visit(&house).await;
            let request = b"GET /a?b HTTP/1.1\r\nHost: site.example:80\r\n\r\n".to_vec();
            stream.write(request, soon()).await.expect("written");
            let mut answer = Vec::new();
            while stream.read(&mut answer, soon()).await.expect("read") != 0 {}
            let answer = without_date(&answer);
            assert!(answer.starts_with("HTTP/1.1 301 "), "{answer}");
            assert!(
                answer.contains("Location: https://site.example/a?b\r\n"),
                "{answer}"
            );
        });
    }
}
