//! One front-end after the other, on one listener.
//!
//! A connection first waits until it says something: only then does it take over from the one
//! being served, so that a probe that connects and leaves disturbs nobody, while a front-end that
//! replaces its device gets the new one at once.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use sd_notify::NotifyState;

use super::Error;
use super::listener::Listener;
use super::notify::Manager;
use crate::engine::{Disk, ratelimited_log};
use crate::io::poller::{Poller, Trigger};
use crate::vhost::session;

/// Connections that wait to say something; the oldest goes when one more comes.
const MAX_SILENT: usize = 16;

/// How long queues may take to drain after a signal. Reads of local storage end well before, and
/// service managers wait longer.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// How long the last flush may take: some seconds' worth of a slow disk.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

const LISTENER: u64 = u64::MAX;
const SIGNAL: u64 = u64::MAX - 1;

/// The connection being served.
struct Active {
    stream: UnixStream,
    thread: JoinHandle<()>,
    /// Hung up when the thread ends.
    ended: io::PipeReader,
}

impl Active {
    fn start(stream: UnixStream, disk: Arc<Disk>) -> io::Result<Active> {
        stream.set_nonblocking(false)?;
        let theirs = stream.try_clone()?;
        let (ended, end) = io::pipe()?;
        let thread = thread::Builder::new()
            .name("front-end".to_owned())
            .spawn(move || {
                let _end = end;
                match session::serve(theirs, disk) {
                    Ok(()) => log::debug!("the front-end left"),
                    Err(error) => ratelimited_log::warn(format_args!(
                        "the front-end's connection is dropped: {error}"
                    )),
                }
            })?;
        Ok(Active {
            stream,
            thread,
            ended,
        })
    }

    /// Tells the connection's thread to drain its queues and end.
    fn hang_up(&self) {
        // It reads the end of the stream; the front-end sees nothing until the queues are drained.
        // Already closed is as good.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Waits until the thread ends, `signals` becomes readable or, if there is one, the deadline
    /// passes; returns whether the thread ended.
    fn wait(&self, signals: Option<&UnixStream>, deadline: Option<Instant>) -> io::Result<bool> {
        let mut watched = vec![PollFd::new(&self.ended, PollFlags::IN)];
        watched.extend(signals.map(|signals| PollFd::new(signals, PollFlags::IN)));
        loop {
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut watched, left.as_ref()) {
                Ok(_) => return Ok(!watched[0].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reports what became of a thread that ended.
    fn reap(self) {
        if self.thread.join().is_err() {
            ratelimited_log::error(format_args!("a front-end's thread panicked"));
        }
    }
}

/// Serves front-ends until `signals` becomes readable.
///
/// # Errors
///
/// The system does not let us wait for connections, a queue does not drain in time, or what was
/// written does not become durable.
pub fn serve(
    listener: &Listener,
    disk: &Arc<Disk>,
    signals: &UnixStream,
    manager: &Manager,
) -> Result<(), Error> {
    let active = serve_until(listener, disk, signals)?;
    manager.tell(&NotifyState::Stopping);
    active.map_or(Ok(()), |active| drain(active, DRAIN_LIMIT))?;
    flush(disk, FLUSH_LIMIT)
}

/// Makes what was written durable, and waits at most `limit` for it. What is not stays in the page
/// cache, and in the journal.
fn flush(disk: &Arc<Disk>, limit: Duration) -> Result<(), Error> {
    if !disk.volume.is_writable() {
        return Ok(());
    }
    let (done, flushed) = mpsc::channel();
    let disk = disk.clone();
    thread::Builder::new()
        .name("last-flush".to_owned())
        .spawn(move || done.send(disk.volume.flush()))
        .map_err(Error::Wait)?;
    match flushed.recv_timeout(limit) {
        Ok(flushed) => flushed.map_err(Error::Flush),
        Err(_) => Err(Error::FlushLate {
            seconds: limit.as_secs(),
        }),
    }
}

/// Ends a connection, at the latest after `limit`.
fn drain(active: Active, limit: Duration) -> Result<(), Error> {
    active.hang_up();
    let deadline = Instant::now() + limit;
    if active.wait(None, Some(deadline)).map_err(Error::Wait)? {
        active.reap();
        return Ok(());
    }
    Err(Error::Drain {
        seconds: limit.as_secs(),
    })
}

/// Serves front-ends until `signals` becomes readable; returns the one that is served then.
fn serve_until(
    listener: &Listener,
    disk: &Arc<Disk>,
    signals: &UnixStream,
) -> Result<Option<Active>, Error> {
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
                SIGNAL => return Ok(active),
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
                            ratelimited_log::warn(format_args!(
                                "a new front-end takes over from the one connected"
                            ));
                        }
                        previous.hang_up();
                        // As long as it takes: both may share the same memory.
                        if !previous.wait(Some(signals), None).map_err(Error::Wait)? {
                            return Ok(Some(previous));
                        }
                        previous.reap();
                    }
                    match Active::start(stream, disk.clone()) {
                        Ok(started) => active = Some(started),
                        Err(error) => {
                            ratelimited_log::error(format_args!(
                                "a front-end cannot be served: {error}"
                            ));
                        }
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
                ratelimited_log::warn(format_args!("a connection cannot be accepted: {error}"));
                // Out of descriptors, most likely: let some go rather than spin.
                silent.clear();
                thread::sleep(Duration::from_millis(10));
            }
            return;
        }
    };
    if silent.len() >= MAX_SILENT {
        silent.remove(0);
    }
    match poller.watch(&stream, token_of(&stream), Trigger::Level) {
        Ok(()) => silent.push(stream),
        Err(error) => {
            ratelimited_log::warn(format_args!("a connection cannot be watched: {error}"))
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose thread ends when the sender is dropped.
    fn stuck() -> (Active, mpsc::Sender<()>) {
        let (stream, _) = UnixStream::pair().unwrap();
        let (ended, end) = io::pipe().unwrap();
        let (release, stuck) = mpsc::channel();
        let thread = thread::spawn(move || {
            let _end = end;
            let _ = stuck.recv();
        });
        let active = Active {
            stream,
            thread,
            ended,
        };
        (active, release)
    }

    #[test]
    fn a_connection_that_does_not_drain_is_given_up() {
        let (active, release) = stuck();
        let error = drain(active, Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, Error::Drain { .. }), "{error:?}");
        drop(release);
        let (active, release) = stuck();
        drop(release);
        drain(active, Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_signal_ends_the_wait_for_a_front_end_being_replaced() {
        let (active, release) = stuck();
        let (signals, sender) = UnixStream::pair().unwrap();
        drop(sender);
        assert!(!active.wait(Some(&signals), None).unwrap());
        drop(release);
        assert!(active.wait(None, None).unwrap());
        active.reap();
    }
}
