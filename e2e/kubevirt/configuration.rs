//! KubeVirt's effective migration configuration: its defaults, the KubeVirt CR, and the one MigrationPolicy that wins.
//!
//! In: JSON as the API server has it. Out: a [`Configuration`]. Pure. Written from KubeVirt 1.9's rules
//! (`virt-config.go`, `migrationpolicy.go`) and not from the product's: the one is there to check the other.

use std::{collections::BTreeMap, time::Duration};

use migvisor::model::units::{Bandwidth, Bytes, BytesPerSecond};
use serde_json::{Map, Value, json};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// The fields of `VMIMConfigurationOptions`, merged: what goes into `status.migrationState.migrationConfiguration`.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration(Map<String, Value>);

/// What a MigrationPolicy may say.
const POLICY_FIELDS: [&str; 7] = [
    "allowAutoConverge",
    "allowPostCopy",
    "allowWorkloadDisruption",
    "bandwidthPerMigration",
    "completionTimeoutPerGiB",
    "maxDowntimeMs",
    "experimental",
];

impl Configuration {
    /// KubeVirt's defaults under the KubeVirt CR's `spec.configuration.migrations`.
    pub fn of_cluster(kubevirt: Option<&Value>) -> Self {
        let defaults = json!({
            "nodeDrainTaintKey": "kubevirt.io/drain",
            "parallelMigrationsPerCluster": 5,
            "parallelOutboundMigrationsPerNode": 2,
            "bandwidthPerMigration": "0",
            "completionTimeoutPerGiB": 150,
            "progressTimeout": 150,
            "maxDowntimeMs": 900,
            "utilityVolumesTimeout": 150,
            "allowAutoConverge": false,
            "allowPostCopy": false,
            "unsafeMigrationOverride": false,
            "disableTLS": false,
        });
        let mut fields = defaults.as_object().cloned().unwrap_or_default();
        overlay(&mut fields, kubevirt.and_then(|cr| cr.pointer("/spec/configuration/migrations")), None);
        if !fields.contains_key("allowWorkloadDisruption") {
            let follows = fields.get("allowPostCopy").cloned().unwrap_or(Value::Bool(false));
            fields.insert("allowWorkloadDisruption".to_owned(), follows);
        }
        Self(fields)
    }

    /// As read back from `migrationConfiguration`.
    pub fn of_json(value: &Value) -> Self {
        Self(value.as_object().cloned().unwrap_or_default())
    }

    /// With the winning policy's fields over it.
    #[must_use]
    pub fn under(mut self, policy: Option<&Value>) -> Self {
        let Some(spec) = policy.and_then(|policy| policy.get("spec")) else { return self };
        overlay(&mut self.0, Some(spec), Some(&POLICY_FIELDS));
        if let (Some(post_copy), None) = (present(spec, "allowPostCopy"), present(spec, "allowWorkloadDisruption")) {
            self.0.insert("allowWorkloadDisruption".to_owned(), post_copy.clone());
        }
        self
    }

    /// The JSON of `migrationConfiguration`.
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// The cap that reaches QEMU: KubeVirt rounds to whole MiB/s, at least one; 0 is none.
    pub fn bandwidth(&self) -> Bandwidth {
        const MIB: u64 = 1 << 20;
        let asked = self.0.get("bandwidthPerMigration").and_then(quantity).unwrap_or(0);
        if asked == 0 {
            return Bandwidth::Unlimited;
        }
        let whole = (asked.saturating_add(MIB / 2) / MIB).max(1);
        Bandwidth::Capped(BytesPerSecond(whole.saturating_mul(MIB)))
    }

    /// How long KubeVirt lets a guest of this size run before it acts; `None`: for ever.
    pub fn time_budget(&self, guest: Bytes) -> Option<Duration> {
        let giga = guest.0.div_ceil(1_000_000_000);
        let seconds = self.number("completionTimeoutPerGiB").saturating_mul(giga);
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }

    /// Is this switch on?
    pub fn flag(&self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    /// A plain number; 0 where it is missing or negative.
    pub fn number(&self, name: &str) -> u64 {
        self.0.get(name).and_then(Value::as_u64).unwrap_or(0)
    }
}

/// A field that is there and not null.
fn present<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
}

fn overlay(fields: &mut Map<String, Value>, above: Option<&Value>, only: Option<&[&str]>) {
    for (name, value) in above.and_then(Value::as_object).into_iter().flatten() {
        if !value.is_null() && only.is_none_or(|only| only.contains(&name.as_str())) {
            fields.insert(name.clone(), value.clone());
        }
    }
}

/// A quantity in JSON, a string or a plain number, as whole bytes.
pub fn quantity(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.parse::<Bytes>().ok().map(|bytes| bytes.0),
        _ => None,
    }
}

