//! Forecast beside outcome, with what simpler models say.

use migvisor::model::forecast::Forecast;
use migvisor_e2e::lab::{Outcome, Truth};

/// One line of the table.
struct Row {
    who: String,
    ends: &'static str,
    total_ms: Option<f64>,
    downtime_ms: Option<f64>,
    pages: u64,
    iterations: u64,
}

/// Prints what was forecast for a guest, what simpler models say, and what happened.
pub(crate) fn print(guest: &str, forecast: &Forecast, truth: &Truth) {
    let completed = truth.status == Outcome::Completed;
    let ends = |converges: bool| if converges { "converges" } else { "fails" };
    let real = Row {
        who: "what happened".into(),
        ends: ends(completed),
        total_ms: Some(truth.total_ms as f64),
        downtime_ms: truth.downtime_ms.map(|ms| ms as f64),
        pages: truth.pages,
        iterations: truth.syncs,
    };
    let mut rows = vec![Row {
        who: "MigVisor's forecast".into(),
        ends: ends(forecast.probability >= 0.5),
        total_ms: Some(forecast.total_ms),
        downtime_ms: forecast.downtime_ms,
        pages: forecast.dirtied_pages,
        iterations: forecast.iterations,
    }];
    rows.extend(forecast.baselines.iter().map(|baseline| Row {
        who: match baseline.name.as_str() {
            "classic" => "the paper's recurrence".into(),
            "base" => "constant dirty rate".into(),
            other => other.to_owned(),
        },
        ends: ends(baseline.converges),
        total_ms: Some(baseline.total_ms),
        downtime_ms: baseline.downtime_ms,
        pages: baseline.dirtied_pages,
        iterations: baseline.iterations,
    }));
    println!("\n     {guest:<24} {:<10} {:>17} {:>17} {:>19} {:>10}", "ends", "total", "downtime", "pages sent", "iterations");
    line(&real, None);
    for row in rows {
        line(&row, Some(&real));
    }
}

fn line(row: &Row, real: Option<&Row>) {
    let against = |value: f64, real: Option<f64>| match real {
        Some(real) if real > 0.0 => format!("{:+.0} %", (value / real - 1.0) * 100.0),
        _ => String::new(),
    };
    let time = |value: Option<f64>, real: Option<f64>| match value {
        None => "–".to_owned(),
        Some(ms) if ms < 1000.0 => format!("{ms:.0} ms {:>7}", against(ms, real)),
        Some(ms) => format!("{:.2} s {:>7}", ms / 1000.0, against(ms, real)),
    };
    let pages = format!("{} {:>7}", row.pages, against(row.pages as f64, real.map(|real| real.pages as f64)));
    println!(
        "     {:<24} {:<10} {:>17} {:>17} {:>19} {:>10}",
        row.who,
        row.ends,
        time(row.total_ms, real.and_then(|real| real.total_ms)),
        time(row.downtime_ms, real.and_then(|real| real.downtime_ms)),
        pages,
        row.iterations
    );
}
