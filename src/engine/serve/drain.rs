//! How a queue comes to rest: what was taken is finished, nothing more is taken.

use super::QueueWorker;
use crate::engine::ratelimited_log;

impl QueueWorker<'_> {
    /// Finishes what was taken, by this process or one before it; returns the available index to
    /// go on from.
    pub fn drain(&mut self) -> u16 {
        while let Some(head) = self.queue.pop_open() {
            if let Err(broken) = self.accept(head) {
                // It stays marked in the in-flight region.
                let index = self.index;
                ratelimited_log::error(format_args!("queue {index}: {broken}"));
            }
            if self.is_full() {
                self.finish_all();
            }
        }
        self.finish_all();
        // Lost memory is the front-end's own doing; nobody reads these answers.
        let _ = self.publish();
        debug_assert_eq!(self.under_way(), 0, "a request was taken and not answered");
        self.queue.next_available()
    }

    /// Finishes what is under way.
    fn finish_all(&mut self) {
        self.advance(0);
        self.start_reads();
        while self.fetcher.is_waiting() {
            if !self.take_reads()
                && let Err(error) = self.fetcher.wait()
            {
                self.fall_back(error);
            }
        }
        self.wait_background();
    }
}
