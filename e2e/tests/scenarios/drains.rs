//! Migrations that nobody asked for by name: drains and workload updates. They are told, and never refused by surprise.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams},
};
use migvisor::{
    api::names::{annotation, kubevirt},
    model::forecast::Verdict,
};
use migvisor_e2e::scenario::{Load, Scene, VMI};
use serde_json::{Value, json};

/// `kubectl drain` of a node with a VM that no pre-copy can move ends, where KubeVirt is told to get it through.
pub(crate) async fn a_node_with_a_wild_vm_is_evacuated(scene: &Scene<'_>) -> Result<()> {
    const DRAIN: Duration = Duration::from_secs(180);
    scene.policy("Enforce").await?;
    scene.change_migrations(&json!({ "allowWorkloadDisruption": true })).await?;
    for (vm, load) in [("calm", Load::Calm), ("wild", Load::Wild)] {
        scene.vm(vm, load).await?;
    }
    scene.answered("calm", Verdict::Converges).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let node = scene.vmi("wild").await?["status"]["nodeName"].as_str().context("it runs nowhere")?.to_owned();
    scene.at_the_end(&["uncordon", &node]);
    let drain =
        ["drain", &node, "--pod-selector=kubevirt.io=virt-launcher", "--delete-emptydir-data", "--force", "--timeout=170s"];
    let drained = scene.cluster.kubectl().run_within(DRAIN, &drain, "").await?;
    let words = format!("Eviction triggered evacuation of VMI \"{}/wild\"", scene.namespace);
    ensure!(drained.stderr.contains(&words) || drained.stdout.contains(&words), "{drained:?}");
    drained.ok()?;
    for vm in ["calm", "wild"] {
        let now = scene.vmi(vm).await?["status"]["nodeName"].clone();
        ensure!(now != json!(node), "{vm} is still there");
    }
    let made = one(scene, "wild", "kubevirt-evacuation-").await?;
    warned_of(scene, &made).await
}

/// A VM whose launcher is outdated is migrated by KubeVirt itself: let through, and told.
pub(crate) async fn a_workload_update_is_let_through(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    scene.patch("vmi", "wild", &json!({ "status": { "launcherContainerImageVersion": "virt-launcher:0.0.1" } })).await?;
    let made = one(scene, "wild", "kubevirt-workload-update-").await?;
    ensure!(made.annotations().get(annotation::ORIGIN).is_some_and(|it| it == "WorkloadUpdate"), "{:?}", made.annotations());
    warned_of(scene, &made).await
}

/// A migration that says it is a drain's is believed of KubeVirt, and of nobody else.
pub(crate) async fn only_kubevirt_is_believed_that_it_drains(scene: &Scene<'_>) -> Result<()> {
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let theirs = scene.rehearse_as_kubevirt(&evacuation(scene)).await?;
    ensure!(theirs.success && theirs.stderr.contains("Warning: migvisor forecasts"), "{theirs:?}");
    let somebodys = scene.rehearse(&evacuation(scene)).await?;
    ensure!(!somebodys.success && somebodys.stderr.contains("denied the request: migvisor forecasts"), "{somebodys:?}");
    Ok(())
}

