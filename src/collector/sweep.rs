//! A sweep that takes longer than the look: its front is seen to move, but no page is seen twice.
//!
//! Time against address is a straight line, which independent writes never make. The sweep is taken to go on through the
//! touched memory that it moves in, and to begin anew where that begins; how long a round takes is its length over the
//! speed of the front.

use super::trace::Trace;

/// The speed is taken over this share of the hits: slots of 50 ms are coarse, single neighbours say little.
const STRETCHES: usize = 12;
/// Fewer hits than this make no line.
const LEAST_HITS: usize = 32;
/// So many stretches out of a hundred have to agree on the speed ...
const AGREE: usize = 85;
/// ... within this share of the median.
const WITHIN: f64 = 0.3;
/// Gaps of untouched memory that a sweep is taken to jump over, pages: 1 MiB.
const JUMPS: u64 = 256;

/// A front that moves through memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sweep {
    /// The touched memory that it moves in: first page and the one after the last.
    region: (u64, u64),
    /// Pages per ms, upwards.
    speed: f64,
    /// A page and when it was passed, ms.
    seen: (u64, f64),
}

impl Sweep {
    /// Looks for one among samples that were hit once. `passed` is each sample's only hit, ms; `None` for the others.
    pub(super) fn find(trace: &Trace, passed: &[Option<f64>]) -> Option<Self> {
        let hits: Vec<(u64, f64)> =
            trace.samples.iter().zip(passed).filter_map(|(sample, at)| at.map(|at| (sample.page, at))).collect();
        if hits.len() < LEAST_HITS {
            return None;
        }
        let stretch = hits.len() / STRETCHES;
        let ends = || hits.iter().zip(hits.iter().skip(stretch)).map(|(a, b)| ((b.0 - a.0) as f64, b.1 - a.1));
        let mut speeds: Vec<f64> = ends().filter(|(_, ms)| *ms > 0.0).map(|(pages, ms)| pages / ms).collect();
        speeds.sort_by(f64::total_cmp);
        let middle = *speeds.get(speeds.len() / 2)?;
        let agrees = |&(pages, ms): &(f64, f64)| ms > 0.0 && (pages / ms / middle - 1.0).abs() < WITHIN;
        // Stretches that go backwards count as disagreeing: the end of one round among them is allowed for.
        if ends().filter(agrees).count() * 100 < (hits.len() - stretch) * AGREE {
            return None;
        }
        let (pages, ms) = ends().filter(agrees).fold((0.0, 0.0), |sum, end| (sum.0 + end.0, sum.1 + end.1));
        let speed = pages / ms;
        let &seen = hits.get(hits.len() / 2)?;
        let region = touched(trace).into_iter().find(|&(first, end)| (first..end).contains(&seen.0))?;
        Some(Self { region, speed, seen })
    }

    /// Time for one round, ms.
    pub(super) fn period(&self) -> f64 {
        (self.region.1 - self.region.0) as f64 / self.speed
    }

    /// When a page is passed, ms; `None` outside the region.
    pub(super) fn at(&self, page: u64) -> Option<f64> {
        let ahead = page as f64 - self.seen.0 as f64;
        (self.region.0..self.region.1).contains(&page).then(|| self.seen.1 + ahead / self.speed)
    }
}

/// Runs of touched memory, with small gaps joined.
fn touched(trace: &Trace) -> Vec<(u64, u64)> {
    let mut runs = vec![];
    let mut at = 0;
    for &(first, length) in trace.absent.iter().filter(|run| run.1 > JUMPS) {
        if first > at {
            runs.push((at, first));
        }
        at = first + length;
    }
    if trace.total_pages > at {
        runs.push((at, trace.total_pages));
    }
    runs
}
