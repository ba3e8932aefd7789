//! What the agent does for one VM at a time, each a task of its own: look, answer, write, read along.
//!
//! In: copies of what a job needs. Out: an [`Outcome`], which [`super::Agent`] books. A job that is dropped ends what it began.

use std::{
    collections::BTreeSet,
    io::{self, ErrorKind},
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::Client;
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use tokio::{sync::watch::Receiver, task::spawn_blocking, time::sleep};
use tracing::{debug, warn};

use super::{
    Options,
    along::{self, Reading, Truth},
    checkpoint::{Checkpoint, CheckpointError, Epoch},
    locate::{Locate, LocateError},
    publish::{Part, PublishError, Written, publish},
    trouble::Failure,
    vm::{Key, Life, Seen},
    watch::Questions,
};
use crate::{
    api::{
        MigrationForecastStatus,
        dry_run::DryRunStatus,
        migration::{InFlight, LastMigration},
    },
    collector::{self, CollectError, LookOptions, Observation, Target},
    dryrun::{self, DryRunError},
    model::pattern::PatternError,
    qemu::{libvirt::LibvirtError, monitor::Monitor, process::ProcessError, qmp::QmpError, vm::VmError},
    runtime::{client::with_causes, shutdown::Shutdown},
};

/// Progress is written at most so often.
pub(super) const TELL_EVERY: Duration = Duration::from_secs(1);
/// For a monitor to open.
pub(super) const CONNECT: Duration = Duration::from_secs(5);
/// How long QEMU is still asked when the manager knows of the end already.
const LATE: Duration = Duration::from_secs(10);

/// What every job may use.
pub(super) struct Shared<L> {
    pub(super) client: Client,
    pub(super) options: Options,
    pub(super) locate: L,
    pub(super) questions: Receiver<Questions>,
    pub(super) shutdown: Shutdown,
}

impl<L> Shared<L> {
    pub(super) fn checkpoint(&self) -> Option<&Checkpoint> {
        self.options.checkpoint.as_ref()
    }
}

/// What became of a job.
pub(super) enum Outcome {
    /// `cost`: CPU time of the whole process meanwhile; looks are all but all of it.
    Looked {
        looked: Result<Seen, LookError>,
        took: Duration,
        cost: Duration,
        effort: f64,
    },
    Answered {
        status: Box<MigrationForecastStatus>,
        took: Duration,
    },
    Written {
        status: Box<MigrationForecastStatus>,
        written: Result<Written, PublishError>,
    },
    ReadAlong {
        migration_uid: String,
        read: Result<(), AlongError>,
    },
    DryRun(Box<DryRunStatus>),
    Recalled(Result<Vec<Epoch>, CheckpointError>),
}

/// Why a look gave nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Collect(#[from] CollectError),
    #[error("the VM could not be looked for: {0}; this is a defect of migvisor, please report it")]
    Find(tokio::task::JoinError),
    #[error("the look did not end within {} s; look for a hanging QEMU monitor", .0.as_secs())]
    Timeout(Duration),
    #[error("the question is no more")]
    GivenUp,
    #[error("what was seen makes no pattern: {0}; look for a longer time (--look)")]
    Pattern(#[from] PatternError),
    #[error("what was seen could not be described: {0}; this is a defect of migvisor, please report it")]
    Describe(tokio::task::JoinError),
}

impl LookError {
    /// For the metric.
    pub(super) fn result(&self) -> &'static str {
        match self {
            Self::Locate(_) => "not_found",
            Self::Collect(_) | Self::Pattern(_) | Self::Describe(_) | Self::Find(_) => "failed",
            Self::Timeout(_) => "timeout",
            Self::GivenUp => "given_up",
        }
    }

    /// Was there nothing to look at, or something that could not be looked at?
    pub(super) fn failure(&self) -> Failure {
        let nobody_listens = |error: &io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
        let absent = match self {
            Self::Locate(LocateError::NoSocket { .. } | LocateError::Process(ProcessError::None { .. }))
            | Self::Collect(CollectError::Vm(VmError::Incoming)) => true,
            Self::Collect(CollectError::Qmp(error) | CollectError::Vm(VmError::Qmp(error))) => match error {
                QmpError::Connect { source, .. } | QmpError::Libvirt(LibvirtError::Socket { source, .. }) => {
                    nobody_listens(source)
                }
                // A domain that is started, or comes in, is busy with that.
                QmpError::Libvirt(LibvirtError::NothingRuns | LibvirtError::Locked) => true,
                _ => false,
            },
            _ => false,
        };
        if absent { Failure::Absent } else { Failure::Broken }
    }
}

