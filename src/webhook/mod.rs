//! Admission of live migrations and of their target pods, answered from memory.
//!
//! In: `AdmissionReview`s of `VirtualMachineInstanceMigration`s, on `POST /mutate-vmim` and `POST /validate-vmim`, and of pods, on `POST /mutate-pod`.
//! Out: a patch that writes the forecast into annotations; allow, allow with a warning, or deny; a patch that puts our scheduling gate on
//! the target pod of a migration that is to be held. No I/O, no side effects: anybody may post a review, and a server may ask as often
//! as it likes. What cannot be read is let through with a warning; only what is no `AdmissionReview` at all is an HTTP error.

mod metrics;
mod review;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Json, Response},
    routing::{MethodRouter, post},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
pub use metrics::AdmissionMetrics;
use tower_http::timeout::TimeoutLayer;
use tracing::info;

use self::review::{Admissible, Answer, Request};
use crate::{
    api::{convert, kubevirt::VirtualMachineInstanceMigration, names::annotation},
    decision::{Action, Origin},
    manager::{hold, judge::Judgement, knowledge::Knowledge},
    model::forecast::Verdict,
};

/// The largest review that is read. Objects in etcd are at most 1.5 MiB, and an update carries two.
pub const BODY_LIMIT: usize = 3 << 20;
/// A peer that has not sent its review by then is not waited for: no API server asks for longer than 30 s, nor sends so slowly.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the routes need.
#[derive(Debug, Clone)]
pub struct Admission {
    knowledge: Knowledge,
    metrics: AdmissionMetrics,
    clock: fn() -> Timestamp,
}

impl Admission {
    /// Answers from this knowledge, by the wall clock.
    pub fn new(knowledge: Knowledge, metrics: AdmissionMetrics) -> Self {
        Self { knowledge, metrics, clock: Timestamp::now }
    }

    /// With another clock, for tests.
    #[must_use]
    pub fn with_clock(self, clock: fn() -> Timestamp) -> Self {
        Self { clock, ..self }
    }
}

/// The routes.
pub fn router(admission: Admission) -> Router {
    fn route<K: Admissible + 'static>(
        webhook: &'static str,
        answer: fn(&Admission, &Request<K>) -> Answer,
    ) -> MethodRouter<Arc<Admission>> {
        post(async move |State(admission): State<Arc<Admission>>, body: Bytes| handle(&admission, webhook, answer, &body))
    }
    Router::new()
        .route("/mutate-vmim", route("mutate", mutate))
        .route("/validate-vmim", route("validate", validate))
        .route("/mutate-pod", route("gate", gate))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, PATIENCE))
        .with_state(Arc::new(admission))
}

