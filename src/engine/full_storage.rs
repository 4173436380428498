//! Requests of a disk that wait until the storage of its writable layer has space again, counted over all queues.
//!
//! A request waits in its queue worker, which repeats it from time to time. Its [`SpaceWait`] stays with it from the
//! first failure to its end. While there is one, the disk is paused: a line in the log says when that begins and when it
//! ends.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::ratelimited_log;
use crate::writable::{Error, OnFull};

/// What happens to requests of a disk while its storage is full, and which wait now.
#[derive(Debug)]
pub struct FullStorage {
    on_full: OnFull,
    waits: Mutex<Waits>,
}

#[derive(Debug, Default)]
struct Waits {
    /// Number of waiting requests.
    now: usize,
    /// Time since which there is one.
    since: Option<Instant>,
    pauses: u64,
}

/// One request that waits.
#[derive(Debug)]
pub struct SpaceWait<'a>(&'a FullStorage);

impl FullStorage {
    /// No request waits.
    pub fn new(on_full: OnFull) -> Self {
        Self {
            on_full,
            waits: Mutex::default(),
        }
    }

    /// Returns whether a request that failed with `error` waits for space.
    pub fn pauses_on(&self, error: &Error) -> bool {
        self.on_full.waits(error)
    }

    /// Begins the wait of a request; `reason` is why it cannot go on.
    pub fn begin_wait(&self, reason: &str) -> SpaceWait<'_> {
        let mut waits = self.waits();
        waits.now += 1;
        if waits.now == 1 {
            waits.since = Some(Instant::now());
            waits.pauses += 1;
            ratelimited_log::warn(format_args!(
                "the storage is full: writes wait until there is space ({reason})"
            ));
        }
        SpaceWait(self)
    }

    /// Number of requests that wait now.
    pub fn waiting(&self) -> usize {
        self.waits().now
    }

    /// Number of times that requests began to wait while no other did.
    pub fn pauses(&self) -> u64 {
        self.waits().pauses
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SpaceWait<'_> {
    fn drop(&mut self) {
        let mut waits = self.0.waits();
        waits.now -= 1;
        if waits.now == 0 {
            let seconds = waits
                .since
                .take()
                .map_or(0, |since| since.elapsed().as_secs());
            ratelimited_log::warn(format_args!(
                "no write waits for space in the storage any more, after {seconds} s"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_lasts_as_long_as_any_request_waits() {
        let storage = FullStorage::new(OnFull::Pause);
        let first = storage.begin_wait("a");
        let second = storage.begin_wait("b");
        assert_eq!((storage.waiting(), storage.pauses()), (2, 1));
        drop(first);
        let third = storage.begin_wait("c");
        drop((second, third));
        assert_eq!((storage.waiting(), storage.pauses()), (0, 1));
        drop(storage.begin_wait("d"));
        assert_eq!((storage.waiting(), storage.pauses()), (0, 2));
    }
}
