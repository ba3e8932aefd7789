//! What goes wrong around the product: questions of others, VMs that are not there or vanish, an API server that goes away, bodies that are
//! no reviews. Nothing crashes, nothing is lost, and each unknown says why. One world, told in steps.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, forecast_that, forecasts, metric_reaches, migration, policy, rehearsed, review};
use kube::api::PostParams;
use migvisor::{
    api::{
        MigrationForecast,
        names::{NODE_LABEL, annotation},
    },
    model::forecast::{HostConstants, Verdict},
    webhook::BODY_LIMIT,
};
use migvisor_e2e::{
    kubevirt::running_vmi,
    lab::{GuestSpec, VmSpec},
    world::{NODE, OTHER_NODE, World},
};
use serde_json::json;

/// Writes 16 MiB/s into 64 MiB.
const CALM: GuestSpec = GuestSpec::uniform(16_384, 4);
/// Looks that are longer than a migration.
const AGENT: [&str; 2] = ["--look", "6s"];
/// A few looks.
const LOOKS: Duration = Duration::from_secs(40);

#[tokio::test]
async fn faults_are_told_and_survived() -> Result<()> {
    let mut world = World::start(json!({ "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": 20 })).await?;
    world.plane().accepts(&policy("Enforce")).await?;
    world.start_controller(&[]).await?;
    for name in ["mover", "victim"] {
        world.boot(NAMESPACE, name, VmSpec::new(CALM)).await?;
        forecast_that(&world, name, "is asked", SOON, |_| true).await?;
    }
    // One VM is looked at at a time, in the order of their names.
    world.start_agent(&HostConstants::default(), &AGENT).await?;

    println!("--- a VM that is moved during a look");
    moved_while_looked_at(&world).await?;
    println!("--- a VM that is killed during a look");
    killed_while_looked_at(&world).await?;
    println!("--- bodies that are no reviews");
    bodies_are_judged(&world).await?;
    println!("--- another node's question, with our label");
    foreign_question(&world).await?;
    println!("--- a pod without a QEMU");
    no_qemu(&world).await?;
    println!("--- an API server that goes away");
    api_server_away(&mut world).await?;

    // All the while nobody answered for the other node.
    let foreign = forecasts(&world)?.get("foreign").await?;
    ensure!(foreign.status.is_none(), "somebody answered for another node: {:?}", foreign.status);
    for name in ["agent", "controller"] {
        let process = world.process(name)?;
        process.still_runs()?;
        ensure!(!process.log().contains("panicked"), "the {name} panicked:\n{}", process.log_tail(40));
    }
    Ok(())
}

async fn bodies_are_judged(world: &World) -> Result<()> {
    let port = world.webhook_port;
    for path in ["/mutate-vmim", "/validate-vmim"] {
        for body in [&b""[..], b"hello", b"{}", br#"{"kind":"Pod","apiVersion":"v1"}"#, b"[[[[", b"\xff\xfe"] {
            let (status, text) = world.post(port, path, body.to_vec()).await?;
            ensure!(status == 400 && text.contains("AdmissionReview"), "{path} {body:?}: {status} {text}");
        }
        // Refused while it is being sent: the sender sees the answer or a closed connection.
        match world.post(port, path, vec![b' '; BODY_LIMIT + 1]).await {
            Ok((status, text)) => ensure!(status == 413, "{status} {text}"),
            Err(error) => println!("a body too large: {error:#}"),
        }
    }
    let (status, _) = world.post(port, "/no-such-path", b"{}".to_vec()).await?;
    ensure!(status == 404, "{status}");
    // What cannot be read as a migration is let through, with a warning.
    for object in
        [json!(null), json!({ "spec": { "vmiName": 7 } }), json!({ "metadata": {}, "spec": "odd" }), json!({ "spec": {} })]
    {
        let (status, text) = world.post(port, "/validate-vmim", review(&object)).await?;
        let answer: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("{status} {text}"))?;
        ensure!(answer["response"]["allowed"] == true, "{object}: {text}");
        ensure!(answer["response"]["warnings"][0].as_str().is_some_and(|it| it.contains("cannot read")), "{object}: {text}");
    }
    metric_reaches(world, &world.controller_health, "migvisor_admission_bad_requests_total", 12.0).await
}

