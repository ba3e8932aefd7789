//! virt-launcher's watch over a running migration: the legacy rules of KubeVirt 1.9 (`live-migration-source.go`).
//!
//! In: how long it has run. Out: what the mover is told. Pure. Not here: `progressTimeout`, which aborts only where nothing at
//! all moves for so long, and the stall detector, which is behind a gate.

use std::time::Duration;

use super::configuration::Configuration;

/// How often virt-launcher looks.
pub const POLL: Duration = Duration::from_millis(400);

/// What the one who moves the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Nothing to do: pre-copy goes on.
    GoOn,
    /// The budget is used up and post-copy is allowed: `migrate-start-postcopy`.
    StartPostCopy,
    /// The budget is used up and the guest may be disturbed: `stop`, which lets the rest go over.
    SuspendGuest,
    /// End it: the guest stays where it is.
    Abort,
}

/// The rules, and what they have done so far.
#[derive(Debug)]
pub struct Monitor {
    acceptable: Option<Duration>,
    disruption: bool,
    post_copy: bool,
    said: Order,
}

impl Monitor {
    /// Rules for a migration with this budget.
    pub fn new(configuration: &Configuration, budget: Option<Duration>) -> Self {
        Self {
            acceptable: budget,
            disruption: configuration.flag("allowWorkloadDisruption"),
            post_copy: configuration.flag("allowPostCopy"),
            said: Order::GoOn,
        }
    }

    /// One look. The order in force after it: it changes at most twice.
    pub fn tick(&mut self, elapsed: Duration) -> Order {
        let Some(acceptable) = self.acceptable else { return self.said };
        // Whole seconds and a strict comparison, as KubeVirt's.
        if matches!(self.said, Order::StartPostCopy | Order::Abort) || elapsed.as_secs() <= acceptable.as_secs() {
            return self.said;
        }
        self.said = match (self.disruption, self.post_copy, self.said) {
            (true, true, Order::GoOn) => Order::StartPostCopy,
            (true, false, Order::GoOn) => {
                self.acceptable = Some(acceptable.saturating_mul(2));
                Order::SuspendGuest
            }
            _ => Order::Abort,
        };
        self.said
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn monitor(policy: &serde_json::Value) -> Monitor {
        let configuration = Configuration::of_cluster(None).under(Some(&json!({ "spec": policy })));
        Monitor::new(&configuration, Some(Duration::from_secs(10)))
    }

    fn at(monitor: &mut Monitor, seconds: f64) -> Order {
        monitor.tick(Duration::from_secs_f64(seconds))
    }

    #[test]
    fn aborts_after_the_budget_in_whole_seconds() {
        let mut plain = monitor(&json!({}));
        assert_eq!(at(&mut plain, 10.9), Order::GoOn);
        assert_eq!(at(&mut plain, 11.0), Order::Abort);
    }

    #[test]
    fn post_copy_is_never_aborted() {
        let mut post_copy = monitor(&json!({ "allowPostCopy": true }));
        assert_eq!(at(&mut post_copy, 11.0), Order::StartPostCopy);
        assert_eq!(at(&mut post_copy, 1000.0), Order::StartPostCopy);
    }

    #[test]
    fn a_paused_guest_gets_the_budget_once_more() {
        let mut paused = monitor(&json!({ "allowWorkloadDisruption": true }));
        assert_eq!(at(&mut paused, 11.0), Order::SuspendGuest);
        assert_eq!(at(&mut paused, 20.9), Order::SuspendGuest);
        assert_eq!(at(&mut paused, 21.0), Order::Abort);
    }

    #[test]
    fn without_a_budget_it_runs_for_ever() {
        let mut endless = Monitor::new(&Configuration::of_cluster(None), None);
        assert_eq!(at(&mut endless, 1e6), Order::GoOn);
    }
}
