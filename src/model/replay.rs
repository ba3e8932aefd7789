//! QEMU's pre-copy loop, page by page (`migration/migration.c`, `migration/ram.c`, QEMU 10).
//!
//! In: a [`Realisation`] of who writes which page when, and the settings. Out: what the migration would do. Fed with the
//! true writes of a guest it meets real migrations within 1 %, the number of dirty-log syncs included.
//!
//! What the paper's recurrence leaves out and this does not: the rate limiter works in windows of 100 ms, and inside a
//! window pages go at the rate of the line; zero pages cost 9 bytes and a scan; a page written again before it was sent
//! is free; KVM write-protects pages again chunk by chunk as the sender reaches them, not at the sync; downtime is what
//! is pending over the rate of the line, since the limiter is off once the guest has stopped.

use std::collections::VecDeque;

use super::{
    curve::whole,
    forecast::HostConstants,
    pattern::{Pattern, Realisation, Writer},
    steer::{Steering, Sync, Unsteered},
    units::Bandwidth,
};

/// Bytes of a normal page in the stream: the page and its header.
pub const WIRE_PAGE: f64 = 4096.0 + 8.0;
/// Bytes of a zero page in the stream.
pub const WIRE_ZERO: f64 = 9.0;
/// QEMU's `BUFFER_DELAY`: the window of the rate limiter and of the bandwidth estimate, ms.
const WINDOW_MS: f64 = 100.0;
/// QEMU's `MAX_WAIT`: the longest stretch of sending before the loop looks up, ms.
const MAX_WAIT_MS: f64 = 50.0;
/// Pages between two looks at the clock while sending.
const CLOCK_EVERY: f64 = 64.0;
/// Pages whose write protection is renewed at once (`x-clear-bitmap-shift` 18: 1 GiB).
const CHUNK_PAGES: u64 = 1 << 18;
/// One turn of the loop with nothing to send, ms.
const IDLE_TURN_MS: f64 = 0.02;
/// Syncs that tell whether a replay goes round in circles: two halves, to be compared with each other.
const STEADY_SYNCS: usize = 32;
/// A steady replay whose pending pages never came nearer to the threshold than so many of their standard deviations,
/// and than this share of it, would not end otherwise.
const HOPELESS: (f64, f64) = (6.0, 0.03);
/// A replay that has not ended after so many turns (hours of QEMU's time) or syncs goes on as it did: the work is bounded, also
/// where no budget bounds the migration.
const MOST_TURNS: u32 = 200_000;
const MOST_SYNCS: u64 = 5_000;
/// From the decision to switch over until the guest stands still, ms.
const STOP_MS: f64 = 0.3;

/// What a replayed migration runs under.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// QEMU's `max-bandwidth`.
    pub bandwidth: Bandwidth,
    /// QEMU's `downtime-limit`, ms.
    pub downtime_limit_ms: f64,
    /// The replay gives up after this long, ms.
    pub deadline_ms: f64,
    /// What the host can do.
    pub host: HostConstants,
}

/// What a replayed migration did. Pages are fractional, since samples may be sent in part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// It switched over before the deadline.
    pub converged: bool,
    /// From `migrate` to the end, ms.
    pub total_ms: f64,
    /// The guest stood still for so long, ms; 0 where it did not converge.
    pub downtime_ms: f64,
    /// QEMU's `dirty-sync-count`.
    pub syncs: u64,
    /// QEMU's `normal`: pages sent whole.
    pub pages: f64,
    /// QEMU's `duplicate`: zero pages sent.
    pub zero_pages: f64,
}

impl Outcome {
    /// Bytes on the wire.
    pub fn transferred_bytes(&self) -> f64 {
        self.pages * WIRE_PAGE + self.zero_pages * WIRE_ZERO
    }
}

/// The write protection of one chunk of memory.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    /// When it was last renewed, ms.
    protected_at: f64,
    /// To be renewed when the sender reaches it.
    stale: bool,
}

