//! In virtual time everything is exact.

use proptest::prelude::*;

use super::*;
use crate::wire::{Loss, Reordering, Timetable};

const MEGA: u64 = 1_000_000;
const FRAME_BYTES: usize = 1500;

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn us(microseconds: u64) -> Duration {
    Duration::from_micros(microseconds)
}

fn lane(conditions: Conditions) -> Lane<u64> {
    Lane::new(conditions, 1)
}

/// Everything that still arrives, with its time.
fn rest(lane: &mut Lane<u64>) -> Vec<(Duration, u64)> {
    let mut arrived = Vec::new();
    while let Some(at) = lane.next_at() {
        arrived.extend(std::iter::from_fn(|| lane.pop(at)));
    }
    arrived
}

#[test]
fn the_rate_is_exact() {
    // 33 Mbit/s does not divide anything.
    let mut lane = lane(Conditions {
        rate_bits_per_second: Some(33 * MEGA),
        delay: ms(20),
        ..Conditions::default()
    });
    for packet in 0..10_000 {
        lane.push(Duration::ZERO, FRAME_BYTES, packet);
    }
    for (index, (at, packet)) in rest(&mut lane).into_iter().enumerate() {
        let bits = (index as u128 + 1) * FRAME_BYTES as u128 * 8;
        let left = (bits * 1_000_000_000).div_ceil(33_000_000) as u64;
        assert_eq!(at, Duration::from_nanos(left) + ms(20));
        assert_eq!(packet, index as u64);
    }
    assert_eq!(lane.counts().delivered, 10_000);
}

#[test]
fn without_a_rate_only_the_delay_counts() {
    let mut lane = lane(Conditions {
        delay: ms(20),
        ..Conditions::default()
    });
    lane.push(ms(5), 60_000, 1);
    lane.push(ms(5), 60_000, 2);
    assert_eq!(lane.pop(ms(25) - Duration::from_nanos(1)), None);
    assert_eq!(rest(&mut lane), [(ms(25), 1), (ms(25), 2)]);
    assert!(lane.is_empty());
}

#[test]
fn the_queue_drops_at_its_tail_and_takes_any_first_packet() {
    let mut lane = lane(Conditions {
        rate_bits_per_second: Some(20 * MEGA),
        queue_bytes: 1_000_000,
        ..Conditions::default()
    });
    for packet in 0..1000 {
        lane.push(Duration::ZERO, FRAME_BYTES, packet);
    }
    let (kept, dropped) = (666, 334);
    assert_eq!(lane.counts().dropped, dropped);
    assert_eq!(lane.waiting_bytes(), kept * FRAME_BYTES as u64);
    let arrived = rest(&mut lane);
    assert_eq!(arrived.len() as u64, kept);
    // A full queue of a megabyte is four tenths of a second at 20 Mbit/s.
    assert_eq!(arrived.last(), Some(&(us(600 * kept), kept - 1)));
    lane.push(ms(500), 2_000_000, 1);
    lane.push(ms(500), 1, 2);
    assert_eq!(rest(&mut lane), [(ms(1300), 1)]);
}

#[test]
fn a_new_rate_counts_for_what_is_left_of_a_packet() {
    let mut lane = lane(Conditions {
        rate_bits_per_second: Some(12 * MEGA),
        ..Conditions::default()
    });
    lane.push(Duration::ZERO, FRAME_BYTES, 1);
    lane.push(Duration::ZERO, FRAME_BYTES, 2);
    // 1500 bytes take a millisecond; half of them have left.
    lane.change(us(500), Change::Rate(Some(6 * MEGA)));
    assert_eq!(lane.next_at(), Some(us(1500)));
    // With a rate of zero nothing moves, and nothing is lost.
    lane.change(us(1000), Change::Rate(Some(0)));
    assert_eq!((lane.next_at(), lane.pop(ms(1000))), (None, None));
    lane.change(ms(1000), Change::Rate(Some(12 * MEGA)));
    let quarter = us(250);
    assert_eq!(
        rest(&mut lane),
        [(ms(1000) + quarter, 1), (ms(1001) + quarter, 2)]
    );
    lane.push(ms(2000), FRAME_BYTES, 3);
    lane.change(ms(2000), Change::Rate(None));
    assert_eq!(rest(&mut lane), [(ms(2000), 3)]);
}

#[test]
fn an_outage_loses_what_leaves_in_it_and_nothing_else() {
    let mut lane = lane(Conditions {
        rate_bits_per_second: Some(12 * MEGA),
        delay: ms(10),
        timetable: Timetable {
            changes: vec![(us(2500), Change::Cut), (us(4500), Change::Mend)],
            period: None,
        },
        ..Conditions::default()
    });
    for packet in 1..=6 {
        lane.push(Duration::ZERO, FRAME_BYTES, packet);
    }
    // One leaves each millisecond: the third and the fourth have bad luck.
    let expected = [1, 2, 5, 6].map(|packet| (ms(packet + 10), packet));
    assert_eq!(rest(&mut lane), expected);
    assert_eq!(lane.counts().cut, 2);
}

