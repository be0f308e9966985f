//! How many TLS handshakes a source may begin: the bound on what one crowd can cost the control
//! thread.
//!
//! A handshake costs the server a signature and a key exchange, and the client next to nothing. So
//! each prefix of [`SourcePrefixes`] has a token bucket that holds [`BURST_TIME`] of its rate, and
//! a handshake takes a token of every prefix that contains its source, or of none.
//!
//! A bucket is kept as the time at which it is full again (the generic cell rate algorithm, ITU-T
//! I.371): one that is full needs no memory. At most [`BUCKETS_MAX`] are kept. When one more is
//! needed, the one that is full next is forgotten, which forgives the least. The bucket of a crowd
//! that begins many handshakes is full last, so no number of addresses makes the crowd's network be
//! forgotten.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::source_prefix::{SourcePrefixes, Tier};

/// A bucket holds as many handshakes as its rate allows in this time.
pub const BURST_TIME: Duration = Duration::from_secs(5);
/// The rate of an IPv6 /56, as a multiple of that of a source.
pub const SITE_RATE_FACTOR: u32 = 2;
/// The rate of an IPv4 /24 or IPv6 /48, as a multiple of that of a source.
pub const NETWORK_RATE_FACTOR: u32 = 4;
const _: () = assert!(1 <= SITE_RATE_FACTOR && SITE_RATE_FACTOR <= NETWORK_RATE_FACTOR);
/// Prefixes whose buckets are kept: about a megabyte.
pub const BUCKETS_MAX: usize = 8192;
/// Full buckets that are forgotten for each handshake. More than one handshake can add, so that
/// they become fewer.
const FORGOTTEN_AT_ONCE: usize = 4;

/// Whether a handshake may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Now; it has been counted.
    Now,
    /// Not now, and nothing was counted. Before this time has passed, asking again is of no use.
    Wait(Duration),
}

/// The token buckets of all sources.
#[derive(Debug)]
pub struct HandshakeRate {
    per_second: u32,
    full_at: HashMap<IpNet, Instant>,
    /// The entries of `full_at` in order of time.
    by_time: BTreeSet<(Instant, IpNet)>,
}

impl HandshakeRate {
    /// All buckets are full. `per_second` is the rate of one source (IPv4 /32, IPv6 /64), at least
    /// 1.
    pub fn new(per_second: u32) -> Self {
        assert!(per_second > 0, "validated by the configuration");
        HandshakeRate {
            per_second,
            full_at: HashMap::new(),
            by_time: BTreeSet::new(),
        }
    }

    /// Takes a token for a handshake that would begin `now`, if each prefix of `source` has one.
    pub fn take(&mut self, source: SourcePrefixes, now: Instant) -> Turn {
        self.forget_full(now);
        let mut wait = Duration::ZERO;
        for (tier, prefix) in source.iter() {
            let full_at = self.full_at_after(tier, prefix, now);
            wait = wait.max(full_at.duration_since(now).saturating_sub(BURST_TIME));
        }
        if wait > Duration::ZERO {
            return Turn::Wait(wait);
        }
        for (tier, prefix) in source.iter() {
            let full_at = self.full_at_after(tier, prefix, now);
            self.keep(prefix, full_at);
        }
        Turn::Now
    }

    /// When the bucket of `prefix` would be full again after one more handshake.
    fn full_at_after(&self, tier: Tier, prefix: IpNet, now: Instant) -> Instant {
        let factor = match tier {
            Tier::Network => NETWORK_RATE_FACTOR,
            Tier::Site => SITE_RATE_FACTOR,
            Tier::Source => 1,
        };
        let token_time = Duration::from_secs(1) / self.per_second.saturating_mul(factor);
        let full_at = self.full_at.get(&prefix).copied();
        full_at.map_or(now, |full_at| full_at.max(now)) + token_time
    }

    fn keep(&mut self, prefix: IpNet, full_at: Instant) {
        if let Some(former) = self.full_at.insert(prefix, full_at) {
            self.by_time.remove(&(former, prefix));
        } else if self.full_at.len() > BUCKETS_MAX
            && let Some((_, fullest)) = self.by_time.pop_first()
        {
            self.full_at.remove(&fullest);
        }
        self.by_time.insert((full_at, prefix));
    }

