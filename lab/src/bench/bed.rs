//! A system that runs in a lab of its own, and one measurement on it at a time.

use std::thread;
use std::time::{Duration, Instant};

use super::echo::{self, Watch};
use super::metric::{Direction, Metric};
use super::system::{Environment, Setup, Step, System};
use super::tcp::Stream;
use super::{BenchError, Plan, requests, udp, usage};
use crate::host::Host;
use crate::process::Process;
use crate::topology::{Lab, SERVER_V4, Topology, WEB_IPERF_PORT, WEB_V4};

/// How long a server or a client may take to be ready.
const UP_LIMIT: Duration = Duration::from_secs(20);
/// How long a client may take to end.
const DOWN_LIMIT: Duration = Duration::from_secs(10);
/// How long a load runs longer than the echoes beside it.
const LOAD_MARGIN_SECONDS: u32 = 2;
/// Echo requests per second, for how long a load has to last.
const ECHOES_PER_SECOND: usize = 100;
/// Streams that have to share a path.
const MANY_STREAMS: usize = 8;
const MEGA: f64 = 1e6;
const GIGA: f64 = 1e9;

/// A lab with a system in it, up.
#[derive(Debug)]
pub(super) struct Bed {
    // In this order, so that the client can still say goodbye.
    client: Option<Process>,
    server: Option<Process>,
    environment: Environment,
    setup: Setup,
    lab: Lab,
}

/// One measurement. It may yield several figures.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Probe {
    Connect,
    MemoryIdle,
    RoundTrips,
    Throughput(Direction, usize),
    RoundTripsBeside(Direction),
    BothWays,
    Requests,
    Fairness(Direction),
    Packets(Direction, usize),
    MemoryPeak,
}

/// What a measurement yields.
pub(super) type Samples = Vec<(Metric, f64)>;

impl Probe {
    /// All of them in the order in which they are made: the idle ones first.
    pub(super) const ALL: [Probe; 18] = [
        Probe::Connect,
        Probe::MemoryIdle,
        Probe::RoundTrips,
        Probe::Requests,
        Probe::Throughput(Direction::Down, 1),
        Probe::Throughput(Direction::Up, 1),
        Probe::Throughput(Direction::Down, 4),
        Probe::Throughput(Direction::Up, 4),
        Probe::RoundTripsBeside(Direction::Down),
        Probe::RoundTripsBeside(Direction::Up),
        Probe::BothWays,
        Probe::Fairness(Direction::Down),
        Probe::Fairness(Direction::Up),
        Probe::Packets(Direction::Down, 64),
        Probe::Packets(Direction::Up, 64),
        Probe::Packets(Direction::Down, 1200),
        Probe::Packets(Direction::Up, 1200),
        Probe::MemoryPeak,
    ];

    /// What is sure to come of it: the metrics that it is for, beside processor time.
    pub(super) fn metrics(self) -> &'static [Metric] {
        match self {
            Probe::Connect => &[Metric::ConnectMs],
            Probe::MemoryIdle => &[Metric::RssClientIdle, Metric::RssServerIdle],
            Probe::RoundTrips => &[Metric::RttIdleP50, Metric::RttIdleP99],
            Probe::Throughput(Direction::Down, 1) => &[Metric::TcpDown1],
            Probe::Throughput(Direction::Up, 1) => &[Metric::TcpUp1],
            Probe::Throughput(Direction::Down, _) => &[Metric::TcpDown4],
            Probe::Throughput(Direction::Up, _) => &[Metric::TcpUp4],
            Probe::RoundTripsBeside(Direction::Down) => &[Metric::RttDownP50, Metric::RttDownP99],
            Probe::RoundTripsBeside(Direction::Up) => &[Metric::RttUpP50, Metric::RttUpP99],
            Probe::BothWays => &[
                Metric::TcpDownBoth,
                Metric::TcpUpBoth,
                Metric::RttBothP50,
                Metric::RttBothP99,
            ],
            Probe::Requests => &[Metric::RequestIdleP99],
            Probe::Fairness(Direction::Down) => &[Metric::FairDown, Metric::RequestDownP99],
            Probe::Fairness(Direction::Up) => &[Metric::FairUp, Metric::RequestUpP99],
            Probe::Packets(Direction::Down, 64) => &[Metric::UdpDown64],
            Probe::Packets(Direction::Up, 64) => &[Metric::UdpUp64],
            Probe::Packets(Direction::Down, _) => &[Metric::UdpDown1200],
            Probe::Packets(Direction::Up, _) => &[Metric::UdpUp1200],
            Probe::MemoryPeak => &[Metric::RssClientPeak, Metric::RssServerPeak],
        }
    }

    /// Its figures, in the order of its metrics.
    fn samples<const N: usize>(self, figures: [f64; N]) -> Samples {
        debug_assert_eq!(self.metrics().len(), N);
        self.metrics().iter().copied().zip(figures).collect()
    }

    /// Whether it says anything about a path without a tunnel.
    pub(super) fn suits(self, system: System) -> bool {
        system != System::Direct
            || !matches!(self, Probe::Connect | Probe::MemoryIdle | Probe::MemoryPeak)
    }
}

