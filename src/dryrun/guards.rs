//! What must not be dry-run, asked of QEMU before anything is touched. In: a monitor, the plan. Out: nothing, or why not.
//!
//! What the host says of the process (threads, memory limits) is in [`super::host`].

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Compression, DryRunError, Plan, host, sink};
use crate::{
    model::units::{Bytes, PAGE},
    qemu::{
        migration,
        monitor::Monitor,
        qmp::{QmpError, Version, plain},
        ram::{guest_ram_bytes, ram_blocks},
        vm::{self, RunState, VmError},
    },
};

/// From here on QEMU knows `switchover-ack`: without it nothing would keep a dry run from stopping the guest.
pub(super) const OLDEST_QEMU: Version = Version { major: 8, minor: 1, micro: 0 };
/// Where QEMU keeps the devices that were asked for, with and without a name.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// The dirty bitmaps of QEMU and KVM, bits per page, and what a run takes besides.
const BITS_PER_PAGE: u64 = 4;
const ANYHOW: Bytes = Bytes(16 << 20);
/// A multifd channel: packets, the socket's buffer, a thread; and with zstd its tables and output.
const PER_CHANNEL: Bytes = Bytes(2 << 20);
const PER_ZSTD_CHANNEL: Bytes = Bytes(8 << 20);
/// QEMU's default `xbzrle-cache-size`.
const XBZRLE_CACHE: Bytes = Bytes(64 << 20);

/// Refuses what would be hurt, or could not be told apart from a real migration.
pub(super) async fn check(monitor: &mut Monitor, plan: &Plan) -> Result<(), DryRunError> {
    if monitor.version() < OLDEST_QEMU {
        return Err(DryRunError::TooOld { found: monitor.version() });
    }
    if plan.channels > 0 {
        let fits = sink::fits(1 + u64::from(plan.channels));
        fits.map_err(|(needed, left)| DryRunError::TooManyChannels { channels: plan.channels, needed, left })?;
    }
    state(monitor).await?;
    jobs(monitor).await?;
    devices(monitor).await?;
    if !plan.allow.hugepages {
        hugepages(monitor).await?;
    }
    let pid = plan.pid.or(monitor.peer_pid());
    if let Some(pid) = pid {
        let threads = vcpu_threads(monitor).await?;
        if !plan.allow.realtime && host::realtime(Path::new("/proc"), pid) {
            return Err(DryRunError::Realtime);
        }
        if !plan.allow.dedicated_cpus && host::dedicated(Path::new("/proc"), pid, &threads) {
            return Err(DryRunError::DedicatedCpus);
        }
    }
    let needed = memory_needed(guest_ram_bytes(monitor).await?, plan);
    match pid.ok_or(host::HeadroomError::NoProcess).and_then(|pid| host::headroom(&host::Roots::default(), pid)) {
        Ok(Some(found)) if found.free < needed => Err(DryRunError::NoHeadroom { needed, free: found.free, cgroup: found.cgroup }),
        Ok(_) => Ok(()),
        // Without buffers of its own a run takes next to nothing.
        Err(_) if plan.channels == 0 && plan.compression == Compression::None => Ok(()),
        Err(why) => Err(DryRunError::HeadroomUnknown { why }),
    }
}

async fn hugepages(monitor: &mut Monitor) -> Result<(), DryRunError> {
    let blocks = match ram_blocks(monitor).await {
        Ok(blocks) => blocks,
        Err(VmError::Qmp(error)) => return Err(error.into()),
        Err(why) => return Err(DryRunError::MemoryUnclear { why: why.to_string() }),
    };
    match blocks.into_iter().find(|block| block.page_size.0 > PAGE) {
        Some(block) => Err(DryRunError::Hugepages { block: plain(&block.name), page_size: block.page_size }),
        None => Ok(()),
    }
}

async fn state(monitor: &mut Monitor) -> Result<(), DryRunError> {
    let status = vm::status(monitor).await?;
    match status.state {
        RunState::Inmigrate => return Err(DryRunError::Incoming),
        RunState::Postmigrate | RunState::Shutdown | RunState::InternalError | RunState::GuestPanicked => {
            return Err(DryRunError::Ended { state: status.state });
        }
        state if status.is_paused() => return Err(DryRunError::NotRunning { state }),
        _ => {}
    }
    let present = migration::query(monitor).await?;
    if let Some(status) = present.status.filter(|status| status.is_active()) {
        return Err(DryRunError::Migrating { status });
    }
    if present.blocked_reasons.is_empty() {
        return Ok(());
    }
    let reasons: Vec<String> = present.blocked_reasons.iter().take(4).map(|reason| plain(reason)).collect();
    Err(DryRunError::Blocked { reasons: reasons.join("; ") })
}

/// Block jobs, backups, snapshots. One that has concluded and waits to be dismissed does nothing any more.
async fn jobs(monitor: &mut Monitor) -> Result<(), DryRunError> {
    #[derive(Deserialize)]
    struct Job {
        id: String,
        #[serde(rename = "type")]
        kind: String,
        status: String,
    }
    let jobs: Vec<Job> = monitor.execute("query-jobs", Value::Null).await?;
    match jobs.into_iter().find(|job| !matches!(job.status.as_str(), "concluded" | "null")) {
        Some(job) => Err(DryRunError::Job { id: plain(&job.id), kind: plain(&job.kind) }),
        None => Ok(()),
    }
}

