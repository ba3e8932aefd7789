//! What the agent knows of one VM: the question, the pattern, the last failure, the answer. A state machine without I/O.
//!
//! In: the object as it is watched, the outcome of looks and writes, the time. Out: a [`Case`] for the scheduler and what to write.
//! Good data outlives failures: while a pattern of this very pod is fresh, questions are answered from it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::jiff::Timestamp;

use super::{
    answer::{self, Asked},
    beside::Beside,
    checkpoint::{EPOCHS, Epoch},
    remedy,
    schedule::{Case, Job},
    trouble::{Failure, Trouble, pause},
};
use crate::{
    api::{
        MigrationForecast, MigrationForecastStatus,
        dry_run::{DryRunPhase, DryRunStatus},
        fingerprint::QuestionRef,
        forecast::FRESH,
        names::reason,
    },
    model::{
        forecast::{HostConstants, Verdict},
        pattern::Pattern,
    },
};

/// Namespace and name of an object.
pub type Key = (String, String);

/// An answer is written at least this often, with the time of the newest look (a minute is left for the queue).
pub const REWRITE: Duration = Duration::from_secs(14 * 60);
/// What has been known for a while is looked at again after as long, but not sooner than this: a guest that was still booting when it
/// was looked at first says nothing of what it will write.
const YOUNG: Duration = Duration::from_secs(15);
/// The least pause between two writes that answer the same question.
const WRITE_GAP: Duration = Duration::from_secs(5);
/// The first and the longest pause after a failed write.
const WRITE_BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Whose life is told: an object, and the pod it asks about. Another one of either begins anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// UID of the object.
    pub uid: String,
    /// UID of the pod that holds the VM.
    pub pod_uid: String,
}

/// A look that succeeded.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Who writes which page when.
    pub pattern: Arc<Pattern>,
    /// When the look ended, by our monotonic clock.
    pub at: Instant,
    /// The same by the wall clock, for `measuredAt`.
    pub measured_at: Timestamp,
}

/// One VM of this node.
#[derive(Debug)]
pub struct Vm {
    life: Life,
    question: QuestionRef,
    asked: Asked,
    remedies: Option<remedy::Asked>,
    paused: bool,
    wanted_since: Option<Instant>,
    seen: Option<Seen>,
    /// The last patterns, oldest first, for the checkpoint.
    epochs: Vec<Epoch>,
    refresh_due: Instant,
    /// The first look at it that is known of.
    known_since: Option<Instant>,
    /// It was looked at once. Also where that counts no more: who pauses a VM gets it no second look beside the budget.
    looked_at: bool,
    trouble: Option<Trouble>,
    published: Option<(MigrationForecastStatus, Instant)>,
    ready: Option<(MigrationForecastStatus, Instant)>,
    write_failures: u32,
    /// What was kept of it has been read.
    recalled: bool,
    /// The jobs that are under way.
    jobs: Vec<Job>,
    beside: Beside,
}

impl Vm {
    /// Takes up an object. An answer of an earlier life of this agent still stands while it is fresh: the VM queues up for its
    /// refresh instead of being looked at at once, so that a restart is no stampede.
    pub fn new(object: &MigrationForecast, host: &HostConstants, now: Instant, wall: Timestamp, refresh: Duration) -> Self {
        let mut vm = Self {
            life: life(object),
            question: object.question(),
            asked: answer::read(&object.spec, host),
            remedies: remedy::Asked::of(&object.spec),
            paused: object.spec.paused,
            wanted_since: Some(now),
            seen: None,
            epochs: Vec::new(),
            refresh_due: now,
            known_since: None,
            looked_at: false,
            trouble: None,
            published: None,
            ready: None,
            write_failures: 0,
            recalled: false,
            jobs: Vec::new(),
            beside: Beside::new(object, now),
        };
        if let Some(status) = &object.status {
            let age = status.measured_at.as_ref().and_then(|at| Duration::try_from(wall.duration_since(at.0)).ok());
            vm.published = now.checked_sub(age.unwrap_or(REWRITE)).map(|at| (status.clone(), at));
            let known = status.verdict.is_some_and(|verdict| verdict != Verdict::Unknown);
            let answers = vm.is_answered_by(status);
            if let Some(age) = age.filter(|age| known && answers && *age < FRESH) {
                vm.wanted_since = None;
                vm.refresh_due = now + refresh.saturating_sub(age);
            }
        }
        vm
    }

