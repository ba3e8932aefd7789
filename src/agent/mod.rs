//! The node daemon: answers the `MigrationForecast`s of its node.
//!
//! In: the questions that the API server shows for this node, and the VMs that run here. Out: answers in their status, metrics.
//!
//! ```text
//! watch ──questions──▶ schedule ──▶ look (collector) ──▶ forecast (model) ──▶ publish (status, server-side apply)
//!                         ▲                │                  │                  │
//!                         └──────────── vm: what is known of each VM ────────────┘
//! ```
//!
//! Each arrow is a job, a task of its own; this loop only books what comes of them, so it never waits for a QEMU or an API server. One VM is
//! looked at at a time and one is rehearsed (a dry run), so that the agent's cost on a node is bounded; a CPU budget holds the whole process.
//! A QEMU is spoken to by one job at a time. Everything is level-triggered: the loop may be killed at any point and takes up from what the
//! API server shows and what the checkpoint kept.

pub mod along;
pub mod answer;
pub mod beside;
pub mod budget;
pub mod checkpoint;
mod dry_run;
mod jobs;
mod known;
pub mod locate;
pub mod metrics;
pub mod publish;
pub mod remedy;
pub mod schedule;
pub mod vm;
pub mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use tokio::{
    sync::watch::Receiver,
    task::{AbortHandle, JoinSet},
};
use tracing::{debug, info, warn};

use self::{
    budget::Budget,
    checkpoint::Checkpoint,
    dry_run::Task,
    jobs::{LookError, Outcome, Shared, cpu_used},
    known::Known,
    locate::Locate,
    metrics::AgentMetrics,
    publish::Written,
    schedule::{Job, Next, Room},
    vm::{Key, Life, Vm},
    watch::Questions,
};
use crate::{
    api::names::reason,
    collector::LookOptions,
    model::forecast::HostConstants,
    runtime::{
        client::with_causes,
        health::Readiness,
        metrics::{Metrics, MetricsError},
        shutdown::Shutdown,
        spread,
    },
};

/// The metrics are brought up to date at least this often.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// How the agent works.
#[derive(Debug, Clone)]
pub struct Options {
    /// The name of this node.
    pub node: String,
    /// How long a look takes, and by what means.
    pub look: LookOptions,
    /// How old a pattern gets before the VM is looked at again; under 14 minutes, so that answers stay fresh.
    pub refresh: Duration,
    /// What this host can do, where the question does not say.
    pub host: HostConstants,
    /// CPU seconds per second that the agent may use: 0.02 for two percent of a core.
    pub cpu: f64,
    /// Keeps patterns over a restart; `None`: nothing does.
    pub checkpoint: Option<Checkpoint>,
    /// Where the Lease of the manager that leads lives.
    pub lease_namespace: String,
}

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The metrics could not be registered.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The watch ended without being told to.
    #[error("the watch of MigrationForecasts ended; start the agent again")]
    WatchEnded,
}

/// Answers until `shutdown` drains. Readiness waits for the first whole list of questions.
pub async fn run(
    client: Client,
    options: Options,
    locate: impl Locate,
    registry: &Metrics,
    readiness: &Readiness,
    shutdown: Shutdown,
) -> Result<(), AgentError> {
    let metrics = AgentMetrics::new(registry)?;
    let ready = readiness.wait_for("watch of MigrationForecasts");
    let (questions, watching) = watch::questions(client.clone(), options.node.clone(), ready, shutdown.clone());
    let budget = Budget::new(options.cpu, cpu_used(), Instant::now());
    let shared = Arc::new(Shared { client, options, locate, questions: questions.clone(), shutdown: shutdown.clone() });
    let running = Running::default();
    let agent = Agent { shared, metrics, questions, vms: BTreeMap::new(), running, budget, looks: 0, tidied: false };
    tokio::select! {
        ended = agent.work(&shutdown) => ended,
        // At the end the watch ends first; jobs get the time that they need.
        () = async { watching.await; if shutdown.is_ending() { std::future::pending().await } } => Err(AgentError::WatchEnded),
    }
}

/// So many answers are written at a time: an API server that is slow for one of them should not hold up all.
const WRITES: usize = 4;
/// At the end dry runs get this long to leave their VMs as they found them.
const ENDING: Duration = Duration::from_secs(25);

/// The jobs that are under way.
#[derive(Default)]
struct Running {
    tasks: JoinSet<Outcome>,
    whose: HashMap<tokio::task::Id, (Key, Life, Job, AbortHandle)>,
}

impl Running {
    fn count(&self, job: Job) -> usize {
        self.whose.values().filter(|(_, _, other, _)| *other == job).count()
    }

    fn begin(&mut self, key: Key, life: Life, job: Job, work: impl Future<Output = Outcome> + Send + 'static) {
        let task = self.tasks.spawn(work);
        self.whose.insert(task.id(), (key, life, job, task));
    }

