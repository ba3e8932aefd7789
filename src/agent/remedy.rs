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
