//! One dry run, from the guards to the clean-up. In: a monitor, a plan. Out: a report, or why there is none.
//!
//! The run owns its monitor and is a task of its own: whoever waits for it may go away at any time, and QEMU is still left as it was found.
//! Every way out leads through [`Borrowed::give_back`].

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep},
};

use super::{
    DryRunError, Meeting, Plan, Progress, Reason, Report, guards, journal::Journal, settings::Settings, sink::Sink,
    watching::Watching,
};
use crate::qemu::{
    migration::{self, MigrationInfo},
    monitor::Monitor,
    qmp::QmpError,
};

/// How QEMU calls the sink's descriptor. One name for all runs: what a killed one left with QEMU is replaced by the next.
const DESCRIPTOR: &str = "migvisor-dry-run";
/// A cancelled migration ends within milliseconds; a stuck one must not keep us for ever.
const CANCEL_PATIENCE: Duration = Duration::from_secs(20);
const CANCEL_POLL: Duration = Duration::from_millis(5);

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
    tokio::select! {
        biased;
        reason = order(&mut orders) => return Err(DryRunError::Withdrawn { reason }),
        checked = guards::check(&mut monitor, &plan) => checked?,
    }
    let mut borrowed = Borrowed::take(&mut monitor, &plan).await?;
    let result = borrowed.migrate(&mut monitor, &plan, &news, &mut orders).await;
    match (result, borrowed.give_back(&mut monitor).await) {
        (result, Ok(())) => result,
        // What ended the run ended the monitor, too: nothing is left to be put back.
        (Err(before @ DryRunError::Qmp(QmpError::Closed { .. })), Err(_)) => Err(before),
        (_, Err(gone @ DryRunError::Qmp(QmpError::Closed { .. }))) => Err(gone),
        (Err(before), Err(DryRunError::NotRestored { left, why, .. })) => {
            Err(DryRunError::NotRestored { left, why, before: Some(Box::new(before)) })
        }
        (_, Err(error)) => Err(error),
    }
}

/// QEMU's migration machinery while it is ours.
struct Borrowed {
    before: Settings,
    during: Settings,
    journal: Option<Journal>,
    sink: Option<Sink>,
    /// `migrate` was sent, and when: from then on a migration may be ours.
    started: Option<Instant>,
}

impl Borrowed {
    /// Takes the settings down. Touches nothing yet, unless a run before us has left something to be put back.
    async fn take(monitor: &mut Monitor, plan: &Plan) -> Result<Self, DryRunError> {
        let pid = plan.pid.or(monitor.peer_pid());
        let journal = plan.journal.as_deref().zip(pid).and_then(|(folder, pid)| Journal::of(folder, pid));
        let mut before = Settings::read(monitor).await?;
        if let Some(left) = journal.as_ref().and_then(Journal::left_behind) {
            tracing::info!("putting back what a dry run that was killed had borrowed");
            left.apply(monitor, &before).await?;
            before = Settings::read(monitor).await?;
        }
        let during = before.of(plan)?;
        if let Some(journal) = &journal {
            journal.keep(&before)?;
        }
        Ok(Self { before, during, journal, sink: None, started: None })
    }

    async fn migrate(
        &mut self,
        monitor: &mut Monitor,
        plan: &Plan,
        news: &watch::Sender<Progress>,
        orders: &mut oneshot::Receiver<Reason>,
    ) -> Result<Report, DryRunError> {
        self.during.apply(monitor, &self.before).await?;
        // Nothing is started before QEMU itself has said that it cannot complete.
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
        watching.watch(monitor, sink, news, orders).await
    }

    /// Ends the migration if it is ours, puts the settings back, and looks whether they are.
    async fn give_back(&mut self, monitor: &mut Monitor) -> Result<(), DryRunError> {
        let ended = self.end(monitor).await;
        // Only now: a cancelled migration is one that QEMU does not complain of.
        self.sink = None;
        match ended {
            Err(error @ (DryRunError::Foreign { .. } | DryRunError::Qmp(QmpError::Closed { .. }))) => return Err(error),
            // Whatever went wrong, a closed sink ends it: try all the same.
            Ok(()) | Err(_) => {}
        }
        // Where `migrate` was refused the descriptor is still with QEMU.
        let _ = monitor.execute::<Value>("closefd", json!({ "fdname": DESCRIPTOR })).await;
        let mut why = String::new();
        for _ in 0..2 {
            let tried = async {
                let now = Settings::read(monitor).await?;
                self.before.apply(monitor, &now).await?;
                Settings::read(monitor).await
            };
            match tried.await {
                Ok(now) if self.before.differences(&now).is_empty() => {
                    if let Some(journal) = &self.journal {
                        journal.forget();
                    }
                    return Ok(());
                }
                Ok(now) => why = format!("; still different: {}", self.before.differences(&now).join(", ")),
                Err(QmpError::Closed { command }) => return Err(QmpError::Closed { command }.into()),
                Err(error) => why = format!("; {error}"),
            }
        }
        Err(DryRunError::NotRestored { left: self.before.differences(&self.during).join(", "), why, before: None })
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
                let unrestored = self.before.differences(&self.during).join(", ");
                return Err(DryRunError::Foreign { unrestored: format!(" (the dry run had changed {unrestored})") });
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

/// An active migration that is younger than ours would be.
pub(super) fn is_foreign(info: &MigrationInfo, started: Instant) -> bool {
    /// QEMU's clock begins while `migrate` is under way; a slow answer makes its time less than ours.
    const TOLERANCE: Duration = Duration::from_millis(1000);
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
