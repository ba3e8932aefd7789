//! What the plain and the TLS server have in common: bounds against slow peers, and an end that a peer cannot delay.

use std::{net::SocketAddr, time::Duration};

use axum_server::{Handle, Server};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::shutdown::Shutdown;

/// How long requests in flight may take once everything has to close.
const GRACE: Duration = Duration::from_secs(5);

/// How long a peer may take to send the head of a request.
const HEADERS: Duration = Duration::from_secs(10);

/// Bounds the time and space that one connection may take.
pub(super) fn harden<A>(server: &mut Server<SocketAddr, A>) {
    let builder: &mut hyper_util::server::conn::auto::Builder<TokioExecutor> = server.http_builder();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(64 * 1024);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30)).max_concurrent_streams(256);
}

/// A handle that closes its server once `shutdown` says so.
pub(super) fn handle(shutdown: &Shutdown) -> Handle<SocketAddr> {
    let handle = Handle::new();
    let (closing, shutdown) = (handle.clone(), shutdown.clone());
    tokio::spawn(async move {
        shutdown.stopped().await;
        closing.graceful_shutdown(Some(GRACE));
    });
    handle
}
