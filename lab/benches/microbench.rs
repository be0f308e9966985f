//! `just microbench`: how long the pieces of the packet path take, by criterion. Wants a quiet machine.

mod cases;

use cases::Volume;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::time::{Duration, Instant};

fn pieces(criterion: &mut Criterion) {
    for case in cases::all() {
        let (group, name) = case.name.split_once('/').expect("part/work");
        let mut group = criterion.benchmark_group(group);
        group.throughput(match case.volume {
            Volume::Bytes(bytes) => Throughput::Bytes(bytes as u64),
            Volume::Packets(packets) => Throughput::Elements(packets as u64),
        });
        group.bench_function(name, |bencher| {
            let mut work = (case.make)();
            bencher.iter_custom(|runs| {
                let mut taken = Duration::ZERO;
                for _ in 0..runs {
                    work.prepare();
                    let start = Instant::now();
                    work.run();
                    taken += start.elapsed();
                }
                taken
            });
        });
        group.finish();
    }
}

criterion_group!(benches, pieces);
criterion_main!(benches);
