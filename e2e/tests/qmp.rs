//! The product's QMP code on a real QEMU: what it reads, and what it refuses.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use migvisor::qemu::{
    dirty_rate::{DirtyRateMode, calc_dirty_rate, calc_dirty_rate_within},
    migration::{self, MigrationStatus},
    monitor::Monitor,
    qmp::{QmpError, Version},
    ram::{guest_ram, guest_ram_bytes, ram_blocks},
    vm::{VmError, ensure_measurable},
};
use migvisor_e2e::lab::{GuestSpec, Settings, Vm, VmSpec, migrate};
use serde_json::{Value, json};

const SHORT: Duration = Duration::from_secs(5);
const BITMAP: DirtyRateMode = DirtyRateMode::DirtyBitmap;

async fn product(vm: &Vm) -> Monitor {
    Monitor::connect(&vm.qmp().to_owned().into(), SHORT).await.unwrap()
}

#[tokio::test]
async fn connects_and_tells_who_is_there() {
    let vm = Vm::start(VmSpec::new(GuestSpec::idle())).await.unwrap();
    let mut qmp = product(&vm).await;
    assert!(qmp.version() >= Version { major: 8, minor: 2, micro: 0 }, "{}", qmp.version());
    assert_eq!(qmp.peer_pid(), i32::try_from(vm.pid()).ok());
    let refused = qmp.execute::<Value>("no-such-command", json!({})).await.unwrap_err();
    assert!(matches!(&refused, QmpError::Refused { class, .. } if class == "CommandNotFound"), "{refused:?}");
    assert!(ensure_measurable(&mut qmp).await.unwrap().running);

    // One client a socket: the second one waits for a greeting that does not come.
    let busy = Monitor::connect(&vm.qmp().to_owned().into(), Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(busy, QmpError::Busy { .. }), "{busy:?}");
    drop(qmp);
    Monitor::connect(&vm.qmp().to_owned().into(), SHORT).await.unwrap();
}

#[tokio::test]
async fn finds_the_ram_of_one_and_of_two_nodes() {
    let vm = Vm::start(VmSpec::new(GuestSpec::still(64))).await.unwrap();
    let mut qmp = product(&vm).await;
    let ram = guest_ram(&mut qmp).await.unwrap();
    assert_eq!(ram.blocks.iter().map(|block| (block.name.as_str(), block.used.0)).collect::<Vec<_>>(), [("pc.ram", 512 << 20)]);
    assert_eq!(guest_ram_bytes(&mut qmp).await.unwrap().0, 512 << 20);
    assert!(ram_blocks(&mut qmp).await.unwrap().len() > 1, "ROMs are blocks, too");
    // The address is the right one: the guest's first data page has its filling.
    assert_eq!(read_page(vm.pid(), ram.blocks[0].host_address + (8192 << 12)), [1_u8; 64]);

    let nodes = [
        ["-object", "memory-backend-ram,id=ram-node0,size=256M"],
        ["-object", "memory-backend-ram,id=ram-node1,size=256M"],
        ["-numa", "node,memdev=ram-node0"],
        ["-numa", "node,memdev=ram-node1"],
        ["-device", "VGA,romfile="],
    ];
    let vm = Vm::start(VmSpec::new(GuestSpec::idle()).extra(nodes.as_flattened())).await.unwrap();
    let ram = guest_ram(&mut product(&vm).await).await.unwrap();
    let sizes: Vec<_> = ram.blocks.iter().map(|block| (block.name.as_str(), block.used.0)).collect();
    assert_eq!(sizes, [("ram-node0", 256 << 20), ("ram-node1", 256 << 20)]);
}

fn read_page(pid: u32, address: u64) -> [u8; 64] {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 64];
    std::fs::File::open(format!("/proc/{pid}/mem")).unwrap().read_exact_at(&mut bytes, address).unwrap();
    bytes
}

