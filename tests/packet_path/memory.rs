//! Packet memory is short, and everybody gets some.

use super::end::{End, Terms, connect, eventually, join, prepared_ring};
use super::packets::*;
use super::peer::{Peer, offloaded};
use ringtun::proto::offload::{Offloads, VirtioNetHdr};
use ringtun::proto::route_table::ConnectionRef;
use ringtun::uring::buffer::{BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN, Class, Pool};
use ringtun::worker::connection::InnerSources;
use rstest::rstest;
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

/// More than there are chunks, or packet slots, at the smallest budget.
const MANY: usize = 40;

/// The lease of one client of many.
fn lease_of(client: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 87, 1, client as u8)
}

/// `MANY` sessions of one connection each, between two hosts with the smallest budget.
fn many_sessions() -> (End, End, Vec<(ConnectionRef, ConnectionRef)>) {
    let pool = Pool::new(BUDGET_BYTES_MIN).unwrap();
    assert!(MANY > pool.slots(Class::Chunk) && MANY > pool.slots(Class::Packet));
    pool.unmap();
    let mut client = End::with(1, BUDGET_BYTES_MIN);
    let mut server = End::with(1, BUDGET_BYTES_MIN);
    let connections: Vec<_> = (0..MANY)
        .map(|index| {
            let (ours, theirs) = connect();
            let terms = Terms {
                client_may_use: vec![lease_of(index).into()],
                ..Terms::default()
            };
            let on_client = client.add(ours, InnerSources::Any, &terms);
            let on_server = server.add(theirs, terms.client_sources(), &terms);
            (on_client, on_server)
        })
        .collect();
    (client, server, connections)
}

#[test]
fn more_connections_than_chunks_all_work() {
    let (client, server, connections) = many_sessions();
    server.route_leases((0..MANY).map(|index| {
        let address = IpAddr::from(lease_of(index));
        (vec![address], std::slice::from_ref(&connections[index].1))
    }));
    for round in 0..3 {
        // One after the other, so that every one of them goes from idle to busy.
        for (index, (on_client, _)) in connections.iter().enumerate() {
            client.route_everything(&[*on_client]);
            let number = round * 1000 + index as u32;
            let there = udp((lease_of(index), 5000), (WEB, 53), &number.to_be_bytes());
            client.send(0, VirtioNetHdr::PLAIN, &there);
            assert_eq!(server.receive(0).1, there);
            let back = udp((WEB, 53), (lease_of(index), 5000), &number.to_be_bytes());
            server.send(0, VirtioNetHdr::PLAIN, &back);
            assert_eq!(client.receive(0).1, back);
        }
    }
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

/// One session over many connections: all of them are busy at once.
#[test]
fn more_busy_connections_than_chunks_all_work() {
    let mut client = End::with(1, BUDGET_BYTES_MIN);
    let mut server = End::with(1, BUDGET_BYTES_MIN);
    let terms = Terms {
        connections: MANY,
        ..Terms::default()
    };
    join(&mut client, &mut server, &terms);
    for round in 0..200 {
        for flow in 0..MANY as u16 {
            client.send(0, VirtioNetHdr::PLAIN, &numbered(5000 + flow, round));
            server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000 + flow, round));
        }
        for end in [&server, &client] {
            let ports: HashSet<_> = (0..MANY)
                .map(|_| {
                    let (_, packet) = end.receive(0);
                    assert_eq!(number_of(&packet), round);
                    client_port_of(&packet)
                })
                .collect();
            assert_eq!(ports.len(), MANY, "every flow once");
        }
    }
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

/// Peers that send the front of something and then nothing do not keep memory from others.
#[rstest]
fn unfinished_capsules_and_records_hold_no_memory(#[values(false, true)] within_a_record: bool) {
    use std::io::Write;
    let mut server = End::with(1, BUDGET_BYTES_MIN);
    let terms = Terms::default();
    let (header, large) = super_packet(1, &pattern(1, 60_000));
    let mut peers: Vec<_> = (0..MANY)
        .map(|_| Peer::join(&mut server, &terms).0)
        .collect();
    let mut rests = Vec::new();
    for peer in &mut peers {
        let capsule = offloaded(header, &large);
        // Whole records of an unfinished capsule, or a part of a record besides.
        let stream = peer.seal(&capsule);
        let whole = 2 * (16_384 + 22);
        let cut = if within_a_record { whole + 9000 } else { whole };
        peer.socket.write_all(&stream[..cut]).unwrap();
        rests.push(stream[cut..].to_vec());
    }
    let (mut other, connection) = Peer::join(&mut server, &terms);
    server.route_lease(&[connection]);
    for number in 0..10 {
        other.write_packet(&numbered(5000, number));
        assert_eq!(number_of(&server.receive(0).1), number);
    }
    for (peer, rest) in peers.iter_mut().zip(rests) {
        peer.socket.write_all(&rest).unwrap();
        assert!(server.receive(0).1 == large);
    }
    assert_eq!(server.dropped(), 0);
}

