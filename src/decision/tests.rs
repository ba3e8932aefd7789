//! Tables and properties of the decision.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::SignedDuration};
use proptest::prelude::*;

use super::*;
use crate::{
    api::{
        MigrationForecastStatus, MigrationOverrideSpec, PredictionPolicySpec, convert,
        dry_run::DryRun,
        forecast::{BandwidthSource, Sla},
        policy::DryRunPolicy,
        scalar,
    },
    model::forecast::{Bounds, Method},
};

#[path = "trial_tests.rs"]
mod trials;

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

fn policy(mode: Mode) -> PredictionPolicy {
    PredictionPolicy::new("strict", PredictionPolicySpec { mode, ..PredictionPolicySpec::default() })
}

/// Never freed: tests are short.
fn leaked(mode: Mode) -> &'static PredictionPolicy {
    Box::leak(Box::new(policy(mode)))
}

fn input<'a>(forecast: &'a MigrationForecast, present: &'a MigrationForecastSpec, mode: Mode) -> Input<'a> {
    Input {
        vm: "default/wild",
        forecast: Some(forecast),
        present: Some(present),
        leaves_cluster: false,
        now: now(),
        policy: Some(leaked(mode)),
        origin: Origin::Person,
        overridden: None,
        room: Room::Free,
        stage: Stage::Request,
    }
}

fn lasting(reason: &str) -> MigrationOverride {
    let spec =
        MigrationOverrideSpec { vmi_name: "wild".into(), reason: reason.into(), expires_after: Duration::from_secs(3600).into() };
    MigrationOverride::new("by-hand", spec)
}

