//! Frames over a Unix stream socket: a length, a body, and file descriptors beside it (SCM_RIGHTS).
//!
//! Descriptors travel with a frame's first bytes, and a reader never reads past the end of a frame, so they
//! always arrive with the frame that they belong to.
#![expect(
    unsafe_code,
    reason = "descriptors that arrive in a control message are owned from then on"
)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

/// Descriptors that one frame may carry; the kernel's own limit is 253 (SCM_MAX_FD).
pub const FRAME_FDS_MAX: usize = 128;

/// The length field: a big-endian u32 that counts the body alone.
const LENGTH_BYTES: usize = 4;

/// One frame as it arrived.
#[derive(Debug)]
pub struct Frame {
    /// The body.
    pub body: Vec<u8>,
    /// The descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Two connected ends of a stream, both close-on-exec.
///
/// # Errors
/// The kernel's error, such as too many open files.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// A frame on its way out. On a non-blocking socket `send` is called again until it returns `Ok`.
#[derive(Debug)]
pub struct FrameWriter {
    bytes: Vec<u8>,
    sent_bytes: usize,
    fds: Vec<OwnedFd>,
}

impl FrameWriter {
    /// Makes a frame of `body` and `fds`.
    ///
    /// # Errors
    /// `InvalidInput` when there are more descriptors than [`FRAME_FDS_MAX`] or the body's length does not fit.
    pub fn new(body: &[u8], fds: Vec<OwnedFd>) -> io::Result<Self> {
        let length = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        if fds.len() > FRAME_FDS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = Vec::with_capacity(LENGTH_BYTES + body.len());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(body);
        Ok(FrameWriter {
            bytes,
            sent_bytes: 0,
            fds,
        })
    }

