//! What virt-api lets in, and the kinds themselves.

use std::time::Duration;

use kube::api::PostParams;
use migvisor_e2e::kubevirt::{CONTROLLER, objects, objects::vmim_manifest};
use serde_json::{Value, json};

use super::scene::Scene;

#[tokio::test]
async fn the_kinds_are_kubevirts() {
    let scene = Scene::open("kinds", Duration::ZERO).await;
    let (plane, namespace) = (&scene.plane, &scene.namespace);
    scene.vmi("vm1").await;

    // No status subresource on VMIs; one on VMIMs.
    let resources = plane.kubectl(&["get", "--raw", "/apis/kubevirt.io/v1"], "").await.unwrap().ok().unwrap();
    assert!(
        resources.contains("virtualmachineinstancemigrations/status") && !resources.contains("virtualmachineinstances/status")
    );
    let columns = plane.kubectl(&["get", "vmi,vmims", "-n", namespace, "-o", "wide"], "").await.unwrap().ok().unwrap();
    assert!(columns.contains("LIVE-MIGRATABLE") && columns.contains("node-a"), "{columns}");

    // The old version is served, unknown fields stay, but for the spec's.
    let manifest = format!(
        "apiVersion: kubevirt.io/v1alpha3\nkind: VirtualMachineInstanceMigration\nextra: {{deep: [1]}}\n\
         metadata: {{name: m1, namespace: {namespace}}}\nspec: {{vmiName: vm1}}\n"
    );
    plane.rejects(&manifest.replace("vmiName", "odd: 1, vmiName"), "spec.odd in body is a forbidden property").await.unwrap();
    plane.rejects(&manifest.replace("vmiName", "priority: urgent, vmiName"), "Unsupported value: \"urgent\"").await.unwrap();
    plane.accepts(&manifest).await.unwrap();
    let stored = scene.get_vmim("m1").await.unwrap();
    assert_eq!(stored["extra"]["deep"][0], 1);
    assert_eq!(stored["metadata"]["labels"]["kubevirt.io/vmi-name"], "vm1");
    assert_eq!(stored["metadata"]["finalizers"], json!(["kubevirt.io/migrationJobFinalize"]));
    let patch = ["patch", "vmim", "m1", "-n", namespace, "--type=merge", "-p", r#"{"spec":{"vmiName":"vm2"}}"#];
    let patched = plane.kubectl(&patch, "").await.unwrap();
    assert!(patched.stderr.contains("spec is restricted"), "{}{}", patched.stdout, patched.stderr);
    let annotate = plane.kubectl(&["annotate", "vmim", "m1", "-n", namespace, "a=b"], "").await.unwrap();
    assert!(annotate.success, "annotations are free: {}", annotate.stderr);
}

#[tokio::test]
async fn what_cannot_be_migrated_is_refused() {
    let scene = Scene::open("refused", Duration::ZERO).await;
    let refused = async |spec: Value, words: &str| {
        let mut manifest = vmim_manifest(&scene.namespace, "m1", "vm1");
        for (key, value) in spec.as_object().unwrap() {
            manifest["spec"][key] = value.clone();
        }
        scene.plane.rejects(&manifest.to_string(), words).await.unwrap();
    };
    refused(json!({}), &format!("the VMI \"{}/vm1\" does not exist", scene.namespace)).await;
    refused(json!({ "vmiName": "" }), "vmiName is missing").await;
    scene.vmi("vm1").await;
    refused(json!({ "priority": "system-critical" }), "only virt-controller is allowed to set priority field").await;
    refused(json!({ "sendTo": { "migrationID": "x", "connectURL": "y" } }), "DecentralizedLiveMigration feature gate").await;
    let fixed =
        json!([{ "type": "LiveMigratable", "status": "False", "reason": "HostDeviceNotLiveMigratable", "message": "no" }]);
    scene.patch_vmi("vm1", json!({ "status": { "conditions": fixed } })).await;
    refused(json!({}), "Cannot migrate VMI, Reason: HostDeviceNotLiveMigratable, Message: no").await;
    scene.patch_vmi("vm1", json!({ "status": { "phase": "Succeeded", "conditions": [] } })).await;
    refused(json!({}), "Cannot migrate VMI in finalized state.").await;

    // virt-controller may say what is urgent.
    scene.patch_vmi("vm1", json!({ "status": { "phase": "Running" } })).await;
    let mut manifest = vmim_manifest(&scene.namespace, "m1", "vm1");
    manifest["spec"]["priority"] = json!("system-critical");
    let vmims = objects::vmims(&scene.plane.client_as(CONTROLLER).unwrap(), &scene.namespace);
    vmims.create(&PostParams::default(), &serde_json::from_value(manifest).unwrap()).await.unwrap();
}

#[tokio::test]
async fn an_eviction_becomes_an_evacuation() {
    let scene = Scene::open("evicted", Duration::from_secs(2)).await;
    let side = scene.vmi("vm1").await;
    // By kubectl: kube's client would take a 429 as a wish to ask again.
    let evict = async |annotations: Value, query: &str| {
        let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": { "name": side.pod, "namespace": scene.namespace, "annotations": annotations } });
        let path = format!("/api/v1/namespaces/{}/pods/{}/eviction{query}", scene.namespace, side.pod);
        let output = scene.plane.kubectl(&["create", "--raw", &path, "-f", "-"], &eviction.to_string()).await.unwrap();
        (output.success, output.stderr)
    };
    let words = format!("Eviction triggered evacuation of VMI \"{}/vm1\"", scene.namespace);
    let (done, message) = evict(json!({}), "?dryRun=All").await;
    assert!(!done && message.contains(&words), "{message}");
    assert!(scene.get_vmi("vm1").await["status"]["evacuationNodeName"].is_null(), "a rehearsal changes nothing");

    let (done, message) = evict(json!({ "requested-by": "sigs.k8s.io/descheduler" }), "").await;
    assert!(!done && message.contains(&words), "{message}");
    let made = scene.until("a migration", async || scene.vmims().await.into_iter().next()).await;
    assert!(made.metadata.name.as_deref().unwrap().starts_with("kubevirt-evacuation-"));
    assert_eq!(made.data["spec"]["priority"], "system-maintenance", "the descheduler's is not urgent");
    let (_, message) = evict(json!({}), "").await;
    assert!(message.contains(&format!("Evacuation in progress: {words}")), "{message}");

    // Once it has moved, the pod is nobody's business any more.
    scene.reaches(made.metadata.name.as_deref().unwrap(), "Succeeded").await;
    let vmi = scene.get_vmi("vm1").await;
    assert!(vmi["status"]["evacuationNodeName"].is_null() && vmi["metadata"]["annotations"].is_null(), "{vmi}");
    scene.until("the old pod to be evicted", async || evict(json!({}), "").await.0.then_some(())).await;
}
