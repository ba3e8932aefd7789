//! The product on a real libvirt daemon, at the places where KubeVirt's is.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{path::Path, process::Output, time::Duration};

use migvisor::{
    dryrun::{self, DryRunError, Plan},
    qemu::{
        dirty_rate::{DirtyRateMode, calc_dirty_rate},
        libvirt::{LibvirtAddress, LibvirtError, Socket},
        migration::{self, MigrationStatus},
        monitor::{Address, Monitor},
        qmp::QmpError,
        ram::guest_ram,
        vm::{VmError, ensure_measurable},
    },
};
use migvisor_e2e::{
    cluster::product,
    lab::{DomainSpec, GuestSpec, Launcher, Vm, VmSpec, libvirt::Mode},
    skip::unless_kvm,
    soak::capped,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    process::Command,
    sync::Mutex,
    time::{Instant, sleep},
};

/// Guests share two cores, and threads are counted: one test at a time.
static MACHINE: Mutex<()> = Mutex::const_new(());
const POD: &str = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";
const SHORT: Duration = Duration::from_secs(2);
const GUEST: GuestSpec = GuestSpec::uniform(16_384, 20);

async fn launcher(pods: &TempDir, mode: Mode) -> Launcher {
    Launcher::start(pods.path(), POD, mode, None).await.unwrap()
}

fn address(socket: &Path, domain: Option<&str>) -> Address {
    let domain = domain.map(str::to_owned);
    LibvirtAddress { socket: Socket::Named(vec![socket.to_owned()]), domain, owner: None }.into()
}

async fn migvisor(args: &[&str]) -> (i32, Value, String) {
    let Output { status, stdout, stderr } =
        Command::new(product::binary().unwrap()).args(args).kill_on_drop(true).output().await.unwrap();
    let out = serde_json::from_slice(&stdout).unwrap_or(Value::Null);
    (status.code().unwrap(), out, String::from_utf8(stderr).unwrap())
}

async fn predict(vm: &[&str], bandwidth: &str) -> (i32, Value, String) {
    let question = ["--bandwidth", bandwidth, "--time-budget", "20s", "--look", "4s", "-o", "json"];
    migvisor(&[&["predict"], vm, &question].concat()).await
}

/// Threads in libvirt's hands, and open files.
fn held() -> (usize, usize) {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let threads = tasks.filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "libvirt\n"));
    (threads.count(), count("/proc/self/fd"))
}

