//! Packets arrive: whole, in order, on any worker, segmented only for those who need it.

use super::end::{
    End, Joined, TUN_STAND_IN_PACKETS, Terms, eventually, io_mode, join, pair, segments_of,
};
use super::packets::*;
use ringtun::config::IoMode;
use ringtun::proto::offload::{FLAG_NEEDS_CSUM, GSO_NONE, GSO_UDP_L4, Offloads, VirtioNetHdr};
use ringtun::uring::buffer::{BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN};
use rstest::rstest;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that are under way at once where nothing may be lost: a stand-in's socket buffer holds more.
const WINDOW_BYTES: usize = 96 * 1024;
/// Packets that are under way at once where nothing may be lost.
const WINDOW_PACKETS: usize = 64;

const CSUM_ONLY: Offloads = Offloads {
    csum: true,
    ..Offloads::NONE
};

/// Cuts packets into runs that fit the window.
fn windows(packets: &[Vec<u8>]) -> Vec<&[Vec<u8>]> {
    let mut windows = Vec::new();
    let mut rest = packets;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fitting = rest
            .iter()
            .take(WINDOW_PACKETS)
            .take_while(|packet| {
                bytes += packet.len();
                bytes <= WINDOW_BYTES
            })
            .count();
        let (window, later) = rest.split_at(fitting.max(1));
        windows.push(window);
        rest = later;
    }
    windows
}

/// Packets of all sizes and both families, there and back.
fn conversation() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let sizes = [
        0, 1, 2, 3, 100, 512, 1000, 1400, 1472, 1473, 1990, 2010, 2020, 2030, 2048,
    ]
    .into_iter()
    .chain([
        4000, 7990, 8000, 16_300, 16_350, 16_384, 16_400, 32_700, 65_000, 65_507,
    ])
    .chain((0..200).map(|index| index * index * 7 % 3000));
    let mut there = Vec::new();
    let mut back = Vec::new();
    for (index, bytes) in sizes.enumerate() {
        let payload = pattern(index, bytes);
        if index % 3 == 2 {
            let (client, web) = ((CLIENT_V6, 5000), (WEB_V6, 53));
            there.push(udp_v6(client, web, &payload));
            back.push(udp_v6(web, client, &payload));
        } else {
            let (client, web) = ((CLIENT, 5000), (WEB, 53));
            there.push(udp(client, web, &payload));
            back.push(udp(web, client, &payload));
        }
    }
    (there, back)
}

#[rstest]
fn packets_arrive_whole_and_in_order_both_ways(
    #[values(BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN)] budget: usize,
    #[values(None, Some(Offloads::NONE), Some(Offloads::ALL))] offload: Option<Offloads>,
) {
    let (mut client, mut server) = (End::with(1, budget), End::with(1, budget));
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    let joined = join(&mut client, &mut server, &terms);
    let (there, back) = conversation();
    for (there, back) in windows(&there).into_iter().zip(windows(&back)) {
        for (out, reply) in there.iter().zip(back) {
            client.send(0, VirtioNetHdr::PLAIN, out);
            server.send(0, VirtioNetHdr::PLAIN, reply);
        }
        for (end, sent) in [(&mut server, there), (&mut client, back)] {
            let mut arrived = Vec::new();
            for _ in sent {
                let (header, packet) = end.receive(0);
                assert_eq!(header, VirtioNetHdr::PLAIN);
                arrived.push(with_first_identification(packet));
            }
            // Small packets of one flow may overtake large ones of the other.
            for version in [4, 6] {
                let flow = |packet: &&Vec<u8>| packet[0] >> 4 == version;
                let (arrived, sent) = (arrived.iter().filter(flow), sent.iter().filter(flow));
                assert!(arrived.eq(sent), "IPv{version}");
            }
        }
    }
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
    let bytes: u64 = there.iter().map(|packet| packet.len() as u64).sum();
    assert_eq!(client.count("tun_read_bytes"), bytes);
    let gathered = client.gathered(joined.on_client[0]);
    eventually("all is counted", || {
        let packets = server.count("tun_written_packets") + gathered;
        packets == there.len() as u64
    });
    // A gathered packet leaves its headers behind.
    let written = server.count("tun_written_bytes");
    assert!((written + gathered * 28..=written + gathered * 48).contains(&bytes));
}

