//! This host's constants, by a few short real migrations. Out: what [`HostConstants`] needs, as medians of [`REPEATS`].

use anyhow::{Result, ensure};
use migvisor::model::forecast::HostConstants;

use super::{GuestSpec, Outcome, Settings, Truth, Vm, VmSpec, migrate};

/// Migrations of each kind.
pub const REPEATS: usize = 3;
/// 128 MiB of data that nobody writes.
const STILL_PAGES: u32 = 32_768;
/// A normal page on the wire: 4096 B and its header.
const WIRE_PAGE: f64 = 4104.0;

/// Measures the line rate, the pace of zero pages, set-up and completion. The time of a sync is too short to be told apart
/// from outside and stays an assumption. Takes about 8 s; the machine should have nothing else to do.
pub async fn calibrate() -> Result<HostConstants> {
    let assumed = HostConstants::default();
    let empty = chain(GuestSpec::idle()).await?;
    let full = chain(GuestSpec::still(STILL_PAGES)).await?;
    let zero_pages_per_ms = median(empty.iter().map(|truth| truth.zero_pages as f64 / sending_ms(truth)));
    let data_ms = |truth: &Truth| (sending_ms(truth) - truth.zero_pages as f64 / zero_pages_per_ms).max(1.0);
    let bytes_per_ms = full.iter().map(|truth| truth.pages as f64 * WIRE_PAGE / data_ms(truth)).fold(0.0, f64::max);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive rate, far below 2^63")]
    let line_rate = migvisor::model::units::BytesPerSecond((bytes_per_ms * 1000.0) as u64);
    Ok(HostConstants {
        line_rate,
        zero_pages_per_ms,
        setup_ms: median(empty.iter().chain(&full).map(|truth| truth.setup_ms as f64)),
        completion_ms: median(empty.iter().chain(&full).map(downtime_ms)),
        ..assumed
    })
}

/// The same guest, handed on from QEMU to QEMU without a cap.
async fn chain(guest: GuestSpec) -> Result<Vec<Truth>> {
    let mut source = Vm::start(VmSpec::new(guest)).await?;
    let mut truths = Vec::new();
    for _ in 0..REPEATS {
        let mut target = Vm::incoming(VmSpec::new(guest)).await?;
        let truth = migrate(&mut source, &mut target, Settings::uncapped()).await?;
        ensure!(truth.status == Outcome::Completed, "a migration for calibration did not complete: {truth:?}");
        truths.push(truth);
        source = target;
    }
    Ok(truths)
}

fn downtime_ms(truth: &Truth) -> f64 {
    truth.downtime_ms.unwrap_or(0) as f64
}

/// What is neither set-up nor completion; QEMU tells whole milliseconds.
fn sending_ms(truth: &Truth) -> f64 {
    (truth.total_ms as f64 - truth.setup_ms as f64 - downtime_ms(truth)).max(1.0)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
