//! The dry run: QEMU executes a whole pre-copy migration, compression included, to a sink of ours that counts and forgets; the guest
//! stays where it is and is never stopped.
//!
//! In: a monitor, a [`Plan`]. Out: progress while it runs, then a [`Report`]: for each downtime limit whether and when it would have been
//! met. Knows hypervisors, not Kubernetes.
//!
//! | module | what it does |
//! |---|---|
//! | `guards` | refuses what must not be dry-run |
//! | `host` | what the host says of the process: realtime, CPUs of its own, room under its memory limits |
//! | `settings`, `journal` | QEMU's settings: taken down, borrowed, put back, compared; also after our own death |
//! | `sink`, [`pace`] | the end of the line |
//! | `run`, `watching` | starts, watches, cancels, cleans up |
//! | `course` | which limit was met when |
//! | `report` | what came of it |
//! | `error` | why nothing did |
//!
//! **Why the guest cannot be stopped.** With the capabilities `return-path` and `switchover-ack` (QEMU 8.1) a source switches over only after
//! its target has said so, and ours never says anything. Should the guest be paused by somebody meanwhile, QEMU no longer waits for that
//! word; but without the target's last one (`MIG_RP_MSG_SHUT`) it does not complete either, and we cancel at once. If we die, the sink
//! closes, QEMU fails the migration, and the guest runs on.

use std::{fmt, path::PathBuf, time::Duration};

use crate::model::units::{Bandwidth, Bytes, BytesPerSecond};

mod cgroup;
mod course;
mod error;
mod guards;
mod host;
mod journal;
pub mod pace;
mod report;
mod run;
mod settings;
mod sink;
mod watching;

pub use error::DryRunError;
pub use host::HeadroomError;
pub use report::{End, Limit, Report};
pub use run::{recover, run};
pub use sink::Meeting;

/// How pages are compressed on the way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By multifd's threads.
    Zstd,
    /// Differences to what was sent before. Takes 64 MiB of the VM's memory, so never in a cluster.
    Xbzrle,
}

/// What is left alone unless somebody asks for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each of them somebody's decision, and none implies another")]
pub struct Allow {
    /// VMs with realtime threads: write protection costs them what they were promised not to wait for.
    pub realtime: bool,
    /// VMs whose CPUs are tied to one of the host's each.
    pub dedicated_cpus: bool,
    /// VMs on huge pages: write protection splits them.
    pub hugepages: bool,
    /// Compression by XBZRLE.
    pub xbzrle: bool,
}

/// What to dry-run: what the real migration would run under.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// QEMU's `max-bandwidth`.
    pub bandwidth: Bandwidth,
    /// What the line carries, and the pace of the sink; `None`: as fast as this machine can.
    pub link: Option<BytesPerSecond>,
    /// All of these are answered. At least one, none of them 0: QEMU with a limit of 0 completes whatever is asked of it.
    pub downtime_limits: Vec<Duration>,
    /// A migration that takes longer has failed.
    pub time_budget: Option<Duration>,
    /// The run itself ends after this long, with or without an answer.
    pub deadline: Duration,
    /// How pages are compressed.
    pub compression: Compression,
    /// Connections of multifd; 0: without multifd. QEMU's default is 2, KubeVirt's 8, and 255 the most that QEMU has.
    pub channels: u8,
    /// What somebody asked for.
    pub allow: Allow,
    /// QEMU's process, where the monitor does not say.
    pub pid: Option<i32>,
    /// Where multifd's connections meet; `None`: in the folder for temporary files, if QEMU sees the same.
    pub meeting: Option<Meeting>,
    /// The folder in which settings are kept, to be put back after our death; `None`: nowhere.
    pub journal: Option<PathBuf>,
}

impl Plan {
    /// At this bandwidth, with QEMU's downtime limit of 300 ms, for at most ten minutes; the rest as in [`Plan`]'s simplest case.
    pub fn new(bandwidth: Bandwidth) -> Self {
        Self {
            bandwidth,
            link: None,
            downtime_limits: vec![Duration::from_millis(300)],
            time_budget: None,
            deadline: Duration::from_secs(600),
            compression: Compression::None,
            channels: 0,
            allow: Allow::default(),
            pid: None,
            meeting: None,
            journal: None,
        }
    }

    fn longest_limit(&self) -> Duration {
        self.downtime_limits.iter().max().copied().unwrap_or_default()
    }

    /// The rate at which the sink reads: the line's, and the cap's where QEMU does not honour it itself.
    fn pace(&self) -> Option<BytesPerSecond> {
        let cap = self.bandwidth.cap().filter(|_| self.channels > 0);
        cap.into_iter().chain(self.link).min()
    }

    fn check(&self) -> Result<(), DryRunError> {
        let bad = |reason: &str| Err(DryRunError::BadPlan { reason: reason.to_owned() });
        if self.downtime_limits.iter().any(|limit| limit.as_millis() == 0) {
            return bad("a downtime limit of less than 1 ms would let QEMU stop the guest; QEMU's default is 300ms");
        }
        if self.downtime_limits.is_empty() {
            return bad("it names no downtime limit; QEMU's default is 300ms");
        }
        match self.compression {
            Compression::Zstd if self.channels == 0 => {
                bad("QEMU compresses with zstd in multifd's threads only: ask for channels, too")
            }
            Compression::Xbzrle if self.channels > 0 => bad("XBZRLE and multifd exclude each other"),
            Compression::Xbzrle if !self.allow.xbzrle => Err(DryRunError::Xbzrle),
            _ => Ok(()),
        }
    }
}

/// As QEMU counts: rounded down.
fn whole_ms(limit: Duration) -> u64 {
    u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)
}

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Progress {
    /// QEMU's `dirty-sync-count`.
    pub iteration: u64,
    /// Guest memory still to send.
    pub remaining: Bytes,
    /// All of the guest's memory.
    pub total: Bytes,
    /// Throughput of QEMU's last window.
    pub rate: BytesPerSecond,
    /// Since the beginning.
    pub elapsed: Duration,
}

/// Why somebody no longer wants the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason(pub String);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
