//! Cuts capsules out of the decrypted byte stream of a connection, without copying.

use std::ops::Range;

use super::capsule::{
    CONTROL_BYTES_MAX, DATAGRAM_PAYLOAD_BYTES_MAX, VARINT_BYTES_MAX, get_varint, kind,
};

/// The longest value that is taken whole: a context id and a payload.
const VALUE_BYTES_MAX: usize = VARINT_BYTES_MAX + DATAGRAM_PAYLOAD_BYTES_MAX;
/// The longest piece of the stream that the caller ever has to hold to get a [`Frame`] out of it.
pub const CAPSULE_BYTES_MAX: usize = 2 * VARINT_BYTES_MAX + VALUE_BYTES_MAX;

const _: () = assert!(CONTROL_BYTES_MAX <= VALUE_BYTES_MAX);

/// What is at the front of the stream. Ranges and ends count from the front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Not enough bytes to tell. Never with [`CAPSULE_BYTES_MAX`] bytes or more.
    Incomplete,
    /// A packet. Whether the context id is one in use is for the caller to check; if not, the datagram is dropped.
    Datagram {
        /// The context id.
        context: u64,
        /// What follows it.
        payload: Range<usize>,
        /// Where the next frame starts.
        end: usize,
    },
    /// A capsule for [`Capsule::decode`](super::capsule::Capsule::decode), of a type that it knows.
    Control {
        /// The capsule type.
        kind: u64,
        /// The capsule's value, of at most [`CONTROL_BYTES_MAX`] bytes.
        value: Range<usize>,
        /// Where the next frame starts.
        end: usize,
    },
    /// All or a part of a capsule that nobody wants: of an unknown type, or a datagram above
    /// [`DATAGRAM_PAYLOAD_BYTES_MAX`].
    Skipped {
        /// Where the stream goes on. Never 0.
        end: usize,
    },
}

/// Why the stream cannot be read on. The sender broke the protocol: the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeframeError {
    /// A capsule of a known type is too long.
    #[error(
        "a capsule of type {kind:#x} has {length} bytes, more than the {CONTROL_BYTES_MAX} allowed"
    )]
    ControlTooLong {
        /// The capsule type.
        kind: u64,
        /// The length of its value.
        length: u64,
    },
    /// A DATAGRAM ends within its context id.
    #[error("a DATAGRAM capsule ends within its context id")]
    NoContext,
}

/// Remembers what is left of a capsule that is being skipped; all else is in the stream.
///
/// After each frame other than [`Frame::Incomplete`] the caller drops `end` bytes from the front of the stream and
/// asks again. After an error it closes the connection.
#[derive(Clone, Debug, Default)]
pub struct Deframer {
    skip_bytes: u64,
    oversized_datagrams: u64,
}

impl Deframer {
    /// At the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many datagrams were skipped for their length so far.
    pub fn oversized_datagrams(&self) -> u64 {
        self.oversized_datagrams
    }

    /// What is at the front of `stream`.
    ///
    /// # Errors
    /// The stream cannot be read on: see [`DeframeError`].
    #[inline]
    pub fn next(&mut self, stream: &[u8]) -> Result<Frame, DeframeError> {
        if self.skip_bytes != 0 {
            return Ok(self.skip(stream, 0));
        }
        let Some((kind, kind_bytes)) = get_varint(stream) else {
            return Ok(Frame::Incomplete);
        };
        let Some((length, length_bytes)) = get_varint(&stream[kind_bytes..]) else {
            return Ok(Frame::Incomplete);
        };
        let start = kind_bytes + length_bytes;
        if kind != kind::DATAGRAM || length > VALUE_BYTES_MAX as u64 {
            return self.other(stream, kind, start, length);
        }
        // At most VALUE_BYTES_MAX: no truncation, no overflow.
        let end = start + length as usize;
        let Some(value) = stream.get(start..end) else {
            return Ok(Frame::Incomplete);
        };
        let Some((context, context_bytes)) = get_varint(value) else {
            return Err(DeframeError::NoContext);
        };
        if value.len() - context_bytes > DATAGRAM_PAYLOAD_BYTES_MAX {
            self.oversized_datagrams += 1;
            return Ok(Frame::Skipped { end });
        }
        Ok(Frame::Datagram {
            context,
            payload: start + context_bytes..end,
            end,
        })
    }

