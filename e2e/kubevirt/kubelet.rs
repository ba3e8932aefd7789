//! Scheduler and kubelet for launcher pods, where a control plane has none: binds a pod that has no gate to the first node by name that fits,
//! lets it run, and lets it go.
//!
//! In: launcher pods. Out: the same, bound and running, or gone. In a whole cluster kube-scheduler and KWOK do this.

use std::sync::Arc;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{ResourceExt, api::DeleteParams};
use tokio::sync::mpsc;

use super::{
    core::{Change, Core},
    objects,
    queue::{Limiter, Queue},
    read::key,
};

/// Works for ever.
pub(super) async fn run(core: Arc<Core>, mut changes: mpsc::UnboundedReceiver<Change>) {
    let queue = Queue::new(Limiter::DEFAULT);
    let listen = async {
        while let Some(change) = changes.recv().await {
            if let Change::Pod(pod) = change {
                queue.add(&key(pod.as_ref()), 0);
            }
        }
    };
    let work = async {
        loop {
            let (key, _) = queue.next().await;
            match look(&core, &key).await {
                Ok(()) => queue.forget(&key),
                Err(error) => {
                    tracing::debug!("pod {key}: {error:#}; trying again");
                    queue.retry(&key, 0);
                }
            }
        }
    };
    tokio::join!(listen, work);
}

async fn look(core: &Core, key: &str) -> Result<()> {
    let Some((namespace, name)) = key.split_once('/') else { return Ok(()) };
    let pods = core.api_pods(Some(namespace.to_owned()));
    let Some(pod) = pods.get_opt(name).await? else { return Ok(()) };
    let spec = pod.spec.clone().unwrap_or_default();
    if pod.metadata.deletion_timestamp.is_some() {
        return match pods.delete(name, &DeleteParams::default().grace_period(0)).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            deleted => deleted.map(drop).context("cannot let the pod go"),
        };
    }
    if spec.node_name.is_some() {
        let pending = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending");
        return if pending { objects::run(&pods, name).await } else { Ok(()) };
    }
    if !spec.scheduling_gates.unwrap_or_default().is_empty() {
        return Ok(());
    }
    let Some(node) = core.nodes().iter().filter(|node| fits(core, &pod, node)).map(|node| node.name_any()).min() else {
        return objects::unschedulable(&pods, name).await;
    };
    objects::bind(&pods, name, &node).await?;
    objects::run(&pods, name).await
}

/// What of the scheduler's rules a launcher pod needs: its node selector, and away from its source.
fn fits(core: &Core, pod: &Pod, node: &Node) -> bool {
    let spec = pod.spec.clone().unwrap_or_default();
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| node.labels().get(key) == Some(value));
    let siblings = pod.owner_references().iter().flat_map(|owner| core.pods_of(&owner.uid));
    let taken = siblings
        .filter(|sibling| sibling.uid() != pod.uid())
        .any(|sibling| sibling.spec.as_ref().and_then(|spec| spec.node_name.clone()).as_deref() == Some(&node.name_any()));
    selected && !taken && node.spec.as_ref().is_none_or(|spec| spec.unschedulable != Some(true))
}
