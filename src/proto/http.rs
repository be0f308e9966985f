//! The HTTP/1.1 that is spoken inside TLS: the upgrade to a tunnel (RFC 9484, sections 4.2 and 4.3), and the ordinary
//! web answers for everybody else.
//!
//! [`parse_request`] reads what a server is sent and says how near to a tunnel it comes; who the token belongs to is
//! for the caller to find out. The client's side is [`upgrade_request`] and [`parse_response`].

mod request;
mod response;
mod site;

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::capsule::VARINT_MAX;
use super::offload::Offloads;

pub use request::{Parsed, Request, Upgrade, Version, parse_request, upgrade_request};
pub use response::{ResponseError, ResponseParsed, parse_response, upgrade_response};
pub use site::{
    bad_request_response, http_date, redirect_response, site_response, unreadable_response,
};

/// The longest head of a request or response: everything up to and with the empty line.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The most header fields of a request or response.
pub const HEADERS_MAX: usize = 64;
/// The bytes of a token.
pub const TOKEN_BYTES: usize = 32;
/// The bytes of a client instance's id.
pub const INSTANCE_BYTES: usize = 16;
/// The offload context's id, as our client allocates it.
pub const OFFLOAD_CONTEXT: u64 = 2;

/// The header field that carries an [`InstanceId`] and the connection's ordinal.
const INSTANCE_FIELD: &str = "Ringtun-Instance";
/// The parameter of [`INSTANCE_FIELD`] with the connection's ordinal.
const ORDINAL_PARAMETER: &str = "connection";
/// The header field that carries an [`OffloadHeader`].
const OFFLOAD_FIELD: &str = "Ringtun-Offload";

/// What the tunnel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    /// IP packets: `connect-ip` (RFC 9484).
    Ip,
    /// Ethernet frames: `connect-ethernet` (draft-ietf-masque-connect-ethernet).
    Ethernet,
}

impl Layer {
    /// The name in the Upgrade header field.
    pub const fn upgrade_token(self) -> &'static str {
        match self {
            Layer::Ip => "connect-ip",
            Layer::Ethernet => "connect-ethernet",
        }
    }

    /// The request's target: the well-known URI template, with no limit on hosts or protocols.
    pub const fn target(self) -> &'static str {
        match self {
            Layer::Ip => "/.well-known/masque/ip/*/*/",
            Layer::Ethernet => "/.well-known/masque/ethernet/",
        }
    }

    fn from_upgrade_token(token: &str) -> Option<Self> {
        [Layer::Ip, Layer::Ethernet]
            .into_iter()
            .find(|layer| token.eq_ignore_ascii_case(layer.upgrade_token()))
    }
}

/// A client's secret. `Debug` does not show it, and comparing takes the same time whatever differs.
#[derive(Clone)]
pub struct Token([u8; TOKEN_BYTES]);

/// Why a text is not a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is not base64url without padding.
    #[error("not base64url without padding")]
    Encoding,
    /// It does not decode to [`TOKEN_BYTES`] bytes.
    #[error("{0} bytes instead of {TOKEN_BYTES}")]
    Length(usize),
}

impl Token {
    /// The token with these bytes.
    pub const fn from_bytes(bytes: [u8; TOKEN_BYTES]) -> Self {
        Token(bytes)
    }

    /// The secret bytes.
    pub const fn as_bytes(&self) -> &[u8; TOKEN_BYTES] {
        &self.0
    }

    /// The secret as text: base64url without padding. There is no `Display`, so that it is never shown by mistake.
    pub fn reveal(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let bytes = URL_SAFE_NO_PAD
            .decode(text)
            .map_err(|_| TokenError::Encoding)?;
        let length = bytes.len();
        Ok(Token(
            bytes.try_into().map_err(|_| TokenError::Length(length))?,
        ))
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .fold(0, |difference, (one, two)| difference | (one ^ two))
            == 0
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What tells one client process from another with the same token; random, and no secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct InstanceId(pub [u8; INSTANCE_BYTES]);

/// As 32 hexadecimal digits.
impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

/// A text is not an [`InstanceId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an instance id is {} hexadecimal digits", 2 * INSTANCE_BYTES)]
pub struct InstanceIdError;

impl FromStr for InstanceId {
    type Err = InstanceIdError;

    fn from_str(text: &str) -> Result<Self, InstanceIdError> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != INSTANCE_BYTES || !rest.is_empty() {
            return Err(InstanceIdError);
        }
        let mut id = [0; INSTANCE_BYTES];
        for (byte, [high, low]) in id.iter_mut().zip(pairs) {
            *byte =
                16 * digit(*high).ok_or(InstanceIdError)? + digit(*low).ok_or(InstanceIdError)?;
        }
        Ok(InstanceId(id))
    }
}

/// The field `Ringtun-Offload`, in requests and in responses: the context id under which packets come with a
/// `virtio_net_hdr`, and what its sender *accepts* in it.
///
/// On the wire a structured field item (RFC 9651): `2;csum;tso4;tso6`. Parameters of unknown names are ignored. A
/// field that is malformed is ignored as a whole, as RFC 9651 wants; the tunnel then has context 0 only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffloadHeader {
    /// The context id: the client's choice, so even, and not 0.
    pub context: u64,
    /// What the sender takes unsegmented and without checksums.
    pub accepts: Offloads,
}

