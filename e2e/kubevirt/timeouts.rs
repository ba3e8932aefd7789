//! virt-controller's migration controller: how long a target pod may stay pending. After KubeVirt 1.9's
//! `pkg/virt-controller/watch/migration/migration.go` (`handlePendingPodTimeout`).
//!
//! In: a migration whose target pod is pending. Out: the pod deleted once its time is over, which fails the migration; until then another
//! look at that time. A pod with scheduling gates is not unschedulable: for it only the longer time counts.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt, api::DynamicObject, runtime::events::EventType};

use super::{
    migration::{Migrations, RUNNING, Seen},
    read::key,
};

const UNSCHEDULABLE: (&str, i64) = ("kubevirt.io/migrationUnschedulablePodTimeoutSeconds", 300);
const PENDING: (&str, i64) = ("kubevirt.io/migrationPendingPodTimeoutSeconds", 900);

/// Looks at the clock.
pub(super) async fn handle(on: &Migrations, name: &str, seen: &Seen, pod: &Pod) -> Result<()> {
    let status = pod.status.as_ref();
    if status.and_then(|status| status.phase.as_deref()) != Some("Pending") || pod.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let Some(created) = pod.creation_timestamp() else { return Ok(()) };
    let pending = jiff::Timestamp::now().duration_since(created.0).as_secs().max(0);
    let later = |limit: i64| on.queue.add_after(name, RUNNING, Duration::from_secs((limit - pending).unsigned_abs()));
    let who = key(pod);
    let scheduled =
        status.and_then(|status| status.conditions.as_ref()).into_iter().flatten().find(|it| it.type_ == "PodScheduled");
    if scheduled.is_some_and(|it| it.status == "False" && it.reason.as_deref() == Some("Unschedulable")) {
        let note = format!("Migration target pod for VMI [{}] is currently unschedulable.", key(seen.vmi.as_ref()));
        on.core.event(&seen.vmim, EventType::Warning, "migrationTargetPodUnschedulable", &note).await;
        let limit = limit(&seen.vmim, UNSCHEDULABLE);
        if pending >= limit {
            return on.delete_pod(seen, pod, &format!("unschedulable pod {who} timeout period exceeded")).await;
        }
        later(limit);
    }
    let limit = limit(&seen.vmim, PENDING);
    if pending >= limit {
        return on.delete_pod(seen, pod, &format!("pending pod {who} timeout period exceeded")).await;
    }
    later(limit);
    Ok(())
}

/// What the VMIM's annotation says, else KubeVirt's own, in seconds.
fn limit(vmim: &DynamicObject, (annotation, default): (&str, i64)) -> i64 {
    vmim.annotations().get(annotation).and_then(|text| text.parse().ok()).unwrap_or(default)
}
