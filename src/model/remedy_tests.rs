//! Any guest, any question: answers stay within their limits and make sense.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::model::{
    forecast::{CostWeights, HostConstants, Sla},
    pattern::{Sample, Traces, Writer},
    predict::{forecast, lcb},
    steer::{Steering, Sync},
};

const GIB: Bytes = Bytes(1 << 30);

/// 1 GiB in 1 024 samples: data at the beginning, written as told.
fn guest(data: u64, writer: impl Fn(u64) -> Writer) -> Pattern {
    let samples = (0..1024).map(|i| {
        let of_data = i < data;
        Sample { page: i * 256, weight: 256.0, zero: !of_data, writer: if of_data { writer(i) } else { Writer::Idle } }
    });
    Pattern::new(samples.collect(), Traces::default(), 12_000.0).unwrap()
}

/// Random writes: so many MiB of data, so many writes per ms over all of it.
fn uniform(mib: u64, writes_per_ms: f64) -> Pattern {
    guest(mib, |_| Writer::Random { rate: writes_per_ms / (mib as f64 * 256.0) })
}

fn question(mib: u64, seconds: u64) -> Question {
    Question {
        bandwidth: Bandwidth::Capped(BytesPerSecond(mib << 20)),
        downtime_limit: Duration::from_millis(300),
        time_budget: Some(Duration::from_secs(seconds)),
        host: HostConstants::default(),
        sla: Sla::default(),
        weights: CostWeights::default(),
    }
}

fn answer(pattern: &Pattern, question: &Question, remedy: Remedy) -> Answer {
    // Only one of them stands on it.
    let asks = matches!(remedy, Remedy::Bandwidth { .. });
    let least_convergent_bandwidth = asks.then(|| lcb(pattern, &pattern.curve(), &settings(question))).flatten();
    Case { pattern, question, guest: GIB, least_convergent_bandwidth }.answer(remedy)
}

fn longer(most_per_gigabyte: u64) -> Remedy {
    Remedy::TimeBudget { most_per_gigabyte }
}

/// 1 GiB is two of KubeVirt's gigabytes.
fn with_budget(question: &Question, per_gigabyte: u64) -> Question {
    Question { time_budget: Some(Duration::from_secs(2 * per_gigabyte)), ..question.clone() }
}

#[test]
fn the_budget_found_is_the_least_that_does() {
    let (pattern, short) = (uniform(512, 20.0), question(100, 4));
    assert_eq!(forecast(&pattern, &short).verdict, Verdict::Fails);
    let found = answer(&pattern, &short, longer(150));
    let Some(Value::PerGigabyte(seconds)) = found.value else { unreachable!("{found:?}") };
    assert_eq!(forecast(&pattern, &with_budget(&short, seconds)).verdict, Verdict::Converges);
    assert_ne!(forecast(&pattern, &with_budget(&short, seconds - 1)).verdict, Verdict::Converges);
    assert_eq!(answer(&pattern, &short, longer(seconds)).value, Some(Value::PerGigabyte(seconds)), "as much as is allowed");
    let less = answer(&pattern, &short, longer(seconds - 1));
    assert!(less.verdict != Verdict::Converges && less.value.is_none(), "{less:?}");
}

#[test]
fn what_converges_as_it_is_needs_nothing() {
    let (pattern, enough) = (uniform(256, 2.0), question(200, 150));
    for remedy in [longer(300), Remedy::AutoConverge, Remedy::Bandwidth { most: BytesPerSecond(1 << 30) }, downtime(900)] {
        let found = answer(&pattern, &enough, remedy);
        assert_eq!((found.verdict, found.value), (Verdict::Converges, None), "{found:?}");
        assert_eq!(found.throttle_percent.unwrap_or(0), 0);
    }
}

fn downtime(ms: u64) -> Remedy {
    Remedy::Downtime { most: Duration::from_millis(ms) }
}

