//! From a live guest to a verdict, and the same migration for real: the whole chain, case by case.
//!
//! Each guest is looked at once, by the product, before it is migrated; then it is handed on from QEMU to QEMU under one
//! setting after the other, and each forecast is held against what happened. No constant is fitted on a guest that is tested:
//! those of the host come from other guests.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use migvisor::{
    collector::{LookOptions, Seen, Target, observe},
    model::{
        forecast::{Forecast, HostConstants, Verdict},
        pattern::Pattern,
        predict::forecast,
        units::BytesPerSecond,
    },
};
use migvisor_e2e::{
    lab::{
        GuestSpec, Outcome, Truth,
        Under::{self, Cap, Link},
        Vm, VmSpec, Writes, host, migrate,
    },
    skip::unless_kvm,
};

/// A failing case takes as long as its budget: 20 s per decimal GB, as some distributions ship.
const BUDGET: Duration = Duration::from_secs(20);
/// Short migrations are done so often, and the median counts: a busy moment of the machine is nobody's error.
const REPEATS: usize = 5;
/// Migrations of up to so many ms are short.
const SHORT_MS: f64 = 3000.0;

/// Two tests at once would measure each other.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn look(vm: &Vm) -> Pattern {
    let target = Target { monitor: vm.qmp().to_owned().into(), pid: None };
    observe(&target, &LookOptions::default(), |_| ()).await.unwrap().pattern().unwrap()
}

struct Case {
    name: String,
    forecast: Forecast,
    truths: Vec<Truth>,
    sweep: bool,
    /// Over a line that this machine's own CPUs have to play: where they are busy it is slower than it says, and the forecast,
    /// which is told the rate, is right about another line. So a single case proves nothing, and all of them are judged together.
    played: bool,
    /// Zero pages go at half the speed here, and why is open: left out of the judgement of times, not of verdicts.
    open: bool,
}

impl Case {
    fn converged(&self) -> bool {
        self.truths.iter().all(|truth| truth.status == Outcome::Completed)
    }

    fn real(&self, figure: fn(&Truth) -> u64) -> f64 {
        let mut all: Vec<u64> = self.truths.iter().map(figure).collect();
        all.sort_unstable();
        all[all.len() / 2] as f64
    }

    fn error(&self) -> f64 {
        self.forecast.total_ms / self.real(|truth| truth.total_ms) - 1.0
    }

    fn print(&self) {
        let f = &self.forecast;
        println!(
            "{:<26} {:?} {:.2}  total {:>6.0} [{:.0} – {:.0}] real {:>6} ({:+.1} %)  pages {} real {} ({:+.1} %)  syncs {} real {}  downtime {} real {}  LCB {}",
            self.name,
            f.verdict,
            f.probability,
            f.total_ms,
            f.bounds.total_ms.0,
            f.bounds.total_ms.1,
            self.real(|truth| truth.total_ms),
            self.error() * 100.0,
            f.dirtied_pages,
            self.real(|truth| truth.pages),
            (f.dirtied_pages as f64 / self.real(|truth| truth.pages) - 1.0) * 100.0,
            f.iterations,
            self.real(|truth| truth.syncs),
            f.downtime_ms.map_or_else(|| "–".into(), |ms| format!("{ms:.0}")),
            self.real(|truth| truth.downtime_ms.unwrap_or(0)),
            f.least_convergent_bandwidth.map_or_else(|| "–".into(), |rate| BytesPerSecond(rate).to_string()),
        );
    }
}

