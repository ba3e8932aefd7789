//! `migvisor predict`: looks at a running QEMU and forecasts its migration.

use std::process::ExitCode;

use clap::Args;

use super::{
    collect::look,
    output::{self, Format},
    question::{LookArgs, QuestionArgs},
};
use crate::{
    collector::{CollectError, Observation},
    model::predict::forecast,
    qemu::{libvirt::LibvirtError, qmp::QmpError, vm::VmError},
};

/// Arguments of `migvisor predict`.
#[derive(Debug, Args)]
pub struct PredictArgs {
    #[command(flatten)]
    look: LookArgs,
    #[command(flatten)]
    question: QuestionArgs,
    /// How to print the forecast.
    #[arg(short, long, value_enum, default_value_t, help_heading = None)]
    output: Format,
}

/// Exit codes: 0 converges, 1 borderline or fails, 2 error, 3 unknown.
pub async fn run(args: PredictArgs) -> anyhow::Result<ExitCode> {
    // A bad --host file is better found now than after the look.
    args.question.question(crate::model::units::Bytes(1))?;
    match look(&args.look).await {
        Ok(observation) => answer(&observation, &args.question, args.output),
        Err(error) => match error.downcast_ref::<CollectError>() {
            Some(CollectError::Vm(why)) if cannot_be_judged(why) => output::unknown(&why.to_string(), args.output),
            Some(CollectError::Qmp(QmpError::Libvirt(why @ LibvirtError::Locked))) => {
                output::unknown(&why.to_string(), args.output)
            }
            _ => Err(error),
        },
    }
}

/// Forecasts from what was seen.
pub(super) fn answer(observation: &Observation, question: &QuestionArgs, format: Format) -> anyhow::Result<ExitCode> {
    let question = question.question(observation.ram)?;
    output::forecast(&forecast(&observation.pattern()?, &question), &question, format)
}

/// Nothing is wrong with the question; this VM has no answer now.
fn cannot_be_judged(why: &VmError) -> bool {
    use VmError::{Ended, Incoming, MeasurementBusy, Migrating, Qmp, RamUnclear};
    let locked = matches!(why, Qmp(QmpError::Libvirt(LibvirtError::Locked)));
    locked || matches!(why, Migrating { .. } | Incoming | Ended { .. } | RamUnclear { .. } | MeasurementBusy { .. })
}
