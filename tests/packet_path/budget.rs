//! What one peer makes a worker hold and do has a bound, and others are served meanwhile.

use super::end::{End, Terms, eventually};
use super::packets::*;
use super::peer::{Peer, Received, offloaded};
use ringtun::proto::budget::{CONTROL_BYTES_MAX, EVENTS_PER_CONNECTION_MAX, PeerId};
use ringtun::proto::capsule::{AssignedAddress, Capsule, put_varint};
use ringtun::proto::offload::VirtioNetHdr;
use ringtun::proto::route_table::ConnectionRef;
use ringtun::uring::buffer::{BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN, Class, Pool};
use ringtun::worker::Event;
use rstest::rstest;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Connections of one session, the one for sparse flows included.
const CONNECTIONS: usize = 17;
/// What an attacker sends a byte of at a time: the gap between two bytes is shorter than any time-out.
const DRIP_INTERVAL: Duration = Duration::from_millis(100);

fn terms_of(peer: u32) -> Terms {
    Terms {
        peer: PeerId(peer),
        ..Terms::default()
    }
}

/// A peer with its packets routed, beside whoever else there is.
fn honest(server: &mut End) -> (Peer, ConnectionRef) {
    let (peer, connection) = Peer::join(server, &terms_of(0));
    server.route_lease(&[connection]);
    (peer, connection)
}

/// One packet each way.
fn assert_served(peer: &mut Peer, server: &End, number: u32) {
    peer.write_packet(&numbered(5000, number));
    assert_eq!(number_of(&server.receive(0).1), number);
    let reply = numbered_reply(5000, number);
    server.send(0, VirtioNetHdr::PLAIN, &reply);
    assert_eq!(peer.packet(), reply);
}

fn chunks(buffer_bytes: usize) -> usize {
    let pool = Pool::new(buffer_bytes).unwrap();
    let chunks = pool.slots(Class::Chunk);
    pool.unmap();
    chunks
}

fn counter(server: &End, connection: ConnectionRef, name: &str) -> u64 {
    let info = server.workers().connection(connection).unwrap();
    let mut counts = info.stats.counters.read().entries();
    counts.find(|(entry, _)| *entry == name).unwrap().1
}

/// Ends the dripping also when the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What attackers have sent of something that never ends.
#[derive(Clone, Copy, Debug)]
enum Unfinished {
    Record,
    Capsule,
}

/// Connections that each hold the front of a record or capsule, and get one byte more before they count as idle.
#[rstest]
fn dripping_connections_leave_memory_to_others(
    #[values(1, 2, 40)] peers: u32,
    #[values(Unfinished::Record, Unfinished::Capsule)] unfinished: Unfinished,
    #[values(BUDGET_BYTES_MIN, BUDGET_BYTES_DEFAULT)] buffer_bytes: usize,
) {
    let mut server = End::with(1, buffer_bytes);
    let each = if peers > 2 { 1 } else { CONNECTIONS };
    let mut attackers = Vec::new();
    for number in 0..peers {
        for _ in 0..each {
            attackers.push(Peer::join(&mut server, &terms_of(1 + number)).0);
        }
    }
    let (header, large) = super_packet(1, &pattern(1, 60_000));
    let capsule = offloaded(header, &large);
    let mut drips: Vec<_> = attackers
        .iter_mut()
        .map(|attacker| {
            let records = attacker.seal(&capsule);
            let whole = match unfinished {
                Unfinished::Record => 0,
                Unfinished::Capsule => 2 * (16_384 + 22),
            };
            attacker.socket.write_all(&records[..whole]).unwrap();
            records.into_iter().skip(whole)
        })
        .collect();
    let (mut peer, connection) = honest(&mut server);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dripping = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for (attacker, drip) in attackers.iter_mut().zip(&mut drips) {
                    attacker.socket.write_all(&[drip.next().unwrap()]).unwrap();
                }
                std::thread::sleep(DRIP_INTERVAL);
            }
        });
        let stop = StopOnDrop(&is_over);
        // Longer than a second, after which an idle connection gives its memory back anyway.
        let started = std::time::Instant::now();
        let mut number = 0;
        let payload = pattern(7, 60_000);
        while started.elapsed() < 12 * DRIP_INTERVAL {
            assert_served(&mut peer, &server, number);
            number += 1;
            // As much as what stands for the TUN queue holds.
            let (header, packet) = super_packet(1, &payload);
            peer.write(&offloaded(header, &packet).repeat(2));
            for _ in 0..2 {
                assert!(server.receive(0).1 == packet);
            }
        }
        drop(stop);
        dripping.join().unwrap();
    });
    // No more than the share that one alone has, beside what is plenty.
    let held: u64 = server
        .workers()
        .memory()
        .map(|memory| memory.chunks.get())
        .sum();
    assert!(held < chunks(buffer_bytes) as u64, "{held} chunks are held");
    assert_eq!(counter(&server, connection, "refused_memory"), 0);
    assert_eq!(server.dropped(), 0);
}

