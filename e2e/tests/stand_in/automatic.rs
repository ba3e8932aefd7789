//! Migrations that KubeVirt makes by itself: evacuations, again and again, and workload updates.

use std::time::Duration;

use kube::ResourceExt;
use migvisor_e2e::kubevirt::{objects::create_kubevirt, vmim_manifest};
use serde_json::json;

use super::scene::{NODE, Scene};

#[tokio::test]
async fn a_refused_evacuation_is_tried_again_and_a_touch_tries_at_once() {
    let scene = Scene::open("storm", Duration::from_secs(1)).await;
    scene.vmi("vm1").await;
    let binding = scene.refuse_migrations().await;
    scene.patch_vmi("vm1", json!({ "status": { "evacuationNodeName": NODE } })).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (count, note) = scene.events("FailedCreate", "vm1").await;
    // 5 ms · (1 + 2 + 4 + …) of waiting: ten tries take 2.6 s, eleven 5.1 s; whatever happens to its node is one more.
    assert!((8..=14).contains(&count), "{count} tries in 3 s");
    assert!(note.starts_with("Error creating a Migration: ") && note.contains("it would never end"), "{note}");

    // By now it waits for seconds; a change of the VMI has it look at once.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let (before, _) = scene.events("FailedCreate", "vm1").await;
    scene.patch_vmi("vm1", json!({ "metadata": { "annotations": { "touched": "1" } } })).await;
    let touched = std::time::Instant::now();
    let more = async || Some(scene.events("FailedCreate", "vm1").await.0).filter(|count| *count > before);
    scene.until("another try", more).await;
    assert!(touched.elapsed() < Duration::from_secs(2), "{:?}", touched.elapsed());

    let args = ["delete", "validatingadmissionpolicybinding", &binding];
    scene.plane.kubectl(&args, "").await.unwrap().ok().unwrap();
    let trial = vmim_manifest(&scene.namespace, "trial", "vm1");
    scene.tried(&trial, |output| output.success || output.stderr.contains("in-flight")).await;
    scene.patch_vmi("vm1", json!({ "metadata": { "annotations": { "touched": "2" } } })).await;
    let made = scene.until("a migration", async || scene.vmims().await.into_iter().next()).await;
    assert_eq!(made.annotations()["kubevirt.io/evacuationMigration"], NODE);
    assert_eq!(made.data["spec"]["priority"], "system-critical");
    scene.reaches(&made.name_any(), "Succeeded").await;
    assert_ne!(scene.get_vmi("vm1").await["status"]["nodeName"], NODE);
}

#[tokio::test]
async fn a_failed_evacuation_is_made_again_and_waits() {
    let scene = Scene::open("backoff", Duration::from_secs(600)).await;
    scene.policy(&format!("short-{}", scene.namespace), json!({}), json!({ "completionTimeoutPerGiB": 1 })).await;
    scene.vmi("vm1").await;
    scene.patch_vmi("vm1", json!({ "status": { "evacuationNodeName": NODE } })).await;
    let second = async || Some(scene.vmims().await).filter(|all| all.len() == 2);
    let all = scene.until("a second migration, after the first has failed", second).await;
    let phase = |it: &kube::api::DynamicObject| it.data["status"]["phase"].as_str().unwrap_or_default().to_owned();
    let waiting = all.iter().find(|it| phase(it) != "Failed").unwrap().name_any();
    scene.reaches(&waiting, "Pending").await;
    scene.until("the event", async || (scene.events("MigrationBackoff", "vm1").await.0 > 0).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(scene.get_vmim(&waiting).await.unwrap()["status"]["phase"], "Pending", "20 s after the first failure");

    // A person's does not wait.
    scene.patch_vmi("vm1", json!({ "status": { "evacuationNodeName": null } })).await;
    scene.delete_vmim(&waiting).await;
    scene.vanishes(&waiting).await;
    scene.migrate("by-hand", "vm1").await;
    scene.reaches("by-hand", "Running").await;
}

#[tokio::test]
async fn an_outdated_launcher_is_migrated() {
    let scene = Scene::open("outdated", Duration::from_millis(100)).await;
    create_kubevirt(&scene.client, json!({})).await.unwrap();
    scene.vmi("vm1").await;
    scene.patch_vmi("vm1", json!({ "status": { "launcherContainerImageVersion": "virt-launcher:1.8.0" } })).await;
    let made = scene.until("a migration", async || scene.vmims().await.into_iter().next()).await;
    assert!(made.name_any().starts_with("kubevirt-workload-update-"));
    assert_eq!(made.annotations()["kubevirt.io/workloadUpdateMigration"], "");
    scene.reaches(&made.name_any(), "Succeeded").await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(scene.vmims().await.len(), 1, "once is enough");
}
