//! The answer to an upgrade: what our server sends, and what a client reads.

use super::{Fields, HEAD_BYTES_MAX, HEADERS_MAX, Layer, OFFLOAD_FIELD, OffloadHeader};

/// The status of an interim response that is not the end of the story (RFC 9110, section 15.2).
const INTERIM: std::ops::Range<u16> = 100..200;
const SWITCHING_PROTOCOLS: u16 = 101;

/// What is at the front of the bytes that a client has received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResponseParsed {
    /// The beginning of a head.
    Incomplete,
    /// The tunnel is there.
    Switched {
        /// The offload context, if the server takes it, and what it accepts in it.
        offload: Option<OffloadHeader>,
        /// The head's length: what follows is the tunnel.
        head_bytes: usize,
    },
    /// An ordinary web answer: there is no tunnel here for this token.
    Refused {
        /// The HTTP status.
        status: u16,
    },
}

/// Why an answer cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// It is not HTTP/1.
    #[error("the server's answer is not HTTP")]
    Unreadable(#[source] httparse::Error),
    /// The head is above [`HEAD_BYTES_MAX`].
    #[error("the server's answer has a head of more than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    /// It switches protocols, but not to the one that was asked for, or without capsules.
    #[error("the server switched to something other than the tunnel that was asked for")]
    NotThisTunnel,
}

/// Reads the answer to an upgrade request. `stream` holds all that was received so far.
///
/// # Errors
/// The answer is no HTTP, or not one to the question.
pub fn parse_response(layer: Layer, stream: &[u8]) -> Result<ResponseParsed, ResponseError> {
    let mut start = 0;
    loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Response::new(&mut headers);
        let status = head
            .parse(stream.get(start..).unwrap_or_default())
            .map_err(ResponseError::Unreadable)?;
        let httparse::Status::Complete(bytes) = status else {
            return if stream.len() < HEAD_BYTES_MAX {
                Ok(ResponseParsed::Incomplete)
            } else {
                Err(ResponseError::TooLong)
            };
        };
        let end = start + bytes;
        if end > HEAD_BYTES_MAX {
            return Err(ResponseError::TooLong);
        }
        match head.code.unwrap_or_default() {
            SWITCHING_PROTOCOLS => {
                let fields = Fields(head.headers);
                if !fields.upgrades_to(layer) || !fields.speaks_capsules() || fields.has_content() {
                    return Err(ResponseError::NotThisTunnel);
                }
                return Ok(ResponseParsed::Switched {
                    offload: fields.offload(),
                    head_bytes: end,
                });
            }
            status if INTERIM.contains(&status) => start = end,
            status => return Ok(ResponseParsed::Refused { status }),
        }
    }
}

