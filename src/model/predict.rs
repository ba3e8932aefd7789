//! From a pattern and a question to a forecast: many replays, each with its own draw and phase.

use std::time::Duration;

use super::{
    classic,
    curve::{Curve, whole},
    forecast::{Bounds, CostWeights, Forecast, Method, ProfilePoint, Question, Verdict},
    lcb::least_convergent_bandwidth,
    pattern::{Pattern, Realisation},
    replay::{Outcome, Settings, replay},
    units::{Bandwidth, BytesPerSecond, PAGE},
};

/// Replays behind a probability: with none of them converging, p is below 0.06 with 95 % confidence.
const REPLAYS: u32 = 48;
/// Replays behind the verdict that the least convergent bandwidth stands on.
const LCB_REPLAYS: u32 = 10;
/// A cheap look at one bandwidth lasts for so many first passes and so many ms.
const CHEAP_PASSES: f64 = 5.0;
const CHEAP_MS: f64 = 10_000.0;
/// Replays behind one point of the profile.
const PROFILE_REPLAYS: u32 = 5;
/// Points of the profile.
const PROFILE_POINTS: u32 = 16;
/// Points of the published curve.
const CURVE_POINTS: usize = 32;
/// From this probability on a migration is said to converge, ...
pub(super) const CONVERGES_FROM: f64 = 0.9;
/// ... and up to this one to fail.
const FAILS_UP_TO: f64 = 0.1;
/// What a host adds that no pattern shows: this share of a time, either way, ...
pub(super) const HOST_SHARE: f64 = 0.03;
/// ... so many ms either way, for what is not in windows, ...
const HOST_MS: f64 = 20.0;
/// ... and a window of the rate limiter, where the sender came too late to use the last one up.
pub(super) const LOST_WINDOW_MS: f64 = 100.0;
/// Where KubeVirt's budget is switched off: a migration that runs for a day has failed anybody.
pub const NO_BUDGET: Duration = Duration::from_secs(86_400);

