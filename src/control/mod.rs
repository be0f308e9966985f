//! The daemon's control thread: accept, handshake, sessions, reconnect.

pub mod dial;
pub mod gate;
pub mod handshake;
pub mod network;
pub mod opening;
pub mod reconnect;
pub mod runtime;
