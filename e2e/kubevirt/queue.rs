//! The queue of a controller: keys that are due, the more important first; each once, however often it was added; a failure waits longer
//! each time.
//!
//! In: keys. Out: the next one. After controller-runtime's `priorityqueue` and client-go's `workqueue`. One worker takes from it.

use std::{collections::HashMap, sync::Mutex, sync::PoisonError, time::Duration};

use tokio::{sync::Notify, time::Instant};

/// How long a key waits after its first failure, and at most; doubling in between.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limiter {
    pub(super) base: Duration,
    pub(super) most: Duration,
}

impl Limiter {
    /// client-go's `DefaultTypedControllerRateLimiter`, without its bucket of 10 a second.
    pub(super) const DEFAULT: Self = Self { base: Duration::from_millis(5), most: Duration::from_secs(1000) };

    /// The wait after so many failures before this one.
    fn wait(self, failures: u32) -> Duration {
        self.base.saturating_mul(2_u32.saturating_pow(failures)).min(self.most)
    }
}

#[derive(Debug, Clone, Copy)]
struct Item {
    due: Instant,
    priority: i64,
    /// First come, first served.
    order: u64,
}

#[derive(Debug, Default)]
struct State {
    items: HashMap<String, Item>,
    failures: HashMap<String, u32>,
    added: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    limiter: Limiter,
    state: Mutex<State>,
    changed: Notify,
}

impl Queue {
    pub(super) fn new(limiter: Limiter) -> Self {
        Self { limiter, state: Mutex::default(), changed: Notify::new() }
    }

    /// Now.
    pub(super) fn add(&self, key: &str, priority: i64) {
        self.add_after(key, priority, Duration::ZERO);
    }

    /// After a while; sooner where it was to come sooner, or is added again meanwhile.
    pub(super) fn add_after(&self, key: &str, priority: i64, delay: Duration) {
        let due = Instant::now() + delay;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.added += 1;
        let order = state.added;
        let item = state.items.entry(key.to_owned()).or_insert(Item { due, priority, order });
        item.due = item.due.min(due);
        item.priority = item.priority.max(priority);
        drop(state);
        self.changed.notify_one();
    }

    /// After a failure: each waits twice as long as the one before.
    pub(super) fn retry(&self, key: &str, priority: i64) {
        let failures = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let failures = state.failures.entry(key.to_owned()).or_default();
            *failures += 1;
            *failures - 1
        };
        self.add_after(key, priority, self.limiter.wait(failures));
    }

    /// After a success: the next failure is the first one again.
    pub(super) fn forget(&self, key: &str) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failures.remove(key);
    }

    /// The most important key that is due, and its priority; waits for one.
    pub(super) async fn next(&self) -> (String, i64) {
        loop {
            let soonest = match self.take() {
                Ok(found) => return found,
                Err(soonest) => soonest,
            };
            let change = self.changed.notified();
            match soonest {
                Some(due) => tokio::select! {
                    () = change => {}
                    () = tokio::time::sleep_until(due) => {}
                },
                None => change.await,
            }
        }
    }

    fn take(&self) -> Result<(String, i64), Option<Instant>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let due = state.items.iter().filter(|(_, item)| item.due <= now);
        let first = due.max_by_key(|(_, item)| (item.priority, std::cmp::Reverse(item.order))).map(|(key, _)| key.clone());
        let taken = first.and_then(|key| state.items.remove(&key).map(|item| (key, item.priority)));
        taken.ok_or_else(|| state.items.values().map(|item| item.due).min())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_wait_twice_as_long_each_time_up_to_the_most() {
        let waits: Vec<_> = (0..20).map(|failures| Limiter::DEFAULT.wait(failures)).collect();
        assert_eq!(waits[..4], [5, 10, 20, 40].map(Duration::from_millis));
        assert_eq!(waits[13], Duration::from_millis(40_960));
        assert_eq!(waits[19], Duration::from_secs(1000));
    }

    #[tokio::test]
    async fn the_important_come_first_and_each_once() {
        let queue = Queue::new(Limiter::DEFAULT);
        queue.add("a", 0);
        queue.add("b", 0);
        queue.add("critical", 100);
        queue.add("a", 0);
        queue.add_after("later", 1000, Duration::from_millis(20));
        for expected in ["critical", "a", "b", "later"] {
            assert_eq!(queue.next().await.0, expected);
        }
        // Sooner, and as important as whoever added it last says.
        queue.add_after("x", 0, Duration::from_secs(600));
        queue.add("x", 50);
        assert_eq!(queue.next().await, ("x".to_owned(), 50));
    }
}
