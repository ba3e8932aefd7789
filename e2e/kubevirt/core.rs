//! What every controller of the stand-in stands on: caches fed by watches, as KubeVirt's informers are, and events.
//!
//! In: the API server. Out: a [`Core`] that answers from memory, and a stream of [`Change`]s for whoever asked. What is read here may be
//! a moment old, as in KubeVirt: who writes on it replaces whole objects, and a conflict sends it back to look again.

use std::{fmt::Debug, hash::Hash, sync::Arc};

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node, ObjectReference, Pod};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, PostParams},
    runtime::{
        WatchStreamExt,
        events::{Event, EventType, Recorder, Reporter},
        reflector::{ObjectRef, Store, store::Writer},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet};

use super::{objects, read::text};

/// Something was made, changed or deleted.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Vmim(Arc<DynamicObject>),
    Vmi(Arc<DynamicObject>),
    Pod(Arc<Pod>),
    Node(Arc<Node>),
    KubeVirt,
}

/// The caches.
pub(super) struct Core {
    pub(super) client: Client,
    recorder: Recorder,
    vmims: Store<DynamicObject>,
    vmis: Store<DynamicObject>,
    policies: Store<DynamicObject>,
    kubevirts: Store<DynamicObject>,
    pods: Store<Pod>,
    nodes: Store<Node>,
    namespaces: Store<Namespace>,
}

impl Core {
    /// Fills the caches, of one namespace or of all; what changes from then on is told to every one of `listeners`. The watches live as
    /// long as `tasks`.
    pub(super) async fn start(
        client: &Client,
        namespace: Option<&str>,
        listeners: Vec<mpsc::UnboundedSender<Change>>,
        tasks: &mut JoinSet<()>,
    ) -> Result<Arc<Self>> {
        let dynamic = |resource: &ApiResource| match namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
            None => Api::all_with(client.clone(), resource),
        };
        let tell = move |change: &Change| {
            for listener in &listeners {
                // A listener that has ended needs nothing any more.
                let _ = listener.send(change.clone());
            }
        };
        let mut follow = Follow { tasks, tell };
        let (vmim, vmi) = (objects::vmim_resource(), objects::vmi_resource());
        let (policy, kubevirt) = (objects::policy_resource(), objects::kubevirt_resource());
        let pods = match namespace {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        };
        let core = Self {
            client: client.clone(),
            recorder: Recorder::new(client.clone(), Reporter { controller: "virt-controller".to_owned(), instance: None }),
            vmims: follow.all(dynamic(&vmim), vmim, "", |it| Some(Change::Vmim(it))),
            vmis: follow.all(dynamic(&vmi), vmi, "", |it| Some(Change::Vmi(it))),
            policies: follow.all(Api::all_with(client.clone(), &policy), policy, "", |_| None),
            kubevirts: follow.all(Api::all_with(client.clone(), &kubevirt), kubevirt, "", |_| Some(Change::KubeVirt)),
            pods: follow.all(pods, (), "kubevirt.io", |it| Some(Change::Pod(it))),
            nodes: follow.all(Api::all(client.clone()), (), "", |it| Some(Change::Node(it))),
            namespaces: follow.all(Api::all(client.clone()), (), "", |_| None),
        };
        core.vmims.wait_until_ready().await?;
        core.vmis.wait_until_ready().await?;
        core.policies.wait_until_ready().await?;
        core.kubevirts.wait_until_ready().await?;
        core.pods.wait_until_ready().await?;
        core.nodes.wait_until_ready().await?;
        core.namespaces.wait_until_ready().await?;
        Ok(Arc::new(core))
    }

    pub(super) fn vmim(&self, key: &str) -> Option<Arc<DynamicObject>> {
        get(&self.vmims, key, objects::vmim_resource())
    }

    pub(super) fn vmi(&self, key: &str) -> Option<Arc<DynamicObject>> {
        get(&self.vmis, key, objects::vmi_resource())
    }

    pub(super) fn vmims(&self) -> Vec<Arc<DynamicObject>> {
        self.vmims.state()
    }

    pub(super) fn vmis(&self) -> Vec<Arc<DynamicObject>> {
        self.vmis.state()
    }

    pub(super) fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.nodes.get(&ObjectRef::new(name))
    }

    pub(super) fn nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.state()
    }

    /// The VMIMs of one VMI, the oldest first.
    pub(super) fn vmims_of(&self, vmi: &DynamicObject) -> Vec<Arc<DynamicObject>> {
        let (namespace, name) = (vmi.namespace(), vmi.name_any());
        let mut all =
            self.vmims.state_filter(|it: &DynamicObject| it.namespace() == namespace && text(&it.data, "/spec/vmiName") == name);
        // Whole seconds: among equals the names tell.
        all.sort_by_key(|it| (it.creation_timestamp(), it.name_any()));
        all
    }

    /// The pods that this object controls.
    pub(super) fn pods_of(&self, owner: &str) -> Vec<Arc<Pod>> {
        let controlled = |pod: &Pod| pod.owner_references().iter().any(|it| it.controller == Some(true) && it.uid == owner);
        self.pods.state_filter(controlled)
    }

    /// The KubeVirt CR.
    pub(super) fn kubevirt(&self) -> Option<Value> {
        self.kubevirts.state().first().and_then(|it| serde_json::to_value(it.as_ref()).ok())
    }

    /// All MigrationPolicies.
    pub(super) fn policies(&self) -> Vec<Value> {
        self.policies.state().iter().filter_map(|it| serde_json::to_value(it.as_ref()).ok()).collect()
    }

    pub(super) fn namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        self.namespaces.get(&ObjectRef::new(name))
    }

    pub(super) fn api_vmims(&self, object: &DynamicObject) -> Api<DynamicObject> {
        objects::vmims(&self.client, &object.namespace().unwrap_or_default())
    }

    pub(super) fn api_vmis(&self, object: &DynamicObject) -> Api<DynamicObject> {
        objects::vmis(&self.client, &object.namespace().unwrap_or_default())
    }

    pub(super) fn api_pods(&self, namespace: Option<String>) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &namespace.unwrap_or_default())
    }

    /// Writes a VMI back (VMIs have no status subresource): refused where it has changed since.
    pub(super) async fn replace_vmi(&self, vmi: &DynamicObject) -> Result<DynamicObject> {
        let written = self.api_vmis(vmi).replace(&vmi.name_any(), &PostParams::default(), vmi).await;
        written.with_context(|| format!("cannot update the VMI {}", vmi.name_any()))
    }

    /// Changes a VMI as it is now, again where somebody else was quicker.
    pub(super) async fn update_vmi(&self, key: &DynamicObject, change: impl Fn(&mut DynamicObject)) -> Result<DynamicObject> {
        let (api, name) = (self.api_vmis(key), key.name_any());
        loop {
            let mut vmi = api.get(&name).await?;
            change(&mut vmi);
            match api.replace(&name, &PostParams::default(), &vmi).await {
                Ok(updated) => return Ok(updated),
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                Err(error) => return Err(error).context("cannot update the VMI"),
            }
        }
    }

    /// Tells of something that happened to a VMI or VMIM. An event that cannot be written is no reason to stop.
    pub(super) async fn event(&self, about: &DynamicObject, type_: EventType, reason: &str, note: &str) {
        let kind = about.types.clone().unwrap_or_default();
        let reference = ObjectReference {
            api_version: Some(kind.api_version),
            kind: Some(kind.kind),
            namespace: about.namespace(),
            name: about.metadata.name.clone(),
            uid: about.uid(),
            ..ObjectReference::default()
        };
        let note = Some(note.chars().take(1000).collect());
        let event = Event { type_, reason: reason.to_owned(), note, action: reason.to_owned(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            tracing::debug!("no event {reason}: {error}");
        }
    }
}

