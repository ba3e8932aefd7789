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
//! One VM is looked at at a time, so that the agent's cost on a node is bounded. Everything is level-triggered: the loop may be
//! killed at any point and takes up from what the API server shows.

pub mod answer;
pub mod locate;
pub mod metrics;
pub mod publish;
pub mod schedule;
pub mod vm;
pub mod watch;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use tokio::{sync::watch::Receiver, task::spawn_blocking};
use tracing::{debug, info, warn};

use self::{
    answer::Asked,
    locate::Locate,
    metrics::AgentMetrics,
    publish::{Written, publish},
    schedule::{Job, Next},
    vm::{Key, Seen, Vm},
    watch::Questions,
};
use crate::{
    api::{MigrationForecastStatus, names::reason},
    collector::{self, CollectError, LookOptions, Observation},
    model::{forecast::HostConstants, pattern::PatternError, predict::forecast},
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

/// Why a look gave nothing.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Locate(#[from] locate::LocateError),
    #[error(transparent)]
    Collect(#[from] CollectError),
    #[error("the VM could not be looked for: {0}; this is a defect of migvisor, please report it")]
    Find(tokio::task::JoinError),
    #[error("the look did not end within {} s; look for a hanging QEMU monitor", .0.as_secs())]
    Timeout(Duration),
    #[error("the question is no more")]
    GivenUp,
    #[error("what was seen makes no pattern: {0}; look for a longer time (--look)")]
    Pattern(#[from] PatternError),
    #[error("what was seen could not be described: {0}; this is a defect of migvisor, please report it")]
    Describe(tokio::task::JoinError),
}

impl LookError {
    /// For the metric.
    fn result(&self) -> &'static str {
        match self {
            Self::Locate(_) => "not_found",
            Self::Collect(_) | Self::Pattern(_) | Self::Describe(_) | Self::Find(_) => "failed",
            Self::Timeout(_) => "timeout",
            Self::GivenUp => "given_up",
        }
    }
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
    let agent = Agent { client, options, locate: Arc::new(locate), metrics, questions, vms: BTreeMap::new(), looks: 0 };
    tokio::select! {
        ended = agent.work(&shutdown) => ended,
        () = watching => if shutdown.is_ending() { Ok(()) } else { Err(AgentError::WatchEnded) },
    }
}

struct Agent<L> {
    client: Client,
    options: Options,
    locate: Arc<L>,
    metrics: AgentMetrics,
    questions: Receiver<Questions>,
    vms: BTreeMap<Key, Vm>,
    /// How many looks were begun.
    looks: u64,
}

impl<L: Locate> Agent<L> {
    async fn work(mut self, shutdown: &Shutdown) -> Result<(), AgentError> {
        info!(node = %self.options.node, refresh = ?self.options.refresh, look = ?self.options.look.duration, "answering the forecasts of this node");
        loop {
            let next = self.plan();
            tokio::select! {
                () = shutdown.draining() => return Ok(()),
                done = self.step(next) => done?,
            }
        }
    }

    /// Takes up what is asked now and picks what to do.
    fn plan(&mut self) -> Next<Key> {
        let (now, wall) = (Instant::now(), Timestamp::now());
        let Options { host, refresh, .. } = &self.options;
        let questions = self.questions.borrow_and_update();
        self.vms.retain(|key, _| questions.ours.contains_key(key));
        for (key, object) in &questions.ours {
            if let Some(vm) = self.vms.get_mut(key) {
                vm.update(object, host, now, wall, *refresh);
            } else {
                self.vms.insert(key.clone(), Vm::new(object, host, now, wall, *refresh));
            }
        }
        self.metrics.show(&questions, &self.vms, now);
        let cases: Vec<_> = self.vms.iter().map(|(key, vm)| vm.case(key.clone(), now)).collect();
        schedule::next(&cases, now, *refresh)
    }

    async fn step(&mut self, next: Next<Key>) -> Result<(), AgentError> {
        let until = match next {
            Next::Now(key, job) => {
                match job {
                    Job::Look => self.look(&key).await,
                    Job::Answer => self.answer(&key).await,
                    Job::Write => self.write(&key).await,
                }
                return Ok(());
            }
            Next::Later(until) => until.min(Instant::now() + HEARTBEAT),
            Next::Never => Instant::now() + HEARTBEAT,
        };
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => Ok(()),
            changed = self.questions.changed() => changed.map_err(|_| AgentError::WatchEnded),
        }
    }

    async fn look(&mut self, key: &Key) {
        let Some(pod_uid) = self.vms.get(key).map(|vm| vm.pod_uid().to_owned()) else { return };
        let (namespace, name) = key;
        self.looks = self.looks.wrapping_add(1);
        let started = Instant::now();
        let looked = self.observe(key, &pod_uid).await;
        let took = started.elapsed();
        self.metrics.looks.with_label_values(&[looked.as_ref().map_or_else(LookError::result, |_| "ok")]).inc();
        let Some(vm) = self.vms.get_mut(key) else { return };
        match looked {
            Ok(seen) => {
                self.metrics.look_seconds.observe(took.as_secs_f64());
                info!(namespace, name, ?took, "looked");
                // Always a little early, never late: the answer has to stay fresh.
                vm.looked(seen, self.options.refresh.mul_f64(spread(0.9, 1.0)));
            }
            Err(LookError::GivenUp) => debug!(namespace, name, "the question went away while looking"),
            Err(error) => {
                let message = error.to_string();
                // Once, not at every attempt.
                if vm.trouble().is_none_or(|trouble| trouble.message != message) {
                    warn!(namespace, name, %error, "could not look");
                }
                vm.failed(reason::NOT_MEASURED, message, Instant::now(), spread(0.8, 1.2));
            }
        }
    }

    /// One look. Given up as soon as nobody asks about this pod any more.
    async fn observe(&self, key: &Key, pod_uid: &str) -> Result<Seen, LookError> {
        let (locate, uid) = (Arc::clone(&self.locate), pod_uid.to_owned());
        let target = spawn_blocking(move || locate.locate(&uid)).await.map_err(LookError::Find)??;
        // Other pages each time: what one draw of samples misses, the next one sees.
        let seed = self.options.look.seed.wrapping_add(self.looks);
        let look = LookOptions { seed, ..self.options.look.clone() };
        let limit = look.duration * 3 + Duration::from_secs(30);
        let observation = tokio::select! {
            observed = tokio::time::timeout(limit, collector::observe(&target, &look, |_| ())) =>
                observed.map_err(|_| LookError::Timeout(limit))??,
            () = self.gone(key, pod_uid) => return Err(LookError::GivenUp),
        };
        let (at, measured_at) = (Instant::now(), Timestamp::now());
        let pattern = spawn_blocking(move || Observation::pattern(&observation)).await.map_err(LookError::Describe)??;
        Ok(Seen { pattern: Arc::new(pattern), at, measured_at })
    }

    /// Resolves once `key` does not ask about this pod any more.
    async fn gone(&self, key: &Key, pod_uid: &str) {
        let mut questions = self.questions.clone();
        let asks = |questions: &Questions| questions.ours.get(key).is_some_and(|object| object.spec.pod_uid == pod_uid);
        if questions.wait_for(|questions| !asks(questions)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Answers from what is known: the fresh pattern, else the failure, else the question's own words.
    async fn answer(&mut self, key: &Key) {
        let now = Instant::now();
        let Some(vm) = self.vms.get(key) else { return };
        let asked = vm.question().clone();
        let status = match (vm.asked(), vm.fresh(now)) {
            (Asked::Words(why, message), _) => MigrationForecastStatus::unknown(why, message, &asked, None),
            (Asked::Model(question), Some(seen)) => {
                let (question, pattern, measured_at) = (question.clone(), seen.pattern.clone(), seen.measured_at);
                let replay = move || (forecast(&pattern, &question), question);
                match spawn_blocking(replay).await {
                    Ok((forecast, question)) => {
                        self.metrics.forecast_seconds.observe(now.elapsed().as_secs_f64());
                        MigrationForecastStatus::from_forecast(&forecast, &question, &asked, measured_at)
                    }
                    Err(error) => {
                        let message = format!("the forecast failed: {error}; this is a defect of migvisor, please report it");
                        MigrationForecastStatus::unknown(reason::NOT_MEASURED, message, &asked, None)
                    }
                }
            }
            (Asked::Model(_), None) => {
                let (why, message) = vm
                    .trouble()
                    .map_or((reason::NOT_MEASURED, "not looked at yet"), |trouble| (trouble.reason, &trouble.message));
                MigrationForecastStatus::unknown(why, message, &asked, vm.seen().map(|seen| seen.measured_at))
            }
        };
        if let Some(vm) = self.vms.get_mut(key) {
            let status = answer::with_condition(status, vm.published(), Timestamp::now());
            vm.answered(status, Instant::now());
        }
    }

    async fn write(&mut self, key: &Key) {
        let Some((vm, status)) = self.vms.get_mut(key).and_then(|vm| vm.to_write().cloned().map(|status| (vm, status))) else {
            return;
        };
        let (namespace, name) = key;
        let result = match publish(&self.client, key, vm.uid(), &status).await {
            Ok(written) => {
                debug!(namespace, name, verdict = ?status.verdict, reason = status.reason, ?written, "answered");
                vm.written(status, Instant::now());
                if written == Written::Done { "ok" } else { "gone" }
            }
            Err(error) => {
                warn!(namespace, name, error = with_causes(&error), "the answer was not written; trying again");
                vm.write_failed(Instant::now(), spread(0.8, 1.2));
                "error"
            }
        };
        self.metrics.writes.with_label_values(&[result]).inc();
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
