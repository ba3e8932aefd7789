//! Writes what [`super::observe`] and [`super::hold`] decided, and nothing else: the manager's part of forecasts, the removal of our gate from a
//! target pod, the deletion of a migration that is abandoned, the MigrationPolicy and the one label of a VM by which a migration is forced, and events.

use std::{fmt, time::Duration};

use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{ObjectReference, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::warn;

use super::{
    force,
    metrics::ManagerMetrics,
    observe::{Notice, OwnStatus},
};
use crate::api::{
    MigrationForecast,
    kubevirt::{MigrationPolicy, VirtualMachineInstance, VirtualMachineInstanceMigration},
    migration::HintPhase,
    names,
    remedy::RemedyAnswer,
};

/// An API server that takes longer is treated as one that is away.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// What an event can carry, in bytes.
const NOTE: usize = 1000;

/// Why something could not be written. It is tried again, with backoff.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The API server refused.
    #[error("cannot {what} {object}: {source}")]
    Refused {
        /// Which write.
        what: &'static str,
        /// Of what.
        object: String,
        /// Why.
        source: Box<kube::Error>,
    },
    /// The API server did not answer.
    #[error("cannot {what} {object}: the API server did not answer within {} s", PATIENCE.as_secs())]
    Timeout {
        /// Which write.
        what: &'static str,
        /// Of what.
        object: String,
    },
}

/// The writing end.
#[derive(Clone)]
pub(super) struct Writer {
    client: Client,
    recorder: Recorder,
    metrics: ManagerMetrics,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writer")
    }
}

impl Writer {
    pub(super) fn new(client: Client, instance: Option<String>, metrics: ManagerMetrics) -> Self {
        let recorder = Recorder::new(client.clone(), Reporter { controller: names::MANAGER.to_owned(), instance });
        Self { client, recorder, metrics }
    }

