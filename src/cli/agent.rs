//! `migvisor agent`: answers the `MigrationForecasts` of one node, for as long as it runs.
//!
//! In: the node's name, where its VMs are, a way to the API server. Out: answers, metrics, health.

use std::{net::SocketAddr, path::PathBuf};

use super::host::{self, HostError};
use crate::{
    agent::{
        self, Options,
        checkpoint::{Checkpoint, CheckpointError},
        locate::{Locate, LocateError, MeetingPlace, PodsDirectory, SocketDirectory},
    },
    api::scalar::Duration,
    collector::{LookOptions, SourceKind, Target},
    qemu::process::Processes,
    runtime::{
        client,
        health::{self, Readiness},
        metrics::Metrics,
        shutdown::Shutdown,
        telemetry::{self, LogArgs},
    },
};

/// The flags of `migvisor agent`.
#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("vms").args(["pods_dir", "qmp_dir"]).required(true))]
pub struct AgentArgs {
    /// Name of this node, as in the spec.nodeName of its pods
    #[arg(long, env = "NODE_NAME", value_name = "NAME", value_parser = node_name)]
    pub node: String,
    /// The kubelet's directory of pods, where each VM's libvirt is found (mount /var/lib/kubelet/pods there)
    #[arg(long, value_name = "DIR")]
    pub pods_dir: Option<PathBuf>,
    /// Directory of QMP sockets, one `<pod UID>.sock` for each VM: where there is no KubeVirt
    #[arg(long, value_name = "DIR")]
    pub qmp_dir: Option<PathBuf>,
    /// How to reach the API server; else $KUBECONFIG, ~/.kube/config or the pod's service account
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where to serve /metrics, /healthz and /readyz over HTTP
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9443")]
    pub listen: SocketAddr,
    /// How long one look at a VM takes, 1s to 60s
    #[arg(long, value_name = "DURATION", default_value = "12s", value_parser = between::<1, 60>)]
    pub look: Duration,
    /// How VMs are looked at; `page-sampling` and `dirty-bitmap` need neither the node's processes nor any right to look into them
    #[arg(long, value_enum, default_value_t = SourceKind::Auto)]
    pub source: SourceKind,
    /// How old a pattern gets before the VM is looked at again, 5s to 13m
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = between::<5, 780>)]
    pub refresh: Duration,
    /// CPU that the agent may use, in percent of one core, 0.1 to 100: many VMs are looked at more sparingly, and later
    #[arg(long, value_name = "PERCENT", default_value = "2", value_parser = percent)]
    pub cpu_budget: f64,
    /// Where patterns are kept over a restart of the agent; else they are not
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Where the Lease of the controller that leads lives: while nobody renews it, there are no dry runs
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE", default_value = "default")]
    pub lease_namespace: String,
    /// Constants of this host (YAML or JSON: lineRate, zeroPagesPerMs, setupMs, syncMs, completionMs), where a question names none
    #[arg(long, value_name = "FILE")]
    pub host: Option<PathBuf>,
    /// How long metrics and health still answer after SIGTERM
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = between::<0, 300>)]
    pub drain: Duration,
    /// What is logged, and how
    #[command(flatten)]
    pub log: LogArgs,
}

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentCommandError {
    /// The directory of VMs is none.
    #[error("{flag} {}: {why}; name the directory that holds {holds} for each VM", path.display())]
    Directory {
        /// Which was given.
        flag: &'static str,
        /// What it should hold.
        holds: &'static str,
        /// What was given.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The constants of the host cannot be used.
    #[error(transparent)]
    Host(#[from] HostError),
    /// No log.
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    /// No handler for signals.
    #[error("the kernel refused a signal handler: {0}")]
    Signals(#[source] std::io::Error),
    /// No client for the API server.
    #[error(transparent)]
    Client(#[from] client::ClientError),
    /// No metrics.
    #[error(transparent)]
    Metrics(#[from] crate::runtime::metrics::MetricsError),
    /// No place to keep patterns.
    #[error("--checkpoint: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// No metrics and health server.
    #[error(transparent)]
    Health(#[from] health::HealthError),
    /// The agent ended by itself.
    #[error(transparent)]
    Agent(#[from] agent::AgentError),
}

fn between<const LEAST: u64, const MOST: u64>(text: &str) -> Result<Duration, String> {
    let duration: Duration = text.parse().map_err(|error: crate::api::scalar::ParseDurationError| error.to_string())?;
    let range = std::time::Duration::from_secs(LEAST)..=std::time::Duration::from_secs(MOST);
    if range.contains(&duration.0) { Ok(duration) } else { Err(format!("it has to be between {LEAST}s and {MOST}s")) }
}

fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').parse() {
        Ok(percent) if (0.1..=100.0).contains(&percent) => Ok(percent),
        _ => Err("write a number between 0.1 and 100, such as 2 for two percent of a core".to_owned()),
    }
}

/// A node's name becomes a label value in the watch: at most 63 letters, digits, dashes and dots.
fn node_name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let bytes = text.as_bytes();
    if bytes.len() <= 63 && bytes.iter().copied().all(plain) && ends(bytes.first()) && ends(bytes.last()) {
        Ok(text.to_owned())
    } else {
        Err("a node's name has up to 63 lower-case letters, digits, dashes and dots".to_owned())
    }
}

/// Where VMs are looked for.
#[derive(Debug)]
enum Vms {
    Pods(PodsDirectory),
    Sockets(SocketDirectory),
}

impl Vms {
    fn new(args: &AgentArgs) -> Result<Self, AgentCommandError> {
        let (flag, holds, path) = match (&args.pods_dir, &args.qmp_dir) {
            (Some(path), _) => ("--pods-dir", "the <pod UID>/volumes", path),
            (None, Some(path)) => ("--qmp-dir", "one <pod UID>.sock", path),
            // The command line is judged before.
            (None, None) => ("--pods-dir", "the <pod UID>/volumes", &PathBuf::new()),
        };
        let wrong = |why: String| AgentCommandError::Directory { flag, holds, path: path.clone(), why };
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(wrong("it is no directory".to_owned())),
            Err(error) => return Err(wrong(error.to_string())),
        }
        Ok(match (&args.pods_dir, args.source) {
            (None, _) => Self::Sockets(SocketDirectory::new(path)),
            (Some(_), SourceKind::PageSampling | SourceKind::DirtyBitmap) => Self::Pods(PodsDirectory::without_processes(path)),
            (Some(_), SourceKind::Auto | SourceKind::Sampler) => Self::Pods(PodsDirectory::new(path, Processes::default())),
        })
    }
}

impl Locate for Vms {
    fn locate(&self, pod_uid: &str) -> Result<Target, LocateError> {
        match self {
            Self::Pods(pods) => pods.locate(pod_uid),
            Self::Sockets(sockets) => sockets.locate(pod_uid),
        }
    }

    fn meeting(&self, pod_uid: &str) -> Result<Option<MeetingPlace>, LocateError> {
        match self {
            Self::Pods(pods) => pods.meeting(pod_uid),
            Self::Sockets(sockets) => sockets.meeting(pod_uid),
        }
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(args: AgentArgs) -> Result<(), AgentCommandError> {
    let host = host::constants(args.host.as_deref())?;
    let vms = Vms::new(&args)?;
    telemetry::init(&args.log)?;
    let client = client::connect(args.kubeconfig.as_deref()).await?;
    let (trigger, shutdown) = Shutdown::on_signals(args.drain.0).map_err(AgentCommandError::Signals)?;
    let metrics = Metrics::new()?;
    let readiness = Readiness::new(shutdown.clone());
    let server = health::Server::bind(args.listen)?;
    tracing::info!(address = %server.local_addr(), "serving metrics and health");
    let look = LookOptions { duration: args.look.0, source: args.source, ..LookOptions::default() };
    let checkpoint = args.checkpoint.as_deref().map(Checkpoint::open).transpose()?;
    let options = Options {
        node: args.node,
        look,
        refresh: args.refresh.0,
        host,
        cpu: args.cpu_budget / 100.0,
        checkpoint,
        lease_namespace: args.lease_namespace,
    };
    let serving = server.run(metrics.clone(), readiness.clone(), shutdown.clone());
    let answers = async {
        let ended = agent::run(client, options, vms, &metrics, &readiness, shutdown).await;
        if ended.is_err() {
            // Nothing left to drain for.
            trigger.stop();
        }
        ended
    };
    let (health, agent) = tokio::join!(serving, answers);
    agent?;
    Ok(health?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: AgentArgs,
    }

    fn parse(more: &[&str]) -> Result<AgentArgs, String> {
        let all = ["agent", "--node", "n1", "--qmp-dir", "/run"].iter().chain(more);
        Command::try_parse_from(all).map(|command| command.args).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_judged() {
        let args = parse(&["--look", "500ms"]).unwrap_err();
        assert!(args.contains("between 1s and 60s"), "{args}");
        assert!(parse(&["--refresh", "1h"]).is_err() && parse(&["--node", "n 2"]).is_err() && parse(&["--node", "-"]).is_err());
        assert!(parse(&["--cpu-budget", "0"]).unwrap_err().contains("two percent"));
        assert!((parse(&["--cpu-budget", "5%"]).unwrap().cpu_budget - 5.0).abs() < 1e-9);
        let args = parse(&["--look", "3s", "--refresh", "45s"]).unwrap();
        assert_eq!((args.look.0.as_secs(), args.refresh.0.as_secs()), (3, 45));
    }

    #[tokio::test]
    async fn a_missing_directory_is_named_before_anything_starts() {
        for (flag, holds) in [("--qmp-dir", "<pod UID>.sock"), ("--pods-dir", "<pod UID>/volumes")] {
            let command = Command::try_parse_from(["agent", "--node", "n1", flag, "no/such/directory"]).unwrap();
            let error = run(command.args).await.unwrap_err().to_string();
            assert!(error.contains("no/such/directory") && error.contains(holds) && error.contains(flag), "{error}");
        }
    }

    #[test]
    fn vms_are_looked_for_in_one_place() {
        assert!(parse(&["--pods-dir", "/pods"]).unwrap_err().contains("cannot be used with"));
        assert!(Command::try_parse_from(["agent", "--node", "n1"]).is_err());
        for (source, sees) in [("auto", true), ("sampler", true), ("page-sampling", false), ("dirty-bitmap", false)] {
            let command = Command::try_parse_from(["agent", "--node", "n1", "--pods-dir", "/", "--source", source]).unwrap();
            let missing = Vms::new(&command.args).unwrap().locate("0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d");
            assert_eq!(missing.is_err(), sees, "{source}: {missing:?}");
        }
    }
}
