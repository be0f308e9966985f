//! A real kernel takes trimmed super-packets, and completes their checksums to the right ones.
//!
//! Three network namespaces in a row: the sender's kernel makes super-packets, some of them are trimmed on the way into the
//! router, whose kernel cuts them up and completes the checksums in software, for its way out knows no offload; the
//! receiver's kernel gets ordinary packets and checks every checksum. Threads enter the namespaces, nothing is named.

use std::fs;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use ringtun::proto::offload::{
    GSO_NONE, Offloads, Signal, VIRTIO_NET_HDR_BYTES, VirtioNetHdr, signal,
};
use ringtun::proto::packet;
use ringtun::sys::tun as offloading_tun;
use rstest::rstest;

const SENDER: [IpAddr; 2] = addresses(1);
const RECEIVER: [IpAddr; 2] = addresses(3);
const PORT: u16 = 7000;
const MTU: u16 = 1500;
/// Whatever takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// One super-packet in so many is trimmed.
const TRIMMED_EVERY: u64 = 5;
const TCP_FLAG_FIN: u8 = 1;
/// Super-packets of all sizes.
const LONG_TRANSFER_BYTES: usize = 3 << 20;
/// The ten segments of a first window, and a super-packet of two that ends the stream.
const SHORT_TRANSFER_BYTES: usize = 16_400;
/// More than it ever takes until one of them ends with a super-packet.
const ATTEMPTS_MAX: usize = 10;

const fn addresses(host: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(10, 9, 0, host)),
        IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, host as u16)),
    ]
}

/// Runs `body` on a thread in a network namespace of its own. The namespace lives as long as what `body` opened in it.
fn in_namespace<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .expect("this test needs root, or a user namespace (just test)");
            body()
        });
        inside.join().expect("no panic in the namespace")
    })
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .expect("iproute2");
    assert!(status.success(), "ip {arguments}");
}

/// A device of ordinary packets, each with its checksum complete.
fn plain(name: &str) -> tun::Device {
    let mut config = tun::Configuration::default();
    config.tun_name(name).mtu(MTU).up();
    tun::create(&config).expect("a TUN device")
}

/// A queue whose packets come with a `virtio_net_hdr`, as in the tunnel, and whether super-packets of UDP are among them.
fn offloading(name: &str) -> (OwnedFd, bool) {
    let mut tun = offloading_tun::create(name, MTU, 1, true).expect("a TUN device");
    let offloads = Offloads::from_tun_flags(tun.offload_flags);
    assert!(offloads.tso4 && offloads.tso6, "super-packets of TCP");
    (tun.queues.remove(0), offloads.uso4 && offloads.uso6)
}

/// The path's four ends, in the order in which a packet from the sender passes them.
struct Path {
    sender: OwnedFd,
    router_in: OwnedFd,
    router_out: tun::Device,
    receiver: tun::Device,
    sends_uso: bool,
    /// What is to be opened in the sender's and in the receiver's namespace.
    sockets: (Sockets, Sockets),
}

/// Sockets that belong to one of the namespaces.
struct Sockets {
    udp: UdpSocket,
    listener: TcpListener,
    /// Not connected yet.
    tcp: socket2::Socket,
    /// The namespace's `/proc/net`, wherever it is read.
    snmp: [fs::File; 2],
}

impl Sockets {
    fn open(address: IpAddr) -> Sockets {
        let domain = socket2::Domain::for_address(SocketAddr::new(address, PORT));
        let snmp = ["snmp", "snmp6"]
            .map(|name| fs::File::open(format!("/proc/thread-self/net/{name}")).expect("proc"));
        Sockets {
            udp: UdpSocket::bind((address, PORT)).expect("bind"),
            listener: TcpListener::bind((address, PORT)).expect("bind"),
            tcp: socket2::Socket::new(domain, socket2::Type::STREAM, None).expect("socket"),
            snmp,
        }
    }

    /// Packets that the namespace's kernel refused for their checksum, or for other errors of their headers.
    fn checksum_errors(&mut self) -> u64 {
        let mut text = String::new();
        for file in &mut self.snmp {
            file.read_to_string(&mut text).expect("proc");
        }
        let mut errors = 0;
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2) {
            // snmp: a line of names, a line of values. snmp6: name and value.
            let (names, values) = (pair[0].split_whitespace(), pair[1].split_whitespace());
            for (name, value) in names.zip(values) {
                if matches!(name, "InCsumErrors" | "InHdrErrors") {
                    errors += value.parse::<u64>().expect("a number");
                }
            }
        }
        for line in lines {
            if let [name, value] = line.split_whitespace().collect::<Vec<_>>()[..]
                && (name.ends_with("InCsumErrors") || name.ends_with("InHdrErrors"))
            {
                errors += value.parse::<u64>().expect("a number");
            }
        }
        errors
    }
}

