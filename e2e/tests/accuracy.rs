//! From a live guest to a verdict, and the same migration for real: the whole chain, case by case.
//!
//! Each guest is looked at once, by the product, before it is migrated; then it is handed on from QEMU to QEMU under one
//! setting after the other, and each forecast is held against what happened.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use migvisor::{
    collector::{LookOptions, Target, observe},
    model::{
        forecast::{CostWeights, Forecast, HostConstants, Question, Sla, Verdict},
        pattern::Pattern,
        predict::forecast,
        units::{Bandwidth, BytesPerSecond},
    },
};
use migvisor_e2e::lab::{GuestSpec, Outcome, Settings, Truth, Vm, VmSpec, host, migrate};

/// A failing case takes as long as its budget: 20 s, as some distributions ship (per decimal GB).
const BUDGET: Duration = Duration::from_secs(20);

/// One setting of one guest.
#[derive(Debug, Clone, Copy)]
enum Under {
    /// MiB/s, downtime limit in ms.
    Cap(u64, u64),
    /// No cap, over a line of so many MiB/s.
    Link(u64),
}

impl Under {
    fn settings(self) -> Settings {
        match self {
            Self::Cap(mib, limit) => {
                Settings { downtime_limit: Duration::from_millis(limit), time_budget: BUDGET, ..Settings::capped(mib) }
            }
            Self::Link(mib) => Settings { link: Some(BytesPerSecond(mib << 20)), time_budget: BUDGET, ..Settings::uncapped() },
        }
    }

    fn question(self, host: HostConstants) -> Question {
        let settings = self.settings();
        Question {
            bandwidth: settings.bandwidth,
            downtime_limit: settings.downtime_limit,
            time_budget: Some(settings.time_budget),
            host: HostConstants { line_rate: settings.link.unwrap_or(host.line_rate), ..host },
            sla: Sla::default(),
            weights: CostWeights::default(),
        }
    }
}

async fn look(vm: &Vm) -> Pattern {
    let target = Target { qmp: vm.qmp().to_owned(), pid: None };
    observe(&target, &LookOptions::default(), |_| ()).await.unwrap().pattern().unwrap()
}

#[derive(Debug)]
struct Result {
    name: String,
    under: Under,
    forecast: Forecast,
    truth: Truth,
    sweep: bool,
}

impl Result {
    fn total_error(&self) -> f64 {
        self.forecast.total_ms / self.truth.total_ms as f64 - 1.0
    }
    fn converged(&self) -> bool {
        self.truth.status == Outcome::Completed
    }
}

/// Looks once, then migrates under each setting in turn. Failing settings leave the guest where it is.
async fn run(name: &str, guest: GuestSpec, memory_mib: u32, host: HostConstants, all: &[Under], results: &mut Vec<Result>) {
    let spec = VmSpec::new(guest).memory_mib(memory_mib);
    let mut source = Vm::start(spec.clone()).await.unwrap();
    let pattern = look(&source).await;
    for &under in all {
        let forecast = forecast(&pattern, &under.question(host));
        let mut target = Vm::incoming(spec.clone()).await.unwrap();
        let truth = migrate(&mut source, &mut target, under.settings()).await.unwrap();
        let result =
            Result { name: name.into(), under, forecast, truth, sweep: guest.writes == migvisor_e2e::lab::Writes::Sequential };
        let f = &result.forecast;
        println!(
            "{name:<12} {under:?}: {:?} p={:.2} total {:.0} [{:.0}-{:.0}] real {} ({:+.1}%) pages {} real {} ({:+.1}%) down {:?} real {:?} syncs {} real {} lcb {:?}",
            f.verdict,
            f.probability,
            f.total_ms,
            f.bounds.total_ms.0,
            f.bounds.total_ms.1,
            result.truth.total_ms,
            result.total_error() * 100.0,
            f.dirtied_pages,
            result.truth.pages,
            (f.dirtied_pages as f64 / result.truth.pages as f64 - 1.0) * 100.0,
            f.downtime_ms.map(|d| d.round()),
            result.truth.downtime_ms,
            f.iterations,
            result.truth.syncs,
            f.least_convergent_bandwidth.map(|b| b >> 20)
        );
        if result.converged() {
            source = target;
        }
        results.push(result);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forecasts_of_live_guests_meet_their_migrations() {
    use Under::{Cap, Link};
    let host = host::calibrate().await.unwrap();
    println!("{host:?}");
    let mut results = vec![];
    let r = &mut results;
    run("uniform-fast", GuestSpec::uniform(16_384, 40), 512, host, &[Cap(100, 300), Link(100), Link(200), Cap(20, 300)], r).await;
    run("uniform-slow", GuestSpec::uniform(32_768, 10), 512, host, &[Cap(60, 300), Cap(25, 300)], r).await;
    let hot = GuestSpec::hot(49_152, 40, 2048, 90);
    run("hot-cold", hot, 512, host, &[Cap(60, 300), Cap(100, 300), Cap(200, 50), Cap(200, 300), Link(100), Link(200)], r).await;
    run(
        "sequential",
        GuestSpec::sequential(24_576, 12),
        512,
        host,
        &[Cap(100, 300), Cap(60, 300), Link(100), Link(200), Cap(35, 300)],
        r,
    )
    .await;
    run("idle", GuestSpec::still(30_000), 512, host, &[Cap(100, 300)], r).await;
    run("uniform-big", GuestSpec::uniform(400_000, 9), 2600, host, &[Cap(150, 300)], r).await;
    run("hot-big", GuestSpec::hot(400_000, 14, 60_000, 80), 2600, host, &[Cap(150, 300)], r).await;
    run("sweep-big", GuestSpec::sequential(400_000, 10), 2600, host, &[Cap(150, 300)], r).await;
    let _ = (Bandwidth::Unlimited, Verdict::Fails);
}
