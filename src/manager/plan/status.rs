//! From a MigrationPlan and what is known of its VMs to the status that it should have. Pure.
//!
//! In: the plan, the VMs with their questions and answers, KubeVirt's limits, the time. Out: the status before anything is carried out.
//! Carrying it out is [`super::execute`]'s part.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{Resource, ResourceExt};

use super::{
    news::condition,
    vm::{Obstacle, Vm},
};
use crate::{
    api::{
        MigrationPlan, MigrationPlanStatus,
        convert::shortened,
        fingerprint,
        names::reason,
        plan::{self as object, MOST, Phase},
        scalar::{Duration, Quantity},
    },
    manager::question::Limits,
    model::{
        forecast::Verdict,
        plan::{self as model, Comparison, Figures, Outlook, Plan, Terms, Wanted},
        units::BytesPerSecond,
    },
};

/// The condition that says whether there is a plan.
pub const PLANNED: &str = "Planned";

/// The terms of a plan: what it says itself, within KubeVirt's limits.
///
/// # Errors
/// A quantity of the spec cannot be read.
pub fn terms(plan: &MigrationPlan, limits: Limits) -> Result<Terms, object::PlanError> {
    let (link, cap) = plan.spec.rates()?;
    let most = plan.spec.parallelism.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
    let uid = plan.metadata.uid.as_deref().unwrap_or_default();
    Ok(Terms {
        link,
        cap,
        per_node: limits.per_node.min(most).max(1),
        at_once: limits.at_once.max(1),
        // The same plan draws the same lots each time.
        seed: u64::from_str_radix(&fingerprint::of(uid), 16).unwrap_or_default(),
    })
}

