//! Properties of the pure core that hold for every guest and every setting.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_sign_loss, missing_docs)]

mod common;

use common::sampled_guest;
use migvisor::model::{
    forecast::{CostWeights, HostConstants, Question, Sla, Verdict},
    pattern::{Pattern, Sample, Traces, Writer},
    predict::{self, forecast},
    replay::{Outcome, Settings, replay},
    units::{Bandwidth, BytesPerSecond},
};
use proptest::prelude::*;
use std::time::Duration;

#[derive(Debug, Clone)]
struct Guest {
    samples: Vec<Sample>,
    traces: Traces,
}

impl Guest {
    fn pattern(&self) -> Pattern {
        Pattern::new(self.samples.clone(), self.traces.clone(), 12_000.0).unwrap()
    }

    /// The same guest, writing so many times as fast.
    fn faster(&self, factor: f64) -> Pattern {
        let mut guest = self.clone();
        for sample in &mut guest.samples {
            sample.writer = match sample.writer {
                Writer::Random { rate } => Writer::Random { rate: rate * factor },
                Writer::Periodic { period, at } => Writer::Periodic { period: period / factor, at: at / factor },
                other => other,
            };
        }
        guest.pattern()
    }
}

fn guest() -> impl Strategy<Value = Guest> {
    let writer = prop_oneof![
        3 => Just(Writer::Idle),
        3 => (-5.0..0.5_f64).prop_map(|log| Writer::Random { rate: 10_f64.powf(log) }),
        1 => (20.0..20_000.0_f64, 0.0..1.0_f64).prop_map(|(period, at)| Writer::Periodic { period, at: at * period }),
        1 => (0..8_usize).prop_map(|row| Writer::Traced { row }),
    ];
    let samples = prop::collection::vec((1_u64..4000, 0.5..400.0_f64, any::<bool>(), writer), 1..120);
    let rows = prop::collection::vec(prop::collection::vec(0.0..10_000.0_f64, 0..20), 8);
    (samples, rows).prop_map(|(samples, mut rows)| {
        let mut page = 0;
        let samples = samples
            .into_iter()
            .map(|(gap, weight, zero, writer)| {
                page += gap;
                Sample { page, weight, zero, writer }
            })
            .collect();
        for row in &mut rows {
            row.sort_by(f64::total_cmp);
        }
        Guest { samples, traces: Traces { length_ms: 10_000.0, rows } }
    })
}

fn settings(mib: f64, limit: f64) -> Settings {
    let cap = (mib * 1_048_576.0).round() as u64;
    Settings {
        bandwidth: Bandwidth::Capped(BytesPerSecond(cap)),
        downtime_limit_ms: limit,
        deadline_ms: 20_000.0,
        host: HostConstants::default(),
    }
}

fn run(pattern: &Pattern, settings: &Settings) -> Outcome {
    replay(pattern, pattern.realise(0.0, 7), settings)
}

