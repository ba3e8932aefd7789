//! The agent's metrics. Labels are kinds and results, never names.

use std::{collections::BTreeMap, time::Instant};

use prometheus::{Gauge, Histogram, IntCounterVec, IntGauge, IntGaugeVec};

use super::{
    vm::{Key, Vm},
    watch::Questions,
};
use crate::{
    model::forecast::Verdict,
    runtime::metrics::{Metrics, MetricsError},
};

/// All of them.
#[derive(Debug, Clone)]
pub struct AgentMetrics {
    /// Looks by result: `ok`, `failed`, `not_found`, `timeout`, `given_up` (the question went away).
    pub looks: IntCounterVec,
    /// How long looks took.
    pub look_seconds: Histogram,
    /// How long forecasts took.
    pub forecast_seconds: Histogram,
    /// Status writes by result: `ok`, `gone`, `error`.
    pub writes: IntCounterVec,
    vms: IntGauge,
    pattern_age: Gauge,
    verdicts: IntGaugeVec,
    ignored: IntGaugeVec,
}

impl AgentMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Result<Self, MetricsError> {
        let seconds = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 15.0, 30.0, 60.0];
        Ok(Self {
            looks: metrics.counter_vec("agent_looks_total", "Looks at VMs, by result.", &["result"])?,
            look_seconds: metrics.histogram("agent_look_seconds", "How long looks at VMs took.", &seconds)?,
            forecast_seconds: metrics.histogram("agent_forecast_seconds", "How long forecasts took to compute.", &seconds)?,
            writes: metrics.counter_vec("agent_status_writes_total", "Writes of answers, by result.", &["result"])?,
            vms: metrics.int_gauge("agent_vms", "VMs of this node that forecasts are asked of.")?,
            pattern_age: metrics
                .gauge("agent_pattern_age_max_seconds", "Age of the oldest pattern that answers are made from.")?,
            verdicts: metrics.int_gauge_vec("agent_verdicts", "VMs by the verdict that was written last.", &["verdict"])?,
            ignored: metrics.int_gauge_vec(
                "agent_forecasts_ignored",
                "MigrationForecasts that are not answered, by reason.",
                &["reason"],
            )?,
        })
    }

    /// Shows the present state.
    pub fn show(&self, questions: &Questions, vms: &BTreeMap<Key, Vm>, now: Instant) {
        self.vms.set(whole(vms.len()));
        self.ignored.with_label_values(&["other_node"]).set(whole(questions.foreign.len()));
        self.ignored.with_label_values(&["unreadable"]).set(whole(questions.unreadable.len()));
        let oldest = vms.values().filter_map(Vm::seen).map(|seen| now.saturating_duration_since(seen.at)).max();
        self.pattern_age.set(oldest.unwrap_or_default().as_secs_f64());
        for (verdict, name) in [
            (Verdict::Converges, "Converges"),
            (Verdict::Borderline, "Borderline"),
            (Verdict::Fails, "Fails"),
            (Verdict::Unknown, "Unknown"),
        ] {
            let count = vms.values().filter(|vm| vm.verdict() == Some(verdict)).count();
            self.verdicts.with_label_values(&[name]).set(whole(count));
        }
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
