//! Drains a queue that stops: finishes the requests that were taken, and takes no more.

use std::time::{Duration, Instant};

use super::QueueWorker;
use crate::engine::setup::{AfterStop, GRACE};
use crate::ratelimited_log;

impl QueueWorker<'_> {
    /// Finishes the requests that were taken, by this process or an earlier one; returns the available index
    /// to continue from.
    ///
    /// Waits for storage, and up to [`GRACE`] for the fetcher. Reads whose bytes are still absent then stay
    /// open in the in-flight area, or fail if there is none; so do requests for which the storage has no space.
    /// If the queue restarts, its next worker takes them over at once.
    pub fn drain(&mut self, after: AfterStop) -> u16 {
        let grace = match after {
            AfterStop::Restart if self.queue.is_tracked() => Duration::ZERO,
            _ => GRACE,
        };
        let deadline = Instant::now() + grace;
        self.stats.begin_turn();
        while let Some(head) = self.queue.pop_open() {
            if let Err(error) = self.begin_chain(head) {
                // The chain stays marked in the in-flight area.
                let index = self.index;
                ratelimited_log::error(format_args!("queue {index}: {error}"));
            }
            if self.is_full() {
                self.finish_all(deadline);
            }
        }
        self.finish_all(deadline);
        // It fails if the front-end truncated its memory: there is no ring to answer in then.
        let _ = self.publish();
        debug_assert_eq!(self.under_way, 0, "a request was taken and not answered");
        self.queue.next_available()
    }

    /// Finishes the requests under way; gives up those that wait for the fetcher after `deadline`, and those that wait
    /// for space in the storage at once.
    fn finish_all(&mut self, deadline: Instant) {
        self.advance(0);
        self.reads.submit();
        while self.reads.is_active() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && self.reads.is_fetching() {
                self.reads.give_up_fetches();
            } else if !self.take_reads() {
                self.reads.wait(left);
            }
        }
        self.take_finished();
        self.wait_offloaded();
        self.give_up_paused();
    }
}
