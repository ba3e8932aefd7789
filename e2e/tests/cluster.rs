//! The control plane and KubeVirt's stand-in, under test themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use migvisor::model::units::{Bandwidth, BytesPerSecond};
use migvisor_e2e::{
    cluster::{ControlPlane, Process, free_port, wait_for},
    kubevirt::{
        Job, KubeVirt, Mover, Order, Outcome,
        objects::{self, Side, create_node, install_crds, running_vmi, vmim_manifest},
    },
    process,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

const LONG: Duration = Duration::from_secs(20);

/// Takes this long, moves nothing, and hands every job's rules to the test.
struct Pretend {
    takes: Duration,
    jobs: mpsc::UnboundedSender<(String, Side, Side, Bandwidth, Option<Duration>)>,
}

impl Mover for Pretend {
    async fn migrate(&self, mut job: Job) -> Outcome {
        let said = (job.vmi.clone(), job.source.clone(), job.target.clone(), job.bandwidth, job.time_budget);
        self.jobs.send(said).ok();
        tokio::select! {
            () = tokio::time::sleep(self.takes) => Outcome::success(),
            order = job.next_order(Order::GoOn) => {
                assert_eq!(order, Order::Abort);
                Outcome::aborted()
            }
        }
    }
}

/// A shared control plane with KubeVirt's kinds, a namespace and a stand-in of its own.
struct Scene {
    plane: Arc<ControlPlane>,
    client: Client,
    namespace: String,
    jobs: mpsc::UnboundedReceiver<(String, Side, Side, Bandwidth, Option<Duration>)>,
    _kubevirt: KubeVirt,
}

impl Scene {
    async fn open(name: &str, takes: Duration) -> Self {
        let plane = ControlPlane::shared().await.unwrap();
        let client = plane.client().unwrap();
        install_crds(&client).await.unwrap();
        for node in ["node-a", "node-b"] {
            create_node(&client, node).await.unwrap();
        }
        let namespace = plane.namespace(name).await.unwrap();
        let (sender, jobs) = mpsc::unbounded_channel();
        let kubevirt = KubeVirt::start_in(client.clone(), &namespace, Pretend { takes, jobs: sender });
        Self { plane, client, namespace, jobs, _kubevirt: kubevirt }
    }

    async fn vmi(&self, name: &str) -> Side {
        running_vmi(&self.client, &self.namespace, name, "node-a", "1Gi").await.unwrap()
    }

    async fn migrate(&self, name: &str, vmi: &str) {
        let manifest = vmim_manifest(&self.namespace, name, vmi).to_string();
        self.plane.accepts(&manifest).await.unwrap();
    }

    async fn get_vmim(&self, name: &str) -> Option<Value> {
        let found = objects::vmims(&self.client, &self.namespace).get_opt(name).await.unwrap();
        found.map(|vmim| serde_json::to_value(vmim).unwrap())
    }

    async fn get_vmi(&self, name: &str) -> Value {
        serde_json::to_value(objects::vmis(&self.client, &self.namespace).get(name).await.unwrap()).unwrap()
    }

    /// Waits until the VMIM is in this phase.
    async fn reaches(&self, name: &str, phase: &str) -> Value {
        let what = format!("the migration {name} to be {phase}");
        let probe = async || Ok(self.get_vmim(name).await.filter(|vmim| vmim["status"]["phase"] == phase));
        self.plane.wait(&self.namespace, &what, LONG, probe).await.unwrap()
    }

    async fn target_pod(&self, migration: &Value) -> Option<k8s_openapi::api::core::v1::Pod> {
        let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let uid = migration["metadata"]["uid"].as_str().unwrap();
        let label = format!("kubevirt.io/migrationJobUID={uid}");
        pods.list(&kube::api::ListParams::default().labels(&label)).await.unwrap().items.into_iter().next()
    }
}

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

#[tokio::test]
async fn the_kinds_are_kubevirts() {
    let scene = Scene::open("kinds", Duration::ZERO).await;
    let (plane, namespace) = (&scene.plane, &scene.namespace);
    scene.vmi("vm1").await;

    // No status subresource on VMIs; one on VMIMs.
    let resources = plane.kubectl(&["get", "--raw", "/apis/kubevirt.io/v1"], "").await.unwrap().ok().unwrap();
    assert!(
        resources.contains("virtualmachineinstancemigrations/status") && !resources.contains("virtualmachineinstances/status")
    );
    let columns = plane.kubectl(&["get", "vmi,vmims", "-n", namespace, "-o", "wide"], "").await.unwrap().ok().unwrap();
    assert!(columns.contains("LIVE-MIGRATABLE") && columns.contains("node-a"), "{columns}");

    // Unknown fields stay, at every level; the spec does not change, known or unknown field.
    let manifest = format!(
        "apiVersion: kubevirt.io/v1alpha3\nkind: VirtualMachineInstanceMigration\nextra: 1\n\
         metadata: {{name: m1, namespace: {namespace}}}\nspec: {{vmiName: nothing, extra: {{deep: [2]}}}}\n"
    );
    plane.accepts(&manifest).await.unwrap();
    let stored = scene.get_vmim("m1").await.unwrap();
    assert_eq!((&stored["extra"], &stored["spec"]["extra"]["deep"][0]), (&json!(1), &json!(2)));
    for patch in [r#"{"spec":{"vmiName":"vm1"}}"#, r#"{"spec":{"extra":{"deep":[3]}}}"#] {
        let patched = plane.kubectl(&["patch", "vmim", "m1", "-n", namespace, "--type=merge", "-p", patch], "").await.unwrap();
        assert!(patched.stderr.contains("spec is restricted"), "{patch}: {}{}", patched.stdout, patched.stderr);
    }
    let annotate = plane.kubectl(&["annotate", "vmim", "m1", "-n", namespace, "a=b"], "").await.unwrap();
    assert!(annotate.success, "annotations are free: {}", annotate.stderr);
    plane.rejects(&manifest.replace("vmiName: nothing", "priority: urgent"), "Unsupported value: \"urgent\"").await.unwrap();

    // What virt-api would have refused.
    let refused = scene.reaches("m1", "Failed").await;
    assert_eq!(refused["status"]["migrationState"]["failureReason"], "VirtualMachineInstance nothing not found");
}

#[tokio::test]
async fn a_migration_walks_through_all_its_phases() {
    let mut scene = Scene::open("walk", Duration::from_secs(1)).await;
    let source = scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    scene.reaches("m1", "Running").await;
    scene.migrate("m2", "vm1").await;
    let done = scene.reaches("m1", "Succeeded").await;

    let phases: Vec<_> = done["status"]["phaseTransitionTimestamps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["phase"].as_str().unwrap())
        .collect();
    assert_eq!(phases, ["Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running", "Succeeded"]);
    assert_eq!(done["metadata"]["labels"]["kubevirt.io/vmi-name"], "vm1");
    let (vmi, from, to, bandwidth, budget) = scene.jobs.recv().await.unwrap();
    assert_eq!((vmi.as_str(), &from, to.node.as_str()), ("vm1", &source, "node-b"));
    assert_eq!((bandwidth, budget), (Bandwidth::Unlimited, Some(Duration::from_secs(300))));

    let vmi = scene.get_vmi("vm1").await;
    assert_eq!(vmi["status"]["nodeName"], "node-b");
    assert_eq!(vmi["metadata"]["labels"]["kubevirt.io/nodeName"], "node-b");
    assert_eq!(vmi["status"]["activePods"], json!({ to.pod_uid.as_str(): "node-b" }));
    let state = &vmi["status"]["migrationState"];
    assert_eq!(state, &done["status"]["migrationState"], "the VMIM keeps a copy");
    assert_eq!((&state["completed"], &state["migrationUid"]), (&json!(true), &done["metadata"]["uid"]));
    assert!(state["startTimestamp"].is_string() && state["endTimestamp"].is_string() && state["failed"].is_null());

    let second = scene.reaches("m2", "Failed").await;
    let reason = second["status"]["migrationState"]["failureReason"].as_str().unwrap();
    assert!(reason.contains("(m1) is already in progress"), "{reason}");
    // Final ones can be deleted at once.
    let vmims = objects::vmims(&scene.client, &scene.namespace);
    vmims.delete("m1", &DeleteParams::default()).await.unwrap();
    scene
        .plane
        .wait(&scene.namespace, "m1 to vanish", LONG, async || Ok(scene.get_vmim("m1").await.is_none().then_some(())))
        .await
        .unwrap();
}

/// Puts a gate on every target pod of one namespace, as a webhook would: by the API server itself.
async fn gate(plane: &ControlPlane, namespace: &str) {
    let name = format!("gate-{namespace}");
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [{
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingAdmissionPolicy",
            "metadata": { "name": name },
            "spec": {
                "matchConstraints": {
                    "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": namespace } },
                    "objectSelector": { "matchExpressions": [{ "key": "kubevirt.io/migrationJobUID", "operator": "Exists" }] },
                    "resourceRules": [{ "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"] }],
                },
                "failurePolicy": "Fail",
                "reinvocationPolicy": "Never",
                "mutations": [{ "patchType": "ApplyConfiguration", "applyConfiguration": { "expression":
                    "Object{spec: Object.spec{schedulingGates: [Object.spec.schedulingGates{name: 'migvisor.io/dry-run'}]}}" } }],
            },
        }, {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingAdmissionPolicyBinding",
            "metadata": { "name": name },
            "spec": { "policyName": name },
        }],
    });
    plane.accepts(&manifest.to_string()).await.unwrap();
}

