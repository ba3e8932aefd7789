//! Dry runs that have to give way: to the end of the agent, to a device that is plugged in, to the silence of those who would say that a
//! migration is about to begin. Through a real API server, on real guests, which feel nothing of it. One world, one story.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, ask, ended, policy, running, status_that};
use migvisor::{
    api::{MigrationForecastStatus, dry_run::DryRunPhase, names::reason},
    model::forecast::HostConstants,
};
use migvisor_e2e::{
    lab::{GuestSpec, VmSpec},
    soak::never_stopped,
    world::World,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// 256 MiB of data, up to 234 MiB/s written: at 32 MiB/s a dry run goes on for minutes.
const WILD: GuestSpec = GuestSpec::uniform(65_536, 60);
/// Looks are not what this is about.
const AGENT: [&str; 2] = ["--look", "3s"];

#[tokio::test]
async fn a_dry_run_gives_way() -> Result<()> {
    let mut world = World::start(json!({ "bandwidthPerMigration": "32Mi", "completionTimeoutPerGiB": 0 })).await?;
    world.plane().accepts(&policy("Warn")).await?;
    for vm in ["plugged", "orphan"] {
        world.boot(NAMESPACE, vm, VmSpec::new(WILD)).await?;
    }
    world.start_controller(&[]).await?;
    world.start_agent(&HostConstants::default(), &AGENT).await?;
    for vm in ["plugged", "orphan"] {
        world.forecast(NAMESPACE, vm, Duration::from_secs(40)).await?;
    }
    println!("--- the agent is told to end");
    the_agent_ends(&mut world).await?;
    println!("--- a device is plugged in");
    a_device_is_plugged_in(&world).await?;
    println!("--- its own deadline comes");
    its_deadline_comes(&world).await?;
    println!("--- the controller is killed");
    the_controller_is_silent(&mut world).await?;
    for name in ["agent", "controller"] {
        world.process(name)?.still_runs()?;
    }
    Ok(())
}

async fn the_agent_ends(world: &mut World) -> Result<()> {
    let before = world.migration_settings(NAMESPACE, "plugged").await?;
    begin(world, "plugged", "one").await?;
    ensure!(world.migration_settings(NAMESPACE, "plugged").await? != before, "it borrows nothing");
    let told = Instant::now();
    world.signal("agent", Signal::SIGTERM)?;
    while world.process("agent")?.exited().is_none() {
        ensure!(told.elapsed() < SOON, "the agent does not end: {}", world.process("agent")?.log_tail(25));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("the agent ended after {:?}", told.elapsed());
    // At once, not some time later.
    unharmed(world, "plugged", &before).await?;
    let waits = |status: &MigrationForecastStatus| phase_of(status, "one") == Some(DryRunPhase::Waiting);
    status_that(world, "plugged", "waits for the next agent", SOON, waits).await?;
    world.start_agent(&HostConstants::default(), &AGENT).await?;
    status_that(world, "plugged", "is begun anew", 2 * SOON, |status| running(status, "one")).await?;
    ask(world, "plugged", &Value::Null).await?;
    status_that(world, "plugged", "is withdrawn", SOON, |status| ended(status, "one").is_some()).await?;
    unharmed(world, "plugged", &before).await
}

async fn a_device_is_plugged_in(world: &World) -> Result<()> {
    let before = world.migration_settings(NAMESPACE, "plugged").await?;
    let qemu = async |command: &str, arguments: Value| world.ask_qemu(NAMESPACE, "plugged", command, arguments).await;
    qemu("object-add", json!({ "qom-type": "rng-builtin", "id": "rng0" })).await?;
    let plug = async || qemu("device_add", json!({ "driver": "virtio-rng-pci", "id": "plugged0", "rng": "rng0" })).await;
    // By hand, so not the manager's to withdraw.
    begin(world, "plugged", "two").await?;
    let refused = plug().await.err().context("QEMU plugs in during a migration: then this is all for nothing")?.to_string();
    ensure!(refused.contains("migrat"), "{refused}");
    let vmi = ["vmi", "plugged", "-n", NAMESPACE];
    world.plane().kubectl(&[&["label"][..], &vmi, &["team=shop"]].concat(), "").await?.ok()?;
    world.plane().kubectl(&[&["annotate"][..], &vmi, &["note=hello"]].concat(), "").await?.ok()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    status_that(world, "plugged", "goes on", Duration::from_secs(1), |status| running(status, "two")).await?;

    let volume = json!({ "spec": { "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": "data", "hotpluggable": true } }] } });
    let told = Instant::now();
    world.plane().kubectl(&[&["patch"][..], &vmi, &["--type=merge", "-p", &volume.to_string()]].concat(), "").await?.ok()?;
    let gave_way = status_that(world, "plugged", "gives way", SOON, |status| ended(status, "two").is_some()).await?;
    println!("it gave way after {:?}", told.elapsed());
    let run = ended(&gave_way, "two").context("it ended")?;
    ensure!(run.phase == DryRunPhase::Cancelled && run.message.contains("spec has changed"), "{run:?}");
    ensure!(run.reason.is_none(), "it was not its own deadline: {run:?}");
    ensure!(gave_way.verdict.is_some() && gave_way.question.is_some(), "the answer stands: {gave_way:?}");
    plug().await?;
    unharmed(world, "plugged", &before).await?;
    // Whatever else is plugged in has its time.
    ask(world, "plugged", &json!({ "id": "three" })).await?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let held = status_that(world, "plugged", "is there", SOON, |_| true).await?;
    ensure!(phase_of(&held, "three").is_none(), "{:?}", held.dry_run);
    ask(world, "plugged", &Value::Null).await
}

