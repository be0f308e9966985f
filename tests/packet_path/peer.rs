//! A client whose records and capsules the test makes by hand, against the workers of a server.

use super::end::{End, OFFLOAD_CONTEXT, Outer, PATIENCE, Terms, connect};
use ringtun::proto::capsule::{Capsule, datagram_header};
use ringtun::proto::deframer::{Deframer, Frame};
use ringtun::proto::offload::{VIRTIO_NET_HDR_BYTES, VirtioNetHdr};
use ringtun::proto::route_table::ConnectionRef;
use ringtun::tls::record::{
    CONTROL_RECORD_BYTES_MAX, RECORD_PLAINTEXT_BYTES_MAX, record_bytes, sealed_bytes,
};
use ringtun::tls::{AlertDescription, ContentType, RecordError, RecordLayer, Signal};
use std::io::{Read, Write};
use std::net::TcpStream;

/// The handshake message (RFC 8446 section 4).
const KEY_UPDATE: u8 = 24;

/// What a peer is sent.
#[derive(Debug, PartialEq)]
pub enum Received {
    /// A packet of context 0.
    Plain(Vec<u8>),
    /// A packet of the offload context.
    Offloaded(VirtioNetHdr, Vec<u8>),
    Capsule(Capsule),
    CloseNotify,
    /// A fatal alert.
    Alert(AlertDescription),
    /// The socket's end.
    End,
}

pub struct Peer {
    pub socket: TcpStream,
    pub records: RecordLayer,
    /// Times that the other end has changed its key.
    pub key_updates: u32,
    ciphertext: Vec<u8>,
    plaintext: Vec<u8>,
    deframer: Deframer,
}

impl Peer {
    /// Connects to a server, which has the other end already.
    pub fn join(server: &mut End, terms: &Terms) -> (Self, ConnectionRef) {
        let (ours, theirs) = connect();
        let connection = server.add(theirs, terms.client_sources(), terms);
        (Self::new(ours), connection)
    }

    pub fn new(outer: Outer) -> Self {
        outer.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        outer.socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            socket: outer.socket,
            records: outer.established.records,
            key_updates: 0,
            ciphertext: outer.established.ciphertext,
            plaintext: outer.established.plaintext,
            deframer: Deframer::new(),
        }
    }

    /// Makes records of plaintext.
    pub fn seal(&mut self, plaintext: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::new();
        for part in plaintext.chunks(RECORD_PLAINTEXT_BYTES_MAX) {
            let mut record = vec![0; sealed_bytes(part.len())];
            self.records
                .seal(ContentType::ApplicationData, part, &mut record)
                .unwrap();
            sealed.extend(record);
        }
        sealed
    }

    pub fn write(&mut self, plaintext: &[u8]) {
        let sealed = self.seal(plaintext);
        self.socket.write_all(&sealed).unwrap();
    }

    pub fn write_capsule(&mut self, capsule: &Capsule) {
        let mut bytes = Vec::new();
        capsule.encode(&mut bytes).unwrap();
        self.write(&bytes);
    }

    /// Sends a packet in context 0.
    pub fn write_packet(&mut self, packet: &[u8]) {
        self.write(&plain(packet));
    }

    pub fn request_key_update(&mut self) {
        let mut record = [0; CONTROL_RECORD_BYTES_MAX];
        let bytes = self.records.key_update(true, &mut record).unwrap();
        self.socket.write_all(&record[..bytes]).unwrap();
    }

    pub fn close_notify(&mut self) {
        let mut record = [0; CONTROL_RECORD_BYTES_MAX];
        let bytes = self.records.close_notify(&mut record).unwrap();
        self.socket.write_all(&record[..bytes]).unwrap();
    }

    /// What comes next.
    pub fn receive(&mut self) -> Received {
        loop {
            if let Some(received) = self.cut() {
                return received;
            }
            let Some(record) = self.record() else {
                return Received::End;
            };
            let mut out = vec![0; record.len()];
            let opened = self.records.open(&record, &mut out).unwrap();
            let body = &out[..opened.bytes];
            if opened.content_type == ContentType::ApplicationData {
                self.plaintext.extend_from_slice(body);
            } else {
                if (opened.content_type, body[0]) == (ContentType::Handshake, KEY_UPDATE) {
                    self.key_updates += 1;
                }
                match self.records.handle(opened.content_type, body) {
                    Ok(Signal::None) => {}
                    Ok(Signal::CloseNotify) => return Received::CloseNotify,
                    Ok(Signal::ReplyKeyUpdate) => panic!("workers never ask for this"),
                    Err(RecordError::PeerAlert(alert)) => return Received::Alert(alert),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    /// The next packet; capsules on the way are passed over.
    pub fn packet(&mut self) -> Vec<u8> {
        loop {
            match self.receive() {
                Received::Plain(packet) | Received::Offloaded(_, packet) => return packet,
                Received::Capsule(_) => {}
                other => panic!("no packet: {other:?}"),
            }
        }
    }

    fn cut(&mut self) -> Option<Received> {
        let (received, end) = match self.deframer.next(&self.plaintext).unwrap() {
            Frame::Incomplete => return None,
            Frame::Datagram {
                context,
                payload,
                end,
            } => {
                let payload = self.plaintext[payload].to_vec();
                (datagram(context, payload), end)
            }
            Frame::Control { kind, value, end } => {
                let capsule = Capsule::decode(kind, &self.plaintext[value]).unwrap();
                (Received::Capsule(capsule.unwrap()), end)
            }
            Frame::Skipped { .. } => panic!("workers send nothing unknown"),
        };
        self.plaintext.drain(..end);
        Some(received)
    }

    fn record(&mut self) -> Option<Vec<u8>> {
        let mut more = [0; 4096];
        loop {
            match record_bytes(&self.ciphertext).unwrap() {
                Some(bytes) if bytes <= self.ciphertext.len() => {
                    return Some(self.ciphertext.drain(..bytes).collect());
                }
                _ => {}
            }
            let bytes = self.socket.read(&mut more).unwrap();
            if bytes == 0 {
                assert!(self.ciphertext.is_empty(), "the stream ends in a record");
                return None;
            }
            self.ciphertext.extend_from_slice(&more[..bytes]);
        }
    }
}

fn datagram(context: u64, payload: Vec<u8>) -> Received {
    match context {
        0 => Received::Plain(payload),
        OFFLOAD_CONTEXT => {
            let header = VirtioNetHdr::read(payload.first_chunk().unwrap());
            Received::Offloaded(header, payload[VIRTIO_NET_HDR_BYTES..].to_vec())
        }
        context => panic!("nobody agreed on context {context}"),
    }
}

/// A packet in a DATAGRAM of context 0.
pub fn plain(packet: &[u8]) -> Vec<u8> {
    [datagram_header(0, packet.len()).as_bytes(), packet].concat()
}

/// A packet in a DATAGRAM of the offload context.
pub fn offloaded(header: VirtioNetHdr, packet: &[u8]) -> Vec<u8> {
    let capsule = datagram_header(OFFLOAD_CONTEXT, VIRTIO_NET_HDR_BYTES + packet.len());
    [capsule.as_bytes(), &header.to_bytes(), packet].concat()
}
