//! What to do next, for which VM: pure, one job at a time.
//!
//! In: for each VM what is wanted, what is known and until when to leave it alone; the time. Out: one job, or how long to sleep.
//! Every job has an instant since which it is due. The one that is overdue the longest goes first; a new question counts as if it
//! had waited for one refresh already, so it goes before routine, and what takes milliseconds goes before what takes seconds.
//! Since being overdue grows for whoever waits and head starts are bounded, nobody starves.

use std::time::{Duration, Instant};

/// Something to do for one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Write an answer that is ready.
    Write,
    /// Answer from what is known, without looking.
    Answer,
    /// Look at the VM.
    Look,
}

/// Where one VM stands.
#[derive(Debug, Clone)]
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
    fn dues(&self, now: Instant) -> impl Iterator<Item = Due> {
        let write = self.write_due.map(|at| Due { job: Job::Write, at, headstart: 3 });
        let failing = self.look_after.is_some_and(|after| now < after);
        let can_answer = !self.measurable || self.fresh || failing;
        let answer = self.wanted_since.filter(|_| can_answer).map(|at| Due { job: Job::Answer, at, headstart: 2 });
        // A question that nothing but a look can answer makes it due at once.
        let asked = self.wanted_since.filter(|_| !can_answer);
        let (from, headstart) = asked.map_or((self.refresh_due, 0), |since| (since, 1));
        let look = match self.look_after {
            // After a failure it queues up again at the back.
            Some(after) => Due { job: Job::Look, at: from.max(after), headstart: 0 },
            None => Due { job: Job::Look, at: from, headstart },
        };
        [write, answer, self.measurable.then_some(look)].into_iter().flatten()
    }
}

/// Picks one job. `refresh` is the interval between two looks at one VM. Ties go to the case that comes first.
pub fn next<K: Clone>(cases: &[Case<K>], now: Instant, refresh: Duration) -> Next<K> {
    let mut best: Option<(Duration, &Case<K>, Job)> = None;
    let mut earliest: Option<Instant> = None;
    for case in cases {
        for due in case.dues(now) {
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
