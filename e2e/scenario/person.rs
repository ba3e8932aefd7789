//! People of a scene, who may do what RBAC gives them and no more.
//!
//! In: what somebody may write, everywhere and in the scene's namespace. Out: their name, and what kubectl says to them.

use anyhow::Result;
use serde_json::{Value, json};

use super::Scene;
use crate::cluster::Output;

const RBAC: &str = "rbac.authorization.k8s.io";

impl Scene<'_> {
    /// Somebody who may write these resources everywhere, and those in the scene's namespace. Returns the user's name.
    pub async fn person(&self, name: &str, everywhere: &[&str], here: &[&str]) -> Result<String> {
        let user = self.own(name);
        let rules = |resources: &[&str]| {
            let rule = |resource: &&str| {
                let group = if resource.starts_with("virtualmachine") { "kubevirt.io" } else { "migvisor.io" };
                json!({ "apiGroups": [group], "resources": [resource], "verbs": ["get", "list", "create", "patch"] })
            };
            resources.iter().map(rule).collect::<Vec<_>>()
        };
        let subjects = json!([{ "kind": "User", "apiGroup": RBAC, "name": user }]);
        let kinds = [
            ("ClusterRole", "ClusterRoleBinding", Value::Null, everywhere),
            ("Role", "RoleBinding", json!(self.namespace), here),
        ];
        for (role, binding, namespace, resources) in kinds {
            let metadata = json!({ "name": user, "namespace": namespace });
            let object = |kind: &str| json!({ "apiVersion": format!("{RBAC}/v1"), "kind": kind, "metadata": metadata });
            let (mut rights, mut given) = (object(role), object(binding));
            rights["rules"] = json!(rules(resources));
            given["roleRef"] = json!({ "apiGroup": RBAC, "kind": role, "name": user });
            given["subjects"] = subjects.clone();
            let both = json!({ "apiVersion": "v1", "kind": "List", "items": [rights, given] });
            self.cluster.kubectl().accepts(&both.to_string()).await?;
            if namespace.is_null() {
                self.at_the_end(&["delete", role, &user, "--ignore-not-found"]);
                self.at_the_end(&["delete", binding, &user, "--ignore-not-found"]);
            }
        }
        Ok(user)
    }

    /// Runs kubectl as this user.
    pub async fn as_user(&self, user: &str, args: &[&str], stdin: &str) -> Result<Output> {
        self.cluster.kubectl().run(&[args, &["--as", user]].concat(), stdin).await
    }
}
