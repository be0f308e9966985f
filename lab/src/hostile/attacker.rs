//! The attacker's side: carries a [`Load`] to a [`Target`] until it is told to stop, and counts.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{LocalSet, spawn_local, yield_now};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::attack::{HELD_MAX, Habit, Load, Pace, Strangers, Tunnels};
use super::bytes::BULK_PORT;
use super::target::{Channel, Failure, Identification, Target};
use crate::dial::write_all;
use crate::host::Host;
use crate::topology::WEB_V4;

/// Before a connection that ended or did not open is opened again.
const REOPEN_INTERVAL: Duration = Duration::from_millis(100);
/// Connections that an attacker opens at most while a condition lasts.
const OPENINGS_MAX: u64 = 100_000;
/// An attack ends after this time, whatever becomes of the thread that measures.
const TIME_MAX: Duration = Duration::from_secs(600);
/// An unused connection is held this long at most.
const HELD_TIME: Duration = Duration::from_secs(10);
/// One read takes this much at most.
const READ_BYTES: usize = 16 * 1024;
/// Bulk that `web` sends to an attacker's connections.
const BULK_BITS_PER_SECOND: f64 = 100e6;
/// Payload of each of its datagrams.
const BULK_PAYLOAD_BYTES: usize = 1_400;
/// Flows that it is shared among, at most.
const BULK_FLOWS_MAX: usize = 64;
/// How often it is sent.
const BULK_INTERVAL: Duration = Duration::from_millis(2);
/// How long one run of `ringtun status` may take.
const STATUS_LIMIT: Duration = Duration::from_secs(10);

/// What an attacker has done while one condition lasted.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sent {
    /// For how long.
    pub seconds: f64,
    /// Bytes that the sockets of open tunnels took, TLS records included, or that `ringtun status`
    /// wrote.
    pub bytes: u64,
    /// Connections that it tried to open, or runs of `ringtun status`.
    pub tried: u64,
    /// Those of them that opened, or succeeded.
    pub opened: u64,
    /// Connections that did not open or did not last, by reason.
    pub failures: BTreeMap<String, u64>,
}

impl Sent {
    /// Its rate in Mbit/s.
    #[must_use]
    pub fn megabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e6 / self.seconds.max(f64::EPSILON)
    }
}

/// Counts, shared by the attacker's thread and the one that measures.
#[derive(Debug, Default)]
pub(super) struct Tally(Mutex<Sent>);

impl Tally {
    pub(super) fn sent(&self) -> Sent {
        self.lock().clone()
    }

    fn add_bytes(&self, bytes: usize) {
        self.lock().bytes += bytes as u64;
    }

    fn tried(&self) {
        self.lock().tried += 1;
    }

    fn opened(&self) {
        self.lock().opened += 1;
    }

    fn failed(&self, reason: &Failure) {
        let mut sent = self.lock();
        *sent.failures.entry(reason.to_string()).or_default() += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How fast a load is to be carried where nothing else says so: the sink gets what the server got.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) bytes_per_second: Option<f64>,
    pub(super) openings_per_second: Option<f64>,
}

impl Rates {
    /// The rates of what was sent to the server.
    pub(super) fn of(sent: &Sent) -> Rates {
        let seconds = sent.seconds.max(f64::EPSILON);
        Rates {
            bytes_per_second: Some(sent.bytes as f64 / seconds),
            openings_per_second: Some(sent.tried as f64 / seconds),
        }
    }
}

/// One attacker's task.
pub(super) struct Order {
    pub(super) load: Load,
    pub(super) target: Target,
    pub(super) tokens: Vec<[u8; 32]>,
    /// Where strangers connect from.
    pub(super) addresses: Vec<Ipv4Addr>,
    pub(super) rates: Rates,
    pub(super) tally: Arc<Tally>,
}

