//! From a forecast and a policy to allow, warn, hold or deny. One function, used by admission and by the manager, so that they cannot disagree.
//!
//! In: the forecast object, the question as it should be now, the time, the policy, who wants the migration, an override, whether a
//! migration can be held. Out: an action, a verdict, a reason fit for a metric's label, and a message for people. Pure: no clock, no client.
//!
//! The table of what happens is in `docs/architecture.md`; the test `the_documents_table` reads it and holds the code to it.

mod message;
mod origin;

use k8s_openapi::jiff::Timestamp;

pub use self::origin::Origin;
use crate::{
    api::{
        MigrationForecast, MigrationForecastSpec, MigrationForecastStatus,
        convert::reason_of,
        forecast::{BudgetEnd, is_fresh},
        migration_override::MigrationOverride,
        names::reason,
        policy::{DryRunMode, Evacuations, Mode, PredictionPolicy},
        remedy::RemedyAnswer,
    },
    model::forecast::{Forecast, Method, Verdict},
};

/// At most this probability is beyond hope.
pub const HOPELESS: f64 = 0.02;

/// Above this probability nothing is denied, whatever the verdict says.
const MOST_PROBABILITY_DENIED: f64 = 0.1;

/// Can a migration be held back now?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Room {
    /// Yes.
    Free,
    /// As many are held as the policy allows.
    Full,
    /// Its target pod was made without our gate: it goes its way.
    Passed,
    /// No manager is alive to let it go again.
    NoManager,
    /// This one has been held for as long as the policy allows.
    OutOfTime,
}

/// How far the migration is that is decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Nobody has asked for one: what would be said of a person's.
    Nobody,
    /// It is asked for now.
    Request,
    /// It has been let through, and nothing is transferred yet. It is not denied for the want of room.
    Admitted,
}

/// Everything a decision depends on.
#[derive(Debug, Clone)]
pub struct Input<'a> {
    /// Namespace and name of the VM, for the message.
    pub vm: &'a str,
    /// What is stored about it.
    pub forecast: Option<&'a MigrationForecast>,
    /// The question as it should be now; `None`: the VM is not known, or does not run.
    pub present: Option<&'a MigrationForecastSpec>,
    /// It leaves the cluster (`sendTo`): outside the model.
    pub leaves_cluster: bool,
    /// Now.
    pub now: Timestamp,
    /// The policy that applies; `None`: the built-in one, which only audits.
    pub policy: Option<&'a PredictionPolicy>,
    /// Who wants the migration.
    pub origin: Origin,
    /// An override of the VM's that is in force.
    pub overridden: Option<&'a MigrationOverride>,
    /// Could it be held?
    pub room: Room,
    /// How far it is.
    pub stage: Stage,
}

/// What happens to the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It passes.
    Allow,
    /// It passes; whoever made it is told.
    AllowWithWarning,
    /// It passes, and is held back before anything is transferred, until a dry run has tried it out or a remedy has been applied.
    Hold,
    /// It is refused.
    Deny,
}

impl Action {
    /// For a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::AllowWithWarning => "warn",
            Self::Hold => "hold",
            Self::Deny => "deny",
        }
    }
}

/// What was decided, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// What happens to the request.
    pub action: Action,
    /// The verdict it rests on: `Unknown` where the stored answer does not count.
    pub verdict: Verdict,
    /// Why: one of [`reason`].
    pub reason: &'static str,
    /// Why, for people: what would happen, what it needs, the ways out.
    pub message: String,
    /// With [`Action::Hold`]: it is held for this to be applied. `None`: for a dry run.
    pub remedy: Option<RemedyAnswer>,
}