fn sane(outcome: &Outcome, pattern: &Pattern, settings: &Settings) {
    let numbers = [outcome.total_ms, outcome.downtime_ms, outcome.pages, outcome.zero_pages, outcome.transferred_bytes()];
    assert!(numbers.iter().all(|n| n.is_finite() && *n >= 0.0), "{outcome:?}");
    assert!(outcome.downtime_ms <= outcome.total_ms && outcome.syncs >= 1, "{outcome:?}");
    if outcome.converged {
        // Every page goes at least once, whole or as a zero.
        let sent = outcome.pages + outcome.zero_pages;
        assert!(sent >= pattern.total_pages() - 1e-3, "{outcome:?} of {}", pattern.total_pages());
    } else {
        assert!((outcome.total_ms - settings.deadline_ms).abs() < 1e-9, "{outcome:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_replay_ends_with_sane_numbers(guest in guest(), mib in 0.1..4000.0_f64, limit in 1.0..5000.0_f64) {
        let pattern = guest.pattern();
        let settings = settings(mib, limit);
        sane(&run(&pattern, &settings), &pattern, &settings);
        let unlimited = Settings { bandwidth: Bandwidth::Unlimited, ..settings };
        sane(&run(&pattern, &unlimited), &pattern, &unlimited);
    }

    #[test]
    fn the_same_question_has_the_same_answer(guest in guest(), mib in 1.0..400.0_f64) {
        let pattern = guest.pattern();
        prop_assert_eq!(run(&pattern, &settings(mib, 300.0)), run(&pattern, &settings(mib, 300.0)));
    }

    /// More bandwidth, more patience and a calmer guest never turn a clear success into a failure. (Not to the last
    /// per cent: 100 ms windows make the loop slightly non-monotone, so the steps are large.)
    #[test]
    fn better_conditions_do_not_hurt(guest in guest(), mib in 1.0..400.0_f64, limit in 50.0..1000.0_f64) {
        let pattern = guest.pattern();
        if run(&pattern, &settings(mib, limit)).converged {
            prop_assert!(run(&pattern, &settings(mib * 2.0, limit)).converged, "twice the bandwidth");
            prop_assert!(run(&pattern, &settings(mib, limit * 2.0)).converged, "twice the downtime");
            prop_assert!(run(&guest.faster(0.5), &settings(mib, limit)).converged, "half the writes");
        }
    }

    /// f(t) grows, ever more slowly, from nothing to at most the whole guest.
    #[test]
    fn the_curve_is_a_working_set(guest in guest()) {
        let pattern = guest.pattern();
        let slots = pattern.curve().slots(400);
        let mut before = (0.0, f64::INFINITY);
        for f in slots {
            prop_assert!(f.is_finite() && f >= before.0 - 1e-6 && f <= pattern.total_pages() + 1e-6);
            prop_assert!(f - before.0 <= before.1 + 1e-6, "not concave");
            before = (f, f - before.0);
        }
    }

    /// What the replay draws is what the curve promises, within the noise of the draw.
    #[test]
    fn draws_meet_the_curve(guest in guest(), ms in 20.0..3000.0_f64) {
        let pattern = guest.pattern();
        let draws = 400_u32;
        let since = vec![0.0; pattern.samples().len()];
        let mut sum = 0.0;
        for draw in 0..draws {
            let phase = f64::from(draw) / f64::from(draws) * pattern.cycle_ms() * 7.0 * 1.618;
            pattern.realise(phase, u64::from(draw)).written(&since, ms, |i| sum += pattern.samples()[i].weight);
        }
        let (mean, expected) = (sum / f64::from(draws), pattern.curve().pages(ms));
        // A draw differs from its mean by at most the weights; 5 standard errors of the worst (independent) case.
        let worst: f64 = pattern.samples().iter().map(|s| s.weight * s.weight / 4.0).sum::<f64>().sqrt();
        let all: f64 = pattern.samples().iter().map(|s| if matches!(s.writer, Writer::Periodic { .. } | Writer::Traced { .. }) { s.weight } else { 0.0 }).sum();
        prop_assert!((mean - expected).abs() < 5.0 * worst / f64::from(draws).sqrt() + 0.08 * all + 1e-6, "{mean} against {expected}");
    }
}

fn question(mib: u64) -> Question {
    Question {
        bandwidth: Bandwidth::Capped(BytesPerSecond(mib << 20)),
        downtime_limit: Duration::from_millis(300),
        time_budget: Some(Duration::from_secs(20)),
        host: HostConstants::default(),
        sla: Sla::default(),
        weights: CostWeights::default(),
    }
}

#[test]
fn a_calm_guest_converges_and_a_wild_one_fails() {
    let calm = forecast(&sampled_guest(512, 16_384, 4.0), &question(100));
    assert_eq!((calm.verdict, calm.sla_exceeded), (Verdict::Converges, false), "{calm:?}");
    let wild = forecast(&sampled_guest(512, 65_536, 100.0), &question(60));
    assert_eq!((wild.verdict, wild.downtime_ms, wild.cost), (Verdict::Fails, None, None), "{wild:?}");
    assert!((wild.total_ms - 20_000.0).abs() < 1e-9);
    let needed = wild.least_convergent_bandwidth.unwrap();
    assert!(needed > 200 << 20 && needed < 500 << 20, "{needed}");
    assert!(calm.least_convergent_bandwidth.unwrap() < 60 << 20);
}

#[test]
fn above_the_least_convergent_bandwidth_it_converges_and_below_it_does_not() {
    for (pages, writes) in [(16_384, 40.0), (32_768, 10.0), (65_536, 100.0)] {
        let pattern = sampled_guest(512, pages, writes);
        let lcb = forecast(&pattern, &question(100)).least_convergent_bandwidth.unwrap();
        let at = |share: f64| {
            let bandwidth = Bandwidth::Capped(BytesPerSecond((lcb as f64 * share) as u64));
            forecast(&pattern, &Question { bandwidth, ..question(0) }).probability
        };
        assert!(at(1.0) >= 0.75 && at(1.1) >= 0.9 && at(0.85) <= 0.1, "{pages}: {} {} {}", at(1.0), at(1.1), at(0.85));
    }
}

#[test]
fn a_broken_sla_is_borderline_and_says_so() {
    let pattern = sampled_guest(512, 16_384, 4.0);
    let strict = Question { sla: Sla { downtime: Some(Duration::from_millis(1)), total_time: None }, ..question(100) };
    let answer = forecast(&pattern, &strict);
    assert!(answer.sla_exceeded && answer.verdict == Verdict::Borderline && answer.probability > 0.99, "{answer:?}");
}

#[test]
fn a_probability_has_one_verdict() {
    use predict::verdict;
    assert_eq!([0.0, 0.1, 0.5, 0.89, 0.9, 1.0].map(|p| verdict(p, false)), {
        use Verdict::{Borderline as B, Converges as C, Fails as F};
        [F, F, B, B, C, C]
    });
    assert_eq!(verdict(1.0, true), Verdict::Borderline);
    assert_eq!(verdict(0.05, true), Verdict::Fails);
    assert_eq!(verdict(f64::NAN, false), Verdict::Unknown);
}
