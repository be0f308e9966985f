//! A TLS 1.3 stream without I/O: the handshake by rustls, then our own record layer.
//!
//! rustls is given the peer's records one at a time and is left as soon as the handshake is complete. So whatever
//! comes after it, also in the same read, is seen by one record layer only: no half a ticket, no answer to a key
//! update is lost when the connection moves on to a worker.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{AlertDescription, ClientConfig, PeerIncompatible, ServerConfig};

use super::certificate::PinMismatch;
use super::record::{
    CONTROL_RECORD_BYTES_MAX, ContentType, KernelSecrets, RECORD_HEADER_BYTES,
    RECORD_PLAINTEXT_BYTES_MAX, RECORD_TAG_BYTES, RecordError, RecordLayer, Signal, record_bytes,
    sealed_bytes,
};

/// Why a TLS stream came to its end, in words for the user.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The server has another key than the invite says.
    #[error("{0}")]
    PinMismatch(PinMismatch),
    /// No authority that this host trusts has signed the server's certificate.
    #[error(
        "the server's certificate is not from an authority that this host trusts (an invite with a pin needs none)"
    )]
    UnknownIssuer,
    /// The server's certificate is too old.
    #[error("the server's certificate has expired (or this host's clock is wrong)")]
    Expired,
    /// The server's certificate is too new.
    #[error("the server's certificate is not valid yet (or this host's clock is wrong)")]
    NotYetValid,
    /// The server's certificate is for another name.
    #[error("the server's certificate is not for {0}")]
    WrongName(String),
    /// The peer does not hold its certificate's private key, or the certificate is forged.
    #[error("the server's signature is wrong: it does not hold the key of its certificate")]
    BadSignature,
    /// The server's certificate is wrong in another way.
    #[error("the server's certificate is not acceptable")]
    BadCertificate(#[source] rustls::Error),
    /// The peer speaks TLS 1.2 or older only.
    #[error("the other side does not speak TLS 1.3")]
    NotTls13,
    /// What the peer sends is not TLS at all.
    #[error("the other side does not speak TLS")]
    NotTls,
    /// The peer has no protocol in common with us above TLS.
    #[error("the other side does not speak HTTP/1.1 over TLS")]
    NoHttp,
    /// The peer refused the handshake.
    #[error("the other side refused the TLS handshake: {0:?}")]
    PeerAlert(AlertDescription),
    /// The peer does not keep to TLS, or rustls failed.
    #[error("the TLS handshake failed")]
    Handshake(#[source] rustls::Error),
    /// A record after the handshake was refused.
    #[error("the TLS stream broke")]
    Record(#[from] RecordError),
    /// Caller: the handshake is not complete.
    #[error("the TLS handshake is not complete")]
    HandshakeNotComplete,
    /// Caller: bytes from [`TlsStream::take_outgoing`] are still to be sent.
    #[error("the TLS stream has unsent bytes")]
    Unsent,
    /// One side has closed the stream.
    #[error("the TLS stream is closed")]
    Closed,
    /// The stream has failed before.
    #[error("the TLS stream has failed")]
    Failed,
}

/// One connection's TLS, from the first byte to the hand-over.
pub struct TlsStream {
    state: State,
    /// Received and not decrypted. While rustls works, the first `offered` bytes of it have been shown to rustls.
    incoming: Vec<u8>,
    offered: usize,
    outgoing: Vec<u8>,
    plaintext: Vec<u8>,
    peer_closed: bool,
    closed: bool,
}

/// What a worker needs to go on with a connection.
#[derive(Debug)]
pub struct Established {
    /// The keys, at their sequence numbers.
    pub records: RecordLayer,
    /// Received and not decrypted: the front of a record.
    pub ciphertext: Vec<u8>,
    /// Decrypted and not consumed.
    pub plaintext: Vec<u8>,
}

enum State {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
    Records(Box<RecordLayer>),
    Failed,
}

impl TlsStream {
    /// Begins as the client; its first flight is outgoing at once.
    ///
    /// # Errors
    /// rustls does not take the configuration.
    pub fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, TlsError> {
        let connection = UnbufferedClientConnection::new(config, name).map_err(tls_error)?;
        let mut stream = Self::new(State::Client(Box::new(connection)));
        stream.advance()?;
        Ok(stream)
    }

    /// Begins as the server and waits for the client.
    ///
    /// # Errors
    /// rustls does not take the configuration.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, TlsError> {
        let connection = UnbufferedServerConnection::new(config).map_err(tls_error)?;
        Ok(Self::new(State::Server(Box::new(connection))))
    }

    fn new(state: State) -> Self {
        Self {
            state,
            incoming: Vec::new(),
            offered: 0,
            outgoing: Vec::new(),
            plaintext: Vec::new(),
            peer_closed: false,
            closed: false,
        }
    }

    /// Takes what was received, any amount. It may add to [`Self::plaintext`] and to what is outgoing.
    ///
    /// # Errors
    /// The stream is at its end. What is outgoing then is an alert that tells the peer: send it, and close.
    pub fn feed(&mut self, ciphertext: &[u8]) -> Result<(), TlsError> {
        if self.peer_closed {
            // RFC 8446 section 6.1: what comes after close_notify is ignored.
            return Ok(());
        }
        self.incoming.extend_from_slice(ciphertext);
        self.advance()
    }

    /// What is to be sent, in order; it is taken out. Also to be asked after an error.
    pub fn take_outgoing(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.outgoing)
    }

    /// The handshake is neither complete nor failed.
    pub fn is_handshaking(&self) -> bool {
        matches!(self.state, State::Client(_) | State::Server(_))
    }

    /// Makes records of `plaintext`, which become outgoing.
    ///
    /// # Errors
    /// The handshake is not complete, or the stream is at its end.
    pub fn write(&mut self, plaintext: &[u8]) -> Result<(), TlsError> {
        let records = match &mut self.state {
            State::Records(_) if self.closed => return Err(TlsError::Closed),
            State::Records(records) => records,
            State::Failed => return Err(TlsError::Failed),
            State::Client(_) | State::Server(_) => return Err(TlsError::HandshakeNotComplete),
        };
        for part in plaintext.chunks(RECORD_PLAINTEXT_BYTES_MAX) {
            append(&mut self.outgoing, sealed_bytes(part.len()), |out| {
                records.seal(ContentType::ApplicationData, part, out)
            })?;
        }
        Ok(())
    }

    /// The received plaintext; the caller takes out what it has consumed.
    pub fn plaintext(&mut self) -> &mut Vec<u8> {
        &mut self.plaintext
    }

    /// The peer has ended its stream in order: no more plaintext comes.
    pub fn peer_closed(&self) -> bool {
        self.peer_closed
    }

    /// Ends our stream in order, where there is one: close_notify becomes outgoing.
    pub fn close(&mut self) {
        if let (State::Records(records), false) = (&mut self.state, self.closed) {
            // It fails only with an exhausted key; then the connection just ends.
            let _ = append(&mut self.outgoing, CONTROL_RECORD_BYTES_MAX, |out| {
                records.close_notify(out)
            });
            self.closed = true;
        }
    }

    /// Gives the keys away, with what was read too far.
    ///
    /// # Errors
    /// The handshake is not complete, there is something outgoing, or a side has closed.
    pub fn into_records(self) -> Result<Established, TlsError> {
        match self.state {
            State::Client(_) | State::Server(_) => Err(TlsError::HandshakeNotComplete),
            State::Failed => Err(TlsError::Failed),
            State::Records(_) if self.closed || self.peer_closed => Err(TlsError::Closed),
            State::Records(_) if !self.outgoing.is_empty() => Err(TlsError::Unsent),
            State::Records(records) => Ok(Established {
                records: *records,
                ciphertext: self.incoming,
                plaintext: self.plaintext,
            }),
        }
    }

    fn advance(&mut self) -> Result<(), TlsError> {
        let outcome = self.advance_handshake().and_then(|()| self.open_records());
        if outcome.is_err() {
            self.state = State::Failed;
        }
        outcome
    }

    /// Shows rustls one record after the other until it wants more than there is, or the handshake is complete.
    fn advance_handshake(&mut self) -> Result<(), TlsError> {
        loop {
            let (incoming, outgoing) = (&mut self.incoming, &mut self.outgoing);
            let turn = match &mut self.state {
                State::Client(connection) => {
                    turn(&mut **connection, incoming, self.offered, outgoing)?
                }
                State::Server(connection) => {
                    turn(&mut **connection, incoming, self.offered, outgoing)?
                }
                State::Records(_) | State::Failed => return Ok(()),
            };
            self.offered -= turn.discarded;
            match turn.next {
                Next::Again => {}
                Next::MoreInput => match self.next_offer() {
                    Some(offered) => self.offered = offered,
                    None => return Ok(()),
                },
                Next::Complete => return self.leave_rustls(),
            }
        }
    }

    /// How much to show to rustls after all that it has been shown: one record more, or the header of one that is
    /// not whole, so that what is no TLS is refused at once and not after 16 KiB. `None`: it has seen all that.
    fn next_offer(&self) -> Option<usize> {
        let mut start = 0;
        loop {
            let header = self.incoming[start..].first_chunk::<RECORD_HEADER_BYTES>()?;
            let header_end = start + RECORD_HEADER_BYTES;
            let end = header_end + usize::from(u16::from_be_bytes([header[3], header[4]]));
            if end > self.incoming.len() {
                return (header_end > self.offered).then_some(header_end);
            }
            if end > self.offered {
                return Some(end);
            }
            start = end;
        }
    }

    fn leave_rustls(&mut self) -> Result<(), TlsError> {
        let (extracted, secrets) = match std::mem::replace(&mut self.state, State::Failed) {
            State::Client(connection) => {
                let (extracted, kernel) = connection
                    .dangerous_into_kernel_connection()
                    .map_err(tls_error)?;
                (extracted, KernelSecrets::Client(kernel))
            }
            State::Server(connection) => {
                let (extracted, kernel) = connection
                    .dangerous_into_kernel_connection()
                    .map_err(tls_error)?;
                (extracted, KernelSecrets::Server(kernel))
            }
            State::Records(_) | State::Failed => return Err(TlsError::Failed),
        };
        if self.offered != 0 {
            // A record that ends the handshake ends with it (RFC 8446 section 5.1); rustls sees to that.
            return Err(TlsError::Handshake(rustls::Error::HandshakeNotComplete));
        }
        self.state = State::Records(Box::new(RecordLayer::new(extracted, secrets)?));
        Ok(())
    }

    /// Opens all whole records that are there.
    fn open_records(&mut self) -> Result<(), TlsError> {
        let State::Records(records) = &mut self.state else {
            return Ok(());
        };
        let mut consumed = 0;
        let outcome = loop {
            match open_first(records, &self.incoming[consumed..], &mut self.plaintext) {
                Ok(None) => break Ok(()),
                Ok(Some((bytes, signal))) => {
                    consumed += bytes;
                    if signal == Signal::CloseNotify {
                        self.peer_closed = true;
                        consumed = self.incoming.len();
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.incoming.drain(..consumed);
        if self.closed {
            return Ok(outcome?);
        }
        match outcome {
            Ok(()) if !records.wants_key_update() => Ok(()),
            Ok(()) => Ok(append(
                &mut self.outgoing,
                CONTROL_RECORD_BYTES_MAX,
                |out| records.key_update(false, out),
            )?),
            Err(error) => {
                if let Some(alert) = error.alert() {
                    append(&mut self.outgoing, CONTROL_RECORD_BYTES_MAX, |out| {
                        records.fatal_alert(alert, out)
                    })?;
                }
                Err(error.into())
            }
        }
    }
}

/// Opens the first record of `stream`, once it is whole: application data goes to the end of `plaintext`.
fn open_first(
    records: &mut RecordLayer,
    stream: &[u8],
    plaintext: &mut Vec<u8>,
) -> Result<Option<(usize, Signal)>, RecordError> {
    let Some(bytes) = record_bytes(stream)? else {
        return Ok(None);
    };
    let Some(record) = stream.get(..bytes) else {
        return Ok(None);
    };
    let start = plaintext.len();
    plaintext.resize(start + bytes - RECORD_HEADER_BYTES - RECORD_TAG_BYTES, 0);
    let opened = match records.open(record, &mut plaintext[start..]) {
        Ok(opened) => opened,
        Err(error) => {
            plaintext.truncate(start);
            return Err(error);
        }
    };
    let end = start + opened.bytes;
    let outcome = records.handle(opened.content_type, &plaintext[start..end]);
    plaintext.truncate(match opened.content_type {
        ContentType::ApplicationData => end,
        ContentType::Alert | ContentType::Handshake => start,
    });
    Ok(Some((bytes, outcome?)))
}

/// Lets `write` fill `bytes_max` bytes at the end of `out`, and keeps as many as it says.
fn append(
    out: &mut Vec<u8>,
    bytes_max: usize,
    write: impl FnOnce(&mut [u8]) -> Result<usize, RecordError>,
) -> Result<(), RecordError> {
    let start = out.len();
    out.resize(start + bytes_max, 0);
    let written = write(&mut out[start..]);
    out.truncate(start + written.as_ref().copied().unwrap_or(0));
    written.map(drop)
}

/// Both kinds of unbuffered connection, as one.
trait Unbuffered {
    type Data;
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn handshaking(&self) -> bool;
}

impl Unbuffered for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn handshaking(&self) -> bool {
        self.is_handshaking()
    }
}

impl Unbuffered for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn handshaking(&self) -> bool {
        self.is_handshaking()
    }
}

struct Turn {
    discarded: usize,
    next: Next,
}

enum Next {
    Again,
    MoreInput,
    Complete,
}

/// One step of rustls over the `offered` first bytes of `incoming`.
fn turn<C: Unbuffered>(
    connection: &mut C,
    incoming: &mut Vec<u8>,
    offered: usize,
    outgoing: &mut Vec<u8>,
) -> Result<Turn, TlsError> {
    let UnbufferedStatus { discard, state, .. } = connection.process(&mut incoming[..offered]);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(flight)) => {
            encode(flight, outgoing).map(|()| Next::Again)
        }
        Ok(ConnectionState::TransmitTlsData(flight)) => {
            flight.done();
            Ok(Next::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::MoreInput),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Complete),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(TlsError::Closed),
        // Only after the handshake, or with early data, which the server does not offer.
        Ok(_) => Err(TlsError::Handshake(rustls::Error::HandshakeNotComplete)),
        Err(error) => Err(tls_error(error)),
    };
    incoming.drain(..discard);
    match next {
        Ok(Next::Complete) if connection.handshaking() => Ok(Turn {
            discarded: discard,
            next: Next::MoreInput,
        }),
        Ok(next) => Ok(Turn {
            discarded: discard,
            next,
        }),
        Err(error) => {
            encode_alerts(connection, &mut incoming[..offered - discard], outgoing);
            Err(error)
        }
    }
}

