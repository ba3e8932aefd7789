//! What the stand-in reads and writes for one VMIM: the object itself, its VMI, the pods on both sides, events.
//!
//! In: the VMIM's name. Out: JSON as the API server has it. Everything may be repeated, so that an API server that was away
//! costs time and nothing else.

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::{Value, json};

use super::{
    Outcome,
    objects::{self, Side, now},
};

pub(super) const FINALIZER: &str = "kubevirt.io/migrationJobFinalize";
pub(super) const TARGET_NODE: &str = "kubevirt.io/migrationTargetNodeName";
/// How many final VMIMs of a VMI KubeVirt keeps.
const KEPT: usize = 5;
const NODE: &str = "kubevirt.io/nodeName";

/// One VMIM and all that belongs to it.
pub(super) struct Hands {
    pub(super) client: Client,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) vmi_name: String,
    pub(super) vmims: Api<DynamicObject>,
    pub(super) vmis: Api<DynamicObject>,
    pub(super) pods: Api<Pod>,
}

impl Hands {
    pub(super) fn new(client: &Client, vmim: &DynamicObject) -> Self {
        let namespace = vmim.namespace().unwrap_or_default();
        Self {
            client: client.clone(),
            name: vmim.name_any(),
            uid: vmim.uid().unwrap_or_default(),
            vmi_name: text(&vmim.data, "/spec/vmiName"),
            vmims: objects::vmims(client, &namespace),
            vmis: objects::vmis(client, &namespace),
            pods: Api::namespaced(client.clone(), &namespace),
            namespace,
        }
    }

    /// Leaves everything as it has to be after the outcome: VMI, pods, VMIM. May be repeated.
    pub(super) async fn finish(&self, outcome: &Outcome) -> Result<()> {
        let mut state = json!(null);
        let vmi = self.vmis.get_opt(&self.vmi_name).await?;
        if vmi.as_ref().is_some_and(|vmi| text(&vmi.data, "/status/migrationState/migrationUid") == self.uid) {
            let target = self.target().await?;
            let ended = self.update_vmi(|vmi| conclude(vmi, outcome, target.as_ref())).await?;
            state = ended.data["status"]["migrationState"].clone();
        } else if let Some(reason) = &outcome.failure_reason {
            // It ended before the hand-over: the VMI's migrationState is another migration's.
            state = json!({ "migrationUid": self.uid, "failed": true, "completed": true, "failureReason": reason, "endTimestamp": now() });
        }
        if outcome.succeeded {
            let done = Patch::Strategic(json!({ "status": { "phase": "Succeeded" } }));
            let source = text(&state, "/sourcePod");
            // The pod that the guest has left; somebody may have removed it.
            if self.pods.get_opt(&source).await?.is_some() {
                self.pods.patch_status(&source, &PatchParams::default(), &done).await?;
            }
        } else {
            self.delete_target_pod().await?;
        }
        self.enter(if outcome.succeeded { "Succeeded" } else { "Failed" }, Some(&state)).await?;
        match &outcome.failure_reason {
            Some(reason) => self.event(EventType::Warning, "FailedMigration", reason).await,
            None => self.event(EventType::Normal, "SuccessfulMigration", "Source node reported migration succeeded").await,
        }
        let Some(vmim) = self.this().await? else { return Ok(()) };
        let left: Vec<_> = vmim.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).collect();
        let patch = json!({ "metadata": { "finalizers": left } });
        self.vmims.patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        self.forget_old().await
    }

    /// Of a VMI's final VMIMs only the newest few are kept.
    async fn forget_old(&self) -> Result<()> {
        let mut ended = self.vmims.list(&ListParams::default()).await?.items;
        ended.retain(|vmim| {
            text(&vmim.data, "/spec/vmiName") == self.vmi_name
                && matches!(text(&vmim.data, "/status/phase").as_str(), "Succeeded" | "Failed")
        });
        // Whole seconds: among equals the resource version tells.
        ended.sort_by_key(|vmim| {
            (vmim.creation_timestamp(), vmim.resource_version().and_then(|version| version.parse::<u64>().ok()))
        });
        let surplus = ended.len().saturating_sub(KEPT);
        for old in ended.iter().take(surplus) {
            match self.vmims.delete(&old.name_any(), &DeleteParams::default()).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Err(error) => return Err(error).context("cannot delete an old migration"),
            }
        }
        Ok(())
    }

    /// Writes the phase, when it was entered, and what else belongs to it.
    pub(super) async fn enter(&self, phase: &str, state: Option<&Value>) -> Result<()> {
        let Some(vmim) = self.this().await? else { return Ok(()) };
        let mut entered =
            vmim.data.pointer("/status/phaseTransitionTimestamps").and_then(Value::as_array).cloned().unwrap_or_default();
        if text(&vmim.data, "/status/phase") != phase {
            entered.push(json!({ "phase": phase, "phaseTransitionTimestamp": now() }));
        }
        let mut status = json!({ "phase": phase, "phaseTransitionTimestamps": entered });
        if let Some(state) = state {
            status["migrationState"] = state.clone();
        }
        self.vmims.patch_status(&self.name, &PatchParams::default(), &Patch::Merge(json!({ "status": status }))).await?;
        Ok(())
    }

    /// The VMIM, unless it is gone (or another one of its name is there).
    pub(super) async fn this(&self) -> Result<Option<DynamicObject>> {
        let found = self.vmims.get_opt(&self.name).await?;
        Ok(found.filter(|vmim| vmim.uid().as_deref() == Some(&self.uid)))
    }

    pub(super) async fn kubevirt(&self) -> Result<Option<Value>> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &objects::kubevirt_resource());
        let found = api.list(&ListParams::default()).await?.items.into_iter().next();
        Ok(found.map(serde_json::to_value).transpose()?)
    }

    /// Where the VMI runs: the active pod on its node.
    pub(super) async fn source(&self, vmi: &DynamicObject) -> Result<Side> {
        let node = text(&vmi.data, "/status/nodeName");
        let active = vmi.data.pointer("/status/activePods").and_then(Value::as_object).into_iter().flatten();
        let pod_uid = active.filter(|(_, on)| on.as_str() == Some(&node)).map(|(uid, _)| uid.clone()).next();
        let pod_uid = pod_uid.with_context(|| format!("the VMI {} has no active pod on {node:?}", self.vmi_name))?;
        let pods = self.pods.list(&ListParams::default().labels("kubevirt.io=virt-launcher")).await?;
        let pod = pods.iter().find(|pod| pod.uid().as_deref() == Some(&pod_uid)).map(ResourceExt::name_any);
        let pod = pod.with_context(|| format!("the launcher pod {pod_uid} of the VMI {} is not there", self.vmi_name))?;
        Ok(Side { node, pod, pod_uid })
    }

    /// Where it goes: its target pod, if it is there and bound.
    pub(super) async fn target(&self) -> Result<Option<Side>> {
        let Some(pod) = self.pods.get_opt(&self.target_pod_name()).await? else { return Ok(None) };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        Ok(node.map(|node| Side { node, pod: pod.name_any(), pod_uid: pod.uid().unwrap_or_default() }))
    }

    pub(super) fn target_pod_name(&self) -> String {
        let short: String = self.uid.chars().filter(char::is_ascii_alphanumeric).take(5).collect();
        format!("virt-launcher-{}-{short}", self.vmi_name)
    }

    /// At once: no kubelet is there to end it first.
    pub(super) async fn delete_target_pod(&self) -> Result<()> {
        match self.pods.delete(&self.target_pod_name(), &DeleteParams::default().grace_period(0)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(error).context("cannot delete the target pod"),
        }
    }

    /// A plain update (VMIs have no status subresource), again where somebody else was quicker.
    pub(super) async fn update_vmi(&self, change: impl Fn(&mut DynamicObject)) -> Result<DynamicObject> {
        for _ in 0..10 {
            let mut vmi = self.vmis.get(&self.vmi_name).await?;
            change(&mut vmi);
            match self.vmis.replace(&self.vmi_name, &PostParams::default(), &vmi).await {
                Ok(updated) => return Ok(updated),
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                Err(error) => return Err(error).context("cannot update the VMI"),
            }
        }
        Err(anyhow!("the VMI {} is being changed all the time", self.vmi_name))
    }

    pub(super) async fn event(&self, kind: EventType, reason: &str, note: &str) {
        let reporter = Reporter { controller: "virtualmachineinstancemigration-controller".to_owned(), instance: None };
        let reference = ObjectReference {
            api_version: Some("kubevirt.io/v1".to_owned()),
            kind: Some("VirtualMachineInstanceMigration".to_owned()),
            namespace: Some(self.namespace.clone()),
            name: Some(self.name.clone()),
            uid: Some(self.uid.clone()),
            ..Default::default()
        };
        let event = Event {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(note.chars().take(1000).collect()),
            action: "Migrate".to_owned(),
            secondary: None,
        };
        if let Err(error) = Recorder::new(self.client.clone(), reporter).publish(&event, &reference).await {
            tracing::debug!("no event {reason}: {error}");
        }
    }
}

