//! Plans in a real API server: the controller makes them and carries them out with the rights that `config/base` gives it, KubeVirt's part
//! takes the migrations through their phases, and the forecasts are the model's own, written in the agents' place.

mod common;

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use common::{NAMESPACE, SOON, plan};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use migvisor::{
    api::{
        MigrationForecast, MigrationForecastStatus, MigrationPlan, MigrationPlanStatus,
        names::{AGENT, PLAN_LABEL},
        plan::Phase,
    },
    model::{
        forecast::Verdict,
        pattern::{Pattern, Sample, Traces, Writer},
        predict,
    },
};
use migvisor_e2e::{
    cluster::{ControlPlane, Process, free_port, product::binary, wait_for},
    kubevirt::{
        Job, KubeVirt, Mover, Order, Outcome, install_crds,
        objects::{create_node, vmims, vmis},
        running_vmi,
    },
    world::get,
};
use serde_json::{Value, json};

const NODE: &str = "node-a";
const MIB: u64 = 1 << 20;

/// Takes this long, moves nothing, counts how many it moves at a time; those who are doomed fail.
#[derive(Default)]
struct Pretend {
    takes: Duration,
    doomed: HashSet<&'static str>,
    now: AtomicUsize,
    most: Arc<AtomicUsize>,
}

impl Mover for Pretend {
    async fn migrate(&self, mut job: Job) -> Outcome {
        let together = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(together, Ordering::SeqCst);
        let outcome = tokio::select! {
            () = tokio::time::sleep(self.takes) => Outcome::success(),
            _ = job.next_order(Order::GoOn) => Outcome::aborted(),
        };
        self.now.fetch_sub(1, Ordering::SeqCst);
        if self.doomed.contains(job.vmi.as_str()) { Outcome::failure("Live migration has been aborted") } else { outcome }
    }
}

struct Scene {
    plane: ControlPlane,
    client: Client,
    controller: Process,
    most: Arc<AtomicUsize>,
    _kubevirt: KubeVirt,
}

