//! What can be done to a server: the list of attacks, as values.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::bytes::{self, Generate};

/// Connections of a session at most, the one for sparse flows included.
const SESSION_CONNECTIONS: u8 = 17;
/// Between two bytes of a connection that keeps a record or capsule unfinished.
const TRICKLE_INTERVAL: Duration = Duration::from_millis(450);
/// The rate of an attack that hides among ordinary traffic.
const LOW_RATE_BITS_PER_SECOND: u64 = 6_000_000;
/// What an attacker sends at most while a condition lasts. Time is the tighter bound nearly always.
const BYTES_MAX: u64 = 8 << 30;
/// The same of requests whose answers are never read.
const UNREAD_REQUEST_BYTES_MAX: u64 = 300_000_000;
/// UDP super-packets in a record at a low rate.
const SUPER_PACKETS_AT_LOW_RATE: usize = 8;
/// Addresses that strangers have.
const STRANGER_ADDRESSES: u8 = 24;
/// Connections that a stranger holds from each.
const CONNECTIONS_PER_ADDRESS: usize = 48;
/// Handshakes of strangers that are under way at a time.
const HANDSHAKES_AT_ONCE: usize = 16;
/// Unused connections that each of those who open them holds at most.
pub(super) const HELD_MAX: usize = 500;
/// Connections that a peer opens at a time.
const OPENINGS_AT_ONCE: usize = 8;

/// One attack, by its name on the command line.
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Attack {
    /// ADDRESS_REQUESTs of 2,340 IPv4 entries
    AddressRequestsV4,
    /// ADDRESS_REQUESTs of 862 IPv6 entries
    AddressRequestsV6,
    /// 17 connections of one token, each with an unfinished record that grows by a byte every 0.45
    /// s
    PartialRecords,
    /// 34 connections of two tokens, each with an unfinished record that grows by a byte every 0.45
    /// s
    PartialRecordsTwoTokens,
    /// 17 connections of one token, each with an unfinished capsule of 60 KB
    PartialCapsules,
    /// 34 connections of two tokens, each with an unfinished capsule of 60 KB
    PartialCapsulesTwoTokens,
    /// ADDRESS_REQUESTs as fast as possible, answers never read, 300 MB at most
    UnreadAddresses,
    /// PINGs as fast as possible, answers never read, 300 MB at most
    UnreadPings,
    /// UDP super-packets of 128 one-byte segments, 6 Mbit/s
    TinySegmentsUdp,
    /// UDP super-packets of 128 one-byte segments, as fast as possible
    TinySegmentsUdpUnpaced,
    /// TCP super-packets of 2,046 segments of 32 bytes, as fast as possible
    TinySegmentsTcp,
    /// TLS key updates that each ask for another, as fast as possible
    KeyUpdates,
    /// TLS user_canceled alerts as fast as possible
    UserCanceled,
    /// TLS records without content as fast as possible
    EmptyRecords,
    /// TLS records of one byte as fast as possible
    TinyRecords,
    /// The shortest packets, one to a TLS record, as fast as possible
    ShortestPackets,
    /// 17 connections of one token that never read the bulk sent to them
    UnreadDownloads,
    /// Connection 0 of a session opened again and again, each in place of the one before
    ReplaceStorm,
    /// Connection 0 of a token opened again and again, by two instances in turns
    SupersedeStorm,
    /// Strangers at 24 addresses with 48 silent TCP connections each
    StrangersSilent,
    /// Strangers at 24 addresses with 48 TCP connections each, silent after a ClientHello
    StrangersHello,
    /// TLS handshakes without a token as fast as possible, from one address
    StrangersHandshakes,
    /// `ringtun status --json` on the server's host in a loop
    StatusHammer,
}

/// What an attacker does, as the code that does it needs it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Load {
    /// Connections with a token that send what a function makes.
    Tunnels(Tunnels),
    /// Connection 0 opened again and again, by so many instances in turns.
    Openings { instances: u64, at_once: usize },
    /// Connections without a token.
    Strangers(Strangers),
    /// Runs `ringtun status`.
    Status,
}

/// See [`Load::Tunnels`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Tunnels {
    /// Tokens, each with one instance.
    pub(super) tokens: usize,
    /// Connections of each instance: its first so many connection indexes.
    pub(super) connections: u8,
    /// When a piece is sent.
    pub(super) pace: Pace,
    /// What all of them send together at most while a condition lasts.
    pub(super) bytes_max: u64,
    /// Whether they read what comes.
    pub(super) reads: bool,
    /// Whether `web` sends bulk to them.
    pub(super) is_sent_bulk: bool,
    /// Makes pieces, for the inner address that the session has.
    pub(super) generator: fn(Ipv4Addr) -> Generate,
}

/// When the next piece is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pace {
    /// When the socket has room.
    Unpaced,
    /// So many bits a second of all connections together.
    BitsPerSecond(u64),
    /// A piece of each connection in this time.
    Every(Duration),
}

/// See [`Load::Strangers`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Strangers {
    pub(super) addresses: u8,
    pub(super) connections_per_address: usize,
    pub(super) habit: Habit,
}

/// What a stranger does with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Habit {
    /// Keeps it, without a word.
    Silent,
    /// Sends a ClientHello and keeps it.
    Hello,
    /// Completes the handshake and leaves.
    Handshake,
}

impl Attack {
    /// All attacks, in the order in which they are made.
    #[must_use]
    pub fn all() -> &'static [Attack] {
        <Attack as clap::ValueEnum>::value_variants()
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What it does, in one line.
    #[must_use]
    pub fn about(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or_else(String::new, |value| {
            value
                .get_help()
                .map_or_else(String::new, ToString::to_string)
        })
    }

