//! Whether a dry run is wanted for a VM, in the background or by a migration that is held for it, and which. Pure: what it depends on is its input.
//!
//! In: the policy, the question as it should be, what is stored, how migrations would be carried. Out: a [`Wish`], which the manager
//! writes as `spec.dryRun` or takes away. What somebody else asks for is left alone until it has been answered and that answer is stale.
//!
//! ```text
//! no policy for it, a migration that nobody holds, a hotplug, outside the model, another question ──▶ Nothing (ours is withdrawn)
//! ours stands: waiting, running, or answered not long ago ─────────────────────────────────▶ Run (the same)
//! somebody else's stands, or this question was tried out not long ago ─────────────────────▶ Nothing
//! a fresh answer from the pattern says Fails or Borderline ────────────────────────────────▶ Run (a new one), or Queue while its node is busy
//! ```

use k8s_openapi::jiff::Timestamp;

use crate::{
    api::{
        MigrationForecast, MigrationForecastSpec,
        dry_run::{Compression, DryRun, DryRunStatus, LONGEST, SHORTEST},
        fingerprint,
        forecast::is_fresh,
        kubevirt::VirtualMachineInstance,
        policy::{DryRunMode, DryRunPolicy},
    },
    decision::{self, Assessment},
    model::forecast::{Method, Verdict},
};

/// What the ids begin with that the manager gives. Whoever takes such an id has the manager look after it.
pub const OURS: &str = "doubt-";

/// KubeVirt's `parallelMultifdMigrationThreads` (`virt-handler/migration-source.go`).
const CHANNELS: u64 = 8;

/// How pages would be carried by a real migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carriage {
    /// Channels of multifd; `None`: no multifd.
    pub channels: Option<u64>,
    /// How pages are compressed.
    pub compression: Compression,
}

impl Carriage {
    /// As KubeVirt 1.9 would: eight channels unless the VM has a CPU limit or dedicated CPUs; compression as its policy says, which is
    /// multifd's: without it there is none.
    pub fn of(vmi: &VirtualMachineInstance, compression: Compression) -> Self {
        let domain = &vmi.spec.domain;
        // What cannot be read limits: better one stream too few than memory for eight that the pod does not have.
        let limited = domain.resources.limits.get("cpu").is_some_and(|limit| limit.bytes().map_or(true, |limit| limit.0 > 0));
        if limited || domain.cpu.dedicated_cpu_placement {
            return Self::default();
        }
        Self { channels: Some(CHANNELS), compression }
    }
}

/// What is under way with the VM: QEMU neither migrates it nor plugs anything in or out during a dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A migration that is held, and waits for the dry run.
    Held,
    /// A migration that nobody holds, or a hotplug: a dry run would be in its way.
    Open,
}

/// Everything it depends on.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    /// What the PredictionPolicy says; `None`: nothing, so never.
    pub policy: Option<&'a DryRunPolicy>,
    /// The question as it should be now.
    pub present: &'a MigrationForecastSpec,
    /// What is stored.
    pub stored: Option<&'a MigrationForecast>,
    /// How a migration would be carried.
    pub carriage: Carriage,
    /// What is under way with the VM.
    pub way: Option<Way>,
    /// Now.
    pub now: Timestamp,
}

/// What the manager wants in `spec.dryRun`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Nothing of its own: what it asked for is withdrawn, what others ask for stands.
    Nothing,
    /// This.
    Run(DryRun),
    /// One, once fewer run on that node.
    Queue,
}

/// Is it one of the manager's?
pub fn is_ours(dry_run: &DryRun) -> bool {
    dry_run.id.starts_with(OURS)
}

/// One of the manager's that is not answered yet: it counts against the node's limit.
pub fn is_open(forecast: &MigrationForecast) -> bool {
    let ours = forecast.spec.dry_run.as_ref().filter(|dry_run| is_ours(dry_run));
    ours.is_some_and(|dry_run| answered(forecast, &dry_run.id).is_none())
}

/// The status of the dry run of this id, once nothing more will come of it.
fn answered<'a>(forecast: &'a MigrationForecast, id: &str) -> Option<&'a DryRunStatus> {
    let status = forecast.status.as_ref()?.dry_run.as_ref()?;
    (status.id == id && status.phase.is_final()).then_some(status)
}

/// What is wanted now. `busy` counts the other dry runs of the manager's that are open on the VM's node; it is asked only where that
/// matters.
pub fn wish(case: &Case<'_>, busy: impl FnOnce() -> u64) -> Wish {
    let wanted = |policy: &&DryRunPolicy| match case.way {
        None => policy.mode == DryRunMode::OnDoubt,
        Some(Way::Held) => policy.mode != DryRunMode::Never,
        Some(Way::Open) => false,
    };
    let (Some(policy), Some(stored)) = (case.policy.filter(wanted), case.stored) else { return Wish::Nothing };
    if case.present.outside_model.is_some() {
        return Wish::Nothing;
    }
    let question = case.present.fingerprint();
    let prefix = prefix(&question, case.carriage);
    if let Some(standing) = &stored.spec.dry_run {
        let recent = answered(stored, &standing.id).map(|status| is_fresh(status.completed_at.as_ref(), case.now));
        match (standing.id.starts_with(&prefix), is_ours(standing), recent) {
            // Once asked it stands: near the limit the pattern changes its mind with every look, and a run that is always begun anew
            // never ends. The policy's deadline may change meanwhile; the agent began with the one it saw.
            (true, _, None | Some(true)) => return Wish::Run(standing.clone()),
            // Somebody's own.
            (false, false, None | Some(true)) => return Wish::Nothing,
            // Ours for another question or carriage, or anybody's that was answered long ago.
            _ => {}
        }
    }
    let tried = stored.status.as_ref().and_then(|status| status.dry_run.as_ref());
    if tried.is_some_and(|tried| tried.is_over(&question, case.now)) {
        return Wish::Nothing;
    }
    let Some(measured) = doubt(case, stored) else { return Wish::Nothing };
    // Somebody waits for one that is held; the agent takes it first.
    if case.way.is_none() && busy() >= policy.concurrent_per_node.max(1) {
        return Wish::Queue;
    }
    Wish::Run(DryRun {
        id: format!("{prefix}{}", measured.as_second()),
        // The schema sees to it. Where an old one has let more pass, the question must not be refused with it.
        deadline: Some(policy.deadline.clamp(SHORTEST, LONGEST)),
        channels: case.carriage.channels,
        compression: case.carriage.compression,
    })
}

/// When the VM was looked at whose pattern alone, freshly and for this very question, says `Fails` or `Borderline`.
fn doubt(case: &Case<'_>, stored: &MigrationForecast) -> Option<Timestamp> {
    let Assessment::Known(forecast) = decision::assess(Some(stored), Some(case.present), case.now) else { return None };
    let doubtful =
        forecast.method == Method::PatternCollector && matches!(forecast.verdict, Verdict::Fails | Verdict::Borderline);
    let measured = stored.status.as_ref()?.measured_at.as_ref()?;
    doubtful.then_some(measured.0)
}

/// What the ids begin with of the dry runs that try out this question in this way. The rest of an id is the time of the look that
/// raised the doubt: every replica that sees the same doubt gives the same id, and the same id runs once.
fn prefix(question: &str, carriage: Carriage) -> String {
    let Carriage { channels, compression } = carriage;
    format!("{OURS}{}-", fingerprint::of(&format!("{question} {channels:?} {compression:?}")))
}

#[cfg(test)]
#[path = "dry_run_tests.rs"]
mod tests;
