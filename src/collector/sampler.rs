//! The page sampler: hashes a few thousand guest pages again and again, and notes which ones changed.
//!
//! Two looks. A first, coarse one finds the 2 MiB blocks that change. The long one gives them most of the samples, but
//! writes nothing off as idle: it begins in slots of 10 ms, which tell fast writers apart, and goes on in slots of 50 ms
//! for as long as a migration takes, which tells slow ones apart.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{
    memory::{GuestMemory, MemoryError, Touched},
    trace::{SampledPage, Trace},
};

/// Pages in the grain at which the first look describes memory: 2 MiB.
const BLOCK: u64 = 512;
/// Samples of the first look.
const SCOUTS: usize = 8192;
/// Reads of the first look, and the time between two of them.
const SCOUTING: (u32, Duration) = (3, Duration::from_millis(400));
/// Samples of the long look in memory that changes, and elsewhere.
const SAMPLES: (usize, usize) = (2560, 768);
/// Slots of the long look: fine ones first.
const FINE: Duration = Duration::from_millis(10);
const FINE_SLOTS: u32 = 100;
const COARSE: Duration = Duration::from_millis(50);

/// So many samples, of all of them: never so few that groups of neighbours say nothing.
fn share(samples: usize, effort: f64) -> usize {
    let (samples, least) = (samples as f64, samples.min(256) as f64);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a few thousand")]
    let share = (samples * effort).clamp(least, samples.max(least)) as usize;
    share
}

/// A run of pages: the first one, and how many.
type Run = (u64, u64);

/// Looks for `duration`, and about a second more, with this share of the samples. Blocks: call it off the async threads. Stops early, with what it has,
/// when `stop` is set.
pub fn look(
    memory: &mut GuestMemory,
    duration: Duration,
    seed: u64,
    effort: f64,
    stop: &AtomicBool,
    progress: impl Fn(f64),
) -> Result<Option<Trace>, MemoryError> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let whole = duration + SCOUTING.1 * SCOUTING.0;
    let began = Instant::now();
    let report = |at: Instant| progress((at.duration_since(began).as_secs_f64() / whole.as_secs_f64()).min(1.0));
    let Some(Touched { present, swapped }) = memory.touched(stop)? else { return Ok(None) };
    let everything: u64 = present.iter().map(|run| run.1).sum();

    let scouts = spread(&present, everything, share(SCOUTS, effort), &mut rng);
    let mut prints = Prints::new(scouts.len());
    let mut active = vec![false; usize::try_from(memory.pages().div_ceil(BLOCK)).unwrap_or(0)];
    let mut due = Instant::now();
    for _ in 0..=SCOUTING.0 {
        wait(due);
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        prints.read(memory, &scouts, |index| {
            if let Some(block) = scouts.get(index).and_then(|&page| block_of(&mut active, page)) {
                *block = true;
            }
        })?;
        due += SCOUTING.1;
        report(Instant::now());
    }

    let (changing, calm) = split(&present, &mut active);
    let mut chosen: Vec<(u64, f64)> = Vec::new();
    for (runs, samples) in [(changing, SAMPLES.0), (calm, SAMPLES.1)] {
        let pages: u64 = runs.iter().map(|run| run.1).sum();
        let picked = spread(&runs, pages, share(samples, effort), &mut rng);
        let weight = pages as f64 / picked.len().max(1) as f64;
        chosen.extend(picked.into_iter().map(|page| (page, weight)));
    }
    chosen.sort_unstable_by_key(|&(page, _)| page);
    let pages: Vec<u64> = chosen.iter().map(|&(page, _)| page).collect();

    let mut prints = Prints::new(pages.len());
    let mut trace = Trace {
        total_pages: memory.pages(),
        absent: gaps(&present, &swapped, memory.pages()),
        swapped,
        samples: vec![],
        slot_ends: vec![],
        changed: vec![],
    };
    let start = Instant::now();
    prints.read(memory, &pages, |_| ())?;
    let mut due = start;
    for slot in 0.. {
        due += if slot < FINE_SLOTS { FINE } else { COARSE };
        if due.duration_since(start) > duration || stop.load(Ordering::Relaxed) {
            break;
        }
        wait(due);
        // Where a read was late, its slot is as long as it was, and the next one is due when it was due.
        let now = Instant::now();
        let mut changed = Vec::new();
        prints.read(memory, &pages, |index| changed.extend(u32::try_from(index)))?;
        trace.slot_ends.push(now.duration_since(start).as_secs_f64() * 1000.0);
        trace.changed.push(changed);
        due = due.max(now.checked_sub(COARSE).unwrap_or(now));
        report(now);
    }
    if stop.load(Ordering::Relaxed) {
        return Ok(None);
    }
    trace.samples = chosen.iter().zip(&prints.zero).map(|(&(page, weight), &zero)| SampledPage { page, weight, zero }).collect();
    Ok(Some(trace))
}

