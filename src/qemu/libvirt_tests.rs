//! Faults that a real libvirt does not show. All else is tested on a real one (e2e).
#![allow(clippy::unwrap_used)]

#[cfg(feature = "libvirt")]
use std::os::unix::{fs::symlink, net::UnixListener};
use std::path::Path;

use super::*;
#[cfg(feature = "libvirt")]
use crate::qemu::process::Processes;

const SHORT: Duration = Duration::from_millis(400);
#[cfg(feature = "libvirt")]
const POD: &str = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";

fn address(socket: Socket, owner: Option<Owner>) -> LibvirtAddress {
    LibvirtAddress { socket, domain: None, owner }
}

async fn refusal(socket: Socket, owner: Option<Owner>) -> LibvirtError {
    match Libvirt::connect(&address(socket, owner), SHORT).await.unwrap_err() {
        QmpError::Libvirt(error) => error,
        other => unreachable!("{other:?}"),
    }
}

#[cfg(feature = "libvirt")]
#[tokio::test]
async fn nothing_leads_out_of_a_pods_directory() {
    let pods = tempfile::tempdir().unwrap();
    let (ours, theirs) = (pods.path().join("ours"), pods.path().join("theirs"));
    std::fs::create_dir(&ours).unwrap();
    std::fs::create_dir(&theirs).unwrap();
    let _listener = UnixListener::bind(theirs.join("sock")).unwrap();
    symlink("../theirs/sock", ours.join("sock")).unwrap();
    symlink(&theirs, ours.join("runtime")).unwrap();
    symlink("/proc/self/fd", ours.join("fd")).unwrap();
    for path in ["sock", "runtime/sock", "../theirs/sock", "fd/0", "none", ""] {
        let error = refusal(Socket::beneath(&ours, path), None).await;
        assert!(matches!(error, LibvirtError::Socket { .. } | LibvirtError::NotASocket { .. }), "{path}: {error:?}");
    }
    let absolute = theirs.join("sock");
    assert!(matches!(refusal(Socket::beneath(&ours, &absolute), None).await, LibvirtError::Socket { .. }));
    for (path, make) in [("file", std::fs::write as fn(_, _) -> _), ("directory", |path, _| std::fs::create_dir(path))] {
        make(ours.join(path), b"x").unwrap();
        let error = refusal(Socket::beneath(&ours, path), None).await;
        assert!(matches!(&error, LibvirtError::NotASocket { path: told } if told.ends_with(path)), "{error:?}");
    }
}

#[cfg(feature = "libvirt")]
#[tokio::test]
async fn whoever_listens_has_to_be_of_the_pod() {
    let pods = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(pods.path().join("sock")).unwrap();
    let socket = || Socket::beneath(pods.path(), "sock");
    // We listen ourselves, and we are no pod; in a `/proc` where we are nobody it cannot be told.
    for processes in [Processes::default(), Processes::new(pods.path())] {
        let error = refusal(socket(), Some(Owner { pod: POD.parse().unwrap(), processes })).await;
        assert!(matches!(error, LibvirtError::Impostor { .. }), "{error:?}");
        assert!(error.to_string().contains(POD), "{error}");
    }
}

/// A daemon that accepts and then says this, for ever.
fn fake(at: &Path, words: &'static [u8]) -> tokio::task::JoinHandle<()> {
    let listener = tokio::net::UnixListener::bind(at).unwrap();
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        let mut held = vec![];
        while let Ok((mut stream, _)) = listener.accept().await {
            if words.is_empty() {
                held.push(stream);
            } else {
                tokio::spawn(async move { while stream.write_all(words).await.is_ok() {} });
            }
        }
    })
}

#[cfg(feature = "libvirt")]
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks.filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "libvirt\n")).count()
}

/// The head of an endless run of RPC events (length 28, program, version, procedure, type MESSAGE, serial, status).
#[cfg(feature = "libvirt")]
const EVENTS: &[u8] = &[0, 0, 0, 28, 0x20, 0, 0x80, 0x86, 0, 0, 0, 1, 0, 0, 0, 107, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0];

/// A daemon that hangs, one that floods, one that talks nonsense: an error within the time limit, and no thread stays.
#[cfg(feature = "libvirt")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_hangs_or_floods_costs_the_time_limit_and_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    for (name, words) in
        [("hangs", &[][..]), ("floods", EVENTS), ("nonsense", &[0xFF; 4096]), ("http", b"HTTP/1.1 200 OK\r\n\r\n")]
    {
        let path = dir.path().join(name);
        let daemon = fake(&path, words);
        for _ in 0..5 {
            let began = Instant::now();
            let error = refusal(Socket::Named(vec![path.clone()]), None).await;
            assert!(began.elapsed() < SHORT * 3, "{name} took {:?}", began.elapsed());
            assert!(
                matches!(error, LibvirtError::Hangs { .. } | LibvirtError::Open { .. } | LibvirtError::Lost { .. }),
                "{name}: {error:?}"
            );
        }
        daemon.abort();
        for _ in 0..100 {
            if threads() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(threads(), 0, "{name}");
    }
}

#[cfg(not(feature = "libvirt"))]
#[tokio::test]
async fn without_libvirt_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = fake(&dir.path().join("sock"), b"");
    let error = refusal(Socket::Named(vec![dir.path().join("sock")]), None).await;
    assert!(matches!(error, LibvirtError::NotBuilt), "{error:?}");
    daemon.abort();
}
