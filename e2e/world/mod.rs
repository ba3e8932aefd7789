//! A small world: a control plane, KubeVirt's part, guests in real QEMUs, and the product's agent and controller among them.
//!
//! In: which guests. Out: a [`World`] in which a VirtualMachineInstanceMigration that is admitted really moves its guest from
//! one QEMU to another. The demonstration and the product's own tests live in it. It ends with its value.

mod mover;

use std::{collections::HashMap, os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow};
use kube::Api;
use migvisor::{api::MigrationForecast, model::forecast::HostConstants};
use nix::sys::signal::Signal;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;

use crate::{
    cluster::{ControlPlane, Process, WebhookCertificate, account, free_port},
    kubevirt::{
        self, KubeVirt, objects,
        objects::{started, starting_vmi},
        running_vmi,
    },
    lab::{DomainSpec, GuestSpec, Launcher, Truth, Vm, VmSpec, cgroup::Driver, libvirt::Mode},
};
use mover::{Guest, Guests, LabMover, domain, socket};

/// The node that every guest starts on.
pub const NODE: &str = "node-a";
/// The node that they are moved to.
pub const OTHER_NODE: &str = "node-b";

/// See the module.
pub struct World {
    // In the order in which they have to end.
    kubevirt: Option<KubeVirt>,
    processes: HashMap<&'static str, Process>,
    guests: Arc<Guests>,
    plane: ControlPlane,
    certificate: WebhookCertificate,
    /// Where the controller listens for admission.
    pub webhook_port: u16,
    /// Where it tells its health and metrics.
    pub controller_health: String,
    /// Where the agent does.
    pub agent_health: String,
}

impl World {
    /// A control plane with everybody's kinds, two nodes, and KubeVirt's part with this configuration
    /// (`spec.configuration.migrations`). Nothing of the product runs yet; what will acts as the administrator.
    pub async fn start(migrations: Value) -> Result<Self> {
        Self::around(ControlPlane::start().await?, migrations).await
    }

    /// As [`World::start`], as a whole cluster: target pods are scheduled by kube-scheduler, KWOK runs them, and the product's parts act with
    /// their own service accounts and the rights of `config/base`.
    pub async fn start_whole(migrations: Value) -> Result<Self> {
        Self::around(ControlPlane::start_whole().await?, migrations).await
    }

