//! A forecast for people (a table) and for programs (JSON or YAML with the keys of [`Forecast`]).

use std::{fmt::Write, process::ExitCode};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::exit;
use crate::{
    dryrun::{End, Limit, Report},
    model::{
        forecast::{Forecast, Method, Question, Verdict},
        units::{Bytes, BytesPerSecond},
    },
};

/// How a forecast is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
}

/// Writes a forecast, and says with the exit code how it came out.
pub(super) fn forecast(forecast: &Forecast, question: &Question, format: Format) -> anyhow::Result<ExitCode> {
    write(forecast, forecast.verdict, || table(forecast, question), format)
}

/// The keys of what a dry run adds to its forecast.
const DRY_RUN: [&str; 5] = ["limits", "zeroPages", "compressionRatio", "end", "elapsedMs"];

/// What a dry run adds to its forecast.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DryRun<'a> {
    #[serde(flatten)]
    forecast: &'a Forecast,
    limits: &'a [Limit],
    zero_pages: u64,
    compression_ratio: f64,
    end: End,
    elapsed_ms: f64,
}

/// Writes what a dry run says. `forecast` is that of the question's downtime limit; without one it is `Unknown`.
pub(super) fn dry_run(report: &Report, question: &Question, format: Format) -> anyhow::Result<ExitCode> {
    let limits = report.limits(question);
    let Some(forecast) = report.forecast(question) else {
        let why = format!(
            "the dry run ended after {}, at its deadline, with {} iterations done and no answer; give it a longer --deadline",
            time(report.elapsed.as_secs_f64() * 1e3),
            report.iterations
        );
        return no_dry_run(&why, format);
    };
    let answer = DryRun {
        forecast: &forecast,
        limits: &limits,
        zero_pages: report.zero_pages,
        compression_ratio: report.compression_ratio(),
        end: report.end,
        elapsed_ms: report.elapsed.as_secs_f64() * 1e3,
    };
    let page = || {
        let mut page = table(&forecast, question);
        for limit in &limits {
            let says = match (limit.converges, limit.downtime_ms, limit.total_ms, limit.iterations) {
                (Some(true), Some(down), Some(total), Some(iterations)) => {
                    format!("{} total, {} down, {iterations} iterations", time(total), time(down))
                }
                (None, ..) => "not known: the deadline came first".to_owned(),
                _ => "fails".to_owned(),
            };
            let _ = writeln!(page, "{:<22}{says}", format!("  limit {}", time(limit.downtime_limit_ms as f64)));
        }
        let _ = writeln!(page, "{:<22}{:.2}", "Compression ratio", answer.compression_ratio);
        page
    };
    write(&answer, forecast.verdict, page, format)
}

fn write(answer: &impl Serialize, verdict: Verdict, table: impl Fn() -> String, format: Format) -> anyhow::Result<ExitCode> {
    super::print(&match format {
        Format::Table => table(),
        Format::Json => serde_json::to_string_pretty(answer)? + "\n",
        Format::Yaml => serde_yaml::to_string(answer)?,
    })?;
    Ok(ExitCode::from(match verdict {
        Verdict::Converges => exit::CONVERGES,
        Verdict::Borderline | Verdict::Fails => exit::FAILS,
        Verdict::Unknown => exit::UNKNOWN,
    }))
}

/// Writes that there is no forecast, and why.
pub(super) fn unknown(why: &str, format: Format) -> anyhow::Result<ExitCode> {
    nothing(why, &[], format)
}

/// Writes that there is no dry run, and why.
pub(super) fn no_dry_run(why: &str, format: Format) -> anyhow::Result<ExitCode> {
    nothing(why, &DRY_RUN, format)
}

fn nothing(why: &str, more: &[&str], format: Format) -> anyhow::Result<ExitCode> {
    let value = without_numbers(why, more);
    super::print(&match format {
        Format::Table => format!("Verdict    Unknown: {why}\n"),
        Format::Json => serde_json::to_string_pretty(&value)? + "\n",
        Format::Yaml => serde_yaml::to_string(&value)?,
    })?;
    Ok(ExitCode::from(exit::UNKNOWN))
}

/// The keys of a forecast and these; there are no numbers to go with them.
fn without_numbers(why: &str, more: &[&str]) -> Map<String, Value> {
    let mut keys: Map<String, Value> = Forecast::KEYS.iter().chain(more).map(|key| ((*key).to_owned(), Value::Null)).collect();
    keys.insert("verdict".to_owned(), json!(Verdict::Unknown));
    keys.insert("message".to_owned(), json!(why));
    keys
}

