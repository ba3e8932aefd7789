//! Faults that a real QEMU does not show: a server in this process speaks them. All else is tested on a real QEMU (e2e).
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use tokio::{io::AsyncWriteExt, net::UnixListener, task::JoinHandle};

use super::*;

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"\"}, \"capabilities\": [\"oob\"]}}\r\n";
const SHORT: Duration = Duration::from_millis(300);

/// A server that greets, acknowledges `qmp_capabilities`, waits for one more command and then says `lines` as they are.
struct Fake {
    dir: tempfile::TempDir,
    task: JoinHandle<()>,
}

impl Fake {
    fn start(first: &'static str, lines: Vec<Vec<u8>>, stay: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 4096];
            stream.write_all(first.as_bytes()).await.unwrap();
            if first == GREETING {
                let _ = stream.read(&mut buffer).await;
                stream.write_all(b"{\"return\": {}, \"id\": 1}\n").await.unwrap();
                let _ = stream.read(&mut buffer).await;
            }
            for line in lines {
                if stream.write_all(&line).await.is_err() {
                    return;
                }
            }
            if stay {
                std::future::pending::<()>().await;
            }
        });
        Self { dir, task }
    }

    async fn connect(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.dir.path().join("s"), SHORT).await
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What `execute("x")` gives when the server answers so.
async fn answer(lines: &[&str]) -> Result<Value, QmpError> {
    let fake = Fake::start(GREETING, lines.iter().map(|line| line.as_bytes().to_vec()).collect(), true);
    fake.connect().await?.execute("x", json!({})).await
}

#[tokio::test]
async fn a_socket_that_is_no_qmp() {
    for first in
        ["SSH-2.0-OpenSSH_9.2\r\n", "{\"hello\": 1}\n", "\u{1}\u{2}\n", "{\"QMP\": {\"version\": {\"qemu\": {\"major\": -1}}}}\n"]
    {
        let error = Fake::start(first, vec![], true).connect().await.unwrap_err();
        assert!(matches!(&error, QmpError::NotQmp { .. }), "{first}: {error:?}");
        assert!(error.to_string().contains("-qmp option"), "{error}");
    }
    assert!(matches!(Fake::start("", vec![], false).connect().await, Err(QmpError::NotQmp { .. })));
}

#[tokio::test]
async fn a_socket_that_stays_silent_is_taken_as_busy() {
    let error = Fake::start("", vec![], true).connect().await.unwrap_err();
    assert!(matches!(&error, QmpError::Busy { .. }), "{error:?}");
    assert!(error.to_string().contains("another client"), "{error}");
}

#[tokio::test]
async fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    let error = Qmp::connect(&dir.path().join("none"), SHORT).await.unwrap_err();
    assert!(matches!(&error, QmpError::Connect { .. }), "{error:?}");
}

#[tokio::test]
async fn answers_that_make_no_sense() {
    for line in [
        "garbage\n",
        "[]\n",
        "{}\n",
        "{\"return\": {}}\n",
        "{\"return\": {}, \"id\": 99}\n",
        "{\"return\": {}, \"id\": \"2\"}\n",
        "{\"event\": 3}\n",
    ] {
        let error = answer(&[line]).await.unwrap_err();
        assert!(matches!(&error, QmpError::Malformed { .. }), "{line}: {error:?}");
    }
    let deep = "[".repeat(100_000) + "\n";
    assert!(matches!(answer(&[&deep]).await, Err(QmpError::Malformed { .. })));
}

#[tokio::test]
async fn closed_in_mid_reply() {
    let fake = Fake::start(GREETING, vec![b"{\"return\": {\"half".to_vec()], false);
    let error = fake.connect().await.unwrap().execute::<Value>("x", json!({})).await.unwrap_err();
    assert!(matches!(&error, QmpError::Closed { .. }), "{error:?}");
}

#[tokio::test]
async fn hangs() {
    let error = answer(&["{\"return\": "]).await.unwrap_err();
    assert!(matches!(&error, QmpError::TimedOut { .. }), "{error:?}");
}

