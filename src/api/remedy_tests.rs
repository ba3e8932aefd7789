//! What is read, what is asked of the model, and which answers count.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    api::MigrationForecast,
    model::units::{Bandwidth, BytesPerSecond},
};

fn remedy(value: Value) -> Remedy {
    serde_json::from_value(value).unwrap()
}

fn spec(remedies: Value) -> MigrationForecastSpec {
    let mut spec = json!({
        "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "PredictionPolicy", "downtimeLimit": "300ms"
    });
    spec["remedies"] = remedies;
    serde_json::from_value(spec).unwrap()
}

#[test]
fn each_type_asks_with_its_limit() {
    let all = json!([
        { "type": "TimeBudget", "maxCompletionTimeoutPerGiB": 300 }, { "type": "AutoConverge" },
        { "type": "Bandwidth", "maxBandwidth": "1Gi", "aboveCap": true }, { "type": "Downtime", "maxDowntime": "500ms" }, { "type": "PostCopy" }
    ]);
    let asked: Vec<_> = spec(all).remedies.iter().map(|remedy| remedy.ask().unwrap()).collect();
    let wanted = [
        model::Remedy::TimeBudget { most_per_gigabyte: 300 },
        model::Remedy::AutoConverge,
        model::Remedy::Bandwidth { most: BytesPerSecond(1 << 30) },
        model::Remedy::Downtime { most: std::time::Duration::from_millis(500) },
        model::Remedy::PostCopy,
    ];
    assert_eq!(asked, wanted);
}

#[test]
fn a_limit_that_is_missing_or_absurd_is_refused_by_its_name() {
    for (value, field) in [
        (json!({ "type": "TimeBudget" }), "spec.remedies.maxCompletionTimeoutPerGiB"),
        (json!({ "type": "TimeBudget", "maxCompletionTimeoutPerGiB": 0 }), "spec.remedies.maxCompletionTimeoutPerGiB"),
        (json!({ "type": "Bandwidth" }), "spec.remedies.maxBandwidth"),
        (json!({ "type": "Bandwidth", "maxBandwidth": "much" }), "spec.remedies.maxBandwidth"),
        (json!({ "type": "Downtime", "maxDowntime": "0s" }), "spec.remedies.maxDowntime"),
    ] {
        let error = remedy(value.clone()).ask().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field}: ")), "{value}: {error}");
    }
}

#[test]
fn an_answer_counts_for_what_was_asked_while_it_is_fresh() {
    let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
    let at = |minutes: i64| Some(Time(now - k8s_openapi::jiff::SignedDuration::from_mins(minutes)));
    let asked = spec(json!([{ "type": "AutoConverge" }]));
    let answer = |verdict| RemedyAnswer { verdict, ..RemedyAnswer::unknown(RemedyType::AutoConverge, "") };
    let status = |verdict, measured_at| MigrationForecastStatus {
        remedies: Some(RemedyAnswers { asked: asked.remedies_fingerprint(), measured_at, answers: vec![answer(verdict)] }),
        ..MigrationForecastStatus::default()
    };
    assert_eq!(status(Verdict::Converges, at(5)).remedies_for(&asked, now).unwrap().len(), 1);
    assert!(status(Verdict::Converges, at(25)).remedies_for(&asked, now).is_none(), "stale");
    assert!(status(Verdict::Converges, None).remedies_for(&asked, now).is_none(), "of an unknown age");
    assert!(status(Verdict::Unknown, None).remedies_for(&asked, now).is_some(), "nothing that could be stale");
    let none = spec(json!([]));
    for other in [
        spec(json!([{ "type": "PostCopy" }])),
        none,
        MigrationForecastSpec { bandwidth: Quantity("1Gi".into()), ..asked.clone() },
    ] {
        assert!(status(Verdict::Converges, at(5)).remedies_for(&other, now).is_none(), "{other:?}");
    }
    let beside = MigrationForecastSpec {
        dry_run: Some(crate::api::dry_run::DryRun { id: "x".into(), ..Default::default() }),
        ..asked.clone()
    };
    assert!(status(Verdict::Converges, at(5)).remedies_for(&beside, now).is_some(), "a dry run is none of it");
}

#[test]
fn an_answer_is_written_in_kubevirts_units() {
    let answer = |value| model::Answer {
        remedy: model::Remedy::AutoConverge,
        verdict: Verdict::Converges,
        value: Some(value),
        probability: 0.95,
        total_ms: 12_345.6,
        downtime_ms: Some(87.65),
        throttle_percent: None,
        degraded_ms: None,
    };
    let json = |kind, value| serde_json::to_value(RemedyAnswer::of(kind, &answer(value))).unwrap();
    let budget = json(RemedyType::TimeBudget, model::Value::PerGigabyte(40));
    assert_eq!(
        budget,
        json!({ "type": "TimeBudget", "verdict": "Converges", "completionTimeoutPerGiB": 40, "probability": 0.95, "totalTime": "12.346s", "downtime": "87.7ms" })
    );
    let rate = Bandwidth::Capped(BytesPerSecond(93 << 20)).cap().unwrap();
    assert_eq!(json(RemedyType::Bandwidth, model::Value::Bandwidth(rate))["bandwidth"], "93Mi");
    let longer = model::Value::Downtime(std::time::Duration::from_millis(450));
    assert_eq!(json(RemedyType::Downtime, longer)["maxDowntime"], "450ms");
}

proptest! {
    /// Whatever a model says becomes an object that can be written and read.
    #[test]
    fn any_answer_becomes_an_object(p in prop::num::f64::ANY, total in prop::num::f64::ANY, down in prop::option::of(prop::num::f64::ANY)) {
        let odd = model::Answer {
            remedy: model::Remedy::PostCopy, verdict: Verdict::Fails, value: None, probability: p, total_ms: total, downtime_ms: down,
            throttle_percent: Some(99), degraded_ms: down,
        };
        let mut object = MigrationForecast::new("vm", spec(json!([])));
        let answers = vec![RemedyAnswer::of(RemedyType::PostCopy, &odd)];
        object.status = Some(MigrationForecastStatus {
            remedies: Some(RemedyAnswers { answers, ..RemedyAnswers::default() }),
            ..MigrationForecastStatus::default()
        });
        let back: MigrationForecast = serde_json::from_str(&serde_json::to_string(&object).unwrap()).unwrap();
        prop_assert!(back.status.unwrap().remedies.unwrap().answers.len() == 1);
    }
}
