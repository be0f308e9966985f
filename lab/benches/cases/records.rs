//! Sealing and opening records, with both ciphers.

use super::{Case, Volume, Work};
use ringtun::config::Cipher;
use ringtun::tls::certificate::{self, Identity, Trust};
use ringtun::tls::record::{CONTROL_RECORD_BYTES_MAX, RECORD_PLAINTEXT_BYTES_MAX, sealed_bytes};
use ringtun::tls::{ContentType, RecordLayer, TlsStream};
use rustls::pki_types::ServerName;
use std::hint::black_box;

const NAME: &str = "files.example.net";
/// Records in a run.
const BATCH: usize = 16;
/// A super-packet's records but for the last, one segment, one acknowledgement.
const LARGE: usize = RECORD_PLAINTEXT_BYTES_MAX;
const MEDIUM: usize = 1460;
const SMALL: usize = 64;

pub fn cases() -> Vec<Case> {
    use Cipher::{Aes128Gcm as Aes, Chacha20Poly1305 as Chacha};
    vec![
        seal("record/seal/aes-128-gcm/16384", Aes, LARGE),
        seal("record/seal/aes-128-gcm/1460", Aes, MEDIUM),
        seal("record/seal/aes-128-gcm/64", Aes, SMALL),
        seal("record/seal/chacha20-poly1305/16384", Chacha, LARGE),
        seal("record/seal/chacha20-poly1305/1460", Chacha, MEDIUM),
        seal("record/seal/chacha20-poly1305/64", Chacha, SMALL),
        open("record/open/aes-128-gcm/16384", Aes, LARGE),
        open("record/open/aes-128-gcm/1460", Aes, MEDIUM),
        open("record/open/aes-128-gcm/64", Aes, SMALL),
        open("record/open/chacha20-poly1305/16384", Chacha, LARGE),
        open("record/open/chacha20-poly1305/1460", Chacha, MEDIUM),
        open("record/open/chacha20-poly1305/64", Chacha, SMALL),
    ]
}

fn seal(name: &'static str, cipher: Cipher, bytes: usize) -> Case {
    Case::new(name, Volume::Bytes(BATCH * bytes), move || Sealing {
        layer: joined(cipher).0,
        plaintext: vec![0x5a; bytes],
        record: vec![0; sealed_bytes(bytes)],
    })
    .dispatched()
}

fn open(name: &'static str, cipher: Cipher, bytes: usize) -> Case {
    Case::new(name, Volume::Bytes(BATCH * bytes), move || {
        let (sealer, opener) = joined(cipher);
        Opening {
            sealer,
            opener,
            plaintext: vec![0x5a; bytes],
            records: vec![vec![0; sealed_bytes(bytes)]; BATCH],
            out: vec![0; bytes + 1],
        }
    })
    .dispatched()
}

struct Sealing {
    layer: RecordLayer,
    plaintext: Vec<u8>,
    record: Vec<u8>,
}

impl Work for Sealing {
    fn prepare(&mut self) {
        if self.layer.wants_key_update() {
            let mut update = [0; CONTROL_RECORD_BYTES_MAX];
            self.layer.key_update(false, &mut update).expect("a key");
        }
    }

    fn run(&mut self) {
        for _ in 0..BATCH {
            let (plaintext, record) = (black_box(&self.plaintext), &mut self.record);
            let sealed = self
                .layer
                .seal(ContentType::ApplicationData, plaintext, record);
            black_box(sealed).expect("a record");
        }
    }
}

struct Opening {
    sealer: RecordLayer,
    opener: RecordLayer,
    plaintext: Vec<u8>,
    records: Vec<Vec<u8>>,
    out: Vec<u8>,
}

impl Work for Opening {
    fn prepare(&mut self) {
        if self.sealer.wants_key_update() {
            let mut update = [0; CONTROL_RECORD_BYTES_MAX];
            let bytes = self.sealer.key_update(false, &mut update).expect("a key");
            let mut body = [0; CONTROL_RECORD_BYTES_MAX];
            let opened = self
                .opener
                .open(&update[..bytes], &mut body)
                .expect("a record");
            let signal = self
                .opener
                .handle(opened.content_type, &body[..opened.bytes]);
            assert_eq!(signal.expect("a key"), ringtun::tls::Signal::None);
        }
        for record in &mut self.records {
            self.sealer
                .seal(ContentType::ApplicationData, &self.plaintext, record)
                .expect("a record");
        }
    }

    fn run(&mut self) {
        for record in &self.records {
            let opened = self.opener.open(black_box(record), &mut self.out);
            black_box(opened).expect("an authentic record");
        }
    }
}

/// The two ends of a connection: what the first one seals, the second one opens.
fn joined(cipher: Cipher) -> (RecordLayer, RecordLayer) {
    let generated = certificate::generate(NAME).expect("a certificate");
    let identity = Identity::from_pem(
        generated.certificate_pem.as_bytes(),
        generated.key_pem.as_bytes(),
    )
    .expect("the certificate");
    let trust = Trust::Pin(identity.pin().expect("a pin"));
    let name = ServerName::try_from(NAME).expect("a name");
    let config = certificate::client_config(trust, cipher).expect("a configuration");
    let mut client = TlsStream::client(config, name).expect("a client");
    let config = certificate::server_config(identity, cipher).expect("a configuration");
    let mut server = TlsStream::server(config).expect("a server");
    while client.is_handshaking() || server.is_handshaking() {
        server.feed(&client.take_outgoing()).expect("a handshake");
        client.feed(&server.take_outgoing()).expect("a handshake");
    }
    // The server's tickets have been taken above.
    let [client, server] = [client, server].map(|end| end.into_records().expect("keys"));
    assert_eq!(client.agreed, server.agreed);
    let expected = match cipher {
        Cipher::Auto => "",
        Cipher::Aes128Gcm => "TLS13_AES_128_GCM_SHA256",
        Cipher::Chacha20Poly1305 => "TLS13_CHACHA20_POLY1305_SHA256",
    };
    assert_eq!(client.agreed.cipher_suite, expected);
    (client.records, server.records)
}
