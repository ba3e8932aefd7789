//! What a person is told: what would happen, the bandwidth it needs, the ways out. One paragraph.

use super::{Action, HOPELESS, Input, Room, Stage, would_help};
use crate::{
    api::{
        MigrationForecastSpec,
        forecast::{BandwidthSource, BudgetEnd},
        remedy::{RemedyAnswer, RemedyType},
        scalar::Duration,
    },
    model::{
        forecast::{Forecast, Method, Verdict},
        units::{Bandwidth, Bytes, BytesPerSecond},
    },
};

/// The whole paragraph.
pub(super) fn compose(
    input: &Input<'_>,
    present: &MigrationForecastSpec,
    forecast: &Forecast,
    action: Action,
    remedy: Option<&RemedyAnswer>,
) -> String {
    let vm = input.vm;
    let total = Duration::from_ms(forecast.total_ms).human();
    let at = at_bandwidth(present);
    let forecasts = forecasts(forecast);
    let downtime =
        forecast.downtime_ms.map_or_else(String::new, |ms| format!(", the guest stopped for {}", Duration::from_ms(ms).human()));
    let what = match forecast.verdict {
        Verdict::Unknown => return format!("migvisor has no forecast for the live migration of {vm}."),
        Verdict::Converges => {
            return format!("{forecasts} that the live migration of {vm} {at} would take {total}{downtime}.");
        }
        Verdict::Borderline if forecast.sla_exceeded => {
            let sla = present.sla.unwrap_or_default();
            let limits: Vec<_> = [("total time", sla.total_time), ("downtime", sla.downtime)]
                .into_iter()
                .filter_map(|(what, limit)| limit.map(|limit| format!("a {what} of at most {}", limit.human())))
                .collect();
            format!(
                "{forecasts} that the live migration of {vm} would break its SLA: {at} it would take {total}{downtime}; wanted is {}",
                limits.join(" and ")
            )
        }
        Verdict::Borderline if forecast.method == Method::DryRun => {
            format!("{forecasts} that the live migration of {vm} may not converge: {at} it took {total}{downtime}")
        }
        Verdict::Borderline => format!(
            "{forecasts} that the live migration of {vm} may not converge: {at} it succeeds in {:.0} % of the replays of what the guest \
             writes, taking {total}{downtime}",
            forecast.probability * 100.0
        ),
        Verdict::Fails => failure(vm, &at, present, forecast),
    };
    let ways_out = ways_out(input, present, forecast, action).join("; ");
    format!("{what}. {}. {}Ways out: {ways_out}.", needs(forecast), done_about_it(input, present, action, remedy))
}

/// What migvisor does about it, where that is more than to say so.
fn done_about_it(input: &Input<'_>, present: &MigrationForecastSpec, action: Action, remedy: Option<&RemedyAnswer>) -> String {
    match (action, input.overridden) {
        (Action::Hold, _) if remedy.is_some() => {
            let took = remedy.and_then(|remedy| remedy.total_time);
            let took = took.map_or_else(String::new, |total| format!(", which is forecast to take {}", total.human()));
            format!("It is forced: this migration alone gets {}{took}. ", remedy.map(in_words).unwrap_or_default())
        }
        (Action::Hold, _) => {
            let deadline = input.policy.and_then(|policy| policy.spec.hold).unwrap_or_default().deadline;
            format!("It is held until a dry run has tried it out, for at most {}; nothing is sent meanwhile. ", deadline.human())
        }
        (Action::AllowWithWarning, Some(by)) => {
            let reason: String = by.spec.reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
            format!("The MigrationOverride {} lets it through ({}). ", name_of(by.metadata.name.as_ref()), reason.trim())
        }
        _ if input.stage == Stage::Admitted => why_undecided(input, present),
        _ => String::new(),
    }
}

/// Why what was held to be tried out goes on, or does not, without a result.
fn why_undecided(input: &Input<'_>, present: &MigrationForecastSpec) -> String {
    let run = input.forecast.and_then(|forecast| forecast.status.as_ref()?.dry_run.as_ref());
    match run.filter(|run| run.result.is_none() && run.is_over(&present.fingerprint(), input.now)) {
        Some(run) => format!("The dry run that it waited for came to nothing: {} ", in_a_sentence(&run.message)),
        None if input.room == Room::OutOfTime && would_help(input, present).is_some() => {
            "What would help it could not be applied in time. ".to_owned()
        }
        None if input.room == Room::OutOfTime => "It has waited for its dry run as long as it may. ".to_owned(),
        None => String::new(),
    }
}

/// Ends as a sentence does.
fn in_a_sentence(words: &str) -> String {
    format!("{}.", words.trim().trim_end_matches('.'))
}

/// What a remedy changes of KubeVirt's configuration.
pub(super) fn in_words(remedy: &RemedyAnswer) -> String {
    let per_gib = remedy.completion_timeout_per_gib;
    match remedy.kind {
        RemedyType::TimeBudget => format!("more time (completionTimeoutPerGiB {})", per_gib.unwrap_or_default()),
        RemedyType::AutoConverge => "a guest that is throttled (allowAutoConverge)".to_owned(),
        RemedyType::Bandwidth => {
            format!("more bandwidth (bandwidthPerMigration {})", remedy.bandwidth.as_ref().map_or("", |rate| rate.0.as_str()))
        }
        RemedyType::Downtime => {
            let limit = remedy.max_downtime.map(Duration::human).unwrap_or_default();
            format!("a longer downtime (maxDowntimeMs, {limit})")
        }
        RemedyType::PostCopy => match per_gib {
            Some(seconds) => format!("post-copy (allowPostCopy, after completionTimeoutPerGiB {seconds})"),
            None => "post-copy (allowPostCopy)".to_owned(),
        },
    }
}

