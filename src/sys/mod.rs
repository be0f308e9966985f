//! System calls, netlink and the host's network state; unsafe is fenced here.

pub mod clock;
pub mod congestion;
pub mod descriptor;
pub mod dns;
pub mod fdpass;
pub mod netns;
pub mod nft;
pub mod route;
pub mod sandbox;
pub mod signal;
pub mod socket;
pub mod sysctl;
pub mod tcp_info;
pub mod tun;