    async fn around(plane: ControlPlane, migrations: Value) -> Result<Self> {
        let client = plane.client()?;
        kubevirt::install_crds(&client).await?;
        if plane.is_whole() {
            plane.install_base().await?;
        } else {
            let ours: Vec<_> = migvisor::cli::crd::documents()?.into_iter().map(|(_, yaml)| yaml).collect();
            objects::install(&client, &ours.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        }
        for node in [NODE, OTHER_NODE] {
            objects::create_node(&client, node).await?;
        }
        objects::create_kubevirt(&client, migrations).await?;
        let guests = Arc::new(Guests::default());
        let sockets = plane.directory().join("qmp");
        std::fs::create_dir(&sockets).context("cannot make the directory of QMP sockets")?;
        // A launcher that is not root has to get through to its own directory.
        let directory = plane.directory();
        std::fs::set_permissions(directory, PermissionsExt::from_mode(0o711)).context("cannot open the world's directory")?;
        std::fs::create_dir(directory.join("pods")).context("cannot make the directory of pods")?;
        let pods = directory.join("pods");
        let kubevirt = KubeVirt::start(&plane, LabMover { guests: Arc::clone(&guests), sockets, pods }).await?;
        plane.nodes_are_ready(&[NODE, OTHER_NODE]).await?;
        let local = |port: u16| format!("127.0.0.1:{port}");
        Ok(Self {
            kubevirt: Some(kubevirt),
            processes: HashMap::new(),
            guests,
            webhook_port: free_port()?,
            controller_health: local(free_port()?),
            agent_health: local(free_port()?),
            certificate: plane.webhook_certificate()?,
            plane,
        })
    }

    /// The control plane.
    pub fn plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// The directory with one QMP socket for each VM, named by pod UID.
    pub fn sockets(&self) -> PathBuf {
        self.plane.directory().join("qmp")
    }

    /// Boots a guest and, once it works, announces it as a running VMI on [`NODE`]: what a look sees of it does not hang on how fast it
    /// boots. Returns the product's QMP socket.
    pub async fn boot(&self, namespace: &str, name: &str, spec: VmSpec) -> Result<PathBuf> {
        let memory = format!("{}Mi", spec.memory_mib);
        let client = self.plane.client()?;
        let side = starting_vmi(&client, namespace, name, NODE, &memory).await?;
        let qmp = socket(&self.sockets(), &side.pod_uid);
        let vm = Vm::start(spec.qmp(&qmp)).await?;
        self.guests.put(&(namespace.to_owned(), name.to_owned()), Guest::Bare(Box::new(vm)));
        started(&client, namespace, name, &side).await?;
        Ok(qmp)
    }

    /// Announces a VM without a guest: a VMI that runs on this node, with its launcher pod.
    pub async fn announce(&self, namespace: &str, name: &str, node: &str) -> Result<()> {
        running_vmi(&self.plane.client()?, namespace, name, node, "512Mi").await.map(drop)
    }

    /// The directory of pods, as a kubelet would lay it out.
    pub fn pods(&self) -> PathBuf {
        self.plane.directory().join("pods")
    }

    /// Boots a guest in a pod with a libvirt of its own, and announces it as a running VMI on [`NODE`]. It lives as long as what
    /// is returned, and can be migrated in this world once that is [settled](Self::settle).
    pub async fn boot_in_pod(
        &self,
        namespace: &str,
        name: &str,
        guest: GuestSpec,
        mode: Mode,
        driver: Option<Driver>,
    ) -> Result<Launcher> {
        let spec = DomainSpec::new(&domain(namespace, name), guest);
        let memory = format!("{}Mi", spec.memory_mib);
        let client = self.plane.client()?;
        let side = starting_vmi(&client, namespace, name, NODE, &memory).await?;
        let mut launcher = Launcher::start(&self.pods(), &side.pod_uid, mode, driver).await?;
        launcher.boot(&spec).await?;
        started(&client, namespace, name, &side).await?;
        Ok(launcher)
    }

    /// Leaves a guest in a pod to this world, where KubeVirt's part may migrate it.
    pub fn settle(&self, namespace: &str, name: &str, launcher: Launcher) {
        self.guests.put(&(namespace.to_owned(), name.to_owned()), Guest::InPod(Box::new(launcher)));
    }

    /// The socket of the libvirt of a guest in a pod.
    pub fn libvirt(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let socket = self.guests.libvirt(&(namespace.to_owned(), name.to_owned()));
        socket.with_context(|| format!("no pod of {namespace}/{name} is here"))
    }

    /// Takes a guest in a pod, its domain's name with it, out of the world.
    pub fn take_pod(&self, namespace: &str, name: &str) -> Result<(Launcher, String)> {
        Ok((self.guests.take_launcher(&(namespace.to_owned(), name.to_owned()))?, domain(namespace, name)))
    }

    /// Takes a guest out of the world, to do with it as one likes.
    pub fn take(&self, namespace: &str, name: &str) -> Result<Vm> {
        self.guests.take(&(namespace.to_owned(), name.to_owned()))
    }

    /// Puts it back.
    pub fn put(&self, namespace: &str, name: &str, vm: Vm) {
        self.guests.put(&(namespace.to_owned(), name.to_owned()), Guest::Bare(Box::new(vm)));
    }

    /// Asks a guest's QEMU, by the laboratory's own monitor.
    pub async fn ask_qemu(&self, namespace: &str, name: &str, command: &str, arguments: Value) -> Result<Value> {
        let mut vm = self.take(namespace, name)?;
        let reply = vm.lab().execute(command, arguments).await;
        self.put(namespace, name, vm);
        Ok(reply?)
    }

    /// What a guest's QEMU has set for migrations: parameters and capabilities.
    pub async fn migration_settings(&self, namespace: &str, name: &str) -> Result<(Value, Value)> {
        let parameters = self.ask_qemu(namespace, name, "query-migrate-parameters", Value::Null).await?;
        Ok((parameters, self.ask_qemu(namespace, name, "query-migrate-capabilities", Value::Null).await?))
    }

    /// What became of a guest's migration: the truth, as QEMU told it.
    pub fn truth(&self, namespace: &str, name: &str) -> Option<Truth> {
        self.guests.truth(&(namespace.to_owned(), name.to_owned()))
    }

    /// Starts `migvisor agent` for [`NODE`], with this host's constants, and waits until it is ready.
    pub async fn start_agent(&mut self, host: &HostConstants, more: &[&str]) -> Result<()> {
        self.start_agent_among(["--qmp-dir", &self.sockets().to_string_lossy()], host, more).await
    }

    /// As [`World::start_agent`], for the guests that are in pods.
    pub async fn start_agent_on_pods(&mut self, host: &HostConstants, more: &[&str]) -> Result<()> {
        self.start_agent_among(["--pods-dir", &self.pods().to_string_lossy()], host, more).await
    }

    async fn start_agent_among(&mut self, vms: [&str; 2], host: &HostConstants, more: &[&str]) -> Result<()> {
        let constants = self.plane.directory().join("host.json");
        std::fs::write(&constants, serde_json::to_vec(host)?).context("cannot write the host's constants")?;
        let constants = constants.to_string_lossy().into_owned();
        let health = self.agent_health.clone();
        self.start_agent_on("agent", NODE, &health, &[&["--host", &constants], &vms[..], more].concat()).await
    }

    /// Starts `migvisor agent` under this name for a node, and waits until it is ready.
    pub async fn start_agent_on(&mut self, name: &'static str, node: &str, health: &str, more: &[&str]) -> Result<()> {
        let checkpoint = self.plane.directory().join(format!("checkpoint-{node}"));
        let checkpoint = checkpoint.to_string_lossy();
        let mut args = vec!["agent", "--node", node, "--listen", health, "--checkpoint", &checkpoint];
        if self.plane.is_whole() {
            args.extend(["--lease-namespace", account::NAMESPACE]);
        }
        args.extend(more);
        let process = self.product(name, ("migvisor-agent", node), &args).await?;
        self.processes.insert(name, process);
        self.ready(name, health).await
    }

    /// A part of the product: with the token of its own pod on that node, or as the administrator where the cluster is not whole.
    async fn product(&self, name: &str, (account, node): (&str, &str), args: &[&str]) -> Result<Process> {
        if !self.plane.is_whole() {
            return self.plane.product(name, args, &[]);
        }
        let pod = self.plane.unique(name);
        let kubeconfig = self.plane.account(account, Some((&pod, node))).await?.kubeconfig;
        let kubeconfig = kubeconfig.to_string_lossy();
        // Its own file is all that it has.
        self.plane.product(name, &[args, &["--kubeconfig", &kubeconfig]].concat(), &[("KUBECONFIG", "/nonexistent")])
    }

    /// Starts `migvisor controller` with its webhooks installed, and waits until it is ready.
    pub async fn start_controller(&mut self, more: &[&str]) -> Result<()> {
        let (port, health) = (self.webhook_port, self.controller_health.clone());
        self.start_replica("controller", port, &health, more).await?;
        self.admit_at(port).await
    }

    /// Starts one more controller under this name, and waits until it is ready. Admission stays where it is.
    pub async fn start_replica(&mut self, name: &'static str, port: u16, health: &str, more: &[&str]) -> Result<()> {
        let listen = format!("127.0.0.1:{port}");
        let (cert, key) = (self.certificate.certificate.to_string_lossy(), self.certificate.key.to_string_lossy());
        let mut args =
            vec!["controller", "--webhook-listen", &listen, "--listen", health, "--tls-cert", &cert, "--tls-key", &key];
        if self.plane.is_whole() {
            args.extend(["--lease-namespace", account::NAMESPACE]);
        }
        args.extend(more);
        let process = self.product(name, ("migvisor-controller", OTHER_NODE), &args).await?;
        self.processes.insert(name, process);
        self.ready(name, health).await
    }

    /// Has the API server ask the controller at this port.
    pub async fn admit_at(&self, port: u16) -> Result<()> {
        self.plane.install_webhooks(port, &self.certificate.authority).await
    }

    /// Posts a body to the controller at this port, over TLS, as the API server would: status and body.
    pub async fn post(&self, port: u16, path: &str, body: Vec<u8>) -> Result<(u16, String)> {
        let mut config = kube::Config::new(format!("https://127.0.0.1:{port}").parse()?);
        let authority = CertificateDer::from_pem_slice(self.certificate.authority.as_bytes())?;
        config.root_cert = Some(vec![authority.to_vec()]);
        config.read_timeout = Some(Duration::from_secs(5));
        let request = http::Request::post(path).header("content-type", "application/json").body(body.into())?;
        let response = kube::Client::try_from(config)?.send(request).await?;
        let status = response.status().as_u16();
        Ok((status, String::from_utf8_lossy(&response.into_body().collect_bytes().await?).into_owned()))
    }

    /// A part of the product that runs here: `agent` or `controller`.
    pub fn process(&mut self, name: &'static str) -> Result<&mut Process> {
        self.processes.get_mut(name).with_context(|| format!("the {name} was not started"))
    }

    /// Sends a signal to a part of the product.
    pub fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        self.processes.get(name).with_context(|| format!("the {name} was not started"))?.signal(signal)
    }

