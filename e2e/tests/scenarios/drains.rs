//! Migrations that nobody asked for by name: drains and workload updates. They are told, and never refused by surprise.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::{ResourceExt, api::DynamicObject};
use migvisor::{api::names::annotation, model::forecast::Verdict};
use migvisor_e2e::scenario::{Load, Scene};
use serde_json::json;

/// `kubectl drain` of a node with a VM that no pre-copy can move ends, where KubeVirt is told to get it through.
pub(crate) async fn a_node_with_a_wild_vm_is_evacuated(scene: &Scene<'_>) -> Result<()> {
    const DRAIN: Duration = Duration::from_secs(180);
    scene.policy("Enforce").await?;
    scene.change_migrations(&json!({ "allowWorkloadDisruption": true })).await?;
    for (vm, load) in [("calm", Load::Calm), ("wild", Load::Wild)] {
        scene.vm(vm, load).await?;
    }
    scene.answered("calm", Verdict::Converges).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let node = scene.vmi("wild").await?["status"]["nodeName"].as_str().context("it runs nowhere")?.to_owned();
    scene.at_the_end(&["uncordon", &node]);
    let drain =
        ["drain", &node, "--pod-selector=kubevirt.io=virt-launcher", "--delete-emptydir-data", "--force", "--timeout=170s"];
    let drained = scene.cluster.kubectl().run_within(DRAIN, &drain, "").await?;
    let words = format!("Eviction triggered evacuation of VMI \"{}/wild\"", scene.namespace);
    ensure!(drained.stderr.contains(&words) || drained.stdout.contains(&words), "{drained:?}");
    drained.ok()?;
    for vm in ["calm", "wild"] {
        let now = scene.vmi(vm).await?["status"]["nodeName"].clone();
        ensure!(now != json!(node), "{vm} is still there");
    }
    let made = one(scene, "wild", "kubevirt-evacuation-").await?;
    warned_of(scene, &made).await
}

/// A VM whose launcher is outdated is migrated by KubeVirt itself: let through, and told.
pub(crate) async fn a_workload_update_is_let_through(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    scene.patch("vmi", "wild", &json!({ "status": { "launcherContainerImageVersion": "virt-launcher:0.0.1" } })).await?;
    let made = one(scene, "wild", "kubevirt-workload-update-").await?;
    warned_of(scene, &made).await
}

/// Waits for the migration of this VM that KubeVirt makes.
async fn one(scene: &Scene<'_>, vm: &str, prefix: &str) -> Result<DynamicObject> {
    let of_vm = |it: &DynamicObject| it.data["spec"]["vmiName"] == vm && it.name_any().starts_with(prefix);
    let probe = async || Ok(scene.vmims().await?.into_iter().find(of_vm));
    scene.until(&format!("a migration {prefix}… of {vm}"), Duration::from_secs(60), probe).await
}

async fn warned_of(scene: &Scene<'_>, vmim: &DynamicObject) -> Result<()> {
    let annotations = vmim.annotations();
    ensure!(annotations.get(annotation::VERDICT).is_some_and(|it| it == "Fails"), "{annotations:?}");
    let (note, kind) = scene.event("MigrationForecast", "VirtualMachineInstanceMigration", &vmim.name_any()).await?;
    ensure!(kind == "Warning" && note.contains("would fail"), "{kind}: {note}");
    Ok(())
}