async fn its_deadline_comes(world: &World) -> Result<()> {
    let before = world.migration_settings(NAMESPACE, "orphan").await?;
    ask(world, "orphan", &json!({ "id": "brief", "deadline": "2s" })).await?;
    let over = status_that(world, "orphan", "is over", 2 * SOON, |status| ended(status, "brief").is_some()).await?;
    let run = ended(&over, "brief").context("it ended")?;
    ensure!(run.phase == DryRunPhase::Cancelled && run.reason.as_deref() == Some(reason::DEADLINE_EXCEEDED), "{run:?}");
    ensure!(run.result.is_none() && run.message.contains("within its deadline of 2 s"), "{run:?}");
    ask(world, "orphan", &Value::Null).await?;
    unharmed(world, "orphan", &before).await
}

async fn the_controller_is_silent(world: &mut World) -> Result<()> {
    let before = world.migration_settings(NAMESPACE, "orphan").await?;
    begin(world, "orphan", "four").await?;
    world.process("controller")?.kill();
    let killed = Instant::now();
    let gave_up = status_that(world, "orphan", "is given up", 2 * SOON, |status| ended(status, "four").is_some()).await?;
    let waited = killed.elapsed();
    println!("given up {waited:?} after the controller was killed");
    let run = ended(&gave_up, "four").context("it ended")?;
    ensure!(
        run.phase == DryRunPhase::Cancelled && run.message.contains("has renewed the Lease default/migvisor-controller"),
        "{run:?}"
    );
    // 15 s after its last renewal, which was up to 2 s before; looked at every 2 s.
    ensure!((Duration::from_secs(12)..Duration::from_secs(20)).contains(&waited), "after {waited:?}");
    unharmed(world, "orphan", &before).await?;

    ask(world, "orphan", &json!({ "id": "five" })).await?;
    let waits = |status: &MigrationForecastStatus| phase_of(status, "five") == Some(DryRunPhase::Waiting);
    let waiting = status_that(world, "orphan", "waits for a controller", 2 * SOON, waits).await?;
    ensure!(waiting.dry_run.as_ref().is_some_and(|run| run.message.contains("see to the controller")), "{:?}", waiting.dry_run);
    unharmed(world, "orphan", &before).await?;
    world.start_controller(&[]).await?;
    status_that(world, "orphan", "is begun", 4 * SOON, |status| running(status, "five")).await?;
    ask(world, "orphan", &Value::Null).await?;
    status_that(world, "orphan", "is withdrawn", SOON, |status| ended(status, "five").is_some()).await?;
    unharmed(world, "orphan", &before).await
}

/// Asks for a dry run and waits until it is on its way.
async fn begin(world: &World, vm: &str, id: &str) -> Result<()> {
    ask(world, vm, &json!({ "id": id })).await?;
    status_that(world, vm, "is on its way", 2 * SOON, |status| running(status, id)).await.map(drop)
}

fn phase_of(status: &MigrationForecastStatus, id: &str) -> Option<DryRunPhase> {
    status.dry_run.as_ref().filter(|run| run.id == id).map(|run| run.phase)
}

/// The guest runs and never stopped, nothing migrates, and QEMU's settings are those of before.
async fn unharmed(world: &World, vm: &str, before: &(Value, Value)) -> Result<()> {
    let info = world.ask_qemu(NAMESPACE, vm, "query-migrate", Value::Null).await?;
    ensure!(matches!(info["status"].as_str(), None | Some("cancelled" | "failed")), "{vm}: {info}");
    ensure!(world.migration_settings(NAMESPACE, vm).await? == *before, "{vm}: QEMU's settings are not as they were");
    let mut guest = world.take(NAMESPACE, vm)?;
    let stopped = never_stopped(&mut guest).await;
    world.put(NAMESPACE, vm, guest);
    stopped
}