    /// Takes up the object as it is now. Where it is another object or pod, everything known is dropped.
    pub fn update(&mut self, object: &MigrationForecast, host: &HostConstants, now: Instant, wall: Timestamp, refresh: Duration) {
        if life(object) != self.life {
            *self = Self::new(object, host, now, wall, refresh);
            return;
        }
        self.beside.take_up(object, now);
        if object.metadata.generation == Some(self.question.generation) {
            return;
        }
        // A new generation alone is no new question: what is asked beside it has changed.
        let question = object.question();
        let other = question.fingerprint != self.question.fingerprint;
        self.question = question;
        let remedies = remedy::Asked::of(&object.spec);
        if remedies != self.remedies {
            self.remedies = remedies;
            self.wanted_since = self.wanted_since.or(Some(now));
        }
        if other {
            self.asked = answer::read(&object.spec, host);
            self.wanted_since = Some(now);
            self.ready = None;
            if self.paused != object.spec.paused {
                // What a paused guest does not write says nothing of what it writes when it runs, and the reverse.
                self.paused = object.spec.paused;
                self.seen = None;
                self.epochs.clear();
                self.known_since = None;
                self.refresh_due = now;
            }
        }
    }

    /// For the scheduler.
    pub fn case(&self, key: Key, now: Instant) -> Case<Key> {
        Case {
            key,
            wanted_since: self.wanted_since.filter(|_| !self.does(Job::Answer)),
            measurable: matches!(self.asked, Asked::Model(_)),
            fresh: self.fresh(now).is_some(),
            refresh_due: self.refresh_due,
            look_after: self.trouble.as_ref().map(|trouble| trouble.until),
            write_due: self.ready.as_ref().filter(|_| !self.does(Job::Write)).map(|(_, due)| *due),
            recall: !self.recalled && !self.does(Job::Recall),
            pressing: self.beside.hint().is_some(),
            unseen: self.is_unseen(),
            engaged: self.jobs.iter().any(|job| job.speaks_to_qemu()),
            migrating: self.beside.migrating(),
            dry_run_wanted: self.beside.dry_run_wanted().map(|(_, due)| due),
        }
    }

    /// Whose life this is.
    pub fn life(&self) -> &Life {
        &self.life
    }

    /// The question, as an answer names it.
    pub fn question(&self) -> &QuestionRef {
        &self.question
    }

    /// What is told and asked beside the question.
    pub fn beside(&self) -> &Beside {
        &self.beside
    }

    /// A dry run came to its end: where it answers the question, the answer is made anew.
    pub fn dry_run_ended(&mut self, status: DryRunStatus, now: Instant) {
        if status.phase == DryRunPhase::Failed {
            // It may have left something behind, which is put back before the next look.
            self.refresh_due = now;
        }
        if status.phase == DryRunPhase::Done {
            self.wanted_since = self.wanted_since.or(Some(now));
        }
        self.beside.dry_run_ended(status, now);
    }

    /// A job panicked: whatever it was, it is not begun again at once.
    pub fn broke_off(&mut self, job: Job, message: &str, now: Instant, spread: f64) {
        match job {
            Job::Look | Job::Answer => self.failed(Failure::Broken, message.to_owned(), now, spread),
            Job::Write => self.write_failed(now, spread),
            Job::Recall => self.recalled = true,
            Job::Along => {
                if let Some(uid) = self.beside.hint().map(|hint| hint.migration_uid.clone()) {
                    self.beside.read_along_to_its_end(uid);
                }
            }
            Job::DryRun => {
                let id = self.beside.dry_run_asked().map(|asked| asked.id.clone()).unwrap_or_default();
                let failed = DryRunStatus::new(&id, &self.question.fingerprint, DryRunPhase::Failed, message);
                self.beside.dry_run_ended(failed, now);
            }
        }
    }

    /// A migration was read along to its end, or cannot be.
    pub fn read_along_to_its_end(&mut self, migration_uid: String) {
        self.beside.read_along_to_its_end(migration_uid);
    }

    /// A job is under way.
    pub fn begun(&mut self, job: Job) {
        self.jobs.push(job);
    }

    /// It has ended, however it did.
    pub fn ended(&mut self, job: Job) {
        self.jobs.retain(|other| *other != job);
    }

    fn does(&self, job: Job) -> bool {
        self.jobs.contains(&job)
    }

    /// The guest is paused.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The last patterns, oldest first.
    pub fn epochs(&self) -> &[Epoch] {
        &self.epochs
    }

    /// Takes up what an earlier life of this agent kept: an answer can be made from it while it is fresh.
    pub fn remember(&mut self, epochs: Vec<Epoch>, now: Instant, wall: Timestamp, refresh: Duration) {
        self.recalled = true;
        if self.paused {
            return;
        }
        if let Some(newest) = epochs.last().filter(|_| self.seen.is_none()) {
            let age = Duration::try_from(wall.duration_since(newest.measured_at)).ok();
            if let Some((age, at)) = age.filter(|age| *age < FRESH).and_then(|age| Some((age, now.checked_sub(age)?))) {
                self.seen = Some(Seen { pattern: newest.pattern.clone(), at, measured_at: newest.measured_at });
                self.refresh_due = now + refresh.saturating_sub(age);
            }
        }
        self.known_since = epochs.first().and_then(|oldest| {
            let age = Duration::try_from(wall.duration_since(oldest.measured_at)).ok()?;
            now.checked_sub(age)
        });
        self.epochs = epochs;
    }

