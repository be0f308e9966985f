//! A worker's ring: typed operations in, typed completions out.
//!
//! Files are registered (a [`FileSlot`] names one) and packet memory is registered when RLIMIT_MEMLOCK allows it;
//! else the same operations run on plain addresses. A full submission queue is submitted on the way, so no
//! operation is ever lost.
#![expect(
    unsafe_code,
    reason = "submission entries carry raw addresses whose validity the kernel takes on trust"
)]

use super::buffer::{Buffer, InFlight, Piece, Pool};
use super::probe::{self, RingError, SetUp};
use super::token::{Operation, Token};
use crate::config::IoMode;
use io_uring::{IoUring, opcode, squeue, types};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Index of a registered file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub u32);

/// One finished operation.
#[derive(Debug)]
pub struct Completion {
    /// What was submitted.
    pub token: Token,
    /// Bytes, or a negative errno.
    result: i32,
}

impl Completion {
    /// Bytes done, or the error.
    pub fn result(&self) -> Result<usize, nix::errno::Errno> {
        if self.result < 0 {
            Err(nix::errno::Errno::from_raw(-self.result))
        } else {
            Ok(self.result as usize)
        }
    }
}

/// What a read may do when nothing is there, and a write when nothing is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenDry {
    /// Wait in the kernel.
    Wait,
    /// The same, and what is submitted next begins when this has ended, however that is (IOSQE_IO_HARDLINK).
    WaitInTurn,
    /// Fail with EAGAIN at once (RWF_NOWAIT).
    Fail,
}

impl WhenDry {
    fn rw_flags(self) -> i32 {
        match self {
            Self::Wait | Self::WaitInTurn => 0,
            Self::Fail => libc::RWF_NOWAIT,
        }
    }

    fn entry_flags(self) -> squeue::Flags {
        match self {
            Self::Wait | Self::Fail => squeue::Flags::empty(),
            Self::WaitInTurn => squeue::Flags::IO_HARDLINK,
        }
    }
}

/// A ring that nobody uses yet.
///
/// A ring that is made with CAP_IPC_LOCK never counts against RLIMIT_MEMLOCK, nor does the memory that is registered
/// with it, even after the capability is gone (`ctx->user` in the kernel's `io_uring_create`). So the daemon makes its
/// rings first, and then gives its privileges up.
pub struct PreparedRing {
    ring: IoUring,
    set_up: SetUp,
    io: IoMode,
}

impl PreparedRing {
    /// Makes a ring. `io` says what it may use then; it takes no more than `lockable_bytes`, unless it could
    /// not be smaller.
    ///
    /// # Errors
    /// A kernel or container that has no io_uring or denies it.
    pub fn new(io: IoMode, lockable_bytes: usize) -> Result<Self, RingError> {
        let (ring, set_up) = probe::build(io, lockable_bytes)?;
        Ok(Self { ring, set_up, io })
    }
}

/// The ring and what is registered with it.
pub struct Ring {
    ring: IoUring,
    set_up: SetUp,
    io: IoMode,
    files: u32,
    buffers_registered: bool,
    /// Storage of the tick's time; the kernel reads it at submission.
    tick: Box<types::Timespec>,
    /// The same of a pause, which never changes.
    pause: Box<types::Timespec>,
    /// Where reads of the bell land; never looked at.
    strokes: Box<[u8; STROKES_MAX]>,
    /// Completions that were there before anyone asked, because the submission queue was full.
    early: Vec<Completion>,
}

/// What is written to a bell to wake its owner.
static STROKE: u8 = 1;
/// Strokes that are silenced at once; if there are more, the bell goes on ringing.
const STROKES_MAX: usize = 64;

/// How long [`Ring::pause`] takes.
pub const PAUSE: Duration = Duration::from_millis(2);

impl Ring {
    /// Enables the ring for the calling thread, with room for `files` registered files.
    ///
    /// # Errors
    /// The kernel lacks an operation of 5.10's, or refuses the files.
    pub fn start(prepared: PreparedRing, files: u32) -> Result<Self, RingError> {
        let PreparedRing { ring, set_up, io } = prepared;
        if set_up == SetUp::Deferred {
            ring.submitter()
                .register_enable_rings()
                .map_err(RingError::SetUp)?;
        }
        probe::check_operations(&ring)?;
        ring.submitter()
            .register_files(&vec![-1; files as usize])
            .map_err(RingError::RegisterFiles)?;
        Ok(Self {
            ring,
            set_up,
            io,
            files,
            buffers_registered: false,
            tick: Box::new(types::Timespec::new()),
            pause: Box::new(types::Timespec::new().nsec(PAUSE.subsec_nanos())),
            strokes: Box::new([0; STROKES_MAX]),
            early: Vec::new(),
        })
    }