#[test]
fn auto_converge_helps_who_computes_more_than_who_waits() {
    let (pattern, tight) = (uniform(256, 60.0), question(100, 30));
    assert_eq!(forecast(&pattern, &tight).verdict, Verdict::Fails);
    let computes = answer(&pattern, &tight, Remedy::AutoConverge);
    assert_eq!(computes.verdict, Verdict::Converges, "{computes:?}");
    assert!((20..=99).contains(&computes.throttle_percent.unwrap()), "{computes:?}");
    let busy = answer(&pattern.clone().with_cpus(vec![1.0, 1.0]), &tight, Remedy::AutoConverge);
    assert_eq!(busy, computes, "busy all the time is what is assumed");
    let waits = answer(&pattern.with_cpus(vec![0.2]), &tight, Remedy::AutoConverge);
    assert!(waits.total_ms > computes.total_ms && waits.throttle_percent >= computes.throttle_percent, "{waits:?}");
}

#[test]
fn bandwidth_is_whole_mebibytes_and_does() {
    let (pattern, slow) = (uniform(256, 40.0), question(40, 150));
    let found = answer(&pattern, &slow, Remedy::Bandwidth { most: BytesPerSecond(1 << 30) });
    let Some(Value::Bandwidth(rate)) = found.value else { unreachable!("{found:?}") };
    assert!(rate.0.is_multiple_of(1 << 20) && rate.0 > 40 << 20);
    let at = |rate: u64| Question { bandwidth: Bandwidth::Capped(BytesPerSecond(rate)), ..slow.clone() };
    assert_eq!(forecast(&pattern, &at(rate.0)).verdict, Verdict::Converges);
    assert_ne!(forecast(&pattern, &at(rate.0 * 8 / 10)).verdict, Verdict::Converges, "hardly more than is needed");
    let hurried = Question { sla: Sla { total_time: Some(Duration::from_secs(2)), ..Sla::default() }, ..slow.clone() };
    let faster = answer(&pattern, &hurried, Remedy::Bandwidth { most: BytesPerSecond(1 << 30) });
    assert!(faster.total_ms <= 2000.0 && matches!(faster.value, Some(Value::Bandwidth(more)) if more > rate), "{faster:?}");
}

#[test]
fn a_longer_downtime_waits_for_the_stall_detector() {
    let (pattern, stalled) = (uniform(128, 60.0), question(100, 300));
    assert_eq!(forecast(&pattern, &stalled).verdict, Verdict::Fails);
    let found = answer(&pattern, &stalled, downtime(2000));
    let Some(Value::Downtime(limit)) = found.value else { unreachable!("{found:?}") };
    assert!(limit > Duration::from_millis(300) && limit < Duration::from_secs(2), "{found:?}");
    assert!(found.total_ms > 40_000.0, "40 s without progress come first: {found:?}");
    assert_eq!(answer(&pattern, &stalled, downtime(310)).value, None, "too little");
    let held = Question { sla: Sla { downtime: Some(Duration::from_millis(310)), ..Sla::default() }, ..stalled.clone() };
    assert_eq!(answer(&pattern, &held, downtime(2000)).value, None, "the SLA allows no more");
    assert_eq!(answer(&pattern, &question(100, 30), downtime(2000)).value, None, "the budget ends before");
}

#[test]
fn post_copy_ends_what_nothing_else_would() {
    let (pattern, hopeless) = (uniform(900, 400.0), question(100, 300));
    let found = answer(&pattern, &hopeless, Remedy::PostCopy);
    assert_eq!(found.verdict, Verdict::Converges);
    let Some(Value::PerGigabyte(seconds)) = found.value else { unreachable!("{found:?}") };
    // One pass over 900 MiB at 100 MiB/s.
    assert!((5..=6).contains(&seconds), "{found:?}");
    assert!(found.total_ms < 2000.0 * seconds as f64 + 2500.0 && found.degraded_ms.unwrap() > 100.0, "{found:?}");
    let short = answer(&pattern, &question(100, 4), Remedy::PostCopy);
    assert_eq!(short.value, None, "a budget that is shorter than a pass is not lowered: {short:?}");
    assert!(short.verdict == Verdict::Converges && short.degraded_ms > found.degraded_ms, "{short:?}");
}

fn some_writer() -> impl Strategy<Value = Writer> {
    prop_oneof![
        Just(Writer::Idle),
        (1e-6..0.1_f64).prop_map(|rate| Writer::Random { rate }),
        (1.0..20_000.0_f64, 0.0..1000.0_f64).prop_map(|(period, at)| Writer::Periodic { period, at }),
    ]
}

