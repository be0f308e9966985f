//! The certificates that other tunnels want: an authority, a server, a client, made anew for every run.

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};

use super::BenchError;
use crate::topology::SERVER_V4;

/// PEM texts.
#[derive(Clone, Debug)]
pub(super) struct Certificates {
    pub(super) authority: String,
    pub(super) server: Identity,
    pub(super) client: Identity,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Certificates {
    /// ECDSA P-256 throughout. The server's certificate is for its address.
    pub(super) fn make() -> Result<Certificates, BenchError> {
        let mut params = named("bench authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;

        let mut server = named("server");
        server.subject_alt_names = vec![SanType::IpAddress(IpAddr::V4(SERVER_V4))];
        let identity = |mut params: CertificateParams, usage| {
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, &authority)?;
            Ok::<_, BenchError>(Identity {
                certificate: certificate.pem(),
                key: key.serialize_pem(),
            })
        };
        Ok(Certificates {
            authority: authority.pem(),
            server: identity(server, ExtendedKeyUsagePurpose::ServerAuth)?,
            client: identity(named("client"), ExtendedKeyUsagePurpose::ClientAuth)?,
        })
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
