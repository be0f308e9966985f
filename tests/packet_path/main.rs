//! The packet path as a whole: the workers of a client and of a server on real rings, joined by real TCP and real TLS.
//!
//! Only the TUN queues are stand-ins: a Unix datagram socket keeps the boundaries of packets just so. Nothing here
//! needs a privilege.

mod budget;
mod congestion;
mod counters;
mod delivery;
mod end;
mod gathering;
mod hostile;
mod life;
mod memory;
mod packets;
mod peer;
mod sparse_flows;
