//! How connections end, and what they live through.

use super::end::{End, Joined, PATIENCE, Terms, connect, eventually, join, pair};
use super::packets::*;
use super::peer::{Peer, Received, offloaded, plain};
use ringtun::proto::capsule::{AssignedAddress, Capsule, CloseReason};
use ringtun::proto::offload::VirtioNetHdr;
use ringtun::proto::route_table::ConnectionRef;
use ringtun::uring::buffer::BUDGET_BYTES_DEFAULT;
use ringtun::worker::{CloseCause, Event};
use rstest::rstest;
use socket2::SockRef;
use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

/// One numbered packet each way.
fn assert_works(client: &End, server: &End, number: u32) {
    client.send(0, VirtioNetHdr::PLAIN, &numbered(5000, number));
    assert_eq!(number_of(&server.receive(0).1), number);
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, number));
    assert_eq!(number_of(&client.receive(0).1), number);
}

/// One packet each way, between a peer and a server.
fn assert_peer_works(peer: &mut Peer, server: &End, number: u32) {
    peer.write_packet(&numbered(5000, number));
    assert_eq!(number_of(&server.receive(0).1), number);
    let reply = numbered_reply(5000, number);
    server.send(0, VirtioNetHdr::PLAIN, &reply);
    assert_eq!(peer.packet(), reply);
}

/// A server with one peer, to which it routes.
fn server_and_peer() -> (End, Peer, ConnectionRef) {
    let mut server = End::new();
    let (peer, connection) = Peer::join(&mut server, &Terms::default());
    server.route_lease(&[connection]);
    (server, peer, connection)
}

fn assert_told(event: &Event, connection: ConnectionRef, expected: &Capsule) {
    match event {
        Event::Capsule {
            connection: told,
            capsule,
            ..
        } if *told == connection && capsule == expected => {}
        event => panic!("{event:?}"),
    }
}

#[test]
fn a_closed_connection_tells_the_peer_why() {
    let (mut client, mut server, joined) = pair(&Terms::default());
    let (ours, theirs) = (joined.on_server[0], joined.on_client[0]);
    server.workers().close(ours, Some(CloseReason::Superseded));
    let reason = Capsule::Close(CloseReason::Superseded);
    assert_told(&client.event(), theirs, &reason);
    assert!(matches!(client.closed(theirs), CloseCause::PeerClosed));
    assert!(matches!(server.closed(ours), CloseCause::Asked));
}

#[test]
fn a_connection_closed_without_a_reason_ends_with_close_notify() {
    let (mut server, mut peer, connection) = server_and_peer();
    server.workers().close(connection, None);
    assert_eq!(peer.receive(), Received::CloseNotify);
    assert_eq!(peer.receive(), Received::End);
    assert!(matches!(server.closed(connection), CloseCause::Asked));
}

#[test]
fn capsules_reach_control_and_the_peer() {
    let (mut server, mut peer, connection) = server_and_peer();
    let request = Capsule::AddressRequest(vec![AssignedAddress::unspecified_v4(1)]);
    peer.write_capsule(&request);
    assert_told(&server.event(), connection, &request);
    let answer = Capsule::AddressAssign(vec![AssignedAddress::host(1, CLIENT.into())]);
    let mut bytes = Vec::new();
    answer.encode(&mut bytes).unwrap();
    server.workers().send(connection, bytes);
    assert_eq!(peer.receive(), Received::Capsule(answer));
}

#[test]
fn a_place_is_used_again_by_a_new_generation() {
    let (mut client, mut server, joined) = pair(&Terms::default());
    let (mut on_client, mut on_server) = (joined.on_client[0], joined.on_server[0]);
    for number in 0..20 {
        assert_works(&client, &server, number);
        client.workers().close(on_client, None);
        client.closed(on_client);
        server.closed(on_server);
        client.workers_mut().release(on_client);
        server.workers_mut().release(on_server);
        let Joined {
            on_client: ours,
            on_server: theirs,
        } = join(&mut client, &mut server, &Terms::default());
        assert_eq!(ours[0].slot, on_client.slot);
        assert_ne!(ours[0].generation, on_client.generation);
        // What is meant for the connection that is gone does not hit its successor.
        client.workers().close(on_client, None);
        (on_client, on_server) = (ours[0], theirs[0]);
    }
    assert_works(&client, &server, 20);
}