/// What the stored answer is worth now.
#[derive(Debug, Clone, PartialEq)]
pub enum Assessment {
    /// It counts.
    Known(Box<Forecast>),
    /// It does not: why, in one word and in words.
    Unknown(&'static str, String),
}

/// Does the stored answer count for the question as it should be now (`None`: the VM is not known, or does not run)?
pub fn assess(forecast: Option<&MigrationForecast>, present: Option<&MigrationForecastSpec>, now: Timestamp) -> Assessment {
    let unknown = |why, message: &str| Assessment::Unknown(why, message.to_owned());
    let Some(present) = present else {
        return unknown(reason::NO_ANSWER, "the VM is not known here, or does not run");
    };
    if let Some(why) = &present.outside_model {
        return unknown(reason::OUTSIDE_MODEL, why);
    }
    let Some(forecast) = forecast else {
        return unknown(reason::NO_ANSWER, "no forecast has been asked for yet");
    };
    let Some(status) = forecast.answer_to(present) else {
        if forecast.spec.question_only() != present.question_only() {
            return unknown(
                reason::OUTDATED,
                "the VM, its place or its configuration has changed since the forecast was asked for",
            );
        }
        return match forecast.status.as_ref().and_then(|status| status.verdict) {
            Some(_) => unknown(reason::OUTDATED, "the agent has not answered the present question yet"),
            None => unknown(reason::NO_ANSWER, "no agent has answered yet (is one running on the VM's node, and well?)"),
        };
    };
    if status.verdict == Some(Verdict::Unknown) {
        return unknown(reason::NOT_MEASURED, status.message.as_deref().unwrap_or("the agent could not measure the VM"));
    }
    if !is_fresh(status.measured_at.as_ref(), now) {
        return unknown(
            reason::STALE,
            "the VM has not been looked at for more than 20 minutes (is the agent on its node running, and well?)",
        );
    }
    let pattern = status.forecast();
    match tried_out(status, present, pattern.as_ref(), now).or(pattern) {
        Some(forecast) if forecast.verdict != Verdict::Fails || forecast.probability <= MOST_PROBABILITY_DENIED => {
            Assessment::Known(Box::new(forecast))
        }
        Some(_) => unknown(reason::NOT_MEASURED, "the answer contradicts itself"),
        None => unknown(reason::NOT_MEASURED, "the answer is incomplete"),
    }
}

/// What a dry run says that has ended while the answer is still the pattern's: the agent writes the one after the other.
fn tried_out(
    status: &MigrationForecastStatus,
    present: &MigrationForecastSpec,
    pattern: Option<&Forecast>,
    now: Timestamp,
) -> Option<Forecast> {
    let run = status.dry_run.as_ref().filter(|run| run.result.is_some() && status.method != Some(Method::DryRun))?;
    let (forecast, _) = run.rehearsed(&present.fingerprint(), &present.question().ok()?, pattern, now)?;
    Some(forecast)
}

/// Allow, warn, hold or deny.
pub fn decide(input: &Input<'_>) -> Decision {
    if input.leaves_cluster {
        return unknown(input, reason::OUTSIDE_MODEL, "the VM leaves the cluster (sendTo), which the model does not cover");
    }
    let (forecast, present) = match (assess(input.forecast, input.present, input.now), input.present) {
        (Assessment::Known(forecast), Some(present)) => (forecast, present),
        (Assessment::Unknown(reason, message), _) => return unknown(input, reason, &message),
        (Assessment::Known(_), None) => return unknown(input, reason::NO_ANSWER, "the VM is not known here"),
    };
    let (action, remedy) = act(input, present, &forecast);
    let told = if input.stage == Stage::Nobody { Action::Allow } else { action };
    Decision {
        action,
        verdict: forecast.verdict,
        reason: reason_of(&forecast, present.time_budget.is_none()),
        message: message::compose(input, present, &forecast, told, remedy),
        remedy: remedy.cloned(),
    }
}

fn unknown(input: &Input<'_>, reason: &'static str, message: &str) -> Decision {
    let message = format!("migvisor has no forecast for the live migration of {}: {}.", input.vm, message.trim_end_matches('.'));
    Decision { action: Action::Allow, verdict: Verdict::Unknown, reason, message, remedy: None }
}

fn act<'a>(input: &Input<'a>, present: &'a MigrationForecastSpec, forecast: &Forecast) -> (Action, Option<&'a RemedyAnswer>) {
    let Some(policy) = input.policy.map(|policy| &policy.spec) else { return (Action::Allow, None) };
    if policy.mode == Mode::Audit || matches!(forecast.verdict, Verdict::Converges | Verdict::Unknown) {
        return (Action::Allow, None);
    }
    if policy.mode == Mode::Warn || input.overridden.is_some() || is_forced(present) {
        return (Action::AllowWithWarning, None);
    }
    let kubevirts = input.origin.is_kubevirts();
    let lenient = kubevirts && policy.evacuations == Evacuations::Warn;
    let tries = policy.dry_run.as_ref().is_some_and(|dry_run| dry_run.mode != DryRunMode::Never);
    let remedy = if !lenient && tries && leaves_a_doubt(input, present, forecast) {
        Some(None)
    } else {
        would_help(input, present).filter(|_| forecast.verdict == Verdict::Fails).map(Some)
    };
    match (remedy, input.room) {
        // For a remedy it is a moment only, which takes no place.
        (Some(remedy), Room::Free) | (Some(remedy @ Some(_)), Room::Full) => return (Action::Hold, remedy),
        // It was told that it would be held: that there is no room is not its fault.
        (Some(_), Room::Full | Room::NoManager | Room::Passed) if input.stage == Stage::Admitted => {
            return (Action::AllowWithWarning, None);
        }
        // Nor that its remedy could not be applied, which would be so the next time, too; nor that nobody came to try it out.
        (Some(remedy), Room::OutOfTime) if input.stage == Stage::Admitted && (remedy.is_some() || !has_begun(input)) => {
            return (Action::AllowWithWarning, None);
        }
        _ => {}
    }
    match forecast.verdict {
        // It was let through to be tried out, and nobody did: that is not its fault, either.
        Verdict::Fails if input.stage == Stage::Admitted && was_cut_short(input, present) => (Action::AllowWithWarning, None),
        Verdict::Fails if !kubevirts || policy.evacuations == Evacuations::Deny => (Action::Deny, None),
        _ => (Action::AllowWithWarning, None),
    }
}

