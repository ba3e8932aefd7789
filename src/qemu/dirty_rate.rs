//! How much a guest writes within a window, as QEMU itself measures it (`calc-dirty-rate`). In: a window and a mode.
//! Out: the bytes of the distinct pages written within it. QEMU keeps one measurement per VM, and others use it too.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};

use super::{monitor::Monitor, qmp::QmpError, vm::VmError};
use crate::model::units::Bytes;

/// The shortest window that QEMU takes.
pub const SHORTEST: Duration = Duration::from_millis(50);
/// The longest window that QEMU takes.
pub const LONGEST: Duration = Duration::from_secs(60);
/// How long [`calc_dirty_rate`] waits for others' measurements.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Beyond the window, until the result must be there: the syncs of a large guest take their time.
const GRACE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
const LOOK: Duration = Duration::from_secs(1);

/// How QEMU looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyRateMode {
    /// KVM's dirty log: every page, at the price of write protection during the window. Always 0 under TCG.
    DirtyBitmap,
    /// Hashes so many pages per GiB (128 to 16 384) before and after: no cost for the guest, works under TCG.
    PageSampling {
        /// Samples per GiB.
        sample_pages: u32,
    },
}

impl DirtyRateMode {
    fn name(self) -> &'static str {
        match self {
            Self::DirtyBitmap => "dirty-bitmap",
            Self::PageSampling { .. } => "page-sampling",
        }
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyRate {
    /// The window as QEMU timed it: a little longer than asked for.
    pub window: Duration,
    /// The memory of the distinct pages written within it. QEMU rounds its MiB/s down, so half a unit is added; a
    /// reported 0 stays 0.
    pub bytes: Bytes,
    /// QEMU's rounding: the true value lies within ± this (after 0: above by up to twice this).
    pub rounding: Bytes,
}

impl DirtyRate {
    /// Distinct 4 KiB pages.
    pub fn pages(&self) -> u64 {
        self.bytes.pages()
    }
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    status: Stage,
    /// MiB/s, rounded down.
    dirty_rate: Option<u64>,
    /// Seconds.
    start_time: i64,
    /// In the unit that the query names.
    calc_time: u64,
    sample_pages: u64,
    mode: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Stage {
    Unstarted,
    Measuring,
    Measured,
}

/// Measures one window; waits up to [`PATIENCE`] for a measurement of somebody else to end.
pub async fn calc_dirty_rate(monitor: &mut Monitor, window: Duration, mode: DirtyRateMode) -> Result<DirtyRate, VmError> {
    calc_dirty_rate_within(monitor, window, mode, PATIENCE).await
}

/// As [`calc_dirty_rate`], with a patience of one's own.
pub async fn calc_dirty_rate_within(
    monitor: &mut Monitor,
    window: Duration,
    mode: DirtyRateMode,
    patience: Duration,
) -> Result<DirtyRate, VmError> {
    if !(SHORTEST..=LONGEST).contains(&window) {
        let reason = format!("QEMU takes windows of {SHORTEST:?} to {LONGEST:?}, not {window:?}");
        return Err(VmError::BadRequest { reason });
    }
    let mut waited = Duration::ZERO;
    loop {
        let asked = Instant::now();
        if begin(monitor, window, mode).await?
            && let Some(rate) = finish(monitor, window, mode).await?
        {
            return Ok(rate);
        }
        if waited >= patience {
            return Err(VmError::MeasurementBusy { waited });
        }
        sleep(POLL).await;
        waited = waited.saturating_add(asked.elapsed());
    }
}

/// Starts a measurement; `false` where another one is under way.
async fn begin(monitor: &mut Monitor, window: Duration, mode: DirtyRateMode) -> Result<bool, QmpError> {
    let milliseconds = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
    let mut arguments = json!({"calc-time": milliseconds, "calc-time-unit": "millisecond", "mode": mode.name()});
    if let (DirtyRateMode::PageSampling { sample_pages }, Some(map)) = (mode, arguments.as_object_mut()) {
        map.insert("sample-pages".to_owned(), json!(sample_pages));
    }
    match monitor.execute::<Value>("calc-dirty-rate", arguments).await {
        Ok(_) => Ok(true),
        Err(QmpError::Refused { description, .. }) if description.contains("already being measured") => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits for the result; `None` where it is not the one that was started.
async fn finish(monitor: &mut Monitor, window: Duration, mode: DirtyRateMode) -> Result<Option<DirtyRate>, VmError> {
    let started = query(monitor).await?;
    if !is_ours(&started, window, mode) {
        return Ok(None);
    }
    let patience = window.saturating_add(GRACE);
    let deadline = Instant::now() + patience;
    let over = Instant::now() + window;
    loop {
        // In a long window look now and then: a VM that ended is noticed soon.
        sleep_until(over.min(Instant::now() + LOOK)).await;
        let info = query(monitor).await?;
        if !is_ours(&info, window, mode) || !began_together(&started, &info) {
            return Ok(None);
        }
        if info.status == Stage::Measured {
            return Ok(Some(read(&info)));
        }
        if Instant::now() >= deadline {
            return Err(VmError::MeasurementStuck { window, waited: patience });
        }
        if Instant::now() >= over {
            sleep(POLL).await;
        }
    }
}

async fn query(monitor: &mut Monitor) -> Result<Info, QmpError> {
    monitor.execute("query-dirty-rate", json!({"calc-time-unit": "millisecond"})).await
}

/// The returned window is what QEMU really waited: at least what was asked for, and more on a busy host.
fn is_ours(info: &Info, window: Duration, mode: DirtyRateMode) -> bool {
    let samples = match mode {
        DirtyRateMode::DirtyBitmap => true,
        DirtyRateMode::PageSampling { sample_pages } => info.sample_pages == u64::from(sample_pages),
    };
    let calc_time = Duration::from_millis(info.calc_time);
    let grown = info.status == Stage::Measured && calc_time <= window.saturating_add(GRACE);
    info.status != Stage::Unstarted
        && info.mode == mode.name()
        && samples
        && calc_time >= window
        && (grown || calc_time == window)
}

/// QEMU stamps a measurement when it is set up and again when it begins, in whole seconds.
fn began_together(one: &Info, other: &Info) -> bool {
    one.start_time.abs_diff(other.start_time) <= 1
}

fn read(info: &Info) -> DirtyRate {
    // In halves of a MiB/s over the window: nothing is rounded before the end.
    let over_window = |halves: u128| {
        let bytes = halves.saturating_mul(1 << 20).saturating_mul(u128::from(info.calc_time)) / 2000;
        Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
    };
    let bytes = match info.dirty_rate.unwrap_or(0) {
        0 => Bytes(0),
        rate => over_window(u128::from(rate).saturating_mul(2).saturating_add(1)),
    };
    DirtyRate { window: Duration::from_millis(info.calc_time), bytes, rounding: over_window(1) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn info(text: &str) -> Info {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn half_a_unit_is_added_over_the_returned_window() {
        let rate = read(&info(
            r#"{"status": "measured", "sample-pages": 0, "dirty-rate": 10, "mode": "dirty-bitmap", "calc-time-unit": "millisecond", "start-time": 7, "calc-time": 400}"#,
        ));
        assert_eq!(rate.window, Duration::from_millis(400));
        // 10.5 MiB/s for 0.4 s
        assert_eq!(rate.bytes.0, 4_404_019);
        assert_eq!(rate.pages(), 1076);
    }

    #[test]
    fn a_foreign_measurement_is_not_ours() {
        let window = Duration::from_millis(400);
        let text = |mode: &str, samples, time| {
            format!(
                r#"{{"status": "measured", "sample-pages": {samples}, "dirty-rate": 1, "mode": "{mode}", "start-time": 7, "calc-time": {time}}}"#
            )
        };
        assert!(is_ours(&info(&text("dirty-bitmap", 0, 401)), window, DirtyRateMode::DirtyBitmap));
        assert!(!is_ours(&info(&text("page-sampling", 512, 401)), window, DirtyRateMode::DirtyBitmap));
        assert!(!is_ours(&info(&text("page-sampling", 512, 401)), window, DirtyRateMode::PageSampling { sample_pages: 4096 }));
        assert!(!is_ours(&info(&text("dirty-bitmap", 0, 300)), window, DirtyRateMode::DirtyBitmap));
        assert!(!is_ours(&info(&text("dirty-bitmap", 0, 60_000)), window, DirtyRateMode::DirtyBitmap));
    }

    proptest! {
        #[test]
        fn no_answer_overflows(rate in any::<u64>(), time in any::<u64>()) {
            let text = format!(r#"{{"status": "measured", "sample-pages": 0, "dirty-rate": {rate}, "mode": "dirty-bitmap", "start-time": 7, "calc-time": {time}}}"#);
            let _ = read(&info(&text)).pages();
        }
    }
}