    /// How the ring was set up.
    pub fn set_up(&self) -> SetUp {
        self.set_up
    }

    /// Registers the pool's memory. `false`: RLIMIT_MEMLOCK does not allow it; the ring then uses plain addresses.
    ///
    /// # Errors
    /// Anything else that the kernel says.
    pub fn register_pool(&mut self, pool: &Pool) -> io::Result<bool> {
        let (base, bytes) = pool.raw();
        let vector = libc::iovec {
            iov_base: base.cast(),
            iov_len: bytes,
        };
        // SAFETY: the vector describes the pool's own mapping, which stays mapped while anything of it is in use
        // (`Pool::unmap`); registered pages are pinned by the kernel besides.
        match unsafe { self.ring.submitter().register_buffers(&[vector]) } {
            Ok(()) => {
                self.buffers_registered = true;
                Ok(true)
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EPERM)) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Puts a file into a slot of the table. The table holds its own reference.
    ///
    /// # Errors
    /// A slot out of range, or what the kernel says.
    pub fn register_file(&mut self, slot: FileSlot, file: BorrowedFd<'_>) -> io::Result<()> {
        self.update_file(slot, file.as_raw_fd())
    }

    /// Empties a slot of the table.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unregister_file(&mut self, slot: FileSlot) -> io::Result<()> {
        self.update_file(slot, -1)
    }

    fn update_file(&mut self, slot: FileSlot, fd: i32) -> io::Result<()> {
        if slot.0 >= self.files {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.ring
            .submitter()
            .register_files_update(slot.0, &[fd])
            .map(drop)
    }

    /// Whether reads and writes of the file take RWF_NOWAIT, and may use it. A TUN queue takes it since Linux 6.4; before,
    /// the kernel answers EOPNOTSUPP. Nothing else may be in flight.
    ///
    /// # Errors
    /// What io_uring_enter says.
    pub fn takes_nowait(&mut self, file: FileSlot) -> io::Result<bool> {
        if self.io == IoMode::Baseline {
            return Ok(false);
        }
        // Of no bytes, so that no packet is lost.
        let address = self.strokes.as_mut_ptr();
        let read = opcode::Read::new(types::Fixed(file.0), address, 0)
            .rw_flags(WhenDry::Fail.rw_flags())
            .build();
        self.push(read, Token::single(Operation::TunRead));
        let mut completions = Vec::new();
        while completions.is_empty() {
            self.submit_and_reap(&mut completions)?;
        }
        let refused = Err(nix::errno::Errno::EOPNOTSUPP);
        Ok(completions
            .iter()
            .all(|completion| completion.result() != refused))
    }

    /// Arms one poll for input.
    pub fn poll_input(&mut self, file: FileSlot, token: Token) {
        let entry = opcode::PollAdd::new(types::Fixed(file.0), libc::POLLIN as u32).build();
        self.push(entry, token);
    }

    /// Arms one poll for output.
    pub fn poll_output(&mut self, file: FileSlot, token: Token) {
        let entry = opcode::PollAdd::new(types::Fixed(file.0), libc::POLLOUT as u32).build();
        self.push(entry, token);
    }

    /// Reads into `range` of the buffer, which must lie behind its frozen part.
    pub fn read(
        &mut self,
        file: FileSlot,
        buffer: Buffer,
        range: Range<usize>,
        when_dry: WhenDry,
        token: Token,
    ) -> InFlight {
        let (address, bytes) = buffer.raw(&range);
        let flags = when_dry.rw_flags();
        let file = types::Fixed(file.0);
        let entry = if self.buffers_registered {
            opcode::ReadFixed::new(file, address, bytes, 0)
                .rw_flags(flags)
                .build()
        } else {
            opcode::Read::new(file, address, bytes)
                .rw_flags(flags)
                .build()
        };
        self.push(entry.flags(when_dry.entry_flags()), token);
        InFlight::new(buffer, token)
    }

    /// Writes `range` of the buffer.
    pub fn write(
        &mut self,
        file: FileSlot,
        buffer: Buffer,
        range: Range<usize>,
        token: Token,
    ) -> InFlight {
        let (address, bytes) = buffer.raw(&range);
        self.push_write(file, address, bytes, WhenDry::Wait, token);
        InFlight::new(buffer, token)
    }

    /// Writes a piece. The caller keeps the piece until the completion is there (a piece's bytes stay frozen as long
    /// as it was not given back to the pool).
    pub fn write_piece(&mut self, file: FileSlot, piece: &Piece, when_full: WhenDry, token: Token) {
        let (address, bytes) = piece.raw();
        self.push_write(file, address, bytes, when_full, token);
    }

    fn push_write(
        &mut self,
        file: FileSlot,
        address: *const u8,
        bytes: u32,
        when_full: WhenDry,
        token: Token,
    ) {
        let flags = when_full.rw_flags();
        let file = types::Fixed(file.0);
        let entry = if self.buffers_registered {
            opcode::WriteFixed::new(file, address, bytes, 0)
                .rw_flags(flags)
                .build()
        } else {
            opcode::Write::new(file, address, bytes)
                .rw_flags(flags)
                .build()
        };
        self.push(entry, token);
    }

    /// Cancels the operation that was submitted with `target`.
    pub fn cancel(&mut self, target: Token, token: Token) {
        self.push(
            opcode::AsyncCancel::new(target.to_user_data()).build(),
            token,
        );
    }

    /// Arms a one-shot timer.
    pub fn tick(&mut self, after: Duration, token: Token) {
        *self.tick = types::Timespec::new()
            .sec(after.as_secs())
            .nsec(after.subsec_nanos());
        self.push(opcode::Timeout::new(&*self.tick).build(), token);
    }

    /// Arms a one-shot timer of [`PAUSE`]. Any number of them may run.
    pub fn pause(&mut self, token: Token) {
        self.push(opcode::Timeout::new(&*self.pause).build(), token);
    }

    /// Silences a bell that has rung: the next ring is a new one.
    pub fn silence(&mut self, file: FileSlot, token: Token) {
        let address = self.strokes.as_mut_ptr();
        self.push(
            opcode::Read::new(types::Fixed(file.0), address, STROKES_MAX as u32).build(),
            token,
        );
    }

    /// Rings another worker's bell.
    pub fn wake(&mut self, file: FileSlot, token: Token) {
        self.push(
            opcode::Write::new(types::Fixed(file.0), &raw const STROKE, 1).build(),
            token,
        );
    }

    fn push(&mut self, entry: squeue::Entry, token: Token) {
        let entry = entry.user_data(token.to_user_data());
        // SAFETY: every caller above passes addresses that outlive the operation: the pool's memory behind
        // InFlight and Piece, this ring's own boxes, or a static.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // Full: let the kernel take what is there. Errors surface at the next wait. What has completed is taken in,
            // or the completion queue would overflow, and 5.10 takes nothing more then.
            let submitted = self.ring.submit();
            collect(&mut self.ring, &mut self.early);
            if submitted.is_err() {
                std::thread::yield_now();
            }
        }
    }

