//! Fills the stores from the API server, and says which VM each change concerns.
//!
//! In: a client and the writers' side of [`super::knowledge`]. Out: filled stores, and a [`Change`] for each change. An object that
//! cannot be read never stalls a stream: it counts as absent, is counted and named in the log. A watch that ends comes back, with
//! backoff. A kind that the API server does not know counts as empty until it does.

use std::{fmt::Debug, pin::pin};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        reflector::{ObjectRef, store::Writer},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

use super::{force, hold, index::Sink, knowledge::Feeds, metrics::ManagerMetrics};
use crate::api::{
    MigrationForecast, MigrationOverride, MigrationPlan, PredictionPolicy,
    kubevirt::{KubeVirt, MigrationPolicy, VirtualMachineInstance, VirtualMachineInstanceMigration},
    node::Node,
};

/// A VM, by namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Which VMs have to be looked at again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This one.
    One(Key),
    /// All of this namespace: its labels changed.
    Namespace(String),
    /// Every one: a policy or the configuration changed, or a watch started anew.
    All,
}

#[expect(clippy::unnecessary_wraps, reason = "as what tells of a change gives it")]
fn one(namespace: Option<String>, name: String) -> Option<Change> {
    Some(Change::One(Key { namespace: namespace.unwrap_or_default(), name }))
}

/// Every one, where what is read of an object is not what it was. (Others write their part of it, some of them every few seconds.)
fn all_where<T: PartialEq>(before: Option<&T>, now: &T) -> Option<Change> {
    (before != Some(now)).then_some(Change::All)
}

/// Watches everything, for ever.
pub(super) async fn all(client: &Client, feeds: Feeds, metrics: &ManagerMetrics, changes: &UnboundedSender<Change>) {
    let Feeds { vmis, migrations, forecasts, policies, overrides, pods, migration_policies, kubevirts, namespaces } = feeds;
    let watch = Watch { metrics, changes };
    tokio::join!(
        watch.kind(Api::<DeserializeGuard<VirtualMachineInstance>>::all(client.clone()), vmis, |_, vmi| one(
            vmi.namespace(),
            vmi.name_any()
        )),
        watch.kind(
            Api::<DeserializeGuard<VirtualMachineInstanceMigration>>::all(client.clone()),
            migrations,
            |_, migration| one(migration.namespace(), migration.spec.vmi_name.clone())
        ),
        watch.kind(Api::<DeserializeGuard<MigrationForecast>>::all(client.clone()), forecasts, |_, forecast| one(
            forecast.namespace(),
            forecast.name_any()
        )),
        watch.kind(Api::<DeserializeGuard<PredictionPolicy>>::all(client.clone()), policies, |before, policy| {
            all_where(before.map(|before| &before.spec), &policy.spec)
        }),
        watch.kind(Api::<DeserializeGuard<MigrationOverride>>::all(client.clone()), overrides, |_, allowed| one(
            allowed.namespace(),
            allowed.spec.vmi_name.clone()
        )),
        watch.kind_of(
            Api::<DeserializeGuard<Pod>>::all(client.clone()),
            watcher::Config::default().labels(&hold::selector()),
            pods,
            |_, pod| one(pod.namespace(), hold::vmi_of(pod).unwrap_or_default().to_owned())
        ),
        watch.kind(Api::<DeserializeGuard<MigrationPolicy>>::all(client.clone()), migration_policies, |before, policy| {
            // One of ours concerns one VM, and comes and goes with each migration that is forced.
            match force::vm_of(policy).filter(|_| force::is_ours(policy)) {
                Some((namespace, name)) => one(Some(namespace.to_owned()), name.to_owned()),
                None => all_where(before.map(|before| &before.spec), &policy.spec),
            }
        }),
        watch.kind(Api::<DeserializeGuard<KubeVirt>>::all(client.clone()), kubevirts, |before, kubevirt| {
            all_where(before.map(|before| &before.spec), &kubevirt.spec)
        }),
        watch.kind(Api::<DeserializeGuard<Namespace>>::all(client.clone()), namespaces, |before, namespace| {
            let same = before.is_some_and(|before| before.labels() == namespace.labels());
            (!same).then(|| Change::Namespace(namespace.name_any()))
        }),
    );
}

/// Watches what concerns plans alone, for ever. A change names the plan; one of a node, which tells of itself all the time, names none.
pub(super) async fn for_plans(
    client: &Client,
    plans: Writer<MigrationPlan>,
    nodes: Writer<Node>,
    metrics: &ManagerMetrics,
    changes: &UnboundedSender<Change>,
) {
    let watch = Watch { metrics, changes };
    tokio::join!(
        watch.kind(Api::<DeserializeGuard<MigrationPlan>>::all(client.clone()), plans, |_, plan| one(None, plan.name_any())),
        watch.kind(Api::<DeserializeGuard<Node>>::all(client.clone()), nodes, |_, _| one(None, String::new())),
    );
}

struct Watch<'a> {
    metrics: &'a ManagerMetrics,
    changes: &'a UnboundedSender<Change>,
}