#[test]
fn what_came_with_the_handshake_is_not_lost() {
    let mut server = End::new();
    let terms = Terms::default();
    let (ours, mut theirs) = connect();
    let mut peer = Peer::new(ours);
    let packets: Vec<_> = (0..4).map(|number| numbered(5000, number)).collect();
    // One packet and a half were decrypted already, and the rest of the second is in a record that is half there.
    let second = offloaded(VirtioNetHdr::PLAIN, &packets[1]);
    let (front, back) = second.split_at(second.len() / 2);
    let record = peer.seal(&[back, &plain(&packets[2])].concat());
    let (record_front, record_back) = record.split_at(record.len() / 2);
    theirs.established.plaintext = [&plain(&packets[0]), front].concat();
    theirs.established.ciphertext = record_front.to_vec();
    let connection = server.add(theirs, terms.client_sources(), &terms);
    server.route_lease(&[connection]);
    assert_eq!(server.receive(0).1, packets[0]);
    peer.socket.write_all(record_back).unwrap();
    peer.write_packet(&packets[3]);
    for packet in &packets[1..] {
        assert_eq!(server.receive(0).1, *packet);
    }
}

#[rstest]
fn a_vanished_peer_is_noticed(#[values(false, true)] reset: bool) {
    let (mut server, peer, connection) = server_and_peer();
    if reset {
        SockRef::from(&peer.socket)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(peer);
    } else {
        peer.socket.shutdown(Shutdown::Write).unwrap();
    }
    let cause = server.closed(connection);
    let is_told_apart = match reset {
        true => matches!(cause, CloseCause::Reset),
        false => matches!(cause, CloseCause::Truncated),
    };
    assert!(is_told_apart, "{cause:?}");
}

#[test]
fn close_notify_is_answered() {
    let (mut server, mut peer, connection) = server_and_peer();
    peer.close_notify();
    assert_eq!(peer.receive(), Received::CloseNotify);
    assert_eq!(peer.receive(), Received::End);
    assert!(matches!(server.closed(connection), CloseCause::PeerClosed));
}

#[test]
fn a_ping_is_answered_by_its_pong() {
    let (_server, mut peer, _) = server_and_peer();
    for number in 0..3_u64 {
        peer.write_capsule(&Capsule::Ping(number.to_be_bytes()));
        let pong = Capsule::Pong(number.to_be_bytes());
        assert_eq!(peer.receive(), Received::Capsule(pong));
    }
}

#[test]
fn unanswered_traffic_is_asked_about() {
    let (server, mut peer, _) = server_and_peer();
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 1));
    assert!(matches!(peer.receive(), Received::Offloaded(..)));
    match peer.receive() {
        Received::Capsule(Capsule::Ping(payload)) => peer.write_capsule(&Capsule::Pong(payload)),
        other => panic!("{other:?}"),
    }
    assert_peer_works(&mut peer, &server, 2);
}

#[test]
fn silence_after_a_ping_is_reported_to_control_and_so_is_its_end() {
    let (mut server, mut peer, connection) = server_and_peer();
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 1));
    match server.event() {
        Event::Unresponsive { connection: silent } => assert_eq!(silent, connection),
        event => panic!("{event:?}"),
    }
    // Anything will do.
    peer.write_capsule(&Capsule::Pong([7; 8]));
    match server.event() {
        Event::Responsive { connection: heard } => assert_eq!(heard, connection),
        event => panic!("{event:?}"),
    }
    assert!(matches!(peer.receive(), Received::Offloaded(..)));
    assert!(matches!(
        peer.receive(),
        Received::Capsule(Capsule::Ping(_))
    ));
    assert_peer_works(&mut peer, &server, 2);
}

