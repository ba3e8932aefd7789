//! MigrationForecast: a question about one VM (`spec`, the manager's) and its answer (`status`, the agent's).
//!
//! In: what an API server stores. Out: the same, typed. Conversions to and from the model are in [`super::convert`].

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::scalar::{self, Duration, Quantity};
use crate::model::forecast::{Method, Verdict};

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
    category = "kubevirt",
    doc = "What a live migration of the VirtualMachineInstance of the same name would be like if it started now. \
           The spec is the question, written by migvisor's manager; the status is the answer of the agent on the VM's node.",
    printcolumn(
        name = "Verdict",
        type_ = "string",
        json_path = ".status.verdict",
        description = "Converges, Borderline, Fails or Unknown"
    ),
    printcolumn(
        name = "LCB",
        type_ = "string",
        json_path = ".status.leastConvergentBandwidth",
        description = "Least convergent bandwidth, bytes per second"
    ),
    printcolumn(
        name = "Downtime",
        type_ = "string",
        json_path = ".status.downtime",
        description = "How long the guest would be stopped"
    ),
    printcolumn(
        name = "Total",
        type_ = "string",
        json_path = ".status.totalTime",
        description = "How long the migration would take"
    ),
    printcolumn(
        name = "Cost",
        type_ = "number",
        json_path = ".status.cost",
        description = "Weighed sum of total time, downtime and pages sent"
    ),
    printcolumn(
        name = "Method",
        type_ = "string",
        json_path = ".status.method",
        description = "PC: pattern collector; DR: dry run"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Probability", type_ = "number", json_path = ".status.probability", priority = "1"),
    printcolumn(name = "Bandwidth", type_ = "string", json_path = ".status.bandwidth", priority = "1"),
    printcolumn(name = "Iterations", type_ = "integer", json_path = ".status.iterations", priority = "1"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = "1"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName", priority = "1")
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
    /// The guest is paused: predicted with no writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Why no answer is possible (block migration, host devices, …). The agent does not measure; it answers `Unknown` in these words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub outside_model: Option<String>,
}

/// Where a bandwidth was taken from: `MigrationConfiguration` (the KubeVirt object), `PredictionPolicy`, or `Unlimited` (nothing caps it: the line decides).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BandwidthSource {
    /// KubeVirt's `bandwidthPerMigration`.
    MigrationConfiguration,
    /// The policy's `bandwidth`.
    PredictionPolicy,
    /// Nothing caps it.
    Unlimited,
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
    #[schemars(schema_with = "scalar::optional_amount")]
    pub total_time: Option<f64>,
    /// b: weight of the downtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_amount")]
    pub downtime: Option<f64>,
    /// c: weight of the pages sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_amount")]
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
    #[schemars(schema_with = "scalar::optional_amount")]
    pub zero_pages_per_ms: Option<f64>,
    /// From the start to the first page, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_amount")]
    pub setup_ms: Option<f64>,
    /// One synchronisation of the dirty log, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_amount")]
    pub sync_ms: Option<f64>,
    /// Stopping the guest, the device state, starting the guest, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_amount")]
    pub completion_ms: Option<f64>,
}

/// The answer. Written by the agent of the VM's node, but for `outcome`, which is the manager's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationForecastStatus {
    /// The generation of the spec that this answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_count")]
    pub observed_generation: Option<i64>,
    /// When the VM was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_time")]
    pub measured_at: Option<Time>,
    /// Would it converge?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_verdict")]
    pub verdict: Option<Verdict>,
    /// Why, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The share of replays that converged within the budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_probability")]
    pub probability: Option<f64>,
    /// How the forecast was made: PC (pattern collector) or DR (dry run).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_method")]
    pub method: Option<Method>,
    /// The bandwidth that was assumed, bytes per second; 0 is uncapped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Quantity>,
    /// Passes over the memory (QEMU's dirty-sync count).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_count")]
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
    #[schemars(schema_with = "scalar::optional_count")]
    pub dirtied_pages: Option<u64>,
    /// Bytes sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_count")]
    pub transferred_bytes: Option<u64>,
    /// The least bandwidth at which it converges, bytes per second; absent where none that the line carries suffices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least_convergent_bandwidth: Option<Quantity>,
    /// Weighed sum of total time, downtime and pages; absent where it fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_amount")]
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
    /// Conditions: `LowConfidence` (the agent's), `Ready`, `DataStale` (the manager's).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "scalar::conditions")]
    pub conditions: Vec<Condition>,
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
    #[schemars(schema_with = "scalar::count")]
    pub low: u64,
    /// High end.
    #[schemars(schema_with = "scalar::count")]
    pub high: u64,
}

/// The forecast at another bandwidth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfilePoint {
    /// The cap, bytes per second.
    pub bandwidth: Quantity,
    /// The share of replays that converged within the budget.
    #[schemars(schema_with = "scalar::probability")]
    pub probability: f64,
    /// Total time; the budget where that ends first.
    pub total_time: Duration,
    /// Downtime; absent where the budget ends first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// Passes over the memory.
    #[schemars(schema_with = "scalar::count")]
    pub iterations: u64,
    /// Pages sent.
    #[schemars(schema_with = "scalar::count")]
    pub dirtied_pages: u64,
}

/// One point of the working-set pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CurvePoint {
    /// Length of the window.
    pub window: Duration,
    /// Distinct pages written within it.
    #[schemars(schema_with = "scalar::count")]
    pub pages: u64,
}

/// A migration that ended, beside the forecast it started with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Name of the VirtualMachineInstanceMigration.
    pub migration_name: String,
    /// Its UID.
    #[serde(rename = "migrationUID")]
    pub migration_uid: String,
    /// How it ended: `Succeeded` or `Failed`.
    pub phase: String,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_time")]
    pub completed_at: Option<Time>,
    /// How long it took; absent where it never started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
    /// How long it was forecast to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast_total_time: Option<Duration>,
    /// (forecast − real) / real of the total time; absent where either is missing or it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
    /// The verdict that it started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "scalar::optional_verdict")]
    pub verdict: Option<Verdict>,
}

impl MigrationForecast {
    /// The status, if it answers the spec as it stands (and not an earlier one).
    pub fn answer(&self) -> Option<&MigrationForecastStatus> {
        self.status
            .as_ref()
            .filter(|status| status.observed_generation.is_some() && status.observed_generation == self.metadata.generation)
    }
}
