//! Whom the client trusts and what the server presents.
//!
//! A server's key is either pinned by the invite ([`Trust::Pin`]) or vouched for by an authority that the host
//! trusts ([`Trust::WebPki`]). TLS 1.3 only, ALPN `http/1.1`, X25519MLKEM768 preferred.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::aws_lc_rs::{self as provider, kx_group};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, DigitallySignedStruct, InconsistentKeys, OtherError, RootCertStore, ServerConfig,
    SignatureScheme, SupportedCipherSuite,
};

use super::cipher::{self, ServerChoice};
use crate::config::Cipher;

/// SHA-256 of a certificate's SubjectPublicKeyInfo.
pub const PIN_BYTES: usize = 32;

/// The only application protocol that either side takes.
pub(super) const ALPN: &str = "http/1.1";
const GENERATED_VALID_DAYS: u64 = 3650;
/// A client's clock may be behind ours by so much.
const GENERATED_BACKDATED_DAYS: u64 = 1;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What is wrong with a certificate, a key, or the host's trusted authorities.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The PEM text cannot be read.
    #[error("the {0} is not readable PEM")]
    Pem(&'static str, #[source] rustls::pki_types::pem::Error),
    /// The chain has no certificate; perhaps it is the key.
    #[error("the certificate file has no certificate (are certificate and key swapped?)")]
    NoCertificate,
    /// The key file has no private key that can be used.
    #[error("the key file has no unencrypted private key (PKCS#8, PKCS#1 or SEC1)")]
    NoKey,
    /// The private key is locked by a passphrase.
    #[error(
        "the private key is encrypted: give it without a passphrase (`openssl pkey -in KEY -out PLAIN`)"
    )]
    EncryptedKey,
    /// The key is of a kind that TLS 1.3 does not sign with.
    #[error(
        "the private key cannot be used: ECDSA P-256 or P-384, Ed25519 and RSA from 2048 bits on can"
    )]
    UnusableKey(#[source] rustls::Error),
    /// The certificate is not a well-formed X.509 v3 certificate.
    #[error("the certificate is malformed")]
    Malformed(#[source] webpki::Error),
    /// The first certificate of the chain is for another key.
    #[error("the private key does not belong to the first certificate of the chain")]
    KeyMismatch,
    /// The host name of a certificate to be made is not one.
    #[error("{0:?} is not a host name")]
    NotAHostName(String),
    /// The certificate could not be made.
    #[error("no certificate could be made")]
    Generate(#[source] rcgen::Error),
    /// The clock shows a time before 1970.
    #[error("the clock is not set")]
    ClockNotSet,
    /// The host has no trusted authorities.
    #[error(
        "this host trusts no certificate authority: install the package ca-certificates, or use an invite with a pin"
    )]
    NoAuthorities,
    /// rustls does not take the configuration.
    #[error("TLS cannot be configured")]
    Config(#[source] rustls::Error),
}

/// How a client recognises its server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trust {
    /// By its key: SHA-256 of the SubjectPublicKeyInfo. Name and dates in the certificate do not matter.
    Pin([u8; PIN_BYTES]),
    /// By a certificate for its name from an authority that this host trusts.
    WebPki,
}

/// A certificate chain, end entity first, with its private key.
#[derive(Debug)]
pub struct Identity {
    /// The certificates, the server's own first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The first certificate's key.
    pub key: PrivateKeyDer<'static>,
}

/// A new certificate and key as PEM text.
pub struct Generated {
    /// The certificate.
    pub certificate_pem: String,
    /// Its private key, PKCS#8: a secret.
    pub key_pem: String,
}

/// The server has another key than the pinned one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PinMismatch {
    /// What the invite has.
    pub expected: [u8; PIN_BYTES],
    /// What the server has.
    pub presented: [u8; PIN_BYTES],
}

impl fmt::Display for PinMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the server's key is not the one pinned in the invite: it is {}, not {}",
            URL_SAFE_NO_PAD.encode(self.presented),
            URL_SAFE_NO_PAD.encode(self.expected),
        )
    }
}

