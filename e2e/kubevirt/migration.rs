//! The way of one VMIM, phase by phase, as virt-controller's migration controller and virt-handler take it.
//!
//! In: a VMIM seen for the first time. Out: a final one. Each step reads the objects anew, does what its phase asks for, and
//! says which phase comes next; an error (an API server that is away, a conflict) means that the step is tried again.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams, PostParams},
    runtime::events::EventType,
};
use migvisor::model::units::Bytes;
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    Job, Mover, Outcome, Shared,
    configuration::{Configuration, quantity, winner},
    hands::{FINALIZER, Hands, TARGET_NODE, text, with},
    monitor::{Monitor, Order, POLL},
    objects::{self, now},
};

/// How often a waiting migration looks again.
const EVERY: Duration = Duration::from_millis(100);
const VMI_NAME: &str = "kubevirt.io/vmi-name";
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
    on: Hands,
}

impl<M: Mover> Way<M> {
    pub(super) fn new(shared: Arc<Shared<M>>, vmim: &DynamicObject) -> Self {
        let on = Hands::new(&shared.client, vmim);
        Self { shared, on }
    }

    /// Takes it to its end. What a step found is not lost while the API server is away: it is written again until it is taken.
    pub(super) async fn walk(self) {
        let mut found = Step::Wait;
        loop {
            let written = match &found {
                Step::Wait => Ok(()),
                Step::To(phase) => self.on.enter(phase, None).await,
                Step::End(outcome) => self.on.finish(outcome).await,
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
                Err(error) => tracing::debug!("migration {}/{}: {error:#}; trying again", self.on.namespace, self.on.name),
            }
            tokio::time::sleep(EVERY).await;
        }
        self.shared.slots.lock().await.remove(&self.on.uid);
    }

    async fn step(&self) -> Result<Step> {
        let Some(vmim) = self.on.this().await? else { return Ok(Step::Done) };
        let phase = text(&vmim.data, "/status/phase");
        let deleted = vmim.metadata.deletion_timestamp.is_some();
        if deleted && matches!(phase.as_str(), "" | "Pending" | "Scheduling" | "Scheduled") {
            self.on.delete_target_pod().await?;
            return Ok(Step::End(Outcome::failure(CANCELED)));
        }
        if matches!(phase.as_str(), "Succeeded" | "Failed") {
            return Ok(Step::Done);
        }
        let Some(vmi) = self.on.vmis.get_opt(&self.on.vmi_name).await? else {
            return Ok(Step::End(Outcome::failure(format!("VirtualMachineInstance {} not found", self.on.vmi_name))));
        };
        match phase.as_str() {
            "" => self.admit(&vmim, &vmi).await,
            "Pending" => self.queue(&vmim, &vmi).await,
            "Scheduling" => self.schedule(&vmim, &vmi).await,
            "Scheduled" => self.hand_off(&vmi).await,
            "PreparingTarget" => self.prepare_target().await,
            "TargetReady" => self.begin().await,
            "Running" => self.run(&vmi).await.map(Step::End),
            other => bail!("{other} is no phase of a local migration"),
        }
    }

