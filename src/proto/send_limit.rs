//! How far ahead of the network a connection may seal, and how much it may have under way.
//!
//! What is sealed cannot be overtaken any more, be it in a chunk, in the socket, or in the queue of a bottleneck that the
//! congestion control has filled. So both are kept to what the path takes soon, by what the kernel measures
//! of it (TCP_INFO): a [`Sample`] goes in every now and then, limits come out.
//!
//! - **ahead**: bytes that are sealed and not sent, in our memory and again as much in the socket (TCP_NOTSENT_LOWAT):
//!   what the path delivers in [`AHEAD`].
//! - **under way**: bytes that the socket holds, sent ones that have not arrived included: a little more than what
//!   the path delivers in its shortest round trip. More would only wait in front of the bottleneck. Where round trips stay
//!   long all the same, somebody else fills that queue, and whoever holds back there gets nothing: then nothing is
//!   limited for a while.
//! - **paced**: a path that is full is sent to at the rate at which it delivers, and a little more. Acknowledgements that have
//!   waited behind what comes the other way arrive all at once, and what they let go would make the next ones wait. Not so
//!   where somebody else fills the queue: he would take what is held back.
//!
//! The rate is measured between samples and not taken from the kernel, which forgets no rate as long as it has nothing to
//! send (`tcp_rate_gen`), and that is just what these limits make of it.

use super::egress_queue::{EgressQueue, Popped, Queued};
use super::timer::Instant;
use std::time::Duration;

/// While a connection sends, it looks at its path this often.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// One that has enough under way looks this often, as only the kernel knows what has arrived.
const HELD_BACK_INTERVAL: Duration = Duration::from_millis(1);
/// What may be ahead is what the path delivers in this time: longer than a worker is ever away for, shorter than anybody
/// hears.
pub const AHEAD: Duration = Duration::from_millis(4);
/// Less is never asked for: a few segments, so that a slow path is not left idle for want of a packet.
pub const AHEAD_BYTES_MIN: u64 = 8 * 1024;
/// The least before it is known how much the path carries: a rate that is low for want of packets is no reason to handle
/// them piecemeal. A local path has no limit till then.
pub const AHEAD_BYTES_GROWING: u64 = 64 * 1024;
/// More is of no use: a chunk that is written, and one that is filled.
pub const AHEAD_BYTES_MAX: u64 = 1024 * 1024;
/// What may wait is what the path delivers in this time, as a sender that starts overshoots by some round trips.
pub const QUEUE: Duration = Duration::from_millis(100);
/// But always so much. On a local path that takes milliseconds already, and more would be no longer in the cache.
pub const QUEUE_BYTES_MIN: u64 = 1024 * 1024;
/// Less than this under way would be held up by delayed acknowledgements.
pub const UNDER_WAY_BYTES_MIN: u64 = 16 * 1024;
/// A path whose shortest round trip takes longer is not local.
const LOCAL_RTT_MAX: Duration = Duration::from_millis(2);
/// A queue that makes the average round trip longer than this is worth keeping short, however short the path is.
const QUEUED_RTT_MAX: Duration = Duration::from_millis(50);
/// A path that is full has so much more under way than its shortest round trip asks for: a share of that (per cent), and
/// what it delivers in a time that covers the worker's own pauses.
pub const FULL_PERCENT: u32 = 105;
/// That time.
pub const FULL_SLACK: Duration = Duration::from_millis(3);
/// Such a path is sent to at this share (per cent) of the rate at which it delivers.
const PACING_PERCENT: u64 = 105;
/// And at this share where round trips are not longer than this share of the shortest (per cent) and this time, so that there is
/// no queue: it may have got faster.
const NO_QUEUE_PACING_PERCENT: u64 = 200;
const NO_QUEUE_PERCENT: u32 = 105;
const NO_QUEUE_SLACK: Duration = Duration::from_millis(1);
/// The same share as [`FULL_PERCENT`] where packets are lost. Each of them is under way for a round trip more, and so is what
/// comes after it.
const LOSSY_PERCENT: u32 = 250;
/// The same share while the rate still grows. In slow start twice as much is under way in each round trip, and a rate is
/// known one round trip later.
const GROWING_PERCENT: u32 = 400;
/// A rate is measured over a round trip, and this at least.
const MEASURING_MIN: Duration = Duration::from_millis(10);
/// The rate that counts is the highest of the last one to two windows of so many round trips.
const WINDOW_ROUND_TRIPS: u32 = 4;
/// But a window is at least so long.
const WINDOW_MIN: Duration = Duration::from_millis(200);
/// A path whose rate grows by less than this (per cent) in each of so many windows, though there is more to send, is full.
const GROWTH_MIN_PERCENT: u64 = 125;
const FLAT_WINDOWS: u8 = 2;
/// Round trips longer than what is under way explains, by this share (per cent) and this time, are somebody else's doing.
const EXPLAINED_PERCENT: u32 = 125;
const EXPLAINED_SLACK: Duration = Duration::from_millis(2);
/// The first of these where more than one byte comes from the other end for so many that arrive there: acknowledgements wait
/// behind them, and that end has a queue as well.
const EXPLAINED_BOTH_WAYS_PERCENT: u32 = 140;
const BOTH_WAYS_ONE_OF: u64 = 8;
/// Where they are longer than this share of that (per cent), there can be no doubt, and packets are no longer paced.
const PLAIN_PERCENT: u32 = 125;
/// They count while so much (per cent) is under way of what may be.
const CROWDED_PERCENT: u64 = 100;
/// The same where bytes come from the other end: the next packet may be too long for the rest, and whoever waits behind a queue that
/// the other end fills has to know of it.
const CROWDED_BOTH_WAYS_PERCENT: u64 = 75;
/// They have to be so for so many windows: a queue of our own, or one before a bottleneck that has got slower, is gone then.
const CROWDED_WINDOWS: u8 = 3;
/// For how long nothing is limited then.
const COMPETING: Duration = Duration::from_secs(10);
/// With so much in a round trip a path is a long, fat one (RFC 7323, section 1.1): within a factor of three of what a connection's
/// buffers hold at the kernel's defaults (`tcp_rmem`, `tcp_wmem`).
const LONG_FAT_BYTES: u64 = 1024 * 1024;
/// On a local path it is the hosts that hold packets up at a rate like this, 400 Mbit/s: slow ones at that.
const FAST_BYTES_PER_SECOND: u64 = 50_000_000;
/// A path is lossy that has had so many segments sent again, and at least one of so many, while round trips were not longer
/// than this share of the shortest (per cent) and this time, so that no queue can have been full.
const LOSSES_MIN: u64 = 3;
const LOSSY_ONE_OF: u64 = 500;
const SHORT_QUEUE_PERCENT: u32 = 125;
const SHORT_QUEUE_SLACK: Duration = Duration::from_millis(6);
/// What is counted for that is halved beyond so many segments, so that it is the present that counts.
const LOSS_MEMORY_SEGMENTS: u64 = 20_000;
/// For so long after a time-out packets have waited for the path's return, and what is sent again is what an outage has eaten.
const STALL_MEMORY: Duration = Duration::from_secs(1);

