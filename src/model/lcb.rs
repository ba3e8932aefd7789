//! The least convergent bandwidth: the smallest cap from which on, up to 1.1 times it, the verdict is `Converges`.

use super::units::BytesPerSecond;

/// The search ends when it knows the answer this closely.
const PRECISION: f64 = 1.02;
/// 100 ms windows make convergence slightly non-monotone: all of these multiples have to converge.
const CHECKED_FROM: [f64; 3] = [1.0, 1.05, 1.1];
/// Nobody migrates slower than this: 64 KiB/s.
const LEAST: f64 = 65_536.0;

/// Searches between `guess` (a lower bound, if one is known) and `line_rate`. `likely` is one cheap look at a cap, which
/// may err; `certain` is the whole verdict. `None`: it does not converge even at the rate of the line.
pub fn least_convergent_bandwidth(
    guess: BytesPerSecond,
    line_rate: BytesPerSecond,
    mut likely: impl FnMut(BytesPerSecond) -> bool,
    mut certain: impl FnMut(BytesPerSecond) -> bool,
) -> Option<BytesPerSecond> {
    let line = line_rate.0 as f64;
    let mut asked = |rate: f64| likely(rounded(rate.min(line)));
    let (mut low, mut high) = bracket((guess.0 as f64).clamp(LEAST.min(line), line), line, &mut asked);
    while high / low > PRECISION {
        let middle = (low * high).sqrt();
        if asked(middle) { high = middle } else { low = middle }
    }
    // Up from there until the whole verdict holds; a cap above that does not converge starts the climb anew above it.
    let mut rate = high;
    'climb: while rate < line {
        for above in CHECKED_FROM {
            let checked = rate * above;
            if checked < line && !certain(rounded(checked)) {
                rate = checked * PRECISION;
                continue 'climb;
            }
        }
        return Some(readable(rate, line_rate));
    }
    certain(line_rate).then_some(line_rate)
}

/// Doubles or halves from `from` until the answer lies between the two ends.
fn bracket(from: f64, line: f64, asked: &mut impl FnMut(f64) -> bool) -> (f64, f64) {
    let mut rate = from;
    if asked(rate) {
        while rate > LEAST {
            let lower = (rate / 2.0).max(LEAST);
            if !asked(lower) {
                return (lower, rate);
            }
            rate = lower;
        }
        return (rate, rate);
    }
    loop {
        let higher = (rate * 2.0).min(line);
        if higher >= line || asked(higher) {
            return (rate, higher);
        }
        rate = higher;
    }
}

/// Up to a multiple that people can read (`186Mi`, `15872Ki`) and that is finer than the search.
fn readable(rate: f64, line_rate: BytesPerSecond) -> BytesPerSecond {
    let unit = if rate >= 104_857_600.0 { 1 << 20 } else { 1 << 17 };
    let whole = rounded(rate).0;
    // A rate that is small enough for the rounding to matter stays as it is.
    let round = if whole > 8 << 20 { whole.next_multiple_of(unit) } else { whole.next_multiple_of(1 << 10) };
    BytesPerSecond(round).min(line_rate)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 64 KiB/s and the line rate")]
fn rounded(rate: f64) -> BytesPerSecond {
    BytesPerSecond(rate.ceil() as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LINE: BytesPerSecond = BytesPerSecond(1 << 30);

    fn search(guess: u64, converges: impl Fn(u64) -> bool) -> Option<u64> {
        let asked = |rate: BytesPerSecond| converges(rate.0);
        least_convergent_bandwidth(BytesPerSecond(guess), LINE, asked, asked).map(|rate| rate.0)
    }

    #[test]
    fn finds_a_step_from_any_guess() {
        for guess in [1_u64, 1 << 20, 90 << 20, 1 << 40] {
            let found = search(guess, |b| b >= 50 << 20).unwrap() as f64;
            assert!((1.0..=PRECISION + 0.0025).contains(&(found / f64::from(50 << 20))), "{guess}: {found}");
        }
    }

    #[test]
    fn steps_over_a_hole() {
        let hole = 52 << 20..54 << 20;
        let found = search(1, |b| b >= 50 << 20 && !hole.contains(&b)).unwrap();
        assert!((54 << 20..56 << 20).contains(&found), "{found:?}");
    }

    #[test]
    fn a_lucky_look_is_not_enough() {
        let certain = |rate: BytesPerSecond| rate.0 >= 60 << 20;
        let found = least_convergent_bandwidth(BytesPerSecond(1), LINE, |rate| rate.0 >= 50 << 20, certain).unwrap();
        assert!((60 << 20..62 << 20).contains(&found.0), "{found:?}");
    }

    #[test]
    fn a_line_slower_than_anything_is_no_panic() {
        for line in [0, 1, 1000] {
            assert_eq!(least_convergent_bandwidth(LINE, BytesPerSecond(line), |_| false, |_| false), None);
            let found = least_convergent_bandwidth(LINE, BytesPerSecond(line), |_| true, |_| true);
            assert!(found.is_some_and(|rate| rate.0 <= line.max(1)), "{found:?}");
        }
    }

    #[test]
    fn none_where_the_line_does_not_carry_it() {
        assert_eq!(search(LINE.0, |_| false), None);
        assert_eq!(search(LINE.0, |_| true), Some(65_536));
    }
}
