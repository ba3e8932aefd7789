//! Carries out what [`super::hold`] and [`super::force`] say: applies remedies and clears up after them, takes our gate off, deletes what is
//! abandoned, tells of it.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{Resource, ResourceExt};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::{
    Manager, WriteError,
    force::{self, Served},
    hold::{self, HOLDING, LETTING_GO, Step},
    judge::Candidate,
    memory::Evacuation,
    observe::Notice,
    watch::Key,
};
use crate::{
    api::{
        MigrationForecast,
        kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
        names::{FORCE_LABEL, FORCE_PREFIX},
    },
    decision::{Action, Decision, Origin, Stage},
    model::forecast::Verdict,
};

/// At the end of the process this long is spent on taking gates off; then the next leader does.
const LEAVING: Duration = Duration::from_secs(2);
/// An agent hears of it, cancels QEMU's migration and puts the settings back in less; KubeVirt takes longer from the gate to the first page.
const GIVING_UP: Duration = Duration::from_secs(1);

/// A migration of a VM, and what is to be done about it.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) migration: Arc<VirtualMachineInstanceMigration>,
    pub(super) pod: Option<Pod>,
    pub(super) decision: Decision,
    pub(super) step: Step,
}

impl Manager {
    /// What is to be done about each of a VM's migrations that are not over.
    pub(super) fn cases(
        &self,
        vmi: Option<&VirtualMachineInstance>,
        migrations: &[Arc<VirtualMachineInstanceMigration>],
        pods: &[Arc<Pod>],
    ) -> Vec<Case> {
        let now = Timestamp::now();
        let case = |migration: &Arc<VirtualMachineInstanceMigration>| {
            let pod = vmi.and_then(|vmi| hold::pod_of(pods, migration, vmi));
            let decision = self.knowledge.judge(self.knowledge.candidate(migration, pod), now).decision;
            let uid = migration.metadata.uid.as_deref().unwrap_or_default();
            let forced = decision.remedy.is_some() && vmi.is_some_and(|vmi| self.knowledge.is_forced(vmi, uid));
            let step = hold::step(migration, pod, &decision, forced);
            Case { migration: Arc::clone(migration), pod: pod.cloned(), decision, step }
        };
        migrations.iter().filter(|migration| migration.is_under_way()).map(case).collect()
    }

