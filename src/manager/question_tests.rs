//! Tables of what is asked about a VM.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::api::{dry_run::DryRun, migration::HintPhase, policy::PredictionPolicySpec};

fn vmi(changes: &Value) -> VirtualMachineInstance {
    let mut object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": { "name": "vm1", "namespace": "shop", "uid": "uid-vm1", "labels": { "app": "db" } },
        "spec": { "domain": { "memory": { "guest": "1Gi" } } },
        "status": {
            "phase": "Running", "nodeName": "node-1", "activePods": { "pod-1": "node-1" },
            "conditions": [{ "type": "LiveMigratable", "status": "True" }], "migrationMethod": "LiveMigration"
        }
    });
    json_patch::merge(&mut object, changes);
    serde_json::from_value(object).unwrap()
}

fn kubevirt(migrations: &Value) -> KubeVirt {
    serde_json::from_value(
        json!({ "metadata": { "name": "kubevirt" }, "spec": { "configuration": { "migrations": migrations } } }),
    )
    .unwrap()
}

fn migration_policy(spec: &Value) -> MigrationPolicy {
    serde_json::from_value(json!({ "metadata": { "name": "p" }, "spec": spec })).unwrap()
}

fn ask(vmi: &VirtualMachineInstance, effective: &Effective, policy: Option<&PredictionPolicy>) -> MigrationForecastSpec {
    asked(desired(vmi, effective, policy, None))
}