/// What was held before is held again: a cut takes a moment.
async fn nothing_stays(before: (usize, usize)) {
    for _ in 0..150 {
        if held() == before {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(|file| std::fs::read_link(file.path()));
    assert_eq!(held(), before, "threads and files before and after; now {:?}", links.collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forecast_through_libvirt_is_the_one_through_qmp() {
    let _one = MACHINE.lock().await;
    let vm = Vm::start(VmSpec::new(GUEST)).await.unwrap();
    let qmp = vm.qmp().display().to_string();
    let direct = [predict(&["--qmp", &qmp], "100Mi").await, predict(&["--qmp", &qmp], "20Mi").await];
    drop(vm);
    for mode in [Mode::System, Mode::Session] {
        let pods = tempfile::tempdir().unwrap();
        let mut launcher = launcher(&pods, mode).await;
        launcher.boot(&DomainSpec::new("default_calm", GUEST)).await.unwrap();
        let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", launcher.qemus().unwrap().first().unwrap())).unwrap();
        assert!(arguments.contains("spawn=deny"), "{arguments}");
        let socket = launcher.socket().display().to_string();
        assert!(socket.len() > 107, "a socket's address holds 107 bytes, and {socket} is to be longer");
        let place = if mode == Mode::System { "system" } else { "session" };
        let uri = format!("qemu+unix:///{place}?socket={socket}");
        for (bandwidth, (code, expected, _)) in ["100Mi", "20Mi"].into_iter().zip(&direct) {
            let (got, forecast, complaint) = predict(&["--libvirt", &uri, "--domain", "default_calm"], bandwidth).await;
            assert_eq!((got, &forecast["verdict"]), (*code, &expected["verdict"]), "{complaint}{forecast}");
            for key in ["totalMs", "dirtiedPages", "iterations"] {
                let bounds = |of: &Value, at: usize| of["bounds"][key][at].as_f64().unwrap();
                println!("{mode:?} at {bandwidth}: {key} {} through libvirt, {} through QMP", forecast[key], expected[key]);
                let meet = bounds(&forecast, 0) <= bounds(expected, 1) && bounds(expected, 0) <= bounds(&forecast, 1);
                assert!(meet, "{key}: {} and {}", forecast["bounds"], expected["bounds"]);
            }
        }
        // Its one domain need not be named, and a path will do; QEMU's own ways pass through as well.
        for source in ["page-sampling", "dirty-bitmap"] {
            let (code, forecast, complaint) = predict(&["--libvirt", &socket, "--source", source], "20Mi").await;
            assert_eq!(code, direct[1].0, "{source}: {complaint}{forecast}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_pass_through_and_errors_are_qemus() {
    let _one = MACHINE.lock().await;
    let pods = tempfile::tempdir().unwrap();
    let mut launcher = launcher(&pods, Mode::System).await;
    launcher.boot(&DomainSpec::new("default_one", GUEST)).await.unwrap();
    let before = held();
    let mut monitor = Monitor::connect(&address(launcher.socket(), None), SHORT).await.unwrap();
    let qemu = *launcher.qemus().unwrap().first().unwrap();
    assert_eq!(monitor.peer_pid(), Some(qemu), "QEMU's process, not libvirt's");
    assert!(monitor.version() >= migvisor::qemu::vm::OLDEST_QEMU, "{}", monitor.version());
    assert!(ensure_measurable(&mut monitor).await.unwrap().running);
    let ram = guest_ram(&mut monitor).await.unwrap();
    assert_eq!(ram.blocks.iter().map(|block| (block.name.as_str(), block.used.0)).collect::<Vec<_>>(), [("pc.ram", 512 << 20)]);
    let refused = monitor.execute::<Value>("no-such-command", json!({"a": "\0"})).await.unwrap_err();
    assert!(matches!(&refused, QmpError::Refused { class, .. } if class == "CommandNotFound"), "{refused:?}");
    // Events do not come this way: none, once the time is over.
    let began = Instant::now();
    assert_eq!(monitor.next_event(began + Duration::from_millis(200)).await.unwrap(), None);
    assert!(began.elapsed() >= Duration::from_millis(200));
    if unless_kvm("a dirty bitmap through libvirt") {
        let rate = calc_dirty_rate(&mut monitor, Duration::from_millis(400), DirtyRateMode::DirtyBitmap).await.unwrap();
        let expected = GUEST.uniform_curve(rate.window.as_secs_f64() * 1000.0);
        assert!((rate.pages() as f64 / expected - 1.0).abs() < 0.1, "{rate:?} instead of {expected}");
    }
    // Two clients at once are nothing special here.
    drop(Monitor::connect(&address(launcher.socket(), Some("default_one")), SHORT).await.unwrap());

    let other = Monitor::connect(&address(launcher.socket(), Some("default_two")), SHORT).await.unwrap_err();
    assert!(matches!(&other, QmpError::Libvirt(LibvirtError::NoDomain { name }) if name == "default_two"), "{other:?}");
    launcher.boot(&DomainSpec::new("default_two", GuestSpec::idle())).await.unwrap();
    let several = Monitor::connect(&address(launcher.socket(), None), SHORT).await.unwrap_err().to_string();
    assert!(several.contains("default_one") && several.contains("default_two") && several.contains("--domain"), "{several}");
    // A VM that ends under us.
    launcher.virsh(&["destroy", "default_one"]).await.unwrap();
    let gone = monitor.execute::<Value>("query-status", Value::Null).await.unwrap_err();
    assert!(matches!(gone, QmpError::Closed { .. }), "{gone:?}");
    drop(monitor);
    launcher.virsh(&["destroy", "default_two"]).await.unwrap();
    let nothing = Monitor::connect(&address(launcher.socket(), None), SHORT).await.unwrap_err();
    assert!(matches!(nothing, QmpError::Libvirt(LibvirtError::NothingRuns)), "{nothing:?}");
    nothing_stays(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_hangs_costs_the_time_limit_and_nothing_stays() {
    let _one = MACHINE.lock().await;
    let pods = tempfile::tempdir().unwrap();
    let mut launcher = launcher(&pods, Mode::System).await;
    launcher.boot(&DomainSpec::new("default_one", GuestSpec::idle())).await.unwrap();
    let at = address(launcher.socket(), None);
    let before = held();
    let mut monitor = Monitor::connect(&at, SHORT).await.unwrap();
    launcher.signal(Signal::SIGSTOP).unwrap();
    // In mid-command; everything else in this process goes on meanwhile.
    let (ticks, error) = tokio::join!(ticks(SHORT), monitor.execute::<Value>("query-status", Value::Null));
    let error = error.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error:?}");
    assert!(ticks > 50, "{ticks} ticks of 20 ms in {SHORT:?}: the runtime was blocked");
    let again = monitor.execute::<Value>("query-status", Value::Null).await.unwrap_err();
    assert!(matches!(again, QmpError::Closed { .. }), "{again:?}");
    drop(monitor);
    nothing_stays(before).await;
    // While connecting, many times and at once.
    let limit = Duration::from_millis(500);
    let attempts = (0..24).map(|_| async {
        let began = Instant::now();
        let error = Monitor::connect(&at, limit).await.unwrap_err();
        assert!(matches!(error, QmpError::Libvirt(LibvirtError::Hangs { .. })), "{error:?}");
        assert!(began.elapsed() < limit * 4, "{:?}", began.elapsed());
    });
    futures::future::join_all(attempts).await;
    nothing_stays(before).await;
    // On the command line.
    let began = Instant::now();
    let socket = launcher.socket().display().to_string();
    let (code, _, complaint) = predict(&["--libvirt", &socket], "100Mi").await;
    assert!(code == 2 && complaint.contains("may hang") && began.elapsed() < Duration::from_secs(12), "{complaint}");

    launcher.signal(Signal::SIGCONT).unwrap();
    assert!(ensure_measurable(&mut Monitor::connect(&at, SHORT).await.unwrap()).await.unwrap().running);
    // One that dies says so, and the VM runs on.
    let mut monitor = Monitor::connect(&at, SHORT).await.unwrap();
    launcher.signal(Signal::SIGKILL).unwrap();
    let error = monitor.execute::<Value>("query-status", Value::Null).await.unwrap_err();
    assert!(matches!(error, QmpError::Libvirt(LibvirtError::Lost { .. })), "{error:?}");
    drop(monitor);
    while launcher.daemon().is_ok() {
        sleep(Duration::from_millis(20)).await;
    }
    let error = Monitor::connect(&at, SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Libvirt(LibvirtError::Socket { .. })), "{error:?}");
    assert_eq!(launcher.qemus().unwrap().len(), 1);
    nothing_stays(before).await;
}

/// A real migration from one libvirt to another: it can be read along at its source, and neither end is measured meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_migrates_is_read_along_and_not_measured() {
    let _one = MACHINE.lock().await;
    let pods = tempfile::tempdir().unwrap();
    let mut source = launcher(&pods, Mode::System).await;
    let target = Launcher::start(pods.path(), "11111111-2222-3333-4444-555555555555", Mode::System, None).await.unwrap();
    source.boot(&DomainSpec::new("default_one", GuestSpec::uniform(32_768, 60))).await.unwrap();
    let (there, socket) = (target.uri(), source.dir().join("migration"));
    let wire = format!("unix://{}", socket.display());
    let migrate = ["migrate", "--live", "--bandwidth", "40", "default_one", &there, "--migrateuri", &wire];
    let watched = async {
        let mut monitor = Monitor::connect(&address(source.socket(), None), SHORT).await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let info = loop {
            let info = migration::query(&mut monitor).await.unwrap();
            if info.status == Some(MigrationStatus::Active) && info.ram.is_some_and(|ram| ram.dirty_sync_count > 1) {
                break info;
            }
            assert!(Instant::now() < deadline, "{info:?}");
            sleep(Duration::from_millis(100)).await;
        };
        let measured = ensure_measurable(&mut monitor).await.unwrap_err();
        assert!(matches!(measured, VmError::Migrating { .. }), "{measured:?}");
        println!("read along: {info:?}");
        for launcher in [&source, &target] {
            let socket = launcher.socket().display().to_string();
            let (code, forecast, complaint) = predict(&["--libvirt", &socket], "100Mi").await;
            assert!(code == 3 && forecast["verdict"] == "Unknown", "{complaint}{forecast}");
            assert!(forecast["message"].as_str().unwrap().contains("being migrated"), "{forecast}");
        }
        source.virsh(&["domjobabort", "default_one"]).await.unwrap();
    };
    let (migrated, ()) = tokio::join!(source.virsh(&migrate), watched);
    assert!(migrated.unwrap_err().to_string().contains("abort"));
    let mut monitor = Monitor::connect(&address(source.socket(), None), SHORT).await.unwrap();
    assert!(ensure_measurable(&mut monitor).await.unwrap().running, "it runs on where it was");
}

/// What a domain's QEMU has set for migrations.
async fn settings(at: &Address) -> (Value, Value) {
    let mut monitor = Monitor::connect(at, SHORT).await.unwrap();
    let parameters = monitor.execute("query-migrate-parameters", Value::Null).await.unwrap();
    (parameters, monitor.execute("query-migrate-capabilities", Value::Null).await.unwrap())
}

/// A daemon that hangs in mid-run for longer than anybody waits: everything is back as soon as it answers again.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_outlasts_a_daemon_that_hangs() {
    let _one = MACHINE.lock().await;
    let (pods, kept) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut launcher = launcher(&pods, Mode::System).await;
    launcher.boot(&DomainSpec::new("default_one", GuestSpec::uniform(32_768, 60))).await.unwrap();
    let at = address(launcher.socket(), None);
    let held_before = held();
    let before = settings(&at).await;
    let monitor = Monitor::connect(&at, Duration::from_secs(5)).await.unwrap();
    let plan = Plan { journal: Some(kept.path().to_owned()), ..capped(30) };
    let running = tokio::spawn(async move { dryrun::run(monitor, &plan, |_| (), std::future::pending()).await });
    let mut other = Monitor::connect(&at, SHORT).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while migration::query(&mut other).await.unwrap().ram.is_none_or(|ram| ram.transferred.0 < 32 << 20) {
        assert!(Instant::now() < deadline && !running.is_finished(), "it does not begin");
        sleep(Duration::from_millis(50)).await;
    }
    drop(other);
    assert_ne!(settings(&at).await, before, "it borrows nothing");
    launcher.signal(Signal::SIGSTOP).unwrap();
    sleep(Duration::from_secs(9)).await;
    assert!(!running.is_finished(), "it does not even try to put things back");
    assert_eq!(std::fs::read_dir(kept.path()).unwrap().count(), 1, "what was borrowed is written down");
    launcher.signal(Signal::SIGCONT).unwrap();
    let error = tokio::time::timeout(Duration::from_secs(12), running).await.unwrap().unwrap().unwrap_err();
    println!("{error}");
    assert!(matches!(&error, DryRunError::Qmp(QmpError::TimedOut { .. })), "{error:?}");
    assert_eq!(settings(&at).await, before);
    assert_eq!(std::fs::read_dir(kept.path()).unwrap().count(), 0, "what is put back is forgotten");
    let mut monitor = Monitor::connect(&at, SHORT).await.unwrap();
    assert!(ensure_measurable(&mut monitor).await.unwrap().running, "the guest runs, and nothing migrates");
    drop(monitor);
    nothing_stays(held_before).await;
}

async fn ticks(time: Duration) -> usize {
    let end = Instant::now() + time;
    let mut count = 0;
    while Instant::now() < end {
        sleep(Duration::from_millis(20)).await;
        count += 1;
    }
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (file, none) = (file.display().to_string(), directory.path().join("none").display().to_string());
    for (vm, says) in [
        (&["--libvirt", &none][..], "virtqemud"),
        (&["--libvirt", &file], "no socket"),
        (&["--libvirt", "qemu+ssh://host/system"], "on the machine where the VM runs"),
        (&["--libvirt", "vm1"], "neither a libvirt URI"),
        (&["--qmp", &none, "--libvirt", &none], "cannot be used with"),
        (&["--qmp", &none, "--domain", "x"], "cannot be used with"),
        (&[], "--qmp"),
    ] {
        let (code, _, complaint) = predict(vm, "100Mi").await;
        assert!(code == 2 && complaint.contains(says), "{vm:?}: {complaint}");
    }
}
