//! The two configuration files: TOML, every key optional, unknown keys refused.
//!
//! A file is parsed into its struct, the command line is laid over it, and then `validate` is called once.
//! What passes `validate` needs no further checks.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::de::{self, DeserializeOwned, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where `ringtun server` looks for its configuration unless `-c` says otherwise.
pub const SERVER_CONFIG_PATH: &str = "/etc/ringtun/server.toml";
/// Where `ringtun client` looks for its configuration unless `-c` says otherwise.
pub const CLIENT_CONFIG_PATH: &str = "/etc/ringtun/client.toml";
/// The server's state directory unless configured.
pub const STATE_DIR: &str = "/var/lib/ringtun";
/// The interface's name unless configured, on both sides.
pub const INTERFACE: &str = "ringtun0";
/// The interface's MTU unless configured, on both sides.
pub const MTU_BYTES: u16 = 1500;
/// IPv6 does not run over a link with a smaller MTU (RFC 8200, section 5).
pub const MTU_BYTES_MIN: u16 = 1280;
/// A TUN device takes no larger MTU.
pub const MTU_BYTES_MAX: u16 = 65_535;
/// The kernel's IFNAMSIZ without the final zero.
pub const INTERFACE_BYTES_MAX: usize = 15;
/// More addresses to listen on than anyone has.
pub const LISTENERS_MAX: usize = 32;
/// Connections of one session, at most.
pub const CONNECTIONS_MAX: usize = 16;
/// Connections of a session whose path loses packets or holds more than one of them, unless configured.
pub const CONNECTIONS_STRIPED: usize = 4;
/// The same where the congestion control slows down for each lost packet.
pub const CONNECTIONS_SLOWED: usize = CONNECTIONS_MAX;
const _: () = assert!(CONNECTIONS_STRIPED <= CONNECTIONS_SLOWED);
const _: () = assert!(CONNECTIONS_SLOWED <= CONNECTIONS_MAX);
/// Worker threads of a client, unless it or its connections are configured.
pub const CLIENT_WORKERS: usize = 2;
/// Worker threads, at most.
pub const WORKERS_MAX: usize = 64;
/// Connections that are no tunnels (yet), all sources together, unless configured.
pub const VISITORS: usize = 1024;
/// Connections that are no tunnels (yet), from one source, unless configured.
pub const VISITORS_PER_SOURCE: usize = 48;
const _: () = assert!(VISITORS_PER_SOURCE < VISITORS / 8);
/// One network may have this part of all unauthenticated connections, unless configured.
pub const NETWORK_SHARE: usize = 4;
const _: () = assert!(VISITORS_PER_SOURCE < VISITORS / NETWORK_SHARE);
/// TLS handshakes of one source in a second, unless configured.
pub const HANDSHAKES_PER_SECOND: u32 = 50;
/// The highest rate of handshakes that may be configured: more than a processor can do.
pub const HANDSHAKES_PER_SECOND_MAX: u32 = 100_000;
/// As many visitors as may be configured: each takes a descriptor, of which tunnels want most.
pub const VISITORS_MAX: usize = 16_384;
/// Nameservers that fit in one resolv.conf (MAXNS of resolv.h).
pub const NAMESERVERS_MAX: usize = 3;
/// The longest IPv4 pool prefix: room for the server itself and two clients.
pub const POOL_V4_PREFIX_MAX: u8 = 29;
/// The longest IPv6 pool prefix.
pub const POOL_V6_PREFIX_MAX: u8 = 120;

/// What is wrong with a configuration, in one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing although it was asked for, or cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a value of the wrong type.
    #[error("{}{}: {reason}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line at fault, counted from one.
        line: Option<usize>,
        /// The parser's own words, on one line.
        reason: String,
    },
    /// A value that cannot work.
    #[error("configuration key `{key}`: {reason}")]
    Invalid {
        /// The key at fault.
        key: &'static str,
        /// What to write instead.
        reason: String,
    },
}

/// Which of io_uring's features the packet path may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum IoMode {
    /// The best that this kernel has
    #[default]
    Auto,
    /// Only what Linux 5.10 has
    Baseline,
}

/// `TCP_CA_NAME_MAX` of `include/net/tcp.h`, less the zero at the end.
const CONGESTION_CONTROL_BYTES_MAX: usize = 15;

