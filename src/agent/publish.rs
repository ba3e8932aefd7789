//! Writes into the status of a question: only this agent's fields, by server-side apply.
//!
//! In: an answer, how far a dry run is, how far a migration is. Out: written, or gone (the question is no more), or an error after a few
//! attempts. Each of the three has a field manager of its own, so that one is written without the others; fields of the manager
//! (`outcome`, `Ready`, `DataStale`) are not in what is sent, so the API server keeps them.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tracing::debug;

use super::vm::Key;
use crate::api::{
    MigrationForecast, MigrationForecastStatus,
    dry_run::DryRunStatus,
    migration::{InFlight, LastMigration},
    names,
};

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(10);

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is there.
    Done,
    /// The object was deleted, or deleted and made anew: nobody asks any more.
    Gone,
}

/// Why an answer could not be written.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The API server refused or failed.
    #[error("the API server did not take the answer: {0}")]
    Api(#[from] kube::Error),
    /// It did not reply.
    #[error("the API server did not reply within {} s", ATTEMPT.as_secs())]
    Timeout,
}

impl PublishError {
    /// Worth another attempt right away: overload, a conflict, a broken connection.
    fn passes(&self) -> bool {
        match self {
            Self::Timeout => true,
            Self::Api(kube::Error::Api(status)) => status.code == 409 || status.code == 429 || status.code >= 500,
            Self::Api(error) => !matches!(error, kube::Error::SerdeError(_) | kube::Error::BuildRequest(_)),
        }
    }
}

/// A part of the status that is written by itself.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// The answer.
    Answer(&'a MigrationForecastStatus),
    /// How far a dry run is, or what came of it.
    DryRun(&'a DryRunStatus),
    /// How far a migration is, and what became of the last one.
    Migration {
        /// `None`: none runs.
        in_flight: Option<&'a InFlight>,
        /// `None`: nothing is known of one.
        last: Option<&'a LastMigration>,
    },
}

impl Part<'_> {
    fn field_manager(self) -> &'static str {
        match self {
            Self::Answer(_) => names::AGENT,
            Self::DryRun(_) => names::AGENT_DRY_RUN,
            Self::Migration { .. } => names::AGENT_MIGRATION,
        }
    }

    /// Only this part's fields.
    fn status(self) -> MigrationForecastStatus {
        match self {
            Self::Answer(status) => {
                MigrationForecastStatus { outcome: None, dry_run: None, in_flight: None, last_migration: None, ..status.clone() }
            }
            Self::DryRun(run) => MigrationForecastStatus { dry_run: Some(run.clone()), ..MigrationForecastStatus::default() },
            Self::Migration { in_flight, last } => MigrationForecastStatus {
                in_flight: in_flight.cloned(),
                last_migration: last.cloned(),
                ..MigrationForecastStatus::default()
            },
        }
    }
}

/// The body of the apply. `uid` makes it fail for an object of the same name that was made anew.
fn body((namespace, name): &Key, uid: &str, part: Part<'_>) -> serde_json::Value {
    json!({
        "apiVersion": <MigrationForecast as kube::Resource>::api_version(&()),
        "kind": <MigrationForecast as kube::Resource>::kind(&()),
        "metadata": { "namespace": namespace, "name": name, "uid": uid },
        "status": part.status(),
    })
}

/// Writes a part, with a few attempts.
pub async fn publish(client: &Client, key: &Key, uid: &str, part: Part<'_>) -> Result<Written, PublishError> {
    let (namespace, name) = key;
    let api: Api<MigrationForecast> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams::apply(part.field_manager()).force();
    let patch = Patch::Apply(body(key, uid, part));
    let attempt = || async {
        match tokio::time::timeout(ATTEMPT, api.patch_status(name, &params, &patch)).await {
            Err(_) => Err(PublishError::Timeout),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 || made_anew(&status) => Ok(Written::Gone),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(_)) => Ok(Written::Done),
        }
    };
    let pauses = ExponentialBuilder::default().with_min_delay(Duration::from_millis(100)).with_max_times(3).with_jitter();
    attempt
        .retry(pauses)
        .when(PublishError::passes)
        .notify(|error, pause| debug!(namespace, name, %error, ?pause, "writing again"))
        .await
}

/// A conflict about the UID, not about fields or versions.
fn made_anew(status: &kube::core::Status) -> bool {
    status.code == 409 && status.message.contains("UID")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::api::migration::Outcome;

    #[test]
    fn other_managers_fields_are_not_sent() {
        let status = MigrationForecastStatus {
            observed_generation: Some(3),
            outcome: Some(Outcome::default()),
            ..MigrationForecastStatus::default()
        };
        let sent = body(&("ns".to_owned(), "vm".to_owned()), "u", Part::Answer(&status));
        assert_eq!(sent["status"], json!({ "observedGeneration": 3 }));
        assert_eq!(sent["apiVersion"], "migvisor.io/v1alpha1");
        assert_eq!(sent["metadata"]["uid"], "u");
    }
}
