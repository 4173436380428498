//! Whether a blob that was opened as partial is known to be complete.
//!
//! A partial blob is looked up in its presence map before each read. Once the fetcher has verified the whole
//! blob, its bytes never change again, and it is read like a local file: [`Completion`] remembers that, and
//! costs a reader one load. A blob with damaged bytes is looked up again.

use std::sync::atomic::{AtomicU8, Ordering};

/// The blob may be partial.
const UNKNOWN: u8 = 0;
/// All bytes are local and verified.
const COMPLETE: u8 = 1;
/// Some bytes were rejected.
const REJECTED: u8 = 2;

/// What is known of a blob as a whole. Threads share it without a lock.
#[derive(Debug, Default)]
pub(super) struct Completion(AtomicU8);

impl Completion {
    /// Whether all bytes are known to be local.
    #[inline]
    pub(super) fn is_known(&self) -> bool {
        self.0.load(Ordering::Acquire) == COMPLETE
    }

    /// Notes that all bytes are local, unless some were rejected: a thread that found the blob complete
    /// before another thread rejected bytes of it changes nothing.
    pub(super) fn note(&self) {
        let (set, failed) = (Ordering::AcqRel, Ordering::Relaxed);
        let _ = self.0.compare_exchange(UNKNOWN, COMPLETE, set, failed);
    }

    /// Notes that bytes were rejected.
    pub(super) fn revoke(&self) {
        self.0.store(REJECTED, Ordering::Release);
    }

    /// Notes that no byte counts as rejected any more.
    pub(super) fn reset(&self) {
        self.0.store(UNKNOWN, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_outlives_what_another_thread_notes_after_it() {
        let completion = Completion::default();
        assert!(!completion.is_known());
        completion.note();
        assert!(completion.is_known());
        completion.revoke();
        completion.note();
        assert!(!completion.is_known());
        completion.reset();
        assert!(!completion.is_known());
        completion.note();
        assert!(completion.is_known());
    }
}
