//! How long admission takes: the real routes over real TLS, 10 000 VMs in memory, 500 requests a second for 10 s.
//!
//! An open loop: a request is due at its time whether or not those before it were answered, and its latency counts from then on, so that
//! a stall is seen by everybody who came meanwhile. It has no place in a closed loop such as criterion's. Prints the quantiles and fails
//! where the 99th percentile is over the goal.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{process::ExitCode, sync::Arc, time::Duration};

use axum::http;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher::Event;
use migvisor::{
    api::MigrationForecastSpec,
    manager::{index::Sink, knowledge::Knowledge},
    runtime::{shutdown::Shutdown, tls::TlsServer},
    webhook::{Admission, AdmissionMetrics, router},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

const VMS: u32 = 10_000;
const PER_SECOND: u32 = 500;
const SECONDS: u32 = 10;
/// The API server keeps few connections; each gets every so manieth request.
const CONNECTIONS: usize = 8;
const GOAL: Duration = Duration::from_millis(10);

fn fill<S: Sink>(sink: &mut S, objects: impl IntoIterator<Item = Value>)
where
    S::Kind: DeserializeOwned,
{
    sink.apply_watcher_event(&Event::Init);
    for object in objects {
        sink.apply_watcher_event(&Event::InitApply(serde_json::from_value(object).unwrap()));
    }
    sink.apply_watcher_event(&Event::InitDone);
}

/// Ten thousand VMs, half of which would fail, under a policy that enforces; each has been migrated twice before.
fn knowledge() -> Knowledge {
    let (knowledge, mut feeds) = Knowledge::new();
    let vmi = |i: u32| {
        json!({
            "metadata": { "name": format!("vm-{i}"), "namespace": "shop", "uid": format!("uid-{i}"), "labels": { "app": "db" } },
            "spec": { "domain": { "memory": { "guest": "1Gi" } } },
            "status": { "phase": "Running", "nodeName": "node-1", "activePods": { format!("pod-{i}"): "node-1" } }
        })
    };
    fill(&mut feeds.vmis, (0..VMS).map(vmi));
    fill(
        &mut feeds.migrations,
        (0..2 * VMS).map(|i| {
            json!({
                "metadata": { "name": format!("old-{i}"), "namespace": "shop", "uid": format!("old-{i}") },
                "spec": { "vmiName": format!("vm-{}", i / 2) }, "status": { "phase": "Succeeded" }
            })
        }),
    );
    let migrations = json!({ "bandwidthPerMigration": "100Mi", "completionTimeoutPerGiB": 20 });
    fill(
        &mut feeds.kubevirts,
        [json!({
            "metadata": { "name": "kubevirt", "namespace": "kubevirt" }, "spec": { "configuration": { "migrations": migrations } }
        })],
    );
    fill(&mut feeds.namespaces, [json!({ "metadata": { "name": "shop", "labels": { "team": "a" } } })]);
    fill(&mut feeds.migration_policies, []);
    fill(
        &mut feeds.policies,
        (0..20).map(|i| {
            json!({
                "metadata": { "name": format!("policy-{i}") },
                "spec": { "selectors": { "namespaceSelector": { "team": if i == 0 { "a" } else { "b" } } }, "mode": "Enforce" }
            })
        }),
    );
    let now = Timestamp::now().to_string();
    let forecast = |i: u32| {
        let fails = i.is_multiple_of(2);
        let duration = |ms: u32| format!("{ms}ms");
        let spec = json!({
            "nodeName": "node-1", "podUID": format!("pod-{i}"), "guestMemory": "1Gi", "bandwidth": "100Mi",
            "bandwidthSource": "MigrationConfiguration", "downtimeLimit": "300ms", "timeBudget": "40s", "policy": "policy-0"
        });
        let question = serde_json::from_value::<MigrationForecastSpec>(spec.clone()).unwrap().fingerprint();
        json!({
            "metadata": { "name": format!("vm-{i}"), "namespace": "shop", "generation": 3 },
            "spec": spec,
            "status": {
                "question": question, "observedGeneration": 3, "measuredAt": now, "verdict": if fails { "Fails" } else { "Converges" },
                "reason": if fails { "BudgetExceeded" } else { "WithinBudget" }, "probability": if fails { 0.0 } else { 1.0 },
                "method": "PC", "iterations": 9, "convergenceTime": "12s", "totalTime": "12s", "downtime": "250ms",
                "dirtiedPages": 1_000_000, "transferredBytes": 4_194_304_000_u64, "leastConvergentBandwidth": "180Mi",
                "profile": (1..=16_u32).map(|i| json!({
                    "bandwidth": format!("{}Mi", i * 20), "probability": 0.5, "totalTime": duration(i * 1000), "iterations": i,
                    "dirtiedPages": i * 1000
                })).collect::<Vec<_>>(),
                "curve": (1..=32_u32).map(|i| json!({ "window": duration(i * 100), "pages": i * 500 })).collect::<Vec<_>>()
            }
        })
    };
    fill(&mut feeds.forecasts, (0..VMS).map(forecast));
    knowledge
}

fn review(i: u32) -> Vec<u8> {
    let kind = json!({ "group": "kubevirt.io", "version": "v1", "kind": "VirtualMachineInstanceMigration" });
    let resource = json!({ "group": "kubevirt.io", "version": "v1", "resource": "virtualmachineinstancemigrations" });
    let object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": { "generateName": "kubevirt-migrate-vm-", "namespace": "shop", "annotations": { "migvisor.io/verdict": "Converges" } },
        "spec": { "vmiName": format!("vm-{}", i % VMS) }
    });
    serde_json::to_vec(&json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": format!("review-{i}"), "kind": kind, "resource": resource, "requestKind": kind, "requestResource": resource,
            "name": "", "namespace": "shop", "operation": "CREATE", "userInfo": { "username": "ann", "groups": ["system:authenticated"] },
            "object": object, "oldObject": null, "dryRun": false
        }
    }))
    .unwrap()
}

