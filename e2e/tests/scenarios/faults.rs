//! What goes away in the middle.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};
use migvisor::{
    api::{
        MigrationForecast,
        dry_run::{DryRunPhase, DryRunStatus},
    },
    model::forecast::Verdict,
};
use migvisor_e2e::{
    kubevirt::objects,
    scenario::{Load, Scene, VMIM},
};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
/// In the order in which they come.
const PHASES: [&str; 8] =
    ["Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running", "Succeeded", "Failed"];

/// In whatever phase its migration is: a VMI that is deleted leaves nothing behind, no pod, no migration, no forecast.
pub(crate) async fn a_vmi_deleted_in_every_phase(scene: &Scene<'_>) -> Result<()> {
    let client = scene.cluster.client()?;
    let (vms, migrations) = (objects::vmis(&client, &scene.namespace), objects::vmims(&client, &scene.namespace));
    let pods: Api<Pod> = Api::namespaced(client, &scene.namespace);
    let forecasts = scene.forecasts()?;
    for (at, phase) in PHASES.iter().enumerate().take(7) {
        let vm = format!("vm-{}", phase.to_lowercase());
        scene.vm(&vm, Load::Idle).await?;
        scene.forecast_that(&vm, "is asked", SOON, |_| true).await?;
        match *phase {
            "Pending" => {
                // Two that go nowhere take the places of their node.
                for blocker in ["blocker-1", "blocker-2"] {
                    scene.vm(blocker, Load::Idle).await?;
                    scene.migrate_nowhere(blocker, blocker).await?;
                    scene.reaches(blocker, &["Scheduling"], SOON).await?;
                }
                scene.migrate(&vm, &vm).await?;
            }
            "Scheduling" => scene.migrate_nowhere(&vm, &vm).await?,
            _ => drop(scene.migrate(&vm, &vm).await?),
        }
        // Phases are short: a later one counts, and is told.
        let seen = scene.reaches(&vm, &PHASES[at..], SOON).await?;
        vms.delete_collection(&DeleteParams::default(), &ListParams::default()).await.context("cannot delete the VMIs")?;
        println!("deleted in {seen} (wanted: {phase})");
        let gone = async || {
            let all = ListParams::default();
            let left = vms.list(&all).await?.items.len()
                + migrations.list(&all).await?.items.len()
                + forecasts.list(&all).await?.items.len()
                + pods.list(&all).await?.items.len();
            Ok((left == 0).then_some(()))
        };
        scene.until(&format!("everything of {vm} to go"), SOON, gone).await?;
    }
    Ok(())
}

/// While a migration is under way the API server is away for a while: the migration ends, its outcome is recorded, everybody goes on.
pub(crate) async fn the_api_server_is_restarted_in_between(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("calm", Load::Calm).await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("calm", Verdict::Converges).await?;
    scene.answered("wild", Verdict::Fails).await?;
    scene.migrate("calm-1", "calm").await?;
    scene.reaches("calm-1", &["Running"], SOON).await?;
    scene.cluster.restart_api_server(Duration::from_secs(5)).await?;
    ensure!(scene.ended("calm-1").await? == "Succeeded", "calm-1 did not migrate");
    let has_outcome = |it: &MigrationForecast| it.status.as_ref().is_some_and(|status| status.outcome.is_some());
    scene.forecast_that("calm", "has its outcome", SOON, has_outcome).await?;
    // What was known is known; what is new is asked and answered.
    let manifest = scene.migration("wild-1", "wild", &json!({})).to_string();
    scene.cluster.kubectl().rejects(&manifest, "denied the request: migvisor forecasts").await?;
    scene.vm("later", Load::Calm).await?;
    scene.answered("later", Verdict::Converges).await.map(drop)
}

/// The controller dies while it holds a migration: whoever leads next finds the gate and takes it off.
pub(crate) async fn the_controller_dies_while_a_gate_is_on(scene: &Scene<'_>) -> Result<()> {
    doubted(scene, "calm").await?;
    let before = scene.leader().await?;
    scene.held("calm-1", "calm").await?;
    scene.cluster.kill_controller().await?;
    // The next one leads 15 s later, and the agent, which had given the dry run up, begins anew.
    let told = async || Ok(scene.events("MigrationReleased", VMIM, "calm-1").await?.into_iter().next());
    scene.until("the next leader to let it go", Duration::from_secs(90), told).await?;
    scene.released("calm-1").await?;
    let after = scene.leader().await?;
    ensure!(before != after, "{before} was killed, and let it go");
    ensure!(scene.ended("calm-1").await? == "Succeeded", "calm-1 did not migrate");
    Ok(())
}

/// The agent dies in the middle of a dry run: the next one puts QEMU's settings back and begins anew, and the migration that waits for
/// it goes its way.
pub(crate) async fn the_agent_dies_in_a_dry_run(scene: &Scene<'_>) -> Result<()> {
    doubted(scene, "calm").await?;
    let node = scene.vmi("calm").await?["status"]["nodeName"].as_str().context("it runs nowhere")?.to_owned();
    scene.held("calm-1", "calm").await?;
    let on_its_way = |run: &DryRunStatus| run.phase == DryRunPhase::Running && run.iteration.is_some_and(|it| it > 0);
    let first = scene.dry_run_that("calm", "is on its way", on_its_way).await?;
    scene.cluster.kill_agent(&node).await?;
    let again = |run: &DryRunStatus| run.id == first.id && run.phase == DryRunPhase::Done;
    let second = scene.dry_run_that("calm", "was carried out by the next agent", again).await?;
    let started = |run: &DryRunStatus| run.started_at.as_ref().map(|time| time.0);
    ensure!(started(&second) > started(&first), "it was not begun anew: {first:?}, {second:?}");
    scene.released("calm-1").await?;
    ensure!(scene.ended("calm-1").await? == "Succeeded", "calm-1 did not migrate");
    let abandoned = scene.events("MigrationAbandoned", VMIM, "calm-1").await?;
    ensure!(abandoned.is_empty(), "{abandoned:?}");
    Ok(())
}

/// A VM whose migration would be held for a dry run of some seconds: it converges, and yet no migration stops its guest for so little.
async fn doubted(scene: &Scene<'_>, vm: &str) -> Result<()> {
    scene.change_migrations(&json!({ "bandwidthPerMigration": "40Mi", "completionTimeoutPerGiB": 20 })).await?;
    let spec = json!({ "mode": "Enforce", "sla": { "downtime": "1ms" }, "dryRun": { "mode": "OnDemand" } });
    scene.prediction_policy("policy", &json!({}), spec).await?;
    scene.vm(vm, Load::Calm).await?;
    scene.answered(vm, Verdict::Borderline).await.map(drop)
}
