//! Migrations that are held: a real guest's, tried out while its target pod waits; and what becomes of a hold when the world changes
//! meanwhile, told by the agent's answers alone.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, event, forecast_that, migration};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Time};
use kube::{
    Api, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use migvisor::{
    api::{
        MigrationForecast, MigrationForecastStatus,
        dry_run::{DryRunPhase, DryRunStatus},
        migration::HintPhase,
        names::{AGENT, AGENT_DRY_RUN, GATE, reason},
    },
    model::forecast::{HostConstants, Method, Verdict},
};
use migvisor_e2e::{
    cluster::free_port,
    kubevirt::{objects::vmims, running_vmi},
    lab::{GuestSpec, VmSpec},
    world::{NODE, World},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// 128 MiB of data, 16 MiB/s written: at 32 MiB/s it takes about 7 s.
const CALM: GuestSpec = GuestSpec::uniform(32_768, 4);

fn policy(more: &Value) -> String {
    let mut spec = json!({ "selectors": {}, "mode": "Enforce", "dryRun": { "mode": "OnDemand" } });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({ "apiVersion": "migvisor.io/v1alpha1", "kind": "PredictionPolicy", "metadata": { "name": "house" }, "spec": spec })
        .to_string()
}

async fn the_policy_is_now(world: &World, more: &Value) -> Result<()> {
    world.plane().kubectl(&["replace", "-f", "-"], &policy(more)).await?.ok().map(drop)
}

/// The target pod of the VM's migration, and whether our gate is on it.
async fn target(world: &World, vm: &str) -> Result<Option<(Pod, bool)>> {
    let pods: Api<Pod> = Api::namespaced(world.plane().client()?, NAMESPACE);
    let selector = format!("kubevirt.io/migrationJobUID,vm.kubevirt.io/name={vm}");
    let pod = pods.list(&ListParams::default().labels(&selector)).await?.items.into_iter().next();
    Ok(pod.map(|pod| {
        let ours = pod.spec.iter().flat_map(|spec| spec.scheduling_gates.iter().flatten());
        let gated = ours.into_iter().any(|gate| gate.name == GATE);
        (pod, gated)
    }))
}

async fn gated(world: &World, vm: &str, wanted: bool, deadline: Duration) -> Result<()> {
    let probe = || async { Ok(target(world, vm).await?.filter(|(_, gated)| *gated == wanted).map(drop)) };
    world.plane().wait(NAMESPACE, &format!("the gate of {vm} to be {wanted}"), deadline, probe).await
}

/// Starts a migration and waits until it is held. Returns the warning that whoever started it reads.
async fn hold(world: &World, vm: &str) -> Result<String> {
    let manifest = migration(&format!("{vm}-1"), vm, &json!({}));
    let output = world.plane().kubectl(&["create", "-f", "-"], &manifest).await?;
    let warning = output.stderr.clone();
    output.ok()?;
    gated(world, vm, true, SOON).await?;
    event(world, "MigrationHeld", "VirtualMachineInstanceMigration", &format!("{vm}-1")).await?;
    Ok(warning)
}

#[tokio::test]
async fn a_doubtful_migration_is_held_tried_out_and_let_go() -> Result<()> {
    let migrations = json!({ "bandwidthPerMigration": "32Mi", "completionTimeoutPerGiB": 20 });
    let mut world = World::start(migrations).await?;
    // No migration stops its guest for less: it converges, and yet it would not do.
    world.plane().accepts(&policy(&json!({ "sla": { "downtime": "1ms" } }))).await?;
    world.boot(NAMESPACE, "calm", VmSpec::new(CALM)).await?;
    world.start_controller(&[]).await?;
    world.start_agent(&HostConstants::default(), &["--look", "3s"]).await?;
    forecast_that(&world, "calm", "breaks its SLA", 3 * SOON, |object| {
        object.status.as_ref().is_some_and(|status| status.reason.as_deref() == Some(reason::SLA_EXCEEDED))
    })
    .await?;

    let warning = hold(&world, "calm").await?;
    ensure!(
        warning.contains("would break its SLA") && warning.contains("It is held until a dry run has tried it out"),
        "{warning}"
    );
    let status = |object: &MigrationForecast| object.status.clone().unwrap_or_default();
    let running = forecast_that(&world, "calm", "is being tried out", SOON, |object| {
        status(object).dry_run.is_some_and(|run| run.phase == DryRunPhase::Running)
    })
    .await?;
    ensure!(running.hint().is_some_and(|hint| hint.phase == HintPhase::Held), "{:?}", running.metadata.annotations);
    ensure!(target(&world, "calm").await?.is_some_and(|(_, gated)| gated), "it was let go before it was tried out");

    event(&world, "MigrationReleased", "VirtualMachineInstanceMigration", "calm-1").await?;
    gated(&world, "calm", false, SOON).await?;
    let tried = forecast_that(&world, "calm", "has been tried out", SOON, |object| {
        status(object).dry_run.is_some_and(|run| run.phase == DryRunPhase::Done) && status(object).method == Some(Method::DryRun)
    })
    .await?;
    ensure!(world.migrated(NAMESPACE, "calm-1", 2 * SOON).await? == "Succeeded", "calm-1 did not succeed");
    // KubeVirt keeps whole seconds.
    let done = status(&tried).dry_run.and_then(|run| run.completed_at).context("it ended")?.0;
    let object = vmims(&world.plane().client()?, NAMESPACE).get("calm-1").await?;
    let began = object.data.pointer("/status/migrationState/startTimestamp").and_then(Value::as_str).context("it began")?;
    let began: jiff::Timestamp = began.parse()?;
    ensure!(began.as_second() >= done.as_second(), "the dry run ended at {done}, the migration began at {began}");
    Ok(())
}

/// The agent's answer to the present question, given by the test: a doubt, or what a dry run found.
async fn answer(world: &World, vm: &str, method: &str, verdict: Verdict, probability: f64) -> Result<()> {
    let asked = forecast_that(world, vm, "is asked", SOON, |_| true).await?;
    let now = jiff::Timestamp::now();
    let question = asked.question();
    let status = MigrationForecastStatus {
        verdict: Some(verdict),
        ..MigrationForecastStatus::unknown(reason::NEAR_THE_LIMIT, "", &question, Some(now))
    };
    let mut status = serde_json::to_value(status)?;
    let figures = json!({
        "probability": probability, "method": method, "iterations": 9, "convergenceTime": "3s", "totalTime": "3s", "downtime": "100ms",
        "dirtiedPages": 9, "transferredBytes": 9,
    });
    status.as_object_mut().context("no object")?.extend(figures.as_object().cloned().unwrap_or_default());
    if method == "DR" {
        let id = asked.spec.dry_run.map(|asked| asked.id).context("no dry run is asked for")?;
        let fails = verdict == Verdict::Fails;
        let result = json!({
            "verdict": verdict, "totalTime": "3s", "convergenceTime": "3s", "downtime": (!fails).then_some("100ms"), "iterations": 9,
            "dirtiedPages": 9, "zeroPages": 0, "transferredBytes": 9
        });
        let run = DryRunStatus {
            started_at: Some(Time(now)),
            completed_at: Some(Time(now)),
            result: Some(serde_json::from_value(result)?),
            ..DryRunStatus::new(id, question.fingerprint, DryRunPhase::Done, "")
        };
        apply(world, vm, AGENT_DRY_RUN, json!({ "dryRun": run })).await?;
    }
    apply(world, vm, AGENT, status).await
}

async fn apply(world: &World, vm: &str, manager: &str, status: Value) -> Result<()> {
    let body = json!({ "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": vm }, "status": status });
    let api: Api<MigrationForecast> = common::forecasts(world)?;
    api.patch_status(vm, &PatchParams::apply(manager).force(), &Patch::Apply(body)).await?;
    Ok(())
}

/// A VM without a guest, of which the agent would say that a dry run could tell more; its migration is held.
async fn doubted(world: &World, vm: &str) -> Result<()> {
    running_vmi(&world.plane().client()?, NAMESPACE, vm, NODE, "512Mi").await?;
    answer(world, vm, "PC", Verdict::Borderline, 0.5).await?;
    forecast_that(world, vm, "counts", SOON, |object| {
        let conditions = object.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|it| it.type_ == "Ready" && it.reason == "Borderline")
    })
    .await?;
    hold(world, vm).await?;
    forecast_that(world, vm, "is to be tried out", SOON, |object| object.spec.dry_run.is_some()).await.map(drop)
}

