//! A real handshake against real files, swapped the way the kubelet swaps them.
#![allow(clippy::unwrap_used)]

use std::{fs, io::Read, io::Write, os::unix::fs::symlink};

use axum::routing::get;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::ServerName};

use super::*;

fn pair() -> CertifiedKey<rcgen::KeyPair> {
    generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap()
}

/// Writes a new generation beside the old one and swaps `..data` with one rename.
fn swap_in(dir: &Path, generation: &str, cert: &str, key: &str) {
    fs::create_dir(dir.join(generation)).unwrap();
    fs::write(dir.join(generation).join("tls.crt"), cert).unwrap();
    fs::write(dir.join(generation).join("tls.key"), key).unwrap();
    symlink(generation, dir.join("..tmp")).unwrap();
    fs::rename(dir.join("..tmp"), dir.join("..data")).unwrap();
}

/// What a client that trusts only `cert` gets.
async fn ask(addr: SocketAddr, cert: &CertificateDer<'static>) -> io::Result<String> {
    let cert = cert.clone();
    tokio::task::spawn_blocking(move || {
        let mut roots = RootCertStore::empty();
        roots.add(cert).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connection = ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap();
        let mut stream = StreamOwned::new(connection, std::net::TcpStream::connect(addr)?);
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
    .await
    .unwrap()
}

async fn until_served(addr: SocketAddr, cert: &CertificateDer<'static>) {
    for _ in 0..200 {
        if ask(addr, cert).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    unreachable!("the new certificate was never served");
}

#[tokio::test]
async fn follows_the_kubelets_swap_and_survives_a_broken_pair() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second, other) = (pair(), pair(), pair());
    swap_in(dir.path(), "..1", &first.cert.pem(), &first.signing_key.serialize_pem());
    symlink("..data/tls.crt", dir.path().join("tls.crt")).unwrap();
    symlink("..data/tls.key", dir.path().join("tls.key")).unwrap();

    let (trigger, shutdown) = Shutdown::manual();
    let server =
        TlsServer::bind(([127, 0, 0, 1], 0).into(), dir.path().join("tls.crt"), dir.path().join("tls.key")).await.unwrap();
    let addr = server.local_addr();
    let router = Router::new().route("/", get(|| async { "hello" }));
    let task = tokio::spawn(server.reload_every(Duration::from_millis(10)).run(router, shutdown));
    assert!(ask(addr, first.cert.der()).await.unwrap().ends_with("hello"));

    // A key of somebody else, then no certificate at all: the old pair stays.
    swap_in(dir.path(), "..2", &second.cert.pem(), &other.signing_key.serialize_pem());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(ask(addr, first.cert.der()).await.is_ok());
    swap_in(dir.path(), "..3", "no certificate", "no key");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(ask(addr, first.cert.der()).await.is_ok());

    swap_in(dir.path(), "..4", &second.cert.pem(), &second.signing_key.serialize_pem());
    until_served(addr, second.cert.der()).await;
    assert!(ask(addr, first.cert.der()).await.is_err());

    trigger.stop();
    tokio::time::timeout(Duration::from_secs(8), task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn what_cannot_be_served_is_said_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    let any = ([127, 0, 0, 1], 0).into();
    let error = TlsServer::bind(any, cert.clone(), key.clone()).await.unwrap_err().to_string();
    assert!(error.contains("tls.crt"), "{error}");
    let (one, two) = (pair(), pair());
    fs::write(&cert, one.cert.pem()).unwrap();
    fs::write(&key, two.signing_key.serialize_pem()).unwrap();
    let error = TlsServer::bind(any, cert, key).await.unwrap_err().to_string();
    assert!(error.contains("belongs"), "{error}");
}
