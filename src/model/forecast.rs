//! The question that is asked of a pattern, and the information set that answers it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::units::{Bandwidth, BytesPerSecond, FASTEST, SLOWEST};

/// What a migration would run under. The pattern says what the guest does; this says what the world does.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// QEMU's `max-bandwidth`.
    pub bandwidth: Bandwidth,
    /// QEMU's `downtime-limit`.
    pub downtime_limit: Duration,
    /// KubeVirt gives up after this long; `None` means never (`completionTimeoutPerGiB: 0`).
    pub time_budget: Option<Duration>,
    /// What this host can do.
    pub host: HostConstants,
    /// What the policy wants beyond convergence.
    pub sla: Sla,
    /// How the three costs are weighed.
    pub weights: CostWeights,
}

/// Physical constants of a host, learned from short measurements or past migrations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostConstants {
    /// What the line carries when nothing caps it, bytes per second.
    pub line_rate: BytesPerSecond,
    /// How many zero pages are scanned and sent in a millisecond.
    pub zero_pages_per_ms: f64,
    /// From `migrate` to the first page, ms.
    pub setup_ms: f64,
    /// One dirty-log synchronisation, ms.
    pub sync_ms: f64,
    /// Stopping the guest, the device state, starting the guest, ms.
    pub completion_ms: f64,
}

impl Default for HostConstants {
    /// Assumptions for a host nobody has measured: as on the reference host (QEMU 10.0.2, KVM, a unix socket).
    fn default() -> Self {
        Self {
            line_rate: BytesPerSecond(2_306_867_200),
            zero_pages_per_ms: 1800.0,
            setup_ms: 3.0,
            sync_ms: 0.6,
            completion_ms: 5.0,
        }
    }
}

/// A host constant that cannot be.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{name} is {value}: it has to be {wanted}")]
pub struct AbsurdConstant {
    /// Its key.
    pub name: &'static str,
    /// What it is.
    pub value: f64,
    /// What it has to be.
    pub wanted: &'static str,
}

impl HostConstants {
    /// Checks constants that come from outside.
    pub fn check(&self) -> Result<(), AbsurdConstant> {
        let positive = |name, value: f64| {
            let sound = value.is_finite() && (1e-3..1e15).contains(&value);
            if sound { Ok(()) } else { Err(AbsurdConstant { name, value, wanted: "above zero" }) }
        };
        let duration = |name, value: f64| {
            let sound = (0.0..=60_000.0).contains(&value);
            if sound { Ok(()) } else { Err(AbsurdConstant { name, value, wanted: "between 0 and 60000 ms" }) }
        };
        if !(SLOWEST..=FASTEST).contains(&self.line_rate) {
            let value = self.line_rate.0 as f64;
            return Err(AbsurdConstant { name: "lineRate", value, wanted: "above zero, in bytes per second: 65536 to 2^40" });
        }
        positive("zeroPagesPerMs", self.zero_pages_per_ms)?;
        duration("setupMs", self.setup_ms)?;
        duration("syncMs", self.sync_ms)?;
        duration("completionMs", self.completion_ms)
    }
}

/// What a migration may cost the guest, beyond converging at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sla {
    /// The longest downtime tolerated.
    pub downtime: Option<Duration>,
    /// The longest migration tolerated.
    pub total_time: Option<Duration>,
}

/// `C = a·T_sum + b·T_downtime + c·P`, each term normalised: by the SLA's (else the budget's) total time, by the SLA's
/// downtime (else the downtime limit), by the guest's pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostWeights {
    /// a: weight of the total time.
    pub total_time: f64,
    /// b: weight of the downtime.
    pub downtime: f64,
    /// c: weight of the pages moved.
    pub pages: f64,
}

impl Default for CostWeights {
    fn default() -> Self {
        Self { total_time: 1.0 / 3.0, downtime: 1.0 / 3.0, pages: 1.0 / 3.0 }
    }
}

/// Will it converge?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// With a probability of at least 0.9, and within the SLA.
    Converges,
    /// In between, or it converges but breaks the SLA.
    Borderline,
    /// With a probability of at most 0.1.
    Fails,
    /// No agent, no data, stale data, or outside the model.
    Unknown,
}

