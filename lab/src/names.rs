//! The internet's only nameserver: every name is `web`'s.

use std::net::IpAddr;

const HEADER_BYTES: usize = 12;
const QUERY_BYTES_MAX: usize = 512;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TTL_SECONDS: u32 = 1;

/// Answers a DNS query (RFC 1035) for one A or AAAA with those of `addresses` that fit; other types get an
/// empty answer, and what is no query gets none.
pub(crate) fn answer(query: &[u8], addresses: &[IpAddr]) -> Option<Vec<u8>> {
    let is_one_question = query.get(4..6)? == [0, 1];
    let is_response = query[2] & 0x80 != 0;
    if is_response || !is_one_question || query.len() > QUERY_BYTES_MAX {
        return None;
    }
    let mut end = HEADER_BYTES;
    while *query.get(end)? != 0 {
        end += 1 + usize::from(query[end]);
    }
    // The root label, then type and class.
    let question = query.get(HEADER_BYTES..end + 5)?;
    let kind = u16::from_be_bytes([query[end + 1], query[end + 2]]);
    let records: Vec<Vec<u8>> = addresses
        .iter()
        .filter_map(|address| record(kind, *address))
        .collect();

    let mut response = Vec::with_capacity(QUERY_BYTES_MAX);
    response.extend(&query[..2]);
    // A response, recursion desired as asked and available, no error.
    response.extend([
        0x80 | (query[2] & 0x01),
        0x80,
        0,
        1,
        0,
        u8::try_from(records.len()).ok()?,
        0,
        0,
        0,
        0,
    ]);
    response.extend(question);
    response.extend(records.concat());
    Some(response)
}

/// A resource record for the name in the question.
fn record(kind: u16, address: IpAddr) -> Option<Vec<u8>> {
    let data = match (kind, address) {
        (TYPE_A, IpAddr::V4(address)) => address.octets().to_vec(),
        (TYPE_AAAA, IpAddr::V6(address)) => address.octets().to_vec(),
        _ => return None,
    };
    // A pointer to the question's name; class IN.
    let mut record = vec![0xc0, u8::try_from(HEADER_BYTES).ok()?];
    record.extend(kind.to_be_bytes());
    record.extend([0, 1]);
    record.extend(TTL_SECONDS.to_be_bytes());
    record.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
    record.extend(data);
    Some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESSES: [IpAddr; 1] = [IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 80))];

    fn query(kind: u16) -> Vec<u8> {
        let mut query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\x07example\0".to_vec();
        query.extend(kind.to_be_bytes());
        query.extend([0, 1]);
        query
    }

    #[test]
    fn a_name_has_an_address() {
        let response = answer(&query(TYPE_A), &ADDRESSES).expect("an answer");
        assert_eq!(response[..12], *b"\x12\x34\x81\x80\0\x01\0\x01\0\0\0\0");
        assert_eq!(response[12..29], query(TYPE_A)[12..]);
        assert_eq!(
            response[29..],
            *b"\xc0\x0c\0\x01\0\x01\0\0\0\x01\0\x04\xcb\0\x71\x50"
        );
    }

    #[test]
    fn other_types_have_no_records() {
        let response = answer(&query(TYPE_AAAA), &ADDRESSES).expect("an answer");
        assert_eq!(response[6..8], [0, 0]);
    }

    #[test]
    fn what_is_no_query_has_no_answer() {
        let full = query(TYPE_A);
        for bytes in 0..full.len() {
            assert_eq!(answer(&full[..bytes], &ADDRESSES), None, "{bytes} bytes");
        }
    }
}
