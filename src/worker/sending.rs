//! The end of the way out: records are written to the socket, or wait for it.

use super::CloseCause;
use super::connection::{Connection, Farewell, Life, PARK_AFTER, Sending};
use super::event_loop::{Worker, is_hang_up};
use crate::sys::tcp_info;
use crate::uring::buffer::{Buffer, Class};
use crate::uring::ring::Completion;
use crate::uring::token::{Operation, Token};
use nix::errno::Errno;
use std::os::fd::AsFd;

impl Worker {
    /// Step 5: writes the chunk, unless one is still being written.
    pub(super) fn send(&mut self, connection: &mut Connection) {
        if connection.sending.is_some()
            || connection.awaits_room
            || matches!(connection.life, Life::Draining { .. })
        {
            return;
        }
        if !connection.recalled.is_empty() {
            self.send_recalled(connection);
            return;
        }
        if let Some(chunk) = connection.fill.take_if(|chunk| chunk.filled() > 0) {
            let total = chunk.filled();
            self.write_chunk(connection, chunk, 0, total);
        }
    }

    fn write_chunk(
        &mut self,
        connection: &mut Connection,
        chunk: Buffer,
        sent: usize,
        total: usize,
    ) {
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionWrite,
            reference.slot,
            reference.generation,
        );
        connection.in_flight += 1;
        let chunk = self.ring.write(connection.file, chunk, sent..total, token);
        connection.sending = Some(Sending {
            chunk,
            sent,
            total,
            since: self.now,
            recalled: false,
        });
    }

    /// While chunks are short, one that the socket takes nothing of is recalled, so that it keeps nobody waiting.
    pub(super) fn recall_if_stuck(&mut self, slot: usize) {
        if !self.is_short_of(Class::Chunk) {
            return;
        }
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        let Some(sending) = &mut connection.sending else {
            return;
        };
        if sending.recalled || now.since(sending.since) < PARK_AFTER {
            return;
        }
        sending.recalled = true;
        self.cancel(slot, Operation::ConnectionWrite);
    }

    /// The peer is heard again: sees that TCP has something new to send, for it may be waiting for that to find out what the
    /// outage has eaten. Has a write that waits tried once more, since the kernel wakes writers only when a third of the send
    /// buffer is free, and sends a PING if there is none.
    pub(super) fn send_something(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connection(slot) else {
            return;
        };
        if connection.sending.is_none() {
            let holds_any = tcp_info::sample(connection.socket.as_fd(), false)
                .is_ok_and(|sample| sample.held_bytes > 0);
            if holds_any && connection.is_open() {
                connection.add_ping(now);
            }
            return;
        }
        self.cancel(slot, Operation::ConnectionWrite);
    }

    /// The socket gave the chunk back from `sent` on: what is sealed is kept outside the pool until there is room.
    fn keep_recalled(&mut self, connection: &mut Connection, chunk: Buffer, sent: usize) {
        connection
            .recalled
            .extend_from_slice(&chunk.bytes()[sent..]);
        self.pool.release(chunk);
        if let Some(chunk) = connection.fill.take() {
            connection.recalled.extend_from_slice(chunk.bytes());
            self.pool.release(chunk);
        }
        let reference = connection.reference;
        let token = Token::new(
            Operation::ConnectionWritable,
            reference.slot,
            reference.generation,
        );
        self.ring.poll_output(connection.file, token);
        connection.in_flight += 1;
        connection.awaits_room = true;
    }

    pub(super) fn on_writable(&mut self, slot: usize) {
        if let Some(connection) = self.connection(slot) {
            connection.awaits_room = false;
            self.mark_dirty(slot);
        }
    }

    fn send_recalled(&mut self, connection: &mut Connection) {
        let Some(mut chunk) = self.take_send_chunk(connection) else {
            return;
        };
        let bytes = connection.recalled.len().min(chunk.capacity());
        chunk.append(&connection.recalled[..bytes]);
        connection.recalled = connection.recalled.split_off(bytes);
        self.write_chunk(connection, chunk, 0, bytes);
    }

    pub(super) fn on_sent(&mut self, slot: usize, completion: Completion) {
        let now = self.now;
        let Some(mut connection) = self.take_out(slot) else {
            return;
        };
        let Some(sending) = connection.sending.take() else {
            self.put_back(slot, connection);
            return;
        };
        let Sending {
            chunk,
            sent,
            total,
            recalled,
            ..
        } = sending;
        let chunk = chunk.land(&completion);
        let draining = matches!(connection.life, Life::Draining { .. });
        if let Ok(bytes) = completion.result() {
            let counters = &connection.stats.counters;
            counters.sent_stream_bytes.add(bytes as u64);
            self.peers.note_active(connection.peer);
            connection.path.on_sent(bytes);
        }
        let mut failed = None;
        match completion.result() {
            Ok(bytes) if sent + bytes < total && !draining => {
                connection.clock.on_sent(now);
                self.write_chunk(&mut connection, chunk, sent + bytes, total);
            }
            Err(Errno::ECANCELED) if !draining && recalled => {
                self.keep_recalled(&mut connection, chunk, sent);
            }
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ECANCELED) if !draining => {
                self.write_chunk(&mut connection, chunk, sent, total);
            }
            Ok(_) => {
                connection.clock.on_sent(now);
                self.pool.release(chunk);
            }
            Err(error) => {
                self.pool.release(chunk);
                failed = Some(error);
            }
        }
        self.put_back(slot, connection);
        match failed {
            Some(error) => self.fail(slot, error),
            None => self.mark_dirty(slot),
        }
    }

    /// The socket said no: the connection ends, whatever its state.
    pub(super) fn fail(&mut self, slot: usize, error: Errno) {
        let cause = if is_hang_up(error) {
            CloseCause::Reset
        } else {
            CloseCause::Failed(error.into())
        };
        self.close(slot, cause, Farewell::NONE);
        self.shut(slot);
    }
}
