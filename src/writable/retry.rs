//! Policy for repeating a change after a flush. Queue workers, which leave the flush to their offload thread, and
//! threads that may wait both use it.

use super::Error;

/// Most flushes of one change for lack of space: other changes may take the space that a flush frees.
const MAX_FLUSHES: u32 = 3;

/// The flushes of one change.
#[derive(Debug, Default)]
pub struct FlushRetries {
    for_space: u32,
}

impl FlushRetries {
    /// Returns whether to flush and repeat the change, which failed with `error`.
    pub fn allow(&mut self, error: &Error) -> bool {
        match error {
            // A flush always makes room for mappings.
            Error::PendingFull { .. } => true,
            Error::Full {
                will_free: true, ..
            } if self.for_space < MAX_FLUSHES => {
                self.for_space += 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flushes_that_may_help_are_allowed() {
        let full = |will_free| Error::Full {
            path: "data".into(),
            limit: 0,
            will_free,
        };
        let mut retries = FlushRetries::default();
        assert!(!retries.allow(&full(false)) && !retries.allow(&Error::ReadOnly));
        let allowed = (0..10).filter(|_| retries.allow(&full(true))).count();
        assert_eq!(allowed, MAX_FLUSHES as usize);
        assert!(retries.allow(&Error::PendingFull { most: 1 }));
    }
}
