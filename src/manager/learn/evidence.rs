//! What a migration that has ended teaches. Pure.
//!
//! In: its outcome, what QEMU told of it, what KubeVirt says of its way. Out: lessons; none where something else than what is to
//! be learned may have decided.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::SignedDuration};

use crate::{
    api::{
        forecast::HostConstants,
        kubevirt::MigrationState,
        migration::{LastMigration, Outcome},
    },
    model::{
        forecast::{self as model, Method},
        learn::{Figure, Lesson, Transfer},
        units::{Bandwidth, Bytes},
    },
};

/// How fast the line between two nodes was. What was cut off may have stood still before; after the switch to post-copy pages go
/// at the pace at which they are missed.
pub(super) fn rate(truth: &LastMigration, state: &MigrationState, cap: Bandwidth) -> Option<Lesson> {
    let (from, to) = (&state.source_node, &state.target_node);
    let pre_copy = matches!(state.mode.as_str(), "" | "PreCopy");
    if from.is_empty() || to.is_empty() || !truth.converged || !pre_copy {
        return None;
    }
    let sent = Transfer {
        wire: Bytes(truth.transferred_bytes),
        pages: truth.pages,
        zero_pages: truth.zero_pages,
        total: truth.total_time.0,
        cap,
    };
    let at = u64::try_from(state.end_timestamp.as_ref()?.0.as_second()).ok()?;
    Some(Lesson::Rate { from: from.clone(), to: to.clone(), at, rate: sent.line_rate()? })
}

/// Where nobody has noted the end of a migration that is under way no more, it counts as if it had taken so long.
const UNNOTED: SignedDuration = SignedDuration::from_hours(24);

/// Did the other migration share a node with this one while it ran? Then neither had the line to itself. What is not known counts
/// as shared. `runs`: the other one is under way.
pub(super) fn is_beside(this: &MigrationState, other: &MigrationState, runs: bool) -> bool {
    let before = |one: Option<&Time>, two: Option<&Time>| one.zip(two).is_none_or(|(one, two)| one.0 <= two.0);
    let nodes = [&this.source_node, &this.target_node];
    let at_a_node = [&other.source_node, &other.target_node].iter().any(|node| node.is_empty() || nodes.contains(node));
    let began_long_before = || {
        let began = other.start_timestamp.as_ref().zip(this.start_timestamp.as_ref());
        began.is_some_and(|(other, this)| this.0.duration_since(other.0) > UNNOTED)
    };
    other.migration_uid != this.migration_uid
        && other.start_timestamp.is_some()
        && at_a_node
        && before(other.start_timestamp.as_ref(), this.end_timestamp.as_ref())
        && before(this.start_timestamp.as_ref(), other.end_timestamp.as_ref())
        // Else a migration whose end was lost would have its nodes teach nothing any more.
        && (runs || other.end_timestamp.is_some() || !began_long_before())
}

/// (forecast − real) / real of each figure that can be compared.
pub(super) fn errors(outcome: &Outcome) -> impl Iterator<Item = (Figure, f64)> {
    let errors = Figure::ALL.map(|figure| {
        let error = match figure {
            Figure::TotalTime => outcome.relative_error,
            Figure::Downtime => outcome.downtime_error,
            Figure::Pages => outcome.pages_error,
        };
        error.map(|error| (figure, error))
    });
    errors.into_iter().flatten()
}

/// How far the forecast was off, where QEMU told: KubeVirt's whole seconds would say as much about clocks.
pub(super) fn off(outcome: &Outcome) -> Vec<Lesson> {
    let Some(method) = outcome.method.filter(|_| outcome.pages.is_some()) else { return Vec::new() };
    let lesson = |(figure, _): (Figure, f64)| {
        let (real, forecast) = match figure {
            Figure::TotalTime => (outcome.total_time?.as_ms(), outcome.forecast_total_time?.as_ms()),
            Figure::Downtime => (outcome.downtime?.as_ms(), outcome.forecast_downtime?.as_ms()),
            Figure::Pages => (outcome.pages? as f64, outcome.forecast_pages? as f64),
        };
        Lesson::error(method, figure, real, forecast)
    };
    errors(outcome).filter_map(lesson).collect()
}

/// What the hand-over took, by a forecast of the pattern: a dry run hands nothing over. `host`: what the question had for it.
pub(super) fn switchover(outcome: &Outcome, host: Option<&HostConstants>) -> Option<Lesson> {
    // As QEMU told, and comparable.
    let comparable = outcome.pages.is_some() && outcome.downtime_error.is_some();
    outcome.method.filter(|method| comparable && *method == Method::PatternCollector)?;
    let assumed = host.and_then(|host| host.completion_ms).unwrap_or_else(|| model::HostConstants::default().completion_ms);
    Lesson::switchover(outcome.downtime?.as_ms(), outcome.forecast_downtime?.as_ms(), assumed)
}

#[cfg(test)]
#[path = "evidence_tests.rs"]
mod tests;
