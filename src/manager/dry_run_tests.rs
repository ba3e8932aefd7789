//! Tables of when a dry run in the background is wanted.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

const NOW: &str = "2026-11-22T12:00:00Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

/// The question, with these changes.
fn question(changes: &Value) -> MigrationForecastSpec {
    let mut spec = json!({
        "nodeName": "node-1", "podUID": "pod-1", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "MigrationConfiguration",
        "downtimeLimit": "300ms", "timeBudget": "300s"
    });
    json_patch::merge(&mut spec, changes);
    serde_json::from_value(spec).unwrap()
}

/// What is stored: the question, answered from the pattern that it fails, with these changes.
fn stored(changes: &Value) -> MigrationForecast {
    let mut object = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": "vm1", "namespace": "shop", "uid": "u1", "generation": 2 },
        "spec": question(&json!({})),
        "status": {
            "question": question(&json!({})).fingerprint(), "observedGeneration": 2, "measuredAt": "2026-11-22T11:50:00Z", "verdict": "Fails",
            "probability": 0.0, "method": "PC", "iterations": 40, "convergenceTime": "300s", "totalTime": "300s", "dirtiedPages": 9, "transferredBytes": 9
        }
    });
    json_patch::merge(&mut object, changes);
    serde_json::from_value(object).unwrap()
}

fn policy(mode: DryRunMode) -> DryRunPolicy {
    DryRunPolicy { mode, ..DryRunPolicy::default() }
}

fn carriage() -> Carriage {
    Carriage { channels: Some(8), compression: Compression::None }
}

fn wished(stored: &MigrationForecast) -> Wish {
    let (policy, present) = (policy(DryRunMode::OnDoubt), question(&json!({})));
    let case =
        Case { policy: Some(&policy), present: &present, stored: Some(stored), carriage: carriage(), way: None, now: now() };
    wish(&case, || 0)
}

/// The one that is wanted at first.
fn first() -> DryRun {
    match wished(&stored(&json!({}))) {
        Wish::Run(dry_run) => dry_run,
        other => unreachable!("{other:?}"),
    }
}

/// The same object once the manager has asked.
fn asked(status: &Value) -> MigrationForecast {
    stored(&json!({ "spec": { "dryRun": first() }, "status": { "dryRun": status } }))
}

#[test]
fn a_doubt_is_tried_out_once() {
    let dry_run = first();
    assert!(dry_run.id.starts_with("doubt-") && dry_run.id.ends_with("-1795348200"), "{}", dry_run.id);
    assert_eq!((dry_run.deadline, dry_run.channels), (Some("10m".parse().unwrap()), Some(8)));
    assert!(dry_run.request().is_ok());
    assert_eq!(first(), dry_run, "every replica wants the same");

    let waits = json!({ "id": dry_run.id, "phase": "Waiting" });
    let runs = json!({ "id": dry_run.id, "phase": "Running" });
    let done = json!({ "id": dry_run.id, "phase": "Done", "completedAt": "2026-11-22T11:55:00Z", "question": question(&json!({})).fingerprint() });
    let refused = json!({ "id": dry_run.id, "phase": "Refused", "completedAt": "2026-11-22T11:55:00Z" });
    let of_another = json!({ "id": "by-hand", "phase": "Failed", "completedAt": "2026-11-22T11:55:00Z" });
    for status in [Value::Null, waits, runs, done, refused, of_another] {
        assert_eq!(wished(&asked(&status)), Wish::Run(dry_run.clone()), "{status}");
    }
    // Meanwhile the pattern has changed its mind, or the answer is the dry run's own: what was asked stands.
    for more in [
        json!({ "verdict": "Converges", "probability": 1.0 }),
        json!({ "method": "DR" }),
        json!({ "measuredAt": "2026-11-22T11:59:00Z" }),
    ] {
        let changed = stored(&json!({ "spec": { "dryRun": dry_run }, "status": more }));
        assert_eq!(wished(&changed), Wish::Run(dry_run.clone()), "{more}");
    }
}

