#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
use super::*;
use crate::collector::trace::SampledPage;

/// A look of 12 s at known writers: `written(sample, from, to, rng)`.
fn look(pages: u64, count: u64, mut written: impl FnMut(u64, f64, f64, &mut Pcg64Mcg) -> bool) -> Trace {
    let weight = pages as f64 / count as f64;
    let samples: Vec<SampledPage> =
        (0..count).map(|i| SampledPage { page: 8192 + (i as f64 * weight) as u64, weight, zero: false }).collect();
    let mut slot_ends: Vec<f64> = (1..=100).map(|i| f64::from(i) * 10.0).collect();
    slot_ends.extend((1..=220).map(|i| 1000.0 + f64::from(i) * 50.0));
    let mut rng = Pcg64Mcg::seed_from_u64(5);
    let mut from = 0.0;
    let changed = slot_ends
        .iter()
        .map(|&to| {
            let hits = (0..).zip(&samples).filter(|(_, s)| written(s.page - 8192, from, to, &mut rng)).map(|(i, _)| i).collect();
            from = to;
            hits
        })
        .collect();
    let absent = vec![(0, 8192), (8192 + pages, 131_072 - 8192 - pages)];
    Trace { total_pages: 131_072, absent, swapped: vec![], samples, slot_ends, changed }
}

fn random(rate: f64, from: f64, to: f64, rng: &mut Pcg64Mcg) -> bool {
    rng.random::<f64>() < -(-rate * (to - from)).exp_m1()
}

fn sweeps(page: u64, period: f64, pages: f64, from: f64, to: f64) -> bool {
    let at = page as f64 / pages * period;
    ((to - at) / period).floor() > ((from - at) / period).floor()
}

fn meets(pattern: &Pattern, truth: impl Fn(f64) -> f64, within: f64) {
    for ms in [50.0, 100.0, 400.0, 1600.0, 6400.0] {
        let (f, expected) = (pattern.curve().pages(ms), truth(ms));
        assert!((f / expected - 1.0).abs() < within, "{ms} ms: {f} against {expected}");
    }
}

fn kinds(pattern: &Pattern) -> [usize; 4] {
    let count = |is: fn(&Writer) -> bool| pattern.samples().iter().filter(|s| is(&s.writer)).count();
    [
        count(|w| matches!(w, Writer::Idle)),
        count(|w| matches!(w, Writer::Random { .. })),
        count(|w| matches!(w, Writer::Periodic { .. })),
        count(|w| matches!(w, Writer::Traced { .. })),
    ]
}

#[test]
fn a_uniform_writer_is_one_rate() {
    let rate = 40.0 / 16_384.0;
    let pattern = describe(&look(16_384, 2560, |_, a, b, rng| random(rate, a, b, rng))).unwrap();
    meets(&pattern, |ms| 16_384.0 * -(-rate * ms).exp_m1(), 0.02);
    let [_, random, periodic, traced] = kinds(&pattern);
    assert_eq!((random, periodic, traced), (2560, 0, 0));
    assert_eq!(pattern.total_pages().round() as u64, 131_072);
    assert_eq!(pattern.nonzero_pages().round() as u64, 16_384);
}

#[test]
fn hot_and_cold_regions_are_told_apart() {
    let (hot, cold) = (0.9 * 40.0 / 2048.0 + 0.1 * 40.0 / 49_152.0, 0.1 * 40.0 / 49_152.0);
    let pattern =
        describe(&look(49_152, 2560, |page, a, b, rng| random(if page < 2048 { hot } else { cold }, a, b, rng))).unwrap();
    meets(&pattern, |ms| 2048.0 * -(-hot * ms).exp_m1() + 47_104.0 * -(-cold * ms).exp_m1(), 0.06);
}

