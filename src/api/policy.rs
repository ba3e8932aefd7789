//! PredictionPolicy: what is wanted of migrations and what happens to those that would not do; and which policy applies.
//!
//! Selectors and precedence are those of KubeVirt's MigrationPolicy (KubeVirt 1.9, `migrationpolicy.go`).

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use kube::{CustomResource, Resource, ResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    dry_run,
    forecast::{CostWeights, Sla},
    remedy::{self, Remedy},
    scalar::{Duration, Quantity},
    schema,
};

/// What is wanted of migrations, and what is done about those that would not meet it.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "migvisor.io",
    version = "v1alpha1",
    kind = "PredictionPolicy",
    plural = "predictionpolicies",
    derive = "PartialEq",
    shortname = "pp",
    category = "migvisor",
    doc = "What is wanted of live migrations, and what is done about those that would not meet it. One policy applies to a VM: the one whose \
           selectors match the most labels. Where none matches, migvisor only audits.",
    printcolumn = r#"{"name": "Mode", "type": "string", "jsonPath": ".spec.mode"}"#,
    printcolumn = r#"{"name": "Evacuations", "type": "string", "jsonPath": ".spec.evacuations"}"#,
    printcolumn = r#"{"name": "Dry-Run", "type": "string", "jsonPath": ".spec.dryRun.mode"}"#,
    printcolumn = r#"{"name": "Bandwidth", "type": "string", "jsonPath": ".spec.bandwidth"}"#,
    printcolumn = r#"{"name": "Downtime", "type": "string", "jsonPath": ".spec.sla.downtime"}"#,
    printcolumn = r#"{"name": "Total", "type": "string", "jsonPath": ".spec.sla.totalTime"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PredictionPolicySpec {
    /// Which VMs it applies to. Absent: none. Empty: every one, with the lowest precedence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selectors: Option<Selectors>,
    /// `Audit` only looks; `Warn` warns whoever starts a migration that would not do; `Enforce` also denies those that would fail, and holds
    /// those that leave a doubt.
    #[serde(default)]
    pub mode: Mode,
    /// What is wanted beyond convergence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sla: Option<Sla>,
    /// How the cost is weighed; equal weights when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_weights: Option<CostWeights>,
    /// What a migration can count on, bytes per second, where that is less than KubeVirt's own cap. Absent or 0: that cap alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Quantity>,
    /// Whether forecasts go by what earlier migrations from the VM's node achieved: `Use` or `Ignore`.
    #[serde(default)]
    pub learned_bandwidth: LearnedBandwidth,
    /// When a migration is tried out without delivering it. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<DryRunPolicy>,
    /// How long and how many migrations are held back; as the defaults of its fields when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldPolicy>,
    /// What may be done, under `Enforce`, about a migration that would fail: the first that is forecast to help is applied to that migration alone, through a
    /// MigrationPolicy of its own, before anything is sent. Gentlest first. Empty: nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "remedy::list")]
    pub remedies: Vec<Remedy>,
    /// What `Enforce` does to evacuations (drains, evictions, the descheduler's too) and workload updates.
    #[serde(default)]
    pub evacuations: Evacuations,
}

/// What becomes of the bandwidth that earlier migrations from a VM's node achieved: `Use` it, or `Ignore` it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum LearnedBandwidth {
    /// It is the line's: forecasts count on no more.
    Use,
    /// Forecasts count on KubeVirt's cap and the policy's `bandwidth` alone, over a line that is assumed.
    #[default]
    Ignore,
}

/// How migrations are held back: by a scheduling gate on the target pod, so that nothing is transferred meanwhile. A held migration takes one
/// of KubeVirt's places for parallel migrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HoldPolicy {
    /// How long one may be held, 1s to 780s: KubeVirt gives a target pod up after 900 s. What is not known by then is decided without.
    #[serde(default = "default_hold")]
    #[schemars(schema_with = "schema::hold_duration", default = "default_hold")]
    pub deadline: Duration,
    /// How many may be held in the whole cluster, 1 to 16; KubeVirt runs five migrations at a time by default.
    #[serde(default = "default_held")]
    #[schemars(schema_with = "schema::parallel", default = "default_held")]
    pub at_once: u64,
}

impl Default for HoldPolicy {
    fn default() -> Self {
        Self { deadline: default_hold(), at_once: default_held() }
    }
}

fn default_hold() -> Duration {
    Duration(std::time::Duration::from_secs(300))
}

fn default_held() -> u64 {
    2
}

/// What `Enforce` does to migrations that KubeVirt starts by itself: evacuations and workload updates. KubeVirt asks for those again and
/// again, and a drain waits for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Evacuations {
    /// They pass with a warning; where a remedy helps, they are held for the moment that it takes to apply it.
    #[default]
    Warn,
    /// They are held for a dry run like a person's, and pass with a warning, whatever comes of it.
    Hold,
    /// They are treated like a person's. A drain of the node then waits until the VM can be moved.
    Deny,
}

/// When migrations are tried out. A dry run costs what a migration costs but the network: memory bandwidth, about a processor, and the
/// write protection of the guest's pages; it never stops the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DryRunPolicy {
    /// `Never`; `OnDemand`: under `Enforce`, while a migration that leaves a doubt is held; or `OnDoubt`: besides in the background, where
    /// the pattern says `Fails` or `Borderline`, so that the answer is there before somebody asks.
    #[serde(default)]
    pub mode: DryRunMode,
    /// How long one may run before it is cancelled, 1s to 24h.
    #[serde(default = "default_deadline")]
    #[schemars(schema_with = "schema::deadline", default = "default_deadline")]
    pub deadline: Duration,
    /// How many are asked for at the same time on one node, 1 to 16; its agent runs one after the other.
    #[serde(default = "default_concurrency")]
    #[schemars(schema_with = "schema::parallel", default = "default_concurrency")]
    pub concurrent_per_node: u64,
}