/// After an error, rustls still has an alert for the peer.
fn encode_alerts<C: Unbuffered>(connection: &mut C, incoming: &mut [u8], outgoing: &mut Vec<u8>) {
    while let Ok(ConnectionState::EncodeTlsData(alert)) = connection.process(incoming).state {
        if encode(alert, outgoing).is_err() {
            return;
        }
    }
}

fn encode<D>(mut flight: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), TlsError> {
    let bytes = match flight.encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Ok(_) | Err(EncodeError::AlreadyEncoded) => return Ok(()),
    };
    let start = outgoing.len();
    outgoing.resize(start + bytes, 0);
    match flight.encode(&mut outgoing[start..]) {
        Ok(_) => Ok(()),
        Err(_) => Err(TlsError::Failed),
    }
}

/// rustls' error in the user's words.
fn tls_error(error: rustls::Error) -> TlsError {
    use rustls::{CertificateError as Bad, Error, PeerMisbehaved};
    match error {
        Error::InvalidCertificate(bad) => match bad {
            Bad::UnknownIssuer => TlsError::UnknownIssuer,
            Bad::Expired | Bad::ExpiredContext { .. } => TlsError::Expired,
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => TlsError::NotYetValid,
            Bad::NotValidForNameContext { expected, .. } => {
                TlsError::WrongName(expected.to_str().into_owned())
            }
            Bad::NotValidForName => TlsError::WrongName("this host name".to_owned()),
            Bad::BadSignature => TlsError::BadSignature,
            Bad::Other(other) => match other.0.downcast_ref::<PinMismatch>() {
                Some(mismatch) => TlsError::PinMismatch(*mismatch),
                None => TlsError::BadCertificate(Error::InvalidCertificate(Bad::Other(other))),
            },
            other => TlsError::BadCertificate(Error::InvalidCertificate(other)),
        },
        Error::PeerMisbehaved(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme) => {
            TlsError::BadSignature
        }
        Error::PeerIncompatible(
            PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled,
        )
        | Error::AlertReceived(AlertDescription::ProtocolVersion) => TlsError::NotTls13,
        Error::AlertReceived(AlertDescription::NoApplicationProtocol)
        | Error::NoApplicationProtocol => TlsError::NoHttp,
        Error::AlertReceived(alert) => TlsError::PeerAlert(alert),
        Error::InvalidMessage(
            rustls::InvalidMessage::InvalidContentType
            | rustls::InvalidMessage::UnknownProtocolVersion,
        ) => TlsError::NotTls,
        other => TlsError::Handshake(other),
    }
}
