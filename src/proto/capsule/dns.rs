//! The value of DNS_ASSIGN (draft-ietf-masque-connect-ip-dns-06, section 3).
//!
//! The draft describes name servers as SVCB records do (RFC 9460), so that encrypted DNS can be told, too. We send
//! only plain ones and use only plain ones, but read and keep everything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{CapsuleError, Reader, put_varint};

/// The longest domain name, in bytes.
pub const DOMAIN_BYTES_MAX: usize = 255;

/// The port of unencrypted DNS.
const PLAIN_PORT: u16 = 53;

/// Keys of service parameters (RFC 9460, section 14.3.2).
mod key {
    pub const ALPN: u16 = 1;
    pub const NO_DEFAULT_ALPN: u16 = 2;
    pub const PORT: u16 = 3;
    pub const IPV4HINT: u16 = 4;
    pub const IPV6HINT: u16 = 6;
}

/// DNS configurations, each for its own part of the name space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsAssign {
    /// The configurations. None at all takes back what an earlier capsule said.
    pub configurations: Vec<DnsConfiguration>,
}

/// Which name servers resolve which names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConfiguration {
    /// The name servers.
    pub nameservers: Vec<Nameserver>,
    /// The domains that they resolve, with all their subdomains. The empty name is the root: everything.
    pub internal_domains: Vec<String>,
    /// The domains in which to look for names without a dot.
    pub search_domains: Vec<String>,
}

/// A name server and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nameserver {
    /// The lower the earlier to be used; never 0.
    pub priority: u16,
    /// Its IPv4 addresses.
    pub addresses_v4: Vec<Ipv4Addr>,
    /// Its IPv6 addresses.
    pub addresses_v6: Vec<Ipv6Addr>,
    /// The name in its certificate; empty if it speaks only unencrypted DNS.
    pub authentication_domain: String,
    /// SVCB service parameters in wire format.
    pub service_parameters: Vec<u8>,
}

impl Nameserver {
    /// A name server that speaks unencrypted DNS on port 53.
    pub fn plain(address: IpAddr) -> Self {
        let (addresses_v4, addresses_v6) = match address {
            IpAddr::V4(address) => (vec![address], vec![]),
            IpAddr::V6(address) => (vec![], vec![address]),
        };
        Nameserver {
            priority: 1,
            addresses_v4,
            addresses_v6,
            authentication_domain: String::new(),
            service_parameters: Vec::new(),
        }
    }

    /// All its addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.addresses_v4.iter().copied().map(IpAddr::V4);
        v4.chain(self.addresses_v6.iter().copied().map(IpAddr::V6))
    }

    /// Whether it can be named in a resolv.conf: unencrypted DNS on port 53.
    pub fn is_plain(&self) -> bool {
        let mut parameters = parameters(&self.service_parameters);
        parameters.all(|parameter| match parameter {
            Ok((key::NO_DEFAULT_ALPN, _)) | Err(_) => false,
            Ok((key::PORT, value)) => value == PLAIN_PORT.to_be_bytes(),
            Ok(_) => true,
        })
    }
}

impl DnsAssign {
    /// Plain name servers, in the order of preference, for all names.
    pub fn plain(
        nameservers: impl IntoIterator<Item = IpAddr>,
        search_domains: Vec<String>,
    ) -> Self {
        let nameservers = (1..)
            .zip(nameservers)
            .map(|(priority, address)| Nameserver {
                priority,
                ..Nameserver::plain(address)
            });
        DnsAssign {
            configurations: vec![DnsConfiguration {
                nameservers: nameservers.collect(),
                internal_domains: vec![String::new()],
                search_domains,
            }],
        }
    }

    /// The addresses of the plain name servers that resolve all names, the preferred first.
    pub fn plain_nameservers(&self) -> Vec<IpAddr> {
        let mut nameservers: Vec<&Nameserver> = self
            .configurations
            .iter()
            .filter(|configuration| configuration.internal_domains.iter().any(String::is_empty))
            .flat_map(|configuration| &configuration.nameservers)
            .filter(|nameserver| nameserver.is_plain())
            .collect();
        nameservers.sort_by_key(|nameserver| nameserver.priority);
        nameservers
            .into_iter()
            .flat_map(Nameserver::addresses)
            .collect()
    }

