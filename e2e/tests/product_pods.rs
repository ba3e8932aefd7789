//! The agent on a node of pods: VMs found by their pods' cgroups, asked through the libvirt of their pods; by the sampler, and, without
//! the node's processes, by QEMU alone.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::NAMESPACE;
use migvisor::{
    api::dry_run::DryRunPhase,
    model::forecast::{HostConstants, Verdict},
};
use migvisor_e2e::{
    lab::{
        GuestSpec,
        cgroup::{Cgroup, Driver},
        libvirt::Mode,
    },
    skip,
    world::World,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// 64 MiB of data, 16 MiB/s written.
const CALM: GuestSpec = GuestSpec::uniform(16_384, 4);
/// 256 MiB of data, up to 234 MiB/s written.
const WILD: GuestSpec = GuestSpec::uniform(65_536, 60);

#[tokio::test]
async fn vms_in_pods_are_answered_for() -> Result<()> {
    let mut world = World::start(json!({ "bandwidthPerMigration": "64Mi", "completionTimeoutPerGiB": 20 })).await?;
    let cgroups = Cgroup::of_pod("99999999-9999-9999-9999-999999999999", Driver::Cgroupfs);
    let sees = cgroups.is_ok();
    drop(cgroups);
    let driver = |driver: Driver| sees.then_some(driver);
    let _calm = world.boot_in_pod(NAMESPACE, "calm", CALM, Mode::Session, driver(Driver::Systemd)).await?;
    let wild = world.boot_in_pod(NAMESPACE, "wild", WILD, Mode::System, driver(Driver::Cgroupfs)).await?;
    world.start_controller(&[]).await?;
    if sees {
        world.start_agent_on_pods(&HostConstants::default(), &["--look", "3s", "--source", "sampler"]).await?;
        answered(&world, "calm", Verdict::Converges).await?;
        answered(&world, "wild", Verdict::Fails).await?;
        // As non-root and as root, through libvirt, by one stream and by several: QEMU comes to a socket in its pod's own folder.
        for (name, dry_run) in [("calm", json!({ "id": "one" })), ("wild", json!({ "id": "eight", "channels": 8 }))] {
            dry_run_is_done(&world, name, &dry_run).await?;
        }
    } else {
        skip::note("VMs found by their pods' cgroups: this machine lets nobody make one");
    }
    // Another agent in its place, which sees no processes; the libvirt of one pod hangs, which is that pod's affair alone.
    world.process("agent")?.kill();
    wild.signal(Signal::SIGSTOP)?;
    world
        .start_agent_on_pods(&HostConstants::default(), &["--look", "3s", "--refresh", "5s", "--source", "page-sampling"])
        .await?;
    logged(&mut world, "looked", "calm").await?;
    logged(&mut world, "could not look", "may hang").await?;
    answered(&world, "calm", Verdict::Converges).await?;
    wild.signal(Signal::SIGCONT)?;
    logged(&mut world, "looked", "wild").await?;
    answered(&world, "wild", Verdict::Fails).await?;
    world.process("agent")?.still_runs()
}

async fn dry_run_is_done(world: &World, name: &str, dry_run: &Value) -> Result<()> {
    let patch = json!({ "spec": { "dryRun": dry_run } }).to_string();
    let args = ["patch", "migrationforecast", name, "-n", NAMESPACE, "--type=merge", "-p", &patch];
    world.plane().kubectl(&args, "").await?.ok()?;
    let run = |forecast: &migvisor::api::MigrationForecast| forecast.status.as_ref().and_then(|status| status.dry_run.clone());
    let over = |forecast: &migvisor::api::MigrationForecast| run(forecast).is_some_and(|run| run.phase.is_final());
    let forecast = common::forecast_that(world, name, "has its dry run behind it", Duration::from_secs(60), over).await?;
    let run = run(&forecast).context("it has one")?;
    ensure!(run.phase == DryRunPhase::Done && run.result.is_some(), "{name}: {run:?}");
    Ok(())
}

/// Waits for a line of the agent's log with both words.
async fn logged(world: &mut World, one: &str, other: &str) -> Result<()> {
    for _ in 0..900 {
        let log = world.process("agent")?.log();
        if log.lines().any(|line| line.contains(one) && line.contains(other)) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("no line `{one} … {other}` in the agent's log:\n{}", world.process("agent")?.log())
}

async fn answered(world: &World, name: &str, verdict: Verdict) -> Result<()> {
    let told =
        |forecast: &migvisor::api::MigrationForecast| forecast.status.as_ref().and_then(|status| status.verdict) == Some(verdict);
    let what = format!("answers {verdict:?}");
    common::forecast_that(world, name, &what, Duration::from_secs(90), told).await.with_context(|| format!("about {name}"))?;
    Ok(())
}
