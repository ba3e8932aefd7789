//! Why there is no answer: one variant for each refusal and each fault, in words that say what to do.

use std::{io, path::PathBuf, time::Duration};

use super::{Reason, guards::OLDEST_QEMU, host::HeadroomError};
use crate::{
    model::units::Bytes,
    qemu::{
        migration::MigrationStatus,
        qmp::{QmpError, Version},
        vm::RunState,
    },
};

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
        OLDEST_QEMU
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
    /// Each channel is an open file of ours.
    #[error(
        "{channels} channels need {needed} open files, and the limit of this process leaves {left}: raise it (LimitNOFILE, ulimit -n), or \
         use fewer channels"
    )]
    TooManyChannels {
        /// Of multifd.
        channels: u8,
        /// What the sink would open.
        needed: u64,
        /// What may still be opened.
        left: u64,
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
            NoHeadroom, NotRunning, Realtime, Stopped, TooManyChannels, Vdpa, Vfio,
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
                | TooManyChannels { .. }
                | Vdpa { .. }
                | Vfio { .. }
        )
    }
}
