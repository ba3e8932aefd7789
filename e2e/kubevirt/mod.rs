//! KubeVirt's part, played by us: its kinds as CRDs of our own writing, and a stand-in that takes an admitted
//! VirtualMachineInstanceMigration through its phases as virt-controller and virt-handler of KubeVirt 1.9 do.
//!
//! In: an API server, and a [`Mover`] that really moves the guest. Out: the phases, events, pods and status fields that the
//! product watches. What differs from KubeVirt, so that nobody builds on it:
//!
//! * virt-api's admission is not here. What it would refuse (no such VMI, a VMI that is final or not migratable, a second
//!   migration in flight) ends as `Failed` here, at once, with the reason in `status.migrationState.failureReason`.
//! * The stand-in is scheduler and kubelet for target pods: the first node by name that KubeVirt may use, that is not the
//!   source and that `addedNodeSelector` allows. A pod with scheduling gates waits, as it does in a cluster.
//! * Queue: first come, first served within the parallel limits; no priorities, no backoff, no evacuation controller.
//! * Legacy abort rules only (see [`monitor`]); no stall detector, no decentralized migration.

pub mod configuration;
mod hands;
pub mod monitor;
pub mod objects;
mod way;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::TryStreamExt;
use kube::{
    Api, Client, ResourceExt,
    api::DynamicObject,
    runtime::{WatchStreamExt, watcher},
};
use migvisor::model::units::{Bandwidth, Bytes};
use tokio::{
    sync::{Mutex, watch},
    task::{JoinHandle, JoinSet},
};

pub use self::{
    configuration::Configuration,
    monitor::Order,
    objects::{Side, install_crds, running_vmi, vmi_manifest, vmim_manifest},
};

/// Moves a guest from one launcher to another: the laboratory does it between two QEMUs.
pub trait Mover: Send + Sync + 'static {
    /// Moves it, or reports why not. Has to heed [`Job::orders`] and to leave a guest running on one side, whatever happens.
    /// Dropped where the stand-in ends first.
    fn migrate(&self, job: Job) -> impl Future<Output = Outcome> + Send;
}

/// What is to be moved, and under which rules.
#[derive(Debug)]
pub struct Job {
    /// The VMI's namespace.
    pub namespace: String,
    /// The VMI's name.
    pub vmi: String,
    /// The VMI at hand-off, whole.
    pub object: DynamicObject,
    /// The UID of the VMIM.
    pub migration_uid: String,
    /// The guest's memory.
    pub memory: Bytes,
    /// From where.
    pub source: Side,
    /// To where; its pod runs.
    pub target: Side,
    /// The effective migration configuration.
    pub configuration: Configuration,
    /// The cap that KubeVirt would set in QEMU.
    pub bandwidth: Bandwidth,
    /// How long KubeVirt waits until it acts (for information: the stand-in keeps the clock and gives the orders).
    pub time_budget: Option<Duration>,
    /// What KubeVirt tells virt-launcher while it runs.
    pub orders: watch::Receiver<Order>,
}

impl Job {
    /// Comes back with the order in force once it is neither `last` nor [`Order::GoOn`].
    pub async fn next_order(&mut self, last: Order) -> Order {
        let told = self.orders.wait_for(|order| *order != last && *order != Order::GoOn).await.ok().map(|order| *order);
        match told {
            Some(order) => order,
            // Nobody is there any more to give one.
            None => std::future::pending().await,
        }
    }
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The guest runs on the target.
    pub succeeded: bool,
    /// Why it does not.
    pub failure_reason: Option<String>,
}

impl Outcome {
    /// The guest runs on the target.
    pub fn success() -> Self {
        Self { succeeded: true, failure_reason: None }
    }

    /// The guest still runs on the source, for this reason.
    pub fn failure(reason: impl Into<String>) -> Self {
        Self { succeeded: false, failure_reason: Some(reason.into()) }
    }

    /// What KubeVirt says after every cancelled migration, whoever cancelled it.
    pub fn aborted() -> Self {
        Self::failure("Live migration has been aborted")
    }
}

/// The running stand-in; it ends, with every migration it drives, on drop.
#[derive(Debug)]
pub struct KubeVirt {
    task: JoinHandle<()>,
}

impl KubeVirt {
    /// Plays KubeVirt for the whole cluster. Call it inside the runtime that is to carry it.
    pub fn start<M: Mover>(client: Client, mover: M) -> Self {
        let vmims = Api::all_with(client.clone(), &objects::vmim_resource());
        Self::watch(client, vmims, mover)
    }

    /// Plays KubeVirt for one namespace only, so that tests can share a control plane. The limits are then this namespace's.
    pub fn start_in<M: Mover>(client: Client, namespace: &str, mover: M) -> Self {
        let vmims = objects::vmims(&client, namespace);
        Self::watch(client, vmims, mover)
    }

    fn watch<M: Mover>(client: Client, vmims: Api<DynamicObject>, mover: M) -> Self {
        let shared = Arc::new(Shared { client, mover, slots: Mutex::default() });
        Self { task: tokio::spawn(play(shared, vmims)) }
    }
}

impl Drop for KubeVirt {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What all migrations share.
struct Shared<M> {
    client: Client,
    mover: M,
    /// The migrations that count against the limits: UID of the VMIM and the node that it leaves.
    slots: Mutex<HashMap<String, String>>,
}

/// Gives every VMIM a task of its own when it is first seen. Dropping this future ends them all.
async fn play<M: Mover>(shared: Arc<Shared<M>>, vmims: Api<DynamicObject>) {
    let mut tasks = JoinSet::new();
    let mut seen = HashSet::new();
    let mut events = std::pin::pin!(watcher(vmims, watcher::Config::default()).default_backoff().applied_objects());
    loop {
        match events.try_next().await {
            Ok(Some(vmim)) => {
                let uid = vmim.uid().unwrap_or_default();
                if seen.insert(uid) {
                    tasks.spawn(way::Way::new(Arc::clone(&shared), &vmim).walk());
                }
            }
            Ok(None) => return,
            // The watcher comes back by itself, after a while.
            Err(error) => tracing::warn!("the watch of migrations was interrupted: {error}"),
        }
        // What has ended is forgotten.
        while tasks.try_join_next().is_some() {}
    }
}
