//! Two ends, the path between them, and those who send, in made-up time.

use crate::agenda::{Agenda, Event, Trace};
use crate::dice::Dice;
use crate::end::{
    CHUNK_BYTES, Connection, End, HELD_BACK_INTERVAL, LARGE, LOOK_INTERVAL, Outgoing, PAUSE,
    Sealing, Sending, Staging, UNSENT_BYTES_MAX, sealed_bytes_max,
};
use crate::ledger::{Arrival, Held, Ledger, Totals};
use crate::packets::{CLIENT, CLIENT_V6, Part, Protocol, Shape, turned_round};
use crate::scenario::{Manner, Promise, Scenario};
use crate::stream::{Control, Stream};
use ringtun::proto::egress_queue::{Admit, Bounds, Place, Queued, Verdict};
use ringtun::proto::flow_hash::flow_hash;
use ringtun::proto::offload::{Offloads, VIRTIO_NET_HDR_BYTES};
use ringtun::proto::packet;
use ringtun::proto::route_table::ConnectionRef;
use ringtun::proto::timer::Instant;
use std::net::IpAddr;
use std::time::Duration;

const CLIENT_SIDE: usize = 0;
/// How long a write takes until the worker knows of it.
const WRITE_TIME: Duration = Duration::from_micros(20);
/// After this a sender knows that a connection took his packets along.
const LOST_AFTER: Duration = Duration::from_millis(300);
/// By now nothing is under way any more, or never will be.
const PATIENCE: Duration = Duration::from_secs(120);
const EVENTS_MAX: u64 = 2_000_000;
const PACKET_BYTES_MAX: usize = 65_000;

