//! The frame of the scenarios: one cluster, and what a scenario may do with it, whichever it is.
//!
//! In: nothing for the laboratory (a real control plane, KubeVirt's stand-in, real guests), or `E2E_CLUSTER=given` and a `KUBECONFIG` for
//! any cluster with KubeVirt and MigVisor in it. Out: a [`Cluster`], and a [`Scene`] for each scenario. A scenario knows neither
//! which of the two it has nor that there are two: what not every cluster can give, it declares as a [`Need`].

mod given;
mod held;
mod laboratory;
mod person;
mod planned;
mod scene;

use anyhow::{Context, Result};
use futures::future::LocalBoxFuture;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tokio::sync::Mutex;

use self::{given::Given, laboratory::Laboratory};
pub use self::{
    held::is_gated,
    scene::{Scene, reason_of},
};
use crate::cluster::Kubectl;

/// A migration's kind, as events have it.
pub const VMIM: &str = "VirtualMachineInstanceMigration";
/// A VM's.
pub const VMI: &str = "VirtualMachineInstance";

/// What not every cluster can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The API server may go away and come back.
    RestartApiServer,
    /// A controller may be killed; another one takes its place.
    KillController,
    /// An agent may be killed; another one takes its place.
    KillAgent,
    /// A node may be drained.
    DrainNodes,
    /// A node on which VMs run and no agent does.
    NodeWithoutAgent,
    /// A VMI's status may be set by hand, and stays.
    WritableStatus,
    /// KubeVirt updates outdated VMs by itself, by live migration.
    WorkloadUpdates,
    /// KubeVirt's feature gate `DecentralizedLiveMigration` is on.
    DecentralizedMigration,
    /// Fifty VMs at once.
    ManyVms,
    /// The controller's metrics can be read from here.
    Metrics,
}

/// What a VM's guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Nothing, or there is no guest at all: it only has to exist.
    Idle,
    /// Few writes: it migrates in some 3 s.
    Calm,
    /// As calm, in a VM with twice the memory.
    Large,
    /// Writes of its own that a migration copes with, and that decide how much bandwidth it needs.
    Steady,
    /// As steady, of a guest that computes all the time: what it misses when it is slowed down it does not make up for.
    Busy,
    /// Enough writes for its migration to take twice as long, and after a while none: see [`Scene::settled`].
    Settling,
    /// More writes than a migration carries.
    Wild,
}

/// A named test of the whole product in a whole cluster.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it cannot do without.
    pub needs: &'static [Need],
    /// What it does.
    pub run: for<'a> fn(&'a Scene<'a>) -> LocalBoxFuture<'a, Result<()>>,
}

/// A scenario of the name of its function, with its needs: `scenario!(drains::a_drain_completes; DrainNodes)`.
#[macro_export]
macro_rules! scenario {
    ($module:ident :: $name:ident $(; $($need:ident),+)?) => {
        $crate::scenario::Scenario {
            name: stringify!($name),
            needs: &[$($($crate::scenario::Need::$need),+)?],
            run: |scene| Box::pin($module::$name(scene)),
        }
    };
}

enum Kind {
    Laboratory(Box<Mutex<Laboratory>>),
    Given(Given),
}

/// A cluster with KubeVirt and MigVisor in it.
pub struct Cluster {
    kind: Kind,
    kubectl: Kubectl,
    config: Config,
}