fn waiting_packets(server: &End, connection: ConnectionRef) -> u64 {
    let connection = server.workers().connection(connection).unwrap();
    connection.stats.queue_packets.get()
}

/// A connection of the peer's that takes the place of the one that it has.
fn replace(server: &mut End, old: ConnectionRef) -> (Peer, ConnectionRef) {
    let (peer, connection) = Peer::join(server, &Terms::default());
    server.route_lease(&[connection]);
    server.workers().close(old, Some(CloseReason::Replaced));
    (peer, connection)
}

#[test]
fn what_was_on_its_way_to_a_connection_that_was_replaced_arrives() {
    let (mut server, mut peer, connection) = server_and_peer();
    let (mut successor, _) = replace(&mut server, connection);
    let reason = Capsule::Close(CloseReason::Replaced);
    assert_eq!(peer.receive(), Received::Capsule(reason));
    assert_eq!(peer.receive(), Received::CloseNotify);
    // It had sent these before it heard of that.
    peer.write_packet(&numbered(5000, 1));
    assert_eq!(number_of(&server.receive(0).1), 1);
    peer.write_capsule(&Capsule::Ping([7; 8]));
    peer.request_key_update();
    peer.write_packet(&numbered(5000, 2));
    assert_eq!(number_of(&server.receive(0).1), 2);
    assert_peer_works(&mut successor, &server, 3);
    peer.close_notify();
    assert_eq!(
        peer.receive(),
        Received::End,
        "nothing follows close_notify"
    );
    assert!(matches!(server.closed(connection), CloseCause::Asked));
    assert_eq!(server.dropped(), 0);
}

#[test]
fn a_connection_that_was_replaced_and_says_nothing_any_more_ends() {
    let (mut server, _peer, connection) = server_and_peer();
    let _successor = replace(&mut server, connection);
    assert!(matches!(server.closed(connection), CloseCause::Asked));
}

/// Sends to a peer that does not read until packets wait in the queue, too. How many it were.
fn back_up(server: &End, connection: ConnectionRef) -> u32 {
    let payload = pattern(1, 30_000);
    let packet = |number: u32| {
        let payload = [&payload[..], &number.to_be_bytes()].concat();
        // With ECN, so that waiting costs none of them.
        with_ecn(udp((WEB, 53), (CLIENT, 5000), &payload), ECT_0)
    };
    let mut sent = 0;
    eventually("packets wait", || {
        server.send(0, VirtioNetHdr::PLAIN, &packet(sent));
        sent += 1;
        waiting_packets(server, connection) >= 8
    });
    eventually("the TUN queue is drained", || {
        server.count("tun_read_packets") >= u64::from(sent)
    });
    sent
}

#[test]
fn a_write_that_waits_loses_nothing_when_the_peer_is_heard_again() {
    let (mut server, mut peer, connection) = server_and_peer();
    let sent = back_up(&server, connection);
    let event = server.event();
    assert!(matches!(event, Event::Unresponsive { .. }), "{event:?}");
    peer.write_packet(&numbered(5000, 1));
    assert_eq!(number_of(&server.receive(0).1), 1);
    let expected = u64::from(sent) - server.dropped();
    let received: Vec<_> = (0..expected).map(|_| number_of(&peer.packet())).collect();
    assert!(received.is_sorted(), "{received:?}");
    assert_peer_works(&mut peer, &server, 2);
}

