//! From what is known of a VM to what should be written about it. Pure: the middle of the pipeline observe → decide → apply.
//!
//! In: the VM, its migrations, its forecast object, the question as it should be, the time. Out: the writes and events that are due; none
//! where nothing has changed.

use std::time::Duration;

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::ResourceExt;

use super::question;
use crate::{
    api::{
        MigrationForecast, MigrationForecastSpec,
        forecast::FRESH,
        kubevirt::{MigrationState, VirtualMachineInstance, VirtualMachineInstanceMigration},
        migration::{Hint, LastMigration, Outcome},
        names::{FORCE_PREFIX, annotation, reason},
        scalar,
    },
    decision::{Action, Decision},
    model::forecast::{Forecast, Verdict},
};

/// The condition that says whether the forecast counts; its reason is the verdict where it does.
pub const READY: &str = "Ready";
/// The condition that says that the VM has not been looked at for too long.
pub const DATA_STALE: &str = "DataStale";

/// How long the agent of the node that a VM has left has to tell of the migration. KubeVirt writes the end in whole seconds.
pub const HAND_OVER: Duration = Duration::from_secs(5);

/// The manager's part of a forecast's status.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnStatus {
    /// The last migration against its forecast.
    pub outcome: Option<Outcome>,
    /// `Ready`, `DataStale`.
    pub conditions: Vec<Condition>,
}

/// What happened to whom, for an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// `PascalCase`.
    pub reason: &'static str,
    /// A warning, or merely news.
    pub warning: bool,
    /// For people.
    pub note: String,
}

/// The manager's part of the status, as it should be now. `decision` is what admission would say of a person's migration.
pub fn own_status(forecast: &MigrationForecast, decision: &Decision, outcome: Option<Outcome>, now: Timestamp) -> OwnStatus {
    let status = forecast.status.clone().unwrap_or_default();
    let known = decision.verdict != Verdict::Unknown;
    let condition = |type_: &str, holds: bool, reason: String, message: String| {
        let holds = if holds { "True" } else { "False" };
        let before = status.conditions.iter().find(|condition| condition.type_ == type_ && condition.status == holds);
        Condition {
            type_: type_.to_owned(),
            status: holds.to_owned(),
            reason,
            message,
            last_transition_time: before.map_or(Time(now), |before| before.last_transition_time.clone()),
            observed_generation: forecast.metadata.generation,
        }
    };
    let stale = decision.reason == reason::STALE;
    let why = if known { format!("{:?}", decision.verdict) } else { decision.reason.to_owned() };
    OwnStatus {
        outcome: outcome.or(status.outcome),
        conditions: vec![
            condition(READY, known, why, if known { String::new() } else { decision.message.clone() }),
            condition(DATA_STALE, stale, if stale { reason::STALE } else { "Fresh" }.to_owned(), String::new()),
        ],
    }
}

/// Does the stored status differ from this, in what the manager owns?
pub fn differs(forecast: &MigrationForecast, wanted: &OwnStatus) -> bool {
    let Some(stored) = &forecast.status else { return true };
    // Kubernetes keeps whole seconds of condition times: what is compared is what is said, not when.
    let said = |condition: &Condition| {
        (condition.type_.clone(), condition.status.clone(), condition.reason.clone(), condition.message.clone())
    };
    stored.outcome != wanted.outcome
        || wanted.conditions.iter().any(|wanted| stored.conditions.iter().all(|stored| said(stored) != said(wanted)))
}

/// The verdict that the stored `Ready` condition tells of, if it tells of one.
pub fn told_verdict(forecast: &MigrationForecast) -> Option<&str> {
    let ready = forecast.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == READY)?;
    (ready.status == "True").then_some(ready.reason.as_str())
}

/// An event for the VM when its verdict is another than the one last told.
pub fn verdict_notice(decision: &Decision, told: Option<&str>) -> Option<Notice> {
    let (reason, warning) = match decision.verdict {
        Verdict::Converges => ("MigrationWouldConverge", false),
        Verdict::Borderline => ("MigrationBorderline", true),
        Verdict::Fails => ("MigrationWouldFail", true),
        Verdict::Unknown => return None,
    };
    // The first forecast of a VM is no transition, unless it is bad news.
    let news = match told {
        Some(told) => told != format!("{:?}", decision.verdict),
        None => decision.verdict != Verdict::Converges,
    };
    news.then(|| Notice { reason, warning, note: decision.message.clone() })
}

