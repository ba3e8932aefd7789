//! Watching a dry run: events and answers of QEMU's become synchronisations, progress, and the decision to end.
//!
//! **When a sync is, and how much was pending then.** QEMU's event `MIGRATION_PASS` names its sync and the time to the microsecond; the answer to
//! `query-migrate` comes a millisecond later, when pages have been sent since. How many, the sink knows: what QEMU had on the wire when it
//! answered, less what had come when the sync was. Without events (a monitor that passes none on) answers alone have to do, taken
//! every few milliseconds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

use super::{
    DryRunError, End, Plan, Progress, Reason, Report,
    course::{Course, Step, Sync},
    run::{is_foreign, order},
    sink::Sink,
};
use crate::{
    model::units::{BytesPerSecond, PAGE},
    qemu::{
        migration::{self, Limits, MigrationInfo, MigrationStatus, RamInfo},
        monitor::Monitor,
        qmp::{Event, plain},
        vm,
    },
};

/// Between two answers where events tell of syncs, ...
const POLL: Duration = Duration::from_millis(100);
/// ... and where none do.
const POLL_WITHOUT_EVENTS: Duration = Duration::from_millis(4);
/// QEMU tells of the beginning at once; a monitor that has not passed it on by then passes nothing on.
const EVENTS_WITHIN: Duration = Duration::from_millis(300);
/// Whether the guest runs is asked so often; an event tells at once.
const LOOK_AT_GUEST: Duration = Duration::from_millis(250);
/// So long without a byte, and the run is stuck.
const STALLED: Duration = Duration::from_secs(10);

/// A run under way.
pub(super) struct Watching {
    course: Course,
    began: Instant,
    /// When QEMU's own clock of this migration began, by the wall clock, ms.
    began_wall_ms: Option<f64>,
    budget: Option<Duration>,
    deadline: Duration,
    link: Option<BytesPerSecond>,
    events: bool,
    /// The last sync that was looked at.
    count: u64,
    /// The last answer, and when it came.
    last: Option<(RamInfo, Instant)>,
    /// On the wire at the last change, and when that was.
    moved: (u64, Instant),
    guest_seen: Instant,
}

/// What the events since the last look say.
#[derive(Default)]
struct Heard {
    /// The last sync: its number, when it was.
    pass: Option<(u64, Instant)>,
    stopped: bool,
}

