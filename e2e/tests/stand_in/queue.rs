//! Parallel limits, who is next, and how long a pod may wait.

use std::time::Duration;

use migvisor_e2e::kubevirt::{CONTROLLER, objects, objects::vmim_manifest};
use serde_json::json;

use super::scene::Scene;

#[tokio::test]
async fn at_most_two_leave_a_node_at_a_time_and_held_ones_count() {
    let mut scene = Scene::open("queue", Duration::from_secs(1)).await;
    scene.gate_target_pods().await;
    for vm in ["vm1", "vm2", "vm3"] {
        scene.vmi(vm).await;
        scene.migrate(vm, vm).await;
    }
    // Two are held by their gates; the third has no place.
    let phase = async |vm: &str| scene.get_vmim(vm).await.unwrap()["status"]["phase"].as_str().unwrap_or_default().to_owned();
    let all = async || [phase("vm1").await, phase("vm2").await, phase("vm3").await];
    let two = async || Some(all().await).filter(|all| all.iter().filter(|it| *it == "Scheduling").count() == 2);
    scene.until("two to be held", two).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    let now = all().await;
    assert_eq!(now.iter().filter(|it| *it == "Pending").count(), 1, "{now:?}");
    assert!(scene.jobs.try_recv().is_err());

    // A held one that is cancelled makes room.
    let (waiting, held) =
        (now.iter().position(|it| it == "Pending").unwrap(), now.iter().position(|it| it == "Scheduling").unwrap());
    let (waiting, held) = (["vm1", "vm2", "vm3"][waiting], ["vm1", "vm2", "vm3"][held]);
    assert_eq!(
        scene.get_vmim(waiting).await.unwrap()["status"]["migrationState"]["sourcePod"],
        format!("virt-launcher-{waiting}")
    );
    scene.delete_vmim(held).await;
    scene.reaches(waiting, "Scheduling").await;
}

#[tokio::test]
async fn the_more_important_goes_first() {
    let mut scene = Scene::open("priority", Duration::from_secs(4)).await;
    let controller = scene.plane.client_as(CONTROLLER).unwrap();
    let vmims = objects::vmims(&controller, &scene.namespace);
    for (vm, priority) in
        [("vm1", None), ("vm2", None), ("vm3", None), ("vm4", Some("system-maintenance")), ("vm5", Some("system-critical"))]
    {
        scene.vmi(vm).await;
        let mut manifest = vmim_manifest(&scene.namespace, vm, vm);
        manifest["spec"]["priority"] = json!(priority);
        let manifest = serde_json::from_value(manifest).unwrap();
        vmims.create(&kube::api::PostParams::default(), &manifest).await.unwrap();
    }
    let mut order = Vec::new();
    for _ in 0..5 {
        order.push(scene.jobs.recv().await.unwrap().vmi);
    }
    // The first two went at once; of the others the critical one asks every second, the rest every 5.
    assert_eq!(order[2], "vm5", "{order:?}");
}

#[tokio::test]
async fn a_pod_that_fits_nowhere_is_given_up_and_a_gated_one_is_not_unschedulable() {
    let scene = Scene::open("timeouts", Duration::from_millis(100)).await;
    let manifest = |name: &str, annotation: &str| {
        let mut manifest = vmim_manifest(&scene.namespace, name, name);
        manifest["spec"]["addedNodeSelector"] = json!({ "nobody": "has-this" });
        manifest["metadata"]["annotations"] = json!({ format!("kubevirt.io/{annotation}"): "3" });
        manifest.to_string()
    };
    scene.vmi("vm1").await;
    scene.plane.accepts(&manifest("vm1", "migrationUnschedulablePodTimeoutSeconds")).await.unwrap();
    let failed = scene.reaches("vm1", "Failed").await;
    let (_, note) = scene.events("SuccessfulDelete", "vm1").await;
    assert!(note.contains("unschedulable pod") && note.contains("timeout period exceeded"), "{note}");
    assert!(scene.target_pod(&failed).await.is_none());
    assert!(scene.events("migrationTargetPodUnschedulable", "vm1").await.0 > 0);

    scene.gate_target_pods().await;
    scene.vmi("vm2").await;
    scene.plane.accepts(&manifest("vm2", "migrationUnschedulablePodTimeoutSeconds")).await.unwrap();
    scene.reaches("vm2", "Scheduling").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(scene.get_vmim("vm2").await.unwrap()["status"]["phase"], "Scheduling", "a gate is no fault");
    scene.vmi("vm3").await;
    scene.plane.accepts(&manifest("vm3", "migrationPendingPodTimeoutSeconds")).await.unwrap();
    scene.reaches("vm3", "Failed").await;
}
