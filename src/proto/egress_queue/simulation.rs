//! Senders that react, a link of a fixed rate, and the queue in front of it, in made-up time.

use std::collections::VecDeque;
use std::time::Duration;

use super::*;

const SEGMENT: usize = 1500;
const TICK: Duration = Duration::from_micros(50);
/// By which a window grows in a round trip.
const GROWTH_SEGMENTS: f64 = 3.0;
const SUPER_PACKET_SEGMENTS_MAX: usize = 43;
const QUEUE_BYTES_MAX: usize = 1 << 20;

/// How a sender is told of congestion, and whether he cares.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Manner {
    Ecn,
    Loss,
    /// He sends packets of so many segments as fast as he can.
    Flood(usize),
    /// One small packet every 20 ms.
    Sparse,
}

struct Toy {
    sender: usize,
    segments: usize,
    segment_bytes: usize,
    manner: Manner,
    sent_at: Instant,
}

impl Queued for Toy {
    fn bytes(&self) -> usize {
        self.segments * self.segment_bytes
    }

    fn class(&self) -> usize {
        0
    }

    fn signal(&mut self) -> Verdict {
        if self.manner == Manner::Ecn {
            return Verdict::Marked;
        }
        if self.segments == 1 {
            return Verdict::Drop;
        }
        self.segments -= 1;
        Verdict::Trimmed
    }
}

/// A sender whose window grows by a few segments a round trip and is cut at most once in one, about as CUBIC does (RFC 9438).
struct Sender {
    manner: Manner,
    window: f64,
    in_flight: usize,
    slow_start: bool,
    cut_at: Instant,
    sent_at: Instant,
    delivered_bytes: usize,
    /// How long each packet waited, in milliseconds.
    waits: Vec<f64>,
}

struct Simulation {
    queue: EgressQueue<Toy>,
    senders: Vec<Sender>,
    /// When a receiver's word reaches which sender, for how many segments, and whether it speaks of congestion.
    acknowledgements: VecDeque<(Instant, usize, usize, bool)>,
    now: Instant,
    bytes_per_tick: f64,
    round_trip: Duration,
    link_busy_bytes: f64,
    signals: usize,
}

impl Simulation {
    fn new(megabits: f64, round_trip_ms: u64, manners: &[Manner]) -> Self {
        let sender = |manner: &Manner| Sender {
            manner: *manner,
            window: 10.0,
            in_flight: 0,
            slow_start: true,
            cut_at: Instant::ZERO,
            sent_at: Instant::ZERO,
            delivered_bytes: 0,
            waits: Vec::new(),
        };
        Self {
            queue: EgressQueue::new(),
            senders: manners.iter().map(sender).collect(),
            acknowledgements: VecDeque::new(),
            now: Instant::from_nanos(1),
            bytes_per_tick: megabits * 1e6 / 8.0 * TICK.as_secs_f64(),
            round_trip: Duration::from_millis(round_trip_ms),
            link_busy_bytes: 0.0,
            signals: 0,
        }
    }

    fn run(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        while self.now < end {
            self.hear();
            for sender in 0..self.senders.len() {
                self.send(sender);
            }
            self.link_busy_bytes = (self.link_busy_bytes - self.bytes_per_tick).max(0.0);
            while self.link_busy_bytes < self.bytes_per_tick && self.transmit() {}
            self.now += TICK;
        }
    }

    fn hear(&mut self) {
        while let Some((_, sender, segments, congestion)) = self
            .acknowledgements
            .pop_front_if(|acknowledgement| acknowledgement.0 <= self.now)
        {
            let sender = &mut self.senders[sender];
            sender.in_flight -= segments;
            if congestion {
                sender.slow_start = false;
                if self.now.since(sender.cut_at) > self.round_trip {
                    sender.cut_at = self.now;
                    sender.window = (sender.window * 0.7).max(2.0);
                }
            } else if sender.slow_start {
                sender.window += segments as f64;
            } else {
                sender.window += GROWTH_SEGMENTS * segments as f64 / sender.window;
            }
        }
    }

    fn send(&mut self, index: usize) {
        let sender = &mut self.senders[index];
        let (mut segments, segment_bytes) = match sender.manner {
            Manner::Ecn | Manner::Loss => {
                let burst = (sender.window / 8.0) as usize;
                (burst.clamp(1, SUPER_PACKET_SEGMENTS_MAX), SEGMENT)
            }
            Manner::Flood(segments) => (segments, SEGMENT),
            Manner::Sparse => (1, 200),
        };
        loop {
            let sender = &mut self.senders[index];
            let may = match sender.manner {
                Manner::Ecn | Manner::Loss => {
                    let room = (sender.window as usize).saturating_sub(sender.in_flight);
                    let least = segments.div_ceil(4);
                    segments = segments.min(room);
                    segments >= least
                }
                // Always backlogged, but eight of them exceed no bound.
                Manner::Flood(_) => sender.in_flight * SEGMENT < QUEUE_BYTES_MAX / 10,
                Manner::Sparse => self.now.since(sender.sent_at) >= Duration::from_millis(20),
            };
            if !may {
                return;
            }
            sender.in_flight += segments;
            sender.sent_at = self.now;
            let packet = Toy {
                sender: index,
                segments,
                segment_bytes,
                manner: sender.manner,
                sent_at: self.now,
            };
            let bounds = Bounds::of_bytes(QUEUE_BYTES_MAX);
            let flow = index as u32 * 77;
            if self.queue.push(self.now, flow, packet, &bounds) == Admit::Overflow {
                while let Some(packet) = self.queue.take_dropped() {
                    self.acknowledge(packet.sender, packet.segments, true);
                }
            }
        }
    }

