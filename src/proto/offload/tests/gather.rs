//! What is gathered is segmented again to what it was, and a model that knows packets only by their description says what
//! may be gathered.

use super::*;

/// A packet of UDP, and what keeps it from being gathered.
#[derive(Clone, Debug)]
struct Sample {
    v6: bool,
    hosts: [u8; 2],
    ports: [u16; 2],
    traffic_class: u8,
    hop_limit: u8,
    flow_label: u32,
    dont_fragment: bool,
    identification: u16,
    checksum: Sum,
    fault: Option<Fault>,
    payload: Vec<u8>,
}

/// What the kernel says of a checksum that is right.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sum {
    /// It is yet to be completed.
    Partial,
    /// It has been checked.
    Checked,
    /// Nothing.
    Unknown,
}

const SUMS: [Sum; 3] = [Sum::Partial, Sum::Checked, Sum::Unknown];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Tcp,
    Options,
    MoreFragments,
    FragmentOffset,
    TrailingByte,
    UdpLength,
    WrongChecksum,
    NoChecksum,
    WrongIpChecksum,
    ChecksumElsewhere,
    SuperPacket,
}

const FAULTS: [Fault; 11] = [
    Fault::Tcp,
    Fault::Options,
    Fault::MoreFragments,
    Fault::FragmentOffset,
    Fault::TrailingByte,
    Fault::UdpLength,
    Fault::WrongChecksum,
    Fault::NoChecksum,
    Fault::WrongIpChecksum,
    Fault::ChecksumElsewhere,
    Fault::SuperPacket,
];

impl Sample {
    fn new(v6: bool) -> Self {
        Self {
            v6,
            hosts: [2, 80],
            ports: [5000, 443],
            traffic_class: 0,
            hop_limit: 63,
            flow_label: 0x12345,
            dont_fragment: false,
            identification: 0xfff0,
            checksum: Sum::Unknown,
            fault: None,
            payload: payload(64, 1),
        }
    }

    /// The packet after this one of the same flow.
    fn next(&self) -> Self {
        Self {
            identification: self.identification.wrapping_add(1),
            payload: payload(self.payload.len(), self.identification as u8),
            ..self.clone()
        }
    }

    fn offset(&self) -> usize {
        match (self.v6, self.fault) {
            (true, Some(Fault::Options)) => 48,
            (true, _) => 40,
            (false, Some(Fault::Options)) => 24,
            (false, _) => 20,
        }
    }

