//! The manager's metrics. Names are without the prefix `migvisor_`, which the process's registry adds.

use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// Counters, gauges and histograms; register it with the process's registry. Clones share their numbers.
#[derive(Debug, Clone)]
pub struct ManagerMetrics {
    /// |forecast − real| / real of migrations that succeeded, by how they were forecast, the figure, and the verdict that they
    /// started with.
    pub forecast_error: HistogramVec,
    /// The median of ln(real / forecast), by how they were forecast and the figure.
    pub forecast_bias: GaugeVec,
    /// Pairs of nodes of whose line something is known.
    pub learned_pairs: IntGauge,
    /// Migrations that ended, by phase and the verdict that they started with.
    pub outcomes: IntCounterVec,
    /// Writes to the API server, by what was written and whether it went well.
    pub writes: IntCounterVec,
    /// Watches that ended with an error, by kind.
    pub watch_errors: IntCounterVec,
    /// Objects that could not be read, by kind.
    pub unreadable_objects: IntCounterVec,
}

impl ManagerMetrics {
    /// Fresh ones, not registered anywhere.
    ///
    /// # Errors
    /// A name is invalid: a defect of this program.
    pub fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            forecast_error: HistogramVec::new(
                HistogramOpts::new(
                    "forecast_error_ratio",
                    "|forecast - real| / real of migrations that succeeded, by method and quantity.",
                )
                .buckets(vec![0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0]),
                &["method", "quantity", "verdict"],
            )?,
            forecast_bias: GaugeVec::new(
                Opts::new("forecast_bias", "Median of ln(real / forecast) of the last migrations, by method and quantity."),
                &["method", "quantity"],
            )?,
            learned_pairs: IntGauge::new("learned_node_pairs", "Pairs of nodes of whose line something is known.")?,
            outcomes: IntCounterVec::new(
                Opts::new("migrations_total", "Migrations that ended, by phase and the verdict that they started with."),
                &["phase", "verdict"],
            )?,
            writes: IntCounterVec::new(Opts::new("manager_writes_total", "Writes to the API server."), &["object", "result"])?,
            watch_errors: IntCounterVec::new(Opts::new("watch_errors_total", "Watches that ended with an error."), &["kind"])?,
            unreadable_objects: IntCounterVec::new(
                Opts::new("unreadable_objects_total", "Objects that could not be read."),
                &["kind"],
            )?,
        })
    }

    fn parts(&self) -> [&dyn Collector; 7] {
        [
            &self.forecast_error,
            &self.forecast_bias,
            &self.learned_pairs,
            &self.outcomes,
            &self.writes,
            &self.watch_errors,
            &self.unreadable_objects,
        ]
    }
}

impl Collector for ManagerMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}
