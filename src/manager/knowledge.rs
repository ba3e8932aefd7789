//! What a replica knows: the objects that it watches, in memory, and the questions that can be asked of them together.
//!
//! In: reflector stores, filled by [`super::watch`]. Out: the policy and the question of a VM, and decisions. No I/O: admission is
//! answered from here. Every replica has one; only the leader writes.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{api::core::v1::Namespace, jiff::Timestamp};
use kube::{
    Resource, ResourceExt,
    runtime::reflector::{ObjectRef, Store, store::Writer},
};

use super::{
    dry_run::{self, Carriage, Case, Wish},
    question::{self, Desired, Effective},
};
use crate::{
    api::{
        MigrationForecast, MigrationForecastSpec, PredictionPolicy,
        kubevirt::{KubeVirt, MigrationPolicy, VirtualMachineInstance, VirtualMachineInstanceMigration},
        policy::{self, Mode},
    },
    decision::{self, Decision, Input, Origin},
};

/// The readers' side.
#[derive(Debug, Clone)]
pub struct Knowledge {
    /// VMs.
    pub vmis: Store<VirtualMachineInstance>,
    /// Migrations.
    pub migrations: Store<VirtualMachineInstanceMigration>,
    /// Questions and answers.
    pub forecasts: Store<MigrationForecast>,
    /// Our policies.
    pub policies: Store<PredictionPolicy>,
    /// KubeVirt's policies.
    pub migration_policies: Store<MigrationPolicy>,
    /// KubeVirt's configuration.
    pub kubevirts: Store<KubeVirt>,
    /// For their labels.
    pub namespaces: Store<Namespace>,
}

/// The writers' side: what [`super::run`] fills.
#[derive(Debug, Default)]
pub struct Feeds {
    /// VMs.
    pub vmis: Writer<VirtualMachineInstance>,
    /// Migrations.
    pub migrations: Writer<VirtualMachineInstanceMigration>,
    /// Questions and answers.
    pub forecasts: Writer<MigrationForecast>,
    /// Our policies.
    pub policies: Writer<PredictionPolicy>,
    /// KubeVirt's policies.
    pub migration_policies: Writer<MigrationPolicy>,
    /// KubeVirt's configuration.
    pub kubevirts: Writer<KubeVirt>,
    /// For their labels.
    pub namespaces: Writer<Namespace>,
}

/// A decision and what it rests on.
#[derive(Debug, Clone)]
pub struct Judgement {
    /// Allow, warn or deny.
    pub decision: Decision,
    /// The stored forecast, whether it counts or not.
    pub forecast: Option<Arc<MigrationForecast>>,
}

/// Which migration is judged.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// `spec.vmiName`.
    pub vmi_name: &'a str,
    /// It leaves the cluster.
    pub leaves_cluster: bool,
    /// Who wants it.
    pub origin: Origin,
}

impl Knowledge {
    /// Empty stores and the writers that fill them.
    pub fn new() -> (Self, Feeds) {
        let feeds = Feeds::default();
        let knowledge = Self {
            vmis: feeds.vmis.as_reader(),
            migrations: feeds.migrations.as_reader(),
            forecasts: feeds.forecasts.as_reader(),
            policies: feeds.policies.as_reader(),
            migration_policies: feeds.migration_policies.as_reader(),
            kubevirts: feeds.kubevirts.as_reader(),
            namespaces: feeds.namespaces.as_reader(),
        };
        (knowledge, feeds)
    }

    /// Returns once every store has been filled for the first time; never, if the watches ended before.
    pub async fn ready(&self) {
        let all = tokio::join!(
            self.vmis.wait_until_ready(),
            self.migrations.wait_until_ready(),
            self.forecasts.wait_until_ready(),
            self.policies.wait_until_ready(),
            self.migration_policies.wait_until_ready(),
            self.kubevirts.wait_until_ready(),
            self.namespaces.wait_until_ready(),
        );
        if !matches!(all, (Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(()))) {
            std::future::pending::<()>().await;
        }
    }

    /// The VM of that name.
    pub fn vmi(&self, namespace: &str, name: &str) -> Option<Arc<VirtualMachineInstance>> {
        self.vmis.get(&ObjectRef::new(name).within(namespace))
    }

