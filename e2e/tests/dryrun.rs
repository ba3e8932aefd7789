//! The dry run on real guests: that it never stops one, whatever becomes of it, and what it tells. `make soak` does the first in full.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::{future::pending, sync::Mutex, time::Duration};

use migvisor::{
    dryrun::{self, End, Plan, Progress},
    model::{
        forecast::{CostWeights, HostConstants, Method, Question, Sla, Verdict},
        units::{Bandwidth, Bytes, BytesPerSecond},
    },
    qemu::{
        migration::{self, MigrationStatus},
        vm::{self, RunState},
    },
};
use migvisor_e2e::{
    cluster::product,
    lab::{GuestSpec, Vm, VmSpec},
    process::{Process, dying_with_us},
    skip::unless_kvm,
    soak::{self, Belongings, Summary, capped, dry_run, guest, never_stopped, product_monitor},
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::UnixListener, time::sleep};

/// Guests share two cores: one test at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn question(bandwidth: Bandwidth, limit: Duration, time_budget: Option<Duration>) -> Question {
    let host = HostConstants::default();
    Question { bandwidth, downtime_limit: limit, time_budget, host, sla: Sla::default(), weights: CostWeights::default() }
}

/// `make soak` holds 50 ms. Here guests share two cores with eight compressing threads and with whatever else a build does, and the
/// longest of twenty pauses has been 54 ms longer: that it is no stop is held by the events, and by this.
const SHARED_CORES: Duration = Duration::from_millis(250);