/// The status of a plan of which nothing has been carried out.
pub fn status(plan: &MigrationPlan, vms: &[Vm<'_>], limits: Limits, now: Timestamp) -> MigrationPlanStatus {
    let (wanted, terms) = match (plan.spec.wanted(), terms(plan, limits)) {
        (Ok(wanted), Ok(terms)) => (wanted, terms),
        (Err(error), _) | (_, Err(error)) => {
            let status = MigrationPlanStatus::default();
            return concluded(plan, status, Err(("InvalidPlan", format!("{error}; delete the plan and make another one"))), now);
        }
    };
    let outlooks: Vec<_> = vms.iter().map(Vm::outlook).collect();
    let candidates: Vec<_> = vms
        .iter()
        .zip(&outlooks)
        .map(|(vm, outlook)| model::Candidate {
            name: format!("{}/{}", vm.vmi.namespace().unwrap_or_default(), vm.vmi.name_any()),
            node: vm.vmi.status.node_name.clone(),
            cpu: vm.cpu(),
            memory: vm.memory(),
            outlook: outlook.as_ref().ok().cloned(),
        })
        .collect();
    let made = model::plan(wanted, &terms, &candidates);
    let members = made.selection.as_ref().map(|selection| selection.members.as_slice()).unwrap_or_default();
    let shown = shown(&made, members, vms.len());
    let status = MigrationPlanStatus {
        candidates: shown
            .iter()
            .filter_map(|at| {
                let (vm, outlook) = (vms.get(*at)?, outlooks.get(*at)?);
                let rank = made.ranking.iter().position(|ranked| ranked == at).map(|rank| rank as u64 + 1);
                Some(candidate(vm, rank, made.figures.get(*at).copied().flatten(), outlook, made.links.get(*at).copied()))
            })
            .collect(),
        omitted: Some((vms.len() - shown.len()) as u64).filter(|omitted| *omitted > 0),
        ..MigrationPlanStatus::default()
    };
    match &made.selection {
        Err(most) => {
            let freed = format!("{} of memory and {}", most.memory.human(), most.cpu.human());
            let together = if matches!(wanted, Wanted::Cheapest(_)) {
                "no eligible VM frees more than"
            } else {
                "all eligible VMs together free"
            };
            let words = format!("{together} {freed}, of {} that are eligible; {}", made.ranking.len(), wants(wanted));
            concluded(plan, status, Err(("NotEnough", words)), now)
        }
        Ok(selection) if selection.members.is_empty() => {
            concluded(plan, status, Err(("NothingEligible", format!("none of {} VMs can be moved", vms.len()))), now)
        }
        Ok(selection) if selection.members.len() > MOST => {
            let words =
                format!("{} VMs are more than the {MOST} that one plan moves; narrow its selectors", selection.members.len());
            concluded(plan, status, Err(("TooMany", words)), now)
        }
        Ok(selection) => {
            let schedule = made.schedule.as_ref().map(|it| schedule(it, vms, &made.links, &terms));
            let words = told(selection, schedule.as_ref());
            let status = MigrationPlanStatus {
                selection: Some(object::Selection {
                    vms: selection.members.len() as u64,
                    memory: selection.memory.into(),
                    cpu: selection.cpu.into(),
                    cost: figure(selection.cost),
                    least_cost: figure(selection.lower_bound),
                }),
                saving: Some(saving(selection)),
                schedule,
                ..status
            };
            concluded(plan, status, Ok(words), now)
        }
    }
}

/// Who is shown, in this order: the eligible ones by rank, then the others. Where there are too many, those who are to go stay.
fn shown(made: &Plan, members: &[usize], vms: usize) -> Vec<usize> {
    let rest = (0..vms).filter(|at| !made.ranking.contains(at));
    let all: Vec<usize> = made.ranking.iter().copied().chain(rest).collect();
    let room = MOST.saturating_sub(members.len());
    let others = all.iter().filter(|at| !members.contains(at)).take(room).copied().collect::<Vec<_>>();
    all.into_iter().filter(|at| members.contains(at) || others.contains(at)).take(MOST).collect()
}

fn candidate(
    vm: &Vm<'_>,
    rank: Option<u64>,
    figures: Option<Figures>,
    outlook: &Result<Outlook, Obstacle>,
    link: Option<BytesPerSecond>,
) -> object::Candidate {
    let lcb = outlook.as_ref().ok().and_then(|outlook| outlook.forecast.least_convergent_bandwidth).map(BytesPerSecond);
    let obstacle = match (outlook, figures) {
        (Err(obstacle), _) => Some(obstacle.clone()),
        (Ok(outlook), Some(figures)) if rank.is_none() => Some(shortcoming(outlook, &figures, link.unwrap_or_default(), lcb)),
        _ => None,
    };
    object::Candidate {
        namespace: vm.vmi.namespace().unwrap_or_default(),
        name: vm.vmi.name_any(),
        node: vm.vmi.status.node_name.clone(),
        memory: vm.memory().into(),
        cpu: vm.cpu().into(),
        rank,
        cost: figures.and_then(|figures| figures.cost).map(figure),
        verdict: Some(figures.map_or(Verdict::Unknown, |figures| figures.verdict)),
        reason: obstacle.as_ref().map(|obstacle| obstacle.reason.to_owned()),
        message: obstacle.map(|obstacle| shortened(obstacle.message)),
        least_convergent_bandwidth: lcb.map(Quantity::from),
        probability: figures.map(|figures| figure(figures.probability)),
        total_time: figures.map(|figures| Duration::from_ms(figures.total_ms)),
        downtime: figures.and_then(|figures| figures.downtime_ms).map(Duration::from_ms),
    }
}

/// Why a VM with a forecast is not eligible.
fn shortcoming(outlook: &Outlook, figures: &Figures, link: BytesPerSecond, lcb: Option<BytesPerSecond>) -> Obstacle {
    let rate = outlook.question.bandwidth.cap().map_or(link, |cap| cap.min(link)).human();
    let total = Duration::from_ms(figures.total_ms).human();
    if let Some(downtime) = figures.downtime_ms {
        let downtime = Duration::from_ms(downtime).human();
        return Obstacle {
            reason: reason::SLA_EXCEEDED,
            message: format!("at {rate} it would take {total} and stop the guest for {downtime}: the SLA does not allow that"),
        };
    }
    let needs = lcb.map_or_else(
        || "no bandwidth that the line carries suffices".to_owned(),
        |lcb| format!("it needs at least {}", lcb.human()),
    );
    let (reason, would) = match figures.verdict {
        Verdict::Fails => (reason::BUDGET_EXCEEDED, "would not"),
        _ => (reason::NEAR_THE_LIMIT, "might not"),
    };
    Obstacle { reason, message: format!("at {rate} it {would} converge; {needs}") }
}

fn schedule(made: &model::Schedule, vms: &[Vm<'_>], links: &[BytesPerSecond], terms: &Terms) -> object::Schedule {
    let step = |at: usize| {
        let vmi = vms.get(at)?.vmi;
        Some(object::Step {
            namespace: vmi.namespace().unwrap_or_default(),
            name: vmi.name_any(),
            uid: vmi.meta().uid.clone().unwrap_or_default(),
            node: vmi.status.node_name.clone(),
            bandwidth: links.get(at).copied().unwrap_or_default().into(),
        })
    };
    let comparison =
        |of: &Comparison| object::Comparison { makespan: Duration::from_ms(of.makespan_ms), failing: of.failing as u64 };
    object::Schedule {
        steps: made.order.iter().filter_map(|at| step(*at)).collect(),
        per_node: made.per_node as u64,
        at_once: terms.at_once as u64,
        makespan: Duration::from_ms(made.makespan_ms),
        least_makespan: Duration::from_ms(made.lower_bound_ms),
        one_by_one: comparison(&made.one_by_one),
        all_at_once: comparison(&made.all_at_once),
    }
}

fn saving(selection: &model::Selection) -> object::Saving {
    let model::Saving { random_cost, random_failure, everything_cost } = selection.saving;
    object::Saving {
        random_cost: random_cost.map(|random| figure(random.mean)),
        random_cost_error: random_cost.map(|random| figure(random.error)),
        random_failure: random_failure.map(|random| figure(random.mean)),
        against_random_percent: random_cost.and_then(|random| saved(selection.cost, random.mean)),
        everything_cost: figure(everything_cost),
        against_everything_percent: saved(selection.cost, everything_cost),
    }
}

/// How much less that is, in whole percent, rounded down.
fn saved(cost: f64, instead: f64) -> Option<u64> {
    let percent = (100.0 * (1.0 - cost / instead)).floor();
    (0..=100_u32).rev().find(|whole| f64::from(*whole) <= percent).map(u64::from)
}

/// Four digits after the point: what forecasts have.
fn figure(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

fn wants(wanted: Wanted) -> String {
    match wanted {
        Wanted::Cheapest(need) | Wanted::Enough(need) => {
            format!("{} and {} are wanted", need.memory.human(), need.cpu.human())
        }
        Wanted::Everything => "everything is wanted".to_owned(),
    }
}

fn told(selection: &model::Selection, schedule: Option<&object::Schedule>) -> String {
    let vms = match selection.members.len() {
        1 => "Moves one VM".to_owned(),
        more => format!("Moves {more} VMs"),
    };
    let when = schedule.map_or_else(String::new, |schedule| {
        let makespan = schedule.makespan.human();
        match (schedule.steps.len(), schedule.per_node) {
            (1, _) => format!(" in {makespan}"),
            (_, 1) => format!(", one at a time from each node, in {makespan}"),
            (_, k) => format!(", up to {k} at a time from each node, in {makespan}"),
        }
    });
    let freed = format!("frees {} of memory and {}", selection.memory.human(), selection.cpu.human());
    let saved = selection.saving.random_cost.and_then(|random| saved(selection.cost, random.mean));
    let saved = saved.map_or_else(String::new, |percent| format!(", {percent} % less than a random choice"));
    format!("{vms}{when}; {freed} at a cost of {:.3}{saved}.", selection.cost)
}

/// The status with its phase, message and condition; `Err`: there is no plan, in one word and in a sentence.
fn concluded(
    plan: &MigrationPlan,
    status: MigrationPlanStatus,
    outcome: Result<String, (&'static str, String)>,
    now: Timestamp,
) -> MigrationPlanStatus {
    let (phase, holds, why, message) = match outcome {
        Ok(message) => (Phase::Planned, true, "Planned", message),
        Err((why, message)) => (Phase::NoSolution, false, why, format!("There is no such plan: {message}.")),
    };
    MigrationPlanStatus {
        observed_generation: plan.metadata.generation,
        phase: Some(phase),
        planned_at: Some(Time(now)),
        conditions: vec![condition(plan, PLANNED, holds, why, &message, now)],
        message: Some(message),
        ..status
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
pub(super) mod tests;
