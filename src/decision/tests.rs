//! Tables and properties of the decision.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::SignedDuration};
use proptest::prelude::*;

use super::*;
use crate::{
    api::{
        MigrationForecastStatus, convert,
        dry_run::DryRun,
        forecast::{BandwidthSource, Sla},
        scalar,
    },
    model::forecast::{Bounds, Method},
};

const MINUTE: i64 = 60;

fn now() -> Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

fn spec() -> MigrationForecastSpec {
    MigrationForecastSpec {
        node_name: "node-1".into(),
        pod_uid: "pod-1".into(),
        guest_memory: scalar::Quantity("1Gi".into()),
        bandwidth: scalar::Quantity("100Mi".into()),
        bandwidth_source: BandwidthSource::MigrationConfiguration,
        downtime_limit: Duration::from_millis(300).into(),
        time_budget: Some(Duration::from_secs(300).into()),
        sla: None,
        cost_weights: None,
        host: None,
        policy: None,
        when_budget_ends: BudgetEnd::Abort,
        auto_converge: false,
        paused: false,
        outside_model: None,
        dry_run: None,
        remedies: Vec::new(),
    }
}

fn model(verdict: Verdict, probability: f64) -> Forecast {
    let fails = verdict == Verdict::Fails;
    Forecast {
        verdict,
        sla_exceeded: false,
        low_confidence: false,
        probability,
        method: Method::PatternCollector,
        iterations: 9,
        convergence_ms: 3_500.0,
        downtime_ms: (!fails).then_some(212.0),
        total_ms: if fails { 300_000.0 } else { 3_712.0 },
        dirtied_pages: 90_000,
        transferred_bytes: 29 << 30,
        least_convergent_bandwidth: Some((180 << 20) - 5),
        cost: None,
        bounds: Bounds::default(),
        pattern: None,
        profile: Vec::new(),
        baselines: Vec::new(),
    }
}

fn object(spec: MigrationForecastSpec, forecast: &Forecast, age_seconds: i64) -> MigrationForecast {
    let measured = now() - SignedDuration::from_secs(age_seconds);
    let question = spec.question().unwrap();
    let mut object = MigrationForecast::new("wild", spec);
    object.metadata.generation = Some(4);
    object.status = Some(MigrationForecastStatus::from_forecast(forecast, &question, &object.question(), measured));
    object
}

fn input<'a>(forecast: &'a MigrationForecast, present: &'a MigrationForecastSpec, mode: Mode) -> Input<'a> {
    Input {
        vm: "default/wild",
        forecast: Some(forecast),
        present: Some(present),
        leaves_cluster: false,
        now: now(),
        mode,
        policy: Some("strict"),
        origin: Origin::Person,
    }
}

#[test]
fn the_table() {
    use Action::{Allow, AllowWithWarning as Warns, Deny};
    for (verdict, p, audit, warn, enforce) in [
        (Verdict::Converges, 1.0, Allow, Allow, Allow),
        (Verdict::Borderline, 0.5, Allow, Warns, Warns),
        (Verdict::Fails, 0.1, Allow, Warns, Deny),
        (Verdict::Fails, 0.0, Allow, Warns, Deny),
    ] {
        let object = object(spec(), &model(verdict, p), MINUTE);
        for (mode, expected) in [(Mode::Audit, audit), (Mode::Warn, warn), (Mode::Enforce, enforce)] {
            let present = spec();
            let decision = decide(&input(&object, &present, mode));
            assert_eq!((decision.action, decision.verdict), (expected, verdict), "{verdict:?} {mode:?}");
        }
    }
}

