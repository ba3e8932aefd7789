//! An axum router over TLS, with certificate and key from files that may change under us.
//!
//! In: two PEM files, as a mounted Secret has them. Out: a server that always answers with the newest pair that is sound.
//! The files are read again on a timer and compared by content: inotify would miss the kubelet's swap of the `..data` symlink.
//! A pair that is broken, or caught half swapped (certificate and key do not belong together), changes nothing but the log.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use axum_server::tls_rustls::RustlsConfig;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tracing::{info, warn};

use super::{serve as common, shutdown::Shutdown};

/// How often the files are compared, where nothing else is said.
const RELOAD: Duration = Duration::from_secs(10);

/// Why TLS is not served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The address is taken or not ours.
    #[error("cannot listen on {addr} for TLS: {source}; free the port or choose another address")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}; it has to be a PEM file that this process may read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The pair cannot be served.
    #[error("certificate {} and key {} cannot be served: {why}; give a PEM chain and the private key that belongs to it", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong with them.
        why: String,
    },
    /// The server ended with an error.
    #[error("the TLS server failed: {0}")]
    Serve(#[source] io::Error),
}

/// The two files and what they last held.
#[derive(Debug)]
struct Pair {
    cert: PathBuf,
    key: PathBuf,
    /// The content that was looked at last, sound or not: what is broken is reported once.
    seen: Option<(Vec<u8>, Vec<u8>)>,
}

impl Pair {
    /// The new configuration if the content changed, `None` if it did not.
    async fn load(&mut self) -> Result<Option<Arc<ServerConfig>>, TlsError> {
        let content = (read(&self.cert).await?, read(&self.key).await?);
        if self.seen.as_ref() == Some(&content) {
            return Ok(None);
        }
        let (cert, key) = self.seen.insert(content);
        match server_config(cert, key) {
            Ok(config) => Ok(Some(Arc::new(config))),
            Err(why) => Err(TlsError::Pair { cert: self.cert.clone(), key: self.key.clone(), why }),
        }
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    tokio::fs::read(path).await.map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

/// A chain and the key that belongs to its first certificate (rustls checks that), HTTP/2 and HTTP/1.1.
fn server_config(cert: &[u8], key: &[u8]) -> Result<ServerConfig, String> {
    let chain = CertificateDer::pem_slice_iter(cert)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("the certificate: {error}"))?;
    if chain.is_empty() {
        return Err("the certificate file holds no certificate".to_owned());
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("the key: {error}"))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| error.to_string())?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// A bound listener with a sound certificate that does not answer yet.
#[derive(Debug)]
pub struct TlsServer {
    listener: std::net::TcpListener,
    addr: SocketAddr,
    pair: Pair,
    config: Arc<ServerConfig>,
    reload: Duration,
}

impl TlsServer {
    /// Reads the pair and takes the port (0: any; see [`Self::local_addr`]).
    pub async fn bind(addr: SocketAddr, cert: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let mut pair = Pair { cert, key, seen: None };
        let Some(config) = pair.load().await? else {
            return Err(TlsError::Pair { cert: pair.cert, key: pair.key, why: "nothing was read".to_owned() });
        };
        let bound = std::net::TcpListener::bind(addr).and_then(|listener| {
            listener.set_nonblocking(true)?;
            let addr = listener.local_addr()?;
            Ok((listener, addr))
        });
        let (listener, addr) = bound.map_err(|source| TlsError::Bind { addr, source })?;
        Ok(Self { listener, addr, pair, config, reload: RELOAD })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Reads the files again this often (every ten seconds where nothing is said).
    #[must_use]
    pub fn reload_every(mut self, interval: Duration) -> Self {
        self.reload = interval.max(Duration::from_millis(10));
        self
    }

    /// Answers until `shutdown` is `Stopped`, then gives requests in flight five seconds.
    pub async fn run(self, router: Router, shutdown: Shutdown) -> Result<(), TlsError> {
        let config = RustlsConfig::from_config(self.config);
        let mut server = axum_server::from_tcp_rustls(self.listener, config.clone())
            .map_err(TlsError::Serve)?
            .handle(common::handle(&shutdown));
        common::harden(&mut server);
        tokio::select! {
            ended = server.serve(router.into_make_service()) => ended.map_err(TlsError::Serve),
            () = keep_current(self.pair, config, self.reload) => Ok(()),
        }
    }
}

/// Binds and serves: [`TlsServer::bind`], then [`TlsServer::run`].
pub async fn serve(addr: SocketAddr, cert: PathBuf, key: PathBuf, router: Router, shutdown: Shutdown) -> Result<(), TlsError> {
    TlsServer::bind(addr, cert, key).await?.run(router, shutdown).await
}

/// Swaps each new sound pair in. Never ends.
async fn keep_current(mut pair: Pair, config: RustlsConfig, interval: Duration) {
    let mut unreadable = false;
    loop {
        tokio::time::sleep(interval).await;
        match pair.load().await {
            Ok(new) => {
                unreadable = false;
                if let Some(new) = new {
                    config.reload_from_config(new);
                    info!(cert = %pair.cert.display(), "serving a new certificate");
                }
            }
            Err(error @ TlsError::Read { .. }) => {
                if !std::mem::replace(&mut unreadable, true) {
                    warn!(%error, "keeping the certificate that is being served");
                }
            }
            Err(error) => warn!(%error, "keeping the certificate that is being served"),
        }
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
