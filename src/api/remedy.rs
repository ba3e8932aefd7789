//! Remedies: what may be done about a migration that would not converge, what is asked about it, and the answers.
//!
//! In: what an API server stores: a policy's list of what is allowed, a forecast's list of what is asked (`spec.remedies`), the agent's
//! answers (`status.remedies`). Out: the same, typed; and their way to and from the model.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    convert::{QuestionError, refuse, round, shortened},
    fingerprint,
    forecast::{MigrationForecastSpec, MigrationForecastStatus, is_fresh},
    scalar::{Duration, Quantity},
    schema,
};
use crate::model::{forecast::Verdict, remedy as model, units::FASTEST};

/// There are so many kinds; each is asked about once at most.
pub const MOST: usize = 5;

/// A remedy, and how far it may go. Each type has its own fields, and no others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = own_fields)]
pub struct Remedy {
    /// `TimeBudget`: KubeVirt waits for longer. `AutoConverge`: QEMU throttles the guest, by its own fixed ramp, 20 % to 99 %. `Bandwidth`: the
    /// migration may use more of the line. `Downtime`: the guest may stand still for longer (needs KubeVirt's gate
    /// `MigrationStallDetection`). `PostCopy`: the guest goes on at the target before all of its memory is there; if either side or the line fails
    /// then, the guest is lost.
    #[serde(rename = "type")]
    pub kind: RemedyType,
    /// `TimeBudget`: the most that `completionTimeoutPerGiB` may be, in seconds for each gigabyte.
    #[serde(rename = "maxCompletionTimeoutPerGiB", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_per_gigabyte")]
    pub max_completion_timeout_per_gib: Option<u64>,
    /// `Bandwidth`: the most that `bandwidthPerMigration` may be, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<Quantity>,
    /// `Bandwidth`: a cap that somebody has set in KubeVirt's configuration or in a MigrationPolicy may be raised. Absent: it may not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub above_cap: bool,
    /// `Downtime`: the most that `maxDowntimeMs` may be. Never more than the SLA's downtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime: Option<Duration>,
}

/// What may be done: `TimeBudget`, `AutoConverge`, `Bandwidth`, `Downtime`, `PostCopy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum RemedyType {
    /// A longer budget of time.
    TimeBudget,
    /// QEMU throttles the guest.
    AutoConverge,
    /// More of the line.
    Bandwidth,
    /// A longer downtime.
    Downtime,
    /// Post-copy when the budget, lowered, has ended.
    PostCopy,
}

/// What the API server checks of each remedy.
fn own_fields(schema: &mut Schema) {
    let rules = json!([
        {
            "rule": "has(self.maxCompletionTimeoutPerGiB) == (self.type == 'TimeBudget')",
            "message": "TimeBudget needs maxCompletionTimeoutPerGiB, such as 300; no other type has it"
        },
        {
            "rule": "has(self.maxBandwidth) == (self.type == 'Bandwidth')",
            "message": "Bandwidth needs maxBandwidth, such as 1Gi; no other type has it"
        },
        { "rule": "!has(self.aboveCap) || self.type == 'Bandwidth'", "message": "aboveCap is Bandwidth's alone" },
        {
            "rule": "has(self.maxDowntime) == (self.type == 'Downtime')",
            "message": "Downtime needs maxDowntime, such as 500ms; no other type has it"
        }
    ]);
    schema.insert("x-kubernetes-validations".to_owned(), rules);
}

/// The schema of a list of remedies: at most one of each type.
pub fn list(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = Vec::<Remedy>::json_schema(generator);
    schema.insert("maxItems".to_owned(), MOST.into());
    let rule = json!([{
        "rule": "self.all(one, self.exists_one(other, other.type == one.type))",
        "message": "each type at most once"
    }]);
    schema.insert("x-kubernetes-validations".to_owned(), rule);
    schema
}

impl Remedy {
    /// For the model.
    ///
    /// # Errors
    /// A limit is missing, or absurd; the error names the field and says what would do.
    pub fn ask(&self) -> Result<model::Remedy, QuestionError> {
        Ok(match self.kind {
            RemedyType::TimeBudget => match self.max_completion_timeout_per_gib {
                Some(most_per_gigabyte) if most_per_gigabyte > 0 => model::Remedy::TimeBudget { most_per_gigabyte },
                _ => return refuse("remedies.maxCompletionTimeoutPerGiB", "TimeBudget needs a number of seconds, such as 300"),
            },
            RemedyType::AutoConverge => model::Remedy::AutoConverge,
            RemedyType::Bandwidth => match self.max_bandwidth.as_ref().map(Quantity::rate) {
                Some(Ok(most)) if most.0 > 0 => model::Remedy::Bandwidth { most: most.min(FASTEST) },
                Some(Err(error)) => return refuse("remedies.maxBandwidth", error.to_string()),
                _ => return refuse("remedies.maxBandwidth", "Bandwidth needs a rate, such as 1Gi"),
            },
            RemedyType::Downtime => match self.max_downtime {
                Some(most) if !most.0.is_zero() => model::Remedy::Downtime { most: most.0 },
                _ => return refuse("remedies.maxDowntime", "Downtime needs a length of time, such as 500ms"),
            },
            RemedyType::PostCopy => model::Remedy::PostCopy,
        })
    }
}

