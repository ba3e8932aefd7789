//! virt-controller's evacuation controller: a migration for every VMI of a node that was marked for eviction, all at once, again and again.
//! After KubeVirt 1.9's `pkg/virt-controller/watch/drain/evacuation/evacuation.go`; the deprecated drain taint is left out.
//!
//! In: VMIs whose `status.evacuationNodeName` is their node. Out: VMIMs `kubevirt-evacuation-…`. One that is refused is told as an event on
//! the VMI, and the whole node is tried again: after 5 ms, 10 ms, 20 ms, … 1000 s, and at once whenever anything of the node changes.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Result, anyhow};
use futures::future::join_all;
use kube::{
    ResourceExt,
    api::{DynamicObject, PostParams},
    runtime::events::EventType,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    core::{Change, Core},
    limits,
    queue::{Limiter, Queue},
    read::{condition, is_final, key, text, vmi_key},
};

const EVACUATION: &str = "kubevirt.io/evacuationMigration";

/// The controller.
pub(super) struct Evacuation {
    core: Arc<Core>,
    queue: Queue,
    /// VMIMs that were made and have not been seen yet, by node.
    expected: Mutex<HashSet<(String, String)>>,
}

impl Evacuation {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core, queue: Queue::new(Limiter::DEFAULT), expected: Mutex::default() }
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
                let (node, _) = self.queue.next().await;
                match self.execute(&node).await {
                    Ok(()) => self.queue.forget(&node),
                    Err(error) => {
                        tracing::debug!("evacuation of {node}: {error:#}; trying again");
                        self.queue.retry(&node, 0);
                    }
                }
            }
        };
        tokio::join!(listen, work);
    }

    fn enqueue(&self, change: &Change) {
        let node = match change {
            Change::Node(node) => node.name_any(),
            Change::Vmi(vmi) => text(&vmi.data, "/status/nodeName"),
            Change::Vmim(vmim) => {
                let made = key(vmim.as_ref());
                self.expected.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, name)| *name != made);
                let ours = vmim.annotations().get(EVACUATION).cloned();
                let of_vmi = || self.core.vmi(&vmi_key(vmim)).map(|vmi| text(&vmi.data, "/status/nodeName"));
                ours.or_else(of_vmi).unwrap_or_default()
            }
            Change::Pod(_) | Change::KubeVirt => return,
        };
        if !node.is_empty() {
            self.queue.add(&node, 0);
        }
    }

    async fn execute(&self, node: &str) -> Result<()> {
        let waiting = self.expected.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|(of, _)| of == node);
        if self.core.node(node).is_none() || waiting {
            return Ok(());
        }
        let migrating: HashSet<_> = self.core.vmims().iter().filter(|it| !is_final(it)).map(|it| vmi_key(it)).collect();
        let candidates: Vec<_> = self
            .core
            .vmis()
            .into_iter()
            .filter(|vmi| self.is_candidate(vmi, node) && !migrating.contains(&key(vmi.as_ref())))
            .collect();
        let made = join_all(candidates.iter().map(|vmi| self.migrate(vmi, node))).await;
        made.into_iter().collect()
    }

    fn is_candidate(&self, vmi: &DynamicObject, node: &str) -> bool {
        let at = |pointer: &str| text(&vmi.data, pointer);
        at("/status/nodeName") == node
            && at("/status/evacuationNodeName") == node
            && !is_migrating(vmi)
            && !is_final(vmi)
            && vmi.metadata.deletion_timestamp.is_none()
            && matches!(strategy(&self.core, vmi).as_str(), "LiveMigrate" | "LiveMigrateIfPossible")
            && condition(vmi, "LiveMigratable").as_deref() == Some("True")
            && limits::active_pods(&self.core, vmi) <= 1
    }

    async fn migrate(&self, vmi: &DynamicObject, node: &str) -> Result<()> {
        let descheduler = vmi.annotations().get("kubevirt.io/eviction-source").is_some_and(|it| it == "descheduler");
        let priority = if descheduler { "system-maintenance" } else { "system-critical" };
        let manifest = migration(vmi, "kubevirt-evacuation-", (EVACUATION, node), priority);
        match self.core.api_vmims(vmi).create(&PostParams::default(), &serde_json::from_value(manifest)?).await {
            Ok(made) => {
                if self.core.vmim(&key(&made)).is_none() {
                    let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
                    expected.insert((node.to_owned(), key(&made)));
                }
                let words = format!("Created Migration {}", made.name_any());
                self.core.event(vmi, EventType::Normal, "SuccessfulCreate", &words).await;
                Ok(())
            }
            Err(error) => {
                let words = format!("Error creating a Migration: {}", refusal(&error));
                self.core.event(vmi, EventType::Warning, "FailedCreate", &words).await;
                Err(anyhow!(error))
            }
        }
    }
}

/// A VMIM as KubeVirt's own controllers make it.
pub(super) fn migration(vmi: &DynamicObject, prefix: &str, (annotation, value): (&str, &str), priority: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstanceMigration",
        "metadata": { "namespace": vmi.namespace(), "generateName": prefix, "annotations": { annotation: value } },
        "spec": { "vmiName": vmi.name_any(), "priority": priority },
    })
}

/// What a person reads of a refusal.
pub(super) fn refusal(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// `IsMigrating`: started and not ended.
pub(super) fn is_migrating(vmi: &DynamicObject) -> bool {
    let state = &vmi.data["status"]["migrationState"];
    !text(state, "/startTimestamp").is_empty() && text(state, "/endTimestamp").is_empty()
}

/// `VMIEvictionStrategy`: the VMI's own, else the cluster's.
pub(super) fn strategy(core: &Core, vmi: &DynamicObject) -> String {
    let own = text(&vmi.data, "/spec/evictionStrategy");
    if own.is_empty() {
        core.kubevirt().map(|it| text(&it, "/spec/configuration/evictionStrategy")).unwrap_or_default()
    } else {
        own
    }
}
