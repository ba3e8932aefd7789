//! Where in the QEMU process the guest's memory lies. In: a QMP connection. Out: RAM blocks with their host addresses,
//! cross-checked against what QEMU says of its memory backends, or an error: never a guess.

use std::ops::Range;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{monitor::Monitor, qmp::QmpError, qmp::plain, vm::VmError};
use crate::model::units::Bytes;

/// One of QEMU's RAM blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it: `pc.ram`, `ram-node0`, `0000:00:02.0/vga.vram`.
    pub name: String,
    /// The host's page behind it: 4 KiB, or 2 MiB and more on hugetlbfs.
    pub page_size: Bytes,
    /// Used length.
    pub used: Bytes,
    /// Reserved length.
    pub total: Bytes,
    /// Address in the QEMU process.
    pub host_address: u64,
    /// A ROM for the guest.
    pub read_only: bool,
}

impl RamBlock {
    /// Its addresses in the QEMU process.
    pub fn host_range(&self) -> Range<u64> {
        self.host_address..self.host_address.saturating_add(self.used.0)
    }
}

/// The guest's RAM: what a migration spends its time on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRam {
    /// Its blocks, as QEMU lists them.
    pub blocks: Vec<RamBlock>,
    /// What the guest has now: less than the sum of the blocks where virtio-mem is plugged in part.
    pub plugged: Bytes,
}

/// More blocks than any VM has.
const MOST_BLOCKS: usize = 4096;
/// More memory than any VM has: 128 TiB.
const MOST_RAM: u64 = 1 << 47;
const SUMMARY: &str = "query-memory-size-summary";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Summary {
    base_memory: u64,
    #[serde(default)]
    plugged_memory: u64,
}

#[derive(Debug, Deserialize)]
struct Backend {
    id: Option<String>,
    size: u64,
}

#[derive(Debug, Deserialize)]
struct Device {
    #[serde(rename = "type")]
    kind: String,
    data: DeviceData,
}

#[derive(Debug, Deserialize)]
struct DeviceData {
    /// `/objects/<id>`
    #[serde(default)]
    memdev: String,
}

/// How much memory the guest has now.
pub async fn guest_ram_bytes(monitor: &mut Monitor) -> Result<Bytes, QmpError> {
    let summary = summary(monitor).await?;
    match summary.base_memory.saturating_add(summary.plugged_memory) {
        bytes if bytes > MOST_RAM => Err(QmpError::malformed(SUMMARY, &"it claims more than 128 TiB")),
        bytes => Ok(Bytes(bytes)),
    }
}

async fn summary(monitor: &mut Monitor) -> Result<Summary, QmpError> {
    monitor.execute(SUMMARY, Value::Null).await
}

/// All of QEMU's RAM blocks: the guest's RAM, ROMs, video memory.
pub async fn ram_blocks(monitor: &mut Monitor) -> Result<Vec<RamBlock>, VmError> {
    let text: String = monitor.execute("human-monitor-command", json!({"command-line": "info ramblock"})).await?;
    parse_info_ramblock(&text).map_err(unclear)
}

/// The guest's RAM alone; an error where names and sizes do not account for every byte of it.
pub async fn guest_ram(monitor: &mut Monitor) -> Result<GuestRam, VmError> {
    let summary = summary(monitor).await?;
    let backends: Vec<Backend> = monitor.execute("query-memdev", Value::Null).await?;
    let devices: Vec<Device> = monitor.execute("query-memory-devices", Value::Null).await?;
    let blocks = ram_blocks(monitor).await?;
    select(blocks, &summary, &backends, &devices).map_err(unclear)
}

fn unclear(reason: impl AsRef<str>) -> VmError {
    VmError::RamUnclear { reason: plain(reason.as_ref()) }
}

/// A backend's block bears its id, alone or behind the path of the device that maps it.
fn belongs(block: &RamBlock, id: &str) -> bool {
    !block.read_only && block.name.rsplit('/').next() == Some(id)
}

