//! Plans: who is to be moved, and the moving.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use migvisor::{
    api::{MigrationForecast, MigrationPlanStatus, names::PLAN_LABEL, plan::Phase},
    model::forecast::Verdict,
};
use migvisor_e2e::scenario::{Load, Scene};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// Until one agent has looked at all of the VMs, one after the other.
const LOOKED: Duration = Duration::from_secs(240);

/// A VM that could go: its name, its memory, what moving it costs.
type Eligible = (String, u64, f64);

/// Of VMs of different sizes and bandwidths a plan picks the very set that trying every set finds; who cannot go has a reason.
pub(crate) async fn plan_picks_what_exhaustive_search_picks(scene: &Scene<'_>) -> Result<()> {
    // What takes longer costs more.
    for bandwidth in ["64", "40"] {
        let fields = json!({ "bandwidthPerMigration": format!("{bandwidth}Mi"), "completionTimeoutPerGiB": 20 });
        scene.migration_policy(&format!("at-{bandwidth}"), &at(bandwidth), fields).await?;
    }
    let vms = [("fast", Load::Calm, "64"), ("slow", Load::Calm, "40"), ("large", Load::Large, "64"), ("wild", Load::Wild, "40")];
    for (name, load, bandwidth) in vms {
        scene.vm_with(name, load, &at(bandwidth), None).await?;
    }
    let mut eligible: Vec<Eligible> = Vec::new();
    for (name, load, bandwidth) in vms {
        let mebibytes: u64 = bandwidth.parse()?;
        let asked = |it: &MigrationForecast| it.spec.bandwidth.rate().is_ok_and(|rate| rate.0 == mebibytes << 20);
        let answered = |it: &MigrationForecast| {
            asked(it) && it.answer().is_some_and(|answer| answer.verdict.is_some_and(|verdict| verdict != Verdict::Unknown))
        };
        let forecast = scene.forecast_that(name, "is answered at its own bandwidth", LOOKED, answered).await?;
        let memory = forecast.spec.guest_memory()?.0;
        let status = forecast.status.context("no status")?;
        let wanted = if load == Load::Wild { Verdict::Fails } else { Verdict::Converges };
        ensure!(status.verdict == Some(wanted), "{name}: {status:?}");
        if let (Verdict::Converges, Some(cost)) = (wanted, status.cost) {
            eligible.push((name.to_owned(), memory, cost));
        }
    }
    ensure!(eligible.len() == 3, "{eligible:?}");

    let unit = eligible.iter().map(|vm| vm.1).min().context("none")?;
    let all: u64 = eligible.iter().map(|vm| vm.1).sum();
    for count in 1..=all / unit {
        let (name, memory) = (format!("set-{count}"), unit * count);
        let want = json!({ "want": "CheapestSet", "free": { "memory": memory.to_string() }, "bandwidth": "128Mi" });
        scene.plan(&name, &want).await?;
        let status = scene.plan_that(&name, "is made", SOON, |status| status.phase == Some(Phase::Planned)).await?;
        let exhaustive = cheapest(&eligible, memory)?;
        println!("{memory} bytes: {exhaustive:?}; {}", status.message.as_deref().unwrap_or_default());
        ensure!(members(&status) == exhaustive, "{:?} instead of {exhaustive:?}: {status:?}", members(&status));
        let selection = status.selection.as_ref().context("no selection")?;
        ensure!((selection.cost - selection.least_cost).abs() < 1e-9, "not proved: {selection:?}");
        let wild = status.candidates.iter().find(|it| it.name == "wild").context("the wild one is not told of")?;
        ensure!(wild.rank.is_none() && wild.reason.is_some(), "{wild:?}");
    }
    let too_much = json!({ "want": "CheapestSet", "free": { "memory": (all + 1).to_string() }, "bandwidth": "128Mi" });
    scene.plan("too-much", &too_much).await?;
    scene.plan_that("too-much", "is concluded", SOON, |status| status.phase == Some(Phase::NoSolution)).await?;
    ensure!(scene.vmims().await?.is_empty(), "they were only to be looked at");
    Ok(())
}