impl std::error::Error for PinMismatch {}

/// The configuration of a client. It keeps no sessions: every connection proves the server's key anew.
///
/// # Errors
/// With [`Trust::WebPki`]: this host trusts no authority.
pub fn client_config(trust: Trust, cipher: Cipher) -> Result<Arc<ClientConfig>, CertificateError> {
    client_config_with_suites(
        trust,
        cipher::client_suites(cipher, cipher::aes_in_hardware()),
    )
}

/// The configuration of a client that offers `suites`, its favourite first.
pub(super) fn client_config_with_suites(
    trust: Trust,
    suites: Vec<SupportedCipherSuite>,
) -> Result<Arc<ClientConfig>, CertificateError> {
    match trust {
        Trust::Pin(pin) => {
            let verifier = PinVerifier {
                pin,
                algorithms: provider::default_provider().signature_verification_algorithms,
            };
            client_config_with(Arc::new(verifier), suites)
        }
        Trust::WebPki => {
            let mut roots = RootCertStore::empty();
            // One broken file among the authorities is no reason to trust none.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            client_config_for_roots(roots, suites)
        }
    }
}

/// The configuration of a server that presents `identity`.
///
/// # Errors
/// The key does not belong to the certificate, or cannot be used.
pub fn server_config(
    identity: Identity,
    cipher: Cipher,
) -> Result<Arc<ServerConfig>, CertificateError> {
    server_config_with_choice(
        identity,
        cipher::server_choice(cipher, cipher::aes_in_hardware()),
    )
}

/// The configuration of a server that chooses among suites by `choice`.
pub(super) fn server_config_with_choice(
    identity: Identity,
    choice: ServerChoice,
) -> Result<Arc<ServerConfig>, CertificateError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider(choice.suites)))
        .with_protocol_versions(&[&TLS13])
        .map_err(CertificateError::Config)?
        .with_no_client_auth()
        .with_single_cert(identity.chain, identity.key)
        .map_err(key_error)?;
    config.alpn_protocols = vec![ALPN.as_bytes().to_vec()];
    config.enable_secret_extraction = true;
    config.ignore_client_order = choice.own_order;
    Ok(Arc::new(config))
}

/// The pin of a certificate: SHA-256 of its SubjectPublicKeyInfo.
///
/// # Errors
/// The certificate is malformed.
pub fn spki_pin(certificate: &CertificateDer<'_>) -> Result<[u8; PIN_BYTES], CertificateError> {
    pin_of(certificate).map_err(CertificateError::Malformed)
}

/// Makes a self-signed certificate for `name` with a new P-256 key, valid for ten years.
///
/// # Errors
/// `name` is not a host name.
pub fn generate(name: &str) -> Result<Generated, CertificateError> {
    if !matches!(ServerName::try_from(name), Ok(ServerName::DnsName(_))) {
        return Err(CertificateError::NotAHostName(name.to_owned()));
    }
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(|_| CertificateError::ClockNotSet)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CertificateError::Generate)?;
    let mut params =
        CertificateParams::new([name.to_owned()]).map_err(CertificateError::Generate)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before =
        rcgen::date_time_ymd(1970, 1, 1) + now - DAY * GENERATED_BACKDATED_DAYS as u32;
    params.not_after = params.not_before + DAY * GENERATED_VALID_DAYS as u32;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params
        .self_signed(&key)
        .map_err(CertificateError::Generate)?;
    Ok(Generated {
        certificate_pem: certificate.pem(),
        key_pem: key.serialize_pem(),
    })
}

