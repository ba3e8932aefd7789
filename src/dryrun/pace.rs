//! The pace of a line. In: how much was carried, and when. Out: until when the line is busy with it. Knows no clock: time is an
//! argument.

use std::time::{Duration, Instant};

use crate::model::units::BytesPerSecond;

/// A timer that wakes late is made up for, by this much; a pause of the sender is not.
const SLACK: Duration = Duration::from_millis(10);

/// A line of a given rate, by deadlines that do not drift.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    rate: BytesPerSecond,
    free: Instant,
}

impl Pace {
    /// An idle line. A rate of 0 carries nothing, ever.
    pub fn new(rate: BytesPerSecond, now: Instant) -> Self {
        Self { rate, free: now }
    }

    /// Takes so many bytes in, and says until when they are under way.
    pub fn carry(&mut self, bytes: usize, now: Instant) -> Instant {
        const LONGEST: Duration = Duration::from_secs(86_400);
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let took = Duration::try_from_secs_f64(bytes as f64 / self.rate.0 as f64).unwrap_or(LONGEST).min(LONGEST);
        self.free = self.free.max(earliest) + took;
        self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn late_timers_do_not_slow_the_line_down() {
        let began = Instant::now();
        let mut pace = Pace::new(BytesPerSecond(1_000_000), began);
        let mut now = began;
        for piece in 1..=100 {
            let until = pace.carry(1000, now);
            assert_eq!(until, began + piece * MS);
            // Woken 0.7 ms too late each time.
            now = now.max(until) + MS * 7 / 10;
        }
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let began = Instant::now();
        let mut pace = Pace::new(BytesPerSecond(1_000_000), began);
        pace.carry(1000, began);
        let later = began + 500 * MS;
        assert_eq!(pace.carry(20_000, later), later + 10 * MS);
    }

    #[test]
    fn no_rate_is_no_panic() {
        let now = Instant::now();
        assert!(Pace::new(BytesPerSecond(0), now).carry(1, now) > now + 1000 * MS);
        assert!(Pace::new(BytesPerSecond(0), now).carry(0, now) >= now);
    }
}