/// Where evacuations are denied KubeVirt's is refused, each time in the same words, and nothing that we do makes it ask sooner than
/// it would by itself.
pub(crate) async fn a_denied_evacuation_is_refused_and_stays_quiet(scene: &Scene<'_>) -> Result<()> {
    /// KubeVirt asks again after 5 ms, 10 ms, 20 ms, and so on, to 10 s.
    const BURST: Duration = Duration::from_secs(11);
    const WHILE: Duration = Duration::from_secs(11);
    /// Once or twice by itself meanwhile, and when something else of the node changes.
    const MOST: u64 = 5;
    let spec = json!({ "mode": "Enforce", "evacuations": "Deny" });
    scene.prediction_policy("policy", &json!({}), spec).await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let words = refusal(scene).await?;
    evict(scene, "wild").await?;
    let (note, _) = scene.event("FailedCreate", VMI, "wild").await?;
    ensure!(note.contains("Error creating a Migration") && note.contains("denied the request: migvisor forecasts"), "{note}");

    tokio::time::sleep(BURST).await;
    let before = scene.times("FailedCreate", VMI, "wild").await?;
    tokio::time::sleep(WHILE).await;
    let asked = scene.times("FailedCreate", VMI, "wild").await?.saturating_sub(before);
    println!("refused {before} times within {BURST:?} or so, and {asked} times in the next {WHILE:?}");
    ensure!(asked <= MOST, "KubeVirt asked {asked} times in {WHILE:?}");
    ensure!(scene.vmims().await?.is_empty(), "a migration was made");
    ensure!(refusal(scene).await? == words, "it is refused in other words now");
    // Whatever is written of the VM has KubeVirt ask at once.
    let vmi = scene.vmi("wild").await?;
    let writers = vmi["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let ours = |field: &Value| field["manager"].as_str().is_some_and(|manager| manager.starts_with("migvisor"));
    ensure!(!writers.iter().any(ours), "we wrote the VM: {writers:?}");
    ensure!(scene.times("MigrationWouldFail", VMI, "wild").await? == 1, "it is told again and again that it would fail");
    ensure!(scene.events("MigrationAbandoned", VMI, "wild").await?.is_empty(), "there was nothing to abandon");
    // It still runs where it was, and somebody can let it go: KubeVirt is told, and asks at once.
    let by = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationOverride",
        "metadata": { "name": "let-it-go", "namespace": scene.namespace },
        "spec": { "vmiName": "wild", "reason": "the node has to go" },
    });
    scene.cluster.kubectl().accepts(&by.to_string()).await?;
    one(scene, "wild", "kubevirt-evacuation-").await.map(drop)
}

/// A migration of the wild VM such as a drain's.
fn evacuation(scene: &Scene<'_>) -> Value {
    scene.migration("rehearsal", "wild", &json!({ kubevirt::EVACUATION: "a-node" }))
}

/// In which words an evacuation of the wild VM is refused.
async fn refusal(scene: &Scene<'_>) -> Result<String> {
    let output = scene.rehearse_as_kubevirt(&evacuation(scene)).await?;
    ensure!(!output.success && output.stderr.contains("denied the request: migvisor forecasts"), "{output:?}");
    Ok(output.stderr)
}

/// Asks that the pod of a VM leaves its node, as a drain does; KubeVirt makes that an evacuation of the VM.
async fn evict(scene: &Scene<'_>, vm: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(scene.cluster.client()?, &scene.namespace);
    let launchers = ListParams::default().labels(&format!("{}={}", kubevirt::COMPONENT, kubevirt::LAUNCHER));
    let of_vm = |pod: &Pod| pod.annotations().get(kubevirt::DOMAIN).is_some_and(|domain| domain == vm);
    let pod = pods.list(&launchers).await?.items.into_iter().find(of_vm).context("it has no pod")?;
    // By kubectl: a client that waits and tries again where it is told to would do so for ever.
    let name = pod.name_any();
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": name, "namespace": scene.namespace },
    });
    let path = format!("/api/v1/namespaces/{}/pods/{name}/eviction", scene.namespace);
    let refused = scene.cluster.kubectl().run(&["create", "--raw", &path, "-f", "-"], &eviction.to_string()).await?.stderr;
    ensure!(refused.contains("Eviction triggered evacuation of VMI"), "{refused}");
    Ok(())
}

/// Waits for the migration of this VM that KubeVirt makes.
async fn one(scene: &Scene<'_>, vm: &str, prefix: &str) -> Result<DynamicObject> {
    let of_vm = |it: &DynamicObject| it.data["spec"]["vmiName"] == vm && it.name_any().starts_with(prefix);
    let probe = async || Ok(scene.vmims().await?.into_iter().find(of_vm));
    scene.until(&format!("a migration {prefix}… of {vm}"), Duration::from_secs(60), probe).await
}

async fn warned_of(scene: &Scene<'_>, vmim: &DynamicObject) -> Result<()> {
    let annotations = vmim.annotations();
    ensure!(annotations.get(annotation::VERDICT).is_some_and(|it| it == "Fails"), "{annotations:?}");
    let (note, kind) = scene.event("MigrationForecast", "VirtualMachineInstanceMigration", &vmim.name_any()).await?;
    ensure!(kind == "Warning" && note.contains("would fail"), "{kind}: {note}");
    Ok(())
}
