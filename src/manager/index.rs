//! Stores in which what concerns a VM is found without a look through everything: a cluster has many more migrations than VMs.
//!
//! In: what a watch tells. Out: a reflector store, as of any other kind, and beside it a [`ByVm`]. No I/O. Whoever asks a [`ByVm`] must not be looking
//! through a store meanwhile (`state_filter`, `find`): each holds a lock.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Resource, ResourceExt,
    runtime::{
        reflector::{ObjectRef, Store, store::Writer},
        watcher::Event,
    },
};

use super::{hold, watch::Key};
use crate::api::kubevirt::VirtualMachineInstanceMigration;

/// What a watch fills.
pub trait Sink {
    /// What is in it.
    type Kind: Resource<DynamicType = ()> + Clone + 'static;

    /// What has been filled in so far.
    fn reader(&self) -> Store<Self::Kind>;

    /// Takes an event in.
    fn apply_watcher_event(&mut self, event: &Event<Self::Kind>);
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Sink for Writer<K> {
    type Kind = K;

    fn reader(&self) -> Store<K> {
        self.as_reader()
    }

    fn apply_watcher_event(&mut self, event: &Event<K>) {
        // The one of its own.
        Writer::apply_watcher_event(self, event);
    }
}

/// An object that concerns one VM.
pub trait OfVm: Resource<DynamicType = ()> + Clone + 'static {
    /// The VM's name; empty: it says none.
    fn vm_name(&self) -> &str;
}

impl OfVm for VirtualMachineInstanceMigration {
    fn vm_name(&self) -> &str {
        &self.spec.vmi_name
    }
}

impl OfVm for Pod {
    fn vm_name(&self) -> &str {
        hold::vmi_of(self).unwrap_or_default()
    }
}

fn vm<K: OfVm>(object: &K) -> Key {
    Key { namespace: object.namespace().unwrap_or_default(), name: object.vm_name().to_owned() }
}

/// The writing end of a store with an index.
pub struct Indexed<K: OfVm> {
    writer: Writer<K>,
    index: ByVm<K>,
}

impl<K: OfVm> fmt::Debug for Indexed<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Indexed").finish_non_exhaustive()
    }
}

impl<K: OfVm> Default for Indexed<K> {
    fn default() -> Self {
        Self { writer: Writer::default(), index: ByVm(Arc::new(RwLock::new(Index::default()))) }
    }
}

impl<K: OfVm> Indexed<K> {
    /// The index.
    pub fn by_vm(&self) -> ByVm<K> {
        ByVm(Arc::clone(&self.index.0))
    }
}

impl<K: OfVm> Sink for Indexed<K> {
    type Kind = K;

    fn reader(&self) -> Store<K> {
        self.writer.as_reader()
    }

    fn apply_watcher_event(&mut self, event: &Event<K>) {
        let reader = self.writer.as_reader();
        // Nobody reads the index between the store's change and its own: an object that the store has is never missing there.
        let mut index = self.index.0.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init | Event::InitApply(_) => Writer::apply_watcher_event(&mut self.writer, event),
            Event::InitDone => {
                Writer::apply_watcher_event(&mut self.writer, event);
                *index = Index::default();
                for object in reader.state() {
                    index.insert(object);
                }
            }
            Event::Apply(object) => {
                if let Some(before) = reader.get(&ObjectRef::from_obj(object)) {
                    index.remove(&before);
                }
                Writer::apply_watcher_event(&mut self.writer, event);
                if let Some(object) = reader.get(&ObjectRef::from_obj(object)) {
                    index.insert(object);
                }
            }
            Event::Delete(object) => {
                if let Some(before) = reader.get(&ObjectRef::from_obj(object)) {
                    index.remove(&before);
                }
                Writer::apply_watcher_event(&mut self.writer, event);
            }
        }
    }
}

/// Objects by their VM, and by their UID.
#[derive(Debug, Clone)]
pub struct ByVm<K>(Arc<RwLock<Index<K>>>);

