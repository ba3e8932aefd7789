//! A real migration between two QEMUs of this machine. In: a source, a target, the settings. Out: the truth, as QEMU tells it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use migvisor::{
    model::{
        forecast::{CostWeights, HostConstants, Question, Sla},
        units::{Bandwidth, Bytes, BytesPerSecond},
    },
    qemu::migration::{self, Limits, MigrationInfo, MigrationStatus},
};
use tokio::time::{Instant, sleep};

use super::{link::Link, vm::Vm};

/// From the hand-over until the source is ended.
const CONFIRMING: Duration = Duration::from_millis(150);

/// What a migration runs under.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// QEMU's `max-bandwidth`.
    pub bandwidth: Bandwidth,
    /// QEMU's `downtime-limit`.
    pub downtime_limit: Duration,
    /// After this long it is cancelled.
    pub time_budget: Duration,
    /// The rate of the line, where it is not this machine's memory.
    pub link: Option<BytesPerSecond>,
    /// QEMU slows the guest down where it would not converge.
    pub auto_converge: bool,
    /// It may be finished on the target's side ([`Nudge::PostCopy`]).
    pub post_copy: bool,
}

/// What is done to a migration on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nudge {
    /// The guest is stopped until it has arrived.
    Suspend,
    /// The guest goes over at once and fetches what is missing.
    PostCopy,
}

impl Settings {
    /// Capped at so many MiB/s, 300 ms of downtime, a budget of 60 s.
    pub fn capped(mib_per_second: u64) -> Self {
        Self { bandwidth: Bandwidth::Capped(BytesPerSecond(mib_per_second << 20)), ..Self::uncapped() }
    }

    /// No cap, 300 ms of downtime, a budget of 60 s.
    pub fn uncapped() -> Self {
        Self {
            bandwidth: Bandwidth::Unlimited,
            downtime_limit: Duration::from_millis(300),
            time_budget: Duration::from_secs(60),
            link: None,
            auto_converge: false,
            post_copy: false,
        }
    }