/// The head with which our server grants a tunnel. `offload` has the client's context id, and what this end accepts.
pub fn upgrade_response(layer: Layer, offload: Option<&OffloadHeader>) -> Vec<u8> {
    let mut head = format!(
        "HTTP/1.1 101 Switching Protocols\r\n\
         Connection: Upgrade\r\n\
         Upgrade: {}\r\n\
         Capsule-Protocol: ?1\r\n",
        layer.upgrade_token(),
    );
    if let Some(offload) = offload {
        head += &format!("{OFFLOAD_FIELD}: {offload}\r\n");
    }
    head += "\r\n";
    head.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::strategies;
    use super::*;
    use crate::proto::offload::Offloads;
    use proptest::prelude::*;

    fn parse(head: &str) -> Result<ResponseParsed, ResponseError> {
        parse_response(Layer::Ip, head.replace('\n', "\r\n").as_bytes())
    }

    const GRANTED: &str = "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: connect-ip\nCapsule-Protocol: ?1\n\n";

    #[test]
    fn our_answer_is_as_documented() {
        let offload = OffloadHeader {
            context: 2,
            accepts: Offloads::ALL,
        };
        let head = String::from_utf8(upgrade_response(Layer::Ip, Some(&offload))).unwrap();
        let line = "Ringtun-Offload: 2;csum;tso4;tso6;uso4;uso6\n\n";
        assert_eq!(
            head,
            GRANTED
                .replace("\n\n", &format!("\n{line}"))
                .replace('\n', "\r\n")
        );
    }

    #[test]
    fn interim_answers_are_passed_over() {
        let interim = "HTTP/1.1 103 Early Hints\nLink: </a>\n\nHTTP/1.1 100 Continue\n\n";
        let whole = format!("{interim}{GRANTED}");
        let head_bytes = whole.replace('\n', "\r\n").len();
        let switched = ResponseParsed::Switched {
            offload: None,
            head_bytes,
        };
        assert_eq!(parse(&whole), Ok(switched));
        assert_eq!(parse(interim), Ok(ResponseParsed::Incomplete));
    }

    #[test]
    fn an_ordinary_answer_is_a_refusal() {
        for status in [200, 301, 400, 401, 404, 502] {
            assert_eq!(
                parse(&format!("HTTP/1.1 {status} X\nContent-Length: 3\n\nabc")),
                Ok(ResponseParsed::Refused { status })
            );
        }
    }

    #[test]
    fn another_switch_is_an_error() {
        for (replaced, by) in [
            ("connect-ip", "connect-ethernet"),
            ("connect-ip", "connect-ip, connect-ip"),
            ("Upgrade: connect-ip\n", ""),
            ("Connection: Upgrade\n", ""),
            ("Capsule-Protocol: ?1\n", ""),
            ("?1", "?0"),
            ("\n\n", "\nContent-Length: 0\n\n"),
        ] {
            assert_eq!(
                parse(&GRANTED.replace(replaced, by)),
                Err(ResponseError::NotThisTunnel),
                "{by:?}"
            );
        }
    }

    #[test]
    fn rubbish_and_long_heads_are_errors() {
        assert!(matches!(
            parse("SSH-2.0-OpenSSH_9.2\n"),
            Err(ResponseError::Unreadable(_))
        ));
        let long = format!("HTTP/1.1 200 OK\nA: {}", "a".repeat(HEAD_BYTES_MAX));
        assert_eq!(parse(&long), Err(ResponseError::TooLong));
        assert_eq!(parse(&format!("{long}\n\n")), Err(ResponseError::TooLong));
        let endless = "HTTP/1.1 100 Continue\n\n".repeat(HEAD_BYTES_MAX / 20);
        assert_eq!(parse(&endless), Err(ResponseError::TooLong));
    }

    proptest! {
        #[test]
        fn our_answers_are_understood_under_any_chunking(
            offload in proptest::option::of(strategies::offload()),
            rest: Vec<u8>,
        ) {
            let mut stream = upgrade_response(Layer::Ethernet, offload.as_ref());
            let head_bytes = stream.len();
            stream.extend(rest);
            for end in 0..=stream.len() {
                let expected = if end < head_bytes {
                    ResponseParsed::Incomplete
                } else {
                    ResponseParsed::Switched { offload, head_bytes }
                };
                prop_assert_eq!(parse_response(Layer::Ethernet, &stream[..end]), Ok(expected));
            }
        }

        #[test]
        fn heads_at_the_limits_are_read_or_refused(
            interim in 0..700_usize,
            head in strategies::extreme_head(&[
                "HTTP/1.1 101 Switching Protocols",
                "HTTP/1.1 999 ",
                "HTTP/1.1 000",
                "HTTP/1.1 100 Continue",
                "HTTP/1.0 65536 X",
                "",
            ]),
        ) {
            let stream = [&b"HTTP/1.1 100 Continue\r\n\r\n".repeat(interim)[..], &head].concat();
            match parse_response(Layer::Ip, &stream) {
                Ok(ResponseParsed::Incomplete) => prop_assert!(stream.len() < HEAD_BYTES_MAX),
                Ok(ResponseParsed::Switched { head_bytes, .. }) => {
                    prop_assert!(head_bytes <= stream.len().min(HEAD_BYTES_MAX));
                }
                Ok(ResponseParsed::Refused { .. }) | Err(_) => {}
            }
        }

        #[test]
        fn anything_is_safe_to_read(bytes: Vec<u8>, text in "HTTP/1.1 [0-9]{0,4} ?[ -~\\r\\n]{0,80}") {
            let _ = parse_response(Layer::Ip, &bytes);
            let _ = parse_response(Layer::Ip, text.as_bytes());
        }
    }
}
