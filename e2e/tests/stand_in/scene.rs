//! A shared whole cluster with KubeVirt's kinds; a namespace and a stand-in of its own for each test.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
};
use migvisor::model::units::Bandwidth;
use migvisor_e2e::{
    cluster::ControlPlane,
    kubevirt::{
        Job, KubeVirt, Mover, Outcome,
        objects::{self, Side, create_node, install_crds, running_vmi, vmim_manifest},
    },
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// On a machine that has other work as well.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// Every VMI starts here.
pub(crate) const NODE: &str = "node-a";

/// What a mover was told to do.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) vmi: String,
    pub(crate) source: Side,
    pub(crate) target: Side,
    pub(crate) bandwidth: Bandwidth,
    pub(crate) budget: Option<Duration>,
}

/// Moves nothing, and hands every job's rules to the test.
struct Pretend {
    takes: Duration,
    jobs: mpsc::UnboundedSender<Told>,
    /// While it is false no target gets ready.
    open: watch::Receiver<bool>,
}

impl Mover for Pretend {
    async fn migrate(&self, mut job: Job) -> Outcome {
        let (vmi, source, target) = (job.vmi.clone(), job.source.clone(), job.target.clone());
        self.jobs.send(Told { vmi, source, target, bandwidth: job.bandwidth, budget: job.time_budget }).ok();
        tokio::select! {
            () = tokio::time::sleep(self.takes) => Outcome::success(),
            () = job.aborted() => Outcome::aborted(),
        }
    }

    async fn prepare(&self, _target: &Side) {
        self.open.clone().wait_for(|open| *open).await.ok();
    }
}

/// See the module.
pub(crate) struct Scene {
    pub(crate) plane: Arc<ControlPlane>,
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) jobs: mpsc::UnboundedReceiver<Told>,
    /// Whether targets get ready.
    pub(crate) gate: watch::Sender<bool>,
    _kubevirt: KubeVirt,
}

impl Scene {
    pub(crate) async fn open(name: &str, takes: Duration) -> Self {
        let plane = ControlPlane::shared().await.unwrap();
        let client = plane.client().unwrap();
        install_crds(&client).await.unwrap();
        for node in [NODE, "node-b", "node-c"] {
            create_node(&client, node).await.unwrap();
        }
        plane.nodes_are_ready(&[NODE, "node-b", "node-c"]).await.unwrap();
        let namespace = plane.namespace(name).await.unwrap();
        let (sender, jobs) = mpsc::unbounded_channel();
        let (gate, open) = watch::channel(true);
        let mover = Pretend { takes, jobs: sender, open };
        let kubevirt = KubeVirt::start_in(&plane, &namespace, mover).await.unwrap();
        Self { plane, client, namespace, jobs, gate, _kubevirt: kubevirt }
    }

    pub(crate) async fn vmi(&self, name: &str) -> Side {
        running_vmi(&self.client, &self.namespace, name, NODE, "1Gi").await.unwrap()
    }

    pub(crate) async fn patch_vmi(&self, name: &str, patch: Value) {
        objects::vmis(&self.client, &self.namespace).patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }

    pub(crate) async fn migrate(&self, name: &str, vmi: &str) {
        self.plane.accepts(&vmim_manifest(&self.namespace, name, vmi).to_string()).await.unwrap();
    }

    pub(crate) async fn get_vmim(&self, name: &str) -> Option<Value> {
        let found = objects::vmims(&self.client, &self.namespace).get_opt(name).await.unwrap();
        found.map(|vmim| serde_json::to_value(vmim).unwrap())
    }

    pub(crate) async fn vmims(&self) -> Vec<DynamicObject> {
        objects::vmims(&self.client, &self.namespace).list(&ListParams::default()).await.unwrap().items
    }