/// Carries a load from the calling thread's network until the other end of `stop` is dropped, or
/// [`TIME_MAX`] has passed.
///
/// # Errors
/// When there is no runtime.
pub(super) fn attack(order: Order, mut stop: watch::Receiver<()>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let tasks = LocalSet::new();
    let load = order.load;
    let attacker = Rc::new(Attacker {
        bytes: Pacer::new(order.rates.bytes_per_second),
        openings: Pacer::new(order.rates.openings_per_second),
        begun: Instant::now(),
        number: Cell::new(0),
        order,
    });
    tasks.block_on(&runtime, async {
        match load {
            Load::Tunnels(tunnels) => attacker.spawn_tunnels(tunnels),
            Load::Openings { instances, at_once } => {
                for _ in 0..at_once {
                    spawn_local(Rc::clone(&attacker).open_again_and_again(instances));
                }
            }
            Load::Strangers(strangers) => attacker.spawn_strangers(strangers),
            Load::Status => {}
        }
        // Nothing is ever sent through the channel: this waits for the end.
        let stopped = async { while stop.changed().await.is_ok() {} };
        let _ = timeout(TIME_MAX, stopped).await;
    });
    Ok(())
}

/// Runs `ringtun` with these arguments again and again until the other end of `stop` is dropped.
pub(super) fn hammer(
    (host, ringtun): (&Host, &Path),
    arguments: &[&str],
    rates: Rates,
    tally: &Tally,
    stop: &watch::Receiver<()>,
) {
    let begun = std::time::Instant::now();
    let mut runs = 0_u64;
    while stop.has_changed().is_ok() && runs < OPENINGS_MAX && begun.elapsed() < TIME_MAX {
        tally.tried();
        let command = host.command(ringtun).args(arguments).limit(STATUS_LIMIT);
        match command.run() {
            Ok(output) if output.status.success() => {
                tally.opened();
                tally.add_bytes(output.stdout.len());
            }
            Ok(_) | Err(_) => tally.failed(&Failure::Ended),
        }
        runs += 1;
        if let Some(rate) = rates.openings_per_second.filter(|rate| *rate > 0.0) {
            let due = Duration::from_secs_f64(runs as f64 / rate);
            thread::sleep(due.saturating_sub(begun.elapsed()).min(STATUS_LIMIT));
        }
    }
}

/// Sends bulk from `web` to `to`, or to the senders of requests if there is no `to`, until the
/// other end of `stop` is dropped.
///
/// # Errors
/// When the socket cannot be opened.
pub(super) fn send_bulk(to: Option<SocketAddr>, stop: &watch::Receiver<()>) -> io::Result<()> {
    let socket = UdpSocket::bind((WEB_V4, BULK_PORT))?;
    socket.set_nonblocking(true)?;
    let mut flows: Vec<SocketAddr> = to.into_iter().collect();
    let payload = [0x42; BULK_PAYLOAD_BYTES];
    let datagrams_per_second = BULK_BITS_PER_SECOND / 8.0 / BULK_PAYLOAD_BYTES as f64;
    let started = Instant::now();
    let mut begun = None;
    let mut sent = 0_usize;
    while stop.has_changed().is_ok() && started.elapsed() < TIME_MAX {
        let mut request = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut request) {
            if to.is_none() && flows.len() < BULK_FLOWS_MAX && !flows.contains(&from) {
                flows.push(from);
            }
        }
        if !flows.is_empty() {
            let begun = *begun.get_or_insert_with(Instant::now);
            let due = (begun.elapsed().as_secs_f64() * datagrams_per_second) as usize;
            for number in sent..due {
                // What finds no room is lost, as anywhere.
                let _ = socket.send_to(&payload, flows[number % flows.len()]);
            }
            sent = sent.max(due);
        }
        thread::sleep(BULK_INTERVAL);
    }
    Ok(())
}

struct Attacker {
    order: Order,
    bytes: Pacer,
    openings: Pacer,
    begun: Instant,
    /// Numbers what is opened.
    number: Cell<u64>,
}

