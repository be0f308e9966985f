//! Which flows are sparse ones.
//!
//! Where a session has a connection for sparse flows (RFC 8290 has the word), a flow of which little is sent and received takes that
//! one and does not wait behind the others. A flow begins as any other. It is sparse from the first packet that is sent after
//! a [`PAUSE`], if there was no more than [`SPARSE_BYTES_MAX`] of it in a [`WINDOW`] for [`QUIET`], and until there is.
//!
//! So what is sent much of from the beginning never changes its connection, and arrives in order. On the short paths that
//! have such a connection a sender that does not pause is not waiting for an acknowledgement.
//!
//! Both directions count, and so both ends come to the same result, one a little later than the other. They should: tun's
//! steering gives a flow's packets to the worker that has last written one of its other direction.
//!
//! Only so many flows are known. One whose hash ends like another's takes its place, and the other one is new when it comes
//! again: a million of them need no more memory than one, and none is taken for sparse because of others.

use super::timer::Instant;
use std::time::Duration;

/// A flow with more than this in [`WINDOW`] is not sparse: 5 Mbit/s, which a call with video does not reach.
pub const SPARSE_BYTES_MAX: u32 = 64 * 1024;
/// Bytes are counted for so long.
pub const WINDOW: Duration = Duration::from_millis(100);
/// A flow has to stay below that for so long to be sparse again, and to receive nothing for so long to be unanswered.
pub const QUIET: Duration = Duration::from_secs(1);
/// And it has to send nothing for so long: the round trip of a short path, so that nothing of it should be under way.
pub const PAUSE: Duration = Duration::from_millis(2);
/// Flows that are known, a power of two: the low bits of the hash, as [`super::route_table`] uses the high ones.
const FLOWS: usize = 4096;

/// What a flow is like.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Little is sent and received.
    Sparse,
    /// Much is sent or received, or it is not known yet.
    Ordinary,
    /// The same, and nothing has been received for [`QUIET`].
    Unanswered,
}

/// What is known of a flow.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    hash: u32,
    /// When a packet was last sent.
    sent: Instant,
    /// When one was last received.
    received: Option<Instant>,
    /// When the counting began.
    began: Instant,
    /// Bytes since then.
    bytes: u32,
    is_sparse: bool,
    /// When there were last too many.
    exceeded: Option<Instant>,
}

impl Known {
    #[inline]
    fn count(&mut self, now: Instant, bytes: usize) {
        if now.since(self.began) >= WINDOW {
            self.began = now;
            self.bytes = 0;
        }
        self.bytes = self.bytes.saturating_add(bytes as u32);
        if self.bytes > SPARSE_BYTES_MAX {
            self.is_sparse = false;
            self.exceeded = Some(now);
        }
    }
}

/// The flows that come up on one worker.
#[derive(Clone, Debug)]
pub struct SparseFlows {
    known: Box<[Known; FLOWS]>,
}

impl Default for SparseFlows {
    fn default() -> Self {
        Self::new()
    }
}

impl SparseFlows {
    /// No flow is known.
    pub fn new() -> Self {
        Self {
            known: Box::new([Known::default(); FLOWS]),
        }
    }

    /// A packet of `bytes` is about to be sent.
    #[inline]
    pub fn sends(&mut self, now: Instant, flow: u32, bytes: usize) -> Kind {
        let known = self.known(now, flow);
        let is_quiet = |last: Option<Instant>| last.is_none_or(|last| now.since(last) >= QUIET);
        known.is_sparse |= now.since(known.sent) >= PAUSE && is_quiet(known.exceeded);
        known.sent = now;
        known.count(now, bytes);
        match known.is_sparse {
            true => Kind::Sparse,
            false if is_quiet(known.received) => Kind::Unanswered,
            false => Kind::Ordinary,
        }
    }

    /// A packet of `bytes` has been received.
    #[inline]
    pub fn receives(&mut self, now: Instant, flow: u32, bytes: usize) {
        let known = self.known(now, flow);
        known.received = Some(now);
        known.count(now, bytes);
    }

