//! `make demo`: the main job, on a real API server and real guests, told for somebody who has never seen it.

mod compare;
mod tell;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::jiff::Timestamp;
use migvisor::{
    api::MigrationForecast,
    model::{
        forecast::{Forecast, HostConstants, Verdict},
        units::{Bandwidth, BytesPerSecond},
    },
};
use migvisor_e2e::{
    cluster::product,
    kubevirt::vmim_manifest,
    lab::{
        self, GuestSpec, Settings,
        cgroup::{Cgroup, Driver},
        host,
        libvirt::Mode,
    },
    world::{NODE, World},
};
use serde_json::json;
use tell::{chapter, command, say};

const NAMESPACE: &str = "default";
/// What KubeVirt is configured to give a migration, MiB/s.
const BANDWIDTH_MIB: u64 = 64;
/// `completionTimeoutPerGiB`, as some distributions ship it: 20 s for a guest of up to 10⁹ bytes.
const SECONDS_PER_GB: u64 = 20;
/// Pods that the API server does not know.
const NOBODYS_POD: &str = "99999999-9999-9999-9999-999999999999";
const OTHER_POD: &str = "11111111-2222-3333-4444-555555555555";
/// Writes 4 of its 16 384 pages (64 MiB) per ms.
const CALM: GuestSpec = GuestSpec::uniform(16_384, 4);
/// Writes 60 of its 65 536 pages (256 MiB) per ms: up to 234 MiB/s.
const WILD: GuestSpec = GuestSpec::uniform(65_536, 60);

