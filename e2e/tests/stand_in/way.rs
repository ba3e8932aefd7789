//! The way of one migration: its phases, what is read at hand-over, and deletion in each of them.

use std::time::Duration;

use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use migvisor::model::units::{Bandwidth, BytesPerSecond};
use migvisor_e2e::kubevirt::objects::{self, vmim_manifest};
use serde_json::{Value, json};

use super::scene::Scene;

fn phases(vmim: &Value) -> Vec<&str> {
    let entered = vmim["status"]["phaseTransitionTimestamps"].as_array().unwrap();
    entered.iter().map(|entry| entry["phase"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_migration_walks_through_all_its_phases() {
    let mut scene = Scene::open("walk", Duration::from_secs(1)).await;
    let source = scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    scene.reaches("m1", "Running").await;
    let again = vmim_manifest(&scene.namespace, "m2", "vm1").to_string();
    scene.plane.rejects(&again, "in-flight migration detected. Active migration job").await.unwrap();
    scene.reaches("m1", "Succeeded").await;
    let kept = async || scene.get_vmim("m1").await.filter(|vmim| vmim["metadata"]["finalizers"].is_null());
    let done = scene.until("m1 to be let go", kept).await;

    assert_eq!(phases(&done), ["Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running", "Succeeded"]);
    assert_eq!(done["metadata"]["labels"]["kubevirt.io/vmi-name"], "vm1");
    let told = scene.jobs.recv().await.unwrap();
    assert_eq!((told.vmi.as_str(), &told.source), ("vm1", &source));
    assert_ne!(told.target.node, source.node);
    assert_eq!((told.bandwidth, told.budget), (Bandwidth::Unlimited, Some(Duration::from_secs(300))));

    let vmi = scene.get_vmi("vm1").await;
    assert_eq!(vmi["status"]["nodeName"], told.target.node);
    assert_eq!(vmi["metadata"]["labels"]["kubevirt.io/nodeName"], told.target.node);
    assert_eq!(vmi["status"]["activePods"], json!({ told.target.pod_uid.as_str(): told.target.node }));
    let state = &vmi["status"]["migrationState"];
    assert_eq!(state, &done["status"]["migrationState"], "the VMIM keeps a copy");
    assert_eq!((&state["completed"], &state["migrationUid"]), (&json!(true), &done["metadata"]["uid"]));
    assert!(state["startTimestamp"].is_string() && state["endTimestamp"].is_string() && state["failed"].is_null());

    // Of what has ended, KubeVirt keeps five.
    for round in 2..8 {
        scene.migrate(&format!("m{round}"), "vm1").await;
        scene.reaches(&format!("m{round}"), "Succeeded").await;
    }
    scene.vanishes("m2").await;
    assert!(scene.get_vmim("m3").await.is_some());
}

#[tokio::test]
async fn a_gated_target_pod_holds_it_and_a_policy_posted_meanwhile_wins() {
    let mut scene = Scene::open("held", Duration::from_millis(100)).await;
    scene.gate_target_pods().await;
    scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    let held = scene.reaches("m1", "Scheduling").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(scene.get_vmim("m1").await.unwrap()["status"]["phase"], "Scheduling", "it does not go on by itself");
    let pod = scene.target_pod(&held).await.unwrap();
    assert_eq!(pod.spec.as_ref().unwrap().node_name, None);
    let conditions = pod.status.as_ref().unwrap().conditions.clone().unwrap();
    assert_eq!(conditions[0].reason.as_deref(), Some("SchedulingGated"));

    // Held: a policy for this VMI alone, more specific than a person's.
    let (person, ours) = (format!("person-{}", scene.namespace), format!("ours-{}", scene.namespace));
    let fields = |bandwidth| json!({ "bandwidthPerMigration": bandwidth, "completionTimeoutPerGiB": 7 });
    scene.policy(&person, json!({}), fields("64Mi")).await;
    scene.policy(&ours, json!({ "migvisor.io/forced": "m1" }), fields("32Mi")).await;
    scene.patch_vmi("vm1", json!({ "metadata": { "labels": { "migvisor.io/forced": "m1" } } })).await;
    let release = Patch::Merge(json!({ "spec": { "schedulingGates": null } }));
    scene.pods().patch(&pod.name_any(), &PatchParams::default(), &release).await.unwrap();

    scene.reaches("m1", "Succeeded").await;
    let state = scene.get_vmi("vm1").await["status"]["migrationState"].clone();
    assert_eq!(state["migrationPolicyName"], ours);
    assert_eq!(state["migrationConfiguration"]["bandwidthPerMigration"], "32Mi");
    let told = scene.jobs.recv().await.unwrap();
    assert_eq!((told.bandwidth, told.budget), (Bandwidth::Capped(BytesPerSecond(32 << 20)), Some(Duration::from_secs(14))));
}

#[tokio::test]
async fn deleting_it_before_the_hand_over_cancels_it() {
    let mut scene = Scene::open("cancel", Duration::from_millis(100)).await;
    scene.vmi("vm1").await;
    // No node has this label: the target pod stays unscheduled.
    let mut manifest = vmim_manifest(&scene.namespace, "m1", "vm1");
    manifest["spec"]["addedNodeSelector"] = json!({ "nobody": "has-this" });
    scene.plane.accepts(&manifest.to_string()).await.unwrap();
    let held = scene.reaches("m1", "Scheduling").await;
    assert!(scene.target_pod(&held).await.is_some());
    scene.delete_vmim("m1").await;
    scene.vanishes("m1").await;
    scene.until("its pod to go with it", async || scene.target_pod(&held).await.is_none().then_some(())).await;
    let (_, note) = scene.events("FailedMigration", "m1").await;
    assert_eq!(note, "Migration failed due to being canceled");
    assert_eq!(scene.get_vmi("vm1").await["status"]["nodeName"], super::scene::NODE);
    assert!(scene.jobs.try_recv().is_err(), "nobody was asked to move anything");
}

#[tokio::test]
async fn deleting_it_after_the_hand_over_waits_for_it_to_run() {
    let mut scene = Scene::open("late", Duration::from_secs(600)).await;
    scene.gate.send_replace(false);
    scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    scene.reaches("m1", "PreparingTarget").await;
    scene.delete_vmim("m1").await;
    let asked = async || {
        let vmim = scene.get_vmim("m1").await?;
        (vmim["status"]["conditions"][0]["type"] == "migrationAbortRequested").then_some(vmim)
    };
    let vmim = scene.until("the condition", asked).await;
    assert_eq!(vmim["status"]["phase"], "PreparingTarget", "nothing else happens");
    assert!(scene.target_pod(&vmim).await.is_some());
    scene.gate.send_replace(true);
    scene.vanishes("m1").await;
    scene.jobs.recv().await.unwrap();
    let state = scene.get_vmi("vm1").await["status"]["migrationState"].clone();
    assert_eq!(
        (&state["failed"], &state["abortRequested"], &state["abortStatus"]),
        (&json!(true), &json!(true), &json!("Succeeded"))
    );
    assert_eq!(state["failureReason"], "Live migration has been aborted");
}

#[tokio::test]
async fn the_budget_aborts_it() {
    let scene = Scene::open("budget", Duration::from_secs(600)).await;
    scene.vmi("vm1").await;
    // 1 s per decimal gigabyte of a guest of 1 GiB: KubeVirt gives up after 2 s, seen once 3 whole ones have passed.
    scene.policy(&format!("short-{}", scene.namespace), json!({}), json!({ "completionTimeoutPerGiB": 1 })).await;
    scene.migrate("m1", "vm1").await;
    scene.reaches("m1", "Failed").await;
    let vmi = scene.get_vmi("vm1").await;
    let state = &vmi["status"]["migrationState"];
    assert_eq!(state["failureReason"], "Live migration has been aborted");
    assert!(state["abortRequested"].is_null(), "nobody asked for it");
    let active = vmi["status"]["activePods"].as_object().unwrap().len();
    assert_eq!((&vmi["status"]["nodeName"], active), (&json!(super::scene::NODE), 1));
}

#[tokio::test]
async fn a_target_pod_that_goes_fails_it() {
    let scene = Scene::open("podless", Duration::from_secs(600)).await;
    scene.gate.send_replace(false);
    scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    let vmim = scene.reaches("m1", "PreparingTarget").await;
    let pod = scene.target_pod(&vmim).await.unwrap();
    scene.pods().delete(&pod.name_any(), &DeleteParams::default()).await.unwrap();
    scene.reaches("m1", "Failed").await;
    let told = async || {
        let state = scene.get_vmi("vm1").await["status"]["migrationState"].clone();
        (state["failed"] == true).then_some(state)
    };
    assert_eq!(scene.until("the VMI to be told", told).await["failureReason"], "Target pod is down");
}

#[tokio::test]
async fn a_vmi_that_is_deleted_takes_everything_with_it() {
    let scene = Scene::open("deleted", Duration::from_secs(600)).await;
    for (phase, open) in [("PreparingTarget", false), ("Running", true)] {
        scene.gate.send_replace(open);
        scene.vmi("vm1").await;
        scene.migrate("m1", "vm1").await;
        scene.reaches("m1", phase).await;
        objects::vmis(&scene.client, &scene.namespace).delete("vm1", &DeleteParams::default()).await.unwrap();
        scene.gate.send_replace(true);
        let gone = async || {
            let vmi = objects::vmis(&scene.client, &scene.namespace).get_opt("vm1").await.unwrap();
            let pods = scene.pods().list(&kube::api::ListParams::default()).await.unwrap().items;
            (vmi.is_none() && pods.is_empty()).then_some(())
        };
        scene.until("the VMI and its pods to go", gone).await;
        // KubeVirt deletes the migrations of a VMI that is gone.
        scene.vanishes("m1").await;
    }
}

#[tokio::test]
async fn hotplugged_volumes_have_a_pod_of_their_own() {
    let scene = Scene::open("hotplug", Duration::from_millis(100)).await;
    scene.gate_target_pods().await;
    scene.vmi("vm1").await;
    scene.patch_vmi("vm1", json!({ "status": { "volumeStatus": [{ "name": "disk", "hotplugVolume": {} }] } })).await;
    scene.migrate("m1", "vm1").await;
    let waits = async || {
        let vmim = scene.get_vmim("m1").await?;
        scene.target_pod(&vmim).await.map(|pod| (vmim, pod))
    };
    let (_, pod) = scene.until("the target pod", waits).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let vmim = scene.get_vmim("m1").await.unwrap();
    assert_eq!(vmim["status"]["phase"], "Pending", "with hotplugged volumes it waits there");
    let release = Patch::Merge(json!({ "spec": { "schedulingGates": null } }));
    scene.pods().patch(&pod.name_any(), &PatchParams::default(), &release).await.unwrap();
    scene.reaches("m1", "Succeeded").await;
    let attachment = scene.pods_of(&vmim).await.into_iter().find(|pod| pod.labels()["kubevirt.io"] == "hotplug-disk").unwrap();
    assert_eq!(attachment.labels()["kubevirt.io/migrationJobUID"], vmim["metadata"]["uid"].as_str().unwrap());
    assert!(attachment.spec.unwrap().scheduling_gates.is_none());
}
