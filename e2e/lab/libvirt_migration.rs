//! A real migration from one libvirt to another, as KubeVirt has it done. In: two launchers, a domain, the settings. Out: the truth, as
//! libvirt tells it.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use migvisor::model::units::{Bandwidth, Bytes};
use tokio::time::{Instant, sleep, timeout};

use super::{
    libvirt::Launcher,
    migrate::{Outcome, Settings, Truth},
};

/// Beyond the budget: to begin, to hand over, to take leave.
const BESIDES: Duration = Duration::from_secs(30);

/// Migrates. Afterwards the domain runs in `target` if that completed, else in `source`. libvirt counts whole milliseconds, from its own
/// beginning.
pub async fn migrate_domain(source: &Launcher, target: &Launcher, domain: &str, settings: Settings) -> Result<Truth> {
    ensure!(settings.link.is_none(), "between launchers there is no line but this machine's memory");
    let limit = settings.downtime_limit.as_millis().to_string();
    source.virsh(&["migrate-setmaxdowntime", domain, &limit]).await?;
    let (there, wire) = (target.uri(), format!("unix://{}", source.dir().join("migration").display()));
    let mut order = vec!["migrate", "--live", domain, &there, "--migrateuri", &wire];
    let cap = match settings.bandwidth {
        Bandwidth::Capped(rate) => Some((rate.0 >> 20).max(1).to_string()),
        Bandwidth::Unlimited => None,
    };
    if let Some(cap) = &cap {
        order.extend(["--bandwidth", cap]);
    }
    let began = Instant::now();
    let mut moving = Box::pin(timeout(settings.time_budget + BESIDES, source.virsh_for_long(&order)));
    let ended = tokio::select! {
        ended = &mut moving => Some(ended.context("the migration does not end")?),
        () = sleep(settings.time_budget) => None,
    };
    match ended {
        Some(Ok(_)) => truth(&target.virsh(&["domjobinfo", domain, "--completed", "--rawstats"]).await?, Outcome::Completed, None),
        Some(Err(error)) => failed(source, domain, &format!("{error:#}")).await,
        None => {
            let seen = source.virsh(&["domjobinfo", domain, "--rawstats"]).await;
            source.virsh(&["domjobabort", domain]).await?;
            match moving.await.context("the migration does not end after domjobabort")? {
                // It got through in the last moment.
                Ok(_) => {
                    truth(&target.virsh(&["domjobinfo", domain, "--completed", "--rawstats"]).await?, Outcome::Completed, None)
                }
                Err(_) => Ok(Truth { total_ms: ms(began.elapsed()), ..truth(&seen?, Outcome::TimedOut, None)? }),
            }
        }
    }
}

/// Somebody aborted it, or it went wrong: the domain has to run on where it was.
async fn failed(source: &Launcher, domain: &str, words: &str) -> Result<Truth> {
    let state = source.virsh(&["domstate", domain]).await.with_context(|| format!("after {words}"))?;
    ensure!(state.trim() == "running", "the domain is {} after {words}", state.trim());
    let seen = source.virsh(&["domjobinfo", domain, "--completed", "--anystats", "--rawstats"]).await?;
    truth(&seen, Outcome::Failed, Some(words.to_owned()))
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// From lines such as `memory_normal: 24064`.
fn truth(told: &str, status: Outcome, error: Option<String>) -> Result<Truth> {
    let pairs = told.lines().filter_map(|line| line.split_once(':'));
    let known: HashMap<&str, &str> = pairs.map(|(key, value)| (key.trim(), value.trim())).collect();
    let number = |key: &str| known.get(key).and_then(|value| value.parse::<u64>().ok());
    let (Some(total_ms), Some(pages)) = (number("time_elapsed"), number("memory_normal")) else {
        bail!("libvirt tells nothing of the migration: {told}")
    };
    Ok(Truth {
        status,
        total_ms,
        downtime_ms: number("downtime").filter(|_| status == Outcome::Completed),
        setup_ms: number("setup_time").unwrap_or(0),
        pages,
        zero_pages: number("memory_constant").unwrap_or(0),
        syncs: number("memory_iteration").unwrap_or(0),
        transferred: Bytes(number("memory_processed").unwrap_or(0)),
        // libvirt does not tell.
        downtime_bytes: Bytes(0),
        error,
    })
}