/// The server, and clients that trust it.
async fn serve(directory: &std::path::Path, shutdown: Shutdown) -> Vec<kube::Client> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let (cert_file, key_file) = (directory.join("tls.crt"), directory.join("tls.key"));
    std::fs::write(&cert_file, certificate.pem()).unwrap();
    std::fs::write(&key_file, key.serialize_pem()).unwrap();

    let server = TlsServer::bind("127.0.0.1:0".parse().unwrap(), cert_file, key_file).await.unwrap();
    let url = format!("https://{}", server.local_addr());
    let admission = Admission::new(knowledge(), AdmissionMetrics::new().unwrap());
    tokio::spawn(server.run(router(admission), shutdown));
    (0..CONNECTIONS)
        .map(|_| {
            let mut config = kube::Config::new(url.parse().unwrap());
            config.root_cert = Some(vec![authority.der().to_vec()]);
            kube::Client::try_from(config).unwrap()
        })
        .collect()
}

async fn ask(client: &kube::Client, i: u32) -> usize {
    let path = if i.is_multiple_of(2) { "/mutate-vmim" } else { "/validate-vmim" };
    // Every VM comes to both: the pair of a creation asks about one.
    let request = http::Request::post(path).header("content-type", "application/json").body(review(i / 2)).unwrap();
    let answer: Value = client.request(request).await.unwrap();
    assert_eq!(answer["response"]["uid"], format!("review-{}", i / 2), "{answer}");
    if i.is_multiple_of(2) {
        assert!(answer["response"]["patch"].is_string(), "{answer}");
    } else {
        assert_eq!(answer["response"]["allowed"], !(i / 2).is_multiple_of(2), "{answer}");
    }
    answer.to_string().len()
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let (_trigger, shutdown) = Shutdown::manual();
    let clients: Arc<[_]> = serve(directory.path(), shutdown).await.into();
    for client in clients.iter() {
        ask(client, 0).await;
    }
    let begin = Instant::now();
    let requests: Vec<_> = (0..PER_SECOND * SECONDS)
        .map(|i| {
            let clients = Arc::clone(&clients);
            tokio::spawn(async move {
                let due = begin + Duration::from_secs(1) * i / PER_SECOND;
                sleep_until(due).await;
                ask(&clients[i as usize % CONNECTIONS], i).await;
                due.elapsed()
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for request in requests {
        latencies.push(request.await.unwrap());
    }
    latencies.sort_unstable();
    let at = |per_mille: usize| latencies[(latencies.len() * per_mille / 1000).min(latencies.len() - 1)];
    println!(
        "admission: {} requests at {PER_SECOND} a second, {VMS} VMs: p50 {:.2?}, p99 {:.2?}, max {:.2?} (goal: p99 within {GOAL:?})",
        latencies.len(),
        at(500),
        at(990),
        at(1000)
    );
    if at(990) <= GOAL { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
