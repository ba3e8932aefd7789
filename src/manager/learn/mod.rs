//! Learns from migrations that have ended: how far off their forecasts were, what the line from a node carries, what a hand-over takes.
//!
//! In: outcomes, as they are recorded. Out: metrics; line rates and the switchover, by which later questions go; a ConfigMap in which what was
//! learned outlives the leader. Only the leader learns: what the others have to know of it is in the questions that it asks.
//!
//! | module | what |
//! |---|---|
//! | `evidence` | pure: what a migration teaches |
//! | `shelf` | the ConfigMap: read, written, never overwritten unread |

mod evidence;
mod shelf;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) use shelf::run;

use self::shelf::Shelf;
use super::{Manager, observe};
use crate::{
    api::{
        MigrationForecast,
        forecast::HostConstants,
        kubevirt::{MigrationState, VirtualMachineInstance, VirtualMachineInstanceMigration},
        migration::Outcome,
    },
    model::{
        forecast::{Method, Verdict},
        learn::{Book, Figure, Lesson},
        units::Bandwidth,
    },
};

/// So many migrations are remembered whose lessons are not kept yet. The book has them anyway: they are for the case that somebody else
/// writes it, or that nobody says whether we did.
const FRESH: usize = 1024;
/// So many migrations are remembered of which QEMU throttled the guest.
const THROTTLED: usize = 256;

/// What the leader learns.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// `None` until what is kept has been read.
    book: Option<Book>,
    /// Learned since the book was last written: UIDs of migrations, and what they taught.
    fresh: Vec<(String, Vec<Lesson>)>,
    /// What is stored, as far as it is known.
    shelf: Option<Shelf>,
    /// UIDs of migrations.
    throttled: Vec<String>,
}

impl Ledger {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the line from a node, and of the hand-over. `otherwise`: for as long as what is kept has not been read, so that a new leader
    /// does not ask everybody anew.
    pub(super) fn host(&self, node: &str, otherwise: impl FnOnce() -> Option<HostConstants>) -> Option<HostConstants> {
        let known = self.state().book.as_ref().map(|book| HostConstants {
            line_rate: book.line_rate(node).map(Into::into),
            completion_ms: book.switchover(),
            ..HostConstants::default()
        });
        match known {
            None => otherwise(),
            Some(known) => Some(known).filter(|known| *known != HostConstants::default()),
        }
    }

    /// Notes a migration whose guest QEMU slows down: forecasts are of migrations without. `lastMigration` says so, too, and outlives us; but where
    /// QEMU is gone before it tells of the end, there is none.
    pub(super) fn note(&self, stored: &MigrationForecast) {
        let in_flight = stored.status.as_ref().and_then(|status| status.in_flight.as_ref());
        let throttled = in_flight.filter(|it| it.throttle_percent.is_some()).and_then(|it| it.migration_uid.clone());
        let mut state = self.state();
        if let Some(uid) = throttled.filter(|uid| !state.throttled.contains(uid)) {
            state.throttled.push(uid);
            let surplus = state.throttled.len().saturating_sub(THROTTLED);
            state.throttled.drain(..surplus);
        }
    }

    fn was_throttled(&self, migration_uid: &str) -> bool {
        self.state().throttled.iter().any(|uid| uid == migration_uid)
    }

    fn bias(&self, method: Method) -> Option<f64> {
        self.state().book.as_ref().and_then(|book| book.bias(method, Figure::TotalTime))
    }

    fn learn(&self, migration: &str, lessons: Vec<Lesson>) {
        if lessons.is_empty() {
            return;
        }
        let mut state = self.state();
        if let Some(book) = &mut state.book {
            book.learn_from(migration, &lessons);
        }
        state.fresh.push((migration.to_owned(), lessons));
        let surplus = state.fresh.len().saturating_sub(FRESH);
        state.fresh.drain(..surplus);
    }

    fn clear(&self) {
        *self.state() = State::default();
    }

    /// Has what was read and what was learned since come into force.
    fn open(&self, mut book: Book, stored: Shelf, now: u64) {
        let mut state = self.state();
        // Some may be in it: a write of ours may have been taken that nobody answered.
        for (migration, lessons) in &state.fresh {
            book.learn_from(migration, lessons);
        }
        book.settle(now);
        state.book = Some(book);
        state.shelf = Some(stored);
    }

    /// Is there anything to keep, or nothing read yet?
    fn has_news(&self) -> bool {
        let state = self.state();
        !state.fresh.is_empty() || state.shelf.as_ref().is_none_or(Shelf::is_to_be_mended)
    }

    /// What is stored, once it has been read.
    fn shelf(&self) -> Option<Shelf> {
        let state = self.state();
        state.shelf.clone().filter(|_| state.book.is_some())
    }

    /// The book as a text of at most so many bytes, if it is another one than this, and of how many migrations the fresh lessons are in it.
    fn page(&self, before: &Shelf, most: usize, now: u64) -> Option<(String, usize)> {
        let mut state = self.state();
        let book = state.book.as_mut()?;
        book.settle(now);
        let text = book.text(most)?;
        if before.has(&text) {
            state.fresh.clear();
            return None;
        }
        Some((text, state.fresh.len()))
    }

