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
use tokio::time::{Instant, sleep_until};

use super::connection_limiter::{ConnectionLimiter, Permit};
use super::handshake::{GOODBYE_TIME, SecureStream, StreamError};
use super::handshake_rate::{HandshakeRate, Turn};
use super::runtime::Stream;
use super::source_prefix::SourcePrefixes;
use super::tunnels::{Admitted, NewTunnel, Offer, Tunnels};
use crate::keeper::Link;
use crate::keeper::request::Peer;
use crate::proto::capsule::{Capsule, CloseReason};
use crate::proto::http::{
    self, InstanceId, Layer, OffloadHeader, Parsed, Request, Upgrade, UpgradeRequest,
};

/// From accept to a whole request head, as long as unauthenticated connections are few.
pub const GREETING_TIME: Duration = Duration::from_secs(10);
/// From accept to a whole request head where unauthenticated connections reach their limit. Enough
/// for a TLS handshake over a slow path with one lost packet.
pub const GREETING_TIME_MIN: Duration = Duration::from_secs(3);
/// From one answer to the next request's whole head, as long as unauthenticated connections are
/// few.
pub const IDLE_TIME: Duration = Duration::from_secs(15);
/// From one answer to the next request's whole head where unauthenticated connections reach their
/// limit.
pub const IDLE_TIME_MIN: Duration = Duration::from_secs(2);
/// The least time from one look for a handshake's turn to the next.
pub const TURN_INTERVAL_MIN: Duration = Duration::from_millis(100);
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
    /// Bounds the connections that are served here.
    pub limiter: ConnectionLimiter,
    /// Bounds their handshakes; nothing of it is held over an await.
    pub handshake_rate: RefCell<HandshakeRate>,
}

/// Serves one connection to its end, to its hand-over to a worker, or until it is evicted.
pub async fn serve(house: Rc<House>, stream: Stream, source: SocketAddr, permit: Permit) {
    let served = tokio::select! {
        // First, so that a connection which was evicted is not served any further.
        biased;
        () = permit.evicted() => return tracing::debug!("{source}: evicted"),
        served = greet(&house, stream, source, &permit) => served,
    };
    drop(permit);
    if let Err(error) = served {
        if matches!(error, StreamError::TimedOut) {
            house.limiter.count(|counts| counts.timeouts += 1);
        }
        tracing::debug!("{source}: {error}");
    }
}

async fn greet(
    house: &House,
    stream: Stream,
    source: SocketAddr,
    permit: &Permit,
) -> Result<(), StreamError> {
    let time = house
        .limiter
        .under_pressure(GREETING_TIME, GREETING_TIME_MIN);
    let deadline = Instant::now() + time;
    let mut received = Vec::new();
    if stream.read(&mut received, deadline).await? == 0 {
        return Ok(());
    }
    if received[0] != TLS_HANDSHAKE {
        return redirect(house, stream, received, deadline).await;
    }
    if !handshake_turn(house, source, deadline).await {
        tracing::debug!("{source}: too many handshakes");
        return Ok(());
    }
    let tls = Arc::clone(&house.tls);
    let accepted = SecureStream::accept(stream, tls, &received, deadline).await;
    if let Err(StreamError::Tls(_)) = accepted {
        house.limiter.count(|counts| counts.handshake_failures += 1);
    }
    let stream = accepted?;
    permit.finish_tls();
    converse(house, stream, source, deadline, permit).await
}

/// Waits until the source may begin one more handshake; false if that would be after the deadline.
///
/// A handshake that is over the rate waits, because many clients behind one address reconnect
/// together when a server restarts. Nothing is reserved for it: it asks again later, beside those
/// that have come since. If turns were handed out in advance, a crowd could take all turns up to
/// the deadline and then leave, and nobody else would get one.
async fn handshake_turn(house: &House, source: SocketAddr, deadline: Instant) -> bool {
    let prefixes = SourcePrefixes::of(source.ip());
    let mut is_delayed = false;
    loop {
        let now = Instant::now();
        let turn = house
            .handshake_rate
            .borrow_mut()
            .take(prefixes, now.into_std());
        let Turn::Wait(wait) = turn else {
            return true;
        };
        if !is_delayed {
            is_delayed = true;
            house
                .limiter
                .count_pressure(|counts| counts.handshakes_delayed += 1);
        }
        let again = now + wait.max(TURN_INTERVAL_MIN);
        if again >= deadline {
            house
                .limiter
                .count_pressure(|counts| counts.handshakes_dropped += 1);
            return false;
        }
        sleep_until(again).await;
    }
}

