//! virt-handler's and virt-launcher's part, on every node at once: makes the target ready, has the guest moved under KubeVirt's rules, and
//! writes on the VMI how it went. After KubeVirt 1.9's `pkg/virt-handler/migration-{source,target}.go`.
//!
//! In: VMIs whose `status.migrationState` says what is to be done. Out: the rest of `migrationState`, the VMI on its new node. What differs:
//! the target pod of a migration that failed is deleted here; KubeVirt leaves it to end by itself.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use kube::{
    ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams},
    runtime::events::EventType,
};
use migvisor::model::units::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    Job, Mover, Outcome,
    configuration::{Configuration, quantity},
    core::{Change, Core},
    migration::TARGET_NODE,
    monitor::{Monitor, Order, POLL},
    objects::{self, NODE, Side, now},
    queue::{Limiter, Queue},
    read::{flag, is_final, key, text},
};

/// All virt-handlers.
pub(super) struct Handlers<M> {
    core: Arc<Core>,
    mover: Arc<M>,
    queue: Queue,
    /// The migrations that run, by the UID of their VMIM, and how to end them.
    running: Arc<Mutex<HashMap<String, watch::Sender<bool>>>>,
    /// The migrations whose target is being made ready.
    preparing: Arc<Mutex<HashSet<String>>>,
}

impl<M: Mover> Handlers<M> {
    pub(super) fn new(core: Arc<Core>, mover: Arc<M>) -> Self {
        Self { core, mover, queue: Queue::new(Limiter::DEFAULT), running: Arc::default(), preparing: Arc::default() }
    }

    /// Works for ever; what it has started ends with it.
    pub(super) async fn run(self, mut changes: mpsc::UnboundedReceiver<Change>) {
        let listen = async {
            while let Some(change) = changes.recv().await {
                if let Change::Vmi(vmi) = change {
                    self.queue.add(&key(vmi.as_ref()), 0);
                }
            }
        };
        let work = async {
            let mut jobs = JoinSet::new();
            loop {
                let (key, _) = self.queue.next().await;
                match self.execute(&key, &mut jobs).await {
                    Ok(()) => self.queue.forget(&key),
                    Err(error) => {
                        tracing::debug!("VMI {key}: {error:#}; trying again");
                        self.queue.retry(&key, 0);
                    }
                }
                while jobs.try_join_next().is_some() {}
            }
        };
        tokio::join!(listen, work);
    }

    async fn execute(&self, key: &str, jobs: &mut JoinSet<()>) -> Result<()> {
        let Some(vmi) = self.core.vmi(key) else { return Ok(()) };
        let state = &vmi.data["status"]["migrationState"];
        let uid = text(state, "/migrationUid");
        if uid.is_empty() {
            return Ok(());
        }
        if flag(state, "/abortRequested") || is_final(&vmi) || vmi.metadata.deletion_timestamp.is_some() || flag(state, "/failed")
        {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(abort) = running.get(&uid) {
                abort.send_replace(true);
            }
        }
        if flag(state, "/completed") || flag(state, "/failed") || is_final(&vmi) {
            return Ok(());
        }
        if text(state, "/targetNodeAddress").is_empty() {
            return self.prepare(&vmi, &uid, jobs).await;
        }
        if text(state, "/startTimestamp").is_empty() {
            let mut vmi = (*vmi).clone();
            vmi.data["status"]["migrationState"]["startTimestamp"] = json!(now());
            self.core.replace_vmi(&vmi).await?;
            return Ok(());
        }
        self.begin(&vmi, &uid, jobs).await
    }

