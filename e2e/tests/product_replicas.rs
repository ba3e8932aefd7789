//! Two controllers: both answer admission all the time, one leads; when it dies the other one takes over.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON, forecast_that, migration, policy, rehearsed, review};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use migvisor::api::names::annotation;
use migvisor_e2e::{
    cluster::free_port,
    kubevirt::running_vmi,
    world::{NODE, World},
};
use nix::sys::signal::Signal;
use serde_json::json;

/// Kubernetes' usual 15 s for a silent leader, and what a busy machine needs.
const TAKE_OVER: Duration = Duration::from_secs(25);

async fn leader(world: &World) -> Result<String> {
    let leases: Api<Lease> = Api::namespaced(world.plane().client()?, "default");
    let holder = leases.get("migvisor-controller").await?.spec.and_then(|spec| spec.holder_identity);
    holder.filter(|holder| !holder.is_empty()).context("nobody leads")
}

async fn leads(world: &World, who: &str, deadline: Duration) -> Result<()> {
    let probe = || async { Ok((leader(world).await? == who).then_some(())) };
    world.plane().wait(NAMESPACE, &format!("{who} to lead"), deadline, probe).await
}

#[tokio::test]
async fn a_dead_leader_is_replaced_and_admission_goes_on() -> Result<()> {
    let mut world = World::start(json!({ "bandwidthPerMigration": "64Mi" })).await?;
    world.plane().accepts(&policy("Enforce")).await?;
    world.start_controller(&["--identity", "first"]).await?;
    leads(&world, "first", SOON).await?;
    let (port, health) = (free_port()?, format!("127.0.0.1:{}", free_port()?));
    world.start_replica("second", port, &health, &["--identity", "second"]).await?;

    // Both answer; one leads, and asks.
    let object = serde_json::from_str(&migration("any", "one", &json!({})))?;
    for port in [world.webhook_port, port] {
        let (status, text) = world.post(port, "/validate-vmim", review(&object)).await?;
        ensure!(status == 200 && text.contains(r#""allowed":true"#), "{port}: {status} {text}");
    }
    running_vmi(&world.plane().client()?, NAMESPACE, "one", NODE, "512Mi").await?;
    forecast_that(&world, "one", "is asked", SOON, |asked| asked.spec.policy.is_some()).await?;
    ensure!(leader(&world).await? == "first", "the lead went over without need");

    world.admit_at(port).await?;
    let ended = AtomicBool::new(false);
    let answered = Arc::new(AtomicU32::new(0));
    let asking = async {
        while !ended.load(Ordering::Relaxed) {
            let (status, text) = world.post(port, "/mutate-vmim", review(&object)).await?;
            ensure!(status == 200 && text.contains(r#""patch":"#), "{status} {text}");
            answered.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    let taking_over = async {
        let done = async {
            let died = Instant::now();
            world.signal("controller", Signal::SIGKILL)?;
            leads(&world, "second", TAKE_OVER).await?;
            println!("the second leads {:.1} s after the first died", died.elapsed().as_secs_f64());
            running_vmi(&world.plane().client()?, NAMESPACE, "two", NODE, "512Mi").await?;
            forecast_that(&world, "two", "is asked", SOON, |asked| asked.spec.policy.is_some()).await.map(drop)
        };
        let done = done.await;
        ended.store(true, Ordering::Relaxed);
        done
    };
    let (asked, taken) = tokio::join!(asking, taking_over);
    asked.context("admission failed meanwhile")?;
    taken?;
    println!("{} reviews were answered meanwhile", answered.load(Ordering::Relaxed));
    ensure!(answered.load(Ordering::Relaxed) > 20, "hardly a review was answered meanwhile");
    // The API server asks it, too.
    let (annotations, _) = rehearsed(&world, "two").await?;
    ensure!(annotations[annotation::VERDICT] == "Unknown", "{annotations}");
    Ok(())
}
