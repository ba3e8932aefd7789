//! A forecast's dry run: asked for in the spec, in progress and answered in the status.
//!
//! In: what an API server stores. Out: the same, typed; a [`Request`] to carry out, refused with the field's name where it makes no
//! sense; the model's forecast (method `DR`) and back.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    convert::{QuestionError, refuse, shortened},
    forecast::is_fresh,
    names::reason,
    scalar::Duration,
    schema,
};
use crate::model::{
    forecast::{Forecast, Question, Verdict},
    predict::of_dry_run,
    replay::Outcome,
};

/// How long a dry run may take where nothing is said: 10 minutes.
pub const DEADLINE: Duration = Duration(std::time::Duration::from_secs(600));
/// The shortest deadline: one second.
pub const SHORTEST: Duration = Duration(std::time::Duration::from_secs(1));
/// The longest deadline: a day.
pub const LONGEST: Duration = Duration(std::time::Duration::from_secs(24 * 3600));

/// Asks the agent to run the migration without delivering it: the whole pre-copy, into a sink, at the bandwidth of the question; the
/// guest is never stopped. Removing this cancels a run. Whoever asks chooses the id; the manager's own begin with `doubt-`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DryRun {
    /// Names what is asked. The same id is the same dry run, however often it is asked for: it runs once. For another one choose another.
    /// The UID of the VirtualMachineInstanceMigration that waits for it, or any name.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"))]
    pub id: String,
    /// How long it may run before it is cancelled, 1s to 24h; 10 minutes when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_deadline")]
    pub deadline: Option<Duration>,
    /// Connections that carry pages side by side (QEMU's `multifd-channels`); absent: one stream, no multifd. KubeVirt 1.9 uses 8, and none
    /// for a VM with a CPU limit or dedicated CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_channels")]
    pub channels: Option<u64>,
    /// How pages are compressed (KubeVirt's `experimental.compression`); absent: `None`.
    #[serde(default, skip_serializing_if = "Compression::is_none")]
    pub compression: Compression,
}

/// How pages are compressed on their way: `None`, or `Zstd` (QEMU's `multifd-compression`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// Zstandard, on multifd's channels.
    Zstd,
}

impl Compression {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
    fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// A dry run to carry out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What it is called.
    pub id: String,
    /// How long it may run.
    pub deadline: std::time::Duration,
    /// Channels of multifd; `None`: no multifd.
    pub channels: Option<u8>,
    /// How pages are compressed.
    pub compression: Compression,
}

impl DryRun {
    /// What to carry out.
    ///
    /// # Errors
    /// A field says something absurd; the error names it and says what would do.
    pub fn request(&self) -> Result<Request, QuestionError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if self.id.is_empty() || self.id.len() > 63 || !self.id.bytes().all(plain) {
            return refuse("dryRun.id", "it has to be 1 to 63 letters, digits, dashes, dots and underscores, such as by-hand-1");
        }
        let deadline = self.deadline.unwrap_or(DEADLINE);
        if !(SHORTEST..=LONGEST).contains(&deadline) {
            return refuse("dryRun.deadline", format!("`{deadline}` is not between 1s and 24h; leave it out for 10m"));
        }
        let channels = match self.channels.map(u8::try_from) {
            None => None,
            Some(Ok(channels)) if channels > 0 => Some(channels),
            Some(_) => return refuse("dryRun.channels", "QEMU has 1 to 255; leave it out for no multifd"),
        };
        if self.compression == Compression::Zstd && channels.is_none() {
            return refuse("dryRun.compression", "Zstd is compression of multifd's channels; say how many, such as channels: 8");
        }
        Ok(Request { id: self.id.clone(), deadline: deadline.0, channels, compression: self.compression })
    }
}

/// How far a dry run is: `Waiting` for its turn, `Running`, `Done` (there is a result), `Refused` (it would do harm, or cannot be; the
/// message says why), `Cancelled` (withdrawn, out of time, or a real migration came), `Failed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DryRunPhase {
    /// For its turn.
    Waiting,
    /// Pages go into the sink.
    Running,
    /// There is a result.
    Done,
    /// It was not begun, and will not be.
    Refused,
    /// It was ended early.
    Cancelled,
    /// It went wrong.
    Failed,
}

