//! Accepts front-end connections of one disk and starts a thread for each.
//!
//! A new connection gets its thread when its first bytes arrive, so that a probe that connects and leaves costs no
//! thread. The threads decide among themselves which front-end has the disk
//! ([`ownership`](crate::vhost::ownership)). The accepting thread waits for none of them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use sd_notify::NotifyState;

use super::Error;
use super::control::Control;
use super::device::Device;
use super::listener::Listener;
use super::notify::Manager;
use crate::io::poller::{Poller, Trigger};
use crate::ratelimited_log;
use crate::vhost::serving;
use crate::vhost::session::Session;

/// Most connections without a message so far, and most connections that wait for a thread. The oldest is closed for
/// a new one.
const MAX_SILENT: usize = 16;

/// Pause between two interrupts of a thread that is to end, in milliseconds.
const INTERRUPT_PERIOD: i32 = 20;

/// How long queues may take to drain after a stop signal. Reads of local storage take far less, and service managers
/// wait longer.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// How long the final flush may take: several seconds on slow storage.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

const LISTENER: u64 = u64::MAX;
const SIGNAL: u64 = u64::MAX - 1;
const CONTROL: u64 = u64::MAX - 2;

/// A connection without a message so far.
struct Silent {
    /// Token of the poller. Unlike a descriptor, it is never reused.
    token: u64,
    stream: UnixStream,
}

/// A connection being served.
struct Connection {
    /// Token that the poller reports when the thread ends.
    token: u64,
    session: Arc<Session>,
    thread: JoinHandle<()>,
    /// Read end of a pipe whose write end the thread closes when it ends.
    _ended: io::PipeReader,
    /// Whether it was told to end.
    leaving: bool,
}

impl Connection {
    /// Starts the thread of a connection. `poller` reports its end with `token`.
    fn start(
        stream: UnixStream,
        device: &Arc<Device>,
        poller: &Poller,
        token: u64,
    ) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let session = device.connect(stream);
        let (ended, end) = io::pipe()?;
        // Watched first: without that, the end of the thread would go unnoticed.
        poller.watch(&ended, token, Trigger::Level)?;
        let (theirs, device) = (session.clone(), device.clone());
        let thread = thread::Builder::new()
            .name("front-end".to_owned())
            .spawn(move || {
                let _end = end;
                // The session logs why it ended.
                let _ = serving::serve(&theirs, device.ownership());
            })?;
        Ok(Self {
            token,
            session,
            thread,
            _ended: ended,
            leaving: false,
        })
    }

    /// Returns whether it is to end.
    fn is_leaving(&self) -> bool {
        self.leaving || self.session.is_retired()
    }

    /// Joins a thread that ended, and logs a panic.
    fn reap(self) {
        if self.thread.join().is_err() {
            ratelimited_log::error(format_args!(
                "the thread of a front-end connection panicked"
            ));
        }
    }
}

/// Serves front-ends of `device`, and clients of its control API, until `signals` becomes readable. Then drains all queues and flushes
/// the disk.
///
/// # Errors
///
/// [`Error::Wait`] if the daemon cannot wait for connections; [`Error::Drain`] if a queue does not drain in time;
/// [`Error::Flush`] and [`Error::FlushLate`] if writes may not be durable.
pub fn serve(
    listener: &Listener,
    control: Option<&Arc<Control>>,
    device: &Arc<Device>,
    signals: &OwnedFd,
    manager: &Manager,
) -> Result<(), Error> {
    let mut connections =
        Connections::new(listener, control, device, signals).map_err(Error::Wait)?;
    connections.serve().map_err(Error::Wait)?;
    log::info!("received a stop signal");
    manager.tell(&NotifyState::Stopping);
    let served = connections.served.iter();
    let sessions: Vec<_> = served.map(|served| served.session.clone()).collect();
    sessions.iter().for_each(|session| session.hang_up());
    drain(
        move || sessions.iter().for_each(|session| session.retire()),
        DRAIN_LIMIT,
    )?;
    flush(device, FLUSH_LIMIT)?;
    log::info!("stopped");
    Ok(())
}

/// Makes all writes durable within `limit`. Writes that are not durable by then stay in the page cache and the
/// journal.
fn flush(device: &Arc<Device>, limit: Duration) -> Result<(), Error> {
    if !device.volume().is_writable() {
        return Ok(());
    }
    let (done, flushed) = mpsc::channel();
    let device = device.clone();
    thread::Builder::new()
        .name("last-flush".to_owned())
        .spawn(move || done.send(device.volume().flush()))
        .map_err(Error::Wait)?;
    match flushed.recv_timeout(limit) {
        Ok(flushed) => flushed.map_err(Error::Flush),
        Err(_) => Err(Error::FlushLate {
            seconds: limit.as_secs(),
        }),
    }
}

/// Runs `stop`, which stops all queues, and waits at most `limit` for it.
fn drain(stop: impl FnOnce() + Send + 'static, limit: Duration) -> Result<(), Error> {
    let (done, drained) = mpsc::channel();
    thread::Builder::new()
        .name("drain".to_owned())
        .spawn(move || {
            stop();
            done.send(())
        })
        .map_err(Error::Wait)?;
    drained.recv_timeout(limit).map_err(|_| Error::Drain {
        seconds: limit.as_secs(),
    })
}

