//! KubeVirt's kinds as objects of a test: their CRDs, and running VMIs with their launcher pods.
//!
//! In: names. Out: JSON manifests, or the objects themselves, created. Everything is read and written as plain JSON: partial
//! types would drop what they do not know.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::{
    api::core::v1::{Namespace, Node, Pod},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
    runtime::{conditions, wait::await_condition},
};
use serde_json::{Value, json};

use super::{read::JOB, vmi::FINALIZER};

/// Where a VMI runs, as a label.
pub(super) const NODE: &str = "kubevirt.io/nodeName";
/// The launcher of this KubeVirt.
pub(super) const LAUNCHER: &str = "virt-launcher:1.9.0";
/// Who writes, in `managedFields`.
pub(super) const MANAGER: &str = "kubevirt-stand-in";

/// KubeVirt's CRDs, of our own writing.
const CRDS: [&str; 5] = [
    include_str!("crds/virtualmachineinstance.yaml"),
    include_str!("crds/virtualmachineinstancemigration.yaml"),
    include_str!("crds/virtualmachine.yaml"),
    include_str!("crds/kubevirt.yaml"),
    include_str!("crds/migrationpolicy.yaml"),
];

/// Installs KubeVirt's CRDs and waits until the API server serves them.
pub async fn install_crds(client: &Client) -> Result<()> {
    install(client, &CRDS).await
}

/// Installs CRDs (YAML, one object each) and waits until the API server serves them.
pub async fn install(client: &Client, manifests: &[&str]) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut names = Vec::new();
    for manifest in manifests {
        let crd: CustomResourceDefinition = serde_yaml::from_str(manifest).context("a manifest that is no CRD")?;
        let name = crd.name_any();
        let parameters = PatchParams::apply(MANAGER).force();
        api.patch(&name, &parameters, &Patch::Apply(crd)).await.with_context(|| format!("cannot install the CRD {name}"))?;
        names.push(name);
    }
    for name in names {
        let served = await_condition(api.clone(), &name, conditions::is_crd_established());
        tokio::time::timeout(Duration::from_secs(20), served)
            .await
            .with_context(|| format!("the CRD {name} is not served after 20 s: look at its conditions"))??;
    }
    Ok(())
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// VirtualMachineInstance, kubevirt.io/v1.
pub fn vmi_resource() -> ApiResource {
    resource("kubevirt.io", "v1", "VirtualMachineInstance", "virtualmachineinstances")
}

/// VirtualMachineInstanceMigration, kubevirt.io/v1.
pub fn vmim_resource() -> ApiResource {
    resource("kubevirt.io", "v1", "VirtualMachineInstanceMigration", "virtualmachineinstancemigrations")
}

/// KubeVirt, kubevirt.io/v1.
pub fn kubevirt_resource() -> ApiResource {
    resource("kubevirt.io", "v1", "KubeVirt", "kubevirts")
}

/// MigrationPolicy, migrations.kubevirt.io/v1alpha1.
pub fn policy_resource() -> ApiResource {
    resource("migrations.kubevirt.io", "v1alpha1", "MigrationPolicy", "migrationpolicies")
}

/// A node that KubeVirt may use, with room for many guests.
pub async fn create_node(client: &Client, name: &str) -> Result<()> {
    let labels = json!({
        "kubernetes.io/hostname": name,
        "kubevirt.io/schedulable": "true",
        "machine-type.node.kubevirt.io/q35": "true",
    });
    let node: Node = serde_json::from_value(json!({
        "metadata": { "name": name, "labels": labels, "annotations": { "kubevirt.io/heartbeat": now() } },
    }))?;
    let api: Api<Node> = Api::all(client.clone());
    let made = api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(node)).await;
    made.with_context(|| format!("cannot create the node {name}"))?;
    let room = json!({
        "cpu": "64", "memory": "1Ti", "pods": "1000", "ephemeral-storage": "1Ti",
        "devices.kubevirt.io/kvm": "1k", "devices.kubevirt.io/tun": "1k", "devices.kubevirt.io/vhost-net": "1k",
    });
    let status = Patch::Merge(json!({ "status": { "capacity": room, "allocatable": room } }));
    let told = api.patch_status(name, &PatchParams::default(), &status).await;
    told.map(drop).with_context(|| format!("cannot tell what the node {name} has"))
}

/// The KubeVirt CR, deployed, with this `spec.configuration.migrations`; workload updates by live migration.
pub async fn create_kubevirt(client: &Client, migrations: Value) -> Result<()> {
    let name = "kubevirt";
    let namespace: Namespace = serde_json::from_value(json!({ "metadata": { "name": name } }))?;
    let parameters = PatchParams::apply(MANAGER).force();
    let namespaces: Api<Namespace> = Api::all(client.clone());
    namespaces.patch(name, &parameters, &Patch::Apply(namespace)).await.context("cannot create KubeVirt's namespace")?;
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), name, &kubevirt_resource());
    let kubevirt = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "KubeVirt",
        "metadata": { "name": name },
        "spec": {
            "configuration": { "migrations": migrations },
            "workloadUpdateStrategy": { "workloadUpdateMethods": ["LiveMigrate"] },
        },
    });
    api.patch(name, &parameters, &Patch::Apply(kubevirt)).await.context("cannot create the KubeVirt CR")?;
    let status = Patch::Merge(json!({ "status": { "phase": "Deployed", "observedKubeVirtVersion": "v1.9.0" } }));
    let told = api.patch_status(name, &PatchParams::default(), &status).await;
    told.map(drop).context("cannot tell that KubeVirt is deployed")
}

