//! The least convergent bandwidth: the smallest cap from which on, up to 1.1 times it, the verdict is `Converges`.

use super::units::BytesPerSecond;

/// The search ends when it knows the answer this closely.
const PRECISION: f64 = 1.02;
/// 100 ms windows make convergence slightly non-monotone: these multiples have to converge as well.
const CHECKED_ABOVE: [f64; 2] = [1.05, 1.1];
/// Nobody migrates slower than this: 64 KiB/s.
const LEAST: f64 = 65_536.0;

/// Searches between `guess` (a lower bound, if one is known) and `line_rate`; `converges` is asked about single caps.
/// `None`: it does not converge even at the rate of the line.
pub fn least_convergent_bandwidth(
    guess: BytesPerSecond,
    line_rate: BytesPerSecond,
    mut converges: impl FnMut(BytesPerSecond) -> bool,
) -> Option<BytesPerSecond> {
    let line = line_rate.0 as f64;
    let mut asked = |rate: f64| converges(rounded(rate.min(line)));
    if !asked(line) {
        return None;
    }
    let (mut low, mut high) = bracket((guess.0 as f64).clamp(LEAST, line), line, &mut asked);
    loop {
        while high / low > PRECISION {
            let middle = (low * high).sqrt();
            if asked(middle) { high = middle } else { low = middle }
        }
        // Where a cap a little above does not converge, the answer lies above that one.
        let Some(hole) = CHECKED_ABOVE.iter().map(|above| high * above).filter(|&rate| rate < line).find(|&rate| !asked(rate)) else {
            return Some(rounded(high));
        };
        (low, high) = bracket(hole, line, &mut asked);
        low = low.max(hole);
    }
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

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 64 KiB/s and the line rate")]
fn rounded(rate: f64) -> BytesPerSecond {
    BytesPerSecond(rate.ceil() as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LINE: BytesPerSecond = BytesPerSecond(1 << 30);

    #[test]
    fn finds_a_step_from_any_guess() {
        for guess in [1_u64, 1 << 20, 90 << 20, 1 << 40] {
            let found = least_convergent_bandwidth(BytesPerSecond(guess), LINE, |b| b.0 >= 50 << 20).unwrap().0 as f64;
            assert!((1.0..=PRECISION).contains(&(found / f64::from(50 << 20))), "{guess}: {found}");
        }
    }

    #[test]
    fn steps_over_a_hole() {
        let hole = 52 << 20..54 << 20;
        let found = least_convergent_bandwidth(BytesPerSecond(1), LINE, |b| b.0 >= 50 << 20 && !hole.contains(&b.0)).unwrap();
        assert!(found.0 >= 54 << 20 && found.0 < 56 << 20, "{found:?}");
    }

    #[test]
    fn none_where_the_line_does_not_carry_it() {
        assert_eq!(least_convergent_bandwidth(LINE, LINE, |_| false), None);
        assert_eq!(least_convergent_bandwidth(LINE, LINE, |_| true), Some(BytesPerSecond(65_536)));
    }
}
