//! KubeVirt's objects, as far as we read them (KubeVirt 1.9, `staging/src/kubevirt.io/api/core/v1/types.go`).
//!
//! In: whatever an API server has stored, of any version. Unknown fields are ignored, a known field of an unknown shape
//! counts as absent, numbers may be text. These types know a fraction of each object: **they are never written back**.

mod configuration;

use std::collections::BTreeMap;

use k8s_openapi::{
    ClusterResourceScope, NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::Resource;
use serde::{Deserialize, Deserializer};

pub use self::configuration::{
    DeveloperConfiguration, Experimental, KubeVirt, KubeVirtConfiguration, KubeVirtSpec, MigrationConfiguration, MigrationPolicy,
    MigrationPolicySpec,
};
use super::{
    fingerprint,
    scalar::{Quantity, lenient},
};

macro_rules! resource {
    ($type:ident, $scope:ident, $group:literal, $version:literal, $plural:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                stringify!($type).into()
            }
            fn group((): &()) -> std::borrow::Cow<'_, str> {
                $group.into()
            }
            fn version((): &()) -> std::borrow::Cow<'_, str> {
                $version.into()
            }
            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource!(VirtualMachineInstance, NamespaceResourceScope, "kubevirt.io", "v1", "virtualmachineinstances");
resource!(VirtualMachineInstanceMigration, NamespaceResourceScope, "kubevirt.io", "v1", "virtualmachineinstancemigrations");
resource!(KubeVirt, NamespaceResourceScope, "kubevirt.io", "v1", "kubevirts");
resource!(MigrationPolicy, ClusterResourceScope, "migrations.kubevirt.io", "v1alpha1", "migrationpolicies");

/// A running VM.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct VirtualMachineInstance {
    /// Name, labels, UID.
    pub metadata: ObjectMeta,
    /// What it is.
    #[serde(deserialize_with = "spec")]
    pub spec: VmiSpec,
    /// Where it runs.
    #[serde(deserialize_with = "lenient")]
    pub status: VmiStatus,
}

/// `spec` of a VirtualMachineInstance.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VmiSpec {
    /// Labels that its node has to have.
    #[serde(deserialize_with = "lenient")]
    pub node_selector: BTreeMap<String, String>,
    /// The machine.
    #[serde(deserialize_with = "lenient")]
    pub domain: Domain,
    /// Of the whole spec, with all that is not read here: it is another one as soon as anything of the machine changes.
    #[serde(skip)]
    pub fingerprint: String,
}

/// Reads what we know, and remembers the rest by its fingerprint.
fn spec<'de, D: Deserializer<'de>>(deserializer: D) -> Result<VmiSpec, D::Error> {
    let Some(whole) = Option::<serde_json::Value>::deserialize(deserializer)? else { return Ok(VmiSpec::default()) };
    let known: VmiSpec = serde_json::from_value(whole.clone()).unwrap_or_default();
    Ok(VmiSpec { fingerprint: fingerprint::of_json(whole), ..known })
}

/// `spec.domain`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Domain {
    /// Its processors.
    #[serde(deserialize_with = "lenient")]
    pub cpu: Cpu,
    /// Memory of the guest.
    #[serde(deserialize_with = "lenient")]
    pub memory: Memory,
    /// What the pod asks for.
    #[serde(deserialize_with = "lenient")]
    pub resources: Resources,
    /// Devices of the host that are passed through.
    #[serde(deserialize_with = "lenient")]
    pub devices: Devices,
}

/// `spec.domain.cpu`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Cpu {
    /// Each has a processor of the host to itself.
    #[serde(deserialize_with = "lenient")]
    pub dedicated_cpu_placement: bool,
    /// How many sockets; one when absent.
    #[serde(deserialize_with = "lenient")]
    pub sockets: Option<u64>,
    /// Cores of each; one when absent.
    #[serde(deserialize_with = "lenient")]
    pub cores: Option<u64>,
    /// Threads of each; one when absent.
    #[serde(deserialize_with = "lenient")]
    pub threads: Option<u64>,
}

/// `spec.domain.memory`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// What the guest sees.
    #[serde(deserialize_with = "lenient")]
    pub guest: Option<Quantity>,
}

/// `spec.domain.resources`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// By resource name.
    #[serde(deserialize_with = "lenient")]
    pub requests: BTreeMap<String, Quantity>,
    /// The most it may use, by resource name.
    #[serde(deserialize_with = "lenient")]
    pub limits: BTreeMap<String, Quantity>,
}

/// `spec.domain.devices`, what passes through the host's devices.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Devices {
    /// Host devices (VFIO).
    #[serde(deserialize_with = "lenient")]
    pub host_devices: Vec<serde_json::Value>,
    /// GPUs (VFIO).
    #[serde(deserialize_with = "lenient")]
    pub gpus: Vec<serde_json::Value>,
}

/// `status` of a VirtualMachineInstance.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VmiStatus {
    /// `Running` and others.
    #[serde(deserialize_with = "lenient")]
    pub phase: String,
    /// The node it runs on.
    #[serde(deserialize_with = "lenient")]
    pub node_name: String,
    /// UIDs of its virt-launcher pods, each with its node.
    #[serde(deserialize_with = "lenient")]
    pub active_pods: BTreeMap<String, String>,
    /// `LiveMigratable`, `Paused`, ….
    #[serde(deserialize_with = "lenient")]
    pub conditions: Vec<Condition>,
    /// `LiveMigration` or `BlockMigration`.
    #[serde(deserialize_with = "lenient")]
    pub migration_method: String,
    /// The node that it is to leave: KubeVirt makes migrations of it until it has.
    #[serde(deserialize_with = "lenient")]
    pub evacuation_node_name: String,
    /// Volumes that move with it.
    #[serde(deserialize_with = "lenient")]
    pub migrated_volumes: Vec<serde_json::Value>,
    /// Its volumes, and how far those are that are plugged in or out.
    #[serde(deserialize_with = "lenient")]
    pub volume_status: Vec<VolumeStatus>,
    /// The migration in flight, else the last one.
    #[serde(deserialize_with = "lenient")]
    pub migration_state: Option<MigrationState>,
}

