//! The control socket: requests of whoever runs the device, as HTTP with JSON.
//!
//! One thread serves one request after the other ([`http`]), beside the queues and without them
//! noticing; [`api`] says what can be asked. What takes long after an answer, another does ([`sealer`]).
//! Who may connect to the socket may ask: its permissions
//! are the only lock.

pub mod api;
pub mod http;
mod sealer;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::listener::Listener;
use api::Device;
use sealer::Sealer;

/// Pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves control requests that come to `listener` until the process ends.
///
/// # Errors
/// No descriptor or thread is to be had.
pub fn start(listener: &Listener, device: Device) -> io::Result<()> {
    let socket = listener.socket().try_clone()?;
    socket.set_nonblocking(false)?;
    let device = Arc::new(device);
    let writable = device.snapshots.is_some();
    let sealer = writable
        .then(|| Sealer::start(device.clone()))
        .transpose()?;
    let run = move || {
        loop {
            match socket.accept() {
                Ok((stream, _)) => serve(stream, &device, sealer.as_ref()),
                Err(error) => {
                    log::warn!("control: no connection can be accepted: {error}");
                    thread::sleep(PAUSE);
                }
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(run)?;
    Ok(())
}

fn serve(mut stream: UnixStream, device: &Device, sealer: Option<&Sealer>) {
    let response = match http::read(&mut stream) {
        Ok(request) => {
            let response = device.answer(&request);
            // If it was a snapshot, there is something to seal; else this finds nothing.
            sealer.into_iter().for_each(Sealer::wake);
            let (method, path) = (&request.method, &request.path);
            log::info!("control: {method} {path}: {}", response.status);
            response
        }
        // A probe that says nothing is no news.
        Err(error) => error.response(),
    };
    // Who does not listen need not know.
    let _ = response.send(&mut stream);
}
