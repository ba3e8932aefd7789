//! MigrationOverride: lets the migrations of one VM through for a while, whatever is forecast, and keeps a record of it.
//!
//! In: what an API server stores. Out: the same, typed; which one is in force now. Who may create one is plain RBAC. An annotation on the
//! migration could not serve: virtctl and drains write none.

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{CustomResource, ResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{scalar::Duration, schema};

/// Which VM, why, for how long.
#[derive(CustomResource, Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "migvisor.io",
    version = "v1alpha1",
    kind = "MigrationOverride",
    plural = "migrationoverrides",
    namespaced,
    derive = "PartialEq",
    shortname = "mo",
    category = "migvisor",
    doc = "Lets the live migrations of one VirtualMachineInstance through until it expires, whatever migvisor forecasts: they are neither \
           denied nor held, and whoever starts one is warned all the same. It is a record: it cannot be changed, only made or deleted.",
    printcolumn = r#"{"name": "VMI", "type": "string", "jsonPath": ".spec.vmiName"}"#,
    printcolumn = r#"{"name": "For", "type": "string", "jsonPath": ".spec.expiresAfter"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name": "Reason", "type": "string", "jsonPath": ".spec.reason"}"#
)]
#[kube(validation = Rule::new("self.spec == oldSelf.spec").message("an override is a record and cannot be changed: delete it, make another one"))]
#[serde(rename_all = "camelCase")]
pub struct MigrationOverrideSpec {
    /// The VirtualMachineInstance, in the override's namespace.
    #[schemars(length(min = 1, max = 253))]
    pub vmi_name: String,
    /// Why, for whoever reads it later.
    #[schemars(length(min = 1, max = 1024))]
    pub reason: String,
    /// For how long, from its creation, 1s to 168h; an hour when absent.
    #[serde(default = "an_hour")]
    #[schemars(schema_with = "schema::override_duration", default = "an_hour")]
    pub expires_after: Duration,
}

fn an_hour() -> Duration {
    Duration(std::time::Duration::from_secs(3600))
}

impl MigrationOverride {
    /// When it ends; `None`: it has not been created yet.
    pub fn expires_at(&self) -> Option<Timestamp> {
        let after = SignedDuration::try_from(self.spec.expires_after.0).ok()?;
        self.metadata.creation_timestamp.as_ref()?.0.checked_add(after).ok()
    }

    /// It stands at this time.
    pub fn is_in_force(&self, now: Timestamp) -> bool {
        self.metadata.deletion_timestamp.is_none() && self.expires_at().is_some_and(|end| now < end)
    }
}

/// Of several the one that lasts longest, then the first by name.
pub fn in_force<O: AsRef<MigrationOverride>>(overrides: impl IntoIterator<Item = O>, now: Timestamp) -> Option<O> {
    overrides
        .into_iter()
        .filter(|one| one.as_ref().is_in_force(now))
        .max_by_key(|one| (one.as_ref().expires_at(), std::cmp::Reverse(one.as_ref().name_any())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn at(time: &str) -> Timestamp {
        format!("2026-11-22T{time}Z").parse().unwrap()
    }

    fn made(name: &str, created: &str, lasts: Option<&str>) -> Arc<MigrationOverride> {
        let mut object = json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationOverride",
            "metadata": { "name": name, "creationTimestamp": format!("2026-11-22T{created}Z") },
            "spec": { "vmiName": "wild", "reason": "the disk is dying" }
        });
        if let Some(lasts) = lasts {
            object["spec"]["expiresAfter"] = json!(lasts);
        }
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn it_stands_for_an_hour_unless_it_says_otherwise() {
        let (plain, short) = (made("a", "12:00:00", None), made("b", "12:30:00", Some("5m")));
        let name = |now| in_force([&plain, &short], at(now)).map(|one| one.name_any());
        assert_eq!(name("12:34:59").as_deref(), Some("a"), "the one that lasts longest");
        assert_eq!(name("13:00:00"), None, "on the minute it is over");
        assert!(short.is_in_force(at("12:34:59")) && !short.is_in_force(at("12:35:00")));
    }

    #[test]
    fn what_is_deleted_or_not_there_yet_does_not_count() {
        let mut gone = (*made("a", "12:00:00", None)).clone();
        gone.metadata.deletion_timestamp = gone.metadata.creation_timestamp.clone();
        assert!(!gone.is_in_force(at("12:01:00")));
        let mut unborn = (*made("a", "12:00:00", None)).clone();
        unborn.metadata.creation_timestamp = None;
        assert!(!unborn.is_in_force(at("12:01:00")));
        let endless = made("a", "12:00:00", Some("99999999h"));
        assert!(endless.expires_at().is_some() || !endless.is_in_force(at("12:01:00")), "no panic");
    }
}