impl Cluster {
    /// The laboratory, or with `E2E_CLUSTER=given` the cluster of `KUBECONFIG`.
    pub async fn open() -> Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (kind, kubectl, kubeconfig) = if std::env::var_os("E2E_CLUSTER").is_some_and(|it| it == "given") {
            let path = std::env::var_os("KUBECONFIG").context("KUBECONFIG says of no cluster: KUBECONFIG=… make e2e-cluster")?;
            let kubectl = Kubectl::new("kubectl", &path, std::env::temp_dir());
            (Kind::Given(Given::open(&kubectl).await?), kubectl, path.into())
        } else {
            let laboratory = Laboratory::start().await?;
            let (kubectl, path) = (laboratory.plane().kubectl_program(), laboratory.plane().kubeconfig().to_owned());
            (Kind::Laboratory(Box::new(Mutex::new(laboratory))), kubectl, path)
        };
        let kubeconfig = Kubeconfig::read_from(&kubeconfig)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Self { kind, kubectl, config })
    }

    /// Why it cannot give this; `None`: it can.
    pub fn lacks(&self, need: Need) -> Option<String> {
        match &self.kind {
            Kind::Laboratory(_) => None,
            Kind::Given(given) => given.lacks(need),
        }
    }

    /// A client with all rights.
    pub fn client(&self) -> Result<Client> {
        Client::try_from(self.config.clone()).context("cannot make a client")
    }

    /// The administrator's kubectl.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// How long an agent's look and answer may take here.
    pub(crate) fn patience(&self) -> std::time::Duration {
        std::time::Duration::from_secs(if matches!(self.kind, Kind::Laboratory(_)) { 40 } else { 180 })
    }

    /// After this long a VM of [`Load::Settling`] writes no more, for as long again at least.
    fn settles_after(&self) -> std::time::Duration {
        match &self.kind {
            Kind::Laboratory(_) => laboratory::SETTLES,
            Kind::Given(_) => given::SETTLES,
        }
    }

    /// A running VM whose guest does this.
    async fn boot(&self, namespace: &str, name: &str, load: Load, labels: &Value, node: Option<&str>) -> Result<()> {
        match &self.kind {
            Kind::Laboratory(laboratory) => laboratory.lock().await.boot(namespace, name, load, labels, node).await,
            Kind::Given(given) => given.boot(&self.kubectl, namespace, name, load, labels, node).await,
        }
    }

    /// The API server goes away for so long, and comes back. ([`Need::RestartApiServer`])
    pub async fn restart_api_server(&self, away: std::time::Duration) -> Result<()> {
        match &self.kind {
            Kind::Laboratory(laboratory) => laboratory.lock().await.restart_api_server(away).await,
            Kind::Given(_) => anyhow::bail!("nobody may restart this cluster's API server"),
        }
    }

    /// The controllers die at once; others take their place. ([`Need::KillController`])
    pub async fn kill_controller(&self) -> Result<()> {
        match &self.kind {
            Kind::Laboratory(laboratory) => laboratory.lock().await.kill_controller().await,
            Kind::Given(_) => given::kill(&self.kubectl, "migvisor-controller", None).await,
        }
    }

    /// The agent of this node dies at once; another one takes its place. ([`Need::KillAgent`])
    pub async fn kill_agent(&self, node: &str) -> Result<()> {
        match &self.kind {
            Kind::Laboratory(laboratory) => laboratory.lock().await.kill_agent(node).await,
            Kind::Given(_) => given::kill(&self.kubectl, "migvisor-agent", Some(node)).await,
        }
    }

    /// A node where VMs run and no agent does. ([`Need::NodeWithoutAgent`])
    pub fn node_without_agent(&self) -> Result<String> {
        match &self.kind {
            Kind::Laboratory(_) => Ok(laboratory::WITHOUT_AGENT.to_owned()),
            Kind::Given(given) => given.without_agent(),
        }
    }

    /// The controller's metrics, as text. ([`Need::Metrics`])
    pub async fn metrics(&self) -> Result<String> {
        match &self.kind {
            Kind::Laboratory(laboratory) => laboratory.lock().await.metrics().await,
            Kind::Given(_) => anyhow::bail!("the controller's metrics cannot be read from here"),
        }
    }

    /// Have all parts of the product survived so far, without a panic? And what their logs end with.
    pub async fn product_is_well(&self) -> Result<()> {
        match &self.kind {
            Kind::Laboratory(laboratory) => laboratory.lock().await.is_well(),
            Kind::Given(given) => given.is_well(&self.kubectl).await,
        }
    }
}
