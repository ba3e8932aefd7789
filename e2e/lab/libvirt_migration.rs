//! A real migration from one libvirt to another, as KubeVirt has it done. In: two launchers, a domain, the settings. Out: the truth, as
//! QEMU tells it, through libvirt: that counts from its own beginning, with the start of the target's QEMU.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migvisor::qemu::{
    libvirt::{LibvirtAddress, Socket},
    migration::{self, MigrationInfo, MigrationStatus},
    monitor::Monitor,
};
use tokio::time::{sleep, timeout};

use super::{
    libvirt::Launcher,
    migrate::{Outcome, Settings, Truth, truth},
};

/// Beyond the budget: to begin, to hand over, to take leave.
const BESIDES: Duration = Duration::from_secs(30);
/// Between two looks: libvirt ends the source some 20 ms after it is done.
const LOOK: Duration = Duration::from_millis(5);

/// Migrates. Afterwards the domain runs in `target` if that completed, else in `source`.
pub async fn migrate_domain(source: &Launcher, target: &Launcher, domain: &str, settings: Settings) -> Result<Truth> {
    ensure!(settings.link.is_none(), "between launchers there is no line but this machine's memory");
    let limit = settings.downtime_limit.as_millis().to_string();
    source.virsh(&["migrate-setmaxdowntime", domain, &limit]).await?;
    let (there, wire) = (target.uri(), format!("unix://{}", source.dir().join("migration").display()));
    let cap = settings.bandwidth.cap().map(|rate| (rate.0 >> 20).max(1).to_string());
    let mut order = vec!["migrate", "--live", domain, &there, "--migrateuri", &wire];
    if let Some(cap) = &cap {
        order.extend(["--bandwidth", cap]);
    }
    let socket = Socket::Named(vec![source.socket().to_owned()]);
    let address = LibvirtAddress { socket, domain: Some(domain.to_owned()), owner: None };
    let mut watching = Watching { monitor: Monitor::connect(&address.into(), Duration::from_secs(5)).await?, seen: None };

    let mut moving = std::pin::pin!(source.virsh_for_long(&order));
    let run = async {
        let mut in_time = true;
        loop {
            tokio::select! {
                biased;
                ended = &mut moving => return Ok::<_, anyhow::Error>((ended, in_time)),
                () = sleep(LOOK) => {}
            }
            if watching.look().await >= settings.time_budget && in_time {
                in_time = false;
                source.virsh(&["domjobabort", domain]).await?;
            }
        }
    };
    let (ended, in_time) = timeout(settings.time_budget + BESIDES, run).await.context("the migration does not end")??;
    let seen = watching.seen.context("nothing was seen of the migration");
    match ended {
        Ok(_) => {
            let seen = seen?;
            ensure!(seen.status == Some(MigrationStatus::Completed), "its last moment was not seen: {seen:?}");
            Ok(truth(&seen, Outcome::Completed))
        }
        Err(error) => {
            let state = source.virsh(&["domstate", domain]).await.with_context(|| format!("after {error:#}"))?;
            ensure!(state.trim() == "running", "the domain is {} after {error:#}", state.trim());
            let status = if in_time { Outcome::Failed } else { Outcome::TimedOut };
            Ok(Truth { error: Some(format!("{error:#}")), ..truth(&seen?, status) })
        }
    }
}

struct Watching {
    monitor: Monitor,
    /// QEMU's last word of this migration.
    seen: Option<MigrationInfo>,
}

impl Watching {
    /// How long it has taken so far, by QEMU's clock.
    async fn look(&mut self) -> Duration {
        // Between libvirt's own steps there are moments in which it passes nothing on.
        if let Ok(info) = migration::query(&mut self.monitor).await {
            let ours = info.status.is_some_and(MigrationStatus::is_active)
                || self.seen.is_some() && info.status == Some(MigrationStatus::Completed);
            if ours {
                self.seen = Some(info);
            }
        }
        self.seen.as_ref().and_then(MigrationInfo::total).unwrap_or_default()
    }
}
