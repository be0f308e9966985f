//! Invites: all that a client has to know, on one line.
//!
//! `ringtun://TOKEN@HOST[:PORT][?pin=PIN][&sni=NAME]`. The token makes it a secret: only [`std::fmt::Display`] shows
//! it, and no error repeats it. The secrets of the wire are made here, too: it is the only part of the protocol that
//! needs random numbers and hashes.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use aws_lc_rs::{digest, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::proto::http::{INSTANCE_BYTES, InstanceId, TOKEN_BYTES, Token, TokenError};

/// The port of an invite that names none.
pub const PORT_DEFAULT: u16 = 443;
/// The longest invite.
pub const INVITE_BYTES_MAX: usize = 1024;
/// The longest host name (RFC 1035, section 2.3.4, as text without the last dot).
pub const HOST_NAME_BYTES_MAX: usize = 253;
/// The bytes of a [`Pin`], a [`Token::sha256`].
pub const SHA256_BYTES: usize = 32;

const SCHEME: &str = "ringtun://";

/// Where a server is, how to know it, and what to say to be let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invite {
    /// The secret.
    pub token: Token,
    /// The server's name or address.
    pub host: Host,
    /// The server's TCP port.
    pub port: u16,
    /// The server's key, if it is to be known by its key and not by what WebPKI says of its certificate.
    pub pin: Option<Pin>,
    /// The name to ask for in TLS, where it is not the host.
    pub sni: Option<String>,
}

/// A server's name or address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A name to look up.
    Name(String),
    /// An address.
    Ip(IpAddr),
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pin(pub [u8; SHA256_BYTES]);

/// What is wrong with an invite.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// There is nothing.
    #[error("the invite is empty")]
    Empty,
    /// It is longer than any invite.
    #[error("the invite is longer than {INVITE_BYTES_MAX} bytes")]
    TooLong,
    /// It does not begin as invites do.
    #[error("an invite begins with {SCHEME}")]
    Scheme,
    /// There is no `@`.
    #[error("the invite has no token: it must look like {SCHEME}TOKEN@HOST")]
    NoToken,
    /// The token is malformed.
    #[error("the invite's token is malformed or cut short")]
    Token(#[source] TokenError),
    /// There is no host after the `@`.
    #[error("the invite has no host: it must look like {SCHEME}TOKEN@HOST")]
    NoHost,
    /// The host is neither a name nor an address.
    #[error("the invite's host {0:?} is neither a host name nor an IP address")]
    Host(String),
    /// An IPv6 address has no brackets, or what is in brackets is no IPv6 address.
    #[error("the invite's host {0:?} is not an IPv6 address in brackets, such as [2001:db8::1]")]
    Brackets(String),
    /// The port is not a number from 1 to 65535.
    #[error("the invite's port {0:?} is not a number from 1 to 65535")]
    Port(String),
    /// There is a path.
    #[error("the invite has a path after its host, which means nothing")]
    Path,
    /// A parameter has no value.
    #[error("the invite's parameter {0:?} has no value")]
    NoValue(String),
    /// A parameter that this version does not know. What it asks for might matter, so it is not ignored.
    #[error("the invite's parameter {0:?} is unknown: a newer ringtun may be needed")]
    UnknownParameter(String),
    /// A parameter is there twice.
    #[error("the invite's parameter {0:?} is there twice")]
    RepeatedParameter(String),
    /// The pin is not 32 bytes in base64url.
    #[error("the invite's pin is not a SHA-256 in base64url without padding")]
    Pin,
    /// The SNI is not a host name.
    #[error("the invite's sni {0:?} is not a host name")]
    Sni(String),
}

impl Invite {
    /// The name for the TLS handshake: the SNI, or the host.
    pub fn server_name(&self) -> Host {
        match &self.sni {
            Some(name) => Host::Name(name.clone()),
            None => self.host.clone(),
        }
    }

    /// What the Host field of a request says: the name in TLS, and the port unless it is the default.
    pub fn authority(&self) -> String {
        with_port(&self.server_name(), self.port)
    }
}

impl FromStr for Invite {
    type Err = InviteError;

