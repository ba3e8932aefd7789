//! What is done about a migration on its way: QEMU throttles the guest, KubeVirt allows a longer downtime or switches to post-copy.
//!
//! In: what happens at each sync of the replay. Out: how fast the guest's own clock runs, how long a downtime is allowed, when the
//! migration is given up. Read in QEMU 10.0 (`migration/ram.c`, `migration/cpu-throttle.c`) and KubeVirt 1.9
//! (`live-migration-source.go`, `stall-detector.go`).

use std::collections::VecDeque;

use super::replay::Settings;

/// QEMU looks at most so often whether to throttle (`migration_bitmap_sync`), ms.
const CHECK_MS: f64 = 1000.0;
/// `throttle-trigger-threshold`: dirtied bytes over transferred ones.
const TRIGGER: f64 = 0.5;
/// `cpu-throttle-initial`, `cpu-throttle-increment`, `max-cpu-throttle`, percent.
const THROTTLE: (u32, u32, u32) = (20, 10, 99);
/// Checks above the trigger that raise the throttle (`dirty_rate_high_cnt`); those below it in between do not count against them.
const CHECKS: u32 = 2;
/// QEMU 10: where no sync came for so long, there is one all the same (`cpu_throttle_dirty_sync_timer_tick`), ms.
const PERIODIC_SYNC_MS: f64 = 5000.0;
/// So many checks without a rise: the throttle has found its place.
const QUIET_CHECKS: u32 = 4;
/// KubeVirt's `stallProgressTimeout`: pending pages that have not fallen for so long are stalled, ms; ...
const STALL_MS: f64 = 40_000.0;
/// ... `stallMargin`: give or take this share.
const STALL_MARGIN: f64 = 0.04;
/// `patienceWindowDecayFactor`.
const PATIENCE_DECAY: f64 = 0.5;
/// `precopyPossibleFactor`: a downtime further beyond what is allowed than this ends the migration at once.
const POSSIBLE: f64 = 1.5;
/// `switchoverTimeout`: it has to converge so long after, ms.
const SWITCHOVER_MS: f64 = 60_000.0;
/// What QEMU is told at first, ms.
const FIRST_LIMIT_MS: f64 = 300.0;

/// What the replay tells of a sync.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sync {
    /// ms since the start.
    pub(super) now: f64,
    /// Pages that it found written, and that were not pending already.
    pub(super) dirtied: f64,
    /// Pages pending after it.
    pub(super) pending: f64,
    /// On the wire since the start.
    pub(super) wire_bytes: f64,
    /// QEMU's throughput in its last window, bytes per ms.
    pub(super) rate: f64,
}

/// What is done about a migration on its way. What is not overridden leaves it alone.
pub(super) trait Steering {
    /// The guest's own clock, ms: it never runs backwards, and never faster than time.
    fn guest(&self, now: f64) -> f64 {
        now
    }

    /// QEMU's downtime limit.
    fn limit_ms(&self, settings: &Settings) -> f64 {
        settings.downtime_limit_ms
    }

    /// The migration is given up then.
    fn deadline_ms(&self, settings: &Settings) -> f64 {
        settings.deadline_ms
    }

    /// A sync that the loop did not ask for.
    fn wants_sync(&mut self, _now: f64, _syncs: u64) -> bool {
        false
    }

    /// Takes note of a sync while the guest runs. True: something about the migration has changed by it.
    fn synced(&mut self, _sync: &Sync) -> bool {
        false
    }

    /// Nothing more will be changed as long as the migration goes on as it does.
    fn settled(&self) -> bool {
        true
    }
}

/// Nothing is done.
#[derive(Debug)]
pub(super) struct Unsteered;

impl Steering for Unsteered {}

