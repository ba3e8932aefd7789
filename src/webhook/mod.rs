//! Admission of live migrations, answered from memory.
//!
//! In: `AdmissionReview`s of `VirtualMachineInstanceMigration`s, on `POST /mutate-vmim` and `POST /validate-vmim`. Out: a patch that writes the
//! forecast into annotations; allow, allow with a warning, or deny. No I/O, no side effects: anybody may post a review, and a server may
//! ask as often as it likes. What cannot be read is let through with a warning; only what is no `AdmissionReview` at all is an HTTP error.

mod metrics;
mod review;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Json, Response},
    routing::post,
};
use k8s_openapi::jiff::Timestamp;
pub use metrics::AdmissionMetrics;
use tower_http::timeout::TimeoutLayer;
use tracing::info;

use self::review::{Answer, Request};
use crate::{
    api::convert,
    decision::{Action, Origin},
    manager::knowledge::{Candidate, Judgement, Knowledge},
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
    Router::new()
        .route(
            "/mutate-vmim",
            post(async |State(admission): State<Arc<Admission>>, body: Bytes| handle(&admission, "mutate", &body)),
        )
        .route(
            "/validate-vmim",
            post(async |State(admission): State<Arc<Admission>>, body: Bytes| handle(&admission, "validate", &body)),
        )
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, PATIENCE))
        .with_state(Arc::new(admission))
}

fn handle(admission: &Admission, webhook: &'static str, body: &[u8]) -> Response {
    let start = Instant::now();
    let response = match Request::read(body) {
        Ok(request) => {
            let answer = if webhook == "mutate" { mutate(admission, &request) } else { validate(admission, &request) };
            match request.review(answer) {
                Ok(review) => Json(review).into_response(),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write the answer: {error}\n")).into_response(),
            }
        }
        Err(error) => {
            admission.metrics.refused_bodies.inc();
            (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response()
        }
    };
    admission.metrics.latency.with_label_values(&[webhook]).observe(start.elapsed().as_secs_f64());
    response
}

/// Our annotations are ours: those that come in go, the forecast's are written. Never stands in the way.
fn mutate(admission: &Admission, request: &Request) -> Answer {
    if !request.is_create() {
        return Answer::allow();
    }
    let Some(migration) = request.migration() else { return Answer::allow() };
    let annotations = match judge(admission, request) {
        Some(Judgement { decision, forecast }) => match forecast.as_deref().and_then(|forecast| forecast.status.as_ref()) {
            Some(status) if decision.verdict != Verdict::Unknown => convert::annotations(status),
            _ => convert::unknown_annotations(decision.reason),
        },
        None => std::collections::BTreeMap::new(),
    };
    Answer::allow().with_patch(review::annotate(migration, annotations))
}

/// Allow, warn, deny.
fn validate(admission: &Admission, request: &Request) -> Answer {
    if !request.is_create() {
        return Answer::allow();
    }
    if let Some(problem) = request.problem() {
        admission.metrics.count("Unknown", Action::AllowWithWarning, "UnreadableObject", request.is_dry_run());
        return Answer::allow().with_warning(format!("migvisor cannot read this migration and lets it pass unseen: {problem}"));
    }
    let Some(Judgement { decision, .. }) = judge(admission, request) else { return Answer::allow() };
    admission.metrics.count(&format!("{:?}", decision.verdict), decision.action, decision.reason, request.is_dry_run());
    match decision.action {
        Action::Allow => Answer::allow(),
        Action::AllowWithWarning => Answer::allow().with_warning(decision.message),
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

/// The decision; `None` where there is nothing to decide (a migration that comes in from another cluster).
fn judge(admission: &Admission, request: &Request) -> Option<Judgement> {
    let migration = request.migration()?;
    if migration.spec.receive.is_some() {
        return None;
    }
    let no_annotations = std::collections::BTreeMap::new();
    let candidate = Candidate {
        namespace: request.namespace(),
        vmi_name: &migration.spec.vmi_name,
        leaves_cluster: migration.spec.send_to.is_some(),
        origin: Origin::of(migration.metadata.annotations.as_ref().unwrap_or(&no_annotations)),
    };
    Some(admission.knowledge.judge(candidate, (admission.clock)()))
}
