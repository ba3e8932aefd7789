//! What becomes of held migrations.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::{
    api::{
        names::reason,
        remedy::{RemedyAnswer, RemedyType},
    },
    model::forecast::Verdict,
};

fn migration(phase: &str, more: &Value) -> Arc<VirtualMachineInstanceMigration> {
    let mut object = json!({
        "metadata": { "name": "m", "namespace": "shop", "uid": "uid-m" }, "spec": { "vmiName": "wild" }, "status": { "phase": phase }
    });
    json_patch::merge(&mut object, more);
    Arc::new(serde_json::from_value(object).unwrap())
}

fn pod(gates: &[&str], more: &Value) -> Pod {
    let gates: Vec<_> = gates.iter().map(|name| json!({ "name": name })).collect();
    let mut object = json!({
        "metadata": {
            "name": "virt-launcher-wild-2", "namespace": "shop", "creationTimestamp": "2026-11-22T12:00:00Z",
            "labels": { "kubevirt.io": "virt-launcher", "kubevirt.io/migrationJobUID": "uid-m", "kubevirt.io/created-by": "uid-wild" },
            "annotations": { "kubevirt.io/domain": "wild" },
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": "wild", "uid": "uid-wild", "controller": true
            }]
        },
        "spec": { "containers": [], "schedulingGates": gates }
    });
    json_patch::merge(&mut object, more);
    serde_json::from_value(object).unwrap()
}

fn vm(uid: &str) -> VirtualMachineInstance {
    serde_json::from_value(json!({ "metadata": { "name": "wild", "namespace": "shop", "uid": uid } })).unwrap()
}

fn decided(action: Action) -> Decision {
    Decision { action, verdict: Verdict::Borderline, reason: reason::NEAR_THE_LIMIT, message: String::new(), remedy: None }
}

fn at(time: &str) -> Timestamp {
    format!("2026-11-22T{time}Z").parse().unwrap()
}

#[test]
fn every_case_has_its_step() {
    let none = json!({});
    let (held, free) = (pod(&["other/gate", GATE], &none), pod(&["other/gate"], &none));
    let leaving = json!({ "metadata": { "deletionTimestamp": "2026-11-22T12:00:00Z" } });
    let comes = json!({ "spec": { "receive": { "migrationID": "x" } } });
    for (migration, pod, [allow, warn, hold, deny]) in [
        // No pod yet: the pod webhook will see to it.
        (migration("", &none), None, [Step::Leave; 4]),
        (migration("Pending", &none), None, [Step::Leave; 4]),
        // Held.
        (migration("Pending", &none), Some(&held), [Step::LetGo, Step::LetGo, Step::Hold, Step::Abandon]),
        (migration("Scheduling", &none), Some(&held), [Step::LetGo, Step::LetGo, Step::Hold, Step::Abandon]),
        // Not held: it goes its way, whatever is thought of it by now.
        (migration("Scheduling", &none), Some(&free), [Step::Leave; 4]),
        (migration("Scheduled", &none), None, [Step::Leave; 4]),
        (migration("Running", &none), None, [Step::Leave; 4]),
        // Over, or none of ours.
        (migration("Failed", &none), Some(&held), [Step::Leave; 4]),
        (migration("Scheduling", &leaving), Some(&held), [Step::Leave; 4]),
        (migration("Pending", &comes), None, [Step::Leave; 4]),
    ] {
        let steps = [Action::Allow, Action::AllowWithWarning, Action::Hold, Action::Deny]
            .map(|action| step(&migration, pod, &decided(action), false));
        assert_eq!(steps, [allow, warn, hold, deny], "{} gated: {:?}", migration.status.phase, pod.map(is_gated));
    }
}

#[test]
fn a_remedy_is_applied_while_the_gate_is_on() {
    let none = json!({});
    let (held, free) = (pod(&[GATE], &none), pod(&[], &none));
    let remedy = RemedyAnswer { verdict: Verdict::Converges, ..RemedyAnswer::unknown(RemedyType::AutoConverge, "") };
    let decision = Decision { remedy: Some(remedy), ..decided(Action::Hold) };
    let scheduling = migration("Scheduling", &none);
    for (pod, forced, expected) in [
        (None, false, Step::Leave),
        (Some(&free), false, Step::Leave),
        (Some(&held), false, Step::Force),
        (Some(&held), true, Step::LetGo),
        (Some(&free), true, Step::Leave),
    ] {
        assert_eq!(step(&scheduling, pod, &decision, forced), expected, "{:?} {forced}", pod.map(is_gated));
    }
}

#[test]
fn only_target_pods_are_known_by_their_migration() {
    assert_eq!(migration_of(&pod(&[], &json!({}))), Some("uid-m"));
    let attachment = json!({ "metadata": { "labels": { "kubevirt.io": "hotplug-disk" } } });
    let nameless = json!({ "metadata": { "labels": { "kubevirt.io/migrationJobUID": "" } } });
    let source = json!({ "metadata": { "labels": { "kubevirt.io/migrationJobUID": null } } });
    for more in [attachment, nameless, source] {
        assert_eq!(migration_of(&pod(&[], &more)), None, "{more}");
    }
    let none: [Arc<Pod>; 0] = [];
    let (held, other) = (Arc::new(pod(&[GATE], &json!({}))), Arc::new(pod(&[], &json!({}))));
    let (migration, wild) = (migration("", &json!({})), vm("uid-wild"));
    assert!(pod_of(&[Arc::clone(&other)], &migration, &wild).is_some());
    assert!(pod_of(&[other, held], &migration, &wild).is_some_and(is_gated), "what is held must be found, whoever says the same");
    assert!(pod_of(&none, &migration, &wild).is_none());
}

