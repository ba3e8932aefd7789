//! A QEMU that lies about itself: a server in this process says what no real one would. What real ones say: e2e.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
};

use super::super::{Observation, Target, observe};
use super::*;

const HALF_GIB: u64 = 512 << 20;

/// Everything that a look asks, answered as by a calm guest of 512 MiB, but for `lies`.
fn words(command: &str, lies: &Value) -> Value {
    let listing = "Block Name PSize Offset Used Total HVA RO\n pc.ram 4 KiB 0x0 0x20000000 0x20000000 0x00007f109be00000 rw\n";
    let measured = json!({"status": "measured", "sample-pages": 16384, "dirty-rate": 10, "mode": "page-sampling", "start-time": 7, "calc-time": 400});
    let honest = json!({
        "query-status": {"status": "running", "running": true}, "query-migrate": {}, "query-kvm": {"enabled": true, "present": true},
        "query-memory-size-summary": {"base-memory": HALF_GIB}, "query-memdev": [{"id": "pc.ram", "size": HALF_GIB}],
        "query-memory-devices": [], "human-monitor-command": listing, "query-dirty-rate": measured,
    });
    lies.get(command).or_else(|| honest.get(command)).cloned().unwrap_or_else(|| json!({}))
}

/// What comes of a look at a QEMU that tells these lies; it is this process, if anybody asks.
async fn look_at(lies: Value, source: SourceKind) -> Result<Observation, CollectError> {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (reader, mut writer) = stream.into_split();
        let greeting = json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}}});
        writer.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
        let mut commands = BufReader::new(reader).lines();
        while let Ok(Some(line)) = commands.next_line().await {
            let asked: Value = serde_json::from_str(&line).unwrap();
            let reply = json!({"return": words(asked["execute"].as_str().unwrap(), &lies), "id": asked["id"]});
            if writer.write_all(format!("{reply}\n").as_bytes()).await.is_err() {
                break;
            }
        }
    });
    let target = Target { monitor: dir.path().join("s").into(), pid: None };
    let options = LookOptions { duration: Duration::from_millis(500), source, ..LookOptions::default() };
    // A lie may cost an error, never the time of day.
    let seen = tokio::time::timeout(Duration::from_secs(20), observe(&target, &options, |_| ())).await.unwrap();
    server.abort();
    seen
}

fn summary(base: u64, plugged: u64) -> Value {
    json!({"query-memory-size-summary": {"base-memory": base, "plugged-memory": plugged}})
}

#[tokio::test]
async fn memory_of_petabytes_is_refused() {
    for (base, plugged) in [(1_u64 << 60, 0), (HALF_GIB, u64::MAX), (u64::MAX, u64::MAX)] {
        for source in [SourceKind::PageSampling, SourceKind::Sampler, SourceKind::Auto] {
            let error = look_at(summary(base, plugged), source).await.unwrap_err().to_string();
            assert!(error.contains("128 TiB"), "{source:?}: {error}");
        }
    }
}

#[tokio::test]
async fn memory_that_is_not_there_is_not_read() {
    let at = |address: &str, size: &str| {
        let listing = format!("Block Name PSize Offset Used Total HVA RO\n pc.ram 4 KiB 0x0 {size} {size} {address} rw\n");
        json!({"human-monitor-command": listing})
    };
    // This process has nothing there; and an address that makes no sense at all.
    for lies in [json!({}), at("0x1000", "0x20000000"), at("0xfffffffffffff000", "0x20000000"), at("0x0", "0x20000000")] {
        let error = look_at(lies.clone(), SourceKind::Sampler).await.unwrap_err().to_string();
        assert!(error.contains("another VM's") || error.contains("make no sense"), "{lies}: {error}");
    }
    let many = "x 4 KiB 0x0 0x1000 0x1000 0x1000 rw\n".repeat(20_000);
    let lies = json!({"human-monitor-command": format!("Block Name PSize Offset Used Total HVA RO\n{many}")});
    assert!(look_at(lies, SourceKind::Sampler).await.unwrap_err().to_string().contains("more than 4096"));
}

#[tokio::test]
async fn nonsense_about_writes_becomes_an_error_or_a_pattern() {
    let measured = |rate: Value| json!({"query-dirty-rate": {"status": "measured", "sample-pages": 16384, "dirty-rate": rate, "mode": "page-sampling", "start-time": 7, "calc-time": 400}});
    // More than the whole memory in every window: all of it is written all the time.
    let seen = look_at(measured(json!(u64::MAX)), SourceKind::PageSampling).await.unwrap();
    let pattern = seen.pattern().unwrap();
    assert!((pattern.curve().pages(10_000.0) / 131_072.0 - 1.0).abs() < 0.01, "{}", pattern.curve().pages(10_000.0));
    for lies in
        [measured(json!(-1)), measured(json!("much")), json!({"query-dirty-rate": null}), json!({"query-status": {"status": 7}})]
    {
        let error = look_at(lies.clone(), SourceKind::PageSampling).await.unwrap_err().to_string();
        assert!(error.contains("makes no sense"), "{lies}: {error}");
    }
}
