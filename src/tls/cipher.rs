//! Which cipher suite a connection gets: AES-128-GCM where both ends have AES in hardware, else ChaCha20-Poly1305.
//!
//! A client offers the faster of the two first, and so tells what its processor has. A server that has AES in hardware
//! follows the client's order, whatever client it is; one that has not puts ChaCha20-Poly1305 first on its own.

use rustls::SupportedCipherSuite;
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};

use crate::config::Cipher;

/// What a server takes, and who decides.
#[derive(Debug)]
pub(super) struct ServerChoice {
    /// The suites that it takes, its favourite first.
    pub suites: Vec<SupportedCipherSuite>,
    /// Whether its own order counts, and not the client's.
    pub own_order: bool,
}

/// What a client offers, its favourite first; one cipher alone where that was asked for.
pub(super) fn client_suites(cipher: Cipher, aes_in_hardware: bool) -> Vec<SupportedCipherSuite> {
    match cipher {
        Cipher::Auto => by_speed(aes_in_hardware),
        Cipher::Aes128Gcm => vec![TLS13_AES_128_GCM_SHA256],
        Cipher::Chacha20Poly1305 => vec![TLS13_CHACHA20_POLY1305_SHA256],
    }
}

/// What a server takes. Never one cipher alone: a visitor that offers another one gets it.
pub(super) fn server_choice(cipher: Cipher, aes_in_hardware: bool) -> ServerChoice {
    let aes_first = match cipher {
        Cipher::Auto => aes_in_hardware,
        Cipher::Aes128Gcm => true,
        Cipher::Chacha20Poly1305 => false,
    };
    ServerChoice {
        suites: by_speed(aes_first),
        own_order: cipher != Cipher::Auto || !aes_in_hardware,
    }
}

fn by_speed(aes_first: bool) -> Vec<SupportedCipherSuite> {
    let aes = [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384];
    let chacha20 = [TLS13_CHACHA20_POLY1305_SHA256];
    if aes_first {
        [&aes[..], &chacha20].concat()
    } else {
        [&chacha20[..], &aes].concat()
    }
}

/// Whether this processor has instructions for AES and for the multiplication of GCM.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
pub(super) fn aes_in_hardware() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

/// Whether this processor has instructions for AES and for the multiplication of GCM.
#[cfg(target_arch = "aarch64")]
pub(super) fn aes_in_hardware() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull")
}

