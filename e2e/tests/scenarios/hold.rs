//! Migrations that are held: by a gate on their target pods, while a dry run tells what the pattern could not. Nothing is sent
//! meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use kube::ResourceExt;
use migvisor::{
    api::{
        MigrationForecast,
        dry_run::DryRunPhase,
        names::{annotation, reason},
    },
    model::forecast::{Method, Verdict},
};
use migvisor_e2e::scenario::{Load, Scene, VMI, VMIM, is_gated};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// The pattern is from when the guest wrote; it rests by now. A dry run finds that out, and the migration goes its way.
pub(crate) async fn a_doubtful_migration_is_held_tried_out_and_moves(scene: &Scene<'_>) -> Result<()> {
    scene.change_migrations(&json!({ "completionTimeoutPerGiB": 20 })).await?;
    on_demand(scene, &json!({})).await?;
    scene.vm("settling", Load::Settling).await?;
    let booted = Instant::now();
    let first = scene.answered("settling", Verdict::Converges).await?;
    let total = first.status.and_then(|status| status.total_time).context("no total time")?.as_ms();
    // Less than it takes while the guest writes, and more than once it rests.
    scene.change_policy(&json!({ "sla": { "totalTime": format!("{:.0}ms", total * 0.65) } })).await?;
    let doubt = scene.answered("settling", Verdict::Borderline).await?.status.context("no status")?;
    ensure!(doubt.reason.as_deref() == Some(reason::SLA_EXCEEDED), "{doubt:?}");
    ensure!(doubt.method == Some(Method::PatternCollector), "{doubt:?}");
    scene.settled(booted).await;

    let warning = scene.held("settling-1", "settling").await?;
    for part in ["would break its SLA", "It is held until a dry run has tried it out"] {
        ensure!(warning.contains(part), "{part:?} is missing in: {warning}");
    }
    let node = scene.vmi("settling").await?["status"]["nodeName"].clone();
    let words = scene.released("settling-1").await?;
    ensure!(words.contains("migvisor forecasts after a dry run"), "{words}");
    let run = scene.dry_run_that("settling", "was carried out", |run| run.phase == DryRunPhase::Done).await?;
    let result = run.result.as_ref().context("no result")?;
    ensure!(result.verdict == Verdict::Converges, "{run:?}");
    println!("the pattern says {total:.0} ms, the dry run {:.0} ms", result.total_time.as_ms());
    let phase = scene.ended("settling-1").await?;
    ensure!(phase == "Succeeded", "settling-1 ended as {phase}");
    ensure!(scene.vmi("settling").await?["status"]["nodeName"] != node, "it is where it was");
    let done = run.completed_at.context("it ended")?.0;
    let began = began(scene, "settling-1").await?;
    // KubeVirt keeps whole seconds.
    ensure!(began.as_second() >= done.as_second(), "the dry run ended at {done}, the migration began at {began}");
    Ok(())
}

/// The manager had it tried out by itself before anybody wanted to move it: nothing is left to wait for.
pub(crate) async fn what_was_tried_out_before_is_not_held(scene: &Scene<'_>) -> Result<()> {
    // No migration stops its guest for less: it converges, and yet it would not do.
    let spec = json!({ "mode": "Enforce", "sla": { "downtime": "1ms" }, "dryRun": { "mode": "OnDoubt" } });
    scene.prediction_policy("policy", &json!({}), spec).await?;
    scene.vm("calm", Load::Calm).await?;
    scene.dry_run_that("calm", "was carried out", |run| run.phase == DryRunPhase::Done).await?;
    let known = async || {
        let (annotations, _) = scene.rehearsed("calm").await?;
        Ok((annotations[annotation::METHOD] == "DR").then_some(annotations))
    };
    let annotations = scene.until("admission to know of the dry run", SOON, known).await?;
    ensure!(annotations[annotation::VERDICT] == "Borderline", "{annotations}");
    let warning = scene.migrate("calm-1", "calm").await?.stderr;
    ensure!(warning.contains("migvisor forecasts after a dry run") && !warning.contains("It is held"), "{warning}");
    let phase = scene.ended("calm-1").await?;
    ensure!(phase == "Succeeded", "calm-1 ended as {phase}");
    ensure!(!scene.pods_of("calm-1").await?.iter().any(is_gated), "our gate is on a pod");
    for reason in ["MigrationHeld", "MigrationReleased"] {
        let told = scene.events(reason, VMIM, "calm-1").await?;
        ensure!(told.is_empty(), "{reason}: {told:?}");
    }
    Ok(())
}

/// It was let through while the policy only warned; by the time that its target pod is made it is to be denied.
pub(crate) async fn what_is_denied_by_now_is_abandoned(scene: &Scene<'_>) -> Result<()> {
    // No help, but asked about as soon as the policy enforces: so it is seen to be known.
    let remedies = json!([{ "type": "TimeBudget", "maxCompletionTimeoutPerGiB": 6 }]);
    scene.prediction_policy("policy", &json!({}), json!({ "mode": "Warn", "remedies": remedies })).await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let node = scene.vmi("wild").await?["status"]["nodeName"].as_str().context("it runs nowhere")?.to_owned();
    // Two that go nowhere take the places of their node.
    for blocker in ["blocker-1", "blocker-2"] {
        scene.vm_with(blocker, Load::Idle, &json!({}), Some(&node)).await?;
        scene.migrate_nowhere(blocker, blocker).await?;
        scene.reaches(blocker, &["Scheduling"], SOON).await?;
    }
    scene.migrate("wild-1", "wild").await?;
    let uid = scene.uid("wild-1").await?;
    scene.reaches("wild-1", &["Pending"], SOON).await?;
    scene.change_policy(&json!({ "mode": "Enforce" })).await?;
    scene.forecast_that("wild", "is asked about remedies", SOON, |it| !it.spec.remedies.is_empty()).await?;
    for blocker in ["blocker-1", "blocker-2"] {
        scene.kubectl(&["delete", "vmim", blocker, "-n", &scene.namespace, "--wait=false"]).await?;
    }
    scene.event("MigrationAbandoned", VMIM, "wild-1").await?;
    is_abandoned(scene, ("wild-1", &uid), "wild", "would fail").await
}