/// The one policy that wins: every label of both selectors has to match; most labels matched; then most VMI labels; then the
/// smallest name. No selectors at all match nothing, empty ones match everything.
pub fn winner<'a>(policies: &'a [Value], vmi: &Labels, namespace: &Labels) -> Option<&'a Value> {
    policies
        .iter()
        .filter_map(|policy| {
            let selectors = policy.pointer("/spec/selectors").filter(|selectors| selectors.is_object())?;
            let of_vmi = matched(selectors.get("virtualMachineInstanceSelector"), vmi)?;
            let of_namespace = matched(selectors.get("namespaceSelector"), namespace)?;
            let name = policy.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            Some(((of_vmi + of_namespace, of_vmi, std::cmp::Reverse(name)), policy))
        })
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, policy)| policy)
}

/// How many labels a selector names, if the object has them all.
fn matched(selector: Option<&Value>, labels: &Labels) -> Option<usize> {
    let Some(selector) = selector.and_then(Value::as_object) else { return Some(0) };
    selector.iter().all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str()).then_some(selector.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn policy(name: &str, vmi: &Value, namespace: &Value) -> Value {
        json!({ "metadata": { "name": name }, "spec": { "selectors":
            { "virtualMachineInstanceSelector": vmi, "namespaceSelector": namespace } } })
    }

    fn wins(policies: &[Value], vmi: &[(&str, &str)], namespace: &[(&str, &str)]) -> Option<String> {
        winner(policies, &labels(vmi), &labels(namespace)).map(|policy| policy["metadata"]["name"].as_str().unwrap().to_owned())
    }

    #[test]
    fn the_most_specific_policy_wins() {
        let everything = policy("everything", &json!({}), &json!({}));
        let gold = policy("gold", &json!({"class": "gold"}), &json!({}));
        let team = policy("team", &json!({}), &json!({"team": "a"}));
        let both = policy("both", &json!({"class": "gold"}), &json!({"team": "a"}));
        let none = json!({ "metadata": { "name": "none" }, "spec": { "selectors": null } });
        let all = [none, everything, gold, team, both];
        let (vmi, namespace) = ([("class", "gold"), ("os", "x")], [("team", "a")]);
        assert_eq!(wins(&all, &vmi, &namespace).unwrap(), "both");
        assert_eq!(wins(&all[..4], &vmi, &namespace).unwrap(), "gold", "a tie goes to the VMI's labels");
        assert_eq!(wins(&all[..2], &vmi, &namespace).unwrap(), "everything");
        assert_eq!(wins(&all[..1], &vmi, &namespace), None, "no selectors match nothing");
        assert_eq!(wins(&all, &[], &[]).unwrap(), "everything");
        let twins = [policy("b", &json!({"class": "gold"}), &Value::Null), policy("a", &json!({"class": "gold"}), &Value::Null)];
        assert_eq!(wins(&twins, &vmi, &namespace).unwrap(), "a", "then the smallest name");
    }

    #[test]
    fn a_policy_lies_over_the_cluster_and_only_its_own_fields() {
        let cr = json!({ "spec": { "configuration": { "migrations":
            { "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": 20, "progressTimeout": 7 } } } });
        let cluster = Configuration::of_cluster(Some(&cr));
        assert_eq!(cluster.bandwidth(), Bandwidth::Capped(BytesPerSecond(64 << 20)));
        assert!(!cluster.flag("allowWorkloadDisruption"));
        let merged = cluster.under(Some(
            &json!({ "spec": { "allowPostCopy": true, "bandwidthPerMigration": 1_500_000, "progressTimeout": 1, "selectors": {} } }),
        ));
        assert_eq!(merged.bandwidth(), Bandwidth::Capped(BytesPerSecond(1 << 20)), "whole MiB/s");
        assert!(merged.flag("allowWorkloadDisruption"), "follows allowPostCopy");
        assert_eq!(merged.number("progressTimeout"), 7, "no policy says that");
        assert!(merged.to_json().get("selectors").is_none());
    }

    #[test]
    fn budgets_are_in_decimal_gigabytes_rounded_up() {
        let defaults = Configuration::of_cluster(None);
        assert_eq!(defaults.time_budget(Bytes(1 << 30)), Some(Duration::from_secs(300)));
        assert_eq!(defaults.time_budget(Bytes(512 << 20)), Some(Duration::from_secs(150)));
        assert_eq!(defaults.bandwidth(), Bandwidth::Unlimited);
        let never = defaults.under(Some(&json!({ "spec": { "completionTimeoutPerGiB": 0 } })));
        assert_eq!(never.time_budget(Bytes(1 << 30)), None);
    }
}
