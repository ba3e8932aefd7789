//! From observations to a pattern: what writes here?
//!
//! Samples are taken in groups of neighbours. A group whose pages come back at even intervals is a sweep and becomes
//! [`Writer::Periodic`], as does a sweep that the look saw only a part of; one whose counts per slot vary as those of independent writes do gets a rate, pooled over like
//! groups; one whose pages differ too much for a single rate gets a mixture of rates; anything else (phases, bursts)
//! keeps its trace. Single samples are too noisy to be believed on their own, and noise ends a migration too early.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{
    mixture::{Exposure, Mixture, writer},
    sweep::Sweep,
    trace::Trace,
};
use crate::model::pattern::{Pattern, PatternError, Sample, Traces, Writer};

/// Samples in a group of neighbours.
const GROUP: usize = 16;
/// Neighbours lie no farther apart than this, pages: 4 MiB.
const NEIGHBOURS: u64 = 1024;
/// Slots shorter than this belong to the fine part of the look, ms.
const FINE_BELOW_MS: f64 = 30.0;
/// Counts per slot of independent writes have a dispersion of 1, give or take 0.1 over 200 slots.
const INDEPENDENT_BELOW: f64 = 1.6;
/// Hits per sample of a single rate have a dispersion of 1 likewise, give or take 0.35 over 16 samples.
const ALIKE_BELOW: f64 = 2.2;
/// Gaps between hits of a sweep vary by less than this share, or by less than a slot and a half.
const EVEN_BELOW: f64 = 0.15;
/// Groups of one rate: nearer than three standard errors, plus what two halves of one memory really differ by.
const POOL: (f64, f64) = (3.0, 0.05);
/// Memory that was not read is described by about so many samples.
const UNREAD_SAMPLES: u64 = 256;

/// Describes a trace as a pattern.
pub fn describe(trace: &Trace) -> Result<Pattern, PatternError> {
    let slots = Slots::of(trace);
    let hits = trace.by_sample();
    let groups: Vec<Group> = groups(trace).into_iter().map(|members| Group::of(members, &hits, &slots)).collect();
    let mut writers = vec![Writer::Idle; trace.samples.len()];
    let mut set = |index: usize, writer: Writer| {
        if let Some(slot) = writers.get_mut(index) {
            *slot = writer;
        }
    };

    let kind = |wanted: Kind| groups.iter().filter(move |group| group.kind == wanted);
    for pool in pool_periods(kind(Kind::Even).collect()) {
        let period = mean(pool.iter().map(|group| group.period));
        for &index in pool.iter().flat_map(|group| &group.members) {
            let at = hits.get(index).and_then(|own| slots.phase(own, period));
            set(index, at.map_or(Writer::Idle, |at| Writer::Periodic { period, at }));
        }
    }
    for pool in pool_rates(kind(Kind::Alike).collect()) {
        let exposure = pool.iter().fold(Exposure::default(), |sum, group| sum.plus(&group.exposure));
        let rate = exposure.rate();
        for &index in pool.iter().flat_map(|group| &group.members) {
            set(index, writer(rate));
        }
    }
    let mixed: Vec<usize> = kind(Kind::Mixed).flat_map(|group| group.members.iter().copied()).collect();
    let exposures: Vec<Exposure> = mixed.iter().filter_map(|&index| hits.get(index)).map(|own| slots.exposure(own)).collect();
    let mixture = Mixture::fit(&exposures, slots.length_ms);
    let mut rng = Pcg64Mcg::seed_from_u64(trace.total_pages);
    for (&index, exposure) in mixed.iter().zip(&exposures) {
        let rate = mixture.draw(exposure, rng.random());
        set(index, writer(rate));
    }
    let mut traces = Traces { length_ms: slots.length_ms, rows: vec![] };
    for &index in kind(Kind::Bursts).flat_map(|group| &group.members) {
        let Some(own) = hits.get(index).filter(|own| !own.is_empty()) else { continue };
        set(index, Writer::Traced { row: traces.rows.len() });
        traces.rows.push(own.iter().map(|&slot| slots.within(slot, rng.random())).collect());
    }

    // Last, since it explains what looked like single writes here and nothing there.
    if let Some(sweep) = Sweep::find(trace, &slots.single_hits(&hits)) {
        for ((sample, own), writer) in trace.samples.iter().zip(&hits).zip(&mut writers) {
            if let Some(at) = sweep.at(sample.page).filter(|_| own.len() <= 1) {
                *writer = Writer::Periodic { period: sweep.period(), at };
            }
        }
    }

    let mut samples: Vec<Sample> = trace
        .samples
        .iter()
        .zip(writers)
        .map(|(s, writer)| Sample { page: s.page, weight: s.weight, zero: s.zero, writer })
        .collect();
    samples.extend(unread(&trace.absent, true));
    samples.extend(unread(&trace.swapped, false));
    samples.sort_unstable_by_key(|sample| sample.page);
    Pattern::new(samples, traces, trace.length_ms())
}