fn build(family: usize) -> Path {
    let (from, to) = (SENDER[family], RECEIVER[family]);
    let (sender, sends_uso, at_sender) = in_namespace(|| {
        let (queue, uso) = offloading("t0");
        set_up("t0", from, to);
        (queue, uso, Sockets::open(from))
    });
    let (router_in, router_out) = in_namespace(|| {
        let (queue, _) = offloading("in");
        let out = plain("out");
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{key}"), "1").expect("forwarding");
        }
        ip(&format!("route add {from} dev in"));
        ip(&format!("route add {to} dev out"));
        (queue, out)
    });
    let (receiver, at_receiver) = in_namespace(|| {
        let device = plain("t0");
        set_up("t0", to, from);
        (device, Sockets::open(to))
    });
    Path {
        sender,
        router_in,
        router_out,
        receiver,
        sends_uso,
        sockets: (at_sender, at_receiver),
    }
}

fn set_up(device: &str, own: IpAddr, other: IpAddr) {
    let nodad = if own.is_ipv6() { "nodad" } else { "" };
    ip(&format!("address add {own} dev {device} {nodad}"));
    ip(&format!("route add {other} dev {device}"));
}

/// What happened on the way.
#[derive(Default)]
struct Way {
    /// Whoever holds it keeps packets of offloading devices from passing.
    gate: Mutex<()>,
    over: AtomicBool,
    trimmed: AtomicU64,
    trimmed_with_fin: AtomicU64,
    trimmed_to_one: AtomicU64,
}

impl Way {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::SeqCst)
    }

    /// Trims some super-packets, among them the first that ends the stream: gives what is left.
    fn pass<'a>(&self, framed: &'a mut [u8], count: &mut u64) -> &'a [u8] {
        let header = header_of(framed);
        let super_packet = header.gso_type != GSO_NONE;
        let fin = super_packet
            && ends_stream(&framed[VIRTIO_NET_HDR_BYTES..])
            && self.trimmed_with_fin.load(Ordering::SeqCst) == 0;
        *count += u64::from(super_packet);
        if !super_packet || !fin && !count.is_multiple_of(TRIMMED_EVERY) {
            return framed;
        }
        let Signal::Trimmed { bytes } = signal(framed) else {
            panic!("a super-packet that cannot be trimmed: {header:?}");
        };
        let rest = &framed[bytes..];
        self.trimmed.fetch_add(1, Ordering::SeqCst);
        self.trimmed_with_fin
            .fetch_add(u64::from(fin), Ordering::SeqCst);
        let one = header_of(rest).gso_type == GSO_NONE;
        self.trimmed_to_one
            .fetch_add(u64::from(one), Ordering::SeqCst);
        rest
    }
}

fn header_of(framed: &[u8]) -> VirtioNetHdr {
    VirtioNetHdr::read(framed.first_chunk().expect("a header"))
}

fn ends_stream(packet: &[u8]) -> bool {
    let headers = packet::parse(packet).expect("a packet");
    packet[headers.transport_offset + 13] & TCP_FLAG_FIN != 0
        && headers.protocol == packet::PROTOCOL_TCP
}

/// Carries packets to and fro while `body` runs.
fn carry<T>(path: &Path, way: &Way, body: impl FnOnce() -> T) -> T {
    /// Ends the carrying also when `body` panics.
    struct Over<'a>(&'a Way);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.over.store(true, Ordering::SeqCst);
        }
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut count = 0;
            carry_framed(way, &path.sender, &path.router_in, |framed| {
                way.pass(framed, &mut count)
            });
        });
        scope.spawn(|| carry_framed(way, &path.router_in, &path.sender, |framed| framed));
        scope.spawn(|| carry_plain(way, &path.router_out, &path.receiver));
        scope.spawn(|| carry_plain(way, &path.receiver, &path.router_out));
        let _over = Over(way);
        body()
    })
}

const LOOK_UP: Duration = Duration::from_millis(20);

fn carry_framed(
    way: &Way,
    from: &OwnedFd,
    to: &OwnedFd,
    mut pass: impl for<'a> FnMut(&'a mut [u8]) -> &'a [u8],
) {
    let mut bytes = vec![0; VIRTIO_NET_HDR_BYTES + 65_535];
    while way.goes_on() {
        let mut files = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        poll(&mut files, PollTimeout::try_from(LOOK_UP).expect("short")).expect("poll");
        loop {
            let _open = way.gate.lock().expect("no panic");
            let Ok(length) = nix::unistd::read(from, &mut bytes) else {
                break;
            };
            let framed = pass(&mut bytes[..length]);
            // EINVAL would be the kernel's word for a header that contradicts the packet.
            assert_eq!(
                nix::unistd::write(to, framed),
                Ok(framed.len()),
                "{:?}",
                header_of(framed)
            );
        }
    }
}

