//! ringtun: a fast TUN-over-TLS tunnel for Linux, built on io_uring.
// Their macros panic when the write fails: see `logging`.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod cli;
pub mod config;
pub mod control;
pub mod doctor;
pub mod invite;
pub mod keeper;
pub mod logging;
pub mod panics;
pub mod proto;
pub mod stats;
pub mod status;
pub mod sys;
pub mod tls;
pub mod uring;
pub mod worker;