impl OffloadHeader {
    /// Reads a field's value; `None` if it is to be ignored.
    pub fn parse(value: &str) -> Option<Self> {
        // The longest integer of a structured field.
        const DIGITS_MAX: usize = 15;
        let (context, parameters) = value.split_once(';').unwrap_or((value, ""));
        let context = context.trim_end_matches(' ');
        if context.len() > DIGITS_MAX || !context.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let context: u64 = context.parse().ok()?;
        if context == 0 || !context.is_multiple_of(2) || context > VARINT_MAX {
            return None;
        }
        let accepts: Offloads = parameters.parse().unwrap_or_else(|never| match never {});
        Some(OffloadHeader {
            context,
            // No super-packet comes with a whole checksum, so nothing is of use without `csum`.
            accepts: if accepts.csum {
                accepts
            } else {
                Offloads::NONE
            },
        })
    }
}

impl fmt::Display for OffloadHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.context)?;
        if self.accepts == Offloads::NONE {
            Ok(())
        } else {
            write!(f, ";{}", self.accepts)
        }
    }
}

/// Everything in a request for a tunnel that is of interest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpgradeRequest {
    /// What the tunnel carries.
    pub layer: Layer,
    /// The client's secret.
    pub token: Token,
    /// The client process; other CONNECT-IP clients do not say.
    pub instance: Option<InstanceId>,
    /// This connection's place among those of the same instance. Both ends number them alike, and so pick the same
    /// one for a flow.
    pub ordinal: Option<u8>,
    /// The offload context that the client proposes, and what it accepts.
    pub offload: Option<OffloadHeader>,
}

/// The header fields of a head.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [httparse::Header<'a>]);

/// A field that must not be there more than once, or not as anything but text.
struct Unclear;

impl<'a> Fields<'a> {
    fn values(self, name: &'static str) -> impl Iterator<Item = &'a [u8]> {
        let named = self
            .0
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name));
        named.map(|header| header.value)
    }

    fn has(self, name: &'static str) -> bool {
        self.values(name).next().is_some()
    }

    /// The value of a field that can be there once.
    fn one(self, name: &'static str) -> Result<Option<&'a str>, Unclear> {
        let mut values = self.values(name);
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(value), None) => str::from_utf8(value)
                .map(|value| Some(value.trim()))
                .map_err(|_| Unclear),
            (Some(_), Some(_)) => Err(Unclear),
        }
    }

    /// The members of a comma-separated list, which may be spread over several fields.
    fn list(self, name: &'static str) -> impl Iterator<Item = &'a str> {
        self.values(name)
            .filter_map(|value| str::from_utf8(value).ok())
            .flat_map(|value| value.split(','))
            .map(str::trim)
            .filter(|member| !member.is_empty())
    }

    fn lists(self, name: &'static str, member: &str) -> bool {
        self.list(name)
            .any(|listed| listed.eq_ignore_ascii_case(member))
    }

    /// `Capsule-Protocol: ?1`, with or without parameters (RFC 9297, section 3.4).
    fn speaks_capsules(self) -> bool {
        match self.one("Capsule-Protocol") {
            Ok(Some(value)) => value
                .split(';')
                .next()
                .is_some_and(|item| item.trim_end() == "?1"),
            _ => false,
        }
    }

    /// Exactly one upgrade, to this protocol, and the Connection field that goes with it.
    fn upgrades_to(self, layer: Layer) -> bool {
        let mut protocols = self.list("Upgrade");
        protocols
            .next()
            .is_some_and(|protocol| protocol.eq_ignore_ascii_case(layer.upgrade_token()))
            && protocols.next().is_none()
            && self.lists("Connection", "upgrade")
    }

    /// Whether there is a field that RFC 9297, section 3.2, forbids beside capsules.
    fn has_content(self) -> bool {
        ["Content-Length", "Content-Type", "Transfer-Encoding"]
            .into_iter()
            .any(|name| self.has(name))
    }

    /// A field that is malformed is ignored.
    fn offload(self) -> Option<OffloadHeader> {
        self.one(OFFLOAD_FIELD)
            .ok()
            .flatten()
            .and_then(OffloadHeader::parse)
    }
}