/// Idle pages that were not read, described by few samples.
fn unread(runs: &[(u64, u64)], zero: bool) -> Vec<Sample> {
    let total: u64 = runs.iter().map(|run| run.1).sum();
    let longest = total.div_ceil(UNREAD_SAMPLES).max(1);
    let mut samples: Vec<Sample> = vec![];
    for &(first, length) in runs {
        // Short gaps join the one before: a fragmented memory has tens of thousands.
        if let Some(last) = samples.last_mut().filter(|last| last.weight + length as f64 <= longest as f64) {
            last.weight += length as f64;
            continue;
        }
        let mut at = first;
        while at < first + length {
            let part = longest.min(first + length - at);
            samples.push(Sample { page: at, weight: part as f64, zero, writer: Writer::Idle });
            at += part;
        }
    }
    samples
}

/// What a group of neighbours looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Its pages come back at even intervals.
    Even,
    /// Independent writes at one rate, or none.
    Alike,
    /// Independent writes at several rates.
    Mixed,
    /// None of these.
    Bursts,
}

#[derive(Debug)]
struct Group {
    members: Vec<usize>,
    kind: Kind,
    exposure: Exposure,
    period: f64,
}

impl Group {
    fn of(members: Vec<usize>, hits: &[Vec<u32>], slots: &Slots) -> Self {
        let own: Vec<&Vec<u32>> = members.iter().filter_map(|&index| hits.get(index)).collect();
        let exposures: Vec<Exposure> = own.iter().map(|own| slots.exposure(own)).collect();
        let exposure = exposures.iter().fold(Exposure::default(), |sum, one| sum.plus(one));
        let even = slots.even_period(&own);
        let kind = if even.is_some() {
            Kind::Even
        } else if slots.dispersion_in_time(&own) >= INDEPENDENT_BELOW {
            Kind::Bursts
        } else if dispersion_over_samples(&exposures) >= ALIKE_BELOW {
            Kind::Mixed
        } else {
            Kind::Alike
        };
        Self { members, kind, exposure, period: even.unwrap_or(0.0) }
    }
}

/// Runs of neighbouring samples.
fn groups(trace: &Trace) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = vec![];
    let mut before: Option<u64> = None;
    for (index, sample) in trace.samples.iter().enumerate() {
        let near = before.is_some_and(|page| (sample.page - page) as f64 <= (NEIGHBOURS as f64).max(4.0 * sample.weight));
        match groups.last_mut().filter(|group| near && group.len() < GROUP) {
            Some(group) => group.push(index),
            None => groups.push(vec![index]),
        }
        before = Some(sample.page);
    }
    groups
}

/// The slots of a look: a fine part and a coarse one.
struct Slots<'a> {
    trace: &'a Trace,
    fine: Vec<usize>,
    coarse: Vec<usize>,
    is_fine: Vec<bool>,
    fine_ms: f64,
    coarse_ms: f64,
    length_ms: f64,
}

impl<'a> Slots<'a> {
    fn of(trace: &'a Trace) -> Self {
        let is_fine: Vec<bool> = (0..trace.slot_ends.len()).map(|slot| trace.slot_ms(slot) < FINE_BELOW_MS).collect();
        let (fine, coarse): (Vec<usize>, Vec<usize>) =
            (0..trace.slot_ends.len()).partition(|&slot| is_fine.get(slot).copied().unwrap_or(false));
        let average = |of: &[usize]| if of.is_empty() { 0.0 } else { mean(of.iter().map(|&slot| trace.slot_ms(slot))) };
        let (fine_ms, coarse_ms) = (average(&fine), average(&coarse));
        Self { trace, fine, coarse, is_fine, fine_ms, coarse_ms, length_ms: trace.length_ms() }
    }

    fn exposure(&self, hits: &[u32]) -> Exposure {
        let fine = hits.iter().filter(|&&slot| self.is_fine.get(slot as usize).copied().unwrap_or(false)).count();
        Exposure {
            fine: (fine as f64, self.fine.len() as f64, self.fine_ms),
            coarse: ((hits.len() - fine) as f64, self.coarse.len() as f64, self.coarse_ms),
        }
    }

    /// Variance of the group's hits per slot over that of independent writes; 1 where there is nothing to tell.
    fn dispersion_in_time(&self, group: &[&Vec<u32>]) -> f64 {
        let slots = if self.coarse.len() >= self.fine.len() { &self.coarse } else { &self.fine };
        let mut per_slot = vec![0.0; self.trace.slot_ends.len()];
        for &slot in group.iter().copied().flatten() {
            if let Some(count) = per_slot.get_mut(slot as usize) {
                *count += 1.0;
            }
        }
        let counts: Vec<f64> = slots.iter().filter_map(|&slot| per_slot.get(slot)).copied().collect();
        let average = mean(counts.iter().copied());
        // Pages of different rates: their own variances add up.
        let expected: f64 = group
            .iter()
            .map(|own| {
                let hit = own.iter().filter(|&&slot| slots.binary_search(&(slot as usize)).is_ok()).count();
                let p = hit as f64 / slots.len().max(1) as f64;
                p * (1.0 - p)
            })
            .sum();
        // A handful of hits has no spread worth the name.
        if counts.len() < 20 || expected * (counts.len() as f64) < 4.0 {
            return 1.0;
        }
        mean(counts.iter().map(|count| (count - average).powi(2))) / expected
    }

