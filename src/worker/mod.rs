//! The packet path: TUN to TCP (outbound) and TCP to TUN (inbound).

pub mod connection;
pub mod event_loop;
pub mod inbound;
pub mod outbound;
