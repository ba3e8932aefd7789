//! Who writes which page when: what the collector hands to the replay.
//!
//! Guest memory is a list of [`Sample`]s in the order of their addresses; each stands for `weight` like pages and has a
//! [`Writer`]. Every replay draws its own [`Realisation`], which answers one question: which of these samples were written
//! between then and now. The paper's curve f(t) is the expectation of the same description ([`Pattern::curve`]).

use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::{Deserialize, Serialize};

use super::curve::Curve;

/// One page, or one that stands for many like it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Index of the page in guest RAM, 4 KiB each.
    pub page: u64,
    /// How many pages it stands for; 1 where every page is described.
    pub weight: f64,
    /// All zero when it was last read: costs 9 bytes of the stream instead of a page.
    pub zero: bool,
    /// What writes to it.
    pub writer: Writer,
}

/// What writes to a sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Writer {
    /// Nothing that was seen.
    Idle,
    /// Independent writes at a rate, per ms.
    Random {
        /// Writes per millisecond to each page that the sample stands for.
        rate: f64,
    },
    /// One write every `period` ms, as a sweep over memory leaves behind.
    Periodic {
        /// Time between two writes, ms.
        period: f64,
        /// When the first one falls, ms; the pages of a sweep are in step with each other.
        at: f64,
    },
    /// Writes at the recorded times of [`Pattern::traces`].
    Traced {
        /// Row of the recording.
        row: usize,
    },
}

/// Recorded write times, replayed in a circle from an unknown phase.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Traces {
    /// Length of the recording, ms.
    pub length_ms: f64,
    /// Per row the times of its writes, ascending, within `0..length_ms`.
    pub rows: Vec<Vec<f64>>,
}

/// Why a description of memory cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PatternError {
    /// Samples have to ascend by page.
    #[error("sample {0} does not come after the one before it: samples have to ascend by page")]
    Unordered(usize),
    /// A number that cannot be.
    #[error("sample {index}: {what} is {value}: it has to be finite and above zero")]
    Absurd {
        /// Which sample.
        index: usize,
        /// Which number.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// A row that was not recorded.
    #[error("sample {index} refers to trace {row}, but only {rows} were recorded")]
    NoSuchTrace {
        /// Which sample.
        index: usize,
        /// The row asked for.
        row: usize,
        /// How many there are.
        rows: usize,
    },
    /// Times that do not ascend, or lie outside the recording.
    #[error("trace {0}: its times have to ascend, within the length of the recording")]
    DisorderedTrace(usize),
    /// Nothing to migrate.
    #[error("the pattern describes no memory")]
    Empty,
}

/// Who writes which page when.
#[derive(Debug, Clone, PartialEq)]
pub struct Pattern {
    samples: Vec<Sample>,
    traces: Traces,
    observed_ms: f64,
    /// How busy each of the guest's CPUs was, 0..=1; empty where that is not known.
    cpus: Vec<f64>,
    /// Random writers of one rate, drawn together.
    classes: Vec<Class>,
    /// Samples whose writes come back: periodic and recorded ones.
    returning: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Class {
    rate: f64,
    members: Vec<Member>,
    /// Every member stands for itself alone.
    single: bool,
}

/// A sample and the pages that it stands for, side by side: the draw is the hottest loop of a replay.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Member {
    index: u32,
    /// What one page is of those that it stands for: 1 / weight.
    page: f64,
}

