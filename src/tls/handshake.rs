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
use rustls::{AlertDescription, ClientConfig, CommonState, PeerIncompatible, ServerConfig};

use super::certificate::{ALPN, PinMismatch};
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
    /// Received. Once rustls is left: whatever is not decrypted. Before: first what rustls has seen and keeps here, the
    /// front of a handshake message, decrypted in place and without its records' headers.
    incoming: Vec<u8>,
    /// So much of `incoming` has been shown to rustls,
    offered: usize,
    /// and so much of that were whole records: here the next begins.
    whole_records: usize,
    outgoing: Vec<u8>,
    plaintext: Vec<u8>,
    peer_closed: bool,
    closed: bool,
    agreed: Agreed,
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
    /// What the handshake agreed on.
    pub agreed: Agreed,
}

/// What a handshake agreed on, by the names of the standards; empty where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// The cipher suite.
    pub cipher_suite: &'static str,
    /// The group of the key exchange.
    pub key_exchange: &'static str,
    /// The application protocol, by ALPN; a client that is not ours may have asked for none.
    pub alpn: &'static str,
}

impl Agreed {
    fn of(connection: &CommonState) -> Self {
        let suite = connection.negotiated_cipher_suite();
        let group = connection.negotiated_key_exchange_group();
        Agreed {
            cipher_suite: suite
                .and_then(|suite| suite.suite().as_str())
                .unwrap_or_default(),
            key_exchange: group
                .and_then(|group| group.name().as_str())
                .unwrap_or_default(),
            // No other is ever accepted.
            alpn: connection.alpn_protocol().map_or("", |_| ALPN),
        }
    }
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
            whole_records: 0,
            outgoing: Vec::new(),
            plaintext: Vec::new(),
            peer_closed: false,
            closed: false,
            agreed: Agreed::default(),
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
        if matches!(self.state, State::Failed) {
            return Err(TlsError::Failed);
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
            State::Records(records) => {
                let (mut ciphertext, mut plaintext) = (self.incoming, self.plaintext);
                // They have held a whole handshake, and may now be kept as they are for as long as the peer says nothing.
                ciphertext.shrink_to_fit();
                plaintext.shrink_to_fit();
                Ok(Established {
                    records: *records,
                    ciphertext,
                    plaintext,
                    agreed: self.agreed,
                })
            }
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
            self.whole_records -= turn.discarded;
            match turn.next {
                Next::Again => {}
                Next::MoreInput if self.offer_more() => {}
                Next::MoreInput => return Ok(()),
                Next::Complete => return self.leave_rustls(),
            }
        }
    }

    /// Offers rustls one record more, or the header of one that is not whole, so that what is no TLS is refused at once
    /// and not after 16 KiB. False when it has been shown all that there is.
    fn offer_more(&mut self) -> bool {
        let unseen = &self.incoming[self.whole_records..];
        let Some(header) = unseen.first_chunk::<RECORD_HEADER_BYTES>() else {
            return false;
        };
        let bytes = RECORD_HEADER_BYTES + usize::from(u16::from_be_bytes([header[3], header[4]]));
        let already_offered = self.offered;
        if unseen.len() < bytes {
            self.offered = self.whole_records + RECORD_HEADER_BYTES;
        } else {
            self.whole_records += bytes;
            self.offered = self.whole_records;
        }
        self.offered > already_offered
    }

    fn leave_rustls(&mut self) -> Result<(), TlsError> {
        let (extracted, secrets) = match std::mem::replace(&mut self.state, State::Failed) {
            State::Client(connection) => {
                self.agreed = Agreed::of(&connection);
                let (extracted, kernel) = connection
                    .dangerous_into_kernel_connection()
                    .map_err(tls_error)?;
                (extracted, KernelSecrets::Client(kernel))
            }
            State::Server(connection) => {
                self.agreed = Agreed::of(&connection);
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
    fn has_outgoing(&self) -> bool;
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
    fn has_outgoing(&self) -> bool {
        self.wants_write()
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
    fn has_outgoing(&self) -> bool {
        self.wants_write()
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
            encode_alerts(connection, outgoing);
            Err(error)
        }
    }
}

/// After an error, rustls still has an alert for the peer. It is asked for nothing else: it does not expect to be
/// shown the wrong bytes a second time.
fn encode_alerts<C: Unbuffered>(connection: &mut C, outgoing: &mut Vec<u8>) {
    while connection.has_outgoing() {
        let Ok(ConnectionState::EncodeTlsData(alert)) = connection.process(&mut []).state else {
            return;
        };
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};
    use rustls::client::{
        ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
    };
    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;
    use rustls::{Connection, NamedGroup, RootCertStore, ServerConnection};

    use super::super::certificate::{self, Identity, Trust};
    use super::super::stock::{self, Chunks, Ours, Pair, SUITES};
    use super::*;
    use crate::config::Cipher;

    const SIDES: [Ours; 2] = [Ours::Client, Ours::Server];

    /// `bytes` bytes that differ from place to place.
    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes)
            .map(|place| (place * 31 + place / 251) as u8)
            .collect()
    }

    fn serve(identity: Identity) -> Connection {
        Connection::Server(
            ServerConnection::new(certificate::server_config(identity, Cipher::Auto).unwrap())
                .unwrap(),
        )
    }

    /// How our client ends against a server, and what that server then hears.
    fn refusal(
        config: Arc<ClientConfig>,
        name: &str,
        mut server: Connection,
    ) -> (TlsError, rustls::Error) {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut pair_client = TlsStream::client(config, name).unwrap();
        stock::give(&mut server, &pair_client.take_outgoing()).unwrap();
        let error = pair_client.feed(&stock::take(&mut server)).unwrap_err();
        assert!(!pair_client.is_handshaking());
        assert!(matches!(pair_client.feed(b"more"), Err(TlsError::Failed)));
        let heard = stock::give(&mut server, &pair_client.take_outgoing()).unwrap_err();
        assert!(matches!(pair_client.into_records(), Err(TlsError::Failed)));
        (error, heard)
    }

    fn roots_of(identity: &Identity) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(identity.chain[0].clone()).unwrap();
        roots
    }

    fn valid_between(from_year: i32, to_year: i32) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([stock::NAME.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(from_year, 1, 1);
        params.not_after = rcgen::date_time_ymd(to_year, 1, 1);
        let certificate = params.self_signed(&key).unwrap();
        Identity::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap()
    }

    #[test]
    fn both_sides_agree_with_stock_rustls_on_group_protocol_and_suite() {
        for (side, suite) in SIDES
            .into_iter()
            .flat_map(|side| SUITES.map(|suite| (side, suite)))
        {
            let mut pair = Pair::new(side, suite);
            assert!(pair.ours.is_handshaking());
            pair.settle(&mut Chunks::whole()).unwrap();
            assert!(!pair.ours.is_handshaking());
            assert_eq!(pair.stock.alpn_protocol(), Some(&b"http/1.1"[..]));
            assert_eq!(pair.stock.negotiated_cipher_suite(), Some(suite));
            let group = pair.stock.negotiated_key_exchange_group().unwrap();
            assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
        }
    }

    #[test]
    fn a_server_may_ask_for_a_second_hello() {
        let Identity { chain, key } = stock::identity();
        let mut provider = Arc::unwrap_or_clone(stock::provider_of(&SUITES[..1]));
        provider.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::SECP384R1];
        let config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let mut pair = Pair {
            ours: TlsStream::client(stock::pinned(), stock::name()).unwrap(),
            stock: Connection::Server(ServerConnection::new(Arc::new(config)).unwrap()),
        };
        pair.settle(&mut Chunks::whole()).unwrap();
        let kind = pair.stock.handshake_kind();
        assert_eq!(kind, Some(rustls::HandshakeKind::FullWithHelloRetryRequest));
        pair.ours.write(b"after all").unwrap();
        assert_eq!(pair.settle(&mut Chunks::whole()).unwrap(), b"after all");
    }

    #[test]
    fn data_that_comes_with_the_handshake_is_kept_whole_or_not() {
        for side in SIDES {
            let mut pair = Pair::new(side, SUITES[0]);
            // As far as the stock end has to hear from ours.
            while pair.stock.is_handshaking() {
                stock::give(&mut pair.stock, &pair.ours.take_outgoing()).unwrap();
                if pair.stock.is_handshaking() {
                    pair.ours.feed(&stock::take(&mut pair.stock)).unwrap();
                }
            }
            // The stock end's last words of the handshake and its first data in one piece, cut inside a record.
            let mut last = stock::write(&mut pair.stock, b"first");
            let whole = last.len();
            last.extend(stock::write(&mut pair.stock, b"second"));
            let (now, later) = last.split_at(whole + 9);
            pair.ours.feed(now).unwrap();
            assert!(!pair.ours.is_handshaking());
            // A server has tickets to send.
            assert_eq!(pair.ours.take_outgoing().is_empty(), side == Ours::Client);

            let Established {
                mut records,
                mut ciphertext,
                plaintext,
                agreed,
            } = pair.ours.into_records().unwrap();
            assert_eq!(plaintext, b"first");
            assert_eq!(Some(agreed.cipher_suite), SUITES[0].suite().as_str());
            assert_ne!(agreed.key_exchange, "");
            assert_eq!(agreed.alpn, "http/1.1");
            assert_eq!(ciphertext, &last[whole..whole + 9]);
            ciphertext.extend_from_slice(later);
            let mut out = [0; 64];
            let opened = records.open(&ciphertext, &mut out).unwrap();
            assert_eq!(
                (opened.content_type, &out[..opened.bytes]),
                (ContentType::ApplicationData, &b"second"[..])
            );
        }
    }

    #[test]
    fn a_stream_is_used_in_order() {
        let mut stream = TlsStream::client(stock::pinned(), stock::name()).unwrap();
        assert!(matches!(
            stream.write(b"early"),
            Err(TlsError::HandshakeNotComplete)
        ));
        stream.close();
        assert!(stream.is_handshaking());
        assert!(matches!(
            stream.into_records(),
            Err(TlsError::HandshakeNotComplete)
        ));

        let mut pair = Pair::new(Ours::Server, SUITES[0]);
        pair.settle(&mut Chunks::whole()).unwrap();
        pair.ours.write(b"unsent").unwrap();
        assert!(matches!(pair.ours.into_records(), Err(TlsError::Unsent)));

        let mut pair = Pair::new(Ours::Client, SUITES[0]);
        pair.settle(&mut Chunks::whole()).unwrap();
        pair.ours.close();
        assert!(matches!(pair.ours.write(b"late"), Err(TlsError::Closed)));
        assert!(matches!(pair.ours.into_records(), Err(TlsError::Closed)));
    }

    #[test]
    fn each_side_may_close_first() {
        for side in SIDES {
            let mut pair = Pair::new(side, SUITES[0]);
            pair.settle(&mut Chunks::whole()).unwrap();
            pair.ours.write(b"last words").unwrap();
            pair.ours.close();
            pair.ours.close();
            let sent = pair.ours.take_outgoing();
            assert_eq!(stock::give(&mut pair.stock, &sent).unwrap(), b"last words");
            assert!(pair.stock.process_new_packets().unwrap().peer_has_closed());
            // Our half is closed; the other still carries.
            let answer = stock::write(&mut pair.stock, b"answer");
            pair.ours.feed(&answer).unwrap();
            assert_eq!(pair.ours.plaintext(), b"answer");

            let mut pair = Pair::new(side, SUITES[0]);
            pair.settle(&mut Chunks::whole()).unwrap();
            pair.stock.writer().write_all(b"bye").unwrap();
            pair.stock.send_close_notify();
            let mut sent = stock::take(&mut pair.stock);
            sent.extend(b"after the end");
            pair.ours.feed(&sent).unwrap();
            assert!(pair.ours.peer_closed());
            assert_eq!(pair.ours.plaintext(), b"bye");
            pair.ours.feed(b"and more").unwrap();
            assert!(matches!(pair.ours.into_records(), Err(TlsError::Closed)));
        }
    }

    #[test]
    fn an_altered_record_ends_the_stream_and_the_peer_is_told() {
        for side in SIDES {
            let mut pair = Pair::new(side, SUITES[0]);
            pair.settle(&mut Chunks::whole()).unwrap();
            let mut sent = stock::write(&mut pair.stock, b"good");
            sent.extend(stock::write(&mut pair.stock, b"bad"));
            *sent.last_mut().unwrap() ^= 1;
            let error = pair.ours.feed(&sent).unwrap_err();
            assert!(matches!(error, TlsError::Record(RecordError::Altered)));
            assert_eq!(pair.ours.plaintext(), b"good");
            let heard = stock::give(&mut pair.stock, &pair.ours.take_outgoing());
            assert_eq!(
                heard,
                Err(rustls::Error::AlertReceived(AlertDescription::BadRecordMac))
            );
            assert!(matches!(pair.ours.write(b"on"), Err(TlsError::Failed)));
        }
    }

    #[derive(Debug, Default)]
    struct TicketCounter(AtomicUsize);

    impl ClientSessionStore for TicketCounter {
        fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}
        fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
            None
        }
        fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}
        fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
            None
        }
        fn remove_tls12_session(&self, _: &ServerName<'static>) {}
        fn insert_tls13_ticket(&self, _: ServerName<'static>, _: Tls13ClientSessionValue) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
            None
        }
    }

    #[test]
    fn tickets_reach_rustls() {
        let store = Arc::new(TicketCounter::default());
        let mut config = Arc::unwrap_or_clone(stock::pinned());
        config.resumption = Resumption::store(store.clone());
        let ours = TlsStream::client(Arc::new(config), stock::name()).unwrap();
        let mut pair = Pair {
            ours,
            stock: stock::stock_server(&SUITES[1..2], None),
        };
        pair.settle(&mut Chunks::new(vec![7])).unwrap();
        assert_eq!(store.0.load(Ordering::Relaxed), 4);
        assert!(pair.ours.plaintext().is_empty());
    }

    #[test]
    fn a_wrong_pin_is_refused_in_one_clear_line() {
        let pin = stock::identity().pin().unwrap();
        let mut wrong = pin;
        wrong[31] ^= 1;
        let config = certificate::client_config(Trust::Pin(wrong), Cipher::Auto).unwrap();
        let (error, heard) = refusal(config, stock::NAME, serve(stock::identity()));
        let TlsError::PinMismatch(mismatch) = &error else {
            panic!("{error:?}")
        };
        assert_eq!((mismatch.expected, mismatch.presented), (wrong, pin));
        let line = error.to_string();
        assert!(
            line.starts_with("the server's key is not the one pinned in the invite: "),
            "{line}"
        );
        assert!(!line.contains('\n'));
        assert!(matches!(heard, rustls::Error::AlertReceived(_)));
    }

    #[test]
    fn a_pinned_server_is_taken_whatever_its_name_and_dates() {
        for identity in [
            valid_between(2001, 2002),
            valid_between(2090, 2091),
            stock::identity(),
        ] {
            let config =
                certificate::client_config(Trust::Pin(identity.pin().unwrap()), Cipher::Auto)
                    .unwrap();
            for name in ["www.example.org", "192.0.2.1", "2001:db8::1"] {
                let name = ServerName::try_from(name).unwrap();
                let ours = TlsStream::client(config.clone(), name).unwrap();
                let server = Identity {
                    chain: identity.chain.clone(),
                    key: identity.key.clone_key(),
                };
                let mut pair = Pair {
                    ours,
                    stock: serve(server),
                };
                pair.settle(&mut Chunks::whole()).unwrap();
                pair.ours.into_records().unwrap();
            }
        }
    }

    /// Presents one server's certificate and signs with another key.
    #[derive(Debug)]
    struct Impostor(Arc<CertifiedKey>);

    impl ResolvesServerCert for Impostor {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            Some(self.0.clone())
        }
    }

    #[test]
    fn a_copied_certificate_without_its_key_is_refused() {
        let own = valid_between(2020, 2090);
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&own.key).unwrap();
        let copied = stock::identity();
        let trusts = [
            certificate::client_config(Trust::Pin(copied.pin().unwrap()), Cipher::Auto).unwrap(),
            certificate::client_config_for_roots(roots_of(&copied), SUITES.to_vec()).unwrap(),
        ];
        for trust in trusts {
            let impostor = Impostor(Arc::new(CertifiedKey::new(
                copied.chain.clone(),
                key.clone(),
            )));
            let mut config = Arc::unwrap_or_clone(stock::server_config());
            config.cert_resolver = Arc::new(impostor);
            let server = Connection::Server(ServerConnection::new(Arc::new(config)).unwrap());
            let (error, heard) = refusal(trust, stock::NAME, server);
            assert!(matches!(error, TlsError::BadSignature), "{error:?}");
            assert!(matches!(heard, rustls::Error::AlertReceived(_)));
        }
    }

    #[test]
    fn without_a_pin_authority_name_and_dates_count() {
        let good = valid_between(2020, 2090);
        let config =
            certificate::client_config_for_roots(roots_of(&good), SUITES.to_vec()).unwrap();
        let ours = TlsStream::client(config.clone(), stock::name()).unwrap();
        let mut pair = Pair {
            ours,
            stock: serve(Identity {
                chain: good.chain.clone(),
                key: good.key.clone_key(),
            }),
        };
        pair.settle(&mut Chunks::whole()).unwrap();
        pair.ours.into_records().unwrap();

        let (error, _) = refusal(config.clone(), "www.example.org", serve(good));
        assert!(
            matches!(&error, TlsError::WrongName(name) if name == "www.example.org"),
            "{error:?}"
        );
        let (error, _) = refusal(config, stock::NAME, serve(stock::identity()));
        assert!(matches!(error, TlsError::UnknownIssuer), "{error:?}");
        let old = valid_between(2001, 2002);
        let config = certificate::client_config_for_roots(roots_of(&old), SUITES.to_vec()).unwrap();
        let (error, _) = refusal(config, stock::NAME, serve(old));
        assert!(matches!(error, TlsError::Expired), "{error:?}");
        let new = valid_between(2090, 2091);
        let config = certificate::client_config_for_roots(roots_of(&new), SUITES.to_vec()).unwrap();
        let (error, _) = refusal(config, stock::NAME, serve(new));
        assert!(matches!(error, TlsError::NotYetValid), "{error:?}");
    }

    /// A plaintext handshake record of one message.
    fn hello(kind: u8, body: &[u8]) -> Vec<u8> {
        let message = [&[kind], &(body.len() as u32).to_be_bytes()[1..], body].concat();
        [
            &[22, 3, 1],
            &(message.len() as u16).to_be_bytes()[..],
            &message,
        ]
        .concat()
    }

    #[test]
    fn a_client_of_tls_1_2_is_refused() {
        let mut body = vec![3, 3];
        body.extend([0x42; 32]);
        body.push(0);
        body.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2f]);
        body.extend([1, 0]);
        // Groups, signature algorithms, extended master secret; no supported_versions.
        let extensions = [
            0, 10, 0, 4, 0, 2, 0, 29, 0, 13, 0, 6, 0, 4, 4, 3, 8, 4, 0, 23, 0, 0,
        ];
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut server = TlsStream::server(stock::server_config()).unwrap();
        let error = server.feed(&hello(1, &body)).unwrap_err();
        assert!(matches!(error, TlsError::NotTls13), "{error:?}");
        assert_eq!(server.take_outgoing(), [21, 3, 3, 0, 2, 2, 70]);
    }

    #[test]
    fn a_server_of_tls_1_2_is_refused() {
        let mut body = vec![3, 3];
        body.extend([0x42; 32]);
        body.push(0);
        body.extend([0xc0, 0x2b, 0]);
        let mut client = TlsStream::client(stock::pinned(), stock::name()).unwrap();
        client.take_outgoing();
        let error = client.feed(&hello(2, &body)).unwrap_err();
        assert!(matches!(error, TlsError::NotTls13), "{error:?}");
        assert_eq!(client.take_outgoing(), [21, 3, 3, 0, 2, 2, 70]);

        let mut client = TlsStream::client(stock::pinned(), stock::name()).unwrap();
        let error = client.feed(&[21, 3, 1, 0, 2, 2, 70]).unwrap_err();
        assert!(matches!(error, TlsError::NotTls13), "{error:?}");
    }

    #[test]
    fn what_is_not_tls_is_refused_by_its_first_bytes() {
        for garbage in [
            &b"GET / HTTP/1.1"[..],
            b"SSH-2.0-x",
            &[0; 5],
            &[22, 0x7f, 1, 0, 4],
        ] {
            let mut server = TlsStream::server(stock::server_config()).unwrap();
            server.feed(&garbage[..4]).unwrap();
            let error = server.feed(&garbage[4..]).unwrap_err();
            assert!(matches!(error, TlsError::NotTls), "{error:?}");
            let mut client = TlsStream::client(stock::pinned(), stock::name()).unwrap();
            assert!(matches!(client.feed(garbage), Err(TlsError::NotTls)));
        }
        let mut server = TlsStream::server(stock::server_config()).unwrap();
        assert!(server.feed(&[22, 3, 1, 0xff, 0xff]).is_err());
    }

    /// One end in [`streams_agree`]: what it was told to send, and what the other has received of it.
    #[derive(Default)]
    struct Flow {
        sent: Vec<u8>,
        received: Vec<u8>,
        in_flight: Vec<u8>,
    }

    #[derive(Clone, Debug)]
    enum Step {
        OursSends(usize),
        StockSends(usize),
        OursUpdatesKey { request_peer: bool },
        StockUpdatesKey,
        Carry,
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = prop_oneof![0usize..100, 16_380usize..16_390, 1usize..60_000];
        prop_oneof![
            3 => bytes.clone().prop_map(Step::OursSends),
            3 => bytes.prop_map(Step::StockSends),
            1 => any::<bool>().prop_map(|request_peer| Step::OursUpdatesKey { request_peer }),
            1 => Just(Step::StockUpdatesKey),
            3 => Just(Step::Carry),
        ]
    }

    /// What a worker does with the stream that it reads: open, handle, answer key updates.
    fn receive(
        records: &mut RecordLayer,
        stream: &mut Vec<u8>,
        plaintext: &mut Vec<u8>,
        to_peer: &mut Vec<u8>,
    ) {
        while let Some((bytes, signal)) = open_first(records, stream, plaintext).unwrap() {
            stream.drain(..bytes);
            assert_ne!(signal, Signal::CloseNotify);
            assert!(signal != Signal::ReplyKeyUpdate || records.wants_key_update());
        }
        if records.wants_key_update() {
            append(to_peer, CONTROL_RECORD_BYTES_MAX, |out| {
                records.key_update(false, out)
            })
            .unwrap();
        }
    }

    /// Both plaintext streams arrive whole through any steps, keys changing on both sides.
    fn streams_agree(
        side: Ours,
        suite: rustls::SupportedCipherSuite,
        steps: Vec<Step>,
        mut chunks: Chunks,
    ) {
        let (Established { mut records, .. }, mut peer) = Pair::established(side, suite);
        let (mut out, mut back) = (Flow::default(), Flow::default());
        let mut unopened = Vec::new();
        let mut carry =
            |records: &mut RecordLayer, peer: &mut Connection, out: &mut Flow, back: &mut Flow| {
                for chunk in chunks.cut(&std::mem::take(&mut back.in_flight)) {
                    unopened.extend_from_slice(chunk);
                    receive(
                        records,
                        &mut unopened,
                        &mut back.received,
                        &mut out.in_flight,
                    );
                }
                for chunk in chunks.cut(&std::mem::take(&mut out.in_flight)) {
                    out.received.extend(stock::give(peer, chunk).unwrap());
                }
                back.in_flight.extend(stock::take(peer));
            };
        for step in steps {
            match step {
                Step::OursSends(bytes) => {
                    let plaintext = pattern(bytes);
                    for part in plaintext.chunks(RECORD_PLAINTEXT_BYTES_MAX) {
                        append(&mut out.in_flight, sealed_bytes(part.len()), |record| {
                            records.seal(ContentType::ApplicationData, part, record)
                        })
                        .unwrap();
                    }
                    out.sent.extend(plaintext);
                }
                Step::StockSends(bytes) => {
                    let plaintext = pattern(bytes);
                    back.in_flight.extend(stock::write(&mut peer, &plaintext));
                    back.sent.extend(plaintext);
                }
                Step::OursUpdatesKey { request_peer } => {
                    append(&mut out.in_flight, CONTROL_RECORD_BYTES_MAX, |record| {
                        records.key_update(request_peer, record)
                    })
                    .unwrap();
                }
                Step::StockUpdatesKey => {
                    peer.refresh_traffic_keys().unwrap();
                    back.in_flight.extend(stock::take(&mut peer));
                }
                Step::Carry => carry(&mut records, &mut peer, &mut out, &mut back),
            }
        }
        for _ in 0..3 {
            carry(&mut records, &mut peer, &mut out, &mut back);
        }
        assert!(out.in_flight.is_empty() && back.in_flight.is_empty() && unopened.is_empty());
        assert!(out.sent == out.received, "what we sent");
        assert!(back.sent == back.received, "what we received");
    }

    fn any_chunks() -> impl Strategy<Value = Chunks> {
        proptest::collection::vec(prop_oneof![1usize..40, 1usize..40_000], 1..8)
            .prop_map(Chunks::new)
    }

    impl std::fmt::Debug for Chunks {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Chunks")
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn streams_agree_with_stock_rustls_while_keys_change(
            side in proptest::sample::select(&SIDES[..]),
            suite in proptest::sample::select(&SUITES[..]),
            steps in proptest::collection::vec(step(), 1..24),
            chunks in any_chunks(),
        ) {
            streams_agree(side, suite, steps, chunks);
        }

        #[test]
        fn a_handshake_in_any_pieces_completes_and_carries_data(
            side in proptest::sample::select(&SIDES[..]),
            suite in proptest::sample::select(&SUITES[..]),
            mut chunks in any_chunks(),
            bytes in 0usize..40_000,
            refresh in any::<bool>(),
            fragment_bytes in proptest::option::of(32usize..1000),
        ) {
            let mut pair = Pair::fragmented(side, suite, fragment_bytes);
            pair.settle(&mut chunks).unwrap();
            prop_assert!(!pair.ours.is_handshaking());
            let plaintext = pattern(bytes);
            pair.ours.write(&plaintext).unwrap();
            pair.stock.set_buffer_limit(None);
            if refresh {
                pair.stock.refresh_traffic_keys().unwrap();
            }
            pair.stock.writer().write_all(&plaintext).unwrap();
            prop_assert!(pair.settle(&mut chunks).unwrap() == plaintext);
            prop_assert!(*pair.ours.plaintext() == plaintext);
            let Established { ciphertext, .. } = pair.ours.into_records().unwrap();
            prop_assert!(ciphertext.is_empty());
        }

        #[test]
        fn no_bytes_make_a_handshake_panic(
            side in proptest::sample::select(&SIDES[..]),
            garbage in proptest::collection::vec(any::<u8>(), 0..600),
            kind in 20u8..24,
            lawful_header in any::<bool>(),
            mut chunks in any_chunks(),
        ) {
            let mut stream = Pair::new(side, SUITES[0]).ours;
            let mut bytes = garbage;
            if lawful_header && bytes.len() >= RECORD_HEADER_BYTES {
                let length = bytes.len() - RECORD_HEADER_BYTES;
                bytes[..RECORD_HEADER_BYTES].copy_from_slice(&[kind, 3, 3, (length >> 8) as u8, length as u8]);
            }
            for chunk in chunks.cut(&bytes) {
                let _ = stream.feed(chunk);
            }
            prop_assert!(stream.into_records().is_err());
        }

        #[test]
        fn an_altered_handshake_does_not_panic_and_never_yields_keys_that_differ(
            side in proptest::sample::select(&SIDES[..]),
            flight in 0usize..3,
            place in any::<proptest::sample::Index>(),
            flip in 1u8..,
            drop in any::<bool>(),
            mut chunks in any_chunks(),
        ) {
            let mut pair = Pair::new(side, SUITES[0]);
            for turn in 0..3 {
                if stock::give(&mut pair.stock, &pair.ours.take_outgoing()).is_err() {
                    break;
                }
                let mut sent = stock::take(&mut pair.stock);
                if turn == flight && !sent.is_empty() {
                    let place = place.index(sent.len());
                    if drop { sent.truncate(place); } else { sent[place] ^= flip; }
                }
                for chunk in chunks.cut(&sent) {
                    if pair.ours.feed(chunk).is_err() {
                        break;
                    }
                }
            }
            if !pair.ours.is_handshaking() && pair.ours.write(b"probe").is_ok() && !pair.stock.is_handshaking() {
                let sent = pair.ours.take_outgoing();
                prop_assert_eq!(stock::give(&mut pair.stock, &sent).unwrap(), b"probe");
            }
        }
    }
}
