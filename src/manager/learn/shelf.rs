//! Keeps what was learned in the ConfigMap `migvisor-learned`, so that it outlives the leader.
//!
//! In: the book, as it changes. Out: the book as it was kept; a write at most once a minute, and only of what is new. Whoever
//! else writes there is not overwritten: a write is on the version that was read, and on another one everything is read again and
//! learned anew what that did not have. Nor is anything learned twice: a write that nobody answered may have been taken. What cannot be
//! read is told of, and kept under a key of its own.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta, jiff::Timestamp};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::{Instant, interval, timeout};
use tracing::{debug, info, warn};

use crate::{
    api::{fingerprint, names},
    manager::{Manager, apply::PATIENCE, observe::Notice},
    model::learn::{Book, BookError},
};

/// The ConfigMap, in the controllers' namespace.
const NAME: &str = "migvisor-learned";
/// Where in it the book is.
const KEY: &str = "learned.json";

/// News are looked for this often.
const LOOK: Duration = Duration::from_secs(5);
/// Between two writes; and after an error.
const PAUSE: Duration = Duration::from_secs(60);
/// Without news: what is old is forgotten.
const TIDY: Duration = Duration::from_secs(3600);
/// At the end of the process.
const LEAVING: Duration = Duration::from_secs(2);

/// What a ConfigMap can hold, in bytes.
const ROOM: usize = 1 << 20;
/// The most that is kept: some two thousand pairs of nodes. Twice that fits, so that what cannot be read can be kept beside it.
const MOST: usize = 400 << 10;
/// With less room than this nothing is written.
const LEAST: usize = 64 << 10;

/// Why what was learned is not kept. It is tried again.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    /// The API server refused or failed.
    #[error("cannot {0} the ConfigMap {NAME}: {1}")]
    Api(&'static str, #[source] Box<kube::Error>),
    /// It did not answer.
    #[error("cannot {0} the ConfigMap {NAME}: the API server did not answer within {patience} s", patience = PATIENCE.as_secs())]
    Timeout(&'static str),
    /// Others keep too much there.
    #[error("the other keys of the ConfigMap {NAME} take {0} bytes, which leaves no room: delete those that nobody needs")]
    NoRoom(usize),
}

/// What is stored, as it was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shelf {
    version: Option<String>,
    text: String,
    /// Bytes under other keys.
    beside: usize,
    /// The text is no book: the key under which it will be kept.
    mended_as: Option<String>,
}

impl Shelf {
    /// What is there, and the book in it: an empty one where there is none, or none that can be read; then also why.
    pub(super) fn read(map: &ConfigMap) -> (Self, Book, Option<BookError>) {
        let text = map.data.as_ref().and_then(|data| data.get(KEY)).cloned().unwrap_or_default();
        let texts = map.data.iter().flatten().filter(|(key, _)| *key != KEY).map(|(_, text)| text.len());
        let blobs = map.binary_data.iter().flatten().map(|(_, blob)| blob.0.len());
        let (book, why) = match Book::read(&text) {
            Ok(book) => (book, None),
            Err(_) if text.trim().is_empty() => (Book::default(), None),
            Err(why) => (Book::default(), Some(why)),
        };
        let mended_as = why.is_some().then(|| format!("unreadable-{}", fingerprint::of(&text)));
        let shelf = Self { version: map.resource_version(), text, beside: texts.chain(blobs).sum(), mended_as };
        (shelf, book, why)
    }

    /// Is this what it says?
    pub(super) fn has(&self, text: &str) -> bool {
        self.text == text && self.mended_as.is_none()
    }

    /// There is something on it that cannot be read.
    pub(super) fn is_to_be_mended(&self) -> bool {
        self.mended_as.is_some()
    }

    /// How much a book may take, in bytes.
    fn room(&self) -> Result<usize, KeepError> {
        let kept = if self.mended_as.is_some() { self.text.len() } else { 0 };
        let taken = self.beside.saturating_add(kept);
        match ROOM.saturating_sub(taken).min(MOST) {
            room if room >= LEAST => Ok(room),
            _ => Err(KeepError::NoRoom(taken)),
        }
    }

    /// What puts this text there, on the version that was seen; all else stays.
    fn patch(&self, text: &str) -> Value {
        let mut data = BTreeMap::from([(KEY, text)]);
        if let Some(key) = &self.mended_as {
            data.insert(key, &self.text);
        }
        json!({ "metadata": { "resourceVersion": self.version }, "data": data })
    }
}

