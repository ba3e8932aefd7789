//! Many at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use kube::{ResourceExt, api::PostParams};
use migvisor::api::names::annotation;
use migvisor_e2e::{
    kubevirt::objects,
    scenario::{Load, Scene},
};
use serde_json::json;

const MANY: usize = 50;

/// Fifty people migrate fifty VMs at the same moment: all are answered, all move, within KubeVirt's limits.
pub(crate) async fn fifty_migrations_at_once(scene: &Scene<'_>) -> Result<()> {
    const ALL: Duration = Duration::from_secs(240);
    scene.policy("Enforce").await?;
    let names: Vec<_> = (0..MANY).map(|number| format!("vm-{number:02}")).collect();
    for name in &names {
        scene.vm(name, Load::Idle).await?;
    }
    for name in &names {
        scene.forecast_that(name, "is asked", Duration::from_secs(60), |_| true).await?;
    }
    let vmims = objects::vmims(&scene.cluster.client()?, &scene.namespace);
    let start = Instant::now();
    let migrate = async |name: &String| {
        let manifest = serde_json::from_value(scene.migration(name, name, &json!({}))).context("no manifest")?;
        vmims.create(&PostParams::default(), &manifest).await.with_context(|| format!("{name} was refused"))
    };
    let made = try_join_all(names.iter().map(migrate)).await?;
    println!("{MANY} migrations were admitted in {:.2} s", start.elapsed().as_secs_f64());
    ensure!(made.iter().all(|it| it.annotations().contains_key(annotation::VERDICT)), "one was not answered");
    let mut most = 0;
    let probe = async || {
        let all = scene.vmims().await?;
        let phase = |it: &kube::api::DynamicObject| it.data["status"]["phase"].as_str().unwrap_or_default().to_owned();
        let under_way = all.iter().filter(|it| !matches!(phase(it).as_str(), "" | "Pending" | "Succeeded" | "Failed")).count();
        most = most.max(under_way);
        ensure!(!all.iter().any(|it| phase(it) == "Failed"), "one has failed");
        Ok(all.iter().all(|it| phase(it) == "Succeeded").then_some(()))
    };
    scene.until("all of them to move", ALL, probe).await?;
    println!("{MANY} migrations were over after {:.1} s, {most} at a time at most", start.elapsed().as_secs_f64());
    ensure!(most <= 5, "{most} at a time");
    Ok(())
}