    /// The packet with a complete checksum.
    fn complete(&self) -> Vec<u8> {
        let has_options = self.fault == Some(Fault::Options);
        let [from, to] = self.hosts;
        let protocol = match self.fault {
            Some(Fault::Tcp) => IpNumber::TCP,
            _ => IpNumber::UDP,
        };
        let ip = if self.v6 {
            let address = |host| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host).octets();
            let header = Ipv6Header {
                traffic_class: self.traffic_class,
                flow_label: self.flow_label.try_into().expect("20 bits"),
                hop_limit: self.hop_limit,
                source: address(from.into()),
                destination: address(to.into()),
                ..Default::default()
            };
            let options = Ipv6RawExtHeader::new_raw(protocol, &[1, 4, 0, 0, 0, 0]).expect("short");
            let extensions = Ipv6Extensions {
                hop_by_hop_options: has_options.then_some(options),
                ..Default::default()
            };
            IpHeaders::Ipv6(header, extensions)
        } else {
            let (from, to) = ([10, 87, 0, from], [203, 0, 113, to]);
            let mut header = Ipv4Header::new(0, self.hop_limit, protocol, from, to).expect("short");
            header.dscp = (self.traffic_class >> 2).try_into().expect("6 bits");
            header.ecn = (self.traffic_class & 3).try_into().expect("2 bits");
            header.identification = self.identification;
            header.dont_fragment = self.dont_fragment;
            if has_options {
                // They do not show in the header's sum.
                header.options = Ipv4Options::from([0; 4]);
            }
            IpHeaders::Ipv4(header, Default::default())
        };
        let mut packet = Vec::new();
        let builder = PacketBuilder::ip(ip);
        let [from, to] = self.ports;
        if protocol == IpNumber::TCP {
            let builder = builder.tcp(from, to, 1, 1);
            builder.write(&mut packet, &self.payload).expect("fits");
        } else {
            let builder = builder.udp(from, to);
            builder.write(&mut packet, &self.payload).expect("fits");
        }
        packet
    }

    /// What the TUN queue gives, and what the receiver is to have in the end.
    fn packet(&self) -> (VirtioNetHdr, Vec<u8>, Vec<u8>) {
        let mut complete = self.complete();
        let offset = self.offset();
        let field = offset + 6;
        let udp = self.fault != Some(Fault::Tcp);
        match self.fault {
            Some(Fault::MoreFragments) => set_ipv4_word(&mut complete, 6, 0x2000),
            Some(Fault::FragmentOffset) => set_ipv4_word(&mut complete, 6, 1),
            Some(Fault::TrailingByte) => complete.push(0),
            Some(Fault::UdpLength) => complete[offset + 5] ^= 1,
            Some(Fault::WrongChecksum) => complete[field] ^= 0x40,
            Some(Fault::NoChecksum) => complete[field..field + 2].fill(0),
            Some(Fault::WrongIpChecksum) if !self.v6 => complete[10] ^= 1,
            Some(Fault::SuperPacket) => {
                let (hdr, packet) = self.partial(&complete);
                let hdr = VirtioNetHdr {
                    gso_type: GSO_UDP_L4,
                    gso_size: 1 + self.payload.len() as u16 / 2,
                    ..hdr
                };
                return (hdr, packet, complete);
            }
            _ => {}
        }
        let without = matches!(self.fault, Some(Fault::NoChecksum | Fault::UdpLength));
        match self.checksum {
            Sum::Partial if udp && !without => {
                let (mut hdr, mut packet) = self.partial(&complete);
                match self.fault {
                    Some(Fault::ChecksumElsewhere) => hdr.csum_offset += 2,
                    Some(Fault::WrongChecksum) => packet[field] ^= 0x40,
                    _ => {}
                }
                (hdr, packet, complete)
            }
            // The kernel also says so where there is none to be checked, but never of a wrong one.
            Sum::Checked if self.fault != Some(Fault::WrongChecksum) => {
                let flags = FLAG_DATA_VALID;
                let hdr = VirtioNetHdr {
                    flags,
                    ..VirtioNetHdr::PLAIN
                };
                (hdr, complete.clone(), complete)
            }
            _ => (VirtioNetHdr::PLAIN, complete.clone(), complete),
        }
    }

    fn partial(&self, complete: &[u8]) -> (VirtioNetHdr, Vec<u8>) {
        let mut packet = complete.to_vec();
        let addresses = if self.v6 { 8..40 } else { 12..20 };
        let pseudo_header = packet[addresses]
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .chain([17, 8 + self.payload.len() as u32])
            .sum::<u32>();
        let folded = (pseudo_header >> 16) + (pseudo_header & 0xffff);
        let folded = (folded >> 16) + (folded & 0xffff);
        let field = self.offset() + 6;
        packet[field..field + 2].copy_from_slice(&(folded as u16).to_be_bytes());
        let hdr = VirtioNetHdr {
            flags: FLAG_NEEDS_CSUM,
            csum_start: self.offset() as u16,
            csum_offset: UDP_CSUM_OFFSET,
            ..VirtioNetHdr::PLAIN
        };
        (hdr, packet)
    }

    fn has_fault(&self) -> bool {
        match self.fault {
            None => false,
            // There is no such thing in this packet.
            Some(Fault::MoreFragments | Fault::FragmentOffset | Fault::WrongIpChecksum) => !self.v6,
            Some(Fault::ChecksumElsewhere) => self.checksum == Sum::Partial,
            Some(_) => true,
        }
    }

    /// The model: whether this may be the segment after `segments` others, the first of which is `first`.
    fn may_follow(&self, first: &Self, segments: usize) -> bool {
        let same = (self.v6, self.hosts, self.ports, self.traffic_class)
            == (first.v6, first.hosts, first.ports, first.traffic_class)
            && self.hop_limit == first.hop_limit;
        let same_family = if self.v6 {
            self.flow_label == first.flow_label
        } else {
            let counted = first.identification.wrapping_add(segments as u16);
            self.dont_fragment == first.dont_fragment
                && (self.dont_fragment || self.identification == counted)
        };
        same && same_family
            && segments < 64
            && first.payload.len() >= 48
            && self.payload.len() <= first.payload.len()
    }
}

