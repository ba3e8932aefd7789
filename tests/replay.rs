//! The replay, fed with the true process, against real migrations between two QEMUs and against an independent
//! implementation of the same loop.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Case, cases, median};
use migvisor::model::replay::{Outcome, replay};
use serde::Deserialize;

const SEEDS: u32 = 100;

/// One replay for each seed: a random writer draws, a sweep starts at another phase.
fn runs(case: &Case, phases: u32) -> Vec<Outcome> {
    let (host, _) = cases();
    let settings = case.settings(host);
    let truth = case.truth(0.0);
    let distinct = if case.pattern == "sequential" { phases } else { SEEDS };
    (0..distinct)
        .map(|seed| {
            let phase = f64::from(seed) / f64::from(phases) * truth.cycle_ms();
            replay(&truth, truth.realise(phase, u64::from(seed)), &settings)
        })
        .collect()
}

/// Relative difference of the medians.
fn off(runs: &[Outcome], figure: fn(&Outcome) -> f64, real: &[f64]) -> f64 {
    median(&runs.iter().map(figure).collect::<Vec<_>>()) / median(real) - 1.0
}

fn meets_reality(case: &Case) {
    // The outcome of this one depends on its phase more than on anything else: look at many.
    let phase_decides = case.pattern == "sequential" && case.bandwidth_mib == Some(60);
    let runs = runs(case, if phase_decides { SEEDS } else { 5 });
    assert!(runs.iter().all(|run| run.converged), "{case:?}: a real success is replayed as a failure");
    let (total, pages) = (off(&runs, |r| r.total_ms, &case.real_total_ms), off(&runs, |r| r.pages, &case.real_pages));
    let label = format!("{} at {:?} MiB/s, {} ms", case.name, case.bandwidth_mib.or(case.link_mib), case.downtime_limit_ms);
    println!("{label}: total {:+.2} %, pages {:+.2} %", total * 100.0, pages * 100.0);
    if phase_decides {
        for real in &case.real_total_ms {
            let nearest = runs.iter().map(|r| (r.total_ms / real - 1.0).abs()).fold(f64::INFINITY, f64::min);
            assert!(nearest < 0.02, "{label}: no phase comes within 2 % of the real {real} ms");
        }
        return;
    }
    // Zero pages went at half the speed in this one; why is open. Its pages are right, its time is not.
    let limit = if case.link_mib.is_some() { 0.05 } else { 0.01 };
    assert!(pages.abs() < limit, "{label}: pages are off by {:+.2} %", pages * 100.0);
    if case.note.is_none() {
        assert!(total.abs() < limit, "{label}: total time is off by {:+.2} %", total * 100.0);
    }
}

#[test]
fn small_guests_meet_real_migrations() {
    cases().1.iter().filter(|case| case.memory_mib <= 512).for_each(meets_reality);
}

#[test]
fn large_guests_meet_real_migrations() {
    cases().1.iter().filter(|case| case.memory_mib > 512).for_each(meets_reality);
}

#[derive(Deserialize)]
struct Oracle {
    runs: Vec<OracleRun>,
}

#[derive(Deserialize)]
struct OracleRun {
    name: String,
    pages: u64,
    memory_mib: u64,
    writes_per_ms: f64,
    bandwidth_mib: Option<u64>,
    link_mib: Option<u64>,
    downtime_limit_ms: f64,
    phase: f64,
    converged: bool,
    total_ms: f64,
    downtime_ms: Option<f64>,
    syncs: u64,
    sent: f64,
    zero: f64,
}

/// Without randomness two implementations have to agree to the page and to the millisecond.
#[test]
fn the_oracle_agrees_where_nothing_is_random() {
    let oracle: Oracle = serde_json::from_str(include_str!("data/oracle-sequential.json")).unwrap();
    let (host, _) = cases();
    assert!(oracle.runs.len() > 20 && oracle.runs.iter().any(|run| !run.converged), "the file has lost its cases");
    for run in oracle.runs {
        let case = Case {
            name: run.name,
            pattern: if run.writes_per_ms > 0.0 { "sequential" } else { "idle" }.into(),
            memory_mib: run.memory_mib,
            pages: run.pages,
            writes_per_ms: run.writes_per_ms,
            hot_pages: 0,
            hot_share: 0.0,
            bandwidth_mib: run.bandwidth_mib,
            link_mib: run.link_mib,
            downtime_limit_ms: run.downtime_limit_ms,
            real_total_ms: vec![],
            real_pages: vec![],
            real_syncs: vec![],
            real_downtime_ms: vec![],
            note: None,
        };
        let truth = case.truth(run.phase);
        let ours = replay(&truth, truth.realise(0.0, 0), &case.settings(host));
        let label = format!("{} at {:?}, phase {}: {ours:?}", case.name, case.bandwidth_mib.or(case.link_mib), run.phase);
        assert_eq!((ours.converged, ours.syncs), (run.converged, run.syncs), "{label}");
        // A write that falls on the instant of a sync may go to either side of it.
        assert!((ours.pages - run.sent).abs() <= 2.0 * run.syncs as f64, "{label}: the oracle sent {} pages", run.sent);
        assert!((ours.zero_pages - run.zero).abs() < 0.5, "{label}: the oracle sent {} zero pages", run.zero);
        if run.converged {
            assert!((ours.total_ms - run.total_ms).abs() < 1.0, "{label}: the oracle took {} ms", run.total_ms);
            assert!((ours.downtime_ms - run.downtime_ms.unwrap()).abs() < 1.0, "{label}");
        }
    }
}
