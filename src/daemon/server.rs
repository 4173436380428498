//! One front-end after the other, on one listener.
//!
//! A connection first waits until it says something: only then does it take over from the one
//! being served, so that a probe that connects and leaves disturbs nobody, while a front-end that
//! replaces its device gets the new one at once.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::net::{RecvFlags, recv};

use super::Error;
use super::listener::Listener;
use crate::engine::Disk;
use crate::poller::{Poller, Trigger};
use crate::vhost::session;

/// Connections that wait to say something; the oldest goes when one more comes.
const MAX_SILENT: usize = 16;

const LISTENER: u64 = u64::MAX;
const SIGNAL: u64 = u64::MAX - 1;

/// The connection being served.
struct Active {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Active {
    fn start(stream: UnixStream, disk: Arc<Disk>) -> io::Result<Active> {
        stream.set_nonblocking(false)?;
        let theirs = stream.try_clone()?;
        let thread = thread::Builder::new()
            .name("front-end".to_owned())
            .spawn(move || match session::serve(theirs, disk) {
                Ok(()) => log::info!("the front-end left"),
                Err(error) => log::warn!("the front-end's connection is dropped: {error}"),
            })?;
        Ok(Active { stream, thread })
    }

    /// Ends the connection and waits until its queues are drained.
    fn end(self) {
        // Already closed is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.join().is_err() {
            log::error!("a front-end's thread panicked");
        }
    }
}

/// Serves front-ends until `signals` becomes readable.
///
/// # Errors
///
/// The system does not let us wait for connections.
pub fn serve(listener: &Listener, disk: &Arc<Disk>, signals: &UnixStream) -> Result<(), Error> {
    let poller = Poller::new().map_err(Error::Wait)?;
    poller
        .watch(listener.socket(), LISTENER, Trigger::Level)
        .map_err(Error::Wait)?;
    poller
        .watch(signals, SIGNAL, Trigger::Level)
        .map_err(Error::Wait)?;
    let mut silent: Vec<UnixStream> = Vec::new();
    let mut active: Option<Active> = None;
    let mut ready = Vec::new();
    loop {
        poller
            .wait(-1, |token| ready.push(token))
            .map_err(Error::Wait)?;
        for token in ready.drain(..) {
            match token {
                SIGNAL => {
                    if let Some(active) = active.take() {
                        active.end();
                    }
                    return Ok(());
                }
                LISTENER => accept(listener, &poller, &mut silent),
                spoke => {
                    let Some(at) = silent.iter().position(|stream| token_of(stream) == spoke)
                    else {
                        continue;
                    };
                    let stream = silent.remove(at);
                    if poller.forget(&stream).is_err() || !says_something(&stream) {
                        continue;
                    }
                    if let Some(previous) = active.take() {
                        if !previous.thread.is_finished() {
                            log::warn!("a new front-end takes over from the one connected");
                        }
                        previous.end();
                    }
                    match Active::start(stream, disk.clone()) {
                        Ok(started) => active = Some(started),
                        Err(error) => log::error!("a front-end cannot be served: {error}"),
                    }
                }
            }
        }
    }
}

fn token_of(stream: &UnixStream) -> u64 {
    u64::from(stream.as_raw_fd().unsigned_abs())
}

fn accept(listener: &Listener, poller: &Poller, silent: &mut Vec<UnixStream>) {
    let stream = match listener.socket().accept() {
        Ok((stream, _)) => stream,
        Err(error) => {
            if error.kind() != io::ErrorKind::WouldBlock {
                log::warn!("a connection cannot be accepted: {error}");
                // Out of descriptors, most likely: let some go rather than spin.
                silent.clear();
                thread::sleep(std::time::Duration::from_millis(10));
            }
            return;
        }
    };
    if silent.len() >= MAX_SILENT {
        silent.remove(0);
    }
    match poller.watch(&stream, token_of(&stream), Trigger::Level) {
        Ok(()) => silent.push(stream),
        Err(error) => log::warn!("a connection cannot be watched: {error}"),
    }
}

/// Whether there is a first byte to read, rather than the end of the stream.
fn says_something(stream: &UnixStream) -> bool {
    let mut byte = [0u8];
    matches!(
        recv(stream, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT),
        Ok((1.., _))
    )
}