/// One of `status.volumeStatus`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VolumeStatus {
    /// It was plugged in while the VM ran, or will be.
    #[serde(deserialize_with = "lenient")]
    pub hotplug_volume: Option<serde_json::Value>,
    /// From `Pending` to `Ready`, and back to `UnMountedFromPod`.
    #[serde(deserialize_with = "lenient")]
    pub phase: String,
}

/// KubeVirt's conditions (their timestamps may be null, unlike Kubernetes' own).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// Which.
    #[serde(rename = "type", deserialize_with = "lenient")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    #[serde(deserialize_with = "lenient")]
    pub status: String,
    /// Why.
    #[serde(deserialize_with = "lenient")]
    pub reason: String,
    /// Why, in words.
    #[serde(deserialize_with = "lenient")]
    pub message: String,
}

/// `status.migrationState`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MigrationState {
    /// UID of the VirtualMachineInstanceMigration.
    #[serde(deserialize_with = "lenient")]
    pub migration_uid: String,
    /// When memory began to move.
    #[serde(deserialize_with = "lenient")]
    pub start_timestamp: Option<Time>,
    /// When it ended.
    #[serde(deserialize_with = "lenient")]
    pub end_timestamp: Option<Time>,
    /// It is over.
    #[serde(deserialize_with = "lenient")]
    pub completed: bool,
    /// It went wrong.
    #[serde(deserialize_with = "lenient")]
    pub failed: bool,
    /// How it went wrong.
    #[serde(deserialize_with = "lenient")]
    pub failure_reason: String,
    /// `PreCopy`, `PostCopy` or `Paused`.
    #[serde(deserialize_with = "lenient")]
    pub mode: String,
    /// The MigrationPolicy that it runs under; empty: none.
    #[serde(deserialize_with = "lenient")]
    pub migration_policy_name: String,
    /// The configuration that it runs under, as it was when it was handed over.
    #[serde(deserialize_with = "lenient")]
    pub migration_configuration: Option<MigrationConfiguration>,
    /// The node that it leaves.
    #[serde(deserialize_with = "lenient")]
    pub source_node: String,
    /// The node that it goes to.
    #[serde(deserialize_with = "lenient")]
    pub target_node: String,
}

impl VirtualMachineInstance {
    /// Is this condition `True`?
    pub fn is(&self, condition: &str) -> bool {
        self.condition(condition).is_some_and(|condition| condition.status == "True")
    }

    /// The condition of that type.
    pub fn condition(&self, type_: &str) -> Option<&Condition> {
        self.status.conditions.iter().find(|condition| condition.type_ == type_)
    }

    /// Its memory moves.
    pub fn is_migrating(&self) -> bool {
        let state = self.status.migration_state.as_ref();
        state.is_some_and(|state| state.start_timestamp.is_some() && state.end_timestamp.is_none() && !state.completed)
    }

    /// A volume is on its way into the VM, or out of it.
    pub fn is_hotplugging(&self) -> bool {
        self.status.volume_status.iter().any(|volume| volume.hotplug_volume.is_some() && volume.phase != "Ready")
    }

    /// UID of the pod that runs the VM now: of the active pods, the one on its node.
    pub fn pod_uid(&self) -> Option<&str> {
        let mut here =
            self.status.active_pods.iter().filter(|(_, node)| **node == self.status.node_name).map(|(uid, _)| uid.as_str());
        // Two on one node would be a guess.
        here.next().filter(|_| here.next().is_none())
    }
}

/// A request to move a VM.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct VirtualMachineInstanceMigration {
    /// Name, annotations, UID.
    pub metadata: ObjectMeta,
    /// What to move.
    #[serde(deserialize_with = "lenient")]
    pub spec: VmimSpec,
    /// How far it is.
    #[serde(deserialize_with = "lenient")]
    pub status: VmimStatus,
}

/// `spec` of a VirtualMachineInstanceMigration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VmimSpec {
    /// The VM.
    #[serde(deserialize_with = "lenient")]
    pub vmi_name: String,
    /// It goes to another cluster.
    #[serde(deserialize_with = "lenient")]
    pub send_to: Option<serde_json::Value>,
    /// It comes from another cluster.
    #[serde(deserialize_with = "lenient")]
    pub receive: Option<serde_json::Value>,
}

/// `status` of a VirtualMachineInstanceMigration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VmimStatus {
    /// From `Pending` to `Succeeded` or `Failed`.
    #[serde(deserialize_with = "lenient")]
    pub phase: String,
    /// Copied from the VM when final.
    #[serde(deserialize_with = "lenient")]
    pub migration_state: Option<MigrationState>,
}

impl VirtualMachineInstanceMigration {
    /// It is over.
    pub fn is_final(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// It moves a VM of this cluster, or is about to. One that comes in from another cluster moves none of here.
    pub fn is_under_way(&self) -> bool {
        !self.is_final() && self.spec.receive.is_none()
    }
}
