//! The TLS 1.3 record layer (RFC 8446 section 5) after the handshake: one pass over the bytes, buffer to buffer,
//! no allocation.
//!
//! The way of a record out: [`RecordLayer::seal`] writes header, ciphertext and tag. The way in: [`record_bytes`]
//! finds its end in the stream, [`RecordLayer::open`] decrypts it, [`RecordLayer::handle`] takes what is not
//! application data. Keys change by [`RecordLayer::key_update`]; rustls derives them and keeps the tickets.

use aws_lc_rs::aead;
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets};

/// The most plaintext that a record carries.
pub const RECORD_PLAINTEXT_BYTES_MAX: usize = 16_384;
/// The header in front of a record.
pub const RECORD_HEADER_BYTES: usize = 5;
/// The authentication tag at a record's end, the same for all three cipher suites.
pub const RECORD_TAG_BYTES: usize = 16;
/// What a record is longer than its plaintext: header, content type, tag.
pub const RECORD_OVERHEAD_BYTES: usize = RECORD_HEADER_BYTES + 1 + RECORD_TAG_BYTES;
/// The longest record: padding takes room from the plaintext (RFC 8446 section 5.4).
pub const RECORD_BYTES_MAX: usize = RECORD_PLAINTEXT_BYTES_MAX + RECORD_OVERHEAD_BYTES;
/// What [`RecordLayer::key_update`], [`RecordLayer::close_notify`] and [`RecordLayer::fatal_alert`] need at most.
pub const CONTROL_RECORD_BYTES_MAX: usize = KEY_UPDATE_BYTES + RECORD_OVERHEAD_BYTES;
/// After so many records sent under one key a new key is wanted.
pub const KEY_UPDATE_RECORDS: u64 = 1 << 23;
/// No more than so many records are sent under one key: 2^24.5, AES-GCM's limit (RFC 8446 section 5.5).
pub const RECORDS_PER_KEY_MAX: u64 = 23_726_566;
/// The longest handshake message taken after the handshake; only tickets come near it.
pub const HANDSHAKE_BYTES_MAX: usize = 16_384;

/// So many records without application data are taken in a row: key updates, tickets, warnings,
/// empty records. The handshake messages after the first in a record count like records.
pub const RECORDS_WITHOUT_DATA_MAX: usize = 32;
/// So much application data lets the peer send one more record without.
///
/// A key update costs its receiver some 3 us, for 27 bytes. No implementation sends them, or empty
/// records, at such a rate for a reason.
pub const DATA_BYTES_PER_RECORD_WITHOUT: usize = 1024;

const _: () = assert!(KEY_UPDATE_RECORDS < RECORDS_PER_KEY_MAX / 2);

/// What [`RECORDS_WITHOUT_DATA_MAX`] records without data use up.
const DATA_CREDIT_BYTES_MAX: usize = RECORDS_WITHOUT_DATA_MAX * DATA_BYTES_PER_RECORD_WITHOUT;

const RECORD_BYTES_MIN: usize = RECORD_OVERHEAD_BYTES;
const HANDSHAKE_HEADER_BYTES: usize = 4;
const KEY_UPDATE_BYTES: usize = HANDSHAKE_HEADER_BYTES + 1;
const NONCE_BYTES: usize = 12;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const ALERT_WARNING: u8 = 1;
const ALERT_FATAL: u8 = 2;

/// What a record carries (RFC 8446 section 5.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum ContentType {
    /// The end of the connection, in order or in error.
    Alert = 21,
    /// Tickets and key updates.
    Handshake = 22,
    /// The plaintext stream.
    ApplicationData = 23,
}

/// What [`RecordLayer::open`] found in a record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Opened {
    /// Where the content belongs: all but application data goes to [`RecordLayer::handle`].
    pub content_type: ContentType,
    /// So many bytes at the front of the caller's buffer are content; what follows them there means nothing.
    pub bytes: usize,
}

/// What the caller has to do after [`RecordLayer::handle`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Signal {
    /// Nothing.
    None,
    /// The peer sends nothing more, in order.
    CloseNotify,
    /// The peer asks for our new key: call [`RecordLayer::key_update`] before more is sealed. Until then
    /// [`RecordLayer::wants_key_update`] says so too.
    ReplyKeyUpdate,
}

