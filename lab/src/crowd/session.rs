//! One session of the crowd: a client without an interface, which makes and checks its packets itself.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ringtun::proto::capsule::{Capsule, CapsuleError, CloseReason};
use ringtun::proto::deframer::{DeframeError, Frame};
use ringtun::proto::http::{
    InstanceId, Layer, OFFLOAD_CONTEXT, OffloadHeader, Token, UpgradeRequest,
};
use ringtun::proto::offload::{Offloads, VIRTIO_NET_HDR_BYTES, VirtioNetHdr};
use ringtun::tls::handshake::TlsError;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::echo::{self, Echo};
use super::tally::Tally;
use crate::dial::{DialError, Dialed, Endpoint, first_ipv4, write_all};
use crate::topology::WEB_V4;

/// From the first SYN to the addresses.
const OPENING_TIME: Duration = Duration::from_secs(30);
/// A silent connection is asked for an answer after this, as by any client.
const IDLE_AFTER: Duration = Duration::from_secs(25);
/// The answer may take this long.
const PONG_TIME: Duration = Duration::from_secs(15);
/// A write may take this long.
const WRITE_TIME: Duration = Duration::from_secs(15);
/// An echo reply may take this long.
const ECHO_TIME: Duration = Duration::from_secs(5);
/// The time between echo requests of one session.
const ECHO_INTERVAL: Duration = Duration::from_millis(100);
/// What one read takes at most.
pub(super) const READ_BYTES: usize = 64 * 1024;

/// Why a session is none, or no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("not open in time")]
    OpeningTime,
    #[error("the server takes nothing")]
    WriteTime,
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    #[error("capsules: {0}")]
    Deframe(#[from] DeframeError),
    #[error("capsules: {0}")]
    Capsule(#[from] CapsuleError),
    #[error("the server said goodbye: {0}")]
    Closed(CloseReason),
    #[error("the server closed the connection")]
    Ended,
    #[error("no answer to a keepalive")]
    NoPong,
    #[error("no echo reply")]
    NoEcho,
    #[error("a packet that is no reply to this session's echo request")]
    WrongPacket,
}

/// What all sessions have in common.
pub(super) struct Common {
    pub(super) server: Endpoint,
    /// Where every session of the thread reads to.
    pub(super) read_buffer: RefCell<Vec<u8>>,
    pub(super) tally: Arc<Tally>,
}

/// What the crowd is to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Order {
    /// Keep the sessions.
    Idle,
    /// The first so many sessions have so many echo requests answered, one after the other.
    Echo { sessions: usize, requests: u16 },
}

/// An open session.
pub(super) struct Session {
    common: Rc<Common>,
    number: usize,
    dialed: Dialed,
    last_heard_or_said: Instant,
    pinged: Option<Instant>,
    /// Echo requests still to be sent.
    requests_left: u16,
    /// The next is due.
    request_at: Instant,
    /// The one that is on its way.
    awaited: Option<(Echo, Instant)>,
}

impl Session {
    /// Opens session `number`: TCP, TLS, upgrade, addresses.
    pub(super) async fn open(
        common: Rc<Common>,
        number: usize,
        token: [u8; 32],
    ) -> Result<Session, Failure> {
        let deadline = Instant::now() + OPENING_TIME;
        timeout_at(deadline, Session::open_in_time(common, number, token))
            .await
            .unwrap_or(Err(Failure::OpeningTime))
    }

    async fn open_in_time(
        common: Rc<Common>,
        number: usize,
        token: [u8; 32],
    ) -> Result<Session, Failure> {
        let request = UpgradeRequest {
            layer: Layer::Ip,
            token: Token::from_bytes(token),
            instance: Some(instance(number)),
            ordinal: Some(0),
            offload: Some(OffloadHeader {
                context: OFFLOAD_CONTEXT,
                accepts: Offloads::NONE,
            }),
        };
        let dialed = common.server.dial(&request).await?;
        let now = Instant::now();
        Ok(Session {
            common,
            number,
            dialed,
            last_heard_or_said: now,
            pinged: None,
            requests_left: 0,
            request_at: now,
            awaited: None,
        })
    }

    /// Keeps the session until the crowd is to leave or it fails.
    pub(super) async fn keep(mut self, mut orders: watch::Receiver<Order>) -> Result<(), Failure> {
        loop {
            tokio::select! {
                readable = self.dialed.stream.readable() => {
                    readable?;
                    self.read()?;
                    self.take_capsules()?;
                }
                () = sleep_until(self.next_due()) => self.on_time()?,
                changed = orders.changed() => {
                    let order = *orders.borrow_and_update();
                    match (changed, order) {
                        (Err(_), _) => break,
                        (Ok(()), Order::Echo { sessions, requests }) if self.number < sessions => {
                            self.requests_left = requests;
                            // Not all at the same moment.
                            let spread = u32::try_from(self.number % 100).unwrap_or(0);
                            self.request_at = Instant::now() + ECHO_INTERVAL * spread / 100;
                        }
                        (Ok(()), _) => {}
                    }
                }
            }
            self.flush().await?;
        }
        self.dialed.tls.close();
        self.flush().await
    }

