//! What the controller's own token may do to the objects of others, whatever RBAC says: `config/base/controller-leash.yaml` in a real API
//! server, each refusal with that token.

mod common;

use anyhow::{Context, Result, ensure};
use common::{NAMESPACE, SOON};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams},
};
use migvisor::api::kubevirt::MigrationPolicy;
use migvisor_e2e::{
    cluster::{ControlPlane, wait_for},
    kubevirt::{
        install_crds,
        objects::{create_node, vmims, vmis},
        running_vmi, vmim_manifest,
    },
};
use serde_json::{Value, json};

const NODE: &str = "node-a";

#[tokio::test]
async fn the_controller_is_on_a_leash() -> Result<()> {
    let plane = ControlPlane::start().await?;
    let client = plane.client()?;
    install_crds(&client).await?;
    create_node(&client, NODE).await?;
    plane.install_base().await?;
    let token = plane.account("migvisor-controller", Some(("leashed-controller", NODE))).await?.client().await?;
    only_gates(&plane, token.clone()).await?;
    only_one_label_and_one_note(&plane, token.clone()).await?;
    only_policies_of_its_own(&plane, token.clone()).await?;
    only_migrations_that_have_sent_nothing(&plane, token).await
}

/// Of a VM it may change the label by which it forces and the annotation by which it nudges.
async fn only_one_label_and_one_note(plane: &ControlPlane, token: Client) -> Result<()> {
    running_vmi(&plane.client()?, NAMESPACE, "vm1", NODE, "512Mi").await?;
    let vms = vmis(&token, NAMESPACE);
    let patch = async |patch: &Value| vms.patch("vm1", &PatchParams::default(), &Patch::Merge(patch)).await;
    patch(&json!({ "metadata": { "labels": { "migvisor.io/force": "uid" } } })).await?;
    patch(&json!({ "metadata": { "annotations": { "migvisor.io/nudge": "now" } } })).await?;
    let whole = "may change one label and one annotation of a VirtualMachineInstance, and nothing else";
    for (change, refusal) in [
        (json!({ "metadata": { "labels": { "mine": "now" } } }), "may change migvisor.io/force, and nothing else"),
        (json!({ "metadata": { "labels": { "kubevirt.io/nodeName": null } } }), "may change migvisor.io/force, and nothing else"),
        (json!({ "metadata": { "annotations": { "mine": "now" } } }), "may change migvisor.io/nudge, and nothing else"),
        (json!({ "metadata": { "finalizers": [] } }), whole),
        (json!({ "spec": { "evictionStrategy": "None" } }), whole),
        (json!({ "status": { "nodeName": "elsewhere" } }), whole),
    ] {
        let error = patch(&change).await.err().with_context(|| format!("{change} was let through"))?.to_string();
        ensure!(error.contains(refusal), "{change}: {error}");
    }
    patch(&json!({ "metadata": { "labels": { "migvisor.io/force": null } } })).await.map(drop).context("its own label")
}

/// A person's MigrationPolicy is not its to write.
async fn only_policies_of_its_own(plane: &ControlPlane, token: Client) -> Result<()> {
    let selecting = |name: &str, selectors: Value| {
        json!({
            "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
            "metadata": { "name": name, "annotations": { "migvisor.io/vm": format!("{NAMESPACE}/vm1") } },
            "spec": { "selectors": selectors },
        })
    };
    let one = json!({
        "namespaceSelector": { "kubernetes.io/metadata.name": NAMESPACE },
        "virtualMachineInstanceSelector": { "migvisor.io/force": "uid" },
    });
    let policy = |name: &str| selecting(name, one.clone());
    plane.accepts(&policy("house").to_string()).await?;
    let policies: Api<DynamicObject> = Api::all_with(token, &ApiResource::erase::<MigrationPolicy>(&()));
    let apply =
        async |name: &str| policies.patch(name, &PatchParams::apply("migvisor").force(), &Patch::Apply(policy(name))).await;
    apply("migvisor-uid").await?;
    policies.delete("migvisor-uid", &DeleteParams::default()).await?;
    let refusal = "may write MigrationPolicies whose names begin with migvisor-, and no others";
    for error in
        [apply("house").await.err(), apply("of-mine").await.err(), policies.delete("house", &DeleteParams::default()).await.err()]
    {
        let error = error.context("it was let through")?.to_string();
        ensure!(error.contains(refusal), "{error}");
    }
    for (name, selectors) in [("migvisor-uid", json!({})), ("migvisor-other", one.clone())] {
        let body = Patch::Apply(selecting(name, selectors));
        let applied = policies.patch(name, &PatchParams::apply("migvisor").force(), &body).await;
        let error = applied.err().context("it was let through")?.to_string();
        ensure!(error.contains("is for one migration"), "{error}");
    }
    Ok(())
}

