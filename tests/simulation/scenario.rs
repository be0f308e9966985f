//! What a seed decides: the path, the connections, what goes wrong, and who sends what.

use crate::dice::Dice;
use crate::packets::{NUMBER_BYTES, Protocol, Shape};
use crate::stream::{Control, Path};
use ringtun::proto::egress_queue::CLASSES;
use ringtun::proto::offload::Offloads;
use ringtun::proto::timer::Instant;
use std::time::Duration;

/// A client's bound on what waits for a connection.
const QUEUE_BYTES_MAX: usize = 1024 * 1024;
/// Slots of each class, where they are not to matter.
const SLOTS: [usize; CLASSES] = [4096, 4096, 8192];
/// The interval of a telephone call.
const SPARSE_INTERVAL: Duration = Duration::from_millis(20);
const SPARSE_BYTES: usize = 172;

/// What a seed is to show.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Promise {
    /// Everything is accounted for, whatever goes wrong.
    Accounts,
    /// On a path on which nothing goes wrong one connection uses the link, and nobody waits for long.
    FlatLatency,
    /// So do several connections, and both directions at once, as far as the link goes.
    Together,
    /// Others who fill the bottleneck's queue do not take it all.
    Share,
}

/// How a flow sends.
#[derive(Clone, Copy, Debug)]
pub enum Manner {
    /// As much as its window allows, which it finds out by losses or marks.
    Bulk,
    /// So many packets of at most so many segments every time, whatever becomes of them.
    Paced {
        interval: Duration,
        packets: usize,
        segments_max: usize,
    },
}

#[derive(Debug)]
pub struct Scenario {
    pub promise: Promise,
    pub paths: [Path; 2],
    pub control: Control,
    pub connections: usize,
    pub flows: Vec<(Shape, Manner)>,
    /// What each end tells the other that it takes; `None`: it knows plain packets only.
    pub offloads: Option<[Offloads; 2]>,
    pub queue_bytes_max: usize,
    pub slots: [usize; CLASSES],
    /// When which connection ends, and how long each end takes to learn of it.
    pub deaths: Vec<(Instant, usize, [Duration; 2])>,
    /// When an end takes which connection for silent, and until when.
    pub silences: Vec<(Instant, usize, usize, Instant)>,
    pub competitors: usize,
    pub goes_both_ways: bool,
    pub measures_at: Instant,
    pub stops_at: Instant,
}

fn milliseconds(number: f64) -> Duration {
    Duration::from_secs_f64(number / 1000.0)
}

impl Scenario {
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        match seed % 100 {
            7 | 32 | 57 | 82 => flat_latency(&mut dice),
            44 => together(&mut dice),
            88 => share(&mut dice),
            _ => accounts(&mut dice),
        }
    }

    pub fn round_trip(&self) -> Duration {
        self.paths[0].delay + self.paths[1].delay
    }
}

