//! By table what goes first; by simulation that nobody starves and that backoff is kept.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const REFRESH: Duration = Duration::from_secs(600);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// An instant and one 10 000 s later.
fn clock() -> (Instant, Instant) {
    let start = Instant::now();
    (start, start + s(10_000))
}

/// Answered, fresh, not due for a while.
fn quiet(key: &'static str, now: Instant) -> Case<&'static str> {
    Case { key, fresh: true, refresh_due: now + s(300), ..blank(key) }
}

/// Nothing known, nothing wanted.
fn blank<K: Clone>(key: K) -> Case<K> {
    let soon = Instant::now();
    Case {
        key,
        wanted_since: None,
        measurable: true,
        fresh: false,
        refresh_due: soon,
        look_after: None,
        write_due: None,
        pressing: false,
        unseen: false,
        recall: false,
        engaged: false,
        migrating: None,
        dry_run_wanted: None,
    }
}

/// Room for everything.
fn room(now: Instant) -> Room {
    Room { write: true, answer: true, look: true, dry_run: true, routine_from: now.checked_sub(s(100_000)).unwrap_or(now) }
}

fn next<K: Clone>(cases: &[Case<K>], now: Instant, refresh: Duration) -> Next<K> {
    super::next(cases, now, refresh, &room(now))
}

#[test]
fn new_questions_first_then_the_stalest() {
    let (start, now) = clock();
    let stale = Case { refresh_due: start + s(9_900), ..quiet("stale", now) };
    let staler = Case { refresh_due: start + s(9_800), ..quiet("staler", now) };
    let asked = Case { wanted_since: Some(start + s(9_999)), fresh: false, ..quiet("asked", now) };
    let changed = Case { wanted_since: Some(now), ..quiet("changed", now) };
    let mut cases = vec![stale, staler, asked, changed];
    for expected in [("changed", Job::Answer), ("asked", Job::Look), ("staler", Job::Look), ("stale", Job::Look)] {
        assert_eq!(next(&cases, now, REFRESH), Next::Now(expected.0, expected.1));
        cases.retain(|case| case.key != expected.0);
    }
    assert_eq!(next(&cases, now, REFRESH), Next::Never);
    assert_eq!(next(&[quiet("quiet", now)], now, REFRESH), Next::Later(now + s(300)));
}

#[test]
fn what_is_stale_for_long_goes_before_yet_another_question() {
    let (start, now) = clock();
    let stale = Case { refresh_due: start + s(9_398), ..quiet("stale", now) };
    let asked = Case { wanted_since: Some(start + s(9_999)), fresh: false, ..quiet("asked", now) };
    assert_eq!(next(&[asked, stale], now, REFRESH), Next::Now("stale", Job::Look));
}

#[test]
fn a_changed_question_on_a_fresh_pattern_is_answered_without_looking() {
    let (_, now) = clock();
    let mut case = Case { wanted_since: Some(now), ..quiet("vm", now) };
    assert_eq!(next(&[case.clone()], now, REFRESH), Next::Now("vm", Job::Answer));
    case.fresh = false;
    assert_eq!(next(&[case.clone()], now, REFRESH), Next::Now("vm", Job::Look));
    // After a failure it is answered with the failure, and looked at only when the backoff is over.
    case.look_after = Some(now + s(5));
    assert_eq!(next(&[case.clone()], now, REFRESH), Next::Now("vm", Job::Answer));
    case.wanted_since = None;
    case.refresh_due = now;
    assert_eq!(next(&[case], now, REFRESH), Next::Later(now + s(5)));
}

#[test]
fn what_cannot_be_measured_is_answered_and_never_looked_at() {
    let (start, now) = clock();
    let case = Case { measurable: false, fresh: false, refresh_due: start, wanted_since: Some(now), ..quiet("vm", now) };
    assert_eq!(next(std::slice::from_ref(&case), now, REFRESH), Next::Now("vm", Job::Answer));
    assert_eq!(next(&[Case { wanted_since: None, ..case }], now, REFRESH), Next::Never);
}

#[test]
fn a_migration_that_waits_goes_first_and_no_budget_holds_it_back() {
    let (start, now) = clock();
    let asked = Case { wanted_since: Some(start + s(9_000)), fresh: false, ..quiet("asked", now) };
    let pressing = Case { wanted_since: Some(now), pressing: true, ..Case { key: "pressing", ..asked.clone() } };
    let spent = Room { routine_from: now + s(50), ..room(now) };
    assert_eq!(super::next(&[asked.clone(), pressing], now, REFRESH, &spent), Next::Now("pressing", Job::Look));
    assert_eq!(super::next(&[asked], now, REFRESH, &spent), Next::Later(now + s(50)));
}

#[test]
fn what_nobody_has_seen_yet_waits_for_no_budget_and_not_behind_routine() {
    let (start, now) = clock();
    let spent = Room { routine_from: now + s(240), ..room(now) };
    let stale = Case { refresh_due: start + s(9_500), ..quiet("stale", now) };
    // It was not there; that has been said, and its pause is over.
    let starting =
        Case { refresh_due: start + s(9_990), look_after: Some(now), unseen: true, fresh: false, ..quiet("starting", now) };
    let failing = Case { key: "failing", unseen: false, ..starting.clone() };
    assert_eq!(super::next(&[stale.clone(), starting.clone()], now, REFRESH, &spent), Next::Now("starting", Job::Look));
    assert_eq!(next(&[stale.clone(), starting.clone()], now, REFRESH), Next::Now("starting", Job::Look));
    assert_eq!(super::next(&[stale.clone(), failing.clone()], now, REFRESH, &spent), Next::Later(now + s(240)));
    assert_eq!(next(&[stale, failing], now, REFRESH), Next::Now("stale", Job::Look));
    let pausing = Case { look_after: Some(now + s(4)), ..starting };
    assert_eq!(super::next(&[pausing], now, REFRESH, &spent), Next::Later(now + s(4)), "its pause is kept");
}

#[test]
fn a_qemu_is_spoken_to_by_one_job_and_never_measured_while_it_migrates() {
    let (start, now) = clock();
    let due = Case { refresh_due: start, dry_run_wanted: Some(start), write_due: Some(start), ..quiet("vm", now) };
    let jobs = |case: &Case<&'static str>| {
        let (mut case, mut seen) = (case.clone(), vec![]);
        while let Next::Now(_, job) = next(std::slice::from_ref(&case), now, REFRESH) {
            seen.push(job);
            match job {
                Job::Write => case.write_due = None,
                Job::DryRun => case.dry_run_wanted = None,
                Job::Look => case.refresh_due = now + s(300),
                Job::Along => case.migrating = Some(Moving::Read),
                Job::Answer => case.wanted_since = None,
                Job::Recall => case.recall = false,
            }
        }
        seen
    };
    assert_eq!(jobs(&due), [Job::Write, Job::DryRun, Job::Look]);
    assert_eq!(jobs(&Case { recall: true, ..due.clone() }), [Job::Write, Job::DryRun, Job::Recall, Job::Look]);
    assert_eq!(jobs(&Case { engaged: true, ..due.clone() }), [Job::Write]);
    assert_eq!(jobs(&Case { migrating: Some(Moving::Unread(start)), ..due.clone() }), [Job::Write, Job::Along]);
    // Somebody asks while it migrates: what is known is said, and nothing is measured.
    assert_eq!(
        jobs(&Case { migrating: Some(Moving::Read), wanted_since: Some(now), fresh: false, write_due: None, ..due }),
        [Job::Answer]
    );
}

