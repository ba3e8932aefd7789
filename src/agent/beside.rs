//! What is told and asked of a VM beside the question: that it migrates, that a dry run is wanted, that its spec has changed. Pure.
//!
//! In: the object as it is now, what came of migrations and dry runs. Out: what there is to read along and to dry-run, and since when or
//! from when on.

use std::time::{Duration, Instant};

use super::schedule::Moving;
use crate::api::{
    MigrationForecast,
    dry_run::{DryRun, DryRunStatus},
    migration::{Hint, HintPhase},
};

/// What a change of the VM's spec has KubeVirt do (a pod for a volume, then the device) gets this long before a dry run is begun: QEMU
/// plugs nothing in during one.
pub const SETTLE: Duration = Duration::from_secs(60);
/// A dry run that waits for somebody else is tried again after this.
pub const AGAIN: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub struct Beside {
    hint: Option<(Hint, Instant)>,
    /// The migration that was read along to its end.
    read_along: Option<String>,
    asked: Option<(DryRun, Instant)>,
    dry_run: Option<DryRunStatus>,
    vmi_spec: Option<String>,
    /// No dry run is begun before.
    hold: Option<Instant>,
}

impl Beside {
    /// Of an object that is new to us: what an earlier life of the agent has told of a dry run still stands.
    pub fn new(object: &MigrationForecast, now: Instant) -> Self {
        let dry_run = object.status.as_ref().and_then(|status| status.dry_run.clone());
        let mut beside = Self { dry_run, ..Self::default() };
        beside.take_up(object, now);
        beside
    }

    /// Takes up what is told and asked now.
    pub fn take_up(&mut self, object: &MigrationForecast, now: Instant) {
        let since = |old: Option<Instant>| old.unwrap_or(now);
        self.hint = object.hint().map(|hint| {
            let same = self.hint.as_ref().filter(|(old, _)| *old == hint).map(|(_, at)| *at);
            (hint, since(same))
        });
        self.asked = object.spec.dry_run.clone().map(|asked| {
            let same = self.asked.as_ref().filter(|(old, _)| *old == asked).map(|(_, at)| *at);
            (asked, since(same))
        });
        // A manager that does not tell says nothing of a change.
        let Some(spec) = object.vmi_spec() else { return };
        if self.vmi_spec.as_ref().is_some_and(|before| before != spec) {
            self.hold(now + SETTLE);
        }
        self.vmi_spec = Some(spec.to_owned());
    }

    fn hold(&mut self, until: Instant) {
        self.hold = self.hold.max(Some(until));
    }

    /// The manager says that memory moves: since when somebody should read along, unless that was done.
    pub fn migrating(&self) -> Option<Moving> {
        let (hint, since) = self.hint.as_ref().filter(|(hint, _)| hint.phase == HintPhase::Running)?;
        let read = self.read_along.as_ref() == Some(&hint.migration_uid);
        Some(if read { Moving::Read } else { Moving::Unread(*since) })
    }

    /// The migration that the manager tells of.
    pub fn hint(&self) -> Option<&Hint> {
        self.hint.as_ref().map(|(hint, _)| hint)
    }

    /// A migration was read along to its end, or cannot be.
    pub fn read_along_to_its_end(&mut self, migration_uid: String) {
        self.read_along = Some(migration_uid);
    }

    /// Fingerprint of the VM's spec, where the manager tells it.
    pub fn vmi_spec(&self) -> Option<&str> {
        self.vmi_spec.as_deref()
    }

    /// The dry run that is asked for and has not come to its end (the same id is the same run), and from when on it is due.
    pub fn dry_run_wanted(&self) -> Option<(&DryRun, Instant)> {
        // A migration will want the VM for itself, unless it waits for the dry run.
        let free = self.hint.as_ref().is_none_or(|(hint, _)| hint.phase == HintPhase::Held);
        let ended = |id: &str| self.dry_run.as_ref().is_some_and(|run| run.id == id && run.phase.is_final());
        let (asked, since) = self.asked.as_ref().filter(|(asked, _)| free && !ended(&asked.id))?;
        Some((asked, self.hold.map_or(*since, |hold| hold.max(*since))))
    }

    /// The dry run that is asked for, whether or not it has come to its end.
    pub fn dry_run_asked(&self) -> Option<&DryRun> {
        self.asked.as_ref().map(|(asked, _)| asked)
    }

    /// The last dry run.
    pub fn dry_run(&self) -> Option<&DryRunStatus> {
        self.dry_run.as_ref()
    }

    /// A dry run came to its end, or has to wait.
    pub fn dry_run_ended(&mut self, status: DryRunStatus, now: Instant) {
        if !status.phase.is_final() {
            self.hold(now + AGAIN);
        }
        self.dry_run = Some(status);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;
    use crate::api::{dry_run::DryRunPhase, names::hint};

    fn object(annotations: &Value, id: &str) -> MigrationForecast {
        serde_json::from_value(json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": "vm", "annotations": annotations },
            "spec": {
                "nodeName": "n", "podUID": "pod", "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited",
                "downtimeLimit": "300ms", "dryRun": { "id": id }
            }
        }))
        .unwrap()
    }

    fn due(beside: &Beside) -> Option<Instant> {
        beside.dry_run_wanted().map(|(_, at)| at)
    }

    #[test]
    fn what_is_plugged_in_goes_before_a_dry_run() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let spec = |text: &str| object(&json!({ hint::VMI_SPEC: text, "other": text }), "a");
        let mut beside = Beside::new(&spec("one"), start);
        assert_eq!(due(&beside), Some(start));
        // The same spec, whatever else is told; then another one.
        let mut labelled = spec("one");
        labelled.metadata.labels = Some([("app".to_owned(), "shop".to_owned())].into());
        beside.take_up(&labelled, at(5));
        assert_eq!(due(&beside), Some(start));
        beside.take_up(&spec("two"), at(10));
        assert_eq!((due(&beside), beside.vmi_spec()), (Some(at(10) + SETTLE), Some("two")));
        beside.take_up(&spec("two"), at(20));
        assert_eq!(due(&beside), Some(at(10) + SETTLE));
        // A manager of another version, which does not tell: nothing is known to have changed.
        beside.take_up(&object(&Value::Null, "a"), at(100));
        beside.take_up(&spec("two"), at(110));
        assert_eq!(due(&beside), Some(at(10) + SETTLE));
        // Asked for later than that.
        beside.take_up(&object(&json!({ hint::VMI_SPEC: "two" }), "b"), at(200));
        assert_eq!(due(&beside), Some(at(200)));
    }

    #[test]
    fn a_dry_run_that_waits_for_somebody_is_not_tried_at_once_again() {
        let now = Instant::now();
        let mut beside = Beside::new(&object(&Value::Null, "a"), now);
        beside.dry_run_ended(DryRunStatus::new("a", "", DryRunPhase::Waiting, "the controller is away"), now);
        assert_eq!(due(&beside), Some(now + AGAIN));
        beside.dry_run_ended(DryRunStatus::new("a", "", DryRunPhase::Cancelled, ""), now);
        assert_eq!((due(&beside), beside.dry_run_asked().unwrap().id.as_str()), (None, "a"));
        // A migration of the VM.
        beside.take_up(&object(&json!({ hint::MIGRATION: "m", hint::PHASE: "Pending" }), "b"), now);
        assert_eq!((due(&beside), beside.migrating()), (None, None));
    }
}
