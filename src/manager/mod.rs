//! The controller: keeps a MigrationForecast for every VM that could migrate, lets go or abandons the migrations that are held, holds outcomes
//! against forecasts, tells of changes.
//!
//! In: watches of VMs, migrations and their target pods, policies, overrides, KubeVirt's configuration, forecasts and namespaces. Out: the
//! `spec` of forecasts and the manager's part of their `status`; gates taken off, migrations deleted; events; metrics. A pipeline observe → decide → apply of which only the ends do I/O. Every replica
//! watches, so that it can answer admission; only the leader writes. Level-triggered: whatever is missed is seen at the next look.
//!
//! | module | what |
//! |---|---|
//! | [`watch`] | fills the stores |
//! | [`index`] | finds what concerns a VM without a look through everything |
//! | [`knowledge`] | the stores, and what can be asked of them together; admission answers from it |
//! | [`judge`] | decides from it, for admission and for the manager |
//! | [`question`] | pure: from a VM and its configuration to what should be asked |
//! | [`dry_run`] | pure: whether a dry run is wanted |
//! | [`force`] | pure: the MigrationPolicy that applies a remedy to one migration, and when it has served |
//! | [`hold`] | pure: which migrations are held, and what becomes of them |
//! | [`observe`] | pure: from what is known to what should be written |
//! | `learn` | learns from migrations that have ended, and keeps that |
//! | `gate` | carries out what is to become of held and forced migrations |
//! | `apply` | writes |
//! | `memory` | what the leader remembers, so that nothing is told twice |
//! | [`plan`] | makes plans of many migrations, and carries them out |
//! | `queue` | which VM is looked at next |

mod apply;
pub mod dry_run;
pub mod force;
mod gate;
pub mod hold;
pub mod index;
pub mod judge;
pub mod knowledge;
mod learn;
mod memory;
pub mod metrics;
pub mod observe;
pub mod plan;
pub mod question;
mod queue;
pub mod watch;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub use apply::WriteError;
use k8s_openapi::jiff::Timestamp;
pub use knowledge::{Feeds, Knowledge};
use kube::{Client, Resource, ResourceExt};
pub use metrics::ManagerMetrics;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, interval},
};
use tracing::{debug, info, warn};

use self::{
    apply::Writer,
    dry_run::{Way, Wish},
    gate::Case,
    hold::Step,
    judge::Candidate,
    learn::Ledger,
    memory::Memory,
    question::Desired,
    queue::Queue,
    watch::{Change, Key},
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

/// How the manager runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who we are, for events: the pod's name.
    pub identity: Option<String>,
    /// The controllers' own: there is kept what was learned.
    pub namespace: String,
    /// How many VMs are written about at once.
    pub concurrency: usize,
    /// Everything is looked at again this often, whether or not a watch told of a change.
    pub resync: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { identity: None, namespace: "default".to_owned(), concurrency: 16, resync: Duration::from_secs(10 * 60) }
    }
}

/// Watches and, while `is_leader`, writes, until `shutdown` resolves. Writes in flight then are given up, the next leader makes them; what is
/// held is let go.
pub async fn run(
    client: Client,
    options: Options,
    knowledge: Knowledge,
    feeds: Feeds,
    metrics: ManagerMetrics,
    is_leader: impl Fn() -> bool + Send + Sync + 'static,
    shutdown: impl Future<Output = ()>,
) {
    let (sender, changes) = mpsc::unbounded_channel();
    let writer = Writer::new(client.clone(), options.identity.clone(), metrics.clone());
    let manager = Arc::new(Manager {
        knowledge,
        writer,
        metrics: metrics.clone(),
        memory: Mutex::default(),
        ledger: Ledger::default(),
        is_leader: Box::new(is_leader),
        leading: AtomicBool::new(false),
    });
    tokio::select! {
        () = watch::all(&client, feeds, &metrics, &sender) => {}
        () = work(&manager, &options, changes) => {}
        () = plan::planner::run(&client, &manager) => {}
        () = learn::run(&client, &options.namespace, &manager) => {}
        () = shutdown => {}
    }
    if manager.leading.load(Ordering::Relaxed) {
        manager.let_everything_go().await;
        manager.keep_at_the_end(&client, &options.namespace).await;
    }
}