    /// What is being asked.
    pub fn asked(&self) -> &Asked {
        &self.asked
    }

    /// What is asked about remedies.
    pub fn remedies(&self) -> Option<&remedy::Asked> {
        self.remedies.as_ref()
    }

    /// The last look, if it is fresh.
    pub fn fresh(&self, now: Instant) -> Option<&Seen> {
        self.seen.as_ref().filter(|seen| now.saturating_duration_since(seen.at) < FRESH)
    }

    /// The last look, however old.
    pub fn seen(&self) -> Option<&Seen> {
        self.seen.as_ref()
    }

    /// Nothing is known of it, not from an earlier life of the agent either, and nothing but its absence has kept us from looking.
    fn is_unseen(&self) -> bool {
        let known = self.verdict().is_some_and(|verdict| verdict != Verdict::Unknown);
        let answered = known && self.published().is_some_and(|status| self.is_answered_by(status));
        !self.looked_at
            && self.seen.is_none()
            && !answered
            && self.trouble.as_ref().is_none_or(|trouble| trouble.failure == Failure::Absent)
    }

    /// The last failure, if nothing has succeeded since.
    pub fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_ref()
    }

    /// The verdict that was published last.
    pub fn verdict(&self) -> Option<Verdict> {
        self.published.as_ref().and_then(|(status, _)| status.verdict)
    }

    /// What was published last.
    pub fn published(&self) -> Option<&MigrationForecastStatus> {
        self.published.as_ref().map(|(status, _)| status)
    }

    /// A look succeeded: answer anew, look again after `refresh`, or sooner while it has not been known for that long.
    pub fn looked(&mut self, seen: Seen, refresh: Duration) {
        self.looked_at = true;
        let since = *self.known_since.get_or_insert(seen.at);
        let known = seen.at.saturating_duration_since(since);
        self.refresh_due = seen.at + refresh.min(known.max(YOUNG));
        self.wanted_since = self.wanted_since.or(Some(seen.at));
        if self.paused {
            self.epochs.clear();
        }
        self.epochs.push(Epoch { measured_at: seen.measured_at, pattern: seen.pattern.clone() });
        let too_many = self.epochs.len().saturating_sub(EPOCHS);
        self.epochs.drain(..too_many);
        self.seen = Some(seen);
        self.trouble = None;
    }

    /// A look failed: leave it alone for a while (`spread` about 1 keeps many apart), and say so unless good data stands.
    pub fn failed(&mut self, failure: Failure, message: String, now: Instant, spread: f64) {
        self.trouble = Some(Trouble::after(self.trouble.as_ref(), failure, reason::NOT_MEASURED, message, now, spread));
        if self.fresh(now).is_none() {
            self.wanted_since = self.wanted_since.or(Some(now));
        }
    }

    /// An answer is there: it will be written now, soon or (if it says little new) at the next
    /// rewrite. An answer to an earlier question is dropped.
    pub fn answered(&mut self, status: MigrationForecastStatus, now: Instant) {
        if !self.is_answered_by(&status) {
            return;
        }
        self.wanted_since = None;
        let due = match &self.published {
            None => now,
            Some((old, _)) if old.question != status.question || remedy::asked_anew(old, &status) => now,
            Some((old, at)) if answer::worth_writing(old, &status) => (*at + WRITE_GAP).max(now),
            // Words do not age: there is no new look to tell of.
            Some((old, _)) if status.measured_at == old.measured_at => return self.ready = None,
            Some((_, at)) => *at + REWRITE,
        };
        self.ready = Some((status, due));
    }

    /// Does this answer what is asked, and all of it?
    fn is_answered_by(&self, status: &MigrationForecastStatus) -> bool {
        let remedies = self.remedies.as_ref().is_none_or(|asked| asked.is_answered(status.remedies.as_ref()));
        status.question.as_deref() == Some(self.question.fingerprint.as_str()) && remedies
    }

    /// What is to be written.
    pub fn to_write(&self) -> Option<&MigrationForecastStatus> {
        self.ready.as_ref().map(|(status, _)| status)
    }

    /// It was written.
    pub fn written(&mut self, status: MigrationForecastStatus, now: Instant) {
        if self.ready.as_ref().is_some_and(|(ready, _)| *ready == status) {
            self.ready = None;
        }
        self.published = Some((status, now));
        self.write_failures = 0;
    }

    /// It could not be written.
    pub fn write_failed(&mut self, now: Instant, spread: f64) {
        self.write_failures = self.write_failures.saturating_add(1);
        if let Some((_, due)) = &mut self.ready {
            *due = now + pause(WRITE_BACKOFF, self.write_failures, spread);
        }
    }
}

fn life(object: &MigrationForecast) -> Life {
    Life { uid: object.metadata.uid.clone().unwrap_or_default(), pod_uid: object.spec.pod_uid.clone() }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
