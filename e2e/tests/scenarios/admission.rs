//! What becomes of a person's migration: let through, warned of, refused, recorded.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migvisor::{
    api::{
        MigrationForecast, MigrationForecastStatus,
        names::{annotation, reason},
    },
    model::forecast::Verdict,
};
use migvisor_e2e::scenario::{Load, Need, Scene, reason_of};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

fn status(forecast: &MigrationForecast) -> Result<&MigrationForecastStatus> {
    forecast.status.as_ref().context("no status")
}

/// Admitted, with the forecast in its annotations and nobody else's; it moves, and is held against its forecast.
pub(crate) async fn calm_vm_is_admitted_and_moves(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("calm", Load::Calm).await?;
    scene.answered("calm", Verdict::Converges).await?;
    let forged = json!({ annotation::VERDICT: "Fails", "migvisor.io/made-up": "x", "example.org/kept": "y" });
    let created = scene.cluster.kubectl().accepts(&scene.migration("calm-1", "calm", &forged).to_string()).await?;
    ensure!(!created.stderr.contains("Warning"), "{}", created.stderr);
    let vmim = scene.vmim("calm-1").await?.context("it is not there")?;
    let annotations = vmim.metadata.annotations.clone().unwrap_or_default();
    let text = |key: &str| annotations.get(key).cloned().with_context(|| format!("no annotation {key}: {annotations:?}"));
    let number = |key: &str| text(key).and_then(|text| text.parse::<f64>().with_context(|| format!("{key} is {text}")));
    ensure!(text(annotation::VERDICT)? == "Converges" && text(annotation::METHOD)? == "PC", "{annotations:?}");
    ensure!(text("example.org/kept")? == "y" && !annotations.contains_key("migvisor.io/made-up"), "{annotations:?}");
    for key in [annotation::ITERATIONS, annotation::DIRTIED_PAGES, annotation::LCB, annotation::DOWNTIME, annotation::COST] {
        ensure!(number(key)? > 0.0, "{key}: {annotations:?}");
    }
    ensure!(number(annotation::PROBABILITY)? >= 0.9, "{annotations:?}");
    let whole: Value = serde_json::from_str(&text(annotation::FORECAST)?)?;
    ensure!(whole["verdict"] == "Converges", "{whole}");

    let left = scene.vmi("calm").await?["status"]["nodeName"].clone();
    let phase = scene.ended("calm-1").await?;
    ensure!(phase == "Succeeded", "calm-1 ended as {phase}");
    let now = scene.vmi("calm").await?["status"]["nodeName"].clone();
    ensure!(now != left, "it is where it was");
    let has_outcome = |it: &MigrationForecast| {
        it.status.as_ref().is_some_and(|status| status.outcome.is_some()) && now == json!(it.spec.node_name)
    };
    let forecast = scene.forecast_that("calm", "has its outcome and asks the other node", SOON, has_outcome).await?;
    let outcome = status(&forecast)?.outcome.clone().context("no outcome")?;
    ensure!((outcome.migration_name.as_str(), outcome.phase.as_str()) == ("calm-1", "Succeeded"), "{outcome:?}");
    ensure!(Some(&outcome.migration_uid) == vmim.metadata.uid.as_ref(), "{outcome:?}");
    ensure!(outcome.verdict == Some(Verdict::Converges), "{outcome:?}");
    let (told, took) = (number(annotation::TOTAL_TIME)?, outcome.total_time.context("no total time")?.as_ms());
    println!("calm: forecast {told:.0} ms, KubeVirt says {took:.0} ms");
    // KubeVirt writes whole seconds.
    ensure!((told - took).abs() <= 1_500.0 + 0.15 * took, "told {told} ms, took {took} ms");
    let error = outcome.relative_error.context("no error")?;
    ensure!((error - (told - took) / took).abs() < 0.01, "told {told} ms, took {took} ms, off by {error}");
    let (note, kind) = scene.event("MigrationForecastOutcome", "VirtualMachineInstanceMigration", "calm-1").await?;
    ensure!(kind == "Normal" && note.contains("Migration succeeded: forecast was Converges in"), "{kind}: {note}");
    if scene.cluster.lacks(Need::Metrics).is_none() {
        scene.metric_reaches(r#"migvisor_migrations_total{phase="Succeeded",verdict="Converges"}"#, 1.0).await?;
        scene
            .metric_reaches(r#"migvisor_forecast_error_ratio_count{method="PC",quantity="total_time",verdict="Converges"}"#, 1.0)
            .await?;
    }
    // The agent there looks at it, too.
    scene.answered("calm", Verdict::Converges).await.map(drop)
}

/// Refused, and told what would happen, what it needs, and the ways out.
pub(crate) async fn wild_vm_is_denied_with_advice(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let manifest = scene.migration("wild-1", "wild", &json!({})).to_string();
    let message = scene.cluster.kubectl().rejects(&manifest, "denied the request: migvisor forecasts").await?;
    println!("{message}");
    let subject = format!("live migration of {}/wild would fail: at 64.0 MiB/s", scene.namespace);
    for part in [
        subject.as_str(),
        "time budget of ",
        "It needs at least ",
        "Ways out: raise bandwidthPerMigration of its MigrationPolicy to at least ",
        "allowPostCopy",
        r#""kind":"MigrationOverride""#,
    ] {
        ensure!(message.contains(part), "{part:?} is missing in: {message}");
    }
    ensure!(scene.vmim("wild-1").await?.is_none(), "it was created");
    scene.event("MigrationWouldFail", "VirtualMachineInstance", "wild").await?;
    if scene.cluster.lacks(Need::Metrics).is_none() {
        let line = r#"migvisor_admission_decisions_total{decision="deny",reason="BudgetExceeded",verdict="Fails"}"#;
        scene.metric_reaches(line, 1.0).await?;
    }
    Ok(())
}

/// Let through with a warning, which is repeated as an event; it fails as it was told.
pub(crate) async fn warn_warns(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Warn").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let created = scene.migrate("wild-1", "wild").await?;
    let words = format!("Warning: migvisor forecasts that the live migration of {}/wild would fail", scene.namespace);
    ensure!(created.stderr.contains(&words), "{created:?}");
    let (note, kind) = scene.event("MigrationForecast", "VirtualMachineInstanceMigration", "wild-1").await?;
    ensure!(kind == "Warning" && note.contains("would fail"), "{kind}: {note}");
    let phase = scene.ended("wild-1").await?;
    ensure!(phase == "Failed", "wild-1 ended as {phase}");
    let has_outcome = |it: &MigrationForecast| it.status.as_ref().is_some_and(|status| status.outcome.is_some());
    let forecast = scene.forecast_that("wild", "has its outcome", SOON, has_outcome).await?;
    let outcome = status(&forecast)?.outcome.clone().context("no outcome")?;
    ensure!((outcome.phase.as_str(), outcome.verdict) == ("Failed", Some(Verdict::Fails)), "{outcome:?}");
    ensure!(outcome.relative_error.is_none() && outcome.forecast_total_time.is_none(), "{outcome:?}");
    if scene.cluster.lacks(Need::Metrics).is_none() {
        scene.metric_reaches(r#"migvisor_migrations_total{phase="Failed",verdict="Fails"}"#, 1.0).await?;
    }
    Ok(())
}

/// The forecast is written down, and nothing else happens: with a policy that audits, and without any.
pub(crate) async fn audit_only_records(scene: &Scene<'_>) -> Result<()> {
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    scene.forecast_that("wild", "is asked without a policy", SOON, |it| it.spec.policy.is_none()).await?;
    let annotations = scene.rehearses("wild", "Fails", false).await?;
    ensure!(reason_of(&annotations) == reason::BUDGET_EXCEEDED, "{annotations}");
    scene.policy("Enforce").await?;
    scene.answered("wild", Verdict::Fails).await?;
    scene.change_policy(&json!({ "mode": "Audit" })).await?;
    scene.rehearses("wild", "Fails", false).await?;
    scene.migrate("wild-1", "wild").await?;
    scene.reaches("wild-1", &["Running"], SOON).await?;
    let events = scene.events("MigrationForecast", "VirtualMachineInstanceMigration", "wild-1").await?;
    ensure!(events.is_empty(), "{events:?}");
    let policies = scene.kubectl(&["get", "migrationpolicies", "-o", "name"]).await?;
    ensure!(!policies.contains("migvisor"), "{policies}");
    let pods = scene.kubectl(&["get", "pods", "-n", &scene.namespace, "-o", "jsonpath={.items[*].spec.schedulingGates}"]).await?;
    ensure!(pods.trim().is_empty(), "{pods}");
    Ok(())
}

/// Of several policies of either kind one applies: the one that KubeVirt's rule picks.
pub(crate) async fn two_policies_match(scene: &Scene<'_>) -> Result<()> {
    let gold = json!({ "class": "gold" });
    scene.policy("Audit").await?;
    scene.prediction_policy("gold", &gold, json!({ "mode": "Enforce" })).await?;
    scene.prediction_policy("gold-too", &gold, json!({ "mode": "Warn" })).await?;
    let slow = json!({ "bandwidthPerMigration": "32Mi", "completionTimeoutPerGiB": 7 });
    scene.migration_policy("slow", &gold, slow).await?;
    scene.vm_with("plain", Load::Idle, &json!({}), None).await?;
    scene.vm_with("golden", Load::Idle, &gold, None).await?;
    for (vm, policy, bandwidth) in [("plain", "policy", 64_u64 << 20), ("golden", "gold", 32 << 20)] {
        let own = scene.own(policy);
        let asked = |it: &MigrationForecast| {
            it.spec.policy.as_deref() == Some(own.as_str()) && it.spec.bandwidth.rate().is_ok_and(|rate| rate.0 == bandwidth)
        };
        scene.forecast_that(vm, "is asked under the policies that win", SOON, asked).await?;
    }
    // KubeVirt agrees.
    for (vm, policy, bandwidth) in [("plain", "scene", "64Mi"), ("golden", "slow", "32Mi")] {
        scene.migrate(vm, vm).await?;
        ensure!(scene.ended(vm).await? == "Succeeded", "{vm} did not migrate");
        let state = scene.vmi(vm).await?["status"]["migrationState"].clone();
        ensure!(state["migrationPolicyName"] == scene.own(policy), "{vm}: {state}");
        ensure!(state["migrationConfiguration"]["bandwidthPerMigration"] == bandwidth, "{vm}: {state}");
    }
    Ok(())
}