#[tokio::test]
async fn waits_for_another_measurement_and_does_not_take_it_for_its_own() {
    let mut vm = Vm::start(VmSpec::new(GuestSpec::uniform(4096, 2))).await.unwrap();
    let mut qmp = product(&vm).await;
    // Somebody else's, of 700 ms: ours comes after it.
    begin_measurement(vm.lab(), 700).await;
    let rate = calc_dirty_rate(&mut qmp, Duration::from_millis(100), BITMAP).await.unwrap();
    assert!((100..400).contains(&rate.window.as_millis()), "{rate:?}");

    begin_measurement(vm.lab(), 30_000).await;
    let patience = Duration::from_millis(300);
    let busy = calc_dirty_rate_within(&mut qmp, Duration::from_millis(100), BITMAP, patience).await.unwrap_err();
    assert!(matches!(busy, VmError::MeasurementBusy { .. }), "{busy:?}");
}

async fn begin_measurement(qmp: &mut Monitor, ms: u64) {
    let arguments = json!({"calc-time": ms, "calc-time-unit": "millisecond", "mode": "page-sampling"});
    qmp.execute::<Value>("calc-dirty-rate", arguments).await.unwrap();
}

#[tokio::test]
async fn samples_pages_too() {
    let vm = Vm::start(VmSpec::new(GuestSpec::uniform(65_536, 20))).await.unwrap();
    let mode = DirtyRateMode::PageSampling { sample_pages: 16_384 };
    let rate = calc_dirty_rate(&mut product(&vm).await, Duration::from_secs(1), mode).await.unwrap();
    let expected = GuestSpec::uniform(65_536, 20).uniform_curve(rate.window.as_secs_f64() * 1000.0);
    println!("page sampling: {} pages, expected {expected:.0}", rate.pages());
    assert!((rate.pages() as f64 / expected - 1.0).abs() < 0.15, "{rate:?} instead of {expected}");
}

#[tokio::test]
async fn a_vm_that_dies_in_mid_measurement() {
    let mut vm = Vm::start(VmSpec::new(GuestSpec::idle())).await.unwrap();
    let mut qmp = product(&vm).await;
    let measuring = calc_dirty_rate(&mut qmp, Duration::from_secs(20), BITMAP);
    let killed = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        vm.kill();
    };
    let (result, ()) = tokio::join!(tokio::time::timeout(Duration::from_secs(3), measuring), killed);
    let error = result.unwrap().unwrap_err();
    assert!(matches!(error, VmError::Qmp(QmpError::Closed { .. })), "{error:?}");
    let gone = Monitor::connect(&vm.qmp().to_owned().into(), SHORT).await.unwrap_err();
    assert!(matches!(gone, QmpError::Connect { .. }), "{gone:?}");
}

#[tokio::test]
async fn refuses_an_incoming_vm() {
    let vm = Vm::incoming(VmSpec::new(GuestSpec::idle())).await.unwrap();
    let error = ensure_measurable(&mut product(&vm).await).await.unwrap_err();
    assert!(matches!(error, VmError::Incoming), "{error:?}");
}

#[tokio::test]
async fn refuses_a_vm_that_migrates_and_reports_a_paused_one() {
    let guest = GuestSpec::uniform(32_768, 20);
    let mut source = Vm::start(VmSpec::new(guest)).await.unwrap();
    let mut qmp = product(&source).await;
    source.pause().await.unwrap();
    assert!(ensure_measurable(&mut qmp).await.unwrap().is_paused());
    source.resume().await.unwrap();
    assert_eq!(migration::query(&mut qmp).await.unwrap().status, None);

    let mut target = Vm::incoming(VmSpec::new(guest)).await.unwrap();
    let settings = Settings { time_budget: Duration::from_secs(2), ..Settings::capped(20) };
    let looking = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let error = ensure_measurable(&mut qmp).await.unwrap_err();
        let info = migration::query(&mut qmp).await.unwrap();
        (error, info)
    };
    let (truth, (error, info)) = tokio::join!(migrate(&mut source, &mut target, settings), looking);
    truth.unwrap();
    assert!(matches!(error, VmError::Migrating { status: MigrationStatus::Active }), "{error:?}");
    let ram = info.ram.unwrap();
    assert!(info.total_time.is_some() && ram.total.0 >= 512 << 20 && ram.remaining.0 > 0 && ram.normal > 0, "{info:?}");
    assert!(ensure_measurable(&mut qmp).await.unwrap().running, "cancelled: it may be measured again");
}