const _: () = assert!(AHEAD_BYTES_MIN < AHEAD_BYTES_GROWING);
const _: () = assert!(AHEAD_BYTES_GROWING < AHEAD_BYTES_MAX);

/// Whether a path with these round trips, shortest and average, is within a host or a rack and has no long queue.
fn is_local(shortest: Duration, average: Duration) -> bool {
    shortest <= LOCAL_RTT_MAX && average <= QUEUED_RTT_MAX
}

/// What is known of a connection at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Sample {
    /// Segments that have arrived at the other end since the connection began; wraps around.
    pub delivered_segments: u32,
    /// Segments sent again since the connection began; wraps around.
    pub retransmitted_segments: u32,
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Bytes that the socket holds, not sent or under way.
    pub held_bytes: u64,
    /// Bytes that have come from the other end since the connection began.
    pub received_bytes: u64,
    /// The shortest round trip of late; zero before there was one.
    pub rtt_min: Duration,
    /// The average round trip.
    pub rtt: Duration,
    /// Whether there is more to send than is taken. Otherwise a low rate says nothing about the path.
    pub is_busy: bool,
    /// Whether a retransmission time-out has passed, and nothing has been acknowledged since.
    pub timed_out: bool,
}

/// What may be sealed at one moment, until so many bytes are sealed and not yet taken by the socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Allowance {
    /// Any packet.
    Any(u64),
    /// Enough is under way. Packets of new flows go all the same: there is little of them, and they would only wait.
    New(u64),
}

impl Allowance {
    /// The bytes.
    pub fn bytes_max(self) -> u64 {
        let (Self::Any(bytes) | Self::New(bytes)) = self;
        bytes
    }

    /// Takes out the next packet that may be sealed.
    #[inline]
    pub fn pop<P: Queued>(self, queue: &mut EgressQueue<P>, now: Instant) -> Option<Popped<P>> {
        match self {
            Self::Any(_) => queue.pop(now),
            Self::New(_) => queue.pop_new(now),
        }
    }
}