/// Looks once, then migrates under each setting in turn. A failing setting leaves the guest where it is.
async fn run(name: &str, guest: GuestSpec, memory_mib: u32, host: HostConstants, under: &[Under]) -> Vec<Case> {
    let spec = VmSpec::new(guest).memory_mib(memory_mib);
    let mut source = Vm::start(spec.clone()).await.unwrap();
    let pattern = look(&source).await;
    let mut cases = vec![];
    for &under in under {
        let settings = under.settings(BUDGET);
        let forecast = forecast(&pattern, &settings.question(host));
        let repeats = if forecast.total_ms < SHORT_MS { REPEATS } else { 1 };
        let mut truths = vec![];
        for _ in 0..repeats {
            let mut target = Vm::incoming(spec.clone()).await.unwrap();
            let truth = migrate(&mut source, &mut target, settings).await.unwrap();
            if truth.status == Outcome::Completed {
                source = target;
            }
            truths.push(truth);
        }
        let open = name == "hot-cold" && under == Cap(200, 300);
        let sweep = guest.writes == Writes::Sequential;
        let played = matches!(under, Link(_));
        let case = Case { name: format!("{name} {under:?}"), forecast, truths, sweep, played, open };
        case.print();
        cases.push(case);
    }
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn forecasts_of_live_guests_meet_their_migrations() {
    let _alone = ALONE.lock().await;
    if !unless_kvm("forecasts beside real migrations") {
        return;
    }
    let host = host::calibrate().await.unwrap();
    println!("{host:?}");
    let skewed = GuestSpec::hot(49_152, 40, 2048, 90);
    let skewed_settings = [Cap(60, 300), Cap(100, 300), Cap(200, 50), Cap(200, 300), Link(100), Link(200)];
    let sweep = GuestSpec::sequential(24_576, 12);
    let mut all = vec![];
    let fast = [Cap(100, 300), Link(100), Link(200), Cap(20, 300)];
    all.extend(run("uniform-fast", GuestSpec::uniform(16_384, 40), 512, host, &fast).await);
    all.extend(run("uniform-slow", GuestSpec::uniform(32_768, 10), 512, host, &[Cap(60, 300), Cap(25, 300)]).await);
    all.extend(run("hot-cold", skewed, 512, host, &skewed_settings).await);
    all.extend(run("sequential", sweep, 512, host, &[Cap(100, 300), Cap(60, 300), Link(100), Link(200), Cap(35, 300)]).await);
    all.extend(run("still", GuestSpec::still(30_000), 512, host, &[Cap(100, 300)]).await);
    all.extend(run("uniform-large", GuestSpec::uniform(400_000, 9), 2600, host, &[Cap(150, 300)]).await);
    all.extend(run("hot-cold-large", GuestSpec::hot(400_000, 14, 60_000, 80), 2600, host, &[Cap(150, 300)]).await);
    all.extend(run("sequential-large", GuestSpec::sequential(400_000, 10), 2600, host, &[Cap(150, 300)]).await);

    // Everything is printed before anything is judged.
    for case in &all {
        let wanted = if case.converged() { Verdict::Converges } else { Verdict::Fails };
        assert_eq!(case.forecast.verdict, wanted, "{}: {:?}", case.name, case.truths);
    }
    assert!(all.iter().filter(|case| !case.converged()).count() >= 3, "no real failures to be right about");
    for case in all.iter().filter(|case| case.sweep && case.converged() && !case.played) {
        let (low, high) = case.forecast.bounds.total_ms;
        let real = case.real(|truth| truth.total_ms);
        assert!((low..=high).contains(&real), "{}: {real} ms lies outside {low:.0} – {high:.0}", case.name);
    }
    let (median, worst) = judge("capped", all.iter().filter(|case| !case.open && !case.sweep && !case.played));
    assert!(median <= 0.03 && worst <= 0.15);
    let (median, _) = judge("over a line", all.iter().filter(|case| case.played));
    assert!(median <= 0.10);
}

/// Median and worst error of the total time of the migrations that converged.
fn judge<'a>(what: &str, cases: impl Iterator<Item = &'a Case>) -> (f64, f64) {
    let mut errors: Vec<f64> = cases.filter(|case| case.converged()).map(|case| case.error().abs()).collect();
    errors.sort_by(f64::total_cmp);
    let (median, worst) = (errors[errors.len() / 2], errors[errors.len() - 1]);
    println!("total time {what}, {} cases: median error {:.1} %, worst {:.1} %", errors.len(), median * 100.0, worst * 100.0);
    (median, worst)
}

/// The sampler's own estimate of f(t), without any model, against the closed form; and the pattern made of it.
#[tokio::test(flavor = "multi_thread")]
async fn the_sampler_meets_the_closed_form() {
    let _alone = ALONE.lock().await;
    if !unless_kvm("the sampler against the closed form of a paced guest") {
        return;
    }
    let guest = GuestSpec::uniform(16_384, 40);
    let vm = Vm::start(VmSpec::new(guest)).await.unwrap();
    let target = Target { monitor: vm.qmp().to_owned().into(), pid: None };
    let seen = observe(&target, &LookOptions::default(), |_| ()).await.unwrap();
    let Seen::Trace(trace) = &seen.seen else { unreachable!("root may read memory") };
    let pattern = seen.pattern().unwrap();
    for ms in [100.0, 400.0, 1600.0] {
        let truth = guest.uniform_curve(ms);
        let (pages, sigma) = trace.distinct_pages(ms).unwrap();
        let fitted = pattern.curve().pages(ms);
        println!("{ms} ms: {pages:.0} ± {sigma:.0} pages sampled, {fitted:.0} fitted, {truth:.0} by the closed form");
        assert!((pages - truth).abs() <= 4.0 * sigma, "sampled: {pages} against {truth} at {ms} ms, σ {sigma}");
        assert!((fitted - truth).abs() <= 4.0 * sigma, "fitted: {fitted} against {truth} at {ms} ms, σ {sigma}");
    }
}
