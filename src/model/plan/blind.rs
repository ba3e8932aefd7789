//! What somebody who knows nothing would pay: VMs drawn at random, one after the other, until the need is met.
//!
//! In: what each VM costs and frees, the need, a seed. Out: the mean over all orders in which they could be drawn: counted up to
//! [`COUNTED`] VMs, estimated from [`DRAWS`] orders beyond, with the standard error of that.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{
    Estimate, Need,
    cover::{Freed, Item},
};

/// Up to so many VMs every set that may be drawn before a VM is counted: 2^14 sets.
const COUNTED: usize = 14;
/// Orders that are drawn where there are more.
const DRAWS: u32 = 4096;

/// The mean cost of a draw of these.
pub(super) fn cost(items: &[Item], need: Need, seed: u64) -> Estimate {
    draw(items, need, seed, |drawn| drawn.iter().map(|item| item.cost).sum(), |_, item| item.cost)
}

/// The probability that a draw of both meets one of `others`.
pub(super) fn failure(items: &[Item], others: &[Item], need: Need, seed: u64) -> Estimate {
    // One cost unit for the first of `others` that is drawn.
    let marked = |of: &[Item], cost: f64| of.iter().map(|item| Item { cost, ..*item }).collect::<Vec<_>>();
    let all = [marked(items, 0.0), marked(others, 1.0)].concat();
    let any = |drawn: &[Item]| drawn.iter().map(|item| item.cost).fold(0.0, f64::max);
    draw(&all, need, seed, any, |before, item| if before > 0.0 { 0.0 } else { item.cost })
}

/// The mean over all orders. `total` is of those drawn; `adds` what one more adds to a total that is the sum of those costs.
fn draw(items: &[Item], need: Need, seed: u64, total: impl Fn(&[Item]) -> f64, adds: impl Fn(f64, &Item) -> f64) -> Estimate {
    if items.len() <= COUNTED {
        Estimate { mean: counted(items, need, adds), error: 0.0 }
    } else {
        estimated(items, need, seed, total)
    }
}

/// The next VM is drawn wherever those before it do not suffice. That a set of s of n comes first, and then this one, has the
/// probability s!·(n−s−1)!/n!. At least one is drawn.
fn counted(items: &[Item], need: Need, adds: impl Fn(f64, &Item) -> f64) -> f64 {
    let n = items.len();
    // The probability for each s: 1/n for none, then times s/(n−s).
    let mut chances = vec![1.0 / n.max(1) as f64];
    for s in 1..n {
        let before = chances.last().copied().unwrap_or_default();
        chances.push(before * s as f64 / (n - s) as f64);
    }
    (0..1_u32 << n)
        .map(|set| {
            let inside = |at: usize| set >> at & 1 == 1;
            let members = || items.iter().enumerate().filter(|(at, _)| inside(*at)).map(|(_, item)| item);
            if set != 0 && members().fold(Freed::default(), Freed::with).suffices(need) {
                return 0.0;
            }
            let before: f64 = members().map(|item| item.cost).sum();
            let next = items.iter().enumerate().filter(|(at, _)| !inside(*at));
            let size = usize::try_from(set.count_ones()).unwrap_or(usize::MAX);
            next.map(|(_, item)| adds(before, item)).sum::<f64>() * chances.get(size).copied().unwrap_or_default()
        })
        .sum()
}

fn estimated(items: &[Item], need: Need, seed: u64, total: impl Fn(&[Item]) -> f64) -> Estimate {
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut order = items.to_vec();
    let (mut sum, mut squares) = (0.0, 0.0);
    for _ in 0..DRAWS {
        let (mut freed, mut drawn) = (Freed::default(), 0);
        while drawn < order.len() && (drawn == 0 || !freed.suffices(need)) {
            let next = random.random_range(drawn..order.len());
            order.swap(drawn, next);
            freed = order.get(drawn).map_or(freed, |item| freed.with(item));
            drawn += 1;
        }
        let total = total(order.get(..drawn).unwrap_or_default());
        sum += total;
        squares += total * total;
    }
    let draws = f64::from(DRAWS);
    let mean = sum / draws;
    Estimate { mean, error: ((squares / draws - mean * mean).max(0.0) / draws).sqrt() }
}
