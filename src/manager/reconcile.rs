//! One look at a VM: brings what is written about it in line with what is known of it.
//!
//! In: the stores, what is remembered of the VM. Out: its question, what is held and forced, the manager's part of the status, events; and when to
//! look again.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use tracing::debug;

use super::{
    Manager, WriteError,
    dry_run::{Way, Wish},
    gate::Case,
    hold::{self, Step},
    judge::Candidate,
    observe,
    question::Desired,
    watch::Key,
};
use crate::{
    api::{
        MigrationForecast,
        kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
        migration::{Hint, HintPhase},
    },
    model::forecast::Verdict,
};

/// A VM that waits for its turn to be dry-run is looked at again after this.
const QUEUED: Duration = Duration::from_secs(30);

impl Manager {
    /// Brings what is written about one VM in line with what is known of it. Returns when to look again.
    pub(super) async fn reconcile(&self, key: &Key) -> Result<Option<Duration>, WriteError> {
        if !(self.is_leader)() {
            return Ok(None);
        }
        let pods = self.knowledge.pods_of(&key.namespace, &key.name);
        let Some(vmi) = self.knowledge.vmi(&key.namespace, &key.name) else {
            // Its forecast goes with it: it is the owner.
            self.memory.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            self.let_orphans_go(&pods, None, &[]).await?;
            self.unforce(key, None, &[]).await?;
            return Ok(pods.iter().any(|pod| hold::is_gated(pod)).then_some(hold::LETTING_GO));
        };
        let stored = self.knowledge.forecast(&key.namespace, &key.name);
        // One look through all migrations, and none at all on the way of admission.
        let migrations = self.knowledge.migrations_of(&key.namespace, &key.name);
        let cases = self.cases(Some(&vmi), &migrations, &pods);
        self.remember(key, |memory| memory.forget_all_but(&migrations));
        let asked = self.ask(key, &vmi, stored.as_deref(), &migrations, &cases).await;
        // Whatever became of the question: nothing stays held for it.
        let held = self.carry_out(key, Some(&vmi), stored.as_deref(), &cases).await?;
        self.let_orphans_go(&pods, Some(&vmi), &migrations).await?;
        self.unforce(key, Some(&vmi), &migrations).await?;
        self.nudge(key, &vmi, &migrations).await?;
        let (stored, again) = match (stored, asked?) {
            (Some(stored), Asked::Stands { again }) => (stored, again),
            (_, Asked::Later(left)) => return Ok(Some(left)),
            (_, Asked::Stands { .. } | Asked::Anew) => return Ok(held),
        };
        self.tell(key, &vmi, &stored, &migrations).await?;
        self.warn(key, &vmi, &cases).await;
        let stale = observe::look_again(&stored, Timestamp::now());
        Ok([held, again, stale].into_iter().flatten().min())
    }

    /// Brings the question in line with what is known.
    async fn ask(
        &self,
        key: &Key,
        vmi: &VirtualMachineInstance,
        stored: Option<&MigrationForecast>,
        migrations: &[Arc<VirtualMachineInstanceMigration>],
        cases: &[Case],
    ) -> Result<Asked, WriteError> {
        let policy = self.knowledge.policy(vmi);
        let learned = self.ledger.host(&vmi.status.node_name, || self.knowledge.asked_with(vmi));
        match self.knowledge.desired_with(vmi, policy.as_deref(), learned.as_ref()) {
            Desired::Ask(mut spec) => {
                if let Some(left) = observe::hand_over(vmi, &spec.node_name, stored, Timestamp::now()) {
                    return Ok(Asked::Later(left));
                }
                let hint = Hint::of(migrations).map(|hint| held(hint, cases));
                let way = match &hint {
                    Some(hint) if hint.phase == HintPhase::Held && !vmi.is_hotplugging() => Some(Way::Held),
                    Some(_) => Some(Way::Open),
                    None => (vmi.is_migrating() || vmi.is_hotplugging()).then_some(Way::Open),
                };
                let mut again = None;
                match self.knowledge.dry_run(vmi, policy.as_deref(), &spec, way, Timestamp::now()) {
                    Wish::Run(dry_run) => spec.dry_run = Some(dry_run),
                    // Nothing tells this VM that another one's dry run has ended.
                    Wish::Queue => again = Some(QUEUED),
                    Wish::Nothing => {}
                }
                if let Some(wanted) = observe::wanted(vmi, *spec, hint.as_ref(), stored) {
                    let dry_run = wanted.spec.dry_run.as_ref().map(|dry_run| dry_run.id.as_str());
                    debug!(namespace = key.namespace, vm = key.name, node = wanted.spec.node_name, dry_run, "asking");
                    self.writer.ask(&wanted).await?;
                    return Ok(Asked::Anew);
                }
                Ok(Asked::Stands { again })
            }
            Desired::Nothing => {
                // Only what is ours goes: whatever else bears the VM's name stays.
                let ours = |forecast: &&MigrationForecast| {
                    forecast.owner_references().iter().any(|owner| Some(&owner.uid) == vmi.metadata.uid.as_ref())
                };
                if let Some(stored) = stored.filter(ours) {
                    self.writer.delete(stored).await?;
                }
                Ok(Asked::Anew)
            }
            Desired::Wait => Ok(Asked::Stands { again: None }),
        }
    }

