//! Names that other parties see: annotation keys, labels, reasons, field managers.

/// The prefix of every annotation and label of ours.
pub const PREFIX: &str = "migvisor.io/";

/// On a MigrationForecast: the node whose agent answers it. Agents watch by this label.
pub const NODE_LABEL: &str = "migvisor.io/node";

/// On a VirtualMachineInstanceMigration: the UID of the MigrationPlan that it is a part of.
pub const PLAN_LABEL: &str = "migvisor.io/plan";
/// The Lease of the manager that writes, in the controllers' namespace. Agents read it: where nobody renews it, nobody would tell them of a
/// migration either.
pub const LEASE: &str = "migvisor-controller";

/// The manager's field manager: a forecast's metadata and `spec`, `status.outcome`, the conditions `Ready` and `DataStale`.
pub const MANAGER: &str = "migvisor-manager";
/// The agent's field manager for the answer: a forecast's status but for what the next two and the manager write.
pub const AGENT: &str = "migvisor-agent";
/// The agent's field manager for `status.dryRun`. One of its own: progress is written every second, and an apply carries all
/// that its field manager has written, so the answer with its curve would go along each time, or be taken away.
pub const AGENT_DRY_RUN: &str = "migvisor-agent-dry-run";
/// The agent's field manager for `status.inFlight` and `status.lastMigration`, for the same reason.
pub const AGENT_MIGRATION: &str = "migvisor-agent-migration";

/// The scheduling gate on the target pod of a migration that is held. While it is there the pod is not scheduled, and nothing is transferred.
pub const GATE: &str = "migvisor.io/dry-run";

/// On a VirtualMachineInstance, while one of its migrations is forced: the UID of that migration. Our MigrationPolicy selects it by this.
pub const FORCE_LABEL: &str = "migvisor.io/force";
/// On a VirtualMachineInstance that KubeVirt waits to move: when we last told it that it may. Any change of a VM makes KubeVirt try again,
/// which it else does only after a quarter of an hour (1.9).
pub const NUDGE: &str = "migvisor.io/nudge";
/// On a MigrationPolicy of ours: the VM that it is for, `namespace/name`.
pub const FORCED_VM: &str = "migvisor.io/vm";
/// What the names of our MigrationPolicies begin with.
pub const FORCE_PREFIX: &str = "migvisor-";

/// Annotations on a MigrationForecast by which the manager tells the agent what happens to the VM: a migration that is not final, another
/// spec.
///
/// Annotations, because they are neither part of the question nor an answer: the spec would get a new generation, and whoever
/// waits for `status.observedGeneration` would wait for an answer that says the same; the status is the agent's.
pub mod hint {
    /// UID of the VirtualMachineInstanceMigration.
    pub const MIGRATION: &str = "migvisor.io/migration";
    /// `Held` while it waits for a dry run, `Pending` until memory moves, then `Running`.
    pub const PHASE: &str = "migvisor.io/migration-phase";
    /// Fingerprint of the VirtualMachineInstance's spec. Where it changes, something may have to be plugged in, which QEMU refuses during a dry
    /// run. Not the generation: a VMI has no status subresource, so that grows with every write of its status.
    pub const VMI_SPEC: &str = "migvisor.io/vmi-spec";
}

/// Annotations on a VirtualMachineInstanceMigration: plain numbers, times in ms, bandwidths in bytes per second.
pub mod annotation {
    /// `Converges`, `Borderline`, `Fails` or `Unknown`.
    pub const VERDICT: &str = "migvisor.io/verdict";
    /// Why the verdict is what it is: one of [`super::reason`].
    pub const REASON: &str = "migvisor.io/reason";
    /// Who wants the migration, as admission saw it: `Person`, `Evacuation`, `Descheduler` or `WorkloadUpdate`.
    pub const ORIGIN: &str = "migvisor.io/origin";
    /// The share of replays that converged, 0..=1.
    pub const PROBABILITY: &str = "migvisor.io/probability";
    /// `PC` or `DR`.
    pub const METHOD: &str = "migvisor.io/method";
    /// QEMU's downtime, ms.
    pub const DOWNTIME: &str = "migvisor.io/predicted-downtime";
    /// The whole migration, ms.
    pub const TOTAL_TIME: &str = "migvisor.io/predicted-total-time";
    /// QEMU's dirty-sync count.
    pub const ITERATIONS: &str = "migvisor.io/predicted-iterations";
    /// Pages sent.
    pub const DIRTIED_PAGES: &str = "migvisor.io/predicted-dirtied-pages";
    /// `C = a·T_sum + b·T_downtime + c·P`.
    pub const COST: &str = "migvisor.io/predicted-cost";
    /// Bytes per second.
    pub const LCB: &str = "migvisor.io/least-convergent-bandwidth";
    /// The whole forecast as JSON, with the keys of `migvisor predict -o json`.
    pub const FORECAST: &str = "migvisor.io/forecast";
}

