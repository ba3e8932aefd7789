//! What should be asked about a VM: from the VM, KubeVirt's configuration, the policies and what has been learned of its node to
//! the spec of its MigrationForecast. Pure.
//!
//! Admission computes the same: an answer to any other question does not count.

use std::time::Duration;

use kube::{Resource, ResourceExt};

use super::dry_run;
use crate::{
    api::{
        MigrationForecast, MigrationForecastSpec, PredictionPolicy,
        dry_run::Compression,
        forecast::{BandwidthSource, BudgetEnd, HostConstants},
        kubevirt::{KubeVirt, MigrationConfiguration, MigrationPolicy, VirtualMachineInstance},
        migration::Hint,
        names::{NODE_LABEL, hint},
        policy::{LearnedBandwidth, Mode},
        remedy::{Remedy, RemedyType},
        scalar::Quantity,
    },
    model::{
        kubevirt::{DEFAULT_COMPLETION_TIMEOUT_PER_GIB, time_budget},
        units::{Bandwidth, Bytes, BytesPerSecond},
    },
};

/// QEMU's default, which KubeVirt leaves alone unless its gate `MigrationStallDetection` is on.
const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// KubeVirt's defaults (`virt-config.go`).
const OUTBOUND_PER_NODE: usize = 2;
const PER_CLUSTER: usize = 5;

/// The gate of KubeVirt's stall detector.
const STALL_DETECTION: &str = "MigrationStallDetection";

const MIB: u64 = 1 << 20;

/// KubeVirt's configuration as it would reach a migration of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effective {
    /// QEMU's cap.
    pub bandwidth: Bandwidth,
    /// Where it comes from.
    pub source: BandwidthSource,
    /// Seconds per 10⁹ bytes.
    pub completion_timeout_per_gib: u64,
    /// What happens when the budget ends.
    pub when_budget_ends: BudgetEnd,
    /// The guest is throttled.
    pub auto_converge: bool,
    /// KubeVirt's stall detector is on (its gate `MigrationStallDetection`): it heeds `maxDowntimeMs`.
    pub stall_detection: bool,
    /// Pages are compressed. No part of the question: the model does not know of it, a dry run does.
    pub compression: Compression,
}

/// The configuration of the cluster, with the fields that the winning MigrationPolicy sets laid over it (KubeVirt 1.9,
/// `migrationpolicy.go`). What cannot be read counts as absent.
pub fn effective(cluster: Option<&KubeVirt>, policy: Option<&MigrationPolicy>) -> Effective {
    let default = MigrationConfiguration::default();
    let below = cluster.map_or(&default, |kubevirt| &kubevirt.spec.configuration.migrations);
    let above = policy.map_or(&default, |policy| &policy.spec.configuration);

    let rate = |configuration: &MigrationConfiguration| {
        configuration.bandwidth_per_migration.as_ref().and_then(|quantity| quantity.rate().ok())
    };
    let (rate, source) = match (rate(above), rate(below)) {
        (Some(rate), _) => (rate, BandwidthSource::MigrationPolicy),
        (None, rate) => (rate.unwrap_or_default(), BandwidthSource::MigrationConfiguration),
    };
    let bandwidth = whole_mebibytes(rate);

    let post_copy = above.allow_post_copy.or(below.allow_post_copy).unwrap_or(false);
    // Where a level sets post-copy and says nothing of disruption, disruption follows.
    let of = |level: &MigrationConfiguration| level.allow_workload_disruption.or(level.allow_post_copy);
    let disruption = of(above).or(of(below)).unwrap_or(false);
    Effective {
        bandwidth,
        source: if bandwidth == Bandwidth::Unlimited { BandwidthSource::Unlimited } else { source },
        completion_timeout_per_gib: above
            .completion_timeout_per_gib
            .or(below.completion_timeout_per_gib)
            .unwrap_or(DEFAULT_COMPLETION_TIMEOUT_PER_GIB),
        when_budget_ends: match (disruption, post_copy) {
            (true, true) => BudgetEnd::PostCopy,
            (true, false) => BudgetEnd::Pause,
            (false, _) => BudgetEnd::Abort,
        },
        stall_detection: cluster.is_some_and(|kubevirt| {
            let gates = &kubevirt.spec.configuration.developer_configuration.feature_gates;
            gates.iter().any(|gate| gate == STALL_DETECTION)
        }),
        auto_converge: above.allow_auto_converge.or(below.allow_auto_converge).unwrap_or(false),
        // KubeVirt reads it from a policy only.
        compression: match &above.experimental {
            Some(experimental) if experimental.compression == "zstd" => Compression::Zstd,
            _ => Compression::None,
        },
    }
}

/// How many migrations KubeVirt lets run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `parallelOutboundMigrationsPerNode`.
    pub per_node: usize,
    /// `parallelMigrationsPerCluster`.
    pub at_once: usize,
}