    /// Reads an invite. White space around it is ignored.
    fn from_str(text: &str) -> Result<Self, InviteError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(InviteError::Empty);
        }
        if text.len() > INVITE_BYTES_MAX {
            return Err(InviteError::TooLong);
        }
        let rest = match text.split_at_checked(SCHEME.len()) {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case(SCHEME) => rest,
            _ => return Err(InviteError::Scheme),
        };
        let (token, rest) = rest.split_once('@').ok_or(InviteError::NoToken)?;
        if token.is_empty() {
            return Err(InviteError::NoToken);
        }
        let token = token.parse().map_err(InviteError::Token)?;

        let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
        let authority = match authority.split_once('/') {
            Some((authority, "")) => authority,
            Some(_) => return Err(InviteError::Path),
            None => authority,
        };
        let (host, port) = parse_host_and_port(authority)?;

        let mut pin = None;
        let mut sni = None;
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let repeated = match key {
                "pin" => pin.is_some(),
                "sni" => sni.is_some(),
                _ => return Err(InviteError::UnknownParameter(key.to_owned())),
            };
            if repeated {
                return Err(InviteError::RepeatedParameter(key.to_owned()));
            }
            if value.is_empty() {
                return Err(InviteError::NoValue(key.to_owned()));
            }
            if key == "pin" {
                pin = Some(value.parse()?);
            } else if is_host_name(value) {
                sni = Some(value.to_owned());
            } else {
                return Err(InviteError::Sni(value.to_owned()));
            }
        }
        Ok(Invite {
            token,
            host,
            port: port.unwrap_or(PORT_DEFAULT),
            pin,
            sni,
        })
    }
}

/// The invite as text, the token included.
impl fmt::Display for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{SCHEME}{}@{}",
            self.token.reveal(),
            with_port(&self.host, self.port)
        )?;
        let pin = self.pin.map(|pin| format!("pin={pin}"));
        let sni = self.sni.as_ref().map(|sni| format!("sni={sni}"));
        for (parameter, separator) in pin.into_iter().chain(sni).zip(["?", "&"]) {
            write!(f, "{separator}{parameter}")?;
        }
        Ok(())
    }
}

/// Reads `HOST` or `HOST:PORT`, IPv6 addresses in brackets: an invite's, or that of `ringtun invite --host`.
///
/// # Errors
/// The errors of [`Invite::from_str`] about hosts and ports.
pub fn parse_host_and_port(text: &str) -> Result<(Host, Option<u16>), InviteError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(bracketed) => {
            let malformed = || InviteError::Brackets(text.to_owned());
            let (address, rest) = bracketed.split_once(']').ok_or_else(malformed)?;
            let address: Ipv6Addr = address.parse().map_err(|_| malformed())?;
            let port = match rest.strip_prefix(':') {
                Some(port) => Some(port),
                None if rest.is_empty() => None,
                None => return Err(malformed()),
            };
            (Host::Ip(IpAddr::V6(address)), port)
        }
        None if text.matches(':').count() > 1 => {
            return Err(InviteError::Brackets(text.to_owned()));
        }
        None => {
            let (host, port) = match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            };
            (host.parse()?, port)
        }
    };
    let port = port.map(|port| parse_port(port).ok_or_else(|| InviteError::Port(port.to_owned())));
    Ok((host, port.transpose()?))
}

fn parse_port(text: &str) -> Option<u16> {
    let port = text.parse().ok()?;
    (port != 0 && text.bytes().all(|byte| byte.is_ascii_digit())).then_some(port)
}

fn with_port(host: &Host, port: u16) -> String {
    if port == PORT_DEFAULT {
        host.to_string()
    } else {
        format!("{host}:{port}")
    }
}

/// A name, or an IPv4 address. (IPv6 addresses come in brackets, for [`parse_host_and_port`].)
impl FromStr for Host {
    type Err = InviteError;

    fn from_str(text: &str) -> Result<Self, InviteError> {
        if text.is_empty() {
            Err(InviteError::NoHost)
        } else if let Ok(address) = text.parse() {
            Ok(Host::Ip(IpAddr::V4(address)))
        } else if is_host_name(text) {
            Ok(Host::Name(text.to_owned()))
        } else {
            Err(InviteError::Host(text.to_owned()))
        }
    }
}

/// As in a URL: IPv6 addresses in brackets.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Name(name) => f.write_str(name),
            Host::Ip(IpAddr::V4(address)) => address.fmt(f),
            Host::Ip(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Letters, digits, hyphens and underscores in labels of 1 to 63; the last label is not a number, so that no mistyped
/// address passes as a name.
fn is_host_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len())
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.len() <= HOST_NAME_BYTES_MAX
        && text.split('.').all(is_label)
        && !last.bytes().all(|byte| byte.is_ascii_digit())
}

