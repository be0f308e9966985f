//! The pure part: no I/O, no clock, no unsafe. Bytes and times come in as arguments, results go out as values.
#![forbid(unsafe_code)]

pub mod address_pool;
pub mod budget;
pub mod capsule;
pub mod deframer;
pub mod ecn;
pub mod egress_queue;
pub mod flow_hash;
pub mod http;
pub mod offload;
pub mod packet;
pub mod route_table;
pub mod send_limit;
pub mod session;
pub mod sparse_flows;
pub mod timer;