    /// What is stored about the VM of that name.
    pub fn forecast(&self, namespace: &str, name: &str) -> Option<Arc<MigrationForecast>> {
        self.forecasts.get(&ObjectRef::new(name).within(namespace))
    }

    /// The migrations of the VM of that name.
    pub fn migrations_of(&self, namespace: &str, name: &str) -> Vec<Arc<VirtualMachineInstanceMigration>> {
        self.migrations
            .state_filter(|migration| migration.spec.vmi_name == name && migration.meta().namespace.as_deref() == Some(namespace))
    }

    /// Our policy for a VM; `None`: the built-in one, which only audits.
    pub fn policy(&self, vmi: &VirtualMachineInstance) -> Option<Arc<PredictionPolicy>> {
        policy::select(self.policies.state(), &self.namespace_labels(vmi), vmi.labels())
    }

    /// KubeVirt's configuration as it would reach a migration of this VM.
    pub fn effective(&self, vmi: &VirtualMachineInstance) -> Effective {
        let migration_policy = policy::select(self.migration_policies.state(), &self.namespace_labels(vmi), vmi.labels());
        // KubeVirt allows one; where there are more, every replica takes the same.
        let kubevirt = self.kubevirts.state().into_iter().min_by_key(|kubevirt| (kubevirt.namespace(), kubevirt.name_any()));
        question::effective(kubevirt.as_deref(), migration_policy.as_deref())
    }

    /// What should be asked about a VM now.
    pub fn desired(&self, vmi: &VirtualMachineInstance, policy: Option<&PredictionPolicy>) -> Desired {
        question::desired(vmi, &self.effective(vmi), policy)
    }

    /// Which dry run in the background is wanted for a VM of which this should be asked.
    pub fn dry_run(
        &self,
        vmi: &VirtualMachineInstance,
        policy: Option<&PredictionPolicy>,
        present: &MigrationForecastSpec,
        occupied: bool,
        now: Timestamp,
    ) -> Wish {
        let Some(policy) = policy.and_then(|policy| policy.spec.dry_run.as_ref()) else { return Wish::Nothing };
        let stored = self.forecast(vmi.metadata.namespace.as_deref().unwrap_or_default(), &vmi.name_any());
        let carriage = Carriage::of(vmi, self.effective(vmi).compression);
        let stored = stored.as_deref();
        let case = Case { policy: Some(policy), present, stored, carriage, occupied, now };
        // The watch lags behind the writes: two VMs of a node that are looked at at once may both find room. The agent queues them.
        let busy = || {
            let others = self.forecasts.state_filter(|other| {
                other.spec.node_name == present.node_name
                    && dry_run::is_open(other)
                    && stored.is_none_or(|stored| stored.metadata.uid != other.metadata.uid)
            });
            u64::try_from(others.len()).unwrap_or(u64::MAX)
        };
        dry_run::wish(&case, busy)
    }

    /// Allow, warn or deny, from what is known now.
    pub fn judge(&self, candidate: Candidate<'_>, now: Timestamp) -> Judgement {
        let vm = format!("{}/{}", candidate.namespace, candidate.vmi_name);
        let vmi = self.vmi(candidate.namespace, candidate.vmi_name);
        let policy = vmi.as_deref().and_then(|vmi| self.policy(vmi));
        let present = vmi.as_deref().and_then(|vmi| match self.desired(vmi, policy.as_deref()) {
            Desired::Ask(spec) => Some(spec),
            Desired::Wait | Desired::Nothing => None,
        });
        let forecast = self.forecast(candidate.namespace, candidate.vmi_name);
        let name = policy.as_deref().map(ResourceExt::name_any);
        let decision = decision::decide(&Input {
            vm: &vm,
            forecast: forecast.as_deref(),
            present: present.as_deref(),
            leaves_cluster: candidate.leaves_cluster,
            now,
            mode: policy.as_deref().map_or(Mode::Audit, |policy| policy.spec.mode),
            policy: name.as_deref(),
            origin: candidate.origin,
        });
        Judgement { decision, forecast }
    }

    fn namespace_labels(&self, vmi: &VirtualMachineInstance) -> BTreeMap<String, String> {
        let name = vmi.metadata.namespace.as_deref().unwrap_or_default();
        self.namespaces.get(&ObjectRef::new(name)).map(|namespace| namespace.labels().clone()).unwrap_or_default()
    }
}
