//! io_uring: a small ring, its feature probe, registered buffers; unsafe is fenced here.

pub mod buffer;
pub mod probe;
pub mod ring;
pub mod survey;
pub mod token;
