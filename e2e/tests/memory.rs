//! Guests whose memory is not one plain block: what the sampler sees of it, and that it does not grow by being looked at.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use migvisor::{
    collector::{CollectError, LookOptions, Observation, Seen, SourceKind, Target, memory::MemoryError, observe},
    model::units::{Bytes, PAGE},
    qemu::vm::VmError,
};
use migvisor_e2e::lab::{
    DomainSpec, GuestSpec, Launcher, Vm, VmSpec,
    libvirt::Mode,
    memory::{HugePages, kib},
};
use tokio::sync::Mutex;

/// Guests share two cores, and the machine's memory is counted: one test at a time.
static MACHINE: Mutex<()> = Mutex::const_new(());
/// 64 MiB, from 224 MiB on: it lies on both sides of 256 MiB.
const ACROSS: GuestSpec = GuestSpec { base: 57_344, ..GuestSpec::uniform(16_384, 20) };

async fn look(vm: &Vm) -> Observation {
    look_at(&Target { monitor: vm.qmp().to_owned().into(), pid: None }, SourceKind::Sampler).await.unwrap()
}

async fn look_at(target: &Target, source: SourceKind) -> Result<Observation, CollectError> {
    observe(target, &LookOptions { duration: Duration::from_secs(4), source, ..LookOptions::default() }, |_| ()).await
}

