//! Variable-length integers (RFC 9000, section 16): two bits of length, then 6, 14, 30 or 62 bits of value.

/// The greatest value.
pub const VARINT_MAX: u64 = (1 << 62) - 1;
/// The longest encoding.
pub const VARINT_BYTES_MAX: usize = 8;

/// The bytes of the shortest encoding of `value`, which is at most [`VARINT_MAX`].
#[inline]
pub const fn varint_bytes(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Appends the shortest encoding of `value`. A value above [`VARINT_MAX`] cannot be expressed and
/// becomes [`VARINT_MAX`].
pub fn put_varint(out: &mut Vec<u8>, value: u64) {
    match varint_bytes(value) {
        1 => out.push(value as u8),
        2 => out.extend_from_slice(&(value as u16 | 1 << 14).to_be_bytes()),
        4 => out.extend_from_slice(&(value as u32 | 2 << 30).to_be_bytes()),
        _ => out.extend_from_slice(&(value.min(VARINT_MAX) | 3 << 62).to_be_bytes()),
    }
}

/// Writes the shortest encoding of `value`, which is at most [`VARINT_MAX`], to the front of `out`;
/// returns its length.
#[inline]
pub(super) fn write_varint(out: &mut [u8], value: u64) -> usize {
    let length = varint_bytes(value);
    // The length's logarithm in the top two bits, the value right-aligned in the bytes that remain.
    let tagged = (value << (64 - 8 * length)) | (u64::from(length.trailing_zeros()) << 62);
    out[..length].copy_from_slice(&tagged.to_be_bytes()[..length]);
    length
}

/// The integer at the front of `bytes` and the bytes it takes; `None` if it is not all there. Encodings need not be
/// the shortest.
#[inline]
pub fn get_varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = 1 << (first >> 6);
    let value = bytes
        .get(1..length)?
        .iter()
        .fold(u64::from(first & 0x3f), |value, byte| {
            (value << 8) | u64::from(*byte)
        });
    Some((value, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_examples_of_rfc_9000_hold() {
        let examples: &[(&[u8], u64)] = &[
            (
                &[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c],
                151_288_809_941_952_652,
            ),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
        ];
        for (bytes, value) in examples {
            assert_eq!(get_varint(bytes), Some((*value, bytes.len())));
            let mut out = Vec::new();
            put_varint(&mut out, *value);
            assert_eq!(out, *bytes);
        }
        assert_eq!(
            get_varint(&[0x40, 37]),
            Some((37, 2)),
            "not the shortest, and valid"
        );
    }

    use crate::proto::capsule::strategies::integer;

    #[test]
    fn what_is_too_large_becomes_the_largest() {
        for value in [VARINT_MAX, VARINT_MAX + 1, u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out, [0xff; 8]);
            assert_eq!(varint_bytes(value), 8);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_got_without_panic(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xff), Just(0)], 0..12)) {
            match get_varint(&bytes) {
                Some((value, length)) => {
                    prop_assert!(length <= bytes.len());
                    prop_assert!(varint_bytes(value) <= length);
                }
                None => prop_assert!(bytes.len() < VARINT_BYTES_MAX),
            }
        }

        #[test]
        fn what_is_put_is_got(value in integer(0..=VARINT_MAX), rest: Vec<u8>) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let mut written = [0; VARINT_BYTES_MAX];
            let written_bytes = write_varint(&mut written, value);
            prop_assert_eq!(&written[..written_bytes], &out[..]);
            let length = out.len();
            prop_assert_eq!(length, varint_bytes(value));
            for cut in 0..length {
                prop_assert_eq!(get_varint(&out[..cut]), None);
            }
            out.extend(rest);
            prop_assert_eq!(get_varint(&out), Some((value, length)));
        }
    }
}
