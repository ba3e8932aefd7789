//! What the leader remembers of a VM, so that nothing is told twice while the watches lag behind the writes. Lost with the lead.

use std::{collections::HashSet, sync::Arc};

use tokio::time::Instant;

use crate::{api::kubevirt::VirtualMachineInstanceMigration, model::forecast::Verdict};

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory {
    pub(super) told: Option<Verdict>,
    pub(super) recorded: Option<String>,
    pub(super) warned: HashSet<String>,
    /// Events about migrations, by UID and reason.
    pub(super) told_of: HashSet<(String, &'static str)>,
    pub(super) letting_go: Option<Instant>,
    pub(super) evacuation: Evacuation,
}

/// What becomes of a VM that KubeVirt wants to move off its node, as long as no migration of it is under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Evacuation {
    /// Not looked at yet by this leader: a denial may have been lifted while nobody was here.
    #[default]
    Unseen,
    /// Nothing is wanted of it, or it is on its way.
    Idle,
    /// It waits, and would be let through.
    Free,
    /// It waits, and would be denied.
    Denied,
}

impl Evacuation {
    /// What it is now, and whether KubeVirt has to be told that it may. `denied`, asked for one that waits: `None` while nothing is known,
    /// for then nothing has been lifted.
    pub(super) fn next(self, waits: bool, denied: impl FnOnce() -> Option<bool>) -> (Self, bool) {
        if !waits {
            return (Self::Idle, false);
        }
        match denied() {
            None => (self, false),
            Some(true) => (Self::Denied, false),
            // One that begins to wait while we look on is about to be tried anyway.
            Some(false) => (Self::Free, matches!(self, Self::Unseen | Self::Denied)),
        }
    }
}

impl Memory {
    /// What KubeVirt has forgotten is told of no more.
    pub(super) fn forget_all_but(&mut self, migrations: &[Arc<VirtualMachineInstanceMigration>]) {
        let known = |uid: &String| migrations.iter().any(|migration| migration.metadata.uid.as_ref() == Some(uid));
        self.warned.retain(known);
        self.told_of.retain(|(uid, _)| known(uid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubevirt_is_told_once_of_each_denial_that_was_lifted_also_before_our_time() {
        use Evacuation::{Denied, Free, Idle, Unseen};
        for (before, waits, denied, after, told) in [
            // A new leader finds it waiting, though nothing denies it.
            (Unseen, true, Some(false), Free, true),
            (Unseen, true, Some(true), Denied, false),
            (Unseen, true, None, Unseen, false),
            (Unseen, false, None, Idle, false),
            // It begins to wait: KubeVirt is at it.
            (Idle, true, Some(false), Free, false),
            (Idle, true, Some(true), Denied, false),
            (Idle, true, None, Idle, false),
            (Denied, true, Some(false), Free, true),
            (Denied, true, Some(true), Denied, false),
            (Denied, true, None, Denied, false),
            (Denied, false, None, Idle, false),
            (Free, true, Some(false), Free, false),
            (Free, true, Some(true), Denied, false),
        ] {
            assert_eq!(before.next(waits, || denied), (after, told), "{before:?} {waits} {denied:?}");
        }
    }
}
