//! Admission: a serving certificate for the product's webhook, and the configurations that make the API server call it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{Authority, ControlPlane, write_private};

/// What both sides of a webhook need.
#[derive(Debug, Clone)]
pub struct WebhookCertificate {
    /// PEM file of the serving certificate for 127.0.0.1 and localhost.
    pub certificate: PathBuf,
    /// PEM file of its key.
    pub key: PathBuf,
    /// PEM of the authority that signed it: the `caBundle` before its base64.
    pub authority: String,
}

impl ControlPlane {
    /// A new authority, and a certificate for the webhook signed by it, in files of this control plane's directory.
    pub fn webhook_certificate(&self) -> Result<WebhookCertificate> {
        let authority = Authority::new("migvisor-webhook")?;
        let pair = authority.server(&[])?;
        let name = self.unique("webhook");
        let (certificate, key) = (self.directory().join(format!("{name}.crt")), self.directory().join(format!("{name}.key")));
        write_private(&certificate, &pair.certificate)?;
        write_private(&key, &pair.key)?;
        Ok(WebhookCertificate { certificate, key, authority: authority.certificate().to_owned() })
    }

    /// Has the API server call `https://127.0.0.1:PORT/mutate-vmim` and `/validate-vmim` when a VMIM is created, of any
    /// version (`matchPolicy: Equivalent`), and `/mutate-pod` for target pods of migrations. An absent webhook hinders nobody
    /// (`failurePolicy: Ignore`).
    pub async fn install_webhooks(&self, port: u16, authority_pem: &str) -> Result<()> {
        let webhook = |verb: &str| -> Result<Value> {
            Ok(json!({
                "name": format!("{verb}-vmim.migvisor.io"),
                "clientConfig": {
                    "url": format!("https://127.0.0.1:{port}/{verb}-vmim"),
                    "caBundle": serde_json::to_value(ByteString(authority_pem.as_bytes().to_vec()))?,
                },
                "rules": [{
                    "apiGroups": ["kubevirt.io"],
                    "apiVersions": ["v1"],
                    "resources": ["virtualmachineinstancemigrations"],
                    "operations": ["CREATE"],
                    "scope": "Namespaced",
                }],
                "matchPolicy": "Equivalent",
                "failurePolicy": "Ignore",
                "sideEffects": "None",
                "timeoutSeconds": 5,
                "admissionReviewVersions": ["v1"],
            }))
        };
        let pods = || -> Result<Value> {
            let mut pods = webhook("mutate")?;
            pods["name"] = json!("mutate-pod.migvisor.io");
            pods["clientConfig"]["url"] = json!(format!("https://127.0.0.1:{port}/mutate-pod"));
            pods["rules"][0]["apiGroups"] = json!([""]);
            pods["rules"][0]["resources"] = json!(["pods"]);
            pods["objectSelector"] = json!({
                "matchLabels": { "kubevirt.io": "virt-launcher" },
                "matchExpressions": [{ "key": "kubevirt.io/migrationJobUID", "operator": "Exists" }],
            });
            // KubeVirt makes target pods under a lock of the whole cluster.
            pods["timeoutSeconds"] = json!(1);
            Ok(pods)
        };
        let configuration = |kind: &str, webhooks: Vec<Value>| {
            json!({
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": kind,
                "metadata": { "name": "migvisor" },
                "webhooks": webhooks,
            })
        };
        let parameters = PatchParams::apply("migvisor-e2e").force();
        let mutating: Api<MutatingWebhookConfiguration> = Api::all(self.client()?);
        let body = configuration("MutatingWebhookConfiguration", vec![webhook("mutate")?, pods()?]);
        mutating.patch("migvisor", &parameters, &Patch::Apply(body)).await.context("cannot install the mutating webhook")?;
        let validating: Api<ValidatingWebhookConfiguration> = Api::all(self.client()?);
        let body = configuration("ValidatingWebhookConfiguration", vec![webhook("validate")?]);
        validating.patch("migvisor", &parameters, &Patch::Apply(body)).await.context("cannot install the validating webhook")?;
        Ok(())
    }
}
