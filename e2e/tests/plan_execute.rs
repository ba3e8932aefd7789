//! Who may have a plan carried out, and what a plan may say: `config/base` in a real API server, asked by three people.

mod common;

use anyhow::{Result, ensure};
use common::{NAMESPACE, SOON, plan};
use migvisor_e2e::{
    cluster::{ControlPlane, wait_for},
    kubevirt::install_crds,
};
use serde_json::{Value, json};

const NODE: &str = "node-a";

/// A person with these cluster-wide rights, and those rights in one namespace.
async fn person(plane: &ControlPlane, name: &str, everywhere: &[&str], here: &[&str]) -> Result<String> {
    let rbac = "rbac.authorization.k8s.io";
    let rules = |resources: &[&str]| {
        let rule = |resource: &&str| {
            let group = if *resource == "migrationplans" { "migvisor.io" } else { "kubevirt.io" };
            json!({ "apiGroups": [group], "resources": [resource], "verbs": ["get", "list", "create", "update", "patch"] })
        };
        resources.iter().map(rule).collect::<Vec<_>>()
    };
    let subjects = json!([{ "kind": "User", "apiGroup": rbac, "name": name }]);
    let kinds = [("ClusterRole", "ClusterRoleBinding", Value::Null, everywhere), ("Role", "RoleBinding", json!(NAMESPACE), here)];
    for (role, binding, namespace, resources) in kinds {
        let metadata = json!({ "name": name, "namespace": namespace });
        let version = format!("{rbac}/v1");
        plane
            .accepts(&json!({ "apiVersion": version, "kind": role, "metadata": metadata, "rules": rules(resources) }).to_string())
            .await?;
        let reference = json!({ "apiGroup": rbac, "kind": role, "name": name });
        let bound =
            json!({ "apiVersion": version, "kind": binding, "metadata": metadata, "roleRef": reference, "subjects": subjects });
        plane.accepts(&bound.to_string()).await?;
    }
    Ok(plane.kubeconfig_of(name, None)?.to_string_lossy().into_owned())
}

#[tokio::test]
async fn plans_execute_is_refused_to_who_may_not_migrate() -> Result<()> {
    const VMIMS: &str = "virtualmachineinstancemigrations";
    let plane = ControlPlane::start().await?;
    install_crds(&plane.client()?).await?;
    plane.install_base().await?;
    let planner = person(&plane, "ann", &["migrationplans"], &[]).await?;
    let owner = person(&plane, "bob", &["migrationplans"], &[VMIMS]).await?;
    let operator = person(&plane, "carl", &["migrationplans", VMIMS], &[]).await?;
    let create = async |kubeconfig: &str, name: &str, execute: bool| {
        let manifest = plan(name, &json!({ "sourceNode": NODE, "want": "Everything", "execute": execute }));
        plane.kubectl(&["create", "--kubeconfig", kubeconfig, "-f", "-"], &manifest).await
    };
    // The policy is taken up a moment after it was installed; a rehearsal keeps nothing.
    let rehearsal = plan("rehearsal", &json!({ "sourceNode": NODE, "want": "Everything", "execute": true }));
    let in_force = async || {
        let said = plane.kubectl(&["create", "--dry-run=server", "--kubeconfig", &planner, "-f", "-"], &rehearsal).await?;
        Ok((!said.success && said.stderr.contains("and so may not have a plan carried out")).then_some(()))
    };
    wait_for("the policy to be in force", SOON, in_force).await?;

    for (kubeconfig, name, user) in [(&planner, "of-ann", "ann"), (&owner, "of-bob", "bob")] {
        let words = format!("{user} may not create virtualmachineinstancemigrations in every namespace");
        let refused = create(kubeconfig, name, true).await?;
        ensure!(!refused.success && refused.stderr.contains(&words), "{}{}", refused.stdout, refused.stderr);
        create(kubeconfig, name, false).await?.ok()?;
        let patch = [r#"{"spec":{"execute":true}}"#, "--kubeconfig", kubeconfig];
        let patched = plane.kubectl(&[&["patch", "mplan", name, "--type=merge", "-p"], &patch[..]].concat(), "").await?;
        ensure!(!patched.success && patched.stderr.contains(&words), "{}{}", patched.stdout, patched.stderr);
    }
    create(&operator, "of-carl", true).await?.ok()?;
    let patch = ["patch", "mplan", "of-ann", "--type=merge", "-p", r#"{"spec":{"execute":true}}"#, "--kubeconfig", &operator];
    plane.kubectl(&patch, "").await?.ok()?;
    // Who may not have it carried out may stop it, and may not begin it again.
    let stop = ["patch", "mplan", "of-carl", "--type=merge", "-p", r#"{"spec":{"execute":false}}"#, "--kubeconfig", &planner];
    plane.kubectl(&stop, "").await?.ok()?;
    let again = ["patch", "mplan", "of-carl", "--type=merge", "-p", r#"{"spec":{"execute":true}}"#, "--kubeconfig", &planner];
    ensure!(!plane.kubectl(&again, "").await?.success, "begun again by somebody who may not");
    // Nor may they choose what is carried out: of-ann has been set to by carl.
    let other =
        ["patch", "mplan", "of-ann", "--type=merge", "-p", r#"{"spec":{"sourceNode":"node-b"}}"#, "--kubeconfig", &planner];
    let said = plane.kubectl(&other, "").await?;
    ensure!(!said.success && said.stderr.contains("ann may not create"), "{}{}", said.stdout, said.stderr);
    let label = ["label", "mplan", "of-ann", "a=b", "--kubeconfig", &planner];
    plane.kubectl(&label, "").await?.ok()?;

    // What the kind itself refuses, and takes.
    for (spec, words) in [
        (json!({ "want": "Everything" }), "say which VMs: by sourceNode, by selectors, or by both"),
        (json!({ "sourceNode": NODE, "want": "CheapestSet" }), "say what the set has to free"),
        (json!({ "sourceNode": NODE, "want": "CheapestSet", "free": {} }), "say what the set has to free"),
        (json!({ "sourceNode": NODE, "want": "Everything", "free": { "cpu": 1 } }), "everything goes, whatever that frees"),
        (json!({ "sourceNode": NODE, "want": "All" }), "Unsupported value: \"All\""),
        (json!({ "sourceNode": NODE, "want": "Cheapest", "free": { "memory": "0" } }), "it has to be more than 0"),
        (json!({ "sourceNode": NODE, "want": "Cheapest", "free": { "cpu": "many" } }), "it has to be more than 0"),
        (json!({ "sourceNode": NODE, "want": "Cheapest", "bandwidth": "10" }), "it has to be between 64Ki and 1Ti"),
        (json!({ "sourceNode": NODE, "want": "Cheapest", "bandwidthPerMigration": "9Ei" }), "it has to be between 64Ki and 1Ti"),
        (json!({ "sourceNode": NODE, "want": "Cheapest", "parallelism": 0 }), "should be greater than or equal to 1"),
    ] {
        plane.rejects(&plan("odd", &spec), words).await?;
    }
    let free = json!({ "memory": "8Gi", "cpu": 4 });
    let selectors = json!({ "namespaceSelector": { "team": "a" }, "virtualMachineInstanceSelector": { "app": "db" } });
    let whole =
        json!({ "selectors": selectors, "want": "CheapestSet", "free": free, "bandwidth": 1_073_741_824, "parallelism": 16 });
    plane.accepts(&plan("whole", &whole)).await.map(drop)
}
