//! One dry run, from the guards to the clean-up. In: a monitor, a plan. Out: a report, or why there is none.
//!
//! The run owns its monitor and is a task of its own: whoever waits for it may go away at any time, and QEMU is still left as it was found.
//! Every way out leads through [`Borrowed::give_back`].

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep},
};

use super::{
    DryRunError, Meeting, Plan, Progress, Reason, Report, guards,
    journal::Journal,
    settings::{Loan, Settings},
    sink::Sink,
    watching::Watching,
};
use crate::qemu::{
    libvirt::LibvirtError,
    migration::{self, MigrationInfo},
    monitor::{Address, Monitor},
    qmp::QmpError,
};

/// How QEMU calls the sink's descriptor. One name for all runs: what a killed one left with QEMU is replaced by the next.
const DESCRIPTOR: &str = "migvisor-dry-run";
/// A cancelled migration ends within milliseconds; a stuck one must not keep us for ever.
const CANCEL_PATIENCE: Duration = Duration::from_secs(20);
const CANCEL_POLL: Duration = Duration::from_millis(5);
/// A monitor that was lost in mid-run is opened anew to put the settings back, so often and for so long; then they are left to the journal.
const ANEW_EVERY: Duration = Duration::from_millis(500);
const ANEW_FOR: Duration = Duration::from_secs(30);

/// Executes the plan. `progress` is told at most ten times a second; when `withdrawn` is ready, the run is cancelled. Ends with QEMU as it was
/// found, whatever happens; a run whose future is dropped does so in the background.
pub async fn run(
    monitor: Monitor,
    plan: &Plan,
    progress: impl Fn(Progress),
    withdrawn: impl Future<Output = Reason>,
) -> Result<Report, DryRunError> {
    plan.check()?;
    let (withdraw, orders) = oneshot::channel();
    let (news, mut heard) = watch::channel(Progress::default());
    let mut running = tokio::spawn(conduct(monitor, plan.clone(), news, orders));
    let mut withdraw = Some(withdraw);
    tokio::pin!(withdrawn);
    loop {
        tokio::select! {
            ended = &mut running => {
                // A task that panicked or was stopped with the runtime: its sink is closed, so QEMU has ended the migration.
                return ended.unwrap_or_else(|error| Err(DryRunError::Sink(std::io::Error::other(error))));
            }
            Ok(()) = heard.changed() => progress(*heard.borrow_and_update()),
            reason = &mut withdrawn, if withdraw.is_some() => {
                // Nobody listens any more where it has just ended.
                let _ = withdraw.take().map(|withdraw| withdraw.send(reason));
            }
        }
    }
}

/// Puts back what a run that was killed had borrowed and written down in this folder; says whether there was anything. To be called while no
/// migration is under way: a killed run's own has ended within the second.
pub async fn recover(monitor: &mut Monitor, journal: &Path, pid: Option<i32>) -> Result<bool, DryRunError> {
    let Some(journal) = pid.or(monitor.peer_pid()).and_then(|pid| Journal::of(journal, pid)) else { return Ok(false) };
    let Some(loan) = journal.left_behind() else { return Ok(false) };
    if let Some(status) = migration::query(monitor).await?.status.filter(|status| status.is_active()) {
        return Err(DryRunError::Migrating { status });
    }
    let left = loan.repay(monitor).await?;
    if !left.is_empty() {
        return Err(DryRunError::NotRestored { left: left.to_string(), why: String::new(), before: None });
    }
    journal.forget();
    tracing::info!("put back what a dry run that was killed had borrowed");
    Ok(true)
}

/// Why a run shall end: what was said, or that nobody waits any more.
pub(super) async fn order(orders: &mut oneshot::Receiver<Reason>) -> Reason {
    orders.await.unwrap_or_else(|_| Reason("nobody waits for it any more".to_owned()))
}

async fn conduct(
    mut monitor: Monitor,
    plan: Plan,
    news: watch::Sender<Progress>,
    mut orders: oneshot::Receiver<Reason>,
) -> Result<Report, DryRunError> {
    if let Some(journal) = plan.journal.as_deref() {
        recover(&mut monitor, journal, plan.pid).await?;
    }
    tokio::select! {
        biased;
        reason = order(&mut orders) => return Err(DryRunError::Withdrawn { reason }),
        checked = guards::check(&mut monitor, &plan) => checked?,
    }
    let mut borrowed = Borrowed::take(&mut monitor, &plan).await?;
    let result = borrowed.migrate(&mut monitor, &plan, &news, &mut orders).await;
    let given_back = match borrowed.give_back(&mut monitor).await {
        Err(DryRunError::Qmp(lost)) => {
            let (address, timeout) = monitor.opened_by();
            drop(monitor);
            borrowed.give_back_anew(&address, timeout, lost).await
        }
        given_back => given_back,
    };
    match (result, given_back) {
        (result, Ok(())) => result,
        // QEMU is gone, and its settings with it.
        (Err(before @ DryRunError::Qmp(_)), Err(DryRunError::Qmp(_))) => Err(before),
        (Err(before), Err(DryRunError::NotRestored { left, why, .. })) => {
            Err(DryRunError::NotRestored { left, why, before: Some(Box::new(before)) })
        }
        (_, Err(error)) => Err(error),
    }
}

