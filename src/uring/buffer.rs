//! Registered packet memory: one mapping cut into size classes.
//!
//! Who may touch a byte is in the types. A [`Buffer`] is exclusive. Handing it to the ring turns it into an
//! [`InFlight`] that exposes nothing until its own completion lands it again. The filled front of a buffer can be
//! frozen into [`Piece`]s, which the kernel may read while the rest of the buffer is still being written.
//! A buffer's slot is free again when the buffer and all its pieces were released.
#![expect(
    unsafe_code,
    reason = "the kernel writes into this memory; slices are made from one raw mapping"
)]

use super::ring::Completion;
use super::token::Token;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

/// Room before a packet for a capsule header, so that header and packet are sealed in one pass.
pub const HEADROOM_BYTES: usize = 16;
/// One packet with its headers, or the plaintext of a few records: see the assertion in `worker::inbound`.
pub const PACKET_SLOT_BYTES: usize = 92 * 1024;
/// A packet of a few segments that has to wait: what a slow path's acknowledgements release at a time.
pub const MEDIUM_SLOT_BYTES: usize = 12 * 1024;
/// A small packet that has to wait.
pub const SMALL_SLOT_BYTES: usize = 2048;
/// The largest chunk of ciphertext that is read or written at once.
pub const CHUNK_BYTES_MAX: usize = 384 * 1024;
/// The smallest; several whole records fit.
pub const CHUNK_BYTES_MIN: usize = 128 * 1024;
/// What a worker's memory is unless configured.
pub const BUDGET_BYTES_DEFAULT: usize = 24 << 20;
/// Below this a worker cannot work.
pub const BUDGET_BYTES_MIN: usize = 2 << 20;

const PAGE_BYTES: usize = 4096;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// What a buffer is for; each class has one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Ciphertext of a connection, either direction.
    Chunk,
    /// A packet of up to 64 KiB, or plaintext.
    Packet,
    /// A packet of up to [`MEDIUM_SLOT_BYTES`].
    Medium,
    /// A packet of up to [`SMALL_SLOT_BYTES`].
    Small,
}

impl Class {
    const ALL: [Self; 4] = [Self::Chunk, Self::Packet, Self::Medium, Self::Small];
}

/// An anonymous mapping; it may be registered with a ring.
struct Region {
    base: NonNull<u8>,
    bytes: usize,
}

impl Region {
    fn map(bytes: usize) -> io::Result<Self> {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base: NonNull<u8> = NonNull::new(base.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { base, bytes })
    }
}

/// Addresses of a pool whose pages need not be there yet.
#[derive(Debug)]
pub struct Extent {
    start: usize,
    bytes: usize,
}

impl Extent {
    /// Asks for huge pages where there are none yet.
    pub fn prefer_huge_pages(&self) {
        if self.bytes >= HUGE_PAGE_BYTES {
            // Only advice: a refusal is harmless.
            let _ = self.advise(0, self.bytes, libc::MADV_HUGEPAGE);
        }
    }

