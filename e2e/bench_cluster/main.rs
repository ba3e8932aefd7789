//! `make bench-cluster`: the controller beside a large cluster: how long it takes to ask about every VM, how much memory it takes, and how much it
//! writes once everything has been said.
//!
//! In: nothing; a real API server, KWOK's nodes, VMs without guests, answers written in the agents' place. Out: figures. No test: nothing here
//! fails but what breaks.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use migvisor::{
    api::{MigrationForecast, MigrationForecastStatus, names::AGENT},
    model::{
        pattern::{Pattern, Sample, Traces, Writer},
        predict,
    },
};
use migvisor_e2e::{
    cluster::{ControlPlane, Process, free_port, wait_for},
    kubevirt::{
        install_crds,
        objects::{create_kubevirt, create_node, vmi_manifest, vmis},
    },
    world::get,
};
use serde_json::json;

const NODES: usize = 1_000;
const VMS: usize = 10_000;
const NAMESPACES: usize = 20;
/// So many requests are under way at a time.
const AT_ONCE: usize = 32;
/// For everything of one kind.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long writes are counted.
const STEADY: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn namespace(vm: usize) -> String {
    format!("tenant-{:02}", vm % NAMESPACES)
}

#[tokio::main]
async fn main() -> ExitCode {
    match bench().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-cluster: {error:?}");
            ExitCode::FAILURE
        }
    }
}

async fn bench() -> Result<()> {
    let plane = ControlPlane::start_whole().await?;
    let client = plane.client()?;
    install_crds(&client).await?;
    plane.install_base().await?;
    create_kubevirt(&client, json!({ "bandwidthPerMigration": "128Mi" })).await?;
    let start = Instant::now();
    populate(&client).await?;
    println!("{NODES} nodes and {VMS} VMs made in {:.0?}", start.elapsed());

    let health = format!("127.0.0.1:{}", free_port()?);
    let start = Instant::now();
    let controller = controller(&plane, &health).await?;
    let everybody = || async {
        let all: Api<MigrationForecast> = Api::all(client.clone());
        Ok((all.list_metadata(&ListParams::default()).await?.items.len() == VMS).then_some(()))
    };
    wait_for("every VM to be asked about", PATIENCE, everybody).await?;
    println!("all asked about after {:.0?}; the controller has {}", start.elapsed(), memory(&controller)?);

    let start = Instant::now();
    answer(&client).await?;
    println!("all answered, by this program, after {:.0?}", start.elapsed());
    let ready = || async {
        let all: Api<MigrationForecast> = Api::all(client.clone());
        let is_ready = |forecast: &MigrationForecast| {
            let conditions = forecast.status.iter().flat_map(|status| &status.conditions);
            conditions.into_iter().any(|it| it.type_ == "Ready" && it.status == "True")
        };
        Ok((all.list(&ListParams::default()).await?.iter().filter(|it| is_ready(it)).count() == VMS).then_some(()))
    };
    wait_for("every answer to count", PATIENCE, ready).await?;
    println!("all count after {:.0?}; the controller has {}", start.elapsed(), memory(&controller)?);

    let (before, cpu) = (writes(&plane)?, cpu(&controller)?);
    tokio::time::sleep(STEADY).await;
    let minutes = STEADY.as_secs_f64() / 60.0;
    println!(
        "in a steady state: {:.1} writes a minute, {:.1} % of a core, {}",
        (writes(&plane)? - before) as f64 / minutes,
        (self::cpu(&controller)? - cpu) / STEADY.as_secs_f64() * 100.0,
        memory(&controller)?
    );
    Ok(())
}

/// Nodes that KWOK keeps alive, namespaces, and running VMs on the nodes in turn.
async fn populate(client: &Client) -> Result<()> {
    stream::iter(0..NODES).map(|node| create_node_named(client, node)).buffer_unordered(AT_ONCE).try_collect::<Vec<_>>().await?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for number in 0..NAMESPACES {
        let wanted: Namespace = serde_json::from_value(json!({ "metadata": { "name": namespace(number) } }))?;
        namespaces.create(&PostParams::default(), &wanted).await.context("cannot create a namespace")?;
    }
    let vm = async |number: usize| {
        let (namespace, node) = (namespace(number), format!("node-{:04}", number % NODES));
        let manifest = vmi_manifest(&namespace, &format!("vm-{number:05}"), &node, Some(&format!("pod-{number:05}")), "1Gi");
        let made = vmis(client, &namespace).create(&PostParams::default(), &serde_json::from_value(manifest)?).await;
        made.map(drop).with_context(|| format!("cannot create the VM {number}"))
    };
    stream::iter(0..VMS).map(vm).buffer_unordered(AT_ONCE).try_collect::<Vec<_>>().await.map(drop)
}

