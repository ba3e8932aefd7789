//! An orderly end in two phases: stop being ready, drain, stop.
//!
//! In: SIGTERM or SIGINT (or a [`Trigger`] in tests). Out: a [`Shutdown`] that everything long-running holds a clone of.
//! While `Draining`, readiness says no and no new work starts, but servers still answer: an API server that has not yet seen us
//! leave keeps getting admission answers. Then `Stopped`: servers close. A second signal skips the draining.

use std::{io, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};

/// How far the end of the process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// At work.
    Running,
    /// Not ready any more; what has begun is ended, nothing new begins.
    Draining,
    /// Close everything.
    Stopped,
}

/// Tells whoever holds it when the process ends. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<Phase>);

/// Ends a process by hand: what signals do, for tests and for callers with reasons of their own.
#[derive(Debug, Clone)]
pub struct Trigger(watch::Sender<Phase>);

impl Shutdown {
    /// A shutdown that only the [`Trigger`] (or its loss) sets off.
    pub fn manual() -> (Trigger, Self) {
        let (sender, receiver) = watch::channel(Phase::Running);
        (Trigger(sender), Self(receiver))
    }

    /// A shutdown that SIGTERM or SIGINT sets off, draining for so long; the trigger does the same from inside.
    /// Needs a tokio runtime. Fails where the kernel refuses a signal handler.
    pub fn on_signals(drain: Duration) -> io::Result<(Trigger, Self)> {
        let (trigger, shutdown) = Self::manual();
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let (ends, watched) = (trigger.clone(), shutdown.clone());
        tokio::spawn(async move {
            tokio::select! {
                name = either(&mut term, &mut int) => info!(signal = name, drain = ?drain, "ending: not ready any more, draining"),
                () = watched.draining() => {}
            }
            ends.drain();
            tokio::select! {
                () = tokio::time::sleep(drain) => {}
                name = either(&mut term, &mut int) => warn!(signal = name, "second signal: draining is cut short"),
                () = watched.stopped() => {}
            }
            ends.stop();
        });
        Ok((trigger, shutdown))
    }

    /// Where we are. A lost trigger counts as `Stopped`: nobody is left who could ever say so.
    pub fn phase(&self) -> Phase {
        if self.0.has_changed().is_err() { Phase::Stopped } else { *self.0.borrow() }
    }

    /// True while draining and after.
    pub fn is_ending(&self) -> bool {
        self.phase() != Phase::Running
    }

    /// Resolves once nothing new may begin.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Resolves once everything has to close.
    pub async fn stopped(&self) {
        self.reached(Phase::Stopped).await;
    }

    async fn reached(&self, phase: Phase) {
        // An error is a lost trigger: the end as well.
        let _ = self.0.clone().wait_for(|now| *now >= phase).await;
    }
}

impl Trigger {
    /// Enters `Draining`, unless further already.
    pub fn drain(&self) {
        self.at_least(Phase::Draining);
    }

    /// Enters `Stopped`.
    pub fn stop(&self) {
        self.at_least(Phase::Stopped);
    }

    fn at_least(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let further = *now < phase;
            *now = (*now).max(phase);
            further
        });
    }
}

async fn either(term: &mut Signal, int: &mut Signal) -> &'static str {
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_phases_never_backwards() {
        let (trigger, shutdown) = Shutdown::manual();
        assert_eq!(shutdown.phase(), Phase::Running);
        trigger.drain();
        shutdown.draining().await;
        assert_eq!(shutdown.phase(), Phase::Draining);
        trigger.stop();
        trigger.drain();
        shutdown.stopped().await;
        assert_eq!(shutdown.phase(), Phase::Stopped);
    }

    #[tokio::test]
    async fn a_lost_trigger_ends() {
        let (trigger, shutdown) = Shutdown::manual();
        drop(trigger);
        shutdown.stopped().await;
        assert_eq!(shutdown.phase(), Phase::Stopped);
    }
}
