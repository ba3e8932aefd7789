//! Migrations that are held: which, and what becomes of them. Pure.
//!
//! In: the migrations of a VM, the target pods, the decision on each migration as it is now, the time. Out: a [`Step`] for each. A migration is held
//! by our scheduling gate on its target pod, which the pod webhook puts on; nothing is transferred while it is there. The gate never
//! outlives its purpose: it goes when the decision is another one, and the decision is another one when the policy's deadline is over, when
//! the dry run has ended, however it did, and when nothing is known any more.

use std::time::Duration;

use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::Resource;

use crate::{
    api::{
        MigrationForecast,
        kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
        names::{GATE, kubevirt},
    },
    decision::{Action, Decision},
};

/// How long a dry run that has been withdrawn gets to leave the VM before its migration goes on. Longer than an agent needs, and KubeVirt
/// takes seconds from the end of the gate to the first page.
pub const LETTING_GO: Duration = Duration::from_secs(10);
/// An evacuation or a workload update that the policy does not have held gets this long for a remedy to be applied.
pub const DRAINS: Duration = Duration::from_secs(10);
/// A dry run that is asked for begins within seconds, after another one of its node within some more. One that does not is not waited for:
/// its agent is dead or old, or QEMU is busy with a device.
pub const BEGINNING: Duration = Duration::from_secs(90);
/// A migration that is held is looked at this often, for its deadline.
pub const HOLDING: Duration = Duration::from_secs(5);

/// The label that a target pod of a migration bears, and hotplug attachment pods with it; the component tells them apart.
pub fn selector() -> String {
    format!("{}={},{}", kubevirt::COMPONENT, kubevirt::LAUNCHER, kubevirt::MIGRATION_JOB)
}

/// UID of the migration whose target pod this is. `None`: it is another kind of pod.
pub fn migration_of(pod: &Pod) -> Option<&str> {
    let labels = pod.metadata.labels.as_ref()?;
    let launcher = labels.get(kubevirt::COMPONENT).is_some_and(|component| component == kubevirt::LAUNCHER);
    labels.get(kubevirt::MIGRATION_JOB).map(String::as_str).filter(|uid| launcher && !uid.is_empty())
}

/// Name of the VM whose pod this is.
pub fn vmi_of(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(kubevirt::DOMAIN).map(String::as_str)
}

/// The pod is what KubeVirt itself takes for this migration's, in the same namespace: it names the migration and bears the UID of the VM, whose own it is.
/// A pod that merely has the label of somebody else's migration is not.
pub fn is_its_own(pod: &Pod, migration: &VirtualMachineInstanceMigration, vmi: &VirtualMachineInstance) -> bool {
    let (Some(vm), Some(job)) = (vmi.metadata.uid.as_deref(), migration.metadata.uid.as_deref()) else { return false };
    let made_for = pod.metadata.labels.as_ref().and_then(|labels| labels.get(kubevirt::CREATED_BY));
    let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    migration_of(pod) == Some(job)
        && made_for.is_some_and(|uid| uid == vm)
        && owner.is_some_and(|owner| owner.uid == vm)
        && vmi_of(pod) == Some(migration.spec.vmi_name.as_str())
}

/// Our gate is on it.
pub fn is_gated(pod: &Pod) -> bool {
    let gates = pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref());
    gates.is_some_and(|gates| gates.iter().any(|gate| gate.name == GATE))
}

/// Since when a pod is held, for how long at most: KubeVirt's clock runs from its creation, too.
pub fn held_for(pod: &Pod, now: Timestamp) -> Duration {
    let since = pod.meta().creation_timestamp.as_ref().map_or(now, |time| time.0);
    // Of the future: clocks disagree.
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

/// What is to be done about a migration now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing: it is not ours to stop, or it goes its way.
    Leave,
    /// It waits for its dry run.
    Hold,
    /// A remedy is applied to it; then it goes.
    Force,
    /// Its gate goes, once no dry run is under way.
    LetGo,
    /// It is deleted: it would fail, and nothing is transferred yet.
    Abandon,
}

/// `pod`: its target pod, if there is one. `decision`: as it is now, with the deadline of the hold in it. `forced`: the remedy has been applied,
/// and KubeVirt would go by it.
pub fn step(migration: &VirtualMachineInstanceMigration, pod: Option<&Pod>, decision: &Decision, forced: bool) -> Step {
    // While its pod is gated KubeVirt takes it no further: one that bears our gate beyond that only looks like its own.
    let gated = pod.is_some_and(is_gated) && matches!(migration.status.phase.as_str(), "" | "Pending" | "Scheduling");
    let ends = migration.metadata.deletion_timestamp.is_some();
    match decision.action {
        // KubeVirt takes its pod away; letting it go would only have it scheduled before.
        _ if ends || !migration.is_under_way() => Step::Leave,
        Action::Hold if gated && decision.remedy.is_some() => {
            if forced {
                Step::LetGo
            } else {
                Step::Force
            }
        }
        // Only what the pod webhook has held: KubeVirt waits for it then, whereas a migration that is deleted before it has a pod is made
        // anew at once and for ever where a drain wants it, and admission is not heard.
        Action::Hold if gated => Step::Hold,
        Action::Deny if gated => Step::Abandon,
        _ if gated => Step::LetGo,
        _ => Step::Leave,
    }
}

/// We hold a pod that is no known migration's own, and not because a watch lags behind the pods'. `vmi`: the VM that it names, if there is one.
pub fn is_orphan<M: AsRef<VirtualMachineInstanceMigration>>(
    pod: &Pod,
    migrations: &[M],
    vmi: Option<&VirtualMachineInstance>,
    now: Timestamp,
) -> bool {
    let known = |vmi: &VirtualMachineInstance| migrations.iter().any(|migration| is_its_own(pod, migration.as_ref(), vmi));
    is_gated(pod) && !vmi.is_some_and(known) && held_for(pod, now) > LETTING_GO
}

/// A dry run of the VM may still be under way: the agent has begun it and not told of its end.
pub fn is_dry_running(stored: Option<&MigrationForecast>) -> bool {
    let Some(stored) = stored else { return false };
    let status = stored.status.as_ref().and_then(|status| status.dry_run.as_ref());
    match (&stored.spec.dry_run, status) {
        // Asked for, and not heard of or not begun yet: it may begin at any moment.
        (Some(asked), Some(status)) => asked.id != status.id || !status.phase.is_final(),
        (Some(_), None) => true,
        (None, Some(status)) => !status.phase.is_final() && status.started_at.is_some(),
        (None, None) => false,
    }
}

/// A dry run of the VM is asked for, and no agent has begun it.
pub fn waits_to_begin(stored: &MigrationForecast) -> bool {
    let Some(asked) = &stored.spec.dry_run else { return false };
    let status = stored.status.as_ref().and_then(|status| status.dry_run.as_ref()).filter(|status| status.id == asked.id);
    status.is_none_or(|status| status.started_at.is_none() && !status.phase.is_final())
}

/// The pod of this migration of this VM; of several that look like it, one that is held, for it must be let go.
pub fn pod_of<'a, P: AsRef<Pod>>(
    pods: &'a [P],
    migration: &VirtualMachineInstanceMigration,
    vmi: &VirtualMachineInstance,
) -> Option<&'a Pod> {
    let mut all = pods.iter().map(AsRef::as_ref).filter(|pod| is_its_own(pod, migration, vmi));
    let first = all.next()?;
    Some(if is_gated(first) { first } else { all.find(|pod| is_gated(pod)).unwrap_or(first) })
}

#[cfg(test)]
#[path = "hold_tests.rs"]
mod tests;
