//! RFC 9297 capsules: what both ends say to each other beside packets.
//!
//! A capsule is a type, a length and a value; type and length are variable-length integers (RFC 9000, section 16).
//! The values here are those of RFC 9484 (addresses and routes), of draft-ietf-masque-connect-ip-dns (DNS) and our
//! own (keepalive, close). DATAGRAM, the capsule that carries packets, never becomes a [`Capsule`]: its header is
//! written by [`datagram_header`] and read by the deframer.

mod dns;
#[cfg(test)]
pub(crate) mod strategies;
mod varint;

use std::cmp::Ordering;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv4Subnets, Ipv6Net, Ipv6Subnets};

pub use dns::{DOMAIN_BYTES_MAX, DnsAssign, DnsConfiguration, Nameserver};
pub use varint::{VARINT_BYTES_MAX, VARINT_MAX, get_varint, put_varint, varint_bytes};

/// Capsule types.
pub mod kind {
    /// An HTTP datagram: a context id and a packet (RFC 9297, section 3.5).
    pub const DATAGRAM: u64 = 0x00;
    /// All the addresses that the receiver may use (RFC 9484, section 4.7.1).
    pub const ADDRESS_ASSIGN: u64 = 0x01;
    /// A request for addresses (RFC 9484, section 4.7.2).
    pub const ADDRESS_REQUEST: u64 = 0x02;
    /// All the ranges that the sender routes (RFC 9484, section 4.7.3).
    pub const ROUTE_ADVERTISEMENT: u64 = 0x03;
    /// DNS configuration: the provisional code point of draft-ietf-masque-connect-ip-dns-06.
    pub const DNS_ASSIGN: u64 = 0x1ace_79ec;
    /// Asks for a [`PONG`]. Ours, as are the two below: random, outside the range for standards (0x00 to 0x3f) and
    /// not of the form 0x29 * N + 0x17, which RFC 9297 keeps for capsules without meaning.
    pub const PING: u64 = 0x2b73_c5a4;
    /// Echoes a [`PING`].
    pub const PONG: u64 = 0x2b73_c5a5;
    /// Says why the sender is about to close the connection.
    pub const CLOSE: u64 = 0x2b73_c5a6;

    /// Whether [`Capsule::decode`](super::Capsule::decode) knows the type.
    #[inline]
    pub const fn is_control(kind: u64) -> bool {
        matches!(
            kind,
            ADDRESS_ASSIGN
                | ADDRESS_REQUEST
                | ROUTE_ADVERTISEMENT
                | DNS_ASSIGN
                | PING
                | PONG
                | CLOSE
        )
    }
}

/// The longest payload of a DATAGRAM (what follows its context id): a `virtio_net_hdr` and the longest IP packet.
pub const DATAGRAM_PAYLOAD_BYTES_MAX: usize = 10 + 65_535;
/// The longest value of any other capsule that is looked at.
pub const CONTROL_BYTES_MAX: usize = 16 * 1024;
/// The longest header that [`datagram_header`] makes.
pub const DATAGRAM_HEADER_BYTES_MAX: usize = 16;
/// The bytes of a PING's and a PONG's value.
pub const PING_BYTES: usize = 8;

// Type, length and context id, where the length is that of the longest datagram.
const _: () = assert!(
    varint_bytes(kind::DATAGRAM)
        + varint_bytes((VARINT_BYTES_MAX + DATAGRAM_PAYLOAD_BYTES_MAX) as u64)
        + VARINT_BYTES_MAX
        <= DATAGRAM_HEADER_BYTES_MAX
);

/// Why a capsule's value is malformed. The sender broke the protocol: the connection ends (RFC 9297, section 3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapsuleError {
    /// The value ends within a field.
    #[error("a capsule's value ends within a field")]
    Truncated,
    /// The value goes on after its last field.
    #[error("a capsule's value goes on after its last field")]
    Trailing,
    /// An IP version is neither 4 nor 6.
    #[error("{0} is not an IP version")]
    IpVersion(u8),
    /// A prefix is longer than its address.
    #[error("a prefix length of {0} is longer than the address")]
    PrefixLength(u8),
    /// An address has bits set that its prefix does not cover.
    #[error("the prefix {0} has host bits set")]
    HostBits(IpNet),
    /// An ADDRESS_REQUEST asks for nothing.
    #[error("an ADDRESS_REQUEST asks for no address")]
    EmptyRequest,
    /// An ADDRESS_REQUEST uses the request id 0, which means "unasked".
    #[error("an ADDRESS_REQUEST uses the request id 0")]
    ZeroRequestId,
    /// A range ends before it starts.
    #[error("an address range ends before it starts")]
    RangeInverted,
    /// Ranges overlap or are not in the order of RFC 9484, section 4.7.3.
    #[error("address ranges overlap or are out of order")]
    RangeOrder,
    /// A name in a DNS_ASSIGN is not a host name.
    #[error("a DNS_ASSIGN has a malformed domain name")]
    Domain,
    /// A name server's priority is 0, which is SVCB's alias form.
    #[error("a DNS_ASSIGN has a name server of priority 0")]
    NameserverPriority,
    /// A name server's service parameters are not what the draft and RFC 9460 allow.
    #[error("a DNS_ASSIGN has malformed or forbidden service parameters")]
    ServiceParameters,
    /// A name server for unencrypted DNS has no address.
    #[error("a DNS_ASSIGN has a name server without an address")]
    NameserverAddress,
    /// A PING or PONG is not of eight bytes.
    #[error("a PING or PONG has {0} bytes instead of {PING_BYTES}")]
    PingBytes(usize),
}