    /// The period of pages that come back at even intervals.
    fn even_period(&self, group: &[&Vec<u32>]) -> Option<f64> {
        let mut gaps: Vec<f64> = vec![];
        let mut returning = 0;
        for own in group {
            let times: Vec<f64> = own.iter().map(|&slot| self.within(slot, 0.5)).collect();
            let before = gaps.len();
            gaps.extend(times.iter().zip(times.iter().skip(1)).map(|(a, b)| b - a));
            returning += usize::from(gaps.len() > before);
        }
        if group.len() < 4 || returning * 10 < group.len() * 9 {
            return None;
        }
        let period = mean(gaps.iter().copied());
        let deviation = mean(gaps.iter().map(|gap| (gap - period).powi(2))).sqrt();
        // Gaps that are hardly longer than a slot look even whatever writes.
        let even = deviation < EVEN_BELOW * period || deviation < 0.75 * self.coarse_ms && period > 6.0 * self.coarse_ms;
        (even && period > 3.0 * self.coarse_ms.max(self.fine_ms)).then_some(period)
    }

    /// When a page that is written every `period` ms was written first, from all its hits.
    fn phase(&self, hits: &[u32], period: f64) -> Option<f64> {
        let first = self.within(*hits.first()?, 0.5);
        let at = mean(hits.iter().map(|&slot| {
            let time = self.within(slot, 0.5);
            time - ((time - first) / period).round() * period
        }));
        Some(at)
    }

    /// For each sample the time of its hit where it has but one, ms.
    fn single_hits(&self, hits: &[Vec<u32>]) -> Vec<Option<f64>> {
        hits.iter().map(|own| if let [slot] = own.as_slice() { Some(self.within(*slot, 0.5)) } else { None }).collect()
    }

    /// A moment in a slot, by the share of it that has passed, ms.
    fn within(&self, slot: u32, share: f64) -> f64 {
        let slot = slot as usize;
        let end = self.trace.slot_ends.get(slot).copied().unwrap_or(self.length_ms);
        end - (1.0 - share) * self.trace.slot_ms(slot)
    }
}

/// Variance of the hits per sample over what chance makes of a single rate; 1 where there is nothing to tell.
fn dispersion_over_samples(exposures: &[Exposure]) -> f64 {
    let hits: Vec<f64> = exposures.iter().map(|e| e.coarse.0).collect();
    let Some(slots) = exposures.first().map(|e| e.coarse.1).filter(|&slots| slots > 0.0 && hits.len() >= 4) else { return 1.0 };
    let average = mean(hits.iter().copied());
    let expected = average * (1.0 - average / slots);
    if average * hits.len() as f64 <= 8.0 || expected <= 0.0 {
        return 1.0;
    }
    hits.iter().map(|h| (h - average).powi(2)).sum::<f64>() / (hits.len() - 1) as f64 / expected
}

/// Groups of like rate.
fn pool_rates(mut groups: Vec<&Group>) -> Vec<Vec<&Group>> {
    groups.sort_by(|a, b| a.exposure.rate().total_cmp(&b.exposure.rate()));
    pool(groups, |pool: &Exposure, group| {
        let (a, b) = (pool.rate(), group.exposure.rate());
        let error = (1.0 / pool.hits().max(1.0) + 1.0 / group.exposure.hits().max(1.0)).sqrt();
        if a > 0.0 && b > 0.0 { (b / a).ln() < POOL.0 * error + POOL.1 } else { a <= 0.0 && b <= 0.0 }
    })
}

/// Groups of like period: parts of one sweep.
fn pool_periods(mut groups: Vec<&Group>) -> Vec<Vec<&Group>> {
    groups.sort_by(|a, b| a.period.total_cmp(&b.period));
    let mut pools: Vec<Vec<&Group>> = vec![];
    for group in groups {
        let like = pools.last().and_then(|pool| pool.last()).is_some_and(|last| group.period / last.period < 1.02);
        match pools.last_mut().filter(|_| like) {
            Some(pool) => pool.push(group),
            None => pools.push(vec![group]),
        }
    }
    pools
}

fn pool(groups: Vec<&Group>, alike: impl Fn(&Exposure, &Group) -> bool) -> Vec<Vec<&Group>> {
    let mut pools: Vec<(Exposure, Vec<&Group>)> = vec![];
    for group in groups {
        match pools.last_mut().filter(|(exposure, _)| alike(exposure, group)) {
            Some((exposure, pool)) => {
                *exposure = exposure.plus(&group.exposure);
                pool.push(group);
            }
            None => pools.push((group.exposure, vec![group])),
        }
    }
    pools.into_iter().map(|(_, pool)| pool).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    if count > 0.0 { sum / count } else { 0.0 }
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