/// The limits of the cluster, KubeVirt's defaults where nothing is configured.
pub fn limits(cluster: Option<&KubeVirt>) -> Limits {
    let configured = cluster.map(|kubevirt| &kubevirt.spec.configuration.migrations);
    let number = |of: fn(&MigrationConfiguration) -> Option<u64>, default| {
        configured.and_then(of).map_or(default, |number| usize::try_from(number).unwrap_or(usize::MAX))
    };
    Limits {
        per_node: number(|it| it.parallel_outbound_migrations_per_node, OUTBOUND_PER_NODE),
        at_once: number(|it| it.parallel_migrations_per_cluster, PER_CLUSTER),
    }
}

/// KubeVirt hands libvirt whole MiB/s, rounded to the nearest, at least one (`vcpu.go`).
fn whole_mebibytes(rate: BytesPerSecond) -> Bandwidth {
    match rate.0 {
        0 => Bandwidth::Unlimited,
        bytes => Bandwidth::Capped(BytesPerSecond((bytes.saturating_add(MIB / 2) / MIB).max(1).saturating_mul(MIB))),
    }
}

/// What to do about a VM's forecast.
#[derive(Debug, Clone, PartialEq)]
pub enum Desired {
    /// Ask this.
    Ask(Box<MigrationForecastSpec>),
    /// Leave what there is: the VM's state is in between (it starts, or hands over).
    Wait,
    /// Nothing is to be asked any more: it does not run, or can never migrate.
    Nothing,
}

/// What should be asked about this VM now. `learned`: of the node that it is on; the line of it counts only where the policy says so.
pub fn desired(
    vmi: &VirtualMachineInstance,
    effective: &Effective,
    policy: Option<&PredictionPolicy>,
    learned: Option<&HostConstants>,
) -> Desired {
    match vmi.status.phase.as_str() {
        "Running" => {}
        "Succeeded" | "Failed" => return Desired::Nothing,
        _ => return Desired::Wait,
    }
    let outside_model = outside_model(vmi);
    // Block migrations are told apart by their own reason; every other obstacle means that KubeVirt will not migrate it at all.
    if vmi.condition("LiveMigratable").is_some_and(|condition| condition.status == "False") && outside_model.is_none() {
        return Desired::Nothing;
    }
    let (Some(pod_uid), Some(guest_memory), false) = (vmi.pod_uid(), guest_memory(vmi), vmi.status.node_name.is_empty()) else {
        return Desired::Wait;
    };
    let spec = policy.map(|policy| &policy.spec);
    let uses_line = spec.is_some_and(|spec| spec.learned_bandwidth == LearnedBandwidth::Use);
    let learned = learned.map(|host| HostConstants { line_rate: host.line_rate.clone().filter(|_| uses_line), ..host.clone() });
    let learned = learned.filter(|host| *host != HostConstants::default());
    let (bandwidth, bandwidth_source) = achievable(offered(effective, policy), learned.as_ref());
    Desired::Ask(Box::new(MigrationForecastSpec {
        node_name: vmi.status.node_name.clone(),
        pod_uid: pod_uid.to_owned(),
        guest_memory: guest_memory.into(),
        bandwidth,
        bandwidth_source,
        downtime_limit: DOWNTIME_LIMIT.into(),
        time_budget: time_budget(effective.completion_timeout_per_gib, guest_memory).map(Into::into),
        sla: spec.and_then(|spec| spec.sla),
        cost_weights: spec.and_then(|spec| spec.cost_weights),
        host: learned,
        policy: policy.map(ResourceExt::name_any),
        when_budget_ends: effective.when_budget_ends,
        auto_converge: effective.auto_converge,
        paused: vmi.is("Paused"),
        outside_model: outside_model.map(str::to_owned),
        dry_run: None,
        remedies: remedies(effective, policy),
    }))
}

/// What is asked about remedies: what the policy allows, where it would force a migration, in its order; no more bandwidth than a person's
/// cap, unless the policy says so; a longer downtime only where KubeVirt would heed it.
fn remedies(effective: &Effective, policy: Option<&PredictionPolicy>) -> Vec<Remedy> {
    let Some(policy) = policy.map(|policy| &policy.spec).filter(|policy| policy.mode == Mode::Enforce) else { return Vec::new() };
    let asked = |remedy: &Remedy| match remedy.kind {
        RemedyType::Downtime if !effective.stall_detection => None,
        RemedyType::Bandwidth if !remedy.above_cap => {
            let most = remedy.max_bandwidth.as_ref()?.rate().ok()?;
            let most = effective.bandwidth.cap().map_or(most, |cap| most.min(cap));
            Some(Remedy { max_bandwidth: Some(most.into()), ..remedy.clone() })
        }
        _ => Some(remedy.clone()),
    };
    policy.remedies.iter().filter_map(asked).collect()
}