    /// Does what is to be done about each, also where it failed with another one. Returns when to look again, where something is left to be
    /// done.
    pub(super) async fn carry_out(
        &self,
        key: &Key,
        vmi: Option<&VirtualMachineInstance>,
        stored: Option<&MigrationForecast>,
        cases: &[Case],
    ) -> Result<Option<Duration>, WriteError> {
        if cases.iter().all(|case| case.step != Step::LetGo) {
            self.remember(key, |memory| memory.letting_go = None);
        }
        let mut ended = Ok(None);
        for case in cases {
            ended = match (self.carry_out_one(key, vmi, stored, case).await, ended) {
                (Ok(again), Ok(before)) => Ok([again, before].into_iter().flatten().min()),
                (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
            };
        }
        ended
    }

    async fn carry_out_one(
        &self,
        key: &Key,
        vmi: Option<&VirtualMachineInstance>,
        stored: Option<&MigrationForecast>,
        Case { migration, pod, decision, step }: &Case,
    ) -> Result<Option<Duration>, WriteError> {
        let name = migration.name_any();
        // What came before has taken its time: somebody else may lead by now.
        if !(self.is_leader)() {
            return Ok(None);
        }
        match (step, pod.as_ref().filter(|pod| hold::is_gated(pod))) {
            (Step::Hold, Some(_)) => {
                self.tell_once(key, migration, "MigrationHeld", false, &decision.message).await;
                return Ok(Some(HOLDING));
            }
            (Step::Force, Some(_)) => {
                if let (Some(vmi), Some(remedy)) = (vmi, &decision.remedy) {
                    let theirs = self.knowledge.migration_policy(vmi).map(|policy| policy.name_any());
                    self.writer.force(vmi, migration, theirs.as_deref(), remedy).await?;
                    info!(namespace = key.namespace, vm = key.name, migration = name, remedy = ?remedy.kind, "forced");
                    self.tell_once(key, migration, "MigrationForced", false, &decision.message).await;
                }
                // The rest when the watches show it.
                return Ok(Some(Duration::from_secs(1)));
            }
            (Step::LetGo, Some(pod)) => {
                // QEMU has one migration at a time.
                let since = self.remember(key, |memory| *memory.letting_go.get_or_insert_with(Instant::now));
                if hold::is_dry_running(stored) && since.elapsed() < LETTING_GO {
                    return Ok(Some(Duration::from_secs(1)));
                }
                self.writer.let_go(pod).await?;
                info!(namespace = key.namespace, vm = key.name, migration = name, "let go");
                self.tell_once(key, migration, "MigrationReleased", false, &decision.message).await;
            }
            (Step::Abandon, _) => {
                self.writer.abandon(migration).await?;
                info!(namespace = key.namespace, vm = key.name, migration = name, reason = decision.reason, "abandoned");
                let note = format!("Migration {name} is abandoned before anything was sent. {}", decision.message);
                if self.tell_once(key, migration, "MigrationAbandoned", true, &note).await
                    && let Some(vmi) = vmi
                {
                    let notice = Notice { reason: "MigrationAbandoned", warning: true, note };
                    self.writer.notify(&vmi.object_ref(&()), notice).await;
                }
            }
            (Step::Hold | Step::Force | Step::LetGo | Step::Leave, _) => {}
        }
        Ok(None)
    }

    /// Clears up after forced migrations: our MigrationPolicies of this VM that have served, and the label that they select by.
    pub(super) async fn unforce(
        &self,
        key: &Key,
        vmi: Option<&VirtualMachineInstance>,
        migrations: &[Arc<VirtualMachineInstanceMigration>],
    ) -> Result<(), WriteError> {
        let mut wanted = None;
        for policy in self.knowledge.forces_of(&key.namespace, &key.name) {
            let name = policy.name_any();
            let uid = name.strip_prefix(FORCE_PREFIX).unwrap_or_default();
            let migration = migrations.iter().find(|migration| migration.metadata.uid.as_deref() == Some(uid));
            match force::served(uid, migration.map(AsRef::as_ref), vmi) {
                Served::NotYet => {
                    wanted = Some(uid.to_owned());
                    continue;
                }
                Served::Missed(other) => {
                    let other = if other.is_empty() { "none at all".to_owned() } else { other };
                    let note =
                        format!("KubeVirt runs it under another MigrationPolicy than {name}, which was to force it: {other}.");
                    if let Some(migration) = migration {
                        self.tell_once(key, migration, "MigrationForceFailed", true, &note).await;
                    }
                }
                Served::Applied | Served::Over => {}
            }
            self.writer.delete_policy(&policy).await?;
        }
        let label = vmi.and_then(|vmi| vmi.metadata.labels.as_ref()?.get(FORCE_LABEL));
        // A label that was put on before its policy is seen stays for the watches to catch up.
        if let (Some(vmi), Some(label)) = (vmi, label)
            && wanted.as_ref() != Some(label)
            && !migrations.iter().any(|migration| migration.is_under_way() && migration.metadata.uid.as_ref() == Some(label))
        {
            self.writer.label(vmi, None).await?;
        }
        Ok(())
    }

    /// KubeVirt is told once that it may move a VM which it was not allowed to, or that waited when this leader came: by itself it tries again
    /// only after a quarter of an hour.
    pub(super) async fn nudge(
        &self,
        key: &Key,
        vmi: &VirtualMachineInstance,
        migrations: &[Arc<VirtualMachineInstanceMigration>],
    ) -> Result<(), WriteError> {
        let waits = !vmi.status.evacuation_node_name.is_empty() && !migrations.iter().any(|migration| migration.is_under_way());
        let denied = || {
            let nobodys = Candidate::nobodys(&key.namespace, &key.name);
            let evacuation = Candidate { origin: Origin::Evacuation, stage: Stage::Request, ..nobodys };
            let decision = self.knowledge.judge(evacuation, Timestamp::now()).decision;
            // A question that is asked anew is unanswered for a moment.
            (decision.verdict != Verdict::Unknown).then_some(decision.action == Action::Deny)
        };
        let before = self.remember(key, |memory| memory.evacuation);
        let (now, lifted) = before.next(waits, denied);
        // What was denied before our time was denied by such a policy; where there is none, nobody's VM is touched.
        if lifted && (before == Evacuation::Denied || self.knowledge.denies_evacuations()) {
            self.writer.nudge(vmi).await?;
            info!(namespace = key.namespace, vm = key.name, "not denied (any more): KubeVirt was told to try again");
        }
        self.remember(key, |memory| memory.evacuation = now);
        Ok(())
    }

    /// An event on the migration, unless it has been told of already. False: it has.
    async fn tell_once(
        &self,
        key: &Key,
        migration: &VirtualMachineInstanceMigration,
        reason: &'static str,
        warning: bool,
        note: &str,
    ) -> bool {
        let uid = migration.uid().unwrap_or_default();
        let first = self.remember(key, |memory| memory.told_of.insert((uid, reason)));
        if first {
            self.writer.notify(&migration.object_ref(&()), Notice { reason, warning, note: note.to_owned() }).await;
        }
        first
    }

    /// Lets go those of a VM's pods that are no known migration's own.
    pub(super) async fn let_orphans_go(
        &self,
        pods: &[Arc<Pod>],
        vmi: Option<&VirtualMachineInstance>,
        migrations: &[Arc<VirtualMachineInstanceMigration>],
    ) -> Result<(), WriteError> {
        let now = Timestamp::now();
        for pod in pods.iter().filter(|pod| hold::is_orphan(pod, migrations, vmi, now)) {
            self.writer.let_go(pod).await?;
        }
        Ok(())
    }

    /// Nobody may be here to let go what is held, once this process is gone.
    pub(super) async fn let_everything_go(&self) {
        let held = self.knowledge.pods.state_filter(hold::is_gated);
        if held.is_empty() {
            return;
        }
        info!(held = held.len(), "ending: letting go what is held");
        // QEMU has one migration at a time: agents give a dry run up once no migration waits for it.
        let tried = held.iter().filter_map(|pod| {
            let stored = self.knowledge.forecast(pod.metadata.namespace.as_deref()?, hold::vmi_of(pod)?)?;
            hold::is_dry_running(Some(&stored)).then_some(stored)
        });
        let tried: Vec<_> = tried.collect();
        if !tried.is_empty() {
            let told = join_all(tried.iter().map(|stored| self.writer.no_longer_held(stored)));
            for error in timeout(LEAVING, told).await.into_iter().flatten().filter_map(Result::err) {
                warn!(%error, "a dry run may be in the way of its migration");
            }
            tokio::time::sleep(GIVING_UP).await;
        }
        let all = join_all(held.iter().map(|pod| self.writer.let_go(pod)));
        let Ok(results) = timeout(LEAVING, all).await else {
            warn!("migrations stay held until the next leader comes: the API server did not answer in time");
            return;
        };
        for error in results.into_iter().filter_map(Result::err) {
            warn!(%error, "a migration stays held until the next leader comes");
        }
    }
}
