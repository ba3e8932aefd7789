//! virt-api: the webhooks through which a VMIM is made or changed, and through which a launcher pod is evicted. After KubeVirt 1.9's
//! `pkg/virt-api/webhooks/{mutating,validating}-webhook/`.
//!
//! In: AdmissionReviews of a real API server, over TLS. Out: verdicts in KubeVirt's words. Its webhooks are installed with
//! `failurePolicy: Fail`, as KubeVirt's are: an API server that asks nobody refuses. What is checked of the schema beyond the CRD's own:
//! that the spec has no field that nobody knows.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context, Result};
use axum::{Json, Router, extract::State, routing::post};
use axum_server::tls_rustls::RustlsConfig;
use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
        core::v1::Pod,
    },
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{
    CONTROLLER, eviction,
    objects::{self, MANAGER},
    read::{condition, flag, is_final, text},
    status::FINALIZER,
};
use crate::cluster::ControlPlane;

const VMI_NAME: &str = "kubevirt.io/vmi-name";
const KNOWN: [&str; 5] = ["vmiName", "addedNodeSelector", "sendTo", "receive", "priority"];

/// What a webhook says: allowed, or the code and the words of a refusal.
pub(super) type Verdict = std::result::Result<(), (u16, String)>;

/// Serves the webhooks and has the API server ask them, about one namespace or all.
pub(super) async fn serve(plane: &ControlPlane, namespace: Option<&str>, tasks: &mut JoinSet<()>) -> Result<()> {
    let client = plane.client()?;
    let certificate = plane.webhook_certificate()?;
    let tls =
        RustlsConfig::from_pem_file(&certificate.certificate, &certificate.key).await.context("no certificate for virt-api")?;
    let port = crate::cluster::free_port()?;
    let router = Router::new()
        .route("/migration-mutate-create", post(async |Json(review): Json<Value>| Json(mutate(&review))))
        .route("/migration-validate-create", post(create))
        .route("/migration-validate-update", post(async |Json(review): Json<Value>| answer(&review, update(&review["request"]))))
        .route("/launcher-eviction-validate", post(evict))
        .with_state(Arc::new(client.clone()));
    let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port))).context("virt-api cannot listen")?;
    listener.set_nonblocking(true)?;
    let server = axum_server::from_tcp_rustls(listener, tls).context("virt-api cannot serve")?;
    tasks.spawn(async move {
        if let Err(error) = server.serve(router.into_make_service()).await {
            tracing::error!("virt-api has ended: {error}");
        }
    });
    install(&client, namespace, port, &certificate.authority).await
}

/// The configurations, called as KubeVirt's are; those of one namespace by its name besides.
async fn install(client: &Client, namespace: Option<&str>, port: u16, authority: &str) -> Result<()> {
    let bundle = serde_json::to_value(ByteString(authority.as_bytes().to_vec()))?;
    let selector = namespace.map_or_else(|| json!({}), |name| json!({ "matchLabels": { "kubernetes.io/metadata.name": name } }));
    let webhook = |name: &str, path: &str, group: &str, resource: &str, operation: &str| {
        json!({
            "name": name,
            "clientConfig": { "url": format!("https://127.0.0.1:{port}/{path}"), "caBundle": bundle },
            "rules": [{ "apiGroups": [group], "apiVersions": ["v1"], "resources": [resource], "operations": [operation] }],
            "namespaceSelector": selector,
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "timeoutSeconds": 10,
            "admissionReviewVersions": ["v1"],
        })
    };
    let vmims = "virtualmachineinstancemigrations";
    let mut interceptor =
        webhook("virt-launcher-eviction-interceptor.kubevirt.io", "launcher-eviction-validate", "", "pods/eviction", "CREATE");
    interceptor["sideEffects"] = json!("NoneOnDryRun");
    let configuration = |kind: &str, name: &str, webhooks: Value| json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": { "name": name }, "webhooks": webhooks });
    let name = |name: &str| namespace.map_or_else(|| name.to_owned(), |namespace| format!("{name}-{namespace}"));
    let parameters = PatchParams::apply(MANAGER).force();
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let create = webhook("migrations-mutator.kubevirt.io", "migration-mutate-create", "kubevirt.io", vmims, "CREATE");
    let body = configuration("MutatingWebhookConfiguration", &name("virt-api-mutator"), json!([create]));
    mutating
        .patch(&name("virt-api-mutator"), &parameters, &Patch::Apply(body))
        .await
        .context("cannot install virt-api's mutator")?;
    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let create = webhook("migration-create-validator.kubevirt.io", "migration-validate-create", "kubevirt.io", vmims, "CREATE");
    let update = webhook("migration-update-validator.kubevirt.io", "migration-validate-update", "kubevirt.io", vmims, "UPDATE");
    let body = configuration("ValidatingWebhookConfiguration", &name("virt-api-validator"), json!([create, update, interceptor]));
    let installed = validating.patch(&name("virt-api-validator"), &parameters, &Patch::Apply(body)).await;
    installed.map(drop).context("cannot install virt-api's validator")
}

