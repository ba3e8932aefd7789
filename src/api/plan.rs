//! MigrationPlan: which VMs to move off a node, in which order, how many at a time; and, where that is wanted, the moving.
//!
//! In: what an API server stores. Out: the same, typed, and the terms of the plan, refused with the field's name where they make no sense.
//! What is in the status, and when, is `manager/plan.rs`'s business.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    policy::Selectors,
    scalar::{Duration, Quantity},
    schema,
};
use crate::model::{
    forecast::Verdict,
    plan::{Need, Wanted},
    units::{Bytes, BytesPerSecond, MilliCpus, ParseQuantityError},
};

/// The most VMs that a status tells of, and the most that a plan moves.
pub const MOST: usize = 500;

/// What is wanted: the cheapest VM, the cheapest set of them, or everything off a node.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "migvisor.io",
    version = "v1alpha1",
    kind = "MigrationPlan",
    status = "MigrationPlanStatus",
    derive = "PartialEq",
    shortname = "mplan",
    category = "migvisor",
    doc = "Which VMs to move, in which order and how many at a time, so that it costs least and every migration still converges. With \
           `execute: true` it is carried out. Once it is being carried out it stands as it was, whatever its spec says.",
    printcolumn = r#"{"name": "Want", "type": "string", "jsonPath": ".spec.want"}"#,
    printcolumn = r#"{"name": "Node", "type": "string", "description": "The node that they leave", "jsonPath": ".spec.sourceNode"}"#,
    printcolumn = r#"{"name": "VMs", "type": "integer", "description": "How many are to be moved", "jsonPath": ".status.selection.vms"}"#,
    printcolumn = r#"{"name": "Cost", "type": "number", "description": "The sum of what they cost", "jsonPath": ".status.selection.cost"}"#,
    printcolumn = r#"{"name": "Makespan", "type": "string", "description": "From the first start to the last arrival", "jsonPath": ".status.schedule.makespan"}"#,
    printcolumn = r#"{"name": "Phase", "type": "string", "jsonPath": ".status.phase"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name": "Parallel", "type": "integer", "description": "How many leave one node at the same time", "jsonPath": ".status.schedule.perNode", "priority": 1}"#,
    printcolumn = r#"{"name": "Saved", "type": "integer", "description": "Of the cost of a random choice, percent", "jsonPath": ".status.saving.againstRandomPercent", "priority": 1}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.message", "priority": 1}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules()))]
pub struct MigrationPlanSpec {
    /// Only VMs on this node. It or `selectors` has to be given; with both, both count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub source_node: Option<String>,
    /// Only VMs with these labels, in namespaces with these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selectors: Option<Selectors>,
    /// `Cheapest`: the one VM that frees what is wanted at the least cost. `CheapestSet`: the VMs that free it together. `Everything`:
    /// every VM that can be moved.
    pub want: Want,
    /// What is to be freed. Needed for `CheapestSet`; without it `Cheapest` is the cheapest VM of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<Free>,
    /// What the link of each source node offers to the plan, bytes per second. Absent: what the forecasts know, or assume, of the line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_rate")]
    pub bandwidth: Option<Quantity>,
    /// No migration counts on more than this, bytes per second. It lowers what KubeVirt's configuration allows, and does not change that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_rate")]
    pub bandwidth_per_migration: Option<Quantity>,
    /// At most so many leave one node at the same time, 1 to 16, where that is less than KubeVirt's `parallelOutboundMigrationsPerNode`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_parallel")]
    pub parallelism: Option<u64>,
    /// Carry it out. Who sets this has to have the right to create VirtualMachineInstanceMigrations in every namespace. `false` again:
    /// nothing more is started; what is under way goes on.
    #[serde(default)]
    pub execute: bool,
}

/// Which VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Want {
    /// The cheapest one that frees enough.
    #[default]
    Cheapest,
    /// The cheapest set that frees enough.
    CheapestSet,
    /// Every one that can be moved.
    Everything,
}

