//! The control socket: HTTP with JSON, for the operator of the disk.
//!
//! One thread accepts connections and starts a thread for each, which serves one request ([`http`], [`api`]) without
//! stopping the queues. Another thread seals the layers that snapshots froze ([`sealer`]). The permissions of
//! the socket are the only access control.

pub mod api;
pub mod http;
mod sealer;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use super::listener::Listener;
use crate::daemon::device::Device;
use crate::ratelimited_log;
use sealer::Sealer;

/// Most connections at a time; a silent or slow client takes one of them. Further connections wait.
const MAX_CONNECTIONS: usize = 8;

/// Pause after a connection cannot be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts to serve control requests, until the process ends.
///
/// # Errors
/// Those of the system: no descriptor or thread is left.
pub fn start(listener: &Listener, device: &Arc<Device>) -> io::Result<()> {
    let socket = listener.socket().try_clone()?;
    socket.set_nonblocking(false)?;
    let device = device.clone();
    let writable = device.volume().is_writable();
    let sealer = writable
        .then(|| Sealer::start(device.clone()).map(Arc::new))
        .transpose()?;
    let (back, slots) = sync_channel(MAX_CONNECTIONS);
    (0..MAX_CONNECTIONS).for_each(|_| drop(ConnectionSlot(back.clone())));
    let run = move || {
        while slots.recv().is_ok() {
            let slot = ConnectionSlot(back.clone());
            let (device, sealer) = (device.clone(), sealer.clone());
            let started = socket.accept().and_then(|(stream, _)| {
                let run = move || {
                    serve(stream, &device, sealer.as_deref());
                    drop(slot);
                };
                thread::Builder::new()
                    .name("control-client".into())
                    .spawn(run)
            });
            if let Err(error) = started {
                ratelimited_log::warn(format_args!("control: cannot serve a connection: {error}"));
                thread::sleep(PAUSE);
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(run)?;
    Ok(())
}

/// The right to serve a connection, given back when dropped.
struct ConnectionSlot(SyncSender<()>);

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        // The channel has space for all slots.
        let _ = self.0.try_send(());
    }
}

fn serve(mut stream: UnixStream, device: &Device, sealer: Option<&Sealer>) {
    // A client that has disconnected needs no response.
    let _ = match http::read(&mut stream) {
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