/// How a forecast was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Method {
    /// Pattern collector: a replay over the observed working-set pattern.
    #[serde(rename = "PC")]
    PatternCollector,
    /// Dry run: an emulated migration.
    #[serde(rename = "DR")]
    DryRun,
}

/// The information set (MigVisor, VEE 2017, §3). Its JSON is a contract: plain numbers, the unit in the key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forecast {
    /// Will it converge?
    pub verdict: Verdict,
    /// It converges, but not within the SLA: the verdict is then `Borderline`.
    #[serde(default)]
    pub sla_exceeded: bool,
    /// It converges, and the pattern was observed for less time than that would take.
    #[serde(default)]
    pub low_confidence: bool,
    /// The share of replays that converged within the budget, 0..=1.
    pub probability: f64,
    /// How the forecast was made.
    pub method: Method,
    /// QEMU's `dirty-sync-count`.
    pub iterations: u64,
    /// Total time less downtime, ms.
    pub convergence_ms: f64,
    /// QEMU's downtime, ms; `None` where the budget ends first.
    pub downtime_ms: Option<f64>,
    /// Total time, ms; the budget where that ends first.
    pub total_ms: f64,
    /// QEMU's `normal` pages sent.
    pub dirtied_pages: u64,
    /// Bytes on the wire.
    pub transferred_bytes: u64,
    /// Least convergent bandwidth, bytes per second; `None` where no bandwidth that the line carries suffices.
    pub least_convergent_bandwidth: Option<u64>,
    /// `C = a·T_sum + b·T_downtime + c·P`; `None` where it fails.
    pub cost: Option<f64>,
    /// Low and high ends between which the real value is expected.
    pub bounds: Bounds,
    /// The paper's working-set pattern: distinct pages written within so many ms; `None` after a dry run.
    pub pattern: Option<Vec<PatternPoint>>,
    /// What other bandwidths would give.
    #[serde(default)]
    pub profile: Vec<ProfilePoint>,
    /// What simpler models say of the same pattern.
    #[serde(default)]
    pub baselines: Vec<Baseline>,
}

impl Forecast {
    /// The keys of its JSON. Where there is no forecast they are all there as well, and null but for the verdict.
    pub const KEYS: [&'static str; 17] = [
        "verdict",
        "slaExceeded",
        "lowConfidence",
        "probability",
        "method",
        "iterations",
        "convergenceMs",
        "downtimeMs",
        "totalMs",
        "dirtiedPages",
        "transferredBytes",
        "leastConvergentBandwidth",
        "cost",
        "bounds",
        "pattern",
        "profile",
        "baselines",
    ];
}

/// Low and high ends of each figure over the replays of the more likely kind: 5 % to 95 %, all of them where an unknown phase decides.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bounds {
    /// Total time, ms.
    pub total_ms: (f64, f64),
    /// Downtime, ms.
    pub downtime_ms: Option<(f64, f64)>,
    /// Pages sent.
    pub dirtied_pages: (u64, u64),
    /// Dirty-sync count.
    pub iterations: (u64, u64),
}

/// One point of the working-set pattern f(t).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PatternPoint {
    /// Length of the window, ms.
    pub ms: f64,
    /// Distinct pages written within a window of that length.
    pub pages: u64,
}

/// The forecast at another bandwidth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProfilePoint {
    /// The cap, bytes per second.
    pub bandwidth: u64,
    /// The share of replays that converged within the budget.
    pub probability: f64,
    /// Total time, ms; the budget where that ends first.
    pub total_ms: f64,
    /// QEMU's downtime, ms.
    pub downtime_ms: Option<f64>,
    /// Dirty-sync count.
    pub iterations: u64,
    /// Pages sent.
    pub dirtied_pages: u64,
}

/// What a simpler model says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Baseline {
    /// `base` or `classic`.
    pub name: String,
    /// Does it converge within the budget?
    pub converges: bool,
    /// Iterations.
    pub iterations: u64,
    /// Total time, ms; the budget where that ends first.
    pub total_ms: f64,
    /// Downtime, ms.
    pub downtime_ms: Option<f64>,
    /// Pages sent.
    pub dirtied_pages: u64,
}