/// What is to be freed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Free {
    /// Memory of guests, such as 8Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_positive")]
    pub memory: Option<Quantity>,
    /// Processors: what the VM requests, else how many it has, such as 4 or 500m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_positive")]
    pub cpu: Option<Quantity>,
}

fn rules() -> serde_json::Value {
    let rule = |rule: &str, message: &str| json!({ "rule": rule, "message": message });
    json!([
        rule("has(self.sourceNode) || has(self.selectors)", "say which VMs: by sourceNode, by selectors, or by both"),
        rule(
            "self.want != 'CheapestSet' || (has(self.free) && (has(self.free.memory) || has(self.free.cpu)))",
            "say what the set has to free: free.memory, free.cpu, or both",
        ),
        rule("self.want != 'Everything' || !has(self.free)", "everything goes, whatever that frees: leave out free"),
    ])
}

/// Why a spec is no plan that can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("spec.{field}: {problem}")]
pub struct PlanError {
    field: &'static str,
    problem: ParseQuantityError,
}

impl MigrationPlanSpec {
    /// What is wanted, for the model.
    ///
    /// # Errors
    /// A quantity cannot be read; the error names the field.
    pub fn wanted(&self) -> Result<Wanted, PlanError> {
        let free = self.free.clone().unwrap_or_default();
        let error = |field| move |problem| PlanError { field, problem };
        let need = Need {
            memory: free.memory.as_ref().map_or(Ok(Bytes::default()), Quantity::bytes).map_err(error("free.memory"))?,
            cpu: free.cpu.as_ref().map_or(Ok(MilliCpus::default()), Quantity::processors).map_err(error("free.cpu"))?,
        };
        Ok(match self.want {
            Want::Cheapest => Wanted::Cheapest(need),
            Want::CheapestSet => Wanted::Enough(need),
            Want::Everything => Wanted::Everything,
        })
    }

    /// The bandwidth of the link, and of each migration, where the plan says so.
    ///
    /// # Errors
    /// A quantity cannot be read; the error names the field.
    pub fn rates(&self) -> Result<(Option<BytesPerSecond>, Option<BytesPerSecond>), PlanError> {
        let read = |field, quantity: &Option<Quantity>| {
            let rate = quantity.as_ref().map(Quantity::rate).transpose();
            rate.map_err(|problem| PlanError { field, problem })
        };
        Ok((read("bandwidth", &self.bandwidth)?, read("bandwidthPerMigration", &self.bandwidth_per_migration)?))
    }
}

/// The plan, and how far it has been carried out. The manager's alone to write.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationPlanStatus {
    /// The generation that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub observed_generation: Option<i64>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// In a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub message: Option<String>,
    /// When the plan was made. Once the first migration has been created it is not made anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub planned_at: Option<Time>,
    /// VMs that were looked at, the eligible ones first, the cheapest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 500))]
    pub candidates: Vec<Candidate>,
    /// VMs that were looked at and do not fit into `candidates`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub omitted: Option<u64>,
    /// Who is to be moved, altogether.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<Selection>,
    /// In which order, and how many at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// What that saves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saving: Option<Saving>,
    /// The migrations that were created, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 500))]
    pub migrations: Vec<PlannedMigration>,
    /// Conditions: `Planned`, `Executed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// How far a plan is: `Planned`; `NoSolution` where nothing that could be moved would do; `Executing`; `Succeeded`; or `Stopped` before its
/// end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// It is there to be looked at.
    Planned,
    /// Nothing would do.
    NoSolution,
    /// Migrations are under way, or about to be.
    Executing,
    /// Every migration succeeded.
    Succeeded,
    /// No more migrations are created.
    Stopped,
}

