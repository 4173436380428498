//! Metrics over TCP, for Prometheus, which scrapes no unix sockets.
//!
//! The address is a loopback address, and `GET /metrics` is the only request.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::ACCEPT;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::actions;
use super::reply::{self, Reply};
use crate::engine::stats::exposition::Format;
use crate::node::disks::Disks;
use crate::node::error::{Code, Error, Failure};

/// Connections that are served at a time; more wait.
const MAX_CONNECTIONS: usize = 8;

/// How long the headers of a request may take to arrive.
const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection may last: any user of the host can make one.
const CONNECTION_LIMIT: Duration = Duration::from_secs(60);

/// Binds the address.
///
/// # Errors
/// [`Error::MetricsAddress`] if other hosts could reach it; [`Error::MetricsListen`] for errors of the system.
pub fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    if !address.ip().is_loopback() {
        return Err(Error::MetricsAddress(address));
    }
    let bind = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        log::info!(
            "serving metrics on http://{}/metrics",
            listener.local_addr()?
        );
        Ok(listener)
    };
    bind().map_err(|source| Error::MetricsListen { address, source })
}

/// Serves connections for ever.
pub async fn serve(listener: TcpListener, disks: Arc<Disks>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            // As when descriptors run out: others may be closed meanwhile.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let disks = disks.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, disks.clone()));
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_LIMIT)
                .serve_connection(TokioIo::new(stream), service);
            // A client that disconnects or stays too long has no answer to get.
            let _ = tokio::time::timeout(CONNECTION_LIMIT, served).await;
            drop(slot);
        });
    }
}

async fn answer(request: Request<Incoming>, disks: Arc<Disks>) -> Result<Reply, Infallible> {
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    let answered = match (request.uri().path(), get) {
        ("/metrics", true) => {
            let accept = request.headers().get(ACCEPT);
            let accept = accept.and_then(|accept| accept.to_str().ok());
            actions::metrics(disks, Format::accepted(accept.unwrap_or_default())).await
        }
        ("/metrics", false) => Err(Failure::new(Code::Method, "expected GET")),
        _ => Err(Failure::new(Code::NotFound, "expected /metrics")),
    };
    Ok(answered.unwrap_or_else(|failure| reply::failure(&failure)))
}
