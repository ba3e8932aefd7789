//! MigrationForecast: a question about one VM (`spec`, the manager's) and its answer (`status`, the agent's).
//!
//! In: what an API server stores. Out: the same, typed. Conversions to and from the model are in [`super::convert`].

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    dry_run::{DryRun, DryRunStatus},
    migration::{InFlight, LastMigration, Outcome},
    remedy::{self, Remedy, RemedyAnswers},
    scalar::{Duration, Quantity},
    schema,
};
use crate::model::forecast::{Method, Verdict};

/// What was measured longer ago than this is stale. Agents look again at least every 15 minutes.
pub const FRESH: std::time::Duration = std::time::Duration::from_secs(20 * 60);

/// Is this less than [`FRESH`] ago? What lies in the future is no better than what is old: a clock has jumped.
pub fn is_fresh(at: Option<&Time>, now: Timestamp) -> bool {
    at.is_some_and(|at| now.duration_since(at.0).unsigned_abs() < FRESH)
}

/// The question: where the VM runs and what a migration of it would run under. Written by the manager.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "migvisor.io",
    version = "v1alpha1",
    kind = "MigrationForecast",
    namespaced,
    status = "MigrationForecastStatus",
    derive = "PartialEq",
    shortname = "mf",
    shortname = "mforecast",
    category = "migvisor",
    doc = "What a live migration of the VirtualMachineInstance of the same name would be like if it started now. \
           The spec is the question, written by migvisor's manager; the status is the answer of the agent on the VM's node.",
    printcolumn = r#"{"name": "Verdict", "type": "string", "description": "Converges, Borderline, Fails or Unknown", "jsonPath": ".status.verdict"}"#,
    printcolumn = r#"{"name": "LCB", "type": "string", "description": "Least convergent bandwidth, bytes per second", "jsonPath": ".status.leastConvergentBandwidth"}"#,
    printcolumn = r#"{"name": "Downtime", "type": "string", "description": "How long the guest would be stopped", "jsonPath": ".status.downtime"}"#,
    printcolumn = r#"{"name": "Total", "type": "string", "description": "How long the migration would take", "jsonPath": ".status.totalTime"}"#,
    printcolumn = r#"{"name": "Cost", "type": "number", "description": "Weighed sum of total time, downtime and pages sent", "jsonPath": ".status.cost"}"#,
    printcolumn = r#"{"name": "Method", "type": "string", "description": "PC: pattern collector; DR: dry run", "jsonPath": ".status.method"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name": "Probability", "type": "number", "jsonPath": ".status.probability", "priority": 1}"#,
    printcolumn = r#"{"name": "Bandwidth", "type": "string", "jsonPath": ".status.bandwidth", "priority": 1}"#,
    printcolumn = r#"{"name": "Iterations", "type": "integer", "jsonPath": ".status.iterations", "priority": 1}"#,
    printcolumn = r#"{"name": "Reason", "type": "string", "jsonPath": ".status.reason", "priority": 1}"#,
    printcolumn = r#"{"name": "Dry-Run", "type": "string", "description": "How far the dry run is that was asked for last", "jsonPath": ".status.dryRun.phase", "priority": 1}"#,
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".spec.nodeName", "priority": 1}"#
)]
#[serde(rename_all = "camelCase")]
pub struct MigrationForecastSpec {
    /// The node on which the VM runs; only its agent answers.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// UID of the virt-launcher pod that holds the VM.
    #[serde(rename = "podUID")]
    #[schemars(length(min = 1, max = 63))]
    pub pod_uid: String,
    /// Memory that the guest sees.
    pub guest_memory: Quantity,
    /// Bandwidth that the migration may use, bytes per second; 0 is uncapped.
    pub bandwidth: Quantity,
    /// Where the bandwidth was taken from.
    pub bandwidth_source: BandwidthSource,
    /// QEMU's downtime limit.
    pub downtime_limit: Duration,
    /// How long KubeVirt lets the migration run; absent: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_budget: Option<Duration>,
    /// What is wanted beyond convergence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sla: Option<Sla>,
    /// How the cost is weighed; equal weights when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_weights: Option<CostWeights>,
    /// What is known of the hosts; assumptions where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostConstants>,
    /// The PredictionPolicy that this question follows; absent: the built-in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// What KubeVirt does with a migration that has not converged when the budget ends; absent: `Abort`.
    #[serde(default, skip_serializing_if = "BudgetEnd::is_abort")]
    pub when_budget_ends: BudgetEnd,
    /// KubeVirt lets QEMU throttle the guest until it converges. The forecast is of a migration without.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_converge: bool,
    /// The guest is paused: predicted with no writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Why no answer is possible (block migration, host devices, …). The agent does not measure; it answers `Unknown` in these words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub outside_model: Option<String>,
    /// A dry run of the migration is wanted. No part of the question: the answer stands while one is asked for, runs, or is withdrawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<DryRun>,
    /// Remedies that are asked about: would they help, and how much of each is needed? No part of the question either.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "remedy::list")]
    pub remedies: Vec<Remedy>,
}

/// Where a bandwidth was taken from: `MigrationConfiguration` (the KubeVirt object), `MigrationPolicy` (KubeVirt's), `PredictionPolicy` (ours),
/// `Learned` (what earlier migrations from the node achieved), or `Unlimited` (nothing caps it: the line decides).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BandwidthSource {
    /// KubeVirt's `bandwidthPerMigration`.
    MigrationConfiguration,
    /// The same of the MigrationPolicy that applies.
    MigrationPolicy,
    /// The policy's `bandwidth`.
    PredictionPolicy,
    /// What earlier migrations from the node achieved.
    Learned,
    /// Nothing caps it.
    Unlimited,
}