#[rstest]
fn what_waited_for_a_connection_goes_to_the_one_that_replaced_it(#[values(1, 2)] workers: usize) {
    let mut server = End::with(workers, BUDGET_BYTES_DEFAULT);
    let (mut peer, connection) = Peer::join(&mut server, &Terms::default());
    server.route_lease(&[connection]);
    let sent = back_up(&server, connection);
    let (mut successor, replacing) = replace(&mut server, connection);
    assert_eq!(usize::from(replacing.worker), workers - 1);
    let mut received = Vec::new();
    loop {
        match peer.receive() {
            Received::Plain(packet) | Received::Offloaded(_, packet) => {
                received.push(number_of(&packet));
            }
            Received::CloseNotify => break,
            Received::Capsule(_) => {}
            Received::End | Received::Alert(_) => panic!("no close_notify"),
        }
    }
    let on_the_old = received.len();
    let lost = server.dropped();
    let expected = u64::from(sent) - lost;
    while (received.len() as u64) < expected {
        received.push(number_of(&successor.packet()));
    }
    assert!(received.len() - on_the_old >= 4, "{on_the_old} of {sent}");
    assert!(received.is_sorted(), "{received:?}");
}

/// A server with a peer that is silent, and one packet that came for it since that was noticed.
fn server_and_silent_peer() -> (End, Peer, ConnectionRef) {
    let (mut server, peer, connection) = server_and_peer();
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 1));
    let event = server.event();
    assert!(matches!(event, Event::Unresponsive { .. }), "{event:?}");
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 2));
    eventually("the packet waits", || {
        waiting_packets(&server, connection) == 1
    });
    (server, peer, connection)
}

#[test]
fn packets_for_a_silent_peer_wait_until_it_is_heard() {
    let (server, mut peer, _) = server_and_silent_peer();
    peer.write_packet(&numbered(5000, 3));
    assert_eq!(number_of(&server.receive(0).1), 3);
    assert_eq!(number_of(&peer.packet()), 1);
    assert_eq!(number_of(&peer.packet()), 2);
}

#[test]
fn packets_for_a_silent_peer_go_by_the_connection_that_replaces_it() {
    let (mut server, _peer, connection) = server_and_silent_peer();
    let (mut successor, _) = replace(&mut server, connection);
    assert_eq!(number_of(&successor.packet()), 2);
}

#[test]
fn a_flow_of_packets_that_ceases_is_asked_about() {
    let (server, mut peer, _) = server_and_peer();
    peer.write_packet(&numbered(5000, 1));
    assert_eq!(number_of(&server.receive(0).1), 1);
    match peer.receive() {
        Received::Capsule(Capsule::Ping(payload)) => peer.write_capsule(&Capsule::Pong(payload)),
        other => panic!("{other:?}"),
    }
    assert_peer_works(&mut peer, &server, 2);
}

#[test]
fn traffic_goes_on_through_key_updates() {
    let (server, mut peer, _) = server_and_peer();
    for number in 0..5 {
        peer.request_key_update();
        assert_peer_works(&mut peer, &server, number);
        assert_eq!(peer.key_updates, number + 1, "every request is answered");
    }
    // Several at once need not be answered one by one.
    for _ in 0..5 {
        peer.request_key_update();
    }
    for number in 5..10 {
        assert_peer_works(&mut peer, &server, number);
    }
    assert!((6..=10).contains(&peer.key_updates));
    assert_eq!(server.dropped(), 0);
}

#[test]
fn stopping_tells_every_peer_why() {
    let (mut server, mut peer, connection) = server_and_peer();
    let (mut other, other_connection) = Peer::join(&mut server, &Terms::default());
    let workers = server.take_workers();
    let (done, stopped) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        workers.stop(Some(CloseReason::Shutdown));
        done.send(()).unwrap();
    });
    stopped.recv_timeout(PATIENCE).expect("workers that stop");
    thread.join().unwrap();
    for peer in [&mut peer, &mut other] {
        let reason = Capsule::Close(CloseReason::Shutdown);
        assert_eq!(peer.receive(), Received::Capsule(reason));
        assert_eq!(peer.receive(), Received::CloseNotify);
        assert_eq!(peer.receive(), Received::End);
    }
    for connection in [connection, other_connection] {
        assert!(matches!(server.closed(connection), CloseCause::Asked));
    }
}