#[test]
fn a_timetable_changes_rate_and_delay_again_and_again() {
    let mut lane = lane(Conditions {
        timetable: Timetable {
            changes: vec![
                (ms(0), Change::Delay(ms(100))),
                (ms(500), Change::Delay(ms(10))),
            ],
            period: Some(ms(1000)),
        },
        ..Conditions::default()
    });
    let mut delays = Vec::new();
    for half in 0..6 {
        let sent = ms(500 * half + 250);
        lane.push(sent, FRAME_BYTES, half);
        delays.extend(rest(&mut lane).iter().map(|(at, _)| *at - sent));
    }
    assert_eq!(delays, [100, 10, 100, 10, 100, 10].map(ms));
}

#[test]
fn a_shorter_way_lets_nobody_overtake() {
    let mut lane = lane(Conditions {
        delay: ms(100),
        ..Conditions::default()
    });
    lane.push(ms(0), FRAME_BYTES, 1);
    lane.change(ms(1), Change::Delay(ms(10)));
    lane.push(ms(1), FRAME_BYTES, 2);
    assert_eq!(rest(&mut lane), [(ms(100), 1), (ms(100), 2)]);
}

#[test]
fn a_late_packet_is_overtaken_and_holds_nobody_up() {
    let mut lane = lane(Conditions {
        delay: ms(10),
        reordering: Some(Reordering {
            share: 0.1,
            by: us(1500),
        }),
        ..Conditions::default()
    });
    for packet in 0..1000 {
        lane.push(ms(packet), FRAME_BYTES, packet);
    }
    let arrived = rest(&mut lane);
    let is_late = |(at, packet): &&(Duration, u64)| *at == ms(packet + 10) + us(1500);
    let is_in_time = |(at, packet): &&(Duration, u64)| *at == ms(packet + 10);
    let late = arrived.iter().filter(is_late).count();
    assert_eq!(late + arrived.iter().filter(is_in_time).count(), 1000);
    assert!((70..130).contains(&late), "{late}");
    let overtaken = arrived.windows(2).filter(|pair| pair[0].1 > pair[1].1);
    // One behind the other late one is overtaken by the same packet.
    assert!((50..=late).contains(&overtaken.count()), "{late}");
}

#[test]
fn jitter_is_between_nothing_and_the_most_and_keeps_the_order() {
    let mut lane = lane(Conditions {
        delay: ms(20),
        jitter: ms(30),
        ..Conditions::default()
    });
    for packet in 0..20_000 {
        lane.push(us(100 * packet), FRAME_BYTES, packet);
    }
    let arrived = rest(&mut lane);
    assert!(arrived.is_sorted_by_key(|(_, packet)| *packet));
    let delays: Vec<Duration> = arrived
        .iter()
        .map(|(at, packet)| *at - us(100 * packet))
        .collect();
    assert!(delays.iter().all(|delay| (ms(20)..=ms(50)).contains(delay)));
    let mean = delays.iter().sum::<Duration>() / 20_000;
    // Waiting for each other makes it a little more than half of the most.
    assert!((ms(34)..ms(40)).contains(&mean), "{mean:?}");
}

#[test]
fn lost_packets_take_their_share_of_the_rate() {
    let mut lane = lane(Conditions {
        rate_bits_per_second: Some(12 * MEGA),
        loss: Loss::Random(1.0),
        ..Conditions::default()
    });
    lane.push(Duration::ZERO, FRAME_BYTES, 1);
    lane.change(Duration::ZERO, Change::Loss(Loss::None));
    lane.push(Duration::ZERO, FRAME_BYTES, 2);
    assert_eq!(rest(&mut lane), [(ms(2), 2)]);
    assert_eq!(lane.counts().lost, 1);
}

/// Anything that is in range, at a pace that fills queues now and then.
fn conditions() -> impl Strategy<Value = Conditions> {
    let share = || prop_oneof![Just(0.0), 0.0..0.3, Just(1.0)];
    let loss = prop_oneof![
        Just(Loss::None),
        share().prop_map(Loss::Random),
        (share(), share(), share(), share()).prop_map(|(begins, ends, good, bad)| Loss::Burst {
            begins,
            ends,
            good,
            bad
        }),
    ];
    let reordering = prop::option::of(
        (share(), 0_u64..5000).prop_map(|(share, by)| Reordering { share, by: us(by) }),
    );
    let rate = prop::option::of(prop_oneof![Just(0), 1..1_000_000_000_u64]);
    (
        rate,
        0_u64..50_000,
        0_u64..20_000,
        loss,
        reordering,
        share(),
        1_u64..100_000,
    )
        .prop_map(
            |(rate, delay, jitter, loss, reordering, duplication, queue_bytes)| Conditions {
                rate_bits_per_second: rate,
                delay: us(delay),
                jitter: us(jitter),
                loss,
                reordering,
                duplication,
                queue_bytes,
                timetable: Timetable::default(),
            },
        )
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        prop::option::of(0..1_000_000_000_u64).prop_map(Change::Rate),
        (0_u64..50_000).prop_map(|delay| Change::Delay(us(delay))),
        (0.0..1.0).prop_map(|share| Change::Loss(Loss::Random(share))),
        Just(Change::Cut),
        Just(Change::Mend),
    ]
}

