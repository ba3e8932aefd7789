//! Who wants a migration. Pure.
//!
//! In: the migration, its VM, and who asks for it as the API server names them. Out: an [`Origin`]. KubeVirt's own controllers say on a migration
//! what they make it for, and so can anybody else: what others say of that is not believed where the API server has told who asks. Admission
//! notes what it found on the migration (what comes in under that name it takes off), for those who look at it later.

use crate::api::{
    kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
    names::{annotation, kubevirt},
};

/// Who wants the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A person, or a program that is not KubeVirt's.
    Person,
    /// A drain or an eviction: KubeVirt asks again for ever.
    Evacuation,
    /// The descheduler, through an eviction.
    Descheduler,
    /// KubeVirt's workload updater.
    WorkloadUpdate,
}

impl Origin {
    /// Of a migration that is asked for by KubeVirt itself, or by somebody else.
    pub fn of_request(
        migration: &VirtualMachineInstanceMigration,
        vmi: Option<&VirtualMachineInstance>,
        by_kubevirt: bool,
    ) -> Self {
        if by_kubevirt { Self::as_it_says(migration, vmi) } else { Self::Person }
    }

    /// Of a migration that there is: as admission has noted it; where admission was not asked, as the migration itself says.
    pub fn of(migration: &VirtualMachineInstanceMigration, vmi: Option<&VirtualMachineInstance>) -> Self {
        let noted = migration.metadata.annotations.as_ref().and_then(|annotations| annotations.get(annotation::ORIGIN));
        noted.and_then(|noted| Self::read(noted)).unwrap_or_else(|| Self::as_it_says(migration, vmi))
    }

    fn as_it_says(migration: &VirtualMachineInstanceMigration, vmi: Option<&VirtualMachineInstance>) -> Self {
        let annotations = migration.metadata.annotations.as_ref();
        let has = |key: &str| annotations.is_some_and(|annotations| annotations.contains_key(key));
        let evicted_by = vmi.and_then(|vmi| vmi.metadata.annotations.as_ref()?.get(kubevirt::EVICTION_SOURCE));
        if has(kubevirt::EVACUATION) {
            if evicted_by.is_some_and(|source| source == kubevirt::DESCHEDULER) { Self::Descheduler } else { Self::Evacuation }
        } else if has(kubevirt::WORKLOAD_UPDATE) {
            Self::WorkloadUpdate
        } else {
            Self::Person
        }
    }

    /// As it is noted.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Person => "Person",
            Self::Evacuation => "Evacuation",
            Self::Descheduler => "Descheduler",
            Self::WorkloadUpdate => "WorkloadUpdate",
        }
    }

    fn read(noted: &str) -> Option<Self> {
        [Self::Person, Self::Evacuation, Self::Descheduler, Self::WorkloadUpdate]
            .into_iter()
            .find(|origin| origin.as_str() == noted)
    }

    /// KubeVirt itself wants it, and would ask again and again.
    pub fn is_kubevirts(self) -> bool {
        self != Self::Person
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    fn migration(annotations: &Value) -> VirtualMachineInstanceMigration {
        serde_json::from_value(json!({ "metadata": { "annotations": annotations } })).unwrap()
    }

    fn evicted() -> VirtualMachineInstance {
        serde_json::from_value(json!({ "metadata": { "annotations": { kubevirt::EVICTION_SOURCE: "descheduler" } } })).unwrap()
    }

    #[test]
    fn kubevirt_is_believed_and_nobody_else() {
        let evicted = evicted();
        for (key, vmi, origin) in [
            (kubevirt::EVACUATION, None, Origin::Evacuation),
            (kubevirt::EVACUATION, Some(&evicted), Origin::Descheduler),
            (kubevirt::WORKLOAD_UPDATE, Some(&evicted), Origin::WorkloadUpdate),
            ("x", Some(&evicted), Origin::Person),
        ] {
            let migration = migration(&json!({ key: "" }));
            assert_eq!(Origin::of_request(&migration, vmi, true), origin);
            assert_eq!(Origin::of_request(&migration, vmi, false), Origin::Person);
            assert_eq!(Origin::of(&migration, vmi), origin, "admission was not asked");
        }
    }

    #[test]
    fn what_admission_has_noted_goes_before_what_a_migration_says() {
        for origin in [Origin::Person, Origin::Evacuation, Origin::Descheduler, Origin::WorkloadUpdate] {
            let noted = migration(&json!({ kubevirt::EVACUATION: "node-1", annotation::ORIGIN: origin.as_str() }));
            assert_eq!(Origin::of(&noted, None), origin);
            // An incoming note is no note: it is taken off when the migration is made.
            assert_eq!(Origin::of_request(&noted, None, false), Origin::Person);
        }
        let odd = migration(&json!({ kubevirt::EVACUATION: "node-1", annotation::ORIGIN: "Martian" }));
        assert_eq!(Origin::of(&odd, None), Origin::Evacuation);
    }
}