/// The dry run of this question was withdrawn before it had a result. One that reached its own deadline had its time: then the pattern alone
/// speaks, as where nothing is tried out.
fn was_cut_short(input: &Input<'_>, present: &MigrationForecastSpec) -> bool {
    let tried = input.forecast.and_then(|forecast| forecast.status.as_ref()?.dry_run.as_ref());
    tried.is_some_and(|tried| tried.was_cut_short() && tried.is_over(&present.fingerprint(), input.now))
}

/// An agent has begun the dry run that is asked for.
fn has_begun(input: &Input<'_>) -> bool {
    let Some(forecast) = input.forecast else { return false };
    let run = forecast.status.as_ref().and_then(|status| status.dry_run.as_ref());
    let asked = forecast.spec.dry_run.as_ref();
    run.zip(asked).is_some_and(|(run, asked)| run.id == asked.id && run.started_at.is_some())
}

/// The first of the remedies that the policy allows of which the agent says that it would converge with it: what is asked about in the
/// present question is what the policy allows, in its order.
fn would_help<'a>(input: &Input<'a>, present: &MigrationForecastSpec) -> Option<&'a RemedyAnswer> {
    let answers = input.forecast?.status.as_ref()?.remedies_for(present, input.now)?;
    answers.iter().find(|answer| answer.verdict == Verdict::Converges)
}

/// A dry run could tell more than what is known: the pattern alone speaks, it is not beyond hope, and none has been tried lately.
fn leaves_a_doubt(input: &Input<'_>, present: &MigrationForecastSpec, forecast: &Forecast) -> bool {
    let hopeless = forecast.verdict == Verdict::Fails && forecast.probability <= HOPELESS;
    let tried = input.forecast.and_then(|forecast| forecast.status.as_ref()?.dry_run.as_ref());
    forecast.method == Method::PatternCollector
        && !hopeless
        && !tried.is_some_and(|tried| tried.is_over(&present.fingerprint(), input.now))
}

/// KubeVirt's configuration makes it end all the same, at the guest's expense.
fn is_forced(present: &MigrationForecastSpec) -> bool {
    present.auto_converge || present.when_budget_ends != BudgetEnd::Abort
}

#[cfg(test)]
mod tests;
