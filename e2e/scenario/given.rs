//! Any cluster with the real KubeVirt, and MigVisor installed, as a cluster of the scenarios.
//!
//! In: a kubectl for it; `E2E_DISK_IMAGE`, a container disk of a Linux with cloud-init and python3, for the guests; optionally
//! `E2E_MAY_DRAIN=yes` and `E2E_NODE_WITHOUT_AGENT`. Out: VMs, and what this cluster cannot give, with the reason.

use std::{env, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Load, Need};
use crate::cluster::{Kubectl, account::NAMESPACE};

/// Until a guest of a real cluster has booted.
const BOOT: Duration = Duration::from_secs(300);

/// A guest that settles writes for so long, from its boot on, and so at least until its forecast is there. Agents look at it about 12, 39, 78, 156 and
/// 312 s after its boot: the last pattern is of before it rested.
pub(super) const SETTLES: Duration = Duration::from_secs(240);

/// What a guest writes: pages of 4 KiB, so many of them at random in each ms; whether it computes in between or rests; for how many
/// seconds, 0: for ever. How much there is to compute in a ms is measured at the start.
const WRITER: &str = "import mmap,random,sys,time\n\
    n,r,computes,ends=map(int,sys.argv[1:5])\n\
    m=mmap.mmap(-1,n*4096)\n\
    for p in range(n): m[p*4096]=1\n\
    c=0\n\
    s=time.monotonic()\n\
    while time.monotonic()-s<.2: c+=1\n\
    while not ends or time.monotonic()-s<ends:\n\
    \x20t=time.monotonic()\n\
    \x20for _ in range(r*10):\n\
    \x20 p=random.randrange(n)*4096\n\
    \x20 m[p]=(m[p]+1)&255\n\
    \x20if computes:\n\
    \x20 for _ in range(c//20): time.monotonic()\n\
    \x20else: time.sleep(max(0,.01-(time.monotonic()-t)))\n\
    time.sleep(1e6)\n";

/// See the module.
pub(super) struct Given {
    image: String,
    may_drain: bool,
    without_agent: Option<String>,
    kubevirt: Value,
}

impl Given {
    /// An error where KubeVirt or MigVisor is not there.
    pub(super) async fn open(kubectl: &Kubectl) -> Result<Self> {
        let image = env::var("E2E_DISK_IMAGE").context(
            "E2E_DISK_IMAGE names no container disk: one of a Linux with cloud-init and python3 is needed for the guests",
        )?;
        let list =
            kubectl.run(&["get", "kubevirts", "-A", "-o", "json"], "").await?.ok().context("is KubeVirt in this cluster?")?;
        let list: Value = serde_json::from_str(&list)?;
        let kubevirt = list["items"][0].clone();
        ensure!(
            kubevirt["status"]["phase"] == "Deployed",
            "KubeVirt is not deployed in this cluster: {}",
            kubevirt["status"]["phase"]
        );
        let given = Self {
            image,
            may_drain: env::var("E2E_MAY_DRAIN").is_ok_and(|it| it == "yes"),
            without_agent: env::var("E2E_NODE_WITHOUT_AGENT").ok(),
            kubevirt,
        };
        given.is_well(kubectl).await.context("MigVisor has to be installed and well before its scenarios run")?;
        Ok(given)
    }

    pub(super) fn lacks(&self, need: Need) -> Option<String> {
        let has = |pointer: &str, what: &str| {
            let list = self.kubevirt.pointer(pointer).and_then(Value::as_array);
            list.is_some_and(|list| list.iter().any(|it| it == what))
        };
        let gates = "/spec/configuration/developerConfiguration/featureGates";
        let methods = "/spec/workloadUpdateStrategy/workloadUpdateMethods";
        let why = match need {
            Need::KillController | Need::KillAgent => return None,
            Need::DrainNodes if self.may_drain => return None,
            Need::NodeWithoutAgent if self.without_agent.is_some() => return None,
            Need::WorkloadUpdates if has(methods, "LiveMigrate") => return None,
            Need::DecentralizedMigration if has(gates, "DecentralizedLiveMigration") => return None,
            Need::RestartApiServer => "its API server cannot be restarted from here",
            Need::DrainNodes => "E2E_MAY_DRAIN is not yes",
            Need::NodeWithoutAgent => "E2E_NODE_WITHOUT_AGENT names none",
            Need::WritableStatus => "KubeVirt itself keeps the status of VMIs",
            Need::WorkloadUpdates => "its KubeVirt does not list LiveMigrate among its workloadUpdateMethods",
            Need::DecentralizedMigration => "its KubeVirt has the gate DecentralizedLiveMigration off",
            Need::ManyVms => "fifty VMs may be too many for it",
            Need::Metrics => "the controller's metrics are not served outside its pod",
        };
        Some(why.to_owned())
    }

