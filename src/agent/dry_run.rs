//! Carries out the dry run that a forecast asks for, and answers it: the job of [`super::jobs`] that takes minutes.
//!
//! In: what is asked, the question it is asked under. Out: progress once a second and the result, in `status.dryRun`. It is given up when it is
//! withdrawn: nobody asks any more, the question is another one, a migration wants the VM, its spec has changed, the process ends, or those
//! from whom any of this would be heard, the manager and the API server, are silent.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use tokio::{sync::watch, time::sleep};
use tracing::info;

use super::{
    answer::Asked,
    jobs::{CONNECT, Outcome, Shared, TELL_EVERY, locate, tell},
    locate::Locate,
    publish::Part,
    vm::{Key, Life},
};
use crate::{
    api::{
        MigrationForecast,
        dry_run::{Compression, Counted, DryRun, DryRunLimit, DryRunPhase, DryRunResult, DryRunStatus, Request},
        migration::HintPhase,
        names, scalar,
    },
    dryrun::{self, DryRunError, End, Plan, Progress, Reason, Report},
    model::forecast::{Question, Verdict},
    qemu::monitor::Monitor,
    runtime::{
        lease,
        pulse::{Pulse, Silence},
    },
};

/// An API server that takes no progress for so long may have told us to stop, and we would not know.
const SILENCE: Duration = Duration::from_secs(60);
/// A manager that has not renewed its Lease for so long leads no more, and tells of no migration that is about to begin.
const NO_MANAGER: Duration = lease::DURATION;
/// Between two attempts to write the result, and for how long it is tried: it took minutes to get.
const RESULT: (Duration, u32) = (Duration::from_secs(5), 12);

/// What is asked, under which question.
pub(super) struct Task {
    pub(super) asked: DryRun,
    pub(super) question: Asked,
    pub(super) fingerprint: String,
    /// Fingerprint of the VM's spec, where the manager tells it.
    pub(super) vmi_spec: Option<String>,
}

/// Carries it out and writes what came of it.
pub(super) async fn dry_run<L: Locate>(shared: &Arc<Shared<L>>, key: &Key, life: &Life, task: Task) -> Outcome {
    let mut manager = Pulse::of(shared.client.clone(), &shared.options.lease_namespace, names::LEASE, NO_MANAGER);
    let may_begin = somebody_would_tell(shared, key, life, &task, &mut manager).await;
    let begun = DryRunStatus {
        started_at: Some(Time(Timestamp::now())),
        ..DryRunStatus::new(&task.asked.id, &task.fingerprint, DryRunPhase::Running, "")
    };
    let ended = match may_begin {
        Ok(()) => Box::pin(carry_out(shared, key, life, &task, &begun, manager)).await,
        Err(without) => Err(without),
    };
    let status = match ended {
        Ok(status) => status,
        Err((phase, why)) if phase == DryRunPhase::Waiting || shared.shutdown.is_ending() => {
            let message = if shared.shutdown.is_ending() {
                info!(namespace = key.0, name = key.1, ?phase, why, "a dry run ends with the agent");
                "The agent of the node was ended; the next one begins anew.".to_owned()
            } else {
                why
            };
            let status = DryRunStatus::new(&task.asked.id, &task.fingerprint, DryRunPhase::Waiting, message);
            tell(shared, key, life, Part::DryRun(&status)).await;
            return Outcome::DryRun(Box::new(status));
        }
        Err((phase, message)) => DryRunStatus {
            started_at: begun.started_at.clone(),
            ..DryRunStatus::new(&task.asked.id, &task.fingerprint, phase, message)
        },
    };
    let status = DryRunStatus { completed_at: Some(Time(Timestamp::now())), ..status };
    for _ in 0..RESULT.1 {
        if tell(shared, key, life, Part::DryRun(&status)).await {
            return Outcome::DryRun(Box::new(status));
        }
        sleep(RESULT.0).await;
    }
    // Nobody knows of it: it is run again when somebody can be told.
    Outcome::DryRun(Box::new(DryRunStatus { phase: DryRunPhase::Waiting, result: None, ..status }))
}

/// Waits until a manager is seen that would say so if ours had to give way: QEMU has one migration at a time, and refuses a second one.
async fn somebody_would_tell<L>(
    shared: &Arc<Shared<L>>,
    key: &Key,
    life: &Life,
    task: &Task,
    manager: &mut Pulse,
) -> Result<(), Without> {
    tokio::select! {
        renewed = manager.renewed() => renewed.map_err(|silence| (DryRunPhase::Waiting, without_a_manager(&silence))),
        reason = no_longer_wanted(shared, key, life, task) => Err((DryRunPhase::Cancelled, reason.0)),
        () = shared.shutdown.draining() => Err((DryRunPhase::Waiting, String::new())),
    }
}

fn without_a_manager(silence: &Silence) -> String {
    format!(
        "nobody would say that a migration of the VM is about to begin ({silence}); see to the controller, or name its --lease-namespace"
    )
}

/// Why there is no result: how it ended, and in words.
type Without = (DryRunPhase, String);

