//! The `MigrationForecast`s of this node, as they are now.
//!
//! In: a watch by label; its objects are anybody's. Out: a map that is always whole: a relist drops what is gone. An object that
//! cannot be read or is another node's stays out, is said once, and stalls nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::StreamExt;
use kube::{
    Api, Client,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::sync::watch;
use tracing::warn;

use super::vm::Key;
use crate::{
    api::{MigrationForecast, names},
    runtime::{client::with_causes, health::Ready, shutdown::Shutdown},
};

/// What is asked of this node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Questions {
    /// Those to be answered.
    pub ours: BTreeMap<Key, Arc<MigrationForecast>>,
    /// Labelled for this node, but `spec.nodeName` is another.
    pub foreign: BTreeSet<Key>,
    /// Those that cannot be read.
    pub unreadable: BTreeSet<Key>,
    /// A first whole list was seen.
    pub synced: bool,
}

/// Applies watch events. Pure but for the warnings.
#[derive(Debug)]
struct Index {
    node: String,
    /// While a list comes in: what it has held so far.
    listed: Option<BTreeSet<Key>>,
}

impl Index {
    fn apply(&mut self, questions: &mut Questions, event: Event<DeserializeGuard<MigrationForecast>>) {
        match event {
            Event::Init => self.listed = Some(BTreeSet::new()),
            Event::InitApply(object) => {
                let key = self.put(questions, object);
                self.listed.get_or_insert_default().insert(key);
            }
            Event::InitDone => {
                let listed = self.listed.take().unwrap_or_default();
                questions.ours.retain(|key, _| listed.contains(key));
                questions.foreign.retain(|key| listed.contains(key));
                questions.unreadable.retain(|key| listed.contains(key));
                questions.synced = true;
            }
            Event::Apply(object) => {
                self.put(questions, object);
            }
            Event::Delete(object) => {
                let key = key(&object);
                questions.ours.remove(&key);
                questions.foreign.remove(&key);
                questions.unreadable.remove(&key);
            }
        }
    }

    fn put(&self, questions: &mut Questions, object: DeserializeGuard<MigrationForecast>) -> Key {
        let key = key(&object);
        let (namespace, name) = &key;
        match object.0 {
            Ok(object) if object.spec.node_name == self.node => {
                questions.foreign.remove(&key);
                questions.unreadable.remove(&key);
                questions.ours.insert(key.clone(), Arc::new(object));
            }
            Ok(object) => {
                questions.ours.remove(&key);
                questions.unreadable.remove(&key);
                if questions.foreign.insert(key.clone()) {
                    let other = &object.spec.node_name;
                    warn!(namespace, name, node = %self.node, other, "ignored: labelled for this node, but spec.nodeName is another");
                }
            }
            Err(error) => {
                questions.ours.remove(&key);
                questions.foreign.remove(&key);
                if questions.unreadable.insert(key.clone()) {
                    warn!(namespace, name, %error, "ignored: this MigrationForecast cannot be read; delete it, the manager writes it anew");
                }
            }
        }
        key
    }
}

fn key(object: &impl kube::ResourceExt) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// Watches until `shutdown` drains. The receiver always holds the present questions; `ready` is set by the first whole list.
pub fn questions(
    client: Client,
    node: String,
    ready: Ready,
    shutdown: Shutdown,
) -> (watch::Receiver<Questions>, impl Future<Output = ()> + Send) {
    let (sender, receiver) = watch::channel(Questions::default());
    let config = watcher::Config::default().labels(&format!("{}={node}", names::NODE_LABEL));
    let run = async move {
        let api: Api<DeserializeGuard<MigrationForecast>> = Api::all(client);
        let mut events = std::pin::pin!(watcher(api, config).default_backoff());
        let mut index = Index { node, listed: None };
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = shutdown.draining() => return,
            };
            match event {
                Some(Ok(event)) => {
                    sender.send_if_modified(|questions| {
                        let before =
                            (questions.ours.clone(), questions.foreign.len(), questions.unreadable.len(), questions.synced);
                        index.apply(questions, event);
                        ready.set(questions.synced);
                        before.1 != questions.foreign.len()
                            || before.2 != questions.unreadable.len()
                            || before.3 != questions.synced
                            || !same(&before.0, &questions.ours)
                    });
                }
                Some(Err(error)) => {
                    warn!(
                        error = with_causes(&error),
                        "the watch of MigrationForecasts is interrupted; it is taken up again by itself"
                    );
                }
                None => return,
            }
        }
    };
    (receiver, run)
}

/// Whether the same is asked of the same objects; our own status writes come back as new objects with the same spec. What the manager
/// tells of migrations is in annotations.
fn same(a: &BTreeMap<Key, Arc<MigrationForecast>>, b: &BTreeMap<Key, Arc<MigrationForecast>>) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|((k, x), (l, y))| {
            k == l
                && (Arc::ptr_eq(x, y)
                    || x.metadata.uid == y.metadata.uid
                        && x.metadata.generation == y.metadata.generation
                        && x.metadata.annotations == y.metadata.annotations)
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    fn object(name: &str, node: &str) -> DeserializeGuard<MigrationForecast> {
        read(json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": name, "namespace": "ns", "uid": name },
            "spec": { "nodeName": node, "podUID": "u", "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited", "downtimeLimit": "300ms" }
        }))
    }

    fn read(value: Value) -> DeserializeGuard<MigrationForecast> {
        serde_json::from_value(value).unwrap()
    }

    fn names<'a>(keys: impl IntoIterator<Item = &'a Key>) -> Vec<&'a str> {
        keys.into_iter().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn foreign_and_odd_objects_stay_out_and_a_relist_drops_what_is_gone() {
        let mut index = Index { node: "here".to_owned(), listed: None };
        let mut questions = Questions::default();
        let odd = || read(json!({ "metadata": { "name": "odd", "namespace": "ns" }, "spec": "nonsense" }));
        for event in [
            Event::Init,
            Event::InitApply(object("a", "here")),
            Event::InitApply(object("b", "there")),
            Event::InitApply(odd()),
            Event::InitDone,
            Event::Apply(object("c", "here")),
        ] {
            index.apply(&mut questions, event);
        }
        assert!(questions.synced);
        assert_eq!(names(questions.ours.keys()), ["a", "c"]);
        assert_eq!((names(&questions.foreign), names(&questions.unreadable)), (vec!["b"], vec!["odd"]));

        // It moves away, another becomes readable and ours.
        index.apply(&mut questions, Event::Apply(object("c", "there")));
        index.apply(&mut questions, Event::Apply(object("odd", "here")));
        assert_eq!((names(questions.ours.keys()), names(&questions.foreign)), (vec!["a", "odd"], vec!["b", "c"]));

        for event in [Event::Init, Event::InitApply(object("b", "here")), Event::InitDone] {
            index.apply(&mut questions, event);
        }
        assert_eq!(names(questions.ours.keys()), ["b"]);
        assert!(questions.foreign.is_empty() && questions.unreadable.is_empty());
        index.apply(&mut questions, Event::Delete(object("b", "here")));
        assert!(questions.ours.is_empty());
    }
}