    /// Everything but a datagram of ordinary length.
    #[cold]
    fn other(
        &mut self,
        stream: &[u8],
        kind: u64,
        start: usize,
        length: u64,
    ) -> Result<Frame, DeframeError> {
        if kind::is_control(kind) {
            if length > CONTROL_BYTES_MAX as u64 {
                return Err(DeframeError::ControlTooLong { kind, length });
            }
            let end = start + length as usize;
            return Ok(if end <= stream.len() {
                Frame::Control {
                    kind,
                    value: start..end,
                    end,
                }
            } else {
                Frame::Incomplete
            });
        }
        if kind == kind::DATAGRAM {
            self.oversized_datagrams += 1;
        }
        self.skip_bytes = length;
        Ok(self.skip(stream, start))
    }

    /// Skips as much as there is, from `start` on.
    fn skip(&mut self, stream: &[u8], start: usize) -> Frame {
        let there = stream.len() - start;
        // No more than `there`, which is a usize.
        let skipped = self.skip_bytes.min(there as u64) as usize;
        self.skip_bytes -= skipped as u64;
        if start + skipped == 0 {
            Frame::Incomplete
        } else {
            Frame::Skipped {
                end: start + skipped,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::capsule::strategies::{capsule, integer};
    use super::super::capsule::{Capsule, VARINT_MAX, datagram_header, put_varint};
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// A frame with its bytes, so that frames from different chunkings can be compared.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Cut {
        Datagram(u64, Vec<u8>),
        Control(u64, Vec<u8>),
    }

    /// Feeds chunks as a connection does; says what came out and what was left.
    fn deframe(chunks: &[&[u8]]) -> (Vec<Cut>, Result<usize, DeframeError>, u64) {
        let mut deframer = Deframer::new();
        let mut stream = Vec::new();
        let mut cuts = Vec::new();
        for chunk in chunks {
            stream.extend_from_slice(chunk);
            loop {
                let end = match deframer.next(&stream) {
                    Ok(Frame::Incomplete) => break,
                    Ok(Frame::Datagram {
                        context,
                        payload,
                        end,
                    }) => {
                        assert_eq!(payload.end, end);
                        cuts.push(Cut::Datagram(context, stream[payload].to_vec()));
                        end
                    }
                    Ok(Frame::Control { kind, value, end }) => {
                        assert_eq!(value.end, end);
                        cuts.push(Cut::Control(kind, stream[value].to_vec()));
                        end
                    }
                    Ok(Frame::Skipped { end }) => end,
                    Err(error) => return (cuts, Err(error), deframer.oversized_datagrams()),
                };
                assert!(end > 0 && end <= stream.len());
                stream.drain(..end);
            }
            assert!(stream.len() < CAPSULE_BYTES_MAX);
        }
        (cuts, Ok(stream.len()), deframer.oversized_datagrams())
    }

    fn put_capsule(kind: u64, value: &[u8], out: &mut Vec<u8>) {
        put_varint(out, kind);
        put_varint(out, value.len() as u64);
        out.extend_from_slice(value);
    }

    fn put_datagram(context: u64, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(datagram_header(context, payload.len()).as_bytes());
        out.extend_from_slice(payload);
    }

    #[test]
    fn an_empty_stream_is_incomplete() {
        assert_eq!(Deframer::new().next(&[]), Ok(Frame::Incomplete));
    }

    #[test]
    fn the_longest_datagram_is_taken_and_a_longer_one_is_skipped() {
        let longest = vec![7; DATAGRAM_PAYLOAD_BYTES_MAX];
        let mut stream = Vec::new();
        put_datagram(2, &longest, &mut stream);
        // One byte more; a context id of one byte keeps the value below what is buffered.
        put_capsule(
            kind::DATAGRAM,
            &vec![0; 1 + DATAGRAM_PAYLOAD_BYTES_MAX + 1],
            &mut stream,
        );
        // Above what is buffered.
        put_capsule(kind::DATAGRAM, &vec![0; 1_000_000], &mut stream);
        put_datagram(0, b"after", &mut stream);
        let (cuts, left, oversized) = deframe(&[&stream]);
        assert_eq!(
            cuts,
            [
                Cut::Datagram(2, longest),
                Cut::Datagram(0, b"after".to_vec())
            ]
        );
        assert_eq!(left, Ok(0));
        assert_eq!(oversized, 2);
    }

    #[test]
    fn an_endless_unknown_capsule_is_skipped_without_being_held() {
        let mut deframer = Deframer::new();
        let mut header = Vec::new();
        put_varint(&mut header, 0x29 * 1000 + 0x17);
        put_varint(&mut header, super::super::capsule::VARINT_MAX);
        assert_eq!(
            deframer.next(&header),
            Ok(Frame::Skipped { end: header.len() })
        );
        for _ in 0..1000 {
            assert_eq!(
                deframer.next(&[0xff; 4096]),
                Ok(Frame::Skipped { end: 4096 })
            );
        }
        assert_eq!(deframer.next(&[]), Ok(Frame::Incomplete));
    }

    #[test]
    fn an_empty_unknown_capsule_is_skipped() {
        let mut stream = Vec::new();
        put_capsule(0x17, b"", &mut stream);
        put_datagram(0, b"", &mut stream);
        assert_eq!(deframe(&[&stream]).0, [Cut::Datagram(0, vec![])]);
    }

    #[test]
    fn headers_need_not_be_the_shortest() {
        let stream = b"\xc0\0\0\0\0\0\0\0\x80\0\0\x04\x40\x02ab";
        assert_eq!(
            Deframer::new().next(stream),
            Ok(Frame::Datagram {
                context: 2,
                payload: 14..16,
                end: 16
            })
        );
    }

    #[test]
    fn a_long_control_capsule_is_refused_before_it_is_held() {
        let mut header = Vec::new();
        put_varint(&mut header, kind::ADDRESS_ASSIGN);
        put_varint(&mut header, CONTROL_BYTES_MAX as u64 + 1);
        assert_eq!(
            Deframer::new().next(&header),
            Err(DeframeError::ControlTooLong {
                kind: kind::ADDRESS_ASSIGN,
                length: CONTROL_BYTES_MAX as u64 + 1
            })
        );
    }

    #[test]
    fn a_datagram_without_a_context_id_is_refused() {
        assert_eq!(Deframer::new().next(&[0, 0]), Err(DeframeError::NoContext));
        assert_eq!(
            Deframer::new().next(&[0, 1, 0x40]),
            Err(DeframeError::NoContext)
        );
    }

    #[derive(Clone, Debug)]
    enum Part {
        Datagram(u64, Vec<u8>),
        Capsule(Capsule),
        Unknown(u64, Vec<u8>),
        Oversized(usize),
    }

    fn part() -> impl Strategy<Value = Part> {
        prop_oneof![
            4 => (prop_oneof![Just(0), Just(2), integer(0..=VARINT_MAX)], payload())
                .prop_map(|(context, payload)| Part::Datagram(context, payload)),
            2 => capsule().prop_map(Part::Capsule),
            2 => (unknown_kind(), vec(any::<u8>(), 0..300))
                .prop_map(|(kind, value)| Part::Unknown(kind, value)),
            1 => prop_oneof![1..3000_usize, Just(1), Just(200_000)].prop_map(Part::Oversized),
        ]
    }

    fn payload() -> impl Strategy<Value = Vec<u8>> {
        let extremes = [0, 1, 62, 63, 16_382, 16_383, DATAGRAM_PAYLOAD_BYTES_MAX];
        prop_oneof![
            20 => vec(any::<u8>(), 0..200),
            1 => (prop::sample::select(extremes.to_vec()), any::<u8>())
                .prop_map(|(bytes, byte)| vec![byte; bytes]),
        ]
    }

    fn unknown_kind() -> impl Strategy<Value = u64> {
        prop_oneof![
            (0..1_000_000_u64).prop_map(|n| 0x29 * n + 0x17),
            integer(4..=VARINT_MAX).prop_filter("unknown", |kind| !kind::is_control(*kind)),
        ]
    }

    /// The beginning of a capsule of any type and any length, which may never come to its end.
    fn header() -> impl Strategy<Value = Vec<u8>> {
        let kinds = [
            kind::DATAGRAM,
            kind::ADDRESS_ASSIGN,
            kind::PING,
            kind::CLOSE,
        ];
        let lengths = [
            CONTROL_BYTES_MAX,
            VALUE_BYTES_MAX,
            DATAGRAM_PAYLOAD_BYTES_MAX,
        ];
        let lengths = prop_oneof![
            (prop::sample::select(lengths.to_vec()), 0..3_u64)
                .prop_map(|(length, more)| length as u64 - 1 + more),
            integer(0..=VARINT_MAX),
        ];
        let kinds = prop_oneof![prop::sample::select(kinds.to_vec()), unknown_kind()];
        (
            kinds,
            lengths,
            vec(prop_oneof![any::<u8>(), Just(0xff)], 0..80),
        )
            .prop_map(|(kind, length, value)| {
                let mut bytes = Vec::new();
                put_varint(&mut bytes, kind);
                put_varint(&mut bytes, length);
                bytes.extend(value);
                bytes
            })
    }

    /// The stream in pieces of the given lengths, over and over.
    fn chunks<'a>(mut stream: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
        let mut chunks = Vec::new();
        for length in lengths.iter().cycle() {
            if stream.is_empty() {
                break;
            }
            let (chunk, rest) = stream.split_at((*length).min(stream.len()));
            chunks.push(chunk);
            stream = rest;
        }
        chunks
    }

    proptest! {
        /// However long it says to be: what is cut out lies within the stream, and too much is
        /// never waited for.
        #[test]
        fn any_header_is_answered_within_the_stream(header in header(), filler in 0..CAPSULE_BYTES_MAX + 9) {
            let mut stream = header;
            stream.resize(stream.len() + filler, 0xff);
            match Deframer::new().next(&stream) {
                Ok(Frame::Incomplete) => prop_assert!(stream.len() < CAPSULE_BYTES_MAX),
                Ok(Frame::Datagram { payload, end, .. }) => {
                    prop_assert!(payload.start <= payload.end && payload.end == end);
                    prop_assert!(end <= stream.len() && payload.len() <= DATAGRAM_PAYLOAD_BYTES_MAX);
                }
                Ok(Frame::Control { value, end, .. }) => {
                    prop_assert!(value.start <= value.end && value.end == end);
                    prop_assert!(end <= stream.len() && value.len() <= CONTROL_BYTES_MAX);
                }
                Ok(Frame::Skipped { end }) => prop_assert!(end > 0 && end <= stream.len()),
                Err(_) => {}
            }
        }

        #[test]
        fn any_chunking_gives_what_was_sent(parts in vec(part(), 0..20), lengths in vec(1..400_usize, 1..10)) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            let mut expected_oversized = 0;
            for part in &parts {
                match part {
                    Part::Datagram(context, payload) => {
                        put_datagram(*context, payload, &mut stream);
                        expected.push(Cut::Datagram(*context, payload.clone()));
                    }
                    Part::Capsule(capsule) => {
                        let start = stream.len();
                        capsule.encode(&mut stream).unwrap();
                        let (_, kind_bytes) = get_varint(&stream[start..]).unwrap();
                        let (_, length_bytes) = get_varint(&stream[start + kind_bytes..]).unwrap();
                        let value = stream[start + kind_bytes + length_bytes..].to_vec();
                        expected.push(Cut::Control(capsule.kind(), value));
                    }
                    Part::Unknown(kind, value) => put_capsule(*kind, value, &mut stream),
                    Part::Oversized(excess) => {
                        put_capsule(kind::DATAGRAM, &vec![0; 1 + DATAGRAM_PAYLOAD_BYTES_MAX + excess], &mut stream);
                        expected_oversized += 1;
                    }
                }
            }
            let (cuts, left, oversized) = deframe(&[&stream]);
            prop_assert_eq!(&cuts, &expected);
            prop_assert_eq!(left, Ok(0));
            prop_assert_eq!(oversized, expected_oversized);
            prop_assert_eq!(deframe(&chunks(&stream, &lengths)), (cuts, left, oversized));
        }

        /// Also where it is rubbish: the same frames and the same error.
        #[test]
        fn any_chunking_of_anything_gives_the_same(
            stream in prop_oneof![
                vec(prop_oneof![any::<u8>(), 0..4_u8, Just(0xff)], 0..600),
                vec(header(), 0..6).prop_map(|headers| headers.concat()),
            ],
            lengths in vec(1..40_usize, 1..10),
        ) {
            let (whole, whole_left, whole_oversized) = deframe(&[&stream]);
            let (cuts, left, oversized) = deframe(&chunks(&stream, &lengths));
            prop_assert_eq!(cuts, whole);
            prop_assert_eq!(left, whole_left);
            prop_assert_eq!(oversized, whole_oversized);
        }
    }
}
