//! The guests of a world, and who moves them: KubeVirt's part asks, the laboratory does it for real, between two QEMUs or two libvirts.
//!
//! In: guests, jobs. Out: moved guests, and the truth of each migration.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Result, anyhow};
use migvisor::qemu::migration;

use crate::{
    kubevirt::{self, Job, Mover, Order},
    lab::{self, Launcher, Settings, Truth, Vm},
};

/// KubeVirt's part keeps the clock; the laboratory's own budget only has to be longer.
const SLACK: Duration = Duration::from_secs(60);

/// The guests, by namespace and name, and what became of their migrations.
#[derive(Debug, Default)]
pub(crate) struct Guests {
    vms: Mutex<HashMap<(String, String), Vm>>,
    /// Those in pods, with a libvirt each.
    launchers: Mutex<HashMap<(String, String), Launcher>>,
    truths: Mutex<HashMap<(String, String), Truth>>,
}

impl Guests {
    pub(crate) fn take(&self, key: &(String, String)) -> Result<Vm> {
        let vm = self.vms.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        vm.ok_or_else(|| anyhow!("no guest {}/{} runs here, or it is being moved", key.0, key.1))
    }

    pub(crate) fn put(&self, key: &(String, String), vm: Vm) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), vm);
    }

    pub(crate) fn take_launcher(&self, key: &(String, String)) -> Option<Launcher> {
        self.launchers.lock().unwrap_or_else(PoisonError::into_inner).remove(key)
    }

    pub(crate) fn put_launcher(&self, key: &(String, String), launcher: Launcher) {
        self.launchers.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), launcher);
    }

    /// The socket of a guest's libvirt.
    pub(crate) fn libvirt(&self, key: &(String, String)) -> Option<PathBuf> {
        let launchers = self.launchers.lock().unwrap_or_else(PoisonError::into_inner);
        launchers.get(key).map(|launcher| launcher.socket().to_owned())
    }

    /// What became of a guest's migration.
    pub(crate) fn truth(&self, key: &(String, String)) -> Option<Truth> {
        self.truths.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn tell(&self, key: &(String, String), truth: Truth) {
        self.truths.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), truth);
    }
}

/// The name of a VM's domain, as KubeVirt gives it.
pub(crate) fn domain(namespace: &str, name: &str) -> String {
    format!("{namespace}_{name}")
}

/// Moves a guest between two QEMUs, as virt-launcher would.
pub(crate) struct LabMover {
    pub(crate) guests: Arc<Guests>,
    /// Where QMP sockets are.
    pub(crate) sockets: PathBuf,
    /// Where pods' directories are.
    pub(crate) pods: PathBuf,
}

impl Mover for LabMover {
    async fn migrate(&self, job: Job) -> kubevirt::Outcome {
        match self.try_migrate(job).await {
            Ok(outcome) => outcome,
            Err(error) => kubevirt::Outcome::failure(format!("{error:#}")),
        }
    }
}

impl LabMover {
    async fn try_migrate(&self, mut job: Job) -> Result<kubevirt::Outcome> {
        let key = (job.namespace.clone(), job.vmi.clone());
        if let Some(source) = self.guests.take_launcher(&key) {
            return self.try_migrate_domain(job, &key, source).await;
        }
        let mut source = self.guests.take(&key)?;
        let spec = source.spec().clone().qmp(socket(&self.sockets, &job.target.pod_uid));
        let mut target = match Vm::incoming(spec).await {
            Ok(target) => target,
            Err(error) => {
                self.guests.put(&key, source);
                return Err(error);
            }
        };
        let settings = settings(&job);
        let ended = tokio::select! {
            ended = lab::migrate(&mut source, &mut target, settings) => ended.map(Some),
            () = aborted(&mut job) => Ok(None),
        };
        let outcome = match ended {
            Ok(Some(truth)) => {
                let outcome = outcome(&truth);
                self.guests.tell(&key, truth);
                outcome
            }
            Ok(None) => {
                migration::cancel(source.lab()).await?;
                kubevirt::Outcome::aborted()
            }
            Err(error) => kubevirt::Outcome::failure(format!("{error:#}")),
        };
        self.guests.put(&key, if outcome.succeeded { target } else { source });
        Ok(outcome)
    }
}

impl LabMover {
    /// From libvirt to libvirt.
    async fn try_migrate_domain(&self, mut job: Job, key: &(String, String), source: Launcher) -> Result<kubevirt::Outcome> {
        let domain = domain(&job.namespace, &job.vmi);
        let (settings, target) = (settings(&job), source.like(&self.pods, &job.target.pod_uid).await);
        let target = match target {
            Ok(target) => target,
            Err(error) => {
                self.guests.put_launcher(key, source);
                return Err(error);
            }
        };
        let ended = {
            let mut moving = std::pin::pin!(lab::migrate_domain(&source, &target, &domain, settings));
            tokio::select! {
                ended = &mut moving => ended,
                () = aborted(&mut job) => match source.virsh(&["domjobabort", &domain]).await {
                    Ok(_) => moving.await,
                    Err(error) => Err(error),
                },
            }
        };
        let ended = ended.map(|truth| {
            let outcome = outcome(&truth);
            self.guests.tell(key, truth);
            outcome
        });
        let outcome = ended.unwrap_or_else(|error| kubevirt::Outcome::failure(format!("{error:#}")));
        self.guests.put_launcher(key, if outcome.succeeded { target } else { source });
        Ok(outcome)
    }
}

fn settings(job: &Job) -> Settings {
    Settings {
        bandwidth: job.bandwidth,
        time_budget: job.time_budget.unwrap_or(Duration::from_secs(3600)) + SLACK,
        ..Settings::uncapped()
    }
}

fn outcome(truth: &Truth) -> kubevirt::Outcome {
    match truth.status {
        lab::Outcome::Completed => kubevirt::Outcome::success(),
        lab::Outcome::TimedOut | lab::Outcome::Failed => kubevirt::Outcome::aborted(),
    }
}

async fn aborted(job: &mut Job) {
    let mut order = Order::GoOn;
    while order != Order::Abort {
        order = job.next_order(order).await;
    }
}

pub(crate) fn socket(directory: &Path, pod_uid: &str) -> PathBuf {
    directory.join(format!("{pod_uid}.sock"))
}
