//! The control socket: HTTP with JSON, for the operator of the disk.
//!
//! The acceptor of front-ends also watches the control socket, so that an idle disk has one thread. It starts a
//! thread for each connection, which serves one request ([`http`], [`api`]) without stopping the queues. Another
//! thread seals the layers that snapshots froze, as long as there are any ([`sealer`]). The permissions of the socket
//! are the only access control.

pub mod api;
pub mod http;
mod sealer;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::listener::Listener;
use crate::daemon::device::Device;
use crate::io::poller::{Poller, Trigger};
use crate::ratelimited_log;
use http::{Body, Response};
use sealer::Sealer;

/// Path of the listening socket, which the next node asks for.
pub const LISTENER: &str = "/api/v1/listener";

/// Most connections at a time; a silent or slow client takes one of them. Further connections wait.
const MAX_CONNECTIONS: usize = 8;

/// Pause after a connection cannot be accepted.
const PAUSE: Duration = Duration::from_millis(10);

/// The control API of a disk.
#[derive(Debug)]
pub struct Control {
    listener: Listener,
    /// Socket of front-ends, which the next node asks for.
    guest: Arc<Listener>,
    device: Arc<Device>,
    /// `None` for a read-only disk.
    sealer: Option<Arc<Sealer>>,
    /// Number of connections that are being served.
    served: AtomicUsize,
}

impl Control {
    /// Control API of `device` at `listener`; `guest` is the socket of front-ends. Seals what could not be sealed before.
    pub fn new(listener: Listener, guest: Arc<Listener>, device: &Arc<Device>) -> Arc<Self> {
        let writable = device.volume().is_writable();
        let sealer = writable.then(|| Arc::new(Sealer::new(device.clone())));
        // At the start there may have been no space to seal a layer.
        sealer.iter().for_each(Sealer::wake);
        Arc::new(Self {
            listener,
            guest,
            device: device.clone(),
            sealer,
            served: AtomicUsize::new(0),
        })
    }

    /// Has `poller` report `token` when a client connects, for [`Control::accept`].
    ///
    /// # Errors
    /// Those of [`Poller::watch`].
    pub fn watch(&self, poller: &Poller, token: u64) -> io::Result<()> {
        poller.watch(self.listener.socket(), token, Trigger::Once)
    }

    /// Accepts a connection, and serves it in a thread of its own. `poller` has reported `token`.
    pub fn accept(self: &Arc<Self>, poller: &Arc<Poller>, token: u64) {
        self.served.fetch_add(1, Ordering::AcqRel);
        let slot = Slot {
            control: Arc::downgrade(self),
            poller: poller.clone(),
            token,
        };
        let stream = match self.listener.socket().accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return failed(&error),
        };
        let (device, sealer) = (self.device.clone(), self.sealer.clone());
        let guest = self.guest.clone();
        let run = move || {
            serve(stream, &device, sealer.as_ref(), guest.socket());
            drop(slot);
        };
        let thread = thread::Builder::new().name("control-client".into());
        if let Err(error) = thread.spawn(run) {
            return failed(&error);
        }
        if self.served.load(Ordering::Acquire) < MAX_CONNECTIONS {
            self.watch_again(poller, token);
        }
    }

    fn watch_again(&self, poller: &Poller, token: u64) {
        if let Err(error) = poller.watch_again(self.listener.socket(), token) {
            ratelimited_log::error(format_args!("control: cannot watch the socket: {error}"));
        }
    }
}

fn failed(error: &io::Error) {
    ratelimited_log::warn(format_args!("control: cannot serve a connection: {error}"));
    thread::sleep(PAUSE);
}

/// A connection that is being served, in the number of such connections.
struct Slot {
    /// Weak: the path of the socket is removed when the disk ends, even while a connection is served.
    control: Weak<Control>,
    poller: Arc<Poller>,
    token: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(control) = self.control.upgrade() {
            control.served.fetch_sub(1, Ordering::AcqRel);
            // Connections may wait for the slot.
            control.watch_again(&self.poller, self.token);
        }
    }
}

fn serve(
    mut stream: UnixStream,
    device: &Device,
    sealer: Option<&Arc<Sealer>>,
    guest: &UnixListener,
) {
    // A client that has disconnected needs no response.
    let _ = match http::read(&mut stream) {
        Ok(request) if request.method == "GET" && request.path == LISTENER => {
            log::debug!("control: passing on the listening socket");
            let response = Response {
                status: 200,
                body: Body::Json(json!(device.ready())),
            };
            response.send_with(&stream, guest)
        }
        Ok(request) => {
            let response = device.answer(&request);
            // After a snapshot there is a layer to seal; otherwise the sealer finds none.
            sealer.into_iter().for_each(Sealer::wake);
            let (method, path, status) = (&request.method, &request.path, response.status);
            match status {
                // Monitoring asks again and again.
                200 if method == "GET" || method == "HEAD" => {
                    log::debug!("control: {method} {path}: {status}")
                }
                200 => ratelimited_log::info(format_args!("control: {method} {path}: {status}")),
                _ => ratelimited_log::warn(format_args!(
                    "control: {method:.20} {path:.100}: {status}"
                )),
            }
            match method.as_str() {
                "HEAD" => response.send_head(&mut stream),
                _ => response.send(&mut stream),
            }
        }
        // Not logged: a probe connects and sends nothing.
        Err(error) => error.send(&mut stream),
    };
}
