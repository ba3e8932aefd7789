//! Tables of what is written about a VM, its migrations' outcomes, and what is told.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::{decision::Action, model::forecast::Method};

fn now() -> Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

fn forecast(status: &Value) -> MigrationForecast {
    serde_json::from_value(json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": "vm1", "namespace": "shop", "generation": 2 },
        "spec": {
            "nodeName": "node-1", "podUID": "pod-1", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "MigrationConfiguration",
            "downtimeLimit": "300ms", "timeBudget": "300s"
        },
        "status": status
    }))
    .unwrap()
}

fn answer() -> Value {
    json!({
        "observedGeneration": 2, "measuredAt": "2026-11-22T11:50:00Z", "verdict": "Converges", "reason": "WithinBudget", "probability": 1.0,
        "method": "PC", "iterations": 5, "convergenceTime": "3.5s", "downtime": "220ms", "totalTime": "3.72s", "dirtiedPages": 90_000,
        "transferredBytes": 370_000_000
    })
}

fn migration(changes: &Value) -> Arc<VirtualMachineInstanceMigration> {
    let mut object = json!({
        "metadata": { "name": "m1", "namespace": "shop", "uid": "uid-m1", "creationTimestamp": "2026-11-22T11:54:00Z" },
        "spec": { "vmiName": "vm1" },
        "status": {
            "phase": "Succeeded",
            "migrationState": {
                "migrationUid": "uid-m1", "startTimestamp": "2026-11-22T11:55:00Z", "endTimestamp": "2026-11-22T11:55:04Z", "completed": true
            }
        }
    });
    json_patch::merge(&mut object, changes);
    Arc::new(serde_json::from_value(object).unwrap())
}

fn decision(verdict: Verdict, reason: &'static str) -> Decision {
    Decision { action: Action::Allow, verdict, reason, message: "because".into(), remedy: None }
}

#[test]
fn an_outcome_is_held_against_the_forecast_it_started_with() {
    let outcome_of = |changes: &Value| outcome(&migration(changes), None, Some(&forecast(&answer())));
    let good = outcome_of(&json!({}));
    assert_eq!(good.total_time.unwrap().human(), "4 s");
    assert_eq!((good.forecast_total_time.unwrap().human(), good.relative_error), ("3.7 s".into(), Some(-0.07)));
    assert_eq!(outcome_notice(&good).note, "Migration succeeded: forecast was Converges in 3.7 s, it took 4 s (-7.0 %).");
    assert!(!outcome_notice(&good).warning);

    let mut told = forecast(&answer()).status.unwrap().forecast().unwrap();
    told.total_ms = 8_000.0;
    let annotated =
        outcome_of(&json!({ "metadata": { "annotations": { annotation::FORECAST: serde_json::to_string(&told).unwrap() } } }));
    assert_eq!(annotated.relative_error, Some(1.0), "what was said at the start counts, not what is said now");
    let nonsense = outcome_of(&json!({ "metadata": { "annotations": { annotation::FORECAST: "{}" } } }));
    assert_eq!(nonsense.relative_error, Some(-0.07));

    let early = json!({ "status": { "migrationState": { "startTimestamp": "2026-11-22T11:40:00Z" } } });
    let unforeseen = outcome_of(&early);
    assert_eq!(
        (unforeseen.verdict, unforeseen.relative_error),
        (Some(Verdict::Unknown), None),
        "the answer is younger than the migration"
    );

    let failed = outcome_of(&json!({ "status": { "phase": "Failed" } }));
    assert_eq!(failed.relative_error, None);
    assert!(outcome_notice(&failed).warning, "it was said to converge");
    let never = outcome(&migration(&json!({ "status": { "migrationState": null } })), None, None);
    assert_eq!(outcome_notice(&never).note, "Migration succeeded: there was no forecast, it never started.");
    let backwards = outcome_of(&json!({ "status": { "migrationState": { "endTimestamp": "2026-11-22T11:54:00Z" } } }));
    assert_eq!(backwards.total_time, None, "clocks may jump");
}

/// Of `m1`, to the millisecond.
fn told_by_qemu(changes: &Value) -> MigrationForecast {
    let mut status = answer();
    status["lastMigration"] = json!({
        "migrationUID": "uid-m1", "converged": true, "totalTime": "3.1s", "downtime": "200ms", "pages": 100_000, "zeroPages": 1,
        "transferredBytes": 1, "syncs": 4
    });
    json_patch::merge(&mut status["lastMigration"], changes);
    forecast(&status)
}

