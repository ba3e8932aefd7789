//! Admission's metrics. Names are without the prefix `migvisor_`, which the process's registry adds.

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::decision::Action;

/// Counters and a histogram; register it with the process's registry. Clones share their numbers.
#[derive(Debug, Clone)]
pub struct AdmissionMetrics {
    decisions: IntCounterVec,
    pub(super) refused_bodies: IntCounter,
    pub(super) latency: HistogramVec,
}

impl AdmissionMetrics {
    /// Fresh ones, not registered anywhere.
    ///
    /// # Errors
    /// A name is invalid: a defect of this program.
    pub fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            decisions: IntCounterVec::new(
                Opts::new("admission_decisions_total", "Decisions on migrations, dry-run requests aside."),
                &["verdict", "decision", "reason"],
            )?,
            refused_bodies: IntCounter::new("admission_bad_requests_total", "Bodies that were no AdmissionReview.")?,
            latency: HistogramVec::new(
                HistogramOpts::new("admission_seconds", "Time to answer an AdmissionReview, seconds.")
                    .buckets(vec![0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0]),
                &["webhook"],
            )?,
        })
    }

    /// Counts a decision, unless nothing comes of it.
    pub(super) fn count(&self, verdict: &str, action: Action, reason: &str, dry_run: bool) {
        if !dry_run {
            self.decisions.with_label_values(&[verdict, action.as_str(), reason]).inc();
        }
    }

    fn parts(&self) -> [&dyn Collector; 3] {
        [&self.decisions, &self.refused_bodies, &self.latency]
    }
}

impl Collector for AdmissionMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}
