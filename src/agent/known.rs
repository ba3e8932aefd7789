//! Answers a question: the job that makes a status from what is known of a VM.
//!
//! In: the question, the fresh pattern or why there is none, the last dry run. Out: the status, computed off the async threads.

use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use tokio::task::spawn_blocking;

use super::{
    answer::Asked,
    jobs::Outcome,
    remedy,
    vm::{Seen, Vm},
};
use crate::{
    api::{MigrationForecastStatus, dry_run::DryRunStatus, fingerprint::QuestionRef, names::reason, remedy::RemedyAnswers},
    model::{
        forecast::{Forecast, Question},
        predict::forecast,
        units::BytesPerSecond,
    },
};

/// What an answer is made from: the fresh pattern, else the failure, else the question's own words.
pub(super) struct Known {
    asked: Asked,
    question: QuestionRef,
    remedies: Option<remedy::Asked>,
    fresh: Option<Seen>,
    /// A dry run of this very question that ended not long ago.
    dry_run: Option<DryRunStatus>,
    /// When it was looked at last, however long ago.
    measured_at: Option<Timestamp>,
    /// Why it could not be looked at: a reason and words.
    trouble: Option<(&'static str, String)>,
}

impl Known {
    pub(super) fn of(vm: &Vm, now: Instant) -> Self {
        Self {
            asked: vm.asked().clone(),
            question: vm.question().clone(),
            remedies: vm.remedies().cloned(),
            fresh: vm.fresh(now).cloned(),
            dry_run: vm.beside().dry_run().cloned(),
            measured_at: vm.seen().map(|seen| seen.measured_at),
            trouble: vm.trouble().map(|trouble| (trouble.reason, trouble.message.clone())),
        }
    }
}

/// Answers a question. A dry run that answers it says more than a replay of the pattern.
pub(super) async fn answer(known: Known) -> Outcome {
    let started = Instant::now();
    let status = Box::new(status(known, Timestamp::now()).await);
    Outcome::Answered { status, took: started.elapsed() }
}

async fn status(known: Known, now: Timestamp) -> MigrationForecastStatus {
    let Known { asked, question: name, remedies, fresh, dry_run, measured_at, trouble } = known;
    let unknown = |why, message: String, measured_at| MigrationForecastStatus {
        remedies: remedies.as_ref().map(|asked| asked.unknown(&message)),
        ..MigrationForecastStatus::unknown(why, message, &name, measured_at)
    };
    let question = match asked {
        Asked::Model(question) => question,
        Asked::Words(why, message) => return unknown(why, message, None),
    };
    let (why, message) = trouble.unwrap_or_else(|| (reason::NOT_MEASURED, "not looked at yet".to_owned()));
    let replayed = match fresh {
        None => None,
        Some(seen) => match spawn_blocking(replay(seen, question.clone(), remedies.clone())).await {
            Ok(replayed) => Some(replayed),
            Err(error) => {
                let message = format!("the forecast failed: {error}; this is a defect of migvisor, please report it");
                return unknown(reason::NOT_MEASURED, message, None);
            }
        },
    };
    let pattern = replayed.as_ref().map(|(forecast, ..)| forecast);
    let rehearsed = dry_run.and_then(|run| run.rehearsed(&name.fingerprint, &question, pattern, now));
    let (replayed, answers) = replayed.map_or((None, None), |(forecast, at, answers)| (Some((forecast, at)), answers));
    let Some((forecast, at)) = rehearsed.or(replayed) else { return unknown(why, message, measured_at) };
    // One dry run tells nothing of what would be otherwise.
    let answers = answers.or_else(|| remedies.as_ref().map(|asked| asked.unknown(&message)));
    MigrationForecastStatus { remedies: answers, ..MigrationForecastStatus::from_forecast(&forecast, &question, &name, at) }
}

/// What the pattern says to the question, and to what is asked about remedies.
fn replay(
    seen: Seen,
    question: Box<Question>,
    remedies: Option<remedy::Asked>,
) -> impl FnOnce() -> (Forecast, Timestamp, Option<RemedyAnswers>) {
    move || {
        let forecast = forecast(&seen.pattern, &question);
        let lcb = forecast.least_convergent_bandwidth.map(BytesPerSecond);
        let answers = remedies.map(|asked| asked.answer(&seen.pattern, &question, lcb, seen.measured_at));
        (forecast, seen.measured_at, answers)
    }
}