impl Scene {
    async fn open(takes: Duration, doomed: &[&'static str]) -> Result<Self> {
        let plane = ControlPlane::start().await?;
        let client = plane.client()?;
        install_crds(&client).await?;
        plane.install_base().await?;
        for node in [NODE, "node-b"] {
            create_node(&client, node).await?;
        }
        let kubevirt = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": { "name": "kubevirt", "namespace": NAMESPACE },
            "spec": { "configuration": { "migrations": { "bandwidthPerMigration": "64Mi", "parallelOutboundMigrationsPerNode": 2 } } },
        });
        plane.accepts(&kubevirt.to_string()).await?;
        let mover = Pretend { takes, doomed: doomed.iter().copied().collect(), ..Pretend::default() };
        let most = Arc::clone(&mover.most);
        let kubevirt = KubeVirt::start(client.clone(), mover);
        let account = plane.account("migvisor-controller", Some(("controller", "node-b"))).await?;
        let controller = controller(&plane, &account.kubeconfig.to_string_lossy()).await?;
        Ok(Self { plane, client, controller, most, _kubevirt: kubevirt })
    }

    /// Starts the controller again, as a kubelet would: the same name, another token.
    async fn restart(&mut self) -> Result<()> {
        let account = self.plane.account("migvisor-controller", Some(("controller-again", "node-b"))).await?;
        self.controller = controller(&self.plane, &account.kubeconfig.to_string_lossy()).await?;
        Ok(())
    }

    /// A VM on [`NODE`] that writes at random over this share of its memory, each page so many times a second; and the answer about it.
    async fn vm(&self, name: &str, memory_mib: u64, share: f64, per_second: f64) -> Result<MigrationForecast> {
        running_vmi(&self.client, NAMESPACE, name, NODE, &format!("{memory_mib}Mi")).await?;
        let api: Api<MigrationForecast> = Api::namespaced(self.client.clone(), NAMESPACE);
        let what = format!("{name} to be asked about");
        let asked = self.plane.wait(NAMESPACE, &what, SOON, || async { Ok(api.get_opt(name).await?) }).await?;
        let pages = memory_mib * MIB / 4096;
        let samples = (0..512_u32).map(|at| Sample {
            page: u64::from(at) * pages / 512,
            weight: pages as f64 / 512.0,
            zero: false,
            writer: if f64::from(at) < share * 512.0 { Writer::Random { rate: per_second / 1000.0 } } else { Writer::Idle },
        });
        let pattern = Pattern::new(samples.collect(), Traces::default(), 12_000.0)?;
        let question = asked.spec.question()?;
        let answer = predict::forecast(&pattern, &question);
        let status = MigrationForecastStatus::from_forecast(&answer, &question, &asked.question(), jiff::Timestamp::now());
        let body = json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": name }, "status": status,
        });
        Ok(api.patch_status(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(body)).await?)
    }

    async fn plan(&self, name: &str, spec: &Value) -> Result<()> {
        self.plane.accepts(&plan(name, spec)).await.map(drop)
    }

    /// Waits until the status of a plan is as wanted.
    async fn plan_that(
        &self,
        name: &str,
        what: &str,
        deadline: Duration,
        holds: impl Fn(&MigrationPlanStatus) -> bool,
    ) -> Result<MigrationPlanStatus> {
        let api: Api<MigrationPlan> = Api::all(self.client.clone());
        let probe = || async { Ok(api.get_opt(name).await?.and_then(|plan| plan.status).filter(&holds)) };
        let found = self.plane.wait(NAMESPACE, &format!("the plan {name} that {what}"), deadline, probe).await;
        match found {
            Ok(status) => Ok(status),
            Err(error) => {
                let stored = api.get_opt(name).await?.and_then(|plan| plan.status);
                bail!(
                    "{error:#}\nthe plan: {}\nthe controller: {}",
                    serde_json::to_string(&stored)?,
                    self.controller.log_tail(20)
                )
            }
        }
    }

    /// Every migration: its name, its VM, the plan that it is of, its phase; in the order of creation.
    async fn migrations(&self) -> Result<Vec<(String, String, String, String)>> {
        let mut found = vmims(&self.client, NAMESPACE).list(&ListParams::default()).await?.items;
        found.sort_by_key(|migration| (migration.creation_timestamp(), migration.name_any()));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let all = found.iter().map(|migration| {
            let label = migration.labels().get(PLAN_LABEL).cloned().unwrap_or_default();
            let (vm, phase) = (text(&migration.data["spec"]["vmiName"]), text(&migration.data["status"]["phase"]));
            (migration.name_any(), vm, label, phase)
        });
        Ok(all.collect())
    }
}

