//! The policy that forces a migration: it wins by KubeVirt's rule, and changes no more than it has to.
#![allow(clippy::unwrap_used)]

use serde_json::from_value;

use super::*;
use crate::{api::scalar::Quantity, model::forecast::Verdict};

fn remedy(kind: RemedyType) -> RemedyAnswer {
    RemedyAnswer { verdict: Verdict::Converges, ..RemedyAnswer::unknown(kind, "") }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn wild(labels: &BTreeMap<String, String>) -> VirtualMachineInstance {
    from_value(json!({ "metadata": { "name": "wild", "namespace": "shop", "labels": labels } })).unwrap()
}

/// Whatever a person's policy selects by, ours is the one that KubeVirt takes.
#[test]
fn ours_outscores_a_persons() {
    let own = [("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"), ("e", "5"), (kubevirt::NODE, "node-1")];
    let before = labels(&own);
    let vmi = labels(&[&own[..], &[(FORCE_LABEL, "uid-m")]].concat());
    let namespace = labels(&[(NAMESPACE_NAME, "shop"), ("team", "x"), ("zone", "1")]);
    let of_vmi = |count: usize| -> Value {
        let keys = ["a", "b", "c", "d", "e"].into_iter().take(count);
        keys.map(|key| (key.to_owned(), json!(vmi[key]))).collect::<Map<_, _>>().into()
    };
    for selectors in [
        Value::Null,
        json!({}),
        json!({ "virtualMachineInstanceSelector": of_vmi(1) }),
        json!({ "virtualMachineInstanceSelector": of_vmi(2) }),
        json!({ "virtualMachineInstanceSelector": of_vmi(5) }),
        json!({ "namespaceSelector": { "team": "x" } }),
        json!({ "namespaceSelector": { "team": "x", "zone": "1", NAMESPACE_NAME: "shop" } }),
        json!({ "namespaceSelector": { "team": "x", "zone": "1" }, "virtualMachineInstanceSelector": of_vmi(5) }),
    ] {
        let person = json!({ "metadata": { "name": "aaa" }, "spec": { "selectors": selectors, "allowPostCopy": false } });
        let winner = (!selectors.is_null()).then_some(&person);
        let ours = policy(winner, &wild(&before), "uid-m", &remedy(RemedyType::AutoConverge));
        let policies: Vec<Arc<MigrationPolicy>> =
            [person.clone(), ours].into_iter().map(|object| Arc::new(from_value(object).unwrap())).collect();
        assert!(is_in_force(policies.clone(), &namespace, &vmi, "uid-m"), "{selectors}");
        // Without the label, and in another namespace, it is nobody's.
        assert!(!is_in_force(policies.clone(), &namespace, &before, "uid-m"), "{selectors}");
        // Somebody has put the label on a VM of another node.
        let mut caught = vmi.clone();
        caught.insert(kubevirt::NODE.to_owned(), "node-2".to_owned());
        assert!(!is_in_force(policies.clone(), &namespace, &caught, "uid-m"), "{selectors}");
        assert!(!is_in_force(policies, &labels(&[(NAMESPACE_NAME, "other")]), &vmi, "uid-m"), "{selectors}");
    }
}

#[test]
fn it_takes_over_what_it_does_not_change() {
    let person = json!({
        "metadata": { "name": "gold", "uid": "x", "resourceVersion": "7" },
        "spec": {
            "selectors": { "virtualMachineInstanceSelector": { "tier": "gold" } }, "allowAutoConverge": false, "someday": { "more": [1, 2] },
            "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": 20
        }
    });
    let cases = [
        (
            RemedyAnswer { completion_timeout_per_gib: Some(120), ..remedy(RemedyType::TimeBudget) },
            json!({ "completionTimeoutPerGiB": 120 }),
        ),
        (remedy(RemedyType::AutoConverge), json!({ "allowAutoConverge": true })),
        (
            RemedyAnswer { bandwidth: Some(Quantity("200Mi".into())), ..remedy(RemedyType::Bandwidth) },
            json!({ "bandwidthPerMigration": "200Mi" }),
        ),
        (
            RemedyAnswer { max_downtime: Some("750ms".parse().unwrap()), ..remedy(RemedyType::Downtime) },
            json!({ "maxDowntimeMs": 750 }),
        ),
        (
            RemedyAnswer { completion_timeout_per_gib: Some(5), ..remedy(RemedyType::PostCopy) },
            json!({ "allowPostCopy": true, "allowWorkloadDisruption": true, "completionTimeoutPerGiB": 5 }),
        ),
    ];
    for (remedy, changed) in cases {
        let ours = policy(Some(&person), &wild(&labels(&[(kubevirt::NODE, "node-1")])), "uid-m", &remedy);
        let mut expected = person["spec"].clone();
        json_patch::merge(&mut expected, &changed);
        expected["selectors"] = json!({
            "virtualMachineInstanceSelector": { "tier": "gold", FORCE_LABEL: "uid-m", kubevirt::NODE: "node-1" },
            "namespaceSelector": { NAMESPACE_NAME: "shop" }
        });
        assert_eq!(ours["spec"], expected, "{remedy:?}");
        assert_eq!(ours["metadata"], json!({ "name": "migvisor-uid-m", "annotations": { FORCED_VM: "shop/wild" } }));
        let read: MigrationPolicy = from_value(ours).unwrap();
        assert!(is_ours(&read) && vm_of(&read) == Some(("shop", "wild")));
    }
    let nowhere = policy(None, &wild(&labels(&[])), "uid-m", &remedy(RemedyType::AutoConverge));
    assert_eq!(nowhere["spec"]["selectors"]["virtualMachineInstanceSelector"], json!({ FORCE_LABEL: "uid-m" }));
    let theirs: MigrationPolicy = from_value(json!({ "metadata": { "name": "migvisor-like" } })).unwrap();
    assert!(!is_ours(&theirs), "a person may call a policy so");
}

#[test]
fn it_has_served_once_kubevirt_has_taken_a_policy() {
    let migration = |phase: &str| -> VirtualMachineInstanceMigration {
        from_value(json!({ "metadata": { "uid": "uid-m" }, "spec": { "vmiName": "wild" }, "status": { "phase": phase } }))
            .unwrap()
    };
    let vmi = |uid: &str, policy: &str| -> VirtualMachineInstance {
        from_value(json!({ "status": { "migrationState": { "migrationUid": uid, "migrationPolicyName": policy } } })).unwrap()
    };
    let of = |phase: Option<&str>, vmi: Option<&VirtualMachineInstance>| served("uid-m", phase.map(migration).as_ref(), vmi);
    assert_eq!(of(Some("Scheduling"), None), Served::NotYet);
    assert_eq!(of(Some("Scheduling"), Some(&vmi("before", "gold"))), Served::NotYet, "that is the last migration's");
    assert_eq!(of(Some("PreparingTarget"), Some(&vmi("uid-m", "migvisor-uid-m"))), Served::Applied);
    assert_eq!(of(Some("Running"), Some(&vmi("uid-m", "gold"))), Served::Missed("gold".into()));
    assert_eq!(of(Some("Running"), Some(&vmi("uid-m", ""))), Served::Missed(String::new()));
    assert_eq!(of(Some("Failed"), None), Served::Over);
    assert_eq!(of(None, None), Served::Over);
}