impl Watching {
    pub(super) fn new(plan: &Plan, switchover_bandwidth: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            course: Course::new(&plan.downtime_limits, switchover_bandwidth),
            began: now,
            began_wall_ms: None,
            budget: plan.time_budget,
            deadline: plan.deadline,
            link: plan.pace(),
            events: false,
            count: 0,
            last: None,
            moved: (0, now),
            guest_seen: now,
        }
    }

    /// Until the run has an answer, or cannot have one. Cancels nothing itself.
    pub(super) async fn watch(
        &mut self,
        monitor: &mut Monitor,
        sink: &Sink,
        news: &watch::Sender<Progress>,
        orders: &mut oneshot::Receiver<Reason>,
    ) -> Result<Report, DryRunError> {
        let total = crate::qemu::ram::guest_ram_bytes(monitor).await?;
        let mut told = self.began;
        loop {
            let until = Instant::now() + self.poll();
            let heard = tokio::select! {
                biased;
                reason = order(orders) => return Err(DryRunError::Withdrawn { reason }),
                heard = self.listen(monitor, until) => heard?,
            };
            let info = migration::query(monitor).await?;
            let now = Instant::now();
            self.check(monitor, sink, &info, heard.stopped).await?;
            let mut ram = info.ram.unwrap_or_default();
            // A page is a page, also where only what has changed in it went over the line.
            ram.normal = ram.normal.saturating_add(info.xbzrle_cache.unwrap_or_default().pages);
            if now.duration_since(told) >= POLL {
                told = now;
                let _ = news.send(Progress {
                    iteration: ram.dirty_sync_count,
                    remaining: ram.remaining,
                    total,
                    rate: rate(&ram),
                    elapsed: now.duration_since(self.began),
                });
            }
            let step = self.look(&info, &ram, heard.pass, sink, now);
            self.last = Some((ram, now));
            let elapsed = now.duration_since(self.began);
            let end = match step {
                Step::Met => Some(End::Met),
                Step::Hopeless => Some(End::Hopeless),
                Step::Lower(limit) => {
                    migration::set_limits(monitor, &Limits::downtime(limit)).await?;
                    None
                }
                Step::Go => None,
            };
            let end = end
                .or_else(|| self.budget.filter(|budget| elapsed >= *budget).map(|_| End::Budget))
                .or_else(|| (elapsed >= self.deadline).then_some(End::Deadline));
            if let Some(end) = end {
                return Ok(Report {
                    ram: total,
                    end,
                    elapsed,
                    iterations: ram.dirty_sync_count,
                    normal_pages: ram.normal,
                    zero_pages: ram.duplicate,
                    wire: ram.transferred,
                    answers: self.course.answers().to_vec(),
                    link: self.link,
                });
            }
        }
    }

    fn poll(&self) -> Duration {
        if self.events || self.began.elapsed() < EVENTS_WITHIN { POLL } else { POLL_WITHOUT_EVENTS }
    }

    /// Waits for the next event that matters, at most until then.
    async fn listen(&mut self, monitor: &mut Monitor, until: Instant) -> Result<Heard, DryRunError> {
        let mut heard = Heard::default();
        let mut until = until;
        while let Some(event) = monitor.next_event(until).await? {
            match event.name.as_str() {
                "MIGRATION_PASS" => {
                    self.events = true;
                    heard.pass = event.data.get("pass").and_then(serde_json::Value::as_u64).map(|pass| (pass, happened(&event)));
                }
                "MIGRATION" => {
                    self.events = true;
                    if self.began_wall_ms.is_none() {
                        self.began_wall_ms = event.timestamp.ms();
                    }
                }
                "STOP" => heard.stopped = true,
                _ => continue,
            }
            // Whatever else is there already, and no more waiting.
            until = Instant::now();
        }
        Ok(heard)
    }

    /// Is it still ours, and does it still move, and does the guest run?
    async fn check(
        &mut self,
        monitor: &mut Monitor,
        sink: &Sink,
        info: &MigrationInfo,
        stopped: bool,
    ) -> Result<(), DryRunError> {
        let status = info.status.unwrap_or(MigrationStatus::None);
        if status.is_active() && is_foreign(info, self.began) {
            return Err(DryRunError::Foreign { unrestored: String::new() });
        }
        if !status.is_active() || sink.hung_up() {
            let words = info.error_desc.as_deref().map(|words| format!(": {}", plain(words))).unwrap_or_default();
            return Err(DryRunError::Interrupted { status, words });
        }
        if stopped || self.guest_seen.elapsed() >= LOOK_AT_GUEST {
            self.guest_seen = Instant::now();
            let guest = vm::status(monitor).await?;
            if guest.is_paused() {
                return Err(DryRunError::Stopped { state: guest.state });
            }
        }
        if sink.bytes() != self.moved.0 {
            self.moved = (sink.bytes(), Instant::now());
        }
        if self.moved.1.elapsed() >= STALLED {
            return Err(DryRunError::Stalled { waited: STALLED });
        }
        Ok(())
    }

    /// Was there a sync?
    fn look(&mut self, info: &MigrationInfo, ram: &RamInfo, pass: Option<(u64, Instant)>, sink: &Sink, now: Instant) -> Step {
        if ram.dirty_sync_count <= self.count {
            return Step::Go;
        }
        let before = self.last;
        let at = match pass {
            Some((number, at)) if number == ram.dirty_sync_count => at,
            // Its event is on the way.
            _ if self.events => return Step::Go,
            // Some time since the last answer.
            _ => before.map_or(now, |(_, then)| then + now.duration_since(then) / 2),
        };
        self.count = ram.dirty_sync_count;
        let since =
            sink.since(at.into_std(), ram.transferred.0, before.filter(|_| !self.events).map(|(_, then)| then.into_std()));
        // At most what was sent since the last answer.
        let most = before.map_or(f64::INFINITY, |(before, _)| {
            (ram.normal + ram.duplicate).saturating_sub(before.normal + before.duplicate) as f64
        });
        let page = page_on_wire(ram);
        let sent = (since as f64 / page).min(most).max(0.0);
        self.course.sync(Sync {
            at_ms: self.at_ms(info, at, now),
            count: ram.dirty_sync_count,
            pending: ram.remaining.0 as f64 + sent * PAGE as f64,
            throughput: ram.mbps * 125.0,
            normal: (ram.normal as f64 - sent).max(0.0),
            zero: ram.duplicate as f64,
            wire: (ram.transferred.0 as f64 - sent * page).max(0.0),
        })
    }

    /// QEMU's time at that moment: since `migrate` by its own clock.
    fn at_ms(&self, info: &MigrationInfo, at: Instant, now: Instant) -> f64 {
        let ago = now.saturating_duration_since(at).as_secs_f64() * 1e3;
        match (self.began_wall_ms, info.total_time) {
            (Some(began), _) => wall_ms() - ago - began - Instant::now().duration_since(now).as_secs_f64() * 1e3,
            // Whole ms, rounded down.
            (None, Some(total)) => (total as f64 + 0.5 - ago).max(0.0),
            (None, None) => at.duration_since(self.began).as_secs_f64() * 1e3,
        }
    }
}

/// Bytes of a page on the wire so far, compressed or not.
fn page_on_wire(ram: &RamInfo) -> f64 {
    use crate::model::replay::{WIRE_PAGE, WIRE_ZERO};
    let normal = ram.transferred.0 as f64 - ram.duplicate as f64 * WIRE_ZERO;
    (normal / (ram.normal as f64).max(1.0)).clamp(1.0, WIRE_PAGE)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate, checked to be sensible")]
fn rate(ram: &RamInfo) -> BytesPerSecond {
    BytesPerSecond(if (0.0..1e12).contains(&ram.mbps) { (ram.mbps * 125_000.0) as u64 } else { 0 })
}

fn wall_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1e3)
}

/// When it happened, by our clock; an event that claims to come from the future or from long ago happened now.
fn happened(event: &Event) -> Instant {
    let now = Instant::now();
    let ago = event.timestamp.ms().map(|at| wall_ms() - at).filter(|ago| (0.0..5_000.0).contains(ago)).unwrap_or(0.0);
    now.checked_sub(Duration::from_secs_f64(ago / 1e3)).unwrap_or(now)
}