async fn controller(plane: &ControlPlane, kubeconfig: &str) -> Result<Process> {
    let health = format!("127.0.0.1:{}", free_port()?);
    let certificate = plane.webhook_certificate()?;
    let (cert, key) = (certificate.certificate.to_string_lossy(), certificate.key.to_string_lossy());
    let admission = format!("127.0.0.1:{}", free_port()?);
    let args = ["controller", "--kubeconfig", kubeconfig, "--listen", &health, "--webhook-listen", &admission];
    let more = ["--tls-cert", &cert, "--tls-key", &key, "--lease-namespace", "migvisor-system", "--identity", "controller"];
    let mut process = plane.product("controller", &[&args[..], &more[..]].concat(), &[("KUBECONFIG", "/nonexistent")])?;
    let url: http::Uri = format!("http://{health}/readyz").parse()?;
    for _ in 0..400 {
        process.still_runs()?;
        if get(&url).await.is_ok_and(|(status, _)| status == 200) {
            return Ok(process);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("the controller is not ready; its log ends:\n{}", process.log_tail(25))
}

/// What `migvisor ARGS` prints, as the administrator, and its exit code.
fn said(plane: &ControlPlane, args: &[&str]) -> Result<(String, Option<i32>)> {
    let output = std::process::Command::new(binary()?).args(args).env("KUBECONFIG", plane.kubeconfig()).output()?;
    ensure!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok((String::from_utf8(output.stdout)?, output.status.code()))
}

fn members(status: &MigrationPlanStatus) -> HashSet<&str> {
    status.schedule.iter().flat_map(|schedule| &schedule.steps).map(|step| step.name.as_str()).collect()
}

#[tokio::test]
async fn plan_picks_the_vm_that_exhaustive_search_picks() -> Result<()> {
    let scene = Scene::open(Duration::from_secs(1), &[]).await?;
    let mut forecasts = Vec::new();
    for (name, memory, share, per_second) in [
        ("idle-small", 512, 0.0, 0.0),
        ("idle-large", 2048, 0.0, 0.0),
        ("calm", 1024, 0.1, 0.05),
        ("busy-small", 512, 0.3, 0.3),
        ("busy", 1024, 0.2, 0.2),
        ("busier", 1024, 0.2, 0.25),
        ("large", 2048, 0.1, 0.1),
        ("wild", 1024, 0.5, 5.0),
    ] {
        forecasts.push(scene.vm(name, memory, share, per_second).await?);
    }
    running_vmi(&scene.client, NAMESPACE, "unseen", NODE, "1Gi").await?;
    running_vmi(&scene.client, NAMESPACE, "stuck", NODE, "1Gi").await?;
    let no = json!([{ "type": "LiveMigratable", "status": "False", "reason": "SEVNotLiveMigratable", "message": "SEV is on" }]);
    let patch = Patch::Merge(json!({ "status": { "conditions": no } }));
    vmis(&scene.client, NAMESPACE).patch("stuck", &PatchParams::default(), &patch).await?;
    running_vmi(&scene.client, NAMESPACE, "tied", NODE, "1Gi").await?;
    let tie = Patch::Merge(json!({ "spec": { "nodeSelector": { "kubernetes.io/hostname": NODE } } }));
    vmis(&scene.client, NAMESPACE).patch("tied", &PatchParams::default(), &tie).await?;

    // What the forecasts themselves say: memory and cost of those that converge. One says no.
    let eligible: Vec<(&str, u64, f64)> = forecasts
        .iter()
        .filter(|forecast| forecast.status.as_ref().is_some_and(|status| status.verdict == Some(Verdict::Converges)))
        .map(|forecast| {
            let cost = forecast.status.as_ref().and_then(|status| status.cost).context("no cost")?;
            Ok((forecast.metadata.name.as_deref().unwrap_or_default(), forecast.spec.guest_memory()?.0, cost))
        })
        .collect::<Result<_>>()?;
    ensure!(eligible.len() == 7, "{eligible:?}");
    let every_set = |wanted: u64| {
        let sets = 1..1_u32 << eligible.len();
        let costs = sets.filter_map(|set| {
            let chosen = eligible.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, vm)| vm);
            let (memory, cost) = chosen.fold((0, 0.0), |(memory, cost), vm| (memory + vm.1, cost + vm.2));
            (memory >= wanted).then_some((cost, set))
        });
        let (_, set) = costs.min_by(|a, b| a.0.total_cmp(&b.0)).context("no set does")?;
        let names = eligible.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, vm)| vm.0);
        anyhow::Ok(names.collect::<HashSet<_>>())
    };

    for gib in [1_u64, 2, 3, 5, 7] {
        let name = format!("set-{gib}");
        let spec =
            json!({ "sourceNode": NODE, "want": "CheapestSet", "free": { "memory": format!("{gib}Gi") }, "bandwidth": "128Mi" });
        scene.plan(&name, &spec).await?;
        let unanswered =
            |status: &MigrationPlanStatus| status.candidates.iter().filter(|it| it.reason.as_deref() == Some("NoAnswer")).count();
        // The first status may be made before the manager's watch has shown the last answers.
        let complete = |status: &MigrationPlanStatus| {
            status.phase == Some(Phase::Planned) && status.candidates.len() == 11 && unanswered(status) == 1
        };
        let status = scene.plan_that(&name, "has looked at everybody", SOON, complete).await?;
        let exhaustive = every_set(gib << 30)?;
        ensure!(members(&status) == exhaustive, "{gib} GiB: {:?} instead of {exhaustive:?}", members(&status));
        let (selection, saving) = (status.selection.context("no selection")?, status.saving.context("no saving")?);
        ensure!((selection.cost - selection.least_cost).abs() < 1e-9, "not proved: {selection:?}");
        println!(
            "{gib} GiB: {exhaustive:?} at {:.3}; at random {:?}, everything {:.3}; {}",
            selection.cost,
            saving.random_cost,
            saving.everything_cost,
            status.message.unwrap_or_default()
        );
    }

    let spec = json!({ "sourceNode": NODE, "want": "Cheapest", "free": { "memory": "1Gi" }, "bandwidth": "128Mi" });
    scene.plan("one", &spec).await?;
    let one = scene.plan_that("one", "is made", SOON, |status| status.phase == Some(Phase::Planned)).await?;
    let cheapest = eligible.iter().filter(|vm| vm.1 >= 1 << 30).min_by(|a, b| a.2.total_cmp(&b.2)).context("none")?;
    ensure!(members(&one) == HashSet::from([cheapest.0]), "{:?} instead of {}", members(&one), cheapest.0);
    let why = |name: &str| one.candidates.iter().find(|it| it.name == name).and_then(|it| it.reason.as_deref());
    ensure!(why("unseen") == Some("NoAnswer") && why("stuck") == Some("NotLiveMigratable"), "{:?}", one.candidates);
    ensure!(why("tied") == Some("NoNode"), "{:?}", one.candidates);
    ensure!(why("wild") == Some("BudgetExceeded") && why(cheapest.0).is_none(), "{:?}", one.candidates);

    // The command line reads the same and says the same.
    let args = ["plan", "--node", NODE, "--want", "cheapest-set", "--memory", "3Gi", "--bandwidth", "128Mi"];
    let (told, code) = said(&scene.plane, &[&args[..], &["-o", "json"]].concat())?;
    let told: MigrationPlanStatus = serde_json::from_str(&told)?;
    ensure!(code == Some(0) && members(&told) == every_set(3 << 30)?, "{code:?} {told:?}");
    println!("{}", said(&scene.plane, &args)?.0);

    let spec = json!({ "sourceNode": NODE, "want": "CheapestSet", "free": { "memory": "64Gi" } });
    scene.plan("too-much", &spec).await?;
    let none = scene.plan_that("too-much", "is concluded", SOON, |status| status.phase == Some(Phase::NoSolution)).await?;
    ensure!(none.message.as_deref().is_some_and(|words| words.contains("64.0 GiB")), "{:?}", none.message);
    println!("{}", scene.plane.kubectl(&["get", "mplan", "-o", "wide"], "").await?.ok()?);
    Ok(())
}