/// Why a record could not be made or taken. Every error ends the connection.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Peer: the stream goes on with something that is not a protected TLS 1.3 record.
    #[error("the peer sent a record that is not protected (type {0})")]
    Unprotected(u8),
    /// Peer: the header says more than a record may have.
    #[error("the peer sent a record of {0} bytes, which is too long")]
    TooLong(usize),
    /// Peer: the header says less than a record must have.
    #[error("the peer sent a record of {0} bytes, which is too short")]
    TooShort(usize),
    /// Peer or path: the tag is wrong.
    #[error("a record was altered on its way")]
    Altered,
    /// Peer: no content type, or one that has no place here.
    #[error("the peer sent a record of an unexpected kind ({0})")]
    UnexpectedContent(u8),
    /// Peer: an alert or handshake record without content.
    #[error("the peer sent an empty alert or handshake record")]
    Empty,
    /// Peer: another record inside a handshake message.
    #[error("the peer interleaved a handshake message with another record")]
    Interleaved,
    /// Peer: more than [`RECORDS_WITHOUT_DATA_MAX`] records without application data.
    #[error("the peer sent too many records without data")]
    TooManyWithoutData,
    /// Peer: a handshake message that has no place after the handshake.
    #[error("the peer sent an unexpected handshake message ({0})")]
    UnexpectedHandshake(u8),
    /// Peer: a handshake message above [`HANDSHAKE_BYTES_MAX`].
    #[error("the peer sent a handshake message of {0} bytes, which is too long")]
    HandshakeTooLong(usize),
    /// Peer: a key update that is not one byte of 0 or 1.
    #[error("the peer sent a malformed key update")]
    MalformedKeyUpdate,
    /// Peer: something follows a key update in its record, under the wrong key.
    #[error("the peer's key update does not end its record")]
    KeyUpdateNotAtEnd,
    /// Peer: an alert that is not two bytes.
    #[error("the peer sent a malformed alert")]
    MalformedAlert,
    /// Peer: a session ticket that rustls does not take.
    #[error("the peer sent a malformed session ticket")]
    MalformedTicket(#[source] rustls::Error),
    /// Peer: it ended the connection and says why.
    #[error("the peer ended the connection: {0:?}")]
    PeerAlert(AlertDescription),
    /// Caller: more than [`RECORD_PLAINTEXT_BYTES_MAX`] to seal.
    #[error("{0} bytes do not fit in a record")]
    PlaintextTooLong(usize),
    /// Caller: the output buffer is shorter than this.
    #[error("the buffer is too small: {0} bytes are needed")]
    BufferTooSmall(usize),
    /// Caller: the slice to open is not exactly one record.
    #[error("the slice is not one whole record")]
    NotOneRecord,
    /// Caller: a key came to its limit, because no key update was made when wanted.
    #[error("a key has been used for too many records")]
    KeyExhausted,
    /// The cryptographic library refused to seal, or to take or derive a key.
    #[error("the cryptographic library failed")]
    Crypto,
    /// rustls did not give the next key.
    #[error("no next key")]
    NoNextKey(#[source] rustls::Error),
}

impl RecordError {
    /// The alert that tells the peer, where it is the peer's fault.
    pub fn alert(&self) -> Option<AlertDescription> {
        Some(match self {
            Self::Unprotected(_)
            | Self::UnexpectedContent(_)
            | Self::Empty
            | Self::Interleaved
            | Self::TooManyWithoutData
            | Self::UnexpectedHandshake(_)
            | Self::KeyUpdateNotAtEnd => AlertDescription::UnexpectedMessage,
            Self::TooLong(_) => AlertDescription::RecordOverflow,
            Self::TooShort(_) | Self::Altered => AlertDescription::BadRecordMac,
            Self::HandshakeTooLong(_) | Self::MalformedAlert | Self::MalformedTicket(_) => {
                AlertDescription::DecodeError
            }
            Self::MalformedKeyUpdate => AlertDescription::IllegalParameter,
            Self::PeerAlert(_) => return None,
            Self::PlaintextTooLong(_)
            | Self::BufferTooSmall(_)
            | Self::NotOneRecord
            | Self::KeyExhausted
            | Self::Crypto
            | Self::NoNextKey(_) => AlertDescription::InternalError,
        })
    }
}

/// The length of the whole record at the front of `stream`, header included; `None` while its header is not there.
///
/// # Errors
/// What stands there is no protected record, or none of a lawful length.
#[inline]
pub fn record_bytes(stream: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[kind, _, _, high, low]) = stream.first_chunk::<RECORD_HEADER_BYTES>() else {
        return Ok(None);
    };
    if kind != ContentType::ApplicationData as u8 {
        return Err(RecordError::Unprotected(kind));
    }
    let bytes = RECORD_HEADER_BYTES + usize::from(u16::from_be_bytes([high, low]));
    if bytes > RECORD_BYTES_MAX {
        return Err(RecordError::TooLong(bytes));
    }
    if bytes < RECORD_BYTES_MIN {
        return Err(RecordError::TooShort(bytes));
    }
    Ok(Some(bytes))
}

/// The length of the record that [`RecordLayer::seal`] makes of so much plaintext.
#[inline]
pub const fn sealed_bytes(plaintext_bytes: usize) -> usize {
    plaintext_bytes + RECORD_OVERHEAD_BYTES
}

/// Seals what we send and opens what the peer sends, on one connection after its handshake.
pub struct RecordLayer {
    sending: TrafficKey,
    receiving: TrafficKey,
    secrets: KernelSecrets,
    /// The front of a handshake message whose rest is in records to come.
    handshake: Vec<u8>,
    /// The peer has asked for our next key and has not got it.
    reply_owed: bool,
    /// What the peer may still send without application data, in bytes of data: each record without
    /// takes [`DATA_BYTES_PER_RECORD_WITHOUT`], data gives back its own length.
    data_credit_bytes: usize,
}

/// A whole handshake message.
struct Handshake<'b> {
    kind: u8,
    /// Without its header.
    message: &'b [u8],
    /// The bytes behind it.
    rest: &'b [u8],
}

/// rustls' half of the connection: the key schedule, and the tickets on the client's side.
pub(super) enum KernelSecrets {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl RecordLayer {
    /// Takes over where rustls stopped: both keys, and both sequence numbers, which may be past 0.
    pub(super) fn new(
        extracted: ExtractedSecrets,
        secrets: KernelSecrets,
    ) -> Result<Self, RecordError> {
        Ok(Self {
            sending: TrafficKey::new(extracted.tx)?,
            receiving: TrafficKey::new(extracted.rx)?,
            secrets,
            handshake: Vec::new(),
            reply_owed: false,
            data_credit_bytes: DATA_CREDIT_BYTES_MAX,
        })
    }

    /// Makes one record of `plaintext` at the front of `out` and returns its length ([`sealed_bytes`]).
    ///
    /// # Errors
    /// The plaintext is too long, `out` too short, or the key came to its limit.
    #[inline]
    pub fn seal(
        &mut self,
        content_type: ContentType,
        plaintext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        self.sending.seal(content_type, plaintext, out)
    }

    /// Decrypts `record`, which is exactly one record, to the front of `out`, and strips its padding.
    ///
    /// `out` has room for the record without header and tag (`record.len() - 21`), one byte more than its content.
    ///
    /// # Errors
    /// The record is not authentic or not lawful, or one too many without data: the connection is at its end.
    #[inline]
    pub fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<Opened, RecordError> {
        if record_bytes(record)? != Some(record.len()) {
            return Err(RecordError::NotOneRecord);
        }
        let opened = self.receiving.open(record, out)?;
        if !self.handshake.is_empty() && opened.content_type != ContentType::Handshake {
            return Err(RecordError::Interleaved);
        }
        match opened.content_type {
            ContentType::ApplicationData if opened.bytes > 0 => {
                let credit_bytes = self.data_credit_bytes + opened.bytes;
                self.data_credit_bytes = credit_bytes.min(DATA_CREDIT_BYTES_MAX);
            }
            ContentType::ApplicationData | ContentType::Handshake => self.take_credit()?,
            // Nearly all of them are the last record: `handle` counts the others.
            ContentType::Alert => {}
        }
        Ok(opened)
    }

    /// Counts a record or a handshake message that brings no application data.
    fn take_credit(&mut self) -> Result<(), RecordError> {
        let left = self
            .data_credit_bytes
            .checked_sub(DATA_BYTES_PER_RECORD_WITHOUT);
        self.data_credit_bytes = left.ok_or(RecordError::TooManyWithoutData)?;
        Ok(())
    }

