//! For tests: stock buffered rustls as the other end, in memory.

use std::io::{ErrorKind, Read, Write};
use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::pki_types::ServerName;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection,
    SupportedCipherSuite,
};

use super::certificate::{self, Generated, Identity, Trust};
use super::handshake::{Established, TlsError, TlsStream};
use crate::config::Cipher;

/// The name on the certificate.
pub const NAME: &str = "files.example.net";

/// All suites of TLS 1.3 that rustls has.
pub const SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// Which end is ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ours {
    Client,
    Server,
}

/// One connection: our stream on one end, stock rustls on the other.
pub struct Pair {
    pub ours: TlsStream,
    pub stock: Connection,
}

/// The server's certificate in all tests that need no other.
pub fn identity() -> Identity {
    static GENERATED: OnceLock<Generated> = OnceLock::new();
    let generated = GENERATED.get_or_init(|| certificate::generate(NAME).unwrap());
    Identity::from_pem(
        generated.certificate_pem.as_bytes(),
        generated.key_pem.as_bytes(),
    )
    .unwrap()
}

pub fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap()
}

pub fn provider_of(suites: &[SupportedCipherSuite]) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: suites.to_vec(),
        ..default_provider()
    })
}

/// The test server's configuration.
pub fn server_config() -> Arc<ServerConfig> {
    certificate::server_config(identity(), Cipher::Auto).unwrap()
}

/// A client configuration that trusts the test server's pin.
pub fn pinned() -> Arc<ClientConfig> {
    pinned_with(Cipher::Auto)
}

/// The same with a cipher.
pub fn pinned_with(cipher: Cipher) -> Arc<ClientConfig> {
    certificate::client_config(Trust::Pin(identity().pin().unwrap()), cipher).unwrap()
}

/// A stock server for some suites, that sends four tickets.
pub fn stock_server(suites: &[SupportedCipherSuite], fragment_bytes: Option<usize>) -> Connection {
    let Identity { chain, key } = identity();
    let mut config = ServerConfig::builder_with_provider(provider_of(suites))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.send_tls13_tickets = 4;
    config.max_fragment_size = fragment_bytes;
    Connection::Server(ServerConnection::new(Arc::new(config)).unwrap())
}

/// A stock client that offers some suites, its favourite first, and trusts the test server by its certificate.
pub fn stock_client(suites: &[SupportedCipherSuite], fragment_bytes: Option<usize>) -> Connection {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(identity().chain[0].clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(provider_of(suites))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.max_fragment_size = fragment_bytes;
    Connection::Client(ClientConnection::new(Arc::new(config), name()).unwrap())
}

impl Pair {
    pub fn new(ours: Ours, suite: SupportedCipherSuite) -> Self {
        Self::fragmented(ours, suite, None)
    }

    /// A pair in which the stock end makes records of at most so many bytes, of its handshake too.
    pub fn fragmented(ours: Ours, suite: SupportedCipherSuite, bytes: Option<usize>) -> Self {
        match ours {
            Ours::Client => Self {
                ours: TlsStream::client(pinned(), name()).unwrap(),
                stock: stock_server(&[suite], bytes),
            },
            Ours::Server => Self {
                ours: TlsStream::server(server_config()).unwrap(),
                stock: stock_client(&[suite], bytes),
            },
        }
    }

    /// A pair after its handshake, and after the tickets.
    pub fn established(ours: Ours, suite: SupportedCipherSuite) -> (Established, Connection) {
        let mut pair = Self::new(ours, suite);
        pair.settle(&mut Chunks::whole()).unwrap();
        (pair.ours.into_records().unwrap(), pair.stock)
    }

    /// Carries bytes both ways until both ends are silent; what the stock end has received is returned.
    pub fn settle(&mut self, chunks: &mut Chunks) -> Result<Vec<u8>, TlsError> {
        let mut received = Vec::new();
        loop {
            let to_stock = self.ours.take_outgoing();
            let to_ours = take(&mut self.stock);
            if to_stock.is_empty() && to_ours.is_empty() {
                return Ok(received);
            }
            for chunk in chunks.cut(&to_stock) {
                received.extend(give(&mut self.stock, chunk).unwrap());
            }
            for chunk in chunks.cut(&to_ours) {
                self.ours.feed(chunk)?;
            }
        }
    }
}

/// Cuts streams into pieces, going round a list of lengths.
pub struct Chunks {
    lengths: Vec<usize>,
    next: usize,
}

impl Chunks {
    pub fn new(lengths: Vec<usize>) -> Self {
        assert!(!lengths.is_empty() && !lengths.contains(&0));
        Self { lengths, next: 0 }
    }

    pub fn whole() -> Self {
        Self::new(vec![usize::MAX])
    }

    pub fn cut<'s>(&mut self, mut stream: &'s [u8]) -> Vec<&'s [u8]> {
        let mut pieces = Vec::new();
        while !stream.is_empty() {
            let bytes = self.lengths[self.next % self.lengths.len()].min(stream.len());
            self.next += 1;
            let (piece, rest) = stream.split_at(bytes);
            pieces.push(piece);
            stream = rest;
        }
        pieces
    }
}

/// What the stock end wants to send.
pub fn take(stock: &mut Connection) -> Vec<u8> {
    let mut out = Vec::new();
    while stock.wants_write() {
        stock.write_tls(&mut out).unwrap();
    }
    out
}

/// Gives bytes to the stock end and returns the plaintext that it has then.
pub fn give(stock: &mut Connection, mut bytes: &[u8]) -> Result<Vec<u8>, rustls::Error> {
    let mut plaintext = Vec::new();
    while !bytes.is_empty() {
        stock.read_tls(&mut bytes).unwrap();
        stock.process_new_packets()?;
        match stock.reader().read_to_end(&mut plaintext) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
    Ok(plaintext)
}

/// Has the stock end send plaintext.
pub fn write(stock: &mut Connection, plaintext: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in plaintext.chunks(16_384) {
        stock.writer().write_all(part).unwrap();
        out.extend(take(stock));
    }
    out
}