    async fn ready(&mut self, name: &'static str, health: &str) -> Result<()> {
        let url: http::Uri = format!("http://{health}/readyz").parse()?;
        for _ in 0..600 {
            self.process(name)?.still_runs()?;
            if get(&url).await.is_ok_and(|(status, _)| status == 200) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let log = self.process(name)?.log_tail(25);
        Err(anyhow!("the {name} is not ready after 30 s; its log ends:\n{log}"))
    }

    /// Waits until the forecast of a VM is answered for its present question.
    pub async fn forecast(&self, namespace: &str, name: &str, deadline: Duration) -> Result<MigrationForecast> {
        let api: Api<MigrationForecast> = Api::namespaced(self.plane.client()?, namespace);
        let what = format!("an answer about {name}");
        let answered = |forecast: &MigrationForecast| forecast.answer().is_some_and(|answer| answer.verdict.is_some());
        self.plane.wait(namespace, &what, deadline, || async { Ok(api.get_opt(name).await?.filter(answered)) }).await
    }

    /// Waits until a VMIM has come to its end; returns its phase.
    pub async fn migrated(&self, namespace: &str, name: &str, deadline: Duration) -> Result<String> {
        let api = objects::vmims(&self.plane.client()?, namespace);
        let phase = |vmim: &kube::api::DynamicObject| vmim.data["status"]["phase"].as_str().map(str::to_owned);
        let ended = |phase: &String| phase == "Succeeded" || phase == "Failed";
        let what = format!("the end of {name}");
        let probe = || async { Ok(api.get_opt(name).await?.and_then(|vmim| phase(&vmim)).filter(ended)) };
        self.plane.wait(namespace, &what, deadline, probe).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The stand-in must not see its guests and its API server go.
        self.kubevirt = None;
        self.processes.clear();
    }
}

/// A plain GET on loopback: status and body.
pub async fn get(url: &http::Uri) -> Result<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let authority = url.authority().context("no address")?.as_str();
    let mut stream = tokio::net::TcpStream::connect(authority).await?;
    let request = format!("GET {} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n", url.path());
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no HTTP")?;
    Ok((status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()))
}