/// QEMU's auto-converge (`migration_trigger_throttle`, `mig_throttle_guest_down`): where the guest dirties more than half of what is
/// transferred, its CPUs are put to sleep for 20 % of the time, then for 10 % more, to 99 %. A CPU that was idle for as long anyhow does
/// the same work as before.
#[derive(Debug)]
pub(super) struct AutoConverge<'a> {
    percent: u32,
    /// How busy each CPU is when nothing hinders it.
    cpus: &'a [f64],
    /// How fast the guest's clock runs.
    pace: f64,
    /// What the guest's clock showed, and when.
    clock: (f64, f64),
    checked_at: f64,
    dirtied: f64,
    wire_bytes: f64,
    high: u32,
    quiet: u32,
    tick_at: f64,
    syncs_at_tick: u64,
}

impl<'a> AutoConverge<'a> {
    /// From the first sync on. `cpus`: how busy each CPU of the guest is, 0..=1; empty: taken as busy all the time.
    pub(super) fn new(settings: &Settings, cpus: &'a [f64]) -> Self {
        let start = settings.host.setup_ms;
        Self {
            percent: 0,
            cpus,
            pace: 1.0,
            clock: (start, start),
            checked_at: start,
            dirtied: 0.0,
            wire_bytes: 0.0,
            high: 0,
            quiet: 0,
            tick_at: start + PERIODIC_SYNC_MS,
            syncs_at_tick: 0,
        }
    }

    /// How much of its time the guest sleeps now, percent.
    pub(super) fn percent(&self) -> u32 {
        self.percent
    }

    fn throttle(&mut self, percent: u32, now: f64) {
        self.clock = (self.guest(now), now);
        self.percent = percent;
        self.quiet = 0;
        let left = 1.0 - f64::from(percent) / 100.0;
        let wanted: f64 = self.cpus.iter().sum();
        let given: f64 = self.cpus.iter().map(|busy| busy.min(left)).sum();
        self.pace = if wanted > 0.0 { given / wanted } else { left };
    }
}

impl Steering for AutoConverge<'_> {
    fn guest(&self, now: f64) -> f64 {
        let (showed, at) = self.clock;
        showed + (now - at) * self.pace
    }

    fn wants_sync(&mut self, now: f64, syncs: u64) -> bool {
        if now < self.tick_at {
            return false;
        }
        // The first pass copies everything anyhow.
        let wanted = syncs > 1 && syncs == self.syncs_at_tick;
        self.syncs_at_tick = syncs + u64::from(wanted);
        self.tick_at = now + PERIODIC_SYNC_MS;
        wanted
    }

    fn synced(&mut self, sync: &Sync) -> bool {
        self.dirtied += sync.dirtied;
        if sync.now <= self.checked_at + CHECK_MS {
            return false;
        }
        let too_much = self.dirtied * 4096.0 > (sync.wire_bytes - self.wire_bytes) * TRIGGER;
        (self.checked_at, self.dirtied, self.wire_bytes) = (sync.now, 0.0, sync.wire_bytes);
        self.high += u32::from(too_much);
        self.quiet += 1;
        if self.high < CHECKS {
            return false;
        }
        self.high = 0;
        let (first, more, most) = THROTTLE;
        let percent = if self.percent == 0 { first } else { (self.percent + more).min(most) };
        let risen = percent > self.percent;
        if risen {
            self.throttle(percent, sync.now);
        }
        risen
    }

    fn settled(&self) -> bool {
        self.percent >= THROTTLE.2 || self.quiet >= QUIET_CHECKS
    }
}

/// KubeVirt switches to post-copy where the budget ends. The replay ends there; what was left is what the guest then misses.
#[derive(Debug)]
pub(super) struct UntilPostCopy {
    begins_ms: f64,
    missing: Option<f64>,
}

impl UntilPostCopy {
    pub(super) fn new(begins_ms: f64) -> Self {
        Self { begins_ms, missing: None }
    }

    /// Pages that the target did not have; `None`: it never came to that.
    pub(super) fn missing(&self) -> Option<f64> {
        self.missing
    }
}

