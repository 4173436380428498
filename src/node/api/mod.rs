//! HTTP/1.1 with JSON on a unix socket.
//!
//! `routes` is the table that `docs/openapi.yaml` describes; a test holds the two against each other.

mod actions;
mod answer;
mod bind;
mod body;
pub mod exporter;
mod query;
mod reply;
mod routes;

use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::disks::Disks;
use crate::ratelimited_log;
use answer::{Caller, Context};

pub use answer::Access;
pub use bind::{BIND_LIMIT, ControlSocket, bind};

/// Connections that are served at a time; more wait. Many clients may wait for events, and a silent client has its
/// connection for [`HEADER_LIMIT`].
const MAX_CONNECTIONS: usize = 512;

/// How long the headers of a request may take to arrive.
const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// Serves the connections of a socket for ever. Each socket has slots of its own, so that the clients of one cannot keep
/// out those of another.
pub async fn serve(listener: UnixListener, access: Access, disks: Arc<Disks>) {
    let context = Arc::new(Context::new(disks));
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let context = context.clone();
                tokio::spawn(async move {
                    connection(stream, access, context).await;
                    drop(slot);
                });
            }
            Err(error) => {
                ratelimited_log::warn(format_args!("cannot accept a client: {error}"));
                // As when descriptors run out: others may be closed meanwhile.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, access: Access, context: Arc<Context>) {
    let peer = stream.peer_cred().ok();
    let caller = Caller {
        uid: peer.map(|peer| peer.uid()),
        pid: peer.and_then(|peer| peer.pid()),
        access,
    };
    let service = service_fn(|request| answer::answer(request, context.clone(), caller));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        log::debug!("a client's connection ended: {error}");
    }
}
