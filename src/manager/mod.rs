//! The controller: keeps a MigrationForecast for every VM that could migrate, holds outcomes against forecasts, tells of changes.
//!
//! In: watches of VMs, migrations, policies, KubeVirt's configuration, forecasts and namespaces. Out: the `spec` of forecasts and the
//! manager's part of their `status`; events; metrics. A pipeline observe → decide → apply of which only the ends do I/O. Every replica
//! watches, so that it can answer admission; only the leader writes. Level-triggered: whatever is missed is seen at the next look.
//!
//! | module | what |
//! |---|---|
//! | [`watch`] | fills the stores |
//! | [`knowledge`] | the stores, and what can be asked of them together; admission answers from it |
//! | [`question`] | pure: from a VM and its configuration to what should be asked |
//! | [`dry_run`] | pure: whether a dry run in the background is wanted |
//! | [`observe`] | pure: from what is known to what should be written |
//! | `apply` | writes it |
//! | `queue` | which VM is looked at next |

mod apply;
pub mod dry_run;
pub mod knowledge;
pub mod metrics;
pub mod observe;
pub mod question;
mod queue;
pub mod watch;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
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
    dry_run::Wish,
    knowledge::Candidate,
    question::Desired,
    queue::Queue,
    watch::{Change, Key},
};
use crate::{
    api::{
        MigrationForecast,
        kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
        migration::Hint,
    },
    decision::Origin,
    model::forecast::Verdict,
};

/// A VM that waits for its turn to be dry-run is looked at again after this.
const QUEUED: Duration = Duration::from_secs(30);

/// How the manager runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who we are, for events: the pod's name.
    pub identity: Option<String>,
    /// How many VMs are written about at once.
    pub concurrency: usize,
    /// Everything is looked at again this often, whether or not a watch told of a change.
    pub resync: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { identity: None, concurrency: 16, resync: Duration::from_secs(10 * 60) }
    }
}

/// Watches and, while `is_leader`, writes, until `shutdown` resolves. Writes in flight then are given up; the next leader makes them.
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
        is_leader: Box::new(is_leader),
    });
    tokio::select! {
        () = watch::all(&client, feeds, &metrics, &sender) => {}
        () = work(&manager, &options, changes) => {}
        () = shutdown => {}
    }
}

