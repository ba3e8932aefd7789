//! `migvisor` on the command line, as its user would run it: on real QEMUs, with real mistakes.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{path::Path, process::Output, time::Duration};

use migvisor::model::forecast::Forecast;
use migvisor_e2e::{
    cluster::product,
    lab::{GuestSpec, Settings, Vm, VmSpec, migrate},
};
use serde_json::Value;
use tokio::process::Command;

async fn migvisor(args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(product::binary().unwrap()).args(args).kill_on_drop(true).output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

async fn predict(socket: &Path, more: &[&str]) -> (i32, String, String) {
    let socket = socket.display().to_string();
    let mut args = vec!["predict", "--qmp", &socket, "--time-budget", "20s", "--look", "3s"];
    args.extend(more);
    migvisor(&args).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forecast_for_programs_and_for_people() {
    let vm = Vm::start(VmSpec::new(GuestSpec::uniform(16_384, 10))).await.unwrap();
    let (code, json, _) = predict(vm.qmp(), &["--bandwidth", "100Mi", "-o", "json"]).await;
    let forecast: Value = serde_json::from_str(&json).unwrap();
    for key in Forecast::KEYS {
        assert!(forecast.get(key).is_some(), "no {key} in {json}");
    }
    assert_eq!((code, &forecast["verdict"], &forecast["method"]), (0, &"Converges".into(), &"PC".into()), "{json}");
    let number = |key: &str| forecast[key].as_f64().unwrap();
    assert!((number("totalMs") - number("downtimeMs") - number("convergenceMs")).abs() < 1e-6);
    assert!(number("dirtiedPages") >= 16_384.0 && number("transferredBytes") >= 16_384.0 * 4104.0, "{json}");
    let bounds = forecast["bounds"]["totalMs"].as_array().unwrap();
    assert!(bounds[0].as_f64().unwrap() <= number("totalMs") && number("totalMs") <= bounds[1].as_f64().unwrap(), "{json}");
    let points = forecast["pattern"].as_array().unwrap();
    assert!(points.len() > 10 && points.iter().all(|p| p["ms"].is_number() && p["pages"].is_u64()), "{json}");

    let (code, table, _) = predict(vm.qmp(), &["--bandwidth", "100Mi"]).await;
    assert!(code == 0 && table.starts_with("Verdict") && table.contains("Least bandwidth"), "{table}");
    // The same guest over a line that is too slow for it: null where there is nothing to tell.
    let (code, yaml, _) = predict(vm.qmp(), &["--bandwidth", "2Mi", "-o", "yaml"]).await;
    assert!(code == 1 && yaml.contains("verdict: Fails") && yaml.contains("downtimeMs: null"), "{yaml}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recording_gives_the_same_forecast_again() {
    let vm = Vm::start(VmSpec::new(GuestSpec::uniform(8192, 10))).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("look.json").display().to_string();
    let (code, _, complaint) =
        migvisor(&["collect", "--qmp", &vm.qmp().display().to_string(), "--look", "2s", "-o", &file]).await;
    assert_eq!(code, 0, "{complaint}");
    let ask = ["replay", &file, "--bandwidth", "50Mi", "-o", "json"];
    let (first, again) = (migvisor(&ask).await, migvisor(&ask).await);
    assert!(first.0 == 0 && first == again, "{first:?}\n{again:?}");

    // Half a recording, somebody else's file, no file.
    let text = std::fs::read(&file).unwrap();
    let cut = directory.path().join("cut.json");
    std::fs::write(&cut, &text[..text.len() / 2]).unwrap();
    let other = directory.path().join("other.json");
    std::fs::write(&other, "{\"ram\":1}").unwrap();
    for (path, says) in [(&cut, "is no recording"), (&other, "is no recording"), (&directory.path().join("none"), "cannot read")]
    {
        let (code, _, complaint) = migvisor(&["replay", &path.display().to_string(), "--bandwidth", "50Mi"]).await;
        assert!(code == 2 && complaint.contains(says), "{complaint}");
    }
    // Nowhere to write to.
    let (code, _, complaint) =
        migvisor(&["collect", "--qmp", &vm.qmp().display().to_string(), "--look", "1s", "-o", "/proc/none/look.json"]).await;
    assert!(code == 2 && complaint.contains("cannot write the recording"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let nothing = directory.path().join("nothing");
    let (code, out, complaint) = predict(&nothing, &["--bandwidth", "100Mi"]).await;
    assert!(code == 2 && out.is_empty() && complaint.contains("nothing"), "{complaint}");

    // A socket that speaks, but no QMP.
    let other = directory.path().join("other");
    let listener = tokio::net::UnixListener::bind(&other).unwrap();
    let server = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await;
        }
    });
    let (code, _, complaint) = predict(&other, &["--bandwidth", "100Mi"]).await;
    assert!(code == 2 && complaint.contains("QMP"), "{complaint}");
    server.abort();

    for (bandwidth, says) in [("100", "did you mean 100Mi"), ("-5Mi", "negative"), ("9Ti", "no line carries"), ("fast", "100Mi")]
    {
        let option = format!("--bandwidth={bandwidth}");
        let (code, _, complaint) = predict(&nothing, &[&option]).await;
        assert!(code == 2 && complaint.contains(says), "{bandwidth}: {complaint}");
    }
    for look in ["0", "99999999999999999999h", "forever"] {
        let (code, _, complaint) = migvisor(&["predict", "--qmp", "x", "--bandwidth", "1Mi", "--look", look]).await;
        assert!(code == 2 && complaint.contains("--look"), "{look}: {complaint}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_judged_now_is_unknown() {
    let spec = VmSpec::new(GuestSpec::uniform(16_384, 10));
    let mut source = Vm::start(spec.clone()).await.unwrap();
    let mut target = Vm::incoming(spec.clone()).await.unwrap();
    let (code, json, _) = predict(target.qmp(), &["--bandwidth", "100Mi", "-o", "json"]).await;
    let unknown: Value = serde_json::from_str(&json).unwrap();
    assert!(
        code == 3 && unknown["verdict"] == "Unknown" && Forecast::KEYS.iter().all(|key| unknown.get(key).is_some()),
        "{json}"
    );
    assert!(unknown["message"].as_str().unwrap().contains("target of a migration"), "{json}");

    let socket = source.qmp().to_owned();
    let slow = Settings { time_budget: Duration::from_secs(6), ..Settings::capped(2) };
    let migrating = tokio::spawn(async move { migrate(&mut source, &mut target, slow).await.map(|truth| (truth, source)) });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (code, out, _) = predict(&socket, &["--bandwidth", "100Mi"]).await;
    assert!(code == 3 && out.contains("is being migrated"), "{out}");
    let (_, source) = migrating.await.unwrap().unwrap();
    drop(source);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_vanishes_under_the_look_is_said_to_be_gone() {
    let mut vm = Vm::start(VmSpec::new(GuestSpec::uniform(16_384, 10))).await.unwrap();
    let socket = vm.qmp().to_owned();
    let looking = tokio::spawn(async move { predict(&socket, &["--bandwidth", "100Mi", "--look", "20s"]).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    vm.kill();
    let (code, out, complaint) = tokio::time::timeout(Duration::from_secs(15), looking).await.unwrap().unwrap();
    assert!(code == 2 && out.is_empty() && !complaint.contains("panicked") && complaint.starts_with("error: "), "{complaint}");
}
