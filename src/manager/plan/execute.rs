//! The next step of a plan that is carried out. Pure.
//!
//! In: the plan as it is stored, what is known of its migrations and VMs, the time. Out: the status that it should have, and which steps
//! are to be started. Nothing is remembered between two looks: a name is made of the plan's UID and the step, so that what was created, by
//! whichever replica, is found again and never created twice.
//!
//! A step that is about to be started has to be as it was planned: the VM is there, on its node, and converges with the share of the link
//! that the plan gives it. Where it is not, and where a migration fails, the plan stops for good; what is under way goes on. Where nobody
//! knows at the moment, it waits.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use super::{news::condition, vm::Obstacle};
use crate::{
    api::{
        MigrationPlan, MigrationPlanStatus,
        convert::shortened,
        plan::{Phase, PlannedMigration, Schedule, Step},
        scalar::Duration,
    },
    model::{
        forecast::Verdict,
        plan::{self as model, Outlook, Terms},
        units::BytesPerSecond,
    },
};

/// The condition that says whether the plan has been carried out; its reason says how far it is, or why it stopped.
pub const EXECUTED: &str = "Executed";

/// The phase of a migration that was there and is not.
const DELETED: &str = "Deleted";
/// How long a migration that was created may stay unseen before it counts as deleted.
const UNSEEN: std::time::Duration = std::time::Duration::from_secs(30);
/// A link that offers so much less, or more, than it did is another one than was planned with.
const OTHER_LINK: f64 = 0.1;

/// Why a plan stops for good. The names are reasons of the condition [`EXECUTED`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// KubeVirt gave a migration up.
    MigrationFailed,
    /// Somebody deleted a migration.
    MigrationDeleted,
    /// The API server or an admission webhook refused to create one.
    MigrationRefused,
    /// An object that is not of this plan has the name of its migration.
    NameTaken,
    /// The VM has ended, or another one has its name.
    VmGone,
    /// The VM is on another node than it was.
    VmMoved,
    /// It no longer converges with the share that the plan gives it.
    ForecastChanged,
    /// The node's link offers another bandwidth than it did.
    LinkChanged,
}

impl Stop {
    const ALL: [Self; 8] = [
        Self::MigrationFailed,
        Self::MigrationDeleted,
        Self::MigrationRefused,
        Self::NameTaken,
        Self::VmGone,
        Self::VmMoved,
        Self::ForecastChanged,
        Self::LinkChanged,
    ];
}

/// What is known of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The VM: its UID and the node that it runs on; `None`: there is none that runs.
    pub vm: Option<(String, String)>,
    /// The migration of this step, if there is one.
    pub migration: Option<Seen>,
    /// UID of the last migration that the VM tells of as completed, and whether it succeeded.
    pub last: Option<(String, bool)>,
    /// What moving it would be like now, or why nobody can tell.
    pub outlook: Result<Outlook, Obstacle>,
}

/// A migration as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its UID.
    pub uid: String,
    /// Its phase; empty at first.
    pub phase: String,
    /// It belongs to this plan.
    pub ours: bool,
    /// When it was created.
    pub created_at: Option<Time>,
}

/// What should happen now.
#[derive(Debug, Clone, PartialEq)]
pub struct Advance {
    /// The status as it should be.
    pub status: MigrationPlanStatus,
    /// The steps to start, by their index, in order.
    pub start: Vec<usize>,
}

/// The name of the migration of a step.
pub fn migration_name(plan: &MigrationPlan, step: usize) -> String {
    format!("migvisor-plan-{}-{step}", plan.metadata.uid.as_deref().unwrap_or_default())
}

/// Can anything still happen to it?
pub fn is_over(status: &MigrationPlanStatus) -> bool {
    let ended = matches!(status.phase, Some(Phase::Succeeded | Phase::Stopped));
    ended && status.migrations.iter().all(|migration| is_final(&migration.phase))
}

/// Freezes the plan: from now on it is carried out as it stands in the status, whatever becomes of the forecasts.
pub fn begin(plan: &MigrationPlan, mut status: MigrationPlanStatus, now: Timestamp) -> MigrationPlanStatus {
    conclude(plan, &mut status, Phase::Executing, "Executing", "its migrations are about to be created", now);
    status
}

