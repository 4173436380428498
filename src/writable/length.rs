//! Noticing that somebody cut the data file short: to write behind its end then would make zeros of
//! what is missing.

use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::{SeekFrom, seek};

use super::{Error, WritableLayer};

impl WritableLayer {
    /// Refuses a data file that is shorter than what was written to it. On some file systems this waits
    /// for a sync under way, as a write does.
    pub(super) fn check_len(&self) -> Result<(), Error> {
        // The position is nobody's; to ask for all attributes would take a third of a small write's
        // time.
        self.expect_len(|| Ok(seek(&self.file, SeekFrom::End(0))?))
    }

    /// The same, for who must not wait for a sync of another's.
    pub(super) fn check_len_apart(&self) -> Result<(), Error> {
        self.expect_len(|| Ok(self.file.metadata()?.len()))
    }

    fn expect_len(&self, find: impl FnOnce() -> io::Result<u64>) -> Result<(), Error> {
        // In this order: it grows meanwhile.
        let expected = self.len.load(Ordering::Acquire);
        let found = find().map_err(Error::file("examine", &self.paths.data))?;
        match found < expected {
            true => Err(Error::CutShort {
                path: self.paths.data.clone(),
                expected,
                found,
            }),
            false => Ok(()),
        }
    }
}
