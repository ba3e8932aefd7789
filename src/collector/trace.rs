//! What the page sampler recorded: for each sampled page, in which slots of time its contents changed.

use serde::{Deserialize, Serialize};

/// One sampled page and what it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SampledPage {
    /// Index in guest RAM.
    pub page: u64,
    /// How many pages it stands for.
    pub weight: f64,
    /// All zero when the look ended.
    pub zero: bool,
}

/// Changes of sampled pages, slot by slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Guest RAM, pages.
    pub total_pages: u64,
    /// Runs of pages that were never touched, `(first, length)`: zero, and not sampled.
    pub absent: Vec<(u64, u64)>,
    /// Runs of pages that were swapped out: not zero, not read, and idle or they would be in memory.
    #[serde(default)]
    pub swapped: Vec<(u64, u64)>,
    /// Sampled pages, ascending.
    pub samples: Vec<SampledPage>,
    /// When the slots end, ms since the first read; slot 0 begins at 0.
    pub slot_ends: Vec<f64>,
    /// For each slot, in order, the samples that changed in it: indexes, ascending.
    pub changed: Vec<Vec<u32>>,
}

/// More memory than any VM has: 128 TiB.
const MOST_PAGES: u64 = 1 << 35;

/// Why a recorded trace cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the trace is damaged: {0}; record it again")]
pub struct DamagedTrace(pub String);

impl Trace {
    /// Checks a trace that comes from outside.
    pub fn check(&self) -> Result<(), DamagedTrace> {
        let damaged = |what: &str| Err(DamagedTrace(what.to_owned()));
        if self.samples.is_empty() && self.absent.is_empty() {
            return damaged("it describes no memory");
        }
        if self.slot_ends.len() != self.changed.len() {
            return damaged("its slots and their changes differ in number");
        }
        let mut before = 0.0;
        for &end in &self.slot_ends {
            if !end.is_finite() || end <= before {
                return damaged("its slots do not follow each other");
            }
            before = end;
        }
        let count = self.samples.len();
        if self.changed.iter().flatten().any(|&index| index as usize >= count) {
            return damaged("it names samples that it does not have");
        }
        if self.samples.windows(2).any(|pair| matches!(pair, [a, b] if a.page >= b.page)) {
            return damaged("its samples do not ascend");
        }
        if self.samples.iter().any(|s| !s.weight.is_finite() || s.weight <= 0.0 || s.page >= self.total_pages) {
            return damaged("a sample lies outside the guest or stands for nothing");
        }
        if self
            .absent
            .iter()
            .chain(&self.swapped)
            .any(|&(first, length)| first.checked_add(length).is_none_or(|end| end > self.total_pages))
        {
            return damaged("untouched or swapped memory lies outside the guest");
        }
        let unread = self.absent.iter().chain(&self.swapped).try_fold(0_u64, |sum, run| sum.checked_add(run.1));
        if self.total_pages > MOST_PAGES || unread.is_none_or(|unread| unread > self.total_pages) {
            return damaged("it describes more memory than there is");
        }
        Ok(())
    }

    /// How long the look took, ms.
    pub fn length_ms(&self) -> f64 {
        self.slot_ends.last().copied().unwrap_or(0.0)
    }

    /// Length of a slot, ms.
    pub fn slot_ms(&self, slot: usize) -> f64 {
        let start = slot.checked_sub(1).and_then(|before| self.slot_ends.get(before)).copied().unwrap_or(0.0);
        self.slot_ends.get(slot).map_or(0.0, |end| end - start)
    }

    /// For each sample the slots in which it changed, ascending.
    pub fn by_sample(&self) -> Vec<Vec<u32>> {
        let mut slots = vec![Vec::new(); self.samples.len()];
        for (slot, changed) in (0..).zip(&self.changed) {
            for &index in changed {
                if let Some(own) = slots.get_mut(index as usize) {
                    own.push(slot);
                }
            }
        }
        slots
    }

    /// Distinct pages that changed within `ms` of a moment, averaged over the look, with the standard error of sampling:
    /// the estimate that owes nothing to a model. `None` where the look was too short.
    pub fn distinct_pages(&self, ms: f64) -> Option<(f64, f64)> {
        let slots = self.by_sample();
        let mut starts = vec![];
        let mut from = 0.0;
        for (slot, &end) in self.slot_ends.iter().enumerate() {
            if from + ms > self.length_ms() + 0.5 * self.slot_ms(slot) {
                break;
            }
            starts.push((slot, from));
            from = end;
        }
        // Windows that do not overlap: independent looks.
        let mut estimates: Vec<(f64, f64)> = vec![];
        let mut next_start = 0.0;
        for (slot, from) in starts {
            if from + 1e-9 < next_start {
                continue;
            }
            let last = self.slot_ends.partition_point(|&end| end < from + ms - 1e-6);
            let length = self.slot_ends.get(last).copied().unwrap_or_else(|| self.length_ms()) - from;
            if (length / ms - 1.0).abs() > 0.02 {
                continue;
            }
            next_start = from + length;
            let (mut pages, mut variance) = (0.0, 0.0);
            let hit = |own: &Vec<u32>| own.iter().any(|&s| (slot..=last).contains(&(s as usize)));
            let share = slots.iter().filter(|own| hit(own)).count() as f64 / slots.len().max(1) as f64;
            for (sample, own) in self.samples.iter().zip(&slots) {
                pages += if hit(own) { sample.weight } else { 0.0 };
                variance += sample.weight * (sample.weight - 1.0).max(0.0) * share * (1.0 - share);
            }
            estimates.push((pages, variance));
        }
        let n = estimates.len() as f64;
        let mean = estimates.iter().map(|e| e.0).sum::<f64>() / n;
        // The same samples in every window: their choice errs once, not once per window.
        let error = (estimates.iter().map(|e| e.1).sum::<f64>() / n).sqrt();
        (!estimates.is_empty()).then_some((mean, error))
    }
}
