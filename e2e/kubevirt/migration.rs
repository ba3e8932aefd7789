//! virt-controller's migration controller: what it does in each phase of a VMIM. After KubeVirt 1.9's
//! `pkg/virt-controller/watch/migration/migration.go` (`Execute`, `execute`, `sync`, `handleTargetPodHandoff`); the phases themselves are
//! in [`super::status`].
//!
//! In: VMIMs, VMIs and target pods, from the caches. Out: target pods, the hand-over to virt-handler, statuses, events. Not here:
//! backend storage, utility volumes, backups, decentralized migrations, host-model CPUs.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt,
    api::{DeleteParams, DynamicObject, PostParams},
    runtime::events::EventType,
};
use serde_json::json;
use tokio::sync::mpsc;

use super::{
    backoff,
    configuration::{Configuration, winner},
    core::{Change, Core},
    limits,
    objects::{self, now},
    queue::{Limiter, Queue},
    read::{JOB, flag, has_hotplug_volumes, is_down, is_final, is_ready, is_target, key, priority, text, vmi_key},
    status, timeouts,
};

pub(super) const TARGET_NODE: &str = "kubevirt.io/migrationTargetNodeName";
const OBSERVED: &str = "kubevirt.io/latest-observed-api-version";
const VMI_NAME: &str = "kubevirt.io/vmi-name";
/// What a running migration, and a waiting one that only has a deadline, are worth in the queue.
pub(super) const RUNNING: i64 = 1000;

/// A VMIM and what belongs to it, as the caches have it.
pub(super) struct Seen {
    pub(super) vmim: Arc<DynamicObject>,
    pub(super) vmi: Arc<DynamicObject>,
    /// The target pod.
    pub(super) pod: Option<Arc<Pod>>,
    /// The pod that holds the hotplugged volumes on the target's side.
    pub(super) attachment: Option<Arc<Pod>>,
}

impl Seen {
    pub(super) fn phase(&self) -> String {
        text(&self.vmim.data, "/status/phase")
    }

    pub(super) fn uid(&self) -> String {
        self.vmim.uid().unwrap_or_default()
    }

    pub(super) fn is_deleted(&self) -> bool {
        self.vmim.metadata.deletion_timestamp.is_some()
    }

    /// Is the VMI's migrationState this migration's?
    pub(super) fn owns_state(&self) -> bool {
        text(&self.vmi.data, "/status/migrationState/migrationUid") == self.uid()
    }

    /// Does the VMI say anything of any migration? (`IsMigrationSynchronized` of a local one.)
    pub(super) fn has_state(&self) -> bool {
        self.vmi.data.pointer("/status/migrationState").is_some_and(serde_json::Value::is_object)
    }

    pub(super) fn state(&self, field: &str) -> bool {
        flag(&self.vmi.data, &format!("/status/migrationState/{field}"))
    }

    pub(super) fn state_text(&self, field: &str) -> String {
        text(&self.vmi.data, &format!("/status/migrationState/{field}"))
    }
}

/// The controller.
pub(super) struct Migrations {
    pub(super) core: Arc<Core>,
    pub(super) queue: Queue,
    /// VMIMs whose pod was made and has not been seen yet: nothing new is started meanwhile.
    expected: Mutex<HashSet<String>>,
    /// VMIMs that were handed over, whether or not the caches know.
    handed_over: Mutex<HashSet<String>>,
}

impl Migrations {
    pub(super) fn new(core: Arc<Core>) -> Self {
        let queue = Queue::new(Limiter::DEFAULT);
        Self { core, queue, expected: Mutex::default(), handed_over: Mutex::default() }
    }

    /// Works for ever.
    pub(super) async fn run(self, mut changes: mpsc::UnboundedReceiver<Change>) {
        let listen = async {
            while let Some(change) = changes.recv().await {
                self.enqueue(&change);
            }
        };
        let work = async {
            loop {
                let (key, priority) = self.queue.next().await;
                match self.execute(&key).await {
                    Ok(()) => self.queue.forget(&key),
                    Err(error) => {
                        tracing::debug!("migration {key}: {error:#}; trying again");
                        self.queue.retry(&key, priority);
                    }
                }
            }
        };
        tokio::join!(listen, work);
    }

