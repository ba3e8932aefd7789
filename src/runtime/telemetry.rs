//! Logs: structured, on stderr, as text for people or as JSON for machines.
//!
//! In: `--log-level` (or `RUST_LOG`) and `--log-format`. Out: the process-wide `tracing` subscriber.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, filter::ParseError, util::TryInitError};

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One readable line an event, coloured on a terminal.
    #[default]
    Text,
    /// One JSON object an event.
    Json,
}

/// The flags of every subcommand that logs.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LogArgs {
    /// What to log: a level, or directives such as `info,migvisor=debug`
    #[arg(long, env = "RUST_LOG", default_value = "info", value_name = "LEVEL")]
    pub log_level: String,
    /// How log lines look
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is no directive.
    #[error("`--log-level {level}` is not understood ({source}): write a level such as `info`, or `info,migvisor=debug`")]
    Level {
        /// What was given.
        level: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// A subscriber was there already.
    #[error("logging was set up twice: {0}")]
    Twice(#[from] TryInitError),
}

/// Sends the events of this process to stderr. Call it once, first.
pub fn init(args: &LogArgs) -> Result<(), TelemetryError> {
    let level = if args.log_level.trim().is_empty() { "info" } else { args.log_level.as_str() };
    // kube logs each failed request as an error of its own; whoever made the request says it better.
    let filter = EnvFilter::try_new(format!("kube_client::client::builder=off,{level}"))
        .map_err(|source| TelemetryError::Level { level: level.to_owned(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => {
            use tracing_subscriber::util::SubscriberInitExt;
            builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).finish().try_init()?;
        }
        LogFormat::Json => {
            use tracing_subscriber::util::SubscriberInitExt;
            builder.json().flatten_event(true).with_current_span(false).finish().try_init()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_wrong_level_says_what_to_write() {
        let args = LogArgs { log_level: "migvisor=loud".into(), log_format: LogFormat::Text };
        let error = init(&args).unwrap_err().to_string();
        assert!(error.contains("migvisor=loud") && error.contains("such as `info`"), "{error}");
    }
}
