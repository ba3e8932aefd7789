//! The dry run: QEMU executes a whole pre-copy migration, compression included, to a sink of ours that counts and forgets; the guest
//! stays where it is and is never stopped.
//!
//! In: a monitor, a [`Plan`]. Out: progress while it runs, then a [`Report`]: for each downtime limit whether and when it would have been
//! met. Knows hypervisors, not Kubernetes.
//!
//! | module | what it does |
//! |---|---|
//! | [`guards`] | refuses what must not be dry-run |
//! | [`host`] | what the host says of the process: realtime, CPUs of its own, room under its memory limits |
//! | [`settings`], [`journal`] | QEMU's settings: taken down, borrowed, put back, compared; also after our own death |
//! | [`sink`], [`pace`] | the end of the line |
//! | [`mod@run`], [`watching`] | starts, watches, cancels, cleans up |
//! | [`course`] | which limit was met when |
//! | [`report`] | what came of it |
//!
//! **Why the guest cannot be stopped.** With the capabilities `return-path` and `switchover-ack` (QEMU 8.1) a source switches over only after
//! its target has said so, and ours never says anything. Should the guest be paused by somebody meanwhile, QEMU no longer waits for that
//! word; but without the target's last one (`MIG_RP_MSG_SHUT`) it does not complete either, and we cancel at once. If we die, the sink
//! closes, QEMU fails the migration, and the guest runs on.

use std::{fmt, io, path::PathBuf, time::Duration};

use crate::{
    model::units::{Bandwidth, Bytes, BytesPerSecond},
    qemu::{
        migration::MigrationStatus,
        qmp::{QmpError, Version},
        vm::RunState,
    },
};

mod course;
mod guards;
mod host;
mod journal;
pub mod pace;
mod report;
mod run;
mod settings;
mod sink;
mod watching;

pub use host::HeadroomError;
pub use report::{End, Limit, Report};
pub use run::run;
pub use sink::Meeting;

