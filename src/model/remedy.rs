//! What would help a migration that does not converge: each remedy tried on the same pattern, before anybody applies it.
//!
//! In: a pattern, the question, the remedies asked about with their limits. Out: for each whether it would do, the least value that
//! does, and what the migration would be like then. Never beyond its limit, never less than what the question has already.

use std::time::Duration;

use super::{
    curve::whole,
    forecast::{Question, Verdict},
    kubevirt::{gigabytes, time_budget},
    pattern::Pattern,
    predict::{HOST_SHARE, LOST_WINDOW_MS, course, exceeds, milliseconds, quantile, settings, verdict},
    replay::{Outcome, Settings, WIRE_PAGE, replay, steered},
    steer::{AutoConverge, StallDetector, UntilPostCopy},
    units::{Bandwidth, Bytes, BytesPerSecond},
};

/// Replays behind an answer.
const REPLAYS: u32 = 20;
/// Where all of so many replays fail, more of them would as well.
const ENOUGH_TO_FAIL: u32 = 5;
/// So much more than the least is asked for, where the limit allows: a pattern is of a part of the pages, its rates are off by a few per
/// cent, and at the edge that decides.
const MARGIN: f64 = 1.1;
/// A search ends when it knows the answer this closely, and climbs from there in such steps.
const STEP: f64 = 1.02;
/// KubeVirt looks every 400 ms whether the budget has ended, in whole seconds, by `>`: so late it notices, on average, ms.
const NOTICED_MS: f64 = 1200.0;
/// Beyond this nobody's budget goes: a day for each gigabyte.
const LONGEST_PER_GIGABYTE: u64 = 86_400;
/// QEMU's `MAX_MIGRATE_DOWNTIME_SECONDS`, ms.
const LONGEST_DOWNTIME_MS: u64 = 2_000_000;

/// A remedy, and how far it may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// KubeVirt waits for longer: at most so many seconds for each (decimal) gigabyte of the guest (`completionTimeoutPerGiB`).
    TimeBudget {
        /// The most.
        most_per_gigabyte: u64,
    },
    /// QEMU throttles the guest, by its own fixed ramp.
    AutoConverge,
    /// The migration may use more of the line.
    Bandwidth {
        /// The most.
        most: BytesPerSecond,
    },
    /// The guest may stand still for longer, once KubeVirt's stall detector finds that it has to.
    Downtime {
        /// The most.
        most: Duration,
    },
    /// The guest goes on at the target before all of its memory is there.
    PostCopy,
}

/// What a remedy would do.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The remedy asked about.
    pub remedy: Remedy,
    /// Would the migration converge with it, within the SLA? `Converges` means: with the value below.
    pub verdict: Verdict,
    /// What is needed of it, beyond what the question has; `None` where that would do as it is, where nothing within the limit would, or
    /// where there is nothing to set.
    pub value: Option<Value>,
    /// The share of replays that converge within the budget; of post-copy: 1, since it ends every migration.
    pub probability: f64,
    /// How long the migration would take, ms; the budget where that ends first.
    pub total_ms: f64,
    /// How long the guest would stand, ms; `None` where the budget ends first.
    pub downtime_ms: Option<f64>,
    /// Auto-converge: how much of its time the guest sleeps at the end, percent.
    pub throttle_percent: Option<u64>,
    /// Post-copy: how long the guest runs while memory is missing, ms.
    pub degraded_ms: Option<f64>,
}

/// What a remedy needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// KubeVirt's `completionTimeoutPerGiB`, in seconds for each decimal gigabyte.
    PerGigabyte(u64),
    /// KubeVirt's `bandwidthPerMigration`: whole MiB/s.
    Bandwidth(BytesPerSecond),
    /// KubeVirt's `maxDowntimeMs`.
    Downtime(Duration),
}

/// What there is to ask it of.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    /// Who writes which page when.
    pub pattern: &'a Pattern,
    /// What the migration would run under without a remedy.
    pub question: &'a Question,
    /// The guest's memory as KubeVirt counts it.
    pub guest: Bytes,
    /// The least convergent bandwidth, as the forecast found it.
    pub least_convergent_bandwidth: Option<BytesPerSecond>,
}