    /// Sends what is left. The descriptors are closed here once they are on their way.
    ///
    /// # Errors
    /// `WouldBlock` when a non-blocking socket or a send time-out wants the call repeated; other errors are final.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.sent_bytes < self.bytes.len() {
            let raw: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&raw)];
            let control = if raw.is_empty() { &[][..] } else { &rights[..] };
            let rest = [IoSlice::new(&self.bytes[self.sent_bytes..])];
            match sendmsg::<()>(
                socket.as_raw_fd(),
                &rest,
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(sent_bytes) => {
                    self.sent_bytes += sent_bytes;
                    self.fds.clear();
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Puts frames together from what arrives, in pieces of any size.
#[derive(Debug)]
pub struct FrameReader {
    body_bytes_max: usize,
    length: [u8; LENGTH_BYTES],
    length_read_bytes: usize,
    body: Vec<u8>,
    body_read_bytes: usize,
    fds: Vec<OwnedFd>,
}

impl FrameReader {
    /// A reader that refuses bodies above `body_bytes_max`.
    pub fn new(body_bytes_max: usize) -> Self {
        FrameReader {
            body_bytes_max,
            length: [0; LENGTH_BYTES],
            length_read_bytes: 0,
            body: Vec::new(),
            body_read_bytes: 0,
            fds: Vec::new(),
        }
    }

    /// Reads until a frame is complete; `None` when the other end has closed between frames.
    ///
    /// # Errors
    /// `WouldBlock` (nothing is lost, call again), `UnexpectedEof` within a frame, `InvalidData` for a frame that is
    /// too long or brings too many descriptors.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<Frame>> {
        while self.length_read_bytes < LENGTH_BYTES {
            let at = self.length_read_bytes;
            let read_bytes = receive_some(socket, &mut self.length[at..], &mut self.fds)?;
            if read_bytes == 0 && at == 0 {
                return Ok(None);
            }
            if read_bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.length_read_bytes += read_bytes;
            if self.length_read_bytes == LENGTH_BYTES {
                let body_bytes = u32::from_be_bytes(self.length) as usize;
                if body_bytes > self.body_bytes_max {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                self.body = vec![0; body_bytes];
                self.body_read_bytes = 0;
            }
        }
        while self.body_read_bytes < self.body.len() {
            let at = self.body_read_bytes;
            let read_bytes = receive_some(socket, &mut self.body[at..], &mut self.fds)?;
            if read_bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.body_read_bytes += read_bytes;
        }
        self.length_read_bytes = 0;
        Ok(Some(Frame {
            body: std::mem::take(&mut self.body),
            fds: std::mem::take(&mut self.fds),
        }))
    }
}

fn receive_some(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut control = nix::cmsg_space!([RawFd; FRAME_FDS_MAX]);
    loop {
        let mut slices = [IoSliceMut::new(into)];
        let received = match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(nix::errno::Errno::EINTR) => continue,
            received => received?,
        };
        let truncated = received.flags.contains(MsgFlags::MSG_CTRUNC);
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                for fd in raw {
                    // SAFETY: the kernel has just installed this descriptor for us, nobody else knows its number,
                    // and each number is taken here exactly once.
                    fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        if truncated || fds.len() > FRAME_FDS_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        return Ok(received.bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;

    const BODY_BYTES_MAX: usize = 4096;

    #[test]
    fn descriptors_arrive_with_their_own_frame() {
        let (left, right) = pair().expect("pair");
        for (body, path) in [(b"one", "/dev/null"), (b"two", "/dev/zero")] {
            let fd = File::open(path).expect("device").into();
            FrameWriter::new(body, vec![fd])
                .and_then(|mut frame| frame.send(left.as_fd()))
                .expect("sent");
        }
        let mut reader = FrameReader::new(BODY_BYTES_MAX);
        let mut read_bytes = Vec::new();
        for expected in [b"one", b"two"] {
            let mut frame = reader.receive(right.as_fd()).expect("frame").expect("open");
            assert_eq!(frame.body, expected);
            let mut file = File::from(frame.fds.pop().expect("a descriptor"));
            assert!(frame.fds.is_empty());
            read_bytes.push(file.read(&mut [0; 8]).expect("readable"));
        }
        assert_eq!(read_bytes, [0, 8], "/dev/null first, then /dev/zero");
    }

    #[test]
    fn the_end_between_frames_is_not_an_error_and_within_one_it_is() {
        let (left, right) = pair().expect("pair");
        drop(left);
        let mut reader = FrameReader::new(BODY_BYTES_MAX);
        assert!(reader.receive(right.as_fd()).expect("end").is_none());

        let (left, right) = pair().expect("pair");
        nix::unistd::write(&left, &[0, 0, 0, 9, b'x']).expect("written");
        drop(left);
        let error = FrameReader::new(BODY_BYTES_MAX)
            .receive(right.as_fd())
            .expect_err("cut short");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_longer_frame_than_allowed_is_refused() {
        let (left, right) = pair().expect("pair");
        FrameWriter::new(&[0; 9], vec![])
            .and_then(|mut frame| frame.send(left.as_fd()))
            .expect("sent");
        let error = FrameReader::new(8)
            .receive(right.as_fd())
            .expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn frames_survive_any_chunking(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..6),
            chunks in prop::collection::vec(1_usize..64, 1..40),
        ) {
            let mut stream = Vec::new();
            for body in &bodies {
                stream.extend_from_slice(&FrameWriter::new(body, vec![]).expect("frame").bytes);
            }
            let (left, right) = pair().expect("pair");
            nix::fcntl::fcntl(&right, nix::fcntl::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).expect("non-blocking");
            let mut reader = FrameReader::new(BODY_BYTES_MAX);
            let mut received = Vec::new();
            let mut rest = &stream[..];
            for chunk in chunks.iter().cycle() {
                let (now, later) = rest.split_at((*chunk).min(rest.len()));
                rest = later;
                nix::unistd::write(&left, now).expect("written");
                loop {
                    match reader.receive(right.as_fd()) {
                        Ok(frame) => received.push(frame.expect("open").body),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(received, bodies);
        }
    }
}