/// One who sends.
struct Flow {
    shape: Shape,
    manner: Manner,
    place: u32,
    identification: u16,
    /// In segments; for those who react.
    window: f64,
    slow_start: bool,
    in_flight: usize,
    cut_at: Instant,
    /// A cut that its packets have yet to tell the other side of.
    owes_cwr: bool,
}

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
        let flows = scenario.flows.iter().map(|(shape, manner)| Flow {
            shape: *shape,
            manner: *manner,
            place: 1,
            identification: 65_000,
            window: 10.0,
            slow_start: true,
            in_flight: 0,
            cut_at: Instant::ZERO,
            owes_cwr: false,
        });
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

    // From the interface to the socket.

    fn admit(&mut self, side: usize, route: ConnectionRef, flow: u32, mut outgoing: Outgoing) {
        let bytes_max = self.scenario.queue_bytes_max;
        let Some(mut connection) = self.ends[side].connections[route.slot as usize].take() else {
            panic!("a route leads to a connection that is there");
        };
        let pool = &mut self.ends[side].pool;
        let bounds = if connection.queue.is_backlogged() {
            pool.shrink(&mut outgoing);
            pool.bounds(bytes_max, 1)
        } else {
            Bounds::of_bytes(bytes_max)
        };
        let has_room = bounds.slots_max[outgoing.class()] > 0;
        let admit = connection.queue.push(self.now, flow, outgoing, &bounds);
        self.drop_excess(side, &mut connection, admit, &bounds);
        if has_room {
            check_slots(&connection, &bounds);
        }
        self.check_queue(&connection);
        self.ends[side].connections[route.slot as usize] = Some(connection);
    }

    fn drop_excess(
        &mut self,
        side: usize,
        connection: &mut Connection,
        admit: Admit,
        bounds: &Bounds,
    ) {
        let mut dropped = 0;
        while let Some(outgoing) = connection.queue.take_dropped() {
            let (id, bytes) = (outgoing.id, outgoing.bytes());
            self.trace
                .note(self.now, || format!("packet {id} is too much"));
            self.forget_dropped(side, &outgoing, bytes);
            dropped += 1;
        }
        assert_eq!(admit == Admit::Overflow, dropped > 0);
        assert!(connection.queue.bytes() <= bounds.bytes_max);
    }

    fn forget_dropped(&mut self, side: usize, outgoing: &Outgoing, bytes: usize) {
        self.ledger.drop(outgoing.id, bytes);
        self.tell_of_drop(outgoing);
        self.ends[side].pool.release(outgoing);
    }

    fn tell_of_drop(&mut self, outgoing: &Outgoing) {
        let flow = self.ledger.flow(outgoing.id);
        let shape = self.ledger.shape(flow);
        let payload = outgoing.packet().len() - shape.header_bytes();
        let segments = payload.div_ceil(shape.segment_bytes.max(1)).max(1);
        self.tell(flow, segments, true, self.scenario.round_trip());
    }

    /// What waits is what has come and not gone.
    fn check_queue(&self, connection: &Connection) {
        let held = Held {
            packets: connection.queue.len(),
            bytes: connection.queue.bytes(),
        };
        assert_eq!(held, self.ledger.waiting(connection.outbound));
        assert!(held.bytes <= self.scenario.queue_bytes_max);
        assert_eq!(connection.queue.is_empty(), held.packets == 0);
    }

    fn sender_of(&self, stream: usize) -> Option<(usize, usize)> {
        (0..2).find_map(|side| {
            let mut connections = self.ends[side].connections.iter().flatten();
            let connection = connections.find(|connection| connection.outbound == stream)?;
            Some((side, connection.ordinal))
        })
    }

    fn pump(&mut self, side: usize, ordinal: usize) {
        let Some(mut connection) = self.ends[side].connections[ordinal].take() else {
            return;
        };
        self.seal_packets(side, &mut connection);
        self.send(&mut connection);
        self.check_queue(&connection);
        self.ends[side].connections[ordinal] = Some(connection);
    }

    fn seal_packets(&mut self, side: usize, connection: &mut Connection) {
        let now = self.now;
        let offloads = self.scenario.offloads.map(|offloads| offloads[1 - side]);
        let is_busy = connection.sending.is_some() || connection.limit.is_held_back(now);
        if is_busy || !connection.queue.is_empty() {
            self.look(connection, is_busy);
        }
        if connection.limit.is_held_back(now) {
            if !connection.pausing && !connection.queue.is_empty() {
                connection.pausing = true;
                let stream = connection.outbound;
                self.agenda.at(now + PAUSE, Event::Paused { stream });
            }
            return;
        }
        connection.queue.be_lenient(connection.limit.is_growing());
        let ahead_bytes_max = connection.limit.ahead_bytes_max() as usize;
        let mut staging = Staging::default();
        let mut scratch = std::mem::take(&mut self.ends[side].staging_scratch);
        while let Some(popped) = connection.queue.pop(now) {
            let Some(outgoing) = self.heed(side, popped.verdict, popped.packet) else {
                continue;
            };
            let accepts = offloads.unwrap_or(Offloads::NONE);
            let need = sealed_bytes_max(&outgoing, staging.bytes(), accepts);
            let ahead_bytes = connection.ahead_bytes();
            if ahead_bytes + staging.bytes() > 0 && ahead_bytes + need > ahead_bytes_max {
                self.wait(side, connection, popped.place, outgoing);
                break;
            }
            if connection.fill.len() + need > CHUNK_BYTES {
                seal_staged(connection, &mut staging, offloads);
                self.send(connection);
                if !connection.fill.is_empty() {
                    self.wait(side, connection, popped.place, outgoing);
                    break;
                }
            }
            let mut sealing = Sealing {
                staging: &mut staging,
                chunk: &mut connection.fill,
                offloads,
            };
            sealing.packet(&outgoing, &mut scratch);
            let id = outgoing.id;
            self.trace.note(now, || format!("packet {id} is sealed"));
            self.ledger.seal(id, outgoing.bytes());
            self.ends[side].pool.release(&outgoing);
        }
        seal_staged(connection, &mut staging, offloads);
        self.ends[side].staging_scratch = scratch;
    }

    fn look(&mut self, connection: &mut Connection, is_busy: bool) {
        let now = self.now;
        let interval = if connection.limit.is_held_back(now) {
            HELD_BACK_INTERVAL
        } else {
            LOOK_INTERVAL
        };
        if now.since(connection.looked_at) < interval {
            return;
        }
        connection.looked_at = now;
        let stream = &mut self.streams[connection.outbound];
        let sample = stream.sample(is_busy);
        connection.limit.observe(now, sample);
        let wanted = connection.limit.ahead_bytes_max().min(UNSENT_BYTES_MAX);
        if wanted.abs_diff(connection.unsent_bytes_max) > connection.unsent_bytes_max / 4 {
            connection.unsent_bytes_max = wanted;
            stream.unsent_bytes_max = wanted;
        }
        let limit = &connection.limit;
        self.trace.note(now, || {
            format!(
                "stream {}: {sample:?} gives rate {:?}, ahead {}, under way {:?}",
                connection.outbound,
                limit.rate(),
                limit.ahead_bytes_max(),
                limit.under_way_bytes_max(now)
            )
        });
    }

    /// Counts what the queue decided. The packet, unless it was dropped.
    fn heed(&mut self, side: usize, verdict: Verdict, outgoing: Outgoing) -> Option<Outgoing> {
        if verdict == Verdict::Pass {
            return Some(outgoing);
        }
        let (id, after) = (outgoing.id, outgoing.bytes());
        self.trace
            .note(self.now, || format!("packet {id}: {verdict:?}"));
        let flow = self.ledger.flow(id);
        let trimmed = match verdict {
            Verdict::Trimmed => self.ledger.shape(flow).segment_bytes,
            _ => 0,
        };
        self.ledger.heed(id, verdict, after + trimmed, after);
        match verdict {
            Verdict::Drop => {
                self.tell_of_drop(&outgoing);
                self.ends[side].pool.release(&outgoing);
                return None;
            }
            Verdict::Trimmed => self.tell(flow, 1, true, self.scenario.round_trip()),
            Verdict::Pass | Verdict::Marked => {}
        }
        Some(outgoing)
    }

    fn wait(&mut self, side: usize, connection: &mut Connection, place: Place, outgoing: Outgoing) {
        let was_backlogged = connection.queue.is_backlogged();
        connection.queue.put_back(place, outgoing);
        if was_backlogged {
            return;
        }
        let pool = &mut self.ends[side].pool;
        connection.queue.repack(|outgoing| pool.shrink(outgoing));
        let held = connection.queue.slots()[LARGE];
        let bounds = pool.bounds(self.scenario.queue_bytes_max, held);
        let admit = connection.queue.keep_to(&bounds);
        self.drop_excess(side, connection, admit, &bounds);
        check_slots(connection, &bounds);
    }

    fn send(&mut self, connection: &mut Connection) {
        if connection.sending.is_none() && !connection.fill.is_empty() {
            let sending = Sending {
                chunk: std::mem::take(&mut connection.fill),
                sent: 0,
                taken: 0,
            };
            self.write(connection, sending);
        }
    }

    fn write(&mut self, connection: &mut Connection, mut sending: Sending) {
        let stream = connection.outbound;
        sending.taken = self.streams[stream].write(&sending.chunk[sending.sent..]);
        if sending.taken > 0 {
            self.agenda
                .at(self.now + WRITE_TIME, Event::Written { stream });
        }
        connection.sending = Some(sending);
        self.transmit(stream);
    }

    fn on_written(&mut self, stream: usize) {
        let Some((side, ordinal)) = self.sender_of(stream) else {
            return;
        };
        let Some(mut connection) = self.ends[side].connections[ordinal].take() else {
            return;
        };
        if let Some(mut sending) = connection.sending.take() {
            sending.sent += sending.taken;
            connection.limit.sent(sending.taken);
            if sending.sent < sending.chunk.len() {
                self.write(&mut connection, sending);
            }
        }
        self.ends[side].connections[ordinal] = Some(connection);
        self.pump(side, ordinal);
    }

    fn transmit(&mut self, stream: usize) {
        let stream = &mut self.streams[stream];
        let path = &mut self.scenario.paths[stream.direction];
        stream.transmit(self.now, path, &mut self.dice, &mut self.agenda);
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

fn check_slots(connection: &Connection, bounds: &Bounds) {
    let held = connection.queue.slots();
    assert!(
        (0..held.len()).all(|class| held[class] <= bounds.slots_max[class]),
        "{held:?} slots held, {bounds:?} allowed"
    );
}

fn seal_staged(connection: &mut Connection, staging: &mut Staging, offloads: Option<Offloads>) {
    let mut sealing = Sealing {
        staging,
        chunk: &mut connection.fill,
        offloads,
    };
    sealing.flush();
}

impl Flow {
    /// How many segments the next packet has, of one who reacts: an eighth of the window, as TCP does it.
    fn may_send(&self) -> Option<usize> {
        let most = PACKET_BYTES_MAX / self.shape.segment_bytes;
        let burst = ((self.window / 8.0) as usize).clamp(1, most);
        let room = (self.window as usize).saturating_sub(self.in_flight);
        (room >= burst.div_ceil(2)).then_some(burst.min(room))
    }

    fn next_part(&mut self, segments: usize, dice: &mut Dice) -> Part {
        let Shape {
            protocol,
            segment_bytes,
            ..
        } = self.shape;
        let most = match protocol {
            Protocol::Acks => 1,
            Protocol::Tcp | Protocol::Udp => PACKET_BYTES_MAX / segment_bytes,
        };
        let segments = segments.min(most);
        let least = match protocol {
            Protocol::Udp => crate::packets::NUMBER_BYTES,
            Protocol::Tcp => 1,
            Protocol::Acks => 0,
        };
        let is_short = protocol != Protocol::Acks && dice.percent(20);
        let last_bytes = match is_short {
            true => dice.between(least as u64, segment_bytes as u64) as usize,
            false => segment_bytes,
        };
        let part = Part {
            place: self.place,
            segments,
            last_bytes,
            identification: self.identification,
            cwr: self.owes_cwr,
            is_end: is_short,
        };
        self.place += match protocol {
            Protocol::Tcp => ((segments - 1) * segment_bytes + last_bytes) as u32,
            Protocol::Udp | Protocol::Acks => segments as u32,
        };
        self.identification = self.identification.wrapping_add(segments as u16);
        self.owes_cwr = false;
        part
    }

    /// The window grows by a few segments a round trip and is cut at most once in one, about as CUBIC's (RFC 9438).
    fn hear(&mut self, now: Instant, segments: usize, congestion: bool, round_trip: Duration) {
        const GROWTH_SEGMENTS: f64 = 3.0;
        self.in_flight -= segments;
        if congestion {
            self.slow_start = false;
            if now.since(self.cut_at) > round_trip {
                self.cut_at = now;
                self.window = (self.window * 0.7).max(2.0);
                // Also without ECT: so does who sends something again (RFC 3168 section 6.1.5).
                self.owes_cwr = self.shape.protocol == Protocol::Tcp;
            }
        } else if self.slow_start {
            self.window += segments as f64;
        } else {
            self.window += GROWTH_SEGMENTS * segments as f64 / self.window;
        }
    }
}
