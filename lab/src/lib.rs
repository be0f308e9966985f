//! Labs of Linux network namespaces: hosts, links, a firewall, and the processes that run there.
//!
//! [`Lab::build`] makes one in a fraction of a second; nothing of it touches the machine's own network or
//! files, labs run side by side, and all of it is gone when the value is dropped or its process dies.
//!
//! ```no_run
//! use std::time::Duration;
//! use ringtun_lab::{Lab, Topology, topology::SERVER_V4};
//!
//! let lab = Lab::build(Topology::Nat)?;
//! let server = lab.host("server").spawn("nc", ["-lk", "443"])?;
//! lab.host("client").exec("nc", ["-zw1", &SERVER_V4.to_string(), "443"])?;
//! server.stop(Duration::from_secs(1))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Where to read: [`topology`] (what there is), [`host`] and [`process`] (what a test does with it),
//! [`probe`] (who reaches whom), [`firewall`], [`link`], [`wire`] and [`netns`] (how it is made),
//! [`scenario`] and [`bench`](mod@bench) (ringtun shown and measured in it), [`crowd`] (thousands of
//! sessions at once), [`hostile`] (attacks, and what they cost others), [`smoke`] and [`transfer`]
//! (ringtun tried on whatever kernel there is), [`outages`] (its path away for a while), [`standing`]
//! (a lab that outlives its command).

pub mod bench;
pub mod crowd;
mod dial;
pub mod firewall;
pub mod host;
pub mod hostile;
pub mod link;
mod names;
pub mod netns;
pub mod outages;
pub mod probe;
pub mod process;
pub mod report;
pub mod scenario;
pub mod smoke;
pub mod standing;
pub mod topology;
pub mod transfer;
pub mod wire;

pub use host::{Host, Ping};
pub use process::{Output, Process};
pub use topology::{Lab, LabError, Topology};