impl Pattern {
    /// `observed_ms`: how long the guest was looked at; a migration that takes longer is an extrapolation.
    pub fn new(samples: Vec<Sample>, traces: Traces, observed_ms: f64) -> Result<Self, PatternError> {
        if samples.is_empty() {
            return Err(PatternError::Empty);
        }
        for (index, sample) in samples.iter().enumerate() {
            let positive = |what, value: f64| {
                if value.is_finite() && value > 0.0 { Ok(()) } else { Err(PatternError::Absurd { index, what, value }) }
            };
            positive("weight", sample.weight)?;
            match sample.writer {
                Writer::Idle => {}
                Writer::Random { rate } => positive("write rate", rate)?,
                Writer::Periodic { period, at } => {
                    positive("period", period)?;
                    positive("offset", at.abs() + 1.0)?;
                }
                Writer::Traced { row } if row >= traces.rows.len() => {
                    return Err(PatternError::NoSuchTrace { index, row, rows: traces.rows.len() });
                }
                Writer::Traced { .. } => positive("length of the recording", traces.length_ms)?,
            }
        }
        if let Some(at) = samples.windows(2).position(|pair| matches!(pair, [a, b] if a.page >= b.page)) {
            return Err(PatternError::Unordered(at + 1));
        }
        let ascend = |row: &Vec<f64>| {
            row.iter().all(|time| (0.0..=traces.length_ms).contains(time))
                && row.windows(2).all(|pair| matches!(pair, [a, b] if a <= b))
        };
        if let Some(row) = traces.rows.iter().position(|row| !ascend(row)) {
            return Err(PatternError::DisorderedTrace(row));
        }
        let classes = classes(&samples);
        let comes_back = |sample: &Sample| matches!(sample.writer, Writer::Periodic { .. } | Writer::Traced { .. });
        let returning = (0..samples.len()).filter(|&index| samples.get(index).is_some_and(comes_back)).collect();
        Ok(Self { samples, traces, observed_ms, cpus: Vec::new(), classes, returning })
    }

    /// The samples, ascending by page.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The recordings that traced samples refer to.
    pub fn traces(&self) -> &Traces {
        &self.traces
    }

    /// With how busy each of the guest's CPUs was, 0..=1; what is no share is left out.
    #[must_use]
    pub fn with_cpus(self, cpus: Vec<f64>) -> Self {
        Self { cpus: cpus.into_iter().filter(|busy| (0.0..=1.0).contains(busy)).collect(), ..self }
    }

    /// How busy each of the guest's CPUs was, 0..=1; empty where that is not known.
    pub fn cpus(&self) -> &[f64] {
        &self.cpus
    }

    /// How long the guest was looked at, ms.
    pub fn observed_ms(&self) -> f64 {
        self.observed_ms
    }

    /// Pages of the guest.
    pub fn total_pages(&self) -> f64 {
        self.samples.iter().map(|sample| sample.weight).sum()
    }

    /// Pages that are not all zero.
    pub fn nonzero_pages(&self) -> f64 {
        self.samples.iter().filter(|sample| !sample.zero).map(|sample| sample.weight).sum()
    }

    /// The paper's working-set pattern: expected distinct pages written within a window, by its length.
    pub fn curve(&self) -> Curve {
        Curve::of(&self.samples, &self.traces)
    }

    /// A stretch of time after which the pattern looks the same from another phase, ms; 0 where it has no phase.
    pub fn cycle_ms(&self) -> f64 {
        let mut cycle = 0.0_f64;
        for sample in &self.samples {
            match sample.writer {
                Writer::Periodic { period, .. } => cycle = cycle.max(period),
                Writer::Traced { .. } => return self.traces.length_ms.max(cycle),
                Writer::Idle | Writer::Random { .. } => {}
            }
        }
        cycle
    }

    /// What has to be kept to make it anew.
    pub fn record(&self) -> Recorded {
        let Self { samples, traces, observed_ms, cpus, .. } = self.clone();
        Recorded { samples, traces, observed_ms, cpus }
    }

    /// One possible course of events. `phase_ms` shifts periodic and recorded writes; `seed` draws the random ones.
    pub fn realise(&self, phase_ms: f64, seed: u64) -> Realisation<'_> {
        Realisation { pattern: self, phase_ms, rng: Pcg64Mcg::seed_from_u64(seed) }
    }
}

/// A pattern as it is kept in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Recorded {
    samples: Vec<Sample>,
    traces: Traces,
    observed_ms: f64,
    #[serde(default)]
    cpus: Vec<f64>,
}

