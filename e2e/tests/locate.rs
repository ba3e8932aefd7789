//! A pod's VM is found by the pod's cgroup and directory, and by nothing that a pod could write.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{fs, os::unix::fs::symlink, path::Path, process::Output, time::Duration};

use migvisor::{
    agent::locate::{Locate, LocateError, PodsDirectory},
    collector::{CollectError, LookOptions, Seen, SourceKind, Target, observe},
    qemu::{
        libvirt::LibvirtError,
        process::{ProcessError, Processes},
        qmp::QmpError,
    },
};
use migvisor_e2e::{
    cluster::product,
    lab::{
        DomainSpec, GuestSpec, Launcher,
        cgroup::{Cgroup, Driver},
        libvirt::{Mode, RUNTIME},
    },
    skip,
};
use tempfile::TempDir;
use tokio::{process::Command, sync::Mutex};

/// Guests share two cores: one test at a time.
static MACHINE: Mutex<()> = Mutex::const_new(());
const OURS: &str = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";
const THEIRS: &str = "11111111-2222-3333-4444-555555555555";
const GUEST: GuestSpec = GuestSpec::uniform(16_384, 20);

/// Whether this machine lets us make a pod's cgroup; said loudly where it does not.
fn cgroups() -> bool {
    match Cgroup::of_pod("99999999-9999-9999-9999-999999999999", Driver::Cgroupfs) {
        Ok(_) => true,
        Err(error) => {
            skip::note(&format!("identity by cgroup: {error:#}"));
            false
        }
    }
}

fn here(pods: &TempDir) -> PodsDirectory {
    PodsDirectory::new(pods.path(), Processes::default())
}

fn look(source: SourceKind) -> LookOptions {
    LookOptions { duration: Duration::from_secs(3), source, ..LookOptions::default() }
}