impl Case<'_> {
    /// What this remedy would do.
    pub fn answer(&self, remedy: Remedy) -> Answer {
        match remedy {
            Remedy::TimeBudget { most_per_gigabyte } => self.time_budget(remedy, most_per_gigabyte.min(LONGEST_PER_GIGABYTE)),
            Remedy::AutoConverge => self.auto_converge(remedy),
            Remedy::Bandwidth { most } => self.bandwidth(remedy, most),
            Remedy::Downtime { most } => self.downtime(remedy, most),
            Remedy::PostCopy => self.post_copy(remedy),
        }
    }

    /// A longer budget cuts the same courses of events later: one set of replays, under the longest, tells of all.
    fn time_budget(&self, remedy: Remedy, most: u64) -> Answer {
        let plain = settings(self.question);
        let Some(now) = self.question.time_budget.map(milliseconds) else {
            // There is no budget to lengthen.
            return self.judge(remedy, &self.plainly(&plain));
        };
        let longest = time_budget(most, self.guest).map_or(0.0, milliseconds);
        let mut runs = self.plainly(&Settings { deadline_ms: longest.max(now), ..plain });
        let mut ends: Vec<f64> = runs.iter().map(|run| if run.converged { run.total_ms } else { f64::INFINITY }).collect();
        ends.sort_by(f64::total_cmp);
        // When nine in ten are through, and what a host adds.
        let needed = ends
            .get((ends.len() * 9).div_ceil(10).saturating_sub(1))
            .map_or(f64::INFINITY, |end| end * (1.0 + HOST_SHARE) + LOST_WINDOW_MS);
        let per_gigabyte = (needed <= longest).then(|| whole((needed / 1000.0 / gigabytes(self.guest).max(1) as f64).ceil()));
        let value = per_gigabyte.filter(|_| needed > now);
        let deadline = match value {
            Some(value) => time_budget(value, self.guest).map_or(now, milliseconds),
            None if needed <= now => now,
            None => longest.max(now),
        };
        for run in runs.iter_mut().filter(|run| run.total_ms > deadline) {
            (run.converged, run.total_ms) = (false, deadline);
        }
        self.judge(remedy, &runs).with(value.map(Value::PerGigabyte))
    }

    fn auto_converge(&self, remedy: Remedy) -> Answer {
        let settings = settings(self.question);
        let mut percent = Vec::new();
        let runs = some(|run| {
            let mut ramp = AutoConverge::new(&settings, self.pattern.cpus());
            let outcome = steered(self.pattern, course(self.pattern, run), &settings, &mut ramp);
            percent.push(f64::from(ramp.percent()));
            outcome
        });
        percent.sort_by(f64::total_cmp);
        Answer { throttle_percent: Some(whole(quantile(&percent, 0.5))), ..self.judge(remedy, &runs) }
    }

    fn bandwidth(&self, remedy: Remedy, most: BytesPerSecond) -> Answer {
        let plain = settings(self.question);
        let at = |mib: u64| Settings { bandwidth: Bandwidth::Capped(BytesPerSecond(mib << 20)), ..plain };
        let most = most.min(plain.host.line_rate).0 >> 20;
        let now = self.question.bandwidth.cap().map_or(u64::MAX, |cap| cap.0.div_ceil(1 << 20));
        let needed = self.least_convergent_bandwidth.map_or(u64::MAX, |rate| rate.0.div_ceil(1 << 20));
        if now >= most || needed > most {
            // No more to be had, or not enough.
            let best = if now >= most { plain } else { at(most) };
            return self.judge(remedy, &self.plainly(&best));
        }
        let likely = |mib| self.meets(&replay(self.pattern, course(self.pattern, 0), &at(mib)));
        let roomy = whole((needed as f64 * MARGIN).ceil()).clamp(now, most);
        let (mib, answer) = least(roomy, most, likely, |mib| self.judge(remedy, &self.plainly(&at(mib))));
        answer.with(mib.filter(|mib| *mib > now).map(|mib| Value::Bandwidth(BytesPerSecond(mib << 20))))
    }

    fn downtime(&self, remedy: Remedy, most: Duration) -> Answer {
        let settings = settings(self.question);
        let most = most.min(self.question.sla.downtime.unwrap_or(most));
        let (now, most) = (whole(settings.downtime_limit_ms.ceil()), whole(milliseconds(most).floor()).min(LONGEST_DOWNTIME_MS));
        let run_at =
            |limit: u64, run| steered(self.pattern, course(self.pattern, run), &settings, &mut StallDetector::new(limit as f64));
        if now >= most {
            return self.judge(remedy, &self.plainly(&settings));
        }
        let likely = |limit| self.meets(&run_at(limit, 0));
        let (limit, answer) = least(now, most, likely, |limit| self.judge(remedy, &some(|run| run_at(limit, run))));
        let roomy = |limit: u64| whole((limit as f64 * MARGIN).ceil()).min(most);
        answer.with(limit.filter(|limit| *limit > now).map(|limit| Value::Downtime(Duration::from_millis(roomy(limit)))))
    }

    /// The budget is lowered to one pass over the memory, if it is longer: more passes would only send again what is written again.
    fn post_copy(&self, remedy: Remedy) -> Answer {
        let settings = settings(self.question);
        let host = &settings.host;
        let (all, data) = (self.pattern.total_pages(), self.pattern.nonzero_pages());
        let rate = settings.bandwidth.cap().map_or(host.line_rate, |cap| cap.min(host.line_rate));
        let pass = host.setup_ms + (all - data) / host.zero_pages_per_ms + data * WIRE_PAGE / rate.per_ms();
        let wanted = (pass * (1.0 + HOST_SHARE) + LOST_WINDOW_MS) / 1000.0 / gigabytes(self.guest).max(1) as f64;
        let wanted = whole(wanted.ceil()).clamp(1, LONGEST_PER_GIGABYTE);
        let lowered = time_budget(wanted, self.guest).filter(|budget| self.question.time_budget.is_none_or(|now| *budget < now));
        let begins = lowered.or(self.question.time_budget).map_or(0.0, milliseconds) + NOTICED_MS;
        let mut degraded = Vec::new();
        let runs: Vec<Outcome> = (0..REPLAYS / 2)
            .map(|run| {
                let mut until = UntilPostCopy::new(begins);
                let outcome = steered(self.pattern, course(self.pattern, run), &settings, &mut until);
                // QEMU's cap on bandwidth is none of post-copy's (`max-postcopy-bandwidth`, 0).
                let missing = until.missing().filter(|_| !outcome.converged).unwrap_or(0.0);
                let missing_ms = missing * WIRE_PAGE / host.line_rate.per_ms();
                degraded.push(missing_ms);
                if outcome.converged {
                    return outcome;
                }
                let downtime_ms = host.completion_ms;
                Outcome { converged: true, total_ms: begins + downtime_ms + missing_ms, downtime_ms, ..outcome }
            })
            .collect();
        degraded.sort_by(f64::total_cmp);
        let answer = Answer { degraded_ms: Some(quantile(&degraded, 0.5)), ..self.judge(remedy, &runs) };
        answer.with(lowered.map(|_| Value::PerGigabyte(wanted)))
    }

    /// Replays in which nothing else is done.
    fn plainly(&self, settings: &Settings) -> Vec<Outcome> {
        some(|run| replay(self.pattern, course(self.pattern, run), settings))
    }

    /// Does it converge, within the SLA?
    fn meets(&self, run: &Outcome) -> bool {
        run.converged && !exceeds(self.question, run.total_ms, Some(run.downtime_ms))
    }

    /// The median among those of the more likely kind, as in a forecast.
    fn judge(&self, remedy: Remedy, runs: &[Outcome]) -> Answer {
        let converged = runs.iter().filter(|run| run.converged).count();
        let probability = converged as f64 / runs.len().max(1) as f64;
        let gets_through = probability >= 0.5;
        let over = |figure: fn(&Outcome) -> f64| {
            let mut values: Vec<f64> = runs.iter().filter(|run| run.converged == gets_through).map(figure).collect();
            values.sort_by(f64::total_cmp);
            quantile(&values, 0.5)
        };
        let (total_ms, downtime_ms) = (over(|run| run.total_ms), gets_through.then(|| over(|run| run.downtime_ms)));
        Answer {
            remedy,
            verdict: verdict(probability, gets_through && exceeds(self.question, total_ms, downtime_ms)),
            value: None,
            probability,
            total_ms,
            downtime_ms,
            throttle_percent: None,
            degraded_ms: None,
        }
    }
}

