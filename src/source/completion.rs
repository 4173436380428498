//! Whether a blob that was opened as partial is known to be complete.
//!
//! A partial blob is looked up in its presence map before each read. Once the fetcher has verified the whole
//! blob, its bytes never change again, and it is read like a local file: [`Completion`] remembers that, and
//! costs a reader one load. A blob with damaged bytes is looked up again, and so is one whose reads are
//! recorded.

use std::sync::atomic::{AtomicU8, Ordering};

/// All bytes are local and verified.
const COMPLETE: u8 = 1;
/// Some bytes were rejected.
const REJECTED: u8 = 2;
/// Reads are recorded.
const RECORDED: u8 = 4;

/// What is known of a blob as a whole. Threads share it without a lock.
#[derive(Debug, Default)]
pub(super) struct Completion(AtomicU8);

impl Completion {
    /// Whether all bytes are known to be local, and no read is recorded.
    #[inline]
    pub(super) fn is_known(&self) -> bool {
        self.0.load(Ordering::Acquire) == COMPLETE
    }

    /// Notes that all bytes are local, unless some were rejected: a thread that found the blob complete
    /// before another thread rejected bytes of it changes nothing.
    pub(super) fn note(&self) {
        let (set, failed) = (Ordering::AcqRel, Ordering::Relaxed);
        let noted = |state: u8| (state & REJECTED == 0).then_some(state | COMPLETE);
        let _ = self.0.fetch_update(set, failed, noted);
    }

    /// Whether reads are recorded.
    pub(super) fn is_recorded(&self) -> bool {
        self.0.load(Ordering::Acquire) & RECORDED != 0
    }

    /// Sets whether reads are recorded.
    pub(super) fn set_recorded(&self, is_recorded: bool) {
        match is_recorded {
            true => self.0.fetch_or(RECORDED, Ordering::AcqRel),
            false => self.0.fetch_and(!RECORDED, Ordering::AcqRel),
        };
    }

    /// Notes that bytes were rejected.
    pub(super) fn revoke(&self) {
        self.0.fetch_or(REJECTED, Ordering::AcqRel);
        self.0.fetch_and(!COMPLETE, Ordering::AcqRel);
    }

    /// Notes that no byte counts as rejected any more.
    pub(super) fn reset(&self) {
        self.0.fetch_and(RECORDED, Ordering::AcqRel);
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

    #[test]
    fn a_recorded_blob_is_looked_up_until_the_recording_ends() {
        let completion = Completion::default();
        completion.set_recorded(true);
        completion.note();
        assert!(completion.is_recorded() && !completion.is_known());
        completion.reset();
        completion.note();
        completion.set_recorded(false);
        assert!(completion.is_known() && !completion.is_recorded());
    }
}