fn some_guest() -> impl Strategy<Value = Pattern> {
    (prop::collection::vec(some_writer(), 1..6), 1_u64..1024, prop::collection::vec(0.0..=1.0_f64, 0..4)).prop_map(
        |(writers, data, cpus)| {
            let pick = |i: u64| writers[usize::try_from(i).unwrap() % writers.len()];
            guest(data, pick).with_cpus(cpus)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_answer_makes_sense(
        pattern in some_guest(), mib in 1_u64..400, seconds in 1_u64..200, per_gigabyte in 1_u64..300, most in 1_u64..2000, limit in 1_u64..3000,
        tight in any::<bool>()
    ) {
        let sla = Sla { total_time: tight.then_some(Duration::from_secs(30)), downtime: tight.then_some(Duration::from_millis(400)) };
        let question = Question { sla, ..question(mib, seconds) };
        let rate = BytesPerSecond(most << 20);
        for remedy in [longer(per_gigabyte), Remedy::AutoConverge, Remedy::Bandwidth { most: rate }, downtime(limit), Remedy::PostCopy] {
            let found = answer(&pattern, &question, remedy);
            prop_assert_eq!(found.remedy, remedy);
            let numbers = [Some(found.probability), Some(found.total_ms), found.downtime_ms, found.degraded_ms];
            prop_assert!(numbers.iter().flatten().all(|n| n.is_finite() && *n >= 0.0), "{:?}", found);
            prop_assert!(found.probability <= 1.0);
            let within = match (found.value, remedy) {
                (None, _) => true,
                (Some(Value::PerGigabyte(value)), Remedy::TimeBudget { .. }) => value <= per_gigabyte && 2 * value > seconds,
                (Some(Value::PerGigabyte(value)), Remedy::PostCopy) => value > 0 && 2 * value < seconds,
                (Some(Value::Bandwidth(value)), Remedy::Bandwidth { .. }) => value <= rate && value > BytesPerSecond(mib << 20),
                (Some(Value::Downtime(value)), Remedy::Downtime { .. }) => {
                    value <= Duration::from_millis(limit.min(if tight { 400 } else { limit })) && value > Duration::from_millis(300)
                }
                _ => false,
            };
            prop_assert!(within, "{:?}", found);
            prop_assert!(found.value.is_none() || found.verdict == Verdict::Converges, "{:?}", found);
            if found.verdict == Verdict::Converges {
                prop_assert!(!exceeds(&question, found.total_ms, found.downtime_ms), "{:?}", found);
            }
        }
    }

    #[test]
    fn a_longer_budget_never_converges_less(pattern in some_guest(), mib in 1_u64..400, seconds in 1_u64..100, some in 1_u64..200, more in 0_u64..200) {
        let question = question(mib, seconds);
        let (less, more) = (answer(&pattern, &question, longer(some)), answer(&pattern, &question, longer(some + more)));
        prop_assert!(more.probability >= less.probability, "{:?} {:?}", less, more);
        if let (Verdict::Converges, Some(value)) = (less.verdict, less.value) {
            prop_assert_eq!((more.verdict, more.value), (Verdict::Converges, Some(value)), "the least is the least");
        }
    }

    /// A throttled guest's clock is never ahead of time, and never runs backwards.
    #[test]
    fn a_throttled_clock_runs_on(cpus in prop::collection::vec(0.0..=1.0_f64, 0..4), steps in prop::collection::vec((1.0..5000.0_f64, 0.0..1e6_f64), 1..60)) {
        let settings = settings(&question(100, 60));
        let mut ramp = AutoConverge::new(&settings, &cpus);
        let (mut now, mut wire_bytes, mut last) = (settings.host.setup_ms, 0.0, settings.host.setup_ms);
        for (passed, dirtied) in steps {
            now += passed;
            wire_bytes += passed * 100_000.0;
            ramp.synced(&Sync { now, dirtied, pending: dirtied, wire_bytes, rate: 100_000.0 });
            let clock = ramp.guest(now);
            prop_assert!(clock >= last && clock <= now + 1e-6 && ramp.percent() <= 99, "{clock} at {now} after {last}");
            last = clock;
        }
    }
}