#[tokio::test]
async fn refused_in_qemus_words() {
    let error = answer(&["{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 2}\n"]).await.unwrap_err();
    assert!(matches!(&error, QmpError::Refused { description, .. } if description == "no"), "{error:?}");
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let fake = Fake::start(GREETING, vec![vec![b'x'; MAX_LINE + 2]], true);
    let mut qmp = fake.connect().await.unwrap();
    qmp.timeout = Duration::from_secs(20);
    let error = qmp.execute::<Value>("x", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("more than"), "{error}");
}

#[tokio::test]
async fn a_flood_of_events_keeps_the_latest_and_the_reply() {
    let mut lines: Vec<Vec<u8>> =
        (0..MAX_EVENTS + 10).map(|i| format!("{{\"event\": \"E\", \"data\": {i}}}\n").into_bytes()).collect();
    lines.push(b"{\"return\": 7, \"id\": 2}\n".to_vec());
    let fake = Fake::start(GREETING, lines, true);
    let mut qmp = fake.connect().await.unwrap();
    assert_eq!(qmp.execute::<u8>("x", json!({})).await.unwrap(), 7);
    assert_eq!(qmp.dropped_events(), 10);
    let now = Instant::now();
    assert_eq!(qmp.next_event(now).await.unwrap().unwrap().data, json!(10));
    for _ in 1..MAX_EVENTS {
        assert!(qmp.next_event(now).await.unwrap().is_some());
    }
    assert_eq!(qmp.next_event(Instant::now() + Duration::from_millis(20)).await.unwrap(), None);
}

#[tokio::test]
async fn a_flood_of_long_events_is_bounded_in_bytes() {
    // Each a third of what is kept: the last two stay, and one that is too long by itself does not.
    let long = |length: usize| format!("{{\"event\": \"E\", \"data\": \"{}\"}}\n", "x".repeat(length)).into_bytes();
    let mut lines: Vec<Vec<u8>> = (0..20).map(|_| long(MAX_EVENT_BYTES / 3)).collect();
    lines.push(b"{\"return\": 7, \"id\": 2}\n".to_vec());
    let fake = Fake::start(GREETING, lines, true);
    let mut qmp = fake.connect().await.unwrap();
    qmp.timeout = Duration::from_secs(20);
    assert_eq!(qmp.execute::<u8>("x", json!({})).await.unwrap(), 7);
    assert_eq!((qmp.events.len(), qmp.dropped_events()), (2, 18));
    assert!(qmp.event_bytes <= MAX_EVENT_BYTES && qmp.event_bytes > MAX_EVENT_BYTES / 2);
    for _ in 0..2 {
        assert!(qmp.next_event(Instant::now()).await.unwrap().is_some());
    }
    assert_eq!(qmp.event_bytes, 0);
    qmp.keep(
        MAX_EVENT_BYTES + 1,
        Event { name: "E".to_owned(), data: Value::Null, timestamp: crate::qemu::event::Timestamp::default() },
    );
    assert_eq!((qmp.events.len(), qmp.event_bytes), (0, 0));
}

#[tokio::test]
async fn a_reply_that_came_too_late_is_skipped() {
    // The first command is given up; its reply (id 2) comes before that of the second (id 3).
    let fake =
        Fake::start(GREETING, vec![b"{\"return\": \"old\", \"id\": 2}\n{\"return\": \"new\", \"id\": 3}\n".to_vec()], true);
    let mut qmp = fake.connect().await.unwrap();
    drop(tokio::time::timeout(Duration::ZERO, qmp.execute::<String>("a", json!({}))).await);
    assert_eq!(qmp.execute::<String>("b", json!({})).await.unwrap(), "new");
}

#[tokio::test]
async fn a_path_longer_than_a_socket_address() {
    let fake = Fake::start(GREETING, vec![], true);
    let deep = fake.dir.path().join("d".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    std::fs::rename(fake.dir.path().join("s"), deep.join("s")).unwrap();
    let qmp = Qmp::connect(&deep.join("s"), SHORT).await.unwrap();
    assert_eq!(qmp.version(), Version { major: 10, minor: 0, micro: 2 });
    assert_eq!(qmp.peer_pid(), i32::try_from(std::process::id()).ok());
}

proptest! {
    #[test]
    fn no_line_makes_the_parser_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_greeting(&line);
        let _ = read_message(&line);
        prop_assert!(excerpt(&line).is_ascii() || line.len() > 60);
    }
}
