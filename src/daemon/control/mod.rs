//! The control socket: requests of whoever runs the device, as HTTP with JSON.
//!
//! One thread serves one request after the other ([`http`]), beside the queues and without them
//! noticing; [`api`] says what can be asked. Who may connect to the socket may ask: its permissions
//! are the only lock.

pub mod api;
pub mod http;

use std::io;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use super::listener::Listener;
use api::Device;

/// Pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves control requests that come to `listener` until the process ends.
///
/// # Errors
/// No descriptor or thread is to be had.
pub fn start(listener: &Listener, device: Device) -> io::Result<()> {
    let socket = listener.socket().try_clone()?;
    socket.set_nonblocking(false)?;
    let run = move || {
        loop {
            match socket.accept() {
                Ok((stream, _)) => serve(stream, &device),
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

fn serve(mut stream: UnixStream, device: &Device) {
    let response = match http::read(&mut stream) {
        Ok(request) => {
            let response = device.answer(&request);
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