async fn carry_out<L: Locate>(
    shared: &Arc<Shared<L>>,
    key: &Key,
    life: &Life,
    task: &Task,
    begun: &DryRunStatus,
    mut manager: Pulse,
) -> Result<DryRunStatus, Without> {
    let refused = |message: String| (DryRunPhase::Refused, message);
    let failed = |message: String| (DryRunPhase::Failed, message);
    let request = task.asked.request().map_err(|error| refused(error.to_string()))?;
    let question = match &task.question {
        Asked::Model(question) => question,
        Asked::Words(_, why) => return Err(refused(why.clone())),
    };
    let journal = shared.checkpoint().map(super::checkpoint::Checkpoint::settings).ok_or_else(|| {
        refused("the agent has no place to write down what a dry run borrows of QEMU: start it with --checkpoint".to_owned())
    })?;
    let target =
        locate(shared, life).await.map_err(|error| failed(error.to_string()))?.map_err(|error| refused(error.to_string()))?;
    let monitor = Monitor::connect(&target.monitor, CONNECT).await.map_err(|error| failed(error.to_string()))?;
    let pid = target.pid.or(monitor.peer_pid());
    if pid.is_none() {
        return Err(refused(
            "which process the VM's QEMU is cannot be seen, and so not what would have to be put back after a crash".to_owned(),
        ));
    }
    let place = shared.locate.meeting(&life.pod_uid).map_err(|error| refused(error.to_string()))?;
    let meeting = place.as_ref().map(super::locate::MeetingPlace::meeting);
    let plan = Plan { pid, journal: Some(journal), meeting, ..plan(&request, question) };

    let (news, heard) = watch::channel(None);
    let silent = telling(shared, key, life, begun, heard);
    let withdrawn = async {
        tokio::select! {
            reason = no_longer_wanted(shared, key, life, task) => reason,
            reason = silent => reason,
            silence = manager.lost() => Reason(without_a_manager(&silence)),
            () = shared.shutdown.draining() => Reason("the agent ends".to_owned()),
        }
    };
    let report = dryrun::run(
        monitor,
        &plan,
        |progress| {
            news.send_replace(Some(progress));
        },
        withdrawn,
    )
    .await;
    report.map(|report| read(begun, &report, question, &request)).map_err(|error| (phase(&error), error.to_string()))
}

fn plan(request: &Request, question: &Question) -> Plan {
    Plan {
        link: Some(question.host.line_rate),
        downtime_limits: vec![question.downtime_limit],
        time_budget: question.time_budget,
        deadline: request.deadline,
        compression: match request.compression {
            Compression::None => dryrun::Compression::None,
            Compression::Zstd => dryrun::Compression::Zstd,
        },
        channels: request.channels.unwrap_or(0),
        ..Plan::new(question.bandwidth)
    }
}

fn phase(error: &DryRunError) -> DryRunPhase {
    match error {
        DryRunError::Withdrawn { .. } | DryRunError::Foreign { .. } | DryRunError::Stopped { .. } => DryRunPhase::Cancelled,
        error if error.is_refusal() => DryRunPhase::Refused,
        _ => DryRunPhase::Failed,
    }
}

/// From what was seen to the answer.
fn read(begun: &DryRunStatus, report: &Report, question: &Question, request: &Request) -> DryRunStatus {
    let Some(forecast) = report.forecast(question) else {
        let message = format!(
            "it did not converge within its deadline of {} s, and the migration would have longer: give it more (spec.dryRun.deadline; \
             in a PredictionPolicy dryRun.deadline)",
            request.deadline.as_secs()
        );
        return DryRunStatus {
            phase: DryRunPhase::Cancelled,
            message,
            reason: Some(names::reason::DEADLINE_EXCEEDED.to_owned()),
            iteration: Some(report.iterations),
            ..begun.clone()
        };
    };
    let limits = report.limits(question);
    let ms = |value: Option<f64>| value.map(scalar::Duration::from_ms);
    let counted = Counted {
        zero_pages: report.zero_pages,
        compression_ratio: (request.compression != Compression::None).then(|| report.compression_ratio()),
        limits: limits
            .iter()
            .map(|limit| DryRunLimit {
                downtime_limit: Duration::from_millis(limit.downtime_limit_ms).into(),
                converged: limit.converges == Some(true),
                convergence_time: ms(limit.convergence_ms),
                downtime: ms(limit.downtime_ms),
                total_time: ms(limit.total_ms),
                iterations: limit.iterations,
            })
            .collect(),
    };
    let how = match (report.end, forecast.verdict) {
        (End::Hopeless, _) => "It went round in circles, and would have to the end of its budget.",
        (_, Verdict::Fails) => "It was still copying at the end of its budget.",
        _ => "It came below the downtime limit.",
    };
    DryRunStatus {
        phase: DryRunPhase::Done,
        message: how.to_owned(),
        iteration: Some(report.iterations),
        result: Some(DryRunResult::from_forecast(&forecast, counted)),
        ..begun.clone()
    }
}