impl DryRunPhase {
    /// Nothing more will come of it.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Waiting | Self::Running)
    }
}

/// The dry run that was asked for last: how far it is, and what came of it. The agent's; written at most once a second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DryRunStatus {
    /// What was asked for: `spec.dryRun.id`.
    #[schemars(length(max = 63))]
    pub id: String,
    /// Fingerprint of the question that it ran under, as `status.question`: the bandwidth, the limits, the place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub question: Option<String>,
    /// How far it is.
    pub phase: DryRunPhase,
    /// What happened, and where it did not work, what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
    /// In a word why there is no result: `DeadlineExceeded`, it did not converge within its deadline. Absent where the phase says it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// When QEMU began to send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub started_at: Option<Time>,
    /// When it ended, however it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub completed_at: Option<Time>,
    /// Passes over the memory so far (QEMU's `dirty-sync-count`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub iteration: Option<u64>,
    /// Bytes of memory still to send (QEMU's `ram.remaining`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub remaining_bytes: Option<u64>,
    /// Bytes per second into the sink (QEMU's `ram.mbps`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub bytes_per_second: Option<u64>,
    /// What came of it; only with `Done`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<DryRunResult>,
}

/// What a dry run found, at the downtime limit of the question; `limits` has others, from the same run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DryRunResult {
    /// Would it converge, within the budget and the SLA?
    #[schemars(schema_with = "schema::verdict")]
    pub verdict: Verdict,
    /// How long the migration would take; the budget, or the deadline, where that ended first.
    pub total_time: Duration,
    /// How long the guest would be stopped; absent where it did not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// Total time less downtime.
    pub convergence_time: Duration,
    /// Passes over the memory (QEMU's `dirty-sync-count`).
    #[schemars(schema_with = "schema::count")]
    pub iterations: u64,
    /// Pages of 4 KiB sent whole (QEMU's `normal`).
    #[schemars(schema_with = "schema::count")]
    pub dirtied_pages: u64,
    /// Pages found to be zero, each time they were (QEMU's `duplicate`).
    #[schemars(schema_with = "schema::count")]
    pub zero_pages: u64,
    /// Bytes that reached the sink.
    #[schemars(schema_with = "schema::count")]
    pub transferred_bytes: u64,
    /// Bytes of pages sent for each byte on the wire; absent without compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub compression_ratio: Option<f64>,
    /// Weighed sum of total time, downtime and pages, as `status.cost`; absent where it did not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_amount")]
    pub cost: Option<f64>,
    /// What other downtime limits would have given: the same run answers all that are above its smallest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub limits: Vec<DryRunLimit>,
}

/// What a downtime limit gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DryRunLimit {
    /// QEMU's `downtime-limit`.
    pub downtime_limit: Duration,
    /// Did the run come below it?
    pub converged: bool,
    /// When it first did, from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub convergence_time: Option<Duration>,
    /// What was pending then, at the rate of the line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// Both together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
    /// Passes over the memory until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_count")]
    pub iterations: Option<u64>,
}

/// What a dry run counts beyond the information set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counted {
    /// QEMU's `duplicate`.
    pub zero_pages: u64,
    /// Bytes of pages for each byte on the wire.
    pub compression_ratio: Option<f64>,
    /// Other downtime limits.
    pub limits: Vec<DryRunLimit>,
}

/// The most downtime limits that an object carries.
pub const LIMITS: usize = 16;

