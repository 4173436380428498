//! Policy for repeating a change that failed: after a flush ([`FlushRetries`]), or once the storage has space
//! ([`OnFull`]). Queue workers, which leave the flush to their offload thread, and threads that may wait both use it.

use serde::{Deserialize, Serialize};

use super::Error;

/// Most flushes of one change for lack of space: other changes may take the space that a flush frees.
const MAX_FLUSHES: u32 = 3;

/// What becomes of a request for which the file system has no space (`ENOSPC`, `EDQUOT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFull {
    /// It fails.
    #[default]
    Error,
    /// It waits until there is space.
    Pause,
}

impl OnFull {
    /// Returns the word for it on command lines and in requests.
    pub fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Pause => "pause",
        }
    }

    /// Returns whether a change that failed with `error` waits for space.
    ///
    /// At the limit of a layer ([`Error::Full`]) no change waits: it is not the storage that is full. Only the guest makes
    /// space there, by a discard, and it learns that from the error.
    pub fn waits(self, error: &Error) -> bool {
        self == OnFull::Pause && error.is_full()
    }
}

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
    use std::path::Path;

    use rustix::io::Errno;

    use super::*;

    #[test]
    fn a_change_waits_for_space_and_for_nothing_else() {
        let of = |errno: Errno| Error::bytes("write", Path::new("data"), 0)(errno.into());
        let index_full = |errno| Error::IndexFull {
            path: "index".into(),
            most: 1,
            source: of(errno).into(),
        };
        let lost = Error::DataLost {
            path: "data".into(),
            source: Errno::NOSPC.into(),
        };
        let limit = Error::Full {
            path: "data".into(),
            limit: 0,
            will_free: false,
        };
        for waits in [of(Errno::NOSPC), of(Errno::DQUOT), index_full(Errno::NOSPC)] {
            assert!(OnFull::Pause.waits(&waits), "{waits}");
            assert!(!OnFull::Error.waits(&waits), "{waits}");
        }
        for fails in [
            of(Errno::IO),
            of(Errno::FBIG),
            index_full(Errno::IO),
            lost,
            limit,
        ] {
            assert!(!OnFull::Pause.waits(&fails), "{fails}");
        }
    }

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
