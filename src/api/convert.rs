//! Between our objects, the model and the annotations.
//!
//! In: a forecast's spec → the model's question, read leniently, refused with the field's name where it makes no sense.
//! The model's forecast → a status; a status → the model's forecast again → annotations with plain numbers.

use std::collections::BTreeMap;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use super::{
    fingerprint::QuestionRef,
    forecast::{
        Bounds, CostWeights, CountRange, CurvePoint, DurationRange, HostConstants, MigrationForecastSpec,
        MigrationForecastStatus, ProfilePoint, Sla,
    },
    names::{annotation, reason},
    scalar::{Duration, Quantity},
};
use crate::model::{
    forecast::{self as model, Forecast, Method, PatternPoint, Question, Verdict},
    units::{Bandwidth, Bytes, BytesPerSecond, FASTEST, SLOWEST},
};

/// The most points of a curve that an object carries.
pub const CURVE_POINTS: usize = 32;
/// The most points of a profile that an object carries.
pub const PROFILE_POINTS: usize = 16;

/// QEMU's `MAX_MIGRATE_DOWNTIME_SECONDS`.
const LONGEST_DOWNTIME: std::time::Duration = std::time::Duration::from_secs(2000);
/// No migration runs for longer than this.
const LONGEST_TIME: std::time::Duration = std::time::Duration::from_secs(365 * 24 * 3600);

/// Why a spec is no question that can be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("spec.{field}: {problem}")]
pub struct QuestionError {
    field: &'static str,
    problem: String,
}

pub(super) fn refuse<T>(field: &'static str, problem: impl Into<String>) -> Result<T, QuestionError> {
    Err(QuestionError { field, problem: problem.into() })
}

impl MigrationForecastSpec {
    /// The guest's memory.
    ///
    /// # Errors
    /// It is no quantity, zero, or more than any machine has.
    pub fn guest_memory(&self) -> Result<Bytes, QuestionError> {
        match self.guest_memory.bytes() {
            Err(error) => refuse("guestMemory", error.to_string()),
            Ok(Bytes(0)) => refuse("guestMemory", "it is 0; write the memory of the guest, such as 4Gi"),
            Ok(Bytes(bytes)) if bytes > 1 << 47 => refuse("guestMemory", format!("`{}` is more than 128Ti", self.guest_memory)),
            Ok(bytes) => Ok(bytes),
        }
    }

    /// The question for the model.
    ///
    /// # Errors
    /// A field cannot be read, or says something absurd; the error names it and says what would do.
    pub fn question(&self) -> Result<Question, QuestionError> {
        let bandwidth = bandwidth("bandwidth", &self.bandwidth)?;
        let downtime_limit = self.downtime_limit.0;
        if downtime_limit.is_zero() || downtime_limit > LONGEST_DOWNTIME {
            return refuse(
                "downtimeLimit",
                format!("`{}` is not between 1ms and 2000s; QEMU's default is 300ms", self.downtime_limit),
            );
        }
        let time_budget = self.time_budget.map(|budget| time("timeBudget", budget)).transpose()?;
        let sla = self.sla.unwrap_or_default();
        let sla = model::Sla {
            downtime: sla.downtime.map(|limit| time("sla.downtime", limit)).transpose()?,
            total_time: sla.total_time.map(|limit| time("sla.totalTime", limit)).transpose()?,
        };
        let weights = self.cost_weights.map_or_else(|| Ok(model::CostWeights::default()), weights)?;
        let host = self.host.as_ref().map_or_else(|| Ok(model::HostConstants::default()), host)?;
        Ok(Question { bandwidth, downtime_limit, time_budget, host, sla, weights })
    }
}

/// Reads a bandwidth; 0 is no cap.
fn bandwidth(field: &'static str, quantity: &Quantity) -> Result<Bandwidth, QuestionError> {
    match quantity.bandwidth() {
        Err(error) => refuse(field, error.to_string()),
        Ok(Bandwidth::Capped(rate)) if !(SLOWEST..=FASTEST).contains(&rate) => refuse(
            field,
            format!("`{quantity}` bytes per second is not between 64Ki and 1Ti; write 0 for no cap, or a rate such as 100Mi"),
        ),
        Ok(bandwidth) => Ok(bandwidth),
    }
}

