//! Migrations that are forced: a remedy that the policy allows is applied to one migration alone, by a MigrationPolicy of its own,
//! and taken back as soon as KubeVirt has read it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migvisor::{
    api::{
        names::{FORCE_LABEL, FORCE_PREFIX, annotation},
        scalar::Quantity,
    },
    model::forecast::Verdict,
};
use migvisor_e2e::scenario::{Load, Scene, VMI, VMIM};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// A look, and a dry run to the end of its budget.
const TRIED: Duration = Duration::from_secs(240);

/// It only needs longer than it would be given.
pub(crate) async fn what_its_dry_run_fails_is_forced_by_budget(scene: &Scene<'_>) -> Result<()> {
    scene.change_migrations(&json!({ "bandwidthPerMigration": "48Mi", "completionTimeoutPerGiB": 1 })).await?;
    scene.vm("calm", Load::Calm).await?;
    let configuration = tried_out_and_forced(scene, "calm", &longer()).await?;
    let budget = configuration["completionTimeoutPerGiB"].as_u64().context("no budget")?;
    ensure!((2..=60).contains(&budget), "{configuration}");
    ensure!(configuration["bandwidthPerMigration"] == "48Mi", "what is not changed is taken over: {configuration}");
    Ok(())
}

/// It needs more of the line than a person has capped it to, and the policy lets it have that.
pub(crate) async fn what_its_dry_run_fails_is_forced_by_bandwidth(scene: &Scene<'_>) -> Result<()> {
    scene.change_migrations(&json!({ "bandwidthPerMigration": "32Mi" })).await?;
    scene.vm("steady", Load::Steady).await?;
    let remedy = json!({ "type": "Bandwidth", "maxBandwidth": "1Gi", "aboveCap": true });
    let configuration = tried_out_and_forced(scene, "steady", &remedy).await?;
    let rate: Quantity = serde_json::from_value(configuration["bandwidthPerMigration"].clone())?;
    let rate = rate.rate()?.0;
    ensure!(32 << 20 < rate && rate <= 1 << 30, "{configuration}");
    ensure!(configuration["completionTimeoutPerGiB"] == 5, "what is not changed is taken over: {configuration}");
    Ok(())
}

/// It needs a guest that writes less.
pub(crate) async fn what_its_dry_run_fails_is_forced_by_auto_converge(scene: &Scene<'_>) -> Result<()> {
    // Half of what it writes, so that it does not converge because it is slower while it is copied; some steps of QEMU's ramp are enough.
    scene.change_migrations(&json!({ "bandwidthPerMigration": "40Mi", "completionTimeoutPerGiB": 20 })).await?;
    scene.vm("busy", Load::Busy).await?;
    let configuration = tried_out_and_forced(scene, "busy", &json!({ "type": "AutoConverge" })).await?;
    ensure!(configuration["allowAutoConverge"] == true, "{configuration}");
    ensure!(configuration["bandwidthPerMigration"] == "40Mi", "what is not changed is taken over: {configuration}");
    Ok(())
}

/// However many labels a person's policy picks the VM by, the migration goes by ours, which takes that one's fields over.
pub(crate) async fn force_outscores_a_persons_policy(scene: &Scene<'_>) -> Result<()> {
    let labels = |count: usize| -> Value {
        let all = (1..=count).map(|at| (format!("e2e.migvisor.io/label-{at}"), json!("on")));
        Value::Object(all.collect())
    };
    scene.kubectl(&["label", "namespace", &scene.namespace, "e2e.migvisor.io/team=a", "e2e.migvisor.io/zone=b"]).await?;
    let spec = json!({ "mode": "Enforce", "remedies": [longer()], "hold": { "atOnce": 8 } });
    scene.prediction_policy("policy", &json!({}), spec).await?;
    let cases = [("one", 1, "60Mi"), ("two", 2, "56Mi"), ("five", 5, "52Mi")];
    for (name, count, bandwidth) in cases {
        let short = json!({ "bandwidthPerMigration": bandwidth, "completionTimeoutPerGiB": 1 });
        scene.migration_policy(name, &labels(count), short).await?;
    }
    // And by as many labels of the namespace as there are.
    let theirs = json!({ "spec": { "selectors": { "namespaceSelector": {
        "e2e.migvisor.io/team": "a", "e2e.migvisor.io/zone": "b"
    } } } });
    let five = scene.own("five");
    scene.kubectl(&["patch", "migrationpolicy", &five, "--type=merge", "-p", &theirs.to_string()]).await?;
    for (name, count, _) in cases {
        scene.vm_with(name, Load::Calm, &labels(count), None).await?;
    }
    for (name, ..) in cases {
        is_known_to_be_forced(scene, name, "PC").await?;
    }
    for (name, ..) in cases {
        is_told(&scene.migrate(name, name).await?.stderr)?;
    }
    for (name, _, bandwidth) in cases {
        let configuration = went_by_ours(scene, name, name).await?;
        ensure!(configuration["bandwidthPerMigration"] == bandwidth, "{name}: {configuration}");
        let budget = configuration["completionTimeoutPerGiB"].as_u64();
        ensure!(budget.is_some_and(|budget| budget > 1), "{name}: {configuration}");
    }
    Ok(())
}