/// With our gate on it, and somebody else's migration on its label.
#[test]
fn a_forged_pod_is_no_migrations_own() {
    let (migration, wild) = (migration("Scheduling", &json!({})), vm("uid-wild"));
    let own = Arc::new(pod(&[GATE], &json!({})));
    assert!(is_its_own(&own, &migration, &wild));
    let owner = |uid: &str, controller: bool| json!([{ "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": "wild", "uid": uid, "controller": controller }]);
    for more in [
        json!({ "labels": { "kubevirt.io/created-by": null } }),
        json!({ "labels": { "kubevirt.io/created-by": "uid-mine" } }),
        json!({ "labels": { "kubevirt.io/migrationJobUID": "uid-x" } }),
        json!({ "labels": { "kubevirt.io": "hotplug-disk" } }),
        json!({ "annotations": { "kubevirt.io/domain": "mine" } }),
        json!({ "ownerReferences": null }),
        json!({ "ownerReferences": owner("uid-mine", true) }),
        json!({ "ownerReferences": owner("uid-wild", false) }),
    ] {
        let forged = Arc::new(pod(&[GATE], &json!({ "metadata": more })));
        assert!(!is_its_own(&forged, &migration, &wild), "{more}");
        let pods = [Arc::clone(&forged), Arc::clone(&own)];
        assert!(pod_of(&pods, &migration, &wild).is_some_and(|pod| *pod == *own), "{more}");
        assert!(pod_of(std::slice::from_ref(&forged), &migration, &wild).is_none(), "{more}");
        assert!(is_orphan(&forged, std::slice::from_ref(&migration), Some(&wild), at("13:00:00")), "it is let go: {more}");
    }
    assert!(!is_its_own(&own, &migration, &vm("uid-another-of-its-name")));
    let nameless: VirtualMachineInstance = serde_json::from_value(json!({ "metadata": { "name": "wild" } })).unwrap();
    assert!(!is_its_own(&own, &migration, &nameless));
}

#[test]
fn a_pod_whose_migration_nobody_knows_is_let_go_once_the_watches_had_their_time() {
    let (held, known) = (pod(&[GATE], &json!({})), [migration("Pending", &json!({}))]);
    let nobody: [Arc<VirtualMachineInstanceMigration>; 0] = [];
    let wild = vm("uid-wild");
    assert!(!is_orphan(&held, &nobody, Some(&wild), at("12:00:10")), "the watch may lag");
    assert!(is_orphan(&held, &nobody, Some(&wild), at("12:00:11")));
    assert!(!is_orphan(&held, &known, Some(&wild), at("13:00:00")));
    assert!(is_orphan(&held, &known, None, at("13:00:00")), "its VM is gone");
    assert!(!is_orphan(&pod(&[], &json!({})), &nobody, Some(&wild), at("13:00:00")), "none of ours");
    assert_eq!(held_for(&held, at("12:05:00")).as_secs(), 300);
    assert_eq!(held_for(&held, at("11:00:00")).as_secs(), 0, "clocks disagree");
}

#[test]
fn a_dry_run_is_waited_for_from_its_beginning_until_it_says_that_it_has_ended() {
    let stored = |asked: Value, status: Value| -> MigrationForecast {
        serde_json::from_value(json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": "wild" },
            "spec": {
                "nodeName": "n", "podUID": "p", "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited",
                "downtimeLimit": "300ms", "dryRun": asked
            },
            "status": { "dryRun": status }
        }))
        .unwrap()
    };
    let (ours, started) = (json!({ "id": "a" }), "2026-11-22T12:00:00Z");
    // Under way, and asked for but not begun.
    for (asked, status, running, waiting) in [
        (Value::Null, Value::Null, false, false),
        (ours.clone(), Value::Null, true, true),
        (ours.clone(), json!({ "id": "before", "phase": "Done" }), true, true),
        (ours.clone(), json!({ "id": "a", "phase": "Running", "startedAt": started }), true, false),
        (ours.clone(), json!({ "id": "a", "phase": "Done", "startedAt": started }), false, false),
        (ours, json!({ "id": "a", "phase": "Waiting" }), true, true),
        (Value::Null, json!({ "id": "a", "phase": "Waiting" }), false, false),
        // Withdrawn: the agent has not said yet that it has ended.
        (Value::Null, json!({ "id": "a", "phase": "Running", "startedAt": started }), true, false),
        (Value::Null, json!({ "id": "a", "phase": "Cancelled", "startedAt": started }), false, false),
    ] {
        let object = stored(asked.clone(), status.clone());
        assert_eq!((is_dry_running(Some(&object)), waits_to_begin(&object)), (running, waiting), "{asked} {status}");
    }
    assert!(!is_dry_running(None));
}