    /// Connections that the attacker holds at a time, at most.
    pub(super) fn connections_max(self) -> usize {
        match self.load() {
            Load::Tunnels(tunnels) => tunnels.tokens * usize::from(tunnels.connections),
            Load::Openings { at_once, .. } => at_once * (HELD_MAX + 1),
            Load::Strangers(strangers) => {
                usize::from(strangers.addresses) * strangers.connections_per_address
            }
            Load::Status => 0,
        }
    }

    /// Whether it is made by strangers on the internet's side. Then a newcomer's start is timed,
    /// too.
    pub(super) fn is_by_strangers(self) -> bool {
        matches!(self.load(), Load::Strangers(_))
    }

    /// What the attacker does.
    pub(super) fn load(self) -> Load {
        let one = Tunnels {
            tokens: 1,
            connections: 1,
            pace: Pace::Unpaced,
            bytes_max: BYTES_MAX,
            reads: true,
            is_sent_bulk: false,
            generator: |_| bytes::empty_records(),
        };
        let all = Tunnels {
            connections: SESSION_CONNECTIONS,
            pace: Pace::Every(TRICKLE_INTERVAL),
            generator: |_| bytes::partial_record(),
            ..one
        };
        let unread = Tunnels {
            reads: false,
            bytes_max: UNREAD_REQUEST_BYTES_MAX,
            ..one
        };
        let strangers = Strangers {
            addresses: STRANGER_ADDRESSES,
            connections_per_address: CONNECTIONS_PER_ADDRESS,
            habit: Habit::Silent,
        };
        let tunnels = match self {
            Attack::AddressRequestsV4 => Tunnels {
                generator: |_| bytes::largest_address_requests(false),
                ..one
            },
            Attack::AddressRequestsV6 => Tunnels {
                generator: |_| bytes::largest_address_requests(true),
                ..one
            },
            Attack::PartialRecords => all,
            Attack::PartialRecordsTwoTokens => Tunnels { tokens: 2, ..all },
            Attack::PartialCapsules => Tunnels {
                generator: |_| bytes::partial_capsule(),
                ..all
            },
            Attack::PartialCapsulesTwoTokens => Tunnels {
                tokens: 2,
                generator: |_| bytes::partial_capsule(),
                ..all
            },
            Attack::UnreadAddresses => Tunnels {
                generator: |_| bytes::address_requests(),
                ..unread
            },
            Attack::UnreadPings => Tunnels {
                generator: |_| bytes::repeat(bytes::pings()),
                ..unread
            },
            Attack::TinySegmentsUdp => Tunnels {
                pace: Pace::BitsPerSecond(LOW_RATE_BITS_PER_SECOND),
                generator: |from| {
                    let capsule = bytes::udp_super_packet(from);
                    bytes::repeat(capsule.repeat(SUPER_PACKETS_AT_LOW_RATE))
                },
                ..one
            },
            Attack::TinySegmentsUdpUnpaced => Tunnels {
                generator: |from| {
                    let capsule = bytes::udp_super_packet(from);
                    bytes::repeat(bytes::fill_record(&capsule))
                },
                ..one
            },
            Attack::TinySegmentsTcp => Tunnels {
                generator: |from| bytes::repeat(bytes::tcp_super_packet(from)),
                ..one
            },
            Attack::KeyUpdates => Tunnels {
                generator: |_| bytes::key_updates(),
                ..one
            },
            Attack::UserCanceled => Tunnels {
                generator: |_| bytes::user_canceled(),
                ..one
            },
            Attack::EmptyRecords => one,
            Attack::TinyRecords => Tunnels {
                generator: |from| bytes::packets_in_small_records(from, Some(1)),
                ..one
            },
            Attack::ShortestPackets => Tunnels {
                generator: |from| bytes::packets_in_small_records(from, None),
                ..one
            },
            Attack::UnreadDownloads => Tunnels {
                reads: false,
                is_sent_bulk: true,
                // A connection that says nothing else would be asked whether it is there.
                generator: bytes::invitations,
                ..all
            },
            Attack::ReplaceStorm => {
                return Load::Openings {
                    instances: 1,
                    at_once: OPENINGS_AT_ONCE,
                };
            }
            Attack::SupersedeStorm => {
                return Load::Openings {
                    instances: 2,
                    at_once: OPENINGS_AT_ONCE,
                };
            }
            Attack::StrangersSilent => return Load::Strangers(strangers),
            Attack::StrangersHello => {
                return Load::Strangers(Strangers {
                    habit: Habit::Hello,
                    ..strangers
                });
            }
            Attack::StrangersHandshakes => {
                return Load::Strangers(Strangers {
                    addresses: 1,
                    connections_per_address: HANDSHAKES_AT_ONCE,
                    habit: Habit::Handshake,
                });
            }
            Attack::StatusHammer => return Load::Status,
        };
        Load::Tunnels(tunnels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attack_has_a_name_and_says_what_it_does() {
        for attack in Attack::all() {
            assert!(!attack.name().is_empty() && !attack.about().is_empty());
            let json = serde_json::to_value(attack).expect("a string");
            assert_eq!(json, attack.name());
        }
    }

    #[test]
    fn one_token_has_all_connections_of_a_session() {
        let Load::Tunnels(tunnels) = Attack::PartialRecords.load() else {
            panic!("it has a token");
        };
        assert_eq!(tunnels.connections, 17);
        assert_eq!(tunnels.pace, Pace::Every(Duration::from_millis(450)));
        assert_eq!(Attack::PartialRecords.connections_max(), 17);
        assert_eq!(Attack::PartialRecordsTwoTokens.connections_max(), 34);
        assert_eq!(Attack::StrangersSilent.connections_max(), 24 * 48);
    }
}