/// What has been handed to the nodes is not its to delete.
async fn only_migrations_that_have_sent_nothing(plane: &ControlPlane, token: Client) -> Result<()> {
    let (theirs, ours) = (vmims(&plane.client()?, NAMESPACE), vmims(&token, NAMESPACE));
    for (phase, may) in
        [("", true), ("Pending", true), ("Scheduling", true), ("Scheduled", false), ("Running", false), ("Succeeded", false)]
    {
        let name = format!("m-{}", phase.to_lowercase());
        let name = name.trim_end_matches('-');
        plane.accepts(&vmim_manifest(NAMESPACE, name, "vm1").to_string()).await?;
        if !phase.is_empty() {
            let status = Patch::Merge(json!({ "status": { "phase": phase } }));
            theirs.patch_status(name, &PatchParams::default(), &status).await?;
        }
        let deleted = ours.delete(name, &DeleteParams::default()).await;
        match deleted.err() {
            None => ensure!(may, "{phase}: it was let through"),
            Some(error) => {
                ensure!(
                    !may && error.to_string().contains("of which nothing has been sent yet, and no other"),
                    "{phase}: {error}"
                );
            }
        }
    }
    Ok(())
}

/// The controller's own token takes our gate off a pod, and nothing else.
async fn only_gates(plane: &ControlPlane, token: Client) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": NAMESPACE, "name": "leashed" },
        "spec": {
            "containers": [{ "name": "compute", "image": "good" }], "automountServiceAccountToken": false,
            "schedulingGates": [{ "name": "migvisor.io/dry-run" }, { "name": "other/gate" }],
        },
    });
    plane.accepts(&pod.to_string()).await?;
    let pods: Api<Pod> = Api::namespaced(token, NAMESPACE);
    let without = |name: &str| json!({ "spec": { "schedulingGates": [{ "name": name, "$patch": "delete" }] } });
    let with = |mut more: Value| {
        more["spec"]["schedulingGates"] = without("migvisor.io/dry-run")["spec"]["schedulingGates"].clone();
        more
    };
    // A policy takes a moment to be heard of; what changes nothing is let through.
    let mut times = 0_u32;
    let refused = async || {
        times += 1;
        let early = json!({ "metadata": { "labels": { "too-early": times.to_string() } } });
        let patched = pods.patch("leashed", &PatchParams::default(), &Patch::Strategic(&early)).await;
        Ok(patched.is_err().then_some(()))
    };
    wait_for("the leash to hold", SOON, refused).await?;
    let gate = "may take the scheduling gate migvisor.io/dry-run off a pod, and nothing else";
    for (patch, refusal) in [
        (json!({ "metadata": { "labels": { "mine": "now" } } }), "may not change a pod's metadata"),
        (without("other/gate"), gate),
        (with(json!({ "spec": { "containers": [{ "name": "compute", "image": "evil" }] } })), "may not change a pod's spec"),
        (with(json!({ "spec": { "activeDeadlineSeconds": 1 } })), "may not change a pod's spec"),
        (with(json!({ "spec": { "nodeSelector": { "mine": "now" } } })), "may not change a pod's spec"),
        (with(json!({ "metadata": { "labels": { "mine": "now" } } })), "may not change a pod's metadata"),
        (with(json!({ "metadata": { "finalizers": ["mine/now"] } })), "may not change a pod's metadata"),
    ] {
        let refused = pods.patch("leashed", &PatchParams::default(), &Patch::Strategic(&patch)).await;
        let error = refused.err().with_context(|| format!("{patch} was let through"))?.to_string();
        ensure!(error.contains(refusal), "{patch}: {error}");
    }
    for _ in 0..2 {
        // Again, by somebody whose watch lags behind: nothing to take off is no offence.
        pods.patch("leashed", &PatchParams::default(), &Patch::Strategic(without("migvisor.io/dry-run"))).await?;
    }
    Ok(())
}