/// The limits of one connection.
#[derive(Clone, Debug, Default)]
pub struct SendLimit {
    latest: Sample,
    /// Where the present measurement began.
    from: Option<(Instant, Sample)>,
    /// The highest rates of the window before and of this one, in bytes a second; zero before there was one.
    before: u64,
    highest: u64,
    window_began: Option<Instant>,
    /// Whether all round trips of this window were longer than what is under way explains.
    is_crowded: bool,
    /// Windows like that in a row.
    crowded_windows: u8,
    /// Whether the other end sends much, too.
    is_both_ways: bool,
    /// Whether there was more to send than was taken at any time of this window.
    was_busy: bool,
    /// Windows like that in a row in which the rate hardly grew.
    flat_windows: u8,
    /// Until when nothing is limited.
    competing_until: Instant,
    /// The rate has stopped growing once.
    is_full: bool,
    /// Segments that were sent again though no queue was full, and that arrived.
    retransmitted: u64,
    delivered: u64,
    /// Until when what happens is put down to an outage.
    stalled_until: Instant,
}

impl SendLimit {
    /// Nothing is known of the path yet, and so nothing is limited.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in how things stand now.
    pub fn observe(&mut self, now: Instant, mut sample: Sample) {
        // Whoever has a queue before the bottleneck has nothing else that would be taken. But not who only sends acknowledgements: what
        // they are for makes their round trips long.
        let has_queue = self
            .full_bytes()
            .is_some_and(|max| sample.held_bytes >= max);
        sample.is_busy |= has_queue && !self.is_both_ways;
        let crowded_percent = match self.is_both_ways {
            true => CROWDED_BOTH_WAYS_PERCENT,
            false => CROWDED_PERCENT,
        };
        let was_limited = self
            .under_way_bytes_max(now)
            .is_some_and(|max| self.latest.held_bytes >= max / 100 * crowded_percent);
        let before = std::mem::replace(&mut self.latest, sample);
        if sample.timed_out {
            self.stalled_until = now + STALL_MEMORY;
            // It begins anew, and may be another one then. But where packets are lost all the time, now and then one is that
            // is sent again, and that takes a time-out.
            if !self.is_lossy() {
                self.is_full = false;
                self.flat_windows = 0;
            }
        }
        if !self.has_stalled(now) {
            self.count_losses(before);
        }
        self.is_crowded &= was_limited && self.is_longer_than(100);
        let Some((began, from)) = self.from else {
            self.from = Some((now, sample));
            return;
        };
        let passed = now.since(began);
        if passed < sample.rtt_min.max(MEASURING_MIN) {
            return;
        }
        self.from = Some((now, sample));
        let segments = sample
            .delivered_segments
            .wrapping_sub(from.delivered_segments);
        let bytes = u64::from(segments) * u64::from(sample.segment_bytes);
        let received = sample.received_bytes.saturating_sub(from.received_bytes);
        self.is_both_ways = received > bytes / BOTH_WAYS_ONE_OF;
        let rate = saturate(u128::from(bytes) * 1_000_000 / passed.as_micros());
        let was_busy = from.is_busy && sample.is_busy;
        if !sample.rtt_min.is_zero() && (was_busy || rate > self.rate().unwrap_or(0)) {
            self.count_rate(now, rate, was_busy);
        }
    }

    fn count_losses(&mut self, before: Sample) {
        let latest = &self.latest;
        let short = latest.rtt_min.saturating_mul(SHORT_QUEUE_PERCENT) / 100 + SHORT_QUEUE_SLACK;
        if latest.rtt > short {
            return;
        }
        let sent_again = latest
            .retransmitted_segments
            .wrapping_sub(before.retransmitted_segments);
        let arrived = latest
            .delivered_segments
            .wrapping_sub(before.delivered_segments);
        self.retransmitted += u64::from(sent_again);
        self.delivered += u64::from(arrived);
        if self.delivered > LOSS_MEMORY_SEGMENTS {
            self.retransmitted /= 2;
            self.delivered /= 2;
        }
    }

    fn count_rate(&mut self, now: Instant, rate: u64, was_busy: bool) {
        let window = (self.latest.rtt_min.saturating_mul(WINDOW_ROUND_TRIPS)).max(WINDOW_MIN);
        let began = *self.window_began.get_or_insert(now);
        if now.since(began) >= window {
            let grew = self.highest > self.before.saturating_mul(GROWTH_MIN_PERCENT) / 100;
            self.flat_windows = match grew {
                true => 0,
                false => self.flat_windows.saturating_add(u8::from(self.was_busy)),
            };
            self.is_full |= self.flat_windows >= FLAT_WINDOWS;
            self.crowded_windows = match self.is_crowded && self.is_full {
                true => self.crowded_windows + 1,
                false => 0,
            };
            if self.crowded_windows == CROWDED_WINDOWS {
                self.competing_until = now + COMPETING;
                self.crowded_windows = 0;
            }
            self.is_crowded = true;
            self.was_busy = false;
            // In an outage, what there was before it is still the best guess.
            if self.highest > 0 {
                self.before = self.highest;
            }
            self.highest = 0;
            self.window_began = Some(now);
        }
        self.highest = self.highest.max(rate);
        self.was_busy |= was_busy;
    }