fn time(field: &'static str, duration: Duration) -> Result<std::time::Duration, QuestionError> {
    if duration.0.is_zero() || duration.0 > LONGEST_TIME {
        return refuse(field, format!("`{duration}` is not between 1ms and a year; leave it out for no limit"));
    }
    Ok(duration.0)
}

fn weight(field: &'static str, value: Option<f64>) -> Result<f64, QuestionError> {
    match value {
        None => Ok(0.0),
        Some(value) if (0.0..=1e9).contains(&value) => Ok(value),
        Some(value) => refuse(field, format!("`{value}` is not between 0 and 1e9")),
    }
}

fn weights(weights: CostWeights) -> Result<model::CostWeights, QuestionError> {
    let read = model::CostWeights {
        total_time: weight("costWeights.totalTime", weights.total_time)?,
        downtime: weight("costWeights.downtime", weights.downtime)?,
        pages: weight("costWeights.pages", weights.pages)?,
    };
    if read.total_time + read.downtime + read.pages <= 0.0 {
        return refuse("costWeights", "all weights are 0; leave them out for equal weights");
    }
    Ok(read)
}

fn host(host: &HostConstants) -> Result<model::HostConstants, QuestionError> {
    let assumed = model::HostConstants::default();
    let line_rate = match &host.line_rate {
        None => assumed.line_rate,
        Some(quantity) => match bandwidth("host.lineRate", quantity)? {
            Bandwidth::Capped(rate) => rate,
            Bandwidth::Unlimited => return refuse("host.lineRate", "it is 0; leave it out where it is not known"),
        },
    };
    let read = model::HostConstants {
        line_rate,
        zero_pages_per_ms: host.zero_pages_per_ms.unwrap_or(assumed.zero_pages_per_ms),
        setup_ms: host.setup_ms.unwrap_or(assumed.setup_ms),
        sync_ms: host.sync_ms.unwrap_or(assumed.sync_ms),
        completion_ms: host.completion_ms.unwrap_or(assumed.completion_ms),
    };
    let field = |name| match name {
        "zeroPagesPerMs" => "host.zeroPagesPerMs",
        "setupMs" => "host.setupMs",
        "syncMs" => "host.syncMs",
        "completionMs" => "host.completionMs",
        _ => "host.lineRate",
    };
    match read.check() {
        Ok(()) => Ok(read),
        Err(absurd) => refuse(field(absurd.name), format!("`{}` is not {}", absurd.value, absurd.wanted)),
    }
}

/// What others said may be in a message, and they may say a lot: no more than this goes into an object.
pub(crate) fn shortened(message: String) -> String {
    const MOST: usize = 1000;
    match message.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", message.get(..end).unwrap_or_default()),
        None => message,
    }
}

impl MigrationForecastStatus {
    /// The answer to a question. `asked` names it; `measured_at` is when the VM was last looked at, or its dry run ended.
    pub fn from_forecast(forecast: &Forecast, question: &Question, asked: &QuestionRef, measured_at: Timestamp) -> Self {
        Self {
            question: Some(asked.fingerprint.clone()),
            observed_generation: Some(asked.generation),
            measured_at: Some(Time(measured_at)),
            verdict: Some(forecast.verdict),
            reason: Some(reason_of(forecast, question.time_budget.is_none()).to_owned()),
            message: Some(describe(forecast, question)),
            probability: Some(round(forecast.probability.clamp(0.0, 1.0), 4)),
            method: Some(forecast.method),
            bandwidth: Some(question.bandwidth.into()),
            iterations: Some(forecast.iterations),
            convergence_time: Some(Duration::from_ms(forecast.convergence_ms)),
            downtime: forecast.downtime_ms.map(Duration::from_ms),
            total_time: Some(Duration::from_ms(forecast.total_ms)),
            dirtied_pages: Some(forecast.dirtied_pages),
            transferred_bytes: Some(forecast.transferred_bytes),
            least_convergent_bandwidth: forecast.least_convergent_bandwidth.map(|rate| BytesPerSecond(rate).into()),
            cost: forecast.cost.filter(|cost| cost.is_finite()).map(|cost| round(cost.max(0.0), 4)),
            low_confidence: forecast.low_confidence,
            bounds: Some(Bounds {
                total_time: range(forecast.bounds.total_ms),
                downtime: forecast.bounds.downtime_ms.map(range),
                dirtied_pages: CountRange { low: forecast.bounds.dirtied_pages.0, high: forecast.bounds.dirtied_pages.1 },
                iterations: CountRange { low: forecast.bounds.iterations.0, high: forecast.bounds.iterations.1 },
            }),
            profile: thin(&forecast.profile, PROFILE_POINTS)
                .map(|point| ProfilePoint {
                    bandwidth: BytesPerSecond(point.bandwidth).into(),
                    probability: round(point.probability.clamp(0.0, 1.0), 4),
                    total_time: Duration::from_ms(point.total_ms),
                    downtime: point.downtime_ms.map(Duration::from_ms),
                    iterations: point.iterations,
                    dirtied_pages: point.dirtied_pages,
                })
                .collect(),
            curve: thin(forecast.pattern.as_deref().unwrap_or_default(), CURVE_POINTS)
                .map(|point| CurvePoint { window: Duration::from_ms(point.ms), pages: point.pages })
                .collect(),
            ..Self::default()
        }
    }

