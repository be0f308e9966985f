//! A bound on the log lines that one peer can cause.

use std::time::{Duration, Instant};

/// Lines at once.
pub const LINES_MAX: u32 = 20;
/// From one line to the next, after that.
pub const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A token bucket for lines that says how many it has left out.
#[derive(Clone, Copy, Debug)]
pub struct LogLimit {
    lines: u32,
    refilled: Instant,
    left_out: u64,
}

impl LogLimit {
    /// [`LINES_MAX`] lines may be logged at once.
    pub fn new(now: Instant) -> Self {
        LogLimit {
            lines: LINES_MAX,
            refilled: now,
            left_out: 0,
        }
    }

    /// Whether a line may be logged now; if so, how many were left out since the last one.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let intervals =
            now.saturating_duration_since(self.refilled).as_nanos() / LINE_INTERVAL.as_nanos();
        if intervals > 0 {
            let lines = u32::try_from(intervals).unwrap_or(LINES_MAX);
            self.lines = self.lines.saturating_add(lines).min(LINES_MAX);
            self.refilled = now;
        }
        if self.lines == 0 {
            self.left_out += 1;
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_of_lines_is_cut_and_counted() {
        let start = Instant::now();
        let mut limit = LogLimit::new(start);
        let logged = (0..1000).filter(|_| limit.take(start).is_some()).count();
        assert_eq!(logged, LINES_MAX as usize);
        let later = start + LINE_INTERVAL;
        assert_eq!(limit.take(later), Some(1000 - u64::from(LINES_MAX)));
        assert_eq!(limit.take(later), None);
        assert_eq!(limit.take(later + LINE_INTERVAL), Some(1));
        let much_later = later + 1000 * LINE_INTERVAL;
        let logged = (0..1000).filter(|_| limit.take(much_later).is_some());
        assert_eq!(logged.count(), LINES_MAX as usize);
    }
}
