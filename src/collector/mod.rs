//! Watches a running guest's memory and describes who writes which page when.
//!
//! In: a monitor and, where it may be read, the QEMU process. Out: an [`Observation`], and from it a
//! [`Pattern`]. Knows hypervisors, not Kubernetes.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    model::{
        pattern::{Pattern, PatternError},
        units::{Bytes, PAGE},
    },
    qemu::{
        cpus::CpuTimes,
        monitor::{Address, Monitor},
        qmp::QmpError,
        vm::{VmError, ensure_measurable},
    },
};

pub mod fit;
pub mod memory;
pub mod mixture;
pub mod sampler;
pub mod source;
mod sweep;
pub mod trace;
pub mod windows;

use memory::MemoryError;
use source::{Chosen, Source};
use trace::{DamagedTrace, Trace};
use windows::Windows;

/// How long the monitor may take to greet.
const CONNECT: Duration = Duration::from_secs(5);

/// Which VM to look at.
#[derive(Debug, Clone)]
pub struct Target {
    /// QEMU's monitor.
    pub monitor: Address,
    /// QEMU's process; `None` asks the monitor.
    pub pid: Option<i32>,
}

/// How a VM is looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SourceKind {
    /// The best that works here.
    #[default]
    Auto,
    /// Hash pages of the QEMU process from outside; needs `CAP_SYS_PTRACE`, costs the guest nothing.
    Sampler,
    /// QEMU's dirty-bitmap measurement: KVM's dirty log, write protection during the windows.
    DirtyBitmap,
    /// QEMU's own page sampling; works everywhere, coarse.
    PageSampling,
}

/// How long and by what means to look.
#[derive(Debug, Clone)]
pub struct LookOptions {
    /// The look; about a second more is spent on finding where to look.
    pub duration: Duration,
    /// By what means.
    pub source: SourceKind,
    /// Draws the pages to sample.
    pub seed: u64,
    /// The share of all samples that the page sampler takes, above 0 to 1: a look costs CPU in proportion.
    pub effort: f64,
}

impl Default for LookOptions {
    fn default() -> Self {
        Self { duration: Duration::from_secs(12), source: SourceKind::Auto, seed: 1, effort: 1.0 }
    }
}

/// How far a look has come, 0..=1.
#[derive(Debug, Clone, Copy)]
pub struct Progress(pub f64);

/// What was seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observation {
    /// Guest RAM.
    pub ram: Bytes,
    /// The guest was paused all the while: it writes nothing, and would not during a migration.
    pub paused: bool,
    /// How busy each of its CPUs was, 0..=1; empty: nobody may tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<f64>,
    /// By one means or another.
    pub seen: Seen,
}

/// What one source has seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Seen {
    /// Changes of sampled pages.
    Trace(Trace),
    /// f(t) at a few windows.
    Windows(Windows),
}

impl Observation {
    /// Describes what was seen as a pattern.
    pub fn pattern(&self) -> Result<Pattern, PatternError> {
        let pattern = match &self.seen {
            Seen::Trace(trace) => fit::describe(trace),
            Seen::Windows(windows) => windows::describe(windows),
        }?;
        Ok(pattern.with_cpus(self.cpus.clone()))
    }

    /// Checks an observation that comes from a file.
    pub fn check(&self) -> Result<(), DamagedTrace> {
        let total_pages = match &self.seen {
            Seen::Trace(trace) => {
                trace.check()?;
                trace.total_pages
            }
            Seen::Windows(windows) => {
                let sane = |&(ms, pages): &(f64, f64)| ms.is_finite() && ms > 0.0 && pages.is_finite() && pages >= 0.0;
                if windows.points.is_empty() || !windows.points.iter().all(sane) {
                    return Err(DamagedTrace("its windows are not measurements".into()));
                }
                windows.total_pages
            }
        };
        if total_pages == 0 || total_pages.checked_mul(PAGE) != Some(self.ram.0) {
            return Err(DamagedTrace("its pages do not add up to its RAM".into()));
        }
        Ok(())
    }
}

/// Why a VM could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The VM's state.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No way to tell which process it is.
    #[error("cannot tell which process this QEMU is: name it with --pid, or measure through QEMU with --source dirty-bitmap")]
    NoProcess,
    /// Under TCG.
    #[error("this VM runs under TCG, where KVM's dirty log shows nothing: use --source sampler or page-sampling")]
    NoDirtyLog,
    /// Somebody ended it.
    #[error("the look did not end: {why}; try again")]
    Interrupted {
        /// How.
        why: String,
    },
}

/// Looks at a running VM. Reads only; the guest is never stopped.
pub async fn observe(
    target: &Target,
    options: &LookOptions,
    progress: impl Fn(Progress) + Send + Sync,
) -> Result<Observation, CollectError> {
    let mut monitor = Monitor::connect(&target.monitor, CONNECT).await?;
    let before = ensure_measurable(&mut monitor).await?;
    let pid = target.pid.or_else(|| monitor.peer_pid());
    let mut source = Chosen::new(&mut monitor, options.source, pid).await?;
    let cpus = pid.map(CpuTimes::read);
    let seen = source.look(&mut monitor, options, &progress).await?;
    let cpus = pid.zip(cpus).map(|(pid, before)| CpuTimes::read(pid).busy_since(&before)).unwrap_or_default();
    let after = ensure_measurable(&mut monitor).await?;
    let total_pages = match &seen {
        Seen::Trace(trace) => trace.total_pages,
        Seen::Windows(windows) => windows.total_pages,
    };
    Ok(Observation { ram: Bytes(total_pages * PAGE), paused: before.is_paused() && after.is_paused(), cpus, seen })
}
