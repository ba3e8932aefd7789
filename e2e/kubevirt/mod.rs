//! KubeVirt's part, played by us: its kinds as CRDs of our own writing, and a stand-in that behaves towards its users as KubeVirt 1.9 does.
//!
//! In: an API server, and a [`Mover`] that really moves the guest. Out: virt-api's webhooks, the phases, events, pods and status fields of
//! migrations, evacuations and workload updates. Each file names the source of KubeVirt that it follows. What differs from KubeVirt, so
//! that nobody builds on it:
//!
//! * VMs are not started: a VMI comes into being running, with its pod ([`running_vmi`]).
//! * Where the control plane has no scheduler and no kubelets, the stand-in plays those for launcher pods, too (`kubelet`).
//! * Legacy abort rules only (see [`monitor`]); no stall detector, no decentralized migration, no backups, no utility volumes.

mod api;
mod backoff;
pub mod configuration;
mod core;
mod evacuation;
mod eviction;
mod handler;
mod kubelet;
mod limits;
mod migration;
pub mod monitor;
pub mod objects;
mod queue;
mod read;
mod status;
mod timeouts;
mod vmi;
mod workload_update;

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use kube::api::DynamicObject;
use migvisor::model::units::{Bandwidth, Bytes};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::cluster::ControlPlane;

pub use self::{
    configuration::Configuration,
    monitor::Order,
    objects::{Side, install_crds, running_vmi, vmi_manifest, vmim_manifest},
};

/// Who virt-controller is to the API server.
pub const CONTROLLER: &str = "system:serviceaccount:kubevirt:kubevirt-controller";
/// How long virt-handler takes until a target is ready.
const PREPARING: Duration = Duration::from_millis(200);

/// Moves a guest from one launcher to another: the laboratory does it between two QEMUs.
pub trait Mover: Send + Sync + 'static {
    /// Moves it, or reports why not. Has to heed [`Job::orders`] and to leave a guest running on one side, whatever happens.
    /// Dropped where the stand-in ends first.
    fn migrate(&self, job: Job) -> impl Future<Output = Outcome> + Send;

    /// The target's side is made ready.
    fn prepare(&self, _target: &Side) -> impl Future<Output = ()> + Send {
        tokio::time::sleep(PREPARING)
    }

    /// The VMI was deleted: its guest ends. A migration of it has been told to end as well.
    fn end(&self, _namespace: &str, _vmi: &str) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// Moves what is no guest at all: it takes this long, and heeds the orders.
#[derive(Debug, Clone, Copy)]
pub struct Paced(pub Duration);

impl Mover for Paced {
    async fn migrate(&self, mut job: Job) -> Outcome {
        tokio::select! {
            () = tokio::time::sleep(self.0) => Outcome::success(),
            () = job.aborted() => Outcome::aborted(),
        }
    }
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

    /// Comes back once it is to be ended.
    pub async fn aborted(&mut self) {
        let mut order = Order::GoOn;
        while order != Order::Abort {
            order = self.next_order(order).await;
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
    _tasks: JoinSet<()>,
}

impl KubeVirt {
    /// Plays KubeVirt for the whole cluster. Call it inside the runtime that is to carry it.
    pub async fn start<M: Mover>(plane: &ControlPlane, mover: M) -> Result<Self> {
        Self::play(plane, None, mover).await
    }

    /// Plays KubeVirt for one namespace only, so that tests can share a control plane. The limits are then this namespace's.
    pub async fn start_in<M: Mover>(plane: &ControlPlane, namespace: &str, mover: M) -> Result<Self> {
        Self::play(plane, Some(namespace), mover).await
    }

    async fn play<M: Mover>(plane: &ControlPlane, namespace: Option<&str>, mover: M) -> Result<Self> {
        let mut tasks = JoinSet::new();
        let client = plane.client_as(CONTROLLER)?;
        let mut listeners = Vec::new();
        let mut listen = || {
            let (tell, changes) = mpsc::unbounded_channel();
            listeners.push(tell);
            changes
        };
        let (of_migrations, of_handlers, of_vmis) = (listen(), listen(), listen());
        let (of_evacuation, of_updates) = (listen(), listen());
        let of_kubelet = (!plane.is_whole()).then(listen);
        let core = core::Core::start(&client, namespace, listeners, &mut tasks).await?;
        let mover = Arc::new(mover);
        tasks.spawn(migration::Migrations::new(Arc::clone(&core)).run(of_migrations));
        tasks.spawn(handler::Handlers::new(Arc::clone(&core), Arc::clone(&mover)).run(of_handlers));
        tasks.spawn(vmi::run(Arc::clone(&core), mover, of_vmis));
        tasks.spawn(evacuation::Evacuation::new(Arc::clone(&core)).run(of_evacuation));
        tasks.spawn(workload_update::run(Arc::clone(&core), of_updates));
        if let Some(changes) = of_kubelet {
            tasks.spawn(kubelet::run(core, changes));
        }
        api::serve(plane, namespace, &mut tasks).await?;
        Ok(Self { _tasks: tasks })
    }
}
