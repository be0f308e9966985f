//! Peers that do not keep to the rules harm nobody but themselves.

use super::end::{End, OFFLOAD_CONTEXT, Terms, eventually, io_mode, pair};
use super::packets::*;
use super::peer::{Peer, Received, offloaded, plain};
use ringtun::config::IoMode;
use ringtun::proto::capsule::{
    Capsule, CloseReason, DATAGRAM_PAYLOAD_BYTES_MAX, datagram_header, kind, put_varint,
};
use ringtun::proto::offload::{GSO_NONE, GSO_TCPV6, GSO_UDP_L4, Offloads, VirtioNetHdr};
use ringtun::tls::AlertDescription;
use ringtun::tls::record::{CONTROL_RECORD_BYTES_MAX, RECORDS_WITHOUT_DATA_MAX};
use ringtun::worker::CloseCause;
use rstest::rstest;
use std::io::Write;
use std::net::Ipv4Addr;

fn capsule(kind: u64, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_varint(&mut bytes, kind);
    put_varint(&mut bytes, value.len() as u64);
    bytes.extend_from_slice(value);
    bytes
}

#[rstest]
fn a_foreign_inner_source_is_dropped(
    #[values(None, Some(Offloads::ALL))] offload: Option<Offloads>,
) {
    let terms = Terms {
        offload,
        ..Terms::default()
    };
    let (client, server, _) = pair(&terms);
    let neighbour = Ipv4Addr::new(10, 87, 0, 3);
    let stolen = udp((neighbour, 5000), (WEB, 53), b"not mine");
    let stolen_v6 = udp_v6((WEB_V6, 5000), (WEB_V6, 53), b"not mine");
    client.send(0, VirtioNetHdr::PLAIN, &stolen);
    client.send(0, VirtioNetHdr::PLAIN, &stolen_v6);
    client.send(0, VirtioNetHdr::PLAIN, &numbered(5000, 1));
    assert_eq!(number_of(&server.receive(0).1), 1);
    assert_eq!(server.count("dropped_spoofed"), 2);
    // The server may send from anywhere.
    let reply = udp((neighbour, 53), (CLIENT, 5000), b"fine");
    server.send(0, VirtioNetHdr::PLAIN, &reply);
    assert_eq!(client.receive(0).1, reply);
}

#[test]
fn hostile_offload_headers_are_dropped() {
    let accepts = Offloads {
        uso4: false,
        ..Offloads::ALL
    };
    let terms = Terms {
        offload: Some(accepts),
        ..Terms::default()
    };
    let mut server = End::new();
    let (mut peer, _) = Peer::join(&mut server, &terms);
    let (good, packet) = super_packet(1, &pattern(1, 4000));
    let datagrams = udp((CLIENT, 5000), (WEB, 53), &pattern(1, 4000));
    let hostile = [
        VirtioNetHdr {
            gso_size: 0,
            ..good
        },
        VirtioNetHdr {
            gso_size: 1,
            ..good
        },
        VirtioNetHdr {
            gso_size: 0xffff,
            ..good
        },
        VirtioNetHdr {
            gso_type: GSO_TCPV6,
            ..good
        },
        VirtioNetHdr {
            gso_type: GSO_UDP_L4,
            ..good
        },
        VirtioNetHdr {
            gso_type: 3,
            ..good
        },
        VirtioNetHdr {
            gso_type: 0x7f,
            ..good
        },
        VirtioNetHdr { flags: 0, ..good },
        VirtioNetHdr {
            csum_start: 0,
            ..good
        },
        VirtioNetHdr {
            csum_start: 0xffff,
            ..good
        },
        VirtioNetHdr {
            csum_offset: 0xfffe,
            ..good
        },
        VirtioNetHdr {
            csum_offset: 6,
            ..good
        },
    ];
    for header in hostile {
        peer.write(&offloaded(header, &packet));
    }
    // Right, but not accepted here.
    let uso = VirtioNetHdr {
        gso_type: GSO_UDP_L4,
        csum_offset: 6,
        ..good
    };
    peer.write(&offloaded(uso, &datagrams));
    // No packet at all, cut off, shorter than the header, and the wrong version.
    peer.write(&offloaded(VirtioNetHdr::PLAIN, b""));
    peer.write(&offloaded(good, &packet[..39]));
    peer.write(&[datagram_header(OFFLOAD_CONTEXT, 9).as_bytes(), &[0; 9]].concat());
    peer.write(&offloaded(VirtioNetHdr::PLAIN, &[0x50; 64]));
    peer.write(&plain(b""));
    peer.write(&plain(&[0x50; 64]));
    let dropped = hostile.len() as u64 + 7;

    let partial = VirtioNetHdr {
        gso_type: GSO_NONE,
        gso_size: 0,
        ..good
    };
    peer.write(&offloaded(partial, &packet));
    assert_eq!(server.receive(0).1, packet);
    assert_eq!(server.count("dropped_invalid"), dropped);
    assert_eq!(server.dropped(), dropped);
}