    fn forget_full(&mut self, now: Instant) {
        for _ in 0..FORGOTTEN_AT_ONCE {
            match self.by_time.first() {
                Some((full_at, prefix)) if *full_at <= now => {
                    self.full_at.remove(prefix);
                    self.by_time.pop_first();
                }
                _ => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::config::HANDSHAKES_PER_SECOND;

    fn source(address: impl Into<IpAddr>) -> SourcePrefixes {
        SourcePrefixes::of(address.into())
    }

    /// Address `host` of the /64 number `subnet` of 2001:db8:1::/48.
    fn of_site(subnet: u16, host: u16) -> SourcePrefixes {
        source(Ipv6Addr::new(0x2001, 0xdb8, 1, subnet, 0, 0, 0, host))
    }

    /// Handshakes that may begin at `now`, one after the other, up to `attempts`.
    fn begun(
        rate: &mut HandshakeRate,
        now: Instant,
        attempts: u32,
        source: impl Fn(u32) -> SourcePrefixes,
    ) -> u32 {
        let turns = (0..attempts).filter(|attempt| rate.take(source(*attempt), now) == Turn::Now);
        turns.count() as u32
    }

    #[test]
    fn an_office_reconnects_without_waiting() {
        let mut rate = HandshakeRate::new(HANDSHAKES_PER_SECOND);
        let now = Instant::now();
        // 30 clients behind one address, each with its first connection and half of those that it
        // may add.
        let office = source(Ipv4Addr::new(192, 0, 2, 1));
        assert_eq!(begun(&mut rate, now, 30 * 8, |_| office), 30 * 8);
    }

    #[test]
    fn a_source_gets_its_burst_and_then_its_rate() {
        let mut rate = HandshakeRate::new(10);
        let now = Instant::now();
        let one = source(Ipv4Addr::new(192, 0, 2, 1));
        assert_eq!(begun(&mut rate, now, 1000, |_| one), 50);
        let Turn::Wait(wait) = rate.take(one, now) else {
            panic!("the bucket is empty");
        };
        assert_eq!(wait, Duration::from_millis(100));
        assert_eq!(begun(&mut rate, now + wait, 1000, |_| one), 1);
        let later = now + wait + Duration::from_secs(1);
        assert_eq!(begun(&mut rate, later, 1000, |_| one), 10);
    }

    #[test]
    fn all_of_a_network_together_has_a_rate_too() {
        let mut rate = HandshakeRate::new(10);
        let now = Instant::now();
        // Another /64 each time, all in one /56, then all over the /48.
        let in_site = begun(&mut rate, now, 1000, |attempt| {
            of_site((attempt % 256) as u16, 1)
        });
        assert_eq!(in_site, 50 * SITE_RATE_FACTOR);
        let in_network = begun(&mut rate, now, 5000, |attempt| {
            of_site((attempt * 13) as u16, 1)
        });
        assert_eq!(in_site + in_network, 50 * NETWORK_RATE_FACTOR);
        // Another network is not concerned.
        let other = source(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1));
        assert_eq!(rate.take(other, now), Turn::Now);
    }

    #[test]
    fn a_refused_handshake_takes_no_token() {
        let mut rate = HandshakeRate::new(10);
        let now = Instant::now();
        let (crowd, quiet) = ([192, 0, 2, 1], [192, 0, 2, 2]);
        assert_eq!(begun(&mut rate, now, 5000, |_| source(crowd)), 50);
        // The network's bucket has lost no more than the 50.
        let left = 50 * NETWORK_RATE_FACTOR - 50;
        let others = begun(&mut rate, now, 5000, |attempt| {
            source([192, 0, 2, 2 + (attempt % 200) as u8])
        });
        assert_eq!(others, left);
        assert_ne!(rate.take(source(quiet), now), Turn::Now);
    }

    #[test]
    fn a_crowds_network_is_not_forgotten() {
        let mut rate = HandshakeRate::new(50);
        let mut now = Instant::now();
        let crowd = source([192, 0, 2, 1]);
        assert_eq!(begun(&mut rate, now, 1000, |_| crowd), 250);
        // More sources than there are buckets, in as little time as that takes.
        for number in 0..2 * BUCKETS_MAX as u32 {
            now += Duration::from_micros(10);
            rate.take(source((0x0a00_0000 + (number << 8)).to_be_bytes()), now);
        }
        // 164 ms bring it 8 tokens; a bucket that was forgotten would have 250.
        assert!(begun(&mut rate, now, 1000, |_| crowd) < 10);
    }

    #[test]
    fn idle_buckets_are_forgotten() {
        let mut rate = HandshakeRate::new(50);
        let mut now = Instant::now();
        for subnet in 0..500 {
            rate.take(of_site(subnet, 1), now);
        }
        for _ in 0..1000 {
            now += BURST_TIME;
            rate.take(source([192, 0, 2, 1]), now);
        }
        assert!(rate.full_at.len() <= 2, "{} buckets", rate.full_at.len());
    }

    proptest! {
        #[test]
        fn no_prefix_exceeds_its_rate(
            attempts in proptest::collection::vec((0_u16..600, 0_u16..3, 0_u64..50_000), 1..400),
        ) {
            let per_second = 4;
            let mut rate = HandshakeRate::new(per_second);
            let begin = Instant::now();
            let mut now = begin;
            let mut counts: HashMap<IpNet, (Tier, u32)> = HashMap::new();
            for (subnet, host, micros) in attempts {
                now += Duration::from_micros(micros);
                let source = of_site(subnet, host);
                if rate.take(source, now) == Turn::Now {
                    for (tier, prefix) in source.iter() {
                        counts.entry(prefix).or_insert((tier, 0)).1 += 1;
                    }
                }
                prop_assert!(rate.full_at.len() <= BUCKETS_MAX);
                prop_assert_eq!(rate.full_at.len(), rate.by_time.len());
            }
            let allowed = (now.duration_since(begin) + BURST_TIME).as_secs_f64();
            for (prefix, (tier, count)) in counts {
                let factor = match tier {
                    Tier::Network => NETWORK_RATE_FACTOR,
                    Tier::Site => SITE_RATE_FACTOR,
                    Tier::Source => 1,
                };
                let most = f64::from(per_second * factor) * allowed + 1.0;
                prop_assert!(f64::from(count) <= most, "{prefix}: {count} of {most}");
            }
        }
    }
}
