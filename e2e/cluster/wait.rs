//! Waiting for what must come true, with a deadline and, when it does not, with everything a person needs to see.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::ControlPlane;

/// How often a condition is looked at.
const EVERY: Duration = Duration::from_millis(50);

/// Asks until the answer is `Some`. An error of the probe counts as "not yet"; the last one is told when the deadline is over.
/// A probe that hangs is given up at the deadline.
pub async fn wait_for<T>(what: &str, deadline: Duration, mut probe: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + deadline;
    let mut last = None;
    loop {
        match tokio::time::timeout_at(end.into(), probe()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => last = Some(error),
            Err(_) => last = last.or_else(|| Some(anyhow!("the last look did not come back"))),
        }
        if Instant::now() + EVERY >= end {
            let waited = format!("waited {deadline:?} for {what}, in vain");
            return Err(last.map_or_else(|| anyhow!(waited.clone()), |error| error.context(waited.clone())));
        }
        tokio::time::sleep(EVERY).await;
    }
}

impl ControlPlane {
    /// [`wait_for`], with the state of the namespace in the error.
    pub async fn wait<T>(
        &self,
        namespace: &str,
        what: &str,
        deadline: Duration,
        probe: impl AsyncFnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        match wait_for(what, deadline, probe).await {
            Ok(value) => Ok(value),
            Err(error) => {
                let state = self.dump(namespace).await;
                Err(error).context(state)
            }
        }
    }
}
