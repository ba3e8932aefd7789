//! Leader election: at most one replica acts, by a `coordination.k8s.io/v1` Lease.
//!
//! In: a client, the Lease's name, who we are. Out: a [`Leadership`] to look at before each act, and the future that keeps it.
//! The rules are client-go's: a Lease is only ever written on the version that was read; somebody else's is taken over once
//! *we* have seen it unchanged for its whole duration by our own monotonic clock, so that clocks may disagree; a leader that could
//! not renew within the renew deadline, which is shorter, has already stopped by then. kube-rs ships no election of its own.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{debug, info, warn};

use super::{client::with_causes, shutdown::Shutdown};

/// Whose Lease, and how patient.
#[derive(Debug, Clone)]
pub struct LeaseOptions {
    /// Where the Lease lives.
    pub namespace: String,
    /// What it is called.
    pub name: String,
    /// Who we are: different for every process that competes, such as the pod's name.
    pub identity: String,
    /// How long the others wait for a silent leader.
    pub duration: Duration,
    /// How long a leader may fail to renew before it stops by itself; shorter than `duration`.
    pub renew_deadline: Duration,
    /// The pause between two attempts.
    pub retry: Duration,
}

/// Kubernetes' usual: a Lease that was not renewed for so long is nobody's.
pub const DURATION: Duration = Duration::from_secs(15);