impl Default for DryRunPolicy {
    fn default() -> Self {
        Self { mode: DryRunMode::Never, deadline: default_deadline(), concurrent_per_node: default_concurrency() }
    }
}

fn default_deadline() -> Duration {
    dry_run::DEADLINE
}

fn default_concurrency() -> u64 {
    1
}

/// When migrations are tried out: `Never`, `OnDemand` or `OnDoubt`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DryRunMode {
    /// The manager asks for none. A person may.
    #[default]
    Never,
    /// While a migration is held.
    OnDemand,
    /// And in the background, where the pattern alone says `Fails` or `Borderline`.
    OnDoubt,
}

/// Plain equality of labels. Every label of both selectors has to match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Selectors {
    /// Labels of the namespace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub namespace_selector: BTreeMap<String, String>,
    /// Labels of the VirtualMachineInstance.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub virtual_machine_instance_selector: BTreeMap<String, String>,
}

impl Selectors {
    /// Do the labels of a namespace and of a VM in it match both?
    pub fn match_labels(&self, namespace: &BTreeMap<String, String>, vmi: &BTreeMap<String, String>) -> bool {
        let matches = |selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>| {
            selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        matches(&self.namespace_selector, namespace) && matches(&self.virtual_machine_instance_selector, vmi)
    }
}

/// What is done about a migration that would not do: `Audit` nothing, `Warn` a warning, `Enforce` a denial or a hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Forecasts, annotations, metrics and events; never denies, never warns.
    #[default]
    Audit,
    /// And admission warnings.
    Warn,
    /// And denials and holds.
    Enforce,
}

/// A policy that picks VMs by labels, as KubeVirt's MigrationPolicy and our PredictionPolicy do.
pub trait Selecting: Resource {
    /// Its selectors; `None` picks nothing.
    fn selectors(&self) -> Option<&Selectors>;
}

impl Selecting for PredictionPolicy {
    fn selectors(&self) -> Option<&Selectors> {
        self.spec.selectors.as_ref()
    }
}

/// The one policy that applies: the most labels matched, then the most labels of the VM, then the first name.
pub fn select<P: Selecting>(
    policies: impl IntoIterator<Item = Arc<P>>,
    namespace_labels: &BTreeMap<String, String>,
    vmi_labels: &BTreeMap<String, String>,
) -> Option<Arc<P>> {
    policies
        .into_iter()
        .filter(|policy| policy.meta().deletion_timestamp.is_none())
        .filter_map(|policy| {
            let selectors = policy.selectors()?;
            let (of_namespace, of_vmi) = (&selectors.namespace_selector, &selectors.virtual_machine_instance_selector);
            let precedence = (of_vmi.len() + of_namespace.len(), of_vmi.len(), Reverse(policy.name_any()));
            selectors.match_labels(namespace_labels, vmi_labels).then_some((precedence, policy))
        })
        .max_by(|(a, _), (b, _)| a.cmp(b))
        .map(|(_, policy)| policy)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    fn labels(pairs: Pairs<'_>) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn policy(name: &str, selectors: Option<(Pairs<'_>, Pairs<'_>)>) -> PredictionPolicy {
        let selectors = selectors
            .map(|(ns, vmi)| Selectors { namespace_selector: labels(ns), virtual_machine_instance_selector: labels(vmi) });
        PredictionPolicy::new(name, PredictionPolicySpec { selectors, ..Default::default() })
    }

    #[test]
    fn precedence_is_kubevirts() {
        let ns = labels(&[("team", "a"), ("zone", "1")]);
        let vmi = labels(&[("app", "db"), ("tier", "gold")]);
        let pick = |policies: &[PredictionPolicy]| {
            select(policies.iter().cloned().map(Arc::new), &ns, &vmi).map(|policy| policy.name_any())
        };

        assert_eq!(pick(&[]), None);
        assert_eq!(pick(&[policy("none", None)]), None, "absent selectors match nothing");
        assert_eq!(pick(&[policy("all", Some((&[], &[])))]), Some("all".into()), "empty selectors match everything");
        assert_eq!(
            pick(&[policy("other", Some((&[("team", "b")], &[]))), policy("half", Some((&[], &[("app", "db"), ("x", "y")])))]),
            None
        );
        assert_eq!(
            pick(&[
                policy("all", Some((&[], &[]))),
                policy("ns", Some((&[("team", "a")], &[]))),
                policy("two", Some((&[("team", "a"), ("zone", "1")], &[])))
            ]),
            Some("two".into()),
            "the most labels"
        );
        assert_eq!(
            pick(&[policy("a-ns", Some((&[("team", "a")], &[]))), policy("b-vmi", Some((&[], &[("app", "db")])))]),
            Some("b-vmi".into()),
            "the VM's labels weigh more"
        );
        assert_eq!(
            pick(&[policy("b", Some((&[], &[("tier", "gold")]))), policy("a", Some((&[], &[("app", "db")])))]),
            Some("a".into()),
            "then the name"
        );
    }

    #[test]
    fn modes_are_ordered_by_strictness() {
        assert!(Mode::Audit < Mode::Warn && Mode::Warn < Mode::Enforce);
        assert_eq!(serde_json::from_str::<PredictionPolicySpec>("{}").unwrap().mode, Mode::Audit);
    }
}