    /// The next job that has ended; never, while there is none. A job that panicked has no outcome.
    async fn next(&mut self) -> ((Key, Life, Job), Result<Outcome, tokio::task::JoinError>) {
        loop {
            let Some(ended) = self.tasks.join_next_with_id().await else { return std::future::pending().await };
            let (id, outcome) = match ended {
                Ok((id, outcome)) => (id, Ok(outcome)),
                Err(error) => (error.id(), Err(error)),
            };
            if let Some((key, life, job, _)) = self.whose.remove(&id) {
                return ((key, life, job), outcome);
            }
        }
    }

    /// Gives up everything but dry runs: those put their VMs back as they found them, and get the time for it.
    async fn end(mut self) {
        self.whose.values().filter(|(_, _, job, _)| *job != Job::DryRun).for_each(|(.., task)| task.abort());
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(ENDING, ended).await.is_err() {
            warn!("a dry run did not end in time; QEMU gives it up when this process is gone");
        }
    }
}

struct Agent<L> {
    shared: Arc<Shared<L>>,
    metrics: AgentMetrics,
    questions: Receiver<Questions>,
    vms: BTreeMap<Key, Vm>,
    running: Running,
    budget: Budget,
    /// How many looks were begun.
    looks: u64,
    /// The checkpoint was rid of VMs that are not here any more, once after the start.
    tidied: bool,
}

impl<L: Locate> Agent<L> {
    async fn work(mut self, shutdown: &Shutdown) -> Result<(), AgentError> {
        let Options { node, refresh, look, .. } = &self.shared.options;
        info!(%node, ?refresh, look = ?look.duration, "answering the forecasts of this node");
        loop {
            self.take_up();
            let until = self.begin_what_is_due().min(Instant::now() + HEARTBEAT);
            tokio::select! {
                () = shutdown.draining() => break,
                ((key, life, job), outcome) = self.running.next() => self.book(&key, &life, job, outcome),
                changed = self.questions.changed() => match changed {
                    Ok(()) => {}
                    // The watch hears of the end on its own, and perhaps before we do: that is no error.
                    Err(_) if shutdown.is_ending() => break,
                    Err(_) => return Err(AgentError::WatchEnded),
                },
                () = tokio::time::sleep_until(until.into()) => {}
            }
        }
        self.running.end().await;
        Ok(())
    }

    /// Takes up what is asked now.
    fn take_up(&mut self) {
        let (now, wall) = (Instant::now(), Timestamp::now());
        let Options { host, refresh, .. } = &self.shared.options;
        let questions = self.questions.borrow_and_update();
        self.vms.retain(|key, _| questions.ours.contains_key(key));
        for (key, object) in &questions.ours {
            if let Some(vm) = self.vms.get_mut(key) {
                vm.update(object, host, now, wall, *refresh);
            } else {
                self.vms.insert(key.clone(), Vm::new(object, host, now, wall, *refresh));
            }
        }
        if questions.synced && !self.tidied {
            self.tidied = true;
            jobs::tidy(&self.shared, questions.ours.values().map(|object| object.spec.pod_uid.clone()).collect());
        }
        self.budget.used(cpu_used(), now);
        self.metrics.show(&questions, &self.vms, now);
    }

    /// Begins everything that is due and that there is room for; returns when to look again.
    fn begin_what_is_due(&mut self) -> Instant {
        loop {
            let now = Instant::now();
            let room = Room {
                write: self.running.count(Job::Write) < WRITES,
                answer: self.running.count(Job::Answer) == 0,
                look: self.running.count(Job::Look) == 0,
                dry_run: self.running.count(Job::DryRun) == 0,
                routine_from: self.budget.routine_from(),
            };
            let cases: Vec<_> = self.vms.iter().map(|(key, vm)| vm.case(key.clone(), now)).collect();
            match schedule::next(&cases, now, self.shared.options.refresh, &room) {
                Next::Now(key, job) => self.begin(key, job, now),
                Next::Later(until) => return until,
                Next::Never => return now + HEARTBEAT,
            }
        }
    }

    fn begin(&mut self, key: Key, job: Job, now: Instant) {
        let effort = self.budget.effort(self.vms.len(), self.shared.options.refresh);
        let Some(vm) = self.vms.get_mut(&key) else { return };
        let (shared, life) = (Arc::clone(&self.shared), vm.life().clone());
        let (k, l) = (key.clone(), life.clone());
        vm.begun(job);
        match job {
            Job::Recall => self.running.begin(key, life, job, async move { jobs::recall(&shared, &l).await }),
            Job::Look => {
                self.looks = self.looks.wrapping_add(1);
                // Other pages each time: what one draw of samples misses, the next one sees.
                let seed = self.looks;
                self.running.begin(key, life, job, async move { jobs::look(&shared, &k, &l, seed, effort).await });
            }
            Job::Answer => {
                let known = Known::of(vm, now);
                self.running.begin(key, life, job, known::answer(known));
            }
            Job::Write => match vm.to_write().cloned() {
                Some(status) => self.running.begin(key, life, job, async move { jobs::write(&shared, &k, &l, status).await }),
                None => vm.ended(job),
            },
            Job::Along => {
                let uid = vm.beside().hint().map(|hint| hint.migration_uid.clone()).unwrap_or_default();
                let last = self
                    .shared
                    .questions
                    .borrow()
                    .ours
                    .get(&key)
                    .and_then(|object| object.status.as_ref()?.last_migration.clone());
                self.running.begin(key, life, job, async move { jobs::read_along(&shared, &k, &l, uid, last).await });
            }
            Job::DryRun => match vm.beside().dry_run_wanted().map(|(asked, _)| asked.clone()) {
                Some(asked) => {
                    let task = Task {
                        asked,
                        question: vm.asked().clone(),
                        fingerprint: vm.question().fingerprint.clone(),
                        vmi_spec: vm.beside().vmi_spec().map(str::to_owned),
                    };
                    self.running.begin(key, life, job, async move { dry_run::dry_run(&shared, &k, &l, task).await });
                }
                None => vm.ended(job),
            },
        }
    }