/// Which cipher protects connections. All but `auto` is meant for comparisons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cipher {
    /// The fastest for the processors at both ends: AES-128-GCM where both have AES in hardware, else ChaCha20-Poly1305.
    #[default]
    Auto,
    /// AES-128-GCM: a client offers nothing else, a server takes it from everyone who offers it.
    #[serde(rename = "aes-128-gcm")]
    Aes128Gcm,
    /// ChaCha20-Poly1305, likewise.
    #[serde(rename = "chacha20-poly1305")]
    Chacha20Poly1305,
}

/// Congestion control of the outer connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum CongestionControl {
    /// CUBIC; BBR, where the kernel has it, from when the path turns out to lose packets.
    #[default]
    Auto,
    /// One of the kernel's by name, from the first byte to the last.
    Named(String),
}

/// The word for a choice that is left to ringtun.
const AUTO: &str = "auto";

impl CongestionControl {
    /// The kernel's name of the one that was asked for; `None` for `auto`.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Auto => None,
            Self::Named(name) => Some(name),
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let Some(name) = self.name() else {
            return Ok(());
        };
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if name.is_empty()
            || name.len() > CONGESTION_CONTROL_BYTES_MAX
            || !name.bytes().all(is_name)
        {
            return invalid(
                "congestion_control",
                "must be \"auto\" or one of `sysctl net.ipv4.tcp_available_congestion_control`",
            );
        }
        Ok(())
    }
}

impl From<String> for CongestionControl {
    fn from(name: String) -> Self {
        if name == AUTO {
            Self::Auto
        } else {
            Self::Named(name)
        }
    }
}

impl From<CongestionControl> for String {
    fn from(control: CongestionControl) -> Self {
        control.name().unwrap_or(AUTO).to_owned()
    }
}

/// How many TCP connections a session has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connections {
    /// By what the path is like: one, [`CONNECTIONS_STRIPED`] or [`CONNECTIONS_SLOWED`], and where it is fast one more for
    /// flows that send little.
    #[default]
    Auto,
    /// So many from the beginning.
    Fixed(usize),
}

impl Connections {
    /// How many a client begins with.
    pub fn at_first(self) -> usize {
        match self {
            Self::Auto => 1,
            Self::Fixed(connections) => connections,
        }
    }

    /// How many it may come to have.
    pub fn at_most(self) -> usize {
        match self {
            Self::Auto => CONNECTIONS_STRIPED,
            Self::Fixed(connections) => connections,
        }
    }

    fn validate(self) -> Result<(), ConfigError> {
        match self {
            Self::Fixed(connections) if !(1..=CONNECTIONS_MAX).contains(&connections) => invalid(
                "connections",
                format!("must be {AUTO:?} or 1 to {CONNECTIONS_MAX}"),
            ),
            Self::Fixed(_) | Self::Auto => Ok(()),
        }
    }
}

impl Serialize for Connections {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str(AUTO),
            Self::Fixed(connections) => connections.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Connections {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrAuto)
    }
}

struct NumberOrAuto;

