//! Where MigVisor knows nothing, or has nothing to say: everybody goes on as without it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migvisor::{
    api::names::{annotation, reason},
    model::forecast::Verdict,
};
use migvisor_e2e::scenario::{Load, Scene, reason_of};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);

/// Nobody looks at the VM: its migration is let through, and says so.
pub(crate) async fn no_agent_hinders_nobody(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    let node = scene.cluster.node_without_agent()?;
    scene.vm_with("lonely", Load::Idle, &json!({}), Some(&node)).await?;
    let own = scene.own("policy");
    scene
        .forecast_that("lonely", "is asked under the policy", SOON, |it| it.spec.policy.as_deref() == Some(own.as_str()))
        .await?;
    for vm in ["lonely", "lonely"] {
        let (annotations, _) = scene.rehearsed(vm).await?;
        ensure!(annotations[annotation::VERDICT] == "Unknown", "{annotations}");
        ensure!(reason_of(&annotations) == reason::NO_ANSWER, "{annotations}");
        ensure!(annotations.get(annotation::PROBABILITY).is_none(), "{annotations}");
    }
    scene.migrate("lonely-1", "lonely").await?;
    let vmim = scene.vmim("lonely-1").await?.context("it is not there")?;
    let verdict = vmim.metadata.annotations.as_ref().and_then(|all| all.get(annotation::VERDICT));
    ensure!(verdict.is_some_and(|it| it == "Unknown"), "{:?}", vmim.metadata.annotations);
    ensure!(scene.ended("lonely-1").await? == "Succeeded", "it did not migrate");
    Ok(())
}

/// What a block migration sends is not guest memory alone: no forecast, no refusal.
pub(crate) async fn block_migration_is_untouched(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    scene.patch("vmi", "wild", &json!({ "status": { "migrationMethod": "BlockMigration" } })).await?;
    let annotations = scene.rehearses("wild", "Unknown", false).await?;
    ensure!(reason_of(&annotations) == reason::OUTSIDE_MODEL, "{annotations}");
    scene.migrate("wild-1", "wild").await?;
    scene.reaches("wild-1", &["Running"], SOON).await?;
    Ok(())
}

/// A migration to another cluster is not judged; one from there is not even looked at.
pub(crate) async fn send_to_and_receive_are_untouched(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let with = |field: &str, value: serde_json::Value| {
        let mut manifest = scene.migration("rehearsal", "wild", &json!({}));
        manifest["spec"][field] = value;
        manifest
    };
    for manifest in [
        with("sendTo", json!({ "migrationID": "m", "connectURL": "elsewhere:9185" })),
        with("receive", json!({ "migrationID": "m" })),
    ] {
        let output = scene.rehearse(&manifest).await?;
        ensure!(!output.stderr.contains("Warning: migvisor"), "{}", output.stderr);
        let object: serde_json::Value = serde_json::from_str(&output.ok()?)?;
        let annotations = &object["metadata"]["annotations"];
        let sends = !object["spec"]["sendTo"].is_null();
        let right = if sends {
            annotations[annotation::VERDICT] == "Unknown"
        } else {
            annotations.get(annotation::PROBABILITY).is_none()
        };
        ensure!(right, "{object}");
    }
    Ok(())
}
