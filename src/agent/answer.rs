//! From what is known of a VM to the status that answers its question: pure.
//!
//! In: the question, a pattern or a failure, what was published before. Out: a status with this agent's fields only.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use super::remedy;
use crate::{
    api::{MigrationForecastSpec, MigrationForecastStatus, names::reason, scalar},
    model::{
        forecast::{HostConstants, Question, Verdict},
        units::BytesPerSecond,
    },
};

/// The agent's condition.
pub const LOW_CONFIDENCE: &str = "LowConfidence";

/// Figures that moved by less than this share are not worth a write of their own.
const WORTH: f64 = 0.1;
/// The same for probabilities, which are compared as they are.
const WORTH_PROBABILITY: f64 = 0.05;

/// What a spec asks.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    /// A question for the model.
    Model(Box<Question>),
    /// No measurement would help: the reason and the words of the answer.
    Words(&'static str, String),
}

/// Reads the question. What it leaves open about the host is taken from `host`, this node's own constants.
pub fn read(spec: &MigrationForecastSpec, host: &HostConstants) -> Asked {
    if let Some(why) = &spec.outside_model {
        return Asked::Words(reason::OUTSIDE_MODEL, why.clone());
    }
    match spec.question() {
        Err(error) => Asked::Words(reason::BAD_QUESTION, format!("{error}; correct the object or what it was made from")),
        Ok(mut question) => {
            let given = spec.host.clone().unwrap_or_default();
            let constants = &mut question.host;
            keep(&mut constants.line_rate, given.line_rate.is_some(), host.line_rate);
            keep(&mut constants.zero_pages_per_ms, given.zero_pages_per_ms.is_some(), host.zero_pages_per_ms);
            keep(&mut constants.setup_ms, given.setup_ms.is_some(), host.setup_ms);
            keep(&mut constants.sync_ms, given.sync_ms.is_some(), host.sync_ms);
            keep(&mut constants.completion_ms, given.completion_ms.is_some(), host.completion_ms);
            Asked::Model(Box::new(question))
        }
    }
}

fn keep<T>(value: &mut T, given: bool, otherwise: T) {
    if !given {
        *value = otherwise;
    }
}

/// Adds the condition `LowConfidence`, with the time of its last turn carried on from what was published before.
pub fn with_condition(
    mut status: MigrationForecastStatus,
    before: Option<&MigrationForecastStatus>,
    now: Timestamp,
) -> MigrationForecastStatus {
    let unknown = status.verdict.is_none_or(|verdict| verdict == Verdict::Unknown);
    let (value, why, message) = match (unknown, status.low_confidence) {
        (true, _) => ("Unknown", "NoForecast", "There is no forecast to be confident of."),
        (false, true) => ("True", "ShortLook", "The look was shorter than the migration would be."),
        (false, false) => ("False", "LongLook", "The look was as long as the migration would be."),
    };
    let turned = before
        .and_then(|before| before.conditions.iter().find(|condition| condition.type_ == LOW_CONFIDENCE))
        .filter(|condition| condition.status == value)
        .map_or(Time(now), |condition| condition.last_transition_time.clone());
    status.conditions = vec![Condition {
        type_: LOW_CONFIDENCE.to_owned(),
        status: value.to_owned(),
        reason: why.to_owned(),
        message: message.to_owned(),
        last_transition_time: turned,
        observed_generation: status.observed_generation,
    }];
    status
}

/// Whether `new` differs from `old` by more than the noise of two looks at the same VM.
pub fn worth_writing(old: &MigrationForecastStatus, new: &MigrationForecastStatus) -> bool {
    let unknown = new.verdict.is_none_or(|verdict| verdict == Verdict::Unknown);
    old.question != new.question
        || old.verdict != new.verdict
        || old.reason != new.reason
        || old.method != new.method
        || old.bandwidth != new.bandwidth
        || old.low_confidence != new.low_confidence
        || unknown && old.message != new.message
        || (old.probability.unwrap_or(0.0) - new.probability.unwrap_or(0.0)).abs() > WORTH_PROBABILITY
        || moved(ms(old.total_time), ms(new.total_time))
        || moved(ms(old.downtime), ms(new.downtime))
        || moved(count(old.dirtied_pages), count(new.dirtied_pages))
        || moved(old.lcb().map(rate), new.lcb().map(rate))
        || moved(old.cost, new.cost)
        || remedy::worth_writing(old.remedies.as_ref(), new.remedies.as_ref())
}