#[test]
fn unknown_contexts_and_capsules_are_skipped() {
    let mut server = End::new();
    let (mut peer, _) = Peer::join(&mut server, &Terms::default());
    let packet = numbered(5000, 1);
    let in_context =
        |context: u64| [datagram_header(context, packet.len()).as_bytes(), &packet].concat();
    let mut stream = in_context(4);
    stream.extend(in_context(0x1234_5678));
    stream.extend(capsule(0x29, b"")); // RFC 9297's capsules without meaning: 0x29 * N + 0x17.
    stream.extend(capsule(0x17, b"grease"));
    stream.extend(capsule(0x3fff_ffff_ffff_ffff, &[7; 300_000]));
    stream.extend(capsule(
        kind::DATAGRAM,
        &vec![0; 1 + DATAGRAM_PAYLOAD_BYTES_MAX + 1],
    ));
    stream.extend(capsule(kind::DATAGRAM, &[0; 200_000]));
    stream.extend(plain(&packet));
    peer.write(&stream);
    assert_eq!(server.receive(0).1, packet);
    assert_eq!(server.count("dropped_unknown_context"), 4);
    assert_eq!(server.dropped(), 4);
}

/// What ends a connection, as plaintext.
fn malformed_capsules() -> [Vec<u8>; 3] {
    [
        capsule(kind::DATAGRAM, b""),
        capsule(kind::PING, b"abc"),
        capsule(kind::ADDRESS_ASSIGN, &[0; 20_000]),
    ]
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let mut server = End::new();
    let terms = Terms::default();
    let (mut good, connection) = Peer::join(&mut server, &terms);
    server.route_lease(&[connection]);
    let mut number = 0;
    let mut assert_goes_on = |server: &End| {
        number += 1;
        good.write_packet(&numbered(5000, number));
        assert_eq!(number_of(&server.receive(0).1), number);
        let reply = numbered_reply(5000, number);
        server.send(0, VirtioNetHdr::PLAIN, &reply);
        assert_eq!(good.packet(), reply);
    };
    assert_goes_on(&server);

    let mut altered = Peer::join(&mut server, &terms);
    let mut record = altered.0.seal(&plain(&numbered(5000, 1)));
    *record.last_mut().unwrap() ^= 1;
    altered.0.socket.write_all(&record).unwrap();
    let mut misbehaving = vec![(
        altered,
        vec![Received::Alert(AlertDescription::BadRecordMac)],
    )];
    for (garbage, alert) in [
        (
            &b"GET / HTTP/1.1\r\nHost: files.example.net\r\n\r\n"[..],
            AlertDescription::UnexpectedMessage,
        ),
        (&[0; 100], AlertDescription::UnexpectedMessage),
        (&[23, 3, 3, 0xff, 0xff], AlertDescription::RecordOverflow),
        (&[23, 3, 3, 0, 1, 0], AlertDescription::BadRecordMac),
    ] {
        let mut peer = Peer::join(&mut server, &terms);
        peer.0.socket.write_all(garbage).unwrap();
        misbehaving.push((peer, vec![Received::Alert(alert)]));
    }
    for bytes in malformed_capsules() {
        let mut peer = Peer::join(&mut server, &terms);
        peer.0.write(&bytes);
        let told = Capsule::Close(CloseReason::Misbehaved);
        misbehaving.push((peer, vec![Received::Capsule(told), Received::CloseNotify]));
    }
    let mut idle = Peer::join(&mut server, &terms);
    // At once, or the answers to them would be as many.
    let mut updates = Vec::new();
    for _ in 0..=RECORDS_WITHOUT_DATA_MAX {
        let mut record = [0; CONTROL_RECORD_BYTES_MAX];
        let bytes = idle.0.records.key_update(false, &mut record).unwrap();
        updates.extend_from_slice(&record[..bytes]);
    }
    idle.0.socket.write_all(&updates).unwrap();
    let told = Received::Alert(AlertDescription::UnexpectedMessage);
    misbehaving.push((idle, vec![told]));
    let mut left: Vec<_> = misbehaving
        .iter()
        .map(|((_, connection), _)| *connection)
        .collect();
    let count = left.len() as u64;
    while !left.is_empty() {
        match server.event() {
            ringtun::worker::Event::Closed {
                connection,
                cause: CloseCause::Misbehaved(_),
            } => left.retain(|misbehaving| *misbehaving != connection),
            event => panic!("{event:?}"),
        }
        assert_goes_on(&server);
    }
    for ((mut peer, _), told) in misbehaving {
        for expected in told {
            assert_eq!(peer.receive(), expected);
        }
    }
    assert_eq!(server.count("ended_misbehaved"), count);
}