#[derive(Debug)]
struct Index<K> {
    by_vm: HashMap<Key, Vec<Arc<K>>>,
    by_uid: HashMap<String, Arc<K>>,
}

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self { by_vm: HashMap::new(), by_uid: HashMap::new() }
    }
}

impl<K: OfVm> Index<K> {
    fn insert(&mut self, object: Arc<K>) {
        if let Some(uid) = object.uid() {
            self.by_uid.insert(uid, Arc::clone(&object));
        }
        self.by_vm.entry(vm(object.as_ref())).or_default().push(object);
    }

    /// `before`: as it was inserted.
    fn remove(&mut self, before: &Arc<K>) {
        if let Some(uid) = &before.meta().uid {
            self.by_uid.remove(uid);
        }
        let key = vm(before.as_ref());
        let Some(of_vm) = self.by_vm.get_mut(&key) else { return };
        of_vm.retain(|object| !Arc::ptr_eq(object, before));
        if of_vm.is_empty() {
            self.by_vm.remove(&key);
        }
    }
}

impl<K> ByVm<K> {
    fn index(&self) -> RwLockReadGuard<'_, Index<K>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What concerns the VM of that name, in no order.
    pub fn of_vm(&self, namespace: &str, name: &str) -> Vec<Arc<K>> {
        let key = Key { namespace: namespace.to_owned(), name: name.to_owned() };
        self.index().by_vm.get(&key).cloned().unwrap_or_default()
    }

    /// The object of that UID.
    pub fn of_uid(&self, uid: &str) -> Option<Arc<K>> {
        self.index().by_uid.get(uid).cloned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    type Migration = VirtualMachineInstanceMigration;

    /// A migration of that name, made for the so many-eth time, of that VM.
    fn migration(name: u8, life: u8, vm: u8) -> Migration {
        let object = json!({
            "metadata": { "namespace": format!("ns-{}", name % 2), "name": format!("m{name}"), "uid": format!("{name}-{life}") },
            "spec": { "vmiName": format!("vm{vm}") }
        });
        serde_json::from_value(object).unwrap()
    }

    fn names(mut found: Vec<Arc<Migration>>) -> Vec<String> {
        found.sort_by_key(|migration| migration.uid());
        found.iter().filter_map(|migration| migration.uid()).collect()
    }

    proptest! {
        /// Whatever a watch tells, the index finds what a look through the whole store finds.
        #[test]
        fn it_finds_what_the_store_has(events in prop::collection::vec((0..8_u8, 0..6_u8, 0..3_u8, 0..3_u8), 0..60)) {
            let mut sink = Indexed::<Migration>::default();
            let (store, index) = (sink.reader(), sink.by_vm());
            let mut filling = false;
            for (what, name, life, vm) in events {
                let object = migration(name, life, vm);
                let event = match what {
                    0 => { filling = true; Event::Init }
                    1 if filling => { filling = false; Event::InitDone }
                    2 | 3 => Event::Delete(object),
                    _ if filling => Event::InitApply(object),
                    _ => Event::Apply(object),
                };
                sink.apply_watcher_event(&event);
                for namespace in ["ns-0", "ns-1"] {
                    for vm in ["vm0", "vm1", "vm2"] {
                        let all = store.state_filter(|it| it.spec.vmi_name == vm && it.meta().namespace.as_deref() == Some(namespace));
                        prop_assert_eq!(names(index.of_vm(namespace, vm)), names(all));
                    }
                }
                for object in store.state() {
                    let found = index.of_uid(&object.uid().unwrap());
                    prop_assert!(found.is_some_and(|found| Arc::ptr_eq(&found, &object)));
                }
                for (name, life) in (0..6).flat_map(|name| (0..3).map(move |life| (name, life))) {
                    let uid = format!("{name}-{life}");
                    let there = store.find(|it| it.meta().uid.as_deref() == Some(uid.as_str())).is_some();
                    prop_assert_eq!(index.of_uid(&uid).is_some(), there, "{}", uid);
                }
            }
        }
    }
}
