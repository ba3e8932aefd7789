//! Writes an answer into the status of its question: only this agent's fields, by server-side apply.
//!
//! In: a status. Out: written, or gone (the question is no more), or an error after a few attempts. Fields of other managers
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
use crate::api::{MigrationForecast, MigrationForecastStatus, names};

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

/// The body of the apply. `uid` makes it fail for an object of the same name that was made anew.
fn body((namespace, name): &Key, uid: &str, status: &MigrationForecastStatus) -> serde_json::Value {
    let mut status = status.clone();
    status.outcome = None;
    json!({
        "apiVersion": <MigrationForecast as kube::Resource>::api_version(&()),
        "kind": <MigrationForecast as kube::Resource>::kind(&()),
        "metadata": { "namespace": namespace, "name": name, "uid": uid },
        "status": status,
    })
}

/// Writes `status`, with a few attempts.
pub async fn publish(client: &Client, key: &Key, uid: &str, status: &MigrationForecastStatus) -> Result<Written, PublishError> {
    let (namespace, name) = key;
    let api: Api<MigrationForecast> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams::apply(names::AGENT).force();
    let patch = Patch::Apply(body(key, uid, status));
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
    use crate::api::forecast::Outcome;

    #[test]
    fn other_managers_fields_are_not_sent() {
        let status = MigrationForecastStatus {
            observed_generation: Some(3),
            outcome: Some(Outcome::default()),
            ..MigrationForecastStatus::default()
        };
        let sent = body(&("ns".to_owned(), "vm".to_owned()), "u", &status);
        assert_eq!(sent["status"], json!({ "observedGeneration": 3 }));
        assert_eq!(sent["apiVersion"], "migvisor.io/v1alpha1");
        assert_eq!(sent["metadata"]["uid"], "u");
    }
}
