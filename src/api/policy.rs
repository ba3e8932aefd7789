//! PredictionPolicy: what is wanted of migrations and what happens to those that would not do; and which policy applies.
//!
//! Selectors and precedence are those of KubeVirt's MigrationPolicy (KubeVirt 1.9, `migrationpolicy.go`).

use std::collections::BTreeMap;

use kube::{CustomResource, ResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    forecast::{CostWeights, Sla},
    scalar::Quantity,
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
    category = "kubevirt",
    doc = "What is wanted of live migrations, and what is done about those that would not meet it. One policy applies to a VM: the one whose \
           selectors match the most labels. Where none matches, migvisor only audits.",
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Bandwidth", type_ = "string", json_path = ".spec.bandwidth"),
    printcolumn(name = "Downtime", type_ = "string", json_path = ".spec.sla.downtime"),
    printcolumn(name = "Total", type_ = "string", json_path = ".spec.sla.totalTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct PredictionPolicySpec {
    /// Which VMs it applies to. Absent: none. Empty: every one, with the lowest precedence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selectors: Option<Selectors>,
    /// `Audit` only looks; `Warn` warns whoever starts a migration that would not do; `Enforce` also denies those that would fail.
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

/// What is done about a migration that would not do: `Audit` nothing, `Warn` a warning, `Enforce` a denial.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Forecasts, annotations, metrics and events; never denies, never warns.
    #[default]
    Audit,
    /// And admission warnings.
    Warn,
    /// And denials.
    Enforce,
}

/// The one policy that applies: the most labels matched, then the most labels of the VM, then the first name.
pub fn select<'a, P: AsRef<PredictionPolicy>>(
    policies: &'a [P],
    namespace_labels: &BTreeMap<String, String>,
    vmi_labels: &BTreeMap<String, String>,
) -> Option<&'a PredictionPolicy> {
    let matches = |selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>| {
        selector.iter().all(|(k, v)| labels.get(k) == Some(v))
    };
    policies
        .iter()
        .map(AsRef::as_ref)
        .filter(|policy| policy.metadata.deletion_timestamp.is_none())
        .filter_map(|policy| {
            let selectors = policy.spec.selectors.as_ref()?;
            let (of_namespace, of_vmi) = (&selectors.namespace_selector, &selectors.virtual_machine_instance_selector);
            (matches(of_namespace, namespace_labels) && matches(of_vmi, vmi_labels))
                .then(|| ((of_vmi.len() + of_namespace.len(), of_vmi.len(), std::cmp::Reverse(policy.name_any())), policy))
        })
        .max_by(|(a, _), (b, _)| a.cmp(b))
        .map(|(_, policy)| policy)
}

impl AsRef<PredictionPolicy> for PredictionPolicy {
    fn as_ref(&self) -> &PredictionPolicy {
        self
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn policy(name: &str, selectors: Option<(&[(&str, &str)], &[(&str, &str)])>) -> PredictionPolicy {
        let selectors = selectors
            .map(|(ns, vmi)| Selectors { namespace_selector: labels(ns), virtual_machine_instance_selector: labels(vmi) });
        PredictionPolicy::new(name, PredictionPolicySpec { selectors, ..Default::default() })
    }

    #[test]
    fn precedence_is_kubevirts() {
        let ns = labels(&[("team", "a"), ("zone", "1")]);
        let vmi = labels(&[("app", "db"), ("tier", "gold")]);
        let pick = |policies: &[PredictionPolicy]| select(policies, &ns, &vmi).map(ResourceExt::name_any);

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
