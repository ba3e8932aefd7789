//! Remedies through the API server: asked with kubectl, answered by the agent from a real guest's pattern. One world, one story.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, forecast_that, policy};
use k8s_openapi::jiff::Timestamp;
use migvisor::{
    api::{
        MigrationForecast,
        remedy::{
            RemedyAnswer,
            RemedyType::{AutoConverge, Bandwidth, Downtime, PostCopy, TimeBudget},
        },
    },
    model::forecast::{HostConstants, Verdict},
};
use migvisor_e2e::{
    lab::{GuestSpec, VmSpec},
    world::World,
};
use serde_json::{Value, json};

const BUDGET_SECONDS: u64 = 20;
/// 128 MiB of data, up to 156 MiB/s written: no time is long enough at 32 MiB/s.
const WILD: GuestSpec = GuestSpec::uniform(32_768, 40);

#[tokio::test]
async fn asked_answered_asked_otherwise_and_withdrawn() -> Result<()> {
    let migrations = json!({ "bandwidthPerMigration": "32Mi", "completionTimeoutPerGiB": BUDGET_SECONDS });
    let mut world = World::start(migrations).await?;
    world.plane().accepts(&policy("Audit")).await?;
    world.boot(NAMESPACE, "wild", VmSpec::new(WILD)).await?;
    world.start_controller(&[]).await?;
    world.start_agent(&HostConstants::default(), &["--look", "3s"]).await?;
    world.forecast(NAMESPACE, "wild", Duration::from_secs(40)).await?;

    println!("--- what makes no sense is refused by the API server");
    for (remedies, why) in [
        (json!([{ "type": "TimeBudget" }]), "maxCompletionTimeoutPerGiB"),
        (json!([{ "type": "AutoConverge", "maxBandwidth": "1Gi" }]), "maxBandwidth"),
        (json!([{ "type": "Downtime", "maxDowntime": "500ms", "aboveCap": true }]), "aboveCap"),
        (json!([{ "type": "Downtime" }]), "maxDowntime"),
        (json!([{ "type": "PostCopy" }, { "type": "PostCopy" }]), "at most once"),
        (json!([{ "type": "Prayer" }]), "Unsupported value"),
    ] {
        let refused = ask(&world, &remedies).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(refused.contains(why), "{remedies}: {refused}");
    }

    println!("--- asked: each answered, in order, within its limit");
    let all = json!([
        { "type": "TimeBudget", "maxCompletionTimeoutPerGiB": 300 }, { "type": "AutoConverge" },
        { "type": "Bandwidth", "maxBandwidth": "1Gi" }, { "type": "Downtime", "maxDowntime": "400ms" }, { "type": "PostCopy" }
    ]);
    ask(&world, &all).await?;
    let (object, answers) = answered(&world, 5).await?;
    let kinds: Vec<_> = answers.iter().map(|answer| answer.kind).collect();
    ensure!(kinds == [TimeBudget, AutoConverge, Bandwidth, Downtime, PostCopy], "{answers:?}");
    println!("{}", serde_json::to_string_pretty(&answers)?);
    let of = |kind| answers.iter().find(|answer| answer.kind == kind).context("not answered");
    ensure!(of(TimeBudget)?.verdict == Verdict::Fails && of(TimeBudget)?.completion_timeout_per_gib.is_none(), "{answers:?}");
    let rate = of(Bandwidth)?.bandwidth.clone().context("no bandwidth")?.rate()?.0;
    ensure!(of(Bandwidth)?.verdict == Verdict::Converges && (32 << 20 < rate && rate <= 1 << 30), "{answers:?}");
    let lowered = of(PostCopy)?.completion_timeout_per_gib.context("not lowered")?;
    ensure!(lowered < BUDGET_SECONDS && of(PostCopy)?.degraded_time.is_some(), "{answers:?}");
    ensure!(of(AutoConverge)?.throttle_percent.is_some_and(|percent| percent > 0), "{answers:?}");
    let question = object.spec.fingerprint();
    ensure!(object.status.as_ref().and_then(|status| status.question.clone()) == Some(question), "the answer itself stands");

    println!("--- asked otherwise: what was answered counts no more, and is answered anew");
    ask(&world, &json!([{ "type": "Bandwidth", "maxBandwidth": "33Mi" }])).await?;
    let (_, answers) = answered(&world, 1).await?;
    ensure!(answers.iter().all(|answer| answer.verdict == Verdict::Fails && answer.bandwidth.is_none()), "{answers:?}");

    println!("--- withdrawn: gone");
    ask(&world, &json!([])).await?;
    let gone = |object: &MigrationForecast| object.status.as_ref().is_some_and(|status| status.remedies.is_none());
    forecast_that(&world, "wild", "has no answers any more", SOON, gone).await?;
    Ok(())
}

/// Asks about remedies as a person would.
async fn ask(world: &World, remedies: &Value) -> Result<()> {
    let patch = json!({ "spec": { "remedies": remedies } }).to_string();
    let args = ["patch", "migrationforecast", "wild", "-n", NAMESPACE, "--type=merge", "-p", &patch];
    world.plane().kubectl(&args, "").await?.ok().map(drop)
}

/// Waits for the answers to what is asked now.
async fn answered(world: &World, count: usize) -> Result<(MigrationForecast, Vec<RemedyAnswer>)> {
    let read = |object: &MigrationForecast| {
        let answers = object.status.as_ref()?.remedies_for(&object.spec, Timestamp::now())?;
        (answers.len() == count).then(|| answers.to_vec())
    };
    let object = forecast_that(world, "wild", "answers about remedies", SOON, |object| read(object).is_some()).await?;
    let answers = read(&object).context("they were there")?;
    Ok((object, answers))
}