impl Bed {
    /// Builds a lab, starts the server and the client, and waits until the path carries packets.
    pub(super) fn start(
        topology: Topology,
        setup: Setup,
        on_lab: &mut dyn FnMut(&Lab),
    ) -> Result<Bed, BenchError> {
        let lab = Lab::build(topology)?;
        on_lab(&lab);
        let mut bed = Bed {
            client: None,
            server: None,
            environment: Environment::new(),
            setup,
            lab,
        };
        for file in &bed.setup.files {
            bed.lab
                .host(file.host)
                .write_file(&file.path, &file.contents)?;
        }
        for step in &bed.setup.prepare {
            bed.run(step)?;
        }
        if let Some(server) = &bed.setup.server {
            let process = spawn(bed.host("server"), &server.command, &bed.environment)?;
            process.wait_for_line(server.ready, UP_LIMIT)?;
            bed.server = Some(process);
        }
        for step in &bed.setup.server_up {
            let output = bed.run(step)?;
            if let Some(variable) = step.output_becomes {
                bed.environment.insert(variable, output.trim().to_owned());
            }
        }
        bed.connect()?;
        Ok(bed)
    }

    /// Makes one measurement.
    pub(super) fn measure(&mut self, probe: Probe, plan: &Plan) -> Result<Samples, BenchError> {
        self.lab.wait_for_iperf3()?;
        match probe {
            Probe::Connect => {
                let mut times = Vec::new();
                for _ in 0..plan.connects {
                    times.push(self.connect()?.as_secs_f64() * 1000.0);
                }
                Ok(vec![(Metric::ConnectMs, super::median(times))])
            }
            Probe::MemoryIdle | Probe::MemoryPeak => {
                let of = |process: &Option<Process>| usage::memory(&family(process));
                let (client, server) = (of(&self.client), of(&self.server));
                Ok(if probe == Probe::MemoryIdle {
                    vec![
                        (Metric::RssClientIdle, client.resident_mib),
                        (Metric::RssServerIdle, server.resident_mib),
                    ]
                } else {
                    vec![
                        (Metric::RssClientPeak, client.peak_mib),
                        (Metric::RssServerPeak, server.peak_mib),
                    ]
                })
            }
            Probe::RoundTrips => Ok(probe.samples(self.round_trips(plan)?)),
            Probe::RoundTripsBeside(direction) => {
                let seconds = pinging_seconds(plan).saturating_add(plan.omitted_seconds);
                let load = stream(direction, 1, plan)
                    .lasting(seconds)
                    .load(self.host("client"))?;
                thread::sleep(settling(plan));
                let figures = self.round_trips(plan);
                load.wait(UP_LIMIT)?;
                Ok(probe.samples(figures?))
            }
            Probe::Requests => {
                let measuring = Duration::from_secs(plan.seconds.into());
                let p99 = self.requests(measuring)?;
                Ok(vec![(Metric::RequestIdleP99, p99)])
            }
            Probe::BothWays => {
                let load = Stream {
                    seconds: pinging_seconds(plan),
                    ..stream(Direction::Up, 1, plan)
                };
                let running = load.start_both(self.host("client"))?;
                thread::sleep(settling(plan));
                let [p50, p99] = self.round_trips(plan)?;
                let (down, up) = load.report_both(running)?;
                Ok(probe.samples([down, up, p50, p99]))
            }
            Probe::Fairness(direction) => self.fairness(direction, plan),
            Probe::Throughput(direction, streams) => self.throughput(direction, streams, plan),
            Probe::Packets(direction, payload_bytes) => {
                let rate = udp::packets_per_second(
                    self.host("client"),
                    (self.host("web"), WEB_V4),
                    direction,
                    payload_bytes,
                    Duration::from_secs(plan.seconds.into()),
                )?;
                Ok(probe.samples([rate]))
            }
        }
    }

    /// The congestion control of the tunnel's own TCP connection on either side, as far as `ss` tells.
    pub(super) fn outer_congestion_control(&self) -> Option<String> {
        self.server.as_ref()?;
        let server = SERVER_V4.to_string();
        let of = |host: &str, end: &str| {
            let host = self.host(host);
            let filter = ["-tinH", "state", "established", end, &server];
            let sockets = host.exec("ss", filter).ok()?;
            let known = host
                .read_file("/proc/sys/net/ipv4/tcp_available_congestion_control")
                .ok()?;
            let mut words = sockets.split_whitespace();
            words
                .find(|word| known.split_whitespace().any(|known| known == *word))
                .map(str::to_owned)
        };
        Some(format!(
            "{} up, {} down",
            of("client", "dst")?,
            of("server", "src")?
        ))
    }

