//! A launcher: a real libvirt daemon of its own with the paced guest as its domain, laid out as on a KubeVirt node. In: a pods'
//! directory, a pod's UID, a guest. Out: a socket at the kubelet's path, a QEMU in the pod's cgroup.
//!
//! The daemon lives in namespaces of its own (mounts, so that its directories are its own; processes, so that it and every QEMU
//! of it ends with the value, and with this process, however that ends), as in a container. Only its sockets are shared.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{
    cgroup::{Cgroup, Driver},
    guest::{self, GuestSpec},
    vm::kvm,
};
use crate::process::{Process, dying_with_us};

/// Where a pod's libvirt runtime directory is, from the pod's directory on.
pub const RUNTIME: &str = "volumes/kubernetes.io~empty-dir/libvirt-runtime";
/// Starting a daemon on a busy machine; booting a guest.
const PATIENCE: Duration = Duration::from_secs(60);
/// KubeVirt's launcher is not root; any user will do that has a name.
const NOBODY: u32 = 65534;

/// As whom the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As root: `qemu:///system`.
    System,
    /// As somebody else: `qemu:///session`, as KubeVirt's launchers do unless told otherwise.
    Session,
}

/// A domain.
#[derive(Debug, Clone)]
pub struct DomainSpec {
    /// Its name; KubeVirt's are `namespace_vmi`.
    pub name: String,
    /// Guest RAM, MiB.
    pub memory_mib: u32,
    /// What the guest does.
    pub guest: GuestSpec,
    /// More elements of the domain's XML, such as `<memoryBacking>`.
    pub extra: String,
}

impl DomainSpec {
    /// 512 MiB with this guest.
    pub fn new(name: &str, guest: GuestSpec) -> Self {
        Self { name: name.to_owned(), memory_mib: 512, guest, extra: String::new() }
    }

    /// With more of a domain's XML.
    #[must_use]
    pub fn extra(mut self, xml: &str) -> Self {
        self.extra.push_str(xml);
        self
    }
}

/// A pod's libvirt, ended on drop.
#[derive(Debug)]
pub struct Launcher {
    process: Process,
    mode: Mode,
    driver: Option<Driver>,
    socket: PathBuf,
    // After the processes in it.
    _cgroup: Option<Cgroup>,
    dir: TempDir,
}

impl Launcher {
    /// Starts the daemon of this pod, in a cgroup as the kubelet's `driver` would make it (`None`: where we are ourselves).
    pub async fn start(pods: &Path, pod_uid: &str, mode: Mode, driver: Option<Driver>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("migvisor-lv-").tempdir()?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let runtime = pods.join(pod_uid).join(RUNTIME);
        fs::create_dir_all(&runtime)?;
        for name in ["etc", "lib", "lib/libvirt", "cache", "log", "home", "dev", "console"] {
            let path = dir.path().join(name);
            fs::create_dir(&path)?;
            owned(&path, mode)?;
        }
        owned(&runtime, mode)?;
        fs::copy(guest::program()?, dir.path().join("guest.elf"))?;
        fs::write(dir.path().join("etc/qemu.conf"), QEMU_CONF)?;
        fs::write(dir.path().join("lib/libvirt/qemu.conf"), SESSION_QEMU_CONF)?;
        // A machine of its own for libvirt, which migrates nothing to where it is already.
        fs::write(dir.path().join("etc/libvirtd.conf"), format!("{LIBVIRTD_CONF}host_uuid = \"{pod_uid}\"\n"))?;
        let cgroup = driver.map(|driver| Cgroup::of_pod(pod_uid, driver)).transpose()?;
        let script = format!("hostname {pod_uid}\n{}", script(dir.path(), &runtime, mode, cgroup.as_ref()));
        let mut command = dying_with_us("unshare");
        command.args(["--uts", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]);
        command.args(["bash", "-euc", &script]);
        let process = Process::start("libvirtd", command, dir.path().join("libvirtd.log"))?;
        let mut launcher = Self { process, mode, driver, socket: runtime.join("virtqemud-sock"), _cgroup: cgroup, dir };
        // One daemon for everything bears another name than KubeVirt's.
        launcher.appears(&runtime.join("libvirt-sock")).await?;
        fs::rename(runtime.join("libvirt-sock"), &launcher.socket)?;
        // The same socket under a name that is short enough for virsh.
        fs::hard_link(&launcher.socket, launcher.dir.path().join("s")).context("the pods' directory lies on another disk")?;
        Ok(launcher)
    }

    /// Another one of the same kind, for another pod: where a domain can be migrated to.
    pub async fn like(&self, pods: &Path, pod_uid: &str) -> Result<Self> {
        Self::start(pods, pod_uid, self.mode, self.driver).await
    }

