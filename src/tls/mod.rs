//! TLS 1.3: the handshake by rustls, the records by our own record layer.

pub mod certificate;
pub mod handshake;
pub mod record;
