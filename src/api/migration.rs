//! Real migrations in a forecast: the manager's hint that one is under way, what the agent reads of it, the truth at its end, the outcome
//! beside the forecast.
//!
//! In: what an API server stores. Out: the same, typed. The hint is annotations of the manager's (see [`super::names::hint`]); the rest
//! is status, the agent's, which only reads: nothing here changes a migration.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{forecast::MigrationForecast, kubevirt::VirtualMachineInstanceMigration, names::hint, scalar::Duration, schema};
use crate::model::forecast::{Method, Verdict};

/// How far a migration is, as far as an agent cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HintPhase {
    /// It is held for a dry run: memory will not move before that has ended.
    Held,
    /// It is wanted; memory does not move yet: an answer is needed now.
    Pending,
    /// Memory moves: read along, and keep from measuring.
    Running,
}

impl HintPhase {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Held => "Held",
            Self::Pending => "Pending",
            Self::Running => "Running",
        }
    }

    /// As it is read. What is not known counts as `Pending`: a dry run gives way, measuring goes on, and QEMU itself says when memory moves.
    fn read(phase: Option<&String>) -> Self {
        [Self::Held, Self::Running]
            .into_iter()
            .find(|known| phase.is_some_and(|phase| phase == known.as_str()))
            .unwrap_or(Self::Pending)
    }
}

/// What the manager tells the agent of a migration that is not final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// How far it is.
    pub phase: HintPhase,
}

impl Hint {
    /// Of a VM's migrations the one to tell of: one that runs before one that waits, then the older one. `None`: none is under way.
    /// Those that come in from another cluster do not count: this VM does not move.
    pub fn of<M: AsRef<VirtualMachineInstanceMigration>>(migrations: &[M]) -> Option<Self> {
        let under_way = migrations.iter().map(AsRef::as_ref).filter(|migration| migration.is_under_way());
        let phase = |migration: &VirtualMachineInstanceMigration| {
            if migration.status.phase == "Running" { HintPhase::Running } else { HintPhase::Pending }
        };
        let first = under_way.min_by_key(|migration| {
            let created = migration.metadata.creation_timestamp.as_ref().map(|time| time.0);
            (std::cmp::Reverse(phase(migration)), created, migration.name_any())
        })?;
        Some(Self { migration_uid: first.uid()?, phase: phase(first) })
    }

    /// As annotations.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let pairs = [(hint::MIGRATION, self.migration_uid.as_str()), (hint::PHASE, self.phase.as_str())];
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }
}

impl MigrationForecast {
    /// The migration that the manager tells of.
    pub fn hint(&self) -> Option<Hint> {
        let annotations = self.metadata.annotations.as_ref()?;
        let migration_uid = annotations.get(hint::MIGRATION).filter(|uid| !uid.is_empty())?.clone();
        Some(Hint { migration_uid, phase: HintPhase::read(annotations.get(hint::PHASE)) })
    }

    /// Fingerprint of the VM's spec, as the manager tells it.
    pub fn vmi_spec(&self) -> Option<&str> {
        self.metadata.annotations.as_ref()?.get(hint::VMI_SPEC).map(String::as_str)
    }
}

/// A migration that runs now, as QEMU tells of it (`query-migrate`; through libvirt `virDomainGetJobStats`). Written at most once a second.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InFlight {
    /// UID of the VirtualMachineInstanceMigration, where the manager has told of it.
    #[serde(rename = "migrationUID", default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub migration_uid: Option<String>,
    /// When it began: QEMU's `total-time` before it was first seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub started_at: Option<Time>,
    /// Passes over the memory so far (QEMU's `ram.dirty-sync-count`).
    #[schemars(schema_with = "schema::count")]
    pub iteration: u64,
    /// Bytes of memory still to send (QEMU's `ram.remaining`).
    #[schemars(schema_with = "schema::count")]
    pub remaining_bytes: u64,
    /// Bytes of memory in all (QEMU's `ram.total`).
    #[schemars(schema_with = "schema::count")]
    pub total_bytes: u64,
    /// Bytes per second on the wire (QEMU's `ram.mbps`, megabits per second).
    #[schemars(schema_with = "schema::count")]
    pub bytes_per_second: u64,
    /// How much the guest's processors are slowed down, 0 to 99 (QEMU's `cpu-throttle-percentage`); absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_percentage")]
    pub throttle_percent: Option<u64>,
    /// How long it still takes, at the present rates; absent where it would not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<Duration>,
}

