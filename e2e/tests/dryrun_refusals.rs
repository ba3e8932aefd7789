//! What a dry run would hurt, made for real where that can be had: memory limits of a real cgroup, real huge pages. Devices of the host that no
//! machine of ours has are played by a peer that speaks QMP. Each is refused before anything is touched. (Jobs, paused guests, tied CPUs,
//! migrations: `dryrun_faults.rs`.)
#![allow(clippy::unwrap_used, missing_docs)]

use std::{future::pending, sync::Arc, time::Duration};

use migvisor::{
    dryrun::{self, Allow, Compression, DryRunError, End, Plan},
    model::units::Bytes,
    qemu::monitor::Monitor,
};
use migvisor_e2e::{
    lab::{GuestSpec, Vm, VmSpec, cgroup::Cgroup, memory::HugePages},
    skip,
    soak::{Belongings, capped, dry_run, guest, never_stopped},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
    sync::Mutex,
};

/// Guests share two cores, and the machine's memory is counted: one test at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_limit_without_room_for_the_buffers() {
    let _alone = ALONE.lock().await;
    let (mut vm, _) = guest().await.unwrap();
    let cgroup = match Cgroup::with_memory(24 * MIB) {
        Ok(cgroup) => cgroup,
        Err(error) => return skip::note(&format!("room under a real memory limit: {error:#}")),
    };
    let before = Belongings::of(&mut vm).await.unwrap();
    cgroup.take_in(vm.pid()).unwrap();
    let eight = Plan { channels: 8, ..capped(100) };
    for (plan, least) in [(eight.clone(), 32), (Plan { compression: Compression::Zstd, ..eight.clone() }, 80)] {
        let error = dry_run(&vm, &plan).await.unwrap_err();
        println!("{error}");
        let DryRunError::NoHeadroom { needed, free, cgroup: whose } = &error else { unreachable!("{error:?}") };
        assert!(*needed >= Bytes(least * MIB) && *free <= Bytes(24 * MIB) && error.is_refusal(), "{error:?}");
        assert!(whose.to_string_lossy().contains("migvisor-lab"), "{whose:?}");
    }
    before.unchanged(&mut vm).await.unwrap();
    cgroup.let_go(vm.pid()).unwrap();
    drop(cgroup);
    // With room it goes.
    let cgroup = Cgroup::with_memory(1024 * MIB).unwrap();
    cgroup.take_in(vm.pid()).unwrap();
    assert_eq!(dry_run(&vm, &eight).await.unwrap().end, End::Met);
    cgroup.let_go(vm.pid()).unwrap();
    never_stopped(&mut vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_on_huge_pages_unless_opted_in() {
    let _alone = ALONE.lock().await;
    let Some(_reserved) = HugePages::reserve(64).unwrap() else { return };
    let huge = [
        "-object",
        "memory-backend-memfd,id=m0,size=128M,hugetlb=on,hugetlbsize=2M,share=on,prealloc=off,reserve=off",
        "-machine",
        "memory-backend=m0",
    ];
    let mut vm = Vm::start(VmSpec::new(GuestSpec::uniform(8192, 10)).memory_mib(128).extra(&huge)).await.unwrap();
    let before = Belongings::of(&mut vm).await.unwrap();
    let error = dry_run(&vm, &capped(200)).await.unwrap_err();
    println!("{error}");
    assert!(matches!(&error, DryRunError::Hugepages { page_size: Bytes(size), .. } if *size == 2 * MIB), "{error:?}");
    assert!(error.is_refusal());
    before.unchanged(&mut vm).await.unwrap();
    let opted_in = Plan { allow: Allow { hugepages: true, ..Allow::default() }, ..capped(200) };
    assert_eq!(dry_run(&vm, &opted_in).await.unwrap().end, End::Met);
    never_stopped(&mut vm).await.unwrap();
}

/// Speaks QMP for one client: a running VM with these devices and these network backends. Tells whatever else it was asked to do.
async fn peer(listener: UnixListener, devices: Value, network: &'static str, beyond: Arc<Mutex<Vec<String>>>) {
    let (stream, _) = listener.accept().await.unwrap();
    let (read, mut write) = stream.into_split();
    let greeting =
        json!({ "QMP": { "version": { "qemu": { "major": 10, "minor": 0, "micro": 2 }, "package": "" }, "capabilities": [] } });
    write.write_all(format!("{greeting}\r\n").as_bytes()).await.unwrap();
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let order: Value = serde_json::from_str(&line).unwrap();
        let command = order["execute"].as_str().unwrap();
        let reply = match command {
            "qmp_capabilities" | "query-migrate" => json!({}),
            "query-status" => json!({ "running": true, "status": "running" }),
            "qom-list" if order["arguments"]["path"] == "/machine/peripheral" => devices.clone(),
            "query-jobs" | "qom-list" => json!([]),
            "human-monitor-command" if order["arguments"]["command-line"] == "info network" => json!(network),
            other => {
                beyond.lock().await.push(other.to_owned());
                json!({})
            }
        };
        let reply = json!({ "return": reply, "id": order["id"] });
        write.write_all(format!("{reply}\r\n").as_bytes()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_the_host() {
    let device = |name: &str, kind: &str| json!([{ "name": "type", "type": "string" }, { "name": name, "type": format!("child<{kind}>") }]);
    let vdpa =
        "net0: index=0,type=nic,model=virtio-net-pci\r\n \\ hostnet0: index=0,type=vhost-vdpa,vhostdev=/dev/vhost-vdpa-0\r\n";
    for (devices, network, says) in [
        (device("hostdev0", "vfio-pci"), "", "hostdev0 (vfio-pci) (VFIO)"),
        (device("gpu1", "vfio-pci-nohotplug"), "", "gpu1"),
        (device("disk0", "vhost-vdpa-device-pci"), "", "disk0 (vhost-vdpa-device-pci) is vhost-vdpa"),
        (device("disk0", "virtio-blk-pci"), vdpa, "hostnet0 is vhost-vdpa"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let beyond = Arc::new(Mutex::new(Vec::new()));
        let playing = tokio::spawn(peer(UnixListener::bind(&socket).unwrap(), devices, network, Arc::clone(&beyond)));
        let monitor = Monitor::connect(&socket.into(), Duration::from_secs(5)).await.unwrap();
        let error = dryrun::run(monitor, &capped(100), |_| (), pending()).await.unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains(says), "{error}");
        playing.await.unwrap();
        assert_eq!(*beyond.lock().await, Vec::<String>::new(), "it did more than ask");
    }
}
