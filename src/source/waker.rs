//! Presence of a blob's bytes, requests for absent bytes, and wake-ups when fetches finish.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Blob;

/// Presence of the bytes of a blob that is fetched on demand. Ranges passed in are not empty and end
/// inside the blob. No method waits.
pub trait Presence: Debug + Send + Sync {
    /// Whether all of `len` bytes at `offset` are local. Takes no lock.
    fn is_present(&self, offset: u64, len: u64) -> bool;

    /// Whether all bytes are local and verified, so that [`Presence::is_present`] need not be called until
    /// bytes are rejected. Takes no lock.
    fn is_complete(&self) -> bool {
        false
    }

    /// Requests the bytes of a range. For each call, [`Waker::finish`] is called exactly once: when all
    /// bytes are present, when they cannot be fetched, or when the fetch deadline has passed. This may
    /// happen before the method returns.
    fn request(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket);

    /// Suggests to fetch a range that will probably be requested soon.
    fn fetch_ahead(&self, offset: u64, len: u64);

    /// Suggests to fetch a range that is in a trace.
    fn replay(&self, offset: u64, len: u64) {
        self.fetch_ahead(offset, len);
    }

    /// Marks a range with damaged bytes as absent, so that it is fetched again. Returns false, and leaves
    /// the range present, if it was fetched again too often.
    fn reject(&self, offset: u64, len: u64) -> bool;

    /// Marks all bytes absent, because an unknown part of them is damaged: each range is fetched again when
    /// it is requested. Returns false, and changes nothing, if this was done too often.
    fn distrust(&self) -> bool {
        false
    }

    /// Ends [`Presence::distrust`]: bytes that were not requested since then are present again.
    fn trust(&self) {}

    /// The same blob in another file, which has the bytes that arrived since the cache lost this one.
    fn successor(&self) -> Option<&Blob> {
        None
    }

    /// Bytes that are local, as far as they are counted.
    fn local_bytes(&self) -> u64 {
        0
    }

    /// Longest time that a blocking reader should wait for a range.
    fn patience(&self) -> Duration;
}

/// Identifies a parked request of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Outcome of one fetch.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Ticket of the request.
    pub ticket: Ticket,
    /// `Ok` if the range became present. It may be absent again, so the caller locates it again.
    pub result: Result<(), FetchError>,
}

/// Why bytes cannot be fetched.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct FetchError {
    kind: FetchErrorKind,
    reason: Arc<str>,
}

impl FetchError {
    /// Creates an error; `reason` says what was expected, what was found, and what to do.
    pub fn new(kind: FetchErrorKind, reason: impl Into<Arc<str>>) -> Self {
        let reason = reason.into();
        Self { kind, reason }
    }

    /// Kind of the error.
    pub fn kind(&self) -> FetchErrorKind {
        self.kind
    }
}

/// Kinds of errors that callers distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FetchErrorKind {
    /// The registry refuses the credentials, or needs some and there are none.
    Unauthorized,
    /// The registry does not have the blob.
    NotFound,
    /// The registry cannot be reached.
    Unreachable,
    /// The registry asks for patience.
    Busy,
    /// The registry's answer does not serve the request.
    Unexpected,
    /// Neither bytes nor an error came before the deadline.
    Timeout,
    /// The bytes from the registry do not have the digest or length of the blob.
    Damaged,
    /// The system lacks what fetching needs: disk space, memory, descriptors.
    System,
}

impl FetchErrorKind {
    /// Text that upstream writes to an image's `resultFile` for errors of this kind.
    pub const fn upstream_words(self) -> &'static str {
        match self {
            Self::Unauthorized => "Authentication failed",
            Self::NotFound => "No such file or directory",
            Self::Unreachable => "Connection failed",
            Self::Timeout => "Get meta timedout",
            Self::Busy => "Too many requests",
            Self::Unexpected | Self::Damaged => "Unexpected response",
            Self::System => "Input/output error",
        }
    }
}

/// Receives the outcomes of fetches for one thread. Its descriptor is readable while there are outcomes to
/// take.
#[derive(Debug)]
pub struct Waker {
    event: OwnedFd,
    finished: Mutex<Vec<Fetched>>,
}

impl Waker {
    /// Creates a waker without outcomes.
    ///
    /// # Errors
    /// The process has no descriptor left for the eventfd.
    pub fn new() -> io::Result<Arc<Self>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let finished = Mutex::new(Vec::new());
        Ok(Arc::new(Self { event, finished }))
    }

    /// Adds an outcome and wakes the thread.
    pub fn finish(&self, ticket: Ticket, result: Result<(), FetchError>) {
        let outcome = Fetched { ticket, result };
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        finished.push(outcome);
        // Any number but zero makes the descriptor readable. The write fails only at the limit of the
        // counter, when the descriptor is readable anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_le_bytes());
    }

    /// Moves all outcomes to the end of `into`.
    pub fn take(&self, into: &mut Vec<Fetched>) {
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        // Resets the counter; fails if it is zero.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        into.append(&mut finished);
    }

    /// Waits for an outcome.
    ///
    /// # Errors
    /// The outcome's own; [`FetchErrorKind::System`] if the system refuses to wait.
    pub fn wait(&self) -> Result<(), FetchError> {
        let mut finished = Vec::new();
        loop {
            self.take(&mut finished);
            if let Some(outcome) = finished.pop() {
                return outcome.result;
            }
            match poll(&mut [PollFd::new(self, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(FetchError::new(FetchErrorKind::System, errno.to_string()));
                }
            }
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
