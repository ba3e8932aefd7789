//! virt-controller's workload updater, in its simplest true form: VMIs whose launcher is outdated, or that need a migration for a change to
//! take effect, are migrated a few at a time. After KubeVirt 1.9's `pkg/virt-controller/watch/workload-updater/workload-updater.go`; evictions
//! and the abortion of changes are left out.
//!
//! In: VMIs whose `status.launcherContainerImageVersion` is not the present one, or with the condition `MigrationRequired`; the KubeVirt CR,
//! which has to be `Deployed` and to list the method `LiveMigrate`. Out: VMIMs `kubevirt-workload-update-…`. One key for the whole cluster:
//! 5 s after any change, every 30 s while something is left, after failures 5 s to 300 s. The shuffle of the candidates is by name here.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use kube::{
    ResourceExt,
    api::{DynamicObject, PostParams},
    runtime::events::EventType,
};
use tokio::sync::mpsc;

use super::{
    configuration::Configuration,
    core::{Change, Core},
    evacuation::{is_migrating, migration, refusal},
    objects::LAUNCHER,
    queue::{Limiter, Queue},
    read::{condition, is_final, key, text, vmi_key},
};

const ANNOTATION: &str = "kubevirt.io/workloadUpdateMigration";
const THROTTLE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_secs(30);
/// The one key.
const CLUSTER: &str = "kubevirt";

/// Works for ever.
pub(super) async fn run(core: Arc<Core>, mut changes: mpsc::UnboundedReceiver<Change>) {
    let queue = Queue::new(Limiter { base: THROTTLE, most: Duration::from_secs(300) });
    let listen = async {
        while let Some(change) = changes.recv().await {
            let matters = match change {
                Change::Vmim(_) | Change::KubeVirt => true,
                Change::Vmi(vmi) => needs_migration(&vmi).is_some() && !is_migrating(&vmi),
                Change::Pod(_) | Change::Node(_) => false,
            };
            if matters {
                queue.add_after(CLUSTER, 0, THROTTLE);
            }
        }
    };
    let work = async {
        loop {
            let (key, _) = queue.next().await;
            match execute(&core, &queue).await {
                Ok(()) => queue.forget(&key),
                Err(error) => {
                    tracing::debug!("workload updates: {error:#}; trying again");
                    queue.retry(&key, 0);
                }
            }
        }
    };
    tokio::join!(listen, work);
}

async fn execute(core: &Core, queue: &Queue) -> Result<()> {
    let Some(kubevirt) = core.kubevirt() else { return Ok(()) };
    let methods = kubevirt.pointer("/spec/workloadUpdateStrategy/workloadUpdateMethods").and_then(|it| it.as_array());
    let live = methods.is_some_and(|methods| methods.iter().any(|it| it == "LiveMigrate"));
    if !live || text(&kubevirt, "/status/phase") != "Deployed" {
        return Ok(());
    }
    let unfinished: Vec<_> = core.vmims().into_iter().filter(|vmim| !is_final(vmim)).collect();
    let migrating: HashSet<_> = unfinished.iter().map(|vmim| vmi_key(vmim)).collect();
    let active = unfinished.iter().filter(|vmim| !matches!(text(&vmim.data, "/status/phase").as_str(), "" | "Pending")).count();
    let outdated = core.vmis().into_iter().filter_map(|vmi| needs_migration(&vmi).map(|priority| (vmi, priority)));
    let mut outdated: Vec<_> = outdated
        .filter(|(vmi, _)| {
            text(&vmi.data, "/status/phase") == "Running"
                && vmi.metadata.deletion_timestamp.is_none()
                && !is_migrating(vmi)
                && !migrating.contains(&key(vmi.as_ref()))
                && condition(vmi, "LiveMigratable").as_deref() == Some("True")
        })
        .collect();
    if !outdated.is_empty() {
        queue.add_after(CLUSTER, 0, AGAIN);
    }
    outdated.sort_by_key(|(vmi, _)| key(vmi.as_ref()));
    let limit = Configuration::of_cluster(Some(&kubevirt)).number("parallelMigrationsPerCluster");
    let places = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(active);
    let mut failed = None;
    for (vmi, priority) in outdated.iter().take(places) {
        failed = migrate(core, vmi, priority).await.err().or(failed);
    }
    failed.map_or(Ok(()), Err)
}

/// Does this VMI need a migration, and how urgent is that?
fn needs_migration(vmi: &DynamicObject) -> Option<&'static str> {
    let changes = condition(vmi, "HotVCPUChange").is_some()
        || ["HotMemoryChange", "MigrationRequired", "VolumesChange"]
            .iter()
            .any(|it| condition(vmi, it).as_deref() == Some("True"));
    let launcher = text(&vmi.data, "/status/launcherContainerImageVersion");
    match (is_final(vmi), changes, !launcher.is_empty() && launcher != LAUNCHER) {
        (false, true, _) => Some("user-triggered"),
        (false, false, true) => Some("system-critical"),
        _ => None,
    }
}

async fn migrate(core: &Core, vmi: &DynamicObject, priority: &str) -> Result<()> {
    let manifest = migration(vmi, "kubevirt-workload-update-", (ANNOTATION, ""), priority);
    match core.api_vmims(vmi).create(&PostParams::default(), &serde_json::from_value(manifest)?).await {
        Ok(made) => {
            let note = format!("Created Migration {} for automated workload update", made.name_any());
            core.event(vmi, EventType::Normal, "SuccessfulCreate", &note).await;
            Ok(())
        }
        Err(error) => {
            let note = format!("Error creating a Migration for automated workload update: {}", refusal(&error));
            core.event(vmi, EventType::Warning, "FailedCreate", &note).await;
            Err(anyhow!(error))
        }
    }
}
