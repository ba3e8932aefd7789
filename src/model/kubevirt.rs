//! KubeVirt's own rules: how long it lets a migration run.

use std::time::Duration;

use super::units::Bytes;

/// KubeVirt's `completionTimeoutPerGiB` where nothing else is configured.
pub const DEFAULT_COMPLETION_TIMEOUT_PER_GIB: u64 = 150;

/// A guest's memory in the gigabytes that KubeVirt's budget counts: decimal ones, rounded up.
pub fn gigabytes(guest: Bytes) -> u64 {
    guest.0.div_ceil(1_000_000_000)
}

/// How long KubeVirt lets a migration run: `completionTimeoutPerGiB × ceil(bytes / 10⁹)` seconds.
/// Decimal gigabytes, rounded up, whatever the name of the field says (KubeVirt 1.9, `manager.go`,
/// `resource.ScaledValue(resource.Giga)`). `None`: 0 switches the budget off.
pub fn time_budget(completion_timeout_per_gib: u64, guest: Bytes) -> Option<Duration> {
    let seconds = completion_timeout_per_gib.saturating_mul(gigabytes(guest));
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_of_kubevirt() {
        for (gib, seconds) in [(1, 300), (4, 750), (8, 1350), (16, 2700)] {
            assert_eq!(time_budget(150, Bytes(gib << 30)), Some(Duration::from_secs(seconds)));
        }
        assert_eq!(time_budget(20, Bytes(512 << 20)), Some(Duration::from_secs(20)));
        assert_eq!(time_budget(0, Bytes(1 << 30)), None);
    }
}