#[test]
fn drains_and_updates_are_only_warned() {
    let (object, present) = (object(spec(), &model(Verdict::Fails, 0.0), MINUTE), spec());
    for origin in [Origin::Evacuation, Origin::WorkloadUpdate] {
        let decision = decide(&Input { origin, ..input(&object, &present, Mode::Enforce) });
        assert_eq!(decision.action, Action::AllowWithWarning);
        assert!(!decision.message.contains("patch predictionpolicy"), "nothing was denied: {}", decision.message);
    }
    for (key, origin) in
        [(kubevirt::EVACUATION, Origin::Evacuation), (kubevirt::WORKLOAD_UPDATE, Origin::WorkloadUpdate), ("x", Origin::Person)]
    {
        assert_eq!(Origin::of(&[(key.to_owned(), String::new())].into()), origin);
    }
}

#[test]
fn what_kubevirt_would_force_through_is_only_warned() {
    for (end, auto) in [(BudgetEnd::PostCopy, false), (BudgetEnd::Pause, false), (BudgetEnd::Abort, true)] {
        let present = MigrationForecastSpec { when_budget_ends: end, auto_converge: auto, ..spec() };
        let object = object(present.clone(), &model(Verdict::Fails, 0.0), MINUTE);
        assert_eq!(decide(&input(&object, &present, Mode::Enforce)).action, Action::AllowWithWarning);
    }
}

#[test]
fn an_answer_that_does_not_count_is_unknown() {
    let failing = model(Verdict::Fails, 0.0);
    let good = object(spec(), &failing, MINUTE);
    let present = spec();
    let moved = MigrationForecastSpec { node_name: "node-2".into(), ..spec() };
    let restarted = MigrationForecastSpec { pod_uid: "pod-2".into(), ..spec() };
    let wider = MigrationForecastSpec { bandwidth: scalar::Quantity("1Gi".into()), ..spec() };
    let block = MigrationForecastSpec { outside_model: Some("block migration".into()), ..spec() };
    let stale = object(spec(), &failing, 20 * MINUTE);
    let future = object(spec(), &failing, -20 * MINUTE);
    let mut older = good.clone();
    older.status.as_mut().unwrap().question = Some(moved.fingerprint());
    let mut nameless = good.clone();
    nameless.status.as_mut().unwrap().question = None;
    let mut silent = good.clone();
    silent.status = None;
    let mut incomplete = good.clone();
    incomplete.status.as_mut().unwrap().iterations = None;
    let mut absurd = good.clone();
    absurd.status.as_mut().unwrap().probability = Some(0.99);
    let mut unmeasured = good.clone();
    unmeasured.status =
        Some(MigrationForecastStatus::unknown(reason::NOT_MEASURED, "no QEMU found", &good.question(), Some(now())));
    let mut undated = good.clone();
    undated.status.as_mut().unwrap().measured_at = None;

    let with = |forecast, present| Input { forecast: Some(forecast), ..input(&good, present, Mode::Enforce) };
    for (case, why) in [
        (with(&good, &moved), reason::OUTDATED),
        (with(&good, &restarted), reason::OUTDATED),
        (with(&good, &wider), reason::OUTDATED),
        (with(&good, &block), reason::OUTSIDE_MODEL),
        (with(&stale, &present), reason::STALE),
        (with(&future, &present), reason::STALE),
        (with(&older, &present), reason::OUTDATED),
        (with(&nameless, &present), reason::OUTDATED),
        (with(&silent, &present), reason::NO_ANSWER),
        (with(&incomplete, &present), reason::NOT_MEASURED),
        (with(&absurd, &present), reason::NOT_MEASURED),
        (with(&unmeasured, &present), reason::NOT_MEASURED),
        (with(&undated, &present), reason::STALE),
        (Input { forecast: None, ..with(&good, &present) }, reason::NO_ANSWER),
        (Input { present: None, ..with(&good, &present) }, reason::NO_ANSWER),
        (Input { leaves_cluster: true, ..with(&good, &present) }, reason::OUTSIDE_MODEL),
    ] {
        let decision = decide(&case);
        assert_eq!(
            (decision.action, decision.verdict, decision.reason),
            (Action::Allow, Verdict::Unknown, why),
            "{}",
            decision.message
        );
    }
    assert_eq!(decide(&with(&object(spec(), &failing, 20 * MINUTE - 1), &present)).action, Action::Deny, "just fresh");
}