/// Looks at VMs as changes tell, in the order in which they are due.
async fn work(manager: &Arc<Manager>, options: &Options, mut changes: mpsc::UnboundedReceiver<Change>) {
    manager.knowledge.ready().await;
    info!(vms = manager.knowledge.vmis.len(), "everything has been seen once");
    let mut queue = Queue::default();
    let mut tasks = JoinSet::new();
    let mut leading = false;
    let mut check = interval(Duration::from_millis(500));
    let mut resync = interval(options.resync);
    loop {
        let now = Instant::now();
        while leading && tasks.len() < options.concurrency.max(1) {
            let Some(key) = queue.take(now) else { break };
            let manager = Arc::clone(manager);
            tasks.spawn(async move {
                let result = manager.reconcile(&key).await;
                (key, result)
            });
        }
        let room = tasks.len() < options.concurrency.max(1);
        let due = queue.next().filter(|_| leading && room);
        tokio::select! {
            change = changes.recv() => match change {
                None => return,
                Some(_) if !leading => {}
                Some(Change::One(key)) => queue.add(key, now),
                Some(Change::All) => manager.add_all(&mut queue, now),
            },
            Some(ended) = tasks.join_next(), if !tasks.is_empty() => match ended {
                Ok((key, Ok(again))) => queue.done(key, true, again, Instant::now()),
                Ok((key, Err(error))) => {
                    warn!(namespace = key.namespace, vm = key.name, %error, "it is tried again after a pause");
                    queue.done(key, false, None, Instant::now());
                }
                // A panic: the process's own defect. The key stays busy, the others go on; the resync cannot mend it, a restart does.
                Err(error) => warn!(%error, "looking at a VM ended abruptly"),
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

/// What the leader remembers of a VM, so that nothing is told twice while the watches lag behind the writes.
#[derive(Debug, Clone, Default)]
struct Memory {
    told: Option<Verdict>,
    recorded: Option<String>,
    warned: HashSet<String>,
}

struct Manager {
    knowledge: Knowledge,
    writer: Writer,
    metrics: ManagerMetrics,
    memory: Mutex<HashMap<Key, Memory>>,
    is_leader: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Manager {
    fn add_all(&self, queue: &mut Queue, now: Instant) {
        for vmi in self.knowledge.vmis.state() {
            queue.add(Key { namespace: vmi.namespace().unwrap_or_default(), name: vmi.name_any() }, now);
        }
    }

    fn remember<T>(&self, key: &Key, change: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        change(memory.entry(key.clone()).or_default())
    }

    fn forget_all(&self) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Brings what is written about one VM in line with what is known of it. Returns when to look again.
    async fn reconcile(&self, key: &Key) -> Result<Option<Duration>, WriteError> {
        if !(self.is_leader)() {
            return Ok(None);
        }
        let Some(vmi) = self.knowledge.vmi(&key.namespace, &key.name) else {
            // Its forecast goes with it: it is the owner.
            self.memory.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            return Ok(None);
        };
        let stored = self.knowledge.forecast(&key.namespace, &key.name);
        let policy = self.knowledge.policy(&vmi);
        // One look through all migrations, and none at all on the way of admission.
        let migrations = self.knowledge.migrations_of(&key.namespace, &key.name);
        let mut queued = false;
        match self.knowledge.desired(&vmi, policy.as_deref()) {
            Desired::Ask(mut spec) => {
                if let Some(left) = observe::hand_over(&vmi, &spec.node_name, stored.as_deref(), Timestamp::now()) {
                    return Ok(Some(left));
                }
                let hint = Hint::of(&migrations);
                let occupied = hint.is_some() || vmi.is_migrating() || vmi.is_hotplugging();
                match self.knowledge.dry_run(&vmi, policy.as_deref(), &spec, occupied, Timestamp::now()) {
                    Wish::Run(dry_run) => spec.dry_run = Some(dry_run),
                    Wish::Queue => queued = true,
                    Wish::Nothing => {}
                }
                if let Some(wanted) = observe::wanted(&vmi, *spec, hint.as_ref(), stored.as_deref()) {
                    let dry_run = wanted.spec.dry_run.as_ref().map(|dry_run| dry_run.id.as_str());
                    debug!(namespace = key.namespace, vm = key.name, node = wanted.spec.node_name, dry_run, "asking");
                    self.writer.ask(&wanted).await?;
                    // The rest when the watch shows it.
                    return Ok(None);
                }
            }
            Desired::Nothing => {
                // Only what is ours goes: whatever else bears the VM's name stays.
                let ours = |forecast: &MigrationForecast| {
                    forecast.owner_references().iter().any(|owner| Some(&owner.uid) == vmi.metadata.uid.as_ref())
                };
                if let Some(stored) = stored.as_deref().filter(|stored| ours(stored)) {
                    self.writer.delete(stored).await?;
                }
                return Ok(None);
            }
            Desired::Wait => {}
        }
        let Some(stored) = stored else { return Ok(None) };
        self.tell(key, &vmi, &stored, &migrations).await?;
        self.warn(key, policy.is_some(), &migrations).await;
        let again = observe::look_again(&stored, Timestamp::now());
        // Nothing tells this VM that another one's dry run has ended.
        Ok(if queued { Some(again.map_or(QUEUED, |again| again.min(QUEUED))) } else { again })
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
        let candidate =
            Candidate { namespace: &key.namespace, vmi_name: &key.name, leaves_cluster: false, origin: Origin::Person };
        let decision = self.knowledge.judge(candidate, now).decision;
        let memory = self.remember(key, |memory| memory.clone());
        let ended = observe::unrecorded(migrations, Some(vmi), stored).filter(|migration| migration.uid() != memory.recorded);
        let outcome = ended.map(|migration| observe::outcome(migration, Some(vmi), Some(stored)));

        let own = observe::own_status(stored, &decision, outcome.clone(), now);
        if observe::differs(stored, &own) {
            self.writer.tell(stored, &own).await?;
        }
        if let (Some(migration), Some(outcome)) = (ended, outcome) {
            self.remember(key, |memory| memory.recorded = migration.uid());
            let verdict = format!("{:?}", outcome.verdict.unwrap_or(Verdict::Unknown));
            self.metrics.outcomes.with_label_values(&[outcome.phase.as_str(), &verdict]).inc();
            if let Some(error) = outcome.relative_error {
                self.metrics.forecast_error.with_label_values(&[&verdict]).observe(error.abs());
            }
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

    /// Repeats admission's warnings as events: virtctl and KubeVirt's own controllers show none.
    async fn warn(&self, key: &Key, has_policy: bool, migrations: &[Arc<VirtualMachineInstanceMigration>]) {
        // The built-in policy only audits: it warns nobody.
        if !has_policy {
            return;
        }
        for migration in migrations {
            let uid = migration.uid().unwrap_or_default();
            if migration.is_final()
                || migration.spec.receive.is_some()
                || self.remember(key, |memory| memory.warned.contains(&uid))
            {
                continue;
            }
            let candidate = Candidate {
                namespace: &key.namespace,
                vmi_name: &key.name,
                leaves_cluster: migration.spec.send_to.is_some(),
                origin: Origin::of(migration.annotations()),
            };
            let decision = self.knowledge.judge(candidate, Timestamp::now()).decision;
            if let Some(notice) = observe::warning_notice(migration, &decision) {
                self.remember(key, |memory| memory.warned.insert(uid));
                self.writer.notify(&migration.object_ref(&()), notice).await;
            }
        }
    }
}