fn get(store: &Store<DynamicObject>, key: &str, resource: ApiResource) -> Option<Arc<DynamicObject>> {
    let (namespace, name) = key.split_once('/')?;
    store.get(&ObjectRef::new_with(name, resource).within(namespace))
}

/// Fills one cache after the other.
struct Follow<'a, F> {
    tasks: &'a mut JoinSet<()>,
    tell: F,
}

impl<F: Fn(&Change) + Clone + Send + 'static> Follow<'_, F> {
    fn all<K>(
        &mut self,
        api: Api<K>,
        types: K::DynamicType,
        label: &str,
        change: impl Fn(Arc<K>) -> Option<Change> + Send + 'static,
    ) -> Store<K>
    where
        K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
        K::DynamicType: Eq + Hash + Clone,
    {
        let mut writer = Writer::<K>::new(types);
        let store = writer.as_reader();
        let (reader, tell) = (store.clone(), self.tell.clone());
        let config = if label.is_empty() { watcher::Config::default() } else { watcher::Config::default().labels(label) };
        self.tasks.spawn(async move {
            let tell = move |object: Arc<K>| change(object).iter().for_each(&tell);
            let mut events = std::pin::pin!(watcher(api, config).default_backoff());
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        writer.apply_watcher_event(&event);
                        match event {
                            watcher::Event::Apply(object) | watcher::Event::Delete(object) => tell(Arc::new(object)),
                            watcher::Event::InitDone => reader.state().into_iter().for_each(&tell),
                            watcher::Event::Init | watcher::Event::InitApply(_) => {}
                        }
                    }
                    // The watcher comes back by itself, after a while.
                    Err(error) => tracing::debug!("a watch was interrupted: {error}"),
                }
            }
        });
        store
    }
}
