//! Two ends, the path between them, and those who send, in made-up time.

mod outbound;

use crate::agenda::{Agenda, Event, Trace};
use crate::dice::Dice;
use crate::end::{Connection, End, Outgoing, UNSENT_BYTES_MAX};
use crate::flow::Flow;
use crate::ledger::{Arrival, Ledger, Totals};
use crate::packets::{CLIENT, CLIENT_V6, Protocol, turned_round};
use crate::scenario::{Manner, Promise, Scenario};
use crate::stream::{Control, Stream};
use ringtun::proto::egress_queue::Queued;
use ringtun::proto::flow_hash::flow_hash;
use ringtun::proto::offload::VIRTIO_NET_HDR_BYTES;
use ringtun::proto::packet;
use ringtun::proto::timer::Instant;
use std::net::IpAddr;
use std::time::Duration;

const CLIENT_SIDE: usize = 0;
/// After this a sender knows that a connection took his packets along.
const LOST_AFTER: Duration = Duration::from_millis(300);
/// By now nothing is under way any more, or never will be.
const PATIENCE: Duration = Duration::from_secs(120);
const EVENTS_MAX: u64 = 2_000_000;

/// What is measured of a run, from the moment on at which it has settled.
#[derive(Debug, Default)]
pub struct Report {
    pub totals: Totals,
    /// Inner bytes that arrived in each direction.
    pub bytes: [u64; 2],
    /// What competitors got across.
    pub competitors_bytes: u64,
    pub seconds: f64,
    /// How much longer each packet of a call took than an idle path would have made it.
    pub waits: Vec<Duration>,
    pub longest_packet_bytes: u64,
    /// How much happened at all.
    pub events: u64,
}

pub struct World<'t> {
    now: Instant,
    scenario: Scenario,
    dice: Dice,
    agenda: Agenda,
    trace: &'t mut Trace,
    streams: Vec<Stream>,
    ends: [End; 2],
    flows: Vec<Flow>,
    ledger: Ledger,
    report: Report,
    has_stopped: bool,
    measures: bool,
    competitors: Vec<usize>,
    competitors_bytes: u64,
    /// Ends that know of each connection's end.
    learned: Vec<usize>,
}

fn lease() -> [IpAddr; 2] {
    [CLIENT.into(), CLIENT_V6.into()]
}

impl<'t> World<'t> {
    pub fn new(seed: u64, trace: &'t mut Trace) -> Self {
        let scenario = Scenario::of(seed);
        let flows = scenario.flows.iter();
        let flows = flows.map(|(shape, manner)| Flow::new(*shape, *manner));
        let shapes = scenario.flows.iter().map(|(shape, _)| *shape);
        let mut world = Self {
            now: Instant::ZERO,
            dice: Dice::new(!seed),
            agenda: Agenda::default(),
            trace,
            streams: Vec::new(),
            ends: [(); 2].map(|()| End::new(scenario.connections, scenario.slots)),
            flows: flows.collect(),
            ledger: Ledger::new(shapes.collect()),
            report: Report::default(),
            has_stopped: false,
            measures: false,
            competitors: Vec::new(),
            competitors_bytes: 0,
            learned: vec![0; scenario.connections],
            scenario,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        for ordinal in 0..self.scenario.connections {
            let streams = self.new_streams();
            for side in 0..2 {
                self.connect(side, ordinal, streams);
            }
        }
        for _ in 0..self.scenario.competitors {
            let direction = usize::from(!self.flows[0].shape.is_up);
            let stream = self.new_stream(direction, Control::Growing, true);
            self.competitors.push(stream);
            self.transmit(stream);
        }
        for flow in 0..self.flows.len() {
            let jitter = Duration::from_micros(self.dice.between(0, 20_000));
            self.agenda.at(self.now + jitter, Event::Send { flow });
        }
        for (at, ordinal, _) in &self.scenario.deaths {
            self.agenda.at(*at, Event::Die { ordinal: *ordinal });
        }
        for &(from, side, ordinal, until) in &self.scenario.silences {
            for (at, silent) in [(from, true), (until, false)] {
                let event = Event::Silence {
                    side,
                    ordinal,
                    silent,
                };
                self.agenda.at(at, event);
            }
        }
        self.agenda.at(self.scenario.measures_at, Event::Measure);
        self.agenda.at(self.scenario.stops_at, Event::Stop);
    }

    fn new_stream(&mut self, direction: usize, control: Control, is_greedy: bool) -> usize {
        let name = self.streams.len();
        let mut stream = Stream::new(name, direction, control, is_greedy);
        stream.unsent_bytes_max = UNSENT_BYTES_MAX;
        self.streams.push(stream);
        name
    }

    /// Both directions of a connection.
    fn new_streams(&mut self) -> [usize; 2] {
        [0, 1].map(|direction| self.new_stream(direction, self.scenario.control, false))
    }

    fn connect(&mut self, side: usize, ordinal: usize, streams: [usize; 2]) {
        let connection = Connection::new(ordinal, streams[side], streams[1 - side]);
        self.ends[side].connections[ordinal] = Some(connection);
        self.ends[side].silent[ordinal] = false;
        self.route(side);
    }

    fn route(&mut self, side: usize) {
        let lease = lease();
        self.ends[side].route((side != CLIENT_SIDE).then_some(&lease[..]));
    }

    /// Lets everything happen, and until the end of it.
    pub fn run(mut self) -> Report {
        while let Some((at, event)) = self.agenda.next() {
            assert!(at >= self.now, "time does not go back");
            assert!(
                at < self.scenario.stops_at + PATIENCE,
                "there is no end to it"
            );
            self.now = at;
            self.report.events += 1;
            assert!(self.report.events < EVENTS_MAX, "there is no end to it");
            self.trace.note(at, || format!("{event:?}"));
            self.happen(event);
        }
        self.check_end();
        self.report.totals = self.ledger.totals;
        self.report
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Send { flow } => self.on_send(flow),
            Event::Heard {
                flow,
                segments,
                congestion,
            } => self.on_heard(flow, segments, congestion),
            Event::Arrive {
                stream,
                segment,
                transmission,
            } => self.on_arrive(stream, segment, transmission),
            Event::Acknowledge {
                stream,
                segment,
                transmission,
            } => {
                self.streams[stream].acknowledge(self.now, segment, transmission);
                self.transmit(stream);
            }
            Event::Timeout { stream } => {
                self.streams[stream].time_out(self.now, &mut self.agenda);
                self.transmit(stream);
            }
            Event::Paced { stream } => {
                self.streams[stream].end_pace();
                self.transmit(stream);
            }
            Event::Written { stream } => self.on_written(stream),
            Event::Paused { stream } => {
                if let Some((side, ordinal)) = self.sender_of(stream) {
                    if let Some(connection) = &mut self.ends[side].connections[ordinal] {
                        connection.pausing = false;
                    }
                    self.pump(side, ordinal);
                }
            }
            Event::Die { ordinal } => self.on_die(ordinal),
            Event::Learn { side, stream } => self.on_learn(side, stream),
            Event::Return {
                side,
                ordinal,
                streams,
            } => self.connect(side, ordinal, streams),
            Event::Silence {
                side,
                ordinal,
                silent,
            } => {
                self.ends[side].silent[ordinal] = silent;
                self.route(side);
            }
            Event::Measure => {
                self.measures = true;
                self.competitors_bytes = self.delivered_by_competitors();
            }
            Event::Stop => self.on_stop(),
        }
    }