impl Visitor<'_> for NumberOrAuto {
    type Value = Connections;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{AUTO:?} or a number from 1 to {CONNECTIONS_MAX}")
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<Connections, E> {
        match word {
            AUTO => Ok(Connections::Auto),
            other => Err(E::invalid_value(Unexpected::Str(other), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Connections, E> {
        let refused = |_| E::invalid_value(Unexpected::Signed(number), &self);
        usize::try_from(number)
            .map(Connections::Fixed)
            .map_err(refused)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Connections, E> {
        let refused = |_| E::invalid_value(Unexpected::Unsigned(number), &self);
        usize::try_from(number)
            .map(Connections::Fixed)
            .map_err(refused)
    }
}

/// How many unauthenticated connections a server has at a time, and how many handshakes it does for
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections that are no tunnels (yet), all sources together.
    pub visitors: usize,
    /// Connections that are no tunnels (yet), from one IPv4 address or the /64 of one IPv6 address.
    pub visitors_per_source: usize,
    /// Connections that are no tunnels (yet), from one IPv4 /24 or IPv6 /48; unset: a quarter of
    /// `visitors`, or `visitors_per_source` where that is more.
    pub visitors_per_network: Option<usize>,
    /// TLS handshakes per second of one IPv4 address or IPv6 /64. A /56 has twice, a /24 or /48
    /// four times as many.
    pub handshakes_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            visitors: VISITORS,
            visitors_per_source: VISITORS_PER_SOURCE,
            visitors_per_network: None,
            handshakes_per_second: HANDSHAKES_PER_SECOND,
        }
    }
}

impl Limits {
    /// `visitors_per_network`, as it is configured or follows from the others.
    pub fn network_visitors(self) -> usize {
        let share = self.visitors.div_ceil(NETWORK_SHARE);
        self.visitors_per_network
            .unwrap_or_else(|| share.max(self.visitors_per_source))
    }

    fn validate(self) -> Result<(), ConfigError> {
        if self.visitors == 0 || self.visitors > VISITORS_MAX {
            return invalid("limits.visitors", format!("must be 1 to {VISITORS_MAX}"));
        }
        if self.visitors_per_source == 0 || self.visitors_per_source > self.visitors {
            return invalid(
                "limits.visitors_per_source",
                format!("must be 1 to {}, the limit for all sources", self.visitors),
            );
        }
        if !(self.visitors_per_source..=self.visitors).contains(&self.network_visitors()) {
            return invalid(
                "limits.visitors_per_network",
                format!(
                    "must be {} to {}, the limits for a source and for all",
                    self.visitors_per_source, self.visitors
                ),
            );
        }
        if !(1..=HANDSHAKES_PER_SECOND_MAX).contains(&self.handshakes_per_second) {
            return invalid(
                "limits.handshakes_per_second",
                format!("must be 1 to {HANDSHAKES_PER_SECOND_MAX}"),
            );
        }
        Ok(())
    }
}

/// The server's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Addresses and ports to listen on. `[::]` takes IPv4 as well.
    pub listen: Vec<SocketAddr>,
    /// Where peers, leases, certificate and key are kept.
    pub state_dir: PathBuf,
    /// The TUN interface's name.
    pub interface: String,
    /// The TUN interface's MTU.
    pub mtu: u16,
    /// Inner IPv4 addresses: the first is the server's, the others are leased to peers.
    pub pool_v4: Ipv4Net,
    /// Inner IPv6 addresses; unset: an `fd00::/8` prefix made at first start and kept in the state directory.
    pub pool_v6: Option<Ipv6Net>,
    /// Nameservers told to clients; unset: the server's own, where clients can reach them; empty: none.
    pub dns: Option<Vec<IpAddr>>,
    /// Worker threads and TUN queues; unset: one per core.
    pub workers: Option<usize>,
    /// What of io_uring the workers use.
    pub io: IoMode,
    /// Whether the interface gives and takes segments of up to 64 KiB; without, the packet path costs several times more.
    pub offload: bool,
    /// Which cipher protects connections.
    pub cipher: Cipher,
    /// Congestion control of the outer connections.
    pub congestion_control: CongestionControl,
    /// A certificate chain (PEM) to use in place of the generated one. Needs `private_key`.
    pub certificate: Option<PathBuf>,
    /// The certificate's private key (PEM).
    pub private_key: Option<PathBuf>,
    /// Whether peers may reach each other's inner addresses.
    pub client_to_client: bool,
    /// A plain HTTP server that answers everyone who is not a client, `http://HOST:PORT`; unset: the built-in page.
    pub site: Option<String>,
    /// How many unauthenticated connections it has at a time: the table `[limits]`.
    pub limits: Limits,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            listen: vec![
                SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 443),
                SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 80),
            ],
            state_dir: STATE_DIR.into(),
            interface: INTERFACE.into(),
            mtu: MTU_BYTES,
            pool_v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 87, 0, 0), 16),
            pool_v6: None,
            dns: None,
            workers: None,
            io: IoMode::default(),
            offload: true,
            cipher: Cipher::default(),
            congestion_control: CongestionControl::default(),
            certificate: None,
            private_key: None,
            client_to_client: false,
            site: None,
            limits: Limits::default(),
        }
    }
}