#[cfg(test)]
pub(crate) mod strategies {
    use proptest::prelude::*;

    use super::*;

    /// A head at the limits: as long or of as many fields as is taken, one more, one less, numbers
    /// at the ends of their range, fields twice, bytes that text does not have. It begins with one
    /// of `first`.
    pub(crate) fn extreme_head(first: &[&'static str]) -> impl Strategy<Value = Vec<u8>> {
        let known = [
            "Host: example.org",
            "Connection: Upgrade",
            "Connection: keep-alive, upgrade, close",
            "Upgrade: connect-ip",
            "Capsule-Protocol: ?1",
            "Content-Length: 0",
            "Content-Length: 18446744073709551615",
            "Content-Length: 18446744073709551616",
            "Transfer-Encoding: chunked",
            "Authorization: Bearer AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "Authorization: Bearer ",
            "Ringtun-Instance: ffffffffffffffffffffffffffffffff;connection=255",
            "Ringtun-Instance: 00000000000000000000000000000000;connection=256",
            "Ringtun-Instance: 0;connection=18446744073709551616",
            "Ringtun-Offload: 999999999999998;csum;tso4;tso6;uso4;uso6",
            "Ringtun-Offload: 9999999999999998;csum",
            "Ringtun-Offload: 0",
            "Ringtun-Offload: 2;;;;",
        ];
        let byte = || prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(b' '), Just(b'\r')];
        let line = move || {
            prop_oneof![
                6 => prop::sample::select(known.to_vec()).prop_map(|line| line.as_bytes().to_vec()),
                1 => prop::collection::vec(byte(), 0..40),
            ]
        };
        let count = prop_oneof![0..10_usize, HEADERS_MAX - 1..=HEADERS_MAX + 1];
        let lines =
            count.prop_flat_map(move |count| (prop::collection::vec(line(), 1..6), Just(count)));
        let lines = lines
            .prop_map(|(lines, count)| lines.into_iter().cycle().take(count).collect::<Vec<_>>());
        let length = prop_oneof![
            2 => Just(None),
            1 => (HEAD_BYTES_MAX - 2..=HEAD_BYTES_MAX + 2).prop_map(Some),
        ];
        let ends = prop::sample::select(vec!["\r\n\r\n", "\n\n", "\r\n", ""]);
        let first = prop::sample::select(first.to_vec());
        (first, lines, length, ends).prop_map(|(first, lines, length, end)| {
            let mut head = first.as_bytes().to_vec();
            for line in lines {
                head.extend(b"\r\n");
                head.extend(line);
            }
            if let Some(length) = length {
                head.extend(b"\r\nA: ");
                head.resize(length.saturating_sub(end.len()).max(head.len()), b'a');
            }
            head.extend(end.as_bytes());
            head
        })
    }

    pub(crate) fn offload() -> impl Strategy<Value = OffloadHeader> {
        (
            prop_oneof![
                1..=499_999_999_999_999_u64,
                Just(1),
                Just(499_999_999_999_999),
            ],
            prop::array::uniform5(any::<bool>()),
        )
            .prop_map(|(half, [csum, tso4, tso6, uso4, uso6])| OffloadHeader {
                context: 2 * half,
                accepts: if csum {
                    Offloads {
                        csum,
                        tso4,
                        tso6,
                        uso4,
                        uso6,
                    }
                } else {
                    Offloads::NONE
                },
            })
    }

