//! `migvisor controller`: keeps the questions, learns from outcomes, and serves admission.
//!
//! Every replica watches and answers admission from memory; the one that holds the Lease writes.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use crate::{
    api::{names, scalar::Duration},
    manager::{self, Knowledge, ManagerMetrics, Options},
    runtime::{
        client,
        health::{self, Readiness},
        lease::{self, LeaseOptions},
        metrics::{Metrics, MetricsError},
        shutdown::Shutdown,
        telemetry::{self, LogArgs},
        tls::{TlsError, TlsServer},
    },
    webhook::{self, Admission, AdmissionMetrics},
};

/// The flags of `migvisor controller`.
#[derive(Debug, Clone, Args)]
pub struct ControllerArgs {
    /// How to reach the API server; else $KUBECONFIG, ~/.kube/config or the pod's service account
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where to serve admission over HTTPS
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8443")]
    webhook_listen: SocketAddr,
    /// Serving certificate of the webhook, PEM; read again when it changes
    #[arg(long, value_name = "FILE")]
    tls_cert: PathBuf,
    /// Its key, PEM
    #[arg(long, value_name = "FILE")]
    tls_key: PathBuf,
    /// Where to serve /metrics, /healthz and /readyz over HTTP
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9442")]
    listen: SocketAddr,
    /// Who this replica is among the others: its pod's name. Default: a name of its own
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    identity: Option<String>,
    /// Where the Lease of the leader lives, and what it learns
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE", default_value = "default")]
    lease_namespace: String,
    /// The user that virt-controller is to the API server. Default: kubevirt-controller of the KubeVirt CR's namespace
    #[arg(long, value_name = "USER")]
    kubevirt_controller: Option<String>,
    /// How long admission still answers after SIGTERM, until no request is sent here any more
    #[arg(long, value_name = "DURATION", default_value = "3s")]
    drain: Duration,
    /// What is logged, and how
    #[command(flatten)]
    log: LogArgs,
}

/// Why the controller cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
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
    Metrics(#[from] MetricsError),
    /// No metrics and health server.
    #[error(transparent)]
    Health(#[from] health::HealthError),
    /// No admission.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A name that no other replica has: process ids are alike in containers, and two leaders of one name would both write.
fn unique_identity() -> String {
    use std::hash::{BuildHasher, RandomState};
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{:016x}", host.trim(), RandomState::new().hash_one(std::process::id()))
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(args: ControllerArgs) -> Result<(), ControllerError> {
    telemetry::init(&args.log)?;
    let client = client::connect(args.kubeconfig.as_deref()).await?;
    let (trigger, shutdown) = Shutdown::on_signals(args.drain.0).map_err(ControllerError::Signals)?;
    let readiness = Readiness::new(shutdown.clone());
    let metrics = Metrics::new()?;
    let manager_metrics = metrics.register(ManagerMetrics::new().map_err(MetricsError::from)?)?;
    let admission_metrics = metrics.register(AdmissionMetrics::new().map_err(MetricsError::from)?)?;

    let health = health::Server::bind(args.listen)?;
    let admission = TlsServer::bind(args.webhook_listen, args.tls_cert, args.tls_key).await?;
    tracing::info!(admission = %admission.local_addr(), health = %health.local_addr(), "serving");

    let identity = args.identity.unwrap_or_else(unique_identity);
    let namespace = args.lease_namespace;
    let lease = LeaseOptions::new(namespace.clone(), names::LEASE, identity.clone());
    let (leadership, election) = lease::elect(client.clone(), lease, shutdown.clone());

    let (knowledge, feeds) = Knowledge::new();
    let anyones = leadership.clone();
    let knowledge = knowledge.managed_while(move || anyones.is_anyones());
    let knowledge = match &args.kubevirt_controller {
        Some(user) => knowledge.with_kubevirt_as(user),
        None => knowledge,
    };
    let router = webhook::router(Admission::new(knowledge.clone(), admission_metrics));
    let watched = readiness.wait_for("the first listing of everything watched");
    let synced = {
        let (knowledge, shutdown) = (knowledge.clone(), shutdown.clone());
        async move {
            tokio::select! {
                () = knowledge.ready() => watched.set(true),
                () = shutdown.stopped() => {}
            }
        }
    };
    let options = Options { identity: Some(identity), namespace, ..Options::default() };
    let ending = {
        let shutdown = shutdown.clone();
        async move { shutdown.draining().await }
    };
    // Who leads lets go what is held: not before it can see that.
    let election = {
        let (knowledge, shutdown) = (knowledge.clone(), shutdown.clone());
        async move {
            tokio::select! {
                () = knowledge.ready() => election.await,
                () = shutdown.stopped() => {}
            }
        }
    };
    let managing = manager::run(client, options, knowledge, feeds, manager_metrics, move || leadership.is_leader(), ending);
    let serving = async {
        let ended = admission.run(router, shutdown.clone()).await;
        if ended.is_err() {
            // Without admission there is nothing to drain for.
            trigger.stop();
        }
        ended
    };
    let (health, admission, (), (), ()) =
        tokio::join!(health.run(metrics, readiness, shutdown.clone()), serving, managing, election, synced);
    admission?;
    Ok(health?)
}
