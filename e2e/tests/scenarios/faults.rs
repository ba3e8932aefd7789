//! What goes away in the middle.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};
use migvisor::{api::MigrationForecast, model::forecast::Verdict};
use migvisor_e2e::{
    kubevirt::objects,
    scenario::{Load, Scene},
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
