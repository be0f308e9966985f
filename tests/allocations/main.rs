//! The packet path allocates nothing in steady state: workers on real rings, joined by real TCP and real TLS, under an
//! allocator that counts for every thread.

#[expect(unsafe_code, reason = "an allocator is an unsafe trait")]
mod counting;
#[allow(dead_code, reason = "the tests of the packet path need more of it")]
#[path = "../packet_path/end.rs"]
mod end;
#[allow(dead_code, reason = "the tests of the packet path need more of it")]
#[path = "../packet_path/packets.rs"]
mod packets;

use end::{End, Joined, TUN_STAND_IN_PACKETS, Terms, join};
use packets::*;
use ringtun::proto::offload::{Offloads, VirtioNetHdr};
use ringtun::uring::buffer::BUDGET_BYTES_DEFAULT;
use rstest::rstest;
use std::sync::{Mutex, PoisonError};

/// How the workers' threads are called.
pub const WORKER_NAME: &str = "ringtun-w";
/// Packets each way in a burst: what stands for a TUN queue takes so many.
const BURST: usize = TUN_STAND_IN_PACKETS as usize;
/// Bursts that let buffers and queues grow to what they need.
const WARM_UP_BURSTS: usize = 500;
const BURSTS: usize = 2500;
/// Packets per allocation, at least. What is left is the egress queue's, which grows with the longest backlog so far, and
/// gives its memory back after a while without any.
const PACKETS_PER_ALLOCATION_MIN: u64 = 1000;

/// Other workers in this process would be counted as well.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A burst to the host on the internet and a burst back.
struct Traffic {
    there: Vec<(VirtioNetHdr, Vec<u8>)>,
    back: Vec<(VirtioNetHdr, Vec<u8>)>,
}

impl Traffic {
    /// Bursts of one flow, in which packets can be gathered.
    fn of_one_flow() -> Self {
        let packets = |from, to| {
            let packet = |index| udp(from, to, &pattern(index, 200));
            (0..BURST)
                .map(|index| (VirtioNetHdr::PLAIN, packet(index)))
                .collect()
        };
        Self {
            there: packets((CLIENT, 5000), (WEB, 53)),
            back: packets((WEB, 53), (CLIENT, 5000)),
        }
    }

    /// Bursts of several flows: many small packets, full segments, a super-packet.
    fn mixed() -> Self {
        let plain = |packet| (VirtioNetHdr::PLAIN, packet);
        let sizes = [0, 12, 300, 1472, 64, 1472, 40];
        let flow = |index: usize| 5000 + index as u16;
        let mut there: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(index, &bytes)| {
                plain(udp(
                    (CLIENT, flow(index)),
                    (WEB, 53),
                    &pattern(index, bytes),
                ))
            })
            .collect();
        there.push(super_packet(1, &pattern(9, 40 * usize::from(GSO_BYTES))));
        let back = sizes
            .iter()
            .chain(&[1000])
            .enumerate()
            .map(|(index, &bytes)| {
                plain(udp(
                    (WEB, 53),
                    (CLIENT, flow(index)),
                    &pattern(index, bytes),
                ))
            })
            .collect();
        let traffic = Self { there, back };
        assert_eq!((traffic.there.len(), traffic.back.len()), (BURST, BURST));
        traffic
    }

    /// Sends a burst each way and waits until all of it has arrived; gives how many packets those were.
    ///
    /// One that is segmented arrives as many.
    fn pass(&self, client: &End, server: &End, at_server: usize) -> u64 {
        for (index, ((out, there), (reply, back))) in self.there.iter().zip(&self.back).enumerate()
        {
            client.send(index % client.tun.len(), *out, there);
            server.send(index % server.tun.len(), *reply, back);
        }
        for _ in 0..at_server {
            server.receive_any();
        }
        for _ in 0..self.back.len() {
            client.receive_any();
        }
        (at_server + self.back.len()) as u64
    }
}

#[rstest]
#[case::super_packets_go_whole(Traffic::mixed(), 1, 1, Some(Offloads::ALL), 0)]
#[case::super_packets_are_segmented(Traffic::mixed(), 1, 1, None, 39)]
#[case::packets_are_gathered(Traffic::of_one_flow(), 1, 1, Some(Offloads::ALL), 0)]
#[case::packets_are_handed_over(Traffic::mixed(), 2, 4, Some(Offloads::ALL), 0)]
fn packets_cost_no_allocation(
    #[case] traffic: Traffic,
    #[case] workers: usize,
    #[case] connections: usize,
    #[case] offload: Option<Offloads>,
    #[case] more_segments: usize,
) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut client = End::with(workers, BUDGET_BYTES_DEFAULT);
    let mut server = End::with(workers, BUDGET_BYTES_DEFAULT);
    let terms = Terms {
        connections,
        offload,
        ..Terms::default()
    };
    let _joined: Joined = join(&mut client, &mut server, &terms);
    let at_server = BURST + more_segments;
    for _ in 0..WARM_UP_BURSTS {
        traffic.pass(&client, &server, at_server);
    }
    let before = counting::by_threads_named(WORKER_NAME);
    assert_eq!(before.len(), 2 * workers, "threads");
    assert!(before.values().all(|&count| count > 0), "they are counted");

    counting::watch();
    let packets: u64 = (0..BURSTS)
        .map(|_| traffic.pass(&client, &server, at_server))
        .sum();
    let after = counting::by_threads_named(WORKER_NAME);
    let culprits = counting::culprits();

    assert_eq!((client.dropped(), server.dropped()), (0, 0));
    for (thread, allocations) in after {
        let allocations = allocations - before[&thread];
        println!("thread {thread}: {allocations} allocations, {packets} packets");
        assert!(
            allocations * PACKETS_PER_ALLOCATION_MIN < packets,
            "{allocations} allocations for {packets} packets:{culprits}"
        );
    }
}

/// The allocator sees what it is there for.
#[test]
fn an_allocation_is_counted_for_its_thread() {
    const NAME: &str = "allocating";
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name(NAME.to_owned());
    let thread = thread
        .spawn(move || {
            ready.send(()).unwrap();
            while told.recv().is_ok() {
                for number in 0..100 {
                    std::hint::black_box(Box::new(number));
                }
                ready.send(()).unwrap();
            }
        })
        .unwrap();
    let count = || {
        is_ready.recv().unwrap();
        let counts = counting::by_threads_named(NAME);
        assert_eq!(counts.len(), 1);
        counts.into_values().sum::<u64>()
    };
    let before = count();
    tell.send(()).unwrap();
    let allocations = count() - before;
    assert!((100..200).contains(&allocations), "{allocations}");
    drop(tell);
    thread.join().unwrap();
}
