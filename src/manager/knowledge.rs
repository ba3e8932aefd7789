//! What a replica knows: the objects that it watches, in memory, and the questions that can be asked of them together.
//!
//! In: reflector stores, filled by [`super::watch`]. Out: the policy and the question of a VM; [`super::judge`] decides from it. No I/O: admission is
//! answered from here. Every replica has one; only the leader writes.

use std::{collections::BTreeMap, sync::Arc};

use futures::FutureExt;
use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    jiff::Timestamp,
};
use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store, store::Writer},
};

use super::{
    dry_run::{self, Carriage, Case, Way, Wish},
    force,
    index::{ByVm, Indexed, Sink},
    question::{self, Desired, Effective},
};
use crate::api::{
    MigrationForecast, MigrationForecastSpec, MigrationOverride, PredictionPolicy,
    forecast::HostConstants,
    kubevirt::{KubeVirt, MigrationPolicy, VirtualMachineInstance, VirtualMachineInstanceMigration},
    names, policy,
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
    /// What people let through.
    pub overrides: Store<MigrationOverride>,
    /// Target pods of migrations.
    pub pods: Store<Pod>,
    /// KubeVirt's policies.
    pub migration_policies: Store<MigrationPolicy>,
    /// KubeVirt's configuration.
    pub kubevirts: Store<KubeVirt>,
    /// For their labels.
    pub namespaces: Store<Namespace>,
    migrations_by: ByVm<VirtualMachineInstanceMigration>,
    pods_by: ByVm<Pod>,
    managed: Managed,
    /// KubeVirt's controller, as the API server names it; `None`: by where the KubeVirt CR is.
    controller: Option<Arc<str>>,
}

/// Is a manager alive that would let go what is held?
#[derive(Clone)]
struct Managed(Arc<dyn Fn() -> bool + Send + Sync>);

impl std::fmt::Debug for Managed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Managed").field(&(self.0)()).finish()
    }
}

/// The writers' side: what [`super::run`] fills.
#[derive(Debug, Default)]
pub struct Feeds {
    /// VMs.
    pub vmis: Writer<VirtualMachineInstance>,
    /// Migrations.
    pub migrations: Indexed<VirtualMachineInstanceMigration>,
    /// Questions and answers.
    pub forecasts: Writer<MigrationForecast>,
    /// Our policies.
    pub policies: Writer<PredictionPolicy>,
    /// What people let through.
    pub overrides: Writer<MigrationOverride>,
    /// Target pods of migrations.
    pub pods: Indexed<Pod>,
    /// KubeVirt's policies.
    pub migration_policies: Writer<MigrationPolicy>,
    /// KubeVirt's configuration.
    pub kubevirts: Writer<KubeVirt>,
    /// For their labels.
    pub namespaces: Writer<Namespace>,
}

impl Knowledge {
    /// Empty stores and the writers that fill them.
    pub fn new() -> (Self, Feeds) {
        let feeds = Feeds::default();
        let knowledge = Self {
            vmis: feeds.vmis.as_reader(),
            migrations: feeds.migrations.reader(),
            forecasts: feeds.forecasts.as_reader(),
            policies: feeds.policies.as_reader(),
            overrides: feeds.overrides.as_reader(),
            pods: feeds.pods.reader(),
            migration_policies: feeds.migration_policies.as_reader(),
            kubevirts: feeds.kubevirts.as_reader(),
            namespaces: feeds.namespaces.as_reader(),
            migrations_by: feeds.migrations.by_vm(),
            pods_by: feeds.pods.by_vm(),
            managed: Managed(Arc::new(|| false)),
            controller: None,
        };
        (knowledge, feeds)
    }

    /// With this to say whether a manager is alive, ours or another replica's; without, nothing is ever held.
    #[must_use]
    pub fn managed_while(self, alive: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { managed: Managed(Arc::new(alive)), ..self }
    }