/// Writes progress. Resolves when the API server has not taken any for too long.
async fn telling<L>(
    shared: &Arc<Shared<L>>,
    key: &Key,
    life: &Life,
    begun: &DryRunStatus,
    heard: watch::Receiver<Option<Progress>>,
) -> Reason {
    let mut answered = Instant::now();
    let mut told: Option<DryRunStatus> = None;
    loop {
        let progress = *heard.borrow();
        let status = DryRunStatus {
            iteration: progress.map(|progress| progress.iteration),
            remaining_bytes: progress.map(|progress| progress.remaining.0),
            bytes_per_second: progress.map(|progress| progress.rate.0),
            ..begun.clone()
        };
        // A write that says nothing new is worth one thing only: to hear that somebody is there.
        if told.as_ref() != Some(&status) || answered.elapsed() > SILENCE / 4 {
            if tell(shared, key, life, Part::DryRun(&status)).await {
                answered = Instant::now();
                told = Some(status);
            } else if answered.elapsed() > SILENCE {
                return Reason(format!("the API server has not been heard of for {} s", answered.elapsed().as_secs()));
            }
        }
        sleep(TELL_EVERY).await;
    }
}

/// Resolves once the answer is not wanted any more.
async fn no_longer_wanted<L>(shared: &Arc<Shared<L>>, key: &Key, life: &Life, task: &Task) -> Reason {
    let mut questions = shared.questions.clone();
    loop {
        let reason = match questions.borrow_and_update().ours.get(key) {
            None => Some("nobody asks about this VM any more"),
            Some(object) => why_not(object, life, task),
        };
        if let Some(reason) = reason {
            return Reason(reason.to_owned());
        }
        if questions.changed().await.is_err() {
            return Reason("the agent ends".to_owned());
        }
    }
}

/// Why a dry run is not wanted by this object.
fn why_not(object: &MigrationForecast, life: &Life, task: &Task) -> Option<&'static str> {
    if object.spec.pod_uid != life.pod_uid {
        return Some("the VM has moved");
    }
    match &object.spec.dry_run {
        Some(asked) if asked.id == task.asked.id => {}
        Some(_) => return Some("another dry run is asked for"),
        None => return Some("it is not asked for any more"),
    }
    if object.spec.fingerprint() != task.fingerprint {
        return Some("the question has changed");
    }
    if task.vmi_spec.as_deref().zip(object.vmi_spec()).is_some_and(|(then, now)| then != now) {
        return Some("the VM's spec has changed, and QEMU plugs nothing in or out meanwhile");
    }
    match object.hint() {
        // QEMU has one migration at a time.
        Some(hint) => match hint.phase {
            HintPhase::Held => None,
            HintPhase::Pending => Some("a migration of the VM is about to begin"),
            HintPhase::Running => Some("the VM is being migrated"),
        },
        None => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::api::names::hint;

    fn object() -> MigrationForecast {
        let spec = json!({
            "nodeName": "n", "podUID": "pod", "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited", "downtimeLimit": "300ms",
            "dryRun": { "id": "a" }
        });
        MigrationForecast::new("vm", serde_json::from_value(spec).unwrap())
    }

    fn told(uid: &str, phase: &str) -> BTreeMap<String, String> {
        [(hint::MIGRATION.to_owned(), uid.to_owned()), (hint::PHASE.to_owned(), phase.to_owned())].into()
    }

    fn of_spec(vmi_spec: &str) -> BTreeMap<String, String> {
        [(hint::VMI_SPEC.to_owned(), vmi_spec.to_owned()), ("other".to_owned(), vmi_spec.to_owned())].into()
    }

    #[test]
    fn it_is_wanted_until_something_says_otherwise() {
        let life = Life { uid: "u".into(), pod_uid: "pod".into() };
        let task = Task {
            asked: object().spec.dry_run.unwrap(),
            question: Asked::Words("", String::new()),
            fingerprint: object().spec.fingerprint(),
            vmi_spec: Some("one".to_owned()),
        };
        let why = |change: &dyn Fn(&mut MigrationForecast)| {
            let mut object = object();
            change(&mut object);
            why_not(&object, &life, &task)
        };
        assert_eq!(why(&|_| ()), None);
        assert!(why(&|object| object.metadata.annotations = Some(told("a", "Pending"))).is_some());
        assert!(why(&|object| object.metadata.annotations = Some(told("a", "Running"))).is_some());
        assert_eq!(why(&|object| object.metadata.annotations = Some(told("a", "Held"))), None, "it waits for us");
        assert!(why(&|object| object.metadata.annotations = Some(told("b", "Pending"))).is_some());
        assert_eq!(why(&|object| object.metadata.annotations = Some(of_spec("one"))), None);
        assert!(why(&|object| object.metadata.annotations = Some(of_spec("two"))).is_some());
        assert!(why(&|object| object.spec.dry_run = None).is_some());
        assert!(why(&|object| object.spec.dry_run.as_mut().unwrap().id = "b".into()).is_some());
        assert!(why(&|object| object.spec.pod_uid = "other".into()).is_some());
        assert!(why(&|object| object.spec.bandwidth = scalar::Quantity("1Gi".into())).is_some());
    }
}
