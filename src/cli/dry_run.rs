//! `migvisor dry-run`: has a running QEMU execute a migration to nowhere, and tells what came of it.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    output::{self, Format},
    question::{TargetArgs, TermsArgs, downtime, duration},
};
use crate::{
    dryrun::{self, Allow, Compression, Plan, Progress, Reason},
    model::units::Bytes,
    qemu::{monitor::Monitor, ram::guest_ram_bytes},
};

/// How long the monitor may take to greet, and to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Arguments of `migvisor dry-run`.
#[derive(Debug, Args)]
pub struct DryRunArgs {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    terms: TermsArgs,
    /// QEMU's downtime-limit: 300ms, 1.5s. May be given several times: one run answers all; the verdict is about the first.
    #[arg(long = "downtime-limit", value_name = "DOWNTIME_LIMIT", default_value = "300ms", value_parser = downtime, help_heading = "Migration")]
    downtime_limits: Vec<Duration>,
    /// How pages are compressed.
    #[arg(long, value_enum, default_value_t, help_heading = "Migration")]
    compression: Compression,
    /// Connections of multifd, up to 255; 0: without. KubeVirt has 8, and none for VMs with CPU limits or CPUs of their own.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Migration")]
    channels: u8,
    /// Give up after this long, without an answer if need be.
    #[arg(long, default_value = "10m", value_parser = duration, help_heading = "Run")]
    deadline: Duration,
    /// Dry-run this VM though it has realtime threads.
    #[arg(long, help_heading = "Run")]
    allow_realtime: bool,
    /// Dry-run this VM though its CPUs are tied to CPUs of their own.
    #[arg(long, help_heading = "Run")]
    allow_dedicated_cpus: bool,
    /// Dry-run this VM though its memory is on huge pages.
    #[arg(long, help_heading = "Run")]
    allow_hugepages: bool,
    /// Where QEMU's settings are kept while they are borrowed: should this be killed, the next run puts them back.
    #[arg(long, value_name = "FOLDER", env = "MIGVISOR_STATE_DIR", default_value = "/run/migvisor", help_heading = "Run")]
    state_dir: PathBuf,
    /// How to print the forecast.
    #[arg(short, long, value_enum, default_value_t, help_heading = None)]
    output: Format,
}

/// Exit codes: 0 converges, 1 borderline or fails, 2 error, 3 unknown.
pub async fn run(args: DryRunArgs) -> anyhow::Result<ExitCode> {
    if args.deadline.is_zero() {
        bail!("--deadline 0 leaves no time for a dry run; its default is 10m");
    }
    let first = args.downtime_limits.first().copied().unwrap_or(Duration::from_millis(300));
    // A bad --host file is better found before anything is touched.
    args.terms.question(Bytes(1), first)?;
    let target = args.target.target()?;
    let mut monitor = Monitor::connect(&target.monitor, PATIENCE).await?;
    let question = args.terms.question(guest_ram_bytes(&mut monitor).await?, first)?;
    let plan = Plan {
        link: args.terms.line(&question),
        downtime_limits: args.downtime_limits,
        time_budget: question.time_budget,
        deadline: args.deadline,
        compression: args.compression,
        channels: args.channels,
        allow: Allow {
            realtime: args.allow_realtime,
            dedicated_cpus: args.allow_dedicated_cpus,
            hugepages: args.allow_hugepages,
            xbzrle: true,
        },
        pid: target.pid,
        journal: Some(args.state_dir),
        ..Plan::new(question.bandwidth)
    };
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(1) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("dry run {wide_bar} {msg} {elapsed}").unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let note = |progress: Progress| {
        bar.set_length(progress.total.0.max(1));
        bar.set_position(progress.total.0.saturating_sub(progress.remaining.0));
        bar.set_message(format!(
            "iteration {}, {} left, {}",
            progress.iteration,
            progress.remaining.human(),
            progress.rate.human()
        ));
    };
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let withdrawn = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Reason("interrupted".to_owned())
    };
    let result = dryrun::run(monitor, &plan, note, withdrawn).await;
    bar.finish_and_clear();
    match result {
        Ok(report) => output::dry_run(&report, &question, args.output),
        Err(why) if why.is_refusal() => output::no_dry_run(&why.to_string(), args.output),
        Err(error) => Err(error.into()),
    }
}