/// The connections of a listener.
struct Connections<'a> {
    listener: &'a Listener,
    control: Option<&'a Arc<Control>>,
    device: &'a Arc<Device>,
    poller: Arc<Poller>,
    /// Token of the next connection or thread.
    next_token: u64,
    silent: Vec<Silent>,
    /// Connections that wait for a thread, oldest first.
    waiting: Vec<UnixStream>,
    /// Oldest first.
    served: Vec<Connection>,
}

impl<'a> Connections<'a> {
    fn new(
        listener: &'a Listener,
        control: Option<&'a Arc<Control>>,
        device: &'a Arc<Device>,
        signals: &OwnedFd,
    ) -> io::Result<Self> {
        let poller = Arc::new(Poller::new()?);
        poller.watch(listener.socket(), LISTENER, Trigger::Level)?;
        poller.watch(signals, SIGNAL, Trigger::Level)?;
        if let Some(control) = control {
            control.watch(&poller, CONTROL)?;
        }
        Ok(Self {
            listener,
            control,
            device,
            poller,
            next_token: 0,
            silent: Vec::new(),
            waiting: Vec::new(),
            served: Vec::new(),
        })
    }

    /// Serves front-ends, and clients of the control API, until a signal comes.
    fn serve(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        loop {
            let mut leaving = self.served.iter().filter(|served| served.is_leaving());
            let timeout = match leaving.next() {
                Some(_) => INTERRUPT_PERIOD,
                None => -1,
            };
            self.poller.wait(timeout, |token| ready.push(token))?;
            for token in ready.drain(..) {
                match token {
                    SIGNAL => return Ok(()),
                    LISTENER => self.accept(),
                    CONTROL => {
                        let control = self.control.into_iter();
                        control.for_each(|control| control.accept(&self.poller, CONTROL));
                    }
                    token => self.go_on(token),
                }
            }
            for leaving in self.served.iter().filter(|served| served.is_leaving()) {
                leaving.session.interrupt();
            }
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.socket().accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                ratelimited_log::warn(format_args!(
                    "cannot accept a front-end connection: {error}"
                ));
                // Most likely, no descriptors are left: close some instead of spinning.
                self.silent.clear();
                thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        if self.silent.len() >= MAX_SILENT {
            self.silent.remove(0);
        }
        let token = self.token();
        match self.poller.watch(&stream, token, Trigger::Level) {
            Ok(()) => self.silent.push(Silent { token, stream }),
            Err(error) => {
                ratelimited_log::warn(format_args!("cannot watch a front-end connection: {error}"));
            }
        }
    }

    /// Handles the token of a connection: its thread ended, or its first bytes arrived.
    fn go_on(&mut self, token: u64) {
        let ended = |connection: &Connection| connection.token == token;
        if let Some(at) = self.served.iter().position(ended) {
            self.served.remove(at).reap();
            self.serve_waiting();
            return;
        }
        let Some(at) = self.silent.iter().position(|silent| silent.token == token) else {
            return;
        };
        let stream = self.silent.remove(at).stream;
        if self.poller.forget(&stream).is_err() || !says_something(&stream) {
            return;
        }
        if self.waiting.len() >= MAX_SILENT {
            self.waiting.remove(0);
        }
        self.waiting.push(stream);
        self.serve_waiting();
    }

    /// Starts threads for the connections that wait, as far as the limit allows.
    fn serve_waiting(&mut self) {
        while !self.waiting.is_empty() && self.make_room() {
            let stream = self.waiting.remove(0);
            let token = self.token();
            match Connection::start(stream, self.device, &self.poller, token) {
                Ok(connection) => self.served.push(connection),
                Err(error) => {
                    ratelimited_log::error(format_args!(
                        "cannot serve a front-end connection: {error}"
                    ));
                }
            }
        }
    }

    /// Returns a new token. A connection uses two of 2^64, so they do not run out.
    fn token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    /// Closes the oldest connection without the disk if the limit is reached. Returns whether one more connection may
    /// have a thread now. Two always may: the next front-end connects before the one with the disk disconnects.
    fn make_room(&mut self) -> bool {
        let leaving = self.served.iter().filter(|served| served.leaving).count();
        let staying = self.served.len() - leaving;
        if staying >= self.device.max_front_ends().saturating_sub(1).max(2)
            && leaving < self.waiting.len()
        {
            let ownership = self.device.ownership();
            let idle =
                |served: &&mut Connection| !served.leaving && !ownership.has(&served.session);
            if let Some(oldest) = self.served.iter_mut().find(idle) {
                oldest.leaving = true;
                oldest.session.hang_up();
            }
        }
        self.served.len() < self.device.max_front_ends()
    }
}

/// Returns whether a first byte can be read, and not the end of the stream.
fn says_something(stream: &UnixStream) -> bool {
    let mut byte = [0u8];
    matches!(
        recv(stream, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT),
        Ok((1.., _))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_that_do_not_drain_are_given_up() {
        let (release, stuck) = mpsc::channel::<()>();
        let stop = move || {
            let _ = stuck.recv();
        };
        let error = drain(stop, Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, Error::Drain { .. }), "{error:?}");
        drop(release);
        drain(|| {}, Duration::from_secs(60)).unwrap();
    }
}
