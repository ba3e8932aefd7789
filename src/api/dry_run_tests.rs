//! Dry runs as people and other programs write them, and their way to the model and back.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    api::{
        MigrationForecastSpec,
        forecast::{MigrationForecastStatus, Sla},
    },
    model::forecast::{Bounds, Method, PatternPoint, ProfilePoint},
};

fn dry_run(changes: &Value) -> DryRun {
    let mut object = json!({ "id": "by-hand" });
    json_patch::merge(&mut object, changes);
    serde_json::from_value(object).unwrap()
}

#[test]
fn what_is_left_out_has_a_default() {
    let request = dry_run(&json!({ "someday": { "more": 1 } })).request().unwrap();
    let plain = Request { id: "by-hand".into(), deadline: DEADLINE.0, channels: None, compression: Compression::None };
    assert_eq!(request, plain);
    let request = dry_run(&json!({ "deadline": "90s", "channels": 8, "compression": "Zstd" })).request().unwrap();
    assert_eq!((request.deadline.as_secs(), request.channels, request.compression), (90, Some(8), Compression::Zstd));
    assert_eq!(
        serde_json::to_value(dry_run(&json!({}))).unwrap(),
        json!({ "id": "by-hand" }),
        "no more is written than was said"
    );
}

#[test]
fn an_absurd_dry_run_is_refused_by_the_name_of_its_field() {
    for (changes, field) in [
        (json!({ "id": "" }), "spec.dryRun.id"),
        (json!({ "id": "../up" }), "spec.dryRun.id"),
        (json!({ "id": "a\nb" }), "spec.dryRun.id"),
        (json!({ "id": "é" }), "spec.dryRun.id"),
        (json!({ "id": "a".repeat(64) }), "spec.dryRun.id"),
        (json!({ "deadline": "0" }), "spec.dryRun.deadline"),
        (json!({ "deadline": "25h" }), "spec.dryRun.deadline"),
        (json!({ "deadline": "9999999999h" }), "spec.dryRun.deadline"),
        (json!({ "channels": 0 }), "spec.dryRun.channels"),
        (json!({ "channels": 256 }), "spec.dryRun.channels"),
        (json!({ "channels": u64::MAX }), "spec.dryRun.channels"),
        (json!({ "compression": "Zstd" }), "spec.dryRun.compression"),
    ] {
        let error = dry_run(&changes).request().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field}: ")), "{changes}: {error}");
    }
}

fn question(sla: Option<Sla>) -> Question {
    let spec = json!({
        "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "PredictionPolicy",
        "downtimeLimit": "300ms", "timeBudget": "300s"
    });
    MigrationForecastSpec { sla, ..serde_json::from_value(spec).unwrap() }.question().unwrap()
}

fn tried(verdict: Verdict) -> Forecast {
    let converged = verdict != Verdict::Fails;
    Forecast {
        verdict,
        sla_exceeded: false,
        low_confidence: false,
        probability: f64::from(u8::from(converged)),
        method: Method::DryRun,
        iterations: 7,
        convergence_ms: if converged { 3_538.0 } else { 300_000.0 },
        downtime_ms: converged.then_some(212.0),
        total_ms: if converged { 3_750.0 } else { 300_000.0 },
        dirtied_pages: 90_112,
        transferred_bytes: 370_000_000,
        least_convergent_bandwidth: None,
        cost: converged.then_some(0.4123),
        bounds: Bounds::default(),
        pattern: None,
        profile: Vec::new(),
        baselines: Vec::new(),
    }
}

fn counted() -> Counted {
    let limit = |ms: f64| DryRunLimit {
        downtime_limit: Duration::from_ms(ms),
        converged: true,
        convergence_time: Some(Duration::from_ms(3_000.0)),
        downtime: Some(Duration::from_ms(ms / 2.0)),
        total_time: Some(Duration::from_ms(3_000.0 + ms / 2.0)),
        iterations: Some(5),
    };
    Counted { zero_pages: 1_234, compression_ratio: Some(2.5), limits: (1..=20).map(|i| limit(f64::from(i) * 100.0)).collect() }
}

#[test]
fn a_result_reads_back_as_the_forecast_it_came_from() {
    for verdict in [Verdict::Converges, Verdict::Borderline, Verdict::Fails] {
        let forecast = tried(verdict);
        let result = DryRunResult::from_forecast(&forecast, counted());
        assert_eq!(result.limits.len(), LIMITS);
        let stored: DryRunResult = serde_json::from_str(&serde_json::to_string(&result).unwrap()).unwrap();
        assert_eq!(stored, result);
        let mut back = stored.forecast(&question(None), None).unwrap();
        assert!(back.bounds.total_ms.0 < back.total_ms && back.total_ms < back.bounds.total_ms.1);
        back.bounds = Bounds::default();
        assert_eq!(back, forecast);
    }
    assert_eq!(DryRunResult::from_forecast(&tried(Verdict::Unknown), Counted::default()).forecast(&question(None), None), None);
}

