//! The privileged process: plan, apply, undo, and typed requests from the daemon.

pub mod apply;
pub mod link;
pub mod plan;
pub mod request;
pub mod state;
pub mod undo;

pub use link::{DaemonStart, Link, LinkError, Notices, SetupFds};