impl ServerConfig {
    /// Reads `path`, or the default path where that exists, or returns the defaults.
    ///
    /// # Errors
    /// [`ConfigError::Read`] and [`ConfigError::Parse`]; values are checked by [`ServerConfig::validate`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        load(path, Path::new(SERVER_CONFIG_PATH))
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the key and what is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.listen.is_empty() || self.listen.len() > LISTENERS_MAX {
            return invalid(
                "listen",
                format!("1 to {LISTENERS_MAX} addresses are needed"),
            );
        }
        if let Some(address) = self.listen.iter().find(|address| address.port() == 0) {
            return invalid("listen", format!("{address} has no port"));
        }
        validate_interface(&self.interface)?;
        validate_mtu(self.mtu)?;
        self.congestion_control.validate()?;
        if self.pool_v4.prefix_len() > POOL_V4_PREFIX_MAX {
            return invalid(
                "pool_v4",
                format!("the prefix may not be longer than /{POOL_V4_PREFIX_MAX}"),
            );
        }
        if self.pool_v4.trunc() != self.pool_v4 {
            return invalid(
                "pool_v4",
                format!("has host bits set; write {}", self.pool_v4.trunc()),
            );
        }
        if let Some(pool) = self.pool_v6 {
            if pool.prefix_len() > POOL_V6_PREFIX_MAX {
                return invalid(
                    "pool_v6",
                    format!("the prefix may not be longer than /{POOL_V6_PREFIX_MAX}"),
                );
            }
            if pool.trunc() != pool {
                return invalid(
                    "pool_v6",
                    format!("has host bits set; write {}", pool.trunc()),
                );
            }
        }
        validate_dns(self.dns.as_deref())?;
        validate_workers(self.workers)?;
        self.limits.validate()?;
        match (&self.certificate, &self.private_key) {
            (Some(_), None) => return invalid("certificate", "needs `private_key` as well"),
            (None, Some(_)) => return invalid("private_key", "needs `certificate` as well"),
            _ => {}
        }
        if let Some(site) = &self.site {
            site_authority(site).map_err(|reason| ConfigError::Invalid {
                key: "site",
                reason,
            })?;
        }
        Ok(())
    }

    /// `HOST:PORT` of the site behind this server, if there is one.
    pub fn site_authority(&self) -> Option<String> {
        self.site
            .as_deref()
            .and_then(|site| site_authority(site).ok())
    }
}

/// How the client sends the host's traffic into the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Routing {
    /// Two half-default routes per family through the tunnel, and an exception route for the server's address.
    #[default]
    SplitDefault,
}

/// The client's configuration.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientConfig {
    /// The invite, unless it comes from the command line or the environment. A secret.
    pub invite: Option<String>,
    /// The TUN interface's name.
    pub interface: String,
    /// The TUN interface's MTU.
    pub mtu: u16,
    /// TCP connections in the session.
    pub connections: Connections,
    /// Worker threads and TUN queues, no more than connections; unset: two where their number is left open, else one per
    /// core, and no more than cores.
    pub workers: Option<usize>,
    /// What of io_uring the workers use.
    pub io: IoMode,
    /// Whether the interface gives and takes segments of up to 64 KiB; without, the packet path costs several times more.
    pub offload: bool,
    /// Which cipher protects connections.
    pub cipher: Cipher,
    /// Congestion control of the outer connections.
    pub congestion_control: CongestionControl,
    /// How traffic gets into the tunnel.
    pub routing: Routing,
    /// Nameservers to use while the tunnel is up; unset: the server's; empty: leave the resolver alone.
    pub dns: Option<Vec<IpAddr>>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            invite: None,
            interface: INTERFACE.into(),
            mtu: MTU_BYTES,
            connections: Connections::default(),
            workers: None,
            io: IoMode::default(),
            offload: true,
            cipher: Cipher::default(),
            congestion_control: CongestionControl::default(),
            routing: Routing::default(),
            dns: None,
        }
    }
}

impl std::fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientConfig")
            .field("invite", &self.invite.as_ref().map(|_| "(secret)"))
            .field("interface", &self.interface)
            .field("mtu", &self.mtu)
            .field("connections", &self.connections)
            .field("workers", &self.workers)
            .field("io", &self.io)
            .field("offload", &self.offload)
            .field("cipher", &self.cipher)
            .field("congestion_control", &self.congestion_control)
            .field("routing", &self.routing)
            .field("dns", &self.dns)
            .finish()
    }
}