/// The controller that applied the remedy dies before it has cleared up: the next one does.
pub(crate) async fn what_forced_a_migration_goes_when_the_controller_died(scene: &Scene<'_>) -> Result<()> {
    scene.change_migrations(&json!({ "completionTimeoutPerGiB": 1 })).await?;
    scene.prediction_policy("policy", &json!({}), json!({ "mode": "Enforce", "remedies": [longer()] })).await?;
    scene.vm("calm", Load::Calm).await?;
    is_known_to_be_forced(scene, "calm", "PC").await?;
    let before = scene.leader().await?;
    is_told(&scene.migrate("calm-1", "calm").await?.stderr)?;
    let uid = scene.uid("calm-1").await?;
    let applied = async || Ok(force_label(scene, "calm").await?.filter(|label| *label == uid).map(drop));
    scene.until("the remedy to be applied", SOON, applied).await?;
    scene.cluster.kill_controller().await?;
    let phase = scene.ended("calm-1").await?;
    ensure!(phase == "Succeeded", "calm-1 ended as {phase}");
    let state = scene.vmi("calm").await?["status"]["migrationState"].clone();
    ensure!(state["migrationPolicyName"] == format!("{FORCE_PREFIX}{uid}"), "{state}");
    nothing_is_left(scene, &uid, "calm").await?;
    let after = scene.leader().await?;
    ensure!(before != after, "{before} has cleared up");
    Ok(())
}

fn longer() -> Value {
    json!({ "type": "TimeBudget", "maxCompletionTimeoutPerGiB": 60 })
}

/// A dry run in the background says that the VM's migration would fail; it is forced by this remedy, and moves. Returns the
/// configuration that KubeVirt ran it under.
async fn tried_out_and_forced(scene: &Scene<'_>, vm: &str, remedy: &Value) -> Result<Value> {
    let spec = json!({ "mode": "Enforce", "dryRun": { "mode": "OnDoubt" }, "remedies": [remedy] });
    scene.prediction_policy("policy", &json!({}), spec).await?;
    scene.answered(vm, Verdict::Fails).await?;
    is_known_to_be_forced(scene, vm, "DR").await?;
    let name = format!("{vm}-1");
    is_told(&scene.migrate(&name, vm).await?.stderr)?;
    went_by_ours(scene, &name, vm).await
}

/// Waits until admission would have a migration of this VM forced, by a forecast of this method.
async fn is_known_to_be_forced(scene: &Scene<'_>, vm: &str, method: &str) -> Result<()> {
    let known = async || {
        let (annotations, warnings) = scene.rehearsed(vm).await?;
        let fails = annotations[annotation::VERDICT] == "Fails" && annotations[annotation::METHOD] == method;
        Ok((fails && is_told(&warnings).is_ok()).then_some(()))
    };
    scene.until(&format!("admission to force {vm} by a forecast of {method}"), TRIED, known).await
}

fn is_told(warning: &str) -> Result<()> {
    ensure!(warning.contains("It is forced: this migration alone gets "), "it is not said that it is forced: {warning}");
    Ok(())
}

/// KubeVirt runs it under our policy, it moves, and nothing of that is left. Returns the configuration.
async fn went_by_ours(scene: &Scene<'_>, name: &str, vm: &str) -> Result<Value> {
    let (note, severity) = scene.event("MigrationForced", VMIM, name).await?;
    ensure!(severity == "Normal" && is_told(&note).is_ok(), "{severity}: {note}");
    let uid = scene.uid(name).await?;
    let phase = scene.ended(name).await?;
    let state = scene.vmi(vm).await?["status"]["migrationState"].clone();
    ensure!(phase == "Succeeded", "{name} ended as {phase}: {state}");
    ensure!(state["migrationUid"] == uid, "{state}");
    ensure!(state["migrationPolicyName"] == format!("{FORCE_PREFIX}{uid}"), "{state}");
    nothing_is_left(scene, &uid, vm).await?;
    let failed = scene.events("MigrationForceFailed", VMIM, name).await?;
    ensure!(failed.is_empty(), "{failed:?}");
    let abandoned = scene.events("MigrationAbandoned", VMI, vm).await?;
    ensure!(abandoned.is_empty(), "{abandoned:?}");
    Ok(state["migrationConfiguration"].clone())
}

/// Waits until neither our policy nor our label is there any more.
async fn nothing_is_left(scene: &Scene<'_>, uid: &str, vm: &str) -> Result<()> {
    let policy = format!("{FORCE_PREFIX}{uid}");
    let gone = async || {
        let found = scene.kubectl(&["get", "migrationpolicy", &policy, "--ignore-not-found", "-o", "name"]).await?;
        Ok((found.trim().is_empty() && force_label(scene, vm).await?.is_none()).then_some(()))
    };
    scene.until(&format!("the policy {policy} and the label of {vm} to go"), SOON, gone).await
}

async fn force_label(scene: &Scene<'_>, vm: &str) -> Result<Option<String>> {
    Ok(scene.vmi(vm).await?["metadata"]["labels"][FORCE_LABEL].as_str().map(str::to_owned))
}
