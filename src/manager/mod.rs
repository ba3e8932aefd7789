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
//! | `reconcile` | one look at a VM, from the question to the events |
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
mod reconcile;
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
pub use knowledge::{Feeds, Knowledge};
use kube::{Client, ResourceExt};
pub use metrics::ManagerMetrics;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, interval},
};
use tracing::{info, warn};

use self::{
    apply::Writer,
    learn::Ledger,
    memory::Memory,
    queue::Queue,
    watch::{Change, Key},
};

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
}
