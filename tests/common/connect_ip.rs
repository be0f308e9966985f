//! A small CONNECT-IP client over HTTP/1.1, written after RFC 9484 and RFC 9297 alone: context 0, and nothing of
//! ringtun's own code or extensions.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use ringtun_lab::Host;
use rustls::ClientConnection;

use super::tls_client;

/// RFC 9297, section 3.5.
pub const DATAGRAM: u64 = 0;
/// RFC 9484, section 4.7.1.
pub const ADDRESS_ASSIGN: u64 = 1;
/// RFC 9484, section 4.7.2.
pub const ADDRESS_REQUEST: u64 = 2;
/// RFC 9484, section 4.7.3.
pub const ROUTE_ADVERTISEMENT: u64 = 3;
/// ringtun's own: why the connection ends.
pub const CLOSE: u64 = 0x2b73_c5a6;
/// A type of the form that RFC 9297, section 5.4 keeps without meaning.
pub const MEANINGLESS: u64 = 0x29 * 1_000_003 + 0x17;

/// What the token is in: `ringtun://TOKEN@HOST...`.
pub fn token_of(invite: &str) -> &str {
    let rest = invite.strip_prefix("ringtun://").expect("an invite");
    rest.split('@').next().expect("a token")
}

/// One capsule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capsule {
    pub kind: u64,
    pub value: Vec<u8>,
}

/// An entry of ADDRESS_ASSIGN or ADDRESS_REQUEST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    pub request_id: u64,
    pub address: IpAddr,
    pub prefix_bits: u8,
}

/// The sending half; may be cloned.
#[derive(Clone)]
pub struct Sender {
    tls: Arc<Mutex<ClientConnection>>,
    socket: Arc<TcpStream>,
}

/// The receiving half.
pub struct Receiver {
    tls: Arc<Mutex<ClientConnection>>,
    socket: Arc<TcpStream>,
    stream: Vec<u8>,
}

/// Connects from a host, upgrades with `token`, and returns the two halves.
pub fn open(host: &Host, to: SocketAddr, token: &str) -> (Sender, Receiver) {
    open_with(host, to, token, "")
}

/// Connects as [`open`] does, with further header fields, each ended by CR LF.
pub fn open_with(host: &Host, to: SocketAddr, token: &str, fields: &str) -> (Sender, Receiver) {
    let mut stream = tls_client::connect(host, to).expect("TLS");
    let request = format!(
        "GET /.well-known/masque/ip/*/*/ HTTP/1.1\r\n\
         Host: www.example.org\r\n\
         Connection: Upgrade\r\n\
         Upgrade: connect-ip\r\n\
         Capsule-Protocol: ?1\r\n\
         Authorization: Bearer {token}\r\n{fields}\r\n"
    );
    stream
        .write_all(request.as_bytes())
        .expect("a request sent");
    let mut received = Vec::new();
    let head_bytes = loop {
        let mut chunk = [0; 4096];
        let bytes = stream.read(&mut chunk).expect("a response");
        assert_ne!(bytes, 0, "the response has an end");
        received.extend_from_slice(&chunk[..bytes]);
        if let Some(end) = received.windows(4).position(|end| end == b"\r\n\r\n") {
            break end + 4;
        }
    };
    check_response(&String::from_utf8_lossy(&received[..head_bytes]));
    received.drain(..head_bytes);

    let tls = Arc::new(Mutex::new(stream.conn));
    let socket = Arc::new(stream.sock);
    let sender = Sender {
        tls: Arc::clone(&tls),
        socket: Arc::clone(&socket),
    };
    let receiver = Receiver {
        tls,
        socket,
        stream: received,
    };
    (sender, receiver)
}

/// RFC 9484, section 4.3.
fn check_response(head: &str) {
    let mut lines = head.split("\r\n");
    assert_eq!(
        lines.next().map(|line| &line[..13]),
        Some("HTTP/1.1 101 "),
        "{head}"
    );
    let fields: Vec<(String, &str)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
        .collect();
    for (name, value) in [
        ("connection", "upgrade"),
        ("upgrade", "connect-ip"),
        ("capsule-protocol", "?1"),
    ] {
        let values: Vec<&str> = fields
            .iter()
            .filter(|field| field.0 == name)
            .map(|field| field.1)
            .collect();
        assert!(
            values.len() == 1 && values[0].eq_ignore_ascii_case(value),
            "{name} is {values:?}:\n{head}"
        );
    }
    assert!(
        !fields.iter().any(|(name, _)| name.starts_with("ringtun")),
        "extensions that nobody asked for:\n{head}"
    );
}

impl Sender {
    /// Sends a capsule. Fails when the connection is gone.
    pub fn send(&self, kind: u64, value: &[u8]) -> io::Result<()> {
        let mut capsule = Vec::new();
        put_varint(&mut capsule, kind);
        put_varint(&mut capsule, value.len() as u64);
        capsule.extend_from_slice(value);
        // Writing under the lock keeps the records in order.
        let mut tls = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        tls.writer().write_all(&capsule)?;
        while tls.wants_write() {
            tls.write_tls(&mut &*self.socket)?;
        }
        Ok(())
    }

