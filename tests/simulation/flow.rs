//! Those who send: at a pace, or with a window that reacts.

use crate::dice::Dice;
use crate::packets::{NUMBER_BYTES, Part, Protocol, Shape};
use crate::scenario::Manner;
use ringtun::proto::timer::Instant;
use std::time::Duration;

const PACKET_BYTES_MAX: usize = 65_000;

/// One who sends.
pub struct Flow {
    pub shape: Shape,
    pub manner: Manner,
    place: u32,
    identification: u16,
    /// In segments; for those who react.
    window: f64,
    slow_start: bool,
    pub in_flight: usize,
    cut_at: Instant,
    /// A cut that its packets have yet to tell the other side of.
    owes_cwr: bool,
}

impl Flow {
    /// One that has sent nothing yet.
    pub fn new(shape: Shape, manner: Manner) -> Self {
        Self {
            shape,
            manner,
            place: 1,
            identification: 65_000,
            window: 10.0,
            slow_start: true,
            in_flight: 0,
            cut_at: Instant::ZERO,
            owes_cwr: false,
        }
    }

    /// How many segments the next packet has, of one who reacts: an eighth of the window, as TCP does it.
    pub fn may_send(&self) -> Option<usize> {
        let most = PACKET_BYTES_MAX / self.shape.segment_bytes;
        let burst = ((self.window / 8.0) as usize).clamp(1, most);
        let room = (self.window as usize).saturating_sub(self.in_flight);
        (room >= burst.div_ceil(2)).then_some(burst.min(room))
    }

    /// What its next packet carries.
    pub fn next_part(&mut self, segments: usize, dice: &mut Dice) -> Part {
        let Shape {
            protocol,
            segment_bytes,
            ..
        } = self.shape;
        let most = match protocol {
            Protocol::Acks => 1,
            Protocol::Tcp | Protocol::Udp => PACKET_BYTES_MAX / segment_bytes,
        };
        let segments = segments.min(most);
        let least = match protocol {
            Protocol::Udp => NUMBER_BYTES,
            Protocol::Tcp => 1,
            Protocol::Acks => 0,
        };
        let is_short = protocol != Protocol::Acks && dice.percent(20);
        let last_bytes = match is_short {
            true => dice.between(least as u64, segment_bytes as u64) as usize,
            false => segment_bytes,
        };
        let part = Part {
            place: self.place,
            segments,
            last_bytes,
            identification: self.identification,
            cwr: self.owes_cwr,
            is_end: is_short,
        };
        self.place += match protocol {
            Protocol::Tcp => ((segments - 1) * segment_bytes + last_bytes) as u32,
            Protocol::Udp | Protocol::Acks => segments as u32,
        };
        self.identification = self.identification.wrapping_add(segments as u16);
        self.owes_cwr = false;
        part
    }

    /// The window grows by a few segments a round trip and is cut at most once in one, about as CUBIC's (RFC 9438).
    pub fn hear(&mut self, now: Instant, segments: usize, congestion: bool, round_trip: Duration) {
        const GROWTH_SEGMENTS: f64 = 3.0;
        self.in_flight -= segments;
        if congestion {
            self.slow_start = false;
            if now.since(self.cut_at) > round_trip {
                self.cut_at = now;
                self.window = (self.window * 0.7).max(2.0);
                // Also without ECT: so does who sends something again (RFC 3168 section 6.1.5).
                self.owes_cwr = self.shape.protocol == Protocol::Tcp;
            }
        } else if self.slow_start {
            self.window += segments as f64;
        } else {
            self.window += GROWTH_SEGMENTS * segments as f64 / self.window;
        }
    }
}
