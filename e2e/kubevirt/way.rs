//! The way of one VMIM, phase by phase, as virt-controller's migration controller and virt-handler take it.
//!
//! In: a VMIM seen for the first time. Out: a final one. Each step reads the objects anew, does what its phase asks for, and
//! says which phase comes next; an error (an API server that is away, a conflict) means that the step is tried again.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use migvisor::model::units::Bytes;
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    Job, Mover, Outcome, Shared,
    configuration::{Configuration, quantity, winner},
    monitor::{Monitor, Order, POLL},
    objects::{self, Side, now},
};

/// How often a waiting migration looks again.
const EVERY: Duration = Duration::from_millis(100);
const FINALIZER: &str = "kubevirt.io/migrationJobFinalize";
const VMI_NAME: &str = "kubevirt.io/vmi-name";
const TARGET_NODE: &str = "kubevirt.io/migrationTargetNodeName";
const NODE: &str = "kubevirt.io/nodeName";
const PENDING_TIMEOUT: &str = "kubevirt.io/migrationPendingPodTimeoutSeconds";
/// How long a target pod may stay pending, in seconds, where no annotation says otherwise.
const DEFAULT_PENDING_TIMEOUT: i64 = 900;
const CANCELED: &str = "Migration failed due to being canceled";

/// What a step found.
enum Step {
    /// Nothing yet: look again.
    Wait,
    /// On to the next phase.
    To(&'static str),
    /// It went so.
    End(Outcome),
    /// The object is gone or final: nothing left to do.
    Done,
}

/// One VMIM on its way.
pub(super) struct Way<M> {
    shared: Arc<Shared<M>>,
    namespace: String,
    name: String,
    uid: String,
    vmi_name: String,
    vmims: Api<DynamicObject>,
    vmis: Api<DynamicObject>,
    pods: Api<Pod>,
}

impl<M: Mover> Way<M> {
    pub(super) fn new(shared: Arc<Shared<M>>, vmim: &DynamicObject) -> Self {
        let namespace = vmim.namespace().unwrap_or_default();
        let client = &shared.client;
        Self {
            name: vmim.name_any(),
            uid: vmim.uid().unwrap_or_default(),
            vmi_name: text(&vmim.data, "/spec/vmiName"),
            vmims: objects::vmims(client, &namespace),
            vmis: objects::vmis(client, &namespace),
            pods: Api::namespaced(client.clone(), &namespace),
            namespace,
            shared,
        }
    }

    /// Takes it to its end. What a step found is not lost while the API server is away: it is written again until it is taken.
    pub(super) async fn walk(self) {
        let mut found = Step::Wait;
        loop {
            let written = match &found {
                Step::Wait => Ok(()),
                Step::To(phase) => self.enter(phase, None).await,
                Step::End(outcome) => self.finish(outcome).await,
                Step::Done => break,
            };
            let next = match written {
                Ok(()) if matches!(found, Step::End(_)) => Ok(Step::Done),
                // From here on the old step is done: an error below must not write it again.
                Ok(()) => {
                    found = Step::Wait;
                    self.step().await
                }
                Err(error) => Err(error),
            };
            match next {
                Ok(step) => found = step,
                Err(error) => tracing::debug!("migration {}/{}: {error:#}; trying again", self.namespace, self.name),
            }
            tokio::time::sleep(EVERY).await;
        }
        self.shared.slots.lock().await.remove(&self.uid);
    }

    async fn step(&self) -> Result<Step> {
        let Some(vmim) = self.this().await? else { return Ok(Step::Done) };
        let phase = text(&vmim.data, "/status/phase");
        let deleted = vmim.metadata.deletion_timestamp.is_some();
        if deleted && matches!(phase.as_str(), "" | "Pending" | "Scheduling" | "Scheduled") {
            self.delete_target_pod().await?;
            return Ok(Step::End(Outcome::failure(CANCELED)));
        }
        if matches!(phase.as_str(), "Succeeded" | "Failed") {
            return Ok(Step::Done);
        }
        let Some(vmi) = self.vmis.get_opt(&self.vmi_name).await? else {
            return Ok(Step::End(Outcome::failure(format!("VirtualMachineInstance {} not found", self.vmi_name))));
        };
        match phase.as_str() {
            "" => self.admit(&vmim, &vmi).await,
            "Pending" => self.queue(&vmim, &vmi).await,
            "Scheduling" => self.schedule(&vmim, &vmi).await,
            "Scheduled" => self.hand_off(&vmi).await,
            "PreparingTarget" => self.prepare_target().await,
            "TargetReady" => self.begin().await,
            "Running" => self.run(&vmi).await.map(Step::End),
            other => bail!("{} is no phase of a local migration", other),
        }
    }

