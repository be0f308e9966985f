//! What happens when, and a record of what happened.

use ringtun::proto::timer::Instant;
use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};

/// How much of what happened is kept for who looks for the reason of a failure.
const LINES_MAX: usize = 2000;

/// Something that happens at a moment.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A flow has its next packet to send.
    Send { flow: usize },
    /// A sender hears what became of some of its segments.
    Heard {
        flow: usize,
        segments: usize,
        congestion: bool,
    },
    /// A segment of a stream arrives, sent as the `transmission`-th one.
    Arrive {
        stream: usize,
        segment: u64,
        transmission: u64,
    },
    /// The sender of a stream hears of that.
    Acknowledge {
        stream: usize,
        segment: u64,
        transmission: u64,
    },
    /// The sender of a stream may have waited for too long.
    Timeout { stream: usize },
    /// The sender of a stream has held its next segment back for long enough.
    Paced { stream: usize },
    /// The socket has taken what it would of a write.
    Written { stream: usize },
    /// A connection that was held back looks again.
    Paused { stream: usize },
    /// A connection ends: nothing more arrives.
    Die { ordinal: usize },
    /// An end learns that a stream of its has ended.
    Learn { side: usize, stream: usize },
    /// A connection is there again at an end.
    Return {
        side: usize,
        ordinal: usize,
        streams: [usize; 2],
    },
    /// An end has heard nothing of a connection for long, or has heard of it again.
    Silence {
        side: usize,
        ordinal: usize,
        silent: bool,
    },
    /// From here on, figures count.
    Measure,
    /// Flows send no more.
    Stop,
}

#[derive(Debug)]
struct Due {
    at: Instant,
    serial: u64,
    event: Event,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

/// All that is yet to happen. What is due at the same moment happens in the order in which it was said.
#[derive(Debug, Default)]
pub struct Agenda {
    heap: BinaryHeap<Reverse<Due>>,
    serial: u64,
}

impl Agenda {
    pub fn at(&mut self, at: Instant, event: Event) {
        self.serial += 1;
        let serial = self.serial;
        self.heap.push(Reverse(Due { at, serial, event }));
    }

    pub fn next(&mut self) -> Option<(Instant, Event)> {
        let Reverse(due) = self.heap.pop()?;
        Some((due.at, due.event))
    }
}

/// The last of what happened. Costs nothing unless it is wanted.
#[derive(Debug, Default)]
pub struct Trace {
    is_wanted: bool,
    lines: VecDeque<String>,
}

impl Trace {
    pub fn wanted() -> Self {
        Self {
            is_wanted: true,
            lines: VecDeque::new(),
        }
    }

    pub fn note(&mut self, now: Instant, what: impl FnOnce() -> String) {
        if self.is_wanted {
            if self.lines.len() == LINES_MAX {
                self.lines.pop_front();
            }
            let milliseconds = now.as_nanos() as f64 / 1e6;
            self.lines
                .push_back(format!("{milliseconds:12.4} {}", what()));
        }
    }

    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}