    fn delivered_by_competitors(&self) -> u64 {
        let bytes = |stream: &usize| self.streams[*stream].delivered_bytes;
        self.competitors.iter().map(bytes).sum()
    }

    fn on_stop(&mut self) {
        self.has_stopped = true;
        self.measures = false;
        let delivered = self.delivered_by_competitors();
        self.report.competitors_bytes = delivered - self.competitors_bytes;
        self.report.seconds = self.now.since(self.scenario.measures_at).as_secs_f64();
        for stream in std::mem::take(&mut self.competitors) {
            self.streams[stream].die();
        }
    }

    // Those who send.

    fn on_send(&mut self, index: usize) {
        if self.has_stopped {
            return;
        }
        let mut touched = Vec::new();
        match self.flows[index].manner {
            Manner::Bulk => {
                while let Some(segments) = self.flows[index].may_send() {
                    self.offer(index, segments, &mut touched);
                }
            }
            Manner::Paced {
                interval,
                packets,
                segments_max,
            } => {
                for _ in 0..packets {
                    let segments = self.dice.between(1, segments_max as u64) as usize;
                    self.offer(index, segments, &mut touched);
                }
                self.agenda
                    .at(self.now + interval, Event::Send { flow: index });
            }
        }
        touched.sort_unstable();
        touched.dedup();
        for (side, ordinal) in touched {
            self.pump(side, ordinal);
        }
    }

    fn on_heard(&mut self, index: usize, segments: usize, congestion: bool) {
        let round_trip = self.scenario.round_trip();
        self.flows[index].hear(self.now, segments, congestion, round_trip);
        if matches!(self.flows[index].manner, Manner::Bulk) {
            self.on_send(index);
        }
    }

    fn tell(&mut self, flow: usize, segments: usize, congestion: bool, after: Duration) {
        let event = Event::Heard {
            flow,
            segments,
            congestion,
        };
        self.agenda.at(self.now + after, event);
    }

