//! How KubeVirt is configured, as far as we read it: the KubeVirt CR, and the MigrationPolicies that override it. Read as leniently as the rest.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use crate::api::{
    policy::{Selecting, Selectors},
    scalar::{Quantity, lenient, lenient_u64},
};

/// The configuration of KubeVirt.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct KubeVirt {
    /// Name.
    pub metadata: ObjectMeta,
    /// What is configured.
    #[serde(deserialize_with = "lenient")]
    pub spec: KubeVirtSpec,
}

/// `spec` of a KubeVirt.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct KubeVirtSpec {
    /// What is configured.
    #[serde(deserialize_with = "lenient")]
    pub configuration: KubeVirtConfiguration,
}

/// `spec.configuration`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct KubeVirtConfiguration {
    /// What is tried out.
    #[serde(rename = "developerConfiguration", deserialize_with = "lenient")]
    pub developer_configuration: DeveloperConfiguration,
    /// How migrations run.
    #[serde(deserialize_with = "lenient")]
    pub migrations: MigrationConfiguration,
}

/// `spec.configuration.developerConfiguration`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct DeveloperConfiguration {
    /// The gates that are open.
    #[serde(deserialize_with = "lenient")]
    pub feature_gates: Vec<String>,
}

/// `spec.configuration.migrations`; what is absent has KubeVirt's default.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MigrationConfiguration {
    /// Bytes per second; 0 is no cap.
    #[serde(deserialize_with = "lenient")]
    pub bandwidth_per_migration: Option<Quantity>,
    /// So many run at the same time. Of the cluster's configuration only.
    #[serde(deserialize_with = "lenient_u64", skip_serializing)]
    pub parallel_migrations_per_cluster: Option<u64>,
    /// So many leave one node at the same time. Of the cluster's configuration only.
    #[serde(deserialize_with = "lenient_u64", skip_serializing)]
    pub parallel_outbound_migrations_per_node: Option<u64>,
    /// Seconds per 10⁹ bytes; 0 switches the budget off.
    #[serde(rename = "completionTimeoutPerGiB", deserialize_with = "lenient_u64")]
    pub completion_timeout_per_gib: Option<u64>,
    /// Throttle the guest.
    #[serde(deserialize_with = "lenient")]
    pub allow_auto_converge: Option<bool>,
    /// Switch to post-copy when the budget is over.
    #[serde(deserialize_with = "lenient")]
    pub allow_post_copy: Option<bool>,
    /// Switch to post-copy or pause the guest when the budget is over; as `allow_post_copy` when absent.
    #[serde(deserialize_with = "lenient")]
    pub allow_workload_disruption: Option<bool>,
    /// What KubeVirt only tries out; it reads it from a MigrationPolicy alone.
    #[serde(deserialize_with = "lenient", skip_serializing_if = "Option::is_none")]
    pub experimental: Option<Experimental>,
}

/// `experimental` of a MigrationPolicy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Experimental {
    /// `none` or `zstd`.
    #[serde(deserialize_with = "lenient")]
    pub compression: String,
}

/// Overrides the configuration for the VMs that it selects (`migrations.kubevirt.io`, cluster-scoped).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct MigrationPolicy {
    /// Name.
    pub metadata: ObjectMeta,
    /// What it overrides, and where.
    #[serde(deserialize_with = "lenient")]
    pub spec: MigrationPolicySpec,
}

/// `spec` of a MigrationPolicy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct MigrationPolicySpec {
    /// Which VMs; absent: none.
    #[serde(deserialize_with = "lenient")]
    pub selectors: Option<Selectors>,
    /// What it says instead.
    #[serde(flatten)]
    pub configuration: MigrationConfiguration,
}

impl Selecting for MigrationPolicy {
    fn selectors(&self) -> Option<&Selectors> {
        self.spec.selectors.as_ref()
    }
}
