//! `migvisor replay`: forecasts from a recording of `migvisor collect`.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Args;

use super::{output::Format, predict::answer, question::QuestionArgs};
use crate::collector::Observation;

/// Arguments of `migvisor replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// A recording of `migvisor collect`.
    file: PathBuf,
    #[command(flatten)]
    question: QuestionArgs,
    /// How to print the forecast.
    #[arg(short, long, value_enum, default_value_t, help_heading = None)]
    output: Format,
}

/// Exit codes: 0 converges, 1 borderline or fails, 2 error.
pub fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let recording = || format!("{} is no recording of `migvisor collect`", args.file.display());
    let text = fs::read(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    let observation: Observation = serde_json::from_slice(&text).with_context(recording)?;
    observation.check().with_context(recording)?;
    answer(&observation, &args.question, args.output)
}
