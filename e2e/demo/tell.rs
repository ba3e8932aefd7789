//! How the demonstration speaks: chapters, sentences, and commands with what they print.

use std::{sync::OnceLock, time::Instant};

use anyhow::Result;
use migvisor_e2e::{cluster::Output, world::World};

/// A heading, with the time since the start.
pub(crate) fn chapter(title: &str) {
    static START: OnceLock<Instant> = OnceLock::new();
    let seconds = START.get_or_init(Instant::now).elapsed().as_secs();
    println!("\n── {title} {:─>width$} {seconds:>3} s", "", width = 90_usize.saturating_sub(title.chars().count()));
}

/// A sentence or two.
pub(crate) fn say(text: &str) {
    println!("   {text}");
}

/// Runs kubectl and shows the command and what it said.
pub(crate) async fn command(world: &World, args: &[&str], stdin: &str) -> Result<Output> {
    let shown: Vec<String> = args
        .iter()
        .map(|arg| if arg.starts_with("go-template=") { "go-template=…".to_owned() } else { (*arg).to_owned() })
        .collect();
    println!("   $ kubectl {}{}", shown.join(" "), if stdin.is_empty() { "" } else { "   # a VirtualMachineInstanceMigration" });
    let output = world.plane().kubectl(args, stdin).await?;
    for line in output.stdout.lines().chain(output.stderr.lines()) {
        println!("     {}", folded(line));
    }
    Ok(output)
}

/// Long lines of prose at word ends; tables stay as they are.
fn folded(line: &str) -> String {
    let prose = line.starts_with("Error from server") || line.starts_with("Warning");
    let (mut text, mut width) = (String::new(), 0);
    for word in line.split_inclusive(' ') {
        if prose && width + word.len() > 110 {
            text.push_str("\n       ");
            width = 0;
        }
        text.push_str(word);
        width += word.len();
    }
    text
}