    /// virt-handler of the target node: somebody listens there, after a while.
    async fn prepare(&self, vmi: &DynamicObject, uid: &str, jobs: &mut JoinSet<()>) -> Result<()> {
        let Some(target) = self.side(vmi, "target").await? else { return Ok(()) };
        if !self.preparing.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned()) {
            return Ok(());
        }
        let (core, mover, preparing) = (Arc::clone(&self.core), Arc::clone(&self.mover), Arc::clone(&self.preparing));
        let (vmi, uid) = (vmi.clone(), uid.to_owned());
        jobs.spawn(async move {
            mover.prepare(&target).await;
            let told = core.update_vmi(&vmi, |vmi| {
                let status = &mut vmi.data["status"];
                if text(status, "/migrationState/migrationUid") == uid && !flag(status, "/migrationState/completed") {
                    status["migrationState"]["targetNodeAddress"] = json!("127.0.0.1");
                    status["migrationState"]["targetDirectMigrationNodePorts"] = json!({});
                    status["activePods"][&target.pod_uid] = json!(target.node);
                }
            });
            // What could not be told is done again, the next time that the VMI is looked at.
            let _ = told.await.inspect_err(|error| tracing::debug!("cannot tell that the target is ready: {error:#}"));
            preparing.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        });
        Ok(())
    }

    /// virt-handler of the source node: off it goes, once.
    async fn begin(&self, vmi: &DynamicObject, uid: &str, jobs: &mut JoinSet<()>) -> Result<()> {
        if self.running.lock().unwrap_or_else(PoisonError::into_inner).contains_key(uid) {
            return Ok(());
        }
        // Without its pods there is nothing to move; virt-controller sees that, too.
        let (Some(source), Some(target)) = (self.side(vmi, "source").await?, self.side(vmi, "target").await?) else {
            return Ok(());
        };
        let configuration = Configuration::of_json(&vmi.data["status"]["migrationState"]["migrationConfiguration"]);
        let memory = memory(vmi)?;
        let (give, orders) = watch::channel(Order::GoOn);
        let (abort, aborted) = watch::channel(false);
        let job = Job {
            namespace: vmi.namespace().unwrap_or_default(),
            vmi: vmi.name_any(),
            object: vmi.clone(),
            migration_uid: uid.to_owned(),
            memory,
            source,
            target,
            bandwidth: configuration.bandwidth(),
            time_budget: configuration.time_budget(memory),
            configuration,
            orders,
        };
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), abort);
        let (core, mover, running) = (Arc::clone(&self.core), Arc::clone(&self.mover), Arc::clone(&self.running));
        let (uid, vmi, target) = (uid.to_owned(), vmi.clone(), job.target.clone());
        jobs.spawn(async move {
            core.event(&vmi, EventType::Normal, "Migrating", "VirtualMachineInstance is migrating.").await;
            let outcome = watch_over(&core, &vmi, mover.as_ref(), job, &give, aborted).await;
            // An API server that is away is waited for.
            while let Err(error) = conclude(&core, &vmi, &uid, &outcome, &target).await {
                tracing::debug!("cannot write how the migration {uid} went: {error:#}; trying again");
                tokio::time::sleep(POLL).await;
            }
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        });
        Ok(())
    }

    /// One side of the migration, if its pod is there.
    async fn side(&self, vmi: &DynamicObject, which: &str) -> Result<Option<Side>> {
        let state = &vmi.data["status"]["migrationState"];
        let (pod, node) = (text(state, &format!("/{which}Pod")), text(state, &format!("/{which}Node")));
        let found = self.core.api_pods(vmi.namespace()).get_opt(&pod).await?;
        Ok(found.map(|found| Side { node, pod, pod_uid: found.uid().unwrap_or_default() }))
    }
}