impl Answer {
    /// With what is needed, if that does.
    fn with(self, value: Option<Value>) -> Self {
        let does = self.verdict == Verdict::Converges;
        Self { value: value.filter(|_| does), ..self }
    }
}

/// So many replays as tell: few where they all fail.
fn some(mut replay: impl FnMut(u32) -> Outcome) -> Vec<Outcome> {
    let mut runs: Vec<Outcome> = (0..ENOUGH_TO_FAIL).map(&mut replay).collect();
    if runs.iter().any(|run| run.converged) {
        runs.extend((ENOUGH_TO_FAIL..REPLAYS).map(replay));
    }
    runs
}

/// The least value from `from` to `most` whose whole answer is `Converges`, and that answer; else none, and the answer at `most`. `likely` is a
/// cheap look, which may err.
fn least(from: u64, most: u64, likely: impl Fn(u64) -> bool, whole_answer: impl Fn(u64) -> Answer) -> (Option<u64>, Answer) {
    let does = |answer: &Answer| answer.verdict == Verdict::Converges;
    let first = whole_answer(from);
    if does(&first) {
        return (Some(from), first);
    }
    let last = whole_answer(most);
    if !does(&last) {
        return (None, last);
    }
    let (mut low, mut high) = (from, most);
    while high - low > 1 && high as f64 > low as f64 * STEP {
        let middle = u64::midpoint(low, high);
        if likely(middle) { high = middle } else { low = middle }
    }
    while high < most {
        let answer = whole_answer(high);
        if does(&answer) {
            return (Some(high), answer);
        }
        high = whole(high as f64 * STEP).max(high + 1);
    }
    (Some(most), last)
}

#[cfg(test)]
#[path = "remedy_tests.rs"]
mod tests;
