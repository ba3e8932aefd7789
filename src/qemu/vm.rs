//! The state of a VM, and whether its memory may be measured at all. In: a QMP connection. Out: typed state, or why not.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    migration::{self, MigrationStatus},
    monitor::Monitor,
    qmp::{QmpError, Version},
};

/// From here on `calc-dirty-rate` counts in milliseconds.
pub const OLDEST_QEMU: Version = Version { major: 8, minor: 2, micro: 0 };

/// Why a VM cannot be measured, or not now.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU lacks what we need.
    #[error(
        "QEMU {found} is too old: measuring in milliseconds needs {OLDEST_QEMU} or newer; upgrade QEMU and restart or migrate the VM"
    )]
    TooOld {
        /// Its version.
        found: Version,
    },
    /// A migration, or a snapshot that uses its machinery, is under way.
    #[error(
        "the VM is being migrated (status `{status}`): measuring now would disturb it and show throttled writes; try again when it has ended"
    )]
    Migrating {
        /// QEMU's migration status.
        status: MigrationStatus,
    },
    /// The target of a migration: not yet a VM.
    #[error(
        "the VM is the target of a migration that has not finished: reading its memory could fault pages over the network; measure it once it runs"
    )]
    Incoming,
    /// It will not run on.
    #[error("the VM does not run any more (state `{state}`): there is nothing to migrate")]
    Ended {
        /// QEMU's run state.
        state: RunState,
    },
    /// Where the guest's memory lies is not certain.
    #[error(
        "cannot tell for certain where the guest's RAM lies: {reason}; page sampling is off for this VM, QEMU's own dirty-rate modes still work"
    )]
    RamUnclear {
        /// What does not fit.
        reason: String,
    },
    /// QEMU has one dirty-rate measurement per VM, and somebody else keeps it busy.
    #[error(
        "another dirty-rate measurement kept this VM busy for {waited:?}: wait for it to end (KubeVirt's metrics start such measurements), then try again"
    )]
    MeasurementBusy {
        /// How long it was waited for.
        waited: std::time::Duration,
    },
    /// The measurement did not end in time.
    #[error(
        "the dirty-rate measurement of {window:?} did not end within {waited:?}: the host may be overloaded; try again with a longer window"
    )]
    MeasurementStuck {
        /// What was asked for.
        window: std::time::Duration,
        /// How long the result was waited for.
        waited: std::time::Duration,
    },
    /// A request that QEMU would refuse.
    #[error("cannot measure: {reason}")]
    BadRequest {
        /// What to change.
        reason: String,
    },
}

/// QEMU's run state (`qapi/run-state.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Paused by a person or a tool.
    Paused,
    /// Loaded, not started (`-S`).
    Prelaunch,
    /// Waiting for, or receiving, a migration.
    Inmigrate,
    /// Stopped for the last phase of a migration.
    FinishMigrate,
    /// Migrated away.
    Postmigrate,
    /// Powered off.
    Shutdown,
    /// In ACPI S3.
    Suspended,
    /// Stopped by an I/O error.
    IoError,
    /// Stopped by an internal error.
    InternalError,
    /// Crashed.
    GuestPanicked,
    /// A state that this version of ours does not know.
    #[serde(other)]
    Unknown,
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// What `query-status` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// The run state.
    #[serde(rename = "status")]
    pub state: RunState,
    /// Do its CPUs run?
    pub running: bool,
}

impl Status {
    /// Not running, but it would run on: predicted with no writes.
    pub fn is_paused(self) -> bool {
        !self.running
    }
}

/// In which state is the VM?
pub async fn status(monitor: &mut Monitor) -> Result<Status, QmpError> {
    monitor.execute("query-status", Value::Null).await
}

/// Does KVM run it? Under TCG the dirty bitmap counts nothing.
pub async fn kvm_enabled(monitor: &mut Monitor) -> Result<bool, QmpError> {
    #[derive(Deserialize)]
    struct Kvm {
        enabled: bool,
    }
    Ok(monitor.execute::<Kvm>("query-kvm", Value::Null).await?.enabled)
}

/// Whether the VM may be measured now. A paused VM may: look at the status that comes back.
pub async fn ensure_measurable(monitor: &mut Monitor) -> Result<Status, VmError> {
    if monitor.version() < OLDEST_QEMU {
        return Err(VmError::TooOld { found: monitor.version() });
    }
    let status = status(monitor).await?;
    match status.state {
        RunState::Inmigrate => return Err(VmError::Incoming),
        RunState::Postmigrate | RunState::Shutdown | RunState::InternalError | RunState::GuestPanicked => {
            return Err(VmError::Ended { state: status.state });
        }
        _ => {}
    }
    match migration::query(monitor).await?.status {
        Some(status) if status.is_active() => Err(VmError::Migrating { status }),
        _ => Ok(status),
    }
}