/// virt-launcher: lets the mover work under KubeVirt's rules and passes on a cancellation.
async fn watch_over<M: Mover>(
    core: &Core,
    vmi: &DynamicObject,
    mover: &M,
    job: Job,
    give: &watch::Sender<Order>,
    mut aborted: watch::Receiver<bool>,
) -> Outcome {
    let mut monitor = Monitor::new(&job.configuration, job.time_budget);
    let mut moving = std::pin::pin!(mover.migrate(job));
    let start = Instant::now();
    let mut looks = tokio::time::interval(POLL);
    let mut cancelled = false;
    loop {
        let cancel = async {
            if cancelled || aborted.wait_for(|wanted| *wanted).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let now_cancelled = tokio::select! {
            outcome = &mut moving => return outcome,
            () = cancel => true,
            _ = looks.tick() => false,
        };
        let order = monitor.tick(start.elapsed());
        // Post-copy cannot be undone.
        cancelled |= now_cancelled && order != Order::StartPostCopy;
        let order = if cancelled { Order::Abort } else { order };
        let changed = give.send_if_modified(|last| std::mem::replace(last, order) != order);
        if changed && let Some(mode) = mode(order) {
            let told = core.update_vmi(vmi, |vmi| vmi.data["status"]["migrationState"]["mode"] = json!(mode)).await;
            let _ = told.inspect_err(|error| tracing::debug!("cannot tell the mode: {error:#}"));
        }
    }
}

/// Leaves everything as it has to be after the outcome. May be repeated.
async fn conclude(core: &Core, vmi: &DynamicObject, uid: &str, outcome: &Outcome, target: &Side) -> Result<()> {
    let written = core.update_vmi(vmi, |vmi| {
        if text(&vmi.data, "/status/migrationState/migrationUid") == uid {
            write_outcome(vmi, outcome, target);
        }
    });
    let pods = core.api_pods(vmi.namespace());
    let vmi = match written.await {
        Ok(vmi) => vmi,
        // The VMI is gone, and its pods with it.
        Err(error) if matches!(error.downcast_ref(), Some(kube::Error::Api(status)) if status.is_not_found()) => return Ok(()),
        Err(error) => return Err(error),
    };
    if outcome.succeeded {
        let left = text(&vmi.data, "/status/migrationState/sourcePod");
        // The pod that the guest has left; somebody may have removed it.
        if pods.get_opt(&left).await?.is_some() {
            pods.patch_status(&left, &PatchParams::default(), &Patch::Strategic(objects::ended())).await?;
        }
        let note = format!("The VirtualMachineInstance migrated to node {}.", target.node);
        core.event(&vmi, EventType::Normal, "Migrated", &note).await;
        return Ok(());
    }
    match pods.delete(&target.pod, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => {}
        deleted => drop(deleted.context("cannot delete the target pod")?),
    }
    let reason = outcome.failure_reason.as_deref().unwrap_or_default();
    let note = format!("VirtualMachineInstance migration uid {uid} failed. reason:{reason}");
    core.event(&vmi, EventType::Warning, "Migrated", &note).await;
    Ok(())
}

fn write_outcome(vmi: &mut DynamicObject, outcome: &Outcome, target: &Side) {
    vmi.labels_mut().remove(TARGET_NODE);
    let state = &mut vmi.data["status"]["migrationState"];
    if state["endTimestamp"].is_null() {
        state["endTimestamp"] = json!(now());
    }
    state["completed"] = json!(true);
    if let Some(reason) = &outcome.failure_reason {
        state["failed"] = json!(true);
        if state["failureReason"].is_null() {
            state["failureReason"] = json!(reason);
        }
    }
    if state["abortRequested"] == json!(true) {
        state["abortStatus"] = json!(if outcome.succeeded { "Failed" } else { "Succeeded" });
    }
    if !outcome.succeeded {
        if let Some(active) = vmi.data["status"]["activePods"].as_object_mut() {
            active.remove(&target.pod_uid);
        }
        return;
    }
    state["targetNodeDomainDetected"] = json!(true);
    state["targetNodeDomainReadyTimestamp"] = json!(now());
    vmi.labels_mut().insert(NODE.to_owned(), target.node.clone());
    vmi.annotations_mut().remove("kubevirt.io/eviction-source");
    let status = &mut vmi.data["status"];
    status["nodeName"] = json!(target.node);
    status["activePods"] = json!({ target.pod_uid.as_str(): target.node });
    status["launcherContainerImageVersion"] = json!(objects::LAUNCHER);
    if let Some(conditions) = status["conditions"].as_array_mut() {
        conditions.retain(|it| it["type"] != "MigrationRequired");
    }
    if let Some(status) = status.as_object_mut() {
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
        .find_map(|path| vmi.data.pointer(path).and_then(|value: &Value| quantity(value)))
        .map(Bytes)
        .context("the VMI says nowhere how much memory it has")
}
