//! Log lines that peers can cause without a bound are written once in a while, with the number of events.

use std::time::{Duration, Instant};

/// The least time between two lines about the same matter.
pub const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Lines about one peer that are written at once.
pub const PEER_LINES_MAX: u32 = 20;
/// The time between two lines about one peer after that.
pub const PEER_LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Counts events of one kind and says when a line about them is due: a token bucket of lines.
#[derive(Clone, Debug)]
pub struct LogLimit {
    lines_max: u32,
    interval: Duration,
    /// Lines that may be written at once, as of `refilled`.
    lines: u32,
    refilled: Option<Instant>,
    unreported: u64,
}

impl Default for LogLimit {
    /// One line each [`LOG_INTERVAL`].
    fn default() -> Self {
        LogLimit::new(1, LOG_INTERVAL)
    }
}

impl LogLimit {
    fn new(lines_max: u32, interval: Duration) -> Self {
        LogLimit {
            lines_max,
            interval,
            lines: lines_max,
            refilled: None,
            unreported: 0,
        }
    }

    /// For the lines about one peer.
    pub fn of_peer() -> Self {
        LogLimit::new(PEER_LINES_MAX, PEER_LINE_INTERVAL)
    }

    /// Counts an event that happened `now`. Returns the number of events since the last line when one is due.
    pub fn event(&mut self, now: Instant) -> Option<u64> {
        self.unreported += 1;
        let since = now.saturating_duration_since(*self.refilled.get_or_insert(now));
        let intervals = since.as_nanos() / self.interval.as_nanos();
        if intervals > 0 {
            let lines = u32::try_from(intervals).unwrap_or(self.lines_max);
            self.lines = self.lines.saturating_add(lines).min(self.lines_max);
            self.refilled = Some(now);
        }
        self.lines = self.lines.checked_sub(1)?;
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_events_makes_a_line_a_minute() {
        let mut limit = LogLimit::default();
        let begin = Instant::now();
        let lines: Vec<u64> = (0..1200)
            .filter_map(|tenth| limit.event(begin + tenth * Duration::from_millis(100)))
            .collect();
        assert_eq!(lines, [1, 600]);
    }

    #[test]
    fn a_storm_of_lines_about_a_peer_is_cut_and_counted() {
        let begin = Instant::now();
        let mut limit = LogLimit::of_peer();
        let logged = (0..1000).filter(|_| limit.event(begin).is_some()).count();
        assert_eq!(logged, PEER_LINES_MAX as usize);
        let later = begin + PEER_LINE_INTERVAL;
        assert_eq!(limit.event(later), Some(1001 - u64::from(PEER_LINES_MAX)));
        assert_eq!(limit.event(later), None);
        assert_eq!(limit.event(later + PEER_LINE_INTERVAL), Some(2));
        let much_later = later + 1000 * PEER_LINE_INTERVAL;
        let logged = (0..1000).filter(|_| limit.event(much_later).is_some());
        assert_eq!(logged.count(), PEER_LINES_MAX as usize);
    }
}