/// Connections whose sealed records nobody reads.
#[rstest]
fn peers_that_do_not_read_leave_chunks_to_others(#[values(1, 2)] peers: u32) {
    let mut server = End::with(1, BUDGET_BYTES_MIN);
    let mut unread = Vec::new();
    let mut routes = Vec::new();
    for number in 0..peers {
        for index in 0..CONNECTIONS {
            let address = std::net::Ipv4Addr::new(10, 87, 1 + number as u8, index as u8);
            let terms = Terms {
                client_may_use: vec![address.into()],
                ..terms_of(1 + number)
            };
            let (peer, connection) = Peer::join(&mut server, &terms);
            unread.push(peer);
            routes.push((address, connection));
        }
    }
    let (mut peer, connection) = Peer::join(&mut server, &terms_of(0));
    let mut leases: Vec<_> = routes
        .iter()
        .map(|(address, connection)| (vec![(*address).into()], std::slice::from_ref(connection)))
        .collect();
    leases.push((lease(), std::slice::from_ref(&connection)));
    server.route_leases(leases);
    let payload = pattern(1, 60_000);
    eventually("all queues overflow", || {
        for (address, _) in &routes {
            let packet = udp((WEB, 53), (*address, 5000), &payload);
            server.send(0, VirtioNetHdr::PLAIN, &packet);
        }
        routes
            .iter()
            .all(|(_, connection)| counter(&server, *connection, "dropped_queue_full") > 0)
    });
    for number in 0..50 {
        assert_served(&mut peer, &server, number);
    }
    assert_eq!(counter(&server, connection, "dropped_queue_full"), 0);
}

fn largest_request() -> Vec<u8> {
    let entry = AssignedAddress::unspecified_v4(1);
    Capsule::AddressRequest(vec![entry; 2340])
        .to_bytes()
        .unwrap()
}

#[test]
fn requests_that_wait_for_control_are_bounded() {
    const REQUESTS: usize = 1000;
    let mut server = End::new();
    let (mut attacker, connection) = Peer::join(&mut server, &terms_of(1));
    let (mut peer, _) = honest(&mut server);
    let request = largest_request();
    for _ in 0..REQUESTS {
        attacker.write(&request);
    }
    eventually("all requests have been looked at or refused", || {
        let refused = counter(&server, connection, "refused_requests");
        refused == (REQUESTS - EVENTS_PER_CONNECTION_MAX) as u64
    });
    assert_served(&mut peer, &server, 1);
    // Control gets to them at last, and there is room for as many again.
    for _ in 0..EVENTS_PER_CONNECTION_MAX {
        let event = server.event();
        let Event::Capsule {
            connection: from, ..
        } = event
        else {
            panic!("{event:?}");
        };
        assert_eq!(from, connection);
    }
    attacker.write(&request);
    assert!(matches!(server.event(), Event::Capsule { .. }));
}