    /// Sends an IP packet in context 0.
    pub fn send_packet(&self, packet: &[u8]) -> io::Result<()> {
        self.send(DATAGRAM, &[&[0], packet].concat())
    }

    /// Asks for addresses.
    pub fn request_addresses(&self, requests: &[Assignment]) -> io::Result<()> {
        let mut value = Vec::new();
        for request in requests {
            put_varint(&mut value, request.request_id);
            match request.address {
                IpAddr::V4(address) => {
                    value.push(4);
                    value.extend(address.octets());
                }
                IpAddr::V6(address) => {
                    value.push(6);
                    value.extend(address.octets());
                }
            }
            value.push(request.prefix_bits);
        }
        self.send(ADDRESS_REQUEST, &value)
    }
}

impl Receiver {
    /// Waits for the next capsule of any type.
    pub fn receive(&mut self) -> io::Result<Capsule> {
        loop {
            if let Some((capsule, bytes)) = first_capsule(&self.stream) {
                self.stream.drain(..bytes);
                return Ok(capsule);
            }
            let mut ciphertext = [0; 64 * 1024];
            // Not under the lock, so that sending goes on while nothing comes.
            let bytes = (&*self.socket).read(&mut ciphertext)?;
            if bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut rest = &ciphertext[..bytes];
            let mut tls = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
            while !rest.is_empty() {
                tls.read_tls(&mut rest)?;
                tls.process_new_packets().map_err(io::Error::other)?;
                match tls.reader().read_to_end(&mut self.stream) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    _ => {}
                }
            }
        }
    }

    /// Waits for a capsule of one type and drops all others.
    pub fn receive_kind(&mut self, kind: u64) -> io::Result<Vec<u8>> {
        loop {
            let capsule = self.receive()?;
            if capsule.kind == kind {
                return Ok(capsule.value);
            }
        }
    }

    /// Waits for an IP packet in context 0.
    pub fn receive_packet(&mut self) -> io::Result<Vec<u8>> {
        let mut value = self.receive_kind(DATAGRAM)?;
        let mut rest = value.as_slice();
        let context = take_varint(&mut rest).expect("a context id");
        assert_eq!(context, 0, "no other context was ever agreed upon");
        let header_bytes = value.len() - rest.len();
        value.drain(..header_bytes);
        Ok(value)
    }
}

/// Reads the value of an ADDRESS_ASSIGN.
pub fn assignments(mut value: &[u8]) -> Vec<Assignment> {
    let mut assignments = Vec::new();
    while !value.is_empty() {
        let request_id = take_varint(&mut value).expect("a request id");
        let address = take_address(&mut value);
        let (prefix_bits, rest) = value.split_first().expect("a prefix length");
        value = rest;
        assignments.push(Assignment {
            request_id,
            address,
            prefix_bits: *prefix_bits,
        });
    }
    assignments
}

/// Reads the value of a ROUTE_ADVERTISEMENT: first address, last address, protocol.
pub fn routes(mut value: &[u8]) -> Vec<(IpAddr, IpAddr, u8)> {
    let mut routes = Vec::new();
    while let Some(version) = value.first().copied() {
        let start = take_address(&mut value);
        // The end has no version of its own.
        let end_value = [&[version], value].concat();
        let end = take_address(&mut end_value.as_slice());
        value = &value[if version == 4 { 4 } else { 16 }..];
        let (protocol, rest) = value.split_first().expect("a protocol");
        value = rest;
        routes.push((start, end, *protocol));
    }
    routes
}

fn take_address(value: &mut &[u8]) -> IpAddr {
    let (version, rest) = value.split_first().expect("an IP version");
    match version {
        4 => {
            let (address, rest) = rest.split_first_chunk::<4>().expect("four bytes");
            *value = rest;
            Ipv4Addr::from(*address).into()
        }
        6 => {
            let (address, rest) = rest.split_first_chunk::<16>().expect("sixteen bytes");
            *value = rest;
            Ipv6Addr::from(*address).into()
        }
        other => panic!("{other} is no IP version"),
    }
}

fn first_capsule(stream: &[u8]) -> Option<(Capsule, usize)> {
    let mut rest = stream;
    let kind = take_varint(&mut rest)?;
    let value_bytes = take_varint(&mut rest)? as usize;
    let value = rest.get(..value_bytes)?.to_vec();
    let header_bytes = stream.len() - rest.len();
    Some((Capsule { kind, value }, header_bytes + value_bytes))
}

/// RFC 9000, section 16.
fn take_varint(stream: &mut &[u8]) -> Option<u64> {
    let first = *stream.first()?;
    let bytes = 1 << (first >> 6);
    let encoded = stream.get(..bytes)?;
    let value = encoded[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |value, byte| {
            value << 8 | u64::from(*byte)
        });
    *stream = &stream[bytes..];
    Some(value)
}

/// Always in eight or four bytes where two would do: nobody promised the shortest form.
fn put_varint(out: &mut Vec<u8>, value: u64) {
    match value {
        0..0x40 => out.push(value as u8),
        0x40..0x4000_0000 => out.extend((value as u32 | 0x8000_0000).to_be_bytes()),
        _ => out.extend((value | 0xc000_0000_0000_0000).to_be_bytes()),
    }
}