/// Whether this processor has instructions for AES and for the multiplication of GCM: not known, so no.
#[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn aes_in_hardware() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rstest::rstest;
    use rustls::{CipherSuite, Connection};

    use super::super::certificate::{self, Trust};
    use super::super::stock::{self, Chunks, Pair};
    use super::super::{Established, TlsStream};
    use super::*;

    const AES_128: &str = "TLS13_AES_128_GCM_SHA256";
    const AES_256: &str = "TLS13_AES_256_GCM_SHA384";
    const CHACHA20: &str = "TLS13_CHACHA20_POLY1305_SHA256";

    /// Our client on a processor with or without AES.
    fn client(cipher: Cipher, aes_in_hardware: bool) -> TlsStream {
        let trust = Trust::Pin(stock::identity().pin().unwrap());
        let suites = client_suites(cipher, aes_in_hardware);
        let config = certificate::client_config_with_suites(trust, suites).unwrap();
        TlsStream::client(config, stock::name()).unwrap()
    }

    /// Our server on a processor with or without AES.
    fn server(cipher: Cipher, aes_in_hardware: bool) -> TlsStream {
        let choice = server_choice(cipher, aes_in_hardware);
        let config = certificate::server_config_with_choice(stock::identity(), choice).unwrap();
        TlsStream::server(config).unwrap()
    }

    fn negotiated(mut client: TlsStream, mut server: TlsStream) -> String {
        while client.is_handshaking() || server.is_handshaking() {
            server.feed(&client.take_outgoing()).unwrap();
            client.feed(&server.take_outgoing()).unwrap();
        }
        client.write(b"there").unwrap();
        server.feed(&client.take_outgoing()).unwrap();
        assert_eq!(server.plaintext(), b"there");
        server.write(b"back").unwrap();
        client.feed(&server.take_outgoing()).unwrap();
        assert_eq!(client.plaintext(), b"back");
        let Established { agreed, .. } = client.into_records().unwrap();
        assert_eq!(agreed, server.into_records().unwrap().agreed);
        agreed.cipher_suite.to_owned()
    }

    #[rstest]
    #[case(true, true, AES_128)]
    #[case(false, true, CHACHA20)]
    #[case(true, false, CHACHA20)]
    #[case(false, false, CHACHA20)]
    fn aes_is_for_two_ends_that_have_it(
        #[case] client_has_aes: bool,
        #[case] server_has_aes: bool,
        #[case] expected: &str,
    ) {
        let client = client(Cipher::Auto, client_has_aes);
        let server = server(Cipher::Auto, server_has_aes);
        assert_eq!(negotiated(client, server), expected);
    }

    #[rstest]
    fn a_client_that_was_told_has_its_way_with_any_server(
        #[values(
            (Cipher::Aes128Gcm, AES_128),
            (Cipher::Chacha20Poly1305, CHACHA20)
        )]
        asked: (Cipher, &str),
        #[values(true, false)] client_has_aes: bool,
        #[values(true, false)] server_has_aes: bool,
        #[values(Cipher::Auto, Cipher::Aes128Gcm, Cipher::Chacha20Poly1305)] at_server: Cipher,
    ) {
        let client = client(asked.0, client_has_aes);
        let server = server(at_server, server_has_aes);
        assert_eq!(negotiated(client, server), asked.1);
    }

    #[rstest]
    fn a_server_that_was_told_has_its_way_with_a_client_that_was_not(
        #[values(
            (Cipher::Aes128Gcm, AES_128),
            (Cipher::Chacha20Poly1305, CHACHA20)
        )]
        asked: (Cipher, &str),
        #[values(true, false)] client_has_aes: bool,
        #[values(true, false)] server_has_aes: bool,
    ) {
        let client = client(Cipher::Auto, client_has_aes);
        let server = server(asked.0, server_has_aes);
        assert_eq!(negotiated(client, server), asked.1);
    }

    /// Browsers and phones put ChaCha20 first where they have no AES; OpenSSL puts AES-256 first, and ChaCha20 second.
    #[rstest]
    #[case::phone([TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384], CHACHA20, CHACHA20)]
    #[case::openssl([TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256], AES_256, CHACHA20)]
    #[case::browser([TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256], AES_128, CHACHA20)]
    fn foreign_clients_are_followed_by_a_server_that_has_aes(
        #[case] offered: [SupportedCipherSuite; 3],
        #[case] with_aes: &str,
        #[case] without: &str,
    ) {
        for (server_has_aes, expected) in [(true, with_aes), (false, without)] {
            let mut pair = Pair {
                ours: server(Cipher::Auto, server_has_aes),
                stock: stock::stock_client(&offered, None),
            };
            pair.settle(&mut Chunks::whole()).unwrap();
            let Established { agreed, .. } = pair.ours.into_records().unwrap();
            assert_eq!(agreed.cipher_suite, expected);
        }
    }

    #[rstest]
    fn a_visitor_with_one_suite_is_never_turned_away(
        #[values(Cipher::Auto, Cipher::Aes128Gcm, Cipher::Chacha20Poly1305)] cipher: Cipher,
        #[values(true, false)] server_has_aes: bool,
    ) {
        for suite in stock::SUITES {
            let mut pair = Pair {
                ours: server(cipher, server_has_aes),
                stock: stock::stock_client(&[suite], None),
            };
            pair.settle(&mut Chunks::whole()).unwrap();
            assert_eq!(pair.stock.negotiated_cipher_suite(), Some(suite));
        }
    }

    /// What the public constructors make is what this processor wants.
    #[test]
    fn this_machine_gets_what_its_processor_has() {
        let trust = Trust::Pin(stock::identity().pin().unwrap());
        let config = certificate::client_config(trust, Cipher::Auto).unwrap();
        let stock = stock::stock_server(&stock::SUITES, None);
        let mut pair = Pair {
            ours: TlsStream::client(Arc::clone(&config), stock::name()).unwrap(),
            stock,
        };
        pair.settle(&mut Chunks::whole()).unwrap();
        let Connection::Server(stock) = pair.stock else {
            panic!("not a server")
        };
        let expected = match aes_in_hardware() {
            true => CipherSuite::TLS13_AES_128_GCM_SHA256,
            false => CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
        };
        let negotiated = stock.negotiated_cipher_suite().unwrap();
        assert_eq!(negotiated.suite(), expected);
    }
}