/// One after the other; the controller dies meanwhile. The next one goes on from the plan's status: nobody is moved twice.
pub(crate) async fn plan_executes_is_interrupted_and_resumes(scene: &Scene<'_>) -> Result<()> {
    const THROUGH: Duration = Duration::from_secs(120);
    let vms = ["vm-1", "vm-2"];
    for vm in vms {
        scene.vm(vm, Load::Calm).await?;
    }
    let mut left = Vec::new();
    for vm in vms {
        scene.answered(vm, Verdict::Converges).await?;
        left.push(scene.vmi(vm).await?["status"]["nodeName"].clone());
    }
    let want = json!({ "want": "Everything", "bandwidth": "64Mi", "parallelism": 1 });
    scene.plan("drain", &want).await?;
    let planned = scene.plan_that("drain", "has everybody", SOON, |status| members(status).len() == vms.len()).await?;
    let steps = planned.schedule.context("no schedule")?.steps;
    ensure!(scene.vmims().await?.is_empty(), "it was only to be looked at");

    let before = scene.leader().await?;
    let execute = r#"{"spec":{"execute":true}}"#;
    scene.kubectl(&["patch", "mplan", &scene.own("drain"), "--type=merge", "-p", execute]).await?;
    let uid = scene.planned("drain").await?.uid().context("it has no UID")?;
    let name = |step: usize| format!("migvisor-plan-{uid}-{step}");
    scene.reaches(&name(0), &["Running"], SOON).await?;
    scene.cluster.kill_controller().await?;
    let done = scene.plan_that("drain", "is through", THROUGH, |status| status.phase == Some(Phase::Succeeded)).await?;
    let after = scene.leader().await?;
    ensure!(before != after, "{before} was killed, and went on");

    let made = scene.vmims().await?;
    let names: BTreeSet<_> = made.iter().map(ResourceExt::name_any).collect();
    let wanted: BTreeSet<_> = (0..steps.len()).map(&name).collect();
    ensure!(names == wanted, "{names:?} instead of {wanted:?}");
    ensure!(made.iter().all(|vmim| vmim.labels().get(PLAN_LABEL) == Some(&uid)), "{made:?}");
    for (at, step) in steps.iter().enumerate() {
        let vmim = scene.vmim(&name(at)).await?.context("no migration of a step")?;
        ensure!(vmim.data["spec"]["vmiName"] == step.name && vmim.data["status"]["phase"] == "Succeeded", "{vmim:?}");
    }
    for (vm, left) in vms.iter().zip(&left) {
        ensure!(scene.vmi(vm).await?["status"]["nodeName"] != *left, "{vm} is where it was");
    }
    let told = done.migrations.iter().map(|migration| migration.phase.as_str()).collect::<Vec<_>>();
    ensure!(told == ["Succeeded", "Succeeded"], "{done:?}");
    Ok(())
}

/// To have a plan carried out is to migrate in every namespace: who may not, may plan, and stop what others have begun.
pub(crate) async fn plans_execute_is_refused_to_who_may_not_migrate(scene: &Scene<'_>) -> Result<()> {
    const PLANS: &str = "migrationplans";
    const VMIMS: &str = "virtualmachineinstancemigrations";
    let planner = scene.person("ann", &[PLANS], &[]).await?;
    let owner = scene.person("bob", &[PLANS], &[VMIMS]).await?;
    let operator = scene.person("carl", &[PLANS, VMIMS], &[]).await?;
    let create = async |user: &str, name: &str, execute: bool| {
        let manifest = scene.plan_manifest(name, &json!({ "want": "Everything", "execute": execute }));
        scene.at_the_end(&["delete", PLANS, &scene.own(name), "--ignore-not-found"]);
        scene.as_user(user, &["create", "-f", "-"], &manifest.to_string()).await
    };
    let change = async |user: &str, name: &str, spec: Value| {
        let patch = json!({ "spec": spec }).to_string();
        scene.as_user(user, &["patch", PLANS, &scene.own(name), "--type=merge", "-p", &patch], "").await
    };
    // Rights take a moment to be heard of.
    let rehearsal = scene.plan_manifest("rehearsal", &json!({ "want": "Everything" })).to_string();
    let heard = async || {
        for user in [&planner, &owner, &operator] {
            let rehearsed = scene.as_user(user, &["create", "--dry-run=server", "-f", "-"], &rehearsal).await?;
            if !rehearsed.success {
                return Ok(None);
            }
        }
        Ok(Some(()))
    };
    scene.until("everybody's rights", SOON, heard).await?;

    for (user, name) in [(&planner, "of-ann"), (&owner, "of-bob")] {
        let words = format!("{user} may not create {VMIMS} in every namespace");
        let refused = create(user, name, true).await?;
        ensure!(!refused.success && refused.stderr.contains(&words), "{refused:?}");
        create(user, name, false).await?.ok()?;
        let refused = change(user, name, json!({ "execute": true })).await?;
        ensure!(!refused.success && refused.stderr.contains(&words), "{refused:?}");
    }
    create(&operator, "of-carl", true).await?.ok()?;
    change(&operator, "of-ann", json!({ "execute": true })).await?.ok()?;
    // Who may not have it carried out may stop it, and may neither begin it again nor choose what is carried out.
    change(&planner, "of-carl", json!({ "execute": false })).await?.ok()?;
    let again = change(&planner, "of-carl", json!({ "execute": true })).await?;
    ensure!(!again.success, "begun again by somebody who may not");
    let other = change(&planner, "of-ann", json!({ "sourceNode": "elsewhere" })).await?;
    ensure!(!other.success && other.stderr.contains("may not create"), "{other:?}");
    Ok(())
}

fn at(bandwidth: &str) -> Value {
    json!({ "e2e.migvisor.io/at": bandwidth })
}

/// Who is to go.
fn members(status: &MigrationPlanStatus) -> HashSet<String> {
    status.schedule.iter().flat_map(|schedule| &schedule.steps).map(|step| step.name.clone()).collect()
}

/// Of all sets that free so much memory the one that costs least.
fn cheapest(eligible: &[Eligible], memory: u64) -> Result<HashSet<String>> {
    let of = |set: u32| eligible.iter().enumerate().filter(move |(at, _)| set >> at & 1 == 1).map(|(_, vm)| vm);
    let costs = (1..1_u32 << eligible.len()).filter_map(|set| {
        let (freed, cost) = of(set).fold((0, 0.0), |(freed, cost), vm| (freed + vm.1, cost + vm.2));
        (freed >= memory).then_some((cost, set))
    });
    let (_, set) = costs.min_by(|a, b| a.0.total_cmp(&b.0)).context("no set does")?;
    Ok(of(set).map(|vm| vm.0.clone()).collect())
}