    pub(crate) async fn delete_vmim(&self, name: &str) {
        objects::vmims(&self.client, &self.namespace).delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub(crate) async fn get_vmi(&self, name: &str) -> Value {
        serde_json::to_value(objects::vmis(&self.client, &self.namespace).get(name).await.unwrap()).unwrap()
    }

    /// Waits until the VMIM is in this phase.
    pub(crate) async fn reaches(&self, name: &str, phase: &str) -> Value {
        let what = format!("the migration {name} to be {phase}");
        self.until(&what, async || self.get_vmim(name).await.filter(|vmim| vmim["status"]["phase"] == phase)).await
    }

    pub(crate) async fn vanishes(&self, name: &str) {
        self.until(&format!("{name} to vanish"), async || self.get_vmim(name).await.is_none().then_some(())).await;
    }

    pub(crate) async fn until<T>(&self, what: &str, probe: impl AsyncFn() -> Option<T>) -> T {
        self.plane.wait(&self.namespace, what, LONG, async || Ok(probe().await)).await.unwrap()
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The pods of a migration, launcher and others.
    pub(crate) async fn pods_of(&self, migration: &Value) -> Vec<Pod> {
        let label = format!("kubevirt.io/migrationJobUID={}", migration["metadata"]["uid"].as_str().unwrap());
        self.pods().list(&ListParams::default().labels(&label)).await.unwrap().items
    }

    pub(crate) async fn target_pod(&self, migration: &Value) -> Option<Pod> {
        self.pods_of(migration).await.into_iter().find(|pod| pod.labels()["kubevirt.io"] == "virt-launcher")
    }

    /// How often an event with this reason was told about this object, and what it said first.
    pub(crate) async fn events(&self, reason: &str, name: &str) -> (u64, String) {
        let args = ["get", "events.events.k8s.io", "-n", &self.namespace, "-o", "json"];
        let list = self.plane.kubectl(&args, "").await.unwrap().ok().unwrap();
        let list: Value = serde_json::from_str(&list).unwrap();
        let about = |it: &&Value| it["reason"] == reason && it["regarding"]["name"] == name;
        let found: Vec<_> = list["items"].as_array().unwrap().iter().filter(about).collect();
        let count = found.iter().map(|it| it["series"]["count"].as_u64().unwrap_or(1)).sum();
        (count, found.first().map(|it| it["note"].as_str().unwrap_or_default().to_owned()).unwrap_or_default())
    }

    /// Waits until the API server's own admission has taken up a policy that concerns pods or migrations like this one.
    pub(crate) async fn tried(&self, manifest: &Value, taken: impl Fn(&migvisor_e2e::cluster::Output) -> bool) {
        let args = ["create", "--dry-run=server", "-o", "json", "-f", "-"];
        let probe = async || {
            let output = self.plane.kubectl(&args, &manifest.to_string()).await.unwrap();
            taken(&output).then_some(())
        };
        self.until("a policy to be in force", probe).await;
    }

    /// Puts a gate on every launcher that is a target, as a webhook would: by the API server itself.
    pub(crate) async fn gate_target_pods(&self) {
        let constraints = json!({
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": self.namespace } },
            "objectSelector": { "matchLabels": { "kubevirt.io": "virt-launcher" },
                "matchExpressions": [{ "key": "kubevirt.io/migrationJobUID", "operator": "Exists" }] },
            "resourceRules": [{ "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"] }],
        });
        let gate = "Object{spec: Object.spec{schedulingGates: [Object.spec.schedulingGates{name: 'migvisor.io/dry-run'}]}}";
        let spec = json!({
            "matchConstraints": constraints, "failurePolicy": "Fail", "reinvocationPolicy": "Never",
            "mutations": [{ "patchType": "ApplyConfiguration", "applyConfiguration": { "expression": gate } }],
        });
        self.admission_policy("Mutating", spec, json!({})).await;
        let labels = json!({ "kubevirt.io": "virt-launcher", "kubevirt.io/migrationJobUID": "none" });
        let trial = json!({ "apiVersion": "v1", "kind": "Pod",
            "metadata": { "namespace": self.namespace, "name": "trial", "labels": labels },
            "spec": { "containers": [{ "name": "c", "image": "i" }] } });
        self.tried(&trial, |output| output.stdout.contains("schedulingGates")).await;
    }

    /// Refuses every migration in the namespace, as our webhook would; the name of the binding, to lift it.
    pub(crate) async fn refuse_migrations(&self) -> String {
        let constraints = json!({
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": self.namespace } },
            "resourceRules": [{ "apiGroups": ["kubevirt.io"], "apiVersions": ["*"], "operations": ["CREATE"],
                "resources": ["virtualmachineinstancemigrations"] }],
        });
        let validations = json!([{ "expression": "false", "message": "it would never end" }]);
        let spec = json!({ "matchConstraints": constraints, "failurePolicy": "Fail", "validations": validations });
        let name = self.admission_policy("Validating", spec, json!({ "validationActions": ["Deny"] })).await;
        let trial = vmim_manifest(&self.namespace, "trial", "vm1");
        self.tried(&trial, |output| output.stderr.contains("it would never end")).await;
        name
    }

    async fn admission_policy(&self, kind: &str, spec: Value, mut binding: Value) -> String {
        let name = format!("{}-{}", kind.to_lowercase(), self.namespace);
        binding["policyName"] = json!(name);
        let object = |suffix: &str, spec: Value| {
            json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": format!("{kind}AdmissionPolicy{suffix}"),
                "metadata": { "name": name }, "spec": spec })
        };
        let both = json!({ "apiVersion": "v1", "kind": "List", "items": [object("", spec), object("Binding", binding)] });
        self.plane.accepts(&both.to_string()).await.unwrap();
        name
    }

    /// A MigrationPolicy for this namespace and, within it, VMIs with these labels.
    pub(crate) async fn policy(&self, name: &str, labels: Value, fields: Value) {
        let mut manifest = json!({ "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
            "metadata": { "name": name }, "spec": fields });
        manifest["spec"]["selectors"] = json!({
            "namespaceSelector": { "kubernetes.io/metadata.name": self.namespace },
            "virtualMachineInstanceSelector": labels,
        });
        self.plane.accepts(&manifest.to_string()).await.unwrap();
    }
}
