//! virt-controller's migration controller: how long an evacuation or workload update waits after others of its VMI have failed. After
//! KubeVirt 1.9's `pkg/virt-controller/watch/migration/migration.go` (`handleMigrationBackoff`).
//!
//! In: a pending migration. Out: what is left of 20 s, doubled for each further failure since the last success. VMIMs that were deleted do
//! not count, and only the five last final ones are kept: it ends at 320 s.

use std::time::Duration;

use kube::{ResourceExt, api::DynamicObject};

use super::{core::Core, migration::Seen, read::text};

const EVACUATION: &str = "kubevirt.io/evacuationMigration";
const WORKLOAD_UPDATE: &str = "kubevirt.io/workloadUpdateMigration";

/// How long it still has to wait; `None`: not at all.
pub(super) fn left(core: &Core, seen: &Seen) -> Option<Duration> {
    if !is_automatic(&seen.vmim) {
        return None;
    }
    let mut all = core.vmims_of(&seen.vmi);
    all.retain(|vmim| is_automatic(vmim));
    all.reverse();
    let [newest, older @ ..] = all.as_slice() else { return None };
    let last = older.first()?;
    if newest.uid() != seen.vmim.uid() {
        return None;
    }
    let phase = |vmim: &DynamicObject| text(&vmim.data, "/status/phase");
    let failures = older
        .iter()
        .take_while(|vmim| phase(vmim) != "Succeeded")
        .filter(|vmim| vmim.metadata.deletion_timestamp.is_none() && phase(vmim) == "Failed")
        .count();
    let doublings = u32::try_from(failures).ok()?.checked_sub(1)?;
    let wait = Duration::from_secs(20).saturating_mul(2_u32.saturating_pow(doublings));
    let failed = failed_at(last)?;
    let since = jiff::Timestamp::now().duration_since(failed).unsigned_abs();
    wait.checked_sub(since).filter(|left| !left.is_zero())
}

fn is_automatic(vmim: &DynamicObject) -> bool {
    [EVACUATION, WORKLOAD_UPDATE].iter().any(|it| vmim.annotations().contains_key(*it))
}

fn failed_at(vmim: &DynamicObject) -> Option<jiff::Timestamp> {
    let entered = vmim.data.pointer("/status/phaseTransitionTimestamps")?.as_array()?;
    let failed = entered.iter().find(|it| it["phase"] == "Failed")?;
    failed["phaseTransitionTimestamp"].as_str()?.parse().ok()
}