/// The way into the status that everybody reads, and out of it again.
#[test]
fn the_answer_is_then_the_dry_runs() {
    let replayed = Forecast {
        method: Method::PatternCollector,
        least_convergent_bandwidth: Some(64 << 20),
        pattern: Some(vec![PatternPoint { ms: 100.0, pages: 10 }]),
        profile: vec![ProfilePoint {
            bandwidth: 1 << 20,
            probability: 0.5,
            total_ms: 1.0,
            downtime_ms: None,
            iterations: 1,
            dirtied_pages: 2,
        }],
        ..tried(Verdict::Fails)
    };
    let (question, asked) = (question(None), crate::api::QuestionRef { fingerprint: "f".into(), generation: 4 });
    let result = DryRunResult::from_forecast(&tried(Verdict::Converges), counted());
    let forecast = result.forecast(&question, Some(&replayed)).unwrap();
    let status = MigrationForecastStatus::from_forecast(&forecast, &question, &asked, "2026-11-22T12:00:00Z".parse().unwrap());
    let object = serde_json::to_value(&status).unwrap();
    for (key, value) in [
        ("method", json!("DR")),
        ("verdict", json!("Converges")),
        ("totalTime", json!("3.75s")),
        ("leastConvergentBandwidth", json!("64Mi")),
    ] {
        assert_eq!(object[key], value, "{key}");
    }
    assert_eq!((status.curve.len(), status.profile.len()), (1, 1), "what one run cannot tell is the pattern's");
    let back = serde_json::from_value::<MigrationForecastStatus>(object).unwrap().forecast().unwrap();
    assert_eq!((back.method, back.verdict, back.total_ms), (Method::DryRun, Verdict::Converges, forecast.total_ms));

    let strict = Sla { downtime: Some("100ms".parse().unwrap()), total_time: None };
    let broken = DryRunResult::from_forecast(&tried(Verdict::Borderline), Counted::default())
        .forecast(&self::question(Some(strict)), None);
    assert!(broken.unwrap().sla_exceeded);
}

#[test]
fn a_result_is_of_one_question_and_of_a_run_that_came_to_its_end() {
    let result = json!({
        "verdict": "Fails", "totalTime": "300s", "convergenceTime": "300s", "iterations": 1, "dirtiedPages": 1, "zeroPages": 1, "transferredBytes": 1
    });
    let status = |phase: &str, question: Value| -> DryRunStatus {
        serde_json::from_value(json!({ "id": "x", "phase": phase, "question": question, "result": result })).unwrap()
    };
    assert!(status("Done", json!("f")).result_for("f").is_some());
    for (phase, question) in [("Done", json!("g")), ("Done", Value::Null), ("Cancelled", json!("f")), ("Running", json!("f"))] {
        assert!(status(phase, question.clone()).result_for("f").is_none(), "{phase} {question}");
    }
}

#[test]
fn what_others_said_is_cut_to_what_an_object_holds() {
    let status = DryRunStatus::new("x", "f", DryRunPhase::Failed, "é".repeat(5000));
    assert!(status.message.chars().count() <= 1024 && status.message.ends_with('…'));
}

proptest! {
    /// Whatever a dry run counts, however absurd, becomes an object that can be written and read.
    #[test]
    fn any_outcome_becomes_an_object(total in prop::num::f64::ANY, downtime in prop::option::of(prop::num::f64::ANY), ratio in prop::option::of(prop::num::f64::ANY), cost in prop::option::of(prop::num::f64::ANY)) {
        let odd = Forecast { total_ms: total, convergence_ms: total, downtime_ms: downtime, cost, ..tried(Verdict::Converges) };
        let result = DryRunResult::from_forecast(&odd, Counted { compression_ratio: ratio, ..counted() });
        let json = serde_json::to_value(&result).unwrap();
        for key in ["compressionRatio", "cost"] {
            prop_assert!(json.get(key).is_none_or(|value| value.as_f64().is_some_and(|value| value >= 0.0)), "{}", json);
        }
        let back: DryRunResult = serde_json::from_value(json).unwrap();
        prop_assert!(back.forecast(&question(None), None).is_some());
    }
}
