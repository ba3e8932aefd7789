//! What a scenario has: a namespace of its own, VMs in it, policies for it, and questions about what became of them. Everything goes when it
//! is over, whatever its end.
//!
//! In: a [`Cluster`]. Out: helpers that wait on conditions, with the state of the namespace in the error.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api,
    api::{DeleteParams, DynamicObject, ListParams, PostParams},
};
use migvisor::{
    api::{
        MigrationForecast,
        names::{LEASE, annotation},
    },
    model::forecast::Verdict,
};
use serde_json::{Value, json};

use super::{Cluster, Load};
use crate::{
    cluster::{Output, account::NAMESPACE, wait_for},
    kubevirt::{objects, vmim_manifest},
};

/// For what takes no longer than an API server that is busy.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// Bytes per second that a migration gets in a scene, unless it says otherwise.
const BANDWIDTH: &str = "64Mi";
/// `completionTimeoutPerGiB` in a scene: enough for what converges.
const SECONDS_PER_GB: u64 = 5;

/// See the module.
pub struct Scene<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The namespace of this scene alone.
    pub namespace: String,
    /// What kubectl has to do at the end.
    undo: Mutex<Vec<Vec<String>>>,
}

impl<'a> Scene<'a> {
    /// A scene, in which migrations get 64 MiB/s and 5 s per GB, by a MigrationPolicy for its namespace.
    pub async fn open(cluster: &'a Cluster, name: &str) -> Result<Self> {
        let prefix: String = name.chars().map(|it| if it == '_' { '-' } else { it }).take(30).collect();
        let namespaces: Api<Namespace> = Api::all(cluster.client()?);
        let wanted: Namespace = serde_json::from_value(json!({ "metadata": { "generateName": format!("{prefix}-") } }))?;
        let namespace = namespaces.create(&PostParams::default(), &wanted).await.context("cannot create a namespace")?;
        let namespace = namespace.metadata.name.unwrap_or_default();
        let scene = Self { cluster, namespace, undo: Mutex::default() };
        let fields = json!({ "bandwidthPerMigration": BANDWIDTH, "completionTimeoutPerGiB": SECONDS_PER_GB });
        scene.migration_policy("scene", &json!({}), fields).await?;
        Ok(scene)
    }

    /// Takes everything away again, and waits until the VMs are gone; the rest goes by itself.
    pub async fn close(self) -> Result<()> {
        let undo = std::mem::take(&mut *self.undo.lock().unwrap_or_else(PoisonError::into_inner));
        let mut failed = None;
        for args in undo.iter().rev() {
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            failed = self.cluster.kubectl().run(&args, "").await.and_then(Output::ok).err().or(failed);
        }
        let namespaces: Api<Namespace> = Api::all(self.cluster.client()?);
        namespaces.delete(&self.namespace, &DeleteParams::default()).await.context("cannot delete the namespace")?;
        let vms = objects::vmis(&self.cluster.client()?, &self.namespace);
        vms.delete_collection(&DeleteParams::default(), &ListParams::default()).await.context("cannot delete the VMs")?;
        let gone = async || Ok(vms.list_metadata(&ListParams::default()).await?.items.is_empty().then_some(()));
        self.until("the VMs to go", self.cluster.patience(), gone).await?;
        failed.map_or(Ok(()), Err)
    }

    /// What kubectl shall do when the scene is over, whatever its end.
    pub fn at_the_end(&self, args: &[&str]) {
        let args = args.iter().map(|&it| it.to_owned()).collect();
        self.undo.lock().unwrap_or_else(PoisonError::into_inner).push(args);
    }