#[test]
fn what_qemu_told_counts_before_kubevirts_whole_seconds() {
    let beside = |changes: &Value, truth: &Value| outcome(&migration(changes), None, Some(&told_by_qemu(truth)));
    let none = json!({});
    let good = beside(&none, &none);
    assert_eq!((good.total_time.unwrap().human(), good.relative_error), ("3.1 s".into(), Some(0.2)));
    assert_eq!((good.downtime.unwrap().human(), good.forecast_downtime.unwrap().human()), ("200 ms".into(), "220 ms".into()));
    assert_eq!((good.downtime_error, good.method), (Some(0.1), Some(Method::PatternCollector)));
    assert_eq!((good.pages, good.forecast_pages, good.pages_error), (Some(100_000), Some(90_000), Some(-0.1)));
    let back: Outcome = serde_json::from_str(&serde_json::to_string(&good).unwrap()).unwrap();
    assert_eq!(back, good, "it settles");

    // Of another migration, or one that QEMU gave up.
    for odd in [json!({ "migrationUID": "uid-m0" }), json!({ "migrationUID": null }), json!({ "converged": false })] {
        let other = beside(&none, &odd);
        assert_eq!((other.total_time.unwrap().human(), other.relative_error), ("4 s".into(), Some(-0.07)), "{odd}");
        assert_eq!((other.downtime, other.pages, other.pages_error), (None, None, None), "{odd}");
    }
}

#[test]
fn a_migration_that_was_not_the_one_foretold_is_no_error_of_the_forecast() {
    for state in [json!({ "migrationPolicyName": "migvisor-uid-m1" }), json!({ "mode": "PostCopy" }), json!({ "mode": "Paused" })]
    {
        let forced = json!({ "status": { "migrationState": state } });
        let outcome = outcome(&migration(&forced), None, Some(&told_by_qemu(&json!({}))));
        assert!(outcome.total_time.is_some() && outcome.forecast_total_time.is_some(), "{state}");
        assert_eq!((outcome.relative_error, outcome.downtime_error, outcome.pages_error), (None, None, None), "{state}");
    }
    let throttled = outcome(&migration(&json!({})), None, Some(&told_by_qemu(&json!({ "throttlePercent": 20 }))));
    assert!(throttled.total_time.is_some() && throttled.pages.is_some());
    assert_eq!((throttled.relative_error, throttled.downtime_error, throttled.pages_error), (None, None, None));
    let theirs = json!({ "status": { "migrationState": { "migrationPolicyName": "gold", "mode": "PreCopy" } } });
    assert!(outcome(&migration(&theirs), None, Some(&told_by_qemu(&json!({})))).relative_error.is_some());
}

#[test]
fn the_vms_own_state_serves_where_the_migration_has_none_yet() {
    let vmi = |uid: &str| -> VirtualMachineInstance {
        let state =
            json!({ "migrationUid": uid, "startTimestamp": "2026-11-22T11:55:00Z", "endTimestamp": "2026-11-22T11:55:10Z" });
        serde_json::from_value(json!({ "status": { "migrationState": state } })).unwrap()
    };
    let bare = migration(&json!({ "status": { "migrationState": null } }));
    assert_eq!(outcome(&bare, Some(&vmi("uid-m1")), None).total_time.unwrap().human(), "10 s");
    assert_eq!(outcome(&bare, Some(&vmi("another")), None).total_time, None);
}

#[test]
fn only_the_last_ended_migration_is_recorded_and_once() {
    let running = migration(&json!({ "metadata": { "name": "m3", "uid": "u3" }, "status": { "phase": "Running" } }));
    let second = migration(&json!({
        "metadata": { "name": "m2", "uid": "u2" }, "status": { "migrationState": { "migrationUid": "u2", "endTimestamp": "2026-11-22T11:58:00Z" } }
    }));
    let received = migration(&json!({
        "metadata": { "uid": "u9" }, "spec": { "receive": { "migrationID": "x" } },
        "status": { "migrationState": { "endTimestamp": "2026-11-22T11:59:00Z" } }
    }));
    let all = [migration(&json!({})), second, running, received];
    let fresh = forecast(&answer());
    assert_eq!(unrecorded(&all, None, &fresh).unwrap().name_any(), "m2");

    let mut recorded = answer();
    recorded["outcome"] =
        json!({ "migrationName": "m2", "migrationUID": "u2", "phase": "Succeeded", "completedAt": "2026-11-22T11:58:00Z" });
    assert!(unrecorded(&all, None, &forecast(&recorded)).is_none());
    assert!(unrecorded(&all[..1], None, &forecast(&recorded)).is_none(), "an older one does not replace a newer one");
    assert!(unrecorded(&all[2..3], None, &fresh).is_none());
}

