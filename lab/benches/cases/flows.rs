//! Which connection a packet takes: its flow's hash, and the route table.

use super::packets::{Family, tcp};
use super::{Case, Volume, Work};
use ringtun::proto::flow_hash::flow_hash;
use ringtun::proto::packet;
use ringtun::proto::route_table::{ConnectionRef, Member, RouteTable, SessionId, SessionRoute};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

/// Packets in a run, each of another flow.
const BATCH: usize = 64;
/// Clients of a busy server.
const SESSIONS: u32 = 1000;
/// Connections of each.
const CONNECTIONS: u32 = 4;
/// The first client's address: 10.87.0.2.
const FIRST: u32 = 0x0a57_0002;

pub fn cases() -> Vec<Case> {
    let hashing = |name, family| {
        Case::new(name, Volume::Packets(BATCH), move || Hashing {
            packets: (0..BATCH).map(|flow| tcp(family, flow, 64)).collect(),
        })
    };
    vec![
        hashing("flow/hash/v4", Family::V4),
        hashing("flow/hash/v6", Family::V6),
        Case::new("flow/route/v4", Volume::Packets(BATCH), || Routing {
            table: table(),
            packets: (0..BATCH).map(to_client).collect(),
        }),
    ]
}

/// A packet to one of the clients.
fn to_client(number: usize) -> Vec<u8> {
    let mut packet = tcp(Family::V4, number, 64);
    let address = FIRST + number as u32 * 13 % SESSIONS;
    packet[16..20].copy_from_slice(&address.to_be_bytes());
    packet
}

fn table() -> RouteTable {
    let mut table = RouteTable::empty();
    for session in 0..SESSIONS {
        let address = IpAddr::from(Ipv4Addr::from_bits(FIRST + session));
        let members = (0..CONNECTIONS).map(|ordinal| Member {
            ordinal: ordinal as u8,
            connection: ConnectionRef {
                worker: (ordinal % 2) as u16,
                slot: session * CONNECTIONS + ordinal,
                generation: 1,
            },
            silent: false,
        });
        let route = SessionRoute::new(SessionId(session.into()), members);
        table.insert(&[address], route);
    }
    table
}

struct Hashing {
    packets: Vec<Vec<u8>>,
}

impl Work for Hashing {
    fn run(&mut self) {
        for packet in &self.packets {
            black_box(flow_hash(black_box(packet)));
        }
    }
}

struct Routing {
    table: RouteTable,
    packets: Vec<Vec<u8>>,
}

impl Work for Routing {
    fn run(&mut self) {
        for packet in &self.packets {
            let packet = black_box(packet);
            let connection = packet::destination(packet)
                .and_then(|destination| self.table.lookup(destination, flow_hash(packet)));
            assert!(black_box(connection).is_some());
        }
    }
}