fn set_ipv4_word(packet: &mut [u8], at: usize, word: u16) {
    if packet[0] >> 4 == 4 {
        packet[at..at + 2].copy_from_slice(&word.to_be_bytes());
        packet[10..12].fill(0);
        let header_bytes = usize::from(packet[0] & 0x0f) * 4;
        let checksum = Checksum::new().bytes(&packet[..header_bytes]).finish();
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// How many of the packets become one, each time.
fn expected_runs(samples: &[Sample], accepts: Offloads) -> Vec<usize> {
    let mut runs: Vec<usize> = Vec::new();
    // The run's first packet, as long as there may be another.
    let mut open: Option<&Sample> = None;
    for sample in samples {
        let taken = if sample.v6 {
            accepts.uso6
        } else {
            accepts.uso4
        } && accepts.csum;
        let eligible = taken && !sample.has_fault() && !sample.payload.is_empty();
        match (open, runs.last_mut()) {
            (Some(first), Some(segments)) if eligible && sample.may_follow(first, *segments) => {
                *segments += 1;
                open = (sample.payload.len() == first.payload.len()).then_some(first);
            }
            _ => {
                runs.push(1);
                open = eligible.then_some(sample);
            }
        }
    }
    runs
}

/// What is sent for packets that come one after the other, and how many each stands for.
fn gathered(
    packets: impl IntoIterator<Item = (VirtioNetHdr, Vec<u8>)>,
    accepts: Offloads,
) -> Vec<(usize, VirtioNetHdr, Vec<u8>)> {
    let mut sent: Vec<(usize, VirtioNetHdr, Vec<u8>)> = Vec::new();
    let mut run: Option<Run> = None;
    for (hdr, packet) in packets {
        let datagram = Datagram::read(hdr, &packet, accepts);
        if let (Some(run), Some(datagram), Some((count, hdr, whole))) =
            (&mut run, &datagram, sent.last_mut())
            && run.take(datagram)
        {
            *count += 1;
            whole.extend_from_slice(datagram.payload());
            *hdr = run.describe(whole);
            continue;
        }
        run = datagram.as_ref().map(Run::begin);
        sent.push((1, hdr, packet));
    }
    sent
}

fn from_tun(samples: &[Sample]) -> Vec<(VirtioNetHdr, Vec<u8>)> {
    let packets = samples.iter().map(Sample::packet);
    packets.map(|(hdr, packet, _)| (hdr, packet)).collect()
}

fn runs(samples: &[Sample]) -> Vec<usize> {
    let sent = gathered(from_tun(samples), Offloads::ALL);
    sent.iter().map(|(count, ..)| *count).collect()
}

/// Where IPv4 leaves the identification without a meaning, it is 0.
fn without_meaningless_identification(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        set_ipv4_word(&mut packet, 4, 0);
    }
    packet
}

/// From one packet to the next.
#[derive(Clone, Debug)]
enum Step {
    Next,
    Shorter(usize),
    Longer(usize),
    Empty,
    Identification(u16),
    Faulty(Fault),
    Checksum(Sum),
    Family,
    Host(usize),
    Port(usize),
    TrafficClass(u8),
    HopLimit,
    FlowLabel,
    DontFragment,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => Just(Step::Next),
        2 => (1..64_usize).prop_map(Step::Shorter),
        2 => (1..64_usize).prop_map(Step::Longer),
        1 => Just(Step::Empty),
        1 => any::<u16>().prop_map(Step::Identification),
        3 => prop::sample::select(FAULTS.to_vec()).prop_map(Step::Faulty),
        3 => prop::sample::select(SUMS.to_vec()).prop_map(Step::Checksum),
        1 => Just(Step::Family),
        1 => (0..2_usize).prop_map(Step::Host),
        1 => (0..2_usize).prop_map(Step::Port),
        1 => any::<u8>().prop_map(Step::TrafficClass),
        1 => Just(Step::HopLimit),
        1 => Just(Step::FlowLabel),
        1 => Just(Step::DontFragment),
    ]
}

impl Sample {
    /// The packet after this one, and what the one after that is like.
    fn step(&self, step: &Step) -> (Self, Self) {
        let mut next = self.next();
        let mut once = None;
        match *step {
            Step::Next => {}
            Step::Shorter(bytes) => {
                let bytes = next.payload.len().saturating_sub(bytes).max(1);
                once = Some(Self {
                    payload: payload(bytes, 9),
                    ..next.clone()
                });
            }
            Step::Longer(bytes) => next.payload.extend(payload(bytes, 7)),
            Step::Empty => {
                once = Some(Self {
                    payload: Vec::new(),
                    ..next.clone()
                })
            }
            Step::Identification(identification) => next.identification = identification,
            Step::Faulty(fault) => {
                once = Some(Self {
                    fault: Some(fault),
                    ..next.clone()
                })
            }
            Step::Checksum(checksum) => next.checksum = checksum,
            Step::Family => next.v6 = !next.v6,
            Step::Host(end) => next.hosts[end] ^= 1,
            Step::Port(end) => next.ports[end] ^= 1,
            Step::TrafficClass(class) => next.traffic_class = class,
            Step::HopLimit => next.hop_limit ^= 1,
            Step::FlowLabel => next.flow_label ^= 1,
            Step::DontFragment => next.dont_fragment = !next.dont_fragment,
        }
        (once.unwrap_or_else(|| next.clone()), next)
    }
}