    /// The answer where there is none: `why` is one of [`reason`], `message` what to do about it.
    pub fn unknown(why: &str, message: impl Into<String>, asked: &QuestionRef, measured_at: Option<Timestamp>) -> Self {
        Self {
            question: Some(asked.fingerprint.clone()),
            observed_generation: Some(asked.generation),
            measured_at: measured_at.map(Time),
            verdict: Some(Verdict::Unknown),
            reason: Some(why.to_owned()),
            message: Some(shortened(message.into())),
            ..Self::default()
        }
    }

    /// The information set as plain numbers; `None` where nothing is known. Baselines are not kept in objects.
    pub fn forecast(&self) -> Option<Forecast> {
        let verdict = self.verdict.filter(|verdict| *verdict != Verdict::Unknown)?;
        let bounds = self.bounds.clone().unwrap_or_default();
        let pair = |range: DurationRange| (range.low.as_ms(), range.high.as_ms());
        Some(Forecast {
            verdict,
            sla_exceeded: self.reason.as_deref() == Some(reason::SLA_EXCEEDED),
            low_confidence: self.low_confidence,
            probability: self.probability?,
            method: self.method?,
            iterations: self.iterations?,
            convergence_ms: self.convergence_time?.as_ms(),
            downtime_ms: self.downtime.map(Duration::as_ms),
            total_ms: self.total_time?.as_ms(),
            dirtied_pages: self.dirtied_pages?,
            transferred_bytes: self.transferred_bytes?,
            least_convergent_bandwidth: self.lcb().map(|rate| rate.0),
            cost: self.cost,
            bounds: model::Bounds {
                total_ms: pair(bounds.total_time),
                downtime_ms: bounds.downtime.map(pair),
                dirtied_pages: (bounds.dirtied_pages.low, bounds.dirtied_pages.high),
                iterations: (bounds.iterations.low, bounds.iterations.high),
            },
            pattern: (!self.curve.is_empty())
                .then(|| self.curve.iter().map(|point| PatternPoint { ms: point.window.as_ms(), pages: point.pages }).collect()),
            profile: self
                .profile
                .iter()
                .filter_map(|point| {
                    Some(model::ProfilePoint {
                        bandwidth: point.bandwidth.rate().ok()?.0,
                        probability: point.probability,
                        total_ms: point.total_time.as_ms(),
                        downtime_ms: point.downtime.map(Duration::as_ms),
                        iterations: point.iterations,
                        dirtied_pages: point.dirtied_pages,
                    })
                })
                .collect(),
            baselines: Vec::new(),
        })
    }

    /// The least convergent bandwidth, where there is one.
    pub fn lcb(&self) -> Option<BytesPerSecond> {
        self.least_convergent_bandwidth.as_ref().and_then(|quantity| quantity.rate().ok())
    }
}

/// The annotations of a VirtualMachineInstanceMigration that starts with this answer. `Unknown` has a verdict and a reason, no numbers.
pub fn annotations(status: &MigrationForecastStatus) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    let mut put = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            annotations.insert(key.to_owned(), value);
        }
    };
    let forecast = status.forecast();
    put(annotation::VERDICT, Some(name(&forecast.as_ref().map_or(Verdict::Unknown, |forecast| forecast.verdict))));
    put(annotation::REASON, status.reason.clone());
    if let Some(forecast) = forecast {
        put(annotation::PROBABILITY, Some(forecast.probability.to_string()));
        put(annotation::METHOD, Some(name(&forecast.method)));
        put(annotation::DOWNTIME, forecast.downtime_ms.map(plain));
        put(annotation::TOTAL_TIME, Some(plain(forecast.total_ms)));
        put(annotation::ITERATIONS, Some(forecast.iterations.to_string()));
        put(annotation::DIRTIED_PAGES, Some(forecast.dirtied_pages.to_string()));
        put(annotation::COST, forecast.cost.map(|cost| cost.to_string()));
        put(annotation::LCB, forecast.least_convergent_bandwidth.map(|rate| rate.to_string()));
        put(annotation::FORECAST, serde_json::to_string(&forecast).ok());
    }
    annotations
}

