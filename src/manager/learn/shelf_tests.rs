//! What is found in the ConfigMap, and what is put there: nothing that somebody has written is lost.
#![allow(clippy::unwrap_used)]

use super::*;

fn map(data: &Value) -> ConfigMap {
    serde_json::from_value(json!({ "metadata": { "name": NAME, "resourceVersion": "7" }, "data": data })).unwrap()
}

#[test]
fn a_book_is_read_and_an_absent_one_is_empty() {
    let mut book = Book::default();
    let text = book.text(MOST).unwrap();
    for data in [json!(null), json!({}), json!({ KEY: "" }), json!({ KEY: " \n" }), json!({ KEY: text })] {
        let (shelf, found, why) = Shelf::read(&map(&data));
        assert!(why.is_none() && found == book && !shelf.is_to_be_mended(), "{data}");
        assert_eq!(shelf.has(&text), data[KEY] == text.as_str(), "{data}");
    }
    let (shelf, ..) = Shelf::read(&map(&json!({ KEY: text })));
    let patch = shelf.patch("new");
    assert_eq!(patch, json!({ "metadata": { "resourceVersion": "7" }, "data": { KEY: "new" } }), "other keys stay");
}

#[test]
fn what_cannot_be_read_is_kept_under_another_key() {
    let data = json!({ KEY: "{\"format\": 9}", "notes": "mine" });
    let (shelf, book, why) = Shelf::read(&map(&data));
    assert!(why.unwrap().to_string().contains("its format is 9"));
    assert!(book == Book::default() && shelf.is_to_be_mended() && !shelf.has("{\"format\": 9}"));

    let mut after = serde_json::to_value(map(&data)).unwrap();
    json_patch::merge(&mut after, &shelf.patch("new"));
    let kept = after["data"].as_object().unwrap();
    assert_eq!((kept.len(), &kept[KEY], &kept["notes"]), (3, &json!("new"), &json!("mine")));
    let (key, old) = kept.iter().find(|(key, _)| key.starts_with("unreadable-")).unwrap();
    assert_eq!(old, "{\"format\": 9}");
    assert!(key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)), "{key} is no key of a ConfigMap");
}

#[test]
fn nothing_is_written_beyond_what_a_config_map_can_hold() {
    let room = |data: Value| Shelf::read(&map(&data)).0.room();
    assert_eq!(room(json!({})).unwrap(), MOST);
    assert_eq!(room(json!({ KEY: "x".repeat(MOST) })).unwrap(), MOST, "what cannot be read fits beside a full book");
    assert_eq!(room(json!({ "notes": "x".repeat(ROOM - 100_000) })).unwrap(), 100_000);
    let error = room(json!({ "notes": "x".repeat(ROOM - LEAST + 1) })).unwrap_err().to_string();
    assert!(error.contains("leaves no room: delete those"), "{error}");

    let blob = json!({ "metadata": {}, "binaryData": { "blob": "AAAA" } });
    assert_eq!(Shelf::read(&serde_json::from_value(blob).unwrap()).0.beside, 3);
}