    /// With this as the name of KubeVirt's controller to the API server; without, it is the usual ServiceAccount beside the KubeVirt CR.
    #[must_use]
    pub fn with_kubevirt_as(self, user: &str) -> Self {
        Self { controller: Some(user.into()), ..self }
    }

    /// Is this user, as the API server names it, KubeVirt's controller?
    pub fn is_kubevirt(&self, user: &str) -> bool {
        if let Some(controller) = &self.controller {
            return **controller == *user;
        }
        let account = user.strip_prefix("system:serviceaccount:").and_then(|account| account.split_once(':'));
        let namespace = self.kubevirt().and_then(|kubevirt| kubevirt.namespace());
        account == Some((namespace.as_deref().unwrap_or(names::kubevirt::NAMESPACE), names::kubevirt::CONTROLLER))
    }

    /// Is it known yet which user that is? Not before the KubeVirt CR had its chance to say where it is installed.
    pub fn knows_kubevirt(&self) -> bool {
        self.controller.is_some() || self.kubevirts.wait_until_ready().now_or_never().is_some_and(|ready| ready.is_ok())
    }

    /// May a policy have evacuations denied?
    pub fn denies_evacuations(&self) -> bool {
        let denies = |policy: &PredictionPolicy| {
            policy.spec.mode == policy::Mode::Enforce && policy.spec.evacuations == policy::Evacuations::Deny
        };
        self.policies.find(denies).is_some()
    }

    /// Returns once every store has been filled for the first time; never, if the watches ended before.
    pub async fn ready(&self) {
        let all = tokio::join!(
            self.vmis.wait_until_ready(),
            self.migrations.wait_until_ready(),
            self.forecasts.wait_until_ready(),
            self.policies.wait_until_ready(),
            self.overrides.wait_until_ready(),
            self.pods.wait_until_ready(),
            self.migration_policies.wait_until_ready(),
            self.kubevirts.wait_until_ready(),
            self.namespaces.wait_until_ready(),
        );
        if !matches!(all, (Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(()))) {
            std::future::pending::<()>().await;
        }
    }

    /// Is a manager alive that would let go what is held?
    pub fn is_managed(&self) -> bool {
        (self.managed.0)()
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
        self.migrations_by.of_vm(namespace, name)
    }

    /// Our policy for a VM; `None`: the built-in one, which only audits.
    pub fn policy(&self, vmi: &VirtualMachineInstance) -> Option<Arc<PredictionPolicy>> {
        policy::select(self.policies.state(), &self.namespace_labels(vmi), vmi.labels())
    }

    /// KubeVirt's configuration as it would reach a migration of this VM that nobody forces.
    pub fn effective(&self, vmi: &VirtualMachineInstance) -> Effective {
        let migration_policy = self.migration_policy(vmi);
        question::effective(self.kubevirt().as_deref(), migration_policy.as_deref())
    }

    /// The MigrationPolicy that KubeVirt would pick for a migration of this VM that nobody forces.
    pub fn migration_policy(&self, vmi: &VirtualMachineInstance) -> Option<Arc<MigrationPolicy>> {
        let theirs = self.migration_policies.state_filter(|policy| !force::is_ours(policy));
        policy::select(theirs, &self.namespace_labels(vmi), vmi.labels())
    }

    /// The remedy of this migration has been applied: KubeVirt would go by it.
    pub fn is_forced(&self, vmi: &VirtualMachineInstance, migration_uid: &str) -> bool {
        force::is_in_force(self.migration_policies.state(), &self.namespace_labels(vmi), vmi.labels(), migration_uid)
    }

    /// Our MigrationPolicies for the VM of that name.
    pub fn forces_of(&self, namespace: &str, name: &str) -> Vec<Arc<MigrationPolicy>> {
        self.migration_policies.state_filter(|policy| force::is_ours(policy) && force::vm_of(policy) == Some((namespace, name)))
    }

