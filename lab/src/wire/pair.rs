//! Two hosts and a wire, and nothing else: for trying what a wire does.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use super::{FAR_ADDRESS, NEAR_ADDRESS, Plan, Wire};
use crate::bench::tcp::Transfer;
use crate::bench::{BenchError, Direction, Stream};
use crate::host::Host;
use crate::link::{self, End};
use crate::netns::{Ender, Namespace, ProcessTree};
use crate::topology::LabError;

/// The near end.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The far end.
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// The interface at either end.
pub const INTERFACE: &str = "wire0";
const PREFIX: u8 = 24;
const PORT: u16 = 5201;
/// How long iperf3 may take to be ready.
const READY: Duration = Duration::from_secs(20);

/// Two hosts and the wire between them.
#[derive(Debug)]
pub struct Pair {
    // In this order: the wire, the processes, the hosts.
    /// The wire, until it is taken away.
    pub wire: Option<Wire>,
    processes: ProcessTree,
    /// The host at the near end.
    pub near: Host,
    /// The host at the far end.
    pub far: Host,
}

impl Pair {
    /// Makes them; they know each other's Ethernet address.
    ///
    /// # Errors
    /// As for a lab.
    pub fn join(plan: &Plan) -> Result<Pair, LabError> {
        let processes = ProcessTree::new()?;
        let near = Host::new("near", Namespace::new(&processes)?);
        let far = Host::new("far", Namespace::new(&processes)?);
        let wire = Wire::join(end_of(&near), end_of(&far), plan)?;
        for (host, own, other, address) in [
            (&near, NEAR, FAR, FAR_ADDRESS),
            (&far, FAR, NEAR, NEAR_ADDRESS),
        ] {
            let own = IpNet::V4(Ipv4Net::new_assert(own, PREFIX));
            link::set_up(host.namespace(), INTERFACE, &[own])?;
            link::set_neighbour(host.namespace(), INTERFACE, other.into(), address)?;
        }
        Ok(Pair {
            wire: Some(wire),
            processes,
            near,
            far,
        })
    }

    /// Ends the processes from another thread, for instance when a signal came.
    #[must_use]
    pub fn ender(&self) -> Ender {
        self.processes.ender()
    }

    /// One TCP stream, measured after its first second. Up is from the near host to the far one.
    ///
    /// # Errors
    /// When iperf3 fails.
    pub fn stream(&self, direction: Direction, seconds: u32) -> Result<Transfer, BenchError> {
        let port = PORT.to_string();
        let server = self
            .far
            .spawn("iperf3", ["-s", "-1", "--forceflush", "-p", &port])?;
        server.wait_for_line("Server listening", READY)?;
        let stream = Stream {
            to: (FAR, PORT),
            direction,
            streams: 1,
            seconds,
            omitted_seconds: 1,
            congestion_control: None,
        };
        stream.run(&self.near)
    }
}

fn end_of(host: &Host) -> End<'_> {
    End {
        host: host.namespace(),
        interface: INTERFACE,
    }
}
