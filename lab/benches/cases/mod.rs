//! What the packet path does for every packet or record, in pieces that can be measured alone.
//!
//! Two programs measure them: `microbench` takes the time, `instructions` counts instructions. A case works through a
//! batch at a time, so that what is measured is longer than what measuring costs.

mod capsules;
mod flows;
mod packets;
mod queue;
mod records;
mod super_packets;

/// What is measured, again and again.
pub trait Work {
    /// Makes ready for one [`Work::run`]; not measured.
    fn prepare(&mut self) {}

    /// The work.
    fn run(&mut self);
}

/// What one [`Work::run`] goes through.
#[derive(Clone, Copy, Debug)]
pub enum Volume {
    /// Bytes of packets, headers included.
    Bytes(usize),
    /// Packets, whatever their size.
    Packets(usize),
}

/// One kind of work.
pub struct Case {
    /// `part/work` or `part/work/variant`.
    pub name: &'static str,
    /// What one run goes through.
    pub volume: Volume,
    /// Whether the processor or the C library decides on the way that is taken, and not the compiler alone.
    #[allow(dead_code, reason = "time is measured where it is spent")]
    pub dispatched: bool,
    /// Sets it up.
    pub make: Box<dyn Fn() -> Box<dyn Work>>,
}

impl Case {
    fn new<W: Work + 'static>(
        name: &'static str,
        volume: Volume,
        make: impl Fn() -> W + 'static,
    ) -> Self {
        Self {
            name,
            volume,
            dispatched: false,
            make: Box::new(move || Box::new(make())),
        }
    }

    fn dispatched(self) -> Self {
        Self {
            dispatched: true,
            ..self
        }
    }
}

/// All of them.
pub fn all() -> Vec<Case> {
    [
        records::cases(),
        capsules::cases(),
        super_packets::cases(),
        flows::cases(),
        queue::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