impl Recorded {
    /// The pattern, if what was kept still makes one.
    pub fn restore(self) -> Result<Pattern, PatternError> {
        Ok(Pattern::new(self.samples, self.traces, self.observed_ms)?.with_cpus(self.cpus))
    }
}

/// Groups random writers by rate. Members are shuffled once, so that drawing along the list picks pages all over memory.
fn classes(samples: &[Sample]) -> Vec<Class> {
    let mut by_rate: Vec<(u64, u32)> = Vec::new();
    for (index, sample) in samples.iter().enumerate() {
        if let (Writer::Random { rate }, Ok(index)) = (sample.writer, u32::try_from(index)) {
            by_rate.push((rate.to_bits(), index));
        }
    }
    by_rate.sort_unstable();
    let mut rng = Pcg64Mcg::seed_from_u64(by_rate.len() as u64);
    by_rate
        .chunk_by(|a, b| a.0 == b.0)
        .map(|group| {
            let weight = |index: u32| samples.get(index as usize).map_or(1.0, |sample| sample.weight);
            let mut members: Vec<Member> = group.iter().map(|&(_, index)| Member { index, page: 1.0 / weight(index) }).collect();
            for last in (1..members.len()).rev() {
                members.swap(last, rng.random_range(0..=last));
            }
            let single = members.iter().all(|member| member.page >= 1.0);
            Class { rate: group.first().map_or(0.0, |g| f64::from_bits(g.0)), members, single }
        })
        .collect()
}

/// One possible course of events. Time runs from 0, the start of the migration, in ms, and must be asked in order:
/// for each sample no interval may overlap one that was asked before.
#[derive(Debug)]
pub struct Realisation<'a> {
    pattern: &'a Pattern,
    phase_ms: f64,
    rng: Pcg64Mcg,
}

impl Realisation<'_> {
    /// Calls `written` for each sample that is written at least once in `since[i] .. until`.
    /// A sample whose `since` is not before `until` (infinity, say) is not asked about.
    pub fn written(&mut self, since: &[f64], until: f64, mut written: impl FnMut(usize)) {
        let Self { pattern, phase_ms, rng } = self;
        for class in &pattern.classes {
            draw(class, since, until, rng, &mut written);
        }
        let until_there = until + *phase_ms;
        for &index in &pattern.returning {
            let (Some(sample), Some(&from)) = (pattern.samples.get(index), since.get(index)) else { continue };
            if from >= until {
                continue;
            }
            let hit = match sample.writer {
                Writer::Idle | Writer::Random { .. } => false,
                Writer::Periodic { period, at } => {
                    // Whole periods passed: `floor`, which is a call on a plain x86-64.
                    turns(until_there - at, period) > turns(from + *phase_ms - at, period)
                }
                Writer::Traced { row } => {
                    let times = pattern.traces.rows.get(row).map_or(&[][..], Vec::as_slice);
                    falls_within(times, pattern.traces.length_ms, from + *phase_ms, until_there)
                }
            };
            if hit {
                written(index);
            }
        }
    }
}

