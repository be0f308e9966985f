//! First-in first-out chains of packets in one memory: to move a packet from chain to chain costs nothing.

use crate::proto::timer::Instant;

const END: u32 = u32::MAX;

/// A packet and what came with it.
#[derive(Debug)]
pub(super) struct Waiting<P> {
    pub(super) packet: P,
    /// When it came.
    pub(super) at: Instant,
    /// The hash of its flow.
    pub(super) flow: u32,
    /// Whether it has told its sender of congestion.
    pub(super) signalled: bool,
}

/// The ends of one chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    first: u32,
    last: u32,
}

impl Chain {
    pub(super) const EMPTY: Self = Self {
        first: END,
        last: END,
    };

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.first == END
    }
}

#[derive(Debug)]
struct Link<P> {
    waiting: Option<Waiting<P>>,
    next: u32,
}

/// The memory of all chains; it grows to the most packets that ever waited at once.
#[derive(Debug)]
pub(super) struct Links<P> {
    links: Vec<Link<P>>,
    free: u32,
}

impl<P> Links<P> {
    pub(super) const fn new() -> Self {
        Self {
            links: Vec::new(),
            free: END,
        }
    }

    #[inline]
    fn take(&mut self, waiting: Waiting<P>) -> u32 {
        if let Some(link) = self.links.get_mut(self.free as usize) {
            let index = self.free;
            self.free = link.next;
            *link = Link {
                waiting: Some(waiting),
                next: END,
            };
            return index;
        }
        self.links.push(Link {
            waiting: Some(waiting),
            next: END,
        });
        (self.links.len() - 1) as u32
    }

    #[inline]
    pub(super) fn push_last(&mut self, chain: &mut Chain, waiting: Waiting<P>) {
        let index = self.take(waiting);
        match self.links.get_mut(chain.last as usize) {
            Some(last) => last.next = index,
            None => chain.first = index,
        }
        chain.last = index;
    }

    pub(super) fn push_first(&mut self, chain: &mut Chain, waiting: Waiting<P>) {
        let index = self.take(waiting);
        self.links[index as usize].next = chain.first;
        chain.first = index;
        if chain.last == END {
            chain.last = index;
        }
    }

    #[inline]
    pub(super) fn pop_first(&mut self, chain: &mut Chain) -> Option<Waiting<P>> {
        let index = chain.first;
        let link = self.links.get_mut(index as usize)?;
        let waiting = link.waiting.take();
        chain.first = link.next;
        if chain.first == END {
            chain.last = END;
        }
        link.next = self.free;
        self.free = index;
        waiting
    }

    #[inline]
    pub(super) fn first(&self, chain: &Chain) -> Option<&Waiting<P>> {
        self.links.get(chain.first as usize)?.waiting.as_ref()
    }

    /// Every packet of every chain, in no order.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Waiting<P>> {
        self.links
            .iter_mut()
            .filter_map(|link| link.waiting.as_mut())
    }

    /// Every packet of every chain, in no order; the chains are void.
    pub(super) fn into_packets(self) -> impl Iterator<Item = P> {
        self.links
            .into_iter()
            .filter_map(|link| link.waiting.map(|waiting| waiting.packet))
    }

    /// Whether there is any memory.
    pub(super) fn has_memory(&self) -> bool {
        self.links.capacity() != 0
    }
}