/// Reads and keeps, while we lead, for ever.
pub(in crate::manager) async fn run(client: &Client, namespace: &str, manager: &Manager) {
    let api = Api::namespaced(client.clone(), namespace);
    let mut tick = interval(LOOK);
    let (mut next, mut tidy) = (Instant::now(), Instant::now() + TIDY);
    loop {
        tick.tick().await;
        let now = Instant::now();
        if !(manager.is_leader)() || now < next || (now < tidy && !manager.ledger.has_news()) {
            continue;
        }
        tidy = now + TIDY;
        match manager.keep(&api).await {
            Ok(false) => {}
            Ok(true) => next = now + PAUSE,
            Err(error) => {
                warn!(%error, "what was learned from migrations is not kept; it is tried again after a pause");
                next = now + PAUSE;
            }
        }
    }
}

impl Manager {
    /// The last thing that a leader does.
    pub(in crate::manager) async fn keep_at_the_end(&self, client: &Client, namespace: &str) {
        let api = Api::namespaced(client.clone(), namespace);
        let has_news = self.ledger.has_news() && self.ledger.shelf().is_some();
        if has_news && !matches!(timeout(LEAVING, self.keep(&api)).await, Ok(Ok(_))) {
            warn!("what was learned from the last migrations is lost: the ConfigMap {NAME} could not be written");
        }
    }

    /// Reads what is kept, if that was not done yet; else keeps what is new. True: it was written.
    async fn keep(&self, api: &Api<ConfigMap>) -> Result<bool, KeepError> {
        let Some(stored) = self.ledger.shelf() else {
            self.read(api).await?;
            return Ok(false);
        };
        let Some((text, migrations)) = self.ledger.page(&stored, stored.room()?, now()) else {
            return Ok(false);
        };
        let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
        let result = timeout(PATIENCE, api.patch(NAME, &parameters, &Patch::Merge(stored.patch(&text)))).await;
        self.writer.count("learned", matches!(result, Ok(Ok(_))));
        match result {
            Ok(Ok(map)) => {
                debug!(bytes = text.len(), migrations, "what was learned is kept");
                self.ledger.kept(Shelf::read(&map).0, migrations);
                self.show();
                Ok(true)
            }
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_not_found() => {
                info!("somebody else has written the ConfigMap {NAME}, or deleted it; it is read again");
                self.ledger.lost();
                Ok(false)
            }
            Ok(Err(error)) => Err(KeepError::Api("write", Box::new(error))),
            Err(_) => Err(KeepError::Timeout("write")),
        }
    }

    /// Reads what is kept, and where nothing is makes the place for it: then rights that are missing show at once.
    async fn read(&self, api: &Api<ConfigMap>) -> Result<(), KeepError> {
        let found = match timeout(PATIENCE, api.get_opt(NAME)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return Err(KeepError::Api("read", Box::new(error))),
            Err(_) => return Err(KeepError::Timeout("read")),
        };
        let map = match found {
            Some(map) => map,
            None => match self.create(api).await? {
                Some(map) => map,
                None => return Ok(()),
            },
        };
        let (stored, book, why) = Shelf::read(&map);
        if let Some(why) = why {
            let key = stored.mended_as.clone().unwrap_or_default();
            let note = format!("{KEY} cannot be read: {why}. Migvisor begins to learn anew, and keeps what was there as {key}.");
            warn!(config_map = NAME, "{note}");
            self.metrics.unreadable_objects.with_label_values(&["ConfigMap"]).inc();
            self.writer.notify(&map.object_ref(&()), Notice { reason: "UnreadableLessons", warning: true, note }).await;
        }
        self.ledger.open(book, stored, now());
        self.show();
        Ok(())
    }

    /// `None`: there is one by now.
    async fn create(&self, api: &Api<ConfigMap>) -> Result<Option<ConfigMap>, KeepError> {
        let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
        let text = Book::default().text(MOST).unwrap_or_default();
        let map = ConfigMap { metadata, data: Some(BTreeMap::from([(KEY.to_owned(), text)])), ..ConfigMap::default() };
        let parameters = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
        let result = timeout(PATIENCE, api.create(&parameters, &map)).await;
        self.writer.count("learned", matches!(result, Ok(Ok(_))));
        match result {
            Ok(Ok(map)) => Ok(Some(map)),
            Ok(Err(kube::Error::Api(status))) if status.is_already_exists() => Ok(None),
            Ok(Err(error)) => Err(KeepError::Api("create", Box::new(error))),
            Err(_) => Err(KeepError::Timeout("create")),
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    u64::try_from(Timestamp::now().as_second()).unwrap_or_default()
}

#[cfg(test)]
#[path = "shelf_tests.rs"]
mod tests;