/// A MigrationPolicy for one namespace and, within it, VMIs with these labels.
async fn policy(plane: &ControlPlane, name: &str, namespace: &str, labels: Value, fields: Value) {
    let mut manifest = json!({
        "apiVersion": "migrations.kubevirt.io/v1alpha1",
        "kind": "MigrationPolicy",
        "metadata": { "name": name },
        "spec": fields,
    });
    manifest["spec"]["selectors"] = json!({
        "namespaceSelector": { "kubernetes.io/metadata.name": namespace },
        "virtualMachineInstanceSelector": labels,
    });
    plane.accepts(&manifest.to_string()).await.unwrap();
}

#[tokio::test]
async fn a_gated_target_pod_holds_it_and_a_policy_posted_meanwhile_wins() {
    let mut scene = Scene::open("held", Duration::from_millis(100)).await;
    gate(&scene.plane, &scene.namespace).await;
    // The API server's own admission picks a new policy up after a moment.
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(scene.client.clone(), &scene.namespace);
    let trial = json!({ "metadata": { "name": "trial", "labels": { "kubevirt.io/migrationJobUID": "none" } },
        "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    let trial: k8s_openapi::api::core::v1::Pod = serde_json::from_value(trial).unwrap();
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let probe = async || Ok(pods.create(&dry, &trial).await?.spec.unwrap().scheduling_gates.map(drop));
    scene.plane.wait(&scene.namespace, "the gate to be in force", LONG, probe).await.unwrap();

    scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    let held = scene.reaches("m1", "Scheduling").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(scene.get_vmim("m1").await.unwrap()["status"]["phase"], "Scheduling", "it does not go on by itself");
    let pod = scene.target_pod(&held).await.unwrap();
    assert_eq!(pod.spec.as_ref().unwrap().node_name, None);
    let conditions = pod.status.as_ref().unwrap().conditions.clone().unwrap();
    assert_eq!(conditions[0].reason.as_deref(), Some("SchedulingGated"));

    // Held: a policy for this VMI alone, more specific than a person's.
    let namespace = &scene.namespace;
    let (person, ours) = (format!("person-{namespace}"), format!("ours-{namespace}"));
    let fields = |bandwidth| json!({ "bandwidthPerMigration": bandwidth, "completionTimeoutPerGiB": 7 });
    policy(&scene.plane, &person, namespace, json!({}), fields("64Mi")).await;
    policy(&scene.plane, &ours, namespace, json!({ "migvisor.io/forced": "m1" }), fields("32Mi")).await;
    let label = Patch::Merge(json!({ "metadata": { "labels": { "migvisor.io/forced": "m1" } } }));
    objects::vmis(&scene.client, namespace).patch("vm1", &PatchParams::default(), &label).await.unwrap();
    let release = Patch::Merge(json!({ "spec": { "schedulingGates": null } }));
    pods.patch(&pod.name_any(), &PatchParams::default(), &release).await.unwrap();

    let done = scene.reaches("m1", "Succeeded").await;
    let state = &done["status"]["migrationState"];
    assert_eq!(state["migrationPolicyName"], ours);
    assert_eq!(state["migrationConfiguration"]["bandwidthPerMigration"], "32Mi");
    let (_, _, _, bandwidth, budget) = scene.jobs.recv().await.unwrap();
    assert_eq!((bandwidth, budget), (Bandwidth::Capped(BytesPerSecond(32 << 20)), Some(Duration::from_secs(14))));
}

#[tokio::test]
async fn deleting_it_while_scheduling_cancels_it() {
    let mut scene = Scene::open("cancel", Duration::from_millis(100)).await;
    scene.vmi("vm1").await;
    // No node has this label: the target pod stays unscheduled.
    let mut manifest = vmim_manifest(&scene.namespace, "m1", "vm1");
    manifest["spec"]["addedNodeSelector"] = json!({ "nobody": "has this" });
    scene.plane.accepts(&manifest.to_string()).await.unwrap();
    let held = scene.reaches("m1", "Scheduling").await;
    assert!(scene.target_pod(&held).await.is_some());
    objects::vmims(&scene.client, &scene.namespace).delete("m1", &DeleteParams::default()).await.unwrap();
    scene
        .plane
        .wait(&scene.namespace, "m1 to vanish", LONG, async || Ok(scene.get_vmim("m1").await.is_none().then_some(())))
        .await
        .unwrap();
    assert!(scene.target_pod(&held).await.is_none(), "its pod goes with it");
    assert_eq!(scene.get_vmi("vm1").await["status"]["nodeName"], "node-a");
    assert!(scene.jobs.try_recv().is_err(), "nobody was asked to move anything");

    // The VMI can be moved afterwards; of what has ended, KubeVirt keeps five.
    for round in 2..8 {
        scene.migrate(&format!("m{round}"), "vm1").await;
        scene.reaches(&format!("m{round}"), "Succeeded").await;
    }
    scene
        .plane
        .wait(&scene.namespace, "m2 to vanish", LONG, async || Ok(scene.get_vmim("m2").await.is_none().then_some(())))
        .await
        .unwrap();
    assert!(scene.get_vmim("m3").await.is_some());
}

#[tokio::test]
async fn deleting_it_while_running_and_the_budget_both_abort() {
    let mut scene = Scene::open("abort", Duration::from_secs(600)).await;
    scene.vmi("vm1").await;
    scene.migrate("m1", "vm1").await;
    scene.reaches("m1", "Running").await;
    scene.jobs.recv().await.unwrap();
    objects::vmims(&scene.client, &scene.namespace).delete("m1", &DeleteParams::default()).await.unwrap();
    scene
        .plane
        .wait(&scene.namespace, "m1 to vanish", LONG, async || Ok(scene.get_vmim("m1").await.is_none().then_some(())))
        .await
        .unwrap();
    let state = scene.get_vmi("vm1").await["status"]["migrationState"].clone();
    assert_eq!(
        (&state["failed"], &state["abortRequested"], &state["abortStatus"]),
        (&json!(true), &json!(true), &json!("Succeeded"))
    );

    // 1 s per decimal gigabyte of a guest of 1 GiB: KubeVirt gives up after 2 s, seen once 3 whole ones have passed.
    let name = format!("short-{}", scene.namespace);
    policy(&scene.plane, &name, &scene.namespace, json!({}), json!({ "completionTimeoutPerGiB": 1 })).await;
    scene.migrate("m2", "vm1").await;
    let failed = scene.reaches("m2", "Failed").await;
    let state = &failed["status"]["migrationState"];
    assert_eq!(state["failureReason"], "Live migration has been aborted");
    assert!(state["abortRequested"].is_null(), "nobody asked for it");
    let vmi = scene.get_vmi("vm1").await;
    assert_eq!((&vmi["status"]["nodeName"], vmi["status"]["activePods"].as_object().unwrap().len()), (&json!("node-a"), 1));
}

#[tokio::test]
async fn at_most_two_leave_a_node_at_a_time() {
    let mut scene = Scene::open("queue", Duration::from_secs(1)).await;
    for vm in ["vm1", "vm2", "vm3"] {
        scene.vmi(vm).await;
        scene.migrate(vm, vm).await;
    }
    let mut moving = Vec::new();
    for _ in 0..2 {
        moving.push(scene.jobs.recv().await.unwrap().0);
    }
    let waiting = ["vm1", "vm2", "vm3"].into_iter().find(|vm| !moving.contains(&(*vm).to_owned())).unwrap();
    assert_eq!(
        scene.reaches(waiting, "Pending").await["status"]["migrationState"]["sourcePod"],
        format!("virt-launcher-{waiting}")
    );
    scene.reaches(waiting, "Succeeded").await;
}