impl Steering for UntilPostCopy {
    fn deadline_ms(&self, _: &Settings) -> f64 {
        if self.missing.is_some() { self.begins_ms } else { f64::INFINITY }
    }

    fn wants_sync(&mut self, now: f64, _: u64) -> bool {
        now >= self.begins_ms
    }

    fn synced(&mut self, sync: &Sync) -> bool {
        if sync.now >= self.begins_ms {
            self.missing = Some(sync.pending);
        }
        false
    }

    fn settled(&self) -> bool {
        false
    }
}

/// KubeVirt's stall detector (gate `MigrationStallDetection`): QEMU begins with 300 ms, and gets the whole of what is allowed only once
/// the pending pages no longer fall.
#[derive(Debug)]
pub(super) struct StallDetector {
    allowed_ms: f64,
    /// Pending pages of the last syncs, and when: each a new minimum.
    recent: VecDeque<(f64, f64)>,
    /// The least of those that are older.
    least_before: f64,
    /// While it is stalled: the pending pages worth waiting for, those seen meanwhile, and when less will do and how much later again.
    stalled: Option<Stalled>,
    /// Since the whole is allowed, or the migration was given up: when it ends.
    ends_ms: Option<f64>,
    raised: bool,
}

#[derive(Debug)]
struct Stalled {
    best: f64,
    seen: Vec<f64>,
    relax_at: f64,
    patience_ms: f64,
}

impl StallDetector {
    /// KubeVirt's `maxDowntimeMs`.
    pub(super) fn new(allowed_ms: f64) -> Self {
        Self { allowed_ms, recent: VecDeque::new(), least_before: f64::INFINITY, stalled: None, ends_ms: None, raised: false }
    }

    /// Is the migration stalled by this sync, and is now the time to act?
    fn acts(&mut self, now: f64, pending: f64) -> bool {
        while let Some(&(_, least)) = self.recent.front().filter(|(at, _)| now - at > STALL_MS) {
            self.least_before = self.least_before.min(least);
            self.recent.pop_front();
        }
        let least = self.recent.back().map_or(f64::INFINITY, |(_, least)| *least);
        if pending < least && pending <= self.least_before {
            self.recent.push_back((now, pending));
        }
        if pending < self.least_before * (1.0 - STALL_MARGIN) {
            self.stalled = None;
            return false;
        }
        let best = self.recent.iter().map(|(_, pending)| *pending).fold(self.least_before, f64::min);
        let stalled = self.stalled.get_or_insert_with(|| Stalled {
            best,
            seen: Vec::new(),
            relax_at: now + STALL_MS,
            patience_ms: STALL_MS,
        });
        stalled.seen.push(pending);
        if now > stalled.relax_at {
            stalled.seen.sort_by(|a, b| b.total_cmp(a));
            stalled.best = stalled.seen.pop().unwrap_or(stalled.best);
            stalled.patience_ms *= PATIENCE_DECAY;
            stalled.relax_at = now + stalled.patience_ms;
        }
        pending <= stalled.best * (1.0 + STALL_MARGIN)
    }
}

impl Steering for StallDetector {
    fn limit_ms(&self, _: &Settings) -> f64 {
        if self.raised { self.allowed_ms } else { self.allowed_ms.min(FIRST_LIMIT_MS) }
    }

    fn deadline_ms(&self, settings: &Settings) -> f64 {
        self.ends_ms.unwrap_or(settings.deadline_ms)
    }

    fn synced(&mut self, sync: &Sync) -> bool {
        if self.ends_ms.is_some() || !self.acts(sync.now, sync.pending) || sync.rate <= 0.0 {
            return false;
        }
        self.raised = sync.pending * 4096.0 / sync.rate <= self.allowed_ms * POSSIBLE;
        self.ends_ms = Some(if self.raised { sync.now + SWITCHOVER_MS } else { sync.now });
        self.raised
    }

    fn settled(&self) -> bool {
        self.ends_ms.is_some()
    }
}
