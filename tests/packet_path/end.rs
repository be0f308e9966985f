//! One end of a tunnel under test, and how two are joined.

use super::packets::lease;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ringtun::config::{Cipher, IoMode};
use ringtun::proto::budget::PeerId;
use ringtun::proto::http::OffloadHeader;
use ringtun::proto::offload::{GSO_UDP_L4, Offloads, VIRTIO_NET_HDR_BYTES, VirtioNetHdr, segment};
use ringtun::proto::route_table::{
    ConnectionRef, Member, RouteTable, SPARSE_ORDINAL, SessionId, SessionRoute,
};
use ringtun::tls::certificate::{self, Generated};
use ringtun::tls::{Established, Identity, TlsStream, Trust};
use ringtun::uring::buffer::BUDGET_BYTES_DEFAULT;
use ringtun::uring::probe::RingError;
use ringtun::uring::ring::PreparedRing;
use ringtun::worker::connection::InnerSources;
use ringtun::worker::{CloseCause, Event, Handoff, WorkerSetup, Workers};
use rustls::pki_types::ServerName;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Whatever takes longer than this has failed.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The context that both ends use for offload.
pub const OFFLOAD_CONTEXT: u64 = 2;
/// Bytes that may wait in a connection's queue.
const QUEUE_BYTES_MAX: usize = 1 << 20;
/// The server's name.
const NAME: &str = "files.example.net";

/// The workers of one host, and the near ends of their TUN queues.
pub struct End {
    workers: Option<Workers>,
    events: UnboundedReceiver<Event>,
    pub tun: Vec<UnixDatagram>,
    /// Segments of a super-packet of UDP that are still to be received, by queue.
    segments: Vec<Mutex<VecDeque<Vec<u8>>>>,
    clock: tokio::runtime::Runtime,
}

impl End {
    /// One worker with the usual memory.
    pub fn new() -> Self {
        Self::with(1, BUDGET_BYTES_DEFAULT)
    }

    /// As many workers as `queues`, each with `buffer_bytes` of packet memory.
    pub fn with(queues: usize, buffer_bytes: usize) -> Self {
        let rings = (0..queues).map(|_| prepared_ring());
        Self::with_rings(rings.collect(), buffer_bytes, usize::MAX)
    }

    /// A worker on each of `rings`, with `buffer_bytes` of packet memory.
    /// `lockable_bytes` of it may be registered, as far as is known.
    pub fn with_rings(
        rings: Vec<PreparedRing>,
        buffer_bytes: usize,
        lockable_bytes: usize,
    ) -> Self {
        let mut tun = Vec::new();
        let mut setups = Vec::new();
        for ring in rings {
            let (near, far) = UnixDatagram::pair().unwrap();
            near.set_read_timeout(Some(PATIENCE)).unwrap();
            near.set_write_timeout(Some(PATIENCE)).unwrap();
            far.set_nonblocking(true).unwrap();
            tun.push(near);
            setups.push(WorkerSetup {
                ring,
                tun: far.into(),
                tun_offloads: Offloads::ALL,
                buffer_bytes,
                lockable_bytes,
                queue_bytes_max: QUEUE_BYTES_MAX,
            });
        }
        let (sender, events) = unbounded_channel();
        let clock = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        Self {
            workers: Some(Workers::start(setups, &sender).unwrap()),
            events,
            segments: tun.iter().map(|_| Mutex::default()).collect(),
            tun,
            clock,
        }
    }

    pub fn workers(&self) -> &Workers {
        self.workers.as_ref().unwrap()
    }

    pub fn workers_mut(&mut self) -> &mut Workers {
        self.workers.as_mut().unwrap()
    }

    /// Takes the workers out, to stop them in the test.
    pub fn take_workers(&mut self) -> Workers {
        self.workers.take().unwrap()
    }

    /// Has the kernel route a packet into a queue.
    pub fn send(&self, queue: usize, header: VirtioNetHdr, packet: &[u8]) {
        let bytes = [&header.to_bytes(), packet].concat();
        assert_eq!(self.tun[queue].send(&bytes).unwrap(), bytes.len());
    }

