//! The model on a pattern of 4 096 samples: one replay, one least convergent bandwidth, one whole forecast,
//! and what would help.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{hint::black_box, time::Duration};

use common::sampled_guest;
use criterion::{Criterion, criterion_group, criterion_main};
use migvisor::model::{
    forecast::{CostWeights, HostConstants, Question, Sla},
    predict::{forecast, lcb, settings},
    remedy::{Case, Remedy},
    replay::replay,
    units::{Bandwidth, Bytes, BytesPerSecond},
};

fn question(mib: u64, budget: u64) -> Question {
    Question {
        bandwidth: Bandwidth::Capped(BytesPerSecond(mib << 20)),
        downtime_limit: Duration::from_millis(300),
        time_budget: Some(Duration::from_secs(budget)),
        host: HostConstants::default(),
        sla: Sla::default(),
        weights: CostWeights::default(),
    }
}

fn model(c: &mut Criterion) {
    let small = sampled_guest(512, 16_384, 40.0);
    let large = sampled_guest(64 << 10, 2 << 20, 300.0);
    for (name, pattern, question) in [("512MiB", &small, question(100, 150)), ("64GiB", &large, question(1000, 10_350))] {
        let settings = settings(&question);
        let mut seed = 0;
        c.bench_function(&format!("replay/{name}"), |b| {
            b.iter(|| {
                seed += 1;
                replay(pattern, pattern.realise(0.0, seed), black_box(&settings))
            });
        });
        let curve = pattern.curve();
        c.bench_function(&format!("lcb/{name}"), |b| b.iter(|| lcb(pattern, &curve, black_box(&settings))));
        c.bench_function(&format!("forecast/{name}"), |b| b.iter(|| forecast(pattern, black_box(&question))));
    }
    // A guest that does not converge without a remedy.
    let wild = sampled_guest(512, 65_536, 60.0);
    let question = question(150, 20);
    let least_convergent_bandwidth = lcb(&wild, &wild.curve(), &settings(&question));
    let case = Case { pattern: &wild, question: &question, guest: Bytes(512 << 20), least_convergent_bandwidth };
    let all = [
        ("timeBudget", Remedy::TimeBudget { most_per_gigabyte: 300 }),
        ("autoConverge", Remedy::AutoConverge),
        ("bandwidth", Remedy::Bandwidth { most: BytesPerSecond(1 << 30) }),
        ("downtime", Remedy::Downtime { most: Duration::from_secs(2) }),
        ("postCopy", Remedy::PostCopy),
    ];
    c.bench_function("remedies/all", |b| b.iter(|| all.map(|(_, remedy)| case.answer(black_box(remedy)))));
    for (name, remedy) in all {
        c.bench_function(&format!("remedies/{name}"), |b| b.iter(|| case.answer(black_box(remedy))));
    }
}

criterion_group!(benches, model);
criterion_main!(benches);
