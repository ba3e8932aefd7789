//! Pages that repeat what the code says, held to it: `docs/cli.md` and `docs/metrics.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, fmt::Write, fs, path::PathBuf};

use clap::{Command, CommandFactory};
use migvisor::{
    agent::metrics::AgentMetrics, cli::Cli, manager::ManagerMetrics, runtime::metrics::Metrics, webhook::AdmissionMetrics,
};
use prometheus::core::Collector;

fn page(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)
}

/// What `migvisor help SUBCOMMAND` prints, for each of them.
fn help() -> String {
    let mut text = String::from(
        "# Command line\n\nWhat `migvisor help` prints. Written by `MIGVISOR_GENERATE=1 cargo test --test docs`: change src/cli, not this \
         page.\n\nExit codes of `predict`, `replay` and `dry-run`: 0 converges, 1 borderline or fails, 2 error, 3 the VM cannot be judged now. Of \
         `plan`: 0 there is a plan, 1 there is none, 2 error. The other commands: 0, or 2 after an error.\n",
    );
    // The environment of whoever generates the page is nobody's business.
    let plain = |command: Command| command.mut_args(|arg| arg.hide_env_values(true)).term_width(120);
    let mut root = Cli::command();
    let names: Vec<String> = root.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    for name in &names {
        root = root.mut_subcommand(name, plain);
    }
    root.build();
    let mut section = |title: &str, command: &mut Command| {
        let help = command.render_long_help().to_string();
        let help: Vec<&str> = help.lines().map(str::trim_end).collect();
        write!(text, "\n## {title}\n\n```text\n{}\n```\n", help.join("\n").trim_end()).unwrap();
    };
    section("migvisor", &mut root);
    for name in &names {
        section(&format!("migvisor {name}"), root.find_subcommand_mut(name).unwrap());
    }
    text
}

#[test]
fn the_command_line_is_current() {
    let file = page("cli.md");
    if std::env::var_os("MIGVISOR_GENERATE").is_some() {
        fs::write(&file, help()).unwrap();
    }
    let stored = fs::read_to_string(&file).unwrap_or_default();
    assert!(stored == help(), "docs/cli.md is not what `migvisor help` prints: run `MIGVISOR_GENERATE=1 cargo test --test docs`");
}

/// Names without the suffixes of a histogram's parts.
fn names(text: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>();
    text.match_indices("migvisor_").map(|(at, _)| word(text.split_at(at).1)).collect()
}

/// All metrics of both daemons, those included that show only once something has happened.
fn metrics() -> BTreeSet<String> {
    let described = |collector: &dyn Collector| {
        collector.desc().iter().map(|desc| format!("migvisor_{}", desc.fq_name)).collect::<BTreeSet<_>>()
    };
    let registry = Metrics::new().unwrap();
    let agent = AgentMetrics::new(&registry).unwrap();
    agent.looks.with_label_values(&["ok"]).inc();
    agent.writes.with_label_values(&["ok"]).inc();
    agent.show(&migvisor::agent::watch::Questions::default(), &std::collections::BTreeMap::new(), std::time::Instant::now());
    let shown = registry.text().unwrap();
    let of_agent = shown.lines().filter_map(|line| line.strip_prefix("# TYPE ")).flat_map(names);
    of_agent.chain(described(&ManagerMetrics::new().unwrap())).chain(described(&AdmissionMetrics::new().unwrap())).collect()
}

#[test]
fn every_metric_is_explained() {
    let page = fs::read_to_string(page("metrics.md")).unwrap();
    let explained: BTreeSet<String> = page.lines().filter(|line| line.starts_with("| `")).flat_map(names).collect();
    assert_eq!(metrics(), explained, "left: the code, right: the tables of docs/metrics.md");
}