    /// When something is to be said or given up, at the latest.
    fn next_due(&self) -> Instant {
        let keepalive = match self.pinged {
            Some(pinged) => pinged + PONG_TIME,
            None => self.last_heard_or_said + IDLE_AFTER,
        };
        let echo = match &self.awaited {
            Some((_, sent)) => Some(*sent + ECHO_TIME),
            None => (self.requests_left > 0).then_some(self.request_at),
        };
        echo.map_or(keepalive, |echo| echo.min(keepalive))
    }

    fn on_time(&mut self) -> Result<(), Failure> {
        let now = Instant::now();
        if self
            .awaited
            .as_ref()
            .is_some_and(|(_, sent)| now >= *sent + ECHO_TIME)
        {
            return Err(Failure::NoEcho);
        }
        if self.pinged.is_some_and(|pinged| now >= pinged + PONG_TIME) {
            return Err(Failure::NoPong);
        }
        if self.awaited.is_none() && self.requests_left > 0 && now >= self.request_at {
            self.request(now)?;
        }
        if self.pinged.is_none() && now >= self.last_heard_or_said + IDLE_AFTER {
            let mut ping = Vec::new();
            Capsule::put_ping((self.number as u64).to_be_bytes(), &mut ping);
            self.dialed.tls.write(&ping)?;
            self.pinged = Some(now);
        }
        Ok(())
    }

    /// Sends an echo request: sessions with an even number as a plain packet, the others in the offload context.
    fn request(&mut self, now: Instant) -> Result<(), Failure> {
        let echo = Echo {
            from: self.dialed.address,
            to: WEB_V4,
            identifier: self.number as u16,
            sequence: self.requests_left,
        };
        let packet = echo.request();
        let capsule = if self.number.is_multiple_of(2) {
            echo::datagram(0, &[&packet])
        } else {
            let header = VirtioNetHdr::PLAIN.to_bytes();
            echo::datagram(OFFLOAD_CONTEXT, &[&header, &packet])
        };
        self.dialed.tls.write(&capsule)?;
        self.requests_left -= 1;
        self.request_at = now + ECHO_INTERVAL;
        self.awaited = Some((echo, now));
        self.common.tally.requested();
        Ok(())
    }

    fn read(&mut self) -> Result<(), Failure> {
        let common = Rc::clone(&self.common);
        let mut buffer = common.read_buffer.borrow_mut();
        match self.dialed.stream.try_read(&mut buffer) {
            Ok(0) => return Err(Failure::Ended),
            Ok(bytes) => self.dialed.tls.feed(&buffer[..bytes])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        self.last_heard_or_said = Instant::now();
        self.pinged = None;
        Ok(())
    }

    fn take_capsules(&mut self) -> Result<(), Failure> {
        let mut answers = Vec::new();
        let mut taken = 0;
        loop {
            let stream = &self.dialed.tls.plaintext()[taken..];
            match self.dialed.deframer.next(stream)? {
                Frame::Incomplete => break,
                Frame::Skipped { end } => taken += end,
                Frame::Datagram {
                    context,
                    payload,
                    end,
                } => {
                    let payload = &stream[payload];
                    let packet = match context {
                        0 => payload,
                        OFFLOAD_CONTEXT => payload.get(VIRTIO_NET_HDR_BYTES..).unwrap_or_default(),
                        _ => return Err(Failure::WrongPacket),
                    };
                    let (echo, sent) = self.awaited.take().ok_or(Failure::WrongPacket)?;
                    if !echo.is_answered_by(packet) {
                        return Err(Failure::WrongPacket);
                    }
                    self.common.tally.answered(sent.elapsed());
                    taken += end;
                }
                Frame::Control { kind, value, end } => {
                    match Capsule::decode(kind, &stream[value])? {
                        Some(Capsule::Ping(bytes)) => Capsule::put_pong(bytes, &mut answers),
                        Some(Capsule::Close(reason)) => return Err(Failure::Closed(reason)),
                        Some(assign @ Capsule::AddressAssign(_)) => {
                            self.dialed.address =
                                first_ipv4(&assign).ok_or(DialError::NoAddress)?;
                        }
                        _ => {}
                    }
                    taken += end;
                }
            }
        }
        self.dialed.tls.plaintext().drain(..taken);
        if !answers.is_empty() {
            self.dialed.tls.write(&answers)?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        let outgoing = self.dialed.tls.take_outgoing();
        if outgoing.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now() + WRITE_TIME;
        timeout_at(deadline, write_all(&self.dialed.stream, &outgoing))
            .await
            .map_err(|_| Failure::WriteTime)??;
        self.last_heard_or_said = Instant::now();
        Ok(())
    }
}

/// Any will do, as long as no two are alike.
fn instance(number: usize) -> InstanceId {
    let mut instance = *b"lab crowd       ";
    instance[8..].copy_from_slice(&(number as u64).to_be_bytes());
    InstanceId(instance)
}
