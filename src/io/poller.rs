//! An epoll instance that closes its descriptor when it is dropped.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use epoll::{ControlOptions, Event, Events};

/// Events returned by one `epoll_wait(2)`.
const BATCH: usize = 16;

/// An epoll instance.
#[derive(Debug)]
pub struct Poller {
    epoll: RawFd,
}

/// When a descriptor is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// While it is readable.
    Level,
    /// After each new write to it, even if it was not read.
    Edge,
    /// Once, when it is readable, until [`Poller::watch_again`].
    Once,
}

impl Trigger {
    fn events(self) -> Events {
        match self {
            Trigger::Level => Events::EPOLLIN | Events::EPOLLRDHUP,
            Trigger::Edge => Events::EPOLLIN | Events::EPOLLET,
            Trigger::Once => Events::EPOLLIN | Events::EPOLLONESHOT,
        }
    }
}

impl Poller {
    /// Creates an epoll instance without descriptors.
    ///
    /// # Errors
    /// That of `epoll_create(2)`.
    pub fn new() -> io::Result<Poller> {
        Ok(Poller {
            epoll: epoll::create(true)?,
        })
    }

    /// Adds `fd`: [`Poller::wait`] reports `token` when `fd` is readable or its peer hangs up. Closing
    /// `fd` removes it.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`.
    pub fn watch(&self, fd: &impl AsRawFd, token: u64, trigger: Trigger) -> io::Result<()> {
        let (add, fd) = (ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd());
        epoll::ctl(self.epoll, add, fd, Event::new(trigger.events(), token))
    }

    /// Watches `fd`, which was added with [`Trigger::Once`], once more; any thread may call this.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`.
    pub fn watch_again(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let event = Event::new(Trigger::Once.events(), token);
        epoll::ctl(
            self.epoll,
            ControlOptions::EPOLL_CTL_MOD,
            fd.as_raw_fd(),
            event,
        )
    }

    /// Removes `fd`.
    ///
    /// # Errors
    /// That of `epoll_ctl(2)`.
    pub fn forget(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let (delete, fd) = (ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd());
        epoll::ctl(self.epoll, delete, fd, Event::new(Events::empty(), 0))
    }

    /// Waits up to `timeout` milliseconds (-1: no limit) and calls `each` with the token of each ready
    /// descriptor. Returns early, without a token, after a signal.
    ///
    /// # Errors
    /// That of `epoll_wait(2)`, except for an interruption.
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