fn select(blocks: Vec<RamBlock>, summary: &Summary, backends: &[Backend], devices: &[Device]) -> Result<GuestRam, String> {
    // Every backend is held against every block: a QEMU that names hundreds of thousands means harm.
    if blocks.len().max(backends.len()).max(devices.len()) > MOST_BLOCKS {
        return Err(format!("it names more than {MOST_BLOCKS} RAM blocks, backends or devices"));
    }
    if summary.base_memory.saturating_add(summary.plugged_memory) > MOST_RAM {
        return Err("it claims more than 128 TiB".to_owned());
    }
    let mapped: Vec<&str> = devices
        .iter()
        .filter(|device| matches!(device.kind.as_str(), "dimm" | "virtio-mem"))
        .filter_map(|device| device.data.memdev.rsplit('/').next())
        .collect();
    if let Some(device) = devices.iter().find(|device| !matches!(device.kind.as_str(), "dimm" | "virtio-mem")) {
        return Err(format!("a memory device of the kind `{}` is outside what we know", device.kind));
    }
    let (mut base, mut added, mut chosen) = (0_u64, 0_u64, Vec::new());
    for backend in backends {
        let Some(id) = backend.id.as_deref() else { continue };
        let mut found: Vec<&RamBlock> = blocks.iter().filter(|block| belongs(block, id)).collect();
        let block = match (found.pop(), found.is_empty()) {
            (Some(block), true) if block.total.0 == backend.size && block.used.0 == backend.size => block,
            (Some(block), true) => {
                return Err(format!("block {} has {} bytes, its backend {}", block.name, block.total.0, backend.size));
            }
            (Some(_), false) => return Err(format!("more than one block is named after the backend {id}")),
            // A backend that nothing uses has no block.
            (None, _) => continue,
        };
        let sum = if mapped.contains(&id) { &mut added } else { &mut base };
        *sum = sum.saturating_add(backend.size);
        chosen.push(block.clone());
    }
    if base != summary.base_memory {
        return Err(format!("the guest starts with {} bytes, its memory backends account for {base}", summary.base_memory));
    }
    if added < summary.plugged_memory {
        return Err(format!("{} bytes are plugged in, their backends account for {added}", summary.plugged_memory));
    }
    chosen.sort_by_key(|block| block.host_address);
    let overlap = chosen.windows(2).any(|pair| matches!(pair, [one, two] if one.host_range().end > two.host_address));
    let odd = chosen.iter().any(|block| block.host_address == 0 || block.host_address.checked_add(block.used.0).is_none());
    if overlap || odd {
        return Err("the blocks' addresses overlap or make no sense".to_owned());
    }
    // As QEMU lists them, which is the order of migration.
    let chosen = blocks.into_iter().filter(|block| chosen.contains(block)).collect();
    Ok(GuestRam { blocks: chosen, plugged: Bytes(summary.base_memory.saturating_add(summary.plugged_memory)) })
}

/// Reads the monitor's `info ramblock`: a heading, then per block its name (which may hold blanks), page size, offset, used,
/// total, host address and, since QEMU 8.1, `ro` or `rw`.
fn parse_info_ramblock(text: &str) -> Result<Vec<RamBlock>, String> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let heading = lines.next().unwrap_or_default();
    if !heading.contains("Block Name") || !heading.contains("HVA") {
        return Err(format!("`info ramblock` lists no host addresses: it begins with `{}`", shorten(heading)));
    }
    lines
        .map(|line| {
            parse_block(line).ok_or_else(|| format!("`info ramblock` has a line that makes no sense: `{}`", shorten(line)))
        })
        .collect()
}

fn parse_block(line: &str) -> Option<RamBlock> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let read_only = match *words.last()? {
        flag @ ("ro" | "rw") => {
            words.pop();
            flag == "ro"
        }
        _ => false,
    };
    let host_address = hexadecimal(words.pop()?)?;
    let total = hexadecimal(words.pop()?)?;
    let used = hexadecimal(words.pop()?)?;
    hexadecimal(words.pop()?)?;
    let shift = match words.pop()? {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    let page_size = words.pop()?.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    let name = words.join(" ");
    let sane = !name.is_empty() && used <= total && page_size.is_power_of_two();
    sane.then_some(RamBlock {
        name,
        page_size: Bytes(page_size),
        used: Bytes(used),
        total: Bytes(total),
        host_address,
        read_only,
    })
}

fn hexadecimal(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

fn shorten(line: &str) -> String {
    line.trim().escape_debug().take(80).collect()
}

#[cfg(test)]
#[path = "ram_tests.rs"]
mod tests;
