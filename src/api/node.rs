//! A node, as far as a plan reads it: may KubeVirt use it, and how large is it.
//!
//! In: whatever an API server has stored; a known field of an unknown shape counts as absent. **Never written back.** A type of its own,
//! because a whole one is mostly a list of images.

use std::collections::BTreeMap;

use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::Resource;
use serde::Deserialize;

use super::scalar::{Quantity, lenient};

/// Where virt-handler says that KubeVirt may use the node.
const SCHEDULABLE: &str = "kubevirt.io/schedulable";

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Name, labels.
    pub metadata: ObjectMeta,
    /// Is it open?
    #[serde(deserialize_with = "lenient")]
    pub spec: NodeSpec,
    /// How large is it?
    #[serde(deserialize_with = "lenient")]
    pub status: NodeStatus,
}

/// `spec` of a node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// Cordoned.
    #[serde(deserialize_with = "lenient")]
    pub unschedulable: bool,
}

/// `status` of a node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// What pods may have, by resource name.
    #[serde(deserialize_with = "lenient")]
    pub allocatable: BTreeMap<String, Quantity>,
}

impl Node {
    /// May KubeVirt put a VM there?
    pub fn is_open(&self) -> bool {
        let labels = self.metadata.labels.as_ref();
        !self.spec.unschedulable && labels.and_then(|labels| labels.get(SCHEDULABLE)).is_some_and(|value| value == "true")
    }
}

impl Resource for Node {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        "Node".into()
    }
    fn group((): &()) -> std::borrow::Cow<'_, str> {
        "".into()
    }
    fn version((): &()) -> std::borrow::Cow<'_, str> {
        "v1".into()
    }
    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        "nodes".into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
