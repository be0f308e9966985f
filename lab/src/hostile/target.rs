//! Where an attack goes: the server, or the sink that stands in for it.
//!
//! A connection to the sink is TLS with a server in this process: the attacker seals its records
//! with real keys, and the sink gets bytes of the same number and size. What a handshake answers is
//! not carried to the sink.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ringtun::config::Cipher;
use ringtun::proto::http::{
    InstanceId, Layer, OFFLOAD_CONTEXT, OffloadHeader, Token, UpgradeRequest, upgrade_request,
};
use ringtun::proto::offload::Offloads;
use ringtun::tls::certificate::{CertificateError, Identity, server_config};
use ringtun::tls::handshake::{TlsError, TlsStream};
use ringtun::tls::record::RecordLayer;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::dial::{Accounts, AccountsError, DialError, Dialed, Endpoint, write_all};

/// How long a connection may take to open.
const OPENING_LIMIT: Duration = Duration::from_secs(10);
/// The inner address that a session at the sink has.
const ADDRESS_AT_SINK: Ipv4Addr = Ipv4Addr::new(10, 87, 255, 254);

/// Why an attacker's connection is none, or no longer. That is a figure and no error of the test.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    #[error("not open in time")]
    OpeningTime,
    #[error("the server closed the connection")]
    Ended,
}

/// Which connection of which session is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identification {
    pub(super) token: [u8; 32],
    pub(super) instance: u64,
    pub(super) connection: u8,
}

/// A connection of a session, with its keys.
pub(super) struct Channel {
    pub(super) stream: TcpStream,
    pub(super) records: RecordLayer,
    /// The session's inner address.
    pub(super) address: Ipv4Addr,
}

/// The server or the sink.
pub(super) struct Target {
    endpoint: Endpoint,
    /// `None`: the endpoint is the server.
    stand_in: Option<StandIn>,
}

struct StandIn {
    config: Arc<ServerConfig>,
    /// What a client sends after its ClientHello and before its request.
    finished: Vec<u8>,
}

impl Target {
    /// The server, which listens at `address`.
    pub(super) fn server(accounts: &Accounts, address: SocketAddr) -> Result<Self, AccountsError> {
        Ok(Target {
            endpoint: accounts.endpoint(address)?,
            stand_in: None,
        })
    }

    /// The sink, which listens at `address`.
    pub(super) fn sink(accounts: &Accounts, address: SocketAddr) -> Result<Self, AccountsError> {
        let endpoint = accounts.endpoint(address)?;
        let config = stand_in_config(&accounts.identity)?;
        let finished = handshake_in_memory(&endpoint, &config)
            .map(|shaken| shaken.finished)
            .map_err(|error| AccountsError::Name(error.to_string()))?;
        Ok(Target {
            endpoint,
            stand_in: Some(StandIn { config, finished }),
        })
    }

    /// Opens a connection of a session.
    pub(super) async fn open(&self, who: Identification) -> Result<Channel, Failure> {
        in_time(self.open_at_leisure(who)).await
    }

    async fn open_at_leisure(&self, who: Identification) -> Result<Channel, Failure> {
        let request = request(who);
        let Some(stand_in) = &self.stand_in else {
            let dialed = self.endpoint.dial(&request).await?;
            let Dialed { stream, tls, .. } = dialed;
            return Ok(Channel {
                stream,
                records: tls.into_records()?.records,
                address: dialed.address,
            });
        };
        let stream = self.endpoint.connect(None).await?;
        let mut shaken = handshake_in_memory(&self.endpoint, &stand_in.config)?;
        let head = upgrade_request(&self.endpoint.address.to_string(), &request);
        shaken.client.write(&head)?;
        for bytes in [shaken.hello, shaken.finished, shaken.client.take_outgoing()] {
            write_all(&stream, &bytes).await?;
        }
        Ok(Channel {
            stream,
            records: shaken.client.into_records()?.records,
            address: ADDRESS_AT_SINK,
        })
    }

    /// Opens a connection of a session that is not to be used. At the sink the client's key is new
    /// and the rest of the handshake is a copy, so that this costs no more than a client's part.
    pub(super) async fn open_unused(&self, who: Identification) -> Result<TcpStream, Failure> {
        let open = async {
            if self.stand_in.is_none() {
                return Ok(self.endpoint.dial(&request(who)).await?.stream);
            }
            let head = upgrade_request(&self.endpoint.address.to_string(), &request(who));
            self.copied_handshake(None, &head).await
        };
        in_time(open).await
    }

    /// Opens a TCP connection and says nothing.
    pub(super) async fn connect(&self, source: Ipv4Addr) -> Result<TcpStream, Failure> {
        in_time(async { Ok(self.endpoint.connect(Some(source)).await?) }).await
    }