/// Why a [`Capsule`] cannot be sent. Nothing is written then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The value would be longer than every receiver accepts.
    #[error("a capsule's value has {0} bytes, more than the {CONTROL_BYTES_MAX} allowed")]
    TooLong(usize),
    /// A request id or a close reason is above [`VARINT_MAX`].
    #[error("{0} does not fit into a variable-length integer")]
    IntegerRange(u64),
    /// The two ends of an address range are of different IP versions.
    #[error("an address range has two IP versions")]
    RangeVersions,
    /// A receiver would refuse the value as malformed.
    #[error("the receiver would refuse the capsule")]
    Refused(#[source] CapsuleError),
}

/// One entry of an ADDRESS_ASSIGN or ADDRESS_REQUEST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AssignedAddress {
    /// Joins an assignment to its request; 0 for an assignment that nobody asked for, never 0 in a request.
    pub request_id: u64,
    /// The prefix, without host bits. In a request an all-zero address has no preference; as an answer to one,
    /// 0.0.0.0/32 or ::/128 refuses it.
    pub prefix: IpNet,
}

impl AssignedAddress {
    /// One address, as a /32 or /128.
    pub fn host(request_id: u64, address: IpAddr) -> Self {
        AssignedAddress {
            request_id,
            prefix: IpNet::from(address),
        }
    }

    /// "Any IPv4 address": as a request without a preference, or as the refusal of a request.
    pub fn unspecified_v4(request_id: u64) -> Self {
        Self::host(request_id, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    /// "Any IPv6 address": as a request without a preference, or as the refusal of a request.
    pub fn unspecified_v6(request_id: u64) -> Self {
        Self::host(request_id, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
    }

    /// The bytes that the entry takes in a capsule's value.
    pub fn encoded_bytes(&self) -> usize {
        let address_bytes = if self.prefix.addr().is_ipv4() { 4 } else { 16 };
        varint_bytes(self.request_id) + 1 + address_bytes + 1
    }

    /// Whether the address is all-zero: no preference in a request, a refusal in an assignment.
    pub fn is_unspecified(&self) -> bool {
        self.prefix.addr().is_unspecified()
    }
}

/// One entry of a ROUTE_ADVERTISEMENT. Both ends belong to it and are of the same IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpAddressRange {
    /// The first address.
    pub start: IpAddr,
    /// The last address.
    pub end: IpAddr,
    /// The only IP protocol that is routed (beside ICMP), or 0 for all.
    pub protocol: u8,
}

impl IpAddressRange {
    /// All of a prefix, for all protocols.
    pub fn from_prefix(prefix: IpNet) -> Self {
        IpAddressRange {
            start: prefix.network(),
            end: prefix.broadcast(),
            protocol: 0,
        }
    }

    /// All of IPv4, for all protocols.
    pub fn everything_v4() -> Self {
        Self::from_prefix(IpNet::V4(Ipv4Net::default()))
    }

    /// All of IPv6, for all protocols.
    pub fn everything_v6() -> Self {
        Self::from_prefix(IpNet::V6(Ipv6Net::default()))
    }

    /// The fewest prefixes that together are the range, in order. At most 62 for IPv4 and 254 for IPv6.
    pub fn prefixes(&self) -> Vec<IpNet> {
        match (self.start, self.end) {
            (IpAddr::V4(start), IpAddr::V4(end)) => {
                Ipv4Subnets::new(start, end, 0).map(IpNet::V4).collect()
            }
            (IpAddr::V6(start), IpAddr::V6(end)) => {
                Ipv6Subnets::new(start, end, 0).map(IpNet::V6).collect()
            }
            _ => Vec::new(),
        }
    }

    /// RFC 9484's order: by IP version, protocol, first address.
    fn order(&self, other: &Self) -> Ordering {
        let key = |range: &Self| (range.start.is_ipv6(), range.protocol, range.start);
        key(self).cmp(&key(other))
    }

    /// Whether `next` may follow this one: RFC 9484's order, and no overlap.
    fn may_precede(&self, next: &Self) -> bool {
        match self.order(next) {
            Ordering::Less => {
                (self.start.is_ipv6(), self.protocol) != (next.start.is_ipv6(), next.protocol)
                    || self.end < next.start
            }
            Ordering::Equal | Ordering::Greater => false,
        }
    }
}

/// Why a connection is closed, told by a CLOSE capsule right before the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloseReason {
    /// The sender is going away, as on a restart; connecting again is welcome.
    Shutdown,
    /// Another client instance uses the same token now; the receiver must not connect again by itself.
    Superseded,
    /// The token is valid no more; the receiver must not connect again by itself.
    Revoked,
    /// Another connection of the same session took this one's place.
    Replaced,
    /// The receiver broke the protocol.
    Misbehaved,
    /// The server has no address left for a new client.
    Exhausted,
    /// A reason of a later version of the protocol. To be treated like [`CloseReason::Shutdown`].
    Other(u64),
}

impl CloseReason {
    /// The reason's number on the wire.
    pub const fn code(self) -> u64 {
        match self {
            CloseReason::Shutdown => 0,
            CloseReason::Superseded => 1,
            CloseReason::Revoked => 2,
            CloseReason::Replaced => 3,
            CloseReason::Misbehaved => 4,
            CloseReason::Exhausted => 5,
            CloseReason::Other(code) => code,
        }
    }

