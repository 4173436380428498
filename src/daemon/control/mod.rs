//! The control socket: HTTP with JSON, for the operator of the device.
//!
//! One thread accepts connections, and starts another for each, which serves one request ([`http`])
//! beside the queues and without them noticing; [`api`] says what can be asked. What takes long after
//! an answer, one more does ([`sealer`]). Who may connect to the socket may ask: its permissions are
//! the only lock.

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
use crate::engine::ratelimited_log;
use sealer::Sealer;

/// Connections served at a time: a client that is silent or slow takes one of them. Further
/// connections wait until one ends.
const MAX_CONNECTIONS: usize = 8;

/// Pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves control requests that come to `listener` until the process ends.
///
/// # Errors
/// No descriptor or thread is to be had.
pub fn start(listener: &Listener, device: &Arc<Device>) -> io::Result<()> {
    let socket = listener.socket().try_clone()?;
    socket.set_nonblocking(false)?;
    let device = device.clone();
    let writable = device.is_writable();
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

/// The right to serve a connection, which is given back at the end of it.
struct ConnectionSlot(SyncSender<()>);

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        // There is room for all there are.
        let _ = self.0.try_send(());
    }
}

fn serve(mut stream: UnixStream, device: &Device, sealer: Option<&Sealer>) {
    // Who does not listen need not know.
    let _ = match http::read(&mut stream) {
        Ok(request) => {
            let response = device.answer(&request);
            // If it was a snapshot, there is something to seal; else this finds nothing.
            sealer.into_iter().for_each(Sealer::wake);
            let (method, path, status) = (&request.method, &request.path, response.status);
            match status {
                200 => log::info!("control: {method} {path}: {status}"),
                _ => ratelimited_log::warn(format_args!(
                    "control: {method:.20} {path:.100}: {status}"
                )),
            }
            response.send(&mut stream)
        }
        // A probe that says nothing is no news.
        Err(error) => error.send(&mut stream),
    };
}
