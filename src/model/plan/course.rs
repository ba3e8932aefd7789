//! What a migration would be like at any bandwidth, read between the points of its profile.
//!
//! In: a forecast and its question. Out: figures at a rate. Between two points time, downtime and pages are linear in 1/B, which is exact
//! for a guest that writes nothing. Three things are never assumed: that a rate above the forecast's own bandwidth helps (that is the
//! migration's cap, or the line), that a rate below the least convergent bandwidth converges, and that a probability between two points
//! is better than the line between them.

use super::Outlook;
use crate::model::{
    forecast::{ProfilePoint, Question, Verdict},
    predict::{CONVERGES_FROM, NO_BUDGET, cost, exceeds, milliseconds, verdict},
    units::BytesPerSecond,
};

/// Below the least convergent bandwidth no migration counts for more than this, whatever a few lucky replays say.
const ALMOST: f64 = CONVERGES_FROM - 0.01;

/// A migration at one rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Would it converge, and within the SLA?
    pub verdict: Verdict,
    /// The share of replays that converge within the budget.
    pub probability: f64,
    /// Total time, ms; the budget where it does not converge.
    pub total_ms: f64,
    /// Downtime, ms; `None` where it does not converge.
    pub downtime_ms: Option<f64>,
    /// Pages sent; 0 where it does not converge.
    pub pages: f64,
    /// `C = a·T_sum + b·T_downtime + c·P`; `None` where it does not converge.
    pub cost: Option<f64>,
}

/// One migration over all rates, bytes per second.
#[derive(Debug, Clone)]
pub(super) struct Course<'a> {
    question: &'a Question,
    guest_pages: f64,
    /// `(rate, probability)`, by rate.
    chances: Vec<(f64, f64)>,
    /// Where it converges, by rate.
    points: Vec<ProfilePoint>,
    /// From here on it may converge; `None`: nowhere.
    least: Option<f64>,
    /// It goes no faster than this, whatever it is given.
    ceiling: f64,
}

impl<'a> Course<'a> {
    /// `cap`: what the plan allows each migration, if it says so.
    pub(super) fn of(outlook: &'a Outlook, cap: Option<BytesPerSecond>) -> Self {
        let Outlook { question, forecast, guest } = outlook;
        let rate = question.bandwidth.cap().unwrap_or(question.host.line_rate);
        let own = ProfilePoint {
            bandwidth: rate.0,
            probability: forecast.probability,
            total_ms: forecast.total_ms,
            downtime_ms: forecast.downtime_ms,
            iterations: forecast.iterations,
            dirtied_pages: forecast.dirtied_pages,
        };
        let mut profile: Vec<_> = forecast.profile.iter().filter(|point| point.bandwidth < rate.0).copied().collect();
        profile.push(own);
        profile.sort_by_key(|point| point.bandwidth);

        // What does not converge with all that it may have does not with less: the forecast (or the dry run) weighs more than its profile.
        let hopeless = own.probability < CONVERGES_FROM || own.downtime_ms.is_none();
        let least = (!hopeless).then(|| forecast.least_convergent_bandwidth.map_or(rate.0, |least| least.min(rate.0)) as f64);
        let mut chances: Vec<_> = profile.iter().map(|point| (point.bandwidth as f64, point.probability)).collect();
        // By its definition, that is where nine in ten converge.
        chances.extend(least.map(|least| (least, CONVERGES_FROM)).filter(|(least, _)| *least < rate.0 as f64));
        chances.sort_by(|a, b| a.0.total_cmp(&b.0));
        let sound = |point: &ProfilePoint| {
            point.bandwidth > 0
                && point.probability >= CONVERGES_FROM
                && point.downtime_ms.is_some()
                && least.is_some_and(|least| point.bandwidth as f64 >= least)
        };
        let mut points: Vec<_> = profile.into_iter().filter(sound).collect();
        // Few replays stand behind a point: by chance a higher rate may seem to take longer.
        let mut longest = 0.0_f64;
        for point in points.iter_mut().rev() {
            longest = longest.max(point.total_ms);
            point.total_ms = longest;
        }
        Self {
            question,
            guest_pages: guest.pages() as f64,
            chances,
            points,
            least,
            ceiling: cap.map_or(rate, |cap| cap.min(rate)).0 as f64,
        }
    }