/// QEMU's view of guest memory during a migration.
struct Ram<'a> {
    pattern: &'a Pattern,
    writes: Realisation<'a>,
    /// Pages still to send, per sample.
    left: Vec<f64>,
    /// All zero, as far as the sender knows.
    zero: Vec<bool>,
    /// Dirty in KVM's log at the last sync: what a renewal of the protection clears.
    in_log: Vec<bool>,
    chunk_of: Vec<u32>,
    chunks: Vec<Chunk>,
    /// Samples that are ever written. The others are of no interest once they are sent.
    active: Vec<usize>,
    /// What the sender walks over: everything in the first pass, then the active samples.
    order: Vec<usize>,
    /// Scratch of [`Ram::sync`]: since when a write to a sample is news.
    since: Vec<f64>,
    last_sync: f64,
    syncs: u64,
    pending: f64,
    cursor: usize,
}

impl<'a> Ram<'a> {
    fn new(pattern: &'a Pattern, writes: Realisation<'a>, now: f64) -> Self {
        let samples = pattern.samples();
        let mut chunk_of = Vec::with_capacity(samples.len());
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut last = None;
        for sample in samples {
            let chunk = sample.page / CHUNK_PAGES;
            if last != Some(chunk) {
                last = Some(chunk);
                chunks.push(Chunk { protected_at: now, stale: true });
            }
            chunk_of.push(u32::try_from(chunks.len() - 1).unwrap_or(u32::MAX));
        }
        let written = |&index: &usize| samples.get(index).is_some_and(|sample| sample.writer != Writer::Idle);
        Self {
            pattern,
            writes,
            active: (0..samples.len()).filter(written).collect(),
            order: (0..samples.len()).collect(),
            left: samples.iter().map(|sample| sample.weight).collect(),
            zero: samples.iter().map(|sample| sample.zero).collect(),
            in_log: vec![true; samples.len()],
            chunk_of,
            chunks,
            since: vec![0.0; samples.len()],
            last_sync: now,
            syncs: 1,
            pending: pattern.total_pages(),
            cursor: 0,
        }
    }

    /// Collects KVM's dirty log. A page that was clean at the last sync shows if written since then; one that was dirty
    /// shows if written since its chunk was protected again; one not yet protected again still has its bit.
    fn sync(&mut self, now: f64) {
        for &index in &self.active {
            let (Some(since), Some(in_log), Some(&chunk)) =
                (self.since.get_mut(index), self.in_log.get_mut(index), self.chunk_of.get(index))
            else {
                continue;
            };
            *since = match self.chunks.get(chunk as usize) {
                Some(chunk) if *in_log && chunk.stale => f64::INFINITY,
                Some(chunk) if *in_log => {
                    *in_log = false;
                    chunk.protected_at
                }
                _ => self.last_sync,
            };
        }
        let samples = self.pattern.samples();
        let Self { left, zero, in_log, pending, .. } = self;
        self.writes.written(&self.since, now, |index| {
            if let (Some(sample), Some(left), Some(zero), Some(in_log)) =
                (samples.get(index), left.get_mut(index), zero.get_mut(index), in_log.get_mut(index))
            {
                *pending += sample.weight - *left;
                *left = sample.weight;
                *zero = false;
                *in_log = true;
            }
        });
        for chunk in &mut self.chunks {
            chunk.stale = true;
        }
        self.last_sync = now;
        self.syncs += 1;
    }
}

/// What the sender has done, and what the clock says.
struct Sender {
    now: f64,
    /// Bytes sent in the present window.
    sent: f64,
    pages: f64,
    zero_pages: f64,
    quota: f64,
    page_ms: f64,
    zero_page_ms: f64,
}

impl Sender {
    /// Bytes on the wire so far.
    fn wire_bytes(&self) -> f64 {
        self.pages * WIRE_PAGE + self.zero_pages * WIRE_ZERO
    }

