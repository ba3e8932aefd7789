//! The course of a dry run: which downtime limit was met at which synchronisation. In: synchronisations of the dirty log as they
//! happen. Out: what to do next, and at the end every limit's answer. Pure.
//!
//! QEMU's test (`migration_iteration_run`): after a sync, what is pending against the throughput of the last window of 100 ms ×
//! `downtime-limit`. It switches over at the first sync that passes. So one run answers every limit: it begins with the longest, and goes
//! on with the next one as soon as that is met.

use std::time::Duration;

use crate::model::replay::Steadiness;

/// A guest whose calm comes later than this is given up too early; one that is given up later costs its host a run for nothing.
const LEAST_PATIENCE_MS: f64 = 30_000.0;
/// QEMU works a changed limit in when its window of 100 ms ends; that window began before the sync, give or take its clock of whole ms.
const WINDOW_MS: f64 = 98.0;

/// One synchronisation of the dirty log.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sync {
    /// Since the migration began, ms.
    pub(super) at_ms: f64,
    /// QEMU's `dirty-sync-count`.
    pub(super) count: u64,
    /// Bytes of guest memory still to send.
    pub(super) pending: f64,
    /// Throughput of the last window, bytes per ms.
    pub(super) throughput: f64,
    /// Pages sent whole before it.
    pub(super) normal: f64,
    /// Zero pages sent before it.
    pub(super) zero: f64,
    /// Bytes on the wire before it.
    pub(super) wire: f64,
}

/// What to do after a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Go on.
    Go,
    /// A limit was met: the next one is this.
    Lower(Duration),
    /// The shortest limit was met.
    Met,
    /// It goes round in circles, too far from the limit to get there by chance.
    Hopeless,
}

/// One limit, and where it was met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Answer {
    pub(super) limit: Duration,
    pub(super) met: Option<Sync>,
}

/// Where a run is.
#[derive(Debug)]
pub(super) struct Course {
    /// The longest first.
    answers: Vec<Answer>,
    /// `avail-switchover-bandwidth`, bytes per ms.
    switchover: Option<f64>,
    /// When the limit was last lowered, ms, and the throughput of the window before: until the next one QEMU's threshold is still the old.
    lowered: Option<(f64, f64)>,
    /// Syncs that QEMU made for an old threshold only.
    spurious: u64,
    last: u64,
    steadiness: Steadiness,
}

impl Course {
    /// A run for these limits, in any order.
    pub(super) fn new(limits: &[Duration], switchover: Option<u64>) -> Self {
        let mut limits = limits.to_vec();
        limits.sort_unstable_by(|a, b| b.cmp(a));
        limits.dedup();
        Self {
            answers: limits.into_iter().map(|limit| Answer { limit, met: None }).collect(),
            switchover: switchover.map(|rate| rate as f64 / 1000.0),
            lowered: None,
            spurious: 0,
            last: 0,
            steadiness: Steadiness::default(),
        }
    }

    /// The longest limit that is not yet met.
    pub(super) fn limit(&self) -> Option<Duration> {
        self.answers.iter().find(|answer| answer.met.is_none()).map(|answer| answer.limit)
    }

