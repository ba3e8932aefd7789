//! Is there a node at all that a VM would fit on? Pure.
//!
//! In: the VM, all nodes. Out: why there is none. Only what would hold even if every other node were empty counts: closed nodes, the VM's
//! `nodeSelector`, and what a node may give to pods beside what the VM alone needs. Affinities, taints and who is there already do not: a
//! VM that passes may still wait for a place.

use std::{borrow::Borrow, collections::BTreeMap};

use kube::ResourceExt;

use crate::{
    api::{kubevirt::VirtualMachineInstance, node::Node},
    manager::question,
};

/// Why no other node can take the VM; `None`: one might, or the nodes are not known.
pub fn lacking<N: Borrow<Node>>(vmi: &VirtualMachineInstance, nodes: &[N]) -> Option<String> {
    let labels =
        |node: &Node, wanted: &BTreeMap<String, String>| wanted.iter().all(|(key, value)| node.labels().get(key) == Some(value));
    let (mut others, mut closed, mut unlike, mut small) = (0, 0, 0, 0);
    for node in nodes.iter().map(Borrow::borrow).filter(|node| node.name_any() != vmi.status.node_name) {
        others += 1;
        if !node.is_open() {
            closed += 1;
        } else if !labels(node, &vmi.spec.node_selector) {
            unlike += 1;
        } else if !is_large_enough(vmi, node) {
            small += 1;
        } else {
            return None;
        }
    }
    (!nodes.is_empty()).then(|| match others {
        0 => "there is no other node".to_owned(),
        _ => format!(
            "no other node can take it: of {others}, {closed} are cordoned or not KubeVirt's, {unlike} lack the labels of its \
             nodeSelector, {small} are too small even when empty"
        ),
    })
}

fn is_large_enough(vmi: &VirtualMachineInstance, node: &Node) -> bool {
    let (has, wants) = (&node.status.allocatable, &vmi.spec.domain.resources.requests);
    // What a node does not tell, or nobody can read, hinders nobody.
    let memory = has.get("memory").and_then(|quantity| quantity.bytes().ok());
    let cpu = has.get("cpu").and_then(|quantity| quantity.processors().ok());
    let requested = wants.get("cpu").and_then(|quantity| quantity.processors().ok()).unwrap_or_default();
    memory.is_none_or(|memory| memory >= question::guest_memory(vmi).unwrap_or_default())
        && cpu.is_none_or(|cpu| cpu >= requested)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, labels: &Value, unschedulable: bool, memory: &str) -> Node {
        let status = json!({ "allocatable": { "memory": memory, "cpu": "4" }, "images": ["x"] });
        let mut node = json!({ "metadata": { "name": name, "labels": { "kubevirt.io/schedulable": "true" } }, "spec": { "unschedulable": unschedulable }, "status": status });
        json_patch::merge(&mut node["metadata"]["labels"], labels);
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn a_vm_needs_an_open_node_with_its_labels_that_is_large_enough() {
        let vmi = |cpu: &str| -> VirtualMachineInstance {
            let domain = json!({ "memory": { "guest": "8Gi" }, "resources": { "requests": { "cpu": cpu } } });
            let vmi = json!({ "spec": { "nodeSelector": { "zone": "1" }, "domain": domain }, "status": { "nodeName": "own" } });
            serde_json::from_value(vmi).unwrap()
        };
        let zone = json!({ "zone": "1" });
        let mut nodes = vec![
            node("own", &zone, false, "64Gi"),
            node("cordoned", &zone, true, "64Gi"),
            node("not-kubevirts", &json!({ "zone": "1", "kubevirt.io/schedulable": "false" }), false, "64Gi"),
            node("elsewhere", &json!({ "zone": "2" }), false, "64Gi"),
            node("small", &zone, false, "4Gi"),
        ];
        let words = lacking(&vmi("2"), &nodes).unwrap();
        assert_eq!(
            words,
            "no other node can take it: of 4, 2 are cordoned or not KubeVirt's, 1 lack the labels of its nodeSelector, 1 are too small even when empty"
        );
        assert_eq!(lacking(&vmi("2"), &nodes[..1]).as_deref(), Some("there is no other node"));
        assert_eq!(lacking::<Node>(&vmi("2"), &[]), None, "nobody knows");
        nodes.push(node("fits", &zone, false, "8Gi"));
        assert_eq!((lacking(&vmi("2"), &nodes), lacking(&vmi("5"), &nodes).is_some()), (None, true));
        nodes.push(
            serde_json::from_value(
                json!({ "metadata": { "name": "silent", "labels": { "kubevirt.io/schedulable": "true", "zone": "1" } } }),
            )
            .unwrap(),
        );
        assert_eq!(lacking(&vmi("5"), &nodes), None, "one that tells of no size");
    }
}