fn carry_plain(way: &Way, from: &tun::Device, to: &tun::Device) {
    let mut bytes = vec![0; usize::from(MTU) + 100];
    while way.goes_on() {
        match from.recv_timeout(&mut bytes, LOOK_UP) {
            Ok(length) => assert_eq!(to.send(&bytes[..length]).expect("written"), length),
            Err(error) => assert_eq!(error.kind(), ErrorKind::TimedOut),
        }
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

#[rstest]
fn a_tcp_transfer_through_a_queue_that_trims_arrives_whole(
    #[values(0, 1)] family: usize,
    #[values(SHORT_TRANSFER_BYTES, LONG_TRANSFER_BYTES)] bytes: usize,
) {
    if bytes == LONG_TRANSFER_BYTES {
        assert!(transfer(family, bytes).trimmed.into_inner() >= 5);
        return;
    }
    // A kernel that has room for one more segment at the wrong moment sends the FIN with a single one.
    let trimmed = |_| transfer(family, bytes).trimmed_with_fin.into_inner();
    assert!((0..ATTEMPTS_MAX).map(trimmed).any(|trimmed| trimmed != 0));
}

/// One transfer, which arrives whole with right checksums, and what was done to it on its way.
fn transfer(family: usize, bytes: usize) -> Way {
    let mut path = build(family);
    let way = Way::default();
    let payload = pattern(bytes);
    let receiver = path.sockets.1.listener.try_clone().expect("a socket");
    let sender = path.sockets.0.tcp.try_clone().expect("a socket");
    let received = carry(&path, &way, || {
        sender.set_tcp_nodelay(true).expect("no delay");
        // It is always there, and does not pace: a window is sent at once.
        sender.set_tcp_congestion(b"reno").expect("reno");
        let to = SocketAddr::new(RECEIVER[family], PORT);
        sender
            .connect_timeout(&to.into(), PATIENCE)
            .expect("connected");
        let mut sender = TcpStream::from(sender);
        let (mut stream, _) = receiver.accept().expect("accepted");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            stream.read_to_end(&mut received).map(|_| received)
        });
        // What is behind the first window waits in the sender's kernel until there is all of it, the FIN included.
        let shut = (bytes == SHORT_TRANSFER_BYTES).then(|| way.gate.lock().expect("no panic"));
        sender.write_all(&payload).expect("written");
        sender.shutdown(std::net::Shutdown::Write).expect("shut");
        drop(shut);
        reader.join().expect("no panic").expect("all of it in time")
    });
    assert!(received == payload, "{} bytes", received.len());
    for sockets in [&mut path.sockets.0, &mut path.sockets.1] {
        assert_eq!(sockets.checksum_errors(), 0);
    }
    way
}

#[rstest]
fn the_datagrams_behind_a_trimmed_one_arrive(#[values(0, 1)] family: usize) {
    const DATAGRAM_BYTES: usize = 1000;
    const SENT: u64 = 4 * TRIMMED_EVERY;
    let mut path = build(family);
    assert!(path.sends_uso, "UDP super-packets need Linux 6.2");
    let way = Way::default();
    let to = SocketAddr::new(RECEIVER[family], PORT);
    // From two datagrams, of which one is left, to five; the last one is short.
    let datagrams = |number: u64| 2 + number as usize % 4;
    carry(&path, &way, || {
        let (from, at) = (&path.sockets.0.udp, &path.sockets.1.udp);
        at.set_read_timeout(Some(PATIENCE)).expect("timeout");
        for number in 1..=SENT {
            let payload = pattern(datagrams(number) * DATAGRAM_BYTES - number as usize);
            let size = DATAGRAM_BYTES as u16;
            let sent = sendmsg(
                from.as_raw_fd(),
                &[IoSlice::new(&payload)],
                &[ControlMessage::UdpGsoSegments(&size)],
                MsgFlags::empty(),
                Some(&SockaddrStorage::from(to)),
            );
            assert_eq!(sent, Ok(payload.len()));
            let gone = usize::from(number.is_multiple_of(TRIMMED_EVERY));
            for expected in payload.chunks(DATAGRAM_BYTES).skip(gone) {
                let mut datagram = [0; 2 * DATAGRAM_BYTES];
                let length = at.recv(&mut datagram).expect("a datagram");
                assert!(&datagram[..length] == expected, "of super-packet {number}");
            }
        }
    });
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    assert_eq!(count(&way.trimmed), SENT / TRIMMED_EVERY);
    assert_ne!(count(&way.trimmed_to_one), 0);
    assert_eq!(path.sockets.1.checksum_errors(), 0);
}