#[test]
fn the_managers_status_says_whether_the_answer_counts_and_settles() {
    let mut object = forecast(&answer());
    let known = decision(Verdict::Converges, reason::WITHIN_BUDGET);
    let own = own_status(&object, &known, None, now());
    assert!(differs(&object, &own));
    assert_eq!((own.conditions[0].status.as_str(), own.conditions[0].reason.as_str()), ("True", "Converges"));

    object.status.as_mut().unwrap().conditions = own.conditions.clone();
    let later = "2026-11-22T12:05:00Z".parse().unwrap();
    let again = own_status(&object, &known, None, later);
    assert!(!differs(&object, &again), "nothing new, nothing written");
    assert_eq!(again.conditions[0].last_transition_time, Time(now()));
    assert_eq!(told_verdict(&object), Some("Converges"));

    let stale = own_status(&object, &decision(Verdict::Unknown, reason::STALE), None, later);
    assert!(differs(&object, &stale));
    assert_eq!((stale.conditions[0].status.as_str(), stale.conditions[1].status.as_str()), ("False", "True"));
    assert_eq!(stale.conditions[0].last_transition_time, Time(later));

    let ended = outcome(&migration(&json!({})), None, Some(&object));
    let with_outcome = own_status(&object, &known, Some(ended.clone()), later);
    assert!(differs(&object, &with_outcome));
    object.status.as_mut().unwrap().outcome = Some(ended.clone());
    assert_eq!(own_status(&object, &known, None, later).outcome, Some(ended), "an outcome stays");
}

#[test]
fn an_outcome_settles_after_a_way_through_the_api_server() {
    let ended = outcome(&migration(&json!({})), None, Some(&forecast(&answer())));
    let back: Outcome = serde_json::from_str(&serde_json::to_string(&ended).unwrap()).unwrap();
    assert_eq!(back, ended);
}

#[test]
fn only_transitions_are_told() {
    use Verdict::{Borderline, Converges, Fails, Unknown};
    for (verdict, told, expected) in [
        (Converges, None, None),
        (Fails, None, Some("MigrationWouldFail")),
        (Borderline, None, Some("MigrationBorderline")),
        (Converges, Some("Converges"), None),
        (Converges, Some("Fails"), Some("MigrationWouldConverge")),
        (Fails, Some("Fails"), None),
        (Unknown, Some("Fails"), None),
    ] {
        let notice = verdict_notice(&decision(verdict, ""), told);
        assert_eq!(notice.map(|notice| notice.reason), expected, "{verdict:?} after {told:?}");
    }
}

#[test]
fn a_migration_is_warned_of_only_while_it_can_still_be_stopped_cleanly() {
    for (phase, action, warned) in [
        ("Pending", Action::AllowWithWarning, true),
        ("", Action::Deny, true),
        ("Pending", Action::Allow, false),
        ("Running", Action::Deny, false),
    ] {
        let decision = Decision { action, ..decision(Verdict::Fails, "") };
        assert_eq!(warning_notice(&migration(&json!({ "status": { "phase": phase } })), &decision).is_some(), warned, "{phase}");
    }
}

#[test]
fn the_next_look_is_when_the_answer_turns_stale() {
    assert_eq!(look_again(&forecast(&answer()), now()), Some(Duration::from_secs(601)));
    assert_eq!(look_again(&forecast(&Value::Null), now()), None);
    let late = "2026-11-22T13:00:00Z".parse().unwrap();
    assert_eq!(look_again(&forecast(&answer()), late), None);
}

#[test]
fn the_node_that_a_vm_has_left_may_still_tell_how_it_went() {
    let vmi = |end: &str| -> VirtualMachineInstance {
        let state = json!({ "migrationUid": "u1", "startTimestamp": "2026-11-22T11:59:00Z", "endTimestamp": end });
        serde_json::from_value(json!({ "status": { "nodeName": "node-2", "migrationState": state } })).unwrap()
    };
    let stored = |last: Value| {
        let mut status = answer();
        status["lastMigration"] = last;
        forecast(&status)
    };
    let truth = |uid: &str| json!({ "migrationUID": uid, "converged": true, "totalTime": "3s", "pages": 1, "zeroPages": 1, "transferredBytes": 1, "syncs": 1 });
    let seconds = |vmi: &VirtualMachineInstance, node: &str, stored: &MigrationForecast| {
        hand_over(vmi, node, Some(stored), now()).map(|left| left.as_secs())
    };
    let (just, untold) = (vmi("2026-11-22T11:59:58Z"), stored(Value::Null));
    assert_eq!(seconds(&just, "node-2", &untold), Some(3));
    assert_eq!(seconds(&just, "node-2", &stored(truth("u0"))), Some(3), "that was told of another one");
    assert_eq!(seconds(&just, "node-2", &stored(truth("u1"))), None, "it is told");
    assert_eq!(seconds(&just, "node-1", &untold), None, "it is where it was");
    assert_eq!(seconds(&vmi("2026-11-22T11:59:55Z"), "node-2", &untold), None, "it had its time");
    assert_eq!(seconds(&vmi("2026-11-22T12:00:07Z"), "node-2", &untold), None, "clocks disagree");
    assert_eq!(hand_over(&just, "node-2", None, now()), None);
    assert_eq!(hand_over(&VirtualMachineInstance::default(), "node-2", Some(&untold), now()), None);
}
