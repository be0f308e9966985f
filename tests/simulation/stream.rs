//! TCP as far as it matters here: a byte stream that is reliable and in order, over a path that is slow, far and lossy.
//!
//! Segments wait in the queue of a bottleneck, which all connections of a direction share, arrive after a delay, or are lost:
//! by chance, in an outage, or as the queue is full. What is behind a lost segment is delivered only when that one has
//! been sent again, which its sender does as soon as he hears of anything that he sent later (nothing is reordered), or
//! after a time-out. Acknowledgements are never lost; they take as long as the queue of the other direction makes them.

use crate::agenda::{Agenda, Event};
use crate::dice::Dice;
use ringtun::proto::send_limit::Sample;
use ringtun::proto::timer::Instant;
use std::collections::VecDeque;
use std::time::Duration;

/// Payload of a segment on a path with an MTU of 1500, with timestamps.
pub const SEGMENT_BYTES: u64 = 1448;
/// IP and TCP headers of a segment.
pub const SEGMENT_HEADERS_BYTES: u64 = 52;
const WINDOW_SEGMENTS_FIRST: u64 = 10;
const WINDOW_SEGMENTS_MIN: u64 = 2;
/// A window that is not in slow start grows by so many segments in a round trip.
const GROWTH_SEGMENTS: f64 = 2.0;
/// And is cut to this share by a loss, as CUBIC's is (RFC 9438).
const CUT: f64 = 0.7;
const TIMEOUT_MIN: Duration = Duration::from_millis(200);
const TIMEOUT_MAX: Duration = Duration::from_secs(1);
/// What is acknowledged is thrown away in pieces of this size.
const ACKNOWLEDGED_BYTES_MAX: usize = 64 * 1024;

/// One direction of a path, with its bottleneck.
#[derive(Debug)]
pub struct Path {
    pub bytes_per_second: f64,
    pub delay: Duration,
    pub queue_bytes_max: f64,
    /// Share of what is lost by chance.
    pub loss: f64,
    pub outages: Vec<(Instant, Instant)>,
    /// When the bottleneck will have sent all that it has.
    free_at: Instant,
}

impl Path {
    pub fn new(bytes_per_second: f64, delay: Duration, queue_bytes_max: f64) -> Self {
        Self {
            bytes_per_second,
            delay,
            queue_bytes_max,
            loss: 0.0,
            outages: Vec::new(),
            free_at: Instant::ZERO,
        }
    }

    pub fn time_of(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_second)
    }

    /// When what is sent now arrives; `None` if it does not.
    fn carry(&mut self, now: Instant, bytes: u64, dice: &mut Dice) -> Option<Instant> {
        let is_out = |(from, to): &(Instant, Instant)| (*from..*to).contains(&now);
        if self.outages.iter().any(is_out) {
            return None;
        }
        let backlog = self.free_at.since(now).as_secs_f64() * self.bytes_per_second;
        if backlog + bytes as f64 > self.queue_bytes_max {
            return None;
        }
        self.free_at = self.free_at.max(now) + self.time_of(bytes);
        (dice.unit() >= self.loss).then(|| self.free_at + self.delay)
    }

    /// How long a small packet takes that is never lost.
    fn crossing(&self, now: Instant) -> Duration {
        self.free_at.since(now) + self.delay
    }
}

/// How a sender finds out how much to have under way.
#[derive(Clone, Copy, Debug)]
pub enum Control {
    /// The window grows until something is lost, as CUBIC's does: slow start first, then by a few segments in a round trip.
    Growing,
    /// The window is a given number of bytes, whatever is lost: what BBR would have, two bandwidth-delay products.
    Given(f64),
}

#[derive(Debug)]
struct Segment {
    start: u64,
    bytes: u64,
    sent_at: Instant,
    /// The last time that it was sent.
    transmission: u64,
    sent_again: bool,
    arrived: bool,
    acknowledged: bool,
}

