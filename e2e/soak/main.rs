//! `make soak`: 200 dry runs of a running guest, ten of them killed besides, and a table of what the guest felt.

use std::io::{IsTerminal, Write};

use anyhow::Result;
use migvisor_e2e::soak::{Summary, kills, runs};

const RUNS: usize = 200;
const KILLS: usize = 10;

#[tokio::main]
async fn main() -> Result<()> {
    let mut summary = Summary::default();
    let watched = std::io::stderr().is_terminal();
    let tell = |turn: usize| {
        if watched || (turn + 1).is_multiple_of(20) {
            let _ = writeln!(std::io::stderr(), "dry run {} of {RUNS}", turn + 1);
        }
    };
    let done = async {
        runs(RUNS, &mut summary, tell).await?;
        // Anywhere in a run: where exactly, the machine decides.
        let mut kill = 0;
        kills(KILLS, &mut summary, || {
            kill += 1;
            f64::from(kill) / (KILLS as f64 + 1.0)
        })
        .await
    }
    .await;
    done?;
    println!("{summary}");
    summary.check(migvisor_e2e::soak::TOLERATED)
}