/// What KubeVirt does when the budget ends: `Abort` the migration, switch to `PostCopy`, or `Pause` the guest to finish.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BudgetEnd {
    /// The migration is aborted.
    #[default]
    Abort,
    /// The guest goes on at the target and fetches what is missing.
    PostCopy,
    /// The guest is paused until the rest is copied.
    Pause,
}

impl BudgetEnd {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
    fn is_abort(&self) -> bool {
        *self == Self::Abort
    }
}

/// What a migration may cost the guest, beyond converging at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sla {
    /// The longest downtime tolerated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// The longest migration tolerated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
}

/// Weights of the cost `a·T_sum + b·T_downtime + c·P`, each term normalised. A weight that is absent is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CostWeights {
    /// a: weight of the total time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub total_time: Option<f64>,
    /// b: weight of the downtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub downtime: Option<f64>,
    /// c: weight of the pages sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub pages: Option<f64>,
}

/// Physical constants of the hosts; what is absent is assumed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostConstants {
    /// What the line carries when nothing caps it, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line_rate: Option<Quantity>,
    /// Zero pages scanned and sent in a millisecond.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub zero_pages_per_ms: Option<f64>,
    /// From the start to the first page, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub setup_ms: Option<f64>,
    /// One synchronisation of the dirty log, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub sync_ms: Option<f64>,
    /// Stopping the guest, the device state, starting the guest, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub completion_ms: Option<f64>,
}

/// The answer. Written by the agent of the VM's node, but for `outcome`, which is the manager's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationForecastStatus {
    /// Fingerprint of the question that this answers: of the spec but for `dryRun` and `remedies`. The answer counts while the question as it should be
    /// now has the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub question: Option<String>,
    /// The generation of the object that this was written for. For people and tools; what counts is `question`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub observed_generation: Option<i64>,
    /// When the VM was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub measured_at: Option<Time>,
    /// Would it converge?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_verdict")]
    pub verdict: Option<Verdict>,
    /// Why, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The share of replays that converged within the budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_probability")]
    pub probability: Option<f64>,
    /// How the forecast was made: PC (pattern collector) or DR (dry run).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_method")]
    pub method: Option<Method>,
    /// The bandwidth that was assumed, bytes per second; 0 is uncapped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Quantity>,
    /// Passes over the memory (QEMU's dirty-sync count).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub iterations: Option<u64>,
    /// Total time less downtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub convergence_time: Option<Duration>,
    /// How long the guest would be stopped; absent where the budget ends first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// How long the migration would take; the budget where that ends first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
    /// Pages sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub dirtied_pages: Option<u64>,
    /// Bytes sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub transferred_bytes: Option<u64>,
    /// The least bandwidth at which it converges, bytes per second; absent where none that the line carries suffices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least_convergent_bandwidth: Option<Quantity>,
    /// Weighed sum of total time, downtime and pages; absent where it fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub cost: Option<f64>,
    /// Something that stands in for a measurement, or too short a look, weakens the forecast.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub low_confidence: bool,
    /// Between these the real figures are expected (5 % to 95 %).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bounds: Option<Bounds>,
    /// What other bandwidths would give.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub profile: Vec<ProfilePoint>,
    /// The working-set pattern: distinct pages written within a window of so long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub curve: Vec<CurvePoint>,
    /// What the remedies would do that are asked about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedies: Option<RemedyAnswers>,
    /// Conditions: `LowConfidence` (the agent's), `Ready`, `DataStale` (the manager's).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// The dry run that was asked for last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<DryRunStatus>,
    /// The migration of this VM that runs now, as the agent reads it from QEMU; absent where none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<InFlight>,
    /// The last migration of this VM, as QEMU or libvirt told it at its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_migration: Option<LastMigration>,
    /// The last migration of this VM, held against its forecast. The manager's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// Low and high ends of each figure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Bounds {
    /// Total time.
    pub total_time: DurationRange,
    /// Downtime; absent where no replay converged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<DurationRange>,
    /// Pages sent.
    pub dirtied_pages: CountRange,
    /// Passes over the memory.
    pub iterations: CountRange,
}

/// From … to ….
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DurationRange {
    /// Low end.
    pub low: Duration,
    /// High end.
    pub high: Duration,
}

/// From … to ….
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CountRange {
    /// Low end.
    #[schemars(schema_with = "schema::count")]
    pub low: u64,
    /// High end.
    #[schemars(schema_with = "schema::count")]
    pub high: u64,
}

/// The forecast at another bandwidth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfilePoint {
    /// The cap, bytes per second.
    pub bandwidth: Quantity,
    /// The share of replays that converged within the budget.
    #[schemars(schema_with = "schema::probability")]
    pub probability: f64,
    /// Total time; the budget where that ends first.
    pub total_time: Duration,
    /// Downtime; absent where the budget ends first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// Passes over the memory.
    #[schemars(schema_with = "schema::count")]
    pub iterations: u64,
    /// Pages sent.
    #[schemars(schema_with = "schema::count")]
    pub dirtied_pages: u64,
}

/// One point of the working-set pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CurvePoint {
    /// Length of the window.
    pub window: Duration,
    /// Distinct pages written within it.
    #[schemars(schema_with = "schema::count")]
    pub pages: u64,
}
