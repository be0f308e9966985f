//! Datagrams that a host sends in a burst are gathered on their way into the tunnel, and the other host gets every one of
//! them, as it was and in order. Both kernels take part: one gives packets, one takes super-packets.

mod common;

use std::net::{IpAddr, UdpSocket};

use common::status::{connections, list, number, status, turned_away};
use common::{SOON, Tunnel, lab, until, until_true};
use ringtun::proto::offload::GSO_BYTES_MIN;
use ringtun_lab::topology::{WEB_V4, WEB_V6};
use ringtun_lab::{Host, Lab};
use rstest::rstest;
use serde_json::{Value, json};

/// Datagrams of a burst: any socket has room for so many.
const BURST: usize = 32;
/// Bursts between two looks at the counters.
const BURSTS: usize = 10;
/// Bytes of each datagram of a burst but the last, which has one less.
const SIZES: [usize; 6] = [2, 47, 48, 64, 500, 1400];

/// Two sockets that talk to each other through the tunnel.
fn sockets(client: &Host, web: &Host, address: IpAddr) -> (UdpSocket, UdpSocket) {
    let bind = |host: &Host, address| {
        let socket = host
            .enter(|| UdpSocket::bind((address, 0)))
            .expect("the host")
            .expect("a port");
        socket.set_read_timeout(Some(SOON)).expect("a socket");
        socket
    };
    let at_web = bind(web, address);
    let any: IpAddr = match address {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let at_client = bind(client, any);
    at_client
        .connect(at_web.local_addr().expect("bound"))
        .expect("a route");
    at_client.send(b"hello").expect("sent");
    // The address that the server gave it.
    let (_, seen) = at_web.recv_from(&mut [0; 16]).expect("the first datagram");
    at_web.connect(seen).expect("a route");
    (at_client, at_web)
}

/// Sends a burst and checks what arrives.
fn pass(from: &UdpSocket, to: &UdpSocket, bytes: usize, seed: usize) {
    let datagram = |index: usize| -> Vec<u8> {
        let bytes = bytes - usize::from(index + 1 == BURST);
        (0..bytes).map(|at| (seed + index * 7 + at) as u8).collect()
    };
    for index in 0..BURST {
        from.send(&datagram(index)).expect("sent");
    }
    let mut received = [0; 2048];
    for index in 0..BURST {
        let bytes = to.recv(&mut received).expect("a datagram");
        assert!(received[..bytes] == datagram(index), "datagram {index}");
    }
}

fn counter(connection: &Value, name: &str) -> u64 {
    number(connection, &format!("/counters/{name}"))
}

#[rstest]
fn bursts_arrive_as_they_were_sent(
    lab: Lab,
    #[values(IpAddr::V4(WEB_V4), IpAddr::V6(WEB_V6))] address: IpAddr,
) {
    // All datagrams go by the one connection that is looked at.
    let configured = lab
        .host("client")
        .write_file("/etc/ringtun/client.toml", "connections = 1\n");
    configured.expect("a configuration");
    let _tunnel = Tunnel::start(&lab);
    let (client, server, web) = (lab.host("client"), lab.host("server"), lab.host("web"));
    let (at_client, at_web) = sockets(client, web, address);
    for (from, to, sender, receiver) in [
        (&at_client, &at_web, client, server),
        (&at_web, &at_client, server, client),
    ] {
        let offload = if address.is_ipv4() { "uso4" } else { "uso6" };
        let sends = |status: &Value| {
            let offloads = list(connections(status)[0], "peer_offloads");
            offloads.contains(&json!(offload))
        };
        if !sends(&status(sender)) {
            println!("the kernel takes no super-packets of UDP: datagrams stay single");
            SIZES.iter().for_each(|&bytes| pass(from, to, bytes, 0));
            assert_eq!(
                counter(connections(&status(sender))[0], "gathered_packets"),
                0
            );
            continue;
        }
        for bytes in SIZES {
            if bytes < GSO_BYTES_MIN {
                pass(from, to, bytes, 0);
                continue;
            }
            let gathered = || counter(connections(&status(sender))[0], "gathered_packets");
            let before = gathered();
            until_true(&format!("gathering of {bytes} bytes each"), || {
                (0..BURSTS).for_each(|seed| pass(from, to, bytes, seed));
                gathered() > before
            });
        }
        // What left gathered went into the other interface as such.
        let taken = until("agreement of both sides", || {
            let (ours, theirs) = (status(sender), status(receiver));
            let (here, there) = (connections(&ours)[0], connections(&theirs)[0]);
            let sent = counter(here, "sent_packets") - counter(here, "gathered_packets");
            let taken = counter(there, "received_packets") + turned_away(there);
            (sent == taken).then_some(theirs)
        });
        for worker in list(&taken, "workers") {
            assert_eq!(number(worker, "/counters/segmented_after_refusal"), 0);
            assert_eq!(number(worker, "/counters/dropped_tun_refused"), 0);
        }
    }
}
