//! The control plane, under test itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::{Api, ResourceExt, api::DeleteParams};
use migvisor_e2e::{
    cluster::{ControlPlane, Process, free_port, wait_for},
    kubevirt::{
        install_crds,
        objects::{self, create_node, vmim_manifest},
    },
    process,
};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_control_plane_starts_serves_and_ends() {
    let plane = ControlPlane::start().await.unwrap();
    let directory = plane.directory().to_owned();
    let version = plane.kubectl(&["version", "-o", "json"], "").await.unwrap().ok().unwrap();
    let version: Value = serde_json::from_str(&version).unwrap();
    assert_eq!(version["serverVersion"]["gitVersion"], version["clientVersion"]["gitVersion"], "both from the same pins");

    // RBAC is on: nobody in particular may do nothing.
    let stranger = plane.kubeconfig_of("somebody", None).unwrap();
    let asked = plane.kubectl(&["get", "nodes", "--kubeconfig", stranger.to_str().unwrap()], "").await.unwrap();
    assert!(asked.stderr.contains("cannot list resource \"nodes\""), "{}", asked.stderr);

    // It goes away and comes back with what it knew.
    let namespace = plane.namespace("survives").await.unwrap();
    plane.restart_api_server().await.unwrap();
    assert!(plane.kubectl(&["get", "namespace", &namespace], "").await.unwrap().success);

    drop(plane);
    assert!(!directory.exists());
    let named = directory.to_str().unwrap().as_bytes();
    let left = std::fs::read_dir("/proc").unwrap().flatten().find(|process| {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        command.windows(named.len()).any(|window| window == named)
    });
    assert!(left.is_none(), "left running: {left:?}");
}

#[tokio::test]
async fn a_whole_cluster_schedules_runs_and_collects() {
    let start = std::time::Instant::now();
    let plane = ControlPlane::start_whole().await.unwrap();
    let client = plane.client().unwrap();
    create_node(&client, "node-a").await.unwrap();
    plane.nodes_are_ready(&["node-a"]).await.unwrap();
    println!("a whole cluster with a node is ready after {:.1} s", start.elapsed().as_secs_f64());

    let namespace = plane.namespace("whole").await.unwrap();
    let (maps, pods): (Api<ConfigMap>, Api<Pod>) =
        (Api::namespaced(client.clone(), &namespace), Api::namespaced(client.clone(), &namespace));
    plane.kubectl(&["create", "configmap", "owner", "-n", &namespace], "").await.unwrap().ok().unwrap();
    let owner = maps.get("owner").await.unwrap().uid().unwrap();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": namespace, "name": "owned", "ownerReferences":
            [{ "apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner }] },
        "spec": { "containers": [{ "name": "c", "image": "i", "resources": { "limits": { "devices.kubevirt.io/kvm": "1" } } }] },
    });
    plane.accepts(&pod.to_string()).await.unwrap();
    let runs = async || Ok(pods.get("owned").await?.status.filter(|it| it.phase.as_deref() == Some("Running")).map(drop));
    plane.wait(&namespace, "the pod to run", LONG, runs).await.unwrap();
    let spec = pods.get("owned").await.unwrap().spec.unwrap();
    assert_eq!((spec.node_name.as_deref(), spec.service_account_name.as_deref()), (Some("node-a"), Some("default")));

    maps.delete("owner", &DeleteParams::default()).await.unwrap();
    let gone = async || Ok(pods.get_opt("owned").await?.is_none().then_some(()));
    plane.wait(&namespace, "the owned pod to be collected", LONG, gone).await.unwrap();

    // It all goes on when the API server comes back, and a namespace goes with what is in it.
    plane.restart_api_server().await.unwrap();
    plane.kubectl(&["create", "configmap", "more", "-n", &namespace], "").await.unwrap().ok().unwrap();
    plane.kubectl(&["delete", "namespace", &namespace, "--timeout=30s"], "").await.unwrap().ok().unwrap();
}

#[test]
fn what_a_test_starts_outlives_its_thread_but_not_its_guard() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("sleep.log");
    let mut sleeper = std::thread::spawn(move || Process::start("sleep", sleep(), log).unwrap()).join().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(sleeper.exited(), None, "it ended with the thread that asked for it");
    let proc = PathBuf::from(format!("/proc/{}", sleeper.id()));
    drop(sleeper);
    assert!(!proc.exists());
}

fn sleep() -> std::process::Command {
    let mut command = process::dying_with_us("sleep");
    command.arg("600");
    command
}

