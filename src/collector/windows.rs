//! QEMU's own dirty-rate measurement as a source: f(t) at a handful of windows, without a view of single pages.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::mixture::{rates_of_curve, writer};
use crate::{
    model::pattern::{Pattern, PatternError, Sample, Traces, Writer},
    qemu::{
        dirty_rate::{DirtyRateMode, calc_dirty_rate},
        monitor::Monitor,
        vm::VmError,
    },
};

/// Windows, ms: dense where downtimes are decided.
const WINDOWS_MS: [u64; 7] = [50, 100, 200, 400, 800, 1600, 3200];
/// Samples of the pattern made from a curve.
const SAMPLES: u64 = 4096;

/// f(t) at a few windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Windows {
    /// Guest RAM, pages.
    pub total_pages: u64,
    /// Pages that the host holds for the guest; the others are zero.
    pub resident_pages: u64,
    /// `(window in ms, distinct pages written within it)`.
    pub points: Vec<(f64, f64)>,
}

/// Measures window after window for about `duration`, the short ones more often than once.
pub async fn measure(
    monitor: &mut Monitor,
    mode: DirtyRateMode,
    duration: Duration,
    mut progress: impl FnMut(f64),
) -> Result<Vec<(f64, f64)>, VmError> {
    let longest = duration.as_secs_f64() * 1000.0;
    let windows = WINDOWS_MS.iter().filter(|&&ms| ms as f64 <= longest / 2.0 || ms == 50);
    let round: f64 = windows.clone().map(|&ms| ms as f64).sum();
    let rounds = (longest / round).round().max(1.0);
    let (mut points, mut done) = (vec![], 0.0);
    for &ms in windows {
        let (mut pages, mut measured_ms) = (0.0, 0.0);
        let mut count = 0.0;
        while count < rounds {
            let rate = calc_dirty_rate(monitor, Duration::from_millis(ms), mode).await?;
            pages += rate.pages() as f64;
            measured_ms += rate.window.as_secs_f64() * 1000.0;
            count += 1.0;
            done += ms as f64;
            progress((done / (round * rounds)).min(1.0));
        }
        points.push((measured_ms / count, pages / count));
    }
    Ok(points)
}

/// Rates that meet the curve, spread evenly over the memory that the host holds: where they lie is not known.
pub fn describe(windows: &Windows) -> Result<Pattern, PatternError> {
    let resident = windows.resident_pages.min(windows.total_pages).max(1);
    let rates = rates_of_curve(&windows.points, resident as f64);
    let count = SAMPLES.min(resident);
    let weight = resident as f64 / count as f64;
    // Each rate in turn gets the samples that its pages are due; a stride spreads them.
    let mut writers = vec![Writer::Idle; usize::try_from(count).unwrap_or(0)];
    let stride = 2_654_435_761_u64;
    let (mut due, mut given) = (0.0, 0_u64);
    for (rate, pages) in rates {
        due += pages / weight;
        while (given as f64) < due.round() && given < count {
            if let Some(slot) = usize::try_from(given.wrapping_mul(stride) % count).ok().and_then(|at| writers.get_mut(at)) {
                *slot = writer(rate);
            }
            given += 1;
        }
    }
    let mut samples: Vec<Sample> =
        (0_u64..).zip(writers).map(|(i, writer)| Sample { page: i * resident / count, weight, zero: false, writer }).collect();
    if windows.total_pages > resident {
        let weight = (windows.total_pages - resident) as f64;
        samples.push(Sample { page: resident, weight, zero: true, writer: Writer::Idle });
    }
    let observed = windows.points.iter().map(|p| p.0).fold(0.0, f64::max);
    Pattern::new(samples, Traces::default(), observed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    use super::*;

    #[test]
    fn a_curve_becomes_a_pattern_of_the_same_curve() {
        let rate = 40.0 / 16_384.0;
        let f = |ms: f64| 16_384.0 * -(-rate * ms).exp_m1();
        let points = WINDOWS_MS.map(|ms| (ms as f64, f(ms as f64))).into();
        let pattern = describe(&Windows { total_pages: 131_072, resident_pages: 20_000, points }).unwrap();
        for ms in [50.0, 300.0, 1600.0, 6400.0] {
            let (got, wanted) = (pattern.curve().pages(ms), f(ms));
            assert!((got / wanted - 1.0).abs() < 0.04, "{ms}: {got} against {wanted}");
        }
        assert_eq!(pattern.total_pages().round() as u64, 131_072);
        assert_eq!(pattern.nonzero_pages().round() as u64, 20_000);
    }

    #[test]
    fn an_idle_curve_is_an_idle_pattern() {
        let points = WINDOWS_MS.map(|ms| (ms as f64, 0.0)).into();
        let pattern = describe(&Windows { total_pages: 100, resident_pages: 500, points }).unwrap();
        assert_eq!(pattern.curve().pages(1000.0).to_bits(), 0);
        assert_eq!(pattern.total_pages().round() as u64, 100);
    }
}