async fn foreign_question(world: &World) -> Result<()> {
    let question = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast",
        "metadata": { "namespace": NAMESPACE, "name": "foreign", "labels": { NODE_LABEL: NODE } },
        "spec": {
            "nodeName": OTHER_NODE, "podUID": "pod-1", "guestMemory": "512Mi", "bandwidth": "64Mi",
            "bandwidthSource": "MigrationConfiguration", "downtimeLimit": "300ms", "timeBudget": "20s",
        },
    });
    forecasts(world)?.create(&PostParams::default(), &serde_json::from_value(question)?).await?;
    metric_reaches(world, &world.agent_health, r#"migvisor_agent_forecasts_ignored{reason="other_node"}"#, 1.0).await
}

fn is_unknown(forecast: &MigrationForecast) -> bool {
    forecast.answer().is_some_and(|answer| answer.verdict == Some(Verdict::Unknown))
}

fn message(forecast: &MigrationForecast) -> &str {
    forecast.status.as_ref().and_then(|status| status.message.as_deref()).unwrap_or_default()
}

async fn no_qemu(world: &World) -> Result<()> {
    running_vmi(&world.plane().client()?, NAMESPACE, "empty", NODE, "512Mi").await?;
    let forecast = forecast_that(world, "empty", "says Unknown", SOON, is_unknown).await?;
    ensure!(message(&forecast).contains("no QEMU of this pod is on this node"), "{:?}", forecast.status);
    let (annotations, warnings) = rehearsed(world, "empty").await?;
    ensure!(annotations[annotation::VERDICT] == "Unknown" && !warnings.contains("Warning"), "{annotations} {warnings}");
    Ok(())
}

async fn moved_while_looked_at(world: &World) -> Result<()> {
    world.plane().accepts(&migration("mover-1", "mover", &json!({}))).await?;
    let phase = world.migrated(NAMESPACE, "mover-1", LOOKS).await?;
    ensure!(phase == "Succeeded", "mover-1 ended as {phase}");
    forecast_that(world, "mover", "asks the other node", SOON, |asked| asked.spec.node_name == OTHER_NODE).await?;
    let mut moved = world.take(NAMESPACE, "mover")?;
    ensure!(moved.is_alive(), "the guest did not survive its migration");
    Ok(())
}

async fn killed_while_looked_at(world: &World) -> Result<()> {
    // Its turn has come, and the look takes longer than this.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    world.take(NAMESPACE, "victim")?.kill();
    let forecast = forecast_that(world, "victim", "says Unknown", LOOKS, is_unknown).await?;
    println!("the agent says: {}", message(&forecast));
    ensure!(!message(&forecast).is_empty(), "{:?}", forecast.status);
    let (annotations, warnings) = rehearsed(world, "victim").await?;
    ensure!(annotations[annotation::VERDICT] == "Unknown" && !warnings.contains("Warning"), "{annotations} {warnings}");
    // Who comes next is answered all the same.
    world.boot(NAMESPACE, "next", VmSpec::new(CALM)).await?;
    converges(world, "next", LOOKS).await
}

/// Waits for the answer; until its QEMU is there, a VM that was announced is unknown.
async fn converges(world: &World, name: &str, deadline: Duration) -> Result<()> {
    let holds = |forecast: &MigrationForecast| forecast.answer().is_some_and(|it| it.verdict == Some(Verdict::Converges));
    forecast_that(world, name, "says Converges", deadline, holds).await.map(drop)
}

async fn api_server_away(world: &mut World) -> Result<()> {
    world.plane().stop_api_server();
    // Long enough for writes that fail.
    tokio::time::sleep(Duration::from_secs(4)).await;
    for name in ["agent", "controller"] {
        world.process(name)?.still_runs()?;
    }
    // Admission does not need it: what was known is known.
    let object = serde_json::from_str(&migration("any", "next", &json!({})))?;
    let (status, text) = world.post(world.webhook_port, "/validate-vmim", review(&object)).await?;
    ensure!(status == 200 && text.contains(r#""allowed":true"#), "{status} {text}");
    // How they go on is a scenario (tests/scenarios/faults.rs).
    world.plane().restart_api_server().await
}