impl Attacker {
    fn spawn_tunnels(self: &Rc<Self>, tunnels: Tunnels) {
        for token in self.order.tokens.iter().take(tunnels.tokens) {
            for connection in 0..tunnels.connections {
                let who = Identification {
                    token: *token,
                    instance: 0,
                    connection,
                };
                spawn_local(Rc::clone(self).keep_tunnel(tunnels, who));
            }
        }
    }

    async fn keep_tunnel(self: Rc<Self>, tunnels: Tunnels, who: Identification) {
        while self.may_open() {
            self.order.tally.tried();
            let outcome = match self.order.target.open(who).await {
                Ok(channel) => {
                    self.order.tally.opened();
                    self.send(tunnels, channel).await
                }
                Err(failure) => Err(failure),
            };
            if let Err(failure) = outcome {
                self.order.tally.failed(&failure);
            }
            sleep(REOPEN_INTERVAL).await;
        }
    }

    /// Sends until the connection ends.
    async fn send(&self, tunnels: Tunnels, channel: Channel) -> Result<(), Failure> {
        let Channel {
            stream,
            mut records,
            address,
        } = channel;
        let mut generate = (tunnels.generator)(address);
        let write = async {
            let mut piece = Vec::new();
            loop {
                piece.clear();
                generate(&mut records, &mut piece);
                let so_far = self.order.tally.sent().bytes;
                if piece.is_empty() || so_far + piece.len() as u64 > tunnels.bytes_max {
                    // It has said all that it may say.
                    pending::<()>().await;
                }
                write_all(&stream, &piece).await?;
                self.order.tally.add_bytes(piece.len());
                self.pause(tunnels.pace, piece.len()).await;
            }
        };
        let read = async {
            match tunnels.reads {
                true => read_to_the_end(&stream).await,
                false => pending().await,
            }
        };
        tokio::select! {
            outcome = write => outcome,
            outcome = read => outcome,
        }
    }

    async fn pause(&self, pace: Pace, bytes: usize) {
        match (pace, self.order.rates.bytes_per_second) {
            (Pace::Every(interval), _) => sleep(interval).await,
            (Pace::BitsPerSecond(rate), None) => {
                self.bytes.spend_at(rate as f64 / 8.0, bytes as f64).await;
            }
            (_, _) => self.bytes.spend(bytes as f64).await,
        }
        yield_now().await;
    }

    async fn open_again_and_again(self: Rc<Self>, instances: u64) {
        let mut held: VecDeque<(Instant, TcpStream)> = VecDeque::new();
        let Some(token) = self.order.tokens.first().copied() else {
            return;
        };
        while self.may_open() {
            self.openings.spend(1.0).await;
            let number = self.number.replace(self.number.get() + 1);
            let who = Identification {
                token,
                instance: number % instances,
                connection: 0,
            };
            self.order.tally.tried();
            match self.order.target.open_unused(who).await {
                Ok(stream) => {
                    self.order.tally.opened();
                    held.push_back((Instant::now(), stream));
                }
                Err(failure) => {
                    self.order.tally.failed(&failure);
                    sleep(Duration::from_millis(1)).await;
                }
            }
            while held.len() > HELD_MAX
                || held
                    .front()
                    .is_some_and(|(opened, _)| opened.elapsed() > HELD_TIME)
            {
                held.pop_front();
            }
            yield_now().await;
        }
        pending().await
    }

    fn spawn_strangers(self: &Rc<Self>, strangers: Strangers) {
        for source in self.order.addresses.iter().take(strangers.addresses.into()) {
            for _ in 0..strangers.connections_per_address {
                spawn_local(Rc::clone(self).be_a_stranger(strangers, *source));
            }
        }
    }

