//! Requests: what a server is sent, and what our client sends.

use super::{
    Fields, HEAD_BYTES_MAX, HEADERS_MAX, INSTANCE_FIELD, InstanceId, Layer, OFFLOAD_FIELD,
    ORDINAL_PARAMETER, Token, UpgradeRequest,
};

/// The paths of RFC 9484's and its sibling's well-known URI templates.
const TUNNEL_PATHS: &str = "/.well-known/masque/";

/// What is at the front of the bytes that a server has received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a head.
    Incomplete,
    /// A whole head.
    Request {
        /// The request.
        request: Request,
        /// The head's length: what follows is the body, or the tunnel.
        head_bytes: usize,
    },
    /// No HTTP/1 head, or one above [`HEAD_BYTES_MAX`] or [`HEADERS_MAX`].
    Unreadable,
}

/// The version of HTTP that a request is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0, which knows no upgrade.
    Http10,
    /// HTTP/1.1.
    Http11,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method, as sent: methods are case-sensitive.
    pub method: String,
    /// The request target, as sent.
    pub target: String,
    /// The version.
    pub version: Version,
    /// The Host field; `None` if it is missing, repeated or not a host.
    pub host: Option<String>,
    /// Whether another request can follow on the connection.
    pub keep_alive: bool,
    /// The body's length. Where it cannot be told (chunked, or contradictory), 0, and `keep_alive` is false.
    pub body_bytes: u64,
    /// How near to a tunnel this is.
    pub upgrade: Upgrade,
}

/// How near to a tunnel a request is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// An ordinary request.
    None,
    /// Meant for a tunnel, but not as RFC 9484 wants it, or without a token. To be answered as an ordinary request, but
    /// with a 400 if the token is right.
    Malformed {
        /// The token, if there is one.
        token: Option<Token>,
    },
    /// A tunnel, if the token is right; an ordinary request if not.
    Tunnel(UpgradeRequest),
}

impl Request {
    /// The target's path, without a query. `None` for targets that have none (`*`, and those of CONNECT).
    pub fn path(&self) -> Option<&str> {
        let path = path_and_query(&self.target)?;
        path.split(['?', '#']).next()
    }
}

/// Reads the head at the front of `stream`, which holds all that was received so far.
pub fn parse_request(stream: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    match head.parse(stream) {
        Ok(httparse::Status::Complete(head_bytes)) if head_bytes <= HEAD_BYTES_MAX => {
            let (Some(method), Some(target), Some(version)) =
                (head.method, head.path, head.version)
            else {
                return Parsed::Unreadable;
            };
            let version = if version == 0 {
                Version::Http10
            } else {
                Version::Http11
            };
            Parsed::Request {
                request: understand(method, target, version, Fields(head.headers)),
                head_bytes,
            }
        }
        Ok(httparse::Status::Partial) if stream.len() < HEAD_BYTES_MAX => Parsed::Incomplete,
        Ok(_) | Err(_) => Parsed::Unreadable,
    }
}

fn understand(method: &str, target: &str, version: Version, fields: Fields<'_>) -> Request {
    let body_bytes = body_bytes(fields);
    let stays_open = match version {
        Version::Http10 => fields.lists("Connection", "keep-alive"),
        Version::Http11 => !fields.lists("Connection", "close"),
    };
    let host = fields
        .one("Host")
        .ok()
        .flatten()
        .filter(|host| is_host(host));
    Request {
        method: method.to_owned(),
        target: target.to_owned(),
        version,
        host: host.map(str::to_owned),
        keep_alive: stays_open && body_bytes.is_some(),
        body_bytes: body_bytes.unwrap_or(0),
        upgrade: upgrade(method, target, version, host.is_some(), fields),
    }
}

/// The body's length, if it can be told.
fn body_bytes(fields: Fields<'_>) -> Option<u64> {
    if fields.has("Transfer-Encoding") {
        return None;
    }
    match fields.one("Content-Length") {
        Ok(None) => Some(0),
        Ok(Some(digits)) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    }
}

