//! Migrations that are forced: what the MigrationPolicy for one of them says, whether KubeVirt would pick it, when it has served. Pure.
//!
//! In: the MigrationPolicy that would win without ours, the remedy, the VM's labels, the migration. Out: our MigrationPolicy; whether it
//! is to go. It takes over every field of the policy that would have won and all of its selectors, and adds its own, the VM's label, its node and
//! the namespace's name: KubeVirt counts the labels that match (`migrationpolicy.go`), so ours outscores any policy of a person's that it takes
//! over. A person's is never edited.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value, json};

use crate::api::{
    kubevirt::{MigrationPolicy, VirtualMachineInstance, VirtualMachineInstanceMigration},
    names::{FORCE_LABEL, FORCE_PREFIX, FORCED_VM, kubevirt},
    policy,
    remedy::{RemedyAnswer, RemedyType},
};

/// What Kubernetes labels every namespace with.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// The name of the policy for the migration of this UID.
pub fn name(migration_uid: &str) -> String {
    format!("{FORCE_PREFIX}{migration_uid}")
}

/// Is it one of ours?
pub fn is_ours(policy: &MigrationPolicy) -> bool {
    policy.metadata.name.as_deref().is_some_and(|name| name.starts_with(FORCE_PREFIX)) && vm_of(policy).is_some()
}

/// Namespace and name of the VM that one of ours is for.
pub fn vm_of(policy: &MigrationPolicy) -> Option<(&str, &str)> {
    policy.metadata.annotations.as_ref()?.get(FORCED_VM)?.split_once('/')
}

/// Our policy, whole, for a migration of this VM. `winner`: the one that would win without it, as the API server has it, all of its fields.
pub fn policy(winner: Option<&Value>, vmi: &VirtualMachineInstance, migration_uid: &str, remedy: &RemedyAnswer) -> Value {
    let (namespace, vm) =
        (vmi.metadata.namespace.as_deref().unwrap_or_default(), vmi.metadata.name.as_deref().unwrap_or_default());
    let mut spec = winner.and_then(|winner| winner.get("spec")).and_then(Value::as_object).cloned().unwrap_or_default();
    let mut selectors = spec.get("selectors").and_then(Value::as_object).cloned().unwrap_or_default();
    let mut add = |selector: &str, key: &str, value: &str| {
        let labels = selectors.entry(selector).or_insert_with(|| json!({}));
        if !labels.is_object() {
            *labels = json!({});
        }
        if let Some(labels) = labels.as_object_mut() {
            labels.insert(key.to_owned(), json!(value));
        }
    };
    add("virtualMachineInstanceSelector", FORCE_LABEL, migration_uid);
    add("namespaceSelector", NAMESPACE_NAME, namespace);
    // Anybody who may label VMs can put our label on another one of the namespace's; this one only KubeVirt puts on.
    if let Some(node) = vmi.metadata.labels.as_ref().and_then(|labels| labels.get(kubevirt::NODE)) {
        add("virtualMachineInstanceSelector", kubevirt::NODE, node);
    }
    spec.insert("selectors".to_owned(), Value::Object(selectors));
    spec.extend(changes(remedy));
    json!({
        "apiVersion": "migrations.kubevirt.io/v1alpha1",
        "kind": "MigrationPolicy",
        "metadata": { "name": name(migration_uid), "annotations": { FORCED_VM: format!("{namespace}/{vm}") } },
        "spec": spec,
    })
}

/// The fields that a remedy sets.
fn changes(remedy: &RemedyAnswer) -> Map<String, Value> {
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| drop(fields.insert(key.to_owned(), value));
    let budget = remedy.completion_timeout_per_gib;
    match remedy.kind {
        RemedyType::TimeBudget => {}
        RemedyType::AutoConverge => set("allowAutoConverge", json!(true)),
        RemedyType::Bandwidth => {
            if let Some(rate) = &remedy.bandwidth {
                set("bandwidthPerMigration", json!(rate));
            }
        }
        RemedyType::Downtime => {
            if let Some(limit) = remedy.max_downtime {
                set("maxDowntimeMs", json!(u64::try_from(limit.0.as_millis()).unwrap_or(u64::MAX)));
            }
        }
        RemedyType::PostCopy => {
            set("allowPostCopy", json!(true));
            set("allowWorkloadDisruption", json!(true));
        }
    }
    if let Some(seconds) = budget {
        set("completionTimeoutPerGiB", json!(seconds));
    }
    fields
}

/// KubeVirt would run the migration of this UID under our policy, if it handed it on now.
pub fn is_in_force(
    policies: impl IntoIterator<Item = Arc<MigrationPolicy>>,
    namespace_labels: &BTreeMap<String, String>,
    vmi_labels: &BTreeMap<String, String>,
    migration_uid: &str,
) -> bool {
    let winner = policy::select(policies, namespace_labels, vmi_labels);
    winner.is_some_and(|winner| winner.metadata.name.as_deref() == Some(name(migration_uid).as_str()))
}

/// What became of a forced migration, once its policy is read no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// It has not been handed to the nodes yet: the policy stays.
    NotYet,
    /// It goes with the remedy.
    Applied,
    /// KubeVirt took another policy (empty: none).
    Missed(String),
    /// It ended, or went, before it was handed on.
    Over,
}

/// `migration`: the one that the policy is for, if there still is one.
pub fn served(
    migration_uid: &str,
    migration: Option<&VirtualMachineInstanceMigration>,
    vmi: Option<&VirtualMachineInstance>,
) -> Served {
    let Some(migration) = migration else { return Served::Over };
    // In the patch that hands it on KubeVirt writes which policy it took.
    let state = vmi.and_then(|vmi| vmi.status.migration_state.as_ref()).filter(|state| state.migration_uid == migration_uid);
    match state {
        Some(state) if state.migration_policy_name == name(migration_uid) => Served::Applied,
        Some(state) => Served::Missed(state.migration_policy_name.clone()),
        None if migration.is_final() => Served::Over,
        None => Served::NotYet,
    }
}

#[cfg(test)]
#[path = "force_tests.rs"]
mod tests;