    /// The rate that it makes use of, of what it is given.
    pub(super) fn taken(&self, rate: f64) -> f64 {
        rate.min(self.ceiling)
    }

    /// The most that it makes use of.
    pub(super) fn ceiling(&self) -> f64 {
        self.ceiling
    }

    /// Total time, ms, at this rate; the budget where it does not converge.
    pub(super) fn total_ms(&self, rate: f64) -> f64 {
        let rate = self.taken(rate);
        if self.probability(rate) < CONVERGES_FROM {
            return milliseconds(self.question.time_budget.unwrap_or(NO_BUDGET));
        }
        // Below the lowest point that converges: the same bytes at a lower rate.
        let longer = self.points.first().map_or(1.0, |lowest| (lowest.bandwidth as f64 / rate).max(1.0));
        self.read(rate, |point| point.total_ms) * longer
    }

    /// Would it converge at this rate, and within the SLA?
    pub(super) fn converges(&self, rate: f64) -> bool {
        self.at(rate).verdict == Verdict::Converges
    }

    /// Everything at this rate.
    pub(super) fn at(&self, rate: f64) -> Figures {
        let rate = self.taken(rate);
        let probability = self.probability(rate);
        let total_ms = self.total_ms(rate);
        if probability < CONVERGES_FROM {
            let verdict = verdict(probability, false);
            return Figures { verdict, probability, total_ms, downtime_ms: None, pages: 0.0, cost: None };
        }
        let downtime_ms = self.read(rate, |point| point.downtime_ms.unwrap_or_default());
        let pages = self.read(rate, |point| point.dirtied_pages as f64);
        Figures {
            verdict: verdict(probability, exceeds(self.question, total_ms, Some(downtime_ms))),
            probability,
            total_ms,
            downtime_ms: Some(downtime_ms),
            pages,
            cost: Some(cost(self.question, self.guest_pages, total_ms, downtime_ms, pages)),
        }
    }

    /// The least time on the link that it takes, whatever rate it has from moment to moment: `min B·T(B)`, as ms of the whole link's rate.
    pub(super) fn least_work(&self, link: f64) -> f64 {
        // Between points T is linear in 1/B, so B·T is linear in B: its least value is at an end.
        let ends = self.points.iter().map(|point| point.bandwidth as f64).filter(|rate| *rate <= self.ceiling);
        ends.chain([self.ceiling.min(link)]).map(|rate| rate * self.total_ms(rate) / link).fold(f64::INFINITY, f64::min)
    }

    /// The line between the points on either side; nothing below the least convergent bandwidth counts for more than a doubt.
    fn probability(&self, rate: f64) -> f64 {
        let at = self.chances.partition_point(|(known, _)| *known < rate);
        let (below, above) = (at.checked_sub(1).and_then(|at| self.chances.get(at)), self.chances.get(at));
        let between = match (below, above) {
            (Some(&(low, p)), Some(&(high, q))) => p + (q - p) * share(low, high, rate),
            (None, Some(&(_, p))) | (Some(&(_, p)), None) => p,
            (None, None) => 0.0,
        };
        match self.least {
            // Rounding must not take from 0.9 what a point there says.
            Some(least) if rate >= least && (between - CONVERGES_FROM).abs() < 1e-9 => CONVERGES_FROM,
            Some(least) if rate >= least => between,
            _ => between.min(ALMOST),
        }
    }

    /// A figure on the line between the points on either side that converge; beyond them that of the nearest.
    fn read(&self, rate: f64, figure: impl Fn(&ProfilePoint) -> f64) -> f64 {
        let at = self.points.partition_point(|point| (point.bandwidth as f64) < rate);
        match (at.checked_sub(1).and_then(|at| self.points.get(at)), self.points.get(at)) {
            (Some(low), Some(high)) => {
                let share = share(low.bandwidth as f64, high.bandwidth as f64, rate);
                figure(low) + (figure(high) - figure(low)) * share
            }
            (None, Some(nearest)) | (Some(nearest), None) => figure(nearest),
            (None, None) => 0.0,
        }
    }
}

/// How far 1/`rate` is on the way from 1/`low` to 1/`high`.
fn share(low: f64, high: f64, rate: f64) -> f64 {
    if high > low { ((1.0 / low - 1.0 / rate) / (1.0 / low - 1.0 / high)).clamp(0.0, 1.0) } else { 1.0 }
}