fn upgrade(
    method: &str,
    target: &str,
    version: Version,
    has_host: bool,
    fields: Fields<'_>,
) -> Upgrade {
    let target = path_and_query(target);
    let named = fields.list("Upgrade").find_map(Layer::from_upgrade_token);
    if named.is_none() && !target.is_some_and(|target| target.starts_with(TUNNEL_PATHS)) {
        return Upgrade::None;
    }
    let token = token(fields);
    let well_formed = |layer: &Layer| {
        method == "GET"
            && version == Version::Http11
            && has_host
            && target.is_some_and(|target| is_target_of(*layer, target))
            && fields.upgrades_to(*layer)
            && fields.speaks_capsules()
            && !fields.has_content()
    };
    match (named.filter(well_formed), token, place(fields)) {
        (Some(layer), Some(token), Ok((instance, ordinal))) => Upgrade::Tunnel(UpgradeRequest {
            layer,
            token,
            instance,
            ordinal,
            offload: fields.offload(),
        }),
        (_, token, _) => Upgrade::Malformed { token },
    }
}

/// `Authorization: Bearer TOKEN` (RFC 6750, section 2.1). The scheme's case does not matter.
fn token(fields: Fields<'_>) -> Option<Token> {
    let (scheme, token) = fields.one("Authorization").ok()??.split_once(' ')?;
    let token = token.trim_start_matches(' ').parse().ok()?;
    scheme.eq_ignore_ascii_case("Bearer").then_some(token)
}

/// `Ringtun-Instance: 0123456789abcdef0123456789abcdef;connection=0`, or none.
fn place(fields: Fields<'_>) -> Result<(Option<InstanceId>, Option<u8>), super::Unclear> {
    let Some(value) = fields.one(INSTANCE_FIELD)? else {
        return Ok((None, None));
    };
    let mut parts = value.split(';').map(str::trim);
    let instance = parts
        .next()
        .unwrap_or_default()
        .parse()
        .map_err(|_| super::Unclear)?;
    let mut ordinal = None;
    for (name, digits) in parts.filter_map(|parameter| parameter.split_once('=')) {
        if name == ORDINAL_PARAMETER {
            ordinal = Some(digits.parse().map_err(|_| super::Unclear)?);
        }
    }
    Ok((Some(instance), ordinal))
}

/// The path of a target in origin-form or absolute-form (RFC 9112, section 3.2), with its query.
pub(super) fn path_and_query(target: &str) -> Option<&str> {
    if target.starts_with('/') {
        return Some(target);
    }
    let (scheme, rest) = target.split_once("://")?;
    if !scheme.eq_ignore_ascii_case("https") && !scheme.eq_ignore_ascii_case("http") {
        return None;
    }
    let end = rest.find(['/', '?', '#']);
    let path = end.and_then(|end| rest.get(end..));
    Some(path.filter(|path| path.starts_with('/')).unwrap_or("/"))
}

/// Whether this is the layer's well-known path, and no narrower one. The asterisks may be percent-encoded.
fn is_target_of(layer: Layer, path: &str) -> bool {
    let is_wildcard = |variable: &str| variable == "*" || variable.eq_ignore_ascii_case("%2A");
    match layer {
        Layer::Ethernet => path == layer.target(),
        Layer::Ip => {
            let variables = path
                .strip_prefix("/.well-known/masque/ip/")
                .and_then(|rest| rest.strip_suffix('/'));
            variables
                .and_then(|variables| variables.split_once('/'))
                .is_some_and(|(target, protocol)| is_wildcard(target) && is_wildcard(protocol))
        }
    }
}

fn is_host(host: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    !host.is_empty() && host.bytes().all(allowed)
}