    /// Every limit's answer so far, the longest limit first.
    pub(super) fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Takes a sync in. Syncs come in order; of several that came too fast to be looked at, the last one.
    pub(super) fn sync(&mut self, sync: Sync) -> Step {
        let passed = sync.count.saturating_sub(self.last);
        self.last = sync.count;
        match self.lowered {
            // Another window has another throughput, or, where the cap makes them all alike, is later.
            Some((at_ms, throughput)) if sync.at_ms < at_ms + WINDOW_MS && sync.throughput.to_bits() == throughput.to_bits() => {
                self.spurious = self.spurious.saturating_add(passed);
            }
            // The last one is its own; what came before it was not.
            Some(_) => {
                self.spurious = self.spurious.saturating_add(passed.saturating_sub(1));
                self.lowered = None;
            }
            None => {}
        }
        let per_ms = self.switchover.unwrap_or(sync.throughput);
        let threshold = |limit: Duration| per_ms * limit.as_secs_f64() * 1000.0;
        let counted = Sync { count: sync.count.saturating_sub(self.spurious), ..sync };
        let mut met = false;
        for answer in self.answers.iter_mut().filter(|answer| answer.met.is_none()) {
            if sync.pending >= threshold(answer.limit) {
                break;
            }
            answer.met = Some(counted);
            met = true;
        }
        match self.limit() {
            None => Step::Met,
            Some(next) if met => {
                self.lowered = Some((sync.at_ms, sync.throughput));
                self.steadiness = Steadiness::default();
                Step::Lower(next)
            }
            Some(limit) if per_ms > 0.0 => {
                self.steadiness.note(sync.pending / threshold(limit));
                if sync.at_ms > LEAST_PATIENCE_MS && self.steadiness.hopeless() { Step::Hopeless } else { Step::Go }
            }
            // Before the first window has passed QEMU has no threshold.
            Some(_) => Step::Go,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1_048_576.0;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// 100 MiB/s, one sync every 100 ms.
    fn at(count: u64, pending_mib: f64) -> Sync {
        let throughput = 0.1 * MIB + count as f64;
        Sync { at_ms: count as f64 * 100.0, count, pending: pending_mib * MIB, throughput, ..Sync::default() }
    }

    #[test]
    fn the_first_sync_below_the_threshold_counts() {
        let mut course = Course::new(&[ms(300)], None);
        assert_eq!(course.sync(Sync { throughput: 0.0, ..at(1, 500.0) }), Step::Go);
        assert_eq!(course.sync(at(2, 40.0)), Step::Go);
        assert_eq!(course.sync(at(3, 30.1)), Step::Go);
        assert_eq!(course.sync(at(4, 29.9)), Step::Met);
        assert_eq!(course.answers().iter().map(|answer| answer.met.map(|met| met.count)).collect::<Vec<_>>(), [Some(4)]);
    }

    #[test]
    fn one_run_answers_every_limit() {
        let mut course = Course::new(&[ms(50), ms(1000), ms(300), ms(300)], None);
        assert_eq!(course.limit(), Some(ms(1000)));
        assert_eq!(course.sync(at(2, 110.0)), Step::Go);
        // Below both of the long ones at once.
        assert_eq!(course.sync(at(3, 20.0)), Step::Lower(ms(50)));
        // Two syncs for the old threshold, which QEMU keeps until its window ends.
        assert_eq!(course.sync(Sync { at_ms: 350.0, throughput: at(3, 0.0).throughput, ..at(5, 10.0) }), Step::Go);
        assert_eq!(course.sync(at(7, 6.0)), Step::Go);
        assert_eq!(course.sync(at(8, 4.0)), Step::Met);
        let counts: Vec<_> = course.answers().iter().map(|answer| answer.met.map(|met| met.count)).collect();
        assert_eq!(counts, [Some(3), Some(3), Some(5)]);
    }

    #[test]
    fn a_rate_set_for_the_switchover_is_the_one_that_counts() {
        let mut course = Course::new(&[ms(300)], Some(1000 << 20));
        assert_eq!(course.sync(at(2, 299.0)), Step::Met);
    }

    #[test]
    fn circles_are_given_up_but_not_too_soon() {
        let mut course = Course::new(&[ms(300)], None);
        let steps: Vec<Step> = (2..400).map(|count| course.sync(at(count, 60.0 + (count % 3) as f64))).collect();
        let given_up = steps.iter().position(|step| *step == Step::Hopeless);
        assert!(given_up.is_some_and(|at| (298..310).contains(&at)), "{given_up:?}");
        // Near the limit chance may do it.
        let mut course = Course::new(&[ms(300)], None);
        assert!((2..600).all(|count| course.sync(at(count, 31.0 + (count % 3) as f64)) == Step::Go));
    }
}
