//! The data file of a writable layer in use.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::{Error, seal};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{Header, Mapping};
use crate::io::vectored;
use crate::source::Blob;
use crate::units::{Sector, SectorRange};

/// Least bytes of a write whose writeback starts at once instead of at the next flush: large writes are
/// seldom overwritten soon.
const STREAM: u64 = 128 << 10;

/// An open data file. Ranges are sectors of the file.
#[derive(Debug)]
pub(super) struct DataFile {
    path: PathBuf,
    file: File,
    blob: Arc<Blob>,
    /// Least length of the file in bytes, unless another program truncated it.
    len: AtomicU64,
    /// Whether data was written since the last sync began.
    dirty: AtomicBool,
}

impl DataFile {
    /// Wraps an open file whose data in use ends at `end`.
    ///
    /// # Errors
    /// [`Error::File`] if the process has no descriptors left.
    pub(super) fn new(path: &Path, file: File, end: Sector) -> Result<Self, Error> {
        let again = file.try_clone().map_err(Error::file("open", path))?;
        Ok(Self {
            path: path.to_owned(),
            blob: Arc::new(Blob::changing(path, again)?),
            file,
            len: AtomicU64::new(end.byte()),
            // Writes of an earlier process may not be durable yet.
            dirty: AtomicBool::new(true),
        })
    }

    /// Returns the path by which it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file as readers use it.
    pub(super) fn blob(&self) -> &Arc<Blob> {
        &self.blob
    }

    /// Writes `pieces` of memory, as long as `range` in all, to `range`. `fresh`: the write may extend the file.
    ///
    /// # Errors
    /// [`Error::Bytes`] if the write fails.
    pub(super) fn write(
        &self,
        range: SectorRange,
        pieces: &[VolatileSlice<'_>],
        fresh: bool,
    ) -> Result<(), Error> {
        let bytes = range.bytes();
        let written = vectored::write_all_at(&self.file, pieces, bytes.start);
        // After the write and before its answer: a sync that began in between does not count.
        self.dirty.store(true, Ordering::Release);
        written.map_err(Error::bytes("write", &self.path, bytes.start))?;
        let len = range.len().bytes();
        if len >= STREAM {
            vectored::begin_to_store(&self.file, bytes.start, len);
        }
        // The length only grows, so most writes need only a load.
        if fresh && self.len.load(Ordering::Relaxed) < bytes.end {
            self.len.fetch_max(bytes.end, Ordering::Release);
        }
        Ok(())
    }

    /// Fills sectors with zeros; they keep their storage.
    ///
    /// # Errors
    /// [`Error::Bytes`] if the write fails.
    pub(super) fn zero(&self, range: SectorRange) -> Result<(), Error> {
        let bytes = range.bytes();
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let zeroed = match fallocate(&self.file, flags, bytes.start, range.len().bytes()) {
            Err(Errno::OPNOTSUPP) => self.write_zeros(bytes.clone()),
            zeroed => zeroed.map_err(io::Error::from),
        };
        self.dirty.store(true, Ordering::Release);
        zeroed.map_err(Error::bytes("zero", &self.path, bytes.start))
    }

    fn write_zeros(&self, bytes: Range<u64>) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let end = bytes.end;
        bytes.step_by(ZEROS.len()).try_for_each(|at| {
            let part = (end - at).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part as usize], at)
        })
    }

    /// Writes the header.
    ///
    /// # Errors
    /// [`Error::Bytes`] if it cannot be written.
    pub(super) fn write_header(&self, header: &Header, kind: Kind) -> Result<(), Error> {
        let written = self.file.write_all_at(&encode_data_header(header, kind), 0);
        self.dirty.store(true, Ordering::Release);
        written.map_err(Error::bytes("write", &self.path, 0))
    }

    /// Makes the file `len` bytes long; its content is not longer.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be that long.
    pub(super) fn enlarge(&self, len: u64) -> Result<(), Error> {
        let enlarged = self.file.set_len(len);
        self.dirty.store(true, Ordering::Release);
        enlarged.map_err(Error::file("enlarge", &self.path))
    }

    /// Frees the storage of sectors, which then read as zeros.
    pub(super) fn punch(&self, range: SectorRange) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let bytes = range.bytes();
        // In a file system without holes, free sectors keep their storage until they are used again.
        let _ = fallocate(&self.file, flags, bytes.start, range.len().bytes());
    }

    /// Returns whether data was written since the last sync began.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Makes all written data durable.
    ///
    /// # Errors
    /// That of `fdatasync(2)`; data may be lost then.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.dirty.swap(false, Ordering::AcqRel) {
            true => self.file.sync_data(),
            false => Ok(()),
        }
    }

    /// Fails if another program truncated the file: a write behind its end would turn the missing
    /// data into zeros. On some file systems this waits for a running sync, as a write does.
    ///
    /// # Errors
    /// [`Error::CutShort`]; [`Error::File`] if the length cannot be read.
    pub(super) fn check_len(&self) -> Result<(), Error> {
        // The file position has no other use; `fstat` would take a third of a small write's time.
        self.expect_len(|| Ok(seek(&self.file, SeekFrom::End(0))?))
    }

    /// Like [`DataFile::check_len`], but does not wait for a running sync.
    ///
    /// # Errors
    /// As [`DataFile::check_len`].
    pub(super) fn check_len_during_sync(&self) -> Result<(), Error> {
        self.expect_len(|| Ok(self.file.metadata()?.len()))
    }

    fn expect_len(&self, find: impl FnOnce() -> io::Result<u64>) -> Result<(), Error> {
        // In this order, because the file may grow in between.
        let expected = self.len.load(Ordering::Acquire);
        let found = find().map_err(Error::file("examine", &self.path))?;
        match found < expected {
            true => Err(Error::CutShort {
                path: self.path.clone(),
                expected,
                found,
            }),
            false => Ok(()),
        }
    }

    /// Seals the file ([`seal::seal`]).
    ///
    /// # Errors
    /// As [`seal::seal`].
    pub(super) fn seal(
        &self,
        header: &Header,
        kind: Kind,
        mappings: &[Mapping],
    ) -> Result<(), Error> {
        seal::seal(&self.file, &self.path, header, kind, mappings)
    }

    /// Unlocks the file, so that other processes can open it.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be unlocked.
    pub(super) fn unlock(&self) -> Result<(), Error> {
        let unlocked = self.file.unlock();
        unlocked.map_err(Error::file("unlock", &self.path))
    }
}