    /// Sends until the quota is used up, nothing is left, or 50 ms have passed.
    fn send(&mut self, ram: &mut Ram<'_>, steering: &impl Steering) {
        let began = self.now;
        let mut until_look = CLOCK_EVERY;
        let mut idle = 0;
        while self.sent < self.quota && idle < ram.order.len() {
            let Some(&at) = ram.order.get(ram.cursor) else {
                // Once round. In the first pass everything has now been sent once.
                ram.cursor = 0;
                if ram.order.len() > ram.active.len() {
                    ram.order.clone_from(&ram.active);
                    idle = 0;
                }
                continue;
            };
            let (Some(left), Some(&zero), Some(&chunk)) = (ram.left.get_mut(at), ram.zero.get(at), ram.chunk_of.get(at)) else {
                break;
            };
            if *left <= 0.0 {
                idle += 1;
                ram.cursor += 1;
                continue;
            }
            idle = 0;
            if let Some(chunk) = ram.chunks.get_mut(chunk as usize).filter(|chunk| chunk.stale) {
                *chunk = Chunk { protected_at: steering.guest(self.now), stale: false };
            }
            let (wire, each_ms) = if zero { (WIRE_ZERO, self.zero_page_ms) } else { (WIRE_PAGE, self.page_ms) };
            // The whole sample, unless the quota or the 50 ms end within it.
            let mut part = *left;
            if part * wire > self.quota - self.sent {
                part = part.min(((self.quota - self.sent) / wire).ceil());
            }
            let time_left = MAX_WAIT_MS - (self.now - began);
            if part * each_ms > time_left {
                part = part.min((time_left / each_ms + CLOCK_EVERY).max(1.0));
            }
            *left -= part;
            if *left <= 0.0 {
                ram.cursor += 1;
            }
            // Never below nothing: sums and differences of fractions leave a residue.
            ram.pending = (ram.pending - part).max(0.0);
            self.sent += part * wire;
            self.now += part * each_ms;
            if zero {
                self.zero_pages += part;
            } else {
                self.pages += part;
            }
            until_look -= part;
            if until_look <= 0.0 {
                if self.now - began > MAX_WAIT_MS {
                    break;
                }
                until_look = CLOCK_EVERY;
            }
        }
        if self.now <= began {
            self.now += IDLE_TURN_MS;
        }
    }
}

/// The last syncs: pending bytes over the threshold. Below 1 a migration ends.
#[derive(Debug, Default)]
pub struct Steadiness {
    ratios: VecDeque<f64>,
}

impl Steadiness {
    /// Takes one sync in.
    pub fn note(&mut self, ratio: f64) {
        if self.ratios.len() == STEADY_SYNCS {
            self.ratios.pop_front();
        }
        self.ratios.push_back(ratio);
    }

    /// No longer falling, and too far off to get there by chance.
    pub fn hopeless(&self) -> bool {
        let nearest = self.ratios.iter().copied().fold(f64::INFINITY, f64::min);
        if self.ratios.len() < STEADY_SYNCS || nearest < 1.0 + HOPELESS.1 {
            return false;
        }
        let half = STEADY_SYNCS / 2;
        let mean = |part: &mut dyn Iterator<Item = &f64>| part.sum::<f64>() / half as f64;
        let (before, after) = (mean(&mut self.ratios.iter().take(half)), mean(&mut self.ratios.iter().skip(half)));
        let middle = f64::midpoint(before, after);
        let deviation = (self.ratios.iter().map(|r| (r - middle).powi(2)).sum::<f64>() / STEADY_SYNCS as f64).sqrt();
        // The means of two halves of a steady process differ by a third of its deviation, give or take.
        nearest > 1.0 + HOPELESS.0 * deviation && before - after <= deviation
    }
}