/// One direction of a connection, its sender and its receiver.
#[derive(Debug)]
pub struct Stream {
    name: usize,
    pub direction: usize,
    control: Control,
    /// There is always more to send, and nobody looks at it.
    is_greedy: bool,
    /// Nothing of it arrives any more.
    pub is_dead: bool,
    /// Unacknowledged bytes, from place `kept_from` of the stream on.
    kept: Vec<u8>,
    kept_from: u64,
    written: u64,
    sent: u64,
    /// All that are not acknowledged, and those behind one that is not; the number of the first.
    segments: VecDeque<Segment>,
    first: u64,
    /// Transmissions that were not heard of, with their segments and bytes.
    outstanding: VecDeque<(u64, u64, u64)>,
    lost: VecDeque<u64>,
    transmissions: u64,
    in_flight: u64,
    window: f64,
    slow_start_until: f64,
    /// Losses among the transmissions before this one are those that the window was cut for.
    cut_at: u64,
    /// When the sender gives up waiting, and by how much longer than usual he waits.
    gives_up_at: Instant,
    patience: u32,
    is_timing: bool,
    rtt: Duration,
    rtt_min: Duration,
    delivered_segments: u32,
    retransmitted_segments: u32,
    /// The first segment that has not arrived.
    expected: u64,
    pub delivered_bytes: u64,
    /// More than this unsent is not taken.
    pub unsent_bytes_max: u64,
    awaits_room: bool,
    /// Bytes of the path that are sent in a second at most.
    pub pacing_rate: Option<u64>,
    /// When the next segment may be sent because of that.
    paced_until: Instant,
    is_pacing: bool,
}

impl Stream {
    pub fn new(name: usize, direction: usize, control: Control, is_greedy: bool) -> Self {
        Self {
            name,
            direction,
            control,
            is_greedy,
            is_dead: false,
            kept: Vec::new(),
            kept_from: 0,
            written: 0,
            sent: 0,
            segments: VecDeque::new(),
            first: 0,
            outstanding: VecDeque::new(),
            lost: VecDeque::new(),
            transmissions: 0,
            in_flight: 0,
            window: (WINDOW_SEGMENTS_FIRST * SEGMENT_BYTES) as f64,
            slow_start_until: f64::INFINITY,
            cut_at: 0,
            gives_up_at: Instant::ZERO,
            patience: 1,
            is_timing: false,
            rtt: Duration::ZERO,
            rtt_min: Duration::ZERO,
            delivered_segments: 0,
            retransmitted_segments: 0,
            expected: 0,
            delivered_bytes: 0,
            unsent_bytes_max: 0,
            awaits_room: false,
            pacing_rate: None,
            paced_until: Instant::ZERO,
            is_pacing: false,
        }
    }

    /// What a kernel would say of it: it counts segments, short ones like full ones.
    pub fn sample(&self, is_busy: bool, received_bytes: u64) -> Sample {
        let in_flight = self.outstanding.len() as u64 * SEGMENT_BYTES;
        Sample {
            delivered_segments: self.delivered_segments,
            retransmitted_segments: self.retransmitted_segments,
            segment_bytes: SEGMENT_BYTES as u32,
            held_bytes: in_flight + self.unsent_bytes(),
            received_bytes,
            rtt_min: self.rtt_min,
            rtt: self.rtt,
            is_busy,
            timed_out: self.patience > 1,
        }
    }

    fn unsent_bytes(&self) -> u64 {
        if self.is_greedy {
            u64::MAX / 2
        } else {
            self.written - self.sent
        }
    }

