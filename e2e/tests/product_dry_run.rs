//! Dry runs and migrations in flight, through the API server: asked for with kubectl, answered by the agent, told in the forecast's status.
//! One world, one story.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, ask, ended, migration, policy, running, status_that};
use migvisor::{
    api::{MigrationForecastStatus, dry_run::DryRunPhase},
    model::forecast::{HostConstants, Method, Verdict},
};
use migvisor_e2e::{
    lab::{GuestSpec, VmSpec},
    world::World,
};
use serde_json::{Value, json};

const BUDGET_SECONDS: u64 = 8;
/// 128 MiB of data, 16 MiB/s written: at 32 MiB/s it takes about 7 s, long enough to be seen on its way.
const CALM: GuestSpec = GuestSpec::uniform(32_768, 4);
/// 256 MiB of data, up to 234 MiB/s written.
const WILD: GuestSpec = GuestSpec::uniform(65_536, 60);

#[tokio::test]
async fn asked_for_answered_withdrawn_and_read_along() -> Result<()> {
    let migrations = json!({ "bandwidthPerMigration": "32Mi", "completionTimeoutPerGiB": BUDGET_SECONDS });
    let mut world = World::start(migrations).await?;
    world.plane().accepts(&policy("Warn")).await?;
    world.boot(NAMESPACE, "calm", VmSpec::new(CALM)).await?;
    world.boot(NAMESPACE, "wild", VmSpec::new(WILD)).await?;
    world.start_controller(&[]).await?;
    world.start_agent(&HostConstants::default(), &["--look", "3s"]).await?;
    for vm in ["calm", "wild"] {
        world.forecast(NAMESPACE, vm, Duration::from_secs(40)).await?;
    }

    println!("--- asked for: run, told, and the answer is the dry run's");
    let before = world.migration_settings(NAMESPACE, "wild").await?;
    ask(&world, "wild", &json!({ "id": "by-hand" })).await?;
    let seen = status_that(&world, "wild", "is on its way", SOON, |status| running(status, "by-hand")).await?;
    ensure!(seen.verdict == Some(Verdict::Fails) && seen.method == Some(Method::PatternCollector), "the answer stands: {seen:?}");
    let answered = status_that(&world, "wild", "is answered", 3 * SOON, |status| {
        ended(status, "by-hand").is_some() && status.method == Some(Method::DryRun)
    })
    .await?;
    let run = ended(&answered, "by-hand").context("it ended")?;
    ensure!(run.phase == DryRunPhase::Done, "{run:?}");
    ensure!(answered.verdict == Some(Verdict::Fails) && answered.least_convergent_bandwidth.is_some(), "{answered:?}");
    ensure!(world.migration_settings(NAMESPACE, "wild").await? == before, "QEMU's settings are as they were");

    println!("--- asked twice: run once");
    ask(&world, "wild", &json!({ "id": "by-hand", "deadline": "5m" })).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let again = status_that(&world, "wild", "stands", SOON, |status| ended(status, "by-hand").is_some()).await?;
    ensure!(ended(&again, "by-hand").and_then(|run| run.started_at) == run.started_at, "it ran again: {:?}", again.dry_run);

    println!("--- withdrawn: cancelled");
    ask(&world, "wild", &json!({ "id": "second", "deadline": null })).await?;
    status_that(&world, "wild", "is on its way", SOON, |status| running(status, "second")).await?;
    ask(&world, "wild", &Value::Null).await?;
    let withdrawn = status_that(&world, "wild", "has ended", SOON, |status| ended(status, "second").is_some()).await?;
    ensure!(ended(&withdrawn, "second").is_some_and(|run| run.phase == DryRunPhase::Cancelled), "{:?}", withdrawn.dry_run);
    ensure!(world.migration_settings(NAMESPACE, "wild").await? == before, "QEMU's settings are as they were");

    println!("--- compressed, by eight channels: the guest's pages are all alike, so it gets through");
    ask(&world, "wild", &json!({ "id": "third", "channels": 8, "compression": "Zstd" })).await?;
    let third = status_that(&world, "wild", "has ended", 3 * SOON, |status| ended(status, "third").is_some()).await?;
    let result = ended(&third, "third").and_then(|run| run.result).context("no result")?;
    ensure!(result.verdict == Verdict::Converges && result.compression_ratio.is_some_and(|ratio| ratio > 10.0), "{result:?}");
    ensure!(world.migration_settings(NAMESPACE, "wild").await? == before, "QEMU's settings are as they were");
    ask(&world, "wild", &Value::Null).await?;

    println!("--- a migration is read along, to its truth");
    world.plane().accepts(&migration("calm-1", "calm", &json!({}))).await?;
    let on_its_way = |status: &MigrationForecastStatus| {
        status.in_flight.as_ref().is_some_and(|flight| flight.bytes_per_second > 0 && flight.remaining_bytes > 0)
    };
    let flight = status_that(&world, "calm", "is in flight", SOON, on_its_way).await?.in_flight.context("it is")?;
    ensure!(flight.migration_uid.is_some() && flight.total_bytes >= 512 << 20, "{flight:?}");
    ensure!(world.migrated(NAMESPACE, "calm-1", Duration::from_secs(40)).await? == "Succeeded", "calm-1 did not succeed");
    let landed = |status: &MigrationForecastStatus| status.in_flight.is_none() && status.last_migration.is_some();
    let last = status_that(&world, "calm", "has landed", SOON, landed).await?.last_migration.context("it has")?;
    let truth = world.truth(NAMESPACE, "calm").context("nothing was moved")?;
    ensure!(last.converged && last.migration_uid == flight.migration_uid, "{last:?}");
    ensure!(last.pages == truth.pages && last.zero_pages == truth.zero_pages && last.syncs == truth.syncs, "{last:?}, {truth:?}");
    ensure!(last.total_time.0.as_millis() == u128::from(truth.total_ms), "{last:?}, {truth:?}");
    Ok(())
}