/// The answers to what was asked in `spec.remedies`. The agent's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RemedyAnswers {
    /// Fingerprint of what was asked: of the question, and of `spec.remedies`. The answers count while both are the same.
    #[schemars(length(max = 64))]
    pub asked: String,
    /// When the VM was looked at that these were made from; absent where nothing is known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_time")]
    pub measured_at: Option<Time>,
    /// One for each remedy asked about, in that order.
    #[serde(default)]
    #[schemars(length(max = 5))]
    pub answers: Vec<RemedyAnswer>,
}

/// What a remedy would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RemedyAnswer {
    /// The remedy.
    #[serde(rename = "type")]
    pub kind: RemedyType,
    /// With it, would the migration converge, within the SLA? `Converges`: with the value below, or, where there is none, as it is asked.
    #[schemars(schema_with = "schema::verdict")]
    pub verdict: Verdict,
    /// Why, where there is no answer.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
    /// `TimeBudget`: the least `completionTimeoutPerGiB` that does. `PostCopy`: what it is to be lowered to.
    #[serde(rename = "completionTimeoutPerGiB", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_per_gigabyte")]
    pub completion_timeout_per_gib: Option<u64>,
    /// `Bandwidth`: the least `bandwidthPerMigration` that does, whole MiB per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Quantity>,
    /// `Downtime`: the least `maxDowntimeMs` that does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime: Option<Duration>,
    /// The share of replays that converge within the budget; 1 for post-copy, which ends every migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_probability")]
    pub probability: Option<f64>,
    /// How long the migration would take; the budget where that ends first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<Duration>,
    /// How long the guest would stand; absent where the budget ends first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Duration>,
    /// `AutoConverge`: how much of its time the guest would be put to sleep at the end, percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::optional_percentage")]
    pub throttle_percent: Option<u64>,
    /// `PostCopy`: how long the guest would run while memory is missing, and wait for each page that it touches first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded_time: Option<Duration>,
}

impl RemedyAnswer {
    /// No answer is possible.
    pub fn unknown(kind: RemedyType, message: impl Into<String>) -> Self {
        Self {
            kind,
            verdict: Verdict::Unknown,
            message: shortened(message.into()),
            completion_timeout_per_gib: None,
            bandwidth: None,
            max_downtime: None,
            probability: None,
            total_time: None,
            downtime: None,
            throttle_percent: None,
            degraded_time: None,
        }
    }

    /// The model's answer.
    pub fn of(kind: RemedyType, answer: &model::Answer) -> Self {
        let finite = |ms: f64| Some(ms).filter(|ms| ms.is_finite()).map(Duration::from_ms);
        let mut said = Self {
            verdict: answer.verdict,
            probability: Some(round(answer.probability.clamp(0.0, 1.0), 4)),
            total_time: finite(answer.total_ms),
            downtime: answer.downtime_ms.and_then(finite),
            throttle_percent: answer.throttle_percent,
            degraded_time: answer.degraded_ms.and_then(finite),
            ..Self::unknown(kind, "")
        };
        match answer.value {
            None => {}
            Some(model::Value::PerGigabyte(seconds)) => said.completion_timeout_per_gib = Some(seconds),
            Some(model::Value::Bandwidth(rate)) => said.bandwidth = Some(rate.into()),
            Some(model::Value::Downtime(limit)) => said.max_downtime = Some(limit.into()),
        }
        said
    }
}

impl MigrationForecastSpec {
    /// Names what is asked about remedies: the question, and what is asked. Another one than [`Self::fingerprint`] as soon as anything is.
    pub fn remedies_fingerprint(&self) -> String {
        let mut asked =
            serde_json::to_value(Self { remedies: self.remedies.clone(), ..self.question_only() }).unwrap_or_default();
        asked.sort_all_objects();
        fingerprint::of(&asked.to_string())
    }
}

impl MigrationForecastStatus {
    /// The answers about remedies, if they are to what this spec asks. An answer that is not fresh any more counts as none; one that is
    /// `Unknown` does not age.
    pub fn remedies_for(&self, spec: &MigrationForecastSpec, now: Timestamp) -> Option<&[RemedyAnswer]> {
        let given = self.remedies.as_ref().filter(|given| given.asked == spec.remedies_fingerprint())?;
        let stands = is_fresh(given.measured_at.as_ref(), now) || given.answers.iter().all(|one| one.verdict == Verdict::Unknown);
        stands.then_some(given.answers.as_slice())
    }
}

#[cfg(test)]
#[path = "remedy_tests.rs"]
mod tests;
