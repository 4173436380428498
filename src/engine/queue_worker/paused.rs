//! Requests that wait until the storage of the writable layer has space again. They are repeated each second, in their
//! order; reads and other requests go on meanwhile.
//!
//! The functions are not inlined, to keep the loop small for reads.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::mem;
use std::time::{Duration, Instant};

use super::QueueWorker;
use super::unfinished_write::UnfinishedWrite;
use crate::engine::full_storage::SpaceWait;
use crate::engine::offload::VolumeOperation;
use crate::engine::request::{Request, RequestEnd};
use crate::ratelimited_log;

/// Time between two attempts.
const RETRY_PERIOD: Duration = Duration::from_secs(1);

/// Request that waits for space.
#[derive(Debug)]
pub(super) enum Paused<'a> {
    /// A write, which is repeated.
    Write(UnfinishedWrite<'a>, SpaceWait<'a>),
    /// A request whose operation is repeated.
    Operation(Request<'a>, VolumeOperation, SpaceWait<'a>),
}

impl<'a> Paused<'a> {
    fn request(&self) -> &Request<'a> {
        match self {
            Paused::Write(write, _) => write.request(),
            Paused::Operation(request, ..) => request,
        }
    }

    fn into_request(self) -> Request<'a> {
        match self {
            Paused::Write(write, _) => write.into_request(),
            Paused::Operation(request, ..) => request,
        }
    }
}

/// The requests of one worker that wait for space.
#[derive(Debug, Default)]
pub struct PausedRequests<'a> {
    /// Oldest first.
    requests: Vec<Paused<'a>>,
    /// Pieces of guest memory that they hold.
    pieces: usize,
    /// Time of the next attempt. `None`: no request waits.
    retry_at: Option<Instant>,
}

impl<'a> PausedRequests<'a> {
    fn push(&mut self, paused: Paused<'a>) {
        self.pieces += paused.request().chain().readable().pieces().len();
        self.requests.push(paused);
        self.retry_at
            .get_or_insert_with(|| Instant::now() + RETRY_PERIOD);
    }

    fn take(&mut self) -> Vec<Paused<'a>> {
        mem::take(self).requests
    }

    fn is_due(&self) -> bool {
        self.retry_at.is_some_and(|at| at <= Instant::now())
    }

    /// Pieces of guest memory that the requests hold.
    #[inline]
    pub fn pieces(&self) -> usize {
        self.pieces
    }

    /// Shortens `timeout`, in milliseconds (-1: none), to the time until the next attempt.
    pub fn shorten(&self, timeout: i32) -> i32 {
        let Some(at) = self.retry_at else {
            return timeout;
        };
        let left = at.saturating_duration_since(Instant::now());
        // Rounded up, so that the attempt is due after the sleep. At most the period.
        let left = left.as_millis() as i32 + 1;
        match timeout {
            0.. => timeout.min(left),
            _ => left,
        }
    }
}

impl<'a> QueueWorker<'a> {
    /// Keeps a request until the storage has space.
    #[cold]
    pub(super) fn pause(&mut self, paused: Paused<'a>) {
        self.paused.push(paused);
    }

    /// Repeats the waiting requests if it is time; returns whether there were any.
    #[inline(never)]
    pub(super) fn retry_paused(&mut self) -> bool {
        if !self.paused.is_due() {
            return false;
        }
        // Discarded data keeps its space until the next flush, which the guest may not send.
        let flush = self.backend.volume().frees_by_flush();
        for paused in self.paused.take() {
            match paused {
                Paused::Write(write, wait) if flush => self.flush_and_retry(write, Some(wait)),
                Paused::Write(write, wait) => self.try_write(write, Some(wait)),
                Paused::Operation(request, operation, wait) => {
                    self.repeat_operation(request, operation, wait)
                }
            }
        }
        true
    }

    /// Leaves the waiting requests to the next worker of the queue; without an in-flight area they fail.
    pub(super) fn give_up_paused(&mut self) {
        let paused = self.paused.take();
        if paused.is_empty() {
            return;
        }
        let (index, count) = (self.index, paused.len());
        let end = match self.queue.is_tracked() {
            true => "stay in the in-flight area",
            false => "fail: there is no in-flight area",
        };
        ratelimited_log::warn(format_args!(
            "queue {index} stops while the storage is full: waiting requests ({count}) {end}"
        ));
        for paused in paused {
            self.finish(paused.into_request().finish(RequestEnd::Open, 0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_ends_when_the_next_attempt_is_due() {
        let none = PausedRequests::default();
        assert_eq!((none.shorten(-1), none.shorten(1)), (-1, 1));
        let waiting = |left| PausedRequests {
            retry_at: Some(Instant::now() + left),
            ..PausedRequests::default()
        };
        let later = waiting(Duration::from_secs(1000));
        assert!((900_000..=1_000_001).contains(&later.shorten(-1)));
        assert_eq!(later.shorten(1), 1);
        let due = waiting(Duration::ZERO);
        assert!(due.is_due() && !later.is_due());
        assert_eq!(due.shorten(-1), 1);
    }
}