    pub(crate) fn upgrade() -> impl Strategy<Value = UpgradeRequest> {
        (
            prop_oneof![Just(Layer::Ip), Just(Layer::Ethernet)],
            any::<[u8; TOKEN_BYTES]>(),
            proptest::option::of((
                any::<[u8; INSTANCE_BYTES]>(),
                proptest::option::of(any::<u8>()),
            )),
            proptest::option::of(offload()),
        )
            .prop_map(|(layer, token, instance, offload)| UpgradeRequest {
                layer,
                token: Token::from_bytes(token),
                instance: instance.map(|(id, _)| InstanceId(id)),
                ordinal: instance.and_then(|(_, ordinal)| ordinal),
                offload,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_does_not_show() {
        let token = Token::from_bytes([b'A'; TOKEN_BYTES]);
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert_eq!(format!("{:#?}", Some(&token)).matches("65").count(), 0);
    }

    #[test]
    fn tokens_of_another_form_are_refused() {
        let good = Token::from_bytes([0xff; TOKEN_BYTES]).reveal();
        assert_eq!(good.len(), 43);
        assert_eq!(good.parse(), Ok(Token::from_bytes([0xff; TOKEN_BYTES])));
        assert_eq!(
            format!("{good}=").parse::<Token>(),
            Err(TokenError::Encoding)
        );
        assert_eq!(
            good.replace('_', "/").parse::<Token>(),
            Err(TokenError::Encoding)
        );
        assert_eq!("".parse::<Token>(), Err(TokenError::Length(0)));
        assert_eq!("AAAA".parse::<Token>(), Err(TokenError::Length(3)));
    }

    #[test]
    fn tokens_are_equal_only_when_every_byte_is() {
        let token = Token::from_bytes([7; TOKEN_BYTES]);
        for place in 0..TOKEN_BYTES {
            let mut other = [7; TOKEN_BYTES];
            other[place] ^= 0x80;
            assert_ne!(token, Token::from_bytes(other));
        }
    }

    #[test]
    fn instance_ids_of_another_form_are_refused() {
        for text in [
            "",
            "00",
            &"0".repeat(31),
            &"0".repeat(33),
            &"0".repeat(34),
            &"g".repeat(32),
            &"\u{fc}".repeat(16),
        ] {
            assert_eq!(text.parse::<InstanceId>(), Err(InstanceIdError), "{text}");
        }
        assert_eq!(
            "000102030405060708090a0b0c0d0EFF".parse(),
            Ok(InstanceId([
                0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255
            ]))
        );
    }

    #[test]
    fn an_offload_field_is_as_documented() {
        let header = OffloadHeader {
            context: OFFLOAD_CONTEXT,
            accepts: Offloads::ALL,
        };
        assert_eq!(header.to_string(), "2;csum;tso4;tso6;uso4;uso6");
        assert_eq!(
            OffloadHeader::parse("2;csum;tso4;tso6;uso4;uso6"),
            Some(header)
        );
    }

    #[test]
    fn an_offload_field_leaves_room_for_more() {
        let csum_tso4 = Offloads {
            csum: true,
            tso4: true,
            ..Offloads::NONE
        };
        let accepts = |value: &str| OffloadHeader::parse(value).map(|header| header.accepts);
        assert_eq!(accepts("2; csum; tso4; new; newer=5"), Some(csum_tso4));
        assert_eq!(accepts("2;csum=?1;tso4;tso6=?0"), Some(csum_tso4));
        assert_eq!(accepts("2"), Some(Offloads::NONE));
        assert_eq!(
            accepts("2;tso4"),
            Some(Offloads::NONE),
            "of no use without csum"
        );
    }

    #[test]
    fn malformed_offload_fields_are_ignored() {
        for value in [
            "",
            ";csum",
            "0;csum",
            "3;csum",
            "-2;csum",
            "+2",
            "2.0",
            "\"2\"",
            "x",
            "1000000000000000",
            "2 2",
        ] {
            assert_eq!(OffloadHeader::parse(value), None, "{value:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(
            token: [u8; TOKEN_BYTES],
            instance: [u8; INSTANCE_BYTES],
            offload in strategies::offload(),
        ) {
            let token = Token::from_bytes(token);
            prop_assert_eq!(token.reveal().parse(), Ok(token));
            let instance = InstanceId(instance);
            prop_assert_eq!(instance.to_string().parse(), Ok(instance));
            prop_assert_eq!(OffloadHeader::parse(&offload.to_string()), Some(offload));
        }

        #[test]
        fn reading_anything_is_safe(text: String) {
            let _ = text.parse::<Token>();
            let _ = text.parse::<InstanceId>();
            let _ = OffloadHeader::parse(&text);
        }
    }
}