impl Watch<'_> {
    /// `change`: which VMs an object concerns, given as it was and as it is; once it is gone, as it was.
    async fn kind<K, S>(&self, api: Api<DeserializeGuard<K>>, sink: S, change: impl Fn(Option<&K>, &K) -> Option<Change>)
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        S: Sink<Kind = K>,
    {
        self.kind_of(api, watcher::Config::default(), sink, change).await;
    }

    async fn kind_of<K, S>(
        &self,
        api: Api<DeserializeGuard<K>>,
        config: watcher::Config,
        sink: S,
        change: impl Fn(Option<&K>, &K) -> Option<Change>,
    ) where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        S: Sink<Kind = K>,
    {
        let kind = K::kind(&()).into_owned();
        let mut feed = Feed { sink, kind: kind.clone(), metrics: self.metrics };
        let mut stream = pin!(watcher(api, config).default_backoff());
        let mut missing = false;
        loop {
            // The stream never ends: errors come through it and are followed, after a pause, by a new start.
            match stream.try_next().await {
                Ok(Some(event)) => {
                    missing = false;
                    if let Some(change) = feed.take(event, &change) {
                        // The receiver is only gone when the process ends.
                        let _ = self.changes.send(change);
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    self.metrics.watch_errors.with_label_values(&[&kind]).inc();
                    if !is_unknown_kind(&error) {
                        warn!(kind, %error, "a watch ended; it starts anew after a pause");
                    } else if !missing {
                        missing = true;
                        warn!(kind, "the API server does not know this kind; it counts as empty until it does");
                        feed.empty();
                        let _ = self.changes.send(Change::All);
                    }
                }
            }
        }
    }
}

fn is_unknown_kind(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}

/// One store's writer, and what becomes of objects that cannot be read.
struct Feed<'a, S> {
    sink: S,
    kind: String,
    metrics: &'a ManagerMetrics,
}

impl<K: Resource<DynamicType = ()> + Clone + 'static, S: Sink<Kind = K>> Feed<'_, S> {
    /// Takes an event into the store; returns what has to be looked at again.
    fn take(
        &mut self,
        event: watcher::Event<DeserializeGuard<K>>,
        change: &impl Fn(Option<&K>, &K) -> Option<Change>,
    ) -> Option<Change> {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let (event, concerns) = match event {
            Init => (Init, None),
            InitDone => (InitDone, Some(Change::All)),
            InitApply(guard) => (InitApply(self.read(guard)?), None),
            Apply(guard) => {
                let before = self.sink.reader().get(&reference(&guard));
                if let Some(object) = self.read(guard) {
                    let concerns = change(before.as_deref(), &object);
                    (Apply(object), concerns)
                } else {
                    // What was readable before is out of date now.
                    let before = before?;
                    (Delete((*before).clone()), change(None, &before))
                }
            }
            Delete(guard) => {
                let reference = reference(&guard);
                let object = guard.0.ok().or_else(|| self.sink.reader().get(&reference).map(|before| (*before).clone()))?;
                let concerns = change(None, &object);
                (Delete(object), concerns)
            }
        };
        self.sink.apply_watcher_event(&event);
        concerns
    }

    fn read(&self, guard: DeserializeGuard<K>) -> Option<K> {
        match guard.0 {
            Ok(mut object) => {
                // Nobody here reads them, and they are often the larger half of an object, the room of an emptied list included.
                object.meta_mut().managed_fields = None;
                Some(object)
            }
            Err(invalid) => {
                self.metrics.unreadable_objects.with_label_values(&[&self.kind]).inc();
                let (namespace, name) = (&invalid.metadata.namespace, &invalid.metadata.name);
                warn!(
                    kind = self.kind,
                    namespace,
                    name,
                    error = invalid.error,
                    "cannot read this object; it counts as absent until it is mended"
                );
                None
            }
        }
    }

    fn empty(&mut self) {
        self.sink.apply_watcher_event(&watcher::Event::Init);
        self.sink.apply_watcher_event(&watcher::Event::InitDone);
    }
}

fn reference<K: Resource<DynamicType = ()>>(guard: &DeserializeGuard<K>) -> ObjectRef<K> {
    let mut reference = ObjectRef::new(&guard.name_any());
    reference.namespace = guard.namespace();
    reference
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn guard(spec: &serde_json::Value) -> DeserializeGuard<PredictionPolicy> {
        let object = json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "PredictionPolicy",
            "metadata": { "name": "p", "managedFields": [{ "manager": "kubectl" }] }, "spec": spec
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn an_odd_object_counts_as_absent_and_stalls_nothing() {
        let metrics = ManagerMetrics::new().unwrap();
        let mut feed = Feed { sink: Writer::<PredictionPolicy>::default(), kind: "PredictionPolicy".into(), metrics: &metrics };
        let store = feed.sink.as_reader();
        let change = |before: Option<&PredictionPolicy>, policy: &PredictionPolicy| {
            all_where(before.map(|before| &before.spec), &policy.spec)
        };
        let (good, odd) = (|| guard(&json!({ "mode": "Warn" })), || guard(&json!({ "mode": "Maybe" })));

        assert_eq!(feed.take(watcher::Event::Init, &change), None);
        assert_eq!(feed.take(watcher::Event::InitApply(odd()), &change), None);
        assert_eq!(feed.take(watcher::Event::InitDone, &change), Some(Change::All));
        assert!(store.is_empty());

        assert_eq!(feed.take(watcher::Event::Apply(good()), &change), Some(Change::All));
        assert_eq!(store.len(), 1);
        assert!(store.state().iter().all(|policy| policy.managed_fields().is_empty()));
        assert_eq!(feed.take(watcher::Event::Apply(good()), &change), None, "nothing that is read has changed");
        assert_eq!(feed.take(watcher::Event::Apply(guard(&json!({ "mode": "Audit" }))), &change), Some(Change::All));

        assert_eq!(feed.take(watcher::Event::Apply(odd()), &change), Some(Change::All), "what it said before no longer holds");
        assert!(store.is_empty());
        assert_eq!(feed.take(watcher::Event::Delete(odd()), &change), None);
        assert_eq!(metrics.unreadable_objects.with_label_values(&["PredictionPolicy"]).get(), 2);
    }
}