/// An event for a migration that was let through with a warning, or while admission was away: not everybody sees admission warnings.
pub fn warning_notice(migration: &VirtualMachineInstanceMigration, decision: &Decision) -> Option<Notice> {
    let early = matches!(migration.status.phase.as_str(), "" | "Pending" | "Scheduling" | "Scheduled");
    (early && decision.action != Action::Allow).then(|| Notice {
        reason: "MigrationForecast",
        warning: true,
        note: decision.message.clone(),
    })
}

/// Of a VM's migrations the last one that ended, unless its outcome is recorded already.
pub fn unrecorded<'a, M: AsRef<VirtualMachineInstanceMigration>>(
    migrations: &'a [M],
    vmi: Option<&VirtualMachineInstance>,
    forecast: &MigrationForecast,
) -> Option<&'a VirtualMachineInstanceMigration> {
    let last = migrations
        .iter()
        .map(AsRef::as_ref)
        .filter(|migration| migration.is_final() && migration.spec.receive.is_none())
        .max_by_key(|migration| (ended(migration, vmi), migration.name_any()))?;
    let recorded = forecast.status.as_ref().and_then(|status| status.outcome.as_ref());
    let newer = recorded.is_none_or(|outcome| {
        outcome.migration_uid != last.uid().unwrap_or_default()
            && outcome.completed_at.as_ref().is_none_or(|recorded| ended(last, vmi).is_none_or(|ended| ended >= recorded.0))
    });
    newer.then_some(last)
}

/// The migration's own state, else the VM's where that is of this migration.
pub fn state<'a>(
    migration: &'a VirtualMachineInstanceMigration,
    vmi: Option<&'a VirtualMachineInstance>,
) -> Option<&'a MigrationState> {
    let of_vmi =
        || vmi?.status.migration_state.as_ref().filter(|state| Some(&state.migration_uid) == migration.metadata.uid.as_ref());
    migration.status.migration_state.as_ref().filter(|state| state.end_timestamp.is_some()).or_else(of_vmi)
}

fn ended(migration: &VirtualMachineInstanceMigration, vmi: Option<&VirtualMachineInstance>) -> Option<Timestamp> {
    let end = state(migration, vmi).and_then(|state| state.end_timestamp.as_ref());
    end.or(migration.metadata.creation_timestamp.as_ref()).map(|time| time.0)
}

/// What QEMU told of this migration at its end, where the agent has written that.
pub fn truth<'a>(
    migration: &VirtualMachineInstanceMigration,
    forecast: Option<&'a MigrationForecast>,
) -> Option<&'a LastMigration> {
    let last = forecast?.status.as_ref()?.last_migration.as_ref()?;
    (last.migration_uid.is_some() && last.migration_uid == migration.metadata.uid).then_some(last)
}

/// Was it plain pre-copy under the configuration that was foretold? One that was forced was not, nor is the end of one that was
/// switched to post-copy or paused. (Nor was one whose guest was throttled: of that QEMU tells.)
fn is_plain(state: &MigrationState) -> bool {
    matches!(state.mode.as_str(), "" | "PreCopy") && !state.migration_policy_name.starts_with(FORCE_PREFIX)
}

/// A migration that ended, beside the forecast that it started with: the one in its annotations, else the present one if that was made
/// before the start.
pub fn outcome(
    migration: &VirtualMachineInstanceMigration,
    vmi: Option<&VirtualMachineInstance>,
    forecast: Option<&MigrationForecast>,
) -> Outcome {
    let state = state(migration, vmi);
    let start = state.and_then(|state| state.start_timestamp.as_ref()).map(|time| time.0);
    let end = state.and_then(|state| state.end_timestamp.as_ref()).map(|time| time.0);
    let seconds = start.zip(end).and_then(|(start, end)| Duration::try_from(end.duration_since(start)).ok());
    let succeeded = migration.status.phase == "Succeeded";
    let truth = truth(migration, forecast).filter(|truth| truth.converged && succeeded);
    let real = truth.map(|truth| truth.total_time).or(seconds.map(scalar::Duration));
    let (downtime, pages) = (truth.and_then(|truth| truth.downtime), truth.map(|truth| truth.pages));

    let annotated =
        migration.annotations().get(annotation::FORECAST).and_then(|json| serde_json::from_str::<Forecast>(json).ok());
    let foretold = annotated.or_else(|| {
        let status = forecast?.status.as_ref()?;
        let measured = status.measured_at.as_ref()?.0;
        (measured <= start?).then(|| status.forecast()).flatten()
    });
    let told = foretold.as_ref().filter(|forecast| forecast.verdict != Verdict::Fails);
    let (told_total, told_downtime) = (told.map(|told| told.total_ms), told.and_then(|told| told.downtime_ms));
    let told_pages = told.map(|told| told.dirtied_pages);
    let throttled = truth.is_some_and(|truth| truth.throttle_percent.is_some());
    let comparable = succeeded && !throttled && state.is_none_or(is_plain);
    let error = |told: Option<f64>, real: Option<f64>| {
        let error = told.zip(real).filter(|(_, real)| comparable && *real > 0.0).map(|(told, real)| (told - real) / real);
        error.filter(|error| error.is_finite()).map(|error| (error * 1e4).round() / 1e4)
    };
    Outcome {
        migration_name: migration.name_any(),
        migration_uid: migration.uid().unwrap_or_default(),
        phase: migration.status.phase.clone(),
        completed_at: end.map(Time),
        total_time: real,
        forecast_total_time: told_total.map(scalar::Duration::from_ms),
        relative_error: error(told_total, real.map(scalar::Duration::as_ms)),
        downtime,
        forecast_downtime: told_downtime.map(scalar::Duration::from_ms),
        downtime_error: error(told_downtime, downtime.map(scalar::Duration::as_ms)),
        pages,
        forecast_pages: told_pages,
        pages_error: error(told_pages.map(|pages| pages as f64), pages.map(|pages| pages as f64)),
        method: foretold.as_ref().map(|forecast| forecast.method),
        method_bias: None,
        verdict: Some(foretold.map_or(Verdict::Unknown, |forecast| forecast.verdict)),
    }
}