impl FromStr for Pin {
    type Err = InviteError;

    fn from_str(text: &str) -> Result<Self, InviteError> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InviteError::Pin)?;
        Ok(Pin(bytes.try_into().map_err(|_| InviteError::Pin)?))
    }
}

/// Base64url without padding.
impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

/// The system gives no random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random numbers")]
pub struct NoRandomness;

fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}

impl Token {
    /// A new secret.
    ///
    /// # Errors
    /// [`NoRandomness`].
    pub fn generate() -> Result<Self, NoRandomness> {
        Ok(Token::from_bytes(random::<TOKEN_BYTES>()?))
    }

    /// What a server keeps of a token.
    pub fn sha256(&self) -> [u8; SHA256_BYTES] {
        let digest = digest::digest(&digest::SHA256, self.as_bytes());
        digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

impl InstanceId {
    /// A new client process's id.
    ///
    /// # Errors
    /// [`NoRandomness`].
    pub fn generate() -> Result<Self, NoRandomness> {
        Ok(InstanceId(random::<INSTANCE_BYTES>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOKEN: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";
    const PIN: &str = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk";

    fn parse(rest: &str) -> Result<Invite, InviteError> {
        format!("ringtun://{TOKEN}@{rest}").parse()
    }

    #[test]
    fn a_whole_invite_is_read() {
        let invite = parse(&format!("198.51.100.10:8443?pin={PIN}&sni=www.example.org")).unwrap();
        assert_eq!(
            invite,
            Invite {
                token: Token::from_bytes([7; 32]),
                host: Host::Ip("198.51.100.10".parse().unwrap()),
                port: 8443,
                pin: Some(Pin([9; 32])),
                sni: Some("www.example.org".to_owned()),
            }
        );
        assert_eq!(invite.authority(), "www.example.org:8443");
        assert_eq!(
            invite.server_name(),
            Host::Name("www.example.org".to_owned())
        );
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let invite = parse("vpn.example.org").unwrap();
        assert_eq!(invite.port, 443);
        assert_eq!((invite.pin, &invite.sni), (None, &None));
        assert_eq!(invite.authority(), "vpn.example.org");
        assert_eq!(
            invite.to_string(),
            format!("ringtun://{TOKEN}@vpn.example.org")
        );
    }

    #[test]
    fn other_spellings_are_read() {
        for text in [
            format!("  ringtun://{TOKEN}@a.example:443\n"),
            format!("RINGTUN://{TOKEN}@a.example/"),
            format!("ringtun://{TOKEN}@a.example?"),
            format!("ringtun://{TOKEN}@a.example/?&"),
        ] {
            assert_eq!(text.parse(), parse("a.example"), "{text:?}");
        }
    }

    #[test]
    fn ipv6_hosts_are_in_brackets() {
        let address: IpAddr = "2001:db8::1".parse().unwrap();
        let invite = parse("[2001:db8::1]").unwrap();
        assert_eq!((invite.host.clone(), invite.port), (Host::Ip(address), 443));
        assert_eq!(
            invite.to_string(),
            format!("ringtun://{TOKEN}@[2001:db8::1]")
        );
        assert_eq!(
            parse("[2001:db8::1]:80").unwrap().to_string(),
            format!("ringtun://{TOKEN}@[2001:db8::1]:80")
        );
        for host in [
            "2001:db8::1",
            "2001:db8::1:443",
            "[2001:db8::1",
            "[192.0.2.1]",
            "[::1]x",
            "[]",
            "[::1%eth0]",
        ] {
            assert_eq!(parse(host), Err(InviteError::Brackets(host.to_owned())));
        }
    }

    #[test]
    fn every_malformed_form_has_its_own_error() {
        let read = |text: &str| text.parse::<Invite>().unwrap_err();
        assert_eq!(read(""), InviteError::Empty);
        assert_eq!(read(" \n"), InviteError::Empty);
        assert_eq!(
            read(&"x".repeat(INVITE_BYTES_MAX + 1)),
            InviteError::TooLong
        );
        assert_eq!(read("https://example.org"), InviteError::Scheme);
        assert_eq!(read("r\u{fc}ngtun://example.org"), InviteError::Scheme);
        assert_eq!(read("ringtun://example.org"), InviteError::NoToken);
        assert_eq!(read("ringtun://@example.org"), InviteError::NoToken);
        assert_eq!(
            read("ringtun://a b@example.org"),
            InviteError::Token(TokenError::Encoding)
        );
        assert_eq!(
            read("ringtun://AAAA@example.org"),
            InviteError::Token(TokenError::Length(3))
        );

        let read = |rest: &str| parse(rest).unwrap_err();
        assert_eq!(read(""), InviteError::NoHost);
        assert_eq!(read(":443"), InviteError::NoHost);
        assert_eq!(read("?pin=x"), InviteError::NoHost);
        for host in [
            "a b",
            "a..b",
            ".a",
            "a.",
            "-a.example",
            "256.1.1.1",
            "1.2.3",
            "a@b",
            "b\u{fc}cher.example",
            &"a".repeat(64),
        ] {
            assert_eq!(read(host), InviteError::Host(host.to_owned()), "{host}");
        }
        for port in ["", "0", "65536", "+443", "https", "-1"] {
            assert_eq!(
                read(&format!("a.example:{port}")),
                InviteError::Port(port.to_owned())
            );
            assert_eq!(
                read(&format!("[::1]:{port}")),
                InviteError::Port(port.to_owned())
            );
        }
        assert_eq!(read("a.example/path"), InviteError::Path);
        assert_eq!(
            read("a.example?pin"),
            InviteError::NoValue("pin".to_owned())
        );
        assert_eq!(
            read("a.example?sni="),
            InviteError::NoValue("sni".to_owned())
        );
        assert_eq!(
            read("a.example?key=1"),
            InviteError::UnknownParameter("key".to_owned())
        );
        assert_eq!(
            read(&format!("a?pin={PIN}&pin={PIN}")),
            InviteError::RepeatedParameter("pin".to_owned())
        );
        assert_eq!(read("a.example?pin=AAAA"), InviteError::Pin);
        assert_eq!(read(&format!("a.example?pin={PIN}=")), InviteError::Pin);
        assert_eq!(
            read("a.example?sni=192.0.2.1"),
            InviteError::Sni("192.0.2.1".to_owned())
        );
    }

    #[test]
    fn neither_debug_nor_errors_tell_the_token() {
        let shown = format!("{:?}", parse("a.example").unwrap());
        assert!(!shown.contains(TOKEN), "{shown}");
        for text in [
            format!("http://{TOKEN}@a.example"),
            format!("ringtun://{TOKEN}x@a.example"),
            format!("ringtun://{TOKEN}"),
            format!("ringtun://{TOKEN}@"),
        ] {
            let error = text.parse::<Invite>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains(TOKEN), "{error}");
        }
    }

    #[test]
    fn a_token_is_kept_as_its_hash() {
        // `printf '\0%.0s' $(seq 32) | sha256sum`
        let expected = "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925";
        let hash = Token::from_bytes([0; TOKEN_BYTES]).sha256();
        assert_eq!(hash.map(|byte| format!("{byte:02x}")).concat(), expected);
    }

    #[test]
    fn secrets_differ() {
        assert_ne!(Token::generate().unwrap(), Token::generate().unwrap());
        assert_ne!(
            InstanceId::generate().unwrap(),
            InstanceId::generate().unwrap()
        );
    }

    fn host() -> impl Strategy<Value = Host> {
        prop_oneof![
            any::<IpAddr>().prop_map(Host::Ip),
            "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\\.[a-z]{2,9}".prop_map(Host::Name),
        ]
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(
            token: [u8; 32],
            host in host(),
            port in 1..=u16::MAX,
            pin in proptest::option::of(any::<[u8; 32]>()),
            sni in proptest::option::of("[a-z]{1,20}\\.example"),
        ) {
            let invite = Invite { token: Token::from_bytes(token), host, port, pin: pin.map(Pin), sni };
            prop_assert_eq!(invite.to_string().parse(), Ok(invite));
        }

        #[test]
        fn anything_is_safe_to_read(text: String, rest: String) {
            let _ = text.parse::<Invite>();
            let _ = parse(&rest);
            let _ = parse(&format!("a.example?{rest}"));
        }
    }
}