    /// Starts the client anew and waits for the first echo reply from `web`.
    fn connect(&mut self) -> Result<Duration, BenchError> {
        if let Some(client) = self.client.take() {
            client.stop(DOWN_LIMIT)?;
        }
        let watch = Watch::start(self.host("client"), WEB_V4)?;
        let begun = Instant::now();
        if let Some(client) = &self.setup.client {
            let process = spawn(self.host("client"), &client.command, &self.environment)?;
            let ready = client.ready;
            // Its own word is waited for, too, since it may go on with its routes after the first packet. And
            // when there is none, this is the error with its log.
            process.wait_for_line(ready, UP_LIMIT)?;
            self.client = Some(process);
        }
        let reply = watch.first_reply(WEB_V4, UP_LIMIT)?;
        Ok(reply.duration_since(begun))
    }

    /// The median and the 99th percentile.
    fn round_trips(&self, plan: &Plan) -> Result<[f64; 2], BenchError> {
        let times = echo::round_trips(self.host("client"), WEB_V4, plan.pings)?;
        Ok([times.p50_us, times.p99_us])
    }

    /// Throughput, and for one stream what it costs.
    fn throughput(
        &self,
        direction: Direction,
        streams: usize,
        plan: &Plan,
    ) -> Result<Samples, BenchError> {
        let probe = Probe::Throughput(direction, streams);
        let tunnel = [family(&self.client), family(&self.server)].concat();
        let before = (usage::processor_time(&tunnel), usage::machine_time());
        let transfer = stream(direction, streams, plan).run(self.host("client"))?;
        let after = (usage::processor_time(&tunnel), usage::machine_time());
        let mut samples = probe.samples([transfer.megabits_per_second]);
        if streams == 1 && transfer.bytes > MEGA {
            let (of_tunnel, of_machine) = match direction {
                Direction::Down => (Metric::CpuTunnelDown, Metric::CpuMachineDown),
                Direction::Up => (Metric::CpuTunnelUp, Metric::CpuMachineUp),
            };
            let per_gigabyte = |after: Duration, before| {
                after.saturating_sub(before).as_secs_f64() / (transfer.bytes / GIGA)
            };
            if !tunnel.is_empty() {
                samples.push((of_tunnel, per_gigabyte(after.0, before.0)));
            }
            samples.push((of_machine, per_gigabyte(after.1, before.1)));
        }
        Ok(samples)
    }

    /// Many streams, and requests beside them for as long as they count.
    fn fairness(&self, direction: Direction, plan: &Plan) -> Result<Samples, BenchError> {
        let load = stream(direction, MANY_STREAMS, plan);
        let running = load.start(self.host("client"))?;
        thread::sleep(settling(plan));
        let p99 = self.requests(Duration::from_secs(plan.seconds.into()))?;
        let transfer = load.report(running)?;
        let jain = requests::jain(&transfer.bits_per_second);
        Ok(Probe::Fairness(direction).samples([jain, p99]))
    }

    fn requests(&self, measuring: Duration) -> Result<f64, BenchError> {
        requests::p99_us(self.host("client"), (self.host("web"), WEB_V4), measuring)
    }

    fn host(&self, name: &str) -> &Host {
        self.lab.host(name)
    }

    fn run(&self, step: &Step) -> Result<String, BenchError> {
        let [program, arguments @ ..] = step.command.as_slice() else {
            return Ok(String::new());
        };
        let command = self.host(step.host).command(program).args(arguments);
        Ok(command.input(step.input.clone()).exec()?)
    }
}

fn stream(direction: Direction, streams: usize, plan: &Plan) -> Stream {
    Stream {
        to: (WEB_V4, WEB_IPERF_PORT),
        direction,
        streams,
        seconds: plan.seconds,
        omitted_seconds: plan.omitted_seconds,
        congestion_control: plan.inner,
    }
}

/// How long a load runs before anything beside it counts.
fn settling(plan: &Plan) -> Duration {
    Duration::from_secs(plan.omitted_seconds.into())
}

/// How long a load has to last from there.
fn pinging_seconds(plan: &Plan) -> u32 {
    let seconds = u32::try_from(plan.pings / ECHOES_PER_SECOND).unwrap_or(u32::MAX);
    seconds.saturating_add(LOAD_MARGIN_SECONDS)
}

fn spawn(
    host: &Host,
    command: &[String],
    environment: &Environment,
) -> Result<Process, BenchError> {
    let [program, arguments @ ..] = command else {
        unreachable!("a daemon has a program")
    };
    let mut command = host.command(program).args(arguments);
    for (variable, value) in environment {
        command = command.env(variable, value);
    }
    Ok(command.spawn()?)
}

fn family(process: &Option<Process>) -> Vec<i32> {
    process
        .as_ref()
        .map_or_else(Vec::new, |process| usage::family(process.pid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_measured_once() {
        let mut measured: Vec<Metric> = Probe::ALL
            .iter()
            .flat_map(|probe| probe.metrics())
            .copied()
            .chain([
                Metric::CpuTunnelDown,
                Metric::CpuTunnelUp,
                Metric::CpuMachineDown,
                Metric::CpuMachineUp,
            ])
            .collect();
        measured.sort_unstable();
        let mut all = Metric::ALL.to_vec();
        all.sort_unstable();
        assert_eq!(measured, all);
    }
}