    fn enqueue(&self, change: &Change) {
        match change {
            Change::Vmim(vmim) => self.add(vmim),
            Change::Vmi(vmi) => self.core.vmims_of(vmi).iter().for_each(|vmim| self.add(vmim)),
            Change::Pod(pod) => {
                let job = pod.labels().get(JOB).cloned().unwrap_or_default();
                lock(&self.expected).remove(&job);
                let of_job = |vmim: &&Arc<DynamicObject>| vmim.uid().as_deref() == Some(job.as_str());
                self.core.vmims().iter().filter(of_job).for_each(|vmim| self.add(vmim));
            }
            Change::Node(_) => {}
            // The limits may have changed.
            Change::KubeVirt => self.core.vmims().iter().for_each(|vmim| self.add(vmim)),
        }
    }

    fn add(&self, vmim: &DynamicObject) {
        let running = text(&vmim.data, "/status/phase") == "Running";
        self.queue.add(&key(vmim), if running { RUNNING } else { priority(vmim) });
    }

    async fn execute(&self, name: &str) -> Result<()> {
        let Some(vmim) = self.core.vmim(name) else { return Ok(()) };
        if !vmim.annotations().contains_key(OBSERVED) {
            return self.observe(&vmim).await;
        }
        let Some(vmi) = self.core.vmi(&vmi_key(&vmim)) else {
            if vmim.metadata.deletion_timestamp.is_none() {
                let deleted = self.core.api_vmims(&vmim).delete(&vmim.name_any(), &DeleteParams::default()).await;
                deleted.map(drop).context("cannot delete the migration of a VMI that is gone")?;
            }
            return Ok(());
        };
        let uid = vmim.uid().unwrap_or_default();
        let pod = self.target_pod(&vmi, &uid);
        let attachment = pod.as_ref().and_then(|pod| self.core.pods_of(&pod.uid().unwrap_or_default()).into_iter().next());
        let seen = Seen { vmim, vmi, pod, attachment };
        let satisfied = !lock(&self.expected).contains(&uid);
        let synced = if satisfied { self.sync(name, &seen).await } else { Ok(()) };
        let handed_over = seen.owns_state() || lock(&self.handed_over).contains(&uid);
        status::update(&self.core, &seen, handed_over).await?;
        synced?;
        if is_final(&seen.vmim) {
            limits::forget_old(&self.core, &seen.vmi).await?;
            // A place is free.
            for pending in limits::pending_by_priority(&self.core) {
                self.queue.add(&key(pending.as_ref()), priority(&pending));
            }
        }
        Ok(())
    }

    /// The first thing ever done to a VMIM: it is stored as this version has it, with its label.
    async fn observe(&self, vmim: &DynamicObject) -> Result<()> {
        let mut vmim = vmim.clone();
        let vmi = text(&vmim.data, "/spec/vmiName");
        vmim.labels_mut().entry(VMI_NAME.to_owned()).or_insert(vmi);
        for annotation in [OBSERVED, "kubevirt.io/storage-observed-api-version"] {
            vmim.annotations_mut().insert(annotation.to_owned(), "v1".to_owned());
        }
        let written = self.core.api_vmims(&vmim).replace(&vmim.name_any(), &PostParams::default(), &vmim).await;
        written.map(drop).context("cannot take in the migration")
    }

    /// The launcher among the pods of this job: attachment pods carry the job's label, too.
    fn target_pod(&self, vmi: &DynamicObject, uid: &str) -> Option<Arc<Pod>> {
        self.core.pods_of(&vmi.uid().unwrap_or_default()).into_iter().find(|pod| is_target(pod, uid))
    }