/// Looks at VMs as changes tell, in the order in which they are due.
async fn work(manager: &Arc<Manager>, options: &Options, mut changes: mpsc::UnboundedReceiver<Change>) {
    manager.knowledge.ready().await;
    info!(vms = manager.knowledge.vmis.len(), "everything has been seen once");
    let mut queue = Queue::default();
    let mut tasks = JoinSet::new();
    let mut whose = HashMap::new();
    let mut leading = false;
    let mut check = interval(Duration::from_millis(500));
    let mut resync = interval(options.resync);
    loop {
        let now = Instant::now();
        while leading && tasks.len() < options.concurrency.max(1) {
            let Some(key) = queue.take(now) else { break };
            let manager = Arc::clone(manager);
            let looked_at = key.clone();
            let task = tasks.spawn(async move { manager.reconcile(&looked_at).await });
            whose.insert(task.id(), key);
        }
        let room = tasks.len() < options.concurrency.max(1);
        let due = queue.next().filter(|_| leading && room);
        tokio::select! {
            change = changes.recv() => match change {
                None => return,
                Some(_) if !leading => {}
                Some(Change::One(key)) => queue.add(key, now),
                Some(Change::Namespace(name)) => manager.add_namespace(&mut queue, &name, now),
                Some(Change::All) => manager.add_all(&mut queue, now),
            },
            Some(ended) = tasks.join_next_with_id(), if !tasks.is_empty() => {
                let id = ended.as_ref().map_or_else(tokio::task::JoinError::id, |(id, _)| *id);
                let Some(key) = whose.remove(&id) else { continue };
                let held = || manager.holds(&key).then_some(hold::HOLDING);
                let (worked, again) = match ended {
                    Ok((_, Ok(again))) => (true, again),
                    Ok((_, Err(error))) => {
                        warn!(namespace = key.namespace, vm = key.name, %error, "it is tried again after a pause");
                        (false, held())
                    }
                    Err(error) => {
                        warn!(namespace = key.namespace, vm = key.name, %error, "a defect of migvisor, please report it; trying again");
                        (false, held())
                    }
                };
                queue.done(key, worked, again, Instant::now());
            },
            () = sleep_until(due) => {}
            _ = resync.tick() => if leading { manager.add_all(&mut queue, now) },
            _ = check.tick() => {
                let leads = (manager.is_leader)();
                if leads && !leading {
                    info!("leading: writing from now on");
                    manager.add_all(&mut queue, now);
                } else if leading && !leads {
                    info!("no longer leading: only watching");
                    queue.clear();
                    manager.forget_all();
                }
                leading = leads;
                manager.leading.store(leads, Ordering::Relaxed);
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Manager {
    knowledge: Knowledge,
    writer: Writer,
    metrics: ManagerMetrics,
    memory: Mutex<HashMap<Key, Memory>>,
    /// What migrations have taught.
    ledger: Ledger,
    is_leader: Box<dyn Fn() -> bool + Send + Sync>,
    /// We led when that was last looked at: what is held is ours to let go.
    leading: AtomicBool,
}

impl Manager {
    fn add_all(&self, queue: &mut Queue, now: Instant) {
        for vmi in self.knowledge.vmis.state() {
            queue.add(Key { namespace: vmi.namespace().unwrap_or_default(), name: vmi.name_any() }, now);
        }
        // A VM may be gone whose migration is still forced, or whose migration's pod is still held.
        for policy in self.knowledge.migration_policies.state_filter(force::is_ours) {
            if let Some((namespace, name)) = force::vm_of(&policy) {
                queue.add(Key { namespace: namespace.to_owned(), name: name.to_owned() }, now);
            }
        }
        for pod in self.knowledge.pods.state_filter(hold::is_gated) {
            let name = hold::vmi_of(&pod).unwrap_or_default().to_owned();
            queue.add(Key { namespace: pod.namespace().unwrap_or_default(), name }, now);
        }
    }

    fn add_namespace(&self, queue: &mut Queue, name: &str, now: Instant) {
        for vmi in self.knowledge.vmis.state_filter(|vmi| vmi.metadata.namespace.as_deref() == Some(name)) {
            queue.add(Key { namespace: name.to_owned(), name: vmi.name_any() }, now);
        }
    }

    /// A pod of the VM is gated: whatever fails, that must not last.
    fn holds(&self, key: &Key) -> bool {
        self.knowledge.pods_of(&key.namespace, &key.name).iter().any(|pod| hold::is_gated(pod))
    }

    fn remember<T>(&self, key: &Key, change: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        change(memory.entry(key.clone()).or_default())
    }

    fn forget_all(&self) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.unlearn();
    }

    /// Brings what is written about one VM in line with what is known of it. Returns when to look again.
    async fn reconcile(&self, key: &Key) -> Result<Option<Duration>, WriteError> {
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