    /// Takes the content of an alert or handshake record; application data is left to the caller.
    ///
    /// # Errors
    /// The peer's alert, or an alert or message that has no place here: the connection is at its end.
    pub fn handle(
        &mut self,
        content_type: ContentType,
        body: &[u8],
    ) -> Result<Signal, RecordError> {
        match content_type {
            ContentType::Alert => self.handle_alert(body),
            ContentType::Handshake => self.handle_handshake(body),
            ContentType::ApplicationData => Ok(Signal::None),
        }
    }

    /// It is time for [`RecordLayer::key_update`]: the peer has asked, or our key nears its limit.
    #[inline]
    pub fn wants_key_update(&self) -> bool {
        self.reply_owed || self.sending.records >= KEY_UPDATE_RECORDS
    }

    /// Makes a key update record under the old key, at the front of `out`, and seals with the new key from then on.
    /// `request_peer` asks the peer to change its key as well.
    ///
    /// # Errors
    /// `out` is shorter than [`CONTROL_RECORD_BYTES_MAX`], or no key could be made.
    pub fn key_update(&mut self, request_peer: bool, out: &mut [u8]) -> Result<usize, RecordError> {
        let update = [KEY_UPDATE, 0, 0, 1, u8::from(request_peer)];
        let bytes = self.sending.seal(ContentType::Handshake, &update, out)?;
        let next = match &mut self.secrets {
            KernelSecrets::Client(kernel) => kernel.update_tx_secret(),
            KernelSecrets::Server(kernel) => kernel.update_tx_secret(),
        };
        self.sending = TrafficKey::new(next.map_err(RecordError::NoNextKey)?)?;
        self.reply_owed = false;
        Ok(bytes)
    }

    /// Makes the record that ends our stream in order. Nothing is to be sealed after it.
    ///
    /// # Errors
    /// As [`RecordLayer::seal`].
    pub fn close_notify(&mut self, out: &mut [u8]) -> Result<usize, RecordError> {
        let alert = [ALERT_WARNING, u8::from(AlertDescription::CloseNotify)];
        self.seal(ContentType::Alert, &alert, out)
    }

    /// Makes the record that tells the peer why the connection is at its end ([`RecordError::alert`]).
    ///
    /// # Errors
    /// As [`RecordLayer::seal`].
    pub fn fatal_alert(
        &mut self,
        description: AlertDescription,
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let alert = [ALERT_FATAL, u8::from(description)];
        self.seal(ContentType::Alert, &alert, out)
    }

    fn handle_alert(&mut self, body: &[u8]) -> Result<Signal, RecordError> {
        let &[_level, description] = body else {
            return Err(RecordError::MalformedAlert);
        };
        // In TLS 1.3 the level says nothing: all but these two are fatal (RFC 8446 section 6).
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => Ok(Signal::CloseNotify),
            AlertDescription::UserCanceled => self.take_credit().map(|()| Signal::None),
            other => Err(RecordError::PeerAlert(other)),
        }
    }

    fn handle_handshake(&mut self, body: &[u8]) -> Result<Signal, RecordError> {
        if self.handshake.is_empty() {
            let (signal, rest) = self.take_handshakes(body)?;
            self.handshake.extend_from_slice(rest);
            return Ok(signal);
        }
        // One message is in at most RECORDS_WITHOUT_DATA_MAX records, so it is not copied more
        // often.
        let mut joined = std::mem::take(&mut self.handshake);
        joined.extend_from_slice(body);
        let (signal, rest) = self.take_handshakes(&joined)?;
        self.handshake.extend_from_slice(rest);
        Ok(signal)
    }

    /// Takes all whole messages at the front of `body` and returns what is behind them.
    fn take_handshakes<'b>(
        &mut self,
        mut body: &'b [u8],
    ) -> Result<(Signal, &'b [u8]), RecordError> {
        let mut signal = Signal::None;
        let mut is_first = true;
        while let Some(Handshake {
            kind,
            message,
            rest,
        }) = self.first_handshake(body)?
        {
            if !is_first {
                self.take_credit()?;
            }
            match kind {
                NEW_SESSION_TICKET => self.take_ticket(message)?,
                _ if !rest.is_empty() => return Err(RecordError::KeyUpdateNotAtEnd),
                _ => signal = self.take_key_update(message)?,
            }
            (body, is_first) = (rest, false);
        }
        Ok((signal, body))
    }

    /// The message at the front of `body`, once it is whole. What can never be taken is refused by
    /// its first bytes, so that nothing waits for the rest of it.
    fn first_handshake<'b>(&self, body: &'b [u8]) -> Result<Option<Handshake<'b>>, RecordError> {
        let Some(&kind) = body.first() else {
            return Ok(None);
        };
        let bytes_max = match (kind, &self.secrets) {
            (NEW_SESSION_TICKET, KernelSecrets::Client(_)) => HANDSHAKE_BYTES_MAX,
            (KEY_UPDATE, _) => KEY_UPDATE_BYTES - HANDSHAKE_HEADER_BYTES,
            _ => return Err(RecordError::UnexpectedHandshake(kind)),
        };
        let Some((&[_, a, b, c], rest)) = body.split_first_chunk::<HANDSHAKE_HEADER_BYTES>() else {
            return Ok(None);
        };
        let bytes = u32::from_be_bytes([0, a, b, c]) as usize;
        if bytes > bytes_max {
            return Err(RecordError::HandshakeTooLong(bytes));
        }
        let message = rest.split_at_checked(bytes);
        Ok(message.map(|(message, rest)| Handshake {
            kind,
            message,
            rest,
        }))
    }

    fn take_ticket(&mut self, message: &[u8]) -> Result<(), RecordError> {
        match &mut self.secrets {
            KernelSecrets::Client(kernel) => kernel
                .handle_new_session_ticket(message)
                .map_err(RecordError::MalformedTicket),
            KernelSecrets::Server(_) => Err(RecordError::UnexpectedHandshake(NEW_SESSION_TICKET)),
        }
    }

    fn take_key_update(&mut self, message: &[u8]) -> Result<Signal, RecordError> {
        let asked = match message {
            [0] => false,
            [1] => true,
            _ => return Err(RecordError::MalformedKeyUpdate),
        };
        let next = match &mut self.secrets {
            KernelSecrets::Client(kernel) => kernel.update_rx_secret(),
            KernelSecrets::Server(kernel) => kernel.update_rx_secret(),
        };
        self.receiving = TrafficKey::new(next.map_err(RecordError::NoNextKey)?)?;
        if !asked {
            return Ok(Signal::None);
        }
        self.reply_owed = true;
        Ok(Signal::ReplyKeyUpdate)
    }
}