    /// It was written with the fresh lessons of so many migrations.
    fn kept(&self, stored: Shelf, migrations: usize) {
        let mut state = self.state();
        // Somebody else may lead by now, and another one read it since.
        if state.shelf.is_some() {
            state.shelf = Some(stored);
            let migrations = migrations.min(state.fresh.len());
            state.fresh.drain(..migrations);
        }
    }

    /// It is another one than was known: it has to be read again.
    fn lost(&self) {
        self.state().shelf = None;
    }
}

impl Manager {
    /// A migration that ended, beside its forecast, and how far off such forecasts were before.
    pub(super) fn outcome(
        &self,
        migration: &VirtualMachineInstanceMigration,
        vmi: &VirtualMachineInstance,
        stored: &MigrationForecast,
    ) -> Outcome {
        let mut outcome = observe::outcome(migration, Some(vmi), Some(stored));
        if self.ledger.was_throttled(&outcome.migration_uid) {
            outcome = Outcome { relative_error: None, downtime_error: None, pages_error: None, ..outcome };
        }
        outcome.method_bias = outcome.method.and_then(|method| self.ledger.bias(method));
        outcome
    }

    /// Counts an outcome that has been recorded, and learns from it.
    pub(super) fn learn(
        &self,
        migration: &VirtualMachineInstanceMigration,
        vmi: &VirtualMachineInstance,
        stored: &MigrationForecast,
        outcome: &Outcome,
    ) {
        let verdict = format!("{:?}", outcome.verdict.unwrap_or(Verdict::Unknown));
        self.metrics.outcomes.with_label_values(&[outcome.phase.as_str(), &verdict]).inc();
        for (figure, error) in evidence::errors(outcome) {
            let method = outcome.method.map_or("", label);
            self.metrics.forecast_error.with_label_values(&[method, figure.as_str(), &verdict]).observe(error.abs());
        }
        let mut lessons = evidence::off(outcome);
        lessons.extend(evidence::switchover(outcome, stored.spec.host.as_ref()));
        let (state, truth) = (observe::state(migration, Some(vmi)), observe::truth(migration, Some(stored)));
        if let Some((state, truth)) = state.zip(truth).filter(|(state, _)| self.had_the_line(state)) {
            lessons.extend(evidence::rate(truth, state, self.cap(vmi, state)));
        }
        self.ledger.learn(&outcome.migration_uid, lessons);
        self.show();
    }

    /// No other migration shared one of its nodes.
    fn had_the_line(&self, state: &MigrationState) -> bool {
        let knowledge = &self.knowledge;
        let beside = |other: Option<&MigrationState>| other.is_some_and(|other| evidence::is_beside(state, other, true));
        // What has ended is told by its migration, what runs by its VM. Whether it runs is asked once no store is being read.
        let migrations = knowledge.migrations.state_filter(|other| beside(other.status.migration_state.as_ref()));
        let vmis = knowledge.vmis.state_filter(|other| beside(other.status.migration_state.as_ref()));
        let runs = |other: &MigrationState| knowledge.migration(&other.migration_uid).is_some_and(|other| other.is_under_way());
        let states = migrations
            .iter()
            .map(|other| other.status.migration_state.as_ref())
            .chain(vmis.iter().map(|other| other.status.migration_state.as_ref()));
        !states.flatten().any(|other| evidence::is_beside(state, other, runs(other)))
    }

    /// QEMU's cap: as it was handed over, else as it would be now.
    fn cap(&self, vmi: &VirtualMachineInstance, state: &MigrationState) -> Bandwidth {
        let configuration = state.migration_configuration.as_ref();
        let rate = configuration.and_then(|configuration| configuration.bandwidth_per_migration.as_ref()?.rate().ok());
        rate.map_or_else(|| self.knowledge.effective(vmi).bandwidth, Bandwidth::from)
    }

    /// Forgets what was learned: who leads next reads it where it is kept.
    pub(super) fn unlearn(&self) {
        self.ledger.clear();
        self.metrics.forecast_bias.reset();
        self.metrics.learned_pairs.set(0);
    }

    /// Shows in metrics what has been learned.
    fn show(&self) {
        let state = self.ledger.state();
        let Some(book) = &state.book else { return };
        self.metrics.learned_pairs.set(i64::try_from(book.pairs()).unwrap_or(i64::MAX));
        for method in [Method::PatternCollector, Method::DryRun] {
            for figure in Figure::ALL {
                if let Some(bias) = book.bias(method, figure) {
                    self.metrics.forecast_bias.with_label_values(&[label(method), figure.as_str()]).set(bias);
                }
            }
        }
    }
}

/// As the forecasts say it.
fn label(method: Method) -> &'static str {
    match method {
        Method::PatternCollector => "PC",
        Method::DryRun => "DR",
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
