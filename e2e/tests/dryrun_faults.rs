//! The dry run when things go wrong: what it says, and that it leaves nothing behind.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    future::{Future, pending},
    process::Command,
    time::Duration,
};

use migvisor::{
    dryrun::{self, DryRunError, Plan, Reason, Report},
    model::units::BytesPerSecond,
    qemu::{
        migration::{self, MigrationStatus},
        monitor::Monitor,
        qmp::QmpError,
        vm::{self, RunState},
    },
};
use migvisor_e2e::{
    lab::{GuestSpec, Outcome, Settings, Vm, VmSpec, migrate},
    soak::{Belongings, capped, dry_run, guest, never_stopped, product_monitor},
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

/// Guests share two cores: one test at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A run of half a minute: plenty of time for something to happen to it.
fn endless() -> Plan {
    capped(30)
}

/// Starts an endless run, does something to its VM after half a second, and waits for what comes of it.
async fn meanwhile<'a, F: Future<Output = ()> + 'a>(
    vm: &'a mut Vm,
    plan: &Plan,
    act: impl FnOnce(&'a mut Vm) -> F,
) -> Result<Report, DryRunError> {
    let (monitor, plan) = (product_monitor(vm).await.unwrap(), plan.clone());
    let running = tokio::spawn(async move { dryrun::run(monitor, &plan, |_| (), pending()).await });
    sleep(Duration::from_millis(500)).await;
    act(vm).await;
    timeout(Duration::from_secs(30), running).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn withdrawn_or_forgotten_it_leaves_nothing_behind() {
    let _alone = ALONE.lock().await;
    let (mut vm, _) = guest().await.unwrap();
    // Settings that somebody left, some of which a run cannot have on.
    let left = [("auto-converge", true), ("pause-before-switchover", true), ("events", true)];
    migration::set_capabilities(vm.lab(), &left).await.unwrap();
    vm.lab()
        .execute::<Value>("migrate-set-parameters", json!({ "downtime-limit": 123, "max-bandwidth": 77 << 20 }))
        .await
        .unwrap();
    let before = Belongings::of(&mut vm).await.unwrap();
    let withdrawn = async {
        sleep(Duration::from_millis(700)).await;
        Reason("the VM's spec changed".to_owned())
    };
    let error = dryrun::run(product_monitor(&vm).await.unwrap(), &endless(), |_| (), withdrawn).await.unwrap_err();
    assert!(matches!(&error, DryRunError::Withdrawn { .. }) && error.to_string().contains("spec changed"), "{error}");
    before.unchanged(&mut vm).await.unwrap();

    // Nobody waits any more.
    let plan = endless();
    let abandoned = dryrun::run(product_monitor(&vm).await.unwrap(), &plan, |_| (), pending());
    assert!(timeout(Duration::from_millis(700), abandoned).await.is_err());
    before.unchanged(&mut vm).await.unwrap();

    // Its connections of multifd and their socket go, too.
    let meeting = tempfile::tempdir().unwrap();
    let place = dryrun::Meeting { ours: meeting.path().to_owned(), theirs: meeting.path().to_owned() };
    let plan = Plan { channels: 8, link: Some(BytesPerSecond(30 << 20)), meeting: Some(place), ..endless() };
    assert!(
        timeout(Duration::from_millis(700), dryrun::run(product_monitor(&vm).await.unwrap(), &plan, |_| (), pending()))
            .await
            .is_err()
    );
    before.unchanged(&mut vm).await.unwrap();
    assert_eq!(std::fs::read_dir(meeting.path()).unwrap().count(), 0);
    never_stopped(&mut vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_in_mid_run_are_told_and_cleaned_up_after() {
    let _alone = ALONE.lock().await;
    let (mut vm, pulse) = guest().await.unwrap();
    let before = Belongings::of(&mut vm).await.unwrap();

    // A line that carries nothing.
    let stuck = Plan { link: Some(BytesPerSecond(1)), ..capped(100) };
    let error = dry_run(&vm, &stuck).await.unwrap_err();
    assert!(matches!(error, DryRunError::Stalled { .. }), "{error}");
    before.unchanged(&mut vm).await.unwrap();
    never_stopped(&mut vm).await.unwrap();

    // Somebody cancels it.
    let error = meanwhile(&mut vm, &endless(), |vm| async { migration::cancel(vm.lab()).await.unwrap() }).await.unwrap_err();
    assert!(matches!(error, DryRunError::Interrupted { .. }), "{error}");
    before.unchanged(&mut vm).await.unwrap();
    never_stopped(&mut vm).await.unwrap();

    // Somebody stops the guest: it stays stopped, and goes on when told to.
    let error = meanwhile(&mut vm, &endless(), |vm| async { vm.pause().await.unwrap() }).await.unwrap_err();
    assert!(matches!(error, DryRunError::Stopped { state: RunState::Paused }), "{error}");
    before.unchanged(&mut vm).await.unwrap();
    assert_eq!(vm::status(vm.lab()).await.unwrap().state, RunState::Paused);
    vm.resume().await.unwrap();
    pulse.reset().unwrap();
    sleep(Duration::from_millis(200)).await;
    assert!(pulse.longest().unwrap() > Duration::ZERO, "the guest writes no more");

    // QEMU dies.
    let error = meanwhile(&mut vm, &endless(), |vm| async { vm.kill() }).await.unwrap_err();
    assert!(matches!(error, DryRunError::Qmp(QmpError::Closed { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_of_somebody_elses_is_left_alone() {
    let _alone = ALONE.lock().await;
    let (mut vm, _) = guest().await.unwrap();
    let spec = vm.spec().clone();
    let mut target = Vm::incoming(spec).await.unwrap();
    let (monitor, plan) = (product_monitor(&vm).await.unwrap(), endless());
    let running = tokio::spawn(async move { dryrun::run(monitor, &plan, |_| (), pending()).await });
    // Long enough for theirs to be younger beyond doubt.
    sleep(Duration::from_millis(1500)).await;
    migration::cancel(vm.lab()).await.unwrap();
    while migration::query(vm.lab()).await.unwrap().status.is_some_and(MigrationStatus::is_active) {
        sleep(Duration::from_millis(1)).await;
    }
    // As libvirt does: every capability and parameter of theirs, whatever they find.
    let off = [("switchover-ack", false), ("return-path", false)];
    let truth = loop {
        match migration::set_capabilities(vm.lab(), &off).await {
            Ok(()) => break migrate(&mut vm, &mut target, Settings::capped(100)).await.unwrap(),
            Err(_) => sleep(Duration::from_millis(1)).await,
        }
    };
    let error = timeout(Duration::from_secs(20), running).await.unwrap().unwrap().unwrap_err();
    println!("{error}");
    assert!(matches!(error, DryRunError::Foreign { .. } | DryRunError::Interrupted { .. }), "{error}");
    assert_eq!(truth.status, Outcome::Completed, "{truth:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_be_dry_run_is_refused_untouched() {
    let _alone = ALONE.lock().await;
    let blockers = [
        ["-object", "memory-backend-file,id=shared,share=on,mem-path=/dev/shm,size=1M"],
        ["-device", "ivshmem-plain,memdev=shared"],
    ];
    let vm = Vm::start(VmSpec::new(GuestSpec::idle()).extra(blockers.as_flattened())).await.unwrap();
    let error = dry_run(&vm, &capped(100)).await.unwrap_err();
    assert!(matches!(error, DryRunError::Blocked { .. }) && error.to_string().contains("ivshmem"), "{error}");

    let network =
        [["-netdev", "hubport,id=net0,hubid=0"], ["-device", "virtio-net-pci,id=nic0,netdev=net0,failover=on,romfile="]];
    let vm = Vm::start(VmSpec::new(GuestSpec::idle()).extra(network.as_flattened())).await.unwrap();
    let error = dry_run(&vm, &capped(100)).await.unwrap_err();
    assert!(matches!(&error, DryRunError::Failover { device } if device.contains("nic0")), "{error}");

    let (mut vm, _) = guest().await.unwrap();
    let before = Belongings::of(&mut vm).await.unwrap();
    for node in ["one", "two"] {
        let disk = json!({ "driver": "null-co", "node-name": node, "size": 1 << 30, "read-zeroes": true });
        vm.lab().execute::<Value>("blockdev-add", disk).await.unwrap();
    }
    let backup = json!({ "job-id": "backup0", "device": "one", "target": "two", "sync": "full", "speed": 1 });
    vm.lab().execute::<Value>("blockdev-backup", backup).await.unwrap();
    let error = dry_run(&vm, &capped(100)).await.unwrap_err();
    assert!(matches!(&error, DryRunError::Job { id, kind } if id == "backup0" && kind == "backup"), "{error}");
    vm.lab().execute::<Value>("block-job-cancel", json!({ "device": "backup0", "force": true })).await.unwrap();

    vm.pause().await.unwrap();
    let error = dry_run(&vm, &capped(100)).await.unwrap_err();
    assert!(matches!(error, DryRunError::NotRunning { state: RunState::Paused }), "{error}");
    vm.resume().await.unwrap();

    // Tied to one CPU each; realtime where this machine lets us.
    let cpus: Vec<Value> = vm.lab().execute("query-cpus-fast", Value::Null).await.unwrap();
    let thread = cpus[0]["thread-id"].to_string();
    let tie = |cpus: &str| assert!(Command::new("taskset").args(["-pc", cpus, &thread]).output().unwrap().status.success());
    tie("0");
    assert!(matches!(dry_run(&vm, &capped(100)).await.unwrap_err(), DryRunError::DedicatedCpus));
    tie("0-1");
    if Command::new("chrt").args(["-f", "-p", "1", &thread]).output().unwrap().status.success() {
        assert!(matches!(dry_run(&vm, &capped(100)).await.unwrap_err(), DryRunError::Realtime));
        assert!(Command::new("chrt").args(["-o", "-p", "0", &thread]).output().unwrap().status.success());
    }

    for (plan, says) in [
        (Plan { downtime_limits: vec![], ..capped(100) }, "no downtime limit"),
        (Plan { downtime_limits: vec![Duration::ZERO], ..capped(100) }, "stop the guest"),
        (Plan { compression: dryrun::Compression::Zstd, ..capped(100) }, "channels"),
        (Plan { compression: dryrun::Compression::Xbzrle, ..capped(100) }, "command line only"),
        (Plan { journal: Some("/proc/none".into()), ..capped(100) }, "cannot keep QEMU's settings"),
    ] {
        let error = dry_run(&vm, &plan).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    before.unchanged(&mut vm).await.unwrap();

    let mut target = Vm::incoming(vm.spec().clone()).await.unwrap();
    assert!(matches!(dry_run(&target, &capped(100)).await.unwrap_err(), DryRunError::Incoming));
    let socket = vm.qmp().to_owned();
    let slow = Settings { time_budget: Duration::from_secs(3), ..Settings::capped(2) };
    let migrating = tokio::spawn(async move { migrate(&mut vm, &mut target, slow).await.map(|truth| (truth, vm)) });
    sleep(Duration::from_secs(1)).await;
    let monitor = Monitor::connect(&socket.into(), Duration::from_secs(5)).await.unwrap();
    let error = dryrun::run(monitor, &capped(100), |_| (), pending()).await.unwrap_err();
    assert!(matches!(error, DryRunError::Migrating { .. }) && error.is_refusal(), "{error}");
    let (truth, _vm) = migrating.await.unwrap().unwrap();
    assert_eq!(truth.status, Outcome::TimedOut, "the dry run disturbed it: {truth:?}");
}
