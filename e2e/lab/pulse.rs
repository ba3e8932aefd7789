//! The guest's own account of how it fared: the longest time between two turns of its work. In: a running VM. Out: that time, by the guest's
//! clock, which goes on while the guest is stopped.

use std::{fs::File, os::unix::fs::FileExt, time::Duration};

use anyhow::{Context, Result, ensure};
use migvisor::qemu::ram::guest_ram;
use tokio::time::{Instant, sleep};

use super::Vm;

/// From a guest's word that it is ready to its first writes.
const BEGINNING: Duration = Duration::from_secs(5);

/// Where the guest keeps its account: the page before its data (`struct pulse` in guest.c).
#[derive(Debug)]
pub struct Pulse {
    memory: File,
    address: u64,
}

impl Pulse {
    /// Of this VM, for as long as it runs.
    pub async fn of(vm: &mut Vm) -> Result<Self> {
        let page = u64::from(vm.spec().guest.base.saturating_sub(1));
        let ram = guest_ram(vm.lab()).await?;
        let block = ram.blocks.first().context("a VM without memory")?;
        let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", vm.pid()))?;
        let pulse = Self { memory, address: block.host_address + (page << 12) };
        // A guest says that it is ready a moment before it begins to write.
        let deadline = Instant::now() + BEGINNING;
        while pulse.per_ms()? == 0 {
            ensure!(Instant::now() < deadline, "the guest keeps no account: it writes nothing");
            sleep(Duration::from_millis(5)).await;
        }
        Ok(pulse)
    }

    /// The longest pause since the last [`Pulse::reset`].
    pub fn longest(&self) -> Result<Duration> {
        let mut counts = [0; 8];
        self.memory.read_exact_at(&mut counts, self.address + 8)?;
        let ms = u64::from_le_bytes(counts) as f64 / f64::from(self.per_ms()?);
        Ok(Duration::from_secs_f64(ms / 1e3))
    }

    /// Begins anew.
    pub fn reset(&self) -> Result<()> {
        self.memory.write_all_at(&[0; 8], self.address + 8)?;
        Ok(())
    }

    fn per_ms(&self) -> Result<u32> {
        let mut counts = [0; 4];
        self.memory.read_exact_at(&mut counts, self.address)?;
        Ok(u32::from_le_bytes(counts))
    }
}