/// A running VMI, as virt-controller and virt-handler leave one. `pod_uid` is the UID of its launcher pod; without one it has
/// no active pod yet.
pub fn vmi_manifest(namespace: &str, name: &str, node: &str, pod_uid: Option<&str>, memory: &str) -> Value {
    let now = now();
    let condition = |kind: &str| json!({ "type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": now });
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": { "namespace": namespace, "name": name, "labels": { NODE: node }, "finalizers": [FINALIZER] },
        "spec": {
            "domain": {
                "cpu": { "cores": 1 },
                "memory": { "guest": memory },
                "machine": { "type": "q35" },
                "devices": {},
            },
            "evictionStrategy": "LiveMigrate",
        },
        "status": {
            "phase": "Running",
            "nodeName": node,
            "activePods": pod_uid.map_or_else(|| json!({}), |uid| json!({ uid: node })),
            "conditions": [condition("Ready"), condition("LiveMigratable")],
            "migrationMethod": "LiveMigration",
            "migrationTransport": "Unix",
            "selinuxContext": "none",
            "launcherContainerImageVersion": LAUNCHER,
            "memory": { "guestAtBoot": memory, "guestCurrent": memory, "guestRequested": memory },
        },
    })
}

/// A VMIM, with a fixed name. For `generateName` write your own.
pub fn vmim_manifest(namespace: &str, name: &str, vmi: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstanceMigration",
        "metadata": { "namespace": namespace, "name": name },
        "spec": { "vmiName": vmi },
    })
}

/// A launcher pod: a container that asks for what a guest needs.
fn launcher_pod(vmi: &DynamicObject, name: &str) -> Value {
    let vmi_name = vmi.name_any();
    let uid = vmi.uid().unwrap_or_default();
    let memory = vmi.data.pointer("/spec/domain/memory/guest").cloned().unwrap_or_else(|| json!("1Gi"));
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": vmi.namespace(),
            "name": name,
            "labels": { "kubevirt.io": "virt-launcher", "kubevirt.io/created-by": uid, "vm.kubevirt.io/name": vmi_name },
            "annotations": { "kubevirt.io/domain": vmi_name },
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": vmi_name, "uid": uid,
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": {
            "automountServiceAccountToken": false,
            "restartPolicy": "Never",
            "nodeSelector": { "kubevirt.io/schedulable": "true" },
            "containers": [{
                "name": "compute",
                "image": LAUNCHER,
                "resources": {
                    "requests": { "cpu": "100m", "memory": memory, "devices.kubevirt.io/kvm": "1" },
                    "limits": { "devices.kubevirt.io/kvm": "1" },
                },
            }],
        },
    })
}

/// The target pod of a migration (`createTargetPod`): away from its source, where the VMIM allows it. Its name follows from the VMIM's UID:
/// made twice, it is made once.
pub(super) fn target_pod(vmi: &DynamicObject, vmim: &DynamicObject, source: &Pod) -> Value {
    let uid = vmim.uid().unwrap_or_default();
    let short: String = uid.chars().filter(char::is_ascii_alphanumeric).take(5).collect();
    let mut pod = launcher_pod(vmi, &format!("virt-launcher-{}-{short}", vmi.name_any()));
    pod["metadata"]["labels"][JOB] = json!(uid);
    pod["metadata"]["annotations"]["kubevirt.io/migrationJobName"] = json!(vmim.name_any());
    // The VMI's own labels, as its template has them.
    for (key, value) in vmi.labels().iter().filter(|(key, _)| !key.starts_with("kubevirt.io/")) {
        pod["metadata"]["labels"][key] = json!(value);
    }
    let mut selector = vmim.data.pointer("/spec/addedNodeSelector").cloned().unwrap_or_else(|| json!({}));
    for (key, value) in source.spec.iter().flat_map(|spec| spec.node_selector.iter().flatten()) {
        selector[key] = json!(value);
    }
    pod["spec"]["nodeSelector"] = selector;
    let siblings = json!({ "matchLabels": { "kubevirt.io/created-by": vmi.uid() } });
    pod["spec"]["affinity"] = json!({ "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [
        { "labelSelector": siblings, "topologyKey": "kubernetes.io/hostname" },
    ] } });
    pod
}

