//! The proof that a dry run never stops its guest, as often as one likes: the tests take it short, `make soak` in full.
//!
//! In: how many runs, how many kills. Out: figures, and an error at the first run that did what it must not.

use std::{
    fmt,
    future::pending,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use migvisor::{
    dryrun::{self, Allow, Compression, DryRunError, End, Plan, Report},
    model::units::{Bandwidth, BytesPerSecond},
    qemu::{migration, monitor::Monitor, qmp::QmpError, vm},
};
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    cluster::product,
    lab::{GuestSpec, Pulse, Vm, VmSpec},
    process::{Process, dying_with_us},
};

/// A dry run may make the guest wait so much longer than nothing at all does.
pub const TOLERATED: Duration = Duration::from_millis(50);

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Dry runs that ended with every limit met. The others ended at their deadline: zstd on a busy machine.
    pub met: usize,
    /// How long each took.
    pub took: Vec<Duration>,
    /// The guest's longest pause in each.
    pub pauses: Vec<Duration>,
    /// The longest of them, and in which kind of run.
    pub worst: Option<(Duration, &'static str)>,
    /// The same, in as many undisturbed stretches of the same length.
    pub undisturbed: Vec<Duration>,
    /// Runs whose process was killed.
    pub kills: usize,
    /// The guest's longest pause around each kill.
    pub pauses_killed: Vec<Duration>,
}

impl Summary {
    /// Did the guest ever wait longer than it may?
    pub fn check(&self, tolerated: Duration) -> Result<()> {
        let longest = |pauses: &[Duration]| pauses.iter().max().copied().unwrap_or_default();
        let most = longest(&self.undisturbed) + tolerated;
        for (what, pauses) in [("dry runs", &self.pauses), ("kills", &self.pauses_killed)] {
            ensure!(
                longest(pauses) <= most,
                "the guest paused for {:?} during {what}; undisturbed for {:?}",
                longest(pauses),
                longest(&self.undisturbed)
            );
        }
        Ok(())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, times: &[Duration]| {
            let mut ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
            ms.sort_by(f64::total_cmp);
            let at = |share: usize| ms.get((ms.len().saturating_sub(1)) * share / 100).copied().unwrap_or(0.0);
            writeln!(f, "| {name:<34} | {:>5} | {:>8.1} | {:>8.1} | {:>8.1} |", ms.len(), at(50), at(95), at(100))
        };
        writeln!(f, "| ms                                 | times |   median |     95 % |  longest |")?;
        writeln!(f, "|------------------------------------|------:|---------:|---------:|---------:|")?;
        row(f, "a dry run took", &self.took)?;
        row(f, "guest's longest pause, undisturbed", &self.undisturbed)?;
        row(f, "guest's longest pause, dry run", &self.pauses)?;
        row(f, "guest's longest pause, run killed", &self.pauses_killed)?;
        if let Some((pause, kind)) = self.worst {
            writeln!(
                f,
                "{} of {} dry runs met every limit; the longest pause, {pause:?}, was in one of the kind: {kind}.",
                self.met,
                self.pauses.len()
            )?;
        }
        write!(f, "guest stopped: 0 times. Settings, descriptors, threads and sockets of QEMU's and ours: as before.")
    }
}

/// The kinds of runs, in turn: capped; over a line; multifd; multifd with zstd; XBZRLE; three limits.
fn plan(turn: usize) -> (&'static str, Plan) {
    let over = |mib: u64| Plan { link: Some(BytesPerSecond(mib << 20)), ..Plan::new(Bandwidth::Unlimited) };
    let ms = Duration::from_millis;
    let (kind, plan) = match turn % 6 {
        0 => ("capped", capped(100)),
        1 => ("over a line", over(100)),
        2 => ("8 channels", Plan { channels: 8, ..over(150) }),
        3 => ("8 channels, zstd", Plan { channels: 8, compression: Compression::Zstd, ..over(20) }),
        4 => (
            "XBZRLE",
            Plan { compression: Compression::Xbzrle, allow: Allow { xbzrle: true, ..Allow::default() }, ..capped(100) },
        ),
        _ => ("three limits", Plan { downtime_limits: vec![ms(1000), ms(300), ms(100)], ..capped(200) }),
    };
    (kind, Plan { deadline: Duration::from_secs(10), ..plan })
}

/// What must be the same after a run as before it.
#[derive(Debug, PartialEq)]
pub struct Belongings {
    capabilities: Value,
    parameters: Value,
    qemu_descriptors: usize,
    qemu_threads: usize,
    our_descriptors: usize,
    our_threads: usize,
}

impl Belongings {
    /// As they are now.
    pub async fn of(vm: &mut Vm) -> Result<Self> {
        let count = |pid: &str, what: &str| Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{pid}/{what}"))?.count());
        let qemu = vm.pid().to_string();
        Ok(Self {
            capabilities: vm.lab().execute("query-migrate-capabilities", Value::Null).await?,
            parameters: vm.lab().execute("query-migrate-parameters", Value::Null).await?,
            qemu_descriptors: count(&qemu, "fd")?,
            qemu_threads: count(&qemu, "task")?,
            our_descriptors: count("self", "fd")?,
            our_threads: count("self", "task")?,
        })
    }

