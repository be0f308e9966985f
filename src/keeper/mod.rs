//! The privileged process: plan, apply, undo, and typed requests from the daemon.

pub mod apply;
pub mod plan;
pub mod request;
pub mod state;
pub mod undo;