    /// A flow's next packet comes out of the tunnel's interface.
    fn offer(&mut self, index: usize, segments: usize, touched: &mut Vec<(usize, usize)>) {
        let part = self.flows[index].next_part(segments, &mut self.dice);
        let shape = self.flows[index].shape;
        let side = usize::from(!shape.is_up);
        let id = self.ledger.enter(self.now, index, part);
        self.flows[index].in_flight += part.segments;
        let is_partial = shape.is_partial || part.segments > 1;
        let framed = shape.build(&part, is_partial, false);
        let packet = &framed[VIRTIO_NET_HDR_BYTES..];
        let flow = flow_hash(packet);
        let route = packet::destination(packet)
            .and_then(|destination| self.ends[side].routes.lookup(destination, flow));
        let Some(route) = route.filter(|_| self.ends[side].pool.take()) else {
            self.ledger.refuse(id);
            self.tell(index, part.segments, true, LOST_AFTER);
            return;
        };
        let ordinal = route.slot as usize;
        self.trace.note(self.now, || {
            format!("packet {id} of flow {index} goes to {ordinal}: {part:?}")
        });
        let outgoing = Outgoing::new(id, framed);
        let longest = &mut self.report.longest_packet_bytes;
        *longest = (*longest).max(outgoing.bytes() as u64);
        self.ledger
            .wait(id, route.generation as usize, outgoing.bytes());
        self.admit(side, route, flow, outgoing);
        touched.push((side, ordinal));
    }

    // From the socket to the interface.

    fn on_arrive(&mut self, stream: usize, segment: u64, transmission: u64) {
        let mut bytes = Vec::new();
        let direction = self.streams[stream].direction;
        let back = &self.scenario.paths[1 - direction];
        let which = (segment, transmission);
        self.streams[stream].arrive(self.now, which, back, &mut self.agenda, &mut bytes);
        // What goes up arrives at the server.
        let side = 1 - direction;
        let end = &mut self.ends[side];
        let mut connections = end.connections.iter_mut().flatten();
        let Some(connection) = connections.find(|connection| connection.inbound == stream) else {
            return;
        };
        let ordinal = connection.ordinal;
        let offloads = self.scenario.offloads.map(|offloads| offloads[side]);
        let received = connection.receive(&bytes, offloads);
        for (header, packet) in received {
            self.check_way_back(side, ordinal, &packet);
            for arrival in self.ledger.arrive(stream, header, &packet) {
                self.on_arrival(arrival, direction);
            }
        }
    }

    /// As long as nothing has happened to connections, replies take the connection that the packet came by.
    fn check_way_back(&self, side: usize, ordinal: usize, packet: &[u8]) {
        if self.scenario.deaths.is_empty() && self.scenario.silences.is_empty() {
            let reply = turned_round(packet);
            let destination = packet::destination(&reply).expect("a packet");
            let back = self.ends[side]
                .routes
                .lookup(destination, flow_hash(&reply));
            assert_eq!(back.map(|route| route.slot as usize), Some(ordinal));
        }
    }

    fn on_arrival(&mut self, arrival: Arrival, direction: usize) {
        let Arrival {
            flow,
            segments,
            packet_bytes,
            is_marked,
            entered_at,
            ..
        } = arrival;
        let back = self.scenario.paths[1 - direction].delay;
        self.tell(flow, segments, is_marked, back);
        if !self.measures {
            return;
        }
        self.report.bytes[direction] += packet_bytes as u64;
        let is_call = self.ledger.shape(flow).protocol == Protocol::Udp;
        if is_call && entered_at >= self.scenario.measures_at {
            let idle = self.scenario.paths[direction].delay;
            let took = self.now.since(entered_at);
            self.report.waits.push(took.saturating_sub(idle));
        }
    }

    // What goes wrong.

    fn on_die(&mut self, ordinal: usize) {
        let death = self.scenario.deaths.iter().find(|death| death.1 == ordinal);
        let Some(&(_, _, learn)) = death else {
            return;
        };
        for (side, after) in learn.into_iter().enumerate() {
            let Some(connection) = &self.ends[side].connections[ordinal] else {
                continue;
            };
            let stream = connection.outbound;
            self.streams[stream].die();
            self.agenda
                .at(self.now + after, Event::Learn { side, stream });
        }
    }

    fn on_learn(&mut self, side: usize, stream: usize) {
        let Some((_, ordinal)) = self.sender_of(stream) else {
            return;
        };
        let Some(mut connection) = self.ends[side].connections[ordinal].take() else {
            return;
        };
        for outgoing in connection.queue.drain() {
            self.ends[side].pool.release(&outgoing);
        }
        for (flow, segments) in self.ledger.lose(stream) {
            self.tell(flow, segments, true, LOST_AFTER);
        }
        self.route(side);
        self.learned[ordinal] += 1;
        if self.learned[ordinal] == self.ends.len() {
            self.learned[ordinal] = 0;
            let streams = self.new_streams();
            let at = self.now + self.scenario.round_trip();
            for side in 0..2 {
                let event = Event::Return {
                    side,
                    ordinal,
                    streams,
                };
                self.agenda.at(at, event);
            }
        }
    }

    // When all is over.

    fn check_end(&self) {
        self.ledger.check_settled();
        for end in &self.ends {
            assert!(end.pool.is_all_free(), "{:?}", end.pool);
            for connection in end.connections.iter().flatten() {
                assert!(connection.queue.is_empty());
                assert_eq!(connection.ahead_bytes(), 0);
            }
        }
        for flow in &self.flows {
            assert_eq!(flow.in_flight, 0, "{:?}", flow.shape);
        }
        let totals = self.ledger.totals;
        if self.scenario.promise != Promise::Accounts {
            assert_eq!(totals.lost, 0);
        }
    }
}