/// Why a migration was not read along.
#[derive(Debug, thiserror::Error)]
pub(super) enum AlongError {
    #[error("the VM could not be looked for: {0}; this is a defect of migvisor, please report it")]
    Find(tokio::task::JoinError),
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// One look, with this share of the samples. Given up as soon as nobody asks about this pod any more.
pub(super) async fn look<L: Locate>(shared: &Arc<Shared<L>>, key: &Key, life: &Life, seed: u64, effort: f64) -> Outcome {
    let (started, used) = (Instant::now(), cpu_used());
    let looked = observe(shared, key, life, seed, effort).await;
    Outcome::Looked { looked, took: started.elapsed(), cost: cpu_used().saturating_sub(used), effort }
}

async fn observe<L: Locate>(shared: &Arc<Shared<L>>, key: &Key, life: &Life, seed: u64, effort: f64) -> Result<Seen, LookError> {
    let target = locate(shared, life).await.map_err(LookError::Find)??;
    if let Err(error) = put_back(shared, &target).await {
        warn!(namespace = key.0, name = key.1, %error, "what a dry run had borrowed is not put back; trying again at the next look");
    }
    let options = &shared.options.look;
    let look = LookOptions { seed: options.seed.wrapping_add(seed), effort, ..options.clone() };
    let limit = look.duration * 3 + Duration::from_secs(30);
    let observation = tokio::select! {
        observed = tokio::time::timeout(limit, collector::observe(&target, &look, |_| ())) =>
            observed.map_err(|_| LookError::Timeout(limit))??,
        () = gone(shared, key, life) => return Err(LookError::GivenUp),
    };
    let (at, measured_at) = (Instant::now(), Timestamp::now());
    let pattern = spawn_blocking(move || Observation::pattern(&observation)).await.map_err(LookError::Describe)??;
    Ok(Seen { pattern: Arc::new(pattern), at, measured_at })
}

/// A dry run of an agent that was killed, or whose monitor was lost, may have left QEMU with its settings: before anything else
/// they are put back. Without files in the journal there is nothing to ask.
async fn put_back<L>(shared: &Arc<Shared<L>>, target: &Target) -> Result<(), DryRunError> {
    let Some(journal) = shared.checkpoint().map(Checkpoint::settings) else { return Ok(()) };
    // No folder, or an empty one: the rule.
    let Ok(mut files) = tokio::fs::read_dir(&journal).await else { return Ok(()) };
    if !matches!(files.next_entry().await, Ok(Some(_))) {
        return Ok(());
    }
    let mut monitor = Monitor::connect(&target.monitor, CONNECT).await?;
    dryrun::recover(&mut monitor, &journal, target.pid).await.map(drop)
}

/// Finding a VM asks the kernel and perhaps libvirt: off the async threads.
pub(super) async fn locate<L: Locate>(
    shared: &Arc<Shared<L>>,
    life: &Life,
) -> Result<Result<Target, LocateError>, tokio::task::JoinError> {
    let (shared, pod_uid) = (Arc::clone(shared), life.pod_uid.clone());
    spawn_blocking(move || shared.locate.locate(&pod_uid)).await
}

/// Resolves once `key` does not ask about this pod any more.
async fn gone<L>(shared: &Arc<Shared<L>>, key: &Key, life: &Life) {
    let mut questions = shared.questions.clone();
    let asks = |questions: &Questions| questions.ours.get(key).is_some_and(|object| object.spec.pod_uid == life.pod_uid);
    if questions.wait_for(|questions| !asks(questions)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Writes an answer.
pub(super) async fn write<L>(shared: &Arc<Shared<L>>, key: &Key, life: &Life, status: MigrationForecastStatus) -> Outcome {
    let written = publish(&shared.client, key, &life.uid, Part::Answer(&status)).await;
    Outcome::Written { status: Box::new(status), written }
}

/// Reads a migration along, and writes how far it is and what became of it.
///
/// `before`: what is known of the migration before it, which stands until this one has ended.
pub(super) async fn read_along<L: Locate>(
    shared: &Arc<Shared<L>>,
    key: &Key,
    life: &Life,
    migration_uid: String,
    before: Option<LastMigration>,
) -> Outcome {
    let (sender, mut readings) = tokio::sync::watch::channel(None);
    let telling = async {
        while readings.changed().await.is_ok() {
            let told = readings.borrow_and_update().map(|reading| in_flight(&reading, &migration_uid));
            tell(shared, key, life, Part::Migration { in_flight: told.as_ref(), last: before.as_ref() }).await;
            sleep(TELL_EVERY).await;
        }
    };
    let reading = async {
        let sender = sender;
        let target = locate(shared, life).await.map_err(AlongError::Find)??;
        Ok::<_, AlongError>(
            along::read_along(&target.monitor, |reading| {
                sender.send_replace(Some(reading));
            })
            .await?,
        )
    };
    let read = tokio::select! {
        read = reading => read,
        // It ends only after the readings have.
        () = async { telling.await; std::future::pending().await } => Ok(None),
        // A QEMU that never comes to an end is not waited for.
        () = no_longer_told(shared, key, &migration_uid) => Ok(None),
    };
    let last = read.as_ref().ok().copied().flatten().and_then(|truth| last_migration(&truth, &migration_uid));
    tell(shared, key, life, Part::Migration { in_flight: None, last: last.as_ref().or(before.as_ref()) }).await;
    Outcome::ReadAlong { migration_uid, read: read.map(drop) }
}

/// Resolves a while after the manager has stopped telling of this migration: the truth may come late.
async fn no_longer_told<L>(shared: &Arc<Shared<L>>, key: &Key, migration_uid: &str) {
    let mut questions = shared.questions.clone();
    let told = |questions: &Questions| {
        let hint = questions.ours.get(key).and_then(|object| object.hint());
        hint.is_some_and(|hint| hint.migration_uid == migration_uid)
    };
    // An error is the end of the agent, which ends this as well.
    let _ = questions.wait_for(|questions| !told(questions)).await;
    sleep(LATE).await;
}

fn in_flight(reading: &Reading, migration_uid: &str) -> InFlight {
    let started = Timestamp::now().checked_sub(reading.elapsed).ok();
    InFlight {
        migration_uid: Some(migration_uid.to_owned()),
        started_at: started.map(Time),
        iteration: reading.iteration,
        remaining_bytes: reading.remaining.0,
        total_bytes: reading.total.0,
        bytes_per_second: reading.rate.0,
        throttle_percent: reading.throttle.map(u64::from),
        eta: reading.eta.map(Into::into),
    }
}

/// `None` where QEMU was gone before it said how it ended: what KubeVirt says is all there is then.
fn last_migration(truth: &Truth, migration_uid: &str) -> Option<LastMigration> {
    Some(LastMigration {
        migration_uid: Some(migration_uid.to_owned()),
        completed_at: Some(Time(Timestamp::now())),
        converged: truth.converged?,
        total_time: truth.total.into(),
        downtime: truth.downtime.map(Into::into),
        pages: truth.pages,
        zero_pages: truth.zero_pages,
        transferred_bytes: truth.transferred.0,
        syncs: truth.syncs,
        throttle_percent: truth.throttle.map(u64::from),
    })
}

/// Progress is news, not state: a failure is logged, and nothing waits for it. False: it was not written.
pub(super) async fn tell<L>(shared: &Arc<Shared<L>>, key: &Key, life: &Life, part: Part<'_>) -> bool {
    let told = publish(&shared.client, key, &life.uid, part).await;
    if let Err(error) = &told {
        debug!(namespace = key.0, name = key.1, error = with_causes(error), "progress was not written");
    }
    told.is_ok()
}

/// Reads what an earlier life of this agent kept of a pod's VM.
pub(super) async fn recall<L: Locate>(shared: &Arc<Shared<L>>, life: &Life) -> Outcome {
    let Some(checkpoint) = shared.checkpoint().cloned() else { return Outcome::Recalled(Ok(vec![])) };
    let pod_uid = life.pod_uid.clone();
    // A job that is dropped or panics has nothing to recall.
    Outcome::Recalled(spawn_blocking(move || checkpoint.load(&pod_uid)).await.unwrap_or_else(|_| Ok(vec![])))
}

/// Rids the checkpoint of pods that are not among these.
pub(super) fn tidy<L>(shared: &Arc<Shared<L>>, here: BTreeSet<String>) {
    if let Some(checkpoint) = shared.checkpoint().cloned() {
        spawn_blocking(move || {
            if let Err(error) = checkpoint.keep_only(|uid| here.contains(uid)) {
                warn!(%error, "the checkpoint is not tidied up");
            }
        });
    }
}

/// Keeps what is known of a pod's VM on disk. A courtesy: a failure is said, and nothing waits for it.
pub(super) fn keep<L>(shared: &Arc<Shared<L>>, pod_uid: &str, epochs: Vec<Epoch>) {
    if let Some(checkpoint) = shared.checkpoint().cloned() {
        let pod_uid = pod_uid.to_owned();
        spawn_blocking(move || {
            if let Err(error) = checkpoint.save(&pod_uid, &epochs) {
                warn!(%error, "a pattern is not kept");
            }
        });
    }
}

/// CPU time that this process has used since its start.
pub(super) fn cpu_used() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return Duration::ZERO };
    let micros = usage.user_time().num_microseconds().saturating_add(usage.system_time().num_microseconds());
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_still_starting_is_told_from_what_fails() {
        let connect = |kind: ErrorKind| QmpError::Connect { path: "x.sock".into(), source: kind.into() };
        let no_socket = LookError::Locate(LocateError::NoSocket { path: "x.sock".into() });
        for absent in [
            no_socket,
            CollectError::from(connect(ErrorKind::ConnectionRefused)).into(),
            CollectError::from(VmError::Incoming).into(),
            CollectError::from(QmpError::from(LibvirtError::NothingRuns)).into(),
        ] {
            assert_eq!(absent.failure(), Failure::Absent, "{absent}");
        }
        for broken in [
            LookError::Locate(LocateError::NotAUid),
            LookError::Timeout(LATE),
            CollectError::from(connect(ErrorKind::PermissionDenied)).into(),
            CollectError::from(QmpError::from(LibvirtError::TooMany)).into(),
            CollectError::NoProcess.into(),
        ] {
            assert_eq!(broken.failure(), Failure::Broken, "{broken}");
        }
    }
}