impl DryRunResult {
    /// From the model's form of a dry run's outcome. Of more than [`LIMITS`] limits the first are kept.
    pub fn from_forecast(forecast: &Forecast, counted: Counted) -> Self {
        let finite = |value: f64| Some(value).filter(|value| value.is_finite() && *value >= 0.0);
        let mut limits = counted.limits;
        limits.truncate(LIMITS);
        Self {
            verdict: forecast.verdict,
            total_time: Duration::from_ms(forecast.total_ms),
            downtime: forecast.downtime_ms.map(Duration::from_ms),
            convergence_time: Duration::from_ms(forecast.convergence_ms),
            iterations: forecast.iterations,
            dirtied_pages: forecast.dirtied_pages,
            zero_pages: counted.zero_pages,
            transferred_bytes: forecast.transferred_bytes,
            compression_ratio: counted.compression_ratio.and_then(finite),
            cost: forecast.cost.and_then(finite),
            limits,
        }
    }

    /// As the information set, method `DR`, in the words of [`of_dry_run`]. What one run cannot tell (the least convergent bandwidth, other
    /// bandwidths, the pattern) comes from `pattern`, the replay of the observed pattern, where there is one. `None` for a result without a
    /// verdict.
    pub fn forecast(&self, question: &Question, pattern: Option<&Forecast>) -> Option<Forecast> {
        if self.verdict == Verdict::Unknown {
            return None;
        }
        let outcome = Outcome {
            converged: self.downtime.is_some(),
            total_ms: self.total_time.as_ms(),
            downtime_ms: self.downtime.map_or(0.0, Duration::as_ms),
            syncs: self.iterations,
            pages: self.dirtied_pages as f64,
            zero_pages: self.zero_pages as f64,
        };
        // How many pages the guest has is wanted for the cost alone, which is known.
        let seen = of_dry_run(&outcome, self.transferred_bytes as f64, 1.0, question);
        Some(Forecast {
            verdict: self.verdict,
            cost: self.cost,
            least_convergent_bandwidth: pattern.and_then(|forecast| forecast.least_convergent_bandwidth),
            pattern: pattern.and_then(|forecast| forecast.pattern.clone()),
            profile: pattern.map(|forecast| forecast.profile.clone()).unwrap_or_default(),
            ..seen
        })
    }
}

impl DryRunStatus {
    /// One that has come so far, under this question (its fingerprint). A message that is too long for an object is cut.
    pub fn new(id: impl Into<String>, question: impl Into<String>, phase: DryRunPhase, message: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            question: Some(question.into()),
            phase,
            message: shortened(message.into()),
            reason: None,
            started_at: None,
            completed_at: None,
            iteration: None,
            remaining_bytes: None,
            bytes_per_second: None,
            result: None,
        }
    }

    /// Nothing more will come of it for this question (its fingerprint), and it is not so long ago that another try would tell more.
    pub fn is_over(&self, fingerprint: &str, now: Timestamp) -> bool {
        self.question.as_deref() == Some(fingerprint) && self.phase.is_final() && is_fresh(self.completed_at.as_ref(), now)
    }

    /// It was ended from outside before it could tell anything: by a migration, a hotplug, the absence of a manager. One that reached its own
    /// deadline was not: it did not converge within that.
    pub fn was_cut_short(&self) -> bool {
        self.phase == DryRunPhase::Cancelled && self.reason.as_deref() != Some(reason::DEADLINE_EXCEEDED)
    }

    /// What it says of this question (its fingerprint, and read), and when it was: `None` where it ran under another question, ended without
    /// a result, or was too long ago. `pattern` is the replay, for what one run cannot tell.
    pub fn rehearsed(
        &self,
        fingerprint: &str,
        question: &Question,
        pattern: Option<&Forecast>,
        now: Timestamp,
    ) -> Option<(Forecast, Timestamp)> {
        let ended = self.completed_at.as_ref().filter(|ended| is_fresh(Some(ended), now))?;
        Some((self.result_for(fingerprint)?.forecast(question, pattern)?, ended.0))
    }

    /// The result, if it is one for this question (its fingerprint).
    pub fn result_for(&self, fingerprint: &str) -> Option<&DryRunResult> {
        self.result.as_ref().filter(|_| self.phase == DryRunPhase::Done && self.question.as_deref() == Some(fingerprint))
    }
}

#[cfg(test)]
#[path = "dry_run_tests.rs"]
mod tests;
