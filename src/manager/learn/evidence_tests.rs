//! What is learned of a migration, and of which nothing is.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::model::{forecast::Method, units::BytesPerSecond};

fn truth(changes: &Value) -> LastMigration {
    let mut truth = json!({
        "migrationUID": "u1", "converged": true, "totalTime": "10s", "downtime": "200ms", "pages": 262_144, "zeroPages": 9,
        "transferredBytes": 1_100_000_000, "syncs": 4
    });
    json_patch::merge(&mut truth, changes);
    serde_json::from_value(truth).unwrap()
}

fn state(changes: &Value) -> MigrationState {
    let mut state = json!({
        "migrationUid": "u1", "startTimestamp": "2026-11-22T11:55:00Z", "endTimestamp": "2026-11-22T11:55:10Z", "completed": true,
        "mode": "PreCopy", "sourceNode": "node-a", "targetNode": "node-b",
        "migrationConfiguration": { "bandwidthPerMigration": "0", "completionTimeoutPerGiB": 150 }
    });
    json_patch::merge(&mut state, changes);
    serde_json::from_value(state).unwrap()
}

#[test]
fn the_line_is_learned_of_a_migration_that_had_it() {
    let open = Bandwidth::Unlimited;
    let learned = rate(&truth(&json!({})), &state(&json!({})), open).unwrap();
    let end = "2026-11-22T11:55:10Z".parse::<k8s_openapi::jiff::Timestamp>().unwrap().as_second();
    let expected = Lesson::Rate {
        from: "node-a".into(),
        to: "node-b".into(),
        at: u64::try_from(end).unwrap(),
        rate: BytesPerSecond(110_000_000),
    };
    assert_eq!(learned, expected);

    let capped = Bandwidth::Capped(BytesPerSecond(112 << 20));
    assert_eq!(rate(&truth(&json!({})), &state(&json!({})), capped), None);
    for odd in [json!({ "converged": false }), json!({ "totalTime": "100ms" }), json!({ "transferredBytes": 0 })] {
        assert_eq!(rate(&truth(&odd), &state(&json!({})), open), None, "{odd}");
    }
    for odd in [
        json!({ "mode": "PostCopy" }),
        json!({ "mode": "Paused" }),
        json!({ "sourceNode": null }),
        json!({ "targetNode": 7 }),
        json!({ "endTimestamp": null }),
        json!({ "endTimestamp": "1812-11-22T11:55:10Z" }),
    ] {
        assert_eq!(rate(&truth(&json!({})), &state(&odd), open), None, "{odd}");
    }
}

#[test]
fn the_configuration_that_was_handed_over_is_read() {
    let read = |changes: Value| {
        state(&changes).migration_configuration.and_then(|it| it.bandwidth_per_migration).and_then(|rate| rate.rate().ok())
    };
    assert_eq!(read(json!({})), Some(BytesPerSecond(0)));
    assert_eq!(read(json!({ "migrationConfiguration": { "bandwidthPerMigration": "64Mi" } })), Some(BytesPerSecond(64 << 20)));
    assert_eq!(read(json!({ "migrationConfiguration": null })), None);
    assert_eq!(read(json!({ "migrationConfiguration": "odd" })), None);
}

#[test]
fn who_shares_a_node_shares_the_line() {
    let this = state(&json!({}));
    let other = |changes: &Value| {
        let mut other = json!({ "migrationUid": "u2", "sourceNode": "node-c", "targetNode": "node-d" });
        // As it stands, null too: a merge would take the field away, and the next one put it back.
        for (field, value) in changes.as_object().unwrap() {
            other[field] = value.clone();
        }
        is_beside(&this, &state(&other), other["migrationUid"] == "runs")
    };
    assert!(!other(&json!({})), "elsewhere");
    for changes in [
        json!({ "sourceNode": "node-a" }),
        json!({ "targetNode": "node-a" }),
        json!({ "sourceNode": "node-b" }),
        json!({ "targetNode": "node-b" }),
        json!({ "targetNode": null }),
        json!({ "sourceNode": "node-a", "endTimestamp": null }),
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-22T11:55:10Z", "endTimestamp": null }),
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-22T11:50:00Z", "endTimestamp": "2026-11-22T11:55:00Z" }),
        // Nobody has noted its end.
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-21T11:55:00Z", "endTimestamp": null }),
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-01T00:00:00Z", "endTimestamp": null, "migrationUid": "runs" }),
    ] {
        assert!(other(&changes), "{changes}");
    }
    for changes in [
        json!({ "sourceNode": "node-a", "startTimestamp": null }),
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-22T11:55:11Z", "endTimestamp": null }),
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-22T11:50:00Z", "endTimestamp": "2026-11-22T11:54:59Z" }),
        json!({ "sourceNode": "node-a", "migrationUid": "u1" }),
        json!({ "sourceNode": "node-a", "startTimestamp": "2026-11-21T11:54:59Z", "endTimestamp": null }),
    ] {
        assert!(!other(&changes), "{changes}");
    }
}