    /// The socket took `bytes`.
    pub fn sent(&mut self, bytes: usize) {
        self.latest.held_bytes = self.latest.held_bytes.saturating_add(bytes as u64);
    }

    /// How fast the path delivers, in bytes a second; `None` before that is known.
    pub fn rate(&self) -> Option<u64> {
        let rate = self.before.max(self.highest);
        (rate > 0).then_some(rate)
    }

    /// How many bytes may be sealed and not yet taken by the socket, and how many the socket may hold unsent.
    pub fn ahead_bytes_max(&self) -> u64 {
        let min = match (self.is_full, self.is_local()) {
            (true, _) => AHEAD_BYTES_MIN,
            (false, true) => AHEAD_BYTES_MAX,
            (false, false) => AHEAD_BYTES_GROWING,
        };
        delivered_in(self.rate().unwrap_or(0), AHEAD).clamp(min, AHEAD_BYTES_MAX)
    }

    /// What may be sealed now, so that no more comes to be under way than may be.
    pub fn allowance(&self, now: Instant) -> Allowance {
        let ahead = self.ahead_bytes_max();
        match self.room(now) {
            Some(0) => Allowance::New(ahead),
            Some(room) => Allowance::Any(ahead.min(room)),
            None => Allowance::Any(ahead),
        }
    }

    /// How many bytes a second the socket may send; `None` where that is not limited.
    pub fn pacing_rate(&self, now: Instant) -> Option<u64> {
        let is_limited = self.under_way_bytes_max(now).is_some() && self.is_full;
        let is_paced = is_limited && !self.is_lossy() && !self.is_longer_than(PLAIN_PERCENT);
        let rate = self.rate().filter(|_| is_paced)?;
        let Sample { rtt, rtt_min, .. } = self.latest;
        let percent = match rtt <= rtt_min.saturating_mul(NO_QUEUE_PERCENT) / 100 + NO_QUEUE_SLACK {
            true => NO_QUEUE_PACING_PERCENT,
            false => PACING_PERCENT,
        };
        Some(rate.saturating_mul(percent) / 100)
    }

    /// How many bytes of packets may wait.
    pub fn queue_bytes_max(&self) -> u64 {
        match self.is_local() {
            true => QUEUE_BYTES_MIN,
            false => delivered_in(self.rate().unwrap_or(0), QUEUE).max(QUEUE_BYTES_MIN),
        }
    }

    /// How many bytes the socket may hold in all; `None` where that does not matter, or nothing is known yet.
    pub fn under_way_bytes_max(&self, now: Instant) -> Option<u64> {
        if now < self.competing_until || self.is_local() {
            return None;
        }
        self.under_way_bytes()
    }

    fn under_way_bytes(&self) -> Option<u64> {
        match self.is_full {
            true => self.full_bytes(),
            false => self.bytes_of(GROWING_PERCENT),
        }
    }

    /// What a full path has under way.
    fn full_bytes(&self) -> Option<u64> {
        self.bytes_of(match self.is_lossy() {
            true => LOSSY_PERCENT,
            false => FULL_PERCENT,
        })
    }

    /// What the path delivers in this share (per cent) of its shortest round trip, and a little more.
    fn bytes_of(&self, percent: u32) -> Option<u64> {
        let time = self.latest.rtt_min.saturating_mul(percent) / 100 + FULL_SLACK;
        Some(delivered_in(self.rate()?, time).max(UNDER_WAY_BYTES_MIN))
    }

    /// The longest round trip that is of our own making, by what is under way or may be.
    fn explained_rtt(&self) -> Option<Duration> {
        let bytes = u128::from(self.under_way_bytes()?.max(self.latest.held_bytes));
        let micros = bytes * 1_000_000 / u128::from(self.rate()?);
        let own = Duration::from_micros(saturate(micros));
        let percent = match self.is_both_ways {
            true => EXPLAINED_BOTH_WAYS_PERCENT,
            false => EXPLAINED_PERCENT,
        };
        Some(own.saturating_mul(percent) / 100 + EXPLAINED_SLACK)
    }

    /// Whether round trips are longer than this share (per cent) of that.
    fn is_longer_than(&self, percent: u32) -> bool {
        self.explained_rtt()
            .is_some_and(|own| self.latest.rtt > own.saturating_mul(percent) / 100)
    }

