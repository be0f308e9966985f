//! Packets of UDP that follow one another cross in one capsule and come out as they were, if the peer takes that.

use super::end::{End, Joined, TUN_STAND_IN_PACKETS, Terms, eventually, pair, segments_of};
use super::packets::*;
use super::peer::{Peer, Received};
use ringtun::proto::offload::{
    FLAG_NEEDS_CSUM, GATHERED_SEGMENTS_MAX, GSO_NONE, GSO_UDP_L4, Offloads, VirtioNetHdr,
};
use rstest::rstest;

/// Bytes of payload of each packet but the last of a burst, which has one less.
const PAYLOAD_BYTES: usize = 64;
/// Bursts, where something is not to happen.
const BURSTS: usize = 300;

/// Packets from the client, as many as surely fit into what stands for the queue.
fn burst(v6: bool) -> Vec<Vec<u8>> {
    let count = TUN_STAND_IN_PACKETS as usize;
    let packet = |index| {
        let last = usize::from(index + 1 == count);
        let payload = pattern(index, PAYLOAD_BYTES - last);
        if v6 {
            udp_v6((CLIENT_V6, 5000), (WEB_V6, 53), &payload)
        } else {
            udp((CLIENT, 5000), (WEB, 53), &payload)
        }
    };
    (0..count).map(packet).collect()
}

/// Sends the packets and gives what the other end's queue got, which has to be the same packets in the same order.
fn pass(client: &End, server: &End, packets: &[Vec<u8>]) -> Vec<(VirtioNetHdr, Vec<u8>)> {
    for packet in packets {
        client.send(0, VirtioNetHdr::PLAIN, packet);
    }
    let (mut whole, mut segments) = (Vec::new(), Vec::new());
    while segments.len() < packets.len() {
        let (header, packet) = server.receive_whole(0);
        segments.extend(segments_of(header, &packet));
        whole.push((header, packet));
    }
    let segments: Vec<_> = segments
        .into_iter()
        .map(with_first_identification)
        .collect();
    assert!(
        segments == packets,
        "packets were altered or lost their order"
    );
    whole
}

#[rstest]
fn packets_of_a_flow_are_gathered_on_the_way(#[values(false, true)] v6: bool) {
    let (client, server, joined) = pair(&Terms::default());
    let connection = joined.on_client[0];
    let packets = burst(v6);
    let (mut sent, mut received) = (0, 0);
    // How many the worker finds at once is for the scheduler to say, burst by burst.
    eventually("packets are gathered", || {
        let whole = pass(&client, &server, &packets);
        sent += packets.len() as u64;
        received += whole.len() as u64;
        for (header, packet) in &whole {
            let segments = segments_of(*header, packet).len();
            let expected = if segments == 1 {
                VirtioNetHdr::PLAIN
            } else {
                let offset = if v6 { 40 } else { 20 };
                VirtioNetHdr {
                    flags: FLAG_NEEDS_CSUM,
                    gso_type: GSO_UDP_L4,
                    hdr_len: offset + 8,
                    gso_size: PAYLOAD_BYTES as u16,
                    csum_start: offset,
                    csum_offset: 6,
                }
            };
            assert_eq!(*header, expected);
        }
        assert_eq!(client.gathered(connection), sent - received);
        received < sent
    });
    let info = client.workers().connection(connection).unwrap();
    let counts = info.stats.counters.read();
    assert_eq!(counts.sent_packets, sent);
    let bytes: usize = packets.iter().map(Vec::len).sum();
    assert_eq!(
        counts.sent_bytes,
        bytes as u64 * sent / packets.len() as u64
    );
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

#[rstest]
#[case::of_neither_family(Some(Offloads { uso4: false, uso6: false, ..Offloads::ALL }), false)]
#[case::of_the_family(Some(Offloads { uso6: false, ..Offloads::ALL }), true)]
#[case::at_all(None, false)]
fn a_peer_that_takes_no_super_packets_gets_single_ones(
    #[case] offload: Option<Offloads>,
    #[case] v6: bool,
) {
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    let (client, server, Joined { on_client, .. }) = pair(&terms);
    let packets = burst(v6);
    for _ in 0..BURSTS {
        let whole = pass(&client, &server, &packets);
        assert_eq!(whole.len(), packets.len());
        for ((header, packet), sent) in whole.iter().zip(&packets) {
            assert_eq!(header.gso_type, GSO_NONE);
            assert!(packet == sent);
        }
    }
    assert_eq!(client.gathered(on_client[0]), 0);
    assert_eq!((client.dropped(), server.dropped()), (0, 0));
}

#[test]
fn what_has_to_wait_is_gathered_to_long_runs() {
    /// More than is read from a queue at once, twice.
    const LONG: usize = 17;
    // On a busy machine loopback may look like a slow path, for which little is sealed at a time.
    let longest = (0..5).map(|_| longest_run()).find(|run| *run >= LONG);
    assert!(longest.is_some(), "never {LONG} packets or more");
}

/// Of packets that had to wait, all of which arrive in order, the most that came as one.
fn longest_run() -> usize {
    const PORT: u16 = 5001;
    const NUMBERED: u32 = 200;
    // The number at the end, behind enough payload to be gathered.
    let numbered = |number: u32| {
        let payload = [&pattern(1, PAYLOAD_BYTES - 4)[..], &number.to_be_bytes()].concat();
        udp((WEB, 53), (CLIENT, PORT), &payload)
    };
    let mut server = End::new();
    let (mut peer, connection) = Peer::join(&mut server, &Terms::default());
    server.route_lease(&[connection]);
    let info = server.workers().connection(connection).unwrap();
    let filler = udp((WEB, 53), (CLIENT, 5000), &pattern(1, 30_000));
    let mut sent = 0;
    eventually("there is no more room", || {
        server.send(0, VirtioNetHdr::PLAIN, &filler);
        sent += 1;
        info.stats.counters.dropped_queue_full.get() > 0
    });
    for number in 0..NUMBERED {
        server.send(0, VirtioNetHdr::PLAIN, &numbered(number));
    }
    eventually("all packets wait", || {
        server.count("tun_read_packets") == sent + u64::from(NUMBERED)
    });

    let (mut last, mut longest) = (None, 0);
    while last != Some(NUMBERED - 1) {
        let (header, packet) = match peer.receive() {
            Received::Offloaded(header, packet) if client_port_of(&packet) == PORT => {
                (header, packet)
            }
            Received::Offloaded(..) | Received::Capsule(_) => continue,
            other => panic!("no packet: {other:?}"),
        };
        let segments = segments_of(header, &packet);
        assert!(segments.len() <= GATHERED_SEGMENTS_MAX);
        longest = longest.max(segments.len());
        for segment in segments {
            let number = number_of(&segment);
            let expected = numbered(number);
            assert!(with_first_identification(segment) == expected);
            assert!(last < Some(number), "{number} after {last:?}");
            last = Some(number);
        }
    }
    assert!(info.stats.counters.gathered_packets.get() >= longest as u64 - 1);
    longest
}
