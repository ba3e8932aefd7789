//! The guests of a world, and how they move: between two QEMUs or two libvirts of this machine, under KubeVirt's orders.
//!
//! In: booted guests by namespace and name. Out: a [`Mover`] for the stand-in, and what became of each migration. What has no guest moves by
//! the clock.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use migvisor::qemu::migration;

use crate::{
    kubevirt::{self, Job, Mover, Order, Paced},
    lab::{self, Launcher, Nudge, Settings, Truth, Vm},
};

/// KubeVirt's part keeps the clock; the laboratory's own budget only has to be longer.
const SLACK: Duration = Duration::from_secs(60);
/// How long a VM moves that has no guest.
const PACE: Paced = Paced(Duration::from_secs(1));

/// Namespace and name.
pub(super) type Name = (String, String);

/// What runs a guest.
#[derive(Debug)]
pub(super) enum Guest {
    /// A QEMU of its own.
    Bare(Box<Vm>),
    /// A pod's libvirt.
    InPod(Box<Launcher>),
}

/// The guests, by namespace and name, and what became of their migrations.
#[derive(Debug, Default)]
pub(super) struct Guests {
    here: Mutex<HashMap<Name, Guest>>,
    /// Those that are being moved.
    away: Mutex<HashSet<Name>>,
    truths: Mutex<HashMap<Name, Truth>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub(super) fn take(&self, key: &Name) -> Result<Vm> {
        match lock(&self.here).remove(key) {
            Some(Guest::Bare(vm)) => Ok(*vm),
            Some(pod) => {
                self.put(key, pod);
                bail!("{}/{} runs in a pod", key.0, key.1)
            }
            None => bail!("no guest {}/{} runs here, or it is being moved", key.0, key.1),
        }
    }

    pub(super) fn take_launcher(&self, key: &Name) -> Result<Launcher> {
        match lock(&self.here).remove(key) {
            Some(Guest::InPod(launcher)) => Ok(*launcher),
            Some(bare) => {
                self.put(key, bare);
                bail!("{}/{} runs in no pod", key.0, key.1)
            }
            None => bail!("no guest {}/{} runs here, or it is being moved", key.0, key.1),
        }
    }

    pub(super) fn put(&self, key: &Name, guest: Guest) {
        lock(&self.here).insert(key.clone(), guest);
    }

    /// The socket of a guest's libvirt.
    pub(super) fn libvirt(&self, key: &Name) -> Option<PathBuf> {
        match lock(&self.here).get(key)? {
            Guest::InPod(launcher) => Some(launcher.socket().to_owned()),
            Guest::Bare(_) => None,
        }
    }

    pub(super) fn truth(&self, key: &Name) -> Option<Truth> {
        lock(&self.truths).get(key).cloned()
    }

    /// Takes a guest to move it; `None`: there is none.
    fn depart(&self, key: &Name) -> Option<Guest> {
        let guest = lock(&self.here).remove(key)?;
        lock(&self.away).insert(key.clone());
        Some(guest)
    }

    /// It has arrived, or stayed; where its VMI was deleted meanwhile, it ends.
    fn arrive(&self, key: &Name, guest: Guest) {
        if lock(&self.away).remove(key) {
            self.put(key, guest);
        }
    }

    fn end(&self, key: &Name) {
        lock(&self.away).remove(key);
        drop(lock(&self.here).remove(key));
    }
}

/// The name of a VM's domain, as KubeVirt gives it.
pub(super) fn domain(namespace: &str, name: &str) -> String {
    format!("{namespace}_{name}")
}

/// Where the product finds the QEMU of this pod.
pub(super) fn socket(directory: &Path, pod_uid: &str) -> PathBuf {
    directory.join(format!("{pod_uid}.sock"))
}

/// Moves a guest as virt-launcher would.
pub(super) struct LabMover {
    pub(super) guests: Arc<Guests>,
    /// Where QMP sockets are.
    pub(super) sockets: PathBuf,
    /// Where pods' directories are.
    pub(super) pods: PathBuf,
}

