//! What is counted of a connection is what happened to it.

use super::end::{End, Terms, eventually, pair};
use super::packets::*;
use super::peer::Peer;
use ringtun::proto::offload::{Offloads, VirtioNetHdr};
use ringtun::proto::route_table::ConnectionRef;
use ringtun::stats::{ConnectionCounts, ConnectionStats};
use rstest::rstest;
use std::net::Ipv4Addr;
use std::sync::Arc;

fn stats(end: &End, connection: ConnectionRef) -> Arc<ConnectionStats> {
    let info = end.workers().connection(connection).expect("added");
    Arc::clone(&info.stats)
}

fn counts(end: &End, connection: ConnectionRef) -> ConnectionCounts {
    stats(end, connection).counters.read()
}

#[rstest]
fn both_ends_count_the_same_packets(
    #[values(None, Some(Offloads::ALL))] offload: Option<Offloads>,
) {
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    let (client, server, joined) = pair(&terms);
    let (ours, theirs) = (joined.on_client[0], joined.on_server[0]);
    let stolen = udp((Ipv4Addr::new(10, 87, 0, 3), 5000), (WEB, 53), b"not mine");
    client.send(0, VirtioNetHdr::PLAIN, &stolen);
    let mut bytes = 0;
    for number in 0..20 {
        let packet = numbered(5000, number);
        bytes += packet.len() as u64;
        client.send(0, VirtioNetHdr::PLAIN, &packet);
        assert_eq!(number_of(&server.receive(0).1), number);
    }
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 1));
    client.receive(0);

    // A packet is out before the worker has counted it. The client may also have received tickets of the handshake.
    eventually("the socket's answer is counted", || {
        counts(&client, ours).sent_stream_bytes == counts(&server, theirs).received_stream_bytes
            && counts(&server, theirs).sent_stream_bytes > 0
            && counts(&server, theirs).sent_stream_bytes
                <= counts(&client, ours).received_stream_bytes
    });
    let (client_counts, server_counts) = (counts(&client, ours), counts(&server, theirs));
    let stolen_bytes = stolen.len() as u64;
    assert_eq!(client_counts.sent_packets, 21);
    assert_eq!(client_counts.sent_bytes, bytes + stolen_bytes);
    assert_eq!(server_counts.received_packets, 20);
    assert_eq!(server_counts.received_bytes, bytes);
    assert_eq!(
        server_counts.drops().collect::<Vec<_>>(),
        [("spoofed", 1)],
        "{server_counts:?}"
    );
    assert!(client_counts.sent_stream_bytes > client_counts.sent_bytes);
    assert_eq!(server_counts.sent_packets, client_counts.received_packets);
    assert_eq!(server_counts.sent_bytes, client_counts.received_bytes);
    assert_eq!(client_counts.drops().count(), 0, "{client_counts:?}");
    assert_ne!(stats(&server, theirs).received_at_nanos.get(), 0);
}

#[test]
fn what_waits_for_a_peer_that_does_not_read_can_be_seen() {
    let mut server = End::new();
    let (mut stalled, stuck) = Peer::join(&mut server, &Terms::default());
    let (_idle, idle) = Peer::join(&mut server, &Terms::default());
    server.route_lease(&[stuck]);
    let payload = pattern(1, 30_000);
    let packet = udp((WEB, 53), (CLIENT, 5000), &payload);
    eventually("there is no more room", || {
        server.send(0, VirtioNetHdr::PLAIN, &packet);
        counts(&server, stuck).dropped_queue_full > 0
    });
    let waiting = stats(&server, stuck);
    assert!(waiting.queue_packets.get() > 1);
    assert!(waiting.queue_bytes.get() >= packet.len() as u64 * waiting.queue_packets.get());
    assert_eq!(counts(&server, idle).dropped_queue_full, 0);
    assert_eq!(stats(&server, idle).queue_packets.get(), 0);

    // It reads again, and the queue drains.
    stalled.packet();
    eventually("the queue is empty", || {
        if waiting.queue_packets.get() > 0 {
            stalled.packet();
        }
        waiting.queue_packets.get() == 0
    });
    assert_eq!(waiting.queue_bytes.get(), 0);
}

#[test]
fn nothing_is_known_of_a_connection_that_was_released() {
    let (mut client, mut server, joined) = pair(&Terms::default());
    let (ours, theirs) = (joined.on_client[0], joined.on_server[0]);
    let info = client.workers().connection(ours).expect("added");
    let socket = info.socket.clone();
    assert!(socket.upgrade().is_some());
    client.workers().close(ours, None);
    client.closed(ours);
    assert!(socket.upgrade().is_none(), "the socket is closed");
    client.workers_mut().release(ours);
    assert!(client.workers().connection(ours).is_none());
    server.closed(theirs);
}
