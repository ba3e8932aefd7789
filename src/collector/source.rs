//! The ways to look at a VM, behind one trait, and the choice between them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{task::spawn_blocking, time::sleep};

use super::{
    CollectError, LookOptions, Progress, Seen, SourceKind,
    memory::{GuestMemory, MemoryError},
    sampler,
    windows::{Windows, measure},
};
use crate::qemu::{
    dirty_rate::DirtyRateMode,
    monitor::Monitor,
    ram::{guest_ram, guest_ram_bytes},
    vm::{ensure_measurable, kvm_enabled},
};

/// How often a running look makes sure that no migration has started.
const WATCH: Duration = Duration::from_millis(500);
/// The most that QEMU takes.
const SAMPLES_PER_GIB: u32 = 16_384;

/// A way to look at a running VM. It reads; it never stops the guest.
pub trait Source {
    /// Looks for as long as the options say.
    fn look(
        &mut self,
        monitor: &mut Monitor,
        options: &LookOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> impl Future<Output = Result<Seen, CollectError>> + Send;
}

/// Hashes pages from outside.
#[derive(Debug)]
pub struct PageSampler {
    /// The QEMU process.
    pub pid: i32,
}

/// Asks QEMU.
#[derive(Debug)]
pub struct DirtyRateSource {
    /// How QEMU looks.
    pub mode: DirtyRateMode,
    /// The QEMU process, if known: what it holds in memory bounds what is not zero.
    pub pid: Option<i32>,
}

/// Whichever was chosen.
#[derive(Debug)]
pub enum Chosen {
    /// Pages read from outside.
    Sampler(PageSampler),
    /// Windows measured by QEMU.
    DirtyRate(DirtyRateSource),
}

impl Chosen {
    /// What the options name; automatically the sampler where memory can be read, else KVM's dirty log, else QEMU's page
    /// sampling (under TCG the dirty log shows nothing).
    pub async fn new(monitor: &mut Monitor, kind: SourceKind, pid: Option<i32>) -> Result<Self, CollectError> {
        let dirty_rate = |mode| Self::DirtyRate(DirtyRateSource { mode, pid });
        match kind {
            SourceKind::Sampler => pid.map(|pid| Self::Sampler(PageSampler { pid })).ok_or(CollectError::NoProcess),
            SourceKind::DirtyBitmap if kvm_enabled(monitor).await? => Ok(dirty_rate(DirtyRateMode::DirtyBitmap)),
            SourceKind::DirtyBitmap => Err(CollectError::NoDirtyLog),
            SourceKind::PageSampling => Ok(dirty_rate(DirtyRateMode::PageSampling { sample_pages: SAMPLES_PER_GIB })),
            SourceKind::Auto => {
                if let Some(pid) = pid
                    && let Ok(ram) = guest_ram(monitor).await
                    && spawn_blocking(move || GuestMemory::new(pid, &ram.blocks).check()).await.is_ok_and(|seen| seen.is_ok())
                {
                    return Ok(Self::Sampler(PageSampler { pid }));
                }
                if kvm_enabled(monitor).await? {
                    return Ok(dirty_rate(DirtyRateMode::DirtyBitmap));
                }
                Ok(dirty_rate(DirtyRateMode::PageSampling { sample_pages: SAMPLES_PER_GIB }))
            }
        }
    }
}

impl Source for Chosen {
    async fn look(
        &mut self,
        monitor: &mut Monitor,
        options: &LookOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Seen, CollectError> {
        match self {
            Self::Sampler(source) => source.look(monitor, options, progress).await,
            Self::DirtyRate(source) => source.look(monitor, options, progress).await,
        }
    }
}

impl Source for PageSampler {
    async fn look(
        &mut self,
        monitor: &mut Monitor,
        options: &LookOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Seen, CollectError> {
        let ram = guest_ram(monitor).await?;
        let mut memory = GuestMemory::new(self.pid, &ram.blocks);
        let nobody_waits = StopOnDrop(Arc::default());
        let ended = Arc::clone(&nobody_waits.0);
        let done = Arc::new(AtomicU64::new(0));
        let reported = Arc::clone(&done);
        let LookOptions { duration, seed, effort, .. } = *options;
        let mut look = spawn_blocking(move || {
            let note = |share: f64| reported.store(share.to_bits(), Ordering::Relaxed);
            sampler::look(&mut memory, duration, seed, effort, &ended, note)
        });
        loop {
            tokio::select! {
                looked = &mut look => {
                    let trace = looked.map_err(|error| CollectError::Interrupted { why: error.to_string() })??;
                    return trace.map(Seen::Trace).ok_or_else(|| CollectError::Interrupted { why: "it was stopped".into() });
                }
                () = sleep(WATCH) => {
                    // A migration that starts now must not be measured along: throttling would pass for the guest's calm.
                    ensure_measurable(monitor).await?;
                    progress(Progress(f64::from_bits(done.load(Ordering::Relaxed))));
                }
            }
        }
    }
}

impl Source for DirtyRateSource {
    async fn look(
        &mut self,
        monitor: &mut Monitor,
        options: &LookOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Seen, CollectError> {
        let total_pages = guest_ram_bytes(monitor).await?.pages();
        let points = measure(monitor, self.mode, options.duration, |share| progress(Progress(share))).await?;
        let resident_pages = match self.pid {
            Some(pid) => resident_pages(monitor, pid).await.unwrap_or(total_pages),
            None => total_pages,
        };
        Ok(Seen::Windows(Windows { total_pages, resident_pages, points }))
    }
}

/// Guest pages that the kernel holds in memory: counted where that is allowed, else all of QEMU's own.
async fn resident_pages(monitor: &mut Monitor, pid: i32) -> Option<u64> {
    let ram = guest_ram(monitor).await.ok()?;
    let nobody_waits = StopOnDrop(Arc::default());
    let ended = Arc::clone(&nobody_waits.0);
    let count = move || {
        let memory = GuestMemory::new(pid, &ram.blocks);
        match memory.touched(&ended) {
            Ok(touched) => touched.map(|touched| touched.present.iter().chain(&touched.swapped).map(|run| run.1).sum()),
            // Another process, or none: what it holds says nothing.
            Err(MemoryError::Gone { .. } | MemoryError::Elsewhere { .. }) => None,
            Err(_) => Some(memory.resident()?.pages()),
        }
    };
    spawn_blocking(count).await.ok()?
}

/// A look that nobody waits for any more ends.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
