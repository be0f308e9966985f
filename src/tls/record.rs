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

const _: () = assert!(KEY_UPDATE_RECORDS < RECORDS_PER_KEY_MAX / 2);

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
    /// The record is not authentic or not lawful: the connection is at its end.
    #[inline]
    pub fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<Opened, RecordError> {
        if record_bytes(record)? != Some(record.len()) {
            return Err(RecordError::NotOneRecord);
        }
        let opened = self.receiving.open(record, out)?;
        if !self.handshake.is_empty() && opened.content_type != ContentType::Handshake {
            return Err(RecordError::Interleaved);
        }
        Ok(opened)
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
            ContentType::Alert => handle_alert(body),
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

    fn handle_handshake(&mut self, body: &[u8]) -> Result<Signal, RecordError> {
        if self.handshake.is_empty() {
            let (signal, taken) = self.take_handshakes(body)?;
            self.handshake.extend_from_slice(&body[taken..]);
            return Ok(signal);
        }
        let mut joined = std::mem::take(&mut self.handshake);
        joined.extend_from_slice(body);
        let (signal, taken) = self.take_handshakes(&joined)?;
        joined.drain(..taken);
        self.handshake = joined;
        Ok(signal)
    }

    /// Takes all whole messages at the front of `body` and returns how many bytes they had.
    fn take_handshakes(&mut self, body: &[u8]) -> Result<(Signal, usize), RecordError> {
        let mut signal = Signal::None;
        let mut taken = 0;
        while let Some((kind, message)) = self.first_handshake(&body[taken..])? {
            taken += HANDSHAKE_HEADER_BYTES + message.len();
            match kind {
                NEW_SESSION_TICKET => self.take_ticket(message)?,
                _ if taken != body.len() => return Err(RecordError::KeyUpdateNotAtEnd),
                _ => signal = self.take_key_update(message)?,
            }
        }
        Ok((signal, taken))
    }

    /// The kind and body of the message at the front of `body`, once it is whole. What can never be taken is refused
    /// by its first bytes, so that nothing waits for the rest of it.
    fn first_handshake<'b>(&self, body: &'b [u8]) -> Result<Option<(u8, &'b [u8])>, RecordError> {
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
        Ok(rest.get(..bytes).map(|message| (kind, message)))
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

fn handle_alert(body: &[u8]) -> Result<Signal, RecordError> {
    let &[_level, description] = body else {
        return Err(RecordError::MalformedAlert);
    };
    // In TLS 1.3 the level says nothing: all but these two are fatal (RFC 8446 section 6).
    match AlertDescription::from(description) {
        AlertDescription::CloseNotify => Ok(Signal::CloseNotify),
        AlertDescription::UserCanceled => Ok(Signal::None),
        other => Err(RecordError::PeerAlert(other)),
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
        let (header, body) = record.split_at(RECORD_HEADER_BYTES);
        let (ciphertext, tag) = body.split_at(body.len() - RECORD_TAG_BYTES);
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
        let bytes = inner
            .iter()
            .rposition(|&byte| byte != 0)
            .ok_or(RecordError::UnexpectedContent(0))?;
        let content_type = match inner[bytes] {
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