/// Runs itself as a victim, kills it outright, and looks for what it had started.
#[test]
fn a_test_killed_outright_leaves_no_process() {
    const VICTIM: &str = "MIGVISOR_E2E_VICTIM";
    if let Some(folder) = std::env::var_os(VICTIM).map(PathBuf::from) {
        let sleeper = Process::start("sleep", sleep(), folder.join("sleep.log")).unwrap();
        std::fs::write(folder.join("new"), sleeper.id().to_string()).unwrap();
        std::fs::rename(folder.join("new"), folder.join("pid")).unwrap();
        std::thread::sleep(Duration::from_secs(600));
    }
    let folder = tempfile::tempdir().unwrap();
    let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_test_killed_outright_leaves_no_process"])
        .env(VICTIM, folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let until = |what: &dyn Fn() -> bool| (0..100).any(|_| what() || (std::thread::sleep(Duration::from_millis(50)), false).1);
    assert!(until(&|| folder.path().join("pid").exists()), "the victim started nothing");
    let proc = Path::new("/proc").join(std::fs::read_to_string(folder.path().join("pid")).unwrap());
    assert!(proc.exists());
    victim.kill().unwrap();
    victim.wait().unwrap();
    // A zombie, where nobody adopts orphans, is no process any more.
    let gone = || std::fs::read_to_string(proc.join("stat")).map_or(true, |stat| stat.contains(") Z "));
    assert!(until(&gone), "{} is left running", proc.display());
}

#[tokio::test]
async fn the_api_server_calls_the_webhooks() {
    // A control plane of its own: everybody's migrations pass through them.
    let plane = ControlPlane::start().await.unwrap();
    let client = plane.client().unwrap();
    install_crds(&client).await.unwrap();
    let namespace = plane.namespace("webhooks").await.unwrap();
    let (certificate, port) = (plane.webhook_certificate().unwrap(), free_port().unwrap());
    plane.install_webhooks(port, &certificate.authority).await.unwrap();
    let vmim = |name: &str, version: &str| {
        let mut manifest = vmim_manifest(&namespace, name, "vm1");
        manifest["apiVersion"] = json!(format!("kubevirt.io/{version}"));
        manifest.to_string()
    };
    plane.accepts(&vmim("nobody-there", "v1")).await.expect("an absent webhook hinders nobody");

    let answer = |verdict: fn(Value) -> Value| {
        axum::routing::post(async move |axum::Json(review): axum::Json<Value>| {
            assert_eq!(
                review["request"]["object"]["apiVersion"], "kubevirt.io/v1",
                "converted to the version that was asked for"
            );
            let mut response = verdict(review["request"]["object"].clone());
            response["uid"] = review["request"]["uid"].clone();
            axum::Json(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
        })
    };
    let router = axum::Router::new()
        // [{"op":"add","path":"/metadata/annotations","value":{"migvisor.io/verdict":"Fails"}}]
        .route("/mutate-vmim", answer(|_| json!({ "allowed": true, "patchType": "JSONPatch", "patch":
            "W3sib3AiOiJhZGQiLCJwYXRoIjoiL21ldGFkYXRhL2Fubm90YXRpb25zIiwidmFsdWUiOnsibWlndmlzb3IuaW8vdmVyZGljdCI6IkZhaWxzIn19XQ==" })))
        .route("/validate-vmim", answer(|object| {
            let denied = object["metadata"]["name"] == "doomed";
            json!({ "allowed": !denied, "status": { "message": "it would never end" }, "warnings": ["it will take long"] })
        }));
    let tls = axum_server::tls_rustls::RustlsConfig::from_pem_file(&certificate.certificate, &certificate.key).await.unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let server = tokio::spawn(axum_server::bind_rustls(address, tls).serve(router.into_make_service()));
    wait_for("the webhook to listen", LONG, async || Ok(tokio::net::TcpStream::connect(address).await.ok())).await.unwrap();

    let said = plane.accepts(&vmim("old", "v1alpha3")).await.unwrap();
    assert!(said.stderr.contains("Warning: it will take long"), "{}", said.stderr);
    let stored = objects::vmims(&client, &namespace).get("old").await.unwrap();
    assert_eq!(stored.annotations()["migvisor.io/verdict"], "Fails");
    let said = plane.rejects(&vmim("doomed", "v1"), "it would never end").await.unwrap();
    assert!(said.contains("admission webhook \"validate-vmim.migvisor.io\" denied the request"), "{said}");
    server.abort();
}