/// A device, as QEMU's object tree lists it.
#[derive(Debug, Deserialize)]
struct Child {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Child {
    /// `child<KIND>`; anything else is a property.
    fn device(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }

    /// Host devices, and network devices that write guest memory by themselves.
    fn forbidden(&self) -> Result<(), DryRunError> {
        let kind = self.device().unwrap_or_default();
        let device = || plain(&format!("{} ({kind})", self.name));
        if kind.starts_with("vfio-") || kind.starts_with("x-vfio-") {
            return Err(DryRunError::Vfio { device: device() });
        }
        if kind.contains("vdpa") {
            return Err(DryRunError::Vdpa { device: device() });
        }
        Ok(())
    }
}

/// Devices whose state a dry run would disturb, or that could not be migrated this way.
async fn devices(monitor: &mut Monitor) -> Result<(), DryRunError> {
    for path in DEVICES {
        let children: Vec<Child> = monitor.execute("qom-list", json!({ "path": path })).await?;
        for child in children {
            child.forbidden()?;
            let network = child.device().is_some_and(|kind| kind.starts_with("virtio-net"));
            if network && failover(monitor, &format!("{path}/{}", child.name)).await? {
                return Err(DryRunError::Failover { device: plain(&child.name) });
            }
        }
    }
    // Backends of network devices are no QOM objects.
    let network: String = monitor.execute("human-monitor-command", json!({ "command-line": "info network" })).await?;
    vdpa_backend(&network).map_or(Ok(()), |device| Err(DryRunError::Vdpa { device }))
}

/// The first vhost-vdpa backend in the monitor's `info network`: lines such as ` \\ net0: index=0,type=vhost-vdpa,…`.
fn vdpa_backend(network: &str) -> Option<String> {
    let line = network.lines().find(|line| line.contains("type=vhost-vdpa"))?;
    Some(plain(line.trim_start_matches([' ', '\\']).split(':').next().unwrap_or_default()))
}

async fn failover(monitor: &mut Monitor, path: &str) -> Result<bool, DryRunError> {
    match monitor.execute::<Value>("qom-get", json!({ "path": path, "property": "failover" })).await {
        Ok(value) => Ok(value != Value::Bool(false)),
        // A device without the property has no failover.
        Err(QmpError::Refused { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The threads of the guest's CPUs, as QEMU's own PID namespace numbers them.
async fn vcpu_threads(monitor: &mut Monitor) -> Result<Vec<i32>, QmpError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Cpu {
        thread_id: i32,
    }
    let cpus: Vec<Cpu> = monitor.execute("query-cpus-fast", Value::Null).await?;
    Ok(cpus.into_iter().map(|cpu| cpu.thread_id).collect())
}

fn memory_needed(ram: Bytes, plan: &Plan) -> Bytes {
    let bitmaps = ram.pages().saturating_mul(BITS_PER_PAGE) / 8;
    let each = if plan.compression == Compression::Zstd { PER_ZSTD_CHANNEL } else { PER_CHANNEL };
    let channels = each.0.saturating_mul(u64::from(plan.channels));
    let cache = if plan.compression == Compression::Xbzrle { XBZRLE_CACHE.0 } else { 0 };
    Bytes(ANYHOW.0.saturating_add(bitmaps).saturating_add(channels).saturating_add(cache))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::units::Bandwidth;

    #[test]
    fn devices_of_the_host_are_known_by_their_kind() {
        let child = |kind: &str| Child { name: "hostdev0".to_owned(), kind: kind.to_owned() };
        for kind in [
            "child<vfio-pci>",
            "child<vfio-pci-nohotplug>",
            "child<vfio-ap>",
            "child<vfio-user-pci>",
            "child<x-vfio-user-server>",
        ] {
            assert!(
                matches!(child(kind).forbidden(), Err(DryRunError::Vfio { device }) if device.contains("hostdev0")),
                "{kind}"
            );
        }
        assert!(matches!(child("child<vhost-vdpa-device-pci>").forbidden(), Err(DryRunError::Vdpa { .. })));
        for kind in ["child<virtio-net-pci>", "child<e1000>", "string", "link<vfio-pci>", ""] {
            assert!(child(kind).forbidden().is_ok(), "{kind}");
        }
        let network =
            "nic0: index=0,type=nic,model=virtio-net-pci\n \\ hostnet0: index=0,type=vhost-vdpa,vhostdev=/dev/vhost-vdpa-0\n";
        assert_eq!(vdpa_backend(network).as_deref(), Some("hostnet0"));
        assert_eq!(vdpa_backend("nic0: index=0,type=nic\n \\ net0: index=0,type=tap\n"), None);
    }

    #[test]
    fn buffers_are_counted() {
        let plan = Plan::new(Bandwidth::Unlimited);
        assert_eq!(memory_needed(Bytes(8 << 30), &plan), Bytes((16 << 20) + (1 << 20)));
        let zstd = Plan { channels: 8, compression: Compression::Zstd, ..plan.clone() };
        assert_eq!(memory_needed(Bytes(8 << 30), &zstd), Bytes((16 << 20) + (1 << 20) + (64 << 20)));
        let xbzrle = Plan { compression: Compression::Xbzrle, ..plan };
        assert_eq!(memory_needed(Bytes(0), &xbzrle), Bytes(80 << 20));
    }
}
