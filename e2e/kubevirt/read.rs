//! What the controllers of the stand-in read of VMIMs, VMIs and pods, in KubeVirt's terms.
//!
//! In: objects as the API server has them. Out: plain answers. Pure.

use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt, api::DynamicObject};
use serde_json::Value;

/// The label that ties a target pod to its VMIM.
pub(super) const JOB: &str = "kubevirt.io/migrationJobUID";

/// `namespace/name`.
pub(super) fn key(object: &impl ResourceExt) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// The key of the VMI that a VMIM names.
pub(super) fn vmi_key(vmim: &DynamicObject) -> String {
    format!("{}/{}", vmim.namespace().unwrap_or_default(), text(&vmim.data, "/spec/vmiName"))
}

/// The text at a JSON pointer; empty where there is none.
pub(super) fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Is the flag at this JSON pointer set?
pub(super) fn flag(value: &Value, pointer: &str) -> bool {
    value.pointer(pointer).and_then(Value::as_bool).unwrap_or(false)
}

/// The status of a condition of a VMI or VMIM.
pub(super) fn condition(object: &DynamicObject, kind: &str) -> Option<String> {
    let conditions = object.data.pointer("/status/conditions")?.as_array()?;
    conditions.iter().find(|condition| condition["type"] == kind)?["status"].as_str().map(str::to_owned)
}

/// `Succeeded` or `Failed`, of a VMI or VMIM.
pub(super) fn is_final(object: &DynamicObject) -> bool {
    matches!(text(&object.data, "/status/phase").as_str(), "Succeeded" | "Failed")
}

/// `PriorityFromMigration`
pub(super) fn priority(vmim: &DynamicObject) -> i64 {
    match text(&vmim.data, "/spec/priority").as_str() {
        "system-critical" => 100,
        "user-triggered" => 50,
        "system-maintenance" => 20,
        _ => 0,
    }
}

/// Is this the launcher of this job?
pub(super) fn is_target(pod: &Pod, uid: &str) -> bool {
    let label = |key: &str| pod.labels().get(key).map(String::as_str);
    label(JOB) == Some(uid) && label("kubevirt.io") == Some("virt-launcher")
}

fn pod_phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// `PodIsDown`
pub(super) fn is_down(pod: &Pod) -> bool {
    matches!(pod_phase(pod), "Succeeded" | "Failed")
}

/// `IsPodReady`: its containers have started, and it is not about to end.
pub(super) fn is_ready(pod: &Pod) -> bool {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let started = statuses.clone().all(|it| it.state.as_ref().is_some_and(|state| state.running.is_some()));
    pod_phase(pod) == "Running" && pod.metadata.deletion_timestamp.is_none() && started
}

/// `VMIHasHotplugVolumes`
pub(super) fn has_hotplug_volumes(vmi: &DynamicObject) -> bool {
    let of = |pointer: &str| vmi.data.pointer(pointer).and_then(|it| it.as_array()).cloned().unwrap_or_default();
    of("/status/volumeStatus").iter().any(|it| !it["hotplugVolume"].is_null())
        || of("/spec/volumes")
            .iter()
            .any(|it| flag(it, "/persistentVolumeClaim/hotpluggable") || flag(it, "/dataVolume/hotpluggable"))
}
