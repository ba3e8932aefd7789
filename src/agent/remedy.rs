//! What is asked about remedies, and the answers: pure.
//!
//! In: a forecast's spec, a fresh pattern or why there is none. Out: the answers, each to one remedy that was asked about.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use super::answer::{moved, ms};
use crate::{
    api::{
        MigrationForecastSpec, MigrationForecastStatus,
        remedy::{MOST, Remedy, RemedyAnswer, RemedyAnswers},
        scalar::Quantity,
    },
    model::{
        forecast::Question,
        pattern::Pattern,
        remedy::Case,
        units::{Bytes, BytesPerSecond},
    },
};

/// What is asked about remedies.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Its fingerprint: of the question, and of what is asked about it.
    fingerprint: String,
    remedies: Vec<Remedy>,
    /// `None`: no quantity, and the question is refused as a whole.
    guest: Option<Bytes>,
}

impl Asked {
    /// `None`: nothing is asked.
    pub fn of(spec: &MigrationForecastSpec) -> Option<Self> {
        let remedies: Vec<Remedy> = spec.remedies.iter().take(MOST).cloned().collect();
        let guest = spec.guest_memory().ok();
        (!remedies.is_empty()).then(|| Self { fingerprint: spec.remedies_fingerprint(), remedies, guest })
    }

    /// Is this an answer to it?
    pub fn is_answered(&self, answers: Option<&RemedyAnswers>) -> bool {
        answers.is_some_and(|answers| answers.asked == self.fingerprint)
    }

    /// Tries each remedy on the pattern. Takes milliseconds, up to some hundred.
    pub fn answer(
        &self,
        pattern: &Pattern,
        question: &Question,
        lcb: Option<BytesPerSecond>,
        measured_at: Timestamp,
    ) -> RemedyAnswers {
        let one = |remedy: &Remedy| match (remedy.ask(), self.guest) {
            (Ok(ask), Some(guest)) => {
                let case = Case { pattern, question, guest, least_convergent_bandwidth: lcb };
                RemedyAnswer::of(remedy.kind, &case.answer(ask))
            }
            (Err(error), _) => RemedyAnswer::unknown(remedy.kind, format!("{error}; correct what was asked")),
            (_, None) => RemedyAnswer::unknown(remedy.kind, "the guest's memory is not known"),
        };
        let answers = self.remedies.iter().map(one).collect();
        RemedyAnswers { asked: self.fingerprint.clone(), measured_at: Some(Time(measured_at)), answers }
    }

    /// Nothing is known to answer from.
    pub fn unknown(&self, why: &str) -> RemedyAnswers {
        let answers = self.remedies.iter().map(|remedy| RemedyAnswer::unknown(remedy.kind, why)).collect();
        RemedyAnswers { asked: self.fingerprint.clone(), measured_at: None, answers }
    }
}

/// Does the new status answer something else about remedies than the old one?
pub fn asked_anew(old: &MigrationForecastStatus, new: &MigrationForecastStatus) -> bool {
    let asked = |status: &MigrationForecastStatus| status.remedies.as_ref().map(|answers| answers.asked.clone());
    asked(old) != asked(new)
}

/// Do they differ by more than the noise of two looks at the same VM?
pub fn worth_writing(old: Option<&RemedyAnswers>, new: Option<&RemedyAnswers>) -> bool {
    let (Some(old), Some(new)) = (old, new) else { return old.is_some() != new.is_some() };
    let figures = |answer: &RemedyAnswer| {
        [
            answer.completion_timeout_per_gib.map(|seconds| seconds as f64),
            answer.bandwidth.as_ref().map(Quantity::rate).and_then(Result::ok).map(|rate| rate.0 as f64),
            ms(answer.max_downtime),
            ms(answer.total_time),
        ]
    };
    let differ = |(old, new): (&RemedyAnswer, &RemedyAnswer)| {
        old.verdict != new.verdict || figures(old).into_iter().zip(figures(new)).any(|(old, new)| moved(old, new))
    };
    old.asked != new.asked || old.answers.len() != new.answers.len() || old.answers.iter().zip(&new.answers).any(differ)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::{
        api::remedy::RemedyType,
        model::{
            forecast::Verdict,
            pattern::{Sample, Traces, Writer},
        },
    };

    fn spec(remedies: serde_json::Value) -> MigrationForecastSpec {
        let mut spec = json!({
            "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "PredictionPolicy",
            "downtimeLimit": "300ms", "timeBudget": "40s"
        });
        spec["remedies"] = remedies;
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn nothing_but_what_is_asked_is_answered() {
        assert_eq!(Asked::of(&spec(json!([]))), None);
        let writer = Writer::Random { rate: 0.01 };
        let samples = (0..256).map(|i| Sample { page: i * 1024, weight: 1024.0, zero: false, writer }).collect();
        let pattern = Pattern::new(samples, Traces::default(), 12_000.0).unwrap();
        let spec = spec(json!([{ "type": "PostCopy" }, { "type": "Downtime" }]));
        let (asked, question) = (Asked::of(&spec).unwrap(), spec.question().unwrap());
        let given = asked.answer(&pattern, &question, None, Timestamp::now());
        assert!(asked.is_answered(Some(&given)) && !asked.is_answered(None));
        let [post_copy, downtime] = given.answers.as_slice() else { unreachable!("{given:?}") };
        assert_eq!((post_copy.kind, post_copy.verdict), (RemedyType::PostCopy, Verdict::Converges));
        assert_eq!((downtime.kind, downtime.verdict), (RemedyType::Downtime, Verdict::Unknown));
        assert!(downtime.message.contains("spec.remedies.maxDowntime"), "{downtime:?}");
    }

    #[test]
    fn noise_is_not_worth_a_write() {
        let asked = Asked::of(&spec(json!([{ "type": "AutoConverge" }]))).unwrap();
        let unknown = asked.unknown("not looked at yet");
        let with = |verdict, seconds| {
            let mut given = unknown.clone();
            given.answers[0].verdict = verdict;
            given.answers[0].total_time = Some(crate::api::scalar::Duration::from_ms(seconds * 1000.0));
            given
        };
        let worth = |old: &RemedyAnswers, new: &RemedyAnswers| worth_writing(Some(old), Some(new));
        assert!(!worth(&with(Verdict::Converges, 10.0), &with(Verdict::Converges, 10.5)));
        assert!(worth(&with(Verdict::Converges, 10.0), &with(Verdict::Converges, 20.0)));
        assert!(
            worth(&with(Verdict::Converges, 10.0), &with(Verdict::Fails, 10.0)) && worth(&unknown, &with(Verdict::Fails, 10.0))
        );
        assert!(worth_writing(None, Some(&unknown)) && worth_writing(Some(&unknown), None) && !worth_writing(None, None));
        let other = Asked::of(&spec(json!([{ "type": "PostCopy" }]))).unwrap().unknown("not looked at yet");
        assert!(worth(&unknown, &other));
    }
}