    /// Submits everything and waits until at least one operation has completed; appends all that have.
    ///
    /// # Errors
    /// What io_uring_enter says; interruptions are retried.
    pub fn submit_and_reap(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        let wanted = usize::from(self.early.is_empty());
        if let Err(error) = self.ring.submit_and_wait(wanted) {
            match error.raw_os_error() {
                // EBUSY and EAGAIN: completions have to be reaped before more is taken.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => return Err(error),
            }
        }
        completions.append(&mut self.early);
        collect(&mut self.ring, completions);
        Ok(())
    }
}

fn collect(ring: &mut IoUring, completions: &mut Vec<Completion>) {
    for entry in ring.completion() {
        if let Some(token) = Token::from_user_data(entry.user_data()) {
            completions.push(Completion {
                token,
                result: entry.result(),
            });
        }
    }
}

/// The bell of a worker: a pipe, both ends non-blocking.
///
/// Not an eventfd: on 5.10 io_uring hands every write to one to a thread of its own, as an eventfd has no `write_iter`
/// (`loop_rw_iter` in the kernel). And its owner polls it and leaves no read in the kernel.
pub struct Bell {
    /// What its owner polls and silences.
    pub heard: OwnedFd,
    /// What others ring it by.
    pub rope: OwnedFd,
}