    /// All search domains, in order.
    pub fn search_domains(&self) -> impl Iterator<Item = &str> {
        let all = self
            .configurations
            .iter()
            .flat_map(|configuration| &configuration.search_domains);
        all.map(String::as_str)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for configuration in &self.configurations {
            put_counted(&configuration.nameservers, put_nameserver, out);
            put_counted(
                &configuration.internal_domains,
                |domain, out| put_domain(domain, out),
                out,
            );
            put_counted(
                &configuration.search_domains,
                |domain, out| put_domain(domain, out),
                out,
            );
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, CapsuleError> {
        let configurations = reader.rest(|reader| {
            Ok(DnsConfiguration {
                nameservers: reader.counted(nameserver)?,
                internal_domains: reader.counted(domain)?,
                search_domains: reader.counted(domain)?,
            })
        })?;
        Ok(DnsAssign { configurations })
    }
}

fn put_counted<T>(elements: &[T], put: impl Fn(&T, &mut Vec<u8>), out: &mut Vec<u8>) {
    put_varint(out, elements.len() as u64);
    elements.iter().for_each(|element| put(element, out));
}

fn put_nameserver(nameserver: &Nameserver, out: &mut Vec<u8>) {
    out.extend_from_slice(&nameserver.priority.to_be_bytes());
    put_counted(
        &nameserver.addresses_v4,
        |ip, out| out.extend_from_slice(&ip.octets()),
        out,
    );
    put_counted(
        &nameserver.addresses_v6,
        |ip, out| out.extend_from_slice(&ip.octets()),
        out,
    );
    put_domain(&nameserver.authentication_domain, out);
    put_varint(out, nameserver.service_parameters.len() as u64);
    out.extend_from_slice(&nameserver.service_parameters);
}

fn put_domain(domain: &str, out: &mut Vec<u8>) {
    put_varint(out, domain.len() as u64);
    out.extend_from_slice(domain.as_bytes());
}

fn nameserver(reader: &mut Reader<'_>) -> Result<Nameserver, CapsuleError> {
    let nameserver = Nameserver {
        priority: u16::from_be_bytes(reader.array()?),
        addresses_v4: reader.counted(|reader| reader.array::<4>().map(Ipv4Addr::from))?,
        addresses_v6: reader.counted(|reader| reader.array::<16>().map(Ipv6Addr::from))?,
        authentication_domain: domain(reader)?,
        service_parameters: length_prefixed(reader)?.to_vec(),
    };
    if nameserver.priority == 0 {
        return Err(CapsuleError::NameserverPriority);
    }
    let mut speaks_plain = true;
    for parameter in parameters(&nameserver.service_parameters) {
        match parameter?.0 {
            key::IPV4HINT | key::IPV6HINT => return Err(CapsuleError::ServiceParameters),
            key::ALPN | key::NO_DEFAULT_ALPN if nameserver.authentication_domain.is_empty() => {
                return Err(CapsuleError::ServiceParameters);
            }
            key::NO_DEFAULT_ALPN => speaks_plain = false,
            _ => {}
        }
    }
    if speaks_plain && nameserver.addresses().next().is_none() {
        return Err(CapsuleError::NameserverAddress);
    }
    Ok(nameserver)
}

/// A domain name. Names end up in configuration files, so nothing but host name characters is let in: letters,
/// digits, hyphens, underscores and single dots between them, and perhaps one at the end.
fn domain(reader: &mut Reader<'_>) -> Result<String, CapsuleError> {
    let name = length_prefixed(reader)?;
    if name.is_empty() {
        return Ok(String::new());
    }
    let name = str::from_utf8(name).map_err(|_| CapsuleError::Domain)?;
    let is_label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(allowed)
    };
    if name.len() <= DOMAIN_BYTES_MAX
        && name
            .strip_suffix('.')
            .unwrap_or(name)
            .split('.')
            .all(is_label)
    {
        Ok(name.to_owned())
    } else {
        Err(CapsuleError::Domain)
    }
}

fn length_prefixed<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], CapsuleError> {
    let length = usize::try_from(reader.varint()?).map_err(|_| CapsuleError::Truncated)?;
    reader.take(length)
}

