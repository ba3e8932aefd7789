//! The command line: one file a subcommand.

use std::{
    io::{self, ErrorKind, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

pub mod agent;
pub mod collect;
pub mod controller;
pub mod crd;
pub mod dry_run;
pub mod host;
mod output;
pub mod plan;
pub mod predict;
mod question;
pub mod replay;

/// Exit codes of the commands that give a verdict.
pub mod exit {
    /// It converges.
    pub const CONVERGES: u8 = 0;
    /// Borderline, or it fails.
    pub const FAILS: u8 = 1;
    /// Something is wrong with the question or the machine.
    pub const ERROR: u8 = 2;
    /// The VM cannot be judged now.
    pub const UNKNOWN: u8 = 3;
}

/// Predicts whether a live migration will converge, before it starts.
#[derive(Debug, Parser)]
#[command(name = "migvisor", version, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look at a running QEMU and forecast its migration.
    Predict(predict::PredictArgs),
    /// Look at a running QEMU and record what was seen.
    Collect(collect::CollectArgs),
    /// Forecast from a recording.
    Replay(replay::ReplayArgs),
    /// Have a running QEMU execute a migration to nowhere, and count. The guest is not stopped.
    DryRun(dry_run::DryRunArgs),
    /// Plan which VMs of a cluster to move, in which order and how many at a time, from the forecasts there.
    Plan(plan::PlanArgs),
    /// Answer the questions about the VMs of one node; runs on each.
    Agent(agent::AgentArgs),
    /// Keep the questions, learn from outcomes, serve admission; runs in a few replicas.
    Controller(controller::ControllerArgs),
    /// Print the custom resources, for `kubectl apply -f -`.
    Crd,
}

impl Cli {
    /// Runs the command; errors go to standard error.
    pub async fn run(self) -> ExitCode {
        let result = match self.command {
            Command::Predict(args) => predict::run(args).await,
            Command::Collect(args) => collect::run(args).await,
            Command::Replay(args) => replay::run(&args),
            Command::DryRun(args) => Box::pin(dry_run::run(args)).await,
            Command::Plan(args) => Box::pin(plan::run(args)).await,
            Command::Agent(args) => Box::pin(agent::run(args)).await.map(|()| ExitCode::SUCCESS).map_err(Into::into),
            Command::Controller(args) => Box::pin(controller::run(args)).await.map(|()| ExitCode::SUCCESS).map_err(Into::into),
            Command::Crd => crd::run().map(|()| ExitCode::SUCCESS).map_err(Into::into),
        };
        result.unwrap_or_else(|error| {
            complain(&error);
            ExitCode::from(exit::ERROR)
        })
    }
}

/// An error and what caused it, on standard error; a closed one is nobody's problem.
fn complain(error: &anyhow::Error) {
    let mut message = format!("error: {error}");
    for cause in error.chain().skip(1) {
        // Errors that print their cause themselves need not say it twice.
        let cause = cause.to_string();
        if !message.contains(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    drop(writeln!(io::stderr(), "{message}"));
}

/// Prints to standard output. Whoever stops reading early (`| head`) has read enough.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
