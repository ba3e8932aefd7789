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
    /// Whether an evacuation of it would be denied; `None`: not looked at yet.
    pub(super) blocked: Option<bool>,
}

impl Memory {
    /// What KubeVirt has forgotten is told of no more.
    pub(super) fn forget_all_but(&mut self, migrations: &[Arc<VirtualMachineInstanceMigration>]) {
        let known = |uid: &String| migrations.iter().any(|migration| migration.metadata.uid.as_ref() == Some(uid));
        self.warned.retain(known);
        self.told_of.retain(|(uid, _)| known(uid));
    }
}
