//! What the agent may spend of its node's CPU, and how thoroughly it can look at that price. Pure.
//!
//! In: the CPU time that this process has used so far, the time, how many VMs there are. Out: from when on the next routine look may
//! begin, and what share of the samples it should take. The whole process is held to the share, not only its looks: that is what an
//! operator sees on the node.

use std::time::{Duration, Instant};

/// So much CPU time may be used ahead of the budget: the first looks at a node's VMs should not wait for minutes.
const AHEAD: Duration = Duration::from_secs(20);
/// Answers count for 20 minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// Fewer samples than this share of all of them tell too little.
const LEAST_EFFORT: f64 = 0.2;
/// What a look with all samples costs, as long as none has been seen: page reads, the fit, the replays.
const ASSUMED_COST: Duration = Duration::from_millis(1700);
/// A new cost counts for this share of what is believed.
const NEWS: f64 = 0.3;

/// See the module.
#[derive(Debug, Clone)]
pub struct Budget {
    /// CPU seconds per second.
    share: f64,
    /// CPU seconds used beyond the share; below zero never.
    debt: f64,
    /// CPU time of the process and the instant, when last told.
    told: (Duration, Instant),
    /// CPU seconds of a look with all samples.
    cost: f64,
}

impl Budget {
    /// Nothing spent. `share`: CPU seconds per second, 0.02 for two percent of a core.
    pub fn new(share: f64, used: Duration, now: Instant) -> Self {
        Self { share: share.max(1e-4), debt: 0.0, told: (used, now), cost: ASSUMED_COST.as_secs_f64() }
    }

    /// Takes note of the CPU time that the process has used since its start.
    pub fn used(&mut self, used: Duration, now: Instant) {
        let spent = used.saturating_sub(self.told.0).as_secs_f64();
        let passed = now.saturating_duration_since(self.told.1).as_secs_f64();
        // However much something else has used (a dry run does not ask for a share): no look waits for longer than this.
        let most = AHEAD.as_secs_f64() + self.share * LONGEST_WAIT.as_secs_f64();
        self.debt = (self.debt + spent - self.share * passed).clamp(0.0, most);
        self.told = (used, now);
    }

    /// Takes note of what a look with this share of the samples has cost.
    pub fn looked(&mut self, cost: Duration, effort: f64) {
        let whole = cost.as_secs_f64() / effort.max(LEAST_EFFORT);
        self.cost += NEWS * (whole - self.cost);
    }

    /// From when on a routine look may begin.
    pub fn routine_from(&self) -> Instant {
        let over = (self.debt - AHEAD.as_secs_f64()).max(0.0);
        // A share can be tiny, and an instant is no place for infinity.
        self.told.1 + Duration::from_secs_f64((over / self.share).min(86_400.0))
    }

    /// The share of all samples that looks should take, so that each of `vms` can be looked at once every `refresh`.
    pub fn effort(&self, vms: usize, refresh: Duration) -> f64 {
        let affordable = self.share * refresh.as_secs_f64() / (self.cost.max(1e-3) * vms.max(1) as f64);
        affordable.clamp(LEAST_EFFORT, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFRESH: Duration = Duration::from_secs(600);

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn few_vms_are_looked_at_thoroughly_and_many_sparingly() {
        let budget = Budget::new(0.02, Duration::ZERO, Instant::now());
        assert!((budget.effort(1, REFRESH) - 1.0).abs() < 1e-9);
        // 12 s of CPU for 50 VMs: 0.24 s each, of 1.7 s.
        assert!((budget.effort(20, REFRESH) - 12.0 / 20.0 / 1.7).abs() < 1e-9);
        assert!((budget.effort(1000, REFRESH) - LEAST_EFFORT).abs() < 1e-9);
    }

    #[test]
    fn what_looks_really_cost_is_learned() {
        let mut budget = Budget::new(0.02, Duration::ZERO, Instant::now());
        for _ in 0..30 {
            budget.looked(s(0.4), 0.5);
        }
        assert!((budget.effort(20, REFRESH) - 12.0 / 20.0 / 0.8).abs() < 0.001);
    }

    #[test]
    fn beyond_what_may_be_used_ahead_looks_wait_until_the_share_has_caught_up() {
        let start = Instant::now();
        let mut budget = Budget::new(0.02, s(5.0), start);
        budget.used(s(25.0), start + s(1.0));
        assert_eq!(budget.routine_from(), start + s(1.0), "twenty seconds ahead are allowed");
        budget.used(s(26.0), start + s(2.0));
        let wait = budget.routine_from().saturating_duration_since(start + s(2.0)).as_secs_f64();
        assert!((wait - (21.0 - 0.04 - 20.0) / 0.02).abs() < 1e-3, "{wait}");
        // An hour of rest pays everything back, and no more than that.
        budget.used(s(26.0), start + s(3602.0));
        assert_eq!(budget.routine_from(), start + s(3602.0));
        budget.used(s(47.0), start + s(3603.0));
        assert!(budget.routine_from() > start + s(3603.0), "rest is not saved up");
    }
}