    #[inline]
    fn known(&mut self, now: Instant, flow: u32) -> &mut Known {
        let known = &mut self.known[flow as usize % FLOWS];
        if known.hash != flow {
            *known = Known {
                hash: flow,
                sent: now,
                began: now,
                ..Known::default()
            };
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FLOW: u32 = 7 << 24 | 5;
    const PACKET: usize = 1500;
    const MUCH: usize = SPARSE_BYTES_MAX as usize + 1;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_duration(Duration::from_millis(milliseconds))
    }

    /// Has sent much at 0 ms.
    fn bulk() -> SparseFlows {
        let mut flows = SparseFlows::new();
        assert_eq!(flows.sends(at(0), FLOW, MUCH), Kind::Unanswered);
        flows
    }

    /// Sends a packet after a pause that is as short as it may be, at 2 ms.
    fn sparse() -> SparseFlows {
        let mut flows = SparseFlows::new();
        assert_ne!(flows.sends(at(0), FLOW, PACKET), Kind::Sparse);
        assert_ne!(flows.sends(at(1), FLOW, PACKET), Kind::Sparse);
        assert_eq!(flows.sends(at(3), FLOW, PACKET), Kind::Sparse);
        flows
    }

    #[test]
    fn a_flow_that_sends_little_stays_sparse_for_good() {
        let mut flows = sparse();
        for millisecond in 3..100_000 {
            // 4.8 Mbit/s.
            let kind = flows.sends(at(millisecond), FLOW, 600);
            assert_eq!(kind, Kind::Sparse, "{millisecond}");
        }
    }

    #[test]
    fn a_flow_that_never_pauses_never_changes() {
        let mut flows = SparseFlows::new();
        for millisecond in 0..10_000 {
            assert_ne!(flows.sends(at(millisecond), FLOW, 1), Kind::Sparse);
        }
    }

    #[test]
    fn both_directions_count() {
        let mut flows = sparse();
        flows.receives(at(4), FLOW, MUCH);
        assert_eq!(flows.sends(at(6), FLOW, 1), Kind::Ordinary);
        assert_eq!(flows.sends(at(1_003), FLOW, 1), Kind::Ordinary);
        // At 6 ms the window was still one with too much.
        assert_eq!(flows.sends(at(1_006), FLOW, 1), Kind::Sparse);
    }

    /// A call that was taken for more than it is: whatever put it there, the next second ends it.
    #[test]
    fn a_flow_that_goes_on_with_little_is_sparse_again() {
        let mut flows = bulk();
        for millisecond in (20..2_000).step_by(20) {
            flows.receives(at(millisecond), FLOW, 200);
            let kind = flows.sends(at(millisecond), FLOW, 200);
            // The window that was too much ended with the packet at 80 ms.
            let expected = match millisecond < 1_080 {
                true => Kind::Ordinary,
                false => Kind::Sparse,
            };
            assert_eq!(kind, expected, "{millisecond}");
        }
    }

    #[test]
    fn who_hears_nothing_is_unanswered() {
        let mut flows = bulk();
        flows.receives(at(1), FLOW, 1);
        assert_eq!(flows.sends(at(2), FLOW, MUCH), Kind::Ordinary);
        assert_eq!(flows.sends(at(1_000), FLOW, MUCH), Kind::Ordinary);
        assert_eq!(flows.sends(at(1_001), FLOW, MUCH), Kind::Unanswered);
    }

    #[test]
    fn others_do_not_make_a_flow_sparse() {
        let mut flows = sparse();
        let alike = FLOW ^ 1 << 31;
        assert_ne!(flows.sends(at(10), FLOW + 1, PACKET), Kind::Sparse);
        assert_eq!(flows.sends(at(20), FLOW, PACKET), Kind::Sparse);
        // It takes the place of the flow that is known.
        assert_ne!(flows.sends(at(30), alike, PACKET), Kind::Sparse);
        assert_ne!(flows.sends(at(40), FLOW, PACKET), Kind::Sparse);
        assert_eq!(flows.sends(at(50), FLOW, PACKET), Kind::Sparse);
    }

    proptest! {
        /// What could be overtaken: a flow never turns sparse without a pause, nor soon after it has sent much.
        #[test]
        fn a_flow_turns_sparse_only_after_a_pause(
            steps in prop::collection::vec(
                (prop_oneof![0_u64..5, 0_u64..1_500], 1_usize..70_000, any::<bool>()),
                1..200,
            ),
        ) {
            let mut flows = SparseFlows::new();
            let (mut now, mut sent, mut was_sparse) = (at(0), at(0), false);
            for (pause, bytes, is_sent) in steps {
                now += Duration::from_millis(pause);
                if !is_sent {
                    flows.receives(now, FLOW, bytes);
                    continue;
                }
                let is_sparse = flows.sends(now, FLOW, bytes) == Kind::Sparse;
                prop_assert!(was_sparse || !is_sparse || now.since(sent) >= PAUSE);
                prop_assert!(!is_sparse || bytes <= SPARSE_BYTES_MAX as usize);
                (sent, was_sparse) = (now, is_sparse);
            }
        }

        /// Two ends that see the same packets at almost the same time do not disagree for long.
        #[test]
        fn two_ends_agree_in_the_end(burst in 0_usize..200_000, came_first in any::<bool>()) {
            let (mut here, mut there) = (SparseFlows::new(), SparseFlows::new());
            // One of them has seen something that the other has not.
            match came_first {
                true => here.receives(at(0), FLOW, burst),
                false => drop(there.sends(at(0), FLOW, burst)),
            }
            let mut kinds = (Kind::Ordinary, Kind::Ordinary);
            for millisecond in (20..1_500).step_by(20) {
                let now = at(millisecond);
                kinds.0 = here.sends(now, FLOW, 200);
                there.receives(now, FLOW, 200);
                kinds.1 = there.sends(now, FLOW, 200);
                here.receives(now, FLOW, 200);
            }
            prop_assert_eq!(kinds, (Kind::Sparse, Kind::Sparse));
        }
    }
}