#[tokio::test]
async fn a_hold_never_outlives_its_purpose() -> Result<()> {
    let mut world = World::start(json!({ "bandwidthPerMigration": "32Mi" })).await?;
    let generous = json!({ "hold": { "deadline": "10m", "atOnce": 16 } });
    world.plane().accepts(&policy(&generous)).await?;
    world.start_controller(&["--identity", "first"]).await?;

    println!("--- the dry run is good: let go");
    doubted(&world, "good").await?;
    answer(&world, "good", "DR", Verdict::Converges, 1.0).await?;
    gated(&world, "good", false, SOON).await?;
    event(&world, "MigrationReleased", "VirtualMachineInstanceMigration", "good-1").await?;

    println!("--- the dry run is bad: abandoned, once, and told");
    doubted(&world, "bad").await?;
    answer(&world, "bad", "DR", Verdict::Fails, 0.0).await?;
    let migrations = vmims(&world.plane().client()?, NAMESPACE);
    let ended = || async {
        let object = migrations.get_opt("bad-1").await?;
        // KubeVirt's finalizer keeps it until it has cleared up.
        Ok(object.is_none_or(|object| object.metadata.deletion_timestamp.is_some()).then_some(()))
    };
    world.plane().wait(NAMESPACE, "bad-1 to be abandoned", SOON, ended).await?;
    for (kind, name) in [("VirtualMachineInstanceMigration", "bad-1"), ("VirtualMachineInstance", "bad")] {
        let (note, severity) = event(&world, "MigrationAbandoned", kind, name).await?;
        ensure!(severity == "Warning" && note.contains("after a dry run") && note.contains("Ways out"), "{severity}: {note}");
    }

    println!("--- an override: let go, and the override stands in the event");
    doubted(&world, "urgent").await?;
    let by = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationOverride", "metadata": { "name": "by-hand", "namespace": NAMESPACE },
        "spec": { "vmiName": "urgent", "reason": "the rack is on fire" }
    });
    world.plane().accepts(&by.to_string()).await?;
    gated(&world, "urgent", false, SOON).await?;
    let (note, _) = event(&world, "MigrationReleased", "VirtualMachineInstanceMigration", "urgent-1").await?;
    ensure!(note.contains("The MigrationOverride by-hand lets it through (the rack is on fire)"), "{note}");
    let change = ["patch", "mo", "by-hand", "-n", NAMESPACE, "--type=merge", "-p", r#"{"spec":{"reason":"the rack is cold"}}"#];
    let refused = world.plane().kubectl(&change, "").await?;
    ensure!(
        refused.ok().is_err_and(|said| said.to_string().contains("an override is a record and cannot be changed")),
        "changed"
    );

    println!("--- the policy changes its mind");
    doubted(&world, "audited").await?;
    the_policy_is_now(&world, &json!({ "mode": "Audit" })).await?;
    gated(&world, "audited", false, SOON).await?;

    println!("--- the deadline");
    the_policy_is_now(&world, &generous).await?;
    doubted(&world, "late").await?;
    the_policy_is_now(&world, &json!({ "hold": { "deadline": "3s", "atOnce": 16 } })).await?;
    // And the time for a dry run that was asked for to end.
    gated(&world, "late", false, 2 * SOON).await?;
    let late = forecast_that(&world, "late", "is withdrawn", SOON, |object| object.spec.dry_run.is_none()).await?;
    ensure!(late.hint().is_some_and(|hint| hint.phase != HintPhase::Held), "{:?}", late.metadata.annotations);

    println!("--- a controller that dies: the next leader lets go");
    the_policy_is_now(&world, &generous).await?;
    doubted(&world, "orphaned").await?;
    world.signal("controller", Signal::SIGKILL)?;
    answer(&world, "orphaned", "DR", Verdict::Converges, 1.0).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(target(&world, "orphaned").await?.is_some_and(|(_, gated)| gated), "nobody was there to let it go");
    let (port, health) = (free_port()?, format!("127.0.0.1:{}", free_port()?));
    world.start_replica("second", port, &health, &["--identity", "second"]).await?;
    world.admit_at(port).await?;
    gated(&world, "orphaned", false, 2 * SOON).await?;

    println!("--- a controller that ends: it lets go what it holds");
    doubted(&world, "left").await?;
    world.signal("second", Signal::SIGTERM)?;
    gated(&world, "left", false, Duration::from_secs(5)).await?;

    println!("--- no manager is alive: nothing is held");
    running_vmi(&world.plane().client()?, NAMESPACE, "alone", NODE, "512Mi").await?;
    world.plane().accepts(&migration("alone-1", "alone", &json!({}))).await?;
    gated(&world, "alone", false, SOON).await?;
    let log = world.process("second")?.log();
    ensure!(!log.contains("panicked"), "{log}");
    ensure!(target(&world, "alone").await?.is_some_and(|(pod, _)| pod.name_any().contains("alone")), "no pod");
    Ok(())
}
