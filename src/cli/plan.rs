//! `migvisor plan`: which VMs to move, from a cluster's forecasts, without an object in the cluster.
//!
//! In: the objects that the controller watches, read once. Out: the status that a MigrationPlan would have.

use std::{
    fmt::{Debug, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, ValueEnum};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client, Resource,
    api::ListParams,
    core::DeserializeGuard,
    runtime::{reflector::store::Writer, watcher::Event},
};
use serde::de::DeserializeOwned;

use super::{exit, output::Format};
use crate::{
    api::{
        MigrationPlan, MigrationPlanSpec, MigrationPlanStatus,
        plan::{Candidate, Comparison, Free, Phase, Want},
        policy::Selectors,
        scalar::{Duration, Quantity},
    },
    manager::{Feeds, Knowledge, index::Sink, plan::survey},
    model::units::{Bytes, BytesPerSecond, MilliCpus},
    runtime::client,
};

/// Objects of a kind that are asked for at once.
const PAGE: u32 = 500;

/// Arguments of `migvisor plan`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").required(true).multiple(true).args(["node", "labels", "namespace_labels"])))]
pub struct PlanArgs {
    /// How to reach the API server; else $KUBECONFIG, ~/.kube/config or the pod's service account
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Only VMs on this node
    #[arg(long)]
    node: Option<String>,
    /// Only VMs with this label; may be given several times
    #[arg(short = 'l', long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Only VMs in namespaces with this label; may be given several times
    #[arg(long = "namespace-label", value_name = "KEY=VALUE", value_parser = label)]
    namespace_labels: Vec<(String, String)>,
    /// The cheapest VM, the cheapest set, or everything that can be moved
    #[arg(long, value_enum, default_value_t)]
    want: Wish,
    /// Memory of guests to be freed: 8Gi
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// Processors to be freed: 4, 500m
    #[arg(long, value_name = "N")]
    cpu: Option<MilliCpus>,
    /// What the link of each source node offers, in bytes per second: 1Gi. Default: what the forecasts know, or assume, of the line
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<BytesPerSecond>,
    /// No migration counts on more than this, in bytes per second
    #[arg(long, value_name = "RATE")]
    bandwidth_per_migration: Option<BytesPerSecond>,
    /// At most so many leave one node at the same time, within KubeVirt's limit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=16))]
    parallelism: Option<u64>,
    /// How the plan is written; JSON and YAML with the keys of a MigrationPlan's status
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Wish {
    /// The cheapest VM that frees enough.
    #[default]
    Cheapest,
    /// The cheapest set that frees enough.
    CheapestSet,
    /// Everything that can be moved.
    Everything,
}

fn label(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    pair.map(|(key, value)| (key.to_owned(), value.to_owned())).ok_or_else(|| "write KEY=VALUE".to_owned())
}

impl PlanArgs {
    fn spec(&self) -> anyhow::Result<MigrationPlanSpec> {
        let free = (self.memory.is_some() || self.cpu.is_some())
            .then(|| Free { memory: self.memory.map(Quantity::from), cpu: self.cpu.map(Quantity::from) });
        match self.want {
            Wish::CheapestSet if free.is_none() => {
                anyhow::bail!("--want cheapest-set: say what it has to free, by --memory or --cpu")
            }
            Wish::Everything if free.is_some() => {
                anyhow::bail!("--want everything: everything goes, whatever that frees; leave out --memory and --cpu")
            }
            _ => {}
        }
        let pairs = |pairs: &[(String, String)]| pairs.iter().cloned().collect();
        Ok(MigrationPlanSpec {
            source_node: self.node.clone(),
            selectors: Some(Selectors {
                namespace_selector: pairs(&self.namespace_labels),
                virtual_machine_instance_selector: pairs(&self.labels),
            }),
            want: match self.want {
                Wish::Cheapest => Want::Cheapest,
                Wish::CheapestSet => Want::CheapestSet,
                Wish::Everything => Want::Everything,
            },
            free,
            bandwidth: self.bandwidth.map(Quantity::from),
            bandwidth_per_migration: self.bandwidth_per_migration.map(Quantity::from),
            parallelism: self.parallelism,
            execute: false,
        })
    }
}

/// Prints the plan.
///
/// # Errors
/// The arguments contradict each other, the API server cannot be reached, or refuses to list what is needed.
pub async fn run(args: PlanArgs) -> anyhow::Result<ExitCode> {
    let plan = MigrationPlan::new("", args.spec()?);
    let client = client::connect(args.kubeconfig.as_deref()).await?;
    let knowledge = read(&client).await?;
    let feed = Writer::default();
    let nodes = feed.as_reader();
    fill(&client, feed).await?;
    let status = survey::made(&knowledge, &nodes.state(), &plan, Timestamp::now());
    super::print(&match args.output {
        Format::Table => table(&status),
        Format::Json => serde_json::to_string_pretty(&status)? + "\n",
        Format::Yaml => serde_yaml::to_string(&status)?,
    })?;
    Ok(ExitCode::from(if status.phase == Some(Phase::Planned) { exit::CONVERGES } else { exit::FAILS }))
}

/// Everything that a controller knows, read once.
async fn read(client: &Client) -> anyhow::Result<Knowledge> {
    let (knowledge, feeds) = Knowledge::new();
    // A plan asks neither what is let through nor what is held.
    let Feeds { vmis, migrations, forecasts, policies, overrides: _, pods: _, migration_policies, kubevirts, namespaces } = feeds;
    fill(client, vmis).await?;
    fill(client, migrations).await?;
    fill(client, forecasts).await?;
    fill(client, policies).await?;
    fill(client, migration_policies).await?;
    fill(client, kubevirts).await?;
    fill(client, namespaces).await?;
    Ok(knowledge)
}

/// One kind. What cannot be read counts as absent, as it does for the controller, and so does a kind that the cluster does not know.
async fn fill<S: Sink>(client: &Client, mut store: S) -> anyhow::Result<()>
where
    S::Kind: Debug + DeserializeOwned,
{
    let api: Api<DeserializeGuard<S::Kind>> = Api::all(client.clone());
    let mut parameters = ListParams::default().limit(PAGE);
    store.apply_watcher_event(&Event::Init);
    loop {
        let list = match api.list(&parameters).await {
            Ok(list) => list,
            Err(kube::Error::Api(status)) if status.code == 404 => break,
            Err(error) => return Err(error).with_context(|| format!("cannot list {}", S::Kind::plural(&()))),
        };
        for object in list.items.into_iter().filter_map(|guard| guard.0.ok()) {
            store.apply_watcher_event(&Event::InitApply(object));
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => break,
        }
    }
    store.apply_watcher_event(&Event::InitDone);
    Ok(())
}

/// For people: everybody who was looked at, then what would be done.
fn table(status: &MigrationPlanStatus) -> String {
    let mut out = String::new();
    let mut rows = vec![["STEP", "VM", "NODE", "MEMORY", "COST", "TOTAL", "DOWNTIME", "LCB", "WHY NOT"].map(str::to_owned)];
    let step = |candidate: &Candidate| {
        let steps = status.schedule.iter().flat_map(|schedule| &schedule.steps);
        let mut places =
            steps.zip(1_u32..).filter(|(step, _)| (&step.namespace, &step.name) == (&candidate.namespace, &candidate.name));
        places.next().map_or_else(|| "-".to_owned(), |(_, place)| place.to_string())
    };
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for candidate in &status.candidates {
        let eligible = candidate.rank.is_some();
        rows.push([
            step(candidate),
            format!("{}/{}", candidate.namespace, candidate.name),
            candidate.node.clone(),
            candidate.memory.0.clone(),
            dash(candidate.cost.map(|cost| format!("{cost:.3}"))),
            dash(candidate.total_time.filter(|_| eligible).map(Duration::human)),
            dash(candidate.downtime.map(Duration::human)),
            dash(candidate.least_convergent_bandwidth.as_ref().and_then(|rate| rate.rate().ok()).map(BytesPerSecond::human)),
            candidate.message.clone().unwrap_or_default(),
        ]);
    }
    let widths: Vec<usize> = (0..8)
        .map(|column| rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0))
        .collect();
    for row in &rows {
        let cells = row.iter().zip(widths.iter().chain([&0])).map(|(cell, width)| format!("{cell:<width$}"));
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", cells.collect::<Vec<_>>().join("   ").trim_end());
    }
    if let Some(omitted) = status.omitted {
        let _ = writeln!(out, "and {omitted} more");
    }
    let _ = writeln!(out, "\n{}", status.message.as_deref().unwrap_or_default());
    if let Some(schedule) = status.schedule.as_ref().filter(|schedule| schedule.steps.len() > 1) {
        let beside = |other: &Comparison| match other.failing {
            0 => other.makespan.human(),
            failing => format!("{}, and {failing} of them would fail", other.makespan.human()),
        };
        let _ = writeln!(out, "One by one: {}. All at once: {}.", beside(&schedule.one_by_one), beside(&schedule.all_at_once));
    }
    out
}