/// Answers one plain HTTP request with the way to `https`.
async fn redirect(
    house: &House,
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
    house.limiter.count(|counts| counts.web_requests += 1);
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
    permit: &Permit,
) -> Result<(), StreamError> {
    for served in 1..=REQUESTS_MAX {
        let Some(parsed) = next_request(&mut stream, deadline).await? else {
            break;
        };
        let answer_by = Instant::now() + ANSWER_TIME;
        let Some(request) = parsed else {
            house.limiter.count(|counts| counts.web_requests += 1);
            stream
                .write(&http::unreadable_response(SystemTime::now()), answer_by)
                .await?;
            break;
        };
        let verdict = judge(house, &request);
        if !matches!(verdict, Verdict::Tunnel(..)) {
            house.limiter.count(|counts| counts.web_requests += 1);
        }
        match verdict {
            Verdict::Tunnel(peer, upgrade) => {
                let Some(_connecting) = house.tunnels.borrow_mut().begin(&peer) else {
                    break;
                };
                permit.accept_token();
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
        deadline = Instant::now() + house.limiter.under_pressure(IDLE_TIME, IDLE_TIME_MIN);
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
                None => page(house, token.is_some()),
            }
        }
        Upgrade::Tunnel(upgrade) => match tunnels.authorise(&upgrade.token) {
            Some(peer) if upgrade.layer == Layer::Ip => {
                Verdict::Tunnel(peer.clone(), upgrade.clone())
            }
            Some(_) => Verdict::BadUpgrade,
            None => page(house, true),
        },
    }
}

