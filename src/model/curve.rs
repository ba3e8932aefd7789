//! The paper's working-set pattern f(t): expected distinct pages written within a window of length t.

use super::{
    forecast::PatternPoint,
    pattern::{Sample, Traces, Writer},
};

/// Width of a slot of the paper's array, ms.
pub const SLOT_MS: f64 = 10.0;

/// f(t), as a sum over kinds of writers: exact for the description that it was made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Random writers: `(rate per ms, pages)`.
    random: Vec<(f64, f64)>,
    /// Writers that come back: gaps between two writes, ascending, each with the pages it stands for per ms of its cycle.
    gaps: Vec<Gap>,
}

/// A page whose next write comes within `length` of a moment in this gap, drawn with a share of 1 / cycle per ms.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Gap {
    length: f64,
    /// Sum over this and all shorter gaps of `length × pages / cycle`.
    filled: f64,
    /// Sum over all longer gaps of `pages / cycle`.
    growing: f64,
}

impl Curve {
    pub(super) fn of(samples: &[Sample], traces: &Traces) -> Self {
        let mut random: Vec<(f64, f64)> = Vec::new();
        let mut gaps: Vec<(f64, f64)> = Vec::new();
        for sample in samples {
            match sample.writer {
                Writer::Idle => {}
                Writer::Random { rate } => random.push((rate, sample.weight)),
                Writer::Periodic { period, .. } => gaps.push((period, sample.weight / period)),
                Writer::Traced { row } => {
                    let times = traces.rows.get(row).map_or(&[][..], Vec::as_slice);
                    let (Some(first), Some(last)) = (times.first(), times.last()) else { continue };
                    let share = sample.weight / traces.length_ms;
                    gaps.push((first + traces.length_ms - last, share));
                    gaps.extend(times.iter().zip(times.iter().skip(1)).map(|(a, b)| (b - a, share)));
                }
            }
        }
        random.sort_by(|a, b| a.0.total_cmp(&b.0));
        random.dedup_by(|next, kept| {
            let same = next.0.to_bits() == kept.0.to_bits();
            if same {
                kept.1 += next.1;
            }
            same
        });
        Self { random, gaps: accumulate(gaps) }
    }

    /// Pages written within a window of `ms`.
    pub fn pages(&self, ms: f64) -> f64 {
        if ms <= 0.0 {
            return 0.0;
        }
        let random: f64 = self.random.iter().map(|(rate, pages)| -pages * (-rate * ms).exp_m1()).sum();
        let shorter = self.gaps.partition_point(|gap| gap.length <= ms);
        let returning = match shorter.checked_sub(1).and_then(|last| self.gaps.get(last)) {
            Some(gap) => gap.filled + gap.growing * ms,
            None => self.gaps.first().map_or(0.0, |gap| (gap.growing + gap.filled / gap.length) * ms),
        };
        random + returning
    }

    /// The paper's array: `WSP[i]` is f(10 ms × (i + 1)).
    pub fn slots(&self, count: usize) -> Vec<f64> {
        (1..=count).map(|i| self.pages(i as f64 * SLOT_MS)).collect()
    }

    /// At most `count` points from 10 ms to `until_ms`, evenly spaced on a logarithmic axis.
    pub fn points(&self, until_ms: f64, count: usize) -> Vec<PatternPoint> {
        let steps = count.saturating_sub(1).max(1) as f64;
        let ratio = (until_ms / SLOT_MS).max(1.0);
        let mut points: Vec<PatternPoint> = Vec::with_capacity(count);
        for i in 0..count {
            let ms = (SLOT_MS * ratio.powf(i as f64 / steps) / SLOT_MS).round() * SLOT_MS;
            if points.last().is_none_or(|last| last.ms < ms) {
                points.push(PatternPoint { ms, pages: whole(self.pages(ms)) });
            }
        }
        points
    }
}

/// To the nearest whole number; page counts stay far below 2^53.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and page counts are small and positive")]
pub(super) fn whole(pages: f64) -> u64 {
    pages.round() as u64
}

fn accumulate(mut gaps: Vec<(f64, f64)>) -> Vec<Gap> {
    gaps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut growing: f64 = gaps.iter().map(|g| g.1).sum();
    let mut filled = 0.0;
    gaps.into_iter()
        .map(|(length, share)| {
            filled += length * share;
            growing = (growing - share).max(0.0);
            Gap { length, filled, growing }
        })
        .collect()
}