    /// The manager's part of the status, and the events that go with its changes.
    async fn tell(
        &self,
        key: &Key,
        vmi: &VirtualMachineInstance,
        stored: &MigrationForecast,
        migrations: &[Arc<VirtualMachineInstanceMigration>],
    ) -> Result<(), WriteError> {
        let now = Timestamp::now();
        let decision = self.knowledge.judge(Candidate::nobodys(&key.namespace, &key.name), now).decision;
        let memory = self.remember(key, |memory| memory.clone());
        let ended = observe::unrecorded(migrations, Some(vmi), stored).filter(|migration| migration.uid() != memory.recorded);
        self.ledger.note(stored);
        let outcome = ended.map(|migration| self.outcome(migration, vmi, stored));

        let own = observe::own_status(stored, &decision, outcome.clone(), now);
        if observe::differs(stored, &own) {
            self.writer.tell(stored, &own).await?;
        }
        if let (Some(migration), Some(outcome)) = (ended, outcome) {
            self.remember(key, |memory| memory.recorded = migration.uid());
            self.learn(migration, vmi, stored, &outcome);
            self.writer.notify(&migration.object_ref(&()), observe::outcome_notice(&outcome)).await;
        }
        let before = memory.told.map(|verdict| format!("{verdict:?}"));
        let before = before.as_deref().or_else(|| observe::told_verdict(stored));
        if let Some(notice) = observe::verdict_notice(&decision, before) {
            self.writer.notify(&vmi.object_ref(&()), notice).await;
        }
        if decision.verdict != Verdict::Unknown {
            self.remember(key, |memory| memory.told = Some(decision.verdict));
        }
        Ok(())
    }

    /// Repeats admission's warnings as events: virtctl and KubeVirt's own controllers show none. What is held is told of by its hold.
    async fn warn(&self, key: &Key, vmi: &VirtualMachineInstance, cases: &[Case]) {
        // The built-in policy only audits: it warns nobody.
        if self.knowledge.policy(vmi).is_none() {
            return;
        }
        for Case { migration, decision, .. } in cases.iter().filter(|case| case.step == Step::Leave) {
            let uid = migration.uid().unwrap_or_default();
            if self.remember(key, |memory| memory.warned.contains(&uid)) {
                continue;
            }
            if let Some(notice) = observe::warning_notice(migration, decision) {
                self.remember(key, |memory| memory.warned.insert(uid));
                self.writer.notify(&migration.object_ref(&()), notice).await;
            }
        }
    }
}

/// What has become of the question.
#[derive(Debug, Clone, Copy)]
enum Asked {
    /// It was written, or taken away: the rest when the watch shows it.
    Anew,
    /// It stays with the node that the VM has left, for so long.
    Later(Duration),
    /// It stands as it should; it may have to be looked at again after so long.
    Stands { again: Option<Duration> },
}

/// The hint as it is while the migration is held.
fn held(hint: Hint, cases: &[Case]) -> Hint {
    let holds = cases
        .iter()
        .any(|case| case.step == Step::Hold && case.migration.metadata.uid.as_deref() == Some(hint.migration_uid.as_str()));
    if holds { Hint { phase: HintPhase::Held, ..hint } } else { hint }
}
