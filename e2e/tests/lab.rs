//! The laboratory keeps its promises: guests write what they say, migrations do what the reference host measured.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use migvisor::qemu::dirty_rate::{DirtyRateMode, calc_dirty_rate};
use migvisor_e2e::{
    lab::{GuestSpec, Outcome, Settings, Vm, VmSpec, host, migrate},
    skip::unless_kvm,
};
use tokio::sync::Mutex;

/// Guests share two cores: one test at a time.
static MACHINE: Mutex<()> = Mutex::const_new(());

/// Pages per window of KVM's dirty log: the median of several.
async fn dirtied(vm: &mut Vm, ms: u64, repeats: usize) -> (f64, f64) {
    let mut seen = Vec::new();
    for _ in 0..repeats {
        let rate = calc_dirty_rate(vm.lab(), Duration::from_millis(ms), DirtyRateMode::DirtyBitmap).await.unwrap();
        seen.push((rate.bytes.0 as f64 / 4096.0, rate.window.as_secs_f64() * 1000.0));
    }
    seen.sort_by(|one, other| one.0.total_cmp(&other.0));
    seen[seen.len() / 2]
}

fn assert_near(what: &str, seen: f64, expected: f64, tolerance: f64) {
    println!("{what}: {seen:.0}, expected {expected:.0} ({:+.2} %)", (seen / expected - 1.0) * 100.0);
    assert!((seen / expected - 1.0).abs() <= tolerance, "{what}: {seen} instead of {expected}");
}

#[tokio::test]
async fn a_uniform_guest_meets_the_closed_form() {
    let _one = MACHINE.lock().await;
    let guest = GuestSpec::uniform(16_384, 40);
    let mut vm = Vm::start(VmSpec::new(guest)).await.unwrap();
    if !unless_kvm("the closed form of a uniform guest") {
        return;
    }
    for (ms, repeats) in [(100, 9), (400, 5), (1600, 5)] {
        let (pages, window) = dirtied(&mut vm, ms, repeats).await;
        assert_near(&format!("uniform, {ms} ms"), pages, guest.uniform_curve(window), 0.03);
    }
}

#[tokio::test]
async fn every_other_pattern_writes_what_it_says() {
    let _one = MACHINE.lock().await;
    let mut idle = Vm::start(VmSpec::new(GuestSpec::still(4096))).await.unwrap();
    if !unless_kvm("the write patterns of the laboratory's guests") {
        return;
    }
    let (pages, _) = dirtied(&mut idle, 400, 3).await;
    assert!(pages < 200.0, "an idle guest wrote {pages} pages");
    drop(idle);

    let mut sequential = Vm::start(VmSpec::new(GuestSpec::sequential(24_576, 12))).await.unwrap();
    let (pages, window) = dirtied(&mut sequential, 800, 5).await;
    assert_near("sequential, 800 ms", pages, 12.0 * window, 0.03);
    drop(sequential);

    let mut hot = Vm::start(VmSpec::new(GuestSpec::hot(49_152, 40, 2048, 90))).await.unwrap();
    let (pages, window) = dirtied(&mut hot, 400, 5).await;
    let expected = GuestSpec::uniform(2048, 36).uniform_curve(window) + GuestSpec::uniform(49_152, 4).uniform_curve(window);
    assert_near("hot, 400 ms", pages, expected, 0.04);
    drop(hot);

    // 300 ms of writes, 300 ms of calm: a window of two phases holds one of each, whenever it begins.
    let mut phased = Vm::start(VmSpec::new(GuestSpec::phased(400_000, 20, 300)).memory_mib(2048)).await.unwrap();
    let (pages, window) = dirtied(&mut phased, 600, 5).await;
    assert_near("phased, 600 ms", pages, GuestSpec::uniform(400_000, 20).uniform_curve(window / 2.0), 0.1);
    let mut calm = Vec::new();
    for _ in 0..12 {
        calm.push(dirtied(&mut phased, 100, 1).await.0);
    }
    assert!(calm.iter().any(|pages| *pages < 50.0) && calm.iter().any(|pages| *pages > 1500.0), "no phases in {calm:?}");
}