    /// Whether the socket holds all that should be under way: nothing is to be sealed until some of it has arrived.
    pub fn is_held_back(&self, now: Instant) -> bool {
        self.room(now) == Some(0)
    }

    /// How much later than the latest sample the next one is wanted.
    #[inline]
    pub fn look_interval(&self, now: Instant) -> Duration {
        if self.is_held_back(now) {
            HELD_BACK_INTERVAL
        } else {
            LOOK_INTERVAL
        }
    }

    /// How many bytes more may be under way; `None` where that is not limited.
    fn room(&self, now: Instant) -> Option<u64> {
        let max = self.under_way_bytes_max(now)?;
        Some(max.saturating_sub(self.latest.held_bytes))
    }

    /// Whether the path is so short that what is under way does not matter.
    pub fn is_local(&self) -> bool {
        is_local(self.latest.rtt_min, self.latest.rtt)
    }

    /// Whether it is not known yet how much the path carries: what waits now may be on its way in a moment.
    pub fn is_growing(&self) -> bool {
        !self.is_full && !self.is_local()
    }

    /// Whether the path was away a moment ago, or is: how long packets have waited, and what is lost, says nothing about its
    /// queues.
    pub fn has_stalled(&self, now: Instant) -> bool {
        now < self.stalled_until
    }

    /// Whether packets wait for what changes by itself in a moment: it is not known yet how much the path carries, or it was
    /// away.
    pub fn is_changing(&self, now: Instant) -> bool {
        self.is_growing() || self.has_stalled(now)
    }

    /// Whether more is under way at that rate, in either direction, than one connection is sure to hold.
    pub fn is_long_fat(&self, bytes_per_second: u64) -> bool {
        delivered_in(bytes_per_second, self.latest.rtt_min) >= LONG_FAT_BYTES && !self.is_local()
    }

    /// Whether at that rate, in either direction, it is the hosts that hold packets up: then they wait for a worker that is busy
    /// with what came before, and no queue lets one go before another.
    pub fn is_fast(&self, bytes_per_second: u64) -> bool {
        let is_known = !self.latest.rtt_min.is_zero();
        bytes_per_second >= FAST_BYTES_PER_SECOND && is_known && self.is_local()
    }

    /// Whether the path loses what does not fill its queues.
    pub fn is_lossy(&self) -> bool {
        self.retransmitted >= LOSSES_MIN && self.retransmitted * LOSSY_ONE_OF >= self.delivered
    }
}

fn delivered_in(bytes_per_second: u64, time: Duration) -> u64 {
    saturate(u128::from(bytes_per_second) * time.as_micros() / 1_000_000)
}

