//! TLS 1.3: the handshake by rustls, the records by our own record layer.
//!
//! The way of a connection through this module:
//! 1. [`certificate`] makes the configuration: whom to trust, what to present, which cipher to prefer.
//! 2. [`handshake::TlsStream`] runs the handshake and carries the few bytes of the HTTP upgrade. It does no I/O.
//! 3. [`handshake::TlsStream::into_records`] gives an [`Established`]: keys, sequence numbers and what was read too
//!    far. It is `Send`, so that the thread that moves packets can have it.
//! 4. [`record::RecordLayer`] seals and opens records from then on, and changes keys.

pub mod certificate;
mod cipher;
pub mod handshake;
pub mod record;

pub use certificate::{CertificateError, Identity, PinMismatch, Trust};
pub use handshake::{Established, TlsError, TlsStream};
pub use record::{ContentType, Opened, RecordError, RecordLayer, Signal};
pub use rustls::AlertDescription;

#[cfg(test)]
mod stock;
