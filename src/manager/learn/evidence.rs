//! What a migration that has ended teaches. Pure.
//!
//! In: its outcome, what QEMU told of it, what KubeVirt says of its way. Out: lessons; none where something else than what is to
//! be learned may have decided.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::{
    api::{
        kubevirt::MigrationState,
        migration::{LastMigration, Outcome},
    },
    model::{
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

/// Did the other migration share a node with this one while it ran? Then neither had the line to itself. What is not known counts
/// as shared.
pub(super) fn is_beside(this: &MigrationState, other: &MigrationState) -> bool {
    let before = |one: Option<&Time>, two: Option<&Time>| one.zip(two).is_none_or(|(one, two)| one.0 <= two.0);
    let nodes = [&this.source_node, &this.target_node];
    let at_a_node = [&other.source_node, &other.target_node].iter().any(|node| node.is_empty() || nodes.contains(node));
    other.migration_uid != this.migration_uid
        && other.start_timestamp.is_some()
        && at_a_node
        && before(other.start_timestamp.as_ref(), this.end_timestamp.as_ref())
        && before(this.start_timestamp.as_ref(), other.end_timestamp.as_ref())
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

#[cfg(test)]
#[path = "evidence_tests.rs"]
mod tests;