impl Mover for LabMover {
    async fn migrate(&self, job: Job) -> kubevirt::Outcome {
        let key = (job.namespace.clone(), job.vmi.clone());
        let Some(guest) = self.guests.depart(&key) else { return PACE.migrate(job).await };
        let (guest, ended) = match guest {
            Guest::Bare(vm) => self.between_qemus(*vm, job).await,
            Guest::InPod(launcher) => self.between_libvirts(*launcher, job).await,
        };
        self.guests.arrive(&key, guest);
        match ended {
            Ok(Some(truth)) => {
                let outcome = match truth.status {
                    lab::Outcome::Completed => kubevirt::Outcome::success(),
                    lab::Outcome::TimedOut | lab::Outcome::Failed => kubevirt::Outcome::aborted(),
                };
                lock(&self.guests.truths).insert(key, truth);
                outcome
            }
            Ok(None) => kubevirt::Outcome::aborted(),
            Err(error) => kubevirt::Outcome::failure(format!("{error:#}")),
        }
    }

    async fn end(&self, namespace: &str, vmi: &str) {
        self.guests.end(&(namespace.to_owned(), vmi.to_owned()));
    }
}

/// What became of a migration; `None`: it was aborted before it had figures.
type Ended = Result<Option<Truth>>;

impl LabMover {
    /// The guest where it runs now, and how it went.
    async fn between_qemus(&self, mut source: Vm, mut job: Job) -> (Guest, Ended) {
        let spec = source.spec().clone().qmp(socket(&self.sockets, &job.target.pod_uid));
        let mut target = match Vm::incoming(spec).await {
            Ok(target) => target,
            Err(error) => return (Guest::Bare(Box::new(source)), Err(error)),
        };
        let settings = Settings {
            auto_converge: job.configuration.flag("allowAutoConverge"),
            post_copy: job.configuration.flag("allowPostCopy"),
            ..settings(&job)
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
        let ended = match ended {
            Ok(None) => cancel(&mut source).await.map(|()| None),
            ended => ended,
        };
        (Guest::Bare(Box::new(if arrived(&ended) { target } else { source })), ended)
    }

    /// The same from libvirt to libvirt.
    async fn between_libvirts(&self, source: Launcher, mut job: Job) -> (Guest, Ended) {
        let domain = domain(&job.namespace, &job.vmi);
        let target = match source.like(&self.pods, &job.target.pod_uid).await {
            Ok(target) => target,
            Err(error) => return (Guest::InPod(Box::new(source)), Err(error)),
        };
        let settings = settings(&job);
        let ended = {
            let mut moving = std::pin::pin!(lab::migrate_domain(&source, &target, &domain, settings));
            tokio::select! {
                ended = &mut moving => ended,
                () = job.aborted() => match source.virsh(&["domjobabort", &domain]).await {
                    Ok(_) => moving.await,
                    Err(error) => Err(error),
                },
            }
        };
        let ended = ended.map(Some);
        (Guest::InPod(Box::new(if arrived(&ended) { target } else { source })), ended)
    }
}

fn arrived(ended: &Ended) -> bool {
    ended.as_ref().is_ok_and(|truth| truth.as_ref().is_some_and(|truth| truth.status == lab::Outcome::Completed))
}

fn settings(job: &Job) -> Settings {
    Settings {
        bandwidth: job.bandwidth,
        // A guest that is stopped at the end of its budget gets it once more.
        time_budget: job.time_budget.unwrap_or(Duration::from_secs(3600)) * 2 + SLACK,
        ..Settings::uncapped()
    }
}

/// Ends a migration; a guest that was stopped for it runs on.
async fn cancel(source: &mut Vm) -> Result<()> {
    migration::cancel(source.lab()).await.context("cannot cancel the migration")?;
    source.resume().await
}