/// QEMU's migration machinery while it is ours.
struct Borrowed {
    loan: Loan,
    journal: Option<Journal>,
    pid: Option<i32>,
    sink: Option<Sink>,
    /// `migrate` was sent, and when: from then on a migration may be ours.
    started: Option<Instant>,
}

impl Borrowed {
    /// Takes the settings down. Touches nothing yet.
    async fn take(monitor: &mut Monitor, plan: &Plan) -> Result<Self, DryRunError> {
        let pid = plan.pid.or(monitor.peer_pid());
        let journal = plan.journal.as_deref().zip(pid).and_then(|(folder, pid)| Journal::of(folder, pid));
        let loan = Loan::of(Settings::read(monitor).await?, plan)?;
        if let Some(journal) = &journal {
            journal.keep(&loan)?;
        }
        Ok(Self { loan, journal, pid, sink: None, started: None })
    }

    async fn migrate(
        &mut self,
        monitor: &mut Monitor,
        plan: &Plan,
        news: &watch::Sender<Progress>,
        orders: &mut oneshot::Receiver<Reason>,
    ) -> Result<Report, DryRunError> {
        self.loan.during.apply(monitor, &self.loan.before).await?;
        let set = Settings::read(monitor).await?;
        if !set.cannot_complete() {
            return Err(DryRunError::Lacks { capability: "switchover-ack".to_owned() });
        }
        let (sink, uri) = open_sink(monitor, plan).await?;
        let sink = &*self.sink.insert(sink);
        while monitor.next_event(Instant::now()).await?.is_some() {}
        let mut watching = Watching::new(plan, set.switchover_bandwidth());
        self.started = Some(Instant::now());
        migration::start(monitor, &uri).await?;
        // From here on QEMU lets nobody change capabilities, and before its first window of 100 ms has passed it completes nothing: what holds
        // now holds to the end.
        if !Settings::read(monitor).await?.cannot_complete() {
            return Err(DryRunError::Lacks { capability: "switchover-ack".to_owned() });
        }
        watching.watch(monitor, sink, news, orders).await
    }

    /// Ends the migration if it is ours, puts the settings back, and looks whether they are.
    async fn give_back(&mut self, monitor: &mut Monitor) -> Result<(), DryRunError> {
        let ended = self.end(monitor).await;
        // Only now: a cancelled migration is one that QEMU does not complain of.
        self.sink = None;
        // Whatever else went wrong, a closed sink ends it: try all the same.
        if let Err(error @ (DryRunError::Foreign { .. } | DryRunError::Qmp(QmpError::Closed { .. }))) = ended {
            return Err(error);
        }
        // Where `migrate` was refused the descriptor is still with QEMU.
        let _ = monitor.execute::<Value>("closefd", json!({ "fdname": DESCRIPTOR })).await;
        let (mut left, mut why) = (self.loan.outstanding(&self.loan.during), String::new());
        for _ in 0..2 {
            match self.loan.repay(monitor).await {
                Ok(outstanding) => left = outstanding,
                Err(error @ QmpError::Refused { .. }) => why = format!("; {error}"),
                Err(lost) => return Err(lost.into()),
            }
            if left.is_empty() {
                self.is_back();
                return Ok(());
            }
        }
        // Ours has ended. Where one is under way again, somebody was quicker than we, and QEMU lets nobody change capabilities meanwhile.
        if migration::query(monitor).await?.status.is_some_and(migration::MigrationStatus::is_active) {
            return Err(DryRunError::Foreign { unrestored: format!("; before the dry run it was: {left}") });
        }
        Err(DryRunError::NotRestored { left: left.to_string(), why, before: None })
    }

    fn is_back(&self) {
        if let Some(journal) = &self.journal {
            journal.forget();
        }
    }

    /// As [`Self::give_back`], over a new connection, where the old one was lost: cut by a daemon that hung for a while, or that was started
    /// anew. The sink is closed, so QEMU has ended our migration, or is about to.
    async fn give_back_anew(&mut self, address: &Address, timeout: Duration, lost: QmpError) -> Result<(), DryRunError> {
        let until = Instant::now() + ANEW_FOR;
        loop {
            let why = match self.repay_anew(address, timeout).await {
                Ok(left) if left.is_empty() => {
                    self.is_back();
                    return Ok(());
                }
                Ok(left) => return Err(DryRunError::NotRestored { left: left.to_string(), why: String::new(), before: None }),
                Err(error) if is_gone(&error) => return Err(lost.into()),
                Err(error) => error,
            };
            if Instant::now() >= until {
                let left = self.loan.outstanding(&self.loan.during).to_string();
                return Err(DryRunError::NotRestored { left, why: format!("; {why}"), before: None });
            }
            sleep(ANEW_EVERY).await;
        }
    }