    /// The reason with this number.
    pub const fn from_code(code: u64) -> Self {
        match code {
            0 => CloseReason::Shutdown,
            1 => CloseReason::Superseded,
            2 => CloseReason::Revoked,
            3 => CloseReason::Replaced,
            4 => CloseReason::Misbehaved,
            5 => CloseReason::Exhausted,
            code => CloseReason::Other(code),
        }
    }

    /// Whether a client that is told so stops, instead of connecting again.
    pub const fn is_final(self) -> bool {
        matches!(self, CloseReason::Superseded | CloseReason::Revoked)
    }
}

impl std::fmt::Display for CloseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CloseReason::Shutdown => f.write_str("the other side is shutting down"),
            CloseReason::Superseded => f.write_str("another client uses the same invite now"),
            CloseReason::Revoked => f.write_str("the invite was revoked"),
            CloseReason::Replaced => f.write_str("another connection took this one's place"),
            CloseReason::Misbehaved => {
                f.write_str("the other side saw a violation of the protocol")
            }
            CloseReason::Exhausted => f.write_str("the server has no address left"),
            CloseReason::Other(code) => write!(f, "reason {code}"),
        }
    }
}

/// A capsule other than DATAGRAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capsule {
    /// All the addresses that the receiver may use; it supersedes earlier ones.
    AddressAssign(Vec<AssignedAddress>),
    /// A request for one address for each entry, of which there is at least one.
    AddressRequest(Vec<AssignedAddress>),
    /// All the ranges that the sender routes; it supersedes earlier ones.
    RouteAdvertisement(Vec<IpAddressRange>),
    /// All of the DNS configuration; it supersedes earlier ones.
    DnsAssign(DnsAssign),
    /// To be answered at once by a PONG with the same bytes.
    Ping([u8; PING_BYTES]),
    /// The answer to a PING.
    Pong([u8; PING_BYTES]),
    /// The last capsule before the end.
    Close(CloseReason),
}

impl Capsule {
    /// The capsule's type.
    pub fn kind(&self) -> u64 {
        match self {
            Capsule::AddressAssign(_) => kind::ADDRESS_ASSIGN,
            Capsule::AddressRequest(_) => kind::ADDRESS_REQUEST,
            Capsule::RouteAdvertisement(_) => kind::ROUTE_ADVERTISEMENT,
            Capsule::DnsAssign(_) => kind::DNS_ASSIGN,
            Capsule::Ping(_) => kind::PING,
            Capsule::Pong(_) => kind::PONG,
            Capsule::Close(_) => kind::CLOSE,
        }
    }

