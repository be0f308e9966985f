//! From a server's addresses to a connected socket: rounds of staggered attempts, the first to connect wins.
//!
//! Each attempt is a socket of its own with a time limit of its own. After an outage a fresh SYN gets through long
//! before TCP would have repeated an old one, so rounds overlap.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::reconnect::{EAGER_INTERVAL, Reconnect};
use super::runtime::connect;
use crate::keeper::{Link, LinkError};

/// How long one attempt may take to connect.
pub const SYN_TIME: Duration = Duration::from_secs(5);
/// The head start of an address before the next one.
pub const ADDRESS_STAGGER: Duration = Duration::from_millis(250);
/// The head start of a port before the next one. Longer than a round, so that 443, once it is back, goes before 80.
pub const PORT_STAGGER: Duration = Duration::from_millis(1500);
const _: () = assert!(PORT_STAGGER.as_millis() > EAGER_INTERVAL.as_millis());

/// Addresses of one server that are tried.
pub const ADDRESSES_MAX: usize = 6;
/// What is tried where 443 does not connect.
const PORT_HTTPS: u16 = 443;
const PORT_HTTP: u16 = 80;

/// Why an attempt did not connect.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The keeper gave no socket.
    #[error(transparent)]
    Keeper(#[from] LinkError),
    /// No answer.
    #[error("no answer within {} s", SYN_TIME.as_secs())]
    TimedOut,
    /// The network or the server said no.
    #[error("{}", reason(.0))]
    Io(std::io::Error),
}

/// The kernel's words without its number.
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error")
        .next()
        .unwrap_or_default()
        .to_lowercase()
}

/// Where a server may be reached, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates {
    order: Vec<SocketAddr>,
    /// The last one that connected and led to nothing.
    suspect: Option<SocketAddr>,
}

impl Candidates {
    /// All addresses on the invite's port, in the resolver's order; then, if that is 443, all of them on 80.
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>, port: u16) -> Self {
        let mut distinct = Vec::new();
        for address in addresses {
            if !distinct.contains(&address) && distinct.len() < ADDRESSES_MAX {
                distinct.push(address);
            }
        }
        let ports = if port == PORT_HTTPS {
            vec![PORT_HTTPS, PORT_HTTP]
        } else {
            vec![port]
        };
        let distinct = &distinct;
        let on = |port| {
            distinct
                .iter()
                .map(move |address| SocketAddr::new(*address, port))
        };
        Candidates {
            order: ports.into_iter().flat_map(on).collect(),
            suspect: None,
        }
    }

    /// What connected but led to nothing, twice in a row, goes last: a firewall may let SYNs through and eat what
    /// follows. Once may be a server that is restarting.
    pub fn failed(&mut self, address: SocketAddr) {
        if self.suspect.replace(address) != Some(address) {
            return;
        }
        if let Some(at) = self.order.iter().position(|other| *other == address) {
            self.order[at..].rotate_left(1);
        }
        self.suspect = None;
    }

    /// What connected led to a tunnel.
    pub fn succeeded(&mut self) {
        self.suspect = None;
    }

    /// Each candidate, and when in a round its attempt starts.
    fn staggered(&self) -> impl Iterator<Item = (SocketAddr, Duration)> {
        let mut start = Duration::ZERO;
        let mut last_port = None;
        self.order.iter().map(move |candidate| {
            start += match last_port.replace(candidate.port()) {
                None => Duration::ZERO,
                Some(port) if port == candidate.port() => ADDRESS_STAGGER,
                Some(_) => PORT_STAGGER,
            };
            (*candidate, start)
        })
    }
}

/// Tries, in the rounds of `policy`, until something connects. `failed` hears of every attempt that did not.
pub async fn dial(
    link: &Link,
    candidates: &Candidates,
    policy: &mut Reconnect,
    network: &mut watch::Receiver<()>,
    mut failed: impl FnMut(SocketAddr, DialError),
) -> (OwnedFd, SocketAddr) {
    let mut attempts = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = until(policy.due().into()) => {
                policy.round_started(Instant::now().into());
                for (candidate, start) in candidates.staggered() {
                    attempts.push(attempt(link, candidate, start));
                }
            }
            Some((candidate, outcome)) = attempts.next() => match outcome {
                Ok(socket) => return (socket, candidate),
                Err(error) => failed(candidate, error),
            },
            Ok(()) = network.changed() => policy.network_changed(Instant::now().into()),
        }
    }
}

/// Waits, but not for what is due: a timer would take a millisecond or two for that.
async fn until(due: Instant) {
    if due > Instant::now() {
        sleep_until(due).await;
    }
}

async fn attempt(
    link: &Link,
    candidate: SocketAddr,
    start: Duration,
) -> (SocketAddr, Result<OwnedFd, DialError>) {
    until(Instant::now() + start).await;
    let deadline = Instant::now() + SYN_TIME;
    let outcome = match link.outer_socket(candidate.ip()).await {
        Ok(socket) => {
            connect(socket, candidate, deadline)
                .await
                .map_err(|error| match error.kind() {
                    std::io::ErrorKind::TimedOut => DialError::TimedOut,
                    _ => DialError::Io(error),
                })
        }
        Err(error) => Err(error.into()),
    };
    (candidate, outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts
            .iter()
            .map(|text| text.parse().expect("address"))
            .collect()
    }

    fn candidates(texts: &[&str], port: u16) -> Candidates {
        Candidates::new(
            texts.iter().map(|text| text.parse().expect("address")),
            port,
        )
    }

    #[test]
    fn port_80_comes_after_443_and_after_no_other() {
        let both = candidates(&["2001:db8::1", "192.0.2.1", "2001:db8::1"], 443);
        let expected = [
            "[2001:db8::1]:443",
            "192.0.2.1:443",
            "[2001:db8::1]:80",
            "192.0.2.1:80",
        ];
        assert_eq!(both.order, addresses(&expected));
        assert_eq!(
            candidates(&["192.0.2.1"], 8443).order,
            addresses(&["192.0.2.1:8443"])
        );
    }

    #[test]
    fn better_candidates_have_a_head_start() {
        let starts: Vec<u128> = candidates(&["2001:db8::1", "192.0.2.1"], 443)
            .staggered()
            .map(|(_, start)| start.as_millis())
            .collect();
        assert_eq!(starts, [0, 250, 1750, 2000]);
    }

    #[test]
    fn a_candidate_that_led_to_nothing_twice_goes_last() {
        let mut candidates = candidates(&["192.0.2.1", "192.0.2.2"], 443);
        let (first, before) = (candidates.order[0], candidates.order.clone());
        candidates.failed(first);
        candidates.succeeded();
        candidates.failed(first);
        assert_eq!(candidates.order, before);
        candidates.failed(first);
        assert_eq!(
            candidates.order,
            addresses(&[
                "192.0.2.2:443",
                "192.0.2.1:80",
                "192.0.2.2:80",
                "192.0.2.1:443"
            ])
        );
    }

    #[test]
    fn reasons_are_words() {
        let error = DialError::Io(std::io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert_eq!(error.to_string(), "connection refused");
    }
}
