//! The flows of a queue, and whose turn it is: deficit round robin with new flows first (RFC 8290 section 4).

use super::chain::Chain;
use super::codel::Codel;
use super::{CLASSES, SEGMENT_BYTES};

/// How many flows are told apart. Flows whose hashes agree in the low bits share a queue, its turns and its losses: of 32
/// flows at once, each is alone with a probability of 97 %.
pub const BUCKETS: usize = 1024;
/// Up to so many flows each keeps its state for good; more use again what idle ones leave.
const FLOWS_KEPT: usize = 32;
const NONE: u16 = u16::MAX;

const _: () = assert!(BUCKETS.is_power_of_two() && BUCKETS < NONE as usize);

/// In which list a flow is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// In none: it has nothing to send and owes nothing.
    Idle,
    New,
    Old,
}

/// The packets of one bucket and what they did.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) packets: Chain,
    /// Sums over `packets`.
    pub(super) bytes: usize,
    pub(super) slots: [usize; CLASSES],
    /// Bytes that it may send in this round; negative after a packet longer than that.
    pub(super) deficit: i64,
    pub(super) codel: Codel,
    bucket: u16,
    place: Place,
    previous: u16,
    next: u16,
}

#[derive(Debug)]
struct List {
    first: u16,
    last: u16,
}

impl List {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };
}

/// All flows; no memory before the first one.
///
/// A flow with packets is in a list. One without is in a list at most until its next turn.
#[derive(Debug)]
pub(super) struct Flows {
    flows: Vec<Flow>,
    /// Index of the bucket's flow. Empty, or one for each bucket.
    buckets: Vec<u16>,
    new: List,
    old: List,
    idle: usize,
    /// Where the search for an idle flow goes on.
    hand: usize,
}

impl Flows {
    pub(super) const fn new() -> Self {
        Self {
            flows: Vec::new(),
            buckets: Vec::new(),
            new: List::EMPTY,
            old: List::EMPTY,
            idle: 0,
            hand: 0,
        }
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: usize) -> &mut Flow {
        &mut self.flows[index]
    }

    /// The flow for a hash, made if need be, and in a list: among the new ones if it was idle.
    ///
    /// RFC 8290 has a flow that was emptied wait among the old ones for its turn. Where a round takes eight super-packets,
    /// the next packet of a telephone call comes before that. So it is among the new ones again as long as it has
    /// not used up what it may send in a round, which starves nobody.
    #[inline]
    pub(super) fn awake(&mut self, hash: u32) -> usize {
        let bucket = hash as usize % BUCKETS;
        let index = match self.buckets.get(bucket) {
            Some(&index) if index != NONE => index,
            _ => self.make(bucket),
        };
        let flow = &mut self.flows[usize::from(index)];
        if flow.place == Place::Idle {
            flow.place = Place::New;
            flow.deficit = SEGMENT_BYTES as i64;
            self.idle -= 1;
            append(&mut self.flows, &mut self.new, index);
        } else if flow.place == Place::Old && flow.packets.is_empty() && flow.deficit > 0 {
            flow.place = Place::New;
            unlink(&mut self.flows, &mut self.old, index);
            append(&mut self.flows, &mut self.new, index);
        }
        usize::from(index)
    }

    #[cold]
    fn make(&mut self, bucket: usize) -> u16 {
        if self.buckets.is_empty() {
            self.buckets = vec![NONE; BUCKETS];
        }
        let flow = Flow {
            packets: Chain::EMPTY,
            bytes: 0,
            slots: [0; CLASSES],
            deficit: 0,
            codel: Codel::default(),
            bucket: bucket as u16,
            place: Place::Idle,
            previous: NONE,
            next: NONE,
        };
        let index = if self.flows.len() < FLOWS_KEPT || self.idle == 0 {
            self.flows.push(flow);
            self.idle += 1;
            self.flows.len() - 1
        } else {
            while self.flows[self.hand].place != Place::Idle {
                self.hand = (self.hand + 1) % self.flows.len();
            }
            let index = self.hand;
            self.hand = (index + 1) % self.flows.len();
            self.buckets[usize::from(self.flows[index].bucket)] = NONE;
            self.flows[index] = flow;
            index
        };
        self.buckets[bucket] = index as u16;
        index as u16
    }

    /// The flow for a hash, if it has any packets.
    pub(super) fn find(&mut self, hash: u32) -> Option<&mut Flow> {
        let index = *self.buckets.get(hash as usize % BUCKETS)?;
        self.flows.get_mut(usize::from(index))
    }

    /// The flow whose turn it is. One flow has to have packets. Each turn is worth `quantum` bytes.
    #[inline]
    pub(super) fn turn(&mut self, quantum: i64) -> usize {
        loop {
            let from_new = self.new.first != NONE;
            let list = if from_new {
                &mut self.new
            } else {
                &mut self.old
            };
            let index = list.first;
            let flow = &self.flows[usize::from(index)];
            if flow.deficit > 0 && !flow.packets.is_empty() {
                return usize::from(index);
            }
            unlink(&mut self.flows, list, index);
            let flow = &mut self.flows[usize::from(index)];
            if flow.deficit <= 0 {
                flow.deficit += quantum;
            } else if !from_new || self.old.first == NONE {
                flow.place = Place::Idle;
                self.idle += 1;
                continue;
            }
            // An emptied new flow too has to wait for the old ones, lest it come back as a new one before them.
            flow.place = Place::Old;
            append(&mut self.flows, &mut self.old, index);
        }
    }

    /// The first of the new flows that may send and whose packets are `suitable`.
    pub(super) fn first_new(&self, suitable: impl Fn(&Chain) -> bool) -> Option<usize> {
        let mut index = self.new.first;
        while let Some(flow) = self.flows.get(usize::from(index)) {
            if flow.deficit > 0 && suitable(&flow.packets) {
                return Some(index.into());
            }
            index = flow.next;
        }
        None
    }

    /// Nobody has packets: all flows are idle, whatever they owe, as nobody is waiting for it.
    #[inline]
    pub(super) fn rest(&mut self) {
        if self.idle == self.flows.len() {
            return;
        }
        for flow in &mut self.flows {
            flow.place = Place::Idle;
            (flow.previous, flow.next) = (NONE, NONE);
        }
        self.idle = self.flows.len();
        (self.new, self.old) = (List::EMPTY, List::EMPTY);
    }

    /// The index of the flow of which `measure` is greatest.
    pub(super) fn fattest(&self, measure: impl Fn(&Flow) -> usize) -> Option<usize> {
        let all = self.flows.iter().enumerate();
        all.max_by_key(|(_, flow)| measure(flow))
            .map(|(index, _)| index)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }
}

#[inline]
fn append(flows: &mut [Flow], list: &mut List, index: u16) {
    match flows.get_mut(usize::from(list.last)) {
        Some(last) => last.next = index,
        None => list.first = index,
    }
    flows[usize::from(index)].previous = list.last;
    list.last = index;
}

#[inline]
fn unlink(flows: &mut [Flow], list: &mut List, index: u16) {
    let flow = &mut flows[usize::from(index)];
    let (previous, next) = (flow.previous, flow.next);
    (flow.previous, flow.next) = (NONE, NONE);
    match flows.get_mut(usize::from(previous)) {
        Some(flow) => flow.next = next,
        None => list.first = next,
    }
    match flows.get_mut(usize::from(next)) {
        Some(flow) => flow.previous = previous,
        None => list.last = previous,
    }
}