fn accounts(dice: &mut Dice) -> Scenario {
    let sends_for = dice.magnitude(100.0, 700.0);
    let path = |dice: &mut Dice| {
        let bytes_per_second = dice.magnitude(1e6, 25e6) / 8.0;
        let delay = milliseconds(dice.magnitude(0.1, 80.0));
        let queue = dice.magnitude(16e3, 600e3);
        let mut path = Path::new(bytes_per_second, delay, queue);
        path.loss = dice.one_of(&[0.0, 0.0, 0.001, 0.01, 0.05]);
        if dice.percent(25) {
            let from = at(dice.unit() * sends_for);
            path.outages
                .push((from, from + milliseconds(dice.magnitude(5.0, 3000.0))));
        }
        path
    };
    let paths = [path(dice), path(dice)];
    let connections = dice.between(1, 4) as usize;
    let mut deaths = Vec::new();
    if dice.percent(30) {
        for ordinal in 0..connections {
            if dice.percent(50) {
                let learn = [(); 2].map(|()| milliseconds(dice.magnitude(0.1, 200.0)));
                deaths.push((at(dice.unit() * sends_for * 1.2), ordinal, learn));
            }
        }
    }
    let mut silences = Vec::new();
    if dice.percent(30) {
        for _ in 0..dice.between(1, 4) {
            let (side, ordinal) = (dice.between(0, 1), dice.between(0, connections as u64 - 1));
            let from = at(dice.unit() * sends_for);
            let until = from + milliseconds(dice.magnitude(1.0, 500.0));
            silences.push((from, side as usize, ordinal as usize, until));
        }
    }
    let some = |dice: &mut Dice| {
        let tso = dice.percent(80);
        let uso = dice.percent(80);
        Offloads {
            csum: true,
            tso4: tso,
            tso6: tso,
            uso4: uso,
            uso6: uso,
        }
    };
    let offloads = match dice.between(0, 9) {
        0 => None,
        1 => Some([Offloads::NONE, Offloads::ALL]),
        2..5 => Some([some(dice), some(dice)]),
        _ => Some([Offloads::ALL; 2]),
    };
    let control = match dice.between(0, 2) {
        0 => Control::Given(two_round_trips(&paths)),
        _ => Control::Growing,
    };
    let flows = (0..dice.between(2, 8) as usize)
        .map(|flow| any_flow(dice, flow, &paths))
        .collect();
    Scenario {
        promise: Promise::Accounts,
        paths,
        control,
        connections,
        flows,
        offloads,
        queue_bytes_max: dice.magnitude(70e3, 1e6) as usize,
        slots: match dice.between(0, 3) {
            0 => [(12, 60), (4, 60), (4, 100)]
                .map(|(least, most)| dice.between(least, most) as usize),
            _ => SLOTS,
        },
        deaths,
        silences,
        competitors: 0,
        goes_both_ways: true,
        measures_at: Instant::ZERO,
        stops_at: at(sends_for),
    }
}

fn at(number: f64) -> Instant {
    Instant::ZERO + milliseconds(number)
}

/// As much as is delivered in two round trips, in the direction that delivers more.
fn two_round_trips(paths: &[Path; 2]) -> f64 {
    let rate = paths[0].bytes_per_second.max(paths[1].bytes_per_second);
    let round_trip = paths[0].delay + paths[1].delay;
    (2.0 * rate * round_trip.as_secs_f64()).max(32e3)
}

fn any_shape(dice: &mut Dice, flow: usize) -> Shape {
    let protocol = dice.one_of(&[
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Udp,
        Protocol::Acks,
    ]);
    Shape {
        flow,
        protocol,
        is_v6: dice.percent(40),
        is_up: dice.percent(50),
        segment_bytes: match protocol {
            Protocol::Tcp => dice.one_of(&[536, 1000, 1348, 1440]),
            Protocol::Udp => dice.magnitude(NUMBER_BYTES as f64, 1440.0) as usize,
            Protocol::Acks => 0,
        },
        ecn: dice.one_of(&[0, 0, 0, 1, 2, 2, 3]),
        has_option: dice.percent(50),
        dont_fragment: dice.percent(50),
        is_partial: protocol == Protocol::Tcp || dice.percent(50),
    }
}

fn any_flow(dice: &mut Dice, flow: usize, paths: &[Path; 2]) -> (Shape, Manner) {
    let mut shape = any_shape(dice, flow);
    if shape.protocol == Protocol::Tcp && dice.percent(60) {
        return (shape, Manner::Bulk);
    }
    let packets = dice.magnitude(1.0, 20.0) as usize;
    let segments_max = match shape.protocol {
        Protocol::Tcp => dice.magnitude(1.0, 44.0) as usize,
        // Some programs leave the cutting up to the kernel.
        Protocol::Udp if shape.is_partial && dice.percent(30) => dice.magnitude(1.0, 40.0) as usize,
        Protocol::Udp | Protocol::Acks => 1,
    };
    if segments_max > 1 {
        shape.is_partial = true;
    }
    // From a little to more than the path takes.
    let path = &paths[usize::from(!shape.is_up)];
    let share = dice.magnitude(0.01, 1.5);
    let bytes = packets * (shape.header_bytes() + segments_max.div_ceil(2) * shape.segment_bytes);
    let interval = path.time_of(bytes as u64).div_f64(share);
    let manner = Manner::Paced {
        interval: interval.clamp(Duration::from_millis(1), Duration::from_millis(200)),
        packets,
        segments_max,
    };
    (shape, manner)
}