    /// Opens a TCP connection and sends a ClientHello.
    pub(super) async fn greet(&self, source: Ipv4Addr) -> Result<TcpStream, Failure> {
        in_time(async {
            let stream = self.endpoint.connect(Some(source)).await?;
            write_all(&stream, &self.client()?.take_outgoing()).await?;
            Ok(stream)
        })
        .await
    }

    /// Opens a TCP connection and completes a TLS handshake.
    pub(super) async fn handshake(&self, source: Ipv4Addr) -> Result<TcpStream, Failure> {
        in_time(async {
            match self.stand_in {
                None => Ok(self.endpoint.handshake(Some(source)).await?.stream),
                Some(_) => self.copied_handshake(Some(source), &[]).await,
            }
        })
        .await
    }

    async fn copied_handshake(
        &self,
        source: Option<Ipv4Addr>,
        rest: &[u8],
    ) -> Result<TcpStream, Failure> {
        let stream = self.endpoint.connect(source).await?;
        let finished = self.stand_in.as_ref().map(|stand_in| &stand_in.finished);
        write_all(&stream, &self.client()?.take_outgoing()).await?;
        write_all(&stream, finished.map_or(&[][..], Vec::as_slice)).await?;
        write_all(&stream, rest).await?;
        Ok(stream)
    }

    fn client(&self) -> Result<TlsStream, TlsError> {
        TlsStream::client(Arc::clone(&self.endpoint.tls), self.endpoint.name.clone())
    }
}

async fn in_time<T>(opening: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(OPENING_LIMIT, opening)
        .await
        .unwrap_or(Err(Failure::OpeningTime))
}

fn request(who: Identification) -> UpgradeRequest {
    let mut instance = *b"lab hostile     ";
    instance[8..].copy_from_slice(&who.instance.to_be_bytes());
    UpgradeRequest {
        layer: Layer::Ip,
        token: Token::from_bytes(who.token),
        instance: Some(InstanceId(instance)),
        ordinal: Some(who.connection),
        offload: Some(OffloadHeader {
            context: OFFLOAD_CONTEXT,
            accepts: Offloads::NONE,
        }),
    }
}

fn stand_in_config(identity: &Identity) -> Result<Arc<ServerConfig>, CertificateError> {
    let identity = Identity {
        chain: identity.chain.clone(),
        key: identity.key.clone_key(),
    };
    server_config(identity, Cipher::default())
}

/// A handshake between two ends in this process.
struct Shaken {
    client: TlsStream,
    /// Read by the tests only.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests open what was sealed"))]
    server: TlsStream,
    /// What the client sent first,
    hello: Vec<u8>,
    /// and what it sent then.
    finished: Vec<u8>,
}

fn handshake_in_memory(
    endpoint: &Endpoint,
    config: &Arc<ServerConfig>,
) -> Result<Shaken, TlsError> {
    let mut client = TlsStream::client(Arc::clone(&endpoint.tls), endpoint.name.clone())?;
    let mut server = TlsStream::server(Arc::clone(config))?;
    let hello = client.take_outgoing();
    server.feed(&hello)?;
    client.feed(&server.take_outgoing())?;
    let finished = client.take_outgoing();
    server.feed(&finished)?;
    // Tickets.
    client.feed(&server.take_outgoing())?;
    assert!(
        !client.is_handshaking() && !server.is_handshaking(),
        "one flight each, and the client's last"
    );
    Ok(Shaken {
        client,
        server,
        hello,
        finished,
    })
}

/// The record layers of a client and of its server.
#[cfg(test)]
pub(super) fn pair_in_memory() -> (RecordLayer, RecordLayer) {
    use ringtun::tls::certificate::{Trust, client_config, generate};

    let generated = generate("lab.example").expect("a certificate");
    let identity = Identity::from_pem(
        generated.certificate_pem.as_bytes(),
        generated.key_pem.as_bytes(),
    );
    let identity = identity.expect("a certificate");
    let pin = identity.pin().expect("a key");
    let endpoint = Endpoint {
        address: SocketAddr::from(([192, 0, 2, 1], 443)),
        name: "lab.example".try_into().expect("a name"),
        tls: client_config(Trust::Pin(pin), Cipher::default()).expect("a configuration"),
    };
    let config = stand_in_config(&identity).expect("a configuration");
    let shaken = handshake_in_memory(&endpoint, &config).expect("a handshake");
    let records = |stream: TlsStream| stream.into_records().expect("keys").records;
    (records(shaken.client), records(shaken.server))
}