    /// Takes the VMIM in; what virt-api would have refused ends here.
    async fn admit(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Step> {
        let patch =
            json!({ "metadata": { "labels": { VMI_NAME: self.on.vmi_name }, "finalizers": with(vmim.finalizers(), FINALIZER) } });
        self.on.vmims.patch(&self.on.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        if matches!(text(&vmi.data, "/status/phase").as_str(), "Succeeded" | "Failed") {
            return Ok(Step::End(Outcome::failure("Cannot migrate VMI in finalized state.")));
        }
        if condition(vmi, "LiveMigratable").as_deref() == Some("False") {
            return Ok(Step::End(Outcome::failure("Cannot migrate VMI, it is not live migratable")));
        }
        let others = self.on.vmims.list(&ListParams::default()).await?;
        let in_flight = others.iter().find(|other| {
            other.uid().as_deref() != Some(&self.on.uid)
                && text(&other.data, "/spec/vmiName") == self.on.vmi_name
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
        let source = self.on.source(vmi).await?;
        if text(&vmim.data, "/status/migrationState/sourcePod") != source.pod {
            let patch = json!({ "status": { "migrationState": { "sourcePod": source.pod } } });
            self.on.vmims.patch_status(&self.on.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        let configuration = Configuration::of_cluster(self.on.kubevirt().await?.as_ref());
        let limit = |name| usize::try_from(configuration.number(name)).unwrap_or(usize::MAX);
        {
            let mut slots = self.shared.slots.lock().await;
            if !slots.contains_key(&self.on.uid) {
                let outbound = slots.values().filter(|node| **node == source.node).count();
                if slots.len() >= limit("parallelMigrationsPerCluster") || outbound >= limit("parallelOutboundMigrationsPerNode")
                {
                    return Ok(Step::Wait);
                }
                slots.insert(self.on.uid.clone(), source.node);
            }
        }
        let pod =
            serde_json::from_value(objects::launcher_pod(vmi, &self.on.target_pod_name(), Some((&self.on.uid, &self.on.name))))?;
        match self.on.pods.create(&PostParams::default(), &pod).await {
            Ok(_) => {
                self.on.event(EventType::Normal, "SuccessfulCreate", &format!("Created target pod {}", pod.name_any())).await;
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            Err(error) => return Err(error).context("cannot create the target pod"),
        }
        Ok(Step::To("Scheduling"))
    }

    /// Scheduler and kubelet: binds the pod unless it is gated, and lets it run.
    async fn schedule(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Step> {
        let Some(pod) = self.on.pods.get_opt(&self.on.target_pod_name()).await? else {
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
                self.on.delete_target_pod().await?;
                return Ok(Step::End(Outcome::failure(format!("target pod is pending for longer than {timeout} seconds"))));
            }
            return Ok(Step::Wait);
        };
        if pod.spec.is_some_and(|spec| spec.node_name.is_none()) {
            objects::bind(&self.on.pods, &self.on.target_pod_name(), &node).await?;
        }
        objects::run(&self.on.pods, &self.on.target_pod_name()).await?;
        Ok(Step::To("Scheduled"))
    }

    /// The first node by name that may take the guest.
    async fn free_node(&self, vmim: &DynamicObject, vmi: &DynamicObject) -> Result<Option<String>> {
        let source = text(&vmi.data, "/status/nodeName");
        let wanted = vmim.data.pointer("/spec/addedNodeSelector").and_then(Value::as_object).cloned().unwrap_or_default();
        let nodes: Api<Node> = Api::all(self.on.client.clone());
        let schedulable = nodes.list(&ListParams::default().labels("kubevirt.io/schedulable=true")).await?;
        let fits = |node: &Node| {
            node.name_any() != source
                && node.spec.as_ref().is_none_or(|spec| spec.unschedulable != Some(true))
                && wanted.iter().all(|(key, value)| node.labels().get(key).map(String::as_str) == value.as_str())
        };
        Ok(schedulable.iter().filter(|node| fits(node)).map(ResourceExt::name_any).min())
    }

    /// Resolves the configuration, once and for all, and hands the migration over to the nodes.
    async fn hand_off(&self, vmi: &DynamicObject) -> Result<Step> {
        let Some(target) = self.on.target().await? else { return Ok(Step::End(Outcome::failure("Target pod is down"))) };
        let source = self.on.source(vmi).await?;
        let namespaces: Api<Namespace> = Api::all(self.on.client.clone());
        let namespace = namespaces.get(&self.on.namespace).await?;
        let policies: Api<DynamicObject> = Api::all_with(self.on.client.clone(), &objects::policy_resource());
        let policies = policies.list(&ListParams::default()).await?.items;
        let policies = policies.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
        let policy = winner(&policies, vmi.labels(), namespace.labels());
        let configuration = Configuration::of_cluster(self.on.kubevirt().await?.as_ref()).under(policy);
        let mut state = json!({
            "migrationUid": self.on.uid,
            "sourceNode": source.node,
            "sourcePod": source.pod,
            "targetNode": target.node,
            "targetPod": target.pod,
            "migrationConfiguration": configuration.to_json(),
        });
        if let Some(name) = policy.and_then(|policy| policy.pointer("/metadata/name")) {
            state["migrationPolicyName"] = name.clone();
        }
        self.on
            .update_vmi(|vmi| {
                vmi.labels_mut().insert(TARGET_NODE.to_owned(), target.node.clone());
                vmi.data["status"]["migrationState"] = state.clone();
            })
            .await?;
        self.on
            .event(EventType::Normal, "SuccessfulHandOver", "Migration target pod is ready for preparation by virt-handler.")
            .await;
        Ok(Step::To("PreparingTarget"))
    }

    /// virt-handler of the target node: somebody listens there.
    async fn prepare_target(&self) -> Result<Step> {
        let target = self.on.target().await?;
        self.on
            .update_vmi(|vmi| {
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
        self.on.update_vmi(|vmi| vmi.data["status"]["migrationState"]["startTimestamp"] = json!(now())).await?;
        Ok(Step::To("Running"))
    }

    /// Lets the mover work under KubeVirt's rules and passes on a cancellation.
    async fn run(&self, vmi: &DynamicObject) -> Result<Outcome> {
        let state = &vmi.data["status"]["migrationState"];
        let Some(target) = self.on.target().await? else { return Ok(Outcome::failure("Target pod is down")) };
        let source = self.on.source(vmi).await?;
        let configuration = Configuration::of_json(&state["migrationConfiguration"]);
        let memory = memory(vmi)?;
        let budget = configuration.time_budget(memory);
        let (give, orders) = watch::channel(Order::GoOn);
        let mut monitor = Monitor::new(&configuration, budget);
        let job = Job {
            namespace: self.on.namespace.clone(),
            vmi: self.on.vmi_name.clone(),
            object: vmi.clone(),
            migration_uid: self.on.uid.clone(),
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
            let deleted = matches!(self.on.this().await, Ok(Some(vmim)) if vmim.metadata.deletion_timestamp.is_some());
            let order = monitor.tick(start.elapsed());
            if deleted && !cancelled && order != Order::StartPostCopy {
                cancelled = self.request_abort().await.is_ok();
            }
            let order = if cancelled { Order::Abort } else { order };
            let changed = give.send_if_modified(|last| std::mem::replace(last, order) != order);
            if changed && let Some(mode) = mode(order) {
                let told = self.on.update_vmi(|vmi| vmi.data["status"]["migrationState"]["mode"] = json!(mode)).await;
                let _ = told.inspect_err(|error| tracing::debug!("cannot tell the mode: {error:#}"));
            }
        }
    }

    async fn request_abort(&self) -> Result<()> {
        self.on
            .update_vmi(|vmi| {
                vmi.data["status"]["migrationState"]["abortRequested"] = json!(true);
                vmi.data["status"]["migrationState"]["abortStatus"] = json!("Aborting");
            })
            .await?;
        self.on.event(EventType::Normal, "SuccessfulAbortMigration", "Migration aborted").await;
        Ok(())
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