impl Identity {
    /// Reads a chain and its key, both PEM, and checks that they belong together.
    ///
    /// # Errors
    /// Each thing that an operator can get wrong has its own.
    pub fn from_pem(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, CertificateError> {
        let chain = CertificateDer::pem_slice_iter(chain_pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| CertificateError::Pem("certificate file", error))?;
        let key = match PrivateKeyDer::from_pem_slice(key_pem) {
            Ok(key) => key,
            Err(rustls::pki_types::pem::Error::NoItemsFound) => return Err(missing_key(key_pem)),
            Err(error) => return Err(CertificateError::Pem("key file", error)),
        };
        let identity = Self { chain, key };
        identity.check()?;
        Ok(identity)
    }

    /// The pin that invites for this server carry.
    ///
    /// # Errors
    /// There is no well-formed certificate.
    pub fn pin(&self) -> Result<[u8; PIN_BYTES], CertificateError> {
        spki_pin(self.chain.first().ok_or(CertificateError::NoCertificate)?)
    }

    fn check(&self) -> Result<(), CertificateError> {
        self.pin()?;
        let provider = provider::default_provider();
        CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), &provider)
            .map(drop)
            .map_err(key_error)
    }
}

/// What rustls may use: these suites, the favourite first.
fn provider(cipher_suites: Vec<SupportedCipherSuite>) -> CryptoProvider {
    CryptoProvider {
        cipher_suites,
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
            kx_group::SECP384R1,
        ],
        ..provider::default_provider()
    }
}

pub(super) fn client_config_for_roots(
    roots: RootCertStore,
    suites: Vec<SupportedCipherSuite>,
) -> Result<Arc<ClientConfig>, CertificateError> {
    let provider = Arc::new(provider::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|_| CertificateError::NoAuthorities)?;
    client_config_with(verifier, suites)
}

fn client_config_with(
    verifier: Arc<dyn ServerCertVerifier>,
    suites: Vec<SupportedCipherSuite>,
) -> Result<Arc<ClientConfig>, CertificateError> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider(suites)))
        .with_protocol_versions(&[&TLS13])
        .map_err(CertificateError::Config)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.as_bytes().to_vec()];
    config.enable_secret_extraction = true;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn pin_of(certificate: &CertificateDer<'_>) -> Result<[u8; PIN_BYTES], webpki::Error> {
    let certificate = webpki::EndEntityCert::try_from(certificate)?;
    let digest = aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA256,
        &certificate.subject_public_key_info(),
    );
    let mut pin = [0; PIN_BYTES];
    pin.copy_from_slice(digest.as_ref());
    Ok(pin)
}

fn key_error(error: rustls::Error) -> CertificateError {
    match error {
        rustls::Error::NoCertificatesPresented => CertificateError::NoCertificate,
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            CertificateError::KeyMismatch
        }
        other => CertificateError::UnusableKey(other),
    }
}

fn missing_key(key_pem: &[u8]) -> CertificateError {
    let marker = b"ENCRYPTED PRIVATE KEY-----";
    match key_pem.windows(marker.len()).any(|window| window == marker) {
        true => CertificateError::EncryptedKey,
        false => CertificateError::NoKey,
    }
}

/// Takes the one server that has the pinned key, and has rustls make sure that it holds the private half of it.
#[derive(Debug)]
struct PinVerifier {
    pin: [u8; PIN_BYTES],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let presented = pin_of(end_entity).map_err(|_| rustls::CertificateError::BadEncoding)?;
        match aws_lc_rs::constant_time::verify_slices_are_equal(&presented, &self.pin) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(_) => {
                let mismatch = PinMismatch {
                    expected: self.pin,
                    presented,
                };
                Err(rustls::CertificateError::Other(OtherError(Arc::new(mismatch))).into())
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::stock;
    use super::*;

    fn pem_of(generated: &Generated) -> (&[u8], &[u8]) {
        (
            generated.certificate_pem.as_bytes(),
            generated.key_pem.as_bytes(),
        )
    }

    #[test]
    fn a_generated_certificate_serves_and_its_pin_is_that_of_its_key() {
        let generated = generate("files.example.net").unwrap();
        let (certificate, key) = pem_of(&generated);
        let identity = Identity::from_pem(certificate, key).unwrap();
        let key = KeyPair::from_pem(&generated.key_pem).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &spki);
        assert_eq!(identity.pin().unwrap(), digest.as_ref());
        assert!(generated.key_pem.starts_with("-----BEGIN PRIVATE KEY-----"));
        server_config(identity, Cipher::Auto).unwrap();
    }