/// The event that tells of an outcome.
pub fn outcome_notice(outcome: &Outcome) -> Notice {
    let took = outcome.total_time.map_or_else(|| "it never started".to_owned(), |took| format!("it took {}", took.human()));
    let verdict = outcome.verdict.unwrap_or(Verdict::Unknown);
    let told = match (outcome.forecast_total_time, verdict) {
        (_, Verdict::Unknown) => "there was no forecast".to_owned(),
        (Some(total), verdict) => format!("forecast was {verdict:?} in {}", total.human()),
        (None, verdict) => format!("forecast was {verdict:?}"),
    };
    let error = outcome.relative_error.map_or_else(String::new, |error| format!(" ({:+.1} %)", error * 100.0));
    Notice {
        reason: "MigrationForecastOutcome",
        // A forecast that was plainly wrong deserves a look.
        warning: matches!((outcome.phase.as_str(), verdict), ("Failed", Verdict::Converges) | ("Succeeded", Verdict::Fails)),
        note: format!("Migration {}: {told}, {took}{error}.", outcome.phase.to_lowercase()),
    }
}

/// How much longer the question stays with the node that the VM has just left, so that the agent there can write how the migration went
/// (`status.lastMigration`): once the question is another node's it may not any more. Until that is written, but at most
/// [`HAND_OVER`]; nothing is lost meanwhile, the answer counts for nobody and the new node's look takes longer.
pub fn hand_over(
    vmi: &VirtualMachineInstance,
    node: &str,
    stored: Option<&MigrationForecast>,
    now: Timestamp,
) -> Option<Duration> {
    let (stored, state) = (stored?, vmi.status.migration_state.as_ref()?);
    let ended = state.end_timestamp.as_ref().filter(|_| stored.spec.node_name != node && !state.migration_uid.is_empty())?;
    let told = stored.status.as_ref().and_then(|status| status.last_migration.as_ref());
    if told.is_some_and(|told| told.migration_uid.as_ref() == Some(&state.migration_uid)) {
        return None;
    }
    // Of the future: clocks disagree, and nothing is waited for.
    let since = Duration::try_from(now.duration_since(ended.0)).ok()?;
    HAND_OVER.checked_sub(since).filter(|left| !left.is_zero())
}

/// When the VM has to be looked at again although nothing changes: when its answer turns stale.
pub fn look_again(forecast: &MigrationForecast, now: Timestamp) -> Option<Duration> {
    let measured = forecast.status.as_ref()?.measured_at.as_ref()?.0;
    let age = Duration::try_from(now.duration_since(measured)).unwrap_or_default();
    FRESH.checked_sub(age).map(|left| left + Duration::from_secs(1))
}

/// The object to apply, if what is stored differs from it.
pub fn wanted(
    vmi: &VirtualMachineInstance,
    spec: MigrationForecastSpec,
    hint: Option<&Hint>,
    stored: Option<&MigrationForecast>,
) -> Option<MigrationForecast> {
    question::object(vmi, spec, hint).filter(|wanted| question::differs(stored, wanted))
}

#[cfg(test)]
#[path = "observe_tests.rs"]
mod tests;