    async fn be_a_stranger(self: Rc<Self>, strangers: Strangers, source: Ipv4Addr) {
        let target = &self.order.target;
        let is_paced = strangers.habit == Habit::Handshake;
        let connections = strangers.connections_per_address * usize::from(strangers.addresses);
        let cycle = cycle(connections, self.order.rates);
        let mut next = Instant::now();
        while self.may_open() {
            if is_paced {
                self.openings.spend(1.0).await;
            }
            // The next one begins a cycle later, however late this one is.
            next = cycle.map_or_else(Instant::now, |cycle| next + cycle);
            self.order.tally.tried();
            let opened = match strangers.habit {
                Habit::Silent => target.connect(source).await,
                Habit::Hello => target.greet(source).await,
                Habit::Handshake => target.handshake(source).await,
            };
            let outcome = match opened {
                Err(failure) => Err(failure),
                Ok(stream) => {
                    self.order.tally.opened();
                    if is_paced {
                        drop(stream);
                        yield_now().await;
                        continue;
                    }
                    tokio::select! {
                        outcome = read_to_the_end(&stream) => outcome,
                        () = wait_until(cycle.map(|_| next - REOPEN_INTERVAL)) => Ok(()),
                    }
                }
            };
            if let Err(failure) = outcome {
                self.order.tally.failed(&failure);
            }
            match cycle {
                Some(_) => sleep_until(next).await,
                None => sleep(REOPEN_INTERVAL).await,
            }
        }
        pending().await
    }

    fn may_open(&self) -> bool {
        self.order.tally.sent().tried < OPENINGS_MAX && self.begun.elapsed() < TIME_MAX
    }
}

/// From the start of a connection to the start of the one after it, where the rate at which all of
/// them are opened is given.
fn cycle(connections: usize, rates: Rates) -> Option<Duration> {
    let rate = rates.openings_per_second.filter(|rate| *rate > 0.0)?;
    let cycle = Duration::try_from_secs_f64(connections as f64 / rate).unwrap_or(TIME_MAX);
    Some(cycle.clamp(REOPEN_INTERVAL, TIME_MAX))
}

async fn wait_until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}

/// Reads and throws away until the other side closes.
async fn read_to_the_end(stream: &TcpStream) -> Result<(), Failure> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Err(Failure::Ended),
            Ok(_) => yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Spreads something over time. What was late is made up for.
struct Pacer {
    per_second: Option<f64>,
    begun: Instant,
    spent: Cell<f64>,
}

impl Pacer {
    fn new(per_second: Option<f64>) -> Pacer {
        Pacer {
            per_second,
            begun: Instant::now(),
            spent: Cell::new(0.0),
        }
    }

    /// Waits until so much more may have been spent; at once where there is no rate.
    async fn spend(&self, amount: f64) {
        if let Some(rate) = self.per_second {
            self.spend_at(rate, amount).await;
        }
    }

    async fn spend_at(&self, per_second: f64, amount: f64) {
        let spent = self.spent.get() + amount;
        self.spent.set(spent);
        let after = Duration::try_from_secs_f64(spent / per_second).unwrap_or(TIME_MAX);
        sleep_until(self.begun + after.min(TIME_MAX)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sink_gets_what_the_server_got() {
        let sent = Sent {
            seconds: 4.0,
            bytes: 1_000_000,
            tried: 8,
            opened: 7,
            failures: BTreeMap::new(),
        };
        let rates = Rates::of(&sent);
        assert_eq!(rates.bytes_per_second, Some(250_000.0));
        assert_eq!(rates.openings_per_second, Some(2.0));
        assert!((sent.megabits_per_second() - 2.0).abs() < 1e-9);
    }

    #[test]
    fn the_sinks_connections_are_opened_as_often_as_the_servers() {
        let rates = Rates {
            bytes_per_second: None,
            openings_per_second: Some(4_000.0),
        };
        assert_eq!(cycle(1_200, rates), Some(Duration::from_millis(300)));
        assert_eq!(cycle(12, rates), Some(REOPEN_INTERVAL));
        assert_eq!(cycle(1_200, Rates::default()), None);
    }

    #[test]
    fn a_pacer_spreads_what_is_spent() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let pacer = Pacer::new(Some(1_000.0));
            let begun = Instant::now();
            for _ in 0..5 {
                pacer.spend(4.0).await;
            }
            assert!(begun.elapsed() >= Duration::from_millis(20));
            Pacer::new(None).spend(1e12).await;
        });
    }
}
