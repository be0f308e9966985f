//! `user_data` of every operation: what it was, whose it was, and which life of that slot it belongs to.

/// The operations that a worker's ring carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Readiness of the TUN queue.
    TunPoll = 1,
    /// One packet out of the TUN queue.
    TunRead,
    /// One packet into the TUN queue.
    TunWrite,
    /// Readiness of an idle connection.
    ConnectionPoll,
    /// Ciphertext from a connection.
    ConnectionRead,
    /// Ciphertext to a connection.
    ConnectionWrite,
    /// Room for ciphertext in a connection that had stalled.
    ConnectionWritable,
    /// A connection that has enough under way looks again.
    ConnectionPause,
    /// Cancels a connection's parked read or stuck write.
    Cancel,
    /// The worker's own bell has rung: commands or handed-over packets wait.
    Wake,
    /// The bell is silent again, and whatever rang it can be looked at.
    Silence,
    /// Waking another worker by its bell.
    WakePeer,
    /// The periodic timer.
    Tick,
    /// Time to go on with records that were put off.
    Resume,
}

impl Operation {
    const ALL: [Self; 14] = [
        Self::TunPoll,
        Self::TunRead,
        Self::TunWrite,
        Self::ConnectionPoll,
        Self::ConnectionRead,
        Self::ConnectionWrite,
        Self::ConnectionWritable,
        Self::ConnectionPause,
        Self::Cancel,
        Self::Wake,
        Self::Silence,
        Self::WakePeer,
        Self::Tick,
        Self::Resume,
    ];
}

/// Generations are compared modulo this, so that they fit beside slot and operation.
const GENERATION_MASK: u32 = 0x00ff_ffff;

/// A typed `user_data`: operation (8 bits), generation (24 bits), slot (32 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// What was submitted.
    pub operation: Operation,
    /// Index into the table that the operation's owner keeps.
    pub slot: u32,
    /// Which life of the slot, modulo 2^24.
    generation: u32,
}

impl Token {
    /// A token for `slot` in its `generation`.
    pub fn new(operation: Operation, slot: u32, generation: u32) -> Self {
        Self {
            operation,
            slot,
            generation: generation & GENERATION_MASK,
        }
    }

    /// A token of an operation that exists once per ring.
    pub fn single(operation: Operation) -> Self {
        Self::new(operation, 0, 0)
    }

    /// Whether the token was made for this `generation` of its slot.
    pub fn is_of(&self, generation: u32) -> bool {
        self.generation == generation & GENERATION_MASK
    }

    /// The wire form, as io_uring carries it.
    pub fn to_user_data(self) -> u64 {
        (self.operation as u64) << 56 | u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// The inverse of [`Token::to_user_data`]; `None` for bits that no token has.
    pub fn from_user_data(user_data: u64) -> Option<Self> {
        let operation = *Operation::ALL.get(((user_data >> 56) as usize).wrapping_sub(1))?;
        Some(Self {
            operation,
            slot: user_data as u32,
            generation: (user_data >> 32) as u32 & GENERATION_MASK,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn user_data_round_trips(index in 0..Operation::ALL.len(), slot: u32, generation: u32) {
            let token = Token::new(Operation::ALL[index], slot, generation);
            prop_assert_eq!(Token::from_user_data(token.to_user_data()), Some(token));
            prop_assert!(token.is_of(generation));
            prop_assert!(!token.is_of(generation.wrapping_add(1)));
        }
    }

    #[test]
    fn foreign_user_data_is_refused() {
        assert_eq!(Token::from_user_data(0), None);
        assert_eq!(Token::from_user_data(u64::MAX), None);
    }
}