    /// The next packet for who is behind the queue. Super-packets of UDP never get there whole: the kernel cuts them up.
    pub fn receive(&self, queue: usize) -> (VirtioNetHdr, Vec<u8>) {
        let mut segments = self.segments[queue].lock().unwrap();
        if segments.is_empty() {
            let (header, packet) = self.receive_whole(queue);
            if header.gso_type != GSO_UDP_L4 {
                return (header, packet);
            }
            segments.extend(segments_of(header, &packet));
        }
        (VirtioNetHdr::PLAIN, segments.pop_front().unwrap())
    }

    /// The next packet that a worker writes to its queue.
    pub fn receive_whole(&self, queue: usize) -> (VirtioNetHdr, Vec<u8>) {
        let mut bytes = vec![0; 1 << 17];
        let length = self.tun[queue].recv(&mut bytes).expect("a packet");
        let header = VirtioNetHdr::read(bytes.first_chunk().unwrap());
        (header, bytes[VIRTIO_NET_HDR_BYTES..length].to_vec())
    }

    /// The next packet on any queue, and which queue it was.
    pub fn receive_any(&self) -> (usize, Vec<u8>) {
        let is_waiting = |queue: &Mutex<VecDeque<_>>| !queue.lock().unwrap().is_empty();
        if let Some(queue) = self.segments.iter().position(is_waiting) {
            return (queue, self.receive(queue).1);
        }
        let mut files: Vec<_> = self
            .tun
            .iter()
            .map(|queue| PollFd::new(queue.as_fd(), PollFlags::POLLIN))
            .collect();
        let patience = PollTimeout::try_from(PATIENCE).unwrap();
        assert_ne!(poll(&mut files, patience).unwrap(), 0, "no packet came");
        let queue = files
            .iter()
            .position(|file| file.any() == Some(true))
            .unwrap();
        (queue, self.receive(queue).1)
    }

    /// What control is told next, but for the path: a busy machine may make a long one of loopback.
    pub fn event(&mut self) -> Event {
        loop {
            let event = self
                .clock
                .block_on(async { tokio::time::timeout(PATIENCE, self.events.recv()).await })
                .expect("an event in time")
                .expect("workers that run");
            if !matches!(event, Event::Path { .. }) {
                return event;
            }
        }
    }

    /// The next event, which has to be the end of `connection`.
    pub fn closed(&mut self, connection: ConnectionRef) -> CloseCause {
        match self.event() {
            Event::Closed {
                connection: closed,
                cause,
            } if closed == connection => cause,
            event => panic!("not the end of {connection:?}: {event:?}"),
        }
    }

    /// The sum of a counter over all workers.
    pub fn count(&self, name: &str) -> u64 {
        self.sum(|counter| counter == name)
    }

    /// Packets that became a further segment of the one before.
    pub fn gathered(&self, connection: ConnectionRef) -> u64 {
        let info = self.workers().connection(connection).unwrap();
        info.stats.counters.gathered_packets.get()
    }

    /// All packets that were dropped, for whatever reason.
    pub fn dropped(&self) -> u64 {
        self.sum(|counter| counter.starts_with("dropped_"))
    }

    fn sum(&self, wanted: impl Fn(&str) -> bool) -> u64 {
        self.workers()
            .counters()
            .flat_map(|counters| counters.read().entries())
            .filter(|(name, _)| wanted(name))
            .map(|(_, value)| value)
            .sum()
    }

    /// Gives a connection to the workers.
    pub fn add(&mut self, outer: Outer, sources: InnerSources, terms: &Terms) -> ConnectionRef {
        let connection = self.workers_mut().allocate(&[], false);
        self.hand_off(connection, outer, sources, terms);
        connection
    }

    /// Gives a connection for sparse flows to the workers, beside others.
    pub fn add_sparse(
        &mut self,
        outer: Outer,
        sources: InnerSources,
        terms: &Terms,
        others: &[ConnectionRef],
    ) -> ConnectionRef {
        let connection = self.workers_mut().allocate(others, true);
        self.hand_off(connection, outer, sources, terms);
        connection
    }

