//! Write rates from counts of hits: one rate for what was pooled, or a mixture of rates for pages that differ.

use crate::model::pattern::Writer;

/// How often something changed, in slots of two lengths: `(hits, slots, length of a slot in ms)`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Exposure {
    /// The fine slots: they tell fast writers apart.
    pub fine: (f64, f64, f64),
    /// The coarse slots: they tell slow writers apart.
    pub coarse: (f64, f64, f64),
}

impl Exposure {
    /// Both together, of the same slots.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let sum = |a: (f64, f64, f64), b: (f64, f64, f64)| (a.0 + b.0, a.1 + b.1, a.2.max(b.2));
        Self { fine: sum(self.fine, other.fine), coarse: sum(self.coarse, other.coarse) }
    }

    /// All hits.
    pub fn hits(&self) -> f64 {
        self.fine.0 + self.coarse.0
    }

    /// Log-likelihood of a rate.
    fn likelihood(&self, rate: f64) -> f64 {
        [self.fine, self.coarse]
            .iter()
            .map(|&(hits, slots, ms)| {
                if slots <= 0.0 {
                    return 0.0;
                }
                let miss = -rate * ms;
                // A page that was seen to change has a rate; one that never was may have none.
                let hit = if hits > 0.0 { hits * (-miss.exp_m1()).max(1e-300).ln() } else { 0.0 };
                hit + (slots - hits) * miss
            })
            .sum()
    }

    /// The most likely rate of independent writes, per ms; 0 where nothing changed.
    pub fn rate(&self) -> f64 {
        if self.hits() <= 0.0 {
            return 0.0;
        }
        // Where every coarse slot was hit they say nothing; where every fine one was, the rate has no upper end: take
        // the one that half a hit less would allow.
        let mut part = *self;
        if part.fine.1 > 0.0 && part.coarse.0 > part.coarse.1 - 0.5 {
            part.coarse = (0.0, 0.0, part.coarse.2);
        }
        for side in [&mut part.fine, &mut part.coarse] {
            side.0 = side.0.min((side.1 - 0.5).max(0.0));
        }
        // The derivative of the likelihood falls with the rate: bisect its sign.
        let slope = |rate: f64| -> f64 {
            [part.fine, part.coarse]
                .iter()
                .filter(|(_, slots, _)| *slots > 0.0)
                .map(|&(hits, slots, ms)| hits * ms / (rate * ms).exp_m1() - (slots - hits) * ms)
                .sum()
        };
        let (mut low, mut high) = (1e-9_f64, 10.0_f64);
        for _ in 0..60 {
            let middle = (low * high).sqrt();
            if slope(middle) > 0.0 { low = middle } else { high = middle }
        }
        (low * high).sqrt()
    }
}

/// Shares of pages by rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// `(rate per ms, share)`; the first rate is 0.
    shares: Vec<(f64, f64)>,
}

/// Rates between the slowest that a look can see and one hit a millisecond, in steps of this factor.
const STEP: f64 = 1.5;
const FASTEST: f64 = 1.0;
const ROUNDS: usize = 60;

impl Mixture {
    /// Expectation–maximisation over a fixed grid of rates.
    pub fn fit(pages: &[Exposure], length_ms: f64) -> Self {
        let mut rates = vec![0.0];
        let mut rate = 0.2 / length_ms.max(1.0);
        while rate < FASTEST {
            rates.push(rate);
            rate *= STEP;
        }
        let mut shares = vec![1.0 / rates.len() as f64; rates.len()];
        let likelihoods: Vec<Vec<f64>> = pages.iter().map(|page| relative(page, &rates)).collect();
        for _ in 0..ROUNDS {
            let mut sums = vec![0.0; rates.len()];
            for page in &likelihoods {
                let all: f64 = page.iter().zip(&shares).map(|(l, s)| l * s).sum();
                if all > 0.0 {
                    for ((sum, l), s) in sums.iter_mut().zip(page).zip(&shares) {
                        *sum += l * s / all;
                    }
                }
            }
            let count: f64 = sums.iter().sum();
            if count <= 0.0 {
                break;
            }
            for (share, sum) in shares.iter_mut().zip(sums) {
                *share = sum / count;
            }
        }
        Self { shares: rates.into_iter().zip(shares).collect() }
    }

    /// The rate of one page, drawn from what its hits leave possible: so that the pages together keep the mixture.
    /// `draw` is uniform in 0..1.
    pub fn draw(&self, page: &Exposure, draw: f64) -> f64 {
        let rates: Vec<f64> = self.shares.iter().map(|s| s.0).collect();
        let posterior: Vec<f64> = relative(page, &rates).iter().zip(&self.shares).map(|(l, s)| l * s.1).collect();
        let mut left = draw * posterior.iter().sum::<f64>();
        for (rate, p) in rates.iter().zip(&posterior) {
            left -= p;
            if left < 0.0 {
                return *rate;
            }
        }
        page.rate()
    }
}

