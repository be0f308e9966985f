//! A link between two hosts that is as slow, far away and unreliable as asked.
//!
//! Many kernels have no netem, and none has one that does the same thing twice. A [`Wire`] is a TAP interface on
//! either host and a thread for each direction, which reads the frames of one end and writes them to the other. What
//! happens to a frame in between is decided by [`Lane`], which is pure: the same seed means the same losses,
//! duplicates and late comers for the same packets, at any speed.
//!
//! | file | what |
//! | --- | --- |
//! | `conditions.rs` | what can be asked for |
//! | `fate.rs` | chance, by a seed |
//! | `lane.rs` | one direction, in virtual time |
//! | `pair.rs` | two hosts and a wire, for trying it |
//! | `trial.rs` | `lab wire` |
//! | `paths.rs` | the wires of topologies |
//! | `carrier.rs` | the thread that moves frames as the lane says |
//!
//! Segmentation and checksums are done by the kernel before a TAP: frames on the wire are real ones. The rate counts
//! them with their Ethernet header of 14 bytes.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use tun::{Configuration, Device, Layer};

use crate::link::{self, End, LinkError};
use crate::netns::{Namespace, NamespaceError};

mod carrier;
mod conditions;
mod fate;
mod lane;
pub mod pair;
pub mod paths;
pub mod trial;

pub use carrier::Traffic;
pub use conditions::{
    Change, Conditions, DELAY_MAX, JITTER_INTERVAL, Loss, QUEUE_BYTES_MAX,
    RATE_BITS_PER_SECOND_MAX, Reordering, Timetable, Unsound,
};
pub(crate) use fate::Dice;
pub use lane::{Counts, Lane};

use carrier::Carrier;

/// The Ethernet address of the near end. It is fixed, as is the far one's, so that the two ends can know each other
/// without asking over a wire that loses the question.
pub const NEAR_ADDRESS: [u8; 6] = [0x02, 0, 0, 0x77, 0, 1];
/// The Ethernet address of the far end.
pub const FAR_ADDRESS: [u8; 6] = [0x02, 0, 0, 0x77, 0, 2];
/// Frames that wait in an interface until its thread has time. At 1 Gbit/s they are a tenth of a second, so that none
/// is lost but by what was asked for.
const INTERFACE_QUEUE_FRAMES: u32 = 10_000;

/// What a wire does, in both directions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Decides over all that chance decides over.
    pub seed: u64,
    /// From the near end to the far one.
    pub there: Conditions,
    /// From the far end to the near one.
    pub back: Conditions,
}

/// A direction of a wire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Heading {
    /// From the near end to the far one.
    There,
    /// From the far end to the near one.
    Back,
}

/// A running wire. Its interfaces are gone when it is dropped or its process ends.
#[derive(Debug)]
pub struct Wire {
    there: Carrier,
    back: Carrier,
}

/// Why there is no wire.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Conditions that make no sense.
    #[error("a wire cannot be like that")]
    Unsound(#[from] Unsound),
    /// A host could not be entered.
    #[error("a lab host could not be entered to make a wire")]
    Namespace(#[from] NamespaceError),
    /// No TAP interface.
    #[error("the TAP interface {interface} could not be made (a wire needs /dev/net/tun)")]
    Tap {
        /// Its name.
        interface: String,
        /// What went wrong.
        #[source]
        source: tun::Error,
    },
    /// An interface could not be set up.
    #[error("an end of a wire could not be set up")]
    Link(#[from] LinkError),
    /// No thread to carry frames.
    #[error("no thread for a wire")]
    Thread(#[source] io::Error),
}

impl Plan {
    /// The same in both directions.
    #[must_use]
    pub fn symmetric(seed: u64, conditions: Conditions) -> Plan {
        Plan {
            seed,
            there: conditions.clone(),
            back: conditions,
        }
    }
}

impl Wire {
    /// Makes an Ethernet interface on either host and joins them. Both are still down.
    ///
    /// # Errors
    /// When the plan makes no sense, or the kernel refuses.
    pub fn join(near: End<'_>, far: End<'_>, plan: &Plan) -> Result<Wire, WireError> {
        plan.there.validate()?;
        plan.back.validate()?;
        let near_tap = Arc::new(tap(near.host, near.interface)?);
        let far_tap = Arc::new(tap(far.host, far.interface)?);
        link::set_ethernet(
            near.host,
            near.interface,
            NEAR_ADDRESS,
            INTERFACE_QUEUE_FRAMES,
        )?;
        link::set_ethernet(far.host, far.interface, FAR_ADDRESS, INTERFACE_QUEUE_FRAMES)?;
        let begun = Instant::now();
        // The directions have nothing to do with each other.
        let (there, back) = (
            Lane::new(plan.there.clone(), plan.seed),
            Lane::new(plan.back.clone(), plan.seed.rotate_left(32) ^ 1),
        );
        Ok(Wire {
            there: Carrier::start(there, &near_tap, &far_tap, begun).map_err(WireError::Thread)?,
            back: Carrier::start(back, &far_tap, &near_tap, begun).map_err(WireError::Thread)?,
        })
    }

    /// Changes something in one direction, now.
    ///
    /// # Errors
    /// When the change asks for something out of range.
    pub fn change(&self, heading: Heading, change: Change) -> Result<(), Unsound> {
        change.validate()?;
        self.carrier(heading).change(change);
        Ok(())
    }

    /// Begins an outage in both directions, now.
    pub fn cut(&self) {
        self.there.change(Change::Cut);
        self.back.change(Change::Cut);
    }

    /// Ends an outage in both directions, now.
    pub fn mend(&self) {
        self.there.change(Change::Mend);
        self.back.change(Change::Mend);
    }

    /// What one direction has carried so far.
    #[must_use]
    pub fn traffic(&self, heading: Heading) -> Traffic {
        self.carrier(heading).traffic()
    }

    fn carrier(&self, heading: Heading) -> &Carrier {
        match heading {
            Heading::There => &self.there,
            Heading::Back => &self.back,
        }
    }
}

/// An Ethernet interface in `host`. It is there for as long as the value is.
fn tap(host: &Namespace, name: &str) -> Result<Device, WireError> {
    let made = host.run(|| {
        let mut configuration = Configuration::default();
        configuration.tun_name(name).layer(Layer::L2);
        // What is to be set is set by netlink, which works in a user namespace, too.
        configuration.platform_config(|platform| {
            platform.ensure_root_privileges(false);
        });
        let device = tun::create(&configuration)?;
        device.set_nonblock()?;
        Ok(device)
    })?;
    made.map_err(|source| WireError::Tap {
        interface: name.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