async fn create_node_named(client: &Client, number: usize) -> Result<()> {
    create_node(client, &format!("node-{number:04}")).await
}

async fn controller(plane: &ControlPlane, health: &str) -> Result<Process> {
    let account = plane.account("migvisor-controller", Some(("controller", "node-0000"))).await?;
    let certificate = plane.webhook_certificate()?;
    let listen = format!("127.0.0.1:{}", free_port()?);
    let (cert, key) = (certificate.certificate.to_string_lossy(), certificate.key.to_string_lossy());
    let kubeconfig = account.kubeconfig.to_string_lossy();
    let args = ["controller", "--webhook-listen", &listen, "--listen", health, "--tls-cert", &cert, "--tls-key", &key];
    let more = ["--kubeconfig", &kubeconfig, "--lease-namespace", "migvisor-system", "--log-level", "warn"];
    let process = plane.product("controller", &[&args[..], &more[..]].concat(), &[("KUBECONFIG", "/nonexistent")])?;
    let url: http::Uri = format!("http://{health}/readyz").parse()?;
    let is_ready = || async { Ok(get(&url).await.is_ok_and(|(status, _)| status == 200).then_some(())) };
    wait_for("the controller to be ready", PATIENCE, is_ready).await.with_context(|| process.log_tail(10))?;
    Ok(process)
}

/// The answer of a guest that writes a little, to every question, as agents would write it.
async fn answer(client: &Client) -> Result<()> {
    let all: Api<MigrationForecast> = Api::all(client.clone());
    let asked = all.list(&ListParams::default()).await?.items;
    let first = asked.first().context("nothing is asked")?;
    let samples = (0..512_u64).map(|at| Sample {
        page: at * 512,
        weight: 512.0,
        zero: false,
        writer: if at < 50 { Writer::Random { rate: 5e-5 } } else { Writer::Idle },
    });
    let pattern = Pattern::new(samples.collect(), Traces::default(), 12_000.0)?;
    ensure!(first.spec.guest_memory()?.0 == 1024 * MIB, "the pattern is of another size");
    let question = first.spec.question()?;
    let forecast = predict::forecast(&pattern, &question);
    let write = async |asked: &MigrationForecast| {
        let status = MigrationForecastStatus::from_forecast(&forecast, &question, &asked.question(), Timestamp::now());
        let name = asked.metadata.name.as_deref().unwrap_or_default();
        let body = json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": name }, "status": status,
        });
        let api: Api<MigrationForecast> =
            Api::namespaced(client.clone(), asked.metadata.namespace.as_deref().unwrap_or_default());
        let written = api.patch_status(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(body)).await;
        written.map(drop).with_context(|| format!("cannot answer {name}"))
    };
    stream::iter(&asked).map(write).buffer_unordered(AT_ONCE).try_collect::<Vec<_>>().await.map(drop)
}

/// What the controller's account has written so far, by the API server's own record; its Lease is not counted.
fn writes(plane: &ControlPlane) -> Result<usize> {
    let text = std::fs::read_to_string(plane.directory().join("audit.log")).context("cannot read the audit log")?;
    let writes = [r#""verb":"create""#, r#""verb":"update""#, r#""verb":"patch""#, r#""verb":"delete""#];
    let counts = |line: &&str| writes.iter().any(|verb| line.contains(verb)) && !line.contains(r#""resource":"leases""#);
    Ok(text.lines().filter(|line| line.contains("migvisor-controller")).filter(counts).count())
}

/// Resident memory now and at most.
fn memory(process: &Process) -> Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    let of = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().map_or(0, |kib| kib / 1024)
    };
    Ok(format!("{} MiB of memory, at most {} MiB", of("VmRSS:"), of("VmHWM:")))
}

/// CPU time so far, seconds.
fn cpu(process: &Process) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id()))?;
    let fields: Vec<_> = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let ticks: u64 = fields.get(11..13).unwrap_or_default().iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    // Clock ticks are hundredths of a second on Linux.
    Ok(ticks as f64 / 100.0)
}