fn page(house: &House, has_wrong_token: bool) -> Verdict {
    let wrong_tokens = u64::from(has_wrong_token);
    house
        .limiter
        .count(|counts| counts.wrong_tokens += wrong_tokens);
    Verdict::Page
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

    let name = peer.name.clone();
    let admitted = match admit(house, peer, instance) {
        Ok(admitted) => admitted,
        Err(reason) => {
            log_refusal(house, &name, source, reason);
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

fn log_refusal(house: &House, peer: &str, source: SocketAddr, reason: CloseReason) {
    let mut tunnels = house.tunnels.borrow_mut();
    tunnels.log_refusal(peer, source, reason);
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
    use std::os::fd::{AsFd, OwnedFd};

    use rustls::ClientConfig;
    use rustls::pki_types::ServerName;
    use tokio::sync::mpsc;

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
        house_with(Limits::default())
    }

    fn house_with(limits: Limits) -> (Rc<House>, Arc<ClientConfig>) {
        let (house, tls, _) = house_and_keeper(limits);
        (house, tls)
    }

    /// A house with these limits, and the keeper's end of the link, which answers nothing.
    fn house_and_keeper(limits: Limits) -> (Rc<House>, Arc<ClientConfig>, OwnedFd) {
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
            limiter: ConnectionLimiter::new(limits),
            handshake_rate: RefCell::new(HandshakeRate::new(limits.handshakes_per_second)),
        };
        (
            Rc::new(house),
            client_config(trust, Cipher::Auto).expect("client configuration"),
            keeper,
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
        let permit = house.limiter.admit(source.ip()).expect("a permit");
        let stream = Stream::new(TcpStream::into(served)).expect("stream");
        spawn(serve(Rc::clone(house), stream, source, permit));
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

    async fn connect_tls(house: &Rc<House>, tls: &Arc<ClientConfig>) -> SecureStream {
        let name = ServerName::try_from("site.example").expect("name");
        let connected =
            SecureStream::connect(visit(house).await, Arc::clone(tls), name, soon()).await;
        connected.expect("TLS")
    }

    #[test]
    fn an_evicted_connection_is_closed() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let limits = Limits {
                visitors: 2,
                visitors_per_source: 2,
                ..Limits::default()
            };
            let (house, tls) = house_with(limits);
            let mut web = connect_tls(&house, &tls).await;
            let request = b"GET / HTTP/1.1\r\nHost: site.example\r\n\r\n";
            web.write(request, soon()).await.expect("written");
            assert!(web.read(soon()).await.expect("an answer"));
            let silent = visit(&house).await;

            let _third = visit(&house).await;
            let mut received = Vec::new();
            let read = silent.read(&mut received, soon()).await;
            assert_eq!(read.expect("the end"), 0, "the silent one goes first");
            assert_eq!(house.limiter.counts().connected, 2);

            let mut fourth = connect_tls(&house, &tls).await;
            fourth.write(request, soon()).await.expect("written");
            assert!(fourth.read(soon()).await.expect("an answer"));
            // Both have finished TLS now, so the older one goes.
            let _fifth = visit(&house).await;
            while matches!(web.read(soon()).await, Ok(true)) {}
            fourth.write(request, soon()).await.expect("written");
            assert!(fourth.read(soon()).await.expect("an answer"));
            let counts = house.limiter.counts();
            assert_eq!(counts.evicted_source_limit, 3);
            assert_eq!(counts.web_requests, 3);
        });
    }

    #[test]
    fn a_connection_with_a_right_token_is_not_evicted() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let limits = Limits {
                visitors: 1,
                visitors_per_source: 1,
                ..Limits::default()
            };
            // Its lease is new and the keeper does not save it, so that the hand-over has to wait.
            let (house, tls, _keeper) = house_and_keeper(limits);
            let right = format!(
                "Authorization: Bearer {}\n",
                Token::from_bytes(TOKEN).reveal()
            );
            let request = upgrade(&right, "1.1", "Capsule-Protocol: ?1\n").replace('\n', "\r\n");
            let mut client = connect_tls(&house, &tls).await;
            client
                .write(request.as_bytes(), soon())
                .await
                .expect("written");
            let deadline = soon();
            while house.limiter.fullest_network().is_some() {
                assert!(Instant::now() < deadline, "it can still be evicted");
                sleep_until(Instant::now() + Duration::from_millis(1)).await;
            }
            assert_eq!(house.limiter.evict_for_shortage(), 0);
            assert!(house.limiter.admit(Ipv4Addr::LOCALHOST.into()).is_none());
            assert_eq!(house.limiter.counts().connected, 1);
        });
    }

    #[test]
    fn a_handshake_over_the_rate_waits_for_its_turn() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let limits = Limits {
                handshakes_per_second: 5,
                ..Limits::default()
            };
            let (house, tls) = house_with(limits);
            let source = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
            while !matches!(
                house
                    .handshake_rate
                    .borrow_mut()
                    .take(SourcePrefixes::of(source.ip()), Instant::now().into_std()),
                Turn::Wait(_)
            ) {}
            let late = Instant::now() + TURN_INTERVAL_MIN;
            assert!(!handshake_turn(&house, source, late).await);
            let counts = house.limiter.counts();
            assert_eq!(
                (counts.handshakes_delayed, counts.handshakes_dropped),
                (1, 1)
            );

            let _stream = connect_tls(&house, &tls).await;
            let counts = house.limiter.counts();
            assert_eq!(
                (counts.handshakes_delayed, counts.handshakes_dropped),
                (2, 1)
            );
        });
    }

    #[test]
    fn what_becomes_of_connections_is_counted() {
        Runtime::new(usize::MAX).expect("io_uring").run(async {
            let (house, tls) = house();
            let stream = visit(&house).await;
            let record = vec![TLS_HANDSHAKE, 3, 4, 0, 4, 0, 0, 0, 0];
            stream.write(record, soon()).await.expect("written");
            let mut alert = Vec::new();
            while matches!(stream.read(&mut alert, soon()).await, Ok(1..)) {}
            assert_eq!(house.limiter.counts().handshake_failures, 1);

            let wrong = format!(
                "Authorization: Bearer {}\n",
                Token::from_bytes([8; 32]).reveal()
            );
            let capsules = "Capsule-Protocol: ?1\n";
            for capsules in ["", capsules] {
                ask(&house, &tls, &upgrade(&wrong, "1.1", capsules)).await;
            }
            ask(&house, &tls, &upgrade("", "1.1", capsules)).await;
            let counts = house.limiter.counts();
            assert_eq!((counts.web_requests, counts.wrong_tokens), (3, 2));
            assert_eq!((counts.accepted, counts.evicted()), (4, 0));
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