/// What happens to a lane after a pause of so many microseconds.
#[derive(Clone, Debug)]
enum Step {
    Push(usize),
    Pop,
    Change(Change),
}

fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
    let step = prop_oneof![
        6 => (1_usize..2000).prop_map(Step::Push),
        3 => Just(Step::Pop),
        1 => change().prop_map(Step::Change),
    ];
    let pause = prop_oneof![3 => Just(0), 3 => 0_u64..500, 1 => 0_u64..100_000];
    prop::collection::vec((pause, step), 0..200)
}

proptest! {
    #[test]
    fn every_packet_is_accounted_for(conditions in conditions(), seed: u64, steps in steps()) {
        let bound = conditions.queue_bytes;
        let mut lane = Lane::new(conditions, seed);
        let (mut now, mut sent, mut popped) = (Duration::ZERO, 0, 0);
        for (pause, step) in steps {
            now += us(pause);
            match step {
                Step::Push(bytes) => { lane.push(now, bytes, sent); sent += 1; }
                Step::Pop => popped += u64::from(lane.pop(now).is_some()),
                Step::Change(change) => lane.change(now, change),
            }
            let counts = lane.counts();
            prop_assert_eq!((counts.offered, counts.delivered), (sent, popped));
            prop_assert_eq!(
                counts.offered + counts.doubled,
                counts.dropped + counts.lost + counts.cut + counts.delivered + lane.held() as u64
            );
            prop_assert!(lane.waiting_bytes() <= bound.max(2000));
            prop_assert_eq!(lane.is_empty(), lane.held() == 0);
            prop_assert!(lane.next_at().is_none_or(|at| at >= now || lane.pop(now).inspect(|_| popped += 1).is_some()));
        }
    }

    #[test]
    fn the_same_packets_meet_the_same_fate_at_any_speed(
        loss in 0.0..1.0, duplication in 0.0..1.0, seed: u64,
        pauses in prop::collection::vec(0_u64..10_000, 100), rate in prop::option::of(1_000_000_000..10_000_000_000_u64),
    ) {
        let arrived = |pauses: &[u64], rate| {
            let conditions = Conditions {
                rate_bits_per_second: rate,
                loss: Loss::Burst { begins: loss, ends: 0.5, good: loss / 2.0, bad: loss },
                duplication,
                ..Conditions::default()
            };
            let (mut lane, mut now) = (Lane::new(conditions, seed), Duration::ZERO);
            for (packet, pause) in (0..).zip(pauses) {
                now += us(*pause);
                lane.push(now, FRAME_BYTES, packet);
            }
            rest(&mut lane).into_iter().map(|(_, packet)| packet).collect::<Vec<u64>>()
        };
        prop_assert_eq!(arrived(&pauses, rate), arrived(&[0; 100], None));
    }

    #[test]
    fn packets_stay_in_order_whatever_changes(conditions in conditions(), seed: u64, steps in steps()) {
        let mut lane = Lane::new(Conditions { reordering: None, ..conditions }, seed);
        let (mut now, mut sent, mut latest) = (Duration::ZERO, 0_u64, 0);
        for (pause, step) in steps {
            now += us(pause);
            match step {
                Step::Push(bytes) => { lane.push(now, bytes, sent); sent += 1; }
                Step::Change(change) => lane.change(now, change),
                Step::Pop => while let Some((_, packet)) = lane.pop(now) {
                    prop_assert!(packet >= latest);
                    latest = packet;
                },
            }
        }
    }

    #[test]
    fn looking_often_changes_nothing(conditions in conditions(), seed: u64, steps in steps()) {
        let run = |looks: u64| {
            let mut lane = Lane::new(conditions.clone(), seed);
            let (mut now, mut sent, mut arrived) = (Duration::ZERO, 0_u64, Vec::new());
            for (pause, step) in &steps {
                for look in 0..looks {
                    lane.advance(now + us(pause * look / looks));
                }
                now += us(*pause);
                match step {
                    Step::Push(bytes) => { lane.push(now, *bytes, sent); sent += 1; }
                    Step::Change(change) => lane.change(now, *change),
                    Step::Pop => arrived.extend(lane.pop(now)),
                }
            }
            (arrived, lane.counts(), rest(&mut lane))
        };
        prop_assert_eq!(run(0), run(7));
    }
}
