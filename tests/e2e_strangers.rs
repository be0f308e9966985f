//! Connections without a token cannot keep a client with one out, however many they are.
//!
//! The crowd is `internet`'s: it has as many addresses as a test wants, and no firewall in front.
//! It opens all its connections and opens another for each that the server closes, up to a limit
//! and until the client is in.

mod common;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::status::{number, status};
use common::{
    RINGTUN, SOON, UP, assert_no_panic, invite, io_options, lab, start_server, tls_client,
    until_true,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ringtun_lab::topology::{SERVER_V4, SERVER_V6};
use ringtun_lab::{Host, Lab, Process};
use rstest::rstest;
use socket2::{Domain, Socket, Type};

/// IPv4 addresses of a crowd, each in a /24 of its own.
const ADDRESSES: u16 = 24;
/// Connections from each: as many as one source may have.
const CONNECTIONS_PER_ADDRESS: u16 = 48;
const CONNECTIONS: u16 = ADDRESSES * CONNECTIONS_PER_ADDRESS;
/// Connections that a crowd opens in all.
const OPENED_MAX: usize = 50_000;
/// For how long it opens them.
const ATTACK_TIME: Duration = Duration::from_secs(60);
/// How long a client may take to get in. It needs 0.1 s where there is no crowd.
const ADMISSION_TIME: Duration = Duration::from_secs(10);
/// Open files of a server that has fewer than the crowd has connections.
const FEW_FILES: &str = "160";

/// Where the connections of a crowd come from.
#[derive(Clone, Copy, Debug)]
enum Origin {
    /// [`ADDRESSES`] IPv4 addresses.
    Addresses,
    /// One IPv6 /48, each connection from a /64 of its own.
    Network,
}

impl Origin {
    /// The address that connection `number` comes from.
    fn source(self, number: u16) -> IpAddr {
        match self {
            Origin::Addresses => Ipv4Addr::new(198, 18, (number % ADDRESSES) as u8, 1).into(),
            Origin::Network => Ipv6Addr::new(0x2001, 0xdb8, 0xbad, number, 0, 0, 0, 1).into(),
        }
    }

    fn target(self) -> SocketAddr {
        match self {
            Origin::Addresses => (SERVER_V4, 443).into(),
            Origin::Network => (SERVER_V6, 443).into(),
        }
    }

    /// Makes all its addresses the host's own.
    fn add_addresses(self, host: &Host) {
        let (family, prefix) = match self {
            Origin::Addresses => ("-4", "198.18.0.0/15"),
            Origin::Network => ("-6", "2001:db8:bad::/48"),
        };
        let route = [family, "route", "add", "local", prefix, "dev", "lo"];
        host.exec("ip", route).expect("a local prefix");
    }
}

/// What a crowd says on each connection before it falls silent.
#[derive(Clone, Copy, Debug)]
enum Greeting {
    Nothing,
    ClientHello,
}

/// A crowd at work, as its thread and the test see it.
#[derive(Default)]
struct Crowd {
    opened: AtomicUsize,
    is_over: AtomicBool,
}

impl Crowd {
    /// Opens connections and holds them until the attack is over.
    fn attack(&self, origin: Origin, greeting: &[u8]) {
        let begun = Instant::now();
        let mut connections: Vec<Option<TcpStream>> = (0..CONNECTIONS).map(|_| None).collect();
        while !self.is_over.load(Ordering::Relaxed) && begun.elapsed() < ATTACK_TIME {
            for (number, connection) in (0..).zip(&mut connections) {
                let is_open = connection.as_mut().is_some_and(is_open);
                if !is_open && self.opened.load(Ordering::Relaxed) < OPENED_MAX {
                    *connection = open(origin.source(number), origin.target(), greeting).ok();
                    self.opened.fetch_add(1, Ordering::Relaxed);
                }
            }
            thread::yield_now();
        }
    }
}

/// Ends the attack also when a test fails.
struct Attack<'crowd>(&'crowd Crowd);

impl Drop for Attack<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