async fn refusal(target: &Target) -> LibvirtError {
    match observe(target, &look(SourceKind::Auto), |_| ()).await.unwrap_err() {
        CollectError::Qmp(QmpError::Libvirt(error)) => error,
        other => unreachable!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_vm_is_looked_at_whatever_it_is_called() {
    let _one = MACHINE.lock().await;
    if !cgroups() {
        return;
    }
    for (driver, mode) in [(Driver::Cgroupfs, Mode::Session), (Driver::Systemd, Mode::System)] {
        let pods = tempfile::tempdir().unwrap();
        // Two pods, and each calls its VM as the other's should be called.
        let mut ours = Launcher::start(pods.path(), OURS, mode, Some(driver)).await.unwrap();
        let mut theirs = Launcher::start(pods.path(), THEIRS, mode, Some(driver)).await.unwrap();
        ours.boot(&DomainSpec::new(THEIRS, GUEST)).await.unwrap();
        theirs.boot(&DomainSpec::new(OURS, GuestSpec::still(64))).await.unwrap();
        for (launcher, uid, writes) in [(&ours, OURS, true), (&theirs, THEIRS, false)] {
            let target = here(&pods).locate(uid).unwrap();
            assert_eq!(target.pid.as_ref(), launcher.qemus().unwrap().first(), "{driver:?}");
            let seen = observe(&target, &look(SourceKind::Auto), |_| ()).await.unwrap();
            let Seen::Trace(trace) = &seen.seen else { unreachable!("not by the sampler") };
            assert_eq!(trace.changed.iter().flatten().count() > 1000, writes, "{driver:?} {uid}");
        }
        // It ended: said so, and nobody else's is looked at instead.
        drop(ours);
        let gone = here(&pods).locate(OURS).unwrap_err();
        assert!(matches!(&gone, LocateError::Process(ProcessError::None { .. })), "{gone:?}");
        drop(theirs);
        let left = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts = left.lines().filter(|line| line.contains("cgroup")).map(|line| line.split(' ').nth(1).unwrap());
        for name in ["kubepods", "kubepods.slice"] {
            assert!(mounts.clone().all(|mount| !Path::new(mount).join(name).exists()), "{name} stays behind");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_pods_libvirt_is_not_believed() {
    let _one = MACHINE.lock().await;
    if !cgroups() {
        return;
    }
    let pods = tempfile::tempdir().unwrap();
    let mut ours = Launcher::start(pods.path(), OURS, Mode::System, Some(Driver::Cgroupfs)).await.unwrap();
    let theirs = Launcher::start(pods.path(), THEIRS, Mode::System, Some(Driver::Systemd)).await.unwrap();
    ours.boot(&DomainSpec::new("default_one", GuestSpec::idle())).await.unwrap();
    let socket = ours.socket().to_owned();
    let target = here(&pods).locate(OURS).unwrap();
    observe(&target, &look(SourceKind::Auto), |_| ()).await.unwrap();

    // A link to somebody else's socket; their very socket; a link in place of a directory; a file; nothing.
    fs::remove_file(&socket).unwrap();
    symlink(theirs.socket(), &socket).unwrap();
    assert!(matches!(refusal(&target).await, LibvirtError::NotASocket { .. }));
    fs::remove_file(&socket).unwrap();
    fs::hard_link(theirs.socket(), &socket).unwrap();
    let impostor = refusal(&target).await;
    assert!(matches!(impostor, LibvirtError::Impostor { .. }), "{impostor:?}");
    assert!(impostor.to_string().contains(THEIRS), "{impostor}");
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "").unwrap();
    assert!(matches!(refusal(&target).await, LibvirtError::NotASocket { .. }));
    fs::remove_file(&socket).unwrap();
    assert!(matches!(refusal(&target).await, LibvirtError::Socket { .. }));
    let runtime = pods.path().join(OURS).join(RUNTIME);
    fs::rename(&runtime, runtime.with_extension("away")).unwrap();
    symlink(pods.path().join(THEIRS).join(RUNTIME), &runtime).unwrap();
    assert!(matches!(refusal(&target).await, LibvirtError::Socket { .. }));
    // A pod that nobody has.
    let nobody = here(&pods).locate("99999999-9999-9999-9999-999999999999").unwrap_err();
    assert!(matches!(nobody, LocateError::Process(ProcessError::None { .. })), "{nobody:?}");
}

/// `agent.mode=libvirt`: no process of the node is seen, none may be looked into.
#[tokio::test(flavor = "multi_thread")]
async fn page_sampling_needs_neither_the_nodes_processes_nor_ptrace() {
    let _one = MACHINE.lock().await;
    let pods = tempfile::tempdir().unwrap();
    let mut launcher = Launcher::start(pods.path(), OURS, Mode::Session, None).await.unwrap();
    launcher.boot(&DomainSpec::new("default_one", GUEST)).await.unwrap();
    let target = PodsDirectory::without_processes(pods.path()).locate(OURS).unwrap();
    assert_eq!(target.pid, None);
    let seen = observe(&target, &look(SourceKind::PageSampling), |_| ()).await.unwrap();
    let Seen::Windows(windows) = &seen.seen else { unreachable!("not by QEMU") };
    for (ms, pages) in windows.points.iter().filter(|point| point.0 > 150.0) {
        let expected = GUEST.uniform_curve(*ms);
        println!("page sampling through libvirt: {pages:.0} pages in {ms:.0} ms, expected {expected:.0}");
        assert!((pages / expected - 1.0).abs() < 0.25, "{pages} instead of {expected} in {ms} ms");
    }
    // As a process of its own: in a PID namespace where no QEMU is, without the capability to trace.
    let socket = launcher.socket().display().to_string();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc", "setpriv", "--bounding-set", "-sys_ptrace,-sys_admin"]);
    command.args(["--inh-caps", "-sys_ptrace,-sys_admin", "--"]).arg(product::binary().unwrap());
    command.args(["predict", "--libvirt", &socket, "--source", "page-sampling", "--look", "3s", "--bandwidth", "20Mi"]);
    let Output { status, stdout, stderr } = command.args(["--time-budget", "20s"]).kill_on_drop(true).output().await.unwrap();
    let said = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    assert!(status.code() == Some(1) && said.contains("Fails"), "{status}: {said}");
}