/// QEMU's default `multifd-channels` is 2, KubeVirt's 8; more than this no migration has.
pub const MOST_CHANNELS: u8 = 64;

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
    /// Connections of multifd; 0: without multifd.
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

    /// Whole ms, as QEMU counts.
    fn longest_limit_ms(&self) -> u64 {
        let longest = self.downtime_limits.iter().max().copied().unwrap_or_default();
        u64::try_from(longest.as_millis()).unwrap_or(u64::MAX)
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
        if self.channels > MOST_CHANNELS {
            return bad(&format!("{} channels are more than {MOST_CHANNELS}", self.channels));
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

/// Why there is no answer. Unless it says otherwise, the guest runs, and QEMU's settings are as they were.
#[derive(Debug, thiserror::Error)]
pub enum DryRunError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A plan that makes no sense.
    #[error("cannot dry-run this: {reason}")]
    BadPlan {
        /// What to change.
        reason: String,
    },
    /// QEMU could not be kept from stopping the guest.
    #[error(
        "QEMU {found} is too old: a dry run that cannot stop the guest needs {} or newer; upgrade QEMU and restart or migrate the VM",
        guards::OLDEST_QEMU
    )]
    TooOld {
        /// Its version.
        found: Version,
    },
    /// As above, or multifd is missing.
    #[error(
        "this QEMU has no migration capability `{capability}`: it was built without; without it there is no dry run of this kind"
    )]
    Lacks {
        /// QEMU's name for it.
        capability: String,
    },
    /// The target of a migration: not yet a VM.
    #[error("the VM is the target of a migration that has not finished: dry-run it once it runs")]
    Incoming,
    /// It will not run on.
    #[error("the VM does not run any more (state `{state}`): there is nothing to migrate")]
    Ended {
        /// QEMU's run state.
        state: RunState,
    },
    /// Nothing would keep QEMU from completing.
    #[error(
        "the VM is not running (state `{state}`): QEMU would complete a dry run of a stopped guest; a stopped guest writes nothing, so `predict` is right about it"
    )]
    NotRunning {
        /// QEMU's run state.
        state: RunState,
    },
    /// A migration, or a snapshot that uses its machinery, is under way.
    #[error("the VM is being migrated (status `{status}`): QEMU has one migration at a time; try again when it has ended")]
    Migrating {
        /// QEMU's migration status.
        status: MigrationStatus,
    },
    /// QEMU itself says that the VM cannot be migrated.
    #[error("QEMU refuses to migrate this VM: {reasons}; a real migration would be refused, too, until that is mended")]
    Blocked {
        /// QEMU's words.
        reasons: String,
    },
    /// Block jobs, backups, snapshots.
    #[error("the job `{id}` ({kind}) is under way: a dry run would slow it down; try again when it has ended")]
    Job {
        /// QEMU's name for it.
        id: String,
        /// Such as `backup`.
        kind: String,
    },
    /// A host device.
    #[error(
        "the VM has the host device {device} (VFIO): its state cannot be sent to nowhere; detach it, or go without a dry run"
    )]
    Vfio {
        /// QEMU's name for it.
        device: String,
    },
    /// A network device that is unplugged for a migration.
    #[error("the network device {device} has a failover partner that QEMU would unplug: go without a dry run")]
    Failover {
        /// QEMU's name for it.
        device: String,
    },
    /// A device that writes guest memory by itself.
    #[error("the device {device} is vhost-vdpa: QEMU would suspend it to follow its writes; go without a dry run")]
    Vdpa {
        /// QEMU's name for it.
        device: String,
    },
    /// Huge pages, not opted in.
    #[error("the memory `{block}` is on huge pages of {}: following its writes splits them; opt in to dry-run it all the same", page_size.human())]
    Hugepages {
        /// QEMU's name for it.
        block: String,
        /// Of the host.
        page_size: Bytes,
    },
    /// Nobody knows whether it is on huge pages.
    #[error("cannot tell whether the VM's memory is on huge pages: {why}; opt in to huge pages to dry-run it all the same")]
    MemoryUnclear {
        /// What does not fit.
        why: String,
    },
    /// Realtime threads, not opted in.
    #[error("the VM has realtime threads: following its writes makes them wait; opt in to dry-run it all the same")]
    Realtime,
    /// CPUs of its own, not opted in.
    #[error("the VM's CPUs are tied to CPUs of their own: a dry run takes time from them; opt in to dry-run it all the same")]
    DedicatedCpus,
    /// QEMU could be killed for its buffers.
    #[error("a dry run needs up to {} of the VM's memory limit, and {} are free in {}: raise the limit, or use fewer channels", needed.human(), free.human(), cgroup.display())]
    NoHeadroom {
        /// At most.
        needed: Bytes,
        /// Under the tightest limit.
        free: Bytes,
        /// Whose limit it is.
        cgroup: PathBuf,
    },
    /// As above, and nobody knows.
    #[error(
        "a dry run with multifd or XBZRLE takes memory of the VM's, and how much its limits leave is unknown: {why}; dry-run it without"
    )]
    HeadroomUnknown {
        /// What failed.
        why: HeadroomError,
    },
    /// In a cluster, memory is what was asked for.
    #[error("XBZRLE takes 64 MiB of the VM's memory limit: it is dry-run from the command line only")]
    Xbzrle,
    /// No socket, no thread.
    #[error("cannot open the sink of the dry run: {0}")]
    Sink(io::Error),
    /// Nothing was touched.
    #[error("cannot keep QEMU's settings in {}: {source}; without that they could not be put back after a crash", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nobody waits for the answer any more.
    #[error("the dry run was withdrawn: {reason}")]
    Withdrawn {
        /// Why.
        reason: Reason,
    },
    /// Somebody stopped the guest.
    #[error(
        "the guest was stopped during the dry run, by somebody else (state `{state}`): the dry run was cancelled; try again once it runs"
    )]
    Stopped {
        /// QEMU's run state.
        state: RunState,
    },
    /// It ended, and not by us.
    #[error("QEMU ended the dry run (status `{status}`{words}): somebody cancelled it, or QEMU could not go on; the guest runs")]
    Interrupted {
        /// QEMU's migration status.
        status: MigrationStatus,
        /// QEMU's words, with a colon before them.
        words: String,
    },
    /// Somebody else's: it is left alone, and so are QEMU's settings.
    #[error("somebody else's migration took the place of the dry run: it was left alone, and so were its settings{unrestored}")]
    Foreign {
        /// Which of the settings are still the dry run's.
        unrestored: String,
    },
    /// Nothing moves.
    #[error("the dry run moved nothing for {waited:?}: it was cancelled; the host may be overloaded")]
    Stalled {
        /// For how long.
        waited: Duration,
    },
    /// The one case in which settings are not as they were.
    #[error(
        "the dry run could not put QEMU's settings back: {left}{why}; set them by migrate-set-capabilities and migrate-set-parameters, or dry-run the VM again"
    )]
    NotRestored {
        /// Which, and what they should be.
        left: String,
        /// What failed, with its punctuation.
        why: String,
        /// What had gone wrong before, if anything.
        before: Option<Box<DryRunError>>,
    },
}

impl DryRunError {
    /// Nothing is wrong with the question or the machine: this VM has no dry run, or not now.
    pub fn is_refusal(&self) -> bool {
        use DryRunError::{
            Blocked, DedicatedCpus, Ended, Failover, HeadroomUnknown, Hugepages, Incoming, Job, MemoryUnclear, Migrating,
            NoHeadroom, NotRunning, Realtime, Stopped, Vdpa, Vfio,
        };
        matches!(
            self,
            Blocked { .. }
                | DedicatedCpus
                | Ended { .. }
                | Failover { .. }
                | HeadroomUnknown { .. }
                | Hugepages { .. }
                | Incoming
                | Job { .. }
                | MemoryUnclear { .. }
                | Migrating { .. }
                | NoHeadroom { .. }
                | NotRunning { .. }
                | Realtime
                | Stopped { .. }
                | Vdpa { .. }
                | Vfio { .. }
        )
    }
}