impl ClientConfig {
    /// Reads `path`, or the default path where that exists, or returns the defaults.
    ///
    /// # Errors
    /// [`ConfigError::Read`] and [`ConfigError::Parse`]; values are checked by [`ClientConfig::validate`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        load(path, Path::new(CLIENT_CONFIG_PATH))
    }

    /// Checks every value but the invite, which is parsed by itself.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the key and what is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate_interface(&self.interface)?;
        validate_mtu(self.mtu)?;
        self.congestion_control.validate()?;
        self.connections.validate()?;
        validate_workers(self.workers)?;
        validate_dns(self.dns.as_deref())
    }

    /// Workers and TUN queues for a host with `cores` cores: no more than there may be connections to serve.
    ///
    /// Unless configured, the second of two is for flows that send little, where a fast path keeps the first one busy. They are
    /// made before it is known what the path is like.
    pub fn worker_count(&self, cores: usize) -> usize {
        let unless_configured = match self.connections {
            Connections::Auto => cores.min(CLIENT_WORKERS),
            Connections::Fixed(_) => cores,
        };
        self.workers
            .unwrap_or(unless_configured)
            .min(self.connections.at_most())
            .clamp(1, WORKERS_MAX)
    }
}

impl ServerConfig {
    /// Workers and TUN queues for a host with `cores` cores.
    pub fn worker_count(&self, cores: usize) -> usize {
        self.workers.unwrap_or(cores).clamp(1, WORKERS_MAX)
    }
}

/// An explicit file must be there; the default one need not be.
fn load<T: DeserializeOwned + Default>(
    explicit: Option<&Path>,
    default: &Path,
) -> Result<T, ConfigError> {
    let path = explicit.unwrap_or(default);
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && explicit.is_none() => {
            return Ok(T::default());
        }
        Err(source) => {
            return Err(ConfigError::Read {
                path: path.into(),
                source,
            });
        }
    };
    parse(path, &text)
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| ConfigError::Parse {
        path: path.into(),
        line: error
            .span()
            .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1),
        reason: error
            .message()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
    })
}

fn invalid<T>(key: &'static str, reason: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid {
        key,
        reason: reason.into(),
    })
}

/// As the kernel's dev_valid_name, without `%` (which it takes for a template) and the names it keeps for itself.
fn validate_interface(name: &str) -> Result<(), ConfigError> {
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if name.is_empty() || name.len() > INTERFACE_BYTES_MAX || !plain {
        return invalid(
            "interface",
            format!(
                "{name:?} is not a name of 1 to {INTERFACE_BYTES_MAX} letters, digits, `-`, `_` or `.`"
            ),
        );
    }
    if matches!(name, "." | ".." | "all" | "default" | "lo") {
        return invalid("interface", format!("{name:?} is taken"));
    }
    Ok(())
}

fn validate_mtu(mtu: u16) -> Result<(), ConfigError> {
    if mtu < MTU_BYTES_MIN {
        return invalid("mtu", format!("must be {MTU_BYTES_MIN} to {MTU_BYTES_MAX}"));
    }
    Ok(())
}

fn validate_dns(dns: Option<&[IpAddr]>) -> Result<(), ConfigError> {
    if dns.is_some_and(|dns| dns.len() > NAMESERVERS_MAX) {
        return invalid(
            "dns",
            format!("at most {NAMESERVERS_MAX} nameservers are used by resolvers"),
        );
    }
    Ok(())
}

fn validate_workers(workers: Option<usize>) -> Result<(), ConfigError> {
    if workers.is_some_and(|workers| workers == 0 || workers > WORKERS_MAX) {
        return invalid("workers", format!("must be 1 to {WORKERS_MAX}"));
    }
    Ok(())
}