#[rstest]
fn a_burst_of_small_packets_keeps_its_order_and_every_loss_is_counted(
    #[values(BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN)] budget: usize,
    #[values(None, Some(Offloads::ALL))] offload: Option<Offloads>,
) {
    const BURST: u32 = 20_000;
    let (mut client, mut server) = (End::with(1, budget), End::with(1, budget));
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    let joined = join(&mut client, &mut server, &terms);
    let read = AtomicU64::new(0);
    let all_accounted_for = |sent: u32| {
        let connection = joined.on_client[0];
        eventually("every packet is accounted for", || {
            let info = client.workers().connection(connection).unwrap();
            let sealed = info.stats.counters.sent_packets.get();
            let (written, dropped) = (server.count("tun_written_packets"), server.dropped());
            sealed + client.dropped() == u64::from(sent)
                // What was gathered is written, or refused, as one.
                && written + dropped + client.gathered(connection) == sealed
                && read.load(Ordering::SeqCst) == written
        });
    };
    let done = "done".as_bytes();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = None;
            loop {
                let (header, packet) = server.receive_whole(0);
                let segments = match header.gso_type {
                    GSO_UDP_L4 => segments_of(header, &packet),
                    _ => vec![packet],
                };
                for packet in segments {
                    if packet.ends_with(done) {
                        return;
                    }
                    let number = number_of(&packet);
                    assert!(last < Some(number), "{number} after {last:?}");
                    last = Some(number);
                }
                read.fetch_add(1, Ordering::SeqCst);
            }
        });
        for number in 0..BURST {
            client.send(0, VirtioNetHdr::PLAIN, &numbered(5000, number));
            if io_mode() == IoMode::Baseline && number % TUN_STAND_IN_PACKETS == 0 {
                all_accounted_for(number + 1);
            }
        }
        all_accounted_for(BURST);
        client.send(
            0,
            VirtioNetHdr::PLAIN,
            &udp((CLIENT, 5000), (WEB, 53), done),
        );
    });
    assert_ne!(read.into_inner(), 0);
}