#[test]
fn a_doubt_that_lasts_is_tried_out_again_when_the_result_is_stale() {
    let old = json!({ "id": first().id, "phase": "Done", "completedAt": "2026-11-22T11:40:00Z", "question": question(&json!({})).fingerprint() });
    let again = asked(&old);
    assert_eq!(wished(&again), Wish::Run(first()), "for the same look the same id, which has run");
    let later =
        stored(&json!({ "spec": { "dryRun": first() }, "status": { "dryRun": old, "measuredAt": "2026-11-22T11:59:00Z" } }));
    let Wish::Run(second) = wished(&later) else { unreachable!() };
    assert!(second.id != first().id && second.id.ends_with("-1795348740"), "{}", second.id);
    let calm = stored(
        &json!({ "spec": { "dryRun": first() }, "status": { "dryRun": old, "verdict": "Converges", "probability": 1.0 } }),
    );
    assert_eq!(wished(&calm), Wish::Nothing, "no doubt any more: it is withdrawn");
}

#[test]
fn where_there_is_no_doubt_nothing_is_wanted() {
    let words = |status: Value| json!({ "status": status });
    for changes in [
        words(json!({ "verdict": "Converges", "probability": 1.0 })),
        words(json!({ "verdict": "Unknown" })),
        words(json!({ "method": "DR" })),
        words(json!({ "measuredAt": "2026-11-22T11:39:00Z" })),
        words(json!({ "measuredAt": null })),
        words(json!({ "question": "0123456789abcdef" })),
        words(json!({ "question": null })),
        json!({ "status": null }),
        // Tried out not long ago, by a person.
        words(
            json!({ "dryRun": { "id": "by-hand", "phase": "Done", "completedAt": "2026-11-22T11:45:00Z", "question": question(&json!({})).fingerprint() } }),
        ),
    ] {
        assert_eq!(wished(&stored(&changes)), Wish::Nothing, "{changes}");
    }
    for changes in [
        words(json!({ "verdict": "Borderline", "probability": 0.5 })),
        // Tried out, but long ago, or another question, or it has not come to an end.
        words(
            json!({ "dryRun": { "id": "x", "phase": "Done", "completedAt": "2026-11-22T11:30:00Z", "question": question(&json!({})).fingerprint() } }),
        ),
        words(
            json!({ "dryRun": { "id": "x", "phase": "Done", "completedAt": "2026-11-22T11:45:00Z", "question": "0123456789abcdef" } }),
        ),
    ] {
        assert!(matches!(wished(&stored(&changes)), Wish::Run(_)), "{changes}");
    }
}

#[test]
fn on_demand_is_when_a_migration_is_held() {
    let (on_demand, present, stored) = (policy(DryRunMode::OnDemand), question(&json!({})), stored(&json!({})));
    let case =
        |way| Case { policy: Some(&on_demand), present: &present, stored: Some(&stored), carriage: carriage(), way, now: now() };
    assert_eq!(wish(&case(None), || 0), Wish::Nothing);
    assert_eq!(wish(&case(Some(Way::Open)), || 0), Wish::Nothing);
    assert_eq!(wish(&case(Some(Way::Held)), || 0), Wish::Run(first()));
}

#[test]
fn it_is_withdrawn_with_what_it_rested_on() {
    let asked = asked(&Value::Null);
    let (doubt, never) = (policy(DryRunMode::OnDoubt), policy(DryRunMode::Never));
    let present = question(&json!({}));
    let good =
        Case { policy: Some(&doubt), present: &present, stored: Some(&asked), carriage: carriage(), way: None, now: now() };
    assert!(matches!(wish(&good, || 99), Wish::Run(_)), "what stands needs no room");
    let moved = question(&json!({ "nodeName": "node-2" }));
    let wider = question(&json!({ "bandwidth": "1Gi" }));
    let outside = question(&json!({ "outsideModel": "block migration" }));
    for (why, case) in [
        ("no policy", Case { policy: None, ..good }),
        ("never", Case { policy: Some(&never), ..good }),
        ("a migration or a hotplug is under way", Case { way: Some(Way::Open), ..good }),
        ("never, and a migration is held", Case { policy: Some(&never), way: Some(Way::Held), ..good }),
        ("it moved", Case { present: &moved, ..good }),
        ("another bandwidth", Case { present: &wider, ..good }),
        ("outside the model", Case { present: &outside, ..good }),
        ("nothing is stored", Case { stored: None, ..good }),
    ] {
        assert_eq!(wish(&case, || 0), Wish::Nothing, "{why}");
    }
    let zstd = Case { carriage: Carriage { compression: Compression::Zstd, ..carriage() }, ..good };
    let Wish::Run(other) = wish(&zstd, || 0) else { unreachable!() };
    assert!(other.id != first().id && other.compression == Compression::Zstd, "it would be carried otherwise: another dry run");
}

