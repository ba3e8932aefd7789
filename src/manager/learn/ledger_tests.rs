//! What a leader knows before and after it has read what is kept, and what becomes of lessons that somebody else's write crosses.
#![allow(clippy::unwrap_used)]

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};

use super::*;
use crate::model::units::BytesPerSecond;

const NOW: u64 = 1_800_000_000;
const ROOM: usize = 100_000;

fn rate(from: &str, mib: u64) -> Lesson {
    Lesson::Rate { from: from.into(), to: "node-z".into(), at: NOW, rate: BytesPerSecond(mib << 20) }
}

fn stored(version: &str, text: &str) -> (Shelf, Book) {
    let map: Value = json!({ "metadata": { "resourceVersion": version }, "data": { "learned.json": text } });
    let (shelf, book, why) = Shelf::read(&serde_json::from_value::<ConfigMap>(map).unwrap());
    assert!(why.is_none(), "{why:?}");
    (shelf, book)
}

fn line(ledger: &Ledger, node: &str) -> Option<String> {
    ledger.host(node, || None).and_then(|host| host.line_rate).map(|rate| rate.0)
}

#[test]
fn a_new_leader_asks_as_before_until_it_has_read_what_is_kept() {
    let ledger = Ledger::default();
    let before = HostConstants { line_rate: Some(BytesPerSecond(7 << 20).into()), ..HostConstants::default() };
    assert_eq!(ledger.host("node-a", || Some(before.clone())), Some(before.clone()));
    assert!(ledger.has_news() && ledger.shelf().is_none());

    // Learned before that was read: it counts, too.
    ledger.learn("m1", vec![rate("node-a", 100); 5]);
    assert_eq!(ledger.host("node-a", || Some(before.clone())), Some(before));
    let (shelf, book) = stored("1", "");
    ledger.open(book, shelf, NOW);
    assert_eq!((line(&ledger, "node-a").as_deref(), line(&ledger, "node-b")), (Some("100Mi"), None));
}

#[test]
fn what_is_new_is_kept_once() {
    let ledger = Ledger::default();
    let (shelf, book) = stored("1", "");
    ledger.open(book, shelf.clone(), NOW);
    assert!(!ledger.has_news());
    ledger.learn("m0", Vec::new());
    assert!(!ledger.has_news(), "what taught nothing");
    ledger.learn("m1", vec![rate("node-a", 100); 4]);
    ledger.learn("m2", vec![rate("node-a", 100)]);
    assert!(ledger.has_news());
    let (text, migrations) = ledger.page(&shelf, ROOM, NOW).unwrap();
    assert_eq!(migrations, 2);
    // Another lesson while that is being written.
    ledger.learn("m3", vec![rate("node-b", 100)]);
    let (written, _) = stored("2", &text);
    ledger.kept(written.clone(), migrations);
    assert!(ledger.has_news(), "the other lesson is not kept yet");
    let (text, migrations) = ledger.page(&written, ROOM, NOW).unwrap();
    assert_eq!(migrations, 1);
    let (written, book) = stored("3", &text);
    assert_eq!(book.pairs(), 2);
    ledger.kept(written.clone(), migrations);
    assert!(!ledger.has_news() && ledger.page(&written, ROOM, NOW).is_none());
}

#[test]
fn a_write_that_crossed_anothers_loses_nothing_of_either() {
    let ledger = Ledger::default();
    let (shelf, book) = stored("1", "");
    ledger.open(book, shelf, NOW);
    ledger.learn("m1", vec![rate("node-a", 100); 5]);

    let mut theirs = Book::default();
    theirs.learn_from("m2", &vec![rate("node-b", 200); 5]);
    theirs.settle(NOW);
    let (shelf, theirs) = stored("2", &theirs.text(ROOM).unwrap());
    ledger.lost();
    assert!(ledger.shelf().is_none() && ledger.has_news());
    assert_eq!(line(&ledger, "node-a"), None, "nothing has come into force yet");
    ledger.open(theirs, shelf.clone(), NOW);
    assert_eq!((line(&ledger, "node-a").as_deref(), line(&ledger, "node-b").as_deref()), (Some("100Mi"), Some("200Mi")));
    let (text, migrations) = ledger.page(&shelf, ROOM, NOW).unwrap();
    assert_eq!((migrations, stored("3", &text).1.pairs()), (1, 2));
}

/// The API server took it and its answer was lost: the next write is on a version that is no more, and everything is read again.
#[test]
fn a_write_that_was_not_answered_teaches_nothing_twice() {
    let ledger = Ledger::default();
    let (shelf, book) = stored("1", "");
    ledger.open(book, shelf.clone(), NOW);
    ledger.learn("m1", vec![rate("node-a", 100); 3]);
    let (text, _) = ledger.page(&shelf, ROOM, NOW).unwrap();
    // Meanwhile one more has ended; then the second write meets a conflict.
    ledger.learn("m2", vec![rate("node-a", 100)]);
    ledger.lost();
    let (shelf, book) = stored("2", &text);
    ledger.open(book, shelf.clone(), NOW);
    assert_eq!(line(&ledger, "node-a"), None, "four rates are too few; seven would not be");
    let (text, _) = ledger.page(&shelf, ROOM, NOW).unwrap();
    ledger.kept(stored("3", &text).0, 2);
    assert!(!ledger.has_news());
    ledger.learn("m3", vec![rate("node-a", 100)]);
    let (shelf, book) = stored("4", &text);
    ledger.open(book, shelf, NOW);
    assert_eq!(line(&ledger, "node-a").as_deref(), Some("100Mi"), "five");
}

#[test]
fn who_no_longer_leads_knows_nothing() {
    let ledger = Ledger::default();
    let (shelf, book) = stored("1", "");
    ledger.open(book, shelf.clone(), NOW);
    ledger.learn("m1", vec![rate("node-a", 100); 5]);
    let (_, migrations) = ledger.page(&shelf, ROOM, NOW).unwrap();
    ledger.clear();
    // The write that was under way comes back.
    ledger.kept(shelf, migrations);
    assert!(ledger.shelf().is_none());
    assert_eq!(line(&ledger, "node-a"), None);
}

#[test]
fn a_throttled_migration_is_remembered_a_while() {
    let ledger = Ledger::default();
    let in_flight = |uid: &str, throttle: Option<u64>| -> MigrationForecast {
        let object = json!({
            "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast", "metadata": { "name": "vm" },
            "spec": {
                "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited",
                "downtimeLimit": "300ms"
            },
            "status": {
                "inFlight": {
                    "migrationUID": uid, "iteration": 3, "remainingBytes": 1, "totalBytes": 2, "bytesPerSecond": 3,
                    "throttlePercent": throttle
                }
            }
        });
        serde_json::from_value(object).unwrap()
    };
    ledger.note(&in_flight("calm", None));
    ledger.note(&in_flight("wild", Some(20)));
    ledger.note(&in_flight("wild", Some(30)));
    assert!(ledger.was_throttled("wild") && !ledger.was_throttled("calm"));
    for other in 0..THROTTLED {
        ledger.note(&in_flight(&other.to_string(), Some(20)));
    }
    assert!(!ledger.was_throttled("wild"), "it is bounded");
}
