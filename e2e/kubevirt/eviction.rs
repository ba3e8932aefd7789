//! virt-api: an eviction of a launcher pod becomes an evacuation of its VMI. After KubeVirt 1.9's
//! `pkg/virt-api/webhooks/validating-webhook/admitters/pod-eviction-admitter.go`.
//!
//! In: an eviction. Out: the VMI marked with `status.evacuationNodeName`, and a refusal with 429 in the words that the descheduler knows; who
//! drains asks again until the pod is gone.

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{
    api::{Verdict, is_dry_run, is_launcher},
    objects,
    read::{condition, is_down, text},
};

fn denied(message: String) -> Verdict {
    Err((429, message))
}

/// `PodEvictionAdmitter`
pub(super) async fn admit(client: &Client, request: &Value) -> Verdict {
    let (namespace, name) = (text(request, "/namespace"), text(request, "/name"));
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let Ok(pod) = pods.get(&name).await else { return Ok(()) };
    let launcher = |pod: &Pod| is_launcher(pod) && !is_down(pod);
    if pod.labels().get("kubevirt.io").is_some_and(|it| it == "hotplug-disk") {
        let Some(owner) = pod.owner_references().first() else { return Ok(()) };
        let owner = pods.get_opt(&owner.name).await.ok().flatten().filter(launcher);
        let vmi = owner.and_then(|owner| owner.annotations().get("kubevirt.io/domain").cloned());
        return vmi.map_or(Ok(()), |vmi| {
            denied(format!("cannot evict hotplug pod: {name} associated with running vmi: {vmi} in namespace {namespace}"))
        });
    }
    let Some(vmi) = pod.annotations().get("kubevirt.io/domain").filter(|_| launcher(&pod)) else { return Ok(()) };
    match objects::vmis(client, &namespace).get(vmi).await {
        Ok(vmi) => mark(client, request, &pod, &vmi).await,
        Err(error) => denied(format!("kubevirt failed getting the vmi: {error}")),
    }
}

async fn mark(client: &Client, request: &Value, pod: &Pod, vmi: &kube::api::DynamicObject) -> Verdict {
    let (namespace, name) = (vmi.namespace().unwrap_or_default(), vmi.name_any());
    let migratable = condition(vmi, "LiveMigratable").as_deref() == Some("True");
    match text(&vmi.data, "/spec/evictionStrategy").as_str() {
        "LiveMigrate" if !migratable => {
            return denied(format!("VMI {name} is configured with an eviction strategy but is not live-migratable"));
        }
        "LiveMigrateIfPossible" if !migratable => return Ok(()),
        "LiveMigrate" | "LiveMigrateIfPossible" | "External" => {}
        _ => return Ok(()),
    }
    let words = format!("Eviction triggered evacuation of VMI \"{namespace}/{name}\"");
    if !text(&vmi.data, "/status/evacuationNodeName").is_empty() {
        return denied(format!("Evacuation in progress: {words}"));
    }
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    if text(&vmi.data, "/status/nodeName") != node {
        return denied("Eviction request for target Pod".to_owned());
    }
    let mut patch = json!({ "status": { "evacuationNodeName": node } });
    let asked_by = request.pointer("/object/metadata/annotations/requested-by");
    if asked_by.is_some_and(|it| it == "sigs.k8s.io/descheduler") {
        patch["metadata"] = json!({ "annotations": { "kubevirt.io/eviction-source": "descheduler" } });
    }
    let parameters = PatchParams { dry_run: is_dry_run(request), ..PatchParams::default() };
    match objects::vmis(client, &namespace).patch(&name, &parameters, &Patch::Merge(patch)).await {
        Ok(_) => denied(words),
        Err(error) => denied(format!("kubevirt failed marking the vmi for eviction: {error}")),
    }
}
