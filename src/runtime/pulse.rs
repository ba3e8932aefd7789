//! Whether somebody holds a Lease and renews it, for those who rely on the holder and do not compete with it.
//!
//! In: a client, which Lease, how long a silence may last. Out: the first renewal, or the silence. Only `get` on that one Lease is needed, and
//! only while somebody asks. As in [`super::lease`] it is the change that counts, by our own clock: the times written in a Lease are
//! another clock's. A Lease without a holder was given back, which is no renewal.

use std::{fmt, time::Duration};

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};

use super::client::with_causes;

/// Holders renew every two seconds.
const EVERY: Duration = Duration::from_secs(2);

/// Nobody renewed the Lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Silence {
    lease: String,
    waited: Duration,
    why: String,
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nobody has renewed the Lease {} for {} s: {}", self.lease, self.waited.as_secs(), self.why)
    }
}

/// One Lease, followed from now on.
#[derive(Debug)]
pub struct Pulse {
    api: Api<Lease>,
    name: String,
    lease: String,
    patience: Duration,
    version: Option<String>,
    /// The last renewal; before the first one, when it was begun to listen.
    since: Instant,
    /// What was seen last, for people.
    why: String,
}

impl Pulse {
    /// Listens to this Lease; `patience` is the longest silence.
    pub fn of(client: Client, namespace: &str, name: &str, patience: Duration) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            lease: format!("{namespace}/{name}"),
            patience,
            version: None,
            since: Instant::now(),
            why: String::new(),
        }
    }

    /// Resolves at the first renewal.
    ///
    /// # Errors
    /// There was none within the patience.
    pub async fn renewed(&mut self) -> Result<(), Silence> {
        loop {
            if self.look().await {
                return Ok(());
            }
            if let Some(silence) = self.silence() {
                return Err(silence);
            }
            sleep(EVERY).await;
        }
    }

    /// Resolves once there has been no renewal for as long as the patience.
    pub async fn lost(&mut self) -> Silence {
        loop {
            self.look().await;
            if let Some(silence) = self.silence() {
                return silence;
            }
            sleep(EVERY).await;
        }
    }

    fn silence(&self) -> Option<Silence> {
        let waited = self.since.elapsed();
        (waited >= self.patience).then(|| Silence { lease: self.lease.clone(), waited, why: self.why.clone() })
    }

    /// Reads it once; true: it was renewed since the last look.
    async fn look(&mut self) -> bool {
        let left = self.patience.saturating_sub(self.since.elapsed()).max(EVERY);
        match timeout(left, Box::pin(self.api.get_opt(&self.name))).await {
            Ok(Ok(lease)) => self.note(lease.as_ref()),
            Ok(Err(error)) => {
                self.why = format!("it cannot be read ({})", with_causes(&error));
                false
            }
            Err(_) => {
                "the API server does not answer".clone_into(&mut self.why);
                false
            }
        }
    }

    fn note(&mut self, lease: Option<&Lease>) -> bool {
        let holder = lease.and_then(|lease| lease.spec.as_ref()?.holder_identity.as_deref()).filter(|holder| !holder.is_empty());
        self.why = match (lease, holder) {
            (None, _) => "there is no such Lease".to_owned(),
            (Some(_), None) => "nobody holds it".to_owned(),
            (Some(_), Some(holder)) => format!("its holder {holder} is silent"),
        };
        let version = lease.and_then(|lease| lease.metadata.resource_version.clone());
        // What is seen first may have been written long ago.
        let renewed = holder.is_some() && self.version.is_some() && version != self.version;
        if renewed {
            self.since = Instant::now();
        }
        self.version = version;
        renewed
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use axum::http::{Request, Response};
    use kube::client::Body;
    use serde_json::json;

    use super::*;

    fn lease(version: &str, holder: &str) -> Lease {
        let object = json!({ "metadata": { "name": "l", "resourceVersion": version }, "spec": { "holderIdentity": holder } });
        serde_json::from_value(object).unwrap()
    }

    fn pulse() -> Pulse {
        let nobody = tower::service_fn(async |_: Request<Body>| Err::<Response<Body>, _>("there is no server here"));
        Pulse::of(Client::new(nobody, "default"), "system", "l", Duration::from_secs(15))
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_is_another_version_with_a_holder() {
        let mut pulse = pulse();
        assert!(!pulse.note(None), "there is none");
        assert!(!pulse.note(Some(&lease("1", "a"))), "it may be years old");
        assert!(!pulse.note(Some(&lease("1", "a"))));
        tokio::time::advance(Duration::from_secs(14)).await;
        assert!(pulse.note(Some(&lease("2", "a"))));
        tokio::time::advance(Duration::from_secs(14)).await;
        assert_eq!(pulse.silence(), None);
        assert!(!pulse.note(Some(&lease("3", ""))), "given back");
        tokio::time::advance(Duration::from_secs(1)).await;
        let silence = pulse.silence().unwrap().to_string();
        assert!(silence.contains("system/l") && silence.contains("15 s") && silence.contains("nobody holds it"), "{silence}");
        assert!(pulse.note(Some(&lease("4", "b"))), "somebody else has it");
        assert_eq!(pulse.silence(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_both_waits() {
        let (mut one, mut other) = (pulse(), pulse());
        let began = Instant::now();
        let silence = one.renewed().await.unwrap_err().to_string();
        assert!(silence.contains("cannot be read"), "{silence}");
        other.lost().await;
        assert!((15..=18).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    }
}
