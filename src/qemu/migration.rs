//! QEMU's migration: limits, start, cancel, and the truth about it (`query-migrate`). Names as in `qapi/migration.json`.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{monitor::Monitor, qmp::QmpError};
use crate::model::units::{Bandwidth, Bytes, BytesPerSecond};

/// What is set where no cap is wanted. QEMU takes 0 for "no limit" since 3.0 only in parts; this is beyond any line.
pub const UNCAPPED: u64 = 1 << 50;

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// None yet.
    None,
    /// Preparing.
    Setup,
    /// To be cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Pre-copy.
    Active,
    /// Post-copy.
    PostcopyActive,
    /// Post-copy, connection lost.
    PostcopyPaused,
    /// Post-copy, coming back.
    PostcopyRecover,
    /// Post-copy, preparing to come back.
    PostcopyRecoverSetup,
    /// Done: the guest is with the target.
    Completed,
    /// Failed: the guest runs on.
    Failed,
    /// Continuous replication.
    Colo,
    /// Waiting for permission to switch over.
    PreSwitchover,
    /// Saving the devices.
    Device,
    /// Waiting for a device to be unplugged.
    WaitUnplug,
    /// A status that this version of ours does not know: taken as active.
    #[serde(other)]
    Unknown,
}

impl MigrationStatus {
    /// Is QEMU busy with it?
    pub fn is_active(self) -> bool {
        !matches!(self, Self::None | Self::Cancelled | Self::Completed | Self::Failed)
    }
}

impl std::fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// What `query-migrate` says. On a VM that never migrated everything is empty. Times in ms.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// How far it is; `None` where there was none.
    pub status: Option<MigrationStatus>,
    /// Since its start, or of the whole.
    pub total_time: Option<u64>,
    /// The guest's stop, known once completed.
    pub downtime: Option<u64>,
    /// QEMU's own guess while it runs.
    pub expected_downtime: Option<u64>,
    /// Until the first page.
    pub setup_time: Option<u64>,
    /// The memory.
    pub ram: Option<RamInfo>,
    /// With XBZRLE: what went as differences.
    pub xbzrle_cache: Option<XbzrleInfo>,
    /// Auto-converge takes so much of the guest's time away, percent.
    pub cpu_throttle_percentage: Option<u8>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// Why it could not start.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
}

impl MigrationInfo {
    /// Total time.
    pub fn total(&self) -> Option<Duration> {
        self.total_time.map(Duration::from_millis)
    }
}

/// The memory's part of [`MigrationInfo`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamInfo {
    /// All of it.
    pub total: Bytes,
    /// Still to send.
    pub remaining: Bytes,
    /// On the wire so far.
    pub transferred: Bytes,
    /// Pages sent whole.
    pub normal: u64,
    /// Zero pages sent.
    pub duplicate: u64,
    /// QEMU's iterations.
    pub dirty_sync_count: u64,
    /// On the wire while the guest ran.
    pub precopy_bytes: Bytes,
    /// On the wire while it stood.
    pub downtime_bytes: Bytes,
    /// Throughput of the last window, Mbit/s.
    pub mbps: f64,
    /// Pages per second, from the last sync.
    pub dirty_pages_rate: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// XBZRLE's part of [`MigrationInfo`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct XbzrleInfo {
    /// Pages sent as differences; not among [`RamInfo::normal`].
    pub pages: u64,
}

/// Limits of a migration; `None` leaves what is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Limits {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bandwidth: Option<BytesPerSecond>,
    /// ms
    #[serde(skip_serializing_if = "Option::is_none")]
    downtime_limit: Option<u64>,
}

impl Limits {
    /// A cap on the line, and the longest downtime aimed at (whole ms, rounded down).
    pub fn new(bandwidth: Bandwidth, downtime_limit: Duration) -> Self {
        Self {
            max_bandwidth: Some(bandwidth.cap().unwrap_or(BytesPerSecond(UNCAPPED))),
            downtime_limit: Some(u64::try_from(downtime_limit.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

impl Limits {
    /// The longest downtime aimed at alone (whole ms, rounded down).
    pub fn downtime(limit: Duration) -> Self {
        Self { downtime_limit: Self::new(Bandwidth::Unlimited, limit).downtime_limit, ..Self::default() }
    }
}

/// What QEMU has set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Parameters {
    /// Bytes per second.
    pub max_bandwidth: BytesPerSecond,
    /// ms
    pub downtime_limit: u64,
}

/// The truth about the present or last migration.
pub async fn query(monitor: &mut Monitor) -> Result<MigrationInfo, QmpError> {
    monitor.execute("query-migrate", Value::Null).await
}

/// What is set now.
pub async fn parameters(monitor: &mut Monitor) -> Result<Parameters, QmpError> {
    monitor.execute("query-migrate-parameters", Value::Null).await
}

/// Sets the limits; works during a migration too.
pub async fn set_limits(monitor: &mut Monitor, limits: &Limits) -> Result<(), QmpError> {
    done(monitor.execute("migrate-set-parameters", json!(limits)).await)
}

/// Switches capabilities (`events`, `multifd`, …) on or off.
pub async fn set_capabilities(monitor: &mut Monitor, capabilities: &[(&str, bool)]) -> Result<(), QmpError> {
    let list: Vec<Value> = capabilities.iter().map(|(name, on)| json!({"capability": name, "state": on})).collect();
    done(monitor.execute("migrate-set-capabilities", json!({ "capabilities": list })).await)
}

/// Every capability that this QEMU knows, and whether it is on.
pub async fn capabilities(monitor: &mut Monitor) -> Result<BTreeMap<String, bool>, QmpError> {
    #[derive(Deserialize)]
    struct Capability {
        capability: String,
        state: bool,
    }
    let list: Vec<Capability> = monitor.execute("query-migrate-capabilities", Value::Null).await?;
    Ok(list.into_iter().map(|one| (one.capability, one.state)).collect())
}

/// Every parameter that this QEMU tells of, with its value.
pub async fn all_parameters(monitor: &mut Monitor) -> Result<Map<String, Value>, QmpError> {
    monitor.execute("query-migrate-parameters", Value::Null).await
}

/// Sets parameters by name.
pub async fn set_parameters(monitor: &mut Monitor, parameters: Map<String, Value>) -> Result<(), QmpError> {
    done(monitor.execute("migrate-set-parameters", Value::Object(parameters)).await)
}

/// Starts a migration to `uri` (`unix:/path`, `tcp:host:port`).
pub async fn start(monitor: &mut Monitor, uri: &str) -> Result<(), QmpError> {
    done(monitor.execute("migrate", json!({ "uri": uri })).await)
}

/// On a VM started with `-incoming defer`: listens at `uri`.
pub async fn listen(monitor: &mut Monitor, uri: &str) -> Result<(), QmpError> {
    done(monitor.execute("migrate-incoming", json!({ "uri": uri })).await)
}

/// Gives the present migration up; the guest runs on. Done when the status says `cancelled`.
pub async fn cancel(monitor: &mut Monitor) -> Result<(), QmpError> {
    done(monitor.execute("migrate_cancel", Value::Null).await)
}

/// An answer whose content does not matter.
fn done(answer: Result<Value, QmpError>) -> Result<(), QmpError> {
    answer.map(drop)
}