/// Replays one migration of one course of events.
pub fn replay(pattern: &Pattern, writes: Realisation<'_>, settings: &Settings) -> Outcome {
    steered(pattern, writes, settings, &mut Unsteered)
}

/// The same, while something is done about it. Writes fall by the guest's own clock, which may run slower than the migration's.
pub(super) fn steered(pattern: &Pattern, writes: Realisation<'_>, settings: &Settings, steering: &mut impl Steering) -> Outcome {
    let host = &settings.host;
    let page_ms = WIRE_PAGE / host.line_rate.per_ms();
    let mut sender = Sender {
        now: host.setup_ms,
        sent: 0.0,
        pages: 0.0,
        zero_pages: 0.0,
        quota: settings.bandwidth.cap().map_or(f64::INFINITY, |cap| cap.per_ms() * WINDOW_MS),
        page_ms,
        zero_page_ms: 1.0 / host.zero_pages_per_ms,
    };
    let mut ram = Ram::new(pattern, writes, steering.guest(sender.now));
    let mut window = sender.now;
    let (mut rate, mut threshold) = (0.0, 0.0);
    let mut steadiness = Steadiness::default();
    let mut steady_after = 2.0 * pattern.cycle_ms() + host.setup_ms;
    let mut turns = 0_u32;
    while sender.now < steering.deadline_ms(settings) && turns < MOST_TURNS && ram.syncs < MOST_SYNCS {
        turns += 1;
        if steering.wants_sync(sender.now, ram.syncs) {
            sync(&mut ram, &sender, rate, steering);
        }
        if sender.sent < sender.quota {
            if ram.pending * 4096.0 < threshold {
                let changed = sync(&mut ram, &sender, rate, steering);
                sender.now += host.sync_ms;
                if ram.pending * 4096.0 < threshold || ram.pending < 0.5 {
                    ram.sync(steering.guest(sender.now + STOP_MS));
                    let downtime_ms = ram.pending * page_ms + host.completion_ms;
                    return Outcome {
                        converged: true,
                        total_ms: sender.now + downtime_ms,
                        downtime_ms,
                        syncs: ram.syncs,
                        pages: sender.pages + ram.pending,
                        zero_pages: sender.zero_pages,
                    };
                }
                steadiness.note(ram.pending * 4096.0 / threshold);
                if changed {
                    // What was seen until now says nothing of what comes.
                    (steadiness, steady_after) = (Steadiness::default(), steering.guest(sender.now) + 2.0 * pattern.cycle_ms());
                }
                if steering.guest(sender.now) > steady_after && steering.settled() && steadiness.hopeless() {
                    break;
                }
            }
            sender.send(&mut ram, steering);
        }
        if sender.now < window + WINDOW_MS && sender.sent >= sender.quota {
            sender.now = window + WINDOW_MS;
        }
        if sender.now >= window + WINDOW_MS {
            rate = sender.sent / (sender.now - window);
            threshold = rate * steering.limit_ms(settings);
            window = sender.now;
            sender.sent = 0.0;
        }
    }
    // Where it was given up early, it would have gone on as before.
    let deadline_ms = steering.deadline_ms(settings);
    let stretch = (deadline_ms / sender.now).max(1.0);
    Outcome {
        converged: false,
        total_ms: deadline_ms,
        downtime_ms: 0.0,
        syncs: whole(ram.syncs as f64 * stretch),
        pages: sender.pages * stretch,
        zero_pages: sender.zero_pages,
    }
}

/// Collects the dirty log while the guest runs, and tells of it. True: something about the migration has changed.
fn sync(ram: &mut Ram<'_>, sender: &Sender, rate: f64, steering: &mut impl Steering) -> bool {
    let before = ram.pending;
    ram.sync(steering.guest(sender.now));
    steering.synced(&Sync {
        now: sender.now,
        dirtied: ram.pending - before,
        pending: ram.pending,
        wire_bytes: sender.wire_bytes(),
        rate,
    })
}