fn open(source: IpAddr, target: SocketAddr, greeting: &[u8]) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    // The whole prefix is the host's, but none of its addresses is assigned to an interface.
    match source {
        IpAddr::V4(_) => socket.set_freebind_v4(true)?,
        IpAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.connect_timeout(&target.into(), SOON)?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(greeting)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Whether the server has not closed the connection; what it says is thrown away.
fn is_open(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 4096]) {
        Ok(bytes) => bytes > 0,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// Lets a crowd loose on the server and then a client, which has to get in within
/// [`ADMISSION_TIME`].
fn admit_beside_a_crowd(
    lab: &Lab,
    origin: Origin,
    greeting: Greeting,
    is_under_attack: impl Fn() -> bool,
) -> Process {
    raise_open_files();
    let internet = lab.host("internet");
    origin.add_addresses(internet);
    let greeting = match greeting {
        Greeting::Nothing => Vec::new(),
        Greeting::ClientHello => tls_client::client_hello(),
    };
    let invite = invite(lab, "client");
    let crowd = Crowd::default();
    thread::scope(|scope| {
        let attack = Attack(&crowd);
        let attacker = || internet.enter(|| crowd.attack(origin, &greeting));
        let attacker = scope.spawn(attacker);
        until_true("attack", is_under_attack);
        let begun = Instant::now();
        let client = lab.host("client").command(RINGTUN).arg("client");
        // Attempts that fail are told at this level only, before the first that succeeds.
        let client = client.env("RUST_LOG", "debug").args(io_options());
        let client = client.arg(&invite).spawn();
        let client = client.expect("ringtun client");
        let up = client.wait_for_line(UP, ADMISSION_TIME);
        let taken = begun.elapsed();
        drop(attack);
        attacker.join().expect("no panic").expect("the host");
        let opened = crowd.opened.load(Ordering::Relaxed);
        eprintln!("{origin:?}: in after {taken:?}, beside {opened} connections");
        up.expect("a client that is up");
        client
    })
}

/// A descriptor for each connection.
fn raise_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("more files");
}

/// One of the server's counts of unauthenticated connections.
fn count(lab: &Lab, name: &str) -> u64 {
    let pointer = format!("/server/unauthenticated/{name}");
    number(&status(lab.host("server")), &pointer)
}

/// Warnings in the log that say this.
fn warnings(server: &Process, text: &str) -> usize {
    let lines = server.lines();
    let warnings = lines.iter().filter(|line| line.contains("WARN"));
    warnings.filter(|line| line.contains(text)).count()
}

#[rstest]
fn a_client_gets_in_beside_a_crowd(
    lab: Lab,
    #[values(Origin::Addresses, Origin::Network)] origin: Origin,
    #[values(Greeting::Nothing, Greeting::ClientHello)] greeting: Greeting,
) {
    let server = start_server(&lab, &[]);
    let evicted = match origin {
        Origin::Addresses => "evicted_total_limit",
        Origin::Network => "evicted_network_limit",
    };
    let has_opened_all = || count(&lab, "accepted") > u64::from(CONNECTIONS);
    let is_under_attack = || has_opened_all() && count(&lab, evicted) > 0;
    let client = admit_beside_a_crowd(&lab, origin, greeting, is_under_attack);
    // At the first attempt: a newcomer from a quiet network is neither refused nor evicted.
    let lines = client.lines();
    let failed = lines.iter().find(|line| line.contains("no connection yet"));
    assert_eq!(failed, None, "{lines:?}");
    assert!(count(&lab, "connected") <= 1024);
    until_true("warning", || {
        warnings(&server, "many unauthenticated connections") > 0
    });
    // The attack takes less than two minutes.
    assert!(warnings(&server, "") <= 2, "{:?}", server.lines());
    for process in [&server, &client] {
        assert_eq!(process.status(), None);
        assert_no_panic(process);
    }
}

#[rstest]
fn a_client_gets_in_where_descriptors_are_short(lab: Lab) {
    let command = format!("ulimit -n {FEW_FILES}; exec \"$0\" server \"$@\"");
    let host = lab.host("server");
    let shell = host.command("sh").args(["-c", &command, RINGTUN]);
    let server = shell.args(io_options()).spawn().expect("a shell");
    server.wait_for_line(UP, SOON).expect("a server that is up");
    // Asking for the status takes a descriptor too.
    let is_under_attack = || warnings(&server, "cannot accept connections now") > 0;
    let (origin, greeting) = (Origin::Addresses, Greeting::Nothing);
    let client = admit_beside_a_crowd(&lab, origin, greeting, is_under_attack);
    assert!(count(&lab, "evicted_shortage") > 0);
    // Of each of the two listeners, in one minute or two.
    let shortages = warnings(&server, "cannot accept connections now");
    assert!(shortages <= 4, "{:?}", server.lines());
    for process in [&server, &client] {
        assert_eq!(process.status(), None);
        assert_no_panic(process);
    }
}

/// Two minutes is what the kernel keeps them by itself.
#[rstest]
fn ended_connections_are_not_tracked_for_long(lab: Lab) {
    const CONNECTIONS: usize = 200;
    let _server = start_server(&lab, &[]);
    let host = lab.host("server");
    // Those that have expired are not listed, although they are removed later.
    let tracked = || {
        let list = host
            .exec("cat", ["/proc/net/nf_conntrack"])
            .expect("a list");
        list.lines()
            .filter(|line| line.contains("dport=443"))
            .count()
    };
    let most = lab
        .host("internet")
        .enter(|| {
            for number in 0..CONNECTIONS {
                let target = [Origin::Addresses, Origin::Network][number % 2].target();
                TcpStream::connect(target).expect("a connection");
            }
        })
        .map(|()| tracked())
        .expect("a host");
    assert!(most > CONNECTIONS / 2, "they are tracked: {most}");
    until_true("a table without them", || tracked() < CONNECTIONS / 10);
}