/// A migration that ended, as QEMU or libvirt told it at the end (`query-migrate`, `VIR_DOMAIN_JOB_STATS_COMPLETED`): the truth that
/// forecasts are held against.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastMigration {
    /// UID of the VirtualMachineInstanceMigration, where the manager has told of it.
    #[serde(rename = "migrationUID", default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub migration_uid: Option<String>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub completed_at: Option<Time>,
    /// The guest runs at the target (QEMU's status `completed`); otherwise it was aborted or failed, and runs on where it was.
    pub converged: bool,
    /// How long it took (QEMU's `total-time`).
    pub total_time: Duration,
    /// How long the guest was stopped (QEMU's `downtime`); absent where it did not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// Pages of 4 KiB sent whole (QEMU's `ram.normal`).
    #[schemars(schema_with = "schema::count")]
    pub pages: u64,
    /// Zero pages sent (QEMU's `ram.duplicate`).
    #[schemars(schema_with = "schema::count")]
    pub zero_pages: u64,
    /// Bytes on the wire (QEMU's `ram.transferred`).
    #[schemars(schema_with = "schema::count")]
    pub transferred_bytes: u64,
    /// Passes over the memory (QEMU's `ram.dirty-sync-count`).
    #[schemars(schema_with = "schema::count")]
    pub syncs: u64,
    /// The most that the guest's processors were slowed down meanwhile, percent (QEMU's `cpu-throttle-percentage`); absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_percentage")]
    pub throttle_percent: Option<u64>,
}

/// A migration that ended, beside the forecast it started with. The manager's.
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
    #[schemars(schema_with = "schema::optional_time")]
    pub completed_at: Option<Time>,
    /// How long it took, as QEMU told, else as KubeVirt did, in whole seconds; absent where it never started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
    /// How long it was forecast to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast_total_time: Option<Duration>,
    /// (forecast − real) / real of the total time; absent where either is missing, it failed, or it was another migration than the one that was
    /// forecast: forced, throttled, post-copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
    /// How long the guest was stopped, as QEMU told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// How long it was forecast to be stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast_downtime: Option<Duration>,
    /// As `relativeError`, of the downtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_error: Option<f64>,
    /// Pages sent, as QEMU told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub pages: Option<u64>,
    /// Pages that were forecast.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub forecast_pages: Option<u64>,
    /// As `relativeError`, of the pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_error: Option<f64>,
    /// How the forecast was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_method")]
    pub method: Option<Method>,
    /// The median of ln(real / forecast) of the total times of the forecasts before it that were made so: above 0, migrations took longer than
    /// foretold. Absent where there were too few. No forecast is corrected by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method_bias: Option<f64>,
    /// The verdict that it started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_verdict")]
    pub verdict: Option<Verdict>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn migration(uid: &str, phase: &str, minute: u32, more: &Value) -> Arc<VirtualMachineInstanceMigration> {
        let mut object = json!({
            "metadata": { "name": uid, "uid": uid, "creationTimestamp": format!("2026-11-22T12:{minute:02}:00Z") },
            "spec": { "vmiName": "vm" }, "status": { "phase": phase }
        });
        json_patch::merge(&mut object, more);
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn the_migration_to_tell_of() {
        let none = json!({});
        let told = |migrations: &[Arc<VirtualMachineInstanceMigration>]| {
            Hint::of(migrations).map(|hint| format!("{} {}", hint.migration_uid, hint.phase.as_str()))
        };
        let (old, young) = (migration("old", "Scheduling", 1, &none), migration("young", "Pending", 2, &none));
        let (runs, over) = (migration("runs", "Running", 3, &none), migration("over", "Succeeded", 0, &none));
        let comes = migration("comes", "Running", 0, &json!({ "spec": { "receive": { "migrationID": "x" } } }));
        assert_eq!(told(&[over.clone(), comes.clone()]), None);
        assert_eq!(told(&[young.clone(), old.clone(), over]), Some("old Pending".into()));
        assert_eq!(told(&[young, old, runs, comes]), Some("runs Running".into()));
        assert_eq!(told(&[migration("new", "", 1, &none)]), Some("new Pending".into()), "it has no status yet");
    }

    #[test]
    fn a_hint_reads_back_and_odd_ones_do_no_harm() {
        let spec = json!({ "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited", "downtimeLimit": "300ms" });
        let mut object = MigrationForecast::new("vm", serde_json::from_value(spec).unwrap());
        assert_eq!(object.hint(), None);
        let hint = Hint { migration_uid: "u1".into(), phase: HintPhase::Running };
        object.metadata.annotations = Some(hint.annotations());
        assert_eq!(object.hint(), Some(hint));
        for (uid, phase, expected) in
            [("", "Running", None), ("u2", "Dancing", Some(HintPhase::Pending)), ("u2", "", Some(HintPhase::Pending))]
        {
            let pairs = [(super::hint::MIGRATION, uid), (super::hint::PHASE, phase)];
            object.metadata.annotations =
                Some(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect());
            assert_eq!(object.hint().map(|hint| hint.phase), expected);
        }
    }
}