    fn hand_off(
        &mut self,
        connection: ConnectionRef,
        outer: Outer,
        sources: InnerSources,
        terms: &Terms,
    ) {
        self.workers_mut().add(Handoff {
            connection,
            peer: terms.peer,
            socket: Arc::new(outer.socket.into()),
            established: outer.established,
            inner_sources: sources,
            offload: terms.offload_header(),
            accepts: terms.offload.unwrap_or(Offloads::NONE),
            follows_path: false,
        });
    }

    /// Sends everything to these connections, as a client does.
    pub fn route_everything(&self, connections: &[ConnectionRef]) {
        let table = RouteTable::client(session(connections, None));
        self.workers().set_routes(Arc::new(table));
    }

    /// Sends what is for the client to these connections, as a server does.
    pub fn route_lease(&self, connections: &[ConnectionRef]) {
        self.route_leases([(lease(), connections)]);
    }

    /// Sends what is for each lease to its own connections.
    pub fn route_leases<'c>(
        &self,
        leases: impl IntoIterator<Item = (Vec<IpAddr>, &'c [ConnectionRef])>,
    ) {
        let mut table = RouteTable::empty();
        for (addresses, connections) in leases {
            table.insert(&addresses, session(connections, None));
        }
        self.workers().set_routes(Arc::new(table));
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(workers) = self.workers.take() {
            workers.stop(None);
        }
    }
}

/// What the kernel makes of a packet of any kind.
pub fn segments_of(header: VirtioNetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut scratch = vec![0; 1 << 16];
    let mut segments = Vec::new();
    segment(
        header,
        packet,
        Offloads::NONE,
        &mut scratch,
        |_, segment| segments.push(segment.to_vec()),
    )
    .unwrap();
    segments
}

fn session(connections: &[ConnectionRef], sparse: Option<ConnectionRef>) -> SessionRoute {
    let ordinals = (0..).zip(connections.iter().copied());
    let members = ordinals.chain(sparse.map(|sparse| (SPARSE_ORDINAL, sparse)));
    let members = members.map(|(ordinal, connection)| Member {
        ordinal,
        connection,
        silent: false,
    });
    SessionRoute::new(SessionId(1), members)
}

/// What client and server have agreed on.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Whose connections they are, on the other end.
    pub peer: PeerId,
    pub connections: usize,
    /// What both accept; `None` for a foreign end that knows context 0 only.
    pub offload: Option<Offloads>,
    pub client_may_use: Vec<IpAddr>,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            peer: PeerId::default(),
            connections: 1,
            offload: Some(Offloads::ALL),
            client_may_use: lease(),
        }
    }
}

impl Terms {
    pub fn offload_header(&self) -> Option<OffloadHeader> {
        self.offload.map(|accepts| OffloadHeader {
            context: OFFLOAD_CONTEXT,
            accepts,
        })
    }

    pub fn client_sources(&self) -> InnerSources {
        InnerSources::Only(self.client_may_use.clone())
    }
}

/// The connections of a session, on both ends in the same order.
pub struct Joined {
    pub on_client: Vec<ConnectionRef>,
    pub on_server: Vec<ConnectionRef>,
}

/// Joins two ends by a session.
pub fn join(client: &mut End, server: &mut End, terms: &Terms) -> Joined {
    let (mut on_client, mut on_server) = (Vec::new(), Vec::new());
    for _ in 0..terms.connections {
        let (ours, theirs) = connect();
        on_client.push(client.add(ours, InnerSources::Any, terms));
        on_server.push(server.add(theirs, terms.client_sources(), terms));
    }
    client.route_everything(&on_client);
    server.route_lease(&on_server);
    Joined {
        on_client,
        on_server,
    }
}

/// The connections for sparse flows of a session, on the client and on the server.
pub type SparseConnections = (ConnectionRef, ConnectionRef);