    /// Takes the VMIM in; what virt-api would have refused ends here.
    async fn admit(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Step> {
        let patch =
            json!({ "metadata": { "labels": { VMI_NAME: self.vmi_name }, "finalizers": with(vmim.finalizers(), FINALIZER) } });
        self.vmims.patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        if matches!(text(&vmi.data, "/status/phase").as_str(), "Succeeded" | "Failed") {
            return Ok(Step::End(Outcome::failure("Cannot migrate VMI in finalized state.")));
        }
        if condition(vmi, "LiveMigratable").as_deref() == Some("False") {
            return Ok(Step::End(Outcome::failure("Cannot migrate VMI, it is not live migratable")));
        }
        let others = self.vmims.list(&ListParams::default()).await?;
        let in_flight = others.iter().find(|other| {
            other.uid().as_deref() != Some(&self.uid)
                && text(&other.data, "/spec/vmiName") == self.vmi_name
                && !matches!(text(&other.data, "/status/phase").as_str(), "" | "Succeeded" | "Failed")
        });
        if let Some(other) = in_flight {
            let reason =
                format!("in-flight migration detected. Active migration job ({}) is already in progress", other.name_any());
            return Ok(Step::End(Outcome::failure(reason)));
        }
        Ok(Step::To("Pending"))
    }

    /// Waits for a place within the parallel limits, then asks for the target pod.
    async fn queue(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Step> {
        let source = self.source(vmi).await?;
        if text(&vmim.data, "/status/migrationState/sourcePod") != source.pod {
            let patch = json!({ "status": { "migrationState": { "sourcePod": source.pod } } });
            self.vmims.patch_status(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        let configuration = Configuration::of_cluster(self.kubevirt().await?.as_ref());
        let limit = |name| usize::try_from(configuration.number(name)).unwrap_or(usize::MAX);
        {
            let mut slots = self.shared.slots.lock().await;
            if !slots.contains_key(&self.uid) {
                let outbound = slots.values().filter(|node| **node == source.node).count();
                if slots.len() >= limit("parallelMigrationsPerCluster") || outbound >= limit("parallelOutboundMigrationsPerNode")
                {
                    return Ok(Step::Wait);
                }
                slots.insert(self.uid.clone(), source.node);
            }
        }
        let pod = serde_json::from_value(objects::launcher_pod(vmi, &self.target_pod_name(), Some((&self.uid, &self.name))))?;
        match self.pods.create(&PostParams::default(), &pod).await {
            Ok(_) => {
                self.event(EventType::Normal, "SuccessfulCreate", &format!("Created migration target pod {}", pod.name_any()))
                    .await
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            Err(error) => return Err(error).context("cannot create the target pod"),
        }
        Ok(Step::To("Scheduling"))
    }

    /// Scheduler and kubelet: binds the pod unless it is gated, and lets it run.
    async fn schedule(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Step> {
        let Some(pod) = self.pods.get_opt(&self.target_pod_name()).await? else {
            return Ok(Step::End(Outcome::failure("Target pod is down")));
        };
        let spec = pod.spec.clone().unwrap_or_default();
        let node = match (spec.scheduling_gates.unwrap_or_default().is_empty(), spec.node_name) {
            (_, Some(node)) => Some(node),
            (true, None) => self.free_node(vmim, vmi).await?,
            (false, None) => None,
        };
        let Some(node) = node else {
            let timeout =
                vmim.annotations().get(PENDING_TIMEOUT).and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_PENDING_TIMEOUT);
            let age = pod.creation_timestamp().map_or(0, |created| jiff::Timestamp::now().duration_since(created.0).as_secs());
            if age > timeout {
                self.delete_target_pod().await?;
                return Ok(Step::End(Outcome::failure(format!("target pod is pending for longer than {timeout} seconds"))));
            }
            return Ok(Step::Wait);
        };
        if pod.spec.is_some_and(|spec| spec.node_name.is_none()) {
            objects::bind(&self.pods, &self.target_pod_name(), &node).await?;
        }
        objects::run(&self.pods, &self.target_pod_name()).await?;
        Ok(Step::To("Scheduled"))
    }

    /// The first node by name that may take the guest.
    async fn free_node(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Option<String>> {
        let source = text(&vmi.data, "/status/nodeName");
        let wanted = vmim.data.pointer("/spec/addedNodeSelector").and_then(Value::as_object).cloned().unwrap_or_default();
        let nodes: Api<Node> = Api::all(self.shared.client.clone());
        let schedulable = nodes.list(&ListParams::default().labels("kubevirt.io/schedulable=true")).await?;
        let fits = |node: &Node| {
            node.name_any() != source
                && !node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true))
                && wanted.iter().all(|(key, value)| node.labels().get(key).map(String::as_str) == value.as_str())
        };
        Ok(schedulable.iter().filter(|node| fits(node)).map(ResourceExt::name_any).min())
    }

    /// Resolves the configuration, once and for all, and hands the migration over to the nodes.
    async fn hand_off(&self, vmi: &DynamicObject) -> Result<Step> {
        let Some(target) = self.target().await? else { return Ok(Step::End(Outcome::failure("Target pod is down"))) };
        let source = self.source(vmi).await?;
        let namespaces: Api<Namespace> = Api::all(self.shared.client.clone());
        let namespace = namespaces.get(&self.namespace).await?;
        let policies: Api<DynamicObject> = Api::all_with(self.shared.client.clone(), &objects::policy_resource());
        let policies = policies.list(&ListParams::default()).await?.items;
        let policies = policies.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
        let policy = winner(&policies, vmi.labels(), namespace.labels());
        let configuration = Configuration::of_cluster(self.kubevirt().await?.as_ref()).under(policy);
        let mut state = json!({
            "migrationUid": self.uid,
            "sourceNode": source.node,
            "sourcePod": source.pod,
            "targetNode": target.node,
            "targetPod": target.pod,
            "migrationConfiguration": configuration.to_json(),
        });
        if let Some(name) = policy.and_then(|policy| policy.pointer("/metadata/name")) {
            state["migrationPolicyName"] = name.clone();
        }
        self.update_vmi(|vmi| {
            vmi.labels_mut().insert(TARGET_NODE.to_owned(), target.node.clone());
            vmi.data["status"]["migrationState"] = state.clone();
        })
        .await?;
        self.event(EventType::Normal, "SuccessfulHandOver", "Migration target pod is ready for preparation by virt-handler.")
            .await;
        Ok(Step::To("PreparingTarget"))
    }

    /// virt-handler of the target node: somebody listens there.
    async fn prepare_target(&self) -> Result<Step> {
        let target = self.target().await?;
        self.update_vmi(|vmi| {
            let state = &mut vmi.data["status"]["migrationState"];
            state["targetNodeAddress"] = json!("127.0.0.1");
            state["targetDirectMigrationNodePorts"] = json!({});
            if let Some(target) = &target {
                vmi.data["status"]["activePods"][&target.pod_uid] = json!(target.node);
            }
        })
        .await?;
        Ok(Step::To("TargetReady"))
    }

    /// virt-handler of the source node: off it goes.
    async fn begin(&self) -> Result<Step> {
        self.update_vmi(|vmi| vmi.data["status"]["migrationState"]["startTimestamp"] = json!(now())).await?;
        Ok(Step::To("Running"))
    }

    /// Lets the mover work under KubeVirt's rules and passes on a cancellation.
    async fn run(&self, vmi: &DynamicObject) -> Result<Outcome> {
        let state = &vmi.data["status"]["migrationState"];
        let Some(target) = self.target().await? else { return Ok(Outcome::failure("Target pod is down")) };
        let source = self.source(vmi).await?;
        let configuration = Configuration::of_json(&state["migrationConfiguration"]);
        let memory = memory(vmi)?;
        let budget = configuration.time_budget(memory);
        let (give, orders) = watch::channel(Order::GoOn);
        let mut monitor = Monitor::new(&configuration, budget);
        let job = Job {
            namespace: self.namespace.clone(),
            vmi: self.vmi_name.clone(),
            object: vmi.clone(),
            migration_uid: self.uid.clone(),
            memory,
            source,
            target,
            bandwidth: configuration.bandwidth(),
            configuration,
            time_budget: budget,
            orders,
        };
        let mut moving = std::pin::pin!(self.shared.mover.migrate(job));
        let start = Instant::now();
        let mut looks = tokio::time::interval(POLL);
        let mut cancelled = false;
        loop {
            tokio::select! {
                outcome = &mut moving => return Ok(outcome),
                _ = looks.tick() => {}
            }
            // A look that fails is followed by another.
            let deleted = matches!(self.this().await, Ok(Some(vmim)) if vmim.metadata.deletion_timestamp.is_some());
            let order = monitor.tick(start.elapsed());
            if deleted && !cancelled && order != Order::StartPostCopy {
                cancelled = self.request_abort().await.is_ok();
            }
            let order = if cancelled { Order::Abort } else { order };
            let changed = give.send_if_modified(|last| std::mem::replace(last, order) != order);
            if changed && let Some(mode) = mode(order) {
                let told = self.update_vmi(|vmi| vmi.data["status"]["migrationState"]["mode"] = json!(mode)).await;
                let _ = told.inspect_err(|error| tracing::debug!("cannot tell the mode: {error:#}"));
            }
        }
    }

    async fn request_abort(&self) -> Result<()> {
        self.update_vmi(|vmi| {
            vmi.data["status"]["migrationState"]["abortRequested"] = json!(true);
            vmi.data["status"]["migrationState"]["abortStatus"] = json!("Aborting");
        })
        .await?;
        self.event(EventType::Normal, "SuccessfulAbortMigration", "Migration aborted").await;
        Ok(())
    }

    /// Leaves everything as it has to be after the outcome: VMI, pods, VMIM. May be repeated.
    async fn finish(&self, outcome: &Outcome) -> Result<()> {
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
        Ok(())
    }

    /// Writes the phase, when it was entered, and what else belongs to it.
    async fn enter(&self, phase: &str, state: Option<&Value>) -> Result<()> {
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
    async fn this(&self) -> Result<Option<DynamicObject>> {
        let found = self.vmims.get_opt(&self.name).await?;
        Ok(found.filter(|vmim| vmim.uid().as_deref() == Some(&self.uid)))
    }

    async fn kubevirt(&self) -> Result<Option<Value>> {
        let api: Api<DynamicObject> = Api::all_with(self.shared.client.clone(), &objects::kubevirt_resource());
        let found = api.list(&ListParams::default()).await?.items.into_iter().next();
        Ok(found.map(serde_json::to_value).transpose()?)
    }

    /// Where the VMI runs: the active pod on its node.
    async fn source(&self, vmi: &DynamicObject) -> Result<Side> {
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
    async fn target(&self) -> Result<Option<Side>> {
        let Some(pod) = self.pods.get_opt(&self.target_pod_name()).await? else { return Ok(None) };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        Ok(node.map(|node| Side { node, pod: pod.name_any(), pod_uid: pod.uid().unwrap_or_default() }))
    }

    fn target_pod_name(&self) -> String {
        let short: String = self.uid.chars().filter(char::is_ascii_alphanumeric).take(5).collect();
        format!("virt-launcher-{}-{short}", self.vmi_name)
    }

    /// At once: no kubelet is there to end it first.
    async fn delete_target_pod(&self) -> Result<()> {
        match self.pods.delete(&self.target_pod_name(), &DeleteParams::default().grace_period(0)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(error).context("cannot delete the target pod"),
        }
    }

    /// A plain update (VMIs have no status subresource), again where somebody else was quicker.
    async fn update_vmi(&self, change: impl Fn(&mut DynamicObject)) -> Result<DynamicObject> {
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

    async fn event(&self, kind: EventType, reason: &str, note: &str) {
        let reporter = Reporter { controller: "virtualmachineinstancemigration-controller".to_owned(), instance: None };
        let reference = k8s_openapi::api::core::v1::ObjectReference {
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
        if let Err(error) = Recorder::new(self.shared.client.clone(), reporter).publish(&event, &reference).await {
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

/// `migrationState.mode` under an order.
fn mode(order: Order) -> Option<&'static str> {
    match order {
        Order::GoOn | Order::Abort => None,
        Order::StartPostCopy => Some("PostCopy"),
        Order::SuspendGuest => Some("Paused"),
    }
}

/// The guest's memory: what KubeVirt's budget is computed from.
fn memory(vmi: &DynamicObject) -> Result<Bytes> {
    ["/spec/domain/memory/guest", "/spec/domain/resources/requests/memory"]
        .iter()
        .find_map(|path| vmi.data.pointer(path).and_then(quantity))
        .map(Bytes)
        .context("the VMI says nowhere how much memory it has")
}

fn condition(vmi: &DynamicObject, kind: &str) -> Option<String> {
    let conditions = vmi.data.pointer("/status/conditions")?.as_array()?;
    conditions.iter().find(|condition| condition["type"] == kind)?["status"].as_str().map(str::to_owned)
}

fn with(finalizers: &[String], one: &str) -> Vec<String> {
    let mut all = finalizers.to_vec();
    if !all.iter().any(|finalizer| finalizer == one) {
        all.push(one.to_owned());
    }
    all
}

/// The text at a JSON pointer; empty where there is none.
fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}