#[tokio::main]
async fn main() -> ExitCode {
    let ended = tokio::select! {
        ended = demo() => ended,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; everything that was started has been ended")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    chapter("A cluster");
    say(
        "etcd and kube-apiserver on loopback, KubeVirt's kinds and ours. KubeVirt is played by a stand-in that moves guests for real.",
    );
    let host = host::calibrate().await.context("cannot measure this host")?;
    let migrations = json!({ "bandwidthPerMigration": format!("{BANDWIDTH_MIB}Mi"), "completionTimeoutPerGiB": SECONDS_PER_GB });
    let mut world = World::start(migrations).await?;
    say(&format!(
        "Migrations get {BANDWIDTH_MIB} MiB/s, may stop the guest for 300 ms, and are given up after {SECONDS_PER_GB} s per GB."
    ));
    let policy = json!({
        "apiVersion": "migvisor.io/v1alpha1",
        "kind": "PredictionPolicy",
        "metadata": { "name": "demo" },
        "spec": { "selectors": {}, "mode": "Enforce" },
    });
    world.plane().accepts(&policy.to_string()).await?;
    let strict = json!({
        "apiVersion": "migvisor.io/v1alpha1",
        "kind": "PredictionPolicy",
        "metadata": { "name": "gold" },
        "spec": {
            "selectors": { "virtualMachineInstanceSelector": { "tier": "gold" } }, "mode": "Enforce",
            "sla": { "downtime": "1ms" }, "dryRun": { "mode": "OnDemand" }
        },
    });
    world.plane().accepts(&strict.to_string()).await?;
    say("A PredictionPolicy says: Enforce. Migrations that are forecast to fail are refused.");
    say("Another one, for VMs of the tier gold: they may stop for 1 ms only, and what leaves a doubt is tried out first.");

    chapter("Three virtual machines");
    let cgroups = Cgroup::of_pod(NOBODYS_POD, Driver::Cgroupfs).is_ok();
    for (name, guest) in [("calm", CALM), ("gold", CALM), ("wild", WILD)] {
        let driver = cgroups.then_some(Driver::Cgroupfs);
        let launcher = world.boot_in_pod(NAMESPACE, name, guest, Mode::System, driver).await?;
        world.settle(NAMESPACE, name, launcher);
    }
    command(&world, &["label", "vmi", "gold", "tier=gold"], "").await?.ok()?;
    say(
        "Three real QEMU guests of 512 MiB run now. `calm` and `gold` write 16 MiB/s into 64 MiB; `wild` writes up to 234 MiB/s into 256 MiB.",
    );
    say("Each is a domain of a libvirt of its own, which lies in its pod's directory as KubeVirt and the kubelet put it.");

    chapter("MigVisor watches them");
    world.start_controller(&[]).await?;
    // Without cgroups nobody can tell which process is whose: then QEMU itself has to measure.
    let more: &[&str] = if cgroups { &[] } else { &["--source", "page-sampling"] };
    world.start_agent_on_pods(&host, more).await?;
    say(
        "`migvisor controller` asks one question per VM, `migvisor agent` looks at the guest's memory from outside for 13 s each.",
    );
    for name in ["calm", "gold", "wild"] {
        world.forecast(NAMESPACE, name, Duration::from_secs(60)).await?;
    }
    kubectl(&world, &["get", "migrationforecasts", "-o", "wide"]).await?;
    let (calm, wild) = tokio::try_join!(predict(&world, "calm", &host), predict(&world, "wild", &host))?;

    chapter("What to move off the node");
    plan(&world).await?;

    chapter("Migrating the calm one: admitted");
    apply(&world, "calm").await?;
    let phase = world.migrated(NAMESPACE, "calm-migration", Duration::from_secs(60)).await?;
    ensure!(phase == "Succeeded", "the calm guest's migration ended as {phase}");
    kubectl(&world, &["get", "vmim"]).await?;
    say("What the admission webhook wrote on it, before it began:");
    let annotations = r"go-template={{range $k, $v := .metadata.annotations}}{{if and (ne $k `migvisor.io/forecast`) (ne $k `kubectl.kubernetes.io/last-applied-configuration`)}}{{printf `%-45s %s` $k $v}}
{{end}}{{end}}";
    kubectl(&world, &["get", "vmim", "calm-migration", "-o", annotations]).await?;

    chapter("Migrating the wild one: refused");
    let refusal = command(&world, &["apply", "-f", "-"], &vmim_manifest(NAMESPACE, "wild-migration", "wild").to_string()).await?;
    ensure!(!refusal.success, "the wild guest's migration was admitted: {}", refusal.stdout);
    ensure!(refusal.stderr.contains("denied the request"), "it was refused by somebody else: {}", refusal.stderr);

    chapter("Migrating the golden one: held, tried out, let go");
    apply(&world, "gold").await?;
    ended(&world, "gold").await?;

    chapter("Was MigVisor right?");
    say(&format!(
        "The refused migration is done now all the same, without Kubernetes, for the {SECONDS_PER_GB} s that KubeVirt would have given it."
    ));
    let calm_truth = world.truth(NAMESPACE, "calm").context("the calm guest's migration left no figures")?;
    let (source, domain) = world.take_pod(NAMESPACE, "wild")?;
    let target = source.like(&world.pods(), OTHER_POD).await?;
    let settings = Settings {
        bandwidth: Bandwidth::Capped(BytesPerSecond(BANDWIDTH_MIB << 20)),
        time_budget: Duration::from_secs(SECONDS_PER_GB),
        ..Settings::uncapped()
    };
    let wild_truth = lab::migrate_domain(&source, &target, &domain, settings).await?;
    compare::print("calm", &calm, &calm_truth);
    compare::print("wild", &wild, &wild_truth);
    world.settle(NAMESPACE, "wild", source);

    chapter("Migrating the wild one all the same: forced");
    forced(&world).await
}

/// Everybody on the node, as a plan for its drain sees them.
async fn plan(world: &World) -> Result<()> {
    let output = tokio::process::Command::new(product::binary()?)
        .args(["plan", "--node", NODE, "--want", "everything"])
        .env("KUBECONFIG", world.plane().kubeconfig())
        .kill_on_drop(true)
        .output()
        .await?;
    say("migvisor plan --node node-a --want everything");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.stderr.is_empty(), "migvisor plan: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Waits for a migration's success, and shows what was told of it on its way.
async fn ended(world: &World, name: &str) -> Result<()> {
    let migration = format!("{name}-migration");
    let phase = world.migrated(NAMESPACE, &migration, Duration::from_secs(60)).await?;
    ensure!(phase == "Succeeded", "{migration} ended as {phase}");
    let about = format!("involvedObject.name={migration}");
    let columns = "custom-columns=REASON:.reason,MESSAGE:.message";
    kubectl(world, &["get", "events", "--field-selector", &about, "--sort-by", ".metadata.creationTimestamp", "-o", columns])
        .await?;
    kubectl(world, &["get", "vmim"]).await
}

/// The policy allows a remedy; the same migration is admitted now, gets it, and succeeds.
async fn forced(world: &World) -> Result<()> {
    let remedies = json!({ "spec": { "remedies": [{ "type": "Bandwidth", "maxBandwidth": "1Gi", "aboveCap": true }] } });
    say("The policy may say what is done about a migration that would fail. Here: more bandwidth, for this one migration alone.");
    kubectl(world, &["patch", "predictionpolicy", "demo", "--type=merge", "-p", &remedies.to_string()]).await?;
    let api: kube::Api<MigrationForecast> = kube::Api::namespaced(world.plane().client()?, NAMESPACE);
    let helped = |object: &MigrationForecast| {
        let answers = object.status.as_ref().and_then(|status| status.remedies_for(&object.spec, Timestamp::now()));
        answers.is_some_and(|answers| answers.iter().any(|answer| answer.verdict == Verdict::Converges))
    };
    let probe = || async { Ok(api.get_opt("wild").await?.filter(&helped)) };
    world.plane().wait(NAMESPACE, "an answer about remedies", Duration::from_secs(40), probe).await?;
    apply(world, "wild").await?;
    ended(world, "wild").await?;
    let taken_back = || async {
        let left = world.plane().kubectl(&["get", "migrationpolicies", "-o", "name"], "").await?.ok()?;
        Ok(left.trim().is_empty().then_some(()))
    };
    world.plane().wait(NAMESPACE, "the remedy to be taken back", Duration::from_secs(20), taken_back).await?;
    say("Its MigrationPolicy has been taken back: the remedy was for this migration alone.");
    Ok(())
}

/// What `migvisor predict` says of a guest; the baselines come from here.
async fn predict(world: &World, name: &str, host: &HostConstants) -> Result<Forecast> {
    let directory = tempfile::tempdir()?;
    let constants = directory.path().join("host.json");
    std::fs::write(&constants, serde_json::to_vec(host)?)?;
    let output = tokio::process::Command::new(product::binary()?)
        .args(["predict", "--bandwidth", &format!("{BANDWIDTH_MIB}Mi"), "--time-budget", &format!("{SECONDS_PER_GB}s")])
        .args(["-o", "json", "--libvirt"])
        .arg(world.libvirt(NAMESPACE, name)?)
        .arg("--host")
        .arg(&constants)
        .kill_on_drop(true)
        .output()
        .await?;
    if !matches!(output.status.code(), Some(0 | 1)) {
        bail!("migvisor predict: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

async fn apply(world: &World, name: &str) -> Result<()> {
    let manifest = vmim_manifest(NAMESPACE, &format!("{name}-migration"), name).to_string();
    command(world, &["apply", "-f", "-"], &manifest).await?.ok().map(drop)
}

async fn kubectl(world: &World, args: &[&str]) -> Result<()> {
    command(world, args, "").await?.ok().map(drop)
}
