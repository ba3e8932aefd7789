//! A look that failed, and when to try again. Pure.
//!
//! In: how it failed and what failed before it, the time. Out: from when on to look again.

use std::time::{Duration, Instant};

/// The first and the longest pause after a failed look.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));
/// The longest where there was nothing to look at: to look for it costs next to nothing, and somebody may wait for it.
const ABSENT: Duration = Duration::from_secs(60);

/// How a look failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// There is no QEMU to look at, or none that is a VM yet: it starts, or comes in.
    Absent,
    /// Anything else.
    Broken,
}

/// A look that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// How.
    pub failure: Failure,
    /// One of [`crate::api::names::reason`].
    pub reason: &'static str,
    /// What happened and what to do.
    pub message: String,
    /// Not to be looked at before.
    pub until: Instant,
    /// So many in a row.
    failures: u32,
}

impl Trouble {
    /// After what was `before`; what failed otherwise does not count. `spread` about 1 keeps many apart.
    pub fn after(
        before: Option<&Self>,
        failure: Failure,
        reason: &'static str,
        message: String,
        now: Instant,
        spread: f64,
    ) -> Self {
        let before = before.filter(|before| before.failure == failure);
        let failures = before.map_or(0, |before| before.failures).saturating_add(1);
        let longest = if failure == Failure::Absent { ABSENT } else { BACKOFF.1 };
        Self { failure, reason, message, until: now + pause((BACKOFF.0, longest), failures, spread), failures }
    }
}

/// Doubles with each failure, up to a limit.
pub fn pause((first, longest): (Duration, Duration), failures: u32, spread: f64) -> Duration {
    let doubled = 1_u32.checked_shl(failures.saturating_sub(1).min(31)).unwrap_or(u32::MAX);
    first.saturating_mul(doubled).min(longest).mul_f64(spread.clamp(0.5, 2.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_not_there_yet_is_looked_for_more_often_than_what_fails() {
        let now = Instant::now();
        let pauses = |failure, before: Option<Trouble>| {
            let mut trouble = before;
            let pauses: Vec<u64> = (0..10)
                .map(|_| {
                    trouble = Some(Trouble::after(trouble.as_ref(), failure, "", String::new(), now, 1.0));
                    trouble.as_ref().unwrap().until.duration_since(now).as_secs()
                })
                .collect();
            (pauses, trouble)
        };
        let (absent, last) = pauses(Failure::Absent, None);
        assert_eq!(absent, [2, 4, 8, 16, 32, 60, 60, 60, 60, 60]);
        let (broken, _) = pauses(Failure::Broken, last);
        assert_eq!(broken, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300], "another failure begins anew");
    }
}