fn asked(desired: Desired) -> MigrationForecastSpec {
    match desired {
        Desired::Ask(spec) => *spec,
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn a_running_vm_is_asked_about_with_kubevirts_defaults() {
    let spec = ask(&vmi(&json!({})), &effective(None, None), None);
    assert_eq!((spec.node_name.as_str(), spec.pod_uid.as_str()), ("node-1", "pod-1"));
    assert_eq!((spec.guest_memory.0.as_str(), spec.bandwidth.0.as_str()), ("1Gi", "0"));
    assert_eq!(spec.bandwidth_source, BandwidthSource::Unlimited);
    assert_eq!((spec.downtime_limit.to_string(), spec.time_budget.unwrap().to_string()), ("300ms".into(), "300s".into()));
    assert_eq!((spec.when_budget_ends, spec.auto_converge, spec.paused), (BudgetEnd::Abort, false, false));
    assert!(spec.question().is_ok());
}

#[test]
fn kubevirts_configuration_is_read_as_kubevirt_reads_it() {
    let of = |migrations: Value| effective(Some(&kubevirt(&migrations)), None);
    for (bandwidth, expected) in [
        (json!("64Mi"), Bandwidth::Capped(BytesPerSecond(64 << 20))),
        (json!(1_500_000), Bandwidth::Capped(BytesPerSecond(1 << 20))),
        (json!("1"), Bandwidth::Capped(BytesPerSecond(1 << 20))),
        (json!("0Mi"), Bandwidth::Unlimited),
        (json!("lots"), Bandwidth::Unlimited),
        (json!({}), Bandwidth::Unlimited),
        (Value::Null, Bandwidth::Unlimited),
    ] {
        assert_eq!(of(json!({ "bandwidthPerMigration": bandwidth })).bandwidth, expected, "{bandwidth}");
    }
    assert_eq!(of(json!({ "completionTimeoutPerGiB": 20 })).completion_timeout_per_gib, 20);
    assert_eq!(of(json!({ "completionTimeoutPerGiB": "20" })).completion_timeout_per_gib, 20);
    assert_eq!(of(json!({ "completionTimeoutPerGiB": -23 })).completion_timeout_per_gib, 150);
    assert_eq!(ask(&vmi(&json!({})), &of(json!({ "completionTimeoutPerGiB": 0 })), None).time_budget, None);

    for (migrations, end) in [
        (json!({ "allowPostCopy": true }), BudgetEnd::PostCopy),
        (json!({ "allowPostCopy": true, "allowWorkloadDisruption": false }), BudgetEnd::Abort),
        (json!({ "allowWorkloadDisruption": true }), BudgetEnd::Pause),
        (json!({}), BudgetEnd::Abort),
    ] {
        assert_eq!(of(migrations.clone()).when_budget_ends, end, "{migrations}");
    }
    assert!(of(json!({ "allowAutoConverge": true })).auto_converge);
}

#[test]
fn a_migration_policy_lies_over_the_configuration() {
    let below = kubevirt(&json!({ "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": 20, "allowPostCopy": true }));
    let over = effective(
        Some(&below),
        Some(&migration_policy(&json!({ "selectors": {}, "bandwidthPerMigration": "128Mi", "allowPostCopy": false }))),
    );
    assert_eq!((over.bandwidth, over.source), (Bandwidth::Capped(BytesPerSecond(128 << 20)), BandwidthSource::MigrationPolicy));
    assert_eq!((over.completion_timeout_per_gib, over.when_budget_ends), (20, BudgetEnd::Abort));
    let over = effective(Some(&below), Some(&migration_policy(&json!({ "completionTimeoutPerGiB": 99 }))));
    assert_eq!((over.completion_timeout_per_gib, over.source), (99, BandwidthSource::MigrationConfiguration));
    let over = effective(Some(&below), Some(&migration_policy(&json!({ "bandwidthPerMigration": "0" }))));
    assert_eq!((over.bandwidth, over.source), (Bandwidth::Unlimited, BandwidthSource::Unlimited), "a policy can take a cap away");
}

#[test]
fn a_prediction_policy_says_what_is_wanted_and_what_can_be_counted_on() {
    let capped = effective(Some(&kubevirt(&json!({ "bandwidthPerMigration": "64Mi" }))), None);
    let policy = |bandwidth: &str| {
        let spec =
            PredictionPolicySpec { bandwidth: Some(crate::api::scalar::Quantity(bandwidth.to_owned())), ..Default::default() };
        PredictionPolicy::new("gold", spec)
    };
    for (bandwidth, expected, source) in [
        ("32Mi", "32Mi", BandwidthSource::PredictionPolicy),
        ("640Mi", "64Mi", BandwidthSource::MigrationConfiguration),
        ("0", "64Mi", BandwidthSource::MigrationConfiguration),
        // Asked as it stands, so that the answer says what is wrong with it.
        ("?", "?", BandwidthSource::PredictionPolicy),
    ] {
        let spec = ask(&vmi(&json!({})), &capped, Some(&policy(bandwidth)));
        assert_eq!(
            (spec.bandwidth.0.as_str(), spec.bandwidth_source, spec.policy.as_deref()),
            (expected, source, Some("gold")),
            "{bandwidth}"
        );
    }
    let spec = ask(&vmi(&json!({})), &effective(None, None), Some(&policy("32Mi")));
    assert_eq!(spec.bandwidth.0, "32Mi");
}

#[test]
fn no_more_is_counted_on_than_was_achieved_before() {
    let capped = effective(Some(&kubevirt(&json!({ "bandwidthPerMigration": "64Mi" }))), None);
    let open = effective(None, None);
    let policy = |changes: Value| PredictionPolicy::new("gold", serde_json::from_value(changes).unwrap());
    let using = |bandwidth: Value| policy(json!({ "learnedBandwidth": "Use", "bandwidth": bandwidth }));
    let (plain, less, odd) = (using(Value::Null), using(json!("16Mi")), using(json!("?")));
    let ignoring = policy(json!({}));
    let line = |rate: &str| HostConstants { line_rate: Some(Quantity(rate.to_owned())), ..HostConstants::default() };
    for (effective, policy, learned, bandwidth, source) in [
        (&open, &plain, "100Mi", "100Mi", BandwidthSource::Learned),
        (&capped, &plain, "100Mi", "64Mi", BandwidthSource::MigrationConfiguration),
        (&capped, &plain, "32Mi", "32Mi", BandwidthSource::Learned),
        (&capped, &less, "32Mi", "16Mi", BandwidthSource::PredictionPolicy),
        (&open, &odd, "32Mi", "?", BandwidthSource::PredictionPolicy),
        (&open, &plain, "fast", "0", BandwidthSource::Unlimited),
    ] {
        let spec = asked(desired(&vmi(&json!({})), effective, Some(policy), Some(&line(learned))));
        assert_eq!((spec.bandwidth.0.as_str(), spec.bandwidth_source), (bandwidth, source), "{learned}");
        assert_eq!(spec.host, Some(line(learned)), "downtime goes by the line, whatever the cap is");
    }
    for policy in [None, Some(&ignoring)] {
        let spec = asked(desired(&vmi(&json!({})), &open, policy, Some(&line("100Mi"))));
        assert_eq!((spec.bandwidth.0.as_str(), spec.bandwidth_source, spec.host), ("0", BandwidthSource::Unlimited, None));
        // What a hand-over takes is no promise of a line: it counts in any case.
        let hand_over = HostConstants { completion_ms: Some(39.0), ..HostConstants::default() };
        let both = HostConstants { completion_ms: Some(39.0), ..line("100Mi") };
        let spec = asked(desired(&vmi(&json!({})), &open, policy, Some(&both)));
        assert_eq!((spec.bandwidth.0.as_str(), spec.host), ("0", Some(hand_over)));
    }
}

#[test]
fn who_is_asked_about() {
    use Desired::{Nothing, Wait};
    let all = effective(None, None);
    for (changes, expected) in [
        (json!({ "status": { "phase": "Scheduled" } }), Wait),
        (json!({ "status": { "phase": "Succeeded" } }), Nothing),
        (json!({ "status": { "phase": "Failed" } }), Nothing),
        (json!({ "status": null }), Wait),
        (json!({ "status": { "activePods": null } }), Wait),
        (json!({ "status": { "activePods": { "pod-1": "node-9" } } }), Wait),
        (json!({ "status": { "activePods": { "pod-2": "node-1" } } }), Wait),
        (json!({ "status": { "nodeName": "" } }), Wait),
        (json!({ "spec": { "domain": { "memory": { "guest": "much" } } } }), Wait),
        (
            json!({ "status": { "conditions": [{ "type": "LiveMigratable", "status": "False", "reason": "SEVNotLiveMigratable" }] } }),
            Nothing,
        ),
    ] {
        assert_eq!(desired(&vmi(&changes), &all, None, None), expected, "{changes}");
    }
    let migrating = vmi(&json!({ "status": { "activePods": { "pod-target": "node-2" } } }));
    assert_eq!(ask(&migrating, &all, None).pod_uid, "pod-1", "the one on the VM's node");
    let requests =
        json!({ "spec": { "domain": { "memory": null, "resources": { "requests": { "memory": "2Gi", "cpu": 1 } } } } });
    assert_eq!(ask(&vmi(&requests), &all, None).guest_memory.0, "2Gi");
    assert!(ask(&vmi(&json!({ "status": { "conditions": [{ "type": "Paused", "status": "True" }] } })), &all, None).paused);
}

#[test]
fn what_the_model_does_not_cover_is_asked_with_the_reason() {
    for changes in [
        json!({ "status": { "migrationMethod": "BlockMigration" } }),
        json!({ "status": { "migratedVolumes": [{ "volumeName": "disk" }] } }),
        json!({ "spec": { "domain": { "devices": { "gpus": [{ "name": "gpu" }] } } } }),
        json!({ "spec": { "domain": { "devices": { "hostDevices": [{ "name": "nic" }] } } } }),
    ] {
        let spec = ask(&vmi(&changes), &effective(None, None), None);
        assert!(
            spec.outside_model.unwrap().contains("which the model does not cover") || changes["spec"].is_object(),
            "{changes}"
        );
    }
}

#[test]
fn the_object_is_owned_labelled_and_written_only_when_it_differs() {
    let vmi = vmi(&json!({}));
    let spec = ask(&vmi, &effective(None, None), None);
    let wanted = object(&vmi, spec.clone(), None).unwrap();
    assert_eq!((wanted.name_any(), wanted.namespace()), ("vm1".into(), Some("shop".into())));
    assert_eq!(wanted.labels()[NODE_LABEL], "node-1");
    let owner = &wanted.owner_references()[0];
    assert_eq!(
        (owner.kind.as_str(), owner.uid.as_str(), owner.api_version.as_str()),
        ("VirtualMachineInstance", "uid-vm1", "kubevirt.io/v1")
    );
    let json = serde_json::to_value(&wanted).unwrap();
    assert!(json.get("status").is_none(), "{json}");

    assert!(differs(None, &wanted));
    let mut stored = wanted.clone();
    stored.metadata.resource_version = Some("7".into());
    stored.labels_mut().insert("more".into(), "labels".into());
    assert!(!differs(Some(&stored), &wanted));
    for change in [
        |stored: &mut MigrationForecast| stored.spec.node_name = "node-2".into(),
        |stored: &mut MigrationForecast| stored.labels_mut().clear(),
        |stored: &mut MigrationForecast| stored.metadata.owner_references = None,
    ] {
        let mut changed = stored.clone();
        change(&mut changed);
        assert!(differs(Some(&changed), &wanted));
    }

    let unborn = VirtualMachineInstance::default();
    assert_eq!(object(&unborn, spec, None), None);
}

#[test]
fn a_migration_under_way_is_told_and_a_dry_run_of_others_left_alone() {
    let vmi = vmi(&json!({}));
    let spec = ask(&vmi, &effective(None, None), None);
    let plain = object(&vmi, spec.clone(), None).unwrap();
    assert_eq!(plain.annotations().keys().collect::<Vec<_>>(), [hint::VMI_SPEC], "applied without the others, so that they go");

    let hint = |phase| Hint { migration_uid: "uid-m1".into(), phase };
    let told = object(&vmi, spec.clone(), Some(&hint(HintPhase::Pending))).unwrap();
    assert!(differs(Some(&plain), &told) && differs(Some(&told), &plain) && !differs(Some(&told), &told));
    assert!(differs(Some(&told), &object(&vmi, spec.clone(), Some(&hint(HintPhase::Running))).unwrap()));
    let mut annotated = plain.clone();
    annotated.annotations_mut().insert("somebody".into(), "else's".into());
    assert!(!differs(Some(&annotated), &plain));
    assert_eq!(told.spec.fingerprint(), plain.spec.fingerprint());

    let with = |id: &str| {
        let dry_run = DryRun { id: id.into(), ..DryRun::default() };
        object(&vmi, MigrationForecastSpec { dry_run: Some(dry_run), ..spec.clone() }, None).unwrap()
    };
    assert!(!differs(Some(&with("by-hand")), &plain), "theirs stands");
    assert!(differs(Some(&with("doubt-1-1")), &plain), "ours is withdrawn");
    assert!(differs(Some(&plain), &with("doubt-1-1")) && !differs(Some(&with("doubt-1-1")), &with("doubt-1-1")));
}

#[test]
fn another_spec_of_the_vm_is_told_and_nothing_else_of_it() {
    let vm = |changes: Value| object(&vmi(&changes), ask(&vmi(&json!({})), &effective(None, None), None), None).unwrap();
    let before = vm(json!({}));
    for changes in [
        json!({ "metadata": { "labels": { "new": "one" }, "annotations": { "a": "b" }, "generation": 99, "resourceVersion": "77" } }),
        json!({ "status": { "volumeStatus": [{ "name": "data", "phase": "Ready" }], "guestOSInfo": { "id": "debian" } } }),
    ] {
        assert!(!differs(Some(&before), &vm(changes.clone())), "{changes}");
    }
    for changes in [
        json!({ "spec": { "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": "data", "hotpluggable": true } }] } }),
        json!({ "spec": { "domain": { "devices": { "disks": [{ "name": "data", "disk": { "bus": "scsi" } }] } } } }),
        json!({ "spec": { "networks": [{ "name": "second" }] } }),
        json!({ "spec": { "whatever": "comes" } }),
    ] {
        let after = vm(changes.clone());
        assert!(differs(Some(&before), &after), "{changes}");
        assert!(after.vmi_spec() != before.vmi_spec() && after.spec.fingerprint() == before.spec.fingerprint(), "{changes}");
    }
}

#[test]
fn compression_is_a_migration_policys_alone() {
    let zstd = json!({ "experimental": { "compression": "zstd" } });
    assert_eq!(effective(None, Some(&migration_policy(&zstd))).compression, Compression::Zstd);
    assert_eq!(effective(Some(&kubevirt(&zstd)), None).compression, Compression::None);
    for odd in [
        json!({ "experimental": { "compression": "none" } }),
        json!({ "experimental": 7 }),
        json!({ "experimental": { "compression": 3 } }),
    ] {
        assert_eq!(effective(None, Some(&migration_policy(&odd))).compression, Compression::None, "{odd}");
    }
}
