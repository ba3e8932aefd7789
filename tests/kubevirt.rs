//! KubeVirt's objects as any version may write them, read through our partial types: known fields found, everything else ignored.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use k8s_openapi::api::core::v1::Namespace;
use kube::{Resource, core::DeserializeGuard};
use migvisor::api::kubevirt::{KubeVirt, MigrationPolicy, VirtualMachineInstance, VirtualMachineInstanceMigration};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The object with unknown fields at every level, of every kind of value.
fn strewn(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: serde_json::Map<_, _> = fields.iter().map(|(key, value)| (key.clone(), strewn(value))).collect();
            // Maps of strings (labels, activePods) are no structs: what is in them is data.
            if fields.values().all(Value::is_string)
                && !fields.contains_key("name")
                && !fields.contains_key("vmiName")
                && !fields.contains_key("guest")
            {
                return Value::Object(fields);
            }
            fields.insert("zzzNull".into(), Value::Null);
            fields.insert("zzzNumber".into(), json!(-1.5));
            fields.insert("zzzDeep".into(), json!({ "a": [{ "b": null }, 7], "name": "x", "phase": 1 }));
            Value::Object(fields)
        }
        Value::Array(items) => Value::Array(items.iter().map(strewn).collect()),
        other => other.clone(),
    }
}

fn read<K: DeserializeOwned + Resource>(value: &Value) -> K {
    serde_json::from_value::<DeserializeGuard<K>>(value.clone()).unwrap().0.unwrap()
}

fn vmi() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": "vm1", "namespace": "shop", "uid": "u1", "generation": 9, "labels": { "app": "db" }, "annotations": { "a": "b" },
            "creationTimestamp": "2026-01-02T03:04:05Z", "finalizers": ["f"]
        },
        "spec": {
            "architecture": "amd64", "evictionStrategy": "LiveMigrate", "hostname": "h",
            "domain": {
                "cpu": { "cores": 2, "dedicatedCpuPlacement": false },
                "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }], "hostDevices": [{ "name": "nic", "deviceName": "x/y" }] },
                "memory": { "guest": "4Gi", "hugepages": { "pageSize": "2Mi" } },
                "resources": { "requests": { "memory": "5Gi", "cpu": "2" }, "limits": { "memory": 5_368_709_120_u64 } }
            },
            "volumes": [{ "name": "root", "containerDisk": { "image": "i" } }]
        },
        "status": {
            "phase": "Running", "nodeName": "node-1", "activePods": { "pod-1": "node-1", "pod-2": "node-2" }, "guestOSInfo": {},
            "conditions": [
                { "type": "Ready", "status": "True", "lastProbeTime": null, "lastTransitionTime": "2026-01-02T03:04:05Z" },
                { "type": "LiveMigratable", "status": "False", "reason": "HostDeviceNotLiveMigratable", "message": "no", "lastTransitionTime": null },
                { "type": "Paused", "status": "True" }
            ],
            "migrationMethod": "BlockMigration",
            "migratedVolumes": [{ "volumeName": "root", "sourcePVCInfo": {} }],
            "migrationState": {
                "migrationUid": "m1", "startTimestamp": "2026-01-02T03:04:05Z", "endTimestamp": "2026-01-02T03:04:09Z", "completed": true,
                "mode": "PreCopy", "targetCPUSet": [1, 2], "migrationConfiguration": { "bandwidthPerMigration": "0", "maxDowntimeMs": 900 },
                "sourceState": { "pod": "p" }, "failureReason": "", "abortStatus": "Succeeded"
            }
        }
    })
}

#[test]
fn a_vm_is_read_from_among_everything_else() {
    for object in [vmi(), strewn(&vmi())] {
        let vmi: VirtualMachineInstance = read(&object);
        assert_eq!((vmi.metadata.name.as_deref(), vmi.metadata.uid.as_deref()), (Some("vm1"), Some("u1")));
        assert_eq!(vmi.spec.domain.memory.guest.as_ref().unwrap().0, "4Gi");
        assert_eq!(vmi.spec.domain.resources.requests["cpu"].0, "2");
        assert_eq!((vmi.spec.domain.devices.host_devices.len(), vmi.spec.domain.devices.gpus.len()), (1, 0));
        assert_eq!(
            (vmi.status.phase.as_str(), vmi.status.node_name.as_str(), vmi.pod_uid()),
            ("Running", "node-1", Some("pod-1"))
        );
        assert!(vmi.is("Paused") && !vmi.is("LiveMigratable") && !vmi.is("Absent"));
        assert_eq!(vmi.condition("LiveMigratable").unwrap().reason, "HostDeviceNotLiveMigratable");
        assert_eq!((vmi.status.migration_method.as_str(), vmi.status.migrated_volumes.len()), ("BlockMigration", 1));
        let state = vmi.status.migration_state.as_ref().unwrap();
        assert_eq!(
            (state.migration_uid.as_str(), state.completed, state.failed, state.mode.as_str()),
            ("m1", true, false, "PreCopy")
        );
        assert!(state.end_timestamp.as_ref().unwrap().0 > state.start_timestamp.as_ref().unwrap().0);
    }
}

