//! The laboratory's paced guest as a pattern: the true write process, every page described.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_sign_loss, missing_docs)]

use migvisor::model::{
    forecast::HostConstants,
    pattern::{Pattern, Sample, Traces, Writer},
    replay::Settings,
    units::{Bandwidth, BytesPerSecond},
};
use serde::Deserialize;

/// One measured setting of `tests/data/qemu-migrations.json`: real migrations between two QEMU 10.0.2.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    pub name: String,
    pub pattern: String,
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    pub pages: u64,
    pub writes_per_ms: f64,
    #[serde(default)]
    pub hot_pages: u64,
    #[serde(default)]
    pub hot_share: f64,
    pub bandwidth_mib: Option<u64>,
    pub link_mib: Option<u64>,
    pub downtime_limit_ms: f64,
    pub real_total_ms: Vec<f64>,
    pub real_pages: Vec<f64>,
    pub real_syncs: Vec<f64>,
    #[serde(default)]
    pub real_downtime_ms: Vec<f64>,
    pub note: Option<String>,
}

fn default_memory() -> u64 {
    512
}

#[derive(Debug, Deserialize)]
struct ReferenceHost {
    line_rate: u64,
    zero_pages_per_ms: f64,
    setup_ms: f64,
    sync_ms: f64,
    completion_ms: f64,
}

#[derive(Debug, Deserialize)]
struct File {
    host: ReferenceHost,
    cases: Vec<Case>,
}

/// The host and the cases.
pub fn cases() -> (HostConstants, Vec<Case>) {
    let file: File = serde_json::from_str(include_str!("../data/qemu-migrations.json")).unwrap();
    let h = file.host;
    let host = HostConstants {
        line_rate: BytesPerSecond(h.line_rate),
        zero_pages_per_ms: h.zero_pages_per_ms,
        setup_ms: h.setup_ms,
        sync_ms: h.sync_ms,
        completion_ms: h.completion_ms,
    };
    (host, file.cases)
}

impl Case {
    /// Where the guest keeps its data: 32 MiB.
    pub const BASE: u64 = 8192;

    /// The true write process, page by page. `phase` is the write at which a sweep starts.
    pub fn truth(&self, phase: f64) -> Pattern {
        let n = self.pages as f64;
        let cold = self.writes_per_ms * (1.0 - self.hot_share) / n;
        let samples = (0..self.memory_mib << 8)
            .map(|page| {
                let data = page.checked_sub(Self::BASE).filter(|&j| j < self.pages);
                let writer = match data {
                    None => Writer::Idle,
                    Some(_) if self.pattern == "idle" => Writer::Idle,
                    Some(j) if self.pattern == "sequential" => {
                        Writer::Periodic { period: n / self.writes_per_ms, at: (j as f64 + 1.0 - phase) / self.writes_per_ms }
                    }
                    Some(j) if j < self.hot_pages => {
                        Writer::Random { rate: cold + self.writes_per_ms * self.hot_share / self.hot_pages as f64 }
                    }
                    Some(_) => Writer::Random { rate: cold },
                };
                Sample { page, weight: 1.0, zero: data.is_none() && page >= 32, writer }
            })
            .collect();
        Pattern::new(samples, Traces::default(), 60_000.0).unwrap()
    }

    /// The settings that it was measured under; uncapped over a link, the link is the line.
    pub fn settings(&self, host: HostConstants) -> Settings {
        let line_rate = self.link_mib.map_or(host.line_rate, |link| BytesPerSecond(link << 20));
        Settings {
            bandwidth: self.bandwidth_mib.map_or(Bandwidth::Unlimited, |cap| Bandwidth::Capped(BytesPerSecond(cap << 20))),
            downtime_limit_ms: self.downtime_limit_ms,
            deadline_ms: 30_000.0,
            host: HostConstants { line_rate, ..host },
        }
    }
}

/// The middle of a sorted copy.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n % 2 == 1 { sorted[n / 2] } else { f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]) }
}

/// A uniform writer as the collector would describe it: 4 096 samples of a guest of `mib` MiB.
pub fn sampled_guest(mib: u64, pages: u64, writes_per_ms: f64) -> Pattern {
    let total = mib << 8;
    let count = 4096;
    let weight = total as f64 / f64::from(count);
    let samples = (0..count)
        .map(|i| {
            let page = (f64::from(i) * weight) as u64;
            let data = page >= Case::BASE && page < Case::BASE + pages;
            let writer = if data { Writer::Random { rate: writes_per_ms / pages as f64 } } else { Writer::Idle };
            Sample { page, weight, zero: !data, writer }
        })
        .collect();
    Pattern::new(samples, Traces::default(), 12_000.0).unwrap()
}