/// The key and value of each service parameter; an error, once, where they are not in RFC 9460's format: a key, a
/// length, a value; keys strictly ascending.
fn parameters(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), CapsuleError>> {
    let mut reader = Reader(bytes);
    let mut keys_min = 0_u32;
    std::iter::from_fn(move || {
        if reader.0.is_empty() {
            return None;
        }
        let parameter = (|| {
            let key = u16::from_be_bytes(reader.array()?);
            let length = u16::from_be_bytes(reader.array()?);
            let value = reader.take(usize::from(length))?;
            if u32::from(key) < keys_min {
                return Err(CapsuleError::ServiceParameters);
            }
            keys_min = u32::from(key) + 1;
            Ok((key, value))
        })();
        if parameter.is_err() {
            reader.0 = &[];
        }
        Some(parameter.map_err(|_| CapsuleError::ServiceParameters))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<DnsAssign, CapsuleError> {
        DnsAssign::decode(&mut Reader(bytes))
    }

    /// One configuration with one name server of one IPv4 address, and the parts that a test varies.
    fn with_nameserver(priority: u8, v4: &[u8], domain: &str, parameters: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, 0, priority, (v4.len() / 4) as u8];
        bytes.extend(v4);
        bytes.extend([0, domain.len() as u8]);
        bytes.extend(domain.as_bytes());
        bytes.push(parameters.len() as u8);
        bytes.extend(parameters);
        bytes.extend([0, 0]);
        bytes
    }

    #[test]
    fn plain_name_servers_are_as_the_draft_draws_them() {
        let dns = DnsAssign::plain(
            ["10.87.0.1".parse().unwrap()],
            vec!["corp.example".to_owned()],
        );
        let mut bytes = Vec::new();
        dns.encode(&mut bytes);
        let mut expected = vec![1, 0, 1, 1, 10, 87, 0, 1, 0, 0, 0, 1, 0, 1, 12];
        expected.extend(b"corp.example");
        assert_eq!(bytes, expected);
        assert_eq!(decode(&bytes), Ok(dns));
    }

    #[test]
    fn plain_name_servers_come_back_in_order() {
        let addresses: Vec<IpAddr> = ["2001:db8::53", "192.0.2.53", "198.51.100.53"]
            .map(|address| address.parse().unwrap())
            .to_vec();
        let dns = DnsAssign::plain(
            addresses.clone(),
            vec!["a.example".to_owned(), "b.example".to_owned()],
        );
        assert_eq!(dns.plain_nameservers(), addresses);
        assert_eq!(
            dns.search_domains().collect::<Vec<_>>(),
            ["a.example", "b.example"]
        );
    }

    #[test]
    fn what_resolv_conf_cannot_say_is_left_out() {
        let address: IpAddr = "192.0.2.53".parse().unwrap();
        let only = |change: &dyn Fn(&mut DnsConfiguration)| {
            let mut dns = DnsAssign::plain([address], vec![]);
            change(&mut dns.configurations[0]);
            dns.plain_nameservers()
        };
        assert_eq!(only(&|_| {}), [address]);
        assert!(only(&|c| c.internal_domains = vec!["corp.example".to_owned()]).is_empty());
        assert!(
            only(&|c| c.nameservers[0].service_parameters = vec![0, 3, 0, 2, 0x03, 0x55])
                .is_empty()
        );
        assert_eq!(
            only(&|c| c.nameservers[0].service_parameters = vec![0, 3, 0, 2, 0, 53]),
            [address]
        );
        assert!(only(&|c| c.nameservers[0].service_parameters = vec![0, 2, 0, 0]).is_empty());
    }

    #[test]
    fn malformed_name_servers_are_refused() {
        let v4 = [192, 0, 2, 53];
        assert!(decode(&with_nameserver(1, &v4, "", &[])).is_ok());
        assert_eq!(
            decode(&with_nameserver(0, &v4, "", &[])),
            Err(CapsuleError::NameserverPriority)
        );
        assert_eq!(
            decode(&with_nameserver(1, &[], "", &[])),
            Err(CapsuleError::NameserverAddress)
        );
        let encrypted_only = [0, 1, 0, 3, 2, b'h', b'2', 0, 2, 0, 0];
        assert!(decode(&with_nameserver(1, &[], "dns.example", &encrypted_only)).is_ok());
        for parameters in [
            &encrypted_only[..],
            &[0, 4, 0, 0],
            &[0, 6, 0, 0],
            &[0, 3, 0, 2, 0],
            &[0, 3, 0],
            &[0, 9, 0, 0, 0, 3, 0, 0],
            &[0, 9, 0, 0, 0, 9, 0, 0],
        ] {
            assert_eq!(
                decode(&with_nameserver(1, &v4, "", parameters)),
                Err(CapsuleError::ServiceParameters),
                "{parameters:?}"
            );
        }
    }

    #[test]
    fn names_cannot_smuggle_anything_into_a_file() {
        let search = |name: &str| {
            let mut bytes = vec![0, 0, 1, 0x40 | (name.len() >> 8) as u8, name.len() as u8];
            bytes.extend(name.as_bytes());
            decode(&bytes).map(|dns| dns.configurations[0].search_domains[0].clone())
        };
        for name in [
            "",
            "corp.example",
            "corp.example.",
            "_dns.x1-y",
            &["a"; 127].join("."),
        ] {
            assert_eq!(search(name).as_deref(), Ok(name));
        }
        for name in [
            ".",
            "a..b",
            ".a",
            "a b",
            "a\nnameserver 192.0.2.66",
            "a\\032b",
            "b\u{fc}cher.example",
            &"a".repeat(64),
            &["a"; 129].join("."),
        ] {
            assert_eq!(search(name), Err(CapsuleError::Domain), "{name:?}");
        }
    }

    #[test]
    fn a_count_without_elements_costs_nothing() {
        assert_eq!(
            decode(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            Err(CapsuleError::Truncated)
        );
    }
}