/// Answers the question from the pattern.
pub fn forecast(pattern: &Pattern, question: &Question) -> Forecast {
    let curve = pattern.curve();
    let under = settings(question);
    let runs = replays(pattern, &under, REPLAYS);
    let (converged, failed): (Vec<Outcome>, Vec<Outcome>) = runs.iter().copied().partition(|run| run.converged);
    let probability = converged.len() as f64 / runs.len() as f64;
    // What would happen: the median course among those of the more likely kind.
    let likely = if probability >= 0.5 { &converged } else { &failed };
    let over = |figure: fn(&Outcome) -> f64| {
        let mut values: Vec<f64> = likely.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (totals, downtimes) = (over(|run| run.total_ms), over(|run| run.downtime_ms));
    let (pages, syncs) = (over(|run| run.pages), over(|run| run.syncs as f64));
    let bytes = over(Outcome::transferred_bytes);
    let gets_through = probability >= 0.5;
    let total_ms = quantile(&totals, 0.5);
    let downtime_ms = gets_through.then(|| quantile(&downtimes, 0.5));
    let sla_exceeded = gets_through && exceeds(question, total_ms, downtime_ms);
    let lcb = lcb(pattern, &curve, &under);
    let low_confidence = gets_through && curve.pages(under.deadline_ms) > 0.0 && total_ms > pattern.observed_ms();
    // Chance has tails that are cut off; a phase that nobody knows has none: each is as likely as the next.
    let tail = if pattern.cycle_ms() > 0.0 { 0.0 } else { 0.05 };
    let counts = |values: &[f64]| (whole(quantile(values, tail)), whole(quantile(values, 1.0 - tail)));
    Forecast {
        verdict: verdict(probability, sla_exceeded),
        sla_exceeded,
        low_confidence,
        probability,
        method: Method::PatternCollector,
        iterations: whole(quantile(&syncs, 0.5)),
        convergence_ms: total_ms - downtime_ms.unwrap_or(0.0),
        downtime_ms,
        total_ms,
        dirtied_pages: whole(quantile(&pages, 0.5)),
        transferred_bytes: whole(quantile(&bytes, 0.5)),
        least_convergent_bandwidth: lcb.map(|rate| rate.0),
        cost: downtime_ms.map(|downtime_ms| cost(question, pattern.total_pages(), total_ms, downtime_ms, quantile(&pages, 0.5))),
        bounds: Bounds {
            total_ms: widened(&totals, tail, LOST_WINDOW_MS),
            downtime_ms: gets_through.then(|| widened(&downtimes, tail, HOST_MS)),
            dirtied_pages: counts(&pages),
            iterations: counts(&syncs),
        },
        pattern: Some(curve.points(pattern.observed_ms(), CURVE_POINTS)),
        profile: profile(pattern, &under, lcb),
        baselines: vec![
            classic::classic(&curve, pattern.nonzero_pages(), &under),
            classic::base(&curve, pattern.nonzero_pages(), &under),
        ],
    }
}

/// What one dry run says: an outcome that was seen, not replayed. `transferred_bytes` as counted, compressed or not;
/// `guest_pages`: all of the guest's.
pub fn of_dry_run(outcome: &Outcome, transferred_bytes: f64, guest_pages: f64, question: &Question) -> Forecast {
    let Outcome { converged, total_ms, syncs, pages, .. } = *outcome;
    let downtime_ms = converged.then_some(outcome.downtime_ms);
    let sla_exceeded = converged && exceeds(question, total_ms, downtime_ms);
    let probability = if converged { 1.0 } else { 0.0 };
    Forecast {
        verdict: verdict(probability, sla_exceeded),
        sla_exceeded,
        low_confidence: false,
        probability,
        method: Method::DryRun,
        iterations: syncs,
        convergence_ms: total_ms - downtime_ms.unwrap_or(0.0),
        downtime_ms,
        total_ms,
        dirtied_pages: whole(pages),
        transferred_bytes: whole(transferred_bytes),
        least_convergent_bandwidth: None,
        cost: downtime_ms.map(|downtime_ms| cost(question, guest_pages, total_ms, downtime_ms, pages)),
        bounds: Bounds {
            total_ms: widened(&[total_ms], 0.0, LOST_WINDOW_MS),
            downtime_ms: downtime_ms.map(|ms| widened(&[ms], 0.0, HOST_MS)),
            dirtied_pages: (whole(pages * (1.0 - HOST_SHARE)), whole(pages * (1.0 + HOST_SHARE))),
            // One more or less: the window in which the guest happens to begin.
            iterations: (syncs.saturating_sub(1), syncs.saturating_add(1)),
        },
        pattern: None,
        profile: Vec::new(),
        baselines: Vec::new(),
    }
}

/// The settings of a replay that answers the question.
pub fn settings(question: &Question) -> Settings {
    Settings {
        bandwidth: question.bandwidth,
        downtime_limit_ms: milliseconds(question.downtime_limit),
        deadline_ms: milliseconds(question.time_budget.unwrap_or(NO_BUDGET)),
        host: question.host,
    }
}

/// The least convergent bandwidth of a pattern under the given settings, whatever their own bandwidth is.
pub fn lcb(pattern: &Pattern, curve: &Curve, settings: &Settings) -> Option<BytesPerSecond> {
    // What is written within one window has to fit the downtime, and everything has to fit the budget.
    let dirtied = curve.pages(100.0) / settings.downtime_limit_ms.max(1.0);
    let everything = pattern.nonzero_pages() / settings.deadline_ms.max(1.0);
    let guess = BytesPerSecond(whole(dirtied.max(everything) * PAGE as f64 * 1000.0));
    let at = |rate| Settings { bandwidth: Bandwidth::Capped(rate), ..*settings };
    least_convergent_bandwidth(
        guess,
        settings.host.line_rate,
        |rate| {
            // A look that gives up after a few passes: what converges later does so by luck.
            let pass = pattern.nonzero_pages() * PAGE as f64 / rate.per_ms();
            let deadline_ms = settings.deadline_ms.min(CHEAP_PASSES * pass + CHEAP_MS);
            one(pattern, &Settings { deadline_ms, ..at(rate) }, 0).converged
        },
        |rate| converges(pattern, &at(rate)),
    )
}

/// Is the probability at least 0.9? Near the edge a random writer crosses the threshold by chance, at any time alike: a few
/// replays that all converge tell how long that takes. Where one fails, it takes more of them to count.
fn converges(pattern: &Pattern, settings: &Settings) -> bool {
    let few = replays(pattern, settings, LCB_REPLAYS / 2);
    let failed = few.iter().filter(|run| !run.converged).count() as f64;
    if failed > 0.0 {
        let tolerated = f64::from(LCB_REPLAYS) * (1.0 - CONVERGES_FROM) + 1e-9;
        let mut failed = failed;
        return failed <= tolerated
            && (LCB_REPLAYS / 2..LCB_REPLAYS).all(|run| {
                failed += f64::from(u8::from(!one(pattern, settings, run).converged));
                failed <= tolerated
            });
    }
    // What every one of them needs is no waiting; the rest of the budget has to outlast the waiting of nine in ten.
    let needed = few.iter().map(|run| run.total_ms).fold(f64::INFINITY, f64::min);
    let waited: f64 = few.iter().map(|run| run.total_ms - needed).sum();
    let left = settings.deadline_ms - needed;
    -(-left * f64::from(LCB_REPLAYS / 2 - 1) / waited.max(1e-9)).exp_m1() >= CONVERGES_FROM
}

/// `C = a·T_sum + b·T_downtime + c·P`, each term normalised (see [`CostWeights`]).
pub fn cost(question: &Question, guest_pages: f64, total_ms: f64, downtime_ms: f64, pages: f64) -> f64 {
    let CostWeights { total_time, downtime, pages: moved } = question.weights;
    let longest = question.sla.total_time.or(question.time_budget).unwrap_or(NO_BUDGET);
    let darkest = question.sla.downtime.unwrap_or(question.downtime_limit);
    let per = |value: f64, unit: f64| if unit > 0.0 { value / unit } else { value };
    total_time * per(total_ms, milliseconds(longest))
        + downtime * per(downtime_ms, milliseconds(darkest))
        + moved * per(pages, guest_pages)
}

/// The verdict that a probability stands for.
pub fn verdict(probability: f64, sla_exceeded: bool) -> Verdict {
    match probability {
        p if p <= FAILS_UP_TO => Verdict::Fails,
        p if p >= CONVERGES_FROM && !sla_exceeded => Verdict::Converges,
        p if p.is_nan() => Verdict::Unknown,
        _ => Verdict::Borderline,
    }
}

/// Is either limit of the SLA exceeded?
pub(super) fn exceeds(question: &Question, total_ms: f64, downtime_ms: Option<f64>) -> bool {
    let over = |limit: Option<Duration>, value: f64| limit.is_some_and(|limit| value > milliseconds(limit));
    over(question.sla.total_time, total_ms) || downtime_ms.is_some_and(|downtime| over(question.sla.downtime, downtime))
}

/// The forecast at other bandwidths, around the least convergent one.
fn profile(pattern: &Pattern, settings: &Settings, lcb: Option<BytesPerSecond>) -> Vec<ProfilePoint> {
    let line = settings.host.line_rate.0 as f64;
    let (low, high) = match lcb.or(settings.bandwidth.cap()) {
        Some(rate) => ((rate.0 as f64).min(line) / 2.0, (rate.0 as f64 * 8.0).min(line)),
        None => (line / 64.0, line),
    };
    let ratio = (high / low).max(1.0);
    (0..PROFILE_POINTS)
        .map(|point| {
            let bandwidth = whole(low * ratio.powf(f64::from(point) / f64::from(PROFILE_POINTS - 1)));
            let at = Settings { bandwidth: Bandwidth::Capped(BytesPerSecond(bandwidth)), ..*settings };
            let mut runs = replays(pattern, &at, PROFILE_REPLAYS);
            runs.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms));
            let converged = runs.iter().filter(|run| run.converged).count() as f64;
            let middle = runs.get(runs.len() / 2).copied();
            ProfilePoint {
                bandwidth,
                probability: converged / runs.len().max(1) as f64,
                total_ms: middle.map_or(settings.deadline_ms, |run| run.total_ms),
                downtime_ms: middle.filter(|run| run.converged).map(|run| run.downtime_ms),
                iterations: middle.map_or(0, |run| run.syncs),
                dirtied_pages: middle.map_or(0, |run| whole(run.pages)),
            }
        })
        .collect()
}