/// More packets in one read than the completion queue has entries.
#[test]
fn a_flood_of_the_shortest_packets_is_taken_or_counted() {
    if io_mode() == IoMode::Baseline {
        eprintln!("SKIPPED: it fills what stands for the TUN queue, see io_mode");
        return;
    }
    const FLOOD: usize = 100_000;
    let mut server = End::new();
    let (mut peer, _) = Peer::join(&mut server, &Terms::default());
    let mut shortest = numbered(5000, 1);
    shortest.truncate(20);
    shortest[2..4].copy_from_slice(&20_u16.to_be_bytes());
    let datagrams = offloaded(VirtioNetHdr::PLAIN, &shortest).repeat(FLOOD);
    peer.write(&datagrams);
    eventually("every packet is accounted for", || {
        server.count("tun_written_packets") + server.dropped() == FLOOD as u64
    });
    assert_ne!(server.count("tun_written_packets"), 0);
    server.tun[0].set_nonblocking(true).unwrap();
    let mut packet = [0; 64];
    while server.tun[0].recv(&mut packet).is_ok() {}
    server.tun[0].set_nonblocking(false).unwrap();
    peer.write_packet(&numbered(5000, 2));
    assert_eq!(number_of(&server.receive(0).1), 2);
}

/// The answers to a peer that asks and does not listen take bounded memory, and it can still begin to listen.
#[test]
fn pings_of_a_peer_that_does_not_read_do_not_pile_up() {
    const PINGS: usize = 2_000_000;
    let mut server = End::new();
    let (mut peer, connection) = Peer::join(&mut server, &Terms::default());
    server.route_lease(&[connection]);
    let mut ping = Vec::new();
    Capsule::put_ping(*b"are you?", &mut ping);
    let pings = ping.repeat(10_000);
    for _ in 0..PINGS / 10_000 {
        peer.write(&pings);
    }
    peer.write_packet(&numbered(5000, 1));
    assert_eq!(number_of(&server.receive(0).1), 1);
    server.send(0, VirtioNetHdr::PLAIN, &numbered_reply(5000, 2));
    let mut pongs = 0;
    loop {
        match peer.receive() {
            Received::Capsule(Capsule::Pong(payload)) => {
                assert_eq!(&payload, b"are you?");
                pongs += 1;
            }
            Received::Capsule(Capsule::Ping(_)) => {}
            Received::Offloaded(_, packet) => {
                assert_eq!(number_of(&packet), 2);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!((1..PINGS).contains(&pongs), "{pongs} pongs");
}