#[test]
fn asking_for_a_dry_run_never_outdates_an_answer() {
    let (mut object, present) = (object(spec(), &model(Verdict::Fails, 0.0), MINUTE), spec());
    let before = decide(&input(&object, &present, Mode::Enforce));
    assert_eq!(before.action, Action::Deny);
    // Asked, in the instant before the agent has seen it; while it runs; withdrawn.
    for (generation, id) in [(5, Some("by-hand")), (6, Some("another")), (7, None)] {
        object.metadata.generation = Some(generation);
        object.spec.dry_run = id.map(|id| DryRun { id: id.into(), ..DryRun::default() });
        assert_eq!(decide(&input(&object, &present, Mode::Enforce)), before, "{id:?}");
    }
    // A change to and fro: what was answered for this question is its answer, whatever is written at the moment.
    object.spec.bandwidth = scalar::Quantity("1Gi".into());
    assert_eq!(decide(&input(&object, &present, Mode::Enforce)), before);
}

#[test]
fn a_dry_run_is_named_where_it_speaks() {
    for (verdict, p, says) in [
        (Verdict::Fails, 0.0, "forecasts after a dry run that the live migration of default/wild would fail: at"),
        (
            Verdict::Borderline,
            1.0,
            "forecasts after a dry run that the live migration of default/wild may not converge: at 100 MiB/s it took 3.7 s",
        ),
        (Verdict::Converges, 1.0, "forecasts after a dry run that the live migration of default/wild at 100 MiB/s would take"),
    ] {
        let tried = Forecast { method: Method::DryRun, ..model(verdict, p) };
        let (object, present) = (object(spec(), &tried, MINUTE), spec());
        let decision = decide(&input(&object, &present, Mode::Enforce));
        assert!(decision.message.contains(says), "{}", decision.message);
    }
}

#[test]
fn more_time_is_advised_only_where_it_would_help() {
    let says = |iterations| {
        let failing = Forecast { iterations, ..model(Verdict::Fails, 0.0) };
        let (object, present) = (object(spec(), &failing, MINUTE), spec());
        decide(&input(&object, &present, Mode::Enforce)).message.contains("completionTimeoutPerGiB")
    };
    assert!(says(1), "a guest that is too large for its budget");
    assert!(!says(15), "a guest that dirties faster than the bandwidth carries");
}

#[test]
fn a_denial_says_what_would_happen_what_it_needs_and_the_ways_out() {
    let (object, present) = (object(spec(), &model(Verdict::Fails, 0.0), MINUTE), spec());
    assert_eq!(
        decide(&input(&object, &present, Mode::Enforce)).message,
        "migvisor forecasts that the live migration of default/wild would fail: at 100 MiB/s it would still be copying when its time budget of \
         5 min is over, having sent 29.0 GiB for 1.0 GiB of memory, because the guest dirties memory faster than that carries it. KubeVirt would \
         then abort it. It needs at least 180 MiB/s. Ways out: raise bandwidthPerMigration to at least 180Mi; allow post-copy or the throttling of the guest (allowPostCopy, allowAutoConverge); migrate when the guest writes \
         less; let it through all the same: kubectl patch predictionpolicy strict --type=merge -p '{\"spec\":{\"mode\":\"Warn\"}}', or delete the \
         policy."
    );
}

#[test]
fn a_broken_sla_names_its_limits() {
    let present = MigrationForecastSpec {
        sla: Some(Sla { downtime: Some(Duration::from_millis(100).into()), total_time: None }),
        ..spec()
    };
    let object = object(present.clone(), &Forecast { sla_exceeded: true, ..model(Verdict::Borderline, 1.0) }, MINUTE);
    let decision = decide(&input(&object, &present, Mode::Enforce));
    assert_eq!((decision.action, decision.reason), (Action::AllowWithWarning, reason::SLA_EXCEEDED));
    assert!(decision.message.contains("stopped for 212 ms; wanted is a downtime of at most 100 ms"), "{}", decision.message);
}