/// One look at a plan that is being carried out. `others`: how many migrations that are not this plan's leave a node, by node;
/// `facts`: one for each step.
pub fn advance(
    plan: &MigrationPlan,
    stored: &MigrationPlanStatus,
    facts: &[Facts],
    others: &[(String, usize)],
    terms: &Terms,
    now: Timestamp,
) -> Advance {
    let mut status = stored.clone();
    let Some(schedule) = stored.schedule.clone() else { return Advance { status, start: Vec::new() } };
    let mut end = stopped(stored);
    let mut waiting = Vec::new();
    for (at, facts) in facts.iter().enumerate().take(schedule.steps.len()) {
        let recorded = stored.migrations.iter().find(|migration| migration.step == at as u64);
        match follow(plan, at, facts, recorded, schedule.steps.get(at), now) {
            Ok(Some(migration)) => {
                let of = || format!("{} of {}/{}", migration.name, migration.namespace, name(&schedule, at));
                end = end.or_else(|| match migration.phase.as_str() {
                    "Failed" => Some((Stop::MigrationFailed, format!("the migration {} failed", of()))),
                    DELETED => Some((Stop::MigrationDeleted, format!("somebody deleted the migration {} before its end", of()))),
                    _ => None,
                });
                record(&mut status, migration);
            }
            Ok(None) => waiting.push(at),
            Err(why) => end = end.or(Some(why)),
        }
    }
    let mut start = Vec::new();
    let mut held: Option<String> = None;
    if plan.spec.execute && end.is_none() {
        let mut room = Room::new(&schedule, &status, others, terms);
        for at in waiting.iter().copied() {
            let (Some(step), Some(facts)) = (schedule.steps.get(at), facts.get(at)) else { continue };
            if !room.has(&step.node) {
                continue;
            }
            match fit(step, facts, &schedule, terms) {
                Ok(None) => {
                    room.take(&step.node);
                    start.push(at);
                }
                Ok(Some(why)) => held = held.or(Some(format!("{}/{} waits: {why}", step.namespace, step.name))),
                Err(why) => {
                    // What was to be started before it is not, either: the picture is another one.
                    (end, start) = (Some(why), Vec::new());
                    break;
                }
            }
        }
    }
    let done = status.migrations.iter().filter(|migration| migration.phase == "Succeeded").count();
    let under_way = status.migrations.iter().filter(|migration| !is_final(&migration.phase)).count();
    let total = schedule.steps.len();
    let count = format!("{done} of {total} migrations succeeded, {under_way} are under way");
    match end {
        Some((why, words)) => {
            conclude(plan, &mut status, Phase::Stopped, &format!("{why:?}"), &words, now);
        }
        None if done == total => conclude(plan, &mut status, Phase::Succeeded, "Succeeded", &count, now),
        None if !plan.spec.execute => {
            conclude(
                plan,
                &mut status,
                Phase::Executing,
                "Paused",
                &format!("{count}; execute is false: nothing more is started"),
                now,
            );
        }
        None => match held.filter(|_| start.is_empty()) {
            Some(why) => conclude(plan, &mut status, Phase::Executing, "Waiting", &format!("{count}; {why}"), now),
            None => conclude(plan, &mut status, Phase::Executing, "Executing", &count, now),
        },
    }
    Advance { status, start }
}

/// The status after one was refused.
pub fn refused(plan: &MigrationPlan, status: &mut MigrationPlanStatus, words: &str, now: Timestamp) {
    conclude(plan, status, Phase::Stopped, &format!("{:?}", Stop::MigrationRefused), words, now);
}

/// Why it stopped, if it did: for good.
fn stopped(status: &MigrationPlanStatus) -> Option<(Stop, String)> {
    let told: &Condition = status.conditions.iter().find(|condition| condition.type_ == EXECUTED)?;
    let why = Stop::ALL.into_iter().find(|stop| format!("{stop:?}") == told.reason)?;
    Some((why, told.message.clone()))
}

fn is_final(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed" | DELETED)
}

fn name(schedule: &Schedule, at: usize) -> String {
    schedule.steps.get(at).map(|step| step.name.clone()).unwrap_or_default()
}

/// What became of a step: its migration as it is now, nothing yet, or an end of all.
fn follow(
    plan: &MigrationPlan,
    at: usize,
    facts: &Facts,
    recorded: Option<&PlannedMigration>,
    step: Option<&Step>,
    now: Timestamp,
) -> Result<Option<PlannedMigration>, (Stop, String)> {
    let name = migration_name(plan, at);
    match (&facts.migration, recorded) {
        (Some(seen), _) if !seen.ours => Err((
            Stop::NameTaken,
            format!("there is a migration {name} that is not of this plan: delete it, and make another plan"),
        )),
        (Some(seen), _) => Ok(Some(PlannedMigration {
            step: at as u64,
            namespace: step.map(|step| step.namespace.clone()).unwrap_or_default(),
            name,
            uid: seen.uid.clone(),
            created_at: seen.created_at.clone(),
            phase: seen.phase.clone(),
        })),
        (None, None) => Ok(None),
        (None, Some(recorded)) if is_final(&recorded.phase) => Ok(Some(recorded.clone())),
        (None, Some(recorded)) => Ok(Some(unseen(facts, recorded, now))),
    }
}

