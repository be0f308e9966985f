//! The daemon's control thread: accept, handshake, sessions, reconnect.

pub mod reconnect;
pub mod runtime;