    async fn repay_anew(&self, address: &Address, timeout: Duration) -> Result<Settings, DryRunError> {
        let mut monitor = Monitor::connect(address, timeout).await?;
        // Another QEMU by now has settings of its own.
        if monitor.peer_pid().zip(self.pid).is_some_and(|(now, then)| now != then) {
            return Err(QmpError::Closed { command: "query-migrate".to_owned() }.into());
        }
        if let Some(status) = migration::query(&mut monitor).await?.status.filter(|status| status.is_active()) {
            return Err(DryRunError::Migrating { status });
        }
        Ok(self.loan.repay(&mut monitor).await?)
    }

    /// Cancels what is ours and waits until QEMU is done with it.
    async fn end(&mut self, monitor: &mut Monitor) -> Result<(), DryRunError> {
        let Some(started) = self.started else { return Ok(()) };
        let deadline = Instant::now() + CANCEL_PATIENCE;
        let mut cancelled = false;
        loop {
            let info = migration::query(monitor).await?;
            if !info.status.is_some_and(migration::MigrationStatus::is_active) {
                return Ok(());
            }
            let hung_up = self.sink.as_ref().is_none_or(Sink::hung_up);
            if is_foreign(&info, started) {
                let left = self.loan.outstanding(&Settings::read(monitor).await?);
                let unrestored = if left.is_empty() { String::new() } else { format!("; before the dry run it was: {left}") };
                return Err(DryRunError::Foreign { unrestored });
            }
            // Where the sink has seen the end, QEMU ends it by itself; whatever comes next is not ours to cancel.
            if !cancelled && !hung_up {
                migration::cancel(monitor).await?;
                cancelled = true;
            }
            if Instant::now() >= deadline {
                let why = format!(
                    "; the migration does not end, its status is `{}`",
                    info.status.unwrap_or(migration::MigrationStatus::None)
                );
                return Err(DryRunError::NotRestored { left: String::new(), why, before: None });
            }
            sleep(CANCEL_POLL).await;
        }
    }
}

/// Nobody is there any more whom anything could be given back to.
fn is_gone(error: &DryRunError) -> bool {
    matches!(
        error,
        DryRunError::Qmp(
            QmpError::Connect { .. }
                | QmpError::Closed { .. }
                | QmpError::Libvirt(LibvirtError::NothingRuns | LibvirtError::NoDomain { .. })
        )
    )
}

/// An active migration that is younger than ours would be.
pub(super) fn is_foreign(info: &MigrationInfo, started: Instant) -> bool {
    /// QEMU's clock begins while `migrate` is under way; a slow answer makes its time less than ours.
    const TOLERANCE: Duration = Duration::from_secs(1);
    info.total().is_some_and(|age| age + TOLERANCE < started.elapsed())
}

async fn open_sink(monitor: &mut Monitor, plan: &Plan) -> Result<(Sink, String), DryRunError> {
    use std::os::fd::AsFd;
    // A descriptor needs no place that both can see, and dies with us.
    if plan.channels == 0 && monitor.passes_descriptors() {
        let (sink, theirs) = Sink::pair(plan.pace()).map_err(DryRunError::Sink)?;
        monitor.execute_with_fd::<Value>("getfd", json!({ "fdname": DESCRIPTOR }), theirs.as_fd()).await?;
        return Ok((sink, format!("fd:{DESCRIPTOR}")));
    }
    let here = Meeting { ours: std::env::temp_dir(), theirs: std::env::temp_dir() };
    let meeting = plan.meeting.as_ref().unwrap_or(&here);
    let peer = plan.pid.or(monitor.peer_pid());
    let (sink, socket) = Sink::listen(plan.pace(), meeting, 1 + usize::from(plan.channels), peer).map_err(DryRunError::Sink)?;
    Ok((sink, format!("unix:{}", socket.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_migration_younger_than_ours_is_somebody_elses() {
        let ago = |ms: u64| Instant::now().checked_sub(Duration::from_millis(ms)).unwrap_or_else(Instant::now);
        let age = |ms: u64| MigrationInfo { total_time: Some(ms), ..MigrationInfo::default() };
        assert!(!is_foreign(&age(4990), ago(5000)) && is_foreign(&age(300), ago(5000)));
        // QEMU may be slow to begin, and says nothing of one that has not.
        assert!(!is_foreign(&age(0), ago(900)) && !is_foreign(&MigrationInfo::default(), ago(5000)));
    }
}