#[tokio::test]
async fn plan_executes_is_interrupted_and_resumes() -> Result<()> {
    let mut scene = Scene::open(Duration::from_secs(3), &[]).await?;
    for name in ["vm-1", "vm-2", "vm-3", "vm-4", "vm-5"] {
        scene.vm(name, 512, 0.1, 0.05).await?;
    }
    let spec = json!({ "sourceNode": NODE, "want": "Everything", "bandwidth": "128Mi" });
    scene.plan("drain", &spec).await?;
    let planned = scene.plan_that("drain", "has everybody", SOON, |status| members(status).len() == 5).await?;
    let schedule = planned.schedule.context("no schedule")?;
    // Two at their cap just fill the link.
    ensure!(schedule.per_node == 2 && schedule.makespan < schedule.one_by_one.makespan, "{schedule:?}");
    ensure!(scene.migrations().await?.is_empty(), "it was only to be looked at");

    scene.plane.kubectl(&["patch", "mplan", "drain", "--type=merge", "-p", r#"{"spec":{"execute":true}}"#], "").await?.ok()?;
    let some = |status: &MigrationPlanStatus| status.migrations.iter().any(|migration| migration.phase == "Succeeded");
    scene.plan_that("drain", "has moved a VM", Duration::from_secs(40), some).await?;
    scene.controller.kill();
    let before = scene.migrations().await?;
    ensure!((2..5).contains(&before.len()), "{before:?}");
    let all_ended = || async {
        let all = scene.migrations().await?;
        Ok(all.iter().all(|migration| migration.3 == "Succeeded").then_some(all.len()))
    };
    let ended = wait_for("what is under way to end", SOON, all_ended).await?;
    ensure!(ended == before.len(), "something was created while nobody was there");
    scene.restart().await?;
    let done =
        scene.plan_that("drain", "is through", Duration::from_secs(60), |status| status.phase == Some(Phase::Succeeded)).await?;

    let all = scene.migrations().await?;
    let uid = Api::<MigrationPlan>::all(scene.client.clone()).get("drain").await?.uid().unwrap_or_default();
    ensure!(all.len() == 5 && all.iter().all(|it| it.2 == uid && it.3 == "Succeeded"), "{all:?}");
    ensure!(all.iter().map(|it| &it.1).collect::<HashSet<_>>().len() == 5, "a VM was moved twice: {all:?}");
    for (at, step) in schedule.steps.iter().enumerate() {
        let of = all.iter().find(|it| it.0 == format!("migvisor-plan-{uid}-{at}")).context("no migration of a step")?;
        ensure!(of.1 == step.name, "{of:?} is not of {step:?}");
        let vmi = vmis(&scene.client, NAMESPACE).get(&step.name).await?;
        ensure!(vmi.data["status"]["nodeName"] == "node-b", "{} is still there", step.name);
    }
    ensure!(scene.most.load(Ordering::SeqCst) == 2, "{:?} at a time", scene.most);
    ensure!(
        done.migrations.len() == 5
            && done.message.as_deref() == Some("Carried out: 5 of 5 migrations succeeded, 0 are under way."),
        "{done:?}"
    );

    // What it was refused for want of a right would be in the API server's record.
    for pod in ["controller", "controller-again"] {
        let (_, refused) = scene.plane.calls(pod)?;
        ensure!(refused.is_empty(), "{refused:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_plan_stops_at_a_failure_and_when_the_picture_is_another() -> Result<()> {
    let scene = Scene::open(Duration::from_secs(1), &["second"]).await?;
    // In this order: by their cost.
    for (name, memory) in [("first", 256), ("second", 512), ("third", 1024)] {
        scene.vm(name, memory, 0.1, 0.05).await?;
    }
    let spec = json!({ "sourceNode": NODE, "want": "Everything", "bandwidth": "128Mi", "parallelism": 1, "execute": true });
    scene.plan("drain", &spec).await?;
    let stopped =
        scene.plan_that("drain", "stops", Duration::from_secs(40), |status| status.phase == Some(Phase::Stopped)).await?;
    let executed = stopped.conditions.iter().find(|condition| condition.type_ == "Executed").context("no condition")?;
    ensure!(executed.reason == "MigrationFailed" && executed.message.contains("/second failed"), "{executed:?}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let all: Vec<_> = scene.migrations().await?.into_iter().map(|it| (it.1, it.3)).collect();
    ensure!(all == [("first".to_owned(), "Succeeded".to_owned()), ("second".to_owned(), "Failed".to_owned())], "{all:?}");

    // The VM is not the one that was planned with: somebody moved it between the plan and its turn.
    let spec = json!({ "sourceNode": NODE, "want": "Cheapest", "free": { "memory": "1Gi" }, "bandwidth": "128Mi" });
    scene.plan("one", &spec).await?;
    let planned = scene.plan_that("one", "is made", SOON, |status| status.phase == Some(Phase::Planned)).await?;
    ensure!(members(&planned) == HashSet::from(["third"]), "{planned:?}");
    let moved = Patch::Merge(json!({ "status": { "nodeName": "node-b" } }));
    vmis(&scene.client, NAMESPACE).patch("third", &PatchParams::default(), &moved).await?;
    // Carrying out begins with a fresh look: nothing on the node would do any more.
    scene.plane.kubectl(&["patch", "mplan", "one", "--type=merge", "-p", r#"{"spec":{"execute":true}}"#], "").await?.ok()?;
    let ends = |status: &MigrationPlanStatus| matches!(status.phase, Some(Phase::NoSolution | Phase::Stopped));
    scene.plan_that("one", "finds nothing to do", SOON, ends).await?;
    ensure!(scene.migrations().await?.len() == 2, "it moved a VM that had gone");
    Ok(())
}
