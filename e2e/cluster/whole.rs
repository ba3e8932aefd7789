//! The rest of a cluster beside etcd and kube-apiserver: kube-controller-manager, kube-scheduler, and KWOK, which plays the kubelets.
//!
//! In: a control plane that is ready. Out: pods are scheduled and run at once, service accounts exist, what is owned is collected, what
//! was in a deleted namespace goes with it. They are clients of the API server like any other: they outlive its restart.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::Api;

use super::{Authority, ControlPlane, Process, write_kubeconfig, write_private};
use crate::process;

/// What KWOK does.
const STAGES: &str = include_str!("stages.yaml");
/// Of some forty controllers those that tests need; each costs start-up time.
const CONTROLLERS: &str = "serviceaccount-controller,root-ca-certificate-publisher-controller,namespace-controller,\
     garbage-collector-controller,pod-garbage-collector-controller,node-lifecycle-controller,disruption-controller";
/// How long service accounts and nodes may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Starts them; nobody waits for them here.
pub(super) fn start(tools: &Path, dir: &Path, port: u16, authority: &Authority) -> Result<Vec<Process>> {
    let file = |name: &str| dir.join(name).display().to_string();
    let account = |name: &str, user: &str, group: Option<&str>| write_kubeconfig(dir, name, port, authority, user, group);
    let mut controllers = process::dying_with_us(tools.join("kube-controller-manager"));
    let kubeconfig = account("controllers", "system:kube-controller-manager", None)?;
    for (flag, value) in [
        ("kubeconfig", kubeconfig.display().to_string()),
        ("controllers", CONTROLLERS.to_owned()),
        ("use-service-account-credentials", "true".to_owned()),
        ("service-account-private-key-file", file("tokens.key")),
        ("root-ca-file", file("ca.crt")),
        ("leader-elect", "false".to_owned()),
        ("secure-port", "0".to_owned()),
    ] {
        controllers.arg(format!("--{flag}={value}"));
    }
    let mut scheduler = process::dying_with_us(tools.join("kube-scheduler"));
    scheduler.arg("--kubeconfig").arg(account("scheduler", "system:kube-scheduler", None)?);
    scheduler.args(["--leader-elect=false", "--secure-port=0"]);
    write_private(&dir.join("stages.yaml"), STAGES)?;
    let mut kwok = process::dying_with_us(tools.join("kwok"));
    kwok.arg("--kubeconfig").arg(account("kwok", "kwok", Some("system:masters"))?);
    kwok.arg("--config").arg(dir.join("stages.yaml"));
    kwok.args(["--manage-all-nodes=true", "--node-lease-duration-seconds=40"]);
    [("kube-controller-manager", controllers), ("kube-scheduler", scheduler), ("kwok", kwok)]
        .into_iter()
        .map(|(name, command)| Process::start(name, command, dir.join(format!("{name}.log"))))
        .collect()
}

impl ControlPlane {
    /// Are there a scheduler, a controller-manager and kubelets?
    pub fn is_whole(&self) -> bool {
        !self.attendants.is_empty()
    }

    /// One of the processes beside the API server: `kube-controller-manager`, `kube-scheduler`, `kwok`.
    pub fn attendant(&mut self, name: &str) -> Option<&mut Process> {
        self.attendants.iter_mut().find(|process| process.name() == name)
    }

    /// Waits until the namespace has its service account: no pod is let in before.
    pub(super) async fn namespace_is_ready(&self, namespace: &str) -> Result<()> {
        if !self.is_whole() {
            return Ok(());
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client()?, namespace);
        let probe = async || Ok(accounts.get_opt("default").await?.map(drop));
        super::wait_for("the namespace's service account", SOON, probe).await.with_context(|| self.last_words())
    }

    /// Waits until the scheduler may use these nodes.
    pub async fn nodes_are_ready(&self, names: &[&str]) -> Result<()> {
        if !self.is_whole() {
            return Ok(());
        }
        let nodes: Api<Node> = Api::all(self.client()?);
        for name in names {
            let probe = async || Ok(nodes.get_opt(name).await?.filter(is_ready).map(drop));
            super::wait_for(&format!("the node {name} to be ready"), SOON, probe).await.with_context(|| self.last_words())?;
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let of = |process: &Process| format!("{} ends:\n{}\n", process.name(), process.log_tail(8));
        self.attendants.iter().map(of).collect()
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let well = conditions.clone().any(|it| it.type_ == "Ready" && it.status == "True");
    well && node.spec.as_ref().and_then(|spec| spec.taints.as_ref()).is_none_or(Vec::is_empty)
}