    /// Takes some of `bytes`, segment by segment as long as little enough is unsent (`tcp_sendmsg_locked`).
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let unsent = self.unsent_bytes();
        let room = self.unsent_bytes_max.saturating_sub(unsent);
        let taken = bytes
            .len()
            .min(room.next_multiple_of(SEGMENT_BYTES) as usize);
        self.kept.extend_from_slice(&bytes[..taken]);
        self.written += taken as u64;
        self.awaits_room = taken == 0;
        taken
    }

    /// Sends what the window allows, when pacing does.
    pub fn transmit(
        &mut self,
        now: Instant,
        path: &mut Path,
        dice: &mut Dice,
        agenda: &mut Agenda,
    ) {
        while self.in_flight == 0 || (self.in_flight + SEGMENT_BYTES) as f64 <= self.window {
            if now < self.paced_until {
                self.wait_for_pace(agenda);
                break;
            }
            let Some(number) = self.next_segment(now) else {
                break;
            };
            self.transmissions += 1;
            let segment = &mut self.segments[(number - self.first) as usize];
            segment.transmission = self.transmissions;
            let bytes = segment.bytes;
            self.in_flight += bytes;
            if self.outstanding.is_empty() {
                self.gives_up_at = now + self.timeout();
            }
            self.outstanding
                .push_back((self.transmissions, number, bytes));
            if let Some(rate) = self.pacing_rate {
                let bytes = (bytes + SEGMENT_HEADERS_BYTES) as f64;
                self.paced_until = now + Duration::from_secs_f64(bytes / rate as f64);
            }
            let arrives = path.carry(now, bytes + SEGMENT_HEADERS_BYTES, dice);
            if let Some(at) = arrives.filter(|_| !self.is_dead) {
                let event = Event::Arrive {
                    stream: self.name,
                    segment: number,
                    transmission: self.transmissions,
                };
                agenda.at(at, event);
            }
        }
        if !self.is_timing && !self.is_dead && !self.outstanding.is_empty() {
            self.is_timing = true;
            agenda.at(self.gives_up_at, Event::Timeout { stream: self.name });
        }
        // A sleeping writer is woken when half of it is sent (`tcp_stream_memory_free`).
        if self.awaits_room && 2 * self.unsent_bytes() < self.unsent_bytes_max {
            self.awaits_room = false;
            agenda.at(now, Event::Written { stream: self.name });
        }
    }

    fn wait_for_pace(&mut self, agenda: &mut Agenda) {
        if !self.is_pacing {
            self.is_pacing = true;
            agenda.at(self.paced_until, Event::Paced { stream: self.name });
        }
    }

    /// The next segment may be sent.
    pub fn end_pace(&mut self) {
        self.is_pacing = false;
    }

    /// One that was lost, or a new one.
    fn next_segment(&mut self, now: Instant) -> Option<u64> {
        if let Some(number) = self.lost.pop_front() {
            self.segments[(number - self.first) as usize].sent_again = true;
            self.retransmitted_segments += 1;
            return Some(number);
        }
        let bytes = self.unsent_bytes().min(SEGMENT_BYTES);
        if bytes == 0 {
            return None;
        }
        self.segments.push_back(Segment {
            start: self.sent,
            bytes,
            sent_at: now,
            transmission: 0,
            sent_again: false,
            arrived: false,
            acknowledged: false,
        });
        self.sent += bytes;
        Some(self.first + self.segments.len() as u64 - 1)
    }

    /// A segment arrives: what can be delivered now, and goes to `deliver`.
    pub fn arrive(
        &mut self,
        now: Instant,
        (number, transmission): (u64, u64),
        back: &Path,
        agenda: &mut Agenda,
        deliver: &mut Vec<u8>,
    ) {
        if self.is_dead || number < self.first {
            return;
        }
        self.segments[(number - self.first) as usize].arrived = true;
        while let Some(segment) = self.segments.get((self.expected - self.first) as usize)
            && segment.arrived
        {
            self.expected += 1;
            self.delivered_bytes += segment.bytes;
            if !self.is_greedy {
                let start = (segment.start - self.kept_from) as usize;
                deliver.extend_from_slice(&self.kept[start..start + segment.bytes as usize]);
            }
        }
        let event = Event::Acknowledge {
            stream: self.name,
            segment: number,
            transmission,
        };
        agenda.at(now + back.crossing(now), event);
    }

    /// The sender hears of a segment that arrived, and so of those before it that did not.
    pub fn acknowledge(&mut self, now: Instant, number: u64, transmission: u64) {
        if self.is_dead {
            return;
        }
        self.patience = 1;
        self.gives_up_at = now + self.timeout();
        let was_limited = (self.in_flight + 2 * SEGMENT_BYTES) as f64 > self.window;
        let acknowledged = self.confirm(now, number);
        let mut has_lost = false;
        while let Some((sent, which, bytes)) = self
            .outstanding
            .pop_front_if(|(sent, ..)| *sent <= transmission)
        {
            self.in_flight -= bytes;
            if self.is_missing(which) {
                self.lost.push_back(which);
                has_lost |= sent > self.cut_at;
            }
        }
        if let Control::Given(most) = self.control {
            self.window = (self.window + acknowledged as f64).min(most);
        } else if has_lost {
            self.cut_at = self.transmissions;
            let least = (WINDOW_SEGMENTS_MIN * SEGMENT_BYTES) as f64;
            self.window = (self.window * CUT).max(least);
            self.slow_start_until = self.window;
        } else if self.window < self.slow_start_until {
            // Twice what is in use, and no more, also where the sender has little to send.
            if 2.0 * self.in_flight as f64 >= self.window - (4 * SEGMENT_BYTES) as f64 {
                self.window += acknowledged as f64;
            }
        } else if was_limited {
            let growth = GROWTH_SEGMENTS * SEGMENT_BYTES as f64;
            self.window += growth * acknowledged as f64 / self.window;
        }
        self.forget();
    }

    fn confirm(&mut self, now: Instant, number: u64) -> u64 {
        let index = number.checked_sub(self.first);
        let segment = index.and_then(|index| self.segments.get_mut(index as usize));
        let Some(segment) = segment.filter(|segment| !segment.acknowledged) else {
            return 0;
        };
        segment.acknowledged = true;
        self.delivered_segments += 1;
        let (bytes, sent_again) = (segment.bytes, segment.sent_again);
        let rtt = now.since(segment.sent_at);
        self.lost.retain(|lost| *lost != number);
        if !sent_again {
            self.rtt_min = match self.rtt_min {
                Duration::ZERO => rtt,
                least => least.min(rtt),
            };
            self.rtt = match self.rtt {
                Duration::ZERO => rtt,
                average => (average * 7 + rtt) / 8,
            };
        }
        bytes
    }

    fn is_missing(&self, number: u64) -> bool {
        let index = number.checked_sub(self.first);
        index.is_some_and(|index| !self.segments[index as usize].acknowledged)
    }

    /// What is acknowledged up to a place is of no use any more.
    fn forget(&mut self) {
        let front = |one: &mut Segment| one.acknowledged;
        while self.segments.pop_front_if(front).is_some() {
            self.first += 1;
        }
        let needed = self.segments.front().map_or(self.sent, |first| first.start);
        let free = (needed - self.kept_from) as usize;
        if !self.is_greedy && free > ACKNOWLEDGED_BYTES_MAX {
            self.kept.drain(..free);
            self.kept_from = needed;
        }
    }

    fn timeout(&self) -> Duration {
        let usual = (self.rtt * 2).max(TIMEOUT_MIN);
        (usual * self.patience).min(TIMEOUT_MAX.max(usual))
    }

    /// Nothing was heard of for long: everything under way counts as lost.
    pub fn time_out(&mut self, now: Instant, agenda: &mut Agenda) {
        self.is_timing = false;
        if self.outstanding.is_empty() || self.is_dead {
            return;
        }
        if now < self.gives_up_at {
            self.is_timing = true;
            agenda.at(self.gives_up_at, Event::Timeout { stream: self.name });
            return;
        }
        let unheard = self.outstanding.drain(..).map(|(_, number, _)| number);
        let mut lost: Vec<u64> = unheard.chain(self.lost.drain(..)).collect();
        lost.sort_unstable();
        lost.dedup();
        lost.retain(|number| self.is_missing(*number));
        self.lost = lost.into();
        self.in_flight = 0;
        self.patience = (self.patience * 2).min(4);
        if matches!(self.control, Control::Growing) {
            self.slow_start_until = self.window * CUT;
            self.window = (WINDOW_SEGMENTS_MIN * SEGMENT_BYTES) as f64;
        }
        self.cut_at = self.transmissions;
        self.gives_up_at = now + self.timeout();
    }

    /// Nothing of it arrives from now on.
    pub fn die(&mut self) {
        self.is_dead = true;
    }
}