    /// Takes note of what became of a job. What was found out about a VM that is not here any more, or another one by now, is dropped.
    fn book(&mut self, key: &Key, life: &Life, job: Job, outcome: Result<Outcome, tokio::task::JoinError>) {
        let (now, (namespace, name)) = (Instant::now(), key);
        let Some(vm) = self.vms.get_mut(key).filter(|vm| vm.life() == life) else { return };
        vm.ended(job);
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                warn!(namespace, name, ?job, %error, "a job broke off: this is a defect of migvisor, please report it");
                return vm.broke_off(job, &format!("the agent's job broke off ({error})"), now, spread(0.8, 1.2));
            }
        };
        match outcome {
            Outcome::Looked { looked, took, cost, effort } => {
                // Beside a dry run nobody can tell whose time it was.
                if self.running.count(Job::DryRun) == 0 {
                    self.budget.looked(cost, effort);
                }
                self.metrics.looks.with_label_values(&[looked.as_ref().map_or_else(LookError::result, |_| "ok")]).inc();
                match looked {
                    Ok(seen) => {
                        self.metrics.look_seconds.observe(took.as_secs_f64());
                        info!(namespace, name, ?took, effort, "looked");
                        // Always a little early, never late: the answer has to stay fresh.
                        vm.looked(seen, self.shared.options.refresh.mul_f64(spread(0.9, 1.0)));
                        // What a paused guest did not write says nothing of it once it runs.
                        if !vm.is_paused() {
                            jobs::keep(&self.shared, &life.pod_uid, vm.epochs().to_vec());
                        }
                    }
                    Err(LookError::GivenUp) => debug!(namespace, name, "the question went away while looking"),
                    Err(error) => {
                        let message = error.to_string();
                        // Once, not at every attempt.
                        if vm.trouble().is_none_or(|trouble| trouble.message != message) {
                            warn!(namespace, name, %error, "could not look");
                        }
                        vm.failed(reason::NOT_MEASURED, message, now, spread(0.8, 1.2));
                    }
                }
            }
            Outcome::Answered { status, took } => {
                self.metrics.forecast_seconds.observe(took.as_secs_f64());
                vm.answered(answer::with_condition(*status, vm.published(), Timestamp::now()), now);
            }
            Outcome::Written { status, written } => {
                let result = match written {
                    Ok(written) => {
                        debug!(namespace, name, verdict = ?status.verdict, reason = status.reason, ?written, "answered");
                        vm.written(*status, now);
                        if written == Written::Done { "ok" } else { "gone" }
                    }
                    Err(error) => {
                        warn!(namespace, name, error = with_causes(&error), "the answer was not written; trying again");
                        vm.write_failed(now, spread(0.8, 1.2));
                        "error"
                    }
                };
                self.metrics.writes.with_label_values(&[result]).inc();
            }
            Outcome::ReadAlong { migration_uid, read } => {
                if let Err(error) = read {
                    warn!(namespace, name, %error, "a migration was not read along to its end");
                }
                // Once, whatever came of it: what is gone does not come back.
                vm.read_along_to_its_end(migration_uid);
            }
            Outcome::Recalled(kept) => {
                let epochs = kept.unwrap_or_else(|error| {
                    warn!(namespace, name, %error, "a checkpoint is of no use");
                    vec![]
                });
                vm.remember(epochs, now, Timestamp::now(), self.shared.options.refresh);
            }
            Outcome::DryRun(status) => {
                info!(namespace, name, id = status.id, phase = ?status.phase, message = status.message, "dry run");
                vm.dry_run_ended(*status, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever embeds the agent may spawn it: this compiles only while that is so.
    #[allow(dead_code)]
    fn may_be_spawned(
        client: Client,
        options: Options,
        metrics: &'static Metrics,
        readiness: &'static Readiness,
        shutdown: Shutdown,
    ) {
        fn spawnable(_: impl Future<Output = Result<(), AgentError>> + Send + 'static) {}
        spawnable(run(client, options, locate::SocketDirectory::new("."), metrics, readiness, shutdown));
    }
}