/// The less of KubeVirt's cap and what the policy says can be counted on.
///
/// What cannot be read in the policy is asked as it stands: the answer is then `InvalidQuestion`, with the words, and not a forecast for
/// a bandwidth that nobody meant.
fn offered(effective: &Effective, policy: Option<&PredictionPolicy>) -> (Quantity, BandwidthSource) {
    let theirs = (effective.bandwidth.into(), effective.source);
    let Some(quantity) = policy.and_then(|policy| policy.spec.bandwidth.as_ref()) else { return theirs };
    match (effective.bandwidth.cap(), quantity.bandwidth().map(Bandwidth::cap)) {
        (_, Err(_)) => (quantity.clone(), BandwidthSource::PredictionPolicy),
        (_, Ok(None)) => theirs,
        (Some(cap), Ok(Some(rate))) if rate >= cap => theirs,
        (_, Ok(Some(rate))) => (Bandwidth::Capped(rate).into(), BandwidthSource::PredictionPolicy),
    }
}

/// No more than earlier migrations achieved. That is the line's, and the question says so of the line, too: downtime goes by it, with
/// a lower cap as well.
fn achievable(offered: (Quantity, BandwidthSource), learned: Option<&HostConstants>) -> (Quantity, BandwidthSource) {
    let line = learned.and_then(|host| host.line_rate.as_ref()?.rate().ok());
    match (line, offered.0.bandwidth().map(Bandwidth::cap)) {
        (Some(line), Ok(cap)) if cap.is_none_or(|cap| line < cap) => (line.into(), BandwidthSource::Learned),
        _ => offered,
    }
}

/// `spec.domain.memory.guest`, else what the pod requests: what KubeVirt's budget counts, too.
pub(super) fn guest_memory(vmi: &VirtualMachineInstance) -> Option<Bytes> {
    let quantity = vmi.spec.domain.memory.guest.as_ref().or_else(|| vmi.spec.domain.resources.requests.get("memory"))?;
    quantity.bytes().ok().filter(|bytes| bytes.0 > 0)
}

/// Why the model does not cover a migration of this VM.
fn outside_model(vmi: &VirtualMachineInstance) -> Option<&'static str> {
    if vmi.status.migration_method == "BlockMigration" {
        Some("its disks move with it (block migration), which the model does not cover")
    } else if !vmi.status.migrated_volumes.is_empty() {
        Some("volumes move with it, which the model does not cover")
    } else if !vmi.spec.domain.devices.host_devices.is_empty() || !vmi.spec.domain.devices.gpus.is_empty() {
        Some("it uses devices of its host (VFIO), whose writes the model does not see")
    } else {
        None
    }
}

/// The whole object as the manager applies it: owned by the VM, labelled for the agent of its node, with the fingerprint of the VM's spec and
/// the hint of a migration that is under way. `None`: the VM has no name or UID yet.
pub fn object(vmi: &VirtualMachineInstance, spec: MigrationForecastSpec, hint: Option<&Hint>) -> Option<MigrationForecast> {
    let mut owner = vmi.owner_ref(&())?;
    // Deleting a VM must not wait for its forecast.
    owner.block_owner_deletion = Some(false);
    let mut forecast = MigrationForecast::new(&owner.name, spec);
    forecast.metadata.namespace = vmi.namespace();
    forecast.metadata.labels = Some([(NODE_LABEL.to_owned(), forecast.spec.node_name.clone())].into());
    let mut annotations = hint.map(Hint::annotations).unwrap_or_default();
    annotations.insert(hint::VMI_SPEC.to_owned(), vmi.spec.fingerprint.clone());
    forecast.metadata.annotations = Some(annotations);
    forecast.metadata.owner_references = Some(vec![owner]);
    Some(forecast)
}

/// Does what is stored differ from what is wanted, in what the manager owns? A dry run that somebody else asks for is theirs.
pub fn differs(stored: Option<&MigrationForecast>, wanted: &MigrationForecast) -> bool {
    let Some(stored) = stored else { return true };
    let dry_run = match (&stored.spec.dry_run, &wanted.spec.dry_run) {
        (Some(stored), None) => dry_run::is_ours(stored),
        (stored, wanted) => stored != wanted,
    };
    // What somebody else asks about stays theirs, where the policy allows nothing.
    let remedies = !wanted.spec.remedies.is_empty() && stored.spec.remedies != wanted.spec.remedies;
    dry_run
        || remedies
        || stored.spec.question_only() != wanted.spec.question_only()
        || [hint::MIGRATION, hint::PHASE, hint::VMI_SPEC]
            .iter()
            .any(|key| stored.annotations().get(*key) != wanted.annotations().get(*key))
        || stored.labels().get(NODE_LABEL) != wanted.labels().get(NODE_LABEL)
        || wanted.owner_references().iter().any(|wanted| stored.owner_references().iter().all(|stored| stored.uid != wanted.uid))
}

#[cfg(test)]
#[path = "question_tests.rs"]
mod tests;