#[test]
fn a_migration_is_read_from_among_everything_else() {
    let object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": { "name": "m", "namespace": "shop", "uid": "m1", "annotations": { "kubevirt.io/evacuationMigration": "node-1" } },
        "spec": { "vmiName": "vm1", "priority": "system-critical", "sendTo": { "migrationID": "x", "connectURL": "y" } },
        "status": {
            "phase": "Succeeded", "phaseTransitionTimestamps": [{ "phase": "Pending", "phaseTransitionTimestamp": "2026-01-02T03:04:05Z" }],
            "migrationState": { "migrationUid": "m1", "endTimestamp": "2026-01-02T03:04:09.123456Z" }
        }
    });
    for object in [object.clone(), strewn(&object)] {
        let migration: VirtualMachineInstanceMigration = read(&object);
        assert_eq!(migration.spec.vmi_name, "vm1");
        assert!(migration.is_final() && migration.spec.send_to.is_some() && migration.spec.receive.is_none());
        assert!(migration.status.migration_state.unwrap().end_timestamp.is_some());
    }
}

#[test]
fn the_configuration_is_read_from_among_everything_else() {
    let migrations = json!({
        "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": 20, "allowPostCopy": true, "parallelMigrationsPerCluster": 5,
        "allowAutoConverge": false, "network": "migration", "experimental": { "stallDetector": { "ewmaAlpha": "0.4" } }
    });
    let kubevirt = json!({
        "metadata": { "name": "kubevirt", "namespace": "kubevirt" },
        "spec": { "configuration": { "developerConfiguration": { "featureGates": ["X"] }, "migrations": migrations }, "infra": {} },
        "status": { "phase": "Deployed" }
    });
    let mut policy = json!({ "metadata": { "name": "p" }, "spec": migrations });
    policy["spec"]["selectors"] = json!({ "virtualMachineInstanceSelector": { "app": "db" } });
    for (kubevirt, policy) in [(kubevirt.clone(), policy.clone()), (strewn(&kubevirt), strewn(&policy))] {
        let (kubevirt, policy): (KubeVirt, MigrationPolicy) = (read(&kubevirt), read(&policy));
        for configuration in [&kubevirt.spec.configuration.migrations, &policy.spec.configuration] {
            assert_eq!(configuration.bandwidth_per_migration.as_ref().unwrap().0, "64Mi");
            assert_eq!((configuration.completion_timeout_per_gib, configuration.allow_post_copy), (Some(20), Some(true)));
            assert_eq!((configuration.allow_auto_converge, configuration.allow_workload_disruption), (Some(false), None));
        }
        assert_eq!(policy.spec.selectors.unwrap().virtual_machine_instance_selector["app"], "db");
    }
}

#[test]
fn fields_of_another_shape_count_as_absent() {
    let odd = json!({
        "metadata": { "name": "vm1" }, "spec": { "domain": { "memory": { "guest": ["4Gi"] }, "resources": 7, "devices": { "gpus": "none" } } },
        "status": { "phase": 1, "nodeName": null, "activePods": [], "conditions": {}, "migrationState": { "startTimestamp": "yesterday", "completed": "yes" } }
    });
    let vmi: VirtualMachineInstance = read(&odd);
    assert_eq!((vmi.status.phase.as_str(), vmi.pod_uid(), vmi.spec.domain.memory.guest.as_ref()), ("", None, None));
    assert!(vmi.status.conditions.is_empty() && vmi.status.migration_state.unwrap().start_timestamp.is_none());
    for empty in [json!({ "metadata": {} }), json!({ "metadata": {}, "spec": null, "status": null })] {
        assert_eq!(read::<VirtualMachineInstance>(&empty), VirtualMachineInstance::default());
        assert_eq!(read::<KubeVirt>(&empty), KubeVirt::default());
    }
    // A selector that cannot be read selects nothing, rather than everything.
    let policy: MigrationPolicy = read(&json!({ "metadata": {}, "spec": { "selectors": { "namespaceSelector": { "a": 1 } } } }));
    assert_eq!(policy.spec.selectors, None);
}

#[test]
fn paths_are_kubevirts() {
    assert_eq!(
        VirtualMachineInstance::url_path(&(), Some("shop")),
        "/apis/kubevirt.io/v1/namespaces/shop/virtualmachineinstances"
    );
    assert_eq!(VirtualMachineInstanceMigration::url_path(&(), None), "/apis/kubevirt.io/v1/virtualmachineinstancemigrations");
    assert_eq!(KubeVirt::url_path(&(), None), "/apis/kubevirt.io/v1/kubevirts");
    assert_eq!(MigrationPolicy::url_path(&(), None), "/apis/migrations.kubevirt.io/v1alpha1/migrationpolicies");
    assert_eq!(Namespace::url_path(&(), None), "/api/v1/namespaces");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-zA-Z]{1,6}", inner, 0..4).prop_map(|map| map.into_iter().collect())
        ]
    })
}

proptest! {
    /// Any part of an object may be anything: it is still read.
    #[test]
    fn nothing_in_spec_or_status_makes_an_object_unreadable(at in 0..12_usize, odd in any_json()) {
        let pointers = [
            "/spec", "/status", "/spec/domain", "/spec/domain/memory", "/spec/domain/memory/guest", "/spec/domain/resources/requests",
            "/spec/domain/devices/hostDevices", "/status/phase", "/status/activePods", "/status/conditions", "/status/conditions/0/type", "/status/migrationState",
        ];
        let mut object = vmi();
        *object.pointer_mut(pointers[at]).unwrap() = odd;
        let read: VirtualMachineInstance = read(&object);
        prop_assert_eq!(read.metadata.name.as_deref(), Some("vm1"));
    }
}