    /// KubeVirt's configuration. KubeVirt allows one; where there are more, every replica takes the same.
    pub fn kubevirt(&self) -> Option<Arc<KubeVirt>> {
        self.kubevirts.state().into_iter().min_by_key(|kubevirt| (kubevirt.namespace(), kubevirt.name_any()))
    }

    /// What should be asked about a VM now, with what the leader has learned of its node so far.
    pub fn desired(&self, vmi: &VirtualMachineInstance, policy: Option<&PredictionPolicy>) -> Desired {
        self.desired_with(vmi, policy, self.asked_with(vmi).as_ref())
    }

    /// The same with this that has been learned.
    pub fn desired_with(
        &self,
        vmi: &VirtualMachineInstance,
        policy: Option<&PredictionPolicy>,
        learned: Option<&HostConstants>,
    ) -> Desired {
        question::desired(vmi, &self.effective(vmi), policy, learned)
    }

    /// What the leader has learned of the VM's node, as the question is asked: every replica reads the same there, with no word of its own.
    pub fn asked_with(&self, vmi: &VirtualMachineInstance) -> Option<HostConstants> {
        let stored = self.forecast(vmi.metadata.namespace.as_deref().unwrap_or_default(), &vmi.name_any())?;
        stored.spec.host.clone().filter(|_| stored.spec.node_name == vmi.status.node_name)
    }

    /// The migration of that UID.
    pub fn migration(&self, uid: &str) -> Option<Arc<VirtualMachineInstanceMigration>> {
        self.migrations_by.of_uid(uid)
    }

    /// The target pods of the migrations of the VM of that name.
    pub fn pods_of(&self, namespace: &str, name: &str) -> Vec<Arc<Pod>> {
        self.pods_by.of_vm(namespace, name)
    }

    /// Which dry run is wanted for a VM of which this should be asked.
    pub fn dry_run(
        &self,
        vmi: &VirtualMachineInstance,
        policy: Option<&PredictionPolicy>,
        present: &MigrationForecastSpec,
        way: Option<Way>,
        now: Timestamp,
    ) -> Wish {
        let Some(policy) = policy.and_then(|policy| policy.spec.dry_run.as_ref()) else { return Wish::Nothing };
        let stored = self.forecast(vmi.metadata.namespace.as_deref().unwrap_or_default(), &vmi.name_any());
        let carriage = Carriage::of(vmi, self.effective(vmi).compression);
        let stored = stored.as_deref();
        let case = Case { policy: Some(policy), present, stored, carriage, way, now };
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

    /// The labels of a VM's namespace.
    pub fn namespace_labels(&self, vmi: &VirtualMachineInstance) -> BTreeMap<String, String> {
        let name = vmi.metadata.namespace.as_deref().unwrap_or_default();
        self.namespaces.get(&ObjectRef::new(name)).map(|namespace| namespace.labels().clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;

    #[test]
    fn virt_controller_is_where_kubevirt_is_or_who_it_is_said_to_be() {
        let (knowledge, mut feeds) = Knowledge::new();
        let account = |namespace: &str| format!("system:serviceaccount:{namespace}:kubevirt-controller");
        assert!(knowledge.is_kubevirt(&account("kubevirt")), "no KubeVirt CR has been seen");
        let cr = json!({ "metadata": { "name": "cnv", "namespace": "openshift-cnv" } });
        feeds.kubevirts.apply_watcher_event(&Event::Init);
        feeds.kubevirts.apply_watcher_event(&Event::InitApply(serde_json::from_value(cr).unwrap()));
        feeds.kubevirts.apply_watcher_event(&Event::InitDone);
        assert!(knowledge.is_kubevirt(&account("openshift-cnv")) && !knowledge.is_kubevirt(&account("kubevirt")));
        let told = knowledge.with_kubevirt_as("virt@example.org");
        assert!(told.is_kubevirt("virt@example.org") && !told.is_kubevirt(&account("openshift-cnv")));
    }
}