/// What was read last.
struct Prints {
    hash: Vec<u64>,
    zero: Vec<bool>,
    read_before: bool,
}

impl Prints {
    fn new(count: usize) -> Self {
        Self { hash: vec![0; count], zero: vec![false; count], read_before: false }
    }

    /// Reads again; calls `changed` for what differs from the last time (not on the first read).
    fn read(&mut self, memory: &mut GuestMemory, pages: &[u64], mut changed: impl FnMut(usize)) -> Result<(), MemoryError> {
        let Self { hash, zero, read_before } = self;
        memory.read(pages, |index, print| {
            if let (Some(hash), Some(zero)) = (hash.get_mut(index), zero.get_mut(index)) {
                if *read_before && *hash != print.hash {
                    changed(index);
                }
                (*hash, *zero) = (print.hash, print.zero);
            }
        })?;
        *read_before = true;
        Ok(())
    }
}

fn wait(due: Instant) {
    if let Some(rest) = due.checked_duration_since(Instant::now()) {
        std::thread::sleep(rest);
    }
}

fn block_of(active: &mut [bool], page: u64) -> Option<&mut bool> {
    usize::try_from(page / BLOCK).ok().and_then(|block| active.get_mut(block))
}

/// So many pages, spread over the runs: one at a random place in each of as many equal parts.
fn spread(runs: &[(u64, u64)], pages: u64, count: usize, rng: &mut Pcg64Mcg) -> Vec<u64> {
    let count = (count as u64).min(pages);
    let mut picked = Vec::new();
    let (mut run, mut before) = (runs.iter(), 0);
    let Some(mut current) = run.next() else { return picked };
    for part in 0..count {
        let (low, high) = (pages * part / count, pages * (part + 1) / count);
        let at = rng.random_range(low..high);
        while at >= before + current.1 {
            before += current.1;
            let Some(next) = run.next() else { return picked };
            current = next;
        }
        picked.push(current.0 + (at - before));
    }
    picked
}

/// Present memory in blocks that changed, and the rest.
fn split(present: &[Run], active: &mut [bool]) -> (Vec<Run>, Vec<Run>) {
    let (mut changing, mut calm) = (vec![], vec![]);
    for &(first, length) in present {
        let mut at = first;
        while at < first + length {
            let end = ((at / BLOCK + 1) * BLOCK).min(first + length);
            let into = if block_of(active, at).is_some_and(|block| *block) { &mut changing } else { &mut calm };
            into.push((at, end - at));
            at = end;
        }
    }
    (changing, calm)
}

/// What lies between the runs.
fn gaps(present: &[Run], swapped: &[Run], pages: u64) -> Vec<Run> {
    let mut gaps = vec![];
    let mut at = 0;
    let mut touched = [present, swapped].concat();
    touched.sort_unstable();
    for (first, length) in touched {
        if first > at {
            gaps.push((at, first - at));
        }
        at = first + length;
    }
    if pages > at {
        gaps.push((at, pages - at));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_and_all_distinct() {
        let runs = [(10, 100), (500, 1), (1000, 899)];
        let mut rng = Pcg64Mcg::seed_from_u64(1);
        let picked = spread(&runs, 1000, 100, &mut rng);
        assert_eq!(picked.len(), 100);
        assert!(picked.windows(2).all(|w| w[0] < w[1]), "{picked:?}");
        assert!(picked.iter().all(|p| runs.iter().any(|r| (r.0..r.0 + r.1).contains(p))));
        assert_eq!(spread(&runs, 1000, 5000, &mut rng).len(), 1000, "never more than there are");
        assert!(spread(&[], 0, 10, &mut rng).is_empty());
    }

    #[test]
    fn memory_is_either_changing_or_calm_or_absent() {
        let present = [(0, 700), (2048, 100)];
        let mut active = vec![false, true, false, false, false];
        let (changing, calm) = split(&present, &mut active);
        assert_eq!(changing, [(512, 188)]);
        assert_eq!(calm, [(0, 512), (2048, 100)]);
        assert_eq!(gaps(&present, &[(800, 100)], 2560), [(700, 100), (900, 1148), (2148, 412)]);
    }
}
