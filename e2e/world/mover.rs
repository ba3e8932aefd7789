//! The guests of a world, and how they move: between two QEMUs of this machine, under KubeVirt's orders.
//!
//! In: booted guests by namespace and name. Out: a [`Mover`] for the stand-in, and what became of each migration. What has no guest moves by
//! the clock.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use migvisor::qemu::migration;

use crate::{
    kubevirt::{self, Job, Mover, Order, Paced},
    lab::{self, Nudge, Settings, Truth, Vm},
};

/// KubeVirt's part keeps the clock; the laboratory's own budget only has to be longer.
const SLACK: Duration = Duration::from_secs(60);
/// How long a VM moves that has no guest.
const PACE: Paced = Paced(Duration::from_secs(1));

/// Namespace and name.
pub(super) type Name = (String, String);

/// The guests, by namespace and name, and what became of their migrations.
#[derive(Debug, Default)]
pub(super) struct Guests {
    vms: Mutex<HashMap<Name, Vm>>,
    /// Those that are being moved.
    away: Mutex<HashSet<Name>>,
    truths: Mutex<HashMap<Name, Truth>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub(super) fn take(&self, key: &Name) -> Result<Vm> {
        let vm = lock(&self.vms).remove(key);
        vm.with_context(|| format!("no guest {}/{} runs here, or it is being moved", key.0, key.1))
    }

    pub(super) fn put(&self, key: &Name, vm: Vm) {
        lock(&self.vms).insert(key.clone(), vm);
    }

    pub(super) fn truth(&self, key: &Name) -> Option<Truth> {
        lock(&self.truths).get(key).cloned()
    }

    /// Takes a guest to move it; `None`: there is none.
    fn depart(&self, key: &Name) -> Option<Vm> {
        let vm = lock(&self.vms).remove(key)?;
        lock(&self.away).insert(key.clone());
        Some(vm)
    }

    /// It has arrived, or stayed; where its VMI was deleted meanwhile, it ends.
    fn arrive(&self, key: &Name, vm: Vm) {
        if lock(&self.away).remove(key) {
            self.put(key, vm);
        }
    }

    fn end(&self, key: &Name) {
        lock(&self.away).remove(key);
        drop(lock(&self.vms).remove(key));
    }
}

/// Moves a guest between two QEMUs, as virt-launcher would.
pub(super) struct LabMover {
    pub(super) guests: Arc<Guests>,
    pub(super) sockets: PathBuf,
}

impl Mover for LabMover {
    async fn migrate(&self, job: Job) -> kubevirt::Outcome {
        let key = (job.namespace.clone(), job.vmi.clone());
        let Some(vm) = self.guests.depart(&key) else { return PACE.migrate(job).await };
        match self.try_migrate(&key, vm, job).await {
            Ok(outcome) => outcome,
            Err(error) => kubevirt::Outcome::failure(format!("{error:#}")),
        }
    }

    async fn end(&self, namespace: &str, vmi: &str) {
        self.guests.end(&(namespace.to_owned(), vmi.to_owned()));
    }
}

impl LabMover {
    async fn try_migrate(&self, key: &Name, mut source: Vm, mut job: Job) -> Result<kubevirt::Outcome> {
        let spec = source.spec().clone().qmp(socket(&self.sockets, &job.target.pod_uid));
        let mut target = match Vm::incoming(spec).await {
            Ok(target) => target,
            Err(error) => {
                self.guests.arrive(key, source);
                return Err(error);
            }
        };
        let settings = Settings {
            bandwidth: job.bandwidth,
            // A guest that is stopped at the end of its budget gets it once more.
            time_budget: job.time_budget.unwrap_or(Duration::from_secs(3600)) * 2 + SLACK,
            auto_converge: job.configuration.flag("allowAutoConverge"),
            post_copy: job.configuration.flag("allowPostCopy"),
            ..Settings::uncapped()
        };
        let mut orders = job.orders.clone();
        let mut last = Order::GoOn;
        let nudge = || {
            let order = *orders.borrow_and_update();
            let nudge = match order {
                _ if order == last => None,
                Order::SuspendGuest => Some(Nudge::Suspend),
                Order::StartPostCopy => Some(Nudge::PostCopy),
                Order::GoOn | Order::Abort => None,
            };
            last = order;
            nudge
        };
        let ended = tokio::select! {
            ended = lab::migrate_under(&mut source, &mut target, settings, nudge) => ended.map(Some),
            () = job.aborted() => Ok(None),
        };
        let outcome = match ended {
            Ok(Some(truth)) => {
                let outcome = match truth.status {
                    lab::Outcome::Completed => kubevirt::Outcome::success(),
                    lab::Outcome::TimedOut | lab::Outcome::Failed => kubevirt::Outcome::aborted(),
                };
                lock(&self.guests.truths).insert(key.clone(), truth);
                outcome
            }
            Ok(None) => match cancel(&mut source).await {
                Ok(()) => kubevirt::Outcome::aborted(),
                Err(error) => kubevirt::Outcome::failure(format!("{error:#}")),
            },
            Err(error) => kubevirt::Outcome::failure(format!("{error:#}")),
        };
        self.guests.arrive(key, if outcome.succeeded { target } else { source });
        Ok(outcome)
    }
}

/// Ends a migration; a guest that was stopped for it runs on.
async fn cancel(source: &mut Vm) -> Result<()> {
    migration::cancel(source.lab()).await?;
    source.resume().await
}

/// Where the product finds the QEMU of this pod.
pub(super) fn socket(directory: &Path, pod_uid: &str) -> PathBuf {
    directory.join(format!("{pod_uid}.sock"))
}
