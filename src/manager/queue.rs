//! Which VM is looked at next: a set of keys with times, no key twice at once, backoff after failures. Pure: times are arguments.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use super::watch::Key;

/// After the first failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// After many.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Keys that wait, and keys that are being worked on.
#[derive(Debug, Default)]
pub(super) struct Queue {
    due: HashMap<Key, Instant>,
    order: BTreeSet<(Instant, Key)>,
    busy: HashSet<Key>,
    failures: HashMap<Key, u32>,
}

impl Queue {
    /// Look at it at this time, or earlier if that was asked already.
    pub(super) fn add(&mut self, key: Key, at: Instant) {
        if let Some(&before) = self.due.get(&key) {
            if before <= at {
                return;
            }
            self.order.remove(&(before, key.clone()));
        }
        self.due.insert(key.clone(), at);
        self.order.insert((at, key));
    }

    /// The next key that is due and not being worked on; it is being worked on from now.
    pub(super) fn take(&mut self, now: Instant) -> Option<Key> {
        let key =
            self.order.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| key).find(|key| !self.busy.contains(*key))?.clone();
        if let Some(at) = self.due.remove(&key) {
            self.order.remove(&(at, key.clone()));
        }
        self.busy.insert(key.clone());
        Some(key)
    }

    /// The work on a key ended; it comes again after so long at the latest. After a failure it comes again after a pause, each time a longer one.
    pub(super) fn done(&mut self, key: Key, worked: bool, again: Option<Duration>, now: Instant) {
        self.busy.remove(&key);
        if worked {
            self.failures.remove(&key);
            if let Some(again) = again {
                self.add(key, now + again);
            }
        } else {
            let failures = self.failures.entry(key.clone()).or_default();
            let pause =
                FIRST_PAUSE.saturating_mul(1 << (*failures).min(6)).min(again.unwrap_or(LONGEST_PAUSE)).min(LONGEST_PAUSE);
            *failures = failures.saturating_add(1);
            self.add(key, now + pause);
        }
    }

    /// When the next key is due that is not being worked on.
    pub(super) fn next(&self) -> Option<Instant> {
        self.order.iter().find(|(_, key)| !self.busy.contains(key)).map(|(at, _)| *at)
    }

    /// Forgets what waits (the leadership is gone).
    pub(super) fn clear(&mut self) {
        self.due.clear();
        self.order.clear();
        self.failures.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key { namespace: "ns".into(), name: name.into() }
    }

    #[test]
    fn a_key_waits_once_and_is_never_worked_on_twice_at_once() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(key("a"), now + Duration::from_secs(5));
        queue.add(key("a"), now);
        queue.add(key("a"), now + Duration::from_secs(9));
        assert_eq!(queue.take(now), Some(key("a")));
        assert_eq!(queue.take(now), None);

        queue.add(key("a"), now);
        assert_eq!((queue.take(now), queue.next()), (None, None), "it is busy");
        queue.done(key("a"), true, None, now);
        assert_eq!((queue.next(), queue.take(now)), (Some(now), Some(key("a"))));
        queue.done(key("a"), true, Some(Duration::from_secs(3)), now);
        assert_eq!(queue.take(now), None);
        assert_eq!(queue.take(now + Duration::from_secs(3)), Some(key("a")));
    }

    #[test]
    fn failures_pause_longer_each_time_up_to_a_minute() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.add(key("a"), now);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(queue.take(now), Some(key("a")));
            queue.done(key("a"), false, None, now);
            assert_eq!(queue.next(), Some(now + Duration::from_secs(pause)));
            now += Duration::from_secs(pause);
        }
        assert_eq!(queue.take(now), Some(key("a")));
        queue.done(key("a"), true, None, now);
        queue.add(key("a"), now);
        assert_eq!(queue.take(now), Some(key("a")));
        queue.done(key("a"), false, None, now);
        assert_eq!(queue.next(), Some(now + Duration::from_secs(1)), "success forgives");
    }

    #[test]
    fn what_is_held_is_looked_at_soon_whatever_fails() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.add(key("a"), now);
        for pause in [1, 2, 4, 5, 5, 5] {
            assert_eq!(queue.take(now), Some(key("a")));
            queue.done(key("a"), false, Some(Duration::from_secs(5)), now);
            assert_eq!(queue.next(), Some(now + Duration::from_secs(pause)));
            now += Duration::from_secs(pause);
        }
    }

    #[test]
    fn a_busy_key_blocks_no_other() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(key("a"), now);
        assert_eq!(queue.take(now), Some(key("a")));
        queue.add(key("a"), now);
        queue.add(key("b"), now);
        assert_eq!(queue.take(now), Some(key("b")));
    }
}
