//! What a connection knows of its path, and how much it may send because of that.

use super::PathKind;
use crate::proto::send_limit::{Allowance, SendLimit};
use crate::proto::timer::Instant;
use crate::sys::{congestion, socket, tcp_info};
use std::os::fd::BorrowedFd;

/// One connection's path.
pub(super) struct Path {
    /// Whether the congestion control changes with the path.
    follows: bool,
    limit: SendLimit,
    /// Bytes received, and when that was looked at.
    received: (Instant, u64),
    /// The worst that it has turned out to be. That is final.
    kind: PathKind,
    /// The same as control knows it.
    told: PathKind,
    looked_at: Instant,
    /// What the kernel was last told to hold unsent.
    unsent_bytes_max: u64,
    /// What the kernel was last told to send at most, in bytes a second.
    pacing_rate: Option<u64>,
    /// Bytes of packets that may wait.
    queue_bytes_max: u64,
}

impl Path {
    /// Nothing is known yet. `follows`: the congestion control is chosen by what the path is like.
    pub(super) fn new(follows: bool) -> Self {
        Self {
            follows,
            limit: SendLimit::new(),
            received: (Instant::ZERO, 0),
            kind: PathKind::Ordinary,
            told: PathKind::Ordinary,
            looked_at: Instant::ZERO,
            unsent_bytes_max: u64::from(socket::NOTSENT_LOWAT_BYTES),
            pacing_rate: None,
            queue_bytes_max: SendLimit::new().queue_bytes_max(),
        }
    }

    /// Has a look if it is time for one. `is_busy`: there is more to send than is taken.
    pub(super) fn look(&mut self, socket: BorrowedFd<'_>, now: Instant, is_busy: bool) {
        if now.since(self.looked_at) < self.limit.look_interval(now) {
            return;
        }
        self.looked_at = now;
        let Ok(sample) = tcp_info::sample(socket, is_busy) else {
            return; // The connection is about to end.
        };
        self.limit.observe(now, sample);
        self.queue_bytes_max = self.limit.queue_bytes_max();
        self.limit_unsent(socket);
        self.limit_pacing(socket, now);
        self.carries(self.limit.rate().unwrap_or(0));
        if self.kind < PathKind::Lossy && self.limit.is_lossy() && !self.limit.is_local() {
            if self.follows {
                congestion::bear_losses(socket);
            }
            self.kind = match congestion::bears_losses(socket) {
                true => PathKind::Lossy,
                false => PathKind::Slowed,
            };
        }
    }

    /// So many bytes have been received since the connection began. Wants to know every now and then.
    pub(super) fn on_received(&mut self, now: Instant, bytes: u64) {
        let (since, before) = std::mem::replace(&mut self.received, (now, bytes));
        let nanos = now.since(since).as_nanos().max(1);
        let rate = u128::from(bytes - before) * 1_000_000_000 / nanos;
        self.carries(u64::try_from(rate).unwrap_or(u64::MAX));
    }

    fn carries(&mut self, bytes_per_second: u64) {
        if self.limit.is_fast(bytes_per_second) {
            self.kind = self.kind.max(PathKind::Fast);
        }
        if self.limit.is_long_fat(bytes_per_second) {
            self.kind = self.kind.max(PathKind::LongFat);
        }
    }

    /// What the path has turned out just now to be, if that is worse than what was known before.
    pub(super) fn has_turned(&mut self) -> Option<PathKind> {
        (self.told < self.kind).then(|| {
            self.told = self.kind;
            self.kind
        })
    }

    fn limit_unsent(&mut self, socket: BorrowedFd<'_>) {
        let wanted = self
            .ahead_bytes_max()
            .min(u64::from(socket::NOTSENT_LOWAT_BYTES));
        // Not for every wobble.
        if wanted.abs_diff(self.unsent_bytes_max) > self.unsent_bytes_max / 4
            && socket::limit_unsent(socket, wanted as u32).is_ok()
        {
            self.unsent_bytes_max = wanted;
        }
    }

    fn limit_pacing(&mut self, socket: BorrowedFd<'_>, now: Instant) {
        let wanted = self.limit.pacing_rate(now);
        let is_wobble = wanted
            .zip(self.pacing_rate)
            .is_some_and(|(wanted, told)| wanted.abs_diff(told) <= told / 16);
        if wanted != self.pacing_rate && !is_wobble && socket::limit_pacing(socket, wanted).is_ok()
        {
            self.pacing_rate = wanted;
        }
    }

    /// The socket took `bytes`.
    pub(super) fn on_sent(&mut self, bytes: usize) {
        self.limit.sent(bytes);
    }

    /// What may be sealed now.
    pub(super) fn allowance(&self, now: Instant) -> Allowance {
        self.limit.allowance(now)
    }

    /// Bytes that may be sealed and not yet taken by the socket as long as little is under way.
    pub(super) fn ahead_bytes_max(&self) -> u64 {
        self.limit.ahead_bytes_max()
    }

    /// How many bytes of packets may wait.
    pub(super) fn queue_bytes_max(&self) -> usize {
        self.queue_bytes_max as usize
    }

    /// Whether packets wait for what changes by itself in a moment.
    pub(super) fn is_changing(&self, now: Instant) -> bool {
        self.limit.is_changing(now)
    }

    /// Whether nothing is to be sealed until some of what is under way has arrived.
    pub(super) fn is_held_back(&self, now: Instant) -> bool {
        self.limit.is_held_back(now)
    }
}