#[test]
fn what_a_person_asks_for_stands_until_its_answer_is_old() {
    let by_hand = |status: Value| stored(&json!({ "spec": { "dryRun": { "id": "by-hand" } }, "status": { "dryRun": status } }));
    let old = "2026-11-22T11:00:00Z";
    for status in [
        Value::Null,
        json!({ "id": "by-hand", "phase": "Running" }),
        json!({ "id": "by-hand", "phase": "Cancelled", "completedAt": "2026-11-22T11:55:00Z" }),
        json!({ "id": "before", "phase": "Done", "completedAt": old }),
    ] {
        assert_eq!(wished(&by_hand(status.clone())), Wish::Nothing, "{status}");
    }
    assert!(matches!(wished(&by_hand(json!({ "id": "by-hand", "phase": "Done", "completedAt": old }))), Wish::Run(_)));
}

#[test]
fn a_node_has_so_many_at_a_time() {
    let (mut policy, present, stored) = (policy(DryRunMode::OnDoubt), question(&json!({})), stored(&json!({})));
    policy.concurrent_per_node = 2;
    let case =
        Case { policy: Some(&policy), present: &present, stored: Some(&stored), carriage: carriage(), way: None, now: now() };
    assert!(matches!(wish(&case, || 1), Wish::Run(_)));
    assert_eq!(wish(&case, || 2), Wish::Queue);
    assert!(matches!(wish(&Case { way: Some(Way::Held), ..case }, || 2), Wish::Run(_)), "somebody waits for it");

    let open = |status: &Value| is_open(&asked(status));
    assert!(
        open(&Value::Null)
            && open(&json!({ "id": "before", "phase": "Done" }))
            && open(&json!({ "id": first().id, "phase": "Running" }))
    );
    assert!(!open(&json!({ "id": first().id, "phase": "Failed" })) && !is_open(&stored));
}

#[test]
fn pages_are_carried_as_kubevirt_would() {
    let of = |domain: Value| {
        let vmi: VirtualMachineInstance = serde_json::from_value(json!({ "spec": { "domain": domain } })).unwrap();
        Carriage::of(&vmi, Compression::Zstd)
    };
    let eight = Carriage { channels: Some(8), compression: Compression::Zstd };
    for domain in [
        json!({}),
        json!({ "cpu": { "cores": 4 }, "resources": { "limits": { "memory": "4Gi" }, "requests": { "cpu": 2 } } }),
        json!({ "resources": { "limits": { "cpu": "0" } } }),
        json!({ "cpu": { "dedicatedCpuPlacement": false } }),
    ] {
        assert_eq!(of(domain.clone()), eight, "{domain}");
    }
    for domain in [
        json!({ "resources": { "limits": { "cpu": "2" } } }),
        json!({ "resources": { "limits": { "cpu": 1.5 } } }),
        json!({ "resources": { "limits": { "cpu": "many" } } }),
        json!({ "cpu": { "dedicatedCpuPlacement": true } }),
    ] {
        assert_eq!(of(domain.clone()), Carriage::default(), "{domain}");
    }
}

#[test]
fn a_volume_on_its_way_is_a_hotplug() {
    let of = |volumes: Value| {
        let vmi: VirtualMachineInstance = serde_json::from_value(json!({ "status": { "volumeStatus": volumes } })).unwrap();
        vmi.is_hotplugging()
    };
    let plugged =
        |phase: &str| json!([{ "name": "root" }, { "name": "data", "phase": phase, "hotplugVolume": { "attachPodName": "hp" } }]);
    for phase in ["Pending", "Bound", "AttachedToNode", "MountedToPod", "Detaching", "UnMountedFromPod", ""] {
        assert!(of(plugged(phase)), "{phase}");
    }
    assert!(
        !of(plugged("Ready")) && !of(json!([{ "name": "root", "phase": "Pending" }])) && !of(json!("odd")) && !of(Value::Null)
    );
}