    /// Are they the same, at the latest in a second? The kernel takes its time with threads.
    pub async fn unchanged(&self, vm: &mut Vm) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            let now = Self::of(vm).await?;
            if *self == now {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "before: {self:?}\nafter: {now:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The guest runs, nothing migrates, and it was not stopped since the last look.
pub async fn never_stopped(vm: &mut Vm) -> Result<()> {
    while let Some(event) = vm.lab().next_event(tokio::time::Instant::now()).await? {
        ensure!(!matches!(event.name.as_str(), "STOP" | "RESUME" | "SUSPEND"), "the guest was stopped: {event:?}");
    }
    ensure!(vm::status(vm.lab()).await?.running, "the guest does not run");
    Ok(())
}

/// The guest that is dry-run: 40 random pages per ms into 64 MiB.
pub async fn guest() -> Result<(Vm, Pulse)> {
    let mut vm = Vm::start(VmSpec::new(GuestSpec::uniform(16_384, 40))).await?;
    let pulse = Pulse::of(&mut vm).await?;
    Ok((vm, pulse))
}

/// At so many MiB/s.
pub fn capped(mib: u64) -> Plan {
    Plan::new(Bandwidth::Capped(BytesPerSecond(mib << 20)))
}

/// One dry run of this VM, over the product's own monitor.
pub async fn dry_run(vm: &Vm, plan: &Plan) -> std::result::Result<Report, DryRunError> {
    dryrun::run(product_monitor(vm).await?, plan, |_| (), pending()).await
}

/// The product's own monitor of this VM.
pub async fn product_monitor(vm: &Vm) -> std::result::Result<Monitor, QmpError> {
    Monitor::connect(&vm.qmp().to_owned().into(), Duration::from_secs(5)).await
}

/// So many dry runs of one guest, each beside an undisturbed stretch of the same length.
pub async fn runs(count: usize, summary: &mut Summary, mut tell: impl FnMut(usize)) -> Result<()> {
    let (mut vm, pulse) = guest().await?;
    // The first of each kind starts threads and allocates what stays.
    let mut before = None;
    for turn in 0..count {
        let (kind, plan) = plan(turn);
        pulse.reset()?;
        let began = Instant::now();
        let report = dry_run(&vm, &plan).await.with_context(|| format!("run {turn}, {plan:?}"))?;
        let took = began.elapsed();
        let pause = pulse.longest()?;
        summary.pauses.push(pause);
        summary.worst = summary.worst.max(Some((pause, kind)));
        summary.met += usize::from(report.end == End::Met);
        never_stopped(&mut vm).await.with_context(|| format!("run {turn}, {plan:?}"))?;
        match &before {
            None => before = Some(Belongings::of(&mut vm).await?),
            Some(before) => before.unchanged(&mut vm).await.with_context(|| format!("run {turn}, {plan:?}"))?,
        }
        pulse.reset()?;
        sleep(took).await;
        summary.undisturbed.push(pulse.longest()?);
        summary.took.push(took);
        tell(turn);
    }
    Ok(())
}

/// So many dry runs by the real program, killed at some moment each. `moment` says when, as a share of a run.
pub async fn kills(count: usize, summary: &mut Summary, mut moment: impl FnMut() -> f64) -> Result<()> {
    let (mut vm, pulse) = guest().await?;
    let state = tempfile::tempdir()?;
    let socket = vm.qmp().to_owned();
    // Once in peace: how long it takes, and what has to be there afterwards.
    let whole = Instant::now();
    ensure!(program(&vm, &socket, state.path(), "first")?.wait_success().await?, "the dry run in peace failed");
    let whole = whole.elapsed();
    let before = Belongings::of(&mut vm).await?;
    for kill in 0..count {
        pulse.reset()?;
        let began = Instant::now();
        let mut process = program(&vm, &socket, state.path(), &kill.to_string())?;
        sleep(whole.mul_f64(moment())).await;
        process.kill();
        // QEMU notices when it writes next: within a window of 100 ms.
        let deadline = Instant::now() + Duration::from_secs(5);
        while migration::query(vm.lab()).await?.status.is_some_and(migration::MigrationStatus::is_active) {
            ensure!(Instant::now() < deadline, "kill {kill}: the migration goes on without its sink");
            sleep(Duration::from_millis(10)).await;
        }
        let took = began.elapsed();
        summary.pauses_killed.push(pulse.longest()?);
        never_stopped(&mut vm).await.with_context(|| format!("kill {kill}"))?;
        // The next one works, and puts back what this one could not.
        let next = program(&vm, &socket, state.path(), &format!("{kill}-next"))?.wait_success().await?;
        ensure!(next, "the dry run after kill {kill} failed");
        never_stopped(&mut vm).await?;
        before.unchanged(&mut vm).await.with_context(|| format!("kill {kill}"))?;
        ensure!(std::fs::read_dir(state.path())?.count() == 0, "the journal of kill {kill} is still there");
        pulse.reset()?;
        sleep(took).await;
        summary.undisturbed.push(pulse.longest()?);
        summary.kills += 1;
    }
    Ok(())
}

fn program(vm: &Vm, socket: &Path, state: &Path, name: &str) -> Result<Running> {
    let mut command = dying_with_us(product::binary()?);
    command.args(["dry-run", "--bandwidth", "100Mi", "--downtime-limit", "1s", "--downtime-limit", "300ms", "--deadline", "30s"]);
    command.arg("--qmp").arg(socket).arg("--state-dir").arg(state);
    Ok(Running(Process::start("dry-run", command, vm.dir().join(format!("dry-run-{name}.log")))?))
}

struct Running(Process);

impl Running {
    fn kill(&mut self) {
        self.0.kill();
    }

    async fn wait_success(mut self) -> Result<bool> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.0.exited() {
                if !status.success() {
                    eprintln!("{}", self.0.log_tail(10));
                }
                return Ok(status.success());
            }
            ensure!(Instant::now() < deadline, "the dry run does not end: {}", self.0.log_tail(10));
            sleep(Duration::from_millis(20)).await;
        }
    }
}