/// Who says so, and what it rests on where that is more than the observed pattern.
fn forecasts(forecast: &Forecast) -> &'static str {
    match forecast.method {
        Method::PatternCollector => "migvisor forecasts",
        Method::DryRun => "migvisor forecasts after a dry run",
    }
}

fn failure(vm: &str, at: &str, present: &MigrationForecastSpec, forecast: &Forecast) -> String {
    let sure = if forecast.probability <= HOPELESS { "would fail" } else { "would very probably fail" };
    let forecasts = forecasts(forecast);
    let sent = Bytes(forecast.transferred_bytes).human();
    let memory =
        present.guest_memory.bytes().map_or_else(|_| String::new(), |memory| format!(" for {} of memory", memory.human()));
    let Some(budget) = present.time_budget else {
        return format!(
            "{forecasts} that the live migration of {vm} {sure}: {at} it would never end, because the guest dirties memory faster than \
             that carries it, and no time budget would stop it (completionTimeoutPerGiB is 0)"
        );
    };
    let end = match present.when_budget_ends {
        BudgetEnd::Abort => "KubeVirt would then abort it",
        BudgetEnd::PostCopy => "KubeVirt would then switch it to post-copy",
        BudgetEnd::Pause => "KubeVirt would then pause the guest to finish",
    };
    // A guest that is merely too large for the budget dirties nothing to speak of: it was not even copied once.
    let cause = if forecast.iterations > 1 { ", because the guest dirties memory faster than that carries it" } else { "" };
    format!(
        "{forecasts} that the live migration of {vm} {sure}: {at} it would still be copying when its time budget of {} is over, having \
         sent {sent}{memory}{cause}. {end}",
        budget.human()
    )
}

fn at_bandwidth(present: &MigrationForecastSpec) -> String {
    match present.bandwidth.bandwidth() {
        Ok(Bandwidth::Capped(rate)) => format!("at {}", rate.human()),
        _ => "without a bandwidth cap".to_owned(),
    }
}

fn needs(forecast: &Forecast) -> String {
    match forecast.least_convergent_bandwidth {
        Some(rate) => format!("It needs at least {}", BytesPerSecond(rate).human()),
        None => "No bandwidth that the line carries would make it converge".to_owned(),
    }
}

fn ways_out(input: &Input<'_>, present: &MigrationForecastSpec, forecast: &Forecast, action: Action) -> Vec<String> {
    let mut ways = Vec::new();
    // Where the line is the limit no cap is to be raised.
    let capped =
        present.bandwidth_source != BandwidthSource::Learned && matches!(present.bandwidth.bandwidth(), Ok(Bandwidth::Capped(_)));
    if let (Some(rate), true) = (forecast.least_convergent_bandwidth, capped) {
        let rate = whole_mebibytes(rate);
        ways.push(match (present.bandwidth_source, input.policy) {
            (BandwidthSource::PredictionPolicy, Some(policy)) => {
                format!(
                    "offer at least {rate} of bandwidth, and say so in the PredictionPolicy {}",
                    name_of(policy.metadata.name.as_ref())
                )
            }
            (BandwidthSource::MigrationPolicy, _) => {
                format!("raise bandwidthPerMigration of its MigrationPolicy to at least {rate}")
            }
            _ => format!("raise bandwidthPerMigration to at least {rate}"),
        });
    }
    // Time helps a guest that is too large, not one that dirties faster than the bandwidth carries.
    if forecast.verdict == Verdict::Fails && present.time_budget.is_some() && forecast.iterations <= 1 {
        ways.push("allow it more time (a larger completionTimeoutPerGiB)".to_owned());
    }
    if !forecast.sla_exceeded {
        match (present.when_budget_ends == BudgetEnd::PostCopy, present.auto_converge) {
            (false, false) => {
                ways.push("allow post-copy or the throttling of the guest (allowPostCopy, allowAutoConverge)".to_owned());
            }
            (false, true) => ways.push("allow post-copy (allowPostCopy)".to_owned()),
            (true, false) => ways.push("allow the throttling of the guest (allowAutoConverge)".to_owned()),
            (true, true) => {}
        }
    }
    ways.push("migrate when the guest writes less".to_owned());
    if action == Action::Deny {
        let (namespace, name) = input.vm.split_once('/').unwrap_or(("default", input.vm));
        ways.push(format!(
            "let it through all the same: echo '{{\"apiVersion\":\"migvisor.io/v1alpha1\",\"kind\":\"MigrationOverride\",\"metadata\":\
             {{\"generateName\":\"{name}-\"}},\"spec\":{{\"vmiName\":\"{name}\",\"reason\":\"WHY\"}}}}' | kubectl create -n {namespace} -f -"
        ));
    }
    ways
}

fn name_of(name: Option<&String>) -> &str {
    name.map_or("without a name", String::as_str)
}

/// KubeVirt rounds bandwidths to whole MiB: round up, so that what is advised suffices.
fn whole_mebibytes(rate: u64) -> String {
    format!("{}Mi", rate.div_ceil(1 << 20))
}