/// A VM that was looked at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The node that it would leave.
    pub node: String,
    /// Memory that this would free.
    pub memory: Quantity,
    /// Processors that this would free.
    pub cpu: Quantity,
    /// Its place among the eligible, 1 for the cheapest; absent: it is not eligible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub rank: Option<u64>,
    /// Weighed sum of total time, downtime and pages, at the bandwidth on offer; absent where it would not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub cost: Option<f64>,
    /// Would it converge at the bandwidth on offer?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_verdict")]
    pub verdict: Option<Verdict>,
    /// Why it is not eligible, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it is not eligible, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
    /// The least bandwidth at which it converges, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least_convergent_bandwidth: Option<Quantity>,
    /// The share of replays that converge at the bandwidth on offer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_probability")]
    pub probability: Option<f64>,
    /// How long it would take at the bandwidth on offer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
    /// How long the guest would be stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
}

/// Who is to be moved, altogether.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Selection {
    /// How many.
    #[schemars(schema_with = "schema::count")]
    pub vms: u64,
    /// Memory that they free.
    pub memory: Quantity,
    /// Processors that they free.
    pub cpu: Quantity,
    /// The sum of what they cost.
    #[schemars(schema_with = "schema::amount")]
    pub cost: f64,
    /// No selection that would do costs less than this. Equal to `cost`: it is proved to be the cheapest.
    #[schemars(schema_with = "schema::amount")]
    pub least_cost: f64,
}

/// In which order, and how many at a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Schedule {
    /// Who goes when: the first is started first, the next when there is room.
    #[schemars(length(max = 500))]
    pub steps: Vec<Step>,
    /// At most so many leave one node at the same time.
    #[schemars(schema_with = "schema::count")]
    pub per_node: u64,
    /// At most so many are under way in the cluster (KubeVirt's `parallelMigrationsPerCluster`).
    #[schemars(schema_with = "schema::count")]
    pub at_once: u64,
    /// From the first start to the last arrival.
    pub makespan: Duration,
    /// No order and no parallelism takes less.
    pub least_makespan: Duration,
    /// One after the other instead.
    pub one_by_one: Comparison,
    /// As a drain does it instead: all created at once, within KubeVirt's limits.
    pub all_at_once: Comparison,
}

/// One VM that is to go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Namespace of the VM.
    pub namespace: String,
    /// Name of the VM.
    pub name: String,
    /// UID of the VM that was planned with.
    pub uid: String,
    /// The node that it leaves.
    pub node: String,
    /// What its node's link offered when the plan was made, bytes per second.
    pub bandwidth: Quantity,
}

/// What another way of doing it would come to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// From the first start to the last arrival, or failure.
    pub makespan: Duration,
    /// How many would no longer converge.
    #[schemars(schema_with = "schema::count")]
    pub failing: u64,
}

/// What the selection saves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Saving {
    /// What it costs on average to move eligible VMs drawn at random until enough is freed; absent where everything is to go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub random_cost: Option<f64>,
    /// The standard error of that; 0: every draw was counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub random_cost_error: Option<f64>,
    /// How likely such a draw among all VMs with a forecast is to meet one that would not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_probability")]
    pub random_failure: Option<f64>,
    /// How much less the selection costs than a random one, percent of the latter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_percentage")]
    pub against_random_percent: Option<u64>,
    /// What it costs to move everything that is eligible.
    #[schemars(schema_with = "schema::amount")]
    pub everything_cost: f64,
    /// How much less the selection costs than that, percent of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_percentage")]
    pub against_everything_percent: Option<u64>,
}

/// A migration that was created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlannedMigration {
    /// Its place in `schedule.steps`, from 0.
    #[schemars(schema_with = "schema::count")]
    pub step: u64,
    /// Namespace of it and of its VM.
    pub namespace: String,
    /// Name of the VirtualMachineInstanceMigration: made of the plan's UID and the step, so that nothing is created twice.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// When it was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub created_at: Option<Time>,
    /// Its phase, as KubeVirt tells it; `Deleted` where somebody deleted it before its end.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub phase: String,
}