    pub(super) fn without_agent(&self) -> Result<String> {
        self.without_agent.clone().context("E2E_NODE_WITHOUT_AGENT names no node")
    }

    pub(super) async fn boot(
        &self,
        kubectl: &Kubectl,
        namespace: &str,
        name: &str,
        load: Load,
        labels: &Value,
        node: Option<&str>,
    ) -> Result<()> {
        let (pages, per_ms) = match load {
            Load::Idle => (0, 0),
            Load::Calm | Load::Large => (32_768, 4),
            Load::Steady | Load::Busy => (16_384, 20),
            Load::Settling => (32_768, 12),
            Load::Wild => (65_536, 60),
        };
        let (computes, ends) = (u8::from(load == Load::Busy), if load == Load::Settling { SETTLES.as_secs() } else { 0 });
        let memory = if load == Load::Large { "2Gi" } else { "1Gi" };
        let files = json!([{ "path": "/opt/writer.py", "content": WRITER }]);
        let writer = format!("nohup python3 /opt/writer.py {pages} {per_ms} {computes} {ends} &");
        let command = if pages == 0 { json!([]) } else { json!([writer]) };
        let user_data = format!("#cloud-config\n{}", json!({ "write_files": files, "runcmd": command }));
        let disk = |name: &str| json!({ "name": name, "disk": { "bus": "virtio" } });
        let mut spec = json!({
            "domain": {
                "devices": { "disks": [disk("root"), disk("seed")], "interfaces": [{ "name": "default", "masquerade": {} }] },
                "memory": { "guest": memory },
            },
            "evictionStrategy": "LiveMigrate",
            "networks": [{ "name": "default", "pod": {} }],
            "volumes": [
                { "name": "root", "containerDisk": { "image": self.image } },
                { "name": "seed", "cloudInitNoCloud": { "userData": user_data } },
            ],
        });
        if let Some(node) = node {
            spec["nodeSelector"] = json!({ "kubernetes.io/hostname": node });
        }
        let vmi = json!({
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "metadata": { "namespace": namespace, "name": name, "labels": labels },
            "spec": spec,
        });
        kubectl.accepts(&vmi.to_string()).await?;
        let timeout = format!("--timeout={}s", BOOT.as_secs());
        let wait = ["wait", "vmi", name, "-n", namespace, "--for=condition=Ready", &timeout];
        kubectl.run_within(BOOT + Duration::from_secs(10), &wait, "").await?.ok()?;
        // The agent's look must see the guest at work, and not at booting.
        tokio::time::sleep(Duration::from_secs(if load == Load::Idle { 0 } else { 60 })).await;
        Ok(())
    }

    pub(super) async fn is_well(&self, kubectl: &Kubectl) -> Result<()> {
        let list = kubectl.run(&["get", "pods", "-n", NAMESPACE, "-o", "json"], "").await?.ok()?;
        let list: Value = serde_json::from_str(&list)?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        ensure!(!pods.is_empty(), "no pod runs in the namespace {NAMESPACE}");
        for pod in pods {
            let ready = pod["status"]["conditions"]
                .as_array()
                .is_some_and(|all| all.iter().any(|it| it["type"] == "Ready" && it["status"] == "True"));
            if !ready {
                bail!("the pod {} in {NAMESPACE} is not ready", pod["metadata"]["name"]);
            }
        }
        Ok(())
    }
}

/// Deletes the pods of a part of the product at once, on one node or on all; what owns them makes new ones, which are waited for.
pub(super) async fn kill(kubectl: &Kubectl, account: &str, node: Option<&str>) -> Result<()> {
    let list: Value = serde_json::from_str(&kubectl.run(&["get", "pods", "-n", NAMESPACE, "-o", "json"], "").await?.ok()?)?;
    for pod in list["items"].as_array().into_iter().flatten() {
        let there = node.is_none_or(|node| pod["spec"]["nodeName"] == node);
        if pod["spec"]["serviceAccountName"] == account && there {
            let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
            kubectl.run(&["delete", "pod", name, "-n", NAMESPACE, "--grace-period=0", "--force"], "").await?.ok()?;
        }
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let wait = ["wait", "pods", "--all", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=120s"];
    kubectl.run_within(Duration::from_secs(130), &wait, "").await?.ok().map(drop)
}
