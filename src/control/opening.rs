//! One connection of the client, from a connected socket to the server's terms: TLS, upgrade, first capsules.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::time::Instant;

use super::handshake::{SecureStream, StreamError};
use super::runtime::Stream;
use crate::config::NAMESERVERS_MAX;
use crate::keeper::request::{ADDRESSES_MAX, ROUTES_MAX, TunnelSettings};
use crate::proto::capsule::{AssignedAddress, Capsule, CapsuleError, CloseReason, IpAddressRange};
use crate::proto::deframer::{DeframeError, Deframer, Frame};
use crate::proto::http::{
    self, InstanceId, Layer, OFFLOAD_CONTEXT, OffloadHeader, ResponseError, ResponseParsed, Token,
    UpgradeRequest,
};
use crate::proto::offload::Offloads;
use crate::tls::handshake::{Established, TlsError};

/// From a connected socket to the server's terms.
pub const OPENING_TIME: Duration = Duration::from_secs(8);

/// Why a connected socket did not become a tunnel.
#[derive(Debug, thiserror::Error)]
pub enum OpeningError {
    /// TCP or TLS failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Answered like a web browser.
    #[error("the server does not accept this invite (it was revoked, or is another server's)")]
    Refused,
    /// Answered, but not by HTTP.
    #[error("the server's answer cannot be understood")]
    Answer(#[source] ResponseError),
    /// A malformed capsule.
    #[error("the server's answer cannot be understood")]
    Capsule(#[from] CapsuleError),
    /// A malformed capsule stream.
    #[error("the server's answer cannot be understood")]
    Deframe(#[from] DeframeError),
    /// The server wants no connection.
    #[error("{}", goodbye(*.0))]
    Closed(CloseReason),
    /// The server gave no address.
    #[error("the server assigned no address")]
    NoAddress,
}

impl OpeningError {
    /// Whether trying again can help, as long as nothing has ever worked.
    pub fn is_hopeless(&self) -> bool {
        match self {
            OpeningError::Stream(StreamError::Tls(error)) => !matches!(
                error,
                TlsError::PeerAlert(_)
                    | TlsError::Handshake(_)
                    | TlsError::Record(_)
                    | TlsError::Closed
            ),
            OpeningError::Stream(_) => false,
            OpeningError::Closed(reason) => reason.is_final(),
            _ => true,
        }
    }

    /// The reason to stop for good, however long it has worked before.
    pub fn final_reason(&self) -> Option<CloseReason> {
        match self {
            OpeningError::Closed(reason) if reason.is_final() => Some(*reason),
            _ => None,
        }
    }
}

/// What a close reason means for the user of a client.
pub fn goodbye(reason: CloseReason) -> String {
    match reason {
        CloseReason::Superseded => {
            "this invite is now in use by another client: make one for each device with `ringtun invite NAME`".into()
        }
        CloseReason::Revoked => "the server has revoked this invite: ask for a new one".into(),
        other => format!("the server closed the connection: {other}"),
    }
}

/// The server, as the invite describes it.
pub struct Server {
    /// How to recognise it.
    pub tls: Arc<ClientConfig>,
    /// The name to ask for.
    pub name: ServerName<'static>,
    /// `HOST[:PORT]` for the request.
    pub authority: String,
    /// What shows that we may.
    pub token: Token,
    /// This process.
    pub instance: InstanceId,
    /// What this host's TUN takes unsegmented.
    pub accepts: Offloads,
}

/// What the server grants and routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    addresses: Option<Vec<AssignedAddress>>,
    routes: Option<Vec<IpAddressRange>>,
    dns: Vec<IpAddr>,
}

impl Terms {
    /// Takes in a capsule of the server; `false` if it is about something else.
    pub fn learn(&mut self, capsule: Capsule) -> bool {
        match capsule {
            Capsule::AddressAssign(addresses) => self.addresses = Some(addresses),
            Capsule::RouteAdvertisement(routes) => self.routes = Some(routes),
            Capsule::DnsAssign(dns) => self.dns = dns.plain_nameservers(),
            _ => return false,
        }
        true
    }

    fn is_complete(&self) -> bool {
        self.addresses.is_some() && self.routes.is_some()
    }

    /// The addresses to use.
    pub fn addresses(&self) -> impl Iterator<Item = ipnet::IpNet> {
        self.addresses
            .iter()
            .flatten()
            .filter(|address| !address.is_unspecified())
            .map(|address| address.prefix)
    }

    /// What the host is to look like; `dns` is the user's own choice.
    pub fn settings(&self, dns: Option<&[IpAddr]>) -> TunnelSettings {
        let routed = || {
            self.routes
                .iter()
                .flatten()
                .filter(|range| range.protocol == 0)
        };
        TunnelSettings {
            addresses: self.addresses().take(ADDRESSES_MAX).collect(),
            routes: routed()
                .flat_map(IpAddressRange::prefixes)
                .take(ROUTES_MAX)
                .collect(),
            block_ipv6: !routed().any(|range| range.start.is_ipv6()),
            dns: dns
                .unwrap_or(&self.dns)
                .iter()
                .copied()
                .take(NAMESERVERS_MAX)
                .collect(),
        }
    }
}

/// A connection that is ready for a worker.
pub struct Opened {
    /// Its socket.
    pub socket: OwnedFd,
    /// Its TLS.
    pub established: Established,
    /// The server's end.
    pub address: SocketAddr,
    /// What the server accepts in which context, if it offloads.
    pub offload: Option<OffloadHeader>,
    /// What it grants.
    pub terms: Terms,
}

/// Opens the session's connection number `ordinal` on a connected socket.
///
/// # Errors
/// [`OpeningError`]; the socket is closed.
pub async fn open(
    server: &Server,
    ordinal: u8,
    socket: OwnedFd,
    address: SocketAddr,
) -> Result<Opened, OpeningError> {
    let deadline = Instant::now() + OPENING_TIME;
    let stream = Stream::new(socket).map_err(StreamError::from)?;
    let mut stream = SecureStream::connect(
        stream,
        Arc::clone(&server.tls),
        server.name.clone(),
        deadline,
    )
    .await?;
    let request = UpgradeRequest {
        layer: Layer::Ip,
        token: server.token.clone(),
        instance: Some(server.instance),
        ordinal: Some(ordinal),
        offload: Some(OffloadHeader {
            context: OFFLOAD_CONTEXT,
            accepts: server.accepts,
        }),
    };
    stream
        .write(
            &http::upgrade_request(&server.authority, &request),
            deadline,
        )
        .await?;
    let offload = upgraded(&mut stream, deadline)
        .await?
        .filter(|theirs| theirs.context == OFFLOAD_CONTEXT);
    let terms = terms(&mut stream, deadline).await?;
    if terms.addresses().next().is_none() {
        return Err(OpeningError::NoAddress);
    }
    let (socket, established) = stream.into_parts()?;
    Ok(Opened {
        socket,
        established,
        address,
        offload,
        terms,
    })
}

/// Waits for the 101 and takes it off the stream.
async fn upgraded(
    stream: &mut SecureStream,
    deadline: Instant,
) -> Result<Option<OffloadHeader>, OpeningError> {
    loop {
        match http::parse_response(Layer::Ip, stream.plaintext()).map_err(OpeningError::Answer)? {
            ResponseParsed::Incomplete => more(stream, deadline).await?,
            ResponseParsed::Switched {
                offload,
                head_bytes,
            } => {
                stream.plaintext().drain(..head_bytes);
                return Ok(offload);
            }
            ResponseParsed::Refused { status } => {
                tracing::debug!("HTTP status {status} instead of 101");
                return Err(OpeningError::Refused);
            }
        }
    }
}

/// Reads capsules until addresses and routes are known, and what came along with those: nameservers follow the routes.
/// Packets that come before are of no use yet.
async fn terms(stream: &mut SecureStream, deadline: Instant) -> Result<Terms, OpeningError> {
    let mut deframer = Deframer::new();
    let mut terms = Terms::default();
    loop {
        let plaintext = stream.plaintext();
        let end = match deframer.next(plaintext)? {
            Frame::Incomplete if terms.is_complete() => return Ok(terms),
            Frame::Incomplete => {
                more(stream, deadline).await?;
                continue;
            }
            Frame::Datagram { .. } if terms.is_complete() => return Ok(terms),
            Frame::Datagram { end, .. } | Frame::Skipped { end } => end,
            Frame::Control { kind, value, end } => {
                match Capsule::decode(kind, &plaintext[value])? {
                    Some(Capsule::Close(reason)) => return Err(OpeningError::Closed(reason)),
                    Some(capsule) => {
                        terms.learn(capsule);
                    }
                    None => {}
                }
                end
            }
        };
        plaintext.drain(..end);
    }
}

async fn more(stream: &mut SecureStream, deadline: Instant) -> Result<(), OpeningError> {
    if stream.read(deadline).await? {
        Ok(())
    } else {
        Err(StreamError::Closed.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::capsule::DnsAssign;

    fn terms(routes: Vec<IpAddressRange>) -> Terms {
        let mut terms = Terms::default();
        assert!(terms.learn(Capsule::AddressAssign(vec![
            AssignedAddress::host(0, IpAddr::from([10, 87, 0, 2])),
            AssignedAddress::unspecified_v6(0),
        ])));
        assert!(!terms.is_complete());
        assert!(terms.learn(Capsule::RouteAdvertisement(routes)));
        assert!(terms.is_complete());
        terms
    }

    #[test]
    fn a_server_without_ipv6_has_it_blocked() {
        let settings = terms(vec![IpAddressRange::everything_v4()]).settings(None);
        assert!(settings.block_ipv6);
        assert_eq!(
            settings.addresses,
            ["10.87.0.2/32".parse().expect("prefix")]
        );
        assert_eq!(settings.routes, ["0.0.0.0/0".parse().expect("prefix")]);
        let both = vec![
            IpAddressRange::everything_v4(),
            IpAddressRange::everything_v6(),
        ];
        assert!(!terms(both).settings(None).block_ipv6);
    }

    #[test]
    fn routes_for_a_single_protocol_are_not_set() {
        let icmp_only = IpAddressRange {
            protocol: 1,
            ..IpAddressRange::everything_v6()
        };
        let settings = terms(vec![IpAddressRange::everything_v4(), icmp_only]).settings(None);
        assert_eq!(settings.routes.len(), 1);
        assert!(settings.block_ipv6);
    }

    #[test]
    fn the_users_nameservers_go_before_the_servers() {
        let mut terms = terms(vec![IpAddressRange::everything_v4()]);
        let (server, own) = (IpAddr::from([9, 9, 9, 9]), IpAddr::from([192, 168, 1, 1]));
        assert!(terms.learn(Capsule::DnsAssign(DnsAssign::plain([server], Vec::new()))));
        assert_eq!(terms.settings(None).dns, [server]);
        assert_eq!(terms.settings(Some(&[own])).dns, [own]);
        assert!(terms.settings(Some(&[])).dns.is_empty());
    }

    #[test]
    fn only_what_time_may_heal_is_tried_again() {
        let hopeless = [
            OpeningError::Refused,
            OpeningError::NoAddress,
            OpeningError::Closed(CloseReason::Superseded),
            OpeningError::Stream(TlsError::UnknownIssuer.into()),
        ];
        for error in hopeless {
            assert!(error.is_hopeless(), "{error}");
        }
        for error in [
            OpeningError::Stream(StreamError::TimedOut),
            OpeningError::Stream(StreamError::Closed),
            OpeningError::Closed(CloseReason::Shutdown),
        ] {
            assert!(!error.is_hopeless(), "{error}");
        }
    }
}
