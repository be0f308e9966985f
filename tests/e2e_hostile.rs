//! `lab hostile` runs from end to end. What it measures is no test: machines are too busy for that.

mod common;

use std::path::Path;

use common::RINGTUN;
use ringtun_lab::hostile::figures::{Condition, Sample};
use ringtun_lab::hostile::{self, Attack, Plan};

#[test]
fn a_harmless_attack_is_measured_in_all_conditions() {
    // 17 connections and one byte of each every half a second.
    let plan = Plan {
        attacks: vec![Attack::PartialRecords],
        rounds: 1,
        seconds: 1,
    };
    let figures = hostile::run(Path::new(RINGTUN), &plan, |_| {}, |_| {}).expect("figures");
    let [attack] = figures.attacks.as_slice() else {
        panic!("one attack: {figures:?}");
    };
    let table = attack.to_table();
    assert_eq!(attack.server_died, None, "{table}");
    let of = |condition| {
        let found = attack.samples.iter();
        let found: Vec<&Sample> = found
            .filter(|sample| sample.condition == condition)
            .collect();
        assert_eq!(found.len(), 1, "{table}");
        found[0]
    };
    let idle = of(Condition::Idle);
    assert_eq!((idle.sent.opened, idle.sent.bytes), (0, 0), "{table}");
    assert!(idle.down.megabits_per_second > 0.0, "{table}");
    assert!(idle.up.megabits_per_second > 0.0, "{table}");
    assert!(idle.rss_peak_mib > 0.0, "{table}");
    for condition in [Condition::Attack, Condition::Sink] {
        let sent = &of(condition).sent;
        assert!(sent.opened >= 17 && sent.bytes >= 17, "{table}");
    }
    assert!(!attack.counted.is_empty(), "{table}");
}