/// Adds a connection for sparse flows to a session.
pub fn join_sparse(
    client: &mut End,
    server: &mut End,
    terms: &Terms,
    joined: &Joined,
) -> SparseConnections {
    let (ours, theirs) = connect();
    let on_client = client.add_sparse(ours, InnerSources::Any, terms, &joined.on_client);
    let on_server = server.add_sparse(theirs, terms.client_sources(), terms, &joined.on_server);
    let table = RouteTable::client(session(&joined.on_client, Some(on_client)));
    client.workers().set_routes(Arc::new(table));
    let mut table = RouteTable::empty();
    table.insert(&lease(), session(&joined.on_server, Some(on_server)));
    server.workers().set_routes(Arc::new(table));
    (on_client, on_server)
}

/// A client and a server with one worker each, joined by one connection.
pub fn pair(terms: &Terms) -> (End, End, Joined) {
    let (mut client, mut server) = (End::new(), End::new());
    let joined = join(&mut client, &mut server, terms);
    (client, server, joined)
}

/// One end of an outer connection after its handshake.
pub struct Outer {
    pub socket: TcpStream,
    pub established: Established,
}

/// Connects over loopback and shakes hands; the client's end comes first.
pub fn connect() -> (Outer, Outer) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let identity = identity();
    let trust = Trust::Pin(identity.pin().unwrap());
    let name = ServerName::try_from(NAME).unwrap();
    let client = TlsStream::client(
        certificate::client_config(trust, Cipher::Auto).unwrap(),
        name,
    )
    .unwrap();
    let server =
        TlsStream::server(certificate::server_config(identity, Cipher::Auto).unwrap()).unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| shake_hands(far, server));
        (shake_hands(near, client), server.join().unwrap())
    })
}

fn identity() -> Identity {
    static GENERATED: OnceLock<Generated> = OnceLock::new();
    let generated = GENERATED.get_or_init(|| certificate::generate(NAME).unwrap());
    Identity::from_pem(
        generated.certificate_pem.as_bytes(),
        generated.key_pem.as_bytes(),
    )
    .unwrap()
}

fn shake_hands(mut socket: TcpStream, mut stream: TlsStream) -> Outer {
    ringtun::sys::socket::tune(socket.as_fd()).unwrap();
    let mut ciphertext = [0; 4096];
    loop {
        socket.write_all(&stream.take_outgoing()).unwrap();
        if !stream.is_handshaking() {
            break;
        }
        let bytes = socket.read(&mut ciphertext).unwrap();
        assert_ne!(bytes, 0, "the other end hung up");
        stream.feed(&ciphertext[..bytes]).unwrap();
    }
    Outer {
        socket,
        established: stream.into_records().unwrap(),
    }
}

/// Packets that surely fit into the socket that stands for a TUN queue (`net.unix.max_dgram_qlen` and one more).
pub const TUN_STAND_IN_PACKETS: u32 = 8;

/// What the workers may use of io_uring; the environment variable is that of the end-to-end tests.
///
/// In baseline mode a write to a socket that is full waits in the kernel, and others may overtake it. A TUN queue takes or
/// drops every packet at once, so tests may not fill what stands for it.
pub fn io_mode() -> IoMode {
    match std::env::var("RINGTUN_TEST_IO").as_deref() {
        Err(_) | Ok("auto") => IoMode::Auto,
        Ok("baseline") => IoMode::Baseline,
        Ok(other) => panic!("RINGTUN_TEST_IO={other}: auto or baseline"),
    }
}

/// A ring. Where locked memory is short, one that has ended may have to give its own back first, which takes a while.
pub fn prepared_ring() -> PreparedRing {
    let mut prepared = None;
    eventually("there is memory for a ring", || {
        match PreparedRing::new(io_mode(), usize::MAX) {
            Ok(ring) => prepared = Some(ring),
            Err(RingError::MemoryLocked) => {}
            Err(error) => panic!("{error}"),
        }
        prepared.is_some()
    });
    prepared.unwrap()
}

/// Waits for something that no file tells of.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::yield_now();
    }
}