    /// Runs kubectl, which has to succeed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl().run(args, "").await?.ok()
    }

    /// Merges a patch into an object of the scene's namespace.
    pub async fn patch(&self, kind: &str, name: &str, patch: &Value) -> Result<()> {
        let patch = patch.to_string();
        self.kubectl(&["patch", kind, name, "-n", &self.namespace, "--type=merge", "-p", &patch]).await.map(drop)
    }

    /// A running VM whose guest does this.
    pub async fn vm(&self, name: &str, load: Load) -> Result<()> {
        self.vm_with(name, load, &json!({}), None).await
    }

    /// A running VM with these labels, on that node.
    pub async fn vm_with(&self, name: &str, load: Load, labels: &Value, node: Option<&str>) -> Result<()> {
        let booted = self.cluster.boot(&self.namespace, name, load, labels, node).await;
        booted.with_context(|| format!("the VM {name} does not run"))
    }

    /// The name of a cluster-wide object of this scene.
    pub fn own(&self, name: &str) -> String {
        format!("{}-{name}", self.namespace)
    }

    /// A PredictionPolicy for this scene's VMs in this mode, called `own("policy")`.
    pub async fn policy(&self, mode: &str) -> Result<()> {
        self.prediction_policy("policy", &json!({}), json!({ "mode": mode })).await
    }

    /// A PredictionPolicy called `own(name)` for this scene's VMs with these labels.
    pub async fn prediction_policy(&self, name: &str, labels: &Value, spec: Value) -> Result<()> {
        self.selecting("migvisor.io/v1alpha1", "PredictionPolicy", name, labels, spec).await
    }

    /// Changes the PredictionPolicy of [`Scene::policy`].
    pub async fn change_policy(&self, spec: &Value) -> Result<()> {
        let (name, patch) = (self.own("policy"), json!({ "spec": spec }).to_string());
        self.kubectl(&["patch", "predictionpolicy", &name, "--type=merge", "-p", &patch]).await.map(drop)
    }

    /// KubeVirt's MigrationPolicy called `own(name)` for this scene's VMs with these labels.
    pub async fn migration_policy(&self, name: &str, labels: &Value, spec: Value) -> Result<()> {
        self.selecting("migrations.kubevirt.io/v1alpha1", "MigrationPolicy", name, labels, spec).await
    }

    /// Changes what every migration of this scene is given.
    pub async fn change_migrations(&self, spec: &Value) -> Result<()> {
        let (name, patch) = (self.own("scene"), json!({ "spec": spec }).to_string());
        self.kubectl(&["patch", "migrationpolicy", &name, "--type=merge", "-p", &patch]).await.map(drop)
    }

    async fn selecting(&self, api: &str, kind: &str, name: &str, labels: &Value, mut spec: Value) -> Result<()> {
        let name = self.own(name);
        spec["selectors"] = json!({
            "namespaceSelector": { "kubernetes.io/metadata.name": self.namespace },
            "virtualMachineInstanceSelector": labels,
        });
        let object = json!({ "apiVersion": api, "kind": kind, "metadata": { "name": name }, "spec": spec });
        self.cluster.kubectl().accepts(&object.to_string()).await?;
        self.at_the_end(&["delete", kind, &name, "--ignore-not-found"]);
        Ok(())
    }

    /// A migration of this VM with these annotations.
    pub fn migration(&self, name: &str, vm: &str, annotations: &Value) -> Value {
        let mut manifest = vmim_manifest(&self.namespace, name, vm);
        manifest["metadata"]["annotations"] = annotations.clone();
        manifest
    }

    /// Migrates a VM; it has to be let through. What kubectl said, warnings included.
    pub async fn migrate(&self, name: &str, vm: &str) -> Result<Output> {
        self.cluster.kubectl().accepts(&self.migration(name, vm, &json!({})).to_string()).await
    }

    /// Migrates a VM to where no node is: its target pod is never placed, and the migration takes one of KubeVirt's places.
    pub async fn migrate_nowhere(&self, name: &str, vm: &str) -> Result<()> {
        let mut manifest = self.migration(name, vm, &json!({}));
        manifest["spec"]["addedNodeSelector"] = json!({ "e2e.migvisor.io/nobody": "has-this" });
        self.cluster.kubectl().accepts(&manifest.to_string()).await.map(drop)
    }

    /// What would become of this migration: every webhook is asked, nothing is kept.
    pub async fn rehearse(&self, manifest: &Value) -> Result<Output> {
        self.cluster.kubectl().run(&["create", "--dry-run=server", "-o", "json", "-f", "-"], &manifest.to_string()).await
    }

    /// The same, asked for by KubeVirt's own controller.
    pub async fn rehearse_as_kubevirt(&self, manifest: &Value) -> Result<Output> {
        let namespace = self.kubectl(&["get", "kubevirts", "-A", "-o", "jsonpath={.items[0].metadata.namespace}"]).await?;
        let user = format!("--as=system:serviceaccount:{}:kubevirt-controller", namespace.trim());
        let create = ["create", "--dry-run=server", "-o", "json", &user, "--as-group=system:masters", "-f", "-"];
        self.cluster.kubectl().run(&create, &manifest.to_string()).await
    }

    /// The annotations that an admitted migration of this VM would have, and what kubectl warned of.
    pub async fn rehearsed(&self, vm: &str) -> Result<(Value, String)> {
        let output = self.rehearse(&self.migration("rehearsal", vm, &json!({}))).await?;
        let warnings = output.stderr.clone();
        let object: Value = serde_json::from_str(&output.ok()?)?;
        Ok((object["metadata"]["annotations"].clone(), warnings))
    }

    /// Waits until admission says this of migrations of a VM: the verdict, and whether it warns. Returns the annotations.
    pub async fn rehearses(&self, vm: &str, verdict: &str, warned: bool) -> Result<Value> {
        let what = format!("admission to say {verdict} of {vm}, {} a warning", if warned { "with" } else { "without" });
        let probe = async || {
            let (annotations, warnings) = self.rehearsed(vm).await?;
            let right = annotations[annotation::VERDICT] == verdict && warnings.contains("Warning: migvisor") == warned;
            Ok(right.then_some(annotations))
        };
        self.until(&what, SOON, probe).await
    }

    /// Waits until a VM of [`Load::Settling`] that ran at this time has come to rest.
    pub async fn settled(&self, booted: Instant) {
        tokio::time::sleep_until((booted + self.cluster.settles_after()).into()).await;
    }

    /// Waits until the probe has something.
    pub async fn until<T>(&self, what: &str, deadline: Duration, probe: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
        match wait_for(what, deadline, probe).await {
            Ok(value) => Ok(value),
            Err(error) => Err(error).context(self.cluster.kubectl().dump(&self.namespace).await),
        }
    }

    /// The forecasts of the scene.
    pub fn forecasts(&self) -> Result<Api<MigrationForecast>> {
        Ok(Api::namespaced(self.cluster.client()?, &self.namespace))
    }

    /// Waits until the forecast of this VM is as wanted.
    pub async fn forecast_that(
        &self,
        vm: &str,
        what: &str,
        deadline: Duration,
        holds: impl Fn(&MigrationForecast) -> bool,
    ) -> Result<MigrationForecast> {
        let api = self.forecasts()?;
        self.until(&format!("the forecast of {vm} that {what}"), deadline, async || Ok(api.get_opt(vm).await?.filter(&holds)))
            .await
    }

    /// Waits until the present question about this VM is answered with this verdict.
    pub async fn answered(&self, vm: &str, verdict: Verdict) -> Result<MigrationForecast> {
        let says = |forecast: &MigrationForecast| forecast.answer().is_some_and(|answer| answer.verdict == Some(verdict));
        let forecast = self.forecast_that(vm, &format!("says {verdict:?}"), self.cluster.patience(), says).await?;
        // Admission has its own watch.
        self.until(&format!("admission to know that {vm} {verdict:?}"), SOON, async || {
            let output = self.rehearse(&self.migration("rehearsal", vm, &json!({}))).await?;
            let known = !output.success && output.stderr.contains("migvisor forecasts")
                || output.stdout.contains(&format!("\"{}\": \"{verdict:?}\"", annotation::VERDICT));
            Ok(known.then_some(()))
        })
        .await?;
        Ok(forecast)
    }

    /// A VMIM as it is; `None`: there is none.
    pub async fn vmim(&self, name: &str) -> Result<Option<DynamicObject>> {
        Ok(objects::vmims(&self.cluster.client()?, &self.namespace).get_opt(name).await?)
    }

    /// All VMIMs of the scene.
    pub async fn vmims(&self) -> Result<Vec<DynamicObject>> {
        Ok(objects::vmims(&self.cluster.client()?, &self.namespace).list(&ListParams::default()).await?.items)
    }

    /// A VMI as it is.
    pub async fn vmi(&self, name: &str) -> Result<Value> {
        Ok(serde_json::to_value(objects::vmis(&self.cluster.client()?, &self.namespace).get(name).await?)?)
    }

    /// Waits until a VMIM is in one of these phases; returns the phase.
    pub async fn reaches(&self, name: &str, phases: &[&str], deadline: Duration) -> Result<String> {
        let what = format!("the migration {name} to be {}", phases.join(" or "));
        let probe = async || {
            let found = self.vmim(name).await?.map(|vmim| phase(&vmim)).unwrap_or_default();
            Ok(phases.contains(&found.as_str()).then_some(found))
        };
        self.until(&what, deadline, probe).await
    }

    /// Waits until a VMIM has come to its end; returns its phase.
    pub async fn ended(&self, name: &str) -> Result<String> {
        self.reaches(name, &["Succeeded", "Failed"], self.cluster.patience() * 2).await
    }

    /// Waits until an event with this reason about this object is there; returns its words and its type.
    pub async fn event(&self, reason: &str, kind: &str, name: &str) -> Result<(String, String)> {
        let what = format!("the event {reason} about {name}");
        self.until(&what, SOON, async || Ok(self.events(reason, kind, name).await?.into_iter().next())).await
    }

    /// The events with this reason about this object so far: words and type.
    pub async fn events(&self, reason: &str, kind: &str, name: &str) -> Result<Vec<(String, String)>> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let found = self.raw_events(reason, kind, name).await?;
        Ok(found.iter().map(|event| (text(&event["note"]), text(&event["type"]))).collect())
    }

    /// How often an event with this reason about this object was told: what is told again is counted on.
    pub async fn times(&self, reason: &str, kind: &str, name: &str) -> Result<u64> {
        let found = self.raw_events(reason, kind, name).await?;
        let times = |event: &Value| event["series"]["count"].as_u64().or_else(|| event["deprecatedCount"].as_u64());
        Ok(found.iter().map(|event| times(event).unwrap_or(1).max(1)).sum())
    }

    async fn raw_events(&self, reason: &str, kind: &str, name: &str) -> Result<Vec<Value>> {
        let resource = kube::api::ApiResource::erase::<k8s_openapi::api::events::v1::Event>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.cluster.client()?, &self.namespace, &resource);
        let all = api.list(&ListParams::default()).await?.items.into_iter().map(|event| event.data);
        let about = |data: &Value| data["regarding"]["kind"] == kind && data["regarding"]["name"] == name;
        Ok(all.filter(|data| data["reason"] == reason && about(data)).collect())
    }

    /// Which of the controllers leads, or led last.
    pub async fn leader(&self) -> Result<String> {
        self.kubectl(&["get", "lease", LEASE, "-n", NAMESPACE, "-o", "jsonpath={.spec.holderIdentity}"]).await
    }

    /// Waits until a line of the controller's metrics has at least this value. ([`super::Need::Metrics`])
    pub async fn metric_reaches(&self, line: &str, least: f64) -> Result<()> {
        let probe = async || {
            let text = self.cluster.metrics().await?;
            let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')?.parse::<f64>().ok());
            Ok(value.filter(|value| *value >= least).map(drop))
        };
        self.until(&format!("{line} to reach {least}"), SOON, probe).await
    }
}

/// The phase of a VMIM; empty where it has none yet.
fn phase(vmim: &DynamicObject) -> String {
    vmim.data["status"]["phase"].as_str().unwrap_or_default().to_owned()
}

/// The reason among a migration's annotations.
pub fn reason_of(annotations: &Value) -> &str {
    annotations[annotation::REASON].as_str().unwrap_or_default()
}