    /// What a forecast of such a migration is asked, on this host.
    pub fn question(&self, host: HostConstants) -> Question {
        Question {
            bandwidth: self.bandwidth,
            downtime_limit: self.downtime_limit,
            time_budget: Some(self.time_budget),
            host: HostConstants { line_rate: self.link.unwrap_or(host.line_rate), ..host },
            sla: Sla::default(),
            weights: CostWeights::default(),
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs on the target.
    Completed,
    /// The budget ended first: cancelled, the guest runs on the source.
    TimedOut,
    /// QEMU gave up, the guest runs on the source.
    Failed,
}

/// What really happened, by `query-migrate`.
#[derive(Debug, Clone, PartialEq)]
pub struct Truth {
    /// How it ended.
    pub status: Outcome,
    /// Total time, ms; up to the cancellation where it timed out.
    pub total_ms: u64,
    /// The guest's stop, ms.
    pub downtime_ms: Option<u64>,
    /// Until the first page, ms.
    pub setup_ms: u64,
    /// Pages sent whole (`normal`).
    pub pages: u64,
    /// Zero pages sent (`duplicate`).
    pub zero_pages: u64,
    /// `dirty-sync-count`.
    pub syncs: u64,
    /// On the wire.
    pub transferred: Bytes,
    /// On the wire while the guest stood.
    pub downtime_bytes: Bytes,
    /// QEMU's words where it failed.
    pub error: Option<String>,
}

/// Migrates. Afterwards a completed migration's source is ended and its guest runs in `target`, ready to be migrated on; else
/// the guest runs on in `source`, and `target` is of no more use.
pub async fn migrate(source: &mut Vm, target: &mut Vm, settings: Settings) -> Result<Truth> {
    migrate_under(source, target, settings, || None).await
}

/// [`migrate`], asked twice a second for what is to be done to it.
pub async fn migrate_under(
    source: &mut Vm,
    target: &mut Vm,
    settings: Settings,
    nudge: impl FnMut() -> Option<Nudge>,
) -> Result<Truth> {
    if settings.post_copy {
        migration::set_capabilities(target.lab(), &[("postcopy-ram", true)]).await?;
    }
    let mut socket = target.listen().await.context("the target does not listen")?;
    let link = match settings.link {
        None => None,
        Some(rate) => Some(Link::start(&target.dir().join("link"), &socket, rate)?),
    };
    if let Some(link) = &link {
        link.socket().clone_into(&mut socket);
    }
    let limits = Limits::new(settings.bandwidth, settings.downtime_limit);
    migration::set_limits(source.lab(), &limits).await?;
    let switches = [("events", true), ("auto-converge", settings.auto_converge), ("postcopy-ram", settings.post_copy)];
    migration::set_capabilities(source.lab(), &switches).await?;
    while source.lab().next_event(Instant::now()).await?.is_some() {}
    migration::start(source.lab(), &format!("unix:{}", socket.display())).await?;
    let (truth, suspended) = watch(source, settings.time_budget, nudge).await?;
    if suspended && truth.status == Outcome::Completed {
        target.resume().await?;
    } else if suspended {
        source.resume().await?;
    }
    if truth.status == Outcome::Completed {
        wait_running(target).await?;
        // As under libvirt, which ends a source only once both sides have confirmed.
        sleep(CONFIRMING).await;
        source.kill();
    }
    Ok(truth)
}

/// Waits for the end by QEMU's events (asking all the time would disturb it), and looks now and then all the same. Beside the truth:
/// was the guest suspended on its way?
async fn watch(source: &mut Vm, budget: Duration, mut nudge: impl FnMut() -> Option<Nudge>) -> Result<(Truth, bool)> {
    let end = Instant::now() + budget;
    let mut suspended = false;
    loop {
        let look = end.min(Instant::now() + Duration::from_millis(500));
        while let Some(event) = source.lab().next_event(look).await? {
            let status = event.data.get("status").and_then(|status| status.as_str());
            if event.name == "MIGRATION" && matches!(status, Some("completed" | "failed" | "cancelled")) {
                break;
            }
        }
        let info = migration::query(source.lab()).await?;
        match info.status {
            Some(MigrationStatus::Completed) => return Ok((truth(&info, Outcome::Completed), suspended)),
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => return Ok((truth(&info, Outcome::Failed), suspended)),
            _ if Instant::now() >= end => return Ok((cancel(source, &info).await?, suspended)),
            _ => {}
        }
        match nudge() {
            Some(Nudge::Suspend) => {
                source.pause().await?;
                suspended = true;
            }
            Some(Nudge::PostCopy) => {
                source.lab().execute::<serde_json::Value>("migrate-start-postcopy", serde_json::json!({})).await?;
            }
            None => {}
        }
    }
}

async fn cancel(source: &mut Vm, info: &MigrationInfo) -> Result<Truth> {
    migration::cancel(source.lab()).await?;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = migration::query(source.lab()).await?;
        match now.status {
            // It got through in the last moment.
            Some(MigrationStatus::Completed) => return Ok(truth(&now, Outcome::Completed)),
            Some(status) if !status.is_active() => return Ok(truth(info, Outcome::TimedOut)),
            _ if Instant::now() >= deadline => bail!("the migration does not end after migrate_cancel"),
            _ => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn wait_running(target: &mut Vm) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let status = migvisor::qemu::vm::status(target.lab()).await.with_context(|| target.complaint())?;
        if status.running {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("the guest arrived and does not run ({}). {}", status.state, target.complaint());
        }
        sleep(Duration::from_millis(5)).await;
    }
}

pub(super) fn truth(info: &MigrationInfo, status: Outcome) -> Truth {
    let ram = info.ram.unwrap_or_default();
    Truth {
        status,
        total_ms: info.total_time.unwrap_or(0),
        downtime_ms: info.downtime.filter(|_| status == Outcome::Completed),
        setup_ms: info.setup_time.unwrap_or(0),
        pages: ram.normal,
        zero_pages: ram.duplicate,
        syncs: ram.dirty_sync_count,
        transferred: ram.transferred,
        downtime_bytes: ram.downtime_bytes,
        error: info.error_desc.clone(),
    }
}