/// `HOST:PORT` out of `http://HOST[:PORT][/]`, or what is wrong with it.
fn site_authority(url: &str) -> Result<String, String> {
    let form = || format!("{url:?} is not of the form http://HOST:PORT");
    let authority = url.strip_prefix("http://").ok_or_else(form)?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    if authority.is_empty()
        || authority.contains(['/', '?', '#', '@'])
        || authority.contains(char::is_whitespace)
    {
        return Err(form());
    }
    let after_address = authority.rfind(']').map_or(0, |end| end + 1);
    match authority[after_address..].rsplit_once(':') {
        None => Ok(format!("{authority}:80")),
        Some((_, port)) if port.parse::<u16>().is_ok_and(|port| port != 0) => Ok(authority.into()),
        Some(_) => Err(form()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(text: &str) -> Result<ServerConfig, ConfigError> {
        let config: ServerConfig = parse(Path::new("server.toml"), text)?;
        config.validate()?;
        Ok(config)
    }

    fn client(text: &str) -> Result<ClientConfig, ConfigError> {
        let config: ClientConfig = parse(Path::new("client.toml"), text)?;
        config.validate()?;
        Ok(config)
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(server("").expect("valid"), ServerConfig::default());
        assert_eq!(client("").expect("valid"), ClientConfig::default());
    }

    #[test]
    fn every_server_key_is_read() {
        let config = server(
            r#"
            listen = ["0.0.0.0:8443", "[2001:db8::1]:80"]
            state_dir = "/srv/ringtun"
            interface = "rt1"
            mtu = 1400
            pool_v4 = "10.9.0.0/24"
            pool_v6 = "fd09::/64"
            dns = ["9.9.9.9"]
            workers = 3
            io = "baseline"
            offload = false
            cipher = "aes-128-gcm"
            congestion_control = "auto"
            certificate = "/c.pem"
            private_key = "/k.pem"
            client_to_client = true
            site = "http://127.0.0.1:8080"
            [limits]
            visitors = 2000
            visitors_per_source = 500
            visitors_per_network = 900
            handshakes_per_second = 70
            "#,
        )
        .expect("valid");
        assert_eq!(
            config.listen[1],
            "[2001:db8::1]:80".parse().expect("address")
        );
        assert_eq!(config.mtu, 1400);
        assert_eq!(config.worker_count(64), 3);
        assert_eq!(config.io, IoMode::Baseline);
        assert!(!config.offload);
        assert_eq!(config.cipher, Cipher::Aes128Gcm);
        assert_eq!(config.congestion_control, CongestionControl::Auto);
        assert_eq!(config.site_authority().as_deref(), Some("127.0.0.1:8080"));
        assert!(config.client_to_client);
        assert_eq!(config.limits.visitors, 2000);
        assert_eq!(config.limits.visitors_per_source, 500);
        assert_eq!(config.limits.network_visitors(), 900);
        assert_eq!(config.limits.handshakes_per_second, 70);
    }

    #[test]
    fn a_raised_source_limit_raises_its_networks() {
        let config = server("limits.visitors_per_source = 500").expect("valid");
        assert_eq!(config.limits.network_visitors(), 500);
        assert_eq!(
            Limits::default().network_visitors(),
            VISITORS / NETWORK_SHARE
        );
    }

    #[test]
    fn every_client_key_is_read() {
        let config = client(
            r#"
            invite = "ringtun://x"
            interface = "rt1"
            mtu = 1280
            connections = 4
            workers = 8
            io = "auto"
            offload = false
            cipher = "chacha20-poly1305"
            congestion_control = "dctcp"
            routing = "split-default"
            dns = []
            "#,
        )
        .expect("valid");
        assert_eq!(config.connections, Connections::Fixed(4));
        assert_eq!(config.worker_count(64), 4);
        assert_eq!(config.io, IoMode::Auto);
        assert!(!config.offload);
        assert_eq!(config.cipher, Cipher::Chacha20Poly1305);
        assert_eq!(config.congestion_control.name(), Some("dctcp"));
        assert_eq!(config.dns, Some(vec![]));
        assert!(!format!("{config:?}").contains("ringtun://x"));
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = server("mtu = 1400\nlisten_on = 3\n")
            .expect_err("unknown key")
            .to_string();
        assert!(error.starts_with("server.toml:2: "), "{error}");
        assert!(error.contains("listen_on"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn unusable_values_name_their_key() {
        for (text, key) in [
            ("listen = []", "listen"),
            ("listen = [\"0.0.0.0:0\"]", "listen"),
            ("interface = \"\"", "interface"),
            ("interface = \"sixteen-letters-\"", "interface"),
            ("interface = \"a/b\"", "interface"),
            ("interface = \"lo\"", "interface"),
            ("mtu = 1279", "mtu"),
            ("congestion_control = \"\"", "congestion_control"),
            ("congestion_control = \"BBR\"", "congestion_control"),
            (
                "congestion_control = \"sixteen_letters_\"",
                "congestion_control",
            ),
            ("pool_v4 = \"10.0.0.0/30\"", "pool_v4"),
            ("pool_v4 = \"10.0.0.1/24\"", "pool_v4"),
            ("pool_v6 = \"fd00::/121\"", "pool_v6"),
            ("pool_v6 = \"fd00::1/64\"", "pool_v6"),
            (
                "dns = [\"1.1.1.1\", \"1.1.1.2\", \"1.1.1.3\", \"1.1.1.4\"]",
                "dns",
            ),
            ("workers = 0", "workers"),
            ("certificate = \"/c.pem\"", "certificate"),
            ("private_key = \"/k.pem\"", "private_key"),
            ("site = \"https://example.org\"", "site"),
            ("site = \"http://example.org/path\"", "site"),
            ("site = \"http://example.org:0\"", "site"),
            ("limits.visitors = 0", "limits.visitors"),
            ("limits.visitors = 16385", "limits.visitors"),
            (
                "limits.visitors_per_source = 1025",
                "limits.visitors_per_source",
            ),
            (
                "limits.visitors_per_network = 47",
                "limits.visitors_per_network",
            ),
            (
                "limits.visitors_per_network = 1025",
                "limits.visitors_per_network",
            ),
            (
                "limits.handshakes_per_second = 0",
                "limits.handshakes_per_second",
            ),
        ] {
            let error = server(text).expect_err(text).to_string();
            assert!(error.contains(&format!("`{key}`")), "{text}: {error}");
            assert!(!error.contains('\n'), "{text}: {error}");
        }
        for (text, key) in [
            ("connections = 0", "connections"),
            ("connections = 17", "connections"),
        ] {
            let error = client(text).expect_err(text).to_string();
            assert!(error.contains(&format!("`{key}`")), "{text}: {error}");
        }
    }

    #[test]
    fn connections_are_a_number_or_found_out() {
        for (text, connections) in [
            ("", Connections::Auto),
            ("connections = \"auto\"", Connections::Auto),
            ("connections = 1", Connections::Fixed(1)),
            ("connections = 16", Connections::Fixed(16)),
        ] {
            let config = client(text).expect("valid");
            assert_eq!(config.connections, connections, "{text}");
            let sent = serde_json::to_string(&config).expect("serialised");
            let received: ClientConfig = serde_json::from_str(&sent).expect("parsed");
            assert!(received == config, "{sent}");
        }
        for text in ["\"many\"", "-1", "1.5", "true"] {
            let error = client(&format!("connections = {text}")).expect_err(text);
            let error = error.to_string();
            assert!(
                error.contains("\"auto\" or a number from 1 to 16"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_client_has_no_more_workers_than_connections_that_are_sure_to_use_them() {
        for (text, workers) in [
            ("", 2),
            ("workers = 1", 1),
            ("workers = 64", CONNECTIONS_STRIPED),
            ("connections = 1\nworkers = 2", 1),
            ("connections = 3", 3),
            ("connections = 16", 8),
            ("connections = 16\nworkers = 2", 2),
        ] {
            assert_eq!(
                client(text).expect("valid").worker_count(8),
                workers,
                "{text}"
            );
        }
    }

    #[test]
    fn site_addresses_get_a_port() {
        for (url, authority) in [
            ("http://example.org", "example.org:80"),
            ("http://example.org:8080/", "example.org:8080"),
            ("http://[::1]", "[::1]:80"),
            ("http://[::1]:8080", "[::1]:8080"),
        ] {
            assert_eq!(site_authority(url).as_deref(), Ok(authority));
        }
    }

    #[test]
    fn only_an_explicit_file_must_exist() {
        let missing = Path::new("/nonexistent/ringtun.toml");
        assert_eq!(
            load::<ServerConfig>(None, missing).expect("defaults"),
            ServerConfig::default()
        );
        assert!(matches!(
            load::<ServerConfig>(Some(missing), missing),
            Err(ConfigError::Read { .. })
        ));
    }

    #[test]
    fn configurations_survive_the_way_to_the_daemon() {
        let config = ServerConfig {
            dns: Some(vec![]),
            ..ServerConfig::default()
        };
        let text = serde_json::to_string(&config).expect("serialised");
        assert_eq!(
            serde_json::from_str::<ServerConfig>(&text).expect("parsed"),
            config
        );
    }
}