    fn transmit(&mut self) -> bool {
        let Some(popped) = self.queue.pop(self.now) else {
            return false;
        };
        let Popped {
            packet, verdict, ..
        } = popped;
        let lost = match verdict {
            Verdict::Pass | Verdict::Marked => 0,
            Verdict::Drop => packet.segments,
            Verdict::Trimmed => 1,
        };
        self.signals += usize::from(verdict != Verdict::Pass);
        if verdict != Verdict::Drop {
            self.link_busy_bytes += packet.bytes() as f64;
            let sender = &mut self.senders[packet.sender];
            sender.delivered_bytes += packet.bytes();
            let wait = self.now.since(packet.sent_at).as_secs_f64() * 1000.0;
            sender.waits.push(wait);
            self.acknowledge(packet.sender, packet.segments, verdict == Verdict::Marked);
        }
        if lost > 0 {
            self.acknowledge(packet.sender, lost, true);
        }
        true
    }

    fn acknowledge(&mut self, sender: usize, segments: usize, congestion: bool) {
        let heard = self.now + self.round_trip;
        self.acknowledgements
            .push_back((heard, sender, segments, congestion));
    }

    /// Forgets what was delivered so far.
    fn measure_from_here(&mut self) {
        for sender in &mut self.senders {
            sender.delivered_bytes = 0;
            sender.waits.clear();
        }
    }

    fn megabits(&self, seconds: f64) -> f64 {
        let bytes = self.senders.iter().map(|sender| sender.delivered_bytes);
        bytes.sum::<usize>() as f64 * 8.0 / 1e6 / seconds
    }
}

fn quantile(waits: &[f64], share: f64) -> f64 {
    let mut sorted = waits.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// Jain's index: 1 if all have the same.
fn jain(shares: &[f64]) -> f64 {
    let sum = shares.iter().sum::<f64>();
    let squares = shares.iter().map(|share| share * share).sum::<f64>();
    sum * sum / (shares.len() as f64 * squares)
}

#[test]
fn one_bulk_flow_waits_about_as_long_as_the_target_and_fills_the_link() {
    for manner in [Manner::Ecn, Manner::Loss] {
        for (megabits, round_trip_ms) in [(20.0, 20), (100.0, 20), (100.0, 60), (1000.0, 10)] {
            let mut simulation = Simulation::new(megabits, round_trip_ms, &[manner]);
            simulation.run(10);
            simulation.measure_from_here();
            simulation.run(20);
            let waits = &simulation.senders[0].waits;
            let (median, p99) = (quantile(waits, 0.5), quantile(waits, 0.99));
            let delivered = simulation.megabits(20.0);
            let what = format!(
                "{manner:?}, {megabits} Mbit/s, {round_trip_ms} ms: wait {median:.1} ms, p99 {p99:.1} ms, {delivered:.1} Mbit/s, {} signals",
                simulation.signals
            );
            println!("{what}");
            assert!(median < 2.0 * TARGET.as_secs_f64() * 1000.0, "{what}");
            assert!(p99 < 40.0, "{what}");
            // For all of it a window that was cut would need more of a queue than this.
            assert!(delivered > 0.85 * megabits, "{what}");
        }
    }
}

#[test]
fn eight_bulk_flows_share_evenly_whatever_their_packets_and_manners() {
    let mixed = [
        Manner::Ecn,
        Manner::Loss,
        Manner::Ecn,
        Manner::Loss,
        Manner::Ecn,
        Manner::Loss,
        Manner::Ecn,
        Manner::Loss,
    ];
    let floods = [1, 2, 5, 10, 20, 30, 43, 43].map(Manner::Flood);
    for manners in [mixed, floods] {
        let mut simulation = Simulation::new(100.0, 20, &manners);
        simulation.run(5);
        simulation.measure_from_here();
        simulation.run(20);
        let shares: Vec<f64> = simulation
            .senders
            .iter()
            .map(|sender| sender.delivered_bytes as f64)
            .collect();
        let index = jain(&shares);
        println!("{manners:?}: {index:.4}");
        assert!(index >= 0.95, "{index}: {shares:?}");
        assert!(simulation.megabits(20.0) > 95.0);
    }
}

#[test]
fn a_sparse_flow_is_served_first() {
    for flood in [1, 43] {
        let mut manners = vec![Manner::Flood(flood); 8];
        manners.push(Manner::Sparse);
        let mut simulation = Simulation::new(100.0, 20, &manners);
        // At first, all nine are new.
        simulation.run(1);
        simulation.measure_from_here();
        simulation.run(10);
        let waits = &simulation.senders[8].waits;
        assert!(waits.len() > 490, "{}: none is lost", waits.len());
        // The packet that is being sent, and a tick.
        let longest_ms = flood as f64 * SEGMENT as f64 * 8.0 / 100e3 + 0.1;
        let worst = quantile(waits, 1.0);
        assert!(worst <= longest_ms, "{worst} ms of {longest_ms} ms");
    }
}

#[test]
fn who_does_not_react_slows_nobody_but_himself() {
    let manners = [
        Manner::Flood(43),
        Manner::Flood(1),
        Manner::Ecn,
        Manner::Loss,
    ];
    let mut simulation = Simulation::new(100.0, 20, &manners);
    simulation.run(5);
    simulation.measure_from_here();
    simulation.run(10);
    for (sender, manner) in simulation.senders.iter().zip(manners) {
        let megabits = sender.delivered_bytes as f64 * 8.0 / 1e6 / 10.0;
        let median = quantile(&sender.waits, 0.5);
        println!("{manner:?}: {megabits:.1} Mbit/s, {median:.1} ms");
        assert!(megabits > 20.0, "{manner:?}: {megabits} Mbit/s");
        if !matches!(manner, Manner::Flood(_)) {
            assert!(median < 25.0, "{manner:?}: {median} ms");
        }
    }
}