    /// Appends the capsule, header and value. Routes are put in RFC 9484's order.
    ///
    /// # Errors
    /// The value is one that the protocol does not allow, or longer than [`CONTROL_BYTES_MAX`]. Nothing is appended.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let value = self.value()?;
        if value.len() > CONTROL_BYTES_MAX {
            return Err(EncodeError::TooLong(value.len()));
        }
        // Checked by the rules of the receiver, so that there is only one set of rules.
        Capsule::decode(self.kind(), &value).map_err(EncodeError::Refused)?;
        put_capsule(self.kind(), &value, out);
        Ok(())
    }

    fn value(&self) -> Result<Vec<u8>, EncodeError> {
        let mut value = Vec::new();
        match self {
            Capsule::AddressAssign(addresses) | Capsule::AddressRequest(addresses) => {
                for address in addresses {
                    put_address(address, &mut value)?;
                }
            }
            Capsule::RouteAdvertisement(ranges) => {
                let mut ranges = ranges.clone();
                ranges.sort_by(IpAddressRange::order);
                for range in &ranges {
                    put_range(range, &mut value)?;
                }
            }
            Capsule::DnsAssign(dns) => dns.encode(&mut value),
            Capsule::Ping(bytes) | Capsule::Pong(bytes) => value.extend_from_slice(bytes),
            Capsule::Close(reason) => put_varint(&mut value, checked_integer(reason.code())?),
        }
        Ok(value)
    }

    /// The capsule in a vector of its own.
    ///
    /// # Errors
    /// As [`Capsule::encode`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        self.encode(&mut out)?;
        Ok(out)
    }

    /// Appends a PING. Unlike [`Capsule::encode`] this cannot fail.
    pub fn put_ping(payload: [u8; PING_BYTES], out: &mut Vec<u8>) {
        put_capsule(kind::PING, &payload, out);
    }

    /// Appends a PONG. Unlike [`Capsule::encode`] this cannot fail.
    pub fn put_pong(payload: [u8; PING_BYTES], out: &mut Vec<u8>) {
        put_capsule(kind::PONG, &payload, out);
    }

    /// Appends a CLOSE. A code above [`VARINT_MAX`], which no decoder makes, is sent as
    /// [`VARINT_MAX`]: unlike [`Capsule::encode`] this cannot fail.
    pub fn put_close(reason: CloseReason, out: &mut Vec<u8>) {
        let mut value = Vec::new();
        put_varint(&mut value, reason.code());
        put_capsule(kind::CLOSE, &value, out);
    }

    /// Reads a capsule's value. `None` for a type that is not known here, DATAGRAM included.
    ///
    /// # Errors
    /// The value is malformed, which ends the connection.
    pub fn decode(kind: u64, value: &[u8]) -> Result<Option<Capsule>, CapsuleError> {
        let mut reader = Reader(value);
        let capsule = match kind {
            kind::ADDRESS_ASSIGN => Capsule::AddressAssign(reader.rest(Reader::address)?),
            kind::ADDRESS_REQUEST => {
                let addresses = reader.rest(Reader::address)?;
                if addresses.is_empty() {
                    return Err(CapsuleError::EmptyRequest);
                }
                if addresses.iter().any(|address| address.request_id == 0) {
                    return Err(CapsuleError::ZeroRequestId);
                }
                Capsule::AddressRequest(addresses)
            }
            kind::ROUTE_ADVERTISEMENT => {
                let ranges = reader.rest(Reader::range)?;
                if !ranges.is_sorted_by(IpAddressRange::may_precede) {
                    return Err(CapsuleError::RangeOrder);
                }
                Capsule::RouteAdvertisement(ranges)
            }
            kind::DNS_ASSIGN => Capsule::DnsAssign(DnsAssign::decode(&mut reader)?),
            kind::PING => Capsule::Ping(reader.ping()?),
            kind::PONG => Capsule::Pong(reader.ping()?),
            // Whatever follows the code is kept for later versions.
            kind::CLOSE => {
                return Ok(Some(Capsule::Close(CloseReason::from_code(
                    reader.varint()?,
                ))));
            }
            _ => return Ok(None),
        };
        if reader.0.is_empty() {
            Ok(Some(capsule))
        } else {
            Err(CapsuleError::Trailing)
        }
    }
}

/// The bytes in front of a packet: the DATAGRAM capsule's type and length, and the context id.
#[derive(Clone, Copy, Debug)]
pub struct DatagramHeader {
    bytes: [u8; DATAGRAM_HEADER_BYTES_MAX],
    length: u8,
}

impl DatagramHeader {
    /// The header.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// The header of a DATAGRAM whose payload (after the context id) is `payload_bytes` long, in the fewest bytes.
///
/// # Panics
/// When `payload_bytes` is above [`DATAGRAM_PAYLOAD_BYTES_MAX`]: packets of the local TUN never are.
#[inline]
pub fn datagram_header(context: u64, payload_bytes: usize) -> DatagramHeader {
    assert!(
        payload_bytes <= DATAGRAM_PAYLOAD_BYTES_MAX,
        "a datagram that peers skip"
    );
    let mut bytes = [0; DATAGRAM_HEADER_BYTES_MAX];
    // The type is DATAGRAM: one zero byte, which is there already.
    let mut length = varint_bytes(kind::DATAGRAM);
    length += varint::write_varint(
        &mut bytes[length..],
        (varint_bytes(context) + payload_bytes) as u64,
    );
    length += varint::write_varint(&mut bytes[length..], context);
    DatagramHeader {
        bytes,
        length: length as u8,
    }
}

fn put_capsule(kind: u64, value: &[u8], out: &mut Vec<u8>) {
    put_varint(out, kind);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn checked_integer(value: u64) -> Result<u64, EncodeError> {
    if value <= VARINT_MAX {
        Ok(value)
    } else {
        Err(EncodeError::IntegerRange(value))
    }
}

fn put_ip(address: IpAddr, out: &mut Vec<u8>) {
    match address {
        IpAddr::V4(address) => out.extend_from_slice(&address.octets()),
        IpAddr::V6(address) => out.extend_from_slice(&address.octets()),
    }
}

fn version_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 6 }
}