#[test]
fn hot_pages_scattered_among_cold_ones_are_a_mixture() {
    let rate = |page: u64| if (page.wrapping_mul(0x9E37_79B9) >> 3).is_multiple_of(8) { 0.05 } else { 1e-4 };
    let hot = (0..2560_u64).filter(|i| rate((*i as f64 * 6.4) as u64) > 0.01).count() as f64 * 6.4;
    let pattern = describe(&look(16_384, 2560, |page, a, b, rng| random(rate(page), a, b, rng))).unwrap();
    meets(&pattern, |ms| hot * -(-0.05 * ms).exp_m1() + (16_384.0 - hot) * -(-1e-4 * ms).exp_m1(), 0.08);
}

#[test]
fn a_sweep_is_recognised_with_its_order() {
    let period = 24_576.0 / 12.0;
    let pattern = describe(&look(24_576, 2560, |page, a, b, _| sweeps(page, period, 24_576.0, a, b))).unwrap();
    meets(&pattern, |ms| 24_576.0 * (ms / period).min(1.0), 0.03);
    assert!(kinds(&pattern)[2] > 2500, "{:?}", kinds(&pattern));
    // In step: within 200 ms a sweep writes one stretch of memory, not pages here and there.
    let mut pages = vec![];
    let since = vec![0.0; pattern.samples().len()];
    pattern.realise(100.0, 1).written(&since, 200.0, |i| pages.push(pattern.samples()[i].page));
    pages.sort_unstable();
    let longest_gap = pages.windows(2).map(|w| w[1] - w[0]).max().unwrap();
    assert!(pages.len() > 150 && longest_gap < 1200, "{} pages, a gap of {longest_gap}", pages.len());
}

#[test]
fn a_sweep_that_outlasts_the_look_is_followed() {
    // 40 s for a round, of which the look sees 12: with and without the end of a round among them.
    for start in [0.0, 0.3, 0.9] {
        let (pages, period) = (100_000.0, 40_000.0);
        let trace = look(100_000, 3000, |page, a, b, _| {
            let at = ((page as f64 / pages - start).rem_euclid(1.0)) * period;
            a < at && at <= b
        });
        let pattern = describe(&trace).unwrap();
        assert!(kinds(&pattern)[2] > 2900, "{start}: {:?}", kinds(&pattern));
        meets(&pattern, |ms| pages * ms / period, 0.05);
    }
}

#[test]
fn rare_random_writes_are_no_sweep() {
    let pattern = describe(&look(100_000, 3000, |_, a, b, rng| random(2e-5, a, b, rng))).unwrap();
    assert_eq!(kinds(&pattern)[2], 0, "{:?}", kinds(&pattern));
}

#[test]
fn phases_keep_their_trace() {
    let rate = 40.0 / 16_384.0;
    let pattern =
        describe(&look(16_384, 2560, |_, a, b, rng| ((a / 1000.0) as u64).is_multiple_of(2) && random(rate, a, b, rng))).unwrap();
    assert!(kinds(&pattern)[3] > 2000, "{:?}", kinds(&pattern));
    let truth = |ms: f64| 16_384.0 * -(-rate * ms).exp_m1();
    let f = pattern.curve().pages(400.0);
    assert!(f > 0.3 * truth(400.0) && f < 0.7 * truth(400.0), "half the time it is calm: {f}");
}

#[test]
fn an_idle_guest_has_no_writers() {
    let pattern = describe(&look(16_384, 2560, |_, _, _, _| false)).unwrap();
    assert_eq!(kinds(&pattern)[1..], [0, 0, 0]);
}

#[test]
fn untouched_memory_takes_few_samples() {
    let mut trace = look(1000, 100, |_, _, _, _| false);
    trace.absent = (0..30_000).map(|i| (20_000 + i * 3, 2)).collect();
    trace.swapped = vec![(120_000, 500)];
    let pattern = describe(&trace).unwrap();
    assert!(pattern.samples().len() < 1000, "{}", pattern.samples().len());
    assert_eq!(pattern.total_pages().round() as u64, 61_500);
    assert_eq!(pattern.nonzero_pages().round() as u64, 1500, "what is swapped out is not zero");
}
