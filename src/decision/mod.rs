//! From a forecast and a policy to allow, warn or deny. One function, used by admission and by the manager, so that they cannot disagree.
//!
//! In: the forecast object, the question as it should be now, the time, the policy's mode, who wants the migration.
//! Out: an action, a verdict, a reason fit for a metric's label, and a message for people. Pure: no clock, no client.
//!
//! | | `Converges`, `Unknown` | `Borderline` | `Fails` |
//! |---|---|---|---|
//! | `Audit` | allow | allow | allow |
//! | `Warn` | allow | warn | warn |
//! | `Enforce` | allow | warn | deny (evacuations, workload updates and migrations that KubeVirt would force through: warn) |

mod message;

use k8s_openapi::jiff::Timestamp;

use crate::{
    api::{
        MigrationForecast, MigrationForecastSpec,
        forecast::{BudgetEnd, is_fresh},
        names::{kubevirt, reason},
        policy::Mode,
    },
    model::forecast::{Forecast, Verdict},
};

/// At most this probability is beyond hope.
pub const HOPELESS: f64 = 0.02;

/// Above this probability nothing is denied, whatever the verdict says.
const MOST_PROBABILITY_DENIED: f64 = 0.1;

/// Who wants the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A person, or a program that is not KubeVirt's.
    Person,
    /// A drain or an eviction: KubeVirt asks again for ever.
    Evacuation,
    /// KubeVirt's workload updater.
    WorkloadUpdate,
}

impl Origin {
    /// From the annotations of a VirtualMachineInstanceMigration.
    pub fn of(annotations: &std::collections::BTreeMap<String, String>) -> Self {
        if annotations.contains_key(kubevirt::EVACUATION) {
            Self::Evacuation
        } else if annotations.contains_key(kubevirt::WORKLOAD_UPDATE) {
            Self::WorkloadUpdate
        } else {
            Self::Person
        }
    }
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
    /// What the policy wants done.
    pub mode: Mode,
    /// The policy's name; `None`: the built-in one.
    pub policy: Option<&'a str>,
    /// Who wants the migration.
    pub origin: Origin,
}

/// What happens to the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It passes.
    Allow,
    /// It passes; whoever made it is told.
    AllowWithWarning,
    /// It is refused.
    Deny,
}

impl Action {
    /// For a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::AllowWithWarning => "warn",
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
}

/// What the stored answer is worth now.
#[derive(Debug, Clone, PartialEq)]
pub enum Assessment {
    /// It counts.
    Known(Box<Forecast>),
    /// It does not: why, in one word and in words.
    Unknown(&'static str, String),
}

/// Does the stored answer count, here and now?
pub fn assess(input: &Input<'_>) -> Assessment {
    let unknown = |why, message: &str| Assessment::Unknown(why, message.to_owned());
    if input.leaves_cluster {
        return unknown(reason::OUTSIDE_MODEL, "the VM leaves the cluster (sendTo), which the model does not cover");
    }
    let Some(present) = input.present else {
        return unknown(reason::NO_ANSWER, "the VM is not known here, or does not run");
    };
    if let Some(why) = &present.outside_model {
        return unknown(reason::OUTSIDE_MODEL, why);
    }
    let Some(forecast) = input.forecast else {
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
    if !is_fresh(status.measured_at.as_ref(), input.now) {
        return unknown(
            reason::STALE,
            "the VM has not been looked at for more than 20 minutes (is the agent on its node running, and well?)",
        );
    }
    match status.forecast() {
        Some(forecast) if forecast.verdict != Verdict::Fails || forecast.probability <= MOST_PROBABILITY_DENIED => {
            Assessment::Known(Box::new(forecast))
        }
        Some(_) => unknown(reason::NOT_MEASURED, "the answer contradicts itself"),
        None => unknown(reason::NOT_MEASURED, "the answer is incomplete"),
    }
}

/// Allow, warn or deny.
pub fn decide(input: &Input<'_>) -> Decision {
    let (forecast, present) = match (assess(input), input.present) {
        (Assessment::Known(forecast), Some(present)) => (forecast, present),
        (Assessment::Unknown(reason, message), _) => return unknown(input, reason, &message),
        (Assessment::Known(_), None) => return unknown(input, reason::NO_ANSWER, "the VM is not known here"),
    };
    Decision {
        action: act(input, present, forecast.verdict),
        verdict: forecast.verdict,
        reason: reason_of(&forecast, present),
        message: message::compose(input, present, &forecast),
    }
}

fn unknown(input: &Input<'_>, reason: &'static str, message: &str) -> Decision {
    let message = format!("migvisor has no forecast for the live migration of {}: {}.", input.vm, message.trim_end_matches('.'));
    Decision { action: Action::Allow, verdict: Verdict::Unknown, reason, message }
}

fn act(input: &Input<'_>, present: &MigrationForecastSpec, verdict: Verdict) -> Action {
    match (input.mode, verdict) {
        (Mode::Audit, _) | (_, Verdict::Converges | Verdict::Unknown) => Action::Allow,
        (Mode::Enforce, Verdict::Fails) if input.origin == Origin::Person && !is_forced(present) => Action::Deny,
        (Mode::Warn | Mode::Enforce, Verdict::Borderline | Verdict::Fails) => Action::AllowWithWarning,
    }
}

/// KubeVirt's configuration makes it end all the same, at the guest's expense.
fn is_forced(present: &MigrationForecastSpec) -> bool {
    present.auto_converge || present.when_budget_ends != BudgetEnd::Abort
}

fn reason_of(forecast: &Forecast, present: &MigrationForecastSpec) -> &'static str {
    match forecast.verdict {
        Verdict::Converges => reason::WITHIN_BUDGET,
        Verdict::Borderline if forecast.sla_exceeded => reason::SLA_EXCEEDED,
        Verdict::Borderline => reason::NEAR_THE_LIMIT,
        Verdict::Fails if present.time_budget.is_none() => reason::NEVER_CONVERGES,
        Verdict::Fails => reason::BUDGET_EXCEEDED,
        Verdict::Unknown => reason::NOT_MEASURED,
    }
}

#[cfg(test)]
mod tests;