    /// Has the kernel find all pages, huge ones where it can, while others use the memory. In steps, since whoever wants to map
    /// anything waits meanwhile (`mmap_lock`).
    ///
    /// # Errors
    /// There is no memory, or Linux is older than 5.14 (MADV_POPULATE_WRITE).
    pub fn populate(&self) -> io::Result<()> {
        self.prefer_huge_pages();
        for offset in (0..self.bytes).step_by(HUGE_PAGE_BYTES) {
            let bytes = HUGE_PAGE_BYTES.min(self.bytes - offset);
            // Of small pages that are in use already one huge one is made (Linux 6.1), if there are any and nothing holds them.
            let _ = self.advise(offset, bytes, libc::MADV_COLLAPSE);
            self.advise(offset, bytes, libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }

    fn advise(&self, offset: usize, bytes: usize, advice: libc::c_int) -> io::Result<()> {
        let start = (self.start + offset) as *mut libc::c_void;
        // SAFETY: neither advice changes what any memory holds, whosever it is.
        match unsafe { libc::madvise(start, bytes, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Exclusive use of one slot of the pool.
///
/// `frozen <= filled <= capacity`: bytes before `frozen` may be read by the kernel and never change, bytes up to
/// `filled` hold something, the rest is free.
#[derive(Debug)]
pub struct Buffer {
    base: NonNull<u8>,
    capacity: usize,
    slot: u32,
    frozen: usize,
    filled: usize,
}

impl Buffer {
    /// Bytes that the slot holds at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// End of what was filled.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Start of what is filled but not frozen.
    pub fn frozen(&self) -> usize {
        self.frozen
    }

    /// Bytes left behind the filled part.
    pub fn room(&self) -> usize {
        self.capacity - self.filled
    }

    /// The filled, not frozen part.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: frozen <= filled <= capacity, the mapping is initialised (zero pages) and lives as long as the
        // process (Pool never unmaps while buffers are out); this handle is the only one for these bytes.
        unsafe {
            std::slice::from_raw_parts(
                self.base.as_ptr().add(self.frozen),
                self.filled - self.frozen,
            )
        }
    }

    /// The filled, not frozen part, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; &mut self makes it exclusive, and the kernel only reads below `frozen`.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.as_ptr().add(self.frozen),
                self.filled - self.frozen,
            )
        }
    }

    /// The free part behind the filled one.
    pub fn tail_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes_mut`, for filled..capacity.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.as_ptr().add(self.filled),
                self.capacity - self.filled,
            )
        }
    }

    /// Counts `bytes` of the tail as filled.
    pub fn fill(&mut self, bytes: usize) {
        assert!(
            bytes <= self.room(),
            "filled beyond the end of a {} byte slot",
            self.capacity
        );
        self.filled += bytes;
    }

    /// Copies `source` behind the filled part.
    pub fn append(&mut self, source: &[u8]) {
        self.tail_mut()[..source.len()].copy_from_slice(source);
        self.fill(source.len());
    }

    /// Forgets the contents. Only without frozen bytes, or the kernel could read what is written next.
    pub fn clear(&mut self) {
        assert_eq!(self.frozen, 0, "a buffer with frozen bytes is never reused");
        self.filled = 0;
    }

    /// Sets the filled part to the first `bytes` bytes, whatever they hold.
    pub fn set_filled(&mut self, bytes: usize) {
        assert!(self.frozen <= bytes && bytes <= self.capacity);
        self.filled = bytes;
    }

    /// Moves the filled part from `start` on to the front. Only without frozen bytes.
    pub fn discard_front(&mut self, start: usize) {
        assert_eq!(self.frozen, 0, "frozen bytes do not move");
        let filled = self.filled;
        self.bytes_mut().copy_within(start..filled, 0);
        self.filled -= start;
    }

    fn end(&self, range: &Range<usize>) -> bool {
        range.start <= range.end && range.end <= self.capacity
    }

    /// Address and length of `range`, for the ring alone.
    pub(super) fn raw(&self, range: &Range<usize>) -> (*mut u8, u32) {
        assert!(
            self.end(range) && range.start >= self.frozen,
            "range outside the slot"
        );
        // SAFETY: range.start <= capacity was just asserted.
        let start = unsafe { self.base.as_ptr().add(range.start) };
        (start, (range.end - range.start) as u32)
    }
}

/// A buffer that the kernel is using. It exposes nothing until its completion is there.
#[derive(Debug)]
pub struct InFlight {
    buffer: Buffer,
    token: Token,
}

impl InFlight {
    pub(super) fn new(buffer: Buffer, token: Token) -> Self {
        Self { buffer, token }
    }

    /// The buffer again, now that its operation is over.
    pub fn land(self, completion: &Completion) -> Buffer {
        assert_eq!(
            self.token, completion.token,
            "a buffer lands with its own completion only"
        );
        self.buffer
    }
}

/// A frozen range of a buffer: unchanging bytes that the kernel may read.
#[derive(Debug)]
pub struct Piece {
    base: NonNull<u8>,
    bytes: u32,
    slot: u32,
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: frozen bytes never change while a piece of them exists, and the slot is not handed out again
        // before the piece was released.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes as usize) }
    }

    pub(super) fn raw(&self) -> (*const u8, u32) {
        (self.base.as_ptr(), self.bytes)
    }
}

/// One size class: where it lies and which of its slots are free.
struct ClassPool {
    first_slot: u32,
    offset: usize,
    slot_bytes: usize,
    slots: usize,
    free: Vec<u32>,
}

/// A worker's packet memory.
pub struct Pool {
    region: Region,
    classes: [ClassPool; 4],
    /// Per slot: the buffer handle (1) plus its pieces.
    holders: Vec<u32>,
}

impl Pool {
    /// Maps `budget_bytes` and cuts them up. Of the minimum, three eighths each are for chunks and packets and the rest for
    /// small ones; of what is beyond it, a quarter each for chunks and medium packets, three eighths for packets, and the rest
    /// for small ones. A chunk has a thirty-second of the whole, within its bounds.
    ///
    /// # Errors
    /// What mmap says.
    pub fn new(budget_bytes: usize) -> io::Result<Self> {
        let budget_bytes = budget_bytes.max(BUDGET_BYTES_MIN);
        let chunk_bytes = (budget_bytes / 32)
            .clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
            .next_multiple_of(PAGE_BYTES);
        let region = Region::map(budget_bytes)?;
        let (mut offset, mut first_slot) = (0, 0);
        let beyond = budget_bytes - BUDGET_BYTES_MIN;
        let classes = [
            (chunk_bytes, BUDGET_BYTES_MIN * 3 / 8 + beyond / 4),
            (PACKET_SLOT_BYTES, budget_bytes * 3 / 8),
            (MEDIUM_SLOT_BYTES, beyond / 4),
            (SMALL_SLOT_BYTES, BUDGET_BYTES_MIN / 4 + beyond / 8),
        ]
        .map(|(slot_bytes, bytes)| {
            let slots = bytes / slot_bytes;
            let class = ClassPool {
                first_slot,
                offset,
                slot_bytes,
                slots,
                // Last in, first out: the slot used last is the one still in the cache.
                free: (first_slot..first_slot + slots as u32).rev().collect(),
            };
            offset += slots * slot_bytes;
            first_slot += slots as u32;
            class
        });
        assert!(offset <= region.bytes);
        Ok(Self {
            region,
            classes,
            holders: vec![0; first_slot as usize],
        })
    }

    /// Address and length of the whole, to be registered.
    pub(super) fn raw(&self) -> (*mut u8, usize) {
        (self.region.base.as_ptr(), self.region.bytes)
    }

    /// The whole.
    pub fn extent(&self) -> Extent {
        Extent {
            start: self.region.base.as_ptr() as usize,
            bytes: self.region.bytes,
        }
    }

    /// Whether [`Extent::populate`] works here.
    pub fn can_populate(&self) -> bool {
        let first = Extent {
            bytes: PAGE_BYTES,
            ..self.extent()
        };
        first.populate().is_ok()
    }

    /// Bytes of the whole.
    pub fn bytes(&self) -> usize {
        self.region.bytes
    }

    /// Free slots of a class.
    pub fn free(&self, class: Class) -> usize {
        self.classes[class as usize].free.len()
    }

    /// All slots of a class.
    pub fn slots(&self, class: Class) -> usize {
        self.classes[class as usize].slots
    }

    /// Bytes of one slot of a class.
    pub fn slot_bytes(&self, class: Class) -> usize {
        self.classes[class as usize].slot_bytes
    }

    /// An empty buffer, or `None` when the class is used up.
    pub fn take(&mut self, class: Class) -> Option<Buffer> {
        let class = &mut self.classes[class as usize];
        let slot = class.free.pop()?;
        self.holders[slot as usize] = 1;
        let offset = class.offset + (slot - class.first_slot) as usize * class.slot_bytes;
        Some(Buffer {
            // SAFETY: offset + slot_bytes <= region.bytes, asserted when the classes were cut.
            base: unsafe { self.region.base.add(offset) },
            capacity: class.slot_bytes,
            slot,
            frozen: 0,
            filled: 0,
        })
    }

    /// Freezes the first `bytes` of the buffer's not yet frozen part and gives out `piece` of them, a range counted
    /// from the start of that part.
    pub fn freeze(&mut self, buffer: &mut Buffer, bytes: usize, piece: Range<usize>) -> Piece {
        assert!(piece.start <= piece.end && piece.end <= bytes);
        assert!(buffer.frozen + bytes <= buffer.filled);
        self.holders[buffer.slot as usize] += 1;
        // SAFETY: frozen + piece.start <= filled <= capacity.
        let base = unsafe { buffer.base.add(buffer.frozen + piece.start) };
        buffer.frozen += bytes;
        Piece {
            base,
            bytes: (piece.end - piece.start) as u32,
            slot: buffer.slot,
        }
    }

    /// Passes over the first `bytes` of the buffer's not yet frozen part without giving them to anyone.
    pub fn skip(&self, buffer: &mut Buffer, bytes: usize) {
        assert!(buffer.frozen + bytes <= buffer.filled);
        buffer.frozen += bytes;
    }

    /// Gives a buffer back.
    pub fn release(&mut self, buffer: Buffer) {
        self.let_go(buffer.slot);
    }

    /// Gives a piece back.
    pub fn release_piece(&mut self, piece: Piece) {
        self.let_go(piece.slot);
    }

    fn let_go(&mut self, slot: u32) {
        let holders = &mut self.holders[slot as usize];
        assert!(*holders > 0, "slot {slot} was released twice");
        *holders -= 1;
        if *holders == 0 {
            let class = Class::ALL
                .into_iter()
                .rev()
                .find(|class| slot >= self.classes[*class as usize].first_slot)
                .unwrap_or(Class::Chunk);
            self.classes[class as usize].free.push(slot);
        }
    }

    /// Unmaps the memory, unless slots are still out: then it stays mapped, as the kernel may be using it.
    pub fn unmap(self) {
        if self.holders.iter().all(|holders| *holders == 0) {
            // SAFETY: no buffer, piece or in-flight operation refers to the mapping any more, and self is consumed.
            unsafe { libc::munmap(self.region.base.as_ptr().cast(), self.region.bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_slot_is_free_again_after_its_last_piece() {
        let mut pool = Pool::new(BUDGET_BYTES_MIN).unwrap();
        let free = pool.free(Class::Packet);
        let mut buffer = pool.take(Class::Packet).unwrap();
        buffer.append(b"headerpacket");
        let piece = pool.freeze(&mut buffer, 12, 6..12);
        buffer.append(b"next");
        assert_eq!(piece.bytes(), b"packet");
        assert_eq!(buffer.bytes(), b"next");
        pool.release(buffer);
        assert_eq!(pool.free(Class::Packet), free - 1);
        pool.release_piece(piece);
        assert_eq!(pool.free(Class::Packet), free);
        pool.unmap();
    }

    /// How many of its pages are there (`mincore`).
    fn resident_pages(extent: &Extent) -> usize {
        let mut pages = vec![0_u8; extent.bytes.div_ceil(PAGE_BYTES)];
        let start = extent.start as *mut libc::c_void;
        // SAFETY: the vector has a byte for each page, and the kernel only tells.
        let result = unsafe { libc::mincore(start, extent.bytes, pages.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn populating_brings_all_pages_and_changes_none() {
        let bytes = 2 * BUDGET_BYTES_MIN + PAGE_BYTES;
        let mut pool = Pool::new(bytes).unwrap();
        let extent = pool.extent();
        let all = bytes / PAGE_BYTES;
        assert!(resident_pages(&extent) < all);
        let mut buffer = pool.take(Class::Packet).unwrap();
        buffer.append(b"packet");
        extent.populate().unwrap();
        assert_eq!(resident_pages(&extent), all);
        assert_eq!(buffer.bytes(), b"packet");
        pool.release(buffer);
        pool.unmap();
    }

    #[test]
    #[should_panic(expected = "beyond the end")]
    fn filling_too_much_is_caught() {
        let mut pool = Pool::new(BUDGET_BYTES_MIN).unwrap();
        let mut buffer = pool.take(Class::Small).unwrap();
        buffer.fill(SMALL_SLOT_BYTES + 1);
    }

    proptest! {
        /// Whatever is taken and released in any order: no two live buffers overlap, and all come back.
        #[test]
        fn buffers_never_overlap(budget_mib in 2usize..12, steps in prop::collection::vec((0usize..4, any::<bool>(), 0usize..64), 1..200)) {
            let mut pool = Pool::new(budget_mib << 20).unwrap();
            let before: Vec<usize> = Class::ALL.iter().map(|class| pool.free(*class)).collect();
            prop_assert_eq!(before[Class::Medium as usize] == 0, budget_mib << 20 == BUDGET_BYTES_MIN);
            let has_enough = |(class, free): (&Class, &usize)| *free >= 4 || *class == Class::Medium && *free == 0;
            prop_assert!(Class::ALL.iter().zip(&before).all(has_enough));
            let mut out: Vec<Buffer> = Vec::new();
            for (class, take, victim) in steps {
                if take {
                    if let Some(buffer) = pool.take(Class::ALL[class]) {
                        let start = buffer.base.as_ptr() as usize;
                        for other in &out {
                            let other_start = other.base.as_ptr() as usize;
                            prop_assert!(start + buffer.capacity <= other_start || other_start + other.capacity <= start);
                        }
                        out.push(buffer);
                    }
                } else if !out.is_empty() {
                    let buffer = out.swap_remove(victim % out.len());
                    pool.release(buffer);
                }
            }
            for buffer in out { pool.release(buffer); }
            let after: Vec<usize> = Class::ALL.iter().map(|class| pool.free(*class)).collect();
            prop_assert_eq!(before, after);
            pool.unmap();
        }
    }
}
