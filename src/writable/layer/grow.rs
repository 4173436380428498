//! Growing the disk of a layer in use.

use std::sync::Arc;

use super::super::Error;
use super::{Flusher, WritableLayer};
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{HEADER_LEN, Header};
use crate::units::Sector;

impl WritableLayer {
    /// Makes the disk `size` bytes large, at least as large as it is, durably. The layer is the active one, and is
    /// not frozen meanwhile.
    ///
    /// Crash-safe: the next start after an interrupted run finds the old size or the new one; run it again to finish.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`]; [`Error::Bytes`] and [`Error::File`] if a header cannot be written or made
    /// durable. The layer then keeps its old size.
    pub(in super::super) fn grow(&self, size: u64) -> Result<(), Error> {
        // What a failed sync below would lose is durable before.
        self.flush()?;
        let mut flusher = self.flush.lock();
        self.check_not_broken()?;
        let new = Header {
            virtual_size: size,
            ..(*self.header()).clone()
        };
        self.enlarge_file(size)?;
        flusher.files_may_have_other_size = true;
        if let Err(error) = self.write_headers(&mut flusher, &new) {
            // The next start should find the size that is served. If this fails, a snapshot tries again.
            let _ = self.write_headers(&mut flusher, &self.header());
            return Err(error);
        }
        self.coverage.grow(Sector::at_or_after(size));
        self.header.store(Arc::new(new));
        Ok(())
    }

    /// Makes the files have the size of the disk, durably, unless they certainly have it. A growth that failed, and
    /// could not be undone, may have left another size in them.
    ///
    /// # Errors
    /// [`Error::Bytes`] and [`Error::File`] if a header cannot be written or made durable.
    pub(in super::super) fn restore_size(&self) -> Result<(), Error> {
        let mut flusher = self.flush.lock();
        match flusher.files_may_have_other_size {
            true => self.write_headers(&mut flusher, &self.header()),
            false => Ok(()),
        }
    }

    /// Makes the data file of a sparse layer as long as its disk is to be.
    fn enlarge_file(&self, size: u64) -> Result<(), Error> {
        if self.kind == Kind::Sparse {
            self.data.enlarge(size + HEADER_LEN as u64)?;
            self.sync_data()?;
        }
        Ok(())
    }

    /// Writes the headers of both files, each durable before the next step.
    fn write_headers(&self, flusher: &mut Flusher, header: &Header) -> Result<(), Error> {
        self.data.write_header(header, self.kind)?;
        self.sync_data()?;
        flusher.index.set_header(header)?;
        flusher.files_may_have_other_size = false;
        Ok(())
    }
}