#[rstest]
fn super_packets_cross_unsegmented(
    #[values(BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN)] budget: usize,
) {
    let (mut client, mut server) = (End::with(1, budget), End::with(1, budget));
    join(&mut client, &mut server, &Terms::default());
    for bytes in [
        1449, 1450, 2896, 2897, 16_300, 16_384, 32_768, 65_160, 65_495,
    ] {
        let (header, packet) = super_packet(1, &pattern(bytes, bytes));
        client.send(0, header, &packet);
        let (received_header, received) = server.receive(0);
        assert!(received == packet, "{bytes} bytes of payload were altered");
        let normalised = VirtioNetHdr {
            hdr_len: TCP_HEADERS_BYTES as u16,
            ..header
        };
        assert_eq!(received_header, normalised);
    }
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

#[rstest]
fn super_packets_are_segmented_for_peers_that_take_none(
    #[values(None, Some(Offloads::NONE), Some(CSUM_ONLY))] offload: Option<Offloads>,
    #[values(BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN)] budget: usize,
) {
    let (mut client, mut server) = (End::with(1, budget), End::with(1, budget));
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    join(&mut client, &mut server, &terms);
    for bytes in [1449, 2896, 2897, 16_384, 65_495] {
        let payload = pattern(bytes, bytes);
        let sequence = 0xffff_f000; // Wraps on the way.
        let (header, packet) = super_packet(sequence, &payload);
        client.send(0, header, &packet);
        let mut reassembled = Vec::new();
        while reassembled.len() < bytes {
            let (header, mut segment) = server.receive(0);
            assert!(segment.len() <= MTU, "{} bytes", segment.len());
            assert_eq!(header.gso_type, GSO_NONE);
            let partial = header.flags & FLAG_NEEDS_CSUM != 0;
            assert_eq!(partial, offload == Some(CSUM_ONLY));
            complete(header, &mut segment);
            let (number, push, part) = whole_segment(&segment);
            assert_eq!(number, sequence.wrapping_add(reassembled.len() as u32));
            reassembled.extend_from_slice(part);
            assert_eq!(push, reassembled.len() == bytes, "PSH is the last one's");
        }
        assert!(reassembled == payload);
    }
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

#[test]
fn a_partial_checksum_is_completed_for_a_peer_that_takes_none() {
    let terms = Terms {
        offload: None,
        ..Terms::default()
    };
    let (client, server, _) = pair(&terms);
    let (header, packet) = super_packet(9, b"one segment");
    let header = VirtioNetHdr {
        gso_type: GSO_NONE,
        gso_size: 0,
        ..header
    };
    client.send(0, header, &packet);
    let (header, received) = server.receive(0);
    assert_eq!(header, VirtioNetHdr::PLAIN);
    assert_eq!(
        whole_segment(&received),
        (9, true, "one segment".as_bytes())
    );
}

#[test]
fn flows_spread_over_workers_and_are_handed_over() {
    const FLOWS: u16 = 64;
    const ROUNDS: u32 = 100;
    let mut client = End::with(2, BUDGET_BYTES_DEFAULT);
    let mut server = End::with(2, BUDGET_BYTES_DEFAULT);
    let terms = Terms {
        connections: 4,
        ..Terms::default()
    };
    let Joined { on_client, .. } = join(&mut client, &mut server, &terms);
    assert_eq!(
        on_client
            .iter()
            .map(|connection| connection.worker)
            .sum::<u16>(),
        2,
        "two connections on each worker"
    );
    let mut queue_of_flow = HashMap::new();
    for round in 0..ROUNDS {
        for flow in 0..FLOWS {
            client.send(0, VirtioNetHdr::PLAIN, &numbered(5000 + flow, round));
        }
        for _ in 0..FLOWS {
            let (queue, packet) = server.receive_any();
            assert_eq!(number_of(&packet), round, "a flow lost its order");
            let port = client_port_of(&packet);
            assert_eq!(*queue_of_flow.entry(port).or_insert(queue), queue);
            // The answer surfaces on the wrong queue.
            let reply = numbered_reply(port, round);
            server.send(1 - queue, VirtioNetHdr::PLAIN, &reply);
        }
        for _ in 0..FLOWS {
            assert_eq!(number_of(&client.receive_any().1), round);
        }
    }
    assert_eq!(queue_of_flow.len(), usize::from(FLOWS));
    let on_first = queue_of_flow.values().filter(|queue| **queue == 0).count();
    assert!((16..=48).contains(&on_first), "{on_first} of {FLOWS}");
    // All that belonged to the second worker came to the first one's queue; all answers came to the wrong one.
    let second = (usize::from(FLOWS) - on_first) as u64 * u64::from(ROUNDS);
    assert_eq!(client.count("handed_over"), second);
    let all = u64::from(FLOWS) * u64::from(ROUNDS);
    assert_eq!(server.count("handed_over"), all);
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

#[test]
fn super_packets_are_handed_over_whole() {
    let mut client = End::with(2, BUDGET_BYTES_DEFAULT);
    let mut server = End::new();
    join(&mut client, &mut server, &Terms::default());
    for bytes in [1449, 1990, 2048, 65_495] {
        let (header, packet) = super_packet(1, &pattern(bytes, bytes));
        client.send(1, header, &packet);
        assert!(server.receive(0).1 == packet);
    }
    assert_eq!(client.count("handed_over"), 4);
}

#[test]
fn a_packet_that_nobody_takes_is_counted() {
    let (client, server, _) = pair(&Terms::default());
    let stranger = udp((WEB, 53), (WEB, 5000), b"for nobody");
    server.send(0, VirtioNetHdr::PLAIN, &stranger);
    server.send(0, VirtioNetHdr::PLAIN, b"no packet at all");
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 1));
    assert_eq!(number_of(&client.receive(0).1), 1);
    assert_eq!(server.count("dropped_no_route"), 2);
}
