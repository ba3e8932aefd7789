//! `migvisor collect`: looks at a running QEMU and records what was seen, for `migvisor replay`.

use std::{fs, io::IsTerminal, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::question::LookArgs;
use crate::collector::{Observation, Progress, observe};

/// Arguments of `migvisor collect`.
#[derive(Debug, Args)]
pub struct CollectArgs {
    #[command(flatten)]
    look: LookArgs,
    /// Where to write the recording (JSON). It holds page numbers and times, never contents.
    #[arg(short, long, value_name = "FILE", help_heading = None)]
    output: PathBuf,
}

/// Records one look.
pub async fn run(args: CollectArgs) -> anyhow::Result<ExitCode> {
    let observation = look(&args.look).await?;
    if fs::metadata(&args.output).is_ok_and(|found| !found.is_file()) {
        // A pipe or a device is written to, never replaced.
        let json = serde_json::to_vec(&observation)?;
        fs::write(&args.output, json).with_context(|| format!("cannot write the recording to {}", args.output.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    // Whole or not at all: a full disk must not leave half a recording under the name of a whole one.
    let mut partial = args.output.clone().into_os_string();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = serde_json::to_vec(&observation).map_err(Into::into).and_then(|json| {
        fs::write(&partial, json).and_then(|()| fs::rename(&partial, &args.output)).map_err(anyhow::Error::from)
    });
    if written.is_err() {
        // What is left of it is of no use; the error that counts is the one above.
        let _ = fs::remove_file(&partial);
    }
    written.with_context(|| format!("cannot write the recording to {}", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Looks, with a progress bar where somebody watches.
pub(super) async fn look(args: &LookArgs) -> anyhow::Result<Observation> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(1000) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("looking at the guest's memory {wide_bar} {percent}% {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.enable_steady_tick(Duration::from_millis(200));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 1000")]
    let note = |Progress(share): Progress| bar.set_position((share.clamp(0.0, 1.0) * 1000.0) as u64);
    let seen = observe(&args.target()?, &args.options()?, note).await;
    bar.finish_and_clear();
    Ok(seen?)
}
