//! The product's accounts as a cluster has them: `config/base` installed, pods on nodes, tokens bound to them; and the calls that whoever
//! holds such a token has made.
//!
//! In: a ServiceAccount and a node. Out: a kubeconfig with the real bound token of a pod, and the API server's own record (its audit log)
//! of what was done with it, to be compared with the rights that were given.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{Pod, ServiceAccount},
    rbac::v1::{ClusterRole, PolicyRule, Role},
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use super::{ControlPlane, kubeconfig, write_private};

/// The namespace of `config/base`.
pub const NAMESPACE: &str = "migvisor-system";

/// What is audited: everything that the product's accounts do, and nothing else.
pub(super) const AUDIT_POLICY: &str = r#"{
  "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
  "rules": [{ "level": "Metadata", "userGroups": ["system:serviceaccounts:migvisor-system"] }, { "level": "None" }]
}"#;

/// Somebody with a token.
#[derive(Debug, Clone)]
pub struct Account {
    /// The pod that the token is bound to, where there is one.
    pub pod: Option<String>,
    /// A kubeconfig with the token.
    pub kubeconfig: PathBuf,
}

impl Account {
    /// A client with that token.
    pub async fn client(&self) -> Result<Client> {
        let config =
            Config::from_custom_kubeconfig(Kubeconfig::read_from(&self.kubeconfig)?, &KubeConfigOptions::default()).await?;
        Client::try_from(config).context("cannot make a client")
    }
}

/// One thing that an account may do, or did: `patch migvisor.io/migrationforecasts/status`.
pub type Right = String;

fn right(verb: &str, group: &str, resource: &str) -> Right {
    format!("{verb} {group}/{resource}")
}

impl ControlPlane {
    /// Installs `config/base` with the real `kubectl apply -k`, and waits until its kinds are served.
    pub async fn install_base(&self) -> Result<()> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/base");
        self.kubectl(&["apply", "--server-side", "-k", &base.to_string_lossy()], "").await?.ok()?;
        let kinds: Vec<_> = migvisor::api::crds().iter().map(|crd| format!("crd/{}", crd.name_any())).collect();
        let kinds: Vec<_> = kinds.iter().map(String::as_str).collect();
        let wait = ["wait", "--for=condition=Established", "--timeout=30s"];
        self.kubectl(&[&wait[..], &kinds[..]].concat(), "").await?.ok().map(drop)
    }

    /// A token of this ServiceAccount of [`NAMESPACE`]: bound to a new pod of this name on this node, as the kubelet's tokens are, or
    /// bound to nothing.
    pub async fn account(&self, service_account: &str, pod: Option<(&str, &str)>) -> Result<Account> {
        let client = self.client()?;
        let mut spec = json!({ "audiences": [], "expirationSeconds": 3600 });
        if let Some((name, node)) = pod {
            let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
            let manifest = json!({
                "metadata": { "name": name },
                "spec": { "serviceAccountName": service_account, "nodeName": node, "containers": [{ "name": "migvisor", "image": "migvisor" }] },
            });
            let made = pods.create(&PostParams::default(), &serde_json::from_value(manifest)?).await;
            let uid = made.with_context(|| format!("cannot create the pod {name}"))?.uid();
            spec["boundObjectRef"] = json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid });
        }
        let request: TokenRequest = serde_json::from_value(json!({ "metadata": {}, "spec": spec }))?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client, NAMESPACE);
        let issued = accounts.create_token_request(service_account, &PostParams::default(), &request).await;
        let issued = issued.with_context(|| format!("no token for {service_account}"))?;
        let token = issued.status.context("a token request without a status")?.token;
        let path = self.directory().join(format!("{}.kubeconfig", self.unique("account")));
        write_private(&path, &kubeconfig(self.directory(), self.port, service_account, &json!({ "token": token }))?)?;
        Ok(Account { pod: pod.map(|(name, _)| name.to_owned()), kubeconfig: path })
    }

    /// What the holder of this pod's token did, and what it was refused for want of a right, by the API server's own record. A
    /// server-side apply that made an object has used the right to create it, too.
    pub fn calls(&self, pod: &str) -> Result<(BTreeSet<Right>, BTreeSet<Right>)> {
        let text = std::fs::read_to_string(self.directory().join("audit.log")).context("cannot read the audit log")?;
        let (mut done, mut refused) = (BTreeSet::new(), BTreeSet::new());
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).with_context(|| format!("an odd line in the audit log: {line}"))?;
            let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (user, object) = (&event["user"]["extra"]["authentication.kubernetes.io/pod-name"], &event["objectRef"]);
            if user[0] != pod || !object.is_object() {
                continue;
            }
            let (verb, group, resource) = (word(&event["verb"]), word(&object["apiGroup"]), word(&object["resource"]));
            let resource = match object["subresource"].as_str() {
                Some(part) => format!("{resource}/{part}"),
                None => resource,
            };
            if event["annotations"]["authorization.k8s.io/decision"] == "forbid" {
                refused.insert(right(&verb, &group, &resource));
                continue;
            }
            let code = event["responseStatus"]["code"].as_u64().unwrap_or_default();
            if verb == "patch" && code == 201 {
                done.insert(right("create", &group, &resource));
            }
            // The apply was authorised as such, and refused where it would have made the object.
            if code == 403 && word(&event["responseStatus"]["message"]).contains("cannot create resource") {
                refused.insert(right("create", &group, &resource));
            }
            done.insert(right(&verb, &group, &resource));
        }
        Ok((done, refused))
    }

    /// What the product's accounts were refused for want of a right since this control plane started: `USER: RIGHT`. What was allowed at another
    /// time is not missing: an API server that has just started refuses until it has read the rules.
    pub fn refused(&self) -> Result<BTreeSet<String>> {
        let text = std::fs::read_to_string(self.directory().join("audit.log")).context("cannot read the audit log")?;
        if !text.contains(r#""authorization.k8s.io/decision":"forbid""#) {
            return Ok(BTreeSet::new());
        }
        let (mut allowed, mut forbidden) = (BTreeSet::new(), BTreeSet::new());
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).with_context(|| format!("an odd line in the audit log: {line}"))?;
            let word = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let right = right(word("/verb"), word("/objectRef/apiGroup"), word("/objectRef/resource"));
            let call = format!("{}: {right}", word("/user/username"));
            match event["annotations"]["authorization.k8s.io/decision"].as_str() {
                Some("allow") => allowed.insert(call),
                Some("forbid") => forbidden.insert(call),
                _ => false,
            };
        }
        Ok(forbidden.difference(&allowed).cloned().collect())
    }

    /// What the `ClusterRole` of this name, and the `Role` in [`NAMESPACE`] if there is one, allow.
    pub async fn rights(&self, name: &str) -> Result<BTreeSet<Right>> {
        let (everywhere, here): (Api<ClusterRole>, Api<Role>) =
            (Api::all(self.client()?), Api::namespaced(self.client()?, NAMESPACE));
        let rules = everywhere.get(name).await?.rules.unwrap_or_default();
        let more = here.get_opt(name).await?.and_then(|role| role.rules).unwrap_or_default();
        Ok(rules.iter().chain(&more).flat_map(expanded).collect())
    }
}

fn expanded(rule: &PolicyRule) -> Vec<Right> {
    let mut rights = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            rights.extend(rule.verbs.iter().map(|verb| right(verb, group, resource)));
        }
    }
    rights
}