    async fn sync(&self, name: &str, seen: &Seen) -> Result<()> {
        if seen.vmi.metadata.deletion_timestamp.is_some() || (seen.owns_state() && seen.state("completed")) {
            return Ok(());
        }
        if !limits::can_migrate(&self.core, seen) {
            bail!("vmi is ineligible for migration because another migration job is running");
        }
        let handed_over = seen.owns_state() || lock(&self.handed_over).contains(&seen.uid());
        match (seen.phase().as_str(), &seen.pod) {
            ("Pending" | "Scheduling", _) if seen.is_deleted() => self.cancel(seen).await,
            ("Scheduled", _) if seen.is_deleted() && !handed_over => self.cancel(seen).await,
            ("Pending", None) => self.create_target_pod(name, seen).await,
            ("Pending", Some(pod)) if is_ready(pod) => {
                if has_hotplug_volumes(&seen.vmi) && seen.attachment.is_none() {
                    return self.create_attachment_pod(seen, pod).await;
                }
                Ok(())
            }
            ("Pending" | "Scheduling", Some(pod)) => timeouts::handle(self, name, seen, pod).await,
            ("Scheduled", Some(pod)) if is_ready(pod) => self.hand_over(seen, pod).await,
            ("PreparingTarget" | "TargetReady", pod) => {
                let down = pod.as_ref().is_none_or(|pod| is_down(pod));
                if down && seen.state_text("startTimestamp").is_empty() && !seen.state("failed") {
                    return self.mark_failed(seen).await;
                }
                Ok(())
            }
            ("Failed", _) if seen.owns_state() && !seen.state("failed") => self.mark_failed(seen).await,
            ("Running", _) if seen.is_deleted() => self.request_abort(seen).await,
            _ => Ok(()),
        }
    }

    /// `handlePreHandoffMigrationCancel`
    async fn cancel(&self, seen: &Seen) -> Result<()> {
        let Some(pod) = &seen.pod else { return Ok(()) };
        let note = format!("migration canceled and pod {} is deleted", key(pod.as_ref()));
        self.delete_pod(seen, pod, &note).await
    }

    pub(super) async fn delete_pod(&self, seen: &Seen, pod: &Pod, note: &str) -> Result<()> {
        match self.core.api_pods(pod.namespace()).delete(&pod.name_any(), &DeleteParams::default()).await {
            Ok(_) => self.core.event(&seen.vmim, EventType::Normal, "SuccessfulDelete", note).await,
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => return Err(error).context("cannot delete the target pod"),
        }
        Ok(())
    }

    /// `handleTargetPodCreation`: within the parallel limits, and not in the time after a failure.
    async fn create_target_pod(&self, name: &str, seen: &Seen) -> Result<()> {
        if let Some(left) = backoff::left(&self.core, seen) {
            self.queue.add_after(name, RUNNING, left);
            let note = format!("backoff migrating vmi {}", key(seen.vmi.as_ref()));
            self.core.event(&seen.vmi, EventType::Warning, "MigrationBackoff", &note).await;
            return Ok(());
        }
        let Some(source) = limits::current_pod(&self.core, &seen.vmi) else { return Ok(()) };
        let priority = priority(&seen.vmim);
        if !lock(&self.expected).is_empty() || limits::active_pods(&self.core, &seen.vmi) > 1 {
            self.queue.add_after(name, priority, Duration::from_secs(1));
            return Ok(());
        }
        if limits::are_reached(&self.core, &seen.vmi) {
            self.queue.add_after(name, priority, limits::delay(priority));
            return Ok(());
        }
        if text(&seen.vmi.data, "/status/phase") != "Running" {
            return Ok(());
        }
        let pod = objects::target_pod(&seen.vmi, &seen.vmim, &source);
        let uid = seen.uid();
        lock(&self.expected).insert(uid.clone());
        match self.core.api_pods(seen.vmi.namespace()).create(&PostParams::default(), &serde_json::from_value(pod)?).await {
            Ok(pod) => {
                let note = format!("Created migration target pod {}", pod.name_any());
                self.core.event(&seen.vmim, EventType::Normal, "SuccessfulCreate", &note).await;
                Ok(())
            }
            Err(error) => {
                lock(&self.expected).remove(&uid);
                let note = format!("Error creating pod: {error}");
                self.core.event(&seen.vmi, EventType::Warning, "FailedCreate", &note).await;
                Err(error).context("cannot create the target pod")
            }
        }
    }

