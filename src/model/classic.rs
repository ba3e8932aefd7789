//! Simpler models, to be compared with: the paper's recurrence and Liu's base model.
//!
//! Both send `D_1` = every page that is not zero and stop when what is left fits the downtime limit.

use super::{
    curve::{Curve, whole},
    forecast::Baseline,
    replay::{Settings, WIRE_PAGE},
};

/// Windows of this length give the base model its constant dirty rate, ms.
const REFERENCE_WINDOW_MS: f64 = 1000.0;
/// A recurrence that has not ended by then never will.
const MOST_ITERATIONS: u64 = 100_000;

/// `D_1 = R, T_i = D_i / B, D_{i+1} = f(T_i)` (MigVisor, VEE 2017, §3).
pub fn classic(curve: &Curve, nonzero_pages: f64, settings: &Settings) -> Baseline {
    iterate("classic", nonzero_pages, settings, |ms| curve.pages(ms))
}

/// A constant dirty rate `D = f(t_ref) / t_ref` (Liu et al., HPDC 2011).
pub fn base(curve: &Curve, nonzero_pages: f64, settings: &Settings) -> Baseline {
    let rate = curve.pages(REFERENCE_WINDOW_MS) / REFERENCE_WINDOW_MS;
    iterate("base", nonzero_pages, settings, |ms| rate * ms)
}

fn iterate(name: &str, nonzero_pages: f64, settings: &Settings, dirtied: impl Fn(f64) -> f64) -> Baseline {
    let rate = settings.bandwidth.cap().map_or(settings.host.line_rate, |cap| cap.min(settings.host.line_rate));
    let page_ms = WIRE_PAGE / rate.per_ms();
    let (mut pages, mut total_ms, mut left, mut iterations) = (0.0, 0.0, nonzero_pages, 1);
    loop {
        let ms = left * page_ms;
        pages += left;
        total_ms += ms;
        if ms <= settings.downtime_limit_ms {
            let downtime_ms = Some(ms);
            return Baseline {
                name: name.into(),
                converges: true,
                iterations,
                total_ms,
                downtime_ms,
                dirtied_pages: whole(pages),
            };
        }
        if total_ms >= settings.deadline_ms || iterations >= MOST_ITERATIONS {
            let total_ms = settings.deadline_ms;
            let dirtied_pages = whole(total_ms / page_ms);
            return Baseline { name: name.into(), converges: false, iterations, total_ms, downtime_ms: None, dirtied_pages };
        }
        left = dirtied(ms);
        iterations += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        forecast::HostConstants,
        pattern::{Sample, Traces, Writer},
        units::{Bandwidth, BytesPerSecond},
    };

    fn settings(mib: u64) -> Settings {
        Settings {
            bandwidth: Bandwidth::Capped(BytesPerSecond(mib << 20)),
            downtime_limit_ms: 300.0,
            deadline_ms: 20_000.0,
            host: HostConstants::default(),
        }
    }

    fn uniform(pages: u32, writes_per_ms: f64) -> Curve {
        let writer = Writer::Random { rate: writes_per_ms / f64::from(pages) };
        Curve::of(&[Sample { page: 0, weight: f64::from(pages), zero: false, writer }], &Traces::default())
    }

    #[test]
    fn an_idle_guest_is_sent_once() {
        let idle = Curve::of(&[], &Traces::default());
        let b = classic(&idle, 25_600.0, &settings(100));
        assert!(b.converges && b.iterations == 2 && b.dirtied_pages == 25_600);
        assert!((b.total_ms - 25_600.0 * 4104.0 / 104_857.6).abs() < 1e-6);
    }

    #[test]
    fn the_base_model_forgets_that_pages_are_written_twice() {
        // 400 writes a ms into 16 MiB: the working set fits, the rate does not.
        let hot = uniform(4096, 400.0);
        assert!(classic(&hot, 20_000.0, &settings(100)).converges);
        let fast = uniform(65_536, 40.0);
        assert!(!classic(&fast, 65_536.0, &settings(60)).converges);
        assert!(!base(&fast, 65_536.0, &settings(60)).converges);
    }
}