/// While it is held somebody gives it another bandwidth: it is not what was to be tried out, and KubeVirt hands on the new one.
pub(crate) async fn the_policy_changes_between_admission_and_hand_off(scene: &Scene<'_>) -> Result<()> {
    on_demand(scene, &json!({ "downtime": "1ms" })).await?;
    scene.vm("calm", Load::Calm).await?;
    scene.answered("calm", Verdict::Borderline).await?;
    scene.held("calm-1", "calm").await?;
    scene.change_migrations(&json!({ "bandwidthPerMigration": "96Mi", "completionTimeoutPerGiB": 7 })).await?;
    let asked = |it: &MigrationForecast| it.spec.bandwidth.rate().is_ok_and(|rate| rate.0 == 96 << 20);
    scene.forecast_that("calm", "is asked anew", SOON, asked).await?;
    scene.released("calm-1").await?;
    let phase = scene.ended("calm-1").await?;
    ensure!(phase == "Succeeded", "calm-1 ended as {phase}");
    let state = scene.vmi("calm").await?["status"]["migrationState"].clone();
    ensure!(state["migrationPolicyName"] == scene.own("scene"), "{state}");
    let configuration = &state["migrationConfiguration"];
    ensure!(configuration["bandwidthPerMigration"] == "96Mi", "{state}");
    ensure!(configuration["completionTimeoutPerGiB"] == 7, "{state}");
    Ok(())
}

/// The pod that holds hotplugged volumes on the target's side bears the migration's label, too; only the launcher is held.
pub(crate) async fn hotplug_attachment_pods_are_not_gated(scene: &Scene<'_>) -> Result<()> {
    on_demand(scene, &json!({ "downtime": "1ms" })).await?;
    scene.vm("calm", Load::Calm).await?;
    let plugged = json!([{ "name": "data", "hotplugVolume": {}, "phase": "Ready" }]);
    scene.patch("vmi", "calm", &json!({ "status": { "volumeStatus": plugged } })).await?;
    scene.answered("calm", Verdict::Borderline).await?;
    scene.held("calm-1", "calm").await?;
    // With hotplugged volumes KubeVirt waits there.
    scene.reaches("calm-1", &["Pending"], SOON).await?;
    scene.released("calm-1").await?;
    let attachment = async || {
        let component = |pod: &k8s_openapi::api::core::v1::Pod| pod.labels().get("kubevirt.io").cloned().unwrap_or_default();
        Ok(scene.pods_of("calm-1").await?.into_iter().find(|pod| component(pod) != "virt-launcher"))
    };
    let attachment = scene.until("the attachment pod", SOON, attachment).await?;
    ensure!(!is_gated(&attachment), "{:?}", attachment.spec);
    let phase = scene.ended("calm-1").await?;
    ensure!(phase == "Succeeded", "calm-1 ended as {phase}");
    let told = scene.times("MigrationHeld", VMIM, "calm-1").await?;
    ensure!(told == 1, "it was held {told} times");
    Ok(())
}

/// A policy that has what leaves a doubt tried out while it is held, under this SLA.
async fn on_demand(scene: &Scene<'_>, sla: &Value) -> Result<()> {
    let spec = json!({ "mode": "Enforce", "sla": sla, "dryRun": { "mode": "OnDemand" } });
    scene.prediction_policy("policy", &json!({}), spec).await
}

/// It is deleted, nothing was sent, and both objects are told why, once.
async fn is_abandoned(scene: &Scene<'_>, (name, uid): (&str, &str), vm: &str, why: &str) -> Result<()> {
    let gone = async || {
        let vmim = scene.vmim(name).await?;
        // KubeVirt's finalizer keeps it until it has cleared up.
        Ok(vmim.is_none_or(|vmim| vmim.metadata.deletion_timestamp.is_some()).then_some(()))
    };
    scene.until(&format!("{name} to be deleted"), SOON, gone).await?;
    for (kind, name) in [(VMIM, name), (VMI, vm)] {
        let (note, severity) = scene.event("MigrationAbandoned", kind, name).await?;
        ensure!(severity == "Warning" && note.contains(why) && note.contains("Ways out"), "{severity}: {note}");
    }
    // Whatever else there is to tell, it is told by then.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (kind, name) in [(VMIM, name), (VMI, vm)] {
        let times = scene.times("MigrationAbandoned", kind, name).await?;
        ensure!(times == 1, "{kind} {name} is told {times} times");
    }
    let state = scene.vmi(vm).await?["status"]["migrationState"].clone();
    ensure!(state["migrationUid"] != uid, "it was handed on: {state}");
    Ok(())
}

/// When KubeVirt began to move the guest.
async fn began(scene: &Scene<'_>, name: &str) -> Result<Timestamp> {
    let vmim = scene.vmim(name).await?.context("it is gone")?;
    let began = vmim.data.pointer("/status/migrationState/startTimestamp").and_then(Value::as_str);
    Ok(began.context("it never began")?.parse()?)
}
