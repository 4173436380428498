//! Waiting for several descriptors at once: the `epoll` crate, with the descriptor owned.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use epoll::{ControlOptions, Event, Events};

/// Events taken at a time.
const BATCH: usize = 16;

/// An epoll instance.
#[derive(Debug)]
pub struct Poller {
    epoll: RawFd,
}

/// How a descriptor is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Reported as long as it is readable.
    Level,
    /// Reported at each new write to it, without reading it.
    Edge,
}

impl Poller {
    /// A poller that watches nothing.
    pub fn new() -> io::Result<Poller> {
        Ok(Poller {
            epoll: epoll::create(true)?,
        })
    }

    /// Reports `token` when `fd` becomes readable or its peer hangs up. Watch it no longer than it
    /// is open: closing it ends the watch.
    pub fn watch(&self, fd: &impl AsRawFd, token: u64, trigger: Trigger) -> io::Result<()> {
        let events = match trigger {
            Trigger::Level => Events::EPOLLIN | Events::EPOLLRDHUP,
            Trigger::Edge => Events::EPOLLIN | Events::EPOLLET,
        };
        let (add, fd) = (ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd());
        epoll::ctl(self.epoll, add, fd, Event::new(events, token))
    }

    /// Stops watching `fd`.
    pub fn forget(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let (delete, fd) = (ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd());
        epoll::ctl(self.epoll, delete, fd, Event::new(Events::empty(), 0))
    }

    /// Waits, at most `timeout` milliseconds (-1: for ever), and calls `each` with the tokens of
    /// what is ready. A signal ends the wait with nothing ready.
    pub fn wait(&self, timeout: i32, mut each: impl FnMut(u64)) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); BATCH];
        match epoll::wait(self.epoll, timeout, &mut events) {
            Ok(count) => {
                for event in &events[..count] {
                    each(event.data);
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        let closed = epoll::close(self.epoll);
        debug_assert!(closed.is_ok());
    }
}