fn saturate(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const RTT: Duration = Duration::from_millis(40);
    const SEGMENT: u64 = 1250;

    /// A connection that is looked at every 10 ms.
    struct Watched {
        limit: SendLimit,
        now: Instant,
        sample: Sample,
        /// What comes the other way meanwhile.
        received_megabits: u64,
    }

    impl Watched {
        fn new() -> Self {
            Self {
                limit: SendLimit::new(),
                now: Instant::ZERO,
                sample: Sample {
                    segment_bytes: SEGMENT as u32,
                    rtt_min: RTT,
                    rtt: RTT,
                    is_busy: true,
                    ..Sample::default()
                },
                received_megabits: 0,
            }
        }

        /// For so many milliseconds, a multiple of ten. A megabit a second is a segment in 10 ms.
        fn delivers(&mut self, megabits: u64, milliseconds: u64) -> &mut Self {
            for _ in 0..milliseconds / 10 {
                self.now += Duration::from_millis(10);
                self.sample.delivered_segments += megabits as u32;
                self.sample.received_bytes += holds(self.received_megabits, 10);
                self.limit.observe(self.now, self.sample);
            }
            self
        }

        fn under_way_bytes_max(&self) -> Option<u64> {
            self.limit.under_way_bytes_max(self.now)
        }
    }

    fn holds(megabits: u64, milliseconds: u64) -> u64 {
        megabits * 125 * milliseconds
    }

    #[rstest]
    #[case::rack(100, 300, true)]
    #[case::busy_rack(100, 40_000, true)]
    #[case::deep_queue_nearby(500, 400_000, false)]
    #[case::across_town(4000, 4500, false)]
    #[case::around_the_world(250_000, 260_000, false)]
    fn long_paths_and_deep_queues_are_not_local(
        #[case] shortest: u64,
        #[case] average: u64,
        #[case] local: bool,
    ) {
        let (shortest, average) = (
            Duration::from_micros(shortest),
            Duration::from_micros(average),
        );
        assert_eq!(is_local(shortest, average), local);
    }

    #[test]
    fn nothing_is_limited_before_anything_is_known() {
        let mut watched = Watched::new();
        watched.sample.rtt_min = Duration::ZERO;
        watched.delivers(20, 1000);
        assert_eq!(watched.limit.rate(), None);
        assert_eq!(watched.limit.ahead_bytes_max(), AHEAD_BYTES_MAX);
        assert_eq!(watched.under_way_bytes_max(), None);
    }

    #[test]
    fn a_slow_path_has_milliseconds_ahead_and_a_fast_one_a_chunk() {
        let ahead = |megabits| {
            let mut watched = Watched::new();
            watched.delivers(megabits, 900);
            watched.limit.ahead_bytes_max()
        };
        assert_eq!(ahead(1), AHEAD_BYTES_MIN);
        assert_eq!(ahead(100), holds(100, 4));
        assert_eq!(ahead(10_000), AHEAD_BYTES_MAX);
        let mut watched = Watched::new();
        watched.delivers(1, 100);
        assert_eq!(watched.limit.ahead_bytes_max(), AHEAD_BYTES_GROWING);
    }

    #[test]
    fn more_may_wait_for_a_fast_path_that_is_not_local() {
        let mut watched = Watched::new();
        assert_eq!(watched.limit.queue_bytes_max(), QUEUE_BYTES_MIN);
        watched.delivers(20, 900);
        assert_eq!(watched.limit.queue_bytes_max(), QUEUE_BYTES_MIN);
        watched.delivers(500, 900);
        assert_eq!(watched.limit.queue_bytes_max(), holds(500, 100));
        watched.sample.rtt_min = LOCAL_RTT_MAX;
        watched.delivers(500, 10);
        assert_eq!(watched.limit.queue_bytes_max(), QUEUE_BYTES_MIN);
    }

    #[test]
    fn a_full_path_has_little_more_under_way_than_it_holds() {
        let mut watched = Watched::new();
        watched.delivers(20, 100);
        assert_eq!(watched.under_way_bytes_max(), Some(holds(20, 160 + 3)));
        watched.delivers(20, 900);
        assert_eq!(watched.under_way_bytes_max(), Some(holds(20, 42 + 3)));
        assert!(!watched.limit.is_held_back(watched.now));
        assert_eq!(watched.limit.look_interval(watched.now), LOOK_INTERVAL);
        watched.limit.sent(holds(20, 42 + 3) as usize);
        assert!(watched.limit.is_held_back(watched.now));
        assert_eq!(watched.limit.look_interval(watched.now), HELD_BACK_INTERVAL);
        watched.sample.rtt_min = LOCAL_RTT_MAX;
        assert_eq!(watched.delivers(20, 10).under_way_bytes_max(), None);
    }

    #[test]
    fn no_more_is_sealed_than_may_be_under_way() {
        let mut watched = Watched::new();
        watched.delivers(100, 900);
        let mut allowance_after = |sent| {
            watched.limit.sent(sent as usize);
            watched.limit.allowance(watched.now)
        };
        let ahead = holds(100, 4);
        assert_eq!(allowance_after(0), Allowance::Any(ahead));
        let nearly_all = holds(100, 42 + 3 - 1);
        assert_eq!(allowance_after(nearly_all), Allowance::Any(holds(100, 1)));
        assert_eq!(allowance_after(holds(100, 2)), Allowance::New(ahead));
    }

    #[test]
    fn a_full_path_that_loses_nothing_is_paced() {
        let mut watched = Watched::new();
        watched.delivers(20, 100);
        assert_eq!(watched.limit.pacing_rate(watched.now), None, "it grows");
        watched.delivers(20, 900);
        let unqueued = Some(2 * 20 * 125_000);
        assert_eq!(watched.limit.pacing_rate(watched.now), unqueued);
        watched.sample.rtt = RTT + RTT / 10;
        watched.delivers(20, 10);
        let queued = Some(21 * 125_000);
        assert_eq!(watched.limit.pacing_rate(watched.now), queued);
        watched.sample.rtt = RTT;
        watched.sample.rtt_min = LOCAL_RTT_MAX;
        watched.delivers(20, 10);
        assert_eq!(watched.limit.pacing_rate(watched.now), None, "local");
        watched.sample.rtt_min = RTT;
        watched.sample.retransmitted_segments += 10;
        watched.delivers(20, 10);
        assert!(watched.limit.is_lossy());
        assert_eq!(watched.limit.pacing_rate(watched.now), None);
    }

    #[test]
    fn a_path_that_is_still_found_out_is_not_held_back() {
        let mut watched = Watched::new();
        for window in 0..6 {
            watched.delivers(10 << window, 210);
        }
        assert!(watched.under_way_bytes_max() >= Some(holds(10 << 5, 160)));
    }

    #[test]
    fn a_rate_that_falls_is_forgotten_within_some_windows() {
        let mut watched = Watched::new();
        watched.delivers(50, 1000).delivers(5, 600);
        assert_eq!(watched.limit.rate(), Some(5 * 125_000));
    }

    #[test]
    fn a_path_that_is_found_out_grows_no_more_not_even_one_that_stalls() {
        for megabits in [0, 20] {
            let mut watched = Watched::new();
            assert!(watched.delivers(megabits, 100).limit.is_growing());
            assert!(!watched.delivers(megabits, 900).limit.is_growing());
        }
        let mut watched = Watched::new();
        watched.delivers(20, 1000).delivers(0, 5000);
        assert_eq!(watched.limit.rate(), Some(20 * 125_000), "an outage");
    }

    #[test]
    fn a_path_with_a_queue_is_full_though_nothing_waits_for_it() {
        let mut watched = Watched::new();
        watched.sample.is_busy = false;
        watched.sample.held_bytes = holds(20, 42 + 3 - 1);
        watched.delivers(20, 2000);
        assert!(watched.limit.is_growing());
        watched.sample.held_bytes = holds(20, 42 + 3);
        watched.delivers(20, 1000);
        assert!(!watched.limit.is_growing());
    }

    #[test]
    fn acknowledgements_behind_a_queue_of_the_other_end_do_not_fill_a_path() {
        let mut watched = Watched::new();
        watched.received_megabits = 100;
        watched.sample.is_busy = false;
        watched.sample.rtt = RTT * 3 / 2;
        watched.sample.held_bytes = holds(4, 60);
        watched.delivers(4, 3000);
        assert!(watched.limit.is_growing());
        watched.sample.is_busy = true;
        watched.delivers(4, 1000);
        assert!(!watched.limit.is_growing(), "there is more to send");
    }

    #[test]
    fn a_path_that_has_nothing_to_carry_is_no_slower() {
        let mut watched = Watched::new();
        watched.delivers(50, 1000);
        watched.sample.is_busy = false;
        watched.delivers(1, 5000);
        assert_eq!(watched.limit.rate(), Some(50 * 125_000));
        watched.delivers(80, 100);
        assert_eq!(watched.limit.rate(), Some(80 * 125_000));
    }

    #[test]
    fn nobody_holds_back_where_others_fill_the_queue() {
        let mut watched = Watched::new();
        watched.delivers(20, 1000);
        watched.sample.held_bytes = holds(20, 60);
        watched.delivers(20, 1000);
        assert!(
            watched.limit.is_held_back(watched.now),
            "a queue of our own"
        );
        watched.sample.rtt = RTT * 4;
        watched.delivers(10, 10);
        let paced = watched.limit.pacing_rate(watched.now);
        assert_eq!(paced, None, "they would get faster");
        watched.delivers(10, 1000);
        assert_eq!(watched.under_way_bytes_max(), None);
        watched.sample.rtt = RTT;
        watched.delivers(20, 10_000);
        assert!(watched.limit.is_held_back(watched.now), "they have gone");
    }

    #[rstest]
    #[case::acknowledgements(2, 45, 62, true)]
    #[case::acknowledgements_and_room_left(2, 40, 62, false)]
    #[case::bytes(20, 45, 62, false)]
    #[case::bytes_of_others_as_well(20, 40, 100, true)]
    fn what_comes_the_other_way_explains_longer_round_trips(
        #[case] received_megabits: u64,
        #[case] held_milliseconds: u64,
        #[case] rtt_milliseconds: u64,
        #[case] is_crowded: bool,
    ) {
        let mut watched = Watched::new();
        watched.received_megabits = received_megabits;
        watched.delivers(20, 1000);
        watched.sample.held_bytes = holds(20, held_milliseconds);
        watched.sample.rtt = Duration::from_millis(rtt_milliseconds);
        watched.delivers(20, 1500);
        assert_eq!(watched.under_way_bytes_max().is_none(), is_crowded);
    }

    #[test]
    fn a_deep_queue_of_our_own_is_nobody_elses() {
        let mut watched = Watched::new();
        watched.delivers(20, 1000);
        watched.sample.held_bytes = holds(20, 200);
        watched.sample.rtt = RTT * 5;
        watched.delivers(20, 2000);
        assert!(watched.limit.is_held_back(watched.now));
        watched.sample.held_bytes = holds(20, 60);
        watched.delivers(20, 2000);
        assert_eq!(watched.under_way_bytes_max(), None, "that is not ours");
    }

    #[test]
    fn a_long_fat_path_has_more_under_way_than_a_connection_holds() {
        let mut watched = Watched::new();
        assert!(!watched.limit.is_long_fat(u64::MAX), "nothing is known");
        watched.delivers(1, 100);
        assert!(!watched.limit.is_long_fat(200 * 125_000), "1 MB");
        assert!(watched.limit.is_long_fat(210 * 125_000), "1.05 MB");
        watched.sample.rtt_min = LOCAL_RTT_MAX;
        watched.sample.rtt = LOCAL_RTT_MAX;
        watched.delivers(1, 100);
        assert!(!watched.limit.is_long_fat(10_000 * 125_000), "short");
    }

    #[test]
    fn losses_without_a_queue_are_the_nature_of_the_path() {
        let mut watched = Watched::new();
        watched.sample.retransmitted_segments = 50;
        watched.sample.rtt = RTT * 2;
        watched.delivers(20, 1000);
        assert!(!watched.limit.is_lossy(), "a queue overflowed");
        watched.sample.rtt = RTT;
        watched.sample.retransmitted_segments += 2;
        watched.delivers(20, 100);
        assert!(!watched.limit.is_lossy(), "may happen");
        watched.delivers(100, 20_000);
        watched.sample.retransmitted_segments += 30;
        watched.delivers(100, 10);
        assert!(!watched.limit.is_lossy(), "30 of 20,000");
        assert_eq!(watched.under_way_bytes_max(), Some(holds(100, 42 + 3)));
        watched.sample.retransmitted_segments += 30;
        watched.delivers(100, 10);
        assert!(watched.limit.is_lossy());
        assert_eq!(watched.under_way_bytes_max(), Some(holds(100, 100 + 3)));
    }

    #[test]
    fn what_an_outage_has_eaten_is_no_loss_of_the_path() {
        let mut watched = Watched::new();
        watched.delivers(20, 1000);
        assert!(!watched.limit.has_stalled(watched.now));
        watched.sample.timed_out = true;
        watched.delivers(0, 1000);
        assert!(watched.limit.is_growing(), "it begins anew");
        watched.sample.timed_out = false;
        watched.sample.retransmitted_segments += 1000;
        watched.delivers(20, 990);
        assert!(watched.limit.has_stalled(watched.now));
        assert!(!watched.limit.is_lossy());
        watched.delivers(20, 10);
        assert!(!watched.limit.has_stalled(watched.now));
        watched.sample.retransmitted_segments += 1000;
        watched.delivers(20, 10);
        assert!(watched.limit.is_lossy(), "that is the path's own doing");
        watched.delivers(20, 1000);
        watched.sample.timed_out = true;
        watched.delivers(0, 10);
        assert!(
            !watched.limit.is_growing(),
            "a packet that was sent again is lost"
        );
    }

    #[test]
    fn a_path_is_fast_that_is_short_and_carries_much() {
        let mut watched = Watched::new();
        watched.delivers(100, 20);
        assert!(!watched.limit.is_fast(u64::MAX), "40 ms");
        watched.sample.rtt_min = Duration::ZERO;
        watched.delivers(100, 20);
        assert!(!watched.limit.is_fast(u64::MAX), "not known yet");
        watched.sample.rtt_min = Duration::from_micros(50);
        watched.sample.rtt = Duration::from_millis(5);
        watched.delivers(100, 20);
        assert!(watched.limit.is_fast(FAST_BYTES_PER_SECOND));
        assert!(!watched.limit.is_fast(FAST_BYTES_PER_SECOND - 1));
    }

    proptest! {
        /// Whatever the kernel says, in whatever time: limits stay within their bounds.
        #[test]
        fn limits_stay_within_bounds(
            samples in prop::collection::vec(
                (any::<[u32; 3]>(), any::<[u64; 3]>(), any::<[bool; 2]>(), any::<u32>()),
                1..50,
            ),
        ) {
            let mut limit = SendLimit::new();
            let mut now = Instant::ZERO;
            for (segments, values, [is_busy, timed_out], step_micros) in samples {
                now += Duration::from_micros(step_micros.into());
                limit.observe(now, Sample {
                    delivered_segments: segments[0],
                    retransmitted_segments: segments[1],
                    segment_bytes: segments[2],
                    held_bytes: values[0],
                    received_bytes: values[1],
                    rtt_min: Duration::from_nanos(values[1]),
                    rtt: Duration::from_nanos(values[2]),
                    is_busy,
                    timed_out,
                });
                prop_assert!((AHEAD_BYTES_MIN..=AHEAD_BYTES_MAX).contains(&limit.ahead_bytes_max()));
                let max = limit.under_way_bytes_max(now);
                prop_assert!(max.is_none_or(|bytes| bytes >= UNDER_WAY_BYTES_MIN));
                limit.is_lossy();
            }
        }
    }
}