pub(super) fn ms(duration: Option<scalar::Duration>) -> Option<f64> {
    duration.map(scalar::Duration::as_ms)
}

fn count(count: Option<u64>) -> Option<f64> {
    count.map(|count| count as f64)
}

fn rate(rate: BytesPerSecond) -> f64 {
    rate.0 as f64
}

/// By more than noise, or one of them is not there.
pub(super) fn moved(old: Option<f64>, new: Option<f64>) -> bool {
    match (old, new) {
        (None, None) => false,
        (Some(old), Some(new)) => (old - new).abs() > WORTH * old.abs().max(new.abs()),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::{api::QuestionRef, model::units::Bandwidth};

    fn spec(more: &serde_json::Value) -> MigrationForecastSpec {
        let mut spec = json!({
            "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "PredictionPolicy", "downtimeLimit": "300ms"
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_question_wins_over_the_nodes_constants() {
        let host = HostConstants { setup_ms: 77.0, sync_ms: 7.0, ..HostConstants::default() };
        let Asked::Model(question) = read(&spec(&json!({ "host": { "syncMs": 1.5 } })), &host) else { unreachable!() };
        assert_eq!((question.host.setup_ms, question.host.sync_ms), (77.0, 1.5));
        assert_eq!(question.bandwidth, Bandwidth::Capped(BytesPerSecond(100 << 20)));
    }

    #[test]
    fn what_no_measurement_helps_is_answered_in_words() {
        let host = HostConstants::default();
        let outside = read(&spec(&json!({ "outsideModel": "block migration" })), &host);
        assert_eq!(outside, Asked::Words(reason::OUTSIDE_MODEL, "block migration".to_owned()));
        let Asked::Words(why, message) = read(&spec(&json!({ "bandwidth": "7 parsecs" })), &host) else { unreachable!() };
        assert_eq!(why, reason::BAD_QUESTION);
        assert!(message.contains("spec.bandwidth"), "{message}");
    }

    #[test]
    fn noise_is_not_worth_a_write() {
        let status = |total: f64, probability: f64| MigrationForecastStatus {
            question: Some("a".to_owned()),
            verdict: Some(Verdict::Converges),
            message: Some(format!("It would take {total} ms.")),
            probability: Some(probability),
            total_time: Some(scalar::Duration::from_ms(total)),
            ..MigrationForecastStatus::default()
        };
        let old = status(1000.0, 0.98);
        assert!(!worth_writing(&old, &status(1050.0, 1.0)));
        assert!(worth_writing(&old, &status(1200.0, 0.98)));
        assert!(worth_writing(&old, &status(1000.0, 0.90)));
        assert!(worth_writing(&old, &MigrationForecastStatus { question: Some("b".to_owned()), ..old.clone() }));
        assert!(worth_writing(&old, &MigrationForecastStatus { downtime: Some(scalar::Duration::from_ms(5.0)), ..old.clone() }));
        let asked = QuestionRef { fingerprint: "a".to_owned(), generation: 1 };
        let unknown = |message| MigrationForecastStatus::unknown(reason::NOT_MEASURED, message, &asked, None);
        assert!(
            worth_writing(&old, &unknown("a"))
                && worth_writing(&unknown("a"), &unknown("b"))
                && !worth_writing(&unknown("a"), &unknown("a"))
        );
    }

    #[test]
    fn a_condition_keeps_the_time_of_its_last_turn() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let sure = MigrationForecastStatus { verdict: Some(Verdict::Fails), ..MigrationForecastStatus::default() };
        let first = with_condition(sure.clone(), None, at(100));
        let second = with_condition(sure.clone(), Some(&first), at(200));
        assert_eq!(second.conditions.first().unwrap().last_transition_time, Time(at(100)));
        let unsure = with_condition(MigrationForecastStatus { low_confidence: true, ..sure }, Some(&second), at(300));
        let condition = unsure.conditions.first().unwrap();
        assert_eq!((condition.status.as_str(), &condition.last_transition_time), ("True", &Time(at(300))));
    }
}
