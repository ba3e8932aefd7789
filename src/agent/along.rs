//! Reads a real migration along: only asks QEMU how far it is, changes nothing.
//!
//! In: a monitor of the source. Out: readings while it runs, and the truth at its end, which the manager learns from. Where QEMU is gone
//! before it could be asked (a source ends soon after it has handed over), the last reading is all there is, and is called that.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    model::units::{Bytes, BytesPerSecond},
    qemu::{
        migration::{self, MigrationInfo, MigrationStatus},
        monitor::{Address, Monitor},
        qmp::QmpError,
    },
};

/// Between two questions. Each costs QEMU's main loop a fraction of a millisecond.
const EVERY: Duration = Duration::from_millis(250);
/// For the monitor to open, and for each answer: a busy QEMU may be slow, and nothing is lost by waiting.
const PATIENCE: Duration = Duration::from_secs(10);
/// For a migration that was announced to begin: KubeVirt sets up its connections first.
const BEGINNING: Duration = Duration::from_secs(120);

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// QEMU's `dirty-sync-count`.
    pub iteration: u64,
    /// Still to send.
    pub remaining: Bytes,
    /// All of it.
    pub total: Bytes,
    /// Throughput of the last window.
    pub rate: BytesPerSecond,
    /// QEMU's auto-converge throttle, percent; `None` where it does not throttle.
    pub throttle: Option<u8>,
    /// Since its start.
    pub elapsed: Duration,
    /// Until the end, at the present rates of sending and of writing. `None` where it would not end.
    pub eta: Option<Duration>,
}

/// What a migration really was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truth {
    /// How it ended; `None`: QEMU was gone before it could be asked, and the figures are the last reading's.
    pub converged: Option<bool>,
    /// From `migrate` to the end.
    pub total: Duration,
    /// The guest's stop, where it converged.
    pub downtime: Option<Duration>,
    /// Pages sent whole.
    pub pages: u64,
    /// Zero pages sent.
    pub zero_pages: u64,
    /// On the wire.
    pub transferred: Bytes,
    /// `dirty-sync-count`.
    pub syncs: u64,
    /// The most that the guest was slowed down meanwhile, percent; `None`: not at all.
    pub throttle: Option<u8>,
}

/// Reads along until the migration has ended. `None`: there was none, or it was nothing to learn from.
pub async fn read_along(address: &Address, mut note: impl FnMut(Reading)) -> Result<Option<Truth>, QmpError> {
    let mut monitor = Monitor::connect(address, PATIENCE).await?;
    let announced = Instant::now();
    let mut last: Option<MigrationInfo> = None;
    // At the end QEMU does not tell of it any more.
    let mut throttle: Option<u8> = None;
    loop {
        let info = match migration::query(&mut monitor).await {
            Ok(info) => info,
            // The source is gone: it has handed over, or was killed.
            Err(QmpError::Closed { .. }) => return Ok(last.as_ref().map(|info| truth(info, None, throttle))),
            Err(error) => return Err(error),
        };
        match (info.status, last.is_some()) {
            // What ended before we came was another migration, or this one: only QEMU's last is known.
            // (One that came in is completed as well, and has no figures.)
            (Some(MigrationStatus::Completed), _) if info.ram.is_some() => return Ok(Some(truth(&info, Some(true), throttle))),
            (Some(MigrationStatus::Failed | MigrationStatus::Cancelled), true) => {
                return Ok(Some(truth(&info, Some(false), throttle)));
            }
            (Some(status), _) if status.is_active() => {
                let read = reading(&info);
                throttle = throttle.max(read.throttle);
                note(read);
                last = Some(info);
            }
            (_, true) => return Ok(last.as_ref().map(|info| truth(info, None, throttle))),
            (_, false) if announced.elapsed() > BEGINNING => return Ok(None),
            _ => {}
        }
        // The end is told by an event, and QEMU is soon gone after it: ask at once.
        let next = Instant::now() + EVERY;
        while let Some(event) = monitor.next_event(next).await.unwrap_or(None) {
            if event.name == "MIGRATION" {
                break;
            }
        }
        sleep(Duration::from_millis(1)).await;
    }
}

fn reading(info: &MigrationInfo) -> Reading {
    let ram = info.ram.unwrap_or_default();
    // Mbit/s of a million bits, as QEMU counts.
    let bytes_per_second = if ram.mbps.is_finite() { (ram.mbps * 125_000.0).clamp(0.0, 1e15) } else { 0.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let rate = BytesPerSecond(bytes_per_second as u64);
    let gained = bytes_per_second - ram.dirty_pages_rate as f64 * ram.page_size as f64;
    let eta = (gained > 0.0).then(|| Duration::from_secs_f64((ram.remaining.0 as f64 / gained).min(1e7)));
    Reading {
        iteration: ram.dirty_sync_count,
        remaining: ram.remaining,
        total: ram.total,
        rate,
        throttle: info.cpu_throttle_percentage.filter(|percent| *percent > 0),
        elapsed: info.total().unwrap_or_default(),
        eta,
    }
}

fn truth(info: &MigrationInfo, converged: Option<bool>, throttle: Option<u8>) -> Truth {
    let ram = info.ram.unwrap_or_default();
    Truth {
        converged,
        total: info.total().unwrap_or_default(),
        downtime: info.downtime.filter(|_| converged == Some(true)).map(Duration::from_millis),
        pages: ram.normal,
        zero_pages: ram.duplicate,
        transferred: ram.transferred,
        syncs: ram.dirty_sync_count,
        throttle,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn info(more: serde_json::Value) -> MigrationInfo {
        serde_json::from_value(more).unwrap()
    }

    #[test]
    fn a_reading_says_when_it_would_end_at_this_rate() {
        let active = info(json!({
            "status": "active", "total-time": 1500, "cpu-throttle-percentage": 30,
            "ram": { "total": 1000, "remaining": 150_000_000, "mbps": 800.0, "dirty-sync-count": 3, "dirty-pages-rate": 10_000, "page-size": 4000 }
        }));
        let read = reading(&active);
        assert_eq!((read.iteration, read.rate.0, read.throttle), (3, 100_000_000, Some(30)));
        assert_eq!(read.eta, Some(Duration::from_millis(2500)));
        // What a hostile QEMU may say is no panic.
        for mbps in ["-1e300", "1e300"] {
            let odd = format!(r#"{{"ram": {{"remaining": 18446744073709551615, "mbps": {mbps}}}}}"#);
            let _ = reading(&serde_json::from_str(&odd).unwrap());
        }
        assert_eq!(reading(&info(json!({}))).eta, None);
    }

    #[test]
    fn only_what_completed_has_a_downtime() {
        let ended = info(
            json!({ "status": "completed", "total-time": 900, "downtime": 42, "ram": { "normal": 7, "duplicate": 8, "transferred": 9 } }),
        );
        let whole = truth(&ended, Some(true), Some(20));
        assert_eq!((whole.downtime, whole.throttle), (Some(Duration::from_millis(42)), Some(20)));
        let gone = truth(&ended, None, None);
        assert_eq!((gone.converged, gone.downtime, gone.pages, gone.zero_pages, gone.transferred), (None, None, 7, 8, Bytes(9)));
    }
}
