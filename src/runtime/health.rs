//! `/metrics`, `/healthz` and `/readyz` over plain HTTP, for the kubelet and Prometheus.
//!
//! In: the registry of metrics and a [`Readiness`] that names what the process still waits for. Out: a server.
//! `/healthz` says that the process answers at all; `/readyz` is 503 with one line for each thing that is not ready, and while
//! draining.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::{
    metrics::{CONTENT_TYPE, Metrics},
    serve,
    shutdown::{Phase, Shutdown},
};

/// Why health could not be served.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// The address is taken or not ours.
    #[error("cannot listen on {addr} for metrics and health: {source}; free the port or choose another address")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The server ended with an error.
    #[error("the server for metrics and health failed: {0}")]
    Serve(#[source] io::Error),
}

/// Knows what is not ready yet, by name. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Readiness {
    parts: Arc<Mutex<BTreeMap<String, bool>>>,
    shutdown: Shutdown,
}

/// One thing that has to be ready. Not ready until it says so.
#[derive(Debug, Clone)]
pub struct Ready {
    name: String,
    parts: Arc<Mutex<BTreeMap<String, bool>>>,
}

impl Readiness {
    /// With nothing to wait for.
    pub fn new(shutdown: Shutdown) -> Self {
        Self { parts: Arc::default(), shutdown }
    }

    /// Adds something to wait for; `name` is what `/readyz` shows, such as `watch of MigrationForecasts`.
    pub fn wait_for(&self, name: &str) -> Ready {
        let ready = Ready { name: name.to_owned(), parts: self.parts.clone() };
        ready.set(false);
        ready
    }

    /// The names of all that is not ready, sorted; empty means ready.
    pub fn missing(&self) -> Vec<String> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut missing: Vec<String> = parts.iter().filter(|(_, ready)| !**ready).map(|(name, _)| name.clone()).collect();
        if self.shutdown.phase() != Phase::Running {
            missing.push("shutting down".to_owned());
        }
        missing
    }
}

impl Ready {
    /// Says whether this part is ready.
    pub fn set(&self, ready: bool) {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).insert(self.name.clone(), ready);
    }
}

/// The three routes, for in-process tests and for [`Server`].
pub fn router(metrics: Metrics, readiness: Readiness) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz).with_state(readiness))
        .route("/metrics", get(exposition).with_state(metrics))
}

async fn readyz(State(readiness): State<Readiness>) -> Response {
    let missing = readiness.missing();
    if missing.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", missing.join("\nnot ready: "))).into_response()
}

async fn exposition(State(metrics): State<Metrics>) -> Response {
    match metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// A bound listener that does not answer yet, so that the address (of port 0) can be learned first.
#[derive(Debug)]
pub struct Server {
    listener: std::net::TcpListener,
    addr: SocketAddr,
}

impl Server {
    /// Takes the port.
    pub fn bind(addr: SocketAddr) -> Result<Self, HealthError> {
        let bound = std::net::TcpListener::bind(addr).and_then(|listener| {
            listener.set_nonblocking(true)?;
            let addr = listener.local_addr()?;
            Ok(Self { listener, addr })
        });
        bound.map_err(|source| HealthError::Bind { addr, source })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Answers until `shutdown` is `Stopped`, then gives requests in flight five seconds.
    pub async fn run(self, metrics: Metrics, readiness: Readiness, shutdown: Shutdown) -> Result<(), HealthError> {
        let mut server = axum_server::from_tcp(self.listener).map_err(HealthError::Serve)?.handle(serve::handle(&shutdown));
        serve::harden(&mut server);
        server.serve(router(metrics, readiness).into_make_service()).await.map_err(HealthError::Serve)
    }
}

/// Binds and serves: [`Server::bind`], then [`Server::run`].
pub async fn serve(addr: SocketAddr, metrics: Metrics, readiness: Readiness, shutdown: Shutdown) -> Result<(), HealthError> {
    Server::bind(addr)?.run(metrics, readiness, shutdown).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use axum::{body::Body, http::Request};
    use tower::ServiceExt;

    use super::*;

    async fn ask(router: &Router, path: &str) -> (StatusCode, String) {
        let response = router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn readiness_names_what_is_missing() {
        let (trigger, shutdown) = Shutdown::manual();
        let readiness = Readiness::new(shutdown);
        let watch = readiness.wait_for("watch of MigrationForecasts");
        let router = router(Metrics::new().unwrap(), readiness);
        let (status, text) = ask(&router, "/readyz").await;
        assert_eq!((status, text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not ready: watch of MigrationForecasts\n"));
        watch.set(true);
        assert_eq!(ask(&router, "/readyz").await.0, StatusCode::OK);
        trigger.drain();
        let (status, text) = ask(&router, "/readyz").await;
        assert_eq!((status, text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not ready: shutting down\n"));
        assert_eq!(ask(&router, "/healthz").await, (StatusCode::OK, "ok\n".to_owned()));
        assert!(ask(&router, "/metrics").await.1.contains("migvisor_build_info"));
    }

    #[tokio::test]
    async fn serves_until_stopped_even_with_a_silent_peer() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (trigger, shutdown) = Shutdown::manual();
        let server = Server::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let addr = server.local_addr();
        assert!(matches!(Server::bind(addr), Err(HealthError::Bind { .. })));
        let task = tokio::spawn(server.run(Metrics::new().unwrap(), Readiness::new(shutdown.clone()), shutdown));
        let _silent = tokio::net::TcpStream::connect(addr).await.unwrap();
        let mut peer = tokio::net::TcpStream::connect(addr).await.unwrap();
        peer.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        peer.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        trigger.stop();
        tokio::time::timeout(Duration::from_secs(8), task).await.unwrap().unwrap().unwrap();
    }
}