fn answer(review: &Value, verdict: Verdict) -> Json<Value> {
    let mut response = json!({ "uid": review["request"]["uid"], "allowed": verdict.is_ok() });
    if let Err((code, message)) = verdict {
        response["status"] = json!({ "code": code, "message": message });
    }
    Json(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
}

/// The label and the finalizer: the whole metadata is replaced, as KubeVirt does it.
fn mutate(review: &Value) -> Value {
    let object = &review["request"]["object"];
    let mut metadata = object["metadata"].clone();
    // One that names no VMI is the validator's to refuse.
    metadata["labels"][VMI_NAME] = json!(text(object, "/spec/vmiName"));
    let mut finalizers = metadata["finalizers"].as_array().cloned().unwrap_or_default();
    finalizers.push(json!(FINALIZER));
    metadata["finalizers"] = json!(finalizers);
    let patch = json!([{ "op": "replace", "path": "/metadata", "value": metadata }]).to_string();
    let mut response = answer(review, Ok(())).0;
    response["response"]["patchType"] = json!("JSONPatch");
    response["response"]["patch"] = json!(ByteString(patch.into_bytes()));
    response
}

async fn create(State(client): State<Arc<Client>>, Json(review): Json<Value>) -> Json<Value> {
    let verdict = admit(&client, &review["request"]).await;
    answer(&review, verdict)
}

async fn evict(State(client): State<Arc<Client>>, Json(review): Json<Value>) -> Json<Value> {
    let verdict = eviction::admit(&client, &review["request"]).await;
    answer(&review, verdict)
}

fn deny<T>(code: u16, message: impl Into<String>) -> std::result::Result<T, (u16, String)> {
    Err((code, message.into()))
}

/// `MigrationCreateAdmitter`
async fn admit(client: &Client, request: &Value) -> Verdict {
    let (spec, namespace) = (&request["object"]["spec"], text(request, "/namespace"));
    if let Some(odd) = spec.as_object().into_iter().flatten().map(|(key, _)| key).find(|key| !KNOWN.contains(&key.as_str())) {
        return deny(422, format!("spec.{odd} in body is a forbidden property"));
    }
    let name = text(spec, "/vmiName");
    if name.is_empty() {
        return deny(422, "vmiName is missing");
    }
    if !spec["priority"].is_null() && text(request, "/userInfo/username") != CONTROLLER {
        return deny(422, "Migration priority queue, only virt-controller is allowed to set priority field");
    }
    let failed = |error: kube::Error| (500, error.to_string());
    let Some(vmi) = objects::vmis(client, &namespace).get_opt(&name).await.map_err(failed)? else {
        return deny(400, format!("the VMI \"{namespace}/{name}\" does not exist"));
    };
    if is_final(&vmi) {
        return deny(400, "Cannot migrate VMI in finalized state.");
    }
    if condition(&vmi, "LiveMigratable").as_deref() == Some("False") {
        let conditions = vmi.data.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
        let why = conditions.iter().find(|it| it["type"] == "LiveMigratable").cloned().unwrap_or_default();
        let decentralized = !spec["sendTo"].is_null() || !spec["receive"].is_null();
        if !(decentralized && why["reason"] == "DisksNotLiveMigratable") {
            return deny(
                400,
                format!("Cannot migrate VMI, Reason: {}, Message: {}", text(&why, "/reason"), text(&why, "/message")),
            );
        }
    }
    let labelled = ListParams::default().labels(&format!("{VMI_NAME}={name}"));
    let others = objects::vmims(client, &namespace).list(&labelled).await.map_err(failed)?;
    if let Some(other) = others.iter().find(|other| !is_final(other)) {
        let (uid, vmi) = (other.uid().unwrap_or_default(), text(&other.data, "/spec/vmiName"));
        let message =
            format!("in-flight migration detected. Active migration job ({uid}) is currently already in progress for VMI {vmi}.");
        return deny(400, message);
    }
    let kubevirts: Api<kube::api::DynamicObject> = Api::all_with(client.clone(), &objects::kubevirt_resource());
    let kubevirt = kubevirts.list(&ListParams::default()).await.map_err(failed)?.items.into_iter().next();
    let gates = kubevirt.as_ref().and_then(|it| it.data.pointer("/spec/configuration/developerConfiguration/featureGates"));
    let gate = gates.and_then(Value::as_array).is_some_and(|gates| gates.iter().any(|it| it == "DecentralizedLiveMigration"));
    if (!spec["sendTo"].is_null() || !spec["receive"].is_null()) && !gate {
        return deny(422, "DecentralizedLiveMigration feature gate is not enabled in kubevirt resource");
    }
    Ok(())
}

/// `MigrationUpdateAdmitter`
fn update(request: &Value) -> Verdict {
    let (new, old) = (&request["object"], &request["oldObject"]);
    if new["spec"] != old["spec"] {
        return deny(422, "update of Migration object's spec is restricted");
    }
    let label = |object: &Value| object["metadata"]["labels"][VMI_NAME].clone();
    let ended = matches!(text(new, "/status/phase").as_str(), "Succeeded" | "Failed");
    if !ended && !label(old).is_null() && label(new) != label(old) {
        return deny(422, "selector label can't be modified on an in-flight migration");
    }
    Ok(())
}

/// Is this a pod that runs a guest?
pub(super) fn is_launcher(pod: &Pod) -> bool {
    pod.labels().get("kubevirt.io").is_some_and(|it| it == "virt-launcher")
}

/// Is the request one that changes nothing?
pub(super) fn is_dry_run(request: &Value) -> bool {
    flag(request, "/dryRun") || request.pointer("/object/deleteOptions/dryRun/0").is_some_and(|it| it == "All")
}