/// Sends to the stalled clients until losses show that all their queues are full.
fn flood(server: &End, packet_to: impl Fn(usize) -> Vec<u8>, stalled: usize) {
    let lost = server.count("dropped_queue_full");
    let mut sent = 0;
    eventually("the losses are counted", || {
        for index in 0..stalled {
            server.send(0, VirtioNetHdr::PLAIN, &packet_to(index));
            sent += 1;
        }
        server.count("dropped_queue_full") > lost + 50 * stalled as u64
    });
    eventually("the TUN queue is drained", || {
        server.count("tun_read_packets") >= sent
    });
}

#[rstest]
fn stalled_readers_stop_nobody_else(
    #[values(1, 3, 12)] stalled: usize,
    #[values(40, 1400, 60_000)] payload_bytes: usize,
    #[values(None, Some(Offloads::ALL))] offload: Option<Offloads>,
) {
    let mut server = End::with(1, BUDGET_BYTES_MIN);
    let mut join = |index: usize| {
        let terms = Terms {
            offload,
            client_may_use: vec![lease_of(index).into()],
            ..Terms::default()
        };
        Peer::join(&mut server, &terms)
    };
    let (peers, mut connections): (Vec<_>, Vec<_>) = (0..stalled).map(&mut join).unzip();
    let (mut reader, reading) = join(stalled);
    connections.push(reading);
    server.route_leases(connections.iter().enumerate().map(|(index, connection)| {
        let address = IpAddr::from(lease_of(index));
        (vec![address], std::slice::from_ref(connection))
    }));
    let payload = pattern(1, payload_bytes);
    flood(
        &server,
        |index| udp((WEB, 53), (lease_of(index), 5000), &payload),
        stalled,
    );
    for number in 0..100_u32 {
        let there = udp((lease_of(stalled), 5000), (WEB, 53), &number.to_be_bytes());
        reader.write_packet(&there);
        assert_eq!(server.receive(0).1, there);
        let back = udp((WEB, 53), (lease_of(stalled), 5000), &number.to_be_bytes());
        server.send(0, VirtioNetHdr::PLAIN, &back);
        assert_eq!(reader.packet(), back);
    }
    // They wake up, and find what was kept for them.
    for mut peer in peers {
        let packet = peer.packet();
        assert!(packet.ends_with(&payload));
    }
}

#[test]
fn packets_pass_before_and_after_memory_is_registered() {
    let [mut client, mut server] = [(); 2].map(|()| End::new());
    join(&mut client, &mut server, &Terms::default());
    let registered = |end: &End| {
        end.workers()
            .memory()
            .map(|memory| memory.registered.get())
            .sum::<u64>()
    };
    let mut sent = 0_u16;
    let mut pass_one = || {
        let packet = udp((CLIENT, 5000), (WEB, 53), &sent.to_be_bytes());
        client.send(0, VirtioNetHdr::PLAIN, &packet);
        assert_eq!(server.receive(0).1, packet);
        sent += 1;
        registered(&client) + registered(&server)
    };
    eventually("both register it", || pass_one() == 2);
    for _ in 0..100 {
        assert_eq!(pass_one(), 2);
    }
}

/// What the test below does in a process of its own, for limits are the process's.
const LOCKED_CHILD: &str = "RINGTUN_TEST_LOCKED_CHILD";

#[test]
fn without_lockable_memory_buffers_are_not_registered() {
    if std::env::var_os(LOCKED_CHILD).is_some() {
        return work_without_lockable_memory();
    }
    let name = "memory::without_lockable_memory_buffers_are_not_registered";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(LOCKED_CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}{errors}");
}

fn work_without_lockable_memory() {
    use nix::sys::resource::{Resource, setrlimit};
    // With it the limit does not count, for whatever is registered with a ring that was made with it.
    let lock = caps::Capability::CAP_IPC_LOCK;
    caps::drop(None, caps::CapSet::Effective, lock).unwrap();
    let rings = [(); 2].map(|()| vec![prepared_ring()]);
    let lockable_bytes = 64 * 1024;
    setrlimit(Resource::RLIMIT_MEMLOCK, lockable_bytes, lockable_bytes).unwrap();
    // One is refused later, the other at once.
    let [of_client, of_server] = rings;
    let mut client = End::with_rings(of_client, BUDGET_BYTES_DEFAULT, usize::MAX);
    let mut server = End::with_rings(of_server, BUDGET_BYTES_DEFAULT, lockable_bytes as usize);
    join(&mut client, &mut server, &Terms::default());
    for end in [&client, &server] {
        assert!(
            end.workers()
                .memory()
                .all(|memory| memory.registered.get() == 0)
        );
    }
    for bytes in [0, 1472, 65_000] {
        let packet = udp((CLIENT, 5000), (WEB, 53), &pattern(bytes, bytes));
        client.send(0, VirtioNetHdr::PLAIN, &packet);
        assert!(server.receive(0).1 == packet);
    }
    let (header, packet) = super_packet(1, &pattern(1, 65_495));
    client.send(0, header, &packet);
    assert!(server.receive(0).1 == packet);
}
