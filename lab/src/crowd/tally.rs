//! What has become of the sessions so far, for whoever watches.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Counts, shared by the crowd's thread and the one that watches.
#[derive(Debug, Default)]
pub(super) struct Tally(Mutex<Counts>);

/// The counts at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    /// Sessions that are open.
    pub(super) open: usize,
    /// Sessions that have opened, whatever became of them.
    pub(super) opened: usize,
    /// Sessions that have opened, or failed to.
    pub(super) tried: usize,
    /// When the last one was tried.
    pub(super) last_tried: Option<Instant>,
    /// Sessions that were to last and did not, by reason.
    pub(super) failures: BTreeMap<String, usize>,
    pub(super) echo_requests: usize,
    /// Round-trip times of those that were answered, in microseconds.
    pub(super) echo_times_us: Vec<f64>,
}

impl Tally {
    pub(super) fn counts(&self) -> Counts {
        self.lock().clone()
    }

    pub(super) fn opened(&self) {
        let mut counts = self.lock();
        counts.open += 1;
        counts.opened += 1;
        counts.tried += 1;
        counts.last_tried = Some(Instant::now());
    }

    pub(super) fn not_opened(&self, reason: String) {
        let mut counts = self.lock();
        counts.tried += 1;
        counts.last_tried = Some(Instant::now());
        *counts.failures.entry(reason).or_default() += 1;
    }

    pub(super) fn dropped(&self, reason: String) {
        let mut counts = self.lock();
        counts.open -= 1;
        *counts.failures.entry(reason).or_default() += 1;
    }

    pub(super) fn requested(&self) {
        self.lock().echo_requests += 1;
    }

    pub(super) fn answered(&self, time: Duration) {
        self.lock().echo_times_us.push(time.as_secs_f64() * 1e6);
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