#[tokio::test(flavor = "multi_thread")]
async fn no_dry_run_ever_stops_a_guest() {
    let _alone = ALONE.lock().await;
    if !unless_kvm("a paced guest's longest pause in a dry run") {
        return;
    }
    let mut summary = Summary::default();
    let done = soak::runs(20, &mut summary, |_| ()).await;
    println!("{summary}");
    done.unwrap();
    summary.check(SHARED_CORES).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_dry_run_leaves_a_running_guest_and_its_settings_to_the_next() {
    let _alone = ALONE.lock().await;
    if !unless_kvm("a paced guest's longest pause around the end of a killed dry run") {
        return;
    }
    let mut summary = Summary::default();
    let mut moments = [0.2, 0.5, 0.9].into_iter();
    soak::kills(3, &mut summary, || moments.next().unwrap()).await.unwrap();
    println!("{summary}");
    summary.check(SHARED_CORES).unwrap();
}

/// The instrument of the two tests above: it does see a stop.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_guest_says_so() {
    let _alone = ALONE.lock().await;
    let (mut vm, pulse) = guest().await.unwrap();
    pulse.reset().unwrap();
    vm.pause().await.unwrap();
    sleep(Duration::from_millis(400)).await;
    vm.resume().await.unwrap();
    sleep(Duration::from_millis(100)).await;
    let longest = pulse.longest().unwrap();
    assert!((380..1000).contains(&longest.as_millis()), "{longest:?}");
    assert!(never_stopped(&mut vm).await.unwrap_err().to_string().contains("STOP"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_run_answers_several_limits() {
    let _alone = ALONE.lock().await;
    let vm = Vm::start(VmSpec::new(GuestSpec::hot(49_152, 40, 2048, 90))).await.unwrap();
    let ms = Duration::from_millis;
    let plan = Plan { downtime_limits: vec![ms(50), ms(1000), ms(300)], ..capped(200) };
    let heard = Mutex::new(Vec::<Progress>::new());
    let report =
        dryrun::run(product_monitor(&vm).await.unwrap(), &plan, |progress| heard.lock().unwrap().push(progress), pending())
            .await
            .unwrap();
    let question = question(plan.bandwidth, ms(300), None);
    let limits = report.limits(&question);
    println!("{limits:#?}");
    assert_eq!(limits.iter().map(|limit| limit.downtime_limit_ms).collect::<Vec<_>>(), [1000, 300, 50]);
    assert!(limits.iter().all(|limit| limit.converges == Some(true)));
    let times: Vec<f64> = limits.iter().map(|limit| limit.convergence_ms.unwrap()).collect();
    assert!(
        (3..=5).contains(&limits[2].iterations.unwrap()),
        "the syncs of a run with several limits are those of each: {limits:?}"
    );
    assert!(times.is_sorted() && times[2] > times[0] + 50.0, "{times:?}");
    assert!(limits.iter().map(|limit| limit.remaining_bytes.unwrap()).rev().is_sorted());
    let forecast = report.forecast(&question).unwrap();
    assert_eq!((forecast.method, forecast.pattern, forecast.verdict), (Method::DryRun, None, Verdict::Converges));
    assert!(report.forecast(&Question { downtime_limit: ms(77), ..question }).is_none(), "a limit that was not asked for");
    let heard = heard.into_inner().unwrap();
    assert!(heard.len() >= 4 && heard.iter().all(|one| one.total.0 == 512 << 20), "{heard:?}");
    assert!(
        heard.iter().any(|one| one.remaining < heard[0].remaining) && heard.iter().any(|one| one.rate.0 > 100 << 20),
        "{heard:?}"
    );
}

/// As many as QEMU has; a process that may not open so many files says so, and touches nothing.
#[tokio::test(flavor = "multi_thread")]
async fn as_many_channels_as_qemu_has() {
    let _alone = ALONE.lock().await;
    let (mut vm, _) = guest().await.unwrap();
    // Once before: threads and allocations that stay.
    let plan = Plan { channels: 255, link: Some(BytesPerSecond(200 << 20)), ..capped(200) };
    let report = dry_run(&vm, &plan).await.unwrap();
    assert_eq!(report.end, End::Met, "{report:?}");
    let before = Belongings::of(&mut vm).await.unwrap();
    let report = dry_run(&vm, &plan).await.unwrap();
    assert!(report.end == End::Met && report.normal_pages > 16_384, "{report:?}");
    before.unchanged(&mut vm).await.unwrap();
    never_stopped(&mut vm).await.unwrap();

    let state = tempfile::tempdir().unwrap();
    let mut command = tokio::process::Command::new("prlimit");
    command.arg("--nofile=100").arg(product::binary().unwrap()).args(["dry-run", "--bandwidth", "200Mi", "--channels", "100"]);
    command.arg("--qmp").arg(vm.qmp()).arg("--state-dir").arg(state.path()).kill_on_drop(true);
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.code() == Some(3) && said.contains("100 channels need") && said.contains("ulimit -n"), "{output:?}");
    before.unchanged(&mut vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_makes_a_failure_and_a_deadline_nothing_at_all() {
    let _alone = ALONE.lock().await;
    let (mut vm, _) = guest().await.unwrap();
    let question = |plan: &Plan| question(plan.bandwidth, Duration::from_millis(300), plan.time_budget);
    let plan = Plan { time_budget: Some(Duration::from_secs(2)), ..capped(30) };
    let report = dry_run(&vm, &plan).await.unwrap();
    let forecast = report.forecast(&question(&plan)).unwrap();
    assert_eq!((report.end, forecast.verdict, forecast.downtime_ms), (End::Budget, Verdict::Fails, None));
    assert!((1990.0..2010.0).contains(&forecast.total_ms), "{forecast:?}");

    let plan = Plan { deadline: Duration::from_secs(1), time_budget: Some(Duration::from_secs(20)), ..capped(30) };
    let report = dry_run(&vm, &plan).await.unwrap();
    assert_eq!((report.end, report.forecast(&question(&plan))), (End::Deadline, None));
    assert_eq!(report.limits(&question(&plan))[0].converges, None);
    never_stopped(&mut vm).await.unwrap();
}

/// The second net, should somebody stop the guest in mid-run: QEMU then switches over without asking, and still waits for a last word.
#[tokio::test(flavor = "multi_thread")]
async fn not_even_a_stopped_guest_is_handed_over() {
    let _alone = ALONE.lock().await;
    let (mut vm, pulse) = guest().await.unwrap();
    let before = Belongings::of(&mut vm).await.unwrap();
    vm.pause().await.unwrap();
    migration::set_capabilities(vm.lab(), &[("return-path", true), ("switchover-ack", true)]).await.unwrap();
    let socket = vm.dir().join("nowhere");
    let listener = UnixListener::bind(&socket).unwrap();
    let sink = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut piece = vec![0; 1 << 16];
        while stream.read(&mut piece).await.unwrap() > 0 {}
    });
    migration::start(vm.lab(), &format!("unix:{}", socket.display())).await.unwrap();
    sleep(Duration::from_secs(4)).await;
    // Everything is sent, and it does not complete.
    let stuck = migration::query(vm.lab()).await.unwrap();
    println!("{:?}, {} bytes left", stuck.status, stuck.ram.unwrap().remaining.0);
    assert!(stuck.ram.unwrap().remaining == Bytes(0) && stuck.status.is_some_and(MigrationStatus::is_active), "{stuck:?}");
    migration::cancel(vm.lab()).await.unwrap();
    sink.await.unwrap();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(vm::status(vm.lab()).await.unwrap().state, RunState::Paused);
    vm.resume().await.unwrap();
    pulse.reset().unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(pulse.longest().unwrap() > Duration::ZERO && vm::status(vm.lab()).await.unwrap().running);
    migration::set_capabilities(vm.lab(), &[("return-path", false), ("switchover-ack", false)]).await.unwrap();
    before.unchanged(&mut vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_answers_like_predict() {
    let _alone = ALONE.lock().await;
    let (mut vm, _) = guest().await.unwrap();
    let before = Belongings::of(&mut vm).await.unwrap();
    let state = tempfile::tempdir().unwrap();
    let start = |name: &str, more: &[&str]| {
        let mut command = dying_with_us(product::binary().unwrap());
        command.arg("dry-run").arg("--qmp").arg(vm.qmp()).arg("--state-dir").arg(state.path()).args(more);
        Process::start(name, command, vm.dir().join(name)).unwrap()
    };
    let ended = async |mut process: Process| {
        let end = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = process.exited() {
                return (status.code(), process.log());
            }
            assert!(tokio::time::Instant::now() < end, "it does not end: {}", process.log());
            sleep(Duration::from_millis(20)).await;
        }
    };
    let ask =
        ["--bandwidth", "100Mi", "--time-budget", "20s", "--downtime-limit", "300ms", "--downtime-limit", "1s", "-o", "json"];
    let (code, text) = ended(start("json", &ask)).await;
    let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!((code, &answer["verdict"], &answer["method"]), (Some(0), &json!("Converges"), &json!("DR")), "{text}");
    assert!(answer["pattern"].is_null() && answer["leastConvergentBandwidth"].is_null() && answer["cost"].is_number(), "{text}");
    assert_eq!(
        (answer["limits"][0]["downtimeLimitMs"].clone(), answer["limits"][1]["downtimeLimitMs"].clone()),
        (json!(1000), json!(300))
    );
    assert_eq!(answer["limits"][1]["totalMs"], answer["totalMs"], "{text}");

    let (code, text) = ended(start("table", &["--bandwidth", "30Mi", "--time-budget", "1s"])).await;
    assert!(
        code == Some(1) && text.starts_with("Verdict               Fails") && text.contains("would still be copying"),
        "{text}"
    );
    let (code, text) = ended(start("deadline", &["--bandwidth", "30Mi", "--deadline", "1s"])).await;
    assert!(code == Some(3) && text.contains("longer --deadline"), "{text}");
    let (code, text) = ended(start("zero", &["--bandwidth", "30Mi", "--downtime-limit", "0"])).await;
    assert!(code == Some(2) && text.contains("its default is 300ms"), "{text}");

    // Interrupted at the keyboard: everything is put back first.
    let process = start("interrupted", &["--bandwidth", "30Mi"]);
    sleep(Duration::from_secs(1)).await;
    process.signal(nix::sys::signal::Signal::SIGINT).unwrap();
    let (code, text) = ended(process).await;
    assert!(code == Some(2) && text.contains("withdrawn: interrupted"), "{text}");
    before.unchanged(&mut vm).await.unwrap();
    assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
    never_stopped(&mut vm).await.unwrap();
}