/// The VMI after the migration: on its new node, or where it was.
fn conclude(vmi: &mut DynamicObject, outcome: &Outcome, target: Option<&Side>) {
    vmi.labels_mut().remove(TARGET_NODE);
    let state = &mut vmi.data["status"]["migrationState"];
    if state["endTimestamp"].is_null() {
        state["endTimestamp"] = json!(now());
    }
    state["completed"] = json!(true);
    if let Some(reason) = &outcome.failure_reason {
        state["failed"] = json!(true);
        state["failureReason"] = json!(reason);
    }
    if state["abortRequested"] == json!(true) {
        state["abortStatus"] = json!(if outcome.succeeded { "Failed" } else { "Succeeded" });
    }
    let Some(target) = target else { return };
    if !outcome.succeeded {
        if let Some(active) = vmi.data["status"]["activePods"].as_object_mut() {
            active.remove(&target.pod_uid);
        }
        return;
    }
    state["targetNodeDomainDetected"] = json!(true);
    state["targetNodeDomainReadyTimestamp"] = json!(now());
    vmi.labels_mut().insert(NODE.to_owned(), target.node.clone());
    let left = text(&vmi.data, "/status/nodeName");
    let status = &mut vmi.data["status"];
    status["nodeName"] = json!(target.node);
    status["activePods"] = json!({ target.pod_uid.as_str(): target.node });
    if text(status, "/evacuationNodeName") == left
        && let Some(status) = status.as_object_mut()
    {
        status.remove("evacuationNodeName");
    }
}

pub(super) fn with(finalizers: &[String], one: &str) -> Vec<String> {
    let mut all = finalizers.to_vec();
    if !all.iter().any(|finalizer| finalizer == one) {
        all.push(one.to_owned());
    }
    all
}

/// The text at a JSON pointer; empty where there is none.
pub(super) fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}
