//! Which changes of a plan's status are worth a write, and since when a condition holds. Pure.
//!
//! In: what is stored and what should be. Out: whether to write it; conditions.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use crate::api::{MigrationPlan, MigrationPlanStatus, plan as object, scalar::Duration};

/// Figures that changed by less than this share are not worth a write by themselves.
const NOISE: f64 = 0.02;
/// What is written is rewritten after this, if it has changed at all.
const REFRESH: std::time::Duration = std::time::Duration::from_secs(15 * 60);

/// Is it worth writing? Who goes, when, and why somebody does not, always is; figures only where they changed by more than noise, or
/// what is stored is old.
pub fn matters(stored: Option<&MigrationPlanStatus>, fresh: &MigrationPlanStatus, now: Timestamp) -> bool {
    let Some(stored) = stored else { return true };
    let age = stored.planned_at.as_ref().map_or(REFRESH, |at| now.duration_since(at.0).unsigned_abs());
    let changed = || MigrationPlanStatus { planned_at: fresh.planned_at.clone(), ..stored.clone() } != *fresh;
    let far = |(was, is): (&f64, &f64)| (was - is).abs() > NOISE * was.abs().max(is.abs());
    discrete(stored) != discrete(fresh) || numbers(stored).iter().zip(&numbers(fresh)).any(far) || age >= REFRESH && changed()
}

/// The status without figures, and without what is said of them.
fn discrete(status: &MigrationPlanStatus) -> MigrationPlanStatus {
    let candidate = |candidate: &object::Candidate| object::Candidate {
        cost: None,
        probability: None,
        total_time: None,
        downtime: None,
        least_convergent_bandwidth: None,
        message: None,
        ..candidate.clone()
    };
    let schedule = |schedule: object::Schedule| object::Schedule {
        makespan: Duration::default(),
        least_makespan: Duration::default(),
        one_by_one: object::Comparison::default(),
        all_at_once: object::Comparison::default(),
        ..schedule
    };
    let condition = |condition: &Condition| Condition {
        last_transition_time: Time(Timestamp::UNIX_EPOCH),
        message: String::new(),
        ..condition.clone()
    };
    MigrationPlanStatus {
        planned_at: None,
        message: None,
        candidates: status.candidates.iter().map(candidate).collect(),
        schedule: status.schedule.clone().map(schedule),
        conditions: status.conditions.iter().map(condition).collect(),
        selection: status.selection.clone().map(|selection| object::Selection { cost: 0.0, least_cost: 0.0, ..selection }),
        saving: None,
        ..status.clone()
    }
}

/// The figures of the whole.
fn numbers(status: &MigrationPlanStatus) -> Vec<f64> {
    let selection = status.selection.as_ref().map_or(0.0, |selection| selection.cost);
    let saving =
        status.saving.as_ref().map_or((0.0, 0.0), |saving| (saving.random_cost.unwrap_or_default(), saving.everything_cost));
    let makespan = status.schedule.as_ref().map_or(0.0, |schedule| schedule.makespan.as_ms());
    vec![selection, saving.0, saving.1, makespan]
}

/// A condition of a plan, as old as what it says.
pub(super) fn condition(
    plan: &MigrationPlan,
    type_: &str,
    holds: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> Condition {
    let status = if holds { "True" } else { "False" };
    let stored = plan.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let before = stored.iter().find(|condition| condition.type_ == type_ && condition.status == status);
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: before.map_or(Time(now), |before| before.last_transition_time.clone()),
        observed_generation: plan.metadata.generation,
    }
}