impl std::fmt::Debug for RecordLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordLayer")
            .field("records_sent", &self.sending.records)
            .field("records_received", &self.receiving.records)
            .finish_non_exhaustive()
    }
}

/// One direction's key and how many records it has served: the sequence number of the next.
struct TrafficKey {
    key: aead::LessSafeKey,
    iv: [u8; NONCE_BYTES],
    records: u64,
}

impl TrafficKey {
    fn new((records, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&aead::CHACHA20_POLY1305, key, iv)
            }
            _ => return Err(RecordError::Crypto),
        };
        let key =
            aead::UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Crypto)?;
        Ok(Self {
            key: aead::LessSafeKey::new(key),
            iv: iv.as_ref().try_into().map_err(|_| RecordError::Crypto)?,
            records,
        })
    }

    #[inline]
    fn seal(
        &mut self,
        content_type: ContentType,
        plaintext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        if plaintext.len() > RECORD_PLAINTEXT_BYTES_MAX {
            return Err(RecordError::PlaintextTooLong(plaintext.len()));
        }
        if self.records >= RECORDS_PER_KEY_MAX {
            return Err(RecordError::KeyExhausted);
        }
        let bytes = sealed_bytes(plaintext.len());
        let (header, body) = out
            .get_mut(..bytes)
            .and_then(|record| record.split_first_chunk_mut::<RECORD_HEADER_BYTES>())
            .ok_or(RecordError::BufferTooSmall(bytes))?;
        // At most 16,401: fits in 16 bits.
        let [high, low] = (body.len() as u16).to_be_bytes();
        *header = [ContentType::ApplicationData as u8, 3, 3, high, low];
        let (ciphertext, type_and_tag) = body.split_at_mut(plaintext.len());
        let nonce = self.nonce();
        // Counted before the call, so that no failure can use a nonce twice.
        self.records += 1;
        self.key
            .seal_out_of_place_scatter(
                nonce,
                aead::Aad::from(&*header),
                plaintext,
                ciphertext,
                &[content_type as u8],
                type_and_tag,
            )
            .map_err(|_| RecordError::Crypto)?;
        Ok(bytes)
    }

    /// `record` has a lawful header and length.
    #[inline]
    fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<Opened, RecordError> {
        if self.records == u64::MAX {
            return Err(RecordError::KeyExhausted);
        }
        let (header, body) = record
            .split_first_chunk::<RECORD_HEADER_BYTES>()
            .ok_or(RecordError::NotOneRecord)?;
        let (ciphertext, tag) = body
            .split_last_chunk::<RECORD_TAG_BYTES>()
            .ok_or(RecordError::NotOneRecord)?;
        let inner = out
            .get_mut(..ciphertext.len())
            .ok_or(RecordError::BufferTooSmall(ciphertext.len()))?;
        self.key
            .open_separate_gather(
                self.nonce(),
                aead::Aad::from(header),
                ciphertext,
                tag,
                inner,
            )
            .map_err(|_| RecordError::Altered)?;
        self.records += 1;
        // The content type is the last byte that is not padding (RFC 8446 section 5.4).
        let (bytes, content_type) = inner
            .iter()
            .enumerate()
            .rfind(|(_, byte)| **byte != 0)
            .ok_or(RecordError::UnexpectedContent(0))?;
        let content_type = match *content_type {
            23 => ContentType::ApplicationData,
            _ if bytes == 0 => return Err(RecordError::Empty),
            22 => ContentType::Handshake,
            21 => ContentType::Alert,
            other => return Err(RecordError::UnexpectedContent(other)),
        };
        Ok(Opened {
            content_type,
            bytes,
        })
    }

    /// The initialisation vector xor the sequence number (RFC 8446 section 5.3).
    #[inline]
    fn nonce(&self) -> aead::Nonce {
        let mut nonce = self.iv;
        for (byte, sequence) in nonce[NONCE_BYTES - 8..]
            .iter_mut()
            .zip(self.records.to_be_bytes())
        {
            *byte ^= sequence;
        }
        aead::Nonce::assume_unique_for_key(nonce)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::handshake::{Established, TlsStream};
    use super::super::stock::{self, Ours, Pair, SUITES};
    use super::*;
    use crate::config::Cipher;

    /// Both ciphers that connections of ours may get.
    const CIPHERS: [Cipher; 2] = [Cipher::Aes128Gcm, Cipher::Chacha20Poly1305];

    /// Both ends ours, after the handshake and with nothing in flight.
    struct Ends {
        client: RecordLayer,
        server: RecordLayer,
    }

    fn ends() -> Ends {
        ends_with(Cipher::Auto)
    }

    fn ends_with(cipher: Cipher) -> Ends {
        let mut client = TlsStream::client(stock::pinned_with(cipher), stock::name()).unwrap();
        let mut server = TlsStream::server(stock::server_config()).unwrap();
        for _ in 0..3 {
            server.feed(&client.take_outgoing()).unwrap();
            client.feed(&server.take_outgoing()).unwrap();
        }
        let mut ends = Ends {
            client: client.into_records().unwrap().records,
            server: server.into_records().unwrap().records,
        };
        // As if no ticket had come with the handshake.
        ends.client.data_credit_bytes = DATA_CREDIT_BYTES_MAX;
        ends
    }

    /// A record of any inner plaintext, as only a strange peer makes it.
    fn craft(layer: &mut RecordLayer, inner: &[u8]) -> Vec<u8> {
        let key = &mut layer.sending;
        let bytes = inner.len() + RECORD_TAG_BYTES;
        let mut record = vec![23, 3, 3, (bytes >> 8) as u8, bytes as u8];
        record.resize(RECORD_HEADER_BYTES + bytes, 0);
        let (header, body) = record.split_at_mut(RECORD_HEADER_BYTES);
        key.key
            .seal_out_of_place_scatter(
                key.nonce(),
                aead::Aad::from(&*header),
                &[],
                &mut [],
                inner,
                body,
            )
            .unwrap();
        key.records += 1;
        record
    }

    fn seal(layer: &mut RecordLayer, content_type: ContentType, plaintext: &[u8]) -> Vec<u8> {
        let mut record = vec![0xee; sealed_bytes(plaintext.len())];
        assert_eq!(
            layer.seal(content_type, plaintext, &mut record).unwrap(),
            record.len()
        );
        record
    }

    fn open(layer: &mut RecordLayer, record: &[u8]) -> Result<(ContentType, Vec<u8>), RecordError> {
        let mut out = vec![
            0xee;
            record
                .len()
                .saturating_sub(RECORD_HEADER_BYTES + RECORD_TAG_BYTES)
        ];
        let opened = layer.open(record, &mut out)?;
        out.truncate(opened.bytes);
        Ok((opened.content_type, out))
    }

    fn receive(layer: &mut RecordLayer, record: &[u8]) -> Result<Signal, RecordError> {
        let (content_type, body) = open(layer, record)?;
        layer.handle(content_type, &body)
    }

    fn key_update(layer: &mut RecordLayer, request_peer: bool) -> Vec<u8> {
        let mut out = vec![0; CONTROL_RECORD_BYTES_MAX];
        let bytes = layer.key_update(request_peer, &mut out).unwrap();
        out.truncate(bytes);
        out
    }

    fn ticket(ticket_bytes: usize) -> Vec<u8> {
        let mut body = vec![0, 0, 14, 16, 1, 2, 3, 4, 1, 0];
        body.extend((ticket_bytes as u16).to_be_bytes());
        body.extend(vec![0x55; ticket_bytes]);
        body.extend([0, 0]);
        let mut message = vec![NEW_SESSION_TICKET];
        message.extend(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend(body);
        message
    }

    /// Data still passes from `from` to `to`.
    fn assert_in_step(from: &mut RecordLayer, to: &mut RecordLayer) {
        let record = seal(from, ContentType::ApplicationData, b"in step");
        let opened = open(to, &record).unwrap();
        assert_eq!(opened, (ContentType::ApplicationData, b"in step".to_vec()));
    }

    #[test]
    fn a_record_layer_moves_between_threads() {
        fn assert_send<T: Send>() {}
        assert_send::<RecordLayer>();
        assert_send::<Established>();
    }

    #[test]
    fn the_length_is_read_from_whole_headers_only() {
        let record = seal(&mut ends().client, ContentType::ApplicationData, b"four");
        for cut in 0..RECORD_HEADER_BYTES {
            assert!(matches!(record_bytes(&record[..cut]), Ok(None)));
        }
        for cut in RECORD_HEADER_BYTES..=record.len() {
            assert!(matches!(record_bytes(&record[..cut]), Ok(Some(26))));
        }
    }

    #[test]
    fn unlawful_headers_are_refused() {
        for kind in (0..=255).filter(|&kind| kind != 23) {
            assert!(
                matches!(record_bytes(&[kind, 3, 3, 0, 30]), Err(RecordError::Unprotected(k)) if k == kind)
            );
        }
        assert!(matches!(
            record_bytes(&[23, 3, 3, 0, 16]),
            Err(RecordError::TooShort(21))
        ));
        assert!(matches!(record_bytes(&[23, 3, 3, 0, 17]), Ok(Some(22))));
        assert!(matches!(
            record_bytes(&[23, 3, 3, 0x40, 0x11]),
            Ok(Some(RECORD_BYTES_MAX))
        ));
        assert!(matches!(
            record_bytes(&[23, 3, 3, 0x40, 0x12]),
            Err(RecordError::TooLong(16_407))
        ));
        assert!(matches!(
            record_bytes(&[23, 3, 3, 0xff, 0xff]),
            Err(RecordError::TooLong(_))
        ));
    }

    #[test]
    fn only_one_whole_record_is_opened() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let mut record = seal(&mut client, ContentType::ApplicationData, b"whole");
        for cut in 0..record.len() {
            assert!(matches!(
                open(&mut server, &record[..cut]),
                Err(RecordError::NotOneRecord)
            ));
        }
        record.push(0);
        assert!(matches!(
            open(&mut server, &record),
            Err(RecordError::NotOneRecord)
        ));
        record.pop();
        assert_eq!(open(&mut server, &record).unwrap().1, b"whole");
    }

    #[test]
    fn buffers_of_the_wrong_size_are_refused_and_cost_no_sequence_number() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let mut out = vec![0; RECORD_BYTES_MAX + 1];
        let data = ContentType::ApplicationData;
        assert!(matches!(
            client.seal(data, b"12345", &mut out[..26]),
            Err(RecordError::BufferTooSmall(27))
        ));
        let long = vec![0; RECORD_PLAINTEXT_BYTES_MAX + 1];
        assert!(matches!(
            client.seal(data, &long, &mut out),
            Err(RecordError::PlaintextTooLong(_))
        ));
        let record = seal(&mut client, data, b"12345");
        assert!(matches!(
            server.open(&record, &mut out[..5]),
            Err(RecordError::BufferTooSmall(6))
        ));
        assert_eq!(server.open(&record, &mut out[..6]).unwrap().bytes, 5);
    }

    #[test]
    fn a_record_is_taken_once_and_in_order() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let first = seal(&mut client, ContentType::ApplicationData, b"first");
        let second = seal(&mut client, ContentType::ApplicationData, b"second");
        assert!(matches!(
            open(&mut server, &second),
            Err(RecordError::Altered)
        ));
        assert_eq!(open(&mut server, &first).unwrap().1, b"first");
        assert!(matches!(
            open(&mut server, &first),
            Err(RecordError::Altered)
        ));
        assert_eq!(open(&mut server, &second).unwrap().1, b"second");
    }

    #[test]
    fn the_two_directions_have_different_keys() {
        let Ends { mut client, .. } = ends();
        let own = seal(&mut client, ContentType::ApplicationData, b"mirror");
        assert!(matches!(open(&mut client, &own), Err(RecordError::Altered)));
    }

    #[test]
    fn an_empty_record_is_data_or_an_error() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let empty = seal(&mut client, ContentType::ApplicationData, b"");
        assert_eq!(
            open(&mut server, &empty).unwrap(),
            (ContentType::ApplicationData, vec![])
        );
        let padded = craft(&mut client, &[23, 0, 0, 0]);
        assert_eq!(
            open(&mut server, &padded).unwrap(),
            (ContentType::ApplicationData, vec![])
        );
        for inner in [&[21][..], &[22], &[21, 0, 0], &[22, 0]] {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let record = craft(&mut client, inner);
            assert!(
                matches!(open(&mut server, &record), Err(RecordError::Empty)),
                "{inner:?}"
            );
        }
    }

    #[test]
    fn a_record_without_a_known_content_type_is_refused() {
        for inner in [&[0][..], &[0; 100], &[1, 2, 20], &[1, 24, 0], &[0xff]] {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let record = craft(&mut client, inner);
            let error = open(&mut server, &record).unwrap_err();
            assert!(
                matches!(
                    error,
                    RecordError::UnexpectedContent(_) | RecordError::Empty
                ),
                "{error:?}"
            );
            assert_eq!(error.alert(), Some(AlertDescription::UnexpectedMessage));
        }
    }

    #[test]
    fn a_record_may_be_padded_to_its_full_length() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let mut inner = b"short\x17".to_vec();
        inner.resize(RECORD_PLAINTEXT_BYTES_MAX + 1, 0);
        let record = craft(&mut client, &inner);
        assert_eq!(record.len(), RECORD_BYTES_MAX);
        assert_eq!(open(&mut server, &record).unwrap().1, b"short");
        inner.push(0);
        let record = craft(&mut client, &inner);
        assert!(matches!(
            open(&mut server, &record),
            Err(RecordError::TooLong(_))
        ));
    }

    #[test]
    fn a_new_key_is_wanted_long_before_the_old_one_is_used_up() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        assert!(!client.wants_key_update());
        client.sending.records = KEY_UPDATE_RECORDS - 1;
        server.receiving.records = KEY_UPDATE_RECORDS - 1;
        assert!(!client.wants_key_update());
        assert_in_step(&mut client, &mut server);
        assert!(client.wants_key_update());
        let update = key_update(&mut client, false);
        assert!(!client.wants_key_update());
        assert_eq!(client.sending.records, 0);
        assert_eq!(receive(&mut server, &update).unwrap(), Signal::None);
        assert_in_step(&mut client, &mut server);
    }

    #[test]
    fn a_used_up_key_seals_and_opens_no_more() {
        let Ends { mut client, .. } = ends();
        client.sending.records = RECORDS_PER_KEY_MAX - 1;
        let record = seal(&mut client, ContentType::ApplicationData, b"last");
        let mut out = [0; 64];
        for _ in 0..2 {
            let refused = client.seal(ContentType::ApplicationData, b"over", &mut out);
            assert!(matches!(refused, Err(RecordError::KeyExhausted)));
        }
        assert!(client.close_notify(&mut out).is_err());
        client.receiving.records = u64::MAX;
        assert!(matches!(
            open(&mut client, &record),
            Err(RecordError::KeyExhausted)
        ));
    }

    #[test]
    fn a_request_for_our_key_is_owed_until_it_is_answered() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let update = key_update(&mut client, true);
        assert_eq!(
            receive(&mut server, &update).unwrap(),
            Signal::ReplyKeyUpdate
        );
        assert!(server.wants_key_update());
        assert_in_step(&mut client, &mut server);
        assert_in_step(&mut server, &mut client);
        let reply = key_update(&mut server, false);
        assert!(!server.wants_key_update());
        assert_eq!(receive(&mut client, &reply).unwrap(), Signal::None);
        assert!(!client.wants_key_update());
        assert_in_step(&mut client, &mut server);
        assert_in_step(&mut server, &mut client);
    }

    #[test]
    fn a_key_update_is_sealed_under_the_old_key_only() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let _lost = key_update(&mut client, false);
        let next = seal(&mut client, ContentType::ApplicationData, b"new key");
        assert!(matches!(
            open(&mut server, &next),
            Err(RecordError::Altered)
        ));
    }

    #[test]
    fn a_key_update_ends_its_record() {
        for trailing in [&[0][..], &[24, 0, 0, 1, 0], &[4, 0]] {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let body = [&[24, 0, 0, 1, 0], trailing].concat();
            let record = seal(&mut server, ContentType::Handshake, &body);
            assert!(matches!(
                receive(&mut client, &record),
                Err(RecordError::KeyUpdateNotAtEnd)
            ));
        }
    }

    #[test]
    fn a_key_update_may_follow_tickets_in_one_record() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let body = [ticket(32), ticket(200), vec![24, 0, 0, 1, 1]].concat();
        let record = seal(&mut server, ContentType::Handshake, &body);
        assert_eq!(
            receive(&mut client, &record).unwrap(),
            Signal::ReplyKeyUpdate
        );
    }

    #[test]
    fn what_has_no_place_after_the_handshake_is_refused_at_its_first_byte() {
        for kind in (0..=255).filter(|kind| ![NEW_SESSION_TICKET, KEY_UPDATE].contains(kind)) {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let record = seal(&mut server, ContentType::Handshake, &[kind]);
            let refused = receive(&mut client, &record);
            assert!(matches!(refused, Err(RecordError::UnexpectedHandshake(k)) if k == kind));
        }
        let Ends {
            mut client,
            mut server,
        } = ends();
        let record = seal(&mut client, ContentType::Handshake, &[NEW_SESSION_TICKET]);
        assert!(matches!(
            receive(&mut server, &record),
            Err(RecordError::UnexpectedHandshake(4))
        ));
    }

    #[test]
    fn malformed_handshake_messages_are_refused() {
        type Check = fn(&RecordError) -> bool;
        let cases: [(&[u8], Check); 6] = [
            (&[24, 0, 0, 1, 2], |error| {
                matches!(error, RecordError::MalformedKeyUpdate)
            }),
            (&[24, 0, 0, 0], |error| {
                matches!(error, RecordError::MalformedKeyUpdate)
            }),
            (&[24, 0, 0, 2], |error| {
                matches!(error, RecordError::HandshakeTooLong(2))
            }),
            (&[4, 0, 0x40, 1], |error| {
                matches!(error, RecordError::HandshakeTooLong(16_385))
            }),
            (&[4, 0xff, 0xff, 0xff], |error| {
                matches!(error, RecordError::HandshakeTooLong(_))
            }),
            (&[4, 0, 0, 3, 1, 2, 3], |error| {
                matches!(error, RecordError::MalformedTicket(_))
            }),
        ];
        for (body, check) in cases {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let record = seal(&mut server, ContentType::Handshake, body);
            let error = receive(&mut client, &record).unwrap_err();
            assert!(check(&error), "{body:?}: {error:?}");
        }
    }

    #[test]
    fn no_other_record_comes_inside_a_handshake_message() {
        for content_type in [ContentType::ApplicationData, ContentType::Alert] {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let front = seal(&mut server, ContentType::Handshake, &[24, 0, 0]);
            assert_eq!(receive(&mut client, &front).unwrap(), Signal::None);
            let other = seal(&mut server, content_type, &[1, 0]);
            assert!(matches!(
                open(&mut client, &other),
                Err(RecordError::Interleaved)
            ));
        }
    }

    #[test]
    fn alerts_close_or_fail() {
        type Expected = Result<Signal, Option<AlertDescription>>;
        let cases: [(&[u8], Expected); 6] = [
            (&[1, 0], Ok(Signal::CloseNotify)),
            (&[2, 0], Ok(Signal::CloseNotify)),
            (&[1, 90], Ok(Signal::None)),
            (&[1, 40], Err(Some(AlertDescription::HandshakeFailure))),
            (&[2, 20, 0], Err(None)),
            (&[2], Err(None)),
        ];
        for (body, expected) in cases {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let record = seal(&mut server, ContentType::Alert, body);
            match (receive(&mut client, &record), expected) {
                (Ok(signal), Ok(expected)) => assert_eq!(signal, expected),
                (Err(RecordError::PeerAlert(alert)), Err(Some(expected))) => {
                    assert_eq!(alert, expected)
                }
                (Err(RecordError::MalformedAlert), Err(None)) => {}
                other => panic!("{body:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn stock_rustls_understands_our_alerts() {
        let (mut ours, mut peer) = Pair::established(Ours::Server, SUITES[0]);
        let mut out = [0; CONTROL_RECORD_BYTES_MAX];
        let bytes = ours.records.close_notify(&mut out).unwrap();
        peer.read_tls(&mut &out[..bytes]).unwrap();
        assert!(peer.process_new_packets().unwrap().peer_has_closed());

        let (mut ours, mut peer) = Pair::established(Ours::Client, SUITES[0]);
        let bytes = ours
            .records
            .fatal_alert(AlertDescription::BadRecordMac, &mut out)
            .unwrap();
        let refused = stock::give(&mut peer, &out[..bytes]);
        assert_eq!(
            refused,
            Err(rustls::Error::AlertReceived(AlertDescription::BadRecordMac))
        );
    }

    fn content_type() -> impl Strategy<Value = u8> {
        prop_oneof![8 => 21u8..=23, 1 => Just(0), 1 => Just(24), 1 => Just(255)]
    }

    /// Contents of records at their limits: empty, as long as may be, all bytes alike, messages
    /// that say to be of other lengths than they are, many of the shortest.
    fn body() -> impl Strategy<Value = Vec<u8>> {
        let lengths = [0, 1, 2, 3, 4, 5, 16_383, RECORD_PLAINTEXT_BYTES_MAX];
        let messages = proptest::sample::select(vec![
            ticket(1),
            ticket(16_000),
            vec![24, 0, 0, 1, 0],
            vec![24, 0, 0, 1, 1],
            vec![24, 0, 0, 1],
            vec![4, 0, 0, 0],
            vec![4, 0, 0x40, 0],
            vec![4, 0xff, 0xff, 0xff],
            vec![1, 0],
            vec![1, 90],
        ]);
        prop_oneof![
            proptest::collection::vec(0u8..30, 1..40),
            (
                proptest::sample::select(lengths.to_vec()),
                prop_oneof![Just(0u8), Just(4), Just(24), Just(0xff)],
            )
                .prop_map(|(bytes, byte)| vec![byte; bytes]),
            (messages, 1..40usize).prop_map(|(message, times)| {
                let mut body = message.repeat(times);
                body.truncate(RECORD_PLAINTEXT_BYTES_MAX);
                body
            }),
        ]
    }

    /// The records of `next` that are taken one after the other.
    fn taken(
        from: &mut RecordLayer,
        to: &mut RecordLayer,
        mut next: impl FnMut(&mut RecordLayer) -> Vec<u8>,
    ) -> usize {
        let error = (0..).find_map(|number| {
            let record = next(from);
            receive(to, &record).err().map(|error| (number, error))
        });
        let (taken, error) = error.expect("not for ever");
        assert!(matches!(error, RecordError::TooManyWithoutData), "{error}");
        assert_eq!(error.alert(), Some(AlertDescription::UnexpectedMessage));
        taken
    }

    #[test]
    fn records_without_data_have_a_bound() {
        type Next = fn(&mut RecordLayer) -> Vec<u8>;
        let kinds: [Next; 5] = [
            |from| key_update(from, false),
            |from| key_update(from, true),
            |from| seal(from, ContentType::Alert, &[1, 90]),
            |from| seal(from, ContentType::ApplicationData, b""),
            |from| craft(from, &[23, 0, 0, 0]),
        ];
        for next in kinds {
            let Ends {
                mut client,
                mut server,
            } = ends();
            assert_eq!(taken(&mut client, &mut server, next), 32);
        }
    }

    #[test]
    fn data_lets_more_records_without_data_in() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let data = |client: &mut RecordLayer, server: &mut RecordLayer, bytes: usize| {
            let record = seal(client, ContentType::ApplicationData, &vec![0; bytes]);
            assert_eq!(open(server, &record).unwrap().1.len(), bytes);
        };
        for _ in 0..100 {
            let update = key_update(&mut client, false);
            assert_eq!(receive(&mut server, &update).unwrap(), Signal::None);
            data(&mut client, &mut server, 1024);
        }
        for _ in 0..100 {
            data(&mut client, &mut server, RECORD_PLAINTEXT_BYTES_MAX);
        }
        for _ in 0..32 {
            let update = key_update(&mut client, false);
            assert_eq!(receive(&mut server, &update).unwrap(), Signal::None);
        }
        data(&mut client, &mut server, 3 * 1024 - 1);
        for _ in 0..2 {
            let update = key_update(&mut client, false);
            assert_eq!(receive(&mut server, &update).unwrap(), Signal::None);
        }
        let end = seal(&mut client, ContentType::Alert, &[1, 0]);
        assert_eq!(receive(&mut server, &end).unwrap(), Signal::CloseNotify);
        let update = key_update(&mut client, false);
        let refused = receive(&mut server, &update);
        assert!(matches!(refused, Err(RecordError::TooManyWithoutData)));
    }

    #[test]
    fn a_ticket_in_tiny_records_is_not_waited_for() {
        let Ends {
            mut client,
            mut server,
        } = ends();
        let mut bytes = ticket(5000).into_iter();
        let taken = taken(&mut server, &mut client, |server| {
            let byte = bytes.next().expect("a long ticket");
            seal(server, ContentType::Handshake, &[byte])
        });
        assert_eq!(taken, 32);
        assert_eq!(client.handshake.len(), 32);
    }

    #[test]
    fn many_tickets_in_one_record_count_like_many_records() {
        let joined = |count: usize| {
            let Ends {
                mut client,
                mut server,
            } = ends();
            let body = ticket(1).repeat(count);
            let record = seal(&mut server, ContentType::Handshake, &body);
            receive(&mut client, &record)
        };
        assert_eq!(joined(32).unwrap(), Signal::None);
        assert!(matches!(joined(33), Err(RecordError::TooManyWithoutData)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn records_of_any_length_arrive_and_keys_may_change_between_them(
            cipher in proptest::sample::select(&CIPHERS[..]),
            lengths in proptest::collection::vec(
                prop_oneof![0usize..200, Just(RECORD_PLAINTEXT_BYTES_MAX), 0..RECORD_PLAINTEXT_BYTES_MAX],
                1..12,
            ),
            updates in proptest::collection::vec(any::<bool>(), 12),
        ) {
            let Ends { mut client, mut server } = ends_with(cipher);
            for (number, (&bytes, &update)) in lengths.iter().zip(&updates).enumerate() {
                let plaintext: Vec<u8> = (0..bytes).map(|place| (place * 7 + number) as u8).collect();
                let there = seal(&mut client, ContentType::ApplicationData, &plaintext);
                prop_assert_eq!(there.len(), sealed_bytes(bytes));
                prop_assert!(open(&mut server, &there).unwrap() == (ContentType::ApplicationData, plaintext.clone()));
                let back = seal(&mut server, ContentType::ApplicationData, &plaintext);
                prop_assert!(back != there, "another key");
                prop_assert!(open(&mut client, &back).unwrap() == (ContentType::ApplicationData, plaintext));
                if update {
                    let record = key_update(&mut client, true);
                    prop_assert_eq!(receive(&mut server, &record).unwrap(), Signal::ReplyKeyUpdate);
                    let record = key_update(&mut server, false);
                    prop_assert_eq!(receive(&mut client, &record).unwrap(), Signal::None);
                }
            }
        }

        #[test]
        fn any_altered_bit_is_noticed(
            cipher in proptest::sample::select(&CIPHERS[..]),
            plaintext in proptest::collection::vec(any::<u8>(), 0..300),
            bit in any::<proptest::sample::Index>(),
        ) {
            let Ends { mut client, mut server } = ends_with(cipher);
            let mut record = seal(&mut client, ContentType::ApplicationData, &plaintext);
            let bit = bit.index(record.len() * 8);
            record[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(&mut server, &record).is_err());
            record[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(open(&mut server, &record).unwrap().1, plaintext);
        }

        #[test]
        fn padding_is_stripped_and_content_kept(
            cipher in proptest::sample::select(&CIPHERS[..]),
            content in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..500),
            padding in 0usize..1000,
        ) {
            let Ends { mut client, mut server } = ends_with(cipher);
            let inner = [&content[..], &[23], &vec![0; padding]].concat();
            let record = craft(&mut client, &inner);
            prop_assert_eq!(open(&mut server, &record).unwrap(), (ContentType::ApplicationData, content));
            assert_in_step(&mut client, &mut server);
        }

        #[test]
        fn handshake_messages_may_be_split_and_joined_in_any_way(
            cipher in proptest::sample::select(&CIPHERS[..]),
            tickets in proptest::collection::vec(1usize..5000, 0..5),
            asked in any::<bool>(),
            lengths in proptest::collection::vec(1usize..3000, 1..6),
        ) {
            let Ends { mut client, mut server } = ends_with(cipher);
            let mut stream: Vec<u8> = tickets.iter().flat_map(|&bytes| ticket(bytes)).collect();
            stream.extend([24, 0, 0, 1, u8::from(asked)]);
            let mut signals = Vec::new();
            for (number, piece) in stock::Chunks::new(lengths).cut(&stream).into_iter().enumerate() {
                let record = seal(&mut server, ContentType::Handshake, piece);
                match receive(&mut client, &record) {
                    Err(RecordError::TooManyWithoutData) => {
                        prop_assert!(number + tickets.len() >= RECORDS_WITHOUT_DATA_MAX);
                        return Ok(());
                    }
                    signal => signals.push(signal.unwrap()),
                }
            }
            let last = signals.pop().unwrap();
            prop_assert_eq!(last, if asked { Signal::ReplyKeyUpdate } else { Signal::None });
            prop_assert!(signals.iter().all(|&signal| signal == Signal::None));
            // The server's next record is under its next key.
            let _old = key_update(&mut server, false);
            assert_in_step(&mut server, &mut client);
            assert_in_step(&mut client, &mut server);
        }

        #[test]
        fn no_record_content_makes_the_layer_panic(
            cipher in proptest::sample::select(&CIPHERS[..]),
            bodies in proptest::collection::vec((content_type(), body()), 1..10),
            from_client: bool,
        ) {
            let Ends { mut client, mut server } = ends_with(cipher);
            let (from, to) = match from_client {
                true => (&mut client, &mut server),
                false => (&mut server, &mut client),
            };
            for (kind, body) in bodies {
                let record = craft(from, &[&body[..], &[kind]].concat());
                let _ = receive(to, &record);
                prop_assert!(to.handshake.len() <= HANDSHAKE_HEADER_BYTES + HANDSHAKE_BYTES_MAX);
                prop_assert!(to.data_credit_bytes <= DATA_CREDIT_BYTES_MAX);
            }
        }

        #[test]
        fn no_bytes_in_place_of_a_record_make_the_layer_panic(
            header in proptest::sample::select(vec![[23, 3, 3], [22, 3, 3], [23, 0, 0], [0xff; 3], [0; 3]]),
            length in proptest::sample::select(vec![0_u16, 1, 16, 17, 18, 16_400, 16_401, 16_402, 0xffff]),
            there in proptest::option::of(0..40usize),
            byte: u8,
        ) {
            let Ends { mut client, .. } = ends();
            let mut record = [&header[..], &length.to_be_bytes()].concat();
            record.resize(5 + there.unwrap_or(length.into()), byte);
            let _ = record_bytes(&record);
            prop_assert!(open(&mut client, &record).is_err());
        }
    }
}