/// A call beside transfers that go its way.
fn flat_latency(dice: &mut Dice) -> Scenario {
    let bits_per_second = dice.magnitude(3e6, 40e6);
    let delay = milliseconds(dice.magnitude(3.0, 50.0));
    let path = (bits_per_second, delay);
    steady(dice, Promise::FlatLatency, path, false)
}

fn together(dice: &mut Dice) -> Scenario {
    let bits_per_second = dice.magnitude(3e6, 30e6);
    let delay = milliseconds(dice.magnitude(3.0, 40.0));
    let goes_both_ways = dice.percent(50);
    let path = (bits_per_second, delay);
    let mut scenario = steady(dice, Promise::Together, path, goes_both_ways);
    scenario.connections = dice.between(1 + u64::from(!goes_both_ways), 4) as usize;
    if goes_both_ways {
        // A given window does not know of the other direction's queue, in which acknowledgements wait.
        scenario.control = Control::Growing;
    }
    scenario
}

fn share(dice: &mut Dice) -> Scenario {
    let bits_per_second = dice.magnitude(8e6, 20e6);
    let delay = milliseconds(dice.magnitude(10.0, 30.0));
    let path = (bits_per_second, delay);
    let mut scenario = steady(dice, Promise::Share, path, false);
    // Windows that grow by so little in a round trip would take minutes to share a deeper queue.
    let queue = bits_per_second / 8.0 * delay.as_secs_f64() * dice.magnitude(3.0, 6.0) + 32e3;
    for path in &mut scenario.paths {
        path.queue_bytes_max = queue;
    }
    scenario.control = Control::Growing;
    scenario.connections = dice.between(1, 4) as usize;
    scenario.competitors = 1;
    scenario.measures_at = at(6e3);
    scenario.stops_at = at(18e3);
    scenario
}

fn steady(
    dice: &mut Dice,
    promise: Promise,
    (bits_per_second, delay): (f64, Duration),
    goes_both_ways: bool,
) -> Scenario {
    let bytes_per_second = bits_per_second / 8.0;
    let per_round_trip = bytes_per_second * 2.0 * delay.as_secs_f64();
    // As deep as at home: from one round trip to half a second.
    let deepest = (bytes_per_second / 2.0).max(2.0 * per_round_trip);
    let queue = dice.magnitude(1.5 * per_round_trip + 48e3, deepest + 64e3);
    let path = || Path::new(bytes_per_second, delay, queue);
    let paths = [path(), path()];
    let control = match dice.percent(50) {
        true => Control::Given(two_round_trips(&paths)),
        false => Control::Growing,
    };
    let is_up = dice.percent(50);
    let mut flows = Vec::new();
    for _ in 0..dice.between(1, 4) {
        for direction in [is_up, !is_up] {
            if direction == is_up || goes_both_ways {
                let shape = Shape {
                    protocol: Protocol::Tcp,
                    is_up: direction,
                    segment_bytes: 1440,
                    is_partial: true,
                    ecn: dice.one_of(&[0, 2]),
                    ..any_shape(dice, flows.len())
                };
                flows.push((shape, Manner::Bulk));
            }
        }
    }
    let call = Shape {
        protocol: Protocol::Udp,
        is_up,
        segment_bytes: SPARSE_BYTES,
        ..any_shape(dice, flows.len())
    };
    let manner = Manner::Paced {
        interval: SPARSE_INTERVAL,
        packets: 1,
        segments_max: 1,
    };
    flows.push((call, manner));
    let settles = Duration::from_secs(3) + 50 * delay;
    Scenario {
        promise,
        paths,
        control,
        connections: 1,
        flows,
        offloads: Some([Offloads::ALL; 2]),
        queue_bytes_max: QUEUE_BYTES_MAX,
        slots: SLOTS,
        deaths: Vec::new(),
        silences: Vec::new(),
        competitors: 0,
        goes_both_ways,
        measures_at: Instant::ZERO + settles,
        stops_at: Instant::ZERO + settles + Duration::from_secs(3),
    }
}
