//! What came of a dry run, and the forecast that it amounts to. Pure.

use std::time::Duration;

use serde::Serialize;

use super::{
    course::{Answer, Sync},
    whole_ms,
};
use crate::model::{
    forecast::{Forecast, Question},
    predict::{NO_BUDGET, of_dry_run},
    replay::{Outcome, WIRE_PAGE, WIRE_ZERO},
    units::{Bytes, BytesPerSecond, PAGE},
};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum End {
    /// Every limit was met.
    Met,
    /// The time budget was used up: what is not met fails.
    Budget,
    /// It went round in circles, and would have until the budget was used up.
    Hopeless,
    /// Its own deadline came first: what is not met is not known.
    Deadline,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Guest RAM.
    pub ram: Bytes,
    /// How it ended.
    pub end: End,
    /// From `migrate` to the end of the run.
    pub elapsed: Duration,
    /// What QEMU had done by the end of the run: its syncs, ...
    pub iterations: u64,
    /// ... pages sent, whole or, with XBZRLE, what had changed in them, ...
    pub normal_pages: u64,
    /// ... zero pages, ...
    pub zero_pages: u64,
    /// ... and bytes on the wire.
    pub wire: Bytes,
    pub(super) answers: Vec<Answer>,
    /// What the sink was paced at.
    pub(super) link: Option<BytesPerSecond>,
}

/// The answer for one downtime limit. Its JSON is a contract: plain numbers, the unit in the key.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limit {
    /// QEMU's `downtime-limit`.
    pub downtime_limit_ms: u64,
    /// Was it met within the time budget? `None`: the run ended too early to tell.
    pub converges: Option<bool>,
    /// Until QEMU would have stopped the guest, ms.
    pub convergence_ms: Option<f64>,
    /// For so long it would have stood still, ms.
    pub downtime_ms: Option<f64>,
    /// Both together, ms.
    pub total_ms: Option<f64>,
    /// QEMU's `dirty-sync-count`.
    pub iterations: Option<u64>,
    /// Guest memory that was still to be sent at that moment.
    pub remaining_bytes: Option<u64>,
    /// Pages sent whole, those of the downtime included.
    pub dirtied_pages: Option<u64>,
    /// On the wire, the downtime included.
    pub transferred_bytes: Option<u64>,
}

impl Report {
    /// How many bytes of an uncompressed stream one byte on the wire stood for: 1 without compression.
    pub fn compression_ratio(&self) -> f64 {
        let plain = self.normal_pages as f64 * WIRE_PAGE + self.zero_pages as f64 * WIRE_ZERO;
        if self.wire.0 > 0 && plain > 0.0 { plain / self.wire.0 as f64 } else { 1.0 }
    }

    /// One answer per downtime limit, the longest first.
    pub fn limits(&self, question: &Question) -> Vec<Limit> {
        self.answers.iter().map(|answer| self.limit(answer, question)).collect()
    }

    /// The forecast for the question's downtime limit; `None` where the run had no such limit, or ended before it could tell.
    pub fn forecast(&self, question: &Question) -> Option<Forecast> {
        let limit_ms = whole_ms(question.downtime_limit);
        let answer = self.answers.iter().find(|answer| whole_ms(answer.limit) == limit_ms)?;
        let (outcome, wire) = match answer.met {
            Some(met) => self.outcome(&met, question),
            None => (self.failure(question)?, self.wire.0 as f64 * self.stretch(question)),
        };
        Some(of_dry_run(&outcome, wire, self.ram.pages() as f64, question))
    }

    /// What the migration would have done that switches over at this sync, and its bytes on the wire.
    fn outcome(&self, met: &Sync, question: &Question) -> (Outcome, f64) {
        let left = met.pending / PAGE as f64;
        // What a page took so far it takes to the end.
        let page = ((met.wire - met.zero * WIRE_ZERO) / met.normal.max(1.0)).clamp(0.0, WIRE_PAGE);
        let line = self.link.unwrap_or(question.host.line_rate).min(question.host.line_rate);
        let downtime_ms = left * page / line.per_ms() + question.host.completion_ms;
        let outcome = Outcome {
            converged: question.time_budget.is_none_or(|budget| met.at_ms <= budget.as_secs_f64() * 1e3),
            total_ms: met.at_ms + downtime_ms,
            downtime_ms,
            // The guest once stopped, QEMU looks at the log a last time.
            syncs: met.count.saturating_add(1),
            pages: met.normal + left,
            zero_pages: met.zero,
        };
        (outcome, met.wire + left * page)
    }

    /// A limit that was not met would have gone on as it did.
    fn failure(&self, question: &Question) -> Option<Outcome> {
        if self.end == End::Deadline {
            return None;
        }
        let stretch = self.stretch(question);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count, stretched to a budget")]
        let syncs = (self.iterations as f64 * stretch) as u64;
        Some(Outcome {
            converged: false,
            total_ms: question.time_budget.unwrap_or(NO_BUDGET).as_secs_f64() * 1e3,
            downtime_ms: 0.0,
            syncs,
            pages: self.normal_pages as f64 * stretch,
            zero_pages: self.zero_pages as f64,
        })
    }

    /// A run that was given up early stands for the whole budget.
    fn stretch(&self, question: &Question) -> f64 {
        let whole = question.time_budget.unwrap_or(NO_BUDGET).as_secs_f64();
        (whole / self.elapsed.as_secs_f64().max(1e-3)).max(1.0)
    }

    fn limit(&self, answer: &Answer, question: &Question) -> Limit {
        let none = Limit {
            downtime_limit_ms: whole_ms(answer.limit),
            converges: (self.end != End::Deadline).then_some(false),
            convergence_ms: None,
            downtime_ms: None,
            total_ms: None,
            iterations: None,
            remaining_bytes: None,
            dirtied_pages: None,
            transferred_bytes: None,
        };
        let Some(met) = answer.met else { return none };
        let (outcome, wire) = self.outcome(&met, question);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts of bytes and pages, far below 2^63")]
        let whole = |value: f64| value.round() as u64;
        Limit {
            converges: Some(outcome.converged),
            convergence_ms: Some(met.at_ms),
            downtime_ms: Some(outcome.downtime_ms),
            total_ms: Some(outcome.total_ms),
            iterations: Some(outcome.syncs),
            remaining_bytes: Some(whole(met.pending)),
            dirtied_pages: Some(whole(outcome.pages)),
            transferred_bytes: Some(whole(wire)),
            ..none
        }
    }
}
