//! The main job in a small world: a question for every VM, an answer from its guest's memory, a verdict at admission, and in the end the
//! outcome beside the forecast. One world, one story, told in steps.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, event, forecast_that, metric_reaches, migration, policy, rehearse, rehearsed};
use migvisor::{
    api::names::{annotation, reason},
    model::forecast::{HostConstants, Verdict},
};
use migvisor_e2e::{
    kubevirt::objects,
    lab::{self, GuestSpec, VmSpec},
    world::{OTHER_NODE, World},
};
use serde_json::{Value, json};

/// `completionTimeoutPerGiB`: the whole budget of a guest of up to 10⁹ bytes.
const BUDGET_SECONDS: u64 = 5;
/// 128 MiB of data, 16 MiB/s written: at 64 MiB/s it takes about 2.6 s.
const CALM: GuestSpec = GuestSpec::uniform(32_768, 4);
/// 256 MiB of data, up to 234 MiB/s written.
const WILD: GuestSpec = GuestSpec::uniform(65_536, 60);
/// Shorter than in production: what is looked for is plain.
const LOOK: [&str; 2] = ["--look", "3s"];

#[tokio::test]
async fn from_the_question_to_the_outcome() -> Result<()> {
    let migrations = json!({ "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": BUDGET_SECONDS });
    let mut world = World::start(migrations).await?;
    world.plane().accepts(&policy("Enforce")).await?;
    world.boot(NAMESPACE, "calm", VmSpec::new(CALM)).await?;
    world.boot(NAMESPACE, "wild", VmSpec::new(WILD)).await?;
    world.start_controller(&[]).await?;

    step("nobody has answered yet");
    nothing_is_known(&world).await?;
    step("an agent looks");
    world.start_agent(&HostConstants::default(), &LOOK).await?;
    let calm = world.forecast(NAMESPACE, "calm", Duration::from_secs(40)).await?;
    let wild = world.forecast(NAMESPACE, "wild", Duration::from_secs(40)).await?;
    let verdict = |forecast: &migvisor::api::MigrationForecast| forecast.status.as_ref().and_then(|status| status.verdict);
    ensure!(verdict(&calm) == Some(Verdict::Converges), "calm: {:?}", calm.status);
    ensure!(verdict(&wild) == Some(Verdict::Fails), "wild: {:?}", wild.status);

    step("the calm one is admitted, moves, and is held against its forecast");
    calm_moves(&world).await?;
    step("the wild one is refused under Enforce");
    wild_is_refused(&world).await?;
    step("the refusal's own way out: Warn");
    wild_is_warned_and_fails(&world).await?;
    step("Audit, and no policy at all");
    wild_passes_in_silence(&world).await?;

    for name in ["agent", "controller"] {
        world.process(name)?.still_runs()?;
    }
    let mut wild = world.take(NAMESPACE, "wild")?;
    ensure!(wild.is_alive(), "the guest that could not be moved is no more");
    Ok(())
}

fn step(what: &str) {
    println!("--- {what}");
}

async fn nothing_is_known(world: &World) -> Result<()> {
    forecast_that(world, "wild", "is asked under the policy", SOON, |asked| asked.spec.policy.as_deref() == Some("house"))
        .await?;
    for vmi in ["wild", "no-such-vm"] {
        let (annotations, warnings) = rehearsed(world, vmi).await?;
        ensure!(annotations[annotation::VERDICT] == "Unknown", "{vmi}: {annotations}");
        ensure!(annotations[annotation::REASON] == reason::NO_ANSWER, "{vmi}: {annotations}");
        ensure!(annotations.get(annotation::PROBABILITY).is_none(), "{vmi}: {annotations}");
        ensure!(!warnings.contains("Warning"), "{vmi}: {warnings}");
    }
    // A migration that says nothing of its VM is let through, and said to be odd.
    let odd = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": { "namespace": NAMESPACE, "name": "odd" }, "spec": { "someday": true },
    });
    let output = world.plane().kubectl(&["create", "--dry-run=server", "-f", "-"], &odd.to_string()).await?;
    ensure!(output.success && output.stderr.contains("Warning: migvisor cannot read this migration"), "{output:?}");
    Ok(())
}

