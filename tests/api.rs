//! The custom resources as others see them: their YAML, and objects as other versions of other programs write them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::{fs, path::Path, time::Duration};

use migvisor::{
    api::{MigrationForecast, MigrationForecastStatus, QuestionRef, convert, names::annotation},
    cli::crd,
    model::{
        forecast::{Bounds, Forecast, HostConstants, Method, PatternPoint, ProfilePoint, Question, Verdict},
        units::{Bandwidth, BytesPerSecond},
    },
};
use proptest::prelude::*;
use serde_json::json;

/// `MIGVISOR_GENERATE=1 cargo test --test api crds_are_current` writes them anew.
#[test]
fn crds_are_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds");
    let documents = crd::documents().unwrap();
    for (name, yaml) in &documents {
        let file = folder.join(format!("{name}.yaml"));
        if std::env::var_os("MIGVISOR_GENERATE").is_some() {
            fs::write(&file, yaml).unwrap();
        }
        let stored = fs::read_to_string(&file).unwrap_or_default();
        assert!(stored == *yaml, "{} is not what `migvisor crd` prints: run `make generate`", file.display());
    }
    // Beside them only the list by which `kubectl apply -k` finds them.
    assert_eq!(fs::read_dir(&folder).unwrap().count(), documents.len() + 1, "a file in crds/ that `migvisor crd` does not print");
    let listed = fs::read_to_string(folder.join("kustomization.yaml")).unwrap();
    assert!(
        documents.iter().all(|(name, _)| listed.contains(&format!("- {name}.yaml\n"))),
        "crds/kustomization.yaml is not complete"
    );
}

/// Kubernetes warns about formats that it does not know, and drops them.
#[test]
fn schemas_use_only_formats_that_kubernetes_knows() {
    for (name, yaml) in crd::documents().unwrap() {
        for line in yaml.lines().filter_map(|line| line.trim().strip_prefix("format: ")) {
            assert!(["int32", "int64", "double", "date-time"].contains(&line), "{name}: {line}");
        }
        assert!(!yaml.contains("uint"), "{name}");
    }
}

fn forecast_object(spec: &serde_json::Value) -> MigrationForecast {
    let mut base = json!({
        "nodeName": "node-1", "podUID": "8f4c", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "MigrationConfiguration",
        "downtimeLimit": "300ms", "timeBudget": "300s"
    });
    json_patch::merge(&mut base, spec);
    let object =
        json!({ "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": "vm" }, "spec": base });
    serde_json::from_value(object).unwrap()
}

#[test]
fn a_question_is_read_leniently() {
    let question = forecast_object(&json!({})).spec.question().unwrap();
    assert_eq!(question.bandwidth, Bandwidth::Capped(BytesPerSecond(100 << 20)));
    assert_eq!(question.downtime_limit, Duration::from_millis(300));
    assert_eq!(question.time_budget, Some(Duration::from_secs(300)));
    assert_eq!(question.host, HostConstants::default());

    let question = forecast_object(&json!({
        "bandwidth": 0, "timeBudget": null, "unknown": { "field": 1 }, "costWeights": { "downtime": 1 },
        "host": { "lineRate": "1Gi", "setupMs": 7 }, "sla": { "downtime": "0.5s", "more": [] }
    }))
    .spec
    .question()
    .unwrap();
    assert_eq!(question.bandwidth, Bandwidth::Unlimited);
    assert_eq!(question.time_budget, None);
    assert_eq!((question.weights.total_time, question.weights.downtime), (0.0, 1.0));
    assert_eq!((question.host.line_rate, question.host.setup_ms, question.host.sync_ms), (BytesPerSecond(1 << 30), 7.0, 0.6));
    assert_eq!(question.sla.downtime, Some(Duration::from_millis(500)));
}

#[test]
fn an_absurd_question_is_refused_by_the_name_of_its_field() {
    for (spec, field) in [
        (json!({ "bandwidth": "7" }), "spec.bandwidth"),
        (json!({ "bandwidth": "9Ei" }), "spec.bandwidth"),
        (json!({ "bandwidth": "fast" }), "spec.bandwidth"),
        (json!({ "bandwidth": "-100Mi" }), "spec.bandwidth"),
        (json!({ "downtimeLimit": "0s" }), "spec.downtimeLimit"),
        (json!({ "downtimeLimit": "3h" }), "spec.downtimeLimit"),
        (json!({ "timeBudget": "0" }), "spec.timeBudget"),
        (json!({ "timeBudget": "9999999999h" }), "spec.timeBudget"),
        (json!({ "sla": { "totalTime": "0s" } }), "spec.sla.totalTime"),
        (json!({ "costWeights": {} }), "spec.costWeights"),
        (json!({ "costWeights": { "pages": -1 } }), "spec.costWeights.pages"),
        (json!({ "host": { "lineRate": 0 } }), "spec.host.lineRate"),
        (json!({ "host": { "syncMs": 1e300 } }), "spec.host.syncMs"),
    ] {
        let error = forecast_object(&spec).spec.question().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field}: ")), "{spec}: {error}");
    }
    for memory in ["0", "much", "1Ei"] {
        let error = forecast_object(&json!({ "guestMemory": memory })).spec.guest_memory().unwrap_err().to_string();
        assert!(error.starts_with("spec.guestMemory: "), "{error}");
    }
}

