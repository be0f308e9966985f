//! Flows that send little take the connection for them, and change from it in order.

use super::end::{End, Joined, SparseConnections, Terms, eventually, join, join_sparse};
use super::packets::*;
use ringtun::proto::offload::VirtioNetHdr;
use ringtun::proto::route_table::ConnectionRef;
use ringtun::proto::sparse_flows::PAUSE;
use ringtun::uring::buffer::BUDGET_BYTES_DEFAULT;

/// Two of these in a row are more than a sparse flow sends.
const MUCH_BYTES: usize = 40_000;
/// Packets that a flow sends by the ordinary connection before it is believed to have changed to it.
const ENOUGH_PACKETS: u64 = 10;
/// Packets of a flow, at most. On a busy machine it may take some before two of them come in time to be counted together.
const PACKETS_MAX: u32 = 200;

/// A session with a connection for sparse flows, each of two workers at both ends having one connection.
struct Fast {
    client: End,
    server: End,
    joined: Joined,
    sparse: SparseConnections,
}

impl Fast {
    fn new() -> Self {
        let mut client = End::with(2, BUDGET_BYTES_DEFAULT);
        let mut server = End::with(2, BUDGET_BYTES_DEFAULT);
        let terms = Terms::default();
        let joined = join(&mut client, &mut server, &terms);
        let sparse = join_sparse(&mut client, &mut server, &terms, &joined);
        let fast = Self {
            client,
            server,
            joined,
            sparse,
        };
        for (ordinary, sparse) in [
            (fast.joined.on_client[0], fast.sparse.0),
            (fast.joined.on_server[0], fast.sparse.1),
        ] {
            assert_ne!(ordinary.worker, sparse.worker);
        }
        fast
    }

    /// The client's queue of the worker that has the ordinary connection, and the other.
    fn queues(&self) -> (usize, usize) {
        let queue = |connection: ConnectionRef| usize::from(connection.worker);
        (queue(self.joined.on_client[0]), queue(self.sparse.0))
    }

    /// Packets that the client has sent by its ordinary connection, and by the one for sparse flows.
    fn sent(&self) -> (u64, u64) {
        let sent = |connection| {
            let info = self.client.workers().connection(connection);
            info.expect("it works").stats.counters.sent_packets.get()
        };
        (sent(self.joined.on_client[0]), sent(self.sparse.0))
    }

    /// Sends a small packet of a flow on a queue of the client.
    fn send_little(&self, queue: usize, port: u16) {
        let sent = self.sent();
        self.client
            .send(queue, VirtioNetHdr::PLAIN, &numbered(port, 1));
        assert_eq!(number_of(&self.server.receive_any().1), 1);
        eventually("a packet counted", || self.sent() != sent);
    }

    /// Sends much on a queue of the client until enough of it took the ordinary connection. If `answered`, each packet is answered,
    /// and the next one takes the queue that the answer came on, as the kernel has it.
    fn send_much(&self, mut queue: usize, port: u16, answered: bool) {
        for number in 0..PACKETS_MAX {
            if self.sent().0 >= ENOUGH_PACKETS {
                return;
            }
            let payload = [&[0; MUCH_BYTES], &number.to_be_bytes()[..]].concat();
            let packet = udp((CLIENT, port), (WEB, 53), &payload);
            self.client.send(queue, VirtioNetHdr::PLAIN, &packet);
            let (at, packet) = self.server.receive_any();
            assert_eq!(number_of(&packet), number);
            if answered {
                let reply = numbered_reply(port, number);
                self.server.send(at, VirtioNetHdr::PLAIN, &reply);
                let (at, packet) = self.client.receive_any();
                assert_eq!(number_of(&packet), number);
                queue = at;
            }
        }
    }
}

#[test]
fn a_flow_that_sends_little_takes_its_own_connection_until_it_sends_much() {
    let fast = Fast::new();
    let (ordinary, other) = fast.queues();
    fast.send_little(ordinary, 5000);
    assert_eq!(fast.sent(), (1, 0), "it is not known yet");
    std::thread::sleep(PAUSE);
    fast.send_little(ordinary, 5000);
    assert_eq!(fast.sent(), (1, 1));
    assert_eq!(fast.client.count("handed_over"), 1);

    fast.send_much(ordinary, 5000, false);
    let (by_ordinary, by_sparse) = fast.sent();
    assert_eq!(by_ordinary, ENOUGH_PACKETS);

    // Others are as they were.
    fast.send_little(other, 5001);
    std::thread::sleep(PAUSE);
    fast.send_little(other, 5001);
    assert!(fast.sent().1 > by_sparse);
    assert_eq!((fast.client.dropped(), fast.server.dropped()), (0, 0));
}

#[test]
fn a_flow_that_is_answered_is_led_to_the_worker_of_its_connection() {
    let fast = Fast::new();
    fast.send_much(fast.queues().1, 5000, true);
    assert_eq!(fast.sent().0, ENOUGH_PACKETS);
    assert_eq!((fast.client.dropped(), fast.server.dropped()), (0, 0));
}

#[test]
fn a_flow_that_is_never_answered_stays_on_its_worker() {
    let fast = Fast::new();
    fast.send_much(fast.queues().1, 5000, false);
    eventually("all packets counted", || {
        fast.sent() == (0, u64::from(PACKETS_MAX))
    });
    assert_eq!(fast.client.count("handed_over"), 0);
}
