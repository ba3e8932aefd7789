//! Metrics: a Prometheus registry held by value, every name with the prefix `migvisor_`.
//!
//! In: names, help texts and label names, all constants. Out: the collectors, and the text exposition for `/metrics`.
//! Labels are of low cardinality only: kinds and reasons, never names, never error texts.

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector,
};

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Why a metric could not be made or shown: a programming error (a name used twice, an invalid name).
#[derive(Debug, thiserror::Error)]
#[error("metrics: {0}; this is a defect of migvisor, please report it")]
pub struct MetricsError(#[from] prometheus::Error);

/// The metrics of this process. Clones share the same registry.
#[derive(Debug, Clone)]
pub struct Metrics(Registry);

macro_rules! plain {
    ($(#[$doc:meta])* $name:ident -> $type:ident) => {
        $(#[$doc])*
        pub fn $name(&self, name: &str, help: &str) -> Result<$type, MetricsError> {
            self.register($type::with_opts(Opts::new(name, help))?)
        }
    };
}

macro_rules! labelled {
    ($(#[$doc:meta])* $name:ident -> $type:ident) => {
        $(#[$doc])*
        pub fn $name(&self, name: &str, help: &str, labels: &[&str]) -> Result<$type, MetricsError> {
            self.register($type::new(Opts::new(name, help), labels)?)
        }
    };
}

impl Metrics {
    /// An empty registry with `migvisor_build_info{version}` = 1.
    pub fn new() -> Result<Self, MetricsError> {
        let metrics = Self(Registry::new_custom(Some("migvisor".to_owned()), None)?);
        metrics
            .int_gauge_vec("build_info", "Which migvisor this is; always 1.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        Ok(metrics)
    }

    /// Registers any collector; the prefix is added.
    pub fn register<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, MetricsError> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    plain!(/** Registers a counter; its name ends in `_total`. */ counter -> IntCounter);
    plain!(/** Registers a gauge of whole numbers. */ int_gauge -> IntGauge);
    plain!(/** Registers a gauge. */ gauge -> Gauge);
    labelled!(/** Registers counters by label; the name ends in `_total`. */ counter_vec -> IntCounterVec);
    labelled!(/** Registers gauges of whole numbers by label. */ int_gauge_vec -> IntGaugeVec);
    labelled!(/** Registers gauges by label. */ gauge_vec -> GaugeVec);

    /// Registers a histogram with these upper bounds, in the unit that its name ends with.
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, MetricsError> {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }

    /// Registers histograms by label.
    pub fn histogram_vec(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> Result<HistogramVec, MetricsError> {
        self.register(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }

    /// Everything in Prometheus' text format.
    pub fn text(&self) -> Result<String, MetricsError> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_get_the_prefix_and_registries_are_apart() {
        let (one, two) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.counter_vec("looks_total", "Looks.", &["result"]).unwrap().with_label_values(&["ok"]).inc();
        one.histogram("look_seconds", "Seconds.", &[1.0, 2.0]).unwrap().observe(1.5);
        let text = one.text().unwrap();
        assert!(text.contains(r#"migvisor_looks_total{result="ok"} 1"#), "{text}");
        assert!(text.contains(r#"migvisor_look_seconds_bucket{le="2"} 1"#), "{text}");
        assert!(text.contains("migvisor_build_info{version="), "{text}");
        assert!(!two.text().unwrap().contains("looks"));
    }

    #[test]
    fn a_name_used_twice_is_an_error() {
        let metrics = Metrics::new().unwrap();
        metrics.counter("a_total", "A.").unwrap();
        assert!(metrics.counter("a_total", "A.").is_err());
    }
}