/// The guest's memory is all there, its data is seen as data, and its writes as what they are.
fn assert_seen(seen: &Observation, guest: &GuestSpec, memory_mib: u64) {
    assert_eq!(seen.ram, Bytes(memory_mib << 20));
    let Seen::Trace(trace) = &seen.seen else { unreachable!("not by the sampler") };
    let data: f64 = trace.samples.iter().filter(|sample| !sample.zero).map(|sample| sample.weight).sum();
    let pages = f64::from(guest.pages);
    println!("{data:.0} pages of data, expected {pages:.0} and what the firmware left");
    assert!((0.97 * pages..1.1 * pages + 600.0).contains(&data), "{data} pages of data");
    let curve = seen.pattern().unwrap().curve();
    for ms in [100.0, 400.0, 1600.0] {
        let expected = guest.uniform_curve(ms);
        println!("{ms} ms: {:.0} pages, expected {expected:.0}", curve.pages(ms));
        assert!((curve.pages(ms) / expected - 1.0).abs() < 0.12, "{ms} ms: {} instead of {expected}", curve.pages(ms));
    }
    let last = f64::from(guest.base + guest.pages);
    assert!(trace.samples.iter().all(|sample| sample.zero || (sample.page as f64) < last), "data where there is none");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_backends_are_one_guest() {
    let _one = MACHINE.lock().await;
    let nodes = [
        ["-object", "memory-backend-ram,id=ram-node0,size=256M"],
        ["-object", "memory-backend-memfd,id=ram-node1,size=256M"],
        ["-numa", "node,memdev=ram-node0"],
        ["-numa", "node,memdev=ram-node1"],
        // Video memory is not the guest's.
        ["-device", "VGA,romfile="],
    ];
    let vm = Vm::start(VmSpec::new(ACROSS).extra(nodes.as_flattened())).await.unwrap();
    assert_seen(&look(&vm).await, &ACROSS, 512);
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_does_not_grow_by_being_looked_at() {
    let _one = MACHINE.lock().await;
    let shared = ["-object", "memory-backend-memfd,id=m0,size=512M,share=on", "-machine", "memory-backend=m0"];
    let vm = Vm::start(VmSpec::new(ACROSS).extra(&shared)).await.unwrap();
    let status = format!("/proc/{}/status", vm.pid());
    let now = || (kib(&status, "RssShmem:").unwrap(), kib("/proc/meminfo", "Shmem:").unwrap());
    let before = now();
    assert!(before.0 >= 64 << 10, "{before:?}: the guest's memory is not shared");
    for source in [SourceKind::Sampler, SourceKind::DirtyBitmap] {
        let seen = look_at(&Target { monitor: vm.qmp().to_owned().into(), pid: None }, source).await.unwrap();
        match &seen.seen {
            Seen::Trace(_) => assert_seen(&seen, &ACROSS, 512),
            // What nobody touched counts as zero here, too.
            Seen::Windows(windows) => assert!((16_384..20_000).contains(&windows.resident_pages), "{windows:?}"),
        }
    }
    let after = now();
    println!("RssShmem and Shmem in KiB: {before:?} before, {after:?} after");
    // The rest of the 512 MiB would be 450 000 KiB.
    assert!(after.0 < before.0 + 1024 && after.1 < before.1 + 8192, "{before:?} before, {after:?} after");
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_are_seen_and_not_used_up() {
    let _one = MACHINE.lock().await;
    // 128 MiB, of which the guest touches 48 and its firmware a few.
    let Some(_reserved) = HugePages::reserve(64).unwrap() else { return };
    let guest = GuestSpec::uniform(8192, 20);
    for share in ["on", "off"] {
        let memory =
            format!("memory-backend-memfd,id=m0,size=128M,hugetlb=on,hugetlbsize=2M,share={share},prealloc=off,reserve=off");
        let huge = ["-object", &memory, "-machine", "memory-backend=m0"];
        let vm = Vm::start(VmSpec::new(guest).memory_mib(128).extra(&huge)).await.unwrap();
        let free = kib("/proc/meminfo", "HugePages_Free:").unwrap();
        assert!(free > 0, "nothing is left to be used up");
        assert_seen(&look(&vm).await, &guest, 128);
        assert_eq!(kib("/proc/meminfo", "HugePages_Free:").unwrap(), free, "looking took huge pages, share={share}");
    }
}

/// Plugged in, not taken up by the guest: the backend counts, and nothing of it comes into being.
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_could_be_plugged_in_is_not_touched() {
    let _one = MACHINE.lock().await;
    let device = [
        ["-m", "512M,maxmem=2G,slots=2"],
        ["-object", "memory-backend-memfd,id=vmem0,size=256M,share=on"],
        ["-device", "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0"],
    ];
    let vm = Vm::start(VmSpec::new(ACROSS).extra(device.as_flattened())).await.unwrap();
    let before = kib("/proc/meminfo", "Shmem:").unwrap();
    assert_seen(&look(&vm).await, &ACROSS, 768);
    let after = kib("/proc/meminfo", "Shmem:").unwrap();
    assert!(after < before + 8192, "Shmem in KiB: {before} before, {after} after");
}

/// Through libvirt, as KubeVirt's VMs with memory of several kinds have it.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_with_two_cells_and_shared_memory() {
    let _one = MACHINE.lock().await;
    let pods = tempfile::tempdir().unwrap();
    let pod = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";
    let mut launcher = Launcher::start(pods.path(), pod, Mode::System, None).await.unwrap();
    let xml = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><cpu><numa>\
               <cell id='0' cpus='0' memory='256' unit='MiB'/><cell id='1' memory='256' unit='MiB'/></numa></cpu>";
    launcher.boot(&DomainSpec::new("default_cells", ACROSS).extra(xml)).await.unwrap();
    let socket = migvisor::qemu::libvirt::Socket::Named(vec![launcher.socket().to_owned()]);
    let monitor = migvisor::qemu::libvirt::LibvirtAddress { socket, domain: None, owner: None }.into();
    let seen = look_at(&Target { monitor, pid: None }, SourceKind::Sampler).await.unwrap();
    assert_seen(&seen, &ACROSS, 512);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incoming_qemu_and_a_foreign_process_are_not_looked_at() {
    let _one = MACHINE.lock().await;
    let incoming = Vm::incoming(VmSpec::new(GuestSpec::idle())).await.unwrap();
    let target = Target { monitor: incoming.qmp().to_owned().into(), pid: Some(i32::try_from(incoming.pid()).unwrap()) };
    for source in [SourceKind::Auto, SourceKind::Sampler, SourceKind::DirtyBitmap, SourceKind::PageSampling] {
        let error = look_at(&target, source).await.unwrap_err();
        assert!(matches!(error, CollectError::Vm(VmError::Incoming)), "{source:?}: {error:?}");
    }
    drop(incoming);
    // Somebody else's process, this one, under the monitor of a VM: the sampler refuses, and automatically QEMU measures.
    let vm = Vm::start(VmSpec::new(ACROSS)).await.unwrap();
    let wrong = Target { monitor: vm.qmp().to_owned().into(), pid: i32::try_from(std::process::id()).ok() };
    let error = look_at(&wrong, SourceKind::Sampler).await.unwrap_err();
    assert!(matches!(error, CollectError::Memory(MemoryError::Elsewhere { .. })), "{error:?}");
    let seen = look_at(&wrong, SourceKind::Auto).await.unwrap();
    let Seen::Windows(windows) = &seen.seen else { unreachable!("a foreign process was sampled") };
    assert_eq!(windows.resident_pages, (512 << 20) / PAGE, "what another process holds says nothing");
}
