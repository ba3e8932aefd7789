//! Migrations of a scene that are held: the gate on their target pods, and the dry runs that they wait for.
//!
//! In: a [`Scene`]. Out: helpers that start, find and wait.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt, api::ListParams};
use migvisor::api::{
    MigrationForecast,
    dry_run::DryRunStatus,
    names::{GATE, kubevirt},
};

use super::{Scene, VMIM, scene::SOON};

impl Scene<'_> {
    /// The UID of a migration that is there.
    pub async fn uid(&self, migration: &str) -> Result<String> {
        let uid = self.vmim(migration).await?.and_then(|vmim| vmim.uid());
        uid.with_context(|| format!("there is no migration {migration}"))
    }

    /// The pods of a migration: its target, and where volumes are hotplugged the one that holds them.
    pub async fn pods_of(&self, migration: &str) -> Result<Vec<Pod>> {
        let Some(uid) = self.vmim(migration).await?.and_then(|vmim| vmim.uid()) else { return Ok(Vec::new()) };
        let pods: Api<Pod> = Api::namespaced(self.cluster.client()?, &self.namespace);
        let of_job = ListParams::default().labels(&format!("{}={uid}", kubevirt::MIGRATION_JOB));
        Ok(pods.list(&of_job).await?.items)
    }

    /// Waits until our gate is on the target pod of a migration, or until it is off it.
    pub async fn gate_is(&self, migration: &str, on: bool) -> Result<()> {
        let what = format!("our gate to be {} the target pod of {migration}", if on { "on" } else { "off" });
        let probe = async || {
            let pods = self.pods_of(migration).await?;
            let target = pods.iter().find(|pod| pod.labels().get(kubevirt::COMPONENT).is_some_and(|it| it == kubevirt::LAUNCHER));
            Ok(target.filter(|pod| is_gated(pod) == on).map(|_| ()))
        };
        self.until(&what, SOON, probe).await
    }

    /// Migrates a VM and waits until that is held. Returns the warnings that whoever does so reads.
    pub async fn held(&self, name: &str, vm: &str) -> Result<String> {
        let warning = self.migrate(name, vm).await?.stderr;
        self.gate_is(name, true).await?;
        self.event("MigrationHeld", VMIM, name).await?;
        Ok(warning)
    }

    /// Waits until a migration that was held is let go. Returns the words in which that is told.
    pub async fn released(&self, name: &str) -> Result<String> {
        let (note, _) = self.event("MigrationReleased", VMIM, name).await?;
        self.gate_is(name, false).await?;
        Ok(note)
    }

    /// Waits until the dry run of this VM that was asked for last is as wanted.
    pub async fn dry_run_that(&self, vm: &str, what: &str, holds: impl Fn(&DryRunStatus) -> bool) -> Result<DryRunStatus> {
        let of = |forecast: &MigrationForecast| forecast.status.as_ref().and_then(|status| status.dry_run.clone());
        let what = format!("has a dry run that {what}");
        let found = self.forecast_that(vm, &what, self.cluster.patience(), |it| of(it).is_some_and(|run| holds(&run))).await?;
        of(&found).context("it has one")
    }
}

/// Our gate is on this pod.
pub fn is_gated(pod: &Pod) -> bool {
    let gates = pod.spec.iter().flat_map(|spec| spec.scheduling_gates.iter().flatten());
    gates.into_iter().any(|gate| gate.name == GATE)
}
