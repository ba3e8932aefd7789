//! Watches a running guest's memory and describes who writes which page when.

use std::{path::PathBuf, time::Duration};

use crate::model::{pattern::Pattern, units::Bytes};

/// Which VM to look at.
#[derive(Debug, Clone)]
pub struct Target {
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// QEMU's process; `None` asks the socket's peer credentials.
    pub pid: Option<i32>,
}

/// How long and how densely to look.
#[derive(Debug, Clone)]
pub struct LookOptions {
    /// The whole look.
    pub duration: Duration,
}

impl Default for LookOptions {
    fn default() -> Self {
        Self { duration: Duration::from_secs(12) }
    }
}

/// How far a look has come, 0..=1.
#[derive(Debug, Clone, Copy)]
pub struct Progress(pub f64);

/// What was seen.
#[derive(Debug, Clone)]
pub struct Observation {
    /// Guest RAM.
    pub ram: Bytes,
}

impl Observation {
    /// Describes what was seen as a pattern.
    pub fn pattern(&self) -> Pattern {
        Pattern {}
    }
}

/// Why a VM could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// To come.
    #[error("not implemented")]
    NotImplemented,
}

/// Looks at a running VM. Reads only; the guest is never stopped.
pub async fn observe(_target: &Target, _options: &LookOptions, _progress: impl Fn(Progress) + Send) -> Result<Observation, CollectError> {
    Err(CollectError::NotImplemented)
}
