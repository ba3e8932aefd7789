//! virt-controller's VMI controller, as far as migrations notice it: a VMI that is deleted ends, its pods go, then the object. After KubeVirt
//! 1.9's `pkg/virt-controller/watch/vmi/`.
//!
//! In: VMIs with a deletion timestamp. Out: the phase `Succeeded`, no pods, no finalizer. KubeVirt would let the object go although a
//! migration of it is not over yet, which then stays for ever, with its finalizer; that race is not played.

use std::sync::Arc;

use anyhow::{Context, Result};
use kube::{
    ResourceExt,
    api::{DeleteParams, DynamicObject},
};
use serde_json::json;
use tokio::sync::mpsc;

use super::{
    Mover,
    core::{Change, Core},
    queue::{Limiter, Queue},
    read::{is_final, key, vmi_key},
    status,
};

/// What keeps a VMI until its pods are gone.
pub(super) const FINALIZER: &str = "kubevirt.io/foregroundDeleteVirtualMachine";

/// Works for ever.
pub(super) async fn run<M: Mover>(core: Arc<Core>, mover: Arc<M>, mut changes: mpsc::UnboundedReceiver<Change>) {
    let queue = Queue::new(Limiter::DEFAULT);
    let listen = async {
        while let Some(change) = changes.recv().await {
            match change {
                Change::Vmi(vmi) => queue.add(&key(vmi.as_ref()), 0),
                Change::Vmim(vmim) => queue.add(&vmi_key(&vmim), 0),
                Change::Pod(pod) => {
                    let owner = pod.annotations().get("kubevirt.io/domain").cloned().unwrap_or_default();
                    queue.add(&format!("{}/{owner}", pod.namespace().unwrap_or_default()), 0);
                }
                Change::Node(_) | Change::KubeVirt => {}
            }
        }
    };
    let work = async {
        loop {
            let (key, _) = queue.next().await;
            let Some(vmi) = core.vmi(&key).filter(|vmi| vmi.metadata.deletion_timestamp.is_some()) else { continue };
            match end(&core, mover.as_ref(), &vmi).await {
                Ok(()) => queue.forget(&key),
                Err(error) => {
                    tracing::debug!("VMI {key}: {error:#}; trying again");
                    queue.retry(&key, 0);
                }
            }
        }
    };
    tokio::join!(listen, work);
}

async fn end<M: Mover>(core: &Core, mover: &M, vmi: &DynamicObject) -> Result<()> {
    if !vmi.finalizers().iter().any(|it| it == FINALIZER) {
        return Ok(());
    }
    let pods = core.pods_of(&vmi.uid().unwrap_or_default());
    for pod in pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
        match core.api_pods(pod.namespace()).delete(&pod.name_any(), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            deleted => drop(deleted.context("cannot delete a launcher pod")?),
        }
    }
    let mut vmi = vmi.clone();
    if !is_final(&vmi) {
        mover.end(&vmi.namespace().unwrap_or_default(), &vmi.name_any()).await;
        vmi.data["status"]["phase"] = json!("Succeeded");
        core.replace_vmi(&vmi).await?;
        return Ok(());
    }
    if pods.is_empty() && core.vmims_of(&vmi).iter().all(is_over) {
        vmi.finalizers_mut().retain(|it| it != FINALIZER);
        core.replace_vmi(&vmi).await?;
    }
    Ok(())
}

/// It is final, and its finalizer is off: nobody needs the VMI for that any more.
fn is_over(vmim: &Arc<DynamicObject>) -> bool {
    is_final(vmim) && !vmim.finalizers().iter().any(|it| it == status::FINALIZER)
}
