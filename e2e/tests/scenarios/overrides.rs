//! A MigrationOverride lets the migrations of a VM through for a while, by whom RBAC allows to make one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migvisor::model::forecast::Verdict;
use migvisor_e2e::scenario::{Load, Scene, VMIM};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

/// What was denied passes, with the override and its reason in the warning and in the event; when that has expired it is denied again.
pub(crate) async fn an_override_lets_through_and_expires(scene: &Scene<'_>) -> Result<()> {
    const LASTS: Duration = Duration::from_secs(12);
    scene.policy("Enforce").await?;
    scene.vm("wild", Load::Wild).await?;
    scene.answered("wild", Verdict::Fails).await?;
    let manifest = scene.migration("wild-1", "wild", &json!({})).to_string();
    let message = scene.cluster.kubectl().rejects(&manifest, "denied the request: migvisor forecasts").await?;
    ensure!(message.contains(r#""kind":"MigrationOverride""#), "the way out is not told: {message}");

    let by_hand = by_hand(scene, &json!({ "vmiName": "wild", "reason": "the rack is on fire", "expiresAfter": "12s" }));
    let made = Instant::now();
    scene.cluster.kubectl().accepts(&by_hand.to_string()).await?;
    let annotations = scene.rehearses("wild", "Fails", true).await?;
    let warning = scene.migrate("wild-1", "wild").await.with_context(|| format!("{annotations}"))?.stderr;
    let words = "The MigrationOverride by-hand lets it through (the rack is on fire)";
    ensure!(warning.contains(words), "{warning}");
    let (note, severity) = scene.event("MigrationForecast", VMIM, "wild-1").await?;
    ensure!(severity == "Warning" && note.contains(words), "{severity}: {note}");
    scene.reaches("wild-1", &["Running", "Failed"], SOON).await?;
    let change = ["patch", "mo", "by-hand", "-n", &scene.namespace, "--type=merge", "-p", r#"{"spec":{"reason":"it is cold"}}"#];
    let changed = scene.cluster.kubectl().run(&change, "").await?;
    let refused = !changed.success && changed.stderr.contains("an override is a record and cannot be changed");
    ensure!(refused, "{changed:?}");

    let phase = scene.ended("wild-1").await?;
    ensure!(phase == "Failed", "wild-1 ended as {phase}");
    let denied = async || {
        let said = scene.rehearse(&scene.migration("rehearsal", "wild", &json!({}))).await?;
        Ok((!said.success && said.stderr.contains("denied the request: migvisor forecasts")).then_some(()))
    };
    scene.until("the override to expire", LASTS + SOON, denied).await?;
    // Kubernetes keeps whole seconds.
    let stood = made.elapsed() + Duration::from_secs(1);
    ensure!(stood >= LASTS, "it stood for no more than {stood:?}");
    Ok(())
}

/// Who may not create overrides makes none, here or elsewhere; who may, in one namespace, does.
pub(crate) async fn an_override_is_refused_to_whom_rbac_refuses_it(scene: &Scene<'_>) -> Result<()> {
    const OVERRIDES: &str = "migrationoverrides";
    let ann = scene.person("ann", &[], &["virtualmachineinstancemigrations"]).await?;
    let bob = scene.person("bob", &[], &[OVERRIDES]).await?;
    let manifest = by_hand(scene, &json!({ "vmiName": "wild", "reason": "I want it to" }));
    let create = ["create", "-f", "-"];
    // Rights take a moment to be heard of.
    let heard = async || {
        let rehearsal = ["create", "--dry-run=server", "-f", "-"];
        Ok(scene.as_user(&bob, &rehearsal, &manifest.to_string()).await?.success.then_some(()))
    };
    scene.until("bob's rights", SOON, heard).await?;
    let said = scene.as_user(&ann, &create, &manifest.to_string()).await?;
    let words = format!("cannot create resource \"{OVERRIDES}\" in API group \"migvisor.io\"");
    ensure!(!said.success && said.stderr.contains(&words), "{said:?}");
    let mut elsewhere = manifest.clone();
    elsewhere["metadata"]["namespace"] = json!("default");
    let said = scene.as_user(&bob, &create, &elsewhere.to_string()).await?;
    ensure!(!said.success && said.stderr.contains(&words), "{said:?}");
    scene.as_user(&bob, &create, &manifest.to_string()).await?.ok()?;
    let made = scene.kubectl(&["get", OVERRIDES, "-n", &scene.namespace, "-o", "name"]).await?;
    ensure!(made.lines().count() == 1, "{made}");
    Ok(())
}

/// An override called `by-hand`.
fn by_hand(scene: &Scene<'_>, spec: &Value) -> Value {
    json!({
        "apiVersion": "migvisor.io/v1alpha1",
        "kind": "MigrationOverride",
        "metadata": { "name": "by-hand", "namespace": scene.namespace },
        "spec": spec,
    })
}