/// KubeVirt's annotations and labels that we read.
pub mod kubevirt {
    /// On a VMIM: created by a drain or an eviction.
    pub const EVACUATION: &str = "kubevirt.io/evacuationMigration";
    /// On a VMIM: created by the workload updater.
    pub const WORKLOAD_UPDATE: &str = "kubevirt.io/workloadUpdateMigration";
    /// On a VMI that is to leave its node: who evicted it.
    pub const EVICTION_SOURCE: &str = "kubevirt.io/eviction-source";
    /// The value of [`EVICTION_SOURCE`] for the descheduler.
    pub const DESCHEDULER: &str = "descheduler";
    /// The ServiceAccount of virt-controller, which alone makes migrations for drains and workload updates, in the namespace of the KubeVirt CR.
    pub const CONTROLLER: &str = "kubevirt-controller";
    /// Where KubeVirt is usually installed.
    pub const NAMESPACE: &str = "kubevirt";
    /// On a launcher pod: the VMI's name.
    pub const DOMAIN: &str = "kubevirt.io/domain";
    /// Label of a target pod, and of its hotplug attachment pods: UID of the VMIM.
    pub const MIGRATION_JOB: &str = "kubevirt.io/migrationJobUID";
    /// Label of a launcher pod: UID of the VMI that it was made for.
    pub const CREATED_BY: &str = "kubevirt.io/created-by";
    /// Label of a VMI: the node that it runs on. virt-api lets nobody but KubeVirt change it.
    pub const NODE: &str = "kubevirt.io/nodeName";
    /// Label of every pod of KubeVirt's: what it is.
    pub const COMPONENT: &str = "kubevirt.io";
    /// The value of [`COMPONENT`] for the pods that hold VMs.
    pub const LAUNCHER: &str = "virt-launcher";
}

/// Reasons of verdicts, in `status.reason`: few, in `PascalCase`, fit for a metric's label.
pub mod reason {
    /// It converges within the budget and the SLA.
    pub const WITHIN_BUDGET: &str = "WithinBudget";
    /// It converges, but not within the SLA.
    pub const SLA_EXCEEDED: &str = "SLAExceeded";
    /// Some replays converge within the budget, some do not.
    pub const NEAR_THE_LIMIT: &str = "NearTheLimit";
    /// The guest dirties memory faster than the bandwidth carries, until the budget ends.
    pub const BUDGET_EXCEEDED: &str = "BudgetExceeded";
    /// The guest dirties memory faster than the bandwidth carries, and nothing would ever end the attempt.
    pub const NEVER_CONVERGES: &str = "NeverConverges";
    /// No agent has answered yet.
    pub const NO_ANSWER: &str = "NoAnswer";
    /// The answer is to an older question.
    pub const OUTDATED: &str = "OutdatedAnswer";
    /// The answer is too old.
    pub const STALE: &str = "StaleData";
    /// The VM could not be measured.
    pub const NOT_MEASURED: &str = "NotMeasured";
    /// Block migration, migrated volumes, host devices, `sendTo`: outside the model.
    pub const OUTSIDE_MODEL: &str = "OutsideTheModel";
    /// A plan: a migration of the VM is under way.
    pub const MIGRATING: &str = "AlreadyMigrating";
    /// A plan: there is no node that the VM could go to.
    pub const NO_NODE: &str = "NoNode";
    /// A plan: KubeVirt cannot migrate the VM at all.
    pub const NOT_MIGRATABLE: &str = "NotLiveMigratable";
    /// A dry run: it did not converge within its own deadline.
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    /// The question itself cannot be read.
    pub const BAD_QUESTION: &str = "InvalidQuestion";
}
