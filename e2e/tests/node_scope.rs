//! Who may do what: `config/base` in a real API server, agents with their real bound tokens, and agent and controller at work with no more
//! rights than it gives them. What they did, by the API server's own record, is exactly what its rules allow: one rule less or one more fails.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::{NAMESPACE, SOON, event_in};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use migvisor::{
    api::{
        MigrationForecast, MigrationForecastSpec, MigrationForecastStatus,
        dry_run::{DryRunPhase, DryRunStatus},
        names::{AGENT, AGENT_DRY_RUN, AGENT_MIGRATION, MANAGER, NODE_LABEL, PLAN_LABEL, hint, reason},
    },
    model::forecast::Verdict,
};
use migvisor_e2e::{
    cluster::{ControlPlane, Process, account::Account, free_port, wait_for},
    kubevirt::{
        install_crds,
        objects::{create_node, vmims, vmis},
        running_vmi, vmim_manifest,
    },
    world::get,
};
use serde_json::{Value, json};

const NODES: [&str; 2] = ["node-a", "node-b"];

/// A control plane with KubeVirt's kinds, two nodes, and what we install.
async fn cluster() -> Result<ControlPlane> {
    let plane = ControlPlane::start().await?;
    let client = plane.client()?;
    install_crds(&client).await?;
    for node in NODES {
        create_node(&client, node).await?;
    }
    plane.install_base().await?;
    Ok(plane)
}

fn question(node: &str) -> Result<MigrationForecastSpec> {
    Ok(serde_json::from_value(json!({
        "nodeName": node, "podUID": "pod-1", "guestMemory": "512Mi", "bandwidth": "64Mi", "bandwidthSource": "MigrationConfiguration",
        "downtimeLimit": "300ms", "timeBudget": "20s"
    }))?)
}

/// Somebody's server-side apply to the status of a forecast.
async fn apply(client: &Client, manager: &str, name: &str, status: Value) -> kube::Result<MigrationForecast> {
    let api: Api<MigrationForecast> = Api::namespaced(client.clone(), NAMESPACE);
    let body = json!({ "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": name }, "status": status });
    api.patch_status(name, &PatchParams::apply(manager).force(), &Patch::Apply(body)).await
}