/// `uniform-fast` of the reference host: total 1736 to 1931 ms, 50 996 to 55 952 pages, 11 to 13 syncs.
#[tokio::test]
async fn a_capped_migration_takes_as_long_as_on_the_reference_host() {
    let _one = MACHINE.lock().await;
    let guest = GuestSpec::uniform(16_384, 40);
    let mut source = Vm::start(VmSpec::new(guest)).await.unwrap();
    let mut target = Vm::incoming(VmSpec::new(guest)).await.unwrap();
    let truth = migrate(&mut source, &mut target, Settings::capped(100)).await.unwrap();
    println!("{truth:?}");
    assert_eq!(truth.status, Outcome::Completed);
    assert!(!source.is_alive());
    if !unless_kvm("a capped migration as long as on the reference host") {
        return;
    }
    assert!((1736.0 * 0.95..=1931.0 * 1.05).contains(&(truth.total_ms as f64)), "total {}", truth.total_ms);
    assert!((50_996.0 * 0.95..=55_952.0 * 1.05).contains(&(truth.pages as f64)), "pages {}", truth.pages);

    // The guest writes on at the same pace, and can be migrated on.
    let (pages, window) = dirtied(&mut target, 400, 3).await;
    assert_near("after the migration, 400 ms", pages, guest.uniform_curve(window), 0.03);
    let mut second = Vm::incoming(VmSpec::new(guest)).await.unwrap();
    let truth = migrate(&mut target, &mut second, Settings::capped(100)).await.unwrap();
    println!("{truth:?}");
    assert_eq!(truth.status, Outcome::Completed);
}

#[tokio::test]
async fn a_budget_ends_a_hopeless_migration_and_the_guest_runs_on() {
    let _one = MACHINE.lock().await;
    let guest = GuestSpec::uniform(32_768, 40);
    let mut source = Vm::start(VmSpec::new(guest)).await.unwrap();
    let mut target = Vm::incoming(VmSpec::new(guest)).await.unwrap();
    let settings = Settings { time_budget: Duration::from_secs(3), ..Settings::capped(40) };
    let truth = migrate(&mut source, &mut target, settings).await.unwrap();
    println!("{truth:?}");
    assert_eq!(truth.status, Outcome::TimedOut);
    assert!((3000..3300).contains(&truth.total_ms), "{truth:?}");
    assert!(migvisor::qemu::vm::ensure_measurable(source.lab()).await.unwrap().running);
}

/// `uniform-uncapped` over 100 MiB/s: 2036 ms, 50 920 pages, 294 ms of downtime (one run on the reference host).
#[tokio::test]
async fn a_link_paces_an_uncapped_migration() {
    let _one = MACHINE.lock().await;
    let guest = GuestSpec::uniform(16_384, 40);
    let mut source = Vm::start(VmSpec::new(guest)).await.unwrap();
    let mut target = Vm::incoming(VmSpec::new(guest)).await.unwrap();
    let link = Some(migvisor::model::units::BytesPerSecond(100 << 20));
    let truth = migrate(&mut source, &mut target, Settings { link, ..Settings::uncapped() }).await.unwrap();
    println!("{truth:?}");
    assert_eq!(truth.status, Outcome::Completed);
    let rate = truth.transferred.0 as f64 / truth.total_ms as f64 * 1000.0 / f64::from(1 << 20);
    // Never more than the link; less where the machine is busy.
    assert!((80.0..=101.0).contains(&rate), "the link carried {rate:.1} MiB/s");
}

#[tokio::test]
async fn the_hosts_constants_can_be_measured() {
    let _one = MACHINE.lock().await;
    let host = host::calibrate().await.unwrap();
    println!("{host:?}");
    assert!((50 << 20..50 << 30).contains(&host.line_rate.0), "{host:?}");
    assert!((50.0..20_000.0).contains(&host.zero_pages_per_ms), "{host:?}");
    assert!((0.0..100.0).contains(&host.setup_ms) && (0.0..200.0).contains(&host.completion_ms), "{host:?}");
}
