//! virt-controller's migration controller: how many migrations at once, which of the waiting ones is next, and how many old ones are
//! kept. After KubeVirt 1.9's `pkg/virt-controller/watch/migration/migration.go` (`findRunningMigrations`, `outboundMigrationsOnNode`,
//! `canMigrateVMI`, `garbageCollectFinalizedMigrations`) and `pkg/controller/controller.go`.
//!
//! In: the caches. Out: answers.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt, api::DeleteParams, api::DynamicObject};

use super::{
    configuration::Configuration,
    core::Core,
    migration::Seen,
    read::{is_down, is_final, is_target, priority, text, vmi_key},
};

/// How many final VMIMs of a VMI are kept.
const KEPT: usize = 5;

/// Has the cluster, or the node that this VMI would leave, as many migrations under way as it may? A migration counts from the moment its
/// target pod is there until it is final; held ones count like others.
pub(super) fn are_reached(core: &Core, vmi: &DynamicObject) -> bool {
    let configuration = Configuration::of_cluster(core.kubevirt().as_ref());
    let limit = |name| usize::try_from(configuration.number(name)).unwrap_or(usize::MAX);
    let node = text(&vmi.data, "/status/nodeName");
    let running: Vec<_> = core.vmims().into_iter().filter(|vmim| is_under_way(core, vmim)).collect();
    let leaves = |vmim: &&Arc<DynamicObject>| {
        let vmi = core.vmi(&vmi_key(vmim));
        vmi.is_some_and(|vmi| {
            text(&vmi.data, "/status/nodeName") == node || text(&vmi.data, "/status/migrationState/sourceNode") == node
        })
    };
    running.len() >= limit("parallelMigrationsPerCluster")
        || running.iter().filter(leaves).count() >= limit("parallelOutboundMigrationsPerNode")
}

fn is_under_way(core: &Core, vmim: &DynamicObject) -> bool {
    if is_final(vmim) {
        return false;
    }
    if !matches!(text(&vmim.data, "/status/phase").as_str(), "" | "Pending") {
        return true;
    }
    let uid = vmim.uid().unwrap_or_default();
    let vmi = core.vmi(&vmi_key(vmim));
    vmi.is_some_and(|vmi| core.pods_of(&vmi.uid().unwrap_or_default()).iter().any(|pod| is_target(pod, &uid)))
}

/// How long a migration of this priority waits before it asks again for a place.
pub(super) fn delay(priority: i64) -> Duration {
    Duration::from_secs(match priority {
        100.. => 1,
        50.. => 3,
        _ => 5,
    })
}

/// The waiting ones that are woken when a place gets free: as many as there are places, the most important first.
pub(super) fn pending_by_priority(core: &Core) -> Vec<Arc<DynamicObject>> {
    let mut pending: Vec<_> = core.vmims().into_iter().filter(|vmim| text(&vmim.data, "/status/phase") == "Pending").collect();
    pending.sort_by_key(|vmim| std::cmp::Reverse(priority(vmim)));
    let places = Configuration::of_cluster(core.kubevirt().as_ref()).number("parallelMigrationsPerCluster");
    pending.truncate(usize::try_from(places).unwrap_or(usize::MAX));
    pending
}

/// Is the VMI free for this migration: no other one that still goes on has its migrationState?
pub(super) fn can_migrate(core: &Core, seen: &Seen) -> bool {
    let current = seen.state_text("migrationUid");
    if current.is_empty() || current == seen.uid() {
        return true;
    }
    let namespace = seen.vmim.namespace();
    let holder = core.vmims().into_iter().find(|it| it.namespace() == namespace && it.uid().as_ref() == Some(&current));
    holder.is_none_or(|holder| is_final(&holder))
}

/// The newest pod of the VMI on the node where it runs.
pub(super) fn current_pod(core: &Core, vmi: &DynamicObject) -> Option<Arc<Pod>> {
    let node = text(&vmi.data, "/status/nodeName");
    let here = |pod: &Arc<Pod>| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node.as_str());
    core.pods_of(&vmi.uid().unwrap_or_default()).into_iter().filter(here).max_by_key(|pod| pod.creation_timestamp())
}

/// The VMI's pods that have not ended.
pub(super) fn active_pods(core: &Core, vmi: &DynamicObject) -> usize {
    core.pods_of(&vmi.uid().unwrap_or_default()).iter().filter(|pod| !is_down(pod)).count()
}

/// Of a VMI's final VMIMs only the newest few are kept, and with an old one goes its dead pod.
pub(super) async fn forget_old(core: &Core, vmi: &DynamicObject) -> Result<()> {
    let mut ended = core.vmims_of(vmi);
    ended.retain(|vmim| is_final(vmim) && vmim.metadata.deletion_timestamp.is_none());
    let surplus = ended.len().saturating_sub(KEPT);
    for old in ended.iter().take(surplus) {
        let state = &old.data["status"]["migrationState"];
        let side = match (state["failed"] == true, state["completed"] == true) {
            (true, _) => "/targetPod",
            (false, true) => "/sourcePod",
            (false, false) => "",
        };
        let pod = text(state, side);
        if !side.is_empty() && !pod.is_empty() {
            gone(core.api_pods(vmi.namespace()).delete(&pod, &DeleteParams::default()).await.map(drop))?;
        }
        gone(core.api_vmims(vmi).delete(&old.name_any(), &DeleteParams::default()).await.map(drop))?;
    }
    Ok(())
}

fn gone(deleted: kube::Result<()>) -> Result<()> {
    match deleted {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.context("cannot delete an old migration, or its pod"),
    }
}