fn forecast() -> Forecast {
    Forecast {
        verdict: Verdict::Converges,
        sla_exceeded: false,
        low_confidence: false,
        probability: 1.0,
        method: Method::PatternCollector,
        iterations: 5,
        convergence_ms: 3_508.25,
        downtime_ms: Some(212.4),
        total_ms: 3_720.65,
        dirtied_pages: 90_112,
        transferred_bytes: 370_000_000,
        least_convergent_bandwidth: Some(64 << 20),
        cost: Some(0.412_345),
        bounds: Bounds {
            total_ms: (3_600.0, 3_900.0),
            downtime_ms: Some((180.0, 260.0)),
            dirtied_pages: (88_000, 93_000),
            iterations: (4, 6),
        },
        pattern: Some((1..=400_u32).map(|i| PatternPoint { ms: f64::from(i) * 10.0, pages: 10 * u64::from(i) }).collect()),
        profile: (1..=20)
            .map(|i| ProfilePoint {
                bandwidth: i << 20,
                probability: 0.5,
                total_ms: 1.0,
                downtime_ms: None,
                iterations: 1,
                dirtied_pages: 2,
            })
            .collect(),
        baselines: Vec::new(),
    }
}

fn question() -> Question {
    forecast_object(&json!({})).spec.question().unwrap()
}

fn asked(generation: i64) -> QuestionRef {
    QuestionRef { fingerprint: "0123456789abcdef".to_owned(), generation }
}

#[test]
fn an_answer_is_short_and_reads_back() {
    let measured = "2026-11-22T12:00:00Z".parse().unwrap();
    let status = MigrationForecastStatus::from_forecast(&forecast(), &question(), &asked(3), measured);
    let object = serde_json::to_value(&status).unwrap();
    assert_eq!(object["totalTime"], "3.721s");
    assert_eq!(object["downtime"], "212.4ms");
    assert_eq!(object["leastConvergentBandwidth"], "64Mi");
    assert_eq!(object["bandwidth"], "100Mi");
    assert_eq!((&object["question"], &object["observedGeneration"]), (&json!("0123456789abcdef"), &json!(3)));
    assert_eq!(object["measuredAt"], "2026-11-22T12:00:00Z");
    assert_eq!(object["reason"], "WithinBudget");
    assert!(object.get("outcome").is_none() && object.get("conditions").is_none(), "not the agent's to write");
    for own in ["dryRun", "inFlight", "lastMigration"] {
        assert!(object.get(own).is_none(), "{own} has a field manager of its own");
    }
    assert_eq!(status.curve.len(), convert::CURVE_POINTS);
    assert_eq!((status.curve[0].pages, status.curve[31].pages), (10, 4000), "the first and the last point stay");
    assert_eq!(status.profile.len(), convert::PROFILE_POINTS);

    let back: MigrationForecastStatus = serde_json::from_value(object).unwrap();
    assert_eq!(back, status);
    let back = back.forecast().unwrap();
    assert!((back.total_ms - 3_720.65).abs() < 0.6 && back.least_convergent_bandwidth == Some(64 << 20));
}

#[test]
fn annotations_are_plain_numbers_with_the_keys_of_the_contract() {
    let status =
        MigrationForecastStatus::from_forecast(&forecast(), &question(), &asked(3), "2026-11-22T12:00:00Z".parse().unwrap());
    let annotations = convert::annotations(&status);
    assert_eq!(annotations[annotation::VERDICT], "Converges");
    assert_eq!(annotations[annotation::METHOD], "PC");
    assert_eq!(annotations[annotation::DOWNTIME], "212.4");
    assert_eq!(annotations[annotation::LCB], "67108864");
    let json: serde_json::Value = serde_json::from_str(&annotations[annotation::FORECAST]).unwrap();
    for key in Forecast::KEYS {
        assert!(json.get(key).is_some(), "{key} in {json}");
    }

    let unknown = MigrationForecastStatus::unknown("NotMeasured", "the agent found no QEMU", &asked(1), None);
    let annotations = convert::annotations(&unknown);
    assert_eq!(annotations.len(), 2, "{annotations:?}");
    assert_eq!(annotations[annotation::VERDICT], "Unknown");
}

#[test]
fn a_failing_answer_has_no_downtime_and_says_what_it_needs() {
    let failing = Forecast {
        verdict: Verdict::Fails,
        probability: 0.0,
        downtime_ms: None,
        total_ms: 300_000.0,
        cost: None,
        least_convergent_bandwidth: Some(180 << 20),
        transferred_bytes: 29 << 30,
        ..forecast()
    };
    let status =
        MigrationForecastStatus::from_forecast(&failing, &question(), &asked(1), "2026-11-22T12:00:00Z".parse().unwrap());
    let object = serde_json::to_value(&status).unwrap();
    assert!(object.get("downtime").is_none() && object.get("cost").is_none());
    assert_eq!(object["reason"], "BudgetExceeded");
    assert_eq!(
        object["message"],
        "At 100 MiB/s it would still be copying after 5 min and 29.0 GiB; it needs at least 180 MiB/s."
    );
}

proptest! {
    /// Whatever a model says, however absurd, becomes an object that can be written and read.
    #[test]
    fn any_forecast_becomes_an_object(total in prop::num::f64::ANY, downtime in prop::option::of(prop::num::f64::ANY), p in prop::num::f64::ANY, cost in prop::num::f64::ANY, points in 0_usize..100) {
        let odd = Forecast {
            total_ms: total, downtime_ms: downtime, probability: p, cost: Some(cost),
            pattern: Some(vec![PatternPoint { ms: total, pages: 1 }; points]),
            ..forecast()
        };
        let status = MigrationForecastStatus::from_forecast(&odd, &question(), &asked(1), "2026-11-22T12:00:00Z".parse().unwrap());
        let json = serde_json::to_string(&status).unwrap();
        let back: MigrationForecastStatus = serde_json::from_str(&json).unwrap();
        let _ = convert::annotations(&back);
        prop_assert!(status.curve.len() <= convert::CURVE_POINTS);
    }
}
