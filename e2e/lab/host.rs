//! This host's constants, by a few short real migrations. Out: what [`HostConstants`] needs, as medians of [`REPEATS`].

use std::time::Duration;

use anyhow::{Result, ensure};
use migvisor::model::{forecast::HostConstants, units::BytesPerSecond};

use super::{GuestSpec, Outcome, Settings, Truth, Vm, VmSpec, migrate};

/// Migrations of each kind.
pub const REPEATS: usize = 3;
/// A guest that leaves much to send while it stands: 256 MiB written all over, capped at 100 MiB/s, and a second of downtime allowed.
const BUSY: GuestSpec = GuestSpec::uniform(65_536, 18);
const BUSY_CAP_MIB: u64 = 100;
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// Measures the line rate, the pace of zero pages, set-up and completion. The time of a sync is too short to be told apart
/// from outside and stays an assumption. Takes about 20 s; the machine should have nothing else to do.
///
/// The line rate is that of pages which the target has held before, as all pages are that a migration sends while the guest
/// stands: memory that the target touches for the first time costs it several times as long.
pub async fn calibrate() -> Result<HostConstants> {
    let assumed = HostConstants::default();
    let empty = chain(GuestSpec::idle(), Settings::uncapped()).await?;
    let busy = chain(BUSY, Settings { downtime_limit: BUSY_LIMIT, ..Settings::capped(BUSY_CAP_MIB) }).await?;
    let completion_ms = median(empty.iter().map(downtime_ms));
    let bytes_per_ms = busy.iter().map(|truth| truth.downtime_bytes.0 as f64 / (downtime_ms(truth) - completion_ms).max(1.0));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive rate, far below 2^63")]
    let line_rate = BytesPerSecond((median(bytes_per_ms) * 1000.0) as u64);
    Ok(HostConstants {
        line_rate,
        zero_pages_per_ms: median(empty.iter().map(|truth| truth.zero_pages as f64 / sending_ms(truth))),
        setup_ms: median(empty.iter().map(|truth| truth.setup_ms as f64)),
        completion_ms,
        ..assumed
    })
}

/// The same guest, handed on from QEMU to QEMU.
async fn chain(guest: GuestSpec, settings: Settings) -> Result<Vec<Truth>> {
    let mut source = Vm::start(VmSpec::new(guest)).await?;
    let mut truths = Vec::new();
    for _ in 0..REPEATS {
        let mut target = Vm::incoming(VmSpec::new(guest)).await?;
        let truth = migrate(&mut source, &mut target, settings).await?;
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