#[test]
fn without_room_a_job_waits_and_others_go_on() {
    let (start, now) = clock();
    let due = Case { refresh_due: start, dry_run_wanted: Some(start), ..quiet("vm", now) };
    let full = Room { dry_run: false, ..room(now) };
    assert_eq!(super::next(std::slice::from_ref(&due), now, REFRESH, &full), Next::Now("vm", Job::Look));
    let full = Room { look: false, ..full };
    assert_eq!(super::next(&[due], now, REFRESH, &full), Next::Never);
}

proptest! {
    /// Whatever the cases look like: a job is due, allowed, and belongs to one of them; sleep never oversleeps a job.
    #[test]
    fn a_job_is_always_due_and_allowed(raw in prop::collection::vec(any::<(Option<u16>, bool, bool, u16, Option<u16>, Option<u16>)>(), 0..20)) {
        let start = Instant::now();
        let now = start + s(30_000);
        let at = |seconds: u16| start + s(seconds.into());
        let cases: Vec<_> = raw
            .iter()
            .enumerate()
            .map(|(key, &(wanted, measurable, fresh, refresh, after, write))| Case {
                key,
                wanted_since: wanted.map(|seconds| at(seconds).min(now)),
                measurable,
                fresh,
                refresh_due: at(refresh),
                look_after: after.map(at),
                write_due: write.map(at),
                ..blank(key)
            })
            .collect();
        match next(&cases, now, REFRESH) {
            Next::Now(key, Job::Look) => {
                prop_assert!(cases[key].measurable);
                prop_assert!(cases[key].look_after.is_none_or(|after| after <= now));
                prop_assert!(cases[key].refresh_due <= now || cases[key].wanted_since.is_some() && !cases[key].fresh);
            }
            Next::Now(key, Job::Answer) => prop_assert!(cases[key].wanted_since.is_some()),
            Next::Now(key, Job::Write) => prop_assert!(cases[key].write_due.is_some_and(|due| due <= now)),
            Next::Later(until) => {
                prop_assert!(until > now);
                prop_assert!(!matches!(next(&cases, until, REFRESH), Next::Later(_) | Next::Never));
            }
            Next::Now(_, Job::Recall | Job::Along | Job::DryRun) => prop_assert!(false, "nobody asked for it"),
            Next::Never => prop_assert!(cases.iter().all(|case| !case.measurable)),
        }
    }

    /// Hours in the life of a node: some VMs always fail, questions keep changing, new ones keep coming. No healthy VM
    /// waits for longer than the whole queue takes, on top of its refresh and of the head starts that others have.
    #[test]
    fn nobody_starves(
        vms in 1_usize..40,
        failing in 0_usize..10,
        look in 1_u64..20,
        changes in prop::collection::vec((0_usize..50, 1_u64..600), 0..100),
    ) {
        let start = Instant::now();
        let all = vms + failing;
        let mut now = start;
        let mut cases: Vec<_> = (0..all)
            .map(|key| Case { wanted_since: Some(start), refresh_due: start, ..blank(key) })
            .collect();
        let mut failures = vec![0_u32; all];
        let mut looked = vec![start; all];
        let mut changes = changes.into_iter();
        let mut change_at = start;
        let queue = s(look * all as u64);
        while now < start + s(4 * 3600) {
            while change_at <= now {
                let Some((key, pause)) = changes.next() else { break };
                if let Some(case) = cases.get_mut(key) {
                    case.wanted_since = Some(now);
                }
                change_at = now + s(pause);
            }
            match next(&cases, now, REFRESH) {
                Next::Now(key, Job::Look) => {
                    let ends = now + s(look);
                    let healthy = key < vms;
                    let case = &mut cases[key];
                    prop_assert!(case.look_after.is_none_or(|after| after <= now), "backoff is kept");
                    case.fresh = healthy;
                    case.wanted_since = Some(ends);
                    if healthy {
                        let waited = now - looked[key];
                        prop_assert!(waited <= REFRESH * 3 + queue * 2, "waited {waited:?}");
                        looked[key] = now;
                        case.refresh_due = ends + REFRESH;
                    } else {
                        failures[key] += 1;
                        case.look_after = Some(ends + s(2 << failures[key].min(7)));
                    }
                    now = ends;
                }
                Next::Now(key, Job::Answer) => {
                    cases[key].wanted_since = None;
                    now += Duration::from_millis(200);
                }
                Next::Now(_, Job::Recall | Job::Write | Job::Along | Job::DryRun) => unreachable!("nobody asked for it"),
                Next::Later(until) => now = until.min(change_at.max(now + s(1))),
                Next::Never => break,
            }
        }
    }
}