fn put_address(address: &AssignedAddress, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    put_varint(out, checked_integer(address.request_id)?);
    out.push(version_of(address.prefix.addr()));
    put_ip(address.prefix.addr(), out);
    out.push(address.prefix.prefix_len());
    Ok(())
}

fn put_range(range: &IpAddressRange, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    if range.start.is_ipv4() != range.end.is_ipv4() {
        return Err(EncodeError::RangeVersions);
    }
    out.push(version_of(range.start));
    put_ip(range.start, out);
    put_ip(range.end, out);
    out.push(range.protocol);
    Ok(())
}

/// What is left of a capsule's value.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], CapsuleError> {
        let (taken, rest) = self
            .0
            .split_at_checked(bytes)
            .ok_or(CapsuleError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CapsuleError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(CapsuleError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, CapsuleError> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn varint(&mut self) -> Result<u64, CapsuleError> {
        let (value, bytes) = get_varint(self.0).ok_or(CapsuleError::Truncated)?;
        self.take(bytes)?;
        Ok(value)
    }

    /// As many elements as a leading count says. Nothing is reserved for a count, so a lie about it costs nothing.
    fn counted<T>(
        &mut self,
        element: impl Fn(&mut Self) -> Result<T, CapsuleError>,
    ) -> Result<Vec<T>, CapsuleError> {
        let count = self.varint()?;
        let mut elements = Vec::new();
        for _ in 0..count {
            elements.push(element(self)?);
        }
        Ok(elements)
    }

    /// Elements up to the end. Each must take at least one byte.
    fn rest<T>(
        &mut self,
        element: impl Fn(&mut Self) -> Result<T, CapsuleError>,
    ) -> Result<Vec<T>, CapsuleError> {
        let mut elements = Vec::new();
        while !self.0.is_empty() {
            elements.push(element(self)?);
        }
        Ok(elements)
    }

    fn ip(&mut self, version: u8) -> Result<IpAddr, CapsuleError> {
        match version {
            4 => Ok(IpAddr::V4(Ipv4Addr::from(self.array::<4>()?))),
            6 => Ok(IpAddr::V6(Ipv6Addr::from(self.array::<16>()?))),
            other => Err(CapsuleError::IpVersion(other)),
        }
    }

    fn address(&mut self) -> Result<AssignedAddress, CapsuleError> {
        let request_id = self.varint()?;
        let version = self.byte()?;
        let address = self.ip(version)?;
        let prefix_bits = self.byte()?;
        let prefix = IpNet::new(address, prefix_bits)
            .map_err(|_| CapsuleError::PrefixLength(prefix_bits))?;
        if prefix.trunc() != prefix {
            return Err(CapsuleError::HostBits(prefix));
        }
        Ok(AssignedAddress { request_id, prefix })
    }

    fn range(&mut self) -> Result<IpAddressRange, CapsuleError> {
        let version = self.byte()?;
        let start = self.ip(version)?;
        let end = self.ip(version)?;
        let protocol = self.byte()?;
        if start > end {
            return Err(CapsuleError::RangeInverted);
        }
        Ok(IpAddressRange {
            start,
            end,
            protocol,
        })
    }

    fn ping(&mut self) -> Result<[u8; PING_BYTES], CapsuleError> {
        let bytes = self.0.len();
        let ping = self.array().map_err(|_| CapsuleError::PingBytes(bytes))?;
        if bytes == PING_BYTES {
            Ok(ping)
        } else {
            Err(CapsuleError::PingBytes(bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::strategies::{any_capsule, capsule, ip, value};
    use super::*;
    use proptest::prelude::*;

    const ALL_KINDS: [u64; 8] = [
        kind::DATAGRAM,
        kind::ADDRESS_ASSIGN,
        kind::ADDRESS_REQUEST,
        kind::ROUTE_ADVERTISEMENT,
        kind::DNS_ASSIGN,
        kind::PING,
        kind::PONG,
        kind::CLOSE,
    ];

    /// Header and value of the one capsule in `bytes`.
    fn split(bytes: &[u8]) -> (u64, &[u8]) {
        let (kind, kind_bytes) = get_varint(bytes).unwrap();
        let (length, length_bytes) = get_varint(&bytes[kind_bytes..]).unwrap();
        let value = &bytes[kind_bytes + length_bytes..];
        assert_eq!(value.len() as u64, length);
        (kind, value)
    }

    fn decode(kind: u64, value: &[u8]) -> Result<Capsule, CapsuleError> {
        Capsule::decode(kind, value).map(|capsule| capsule.expect("a known type"))
    }

    #[test]
    fn no_type_is_one_that_means_nothing() {
        for (place, kind) in ALL_KINDS.iter().enumerate() {
            assert_ne!(
                kind % 0x29,
                0x17,
                "{kind:#x} is reserved by RFC 9297, section 5.4"
            );
            assert!(*kind <= VARINT_MAX);
            assert!(!ALL_KINDS[..place].contains(kind));
            assert_eq!(kind::is_control(*kind), *kind != kind::DATAGRAM);
        }
        assert!(
            [kind::PING, kind::PONG, kind::CLOSE]
                .iter()
                .all(|kind| *kind > 0x3f)
        );
    }

    #[test]
    fn an_address_assignment_is_as_rfc_9484_draws_it() {
        let capsule = Capsule::AddressAssign(vec![
            AssignedAddress::host(1, "192.0.2.11".parse().unwrap()),
            AssignedAddress {
                request_id: 0,
                prefix: "2001:db8::/64".parse().unwrap(),
            },
        ]);
        let mut expected = vec![
            0x01,
            7 + 19,
            1,
            4,
            192,
            0,
            2,
            11,
            32,
            0,
            6,
            0x20,
            0x01,
            0x0d,
            0xb8,
        ];
        expected.extend([0; 12]);
        expected.push(64);
        assert_eq!(capsule.to_bytes(), Ok(expected));
    }

    #[test]
    fn a_route_advertisement_is_as_rfc_9484_draws_it_and_in_its_order() {
        let capsule = Capsule::RouteAdvertisement(vec![
            IpAddressRange::everything_v6(),
            IpAddressRange::everything_v4(),
        ]);
        let mut expected = vec![0x03, 10 + 34, 4, 0, 0, 0, 0, 255, 255, 255, 255, 0, 6];
        expected.extend([0; 16]);
        expected.extend([255; 16]);
        expected.push(0);
        assert_eq!(capsule.to_bytes(), Ok(expected));
    }

    #[test]
    fn pings_and_closes_are_as_documented() {
        let ping = Capsule::Ping(*b"01234567").to_bytes();
        assert_eq!(ping.unwrap(), b"\xab\x73\xc5\xa4\x0801234567");
        let pong = Capsule::Pong(*b"01234567").to_bytes();
        assert_eq!(pong.unwrap(), b"\xab\x73\xc5\xa5\x0801234567");
        assert_eq!(
            Capsule::Close(CloseReason::Superseded).to_bytes().unwrap(),
            b"\xab\x73\xc5\xa6\x01\x01"
        );
    }

    #[test]
    fn what_cannot_fail_is_encoded_the_same_way() {
        let mut direct = Vec::new();
        Capsule::put_ping(*b"01234567", &mut direct);
        Capsule::put_pong(*b"76543210", &mut direct);
        Capsule::put_close(CloseReason::Other(VARINT_MAX), &mut direct);
        let mut encoded = Vec::new();
        for capsule in [
            Capsule::Ping(*b"01234567"),
            Capsule::Pong(*b"76543210"),
            Capsule::Close(CloseReason::Other(VARINT_MAX)),
        ] {
            capsule.encode(&mut encoded).unwrap();
        }
        assert_eq!(direct, encoded);
        Capsule::put_close(CloseReason::Other(u64::MAX), &mut direct);
        let last = Capsule::Close(CloseReason::Other(VARINT_MAX));
        last.encode(&mut encoded).unwrap();
        assert_eq!(direct, encoded, "saturated");
    }

    #[test]
    fn what_receivers_refuse_is_not_encoded() {
        let refused = |capsule: Capsule| {
            let mut out = b"before".to_vec();
            let refused = capsule.encode(&mut out).expect_err("refused");
            assert_eq!(out, b"before");
            refused
        };
        let host = AssignedAddress::unspecified_v4;
        let with_host_bits: IpNet = "10.0.0.1/24".parse().unwrap();
        let range = |start: &str, end: &str| IpAddressRange {
            start: start.parse().unwrap(),
            end: end.parse().unwrap(),
            protocol: 0,
        };
        let cases = [
            (
                Capsule::AddressAssign(vec![host(1); 2341]),
                EncodeError::TooLong(16_387),
            ),
            (
                Capsule::AddressAssign(vec![host(VARINT_MAX + 1)]),
                EncodeError::IntegerRange(VARINT_MAX + 1),
            ),
            (
                Capsule::Close(CloseReason::Other(u64::MAX)),
                EncodeError::IntegerRange(u64::MAX),
            ),
            (
                Capsule::AddressAssign(vec![AssignedAddress {
                    request_id: 0,
                    prefix: with_host_bits,
                }]),
                EncodeError::Refused(CapsuleError::HostBits(with_host_bits)),
            ),
            (
                Capsule::AddressRequest(vec![]),
                EncodeError::Refused(CapsuleError::EmptyRequest),
            ),
            (
                Capsule::RouteAdvertisement(vec![range("10.0.0.1", "::1")]),
                EncodeError::RangeVersions,
            ),
            (
                Capsule::RouteAdvertisement(vec![range("10.0.0.1", "10.0.0.1"); 2]),
                EncodeError::Refused(CapsuleError::RangeOrder),
            ),
            (
                Capsule::DnsAssign(DnsAssign::plain([], vec!["a".repeat(256)])),
                EncodeError::Refused(CapsuleError::Domain),
            ),
        ];
        for (capsule, error) in cases {
            assert_eq!(refused(capsule), error);
        }
    }

    #[test]
    fn the_document_has_the_same_types_and_reasons() {
        let document = include_str!("../../docs/protocol.md");
        for kind in ALL_KINDS {
            assert!(
                document.contains(&format!("\n| 0x{kind:02x} | ")),
                "{kind:#x}"
            );
        }
        for (code, name) in (0..).zip([
            "shutdown",
            "superseded",
            "revoked",
            "replaced",
            "misbehaved",
            "exhausted",
        ]) {
            assert!(
                document.contains(&format!("\n| {code} | {name} | ")),
                "{name}"
            );
            let reason = format!("{:?}", CloseReason::from_code(code)).to_lowercase();
            assert_eq!(reason, name);
        }
    }

    #[test]
    fn unknown_types_are_not_decoded() {
        for kind in [
            kind::DATAGRAM,
            0x17,
            0x29 + 0x17,
            0x04,
            0x274c_0fbc,
            VARINT_MAX,
        ] {
            assert_eq!(Capsule::decode(kind, b"anything"), Ok(None));
        }
    }

    #[test]
    fn malformed_addresses_are_refused() {
        let cases: &[(&[u8], CapsuleError)] = &[
            (&[0], CapsuleError::Truncated),
            (&[0, 4, 10, 0, 0], CapsuleError::Truncated),
            (&[0, 4, 10, 0, 0, 1], CapsuleError::Truncated),
            (&[0, 5, 10, 0, 0, 1, 32], CapsuleError::IpVersion(5)),
            (&[0, 4, 10, 0, 0, 1, 33], CapsuleError::PrefixLength(33)),
            (
                &[0, 4, 10, 0, 0, 1, 24],
                CapsuleError::HostBits("10.0.0.1/24".parse().unwrap()),
            ),
        ];
        for (value, error) in cases {
            assert_eq!(
                decode(kind::ADDRESS_ASSIGN, value),
                Err(*error),
                "{value:?}"
            );
        }
        assert_eq!(
            decode(kind::ADDRESS_ASSIGN, &[]),
            Ok(Capsule::AddressAssign(vec![])),
            "all addresses are removed"
        );
        assert_eq!(
            decode(kind::ADDRESS_REQUEST, &[]),
            Err(CapsuleError::EmptyRequest)
        );
        assert_eq!(
            decode(kind::ADDRESS_REQUEST, &[0, 4, 0, 0, 0, 0, 32]),
            Err(CapsuleError::ZeroRequestId)
        );
    }

    #[test]
    fn malformed_routes_are_refused() {
        fn range(start: u8, end: u8, protocol: u8) -> [u8; 10] {
            [4, 10, 0, 0, start, 10, 0, 0, end, protocol]
        }
        let order = |ranges: &[[u8; 10]]| decode(kind::ROUTE_ADVERTISEMENT, &ranges.concat());
        assert_eq!(order(&[range(9, 8, 0)]), Err(CapsuleError::RangeInverted));
        assert_eq!(
            order(&[range(5, 9, 0), range(9, 12, 0)]),
            Err(CapsuleError::RangeOrder),
            "overlap"
        );
        assert_eq!(
            order(&[range(5, 9, 0), range(1, 2, 0)]),
            Err(CapsuleError::RangeOrder),
            "address order"
        );
        assert_eq!(
            order(&[range(1, 2, 17), range(5, 9, 6)]),
            Err(CapsuleError::RangeOrder),
            "protocol order"
        );
        assert!(order(&[range(5, 9, 6), range(1, 9, 17)]).is_ok());
        let v6 = [&[6][..], &[0; 32], &[0]].concat();
        let v4 = range(1, 2, 0).to_vec();
        assert!(
            decode(
                kind::ROUTE_ADVERTISEMENT,
                &[v4.clone(), v6.clone()].concat()
            )
            .is_ok()
        );
        assert_eq!(
            decode(kind::ROUTE_ADVERTISEMENT, &[v6, v4].concat()),
            Err(CapsuleError::RangeOrder)
        );
    }

    #[test]
    fn pings_of_another_length_are_refused() {
        for bytes in [0, 7, 9] {
            assert_eq!(
                decode(kind::PING, &vec![0; bytes]),
                Err(CapsuleError::PingBytes(bytes))
            );
            assert_eq!(
                decode(kind::PONG, &vec![0; bytes]),
                Err(CapsuleError::PingBytes(bytes))
            );
        }
    }

    #[test]
    fn close_reasons_of_later_versions_are_tolerated() {
        assert_eq!(
            decode(kind::CLOSE, b"\x3f and why"),
            Ok(Capsule::Close(CloseReason::Other(0x3f)))
        );
        assert_eq!(decode(kind::CLOSE, b""), Err(CapsuleError::Truncated));
        assert!((0..100).all(|code| CloseReason::from_code(code).code() == code));
        assert!(CloseReason::Superseded.is_final() && CloseReason::Revoked.is_final());
        assert!(!CloseReason::Shutdown.is_final() && !CloseReason::Other(77).is_final());
    }

    #[test]
    fn a_datagram_header_is_as_short_as_can_be() {
        assert_eq!(datagram_header(0, 20).as_bytes(), [0, 21, 0]);
        assert_eq!(datagram_header(2, 62).as_bytes(), [0, 63, 2]);
        assert_eq!(datagram_header(2, 63).as_bytes(), [0, 0x40, 64, 2]);
        assert_eq!(datagram_header(0, 1500).as_bytes(), [0, 0x45, 0xdd, 0]);
        assert_eq!(
            datagram_header(2, 65_545).as_bytes(),
            [0, 0x80, 1, 0, 10, 2]
        );
        assert_eq!(datagram_header(VARINT_MAX, 65_545).as_bytes().len(), 13);
    }

    #[test]
    fn ranges_turn_into_prefixes() {
        let prefixes = |start: &str, end: &str| {
            IpAddressRange {
                start: start.parse().unwrap(),
                end: end.parse().unwrap(),
                protocol: 0,
            }
            .prefixes()
            .iter()
            .map(IpNet::to_string)
            .collect::<Vec<_>>()
        };
        assert_eq!(prefixes("0.0.0.0", "255.255.255.255"), ["0.0.0.0/0"]);
        assert_eq!(
            prefixes("10.0.0.1", "10.0.0.4"),
            ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/32"]
        );
        assert_eq!(
            prefixes("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ["::/0"]
        );
        assert_eq!(prefixes("10.0.0.1", "::1"), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(capsule in capsule()) {
            let bytes = capsule.to_bytes().unwrap();
            let (kind, value) = split(&bytes);
            prop_assert_eq!(kind, capsule.kind());
            prop_assert_eq!(Capsule::decode(kind, value), Ok(Some(capsule)));
        }

        /// No prefix of a value is taken for the whole, but where the protocol has lists without a count.
        #[test]
        fn a_cut_value_is_never_misread(capsule in capsule(), cut in any::<prop::sample::Index>()) {
            let bytes = capsule.to_bytes().unwrap();
            let (kind, value) = split(&bytes);
            prop_assume!(!value.is_empty());
            let cut = cut.index(value.len());
            prop_assert_ne!(Capsule::decode(kind, &value[..cut]), Ok(Some(capsule)));
        }

        #[test]
        fn decoding_anything_is_safe_and_stable(
            kind in prop::sample::select(ALL_KINDS.to_vec()),
            value in value(),
        ) {
            if let Ok(Some(capsule)) = Capsule::decode(kind, &value) {
                let bytes = capsule.to_bytes().unwrap();
                let (kind, value) = split(&bytes);
                prop_assert_eq!(Capsule::decode(kind, value), Ok(Some(capsule)));
            }
        }

        /// Whatever the types allow: what is sent is what the receiver takes, and nothing panics.
        #[test]
        fn any_value_is_encoded_for_the_receiver_or_refused(capsule in any_capsule()) {
            let mut out = b"before".to_vec();
            match capsule.encode(&mut out) {
                Ok(()) => {
                    let (kind, value) = split(&out[6..]);
                    let decoded = Capsule::decode(kind, value).unwrap().unwrap();
                    match (decoded, capsule) {
                        (Capsule::RouteAdvertisement(decoded), Capsule::RouteAdvertisement(mut sent)) => {
                            sent.sort_by(IpAddressRange::order);
                            prop_assert_eq!(decoded, sent);
                        }
                        // Numbers of reasons that are known have a name afterwards.
                        (Capsule::Close(decoded), Capsule::Close(sent)) => {
                            prop_assert_eq!(decoded.code(), sent.code());
                        }
                        (decoded, sent) => prop_assert_eq!(decoded, sent),
                    }
                }
                Err(_) => prop_assert_eq!(out, b"before"),
            }
        }

        #[test]
        fn range_prefixes_cover_the_range_exactly(one in ip(), other in ip()) {
            let number = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => u128::from(u32::from(ip)),
                IpAddr::V6(ip) => u128::from(ip),
            };
            let (start, end) = (one.min(other), one.max(other));
            let range = IpAddressRange { start, end, protocol: 0 };
            let prefixes = range.prefixes();
            if start.is_ipv4() != end.is_ipv4() {
                prop_assert_eq!(prefixes, vec![]);
                return Ok(());
            }
            let prefixes_max = if start.is_ipv4() { 62 } else { 254 };
            prop_assert!(prefixes.len() <= prefixes_max);
            let mut next = number(start);
            for prefix in &prefixes {
                prop_assert_eq!(number(prefix.network()), next);
                next = number(prefix.broadcast()).wrapping_add(1);
            }
            prop_assert_eq!(next, number(end).wrapping_add(1));
        }
    }
}
