//! Seals a frozen layer that is open.

use std::sync::atomic::Ordering;

use super::super::Error;
use super::super::seal::remove_index;
use super::WritableLayer;

impl WritableLayer {
    /// Seals the layer, which nothing else uses, and closes it. An interrupted seal is completed.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`] and [`seal`](super::super::seal::seal()); [`Error::File`] if a file cannot be
    /// removed.
    pub fn seal(self) -> Result<(), Error> {
        self.seal_in_use()
    }

    /// Seals the layer of a [`FrozenLayer`](super::super::above::FrozenLayer); then unlocks its file, so that other
    /// processes can open it. An interrupted seal is completed.
    ///
    /// # Errors
    /// As [`WritableLayer::seal`].
    pub(in super::super) fn seal_in_use(&self) -> Result<(), Error> {
        if !self.is_sealed() {
            self.flush()?;
            // A copy: readers must not wait for storage.
            let entries = self.index_entries();
            self.data.seal(&self.header(), self.kind, &entries)?;
            self.sealed.store(true, Ordering::Release);
            self.data.unlock()?;
        }
        match self.paths.index.exists() {
            true => remove_index(&self.paths),
            false => Ok(()),
        }
    }

    /// Returns whether the layer was sealed since it was opened.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }
}