fn refused<T>(result: kube::Result<T>, words: &str) -> Result<()> {
    match result {
        Ok(_) => bail!("it should have been refused: {words}"),
        Err(kube::Error::Api(status)) => {
            ensure!(status.code == 403 && status.message.contains(words), "{status:?} does not say {words:?}");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

#[tokio::test]
async fn an_agent_writes_the_status_of_its_own_nodes_forecasts_and_nothing_else() -> Result<()> {
    let plane = cluster().await?;
    let admin = plane.client()?;
    let forecasts: Api<MigrationForecast> = Api::namespaced(admin.clone(), NAMESPACE);
    for node in NODES {
        let object = MigrationForecast::new(&format!("on-{node}"), question(node)?);
        forecasts.create(&PostParams::default(), &object).await?;
    }
    let [a, b] = [
        plane.account("migvisor-agent", Some(("agent-a", "node-a"))).await?,
        plane.account("migvisor-agent", Some(("agent-b", "node-b"))).await?,
    ];
    let (a, b) = (a.client().await?, b.client().await?);
    // The policy is taken up a moment after it was installed.
    let rehearsal = PatchParams { dry_run: true, ..PatchParams::apply(AGENT).force() };
    let of_a: Api<MigrationForecast> = Api::namespaced(a.clone(), NAMESPACE);
    let body = json!({ "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "status": { "verdict": "Unknown" } });
    let guarded = async || Ok(of_a.patch_status("on-node-b", &rehearsal, &Patch::Apply(&body)).await.is_err().then_some(()));
    wait_for("the policy to be in force", SOON, guarded).await?;

    for (client, own, foreign, words) in [
        (&a, "on-node-a", "on-node-b", "the agent of the node node-a may not write the forecast of a VM on the node node-b"),
        (&b, "on-node-b", "on-node-a", "the agent of the node node-b may not write the forecast of a VM on the node node-a"),
    ] {
        apply(client, AGENT, own, json!({ "verdict": "Fails", "probability": 0.0 })).await?;
        apply(client, AGENT_DRY_RUN, own, json!({ "dryRun": { "id": "x", "phase": "Running" } })).await?;
        let truth =
            json!({ "converged": true, "totalTime": "3s", "pages": 1, "zeroPages": 2, "transferredBytes": 3, "syncs": 4 });
        apply(client, AGENT_MIGRATION, own, json!({ "lastMigration": truth })).await?;
        let kept = apply(client, AGENT, own, json!({ "verdict": "Converges", "probability": 1.0 }))
            .await?
            .status
            .context("no status")?;
        ensure!(kept.dry_run.is_some() && kept.last_migration.is_some(), "one write took another's part away: {kept:?}");
        refused(apply(client, AGENT, foreign, json!({ "verdict": "Converges", "probability": 1.0 })).await, words)?;
    }

    // The manager's part, which the manager writes.
    let judged = |status: &str| json!([{ "type": "Ready", "status": status, "reason": "x", "message": "", "lastTransitionTime": "2026-11-22T12:00:00Z" }]);
    let outcome = json!({ "migrationName": "m", "migrationUID": "u", "phase": "Succeeded" });
    let forge = |status: Value| apply(&a, AGENT, "on-node-a", status);
    refused(forge(json!({ "outcome": outcome })).await, "status.outcome is the manager's to write")?;
    refused(
        forge(json!({ "conditions": judged("True") })).await,
        "the conditions Ready and DataStale are the manager's to write",
    )?;
    apply(&admin, MANAGER, "on-node-a", json!({ "outcome": outcome, "conditions": judged("True") })).await?;
    let low = json!([{ "type": "LowConfidence", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-11-22T12:00:00Z" }]);
    let kept = apply(&a, AGENT, "on-node-a", json!({ "verdict": "Fails", "probability": 0.0, "conditions": low }))
        .await?
        .status
        .context("no status")?;
    ensure!(kept.outcome.is_some() && kept.conditions.len() == 2, "{kept:?}");
    refused(
        forge(json!({ "outcome": { "migrationName": "m", "migrationUID": "u", "phase": "Failed" } })).await,
        "status.outcome is",
    )?;
    refused(forge(json!({ "conditions": judged("False") })).await, "the conditions Ready and DataStale are")?;

    // Everything else it has no right to ...
    let patch = Patch::Merge(json!({ "spec": { "nodeName": "node-b" } }));
    refused(of_a.patch("on-node-a", &PatchParams::default(), &patch).await, "cannot patch resource \"migrationforecasts\"")?;
    // ... and with more rights than it should have it is held all the same.
    let all = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": "far-too-much" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
        "subjects": [{ "kind": "ServiceAccount", "namespace": "migvisor-system", "name": "migvisor-agent" }],
    });
    plane.accepts(&all.to_string()).await?;
    let patched = async || {
        let result = of_a.patch("on-node-a", &PatchParams::default(), &patch).await;
        refused(result, "an agent writes the status of MigrationForecasts, never the objects themselves").map(Some)
    };
    wait_for("the rights to be taken up, and to be of no use", SOON, patched).await?;
    let words = "never the objects themselves";
    for metadata in [
        json!({ "labels": { NODE_LABEL: "node-b" } }),
        json!({ "annotations": { hint::MIGRATION: "u" } }),
        json!({ "finalizers": ["a.b/c"] }),
    ] {
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        refused(of_a.patch("on-node-a", &PatchParams::default(), &patch).await, words)?;
    }
    refused(of_a.create(&PostParams::default(), &MigrationForecast::new("made-up", question("node-a")?)).await, words)?;
    refused(of_a.delete("on-node-a", &DeleteParams::default()).await, words)?;

    // A token that tells of no node, as one that was copied out of a Secret.
    let homeless = plane.account("migvisor-agent", None).await?.client().await?;
    refused(apply(&homeless, AGENT, "on-node-a", json!({ "verdict": "Unknown" })).await, "the agent's token names no node")
}

/// A part of the product at work with an account's token.
async fn start(plane: &ControlPlane, name: &str, account: &Account, health: &str, more: &[&str]) -> Result<Process> {
    let kubeconfig = account.kubeconfig.to_string_lossy();
    let args = [&[name, "--kubeconfig", &kubeconfig, "--listen", health], more].concat();
    // Its own file is all that it has.
    let mut process = plane.product(name, &args, &[("KUBECONFIG", "/nonexistent")])?;
    let url: http::Uri = format!("http://{health}/readyz").parse()?;
    for _ in 0..400 {
        process.still_runs()?;
        if get(&url).await.is_ok_and(|(status, _)| status == 200) {
            return Ok(process);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("the {name} is not ready; its log ends:\n{}", process.log_tail(25))
}

/// What the test looks at and does in the story below, as the administrator and as the agent of `node-a`.
struct Scene<'a> {
    plane: &'a ControlPlane,
    agent: Client,
}

impl Scene<'_> {
    async fn that(&self, what: &str, holds: impl Fn(&MigrationForecast) -> bool) -> Result<MigrationForecast> {
        let api: Api<MigrationForecast> = Api::namespaced(self.plane.client()?, NAMESPACE);
        self.plane
            .wait(NAMESPACE, &format!("the forecast that {what}"), SOON, || async {
                Ok(api.get_opt("vm1").await?.filter(&holds))
            })
            .await
    }

    async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.plane.kubectl(args, "").await?.ok()
    }

    /// The agent's answer to the present question.
    async fn answer(&self, verdict: Verdict) -> Result<()> {
        self.answer_with(verdict, &Value::Null).await
    }

    /// The same, with answers about remedies.
    async fn answer_with(&self, verdict: Verdict, remedies: &Value) -> Result<()> {
        let object = self.that("is asked", |_| true).await?;
        let asked = object.question();
        let fails = verdict == Verdict::Fails;
        let now = jiff::Timestamp::now();
        let status = MigrationForecastStatus {
            verdict: Some(verdict),
            ..MigrationForecastStatus::unknown(reason::BUDGET_EXCEEDED, "", &asked, Some(now))
        };
        let mut status = serde_json::to_value(status)?;
        let figures = json!({
            "probability": if fails { 0.0 } else { 1.0 }, "method": "PC", "iterations": 9, "convergenceTime": "3s", "totalTime": "3s",
            "dirtiedPages": 9, "transferredBytes": 9, "downtime": if fails { Value::Null } else { json!("100ms") },
        });
        status.as_object_mut().context("no object")?.extend(figures.as_object().cloned().unwrap_or_default());
        if !remedies.is_null() {
            status["remedies"] = json!({ "asked": object.spec.remedies_fingerprint(), "measuredAt": now, "answers": remedies });
        }
        apply(&self.agent, AGENT, "vm1", status).await?;
        self.that("is judged", |forecast| ready(forecast) == Some(format!("{verdict:?}"))).await.map(drop)
    }
}

/// The reason of the condition `Ready`, where it is True.
fn ready(forecast: &MigrationForecast) -> Option<String> {
    let conditions = &forecast.status.as_ref()?.conditions;
    conditions.iter().find(|it| it.type_ == "Ready" && it.status == "True").map(|it| it.reason.clone())
}

fn dry_run_id(forecast: &MigrationForecast) -> Option<&str> {
    forecast.spec.dry_run.as_ref().map(|dry_run| dry_run.id.as_str())
}

#[tokio::test]
async fn agent_and_controller_need_the_rights_they_have_and_no_others() -> Result<()> {
    let plane = cluster().await?;
    let ended = Box::pin(story(&plane)).await;
    // What is waited for in vain is often a right that is missing: that first.
    for pod in ["agent", "controller"] {
        match (&ended, denied(&plane, pod)) {
            (Err(error), Err(missing)) => bail!("{missing:#}\nand so: {error:#}"),
            (Ok(()), Err(missing)) => return Err(missing),
            _ => {}
        }
    }
    ended
}

/// What becomes of migrations of a VM that would fail, where admission is not asked and their target pods are held: a person's, and a drain's.
async fn abandoned_and_let_go(plane: &ControlPlane) -> Result<()> {
    println!("--- a person's migration that would fail is abandoned, as admission is not asked here; a drain's is let go");
    let migrations = vmims(&plane.client()?, NAMESPACE);
    plane.accepts(&vmim_manifest(NAMESPACE, "m0", "vm1").to_string()).await?;
    let job = migrations.get("m0").await?.uid();
    plane.accepts(&target(plane, "virt-launcher-vm1-person", job.as_deref()).await?).await?;
    wait_for("m0 to be deleted", SOON, async || Ok(migrations.get_opt("m0").await?.is_none().then_some(()))).await?;
    event_in(plane, "MigrationAbandoned", "VirtualMachineInstanceMigration", "m0").await?;
    event_in(plane, "MigrationAbandoned", "VirtualMachineInstance", "vm1").await?;

    let mut drained = vmim_manifest(NAMESPACE, "m1", "vm1");
    drained["metadata"]["annotations"] = json!({ "kubevirt.io/evacuationMigration": "node-a" });
    plane.accepts(&drained.to_string()).await?;
    let job = migrations.get("m1").await?.uid();
    plane.accepts(&target(plane, "virt-launcher-vm1-target", job.as_deref()).await?).await?;
    let pods: Api<Pod> = Api::namespaced(plane.client()?, NAMESPACE);
    let ours_gone = async || Ok((gates(&pods, "virt-launcher-vm1-target").await? == ["other/gate"]).then_some(()));
    wait_for("our gate to go", SOON, ours_gone).await?;
    event_in(plane, "MigrationReleased", "VirtualMachineInstanceMigration", "m1").await.map(drop)
}

/// A migration that would fail gets what is forecast to help it: its own MigrationPolicy, which takes over a person's, and a label on its VM.
/// Both go with it.
async fn forced(scene: &Scene<'_>) -> Result<()> {
    println!("--- a migration is forced");
    let theirs = json!({
        "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy", "metadata": { "name": "theirs" },
        "spec": { "selectors": { "namespaceSelector": {} }, "bandwidthPerMigration": "48Mi" },
    });
    scene.plane.accepts(&theirs.to_string()).await?;
    let remedies = r#"{"spec":{"remedies":[{"type":"AutoConverge"}]}}"#;
    scene.kubectl(&["patch", "pp", "house", "--type=merge", "-p", remedies]).await?;
    scene.that("asks about the remedy", |it| !it.spec.remedies.is_empty() && it.spec.bandwidth.0 == "48Mi").await?;
    scene.answer_with(Verdict::Fails, &json!([{ "type": "AutoConverge", "verdict": "Converges", "probability": 1.0 }])).await?;
    scene.plane.accepts(&vmim_manifest(NAMESPACE, "m2", "vm1").to_string()).await?;
    let migrations = vmims(&scene.plane.client()?, NAMESPACE);
    let uid = migrations.get("m2").await?.uid().context("no UID")?;
    scene.plane.accepts(&target(scene.plane, "virt-launcher-vm1-forced", Some(&uid)).await?).await?;
    let name = format!("migvisor-{uid}");
    let pods: Api<Pod> = Api::namespaced(scene.plane.client()?, NAMESPACE);
    wait_for("our gate to go", SOON, async || Ok((gates(&pods, "virt-launcher-vm1-forced").await?.len() == 1).then_some(())))
        .await?;
    let policy: Value = serde_json::from_str(&scene.kubectl(&["get", "migrationpolicy", &name, "-o", "json"]).await?)?;
    ensure!(policy["spec"]["allowAutoConverge"] == true && policy["spec"]["bandwidthPerMigration"] == "48Mi", "{policy}");
    ensure!(policy["spec"]["selectors"]["virtualMachineInstanceSelector"]["migvisor.io/force"] == uid, "{policy}");
    event_in(scene.plane, "MigrationForced", "VirtualMachineInstanceMigration", "m2").await?;

    migrations.delete("m2", &DeleteParams::default()).await?;
    let taken_back = async || {
        let policies = scene.kubectl(&["get", "migrationpolicies", "-o", "name"]).await?;
        let labels = scene.kubectl(&["get", "vmi", "vm1", "-o", "jsonpath={.metadata.labels}"]).await?;
        Ok((!policies.contains(&name) && !labels.contains("migvisor.io/force")).then_some(()))
    };
    wait_for("the remedy to be taken back", SOON, taken_back).await?;
    scene.kubectl(&["delete", "migrationpolicy", "theirs"]).await?;
    scene.kubectl(&["patch", "pp", "house", "--type=merge", "-p", r#"{"spec":{"remedies":null}}"#]).await.map(drop)
}

/// A target pod of a migration of `vm1`, held by us and by somebody else.
async fn target(plane: &ControlPlane, pod: &str, job: Option<&str>) -> Result<String> {
    let vm = vmis(&plane.client()?, NAMESPACE).get("vm1").await?.uid();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": NAMESPACE, "name": pod, "annotations": { "kubevirt.io/domain": "vm1" },
            "labels": { "kubevirt.io": "virt-launcher", "kubevirt.io/migrationJobUID": job, "kubevirt.io/created-by": vm },
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": "vm1", "uid": vm, "controller": true,
            }],
        },
        "spec": {
            "containers": [{ "name": "compute", "image": "virt-launcher" }], "automountServiceAccountToken": false,
            "schedulingGates": [{ "name": "migvisor.io/dry-run" }, { "name": "other/gate" }],
        },
    });
    Ok(pod.to_string())
}

async fn gates(pods: &Api<Pod>, name: &str) -> Result<Vec<String>> {
    let gates = pods.get(name).await?.spec.and_then(|spec| spec.scheduling_gates).unwrap_or_default();
    Ok(gates.into_iter().map(|gate| gate.name).collect())
}

/// What a person asks for stays, whatever the manager writes beside it.
async fn stands(scene: &Scene<'_>) -> Result<()> {
    println!("--- what a person asks for stands, whatever the manager writes");
    scene
        .kubectl(&["patch", "mf", "vm1", "--type=merge", "-p", r#"{"spec":{"dryRun":{"id":"by-hand","deadline":null}}}"#])
        .await?;
    scene.kubectl(&["patch", "pp", "house", "--type=merge", "-p", r#"{"spec":{"bandwidth":"32Mi"}}"#]).await?;
    let asked = scene.that("asks for another bandwidth", |forecast| forecast.spec.bandwidth.0 == "32Mi").await?;
    ensure!(dry_run_id(&asked) == Some("by-hand"), "{:?}", asked.spec);
    // The same event again is counted, not made anew.
    scene.answer(Verdict::Fails).await?;
    let counted = async || Ok(scene.plane.calls("controller")?.0.contains("patch events.k8s.io/events").then_some(()));
    wait_for("the event to be counted on", SOON, counted).await?;
    let asked = scene.that("is there", |_| true).await?;
    ensure!(dry_run_id(&asked) == Some("by-hand"), "the manager fought: {:?}", asked.spec);
    Ok(())
}

/// A plan, until the migration that it makes has gone again.
async fn carried_out(scene: &Scene<'_>) -> Result<()> {
    let migrations = vmims(&scene.plane.client()?, NAMESPACE);
    println!("--- a plan is carried out");
    scene.answer(Verdict::Converges).await?;
    let plan = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationPlan", "metadata": { "name": "drain" },
        "spec": { "sourceNode": "node-a", "want": "Everything", "execute": true },
    });
    scene.plane.accepts(&plan.to_string()).await?;
    let label = ListParams::default().labels(PLAN_LABEL);
    let created = async || Ok(migrations.list(&label).await?.items.into_iter().next());
    let planned = wait_for("the migration of the plan", SOON, created).await?.name_any();
    let noted = async || {
        let status = scene.kubectl(&["get", "mplan", "drain", "-o", "jsonpath={.status.migrations[*].name}"]).await?;
        Ok((status == planned).then_some(()))
    };
    wait_for("the plan to tell of it", SOON, noted).await?;
    scene.kubectl(&["delete", "mplan", "drain"]).await?;
    migrations.delete(&planned, &DeleteParams::default()).await?;
    scene.that("tells of no migration any more", |forecast| forecast.hint().is_none()).await.map(drop)
}

async fn story(plane: &ControlPlane) -> Result<()> {
    let admin = plane.client()?;
    let policy = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "PredictionPolicy", "metadata": { "name": "house" },
        "spec": { "selectors": {}, "mode": "Enforce", "bandwidth": "64Mi", "dryRun": { "mode": "OnDoubt" } },
    });
    plane.accepts(&policy.to_string()).await?;
    let odd = policy.to_string().replace("\"OnDoubt\"", "\"OnDoubt\",\"deadline\":\"0\"").replace("house", "odd");
    plane.rejects(&odd, "it has to be between 1s and 24h").await?;

    let certificate = plane.webhook_certificate()?;
    let (cert, key) = (certificate.certificate.to_string_lossy(), certificate.key.to_string_lossy());
    let admission = format!("127.0.0.1:{}", free_port()?);
    let options =
        ["--tls-cert", &cert, "--tls-key", &key, "--webhook-listen", &admission, "--lease-namespace", "migvisor-system"];
    let account = plane.account("migvisor-controller", Some(("controller", "node-b"))).await?;
    let mut controller = start(plane, "controller", &account, &format!("127.0.0.1:{}", free_port()?), &options).await?;

    println!("--- the agent answers with its own token");
    running_vmi(&admin, NAMESPACE, "vm1", "node-a", "512Mi").await?;
    let sockets = plane.directory().join("qmp");
    std::fs::create_dir(&sockets)?;
    let options = ["--node", "node-a", "--qmp-dir", &sockets.to_string_lossy(), "--lease-namespace", "migvisor-system"];
    let account = plane.account("migvisor-agent", Some(("agent", "node-a"))).await?;
    let mut agent = start(plane, "agent", &account, &format!("127.0.0.1:{}", free_port()?), &options).await?;
    let tester = plane.account("migvisor-agent", Some(("tester", "node-a"))).await?.client().await?;
    let scene = Scene { plane, agent: tester };
    scene
        .that("is answered", |forecast| forecast.answer().is_some_and(|answer| answer.verdict == Some(Verdict::Unknown)))
        .await?;
    // Before a dry run it looks whether a controller is there; then there is nothing to dry-run.
    let by_hand = |dry_run: Value| json!({ "spec": { "dryRun": dry_run } }).to_string();
    let patch = ["patch", "mf", "vm1", "--type=merge", "-p"];
    scene.kubectl(&[&patch[..], &[&by_hand(json!({ "id": "first" }))]].concat()).await?;
    let tried = |forecast: &MigrationForecast| forecast.status.as_ref().and_then(|status| status.dry_run.clone());
    scene.that("has its dry run behind it", |forecast| tried(forecast).is_some_and(|run| run.phase.is_final())).await?;
    agent.still_runs()?;
    exactly(plane, "migvisor-agent", "agent").await?;
    agent.stop(Duration::from_secs(10)).await?;
    scene.kubectl(&[&patch[..], &[&by_hand(Value::Null)]].concat()).await?;
    apply(&scene.agent, AGENT_DRY_RUN, "vm1", json!({})).await?;
    scene.that("knows of no dry run", |forecast| tried(forecast).is_none()).await?;

    // From here on the test is the agent of node-a, with a token like its.
    println!("--- a doubt is tried out, and a migration withdraws that");
    scene.answer(Verdict::Fails).await?;
    event_in(plane, "MigrationWouldFail", "VirtualMachineInstance", "vm1").await?;
    let asked =
        scene.that("asks for a dry run", |forecast| dry_run_id(forecast).is_some_and(|id| id.starts_with("doubt-"))).await?;
    ensure!(ready(&asked).as_deref() == Some("Fails"), "asking outdated the answer: {:?}", asked.status);
    let dry_run = asked.spec.dry_run.clone().context("no dry run")?;
    ensure!(dry_run.channels == Some(8) && dry_run.request().is_ok(), "{dry_run:?}");
    let progress = DryRunStatus::new(dry_run.id.clone(), asked.question().fingerprint, DryRunPhase::Running, "");
    apply(&scene.agent, AGENT_DRY_RUN, "vm1", json!({ "dryRun": progress })).await?;

    abandoned_and_let_go(plane).await?;
    let migrations = vmims(&admin, NAMESPACE);
    let uid = migrations.get("m1").await?.uid();
    let told = |forecast: &MigrationForecast| forecast.hint().map(|hint| (hint.migration_uid, hint.phase.as_str()));
    let pending = uid.clone().map(|uid| (uid, "Pending"));
    let held = scene.that("tells of the migration and withdraws", |it| told(it) == pending && dry_run_id(it).is_none()).await?;
    ensure!(ready(&held).as_deref() == Some("Fails") && held.status.and_then(|it| it.dry_run).is_some(), "the answer is gone");
    // So early, so that the controller has seen it when the migration ends.
    let truth = json!({
        "migrationUID": uid, "converged": true, "totalTime": "4s", "pages": 100_000, "zeroPages": 0, "transferredBytes": 410_000_000,
        "syncs": 4
    });
    apply(&scene.agent, AGENT_MIGRATION, "vm1", json!({ "lastMigration": truth })).await?;
    phase(&migrations, json!({ "phase": "Running" })).await?;
    let runs = uid.clone().map(|uid| (uid, "Running"));
    scene.that("says that it runs", |forecast| told(forecast) == runs).await?;
    let now = jiff::Timestamp::now();
    let (start, end) = ((now - jiff::SignedDuration::from_secs(4)).to_string(), now.to_string());
    let state = json!({
        "migrationUid": uid, "startTimestamp": start, "endTimestamp": end, "completed": true, "sourceNode": "node-a",
        "targetNode": "node-b"
    });
    phase(&migrations, json!({ "phase": "Succeeded", "migrationState": state })).await?;
    let ended = |forecast: &MigrationForecast| forecast.status.as_ref().is_some_and(|status| status.outcome.is_some());
    scene.that("has its outcome and tells of nothing", |it| told(it).is_none() && ended(it)).await?;
    event_in(plane, "MigrationForecastOutcome", "VirtualMachineInstanceMigration", "m1").await?;
    let kept = async || Ok(plane.calls("controller")?.0.contains("patch /configmaps").then_some(()));
    wait_for("what was learned to be kept", SOON, kept).await?;

    forced(&scene).await?;
    carried_out(&scene).await?;

    stands(&scene).await?;

    println!("--- a VM that has ended");
    let over = Patch::Merge(json!({ "status": { "phase": "Succeeded" } }));
    vmis(&admin, NAMESPACE).patch("vm1", &PatchParams::default(), &over).await?;
    let forecasts: Api<MigrationForecast> = Api::namespaced(admin, NAMESPACE);
    wait_for("the forecast to go", SOON, async || Ok(forecasts.get_opt("vm1").await?.is_none().then_some(()))).await?;
    controller.still_runs()?;
    exactly(plane, "migvisor-controller", "controller").await?;
    let log = controller.log();
    ensure!(!log.contains("panicked") && !log.contains("forbidden"), "{log}");
    Ok(())
}

async fn phase(migrations: &Api<kube::api::DynamicObject>, status: Value) -> Result<()> {
    let patch = Patch::Merge(json!({ "status": status }));
    migrations.patch_status("m1", &PatchParams::default(), &patch).await?;
    Ok(())
}

/// The rules of this name allow what the holder of this pod's token did, and it needed them all. What comes by the clock (a Lease that is
/// renewed) is waited for.
async fn exactly(plane: &ControlPlane, name: &str, pod: &str) -> Result<()> {
    let rules = plane.rights(name).await?;
    let used = async || {
        let (done, _) = plane.calls(pod)?;
        let idle: Vec<_> = rules.difference(&done).collect();
        ensure!(idle.is_empty(), "rights of {name} in config/base that were never used: {idle:#?}");
        Ok(Some(done))
    };
    let done = wait_for("every right to be used", SOON, used).await?;
    let more: Vec<_> = done.difference(&rules).collect();
    ensure!(more.is_empty(), "{name} did by other rights than those in config/base: {more:#?}");
    denied(plane, pod)
}

/// An error that names what the holder of this pod's token had no right to.
fn denied(plane: &ControlPlane, pod: &str) -> Result<()> {
    let (_, refused) = plane.calls(pod)?;
    ensure!(refused.is_empty(), "rights of {pod} that are missing in config/base: {refused:#?}");
    Ok(())
}