/// A migration that was created, is not final, and is not there. KubeVirt keeps only the last few; the VM remembers its last.
fn unseen(facts: &Facts, recorded: &PlannedMigration, now: Timestamp) -> PlannedMigration {
    let age = recorded.created_at.as_ref().map_or(UNSEEN, |at| now.duration_since(at.0).unsigned_abs());
    let phase = match facts.last.as_ref().filter(|(uid, _)| *uid == recorded.uid) {
        Some((_, true)) => "Succeeded",
        Some((_, false)) => "Failed",
        // Just created: the watch lags behind.
        None if age < UNSEEN => recorded.phase.as_str(),
        None => DELETED,
    };
    PlannedMigration { phase: phase.to_owned(), ..recorded.clone() }
}

/// Notes a migration as it is now.
pub fn record(status: &mut MigrationPlanStatus, migration: PlannedMigration) {
    status.migrations.retain(|other| other.step != migration.step);
    status.migrations.push(migration);
    status.migrations.sort_by_key(|migration| migration.step);
}

/// May this step be started? `Some`: not now, for this reason.
fn fit(step: &Step, facts: &Facts, schedule: &Schedule, terms: &Terms) -> Result<Option<String>, (Stop, String)> {
    let vm = format!("{}/{}", step.namespace, step.name);
    let Some((uid, node)) = &facts.vm else { return Err((Stop::VmGone, format!("the VM {vm} does not run any more"))) };
    if *uid != step.uid {
        return Err((Stop::VmGone, format!("the VM {vm} is another one than was planned with: it was made anew")));
    }
    if *node != step.node {
        return Err((Stop::VmMoved, format!("the VM {vm} is on {node} and no longer on {}", step.node)));
    }
    let outlook = match &facts.outlook {
        Ok(outlook) => outlook,
        Err(obstacle) => return Ok(Some(obstacle.message.clone())),
    };
    let planned = step.bandwidth.rate().unwrap_or_default();
    let link = terms.link.unwrap_or(outlook.question.host.line_rate);
    if (link.0 as f64 - planned.0 as f64).abs() > OTHER_LINK * planned.0 as f64 {
        let words =
            format!("the link of {} offers {} now, and the plan was made for {}", step.node, link.human(), planned.human());
        return Err((Stop::LinkChanged, words));
    }
    let together = schedule.steps.iter().filter(|other| other.node == step.node).count() as u64;
    let share = BytesPerSecond(planned.0.min(link.0) / schedule.per_node.min(together).min(schedule.at_once).max(1));
    let figures = model::figures(outlook, terms.cap, share);
    if figures.verdict != Verdict::Converges {
        let took = Duration::from_ms(figures.total_ms).human();
        let words = format!("the VM {vm} would no longer converge within its SLA at {} (it would take {took})", share.human());
        return Err((Stop::ForecastChanged, words));
    }
    Ok(None)
}

/// How many more may be under way.
struct Room {
    per_node: usize,
    at_once: usize,
    busy: Vec<(String, usize)>,
}

impl Room {
    /// What is under way: this plan's, and everybody else's.
    fn new(schedule: &Schedule, status: &MigrationPlanStatus, others: &[(String, usize)], terms: &Terms) -> Self {
        let less = |planned: u64, limit: usize| usize::try_from(planned).unwrap_or(usize::MAX).min(limit).max(1);
        let mut room = Self {
            per_node: less(schedule.per_node, terms.per_node),
            at_once: less(schedule.at_once, terms.at_once),
            busy: others.to_vec(),
        };
        for migration in status.migrations.iter().filter(|migration| !is_final(&migration.phase)) {
            let at = usize::try_from(migration.step).unwrap_or(usize::MAX);
            if let Some(step) = schedule.steps.get(at) {
                room.take(&step.node);
            }
        }
        room
    }

    fn has(&self, node: &str) -> bool {
        let here = self.busy.iter().find(|(other, _)| other == node).map_or(0, |(_, count)| *count);
        here < self.per_node && self.busy.iter().map(|(_, count)| count).sum::<usize>() < self.at_once
    }

    fn take(&mut self, node: &str) {
        match self.busy.iter_mut().find(|(other, _)| other == node) {
            Some((_, count)) => *count += 1,
            None => self.busy.push((node.to_owned(), 1)),
        }
    }
}

fn conclude(plan: &MigrationPlan, status: &mut MigrationPlanStatus, phase: Phase, why: &str, words: &str, now: Timestamp) {
    let words = shortened(words.to_owned());
    let condition = condition(plan, EXECUTED, phase == Phase::Succeeded, why, &words, now);
    status.conditions.retain(|condition| condition.type_ != EXECUTED);
    status.conditions.push(condition);
    status.phase = Some(phase);
    status.observed_generation = plan.metadata.generation;
    let begin = match phase {
        Phase::Stopped => "Stopped",
        Phase::Succeeded => "Carried out",
        Phase::Executing | Phase::Planned | Phase::NoSolution => "Being carried out",
    };
    status.message = Some(format!("{begin}: {words}."));
}

#[cfg(test)]
#[path = "execute_tests.rs"]
mod tests;
