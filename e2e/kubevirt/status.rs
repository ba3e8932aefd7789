//! virt-controller's migration controller: which phase a VMIM is in. After KubeVirt 1.9's `pkg/virt-controller/watch/migration/migration.go`
//! (`updateStatus`, `processMigrationPhase`).
//!
//! In: a VMIM with its VMI and pods, as they were seen. Out: its status, written where it differs; its finalizer, taken off once it is
//! final.

use anyhow::{Context, Result};
use kube::{
    ResourceExt,
    api::{DynamicObject, PostParams},
    runtime::events::EventType,
};
use serde_json::{Value, json};

use super::{
    core::Core,
    limits,
    migration::Seen,
    objects::now,
    read::{condition, has_hotplug_volumes, is_down, is_final, is_ready, text},
};

pub(super) const FINALIZER: &str = "kubevirt.io/migrationJobFinalize";

/// Where it goes from here.
enum Next {
    Stay,
    To(&'static str),
    /// Over, with the note of the event.
    Fail(&'static str),
    /// It was deleted in the middle: a condition, nothing else.
    AbortRequested,
    /// It is final: what the VMI knows is kept, and the finalizer comes off.
    Finish,
}

/// Writes what has changed.
pub(super) async fn update(core: &Core, seen: &Seen, handed_over: bool) -> Result<()> {
    let mut vmim = (*seen.vmim).clone();
    let next = decide(core, seen, handed_over);
    match next {
        Next::Stay => {}
        Next::To(phase) => enter(&mut vmim, phase),
        Next::Fail(note) => {
            core.event(&seen.vmim, EventType::Warning, "FailedMigration", note).await;
            if seen.is_deleted() {
                request_abort(&mut vmim);
            }
            enter(&mut vmim, "Failed");
        }
        Next::AbortRequested => request_abort(&mut vmim),
        Next::Finish => {
            if seen.owns_state() {
                vmim.data["status"]["migrationState"] = seen.vmi.data["status"]["migrationState"].clone();
            }
            vmim.finalizers_mut().retain(|it| it != FINALIZER);
        }
    }
    if matches!(next, Next::To("Succeeded")) {
        core.event(&seen.vmim, EventType::Normal, "SuccessfulMigration", "Source node reported migration succeeded").await;
    }
    if text(&seen.vmim.data, "/status/phase") == "Pending"
        && let Some(pod) = limits::current_pod(core, &seen.vmi)
    {
        vmim.data["status"]["migrationState"]["sourcePod"] = json!(pod.name_any());
    }
    let (api, name) = (core.api_vmims(&vmim), vmim.name_any());
    if vmim.data.get("status") != seen.vmim.data.get("status") {
        let written = api.replace_status(&name, &PostParams::default(), &vmim).await;
        let written = written.context("cannot update the status of the migration")?;
        vmim.metadata.resource_version = written.metadata.resource_version;
    }
    if vmim.finalizers() != seen.vmim.finalizers() {
        api.replace(&name, &PostParams::default(), &vmim).await.context("cannot take the finalizer off the migration")?;
    }
    Ok(())
}

fn decide(core: &Core, seen: &Seen, handed_over: bool) -> Next {
    let phase = seen.phase();
    let target_is_created = !matches!(phase.as_str(), "" | "Pending");
    let target_is_handed_over = target_is_created && !matches!(phase.as_str(), "Scheduling" | "Scheduled");
    let down = |pod: &Option<_>| pod.as_ref().is_some_and(|pod: &std::sync::Arc<_>| is_down(pod));
    if is_final(&seen.vmim) {
        return Next::Finish;
    }
    if is_final(&seen.vmi) {
        return Next::Fail("Migration failed vmi shutdown during migration.");
    }
    if seen.is_deleted() && !handed_over {
        return Next::Fail("Migration failed due to being canceled");
    }
    if down(&seen.pod) {
        return Next::Fail("Migration failed because target pod shutdown during migration");
    }
    if target_is_created && seen.pod.is_none() {
        return Next::Fail("Migration target pod was removed during active migration.");
    }
    if target_is_handed_over && !seen.has_state() {
        return Next::Fail("VMI's migration state was cleared during the active migration.");
    }
    if target_is_handed_over && !seen.owns_state() {
        return Next::Fail("VMI's migration state was taken over by another migration job during active migration.");
    }
    if seen.owns_state() && seen.state("failed") {
        return Next::Fail("source node reported migration failed");
    }
    if seen.is_deleted() && condition(&seen.vmim, "migrationAbortRequested").is_none() {
        return Next::AbortRequested;
    }
    if down(&seen.attachment) {
        return Next::Fail("Migration failed because target attachment pod shutdown during migration");
    }
    proceed(core, seen, &phase)
}

/// `processMigrationPhase`
fn proceed(core: &Core, seen: &Seen, phase: &str) -> Next {
    let hotplug = has_hotplug_volumes(&seen.vmi);
    let attached = !hotplug || seen.attachment.as_ref().is_some_and(|pod| is_ready(pod));
    let open = |kind: &str| condition(&seen.vmi, kind).as_deref() == Some("True");
    let next = match phase {
        "" if limits::can_migrate(core, seen) => Some("Pending"),
        "" => return Next::Fail("VMI is not eligible for migration because another migration job is in progress."),
        "Pending" => (seen.pod.is_some() && attached).then_some("Scheduling"),
        "Scheduling" => (seen.pod.as_ref().is_some_and(|pod| is_ready(pod)) && attached).then_some("Scheduled"),
        "Scheduled" => (seen.owns_state() && !seen.state_text("targetNode").is_empty()).then_some("PreparingTarget"),
        "PreparingTarget" => (!seen.state_text("targetNodeAddress").is_empty()).then_some("TargetReady"),
        "TargetReady" => (!seen.state_text("startTimestamp").is_empty()).then_some("Running"),
        "Running" => {
            let changing =
                condition(&seen.vmi, "HotVCPUChange").is_some() || open("HotMemoryChange") || open("MigrationRequired");
            (seen.state("completed") && !changing).then_some("Succeeded")
        }
        _ => None,
    };
    next.map_or(Next::Stay, Next::To)
}

/// Writes the phase and when it was entered.
fn enter(vmim: &mut DynamicObject, phase: &str) {
    let status = &mut vmim.data["status"];
    status["phase"] = json!(phase);
    let entered = json!({ "phase": phase, "phaseTransitionTimestamp": now() });
    push(&mut status["phaseTransitionTimestamps"], entered);
}

fn request_abort(vmim: &mut DynamicObject) {
    if condition(vmim, "migrationAbortRequested").is_none() {
        let requested = json!({ "type": "migrationAbortRequested", "status": "True", "lastProbeTime": now() });
        push(&mut vmim.data["status"]["conditions"], requested);
    }
}

fn push(list: &mut Value, item: Value) {
    match list.as_array_mut() {
        Some(list) => list.push(item),
        None => *list = json!([item]),
    }
}
