//! Opens a connection of a session without an interface: TCP, TLS, the upgrade, the addresses.
//!
//! The load test ([`crowd`](crate::crowd)) and the fault test ([`hostile`](crate::hostile)) both
//! make their connections here, with the TLS and capsule code of the crate under test.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use ringtun::config::Cipher;
use ringtun::keeper::StateDir;
use ringtun::keeper::state::StateError;
use ringtun::proto::capsule::{Capsule, CapsuleError, CloseReason};
use ringtun::proto::deframer::{DeframeError, Deframer, Frame};
use ringtun::proto::http::{Layer, ResponseError, ResponseParsed, UpgradeRequest};
use ringtun::proto::http::{parse_response, upgrade_request};
use ringtun::tls::certificate::{CertificateError, Identity, Trust, client_config};
use ringtun::tls::handshake::{TlsError, TlsStream};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};

/// One read takes this much at most.
const READ_BYTES: usize = 8 * 1024;

/// Why there is no connection, or no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("no TCP connection")]
    Connect(#[source] io::Error),
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    #[error("HTTP: {0}")]
    Http(#[from] ResponseError),
    #[error("turned away with HTTP status {0}")]
    Refused(u16),
    #[error("capsules: {0}")]
    Deframe(#[from] DeframeError),
    #[error("capsules: {0}")]
    Capsule(#[from] CapsuleError),
    #[error("no IPv4 address assigned")]
    NoAddress,
    #[error("the server said goodbye: {0}")]
    Closed(CloseReason),
    #[error("the server closed the connection")]
    Ended,
}

/// Why the peers of a test could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    /// The state directory could not be written.
    #[error("the server's state")]
    State(#[from] StateError),
    /// The certificate in it cannot be used.
    #[error("the server's certificate")]
    Certificate(#[from] CertificateError),
    /// The name in it cannot be used.
    #[error("the server's name: {0}")]
    Name(String),
}

/// Peers of a server that has not been started yet, and its identity.
#[derive(Debug)]
pub(crate) struct Accounts {
    /// One for each name, in the order of the names.
    pub(crate) tokens: Vec<[u8; 32]>,
    /// The server's certificate and key.
    pub(crate) identity: Identity,
    name: String,
}

impl Accounts {
    /// Makes the peers in the state directory of a server that is yet to start.
    pub(crate) fn make(path: &Path, names: &[String]) -> Result<Accounts, AccountsError> {
        let state = StateDir::open(path)?;
        Ok(Accounts {
            tokens: state.add_peers(names.iter().map(String::as_str))?,
            identity: state.identity()?,
            name: state.host_name().to_owned(),
        })
    }

    /// The server at `address`, as its clients know it.
    pub(crate) fn endpoint(&self, address: SocketAddr) -> Result<Endpoint, AccountsError> {
        let name = ServerName::try_from(self.name.clone())
            .map_err(|error| AccountsError::Name(error.to_string()))?;
        Ok(Endpoint {
            address,
            name,
            tls: client_config(Trust::Pin(self.identity.pin()?), Cipher::default())?,
        })
    }
}

/// A server to dial.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    pub(crate) name: ServerName<'static>,
    pub(crate) tls: Arc<ClientConfig>,
}

/// An open connection. Its plaintext may hold the front of a capsule.
pub(crate) struct Dialed {
    pub(crate) stream: TcpStream,
    pub(crate) tls: TlsStream,
    pub(crate) deframer: Deframer,
    /// The first IPv4 address that the server assigned.
    pub(crate) address: Ipv4Addr,
}

impl Endpoint {
    /// Opens a TCP connection, from `source` if that is given.
    pub(crate) async fn connect(&self, source: Option<Ipv4Addr>) -> Result<TcpStream, DialError> {
        let connect = async {
            match source {
                None => TcpStream::connect(self.address).await,
                Some(source) => {
                    let socket = TcpSocket::new_v4()?;
                    socket.bind(SocketAddr::new(source.into(), 0))?;
                    socket.connect(self.address).await
                }
            }
        };
        let stream = connect.await.map_err(DialError::Connect)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Opens a TCP connection and completes the TLS handshake.
    pub(crate) async fn handshake(&self, source: Option<Ipv4Addr>) -> Result<Dialed, DialError> {
        let stream = self.connect(source).await?;
        let mut dialed = Dialed {
            stream,
            tls: TlsStream::client(Arc::clone(&self.tls), self.name.clone())?,
            deframer: Deframer::new(),
            address: Ipv4Addr::UNSPECIFIED,
        };
        dialed.flush().await?;
        while dialed.tls.is_handshaking() {
            dialed.receive().await?;
        }
        Ok(dialed)
    }

    /// Opens a connection of a session and waits for its addresses. It has nothing left to send.
    pub(crate) async fn dial(&self, request: &UpgradeRequest) -> Result<Dialed, DialError> {
        let mut dialed = self.handshake(None).await?;
        let head = upgrade_request(&self.address.to_string(), request);
        dialed.tls.write(&head)?;
        dialed.flush().await?;
        loop {
            match parse_response(Layer::Ip, dialed.tls.plaintext())? {
                ResponseParsed::Incomplete => dialed.receive().await?,
                ResponseParsed::Switched { head_bytes, .. } => {
                    dialed.tls.plaintext().drain(..head_bytes);
                    break;
                }
                ResponseParsed::Refused { status } => return Err(DialError::Refused(status)),
            }
        }
        dialed.take_capsules()?;
        while dialed.address.is_unspecified() {
            dialed.receive().await?;
            dialed.take_capsules()?;
        }
        dialed.flush().await?;
        Ok(dialed)
    }
}

impl Dialed {
    /// Waits for more, and sends what TLS answers.
    async fn receive(&mut self) -> Result<(), DialError> {
        self.stream.readable().await?;
        self.read()?;
        self.flush().await
    }

    fn read(&mut self) -> Result<(), DialError> {
        let mut buffer = [0; READ_BYTES];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => Err(DialError::Ended),
            Ok(bytes) => Ok(self.tls.feed(&buffer[..bytes])?),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn take_capsules(&mut self) -> Result<(), DialError> {
        let mut answers = Vec::new();
        let mut taken = 0;
        loop {
            let stream = &self.tls.plaintext()[taken..];
            match self.deframer.next(stream)? {
                Frame::Incomplete => break,
                Frame::Skipped { end } | Frame::Datagram { end, .. } => taken += end,
                Frame::Control { kind, value, end } => {
                    match Capsule::decode(kind, &stream[value])? {
                        Some(Capsule::Ping(bytes)) => Capsule::put_pong(bytes, &mut answers),
                        Some(Capsule::Close(reason)) => return Err(DialError::Closed(reason)),
                        Some(assign @ Capsule::AddressAssign(_)) => {
                            self.address = first_ipv4(&assign).ok_or(DialError::NoAddress)?;
                        }
                        _ => {}
                    }
                    taken += end;
                }
            }
        }
        self.tls.plaintext().drain(..taken);
        if !answers.is_empty() {
            self.tls.write(&answers)?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), DialError> {
        let outgoing = self.tls.take_outgoing();
        Ok(write_all(&self.stream, &outgoing).await?)
    }
}

/// The first IPv4 address of an ADDRESS_ASSIGN.
pub(crate) fn first_ipv4(assign: &Capsule) -> Option<Ipv4Addr> {
    let Capsule::AddressAssign(assigned) = assign else {
        return None;
    };
    let mut addresses = assigned.iter().map(|one| one.prefix.addr());
    addresses
        .find_map(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        })
        .filter(|address| !address.is_unspecified())
}

/// Writes all of `bytes`, and waits for room whenever the socket has none.
pub(crate) async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