/// The document's table, row by row, is what the code does.
#[test]
fn the_documents_table() {
    use Action::{Allow, AllowWithWarning as Warns, Deny, Hold};
    let document = include_str!("../../docs/architecture.md");
    let rows: Vec<Vec<&str>> = document
        .lines()
        .skip_while(|line| !line.starts_with("| mode | verdict | a person |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), 7, "the table of docs/architecture.md is not where it was: {rows:?}");
    let action = |words: &str| match words {
        "allow" => Allow,
        "warn" => Warns,
        "**deny**" => Deny,
        other => unreachable!("{other}"),
    };
    let mut cells = 0;
    for row in &rows {
        let [mode, verdicts, person, warn, hold, deny] = row[..] else { unreachable!("{row:?}") };
        let modes = match mode {
            "`Audit`" => Mode::Audit,
            "`Warn`" => Mode::Warn,
            "`Enforce`" => Mode::Enforce,
            other => unreachable!("{other}"),
        };
        let cases: &[(Verdict, f64)] = match verdicts {
            "any" => &[(Verdict::Converges, 1.0), (Verdict::Borderline, 0.5), (Verdict::Fails, 0.0), (Verdict::Unknown, 0.0)],
            "`Converges`, `Unknown`" => &[(Verdict::Converges, 1.0), (Verdict::Unknown, 0.0)],
            "`Borderline`, `Fails`" => &[(Verdict::Borderline, 0.5), (Verdict::Fails, 0.1), (Verdict::Fails, 0.0)],
            "`Borderline`" => &[(Verdict::Borderline, 0.11), (Verdict::Borderline, 0.89)],
            "`Fails`, p > 0.02" => &[(Verdict::Fails, 0.021), (Verdict::Fails, 0.1)],
            "`Fails`, p ≤ 0.02" => &[(Verdict::Fails, 0.02), (Verdict::Fails, 0.0)],
            other => unreachable!("{other}"),
        };
        let kubevirts = [Origin::Evacuation, Origin::Descheduler, Origin::WorkloadUpdate];
        let columns = [
            (person, &[Origin::Person][..], Evacuations::Warn),
            (warn, &kubevirts[..], Evacuations::Warn),
            (hold, &kubevirts[..], Evacuations::Hold),
            (deny, &kubevirts[..], Evacuations::Deny),
        ];
        for ((cell, origins, evacuations), &(verdict, p)) in
            columns.into_iter().flat_map(|column| cases.iter().map(move |case| (column, case)))
        {
            let (first, second) = cell.split_once(", else ").map_or((None, cell), |(hold, other)| (Some(hold), other));
            for &origin in origins {
                for (dry_run, room) in [
                    (DryRunMode::Never, Room::Free),
                    (DryRunMode::OnDemand, Room::Free),
                    (DryRunMode::OnDoubt, Room::Free),
                    (DryRunMode::OnDemand, Room::OutOfTime),
                    (DryRunMode::OnDemand, Room::Full),
                    (DryRunMode::OnDemand, Room::NoManager),
                ] {
                    let can_hold = dry_run != DryRunMode::Never && room == Room::Free;
                    let expected = match first {
                        Some("hold") if can_hold => Hold,
                        Some("hold") | None => action(second),
                        Some(other) => unreachable!("{other}"),
                    };
                    let mut policy = policy(modes);
                    policy.spec.evacuations = evacuations;
                    policy.spec.dry_run = Some(DryRunPolicy { mode: dry_run, ..DryRunPolicy::default() });
                    let (object, present) = (object(spec(), &model(verdict, p), MINUTE), spec());
                    let input = Input { origin, room, policy: Some(&policy), ..input(&object, &present, modes) };
                    assert_eq!(
                        decide(&input).action,
                        expected,
                        "{mode} {verdict:?} {p} {origin:?} {evacuations:?} {dry_run:?} {room:?}"
                    );
                    cells += 1;
                }
            }
        }
    }
    assert_eq!(cells, 17 * 6 * 10, "every case of every column");
}

#[test]
fn an_override_lets_through_and_says_so() {
    let (object, present) = (object(spec(), &model(Verdict::Fails, 0.0), MINUTE), spec());
    let by = lasting("the rack\nis on fire");
    let decision = decide(&Input { overridden: Some(&by), ..input(&object, &present, Mode::Enforce) });
    assert_eq!(decision.action, Action::AllowWithWarning);
    assert!(
        decision.message.contains("The MigrationOverride by-hand lets it through (the rack is on fire)."),
        "{}",
        decision.message
    );
    let audited = decide(&Input { overridden: Some(&by), ..input(&object, &present, Mode::Audit) });
    assert_eq!(audited.action, Action::Allow);
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
         less; let it through all the same: echo '{\"apiVersion\":\"migvisor.io/v1alpha1\",\"kind\":\"MigrationOverride\",\"metadata\":{\"generateName\":\"wild-\"},\"spec\":{\"vmiName\":\"wild\",\"reason\":\"WHY\"}}' \
         | kubectl create -n default -f -."
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
    prop::sample::select(vec![Origin::Person, Origin::Evacuation, Origin::Descheduler, Origin::WorkloadUpdate])
}

fn rooms() -> impl Strategy<Value = Room> {
    prop::sample::select(vec![Room::Free, Room::Full, Room::NoManager, Room::OutOfTime])
}

fn policies() -> impl Strategy<Value = PredictionPolicy> {
    let dry_runs = prop::sample::select(vec![DryRunMode::Never, DryRunMode::OnDemand, DryRunMode::OnDoubt]);
    let evacuations = prop::sample::select(vec![Evacuations::Warn, Evacuations::Hold, Evacuations::Deny]);
    (modes(), dry_runs, evacuations).prop_map(|(mode, dry_run, evacuations)| {
        let mut policy = policy(mode);
        policy.spec.dry_run = Some(DryRunPolicy { mode: dry_run, ..DryRunPolicy::default() });
        policy.spec.evacuations = evacuations;
        policy
    })
}

proptest! {
    #[test]
    fn it_keeps_its_promises(
        (verdict, p) in verdicts(), policy in policies(), origin in origins(), age in -100_000..100_000_i64, generation in 3..6_i64, answers: bool, asks: bool,
        moved in prop::bool::weighted(0.1), leaves_cluster in prop::bool::weighted(0.1), lcb in prop::option::of(0..u64::MAX), sla_exceeded: bool,
        (total_ms, budget, overridden, room, admitted) in (prop::num::f64::ANY, any::<bool>(), any::<bool>(), rooms(), any::<bool>()),
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
        let by = lasting("why not");
        let stage = if admitted { Stage::Admitted } else { Stage::Request };
        let input = Input {
            leaves_cluster, origin, room, stage, policy: Some(&policy), overridden: overridden.then_some(&by), ..input(&object, &present, Mode::Audit)
        };
        let decision = decide(&input);

        prop_assert_eq!(&decision, &decide(&input), "the same input, the same answer");
        let counts = age.abs() < 1200 && answers && !moved && !leaves_cluster && verdict != Verdict::Unknown;
        if !counts {
            prop_assert_eq!((decision.action, decision.verdict), (Action::Allow, Verdict::Unknown), "what is not known passes in silence");
        }
        let strictest = match policy.spec.mode { Mode::Audit => Action::Allow, Mode::Warn => Action::AllowWithWarning, Mode::Enforce => Action::Deny };
        prop_assert!(decision.action <= strictest, "never stricter than the policy");
        let evacuations = policy.spec.evacuations;
        if decision.action == Action::Deny {
            prop_assert!(decision.verdict == Verdict::Fails && p <= 0.1 + 1e-4);
            prop_assert!(origin == Origin::Person || evacuations == Evacuations::Deny, "a drain is denied only where the policy says so");
        }
        if decision.action == Action::Hold {
            prop_assert!(room == Room::Free && policy.spec.dry_run.unwrap().mode != DryRunMode::Never);
            prop_assert!(origin == Origin::Person || evacuations != Evacuations::Warn, "a drain is held only where the policy says so");
        }
        if overridden {
            prop_assert!(decision.action <= Action::AllowWithWarning, "an override is never ignored");
        }
        if decision.verdict == Verdict::Converges {
            prop_assert_eq!(decision.action, Action::Allow);
        }
        prop_assert!(!decision.message.contains('\n') && decision.message.len() < 1800 && decision.message.starts_with("migvisor "));
    }

    /// A stricter mode never does less.
    #[test]
    fn modes_are_monotone((verdict, p) in verdicts(), origin in origins(), policy in policies(), room in rooms()) {
        let (object, present) = (object(spec(), &model(verdict, p), MINUTE), spec());
        let actions: Vec<_> = [Mode::Audit, Mode::Warn, Mode::Enforce]
            .map(|mode| {
                let mut policy = policy.clone();
                policy.spec.mode = mode;
                decide(&Input { origin, room, policy: Some(&policy), ..input(&object, &present, mode) }).action
            })
            .into();
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