fn replays(pattern: &Pattern, settings: &Settings, count: u32) -> Vec<Outcome> {
    (0..count).map(|run| one(pattern, settings, run)).collect()
}

fn one(pattern: &Pattern, settings: &Settings, run: u32) -> Outcome {
    replay(pattern, course(pattern, run), settings)
}

/// The course of events of one run of many. Phases follow the golden ratio: any number of runs covers the cycle evenly.
pub(super) fn course(pattern: &Pattern, run: u32) -> Realisation<'_> {
    let phase = (f64::from(run) * 0.618_033_988_749_895).fract() * pattern.cycle_ms();
    pattern.realise(phase, u64::from(run))
}

/// The replays without their tails, and what the host adds.
fn widened(sorted: &[f64], tail: f64, late_ms: f64) -> (f64, f64) {
    let (low, high) = (quantile(sorted, tail), quantile(sorted, 1.0 - tail));
    ((low * (1.0 - HOST_SHARE) - HOST_MS).max(0.0), high * (1.0 + HOST_SHARE) + late_ms)
}

/// The value at a share of a sorted list, by linear interpolation; 0 for an empty one.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let low = usize::try_from(whole(at.floor())).unwrap_or(usize::MAX);
    match (sorted.get(low), sorted.get(low.saturating_add(1))) {
        (Some(a), Some(b)) => a + (b - a) * at.fract(),
        (Some(a), None) => *a,
        _ => 0.0,
    }
}

/// The unit of the replay.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
