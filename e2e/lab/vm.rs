//! A QEMU with the paced guest. In: memory, what the guest does. Out: a running VM with two QMP sockets (a socket serves one
//! client: one for the product, one for the laboratory), which ends with its value.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use migvisor::qemu::{migration, monitor::Monitor};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{
    guest::{self, GuestSpec},
    qemu::Qemu,
};

const QEMU: &str = "qemu-system-x86_64";
/// Starting QEMU on a busy machine, and each answer of its monitor.
const PATIENCE: Duration = Duration::from_secs(20);
/// Booting and filling 2600 MiB where KVM emulates every instruction takes 4 s on an idle machine.
const BOOT: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Guest RAM, MiB.
    pub memory_mib: u32,
    /// What the guest does.
    pub guest: GuestSpec,
    /// Where the product's QMP socket shall be; `None`: in the VM's own folder.
    pub qmp: Option<PathBuf>,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

impl VmSpec {
    /// 512 MiB with this guest.
    pub fn new(guest: GuestSpec) -> Self {
        Self { memory_mib: 512, guest, qmp: None, extra: Vec::new() }
    }

    /// With so much memory.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// With the product's QMP socket there.
    #[must_use]
    pub fn qmp(mut self, path: impl Into<PathBuf>) -> Self {
        self.qmp = Some(path.into());
        self
    }

    /// With more arguments for QEMU.
    #[must_use]
    pub fn extra(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }
}

/// A QEMU that we started. Killed on drop.
#[derive(Debug)]
pub struct Vm {
    process: Qemu,
    lab: Monitor,
    qmp: PathBuf,
    spec: VmSpec,
    // Last: the sockets go after the process.
    dir: TempDir,
}

/// Is KVM here? Without it guests run under TCG: said once, loudly.
pub fn kvm() -> bool {
    static KVM: OnceLock<bool> = OnceLock::new();
    *KVM.get_or_init(|| {
        let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if !usable {
            eprintln!("WARNING: /dev/kvm cannot be opened. Guests run under TCG: slower, without a dirty bitmap; figures do not compare.");
        }
        usable
    })
}

impl Vm {
    /// Boots a guest and waits until it has filled its pages and begun to write.
    pub async fn start(spec: VmSpec) -> Result<Self> {
        let vm = Self::launch(spec, &[]).await?;
        vm.wait_ready().await?;
        Ok(vm)
    }

    /// A QEMU that waits for a migration of the same `spec`; its product socket is its own unless `qmp` says otherwise.
    pub async fn incoming(spec: VmSpec) -> Result<Self> {
        Self::launch(spec, &["-incoming", "defer"]).await
    }

    async fn launch(spec: VmSpec, more: &[&str]) -> Result<Self> {
        spec.guest.check(spec.memory_mib)?;
        let program = guest::program()?;
        let dir = tempfile::Builder::new().prefix("migvisor-lab-").tempdir()?;
        let qmp = spec.qmp.clone().unwrap_or_else(|| dir.path().join("qmp"));
        let lab = dir.path().join("lab");
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let stderr = std::fs::File::create(dir.path().join("stderr"))?;
        let mut process = Qemu::start(QEMU, |command| {
            command
                .args(["-machine", if kvm() { "pc,accel=kvm" } else { "pc,accel=tcg" }])
                // Its threads have names, as under libvirt.
                .args(["-name", "lab,debug-threads=on"])
                .args(["-nodefaults", "-no-user-config", "-display", "none", "-m", &spec.memory_mib.to_string()])
                // The leanest firmware: where KVM emulates, a full BIOS takes 5 s.
                .args(["-bios", "qboot.rom", "-kernel"])
                .arg(&program)
                .args(["-append", &spec.guest.command_line()])
                .args(["-chardev", &format!("file,id=console,path={}", dir.path().join("console").display())])
                .args(["-device", "isa-debugcon,iobase=0xe9,chardev=console"])
                .args(["-qmp", &socket(&qmp), "-qmp", &socket(&lab)])
                .args(&spec.extra)
                .args(more)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(stderr);
        })?;
        let lab = connect(&lab, &mut process).await.with_context(|| complaint(dir.path()))?;
        process.favour();
        Ok(Self { process, lab, qmp, spec, dir })
    }

    async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        loop {
            let console = std::fs::read_to_string(self.dir.path().join("console")).unwrap_or_default();
            if console.contains("ready") {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the guest did not boot within {BOOT:?}; it said `{console}`. {}",
                complaint(self.dir.path())
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The product's QMP socket.
    pub fn qmp(&self) -> &Path {
        &self.qmp
    }

    /// The laboratory's connection to its own QMP socket.
    pub fn lab(&mut self) -> &mut Monitor {
        &mut self.lab
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What was started.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The VM's own folder: sockets, console.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Does its QEMU still run?
    pub fn is_alive(&mut self) -> bool {
        self.process.is_alive()
    }

    /// Ends it the hard way, as an OOM kill would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops the guest's CPUs.
    pub async fn pause(&mut self) -> Result<()> {
        self.lab.execute::<Value>("stop", json!({})).await?;
        Ok(())
    }

    /// Lets them run again.
    pub async fn resume(&mut self) -> Result<()> {
        self.lab.execute::<Value>("cont", json!({})).await?;
        Ok(())
    }

    /// A target: opens its socket for a migration and names it.
    pub(super) async fn listen(&mut self) -> Result<PathBuf> {
        let socket = self.dir.path().join("incoming");
        migration::listen(&mut self.lab, &format!("unix:{}", socket.display())).await?;
        Ok(socket)
    }

    /// What QEMU complained of.
    pub(super) fn complaint(&self) -> String {
        complaint(self.dir.path())
    }
}

async fn connect(socket: &Path, process: &mut Qemu) -> Result<Monitor> {
    let address = socket.to_owned().into();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Monitor::connect(&address, PATIENCE).await {
            Ok(monitor) => return Ok(monitor),
            Err(error) if Instant::now() >= deadline => return Err(error).context("QEMU did not open its monitor"),
            Err(_) if !process.is_alive() => bail!("QEMU ended at once"),
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

fn complaint(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("stderr")).unwrap_or_default();
    if text.trim().is_empty() { "QEMU said nothing".to_owned() } else { format!("QEMU said: {}", text.trim()) }
}
