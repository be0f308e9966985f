//! ringtun: a fast TUN-over-TLS tunnel for Linux, built on io_uring.

pub mod cli;
pub mod config;
pub mod control;
pub mod doctor;
pub mod invite;
pub mod keeper;
pub mod proto;
pub mod stats;
pub mod status;
pub mod sys;
pub mod tls;
pub mod uring;
pub mod worker;
