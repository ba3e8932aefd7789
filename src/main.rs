//! `migvisor`: parse the command line, dispatch; nothing else.

use std::process::ExitCode;

use clap::Parser;
use migvisor::cli::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    Cli::parse().run().await
}