    #[test]
    fn no_two_generated_certificates_share_a_key() {
        let pin = |generated: Generated| {
            let (certificate, key) = pem_of(&generated);
            Identity::from_pem(certificate, key).unwrap().pin().unwrap()
        };
        assert_ne!(
            pin(generate(stock::NAME).unwrap()),
            pin(generate(stock::NAME).unwrap())
        );
    }

    #[test]
    fn only_host_names_get_a_certificate() {
        for name in [
            "",
            "192.0.2.1",
            "2001:db8::1",
            "two words",
            "a..b",
            "-",
            "x\ny.example",
        ] {
            assert!(
                matches!(generate(name), Err(CertificateError::NotAHostName(_))),
                "{name:?}"
            );
        }
    }

    #[test]
    fn each_mistake_with_the_files_has_its_own_error() {
        let (one, other) = (
            generate("one.example").unwrap(),
            generate("other.example").unwrap(),
        );
        let (certificate, key) = pem_of(&one);
        let refused =
            |certificate: &[u8], key: &[u8]| Identity::from_pem(certificate, key).unwrap_err();

        assert!(matches!(
            refused(key, certificate),
            CertificateError::NoKey | CertificateError::NoCertificate
        ));
        assert!(matches!(refused(b"", key), CertificateError::NoCertificate));
        assert!(matches!(refused(key, key), CertificateError::NoCertificate));
        assert!(matches!(refused(certificate, b""), CertificateError::NoKey));
        assert!(matches!(
            refused(certificate, certificate),
            CertificateError::NoKey
        ));
        assert!(matches!(
            refused(certificate, pem_of(&other).1),
            CertificateError::KeyMismatch
        ));
        assert!(matches!(
            refused(&certificate[..certificate.len() - 30], key),
            CertificateError::Pem(..)
        ));

        let encrypted = one.key_pem.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        assert!(matches!(
            refused(certificate, encrypted.as_bytes()),
            CertificateError::EncryptedKey
        ));
        let no_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert!(matches!(
            refused(certificate, no_key.as_bytes()),
            CertificateError::UnusableKey(_)
        ));
        let no_certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(
            refused(no_certificate.as_bytes(), key),
            CertificateError::Malformed(_)
        ));
    }

    #[test]
    fn a_chain_keeps_its_order() {
        let (leaf, next) = (
            generate("leaf.example").unwrap(),
            generate("next.example").unwrap(),
        );
        let chain = [leaf.certificate_pem.as_str(), &next.certificate_pem].concat();
        let identity = Identity::from_pem(chain.as_bytes(), leaf.key_pem.as_bytes()).unwrap();
        let lone =
            Identity::from_pem(leaf.certificate_pem.as_bytes(), leaf.key_pem.as_bytes()).unwrap();
        assert_eq!(identity.chain.len(), 2);
        assert_eq!(identity.pin().unwrap(), lone.pin().unwrap());
    }

    #[test]
    fn no_private_key_shows_in_debug_output() {
        let text = format!("{:?}", stock::identity());
        let key = format!("{:?}", stock::identity().key.secret_der());
        assert!(!text.contains(&key[1..30]), "{text}");
    }

    #[test]
    fn a_server_without_certificate_or_with_a_foreign_key_is_no_server() {
        let key = stock::identity().key;
        let empty = Identity {
            chain: Vec::new(),
            key: key.clone_key(),
        };
        assert!(server_config(empty, Cipher::Auto).is_err());
        let generated = generate("foreign.example").unwrap();
        let (certificate, own) = pem_of(&generated);
        let foreign = Identity {
            key,
            ..Identity::from_pem(certificate, own).unwrap()
        };
        assert!(matches!(
            server_config(foreign, Cipher::Auto),
            Err(CertificateError::KeyMismatch)
        ));
    }

    #[test]
    fn no_authorities_is_an_error_that_says_what_to_do() {
        let error =
            client_config_for_roots(RootCertStore::empty(), stock::SUITES.to_vec()).unwrap_err();
        assert!(error.to_string().contains("ca-certificates"));
    }
}
