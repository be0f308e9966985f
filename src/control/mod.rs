//! The daemon's control thread: accept, handshake, sessions, reconnect.

pub mod client;
pub mod handshake;
pub mod reconnect;
pub mod server;
pub mod status;