impl Bell {
    /// A silent bell.
    ///
    /// # Errors
    /// What pipe2(2) says.
    pub fn new() -> io::Result<Self> {
        use nix::fcntl::OFlag;
        let (heard, rope) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { heard, rope })
    }

    /// Rings it from a thread that has no ring.
    ///
    /// # Errors
    /// What write(2) says.
    pub fn ring(&self) -> io::Result<()> {
        match nix::unistd::write(&self.rope, &[STROKE]) {
            // Full, so it rings already.
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::buffer::{BUDGET_BYTES_MIN, Class};
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn reap_one(ring: &mut Ring) -> Completion {
        let mut completions = Vec::new();
        while completions.is_empty() {
            ring.submit_and_reap(&mut completions).unwrap();
        }
        assert_eq!(completions.len(), 1);
        completions.remove(0)
    }

    fn fixture(registered: bool) -> (Ring, Pool, UnixStream) {
        let mut ring =
            Ring::start(PreparedRing::new(IoMode::Auto, usize::MAX).unwrap(), 4).unwrap();
        let pool = Pool::new(BUDGET_BYTES_MIN).unwrap();
        if registered {
            assert!(ring.register_pool(&pool).unwrap());
        }
        let (near, far) = UnixStream::pair().unwrap();
        ring.register_file(FileSlot(1), near.as_fd()).unwrap();
        (ring, pool, far)
    }

    #[rstest::rstest]
    fn reads_and_writes_move_the_bytes(#[values(true, false)] registered: bool) {
        let (mut ring, mut pool, mut far) = fixture(registered);
        let token = Token::new(Operation::ConnectionWrite, 7, 3);
        let mut buffer = pool.take(Class::Small).unwrap();
        buffer.append(b"..hello..");
        let in_flight = ring.write(FileSlot(1), buffer, 2..7, token);
        let completion = reap_one(&mut ring);
        assert_eq!(completion.result(), Ok(5));
        let mut buffer = in_flight.land(&completion);
        let mut text = [0; 5];
        far.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");

        buffer.clear();
        let token = Token::new(Operation::ConnectionRead, 7, 3);
        let in_flight = ring.read(FileSlot(1), buffer, 100..200, WhenDry::Wait, token);
        far.write_all(b"world").unwrap();
        let completion = reap_one(&mut ring);
        assert_eq!(completion.result(), Ok(5));
        let mut buffer = in_flight.land(&completion);
        buffer.set_filled(105);
        assert_eq!(&buffer.bytes()[100..], b"world");

        let piece = pool.freeze(&mut buffer, 105, 100..105);
        let token = Token::new(Operation::TunWrite, 0, 0);
        ring.write_piece(FileSlot(1), &piece, WhenDry::Wait, token);
        assert_eq!(reap_one(&mut ring).result(), Ok(5));
        far.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"world");
    }

    /// Short reads, as all of a TUN queue are, break other links.
    #[test]
    fn reads_in_turn_take_what_comes_one_after_the_other() {
        let (mut ring, mut pool, mut far) = fixture(true);
        let token = |index| Token::new(Operation::TunRead, index, 0);
        let mut reads = Vec::new();
        for (index, when_dry) in [WhenDry::WaitInTurn, WhenDry::WaitInTurn, WhenDry::Wait]
            .into_iter()
            .enumerate()
        {
            let buffer = pool.take(Class::Small).unwrap();
            reads.push(ring.read(FileSlot(1), buffer, 0..10, when_dry, token(index as u32)));
        }
        for (read, byte) in reads.into_iter().zip(b"abc") {
            far.write_all(&[*byte]).unwrap();
            let completion = reap_one(&mut ring);
            assert_eq!(completion.result(), Ok(1));
            let mut buffer = read.land(&completion);
            buffer.set_filled(1);
            assert_eq!(buffer.bytes(), [*byte]);
            pool.release(buffer);
        }
    }

    #[test]
    fn a_parked_read_can_be_cancelled_and_its_buffer_lands() {
        let (mut ring, mut pool, _far) = fixture(true);
        let buffer = pool.take(Class::Small).unwrap();
        let token = Token::new(Operation::ConnectionRead, 1, 1);
        let in_flight = ring.read(FileSlot(1), buffer, 0..10, WhenDry::Wait, token);
        ring.cancel(token, Token::new(Operation::Cancel, 1, 1));
        let mut completions = Vec::new();
        while completions.len() < 2 {
            ring.submit_and_reap(&mut completions).unwrap();
        }
        let read = completions
            .iter()
            .find(|completion| completion.token == token)
            .unwrap();
        assert!(matches!(
            read.result(),
            Err(nix::errno::Errno::ECANCELED | nix::errno::Errno::EINTR)
        ));
        pool.release(in_flight.land(read));
    }

    #[test]
    #[should_panic(expected = "its own completion only")]
    fn a_buffer_does_not_land_with_a_foreign_completion() {
        let (mut ring, mut pool, _far) = fixture(true);
        let buffer = pool.take(Class::Small).unwrap();
        let token = Token::new(Operation::ConnectionRead, 1, 1);
        let in_flight = ring.read(FileSlot(1), buffer, 0..10, WhenDry::Wait, token);
        ring.tick(Duration::from_millis(1), Token::single(Operation::Tick));
        let tick = reap_one(&mut ring);
        in_flight.land(&tick);
    }

    #[test]
    fn more_operations_than_submission_entries_all_complete() {
        let (mut ring, mut pool, mut far) = fixture(true);
        let mut buffer = pool.take(Class::Small).unwrap();
        buffer.append(b"x");
        let piece = pool.freeze(&mut buffer, 1, 0..1);
        let count = 2053; // Twice the submission entries and a few.
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; count];
            far.read_exact(&mut all).unwrap();
            all
        });
        for index in 0..count {
            ring.write_piece(
                FileSlot(1),
                &piece,
                WhenDry::Wait,
                Token::new(Operation::TunWrite, index as u32, 0),
            );
        }
        let mut completions = Vec::new();
        while completions.len() < count {
            ring.submit_and_reap(&mut completions).unwrap();
        }
        assert!(
            completions
                .iter()
                .all(|completion| completion.result() == Ok(1))
        );
        assert_eq!(reader.join().unwrap(), vec![b'x'; count]);
    }

    #[test]
    fn more_completions_than_entries_all_arrive_in_order() {
        let (mut ring, mut pool, _far) = fixture(true);
        let sink = std::fs::File::create("/dev/null").unwrap();
        ring.register_file(FileSlot(2), sink.as_fd()).unwrap();
        let mut buffer = pool.take(Class::Small).unwrap();
        buffer.append(b"x");
        let piece = pool.freeze(&mut buffer, 1, 0..1);
        let count = 20_000;
        for index in 0..count {
            let token = Token::new(Operation::TunWrite, index, 0);
            ring.write_piece(FileSlot(2), &piece, WhenDry::Wait, token);
        }
        assert!(!ring.ring.submission().cq_overflow());
        let mut completions = Vec::new();
        while completions.len() < count as usize {
            ring.submit_and_reap(&mut completions).unwrap();
        }
        let order = completions.iter().map(|completion| completion.token.slot);
        assert!(order.eq(0..count));
    }

    #[test]
    fn bells_ring() {
        let mut ring =
            Ring::start(PreparedRing::new(IoMode::Auto, usize::MAX).unwrap(), 4).unwrap();
        let bell = Bell::new().unwrap();
        ring.register_file(FileSlot(0), bell.heard.as_fd()).unwrap();
        ring.register_file(FileSlot(1), bell.rope.as_fd()).unwrap();
        let rung = Token::single(Operation::Wake);
        ring.poll_input(FileSlot(0), rung);
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert_eq!(reap_one(&mut ring).token, rung);
        ring.silence(FileSlot(0), Token::single(Operation::Silence));
        assert_eq!(reap_one(&mut ring).result(), Ok(2));
        ring.poll_input(FileSlot(0), rung);
        ring.wake(FileSlot(1), Token::single(Operation::WakePeer));
        let mut completions = Vec::new();
        while completions.len() < 2 {
            ring.submit_and_reap(&mut completions).unwrap();
        }
        assert!(
            completions
                .iter()
                .any(|completion| completion.token == rung)
        );
    }

    #[test]
    fn no_operation_on_a_bell_needs_a_kernel_thread() {
        let mut ring =
            Ring::start(PreparedRing::new(IoMode::Auto, usize::MAX).unwrap(), 4).unwrap();
        let bell = Bell::new().unwrap();
        ring.register_file(FileSlot(0), bell.heard.as_fd()).unwrap();
        ring.register_file(FileSlot(1), bell.rope.as_fd()).unwrap();
        for _ in 0..100 {
            ring.poll_input(FileSlot(0), Token::single(Operation::Wake));
            ring.wake(FileSlot(1), Token::single(Operation::WakePeer));
            let mut completions = Vec::new();
            while completions.len() < 2 {
                ring.submit_and_reap(&mut completions).unwrap();
            }
            ring.silence(FileSlot(0), Token::single(Operation::Silence));
            assert_eq!(reap_one(&mut ring).result(), Ok(1));
        }
        // io_uring names its threads after the one that made the request.
        let own = format!("iou-wrk-{}", nix::unistd::gettid());
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let name =
                std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default();
            assert_ne!(name.trim(), own);
        }
    }

    #[test]
    fn a_file_slot_out_of_range_is_an_error() {
        let mut ring =
            Ring::start(PreparedRing::new(IoMode::Auto, usize::MAX).unwrap(), 2).unwrap();
        let bell = Bell::new().unwrap();
        assert!(ring.register_file(FileSlot(2), bell.heard.as_fd()).is_err());
    }
}