/// The head with which our client asks for a tunnel. `authority` is the server's name, with the port unless it is 443.
pub fn upgrade_request(authority: &str, upgrade: &UpgradeRequest) -> Vec<u8> {
    assert!(
        is_host(authority),
        "the authority comes from a valid invite"
    );
    let mut head = format!(
        "GET {target} HTTP/1.1\r\n\
         Host: {authority}\r\n\
         Connection: Upgrade\r\n\
         Upgrade: {protocol}\r\n\
         Capsule-Protocol: ?1\r\n\
         Authorization: Bearer {token}\r\n",
        target = upgrade.layer.target(),
        protocol = upgrade.layer.upgrade_token(),
        token = upgrade.token.reveal(),
    );
    if let Some(instance) = upgrade.instance {
        head += &format!("{INSTANCE_FIELD}: {instance}");
        if let Some(ordinal) = upgrade.ordinal {
            head += &format!(";{ORDINAL_PARAMETER}={ordinal}");
        }
        head += "\r\n";
    }
    if let Some(offload) = upgrade.offload {
        head += &format!("{OFFLOAD_FIELD}: {offload}\r\n");
    }
    head += "\r\n";
    head.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::strategies;
    use super::super::{OffloadHeader, TOKEN_BYTES};
    use super::*;
    use crate::proto::offload::Offloads;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const TOKEN_TEXT: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";

    fn the_token() -> Token {
        Token::from_bytes([7; TOKEN_BYTES])
    }

    fn parse(head: &str) -> Request {
        match parse_request(head.as_bytes()) {
            Parsed::Request {
                request,
                head_bytes,
            } => {
                assert_eq!(head_bytes, head.len());
                request
            }
            other => panic!("{other:?} for {head:?}"),
        }
    }

    /// The lines of a well-formed request, one of them replaced.
    fn request_with(replaced: &str, by: &str) -> String {
        let whole = format!(
            "GET /.well-known/masque/ip/*/*/ HTTP/1.1\n\
             Host: example.org\n\
             Connection: Upgrade\n\
             Upgrade: connect-ip\n\
             Capsule-Protocol: ?1\n\
             Authorization: Bearer {TOKEN_TEXT}\n\
             Ringtun-Instance: 000102030405060708090a0b0c0d0e0f;connection=3\n\
             Ringtun-Offload: 2;csum;tso4\n\n"
        );
        assert!(whole.contains(replaced), "{replaced}");
        whole.replace(replaced, by).replace('\n', "\r\n")
    }

    fn the_upgrade() -> UpgradeRequest {
        UpgradeRequest {
            layer: Layer::Ip,
            token: the_token(),
            instance: Some(InstanceId([
                0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
            ])),
            ordinal: Some(3),
            offload: Some(OffloadHeader {
                context: 2,
                accepts: Offloads {
                    csum: true,
                    tso4: true,
                    ..Offloads::NONE
                },
            }),
        }
    }

    #[test]
    fn a_well_formed_request_is_a_tunnel() {
        assert_eq!(
            parse(&request_with("GET", "GET")).upgrade,
            Upgrade::Tunnel(the_upgrade())
        );
    }

    #[test]
    fn another_spelling_of_the_same_is_a_tunnel() {
        for (replaced, by) in [
            ("/.well-known", "https://example.org/.well-known"),
            ("/.well-known", "HTTPS://user@example.org:8443/.well-known"),
            ("/*/*/", "/%2A/%2a/"),
            ("/*/*/", "/*/%2A/"),
            ("Host:", "hOST:"),
            ("Connection: Upgrade", "Connection: keep-alive, upgrade"),
            (
                "Connection: Upgrade",
                "Connection: keep-alive\nConnection: UPGRADE",
            ),
            ("Upgrade: connect-ip", "UPGRADE: Connect-IP"),
            ("?1", "?1;x=y"),
            ("Bearer ", "bearer   "),
            ("connection=3", "connection=3; later=1"),
            ("Ringtun-Offload", "Accept: */*\nRINGTUN-OFFLOAD"),
        ] {
            let upgrade = parse(&request_with(replaced, by)).upgrade;
            assert_eq!(upgrade, Upgrade::Tunnel(the_upgrade()), "{by:?}");
        }
    }

    #[test]
    fn a_foreign_client_needs_neither_of_our_fields() {
        let head = request_with(
            "Ringtun-Instance: 000102030405060708090a0b0c0d0e0f;connection=3\n",
            "",
        )
        .replace("Ringtun-Offload: 2;csum;tso4\r\n", "");
        let plain = UpgradeRequest {
            instance: None,
            ordinal: None,
            offload: None,
            ..the_upgrade()
        };
        assert_eq!(parse(&head).upgrade, Upgrade::Tunnel(plain));
    }

    #[test]
    fn a_malformed_offload_field_leaves_the_tunnel_without() {
        let upgrade = parse(&request_with("2;csum", "3;csum")).upgrade;
        let expected = UpgradeRequest {
            offload: None,
            ..the_upgrade()
        };
        assert_eq!(upgrade, Upgrade::Tunnel(expected));
    }

    #[test]
    fn a_malformed_upgrade_still_tells_the_token() {
        for (replaced, by) in [
            ("GET", "POST"),
            ("GET", "get"),
            ("HTTP/1.1", "HTTP/1.0"),
            ("Host: example.org\n", ""),
            ("Host: example.org\n", "Host: a\nHost: b\n"),
            ("Host: example.org\n", "Host: a b\n"),
            ("Connection: Upgrade\n", ""),
            ("Connection: Upgrade\n", "Connection: close\n"),
            ("Upgrade: connect-ip\n", ""),
            ("Upgrade: connect-ip", "Upgrade: connect-ip, websocket"),
            (
                "Upgrade: connect-ip",
                "Upgrade: connect-ip\nUpgrade: connect-ip",
            ),
            ("Upgrade: connect-ip", "Upgrade: connect-ethernet"),
            ("Upgrade: connect-ip", "Upgrade: websocket"),
            ("Capsule-Protocol: ?1\n", ""),
            ("?1", "?0"),
            ("?1", "1"),
            ("?1", "?1, ?1"),
            ("?1", "?1\nCapsule-Protocol: ?1"),
            ("/*/*/", "/*/*"),
            ("/*/*/", "/*/"),
            ("/*/*/", "/*/*/*/"),
            ("/*/*/", "/*/*/?x=y"),
            ("/*/*/", "/192.0.2.1/*/"),
            ("/*/*/", "/*/17/"),
            ("/*/*/", "/%252A/*/"),
            ("/.well-known/masque/ip/*/*/", "/"),
            ("/.well-known/masque/ip/*/*/", "*"),
            ("connection=3", "connection=256"),
            ("connection=3", "connection="),
            ("000102030405060708090a0b0c0d0e0f", "0001"),
            ("Ringtun-Offload", "Ringtun-Instance"),
            ("Ringtun-Offload: 2;csum;tso4", "Content-Length: 0"),
            ("Ringtun-Offload: 2;csum;tso4", "Content-Type: text/plain"),
            ("Ringtun-Offload: 2;csum;tso4", "Transfer-Encoding: chunked"),
        ] {
            let upgrade = parse(&request_with(replaced, by)).upgrade;
            let expected = Upgrade::Malformed {
                token: Some(the_token()),
            };
            assert_eq!(upgrade, expected, "{by:?}");
        }
    }

    #[test]
    fn without_a_token_there_is_no_tunnel() {
        let whole = format!("Authorization: Bearer {TOKEN_TEXT}\n");
        for by in [
            String::new(),
            "Authorization: Bearer\n".to_owned(),
            "Authorization: Bearer short\n".to_owned(),
            format!("Authorization: Basic {TOKEN_TEXT}\n"),
            format!("Authorization: Bearer {TOKEN_TEXT}=\n"),
            whole.repeat(2),
        ] {
            let upgrade = parse(&request_with(&whole, &by)).upgrade;
            assert_eq!(upgrade, Upgrade::Malformed { token: None }, "{by:?}");
        }
    }

    #[test]
    fn other_requests_are_ordinary() {
        for head in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /.well-known/acme-challenge/x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert_eq!(parse(head).upgrade, Upgrade::None, "{head:?}");
        }
    }

    #[test]
    fn paths_are_found_in_either_form() {
        let path = |target: &str| {
            let request = parse(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
            request.path().map(str::to_owned)
        };
        assert_eq!(path("/").as_deref(), Some("/"));
        assert_eq!(path("/a/b?c=/d").as_deref(), Some("/a/b"));
        assert_eq!(path("http://a/b?c").as_deref(), Some("/b"));
        assert_eq!(path("https://a").as_deref(), Some("/"));
        assert_eq!(path("https://a?b=/c").as_deref(), Some("/"));
        assert_eq!(path("*"), None);
        assert_eq!(path("a:443"), None);
        assert_eq!(path("ftp://a/b"), None);
    }

    #[test]
    fn connections_stay_open_as_http_wants() {
        let keeps = |rest: &str| {
            let request = parse(&format!("GET / HTTP/1.{rest}\r\n\r\n"));
            (request.keep_alive, request.body_bytes)
        };
        assert_eq!(keeps("1\r\nHost: a"), (true, 0));
        assert_eq!(keeps("1\r\nConnection: Close"), (false, 0));
        assert_eq!(keeps("1\r\nConnection: x, close"), (false, 0));
        assert_eq!(keeps("0"), (false, 0));
        assert_eq!(keeps("0\r\nConnection: Keep-Alive"), (true, 0));
        assert_eq!(keeps("1\r\nContent-Length: 12"), (true, 12));
        assert_eq!(keeps("1\r\nContent-Length: +12"), (false, 0));
        assert_eq!(keeps("1\r\nContent-Length: "), (false, 0));
        assert_eq!(
            keeps("1\r\nContent-Length: 99999999999999999999"),
            (false, 0)
        );
        assert_eq!(
            keeps("1\r\nContent-Length: 1\r\nContent-Length: 1"),
            (false, 0)
        );
        assert_eq!(
            keeps("1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1"),
            (false, 0)
        );
    }

    #[test]
    fn rubbish_is_unreadable() {
        for rubbish in [
            &b"\x16\x03\x01\x02\x00\x01"[..],
            b"\0",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost a\r\n\r\n",
            b"GET /\x01 HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: \0\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
        ] {
            assert_eq!(parse_request(rubbish), Parsed::Unreadable, "{rubbish:?}");
        }
    }

    #[test]
    fn heads_are_limited_in_bytes() {
        let head = |bytes: usize| {
            let frame = "GET / HTTP/1.1\r\nHost: a\r\nA: \r\n\r\n";
            format!(
                "GET / HTTP/1.1\r\nHost: a\r\nA: {}\r\n\r\n",
                "a".repeat(bytes - frame.len())
            )
        };
        assert!(matches!(
            parse_request(head(HEAD_BYTES_MAX).as_bytes()),
            Parsed::Request {
                head_bytes: HEAD_BYTES_MAX,
                ..
            }
        ));
        let long = head(HEAD_BYTES_MAX + 1);
        assert_eq!(parse_request(long.as_bytes()), Parsed::Unreadable);
        assert_eq!(
            parse_request(&long.as_bytes()[..HEAD_BYTES_MAX]),
            Parsed::Unreadable
        );
        assert_eq!(
            parse_request(&long.as_bytes()[..HEAD_BYTES_MAX - 1]),
            Parsed::Incomplete
        );
    }

    #[test]
    fn heads_are_limited_in_fields() {
        let head = |fields: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(fields));
        assert!(matches!(
            parse_request(head(HEADERS_MAX).as_bytes()),
            Parsed::Request { .. }
        ));
        assert_eq!(
            parse_request(head(HEADERS_MAX + 1).as_bytes()),
            Parsed::Unreadable
        );
    }

    #[test]
    fn our_request_is_as_documented() {
        let head = String::from_utf8(upgrade_request("example.org", &the_upgrade())).unwrap();
        assert_eq!(head, request_with("GET", "GET"));
    }

    #[test]
    fn the_documents_example_is_a_tunnel() {
        let document = include_str!("../../../docs/protocol.md");
        let start = document
            .find("GET /.well-known")
            .expect("the document has an example");
        let length = document[start..]
            .find("\n\n")
            .expect("the example has an end")
            + 2;
        let head = document[start..start + length].replace('\n', "\r\n");
        let upgrade = UpgradeRequest {
            ordinal: Some(0),
            offload: Some(OffloadHeader {
                context: 2,
                accepts: Offloads::ALL,
            }),
            ..the_upgrade()
        };
        assert_eq!(parse(&head).upgrade, Upgrade::Tunnel(upgrade));
    }

    #[test]
    fn a_request_does_not_show_its_token() {
        let shown = format!("{:?}", parse(&request_with("GET", "GET")));
        assert!(
            !shown.contains(TOKEN_TEXT) && !shown.contains("7, 7"),
            "{shown}"
        );
    }

    /// Something like a request: the parts are right or nearly so.
    fn nearly_a_request() -> impl Strategy<Value = String> {
        let line = prop_oneof![
            Just("Host: example.org".to_owned()),
            Just("Connection: Upgrade".to_owned()),
            Just("Upgrade: connect-ip".to_owned()),
            Just("Upgrade: connect-ethernet".to_owned()),
            Just("Capsule-Protocol: ?1".to_owned()),
            Just(format!("Authorization: Bearer {TOKEN_TEXT}")),
            Just("Ringtun-Instance: 000102030405060708090a0b0c0d0e0f".to_owned()),
            "[A-Za-z-]{0,9}: ?[ -~]{0,20}",
            "[ -~\\x00-\\xff]{0,30}",
        ];
        let first = prop_oneof![
            Just("GET /.well-known/masque/ip/*/*/ HTTP/1.1".to_owned()),
            Just("GET / HTTP/1.0".to_owned()),
            "[A-Z]{1,7} [/a-z%?*:]{1,20} HTTP/1\\.[0-2]",
            "[ -~]{0,30}",
        ];
        (
            first,
            vec(line, 0..10),
            prop_oneof![4 => Just("\r\n"), 1 => Just("\n")],
            any::<bool>(),
        )
            .prop_map(|(first, lines, newline, whole)| {
                let mut head = first;
                for line in lines {
                    head += newline;
                    head += &line;
                }
                head += newline;
                if whole {
                    head += newline;
                }
                head
            })
    }

    proptest! {
        #[test]
        fn our_requests_are_understood(upgrade in strategies::upgrade(), rest: Vec<u8>) {
            let mut stream = upgrade_request("example.org:8443", &upgrade);
            let length = stream.len();
            stream.extend(rest);
            match parse_request(&stream) {
                Parsed::Request { request, head_bytes } => {
                    prop_assert_eq!(head_bytes, length, "what follows is the tunnel's");
                    prop_assert_eq!(request.upgrade, Upgrade::Tunnel(upgrade));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }

        /// Whatever has arrived so far, asking too early changes nothing: a prefix is incomplete or gives the result
        /// of the whole.
        #[test]
        fn any_chunking_gives_the_same(head in nearly_a_request()) {
            let head = head.as_bytes();
            let whole = parse_request(head);
            for cut in 0..head.len() {
                let early = parse_request(&head[..cut]);
                prop_assert!(early == Parsed::Incomplete || early == whole, "{:?} at {}, {:?}", early, cut, whole);
            }
        }

        #[test]
        fn anything_is_safe_to_read(bytes: Vec<u8>) {
            parse_request(&bytes);
        }

        #[test]
        fn heads_at_the_limits_are_read_or_refused(
            head in strategies::extreme_head(&[
                "GET /.well-known/masque/ip/*/*/ HTTP/1.1",
                "GET https://example.org/.well-known/masque/ip/*/*/ HTTP/1.1",
                "GET https://\u{fc}? HTTP/1.1",
                "CONNECT * HTTP/1.0",
                "",
            ]),
            cut in any::<prop::sample::Index>(),
        ) {
            let whole = parse_request(&head);
            match &whole {
                Parsed::Incomplete => prop_assert!(head.len() < HEAD_BYTES_MAX),
                Parsed::Request { head_bytes, request } => {
                    prop_assert!(*head_bytes <= head.len().min(HEAD_BYTES_MAX));
                    request.path();
                }
                Parsed::Unreadable => {}
            }
            let early = parse_request(&head[..cut.index(head.len() + 1)]);
            prop_assert!(early == Parsed::Incomplete || early == whole || head.len() > HEAD_BYTES_MAX);
        }
    }
}
