//! A dry run and a real migration of the same guest, side by side.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use migvisor::{
    dryrun::Plan,
    model::forecast::{HostConstants, Verdict},
};
use migvisor_e2e::{
    lab::{
        GuestSpec, Outcome, Settings, Truth,
        Under::{self, Cap, Link},
        Vm, VmSpec, host, migrate,
    },
    skip::unless_kvm,
    soak::dry_run,
};

/// A failing case takes as long as its budget.
const BUDGET: Duration = Duration::from_secs(10);
/// Runs of each kind, and the median counts: where in its cycle a guest is, and a busy moment of the machine, are nobody's error.
/// Long ones average out by themselves.
const REPEATS: usize = 5;
const REPEATS_LONG: usize = 3;
/// Migrations of more than so many ms are long.
const LONG_MS: f64 = 3000.0;

fn plan(settings: &Settings) -> Plan {
    let &Settings { bandwidth, downtime_limit, time_budget, link, .. } = settings;
    Plan { link, downtime_limits: vec![downtime_limit], time_budget: Some(time_budget), ..Plan::new(bandwidth) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The error of the median total time; `None` where both fail.
async fn side_by_side(name: &str, guest: GuestSpec, host: HostConstants, under: &[Under]) -> Vec<(String, f64)> {
    let spec = VmSpec::new(guest);
    let mut source = Vm::start(spec.clone()).await.unwrap();
    let mut errors = vec![];
    for &under in under {
        let settings = under.settings(BUDGET);
        let (mut forecasts, mut truths): (Vec<_>, Vec<Truth>) = (vec![], vec![]);
        // In turn, so that what else the machine does meets both.
        for _ in 0..REPEATS {
            let report = dry_run(&source, &plan(&settings)).await.unwrap();
            forecasts.push(report.forecast(&settings.question(host)).unwrap());
            let mut target = Vm::incoming(spec.clone()).await.unwrap();
            let truth = migrate(&mut source, &mut target, settings).await.unwrap();
            if truth.status == Outcome::Completed {
                source = target;
            }
            truths.push(truth);
            let enough = if forecasts[0].total_ms > LONG_MS { REPEATS_LONG } else { REPEATS };
            if forecasts[0].verdict == Verdict::Fails || truths.len() >= enough {
                break;
            }
        }
        let totals: Vec<_> = forecasts.iter().map(|f| f.total_ms.round()).collect();
        let reals: Vec<_> = truths.iter().map(|truth| truth.total_ms).collect();
        let of = |figure: fn(&Truth) -> u64| median(truths.iter().map(|truth| figure(truth) as f64).collect());
        let error = median(totals.clone()) / of(|truth| truth.total_ms) - 1.0;
        println!(
            "{name:<13} {under:?}: {:?}  total {totals:?} real {reals:?} ({:+.1} %)  pages {} real {}  syncs {} real {}  downtime {:.0} real {:.0}",
            forecasts[0].verdict,
            error * 100.0,
            median(forecasts.iter().map(|f| f.dirtied_pages as f64).collect()),
            of(|truth| truth.pages),
            median(forecasts.iter().map(|f| f.iterations as f64).collect()),
            of(|truth| truth.syncs),
            median(forecasts.iter().map(|f| f.downtime_ms.unwrap_or(0.0)).collect()),
            of(|truth| truth.downtime_ms.unwrap_or(0)),
        );
        for (forecast, truth) in forecasts.iter().zip(&truths) {
            let wanted = if truth.status == Outcome::Completed { Verdict::Converges } else { Verdict::Fails };
            assert_eq!(forecast.verdict, wanted, "{name} {under:?}: {truth:?}");
        }
        if forecasts[0].verdict == Verdict::Converges {
            errors.push((format!("{name} {under:?}"), error.abs()));
        }
    }
    errors
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_what_the_migration_does() {
    if !unless_kvm("dry runs beside real migrations") {
        return;
    }
    let host = host::calibrate().await.unwrap();
    println!("{host:?}");
    let mut errors = vec![];
    let random = [Cap(100, 300), Cap(20, 300), Link(200)];
    errors.extend(side_by_side("uniform", GuestSpec::uniform(16_384, 40), host, &random).await);
    let skewed = [Cap(60, 300), Cap(200, 50), Link(100)];
    errors.extend(side_by_side("hot-cold", GuestSpec::hot(49_152, 40, 2048, 90), host, &skewed).await);
    let sweep = [Cap(35, 300), Cap(100, 300), Link(200)];
    errors.extend(side_by_side("sequential", GuestSpec::sequential(24_576, 12), host, &sweep).await);
    errors.sort_by(|a, b| a.1.total_cmp(&b.1));
    let middle = errors[errors.len() / 2].1;
    println!("total time, {} cases: median error {:.1} %, worst {:?}", errors.len(), middle * 100.0, errors.last());
    assert!(middle <= 0.03, "{errors:?}");
}
