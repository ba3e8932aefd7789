//! A real control plane for one test: etcd and kube-apiserver on loopback, ready in about 3.5 seconds.
//!
//! In: the binaries that `e2e/setup/setup.sh` built. Out: a [`ControlPlane`] with a `kube::Client`, the real `kubectl`,
//! namespaces, webhooks, and the product's own processes. RBAC is on. As [`ControlPlane::start`] leaves it there is no scheduler, no
//! kubelet and no controller-manager, so nothing deletes the content of a deleted namespace, collects garbage or makes service accounts
//! (the admission plugin that would demand one of every pod is off); [`ControlPlane::start_whole`] has them all.
//!
//! Everything ends on drop, also when the test panics. A test that is killed outright leaves no process (see [`crate::process`])
//! and a directory that the next start sweeps.

pub mod account;
mod kubectl;
mod pki;
pub mod product;
mod wait;
mod webhook;
mod whole;

use std::{
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tempfile::TempDir;

use crate::process;

pub use self::{
    kubectl::{Kubectl, Output},
    pki::{Authority, Pair},
    wait::wait_for,
    webhook::WebhookCertificate,
};
pub use crate::process::Process;

/// How long a start may take on a slow machine before it counts as failed.
const START_DEADLINE: Duration = Duration::from_secs(90);
/// The directory of a control plane is called so, then the process id of its owner.
const DIRECTORY_PREFIX: &str = "migvisor-e2e-";

/// A running control plane; see the module.
pub struct ControlPlane {
    // In the order in which they have to end.
    attendants: Vec<Process>,
    api_server: Mutex<Process>,
    etcd: Process,
    authority: Authority,
    config: Config,
    kubeconfig: PathBuf,
    tools: PathBuf,
    port: u16,
    issued: AtomicU32,
    directory: TempDir,
}

impl ControlPlane {
    /// Starts etcd and kube-apiserver and waits until `/readyz` says so. The error carries the tail of their logs.
    pub async fn start() -> Result<Self> {
        Self::launch(false).await
    }

    /// As [`ControlPlane::start`], with kube-controller-manager, kube-scheduler and KWOK's kubelets beside it: some seconds more.
    pub async fn start_whole() -> Result<Self> {
        let mut plane = Self::launch(true).await?;
        plane.attendants = whole::start(&plane.tools, plane.directory.path(), plane.port, &plane.authority)?;
        plane.namespace_is_ready("default").await?;
        Ok(plane)
    }

    async fn launch(whole: bool) -> Result<Self> {
        // Both ends of a test speak TLS; the error is that somebody chose a provider before, which is as well.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        sweep_abandoned();
        let tools = tools()?;
        let directory = tempfile::Builder::new()
            .prefix(&format!("{DIRECTORY_PREFIX}{}-", std::process::id()))
            .tempdir()
            .context("cannot make a temporary directory")?;
        let dir = directory.path();
        let port = free_port()?;
        let authority = Authority::new("migvisor-e2e")?;
        write_secrets(dir, &authority)?;
        let kubeconfig = write_kubeconfig(dir, "admin", port, &authority, "admin", Some("system:masters"))?;

        let etcd = start_etcd(&tools, dir)?;
        let api_server = start_api_server(&tools, dir, port, whole)?;
        let config = Config::from_custom_kubeconfig(Kubeconfig::read_from(&kubeconfig)?, &KubeConfigOptions::default())
            .await
            .context("cannot read the kubeconfig just written")?;
        let mut plane = Self {
            attendants: Vec::new(),
            api_server: Mutex::new(api_server),
            etcd,
            authority,
            config,
            kubeconfig,
            tools,
            port,
            issued: AtomicU32::new(0),
            directory,
        };
        plane.ready().await?;
        plane.etcd.still_runs()?;
        Ok(plane)
    }

    /// One whole cluster for all tests of this process that run at the same time; it ends with the last of them. For tests
    /// that keep to their own namespace: webhooks, policies and KubeVirt's configuration are everybody's.
    pub async fn shared() -> Result<Arc<Self>> {
        static SHARED: tokio::sync::Mutex<Weak<ControlPlane>> = tokio::sync::Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        if let Some(plane) = shared.upgrade() {
            return Ok(plane);
        }
        let plane = Arc::new(Self::start_whole().await?);
        *shared = Arc::downgrade(&plane);
        Ok(plane)
    }

    /// A client with all rights, bound to the calling test's runtime (call it inside one).
    pub fn client(&self) -> Result<Client> {
        Client::try_from(self.config.clone()).context("cannot make a client")
    }

    /// A client with all rights that acts under this user's name, as admission and the audit log see it.
    pub fn client_as(&self, user: &str) -> Result<Client> {
        let mut config = self.config.clone();
        for (name, value) in [("impersonate-user", user), ("impersonate-group", "system:masters")] {
            config.headers.push((http::HeaderName::from_static(name), http::HeaderValue::from_str(value)?));
        }
        Client::try_from(config).with_context(|| format!("cannot make a client for {user}"))
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubeconfig for somebody else, who has the rights that RBAC gives to this user and group.
    pub fn kubeconfig_of(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        write_kubeconfig(self.directory.path(), &self.unique("user"), self.port, &self.authority, user, group)
    }

    /// `https://127.0.0.1:PORT` of the API server.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The temporary directory of this control plane; files put here vanish with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The folder of the Kubernetes tools.
    pub fn tools(&self) -> &Path {
        &self.tools
    }

    /// The last lines of the API server's log.
    pub fn log_tail(&self, lines: usize) -> String {
        self.api_server().log_tail(lines)
    }

    /// The API server goes away, as in a crash. [`Self::restart_api_server`] brings it back.
    pub fn stop_api_server(&self) {
        self.api_server().kill();
    }

    /// The API server comes (back), at the same address and with the same data; waits until it is ready.
    pub async fn restart_api_server(&self) -> Result<()> {
        self.stop_api_server();
        let fresh = start_api_server(&self.tools, self.directory.path(), self.port, self.is_whole())?;
        *self.api_server() = fresh;
        self.ready().await
    }

    /// A name that nobody else in this control plane has.
    pub fn unique(&self, prefix: &str) -> String {
        format!("{prefix}-{}", self.issued.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn api_server(&self) -> MutexGuard<'_, Process> {
        // A panic while the lock was held leaves the process as good as before.
        self.api_server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ready(&self) -> Result<()> {
        let end = Instant::now() + START_DEADLINE;
        let client = self.client()?;
        loop {
            self.api_server().still_runs()?;
            let probe = http_get(&client, "/readyz");
            let said = match tokio::time::timeout(Duration::from_secs(2), probe).await {
                Ok(Ok(text)) if text == "ok" => return Ok(()),
                Ok(Ok(text)) => text,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer within 2 s".to_owned(),
            };
            if Instant::now() >= end {
                bail!("kube-apiserver is not ready after {START_DEADLINE:?} ({said}); its log ends:\n{}", self.log_tail(25));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn http_get(client: &Client, path: &str) -> Result<String> {
    Ok(client.request_text(http::Request::get(path).body(Vec::new())?).await?)
}

/// The folder with etcd, kube-apiserver and the others, as `setup.sh --tools` tells it; asked once.
fn tools() -> Result<PathBuf> {
    static TOOLS: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("setup/setup.sh");
        let asked =
            Command::new(&script).arg("--tools").output().map_err(|error| format!("cannot run {}: {error}", script.display()))?;
        if !asked.status.success() {
            return Err(String::from_utf8_lossy(&asked.stderr).trim().to_owned());
        }
        Ok(PathBuf::from(String::from_utf8_lossy(&asked.stdout).trim()))
    });
    match &*TOOLS {
        Ok(path) => Ok(path.clone()),
        Err(error) => bail!("{error}"),
    }
}

fn write_secrets(dir: &Path, authority: &Authority) -> Result<()> {
    let server = authority.server(&["kubernetes", "kubernetes.default", "kubernetes.default.svc", "10.0.0.1"])?;
    let (signing, verifying) = pki::token_keys()?;
    for (name, content) in [
        ("ca.crt", authority.certificate()),
        ("server.crt", &server.certificate),
        ("server.key", &server.key),
        ("tokens.key", &signing),
        ("tokens.pub", &verifying),
        ("audit.json", account::AUDIT_POLICY),
    ] {
        write_private(&dir.join(name), content)?;
    }
    Ok(())
}

fn write_private(path: &Path, content: &str) -> Result<()> {
    std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?)
}

fn write_kubeconfig(
    dir: &Path,
    name: &str,
    port: u16,
    authority: &Authority,
    user: &str,
    group: Option<&str>,
) -> Result<PathBuf> {
    let person = authority.client(user, group)?;
    let (certificate, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    write_private(&certificate, &person.certificate)?;
    write_private(&key, &person.key)?;
    let path = dir.join(format!("{name}.kubeconfig"));
    let credentials = serde_json::json!({ "client-certificate": certificate, "client-key": key });
    write_private(&path, &kubeconfig(dir, port, user, &credentials)?)?;
    Ok(path)
}

/// A kubeconfig for this API server, as YAML.
fn kubeconfig(dir: &Path, port: u16, user: &str, credentials: &serde_json::Value) -> Result<String> {
    Ok(serde_yaml::to_string(&serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "e2e",
        "clusters": [{ "name": "e2e", "cluster": {
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority": dir.join("ca.crt"),
        }}],
        "users": [{ "name": user, "user": credentials }],
        "contexts": [{ "name": "e2e", "context": { "cluster": "e2e", "user": user } }],
    }))?)
}

/// etcd speaks over unix sockets in the private directory: no port to find, nobody else gets in.
fn start_etcd(tools: &Path, dir: &Path) -> Result<Process> {
    let client = format!("unix://{}", dir.join("etcd.sock").display());
    let peer = format!("unix://{}", dir.join("etcd-peer.sock").display());
    let mut command = process::dying_with_us(tools.join("etcd"));
    command
        .args(["--name", "e2e", "--log-level", "warn", "--unsafe-no-fsync", "--data-dir"])
        .arg(dir.join("etcd"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("e2e={peer}")]);
    Process::start("etcd", command, dir.join("etcd.log"))
}

fn start_api_server(tools: &Path, dir: &Path, port: u16, whole: bool) -> Result<Process> {
    let file = |name: &str| dir.join(name).display().to_string();
    let mut command = process::dying_with_us(tools.join("kube-apiserver"));
    if !whole {
        // Without a controller-manager no namespace has a default service account, and no pod would be let in.
        command.arg("--disable-admission-plugins=ServiceAccount");
    }
    for (flag, value) in [
        ("etcd-servers", format!("unix://{}", file("etcd.sock"))),
        ("bind-address", "127.0.0.1".to_owned()),
        ("advertise-address", "127.0.0.1".to_owned()),
        ("endpoint-reconciler-type", "none".to_owned()),
        ("secure-port", port.to_string()),
        ("cert-dir", file("certificates")),
        ("tls-cert-file", file("server.crt")),
        ("tls-private-key-file", file("server.key")),
        ("client-ca-file", file("ca.crt")),
        ("authorization-mode", "RBAC".to_owned()),
        ("service-account-issuer", format!("https://127.0.0.1:{port}")),
        ("service-account-signing-key-file", file("tokens.key")),
        ("service-account-key-file", file("tokens.pub")),
        ("service-cluster-ip-range", "10.0.0.0/24".to_owned()),
        ("allow-privileged", "true".to_owned()),
        ("audit-policy-file", file("audit.json")),
        ("audit-log-path", file("audit.log")),
        // A test that ends a connection late must not wait for the default minute.
        ("shutdown-watch-termination-grace-period", "0s".to_owned()),
    ] {
        command.arg(format!("--{flag}={value}"));
    }
    Process::start("kube-apiserver", command, dir.join("kube-apiserver.log"))
}

/// A port on loopback below the range from which the kernel serves outgoing connections, so that no client of a test takes it
/// between this look and the server's start.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 20_000;
    const RANGE: u32 = 12_000;
    // Tests of several processes run side by side: each begins elsewhere.
    let own = std::process::id().wrapping_mul(97);
    for _ in 0..RANGE {
        let offset = own.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % RANGE;
        let port = u16::try_from(FIRST + offset)?;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port on 127.0.0.1 between {FIRST} and {}", FIRST + RANGE)
}

/// Removes the directories of control planes whose owner was killed outright.
fn sweep_abandoned() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY_PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
