//! What the product's tests share: manifests, questions to the API server, and to the product's metrics.
#![allow(dead_code, unreachable_pub)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::{Api, api::DynamicObject};
use migvisor::api::{
    MigrationForecast, MigrationForecastStatus,
    dry_run::{DryRunPhase, DryRunStatus},
};
use migvisor_e2e::{
    cluster::{ControlPlane, Output},
    kubevirt::vmim_manifest,
    world::{World, get},
};
use serde_json::{Value, json};

/// All guests live here.
pub const NAMESPACE: &str = "default";
/// For what takes no longer than an API server that is busy.
pub const SOON: Duration = Duration::from_secs(20);

/// A policy for every VM, called `house`.
pub fn policy(mode: &str) -> String {
    let (api, kind) = ("migvisor.io/v1alpha1", "PredictionPolicy");
    json!({ "apiVersion": api, "kind": kind, "metadata": { "name": "house" }, "spec": { "selectors": {}, "mode": mode } })
        .to_string()
}

/// A plan.
pub fn plan(name: &str, spec: &Value) -> String {
    json!({ "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationPlan", "metadata": { "name": name }, "spec": spec })
        .to_string()
}

/// A migration of this VM with these annotations.
pub fn migration(name: &str, vmi: &str, annotations: &Value) -> String {
    let mut manifest = vmim_manifest(NAMESPACE, name, vmi);
    manifest["metadata"]["annotations"] = annotations.clone();
    manifest.to_string()
}

/// What would become of a migration: every webhook is asked, nothing is kept.
pub async fn rehearse(world: &World, vmi: &str, annotations: Value) -> Result<Output> {
    let manifest = migration("rehearsal", vmi, &annotations);
    world.plane().kubectl(&["create", "--dry-run=server", "-o", "json", "-f", "-"], &manifest).await
}

/// The annotations that an admitted rehearsal would have, and the warnings that came with it.
pub async fn rehearsed(world: &World, vmi: &str) -> Result<(Value, String)> {
    let output = rehearse(world, vmi, json!({})).await?;
    let warnings = output.stderr.clone();
    let object: Value = serde_json::from_str(&output.ok()?)?;
    Ok((object["metadata"]["annotations"].clone(), warnings))
}

/// The forecasts.
pub fn forecasts(world: &World) -> Result<Api<MigrationForecast>> {
    Ok(Api::namespaced(world.plane().client()?, NAMESPACE))
}

/// Waits until the forecast of this name is as wanted.
pub async fn forecast_that(
    world: &World,
    name: &str,
    what: &str,
    deadline: Duration,
    holds: impl Fn(&MigrationForecast) -> bool,
) -> Result<MigrationForecast> {
    let api = forecasts(world)?;
    let what = format!("the forecast of {name} that {what}");
    world.plane().wait(NAMESPACE, &what, deadline, || async { Ok(api.get_opt(name).await?.filter(&holds)) }).await
}

/// Waits until an event with this reason about this object is there; returns its words and its type.
pub async fn event(world: &World, reason: &str, kind: &str, name: &str) -> Result<(String, String)> {
    event_in(world.plane(), reason, kind, name).await
}

/// [`event`], where there is no world.
pub async fn event_in(plane: &ControlPlane, reason: &str, kind: &str, name: &str) -> Result<(String, String)> {
    let resource = kube::api::ApiResource::erase::<k8s_openapi::api::events::v1::Event>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(plane.client()?, NAMESPACE, &resource);
    let of = |event: &DynamicObject| {
        let data = &event.data;
        let about = &data["regarding"];
        (data["reason"] == reason && about["kind"] == kind && about["name"] == name).then(|| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            (text(&data["note"]), text(&data["type"]))
        })
    };
    let probe = || async { Ok(api.list(&kube::api::ListParams::default()).await?.iter().find_map(of)) };
    plane.wait(NAMESPACE, &format!("the event {reason} about {name}"), SOON, probe).await
}

/// The value of one line of the metrics at this address; `None`: no such line yet.
pub async fn metric(address: &str, line: &str) -> Result<Option<f64>> {
    let (status, text) = get(&format!("http://{address}/metrics").parse()?).await?;
    ensure!(status == 200, "no metrics: {status}");
    let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
    value.map(|value| value.parse().with_context(|| format!("{line} is {value}"))).transpose()
}

/// Waits until a metric has at least this value.
pub async fn metric_reaches(world: &World, address: &str, line: &str, least: f64) -> Result<()> {
    let probe = || async { Ok(metric(address, line).await?.filter(|value| *value >= least).map(drop)) };
    world.plane().wait(NAMESPACE, &format!("{line} to reach {least}"), SOON, probe).await
}

/// A review of the creation of this object, as the API server posts it.
pub fn review(object: &Value) -> Vec<u8> {
    let kind = json!({ "group": "kubevirt.io", "version": "v1", "kind": "VirtualMachineInstanceMigration" });
    let resource = json!({ "group": "kubevirt.io", "version": "v1", "resource": "virtualmachineinstancemigrations" });
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "review-1", "kind": kind, "resource": resource, "requestKind": kind, "requestResource": resource,
            "name": "", "namespace": NAMESPACE, "operation": "CREATE", "userInfo": { "username": "ann" },
            "object": object, "oldObject": null, "dryRun": false,
        }
    })
    .to_string()
    .into_bytes()
}

/// Asks for a dry run (`null`: for none any more) as a person would.
pub async fn ask(world: &World, vm: &str, dry_run: &Value) -> Result<()> {
    let patch = json!({ "spec": { "dryRun": dry_run } }).to_string();
    let args = ["patch", "migrationforecast", vm, "-n", NAMESPACE, "--type=merge", "-p", &patch];
    world.plane().kubectl(&args, "").await?.ok().map(drop)
}

/// Waits until the status of a forecast is as wanted.
pub async fn status_that(
    world: &World,
    vm: &str,
    what: &str,
    deadline: Duration,
    holds: impl Fn(&MigrationForecastStatus) -> bool,
) -> Result<MigrationForecastStatus> {
    let has = |forecast: &MigrationForecast| forecast.status.as_ref().is_some_and(&holds);
    forecast_that(world, vm, what, deadline, has).await?.status.context("it has one")
}

/// The dry run of this id, once nothing more comes of it.
pub fn ended(status: &MigrationForecastStatus, id: &str) -> Option<DryRunStatus> {
    status.dry_run.clone().filter(|run| run.id == id && run.phase.is_final())
}

/// The dry run of this id is on its way.
pub fn running(status: &MigrationForecastStatus, id: &str) -> bool {
    let on_its_way =
        |run: &DryRunStatus| run.phase == DryRunPhase::Running && run.iteration.is_some_and(|iteration| iteration > 0);
    status.dry_run.as_ref().is_some_and(|run| run.id == id && on_its_way(run))
}