fn handle<K: Admissible>(
    admission: &Admission,
    webhook: &'static str,
    answer: fn(&Admission, &Request<K>) -> Answer,
    body: &[u8],
) -> Response {
    let start = Instant::now();
    let response = match Request::read(body) {
        Ok(request) => match request.review(answer(admission, &request)) {
            Ok(review) => Json(review).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write the answer: {error}\n")).into_response(),
        },
        Err(error) => {
            admission.metrics.refused_bodies.inc();
            (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response()
        }
    };
    admission.metrics.latency.with_label_values(&[webhook]).observe(start.elapsed().as_secs_f64());
    response
}

type Migration = VirtualMachineInstanceMigration;

/// Our annotations are ours: those that come in go, the forecast's are written. Never stands in the way.
fn mutate(admission: &Admission, request: &Request<Migration>) -> Answer {
    if !request.is_create() {
        return Answer::allow();
    }
    let Some(migration) = request.object() else { return Answer::allow() };
    let annotations = match judge(admission, request) {
        Some((origin, Judgement { decision, forecast })) => {
            let mut annotations = match forecast.as_deref().and_then(|forecast| forecast.status.as_ref()) {
                Some(status) if decision.verdict != Verdict::Unknown => convert::annotations(status),
                _ => convert::unknown_annotations(decision.reason),
            };
            if !origin.is_kubevirts() && Origin::of_request(migration, None, true).is_kubevirts() {
                info!(
                    namespace = request.namespace(),
                    user = request.user(),
                    "not KubeVirt's controller (--kubevirt-controller): a migration that says it is a drain's or an update's counts as a person's"
                );
            }
            // Nobody else will be told who asked.
            annotations.insert(annotation::ORIGIN.to_owned(), origin.as_str().to_owned());
            annotations
        }
        None => BTreeMap::new(),
    };
    Answer::allow().with_patch(review::annotate(migration, annotations))
}

/// Allow, warn, deny. What will be held passes, and whoever made it is told.
fn validate(admission: &Admission, request: &Request<Migration>) -> Answer {
    if !request.is_create() {
        return Answer::allow();
    }
    if let Some(problem) = request.problem() {
        admission.metrics.count("Unknown", Action::AllowWithWarning, "UnreadableObject", request.is_dry_run());
        return Answer::allow().with_warning(format!("migvisor cannot read this migration and lets it pass unseen: {problem}"));
    }
    let Some((_, Judgement { decision, .. })) = judge(admission, request) else { return Answer::allow() };
    admission.metrics.count(&format!("{:?}", decision.verdict), decision.action, decision.reason, request.is_dry_run());
    match decision.action {
        Action::Allow => Answer::allow(),
        Action::AllowWithWarning | Action::Hold => Answer::allow().with_warning(decision.message),
        Action::Deny => {
            info!(
                namespace = request.namespace(),
                user = request.user(),
                reason = decision.reason,
                message = decision.message,
                "denied"
            );
            Answer::deny(decision.message)
        }
    }
}

/// Who wants it, and the decision; `None` where there is nothing to decide (a migration that comes in from another cluster), or it cannot be told
/// yet who asks: a drain's would pass for a person's.
fn judge(admission: &Admission, request: &Request<Migration>) -> Option<(Origin, Judgement)> {
    let migration = request.object().filter(|migration| migration.spec.receive.is_none())?;
    if !admission.knowledge.knows_kubevirt() {
        return None;
    }
    let candidate = admission.knowledge.request(request.namespace(), migration, request.user());
    Some((candidate.origin, admission.knowledge.judge(candidate, (admission.clock)())))
}

/// Holds a target pod: decided anew, from what is known now. A decision that has turned to a denial holds it as well, for the manager to
/// abandon the migration before anything is sent. Target pods are KubeVirt's to make: on anybody else's our gate is taken off.
fn gate(admission: &Admission, request: &Request<Pod>) -> Answer {
    let known = request.is_create() && admission.knowledge.knows_kubevirt();
    let Some(pod) = request.object().filter(|_| known) else { return Answer::allow() };
    if !admission.knowledge.is_kubevirt(request.user()) {
        return Answer::allow().with_patch(review::ungate(pod));
    }
    // Hotplug attachment pods and pods of other clusters' migrations are nobody's here.
    let Some(migration) = hold::migration_of(pod).and_then(|uid| admission.knowledge.migration(uid)) else {
        return Answer::allow();
    };
    let here = migration.metadata.namespace.as_deref() == Some(request.namespace());
    let vmi = admission.knowledge.vmi(request.namespace(), &migration.spec.vmi_name);
    let is_its_own = here && vmi.is_some_and(|vmi| hold::is_its_own(pod, &migration, &vmi));
    if !migration.is_under_way() || !is_its_own || hold::is_gated(pod) {
        return Answer::allow();
    }
    let candidate = admission.knowledge.candidate(&migration, None);
    let decision = admission.knowledge.judge(candidate, (admission.clock)()).decision;
    match decision.action {
        Action::Hold => Answer::allow().with_patch(review::gate(pod)),
        Action::Deny if admission.knowledge.is_managed() => Answer::allow().with_patch(review::gate(pod)),
        Action::Deny | Action::Allow | Action::AllowWithWarning => Answer::allow(),
    }
}