/// Likelihoods relative to the best, so that they do not underflow.
fn relative(page: &Exposure, rates: &[f64]) -> Vec<f64> {
    let logs: Vec<f64> = rates.iter().map(|&rate| page.likelihood(rate)).collect();
    let best = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    logs.iter().map(|log| (log - best).exp()).collect()
}

/// The rates `n_k` of `Σ n_k (1 − exp(−λ_k t))` that meet measured points of f(t) best, none negative, at most `most`
/// pages in all. Points are `(window ms, pages)`. Returns `(rate per ms, pages)`.
pub fn rates_of_curve(points: &[(f64, f64)], most: f64) -> Vec<(f64, f64)> {
    let longest = points.iter().map(|p| p.0).fold(0.0, f64::max);
    let mut rates = vec![];
    let mut rate = 0.2 / longest.max(1.0);
    while rate < FASTEST {
        rates.push(rate);
        rate *= STEP.sqrt();
    }
    // Each point weighs by its own size: short windows matter as much as long ones.
    let rows: Vec<(Vec<f64>, f64)> = points
        .iter()
        .filter(|p| p.1 > 0.0)
        .map(|&(ms, pages)| (rates.iter().map(|rate| -(-rate * ms).exp_m1() / pages).collect(), 1.0))
        .collect();
    let start = most.min(points.iter().map(|p| p.1).fold(0.0, f64::max)) / rates.len().max(1) as f64;
    let mut pages = vec![start; rates.len()];
    // Multiplicative updates (Lee and Seung, 2001) keep every share positive.
    for _ in 0..4000 {
        let fitted: Vec<f64> = rows.iter().map(|(row, _)| row.iter().zip(&pages).map(|(a, n)| a * n).sum()).collect();
        for (k, n) in pages.iter_mut().enumerate() {
            let column = |weigh: &dyn Fn(usize) -> f64| -> f64 {
                rows.iter().enumerate().map(|(i, (row, _))| row.get(k).copied().unwrap_or(0.0) * weigh(i)).sum()
            };
            let wanted = column(&|i| rows.get(i).map_or(0.0, |r| r.1));
            let has = column(&|i| fitted.get(i).copied().unwrap_or(0.0));
            if has > 0.0 {
                *n *= wanted / has;
            }
        }
        let all: f64 = pages.iter().sum();
        if all > most && all > 0.0 {
            for n in &mut pages {
                *n *= most / all;
            }
        }
    }
    rates.into_iter().zip(pages).filter(|(_, n)| *n >= 1.0).collect()
}

/// What a page of this rate is written by.
pub fn writer(rate: f64) -> Writer {
    if rate > 0.0 { Writer::Random { rate } } else { Writer::Idle }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposure(rate: f64, fine: f64, coarse: f64) -> Exposure {
        let hit = |slots: f64, ms: f64| (slots * -(-rate * ms).exp_m1(), slots, ms);
        Exposure { fine: hit(fine, 10.0), coarse: hit(coarse, 50.0) }
    }

    #[test]
    fn a_rate_is_found_again_at_any_speed() {
        for rate in [1e-5, 1e-3, 0.02, 0.2] {
            let found = exposure(rate, 100.0, 220.0).rate();
            assert!((found / rate - 1.0).abs() < 1e-3, "{rate}: {found}");
        }
        assert_eq!(exposure(0.0, 100.0, 220.0).rate().to_bits(), 0);
        let saturated = exposure(50.0, 100.0, 220.0).rate();
        assert!(saturated.is_finite() && saturated > 0.2, "{saturated}");
    }

    #[test]
    fn a_mixture_keeps_its_shares() {
        let mut pages = vec![exposure(0.0, 100.0, 220.0); 300];
        pages.extend(vec![exposure(0.03, 100.0, 220.0); 100]);
        let mixture = Mixture::fit(&pages, 12_000.0);
        let fast = pages.iter().filter(|page| mixture.draw(page, 0.5) > 0.01).count();
        assert_eq!(fast, 100);
        let idle = pages.iter().filter(|page| mixture.draw(page, 0.5) < 1e-4).count();
        assert_eq!(idle, 300);
    }

    #[test]
    fn a_curve_of_two_rates_is_met_between_and_beyond_its_points() {
        let f = |ms: f64| 2048.0 * -(-0.018 * ms).exp_m1() + 40_000.0 * -(-1e-4 * ms).exp_m1();
        let points: Vec<(f64, f64)> = [50.0, 100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0].map(|ms| (ms, f(ms))).into();
        let rates = rates_of_curve(&points, 131_072.0);
        let fitted = |ms: f64| rates.iter().map(|(rate, n)| n * -(-rate * ms).exp_m1()).sum::<f64>();
        for ms in [70.0, 300.0, 1000.0, 3000.0] {
            assert!((fitted(ms) / f(ms) - 1.0).abs() < 0.03, "{ms}: {} against {}", fitted(ms), f(ms));
        }
        assert!(rates.iter().map(|r| r.1).sum::<f64>() <= 131_072.1);
    }
}
