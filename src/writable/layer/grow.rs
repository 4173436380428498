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
    /// Killed at any moment, the next start finds the old size or the new one; doing it again does the rest.
    ///
    /// # Errors
    /// As [`WritableLayer::flush`]; [`Error::Bytes`] and [`Error::File`] if a header cannot be written or made
    /// durable. The layer then goes on with its old size.
    pub(in super::super) fn grow(&self, size: u64) -> Result<(), Error> {
        // What a failed sync below would lose is durable before.
        self.flush()?;
        let flusher = self.flush.lock();
        self.check()?;
        let old = self.header();
        let new = Header {
            virtual_size: size,
            ..(*old).clone()
        };
        let written = self.enlarge_file(size).and_then(|()| {
            let written = self.write_headers(&flusher, &new);
            written.inspect_err(|_| {
                // The next start should find the size that is served; if not, it finds the new one.
                let _ = self.write_headers(&flusher, &old);
            })
        });
        written?;
        self.coverage.grow(Sector::at_or_after(size));
        self.header.store(Arc::new(new));
        Ok(())
    }

    /// Makes the data file of a sparse layer as long as its disk is to be.
    fn enlarge_file(&self, size: u64) -> Result<(), Error> {
        if self.kind == Kind::Sparse {
            self.data.enlarge(size + HEADER_LEN as u64)?;
            self.sync_data()?;
        }
        Ok(())
    }

    /// Writes the headers of both files, each durable before what comes next.
    fn write_headers(&self, flusher: &Flusher, header: &Header) -> Result<(), Error> {
        self.data.write_header(header, self.kind)?;
        self.sync_data()?;
        flusher.index.set_header(header)
    }
}