/// Draws one class. Pages that stand for themselves are drawn one by one. Samples that stand for many are drawn
/// systematically: single draws would make the count as noisy as if the guest had only that many pages, and noise
/// carries a migration over its threshold too early. What is left is the noise of the real, larger number of pages.
fn draw(class: &Class, since: &[f64], until: f64, rng: &mut Pcg64Mcg, written: &mut impl FnMut(usize)) {
    // Intervals come in few lengths: one for the clean pages, one for each chunk of the others. The members are shuffled, so more than
    // the last one is worth remembering: the exponential is what a draw costs.
    let (mut known, mut oldest) = ([(f64::NAN, 0.0); 4], 0_usize);
    let mut probability = |from: f64| {
        if from >= until {
            return 0.0;
        }
        if let Some(&(_, chance)) = known.iter().find(|(known, _)| known.to_bits() == from.to_bits()) {
            return chance;
        }
        let chance = -(-class.rate * (until - from)).exp_m1();
        if let Some(slot) = known.get_mut(oldest % 4) {
            *slot = (from, chance);
        }
        oldest = oldest.wrapping_add(1);
        chance
    };
    // A sample without an answer to "since when" is not asked about.
    let since_of = |member: &Member| since.get(member.index as usize).copied().unwrap_or(f64::INFINITY);
    if class.single {
        for member in &class.members {
            let p = probability(since_of(member));
            if p > 0.0 && rng.random::<f64>() < p {
                written(member.index as usize);
            }
        }
        return;
    }
    // Variance of the number of pages, in samples.
    let (mut any, mut variance) = (false, 0.0);
    for member in &class.members {
        let p = probability(since_of(member));
        any |= p > 0.0;
        variance += p * (1.0 - p) * member.page;
    }
    if !any {
        return;
    }
    let spread = if variance > 0.0 { gauss(rng) / variance.sqrt() } else { 0.0 };
    // Along the shuffled list from a random place: no two draws pick the same pages.
    let start = rng.random_range(0..class.members.len());
    let (tail, head) = class.members.split_at(start);
    let mut sum = rng.random::<f64>();
    for member in head.iter().chain(tail) {
        let p = probability(since_of(member));
        sum += (p + spread * p * (1.0 - p) * member.page).clamp(0.0, 1.0);
        if sum >= 1.0 {
            sum -= 1.0;
            written(member.index as usize);
        }
    }
}

/// How many whole periods fit, rounded down.
#[expect(clippy::cast_possible_truncation, reason = "saturates after 2^63 periods")]
fn turns(time: f64, period: f64) -> i64 {
    let turns = time / period;
    let towards_zero = turns as i64;
    if turns < towards_zero as f64 { towards_zero - 1 } else { towards_zero }
}

/// A standard normal deviate, near enough (Irwin–Hall of 12).
fn gauss(rng: &mut impl Rng) -> f64 {
    (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0
}

/// Does a circular recording have a write in `(from, until]`?
fn falls_within(times: &[f64], length: f64, from: f64, until: f64) -> bool {
    if times.is_empty() {
        return false;
    }
    if until - from >= length {
        return true;
    }
    let (from, until) = (from.rem_euclid(length), until.rem_euclid(length));
    let after = |t: f64| times.partition_point(|&time| time <= t);
    if from <= until { after(until) > after(from) } else { after(from) < times.len() || after(until) > 0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_circular_recording_wraps() {
        let times = [10.0, 90.0];
        let within = |from, until| falls_within(&times, 100.0, from, until);
        assert!(within(0.0, 10.0) && within(89.0, 95.0) && within(91.0, 111.0) && within(95.0, 1000.0));
        assert!(!within(10.0, 89.0) && !within(90.0, 109.0) && !within(211.0, 289.0));
    }

    #[test]
    fn nonsense_is_refused() {
        let sample = |page, weight, writer| Sample { page, weight, zero: false, writer };
        let new = |samples| Pattern::new(samples, Traces::default(), 0.0).unwrap_err();
        assert_eq!(new(vec![]), PatternError::Empty);
        assert_eq!(new(vec![sample(2, 1.0, Writer::Idle), sample(2, 1.0, Writer::Idle)]), PatternError::Unordered(1));
        assert!(matches!(new(vec![sample(0, f64::NAN, Writer::Idle)]), PatternError::Absurd { what: "weight", .. }));
        assert!(matches!(
            new(vec![sample(0, 1.0, Writer::Random { rate: 0.0 })]),
            PatternError::Absurd { what: "write rate", .. }
        ));
        assert!(matches!(new(vec![sample(0, 1.0, Writer::Traced { row: 0 })]), PatternError::NoSuchTrace { rows: 0, .. }));
    }
}
