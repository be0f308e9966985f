//! A TLS 1.3 client made of stock rustls, with nothing of ringtun in it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use aws_lc_rs::digest;
use ringtun_lab::Host;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

use super::SOON;

/// A TLS connection.
pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// Connects from a host and shakes hands. Any certificate will do.
pub fn connect(host: &Host, to: SocketAddr) -> io::Result<TlsStream> {
    let socket = host
        .enter(|| TcpStream::connect_timeout(&to, SOON))
        .expect("the host")?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(SOON))?;
    socket.set_write_timeout(Some(SOON))?;
    let name = ServerName::try_from("www.example.org").expect("a name");
    let connection = ClientConnection::new(Arc::new(config()), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// The first flight of a handshake: a whole ClientHello, in one record.
pub fn client_hello() -> Vec<u8> {
    let name = ServerName::try_from("www.example.org").expect("a name");
    let mut connection = ClientConnection::new(Arc::new(config()), name).expect("a client");
    let mut hello = Vec::new();
    connection
        .write_tls(&mut hello)
        .expect("a vector takes all");
    hello
}

/// SHA-256 of the public key in the server's certificate.
pub fn public_key_sha256(stream: &TlsStream) -> [u8; 32] {
    let certificates = stream
        .conn
        .peer_certificates()
        .expect("a server's certificate");
    let certificate = webpki::EndEntityCert::try_from(&certificates[0]).expect("X.509");
    let key = certificate.subject_public_key_info();
    let digest = digest::digest(&digest::SHA256, &key);
    digest.as_ref().try_into().expect("32 bytes")
}

fn config() -> ClientConfig {
    let provider = Arc::new(provider::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider does TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// Takes every certificate; the handshake's signature still has to be by its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