#[test]
fn only_what_qemu_told_is_held_against_the_method() {
    let outcome = |changes: &Value| -> Outcome {
        let mut outcome = json!({
            "migrationName": "m1", "migrationUID": "u1", "phase": "Succeeded", "verdict": "Converges", "method": "DR",
            "totalTime": "10s", "forecastTotalTime": "9s", "relativeError": -0.1,
            "downtime": "200ms", "forecastDowntime": "300ms", "downtimeError": 0.5,
            "pages": 1000, "forecastPages": 1000, "pagesError": 0.0
        });
        json_patch::merge(&mut outcome, changes);
        serde_json::from_value(outcome).unwrap()
    };
    let method = Method::DryRun;
    let all = [
        Lesson::error(method, Figure::TotalTime, 10.0, 9.0).unwrap(),
        Lesson::error(method, Figure::Downtime, 2.0, 3.0).unwrap(),
        Lesson::error(method, Figure::Pages, 1.0, 1.0).unwrap(),
    ];
    let close = |learned: &[Lesson], expected: &[Lesson]| {
        assert_eq!(learned.len(), expected.len(), "{learned:?}");
        for pair in learned.iter().zip(expected) {
            let (Lesson::Error { method: m1, figure: f1, off: o1 }, Lesson::Error { method: m2, figure: f2, off: o2 }) = pair
            else {
                unreachable!("{pair:?}")
            };
            assert!((m1, f1) == (m2, f2) && (o1 - o2).abs() < 1e-9, "{pair:?}");
        }
    };
    close(&off(&outcome(&json!({}))), &all);
    assert_eq!(
        errors(&outcome(&json!({}))).collect::<Vec<_>>(),
        [(Figure::TotalTime, -0.1), (Figure::Downtime, 0.5), (Figure::Pages, 0.0)]
    );
    close(&off(&outcome(&json!({ "downtimeError": null }))), &[all[0].clone(), all[2].clone()]);
    // Whole seconds of KubeVirt's, no forecast, or another migration than the one that was forecast.
    for changes in [
        json!({ "pages": null, "pagesError": null, "downtime": null, "downtimeError": null }),
        json!({ "method": null }),
        json!({ "relativeError": null, "downtimeError": null, "pagesError": null }),
    ] {
        assert!(off(&outcome(&changes)).is_empty(), "{changes}");
    }
}

#[test]
fn the_hand_over_is_learned_of_forecasts_by_the_pattern_that_qemu_answered() {
    let outcome = |changes: &Value| -> Outcome {
        let mut outcome = json!({
            "migrationName": "m1", "migrationUID": "u1", "phase": "Succeeded", "verdict": "Converges", "method": "PC",
            "downtime": "45ms", "forecastDowntime": "11ms", "downtimeError": -0.75, "pages": 1000
        });
        json_patch::merge(&mut outcome, changes);
        serde_json::from_value(outcome).unwrap()
    };
    let all = outcome(&json!({}));
    assert_eq!(switchover(&all, None), Some(Lesson::Switchover { ms: 39.0 }), "5 ms are assumed where nothing is asked");
    let asked = HostConstants { completion_ms: Some(20.0), ..HostConstants::default() };
    assert_eq!(switchover(&all, Some(&asked)), Some(Lesson::Switchover { ms: 54.0 }));
    for changes in [
        json!({ "method": "DR" }),
        json!({ "method": null }),
        json!({ "pages": null }),
        json!({ "downtimeError": null }),
        json!({ "forecastDowntime": null }),
    ] {
        assert_eq!(switchover(&outcome(&changes), None), None, "{changes}");
    }
}