/// `1.83 s`, `45 ms`.
fn time(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.0} ms") } else { format!("{:.2} s", ms / 1000.0) }
}

/// One forecast on a page.
fn table(f: &Forecast, question: &Question) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String, range: Option<String>| {
        let range = range.map(|range| format!("   {range}")).unwrap_or_default();
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<22}{value}{range}");
    };
    let between = |(low, high): (f64, f64)| Some(format!("({} – {})", time(low), time(high)));
    let verdict = match f.verdict {
        Verdict::Converges => "Converges",
        Verdict::Borderline if f.sla_exceeded => "Borderline: it converges, but not within the SLA",
        Verdict::Borderline => "Borderline: near the edge it is a toss of a coin",
        Verdict::Fails => "Fails",
        Verdict::Unknown => "Unknown",
    };
    row("Verdict", format!("{verdict} (probability {:.2})", f.probability), None);
    if f.low_confidence {
        row("", "low confidence: the look was shorter than the migration would be; use a longer --look".into(), None);
    }
    let method = match f.method {
        Method::PatternCollector => "PC (replay of the observed working-set pattern)",
        Method::DryRun => "DR (QEMU executed the pre-copy, to nowhere)",
    };
    row("Method", method.into(), None);
    let budget =
        question.time_budget.map_or_else(|| "no time budget".to_owned(), |b| format!("budget {}", time(b.as_secs_f64() * 1e3)));
    row("Bandwidth", format!("{}, downtime limit {:?}, {budget}", question.bandwidth.human(), question.downtime_limit), None);
    match f.downtime_ms {
        Some(downtime) => {
            row("Total time", time(f.total_ms), between(f.bounds.total_ms));
            row("Downtime", time(downtime), f.bounds.downtime_ms.and_then(between));
        }
        None => row("Total time", format!("would still be copying after {}", time(f.total_ms)), None),
    }
    row("Iterations", f.iterations.to_string(), Some(format!("({} – {})", f.bounds.iterations.0, f.bounds.iterations.1)));
    let (low, high) = f.bounds.dirtied_pages;
    row("Pages sent", f.dirtied_pages.to_string(), Some(format!("({low} – {high})")));
    row("On the wire", Bytes(f.transferred_bytes).human(), None);
    let lcb = f.least_convergent_bandwidth.map_or_else(
        || format!("none: not even the line's {} suffices", question.host.line_rate.human()),
        |rate| BytesPerSecond(rate).human(),
    );
    // A dry run tries one bandwidth.
    if f.method == Method::PatternCollector {
        row("Least bandwidth", lcb, None);
    }
    if let Some(cost) = f.cost {
        row("Cost", format!("{cost:.3}"), None);
    }
    for baseline in &f.baselines {
        let says = match baseline.downtime_ms {
            Some(downtime) => {
                format!("{} total, {} down, {} pages", time(baseline.total_ms), time(downtime), baseline.dirtied_pages)
            }
            None => "fails".into(),
        };
        row(&format!("  {} model says", baseline.name), says, None);
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    /// Whoever reads the JSON of a forecast, or of a dry run, finds the same keys where there is none.
    #[test]
    fn the_unknown_has_the_keys_of_what_is_known() {
        let forecast: Forecast = serde_json::from_value(json!({
            "verdict": "Fails", "probability": 0.0, "method": "DR", "iterations": 1, "convergenceMs": 1.0, "downtimeMs": null, "totalMs": 1.0,
            "dirtiedPages": 1, "transferredBytes": 1, "leastConvergentBandwidth": null, "cost": null, "pattern": null,
            "bounds": { "totalMs": [1.0, 1.0], "downtimeMs": null, "dirtiedPages": [1, 1], "iterations": [1, 1] }
        }))
        .unwrap();
        let dry_run =
            DryRun { forecast: &forecast, limits: &[], zero_pages: 0, compression_ratio: 1.0, end: End::Budget, elapsed_ms: 1.0 };
        for (known, more) in [(json!(forecast), &[][..]), (json!(dry_run), &DRY_RUN[..])] {
            let mut keys: BTreeSet<String> = known.as_object().unwrap().keys().cloned().collect();
            keys.insert("message".to_owned());
            let unknown = without_numbers("it is being migrated", more);
            assert_eq!(unknown.keys().cloned().collect::<BTreeSet<_>>(), keys);
            let told: BTreeSet<&str> =
                unknown.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key.as_str()).collect();
            assert_eq!(told, BTreeSet::from(["message", "verdict"]));
        }
    }
}