prop_compose! {
    fn samples()(
        v6: bool,
        dont_fragment: bool,
        checksum in prop::sample::select(SUMS.to_vec()),
        bytes in 1..200_usize,
        steps in prop::collection::vec(step(), 0..300),
    ) -> Vec<Sample> {
        let first = Sample { dont_fragment, checksum, payload: payload(bytes, 3), ..Sample::new(v6) };
        let mut samples = vec![first.clone()];
        let mut last = first;
        for step in steps {
            let (packet, next) = last.step(&step);
            samples.push(packet);
            last = next;
        }
        samples
    }
}

proptest! {
    #[test]
    fn what_is_gathered_is_segmented_to_what_it_was(samples in samples(), accepts in prop::option::weighted(0.2, any::<[bool; 5]>())) {
        let accepts = accepts.map_or(Offloads::ALL, offloads);
        let sent = gathered(from_tun(&samples), accepts);
        let counts: Vec<usize> = sent.iter().map(|(count, ..)| *count).collect();
        prop_assert_eq!(&counts, &expected_runs(&samples, accepts));

        let mut rest = &samples[..];
        for (count, hdr, packet) in sent {
            let (these, later) = rest.split_at(count);
            rest = later;
            if let [alone] = these {
                let (alone_hdr, alone, _) = alone.packet();
                prop_assert_eq!((hdr, packet), (alone_hdr, alone));
                continue;
            }
            prop_assert_eq!(hdr.gso_type, GSO_UDP_L4);
            prop_assert_eq!(validate(hdr, &packet, accepts), Ok(hdr));
            prop_assert!(kernel_takes(hdr, &packet));
            let segments = segments(hdr, &packet, Offloads::NONE);
            prop_assert_eq!(segments.len(), count);
            for ((segment_hdr, segment), sample) in segments.iter().zip(these) {
                prop_assert_eq!(*segment_hdr, VirtioNetHdr::PLAIN);
                let (_, payload) = verify(segment);
                prop_assert_eq!(&payload, &sample.payload);
                let (.., complete) = sample.packet();
                prop_assert_eq!(
                    without_meaningless_identification(segment),
                    without_meaningless_identification(&complete)
                );
            }
        }
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn any_bytes_are_looked_at_without_panic(hdr: [u8; 10], mut packet in prop::collection::vec(any::<u8>(), 0..120), v6: Option<bool>) {
        if let (Some(v6), Some(first)) = (v6, packet.first_mut()) {
            *first = if v6 { 0x60 } else { 0x45 };
        }
        let hdr = VirtioNetHdr::read(&hdr);
        let sent = gathered([(hdr, packet.clone()), (hdr, packet.clone())], Offloads::ALL);
        if let [(2, hdr, whole)] = &sent[..] {
            prop_assert_eq!(validate(*hdr, whole, Offloads::ALL), Ok(*hdr));
        } else {
            prop_assert_eq!(sent, vec![(1, hdr, packet.clone()), (1, hdr, packet)]);
        }
    }
}

fn sequence(first: &Sample, count: usize) -> Vec<Sample> {
    std::iter::successors(Some(first.clone()), |last| Some(last.next()))
        .take(count)
        .collect()
}

#[test]
fn packets_of_a_flow_are_gathered_up_to_64() {
    for v6 in [false, true] {
        for checksum in SUMS {
            let first = Sample {
                checksum,
                ..Sample::new(v6)
            };
            assert_eq!(runs(&sequence(&first, 150)), [64, 64, 22]);
        }
    }
}

#[test]
fn a_super_packet_is_never_longer_than_an_ip_packet() {
    for v6 in [false, true] {
        let first = Sample {
            payload: payload(1472, 1),
            ..Sample::new(v6)
        };
        assert_eq!(runs(&sequence(&first, 50)), [44, 6]);
    }
}

#[test]
fn a_shorter_packet_ends_a_run_and_a_longer_one_begins_another() {
    for v6 in [false, true] {
        let mut samples = sequence(&Sample::new(v6), 10);
        samples[3].payload.truncate(63);
        samples[6].payload.push(1);
        samples[8].payload.clear();
        assert_eq!(runs(&samples), [4, 2, 2, 1, 1]);
    }
}

#[test]
fn any_difference_ends_a_run() {
    type Differ = fn(&mut Sample);
    let differences: [(&str, Differ); 9] = [
        ("source", |sample| sample.hosts[0] += 1),
        ("destination", |sample| sample.hosts[1] += 1),
        ("source port", |sample| sample.ports[0] += 1),
        ("destination port", |sample| sample.ports[1] += 1),
        ("DSCP", |sample| sample.traffic_class = 0xb8),
        ("ECN", |sample| sample.traffic_class = 3),
        ("hop limit", |sample| sample.hop_limit -= 1),
        ("flow label or DF", |sample| {
            sample.flow_label += 1;
            sample.dont_fragment = !sample.dont_fragment;
        }),
        ("family", |sample| sample.v6 = !sample.v6),
    ];
    for v6 in [false, true] {
        for (what, differ) in differences {
            let mut samples = sequence(&Sample::new(v6), 5);
            differ(&mut samples[2]);
            assert_eq!(runs(&samples), [2, 1, 2], "{what}, v6: {v6}");
        }
    }
}

#[test]
fn what_has_a_fault_stays_alone() {
    for v6 in [false, true] {
        for checksum in SUMS {
            for fault in FAULTS {
                let first = Sample {
                    checksum,
                    ..Sample::new(v6)
                };
                let mut samples = sequence(&first, 5);
                for sample in &mut samples[2..4] {
                    sample.fault = Some(fault);
                }
                let expected: &[usize] = if samples[2].has_fault() {
                    &[2, 1, 1, 1]
                } else {
                    &[5]
                };
                assert_eq!(runs(&samples), expected, "{fault:?} {checksum:?} v6: {v6}");
            }
        }
    }
}

#[test]
fn without_df_the_identification_has_to_count_on() {
    let mut samples = sequence(&Sample::new(false), 6);
    samples[2].identification = samples[1].identification;
    assert_eq!(runs(&samples), [2, 1, 3]);
    for sample in &mut samples {
        sample.dont_fragment = true;
    }
    assert_eq!(runs(&samples), [6]);
}

#[test]
fn a_checksum_of_zero_is_sent_as_ones_again() {
    let mut samples = sequence(&Sample::new(false), 2);
    let bytes = samples[1].payload.len();
    samples[1].payload[bytes - 2..].fill(0);
    let checksum = samples[1].complete()[26..28].to_vec();
    samples[1].payload[bytes - 2..].copy_from_slice(&checksum);
    let complete = samples[1].complete();
    assert_eq!(complete[26..28], [0xff, 0xff]);
    let sent = gathered(from_tun(&samples), Offloads::ALL);
    let [(2, hdr, whole)] = &sent[..] else {
        panic!("not gathered: {sent:?}");
    };
    assert_eq!(segments(*hdr, whole, Offloads::NONE)[1].1, complete);
}

#[test]
fn a_peer_without_uso_of_the_family_gets_packets_one_by_one() {
    for v6 in [false, true] {
        let packets = from_tun(&sequence(&Sample::new(v6), 3));
        for (accepts, gathers) in [
            (Offloads::ALL, true),
            (
                Offloads {
                    uso4: false,
                    ..Offloads::ALL
                },
                v6,
            ),
            (
                Offloads {
                    uso6: false,
                    ..Offloads::ALL
                },
                !v6,
            ),
            (
                Offloads {
                    csum: false,
                    ..Offloads::ALL
                },
                false,
            ),
        ] {
            let sent = gathered(packets.clone(), accepts);
            assert_eq!(
                sent.len(),
                if gathers { 1 } else { 3 },
                "{accepts} v6: {v6}"
            );
        }
    }
}

#[test]
#[should_panic(expected = "all payload is there")]
fn a_run_describes_no_other_packet() {
    let (hdr, mut packet, _) = Sample::new(false).packet();
    let copy = packet.clone();
    let datagram = Datagram::read(hdr, &copy, Offloads::ALL).expect("eligible");
    packet.push(0);
    Run::begin(&datagram).describe(&mut packet);
}