/// The annotations where nothing is known: a verdict and a reason, one of [`reason`].
pub fn unknown_annotations(why: &str) -> BTreeMap<String, String> {
    [(annotation::VERDICT.to_owned(), name(&Verdict::Unknown)), (annotation::REASON.to_owned(), why.to_owned())].into()
}

/// The name that serde gives a unit variant.
fn name(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn plain(ms: f64) -> String {
    round(ms, 1).to_string()
}

pub(super) fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

fn range((low, high): (f64, f64)) -> DurationRange {
    DurationRange { low: Duration::from_ms(low), high: Duration::from_ms(high) }
}

/// At most so many of the points, evenly by index, the first and the last among them.
fn thin<T>(points: &[T], most: usize) -> impl Iterator<Item = &T> {
    let last = points.len().saturating_sub(1);
    let take = most.min(points.len());
    (0..take).filter_map(move |i| points.get(if take > 1 { i * last / (take - 1) } else { 0 }))
}

/// Why the verdict is what it is: one of [`reason`]. `endless`: there is no time budget.
pub(crate) fn reason_of(forecast: &Forecast, endless: bool) -> &'static str {
    match forecast.verdict {
        Verdict::Converges => reason::WITHIN_BUDGET,
        Verdict::Borderline if forecast.sla_exceeded => reason::SLA_EXCEEDED,
        Verdict::Borderline => reason::NEAR_THE_LIMIT,
        Verdict::Fails if endless => reason::NEVER_CONVERGES,
        Verdict::Fails => reason::BUDGET_EXCEEDED,
        Verdict::Unknown => reason::NOT_MEASURED,
    }
}

/// One sentence for `kubectl describe`.
fn describe(forecast: &Forecast, question: &Question) -> String {
    let bandwidth = match question.bandwidth {
        Bandwidth::Unlimited => "without a cap".to_owned(),
        Bandwidth::Capped(rate) => format!("at {}", rate.human()),
    };
    let total = Duration::from_ms(forecast.total_ms).human();
    let took = match forecast.downtime_ms {
        Some(ms) => format!("take {total} {bandwidth}, the guest stopped for {}", Duration::from_ms(ms).human()),
        None => format!("take {total} {bandwidth}"),
    };
    match forecast.verdict {
        Verdict::Converges => format!("It would {took}."),
        Verdict::Borderline if forecast.sla_exceeded => {
            let limit = |what: &str, limit: Option<std::time::Duration>| {
                limit.map(|limit| format!("{what} of at most {}", Duration(limit).human()))
            };
            let wanted: Vec<_> = [limit("a total time", question.sla.total_time), limit("a downtime", question.sla.downtime)]
                .into_iter()
                .flatten()
                .collect();
            format!("It would {took}; the SLA wants {}.", wanted.join(" and "))
        }
        Verdict::Borderline if forecast.method == Method::DryRun => format!("Near the limit in a dry run; it would {took}."),
        Verdict::Borderline => {
            format!("Near the limit: {:.0} % of the replays converge; it would {took}.", forecast.probability * 100.0)
        }
        Verdict::Fails => {
            let sent = Bytes(forecast.transferred_bytes).human();
            let needs = match forecast.least_convergent_bandwidth {
                Some(rate) => format!("it needs at least {}", BytesPerSecond(rate).human()),
                None => "no bandwidth that the line carries suffices".to_owned(),
            };
            format!("{} it would still be copying after {total} and {sent}; {needs}.", capitalised(&bandwidth))
        }
        Verdict::Unknown => "No forecast could be made.".to_owned(),
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

impl From<model::Sla> for Sla {
    fn from(sla: model::Sla) -> Self {
        Self { downtime: sla.downtime.map(Duration), total_time: sla.total_time.map(Duration) }
    }
}