    async fn create_attachment_pod(&self, seen: &Seen, owner: &Pod) -> Result<()> {
        let uid = seen.uid();
        let pod = serde_json::from_value(objects::attachment_pod(&seen.vmim, owner))?;
        lock(&self.expected).insert(uid.clone());
        match self.core.api_pods(owner.namespace()).create(&PostParams::default(), &pod).await {
            Ok(pod) => {
                let note = format!("Created attachment pod {}", pod.name_any());
                self.core.event(&seen.vmim, EventType::Normal, "SuccessfulCreate", &note).await;
                Ok(())
            }
            Err(error) => {
                lock(&self.expected).remove(&uid);
                Err(error).context("cannot create the attachment pod")
            }
        }
    }

    /// `handleTargetPodHandoff`: the effective configuration is read here, once and for all, and virt-handler takes over.
    async fn hand_over(&self, seen: &Seen, pod: &Pod) -> Result<()> {
        if seen.owns_state() {
            return Ok(());
        }
        let target = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        let namespace =
            self.core.namespace(&seen.vmi.namespace().unwrap_or_default()).context("the VMI's namespace is not known")?;
        let policies = self.core.policies();
        let policy = winner(&policies, seen.vmi.labels(), namespace.labels());
        let configuration = Configuration::of_cluster(self.core.kubevirt().as_ref()).under(policy);
        let mut state = json!({
            "migrationUid": seen.uid(),
            "sourceNode": text(&seen.vmi.data, "/status/nodeName"),
            "sourcePod": text(&seen.vmim.data, "/status/migrationState/sourcePod"),
            "targetNode": target,
            "targetPod": pod.name_any(),
            "migrationConfiguration": configuration.to_json(),
        });
        if let Some(name) = policy.and_then(|policy| policy.pointer("/metadata/name")) {
            state["migrationPolicyName"] = name.clone();
        }
        if let Some(attachment) = &seen.attachment {
            state["targetAttachmentPodUID"] = json!(attachment.uid());
        }
        let mut vmi = (*seen.vmi).clone();
        vmi.labels_mut().insert(TARGET_NODE.to_owned(), target);
        vmi.data["status"]["migrationState"] = state;
        self.core.replace_vmi(&vmi).await?;
        lock(&self.handed_over).insert(seen.uid());
        let note = "Migration target pod is ready for preparation by virt-handler.";
        self.core.event(&seen.vmim, EventType::Normal, "SuccessfulHandOver", note).await;
        Ok(())
    }

    /// `handleMarkMigrationFailedOnVMI`
    async fn mark_failed(&self, seen: &Seen) -> Result<()> {
        if !seen.owns_state() {
            return Ok(());
        }
        let mut vmi = (*seen.vmi).clone();
        let state = &mut vmi.data["status"]["migrationState"];
        state["failed"] = json!(true);
        state["completed"] = json!(true);
        for time in ["startTimestamp", "endTimestamp"] {
            if state[time].is_null() {
                state[time] = json!(now());
            }
        }
        if state["failureReason"].is_null() {
            state["failureReason"] = json!("Target pod is down");
        }
        self.core.replace_vmi(&vmi).await?;
        let note = format!("VirtualMachineInstance migration uid {} failed. reason: Target pod is down", seen.uid());
        self.core.event(&vmi, EventType::Warning, "FailedMigration", &note).await;
        Ok(())
    }

    /// `markMigrationAbortInVmiStatus`
    async fn request_abort(&self, seen: &Seen) -> Result<()> {
        if !seen.has_state() || seen.state("abortRequested") {
            return Ok(());
        }
        let mut vmi = (*seen.vmi).clone();
        vmi.data["status"]["migrationState"]["abortRequested"] = json!(true);
        self.core.replace_vmi(&vmi).await?;
        let note = "Migration is ready to be canceled by virt-handler.";
        self.core.event(&seen.vmim, EventType::Normal, "SuccessfulAbortMigration", note).await;
        Ok(())
    }
}

fn lock(set: &Mutex<HashSet<String>>) -> std::sync::MutexGuard<'_, HashSet<String>> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}
