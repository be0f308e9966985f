//! `ringtun doctor`: whether this host can run ringtun, and what to do where it cannot.
//!
//! | file | what |
//! | --- | --- |
//! | `findings.rs` | what was found, as values |
//! | `gather.rs`, `ports.rs` | looking: the steps of a start, rehearsed without touching the host |
//! | `judge.rs` | what it means, pure |
//! | `report.rs` | the checks, as text and as JSON |
//!
//! There is no second opinion here. The interface is made by [`crate::sys::tun::create`], in a network namespace of its own
//! that ends with the thread in it, and the server's ruleset is put into force there; ports are opened by
//! [`crate::sys::socket::listen`]; kernel settings are those of [`crate::keeper::plan::server`]; rings and packet memory are
//! the daemon's ([`crate::control::rehearse`]).

pub mod findings;
pub mod gather;
mod judge;
mod ports;
pub mod report;

pub use gather::gather;
pub use judge::judge;
pub use report::{Check, Level, Report};

/// What a host is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Give clients the internet
    Server,
    /// Get it from a server
    Client,
}

impl Role {
    /// Both.
    pub const ALL: [Role; 2] = [Role::Server, Role::Client];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Role::Server => "server",
            Role::Client => "client",
        }
    }
}
