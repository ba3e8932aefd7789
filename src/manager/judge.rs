//! Decides about migrations from what a replica knows: the one way to a decision, for admission and for the manager.
//!
//! In: [`Knowledge`], a migration that is asked for or that there is, the time. Out: the decision, and what it rests on. No I/O.

use std::{collections::HashSet, sync::Arc};

use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};

use super::{hold, knowledge::Knowledge, question::Desired};
use crate::{
    api::{
        MigrationForecast, PredictionPolicy, kubevirt::VirtualMachineInstanceMigration, migration_override, policy::Evacuations,
    },
    decision::{self, Decision, Input, Origin, Room, Stage},
};

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
    /// How far it is.
    pub stage: Stage,
    /// Its target pod, if there is one.
    pub pod: Option<&'a Pod>,
}

impl<'a> Candidate<'a> {
    /// A person's migration that nobody has asked for: what would become of it?
    pub fn nobodys(namespace: &'a str, vmi_name: &'a str) -> Self {
        Self { namespace, vmi_name, leaves_cluster: false, origin: Origin::Person, stage: Stage::Nobody, pod: None }
    }
}

impl Knowledge {
    /// A migration that there is, as a candidate. `pod`: its target pod.
    pub fn candidate<'a>(&self, migration: &'a VirtualMachineInstanceMigration, pod: Option<&'a Pod>) -> Candidate<'a> {
        let (namespace, vmi_name) = (migration.metadata.namespace.as_deref().unwrap_or_default(), &migration.spec.vmi_name);
        let origin = Origin::of(migration, self.vmi(namespace, vmi_name).as_deref());
        let leaves_cluster = migration.spec.send_to.is_some();
        Candidate { namespace, vmi_name, leaves_cluster, origin, stage: Stage::Admitted, pod }
    }

    /// A migration that this user asks for.
    pub fn request<'a>(&self, namespace: &'a str, migration: &'a VirtualMachineInstanceMigration, user: &str) -> Candidate<'a> {
        let vmi = self.vmi(namespace, &migration.spec.vmi_name);
        let origin = Origin::of_request(migration, vmi.as_deref(), self.is_kubevirt(user));
        Candidate { namespace, origin, stage: Stage::Request, ..self.candidate(migration, None) }
    }

    /// Allow, warn, hold or deny, from what is known now.
    pub fn judge(&self, candidate: Candidate<'_>, now: Timestamp) -> Judgement {
        let Candidate { namespace, vmi_name, leaves_cluster, origin, stage, pod } = candidate;
        let vmi = self.vmi(namespace, vmi_name);
        let policy = vmi.as_deref().and_then(|vmi| self.policy(vmi));
        let present = vmi.as_deref().and_then(|vmi| match self.desired(vmi, policy.as_deref()) {
            Desired::Ask(spec) => Some(spec),
            Desired::Wait | Desired::Nothing => None,
        });
        let forecast = self.forecast(namespace, vmi_name);
        let overrides = self.overrides.state_filter(|one| {
            one.spec.vmi_name == vmi_name && one.metadata.namespace.as_deref() == Some(namespace) && one.is_in_force(now)
        });
        let overridden = migration_override::in_force(overrides, now);
        let decision = decision::decide(&Input {
            vm: &format!("{namespace}/{vmi_name}"),
            forecast: forecast.as_deref(),
            present: present.as_deref(),
            leaves_cluster,
            now,
            policy: policy.as_deref(),
            origin,
            overridden: overridden.as_deref(),
            room: self.room(policy.as_deref(), origin, forecast.as_deref(), pod, now),
            stage,
        });
        Judgement { decision, forecast }
    }

    /// Is there room to hold one more migration, or to go on holding this one? The watch lags behind the gates that replicas put on at the
    /// same time: a few more than the policy says may be held for a moment.
    fn room(
        &self,
        policy: Option<&PredictionPolicy>,
        origin: Origin,
        forecast: Option<&MigrationForecast>,
        pod: Option<&Pod>,
        now: Timestamp,
    ) -> Room {
        let limits = policy.and_then(|policy| policy.spec.hold).unwrap_or_default();
        match pod {
            Some(pod) if hold::is_gated(pod) => {
                let lenient = policy.is_some_and(|policy| policy.spec.evacuations == Evacuations::Warn) && origin.is_kubevirts();
                let mut deadline = if lenient { limits.deadline.0.min(hold::DRAINS) } else { limits.deadline.0 };
                if forecast.is_some_and(hold::waits_to_begin) {
                    deadline = deadline.min(hold::BEGINNING);
                }
                return if hold::held_for(pod, now) < deadline { Room::Free } else { Room::OutOfTime };
            }
            // It goes its way: a gate is put on at a pod's creation or never.
            Some(_) => return Room::Passed,
            None => {}
        }
        if !self.is_managed() {
            return Room::NoManager;
        }
        if u64::try_from(self.held()).is_ok_and(|held| held < limits.at_once) { Room::Free } else { Room::Full }
    }

    /// How many migrations are held. A pod that merely says it is one of theirs takes nobody's place: whoever may make pods could make many.
    fn held(&self) -> usize {
        let gated = self.pods.state_filter(hold::is_gated);
        let held = gated.iter().filter_map(|pod| {
            let migration = self.migration(hold::migration_of(pod)?).filter(|migration| migration.is_under_way())?;
            let namespace =
                migration.metadata.namespace.as_deref().filter(|here| pod.metadata.namespace.as_deref() == Some(*here))?;
            let vmi = self.vmi(namespace, &migration.spec.vmi_name)?;
            hold::is_its_own(pod, &migration, &vmi).then(|| migration.metadata.uid.clone())
        });
        held.collect::<HashSet<_>>().len()
    }
}