    fn namespaced<K>(&self, object: &K) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), object.meta().namespace.as_deref().unwrap_or_default())
    }

    /// Writes the question.
    pub(super) async fn ask(&self, wanted: &MigrationForecast) -> Result<(), WriteError> {
        let (api, name) = (self.namespaced(wanted), wanted.name_any());
        let parameters = PatchParams::apply(names::MANAGER).force();
        self.write("apply", "forecast", wanted, api.patch(&name, &parameters, &Patch::Apply(wanted))).await.map(drop)
    }

    /// Writes the manager's part of the status.
    pub(super) async fn tell(&self, forecast: &MigrationForecast, own: &OwnStatus) -> Result<(), WriteError> {
        let (api, name) = (self.namespaced(forecast), forecast.name_any());
        let mut status = json!({ "conditions": own.conditions });
        if let (Some(outcome), Some(fields)) = (&own.outcome, status.as_object_mut()) {
            fields.insert("outcome".to_owned(), json!(outcome));
        }
        let body = json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast",
            "metadata": { "name": name }, "status": status,
        });
        let parameters = PatchParams::apply(names::MANAGER).force();
        self.write("apply the status of", "status", forecast, api.patch_status(&name, &parameters, &Patch::Apply(&body)))
            .await
            .map(drop)
    }

    /// Deletes a forecast that nothing is to be asked by any more, if it still is the one that was seen.
    pub(super) async fn delete(&self, forecast: &MigrationForecast) -> Result<(), WriteError> {
        let (api, name, parameters) = (self.namespaced(forecast), forecast.name_any(), only_this(forecast.uid()));
        gone_is_done(self.write("delete", "forecast", forecast, api.delete(&name, &parameters)).await)
    }

    /// Tells the agent that a migration waits for its dry run no more.
    pub(super) async fn no_longer_held(&self, forecast: &MigrationForecast) -> Result<(), WriteError> {
        let (api, name): (Api<MigrationForecast>, _) = (self.namespaced(forecast), forecast.name_any());
        let patch = json!({ "metadata": { "annotations": { names::hint::PHASE: HintPhase::Pending.as_str() } } });
        // By the same hand that applies it otherwise, or the next leader would leave it as it is.
        let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
        self.write("tell the agent of", "forecast", forecast, api.patch(&name, &parameters, &Patch::Merge(patch))).await.map(drop)
    }

    /// Takes our gate off a target pod, if it still is the one that was seen.
    pub(super) async fn let_go(&self, pod: &Pod) -> Result<(), WriteError> {
        let (api, name): (Api<Pod>, _) = (self.namespaced(pod), pod.name_any());
        let patch = json!({
            "metadata": { "uid": pod.metadata.uid },
            "spec": { "schedulingGates": [{ "name": names::GATE, "$patch": "delete" }] },
        });
        let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
        gone_is_done(self.write("take the gate off", "pod", pod, api.patch(&name, &parameters, &Patch::Strategic(patch))).await)
    }

    /// Deletes a migration, if it still is as it was seen: one that has been handed to the nodes meanwhile goes its way.
    pub(super) async fn abandon(&self, migration: &VirtualMachineInstanceMigration) -> Result<(), WriteError> {
        // Our type knows a part of it: a deletion is answered with the whole, or with a status.
        let resource = ApiResource::erase::<VirtualMachineInstanceMigration>(&());
        let namespace = migration.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
        let resource_version = migration.resource_version();
        let preconditions = Some(Preconditions { uid: migration.uid(), resource_version });
        let (name, parameters) = (migration.name_any(), DeleteParams { preconditions, ..DeleteParams::default() });
        match self.write("delete", "migration", migration, api.delete(&name, &parameters)).await {
            Err(WriteError::Refused { source, .. }) if matches!(&*source, kube::Error::Api(status) if status.is_not_found()) => {
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Applies a remedy to one migration: first our MigrationPolicy, whose selector nothing matches yet, then the label that it selects by.
    /// `theirs`: the policy that would win, taken over with all of its fields.
    pub(super) async fn force(
        &self,
        vmi: &VirtualMachineInstance,
        migration: &VirtualMachineInstanceMigration,
        theirs: Option<&str>,
        remedy: &RemedyAnswer,
    ) -> Result<(), WriteError> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &ApiResource::erase::<MigrationPolicy>(&()));
        let winner = match theirs {
            Some(name) => self.write("read", "migrationpolicy", migration, api.get_opt(name)).await?,
            None => None,
        };
        let winner = winner.and_then(|winner| serde_json::to_value(winner).ok());
        let uid = migration.uid().unwrap_or_default();
        let policy = force::policy(winner.as_ref(), vmi, &uid, remedy);
        let parameters = PatchParams::apply(names::MANAGER).force();
        let (ours, policy) = (force::name(&uid), Patch::Apply(policy));
        let applied = api.patch(&ours, &parameters, &policy);
        self.write("apply the MigrationPolicy that forces", "migrationpolicy", migration, applied).await?;
        self.label(vmi, Some(&uid)).await
    }

    /// Puts the label on a VM by which our MigrationPolicy selects it, or takes it off.
    pub(super) async fn label(&self, vmi: &VirtualMachineInstance, migration_uid: Option<&str>) -> Result<(), WriteError> {
        gone_is_done(self.touch("label", vmi, json!({ "labels": { names::FORCE_LABEL: migration_uid } })).await)
    }

    /// Touches a VM that KubeVirt waits to move, so that it tries again now.
    pub(super) async fn nudge(&self, vmi: &VirtualMachineInstance) -> Result<(), WriteError> {
        let metadata = json!({ "annotations": { names::NUDGE: Timestamp::now().to_string() } });
        gone_is_done(self.touch("nudge", vmi, metadata).await)
    }

    /// Merges this into a VM's metadata, if it still is the VM that was seen.
    async fn touch(
        &self,
        what: &'static str,
        vmi: &VirtualMachineInstance,
        mut metadata: Value,
    ) -> Result<DynamicObject, WriteError> {
        let resource = ApiResource::erase::<VirtualMachineInstance>(&());
        let namespace = vmi.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
        metadata["uid"] = json!(vmi.metadata.uid);
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        let (name, parameters) =
            (vmi.name_any(), PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() });
        self.write(what, "vmi", vmi, api.patch(&name, &parameters, &patch)).await
    }

    /// Deletes a MigrationPolicy of ours.
    pub(super) async fn delete_policy(&self, policy: &MigrationPolicy) -> Result<(), WriteError> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &ApiResource::erase::<MigrationPolicy>(&()));
        let (name, parameters) = (policy.name_any(), only_this(policy.metadata.uid.clone()));
        gone_is_done(self.write("delete", "migrationpolicy", policy, api.delete(&name, &parameters)).await)
    }

    /// Publishes an event. Events are a courtesy: a failure is logged, and nothing waits for it.
    pub(super) async fn notify(&self, about: &ObjectReference, notice: Notice) {
        let mut note = notice.note;
        if note.len() > NOTE {
            let end = (0..=NOTE).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0);
            note.truncate(end);
            note.push('…');
        }
        let event = Event {
            type_: if notice.warning { EventType::Warning } else { EventType::Normal },
            reason: notice.reason.to_owned(),
            note: Some(note),
            action: "Forecast".to_owned(),
            secondary: None,
        };
        let result = timeout(PATIENCE, self.recorder.publish(&event, about)).await;
        let result = result.map_err(|_| "no answer".to_owned()).and_then(|result| result.map_err(|error| error.to_string()));
        self.count("event", result.is_ok());
        if let Err(error) = result {
            warn!(reason = event.reason, namespace = about.namespace, name = about.name, error, "cannot publish an event");
        }
    }

    async fn write<K: Resource<DynamicType = ()>, T>(
        &self,
        what: &'static str,
        label: &str,
        about: &K,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, WriteError> {
        let object = || format!("{} {}/{}", K::kind(&()), about.namespace().unwrap_or_default(), about.name_any());
        let result = match timeout(PATIENCE, call).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(source)) => Err(WriteError::Refused { what, object: object(), source: Box::new(source) }),
            Err(_) => Err(WriteError::Timeout { what, object: object() }),
        };
        self.count(label, result.is_ok());
        result
    }

    /// Counts a write, by what was written and whether it went well.
    pub(super) fn count(&self, label: &str, worked: bool) {
        self.metrics.writes.with_label_values(&[label, if worked { "success" } else { "failure" }]).inc();
    }
}

/// A deletion of this object and of no other one of its name.
fn only_this(uid: Option<String>) -> DeleteParams {
    DeleteParams { preconditions: Some(Preconditions { uid, resource_version: None }), ..DeleteParams::default() }
}

/// What is to go and is not there any more has gone; nor is another object of its name ours to end.
fn gone_is_done<T>(result: Result<T, WriteError>) -> Result<(), WriteError> {
    match result {
        Err(WriteError::Refused { source, .. }) if matches!(&*source, kube::Error::Api(status) if matches!(status.code, 404 | 409)) => {
            Ok(())
        }
        result => result.map(drop),
    }
}