/// The pod that holds the hotplugged volumes beside a target pod: it carries the job's label, too, and is no launcher.
pub(super) fn attachment_pod(vmim: &DynamicObject, owner: &Pod) -> Value {
    let node = owner.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let here = json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": [node] });
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": owner.namespace(),
            "name": format!("hp-volume-{}", owner.name_any()),
            "labels": { "kubevirt.io": "hotplug-disk", JOB: vmim.uid() },
            "annotations": { "kubevirt.io/migrationJobName": vmim.name_any() },
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Pod", "name": owner.name_any(), "uid": owner.uid(),
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": [{ "name": "hotplug-disk", "image": LAUNCHER }],
            "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution":
                { "nodeSelectorTerms": [{ "matchExpressions": [here] }] } } },
        },
    })
}

/// Where a VMI runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// The node.
    pub node: String,
    /// The launcher pod there.
    pub pod: String,
    /// Its UID: what the VM's process is known by.
    pub pod_uid: String,
}

/// Creates a VMI that runs on `node`, with its launcher pod, bound and ready. Returns where it runs.
pub async fn running_vmi(client: &Client, namespace: &str, name: &str, node: &str, memory: &str) -> Result<Side> {
    let side = starting_vmi(client, namespace, name, node, memory).await?;
    started(client, namespace, name, &side).await?;
    Ok(side)
}

/// The same, but for the word that its pod holds the guest: [`started`] gives it.
pub async fn starting_vmi(client: &Client, namespace: &str, name: &str, node: &str, memory: &str) -> Result<Side> {
    let vmis = vmis(client, namespace);
    let manifest = serde_json::from_value(vmi_manifest(namespace, name, node, None, memory))?;
    let vmi = vmis.create(&PostParams::default(), &manifest).await.with_context(|| format!("cannot create the VMI {name}"))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod_name = format!("virt-launcher-{name}");
    let mut pod = launcher_pod(&vmi, &pod_name);
    pod["spec"]["nodeName"] = json!(node);
    let pod = serde_json::from_value(pod)?;
    let pod = pods.create(&PostParams::default(), &pod).await.with_context(|| format!("cannot create the pod {pod_name}"))?;
    run(&pods, &pod_name).await?;
    Ok(Side { node: node.to_owned(), pod: pod_name, pod_uid: pod.uid().unwrap_or_default() })
}

/// Its guest runs: from now on it can be asked about.
pub async fn started(client: &Client, namespace: &str, name: &str, side: &Side) -> Result<()> {
    let patch = Patch::Merge(json!({ "status": { "activePods": { side.pod_uid.as_str(): side.node } } }));
    let patched = vmis(client, namespace).patch(name, &PatchParams::default(), &patch).await;
    patched.map(drop).with_context(|| format!("cannot complete the VMI {name}"))
}

/// The VMIs of a namespace.
pub fn vmis(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &vmi_resource())
}

/// The VMIMs of a namespace.
pub fn vmims(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &vmim_resource())
}

/// What the scheduler does: the API server refuses it while a gate is on the pod.
pub(super) async fn bind(pods: &Api<Pod>, name: &str, node: &str) -> Result<()> {
    let binding = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": { "name": name },
        "target": { "apiVersion": "v1", "kind": "Node", "name": node },
    });
    let bound: Result<Value, _> = pods.create_subresource("binding", name, &PostParams::default(), &binding).await;
    bound.map(drop).with_context(|| format!("cannot bind the pod {name} to {node}"))
}

/// What the kubelet does: the pod runs and is ready.
pub(super) async fn run(pods: &Api<Pod>, name: &str) -> Result<()> {
    let now = now();
    let condition = |kind: &str| json!({ "type": kind, "status": "True", "lastTransitionTime": now });
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition);
    let container = |name: &str| {
        json!({ "name": name, "image": LAUNCHER, "imageID": "", "ready": true, "started": true, "restartCount": 0,
            "state": { "running": { "startedAt": now } } })
    };
    let containers =
        pods.get(name).await?.spec.map(|spec| spec.containers.iter().map(|it| container(&it.name)).collect::<Vec<_>>());
    let status = json!({ "status": { "phase": "Running", "podIP": "127.0.0.1", "podIPs": [{ "ip": "127.0.0.1" }], "startTime": now,
        "conditions": conditions, "containerStatuses": containers } });
    let patched = pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(status)).await;
    patched.map(drop).with_context(|| format!("cannot set the status of the pod {name}"))
}

/// What the scheduler says of a pod that fits nowhere.
pub(super) async fn unschedulable(pods: &Api<Pod>, name: &str) -> Result<()> {
    let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node fits" });
    let status = Patch::Strategic(json!({ "status": { "conditions": [condition] } }));
    let patched = pods.patch_status(name, &PatchParams::default(), &status).await;
    patched.map(drop).with_context(|| format!("cannot set the status of the pod {name}"))
}

/// The status of a launcher pod whose guest has left.
pub(super) fn ended() -> Value {
    json!({ "status": { "phase": "Succeeded" } })
}

/// The present time as Kubernetes writes it, whole seconds.
pub(super) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