async fn calm_moves(world: &World) -> Result<()> {
    let forged = json!({ annotation::VERDICT: "Fails", "migvisor.io/made-up": "x", "example.org/kept": "y" });
    let created = world.plane().accepts(&migration("calm-1", "calm", &forged)).await?;
    ensure!(!created.stderr.contains("Warning"), "{}", created.stderr);
    let vmim = objects::vmims(&world.plane().client()?, NAMESPACE).get("calm-1").await?;
    let annotations = vmim.metadata.annotations.clone().unwrap_or_default();
    let text = |key: &str| annotations.get(key).cloned().with_context(|| format!("no annotation {key}: {annotations:?}"));
    let number = |key: &str| text(key).and_then(|text| text.parse::<f64>().with_context(|| format!("{key} is {text}")));
    ensure!(text(annotation::VERDICT)? == "Converges" && text(annotation::METHOD)? == "PC", "{annotations:?}");
    ensure!(text("example.org/kept")? == "y" && !annotations.contains_key("migvisor.io/made-up"), "{annotations:?}");
    for key in [annotation::ITERATIONS, annotation::DIRTIED_PAGES, annotation::LCB, annotation::DOWNTIME, annotation::COST] {
        ensure!(number(key)? > 0.0, "{key}: {annotations:?}");
    }
    ensure!(number(annotation::PROBABILITY)? >= 0.9, "{annotations:?}");
    let told_ms = number(annotation::TOTAL_TIME)?;
    let whole: Value = serde_json::from_str(&text(annotation::FORECAST)?)?;
    ensure!(whole["verdict"] == "Converges", "{whole}");

    let phase = world.migrated(NAMESPACE, "calm-1", Duration::from_secs(30)).await?;
    ensure!(phase == "Succeeded", "calm-1 ended as {phase}");
    let truth = world.truth(NAMESPACE, "calm").context("nothing was moved")?;
    let real_ms = truth.total_ms as f64;
    println!("calm: forecast {told_ms:.0} ms, QEMU says {real_ms:.0} ms ({:+.1} %)", (told_ms / real_ms - 1.0) * 100.0);
    ensure!(truth.status == lab::Outcome::Completed, "{truth:?}");
    ensure!((told_ms / real_ms - 1.0).abs() < 0.15, "told {told_ms} ms, took {real_ms} ms");

    let has_outcome = |forecast: &migvisor::api::MigrationForecast| {
        forecast.status.as_ref().is_some_and(|status| status.outcome.is_some()) && forecast.spec.node_name == OTHER_NODE
    };
    let forecast = forecast_that(world, "calm", "has its outcome and asks the other node", SOON, has_outcome).await?;
    let outcome = forecast.status.and_then(|status| status.outcome).context("no outcome")?;
    ensure!((outcome.migration_name.as_str(), outcome.phase.as_str()) == ("calm-1", "Succeeded"), "{outcome:?}");
    ensure!(Some(&outcome.migration_uid) == vmim.metadata.uid.as_ref(), "{outcome:?}");
    ensure!(outcome.verdict == Some(Verdict::Converges), "{outcome:?}");
    // KubeVirt writes whole seconds.
    let took_ms = outcome.total_time.context("no total time")?.as_ms();
    ensure!((took_ms - real_ms).abs() <= 1_500.0, "{outcome:?} beside {truth:?}");
    let error = outcome.relative_error.context("no error")?;
    ensure!((error - (told_ms - took_ms) / took_ms).abs() < 0.01, "{outcome:?}: told {told_ms} ms");

    let (note, kind) = event(world, "MigrationForecastOutcome", "VirtualMachineInstanceMigration", "calm-1").await?;
    ensure!(kind == "Normal" && note.contains("Migration succeeded: forecast was Converges in"), "{kind}: {note}");
    let line = r#"migvisor_migrations_total{phase="Succeeded",verdict="Converges"}"#;
    metric_reaches(world, &world.controller_health, line, 1.0).await?;
    metric_reaches(world, &world.controller_health, r#"migvisor_forecast_error_ratio_count{verdict="Converges"}"#, 1.0).await?;

    // It is another node's now, where nobody answers: the old answer does not count any more.
    let (annotations, _) = rehearsed(world, "calm").await?;
    ensure!(annotations[annotation::VERDICT] == "Unknown", "{annotations}");
    Ok(())
}

async fn wild_is_refused(world: &World) -> Result<()> {
    let manifest = migration("wild-1", "wild", &json!({}));
    let message = world.plane().rejects(&manifest, "denied the request: migvisor forecasts").await?;
    println!("{message}");
    for part in [
        "live migration of default/wild would fail: at 64.0 MiB/s",
        "time budget of 5 s",
        "It needs at least ",
        "Ways out: raise bandwidthPerMigration to at least ",
        "allowPostCopy",
        r#""kind":"MigrationOverride""#,
        "| kubectl create -n default -f -",
    ] {
        ensure!(message.contains(part), "{part:?} is missing in: {message}");
    }
    ensure!(objects::vmims(&world.plane().client()?, NAMESPACE).get_opt("wild-1").await?.is_none(), "it was created");
    event(world, "MigrationWouldFail", "VirtualMachineInstance", "wild").await?;
    let line = r#"migvisor_admission_decisions_total{decision="deny",reason="BudgetExceeded",verdict="Fails"}"#;
    metric_reaches(world, &world.controller_health, line, 1.0).await?;

    // A drain must not hang: it is told, and let through.
    let evacuation = rehearse(world, "wild", json!({ "kubevirt.io/evacuationMigration": "node-a" })).await?;
    ensure!(evacuation.success && evacuation.stderr.contains("Warning: migvisor forecasts"), "{evacuation:?}");
    Ok(())
}

async fn mode(world: &World, mode: &str) -> Result<()> {
    let patch = json!({ "spec": { "mode": mode } }).to_string();
    let args = ["patch", "predictionpolicy", "house", "--type=merge", "-p", &patch];
    world.plane().kubectl(&args, "").await?.ok().map(drop)
}

/// Waits until admission knows of a change: rehearsals pass, with a warning or without.
async fn rehearsals(world: &World, warned: bool) -> Result<Value> {
    let what = format!("migrations of wild to pass {} a warning", if warned { "with" } else { "without" });
    let probe = || async {
        let output = rehearse(world, "wild", json!({})).await?;
        if !output.success || output.stderr.contains("Warning: migvisor forecasts") != warned {
            return Ok(None);
        }
        let object: Value = serde_json::from_str(&output.stdout)?;
        Ok(Some(object["metadata"]["annotations"].clone()).filter(|annotations| annotations[annotation::VERDICT] == "Fails"))
    };
    world.plane().wait(NAMESPACE, &what, SOON, probe).await
}

async fn wild_is_warned_and_fails(world: &World) -> Result<()> {
    mode(world, "Warn").await?;
    rehearsals(world, true).await?;
    let created = world.plane().accepts(&migration("wild-2", "wild", &json!({}))).await?;
    ensure!(
        created.stderr.contains("Warning: migvisor forecasts that the live migration of default/wild would fail"),
        "{created:?}"
    );
    let (note, kind) = event(world, "MigrationForecast", "VirtualMachineInstanceMigration", "wild-2").await?;
    ensure!(kind == "Warning" && note.contains("would fail"), "{kind}: {note}");

    let phase = world.migrated(NAMESPACE, "wild-2", Duration::from_secs(30)).await?;
    ensure!(phase == "Failed", "wild-2 ended as {phase}");
    let has_outcome = |forecast: &migvisor::api::MigrationForecast| {
        forecast.status.as_ref().is_some_and(|status| status.outcome.as_ref().is_some_and(|it| it.migration_name == "wild-2"))
    };
    let forecast = forecast_that(world, "wild", "has its outcome", SOON, has_outcome).await?;
    let outcome = forecast.status.and_then(|status| status.outcome).context("no outcome")?;
    ensure!((outcome.phase.as_str(), outcome.verdict) == ("Failed", Some(Verdict::Fails)), "{outcome:?}");
    ensure!(outcome.relative_error.is_none() && outcome.forecast_total_time.is_none(), "{outcome:?}");
    let took = outcome.total_time.context("no total time")?.0;
    let budget = Duration::from_secs(BUDGET_SECONDS);
    ensure!(took + Duration::from_secs(1) >= budget && took <= budget + Duration::from_secs(5), "{outcome:?}");
    let line = r#"migvisor_migrations_total{phase="Failed",verdict="Fails"}"#;
    metric_reaches(world, &world.controller_health, line, 1.0).await
}

async fn wild_passes_in_silence(world: &World) -> Result<()> {
    mode(world, "Audit").await?;
    rehearsals(world, false).await?;
    // Without the policy the question is another; it is answered from the same look.
    mode(world, "Enforce").await?;
    world.plane().kubectl(&["delete", "predictionpolicy", "house"], "").await?.ok()?;
    forecast_that(world, "wild", "is asked without a policy", SOON, |asked| asked.spec.policy.is_none()).await?;
    let annotations = rehearsals(world, false).await?;
    ensure!(annotations[annotation::REASON] == reason::BUDGET_EXCEEDED, "{annotations}");
    Ok(())
}