    async fn appears(&mut self, path: &Path) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !path.exists() {
            self.process.still_runs()?;
            ensure!(Instant::now() < deadline, "{} does not appear; {}", path.display(), self.process.log_tail(25));
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Boots a domain and waits until its guest has filled its pages and begun to write.
    pub async fn boot(&mut self, spec: &DomainSpec) -> Result<()> {
        spec.guest.check(spec.memory_mib)?;
        let file = self.dir.path().join(format!("{}.xml", spec.name));
        fs::write(&file, self.xml(spec))?;
        self.virsh(&["create", &file.to_string_lossy()]).await?;
        let console = self.console(&spec.name);
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(&console).unwrap_or_default().contains("ready") {
            self.process.still_runs()?;
            ensure!(Instant::now() < deadline, "the guest does not boot; libvirt said:\n{}", self.process.log_tail(25));
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The daemon's URI, short enough for virsh.
    pub fn uri(&self) -> String {
        let place = if self.mode == Mode::System { "system" } else { "session" };
        format!("qemu+unix:///{place}?socket={}", self.dir.path().join("s").display())
    }

    /// Runs virsh against this daemon; its output.
    pub async fn virsh(&self, arguments: &[&str]) -> Result<String> {
        tokio::time::timeout(PATIENCE, self.virsh_for_long(arguments)).await.context("virsh does not end")?
    }

    /// The same, for what takes its time: a migration. Whoever drops this ends it.
    pub(super) async fn virsh_for_long(&self, arguments: &[&str]) -> Result<String> {
        let uri = self.uri();
        let mut command = tokio::process::Command::from(Command::new("virsh"));
        command.args(["-q", "-c", &uri]).args(arguments).kill_on_drop(true);
        let output = command.output().await?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "virsh {arguments:?}: {}; libvirt said:\n{}",
            said(&output.stderr),
            self.process.log_tail(10)
        );
        Ok(said(&output.stdout))
    }

    /// The launcher's own folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon's socket, at the kubelet's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The daemon's process.
    pub fn daemon(&self) -> Result<i32> {
        self.member("libvirtd")?.into_iter().min().context("the daemon does not run")
    }

    /// The processes of its QEMUs.
    pub fn qemus(&self) -> Result<BTreeSet<i32>> {
        self.member("qemu-system-x86")
    }

    /// Sends the daemon a signal: SIGSTOP for a hang, SIGKILL for a crash.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.daemon()?), signal)?)
    }

    /// What the daemon said.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Processes of this name in the launcher's namespace.
    fn member(&self, name: &str) -> Result<BTreeSet<i32>> {
        let namespace = fs::read_link(format!("/proc/{}/ns/pid_for_children", self.process.id()))?;
        let ours = |pid: &i32| {
            fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|theirs| theirs == namespace)
                && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let entries = fs::read_dir("/proc")?.flatten();
        Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(ours).collect())
    }

    fn console(&self, name: &str) -> PathBuf {
        self.dir.path().join("console").join(name)
    }

    fn xml(&self, spec: &DomainSpec) -> String {
        let DomainSpec { name, memory_mib, guest, extra } = spec;
        let kind = if kvm() { "kvm" } else { "qemu" };
        let kernel = self.dir.path().join("guest.elf");
        let (kernel, console, words) = (kernel.display(), self.console(name), guest.command_line());
        let console = console.display();
        format!(
            "<domain type='{kind}'><name>{name}</name><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>/usr/share/qemu/qboot.rom</loader>
             <kernel>{kernel}</kernel><cmdline>{words}</cmdline></os>{extra}<devices>
             <emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/><memballoon model='none'/>
             <serial type='file'><source path='{console}'/><target type='isa-debug'><model name='isa-debugcon'/></target>
             <address type='isa' iobase='0xe9'/></serial></devices></domain>"
        )
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.process.kill();
        // The kernel ends the namespace's processes one after the other; what is removed next must not be theirs any more.
        for _ in 0..200 {
            if self.qemus().is_ok_and(|pids| pids.is_empty()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// As root in what is like a container. QEMU's sandbox stays as it is by default: on, with `spawn=deny`.
const QEMU_CONF: &str = r#"
user = "root"
group = "root"
namespaces = []
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
"#;

const SESSION_QEMU_CONF: &str = r#"
security_driver = "none"
stdio_handler = "file"
"#;

const LIBVIRTD_CONF: &str = r#"
listen_tls = 0
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0700"
log_outputs = "3:stderr"
"#;

/// What the namespace's first process does: it moves into the cgroup, puts the launcher's directories where libvirt looks for
/// them, starts the daemon and waits for every process that loses its parent.
fn script(dir: &Path, runtime: &Path, mode: Mode, cgroup: Option<&Cgroup>) -> String {
    let join = cgroup.map(|cgroup| format!("echo 0 > '{}'\n", cgroup.procs().display())).unwrap_or_default();
    let (dir, runtime) = (dir.display(), runtime.display());
    let start = match mode {
        Mode::System => {
            let places = [
                ("etc", "/etc/libvirt"),
                ("lib", "/var/lib/libvirt"),
                ("cache", "/var/cache/libvirt"),
                ("log", "/var/log/libvirt"),
            ];
            let mounts = places.map(|(name, place)| format!("mkdir -p {place}\nmount --bind '{dir}/{name}' {place}\n"));
            format!("{}libvirtd --config /etc/libvirt/libvirtd.conf", mounts.concat())
        }
        Mode::Session => format!(
            "if [ -e /dev/kvm ]; then\n\
             mount -t tmpfs none '{dir}/dev'\nmknod '{dir}/dev/kvm' c 10 232\nchown {NOBODY} '{dir}/dev/kvm'\n\
             mount --bind '{dir}/dev/kvm' /dev/kvm\nfi\n\
             export XDG_RUNTIME_DIR=/run XDG_CONFIG_HOME='{dir}/lib' XDG_CACHE_HOME='{dir}/cache' XDG_DATA_HOME='{dir}/log' HOME='{dir}/home'\n\
             setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups libvirtd --config '{dir}/etc/libvirtd.conf'"
        ),
    };
    format!(
        "{join}mkdir -p /run/libvirt\nmount --bind '{runtime}' /run/libvirt\n{start} --pid-file /run/libvirt/libvirtd.pid &\n\
         # The VMs outlive their daemon, as they do beside virt-launcher.\nwait || true\nsleep infinity\n"
    )
}

fn owned(path: &Path, mode: Mode) -> Result<()> {
    if mode == Mode::Session {
        chown(path, Some(NOBODY), Some(NOBODY)).map_err(|error| anyhow!("cannot give {} away: {error}", path.display()))?;
    }
    Ok(())
}