fn verdicts() -> impl Strategy<Value = (Verdict, f64)> {
    (prop::sample::select(vec![Verdict::Converges, Verdict::Borderline, Verdict::Fails, Verdict::Unknown]), 0.0..=1.0)
}

fn modes() -> impl Strategy<Value = Mode> {
    prop::sample::select(vec![Mode::Audit, Mode::Warn, Mode::Enforce])
}

fn origins() -> impl Strategy<Value = Origin> {
    prop::sample::select(vec![Origin::Person, Origin::Evacuation, Origin::WorkloadUpdate])
}

proptest! {
    #[test]
    fn it_keeps_its_promises(
        (verdict, p) in verdicts(), mode in modes(), origin in origins(), age in -100_000..100_000_i64, generation in 3..6_i64, answers: bool, asks: bool,
        moved in prop::bool::weighted(0.1), leaves_cluster in prop::bool::weighted(0.1), lcb in prop::option::of(0..u64::MAX), sla_exceeded: bool,
        total_ms in prop::num::f64::ANY, budget: bool,
    ) {
        let spec = MigrationForecastSpec { time_budget: spec().time_budget.filter(|_| budget), ..spec() };
        let forecast = Forecast { least_convergent_bandwidth: lcb, sla_exceeded, total_ms, ..model(verdict, p) };
        let mut object = object(spec.clone(), &forecast, age);
        object.metadata.generation = Some(generation);
        object.spec.dry_run = asks.then(DryRun::default);
        if !answers {
            object.status.as_mut().unwrap().question = Some("0123456789abcdef".to_owned());
        }
        let present = if moved { MigrationForecastSpec { node_name: "elsewhere".into(), ..spec } } else { spec };
        let input = Input { leaves_cluster, origin, ..input(&object, &present, mode) };
        let decision = decide(&input);

        prop_assert_eq!(&decision, &decide(&input), "the same input, the same answer");
        let counts = age.abs() < 1200 && answers && !moved && !leaves_cluster && verdict != Verdict::Unknown;
        if !counts {
            prop_assert_eq!((decision.action, decision.verdict), (Action::Allow, Verdict::Unknown), "what is not known passes in silence");
        }
        let strictest = match mode { Mode::Audit => Action::Allow, Mode::Warn => Action::AllowWithWarning, Mode::Enforce => Action::Deny };
        prop_assert!(decision.action <= strictest, "never stricter than the mode");
        if decision.action == Action::Deny {
            prop_assert!(origin == Origin::Person && decision.verdict == Verdict::Fails && p <= 0.1 + 1e-4);
        }
        if decision.verdict == Verdict::Converges {
            prop_assert_eq!(decision.action, Action::Allow);
        }
        prop_assert!(!decision.message.contains('\n') && decision.message.len() < 1500 && decision.message.starts_with("migvisor "));
    }

    /// A stricter mode never does less.
    #[test]
    fn modes_are_monotone((verdict, p) in verdicts(), origin in origins()) {
        let (object, present) = (object(spec(), &model(verdict, p), MINUTE), spec());
        let actions: Vec<_> = [Mode::Audit, Mode::Warn, Mode::Enforce]
            .map(|mode| decide(&Input { origin, ..input(&object, &present, mode) }).action).into();
        prop_assert!(actions.is_sorted());
    }
}

#[test]
fn the_annotations_of_an_answer_and_its_decision_agree() {
    let (object, present) = (object(spec(), &model(Verdict::Fails, 0.0), MINUTE), spec());
    let decision = decide(&input(&object, &present, Mode::Enforce));
    let annotations = convert::annotations(object.status.as_ref().unwrap());
    assert_eq!(annotations[crate::api::names::annotation::REASON], decision.reason);
}

#[test]
fn times_are_kept() {
    assert!(is_fresh(Some(&Time(now())), now()));
}