impl LeaseOptions {
    /// With Kubernetes' usual 15 s, 10 s, 2 s.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            identity: identity.into(),
            duration: DURATION,
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// Whether we lead. Cheap to clone; ask before each act.
#[derive(Debug, Clone)]
pub struct Leadership {
    ours: watch::Receiver<Option<Instant>>,
    anyones: watch::Receiver<Option<Instant>>,
}

impl Leadership {
    /// True only while the last renewal still binds the others, even if the task that renews were stuck.
    pub fn is_leader(&self) -> bool {
        self.ours.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Somebody leads, we or another: the Lease was renewed not longer ago than it lasts, by our own clock. What was renewed before we first
    /// saw it counts from then.
    pub fn is_anyones(&self) -> bool {
        self.anyones.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Resolves at the next gain or loss with the new state; a lost election task is a loss, once and for all.
    pub async fn changed(&mut self) -> bool {
        if self.ours.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.is_leader()
    }

    /// Resolves once we lead (now, if we do already).
    pub async fn gained(&mut self) {
        if self.ours.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Resolves once we do not lead: lost, expired, or the election ended.
    pub async fn lost(&mut self) {
        loop {
            let Some(until) = *self.ours.borrow_and_update() else { return };
            if Instant::now() >= until {
                return;
            }
            tokio::select! {
                changed = self.ours.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }
}

/// What we last saw of the Lease, and since when it looks like that by our own clock.
#[derive(Debug, Clone, PartialEq)]
struct Observed {
    version: Option<String>,
    spec: LeaseSpec,
    since: Instant,
}

/// What to do about the Lease now.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    /// It is ours, or free, or its holder is silent: write this.
    Write(Box<LeaseSpec>),
    /// It is somebody else's.
    Wait,
}

/// Keeps `since` while nothing changed. The version counts, not the times written in it: those are another clock's.
fn observe(before: Option<Observed>, lease: &Lease, now: Instant) -> Observed {
    let version = lease.metadata.resource_version.clone();
    match before {
        Some(before) if before.version == version => before,
        _ => Observed { version, spec: lease.spec.clone().unwrap_or_default(), since: now },
    }
}

/// Until when its holder, if it has one, may count on it.
fn binds_until(options: &LeaseOptions, observed: &Observed) -> Option<Instant> {
    let seconds = observed.spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let held = observed.spec.holder_identity.as_deref().is_some_and(|holder| !holder.is_empty());
    held.then(|| observed.since + seconds.map_or(options.duration, Duration::from_secs))
}

/// Decides. Pure: `now` is our monotonic clock, `wall` only what is written for people to read.
fn decide(options: &LeaseOptions, observed: Option<&Observed>, now: Instant, wall: Timestamp) -> Step {
    let wall = MicroTime(wall);
    let mine = LeaseSpec {
        holder_identity: Some(options.identity.clone()),
        lease_duration_seconds: Some(i32::try_from(options.duration.as_secs().max(1)).unwrap_or(i32::MAX)),
        acquire_time: Some(wall.clone()),
        renew_time: Some(wall),
        lease_transitions: Some(0),
        ..LeaseSpec::default()
    };
    let Some(observed) = observed else { return Step::Write(Box::new(mine)) };
    let holder = observed.spec.holder_identity.as_deref().unwrap_or_default();
    let transitions = observed.spec.lease_transitions.unwrap_or(0);
    if holder == options.identity {
        let acquire_time = observed.spec.acquire_time.clone().or(mine.acquire_time.clone());
        return Step::Write(Box::new(LeaseSpec { acquire_time, lease_transitions: Some(transitions), ..mine }));
    }
    if binds_until(options, observed).is_none_or(|until| now >= until) {
        return Step::Write(Box::new(LeaseSpec { lease_transitions: Some(transitions.saturating_add(1)), ..mine }));
    }
    Step::Wait
}

/// Takes part in the election until `shutdown`. Await (or spawn) the future: it does the work, and nothing leads without it.
/// While draining we lead no more, but the Lease is given back only once `Stopped`, so that work in flight ends before
/// somebody else's begins.
pub fn elect(client: Client, options: LeaseOptions, shutdown: Shutdown) -> (Leadership, impl Future<Output = ()> + Send) {
    let ((state, ours), (anyone, anyones)) = (watch::channel(None), watch::channel(None));
    let api = Api::namespaced(client, &options.namespace);
    let election = Election { api, options, state, anyone, observed: None };
    (Leadership { ours, anyones }, election.run(shutdown))
}

struct Election {
    api: Api<Lease>,
    options: LeaseOptions,
    state: watch::Sender<Option<Instant>>,
    anyone: watch::Sender<Option<Instant>>,
    observed: Option<Observed>,
}

impl Election {
    async fn run(mut self, shutdown: Shutdown) {
        loop {
            tokio::select! {
                () = self.round() => {}
                () = shutdown.draining() => break,
            }
            // Spread out, so that many replicas do not ask in step.
            let pause = if self.leads() { self.options.retry } else { self.options.retry.mul_f64(super::spread(1.0, 1.2)) };
            tokio::select! {
                () = sleep(pause) => {}
                () = shutdown.draining() => break,
            }
        }
        let led = self.leads();
        self.lead(None);
        // What is begun from now on finds nobody here.
        self.anyone.send_replace(None);
        if led {
            shutdown.stopped().await;
            self.release().await;
        }
    }

    fn leads(&self) -> bool {
        self.state.borrow().is_some()
    }

    /// Notes how long we lead; wakes the watchers only on gain and loss.
    fn lead(&self, until: Option<Instant>) {
        let Self { options, state, .. } = self;
        state.send_if_modified(|before| {
            let turned = before.is_some() != until.is_some();
            *before = until;
            if turned {
                info!(lease = %options.name, identity = %options.identity, leader = until.is_some(), "leadership changed");
            }
            turned
        });
    }

    /// One attempt to acquire or renew. The time that counts for us is before the request: others count from after it.
    async fn round(&mut self) {
        let started = Instant::now();
        let until = *self.state.borrow();
        let limit = until.unwrap_or(started + self.options.renew_deadline);
        match timeout_at(limit, self.attempt(started)).await {
            Ok(Ok(true)) => self.lead(Some(started + self.options.renew_deadline)),
            Ok(Ok(false)) => self.lead(None),
            Ok(Err(error)) => {
                warn!(lease = %self.options.name, error = with_causes(&error), "the Lease could not be read or written; trying again");
            }
            Err(_) => debug!(lease = %self.options.name, "the API server did not answer in time"),
        }
        if self.state.borrow().is_some_and(|until| Instant::now() >= until) {
            self.lead(None);
        }
        let until = self.observed.as_ref().and_then(|observed| binds_until(&self.options, observed));
        self.anyone.send_replace(until);
    }

    /// Reads, decides, writes; true: the Lease is ours.
    async fn attempt(&mut self, now: Instant) -> Result<bool, kube::Error> {
        let lease = self.api.get_opt(&self.options.name).await?;
        self.observed = lease.as_ref().map(|lease| observe(self.observed.take(), lease, now));
        let Step::Write(spec) = decide(&self.options, self.observed.as_ref(), now, Timestamp::now()) else {
            return Ok(false);
        };
        match self.write(lease, *spec).await {
            Ok(written) => {
                self.observed = Some(observe(None, &written, now));
                Ok(true)
            }
            // Somebody was quicker: not an error, look again at the next round.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn write(&self, lease: Option<Lease>, spec: LeaseSpec) -> Result<Lease, kube::Error> {
        let by = PostParams { field_manager: Some("migvisor".to_owned()), ..PostParams::default() };
        if let Some(mut lease) = lease {
            lease.spec = Some(spec);
            return self.api.replace(&self.options.name, &by, &lease).await;
        }
        let metadata = ObjectMeta { name: Some(self.options.name.clone()), ..ObjectMeta::default() };
        self.api.create(&by, &Lease { metadata, spec: Some(spec) }).await
    }

    /// Hands the Lease back at once instead of letting the others wait; on failure they just wait.
    async fn release(&self) {
        let give_back = async {
            let Some(mut lease) = self.api.get_opt(&self.options.name).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(self.options.identity.as_str()) {
                return Ok(());
            }
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(Timestamp::now()));
            self.api.replace(&self.options.name, &PostParams::default(), &lease).await.map(|_| ())
        };
        match timeout(self.options.retry, give_back).await {
            Ok(Ok(())) => info!(lease = %self.options.name, "the Lease is given back"),
            Ok(Err(error)) => {
                warn!(lease = %self.options.name, error = with_causes(&error), "the Lease was not given back; it runs out by itself");
            }
            Err(_) => warn!(lease = %self.options.name, "the Lease was not given back in time; it runs out by itself"),
        }
    }
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
