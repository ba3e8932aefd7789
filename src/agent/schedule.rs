//! What to do next, for which VM: pure, one job at a time.
//!
//! In: for each VM what is wanted, what is known and until when to leave it alone; what there is room for; the time. Out: one job,
//! or how long to sleep. Every job has an instant since which it is due. The one that is overdue the longest goes first; a new question
//! counts as if it had waited for one refresh already, so it goes before routine, what takes milliseconds goes before what takes
//! seconds, and a VM whose migration waits goes before the others. Since being overdue grows for whoever waits and head starts are
//! bounded, nobody starves.
//!
//! A QEMU is spoken to by one job at a time. A real migration is read along, and until it has ended nothing else is done to its VM.

use std::time::{Duration, Instant};

/// Something to do for one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Read what an earlier life of the agent kept.
    Recall,
    /// Write an answer that is ready.
    Write,
    /// Answer from what is known, without looking.
    Answer,
    /// Read a migration along that is under way.
    Along,
    /// Rehearse a migration.
    DryRun,
    /// Look at the VM.
    Look,
}

impl Job {
    /// Only one such job at a time for one VM.
    pub fn speaks_to_qemu(self) -> bool {
        matches!(self, Self::Along | Self::DryRun | Self::Look)
    }
}

/// What there is room for.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "one for each kind of job")]
pub struct Room {
    /// Fewer answers are being written than may be at a time.
    pub write: bool,
    /// No answer is being computed.
    pub answer: bool,
    /// No look is under way.
    pub look: bool,
    /// The CPU budget allows the next routine look from then on; what is pressing, or seen for the first time, does not wait for it.
    pub routine_from: Instant,
    /// No dry run is under way.
    pub dry_run: bool,
}

/// A VM's memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moving {
    /// Since then, and nobody reads along yet.
    Unread(Instant),
    /// Somebody read along to the end.
    Read,
}

/// Where one VM stands.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each named where it is set")]
pub struct Case<K> {
    /// Which VM.
    pub key: K,
    /// Since when an answer is wanted; `None`: the last one stands.
    pub wanted_since: Option<Instant>,
    /// False: the answer is words only (outside the model, an unreadable question).
    pub measurable: bool,
    /// There is a pattern of this pod, fresh enough to answer from.
    pub fresh: bool,
    /// When to look again.
    pub refresh_due: Instant,
    /// After a failure: not before. While it runs, a question is answered with that failure.
    pub look_after: Option<Instant>,
    /// When the answer that is ready has to be written.
    pub write_due: Option<Instant>,
    /// A migration of it waits to begin: it goes before the others, and the CPU budget does not hold it back.
    pub pressing: bool,
    /// Nothing is known of it, and nothing but its absence has kept us from looking. The one look that ends this is a new question's,
    /// however often the VM was not there, and the CPU budget does not hold it back.
    pub unseen: bool,
    /// What was kept of it has not been read yet: it may spare a look.
    pub recall: bool,
    /// A job speaks to its QEMU already.
    pub engaged: bool,
    /// It is being migrated: nothing is measured, and somebody should read along.
    pub migrating: Option<Moving>,
    /// Since when a dry run is wanted.
    pub dry_run_wanted: Option<Instant>,
}

/// The scheduler's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next<K> {
    /// Do this now.
    Now(K, Job),
    /// Nothing before then, unless something changes.
    Later(Instant),
    /// Nothing, until something changes.
    Never,
}

/// One job, since when (or from when on) it is due, and how many refreshes it is ahead of routine.
struct Due {
    job: Job,
    at: Instant,
    headstart: u32,
}

impl<K> Case<K> {
    fn dues(&self, now: Instant, room: &Room) -> impl Iterator<Item = Due> {
        let write = self.write_due.filter(|_| room.write).map(|at| Due { job: Job::Write, at, headstart: 4 });
        let failing = self.look_after.is_some_and(|after| now < after);
        let can_answer = !self.measurable || self.fresh || failing || self.migrating.is_some();
        let answer = self.wanted_since.filter(|_| can_answer && room.answer).map(|at| Due { job: Job::Answer, at, headstart: 3 });
        let idle = !self.engaged;
        let along = match self.migrating {
            Some(Moving::Unread(at)) if idle => Some(Due { job: Job::Along, at, headstart: 3 }),
            _ => None,
        };
        let may_measure = self.measurable && idle && !self.recall && self.migrating.is_none();
        let recall = self.recall.then_some(Due { job: Job::Recall, at: now, headstart: 4 });
        // Where nothing can be measured, it says why not.
        let dry_run = self.dry_run_wanted.filter(|_| idle && self.migrating.is_none() && room.dry_run);
        let dry_run = dry_run.map(|at| Due { job: Job::DryRun, at, headstart: 1 });
        let look = (may_measure && room.look).then(|| self.look(can_answer, room));
        [recall, write, answer, along, dry_run, look].into_iter().flatten()
    }

    fn look(&self, can_answer: bool, room: &Room) -> Due {
        // A question that nothing but a look can answer makes it due at once.
        let asked = self.wanted_since.filter(|_| !can_answer);
        let from = asked.unwrap_or(self.refresh_due);
        let headstart = if asked.is_some() || self.unseen { 1 + u32::from(self.pressing) } else { 0 };
        let look = match self.look_after {
            // What was not there has cost nothing.
            Some(after) if self.unseen => Due { job: Job::Look, at: from.max(after), headstart },
            // After another failure it queues up again at the back.
            Some(after) => Due { job: Job::Look, at: from.max(after), headstart: 0 },
            None => Due { job: Job::Look, at: from, headstart },
        };
        if self.pressing || self.unseen { look } else { Due { at: look.at.max(room.routine_from), ..look } }
    }
}

/// Picks one job. `refresh` is the interval between two looks at one VM. Ties go to the case that comes first.
pub fn next<K: Clone>(cases: &[Case<K>], now: Instant, refresh: Duration, room: &Room) -> Next<K> {
    let mut best: Option<(Duration, &Case<K>, Job)> = None;
    let mut earliest: Option<Instant> = None;
    for case in cases {
        for due in case.dues(now, room) {
            if due.at > now {
                earliest = Some(earliest.map_or(due.at, |at| at.min(due.at)));
                continue;
            }
            let urgency = now.duration_since(due.at).saturating_add(refresh.saturating_mul(due.headstart));
            if best.as_ref().is_none_or(|(most, ..)| urgency > *most) {
                best = Some((urgency, case, due.job));
            }
        }
    }
    match (best, earliest) {
        (Some((_, case, job)), _) => Next::Now(case.key.clone(), job),
        (None, Some(at)) => Next::Later(at),
        (None, None) => Next::Never,
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