#[test]
fn answers_to_a_peer_that_does_not_read_are_bounded() {
    let mut server = End::new();
    let (mut attacker, connection) = Peer::join(&mut server, &terms_of(1));
    let answer = largest_request();
    const ANSWERS: usize = 4000;
    for _ in 0..ANSWERS {
        server.workers().send(connection, answer.clone());
    }
    eventually("answers are refused", || {
        counter(&server, connection, "refused_answers") > 0
    });
    let held = || {
        let info = server.workers().connection(connection).unwrap();
        info.stats.held.control_bytes.get()
    };
    eventually("what waits is told", || held() > 0);
    assert!(held() <= CONTROL_BYTES_MAX as u64, "{} bytes wait", held());
    // A request of a peer that has no room for an answer is not even looked at.
    attacker.write(&largest_request());
    attacker.write_packet(&numbered(5000, 1));
    assert_eq!(number_of(&server.receive(0).1), 1);
    assert_eq!(counter(&server, connection, "refused_requests"), 1);
    // It begins to read, and gets all that was not refused, whole.
    let mut received = 0;
    let expected = ANSWERS as u64 - counter(&server, connection, "refused_answers");
    while received < expected {
        match attacker.receive() {
            Received::Capsule(Capsule::AddressRequest(entries)) => {
                assert_eq!(entries.len(), 2340);
                received += 1;
            }
            Received::Capsule(Capsule::Ping(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A capsule that nobody knows, one byte of it in each record.
fn tiny_records(attacker: &mut Peer, records: usize) -> Vec<u8> {
    let mut capsule = Vec::new();
    put_varint(&mut capsule, 0x17);
    put_varint(&mut capsule, records as u64);
    let mut stream = attacker.seal(&capsule);
    for _ in 0..records {
        stream.extend(attacker.seal(&[0]));
    }
    stream
}

#[test]
fn tiny_records_are_put_off_and_others_come_first() {
    let mut server = End::new();
    let (mut attacker, connection) = Peer::join(&mut server, &terms_of(1));
    let (mut peer, honest_connection) = honest(&mut server);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let stream = tiny_records(&mut attacker, 5000);
                attacker.socket.write_all(&stream).unwrap();
            }
            attacker.write_packet(&numbered(6000, 7));
        });
        let stop = StopOnDrop(&is_over);
        for number in 0..20 {
            let deferred = counter(&server, connection, "deferred");
            eventually("records are put off", || {
                counter(&server, connection, "deferred") > deferred
            });
            assert_served(&mut peer, &server, number);
        }
        drop(stop);
        // Nothing is lost of what was put off.
        assert_eq!(number_of(&server.receive(0).1), 7);
        flood.join().unwrap();
    });
    assert_eq!(counter(&server, honest_connection, "deferred"), 0);
    assert_eq!(server.dropped(), 0);
}

#[test]
fn a_peer_alone_is_never_held_up_by_work_that_is_put_off() {
    let mut server = End::new();
    let (mut attacker, connection) = honest(&mut server);
    for number in 0..5 {
        let stream = tiny_records(&mut attacker, 5000);
        attacker.socket.write_all(&stream).unwrap();
        assert_served(&mut attacker, &server, number);
    }
    assert!(counter(&server, connection, "deferred") > 0);
}

#[test]
fn bulk_transfers_are_never_put_off() {
    let mut server = End::new();
    let (mut peer, connection) = honest(&mut server);
    let (header, packet) = super_packet(1, &pattern(1, 60_000));
    let stream = offloaded(header, &packet);
    for _ in 0..500 {
        peer.write(&stream);
        assert!(server.receive(0).1 == packet);
    }
    assert_eq!(counter(&server, connection, "deferred"), 0);
}

#[test]
fn an_aborted_connection_is_gone_at_once() {
    let mut server = End::new();
    let (mut peer, connection) = honest(&mut server);
    let (_successor, _) = honest(&mut server);
    let replaced = Some(ringtun::proto::capsule::CloseReason::Replaced);
    server.workers().close(connection, replaced);
    loop {
        match peer.receive() {
            Received::Capsule(_) => {}
            Received::CloseNotify => break,
            other => panic!("{other:?}"),
        }
    }
    // It would still listen for a while.
    server.workers().abort(connection);
    assert_eq!(peer.receive(), Received::End);
    server.closed(connection);
}
